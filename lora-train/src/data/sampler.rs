//! Which sequences belong to which optimiser step.

use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use super::{Batch, Dataset, Error, Result};

/// The order of the data: from the number of an optimiser step to its sequences.
///
/// A step takes `batch_size` sequences, in up to `grad_accum` micro-batches of `⌈batch_size / grad_accum⌉`; the last step
/// of an epoch takes what is left (PyTorch's `DataLoader` without `drop_last`). An epoch of `n` sequences has
/// `⌈n / batch_size⌉` steps.
///
/// The sequences of a step depend on the data's size, the batch size, the seed and the step alone. So the step number is
/// the whole state: nothing else needs saving to resume. And however a batch is split, the steps are the same.
#[derive(Debug, Clone)]
pub struct Sampler {
    sequences: usize,
    batch_size: usize,
    /// Sequences of a micro-batch.
    part: usize,
    seed: Option<u64>,
    /// The order of one epoch, kept because neighbouring steps share it.
    order: Option<(u64, Vec<usize>)>,
}

/// Where in the data a step starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Position {
    /// Full passes over the data before this step.
    pub epoch: u64,
    /// Sequences of this pass before this step.
    pub index: usize,
}

impl Sampler {
    /// An order over `sequences` sequences, shuffled anew each epoch from `seed`, or for `None` that of the file.
    ///
    /// # Errors
    /// No sequences; a batch size or a number of micro-batches of zero.
    pub fn new(sequences: usize, batch_size: usize, grad_accum: usize, seed: Option<u64>) -> Result<Sampler> {
        if sequences == 0 {
            return Err(Error::NoData);
        }
        if batch_size == 0 || grad_accum == 0 {
            return Err(Error::BatchSize { batch_size, grad_accum });
        }
        Ok(Sampler { sequences, batch_size, part: batch_size.div_ceil(grad_accum), seed, order: None })
    }

    /// Optimiser steps in one pass over the data.
    pub fn steps_per_epoch(&self) -> u64 {
        self.sequences.div_ceil(self.batch_size) as u64
    }

    /// Where step `step`, counted from 0, starts.
    pub fn position(&self, step: u64) -> Position {
        let per_epoch = self.steps_per_epoch();
        Position { epoch: step / per_epoch, index: (step % per_epoch) as usize * self.batch_size }
    }

    /// The indices of the sequences of step `step`, counted from 0.
    pub fn indices(&mut self, step: u64) -> &[usize] {
        let Position { epoch, index } = self.position(step);
        if self.order.as_ref().is_none_or(|(of, _)| *of != epoch) {
            self.order = Some((epoch, order(self.sequences, self.seed, epoch)));
        }
        let (_, order) = self.order.as_ref().expect("set above");
        &order[index..self.sequences.min(index.saturating_add(self.batch_size))]
    }

    /// The micro-batches of step `step`, of the same number of sequences, the last perhaps of fewer. `data` is what the
    /// sampler was made for.
    ///
    /// # Panics
    /// If `data` has fewer sequences than the sampler was made for.
    pub fn batches(&mut self, step: u64, data: &Dataset) -> Vec<Batch> {
        let part = self.part;
        let mut batches: Vec<Batch> = Vec::new();
        for indices in self.indices(step).chunks(part) {
            let batch = Batch::new(indices.iter().map(|&i| &data.sequences[i]), batches.last());
            batches.push(batch);
        }
        batches
    }
}

/// The order of one epoch: a permutation of `0..sequences`. The generator's key is the seed under a name of its own, so
/// that the seed can serve elsewhere too, and each epoch is a stream of that key.
fn order(sequences: usize, seed: Option<u64>, epoch: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..sequences).collect();
    if let Some(seed) = seed {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..18].copy_from_slice(b"data order");
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(epoch);
        order.shuffle(&mut rng);
    }
    order
}
