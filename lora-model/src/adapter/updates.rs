//! LoRA adapters as what they add to a base: ΔW of every module, whatever base they meet.

use std::{collections::BTreeMap, path::Path};

use half::{bf16, f16};
use lora_core::{
    Tensor,
    lowrank::{self, Layout, LowRank, Scaling},
    peft::{Base, Bias, Lora, LoraConfig, Modules, Outline, names, saves, untied_head},
};
use lora_kernels::{DType, Device};
use ndarray::{Array2, ArrayView2};

use super::{
    ARCHITECTURE_KEY, AdapterFile, CONFIG_FILE, FINGERPRINT_KEY, HEAD, PREFIX, WEIGHTS_FILE,
    config::{PeftConfig, init_value, unconverted},
    own::strings,
    peft::{EMBEDDING, LINEAR, stored_name},
};
use crate::{
    Error, Result,
    checkpoint::{TensorSpec, write_tensors},
    error::List,
    files,
};

/// An adapter's update of one module.
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    /// ΔW = s·B·A, [out, in].
    pub delta: LowRank<f32>,
    /// Whether the module is an embedding, with a weight [tokens, width] that ΔW [width, tokens] is added to transposed.
    pub embedding: bool,
}

/// A LoRA adapter: its updates by module, and what else its files say. It can be merged with others, analysed, saved, and
/// added to a base.
#[derive(Clone, Debug, Default)]
pub struct Updates {
    /// By the base's name of the module: `transformer.h.0.attn.c_attn`.
    pub modules: BTreeMap<String, Update>,
    /// Tensors of modules that were trained whole, and biases that were, under the base's names.
    pub whole: BTreeMap<String, Tensor>,
    /// Which biases those are.
    pub bias: Bias,
    /// PEFT's `target_modules`: names of modules, or ends of them, that mean exactly [`modules`](Updates::modules).
    pub targets: Vec<String>,
    /// PEFT's `modules_to_save`.
    pub modules_to_save: Vec<String>,
    /// The base that it was trained on, as its configuration names it.
    pub base_model_name_or_path: Option<String>,
    /// The architecture that it was trained on, where its files say so.
    pub architecture: Option<String>,
    /// The [fingerprint](crate::fingerprint::of_base) of the base that it was trained on, where its files say so.
    pub base_fingerprint: Option<String>,
    /// PEFT's `task_type`.
    pub task_type: Option<String>,
    /// PEFT's flag for weights stored [in, out].
    pub fan_in_fan_out: bool,
    /// Tensors of its base that its file repeats, by their names there.
    pub repeated: BTreeMap<String, Tensor>,
}

impl AdapterFile {
    /// The adapter as updates of modules.
    ///
    /// # Errors
    /// [`Error::Config`] for an adapter that is no LoRA alone, or a kind of LoRA that is no sum with the base's weights;
    /// [`Error::Weights`] for a tensor that belongs to neither.
    pub fn updates(&self) -> Result<Updates> {
        let raw = &self.raw;
        if self.method != "lora" || raw.value("peft_type").is_none() {
            let problem = format!(
                "it is an adapter of method {}, and only those of LoRA are taken as updates ΔW = s·B·A of single weights",
                self.method
            );
            return Err(raw.error(super::kind_key(raw), problem));
        }
        if raw.bool("use_dora")? == Some(true) {
            let problem = "DoRA scales the base's own weights, so it is no update that could be added to them";
            return Err(raw.error("use_dora", problem));
        }
        let lora = Lora::new(PeftConfig::of_raw(raw)?.lora)?;
        let init = lora.config().init_lora_weights;
        if init.takes_from_base() {
            return Err(raw.error("init_lora_weights", unconverted(&init_value(init))));
        }
        let scaling = if raw.bool("use_rslora")? == Some(true) { Scaling::RsLora } else { Scaling::Lora };
        let modules_to_save = strings(raw, "modules_to_save")?.unwrap_or_default();
        let mut updates = Updates {
            base_model_name_or_path: self.base_model_name_or_path.clone(),
            architecture: self.architecture.clone(),
            base_fingerprint: self.base_fingerprint.clone(),
            task_type: self.task_type.clone(),
            fan_in_fan_out: raw.bool("fan_in_fan_out")?.unwrap_or(false),
            modules_to_save,
            bias: lora.config().bias,
            repeated: self.repeated.clone(),
            ..Updates::default()
        };
        for (name, tensor) in &self.tensors {
            let [a, b] = [0, 1].map(|i| part(name, i));
            if b.is_some() {
                continue;
            }
            let Some((module, embedding)) = a else {
                let is_bias = updates.bias != Bias::None && name.ends_with(".bias");
                if !is_bias && !updates.modules_to_save.iter().any(|m| saves(m, name)) {
                    let problem = format!("tensor {PREFIX}{name} is no part of an update of a weight");
                    return Err(Error::Weights { file: self.weights.clone(), problem });
                }
                updates.whole.insert(name.clone(), tensor.clone());
                continue;
            };
            let second = format!("{module}.{}", if embedding { EMBEDDING[1] } else { LINEAR[1] });
            let missing = || lora_core::Error::Missing { name: format!("{PREFIX}{second}") };
            let (a, b) = (tensor.to_array()?, self.tensors.get(&second).ok_or_else(missing)?.to_array()?);
            let refused = |e: lowrank::Error| Error::Weights {
                file: self.weights.clone(),
                problem: format!("module {module}: {e}"),
            };
            let (rank, alpha) = lora.rank_and_alpha(module)?;
            let scale = scaling.scale(alpha, rank).map_err(refused)?;
            let delta = LowRank::new(a, b, scale).map_err(refused)?;
            updates.modules.insert(module.to_owned(), Update { delta, embedding });
        }
        // Short names mean the same modules on any base, unless other keys narrow them.
        let narrowed =
            ["layers_to_transform", "layers_pattern", "exclude_modules"].iter().any(|k| raw.value(k).is_some());
        let short = if narrowed { None } else { strings(raw, "target_modules").ok().flatten() };
        updates.targets = short.unwrap_or_default();
        if !updates.modules.keys().all(|m| updates.targets.iter().any(|t| names(t, m))) {
            updates.targets = updates.modules.keys().cloned().collect();
        }
        Ok(updates)
    }
}

/// The module of factor A (0) or B (1), and whether it is an embedding.
fn part(name: &str, factor: usize) -> Option<(&str, bool)> {
    let of = |factors: [&str; 2]| name.strip_suffix(factors[factor])?.strip_suffix('.');
    of(LINEAR).map(|module| (module, false)).or_else(|| of(EMBEDDING).map(|module| (module, true)))
}

impl Updates {
    /// Reads the adapter in a folder.
    ///
    /// # Errors
    /// Those of [`load`](super::load) and [`AdapterFile::updates`].
    pub fn load(dir: &Path) -> Result<Updates> {
        super::load(dir)?.updates()
    }

    /// The highest rank of a module.
    pub fn rank(&self) -> usize {
        self.modules.values().map(|u| u.delta.rank()).max().unwrap_or(0)
    }

    /// Writes PEFT's two files. All modules get the highest rank, those of lower ones with directions of zero, and α equal
    /// to it: the scale is 1, and a scale that was another goes into A.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, dir: &Path) -> Result<()> {
        let rank = self.rank();
        let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
        for (module, Update { delta, embedding }) in &self.modules {
            let at = |m: ArrayView2<'_, f32>, (i, j): (usize, usize)| m.get((i, j)).copied().unwrap_or(0.0);
            let (out, cols) = delta.dim();
            let scale = delta.scale();
            let a = Array2::from_shape_fn((rank, cols), |i| (scale * f64::from(at(delta.a(), i))) as f32);
            let b = Array2::from_shape_fn((out, rank), |i| at(delta.b(), i));
            let [a_name, b_name] = if *embedding { EMBEDDING } else { LINEAR };
            tensors.insert(format!("{PREFIX}{module}.{a_name}"), tensor(&a)?);
            tensors.insert(format!("{PREFIX}{module}.{b_name}"), tensor(&b)?);
        }
        let stored = |name: &String| stored_name(name, |module| self.modules.contains_key(module));
        tensors.extend(self.whole.iter().map(|(name, t)| (stored(name), t.clone())));
        let specs: Vec<TensorSpec> = tensors.iter().map(|(n, t)| TensorSpec::new(n.as_str(), t.shape())).collect();
        let metadata = [
            ("format", Some("pt")),
            (ARCHITECTURE_KEY, self.architecture.as_deref()),
            (FINGERPRINT_KEY, self.base_fingerprint.as_deref()),
        ];
        let metadata: Vec<(&str, &str)> = metadata.into_iter().filter_map(|(k, v)| Some((k, v?))).collect();
        files::create_folder(dir)?;
        write_tensors(&dir.join(WEIGHTS_FILE), &metadata, &specs, |name| Ok(tensors[name].to_dtype(DType::F32)?))?;
        files::write_bytes(&dir.join(CONFIG_FILE), self.config(rank)?.as_bytes())
    }

    /// The text of `adapter_config.json`.
    fn config(&self, rank: usize) -> Result<String> {
        let targets = Modules::Names(self.targets.clone());
        let config = LoraConfig { rank, alpha: rank as f64, targets, bias: self.bias, ..LoraConfig::default() };
        let sites = self.modules.keys().map(|module| (module.as_str(), 1)).collect();
        const TASKS: [&str; 2] = ["CAUSAL_LM", "SEQ_CLS"];
        let outline = Outline {
            task_type: TASKS.into_iter().find(|t| Some(*t) == self.task_type.as_deref()),
            modules_to_save: self.modules_to_save.clone(),
            ..Outline::default()
        };
        Ok(PeftConfig::of(&config, &sites, self.base_model_name_or_path.clone(), &outline)?.text(self.fan_in_fan_out))
    }

    /// The base's tensors that the adapter changes, as they are with it; where it adapts embeddings that are the output
    /// head's matrix too, with the matrix of a head of its own ([`untied_head`]).
    ///
    /// # Errors
    /// [`Error::Adapters`] for modules that the base does not have or that have another shape there, and for a base with other
    /// values of what is [`repeated`](Updates::repeated); [`lora_core::Error::Merge`] for a weight that is not finite.
    pub fn merged(&self, base: &dyn Base) -> Result<BTreeMap<String, Tensor>> {
        self.check_base(base.outline())?;
        self.check_repeated(base)?;
        let tensors: BTreeMap<&str, &Tensor> = base.tensors().collect();
        let layouts: BTreeMap<&str, Layout> = base
            .outline()
            .linear_sites()
            .chain(base.outline().head_site())
            .map(|(site, linear)| (site.name.as_str(), linear.layout))
            .collect();
        let mut changed = self.whole.clone();
        for name in self.whole.keys() {
            // PEFT trains a copy of it, and leaves the head as it is.
            changed.extend(untied_head(base, name)?);
        }
        for (module, update) in &self.modules {
            let name = format!("{module}.weight");
            // An embedding's weight is stored [tokens, width]: as inputs and outputs.
            let layout = if update.embedding { Layout::InOut } else { layouts[module.as_str()] };
            let merged = |w: &Tensor| -> Result<Tensor> {
                let w = w.to_array()?;
                let merged = lowrank::merge(w.view(), &update.delta, layout);
                tensor(merged.map_err(|reason| lora_core::Error::Merge { name: name.clone(), reason })?.into_weight())
            };
            if update.embedding {
                changed.extend(untied_head(base, &name)?);
            }
            changed.insert(name.clone(), merged(tensors[name.as_str()])?);
        }
        Ok(changed)
    }

    /// Refuses a base that is not the one that it was trained on, by its fingerprint, as far as its files tell.
    ///
    /// # Errors
    /// [`Error::Adapters`].
    pub fn check_same_base(&self, base: &dyn Base) -> Result<()> {
        super::same_base(self.base_fingerprint.as_deref(), base)
    }

    /// Refuses a base with other values of the tensors that the file repeats.
    ///
    /// # Errors
    /// [`Error::Adapters`].
    pub fn check_repeated(&self, base: &dyn Base) -> Result<()> {
        for (name, t) in &self.repeated {
            let same = repeated_of(base, name).map_or(Ok(false), |own| repeats(own, t))?;
            if !same {
                return Err(Error::Adapters { problem: other_values(base, name) });
            }
        }
        Ok(())
    }

    /// Refuses a base without the modules that the adapter changes, of another architecture or for another task.
    ///
    /// # Errors
    /// [`Error::Adapters`] with the first that does not fit.
    pub fn check_base(&self, outline: &Outline) -> Result<()> {
        let refused = |problem: String| Err(Error::Adapters { problem });
        if let Some(trained) = self.architecture.as_ref().filter(|a| **a != outline.architecture) {
            return refused(format!("it was trained on architecture {trained}, not on {}", outline.architecture));
        }
        if let (Some(trained), Some(task)) = (self.task_type.as_deref(), outline.task_type)
            && trained != task
        {
            return refused(format!("it was trained for {trained}, and this base is for {task}"));
        }
        let shapes: BTreeMap<&str, &[usize]> =
            outline.tensors.iter().map(|t| (t.name.as_str(), t.shape.as_slice())).collect();
        let linear: BTreeMap<&str, Layout> = outline
            .linear_sites()
            .chain(outline.head_site())
            .map(|(site, linear)| (site.name.as_str(), linear.layout))
            .collect();
        let mut missing = Vec::new();
        for (module, update) in &self.modules {
            let name = format!("{module}.weight");
            let layout = if update.embedding { Some(Layout::InOut) } else { linear.get(module.as_str()).copied() };
            let (Some(layout), Some(shape)) = (layout, shapes.get(name.as_str())) else {
                missing.push(module.clone());
                continue;
            };
            let (out, cols) = update.delta.dim();
            let wanted = match layout {
                Layout::OutIn => [out, cols],
                Layout::InOut => [cols, out],
            };
            if **shape != wanted {
                return refused(format!(
                    "its update of {module} is for a weight of shape {wanted:?}, and the base's is {shape:?}; they belong \
                     to different models"
                ));
            }
        }
        missing.extend(
            self.whole.iter().filter(|(n, t)| shapes.get(n.as_str()) != Some(&t.shape())).map(|(n, _)| n.clone()),
        );
        match missing.is_empty() {
            true => Ok(()),
            false => refused(format!("the base has no such modules: {}", List(&missing))),
        }
    }
}

/// The tensor of the base that an adapter repeats under this name: of an output head without a matrix of its own, the
/// embeddings'.
pub(super) fn repeated_of<'a>(base: &'a dyn Base, name: &str) -> Option<&'a Tensor> {
    let tied = || base.outline().tied_embedding().filter(|_| name.strip_suffix(".weight") == Some(HEAD));
    base.tensor(name).or_else(|| base.tensor(tied()?))
}

/// Whether an adapter's copy of a tensor has the values that the base has. Either may keep them in fewer digits: the base was
/// loaded in 16 bits here, or where the adapter was trained.
pub(super) fn repeats(own: &Tensor, copy: &Tensor) -> Result<bool> {
    if own.shape() != copy.shape() {
        return Ok(false);
    }
    let (values, copied) = (own.to_f64()?, copy.to_f64()?);
    let are = |round: fn(f64) -> f64| values.iter().zip(&copied).all(|(own, copy)| round(*own) == *copy);
    let rounded = are(|v| bf16::from_f64(v).to_f64()) || are(|v| f16::from_f64(v).to_f64());
    Ok(rounded || values == copy.to_dtype(own.dtype())?.to_f64()?)
}

/// What is wrong with a base where it has not.
pub(super) fn other_values(base: &dyn Base, name: &str) -> String {
    match repeated_of(base, name) {
        None => format!("it repeats tensor {name} of its base, which this base does not have"),
        Some(own) => format!(
            "it repeats tensor {name} of its base with other values than this base has, of shape {:?}; give the base that it \
             was trained on",
            own.shape()
        ),
    }
}

/// The name of a module within its layer: what follows the last number in its path.
pub(crate) fn short_name(module: &str) -> &str {
    let mut rest = module;
    let mut name = module;
    while let Some((head, tail)) = rest.split_once('.') {
        if head.parse::<usize>().is_ok() {
            name = tail;
        }
        rest = tail;
    }
    name
}

fn tensor(m: impl std::borrow::Borrow<Array2<f32>>) -> Result<Tensor> {
    let m = m.borrow();
    let data: Vec<f32> = m.iter().copied().collect();
    Ok(Tensor::from_slice(&Device::Cpu, m.shape(), &data)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_may_have_fewer_digits_on_either_side() {
        let of = |values: &[f32]| Tensor::from_slice(&Device::Cpu, &[values.len()], values).unwrap();
        let exact = [0.1f32, -3.7, 1e-3];
        let half = exact.map(|v| f16::from_f32(v).to_f32());
        let brain = exact.map(|v| bf16::from_f32(v).to_f32());
        for copy in [exact, half, brain] {
            assert!(repeats(&of(&exact), &of(&copy)).unwrap(), "{copy:?}");
        }
        let stored = of(&exact).to_dtype(DType::Bf16).unwrap();
        assert!(repeats(&stored, &of(&exact)).unwrap());
        for copy in [&[0.1f32, -3.7, 2e-3][..], &[0.1, -3.7], &[brain[0], half[1], exact[2]]] {
            assert!(!repeats(&of(&exact), &of(copy)).unwrap(), "{copy:?}");
        }
    }
}
