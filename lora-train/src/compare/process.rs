//! One run: the command as a process of its own, trained and judged.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
};

use lora_model::files;
use serde_json::Value;

use super::{
    Comparison, Row,
    cell::{Cell, Judged, Trained},
};
use crate::{Error, RUN_FILE, Result, TrainConfig, checkpoint, data::TaskKind, weight_bytes};

/// How the command ends when training diverged, or what is evaluated holds values that are no numbers.
pub const DIVERGED: u8 = 3;
/// How it ends after Ctrl-C.
const INTERRUPTED: i32 = 130;
/// Steps between checkpoints of a run, where the comparison does not say.
const SAVE_EVERY: u64 = 500;

/// The command that trains and judges.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    /// The `lora` command.
    pub path: PathBuf,
    /// Options of every run, such as `--threads` and `--no-progress`.
    pub options: Vec<String>,
}

impl Program {
    /// Trains as `config` says, into `config.out`, and judges: with `eval`, the arguments of `lora eval`, or without any by
    /// what training held out. `cell` says what it is made from.
    pub(super) fn make(&self, config: &TrainConfig, eval: Option<Vec<String>>, mut cell: Cell) -> Result<Made> {
        let dir = &config.out;
        files::create_folder(dir.parent().unwrap_or(Path::new(".")))?;
        let save_every = if config.save_every > 0 { config.save_every } else { SAVE_EVERY };
        let written = TrainConfig { save_every, keep: config.keep.max(1), ..config.clone() };
        let file = beside(dir, "toml");
        files::write_bytes(&file, written.to_toml().as_bytes())?;

        let mut train = self.command();
        train.arg("train").arg("--config").arg(&file).arg("--json");
        let resumed = dir.join(RUN_FILE).exists() && dir.join(checkpoint::FOLDER).exists();
        if resumed {
            train.arg("--resume");
        } else if dir.join(RUN_FILE).exists() {
            // Finished, and its cell was removed, perhaps because it was of other settings; or stopped before its first
            // checkpoint.
            remove(dir)?;
        }
        let summary = match answer(&mut train)? {
            Answer::Json(json) => json,
            Answer::Ended(status) if diverged(status) => return Ok(Made::Cell(Box::new(cell))),
            Answer::Ended(status) => {
                return Ok(match Made::of("lora train", status) {
                    Made::Failed(why) if resumed => Made::Failed(format!(
                        "{why}; it was to go on from a checkpoint: if that is of other settings or data, remove {}, and the \
                         run begins anew",
                        dir.display()
                    )),
                    made => made,
                });
            }
        };
        let tried = eval.is_none();
        let judged = match eval {
            None => summary["evaluation"].clone(),
            Some(args) => {
                let mut eval = self.command();
                eval.args(args);
                match answer(&mut eval)? {
                    Answer::Json(json) => json,
                    // The last update was one too many.
                    Answer::Ended(status) if diverged(status) => return Ok(Made::Cell(Box::new(cell))),
                    Answer::Ended(status) => return Ok(Made::of("lora eval", status)),
                }
            }
        };
        let Value::Object(judged) = judged else { return Ok(Made::Failed("the evaluation said nothing".into())) };
        let (tokens, seconds) = (summary["tokens"].as_f64().unwrap_or(0.0), summary["seconds"].as_f64().unwrap_or(0.0));
        cell.trained = Some(Trained {
            trainable: summary["trainable"].as_u64().unwrap_or(0) as usize,
            steps: summary["steps"].as_u64().unwrap_or(0),
            seconds,
            tokens_per_s: (seconds > 0.0).then_some(tokens / seconds),
            peak_memory: summary["peak_memory"].as_u64(),
            checkpoint_bytes: if tried { None } else { Some(weight_bytes(dir)?) },
            judged: Judged(judged),
        });
        Ok(Made::Cell(Box::new(cell)))
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        command.args(&self.options);
        command
    }
}

/// The arguments of `lora eval` for a row whose result lies in `dir`.
///
/// # Errors
/// An unknown method or task.
pub fn eval_args(comparison: &Comparison, row: &Row, dir: &Path) -> Result<Vec<String>> {
    let config = &row.config;
    let path = |path: &Path| path.to_string_lossy().into_owned();
    let mut args = vec!["eval".to_owned(), "--model".to_owned()];
    match config.row()?.whole_model {
        true => args.push(path(dir)),
        false => args.extend([path(&config.model), "--adapter".into(), path(dir)]),
    }
    args.extend(["--data".into(), path(&comparison.test), "--json".into()]);
    args.extend(["--max-length".into(), config.max_length.to_string()]);
    args.extend(["--device", &config.device, "--dtype", &config.dtype].map(str::to_owned));
    if let Some(task) = config.task_row()? {
        args.extend(["--task", task.name].map(str::to_owned));
        if task.kind == TaskKind::Completions {
            args.extend(["--predictions".into(), path(&beside(dir, "txt"))]);
        }
    }
    if let Some(format) = config.format.filter(|_| !comparison.eval.contains_key("format")) {
        args.extend(["--format", format.name()].map(str::to_owned));
    }
    for (key, value) in &comparison.eval {
        match value {
            toml::Value::Boolean(false) => {}
            toml::Value::Boolean(true) => args.push(format!("--{key}")),
            toml::Value::String(text) => args.extend([format!("--{key}"), text.clone()]),
            other => args.extend([format!("--{key}"), other.to_string()]),
        }
    }
    Ok(args)
}

/// The file of a run that stands beside its folder. (A folder's name may have a point in it, as in a learning rate.)
pub(super) fn beside(dir: &Path, extension: &str) -> PathBuf {
    let mut name = dir.as_os_str().to_owned();
    name.push(".");
    name.push(extension);
    name.into()
}

/// Removes a folder, where it is there.
pub(super) fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(reason) if reason.kind() != io::ErrorKind::NotFound => {
            Err(lora_model::Error::Io { action: "remove", path: dir.to_owned(), reason }.into())
        }
        _ => Ok(()),
    }
}

/// What came of the attempt to make a cell.
pub(super) enum Made {
    Cell(Box<Cell>),
    Failed(String),
    Interrupted,
}

impl Made {
    fn of(what: &str, status: ExitStatus) -> Made {
        match interrupted(status) {
            true => Made::Interrupted,
            // Its error stands above, on standard error.
            false => Made::Failed(format!("{what} ended with {status}")),
        }
    }
}

fn diverged(status: ExitStatus) -> bool {
    status.code() == Some(DIVERGED.into())
}

/// Whether Ctrl-C ended a process: in good order, or at once, where it listened for nothing.
fn interrupted(status: ExitStatus) -> bool {
    #[cfg(unix)]
    const SIGINT: i32 = 2;
    #[cfg(unix)]
    if std::os::unix::process::ExitStatusExt::signal(&status) == Some(SIGINT) {
        return true;
    }
    status.code() == Some(INTERRUPTED)
}

/// What a command printed, or how it ended without.
enum Answer {
    Json(Value),
    Ended(ExitStatus),
}

fn answer(command: &mut Command) -> Result<Answer> {
    let path = PathBuf::from(command.get_program());
    let failed = |reason: io::Error| Error::Model(lora_model::Error::Io { action: "run", path: path.clone(), reason });
    let output = match command.stdin(Stdio::null()).stderr(Stdio::inherit()).output() {
        Ok(output) => output,
        Err(e) => return Err(failed(e)),
    };
    if !output.status.success() {
        return Ok(Answer::Ended(output.status));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().last().and_then(|line| serde_json::from_str(line).ok()) {
        Some(json) => Ok(Answer::Json(json)),
        None => Err(failed(io::Error::other(format!("printed {text:?} in place of a JSON object")))),
    }
}
