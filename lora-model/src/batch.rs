use lora_core::Tensor;
use lora_kernels::{Device, Sequences};

use crate::{Error, Result};

/// What a model's tables can look up: checked once per batch, so that no kernel meets an id that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// The longest sequence.
    pub max_positions: usize,
}

/// Sequences as one flat run of tokens, without padding, on the model's device: what a forward pass reads.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Token ids, `[rows]`.
    pub tokens: Tensor,
    /// Each row's position in its sequence, `[rows]`.
    pub positions: Tensor,
    /// Where sequences begin and end.
    pub sequences: Sequences,
    /// The rows that predict something, `[targets]`.
    pub target_rows: Tensor,
    /// What they should predict, `[targets]`.
    pub target_ids: Tensor,
}

impl Batch {
    /// Lays sequences of the given lengths end to end. `target_rows[i]` (a row of the flat run) should predict
    /// `target_ids[i]`; both are empty for a forward pass without a loss.
    ///
    /// # Errors
    /// [`Error::Token`] for an id outside the vocabulary, [`Error::TooLong`] for a sequence longer than the positions.
    ///
    /// # Panics
    /// When the lengths do not add up to the tokens, or a target's row is not among them.
    pub fn new(
        device: &Device,
        limits: Limits,
        tokens: &[u32],
        lengths: &[usize],
        target_rows: &[u32],
        target_ids: &[u32],
    ) -> Result<Batch> {
        assert_eq!(lengths.iter().sum::<usize>(), tokens.len(), "the lengths add up to the tokens");
        check(limits, tokens, target_rows, target_ids)?;
        for &n in lengths {
            limits.check_length(n)?;
        }
        let positions: Vec<u32> = lengths.iter().flat_map(|&n| 0..n as u32).collect();
        let ids = |v: &[u32]| Tensor::from_slice(device, &[v.len()], v);
        Ok(Batch {
            tokens: ids(tokens)?,
            positions: ids(&positions)?,
            sequences: Sequences::new(lengths),
            target_rows: ids(target_rows)?,
            target_ids: ids(target_ids)?,
        })
    }

    /// Another batch of the same lengths and number of targets, in the same memory: recorded work reads it there.
    ///
    /// # Errors
    /// [`Error::Token`] for an id outside the vocabulary; the batch is then as it was.
    ///
    /// # Panics
    /// When there are more or fewer tokens or targets, or a target's row is not among the tokens.
    pub fn rewrite(&mut self, limits: Limits, tokens: &[u32], target_rows: &[u32], target_ids: &[u32]) -> Result<()> {
        check(limits, tokens, target_rows, target_ids)?;
        self.tokens.write(tokens)?;
        self.target_rows.write(target_rows)?;
        Ok(self.target_ids.write(target_ids)?)
    }

    /// Number of targets.
    pub fn targets(&self) -> usize {
        self.target_ids.len()
    }
}

fn check(limits: Limits, tokens: &[u32], target_rows: &[u32], target_ids: &[u32]) -> Result<()> {
    assert_eq!(target_rows.len(), target_ids.len(), "one token per target row");
    assert!(target_rows.iter().all(|&r| (r as usize) < tokens.len()), "target rows are rows of the batch");
    limits.check_tokens(tokens)?;
    limits.check_tokens(target_ids)
}

impl Limits {
    /// # Errors
    /// [`Error::Token`] for the first id outside the vocabulary.
    pub fn check_tokens(&self, ids: &[u32]) -> Result<()> {
        match ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            Some(&token) => Err(Error::Token { token, vocab_size: self.vocab_size }),
            None => Ok(()),
        }
    }

    /// # Errors
    /// [`Error::TooLong`] for a sequence that is longer than the positions.
    pub fn check_length(&self, length: usize) -> Result<()> {
        if length > self.max_positions {
            return Err(Error::TooLong { length, max_positions: self.max_positions });
        }
        Ok(())
    }
}
