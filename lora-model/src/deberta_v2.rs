use std::path::Path;

use lora_core::{
    Tape, Tensor, Var,
    lowrank::Layout::OutIn,
    ops::{self, DisentangledInputs, Qkv},
    peft::{Adapted, Base, Outline, Part},
};
use lora_kernels::{Attention, Device, Disentangled, Error, RelativePositions};

use crate::{
    Fetch, Head, Input, Limits, LoadOptions, Model, Parts, Result, Task,
    build::{self, Build},
    checkpoint::Layout,
    config::{DebertaV2Config, RawConfig},
    heads::{self, EncoderHead},
    layers::{LayerNorm, Projection, Sublayer, Weight},
};

/// DeBERTa-v2 and v3 (He et al. 2021): a post-norm encoder whose attention scores are sums over content and relative
/// position, each with vectors of its own, and in the large models a convolution beside the first layer.
///
/// ```text
/// x = LayerNorm(word_embeddings[tokens])                   + positions and segments where a model has them
/// R = LayerNorm(rel_embeddings)                            one table for all layers
/// y = LayerNorm(h + dense(attention(h, R)))                in every layer
/// h = LayerNorm(y + dense(gelu(dense(y))))
/// h = LayerNorm(h + gelu(conv(x)))                         after the first layer
/// labels = classifier(gelu(pooler(h₀)))                    h₀: the first token's
/// tokens = LayerNorm(gelu(dense(h)))·word_embeddingsᵀ + b
/// ```
/// Keys and queries of positions are made from R by projections of their own or, where `share_att_key` says so, by those of
/// the content, together with what is attached to them. Relative attention and convolution run on the CPU only.
///
/// The names are those of Transformers' `DebertaV2ForSequenceClassification` and `DebertaV2ForMaskedLM`. Microsoft's own
/// files name the head that fills in tokens `lm_predictions`, which is read where the configuration says `legacy: false`.
pub struct DebertaV2 {
    config: DebertaV2Config,
    parts: Parts,
    encoder: Encoder,
    head: EncoderHead,
}

struct Encoder {
    word_embeddings: Weight,
    position_embeddings: Option<Weight>,
    token_type_embeddings: Option<Weight>,
    norm: LayerNorm,
    relative: Option<Relative>,
    layers: Vec<Layer>,
    conv: Option<Conv>,
}

/// The table of relative positions.
struct Relative {
    rel_embeddings: Weight,
    norm: Option<LayerNorm>,
    positions: RelativePositions,
}

struct Layer {
    query_proj: Projection,
    key_proj: Projection,
    value_proj: Projection,
    /// Projections of the table's own.
    pos_key_proj: Option<Projection>,
    pos_query_proj: Option<Projection>,
    attention_output: Projection,
    attention: Sublayer,
    attention_norm: LayerNorm,
    intermediate: Projection,
    output: Projection,
    mlp: Sublayer,
    output_norm: LayerNorm,
}

struct Conv {
    weight: Weight,
    bias: Weight,
    norm: LayerNorm,
}

impl DebertaV2Config {
    /// # Errors
    /// [`Error::NoCuda`] for a device that has no kernel for it.
    fn check_device(&self, device: &Device) -> Result<()> {
        match !device.is_cpu() && (self.is_disentangled() || self.conv_kernel_size.is_some()) {
            true => Err(Error::NoCuda { kernel: "disentangled attention" }.into()),
            false => Ok(()),
        }
    }

    /// What a model for this task looks like, without weights.
    ///
    /// # Panics
    /// When the task is to continue text, for which an encoder has no head.
    pub fn outline(&self, task: Task) -> Outline {
        build::outline(|b: &mut Build| describe(self, task, b))
    }
}

/// All of the model, in the order of its weights.
fn describe(c: &DebertaV2Config, task: Task, b: &mut Build) -> Result<(Encoder, EncoderHead)> {
    let encoder = encoder(c, b)?;
    let head = head(c, task, &encoder.word_embeddings, b)?;
    Ok((encoder, head))
}

fn encoder(c: &DebertaV2Config, b: &mut Build) -> Result<Encoder> {
    let (d, eps) = (c.hidden_size, c.layer_norm_eps);
    b.describe("deberta-v2", c.num_hidden_layers, c.max_position_embeddings, &["query_proj", "value_proj"]);
    let embeddings = |name: &str| format!("deberta.embeddings.{name}");
    let word_embeddings = b.embedding(embeddings("word_embeddings"), [c.vocab_size, d])?;
    b.tokens(&word_embeddings);
    let mut table = |name: &str, rows: usize| (rows > 0).then(|| b.embedding(embeddings(name), [rows, d])).transpose();
    let positions = if c.position_biased_input { c.max_position_embeddings } else { 0 };
    let position_embeddings = table("position_embeddings", positions)?;
    let token_type_embeddings = table("token_type_embeddings", c.type_vocab_size)?;
    let norm = b.layer_norm(embeddings("LayerNorm"), d, eps)?;
    let mut layers = Vec::with_capacity(c.num_hidden_layers);
    for i in 0..c.num_hidden_layers {
        b.layer(Some(i));
        layers.push(layer(c, &format!("deberta.encoder.layer.{i}"), b)?);
    }
    b.layer(None);
    let relative = match c.positions() {
        None => None,
        Some(positions) => {
            let rel_embeddings = b.weight("deberta.encoder.rel_embeddings.weight", &[2 * positions.span(), d])?;
            Some((rel_embeddings, positions))
        }
    };
    // It stands in the weights of a model without a table too.
    let rel_norm = c.norm_rel_ebd.then(|| b.layer_norm("deberta.encoder.LayerNorm", d, eps)).transpose()?;
    let relative = relative.map(|(rel_embeddings, positions)| Relative { rel_embeddings, norm: rel_norm, positions });
    let conv = match c.conv_kernel_size {
        None => None,
        Some(width) => Some(Conv {
            weight: b.weight("deberta.encoder.conv.conv.weight", &[d, d, width])?,
            bias: b.weight("deberta.encoder.conv.conv.bias", &[d])?,
            norm: b.layer_norm("deberta.encoder.conv.LayerNorm", d, eps)?,
        }),
    };
    Ok(Encoder { word_embeddings, position_embeddings, token_type_embeddings, norm, relative, layers, conv })
}

fn layer(c: &DebertaV2Config, layer: &str, b: &mut Build) -> Result<Layer> {
    let (d, f, eps) = (c.hidden_size, c.intermediate_size, c.layer_norm_eps);
    let module = |name: &str| format!("{layer}.{name}");
    let linear = |b: &mut Build, name: &str, shape| b.linear(module(name), shape, OutIn, true);
    let own = c.relative_attention && !c.share_att_key;
    Ok(Layer {
        query_proj: linear(b, "attention.self.query_proj", [d, d])?,
        key_proj: linear(b, "attention.self.key_proj", [d, d])?,
        value_proj: linear(b, "attention.self.value_proj", [d, d])?,
        pos_key_proj: (own && c.c2p).then(|| linear(b, "attention.self.pos_key_proj", [d, d])).transpose()?,
        pos_query_proj: (own && c.p2c).then(|| linear(b, "attention.self.pos_query_proj", [d, d])).transpose()?,
        attention_output: linear(b, "attention.output.dense", [d, d])?,
        attention: b.sublayer(module("attention.output"), Part::Attention, d),
        attention_norm: b.layer_norm(module("attention.output.LayerNorm"), d, eps)?,
        intermediate: linear(b, "intermediate.dense", [d, f])?,
        output: linear(b, "output.dense", [f, d])?,
        mlp: b.sublayer(module("output"), Part::Mlp, d),
        output_norm: b.layer_norm(module("output.LayerNorm"), d, eps)?,
    })
}

fn head(c: &DebertaV2Config, task: Task, word_embeddings: &Weight, b: &mut Build) -> Result<EncoderHead> {
    let d = c.hidden_size;
    if task == Task::MaskedLm {
        let [dense, norm, bias] = match c.legacy {
            true => ["transform.dense", "transform.LayerNorm", "bias"].map(|name| format!("cls.predictions.{name}")),
            false => ["dense", "LayerNorm", "bias"].map(|name| format!("lm_predictions.lm_head.{name}")),
        };
        return Ok(EncoderHead {
            task,
            dense: b.linear(dense, [d, d], OutIn, true)?,
            activation: c.hidden_act,
            norm: Some(b.layer_norm(norm, d, c.layer_norm_eps)?),
            weight: word_embeddings.clone(),
            bias: b.weight(bias, &[c.vocab_size])?,
        });
    }
    b.task_type("SEQ_CLS");
    b.modules_to_save(&["classifier"]);
    let outputs = heads::outputs(task);
    Ok(EncoderHead {
        task,
        dense: b.linear("pooler.dense", [d, d], OutIn, true)?,
        activation: c.pooler_hidden_act,
        norm: None,
        weight: b.weight("classifier.weight", &[outputs, d])?,
        bias: b.weight("classifier.bias", &[outputs])?,
    })
}

impl DebertaV2 {
    /// Loads the weights of a folder whose configuration was read.
    ///
    /// # Errors
    /// A configuration that makes no sense, or names no head when none is asked for; weights that are missing, damaged or
    /// of another shape; a device that the model does not run on.
    pub fn load(dir: &Path, raw: RawConfig, device: &Device, options: &LoadOptions) -> Result<DebertaV2> {
        let config = DebertaV2Config::from_raw(&raw)?;
        let task = heads::task(&raw, options)?;
        // The other kind of head reads the embeddings whatever this says.
        let tied = !config.legacy || raw.bool("tie_word_embeddings")?.unwrap_or(true);
        heads::check_tied(&raw, task, tied)?;
        config.check_device(device)?;
        let files = heads::EncoderFiles {
            family: "DebertaV2",
            rename: &|name| own_name(name, &config),
            is_head: |name| HEADS.iter().any(|p| name.starts_with(p)),
            initializer_range: config.initializer_range,
        };
        let describe = |b: &mut Build| describe(&config, task, b);
        let ((encoder, head), parts) = heads::load(dir, raw, device, options, &files, describe)?;
        Ok(DebertaV2 { config, parts, encoder, head })
    }

    /// The model of a configuration with the weights that `fetch` gives; see [`assemble`](crate::assemble()).
    ///
    /// # Errors
    /// A configuration that makes no sense, or names no head when none is asked for; what `fetch` gives; a device that the
    /// model does not run on.
    pub fn assemble(
        mut raw: RawConfig,
        device: &Device,
        options: &LoadOptions,
        fetch: &mut Fetch,
    ) -> Result<DebertaV2> {
        let config = DebertaV2Config::from_raw(&raw)?;
        let task = heads::task(&raw, options)?;
        let tied = !config.legacy || raw.bool("tie_word_embeddings")?.unwrap_or(true);
        heads::check_tied(&raw, task, tied)?;
        config.check_device(device)?;
        heads::set_asked(&mut raw, "DebertaV2", options);
        let describe = |b: &mut Build| describe(&config, task, b);
        let ((encoder, head), parts) = build::make(raw, Layout::single(), fetch, describe)?;
        Ok(DebertaV2 { config, parts, encoder, head })
    }

    /// The configuration.
    pub fn deberta_v2_config(&self) -> &DebertaV2Config {
        &self.config
    }
}

/// What the names of tensors of heads begin with.
const HEADS: [&str; 6] = ["cls.", "lm_predictions.", "mask_predictions.", "pooler.", "classifier.", "qa_outputs."];

/// The name of a file's tensor here: bare encoders lack the prefix, older files hold positions that nothing reads, and
/// repeat the tied head.
fn own_name(name: &str, config: &DebertaV2Config) -> Option<String> {
    let unread = !config.position_biased_input && name.ends_with("embeddings.position_embeddings.weight");
    if unread || name.starts_with("cls.predictions.decoder.") {
        return None;
    }
    if name.starts_with("pooler.") {
        return Some(name.to_owned());
    }
    heads::encoder_name(name, "deberta")
}

impl Encoder {
    /// The final hidden states.
    fn hidden<'m>(
        &'m self,
        c: &'m DebertaV2Config,
        t: &mut Tape<'m>,
        adapted: &'m Adapted,
        input: &mut Input<'m>,
    ) -> Result<Var> {
        let mut x = input.embed(t, adapted, &self.word_embeddings)?;
        let tables =
            [(&self.position_embeddings, Some(input.positions())), (&self.token_type_embeddings, input.segments())];
        for (table, rows) in tables {
            if let (Some(table), Some(rows)) = (table, rows) {
                let rows = table.rows(t, adapted, rows)?;
                x = ops::add(t, x, rows)?;
            }
        }
        let x = self.norm.apply(t, adapted, &x)?;
        let mut h = ops::dropout(t, x, c.hidden_dropout_prob)?;
        let relative = self.relative.as_ref().filter(|_| c.is_disentangled());
        let table = relative.map(|r| r.table(t, adapted)).transpose()?;
        for (i, layer) in self.layers.iter().enumerate() {
            let conv = self.conv.as_ref().filter(|_| i == 0);
            let relative = relative.zip(table.as_ref().map(Var::share));
            h = input.layer(t, h, move |t, mut h, input| {
                let before = conv.map(|_| h.share());
                let mut heads = match &relative {
                    Some((relative, table)) => layer.relative(c, t, adapted, input, &h, relative, table)?,
                    None => layer.plain(c, t, adapted, input, &h, i)?,
                };
                let last = i + 1 == self.layers.len();
                if last {
                    [heads, h] = input.wanted(t, [heads, h])?;
                }
                let y = layer.attention_output.apply(t, adapted, &heads)?;
                drop(heads);
                let y = ops::dropout(t, y, c.hidden_dropout_prob)?;
                let norm = |t: &mut Tape, x: &Var| layer.attention_norm.apply(t, adapted, x);
                let h = layer.attention.join(t, adapted, h, y, Some(&norm))?;
                let x = layer.intermediate.apply(t, adapted, &h)?;
                let x = ops::activation(t, c.hidden_act, &x)?;
                let y = layer.output.apply(t, adapted, &x)?;
                drop(x);
                let y = ops::dropout(t, y, c.hidden_dropout_prob)?;
                let h = layer.mlp.join(t, adapted, h, y, Some(&|t, x| layer.output_norm.apply(t, adapted, x)))?;
                let Some((conv, x)) = conv.zip(before) else { return Ok(h) };
                let mut y = conv.apply(t, adapted, input, &x)?;
                if last {
                    [y] = input.wanted(t, [y])?;
                }
                conv.beside(c, t, adapted, h, y)
            })?;
        }
        Ok(h)
    }
}

impl Relative {
    /// R [2·span, d].
    fn table(&self, t: &mut Tape, adapted: &Adapted) -> lora_core::Result<Var> {
        let mut table = self.rel_embeddings.var(t, adapted)?;
        // Unlike other matrices it is multiplied as activations are; one that trains is of their type already.
        let dtype = t.device().activations(table.value().dtype());
        if dtype != table.value().dtype() {
            table = t.constant(&table.value().to_dtype(dtype)?);
        }
        match &self.norm {
            Some(norm) => norm.apply(t, adapted, &table),
            None => Ok(table),
        }
    }
}

impl Layer {
    /// Attention that sees relative positions, before the output's projection.
    #[allow(clippy::too_many_arguments)] // what all layers read, h, and the table
    fn relative(
        &self,
        c: &DebertaV2Config,
        t: &mut Tape,
        adapted: &Adapted,
        input: &Input,
        h: &Var,
        relative: &Relative,
        table: &Var,
    ) -> lora_core::Result<Var> {
        let q = self.query_proj.apply(t, adapted, h)?;
        let k = self.key_proj.apply(t, adapted, h)?;
        let v = self.value_proj.apply(t, adapted, h)?;
        let of_key = self.pos_key_proj.as_ref().unwrap_or(&self.key_proj);
        let of_query = self.pos_query_proj.as_ref().unwrap_or(&self.query_proj);
        let (pos_key, pos_query) = t.on_common_rows(|t| {
            let table = ops::dropout(t, table.share(), c.hidden_dropout_prob)?;
            let mut project = |wanted: bool, by: &Projection| wanted.then(|| by.apply(t, adapted, &table)).transpose();
            Ok::<_, lora_core::Error>((project(c.c2p, of_key)?, project(c.p2c, of_query)?))
        })?;
        let cfg = Disentangled {
            heads: c.num_attention_heads,
            head_dim: c.head_dim(),
            scale: c.scale(),
            positions: relative.positions,
            dropout: t.dropout_mask(c.attention_probs_dropout_prob),
        };
        let x = DisentangledInputs { q: &q, k: &k, v: &v, pos_key: pos_key.as_ref(), pos_query: pos_query.as_ref() };
        ops::disentangled(t, cfg, input.sequences(), x)
    }

    /// Attention over content alone, before the output's projection.
    fn plain(
        &self,
        c: &DebertaV2Config,
        t: &mut Tape,
        adapted: &Adapted,
        input: &mut Input,
        h: &Var,
        layer: usize,
    ) -> lora_core::Result<Var> {
        let q = self.query_proj.apply(t, adapted, h)?;
        let k = self.key_proj.apply(t, adapted, h)?;
        let v = self.value_proj.apply(t, adapted, h)?;
        let (heads, head_dim, scale) = (c.num_attention_heads, c.head_dim(), c.scale());
        let dropout = t.dropout_mask(c.attention_probs_dropout_prob);
        let cfg = Attention { heads, kv_heads: heads, head_dim, scale, causal: false, dropout };
        input.attend(t, adapted, layer, cfg, Qkv::Separate { q: &q, k: &k, v: &v })
    }
}

impl Conv {
    /// The convolution of the embeddings x.
    fn apply(&self, t: &mut Tape, adapted: &Adapted, input: &Input, x: &Var) -> lora_core::Result<Var> {
        let (w, bias) = (self.weight.var(t, adapted)?, self.bias.var(t, adapted)?);
        ops::convolution(t, input.sequences(), x, &w, Some(&bias))
    }

    /// The stream after the first layer, where it was h, with the convolution y beside it.
    fn beside(&self, c: &DebertaV2Config, t: &mut Tape, adapted: &Adapted, h: Var, y: Var) -> lora_core::Result<Var> {
        let y = ops::dropout(t, y, c.hidden_dropout_prob)?;
        let y = ops::activation(t, c.conv_act, &y)?;
        let y = ops::add(t, h, y)?;
        self.norm.apply(t, adapted, &y)
    }
}

impl Base for DebertaV2 {
    fn outline(&self) -> &Outline {
        self.parts.outline()
    }

    fn tensors(&self) -> Box<dyn Iterator<Item = (&str, &Tensor)> + '_> {
        self.parts.tensors()
    }
}

impl Model for DebertaV2 {
    fn parts(&self) -> &Parts {
        &self.parts
    }

    fn limits(&self) -> Limits {
        let DebertaV2Config { vocab_size, max_position_embeddings, type_vocab_size, .. } = self.config;
        Limits { vocab_size, max_positions: max_position_embeddings, first_position: 0, segments: type_vocab_size }
    }

    fn set_base_dropout(&mut self, p: f64) {
        let c = &mut self.config;
        (c.hidden_dropout_prob, c.attention_probs_dropout_prob) = (p, p);
        (c.pooler_dropout, c.cls_dropout) = (p, Some(p));
    }

    fn head(&self) -> Head<'_> {
        self.head.head()
    }

    fn hidden<'m>(&'m self, t: &mut Tape<'m>, adapted: &'m Adapted, input: &mut Input<'m>) -> Result<Var> {
        self.encoder.hidden(&self.config, t, adapted, input)
    }

    fn features(&self, t: &mut Tape, adapted: &Adapted, x: Var) -> Result<Var> {
        let c = &self.config;
        let dropout = match self.head.task {
            Task::MaskedLm => [0.0; 2],
            _ => [c.pooler_dropout, c.cls_dropout.unwrap_or(c.hidden_dropout_prob)],
        };
        self.head.features(t, adapted, x, dropout)
    }
}
