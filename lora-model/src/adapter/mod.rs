//! Adapters on disk, as PEFT reads and writes them: `adapter_config.json` and `adapter_model.safetensors` in a folder.
//!
//! PEFT skips what it does not understand. Here every tensor is used, or refused by name; so is every option that would
//! compute something that is not done here. `adapter_model.bin`, PEFT's older format, is read in place of a missing
//! `adapter_model.safetensors`, without running anything ([`read_state_dict`](crate::convert::read_state_dict)).
//!
//! # Other methods
//! PEFT has no name for some methods of the table ([`METHODS`](lora_core::peft::METHODS)). They are saved in the same two
//! files, where the configuration has `method` and the options of that method instead of `peft_type`: PEFT refuses such a
//! folder rather than ignoring it.
//!
//! # Parts of a fused projection
//! Targets such as `c_attn.q` and `c_attn.v` train separate updates of columns of one matrix. PEFT knows modules only, so
//! they are saved as the one update of the module that equals them: n parts of rank r become a rank of n·r, with B zero
//! outside of the parts' blocks and α multiplied by n (√n with rsLoRA), so that the scale stays. Where modules have
//! different numbers of parts, `rank_pattern` and `alpha_pattern` say so. The header of the safetensors file remembers the
//! parts under [`PARTS_KEY`], and loading restores them exactly: an adapter trains on as what it was.

mod combine;
mod config;
mod extract;
mod file;
mod options;
mod own;
mod peft;
mod rounding;
mod save;
mod several;
mod types;
mod updates;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use lora_core::{
    Tensor,
    lowrank::{self, Layout, LowRank, Scaling},
    peft::{Adapted, Base, InitLoraWeights, Lora, LoraConfig, Method, MethodRow, Options, Outline, find, trainable},
};
use lora_kernels::{Device, all_finite};
use ndarray::s;

use crate::{Error, Result, checkpoint::TensorInfo, config::RawConfig, fingerprint};

pub use combine::{COMBINATIONS, Combined, Recipe, Weighted, check_one_base, combine};
pub use extract::{Extracted, Extraction, extract};
use file::AdapterTensors;
pub use rounding::{Rounding, rounding};
pub use save::{metadata, save, stored_name};
pub use several::Adapters;
use types::Kind;
pub(crate) use updates::short_name;
pub use updates::{Update, Updates};

/// The adapter's configuration in its folder.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The adapter's tensors in its folder.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// The same as PEFT saved them before safetensors, and still does where it is asked to.
pub(crate) const PICKLED_FILE: &str = "adapter_model.bin";
/// The key of the safetensors header under which the parts of fused projections are remembered: targets, rank and alpha
/// as they were trained, as JSON.
pub const PARTS_KEY: &str = "lora_parts";
/// The key of the safetensors header under which the base's architecture is remembered, where PEFT's configuration has no
/// place for it.
pub const ARCHITECTURE_KEY: &str = "architecture";

/// The key of the safetensors header under which the base that was trained on is remembered by its
/// [fingerprint](crate::fingerprint::of_base).
pub const FINGERPRINT_KEY: &str = "base_fingerprint";

/// What there is to say of an adapter without a [`FINGERPRINT_KEY`], as PEFT's are, where a check was asked for.
pub const UNCHECKED: &str =
    "it holds no fingerprint of the base that it was trained on, so nothing tells whether this is that base";

/// The output head that may have no matrix of its own.
const HEAD: &str = "lm_head";

/// What PEFT puts before the name of every module.
pub const PREFIX: &str = "base_model.model.";

/// Name, type and shape of all tensors of the adapter in a folder, as they are stored.
///
/// # Errors
/// Those of [`load`] about the file of the tensors.
pub fn stored_tensors(dir: &Path) -> Result<Vec<TensorInfo>> {
    let file = AdapterTensors::open(dir)?;
    Ok(file.names().filter_map(|name| file.info(name)).collect())
}

/// An adapter as it was read, before it meets a base.
#[derive(Debug)]
pub struct AdapterFile {
    /// The method that trained it, a row of [`METHODS`](lora_core::peft::METHODS).
    pub method: &'static str,
    /// How it was trained; parts of fused projections as they were.
    pub options: Options,
    /// The base that it was trained on, as its configuration names it.
    pub base_model_name_or_path: Option<String>,
    /// All tensors under the names of [`Adapted::adapter_tensors`], in f32.
    pub tensors: BTreeMap<String, Tensor>,
    /// The architecture that it was trained on, where the file says so.
    pub architecture: Option<String>,
    /// What its base is for, where the file says so, by PEFT's name.
    pub task_type: Option<String>,
    /// The [fingerprint](crate::fingerprint::of_base) of the base that it was trained on, where the file says so.
    pub base_fingerprint: Option<String>,
    /// Tensors of the base that the file repeats, by their names there.
    repeated: BTreeMap<String, Tensor>,
    raw: RawConfig,
    weights: PathBuf,
}

/// Whether a folder holds an adapter: its configuration is there. The file may still be damaged.
pub fn is_adapter(dir: &Path) -> bool {
    dir.join(CONFIG_FILE).is_file()
}

/// Reads the adapter in a folder and checks that its two files agree.
///
/// # Errors
/// [`Error::Config`] names the key of an option that is senseless or not supported; [`Error::Io`] the file that is
/// missing; [`Error::Weights`] and [`Error::DType`] the tensor that does not belong to the method, has another rank than the
/// configuration says, means the same as another, or holds a NaN or an infinity; [`Error::TensorNames`] those that lack
/// their partner.
pub fn load(dir: &Path) -> Result<AdapterFile> {
    let raw = RawConfig::from_file(&dir.join(CONFIG_FILE))?;
    let own = raw.value(own::METHOD_KEY).is_some();
    let kind = if own { None } else { options::kind(&raw)? };
    if !own && kind.is_none() {
        options::check(&raw)?;
    }
    let file = AdapterTensors::open(dir)?;
    let mut adapter = match kind {
        _ if own => own::load(raw, &file),
        Some(kind) => kind.load(raw, &file),
        None => peft::load(raw, &file),
    }?;
    adapter.base_fingerprint = file.metadata().get(FINGERPRINT_KEY).cloned();
    Ok(adapter)
}

/// A tensor of an adapter, which has to be all numbers.
fn finite(file: &AdapterTensors, info: &TensorInfo) -> Result<Tensor> {
    let t = file.tensor(info)?;
    if all_finite(t.mat())? {
        return Ok(t);
    }
    let problem = format!("tensor {} holds a NaN or an infinity; its training failed", info.stored_name);
    Err(Error::Weights { file: file.path().to_owned(), problem })
}

/// Refuses a tensor whose rank, the length of a dimension, is not what the configuration says: before anything is made as
/// large as that says.
fn check_rank(file: &AdapterTensors, raw: &RawConfig, info: &TensorInfo, dimension: usize, r: usize) -> Result<()> {
    let found = info.shape.get(dimension).copied().unwrap_or_default();
    if found == r {
        return Ok(());
    }
    let problem = format!(
        "tensor {} has shape {:?}, so its rank is {found}, but {} says that it is {r}; the two files belong to different \
         adapters",
        info.stored_name,
        info.shape,
        raw.path().display()
    );
    Err(Error::Weights { file: file.path().to_owned(), problem })
}

/// An error about two tensors of a file that mean the same parameter.
fn twice(file: &AdapterTensors, first: &str, second: &str) -> Error {
    let problem = format!("tensors {first} and {second} are the same parameter; a file holds one adapter");
    Error::Weights { file: file.path().to_owned(), problem }
}

/// An error about an option, by its key in the configuration.
fn refused(raw: &RawConfig, e: lora_core::Error) -> Error {
    let is_own = raw.value(own::METHOD_KEY).is_some();
    match &e {
        lora_core::Error::Option { option, value, why } => {
            // PEFT's names for what has another here.
            let theirs: &[&str] = match *option {
                _ if is_own => &[],
                "rank" => &["r"],
                "alpha" => &["lora_alpha", "alpha"],
                "dropout" => &["lora_dropout", "vera_dropout"],
                "rslora" => &["use_rslora"],
                "targets" => &["target_modules"],
                "prefix" => &["num_virtual_tokens"],
                "delta-t" => &["deltaT"],
                "adalora-beta1" => &["beta1"],
                "adalora-beta2" => &["beta2"],
                _ => &[],
            };
            let own = option.replace('-', "_");
            let there = theirs.iter().find(|key| raw.value(key).is_some());
            let key = there.or(theirs.first()).copied().unwrap_or(&own);
            raw.error(key, format_args!("{value}: {why}"))
        }
        lora_core::Error::NoSuchTarget { .. } | lora_core::Error::OverlappingTargets { .. } => {
            raw.error(if is_own { "targets" } else { "target_modules" }, e)
        }
        lora_core::Error::DoesNotFit { .. } | lora_core::Error::NothingTrainable { .. } => raw.error(kind_key(raw), e),
        _ => Error::Core(e),
    }
}

/// The key that says what kind of adapter it is.
fn kind_key(raw: &RawConfig) -> &'static str {
    if raw.value(own::METHOD_KEY).is_some() { own::METHOD_KEY } else { "peft_type" }
}

/// [`load`] and [`AdapterFile::attach`].
pub fn attach(dir: &Path, base: &dyn Base, device: &Device) -> Result<Adapted> {
    load(dir)?.attach(base, device)
}

/// Refuses a base of another fingerprint than an adapter remembers.
fn same_base(trained: Option<&str>, base: &dyn Base) -> Result<()> {
    let Some(trained) = trained else { return Ok(()) };
    let found = fingerprint::of_base(base)?;
    if found == trained {
        return Ok(());
    }
    let problem = format!(
        "the adapter was trained on a base with fingerprint {trained}, and this one has {found}: other weights, with which it \
         may do anything; give the base that it was trained on"
    );
    Err(Error::Adapters { problem })
}

impl AdapterFile {
    /// The row of the method that trained it.
    pub fn row(&self) -> Result<&'static MethodRow> {
        Ok(find(self.method)?)
    }

    /// Refuses a base of another architecture, or for another task, than that it was trained on, as far as its files tell.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Weights`].
    pub fn check_base(&self, outline: &Outline) -> Result<()> {
        if let Some(trained) = self.architecture.as_ref().filter(|a| **a != outline.architecture) {
            let problem =
                format!("it was trained on a model of architecture {trained}, not on {}", outline.architecture);
            return Err(match self.raw.value(ARCHITECTURE_KEY) {
                Some(_) => self.raw.error(ARCHITECTURE_KEY, problem),
                None => Error::Weights { file: self.weights.clone(), problem },
            });
        }
        if let (Some(trained), Some(task)) = (&self.task_type, outline.task_type)
            && trained != task
        {
            return Err(self
                .raw
                .error("task_type", format_args!("it was trained for {trained}; this base is for {task}")));
        }
        Ok(())
    }

    /// Refuses a base that is not the one that it was trained on, by its fingerprint, as far as its files tell: PEFT's hold none
    /// ([`UNCHECKED`]).
    ///
    /// # Errors
    /// [`Error::Adapters`].
    pub fn check_same_base(&self, base: &dyn Base) -> Result<()> {
        same_base(self.base_fingerprint.as_deref(), base)
    }

    /// The adapter on its base, to infer with or to train on. A base that is not the very one that it was trained on
    /// ([`check_same_base`](AdapterFile::check_same_base)) is warned of.
    ///
    /// # Errors
    /// [`Error::Config`] when it was trained on another architecture or for another task, or when its options do not fit
    /// the base (for targets it lists the base's modules); [`Error::TensorNames`], [`Error::Shape`] when the tensors are
    /// not exactly those that the method needs on this base; [`Error::Weights`] when they contradict its structure.
    pub fn attach(&self, base: &dyn Base, device: &Device) -> Result<Adapted> {
        self.attach_but(base, device, |_| false)
    }

    /// As [`attach`](AdapterFile::attach), but with the head that the base has: to go on from one task to another, as the LoRA
    /// paper does from MNLI to MRPC, RTE and STS-B.
    ///
    /// # Errors
    /// As there, of all but the head.
    pub fn attach_with_new_head(&self, base: &dyn Base, device: &Device) -> Result<Adapted> {
        self.attach_but(base, device, |name| base.outline().is_saved_module(name))
    }

    /// The adapter on its base, but for the tensors of which `fresh` says that they begin as of a new one.
    fn attach_but(&self, base: &dyn Base, device: &Device, fresh: impl Fn(&str) -> bool) -> Result<Adapted> {
        self.check_base(base.outline())?;
        if let Err(e) = self.check_same_base(base) {
            tracing::warn!("{}: {e}", self.weights.display());
        }
        let (options, left) = self.options.fitting(base.outline()).map_err(|e| self.refused(e))?;
        for (option, name) in left {
            let tied = base.outline().tied_embedding().filter(|_| name == HEAD);
            let why = tied.map_or(String::new(), |table| format!(": its output head has no matrix but {table}"));
            tracing::warn!("{}: {option} {name} matches nothing on this base{why}", self.raw.path().display());
        }
        let method = self.build_with(&options)?;
        self.check_size(&*method, base.outline())?;
        let adapted = Adapted::new(&*method, base, device, base.dtype(), 0);
        let mut adapted = adapted.map_err(|e| self.refused(e))?;
        let wanted: BTreeMap<String, Tensor> = adapted.adapter_tensors()?.into_iter().collect();
        self.check_repeated(base, &wanted)?;
        let mut tensors = types::placed(&self.tensors, &wanted);
        if self.options.init_lora_weights.takes_from_base() {
            self.check_origin(base.outline())?;
            peft::complete(&mut tensors, &wanted)?;
        }
        tensors.retain(|name, _| !fresh(name));
        tensors.extend(wanted.iter().filter(|(name, _)| fresh(name)).map(|(name, t)| (name.clone(), t.clone())));
        self.check(&tensors, &wanted, base.outline())?;
        adapted.load_adapter_tensors(tensors).map_err(|e| match e {
            lora_core::Error::Structure { name, why } => {
                Error::Weights { file: self.weights.clone(), problem: format!("tensor {PREFIX}{name}: {why}") }
            }
            e => Error::Core(e),
        })?;
        Ok(adapted)
    }

    /// Refuses options that ask for far more than the file holds, before any memory is taken for it. What it lacks of less,
    /// [`check`](AdapterFile::check) says by name.
    fn check_size(&self, method: &dyn Method, outline: &Outline) -> Result<()> {
        const NAMED: usize = 1 << 26;
        let asked = trainable(method, outline).map_err(|e| self.refused(e))?;
        let held: usize = self.tensors.values().map(Tensor::len).sum();
        if asked <= held.saturating_add(NAMED) {
            return Ok(());
        }
        let problem = format!(
            "it holds {held} numbers, and by {} an adapter of this base has {asked}; the two files belong to different adapters",
            self.raw.path().display()
        );
        Err(Error::Weights { file: self.weights.clone(), problem })
    }

    /// Refuses a base that has not the tensors that the file repeats: PEFT would put the file's over them. Of a weight that
    /// gave way to the adapter PEFT repeats what is left, which `wanted`, an adapter that has just begun, tells.
    fn check_repeated(&self, base: &dyn Base, wanted: &BTreeMap<String, Tensor>) -> Result<()> {
        for (name, t) in &self.repeated {
            let module = name.strip_suffix(".weight").unwrap_or(name);
            let factors = ["A", "B"].map(|f| wanted.get(&format!("{module}.lora_{f}.weight")));
            let same = match (updates::repeated_of(base, name), factors) {
                (Some(own), _) if own.shape() != t.shape() => false,
                (Some(own), [Some(a), Some(b)]) if self.options.init_lora_weights.takes_from_base() => {
                    self.is_left(own, t, module, (a, b))?
                }
                (Some(own), _) => updates::repeats(own, t)?,
                (None, _) => false,
            };
            if !same {
                let problem = updates::other_values(base, name);
                return Err(Error::Weights { file: self.weights.clone(), problem });
            }
        }
        Ok(())
    }

    /// Whether `left` is W₀ − s·B₀·A₀, up to the digits of a decomposition in f32.
    fn is_left(&self, own: &Tensor, left: &Tensor, module: &str, (a, b): (&Tensor, &Tensor)) -> Result<bool> {
        let (rank, alpha) = Lora::new(LoraConfig::from(&self.options))?.rank_and_alpha(module)?;
        let scaling = if self.options.rslora { Scaling::RsLora } else { Scaling::Lora };
        let (a, b) = (a.to_array()?, b.to_array()?);
        let halves = (a.slice(s![rank.., ..]).to_owned(), b.slice(s![.., rank..]).to_owned());
        let taken = LowRank::new(halves.0, halves.1, scaling.scale(alpha, rank).map_err(lora_core::Error::from)?);
        let (own, left) = (own.to_array()?, left.to_array()?);
        let expected = lowrank::merge(own.view(), &taken.map_err(lora_core::Error::from)?, Layout::OutIn);
        let expected = expected.map_err(lora_core::Error::from)?.into_weight();
        let largest = own.iter().fold(0f32, |m, v| m.max(v.abs()));
        Ok(expected.iter().zip(&left).all(|(x, y)| (x - y).abs() <= 1e-3 * largest))
    }

    /// Refuses what PEFT does not train: its OLoRA takes the product of the factors from a weight stored [in, out] without
    /// transposing it.
    fn check_origin(&self, outline: &Outline) -> Result<()> {
        let transposed = |name: &String| {
            let site = name.strip_suffix(".lora_A.weight");
            outline.linear_sites().any(|(s, l)| Some(s.name.as_str()) == site && l.layout == Layout::InOut)
        };
        if self.options.init_lora_weights == InitLoraWeights::Olora && self.tensors.keys().any(transposed) {
            let problem = "with weights stored [in, out] PEFT's OLoRA does not begin at the base, so its adapters belong to no \
                           base that could be made again; train it with another init_lora_weights";
            return Err(self.raw.error("init_lora_weights", problem));
        }
        Ok(())
    }

    /// The method with its options.
    fn build(&self) -> Result<Box<dyn Method>> {
        self.build_with(&self.options)
    }

    fn build_with(&self, options: &Options) -> Result<Box<dyn Method>> {
        (self.row()?.build)(options).map_err(|e| self.refused(e))
    }

    fn refused(&self, e: lora_core::Error) -> Error {
        refused(&self.raw, e)
    }

    /// Compares names and shapes with those that the base asks for.
    fn check(
        &self,
        tensors: &BTreeMap<String, Tensor>,
        wanted: &BTreeMap<String, Tensor>,
        outline: &Outline,
    ) -> Result<()> {
        let kind = self.raw.str("peft_type")?.and_then(Kind::named);
        let is_adapted = |site: &str| wanted.contains_key(&format!("{site}.lora_A.weight"));
        let full = |name: &String| match kind {
            Some(kind) => kind.stored_name(name, outline),
            None => peft::stored_name(name, is_adapted),
        };
        let missing: Vec<String> = wanted.keys().filter(|n| !tensors.contains_key(*n)).map(full).collect();
        let unexpected: Vec<String> = tensors.keys().filter(|n| !wanted.contains_key(*n)).map(full).collect();
        if !missing.is_empty() || !unexpected.is_empty() {
            return Err(Error::TensorNames { place: self.weights.clone(), missing, unexpected });
        }
        for (name, t) in tensors {
            let expected = wanted[name].shape();
            if t.shape() != expected {
                let (expected, found) = (expected.to_vec(), t.shape().to_vec());
                return Err(Error::Shape { file: self.weights.clone(), tensor: full(name), expected, found });
            }
        }
        Ok(())
    }
}
