//! `lora bench-latency`.

use std::path::{Path, PathBuf};

use anyhow::{bail, ensure};
use clap::Args;
use indicatif::ProgressBar;
use lora_model::files;
use lora_train::latency::{LatencyConfig, LatencyReport, LatencyWatcher, Shape, latency};

use crate::{base::PlaceArgs, ui};

/// The defaults are those of [`LatencyConfig`].
#[derive(Args)]
#[command(allow_negative_numbers = true)]
#[command(
    after_help = "A pass gives the hidden states of all tokens and the logits of each sequence's last one. Every round \
                        runs each variant once, in changing order; ratios are medians of the rounds' own. Ctrl-C reports \
                        the rounds that are whole.\n\n\
                        --json prints what was asked for and, for each of shapes, its rows: scalars beyond the base, ms \
                        (milliseconds of a pass) and ratio (to the base), each as min, q1, median, q3 and max; paper_ratio is \
                        the LoRA paper's."
)]
pub(crate) struct BenchLatencyArgs {
    /// A published model by its name, with random weights: gpt2, gpt2-medium, roberta-base, ... (a wrong name lists all)
    #[arg(long, value_name = "NAME", conflicts_with = "model", help_heading = "Model")]
    arch: Option<String>,
    /// Folder of a model
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    model: Option<PathBuf>,

    /// Batches as sequences x tokens; behind @ about how many parameters adapters for it have
    #[arg(
        long,
        value_name = "BxS[@P],...",
        value_delimiter = ',',
        default_value = "32x512@0.5M,16x256@11M,1x128@11M",
        help_heading = "Measurement"
    )]
    shapes: Vec<Shape>,
    /// Rounds; one number, or one for each shape
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "10", help_heading = "Measurement")]
    rounds: Vec<usize>,
    /// Passes of each variant before the first round
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Measurement")]
    warmup: usize,
    /// Seed of weights and tokens
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64),
          help_heading = "Measurement")]
    seed: u64,

    /// LoRA: rank
    #[arg(long, value_name = "R", default_value_t = 4, help_heading = "Methods")]
    rank: usize,
    /// LoRA: modules to adapt [default: queries and values]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', help_heading = "Methods")]
    targets: Vec<String>,
    /// Adapters: width of the bottleneck [default: by the number of parameters in --shapes, else 3.1% of the base's, as 11M
    /// are of GPT-2 medium's]
    #[arg(long, value_name = "R", help_heading = "Methods")]
    bottleneck: Option<usize>,
    /// Prefix: virtual tokens; 0 leaves it out, as does a shape without positions for it
    #[arg(long, value_name = "N", default_value_t = 14, help_heading = "Methods")]
    prefix: usize,

    #[command(flatten)]
    place: PlaceArgs,

    /// File for the report, as its name ends: .md or .json
    #[arg(long, value_name = "FILE.md|FILE.json", help_heading = "Output")]
    out: Option<PathBuf>,
    /// Print the report as JSON
    #[arg(long, help_heading = "Output")]
    json: bool,
}

pub(crate) fn run(args: BenchLatencyArgs) -> anyhow::Result<()> {
    if args.arch.is_none() && args.model.is_none() {
        bail!("--arch is missing: name a published model, or give a model's folder as --model");
    }
    let out = args.out.as_deref().map(Out::new).transpose()?;
    let config = LatencyConfig {
        arch: args.arch,
        model: args.model,
        shapes: args.shapes,
        rounds: args.rounds,
        warmup: args.warmup,
        only: Vec::new(),
        rank: args.rank,
        targets: args.targets,
        bottleneck: args.bottleneck,
        prefix: args.prefix,
        seed: args.seed,
        device: args.place.device,
        dtype: args.place.dtype,
    };
    ui::catch_interrupt("reporting the rounds that are whole")?;
    let report = latency(&config, &mut Progress(ProgressBar::hidden()))?;
    // Shown first: a file that cannot be written loses nothing.
    match args.json {
        true => ui::print_json(&report)?,
        false if report.shapes.is_empty() => ui::say("interrupted before the first round was whole"),
        false => ui::print(report.markdown())?,
    }
    if let Some(out) = &out
        && !report.shapes.is_empty()
    {
        out.write(&report)?;
    }
    if report.interrupted { Err(ui::Interrupted.into()) } else { Ok(()) }
}

/// A file for the report.
struct Out<'a> {
    path: &'a Path,
    json: bool,
}

impl Out<'_> {
    /// Refuses, before anything is measured, what could not be written after it.
    fn new(path: &Path) -> anyhow::Result<Out<'_>> {
        let json = match path.extension().and_then(|e| e.to_str()) {
            Some("md") => false,
            Some("json") => true,
            _ => bail!("out = {}: a report is written to a file that ends in .md or .json", path.display()),
        };
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        ensure!(folder.is_dir(), "out = {}: there is no folder {}", path.display(), folder.display());
        ensure!(!path.is_dir(), "out = {}: is a folder", path.display());
        Ok(Out { path, json })
    }

    fn write(&self, report: &LatencyReport) -> anyhow::Result<()> {
        let text = if self.json { format!("{:#}\n", serde_json::to_value(report)?) } else { report.markdown() };
        Ok(files::write_bytes(self.path, text.as_bytes())?)
    }
}

/// A bar for each shape.
struct Progress(ProgressBar);

impl LatencyWatcher for Progress {
    fn shape(&mut self, shape: &Shape, passes: u64) {
        self.0 = ui::counter(passes, &format!("passes of {} × {} tokens", shape.batch, shape.seq));
    }

    fn pass(&mut self) {
        self.0.inc(1);
        if self.0.length() == Some(self.0.position()) {
            self.0.finish_and_clear();
        }
    }

    fn note(&mut self, message: &str) {
        ui::note(message);
    }

    fn stop(&mut self) -> bool {
        ui::interrupted()
    }
}
