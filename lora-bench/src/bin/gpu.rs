//! The report of a CUDA device: how fast our kernels are against cuBLASLt, the device's own copies and another stack.
//!
//! ```text
//! cargo run --release -p lora-bench --features cuda --bin gpu -- --json report.json --markdown report.md
//! cargo run --release -p lora-bench --features cuda --bin gpu -- --only train --data train.txt --tokenizer DIR \
//!     --peer COMMAND
//! ```
//! COMMAND trains the same with another stack, and prints a JSON object with `tokens_per_s` and `step_s` as its last line; it
//! is none of this project's.
//! Without a device it says so in one line, and fails only with `--require`.

use std::{
    path::PathBuf,
    process::{Command, ExitCode},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use lora_bench::{
    gpu::{
        Bench, Group,
        model::{self, Once, Setup},
    },
    report::Report,
};
use lora_kernels::{Device, cuda::Gpu};

#[derive(Parser)]
struct Args {
    /// Parts of the report; all when absent
    #[arg(long, value_delimiter = ',')]
    only: Vec<Group>,
    /// Write the report as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the report as Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Number of the device
    #[arg(long, default_value_t = 0)]
    device: usize,
    /// Fail when there is no device, or a goal is missed or not measured
    #[arg(long)]
    require: bool,
    /// Timings of each figure
    #[arg(long, default_value_t = 50)]
    rounds: usize,
    /// Begin no row after so many seconds
    #[arg(long)]
    seconds: Option<u64>,
    /// Training data, lines `context||reference`; random sequences of such lengths when absent
    #[arg(long, requires = "tokenizer")]
    data: Option<PathBuf>,
    /// Folder with GPT-2's tokenizer
    #[arg(long, requires = "data")]
    tokenizer: Option<PathBuf>,
    /// Folder of the model that is trained; a GPT-2 medium with random weights is put there when there is none
    #[arg(long)]
    model: Option<PathBuf>,
    /// The command of another stack that trains the same model on the same data
    #[arg(long)]
    peer: Vec<String>,
    /// Runs of each peer
    #[arg(long, default_value_t = 2)]
    peer_rounds: usize,
    /// Run everything once at toy sizes on an emulated device, and time nothing
    #[cfg(feature = "emulator")]
    #[arg(long)]
    emulated: bool,
    /// Measure in this process and print one JSON object
    #[arg(long, hide = true, requires = "model")]
    once: Option<Once>,
}

impl Args {
    fn open(&self) -> lora_kernels::Result<Arc<Gpu>> {
        #[cfg(feature = "emulator")]
        if self.emulated {
            return Gpu::emulated(0);
        }
        Gpu::open(self.device)
    }

    fn toy(&self) -> bool {
        #[cfg(feature = "emulator")]
        return self.emulated;
        #[cfg(not(feature = "emulator"))]
        false
    }
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let gpu = match args.open() {
        Ok(gpu) => gpu,
        Err(why) => {
            println!("skipped: no CUDA device ({why})");
            return Ok(if args.require { ExitCode::FAILURE } else { ExitCode::SUCCESS });
        }
    };
    let data = args.data.clone().zip(args.tokenizer.clone());
    if let (Some(what), Some(model)) = (args.once, args.model.clone()) {
        let setup = Setup { device: Device::Cuda(gpu), toy: args.toy(), model, data };
        println!("{}", setup.once(what)?);
        return Ok(ExitCode::SUCCESS);
    }

    let groups = if args.only.is_empty() { Group::value_variants().to_vec() } else { args.only.clone() };
    let deadline = args.seconds.map(|s| Instant::now() + Duration::from_secs(s));
    let mut report = Report::default();
    {
        let bench = Bench::new(gpu, args.toy(), args.rounds, deadline)?;
        bench.facts(&mut report);
        bench.run(&groups, &mut report);
    }
    models(&args, &groups, &mut report)?;

    print!("{}", report.table());
    println!("\n{}", report.summary());
    report.write(args.json.as_deref(), args.markdown.as_deref())?;
    let all = report.rows.iter().filter(|r| r.goal.is_some()).count();
    let reached = report.reached_and_missed().0;
    Ok(if args.require && reached < all { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The rows that are measured in processes of their own.
fn models(args: &Args, groups: &[Group], report: &mut Report) -> Result<()> {
    if !groups.iter().any(|g| matches!(g, Group::Decode | Group::Train)) {
        return Ok(());
    }
    let temporary = tempfile::tempdir().context("could not make a temporary folder")?;
    let folder = args.model.clone().unwrap_or_else(|| temporary.path().join("model"));
    model::prepare(&folder, args.toy())?;
    let own = std::env::current_exe()?;
    let once = |what: &str| {
        let mut command = Command::new(&own);
        command.args(["--once", what, "--device", &args.device.to_string(), "--model"]).arg(&folder);
        if let (Some(data), Some(tokenizer)) = (&args.data, &args.tokenizer) {
            command.arg("--data").arg(data).arg("--tokenizer").arg(tokenizer);
        }
        if args.toy() {
            command.arg("--emulated");
        }
        command
    };
    if groups.contains(&Group::Decode) {
        report.rows.push(model::decode_row(args.toy(), || once("decode")));
    }
    if groups.contains(&Group::Train) {
        let peers: Vec<Option<&str>> = args.peer.iter().map(|p| Some(p.as_str())).collect();
        for peer in if peers.is_empty() { vec![None] } else { peers } {
            report.rows.push(model::train_row(args.toy(), || once("train"), peer, args.peer_rounds));
        }
    }
    Ok(())
}
