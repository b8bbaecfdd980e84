//! `lora pretrain`.

use std::path::PathBuf;

use clap::Args;
use lora_train::{PretrainConfig, pretrain};

use crate::{base::PlaceArgs, train::schedules, ui};

#[derive(Args)]
#[command(allow_negative_numbers = true)]
pub(crate) struct PretrainArgs {
    /// Texts to learn from: one document each; or JSON lines as for training
    #[arg(long, value_name = "FILE", num_args = 1.., required = true, help_heading = "Input and output")]
    text: Vec<PathBuf>,
    /// Folder for the model
    #[arg(long, value_name = "DIR", help_heading = "Input and output")]
    out: PathBuf,
    /// A text to evaluate on
    #[arg(long, value_name = "FILE", help_heading = "Input and output")]
    valid: Option<PathBuf>,
    /// File that gets one JSON object per step and per evaluation
    #[arg(long, value_name = "FILE.jsonl", help_heading = "Input and output")]
    log: Option<PathBuf>,
    /// Print a summary as JSON
    #[arg(long, help_heading = "Input and output")]
    json: bool,

    /// Tokens of the vocabulary at most
    #[arg(long, value_name = "N", default_value_t = 4096, help_heading = "Model (GPT-2)")]
    vocab: usize,
    /// Transformer blocks
    #[arg(long, value_name = "N", default_value_t = 6, help_heading = "Model (GPT-2)")]
    layers: usize,
    /// Width of the residual stream
    #[arg(long, value_name = "N", default_value_t = 256, help_heading = "Model (GPT-2)")]
    dim: usize,
    /// Attention heads
    #[arg(long, value_name = "N", default_value_t = 8, help_heading = "Model (GPT-2)")]
    heads: usize,
    /// Positions, and tokens of a training sequence
    #[arg(long, value_name = "N", default_value_t = 256, help_heading = "Model (GPT-2)")]
    context: usize,
    /// Dropout everywhere
    #[arg(long, value_name = "P", default_value_t = 0.0, help_heading = "Model (GPT-2)")]
    dropout: f64,

    /// Passes over the text [default: 1]
    #[arg(long, value_name = "N", conflicts_with = "steps", help_heading = "Course")]
    epochs: Option<f64>,
    /// Optimiser steps, in place of --epochs
    #[arg(long, value_name = "N", help_heading = "Course")]
    steps: Option<u64>,
    /// Sequences of one optimiser step, however it is split
    #[arg(long, value_name = "N", default_value_t = 16, help_heading = "Course")]
    batch_size: usize,
    /// Parts that a batch is computed in, one after the other: less memory, the same result
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Course")]
    grad_accum: usize,
    /// Seed of initialisation, order and dropout
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Course")]
    seed: u64,

    /// Peak learning rate
    #[arg(long, default_value_t = 1e-3, help_heading = "Optimiser (AdamW)")]
    lr: f64,
    /// Course of the learning rate
    #[arg(long, value_parser = schedules(), default_value = "cosine", help_heading = "Optimiser (AdamW)")]
    schedule: String,
    /// Steps over which the learning rate rises from 0
    #[arg(long, value_name = "STEPS", default_value_t = 100, help_heading = "Optimiser (AdamW)")]
    warmup: u64,
    /// Decoupled weight decay, of matrices only
    #[arg(long, value_name = "LAMBDA", default_value_t = 0.1, help_heading = "Optimiser (AdamW)")]
    weight_decay: f64,
    /// Largest norm of the gradient; 0 is no limit
    #[arg(long, value_name = "NORM", default_value_t = 1.0, help_heading = "Optimiser (AdamW)")]
    clip: f64,

    /// Steps between evaluations, with one at the end; 0 is at the end of every epoch
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Evaluation and checkpoints")]
    eval_every: u64,
    /// Steps between checkpoints, with one at the end; 0 is none
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Evaluation and checkpoints")]
    save_every: u64,
    /// Checkpoints to keep, the newest; 0 keeps all
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Evaluation and checkpoints")]
    keep: usize,
    /// Continue the run in --out from its newest whole checkpoint
    #[arg(long, help_heading = "Evaluation and checkpoints")]
    resume: bool,
    #[command(flatten)]
    place: PlaceArgs,
}

pub(crate) fn run(args: PretrainArgs) -> anyhow::Result<()> {
    let config = PretrainConfig {
        text: args.text,
        out: args.out,
        valid: args.valid,
        vocab: args.vocab,
        layers: args.layers,
        dim: args.dim,
        heads: args.heads,
        context: args.context,
        dropout: args.dropout,
        epochs: args.epochs,
        steps: args.steps,
        batch_size: args.batch_size,
        grad_accum: args.grad_accum,
        lr: args.lr,
        warmup: args.warmup,
        schedule: args.schedule.parse()?,
        weight_decay: args.weight_decay,
        clip: args.clip,
        eval_every: args.eval_every,
        save_every: args.save_every,
        keep: args.keep,
        seed: args.seed,
        log: args.log,
        device: args.place.device,
        dtype: args.place.dtype,
    };
    let summary = pretrain(&config, args.resume, &mut ui::Progress::new()?)?;
    ui::finish(&summary, "model", args.json)
}
