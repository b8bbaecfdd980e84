use std::{collections::BTreeMap, fs, io::ErrorKind, path::Path};

use lora_core::{
    Tensor,
    lowrank::Layout,
    peft::{Adapted, Base, Lora, LoraConfig, MethodRow, Modules, Options, Outline, find},
};
use lora_kernels::DType;
use serde_json::json;

use super::{
    ARCHITECTURE_KEY, CONFIG_FILE, FINGERPRINT_KEY, PARTS_KEY, WEIGHTS_FILE,
    config::{self, PeftConfig},
    own,
    peft::{self, Parts},
    types::Kind,
};
use crate::{
    Error, Result,
    checkpoint::{TensorSpec, write_tensors},
    files, fingerprint,
};

/// Writes what `method` (a row of the table) trained on `base` with `options` into `dir`. The same adapter gives the same
/// bytes.
///
/// Whenever the process or the machine stops, the folder then holds the old adapter, the new one, or tensors without a
/// configuration, which nothing loads: the tensors are replaced first, as a whole; the configuration comes last, and an
/// old one that says something else is taken away before (and put back when the tensors cannot be written). The usual
/// case, saving the same training again, keeps the configuration and replaces the tensors in one step.
///
/// # Errors
/// [`Error::Io`] (a full disk, say).
///
/// # Panics
/// When `adapted` trains nothing, or was not made with these options.
pub fn save(
    dir: &Path,
    method: &str,
    options: &Options,
    adapted: &Adapted,
    base: &dyn Base,
    base_model_name: Option<&str>,
) -> Result<()> {
    let tensors: BTreeMap<String, Tensor> = adapted.adapter_tensors()?.into_iter().collect();
    let row = find(method)?;
    let outline = base.outline();
    let kind = Kind::of(row, options, outline);
    let (text, parts) = match kind {
        _ if row.name == "lora" => lora(options, &tensors, outline, base_model_name)?,
        Some(kind) => (kind.text(options, outline, adapted, base_model_name), None),
        None => (own::text(row, options, outline, base_model_name), None),
    };
    let fingerprint = fingerprint::of_base(base)?;
    let mut metadata = metadata(row, options, outline, &fingerprint);
    metadata.extend(parts.as_deref().map(|p| (PARTS_KEY, p)));
    let is_adapted = |site: &str| tensors.contains_key(&format!("{site}.lora_A.weight"));
    let name_of = |name: &str| stored_name(row, options, outline, name, is_adapted);
    let stored: BTreeMap<String, &Tensor> = tensors.iter().map(|(name, t)| (name_of(name), t)).collect();
    let specs: Vec<TensorSpec> = stored.iter().map(|(name, t)| TensorSpec::new(name.clone(), t.shape())).collect();
    let write =
        || write_tensors(&dir.join(WEIGHTS_FILE), &metadata, &specs, |name| Ok(stored[name].to_dtype(DType::F32)?));

    files::create_folder(dir)?;
    let path = dir.join(CONFIG_FILE);
    let old = match fs::read(&path) {
        Ok(bytes) => Some(bytes),
        Err(e) if e.kind() == ErrorKind::NotFound => None,
        Err(e) => return Err(Error::io("read", &path, e)),
    };
    match old {
        Some(old) if old == text.as_bytes() => write(),
        Some(old) => {
            fs::remove_file(&path).map_err(|e| Error::io("remove", &path, e))?;
            if let Err(e) = write() {
                // The old tensors are still there. Best effort: the first error is the one worth telling.
                let _ = files::write_bytes(&path, &old);
                return Err(e);
            }
            files::write_bytes(&path, text.as_bytes())
        }
        None => {
            write()?;
            files::write_bytes(&path, text.as_bytes())
        }
    }
}

/// The name in a file of a tensor that an adapter of `row` has, where LoRA adapts the modules that `is_adapted` says.
pub fn stored_name(
    row: &MethodRow,
    options: &Options,
    outline: &Outline,
    name: &str,
    is_adapted: impl Fn(&str) -> bool,
) -> String {
    match Kind::of(row, options, outline) {
        Some(kind) => kind.stored_name(name, outline),
        None => peft::stored_name(name, |site| row.name == "lora" && is_adapted(site)),
    }
}

/// What the header of an adapter's file remembers, parts of fused projections aside; with the base's
/// [fingerprint](crate::fingerprint::of_base).
pub fn metadata<'a>(
    row: &MethodRow,
    options: &Options,
    outline: &'a Outline,
    fingerprint: &'a str,
) -> Vec<(&'static str, &'a str)> {
    let architecture = (ARCHITECTURE_KEY, outline.architecture.as_str());
    // Where the configuration is PEFT's, it has no place for this.
    let peft = row.name == "lora" || Kind::of(row, options, outline).is_some();
    [("format", "pt"), (FINGERPRINT_KEY, fingerprint)].into_iter().chain(peft.then_some(architecture)).collect()
}

/// PEFT's configuration of LoRA, and the parts of fused projections where there are some.
fn lora(
    options: &Options,
    tensors: &BTreeMap<String, Tensor>,
    outline: &Outline,
    base_model_name: Option<&str>,
) -> Result<(String, Option<String>)> {
    let mut config = LoraConfig::from(options).saved();
    if config.targets.is_default() {
        config.targets = Modules::Names(outline.default_targets.clone());
    }
    let lora = Lora::new(config.clone())?;
    let mut sites = BTreeMap::new();
    for (name, a) in tensors {
        let site = name.strip_suffix(".lora_A.weight").or_else(|| name.strip_suffix(".lora_embedding_A"));
        if let Some(site) = site {
            let (rank, _) = lora.rank_and_alpha(site)?;
            assert_eq!(a.rows() % rank, 0, "{name} has rank {}, not of {rank}", a.rows());
            sites.insert(site, a.rows() / rank);
        }
    }
    assert!(!sites.is_empty(), "there is no adapter to save");
    // PEFT's flag for weights stored [in, out].
    let transposed =
        outline.linear_sites().any(|(s, l)| sites.contains_key(s.name.as_str()) && l.layout == Layout::InOut);
    let text = PeftConfig::of(&config, &sites, base_model_name.map(str::to_owned), outline)?.text(transposed);
    let parts = config::has_parts(&config, sites.keys().copied()).then(|| json!(Parts::of(&config)).to_string());
    Ok((text, parts))
}
