use std::path::Path;

use lora_kernels::Activation;
use serde_json::Map;

use super::{
    RawConfig,
    checks::{self, MOST_LAYERS, MOST_ROWS, MOST_WIDTH, Problem},
};
use crate::Result;

/// What BERT needs to know (Devlin et al. 2019), under the names of its `config.json`.
///
/// Absent keys take the defaults of Transformers' `BertConfig`, which are those of the base model.
#[derive(Clone, Debug, PartialEq)]
pub struct BertConfig {
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the stream.
    pub hidden_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of attention heads, each `hidden_size / num_attention_heads` wide.
    pub num_attention_heads: usize,
    /// Width of the feed-forward network's hidden layer.
    pub intermediate_size: usize,
    /// The feed-forward network's function, and that of the masked-LM head.
    pub hidden_act: Activation,
    /// Rows of the table of positions.
    pub max_position_embeddings: usize,
    /// Kinds of segments: the sentences of a pair.
    pub type_vocab_size: usize,
    /// Dropout on the embeddings and on the output of each sublayer, in training.
    pub hidden_dropout_prob: f64,
    /// Dropout on attention probabilities, in training.
    pub attention_probs_dropout_prob: f64,
    /// Dropout in the head of a classifier, in training; `None` is `hidden_dropout_prob`.
    pub classifier_dropout: Option<f64>,
    /// ε of every layer norm.
    pub layer_norm_eps: f64,
    /// Standard deviation of weights that begin at random.
    pub initializer_range: f64,
    /// Whether the matrix of a masked-LM head is that of the embeddings.
    pub tie_word_embeddings: bool,
}

impl Default for BertConfig {
    fn default() -> BertConfig {
        BertConfig {
            vocab_size: 30522,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: Activation::GeluErf,
            max_position_embeddings: 512,
            type_vocab_size: 2,
            hidden_dropout_prob: 0.1,
            attention_probs_dropout_prob: 0.1,
            classifier_dropout: None,
            layer_norm_eps: 1e-12,
            initializer_range: 0.02,
            tie_word_embeddings: true,
        }
    }
}

impl BertConfig {
    /// BERT base, uncased: 109,482,240 parameters with the pooler.
    pub fn base() -> BertConfig {
        BertConfig::default()
    }

    /// BERT large, uncased: 335,141,888 parameters with the pooler.
    pub fn large() -> BertConfig {
        BertConfig {
            hidden_size: 1024,
            num_hidden_layers: 24,
            num_attention_heads: 16,
            intermediate_size: 4096,
            ..BertConfig::default()
        }
    }

    /// Takes what BERT needs out of a configuration, and checks it.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) naming file and key for a wrong type or an impossible value, and for
    /// what would silently compute something else here (decoders, relative positions, quantised weights);
    /// [`Error::Unsupported`](crate::Error::Unsupported) for an unknown activation.
    pub fn from_raw(raw: &RawConfig) -> Result<BertConfig> {
        BertConfig::read(raw, BertConfig::default())
    }

    /// As [`BertConfig::from_raw`], with other defaults.
    pub(super) fn read(raw: &RawConfig, d: BertConfig) -> Result<BertConfig> {
        for (key, what) in [
            ("is_decoder", "a decoder is not supported; only encoders are"),
            ("add_cross_attention", "cross-attention is not supported; only encoders are"),
        ] {
            if raw.bool(key)? == Some(true) {
                return Err(raw.error(key, what));
            }
        }
        match raw.str("position_embedding_type")? {
            None | Some("absolute") => {}
            Some(other) => {
                let problem = format!("{other:?} is not supported; only \"absolute\" is");
                return Err(raw.error("position_embedding_type", problem));
            }
        }
        raw.refuse_quantised()?;
        let size = |key, default| Result::Ok(raw.usize(key)?.unwrap_or(default));
        let number = |key, default| Result::Ok(raw.f64(key)?.unwrap_or(default));
        let config = BertConfig {
            vocab_size: size("vocab_size", d.vocab_size)?,
            hidden_size: size("hidden_size", d.hidden_size)?,
            num_hidden_layers: size("num_hidden_layers", d.num_hidden_layers)?,
            num_attention_heads: size("num_attention_heads", d.num_attention_heads)?,
            intermediate_size: size("intermediate_size", d.intermediate_size)?,
            hidden_act: raw.activation("hidden_act")?.unwrap_or(d.hidden_act),
            max_position_embeddings: size("max_position_embeddings", d.max_position_embeddings)?,
            type_vocab_size: size("type_vocab_size", d.type_vocab_size)?,
            hidden_dropout_prob: number("hidden_dropout_prob", d.hidden_dropout_prob)?,
            attention_probs_dropout_prob: number("attention_probs_dropout_prob", d.attention_probs_dropout_prob)?,
            classifier_dropout: raw.f64("classifier_dropout")?,
            layer_norm_eps: number("layer_norm_eps", d.layer_norm_eps)?,
            initializer_range: number("initializer_range", d.initializer_range)?,
            tie_word_embeddings: raw.bool("tie_word_embeddings")?.unwrap_or(d.tie_word_embeddings),
        };
        raw.checked(config.problem())?;
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

    /// The rate of dropout in the head of a classifier.
    pub fn head_dropout(&self) -> f64 {
        self.classifier_dropout.unwrap_or(self.hidden_dropout_prob)
    }

    /// The number of parameters of the encoder, without pooler and head.
    ///
    /// With d = `hidden_size` and f = `intermediate_size`, a layer holds attention (4d² + 4d), the feed-forward network
    /// (2df + f + d) and two norms (4d); below stand the three tables and a norm (2d).
    pub fn encoder_parameters(&self) -> u128 {
        let [vocab, positions, segments, d, layers, f] = [
            self.vocab_size,
            self.max_position_embeddings,
            self.type_vocab_size,
            self.hidden_size,
            self.num_hidden_layers,
            self.intermediate_size,
        ]
        .map(|n| n as u128);
        let layer = (4 * d * d + 4 * d) + (2 * d * f + f + d) + 4 * d;
        (vocab + positions + segments + 2) * d + layers * layer
    }

    /// The first impossible value: its key and what is wrong with it.
    pub(super) fn problem(&self) -> Option<Problem> {
        let sizes = checks::sizes(&[
            ("vocab_size", self.vocab_size, MOST_ROWS),
            ("hidden_size", self.hidden_size, MOST_WIDTH),
            ("num_hidden_layers", self.num_hidden_layers, MOST_LAYERS),
            ("num_attention_heads", self.num_attention_heads, MOST_WIDTH),
            ("intermediate_size", self.intermediate_size, 16 * MOST_WIDTH),
            ("max_position_embeddings", self.max_position_embeddings, MOST_ROWS),
            ("type_vocab_size", self.type_vocab_size, MOST_ROWS),
        ]);
        if sizes.is_some() {
            return sizes;
        }
        let (heads, d) = (self.num_attention_heads, self.hidden_size);
        if !d.is_multiple_of(heads) {
            return Some(("num_attention_heads", format!("{heads} heads do not divide hidden_size = {d}")));
        }
        let rates = [
            ("hidden_dropout_prob", self.hidden_dropout_prob),
            ("attention_probs_dropout_prob", self.attention_probs_dropout_prob),
            ("classifier_dropout", self.head_dropout()),
        ];
        checks::probabilities(&rates)
            .or_else(|| checks::epsilon("layer_norm_eps", self.layer_norm_eps))
            .or_else(|| checks::epsilon("initializer_range", self.initializer_range))
            .or_else(|| checks::parameters("hidden_size", self.encoder_parameters()))
    }
}
