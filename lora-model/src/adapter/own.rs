//! Adapters of methods that PEFT has no name for: the same two files, with a configuration of our own.
//!
//! ```json
//! {"method": "adapter-p", "architecture": "roberta", "task_type": "SEQ_CLS", "base_model_name_or_path": "...",
//!  "bottleneck": 48, "train_norms": false}
//! ```

use std::collections::BTreeMap;

use lora_core::{
    Tensor,
    peft::{Bias, Frozen, Layers, MethodRow, Options, Outline, find, non_linearity},
};
use lora_kernels::Activation;
use serde_json::{Map, Value, json};

use super::{
    AdapterFile, AdapterTensors, PREFIX,
    config::{alphas_of, init_value, modules, one_or_more, pattern, ranks, read_init, some_modules},
    finite, refused,
    types::Kind,
};
use crate::{Error, Result, config::RawConfig};

/// Options that methods have come to read later: a configuration without them means their defaults.
const LATER: &[&str] = &[
    "count-prefix",
    "classify-prefix",
    "non-linearity",
    "exclude-modules",
    "layers-to-transform",
    "layers-pattern",
    "rank-pattern",
    "alpha-pattern",
    "modules-to-save",
    "bias",
    "use-dora",
    "init-lora-weights",
    "fan-in-fan-out",
];

/// The key that tells such a configuration from PEFT's.
pub(super) const METHOD_KEY: &str = "method";

/// The text of the configuration.
pub(super) fn text(row: &MethodRow, options: &Options, outline: &Outline, base_model: Option<&str>) -> String {
    let mut keys: BTreeMap<String, Value> = [
        (METHOD_KEY.into(), json!(row.name)),
        ("architecture".into(), json!(outline.architecture)),
        ("task_type".into(), json!(outline.task_type)),
        ("base_model_name_or_path".into(), json!(base_model)),
    ]
    .into();
    let saved = options.saved();
    keys.extend(row.options.iter().map(|option| (option.replace('-', "_"), value(&saved, option))));
    format!("{:#}", json!(keys))
}

/// The value of an option.
fn value(o: &Options, option: &str) -> Value {
    match option {
        "rank" => json!(o.rank),
        "alpha" => json!(o.alpha),
        "dropout" => json!(o.dropout),
        "rslora" => json!(o.rslora),
        "targets" => modules(&o.targets),
        "exclude-modules" => modules(&o.exclude_modules),
        "layers-to-transform" => json!(o.layers_to_transform),
        "layers-pattern" => json!(o.layers_pattern),
        "rank-pattern" => ranks(&o.rank_pattern),
        "alpha-pattern" => alphas_of(&o.alpha_pattern),
        "modules-to-save" => json!(o.modules_to_save),
        "bias" => json!(o.bias.word()),
        "use-dora" => json!(o.use_dora),
        "init-lora-weights" => init_value(o.init_lora_weights),
        "fan-in-fan-out" => json!(o.fan_in_fan_out),
        "feedforward-modules" => modules(&o.feedforward_modules),
        "bottleneck" => json!(o.bottleneck),
        "non-linearity" => json!(o.non_linearity.map(Activation::hf_name)),
        "train-norms" => json!(o.train_norms),
        "layers" => json!(o.layers.to_string()),
        "drop-layers" => json!(o.drop_layers.as_ref().map(Layers::to_string)),
        "prefix" => json!(o.prefix),
        "infix" => json!(o.infix),
        "count-prefix" => json!(o.count_prefix),
        "classify-prefix" => json!(o.classify_prefix),
        "reparam" => json!(o.reparam),
        "decompose-both" => json!(o.decompose_both),
        "decompose-factor" => json!(o.decompose_factor),
        "fuse" => Value::Object(o.fuse.iter().map(|f| (f.name.clone(), json!(f.bottleneck))).collect()),
        other => panic!("an option of a method that its files do not know: {other}"),
    }
}

/// The adapter of a configuration that was read, and of the tensors beside it.
pub(super) fn load(raw: RawConfig, file: &AdapterTensors) -> Result<AdapterFile> {
    let name = raw.str(METHOD_KEY)?.unwrap_or_default();
    let row = find(name).map_err(|e| raw.error(METHOD_KEY, e))?;
    if row.whole_model {
        return Err(raw.error(METHOD_KEY, format_args!("{name} has no adapter: its result is a whole model")));
    }
    if let Some(word) = Kind::alone(row.name) {
        let problem = format!("adapters of {name} are always in PEFT's format, with peft_type = {word:?}");
        return Err(raw.error(METHOD_KEY, problem));
    }
    let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
    for key in file.names() {
        let Some((own, info)) = key.strip_prefix(PREFIX).zip(file.info(key)) else {
            let problem = format!("tensor {key} does not begin with {PREFIX}; rename it, or save the adapter again");
            return Err(Error::Weights { file: file.path().to_owned(), problem });
        };
        tensors.insert(own.to_owned(), finite(file, &info)?);
    }
    const GENERAL: [&str; 4] = [METHOD_KEY, "architecture", "task_type", "base_model_name_or_path"];
    if let Some(key) = raw
        .keys()
        .keys()
        .find(|k| !GENERAL.contains(&k.as_str()) && !row.options.iter().any(|o| o.replace('-', "_") == **k))
    {
        return Err(raw.error(key, format_args!("method {name} has no such option")));
    }
    let missing = |o: &&&str| !raw.keys().contains_key(&o.replace('-', "_")) && !LATER.contains(*o);
    if let Some(option) = row.options.iter().find(missing) {
        let problem = "missing; it says how the adapter was made, so it has to be there";
        return Err(raw.error(&option.replace('-', "_"), problem));
    }
    let mut options = Options::default();
    for option in row.options {
        set(&mut options, &raw, option, &tensors)?;
    }
    let adapter = AdapterFile {
        method: row.name,
        options,
        base_model_name_or_path: raw.str("base_model_name_or_path")?.map(str::to_owned),
        tensors,
        architecture: raw.str("architecture")?.map(str::to_owned),
        task_type: raw.str("task_type")?.map(str::to_owned),
        base_fingerprint: None,
        repeated: BTreeMap::new(),
        raw,
        weights: file.path().to_owned(),
    };
    adapter.build()?;
    Ok(adapter)
}

/// Takes an option over; one that is null keeps its default.
fn set(o: &mut Options, raw: &RawConfig, option: &'static str, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let key = option.replace('-', "_");
    let key = key.as_str();
    let layers = |text: Option<&str>| -> Result<Option<Layers>> {
        text.map(|t| Layers::parse(option, t)).transpose().map_err(|e| raw.error(key, e))
    };
    match option {
        "rank" => o.rank = raw.usize(key)?.unwrap_or(o.rank),
        "alpha" => o.alpha = raw.f64(key)?.unwrap_or(o.alpha),
        "dropout" => o.dropout = raw.f64(key)?.unwrap_or(o.dropout),
        "rslora" => o.rslora = raw.bool(key)?.unwrap_or(o.rslora),
        "targets" => o.targets = some_modules(raw, key)?,
        "exclude-modules" => o.exclude_modules = some_modules(raw, key)?,
        "layers-to-transform" => {
            o.layers_to_transform = one_or_more(raw, key, "a layer's number", |v| v.as_u64()?.try_into().ok())?;
        }
        "layers-pattern" => o.layers_pattern = strings(raw, key)?.unwrap_or_default(),
        "rank-pattern" => o.rank_pattern = pattern(raw, key, "a whole number", |v| v.as_u64()?.try_into().ok())?,
        "alpha-pattern" => o.alpha_pattern = pattern(raw, key, "a number", Value::as_f64)?,
        "modules-to-save" => o.modules_to_save = strings(raw, key)?.unwrap_or_default(),
        "bias" => {
            if let Some(word) = raw.str(key)? {
                o.bias = Bias::parse(word).map_err(|e| refused(raw, e))?;
            }
        }
        "use-dora" => o.use_dora = raw.bool(key)?.unwrap_or(o.use_dora),
        "init-lora-weights" => o.init_lora_weights = read_init(raw)?,
        "fan-in-fan-out" => o.fan_in_fan_out = raw.bool(key)?,
        "feedforward-modules" => o.feedforward_modules = some_modules(raw, key)?,
        "bottleneck" => o.bottleneck = raw.usize(key)?.unwrap_or(o.bottleneck),
        "non-linearity" => {
            o.non_linearity = raw.str(key)?.map(non_linearity).transpose().map_err(|e| refused(raw, e))?;
        }
        "train-norms" => o.train_norms = raw.bool(key)?.unwrap_or(o.train_norms),
        "layers" => o.layers = layers(raw.str(key)?)?.unwrap_or(o.layers.clone()),
        "drop-layers" => o.drop_layers = layers(raw.str(key)?)?,
        "prefix" => o.prefix = raw.usize(key)?.unwrap_or(o.prefix),
        "infix" => o.infix = raw.usize(key)?.unwrap_or(o.infix),
        "count-prefix" => o.count_prefix = raw.bool(key)?.unwrap_or(o.count_prefix),
        "classify-prefix" => o.classify_prefix = raw.bool(key)?.unwrap_or(o.classify_prefix),
        "reparam" => match raw.usize(key)? {
            None | Some(0) => {}
            Some(_) => return Err(raw.error(key, "a saved prefix is keys and values alone; set it to 0")),
        },
        "decompose-both" => o.decompose_both = raw.bool(key)?.unwrap_or(o.decompose_both),
        "decompose-factor" => o.decompose_factor = whole_number(raw, key)?.unwrap_or(o.decompose_factor),
        "fuse" => o.fuse = fused(raw, key, tensors)?,
        other => panic!("an option of a method that its files do not know: {other}"),
    }
    Ok(())
}

/// A whole number, perhaps a negative one.
pub(super) fn whole_number(raw: &RawConfig, key: &str) -> Result<Option<i64>> {
    let Some(value) = raw.value(key) else { return Ok(None) };
    value.as_i64().map(Some).ok_or_else(|| raw.error(key, format_args!("expected a whole number, found {value}")))
}

/// A list of names.
pub(super) fn strings(raw: &RawConfig, key: &str) -> Result<Option<Vec<String>>> {
    let Some(value) = raw.value(key) else { return Ok(None) };
    let list = value.as_array().and_then(|list| list.iter().map(|v| v.as_str().map(str::to_owned)).collect());
    list.map(Some).ok_or_else(|| raw.error(key, format_args!("expected a list of names, found {value}")))
}

/// The frozen adapters of a fusion, whose tensors are among the others as `{site}.adapters.{name}.{tensor}`.
fn fused(raw: &RawConfig, key: &str, tensors: &BTreeMap<String, Tensor>) -> Result<Vec<Frozen>> {
    let none = Map::new();
    let adapters = match raw.value(key) {
        None => &none,
        Some(Value::Object(adapters)) => adapters,
        Some(other) => return Err(raw.error(key, format_args!("expected names and bottlenecks, found {other}"))),
    };
    let frozen = |(name, bottleneck): (&String, &Value)| {
        let bottleneck = bottleneck.as_u64().and_then(|n| n.try_into().ok());
        let bottleneck =
            bottleneck.ok_or_else(|| raw.error(key, format_args!("expected a bottleneck for {name:?}")))?;
        let middle = format!(".adapters.{name}.");
        let own = tensors.iter().filter_map(|(tensor, t)| {
            let (site, rest) = tensor.split_once(&middle)?;
            Some((format!("{site}.{rest}"), t.clone()))
        });
        Ok(Frozen { name: name.clone(), bottleneck, tensors: own.collect() })
    };
    adapters.iter().map(frozen).collect()
}
