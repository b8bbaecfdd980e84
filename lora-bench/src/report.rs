//! A table of measurements against what they are compared with, and against goals.

use std::path::Path;

use anyhow::Result;
use serde_json::{Map, Value, json};

/// What a ratio should be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Goal {
    /// What it has to be.
    pub at_least: f64,
    /// What it should be.
    pub aim: f64,
}

impl Goal {
    /// A limit that small ratios keep, without an aim beyond it.
    pub const fn at_most(limit: f64) -> Goal {
        Goal { at_least: limit, aim: f64::NEG_INFINITY }
    }

    /// Whether small ratios are the good ones: times, where the aim lies below the limit.
    pub fn lower_is_better(&self) -> bool {
        self.aim < self.at_least
    }

    /// What a ratio means.
    pub fn verdict(&self, ratio: f64) -> Verdict {
        let reaches = |goal: f64| if self.lower_is_better() { ratio <= goal } else { ratio >= goal };
        match (reaches(self.aim), reaches(self.at_least)) {
            (true, _) => Verdict::Aim,
            (false, true) => Verdict::Enough,
            (false, false) => Verdict::Missed,
        }
    }
}

/// What a measurement means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The aim is reached.
    Aim,
    /// What is asked for at least is reached.
    Enough,
    /// It is not.
    Missed,
    /// There is a goal, but nothing was measured.
    Unmeasured,
    /// There is no goal.
    Information,
}

impl Verdict {
    /// One word for the table.
    pub fn word(self) -> &'static str {
        match self {
            Verdict::Aim => "aim reached",
            Verdict::Enough => "enough",
            Verdict::Missed => "MISSED",
            Verdict::Unmeasured => "not measured",
            Verdict::Information => "-",
        }
    }
}

/// One measurement.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// What was measured, with its sizes.
    pub what: String,
    /// The unit of `ours` and `reference`.
    pub unit: &'static str,
    /// Our figure.
    pub ours: Option<f64>,
    /// The figure that it is compared with.
    pub reference: Option<f64>,
    /// Ours over the reference, where that was not taken from these two figures themselves.
    pub ratio: Option<f64>,
    /// The least and the largest ratio of single rounds.
    pub spread: Option<[f64; 2]>,
    /// What the ratio should be.
    pub goal: Option<Goal>,
    /// What the figures are of, or why they are missing.
    pub note: String,
}

impl Row {
    /// A row without figures.
    pub fn new(what: impl Into<String>, unit: &'static str, goal: Option<Goal>) -> Row {
        Row {
            what: what.into(),
            unit,
            ours: None,
            reference: None,
            ratio: None,
            spread: None,
            goal,
            note: String::new(),
        }
    }

    /// The same with a note.
    pub fn noted(mut self, note: impl Into<String>) -> Row {
        self.note = note.into();
        self
    }

    /// The same with the reason why there are no figures, in one line.
    pub fn failed(self, why: &anyhow::Error) -> Row {
        let line = format!("failed: {why:#}").split_whitespace().collect::<Vec<_>>().join(" ");
        let note = line.chars().take(400).collect::<String>();
        self.noted(note)
    }

    /// Ours over the reference; `None` without both.
    pub fn ratio(&self) -> Option<f64> {
        self.ratio.or_else(|| Some(self.ours? / self.reference?)).filter(|r| r.is_finite())
    }

    /// What the ratio means.
    pub fn verdict(&self) -> Verdict {
        match (self.goal, self.ratio()) {
            (Some(goal), Some(ratio)) => goal.verdict(ratio),
            (Some(_), None) => Verdict::Unmeasured,
            (None, _) => Verdict::Information,
        }
    }

    fn cells(&self) -> [String; 10] {
        let figure = |x: Option<f64>| x.map_or_else(|| "-".into(), figure);
        let goal = |of: fn(&Goal) -> f64| {
            let sign = |g: &Goal| if g.lower_is_better() { "≤ " } else { "" };
            let text = |g: Goal| of(&g).is_finite().then(|| format!("{}{:.2}", sign(&g), of(&g)));
            self.goal.and_then(text).unwrap_or_else(|| "-".into())
        };
        [
            self.what.clone(),
            figure(self.ours),
            figure(self.reference),
            self.unit.into(),
            self.ratio().map_or_else(|| "-".into(), |r| format!("{r:.3}")),
            self.spread.map_or_else(|| "-".into(), |[low, high]| format!("{low:.3} to {high:.3}")),
            goal(|g| g.at_least),
            goal(|g| g.aim),
            self.verdict().word().into(),
            self.note.clone(),
        ]
    }

    fn json(&self) -> Value {
        json!({
            "what": self.what,
            "unit": self.unit,
            "ours": self.ours,
            "reference": self.reference,
            "ratio": self.ratio(),
            "spread": self.spread,
            "at_least": self.goal.map(|g| g.at_least),
            "aim": self.goal.map(|g| g.aim).filter(|aim| aim.is_finite()),
            "verdict": self.verdict().word(),
            "note": self.note,
        })
    }
}

/// Four significant digits, but no less than whole numbers.
fn figure(x: f64) -> String {
    let digits = if x == 0.0 || !x.is_finite() { 0 } else { (3 - x.abs().log10().floor() as i32).clamp(0, 6) };
    format!("{x:.*}", digits as usize)
}

/// Everything that one run found out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// The device, its driver, its clocks.
    pub facts: Map<String, Value>,
    /// The measurements.
    pub rows: Vec<Row>,
    /// All that single rounds found out, where there are any.
    pub rounds: Map<String, Value>,
}

const HEAD: [&str; 10] =
    ["what", "ours", "reference", "unit", "ratio", "of rounds", "at least", "aim", "verdict", "note"];
/// Columns of numbers.
const NUMBERS: [usize; 6] = [1, 2, 4, 5, 6, 7];

impl Report {
    /// A table for a terminal.
    pub fn table(&self) -> String {
        let rows: Vec<[String; 10]> =
            std::iter::once(HEAD.map(String::from)).chain(self.rows.iter().map(Row::cells)).collect();
        let widths: Vec<usize> =
            (0..HEAD.len()).map(|i| rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0)).collect();
        let line = |row: &[String; 10]| {
            let cell = |(i, text): (usize, &String)| match NUMBERS.contains(&i) {
                true => format!("{text:>0$}", widths[i]),
                false => format!("{text:<0$}", widths[i]),
            };
            let cells: Vec<String> = row.iter().enumerate().map(cell).collect();
            format!("{}\n", cells.join("  ").trim_end())
        };
        rows.iter().map(line).collect()
    }

    /// The facts and the table as Markdown.
    pub fn markdown(&self) -> String {
        let escape = |text: &str| text.replace('|', "\\|").replace('\n', " ");
        let mut out = String::new();
        for (name, value) in &self.facts {
            let text = value.as_str().map_or_else(|| value.to_string(), String::from);
            out += &format!("- {name}: {}\n", escape(&text));
        }
        let rule = (0..HEAD.len()).map(|i| if NUMBERS.contains(&i) { "---:" } else { "---" });
        out += &format!("\n| {} |\n| {} |\n", HEAD.join(" | "), rule.collect::<Vec<_>>().join(" | "));
        for row in &self.rows {
            out += &format!("| {} |\n", row.cells().map(|c| escape(&c)).join(" | "));
        }
        out
    }

    /// The same as one JSON object.
    pub fn json(&self) -> Value {
        let rows = self.rows.iter().map(Row::json).collect::<Vec<_>>();
        json!({ "facts": self.facts, "rows": rows, "rounds": self.rounds })
    }

    /// Writes the report into the files that are named.
    ///
    /// # Errors
    /// What writing a file can cause.
    pub fn write(&self, json: Option<&Path>, markdown: Option<&Path>) -> Result<()> {
        for (file, text) in [(json, format!("{:#}\n", self.json())), (markdown, self.markdown())] {
            if let Some(file) = file {
                lora_model::files::write_bytes(file, text.as_bytes())?;
            }
        }
        Ok(())
    }

    /// How many goals were reached, as a sentence.
    pub fn summary(&self) -> String {
        let (reached, missed) = self.reached_and_missed();
        let all = self.rows.iter().filter(|r| r.goal.is_some()).count();
        format!("{reached} of {all} goals reached, {missed} missed, {} not measured", all - reached - missed)
    }

    /// How many rows with a goal reach it, and how many miss it.
    pub fn reached_and_missed(&self) -> (usize, usize) {
        let count = |of: &[Verdict]| self.rows.iter().filter(|r| of.contains(&r.verdict())).count();
        (count(&[Verdict::Aim, Verdict::Enough]), count(&[Verdict::Missed]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Goal = Goal { at_least: 0.9, aim: 1.0 };
    const TIME: Goal = Goal { at_least: 1.10, aim: 1.06 };

    fn row(ours: f64, reference: f64, goal: Option<Goal>) -> Row {
        Row { ours: Some(ours), reference: Some(reference), ..Row::new("a | b", "TFLOP/s", goal) }
    }

    #[test]
    fn verdicts_of_rates_and_of_times() {
        for (ratio, goal, want) in [
            (1.0, RATE, Verdict::Aim),
            (0.999, RATE, Verdict::Enough),
            (0.9, RATE, Verdict::Enough),
            (0.899, RATE, Verdict::Missed),
            (f64::NAN, RATE, Verdict::Missed),
            (1.0, TIME, Verdict::Aim),
            (1.06, TIME, Verdict::Aim),
            (1.1, TIME, Verdict::Enough),
            (1.101, TIME, Verdict::Missed),
            (f64::NAN, TIME, Verdict::Missed),
            (0.0, Goal::at_most(0.0), Verdict::Enough),
            (1.2, Goal::at_most(1.1), Verdict::Missed),
        ] {
            assert_eq!(goal.verdict(ratio), want, "{ratio} of {goal:?}");
        }
        assert_eq!(row(9.0, 10.0, None).verdict(), Verdict::Information);
        assert_eq!(Row::new("", "", Some(RATE)).verdict(), Verdict::Unmeasured);
        assert_eq!(row(1.0, 0.0, Some(RATE)).verdict(), Verdict::Unmeasured, "no ratio to nothing");
        assert_eq!(Row { ratio: Some(0.5), ..row(1.0, 1.0, Some(RATE)) }.verdict(), Verdict::Missed);
    }

    #[test]
    fn reasons_are_one_line_of_bounded_length() {
        let e = anyhow::anyhow!("cause\n  at line 1\n{}", "x".repeat(1000)).context("no row");
        let note = Row::new("", "", None).failed(&e).note;
        assert!(note.starts_with("failed: no row: cause at line 1 xxx") && note.len() == 400, "{note}");
    }

    #[test]
    fn figures_have_four_digits() {
        for (x, want) in [
            (0.0, "0"),
            (0.012345, "0.01235"),
            (1.0, "1.000"),
            (98.765, "98.77"),
            (712.34, "712.3"),
            (54321.0, "54321"),
        ] {
            assert_eq!(figure(x), want);
        }
    }

    #[test]
    fn tables_line_up_and_lose_nothing() {
        let rows =
            vec![row(712.0, 800.0, Some(RATE)), Row::new("longer than the other", "ms", Some(TIME)).noted("why")];
        let report = Report { rows, facts: Map::from_iter([("driver".into(), json!("580"))]), rounds: Map::new() };
        let table = report.table();
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 3);
        let column = |line: &str, word: &str| line.find(word).map(|at| line[..at].chars().count());
        assert_eq!(column(lines[0], "verdict"), column(lines[1], "MISSED"));
        assert_eq!(column(lines[0], "verdict"), column(lines[2], "not measured"));
        assert!(lines[1].contains("0.890") && lines[2].contains("≤ 1.10") && lines[2].ends_with("why"), "{table}");

        let markdown = report.markdown();
        assert!(markdown.starts_with("- driver: 580\n") && markdown.contains("| a \\| b |"), "{markdown}");
        let bars: Vec<usize> = markdown.lines().skip(2).map(|l| l.replace("\\|", "").matches('|').count()).collect();
        assert_eq!(bars, [11; 4], "{markdown}");

        let json = report.json();
        assert_eq!((&json["rows"][0]["ratio"], &json["rows"][0]["verdict"]), (&json!(0.89), &json!("MISSED")));
        assert_eq!((&json["rows"][1]["ours"], &json["rows"][1]["aim"]), (&Value::Null, &json!(1.06)));
        assert_eq!(report.reached_and_missed(), (0, 1));
    }
}
