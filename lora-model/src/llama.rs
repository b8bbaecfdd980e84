use std::path::Path;

use lora_core::{
    Tape, Tensor, Var,
    lowrank::Layout::OutIn,
    ops::{self, Qkv},
    peft::{Adapted, Base, Outline, Part},
};
use lora_kernels::{Attention, Device};

use crate::{
    Fetch, Head, Input, KvShape, Limits, LoadOptions, Model, Parts, Result, Task,
    architectures::only,
    build::{self, Build},
    checkpoint::Layout,
    config::{LlamaConfig, RawConfig},
    layers::{Projection, RmsNorm, Sublayer, Weight},
    rope,
};

/// Llama (Touvron et al. 2023) and its kin, Mistral and Qwen: pre-norm blocks of causal attention with rotary positions,
/// in which groups of query heads share keys and values, and a gated MLP.
///
/// ```text
/// h = embed_tokens[tokens]
/// x = input_layernorm(h)                                        in every block
/// h += o_proj(attention(rope(q_proj(x)), rope(k_proj(x)), v_proj(x)))
/// x = post_attention_layernorm(h)
/// h += down_proj(silu(gate_proj(x)) ∘ up_proj(x))
/// logits = norm(h)·lm_headᵀ
/// ```
/// In Qwen3 the heads of q and k are normalised before they are turned.
pub struct Llama {
    config: LlamaConfig,
    parts: Parts,
    weights: Weights,
    /// Cosines and sines of all positions, [positions, head_dim / 2].
    turns: (Tensor, Tensor),
}

struct Weights {
    embed_tokens: Weight,
    blocks: Vec<Block>,
    norm: RmsNorm,
    /// Only when the head is not tied to the embedding.
    lm_head: Option<Weight>,
}

struct Block {
    input_layernorm: RmsNorm,
    q_proj: Projection,
    k_proj: Projection,
    v_proj: Projection,
    /// Norms of the heads of q and k.
    qk_norm: Option<(RmsNorm, RmsNorm)>,
    o_proj: Projection,
    self_attn: Sublayer,
    post_attention_layernorm: RmsNorm,
    gate_proj: Projection,
    up_proj: Projection,
    down_proj: Projection,
    mlp: Sublayer,
}

impl LlamaConfig {
    /// What the model looks like, without weights.
    pub fn outline(&self) -> Outline {
        build::outline(|b: &mut Build| describe(self, b))
    }
}

/// All of the model, in the order of its weights.
fn describe(config: &LlamaConfig, b: &mut Build) -> Result<Weights> {
    let (d, f, eps) = (config.hidden_size, config.intermediate_size, config.rms_norm_eps);
    let (q, kv) = (config.query_width(), config.kv_width());
    let layers = config.num_hidden_layers;
    b.describe(config.kind.model_type(), layers, config.max_positions(), &["q_proj", "v_proj"]);
    b.task_type("CAUSAL_LM");
    let embed_tokens = b.embedding("model.embed_tokens", [config.vocab_size, d])?;
    b.tokens(&embed_tokens);
    b.keys_values(kv);
    let mut blocks = Vec::with_capacity(layers);
    for i in 0..layers {
        b.layer(Some(i));
        let module = |name: &str| format!("model.layers.{i}.{name}");
        let input_layernorm = b.rms_norm(module("input_layernorm"), d, eps)?;
        let q_proj = b.linear(module("self_attn.q_proj"), [d, q], OutIn, config.attention_bias)?;
        let k_proj = b.linear(module("self_attn.k_proj"), [d, kv], OutIn, config.attention_bias)?;
        let v_proj = b.linear(module("self_attn.v_proj"), [d, kv], OutIn, config.attention_bias)?;
        let qk_norm = match config.qk_norm() {
            false => None,
            true => {
                let mut norm = |name: &str| b.rms_norm(module(name), config.head_dim, eps);
                Some((norm("self_attn.q_norm")?, norm("self_attn.k_norm")?))
            }
        };
        let o_proj = b.linear(module("self_attn.o_proj"), [q, d], OutIn, config.output_bias())?;
        let self_attn = b.sublayer(module("self_attn"), Part::Attention, d);
        let post_attention_layernorm = b.rms_norm(module("post_attention_layernorm"), d, eps)?;
        let gate_proj = b.linear(module("mlp.gate_proj"), [d, f], OutIn, config.mlp_bias)?;
        let up_proj = b.linear(module("mlp.up_proj"), [d, f], OutIn, config.mlp_bias)?;
        let down_proj = b.linear(module("mlp.down_proj"), [f, d], OutIn, config.mlp_bias)?;
        let mlp = b.sublayer(module("mlp"), Part::Mlp, d);
        blocks.push(Block {
            input_layernorm,
            q_proj,
            k_proj,
            v_proj,
            qk_norm,
            o_proj,
            self_attn,
            post_attention_layernorm,
            gate_proj,
            up_proj,
            down_proj,
            mlp,
        });
    }
    b.layer(None);
    let norm = b.rms_norm("model.norm", d, eps)?;
    let lm_head = match config.tie_word_embeddings {
        true => None,
        false => Some(b.lm_head([d, config.vocab_size])?),
    };
    Ok(Weights { embed_tokens, blocks, norm, lm_head })
}

impl Llama {
    /// Loads the weights of a folder whose configuration was read.
    ///
    /// # Errors
    /// A configuration that makes no sense; weights that are missing, damaged or of another shape.
    pub fn load(dir: &Path, raw: RawConfig, device: &Device, options: &LoadOptions) -> Result<Llama> {
        let config = LlamaConfig::from_raw(&raw)?;
        only(Task::CausalLm, &raw, options)?;
        let own = |name: &str| own_name(name, &config);
        let (weights, parts) = build::load(dir, raw, (device, options), own, |b: &mut Build| describe(&config, b))?;
        Llama::of(config, parts, weights, device)
    }

    /// The model of a configuration with the weights that `fetch` gives; see [`assemble`](crate::assemble()).
    ///
    /// # Errors
    /// A configuration that makes no sense, what `fetch` gives.
    pub fn assemble(raw: RawConfig, device: &Device, options: &LoadOptions, fetch: &mut Fetch) -> Result<Llama> {
        let config = LlamaConfig::from_raw(&raw)?;
        only(Task::CausalLm, &raw, options)?;
        let (weights, parts) = build::make(raw, Layout::single(), fetch, |b: &mut Build| describe(&config, b))?;
        Llama::of(config, parts, weights, device)
    }

    /// With the tables of its rotary positions.
    fn of(config: LlamaConfig, parts: Parts, weights: Weights, device: &Device) -> Result<Llama> {
        let sums = weights.embed_tokens.tensor.dtype().accumulator();
        let turns = rope::tables(&config.rope, config.max_positions(), config.head_dim, device, sums)?;
        Ok(Llama { config, parts, weights, turns })
    }

    /// The configuration.
    pub fn llama_config(&self) -> &LlamaConfig {
        &self.config
    }

    fn attention(&self, t: &mut Tape) -> Attention {
        let c = &self.config;
        Attention {
            heads: c.num_attention_heads,
            kv_heads: c.num_key_value_heads,
            head_dim: c.head_dim,
            scale: 1.0 / (c.head_dim as f64).sqrt(),
            causal: true,
            dropout: t.dropout_mask(c.attention_dropout),
        }
    }

    /// One block's attention of its input x, before the output projection.
    fn attend(
        &self,
        t: &mut Tape,
        adapted: &Adapted,
        layer: usize,
        x: Var,
        input: &mut Input,
    ) -> lora_core::Result<Var> {
        let b = &self.weights.blocks[layer];
        let mut q = b.q_proj.apply(t, adapted, &x)?;
        let mut k = b.k_proj.apply(t, adapted, &x)?;
        let v = b.v_proj.apply(t, adapted, &x)?;
        drop(x);
        if let Some((q_norm, k_norm)) = &b.qk_norm {
            (q, k) = (q_norm.apply(t, adapted, &q)?, k_norm.apply(t, adapted, &k)?);
        }
        let ((cos, sin), head_dim) = (&self.turns, self.config.head_dim);
        q = ops::rope(t, &q, input.positions(), cos, sin, head_dim)?;
        k = ops::rope(t, &k, input.positions(), cos, sin, head_dim)?;
        let cfg = self.attention(t);
        input.attend(t, adapted, layer, cfg, Qkv::Separate { q: &q, k: &k, v: &v })
    }
}

/// The name of a file's tensor here: some files repeat a tied head, and older ones hold the frequencies of RoPE.
fn own_name(name: &str, config: &LlamaConfig) -> Option<String> {
    let left_out = (name == "lm_head.weight" && config.tie_word_embeddings) || name.ends_with(".rotary_emb.inv_freq");
    (!left_out).then(|| name.into())
}

impl Base for Llama {
    fn outline(&self) -> &Outline {
        self.parts.outline()
    }

    fn tensors(&self) -> Box<dyn Iterator<Item = (&str, &Tensor)> + '_> {
        self.parts.tensors()
    }
}

impl Model for Llama {
    fn parts(&self) -> &Parts {
        &self.parts
    }

    fn limits(&self) -> Limits {
        let (vocab_size, max_positions) = (self.config.vocab_size, self.config.max_positions());
        Limits { vocab_size, max_positions, first_position: 0, segments: 0 }
    }

    fn end_of_text(&self) -> Option<u32> {
        self.config.eos_token_id
    }

    fn kv_shape(&self) -> Option<KvShape> {
        let c = &self.config;
        let group = c.num_attention_heads / c.num_key_value_heads;
        Some(KvShape { layers: c.num_hidden_layers, cols: c.kv_width(), group })
    }

    fn set_base_dropout(&mut self, p: f64) {
        self.config.attention_dropout = p;
    }

    fn head(&self) -> Head<'_> {
        let weight = self.weights.lm_head.as_ref().unwrap_or(&self.weights.embed_tokens);
        Head { task: Task::CausalLm, weight, bias: None }
    }

    fn hidden<'m>(&'m self, t: &mut Tape<'m>, adapted: &'m Adapted, input: &mut Input<'m>) -> Result<Var> {
        let w = &self.weights;
        let mut h = input.embed(t, adapted, &w.embed_tokens)?;
        for (i, b) in w.blocks.iter().enumerate() {
            h = input.layer(t, h, move |t, mut h, input| {
                let x = b.input_layernorm.apply(t, adapted, &h)?;
                let mut heads = self.attend(t, adapted, i, x, input)?;
                if i + 1 == w.blocks.len() {
                    [heads, h] = input.wanted(t, [heads, h])?;
                }
                let y = b.o_proj.apply(t, adapted, &heads)?;
                drop(heads);
                let h = b.self_attn.join(t, adapted, h, y, None)?;
                let x = b.post_attention_layernorm.apply(t, adapted, &h)?;
                let gate = b.gate_proj.apply(t, adapted, &x)?;
                let up = b.up_proj.apply(t, adapted, &x)?;
                drop(x);
                let x = ops::silu_gate(t, &gate, &up)?;
                drop((gate, up));
                let y = b.down_proj.apply(t, adapted, &x)?;
                drop(x);
                b.mlp.join(t, adapted, h, y, None)
            })?;
        }
        Ok(w.norm.apply(t, adapted, &h)?)
    }
}
