//! Checkpoints: everything that a run's continuation depends on, in one folder that is whole or not there.
//!
//! ```text
//! OUT/checkpoints/step-00000040/
//!   state.json                  step, seed, place in the data, data's fingerprint, the run's configuration
//!   state.safetensors           trainable.NAME, exp_avg.NAME, exp_avg_sq.NAME
//!   adapter_config.json, …      the adapter as PEFT reads it (methods that have one)
//! ```
//! A folder is written under a temporary name, its files flushed to the disk, and then renamed.

use std::{
    fs,
    path::{Path, PathBuf},
};

use lora_core::Tensor;
use lora_model::{
    checkpoint::{TensorFile, TensorSpec, write_tensors},
    files,
};
use serde::{Deserialize, Serialize};

use crate::{
    Error, Result, TrainConfig, Trainer,
    data::{Dataset, Position},
};

/// The folder below a run's output.
pub const FOLDER: &str = "checkpoints";
/// The file that says what a checkpoint is.
pub const STATE: &str = "state.json";
/// The file of a checkpoint's tensors.
pub const TENSORS: &str = "state.safetensors";
const FORMAT: u32 = 1;

/// What stands in `state.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    format: u32,
    /// Steps done.
    pub step: u64,
    /// Where the next step starts in the data. Order and dropout are functions of the seed and this place, so that no
    /// generator has any other state.
    position: Position,
    seed: u64,
    /// The training data.
    pub data: Fingerprint,
    /// The run's configuration.
    pub config: TrainConfig,
}

/// What tells whether data is still the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Number of sequences.
    pub sequences: usize,
    /// Number of tokens.
    pub tokens: usize,
    /// FNV-1a over all tokens and target boundaries, in hexadecimal when written: JSON numbers end at 2⁵³.
    #[serde(with = "hexadecimal")]
    hash: u64,
}

impl Fingerprint {
    pub(crate) fn of(data: &Dataset) -> Fingerprint {
        let (mut tokens, mut hash) = (0, 0xcbf2_9ce4_8422_2325u64);
        for s in &data.sequences {
            tokens += s.tokens.len();
            for word in s.tokens.iter().copied().chain([s.targets_from as u32]) {
                for byte in word.to_le_bytes() {
                    hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
                }
            }
        }
        Fingerprint { sequences: data.sequences.len(), tokens, hash }
    }
}

mod hexadecimal {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(v: &u64, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&format!("{v:016x}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
        u64::from_str_radix(&String::deserialize(d)?, 16).map_err(D::Error::custom)
    }
}

/// Writes a checkpoint of `trainer` below the run's output folder; `export` adds the adapter. Then removes the oldest,
/// when more than `config.keep` are there.
pub(crate) fn save(
    out: &Path,
    trainer: &Trainer,
    position: Position,
    data: Fingerprint,
    config: &TrainConfig,
    export: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let folder = out.join(FOLDER);
    let name = format!("step-{:08}", trainer.done);
    let (partial, whole) = (folder.join(format!(".partial-{name}")), folder.join(name));
    remove(&partial)?;
    files::create_folder(&partial)?;
    let written = (|| {
        export(&partial)?;
        write_state_tensors(&partial.join(TENSORS), trainer)?;
        let state =
            State { format: FORMAT, step: trainer.done, position, seed: config.seed, data, config: config.clone() };
        let text = serde_json::to_string_pretty(&state).expect("a configuration is plain data");
        files::write_bytes(&partial.join(STATE), text.as_bytes())?;
        remove(&whole)?;
        fs::rename(&partial, &whole).map_err(|e| io("rename", &partial, e))?;
        sync_folder(&folder)
    })();
    if let Err(e) = written {
        // The disk may be full: give back what the half-written folder takes. The first error is the one to report.
        let _ = fs::remove_dir_all(&partial);
        return Err(e);
    }
    if config.keep > 0 {
        let all = list(out)?;
        for (_, old) in &all[..all.len().saturating_sub(config.keep)] {
            remove(old)?;
        }
    }
    Ok(whole)
}

fn write_state_tensors(path: &Path, trainer: &Trainer) -> Result<()> {
    let params = &trainer.adapted.params;
    let mut specs = Vec::new();
    for kind in KINDS {
        specs.extend(params.ids().map(|id| TensorSpec::new(format!("{kind}.{}", params.name(id)), params.shape(id))));
    }
    let flat = [params.flat(), trainer.moments[0].clone(), trainer.moments[1].clone()];
    let fetch = |name: &str| {
        let (kind, name) = name.split_once('.').expect("made above");
        let kind = KINDS.iter().position(|k| *k == kind).expect("one of the kinds");
        let id = params.find(name).expect("a parameter's name");
        let count = params.count();
        // Rows of one element, so that a range of them is a view.
        Ok(flat[kind].clone().reshape(&[count, 1]).rows_in(params.range(id)).reshape(params.shape(id)))
    };
    Ok(write_tensors(path, &[("format", "pt")], &specs, fetch)?)
}

const KINDS: [&str; 3] = ["trainable", "exp_avg", "exp_avg_sq"];

/// The whole checkpoints below a run's output folder, oldest first, with the steps that each has done.
///
/// # Errors
/// A folder that cannot be read.
pub fn list(out: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let folder = out.join(FOLDER);
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(io("read", &folder, e)),
    };
    let mut all = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| io("read", &folder, e))?;
        let name = entry.file_name();
        if let Some(step) = name.to_str().and_then(|n| n.strip_prefix("step-")).and_then(|n| n.parse().ok()) {
            all.push((step, entry.path()));
        }
    }
    all.sort();
    Ok(all)
}

/// The newest checkpoint below a run's output folder, and what half-written ones left behind is removed.
pub(crate) fn newest(out: &Path) -> Result<Option<PathBuf>> {
    if let Ok(entries) = fs::read_dir(out.join(FOLDER)) {
        for entry in entries.flatten() {
            if entry.file_name().to_str().is_some_and(|n| n.starts_with(".partial-")) {
                remove(&entry.path())?;
            }
        }
    }
    Ok(list(out)?.pop().map(|(_, path)| path))
}

/// Reads `state.json` of a checkpoint.
///
/// # Errors
/// A file that is missing, damaged, or of another format.
pub fn state(checkpoint: &Path) -> Result<State> {
    let path = checkpoint.join(STATE);
    let text = files::read_to_string(&path)?;
    let state: State =
        serde_json::from_str(&text).map_err(|e| Error::Checkpoint { path: path.clone(), problem: e.to_string() })?;
    if state.format != FORMAT {
        let problem = format!("format {} is not {FORMAT}, which this version reads", state.format);
        return Err(Error::Checkpoint { path, problem });
    }
    Ok(state)
}

/// Puts `trainer` into the state of a checkpoint.
///
/// # Errors
/// A configuration or data other than the run's, a damaged file.
pub(crate) fn load(
    checkpoint: &Path,
    trainer: &mut Trainer,
    position: impl Fn(u64) -> Position,
    data: Fingerprint,
    config: &TrainConfig,
) -> Result<()> {
    let problem = |problem: String| Err(Error::Checkpoint { path: checkpoint.into(), problem });
    let state = state(checkpoint)?;
    if let Some((key, old, new)) = config.difference(&state.config) {
        return problem(format!(
            "the run was started with {key} = {old}, and is to be continued with {new}; \
             give the same value, or start anew in another folder"
        ));
    }
    if data != state.data || position(state.step) != state.position {
        return problem(format!(
            "the data has changed since the run began: {} sequences of {} tokens then, {} of {} now (or other tokens); \
             give the same file, or start anew in another folder",
            state.data.sequences, state.data.tokens, data.sequences, data.tokens
        ));
    }
    let file = TensorFile::open(&checkpoint.join(TENSORS))?;
    let params = trainer.adapted.params.clone();
    let mut specs = Vec::new();
    for kind in KINDS {
        specs.extend(params.ids().map(|id| TensorSpec::new(format!("{kind}.{}", params.name(id)), params.shape(id))));
    }
    file.expect(&specs)?;
    let read = |kind: &str, id| -> Result<Tensor> {
        let name = format!("{kind}.{}", params.name(id));
        Ok(file.tensor(&name, params.shape(id), &params.device())?)
    };
    for id in params.ids() {
        trainer.adapted.params.set(id, &read(KINDS[0], id)?)?;
        for (moment, kind) in trainer.moments.iter_mut().zip(&KINDS[1..]) {
            let value = read(kind, id)?.reshape(&[1, params.range(id).len()]);
            lora_kernels::axpby(1.0, value.mat(), 0.0, moment.make_mut()?.cols_in(params.range(id)))?;
        }
    }
    trainer.done = state.step;
    Ok(())
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(io("remove", folder, e)),
        _ => Ok(()),
    }
}

fn sync_folder(folder: &Path) -> Result<()> {
    fs::File::open(folder).and_then(|f| f.sync_all()).map_err(|e| io("flush", folder, e))
}

fn io(action: &'static str, path: &Path, reason: std::io::Error) -> Error {
    lora_model::Error::Io { action, path: path.into(), reason }.into()
}
