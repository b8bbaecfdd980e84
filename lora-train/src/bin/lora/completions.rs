//! `lora eval` of a task of completions: texts are generated, or read, and judged by their references.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use lora_model::generate::GenerationConfig;
use lora_train::{
    Encoder, Evaluation,
    data::{self, Corpus, References, TaskRow},
    generation::{self, Continued, batches, completion, end_tokens},
    metrics::{Scores, text::Completions},
    task,
};
use serde::Serialize;

use crate::{
    base::Loaded,
    eval::{self, EvalArgs},
    generate::told,
    part::{PartFile, check_writable},
    ui,
};

/// What only `--task e2e` reads.
#[derive(Args)]
#[command(next_help_heading = "Completions (--task e2e)")]
pub(crate) struct CompletionArgs {
    /// Beam search with so many beams [default: 10]
    #[arg(long, value_name = "N", conflicts_with = "score")]
    num_beams: Option<usize>,
    /// Beams compare by log-probability over length to this power [default: 0.9]
    #[arg(long, value_name = "X", conflicts_with = "score")]
    length_penalty: Option<f64>,
    /// Let no run of N tokens occur twice in a text, however often in its prompt; 0 for no limit [default: 4]
    #[arg(long, value_name = "N", conflicts_with = "score")]
    no_repeat_ngram_size: Option<usize>,
    /// The most tokens after a prompt [default: 64]
    #[arg(long, value_name = "N", conflicts_with = "score")]
    max_new_tokens: Option<usize>,
    /// Write the generated texts to this file, one a line. Until all is done they are in FILE.part, where they stay after
    /// Ctrl-C or an error
    #[arg(long, value_name = "FILE", conflicts_with = "score")]
    predictions: Option<PathBuf>,
    /// Judge the texts in this file, one a line for each prompt, or JSON lines with a text; needs no model
    #[arg(long, value_name = "FILE", conflicts_with_all = ["model", "adapter"])]
    score: Option<PathBuf>,
}

/// What came out.
#[derive(Serialize)]
struct Judged {
    /// Not there, as the next and the targets, where the texts come from elsewhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    loss: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    perplexity: Option<f64>,
    #[serde(flatten)]
    scores: Scores,
    #[serde(skip_serializing_if = "Option::is_none")]
    targets: Option<usize>,
    prompts: usize,
}

impl CompletionArgs {
    /// Refuses what another task does not read.
    pub(crate) fn refuse(&self) -> anyhow::Result<()> {
        for (flag, given) in [
            ("num-beams", self.num_beams.is_some()),
            ("length-penalty", self.length_penalty.is_some()),
            ("no-repeat-ngram-size", self.no_repeat_ngram_size.is_some()),
            ("max-new-tokens", self.max_new_tokens.is_some()),
            ("predictions", self.predictions.is_some()),
            ("score", self.score.is_some()),
        ] {
            if given {
                bail!("{flag} = given: only --task e2e reads it; leave it out, or give that task");
            }
        }
        Ok(())
    }

    /// Refuses what no model can do.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        self.config(Vec::new()).check(u32::MAX as usize).map_err(|e| told(e, |_| None))
    }

    pub(crate) fn run(&self, args: &EvalArgs, task: &'static TaskRow) -> anyhow::Result<()> {
        if let Some(out) = &self.predictions {
            check_writable("predictions", out)?;
        }
        let corpus = task::read(&args.data, task, args.format()?)?;
        let prompts = data::references(&corpus);
        let (evaluation, texts) = match &self.score {
            Some(file) => (None, data::read_predictions(file, &prompts, &args.data)?),
            None => {
                let (evaluation, texts) = self.generate(args, task, &corpus, &prompts)?;
                (Some(evaluation), texts)
            }
        };
        let references: Vec<&[&str]> = prompts.iter().map(|p| &p.texts[..]).collect();
        let completions = Completions::new(&texts, &references);
        let scores = Scores::of(task.metrics, |metric| metric.of_texts(&completions));
        let prompts = prompts.len();
        if args.json {
            let evaluation = evaluation.as_ref();
            return ui::print_json(&Judged {
                loss: evaluation.map(|e| e.loss),
                perplexity: evaluation.and_then(|e| e.perplexity),
                targets: evaluation.map(|e| e.targets),
                scores,
                prompts,
            });
        }
        match evaluation {
            Some(e) => ui::print(format_args!("{}prompts {prompts}\n", eval::text(&Evaluation { scores, ..e }))),
            None => ui::print(format_args!("{}prompts {prompts}\n", eval::lines(&scores))),
        }
    }

    /// The loss on all completions, and a text for each prompt.
    fn generate(
        &self,
        args: &EvalArgs,
        task: &TaskRow,
        corpus: &Corpus,
        prompts: &[References],
    ) -> anyhow::Result<(Evaluation, Vec<String>)> {
        let base = args.base()?;
        let Loaded { dir, model, adapted } = base.load_causal(Some(task))?;
        let encoder = Encoder::from_dir(&dir, &*model)?;
        let config = self.config(end_tokens(&dir, &encoder)?);
        config.check(model.limits().vocab_size).map_err(|e| told(e, |_| None))?;
        let tokens = generation::prompts(prompts, &args.data, &encoder, &*model, &adapted, &config)?;

        let data = task::encode_completions(corpus, &encoder, &*model, &adapted, args.max_length)?;
        let evaluation = eval::loss(args, &*model, &adapted, &data)?;

        ui::catch_interrupt("stopping after this batch")?;
        let mut out = self.predictions.as_deref().map(PartFile::create).transpose()?;
        let mut texts = Vec::with_capacity(tokens.len());
        let mut all = || -> anyhow::Result<()> {
            let bar = ui::counter(tokens.len() as u64, "prompts");
            let mut generated = batches(&*model, Continued::Alike(&adapted), &tokens, &config, args.batch_size);
            for batch in tokens.chunks(args.batch_size) {
                if ui::interrupted() {
                    return Err(ui::Interrupted.into());
                }
                let generated = generated.next().transpose().with_context(|| base.to_string())?.unwrap_or_default();
                let from = texts.len();
                for (before, generated) in batch.iter().zip(&generated) {
                    texts.push(completion(encoder.tokenizer(), before, generated, &config.eos_token_id)?);
                }
                if let Some(out) = &mut out {
                    out.write(&texts[from..].iter().map(|t| format!("{t}\n")).collect::<String>(), batch.len())?;
                }
                bar.inc(batch.len() as u64);
            }
            bar.finish_and_clear();
            Ok(())
        };
        match (all(), out) {
            (Ok(()), Some(out)) => out.finish()?,
            (Err(e), Some(out)) => {
                out.give_up();
                return Err(e);
            }
            (done, None) => done?,
        }
        Ok((evaluation, texts))
    }

    /// As the LoRA paper decodes, unless something else is asked for.
    fn config(&self, eos_token_id: Vec<u32>) -> GenerationConfig {
        GenerationConfig {
            num_beams: self.num_beams.unwrap_or(10),
            length_penalty: self.length_penalty.unwrap_or(0.9),
            no_repeat_ngram_size: self.no_repeat_ngram_size.unwrap_or(4),
            repeat_prompt_ngrams: true,
            max_new_tokens: self.max_new_tokens.unwrap_or(64),
            eos_token_id,
            ..GenerationConfig::default()
        }
    }
}
