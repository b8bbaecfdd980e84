//! Training steps: what is compared with other stacks, and the data for them.

use std::{path::Path, time::Instant};

use anyhow::Result;
use lora_core::peft::Adapted;
use lora_kernels::{heap_stats, pool_stats};
use lora_model::Model;
use lora_train::{
    Encoder, TrainConfig, Trainer,
    data::{Dataset, Sequence},
    load_data,
};
use serde_json::{Value, json};

use crate::{median, page_faults, peak_memory_mib, processor_seconds};

/// The sequences of a file of `context||reference` lines.
///
/// # Errors
/// A missing or damaged file or tokenizer.
pub fn lines(data: &Path, tokenizer: &Path, model: &dyn Model) -> Result<Dataset> {
    let encoder = Encoder::from_dir(tokenizer, model)?;
    let none = Adapted::none(&model.device())?;
    Ok(load_data(data, None, &encoder, model, &none, TrainConfig::default().max_length)?)
}

/// Sequences about as long as those of E2E, without any text: contexts of 24 to 52 tokens, references of 12 to 42.
pub fn like_e2e(count: usize, vocabulary: usize, longest: usize) -> Dataset {
    let mut draw = random(1 << 31);
    let mut next = move |below: usize| draw() as usize % below;
    let sequences = (0..count)
        .map(|_| {
            let (context, reference) = (24 + next(29), 12 + next(31));
            let tokens = (0..(context + reference).min(longest)).map(|_| next(vocabulary) as u32).collect::<Vec<_>>();
            let targets_from = context.min(tokens.len() - 1);
            Sequence::after(tokens, targets_from)
        })
        .collect();
    Dataset::new(sequences)
}

/// Random tokens below a number, the same at every call.
pub fn random(below: usize) -> impl FnMut() -> u32 {
    let mut state = 1u64;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) as usize % below) as u32
    }
}

/// LoRA as the paper has it on E2E (r 4, α 32, on the projections that are the default), in batches of `batch` sequences in
/// the data's order.
pub fn lora(batch: usize, steps: u64) -> TrainConfig {
    TrainConfig {
        rank: 4,
        alpha: 32.0,
        batch_size: batch,
        steps: Some(steps),
        no_shuffle: true,
        ..TrainConfig::default()
    }
}

/// What steps of training took, by step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// Seconds.
    pub seconds: Vec<f64>,
    /// Tokens of its sequences.
    pub tokens: Vec<f64>,
    /// Blocks that the pool had taken from the system by its end.
    pub misses: Vec<u64>,
    /// Calls of the allocator, where the program counts them ([`CountingHeap`](lora_kernels::CountingHeap)).
    pub allocations: Vec<u64>,
    /// Bytes that they asked for.
    pub allocated: Vec<u64>,
    /// Pages that the system had to give to the process.
    pub faults: Vec<f64>,
    /// Loss of the last step.
    pub loss: f64,
    /// Cores that the counted steps kept busy: fewer than there are when others took them, or threads waited.
    pub cores: Option<f64>,
    /// Peak memory of the process, MiB.
    pub peak: Option<f64>,
}

/// Trains for `config.steps` steps, without dropout of the base if the model has none.
///
/// # Errors
/// What training can cause.
pub fn measure(model: &dyn Model, data: &Dataset, config: &TrainConfig) -> Result<Measured> {
    let adapted = Adapted::new(&*config.method_options()?, model, &model.device(), model.dtype(), 0)?;
    let mut trainer = Trainer::new(model, adapted, config, data.sequences.len())?;
    let steps = trainer.total_steps();
    let mut m = Measured::default();
    let mut begun = None;
    for counted in 0..steps {
        if counted == 1 {
            begun = processor_seconds();
        }
        let (heap, faults, start) = (heap_stats(), page_faults(), Instant::now());
        // Reads the loss back: the step is done when it returns.
        let step = trainer.step(data)?;
        m.seconds.push(start.elapsed().as_secs_f64());
        let after = heap_stats();
        m.tokens.push(step.tokens as f64);
        m.misses.push(pool_stats().misses);
        m.allocations.push(after.calls - heap.calls);
        m.allocated.push(after.bytes - heap.bytes);
        m.faults.extend(faults.zip(page_faults()).map(|(from, to)| to - from));
        m.loss = step.loss;
    }
    m.cores = begun.zip(processor_seconds()).map(|(from, to)| (to - from) / m.seconds[1..].iter().sum::<f64>());
    m.peak = peak_memory_mib();
    Ok(m)
}

impl Measured {
    /// As one object. The first step is not counted in `tokens_per_s` (all tokens over all seconds), `step_s` (the median)
    /// and `tokens_per_step`.
    pub fn json(&self) -> Value {
        let counted = |x: &[f64]| x.get(1..).unwrap_or_default().to_vec();
        let (seconds, tokens) = (counted(&self.seconds), counted(&self.tokens));
        let sum = |x: &[f64]| x.iter().sum::<f64>();
        json!({
            "tokens_per_s": sum(&tokens) / sum(&seconds),
            "step_s": median(&seconds),
            "tokens_per_step": sum(&tokens) / tokens.len() as f64,
            "cores": self.cores,
            "peak_rss_mib": self.peak,
            "pool_mib": pool_stats().reserved as f64 / (1 << 20) as f64,
            "pool_misses": self.misses,
            "allocations": self.allocations,
            "allocated_bytes": self.allocated,
            "page_faults": self.faults,
            "seconds": self.seconds,
            "loss": self.loss,
        })
    }
}

#[cfg(test)]
mod tests {
    use lora_train::data::Goal;

    use super::*;

    #[test]
    fn sequences_are_valid_whatever_fits_the_model() {
        for longest in [2, 30, 1024] {
            let data = like_e2e(50, 61, longest);
            assert_eq!(data.sequences.len(), 50);
            for s in &data.sequences {
                let Goal::After(from) = s.goal else { panic!("{s:?}") };
                assert!((2..=longest).contains(&s.tokens.len()) && (1..s.tokens.len()).contains(&from), "{s:?}");
                assert!(s.tokens.iter().all(|&t| t < 61));
            }
        }
    }
}
