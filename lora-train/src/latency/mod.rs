//! The time of one forward pass, as in table 1 of the LoRA paper: the base, LoRA merged into it and beside it, adapters and
//! a prefix.
//!
//! A pass is what inference does of whole sequences: hidden states of all tokens, and the logits of each sequence's last
//! token (of an encoder those of each sequence). Logits of all tokens, which nobody needs to continue a text, would be
//! 3.3 GB for 32 sequences of 512 tokens of GPT-2, and the same for every variant.
//!
//! Every round runs each variant once; rounds begin with another variant each and every other one runs backwards, so that a
//! machine that slows down or speeds up favours none. Times are medians with quartiles over rounds, ratios medians of the
//! rounds' own ratios. Weights may be random, since time does not depend on them. Nothing is measured at zero: B of LoRA is
//! random too, and the merged model has weights of its own, W₀ + s·B·A.

mod report;
mod variants;

use std::{path::PathBuf, str::FromStr, time::Instant};

use lora_kernels::DType;
use lora_model::{LoadOptions, Model, Task, config::RawConfig, load_with};

use crate::{Error, Place, Result, plan::arch_named};
use variants::Variants;

pub use report::{LatencyReport, LatencyRow, Quartiles, ShapeReport};

/// Sequences, their length, and the size of adapters for them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Sequences.
    pub batch: usize,
    /// Tokens of each.
    pub seq: usize,
    /// Θ: about how many scalars an adapter trains.
    pub theta: Option<f64>,
}

impl FromStr for Shape {
    type Err = Error;

    /// Reads `32x512`, or with Θ `32x512@0.5M`.
    fn from_str(text: &str) -> Result<Shape> {
        let bad = || {
            let why = "a shape is BATCHxTOKENS, such as 16x256, or with the size of adapters BATCHxTOKENS@PARAMETERS, such as \
                       16x256@11M";
            Error::option("shapes", text, why)
        };
        let (sizes, theta) = text.split_once('@').map_or((text, None), |(sizes, theta)| (sizes, Some(theta)));
        let (batch, seq) = sizes.split_once('x').ok_or_else(bad)?;
        let size = |s: &str| s.trim().parse::<usize>().ok().filter(|n| (1..=1 << 20).contains(n)).ok_or_else(bad);
        Ok(Shape {
            batch: size(batch)?,
            seq: size(seq)?,
            theta: theta.map(|t| scalars(t).ok_or_else(bad)).transpose()?,
        })
    }
}

/// A number of parameters: `500000`, `0.5M`, `11M`, `350k`.
fn scalars(text: &str) -> Option<f64> {
    let text = text.trim();
    let (number, unit) = match text.char_indices().last()? {
        (at, 'k' | 'K') => (&text[..at], 1e3),
        (at, 'M') => (&text[..at], 1e6),
        (at, 'B' | 'G') => (&text[..at], 1e9),
        _ => (text, 1.0),
    };
    Some(number.trim().parse::<f64>().ok()? * unit).filter(|n| n.is_finite() && *n >= 1.0)
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct LatencyConfig {
    /// A model of [`ARCHS`](crate::plan::ARCHS), with random weights.
    pub arch: Option<String>,
    /// Or the folder of a model.
    pub model: Option<PathBuf>,
    /// Batches.
    pub shapes: Vec<Shape>,
    /// Rounds: one number for all shapes, or one for each.
    pub rounds: Vec<usize>,
    /// Passes of each variant before the first round.
    pub warmup: usize,
    /// The variants to measure, by their names in the report; all when empty. The base is always among them.
    pub only: Vec<String>,
    /// Rank of LoRA.
    pub rank: usize,
    /// Modules that LoRA adapts; queries and values when empty.
    pub targets: Vec<String>,
    /// Width of the adapters' bottlenecks; by the shape's Θ when absent, and without one by the paper's share: 11M
    /// parameters on the 355M of GPT-2 medium.
    pub bottleneck: Option<usize>,
    /// Virtual tokens of the prefix; 0 leaves it out, as does a shape that leaves no positions for it.
    pub prefix: usize,
    /// Seed of weights and tokens.
    pub seed: u64,
    /// `cpu`, `cuda`, `cuda:N` or `auto`.
    pub device: String,
    /// `f32`, `bf16`, `f16` or `auto`.
    pub dtype: String,
}

impl Default for LatencyConfig {
    fn default() -> LatencyConfig {
        let shape = |batch, seq, theta| Shape { batch, seq, theta: Some(theta) };
        LatencyConfig {
            arch: None,
            model: None,
            // The paper's.
            shapes: vec![shape(32, 512, 0.5e6), shape(16, 256, 11e6), shape(1, 128, 11e6)],
            rounds: vec![10],
            warmup: 1,
            only: Vec::new(),
            rank: 4,
            targets: Vec::new(),
            bottleneck: None,
            prefix: 14,
            seed: 0,
            device: "cpu".into(),
            dtype: "auto".into(),
        }
    }
}

/// Watches a measurement: a progress bar, Ctrl-C. Everything is optional.
pub trait LatencyWatcher {
    /// A shape begins, with so many passes.
    fn shape(&mut self, _shape: &Shape, _passes: u64) {}
    /// A pass is done.
    fn pass(&mut self) {}
    /// Something a person should know.
    fn note(&mut self, _message: &str) {}
    /// Asked before every pass: whether to stop.
    fn stop(&mut self) -> bool {
        false
    }
}

impl LatencyWatcher for () {}

/// Measures.
///
/// When the watcher stops it, the report has what whole rounds have given so far and says so.
///
/// # Errors
/// An unknown model, sizes that the model has no positions for, options that make no sense, no memory, no device.
pub fn latency(config: &LatencyConfig, watcher: &mut dyn LatencyWatcher) -> Result<LatencyReport> {
    check(config)?;
    let Place { device, dtype, note } = Place::open(&config.device, &config.dtype)?;
    note.iter().for_each(|note| watcher.note(note));
    let (name, model) = base(config, &device, dtype)?;
    let positions = model.limits().max_positions;
    for shape in &config.shapes {
        if shape.seq > positions {
            let why = format!("the model has {positions} positions");
            return Err(Error::option("shapes", format_args!("{}x{}", shape.batch, shape.seq), why));
        }
    }
    let mut report = LatencyReport {
        model: name,
        architecture: model.outline().architecture.clone(),
        parameters: model.outline().parameters() as u64,
        device: device.to_string(),
        threads: rayon::current_num_threads(),
        dtype_bytes: dtype.size(),
        random_weights: config.arch.is_some(),
        interrupted: false,
        shapes: Vec::new(),
    };
    let variants = Variants::new(&*model, config, &device, dtype)?;
    for (i, shape) in config.shapes.iter().enumerate() {
        let rounds = config.rounds.get(i).or(config.rounds.first()).copied().unwrap_or(1);
        let measured = measure(&variants, shape, rounds, config, watcher)?;
        report.interrupted = measured.interrupted;
        let theirs = config.arch.as_deref().filter(|_| config.bottleneck.is_none());
        let theirs = theirs.map_or(&[][..], |arch| report::of_paper(arch, shape));
        report.shapes.extend(ShapeReport::new(shape, &measured, theirs));
        if report.interrupted {
            break;
        }
    }
    Ok(report)
}

fn check(c: &LatencyConfig) -> Result<()> {
    const MOST: usize = 1 << 20;
    if c.shapes.is_empty() {
        return Err(Error::option("shapes", "", "name at least one, such as 1x128"));
    }
    if c.warmup > MOST {
        return Err(Error::option("warmup", c.warmup, format!("is at most {MOST}")));
    }
    let rounds = c.rounds.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    match c.rounds.as_slice() {
        all if all.contains(&0) || all.iter().any(|n| *n > MOST) => {
            Err(Error::option("rounds", rounds, format!("there are from 1 to {MOST} rounds")))
        }
        [_] => Ok(()),
        all if all.len() == c.shapes.len() => Ok(()),
        _ => Err(Error::option("rounds", rounds, "give one number, or one for each of the shapes")),
    }
}

/// The base and its name.
fn base(c: &LatencyConfig, device: &lora_kernels::Device, dtype: DType) -> Result<(String, Box<dyn Model>)> {
    let task = |raw: &RawConfig| -> Result<Option<Task>> {
        Ok(Some((raw.architecture()?.task)(raw)?.unwrap_or(Task::Classification { labels: 2 })))
    };
    match (&c.arch, &c.model) {
        (Some(name), None) => {
            let raw = arch_named(name)?.config();
            let options = LoadOptions { dtype, task: task(&raw)?, ..LoadOptions::default() };
            Ok((name.clone(), variants::random(raw, device, &options, c.seed)?))
        }
        (None, Some(dir)) => {
            let options = LoadOptions { dtype, task: task(&RawConfig::from_dir(dir)?)?, ..LoadOptions::default() };
            Ok((dir.display().to_string(), load_with(dir, device, &options)?))
        }
        _ => Err(Error::option("arch", "", "name either a model as --arch or a folder as --model")),
    }
}

/// The times of one shape.
pub(crate) struct Measured {
    /// What was measured: name, scalars beside the base, and how it was set.
    pub(crate) variants: Vec<(String, usize, String)>,
    /// Seconds by variant and round, of whole rounds.
    pub(crate) seconds: Vec<Vec<f64>>,
    /// Variants that this model has no place for, and why.
    pub(crate) left_out: Vec<String>,
    interrupted: bool,
}

fn measure(
    variants: &Variants,
    shape: &Shape,
    rounds: usize,
    config: &LatencyConfig,
    watcher: &mut dyn LatencyWatcher,
) -> Result<Measured> {
    let (ready, left_out) = variants.of(shape)?;
    let n = ready.len();
    watcher.shape(shape, (n * (config.warmup + rounds)) as u64);
    let mut measured = Measured {
        variants: ready.iter().map(|v| (v.name.to_owned(), v.scalars, v.setting.clone())).collect(),
        seconds: vec![Vec::with_capacity(rounds); n],
        left_out,
        interrupted: false,
    };
    let passes = (0..config.warmup).flat_map(|_| 0..n).map(|v| (None, v));
    for (round, v) in passes.chain((0..rounds).flat_map(|r| order(r, n).map(move |v| (Some(r), v)))) {
        if watcher.stop() {
            let whole = measured.seconds.iter().map(Vec::len).min().unwrap_or(0);
            measured.seconds.iter_mut().for_each(|s| s.truncate(whole));
            measured.interrupted = true;
            break;
        }
        let start = Instant::now();
        ready[v].forward()?;
        let seconds = start.elapsed().as_secs_f64();
        if round.is_some() {
            measured.seconds[v].push(seconds);
        }
        watcher.pass();
    }
    Ok(measured)
}

/// The order of n variants in a round.
fn order(round: usize, n: usize) -> impl Iterator<Item = usize> {
    let backwards = round % 2 == 1;
    (0..n).map(move |i| (round + if backwards { n - i } else { i }) % n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_read_as_they_are_written() {
        let shape = |batch, seq, theta| Some(Shape { batch, seq, theta });
        for (text, expected) in [
            ("32x512", shape(32, 512, None)),
            ("16x256@11M", shape(16, 256, Some(11e6))),
            ("1x128@0.5M", shape(1, 128, Some(0.5e6))),
            ("1x8@350k", shape(1, 8, Some(350e3))),
            ("1x8@1234", shape(1, 8, Some(1234.0))),
            ("x8", None),
            ("8", None),
            ("0x8", None),
            ("8x0", None),
            ("1x8@", None),
            ("1x8@0", None),
            ("1x8@-1M", None),
            ("1x8@nan", None),
            ("9999999x8", None),
            ("1x8é", None),
            ("1x8@é", None),
        ] {
            assert_eq!(text.parse::<Shape>().ok(), expected, "{text}");
        }
    }

    #[test]
    fn rounds_run_every_variant_once_and_begin_with_each() {
        let rounds: Vec<Vec<usize>> = (0..12).map(|r| order(r, 6).collect()).collect();
        for round in &rounds {
            let mut sorted = round.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3, 4, 5], "{round:?}");
        }
        let mut first: Vec<usize> = rounds.iter().map(|r| r[0]).collect();
        first.sort_unstable();
        first.dedup();
        assert_eq!(first.len(), 6);
        assert_ne!(rounds[0], rounds[1]);
    }
}
