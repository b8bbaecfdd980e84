//! Planned memory against that of real training. Alone in its process: the pool of memory counts for all that runs there.

use std::path::Path;

use lora_core::{
    Tensor,
    peft::{Adapted, InitLoraWeights, METHODS},
};
use lora_kernels::{Buffer, DType, Device, Mat, MatMut, gemm, pool_stats, release_idle_memory};
use lora_model::{LoadOptions, Model, Task, adapter, assemble, checkpoint::SINGLE_FILE, config::RawConfig};
use lora_train::{
    TrainConfig, Trainer,
    data::{Dataset, Goal, Sequence},
    plan::{Plan, PlanConfig, plan},
};
use serde_json::{Value, json};

/// How far a peak may be from the plan's, which does not know the scratch of kernels.
const TOLERANCE: f64 = 0.05;

/// Small models of every kind of pass, whose activations outweigh the scratch of kernels.
fn models() -> Vec<(&'static str, Value)> {
    let encoder = json!({
        "vocab_size": 500, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 384,
        "max_position_embeddings": 300,
    });
    let with = |more: Value| {
        let mut all = encoder.clone();
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        all
    };
    vec![
        (
            "gpt2",
            json!({"model_type": "gpt2", "vocab_size": 2000, "n_positions": 300, "n_embd": 96, "n_layer": 3, "n_head": 4}),
        ),
        ("bert", with(json!({"model_type": "bert"}))),
        ("roberta", with(json!({"model_type": "roberta", "type_vocab_size": 1}))),
        (
            "qwen3",
            with(json!({"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": true})),
        ),
        (
            "deberta",
            with(json!({
                "model_type": "deberta-v2", "type_vocab_size": 0, "relative_attention": true, "position_buckets": 16,
                "max_relative_positions": -1, "share_att_key": true, "pos_att_type": "p2c|c2p",
                "norm_rel_ebd": "layer_norm", "position_biased_input": false, "conv_kernel_size": 3, "conv_act": "gelu",
            })),
        ),
    ]
}

fn load(raw: &Value) -> Box<dyn Model> {
    let raw = RawConfig::new(Path::new("model"), raw.as_object().unwrap().clone());
    let is_encoder = raw.value("model_type").and_then(Value::as_str).is_some_and(|m| m.contains("bert"));
    let task = is_encoder.then_some(Task::Classification { labels: 2 });
    let options = LoadOptions { task, ..LoadOptions::default() };
    let mut i = 0u32;
    let mut random = |_: &str, shape: &[usize]| {
        let mut next = || {
            i = i.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (i >> 8) as f32 / (1 << 24) as f32 * 0.2 - 0.1
        };
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
        Ok(Tensor::from_slice(&Device::Cpu, shape, &values)?)
    };
    assemble(raw, &Device::Cpu, &options, &mut random).unwrap()
}

/// The most that the pool has held in training beyond what it held before.
fn measured(model: &dyn Model, config: &TrainConfig, seq_len: usize) -> f64 {
    let causal = model.task() == Task::CausalLm;
    let sequence = |i: usize| {
        let n = seq_len + usize::from(causal);
        let tokens: Vec<u32> = (0..n).map(|j| ((i * 31 + j * 7) % 400) as u32).collect();
        if causal {
            Sequence::after(tokens, 1)
        } else {
            Sequence { second_from: n, tokens, goal: Goal::Label((i % 2) as u32) }
        }
    };
    let data = Dataset::new((0..config.batch_size).map(sequence).collect());
    release_idle_memory();
    let before = pool_stats().reserved;
    let adapted = Adapted::new(&*config.method_options().unwrap(), model, &Device::Cpu, DType::F32, 0).unwrap();
    let mut trainer = Trainer::new(model, adapted, config, data.sequences.len()).unwrap();
    for _ in 0..2 {
        trainer.step(&data).unwrap();
    }
    (pool_stats().reserved - before) as f64
}

/// The bytes of what a method's result is written as.
fn written(model: &dyn Model, config: &TrainConfig) -> u64 {
    let dir = tempfile::tempdir().unwrap();
    let adapted = Adapted::new(&*config.method_options().unwrap(), model, &Device::Cpu, DType::F32, 0).unwrap();
    let file = if config.row().unwrap().whole_model {
        model.save(dir.path(), &adapted.merged(model).unwrap()).unwrap();
        SINGLE_FILE
    } else {
        let options = config.options().unwrap();
        adapter::save(dir.path(), &config.method, &options, &adapted, model, None).unwrap();
        adapter::WEIGHTS_FILE
    };
    std::fs::metadata(dir.path().join(file)).unwrap().len()
}

/// What does not fit.
const MISFITS: [&str; 3] = ["qwen3 bitfit", "deberta pre-layer", "deberta lora+pre-layer"];

#[test]
fn planned_memory_and_files_are_those_of_training() {
    // One thread, so that scratch does not depend on how tasks meet.
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (mut worst, mut misfits) = (0.0f64, Vec::new());
    one.install(|| {
        // What the thread keeps for products is taken before anything is measured.
        let mut warm = [4096, 4096, 4096].map(|n| Buffer::zeros(&Device::Cpu, DType::F32, n).unwrap());
        let [a, b, c] = &mut warm;
        gemm(1.0, Mat::new(a, 0, 64, 64), Mat::new(b, 0, 64, 64), 0.0, MatMut::new(c, 0, 64, 64)).unwrap();
        drop(warm);
        for (name, raw) in models() {
            std::fs::write(dir.path().join("config.json"), raw.to_string()).unwrap();
            let model = load(&raw);
            for method in METHODS.iter().filter(|m| m.name != "fusion") {
                let plain = InitLoraWeights::default();
                let from_base = (64, 0.1, InitLoraWeights::Pissa { niter: Some(1) }, false);
                let more = (method.name == "lora").then_some(from_base);
                let mut activations = Vec::new();
                for (seq_len, dropout, init_lora_weights, checkpoint) in
                    [(64, 0.0, plain, false), (256, 0.1, plain, false), (256, 0.1, plain, true)].into_iter().chain(more)
                {
                    let parts = name == "gpt2" && method.name.starts_with("lora");
                    let targets: &[&str] = if parts { &["c_attn.q", "c_attn.v", "c_fc"] } else { &[] };
                    let train = TrainConfig {
                        method: method.name.into(),
                        batch_size: 6,
                        dropout,
                        init_lora_weights,
                        checkpoint,
                        targets: targets.iter().copied().collect(),
                        bottleneck: 16,
                        reparam: if dropout > 0.0 { 20 } else { 0 },
                        steps: Some(3),
                        ..TrainConfig::default()
                    };
                    let what = format!("{name} {}", method.name);
                    let config = PlanConfig {
                        model: Some(dir.path().into()),
                        train: train.clone(),
                        batch_size: train.batch_size,
                        seq_len: Some(seq_len),
                        dtype: DType::F32,
                        ..PlanConfig::default()
                    };
                    let Ok(planned) = plan(&config) else {
                        misfits.push(what);
                        break;
                    };
                    // PEFT's file of parts also says which parts they are.
                    let more = written(&*model, &train) - planned.adapted.checkpoint_bytes;
                    assert!(more == 0 || method.name.starts_with("lora") && more < 200, "{what}: {more} bytes more");
                    let peak = beside_the_base(&planned);
                    let off = measured(&*model, &train, seq_len) / peak - 1.0;
                    let kind = if checkpoint { ", checkpoints" } else { "" };
                    println!("{what}, {seq_len} positions{kind}: {peak:.0} planned, {:+.1}%", 100.0 * off);
                    activations.push(planned.adapted.memory.activations);
                    worst = if off.abs() > worst.abs() { off } else { worst };
                }
                if let [_, kept, again, ..] = activations[..] {
                    assert!(again <= kept, "{name} {}: {again} bytes with checkpoints, {kept} without", method.name);
                }
            }
        }
    });
    assert_eq!(misfits, MISFITS);
    assert!(worst.abs() <= TOLERANCE, "{:+.1}% off the plan", 100.0 * worst);
}

/// What a plan has beyond the weights of the base, which were there before.
fn beside_the_base(plan: &Plan) -> f64 {
    let m = &plan.adapted.memory;
    let base = plan.dtype_bytes * plan.parameters;
    (m.total - base) as f64
}
