//! The report of the CPU: training, generation and latency against PyTorch, Transformers and PEFT on the same work, and
//! against what the machine can do.
//!
//! Every measurement is a process of its own, so that neither side's memory counts for the other. The sides of a row take
//! turns, and every round begins with another one; a ratio is the median of the rounds' own, because the machine's speed
//! drifts. Weights are random, which speed does not depend on, and both sides read the same shape from the same folder.

mod flops;
mod itself;
mod rows;
mod sides;
mod work;

use std::{path::PathBuf, process::Command};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

pub use flops::{Flops, Needed};
pub use rows::{Comparison, comparisons};
pub use sides::Rounds;
pub use work::{Kind, Lines, Type, Work};

use crate::{
    json_of, models,
    report::{Goal, Report, Row},
};

/// The rows that are no [`Comparison`] of tokens per second.
const OTHERS: [&str; 5] = ["forward", "start", "cost", "memory", "steady"];

/// What a report is made of.
pub struct Config {
    /// Names of rows; all when empty.
    pub rows: Vec<String>,
    /// Processes of each side.
    pub rounds: usize,
    /// Steps of a process in place of each row's own number.
    pub steps: Option<usize>,
    /// Python with torch, transformers and peft.
    pub peer: Option<PathBuf>,
    /// Real lines for the rows of E2E.
    pub lines: Option<Lines>,
    /// Folder of a GPT-2 in place of random weights.
    pub gpt2: Option<PathBuf>,
    /// The `lora` command.
    pub lora: Option<PathBuf>,
    /// Whether to run everything once at toy sizes: a check of the program.
    pub tiny: bool,
    /// This program, which measures one [`Work`] after `--once`.
    pub own: PathBuf,
}

/// Names of all rows, in their order.
pub fn names() -> Vec<&'static str> {
    comparisons(None, false).iter().map(|c| c.name).chain(OTHERS).collect()
}

/// A report in the making.
pub struct Bench {
    config: Config,
    folder: tempfile::TempDir,
    report: Report,
}

impl Bench {
    /// Measures all rows that are wanted, and hands the report to `after` after each. A row that fails has a note in place
    /// of figures.
    ///
    /// # Errors
    /// An unknown row, no temporary folder; what `after` gives.
    pub fn run(config: Config, after: &mut dyn FnMut(&Report) -> Result<()>) -> Result<Report> {
        if let Some(unknown) = config.rows.iter().find(|r| !names().contains(&r.as_str())) {
            bail!("there is no row {unknown:?}; the rows are {}", names().join(", "));
        }
        let folder = tempfile::tempdir().context("could not make a temporary folder")?;
        let mut bench = Bench { config, folder, report: Report::default() };
        bench.facts();
        for c in comparisons(bench.config.lines.as_ref(), bench.config.tiny) {
            if bench.wants(c.name) {
                eprintln!("{}", c.name);
                let rows =
                    bench.compare(&c).unwrap_or_else(|e| vec![Row::new(c.what, "tokens/s", Some(c.speed)).failed(&e)]);
                bench.report.rows.extend(rows);
                after(&bench.report)?;
            }
        }
        for name in OTHERS {
            if bench.wants(name) {
                eprintln!("{name}");
                let rows = match name {
                    "forward" => bench.forward(),
                    "start" => bench.start().map(|row| vec![row]),
                    "cost" => bench.cost(),
                    "memory" => bench.memory(),
                    _ => bench.steady(),
                };
                bench.report.rows.extend(rows.unwrap_or_else(|e| vec![Row::new(name, "-", None).failed(&e)]));
                after(&bench.report)?;
            }
        }
        Ok(bench.report)
    }

    fn wants(&self, name: &str) -> bool {
        self.config.rows.is_empty() || self.config.rows.iter().any(|r| r == name)
    }

    fn facts(&mut self) {
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model =
            cpu.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": ")).map_or("?", |(_, name)| name);
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        let facts = [
            (
                "machine",
                format!("{model} ({}), {cores} cores, {}", lora_kernels::cpu_instructions(), std::env::consts::OS),
            ),
            ("memory", memory()),
            ("date", date()),
            (
                "this",
                format!(
                    "lora {}, {}, {}, commit {}",
                    env!("CARGO_PKG_VERSION"),
                    if cfg!(debug_assertions) { "debug" } else { "release" },
                    said("rustc", &["--version"]),
                    said("git", &["-C", env!("CARGO_MANIFEST_DIR"), "describe", "--always", "--dirty"])
                ),
            ),
            ("rounds", self.config.rounds.to_string()),
        ];
        self.report.facts.extend(facts.map(|(name, value)| (name.to_owned(), value.into())));
    }

    /// The folder of a model of that shape, written when it is first asked for.
    fn model(&self, arch: &str) -> Result<PathBuf> {
        if let (Some(dir), "gpt2") = (&self.config.gpt2, arch) {
            return Ok(dir.clone());
        }
        let dir = self.folder.path().join(arch);
        if !dir.join("config.json").exists() {
            models::write(&dir, arch, self.config.tiny)?;
        }
        Ok(dir)
    }

    /// The work with the folder of its model, and the steps that were asked for.
    fn placed(&self, work: &Work, arch: &str) -> Result<Work> {
        Ok(Work { model: self.model(arch)?, steps: self.config.steps.unwrap_or(work.steps), ..work.clone() })
    }

    fn ours(&self, work: &Work) -> Result<Value> {
        // An error is a note in the report: one line.
        let mut command = Command::new(&self.config.own);
        json_of(command.env_remove("RUST_BACKTRACE").arg("--once").arg(json!(work).to_string()))
    }

    /// Both sides in turn.
    fn rounds(&mut self, name: &str, ours: &Work, theirs: Option<&Work>, tuned: bool) -> Rounds {
        let peer = self.config.peer.as_deref().zip(theirs);
        let own = |_: usize| self.ours(ours);
        let default = |_: usize| peer.map_or(Ok(Value::Null), |(python, work)| sides::peer(python, work, false));
        let with_pool = |_: usize| peer.map_or(Ok(Value::Null), |(python, work)| sides::peer(python, work, true));
        let mut sides: Vec<(&str, sides::Side)> = vec![("ours", Box::new(own))];
        if peer.is_some() {
            sides.push(("peer", Box::new(default)));
            if tuned {
                sides.push(("tuned", Box::new(with_pool)));
            }
        }
        let rounds = sides::in_turn(sides, self.config.rounds);
        if let Some(versions) = rounds.last("peer").and_then(|v| v["versions"].as_str()) {
            self.report.facts.insert("peer".into(), versions.into());
        }
        self.report.rounds.insert(name.to_owned(), rounds.json());
        rounds
    }

    fn compare(&mut self, c: &Comparison) -> Result<Vec<Row>> {
        let ours = self.placed(&c.ours, c.arch)?;
        let theirs = Work { dtype: c.theirs, ..ours.clone() };
        // Sequences of E2E's lengths without any text are this side's alone.
        let comparable = ours.tokens > 0 || ours.lines.is_some();
        let rounds = self.rounds(c.name, &ours, comparable.then_some(&theirs), c.tuned.is_some());
        let speed = |what: String, peer, goal| rounds.row(Row::new(what, "tokens/s", goal), "tokens_per_s", peer);
        let tokens = ["ours", "peer"].map(|side| rounds.median(side, "tokens_per_step"));
        if let [Some(ours), Some(theirs)] = tokens
            && ours != theirs
        {
            bail!("the sides count other tokens: {ours} and {theirs} a step");
        }
        let mut rows = vec![speed(c.what.to_owned(), "peer", Some(c.speed))];
        if !comparable {
            rows[0].note = "lengths like E2E's; give --data and --tokenizer to compare".into();
        }
        if let Some(goal) = c.tuned {
            rows.push(speed(format!("{}, its malloc tuned, AdamW fused", c.what), "tuned", goal));
        }
        if ours.kind == Kind::Generate {
            let share = Row::new(format!("{}: weights read, over the bandwidth", c.what), "B/s", None);
            rows.push(rounds.within(share, "weights_read_per_s", "bandwidth"));
        }
        let memory = |what: String, peer, goal| rounds.row(Row::new(what, "MiB", goal), "peak_rss_mib", peer);
        if ours.kind == Kind::Train {
            rows.push(memory(format!("{}: peak memory", c.what), "peer", c.memory));
            rows.push(rounds.within(
                Row::new(format!("{}: GEMM FLOP/s", c.what), "FLOP/s", c.share),
                "gemm_flops_per_s",
                "ceiling",
            ));
        }
        if let Some(why) = rounds.failure("ours") {
            rows = vec![Row::new(c.what, "tokens/s", Some(c.speed)).failed(&why)];
            rows[0].reference = rounds.median("peer", "tokens_per_s");
        }
        Ok(rows)
    }

    fn forward(&mut self) -> Result<Vec<Row>> {
        let work = self.placed(&rows::forward(self.config.tiny), "gpt2")?;
        let rounds = self.rounds("forward", &work, Some(&work), false);
        if let Some(why) = rounds.failure("ours") {
            return Err(why);
        }
        // Merged LoRA is off by what it is slower or faster than the base.
        let distance = |ratio: &f64| ratio.max(1.0 / ratio);
        let row = |name: &str, what: &str, goal: Goal| {
            let mut ratios = rounds.all("ours", &["ratio", name]);
            if goal.aim == 1.0 {
                ratios = ratios.iter().map(distance).collect();
            }
            let theirs = crate::median(&rounds.all("peer", &["ratio", name]));
            let note = if theirs.is_nan() { "no peer".into() } else { format!("PEFT's ratio: {theirs:.3}") };
            Row {
                ours: rounds.median_at("ours", &["ms", name]),
                reference: rounds.median_at("ours", &["ms", "base"]),
                ratio: Some(crate::median(&ratios)),
                spread: sides::spread(&ratios),
                ..Row::new(what, "ms", Some(goal))
            }
            .noted(note)
        };
        Ok(vec![
            row(
                "lora",
                "forward 8 × 128, GPT-2 small, LoRA r 8 beside the base over the base",
                Goal { at_least: 1.03, aim: 1.01 },
            ),
            row("lora, merged", "the same, LoRA merged into the base", Goal { at_least: 1.01, aim: 1.0 }),
        ])
    }

    /// Seconds of `lora generate` from its start to its end after the first token.
    fn start(&mut self) -> Result<Row> {
        let lora = match &self.config.lora {
            Some(lora) => lora.clone(),
            None => self.config.own.with_file_name(format!("lora{}", std::env::consts::EXE_SUFFIX)),
        };
        if !lora.exists() {
            bail!("{} is not there: build the command first, or name it as --lora", lora.display());
        }
        let model = self.model("gpt2")?;
        // A user's folder stays as it is.
        if model.starts_with(self.folder.path()) {
            let lines =
                self.config.lines.as_ref().context("needs --data and --tokenizer, or a --model that has one")?;
            models::add_tokenizer(&model, &lines.tokenizer)?;
        }
        let once = || -> Result<f64> {
            let mut command = Command::new(&lora);
            command.arg("generate").arg("--model").arg(&model);
            command.args(["--prompt", "The Vaults is", "--max-new-tokens", "1"]);
            let start = std::time::Instant::now();
            let output = command.output().with_context(|| format!("could not run {command:?}"))?;
            let seconds = start.elapsed().as_secs_f64();
            match output.status.success() {
                true => Ok(seconds),
                false => bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr)),
            }
        };
        once()?;
        let seconds = (0..2 * self.config.rounds).map(|_| once()).collect::<Result<Vec<f64>>>()?;
        self.report.rounds.insert("start".into(), json!(seconds));
        let limit = 0.3;
        let ratios: Vec<f64> = seconds.iter().map(|s| s / limit).collect();
        Ok(Row {
            ours: Some(crate::median(&seconds)),
            reference: Some(limit),
            spread: sides::spread(&ratios),
            ..Row::new(
                "lora generate of one token, GPT-2 small, warm cache, over its limit",
                "s",
                Some(Goal::at_most(1.0)),
            )
        })
    }
}

/// The day, where the system tells it.
fn date() -> String {
    said("date", &["-u", "+%Y-%m-%d"])
}

/// The first line that a program prints; a question mark where there is no such program.
fn said(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().ok().filter(|o| o.status.success());
    output.map_or_else(|| "?".into(), |o| String::from_utf8_lossy(&o.stdout).lines().next().unwrap_or("?").to_owned())
}

/// The machine's memory, where the system tells it.
fn memory() -> String {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text.lines().find_map(|l| l.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse::<f64>().ok());
    kib.map_or_else(|| "?".into(), |kib| format!("{:.0} GiB", kib / f64::from(1 << 20)))
}

/// Reads a description and measures it.
///
/// # Errors
/// A description that cannot be read; those of [`Work::once`].
pub fn once(description: &str) -> Result<Value> {
    serde_json::from_str::<Work>(description).context("--once takes the description of a measurement")?.once()
}
