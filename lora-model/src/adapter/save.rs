use std::{collections::BTreeMap, fs, io::ErrorKind, path::Path};

use lora_core::{
    Tensor,
    lowrank::Layout,
    peft::{Adapted, Base, LoraConfig},
};
use lora_kernels::DType;
use serde_json::json;

use super::{
    CONFIG_FILE, PARTS_KEY, PREFIX, Parts, WEIGHTS_FILE,
    config::{self, PeftConfig},
};
use crate::{
    Error, Result,
    checkpoint::{TensorSpec, write_tensors},
    files,
};

/// Writes the adapter that was made on `base` with `config` into `dir`. The same adapter gives the same bytes.
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
/// When `adapted` has no adapter, or was not made with `config`: full fine-tuning is saved as a model.
pub fn save(
    dir: &Path,
    config: &LoraConfig,
    adapted: &Adapted,
    base: &dyn Base,
    base_model_name: Option<&str>,
) -> Result<()> {
    let tensors: BTreeMap<String, Tensor> = adapted.adapter_tensors()?.into_iter().collect();
    let mut sites = BTreeMap::new();
    for (name, a) in &tensors {
        if let Some(site) = name.strip_suffix(".lora_A.weight") {
            assert_eq!(a.rows() % config.rank, 0, "{name} has rank {}, not of {}", a.rows(), config.rank);
            sites.insert(site, a.rows() / config.rank);
        }
    }
    assert!(!sites.is_empty(), "there is no adapter to save");
    // PEFT's flag for weights stored [in, out].
    let transposed = base.sites().iter().any(|s| sites.contains_key(s.name.as_str()) && s.layout == Layout::InOut);
    let text = PeftConfig::of(config, &sites, base_model_name.map(str::to_owned)).text(transposed);

    let parts = config::has_parts(config, sites.keys().copied())
        .then(|| json!(Parts { targets: config.targets.clone(), rank: config.rank, alpha: config.alpha }).to_string());
    let metadata: Vec<(&str, &str)> =
        [("format", "pt")].into_iter().chain(parts.as_deref().map(|p| (PARTS_KEY, p))).collect();
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
