//! What was measured, for people and programs.

use std::fmt::Write;

use serde::Serialize;

use super::{Measured, Shape};
use crate::tables::aligned;

/// A measurement.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LatencyReport {
    /// The model's name, or its folder.
    pub model: String,
    /// `model_type`.
    pub architecture: String,
    /// Scalars of the base.
    pub parameters: u64,
    /// Where it was computed.
    pub device: String,
    /// On how many threads, on the CPU.
    pub threads: usize,
    /// Bytes of a scalar of the type computed in.
    pub dtype_bytes: usize,
    /// Whether the weights were random.
    pub random_weights: bool,
    /// Whether it was stopped before its last round.
    pub interrupted: bool,
    /// By shape.
    pub shapes: Vec<ShapeReport>,
}

/// What was measured of one shape.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ShapeReport {
    /// Sequences.
    pub batch: usize,
    /// Tokens of each.
    pub seq: usize,
    /// Whole rounds.
    pub rounds: usize,
    /// The variants, the base first.
    pub rows: Vec<LatencyRow>,
    /// Variants that the model has no place for, and why.
    pub left_out: Vec<String>,
}

/// What was measured of one variant.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LatencyRow {
    /// Its name.
    pub name: String,
    /// Its options.
    pub setting: String,
    /// Scalars that it adds to the base.
    pub scalars: usize,
    /// Milliseconds of a pass.
    pub ms: Quartiles,
    /// Its time to that of the base, round by round.
    pub ratio: Quartiles,
    /// The ratio in the LoRA paper's table 1, for its model and shapes.
    pub paper_ratio: Option<f64>,
}

/// Where a quarter, a half and three quarters of some numbers lie, and their ends.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Quartiles {
    /// The least.
    pub min: f64,
    /// A quarter is below.
    pub q1: f64,
    /// A half is below.
    pub median: f64,
    /// Three quarters are below.
    pub q3: f64,
    /// The most.
    pub max: f64,
}

impl Quartiles {
    /// Of at least one number; between two neighbours in proportion, as NumPy's default has it.
    pub(crate) fn of(values: &[f64]) -> Option<Quartiles> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1)?;
        let at = |share: f64| {
            let place = share * last as f64;
            let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
            low + (high - low) * place.fract()
        };
        Some(Quartiles { min: at(0.0), q1: at(0.25), median: at(0.5), q3: at(0.75), max: at(1.0) })
    }
}

impl ShapeReport {
    /// `None` before the first whole round.
    pub(super) fn new(shape: &Shape, measured: &Measured, theirs: &[(&str, f64)]) -> Option<ShapeReport> {
        let base = measured.seconds.first()?;
        let row = |((name, scalars, setting), seconds): (&(String, usize, String), &Vec<f64>)| {
            let ms: Vec<f64> = seconds.iter().map(|s| 1e3 * s).collect();
            let ratios: Vec<f64> = seconds.iter().zip(base).map(|(s, base)| s / base).collect();
            Some(LatencyRow {
                name: name.clone(),
                setting: setting.clone(),
                scalars: *scalars,
                ms: Quartiles::of(&ms)?,
                ratio: Quartiles::of(&ratios)?,
                paper_ratio: theirs.iter().find(|(n, _)| n == name).map(|(_, ratio)| *ratio),
            })
        };
        Some(ShapeReport {
            batch: shape.batch,
            seq: shape.seq,
            rounds: base.len(),
            rows: measured.variants.iter().zip(&measured.seconds).map(row).collect::<Option<_>>()?,
            left_out: measured.left_out.clone(),
        })
    }
}

/// Table 1 of the paper as ratios to full fine-tuning, whose pass is the base's; its model, its shapes and its adapters alone.
pub(super) fn of_paper(arch: &str, shape: &Shape) -> &'static [(&'static str, f64)] {
    // Without Θ adapters have the share of 11M.
    let adapters = shape.theta.unwrap_or(11e6);
    match (arch, shape.batch, shape.seq) {
        (_, 32, 512) if adapters != 0.5e6 => &[],
        (_, 16, 256) | (_, 1, 128) if adapters != 11e6 => &[],
        ("gpt2-medium", 32, 512) => {
            &[("lora, merged", 1.0), ("adapter-l", 1482.0 / 1449.4), ("adapter-h", 1492.2 / 1449.4)]
        }
        ("gpt2-medium", 16, 256) => {
            &[("lora, merged", 1.0), ("adapter-l", 354.8 / 338.0), ("adapter-h", 366.3 / 338.0)]
        }
        ("gpt2-medium", 1, 128) => &[("lora, merged", 1.0), ("adapter-l", 23.9 / 19.8), ("adapter-h", 25.8 / 19.8)],
        _ => &[],
    }
}

impl LatencyReport {
    /// The report as Markdown, aligned for the eye.
    pub fn markdown(&self) -> String {
        let dtype = if self.dtype_bytes == 4 { "f32" } else { "16 bits" };
        let threads = if self.device == "cpu" { format!(", {} threads", self.threads) } else { String::new() };
        let weights = if self.random_weights { ", random weights" } else { "" };
        let mut text = format!(
            "One forward pass of {} ({:.1}M parameters{weights}) in {dtype} on {}{threads}.\n\
             Hidden states of all tokens, logits of each sequence's last. Medians, quartiles in brackets; ratios to the base.\n",
            self.model,
            self.parameters as f64 / 1e6,
            self.device
        );
        for shape in &self.shapes {
            let plural = if shape.rounds == 1 { "" } else { "s" };
            let _ = write!(text, "\n{} × {} tokens, {} round{plural}\n\n", shape.batch, shape.seq, shape.rounds);
            text += &shape.table();
            for why in &shape.left_out {
                let _ = writeln!(text, "\nLeft out: {why}");
            }
        }
        if self.interrupted {
            text += "\nStopped before its last round.\n";
        }
        text
    }
}

impl ShapeReport {
    fn table(&self) -> String {
        let paper = self.rows.iter().any(|r| r.paper_ratio.is_some());
        let mut rows = vec![["", "setting", "parameters", "ms", "", "ratio", ""].map(String::from).to_vec()];
        for r in &self.rows {
            let Quartiles { q1, median, q3, .. } = r.ms;
            rows.push(vec![
                r.name.clone(),
                r.setting.clone(),
                if r.scalars == 0 { String::new() } else { format!("{:.3}M", r.scalars as f64 / 1e6) },
                digits(median),
                format!("[{}, {}]", digits(q1), digits(q3)),
                format!("{:.3}", r.ratio.median),
                format!("[{:.3}, {:.3}]", r.ratio.q1, r.ratio.q3),
            ]);
        }
        if paper {
            rows[0].push("paper".into());
            for (row, r) in rows[1..].iter_mut().zip(&self.rows) {
                row.push(r.paper_ratio.map_or(String::new(), |ratio| format!("{ratio:.3}")));
            }
        }
        const WORDS: usize = 2;
        let rule = |(column, cell): (usize, &String)| {
            let dashes = "-".repeat(cell.chars().count() + 1);
            dashes + if column < WORDS { "-" } else { ":" }
        };
        let mut lines: Vec<String> = Vec::new();
        for row in aligned(&rows, WORDS) {
            lines.push(format!("| {} |\n", row.join(" | ")));
            if lines.len() == 1 {
                lines.push(format!("|{}|\n", row.iter().enumerate().map(rule).collect::<Vec<_>>().join("|")));
            }
        }
        lines.concat()
    }
}

/// Milliseconds with three or more digits.
fn digits(ms: f64) -> String {
    match ms {
        _ if ms >= 100.0 => format!("{ms:.1}"),
        _ if ms >= 10.0 => format!("{ms:.2}"),
        _ => format!("{ms:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_lie_between_neighbours() {
        let q = Quartiles::of(&[4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!((q.min, q.q1, q.median, q.q3, q.max), (1.0, 1.75, 2.5, 3.25, 4.0));
        let one = Quartiles::of(&[7.0]).unwrap();
        assert_eq!((one.min, one.median, one.max), (7.0, 7.0, 7.0));
        assert_eq!(Quartiles::of(&[]), None);
    }

    #[test]
    fn ratios_are_medians_of_the_rounds_own() {
        // The machine halves its speed after the first round: the ratio stays.
        let measured = Measured {
            variants: vec![("base".into(), 0, String::new()), ("adapter-l".into(), 5, "r = 1".into())],
            seconds: vec![vec![1.0, 2.0, 2.0], vec![1.1, 2.2, 2.6]],
            left_out: vec!["nothing".into()],
            interrupted: false,
        };
        let shape = Shape { batch: 16, seq: 256, theta: None };
        let report = ShapeReport::new(&shape, &measured, of_paper("gpt2-medium", &shape)).unwrap();
        let row = &report.rows[1];
        assert!((row.ratio.median - 1.1).abs() < 1e-12 && (row.ms.median - 2200.0).abs() < 1e-9);
        assert!((row.paper_ratio.unwrap() - 1.0497).abs() < 1e-4);
        assert_eq!(report.rows[0].paper_ratio, None);
        let none = Measured { seconds: vec![Vec::new(), Vec::new()], ..measured };
        assert_eq!(ShapeReport::new(&shape, &none, &[]), None);
        assert!(of_paper("gpt2", &shape).is_empty());
        for (text, rows) in [("32x512", 0), ("32x512@11M", 0), ("32x512@0.5M", 3), ("16x256@0.5M", 0), ("1x128@11M", 3)]
        {
            assert_eq!(of_paper("gpt2-medium", &text.parse().unwrap()).len(), rows, "{text}");
        }
        let lines: Vec<usize> = report.table().lines().map(|l| l.chars().count()).collect();
        assert!(lines.iter().all(|n| *n == lines[0]) && lines.len() == 4, "{}", report.table());
    }
}
