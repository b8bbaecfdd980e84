//! Running what is not there yet.

use std::{
    fmt, fs,
    io::{self, IsTerminal},
    ops::ControlFlow,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
};

use lora_model::files;
use serde_json::Value;

use super::{
    Comparison, Row, Table,
    cell::{Cell, Judged, Trained, settings},
    config::folder,
    inputs::{self, Inputs},
};
use crate::{Error, Result, TrainConfig, data::TaskKind, hub, output::lock, weight_bytes};

/// How the command ends when training diverged.
pub const DIVERGED: u8 = 3;
/// How it ends after Ctrl-C.
const INTERRUPTED: i32 = 130;
/// Steps between checkpoints of a run, where the comparison does not say.
const SAVE_EVERY: u64 = 500;

/// A cell that is run, or was.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// The row's name.
    pub row: String,
    /// What for.
    pub kind: Kind,
}

/// What a run is for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// To try a learning rate.
    Search {
        /// It.
        lr: f64,
    },
    /// To be compared.
    Seed {
        /// Its seed.
        seed: u64,
        /// The learning rate that it is trained with.
        lr: f64,
    },
}

impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Kind::Search { lr } => write!(f, "{}, trying lr {lr}", self.row),
            Kind::Seed { seed, lr } => write!(f, "{}, seed {seed}, lr {lr}", self.row),
        }
    }
}

/// Watches a comparison.
pub trait Watcher {
    /// A run begins; with it, and what is left, so many are to be done.
    fn start(&mut self, _job: &Job, _left: usize) {}
    /// A run is done.
    fn done(&mut self, _job: &Job, _cell: &Cell) {}
    /// A run failed; the others go on.
    fn failed(&mut self, _job: &Job, _why: &str) {}
    /// Asked before every run.
    fn stop(&mut self) -> bool {
        false
    }
}

impl Watcher for () {}

/// What a comparison came to.
#[derive(Debug)]
pub struct Finished {
    /// The table of the cells that are finished.
    pub table: Table,
    /// Runs that failed, and why.
    pub failed: Vec<String>,
    /// Whether it was interrupted.
    pub interrupted: bool,
}

/// Runs what is not finished yet of a comparison, keeps it in `out`, and writes the table there after every cell.
///
/// `program` is the `lora` command. Its progress goes to standard error where that is a terminal. A run that fails does
/// not keep the others from going on.
///
/// # Errors
/// Inputs that cannot be read; finished cells of other settings; an `out` that another process is working in, or that
/// cannot be written.
pub fn run(comparison: &Comparison, out: &Path, program: &Path, watcher: &mut dyn Watcher) -> Result<Finished> {
    let place = Place::open(comparison, out, program)?;
    files::create_folder(out)?;
    let _lock = lock(out)?;
    let mut finished = Finished { table: place.table()?, failed: Vec::new(), interrupted: false };
    // Every row's first seed before any row's second: a table that is not full says something of every row.
    let rounds = comparison.rows.iter().map(|row| row.seeds.len()).max().unwrap_or(0);
    'all: for round in 0..rounds {
        for row in comparison.rows.iter().filter(|row| round < row.seeds.len()) {
            if place.row(row, round, &mut finished, watcher)?.is_break() {
                finished.interrupted = true;
                break 'all;
            }
        }
    }
    finished.table = place.table()?;
    finished.table.write(out)?;
    Ok(finished)
}

/// The table of the cells that are finished in `out`; nothing is run.
///
/// # Errors
/// As of [`run`].
pub fn finished(comparison: &Comparison, out: &Path) -> Result<Table> {
    Place::open(comparison, out, Path::new(""))?.table()
}

/// Where a comparison is kept.
struct Place<'a> {
    comparison: &'a Comparison,
    out: &'a Path,
    program: &'a Path,
    inputs: Inputs,
}

impl Place<'_> {
    fn open<'a>(comparison: &'a Comparison, out: &'a Path, program: &'a Path) -> Result<Place<'a>> {
        let first = &comparison.rows[0].config;
        let inputs = Inputs {
            base: inputs::folder(&hub::resolve(&first.model)?)?,
            data: inputs::file(&first.data)?,
            test: Some(inputs::file(&comparison.test)?),
        };
        Ok(Place { comparison, out, program, inputs })
    }

    fn path(&self, row: &Row, kind: Kind) -> PathBuf {
        let name = match kind {
            Kind::Search { lr } => format!("lr-{lr}.json"),
            Kind::Seed { seed, .. } => format!("seed-{seed}.json"),
        };
        self.out.join("cells").join(folder(&row.name)).join(name)
    }

    fn config(&self, row: &Row, kind: Kind) -> Result<TrainConfig> {
        match kind {
            Kind::Search { lr } => self.comparison.searching(row, lr),
            Kind::Seed { seed, lr } => Ok(TrainConfig { seed, lr, ..row.config.clone() }),
        }
    }

    /// The cell, where it is finished.
    fn cell(&self, row: &Row, kind: Kind) -> Result<Option<Cell>> {
        let (eval, inputs) = self.judged_by(kind);
        Cell::read(&self.path(row, kind), &self.config(row, kind)?, &eval, &inputs)
    }

    fn judged_by(&self, kind: Kind) -> (toml::Table, Inputs) {
        match kind {
            Kind::Search { .. } => (toml::Table::new(), Inputs { test: None, ..self.inputs.clone() }),
            Kind::Seed { .. } => (self.comparison.eval.clone(), self.inputs.clone()),
        }
    }

    /// The learning rate of a row; `None` while some are not tried yet, or when none came through.
    fn chosen(&self, row: &Row) -> Result<Option<f64>> {
        if let [lr] = row.lrs[..] {
            return Ok(Some(lr));
        }
        let mut best: Option<((f64, f64), f64)> = None;
        for &lr in &row.lrs {
            let Some(cell) = self.cell(row, Kind::Search { lr })? else { return Ok(None) };
            let rank = cell.trained.map(|t| t.judged.rank());
            // Of equal ones the first.
            if let Some(rank) = rank.filter(|rank| best.is_none_or(|(most, _)| *rank > most)) {
                best = Some((rank, lr));
            }
        }
        Ok(best.map(|(_, lr)| lr))
    }

    fn table(&self) -> Result<Table> {
        let mut table = Table::default();
        for row in &self.comparison.rows {
            let lr = self.chosen(row)?;
            let mut cells = Vec::new();
            for &seed in lr.iter().flat_map(|_| &row.seeds) {
                cells.extend(self.cell(row, Kind::Seed { seed, lr: lr.unwrap_or_default() })?);
            }
            table.push(row, lr, &cells);
        }
        Ok(table)
    }

    /// How many runs are not done yet.
    fn left(&self) -> Result<usize> {
        let mut left = 0;
        for row in &self.comparison.rows {
            let chosen = self.chosen(row)?;
            let searches = row.lrs.iter().filter(|_| row.lrs.len() > 1).map(|&lr| Kind::Search { lr });
            let seeds = row.seeds.iter().map(|&seed| Kind::Seed { seed, lr: chosen.unwrap_or_default() });
            for kind in searches {
                left += usize::from(self.cell(row, kind)?.is_none());
            }
            for kind in seeds {
                left += usize::from(chosen.is_none() || self.cell(row, kind)?.is_none());
            }
        }
        Ok(left)
    }

    /// The `round`-th seed of a row, after its search.
    fn row(
        &self,
        row: &Row,
        round: usize,
        finished: &mut Finished,
        watcher: &mut dyn Watcher,
    ) -> Result<ControlFlow<()>> {
        if row.lrs.len() > 1 {
            for &lr in &row.lrs {
                if self.fill(row, Kind::Search { lr }, finished, watcher)?.is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
        }
        match self.chosen(row)? {
            Some(lr) => self.fill(row, Kind::Seed { seed: row.seeds[round], lr }, finished, watcher),
            None => {
                if round == 0 {
                    finished.failed.push(format!("{}: no learning rate came through", row.name));
                }
                Ok(ControlFlow::Continue(()))
            }
        }
    }

    /// Makes a cell, where it is not there and has not failed just now.
    fn fill(
        &self,
        row: &Row,
        kind: Kind,
        finished: &mut Finished,
        watcher: &mut dyn Watcher,
    ) -> Result<ControlFlow<()>> {
        let job = Job { row: row.name.clone(), kind };
        let failed = finished.failed.iter().any(|f| f.starts_with(&format!("{job}: ")));
        if failed || self.cell(row, kind)?.is_some() {
            return Ok(ControlFlow::Continue(()));
        }
        if watcher.stop() {
            return Ok(ControlFlow::Break(()));
        }
        watcher.start(&job, self.left()?);
        match self.make(row, kind)? {
            Made::Cell(cell) => {
                cell.write(&self.path(row, kind))?;
                watcher.done(&job, &cell);
                self.table()?.write(self.out)?;
            }
            Made::Failed(why) => {
                watcher.failed(&job, &why);
                finished.failed.push(format!("{job}: {why}"));
            }
            Made::Interrupted => return Ok(ControlFlow::Break(())),
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Trains and judges.
    fn make(&self, row: &Row, kind: Kind) -> Result<Made> {
        let (eval, inputs) = self.judged_by(kind);
        let path = self.path(row, kind);
        let name = path.file_stem().unwrap_or_default();
        let runs = self.out.join("runs").join(folder(&row.name));
        files::create_folder(&runs)?;
        let dir = runs.join(name);
        let config = TrainConfig { out: dir.clone(), ..self.config(row, kind)? };
        let file = runs.join(format!("{}.toml", name.to_string_lossy()));
        let save_every = if config.save_every > 0 { config.save_every } else { SAVE_EVERY };
        let written = TrainConfig { save_every, keep: config.keep.max(1), ..config.clone() };
        files::write_bytes(&file, written.to_toml().as_bytes())?;

        let mut train = self.command("train");
        train.arg("--config").arg(&file).args(["--resume", "--json"]);
        let mut cell = Cell { settings: settings(&config), eval, inputs, trained: None };
        let summary = match answer(&mut train)? {
            Answer::Json(json) => json,
            Answer::Ended(status) if status.code() == Some(DIVERGED.into()) => return Ok(Made::Cell(Box::new(cell))),
            Answer::Ended(status) => return Ok(Made::of("lora train", status)),
        };
        let (tokens, seconds) = (summary["tokens"].as_f64().unwrap_or(0.0), summary["seconds"].as_f64().unwrap_or(0.0));
        let whole = config.row()?.whole_model;
        let judged = match kind {
            Kind::Search { .. } => summary["evaluation"].clone(),
            Kind::Seed { .. } => {
                let mut eval = self.command("eval");
                match whole {
                    true => eval.arg("--model").arg(&dir),
                    false => eval.arg("--model").arg(&config.model).arg("--adapter").arg(&dir),
                };
                eval.arg("--data").arg(&self.comparison.test).arg("--json");
                eval.args(["--max-length", &config.max_length.to_string()]);
                eval.args(["--device", &config.device, "--dtype", &config.dtype]);
                if let Some(task) = &config.task {
                    eval.args(["--task", task]);
                }
                if config.task_row()?.is_some_and(|task| task.kind == TaskKind::Completions) {
                    eval.arg("--predictions").arg(runs.join(format!("{}.txt", name.to_string_lossy())));
                }
                eval.args(flags(&self.comparison.eval));
                match answer(&mut eval)? {
                    Answer::Json(json) => json,
                    Answer::Ended(status) => return Ok(Made::of("lora eval", status)),
                }
            }
        };
        let Value::Object(judged) = judged else { return Ok(Made::Failed("the evaluation said nothing".into())) };
        let did = tokens > 0.0;
        let searched = matches!(kind, Kind::Search { .. });
        cell.trained = Some(Trained {
            trainable: summary["trainable"].as_u64().unwrap_or(0) as usize,
            steps: summary["steps"].as_u64().unwrap_or(0),
            seconds,
            tokens_per_s: did.then_some(tokens / seconds),
            peak_memory: summary["peak_memory"].as_u64().filter(|_| did),
            checkpoint_bytes: if searched { None } else { Some(weight_bytes(&dir)?) },
            judged: Judged(judged),
        });
        // What is left of the run when its result is known: the adapter, or on demand the model.
        let gone =
            if searched || whole && !self.comparison.keep_models { dir } else { dir.join(crate::checkpoint::FOLDER) };
        if gone.is_dir() {
            let failed = |reason| lora_model::Error::Io { action: "remove", path: gone.clone(), reason };
            fs::remove_dir_all(&gone).map_err(failed)?;
        }
        Ok(Made::Cell(Box::new(cell)))
    }

    fn command(&self, what: &str) -> Command {
        let mut command = Command::new(self.program);
        command.arg(what);
        if !io::stderr().is_terminal() {
            command.arg("--quiet");
        }
        command
    }
}

/// What came of the attempt to make a cell.
enum Made {
    Cell(Box<Cell>),
    Failed(String),
    Interrupted,
}

impl Made {
    fn of(what: &str, status: ExitStatus) -> Made {
        match status.code() {
            Some(INTERRUPTED) => Made::Interrupted,
            // Its error stands above, on standard error.
            _ => Made::Failed(format!("{what} ended with {status}")),
        }
    }
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

/// Keys as flags of a command: `true` as the flag alone, `false` as none.
pub fn flags(keys: &toml::Table) -> Vec<String> {
    let flag = |(key, value): (&String, &toml::Value)| match value {
        toml::Value::Boolean(false) => Vec::new(),
        toml::Value::Boolean(true) => vec![format!("--{key}")],
        toml::Value::String(text) => vec![format!("--{key}"), text.clone()],
        other => vec![format!("--{key}"), other.to_string()],
    };
    keys.iter().flat_map(flag).collect()
}
