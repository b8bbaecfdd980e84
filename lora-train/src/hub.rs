//! Model folders: local ones, and ids of the Hugging Face hub.

use std::path::{Path, PathBuf};

use lora_model::{adapter, config::CONFIG_FILE};

use crate::{Error, Result};

/// The folder of a model: a local folder as it is (the network is not touched), else the id `OWNER/NAME` (or `NAME`) of
/// the Hugging Face hub, whose files are fetched into its usual cache. Of a model that is wholly in the cache the network
/// is not asked.
///
/// # Errors
/// Neither a model's folder nor an id; a download that fails; [`lora_model::Error::Pickled`] for a repository without
/// safetensors.
pub fn resolve(model: &Path) -> Result<PathBuf> {
    if model.as_os_str().is_empty() {
        return Err(Error::option("model", "", "name a model's folder or an id of the Hugging Face hub"));
    }
    let shown = model.display();
    if model.is_dir() {
        return match () {
            () if model.join(CONFIG_FILE).exists() => Ok(model.into()),
            () if adapter::is_adapter(model) => Err(Error::option("model", shown, ADAPTER)),
            () => Err(Error::option("model", shown, NO_MODEL)),
        };
    }
    if model.exists() {
        return Err(Error::option("model", shown, "is a file; name the folder that holds config.json and the weights"));
    }
    match model.to_str().filter(|id| is_id(id)) {
        Some(id) => fetch(id),
        None => Err(Error::option("model", shown, "there is no such folder")),
    }
}

const ADAPTER: &str = "is an adapter: give the folder of its base as --model, and this one as --adapter (or to train on \
                       from it, as --init-adapter)";
const NO_MODEL: &str = "holds no config.json, so it is no model's folder; a model's folder holds config.json, its weights \
                        as model.safetensors (or model.safetensors.index.json with its shards), and tokenizer.json (or \
                        vocab.json with merges.txt)";

/// `NAME` or `OWNER/NAME`, of the characters that the hub allows.
fn is_id(id: &str) -> bool {
    let part = |p: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !p.is_empty() && !p.starts_with(['.', '-']) && p.chars().all(allowed)
    };
    let parts: Vec<&str> = id.split('/').collect();
    parts.len() <= 2 && parts.into_iter().all(part)
}

#[cfg(not(feature = "hub"))]
fn fetch(id: &str) -> Result<PathBuf> {
    let why = "there is no such folder, and this build does not fetch from the hub (feature `hub`)";
    Err(Error::option("model", id, why))
}

#[cfg(feature = "hub")]
fn fetch(id: &str) -> Result<PathBuf> {
    if let Some(dir) = cached(id) {
        return Ok(dir);
    }
    let failed = |what: &str, e: &dyn std::fmt::Display| {
        let why = format!("there is no such folder, and fetching {what} of this id from the hub failed: {e}");
        Error::option("model", id, why)
    };
    let api = hf_hub::api::sync::ApiBuilder::from_env().build().map_err(|e| failed("files", &e))?;
    let repo = api.model(id.to_owned());
    let info = repo.info().map_err(|e| failed("the list of files", &e))?;
    let names: Vec<String> = info.siblings.into_iter().map(|s| s.rfilename).collect();
    let (weights, others) = wanted(&names);
    if !names.iter().any(|name| name == CONFIG_FILE) {
        return Err(failed(CONFIG_FILE, &"the repository does not have it"));
    }
    if weights.is_empty() {
        return Err(match names.iter().find(|name| is_pickled(name)) {
            Some(name) => lora_model::Error::Pickled { file: Path::new(id).join(name) }.into(),
            None => failed("weights", &"the repository has no model.safetensors"),
        });
    }
    // The configuration last: a cache that has it has all, if no other program fetched it.
    for name in others.into_iter().chain(weights) {
        repo.get(name).map_err(|e| failed(name, &e))?;
    }
    let config = repo.get(CONFIG_FILE).map_err(|e| failed(CONFIG_FILE, &e))?;
    Ok(config.parent().unwrap_or(Path::new("")).to_owned())
}

/// The model's folder in the cache, when it is there with a configuration, whole weights and a tokenizer.
#[cfg(feature = "hub")]
fn cached(id: &str) -> Option<PathBuf> {
    let config = hf_hub::Cache::from_env().model(id.to_owned()).get(CONFIG_FILE)?;
    let dir = config.parent()?;
    let holds = |name: &str| dir.join(name).exists();
    let tokenizer = holds("tokenizer.json") || holds("vocab.json") && holds("merges.txt");
    (tokenizer && lora_model::checkpoint::Checkpoint::open(dir).is_ok()).then(|| dir.to_owned())
}

/// Of a repository's files those that make a model: its weights, and those of its tokenizer.
#[cfg(feature = "hub")]
fn wanted(names: &[String]) -> (Vec<&str>, Vec<&str>) {
    let names = names.iter().map(String::as_str);
    let weights = |name: &&str| name.starts_with("model") && (name.ends_with(".safetensors") || *name == INDEX);
    (names.clone().filter(weights).collect(), names.filter(|n| lora_model::tokenizer::FILES.contains(n)).collect())
}

#[cfg(feature = "hub")]
const INDEX: &str = "model.safetensors.index.json";

/// Whether a file of a repository is of the kind that [`lora_model::Error::Pickled`] tells how to convert.
#[cfg(feature = "hub")]
fn is_pickled(name: &str) -> bool {
    name.starts_with("pytorch_model") && name.ends_with(".bin")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_told_from_paths() {
        for id in ["gpt2", "openai-community/gpt2", "a/b.c_d-1"] {
            assert!(is_id(id), "{id}");
        }
        for path in ["./gpt2", "/models/gpt2", "a/b/c", "../x", "a/", "~/x", ""] {
            assert!(!is_id(path), "{path}");
        }
        let dir = tempfile::tempdir().unwrap();
        let refused = |part: &str| {
            let e = resolve(dir.path()).unwrap_err().to_string();
            assert!(e.contains(part), "{e}");
        };
        refused("no model's folder");
        std::fs::write(dir.path().join("adapter_config.json"), "").unwrap();
        refused("is an adapter");
        std::fs::write(dir.path().join("config.json"), "").unwrap();
        assert_eq!(resolve(dir.path()).unwrap(), dir.path(), "a model's folder is taken as it is");
        assert!(resolve(Path::new("./no such folder")).unwrap_err().to_string().contains("no such folder"));
    }
}
