//! The tasks that models are judged by, and how the files of each are laid out.

use std::path::Path;

use super::{Error, Format, Result};
use crate::metrics::Metric::{
    self, Accuracy, Bleu, Cider, F1, Matthews, MeteorExactStem, Nist, Pearson, RougeL, Spearman,
};

/// A task: what its files look like, what is learned, and what it is judged by.
///
/// The named ones are those of GLUE (Wang et al. 2019), in the files that its publishers give out; `labels` and `values`
/// read files of one's own; `e2e` is for models that continue text.
#[derive(Debug)]
pub struct TaskRow {
    /// The name on the command line.
    pub name: &'static str,
    /// What it is, in a line.
    pub about: &'static str,
    /// What is to be learned.
    pub kind: TaskKind,
    /// What predictions are judged by; the first is the one to compare by.
    pub metrics: &'static [Metric],
    /// The text, by any of these headings.
    pub(super) first: &'static [&'static str],
    /// The second text of a pair, by any of these headings.
    pub(super) second: Second,
    /// The label or number, by any of these headings.
    pub(super) answer: &'static [&'static str],
    /// The columns of files without headings: for so many columns, those of the text, the second text and the answer.
    pub(super) bare: &'static [(usize, [Option<usize>; 3])],
    /// Whether the publishers' own readers pass over rows that are cut short, of which their file has some.
    pub(super) skips_short_rows: bool,
}

/// What a task teaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskKind {
    /// One of these labels, in GLUE's order; none: those of the training data.
    Labels(&'static [&'static str]),
    /// A number.
    Values,
    /// To complete prompts; all completions of a prompt are right ([`references`](super::references())).
    Completions,
}

/// Whether there is a second text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Second {
    /// Never.
    No,
    /// Where the file has it.
    Maybe(&'static [&'static str]),
    /// Always.
    Yes(&'static [&'static str]),
}

impl Second {
    pub(super) fn headings(self) -> &'static [&'static str] {
        match self {
            Second::No => &[],
            Second::Maybe(headings) | Second::Yes(headings) => headings,
        }
    }
}

const BINARY: TaskKind = TaskKind::Labels(&["0", "1"]);
const ENTAILMENT: TaskKind = TaskKind::Labels(&["entailment", "not_entailment"]);

const PAIR: TaskRow = TaskRow {
    name: "",
    about: "",
    kind: BINARY,
    metrics: &[Accuracy],
    first: &["sentence1"],
    second: Second::Yes(&["sentence2"]),
    answer: &["label"],
    bare: &[],
    skips_short_rows: false,
};

const MNLI: TaskRow = TaskRow {
    kind: TaskKind::Labels(&["entailment", "neutral", "contradiction"]),
    first: &["sentence1", "premise"],
    second: Second::Yes(&["sentence2", "hypothesis"]),
    answer: &["gold_label", "label"],
    ..PAIR
};

const OWN: TaskRow = TaskRow {
    first: &["text", "sentence", "sentence1", "text1"],
    second: Second::Maybe(&["text2", "sentence2"]),
    bare: &[(2, [Some(0), None, Some(1)]), (3, [Some(0), Some(1), Some(2)])],
    ..PAIR
};

/// All tasks.
pub const TASKS: &[TaskRow] = &[
    TaskRow {
        name: "sst2",
        about: "SST-2: whether a sentence of a film review is positive",
        first: &["sentence"],
        second: Second::No,
        bare: &[(2, [Some(0), None, Some(1)])],
        ..PAIR
    },
    TaskRow {
        name: "mrpc",
        about: "MRPC: whether two sentences mean the same",
        metrics: &[Accuracy, F1],
        first: &["#1 String", "sentence1"],
        second: Second::Yes(&["#2 String", "sentence2"]),
        answer: &["Quality", "label"],
        ..PAIR
    },
    TaskRow {
        name: "cola",
        about: "CoLA: whether a sentence is grammatical",
        metrics: &[Matthews],
        first: &["sentence"],
        second: Second::No,
        bare: &[(4, [Some(3), None, Some(1)])],
        ..PAIR
    },
    TaskRow { name: "rte", about: "RTE: whether a text entails another", kind: ENTAILMENT, ..PAIR },
    TaskRow {
        name: "stsb",
        about: "STS-B: how alike two sentences are, from 0 to 5",
        kind: TaskKind::Values,
        metrics: &[Pearson, Spearman],
        answer: &["score", "label"],
        ..PAIR
    },
    TaskRow {
        name: "mnli",
        about: "MNLI: whether a sentence entails or contradicts another, or neither (dev_matched.tsv)",
        ..MNLI
    },
    TaskRow {
        name: "mnli-mm",
        about: "MNLI with other kinds of texts than those of training (dev_mismatched.tsv)",
        ..MNLI
    },
    TaskRow {
        name: "qnli",
        about: "QNLI: whether a sentence answers a question",
        kind: ENTAILMENT,
        first: &["question"],
        second: Second::Yes(&["sentence"]),
        ..PAIR
    },
    TaskRow {
        name: "qqp",
        about: "QQP: whether two questions ask the same",
        metrics: &[Accuracy, F1],
        first: &["question1"],
        second: Second::Yes(&["question2"]),
        answer: &["is_duplicate", "label"],
        skips_short_rows: true,
        ..PAIR
    },
    TaskRow {
        name: "labels",
        about: "labels of one's own: text<TAB>label, text<TAB>text<TAB>label, or JSON lines of text and label",
        kind: TaskKind::Labels(&[]),
        metrics: &[Accuracy, Matthews],
        answer: &["label"],
        ..OWN
    },
    TaskRow {
        name: "values",
        about: "numbers of one's own: text<TAB>number, text<TAB>text<TAB>number, or JSON lines of text and value",
        kind: TaskKind::Values,
        metrics: &[Pearson, Spearman],
        answer: &["value", "score", "label"],
        ..OWN
    },
    TaskRow {
        name: "e2e",
        about: "prompts to texts, for models that continue text: context||reference, or JSON lines of prompt and completion",
        kind: TaskKind::Completions,
        metrics: &[Bleu, Nist, MeteorExactStem, RougeL, Cider],
        first: &[],
        second: Second::No,
        answer: &[],
        ..PAIR
    },
];

impl TaskRow {
    /// The format that a file of the task is read in when none is asked for.
    pub fn format_of(&self, path: &Path) -> Format {
        match self.kind {
            TaskKind::Completions => Format::of_path(path),
            TaskKind::Labels(_) | TaskKind::Values => Format::of_task_path(path),
        }
    }

    /// All headings of columns that it knows.
    pub(super) fn headings(&self) -> impl Iterator<Item = &'static str> {
        [self.first, self.second.headings(), self.answer].into_iter().flatten().copied()
    }
}

/// The task of a name.
///
/// # Errors
/// [`Error::UnknownTask`], listing what there is.
pub fn task(name: &str) -> Result<&'static TaskRow> {
    TASKS.iter().find(|row| row.name == name).ok_or_else(|| Error::UnknownTask { name: name.to_owned() })
}

/// The names of all tasks, for messages.
pub(super) fn names() -> String {
    TASKS.iter().map(|row| row.name).collect::<Vec<_>>().join(", ")
}
