//! Models and adapters in the formats of other programs: models as Hugging Face folders, adapters both ways.

mod adapterhub;
mod llama2c;
mod loralib;
mod sentencepiece;
mod torch;

use std::path::Path;

use lora_kernels::{Device, all_finite};
use serde_json::{Value, json};

pub use adapterhub::{from_adapterhub, to_adapterhub};
pub use llama2c::Llama2c;
pub use loralib::{Loralib, from_loralib, to_loralib};
pub use sentencepiece::Vocabulary;
pub use torch::{StateDict, read_state_dict, write_state_dict};

use crate::{
    Error, Result,
    checkpoint::TensorFile,
    config::{CONFIG_FILE, RawConfig},
    files,
};

/// The token that begins a text. In llama2.c it ends one as well: there texts follow each other with it between them, and
/// `run` stops where it comes.
pub const BOS: u32 = 1;

/// Writes a model of llama2.c and its vocabulary into `dir`: `config.json`, `model.safetensors`, `tokenizer.json` and the
/// files that say where a text begins and ends.
///
/// # Errors
/// Weights that are shorter or longer than their header says; what writing files can cause.
///
/// # Panics
/// When the vocabulary has not the model's size: it was read for another model.
pub fn write(model: &Llama2c, vocabulary: &Vocabulary, dir: &Path) -> Result<()> {
    let config = model.config();
    assert_eq!(vocabulary.len(), config.vocab_size, "the vocabulary is the model's");
    model.save_weights(dir)?;
    RawConfig::new(&dir.join(CONFIG_FILE), config.to_json()).save(dir)?;
    let [unk, bos, _] = sentencepiece::SPECIAL;
    let ids = json!({"bos_token_id": BOS, "eos_token_id": BOS});
    let tokenizer = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": bos,
        "unk_token": unk,
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": false,
    });
    let write = |name: &str, json: &Value| files::write_bytes(&dir.join(name), format!("{json:#}\n").as_bytes());
    write("tokenizer.json", &vocabulary.to_json())?;
    write("tokenizer_config.json", &tokenizer)?;
    write("generation_config.json", &ids)
}

/// The tensors of an adapter's file, of safetensors or of `torch.save`, in f32; they have to be all numbers.
fn tensors_of(path: &Path) -> Result<StateDict> {
    let state = match path.extension().is_some_and(|e| e == "safetensors") {
        true => safetensors_of(path)?,
        false => read_state_dict(path)?,
    };
    for (name, t) in &state.tensors {
        if !all_finite(t.mat())? {
            let problem = format!("tensor {name} holds a NaN or an infinity; its training failed");
            return Err(Error::Weights { file: path.to_owned(), problem });
        }
    }
    Ok(state)
}

fn safetensors_of(path: &Path) -> Result<StateDict> {
    let file = TensorFile::open(path)?;
    let mut state = StateDict::default();
    for info in file.names().filter_map(|name| file.info(name)) {
        let tensor = file.tensor(&info.stored_name, &info.shape, &Device::Cpu)?;
        state.tensors.insert(info.stored_name, tensor);
    }
    Ok(state)
}
