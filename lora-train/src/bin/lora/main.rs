//! The `lora` command: fine-tuning of transformers from a terminal. `lora --help` is its manual.

mod analyze;
mod base;
mod bench_latency;
mod compare;
mod completions;
mod convert;
mod demo;
mod eval;
mod extract;
mod generate;
mod info;
mod merge;
mod method;
mod new_folder;
mod part;
mod plan;
mod pretrain;
mod prompts;
mod train;
mod ui;

use std::{ffi::OsString, process::ExitCode};

use anyhow::Context;
use clap::{ArgAction, Args, Parser, Subcommand};

/// Fine-tunes transformers with low-rank adapters (LoRA).
///
/// A model is a folder as Hugging Face writes it (config.json, safetensors, tokenizer); an adapter is a folder as PEFT
/// writes it. Results go to standard output, all else to standard error. The exit code is 0 only on success; 3 when
/// training diverged or what is evaluated holds no numbers; 130 after Ctrl-C.
#[derive(Parser)]
#[command(name = "lora", version, max_term_width = 110, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    global: Global,
}

#[derive(Args)]
struct Global {
    /// Threads to compute on [default: all cores]; results do not depend on it
    #[arg(long, global = true, value_name = "N", help_heading = "Global", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Say more; twice for debugging
    #[arg(short, long, global = true, action = ArgAction::Count, help_heading = "Global")]
    verbose: u8,
    /// Say nothing but errors and results, whatever RUST_LOG asks for
    #[arg(short, long, global = true, conflicts_with = "verbose", help_heading = "Global")]
    quiet: bool,
    /// Show no progress: say nothing but notes, warnings, errors and results
    #[arg(long, global = true, help_heading = "Global")]
    no_progress: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Show the whole story, from nothing to an adapted model, on data that the program makes itself
    Demo(demo::DemoArgs),
    /// Make a small model from text: learn a vocabulary and train all weights
    Pretrain(pretrain::PretrainArgs),
    /// Fine-tune a model on a data file
    Train(Box<train::TrainArgs>),
    /// Measure loss and perplexity of a model on a data file, or what else a task is judged by
    Eval(Box<eval::EvalArgs>),
    /// Train several methods with several seeds on one task, and make the table of their results
    Compare(compare::CompareArgs),
    /// Continue a prompt, or the prompts of a data file
    Generate(generate::GenerateArgs),
    /// Merge an adapter into its base, or several adapters into one
    Merge(merge::MergeArgs),
    /// Take an adapter out of a model that was fine-tuned whole
    Extract(extract::ExtractArgs),
    /// Measure what an adapter has learnt: singular values, amplification, subspaces
    Analyze(analyze::AnalyzeArgs),
    /// Tell what fine-tuning a model takes, from its configuration alone: parameters, checkpoints, training memory
    Plan(Box<plan::PlanArgs>),
    /// Measure a forward pass of the base, of merged and unmerged LoRA, of adapters and of a prefix: the paper's table 1
    BenchLatency(bench_latency::BenchLatencyArgs),
    /// Convert models and adapters from the formats of other programs, and adapters to them
    Convert(convert::ConvertArgs),
    /// Tell what a model, an adapter, a run, a checkpoint or a safetensors file is, or which devices there are
    Info(info::InfoArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse_from(std::env::args_os().map(spelt));
    ui::init(&cli.global);
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => ui::report(&e),
    }
}

/// A flag as it is spelt here, where scripts for PEFT have `--lora_alpha`.
fn spelt(arg: OsString) -> OsString {
    let Some(flag) = arg.to_str().filter(|text| text.starts_with("--")) else { return arg };
    let (name, value) = flag.split_at(flag.find('=').unwrap_or(flag.len()));
    match name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)) {
        true => (name.replace('_', "-") + value).into(),
        false => arg,
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    // 0 is as many as RAYON_NUM_THREADS says, or as there are cores.
    let threads = cli.global.threads.map_or(0, Into::into);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    pool.context("could not start the threads; fewer may do: --threads 1, or RAYON_NUM_THREADS")?;
    match cli.command {
        Command::Demo(args) => demo::run(args),
        Command::Pretrain(args) => pretrain::run(args),
        Command::Train(args) => train::run(*args),
        Command::Eval(args) => eval::run(*args),
        Command::Compare(args) => compare::run(args, &cli.global),
        Command::Generate(args) => generate::run(args),
        Command::Merge(args) => merge::run(args),
        Command::Extract(args) => extract::run(args),
        Command::Analyze(args) => analyze::run(args),
        Command::Plan(args) => plan::run(*args),
        Command::BenchLatency(args) => bench_latency::run(args),
        Command::Convert(args) => convert::run(args),
        Command::Info(args) => info::run(args),
    }
}
