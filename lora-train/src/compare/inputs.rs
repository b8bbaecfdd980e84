//! What tells whether a base or a data file is still the same, wherever it lies.

use std::{
    fs::{self, File},
    io::{BufReader, Read},
    path::{Path, PathBuf},
};

use lora_core::hash::fnv1a;
use serde::{Deserialize, Serialize};

use crate::Result;

/// Fingerprints of what a cell was made from: FNV-1a, in hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inputs {
    /// The base's configuration, tokenizer, chat template and weights.
    pub base: String,
    /// The training data.
    pub data: String,
    /// The test data; of a run that tries a learning rate there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub test: Option<String>,
    /// The adapters that the row begins with or combines.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<String>,
}

/// The fingerprint of a file's contents.
pub(super) fn file(path: &Path) -> Result<String> {
    let failed = |reason| lora_model::Error::Io { action: "read", path: path.into(), reason };
    let hash = contents(path).map_err(failed)?;
    Ok(format!("{hash:016x}"))
}

/// The fingerprint of the files in a model's folder, by their names.
pub(super) fn folder(dir: &Path) -> Result<String> {
    let failed = |path: &Path, reason| lora_model::Error::Io { action: "read", path: path.into(), reason };
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| failed(dir, e))? {
        let path = entry.map_err(|e| failed(dir, e))?.path();
        let part = path
            .extension()
            .and_then(|e| e.to_str())
            .is_some_and(|e| ["json", "safetensors", "model", "txt", "jinja"].contains(&e));
        if part && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    let mut bytes = Vec::new();
    for path in &files {
        bytes.extend(path.file_name().unwrap_or_default().as_encoded_bytes());
        bytes.extend(contents(path).map_err(|e| failed(path, e))?.to_le_bytes());
    }
    Ok(format!("{:016x}", fnv1a(bytes)))
}

fn contents(path: &Path) -> std::io::Result<u64> {
    let mut bytes = BufReader::with_capacity(1 << 20, File::open(path)?).bytes();
    let mut failed = None;
    let hash = fnv1a(std::iter::from_fn(|| match bytes.next()? {
        Ok(byte) => Some(byte),
        Err(e) => {
            failed = Some(e);
            None
        }
    }));
    failed.map_or(Ok(hash), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_known_by_its_files_not_by_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let of = |name: &str, files: &[(&str, &[u8])]| {
            let dir = dir.path().join(name);
            fs::create_dir(&dir).unwrap();
            files.iter().for_each(|(name, bytes)| fs::write(dir.join(name), bytes).unwrap());
            folder(&dir).unwrap()
        };
        let a = of("a", &[("config.json", b"{}"), ("model.safetensors", b"12")]);
        assert_eq!(a, of("b", &[("model.safetensors", b"12"), ("config.json", b"{}"), ("README.md", b"x")]));
        assert_ne!(a, of("c", &[("model.safetensors", b"13"), ("config.json", b"{}")]));
        assert_ne!(a, of("d", &[("config.json", b"{}")]));
        assert!(folder(&dir.path().join("none")).unwrap_err().to_string().contains("none"));
        let template: [(&str, &[u8]); 3] =
            [("config.json", b"{}"), ("model.safetensors", b"12"), ("chat_template.jinja", b"x")];
        assert_ne!(a, of("e", &template));
        let one = dir.path().join("one");
        let of_bytes = |bytes: &[u8]| {
            fs::write(&one, bytes).unwrap();
            file(&one).unwrap()
        };
        assert_ne!(of_bytes(&[1; 100_000]), of_bytes(&[&[1; 99_999][..], &[2]].concat()));
    }
}
