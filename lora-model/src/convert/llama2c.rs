use std::{
    fs::File,
    io::{ErrorKind, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use lora_core::Tensor;
use lora_kernels::Device;

use super::BOS;
use crate::{
    Error, Result,
    checkpoint::{Layout, TensorSpec, save},
    config::{LlamaConfig, LlamaKind},
};

const FIELDS: [&str; 7] = ["dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len"];
const HEADER: u64 = 4 * FIELDS.len() as u64;
/// "ak42": what later versions of the format begin with.
const MAGIC: u32 = 0x616b_3432;

/// A model in the format of llama2.c's `export.py --version 0`: a header of seven i32, then f32 matrices, each kind for all
/// layers in a row. Its queries and keys turn columns 2i and 2i + 1 of a head together, where Hugging Face turns i and
/// i + head_dim / 2.
#[derive(Clone, Debug)]
pub struct Llama2c {
    path: PathBuf,
    config: LlamaConfig,
    tensors: Vec<Stored>,
}

/// Where a tensor lies in the file.
#[derive(Clone, Debug)]
struct Stored {
    spec: TensorSpec,
    /// In bytes.
    offset: u64,
    /// Whether its rows are pairs of columns that turn together.
    turned: bool,
}

impl Llama2c {
    /// Reads the header, and checks the file's size against it. The weights stay on the disk.
    ///
    /// # Errors
    /// [`Error::Weights`] for another version of the format, a header that makes no sense, and a file that is shorter or
    /// longer than it says; [`Error::Io`].
    pub fn open(path: &Path) -> Result<Llama2c> {
        let bad = |problem: String| Error::Weights { file: path.to_owned(), problem };
        let mut file = File::open(path).map_err(|e| Error::io("read", path, e))?;
        let mut bytes = [0; HEADER as usize];
        file.read_exact(&mut bytes).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => bad(format!("too short for the {HEADER} bytes of llama2.c's header")),
            _ => Error::io("read", path, e),
        })?;
        let mut fields = [0; FIELDS.len()];
        for (field, bytes) in fields.iter_mut().zip(bytes.chunks_exact(4)) {
            *field = i32::from_le_bytes(bytes.try_into().expect("four bytes"));
        }
        if fields[0] as u32 == MAGIC {
            return Err(bad(format!(
                "version {} of llama2.c's format; only version 0 is read: export it with `export.py --version 0`",
                fields[1]
            )));
        }
        let tied = fields[5] > 0;
        fields[5] = fields[5].saturating_abs();
        if let Some(i) = fields.iter().position(|&n| n <= 0) {
            return Err(bad(format!("{} = {} in the header; is it a file of llama2.c?", FIELDS[i], fields[i])));
        }
        let [dim, hidden, layers, heads, kv_heads, vocab, positions] = fields.map(|n| n as usize);
        if !dim.is_multiple_of(heads) {
            let problem = format!("n_heads = {heads} in the header does not divide dim = {dim}");
            return Err(bad(format!("{problem}; is it a file of llama2.c?")));
        }
        let config = LlamaConfig {
            vocab_size: vocab,
            hidden_size: dim,
            intermediate_size: hidden,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim: dim / heads,
            max_position_embeddings: positions,
            // What `run` has.
            rms_norm_eps: 1e-5,
            tie_word_embeddings: tied,
            bos_token_id: Some(BOS),
            eos_token_id: Some(BOS),
            ..LlamaConfig::of(LlamaKind::Llama)
        };
        config.validate(path)?;
        let (tensors, expected) = stored(&config);
        let found = file.metadata().map_err(|e| Error::io("read", path, e))?.len();
        if found != expected {
            let what = match found < expected {
                true => "it is cut off: fetch it again",
                false => "what follows belongs to something else",
            };
            return Err(bad(format!("{found} bytes, but its header asks for {expected}; {what}")));
        }
        Ok(Llama2c { path: path.to_owned(), config, tensors })
    }

    /// What the header says, in Hugging Face's words.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Number of tensors.
    pub fn tensors(&self) -> usize {
        self.tensors.len()
    }

    /// Writes the weights as `model.safetensors`, one tensor in memory at a time.
    pub(super) fn save_weights(&self, dir: &Path) -> Result<()> {
        let mut file = File::open(&self.path).map_err(|e| Error::io("read", &self.path, e))?;
        let specs: Vec<TensorSpec> = self.tensors.iter().map(|t| t.spec.clone()).collect();
        save(dir, &Layout::single(), &specs, |name| {
            let stored = self.tensors.iter().find(|t| t.spec.name == name).expect("one of the specs");
            self.read(&mut file, stored).map_err(|e| match e {
                ReadError::Io(e) => Error::io("read", &self.path, e),
                ReadError::Tensor(e) => e.into(),
            })
        })
    }

    fn read(&self, file: &mut File, stored: &Stored) -> std::result::Result<Tensor, ReadError> {
        let shape = &stored.spec.shape;
        let len: usize = shape.iter().product();
        let mut bytes = vec![0; 4 * len];
        file.seek(SeekFrom::Start(stored.offset)).map_err(ReadError::Io)?;
        file.read_exact(&mut bytes).map_err(ReadError::Io)?;
        let floats: Vec<f32> =
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect();
        let floats = if stored.turned { halves(&floats, shape[1], self.config.head_dim) } else { floats };
        Tensor::from_slice(&Device::Cpu, shape, &floats).map_err(ReadError::Tensor)
    }
}

enum ReadError {
    Io(std::io::Error),
    Tensor(lora_core::Error),
}

/// Rows 2i and 2i + 1 of each head as rows i and i + head_dim / 2.
fn halves(w: &[f32], cols: usize, head_dim: usize) -> Vec<f32> {
    let mut turned = Vec::with_capacity(w.len());
    for head in w.chunks_exact(head_dim * cols) {
        for first in 0..2 {
            for row in (first..head_dim).step_by(2) {
                turned.extend_from_slice(&head[row * cols..][..cols]);
            }
        }
    }
    turned
}

/// All tensors in the order of the file, and the file's length.
fn stored(config: &LlamaConfig) -> (Vec<Stored>, u64) {
    let (d, f, kv) = (config.hidden_size, config.intermediate_size, config.kv_width());
    let (mut tensors, mut at) = (Vec::new(), HEADER);
    let mut add = |name: String, shape: &[usize], turned: bool| {
        tensors.push(Stored { spec: TensorSpec::new(name, shape), offset: at, turned });
        at += 4 * shape.iter().product::<usize>() as u64;
    };
    add("model.embed_tokens.weight".into(), &[config.vocab_size, d], false);
    let kinds: [(&str, &[usize], bool); 9] = [
        ("input_layernorm", &[d], false),
        ("self_attn.q_proj", &[d, d], true),
        ("self_attn.k_proj", &[kv, d], true),
        ("self_attn.v_proj", &[kv, d], false),
        ("self_attn.o_proj", &[d, d], false),
        ("post_attention_layernorm", &[d], false),
        ("mlp.gate_proj", &[f, d], false),
        ("mlp.down_proj", &[d, f], false),
        ("mlp.up_proj", &[f, d], false),
    ];
    for (module, shape, turned) in kinds {
        for layer in 0..config.num_hidden_layers {
            add(format!("model.layers.{layer}.{module}.weight"), shape, turned);
        }
    }
    add("model.norm.weight".into(), &[d], false);
    // Cosines and sines of all positions, which nothing reads any more.
    add(String::new(), &[2 * config.max_position_embeddings, config.head_dim / 2], false);
    if !config.tie_word_embeddings {
        add("lm_head.weight".into(), &[config.vocab_size, d], false);
    }
    tensors.retain(|t| !t.spec.name.is_empty());
    (tensors, at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_become_halves_within_their_head() {
        // Two heads of four rows, each row its number twice.
        let w: Vec<f32> = (0..8).flat_map(|r| [r as f32; 2]).collect();
        let rows: Vec<f32> = halves(&w, 2, 4).chunks_exact(2).map(|row| row[1]).collect();
        assert_eq!(rows, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
    }
}
