//! Adapters on disk, as PEFT reads and writes them: `adapter_config.json` and `adapter_model.safetensors` in a folder.
//!
//! PEFT skips what it does not understand. Here every tensor is used, or refused by name; so is every option that would
//! compute something else than plain LoRA.
//!
//! # Parts of a fused projection
//! Targets such as `c_attn.q` and `c_attn.v` train separate updates of columns of one matrix. PEFT knows modules only, so
//! they are saved as the one update of the module that equals them: n parts of rank r become a rank of n·r, with B zero
//! outside of the parts' blocks and α multiplied by n (√n with rsLoRA), so that the scale stays. Where modules have
//! different numbers of parts, `rank_pattern` and `alpha_pattern` say so. The header of the safetensors file remembers the
//! parts under [`PARTS_KEY`], and loading restores them exactly: an adapter trains on as what it was.

mod config;
mod options;
mod save;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use lora_core::{
    Tensor,
    peft::{Adapted, Base, Lora, LoraConfig},
};
use lora_kernels::{Device, all_finite};
use serde::{Deserialize, Serialize};

use self::config::PeftConfig;
use crate::{
    Error, Result,
    checkpoint::{TensorFile, TensorInfo},
    config::RawConfig,
    error::List,
};

pub use save::save;

/// The adapter's configuration in its folder.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The adapter's tensors in its folder.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// The key of the safetensors header under which the parts of fused projections are remembered: targets, rank and alpha
/// as they were trained, as JSON.
pub const PARTS_KEY: &str = "lora_parts";

/// What PEFT puts before the name of every module.
const PREFIX: &str = "base_model.model.";
/// The same tensors in a format that is not read.
const PICKLED_FILE: &str = "adapter_model.bin";

/// The value of [`PARTS_KEY`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Parts {
    targets: Vec<String>,
    rank: usize,
    alpha: f64,
}

/// An adapter as it was read, before it meets a base.
#[derive(Debug)]
pub struct AdapterFile {
    /// How it was trained; parts of fused projections as they were.
    pub config: LoraConfig,
    /// The base that it was trained on, as its configuration names it.
    pub base_model_name_or_path: Option<String>,
    /// A [r, in] and B [out, r] of every module: `{module}.lora_A.weight` and `{module}.lora_B.weight`, in f32.
    pub tensors: BTreeMap<String, Tensor>,
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
/// missing; [`Error::PickledAdapter`] a `.bin` file; [`Error::Weights`] and [`Error::DType`] the tensor that is no factor
/// of LoRA, has another rank than the configuration says, or holds a NaN or an infinity; [`Error::TensorNames`] those
/// that lack their partner.
pub fn load(dir: &Path) -> Result<AdapterFile> {
    let (config, raw) = PeftConfig::read(&dir.join(CONFIG_FILE))?;
    let path = dir.join(WEIGHTS_FILE);
    if !path.exists() && dir.join(PICKLED_FILE).exists() {
        return Err(Error::PickledAdapter { file: dir.join(PICKLED_FILE) });
    }
    let file = TensorFile::open(&path)?;
    let modules = modules(&file)?;
    for (site, pair) in &modules {
        check_pair(&file, &config, &raw, site, pair)?;
    }
    let trained = match file.metadata().get(PARTS_KEY) {
        Some(text) => parts(text, &config, &raw, &path, modules.keys().map(String::as_str))?,
        None => whole(&config, &raw, modules.keys().map(String::as_str))?,
    };
    let mut tensors = BTreeMap::new();
    for (site, [a, b]) in &modules {
        for (factor, info) in [("lora_A", a), ("lora_B", b)] {
            let t = file.tensor(&info.stored_name, &info.shape, &Device::Cpu)?;
            if !all_finite(t.mat())? {
                let problem = format!("tensor {} holds a NaN or an infinity; its training failed", info.stored_name);
                return Err(Error::Weights { file: path, problem });
            }
            tensors.insert(format!("{site}.{factor}.weight"), t);
        }
    }
    let base_model_name_or_path = config.base_model;
    Ok(AdapterFile { config: trained, base_model_name_or_path, tensors, raw, weights: path })
}

/// [`load`] and [`AdapterFile::attach`].
pub fn attach(dir: &Path, base: &dyn Base, device: &Device) -> Result<Adapted> {
    load(dir)?.attach(base, device)
}

impl AdapterFile {
    /// The adapter on its base, to infer with or to train on.
    ///
    /// # Errors
    /// [`Error::Config`] when the targets or the rank do not fit the base (it lists the base's modules);
    /// [`Error::TensorNames`], [`Error::Shape`] when the tensors are not exactly those of the targets' modules;
    /// [`Error::Weights`] when they contradict the parts that they are said to have.
    pub fn attach(&self, base: &dyn Base, device: &Device) -> Result<Adapted> {
        let refused = |e: lora_core::Error| match &e {
            lora_core::Error::Option { option, value, why } => {
                let key = match *option {
                    "rank" => "r",
                    "alpha" => "lora_alpha",
                    "dropout" => "lora_dropout",
                    "targets" => "target_modules",
                    other => other,
                };
                self.raw.error(key, format_args!("{value}: {why}"))
            }
            lora_core::Error::NoSuchTarget { .. } | lora_core::Error::OverlappingTargets { .. } => {
                self.raw.error("target_modules", e)
            }
            _ => Error::Core(e),
        };
        let method = Lora::new(self.config.clone()).map_err(refused)?;
        let mut adapted = Adapted::new(&method, base, device, base.dtype(), 0).map_err(refused)?;
        self.check(&adapted)?;
        adapted.load_adapter_tensors(self.tensors.clone()).map_err(|e| match e {
            lora_core::Error::Structure { name, why } => {
                Error::Weights { file: self.weights.clone(), problem: format!("tensor {PREFIX}{name}: {why}") }
            }
            e => Error::Core(e),
        })?;
        Ok(adapted)
    }

    /// Compares names and shapes with those that the base asks for.
    fn check(&self, adapted: &Adapted) -> Result<()> {
        let wanted: BTreeMap<String, Tensor> = adapted.adapter_tensors()?.into_iter().collect();
        let full = |name: &String| format!("{PREFIX}{name}");
        let missing: Vec<String> = wanted.keys().filter(|n| !self.tensors.contains_key(*n)).map(full).collect();
        let unexpected: Vec<String> = self.tensors.keys().filter(|n| !wanted.contains_key(*n)).map(full).collect();
        if !missing.is_empty() || !unexpected.is_empty() {
            return Err(Error::TensorNames { place: self.weights.clone(), missing, unexpected });
        }
        for (name, t) in &self.tensors {
            let expected = wanted[name].shape();
            if t.shape() != expected {
                let (expected, found) = (expected.to_vec(), t.shape().to_vec());
                return Err(Error::Shape { file: self.weights.clone(), tensor: full(name), expected, found });
            }
        }
        Ok(())
    }
}

/// Module and factor (0: A, 1: B) that a key means: `base_model.model.{module}.lora_A.weight`, or with the adapter's name
/// before `.weight`.
fn parse(key: &str) -> Option<(&str, usize)> {
    let key = key.strip_prefix(PREFIX)?;
    [".lora_A.", ".lora_B."].iter().enumerate().find_map(|(i, factor)| {
        let (module, rest) = key.rsplit_once(factor)?;
        let named = rest.strip_suffix(".weight").is_some_and(|name| !name.is_empty() && !name.contains('.'));
        (!module.is_empty() && (rest == "weight" || named)).then_some((module, i))
    })
}

/// The factors of every module, by its name.
fn modules(file: &TensorFile) -> Result<BTreeMap<String, [TensorInfo; 2]>> {
    let bad = |problem| Err(Error::Weights { file: file.path().to_owned(), problem });
    let mut found: BTreeMap<String, [Option<TensorInfo>; 2]> = BTreeMap::new();
    let mut strange = Vec::new();
    for key in file.names() {
        let Some((module, factor)) = parse(key) else {
            strange.push(key.to_owned());
            continue;
        };
        let place = &mut found.entry(module.to_owned()).or_default()[factor];
        if let Some(first) = place {
            return bad(format!(
                "tensors {} and {key} are the same factor of one module; a file holds one adapter",
                first.stored_name
            ));
        }
        *place = file.info(key);
    }
    if !strange.is_empty() {
        let hint = hint(&strange[0]);
        return bad(format!(
            "no factor of LoRA ({PREFIX}MODULE.lora_A.weight or .lora_B.weight): {}; {hint}",
            List(&strange)
        ));
    }
    if found.is_empty() {
        return bad("it holds no tensors; save the adapter again".to_owned());
    }
    let mut missing = Vec::new();
    let mut pairs = BTreeMap::new();
    for (module, pair) in found {
        match pair {
            [Some(a), Some(b)] => {
                pairs.insert(module, [a, b]);
            }
            [a, _] => {
                let lacks = if a.is_some() { "lora_B" } else { "lora_A" };
                missing.push(format!("{PREFIX}{module}.{lacks}.weight"));
            }
        }
    }
    match missing.is_empty() {
        true => Ok(pairs),
        false => Err(Error::TensorNames { place: file.path().to_owned(), missing, unexpected: Vec::new() }),
    }
}

/// What a key that is none of LoRA's probably is.
fn hint(key: &str) -> &'static str {
    match () {
        () if key.contains("lora_magnitude_vector") => "DoRA is not supported yet",
        () if key.contains("lora_embedding_") => "adapted embeddings are not supported yet",
        () if key.ends_with(".bias") => "trained biases are not supported yet",
        () if key.contains(".lora_A.") || key.contains(".lora_B.") => {
            "PEFT would ignore a tensor with another prefix; rename it"
        }
        () => "modules that were trained beside the adapter are not supported yet",
    }
}

/// Checks that A [r, in] and B [out, r] have the rank that the configuration says.
fn check_pair(
    file: &TensorFile,
    config: &PeftConfig,
    raw: &RawConfig,
    site: &str,
    pair: &[TensorInfo; 2],
) -> Result<()> {
    let r = config.rank(site);
    for (i, info) in pair.iter().enumerate() {
        let problem = match info.shape[..] {
            [rows, cols] if [rows, cols][i] == r => continue,
            [rows, cols] => format!(
                "has shape {:?}, so its rank is {}, but {} says that it is {r}",
                info.shape,
                [rows, cols][i],
                raw.path().display()
            ),
            _ => format!("has shape {:?}, but a factor is a matrix", info.shape),
        };
        let problem = format!("tensor {} {problem}; the two files belong to different adapters", info.stored_name);
        return Err(Error::Weights { file: file.path().to_owned(), problem });
    }
    Ok(())
}

/// How an adapter of whole modules was trained.
fn whole<'a>(config: &PeftConfig, raw: &RawConfig, sites: impl Iterator<Item = &'a str>) -> Result<LoraConfig> {
    let mut settings = sites.map(|site| (config.rank(site), config.alpha(site)));
    let (rank, alpha) = settings.next().unwrap_or((config.r, config.alpha));
    if let Some((r, a)) = settings.find(|s| *s != (rank, alpha)) {
        let key = if r == rank { "alpha_pattern" } else { "rank_pattern" };
        let problem = format!(
            "modules with different ranks or alphas (r = {rank}, α = {alpha} and r = {r}, α = {a}) are not supported \
             yet, other than parts of fused projections in an adapter saved here"
        );
        return Err(raw.error(key, problem));
    }
    Ok(LoraConfig { rank, alpha, dropout: config.dropout, rslora: config.rslora, targets: config.targets.clone() })
}

/// How an adapter with parts was trained, by the header of its tensors, which has to agree with its configuration.
fn parts<'a>(
    text: &str,
    config: &PeftConfig,
    raw: &RawConfig,
    weights: &Path,
    sites: impl Iterator<Item = &'a str>,
) -> Result<LoraConfig> {
    let bad = |problem: String| {
        let problem = format!("metadata {PARTS_KEY:?}: {problem}; save the adapter again");
        Error::Weights { file: weights.to_owned(), problem }
    };
    let Parts { targets, rank, alpha } = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
    let trained = LoraConfig { rank, alpha, dropout: config.dropout, rslora: config.rslora, targets };
    Lora::new(trained.clone()).map_err(|e| bad(e.to_string()))?;
    let mut counts = BTreeMap::new();
    for site in sites {
        let r = config.rank(site);
        if !r.is_multiple_of(rank) {
            return Err(bad(format!("{site} has rank {r}, which is no multiple of the parts' rank {rank}")));
        }
        counts.insert(site, r / rank);
    }
    let expected = PeftConfig::of(&trained, &counts, None);
    match config.difference(&expected) {
        Some((key, found, expected)) => Err(raw.error(
            key,
            format_args!(
                "{found}, but by the metadata {PARTS_KEY:?} of {} it is {expected}; the two files belong to different \
                 adapters",
                weights.display()
            ),
        )),
        None => Ok(trained),
    }
}
