//! `lora generate`.

use std::{
    io::{self, IsTerminal},
    path::{Path, PathBuf},
};

use anyhow::{Context, anyhow, bail, ensure};
use clap::Args;
use lora_model::{
    Error, Model, Task,
    adapter::Adapters,
    generate::{Generated, GenerationConfig, check, generate, unasked},
    tokenizer::Tokenizer,
};
use lora_train::{
    Encoder,
    data::{Encode, Format},
    generation::{Continued, batches, end_tokens, text},
};
use serde::Serialize;

use crate::{
    base::{ADAPTERS, BaseArgs, Loaded},
    part::{PartFile, check_writable},
    prompts::{Prompt, Prompts, prompts},
    train::formats,
    ui,
};

#[derive(Args)]
#[command(allow_negative_numbers = true)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    base: BaseArgs,
    /// Several adapters in one batch: each JSON line of --data names its own under the key "adapter", or has none and is
    /// continued by the bare model; --prompt is continued by each. A name is that of the folder unless it is given
    #[arg(
        long,
        value_name = "[NAME=]DIR,...",
        value_delimiter = ',',
        value_parser = named,
        group = ADAPTERS,
        conflicts_with_all = ["adapter", "drop_layers"],
        help_heading = "Model"
    )]
    pub(crate) adapters: Vec<(String, PathBuf)>,

    /// Text to continue, as it is
    #[arg(
        long,
        value_name = "TEXT",
        required_unless_present = "data",
        conflicts_with = "data",
        help_heading = "Prompts"
    )]
    pub(crate) prompt: Option<String>,
    /// End the prompt as training ends it before a completion: trimmed, then the end-of-text token
    #[arg(long, requires = "prompt", help_heading = "Prompts")]
    pub(crate) append_end_of_text: bool,
    /// The prompt is what a user says: write it as the model's chat template does, and generate the answer
    #[arg(long, requires = "prompt", conflicts_with_all = ["append_end_of_text", "data"], help_heading = "Prompts")]
    pub(crate) chat: bool,
    /// What the system says before the user
    #[arg(long, value_name = "TEXT", requires = "chat", help_heading = "Prompts")]
    pub(crate) system: Option<String>,
    /// File of prompts: contexts of e2e lines and prompts of JSON lines, ended as in training; messages of JSON lines, by
    /// the model's chat template, without a last one of the assistant; texts as they are. References and completions need
    /// not be there. Equal contexts on neighbouring e2e lines are continued once
    #[arg(long, value_name = "FILE", help_heading = "Prompts")]
    pub(crate) data: Option<PathBuf>,
    /// Layout of --data [default: jsonl by its extension, otherwise e2e]
    #[arg(long, value_parser = formats(&[Format::E2e, Format::Jsonl, Format::Text]), requires = "data",
          help_heading = "Prompts")]
    pub(crate) format: Option<String>,

    /// Write to this file instead of standard output. Until all is done the texts are in FILE.part, where they stay after
    /// Ctrl-C or an error
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    out: Option<PathBuf>,
    /// One JSON object per prompt: adapter (with --adapters), prompt, text, tokens, finished, score (of beams). Without it, files of prompts give
    /// one line of text for each, line breaks within as spaces [default: by the extension of --out]
    #[arg(long, help_heading = "Output")]
    json: bool,

    /// The most tokens after a prompt
    #[arg(long, value_name = "N", default_value_t = 64, help_heading = "Generation")]
    max_new_tokens: usize,
    /// Draw tokens rather than take the likeliest; implied by the next three
    #[arg(long, visible_alias = "do-sample", help_heading = "Generation")]
    sample: bool,
    /// Divide logits by this before drawing [default: 1]
    #[arg(long, value_name = "T", help_heading = "Generation")]
    temperature: Option<f64>,
    /// Draw from the K likeliest tokens only; 0 for all [default: 50]
    #[arg(long, value_name = "K", help_heading = "Generation")]
    top_k: Option<usize>,
    /// Draw from the likeliest tokens that make up this probability [default: 1]
    #[arg(long, value_name = "P", help_heading = "Generation")]
    top_p: Option<f64>,
    /// Make tokens that the text has already less likely: over 1
    #[arg(long, value_name = "X", default_value_t = 1.0, help_heading = "Generation")]
    repetition_penalty: f64,
    /// Let no run of N tokens occur twice; 0 for no limit
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Generation")]
    no_repeat_ngram_size: usize,
    /// Of that, let what is in the prompt occur once more in the text, as `lora eval --task e2e` does
    #[arg(long, requires = "no_repeat_ngram_size", help_heading = "Generation")]
    repeat_prompt_ngrams: bool,
    /// Beam search with so many beams
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Generation")]
    num_beams: usize,
    /// Beams compare by log-probability over length to this power
    #[arg(long, value_name = "X", default_value_t = 1.0, help_heading = "Generation")]
    length_penalty: f64,
    /// Stop a beam search as soon as it has as many finished texts as beams
    #[arg(long, help_heading = "Generation")]
    early_stopping: bool,
    /// Tokens that end a text, by id or as the vocabulary spells them; `none` for none [default: the end of text,
    /// eos_token_id of generation_config.json, or else of config.json, and in conversations the end of a turn]
    #[arg(long, value_name = "TOKEN,...", value_delimiter = ',', help_heading = "Generation")]
    eos: Option<Vec<String>>,
    /// Seed of the drawing; each prompt draws for itself, by its number
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Generation")]
    seed: u64,
    /// Prompts computed at a time
    #[arg(long, value_name = "N", default_value_t = 16, help_heading = "Generation")]
    batch_size: usize,
}

pub(crate) fn run(args: GenerateArgs) -> anyhow::Result<()> {
    ensure!(args.batch_size > 0, "batch-size = 0: must be at least 1");
    if let Some(out) = &args.out {
        check_writable("out", out)?;
    }
    let Loaded { dir, model, adapted } = args.base.load()?;
    if model.task() != Task::CausalLm {
        bail!("{} is for {}, and continues no text", args.base, model.task().name());
    }
    let adapters = adapters(&args, &*model)?;
    let encoder = Encoder::from_dir(&dir, &*model)?;
    let mut config = config(&args, &dir, &encoder)?;
    let unasked = unasked(&dir)?.join(", ");
    if !unasked.is_empty() {
        ui::note(format_args!(
            "generation_config.json in {} has {unasked}, which Transformers would do; here flags alone say how to generate",
            dir.display()
        ));
    }
    config.check(model.limits().vocab_size).map_err(|e| told(e, |_| None))?;
    let Prompts { prompts, tokens, ends } = prompts(&args, &encoder)?;
    for end in ends.into_iter().filter(|_| args.eos.is_none()) {
        if !config.eos_token_id.contains(&end) {
            config.eos_token_id.push(end);
        }
    }
    let names: Vec<Option<String>> = prompts.iter().map(|p| p.adapter.clone()).collect();
    let place = |i: usize| prompts.get(i).map(|p| p.place.clone());
    for (i, name) in names.iter().enumerate() {
        let Some(name) = name else { continue };
        adapters.get(name).with_context(|| place(i).unwrap_or_default())?;
    }
    check(&*model, &adapted, &tokens, &config).map_err(|e| told(e, place))?;
    let json = args.json || args.out.as_ref().is_some_and(|p| p.extension().is_some_and(|e| e == "jsonl"));

    let streamed =
        args.prompt.is_some() && args.adapters.is_empty() && !json && args.out.is_none() && io::stdout().is_terminal();
    if streamed {
        let mut stream = Stream::new(encoder.tokenizer(), &tokens[0])?;
        let mut on_token = |_, token| stream.push(token, &config.eos_token_id);
        let generated = generate(&*model, &adapted, &tokens, &config, Some(&mut on_token));
        generated.with_context(|| args.base.to_string())?;
        return stream.finish();
    }
    let mut out = args.out.as_deref().map(PartFile::create).transpose()?;
    if out.is_some() {
        ui::catch_interrupt("stopping after this batch")?;
    }
    let mut all = || -> anyhow::Result<()> {
        let bar = ui::counter(prompts.len() as u64, "prompts");
        let by = if args.adapters.is_empty() { Continued::Alike(&adapted) } else { Continued::Each(&adapters, &names) };
        let mut generated = batches(&*model, by, &tokens, &config, args.batch_size);
        for (batch, tokens) in prompts.chunks(args.batch_size).zip(tokens.chunks(args.batch_size)) {
            if ui::interrupted() {
                return Err(ui::Interrupted.into());
            }
            let mut lines = String::new();
            let generated = generated.next().transpose().with_context(|| args.base.to_string())?.unwrap_or_default();
            for ((prompt, tokens), generated) in batch.iter().zip(tokens).zip(generated) {
                let shown = Shown { json, alone: args.prompt.is_some(), adapter: !args.adapters.is_empty() };
                lines += &line((prompt, tokens), generated, encoder.tokenizer(), &config.eos_token_id, shown)?;
                lines.push('\n');
            }
            match &mut out {
                None => ui::print(lines)?,
                Some(out) => out.write(&lines, batch.len())?,
            }
            bar.inc(batch.len() as u64);
        }
        bar.finish_and_clear();
        Ok(())
    };
    match (all(), out) {
        (Ok(()), Some(out)) => out.finish(),
        (Err(e), Some(out)) => {
            out.give_up();
            Err(e)
        }
        (done, None) => done,
    }
}

/// An error in the words of the command line: options by their flags, prompts by their places.
pub(crate) fn told(e: Error, place: impl Fn(usize) -> Option<String>) -> anyhow::Error {
    match e {
        Error::Option { option: "do_sample", value, why } => anyhow!("sample = {value}: {why}"),
        Error::Option { option, value, why } => anyhow!("{} = {value}: {why}", option.replace('_', "-")),
        Error::Prompt { index, problem } => match place(index) {
            Some(place) => anyhow!("{place}: {problem}"),
            None => Error::Prompt { index, problem }.into(),
        },
        e => e.into(),
    }
}

fn config(args: &GenerateArgs, dir: &Path, encoder: &Encoder) -> anyhow::Result<GenerationConfig> {
    let drawn = args.temperature.is_some() || args.top_k.is_some() || args.top_p.is_some();
    let default = GenerationConfig::default();
    Ok(GenerationConfig {
        max_new_tokens: args.max_new_tokens,
        do_sample: args.sample || drawn,
        temperature: args.temperature.unwrap_or(default.temperature),
        top_k: args.top_k.unwrap_or(default.top_k),
        top_p: args.top_p.unwrap_or(default.top_p),
        repetition_penalty: args.repetition_penalty,
        no_repeat_ngram_size: args.no_repeat_ngram_size,
        repeat_prompt_ngrams: args.repeat_prompt_ngrams,
        num_beams: args.num_beams,
        length_penalty: args.length_penalty,
        early_stopping: args.early_stopping,
        eos_token_id: match args.eos.as_deref() {
            None => end_tokens(dir, encoder)?,
            Some([none]) if none == "none" => Vec::new(),
            Some(tokens) => tokens.iter().map(|t| token(t, encoder)).collect::<anyhow::Result<_>>()?,
        },
        seed: args.seed,
        first_stream: 0,
    })
}

/// A token by its spelling, or else by its number.
fn token(name: &str, encoder: &Encoder) -> anyhow::Result<u32> {
    let size = encoder.vocab_size();
    let number = || name.parse().ok().filter(|id| (*id as usize) < size);
    let found = encoder.tokenizer().token_id(name).or_else(number);
    found.with_context(|| format!("eos = {name}: is no token of the vocabulary and no id below {size}"))
}

/// `NAME=DIR`, or a folder alone, which gives the name.
fn named(text: &str) -> Result<(String, PathBuf), String> {
    if let Some((name, dir)) = text.split_once('=') {
        return Ok((name.to_owned(), dir.into()));
    }
    let name = Path::new(text).file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| format!("`{text}` ends in no name; write NAME={text}"))?;
    Ok((name.to_owned(), text.into()))
}

fn adapters(args: &GenerateArgs, model: &dyn Model) -> anyhow::Result<Adapters> {
    let mut adapters = Adapters::new();
    for (name, dir) in &args.adapters {
        let replaced = adapters.insert(name, args.base.attach(dir, model)?);
        ensure!(replaced.is_none(), "--adapters has two of the name `{name}`; write NAME=DIR");
    }
    Ok(adapters)
}

/// How results are shown.
#[derive(Clone, Copy)]
struct Shown {
    json: bool,
    /// One prompt, on a terminal perhaps.
    alone: bool,
    /// Whether there are several adapters.
    adapter: bool,
}

/// One prompt's result as a line of the output.
fn line(
    (prompt, before): (&Prompt, &[u32]),
    generated: Generated,
    tokenizer: &Tokenizer,
    eos: &[u32],
    shown: Shown,
) -> anyhow::Result<String> {
    #[derive(Serialize)]
    struct Line<'a> {
        /// Outer: several adapters; inner: this prompt's own.
        #[serde(skip_serializing_if = "Option::is_none")]
        adapter: Option<Option<&'a str>>,
        prompt: &'a str,
        text: &'a str,
        tokens: &'a [u32],
        finished: bool,
        #[serde(skip_serializing_if = "Option::is_none")]
        score: Option<f64>,
    }
    let text = text(tokenizer, before, &generated, eos)?;
    let text = if prompt.ended { text.trim() } else { &text };
    let Generated { tokens, score, finished } = generated;
    let adapter = shown.adapter.then_some(prompt.adapter.as_deref());
    let (tokens, prompt) = (&tokens[..], &prompt.text[..]);
    Ok(match (shown, adapter) {
        (Shown { json: true, .. }, _) => {
            serde_json::to_string(&Line { adapter, prompt, text, tokens, finished, score })?
        }
        (Shown { alone: true, .. }, Some(Some(name))) => format!("{name}: {text}"),
        (Shown { alone: true, .. }, _) => text.to_owned(),
        _ => text.replace(['\r', '\n'], " "),
    })
}

/// A text that is shown while it is made.
struct Stream<'t> {
    text: lora_model::tokenizer::DecodeStream<'t>,
    failed: Option<anyhow::Error>,
}

impl<'t> Stream<'t> {
    fn new(tokenizer: &'t Tokenizer, prompt: &[u32]) -> anyhow::Result<Stream<'t>> {
        Ok(Stream { text: tokenizer.decode_stream(prompt, true)?, failed: None })
    }

    fn push(&mut self, token: u32, eos: &[u32]) {
        if self.failed.is_none() && !eos.contains(&token) {
            let shown = self.text.push(token).map_err(anyhow::Error::new).and_then(ui::print);
            self.failed = shown.err();
        }
    }

    fn finish(mut self) -> anyhow::Result<()> {
        match self.failed.take() {
            Some(e) => Err(e),
            None => ui::print(format_args!("{}\n", self.text.finish()?)),
        }
    }
}
