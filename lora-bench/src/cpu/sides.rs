//! Sides that take turns, and what their rounds say.

use std::{collections::BTreeMap, path::Path, process::Command};

use anyhow::{Error, Result, anyhow};
use serde_json::{Map, Value, json};

use super::Work;
use crate::{json_of, median, report::Row};

/// glibc's malloc so that it keeps what is freed: without page faults for every result, PyTorch is faster.
const TUNED: [(&str, &str); 3] =
    [("MALLOC_MMAP_MAX_", "0"), ("MALLOC_TRIM_THRESHOLD_", "1000000000000"), ("MALLOC_TOP_PAD_", "268435456")];

/// Measures in one round.
pub(super) type Side<'a> = Box<dyn Fn(usize) -> Result<Value> + 'a>;

/// What all sides found out in all rounds.
#[derive(Debug, Default)]
pub struct Rounds {
    sides: BTreeMap<String, Vec<Value>>,
    /// Why a side stopped.
    failures: BTreeMap<String, String>,
}

/// Runs the other stack's side in a process of its own; tuned, with that malloc and PyTorch's fused AdamW.
pub(super) fn peer(python: &Path, work: &Work, tuned: bool) -> Result<Value> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("interop/peer_cpu.py");
    let mut command = Command::new(python);
    let mut description = json!(work);
    description["fused"] = tuned.into();
    command.arg(script).arg(description.to_string());
    TUNED.iter().for_each(|(name, value)| {
        if tuned {
            command.env(name, value)
        } else {
            command.env_remove(name)
        };
    });
    json_of(&mut command)
}

/// All sides once per round, each round beginning with another one. A side that fails does not run again.
pub(super) fn in_turn(sides: Vec<(&str, Side)>, rounds: usize) -> Rounds {
    let mut all = Rounds::default();
    for round in 0..rounds {
        for i in 0..sides.len() {
            let (name, side) = &sides[(i + round) % sides.len()];
            if all.failures.contains_key(*name) {
                continue;
            }
            match side(round) {
                Ok(value) => {
                    let figure = value["tokens_per_s"].as_f64().map(|t| format!("{t:.1} tokens/s"));
                    eprintln!("  round {}, {name}: {}", round + 1, figure.unwrap_or_else(|| "done".into()));
                    all.sides.entry(name.to_string()).or_default().push(value);
                }
                Err(e) => {
                    eprintln!("  round {}, {name}: {e:#}", round + 1);
                    all.failures.insert(name.to_string(), format!("{e:#}"));
                }
            }
        }
    }
    all
}

/// The ends of some numbers.
pub(super) fn spread(values: &[f64]) -> Option<[f64; 2]> {
    let (low, high) = (values.iter().copied().reduce(f64::min)?, values.iter().copied().reduce(f64::max)?);
    Some([low, high])
}

impl Rounds {
    /// Why a side has no figures.
    pub fn failure(&self, side: &str) -> Option<Error> {
        self.failures.get(side).map(|why| anyhow!("{why}"))
    }

    /// The last round of a side.
    pub fn last(&self, side: &str) -> Option<&Value> {
        self.sides.get(side)?.last()
    }

    /// A number of each of a side's rounds, by its path in the JSON.
    pub fn all(&self, side: &str, path: &[&str]) -> Vec<f64> {
        let at = |value: &Value| path.iter().try_fold(value, |v, key| v.get(key)).and_then(Value::as_f64);
        self.sides.get(side).into_iter().flatten().filter_map(at).collect()
    }

    /// The median of it.
    pub fn median_at(&self, side: &str, path: &[&str]) -> Option<f64> {
        Some(median(&self.all(side, path))).filter(|m| m.is_finite())
    }

    /// The median of a side's number.
    pub fn median(&self, side: &str, key: &str) -> Option<f64> {
        self.median_at(side, &[key])
    }

    /// A row of this side's number over another's: the ratio is the median of the rounds' own.
    pub fn row(&self, row: Row, key: &str, peer: &str) -> Row {
        let busy = |side: &str| Some(format!("{:.2}", self.median(side, "cores")?));
        let note = match (self.failures.get(peer), self.sides.contains_key(peer)) {
            (Some(why), _) => format!("{peer} failed: {}", why.chars().take(200).collect::<String>()),
            (None, true) => {
                busy("ours").zip(busy(peer)).map_or(String::new(), |(a, b)| format!("cores busy: {a} and {b}"))
            }
            (None, false) => "no peer".into(),
        };
        self.ratios(row, ("ours", key), (peer, key)).noted(note)
    }

    /// A row of one of this side's numbers over another of the same round.
    pub fn within(&self, row: Row, key: &str, over: &str) -> Row {
        self.ratios(row, ("ours", key), ("ours", over))
    }

    fn ratios(&self, row: Row, of: (&str, &str), over: (&str, &str)) -> Row {
        let (a, b) = (self.all(of.0, &[of.1]), self.all(over.0, &[over.1]));
        let ratios: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a / b).collect();
        let figure = |values: &[f64]| Some(median(values)).filter(|m| m.is_finite());
        Row { ours: figure(&a), reference: figure(&b), ratio: figure(&ratios), spread: spread(&ratios), ..row }
    }

    /// All of it.
    pub fn json(&self) -> Value {
        let mut all: Map<String, Value> =
            self.sides.iter().map(|(name, values)| (name.clone(), json!(values))).collect();
        if !self.failures.is_empty() {
            all.insert("failed".into(), json!(self.failures));
        }
        Value::Object(all)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use anyhow::bail;

    use super::*;

    #[test]
    fn sides_take_turns_and_ratios_are_those_of_rounds() {
        let order = RefCell::new(Vec::new());
        let side = |name: &'static str, values: [f64; 3]| {
            let order = &order;
            let run = move |round: usize| {
                order.borrow_mut().push(name);
                Ok(json!({ "tokens_per_s": values[round], "deep": { "x": round } }))
            };
            (name, Box::new(run) as Side)
        };
        let all = in_turn(vec![side("ours", [10.0, 40.0, 30.0]), side("peer", [5.0, 10.0, 20.0])], 3);
        let row = all.row(Row::new("", "", None), "tokens_per_s", "peer");
        assert_eq!((row.ours, row.reference, row.ratio), (Some(30.0), Some(10.0), Some(2.0)));
        assert_eq!(row.spread, Some([1.5, 4.0]));
        assert_eq!(*order.borrow(), ["ours", "peer", "peer", "ours", "ours", "peer"]);
        assert_eq!(all.all("peer", &["deep", "x"]), [0.0, 1.0, 2.0]);
        let alone = all.row(Row::new("", "", None), "tokens_per_s", "tuned");
        assert_eq!((alone.ours, alone.ratio, alone.note.as_str()), (Some(30.0), None, "no peer"));
    }

    #[test]
    fn a_side_that_fails_stops_and_the_others_go_on() {
        let runs = RefCell::new(0);
        let fails = |_| {
            *runs.borrow_mut() += 1;
            bail!("no such type")
        };
        let sides: Vec<(&str, Side)> = vec![("ours", Box::new(fails)), ("peer", Box::new(|_| Ok(json!({ "a": 1 }))))];
        let all = in_turn(sides, 3);
        assert_eq!((*runs.borrow(), all.all("peer", &["a"]).len()), (1, 3));
        assert_eq!(all.failure("ours").unwrap().to_string(), "no such type");
        assert_eq!(all.json()["failed"]["ours"], json!("no such type"));
        assert_eq!(all.row(Row::new("", "", None), "a", "peer").ratio(), None);
    }
}
