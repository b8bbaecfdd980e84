mod check;
mod file;
mod values;

use std::path::PathBuf;

use lora_core::peft::{self, InitLoraWeights, Modules};
use serde::{Deserialize, Serialize};

pub(crate) use file::{by_our_names, our_name};
use values::{init_lora_weights, modules, one_or_more, pattern};

use crate::{
    Result,
    data::{self, Format},
    schedule::Schedule,
};

/// Everything that a training run depends on: the flags of `lora train`, the keys of its TOML file, and what a checkpoint
/// remembers. Every field is a flag of the same name (`batch-size`), and has its default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct TrainConfig {
    /// Folder of the base model (config.json, safetensors, tokenizer).
    pub model: PathBuf,
    /// Training data.
    pub data: PathBuf,
    /// Output folder.
    pub out: PathBuf,
    /// Validation data.
    pub valid: Option<PathBuf>,
    /// Share of the training data that is kept from training and evaluated on, in place of `valid`: see
    /// [`Dataset::hold_out`](crate::data::Dataset::hold_out).
    pub hold_out: f64,
    /// Layout of the data files; by their extension when absent.
    pub format: Option<Format>,
    /// What is learned, a row of [`TASKS`](crate::data::TASKS); a model that continues text needs none.
    pub task: Option<String>,
    /// A row of [`peft::METHODS`].
    pub method: String,
    /// Rank r of low-rank updates; PEFT's `r`.
    #[serde(alias = "r")]
    pub rank: usize,
    /// α of the scale α/r; PEFT's `lora_alpha`.
    #[serde(alias = "lora-alpha")]
    pub alpha: f64,
    /// Dropout on an adapter's input; PEFT's `lora_dropout`, and of VeRA `vera_dropout`.
    #[serde(alias = "lora-dropout", alias = "vera-dropout")]
    pub dropout: f64,
    /// Scale by α/√r; PEFT's `use_rslora`.
    #[serde(alias = "use-rslora")]
    pub rslora: bool,
    /// Modules to adapt: a list of names, or as text a regular expression or `all-linear`; without any the architecture's
    /// default, as in PEFT, where it is `target_modules`.
    #[serde(alias = "target-modules", with = "modules")]
    pub targets: Modules,
    /// Modules not to adapt, although a target says so: names, or a regular expression.
    #[serde(with = "modules")]
    pub exclude_modules: Modules,
    /// The layers that are adapted, from 0; none: all of them. One may stand without a list.
    #[serde(deserialize_with = "one_or_more")]
    pub layers_to_transform: Vec<usize>,
    /// What stands before the number of a layer in the names of modules; none: anything. One may stand without a list.
    #[serde(deserialize_with = "one_or_more")]
    pub layers_pattern: Vec<String>,
    /// Ranks of modules that differ from `rank`, by [`peft::Pattern`]: of several keys that match, the first holds.
    #[serde(with = "pattern")]
    pub rank_pattern: Vec<(String, usize)>,
    /// α's of modules that differ from `alpha`, likewise.
    #[serde(with = "pattern")]
    pub alpha_pattern: Vec<(String, f64)>,
    /// Modules of the base that train whole beside LoRA, by the ends of their names.
    pub modules_to_save: Vec<String>,
    /// Biases of the base that train beside LoRA: none, all, or lora_only.
    pub bias: String,
    /// DoRA on LoRA's targets.
    pub use_dora: bool,
    /// How LoRA's A and B begin, by PEFT's words: true, false, gaussian, pissa, pissa_niter_N, olora, orthogonal.
    #[serde(with = "init_lora_weights")]
    pub init_lora_weights: InitLoraWeights,
    /// Whether LoRA's weights are stored [in, out], as GPT-2's are; the base knows, and what is said has to agree.
    pub fan_in_fan_out: Option<bool>,
    /// Among the targets of (IA)³ those whose inputs are multiplied; PEFT's for the architecture where none are named.
    #[serde(with = "modules")]
    pub feedforward_modules: Modules,
    /// Width of the bottleneck of adapters.
    pub bottleneck: usize,
    /// What stands between its two maps, by Hugging Face's names; the method's own when absent.
    pub non_linearity: Option<String>,
    /// Train the base's normalisations beside adapters.
    pub train_norms: bool,
    /// The layers that `top2` trains: see [`peft::Layers`].
    pub layers: String,
    /// The layers that `adapter-d` leaves without an adapter; the lowest ⌊5·L/12⌋ when absent.
    pub drop_layers: Option<String>,
    /// Virtual tokens before the text; PEFT's `num_virtual_tokens`.
    #[serde(alias = "num-virtual-tokens")]
    pub prefix: usize,
    /// Virtual tokens after the prompt.
    pub infix: usize,
    /// Whether the virtual tokens of `pre-layer` count as positions of the text.
    pub count_prefix: bool,
    /// Whether a text is classified by the first virtual token of `pre-embed` rather than by its own first token.
    pub classify_prefix: bool,
    /// Width of the hidden layer that a prefix is reparametrised with; 0 is none.
    pub reparam: usize,
    /// Folders of the trained adapters that `fusion` combines.
    pub fuse: Vec<PathBuf>,
    /// Factor both factors of LoKr's product.
    pub decompose_both: bool,
    /// One of LoKr's two factors of inputs and outputs, where it divides them; −1: near the square root.
    pub decompose_factor: i64,
    /// What the vector between VeRA's random matrices begins at.
    pub d_initial: f64,
    /// The seed of VeRA's random matrices.
    pub projection_prng_key: u64,
    /// Save VeRA's random matrices with it; without them a reader has to draw the same ones.
    pub save_projection: bool,
    /// Rank of each of AdaLoRA's updates when training begins.
    pub init_r: usize,
    /// Their mean rank when it ends.
    pub target_r: usize,
    /// AdaLoRA's steps before ranks are taken away.
    pub tinit: u64,
    /// Its steps after the last were.
    pub tfinal: u64,
    /// Steps from one time that ranks are taken away to the next; PEFT's `deltaT`.
    #[serde(alias = "deltaT")]
    pub delta_t: u64,
    /// Steps of AdaLoRA's schedule; when absent those of the run.
    pub total_step: Option<u64>,
    /// AdaLoRA's β₁, of the mean of sensitivities; PEFT's `beta1`.
    pub adalora_beta1: f64,
    /// AdaLoRA's β₂, of the mean of their deviations; PEFT's `beta2`.
    pub adalora_beta2: f64,
    /// Weight of AdaLoRA's penalty on the loss, that keeps its factors near orthonormal.
    pub orth_reg_weight: f64,
    /// An adapter to start from.
    pub init_adapter: Option<PathBuf>,
    /// Refuse an adapter (`init_adapter`, `fuse`) that was trained on another base, rather than warn of it.
    pub strict: bool,
    /// Passes over the data; not together with `steps`.
    pub epochs: Option<f64>,
    /// Optimiser steps; not together with `epochs`.
    pub steps: Option<u64>,
    /// Sequences of one optimiser step.
    pub batch_size: usize,
    /// Micro-batches that a step's batch is split into: less memory, the same result.
    pub grad_accum: usize,
    /// Keep nothing of the inside of layers for the backward pass, which computes them once more: less memory for the
    /// activations of long sequences, for the time of a second forward pass, and the same result.
    #[serde(alias = "gradient-checkpointing")]
    pub checkpoint: bool,
    /// Peak learning rate.
    pub lr: f64,
    /// AdamW's decoupled weight decay λ.
    pub weight_decay: f64,
    /// Spare vectors (biases, norms) from weight decay.
    pub no_decay_vectors: bool,
    /// LoRA+: how many times the learning rate is that of B (and of all vectors), by PEFT's name; none: it is the same.
    pub loraplus_lr_ratio: Option<f64>,
    /// LoRA+: the learning rate of adapted embeddings, by PEFT's name.
    pub loraplus_lr_embedding: f64,
    /// AdamW's β₁.
    pub beta1: f64,
    /// AdamW's β₂.
    pub beta2: f64,
    /// AdamW's ε.
    pub eps: f64,
    /// Course of the learning rate.
    pub schedule: Schedule,
    /// Steps over which the learning rate rises from 0.
    pub warmup: u64,
    /// Label smoothing ε.
    pub label_smoothing: f64,
    /// Tokens at which a sequence is cut.
    pub max_length: usize,
    /// Largest norm of the gradient; 0 is no limit.
    pub clip: f64,
    /// Take the data in the order of the file.
    pub no_shuffle: bool,
    /// Dropout of the base itself; the model's configuration decides when absent.
    pub base_dropout: Option<f64>,
    /// Seed of initialisation, order and dropout.
    pub seed: u64,
    /// `cpu`, `cuda`, `cuda:N`, or `auto`: CUDA when there is a device; see [`Place`](crate::Place). A run may be continued
    /// on another device.
    pub device: String,
    /// The type of the base's weights and of activations: `f32`, `bf16`, `f16`, or `auto`: that of the run that is
    /// continued, else bf16 on CUDA and f32 on the CPU, where bf16 is the type of frozen matrices and of their products
    /// alone.
    pub dtype: String,
    /// Steps between evaluations on `valid`, with one at the end; 0 is at the end of every epoch.
    pub eval_every: u64,
    /// Steps between checkpoints, with one at the end; 0 is none.
    pub save_every: u64,
    /// Checkpoints to keep, the newest; 0 keeps all.
    pub keep: usize,
    /// File that gets one JSON object per step.
    pub log: Option<PathBuf>,
}

/// PEFT's default.
const LORAPLUS_LR_EMBEDDING: f64 = 1e-6;

impl Default for TrainConfig {
    fn default() -> Self {
        let options = peft::Options::default();
        TrainConfig {
            model: PathBuf::new(),
            data: PathBuf::new(),
            out: PathBuf::new(),
            valid: None,
            hold_out: 0.0,
            format: None,
            task: None,
            method: "lora".into(),
            rank: options.rank,
            alpha: options.alpha,
            dropout: options.dropout,
            rslora: options.rslora,
            targets: options.targets,
            exclude_modules: options.exclude_modules,
            layers_to_transform: options.layers_to_transform,
            layers_pattern: options.layers_pattern,
            rank_pattern: options.rank_pattern,
            alpha_pattern: options.alpha_pattern,
            modules_to_save: options.modules_to_save,
            bias: options.bias.word().into(),
            use_dora: options.use_dora,
            init_lora_weights: options.init_lora_weights,
            fan_in_fan_out: options.fan_in_fan_out,
            feedforward_modules: options.feedforward_modules,
            bottleneck: options.bottleneck,
            non_linearity: None,
            train_norms: options.train_norms,
            layers: options.layers.to_string(),
            drop_layers: None,
            prefix: options.prefix,
            infix: options.infix,
            count_prefix: options.count_prefix,
            classify_prefix: options.classify_prefix,
            reparam: options.reparam,
            fuse: Vec::new(),
            decompose_both: options.decompose_both,
            decompose_factor: options.decompose_factor,
            d_initial: options.d_initial,
            projection_prng_key: options.projection_prng_key,
            save_projection: options.save_projection,
            init_r: options.adalora.init_r,
            target_r: options.adalora.target_r,
            tinit: options.adalora.tinit,
            tfinal: options.adalora.tfinal,
            delta_t: options.adalora.delta_t,
            total_step: options.adalora.total_step,
            adalora_beta1: options.adalora.beta1,
            adalora_beta2: options.adalora.beta2,
            orth_reg_weight: options.adalora.orth_reg_weight,
            init_adapter: None,
            strict: false,
            epochs: None,
            steps: None,
            batch_size: 8,
            grad_accum: 1,
            checkpoint: false,
            lr: 2e-4,
            weight_decay: 0.01,
            no_decay_vectors: false,
            loraplus_lr_ratio: None,
            loraplus_lr_embedding: LORAPLUS_LR_EMBEDDING,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            schedule: Schedule::Linear,
            warmup: 0,
            label_smoothing: 0.0,
            max_length: 512,
            clip: 0.0,
            no_shuffle: false,
            base_dropout: None,
            seed: 0,
            device: "cpu".into(),
            dtype: "auto".into(),
            eval_every: 0,
            save_every: 0,
            keep: 0,
            log: None,
        }
    }
}

impl TrainConfig {
    /// The method's row in the table.
    ///
    /// # Errors
    /// An unknown method.
    pub fn row(&self) -> Result<&'static peft::MethodRow> {
        Ok(peft::find(&self.method)?)
    }

    /// The task's row in the table, where there is a task.
    ///
    /// # Errors
    /// An unknown task.
    pub fn task_row(&self) -> Result<Option<&'static data::TaskRow>> {
        Ok(self.task.as_deref().map(data::task).transpose()?)
    }

    /// Steps of the whole run, for data of `per_epoch` steps: `steps`, or `epochs` of it (3 when neither is given).
    pub fn total_steps(&self, per_epoch: u64) -> u64 {
        match self.steps {
            Some(n) => n,
            None => ((self.epochs.unwrap_or(3.0) * per_epoch as f64).ceil() as u64).max(1),
        }
    }
}
