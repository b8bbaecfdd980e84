//! `lora eval`.

use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::Args;
use lora_core::peft::Adapted;
use lora_model::Model;
use lora_train::{
    Encoder, Evaluation, TextJoiner,
    data::{self, Dataset, Format, TaskKind, TaskRow},
    evaluate, load_data,
    metrics::Scores,
    task,
};

use crate::{
    base::{BaseArgs, Loaded},
    completions::CompletionArgs,
    train::{formats, tasks},
    ui,
};

#[derive(Args)]
#[command(allow_negative_numbers = true)]
#[command(mut_arg("model", |arg| arg.required(false).required_unless_present("score")))]
#[command(
    after_help = "--json prints an object: loss (the mean per target token or label in nats, or squared error), \
                        perplexity where tokens are predicted, targets (how many), prompts (of e2e), and each metric by its \
                        name: accuracy, f1, matthews, pearson, spearman, meteor_exact_stem and rouge_l as fractions of 1, \
                        bleu of 100, nist and cider in their own units."
)]
pub(crate) struct EvalArgs {
    #[command(flatten)]
    base: Option<BaseArgs>,
    /// Data to evaluate on
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    pub(crate) data: PathBuf,
    /// What to judge by: the task that an encoder has learned; or e2e, for which a model that continues text completes each
    /// prompt, and all completions in the data of equal prompts on neighbouring lines are references
    #[arg(long, value_parser = tasks(), help_heading = "Data")]
    task: Option<String>,
    /// Layout of the data [default: jsonl by its extension, otherwise e2e, and tsv with the task of an encoder]
    #[arg(long, value_parser = formats(&Format::ALL), help_heading = "Data")]
    format: Option<String>,
    /// Tokens at which a sequence is cut
    #[arg(long, value_name = "TOKENS", default_value_t = 512, help_heading = "Data")]
    pub(crate) max_length: usize,
    /// Sequences, or prompts, computed at a time; the result does not depend on it beyond rounding
    #[arg(long, value_name = "N", default_value_t = 8, help_heading = "Data")]
    pub(crate) batch_size: usize,
    #[command(flatten)]
    completions: CompletionArgs,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

impl EvalArgs {
    pub(crate) fn format(&self) -> anyhow::Result<Option<Format>> {
        Ok(self.format.as_deref().map(str::parse).transpose()?)
    }

    /// Refuses what makes no sense whatever the model is; gives the task.
    pub(crate) fn check(&self) -> anyhow::Result<Option<&'static TaskRow>> {
        ensure!(self.batch_size > 0, "batch-size = 0: must be at least 1");
        let task = self.task.as_deref().map(data::task).transpose()?;
        match task.is_some_and(|task| task.kind == TaskKind::Completions) {
            true => self.completions.check()?,
            false => self.completions.refuse()?,
        }
        Ok(task)
    }

    pub(crate) fn base(&self) -> anyhow::Result<&BaseArgs> {
        self.base.as_ref().context("--model is missing: name the folder of a model, or its id on the hub")
    }
}

pub(crate) fn run(args: EvalArgs) -> anyhow::Result<()> {
    let task = args.check()?;
    if let Some(task) = task.filter(|task| task.kind == TaskKind::Completions) {
        return args.completions.run(&args, task);
    }
    let evaluation = evaluation(&args, task)?;
    match args.json {
        true => ui::print_json(&evaluation),
        false => ui::print(text(&evaluation)),
    }
}

fn evaluation(args: &EvalArgs, task: Option<&'static TaskRow>) -> anyhow::Result<Evaluation> {
    let (base, format) = (args.base()?, args.format()?);
    match task {
        None => {
            let Loaded { dir, model, adapted } = base.load_causal(None)?;
            let encoder = Encoder::from_dir(&dir, &*model)?;
            let data = load_data(&args.data, format, &encoder, &*model, &adapted, args.max_length)?;
            loss(args, &*model, &adapted, &data)
        }
        Some(task) => {
            let corpus = task::read(&args.data, task, format)?;
            let (fitted, Loaded { dir, model, adapted }) = base.load_task(task)?;
            let joiner = TextJoiner::from_dir(&dir, &*model)?;
            let data = fitted.encode(&corpus, &joiner, &*model, &adapted, args.max_length)?;
            loss(args, &*model, &adapted, &data)
        }
    }
}

/// The loss on the data, and the metrics of few logits.
pub(crate) fn loss(
    args: &EvalArgs,
    model: &dyn Model,
    adapted: &Adapted,
    data: &Dataset,
) -> anyhow::Result<Evaluation> {
    evaluate(model, adapted, data, args.batch_size).with_context(|| args.data.display().to_string())
}

pub(crate) fn text(evaluation: &Evaluation) -> String {
    let Evaluation { loss, perplexity, targets, scores } = evaluation;
    let perplexity = perplexity.map_or(String::new(), |p| format!("perplexity {p:.4}\n"));
    format!("loss {loss:.6}\n{perplexity}{}targets {targets}\n", lines(scores))
}

/// A line for each metric.
pub(crate) fn lines(scores: &Scores) -> String {
    scores.0.iter().map(|(metric, value)| format!("{} {value:.4}\n", metric.title())).collect()
}
