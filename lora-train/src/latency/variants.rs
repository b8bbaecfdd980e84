//! What is measured: the base, and what each method makes of it.

use std::collections::HashMap;

use lora_core::{
    Tape, Tensor,
    lowrank::Layout,
    ops,
    peft::{Adapted, Options, Outline, find, parameters},
};
use lora_kernels::{DType, Device};
use lora_model::{Batch, Input, LoadOptions, Model, Targets, Task, Texts, assemble, config::RawConfig};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{LatencyConfig, Shape};
use crate::{Error, Result};

/// A model of random weights: matrices uniform with GPT-2's deviation of 0.02, biases 0, norms 1.
pub(super) fn random(raw: RawConfig, device: &Device, options: &LoadOptions, seed: u64) -> Result<Box<dyn Model>> {
    let mut stream = 0;
    let mut fetch = |name: &str, shape: &[usize]| {
        stream += 1;
        let len = shape.iter().product();
        let values: Vec<f32> = match shape.len() {
            1 if name.ends_with("bias") => vec![0.0; len],
            1 => vec![1.0; len],
            _ => numbers(seed, stream, len),
        };
        Ok(Tensor::from_slice(&Device::Cpu, shape, &values)?.to(device, options.kept(device, shape))?)
    };
    Ok(assemble(raw, device, options, &mut fetch)?)
}

/// Uniform numbers of deviation 0.02.
fn numbers(seed: u64, stream: u64, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    let bound = 0.02 * 3f32.sqrt();
    (0..len).map(|_| rng.random_range(-bound..bound)).collect()
}

/// What all shapes have in common.
pub(super) struct Variants<'a> {
    base: &'a dyn Model,
    config: &'a LatencyConfig,
    device: Device,
    dtype: DType,
    none: Adapted,
    lora: Adapted,
    lora_setting: String,
    /// The base with LoRA merged into it.
    merged: Box<dyn Model>,
    /// Or why the model has no place for it.
    prefix: std::result::Result<Adapted, String>,
}

/// One of them, for one shape.
pub(super) struct Ready<'a> {
    pub(super) name: &'static str,
    /// Scalars that stand beside the base, or were merged into it.
    pub(super) scalars: usize,
    /// Its options.
    pub(super) setting: String,
    model: &'a dyn Model,
    adapted: Held<'a>,
    batch: Batch,
}

enum Held<'a> {
    Shared(&'a Adapted),
    Own(Box<Adapted>),
}

impl<'a> Variants<'a> {
    /// # Errors
    /// LoRA that does not fit the model; no memory.
    pub(super) fn new(
        base: &'a dyn Model,
        config: &'a LatencyConfig,
        device: &Device,
        dtype: DType,
    ) -> Result<Variants<'a>> {
        let outline = base.outline();
        let mut targets = config.targets.clone();
        if targets.is_empty() {
            // Queries and values, as in the paper's tables: the default but where they are parts of a fused map.
            targets = match outline.architecture.as_str() {
                "gpt2" => ["c_attn.q", "c_attn.v"].map(String::from).into(),
                _ => outline.default_targets.clone(),
            };
        }
        let lora_setting = format!("r = {} on {}", config.rank, targets.join(", "));
        let options = Options { rank: config.rank, targets: targets.into(), ..Options::default() };
        let adapted = |method: &str, options: &Options| -> Result<Adapted> {
            Ok(Adapted::new(&*(find(method)?.build)(options)?, base, device, dtype, config.seed)?)
        };
        let mut lora = adapted("lora", &options)?;
        for (i, id) in lora.params.ids().enumerate() {
            // It begins at zero, where merging would change nothing.
            if lora.params.name(id).ends_with(".lora_B.weight") {
                let shape = lora.params.shape(id).to_vec();
                let values = numbers(config.seed + 1, i as u64, shape.iter().product());
                lora.params.set(id, &Tensor::from_slice(&Device::Cpu, &shape, &values)?)?;
            }
        }
        let merged = merged(base, &lora, device, dtype)?;
        let prefix = Options { prefix: config.prefix, ..Options::default() };
        Ok(Variants {
            base,
            config,
            device: device.clone(),
            dtype,
            none: Adapted::none(device)?,
            lora,
            lora_setting,
            merged,
            prefix: match adapted("pre-layer", &prefix) {
                _ if config.prefix == 0 => Err("pre-layer is left out: it was to have no virtual tokens".into()),
                Ok(adapted) => Ok(adapted),
                Err(Error::Model(lora_model::Error::Core(e @ lora_core::Error::DoesNotFit { .. }))) => {
                    Err(e.to_string())
                }
                Err(e) => return Err(e),
            },
        })
    }

    /// All variants for a shape, the base first; and those that the model has no place for, with the reason.
    pub(super) fn of(&self, shape: &Shape) -> Result<(Vec<Ready<'_>>, Vec<String>)> {
        let mut left_out = Vec::new();
        let lora = &self.lora_setting;
        let mut all = vec![
            self.ready("base", String::new(), self.base, Held::Shared(&self.none), shape)?,
            self.ready("lora, merged", lora.clone(), &*self.merged, Held::Shared(&self.none), shape)?,
            self.ready("lora", lora.clone(), self.base, Held::Shared(&self.lora), shape)?,
        ];
        // What was merged is no longer beside the base.
        all[1].scalars = all[2].scalars;
        for method in ["adapter-l", "adapter-h"] {
            let width = match self.config.bottleneck {
                Some(width) => width,
                None => self.width(method, shape)?,
            };
            let options = Options { bottleneck: width, ..Options::default() };
            let built = (find(method)?.build)(&options)?;
            match Adapted::new(&*built, self.base, &self.device, self.dtype, self.config.seed) {
                Ok(adapted) => {
                    let setting = format!("r = {width}");
                    all.push(self.ready(method, setting, self.base, Held::Own(Box::new(adapted)), shape)?);
                }
                Err(e @ lora_core::Error::DoesNotFit { .. }) => left_out.push(e.to_string()),
                Err(e) => return Err(e.into()),
            }
        }
        let positions = self.base.limits().max_positions;
        match &self.prefix {
            Ok(_) if shape.seq.saturating_add(self.config.prefix) > positions => left_out.push(format!(
                "pre-layer is left out: {} tokens with a prefix of {} are more than the model's {positions} positions",
                shape.seq, self.config.prefix
            )),
            Ok(adapted) => {
                let setting = format!("l = {}", self.config.prefix);
                all.push(self.ready("pre-layer", setting, self.base, Held::Shared(adapted), shape)?);
            }
            Err(why) => left_out.push(why.clone()),
        }
        let only = &self.config.only;
        all.retain(|v| only.is_empty() || v.name == "base" || only.iter().any(|name| name == v.name));
        Ok((all, left_out))
    }

    fn ready<'b>(
        &'b self,
        name: &'static str,
        setting: String,
        model: &'b dyn Model,
        adapted: Held<'b>,
        shape: &Shape,
    ) -> Result<Ready<'b>> {
        let held = adapted.get();
        let batch = batch(model, held, shape, self.config.seed)?;
        let outline = model.outline();
        let own = held.params.ids().filter(|id| !outline.is_saved_module(held.params.name(*id)));
        let scalars = own.map(|id| held.params.range(id).len()).sum();
        Ok(Ready { name, scalars, setting, model, adapted, batch })
    }

    /// The width whose number of scalars lies nearest to Θ.
    fn width(&self, method: &str, shape: &Shape) -> Result<usize> {
        let outline = self.base.outline();
        let theta = shape.theta.unwrap_or_else(|| PAPERS_SHARE * outline.parameters() as f64);
        let of = |bottleneck| own_scalars(method, &Options { bottleneck, ..Options::default() }, outline);
        let (Ok(one), Ok(two)) = (of(1), of(2)) else { return Ok(1) };
        // Linear in the width.
        let each = (two - one) as f64;
        Ok((1.0 + (theta - one as f64) / each).round().max(1.0) as usize)
    }
}

/// The paper's adapters of 11M parameters on GPT-2 medium.
const PAPERS_SHARE: f64 = 11e6 / 354_823_168.0;

/// Scalars that a method trains, a classifier's head aside.
fn own_scalars(method: &str, options: &Options, outline: &Outline) -> Result<usize> {
    let all = parameters(&*(find(method)?.build)(options)?, outline)?;
    let own = all.iter().filter(|(name, _)| !outline.is_saved_module(name));
    Ok(own.map(|(_, shape)| shape.iter().product::<usize>()).sum())
}

/// A model of its own with what was trained in its weights; all others are shared with the base.
pub(super) fn merged(base: &dyn Model, adapted: &Adapted, device: &Device, dtype: DType) -> Result<Box<dyn Model>> {
    let changed = adapted.merged(base)?;
    let own: HashMap<&str, &Tensor> = base.tensors().collect();
    let options = LoadOptions { dtype, task: Some(base.task()), ..LoadOptions::default() };
    let mut fetch = |name: &str, shape: &[usize]| {
        let missing = || lora_core::Error::Missing { name: name.into() };
        match changed.get(name) {
            Some(t) => Ok(t.to(device, options.kept(device, shape))?),
            None => Ok(own.get(name).copied().ok_or_else(missing)?.clone()),
        }
    };
    Ok(assemble(base.config().clone(), device, &options, &mut fetch)?)
}

/// Random tokens, of which the last one of each sequence gives logits.
fn batch(model: &dyn Model, adapted: &Adapted, shape: &Shape, seed: u64) -> Result<Batch> {
    let Shape { batch, seq, .. } = *shape;
    let vocab = model.limits().vocab_size as u32;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let tokens: Vec<u32> = (0..batch * seq).map(|_| rng.random_range(0..vocab)).collect();
    let lengths = vec![seq; batch];
    let last: Vec<u32> = (1..=batch).map(|i| (i * seq - 1) as u32).collect();
    let (ids, values) = (vec![0; batch], vec![0.0; batch]);
    let targets = match model.task() {
        Task::CausalLm | Task::MaskedLm => Targets::Tokens { rows: &last, ids: &ids },
        Task::Classification { .. } => Targets::Labels(&ids),
        Task::Regression => Targets::Values(&values),
    };
    Ok(model.batch(adapted, &Texts::new(&tokens, &lengths).targets(targets))?)
}

impl Held<'_> {
    fn get(&self) -> &Adapted {
        match self {
            Held::Shared(adapted) => adapted,
            Held::Own(adapted) => adapted,
        }
    }
}

impl Ready<'_> {
    /// One pass: logits [sequences, outputs], which are there when this returns.
    pub(super) fn forward(&self) -> Result<Tensor> {
        self.model.device().run(|| self.pass())
    }

    fn pass(&self) -> Result<Tensor> {
        let (model, adapted) = (self.model, self.adapted.get());
        let mut t = Tape::inference(&adapted.params);
        let h = model.hidden(&mut t, adapted, &mut Input::whole(&self.batch))?;
        let x = ops::gather(&mut t, &h, &self.batch.target_rows)?;
        drop(h);
        let x = model.features(&mut t, adapted, x)?;
        let head = model.head();
        let w = adapted.weight(&t, &head.weight.name, &head.weight.tensor)?;
        let b = head.bias.map(|b| adapted.weight(&t, &b.name, &b.tensor)).transpose()?;
        let logits = ops::linear_wide(&mut t, &x, &w, Layout::OutIn, b.as_ref())?.into_value();
        if !logits.device().is_cpu() {
            // A device has only been asked; reading a row waits for it.
            logits.rows_in(0..1).to_f64()?;
        }
        Ok(logits)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn tiny(raw: serde_json::Value) -> Box<dyn Model> {
        let raw = RawConfig::new("model".as_ref(), raw.as_object().unwrap().clone());
        let task = (raw.architecture().unwrap().task)(&raw).unwrap().unwrap_or(Task::Classification { labels: 2 });
        random(raw, &Device::Cpu, &LoadOptions { task: Some(task), ..LoadOptions::default() }, 1).unwrap()
    }

    fn gpt2() -> Box<dyn Model> {
        tiny(
            json!({"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 90, "n_positions": 40}),
        )
    }

    const SHAPE: Shape = Shape { batch: 3, seq: 8, theta: Some(4000.0) };

    #[test]
    fn merging_is_real_and_every_variant_computes_something_of_its_own() {
        let (model, config) = (gpt2(), LatencyConfig::default());
        let variants = Variants::new(&*model, &config, &Device::Cpu, DType::F32).unwrap();
        let (all, left_out) = variants.of(&SHAPE).unwrap();
        assert_eq!(left_out, Vec::<String>::new());
        let names: Vec<_> = all.iter().map(|v| v.name).collect();
        assert_eq!(names, ["base", "lora, merged", "lora", "adapter-l", "adapter-h", "pre-layer"]);
        let logits: Vec<Vec<f64>> = all.iter().map(|v| v.forward().unwrap().to_f64().unwrap()).collect();
        assert!(logits.iter().all(|l| l.len() == 3 * 90));
        let far = |a: usize, b: usize| logits[a].iter().zip(&logits[b]).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
        assert!(far(1, 2) < 1e-5, "merged and beside the base: {}", far(1, 2));
        assert!((1..6).all(|v| far(0, v) > 1e-4), "{:?}", (1..6).map(|v| far(0, v)).collect::<Vec<_>>());
        // Only what was merged is new memory.
        let shared = |name: &str| model.tensor(name).unwrap().same_memory(variants.merged.tensor(name).unwrap());
        assert!(shared("transformer.wte.weight") && !shared("transformer.h.1.attn.c_attn.weight"));
    }

    #[test]
    fn variants_can_be_chosen() {
        let (model, config) = (gpt2(), LatencyConfig { only: vec!["lora".into()], ..LatencyConfig::default() });
        let variants = Variants::new(&*model, &config, &Device::Cpu, DType::F32).unwrap();
        let names: Vec<_> = variants.of(&SHAPE).unwrap().0.iter().map(|v| v.name).collect();
        assert_eq!(names, ["base", "lora"]);
    }

    #[test]
    fn logits_are_those_of_the_last_tokens() {
        let (model, config) = (gpt2(), LatencyConfig::default());
        let variants = Variants::new(&*model, &config, &Device::Cpu, DType::F32).unwrap();
        let (all, _) = variants.of(&SHAPE).unwrap();
        let whole = model.logits(&variants.none, &all[0].batch).unwrap();
        let got = all[0].forward().unwrap();
        for i in 0..3 {
            let row = 8 * (i + 1) - 1;
            let (x, y) = (got.rows_in(i..i + 1).to_f64().unwrap(), whole.rows_in(row..row + 1).to_f64().unwrap());
            assert!(x.iter().zip(&y).all(|(x, y)| (x - y).abs() < 1e-6));
        }
    }

    #[test]
    fn widths_follow_theta_as_the_paper_has_it() {
        // GPT-2 medium's shape without its vocabulary, which no adapter sees.
        let outline = lora_model::config::Gpt2Config::medium().outline();
        let of =
            |method, bottleneck| own_scalars(method, &Options { bottleneck, ..Options::default() }, &outline).unwrap();
        assert_eq!(of("adapter-l", 224), 11_089_152);
        let (model, config) = (gpt2(), LatencyConfig::default());
        let variants = Variants::new(&*model, &config, &Device::Cpu, DType::F32).unwrap();
        for method in ["adapter-l", "adapter-h"] {
            let width = variants.width(method, &SHAPE).unwrap();
            let off = |r| {
                let options = Options { bottleneck: r, ..Options::default() };
                (own_scalars(method, &options, model.outline()).unwrap() as f64 - 4000.0).abs()
            };
            assert!(off(width) <= off(width + 1) && off(width) <= off(width - 1), "{method}: {width}");
            assert_eq!(variants.width(method, &Shape { theta: Some(1.0), ..SHAPE }).unwrap(), 1);
        }
    }

    #[test]
    fn encoders_are_measured_with_what_fits_them() {
        let size = json!({
            "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
            "max_position_embeddings": 40, "model_type": "bert",
        });
        let mut deberta = size.clone();
        for (key, value) in [
            ("model_type", json!("deberta-v2")),
            ("relative_attention", json!(true)),
            ("pos_att_type", json!("p2c|c2p")),
            ("share_att_key", json!(true)),
        ] {
            deberta[key] = value;
        }
        for (raw, count, missing) in [(size, 6, 0), (deberta, 5, 1)] {
            let (model, config) = (tiny(raw), LatencyConfig::default());
            let variants = Variants::new(&*model, &config, &Device::Cpu, DType::F32).unwrap();
            let (all, left_out) = variants.of(&SHAPE).unwrap();
            assert_eq!((all.len(), left_out.len()), (count, missing), "{left_out:?}");
            assert!(all.iter().all(|v| v.forward().unwrap().shape() == [3, 2]));
        }
    }
}
