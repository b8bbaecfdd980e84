use std::path::Path;

use lora_kernels::Activation;
use serde_json::{Map, Value, json};

use super::{
    RawConfig, RopeConfig,
    checks::{self, MOST_LAYERS, MOST_POSITIONS, MOST_ROWS, MOST_WIDTH, Problem},
};
use crate::{Error, Result};

/// The published variants of one architecture: `model_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LlamaKind {
    /// `llama`: Llama 2 and 3, TinyLlama, SmolLM. Biases are a choice.
    Llama,
    /// `mistral`: no biases; a sliding window.
    Mistral,
    /// `qwen2`: biases of q, k and v alone.
    Qwen2,
    /// `qwen3`: heads of q and k are normalised; biases of attention are a choice.
    Qwen3,
}

impl LlamaKind {
    /// Every kind.
    pub const ALL: [LlamaKind; 4] = [LlamaKind::Llama, LlamaKind::Mistral, LlamaKind::Qwen2, LlamaKind::Qwen3];

    /// Its `model_type`.
    pub fn model_type(self) -> &'static str {
        match self {
            LlamaKind::Llama => "llama",
            LlamaKind::Mistral => "mistral",
            LlamaKind::Qwen2 => "qwen2",
            LlamaKind::Qwen3 => "qwen3",
        }
    }

    /// Its class in Transformers.
    fn class(self) -> &'static str {
        match self {
            LlamaKind::Llama => "LlamaForCausalLM",
            LlamaKind::Mistral => "MistralForCausalLM",
            LlamaKind::Qwen2 => "Qwen2ForCausalLM",
            LlamaKind::Qwen3 => "Qwen3ForCausalLM",
        }
    }
}

/// What Llama and its kin need to know (Touvron et al. 2023; Jiang et al. 2023, "Mistral 7B"; Qwen team 2024, 2025),
/// under the names of their `config.json`.
///
/// Absent keys take the defaults that Transformers has for the kind.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Which of the kin it is: `model_type`.
    pub kind: LlamaKind,
    /// Tokens in the vocabulary: rows of `embed_tokens`.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP's hidden layer.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of heads of keys and values, each shared by a group of query heads (Ainslie et al. 2023).
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// The longest sequence that the rotary positions are made for.
    pub max_position_embeddings: usize,
    /// The window of attention, when one is in use.
    pub sliding_window: Option<usize>,
    /// ε of every norm.
    pub rms_norm_eps: f64,
    /// Whether q, k and v have biases, and but for `qwen2` the output projection too.
    pub attention_bias: bool,
    /// Whether the MLP has biases.
    pub mlp_bias: bool,
    /// Dropout on attention probabilities, in training.
    pub attention_dropout: f64,
    /// Rotary positions.
    pub rope: RopeConfig,
    /// Whether the output head is `embed_tokens` itself (otherwise `lm_head.weight`).
    pub tie_word_embeddings: bool,
    /// The token that begins a text.
    pub bos_token_id: Option<u32>,
    /// The token that ends a text; the first one where the file lists several.
    pub eos_token_id: Option<u32>,
}

impl LlamaConfig {
    /// The defaults of a kind.
    pub fn of(kind: LlamaKind) -> LlamaConfig {
        let qwen = matches!(kind, LlamaKind::Qwen2 | LlamaKind::Qwen3);
        LlamaConfig {
            kind,
            vocab_size: if qwen { 151_936 } else { 32_000 },
            hidden_size: 4096,
            intermediate_size: match kind {
                LlamaKind::Llama => 11_008,
                LlamaKind::Mistral => 14_336,
                _ => 22_016,
            },
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: if kind == LlamaKind::Mistral { 8 } else { 32 },
            head_dim: 128,
            max_position_embeddings: match kind {
                LlamaKind::Llama => 2048,
                LlamaKind::Mistral => 131_072,
                _ => 32_768,
            },
            sliding_window: (kind == LlamaKind::Mistral).then_some(4096),
            rms_norm_eps: 1e-6,
            attention_bias: kind == LlamaKind::Qwen2,
            mlp_bias: false,
            attention_dropout: 0.0,
            rope: RopeConfig::default(),
            tie_word_embeddings: false,
            bos_token_id: (!qwen).then_some(1),
            eos_token_id: (!qwen).then_some(2),
        }
    }

    /// TinyLlama 1.1B, 1,100,048,384 parameters.
    pub fn tiny_llama() -> LlamaConfig {
        LlamaConfig {
            hidden_size: 2048,
            intermediate_size: 5632,
            num_hidden_layers: 22,
            num_key_value_heads: 4,
            head_dim: 64,
            rms_norm_eps: 1e-5,
            ..LlamaConfig::of(LlamaKind::Llama)
        }
    }

    /// SmolLM 135M, 134,515,008 parameters.
    pub fn smollm_135m() -> LlamaConfig {
        LlamaConfig {
            vocab_size: 49_152,
            hidden_size: 576,
            intermediate_size: 1536,
            num_hidden_layers: 30,
            num_attention_heads: 9,
            num_key_value_heads: 3,
            head_dim: 64,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: true,
            bos_token_id: Some(0),
            eos_token_id: Some(0),
            ..LlamaConfig::of(LlamaKind::Llama)
        }
    }

    /// Takes what the architecture needs out of a configuration, and checks it.
    ///
    /// # Errors
    /// [`Error::Config`] naming file and key for a wrong type, an impossible value, and quantised weights;
    /// [`Error::Unsupported`] for another architecture, activation or kind of RoPE.
    pub fn from_raw(raw: &RawConfig) -> Result<LlamaConfig> {
        let model_type = raw.str("model_type")?;
        let Some(kind) = LlamaKind::ALL.into_iter().find(|k| Some(k.model_type()) == model_type) else {
            let expected = LlamaKind::ALL.map(LlamaKind::model_type).join(", ");
            return Err(raw.error("model_type", format_args!("expected one of {expected}")));
        };
        raw.refuse_quantised()?;
        if let Some(found) = raw.activation("hidden_act")?
            && found != Activation::Silu
        {
            return Err(Error::Unsupported {
                path: raw.path().to_owned(),
                what: "the hidden_act",
                found: found.hf_name().to_owned(),
                supported: &["silu"],
            });
        }
        let d = LlamaConfig::of(kind);
        let size = |key, default| Ok::<_, Error>(raw.usize(key)?.unwrap_or(default));
        let hidden_size = size("hidden_size", d.hidden_size)?;
        let heads = size("num_attention_heads", d.num_attention_heads)?;
        let layers = size("num_hidden_layers", d.num_hidden_layers)?;
        let max_position_embeddings = size("max_position_embeddings", d.max_position_embeddings)?;
        let biased = |key, may: bool| Ok::<_, Error>(may && raw.bool(key)?.unwrap_or(false));
        let config = LlamaConfig {
            kind,
            vocab_size: size("vocab_size", d.vocab_size)?,
            hidden_size,
            intermediate_size: size("intermediate_size", d.intermediate_size)?,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            // Absent it has the kind's default, where there is one; `null` is a head of keys for each of queries.
            num_key_value_heads: match raw.usize("num_key_value_heads")? {
                Some(n) => n,
                None if kind == LlamaKind::Llama || raw.keys().contains_key("num_key_value_heads") => heads,
                None => d.num_key_value_heads,
            },
            head_dim: match raw.usize("head_dim")? {
                Some(n) => n,
                None if kind == LlamaKind::Qwen3 => d.head_dim,
                None if heads == 0 || !hidden_size.is_multiple_of(heads) => {
                    let problem = format!("{heads} heads do not divide hidden_size = {hidden_size}");
                    return Err(raw.error("num_attention_heads", problem));
                }
                None => hidden_size / heads,
            },
            max_position_embeddings,
            sliding_window: window(raw, kind, layers, d.sliding_window)?,
            rms_norm_eps: raw.f64("rms_norm_eps")?.unwrap_or(d.rms_norm_eps),
            attention_bias: match kind {
                LlamaKind::Qwen2 => true,
                LlamaKind::Mistral => false,
                LlamaKind::Llama | LlamaKind::Qwen3 => biased("attention_bias", true)?,
            },
            mlp_bias: biased("mlp_bias", kind == LlamaKind::Llama)?,
            attention_dropout: raw.f64("attention_dropout")?.unwrap_or(d.attention_dropout),
            rope: RopeConfig::from_raw(raw, max_position_embeddings)?,
            tie_word_embeddings: raw.bool("tie_word_embeddings")?.unwrap_or(d.tie_word_embeddings),
            bos_token_id: raw.token_or("bos_token_id", d.bos_token_id)?,
            eos_token_id: raw.token_or("eos_token_id", d.eos_token_id)?,
        };
        raw.checked(config.problem())?;
        Ok(config)
    }

    /// Checks a configuration that was made rather than read; `path` stands in the message.
    ///
    /// # Errors
    /// [`Error::Config`] for the first value that is impossible.
    pub fn validate(&self, path: &Path) -> Result<()> {
        RawConfig::new(path, Map::new()).checked(self.problem())
    }

    /// The longest sequence: within a window, nothing differs from attention without one.
    pub fn max_positions(&self) -> usize {
        self.sliding_window.map_or(self.max_position_embeddings, |w| w.min(self.max_position_embeddings))
    }

    /// Columns of the queries: heads times their width.
    pub fn query_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Columns of the keys, and of the values.
    pub fn kv_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Whether the output projection of attention has a bias.
    pub fn output_bias(&self) -> bool {
        self.attention_bias && self.kind != LlamaKind::Qwen2
    }

    /// Whether each head of q and k is normalised.
    pub fn qk_norm(&self) -> bool {
        self.kind == LlamaKind::Qwen3
    }

    /// The number of parameters; a tied head counts once.
    ///
    /// With d = `hidden_size`, q and k the widths of queries and keys and f = `intermediate_size`, a block holds two norms
    /// (2d), attention (2dq + 2dk) and the MLP (3df), besides biases and the norms of heads; around the blocks stand the
    /// embedding, the last norm (d) and the head.
    pub fn parameters(&self) -> u128 {
        let [vocab, d, f, layers] =
            [self.vocab_size, self.hidden_size, self.intermediate_size, self.num_hidden_layers].map(|n| n as u128);
        let [heads, kv_heads, head_dim] =
            [self.num_attention_heads, self.num_key_value_heads, self.head_dim].map(|n| n as u128);
        let (q, k) = (heads * head_dim, kv_heads * head_dim);
        let biases = u128::from(self.attention_bias) * (q + 2 * k)
            + u128::from(self.output_bias()) * d
            + u128::from(self.mlp_bias) * (2 * f + d);
        let block = 2 * d + 2 * d * (q + k) + 3 * d * f + biases + u128::from(self.qk_norm()) * 2 * head_dim;
        let head = if self.tie_word_embeddings { 0 } else { vocab * d };
        vocab * d + layers * block + d + head
    }

    /// The configuration of a freshly made model, with the keys that Transformers writes for it.
    pub fn to_json(&self) -> Map<String, Value> {
        let mut object = json!({
            "architectures": [self.kind.class()],
            "model_type": self.kind.model_type(),
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope.rope_theta,
            "rope_scaling": self.rope.scaling_json(),
            "attention_dropout": self.attention_dropout,
            "initializer_range": 0.02,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "torch_dtype": "float32",
            "use_cache": true,
        });
        match self.kind {
            LlamaKind::Llama => {
                object["attention_bias"] = self.attention_bias.into();
                object["mlp_bias"] = self.mlp_bias.into();
            }
            LlamaKind::Mistral => object["sliding_window"] = json!(self.sliding_window),
            LlamaKind::Qwen2 | LlamaKind::Qwen3 => {
                if self.kind == LlamaKind::Qwen3 {
                    object["attention_bias"] = self.attention_bias.into();
                }
                object["use_sliding_window"] = self.sliding_window.is_some().into();
                object["sliding_window"] = json!(self.sliding_window);
                object["max_window_layers"] =
                    json!(if self.sliding_window.is_some() { 0 } else { self.num_hidden_layers });
            }
        }
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
            ("intermediate_size", self.intermediate_size, 16 * MOST_WIDTH),
            ("num_hidden_layers", self.num_hidden_layers, MOST_LAYERS),
            ("num_attention_heads", self.num_attention_heads, MOST_WIDTH),
            ("num_key_value_heads", self.num_key_value_heads, MOST_WIDTH),
            ("head_dim", self.head_dim, MOST_WIDTH),
            ("max_position_embeddings", self.max_position_embeddings, MOST_POSITIONS),
            ("sliding_window", self.sliding_window.unwrap_or(1), usize::MAX),
        ]);
        if sizes.is_some() {
            return sizes;
        }
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if !heads.is_multiple_of(kv_heads) {
            let problem = format!("{kv_heads} heads of keys do not divide num_attention_heads = {heads}");
            return Some(("num_key_value_heads", problem));
        }
        if !self.head_dim.is_multiple_of(2) {
            let problem = format!("{} is odd, but rotary positions turn a head's columns in pairs", self.head_dim);
            return Some(("head_dim", problem));
        }
        // The cosines and sines of every position, which are made when the model is.
        const MOST_TURNS: usize = 1 << 28;
        if self.max_positions() * self.head_dim > MOST_TURNS {
            let problem = format!("with head_dim = {} it is at most {}", self.head_dim, MOST_TURNS / self.head_dim);
            return Some(("max_position_embeddings", problem));
        }
        checks::probabilities(&[("attention_dropout", self.attention_dropout)])
            .or_else(|| checks::epsilon("rms_norm_eps", self.rms_norm_eps))
            .or_else(|| self.rope.problem())
            .or_else(|| checks::parameters("hidden_size", self.parameters()))
    }
}

/// The window of attention, if any layer has one.
fn window(raw: &RawConfig, kind: LlamaKind, layers: usize, default: Option<usize>) -> Result<Option<usize>> {
    match kind {
        LlamaKind::Llama => Ok(None),
        // `null` is no window, and an absent key the default.
        LlamaKind::Mistral if raw.keys().contains_key("sliding_window") => raw.usize("sliding_window"),
        LlamaKind::Mistral => Ok(default),
        LlamaKind::Qwen2 | LlamaKind::Qwen3 => {
            let used = raw.bool("use_sliding_window")?.unwrap_or(false);
            let size = match raw.keys().contains_key("sliding_window") {
                true => raw.usize("sliding_window")?,
                false => Some(4096),
            };
            let size = size.filter(|_| used);
            let slides = match raw.get("layer_types", "a list", Value::as_array)? {
                Some(types) => slides(raw, types, layers)?,
                None => size.is_some() && raw.usize("max_window_layers")?.unwrap_or(28) < layers,
            };
            match (slides, size) {
                (true, None) => Err(raw.error("layer_types", "layers slide, but there is no sliding_window in use")),
                (true, size) => Ok(size),
                (false, _) => Ok(None),
            }
        }
    }
}

/// Whether any of the layers slides a window.
fn slides(raw: &RawConfig, types: &[Value], layers: usize) -> Result<bool> {
    const SLIDING: &str = "sliding_attention";
    if types.len() != layers {
        let problem = format!("{} types for num_hidden_layers = {layers}", types.len());
        return Err(raw.error("layer_types", problem));
    }
    match types.iter().find(|t| !matches!(t.as_str(), Some(SLIDING | "full_attention"))) {
        Some(other) => Err(raw.error("layer_types", format_args!("{other} is not supported"))),
        None => Ok(types.iter().any(|t| t == SLIDING)),
    }
}
