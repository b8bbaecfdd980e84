//! The report of the CPU against PyTorch, Transformers and PEFT.
//!
//! ```text
//! cargo build --release -p lora-train                                    # the command whose start is measured
//! cargo run --release -p lora-bench --bin cpu -- --peer PYTHON --data train.txt --tokenizer DIR \
//!     --markdown report.md --json report.json
//! ```
//! PYTHON is an interpreter with torch, transformers and peft; without one only this side is measured. `--rows` chooses
//! rows, `--tiny` checks the program in a moment.

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use lora_bench::cpu::{self, Bench, Config, Lines};
use lora_kernels::CountingHeap;

/// Counts what a step asks for.
#[global_allocator]
static HEAP: CountingHeap = CountingHeap;

#[derive(Parser)]
struct Args {
    /// Rows of the report; all when absent
    #[arg(long, value_delimiter = ',')]
    rows: Vec<String>,
    /// Print the names of all rows
    #[arg(long)]
    list: bool,
    /// Processes of each side
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Steps of each process, in place of each row's own number; the first is not counted
    #[arg(long, value_parser = clap::value_parser!(u16).range(2..))]
    steps: Option<u16>,
    /// Python with torch, transformers and peft
    #[arg(long, value_name = "PYTHON")]
    peer: Option<PathBuf>,
    /// Lines `context||reference` for the rows of E2E; random sequences of such lengths, on this side alone, when absent
    #[arg(long, requires = "tokenizer")]
    data: Option<PathBuf>,
    /// Folder with GPT-2's tokenizer
    #[arg(long, requires = "data")]
    tokenizer: Option<PathBuf>,
    /// Folder of a GPT-2 small; random weights when absent
    #[arg(long)]
    model: Option<PathBuf>,
    /// The `lora` command; beside this program when absent
    #[arg(long)]
    lora: Option<PathBuf>,
    /// Write the report as Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Write the report, and all that single rounds found out, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Run everything at toy sizes
    #[arg(long)]
    tiny: bool,
    /// Measure what this JSON describes in this process and print one JSON object
    #[arg(long, hide = true)]
    once: Option<String>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(description) = &args.once {
        println!("{}", cpu::once(description)?);
        return Ok(());
    }
    if args.list {
        println!("{}", cpu::names().join("\n"));
        return Ok(());
    }
    let config = Config {
        rows: args.rows,
        rounds: args.rounds.into(),
        steps: args.steps.map(usize::from),
        peer: args.peer,
        lines: args.data.zip(args.tokenizer).map(|(data, tokenizer)| Lines { data, tokenizer }),
        gpt2: args.model,
        lora: args.lora,
        tiny: args.tiny,
        own: std::env::current_exe()?,
    };
    // Written after every row: what was measured is not lost with what was not.
    let (json, markdown) = (args.json.as_deref(), args.markdown.as_deref());
    let report = Bench::run(config, &mut |report| report.write(json, markdown))?;
    print!("{}", report.table());
    println!("\n{}", report.summary());
    Ok(())
}
