use std::path::Path;

use lora_core::{Tensor, peft::Outline};
use lora_kernels::{DType, Device};

use crate::{
    Bert, DebertaV2, Gpt2, Llama, Model, Result, Roberta, Task,
    config::{BertConfig, DebertaV2Config, Gpt2Config, LlamaConfig, RawConfig, RobertaConfig},
    heads,
};

/// How to load a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoadOptions {
    /// The type of weights and activations: bf16 or f16 on a CUDA device. On the CPU bf16 is the type of matrices alone
    /// ([`LoadOptions::kept`]).
    pub dtype: DType,
    /// What the head is to give; `None` is what the folder's configuration says. An encoder without such a head gets a
    /// fresh one.
    pub task: Option<Task>,
    /// Of a fresh head.
    pub seed: u64,
    /// Whether an adapter will bring the head that the folder lacks, so that nothing has to be said about a fresh one.
    pub head_follows: bool,
}

impl Default for LoadOptions {
    fn default() -> LoadOptions {
        LoadOptions { dtype: DType::F32, task: None, seed: 0, head_follows: false }
    }
}

impl LoadOptions {
    /// The type in which a weight of that shape is kept on a device. Where the host keeps 16-bit weights, only matrices are:
    /// vectors are hardly any memory, and go into arithmetic that it does in f32.
    pub fn kept(&self, device: &Device, shape: &[usize]) -> DType {
        if shape.len() == 2 { self.dtype } else { device.activations(self.dtype) }
    }
}

/// How an architecture loads the model in a folder whose configuration was read.
pub type Load = fn(&Path, RawConfig, &Device, &LoadOptions) -> Result<Box<dyn Model>>;

/// Gives a weight by its Hugging Face name and shape, in the order of the model.
pub type Fetch<'a> = dyn FnMut(&str, &[usize]) -> Result<Tensor> + 'a;

/// How an architecture makes a model of a configuration and the weights that are given.
pub type Assemble = fn(RawConfig, &Device, &LoadOptions, &mut Fetch) -> Result<Box<dyn Model>>;

/// One row of the table of architectures.
pub struct ArchitectureRow {
    /// `model_type` in a configuration.
    pub model_type: &'static str,
    /// What it is, in a line.
    pub about: &'static str,
    /// What the head of a folder with this configuration gives; `None` for an encoder without a head that is known.
    pub task: fn(&RawConfig) -> Result<Option<Task>>,
    /// What a model of this configuration looks like, without its weights.
    pub outline: fn(&RawConfig, &LoadOptions) -> Result<Outline>,
    /// The model in a folder whose configuration was read.
    pub load: Load,
    /// The model of a configuration, with weights from anywhere.
    pub assemble: Assemble,
}

/// All architectures.
pub const ARCHITECTURES: &[ArchitectureRow] = &[
    ArchitectureRow {
        model_type: "gpt2",
        about: "GPT-2 (Radford et al. 2019)",
        task: |_| Ok(Some(Task::CausalLm)),
        outline: |raw, _| Ok(Gpt2Config::from_raw(raw)?.outline()),
        load: |dir, raw, device, options| Ok(Box::new(Gpt2::load(dir, raw, device, options)?)),
        assemble: |raw, device, options, fetch| Ok(Box::new(Gpt2::assemble(raw, device, options, fetch)?)),
    },
    ArchitectureRow {
        model_type: "bert",
        about: "BERT (Devlin et al. 2019)",
        task: heads::own_task,
        outline: |raw, options| Ok(BertConfig::from_raw(raw)?.outline(heads::task(raw, options)?)),
        load: |dir, raw, device, options| Ok(Box::new(Bert::load(dir, raw, device, options)?)),
        assemble: |raw, device, options, fetch| Ok(Box::new(Bert::assemble(raw, device, options, fetch)?)),
    },
    ArchitectureRow {
        model_type: "roberta",
        about: "RoBERTa (Liu et al. 2019)",
        task: heads::own_task,
        outline: |raw, options| Ok(RobertaConfig::from_raw(raw)?.outline(heads::task(raw, options)?)),
        load: |dir, raw, device, options| Ok(Box::new(Roberta::load(dir, raw, device, options)?)),
        assemble: |raw, device, options, fetch| Ok(Box::new(Roberta::assemble(raw, device, options, fetch)?)),
    },
    ArchitectureRow {
        model_type: "deberta-v2",
        about: "DeBERTa-v2 and v3 (He et al. 2021)",
        task: heads::own_task,
        outline: |raw, options| Ok(DebertaV2Config::from_raw(raw)?.outline(heads::task(raw, options)?)),
        load: |dir, raw, device, options| Ok(Box::new(DebertaV2::load(dir, raw, device, options)?)),
        assemble: |raw, device, options, fetch| Ok(Box::new(DebertaV2::assemble(raw, device, options, fetch)?)),
    },
    llama("llama", "Llama 2 and 3 (Touvron et al. 2023), TinyLlama, SmolLM"),
    llama("mistral", "Mistral (Jiang et al. 2023)"),
    llama("qwen2", "Qwen2 and Qwen2.5 (Qwen team 2024)"),
    llama("qwen3", "Qwen3 (Qwen team 2025)"),
];

const fn llama(model_type: &'static str, about: &'static str) -> ArchitectureRow {
    ArchitectureRow {
        model_type,
        about,
        task: |_| Ok(Some(Task::CausalLm)),
        outline: |raw, _| Ok(LlamaConfig::from_raw(raw)?.outline()),
        load: |dir, raw, device, options| Ok(Box::new(Llama::load(dir, raw, device, options)?)),
        assemble: |raw, device, options, fetch| Ok(Box::new(Llama::assemble(raw, device, options, fetch)?)),
    }
}

/// Loads the model in a folder, whatever its architecture, in f32.
///
/// # Errors
/// An unknown architecture, a configuration that makes no sense, weights that are missing, damaged or of another shape;
/// each names the file.
pub fn load(dir: &Path, device: &Device) -> Result<Box<dyn Model>> {
    load_with(dir, device, &LoadOptions::default())
}

/// As [`load`], with weights and activations of the given type: bf16 or f16 on a CUDA device.
///
/// # Errors
/// Those of [`load`]; no memory on the device.
pub fn load_as(dir: &Path, device: &Device, dtype: DType) -> Result<Box<dyn Model>> {
    load_with(dir, device, &LoadOptions { dtype, ..LoadOptions::default() })
}

/// As [`load`], with options.
///
/// # Errors
/// Those of [`load`]; a task that the architecture has no head for; no memory on the device.
pub fn load_with(dir: &Path, device: &Device, options: &LoadOptions) -> Result<Box<dyn Model>> {
    let raw = RawConfig::from_dir(dir)?;
    (raw.architecture()?.load)(dir, raw, device, options)
}

/// The model of a configuration, with weights that `fetch` gives: random ones, or those of another model of the same shape.
/// `options.dtype` is not read: the weights have their type.
///
/// # Errors
/// An unknown architecture, a configuration that makes no sense, what `fetch` gives; no memory on the device.
///
/// # Panics
/// When a weight has another shape than was asked for.
pub fn assemble(raw: RawConfig, device: &Device, options: &LoadOptions, fetch: &mut Fetch) -> Result<Box<dyn Model>> {
    let mut checked = |name: &str, shape: &[usize]| {
        let t = fetch(name, shape)?;
        assert_eq!(t.shape(), shape, "the weight {name}");
        Ok(t)
    };
    (raw.architecture()?.assemble)(raw, device, options, &mut checked)
}

/// What the model of a configuration looks like, without its weights: enough to count what a method trains.
///
/// # Errors
/// An unknown architecture, a configuration that makes no sense.
pub fn outline(raw: &RawConfig, options: &LoadOptions) -> Result<Outline> {
    (raw.architecture()?.outline)(raw, options)
}

/// Refuses any task but the only one that an architecture has a head for.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config), naming the task.
pub(crate) fn only(task: Task, raw: &RawConfig, options: &LoadOptions) -> Result<()> {
    match options.task {
        Some(wanted) if wanted != task => Err(raw.error(
            "model_type",
            format_args!("this architecture has a head for {} alone, not for {}", task.name(), wanted.name()),
        )),
        _ => Ok(()),
    }
}
