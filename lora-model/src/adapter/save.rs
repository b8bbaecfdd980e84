use std::{collections::BTreeMap, fs, io::ErrorKind, path::Path};

use lora_core::{
    Tensor,
    lowrank::Layout,
    peft::{Adapted, Base, LoraConfig, Options, Outline, find},
};
use lora_kernels::DType;
use serde_json::json;

use super::{
    ARCHITECTURE_KEY, CONFIG_FILE, FINGERPRINT_KEY, PARTS_KEY, PREFIX, WEIGHTS_FILE,
    config::{self, PeftConfig},
    own,
    peft::Parts,
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
    let (text, parts) = match row.name {
        "lora" => peft(options, &tensors, base.outline(), base_model_name),
        _ => (own::text(row, options, base.outline(), base_model_name), None),
    };
    let fingerprint = fingerprint::of_base(base)?;
    let mut metadata = vec![("format", "pt"), (FINGERPRINT_KEY, fingerprint.as_str())];
    if row.name == "lora" {
        metadata.push((ARCHITECTURE_KEY, &base.outline().architecture));
    }
    metadata.extend(parts.as_deref().map(|p| (PARTS_KEY, p)));
    let specs: Vec<TensorSpec> =
        tensors.iter().map(|(name, t)| TensorSpec::new(format!("{PREFIX}{name}"), t.shape())).collect();
    let write = || {
        write_tensors(&dir.join(WEIGHTS_FILE), &metadata, &specs, |name| {
            let own = name.strip_prefix(PREFIX).unwrap_or(name);
            Ok(tensors[own].to_dtype(DType::F32)?)
        })
    };

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

/// PEFT's configuration of LoRA, and the parts of fused projections where there are some.
fn peft(
    options: &Options,
    tensors: &BTreeMap<String, Tensor>,
    outline: &Outline,
    base_model_name: Option<&str>,
) -> (String, Option<String>) {
    let mut config = LoraConfig::from(options);
    if config.targets.is_empty() {
        config.targets.clone_from(&outline.default_targets);
    }
    let mut sites = BTreeMap::new();
    for (name, a) in tensors {
        if let Some(site) = name.strip_suffix(".lora_A.weight") {
            assert_eq!(a.rows() % config.rank, 0, "{name} has rank {}, not of {}", a.rows(), config.rank);
            sites.insert(site, a.rows() / config.rank);
        }
    }
    assert!(!sites.is_empty(), "there is no adapter to save");
    // PEFT's flag for weights stored [in, out].
    let transposed =
        outline.linear_sites().any(|(s, l)| sites.contains_key(s.name.as_str()) && l.layout == Layout::InOut);
    let text = PeftConfig::of(&config, &sites, base_model_name.map(str::to_owned), outline).text(transposed);
    let parts = config::has_parts(&config, sites.keys().copied())
        .then(|| json!(Parts { targets: config.targets.clone(), rank: config.rank, alpha: config.alpha }).to_string());
    (text, parts)
}
