//! Adapters in PEFT's own format: LoRA.

use std::{collections::BTreeMap, path::Path};

use lora_core::{
    Tensor,
    peft::{Bias, Lora, LoraConfig, Modules, Options, Outline, saves},
};
use lora_kernels::Device;
use ndarray::{Axis, concatenate};
use serde::{Deserialize, Serialize};

use super::{ARCHITECTURE_KEY, AdapterFile, PARTS_KEY, PREFIX, config::PeftConfig, finite, refused};
use crate::{
    Error, Result,
    checkpoint::{TensorFile, TensorInfo},
    config::RawConfig,
    error::List,
};

/// The value of [`PARTS_KEY`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Parts {
    targets: Vec<String>,
    rank: usize,
    alpha: f64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    rank_pattern: Vec<(String, usize)>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    alpha_pattern: Vec<(String, f64)>,
}

impl Parts {
    /// # Panics
    /// When the targets are no names: then there are no parts.
    pub(super) fn of(config: &LoraConfig) -> Parts {
        let Modules::Names(targets) = config.targets.clone() else { panic!("parts are targets by name") };
        Parts {
            targets,
            rank: config.rank,
            alpha: config.alpha,
            rank_pattern: config.rank_pattern.clone(),
            alpha_pattern: config.alpha_pattern.clone(),
        }
    }
}

/// The name in a file of a tensor of an adapter, where a bias of an adapted module has PEFT's name for it.
pub(super) fn stored_name(name: &str, is_adapted: impl Fn(&str) -> bool) -> String {
    match name.strip_suffix(".bias").filter(|module| is_adapted(module)) {
        Some(module) => format!("{PREFIX}{module}.base_layer.bias"),
        None => format!("{PREFIX}{name}"),
    }
}

/// The adapter of a configuration that was read, and of the tensors beside it.
pub(super) fn load(raw: RawConfig, file: &TensorFile) -> Result<AdapterFile> {
    let config = PeftConfig::of_raw(&raw)?;
    let lora = Lora::new(config.lora.clone()).map_err(|e| refused(&raw, e))?;
    let (modules, others) = modules(file, &config)?;
    for (site, pair) in &modules {
        check_pair(file, &lora, &raw, site, pair)?;
    }
    let trained = match file.metadata().get(PARTS_KEY) {
        Some(text) => parts(text, &config, &lora, &raw, file.path(), modules.keys().map(String::as_str))?,
        None => config.lora.clone(),
    };
    let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
    for (site, [a, b]) in &modules {
        for (factor, info) in [("lora_A", a), ("lora_B", b)] {
            tensors.insert(format!("{site}.{factor}.weight"), finite(file, info)?);
        }
    }
    for (own, key) in others {
        let info = file.info(&key).expect("one of the file's names");
        tensors.insert(own, finite(file, &info)?);
    }
    Ok(AdapterFile {
        method: "lora",
        options: Options::from(&trained),
        base_model_name_or_path: config.base_model,
        tensors,
        architecture: file.metadata().get(ARCHITECTURE_KEY).cloned(),
        task_type: config.task_type,
        base_fingerprint: None,
        raw,
        weights: file.path().to_owned(),
    })
}

/// Gives the factors of an adapter that PEFT did not convert the half that it lacks: what it began at on this base, which
/// PEFT too computes anew whenever it loads one. `wanted` are the tensors of such an adapter that has just begun.
pub(super) fn complete(tensors: &mut BTreeMap<String, Tensor>, wanted: &BTreeMap<String, Tensor>) -> Result<()> {
    for (name, t) in tensors {
        let axis = match () {
            () if name.ends_with(".lora_A.weight") => Axis(0),
            () if name.ends_with(".lora_B.weight") => Axis(1),
            () => continue,
        };
        let Some(begun) = wanted.get(name) else { continue };
        let (own, begun) = (t.to_array()?, begun.to_array()?);
        let half = begun.len_of(axis) / 2;
        // What does not fit is refused by its shape.
        if own.len_of(axis) == half && own.len_of(Axis(1 - axis.0)) == begun.len_of(Axis(1 - axis.0)) {
            let whole = concatenate![axis, own, begun.slice_axis(axis, (half..).into())];
            let values: Vec<f32> = whole.iter().copied().collect();
            *t = Tensor::from_slice(&Device::Cpu, whole.shape(), &values)?;
        }
    }
    Ok(())
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

/// A and B of every module, by its name.
type Pairs = BTreeMap<String, [TensorInfo; 2]>;

/// The factors of every module, by its name, and other tensors, by their names in the base and in the file: those of
/// modules that were trained whole, and biases.
fn modules(file: &TensorFile, config: &PeftConfig) -> Result<(Pairs, BTreeMap<String, String>)> {
    let bad = |problem| Err(Error::Weights { file: file.path().to_owned(), problem });
    let mut found: BTreeMap<String, [Option<TensorInfo>; 2]> = BTreeMap::new();
    let (mut whole, mut strange) = (BTreeMap::new(), Vec::new());
    for key in file.names() {
        let Some((module, factor)) = parse(key) else {
            match own_name(key, config) {
                Other::Of(own) => drop(whole.insert(own, key.to_owned())),
                Other::Copy => {}
                Other::Strange => strange.push(key.to_owned()),
            }
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
        true => Ok((pairs, whole)),
        false => Err(Error::TensorNames { place: file.path().to_owned(), missing, unexpected: Vec::new() }),
    }
}

/// The end of the names of DoRA's lengths.
const MAGNITUDE: &str = ".lora_magnitude_vector";

/// What a tensor is that is no factor.
enum Other {
    /// This tensor of the base.
    Of(String),
    /// What stands in the file once more under another name, or is the base's own.
    Copy,
    /// Nothing that the configuration speaks of.
    Strange,
}

/// The tensor of the base that one of the file is.
fn own_name(key: &str, config: &PeftConfig) -> Other {
    let Some(name) = key.strip_prefix(PREFIX) else { return Other::Strange };
    let is_saved = config.modules_to_save.iter().any(|m| saves(m, name));
    // With `bias = "all"` PEFT also writes the biases of both modules inside its wrapper: the one that was trained, and the
    // base's.
    let wrapped = [".modules_to_save.", ".original_module."].iter().any(|wrapper| name.contains(wrapper));
    match name.strip_suffix(".bias") {
        Some(_) if is_saved && wrapped && config.lora.bias == Bias::All => Other::Copy,
        _ if is_saved => Other::Of(name.to_owned()),
        None if config.lora.use_dora && name.ends_with(MAGNITUDE) => Other::Of(name.to_owned()),
        Some(module) if config.lora.bias != Bias::None => {
            Other::Of(format!("{}.bias", module.strip_suffix(".base_layer").unwrap_or(module)))
        }
        _ => Other::Strange,
    }
}

/// What a key that is none of LoRA's probably is.
fn hint(key: &str) -> &'static str {
    match () {
        () if key.contains(MAGNITUDE) => "lengths of DoRA go with use_dora = true",
        () if key.contains("lora_embedding_") => "adapted embeddings are not supported yet",
        () if key.ends_with(".bias") => "biases that were trained go with bias = \"all\" or \"lora_only\"",
        () if key.contains(".lora_A.") || key.contains(".lora_B.") => {
            "PEFT would ignore a tensor with another prefix; rename it"
        }
        () => "modules that were trained beside the adapter are listed as modules_to_save in its configuration",
    }
}

/// Checks that A [r, in] and B [out, r] have the rank that the configuration says.
fn check_pair(file: &TensorFile, lora: &Lora, raw: &RawConfig, site: &str, pair: &[TensorInfo; 2]) -> Result<()> {
    let (r, _) = lora.rank_and_alpha(site).map_err(|e| refused(raw, e))?;
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

/// How an adapter with parts was trained, by the header of its tensors, which has to agree with its configuration.
fn parts<'a>(
    text: &str,
    config: &PeftConfig,
    whole: &Lora,
    raw: &RawConfig,
    weights: &Path,
    sites: impl Iterator<Item = &'a str>,
) -> Result<LoraConfig> {
    let bad = |problem: String| {
        let problem = format!("metadata {PARTS_KEY:?}: {problem}; save the adapter again");
        Error::Weights { file: weights.to_owned(), problem }
    };
    let Parts { targets, rank, alpha, rank_pattern, alpha_pattern } =
        serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
    let targets = Modules::Names(targets);
    let trained = LoraConfig { rank, alpha, targets, rank_pattern, alpha_pattern, ..config.lora.clone() };
    let lora = Lora::new(trained.clone()).map_err(|e| bad(e.to_string()))?;
    let mut counts = BTreeMap::new();
    for site in sites {
        let of = |lora: &Lora| lora.rank_and_alpha(site).map_err(|e| refused(raw, e));
        let ((r, _), (rank, _)) = (of(whole)?, of(&lora)?);
        if !r.is_multiple_of(rank) {
            return Err(bad(format!("{site} has rank {r}, which is no multiple of the parts' rank {rank}")));
        }
        counts.insert(site, r / rank);
    }
    let expected = PeftConfig::of(&trained, &counts, None, &Outline::default())?;
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
