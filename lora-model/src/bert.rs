use std::path::Path;

use lora_core::{
    Tape, Tensor, Var,
    lowrank::Layout::OutIn,
    ops::{self, Qkv},
    peft::{Adapted, Base, Outline, Part},
};
use lora_kernels::{Activation, Attention, Device};

use crate::{
    Fetch, Head, Input, Limits, LoadOptions, Model, Parts, Result, Task,
    build::{self, Build},
    checkpoint::Layout,
    config::{BertConfig, RawConfig},
    heads::{self, EncoderHead},
    layers::{LayerNorm, Projection, Sublayer, Weight},
};

/// BERT (Devlin et al. 2019): post-norm layers of attention to both sides and a GELU network, learned positions and
/// segments.
///
/// ```text
/// h = LN(words[tokens] + positions + segments)
/// h = LN(h + dense(attention(query(h), key(h), value(h))))      in every layer
/// h = LN(h + output(gelu(intermediate(h))))
/// logits = classifier(tanh(pooler(h[first token])))             of a classifier or a regression
/// logits = LN(gelu(dense(h)))·wordsᵀ + bias                     of a masked LM
/// ```
/// The names are those of Transformers' `BertForSequenceClassification` and `BertForMaskedLM`. A folder that was saved
/// from a bare `BertModel`, whose names lack the prefix `bert.`, is read too.
pub struct Bert {
    config: BertConfig,
    parts: Parts,
    encoder: Encoder,
    head: EncoderHead,
}

/// BERT's layers, which RoBERTa has too.
pub(crate) struct Encoder {
    words: Weight,
    positions: Weight,
    segments: Weight,
    norm: LayerNorm,
    layers: Vec<Layer>,
}

struct Layer {
    query: Projection,
    key: Projection,
    value: Projection,
    attention_dense: Projection,
    attention: Sublayer,
    attention_norm: LayerNorm,
    intermediate: Projection,
    output: Projection,
    mlp: Sublayer,
    mlp_norm: LayerNorm,
}

impl Encoder {
    /// The weights of `{root}.embeddings` and `{root}.encoder`.
    pub(crate) fn describe(c: &BertConfig, root: &str, b: &mut Build) -> Result<Encoder> {
        let (d, f, eps) = (c.hidden_size, c.intermediate_size, c.layer_norm_eps);
        let table = |b: &mut Build, name: &str, rows| b.embedding(format!("{root}.embeddings.{name}"), [rows, d]);
        let words = table(b, "word_embeddings", c.vocab_size)?;
        b.tokens(&words);
        b.keys_values(d);
        let positions = table(b, "position_embeddings", c.max_position_embeddings)?;
        let segments = table(b, "token_type_embeddings", c.type_vocab_size)?;
        let norm = b.layer_norm(format!("{root}.embeddings.LayerNorm"), d, eps)?;
        let mut layers = Vec::with_capacity(c.num_hidden_layers);
        for i in 0..c.num_hidden_layers {
            b.layer(Some(i));
            let module = |name: &str| format!("{root}.encoder.layer.{i}.{name}");
            layers.push(Layer {
                query: b.linear(module("attention.self.query"), [d, d], OutIn, true)?,
                key: b.linear(module("attention.self.key"), [d, d], OutIn, true)?,
                value: b.linear(module("attention.self.value"), [d, d], OutIn, true)?,
                attention_dense: b.linear(module("attention.output.dense"), [d, d], OutIn, true)?,
                attention: b.sublayer(module("attention.output"), Part::Attention, d),
                attention_norm: b.layer_norm(module("attention.output.LayerNorm"), d, eps)?,
                intermediate: b.linear(module("intermediate.dense"), [d, f], OutIn, true)?,
                output: b.linear(module("output.dense"), [f, d], OutIn, true)?,
                mlp: b.sublayer(module("output"), Part::Mlp, d),
                mlp_norm: b.layer_norm(module("output.LayerNorm"), d, eps)?,
            });
        }
        b.layer(None);
        Ok(Encoder { words, positions, segments, norm, layers })
    }

    /// The table of the tokens, which is also the matrix of a tied masked-LM head.
    pub(crate) fn words(&self) -> &Weight {
        &self.words
    }

    /// The final hidden states.
    pub(crate) fn hidden<'m>(
        &'m self,
        c: &'m BertConfig,
        t: &mut Tape<'m>,
        adapted: &'m Adapted,
        input: &mut Input<'m>,
    ) -> Result<Var> {
        let x = input.embed(t, adapted, &self.words)?;
        let s = self.segments.rows(t, adapted, input.segments().expect("limits that tell segments apart"))?;
        let x = ops::add(t, x, s)?;
        let p = self.positions.rows(t, adapted, input.positions())?;
        let x = ops::add(t, x, p)?;
        let h = self.norm.apply(t, adapted, &x)?;
        drop(x);
        let mut h = ops::dropout(t, h, c.hidden_dropout_prob)?;
        for (i, l) in self.layers.iter().enumerate() {
            h = input.layer(t, h, move |t, mut h, input| {
                let q = l.query.apply(t, adapted, &h)?;
                let (k, v) = (l.key.apply(t, adapted, &h)?, l.value.apply(t, adapted, &h)?);
                let cfg = attention(c, t);
                let mut heads = input.attend(t, adapted, i, cfg, Qkv::Separate { q: &q, k: &k, v: &v })?;
                drop((q, k, v));
                if i + 1 == self.layers.len() {
                    [heads, h] = input.wanted(t, [heads, h])?;
                }
                let y = l.attention_dense.apply(t, adapted, &heads)?;
                drop(heads);
                let y = ops::dropout(t, y, c.hidden_dropout_prob)?;
                let h = l.attention.join(t, adapted, h, y, Some(&|t, x| l.attention_norm.apply(t, adapted, x)))?;
                let x = l.intermediate.apply(t, adapted, &h)?;
                let x = ops::activation(t, c.hidden_act, &x)?;
                let y = l.output.apply(t, adapted, &x)?;
                drop(x);
                let y = ops::dropout(t, y, c.hidden_dropout_prob)?;
                l.mlp.join(t, adapted, h, y, Some(&|t, x| l.mlp_norm.apply(t, adapted, x)))
            })?;
        }
        Ok(h)
    }
}

fn attention(c: &BertConfig, t: &mut Tape) -> Attention {
    let (heads, head_dim) = (c.num_attention_heads, c.head_dim());
    let scale = 1.0 / (head_dim as f64).sqrt();
    let dropout = t.dropout_mask(c.attention_probs_dropout_prob);
    Attention { heads, kv_heads: heads, head_dim, scale, causal: false, dropout }
}

impl BertConfig {
    /// What the model looks like with a head for `task`, without weights.
    ///
    /// # Panics
    /// When the task is to continue text.
    pub fn outline(&self, task: Task) -> Outline {
        build::outline(|b: &mut Build| describe(self, task, b))
    }

    /// Sets every dropout.
    pub(crate) fn set_dropout(&mut self, p: f64) {
        (self.hidden_dropout_prob, self.attention_probs_dropout_prob, self.classifier_dropout) = (p, p, Some(p));
    }
}

/// All of the model, in the order of its weights.
fn describe(c: &BertConfig, task: Task, b: &mut Build) -> Result<(Encoder, EncoderHead)> {
    let d = c.hidden_size;
    b.describe("bert", c.num_hidden_layers, c.max_position_embeddings, &["query", "value"]);
    let encoder = Encoder::describe(c, "bert", b)?;
    let head = match task {
        Task::MaskedLm => EncoderHead {
            task,
            dense: b.linear("cls.predictions.transform.dense", [d, d], OutIn, true)?,
            activation: c.hidden_act,
            norm: Some(b.layer_norm("cls.predictions.transform.LayerNorm", d, c.layer_norm_eps)?),
            weight: encoder.words().clone(),
            bias: b.weight("cls.predictions.bias", &[c.vocab_size])?,
        },
        _ => {
            b.task_type("SEQ_CLS");
            b.modules_to_save(&["classifier"]);
            let outputs = heads::outputs(task);
            EncoderHead {
                task,
                dense: b.linear("bert.pooler.dense", [d, d], OutIn, true)?,
                activation: Activation::Tanh,
                norm: None,
                weight: b.weight("classifier.weight", &[outputs, d])?,
                bias: b.weight("classifier.bias", &[outputs])?,
            }
        }
    };
    Ok((encoder, head))
}

impl Bert {
    /// Loads the weights of a folder whose configuration was read.
    ///
    /// # Errors
    /// A configuration that makes no sense, or names no head when none is asked for; weights that are missing, damaged
    /// or of another shape.
    pub fn load(dir: &Path, raw: RawConfig, device: &Device, options: &LoadOptions) -> Result<Bert> {
        let config = BertConfig::from_raw(&raw)?;
        let task = heads::task(&raw, options)?;
        heads::check_tied(&raw, task, config.tie_word_embeddings)?;
        let files = heads::EncoderFiles {
            family: "Bert",
            rename: &own_name,
            is_head: |name| ["cls.", "classifier.", "bert.pooler.", "qa_outputs."].iter().any(|p| name.starts_with(p)),
            initializer_range: config.initializer_range,
        };
        let describe = |b: &mut Build| describe(&config, task, b);
        let ((encoder, head), parts) = heads::load(dir, raw, device, options, &files, describe)?;
        Ok(Bert { config, parts, encoder, head })
    }

    /// The model of a configuration with the weights that `fetch` gives; see [`assemble`](crate::assemble()).
    ///
    /// # Errors
    /// A configuration that makes no sense, or names no head when none is asked for; what `fetch` gives.
    pub fn assemble(mut raw: RawConfig, _device: &Device, options: &LoadOptions, fetch: &mut Fetch) -> Result<Bert> {
        let config = BertConfig::from_raw(&raw)?;
        let task = heads::task(&raw, options)?;
        heads::check_tied(&raw, task, config.tie_word_embeddings)?;
        heads::set_asked(&mut raw, "Bert", options);
        let describe = |b: &mut Build| describe(&config, task, b);
        let ((encoder, head), parts) = build::make(raw, Layout::single(), fetch, describe)?;
        Ok(Bert { config, parts, encoder, head })
    }

    /// The configuration.
    pub fn bert_config(&self) -> &BertConfig {
        &self.config
    }
}

/// The name of a file's tensor here: bare encoders lack the prefix, older files have other names for norms, hold
/// positions as a buffer, and repeat the tied head.
fn own_name(name: &str) -> Option<String> {
    if name.starts_with("cls.predictions.decoder.") {
        return None;
    }
    heads::encoder_name(name, "bert")
}

impl Base for Bert {
    fn outline(&self) -> &Outline {
        self.parts.outline()
    }

    fn tensors(&self) -> Box<dyn Iterator<Item = (&str, &Tensor)> + '_> {
        self.parts.tensors()
    }
}

impl Model for Bert {
    fn parts(&self) -> &Parts {
        &self.parts
    }

    fn limits(&self) -> Limits {
        let BertConfig { vocab_size, max_position_embeddings, type_vocab_size, .. } = self.config;
        Limits { vocab_size, max_positions: max_position_embeddings, first_position: 0, segments: type_vocab_size }
    }

    fn set_base_dropout(&mut self, p: f64) {
        self.config.set_dropout(p);
    }

    fn head(&self) -> Head<'_> {
        self.head.head()
    }

    fn hidden<'m>(&'m self, t: &mut Tape<'m>, adapted: &'m Adapted, input: &mut Input<'m>) -> Result<Var> {
        self.encoder.hidden(&self.config, t, adapted, input)
    }

    fn features(&self, t: &mut Tape, adapted: &Adapted, x: Var) -> Result<Var> {
        let dropout = if self.head.task == Task::MaskedLm { 0.0 } else { self.config.head_dropout() };
        self.head.features(t, adapted, x, [0.0, dropout])
    }
}
