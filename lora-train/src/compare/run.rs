//! Running what is not there yet.

use std::{
    fmt, fs, io,
    ops::ControlFlow,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    time::Duration,
};

use lora_model::files;
use serde_json::Value;

use super::{
    Comparison, Row, Table,
    cell::{self, Cell, Judged, Trained, settings},
    config::folder,
    inputs::{self, Inputs},
};
use crate::{
    Error, Result, TrainConfig,
    data::{self, Format, Labels, TaskKind},
    hub,
    output::lock,
    task, weight_bytes,
};

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

/// The command that trains and judges.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    /// The `lora` command.
    pub path: PathBuf,
    /// Options of every run, such as `--threads` and `--quiet`.
    pub options: Vec<String>,
}

/// Watches a comparison.
pub trait Watcher {
    /// A run begins; with it, and what is left, so many are to be done.
    fn start(&mut self, _job: &Job, _left: usize) {}
    /// A run is done.
    fn done(&mut self, _job: &Job, _cell: &Cell) {}
    /// A run failed; the others go on.
    fn failed(&mut self, _job: &Job, _why: &str) {}
    /// Something a person should know.
    fn note(&mut self, _message: &str) {}
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
/// What the runs say goes to standard error. A run that fails does not keep the others from going on.
///
/// # Errors
/// Inputs that cannot be read, training and test data included; finished cells of other settings; an `out` that another process is working in, or that
/// cannot be written.
pub fn run(comparison: &Comparison, out: &Path, program: &Program, watcher: &mut dyn Watcher) -> Result<Finished> {
    let place = Place::open(comparison, out, program)?;
    check_data(comparison)?;
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
    let nothing = Program { path: PathBuf::new(), options: Vec::new() };
    Place::open(comparison, out, &nothing)?.table()
}

/// Reads training and test data, so that what is wrong with them is told before anything is trained.
fn check_data(comparison: &Comparison) -> Result<()> {
    let config = &comparison.rows[0].config;
    match config.task_row()? {
        None => {
            for path in [&config.data, &comparison.test] {
                data::read(path, config.format.unwrap_or_else(|| Format::of_path(path)))?;
            }
        }
        Some(task) => {
            let read = |path| task::read(path, task, config.format);
            let (training, test) = (read(&config.data)?, read(&comparison.test)?);
            if let Some(labels) = Labels::of(task, &training)? {
                labels.check(&test)?;
            }
        }
    }
    Ok(())
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
fn beside(dir: &Path, extension: &str) -> PathBuf {
    let mut name = dir.as_os_str().to_owned();
    name.push(".");
    name.push(extension);
    name.into()
}

/// Where a comparison is kept.
struct Place<'a> {
    comparison: &'a Comparison,
    out: &'a Path,
    program: &'a Program,
    inputs: Inputs,
    /// Fingerprints of the adapters that each row begins with or combines.
    adapters: Vec<Vec<String>>,
}

impl Place<'_> {
    fn open<'a>(comparison: &'a Comparison, out: &'a Path, program: &'a Program) -> Result<Place<'a>> {
        let first = &comparison.rows[0].config;
        let inputs = Inputs {
            base: inputs::folder(&hub::resolve(&first.model)?)?,
            data: inputs::file(&first.data)?,
            test: Some(inputs::file(&comparison.test)?),
            adapters: Vec::new(),
        };
        let of_row = |row: &Row| {
            let dirs = row.config.init_adapter.iter().chain(&row.config.fuse);
            dirs.map(|dir| inputs::folder(dir)).collect::<Result<Vec<_>>>()
        };
        let adapters = comparison.rows.iter().map(of_row).collect::<Result<_>>()?;
        Ok(Place { comparison, out, program, inputs, adapters })
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
        let (eval, inputs) = self.judged_by(row, kind);
        Cell::read(&self.path(row, kind), &self.config(row, kind)?, &eval, &inputs)
    }

    fn judged_by(&self, row: &Row, kind: Kind) -> (toml::Table, Inputs) {
        let index = self.comparison.rows.iter().position(|r| std::ptr::eq(r, row));
        let adapters = index.map_or(Vec::new(), |i| self.adapters[i].clone());
        let inputs = Inputs { adapters, ..self.inputs.clone() };
        match kind {
            Kind::Search { .. } => (toml::Table::new(), Inputs { test: None, ..inputs }),
            Kind::Seed { .. } => (self.comparison.eval.clone(), inputs),
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
        let dir = self.dir(row, kind);
        if self.wait_for(&dir, watcher).is_break() {
            return Ok(ControlFlow::Break(()));
        }
        let why = match self.make(row, kind, &dir) {
            Ok(Made::Cell(cell)) => {
                cell.write(&self.path(row, kind))?;
                // Only now, when its result is kept.
                if let Err(e) = self.clear(row, kind, &dir) {
                    watcher.note(&e.to_string());
                }
                watcher.done(&job, &cell);
                self.table()?.write(self.out)?;
                return Ok(ControlFlow::Continue(()));
            }
            Ok(Made::Interrupted) => return Ok(ControlFlow::Break(())),
            Ok(Made::Failed(why)) => why,
            Err(e) => e.to_string(),
        };
        watcher.failed(&job, &why);
        finished.failed.push(format!("{job}: {why}"));
        Ok(ControlFlow::Continue(()))
    }

    /// Where a run works.
    fn dir(&self, row: &Row, kind: Kind) -> PathBuf {
        let path = self.path(row, kind);
        self.out.join("runs").join(folder(&row.name)).join(path.file_stem().unwrap_or_default())
    }

    /// Waits for the run of a comparison that was killed, which may still be at work.
    fn wait_for(&self, dir: &Path, watcher: &mut dyn Watcher) -> ControlFlow<()> {
        let mut said = false;
        while dir.exists() && lock(dir).is_err() {
            if !std::mem::replace(&mut said, true) {
                watcher.note(&format!("waiting for another process that is at work in {}", dir.display()));
            }
            if watcher.stop() {
                return ControlFlow::Break(());
            }
            std::thread::sleep(Duration::from_millis(500));
        }
        ControlFlow::Continue(())
    }

    /// Removes what is left of a run beyond its adapter (or, on demand, its model).
    fn clear(&self, row: &Row, kind: Kind, dir: &Path) -> Result<()> {
        let searched = matches!(kind, Kind::Search { .. });
        let all = searched || row.config.row()?.whole_model && !self.comparison.keep_models;
        let gone = if all { dir.to_owned() } else { dir.join(crate::checkpoint::FOLDER) };
        match fs::remove_dir_all(&gone) {
            Err(reason) if reason.kind() != io::ErrorKind::NotFound => {
                Err(lora_model::Error::Io { action: "remove", path: gone, reason }.into())
            }
            _ => Ok(()),
        }
    }

    /// Trains and judges.
    fn make(&self, row: &Row, kind: Kind, dir: &Path) -> Result<Made> {
        let (eval, inputs) = self.judged_by(row, kind);
        files::create_folder(dir.parent().unwrap_or(self.out))?;
        let config = TrainConfig { out: dir.to_owned(), ..self.config(row, kind)? };
        let save_every = if config.save_every > 0 { config.save_every } else { SAVE_EVERY };
        let written = TrainConfig { save_every, keep: config.keep.max(1), ..config.clone() };
        let file = beside(dir, "toml");
        files::write_bytes(&file, written.to_toml().as_bytes())?;

        let mut train = self.command();
        train.arg("train").arg("--config").arg(&file).args(["--resume", "--json"]);
        let mut cell = Cell { settings: settings(&config), eval, inputs, made: Some(cell::Made::now()), trained: None };
        let summary = match answer(&mut train)? {
            Answer::Json(json) => json,
            Answer::Ended(status) if status.code() == Some(DIVERGED.into()) => return Ok(Made::Cell(Box::new(cell))),
            Answer::Ended(status) => return Ok(Made::of("lora train", status)),
        };
        let judged = match kind {
            Kind::Search { .. } => summary["evaluation"].clone(),
            Kind::Seed { .. } => {
                let mut eval = self.command();
                eval.args(eval_args(self.comparison, row, dir)?);
                match answer(&mut eval)? {
                    Answer::Json(json) => json,
                    Answer::Ended(status) => return Ok(Made::of("lora eval", status)),
                }
            }
        };
        let Value::Object(judged) = judged else { return Ok(Made::Failed("the evaluation said nothing".into())) };
        let (tokens, seconds) = (summary["tokens"].as_f64().unwrap_or(0.0), summary["seconds"].as_f64().unwrap_or(0.0));
        let searched = matches!(kind, Kind::Search { .. });
        cell.trained = Some(Trained {
            trainable: summary["trainable"].as_u64().unwrap_or(0) as usize,
            steps: summary["steps"].as_u64().unwrap_or(0),
            seconds,
            tokens_per_s: (seconds > 0.0).then_some(tokens / seconds),
            peak_memory: summary["peak_memory"].as_u64(),
            checkpoint_bytes: if searched { None } else { Some(weight_bytes(dir)?) },
            judged: Judged(judged),
        });
        Ok(Made::Cell(Box::new(cell)))
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program.path);
        command.args(&self.program.options);
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
