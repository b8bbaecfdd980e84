//! The demo's base: pretrained once, and kept in a cache.

use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
};

use lora_kernels::Device;
use lora_model::files;
use serde::{Deserialize, Serialize};

use super::{DemoConfig, Pretrained, Stage, Watcher};
use crate::{Encoder, PretrainConfig, RUN_FILE, Result, demo_data, pretrain};

/// What stands beside a base in the cache.
const RECEIPT: &str = "demo.json";

/// By what a base in the cache is recognised as whole.
#[derive(Serialize, Deserialize)]
struct Receipt {
    /// Of the names and contents of all other files.
    hash: String,
    pretrained: Pretrained,
}

/// The folder of the base and how it was made: from the cache, or made now. `None` when the watcher stopped it.
pub(super) fn obtain(
    config: &DemoConfig,
    work: &Path,
    watcher: &mut dyn Watcher,
) -> Result<Option<(PathBuf, Pretrained)>> {
    let prose = demo_data::upstream_text(config.seed, config.prose);
    let pretrain = PretrainConfig { seed: config.seed, ..config.pretrain.clone() };
    let text = work.join("prose.jsonl");
    let make = |out: &Path, watcher: &mut dyn Watcher| {
        watcher.stage(Stage::Pretrain);
        // Each paragraph for itself, without its neighbours, which it has nothing to do with: a sequence that begins
        // after an end of text, as the sentence after a record will.
        let pair = |paragraph| format!("{}\n", serde_json::json!({ "prompt": "", "completion": paragraph }));
        let lines: String = prose.lines().map(pair).collect();
        files::write_bytes(&text, lines.as_bytes())?;
        make(&PretrainConfig { text: vec![text.clone()], out: out.into(), ..pretrain.clone() }, watcher)
    };
    // The key holds all that a base is made from, the text itself included: another one never passes for it.
    let key = hash(|h| (env!("CARGO_PKG_VERSION"), format!("{pretrain:?}"), &prose).hash(h));
    let place = config.cache.as_ref().map(|dir| dir.join(format!("demo-{key}")));
    if let Some(place) = &place
        && let Some(pretrained) = read(place)
    {
        watcher.stage(Stage::Cached);
        return Ok(Some((place.clone(), pretrained)));
    }
    // Made beside its place and moved there whole, so that neither a kill nor another process leaves half of one.
    let partial = place.as_ref().map(|p| p.with_file_name(format!(".demo-{key}.partial-{}", std::process::id())));
    let usable = |partial: &PathBuf| match remove(partial).and_then(|()| Ok(files::create_folder(partial)?)) {
        Ok(()) => true,
        Err(e) => {
            tracing::warn!("{e}: going on without a cache");
            false
        }
    };
    let (Some(place), Some(partial)) = (place, partial.filter(usable)) else {
        let out = work.join("base");
        return Ok(make(&out, watcher)?.map(|pretrained| (out, pretrained)));
    };
    let made = make(&partial, watcher).and_then(|made| match made {
        Some(pretrained) => put(&partial, &place, pretrained).map(Some),
        None => Ok(None),
    });
    let gone = remove(&partial);
    let made = made?;
    gone?;
    Ok(made.map(|pretrained| (place, pretrained)))
}

/// Pretrains a base in `config.out`.
fn make(config: &PretrainConfig, watcher: &mut dyn Watcher) -> Result<Option<Pretrained>> {
    let summary = pretrain(config, false, watcher)?;
    if summary.interrupted {
        return Ok(None);
    }
    // It tells of a folder and a text that are about to be gone.
    remove(&config.out.join(RUN_FILE))?;
    let model = lora_model::load(&config.out, &Device::Cpu)?;
    Ok(Some(Pretrained {
        parameters: model.tensors().map(|(_, t)| t.len()).sum(),
        vocab_size: model.limits().vocab_size,
        steps: summary.steps,
        loss: summary.loss.unwrap_or(f64::NAN),
        seconds: summary.spent.seconds,
        cached: false,
    }))
}

/// The base in the cache, if it is there and whole.
fn read(place: &Path) -> Option<Pretrained> {
    let receipt: Receipt = serde_json::from_str(&files::read_to_string(&place.join(RECEIPT)).ok()?).ok()?;
    let whole = contents(place).is_ok_and(|hash| hash == receipt.hash);
    // What an older format holds may be whole, and yet not be read.
    let model = lora_model::load(place, &Device::Cpu).ok().filter(|_| whole)?;
    Encoder::from_dir(place, &*model).ok()?;
    Some(Pretrained { cached: true, ..receipt.pretrained })
}

/// Moves a new base to its place, where a damaged one may be, or one that another process has put there meanwhile.
fn put(partial: &Path, place: &Path, pretrained: Pretrained) -> Result<Pretrained> {
    let receipt = Receipt { hash: contents(partial)?, pretrained };
    let text = serde_json::to_string_pretty(&receipt).expect("plain data");
    files::write_bytes(&partial.join(RECEIPT), text.as_bytes())?;
    if read(place).is_none() {
        remove(place)?;
        if let Err(e) = fs::rename(partial, place)
            && read(place).is_none()
        {
            return Err(io("rename", partial, e));
        }
    }
    Ok(receipt.pretrained)
}

fn contents(dir: &Path) -> Result<String> {
    let read = |e| io("read", dir, e);
    let entries = fs::read_dir(dir).map_err(read)?.collect::<std::io::Result<Vec<_>>>().map_err(read)?;
    let mut paths: Vec<PathBuf> = entries.iter().map(fs::DirEntry::path).filter(|p| !p.ends_with(RECEIPT)).collect();
    paths.sort();
    let files = paths.iter().map(|p| Ok((p.file_name(), fs::read(p).map_err(|e| io("read", p, e))?)));
    let files = files.collect::<Result<Vec<_>>>()?;
    Ok(hash(|h| files.hash(h)))
}

fn hash(what: impl FnOnce(&mut DefaultHasher)) -> String {
    let mut hasher = DefaultHasher::new();
    what(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// Removes a file or a folder, if it is there.
fn remove(path: &Path) -> Result<()> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(io("remove", path, e)),
        _ => Ok(()),
    }
}

fn io(action: &'static str, path: &Path, reason: std::io::Error) -> crate::Error {
    lora_model::Error::Io { action, path: path.into(), reason }.into()
}
