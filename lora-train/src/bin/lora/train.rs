//! `lora train`.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::{
    Args,
    builder::{PossibleValue, PossibleValuesParser},
};
use lora_train::{
    RUN_FILE, TrainConfig,
    data::{Format, TASKS},
    schedule::Schedule,
    train,
};
use serde::Serialize;

use crate::{method::MethodArgs, ui};

/// The fields but the last three are those of [`TrainConfig`]: what is given here lies over the configuration file.
#[derive(Args, Serialize)]
#[serde(rename_all = "kebab-case")]
#[command(allow_negative_numbers = true)]
#[command(after_help = "Every option but --config, --resume and --json is also a key of the TOML file of --config, \
                        for example: model = \"gpt2\", targets = [\"c_attn.q\", \"c_attn.v\"], lr = 2e-4. \
                        A switch that the file turns on is turned off by, for example, --no-shuffle=false.\n\n\
                        --json prints an object: trainable (scalars), steps, loss (of the last step), evaluation (the last \
                        one, with the keys of lora eval), seconds and tokens of the steps, peak_memory (bytes), out, \
                        interrupted.")]
pub(crate) struct TrainArgs {
    /// Folder of the base model, or its id on the Hugging Face hub
    #[arg(long, value_name = "DIR|HUB_ID", help_heading = "Input and output")]
    model: Option<PathBuf>,
    /// Training data
    #[arg(long, value_name = "FILE", help_heading = "Input and output")]
    data: Option<PathBuf>,
    /// Folder for the result: the adapter as PEFT reads it (with --method full a model), checkpoints below it
    #[arg(long, value_name = "DIR", help_heading = "Input and output")]
    out: Option<PathBuf>,
    /// Data to evaluate on
    #[arg(long, value_name = "FILE", help_heading = "Input and output")]
    valid: Option<PathBuf>,
    /// Share of the data to keep from training and evaluate on, in place of --valid [default: 0]
    #[arg(long, value_name = "SHARE", help_heading = "Input and output")]
    hold_out: Option<f64>,
    /// Layout of the data: context||reference lines, JSON lines of prompt and completion (or text), plain text, or, with
    /// --task, columns between tabs [default: jsonl by its extension, otherwise e2e, and tsv with --task]
    #[arg(long, value_parser = formats(&Format::ALL), help_heading = "Input and output")]
    format: Option<String>,
    /// What an encoder (BERT, RoBERTa, DeBERTa) learns from labelled examples: a task of GLUE, or labels or values of
    /// one's own. Models that continue text need none; with e2e each example has to be a prompt and a completion
    #[arg(long, value_parser = tasks(), help_heading = "Input and output")]
    task: Option<String>,
    /// An adapter to start from; method, rank, targets and the like are its own
    #[arg(long, value_name = "DIR", help_heading = "Input and output")]
    init_adapter: Option<PathBuf>,
    /// Refuse an adapter (of --init-adapter or --fuse) that was trained on another base, rather than warn of it
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          hide_possible_values = true, help_heading = "Input and output")]
    strict: Option<bool>,
    /// File that gets one JSON object per step and per evaluation
    #[arg(long, value_name = "FILE.jsonl", help_heading = "Input and output")]
    log: Option<PathBuf>,

    #[command(flatten)]
    #[serde(flatten)]
    method: MethodArgs,

    /// Passes over the data [default: 3]
    #[arg(long, value_name = "N", conflicts_with = "steps", help_heading = "Course")]
    epochs: Option<f64>,
    /// Optimiser steps, in place of --epochs
    #[arg(long, value_name = "N", help_heading = "Course")]
    steps: Option<u64>,
    /// Sequences of one optimiser step, however it is split [default: 8]
    #[arg(long, value_name = "N", help_heading = "Course")]
    batch_size: Option<usize>,
    /// Parts that a batch is computed in, one after the other: less memory, the same result [default: 1]
    #[arg(long, value_name = "N", help_heading = "Course")]
    grad_accum: Option<usize>,
    /// Keep nothing of the inside of layers for the way back, which computes them once more: less memory for long sequences,
    /// the time of a second forward pass, the same result
    #[arg(long, visible_alias = "gradient-checkpointing", value_name = "true|false", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", hide_possible_values = true, help_heading = "Course")]
    checkpoint: Option<bool>,
    /// Tokens at which a sequence is cut [default: 512]
    #[arg(long, value_name = "TOKENS", help_heading = "Course")]
    max_length: Option<usize>,
    /// Take the data in the order of the file
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          hide_possible_values = true, help_heading = "Course")]
    no_shuffle: Option<bool>,
    /// Seed of initialisation, order and dropout [default: 0]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64), help_heading = "Course")]
    seed: Option<u64>,

    /// Peak learning rate [default: 0.0002]
    #[arg(long, help_heading = "Optimiser (AdamW)")]
    lr: Option<f64>,
    /// Course of the learning rate [default: linear]
    #[arg(long, value_parser = schedules(), help_heading = "Optimiser (AdamW)")]
    schedule: Option<String>,
    /// Steps over which the learning rate rises from 0 [default: 0]
    #[arg(long, value_name = "STEPS", help_heading = "Optimiser (AdamW)")]
    warmup: Option<u64>,
    /// Decoupled weight decay [default: 0.01]
    #[arg(long, value_name = "LAMBDA", help_heading = "Optimiser (AdamW)")]
    weight_decay: Option<f64>,
    /// Spare biases and norms from weight decay
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          hide_possible_values = true, help_heading = "Optimiser (AdamW)")]
    no_decay_vectors: Option<bool>,
    /// LoRA+: the learning rate of B, and of biases and other vectors, as a multiple of --lr, which is that of A
    #[arg(long, value_name = "RATIO", help_heading = "Optimiser (AdamW)")]
    loraplus_lr_ratio: Option<f64>,
    /// LoRA+: the learning rate of both factors of adapted embeddings [default: 0.000001]
    #[arg(long, value_name = "LR", help_heading = "Optimiser (AdamW)")]
    loraplus_lr_embedding: Option<f64>,
    /// Decay of the mean of gradients [default: 0.9]
    #[arg(long, help_heading = "Optimiser (AdamW)")]
    beta1: Option<f64>,
    /// Decay of the mean of their squares [default: 0.999]
    #[arg(long, help_heading = "Optimiser (AdamW)")]
    beta2: Option<f64>,
    /// What keeps the division by their root from zero [default: 0.00000001]
    #[arg(long, help_heading = "Optimiser (AdamW)")]
    eps: Option<f64>,
    /// Largest norm of the gradient; 0 is no limit [default: 0]
    #[arg(long, value_name = "NORM", help_heading = "Optimiser (AdamW)")]
    clip: Option<f64>,
    /// Share of a target's probability that is spread over the vocabulary [default: 0]
    #[arg(long, value_name = "EPSILON", help_heading = "Optimiser (AdamW)")]
    label_smoothing: Option<f64>,

    /// Steps between evaluations, with one at the end; 0 is at the end of every epoch [default: 0]
    #[arg(long, value_name = "N", help_heading = "Evaluation and checkpoints")]
    eval_every: Option<u64>,
    /// Steps between checkpoints, with one at the end; 0 is none [default: 0]
    #[arg(long, value_name = "N", help_heading = "Evaluation and checkpoints")]
    save_every: Option<u64>,
    /// Checkpoints to keep, the newest; 0 keeps all [default: 0]
    #[arg(long, value_name = "N", help_heading = "Evaluation and checkpoints")]
    keep: Option<usize>,

    /// Where to compute: cpu, cuda, cuda:N, or auto, which is CUDA when there is a device; a run may go on elsewhere
    /// [default: cpu]
    #[arg(long, help_heading = "Machine")]
    device: Option<String>,
    /// Type of the base's weights and of activations: f32, bf16 (on the CPU for frozen matrices and their products), f16
    /// (CUDA), or auto, which is bf16 on CUDA and else f32, and with --resume the run's own [default: auto]
    #[arg(long, help_heading = "Machine")]
    dtype: Option<String>,

    /// A TOML file with any of these options; flags override it
    #[arg(long, value_name = "FILE.toml", help_heading = "Input and output")]
    #[serde(skip)]
    config: Option<PathBuf>,
    /// Continue the run in --out from its newest whole checkpoint
    #[arg(long, help_heading = "Evaluation and checkpoints")]
    #[serde(skip)]
    resume: bool,
    /// Print a summary as JSON
    #[arg(long, help_heading = "Input and output")]
    #[serde(skip)]
    json: bool,
}

pub(crate) fn run(args: TrainArgs) -> anyhow::Result<()> {
    let flags = toml::Table::try_from(&args).context("command line")?;
    let config = TrainConfig::from_toml(args.config.as_deref(), flags)?;
    for (flag, path, what) in [
        ("model", &config.model, "the folder of a model, or its id on the hub"),
        ("data", &config.data, "the file to train on"),
        ("out", &config.out, "a folder for the result"),
    ] {
        if path.as_os_str().is_empty() {
            bail!("--{flag} is missing: name {what}");
        }
    }
    let run_file = config.out.join(RUN_FILE).canonicalize();
    if let (false, Some(file), Ok(run_file)) = (args.resume, &args.config, run_file)
        && file.canonicalize().is_ok_and(|file| file == run_file)
    {
        bail!(
            "--config {} is where the run keeps its configuration: it would be overwritten; name another --out, or move it",
            file.display()
        );
    }
    let summary = train(&config, args.resume, &mut ui::Progress::new()?)?;
    ui::finish(&summary, if config.row()?.whole_model { "model" } else { "adapter" }, args.json)
}

pub(crate) fn formats(formats: &[Format]) -> PossibleValuesParser {
    PossibleValuesParser::new(formats.iter().map(|format| format.name()))
}

pub(crate) fn schedules() -> PossibleValuesParser {
    PossibleValuesParser::new(Schedule::ALL.map(Schedule::name))
}

pub(crate) fn tasks() -> PossibleValuesParser {
    PossibleValuesParser::new(TASKS.iter().map(|t| PossibleValue::new(t.name).help(t.about)))
}
