//! What tells whether a base or a data file is still the same, wherever it lies.

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use lora_core::hash::fnv1a;
use serde::{Deserialize, Serialize};

use crate::Result;

/// Fingerprints of what a cell was made from: FNV-1a, in hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inputs {
    /// The base's configuration, tokenizer and weights; of large files, their sizes and samples of them.
    pub base: String,
    /// The training data.
    pub data: String,
    /// The test data; of a run that tries a learning rate there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub test: Option<String>,
}

/// Files up to this size count whole.
const WHOLE: u64 = 64 << 20;
/// Of larger ones, so many pieces of so many bytes.
const PIECES: u64 = 256;
const PIECE: usize = 4096;

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
            .is_some_and(|e| ["json", "safetensors", "model", "txt"].contains(&e));
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
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    if size <= WHOLE {
        let mut bytes = Vec::with_capacity(size as usize);
        file.read_to_end(&mut bytes)?;
        return Ok(fnv1a(bytes));
    }
    let mut bytes = size.to_le_bytes().to_vec();
    let mut piece = [0; PIECE];
    for i in 0..PIECES {
        file.seek(SeekFrom::Start(i * (size - PIECE as u64) / (PIECES - 1)))?;
        file.read_exact(&mut piece)?;
        bytes.extend(piece);
    }
    Ok(fnv1a(bytes))
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
        let large = dir.path().join("large");
        let mut bytes = vec![1; (WHOLE + 10_000) as usize];
        fs::write(&large, &bytes).unwrap();
        let before = file(&large).unwrap();
        *bytes.last_mut().unwrap() = 2;
        fs::write(&large, &bytes).unwrap();
        assert_ne!(before, file(&large).unwrap(), "the end of a large file counts");
    }
}
