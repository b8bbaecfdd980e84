//! Sequences to one flat run of tokens.

use lora_model::{Targets, Texts};

use super::{Dataset, Sequence};

/// Sequences laid end to end: no padding, boundaries instead.
///
/// The last token of a sequence predicts nothing, so it has no row: a sequence of `n` tokens takes `n - 1` rows. In a
/// causal model no earlier position sees it, so leaving it out changes no result and saves its work.
///
/// Rows are positions in the flat run, counted from 0 in each micro-batch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// The token of each row.
    pub tokens: Vec<u32>,
    /// Rows of each sequence, in order; their sum is the number of rows.
    pub lengths: Vec<usize>,
    /// The rows that predict something, ascending.
    pub target_rows: Vec<u32>,
    /// What each of those rows should predict.
    pub target_ids: Vec<u32>,
    /// Rows of the same optimiser step in the micro-batches before this one. A row's place in the whole step is
    /// `row_offset + row`: what is drawn for a row (dropout) is drawn for that place, so that it does not depend on how
    /// the step is split.
    pub row_offset: usize,
}

impl Batch {
    /// What a model computes of it.
    pub fn texts(&self) -> Texts<'_> {
        let targets = Targets::Tokens { rows: &self.target_rows, ids: &self.target_ids };
        Texts::new(&self.tokens, &self.lengths).targets(targets)
    }

    /// Lays sequences end to end, after `row_offset` rows of the same step.
    pub fn new<'a>(sequences: impl IntoIterator<Item = &'a Sequence>, row_offset: usize) -> Batch {
        let mut batch = Batch { row_offset, ..Batch::default() };
        for Sequence { tokens, targets_from } in sequences {
            let rows = tokens.len() - 1;
            let first = batch.tokens.len();
            batch.tokens.extend_from_slice(&tokens[..rows]);
            batch.lengths.push(rows);
            batch.target_rows.extend((targets_from - 1..rows).map(|i| (first + i) as u32));
            batch.target_ids.extend_from_slice(&tokens[*targets_from..]);
        }
        batch
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Number of targets: what a summed loss is divided by, added over the micro-batches of a step.
    pub fn targets(&self) -> usize {
        self.target_ids.len()
    }

    /// Number of tokens in the sequences, with those that have no row: what throughput is counted in.
    pub fn sequence_tokens(&self) -> usize {
        self.tokens.len() + self.lengths.len()
    }
}

impl Dataset {
    /// The data in its own order, `batch_size` sequences at a time (at least 1), each batch for itself: for evaluation.
    pub fn batches(&self, batch_size: usize) -> impl Iterator<Item = Batch> {
        self.sequences.chunks(batch_size.max(1)).map(|sequences| Batch::new(sequences, 0))
    }
}
