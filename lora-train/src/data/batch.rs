//! Sequences to one flat run of tokens.

use lora_model::Texts;

use super::{Dataset, Goal, Sequence};

/// Sequences laid end to end: no padding, boundaries instead.
///
/// Where tokens are predicted, the last one of a sequence predicts nothing, so it has no row: a sequence of `n` tokens
/// takes `n - 1` rows. In a causal model no earlier position sees it, so leaving it out changes no result and saves its
/// work. A sequence that gets a label or a number has a row for every token.
///
/// Rows are positions in the flat run, counted from 0 in each micro-batch.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// The token of each row.
    pub tokens: Vec<u32>,
    /// The segment of each row: 1 in the second text of a pair.
    pub segments: Vec<u32>,
    /// Rows of each sequence, in order; their sum is the number of rows.
    pub lengths: Vec<usize>,
    /// What is to be learned.
    pub targets: Targets,
    /// Rows of the same optimiser step in the micro-batches before this one. A row's place in the whole step is
    /// `row_offset + row`: what is drawn for a row (dropout) is drawn for that place, so that it does not depend on how
    /// the step is split.
    pub row_offset: usize,
    /// Sequences of the same optimiser step in the micro-batches before this one: the place of what is drawn for a whole
    /// sequence.
    pub sequence_offset: usize,
    /// Targets of the same optimiser step in the micro-batches before this one: the place of what is drawn for a target.
    pub target_offset: usize,
}

/// What a batch is to teach.
#[derive(Debug, Clone, PartialEq)]
pub enum Targets {
    /// The next tokens.
    Tokens {
        /// The rows that predict something, ascending.
        rows: Vec<u32>,
        /// What each of those rows should predict.
        ids: Vec<u32>,
    },
    /// The label of each sequence.
    Labels(Vec<u32>),
    /// The number of each sequence.
    Values(Vec<f32>),
}

impl Default for Targets {
    fn default() -> Targets {
        Targets::Tokens { rows: Vec::new(), ids: Vec::new() }
    }
}

impl Targets {
    /// None yet, of the kind of a goal.
    fn of_kind(goal: &Goal) -> Targets {
        match goal {
            Goal::After(_) | Goal::Within(_) => Targets::default(),
            Goal::Label(_) => Targets::Labels(Vec::new()),
            Goal::Value(_) => Targets::Values(Vec::new()),
        }
    }

    fn len(&self) -> usize {
        match self {
            Targets::Tokens { ids, .. } => ids.len(),
            Targets::Labels(labels) => labels.len(),
            Targets::Values(values) => values.len(),
        }
    }
}

impl Batch {
    /// What a model computes of it.
    pub fn texts(&self) -> Texts<'_> {
        let targets = match &self.targets {
            Targets::Tokens { rows, ids } => lora_model::Targets::Tokens { rows, ids },
            Targets::Labels(labels) => lora_model::Targets::Labels(labels),
            Targets::Values(values) => lora_model::Targets::Values(values),
        };
        Texts::new(&self.tokens, &self.lengths).segments(&self.segments).targets(targets)
    }

    /// Lays sequences end to end, after the micro-batch of the same step that comes before them.
    ///
    /// # Panics
    /// When some sequences have labels and others do not.
    pub fn new<'a>(sequences: impl IntoIterator<Item = &'a Sequence>, before: Option<&Batch>) -> Batch {
        let mut batch = before.map_or_else(Batch::default, |b| Batch {
            row_offset: b.row_offset + b.rows(),
            sequence_offset: b.sequence_offset + b.lengths.len(),
            target_offset: b.target_offset + b.targets(),
            ..Batch::default()
        });
        for (i, sequence) in sequences.into_iter().enumerate() {
            let Sequence { tokens, second_from, goal } = sequence;
            if i == 0 {
                batch.targets = Targets::of_kind(goal);
            }
            let first = batch.tokens.len();
            let rows = sequence.rows();
            batch.tokens.extend_from_slice(&tokens[..rows]);
            batch.segments.extend((0..rows).map(|i| u32::from(i >= *second_from)));
            batch.lengths.push(rows);
            match (&mut batch.targets, goal) {
                (Targets::Tokens { rows: at, ids }, Goal::After(_) | Goal::Within(_)) => {
                    for run in sequence.predicted() {
                        at.extend((run.start - 1..run.end - 1).map(|i| (first + i) as u32));
                        ids.extend_from_slice(&tokens[run]);
                    }
                }
                (Targets::Labels(labels), Goal::Label(label)) => labels.push(*label),
                (Targets::Values(values), Goal::Value(value)) => values.push(*value),
                (targets, goal) => panic!("{goal:?} among {targets:?}: the goals of one data set are of one kind"),
            }
        }
        batch
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Number of targets: what a summed loss is divided by, added over the micro-batches of a step.
    pub fn targets(&self) -> usize {
        self.targets.len()
    }

    /// Number of tokens in the sequences, with those that have no row: what throughput is counted in.
    pub fn sequence_tokens(&self) -> usize {
        let without_row = if matches!(self.targets, Targets::Tokens { .. }) { self.lengths.len() } else { 0 };
        self.tokens.len() + without_row
    }
}

impl Dataset {
    /// The data in its own order, `batch_size` sequences at a time (at least 1), each batch for itself: for evaluation.
    pub fn batches(&self, batch_size: usize) -> impl Iterator<Item = Batch> {
        self.sequences.chunks(batch_size.max(1)).map(|sequences| Batch::new(sequences, None))
    }
}
