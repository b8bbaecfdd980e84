//! Running what is not there yet.

use std::{
    fmt,
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Duration,
};

use lora_model::{files, fingerprint};

use super::{
    Comparison, Line, Row, Table,
    cell::{self, Cell, settings},
    check::check,
    config::folder,
    inputs::Inputs,
    process::{Made, Program, beside, eval_args, remove},
};
use crate::{Error, Result, TrainConfig, hub, output::lock};

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
    /// What failed.
    pub failed: Vec<Failure>,
    /// Whether it was interrupted.
    pub interrupted: bool,
}

impl Finished {
    /// A run that failed: the others go on.
    fn fail(&mut self, job: Job, why: String, watcher: &mut dyn Watcher) -> ControlFlow<()> {
        watcher.failed(&job, &why);
        self.failed.push(Failure::Run { job, why });
        ControlFlow::Continue(())
    }
}

/// What a comparison could not do.
#[derive(Clone, Debug, PartialEq)]
pub enum Failure {
    /// A run that failed.
    Run {
        /// It.
        job: Job,
        /// Why.
        why: String,
    },
    /// A row without a result, because training diverged with each of its learning rates, or seeds.
    Diverged {
        /// The row's name.
        row: String,
    },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Run { job, why } => write!(f, "{job}: {why}"),
            Failure::Diverged { row } => {
                write!(f, "{row}: training diverged with every learning rate and seed; give a lower rate")
            }
        }
    }
}

/// Runs what is not finished yet of a comparison, keeps it in `out`, and writes the table there after every cell.
///
/// What the runs say goes to standard error. A run that fails does not keep the others from going on.
///
/// # Errors
/// Inputs that cannot be read, training and test data included; a base that the task or a row's method does not fit;
/// finished cells of other settings; an `out` that another process is working in, or that cannot be written.
pub fn run(comparison: &Comparison, out: &Path, program: &Program, watcher: &mut dyn Watcher) -> Result<Finished> {
    let store = Store::open(comparison, out, program)?;
    check(comparison)?;
    files::create_folder(out)?;
    let _lock = lock(out)?;
    comparison.note.iter().for_each(|note| watcher.note(note));
    let mut finished = Finished { table: store.table()?, failed: Vec::new(), interrupted: false };
    // Every row's first seed before any row's second: a table that is not full says something of every row.
    let rounds = comparison.rows.iter().map(|row| row.seeds.len()).max().unwrap_or(0);
    'all: for round in 0..rounds {
        for row in comparison.rows.iter().filter(|row| round < row.seeds.len()) {
            if store.row(row, round, &mut finished, watcher)?.is_break() {
                finished.interrupted = true;
                break 'all;
            }
        }
    }
    finished.table = store.table_without(|_| Ok(()))?;
    finished.table.write(out)?;
    let lost = |line: &&Line| line.every_rate_diverged || line.diverged > 0 && line.diverged == line.seeds;
    finished.failed.extend(finished.table.lines.iter().filter(lost).map(|l| Failure::Diverged { row: l.name.clone() }));
    Ok(finished)
}

/// The table of the cells that are finished in `out`; nothing is run.
///
/// # Errors
/// As of [`run`]; an `out` that is not there.
pub fn finished(comparison: &Comparison, out: &Path) -> Result<Table> {
    if !out.is_dir() {
        let problem = "there is no such folder, so nothing is finished in it; check --out".into();
        return Err(Error::Output { dir: out.into(), problem });
    }
    let nothing = Program { path: PathBuf::new(), options: Vec::new() };
    Store::open(comparison, out, &nothing)?.table()
}

/// Where a comparison is kept.
struct Store<'a> {
    comparison: &'a Comparison,
    out: &'a Path,
    program: &'a Program,
    inputs: Inputs,
    /// Fingerprints of the adapters that each row begins with or combines.
    adapters: Vec<Vec<String>>,
}

impl Store<'_> {
    fn open<'a>(comparison: &'a Comparison, out: &'a Path, program: &'a Program) -> Result<Store<'a>> {
        let first = &comparison.rows[0].config;
        let inputs = Inputs {
            base: fingerprint::of_folder(&hub::resolve(&first.model)?)?,
            data: fingerprint::of_file(&first.data)?,
            test: Some(fingerprint::of_file(&comparison.test)?),
            adapters: Vec::new(),
        };
        let of_row = |row: &Row| {
            let dirs = row.config.init_adapter.iter().chain(&row.config.fuse);
            dirs.map(|dir| Ok(fingerprint::of_folder(dir)?)).collect::<Result<Vec<_>>>()
        };
        let adapters = comparison.rows.iter().map(of_row).collect::<Result<_>>()?;
        Ok(Store { comparison, out, program, inputs, adapters })
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

    /// Whether every learning rate of a row was tried.
    fn tried(&self, row: &Row) -> Result<bool> {
        let tried = |&lr: &f64| Ok::<_, Error>(self.cell(row, Kind::Search { lr })?.is_some());
        Ok(row.lrs.iter().map(tried).collect::<Result<Vec<_>>>()?.into_iter().all(|tried| tried))
    }

    fn table(&self) -> Result<Table> {
        self.table_without(Err)
    }

    /// The table, without the results of rows whose cells are of other settings where `bad` lets that pass.
    fn table_without(&self, bad: impl Fn(Error) -> Result<()>) -> Result<Table> {
        let mut table = Table::default();
        for row in &self.comparison.rows {
            let found = self.seeds(row).and_then(|(lr, cells)| Ok((lr, lr.is_none() && self.tried(row)?, cells)));
            let (lr, every_rate_diverged, cells) = match found {
                Ok(found) => found,
                Err(e) => {
                    bad(e)?;
                    (None, false, Vec::new())
                }
            };
            table.push(row, lr, every_rate_diverged, &cells);
        }
        Ok(table)
    }

    /// The learning rate of a row, and its seeds that are finished.
    fn seeds(&self, row: &Row) -> Result<(Option<f64>, Vec<Cell>)> {
        let lr = self.chosen(row)?;
        let mut cells = Vec::new();
        for &seed in lr.iter().flat_map(|_| &row.seeds) {
            cells.extend(self.cell(row, Kind::Seed { seed, lr: lr.unwrap_or_default() })?);
        }
        Ok((lr, cells))
    }

    /// How many runs are not done yet.
    fn left(&self) -> usize {
        let missing = |row: &Row, kind| matches!(self.cell(row, kind), Ok(None));
        let of_row = |row: &Row| {
            let chosen = self.chosen(row).ok().flatten();
            let searches = row.lrs.iter().filter(|_| row.lrs.len() > 1).map(|&lr| Kind::Search { lr });
            let seeds = row.seeds.iter().map(|&seed| Kind::Seed { seed, lr: chosen.unwrap_or_default() });
            searches.filter(|kind| missing(row, *kind)).count()
                + seeds.filter(|kind| chosen.is_none() || missing(row, *kind)).count()
        };
        self.comparison.rows.iter().map(of_row).sum()
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
        let Some(lr) = self.chosen(row)? else { return Ok(ControlFlow::Continue(())) };
        self.fill(row, Kind::Seed { seed: row.seeds[round], lr }, finished, watcher)
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
        let failed = finished.failed.iter().any(|f| matches!(f, Failure::Run { job: other, .. } if *other == job));
        if failed {
            return Ok(ControlFlow::Continue(()));
        }
        match self.cell(row, kind) {
            Ok(None) => {}
            Ok(Some(_)) => return Ok(ControlFlow::Continue(())),
            // Such cells are refused before anything is run, but a seed's when the search comes to another rate than it was
            // made with: then the other rows go on.
            Err(e) => return Ok(finished.fail(job, e.to_string(), watcher)),
        }
        if watcher.stop() {
            return Ok(ControlFlow::Break(()));
        }
        watcher.start(&job, self.left());
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
                self.table_without(|_| Ok(()))?.write(self.out)?;
                return Ok(ControlFlow::Continue(()));
            }
            Ok(Made::Interrupted) => return Ok(ControlFlow::Break(())),
            Ok(Made::Failed(why)) => why,
            Err(e) => e.to_string(),
        };
        Ok(finished.fail(job, why, watcher))
    }

    /// Trains and judges.
    fn make(&self, row: &Row, kind: Kind, dir: &Path) -> Result<Made> {
        let (eval, inputs) = self.judged_by(row, kind);
        let config = TrainConfig { out: dir.to_owned(), ..self.config(row, kind)? };
        let args = match kind {
            Kind::Search { .. } => None,
            Kind::Seed { .. } => Some(eval_args(self.comparison, row, dir)?),
        };
        let made = Some(cell::Made::now(&self.comparison.machine));
        let cell = Cell { settings: settings(&config), eval, inputs, made, trained: None };
        let made = self.program.make(&config, args, cell)?;
        if matches!(made, Made::Cell(_)) {
            self.unchanged()?;
        }
        Ok(made)
    }

    /// Refuses data that was written to since the comparison began: who knows what the run read.
    fn unchanged(&self) -> Result<()> {
        let data = &self.comparison.rows[0].config.data;
        for (path, was) in [(data, Some(&self.inputs.data)), (&self.comparison.test, self.inputs.test.as_ref())] {
            if fingerprint::of_file(path).ok().as_ref() != was {
                let problem = "was changed while this comparison was running; run it again".into();
                return Err(Error::Config { path: path.clone(), problem });
            }
        }
        Ok(())
    }

    /// Where a run works.
    fn dir(&self, row: &Row, kind: Kind) -> PathBuf {
        let path = self.path(row, kind);
        self.out.join("runs").join(folder(&row.name)).join(path.file_stem().unwrap_or_default())
    }

    /// Waits for the run of a comparison that was killed, which may still be at work.
    fn wait_for(&self, dir: &Path, watcher: &mut dyn Watcher) -> ControlFlow<()> {
        let mut said = false;
        // Training locks its folder, and an evaluation the file of the texts that it makes.
        let places = [dir.to_owned(), beside(dir, "txt.part")];
        let busy = || places.iter().find(|place| place.exists() && lock(place).is_err());
        while let Some(place) = busy() {
            if !std::mem::replace(&mut said, true) {
                watcher.note(&format!("waiting for another process that is at work in {}", place.display()));
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
        if all { remove(dir) } else { remove(&dir.join(crate::checkpoint::FOLDER)) }
    }
}
