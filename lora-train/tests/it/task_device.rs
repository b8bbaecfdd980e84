//! Encoders on every GPU at hand against the CPU, with passes that are recorded and replayed.

use lora_core::peft::Adapted;
use lora_kernels::{DType, Device};
use lora_model::load;
use lora_train::{
    TrainConfig, Trainer,
    data::{Dataset, Goal, Sequence, task},
};

const STEPS: u64 = 6;

/// Sequences of one shape whose tokens, segments and goals all differ from step to step: what a replay reads must be what
/// the step has.
fn data(goal: fn(u32) -> Goal, segments: bool) -> Dataset {
    let sequence = |i: u32| Sequence {
        tokens: (0..9).map(|j| (j * j * 7 + i * 13 + j) % 256).collect(),
        second_from: if segments { 2 + i as usize % 7 } else { 9 },
        goal: goal(i),
    };
    Dataset { metrics: task("labels").unwrap().metrics, ..Dataset::new((0..24).map(sequence).collect()) }
}

#[test]
fn labelled_passes_are_replayed() {
    let dir = tempfile::tempdir().unwrap();
    for (golden, goal, segments) in [
        ("bert_classification", (|i| Goal::Label(i * i % 3)) as fn(u32) -> Goal, true),
        ("roberta_regression", |i| Goal::Value(i as f32 / 8.0 - 1.0), false),
    ] {
        let path = crate::common::golden().into_iter().find(|g| g.parent().unwrap().ends_with(golden)).unwrap();
        let base = dir.path().join(golden);
        crate::common::base(&path, &base, |_| ());
        let data = data(goal, segments);
        let config = TrainConfig {
            rank: 3,
            base_dropout: Some(0.0),
            no_shuffle: true,
            steps: Some(STEPS),
            batch_size: 4,
            grad_accum: 2,
            lr: 2e-2,
            ..TrainConfig::default()
        };
        let run = |device: &Device| {
            let mut model = load(&base, device).unwrap();
            model.set_base_dropout(0.0);
            let method = config.method_options().unwrap();
            let adapted = Adapted::new(&*method, &*model, device, DType::F32, config.seed).unwrap();
            let mut t = Trainer::new(&*model, adapted, &config, data.sequences.len()).unwrap();
            let losses: Vec<f64> = (0..STEPS).map(|_| t.step(&data).unwrap().loss).collect();
            (losses, t.evaluate(&data).unwrap(), t.replayed())
        };
        let (want, judged, none) = run(&Device::Cpu);
        for gpu in crate::common::gpus() {
            let (got, e, replayed) = run(&Device::Cuda(gpu.clone()));
            // The first step runs as it is, the second records, four replay; two passes each.
            assert_eq!((none, replayed), (0, 8), "{golden} on {gpu}");
            for (step, (g, w)) in got.iter().zip(&want).enumerate() {
                assert!((g - w).abs() <= 1e-4 * w.abs(), "{golden} on {gpu}, step {step}: {g}, expected {w}");
            }
            assert!((e.loss - judged.loss).abs() <= 1e-4 * judged.loss, "{golden} on {gpu}: {e:?}, {judged:?}");
        }
    }
}
