//! `lora eval`.

use std::path::PathBuf;

use anyhow::ensure;
use clap::Args;
use lora_train::{
    Encoder, Evaluation, TextJoiner,
    data::{self, Format},
    evaluate, load_data, task,
};

use crate::{
    base::{BaseArgs, Loaded},
    train::{formats, tasks},
    ui,
};

#[derive(Args)]
#[command(allow_negative_numbers = true)]
pub(crate) struct EvalArgs {
    #[command(flatten)]
    base: BaseArgs,
    /// Data to evaluate on
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    data: PathBuf,
    /// What to judge an encoder by: the task that it has learned
    #[arg(long, value_parser = tasks(), help_heading = "Data")]
    task: Option<String>,
    /// Layout of the data [default: jsonl by its extension, otherwise e2e, and tsv with --task]
    #[arg(long, value_parser = formats(), help_heading = "Data")]
    format: Option<String>,
    /// Tokens at which a sequence is cut
    #[arg(long, value_name = "TOKENS", default_value_t = 512, help_heading = "Data")]
    max_length: usize,
    /// Sequences computed at a time; the result does not depend on it beyond rounding
    #[arg(long, value_name = "N", default_value_t = 8, help_heading = "Data")]
    batch_size: usize,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: EvalArgs) -> anyhow::Result<()> {
    ensure!(args.batch_size > 0, "batch-size = 0: must be at least 1");
    let format = args.format.map(|f| f.parse::<Format>()).transpose()?;
    let task = args.task.as_deref().map(data::task).transpose()?;
    let evaluation = match task {
        None => {
            let Loaded { dir, model, adapted } = args.base.load_causal()?;
            let encoder = Encoder::from_dir(&dir, &*model)?;
            let data = load_data(&args.data, format, &encoder, (&*model, &adapted), args.max_length)?;
            evaluate(&*model, &adapted, &data, args.batch_size)?
        }
        Some(task) => {
            let corpus = task::read(&args.data, task, format)?;
            let (fitted, Loaded { dir, model, adapted }) = args.base.load_task(task)?;
            let joiner = TextJoiner::from_dir(&dir, &*model)?;
            let data = fitted.encode(&corpus, &joiner, (&*model, &adapted), args.max_length)?;
            evaluate(&*model, &adapted, &data, args.batch_size)?
        }
    };
    let loss = evaluation.loss;
    ensure!(
        loss.is_finite(),
        "the loss on {} is {loss}: the model's weights or the adapter hold values that are no numbers; look at the run \
         that made them",
        args.data.display()
    );
    match args.json {
        true => ui::print_json(&evaluation),
        false => {
            let Evaluation { loss, perplexity, targets, scores } = &evaluation;
            let perplexity = perplexity.map_or(String::new(), |p| format!("perplexity {p:.4}\n"));
            let scores: String = scores.0.iter().map(|(metric, value)| format!("{metric} {value:.4}\n")).collect();
            ui::print(format_args!("loss {loss:.6}\n{perplexity}{scores}targets {targets}\n"))
        }
    }
}
