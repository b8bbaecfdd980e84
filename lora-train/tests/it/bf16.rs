//! Training over a bf16 base on the CPU, against f32.

use std::path::Path;

use lora_core::peft::Adapted;
use lora_kernels::{DType, Device};
use lora_model::{Gpt2, Model, config::Gpt2Config, load_as};
use lora_train::{
    TrainConfig, Trainer,
    data::{Dataset, Sequence},
};

const CPU: Device = Device::Cpu;
const VOCAB: u32 = 101;

fn base(dir: &Path) {
    let config = Gpt2Config {
        vocab_size: VOCAB as usize,
        n_positions: 64,
        n_embd: 64,
        n_layer: 3,
        n_head: 4,
        ..Gpt2Config::small()
    };
    Gpt2::init(config, dir, 3, &CPU).unwrap().save(dir, &Default::default()).unwrap();
}

/// Texts that go on as they begin, so that there is something to learn.
fn data() -> Dataset {
    let sequence = |i: u32| {
        let (n, step) = (12 + i * 7 % 30, 1 + i % 3);
        Sequence::after((0..n).map(|j| (i * 13 + j * step) % VOCAB).collect(), 1 + (i % 5) as usize)
    };
    Dataset::new((0..160).map(sequence).collect())
}

fn config() -> TrainConfig {
    TrainConfig {
        rank: 4,
        alpha: 32.0,
        targets: ["c_attn", "c_fc", "mlp.c_proj"].into_iter().collect(),
        steps: Some(200),
        batch_size: 8,
        grad_accum: 2,
        lr: 5e-3,
        warmup: 10,
        base_dropout: Some(0.0),
        ..TrainConfig::default()
    }
}

/// The losses of some steps, and the bits of the parameters afterwards.
fn trained(dir: &Path, dtype: DType, steps: u64, threads: usize) -> (Vec<f64>, Vec<u32>) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let (data, config) = (data(), config());
        let mut model: Box<dyn Model> = load_as(dir, &CPU, dtype).unwrap();
        model.set_base_dropout(0.0);
        let method = config.method_options().unwrap();
        let adapted = Adapted::new(&*method, &*model, &CPU, dtype, config.seed).unwrap();
        let mut trainer = Trainer::new(&*model, adapted, &config, data.sequences.len()).unwrap();
        let losses = (0..steps).map(|_| trainer.step(&data).unwrap().loss).collect();
        let params = trainer.adapted.params.flat();
        assert_eq!(params.dtype(), DType::F32, "what trains is kept in f32");
        (losses, params.to_vec::<f32>().unwrap().iter().map(|v| v.to_bits()).collect())
    })
}

#[test]
fn two_hundred_steps_follow_f32() {
    let dir = tempfile::tempdir().unwrap();
    base(dir.path());
    let (single, _) = trained(dir.path(), DType::F32, 200, 2);
    let (half, _) = trained(dir.path(), DType::Bf16, 200, 2);
    assert!(single[199] < 0.95 * single[0], "it learns: {} to {}", single[0], single[199]);
    let apart = |(a, b): (&f64, &f64)| (a - b).abs() / a;
    let worst = single.iter().zip(&half).map(apart).fold(0.0, f64::max);
    println!("largest relative difference of a loss: {worst:.2e}; {} to {}", single[0], single[199]);
    assert!(worst <= 1e-2, "{worst}");
    assert!(worst > 1e-6, "the base was not rounded");
}

#[test]
fn same_bits_for_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    base(dir.path());
    let one = trained(dir.path(), DType::Bf16, 3, 1);
    assert!(one == trained(dir.path(), DType::Bf16, 3, 2));
    assert!(one == trained(dir.path(), DType::Bf16, 3, 3));
}

#[test]
fn only_matrices_of_the_base_are_rounded() {
    let dir = tempfile::tempdir().unwrap();
    base(dir.path());
    let model = load_as(dir.path(), &CPU, DType::Bf16).unwrap();
    for (name, t) in model.tensors() {
        assert_eq!(t.dtype() == DType::Bf16, t.shape().len() == 2, "{name}");
    }
    assert_eq!(model.dtype(), DType::F32, "activations");
}
