//! What predictions are judged by.
//!
//! Each is a plain function of predictions and truth: [`accuracy`], [`f1`], [`matthews`] of labels, [`pearson`] and
//! [`spearman`] of numbers, those of [`text`] of texts. [`Metric`] names them, as tables and command lines do.

mod agreement;
mod correlation;
pub mod text;

use std::fmt;

use serde::{Serialize, Serializer};

use text::Completions;

pub use agreement::{accuracy, f1, matthews};
pub use correlation::{pearson, spearman};

/// A metric by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// [`accuracy`].
    Accuracy,
    /// [`f1`].
    F1,
    /// [`matthews`].
    Matthews,
    /// [`pearson`].
    Pearson,
    /// [`spearman`].
    Spearman,
    /// [`text::bleu`].
    Bleu,
    /// [`text::nist`].
    Nist,
    /// [`text::meteor_exact_stem`].
    MeteorExactStem,
    /// [`text::rouge_l`].
    RougeL,
    /// [`text::cider`].
    Cider,
}

impl Metric {
    /// All of them.
    pub const ALL: [Metric; 10] = [
        Metric::Accuracy,
        Metric::F1,
        Metric::Matthews,
        Metric::Pearson,
        Metric::Spearman,
        Metric::Bleu,
        Metric::Nist,
        Metric::MeteorExactStem,
        Metric::RougeL,
        Metric::Cider,
    ];

    /// The metric of a name in results.
    pub fn find(name: &str) -> Option<Metric> {
        Metric::ALL.into_iter().find(|m| m.name() == name)
    }

    /// What the paper's tables multiply it by: shares and correlations stand there in percent.
    pub fn scale(self) -> f64 {
        match self {
            Metric::Bleu | Metric::Nist | Metric::Cider => 1.0,
            _ => 100.0,
        }
    }

    /// The name in results.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Accuracy => "accuracy",
            Metric::F1 => "f1",
            Metric::Matthews => "matthews",
            Metric::Pearson => "pearson",
            Metric::Spearman => "spearman",
            Metric::Bleu => "bleu",
            Metric::Nist => "nist",
            Metric::MeteorExactStem => "meteor_exact_stem",
            Metric::RougeL => "rouge_l",
            Metric::Cider => "cider",
        }
    }

    /// The name in tables for people.
    pub fn title(self) -> &'static str {
        match self {
            Metric::F1 => "F1",
            Metric::Bleu => "BLEU",
            Metric::Nist => "NIST",
            Metric::MeteorExactStem => "METEOR (exact, stem)",
            Metric::RougeL => "ROUGE-L",
            Metric::Cider => "CIDEr",
            other => other.name(),
        }
    }

    /// The metric of predicted labels; `None` for one of something else.
    pub fn of_labels(self, predicted: &[u32], truth: &[u32], positive: u32) -> Option<f64> {
        Some(match self {
            Metric::Accuracy => accuracy(predicted, truth),
            Metric::F1 => f1(predicted, truth, positive),
            Metric::Matthews => matthews(predicted, truth),
            _ => return None,
        })
    }

    /// The metric of predicted numbers; `None` for one of something else.
    pub fn of_values(self, predicted: &[f64], truth: &[f64]) -> Option<f64> {
        Some(match self {
            Metric::Pearson => pearson(predicted, truth),
            Metric::Spearman => spearman(predicted, truth),
            _ => return None,
        })
    }

    /// The metric of predicted texts; `None` for one of something else.
    pub fn of_texts(self, texts: &Completions) -> Option<f64> {
        Some(match self {
            Metric::Bleu => text::bleu(texts),
            Metric::Nist => text::nist(texts),
            Metric::MeteorExactStem => text::meteor_exact_stem(texts),
            Metric::RougeL => text::rouge_l(texts),
            Metric::Cider => text::cider(texts),
            _ => return None,
        })
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Metrics and their values, in the order of a task; written as one object.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores(pub Vec<(Metric, f64)>);

impl Scores {
    /// Those of `metrics` that `value` gives.
    pub fn of(metrics: &[Metric], value: impl Fn(Metric) -> Option<f64>) -> Scores {
        Scores(metrics.iter().filter_map(|&m| Some((m, value(m)?))).collect())
    }

    /// The value of a metric, where it was taken.
    pub fn get(&self, metric: Metric) -> Option<f64> {
        self.0.iter().find(|(m, _)| *m == metric).map(|(_, value)| *value)
    }
}

impl fmt::Display for Scores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<String> = self.0.iter().map(|(metric, value)| format!("{metric} {value:.4}")).collect();
        f.write_str(&all.join(", "))
    }
}

impl Serialize for Scores {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_map(self.0.iter().map(|(metric, value)| (metric.name(), value)))
    }
}
