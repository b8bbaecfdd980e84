//! Model folders: local ones, and ids of the Hugging Face hub.

use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// The files of a model that are fetched from the hub, when it has them.
#[cfg(feature = "hub")]
const FILES: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
];

/// The folder of a model: a local folder as it is (the network is not touched), else the id `OWNER/NAME` (or `NAME`) of
/// the Hugging Face hub, whose files are fetched into its usual cache.
///
/// # Errors
/// Neither a folder nor an id; a download that fails.
pub fn resolve(model: &Path) -> Result<PathBuf> {
    if model.as_os_str().is_empty() {
        return Err(Error::option("model", "", "name a model's folder or an id of the Hugging Face hub"));
    }
    if model.is_dir() {
        return Ok(model.into());
    }
    let shown = model.display();
    if model.exists() {
        return Err(Error::option("model", shown, "is a file; name the folder that holds config.json and the weights"));
    }
    match model.to_str().filter(|id| is_id(id)) {
        Some(id) => fetch(id),
        None => Err(Error::option("model", shown, "there is no such folder")),
    }
}

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
    let failed = |what: &str, e: &dyn std::fmt::Display| {
        let why = format!("there is no such folder, and fetching {what} of this id from the hub failed: {e}");
        Error::option("model", id, why)
    };
    let api = hf_hub::api::sync::ApiBuilder::from_env().build().map_err(|e| failed("files", &e))?;
    let repo = api.model(id.to_owned());
    let info = repo.info().map_err(|e| failed("the list of files", &e))?;
    let names: Vec<String> = info.siblings.into_iter().map(|s| s.rfilename).collect();
    let wanted = |name: &str| FILES.contains(&name) || name.starts_with("model") && name.contains(".safetensors");
    let mut dir = None;
    for name in names.iter().filter(|n| wanted(n)) {
        let path = repo.get(name).map_err(|e| failed(name, &e))?;
        if name == "config.json" {
            dir = path.parent().map(Path::to_owned);
        }
    }
    dir.ok_or_else(|| failed("config.json", &"the repository does not have it"))
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
        let dir = std::env::temp_dir();
        assert_eq!(resolve(&dir).unwrap(), dir, "a folder that exists is taken as it is");
        assert!(resolve(Path::new("./no such folder")).unwrap_err().to_string().contains("no such folder"));
    }
}
