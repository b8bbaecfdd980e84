use std::path::Path;

use lora_core::{
    Tape, Tensor, Var,
    lowrank::Layout as WeightLayout,
    ops,
    peft::{Adapted, Base, Site},
};
use lora_kernels::{Attention, DType, Device};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};

use crate::{
    Context, KvShape, Limits, Model, Result,
    checkpoint::{Checkpoint, Layout, TensorSpec},
    config::{CONFIG_FILE, Gpt2Config, RawConfig},
    layers::{LayerNorm, Projection, Weight},
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
    raw: RawConfig,
    layout: Layout,
    wte: Weight,
    wpe: Weight,
    blocks: Vec<Block>,
    ln_f: LayerNorm,
    /// Only when the head is not tied to `wte`.
    lm_head: Option<Weight>,
    sites: Vec<Site>,
}

struct Block {
    ln_1: LayerNorm,
    c_attn: Projection,
    attn_c_proj: Projection,
    ln_2: LayerNorm,
    c_fc: Projection,
    mlp_c_proj: Projection,
}

impl Gpt2 {
    /// Loads the weights of a folder whose configuration was read.
    ///
    /// # Errors
    /// A configuration that makes no sense; weights that are missing, damaged or of another shape.
    pub fn load(dir: &Path, raw: RawConfig, device: &Device, dtype: DType) -> Result<Gpt2> {
        let config = Gpt2Config::from_raw(&raw)?;
        let weights = Checkpoint::open(dir)?.rename(|name| own_name(name, &config))?;
        weights.expect(&specs(&config))?;
        let layout = weights.layout().clone();
        Gpt2::build(config, raw, layout, |name, shape| {
            Ok(weights.tensor(name, shape, &Device::Cpu)?.to(device, dtype)?)
        })
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
        Gpt2::build(config, raw, Layout::single(), |name, shape| {
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
        })
    }

    fn build(
        config: Gpt2Config,
        raw: RawConfig,
        layout: Layout,
        mut tensor: impl FnMut(&str, &[usize]) -> Result<Tensor>,
    ) -> Result<Gpt2> {
        let (d, f, eps) = (config.n_embd, config.inner(), config.layer_norm_epsilon);
        let mut weight = |name: String, shape: &[usize]| -> Result<Weight> {
            let tensor = tensor(&name, shape)?;
            Ok(Weight { name, tensor })
        };
        let wte = weight("transformer.wte.weight".into(), &[config.vocab_size, d])?;
        let wpe = weight("transformer.wpe.weight".into(), &[config.n_positions, d])?;
        let mut blocks = Vec::with_capacity(config.n_layer);
        let norm = |weight: &mut dyn FnMut(String, &[usize]) -> Result<Weight>, module: String| {
            let (w, b) = (weight(format!("{module}.weight"), &[d])?, weight(format!("{module}.bias"), &[d])?);
            Result::Ok(LayerNorm { weight: w, bias: b, eps })
        };
        for i in 0..config.n_layer {
            let module = |name: &str| format!("transformer.h.{i}.{name}");
            let mut projection = |name: &str, inputs: usize, outputs: usize| {
                let module = module(name);
                let w = weight(format!("{module}.weight"), &[inputs, outputs])?;
                let bias = weight(format!("{module}.bias"), &[outputs])?;
                Result::Ok(Projection { module, weight: w, bias, layout: WeightLayout::InOut })
            };
            let (c_attn, attn_c_proj) = (projection("attn.c_attn", d, 3 * d)?, projection("attn.c_proj", d, d)?);
            let (c_fc, mlp_c_proj) = (projection("mlp.c_fc", d, f)?, projection("mlp.c_proj", f, d)?);
            let ln_1 = norm(&mut weight, module("ln_1"))?;
            let ln_2 = norm(&mut weight, module("ln_2"))?;
            blocks.push(Block { ln_1, c_attn, attn_c_proj, ln_2, c_fc, mlp_c_proj });
        }
        let ln_f = norm(&mut weight, "transformer.ln_f".into())?;
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(weight("lm_head.weight".into(), &[config.vocab_size, d])?),
        };
        let qkv = || vec![("q", 0..d), ("k", d..2 * d), ("v", 2 * d..3 * d)];
        let of = |b: &Block| {
            [b.c_attn.site(qkv()), b.attn_c_proj.site(vec![]), b.c_fc.site(vec![]), b.mlp_c_proj.site(vec![])]
        };
        let sites = blocks.iter().flat_map(of).collect();
        Ok(Gpt2 { config, raw, layout, wte, wpe, blocks, ln_f, lm_head, sites })
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

/// The names and shapes of all tensors.
fn specs(config: &Gpt2Config) -> Vec<TensorSpec> {
    let (d, f) = (config.n_embd, config.inner());
    let mut all = vec![
        TensorSpec::new("transformer.wte.weight", [config.vocab_size, d]),
        TensorSpec::new("transformer.wpe.weight", [config.n_positions, d]),
    ];
    let mut pair = |module: &str, weight: &[usize]| {
        all.push(TensorSpec::new(format!("{module}.weight"), weight));
        all.push(TensorSpec::new(format!("{module}.bias"), [weight[weight.len() - 1]]));
    };
    for i in 0..config.n_layer {
        let modules: [(&str, &[usize]); 6] = [
            ("ln_1", &[d]),
            ("attn.c_attn", &[d, 3 * d]),
            ("attn.c_proj", &[d, d]),
            ("ln_2", &[d]),
            ("mlp.c_fc", &[d, f]),
            ("mlp.c_proj", &[f, d]),
        ];
        for (module, weight) in modules {
            pair(&format!("transformer.h.{i}.{module}"), weight);
        }
    }
    pair("transformer.ln_f", &[d]);
    if !config.tie_word_embeddings {
        all.push(TensorSpec::new("lm_head.weight", [config.vocab_size, d]));
    }
    all
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
    fn tensors(&self) -> Box<dyn Iterator<Item = (&str, &Tensor)> + '_> {
        let blocks = self.blocks.iter().flat_map(|b| {
            let Block { ln_1, c_attn, attn_c_proj, ln_2, c_fc, mlp_c_proj } = b;
            let (attn, mlp) = ([c_attn, attn_c_proj], [c_fc, mlp_c_proj]);
            [&ln_1.weight, &ln_1.bias]
                .into_iter()
                .chain(attn.into_iter().flat_map(|p| [&p.weight, &p.bias]))
                .chain([&ln_2.weight, &ln_2.bias])
                .chain(mlp.into_iter().flat_map(|p| [&p.weight, &p.bias]))
        });
        let all = [&self.wte, &self.wpe].into_iter().chain(blocks).chain([&self.ln_f.weight, &self.ln_f.bias]);
        Box::new(all.chain(&self.lm_head).map(|w| (w.name.as_str(), &w.tensor)))
    }

    fn sites(&self) -> &[Site] {
        &self.sites
    }
}

impl Model for Gpt2 {
    fn config(&self) -> &RawConfig {
        &self.raw
    }

    fn limits(&self) -> Limits {
        Limits { vocab_size: self.config.vocab_size, max_positions: self.config.n_positions }
    }

    fn end_of_text(&self) -> Option<u32> {
        self.config.eos_token_id
    }

    fn kv_shape(&self) -> KvShape {
        KvShape { layers: self.config.n_layer, cols: self.config.n_embd, group: 1 }
    }

    fn set_base_dropout(&mut self, p: f64) {
        let c = &mut self.config;
        (c.resid_pdrop, c.embd_pdrop, c.attn_pdrop) = (p, p, p);
    }

    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn head(&self) -> (&str, &Tensor) {
        let w = self.lm_head.as_ref().unwrap_or(&self.wte);
        (&w.name, &w.tensor)
    }

    fn hidden(
        &self,
        t: &mut Tape,
        adapted: &Adapted,
        tokens: &Tensor,
        positions: &Tensor,
        context: &mut Context,
    ) -> Result<Var> {
        let (wte, wpe) = (self.wte.var(t, adapted)?, self.wpe.var(t, adapted)?);
        let (x, p) = (ops::gather(t, &wte, tokens)?, ops::gather(t, &wpe, positions)?);
        let h = ops::add(t, x, p)?;
        let mut h = ops::dropout(t, h, self.config.embd_pdrop)?;
        for (i, b) in self.blocks.iter().enumerate() {
            let x = b.ln_1.apply(t, adapted, &h)?;
            let qkv = b.c_attn.apply(t, adapted, &x)?;
            drop(x);
            let cfg = self.attention(t, i);
            let y = context.attend(t, i, cfg, &qkv)?;
            drop(qkv);
            let y = b.attn_c_proj.apply(t, adapted, &y)?;
            let y = ops::dropout(t, y, self.config.resid_pdrop)?;
            h = ops::add(t, h, y)?;
            let x = b.ln_2.apply(t, adapted, &h)?;
            let x = b.c_fc.apply(t, adapted, &x)?;
            let x = ops::activation(t, self.config.activation_function, &x)?;
            let y = b.mlp_c_proj.apply(t, adapted, &x)?;
            drop(x);
            let y = ops::dropout(t, y, self.config.resid_pdrop)?;
            h = ops::add(t, h, y)?;
        }
        Ok(self.ln_f.apply(t, adapted, &h)?)
    }
}
