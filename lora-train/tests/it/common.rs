//! Small models of every architecture, with random weights and a tokenizer that can read text.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use lora_core::Tensor;
use lora_kernels::Device;
use lora_model::{
    LoadOptions, Task,
    checkpoint::{Layout, TensorSpec, save},
    config::RawConfig,
    outline,
    tokenizer::Tokenizer,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

/// With their features the emulated device and the first CUDA device.
#[cfg(feature = "cuda")]
pub(crate) fn gpus() -> Vec<std::sync::Arc<lora_kernels::cuda::Gpu>> {
    use lora_kernels::cuda::Gpu;

    let gpus: Vec<std::sync::Arc<Gpu>> = [
        #[cfg(feature = "emulator")]
        Gpu::emulated(0),
        Gpu::open(0),
    ]
    .into_iter()
    .filter_map(|gpu| gpu.inspect_err(|e| println!("skipped: no CUDA device ({e})")).ok())
    .collect();
    let required = std::env::var_os("LORA_GATES").is_some_and(|v| v == "required");
    assert!(!(required && gpus.is_empty()), "required, but there is no CUDA device");
    gpus
}

/// A file of the folder of test data that `LORA_DATA` names, or else of `shared/data` beside the workspace.
pub(crate) fn real_data(folder: &str, file: &str) -> Option<PathBuf> {
    let data = std::env::var_os("LORA_DATA")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"), PathBuf::from);
    let path = data.join(folder).join(file);
    if path.is_file() {
        return Some(path);
    }
    eprintln!("skipped: no {}; set LORA_DATA to a folder with {folder}", path.display());
    None
}

/// The folders of the models that the golden files were made with.
pub(crate) fn golden() -> Vec<PathBuf> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../lora-model/tests/golden");
    let mut cases: Vec<PathBuf> = fs::read_dir(golden).unwrap().map(|e| e.unwrap().path().join("model")).collect();
    cases.retain(|c| c.join("config.json").exists());
    cases.sort();
    cases
}

/// Lines of the E2E form.
pub(crate) fn records() -> String {
    let line = |i: usize| format!("name : N{} | food : F{}||N{} serves F{} .\n", i % 5, i % 7, i % 5, i % 7);
    (0..30).map(line).collect()
}

/// The columns of pairs of texts of different lengths, each with what `answer` says of it.
pub(crate) fn pairs(answer: impl Fn(usize) -> String) -> String {
    let line = |i: usize| {
        let more = " again".repeat(i % 3);
        format!("N{} serves F{}{more} .\tF{} is food .\t{}\n", i % 5, i % 7, i % 7, answer(i))
    };
    (0..30).map(line).collect()
}

/// The task of a model of this configuration by its name in the table, and data to train it on; `None` for one that fills
/// in tokens.
pub(crate) fn data(raw: &RawConfig) -> Option<(Option<&'static str>, String)> {
    let options = LoadOptions::default();
    if outline(raw, &options).unwrap().task_type == Some("CAUSAL_LM") {
        return Some((None, records()));
    }
    let class = raw.value("architectures")?[0].as_str()?.to_owned();
    let labels = raw.value("id2label").and_then(Value::as_object).map_or(0, |names| names.len());
    match labels {
        _ if !class.ends_with("ForSequenceClassification") => None,
        1 => Some((Some("values"), pairs(|i| format!("{}.5", i % 4)))),
        // Fewer than the head has, so that another one is made.
        _ => Some((Some("labels"), pairs(|i| if i % 3 == 0 { "yes".into() } else { "no".into() }))),
    }
}

/// Writes a model of the configuration in `golden` into `dir`, with a vocabulary of a tokenizer that reads text, with
/// random weights, and with everything dropped out that can be. `change` may change the configuration.
pub(crate) fn base(golden: &Path, dir: &Path, change: impl FnOnce(&mut RawConfig)) -> RawConfig {
    let mut raw = RawConfig::from_dir(golden).unwrap();
    let tokenizer = Tokenizer::train_bpe([records(), pairs(|_| String::new())].iter(), 290).unwrap();
    raw.set("vocab_size", tokenizer.vocab_size());
    for key in ["bos_token_id", "eos_token_id"] {
        raw.set(key, tokenizer.end_of_text().unwrap());
    }
    for key in ["resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"].into_iter().chain([
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "pooler_dropout",
    ]) {
        if raw.value(key).is_some() {
            raw.set(key, 0.1);
        }
    }
    change(&mut raw);
    fs::create_dir_all(dir).unwrap();
    raw.save(dir).unwrap();
    tokenizer.save(dir).unwrap();
    // An encoder's texts stand between tokens.
    let path = dir.join("tokenizer_config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    for key in ["cls_token", "sep_token"] {
        config[key] = json!("<|endoftext|>");
    }
    fs::write(path, config.to_string()).unwrap();
    let fallback = LoadOptions { task: Some(Task::Regression), ..LoadOptions::default() };
    let outline = outline(&raw, &LoadOptions::default()).or_else(|_| outline(&raw, &fallback)).unwrap();
    let specs: Vec<TensorSpec> = outline.tensors.iter().map(|t| TensorSpec::new(&t.name, t.shape.clone())).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let tensors: BTreeMap<&str, Tensor> = outline
        .tensors
        .iter()
        .map(|t| {
            let around = f32::from(u8::from(t.norm && !t.is_bias()));
            let values: Vec<f32> =
                (0..t.shape.iter().product()).map(|_| around + rng.random_range(-0.3..0.3)).collect();
            (t.name.as_str(), Tensor::from_slice(&Device::Cpu, &t.shape, &values).unwrap())
        })
        .collect();
    save(dir, &Layout::single(), &specs, |name| Ok(tensors[name].clone())).unwrap();
    raw
}
