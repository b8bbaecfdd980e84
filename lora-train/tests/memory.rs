//! The pool of memory in training. Alone in its process: the pool counts for all that runs there.

use std::path::Path;

use lora_core::peft::Adapted;
use lora_kernels::{DType, Device, pool_stats};
use lora_model::{Gpt2, config::Gpt2Config};
use lora_train::{
    TrainConfig, Trainer,
    data::{Dataset, Sequence},
};

/// Sequences of lengths between half of the longest and the longest, in no order; those of the first batch are longest.
fn data(longest: usize, vocab: u32) -> Dataset {
    let length = |i: usize| if i < 8 { longest } else { longest / 2 + (i * 37) % (longest / 2) };
    let sequence = |i: usize| {
        let tokens: Vec<u32> = (0..length(i) as u32).map(|j| (j * 7 + i as u32) % vocab).collect();
        let from = 1 + i % (tokens.len() - 1);
        Sequence::after(tokens, from)
    };
    Dataset::new((0..256).map(sequence).collect())
}

#[test]
fn steady_training_takes_no_memory_from_the_system() {
    let small =
        Gpt2Config { vocab_size: 300, n_positions: 64, n_embd: 64, n_layer: 2, n_head: 2, ..Gpt2Config::small() };
    let model = Gpt2::init(small, Path::new("model"), 0, &Device::Cpu).unwrap();
    let data = data(64, 300);
    // One thread, so that the number of blocks in use does not depend on how tasks meet.
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    one.install(|| {
        for (method, batch_size) in [("lora", 8), ("lora", 4), ("lora", 1), ("full", 8)] {
            let config = TrainConfig {
                method: method.into(),
                dropout: 0.1,
                batch_size,
                epochs: Some(6.0),
                no_shuffle: true,
                clip: 1.0,
                ..TrainConfig::default()
            };
            let adapted =
                Adapted::new(&*config.method_options().unwrap(), &model, &Device::Cpu, DType::F32, 0).unwrap();
            let mut trainer = Trainer::new(&model, adapted, &config, data.sequences.len()).unwrap();
            let mut misses = Vec::new();
            while trainer.steps_done() < trainer.total_steps() {
                trainer.step(&data).unwrap();
                misses.push(pool_stats().misses);
            }
            // The longest batch comes first and takes nearly all; within three passes the pool has met every mixture of
            // rows and targets.
            let steady = &misses[misses.len() / 2..];
            assert_eq!(steady.first(), steady.last(), "{method}, {batch_size} sequences a batch: {misses:?}");
        }
    });
}
