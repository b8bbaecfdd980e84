//! Folders of models with random weights, on which speed does not depend.

use std::path::Path;

use anyhow::{Context, Result};
use lora_core::Tensor;
use lora_kernels::Device;
use lora_model::{LoadOptions, Task, assemble, config::RawConfig, tokenizer::Tokenizer};
use lora_train::plan::arch_named;
use serde_json::{Value, json};

/// Writes the model of a published shape into `dir`, or a tiny one of its architecture.
///
/// # Errors
/// An unknown model; what writing a file can cause.
pub fn write(dir: &Path, arch: &str, tiny: bool) -> Result<()> {
    let raw = config(arch, tiny)?;
    let task = (raw.architecture()?.task)(&raw)?.unwrap_or(Task::Classification { labels: 2 });
    let options = LoadOptions { task: Some(task), ..LoadOptions::default() };
    let mut next = numbers();
    let mut fetch = |name: &str, shape: &[usize]| {
        let len = shape.iter().product();
        let values: Vec<f32> = match shape.len() {
            1 if name.ends_with("bias") => vec![0.0; len],
            1 => vec![1.0; len],
            _ => (0..len).map(|_| next()).collect(),
        };
        Ok(Tensor::from_slice(&Device::Cpu, shape, &values)?)
    };
    let model = assemble(raw, &Device::Cpu, &options, &mut fetch)?;
    std::fs::create_dir_all(dir).with_context(|| format!("could not make {}", dir.display()))?;
    Ok(model.save(dir, &Default::default())?)
}

/// Puts the tokenizer of another folder into a model's.
///
/// # Errors
/// What reading and writing files can cause.
pub fn add_tokenizer(dir: &Path, from: &Path) -> Result<()> {
    Ok(Tokenizer::from_dir(from)?.save(dir)?)
}

fn config(arch: &str, tiny: bool) -> Result<RawConfig> {
    let mut raw = arch_named(arch)?.config();
    let keys = match raw.str("model_type")? {
        _ if !tiny => json!({}),
        Some("gpt2") => json!({ "n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 300, "n_positions": 96,
            "bos_token_id": 0, "eos_token_id": 0 }),
        _ => json!({ "num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 32,
            "vocab_size": 300, "max_position_embeddings": 96, "num_key_value_heads": 1 }),
    };
    let Value::Object(keys) = keys else { unreachable!("an object was written above") };
    keys.into_iter().for_each(|(key, value)| raw.set(&key, value));
    Ok(raw)
}

/// Uniform numbers of deviation 0.02, that of a fresh GPT-2.
fn numbers() -> impl FnMut() -> f32 {
    let mut draw = crate::training::random(1 << 24);
    let bound = 0.02 * 3f32.sqrt();
    move || (draw() as f32 / (1 << 23) as f32 - 1.0) * bound
}
