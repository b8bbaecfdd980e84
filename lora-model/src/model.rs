use std::{collections::BTreeMap, path::Path};

use lora_core::{
    Tape, Tensor, Var, ops,
    peft::{Adapted, Base},
};
use lora_kernels::{DType, Device, gemm};

use crate::{
    Batch, Context, Gpt2, KvCache, KvShape, Limits, Result,
    cache::Inputs,
    checkpoint::{self, Layout, TensorSpec},
    config::{Architecture, RawConfig},
};

/// A transformer with a language-model head. An architecture implements the few required methods in one file; backward
/// passes, adapters, losses and generation come with them.
pub trait Model: Base + Send + Sync {
    /// The configuration as it was read, to be written back with all its keys.
    fn config(&self) -> &RawConfig;

    /// What its embeddings can look up.
    fn limits(&self) -> Limits;

    /// The token that ends a text, by the configuration.
    fn end_of_text(&self) -> Option<u32>;

    /// What its keys and values look like.
    fn kv_shape(&self) -> KvShape;

    /// Sets every dropout of the base itself (not of adapters) to the given rate.
    fn set_base_dropout(&mut self, p: f64);

    /// How the weights were spread over files.
    fn layout(&self) -> &Layout;

    /// Name and tensor of the head's matrix [vocabulary, d].
    fn head(&self) -> (&str, &Tensor);

    /// The final hidden states, [rows, d], of tokens `[rows]` at positions `[rows]`.
    fn hidden(
        &self,
        t: &mut Tape,
        adapted: &Adapted,
        tokens: &Tensor,
        positions: &Tensor,
        context: &mut Context,
    ) -> Result<Var>;

    /// Where the weights lie.
    fn device(&self) -> Device {
        self.head().1.device()
    }

    /// A batch for this model; see [`Batch::new`].
    ///
    /// # Errors
    /// An id outside the vocabulary, a sequence longer than the positions.
    fn batch(&self, tokens: &[u32], lengths: &[usize], target_rows: &[u32], target_ids: &[u32]) -> Result<Batch> {
        Batch::new(&self.device(), self.limits(), tokens, lengths, target_rows, target_ids)
    }

    /// `scale` times the summed cross-entropy of the batch's targets; see [`ops::loss_head`].
    fn loss(&self, t: &mut Tape, adapted: &Adapted, batch: &Batch, smoothing: f64, scale: f64) -> Result<Var> {
        let h = self.hidden(t, adapted, &batch.tokens, &batch.positions, &mut Context::Whole(&batch.sequences))?;
        let x = ops::gather(t, &h, &batch.target_rows)?;
        drop(h);
        let (name, w) = self.head();
        let w = adapted.weight(t, name, w)?;
        Ok(ops::loss_head(t, &x, &w, &batch.target_ids, smoothing, scale)?)
    }

    /// The logits [rows, vocabulary] of all rows of a batch: for inspection; training and generation never hold them.
    fn logits(&self, adapted: &Adapted, batch: &Batch) -> Result<Tensor> {
        let mut t = Tape::inference(&adapted.params);
        let h = self.hidden(&mut t, adapted, &batch.tokens, &batch.positions, &mut Context::Whole(&batch.sequences))?;
        head_logits(self.head(), &t, adapted, h.value())
    }

    /// An empty cache for `sequences` sequences with room for `rows` positions in all.
    fn cache(&self, sequences: usize, rows: usize) -> Result<KvCache> {
        Ok(KvCache::new(&self.device(), self.dtype(), self.kv_shape(), sequences, rows)?)
    }

    /// Adds `new[i]` tokens to sequence i of the cache (`tokens` has them sequence by sequence) and gives the logits after
    /// the last one of each, [sequences, vocabulary].
    ///
    /// # Errors
    /// An id outside the vocabulary, a sequence longer than the positions.
    ///
    /// # Panics
    /// When a sequence gets no token, or the tokens are not as many as announced.
    fn step(&self, adapted: &Adapted, cache: &mut KvCache, tokens: &[u32], new: &[usize]) -> Result<Tensor> {
        assert!(new.iter().all(|&n| n > 0), "every sequence gets a token");
        assert_eq!(new.iter().sum::<usize>(), tokens.len(), "as many tokens as announced");
        self.limits().check_tokens(tokens)?;
        for (i, &n) in new.iter().enumerate() {
            self.limits().check_length(cache.len(i) + n)?;
        }
        cache.extend(tokens, new)?;
        let pass = |cache: &mut KvCache| {
            let mut t = Tape::inference(&adapted.params);
            let Inputs { tokens, positions, last, .. } = cache.inputs.clone();
            let h = self.hidden(&mut t, adapted, &tokens, &positions, &mut Context::Cached(cache))?;
            let x = ops::gather(&mut t, &h, &last)?;
            head_logits(self.head(), &t, adapted, x.value())
        };
        #[cfg(feature = "cuda")]
        return crate::recorded::run(cache, &adapted.params, self.head().1, pass);
        #[cfg(not(feature = "cuda"))]
        pass(cache)
    }

    /// Writes the model's configuration and weights into `dir`, in the layout and under the names they were read with;
    /// tensors of `changed` in place of the model's own.
    ///
    /// # Errors
    /// What writing files can cause; see [`checkpoint::save`].
    fn save(&self, dir: &Path, changed: &BTreeMap<String, Tensor>) -> Result<()> {
        let tensors: BTreeMap<&str, &Tensor> =
            self.tensors().map(|(name, t)| (name, changed.get(name).unwrap_or(t))).collect();
        let specs: Vec<TensorSpec> = tensors.iter().map(|(name, t)| TensorSpec::new(*name, t.shape())).collect();
        checkpoint::save(dir, self.layout(), &specs, |name| Ok(tensors[name].clone()))?;
        // Weights are written in f32; a configuration that says otherwise would have them rounded when they are loaded.
        let mut config = self.config().clone();
        for key in ["dtype", "torch_dtype"] {
            if config.value(key).is_some() {
                config.set(key, "float32");
            }
        }
        config.save(dir)
    }
}

fn head_logits((name, w): (&str, &Tensor), t: &Tape, adapted: &Adapted, x: &Tensor) -> Result<Tensor> {
    let w = adapted.weight(t, name, w)?;
    let mut logits = Tensor::empty(&x.device(), x.dtype().accumulator(), &[x.rows(), w.value().rows()])?;
    gemm(1.0, x.mat(), w.value().t(), 0.0, logits.make_mut()?)?;
    Ok(logits)
}

/// Loads the model in a folder, whatever its architecture, in f32.
///
/// # Errors
/// An unknown architecture, a configuration that makes no sense, weights that are missing, damaged or of another shape;
/// each names the file.
pub fn load(dir: &Path, device: &Device) -> Result<Box<dyn Model>> {
    load_as(dir, device, DType::F32)
}

/// As [`load`], with weights and activations of the given type: bf16 or f16 on a CUDA device.
///
/// # Errors
/// Those of [`load`]; no memory on the device.
pub fn load_as(dir: &Path, device: &Device, dtype: DType) -> Result<Box<dyn Model>> {
    let config = RawConfig::from_dir(dir)?;
    match config.architecture()? {
        Architecture::Gpt2 => Ok(Box::new(Gpt2::load(dir, config, device, dtype)?)),
    }
}
