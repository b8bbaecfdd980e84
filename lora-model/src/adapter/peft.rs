//! Adapters in PEFT's own format: LoRA.

use std::{collections::BTreeMap, path::Path};

use lora_core::{
    Tensor,
    peft::{Bias, Lora, LoraConfig, Modules, Options, Outline, names, saves},
};
use lora_kernels::Device;
use ndarray::{Axis, concatenate};
use serde::{Deserialize, Serialize};

use super::{
    ARCHITECTURE_KEY, AdapterFile, AdapterTensors, PARTS_KEY, PREFIX, check_rank, config::PeftConfig, finite, refused,
    twice,
};
use crate::{Error, Result, checkpoint::TensorInfo, config::RawConfig, error::List};

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
pub(super) fn load(raw: RawConfig, file: &AdapterTensors) -> Result<AdapterFile> {
    let config = PeftConfig::of_raw(&raw)?;
    let lora = Lora::new(config.lora.clone()).map_err(|e| refused(&raw, e))?;
    let Tensors { pairs: modules, others, repeated } = modules(file, &config)?;
    for (site, Pair { factors, .. }) in &modules {
        check_pair(file, &lora, &raw, site, factors)?;
    }
    check_tying(&raw, &modules)?;
    let trained = match file.metadata().get(PARTS_KEY) {
        Some(text) => parts(text, &config, &lora, &raw, file.path(), modules.keys().map(String::as_str))?,
        None => config.lora.clone(),
    };
    let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
    for (site, Pair { kind, factors }) in &modules {
        for (i, info) in factors.iter().enumerate() {
            tensors.insert(format!("{site}.{}", kind[i]), finite(file, info)?);
        }
    }
    let own = |(name, key): (String, String)| Ok((name, finite(file, &file.info(&key).expect("a name of the file"))?));
    let repeated = repeated.into_iter().map(own).collect::<Result<_>>()?;
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
        repeated,
        raw,
        weights: file.path().to_owned(),
    })
}

/// Refuses an embedding with which an output head that shares its matrix would be adapted too.
fn check_tying(raw: &RawConfig, modules: &BTreeMap<String, Pair>) -> Result<()> {
    const KEY: &str = "ensure_weight_tying";
    if raw.bool(KEY)? != Some(true) || !modules.values().any(|pair| pair.kind == EMBEDDING) {
        return Ok(());
    }
    let problem = "an adapter of the embeddings that is one of the output head too is not supported; set it to false, with which \
                   the head stays as it is";
    Err(raw.error(KEY, problem))
}

/// Gives the factors of an adapter that PEFT did not convert the half that it lacks: what it began at on this base, which
/// PEFT too computes anew whenever it loads one. `wanted` are the tensors of such an adapter that has just begun.
pub(super) fn complete(tensors: &mut BTreeMap<String, Tensor>, wanted: &BTreeMap<String, Tensor>) -> Result<()> {
    for (name, t) in tensors {
        let axis = match () {
            () if [LINEAR[0], EMBEDDING[0]].iter().any(|end| name.ends_with(end)) => Axis(0),
            () if [LINEAR[1], EMBEDDING[1]].iter().any(|end| name.ends_with(end)) => Axis(1),
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

/// What PEFT puts behind the name of a module, for A and B: of a linear map, and of an embedding.
pub(super) const LINEAR: [&str; 2] = ["lora_A.weight", "lora_B.weight"];
pub(super) const EMBEDDING: [&str; 2] = ["lora_embedding_A", "lora_embedding_B"];

/// Module, kind and factor (0: A, 1: B) that a key means: `base_model.model.{module}.lora_A.weight`, or with the adapter's
/// name before `.weight`; of an embedding `….lora_embedding_A`, or with the name behind it.
fn parse(key: &str) -> Option<(&str, [&'static str; 2], usize)> {
    let key = key.strip_prefix(PREFIX)?;
    let is_name = |name: &str| !name.is_empty() && !name.contains('.');
    [LINEAR, EMBEDDING].into_iter().flat_map(|kind| [(kind, 0), (kind, 1)]).find_map(|(kind, i)| {
        let (factor, end) = kind[i].split_once('.').map_or((kind[i], ""), |(factor, _)| (factor, ".weight"));
        let (module, rest) = key.rsplit_once(&format!(".{factor}"))?;
        let name = rest.strip_suffix(end)?;
        let named = name.is_empty() || name.strip_prefix('.').is_some_and(is_name);
        (!module.is_empty() && named).then_some((module, kind, i))
    })
}

/// A and B of a module, and which kind it is.
struct Pair {
    kind: [&'static str; 2],
    factors: [TensorInfo; 2],
}

/// What a file holds.
struct Tensors {
    /// The factors of every module, by its name.
    pairs: BTreeMap<String, Pair>,
    /// Modules that were trained whole, and biases: by their names in the base those in the file.
    others: BTreeMap<String, String>,
    /// The base's own tensors that it repeats, likewise.
    repeated: BTreeMap<String, String>,
}

/// All tensors of a file, by what they are.
fn modules(file: &AdapterTensors, config: &PeftConfig) -> Result<Tensors> {
    let bad = |problem| Err(Error::Weights { file: file.path().to_owned(), problem });
    let mut found: BTreeMap<String, ([&'static str; 2], [Option<TensorInfo>; 2])> = BTreeMap::new();
    let (mut whole, mut repeated, mut strange) = (BTreeMap::<String, String>::new(), BTreeMap::new(), Vec::new());
    for key in file.names() {
        let Some((module, kind, factor)) = parse(key) else {
            match own_name(key, config) {
                Other::Of(own) => {
                    if let Some(first) = whole.insert(own, key.to_owned()) {
                        return Err(twice(file, &first, key));
                    }
                }
                Other::Copy => {}
                Other::OfBase(own) => drop(repeated.insert(own, key.to_owned())),
                Other::Strange => strange.push(key.to_owned()),
            }
            continue;
        };
        let (first_kind, factors) = found.entry(module.to_owned()).or_insert((kind, [None, None]));
        if *first_kind != kind {
            return bad(format!("tensor {key} makes {module} an embedding and a linear map; it can be one of them"));
        }
        let place = &mut factors[factor];
        if let Some(first) = place {
            return Err(twice(file, &first.stored_name, key));
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
    for (module, (kind, factors)) in found {
        match factors {
            [Some(a), Some(b)] => {
                pairs.insert(module, Pair { kind, factors: [a, b] });
            }
            [a, _] => missing.push(format!("{PREFIX}{module}.{}", kind[usize::from(a.is_some())])),
        }
    }
    match missing.is_empty() {
        true => Ok(Tensors { pairs, others: whole, repeated }),
        false => Err(Error::TensorNames { place: file.path().to_owned(), missing, unexpected: Vec::new() }),
    }
}

/// The end of the names of DoRA's lengths.
const MAGNITUDE: &str = ".lora_magnitude_vector";

/// The module of DoRA's lengths, which may have the adapter's name and `.weight` behind them.
fn magnitude(name: &str) -> Option<&str> {
    let (module, rest) = name.rsplit_once(MAGNITUDE)?;
    let rest = rest.strip_suffix(".weight").unwrap_or(rest);
    (rest.is_empty() || rest.strip_prefix('.').is_some_and(|name| !name.is_empty() && !name.contains('.')))
        .then_some(module)
}

/// What a tensor is that is no factor.
enum Other {
    /// This tensor of the base.
    Of(String),
    /// What stands in the file once more under another name, or is the base's own.
    Copy,
    /// This tensor of the base as the base has it: PEFT adds it to an adapter of embeddings, and where it is asked to.
    OfBase(String),
    /// Nothing that the configuration speaks of.
    Strange,
}

/// The modules whose weights PEFT adds to any adapter where it is asked to, or where it thinks that the vocabulary was resized
/// (`save_embedding_layers`): trained or not.
const TABLES: [&str; 4] = ["wte", "embed_tokens", "word_embeddings", "lm_head"];

/// Whether a tensor is one of those.
pub(super) fn is_table(name: &str) -> bool {
    let module = name.strip_suffix(".weight");
    module.is_some_and(|module| TABLES.iter().any(|table| names(table, module)))
}

/// The tensor of the base that one of the file is.
fn own_name(key: &str, config: &PeftConfig) -> Other {
    let Some(name) = key.strip_prefix(PREFIX) else { return Other::Strange };
    let is_saved = config.modules_to_save.iter().any(|m| saves(m, name));
    // With `bias = "all"` PEFT also writes the biases of both modules inside its wrapper: the one that was trained, and the
    // base's.
    let wrapped = [".modules_to_save.", ".original_module."].iter().any(|wrapper| name.contains(wrapper));
    if let Some(module) = name.strip_suffix(".base_layer.weight").filter(|_| !is_saved) {
        return Other::OfBase(format!("{module}.weight"));
    }
    if let Some(module) = magnitude(name).filter(|_| config.lora.use_dora && !is_saved) {
        return Other::Of(format!("{module}{MAGNITUDE}"));
    }
    match name.strip_suffix(".bias") {
        Some(_) if is_saved && wrapped && config.lora.bias == Bias::All => Other::Copy,
        _ if is_saved => Other::Of(name.to_owned()),
        Some(module) if config.lora.bias != Bias::None => {
            Other::Of(format!("{}.bias", module.strip_suffix(".base_layer").unwrap_or(module)))
        }
        _ if is_table(name) => Other::OfBase(name.to_owned()),
        _ => Other::Strange,
    }
}

/// What a key that is none of LoRA's probably is.
fn hint(key: &str) -> &'static str {
    match () {
        () if key.contains(MAGNITUDE) => "lengths of DoRA go with use_dora = true",
        () if key.ends_with(".bias") => "biases that were trained go with bias = \"all\" or \"lora_only\"",
        () if key.contains(".lora_A.") || key.contains(".lora_B.") => {
            "PEFT would ignore a tensor with another prefix; rename it"
        }
        () => "modules that were trained beside the adapter are listed as modules_to_save in its configuration",
    }
}

/// Checks that A [r, in] and B [out, r] have the rank that the configuration says.
fn check_pair(file: &AdapterTensors, lora: &Lora, raw: &RawConfig, site: &str, pair: &[TensorInfo; 2]) -> Result<()> {
    let (r, _) = lora.rank_and_alpha(site).map_err(|e| refused(raw, e))?;
    for (dimension, info) in pair.iter().enumerate() {
        if info.shape.len() != 2 {
            let problem = format!("tensor {} has shape {:?}, but a factor is a matrix", info.stored_name, info.shape);
            return Err(Error::Weights { file: file.path().to_owned(), problem });
        }
        check_rank(file, raw, info, dimension, r)?;
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
