//! The log of a run: one JSON object per line.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
};

use serde::Serialize;
use serde_json::{Value, json};

use crate::{Error, Evaluation, Result, Step};

/// Appends a line per step (`step, loss, lr, grad_norm, tokens, tokens_per_s`) and per evaluation (`eval_step,
/// eval_loss, eval_targets`, and `eval_perplexity` or the task's metrics). A line is written whole before the next step begins.
pub struct Log {
    path: PathBuf,
    file: File,
    set_aside: Option<PathBuf>,
}

impl Log {
    /// Opens the log of a run that has done `done` steps. The `own` log of the run's earlier life keeps its lines up to
    /// that step and loses later ones (and a line that was cut off in the middle), because those steps are done again.
    /// The log of any other run is set aside under a name of its own: nothing of it is lost.
    ///
    /// # Errors
    /// A file that cannot be read or written, or that is no log.
    pub fn open(path: &Path, own: bool, done: u64) -> Result<Log> {
        if let Some(folder) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            lora_model::files::create_folder(folder)?;
        }
        let mut set_aside = None;
        // A terminal or a pipe is written to as it is; a file must be a log, lest a wrong name costs somebody's data.
        if path.is_file() {
            let kept = kept(path, done)?;
            if own {
                lora_model::files::write_bytes(path, kept.as_bytes())?;
            } else if path.metadata().is_ok_and(|m| m.len() > 0) {
                let free = (1..).map(|n| numbered(path, n)).find(|p| !p.exists()).expect("numbers do not end");
                std::fs::rename(path, &free).map_err(|e| io(path, e))?;
                set_aside = Some(free);
            }
        }
        let file = OpenOptions::new().append(true).create(true).open(path).map_err(|e| io(path, e))?;
        Ok(Log { path: path.into(), file, set_aside })
    }

    /// Whether the log in a file may be that of a run of which step `done` had this loss: nobody knows where it is unknown, and
    /// before the first checkpoint, when all of it would be lost.
    pub(crate) fn has(path: &Path, done: u64, loss: Option<f64>) -> bool {
        let Some(loss) = loss else { return done > 0 };
        let text = lora_model::files::read_to_string(path).unwrap_or_default();
        let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.filter(|line| line["step"] == done).any(|line| line["loss"] == loss)
    }

    /// Refuses a file that is no log, before anything of a run is written.
    pub(crate) fn check(path: &Path) -> Result<()> {
        if path.is_file() { kept(path, 0).map(drop) } else { Ok(()) }
    }

    /// Where the log of another run went that stood under this name.
    pub fn set_aside(&self) -> Option<&Path> {
        self.set_aside.as_deref()
    }

    /// A step, and how fast it went.
    ///
    /// # Errors
    /// A full disk.
    pub fn step(&mut self, step: &Step, tokens_per_s: f64) -> Result<()> {
        #[derive(Serialize)]
        struct Line<'a> {
            #[serde(flatten)]
            step: &'a Step,
            tokens_per_s: f64,
        }
        self.line(&Line { step, tokens_per_s })
    }

    /// An evaluation after `step` steps.
    ///
    /// # Errors
    /// A full disk.
    pub fn evaluation(&mut self, step: u64, e: &Evaluation) -> Result<()> {
        let mut line = json!({"eval_step": step, "eval_loss": e.loss});
        if let Some(perplexity) = e.perplexity {
            line["eval_perplexity"] = json!(perplexity);
        }
        line["eval_targets"] = json!(e.targets);
        for (metric, value) in &e.scores.0 {
            line[format!("eval_{metric}")] = json!(value);
        }
        self.line(&line)
    }

    fn line(&mut self, object: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_string(object).map_err(|e| io(&self.path, e.into()))?;
        text.push('\n');
        self.file.write_all(text.as_bytes()).map_err(|e| io(&self.path, e))
    }
}

fn io(path: &Path, reason: std::io::Error) -> Error {
    lora_model::Error::Io { action: "write", path: path.into(), reason }.into()
}

/// `log.jsonl` becomes `log.1.jsonl`.
fn numbered(path: &Path, n: u32) -> PathBuf {
    let extension = path.extension().map_or(String::new(), |e| format!(".{}", e.to_string_lossy()));
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{stem}.{n}{extension}"))
}

/// The step that a line is about; `None` when it is no line of a log.
fn step_of(line: &Value) -> Option<u64> {
    let has = |keys: &[&str]| keys.iter().all(|k| line.get(k).is_some());
    match line {
        _ if has(&["step", "loss", "lr", "grad_norm", "tokens"]) => line["step"].as_u64(),
        _ if has(&["eval_step", "eval_loss"]) => line["eval_step"].as_u64(),
        _ => None,
    }
}

/// The lines up to step `done`.
fn kept(path: &Path, done: u64) -> Result<String> {
    let text = lora_model::files::read_to_string(path)?;
    let mut kept = String::new();
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    for (i, line) in lines.iter().enumerate() {
        let last = i + 1 == lines.len();
        let step = match serde_json::from_str::<Value>(line) {
            Ok(v) => step_of(&v),
            // The process was killed while it wrote this line.
            Err(_) if last && line.starts_with('{') && !line.ends_with('\n') => break,
            Err(_) => None,
        };
        let Some(step) = step else {
            let problem =
                format!("line {} is no line of a training log, so it is left alone; choose another --log", i + 1);
            return Err(Error::Output { dir: path.into(), problem });
        };
        if step <= done && line.ends_with('\n') {
            kept.push_str(line);
        }
    }
    Ok(kept)
}
