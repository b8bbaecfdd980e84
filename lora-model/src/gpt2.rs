use std::path::Path;

use lora_core::{
    Tape, Tensor, Var,
    lowrank::Layout::InOut,
    ops::{self, Qkv},
    peft::{Adapted, Base, Outline, Part},
};
use lora_kernels::{Attention, Device};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};

use crate::{
    Fetch, Head, Input, KvShape, Limits, LoadOptions, Model, Parts, Result, Task,
    architectures::only,
    build::{self, Build},
    checkpoint::Layout,
    config::{CONFIG_FILE, Gpt2Config, RawConfig},
    layers::{LayerNorm, Projection, Sublayer, Weight},
};

/// GPT-2 (Radford et al. 2019): pre-norm blocks of causal attention and a GELU MLP, learned positions, a head tied to the
/// embedding.
///
/// ```text
/// h = wte[tokens] + wpe[positions]
/// h += c_proj(attention(c_attn(ln_1(h))))      in every block
/// h += c_proj(gelu(c_fc(ln_2(h))))
/// logits = ln_f(h)·wteᵀ
/// ```
/// Its linear maps are `Conv1D`s: weights stored [in, out].
pub struct Gpt2 {
    config: Gpt2Config,
    parts: Parts,
    weights: Weights,
}

struct Weights {
    wte: Weight,
    wpe: Weight,
    blocks: Vec<Block>,
    ln_f: LayerNorm,
    /// Only when the head is not tied to `wte`.
    lm_head: Option<Weight>,
}

struct Block {
    ln_1: LayerNorm,
    c_attn: Projection,
    attn_c_proj: Projection,
    attn: Sublayer,
    ln_2: LayerNorm,
    c_fc: Projection,
    mlp_c_proj: Projection,
    mlp: Sublayer,
}

impl Gpt2Config {
    /// What the model looks like, without weights.
    pub fn outline(&self) -> Outline {
        build::outline(|b: &mut Build| describe(self, b))
    }
}

/// All of the model. Fresh weights are drawn in this order, so that it stays: a seed gives the same model.
fn describe(config: &Gpt2Config, b: &mut Build) -> Result<Weights> {
    let (d, f, eps) = (config.n_embd, config.inner(), config.layer_norm_epsilon);
    b.describe("gpt2", config.n_layer, config.n_positions, &["c_attn"]);
    b.task_type("CAUSAL_LM");
    let wte = b.embedding("transformer.wte", [config.vocab_size, d])?;
    b.tokens(&wte);
    b.keys_values(d);
    let wpe = b.embedding("transformer.wpe", [config.n_positions, d])?;
    let mut blocks = Vec::with_capacity(config.n_layer);
    for i in 0..config.n_layer {
        b.layer(Some(i));
        let module = |name: &str| format!("transformer.h.{i}.{name}");
        let c_attn = b.linear(module("attn.c_attn"), [d, 3 * d], InOut, true)?;
        b.parts(&[("q", d), ("k", d), ("v", d)]);
        let attn_c_proj = b.linear(module("attn.c_proj"), [d, d], InOut, true)?;
        let attn = b.sublayer(module("attn"), Part::Attention, d);
        let c_fc = b.linear(module("mlp.c_fc"), [d, f], InOut, true)?;
        let mlp_c_proj = b.linear(module("mlp.c_proj"), [f, d], InOut, true)?;
        let mlp = b.sublayer(module("mlp"), Part::Mlp, d);
        let (ln_1, ln_2) = (b.layer_norm(module("ln_1"), d, eps)?, b.layer_norm(module("ln_2"), d, eps)?);
        blocks.push(Block { ln_1, c_attn, attn_c_proj, attn, ln_2, c_fc, mlp_c_proj, mlp });
    }
    b.layer(None);
    let ln_f = b.layer_norm("transformer.ln_f", d, eps)?;
    let lm_head = match config.tie_word_embeddings {
        true => None,
        false => Some(b.lm_head([d, config.vocab_size])?),
    };
    Ok(Weights { wte, wpe, blocks, ln_f, lm_head })
}

impl Gpt2 {
    /// Loads the weights of a folder whose configuration was read.
    ///
    /// # Errors
    /// A configuration that makes no sense; weights that are missing, damaged or of another shape.
    pub fn load(dir: &Path, raw: RawConfig, device: &Device, options: &LoadOptions) -> Result<Gpt2> {
        let config = Gpt2Config::from_raw(&raw)?;
        only(Task::CausalLm, &raw, options)?;
        let own = |name: &str| own_name(name, &config);
        let (weights, parts) = build::load(dir, raw, (device, options), own, |b: &mut Build| describe(&config, b))?;
        Ok(Gpt2 { config, parts, weights })
    }

    /// The model of a configuration with the weights that `fetch` gives; see [`assemble`](crate::assemble()).
    ///
    /// # Errors
    /// A configuration that makes no sense, what `fetch` gives.
    pub fn assemble(raw: RawConfig, _device: &Device, options: &LoadOptions, fetch: &mut Fetch) -> Result<Gpt2> {
        let config = Gpt2Config::from_raw(&raw)?;
        only(Task::CausalLm, &raw, options)?;
        let (weights, parts) = build::make(raw, Layout::single(), fetch, |b: &mut Build| describe(&config, b))?;
        Ok(Gpt2 { config, parts, weights })
    }

    /// A fresh model to pretrain, initialised as the paper says: normal with deviation 0.02, residual projections scaled
    /// down by √(2·layers), norms 1, biases 0. `dir` only stands in messages about the configuration.
    ///
    /// # Errors
    /// A configuration that makes no sense.
    pub fn init(config: Gpt2Config, dir: &Path, seed: u64, device: &Device) -> Result<Gpt2> {
        let path = dir.join(CONFIG_FILE);
        config.validate(&path)?;
        let raw = RawConfig::new(&path, config.to_json());
        let residual = 0.02 / (2.0 * config.n_layer as f64).sqrt();
        let mut stream = 0;
        let mut tensor = |name: &str, shape: &[usize]| {
            let len = shape.iter().product();
            let std = match name {
                _ if shape.len() == 1 => None,
                _ if name.ends_with("c_proj.weight") => Some(residual),
                _ => Some(0.02),
            };
            let values = match std {
                Some(std) => {
                    let normal = Normal::new(0.0, std).expect("a finite deviation");
                    let mut rng = ChaCha8Rng::seed_from_u64(seed);
                    rng.set_stream(stream);
                    (0..len).map(|_| normal.sample(&mut rng) as f32).collect()
                }
                None if name.ends_with("bias") => vec![0.0; len],
                None => vec![1.0; len],
            };
            stream += 1;
            Ok(Tensor::from_slice(device, shape, &values)?)
        };
        let describe = |b: &mut Build| describe(&config, b);
        let (weights, parts) = build::make(raw, Layout::single(), &mut tensor, describe)?;
        Ok(Gpt2 { config, parts, weights })
    }

    /// The configuration.
    pub fn gpt2_config(&self) -> &Gpt2Config {
        &self.config
    }

    fn attention(&self, t: &mut Tape, layer: usize) -> Attention {
        let c = &self.config;
        let mut scale = 1.0;
        if c.scale_attn_weights {
            scale /= (c.head_dim() as f64).sqrt();
        }
        if c.scale_attn_by_inverse_layer_idx {
            scale /= (layer + 1) as f64;
        }
        let dropout = t.dropout_mask(c.attn_pdrop);
        Attention { heads: c.n_head, kv_heads: c.n_head, head_dim: c.head_dim(), scale, causal: true, dropout }
    }
}

/// The name of a file's tensor here: older files lack the prefix, hold masks as buffers, and repeat a tied head.
fn own_name(name: &str, config: &Gpt2Config) -> Option<String> {
    if name == "lm_head.weight" {
        return (!config.tie_word_embeddings).then(|| name.into());
    }
    let name = name.strip_prefix("transformer.").unwrap_or(name);
    let mask = name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias");
    (!mask).then(|| format!("transformer.{name}"))
}

impl Base for Gpt2 {
    fn outline(&self) -> &Outline {
        self.parts.outline()
    }

    fn tensors(&self) -> Box<dyn Iterator<Item = (&str, &Tensor)> + '_> {
        self.parts.tensors()
    }
}

impl Model for Gpt2 {
    fn parts(&self) -> &Parts {
        &self.parts
    }

    fn limits(&self) -> Limits {
        let Gpt2Config { vocab_size, n_positions: max_positions, .. } = self.config;
        Limits { vocab_size, max_positions, first_position: 0, segments: 0 }
    }

    fn end_of_text(&self) -> Option<u32> {
        self.config.eos_token_id
    }

    fn kv_shape(&self) -> Option<KvShape> {
        Some(KvShape { layers: self.config.n_layer, cols: self.config.n_embd, group: 1 })
    }

    fn set_base_dropout(&mut self, p: f64) {
        let c = &mut self.config;
        (c.resid_pdrop, c.embd_pdrop, c.attn_pdrop) = (p, p, p);
    }

    fn head(&self) -> Head<'_> {
        let weight = self.weights.lm_head.as_ref().unwrap_or(&self.weights.wte);
        Head { task: Task::CausalLm, weight, bias: None }
    }

    fn hidden<'m>(&'m self, t: &mut Tape<'m>, adapted: &'m Adapted, input: &mut Input<'m>) -> Result<Var> {
        let w = &self.weights;
        let x = input.embed(t, adapted, &w.wte)?;
        let p = w.wpe.rows(t, adapted, input.positions())?;
        let h = ops::add(t, x, p)?;
        let mut h = ops::dropout(t, h, self.config.embd_pdrop)?;
        for (i, b) in w.blocks.iter().enumerate() {
            h = input.layer(t, h, move |t, mut h, input| {
                let x = b.ln_1.apply(t, adapted, &h)?;
                let qkv = b.c_attn.apply(t, adapted, &x)?;
                drop(x);
                let cfg = self.attention(t, i);
                let mut heads = input.attend(t, adapted, i, cfg, Qkv::Fused(&qkv))?;
                drop(qkv);
                if i + 1 == w.blocks.len() {
                    [heads, h] = input.wanted(t, [heads, h])?;
                }
                let y = b.attn_c_proj.apply(t, adapted, &heads)?;
                drop(heads);
                let y = ops::dropout(t, y, self.config.resid_pdrop)?;
                let h = b.attn.join(t, adapted, h, y, None)?;
                let x = b.ln_2.apply(t, adapted, &h)?;
                let x = b.c_fc.apply(t, adapted, &x)?;
                let x = ops::activation(t, self.config.activation_function, &x)?;
                let y = b.mlp_c_proj.apply(t, adapted, &x)?;
                drop(x);
                let y = ops::dropout(t, y, self.config.resid_pdrop)?;
                b.mlp.join(t, adapted, h, y, None)
            })?;
        }
        Ok(w.ln_f.apply(t, adapted, &h)?)
    }
}
