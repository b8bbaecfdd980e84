//! Adapters of AdapterHub (the `adapters` library): `adapter_config.json` and `pytorch_adapter.bin` or
//! `adapter.safetensors`.
//!
//! Its bottleneck adapters say in some thirty options where they stand and what they compute. Two of those are methods here:
//! Houlsby's (`adapter-h`; AdapterHub's `double_seq_bn` with `non_linearity` gelu) and Pfeiffer's (`adapter-p`; `seq_bn`, with
//! relu). What an option makes different from them is refused by its name.
//!
//! Prefix tuning is not converted: AdapterHub leaves the positions of the text as they are without a prefix, PEFT and this
//! project count the prefix as positions, so that the same numbers would compute something else.

use std::{collections::BTreeMap, path::Path};

use lora_core::{
    Tensor,
    peft::{Adapted, Base, Options, Outline, Part, SiteKind},
};
use lora_kernels::{DType, Device};
use serde_json::{Map, Value, json};

use super::{tensors_of, write_state_dict};
use crate::{Error, Result, adapter::AdapterFile, config::RawConfig, error::List, files};

/// AdapterHub's configuration in an adapter's folder.
const CONFIG: &str = "adapter_config.json";
const WEIGHTS: [&str; 2] = ["adapter.safetensors", "pytorch_adapter.bin"];
const HEAD: [&str; 2] = ["model_head.safetensors", "pytorch_model_head.bin"];

/// The version of the library whose files are written here.
const VERSION: &str = "adapters.1.3.0";

/// A method of the table as AdapterHub describes it.
struct Kind {
    method: &'static str,
    /// What tells it from the other.
    mh_adapter: bool,
    original_ln_before: bool,
    non_linearity: &'static str,
}

const KINDS: [Kind; 2] = [
    Kind { method: "adapter-h", mh_adapter: true, original_ln_before: false, non_linearity: "gelu" },
    Kind { method: "adapter-p", mh_adapter: false, original_ln_before: true, non_linearity: "relu" },
];

/// Options that have to be this in both, with what AdapterHub takes for one that is absent.
fn fixed() -> [(&'static str, Value); 12] {
    [
        ("output_adapter", json!(true)),
        ("original_ln_after", json!(true)),
        ("ln_before", json!(false)),
        ("ln_after", json!(false)),
        ("is_parallel", json!(false)),
        ("scaling", json!(1.0)),
        ("use_gating", json!(false)),
        ("residual_before_ln", json!(true)),
        ("inv_adapter", Value::Null),
        ("cross_adapter", json!(false)),
        ("leave_out", json!([])),
        ("phm_layer", json!(false)),
    ]
}

/// Reads AdapterHub's adapter in a folder for a base: the method, its options, and the adapter.
///
/// # Errors
/// [`Error::Config`] for a kind of adapter, or an option, that is none of the methods here; [`Error::Weights`] for tensors that
/// the base has no place for; and those of reading.
pub fn from_adapterhub(dir: &Path, base: &dyn Base) -> Result<(&'static str, Options, Adapted)> {
    let raw = RawConfig::from_file(&dir.join(CONFIG))?;
    let outline = base.outline();
    if let Some(trained) = raw.str("model_type")?.filter(|t| *t != outline.architecture) {
        let problem = format!("it was trained on a model of architecture {trained}, not on {}", outline.architecture);
        return Err(raw.error("model_type", problem));
    }
    let name = raw.str("name")?.ok_or_else(|| raw.error("name", "missing; the tensors are named after it"))?.to_owned();
    let kind = kind(&raw)?;
    let file = WEIGHTS.iter().map(|f| dir.join(f)).find(|f| f.is_file()).unwrap_or_else(|| dir.join(WEIGHTS[1]));
    let state = tensors_of(&file)?;
    let mut theirs: BTreeMap<String, Tensor> = state.tensors;
    let mut tensors = BTreeMap::new();
    let mut bottleneck = 0;
    for (ours, hub) in places(outline, kind.method, &name) {
        if let Some(tensor) = theirs.remove(&hub) {
            if ours.ends_with("adapter_down.bias") {
                bottleneck = tensor.len();
            }
            tensors.insert(ours, tensor);
        }
    }
    let strange: Vec<String> = theirs.into_keys().chain(state.others).collect();
    let bad = |problem: String| Error::Weights { file: file.clone(), problem };
    if !strange.is_empty() {
        return Err(bad(format!(
            "tensors that method {} has no place for on this base: {}",
            kind.method,
            List(&strange)
        )));
    }
    if bottleneck == 0 {
        return Err(bad(format!("it has no tensors of an adapter called {name} on this base's modules")));
    }
    let head = HEAD.iter().map(|f| dir.join(f)).find(|f| f.is_file());
    if !outline.modules_to_save.is_empty() {
        let Some(head) = &head else {
            return Err(bad(format!("the base is a classifier, and {} with its head is missing", HEAD[1])));
        };
        tensors.extend(tensors_of(head)?.tensors.into_iter().filter(|(name, _)| outline.is_saved_module(name)));
    }
    let options = Options { bottleneck, ..Options::default() };
    let row = lora_core::peft::find(kind.method)?;
    let mut adapted = Adapted::new(&*(row.build)(&options)?, base, &Device::Cpu, DType::F32, 0)?;
    adapted.load_adapter_tensors(tensors).map_err(|e| bad(e.to_string()))?;
    Ok((kind.method, options, adapted))
}

/// The method that a configuration describes.
fn kind(raw: &RawConfig) -> Result<&'static Kind> {
    let config = match raw.value("config") {
        Some(Value::Object(config)) => config,
        Some(other) => {
            return Err(raw.error("config", format_args!("expected the options of an adapter, found {other}")));
        }
        None => return Err(raw.error("config", "missing; this is no configuration of AdapterHub")),
    };
    let refused =
        |key: &str, found: &Value, why: String| Err(raw.error("config", format_args!("{key} = {found}: {why}")));
    match config.get("architecture") {
        None | Some(Value::Null) => {}
        Some(found) if found == "prefix_tuning" => {
            let why = "AdapterHub does not count a prefix as positions of the text, PEFT and this project do; the same numbers \
                       would compute something else";
            return refused("architecture", found, why.into());
        }
        Some(found) => return refused("architecture", found, "only bottleneck adapters are converted".into()),
    }
    let same = |found: &Value, wanted: &Value| match (found.as_f64(), wanted.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => found == wanted,
    };
    for (key, wanted) in fixed() {
        if let Some(found) = config.get(key).filter(|found| !same(found, &wanted)) {
            return refused(key, found, format!("methods here have {wanted}"));
        }
    }
    let flag = |key: &str| config.get(key).and_then(Value::as_bool);
    let (mh, before) = (flag("mh_adapter"), flag("original_ln_before").unwrap_or(false));
    let kind = KINDS.iter().find(|k| mh == Some(k.mh_adapter) && before == k.original_ln_before);
    let Some(kind) = kind else {
        let found = json!({"mh_adapter": mh, "original_ln_before": before});
        return Err(raw.error(
            "config",
            format_args!("{found} is neither Houlsby's (double_seq_bn) nor Pfeiffer's (seq_bn) place for adapters"),
        ));
    };
    // Files from before `version` have other names.
    let old = raw.value("version").is_none();
    let non_linearity = match config.get("non_linearity").and_then(Value::as_str) {
        Some("gelu") if old => "gelu_new",
        Some("gelu_orig") if old => "gelu",
        other => other.unwrap_or_default(),
    };
    match non_linearity == kind.non_linearity {
        true => Ok(kind),
        false => {
            let why = format!("method {} has {}", kind.method, kind.non_linearity);
            refused("non_linearity", &json!(non_linearity), why)
        }
    }
}

/// Our name and AdapterHub's of every tensor that a method has on a base.
fn places(outline: &Outline, method: &str, name: &str) -> Vec<(String, String)> {
    let mut places = Vec::new();
    for site in &outline.sites {
        let SiteKind::Sublayer { part, .. } = site.kind else { continue };
        if method == "adapter-p" && part == Part::Attention {
            continue;
        }
        // Encoders keep adapters in the modules that end a sublayer, decoders beside the sublayers.
        let module = match (site.name.rsplit_once('.'), part) {
            (Some((layer, "attn" | "self_attn")), Part::Attention) => format!("{layer}.attention_adapters"),
            (Some((layer, "mlp")), Part::Mlp) => format!("{layer}.output_adapters"),
            _ => site.name.clone(),
        };
        for (ours, theirs) in [("adapter_down", "adapter_down.0"), ("adapter_up", "adapter_up")] {
            for kind in ["weight", "bias"] {
                places.push((
                    format!("{}.{ours}.{kind}", site.name),
                    format!("{module}.adapters.{name}.{theirs}.{kind}"),
                ));
            }
        }
    }
    places
}

/// Writes an adapter as AdapterHub's of this name into a folder.
///
/// # Errors
/// [`Error::Adapters`] for a method that AdapterHub does not have, norms that train beside it, or a head, which AdapterHub
/// names in another way; those of [`AdapterFile::attach`] and of writing.
pub fn to_adapterhub(file: &AdapterFile, base: &dyn Base, name: &str, dir: &Path) -> Result<()> {
    let refused = |problem: String| Err(Error::Adapters { problem });
    let Some(kind) = KINDS.iter().find(|k| k.method == file.method) else {
        let known: Vec<&str> = KINDS.iter().map(|k| k.method).collect();
        return refused(format!(
            "method {} has no counterpart in AdapterHub; {} have one",
            file.method,
            known.join(" and ")
        ));
    };
    if name.is_empty() || name.contains('.') {
        return refused(format!("an adapter cannot be called {name:?} in AdapterHub: its tensors are named after it"));
    }
    let adapted = file.attach(base, &Device::Cpu)?;
    if let Some(tensor) = adapted.trained().next() {
        return refused(format!("it has trained {tensor} as a whole, which AdapterHub's adapter has no place for"));
    }
    let mut ours: BTreeMap<String, Tensor> = adapted.adapter_tensors()?.into_iter().collect();
    let outline = base.outline();
    let mut tensors = BTreeMap::new();
    for (own, hub) in places(outline, kind.method, name) {
        let tensor = ours.remove(&own).ok_or(lora_core::Error::Missing { name: own })?;
        tensors.insert(hub, tensor);
    }
    let width = outline.sites.iter().find_map(|s| match s.kind {
        SiteKind::Sublayer { width, .. } => Some(width),
        _ => None,
    });
    let width = width.unwrap_or(0);
    let mut config: Map<String, Value> = fixed().into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
    config.insert("mh_adapter".into(), json!(kind.mh_adapter));
    config.insert("original_ln_before".into(), json!(kind.original_ln_before));
    config.insert("non_linearity".into(), json!(kind.non_linearity));
    config.insert("adapter_residual_before_ln".into(), json!(false));
    config.insert("dropout".into(), json!(0.0));
    config.insert("init_weights".into(), json!("bert"));
    // AdapterHub takes the bottleneck as a share of the width, rounded down: a half more keeps it from falling short.
    let bottleneck = file.options.bottleneck;
    let exact = width.is_multiple_of(bottleneck).then(|| json!(width / bottleneck));
    let reduction = exact.unwrap_or_else(|| json!(width as f64 / (bottleneck as f64 + 0.5)));
    config.insert("reduction_factor".into(), reduction);
    let text = json!({
        "config": config,
        "hidden_size": width,
        "model_name": file.base_model_name_or_path,
        "model_type": outline.architecture,
        "name": name,
        // Without a version gelu would mean its approximation.
        "version": VERSION,
    });
    files::create_folder(dir)?;
    write_state_dict(&dir.join(WEIGHTS[1]), &tensors)?;
    files::write_bytes(&dir.join(CONFIG), format!("{text:#}\n").as_bytes())
}
