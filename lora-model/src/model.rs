use std::{collections::BTreeMap, path::Path};

use lora_core::{
    Tape, Tensor, Var, lowrank, ops,
    peft::{Adapted, Base},
};
use lora_kernels::{DType, Device, MatMut, add_bias, axpby, gemm};

use crate::{
    Batch, Error, Input, KvCache, KvShape, Limits, Parts, Result, Texts,
    batch::VirtualInputs,
    checkpoint::{self, Layout, TensorSpec},
    config::RawConfig,
    layers::Weight,
    virtual_rows::Place,
};

/// What a model's head gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// The next token.
    CausalLm,
    /// The token in its own place, which is hidden from the model.
    MaskedLm,
    /// One of so many labels for each sequence.
    Classification {
        /// How many.
        labels: usize,
    },
    /// A number for each sequence.
    Regression,
}

impl Task {
    /// In words, for messages.
    pub fn name(self) -> &'static str {
        match self {
            Task::CausalLm => "continuing text",
            Task::MaskedLm => "filling in hidden tokens",
            Task::Classification { .. } => "classifying sequences",
            Task::Regression => "rating sequences",
        }
    }
}

/// The last linear map of a model: logits = x·Wᵀ + b.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// What its outputs are.
    pub task: Task,
    /// W [outputs, d].
    pub weight: &'a Weight,
    /// b \[outputs\].
    pub bias: Option<&'a Weight>,
}

/// A transformer with a head. An architecture implements the few required methods in one file; backward passes, adapters,
/// losses and generation come with them.
pub trait Model: Base + Send + Sync {
    /// What all architectures have in common: the configuration, the outline, the weights.
    fn parts(&self) -> &Parts;

    /// What its embeddings can look up.
    fn limits(&self) -> Limits;

    /// The token that ends a text, by the configuration; `None` for an encoder, whose texts go on nowhere.
    fn end_of_text(&self) -> Option<u32> {
        None
    }

    /// What its keys and values look like; `None` for an encoder, which generates nothing.
    fn kv_shape(&self) -> Option<KvShape> {
        None
    }

    /// Sets every dropout of the base itself (not of adapters) to the given rate.
    fn set_base_dropout(&mut self, p: f64);

    /// The head.
    fn head(&self) -> Head<'_>;

    /// The final hidden states, [rows, d]: of all rows, or of those that are looked at ([`Input::only`]), which are then the
    /// only ones that the last layer computes after its attention ([`Input::wanted`]).
    fn hidden<'m>(&'m self, t: &mut Tape<'m>, adapted: &'m Adapted, input: &mut Input<'m>) -> Result<Var>;

    /// What the head's matrix is applied to, of the hidden states x of the rows that it looks at: x itself, or what an
    /// encoder's pooler or transform makes of it.
    fn features(&self, _t: &mut Tape, _adapted: &Adapted, x: Var) -> Result<Var> {
        Ok(x)
    }

    /// The configuration as it was read, to be written back with all its keys.
    fn config(&self) -> &RawConfig {
        &self.parts().raw
    }

    /// How the weights were spread over files.
    fn layout(&self) -> &Layout {
        &self.parts().layout
    }

    /// What its head gives.
    fn task(&self) -> Task {
        self.head().task
    }

    /// Where the weights lie.
    fn device(&self) -> Device {
        self.head().weight.tensor.device()
    }

    /// The positions that a method's virtual tokens leave for the text.
    fn free_positions(&self, adapted: &Adapted) -> usize {
        self.limits().max_positions.saturating_sub(Place::of(adapted).tokens().positions())
    }

    /// A batch for this model under a method; see [`Batch::new`].
    ///
    /// # Errors
    /// An id outside the vocabulary, a sequence longer than the positions.
    fn batch(&self, adapted: &Adapted, texts: &Texts) -> Result<Batch> {
        Batch::new(&self.device(), self.limits(), self.task(), adapted, texts)
    }

    /// `scale` times the summed loss of the batch's targets: cross-entropy ([`ops::loss_head`]), or of a regression the
    /// squared error ([`ops::squared_error`]), which label smoothing leaves alone.
    fn loss<'m>(
        &'m self,
        t: &mut Tape<'m>,
        adapted: &'m Adapted,
        batch: &'m Batch,
        smoothing: f64,
        scale: f64,
    ) -> Result<Var> {
        let mut input = Input::whole(batch).only(&batch.target_rows);
        t.share_rows(batch.shares.clone());
        let x = t.on_rows_with(adapted.stream_tokens().count(), |t| self.hidden(t, adapted, &mut input))?;
        let x = t.on_target_rows(|t| self.features(t, adapted, x))?;
        self.head().loss(t, adapted, &x, &batch.targets, (smoothing, scale))
    }

    /// The logits of all tokens of a batch [tokens, vocabulary], or of a classifier those of its sequences [sequences,
    /// labels]: for inspection and evaluation; training and generation never hold those of all tokens.
    fn logits(&self, adapted: &Adapted, batch: &Batch) -> Result<Tensor> {
        let mut t = Tape::inference(&adapted.params);
        t.share_rows(batch.shares.clone());
        let all = Input::whole(batch);
        let mut input = match (self.task(), &batch.virtual_rows) {
            (Task::Classification { .. } | Task::Regression, _) => all.only(&batch.target_rows),
            (_, Some(VirtualInputs { place: Place::Stream(_), own, .. })) => all.only(own),
            _ => all,
        };
        let x = self.hidden(&mut t, adapted, &mut input)?;
        let x = self.features(&mut t, adapted, x)?;
        self.head().logits(&mut t, adapted, &x)
    }

    /// An empty cache for `sequences` sequences with room for `rows` positions in all.
    ///
    /// # Errors
    /// [`Error::Task`] for an encoder.
    fn cache(&self, sequences: usize, rows: usize) -> Result<KvCache> {
        let task = self.task().name();
        let shape = self.kv_shape().ok_or(Error::Task { task, what: "continue text" })?;
        Ok(KvCache::new(&self.device(), self.dtype(), shape, sequences, rows)?)
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
        let (limits, place) = (self.limits(), Place::of(adapted));
        limits.check_tokens(tokens)?;
        for (i, &n) in new.iter().enumerate() {
            // The cache has rows of virtual tokens too, counted or not.
            let tokens = place.tokens();
            let so_far = match cache.len(i) {
                0 => tokens.positions(),
                rows => rows - (tokens.count() - tokens.positions()),
            };
            limits.check_length(so_far + n)?;
        }
        cache.extend(limits, place, adapted.of_sequences(), tokens, new)?;
        let pass = |cache: &mut KvCache| {
            let mut t = Tape::inference(&adapted.params);
            t.share_rows(cache.shares());
            let x = self.hidden(&mut t, adapted, &mut Input::cached(cache))?;
            let x = self.features(&mut t, adapted, x)?;
            self.head().logits(&mut t, adapted, &x)
        };
        #[cfg(feature = "cuda")]
        return crate::recorded::run(cache, &adapted.params, &self.head().weight.tensor, pass);
        #[cfg(not(feature = "cuda"))]
        pass(cache)
    }

    /// Writes the model's configuration and weights into `dir` in f32, in the layout and under the names they were read with;
    /// tensors of `changed` in place of the model's own. One for an output head that shared the embeddings' is written
    /// too, and the configuration says that they are two.
    ///
    /// # Errors
    /// What writing files can cause; see [`checkpoint::save`].
    fn save(&self, dir: &Path, changed: &BTreeMap<String, Tensor>) -> Result<()> {
        self.save_in(DType::F32, dir, changed)
    }

    /// As [`Model::save`], with all weights rounded to a type: f32, bf16 or f16.
    ///
    /// # Errors
    /// Those of [`Model::save`], and a number that is too large for f16.
    fn save_in(&self, dtype: DType, dir: &Path, changed: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut tensors: BTreeMap<&str, &Tensor> =
            self.tensors().map(|(name, t)| (name, changed.get(name).unwrap_or(t))).collect();
        let head = changed.get_key_value(HEAD).filter(|_| !tensors.contains_key(HEAD));
        tensors.extend(head.map(|(name, t)| (name.as_str(), t)));
        let specs: Vec<TensorSpec> =
            tensors.iter().map(|(name, t)| TensorSpec::new(*name, t.shape()).in_dtype(dtype)).collect();
        checkpoint::save(dir, self.layout(), &specs, |name| Ok(tensors[name].to_dtype(DType::F32)?))?;
        let (mut config, name) = (self.config().clone(), RawConfig::type_name(dtype));
        if head.is_some() {
            config.set("tie_word_embeddings", false);
        }
        // A configuration that says otherwise would have them rounded when they are loaded.
        let said: Vec<&str> = ["dtype", "torch_dtype"].into_iter().filter(|key| config.value(key).is_some()).collect();
        said.iter().for_each(|key| config.set(key, name));
        if said.is_empty() && dtype != DType::F32 {
            config.set("torch_dtype", name);
        }
        config.save(dir)
    }
}

/// The matrix of an output head of its own.
const HEAD: &str = "lm_head.weight";

impl Head<'_> {
    fn vars(&self, t: &Tape, adapted: &Adapted) -> Result<(Var, Option<Var>)> {
        Ok((self.weight.var(t, adapted)?, self.bias.map(|b| b.var(t, adapted)).transpose()?))
    }

    /// [`Model::loss`] of the features x, whichever heads they have.
    fn loss(&self, t: &mut Tape, adapted: &Adapted, x: &Var, targets: &Tensor, scalars: (f64, f64)) -> Result<Var> {
        let Some(heads) = adapted.heads(t, &self.weight.name, x.value().rows())? else {
            return self.loss_of_one(t, adapted, x, targets, scalars);
        };
        assert!(!x.is_tracked(), "a batch with several adapters is for inference");
        let mut sum = Tensor::zeros(&x.value().device(), x.value().dtype().accumulator(), &[1])?;
        let targets = targets.clone().reshape(&[targets.len(), 1]);
        for (rows, own) in heads {
            let mut t = Tape::inference(&own.params);
            let x = t.constant(&x.value().rows_in(rows.clone()));
            let targets = targets.rows_in(rows.clone()).reshape(&[rows.len()]);
            let part = self.loss_of_one(&mut t, own, &x, &targets, scalars)?;
            axpby(1.0, part.value().mat(), 1.0, sum.make_mut()?)?;
        }
        Ok(t.constant(&sum))
    }

    /// The loss of one head.
    fn loss_of_one(
        &self,
        t: &mut Tape,
        adapted: &Adapted,
        x: &Var,
        targets: &Tensor,
        (smoothing, scale): (f64, f64),
    ) -> Result<Var> {
        let (w, b) = self.vars(t, adapted)?;
        Ok(match self.task {
            Task::Regression => {
                let y = ops::linear_wide(t, x, &w, lowrank::Layout::OutIn, b.as_ref())?;
                ops::squared_error(t, &y, targets, scale)?
            }
            _ => {
                let more = t.on_target_rows(|t| adapted.beside_head(t, &self.weight.name, x))?;
                ops::loss_head_beside(t, x, &w, b.as_ref(), &more, targets, smoothing, scale)?
            }
        })
    }

    fn logits(&self, t: &mut Tape, adapted: &Adapted, x: &Var) -> Result<Tensor> {
        let (rows, outputs) = (x.value().rows(), self.weight.tensor.rows());
        let mut logits = Tensor::empty(&x.value().device(), x.value().dtype().accumulator(), &[rows, outputs])?;
        let Some(heads) = adapted.heads(t, &self.weight.name, rows)? else {
            self.logits_of_one(t, adapted, x, logits.make_mut()?)?;
            return Ok(logits);
        };
        for (rows, own) in heads {
            let mut t = Tape::inference(&own.params);
            let x = t.constant(&x.value().rows_in(rows.clone()));
            self.logits_of_one(&mut t, own, &x, logits.make_mut()?.rows_in(rows))?;
        }
        Ok(logits)
    }

    /// The logits of one head.
    fn logits_of_one(&self, t: &mut Tape, adapted: &Adapted, x: &Var, mut logits: MatMut) -> Result<()> {
        let (w, b) = self.vars(t, adapted)?;
        let more = adapted.beside_head(t, &self.weight.name, x)?;
        gemm(1.0, x.value().mat(), w.value().t(), 0.0, logits.reborrow())?;
        for ops::BesideHead { factor, x, w } in &more {
            gemm(*factor, x.value().mat(), w.value().t(), 1.0, logits.reborrow())?;
        }
        if let Some(b) = b {
            let b = b.value().to(logits.device(), logits.dtype())?;
            add_bias(b.mat(), logits)?;
        }
        Ok(())
    }
}
