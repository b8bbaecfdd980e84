//! Adapters in PEFT's own format: LoRA.

use std::{collections::BTreeMap, path::Path};

use lora_core::{
    Tensor,
    peft::{Lora, LoraConfig, Options, Outline},
};
use serde::{Deserialize, Serialize};

use super::{ARCHITECTURE_KEY, AdapterFile, PARTS_KEY, PREFIX, config::PeftConfig, finite};
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
    pub(super) targets: Vec<String>,
    pub(super) rank: usize,
    pub(super) alpha: f64,
}

/// The adapter of a configuration that was read, and of the tensors beside it.
pub(super) fn load(raw: RawConfig, file: &TensorFile) -> Result<AdapterFile> {
    let config = PeftConfig::of_raw(&raw)?;
    let (modules, whole_modules) = modules(file, &config.modules_to_save)?;
    for (site, pair) in &modules {
        check_pair(file, &config, &raw, site, pair)?;
    }
    let trained = match file.metadata().get(PARTS_KEY) {
        Some(text) => parts(text, &config, &raw, file.path(), modules.keys().map(String::as_str))?,
        None => whole(&config, &raw, modules.keys().map(String::as_str))?,
    };
    let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
    for (site, [a, b]) in &modules {
        for (factor, info) in [("lora_A", a), ("lora_B", b)] {
            tensors.insert(format!("{site}.{factor}.weight"), finite(file, info)?);
        }
    }
    for key in whole_modules {
        if let (Some(own), Some(info)) = (key.strip_prefix(PREFIX), file.info(&key)) {
            tensors.insert(own.to_owned(), finite(file, &info)?);
        }
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

/// The factors of every module, by its name, and the names of other tensors: those of modules that were trained whole
/// (`saved`).
fn modules(file: &TensorFile, saved: &[String]) -> Result<(Pairs, Vec<String>)> {
    let bad = |problem| Err(Error::Weights { file: file.path().to_owned(), problem });
    let mut found: BTreeMap<String, [Option<TensorInfo>; 2]> = BTreeMap::new();
    let (mut whole, mut strange) = (Vec::new(), Vec::new());
    for key in file.names() {
        let Some((module, factor)) = parse(key) else {
            let known = key.strip_prefix(PREFIX).is_some_and(|name| saved.iter().any(|m| is_of(name, m)));
            if known { &mut whole } else { &mut strange }.push(key.to_owned());
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

/// Whether a tensor belongs to a module that PEFT's `modules_to_save` names: by the end of its path.
pub(super) fn is_of(tensor: &str, module: &str) -> bool {
    let parts: Vec<&str> = tensor.split('.').collect();
    let wanted: Vec<&str> = module.split('.').collect();
    parts.windows(wanted.len()).any(|w| w == wanted)
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
        () => "modules that were trained beside the adapter are listed as modules_to_save in its configuration",
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
    let expected = PeftConfig::of(&trained, &counts, None, &Outline::default());
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
