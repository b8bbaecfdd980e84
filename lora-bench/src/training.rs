//! Training steps of GPT-2 with LoRA on E2E-like sequences: what is compared with other stacks.

use std::{path::Path, time::Instant};

use anyhow::Result;
use lora_core::peft::Adapted;
use lora_kernels::pool_stats;
use lora_model::Model;
use lora_train::{
    Encoder, TrainConfig, Trainer,
    data::{Dataset, Sequence},
    load_data,
};
use serde_json::{Value, json};

use crate::{median, peak_memory_mib};

/// The sequences of a file of `context||reference` lines.
///
/// # Errors
/// A missing or damaged file or tokenizer.
pub fn lines(data: &Path, tokenizer: &Path, model: &dyn Model) -> Result<Dataset> {
    let encoder = Encoder::from_dir(tokenizer, model)?;
    let none = Adapted::none(&model.device())?;
    Ok(load_data(data, None, &encoder, (model, &none), TrainConfig::default().max_length)?)
}

/// Sequences about as long as those of E2E, without any text: contexts of 24 to 52 tokens, references of 12 to 42.
pub fn like_e2e(count: usize, vocabulary: usize, longest: usize) -> Dataset {
    let mut state = 1u64;
    let mut next = move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
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

/// Does `steps` training steps of LoRA (r 4, α 32, on the projections that are its default) in batches of `batch`
/// sequences, in the data's order and without dropout of the base, and measures all but the first.
///
/// # Errors
/// What training can cause.
pub fn measure(model: &mut dyn Model, data: &Dataset, batch: usize, steps: u64) -> Result<Value> {
    model.set_base_dropout(0.0);
    let config = TrainConfig {
        rank: 4,
        alpha: 32.0,
        batch_size: batch,
        steps: Some(steps),
        no_shuffle: true,
        ..TrainConfig::default()
    };
    let model = &*model;
    let adapted = Adapted::new(&*config.method_options()?, model, &model.device(), model.dtype(), 0)?;
    let mut trainer = Trainer::new(model, adapted, &config, data.sequences.len())?;
    let (mut seconds, mut tokens, mut misses) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..steps {
        let start = Instant::now();
        // Reads the loss back: the step is done when it returns.
        let step = trainer.step(data)?;
        misses.push(pool_stats().misses);
        if step.step > 1 {
            seconds.push(start.elapsed().as_secs_f64());
            tokens.push(step.tokens as f64);
        }
    }
    let sum = |x: &[f64]| x.iter().sum::<f64>();
    Ok(json!({
        "tokens_per_s": sum(&tokens) / sum(&seconds),
        "step_s": median(&seconds),
        "tokens_per_step": sum(&tokens) / tokens.len() as f64,
        "peak_rss_mib": peak_memory_mib(),
        "pool_mib": pool_stats().reserved as f64 / (1 << 20) as f64,
        "pool_misses": misses,
    }))
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
