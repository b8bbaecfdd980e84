//! `lora plan`.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::{Args, builder::PossibleValuesParser};
use indicatif::HumanCount;
use lora_kernels::DType;
use lora_train::{
    TrainConfig,
    plan::{Costs, Memory, Plan, PlanConfig, plan},
    tables::{bytes, columns},
};

use crate::{method::MethodArgs, ui};

/// The defaults of numbers are those of [`PlanConfig`].
#[derive(Args)]
#[command(allow_negative_numbers = true)]
#[command(after_help = "--json prints what was asked for, parameters, and for full fine-tuning (full) and the method \
                        (adapted): trainable (scalars), trainable_share (of 1), and in bytes checkpoint_bytes, tasks_bytes, \
                        both with _16 for 16 bits, and memory (weights, gradients, optimiser, activations, total); paper \
                        has the LoRA paper's own figures, where there are some. Tables count in powers of ten.")]
pub(crate) struct PlanArgs {
    /// A published model by its name: gpt2, gpt2-medium, gpt3-175b, roberta-base, llama-3-8b, ... (a wrong name lists all)
    #[arg(long, value_name = "NAME", conflicts_with = "model", help_heading = "Model")]
    arch: Option<String>,
    /// Folder of a model, of which config.json is read
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    model: Option<PathBuf>,

    #[command(flatten)]
    method: MethodArgs,

    /// Sequences computed at a time: what --batch-size / --grad-accum are in training
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Training")]
    batch_size: usize,
    /// Layers are computed once more on the way back, as with --checkpoint in training
    #[arg(long, help_heading = "Training")]
    checkpoint: bool,
    /// Positions of a sequence [default: the model's, at most 2048]
    #[arg(long, value_name = "N", help_heading = "Training")]
    seq_len: Option<usize>,
    /// Type that is computed in
    #[arg(long, default_value = "bf16", value_parser = PossibleValuesParser::new(["bf16", "f16", "f32"]),
          help_heading = "Training")]
    dtype: String,
    /// Tasks to store checkpoints for
    #[arg(long, value_name = "N", default_value_t = 100, help_heading = "Training")]
    tasks: u64,

    /// Print the plan as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: PlanArgs) -> anyhow::Result<()> {
    if args.arch.is_none() && args.model.is_none() {
        bail!("--arch is missing: name a published model, or give a model's folder as --model");
    }
    let flags = toml::Table::try_from(&args.method).context("command line")?;
    let train = TrainConfig { checkpoint: args.checkpoint, ..TrainConfig::from_toml(None, flags)? };
    train.check()?;
    let config = PlanConfig {
        arch: args.arch,
        model: args.model,
        train,
        batch_size: args.batch_size,
        seq_len: args.seq_len,
        dtype: match args.dtype.as_str() {
            "f16" => DType::F16,
            "f32" => DType::F32,
            _ => DType::Bf16,
        },
        tasks: args.tasks,
    };
    let plan = plan(&config)?;
    match args.json {
        true => ui::print_json(&plan),
        false => ui::print(text(&plan, &args.dtype)),
    }
}

fn text(plan: &Plan, dtype: &str) -> String {
    let both = plan.method != "full";
    let sides: Vec<&Costs> = if both { vec![&plan.full, &plan.adapted] } else { vec![&plan.full] };
    // The paper's checkpoints and tasks are those of its own setting; no method changes its base.
    let paper = plan.paper.as_ref();
    let mut head = vec![String::new(), "full".to_owned()];
    if both {
        head.push(plan.method.clone());
    }
    if paper.is_some() {
        head.extend(["paper: full".into(), "paper: LoRA".into()]);
    }
    let mut rows = vec![head];
    let mut row = |name: &str, of: &dyn Fn(&Costs) -> String, theirs: Option<[u64; 2]>| {
        let sides = sides.iter().map(|c| of(c));
        rows.push([name.to_owned()].into_iter().chain(sides).chain(theirs.into_iter().flatten().map(bytes)).collect());
    };
    let memory = |of: fn(&Memory) -> u64| move |c: &Costs| bytes(of(&c.memory));
    row("trainable parameters", &|c| HumanCount(c.trainable).to_string(), None);
    row("share of the model", &|c| format!("{:.4}%", 100.0 * c.trainable_share), None);
    row("training memory", &memory(|m| m.total), paper.map(|p| p.memory));
    row("  weights", &memory(|m| m.weights), None);
    row("  gradients", &memory(|m| m.gradients), None);
    row("  optimiser", &memory(|m| m.optimiser), None);
    row("  activations", &memory(|m| m.activations), None);
    row("checkpoint in 16 bits", &|c| bytes(c.checkpoint_bytes_16), paper.map(|p| p.checkpoint));
    row("checkpoint as written here", &|c| bytes(c.checkpoint_bytes), None);
    let stored = paper.filter(|p| p.tasks == plan.tasks).map(|p| p.tasks_bytes);
    let tasks = if plan.tasks == 1 { "1 task".into() } else { format!("{} tasks", HumanCount(plan.tasks)) };
    row(&format!("{tasks} in 16 bits"), &|c| bytes(c.tasks_bytes_16), stored);
    row(&format!("{tasks} as written here"), &|c| bytes(c.tasks_bytes), None);

    format!(
        "{}: architecture {}, {} layers, {} parameters\n\n{}\n{}",
        plan.model,
        plan.architecture,
        plan.layers,
        HumanCount(plan.parameters),
        columns(&rows),
        assumptions(plan, dtype)
    )
}

/// What the figures stand on.
fn assumptions(plan: &Plan, dtype: &str) -> String {
    let cast = if plan.dtype_bytes < 4 { format!(", cast to {dtype} for computing") } else { String::new() };
    let plural = if plan.batch_size == 1 { "" } else { "s" };
    let place = match plan.dtype_bytes {
        4 => "",
        _ => "\n16 bits are those of a CUDA device: on the CPU activations and vectors stay f32 (see --dtype f32).",
    };
    let mut text = format!(
        "Weights: frozen ones in {dtype}; what trains in f32{cast}; full fine-tuning also keeps\n\
         the base that it began from, in f32.\n\
         Gradients and AdamW's two moments: f32, of what trains alone.\n\
         Activations: {} sequence{plural} of {} positions at a time, what this trainer's pass holds at its peak:\n\
         inputs that a gradient needs, none below the lowest trainable parameter, logits for a chunk of rows, of\n\
         attention over relative positions the scores of one thread.{place}\n\
         Files: safetensors in f32, LoRA in PEFT's layout, with zeros beside a part of a fused projection.\n",
        plan.batch_size, plan.seq_len
    );
    if plan.classifier {
        text += "Head: an encoder is planned as a classifier, whose head trains with every method and counts here; the paper's\n\
                 numbers of parameters for RoBERTa and DeBERTa leave it out.\n";
    }
    if let Some(paper) = &plan.paper {
        let each = |bytes: u64| format!("{:.1}", bytes as f64 / plan.parameters as f64);
        text += &format!(
            "The paper's LoRA has {}. Its 1.2 TB are {} bytes a parameter and its 350 GB {}, the\n\
             weights in 16 bits; it does not say what it counts. Here it is {} bytes, because parameters that train,\n\
             gradients and moments are f32, and activations count on both sides.\n",
            paper.setting,
            each(paper.memory[0]),
            each(paper.memory[1]),
            each(plan.full.memory.total),
        );
    }
    text
}
