//! LoRA training steps of GPT-2 small on real `context||reference` lines, alone or in turn with another stack.
//!
//! ```text
//! cargo run --release -p lora-bench --bin e2e -- --data train.txt --tokenizer DIR --rounds 5 \
//!     --peer "python torch_peft_e2e.py --data train.txt --tokenizer DIR"
//! ```
//! Each round runs the peer's command and then this program again as a process of its own, so that both are measured on
//! the machine as it is at that moment and neither's memory counts for the other. The peer prints one JSON object with
//! `tokens_per_s` and `peak_rss_mib` as its last line.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, Result};
use clap::Parser;
use lora_bench::{json_of, median, training};
use lora_kernels::Device;
use lora_model::{Gpt2, Model, config::Gpt2Config};
use serde_json::Value;

#[derive(Parser)]
struct Args {
    /// Lines `context||reference`
    #[arg(long)]
    data: PathBuf,
    /// Folder with GPT-2's tokenizer
    #[arg(long)]
    tokenizer: PathBuf,
    /// Folder of a GPT-2 model; random weights of the small one when absent (speed does not depend on them)
    #[arg(long)]
    model: Option<PathBuf>,
    /// Sequences of a batch
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Steps of a process; the first is not counted
    #[arg(long, default_value_t = 12)]
    steps: u64,
    /// Processes of each side
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// The other stack's command
    #[arg(long)]
    peer: Option<String>,
    /// Measure in this process and print one JSON object
    #[arg(long)]
    once: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if args.once {
        println!("{}", once(&args)?);
        return Ok(());
    }
    let own = std::env::current_exe()?;
    let (mut ours, mut peers) = (Side::default(), Side::default());
    for round in 1..=args.rounds {
        if let Some(peer) = &args.peer {
            peers.add(json_of(Command::new("sh").arg("-c").arg(peer))?)?;
        }
        let flags = std::env::args().skip(1);
        ours.add(json_of(Command::new(&own).args(flags).arg("--once"))?)?;
        eprintln!("round {round}: {}", ours.last_beside(&peers));
    }
    println!("{:<10} {:>12} {:>14}", "", "tokens/s", "peak MiB");
    println!("{:<10} {:>12.1} {:>14.0}", "this", median(&ours.tokens), median(&ours.memory));
    if args.peer.is_some() {
        println!("{:<10} {:>12.1} {:>14.0}", "peer", median(&peers.tokens), median(&peers.memory));
        // Ratios round by round, because the machine's speed drifts between rounds.
        let ratio = |a: &[f64], b: &[f64]| median(&a.iter().zip(b).map(|(a, b)| a / b).collect::<Vec<_>>());
        let (speed, memory) = (ratio(&ours.tokens, &peers.tokens), ratio(&ours.memory, &peers.memory));
        println!("{:<10} {speed:>11.2}× {memory:>13.2}×", "ratio");
    }
    Ok(())
}

#[derive(Default)]
struct Side {
    tokens: Vec<f64>,
    memory: Vec<f64>,
}

impl Side {
    fn add(&mut self, result: Value) -> Result<()> {
        let number = |key: &str| result[key].as_f64().with_context(|| format!("no number {key} in {result}"));
        self.tokens.push(number("tokens_per_s")?);
        self.memory.push(number("peak_rss_mib")?);
        Ok(())
    }

    fn last_beside(&self, peer: &Side) -> String {
        let ours = format!(
            "{:.1} tokens/s, {:.0} MiB",
            self.tokens[self.tokens.len() - 1],
            self.memory[self.memory.len() - 1]
        );
        match (peer.tokens.last(), peer.memory.last()) {
            (Some(t), Some(m)) => format!("{ours}; peer {t:.1} tokens/s, {m:.0} MiB"),
            _ => ours,
        }
    }
}

fn once(args: &Args) -> Result<Value> {
    let mut model: Box<dyn Model> = match &args.model {
        Some(dir) => lora_model::load(dir, &Device::Cpu)?,
        None => Box::new(Gpt2::init(Gpt2Config::small(), &PathBuf::from("."), 0, &Device::Cpu)?),
    };
    let data = training::lines(&args.data, &args.tokenizer, &*model)?;
    training::measure(&mut *model, &data, args.batch, args.steps)
}
