//! Training against itself: what tokens cost in time and memory, and whether steps that repeat ask for memory.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{Bench, Kind, Work, rows, sides::spread};
use crate::{
    median,
    report::{Goal, Row},
};

impl Bench {
    /// Microseconds per token for batches of 256 to 8,192 tokens: the medians of rounds, in each of which all sizes have
    /// their turn in one process.
    pub(super) fn cost(&mut self) -> Result<Vec<Row>> {
        let work = self.placed(&rows::cost(self.config.tiny), "gpt2")?;
        let rounds = (0..self.config.rounds).map(|_| self.ours(&work)).collect::<Result<Vec<_>>>()?;
        let tokens = numbers(&rounds[0]["tokens"])?;
        // By round and size.
        let micros = rounds.iter().map(|round| {
            let sizes = list(&round["seconds"])?.iter().zip(&tokens);
            sizes.map(|(seconds, n)| Ok(median(&numbers(seconds)?) / n * 1e6)).collect::<Result<Vec<f64>>>()
        });
        let micros = micros.collect::<Result<Vec<_>>>()?;
        self.report.rounds.insert("cost".into(), json!(rounds));
        let of_size = |i: usize| median(&micros.iter().map(|round| round[i]).collect::<Vec<_>>());
        let medians: Vec<f64> = (0..tokens.len()).map(of_size).collect();
        let [low, high] = spread(&medians).context("no sizes")?;
        let ratios: Vec<f64> = micros.iter().filter_map(|round| spread(round).map(|[low, high]| high / low)).collect();
        let each: Vec<String> = tokens.iter().zip(&medians).map(|(n, us)| format!("{n}: {us:.0}")).collect();
        Ok(vec![
            Row {
                ours: Some(high),
                reference: Some(low),
                spread: spread(&ratios),
                ..Row::new(
                    "time of a token, LoRA training of GPT-2 small, batches of 256 to 8192 tokens, most over least",
                    "µs",
                    Some(Goal::at_most(1.1)),
                )
            }
            .noted(each.join(", ")),
        ])
    }

    /// Peak memory by tokens, each in a process of its own, because a peak never falls.
    pub(super) fn memory(&mut self) -> Result<Vec<Row>> {
        let sizes = rows::cost(self.config.tiny);
        let mut points = Vec::new();
        for i in 0..sizes.sizes {
            let work = Work { kind: Kind::Train, batch: sizes.batch << i, ..self.placed(&sizes, "gpt2")? };
            let result = self.ours(&Work { steps: 2, ceiling_ms: 0, ..work.clone() })?;
            let peak = result["peak_rss_mib"].as_f64().context("the system tells no peak of memory")?;
            points.push([(work.batch * work.tokens) as f64, peak * f64::from(1 << 20)]);
        }
        self.report.rounds.insert("memory".into(), json!(points));
        let line = Line::through(&points);
        let each: Vec<String> =
            points.iter().map(|[n, bytes]| format!("{n}: {:.0} MiB", bytes / f64::from(1 << 20))).collect();
        let worst = points.iter().map(|[n, bytes]| (bytes / line.at(*n) - 1.0).abs()).fold(0.0, f64::max);
        let what = "peak memory by tokens of a batch, GPT-2 small";
        Ok(vec![
            Row { ours: Some(line.slope), ..Row::new(format!("{what}: slope"), "bytes/token", None) }
                .noted(each.join(", ")),
            Row {
                ours: Some(100.0 * worst),
                ratio: Some(1.0 + worst),
                ..Row::new(format!("{what}: largest distance from the line"), "%", Some(Goal::at_most(1.1)))
            },
        ])
    }

    /// What steps of one shape ask the pool and the allocator for, from the third on.
    pub(super) fn steady(&mut self) -> Result<Vec<Row>> {
        let mut work = self.placed(&rows::steady(self.config.tiny), "gpt2")?;
        // Two steps to settle, two to count.
        work.steps = work.steps.max(4);
        let result = self.ours(&work)?;
        let [misses, calls, bytes] = ["pool_misses", "allocations", "allocated_bytes"].map(|key| numbers(&result[key]));
        let (misses, calls, bytes) = (misses?, calls?, bytes?);
        let faults = numbers(&result["page_faults"])?;
        self.report.rounds.insert("steady".into(), result);
        let (warm, last) = (misses.get(1).context("too few steps")?, misses.last().context("too few steps")?);
        let steps = (misses.len() - 2) as f64;
        let what = "a step of GPT-2 small, 8 × 128, repeated";
        let steady = |values: &[f64]| median(values.get(2..).unwrap_or_default());
        Ok(vec![
            Row {
                ours: Some((last - warm) / steps),
                ratio: Some((last - warm) / steps),
                ..Row::new(
                    format!("{what}: blocks that its memory pool takes from the system"),
                    "blocks",
                    Some(Goal::at_most(0.0)),
                )
            }
            .noted("activations, gradients and all other matrices"),
            Row { ours: Some(steady(&calls)), ..Row::new(format!("{what}: calls of the allocator"), "calls", None) }
                .noted(format!(
                    "{:.0} bytes, {:.0} calls in the first step",
                    steady(&bytes),
                    calls.first().unwrap_or(&0.0)
                )),
            Row {
                ours: Some(steady(&faults)).filter(|n| n.is_finite()),
                ..Row::new(format!("{what}: pages that the system gives it"), "pages", None)
            }
            .noted("of 4 KiB, or huge ones"),
        ])
    }
}

fn list(of: &Value) -> Result<&Vec<Value>> {
    of.as_array().with_context(|| format!("no list: {of}"))
}

fn numbers(of: &Value) -> Result<Vec<f64>> {
    list(of)?.iter().map(|v| v.as_f64().with_context(|| format!("no number: {v}"))).collect()
}

/// y = intercept + slope·x.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Line {
    intercept: f64,
    slope: f64,
}

impl Line {
    /// The line of least squared distances.
    fn through(points: &[[f64; 2]]) -> Line {
        let mean = |i: usize| points.iter().map(|p| p[i]).sum::<f64>() / points.len() as f64;
        let (x, y) = (mean(0), mean(1));
        let sum = |f: &dyn Fn(&[f64; 2]) -> f64| points.iter().map(f).sum::<f64>();
        let slope = sum(&|p| (p[0] - x) * (p[1] - y)) / sum(&|p| (p[0] - x).powi(2));
        Line { intercept: y - slope * x, slope }
    }

    fn at(self, x: f64) -> f64 {
        self.intercept + self.slope * x
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_the_least_squares() {
        let exact = Line::through(&[[1.0, 5.0], [2.0, 7.0], [4.0, 11.0]]);
        assert_eq!(exact, Line { intercept: 3.0, slope: 2.0 });
        // Normal equations by hand: means 1 and 2, Σdxdy = 2, Σdx² = 2.
        let line = Line::through(&[[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]);
        assert_eq!((line.slope, line.at(10.0)), (1.0, 11.0));
        let bent = Line::through(&[[0.0, 0.0], [1.0, 3.0], [2.0, 0.0]]);
        assert_eq!((bent.slope, bent.intercept), (0.0, 1.0));
    }
}
