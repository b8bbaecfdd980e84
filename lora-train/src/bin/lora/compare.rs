//! `lora compare`.

use std::{
    io::{self, IsTerminal},
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, anyhow, bail};
use clap::{Args, Parser};
use indicatif::HumanDuration;
use lora_train::compare::{self, Cell, Comparison, Job, Program, Watcher};
use serde::Serialize;

use crate::{Cli, Command, Global, ui};

#[derive(Args)]
#[command(
    after_help = "The file holds keys of lora train that all rows share, `test`, `seeds`, `keep-models` (true keeps the models \
                        of method full, as adapters are kept), and a [[run]] for each row with its method, its options, one \
                        `lr` or a list to choose from on held-out data, and where they are its own `name` and `seeds`; \
                        [search] has `hold-out`, `seed` and keys that are others while choosing, [eval] flags of lora eval. \
                        Finished cells are kept below --out and never run again; table.md, .csv, .json and .svg stand there \
                        after each. --show needs base and data too: it is by them that it knows the cells.\n\n\
                        --json and table.json have a line for each row: name, method, lr, seeds, finished, diverged, \
                        every_rate_diverged, trainable (scalars), scores (by the names and in the units of lora eval: values, \
                        mean, sd, and interval, the half width of the 95% interval), tokens_per_s, peak_memory and \
                        checkpoint_bytes (bytes). table.csv has the same, but not every_rate_diverged; the tables for people \
                        have shares and correlations times 100."
)]
pub(crate) struct CompareArgs {
    /// The comparison
    #[arg(value_name = "FILE.toml")]
    file: PathBuf,
    /// Folder for cells, adapters and tables; an interrupted comparison goes on in it
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    keys: Keys,
    /// Run nothing: print and write the table of what is finished
    #[arg(long)]
    show: bool,
    /// Print the table as JSON
    #[arg(long)]
    json: bool,
}

/// Keys of the file that may be given here instead.
#[derive(Args, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Keys {
    /// Folder of the base model, or its id on the Hugging Face hub [default: the file's]
    #[arg(long, value_name = "DIR|HUB_ID", help_heading = "In place of keys of the file")]
    model: Option<PathBuf>,
    /// Training data [default: the file's]
    #[arg(long, value_name = "FILE", help_heading = "In place of keys of the file")]
    data: Option<PathBuf>,
    /// Data that finished runs are judged on [default: the file's]
    #[arg(long, value_name = "FILE", help_heading = "In place of keys of the file")]
    test: Option<PathBuf>,
    /// Where to compute [default: the file's, or cpu]
    #[arg(long, help_heading = "In place of keys of the file")]
    device: Option<String>,
    /// Type of the base's weights and of activations [default: the file's, or auto]
    #[arg(long, help_heading = "In place of keys of the file")]
    dtype: Option<String>,
}

pub(crate) fn run(args: CompareArgs, global: &Global) -> anyhow::Result<()> {
    let flags = toml::Table::try_from(&args.keys).context("command line")?;
    let comparison = Comparison::read(&args.file, flags)?;
    check_eval(&comparison).with_context(|| format!("{}: [eval]", args.file.display()))?;
    if args.show {
        let table = compare::finished(&comparison, &args.out)?;
        table.write(&args.out)?;
        return if args.json { ui::print_json(&table) } else { ui::print(table.text()) };
    }
    let path = std::env::current_exe().context("could not find the program itself, which each run is a process of")?;
    let program = Program { path, options: options(global) };
    ui::catch_interrupt("stopping; what is finished is kept")?;
    let finished = compare::run(&comparison, &args.out, &program, &mut Progress { began: Instant::now() })?;
    if args.json { ui::print_json(&finished.table) } else { ui::print(finished.table.text()) }?;
    if finished.interrupted {
        ui::say("interrupted: the same command goes on from here");
        return Err(ui::Interrupted.into());
    }
    if !finished.failed.is_empty() {
        let failed: Vec<String> = finished.failed.iter().map(ToString::to_string).collect();
        bail!("{} of the runs failed: {}", failed.len(), failed.join("; "));
    }
    let picture = if finished.table.lines.iter().any(|line| !line.scores.is_empty()) { ", .svg" } else { "" };
    ui::say(format_args!("the table is in {} (table.md, .csv, .json{picture})", args.out.display()));
    Ok(())
}

/// This command's own options, for the runs, which show no progress where there is no terminal for their bars.
fn options(global: &Global) -> Vec<String> {
    let mut options: Vec<String> = Vec::new();
    if let Some(n) = global.threads {
        options.extend(["--threads".to_owned(), n.to_string()]);
    }
    options.extend((0..global.verbose).map(|_| "--verbose".to_owned()));
    options.extend(global.quiet.then(|| "--quiet".to_owned()));
    if global.no_progress || global.verbose == 0 && !io::stderr().is_terminal() {
        options.push("--no-progress".to_owned());
    }
    options
}

/// Refuses what `lora eval` would refuse, before anything is trained.
fn check_eval(comparison: &Comparison) -> anyhow::Result<()> {
    for row in &comparison.rows {
        let args = compare::eval_args(comparison, row, Path::new("run"))?;
        let parsed = Cli::try_parse_from(std::iter::once("lora".to_owned()).chain(args)).map_err(|e| {
            // Above the usage: what is wrong, on one line or on several.
            let text = e.to_string();
            let said = text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ");
            anyhow!("{}: {}", row.name, said.split_whitespace().collect::<Vec<_>>().join(" "))
        })?;
        if let Command::Eval(args) = parsed.command {
            args.check()?;
        }
    }
    Ok(())
}

/// A line for each run; the runs themselves show their bars where there is a terminal.
struct Progress {
    began: Instant,
}

impl Watcher for Progress {
    fn start(&mut self, job: &Job, left: usize) {
        self.began = Instant::now();
        ui::say(format_args!("{left} left: {job} ..."));
    }

    fn done(&mut self, job: &Job, cell: &Cell) {
        let time = HumanDuration(self.began.elapsed());
        let Some(trained) = &cell.trained else { return ui::say(format_args!("{job}: diverged, after {time}")) };
        let mut judged: String = trained.judged.scores().map(|(name, score)| format!(", {name} {score:.4}")).collect();
        if let Some(loss) = trained.judged.loss() {
            judged += &format!(", loss {loss:.4}");
        }
        ui::say(format_args!("{job}{judged}, after {time}"));
    }

    fn failed(&mut self, job: &Job, why: &str) {
        ui::say(format_args!("{job}: failed: {why}; going on with the others"));
    }

    fn note(&mut self, message: &str) {
        ui::note(message);
    }

    fn stop(&mut self) -> bool {
        ui::interrupted()
    }
}
