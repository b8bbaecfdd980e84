//! What fine-tuning a model takes, from its configuration alone: parameters, checkpoints, and training memory by part, for
//! full fine-tuning and for a method. No weight is read or made.
//!
//! | part | bytes, with P scalars of the base, t that train, b bytes of the type computed in |
//! |---|---|
//! | weights | b·P frozen; what trains is kept in f32 beside it, 4·t, and cast for computing where b < 4, b·t |
//! | gradients | 4·t: f32, of what trains alone |
//! | optimiser | 8·t: AdamW's two moments in f32 |
//! | activations | the peak of one forward and backward pass, below |
//!
//! Full fine-tuning begins from a base in f32 whatever it computes in, so that no digit is lost: 4·P for it, then
//! t = P.
//!
//! Activations are not estimated: the forward and backward pass is done with matrices that are only sizes (`plan/ops.rs`
//! follows `lora_core::ops`, `plan/forward.rs` the architectures), whose memory the real pool's own rules hand out
//! ([`DryPool`](lora_kernels::DryPool)). What counts is the most that the pool holds, with logits for one chunk of rows
//! (48 MiB in f32, 256 MiB in 16 bits), dropout, the scores that attention over relative positions takes on one thread, and
//! nothing kept below the lowest parameter that trains.
//! `lora-train/tests/plan.rs` holds it against real training.

mod adapted;
mod archs;
mod forward;
mod ops;
mod paper;
mod saved;
mod tape;

use std::path::PathBuf;

use lora_core::peft;
use lora_kernels::DType;
use lora_model::{
    LoadOptions, Task,
    config::{BertConfig, DebertaV2Config, Gpt2Config, LlamaConfig, RawConfig, RobertaConfig},
    outline,
};
use serde::Serialize;

use crate::{Error, Result, TrainConfig};
use adapted::Adapted;
use forward::{Config, Pass};
use saved::Saved;

pub use archs::{ARCHS, Arch, arch_named};
pub use paper::Paper;

/// What to plan for.
#[derive(Clone, Debug)]
pub struct PlanConfig {
    /// A model of [`ARCHS`].
    pub arch: Option<String>,
    /// Or the folder of one, of which `config.json` is read.
    pub model: Option<PathBuf>,
    /// The method, its options, `base_dropout` and `checkpoint`; nothing else of it is read.
    pub train: TrainConfig,
    /// Sequences that are computed at a time: `batch-size / grad-accum` of a run.
    pub batch_size: usize,
    /// Positions of a sequence, all of which predict in a model that continues text; the model's own, at most 2048, when
    /// absent.
    pub seq_len: Option<usize>,
    /// The type that is computed in: f32, bf16 or f16.
    pub dtype: DType,
    /// Tasks that checkpoints are stored for.
    pub tasks: u64,
}

impl Default for PlanConfig {
    fn default() -> PlanConfig {
        PlanConfig {
            arch: None,
            model: None,
            train: TrainConfig::default(),
            batch_size: 1,
            seq_len: None,
            dtype: DType::Bf16,
            tasks: 100,
        }
    }
}

/// What fine-tuning takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// The model's name, or its folder.
    pub model: String,
    /// `model_type`.
    pub architecture: String,
    /// Layers.
    pub layers: usize,
    /// Scalars of the base, a classifier's head included.
    pub parameters: u64,
    /// Whether it is planned as a classifier, whose head trains with every method.
    pub classifier: bool,
    /// A row of [`peft::METHODS`].
    pub method: String,
    /// Sequences computed at a time.
    pub batch_size: usize,
    /// Positions of a sequence, virtual tokens aside.
    pub seq_len: usize,
    /// Bytes of a scalar of the type computed in.
    pub dtype_bytes: u64,
    /// Tasks that checkpoints are stored for.
    pub tasks: u64,
    /// Full fine-tuning.
    pub full: Costs,
    /// The method.
    pub adapted: Costs,
    /// What the LoRA paper says of this model.
    pub paper: Option<Paper>,
}

/// What one way of fine-tuning takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Costs {
    /// Scalars that train.
    pub trainable: u64,
    /// Their share of the base's.
    pub trainable_share: f64,
    /// Bytes of its checkpoint as it is written here: safetensors in f32, LoRA in PEFT's layout.
    pub checkpoint_bytes: u64,
    /// Bytes of the same scalars in 16 bits.
    pub checkpoint_bytes_16: u64,
    /// Training memory.
    pub memory: Memory,
    /// Bytes on disk of all tasks: the base once (but for full fine-tuning) and a checkpoint each, as they are written here.
    pub tasks_bytes: u64,
    /// The same in 16 bits.
    pub tasks_bytes_16: u64,
}

/// Training memory in bytes, by part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// The base, what trains, and its cast.
    pub weights: u64,
    /// Of what trains.
    pub gradients: u64,
    /// AdamW's moments.
    pub optimiser: u64,
    /// The most that a forward and backward pass holds at once.
    pub activations: u64,
    /// All together.
    pub total: u64,
}

/// Computes a plan.
///
/// # Errors
/// An unknown model, a configuration that makes no sense, a method that does not fit the model or its options, sizes beyond
/// the model's positions or beyond what can be counted; each names the option or the file.
pub fn plan(config: &PlanConfig) -> Result<Plan> {
    let c = config;
    if c.batch_size == 0 || c.batch_size > u32::MAX as usize {
        return Err(Error::option("batch-size", c.batch_size, "is from 1 to 4294967295 sequences"));
    }
    if c.tasks == 0 {
        return Err(Error::option("tasks", 0, "must be at least 1"));
    }
    let (name, raw) = match (&c.arch, &c.model) {
        (Some(name), None) => (name.clone(), arch_named(name)?.config()),
        (None, Some(dir)) => (dir.display().to_string(), RawConfig::from_dir(dir)?),
        _ => return Err(Error::option("arch", "", "name either a model as --arch or a folder as --model")),
    };
    let row = raw.architecture()?;
    // An encoder trains as a classifier, whatever its folder has; filling in tokens is no task of the trainer.
    let task = match (row.task)(&raw)? {
        Some(task) if task != Task::MaskedLm => task,
        _ => Task::Classification { labels: 2 },
    };
    let base = outline(&raw, &LoadOptions { task: Some(task), ..LoadOptions::default() })?;
    let shape = shape(&raw)?;
    let options = c.train.options()?;
    let method = c.train.row()?;
    let build = |row: &peft::MethodRow| (row.build)(&options);
    let attached = Adapted::new(&*build(method)?, &options, &base)?;
    let virtual_tokens = attached.positions();
    // The method has been checked against the base: it leaves at least one.
    let free = base.max_positions.saturating_sub(virtual_tokens);
    let seq_len = match c.seq_len {
        None => free.min(2048),
        Some(0) => return Err(Error::option("seq-len", 0, "must be at least 1")),
        Some(n) if n > free => {
            let mut why = format!("the model has {} positions", base.max_positions);
            if virtual_tokens > 0 {
                why += &format!(", of which {virtual_tokens} virtual tokens take theirs");
            }
            return Err(Error::option("seq-len", n, why));
        }
        Some(n) => n,
    };
    let costs = |row: &peft::MethodRow, adapted: &Adapted| -> Result<Costs> {
        let pass = Pass {
            adapted,
            task,
            sequences: c.batch_size as u128,
            tokens: seq_len as u128,
            base_dropout: c.train.base_dropout,
            checkpoint: c.train.checkpoint,
        };
        let counts = pass.peak(&shape, c.dtype.size() as u128).map(|activations| Counts {
            base: saved::model(&base),
            own: saved::result(row, &options, adapted, &base),
            whole_model: row.whole_model,
            trainable: adapted.trainable(),
            activations,
            constants: adapted.constants(),
            size: c.dtype.size() as u128,
            tasks: c.tasks.into(),
        });
        counts.and_then(counted).ok_or_else(|| {
            let why = "these sizes together are beyond 2^64 bytes; lower --batch-size or --tasks";
            Error::option("batch-size", c.batch_size, why)
        })
    };
    let full = peft::find("full")?;
    let all = build(full)?;
    let costs_of_full = costs(full, &Adapted::new(&*all, &options, &base)?)?;
    Ok(Plan {
        model: name,
        architecture: base.architecture.clone(),
        layers: base.layers,
        parameters: whole(base.parameters()),
        classifier: matches!(task, Task::Classification { .. } | Task::Regression),
        method: method.name.into(),
        batch_size: c.batch_size,
        seq_len,
        dtype_bytes: c.dtype.size() as u64,
        tasks: c.tasks,
        adapted: if method.whole_model { costs_of_full.clone() } else { costs(method, &attached)? },
        full: costs_of_full,
        paper: c.arch.as_deref().and_then(paper::of),
    })
}

/// A checked configuration of any architecture.
fn shape(raw: &RawConfig) -> Result<Config> {
    Ok(match raw.architecture()?.model_type {
        "gpt2" => Config::Gpt2(Gpt2Config::from_raw(raw)?),
        "bert" => Config::Bert(BertConfig::from_raw(raw)?),
        "roberta" => Config::Roberta(RobertaConfig::from_raw(raw)?),
        "deberta-v2" => Config::Deberta(DebertaV2Config::from_raw(raw)?),
        _ => Config::Llama(LlamaConfig::from_raw(raw)?),
    })
}

/// What the costs follow from.
struct Counts {
    base: Saved,
    own: Saved,
    whole_model: bool,
    trainable: u128,
    activations: u128,
    /// Scalars beside the base that stay.
    constants: u128,
    size: u128,
    tasks: u128,
}

/// `None` when the bytes are too many for 64 bits.
fn counted(n: Counts) -> Option<Costs> {
    let (p, t) = (n.base.scalars, n.trainable);
    let cast = if n.size < tape::WIDE { n.size * t } else { 0 };
    let frozen = if n.whole_model { tape::WIDE } else { n.size };
    let parts = [frozen * p + tape::WIDE * (t + n.constants) + cast, tape::WIDE * t, 2 * tape::WIDE * t, n.activations];
    let stored = |base: u128, own: u128| if n.whole_model { n.tasks * own } else { base + n.tasks * own };
    let bytes = |n: u128| u64::try_from(n).ok();
    Some(Costs {
        trainable: bytes(t)?,
        trainable_share: t as f64 / p as f64,
        checkpoint_bytes: n.own.bytes,
        checkpoint_bytes_16: bytes(2 * n.own.scalars)?,
        memory: Memory {
            weights: bytes(parts[0])?,
            gradients: bytes(parts[1])?,
            optimiser: bytes(parts[2])?,
            activations: bytes(parts[3])?,
            total: bytes(parts.iter().sum())?,
        },
        tasks_bytes: bytes(stored(n.base.bytes.into(), n.own.bytes.into()))?,
        tasks_bytes_16: bytes(stored(2 * p, 2 * n.own.scalars))?,
    })
}

/// A checked configuration has fewer parameters than this holds.
fn whole(n: u128) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}
