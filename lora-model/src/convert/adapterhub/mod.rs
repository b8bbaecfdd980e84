//! Adapters of AdapterHub (the `adapters` library): `adapter_config.json` and `pytorch_adapter.bin` or
//! `adapter.safetensors`.
//!
//! Its bottleneck adapters say in some thirty options where they stand and what they compute. Two of those are methods here:
//! Houlsby's (`adapter-h`; AdapterHub's `double_seq_bn`) and Pfeiffer's (`adapter-p`; `seq_bn`), with any `non_linearity` that
//! is known here. Prefix tuning is `pre-layer` with a prefix that does not count as positions. What an option makes different
//! from them is refused by its name.

mod bottlenecks;
mod prefix;

use std::{collections::BTreeMap, path::Path};

use lora_core::{
    Tensor,
    peft::{Adapted, Base, Options, SiteKind},
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

/// An adapter as it was read: a method of the table, its options, and tensors by our names.
struct Read {
    method: &'static str,
    options: Options,
    tensors: BTreeMap<String, Tensor>,
}

/// Refuses options that are there with other values than these.
fn required(raw: &RawConfig, config: &Map<String, Value>, fixed: &[(&'static str, Value)]) -> Result<()> {
    let same = |found: &Value, wanted: &Value| match (found.as_f64(), wanted.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => found == wanted,
    };
    for (key, wanted) in fixed {
        if let Some(found) = config.get(*key).filter(|found| !same(found, wanted)) {
            return Err(raw.error("config", format_args!("{key} = {found}: methods here have {wanted}")));
        }
    }
    Ok(())
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
    let name = raw.str("name")?.ok_or_else(|| raw.error("name", "missing; the tensors are named after it"))?;
    let config = match raw.value("config") {
        Some(Value::Object(config)) => config,
        Some(other) => {
            return Err(raw.error("config", format_args!("expected the options of an adapter, found {other}")));
        }
        None => return Err(raw.error("config", "missing; this is no configuration of AdapterHub")),
    };
    let file = WEIGHTS.iter().map(|f| dir.join(f)).find(|f| f.is_file()).unwrap_or_else(|| dir.join(WEIGHTS[1]));
    let read = match config.get("architecture") {
        None | Some(Value::Null) => bottlenecks::read,
        Some(found) if found == prefix::ARCHITECTURE => prefix::read,
        Some(found) => {
            let why = "only bottleneck adapters and prefix tuning are converted";
            return Err(raw.error("config", format_args!("architecture = {found}: {why}")));
        }
    };
    let state = tensors_of(&file)?;
    let mut theirs: BTreeMap<String, Tensor> = state.tensors;
    let Read { method, options, mut tensors } = read(&raw, config, outline, name, &mut theirs)?;
    let strange: Vec<String> = theirs.into_keys().chain(state.others).collect();
    let bad = |problem: String| Error::Weights { file: file.clone(), problem };
    if !strange.is_empty() {
        return Err(bad(format!("tensors that method {method} has no place for on this base: {}", List(&strange))));
    }
    if tensors.is_empty() {
        return Err(bad(format!("it has no tensors of an adapter called {name} on this base's modules")));
    }
    let head = HEAD.iter().map(|f| dir.join(f)).find(|f| f.is_file());
    if !outline.modules_to_save.is_empty() {
        let Some(head) = &head else {
            return Err(bad(format!("the base is a classifier, and {} with its head is missing", HEAD[1])));
        };
        let state = tensors_of(head)?;
        let (own, strange): (BTreeMap<_, _>, BTreeMap<_, _>) =
            state.tensors.into_iter().partition(|(name, _)| outline.is_saved_module(name));
        let strange: Vec<String> = strange.into_keys().chain(state.others).collect();
        if !strange.is_empty() {
            tracing::warn!("{}: not of this base's head, and left out: {}", head.display(), List(&strange));
        }
        tensors.extend(own);
    } else if let Some(head) = &head {
        tracing::warn!("{}: left out, as this base has no head of its own to train", head.display());
    }
    let row = lora_core::peft::find(method)?;
    let mut adapted = Adapted::new(&*(row.build)(&options)?, base, &Device::Cpu, DType::F32, 0)?;
    adapted.load_adapter_tensors(tensors).map_err(|e| bad(e.to_string()))?;
    Ok((method, options, adapted))
}

/// Writes an adapter as AdapterHub's of this name into a folder; a classifier's head beside it, under the names that the class
/// of the model has for it.
///
/// # Errors
/// [`Error::Adapters`] for a method that AdapterHub does not have, a prefix that counts as positions, and norms that train
/// beside it; those of [`AdapterFile::attach`] and of writing.
pub fn to_adapterhub(file: &AdapterFile, base: &dyn Base, name: &str, dir: &Path) -> Result<()> {
    let refused = |problem: String| Err(Error::Adapters { problem });
    if !bottlenecks::writes(file.method) && file.method != prefix::METHOD {
        return refused(format!(
            "method {} has no counterpart in AdapterHub; adapter-h, adapter-p and pre-layer have one",
            file.method
        ));
    }
    if name.is_empty() || name.contains('.') {
        return refused(format!("an adapter cannot be called {name:?} in AdapterHub: its tensors are named after it"));
    }
    let adapted = file.attach(base, &Device::Cpu)?;
    let outline = base.outline();
    if let Some(tensor) = adapted.trained().find(|name| !outline.is_saved_module(name)) {
        return refused(format!("it has trained {tensor} as a whole, which AdapterHub's adapter has no place for"));
    }
    let (head, ours): (BTreeMap<String, Tensor>, BTreeMap<String, Tensor>) =
        adapted.adapter_tensors()?.into_iter().partition(|(name, _)| outline.is_saved_module(name));
    let width = outline.sites.iter().find_map(|s| match s.kind {
        SiteKind::Sublayer { width, .. } => Some(width),
        _ => None,
    });
    let width = width.unwrap_or(0);
    let (config, tensors) = match file.method {
        prefix::METHOD => prefix::write(file, outline, name, ours)?,
        _ => bottlenecks::write(file, outline, name, width, ours)?,
    };
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
    if !head.is_empty() {
        write_state_dict(&dir.join(HEAD[1]), &head)?;
    }
    files::write_bytes(&dir.join(CONFIG), format!("{text:#}\n").as_bytes())
}
