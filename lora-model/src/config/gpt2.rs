use std::path::Path;

use lora_kernels::Activation;
use serde_json::{Map, Value, json};

use super::{
    RawConfig,
    checks::{self, MOST_LAYERS, MOST_ROWS, MOST_WIDTH, Problem},
};
use crate::Result;

/// What GPT-2 needs to know (Radford et al. 2019), under the names of its `config.json`.
///
/// Absent keys take the defaults of Transformers' `GPT2Config`, which are those of the small model.
#[derive(Clone, Debug, PartialEq)]
pub struct Gpt2Config {
    /// Tokens in the vocabulary: rows of `wte`.
    pub vocab_size: usize,
    /// The longest sequence: rows of `wpe`. Older files call it `n_ctx`.
    pub n_positions: usize,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Number of blocks.
    pub n_layer: usize,
    /// Number of attention heads, each `n_embd / n_head` wide.
    pub n_head: usize,
    /// Width of the MLP's hidden layer; `None` is 4 · `n_embd`.
    pub n_inner: Option<usize>,
    /// The MLP's function.
    pub activation_function: Activation,
    /// Dropout on the output of each sublayer, in training.
    pub resid_pdrop: f64,
    /// Dropout on the sum of embeddings, in training.
    pub embd_pdrop: f64,
    /// Dropout on attention probabilities, in training.
    pub attn_pdrop: f64,
    /// ε of every layer norm.
    pub layer_norm_epsilon: f64,
    /// Whether the output head is `wte` itself (otherwise `lm_head.weight`).
    pub tie_word_embeddings: bool,
    /// Whether scores are divided by √(head width).
    pub scale_attn_weights: bool,
    /// Whether scores are divided by the number of the layer, counted from 1.
    pub scale_attn_by_inverse_layer_idx: bool,
    /// The token that begins a text. May lie outside the vocabulary of a model that was cut down from another.
    pub bos_token_id: Option<u32>,
    /// The token that ends a text; the first one where the file lists several.
    pub eos_token_id: Option<u32>,
}

impl Default for Gpt2Config {
    fn default() -> Gpt2Config {
        Gpt2Config {
            vocab_size: 50257,
            n_positions: 1024,
            n_embd: 768,
            n_layer: 12,
            n_head: 12,
            n_inner: None,
            activation_function: Activation::GeluTanh,
            resid_pdrop: 0.1,
            embd_pdrop: 0.1,
            attn_pdrop: 0.1,
            layer_norm_epsilon: 1e-5,
            tie_word_embeddings: true,
            scale_attn_weights: true,
            scale_attn_by_inverse_layer_idx: false,
            bos_token_id: Some(50256),
            eos_token_id: Some(50256),
        }
    }
}

impl Gpt2Config {
    /// GPT-2 small, 124,439,808 parameters.
    pub fn small() -> Gpt2Config {
        Gpt2Config::default()
    }

    /// GPT-2 medium, 354,823,168 parameters.
    pub fn medium() -> Gpt2Config {
        Gpt2Config { n_embd: 1024, n_layer: 24, n_head: 16, ..Gpt2Config::default() }
    }

    /// GPT-2 large, 774,030,080 parameters.
    pub fn large() -> Gpt2Config {
        Gpt2Config { n_embd: 1280, n_layer: 36, n_head: 20, ..Gpt2Config::default() }
    }

    /// GPT-2 XL, 1,557,611,200 parameters.
    pub fn xl() -> Gpt2Config {
        Gpt2Config { n_embd: 1600, n_layer: 48, n_head: 25, ..Gpt2Config::default() }
    }

    /// Takes what GPT-2 needs out of a configuration, and checks it.
    ///
    /// # Errors
    /// [`Config`](crate::Error::Config) naming file and key for a wrong type or an impossible value, and for what would
    /// silently compute something else here (cross-attention, quantised weights);
    /// [`Unsupported`](crate::Error::Unsupported) for an unknown architecture or activation.
    pub fn from_raw(raw: &RawConfig) -> Result<Gpt2Config> {
        raw.architecture()?;
        if raw.bool("add_cross_attention")? == Some(true) {
            return Err(raw.error("add_cross_attention", "cross-attention is not supported; only decoders are"));
        }
        raw.refuse_quantised()?;
        let d = Gpt2Config::default();
        let config = Gpt2Config {
            vocab_size: raw.usize("vocab_size")?.unwrap_or(d.vocab_size),
            n_positions: raw.usize_of(&["n_positions", "max_position_embeddings", "n_ctx"])?.unwrap_or(d.n_positions),
            n_embd: raw.usize_of(&["n_embd", "hidden_size"])?.unwrap_or(d.n_embd),
            n_layer: raw.usize_of(&["n_layer", "num_hidden_layers"])?.unwrap_or(d.n_layer),
            n_head: raw.usize_of(&["n_head", "num_attention_heads"])?.unwrap_or(d.n_head),
            n_inner: raw.usize("n_inner")?,
            activation_function: raw.activation("activation_function")?.unwrap_or(d.activation_function),
            resid_pdrop: raw.f64("resid_pdrop")?.unwrap_or(d.resid_pdrop),
            embd_pdrop: raw.f64("embd_pdrop")?.unwrap_or(d.embd_pdrop),
            attn_pdrop: raw.f64("attn_pdrop")?.unwrap_or(d.attn_pdrop),
            layer_norm_epsilon: raw.f64("layer_norm_epsilon")?.unwrap_or(d.layer_norm_epsilon),
            tie_word_embeddings: raw.bool("tie_word_embeddings")?.unwrap_or(d.tie_word_embeddings),
            scale_attn_weights: raw.bool("scale_attn_weights")?.unwrap_or(d.scale_attn_weights),
            scale_attn_by_inverse_layer_idx: raw
                .bool("scale_attn_by_inverse_layer_idx")?
                .unwrap_or(d.scale_attn_by_inverse_layer_idx),
            bos_token_id: raw.token_or("bos_token_id", d.bos_token_id)?,
            eos_token_id: raw.token_or("eos_token_id", d.eos_token_id)?,
        };
        raw.checked(config.problem())?;
        Ok(config)
    }

    /// Checks a configuration that was made rather than read; `path` stands in the message.
    ///
    /// # Errors
    /// [`Config`](crate::Error::Config) for the first value that is impossible.
    pub fn validate(&self, path: &Path) -> Result<()> {
        RawConfig::new(path, Map::new()).checked(self.problem())
    }

    /// Width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.n_embd / self.n_head
    }

    /// Width of the MLP's hidden layer.
    pub fn inner(&self) -> usize {
        self.n_inner.unwrap_or(4 * self.n_embd)
    }

    /// The number of parameters; a tied head counts once.
    ///
    /// With d = `n_embd` and f = [`inner`](Gpt2Config::inner), a block holds two norms (4d), attention
    /// (3d² + 3d and d² + d) and the MLP (2df + f + d); around them stand the embeddings and the last norm (2d).
    pub fn parameters(&self) -> u128 {
        let [vocab, positions, d, layers, f] =
            [self.vocab_size, self.n_positions, self.n_embd, self.n_layer, self.inner()].map(|n| n as u128);
        let block = 4 * d + (3 * d * d + 3 * d) + (d * d + d) + (2 * d * f + f + d);
        let head = if self.tie_word_embeddings { 0 } else { vocab * d };
        vocab * d + positions * d + layers * block + 2 * d + head
    }

    /// The configuration of a freshly made model, with every key that Transformers writes for it.
    pub fn to_json(&self) -> Map<String, Value> {
        let object = json!({
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": self.vocab_size,
            "n_positions": self.n_positions,
            "n_ctx": self.n_positions,
            "n_embd": self.n_embd,
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "n_inner": self.n_inner,
            "activation_function": self.activation_function.hf_name(),
            "resid_pdrop": self.resid_pdrop,
            "embd_pdrop": self.embd_pdrop,
            "attn_pdrop": self.attn_pdrop,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "initializer_range": 0.02,
            "tie_word_embeddings": self.tie_word_embeddings,
            "scale_attn_weights": self.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": self.scale_attn_by_inverse_layer_idx,
            "reorder_and_upcast_attn": false,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "torch_dtype": "float32",
            "use_cache": true,
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
            ("n_positions", self.n_positions, MOST_ROWS),
            ("n_embd", self.n_embd, MOST_WIDTH),
            ("n_layer", self.n_layer, MOST_LAYERS),
            ("n_head", self.n_head, MOST_WIDTH),
            ("n_inner", self.n_inner.unwrap_or(1), 16 * MOST_WIDTH),
        ]);
        if sizes.is_some() {
            return sizes;
        }
        if !self.n_embd.is_multiple_of(self.n_head) {
            return Some(("n_head", format!("{} heads do not divide n_embd = {}", self.n_head, self.n_embd)));
        }
        let rates =
            [("resid_pdrop", self.resid_pdrop), ("embd_pdrop", self.embd_pdrop), ("attn_pdrop", self.attn_pdrop)];
        checks::probabilities(&rates)
            .or_else(|| checks::epsilon("layer_norm_epsilon", self.layer_norm_epsilon))
            .or_else(|| checks::parameters("n_embd", self.parameters()))
    }
}
