//! `lora demo`.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::Context;
use clap::Args;
use indicatif::{HumanBytes, HumanCount, ProgressBar};
use lora_train::{
    Observer, RunInfo, Step,
    demo::{self, DemoConfig, MethodReport, Report, Stage, Watcher},
};

use crate::{new_folder::free, ui};

#[derive(Args)]
pub(crate) struct DemoArgs {
    /// A smaller run: seconds rather than minutes, and plainer sentences
    #[arg(long)]
    short: bool,
    /// Seed of the data, the base and the adaptation
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    seed: u64,
    /// Folder, new or empty, in which to keep the data, adapters and models [default: thrown away at the end]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Pretrain the base anew, rather than keep it in the user's cache folder
    #[arg(long)]
    no_cache: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: DemoArgs) -> anyhow::Result<()> {
    let cache = if args.no_cache { None } else { dirs::cache_dir().map(|dir| dir.join("lora")) };
    let config = if args.short { DemoConfig::short() } else { DemoConfig::default() };
    let config = DemoConfig { seed: args.seed, cache, ..config };
    let mut watcher = Progress::new()?;
    let report = match &args.out {
        Some(dir) => {
            free(dir)?;
            demo::run(&config, dir, &mut watcher)?
        }
        None => {
            let dir = tempfile::Builder::new().prefix("lora-demo-").tempdir();
            let dir = dir.context("could not make a folder for the demo's files; name one with --out")?;
            demo::run(&config, dir.path(), &mut watcher)?
        }
    };
    let Some(report) = report else {
        ui::say("interrupted: nothing is kept but a finished base");
        return Err(ui::Interrupted.into());
    };
    if args.json {
        return ui::print_json(&report);
    }
    ui::print(text(&config, &report, args.out.as_deref()))
}

/// A line for each stage, and a bar for each run of the optimiser.
struct Progress {
    bar: ProgressBar,
    /// The method of the table that is trained now.
    row: &'static str,
    stop: Arc<AtomicBool>,
}

impl Progress {
    fn new() -> anyhow::Result<Progress> {
        let stop = Arc::new(AtomicBool::new(false));
        let raise = stop.clone();
        // There is nothing to save: the run stops at its next step, so that it clears up behind itself.
        ctrlc::set_handler(move || {
            if raise.swap(true, Ordering::SeqCst) {
                std::process::exit(ui::INTERRUPTED.into());
            }
        })?;
        Ok(Progress { bar: ProgressBar::hidden(), row: "", stop })
    }
}

impl Watcher for Progress {
    fn stage(&mut self, stage: Stage) {
        match stage {
            Stage::Pretrain => ui::say("pretraining a small GPT on prose ..."),
            Stage::Cached => ui::say("the pretrained base is in the cache"),
            Stage::Adapt(method) => ui::say(format_args!("adapting it to records: {method} ...")),
            Stage::Measure(_) => {}
            Stage::Table(steps) => ui::say(format_args!("every method for {steps} steps ...")),
            Stage::Row(method) => self.row = method,
        }
    }
}

impl Observer for Progress {
    fn start(&mut self, info: &RunInfo) {
        self.bar = ui::counter(info.steps, "steps  loss {msg}");
    }

    fn step(&mut self, step: &Step, _tokens_per_s: f64) {
        self.bar.set_message(format!("{:.3}  {}", step.loss, self.row));
        self.bar.set_position(step.step);
        if self.bar.length() == Some(step.step) {
            self.bar.finish_and_clear();
        }
    }

    fn note(&mut self, message: &str) {
        ui::note(message);
    }

    fn stop(&mut self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }
}

/// Columns of the report.
const WIDTH: usize = 80;

fn text(config: &DemoConfig, report: &Report, out: Option<&Path>) -> String {
    let Report { pretrain: base, methods, table, merge_max_logit_diff, samples } = report;
    let (shape, adapt) = (&config.pretrain, &config.adapt);
    let how = if base.cached { ", from the cache" } else { "" };
    let facts = [
        (
            "Base",
            format!(
                "GPT-2 of {} layers × {}, {} tokens of vocabulary, {} parameters",
                shape.layers,
                shape.dim,
                HumanCount(base.vocab_size as u64),
                HumanCount(base.parameters as u64)
            ),
        ),
        (
            "Upstream",
            format!(
                "{:.1} MB of prose about an invented town, {} steps in {:.0} s, loss {:.2}{how}",
                config.prose as f64 / 1e6,
                HumanCount(base.steps),
                base.seconds,
                base.loss
            ),
        ),
        (
            "Downstream",
            format!(
                "records of its eating places to sentences: {} to learn from, {} held out",
                HumanCount(config.records as u64),
                config.held_out
            ),
        ),
        (
            "LoRA",
            format!("rank {}, alpha {}, on {}", adapt.rank, adapt.alpha, adapt.targets.to_string().replace(',', ", ")),
        ),
    ];
    let mut text = String::from("\n");
    for (name, what) in facts {
        text += &wrap(&format!("{name:<11} "), &what);
    }
    text += &format!(
        "\n{:8}{:>11}{:>9}{:>12}{:>8}{:>16}{:>16}\n",
        "method", "trainable", "share", "checkpoint", "time", "held-out loss", "facts told"
    );
    for m in methods {
        text += &row(m);
    }
    text += &format!("\nMerged model against base + adapter: logits differ by at most {merge_max_logit_diff:.1e}\n");
    for sample in samples {
        text += "\n";
        text += &wrap("  record  ", &sample.record);
        for (label, said) in [("  before  ", &sample.before), ("  after   ", &sample.after)] {
            text += &wrap(label, if said.is_empty() { "(nothing)" } else { said });
        }
    }
    text += &format!(
        "\nEvery method after {} steps; before, the held-out loss is {:.3}\n\n{:16}{:>11}{:>9}{:>12}{:>8}{:>16}\n",
        config.table_steps,
        methods.first().map_or(f64::NAN, |m| m.loss_before),
        "method",
        "trainable",
        "share",
        "checkpoint",
        "time",
        "held-out loss"
    );
    for r in table {
        text += &format!(
            "{:16}{:>11}{:>9}{:>12}{:>8}{:>16}\n",
            r.name,
            HumanCount(r.trainable as u64).to_string(),
            format!("{:.2}%", 100.0 * r.trainable_share),
            HumanBytes(r.checkpoint_bytes).to_string(),
            format!("{:.1} s", r.seconds),
            format!("{:.3}", r.loss),
        );
    }
    if let Some(dir) = out {
        text += &format!("\nData, adapters and models are in {}\n", dir.display());
    }
    text
}

fn row(m: &MethodReport) -> String {
    format!(
        "{:8}{:>11}{:>9}{:>12}{:>8}{:>16}{:>16}\n",
        m.name,
        HumanCount(m.trainable as u64).to_string(),
        format!("{:.2}%", 100.0 * m.trainable_share),
        HumanBytes(m.checkpoint_bytes).to_string(),
        format!("{:.1} s", m.seconds),
        format!("{:.3} → {:.3}", m.loss_before, m.loss_after),
        format!("{:.0}% → {:.0}%", 100.0 * m.facts_before, 100.0 * m.facts_after),
    )
}

/// `text` after `label`, in lines of at most [`WIDTH`] columns, all but the first indented as far as the label goes.
fn wrap(label: &str, text: &str) -> String {
    let indent = label.chars().count();
    let (mut out, mut column) = (label.trim_end().to_owned(), indent - 1);
    out.extend(std::iter::repeat_n(' ', indent - 1 - label.trim_end().chars().count()));
    let mut first = true;
    for word in text.split_whitespace() {
        let n = word.chars().count();
        if !first && column + 1 + n > WIDTH {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent - 1));
            column = indent - 1;
        }
        out.push(' ');
        out += word;
        column += 1 + n;
        first = false;
    }
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrapped_lines_fit_and_hang() {
        let text = wrap("  label  ", &"word ".repeat(40));
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.len() > 2 && lines.iter().all(|l| l.chars().count() <= WIDTH), "{text}");
        assert!(lines[0].starts_with("  label  word") && lines[1].starts_with("         word"), "{text}");
        assert_eq!(wrap("  after   ", ""), "  after  \n");
    }
}
