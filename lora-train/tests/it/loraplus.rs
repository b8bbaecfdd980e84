//! LoRA+ against PEFT's optimiser, on the adapters that `lora-model/tests/golden/peft_matrix.py` wrote.

use std::{collections::BTreeMap, fs, path::Path};

use lora_kernels::Device;
use lora_model::{adapter, load};
use lora_train::{
    TrainConfig, Trainer,
    data::{Dataset, Goal, Sequence},
    schedule::Schedule,
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    sequences: Vec<Vec<u32>>,
    labels: Option<Vec<u32>>,
    target_rows: Option<Vec<Vec<u32>>>,
    loraplus: Rates,
    variants: BTreeMap<String, Variant>,
}

#[derive(Deserialize)]
struct Rates {
    lr: f64,
    loraplus_lr_ratio: f64,
    loraplus_lr_embedding: f64,
    loraplus_weight_decay: f64,
}

#[derive(Deserialize)]
struct Variant {
    loraplus_losses: Option<Vec<f64>>,
}

#[test]
fn ten_steps_are_those_of_pefts_loraplus() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../lora-model/tests/golden");
    let mut compared = 0;
    for name in ["gpt2", "bert_classification", "roberta_classification", "llama3", "qwen2"] {
        let text = fs::read_to_string(goldens.join("peft").join(name).with_extension("json")).unwrap();
        let golden: Golden = serde_json::from_str(&text).unwrap();
        let goals: Vec<Goal> = match (&golden.labels, &golden.target_rows) {
            (Some(labels), _) => labels.iter().map(|label| Goal::Label(*label)).collect(),
            (_, Some(rows)) => rows.iter().map(|rows| Goal::After(rows[0] as usize + 1)).collect(),
            _ => panic!("{name}: neither labels nor targets"),
        };
        let sequence =
            |(tokens, goal): (&Vec<u32>, Goal)| Sequence { tokens: tokens.clone(), second_from: tokens.len(), goal };
        let data = Dataset::new(golden.sequences.iter().zip(goals).map(sequence).collect());
        let mut model = load(&goldens.join(name).join("model"), &Device::Cpu).unwrap();
        model.set_base_dropout(0.0);
        let rates = &golden.loraplus;
        let plus = TrainConfig {
            batch_size: golden.sequences.len(),
            no_shuffle: true,
            schedule: Schedule::Constant,
            steps: Some(10),
            lr: rates.lr,
            weight_decay: rates.loraplus_weight_decay,
            loraplus_lr_ratio: Some(rates.loraplus_lr_ratio),
            loraplus_lr_embedding: rates.loraplus_lr_embedding,
            ..TrainConfig::default()
        };
        let plain = TrainConfig { loraplus_lr_ratio: None, ..plus.clone() };
        for (variant, of) in &golden.variants {
            let Some(losses) = &of.loraplus_losses else { continue };
            let what = format!("{name}, {variant}");
            let off = |config: &TrainConfig| {
                let adapted = adapter::attach(&goldens.join("peft").join(name).join(variant), &*model, &Device::Cpu);
                let mut trainer = Trainer::new(&*model, adapted.unwrap(), config, data.sequences.len()).unwrap();
                let worst = |worst: f64, loss: &f64| {
                    let step = trainer.step(&data).unwrap();
                    assert_eq!(step.lr, rates.lr, "{what}");
                    worst.max((step.loss / loss - 1.0).abs())
                };
                losses.iter().fold(0.0, worst)
            };
            let worst = off(&plus);
            println!("{what}: {worst:.2e}");
            assert!(worst < 1e-4, "{what}: losses differ by {worst:.2e}");
            assert!(off(&plain) > 1e-3, "{what}: the ratio has no effect");
            compared += 1;
        }
    }
    assert_eq!(compared, 30);
}
