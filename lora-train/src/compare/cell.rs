//! One run of a comparison, as it is kept.

use std::path::Path;

use lora_model::files;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::inputs::Inputs;
use crate::{Error, Result, TrainConfig, metrics::Metric, resources};

/// A finished run: what it was made from and what came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// How it was trained, without the places of files.
    pub settings: TrainConfig,
    /// The flags it was judged with.
    #[serde(default, skip_serializing_if = "toml::Table::is_empty")]
    pub eval: toml::Table,
    /// What it was made from.
    pub inputs: Inputs,
    /// When and on what it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made: Option<Made>,
    /// What came of it; `None` when training diverged.
    pub trained: Option<Trained>,
}

/// When and on what a cell was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    /// The day, in UTC.
    pub date: String,
    /// The device where that is another, the processor and the threads.
    pub machine: String,
    /// The version of this program.
    pub version: String,
}

impl Made {
    /// Now, on this machine.
    pub(super) fn now(machine: &str) -> Made {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Made { date: resources::today(), machine: machine.to_owned(), version }
    }
}

/// What came of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trained {
    /// Trainable scalars.
    pub trainable: usize,
    /// Optimiser steps.
    pub steps: u64,
    /// Seconds of the steps.
    pub seconds: f64,
    /// Tokens per second of the steps.
    pub tokens_per_s: Option<f64>,
    /// Most resident memory while training, in bytes; `None` on a device, and where the system does not tell.
    pub peak_memory: Option<u64>,
    /// Bytes of the trained weights on the disk; `None` for a run that only tried a learning rate.
    pub checkpoint_bytes: Option<u64>,
    /// Loss and metrics on the test data (on the held-out data, of a run that tried a learning rate).
    pub judged: Judged,
}

/// What an evaluation printed as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Judged(pub Map<String, Value>);

impl Judged {
    /// The mean loss.
    pub fn loss(&self) -> Option<f64> {
        self.0.get("loss")?.as_f64()
    }

    /// The metrics, the main one first.
    pub fn scores(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().filter_map(|(k, v)| Some((Metric::find(k)?.name(), v.as_f64()?)))
    }

    /// What to choose by, the larger the better: the main metric, or without one the negative loss; of equal ones that of
    /// the lower loss.
    pub fn rank(&self) -> (f64, f64) {
        let loss = -self.loss().unwrap_or(f64::INFINITY);
        (self.scores().next().map_or(loss, |(_, score)| score), loss)
    }
}

/// Settings without what does not make a result: where files lie (their fingerprints are among the inputs), and how often
/// checkpoints are written.
pub(super) fn settings(config: &TrainConfig) -> TrainConfig {
    let TrainConfig { save_every, keep, eval_every, .. } = TrainConfig::default();
    TrainConfig {
        model: "".into(),
        data: "".into(),
        out: "".into(),
        init_adapter: None,
        fuse: Vec::new(),
        log: None,
        save_every,
        keep,
        eval_every,
        ..config.clone()
    }
}

impl Cell {
    /// The cell in a file, which has to be of these settings and inputs; `None` where there is none yet.
    ///
    /// # Errors
    /// A file that is damaged, or of something else.
    pub(super) fn read(path: &Path, config: &TrainConfig, eval: &toml::Table, inputs: &Inputs) -> Result<Option<Cell>> {
        if !path.exists() {
            return Ok(None);
        }
        let text = files::read_to_string(path)?;
        let refuse = |problem: String| Err(Error::Config { path: path.into(), problem });
        let cell: Cell = match serde_json::from_str(&text) {
            Ok(cell) => cell,
            Err(e) => return refuse(format!("is no finished cell ({e}); remove it, and it is run again")),
        };
        const ADVICE: &str = "choose another --out, or remove the file, and it is run again";
        if let Some((key, old, new)) = settings(config).difference(&settings(&cell.settings)) {
            return refuse(format!("was made with {key} = {old}, and is now to have {new}; {ADVICE}"));
        }
        // A run may go on elsewhere, or with another use of memory, but cells of both are not the same measurement.
        let measured = |c: &TrainConfig| [c.device.clone(), c.dtype.clone(), c.checkpoint.to_string()];
        for (key, (old, new)) in ["device", "dtype", "checkpoint"]
            .into_iter()
            .zip(measured(&cell.settings).into_iter().zip(measured(config)))
        {
            if old != new {
                return refuse(format!("was made with {key} = {old}, and is now to have {new}; {ADVICE}"));
            }
        }
        let keys = cell.eval.keys().chain(eval.keys());
        if let Some(key) = keys.into_iter().find(|k| cell.eval.get(*k) != eval.get(*k)) {
            let shown = |t: &toml::Table| t.get(key).map_or("not set".to_owned(), |v| v.to_string());
            let (old, new) = (shown(&cell.eval), shown(eval));
            return refuse(format!("was judged with {key} = {old}, and is now to have {new}; {ADVICE}"));
        }
        let Inputs { base, data, test, adapters } = &cell.inputs;
        for (what, same) in [
            ("base", *base == inputs.base),
            ("training data", *data == inputs.data),
            ("test data", *test == inputs.test),
            ("adapter to begin with", *adapters == inputs.adapters),
        ] {
            if !same {
                return refuse(format!("was made with another {what}; {ADVICE}"));
            }
        }
        Ok(Some(cell))
    }

    /// Writes it whole.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        if let Some(folder) = path.parent() {
            files::create_folder(folder)?;
        }
        let text = serde_json::to_string_pretty(self).expect("settings and numbers");
        Ok(files::write_bytes(path, format!("{text}\n").as_bytes())?)
    }
}
