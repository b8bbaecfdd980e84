//! A model from nothing: vocabulary, fresh weights, and a run that trains all of them.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use lora_core::peft::{Adapted, Full};
use lora_model::{Gpt2, Model, config::Gpt2Config, files, tokenizer::Tokenizer};

use crate::{
    Encoder, Error, Observer, Place, Result, Summary, TrainConfig,
    data::{self, Content, Corpus, Format},
    output::Output,
    run::Run,
    schedule::Schedule,
};

/// What [`pretrain`] depends on: the flags of `lora pretrain`.
#[derive(Clone, Debug, PartialEq)]
pub struct PretrainConfig {
    /// The texts: one document each, which together make one stream; or `.jsonl` files of examples as for training, each a
    /// sequence of its own.
    pub text: Vec<PathBuf>,
    /// The model's folder.
    pub out: PathBuf,
    /// A text to evaluate on.
    pub valid: Option<PathBuf>,
    /// Tokens of the vocabulary at most; short texts give fewer.
    pub vocab: usize,
    /// Blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub dim: usize,
    /// Attention heads.
    pub heads: usize,
    /// Positions of the model, and tokens of a training sequence.
    pub context: usize,
    /// Dropout everywhere.
    pub dropout: f64,
    /// Passes over the text; not together with `steps`.
    pub epochs: Option<f64>,
    /// Optimiser steps; one epoch when neither is given.
    pub steps: Option<u64>,
    /// Sequences of one optimiser step.
    pub batch_size: usize,
    /// Micro-batches that a step's batch is split into.
    pub grad_accum: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// Steps over which the learning rate rises from 0.
    pub warmup: u64,
    /// Course of the learning rate.
    pub schedule: Schedule,
    /// AdamW's decoupled weight decay λ, of matrices only.
    pub weight_decay: f64,
    /// Largest norm of the gradient; 0 is no limit.
    pub clip: f64,
    /// Steps between evaluations on `valid`, with one at the end; 0 is at the end of every epoch.
    pub eval_every: u64,
    /// Steps between checkpoints, with one at the end; 0 is none.
    pub save_every: u64,
    /// Checkpoints to keep, the newest; 0 keeps all.
    pub keep: usize,
    /// Seed of initialisation, order and dropout.
    pub seed: u64,
    /// File that gets one JSON object per step.
    pub log: Option<PathBuf>,
    /// `cpu`, `cuda`, `cuda:N` or `auto`; see [`Place`].
    pub device: String,
    /// `f32`, `bf16`, `f16`, or `auto`: bf16 on CUDA, else f32.
    pub dtype: String,
}

impl Default for PretrainConfig {
    fn default() -> Self {
        PretrainConfig {
            text: Vec::new(),
            out: PathBuf::new(),
            valid: None,
            vocab: 4096,
            layers: 6,
            dim: 256,
            heads: 8,
            context: 256,
            dropout: 0.0,
            epochs: None,
            steps: None,
            batch_size: 16,
            grad_accum: 1,
            lr: 1e-3,
            warmup: 100,
            schedule: Schedule::Cosine,
            weight_decay: 0.1,
            clip: 1.0,
            eval_every: 0,
            save_every: 0,
            keep: 1,
            seed: 0,
            log: None,
            device: "cpu".into(),
            dtype: "auto".into(),
        }
    }
}

/// Learns a byte-level BPE vocabulary from the texts, makes a GPT-2 of the given shape, trains all its weights on the
/// texts as [`train`](crate::train) would, and leaves the model's folder in `config.out`.
///
/// Vocabulary and first weights depend on texts and seed alone. So a run is resumed as any other, from its newest
/// checkpoint, and they are made again rather than kept.
///
/// # Errors
/// As of [`train`](crate::train).
pub fn pretrain(config: &PretrainConfig, resume: bool, observer: &mut dyn Observer) -> Result<Summary> {
    config.check()?;
    let run = config.as_training();
    run.check()?;
    let mut output = Output::open(&run, resume)?;
    let read = |path: &PathBuf| match Format::of_path(path) {
        Format::Jsonl => data::read(path, Format::Jsonl),
        _ => data::read(path, Format::Text),
    };
    let corpora: Vec<Corpus> = config.text.iter().map(read).collect::<data::Result<_>>()?;
    for corpus in &corpora {
        if let Some(chat) = corpus.examples.iter().find(|e| matches!(e.content, Content::Chat(_))) {
            let problem =
                "a model that is new has no chat template to write \"messages\" with; give \"text\"".to_owned();
            return Err(data::Error::Chat { path: corpus.path.clone(), line: chat.line, problem }.into());
        }
    }

    let tokenizer = Tokenizer::train_bpe(corpora.iter().flat_map(texts), config.vocab)?;
    let (Place { device, dtype, .. }, run) = Place::of_run(&run, output.earlier.as_ref(), &mut output.notes)?;
    let shape = config.shape(tokenizer.vocab_size(), tokenizer.end_of_text()?);
    let model = Gpt2::init(shape, &config.out, config.seed, &device)?;
    let encoder = Encoder::new(tokenizer, &model)?;
    let encode = |corpora: &[Corpus]| data::encode(corpora, &encoder, run.max_length);
    let data = encode(&corpora)?;
    drop(corpora);
    let valid = config.valid.as_ref().map(|path| Result::Ok(encode(&[read(path)?])?)).transpose()?;

    let adapted = Adapted::new(&Full, &model, &device, dtype, config.seed)?;
    let save = |dir: &Path, adapted: &Adapted| {
        files::create_folder(dir)?;
        encoder.tokenizer().save(dir)?;
        Ok(model.save(dir, &adapted.merged(&model)?)?)
    };
    let whole = Run { model: &model, adapted, data: &data, valid: valid.as_ref(), output, save: &save };
    whole.run(&run, resume, observer)
}

fn texts(corpus: &Corpus) -> impl Iterator<Item = &str> + Send {
    let texts = corpus.examples.iter().flat_map(|e| match &e.content {
        Content::Text(text) => [text.as_str(), ""],
        Content::Pair { prompt, completion } => [prompt.as_str(), completion.as_str()],
        Content::Chat(_) => ["", ""],
        Content::Labelled { text, second, .. } => [text.as_str(), second.as_deref().unwrap_or_default()],
    });
    texts.filter(|text| !text.is_empty())
}

impl PretrainConfig {
    /// Refuses sizes that make no model, by the names of the flags.
    fn check(&self) -> Result<()> {
        const LEAST: usize = 257;
        const MOST: usize = 1 << 24;
        const MOST_PARAMETERS: u128 = 1 << 34;
        if self.text.is_empty() {
            return Err(Error::option("text", "", "name at least one text file to learn from"));
        }
        for (option, n, least) in [
            ("vocab", self.vocab, LEAST),
            ("layers", self.layers, 1),
            ("dim", self.dim, 1),
            ("heads", self.heads, 1),
            ("context", self.context, 1),
        ] {
            if !(least..=MOST).contains(&n) {
                return Err(Error::option(option, n, format!("must be from {least} to {MOST}")));
            }
        }
        if !self.dim.is_multiple_of(self.heads) {
            return Err(Error::option("heads", self.heads, format!("must divide dim = {}", self.dim)));
        }
        let parameters = self.shape(self.vocab, 0).parameters();
        if parameters > MOST_PARAMETERS {
            let why = format!("a model of {parameters} parameters is too large to train here; make it smaller");
            return Err(Error::option("dim", self.dim, why));
        }
        Ok(())
    }

    fn shape(&self, vocab_size: usize, end_of_text: u32) -> Gpt2Config {
        Gpt2Config {
            vocab_size,
            n_positions: self.context,
            n_embd: self.dim,
            n_layer: self.layers,
            n_head: self.heads,
            resid_pdrop: self.dropout,
            embd_pdrop: self.dropout,
            attn_pdrop: self.dropout,
            bos_token_id: Some(end_of_text),
            eos_token_id: Some(end_of_text),
            ..Gpt2Config::small()
        }
    }

    /// The run that trains the weights. In place of a base's folder stands what the model was made from, so that
    /// continuing with another shape is refused; in place of the data's path stand those of all texts.
    fn as_training(&self) -> TrainConfig {
        let PretrainConfig { vocab, layers, dim, heads, context, .. } = self;
        let model =
            format!("a new GPT-2 of vocab {vocab}, layers {layers}, dim {dim}, heads {heads}, context {context}");
        let mut data = OsString::new();
        for (i, path) in self.text.iter().enumerate() {
            data.push(if i > 0 { ", " } else { "" });
            data.push(path);
        }
        let data = PathBuf::from(data);
        TrainConfig {
            model: model.into(),
            data,
            out: self.out.clone(),
            valid: self.valid.clone(),
            format: Some(Format::Text),
            method: "full".into(),
            dropout: self.dropout,
            epochs: self.epochs.or((self.steps.is_none()).then_some(1.0)),
            steps: self.steps,
            batch_size: self.batch_size,
            grad_accum: self.grad_accum,
            lr: self.lr,
            weight_decay: self.weight_decay,
            no_decay_vectors: true,
            schedule: self.schedule,
            warmup: self.warmup,
            // The last token of a sequence takes no position.
            max_length: self.context + 1,
            clip: self.clip,
            seed: self.seed,
            eval_every: self.eval_every,
            save_every: self.save_every,
            keep: self.keep,
            log: self.log.clone(),
            device: self.device.clone(),
            dtype: self.dtype.clone(),
            ..TrainConfig::default()
        }
    }
}
