//! Checkpoints: everything that a run's continuation depends on, in one folder that is whole or not there.
//!
//! ```text
//! OUT/checkpoints/step-00000040/
//!   state.json                  step, seed, place in the data, fingerprint of data and base, the run's configuration
//!   state.safetensors           trainable.NAME, exp_avg.NAME, exp_avg_sq.NAME, and what a method measures
//!   adapter_config.json, …      the adapter as PEFT reads it (methods that have one)
//! ```
//! A folder is written under a temporary name, its files flushed to the disk, and then renamed.
//!
//! [`train`](crate::train) writes and reads them; whoever does single steps with a [`Trainer`] can do so too ([`save`],
//! [`newest`], [`load`]).

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use lora_core::{Params, Tensor, hash::fnv1a};
use lora_kernels::Device;
use lora_model::{
    Model,
    checkpoint::{TensorFile, TensorSpec, write_tensors},
    files, fingerprint,
};
use serde::{Deserialize, Serialize};

use crate::{
    Error, Result, TrainConfig, Trainer,
    data::{Dataset, Goal, Position},
};

/// The folder below a run's output.
pub const FOLDER: &str = "checkpoints";
/// The file that says what a checkpoint is.
pub const STATE: &str = "state.json";
/// The file of a checkpoint's tensors.
pub const TENSORS: &str = "state.safetensors";
const FORMAT: u32 = 1;
/// How the names of folders begin that are being written or removed.
const PARTIAL: &str = ".partial-";

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
    /// What it was trained on.
    pub inputs: Fingerprint,
    /// The run's configuration.
    pub config: TrainConfig,
    /// What the run took so far.
    #[serde(default)]
    pub spent: Spent,
    /// Loss of the last step.
    #[serde(default)]
    pub loss: Option<f64>,
}

/// What the steps of a run took, in all its lives; steps that were done again count once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spent {
    /// Seconds.
    pub seconds: f64,
    /// Tokens.
    pub tokens: u64,
    /// Most resident memory of a process of the run, in bytes; `None` where the system does not tell.
    pub peak_memory: Option<u64>,
}

/// What tells whether a run's inputs are still the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Sequences of the data.
    pub sequences: usize,
    /// Their tokens.
    pub tokens: usize,
    /// FNV-1a over all tokens and target boundaries, in hexadecimal when written: JSON numbers end at 2⁵³.
    #[serde(with = "hexadecimal")]
    data: u64,
    /// That of the base ([`fingerprint::of_model`]), on any device and in any type the same.
    #[serde(with = "hexadecimal")]
    base: u64,
    /// Those of the adapters that the run begins with or combines.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    adapters: Vec<String>,
}

impl Fingerprint {
    /// That of data and a base.
    ///
    /// # Errors
    /// What reading from a device can cause.
    pub fn of(data: &Dataset, base: &dyn Model) -> Result<Fingerprint> {
        let tokens = data.sequences.iter().map(|s| s.tokens.len()).sum();
        let words = data.sequences.iter().flat_map(|s| {
            let (goal, second, runs) = match &s.goal {
                Goal::After(from) => (*from as u32, None, &[][..]),
                Goal::Within(runs) => (runs.len() as u32, None, &runs[..]),
                Goal::Label(label) => (*label, Some(s.second_from as u32), &[][..]),
                Goal::Value(value) => (value.to_bits(), Some(s.second_from as u32), &[][..]),
            };
            let runs = runs.iter().flat_map(|run| [run.start as u32, run.end as u32]);
            s.tokens.iter().copied().chain([goal]).chain(second).chain(runs)
        });
        let hash = fnv1a(words.flat_map(u32::to_le_bytes));
        let sequences = data.sequences.len();
        Ok(Fingerprint { sequences, tokens, data: hash, base: fingerprint::of_model(base)?, adapters: Vec::new() })
    }

    /// With the folders of the adapters that the run begins with or combines.
    ///
    /// # Errors
    /// A folder that cannot be read.
    pub fn with_adapters<'a>(self, dirs: impl IntoIterator<Item = &'a PathBuf>) -> Result<Fingerprint> {
        let adapters = dirs.into_iter().map(|dir| Ok(fingerprint::of_folder(dir)?)).collect::<Result<_>>()?;
        Ok(Fingerprint { adapters, ..self })
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

/// Writes a checkpoint of `trainer` below the run's output folder; `export` may add files to its folder, such as the adapter.
/// Then removes the oldest, when more than the configuration's `keep` are there. Gives the folder.
///
/// # Errors
/// [`Error::Diverged`] when a parameter or a moment is no number: the checkpoints so far are kept. What `export` and writing
/// can cause.
pub fn save(
    out: &Path,
    trainer: &Trainer,
    inputs: &Fingerprint,
    spent: Spent,
    export: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    trainer.check_finite()?;
    let config = trainer.config;
    let folder = out.join(FOLDER);
    let name = format!("step-{:08}", trainer.done);
    let (partial, whole) = (folder.join(format!("{PARTIAL}{name}")), folder.join(&name));
    remove(&partial)?;
    files::create_folder(&partial)?;
    let written = (|| {
        export(&partial)?;
        write_state_tensors(&partial.join(TENSORS), trainer)?;
        let state = State {
            format: FORMAT,
            step: trainer.done,
            position: trainer.sampler().position(trainer.done),
            seed: config.seed,
            inputs: inputs.clone(),
            config: config.clone(),
            spent,
            loss: trainer.loss,
        };
        let text = serde_json::to_string_pretty(&state).expect("a configuration is plain data");
        files::write_bytes(&partial.join(STATE), text.as_bytes())?;
        // A damaged folder of this step, which was passed over, gives way; it is never removed before the new one is whole.
        let damaged = folder.join(format!("{PARTIAL}damaged-{name}"));
        remove(&damaged)?;
        if whole.exists() {
            fs::rename(&whole, &damaged).map_err(|e| io("rename", &whole, e))?;
        }
        fs::rename(&partial, &whole).map_err(|e| io("rename", &partial, e))?;
        sync_folder(&folder)?;
        remove(&damaged)
    })();
    if let Err(e) = written {
        // The disk may be full: give back what the half-written folder takes. The first error is the one to report.
        let _ = fs::remove_dir_all(&partial);
        return Err(e);
    }
    if config.keep > 0 {
        // A newer one is of a life that was lost: it was passed over, and counts for nothing.
        let all: Vec<_> = list(out)?.into_iter().filter(|(step, _)| *step <= trainer.done).collect();
        for (_, old) in &all[..all.len().saturating_sub(config.keep)] {
            remove(old)?;
        }
    }
    Ok(whole)
}

fn write_state_tensors(path: &Path, trainer: &Trainer) -> Result<()> {
    let params = &trainer.adapted.params;
    let chosen = trainer.adapted.budget().map_or(Ok(Vec::new()), |budget| budget.state())?;
    let flat = [params.flat(), trainer.moments[0].clone(), trainer.moments[1].clone()];
    let fetch = |name: &str| {
        if let Some((_, t)) = chosen.iter().find(|(own, _)| own == name) {
            return Ok(t.clone());
        }
        let (kind, name) = name.split_once('.').expect("made by `specs`");
        let kind = KINDS.iter().position(|k| *k == kind).expect("one of the kinds");
        let id = params.find(name).expect("a parameter's name");
        let count = params.count();
        // Rows of one element, so that a range of them is a view.
        Ok(flat[kind].clone().reshape(&[count, 1]).rows_in(params.range(id)).reshape(params.shape(id)))
    };
    Ok(write_tensors(path, &[("format", "pt")], &specs(params, &chosen), fetch)?)
}

/// Names and shapes of the tensors of a checkpoint, with those that a method's choices depend on.
fn specs(params: &Params, chosen: &[(String, Tensor)]) -> Vec<TensorSpec> {
    let of = |kind: &'static str| {
        params.ids().map(move |id| TensorSpec::new(format!("{kind}.{}", params.name(id)), params.shape(id)))
    };
    let chosen = chosen.iter().map(|(name, t)| TensorSpec::new(name, t.shape()));
    KINDS.into_iter().flat_map(of).chain(chosen).collect()
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

/// The newest whole checkpoint below a run's output folder, and a note on each newer one that is damaged and was passed
/// over. What half-written ones left behind is removed.
///
/// # Errors
/// A folder that cannot be read, or in which nothing can be removed.
pub fn newest(out: &Path) -> Result<(Option<PathBuf>, Vec<String>)> {
    if let Ok(entries) = fs::read_dir(out.join(FOLDER)) {
        for entry in entries.flatten() {
            if entry.file_name().to_str().is_some_and(|n| n.starts_with(PARTIAL)) {
                remove(&entry.path())?;
            }
        }
    }
    let mut notes = Vec::new();
    for (_, path) in list(out)?.into_iter().rev() {
        match state(&path).and_then(|_| Ok(TensorFile::open(&path.join(TENSORS))?)) {
            Ok(_) => return Ok((Some(path), notes)),
            Err(e) => notes.push(format!("{} is no whole checkpoint and is passed over: {e}", path.display())),
        }
    }
    Ok((None, notes))
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
    if Duration::try_from_secs_f64(state.spent.seconds).is_err() {
        return Err(Error::Checkpoint { path, problem: format!("{} seconds are no time", state.spent.seconds) });
    }
    Ok(state)
}

/// Puts `trainer` into the state of a checkpoint of the same configuration. Gives what the run took so far.
///
/// # Errors
/// Data or a base other than the run's, a damaged file.
pub fn load(checkpoint: &Path, trainer: &mut Trainer, inputs: &Fingerprint) -> Result<Spent> {
    let problem = |problem: String| Err(Error::Checkpoint { path: checkpoint.into(), problem });
    let state = state(checkpoint)?;
    let (now, then) = (inputs, &state.inputs);
    if now.base != then.base {
        return problem(
            "the base model has changed since the run began; give the same weights, or start anew in another folder"
                .into(),
        );
    }
    if now.adapters != then.adapters {
        return problem(
            "an adapter that the run began with or combines has changed since; give the same one, or start anew in another \
             folder"
                .into(),
        );
    }
    if state.seed != trainer.config.seed {
        return problem(format!("it is of a run with seed {}, not {}; give the same", state.seed, trainer.config.seed));
    }
    if now != then || trainer.sampler().position(state.step) != state.position {
        return problem(format!(
            "the data has changed since the run began: {} sequences of {} tokens then, {} of {} now (or other tokens); \
             give the same file, or start anew in another folder",
            then.sequences, then.tokens, now.sequences, now.tokens
        ));
    }
    let file = TensorFile::open(&checkpoint.join(TENSORS))?;
    let params = trainer.adapted.params.clone();
    let chosen = trainer.adapted.budget().map_or(Ok(Vec::new()), |budget| budget.state())?;
    file.expect(&specs(&params, &chosen))?;
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
    if let Some(budget) = trainer.adapted.budget_mut() {
        let read = |(name, t): (String, Tensor)| {
            let read = file.tensor(&name, t.shape(), &Device::Cpu)?;
            Ok((name, read))
        };
        budget.set_state(&chosen.into_iter().map(read).collect::<Result<_>>()?)?;
    }
    (trainer.done, trainer.loss) = (state.step, state.loss);
    Ok(state.spent)
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
