use std::path::Path;

use lora_kernels::{Activation, RelativePositions};
use serde_json::{Map, Value, json};

use super::{
    RawConfig,
    checks::{self, MOST_LAYERS, MOST_ROWS, MOST_WIDTH, Problem},
};
use crate::Result;

/// What DeBERTa-v2 and v3 need to know (He et al. 2021, "DeBERTa: decoding-enhanced BERT with disentangled attention"; He,
/// Gao and Chen 2021, "DeBERTaV3"), under the names of their `config.json`.
///
/// Absent keys take the defaults that Transformers has.
#[derive(Clone, Debug, PartialEq)]
pub struct DebertaV2Config {
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the stream.
    pub hidden_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of heads, which divide the width.
    pub num_attention_heads: usize,
    /// Width of the MLP's hidden layer.
    pub intermediate_size: usize,
    /// The MLP's non-linearity, and that of the masked-LM head.
    pub hidden_act: Activation,
    /// Dropout on embeddings, on the outputs of sublayers, and on the tables of relative positions, in training.
    pub hidden_dropout_prob: f64,
    /// Dropout on attention probabilities, in training.
    pub attention_probs_dropout_prob: f64,
    /// The longest sequence.
    pub max_position_embeddings: usize,
    /// Kinds of segments; with 0 they are not told apart.
    pub type_vocab_size: usize,
    /// Deviation of what begins at random.
    pub initializer_range: f64,
    /// ε of every norm.
    pub layer_norm_eps: f64,
    /// Whether attention sees how far tokens lie apart.
    pub relative_attention: bool,
    /// Logarithmic buckets of distances, to either side; `None`: every distance has its own row.
    pub position_buckets: Option<usize>,
    /// Distances from here on count as this far; `None`: `max_position_embeddings`.
    pub max_relative_positions: Option<usize>,
    /// Whether the tables of relative positions are projected by the weights of queries and keys.
    pub share_att_key: bool,
    /// Scores of content by position.
    pub c2p: bool,
    /// Scores of position by content.
    pub p2c: bool,
    /// Whether the table of relative positions is normalised (`norm_rel_ebd: "layer_norm"`).
    pub norm_rel_ebd: bool,
    /// Whether positions are added to the embeddings.
    pub position_biased_input: bool,
    /// Width of the convolution beside the first layer; `None`: there is none.
    pub conv_kernel_size: Option<usize>,
    /// Its non-linearity.
    pub conv_act: Activation,
    /// Dropout before the pooler of a classifier.
    pub pooler_dropout: f64,
    /// The pooler's non-linearity.
    pub pooler_hidden_act: Activation,
    /// Dropout between pooler and classifier; `None`: `hidden_dropout_prob`.
    pub cls_dropout: Option<f64>,
    /// Whether the masked-LM head has the names of Transformers (`cls.predictions`) rather than those of Microsoft's own
    /// files (`lm_predictions.lm_head`).
    pub legacy: bool,
}

impl Default for DebertaV2Config {
    fn default() -> DebertaV2Config {
        DebertaV2Config {
            vocab_size: 128_100,
            hidden_size: 1536,
            num_hidden_layers: 24,
            num_attention_heads: 24,
            intermediate_size: 6144,
            hidden_act: Activation::GeluErf,
            hidden_dropout_prob: 0.1,
            attention_probs_dropout_prob: 0.1,
            max_position_embeddings: 512,
            type_vocab_size: 0,
            initializer_range: 0.02,
            layer_norm_eps: 1e-7,
            relative_attention: false,
            position_buckets: None,
            max_relative_positions: None,
            share_att_key: false,
            c2p: false,
            p2c: false,
            norm_rel_ebd: false,
            position_biased_input: true,
            conv_kernel_size: None,
            conv_act: Activation::Tanh,
            pooler_dropout: 0.0,
            pooler_hidden_act: Activation::GeluErf,
            cls_dropout: None,
            legacy: true,
        }
    }
}

impl DebertaV2Config {
    /// DeBERTa-v3 base, 183,831,552 parameters without a head.
    pub fn v3_base() -> DebertaV2Config {
        DebertaV2Config {
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            conv_kernel_size: None,
            conv_act: Activation::Tanh,
            ..DebertaV2Config::v2_xlarge()
        }
    }

    /// DeBERTa-v2 XL, 884,593,152 parameters without a head.
    pub fn v2_xlarge() -> DebertaV2Config {
        DebertaV2Config {
            relative_attention: true,
            position_buckets: Some(256),
            share_att_key: true,
            c2p: true,
            p2c: true,
            norm_rel_ebd: true,
            position_biased_input: false,
            conv_kernel_size: Some(3),
            conv_act: Activation::GeluErf,
            ..DebertaV2Config::default()
        }
    }

    /// DeBERTa-v2 XXL, 1,564,549,632 parameters without a head: the third base of the LoRA paper.
    pub fn v2_xxlarge() -> DebertaV2Config {
        DebertaV2Config { num_hidden_layers: 48, ..DebertaV2Config::v2_xlarge() }
    }

    /// Takes what the architecture needs out of a configuration, and checks it.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) naming file and key for a wrong type, an impossible value, and for what would
    /// silently compute something else here; [`Error::Unsupported`](crate::Error::Unsupported) for an unknown activation.
    pub fn from_raw(raw: &RawConfig) -> Result<DebertaV2Config> {
        raw.architecture()?;
        raw.refuse_quantised()?;
        let d = DebertaV2Config::default();
        let size = |key, default| Ok::<_, crate::Error>(raw.usize(key)?.unwrap_or(default));
        let rate = |key, default| Ok::<_, crate::Error>(raw.f64(key)?.unwrap_or(default));
        let flag = |key, default| Ok::<_, crate::Error>(raw.bool(key)?.unwrap_or(default));
        // −1 stands for none.
        let positive = |key| {
            let n = raw.get(key, "a whole number", Value::as_i64)?;
            Ok::<_, crate::Error>(n.and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0))
        };
        let kinds = words(raw, "pos_att_type", &["c2p", "p2c"])?;
        let norms = words(raw, "norm_rel_ebd", &["layer_norm", "none"])?;
        let config = DebertaV2Config {
            vocab_size: size("vocab_size", d.vocab_size)?,
            hidden_size: size("hidden_size", d.hidden_size)?,
            num_hidden_layers: size("num_hidden_layers", d.num_hidden_layers)?,
            num_attention_heads: size("num_attention_heads", d.num_attention_heads)?,
            intermediate_size: size("intermediate_size", d.intermediate_size)?,
            hidden_act: raw.activation("hidden_act")?.unwrap_or(d.hidden_act),
            hidden_dropout_prob: rate("hidden_dropout_prob", d.hidden_dropout_prob)?,
            attention_probs_dropout_prob: rate("attention_probs_dropout_prob", d.attention_probs_dropout_prob)?,
            max_position_embeddings: size("max_position_embeddings", d.max_position_embeddings)?,
            type_vocab_size: size("type_vocab_size", d.type_vocab_size)?,
            initializer_range: rate("initializer_range", d.initializer_range)?,
            layer_norm_eps: rate("layer_norm_eps", d.layer_norm_eps)?,
            relative_attention: flag("relative_attention", d.relative_attention)?,
            position_buckets: positive("position_buckets")?,
            max_relative_positions: positive("max_relative_positions")?,
            share_att_key: flag("share_att_key", d.share_att_key)?,
            c2p: kinds.contains(&"c2p"),
            p2c: kinds.contains(&"p2c"),
            norm_rel_ebd: norms.contains(&"layer_norm"),
            position_biased_input: flag("position_biased_input", d.position_biased_input)?,
            conv_kernel_size: positive("conv_kernel_size")?,
            conv_act: raw.activation("conv_act")?.unwrap_or(d.conv_act),
            pooler_dropout: rate("pooler_dropout", d.pooler_dropout)?,
            pooler_hidden_act: raw.activation("pooler_hidden_act")?.unwrap_or(d.pooler_hidden_act),
            cls_dropout: raw.f64("cls_dropout")?,
            legacy: flag("legacy", d.legacy)?,
        };
        raw.checked(config.problem())?;
        let (hidden, head_dim) = (config.hidden_size, config.head_dim());
        for (key, same, why) in [
            ("embedding_size", hidden, "embeddings of another width than hidden_size are not supported"),
            ("pooler_hidden_size", hidden, "the pooler reads what has hidden_size columns"),
            (
                "attention_head_size",
                head_dim,
                "heads of another width than hidden_size / num_attention_heads are not supported",
            ),
            ("conv_groups", 1, "convolutions of several groups are not supported"),
        ] {
            if let Some(found) = raw.usize(key)?.filter(|n| *n != same) {
                return Err(raw.error(key, format_args!("{found} instead of {same}: {why}")));
            }
        }
        Ok(config)
    }

    /// Checks a configuration that was made rather than read; `path` stands in the message.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for the first value that is impossible.
    pub fn validate(&self, path: &Path) -> Result<()> {
        RawConfig::new(path, Map::new()).checked(self.problem())
    }

    /// Width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Factor of the scores: 1/√(head_dim·(1 + kinds of positional scores)).
    pub fn scale(&self) -> f64 {
        let kinds = 1 + usize::from(self.c2p) + usize::from(self.p2c);
        1.0 / ((self.head_dim() * kinds) as f64).sqrt()
    }

    /// Whether attention sees how far tokens lie apart, in one way or the other.
    pub fn is_disentangled(&self) -> bool {
        self.relative_attention && (self.c2p || self.p2c)
    }

    /// How distances become rows of the table, which has 2·[`span`](RelativePositions::span) of them; `None` without
    /// relative attention.
    pub fn positions(&self) -> Option<RelativePositions> {
        let max = self.max_relative_positions.unwrap_or(self.max_position_embeddings);
        RelativePositions::new(self.position_buckets.unwrap_or(0), max).filter(|_| self.relative_attention)
    }

    /// The number of parameters without any head.
    ///
    /// With d = `hidden_size` and f = `intermediate_size`, a layer holds attention (4d² + 4d), the MLP (2df + f + d) and two
    /// norms (4d), and without `share_att_key` a projection (d² + d) for each kind of positional score; around them stand
    /// the embeddings and their norm (2d), the table of relative positions and its norm (2d), and the convolution (kd² + d)
    /// and its norm (2d).
    pub fn parameters(&self) -> u128 {
        let [vocab, d, layers, f] =
            [self.vocab_size, self.hidden_size, self.num_hidden_layers, self.intermediate_size].map(|n| n as u128);
        let own = match self.relative_attention && !self.share_att_key {
            true => u128::from(self.c2p) + u128::from(self.p2c),
            false => 0,
        };
        let layer = (4 + own) * (d * d + d) + (2 * d * f + f + d) + 4 * d;
        let positions = if self.position_biased_input { self.max_position_embeddings as u128 } else { 0 };
        let table = self.positions().map_or(0, |p| 2 * p.span() as u128);
        let rows = vocab + positions + self.type_vocab_size as u128 + table;
        let norms = 2 * d * (1 + u128::from(self.norm_rel_ebd));
        rows * d + norms + layers * layer + self.conv_kernel_size.map_or(0, |k| k as u128 * d * d + 3 * d)
    }

    /// The configuration of a freshly made model, with the keys that Transformers writes for it.
    pub fn to_json(&self) -> Map<String, Value> {
        let none = |n: Option<usize>| n.map_or(json!(-1), |n| json!(n));
        let kinds: Vec<&str> = [("c2p", self.c2p), ("p2c", self.p2c)].iter().filter(|k| k.1).map(|k| k.0).collect();
        let object = json!({
            "model_type": "deberta-v2",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "intermediate_size": self.intermediate_size,
            "hidden_act": self.hidden_act.hf_name(),
            "hidden_dropout_prob": self.hidden_dropout_prob,
            "attention_probs_dropout_prob": self.attention_probs_dropout_prob,
            "max_position_embeddings": self.max_position_embeddings,
            "type_vocab_size": self.type_vocab_size,
            "initializer_range": self.initializer_range,
            "layer_norm_eps": self.layer_norm_eps,
            "relative_attention": self.relative_attention,
            "position_buckets": none(self.position_buckets),
            "max_relative_positions": none(self.max_relative_positions),
            "share_att_key": self.share_att_key,
            "pos_att_type": kinds,
            "norm_rel_ebd": if self.norm_rel_ebd { "layer_norm" } else { "none" },
            "position_biased_input": self.position_biased_input,
            "conv_kernel_size": self.conv_kernel_size.unwrap_or(0),
            "conv_act": self.conv_act.hf_name(),
            "pooler_dropout": self.pooler_dropout,
            "pooler_hidden_act": self.pooler_hidden_act.hf_name(),
            "pooler_hidden_size": self.hidden_size,
            "cls_dropout": self.cls_dropout,
            "legacy": self.legacy,
            "pad_token_id": 0,
            "torch_dtype": "float32",
        });
        match object {
            Value::Object(keys) => keys,
            _ => unreachable!("the literal above is an object"),
        }
    }

    /// The first impossible value: its key and what is wrong with it.
    fn problem(&self) -> Option<Problem> {
        let sizes = checks::sizes(&[
            ("vocab_size", self.vocab_size, MOST_ROWS),
            ("hidden_size", self.hidden_size, MOST_WIDTH),
            ("num_hidden_layers", self.num_hidden_layers, MOST_LAYERS),
            ("num_attention_heads", self.num_attention_heads, MOST_WIDTH),
            ("intermediate_size", self.intermediate_size, 16 * MOST_WIDTH),
            ("max_position_embeddings", self.max_position_embeddings, MOST_ROWS),
            ("type_vocab_size", self.type_vocab_size.max(1), MOST_ROWS),
            ("position_buckets", self.position_buckets.unwrap_or(1), MOST_ROWS),
            ("max_relative_positions", self.max_relative_positions.unwrap_or(1), MOST_ROWS),
            ("conv_kernel_size", self.conv_kernel_size.unwrap_or(1), 1 << 10),
        ]);
        if sizes.is_some() {
            return sizes;
        }
        let (heads, hidden) = (self.num_attention_heads, self.hidden_size);
        if !hidden.is_multiple_of(heads) {
            return Some(("num_attention_heads", format!("{heads} heads do not divide hidden_size = {hidden}")));
        }
        if self.relative_attention && self.positions().is_none() {
            let buckets = self.position_buckets.unwrap_or(0);
            let (key, max) = match self.max_relative_positions {
                Some(max) => ("max_relative_positions", max),
                None => ("max_position_embeddings", self.max_position_embeddings),
            };
            let need =
                format!("{buckets} does not fit {key} = {max}; at least 2 buckets, and {key} above half of them and 1");
            return Some(("position_buckets", need));
        }
        if let Some(even) = self.conv_kernel_size.filter(|k| k % 2 == 0) {
            let problem = format!("{even} is even; only a convolution of odd width gives a row for each token");
            return Some(("conv_kernel_size", problem));
        }
        let rates = [
            ("hidden_dropout_prob", self.hidden_dropout_prob),
            ("attention_probs_dropout_prob", self.attention_probs_dropout_prob),
            ("pooler_dropout", self.pooler_dropout),
            ("cls_dropout", self.cls_dropout.unwrap_or(0.0)),
        ];
        let spread = self.initializer_range;
        checks::probabilities(&rates)
            .or_else(|| checks::epsilon("layer_norm_eps", self.layer_norm_eps))
            .or_else(|| (spread < 0.0).then(|| ("initializer_range", format!("{spread:?} must be at least 0"))))
            .or_else(|| checks::parameters("hidden_size", self.parameters()))
    }
}

/// Words that are given as a list, or as one string with bars between them; each has to be one of `known`.
fn words<'a>(raw: &RawConfig, key: &str, known: &[&'a str]) -> Result<Vec<&'a str>> {
    let given: Vec<String> = match raw.value(key) {
        None => return Ok(Vec::new()),
        Some(Value::String(text)) => text.to_lowercase().split('|').map(|word| word.trim().to_owned()).collect(),
        Some(Value::Array(list)) if list.iter().all(Value::is_string) => {
            list.iter().filter_map(Value::as_str).map(str::to_owned).collect()
        }
        Some(_) => {
            return Ok(raw
                .get(key, "a list of strings, or a string with | between them", |_| None)?
                .unwrap_or_default());
        }
    };
    given
        .iter()
        .filter(|word| !word.is_empty())
        .map(|word| match known.iter().find(|k| *k == word) {
            Some(word) => Ok(*word),
            None => Err(raw.error(key, format_args!("{word:?} is not supported; supported: {}", known.join(", ")))),
        })
        .collect()
}
