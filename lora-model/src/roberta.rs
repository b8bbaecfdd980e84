use std::path::Path;

use lora_core::{
    Tape, Tensor, Var,
    lowrank::Layout::OutIn,
    peft::{Adapted, Base, Outline},
};
use lora_kernels::{Activation, Device};

use crate::{
    Fetch, Head, Input, Limits, LoadOptions, Model, Parts, Result, Task,
    bert::Encoder,
    build::{self, Build},
    checkpoint::Layout,
    config::{RawConfig, RobertaConfig},
    heads::{self, EncoderHead},
    layers::Projection,
};

/// RoBERTa (Liu et al. 2019): BERT's layers, positions that begin after the padding token's number, and heads of its
/// own.
///
/// ```text
/// logits = out_proj(tanh(dense(h[first token])))       of a classifier or a regression
/// logits = LN(gelu(dense(h)))·wordsᵀ + bias            of a masked LM
/// ```
/// The names are those of Transformers' `RobertaForSequenceClassification` and `RobertaForMaskedLM`, or of a bare
/// `RobertaModel`.
pub struct Roberta {
    config: RobertaConfig,
    parts: Parts,
    encoder: Encoder,
    head: EncoderHead,
}

impl RobertaConfig {
    /// What the model looks like with a head for `task`, without weights.
    ///
    /// # Panics
    /// When the task is to continue text.
    pub fn outline(&self, task: Task) -> Outline {
        build::outline(|b: &mut Build| describe(self, task, b))
    }
}

/// All of the model, in the order of its weights.
fn describe(config: &RobertaConfig, task: Task, b: &mut Build) -> Result<(Encoder, EncoderHead)> {
    let c = &config.bert;
    let d = c.hidden_size;
    b.describe("roberta", c.num_hidden_layers, config.max_positions(), &["query", "value"]);
    let encoder = Encoder::describe(c, "roberta", b)?;
    let head = match task {
        Task::MaskedLm => EncoderHead {
            task,
            dense: b.linear("lm_head.dense", [d, d], OutIn, true)?,
            // Always this one, whatever the layers have.
            activation: Activation::GeluErf,
            norm: Some(b.layer_norm("lm_head.layer_norm", d, c.layer_norm_eps)?),
            weight: encoder.words().clone(),
            bias: b.weight("lm_head.bias", &[c.vocab_size])?,
        },
        _ => {
            b.task_type("SEQ_CLS");
            b.modules_to_save(&["classifier"]);
            let outputs = heads::outputs(task);
            // No place for adapters: it trains whole.
            let module = "classifier.dense".to_owned();
            let weight = b.weight("classifier.dense.weight", &[d, d])?;
            let bias = Some(b.weight("classifier.dense.bias", &[d])?);
            EncoderHead {
                task,
                dense: Projection { module, weight, bias, layout: OutIn },
                activation: Activation::Tanh,
                norm: None,
                weight: b.weight("classifier.out_proj.weight", &[outputs, d])?,
                bias: b.weight("classifier.out_proj.bias", &[outputs])?,
            }
        }
    };
    Ok((encoder, head))
}

impl Roberta {
    /// Loads the weights of a folder whose configuration was read.
    ///
    /// # Errors
    /// A configuration that makes no sense, or names no head when none is asked for; weights that are missing, damaged
    /// or of another shape.
    pub fn load(dir: &Path, raw: RawConfig, device: &Device, options: &LoadOptions) -> Result<Roberta> {
        let config = RobertaConfig::from_raw(&raw)?;
        let task = heads::task(&raw, options)?;
        heads::check_tied(&raw, task, config.bert.tie_word_embeddings)?;
        let files = heads::EncoderFiles {
            family: "Roberta",
            rename: &own_name,
            is_head: |name| {
                ["lm_head.", "classifier.", "roberta.pooler.", "qa_outputs."].iter().any(|p| name.starts_with(p))
            },
            initializer_range: config.bert.initializer_range,
        };
        let describe = |b: &mut Build| describe(&config, task, b);
        let ((encoder, head), parts) = heads::load(dir, raw, device, options, &files, describe)?;
        Ok(Roberta { config, parts, encoder, head })
    }

    /// The model of a configuration with the weights that `fetch` gives; see [`assemble`](crate::assemble()).
    ///
    /// # Errors
    /// A configuration that makes no sense, or names no head when none is asked for; what `fetch` gives.
    pub fn assemble(mut raw: RawConfig, _device: &Device, options: &LoadOptions, fetch: &mut Fetch) -> Result<Roberta> {
        let config = RobertaConfig::from_raw(&raw)?;
        let task = heads::task(&raw, options)?;
        heads::check_tied(&raw, task, config.bert.tie_word_embeddings)?;
        heads::set_asked(&mut raw, "Roberta", options);
        let describe = |b: &mut Build| describe(&config, task, b);
        let ((encoder, head), parts) = build::make(raw, Layout::single(), fetch, describe)?;
        Ok(Roberta { config, parts, encoder, head })
    }

    /// The configuration.
    pub fn roberta_config(&self) -> &RobertaConfig {
        &self.config
    }
}

/// The name of a file's tensor here: bare encoders lack the prefix, older files hold positions as a buffer, and repeat
/// the tied head.
fn own_name(name: &str) -> Option<String> {
    if name.starts_with("lm_head.decoder.") {
        return None;
    }
    heads::encoder_name(name, "roberta")
}

impl Base for Roberta {
    fn outline(&self) -> &Outline {
        self.parts.outline()
    }

    fn tensors(&self) -> Box<dyn Iterator<Item = (&str, &Tensor)> + '_> {
        self.parts.tensors()
    }
}

impl Model for Roberta {
    fn parts(&self) -> &Parts {
        &self.parts
    }

    fn limits(&self) -> Limits {
        let c = &self.config;
        Limits {
            vocab_size: c.bert.vocab_size,
            max_positions: c.max_positions(),
            first_position: c.first_position(),
            segments: c.bert.type_vocab_size,
        }
    }

    fn set_base_dropout(&mut self, p: f64) {
        self.config.bert.set_dropout(p);
    }

    fn head(&self) -> Head<'_> {
        self.head.head()
    }

    fn hidden<'m>(&'m self, t: &mut Tape<'m>, adapted: &'m Adapted, input: &mut Input<'m>) -> Result<Var> {
        self.encoder.hidden(&self.config.bert, t, adapted, input)
    }

    fn features(&self, t: &mut Tape, adapted: &Adapted, x: Var) -> Result<Var> {
        let dropout = if self.head.task == Task::MaskedLm { 0.0 } else { self.config.bert.head_dropout() };
        self.head.features(t, adapted, x, [dropout; 2])
    }
}
