//! `lora generate`.

use std::{
    io::{self, IsTerminal},
    path::{Path, PathBuf},
};

use anyhow::{Context, anyhow, bail, ensure};
use clap::Args;
use lora_model::{
    Error, Task,
    generate::{Generated, GenerationConfig, check, generate},
    tokenizer::{
        Tokenizer,
        chat::{ChatPrompt, Message},
    },
};
use lora_train::{
    Encoder,
    data::{self, Content, Encode, Format},
    generation::{batches, end_tokens, text},
};
use serde::Serialize;

use crate::{
    base::{BaseArgs, Loaded},
    part::{PartFile, check_writable},
    train::formats,
    ui,
};

#[derive(Args)]
#[command(allow_negative_numbers = true)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    base: BaseArgs,

    /// Text to continue, as it is
    #[arg(
        long,
        value_name = "TEXT",
        required_unless_present = "data",
        conflicts_with = "data",
        help_heading = "Prompts"
    )]
    prompt: Option<String>,
    /// End the prompt as training ends it before a completion: trimmed, then the end-of-text token
    #[arg(long, requires = "prompt", help_heading = "Prompts")]
    append_end_of_text: bool,
    /// The prompt is what a user says: write it as the model's chat template does, and generate the answer
    #[arg(long, requires = "prompt", conflicts_with_all = ["append_end_of_text", "data"], help_heading = "Prompts")]
    chat: bool,
    /// What the system says before the user
    #[arg(long, value_name = "TEXT", requires = "chat", help_heading = "Prompts")]
    system: Option<String>,
    /// File of prompts: contexts of e2e lines and prompts of JSON lines, ended as in training; messages of JSON lines, by
    /// the model's chat template, without a last one of the assistant; texts as they are. References and completions need
    /// not be there. Equal contexts on neighbouring e2e lines are continued once
    #[arg(long, value_name = "FILE", help_heading = "Prompts")]
    data: Option<PathBuf>,
    /// Layout of --data [default: jsonl by its extension, otherwise e2e]
    #[arg(long, value_parser = formats(), requires = "data", help_heading = "Prompts")]
    format: Option<String>,

    /// Write to this file instead of standard output. Until all is done the texts are in FILE.part, where they stay after
    /// Ctrl-C or an error
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    out: Option<PathBuf>,
    /// One JSON object per prompt: prompt, text, tokens, finished, score (of beams). Without it, files of prompts give
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

/// What is continued.
struct Prompt {
    /// Where it stands, for messages.
    place: String,
    text: String,
    /// Whether it ends as in training, so that what follows is a text of its own.
    ended: bool,
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
    let encoder = Encoder::from_dir(&dir, &*model)?;
    let mut config = config(&args, &dir, &encoder)?;
    config.check(model.limits().vocab_size).map_err(|e| told(e, |_| None))?;
    let Prompts { prompts, tokens, ends } = prompts(&args, &encoder)?;
    for end in ends.into_iter().filter(|_| args.eos.is_none()) {
        if !config.eos_token_id.contains(&end) {
            config.eos_token_id.push(end);
        }
    }
    let place = |i: usize| prompts.get(i).map(|p| p.place.clone());
    check(&*model, &adapted, &tokens, &config).map_err(|e| told(e, place))?;
    let json = args.json || args.out.as_ref().is_some_and(|p| p.extension().is_some_and(|e| e == "jsonl"));

    let streamed = args.prompt.is_some() && !json && args.out.is_none() && io::stdout().is_terminal();
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
        let mut generated = batches((&*model, &adapted), &tokens, &config, args.batch_size);
        for (batch, tokens) in prompts.chunks(args.batch_size).zip(tokens.chunks(args.batch_size)) {
            if ui::interrupted() {
                return Err(ui::Interrupted.into());
            }
            let mut lines = String::new();
            let generated = generated.next().transpose().with_context(|| args.base.to_string())?.unwrap_or_default();
            for ((prompt, tokens), generated) in batch.iter().zip(tokens).zip(generated) {
                let alone = args.prompt.is_some();
                lines += &line((prompt, tokens), generated, encoder.tokenizer(), &config.eos_token_id, alone, json)?;
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

/// The prompts, apart from them their tokens, and the tokens that end the assistant's turn after a conversation.
#[derive(Default)]
struct Prompts {
    prompts: Vec<Prompt>,
    tokens: Vec<Vec<u32>>,
    ends: Vec<u32>,
}

impl Prompts {
    fn add(&mut self, encoder: &Encoder, place: String, text: String, ended: bool) -> anyhow::Result<()> {
        let encoded = match ended {
            true => data::encode_prompt(&text, encoder).map_err(anyhow::Error::new),
            false => encoder.encode_start(&text).map_err(anyhow::Error::new),
        };
        self.tokens.push(encoded.with_context(|| place.clone())?);
        self.prompts.push(Prompt { place, text, ended });
        Ok(())
    }

    fn add_chat(&mut self, encoder: &Encoder, place: String, messages: &[Message]) -> anyhow::Result<()> {
        let ChatPrompt { text, tokens, end_of_turn } = encoder.chat_prompt(messages).with_context(|| place.clone())?;
        self.tokens.push(tokens);
        self.prompts.push(Prompt { place, text, ended: true });
        self.ends.extend(end_of_turn.filter(|end| !self.ends.contains(end)));
        Ok(())
    }
}

fn prompts(args: &GenerateArgs, encoder: &Encoder) -> anyhow::Result<Prompts> {
    let mut all = Prompts::default();
    match (&args.prompt, &args.data) {
        (Some(text), _) if args.chat => {
            let system = args.system.as_ref().map(|text| Message::new("system", text));
            let messages: Vec<Message> = system.into_iter().chain([Message::new("user", text)]).collect();
            all.add_chat(encoder, "--prompt".to_owned(), &messages)?;
        }
        (Some(text), _) => all.add(encoder, "--prompt".to_owned(), text.clone(), args.append_end_of_text)?,
        (None, Some(path)) => {
            let format = args.format.as_ref().map(|f| f.parse()).transpose()?;
            let format = format.unwrap_or_else(|| Format::of_path(path));
            let mut last = None;
            for example in data::read_prompts(path, format)?.examples {
                let place = format!("{}:{}", path.display(), example.line);
                match example.content {
                    Content::Text(text) | Content::Labelled { text, .. } => all.add(encoder, place, text, false)?,
                    Content::Chat(messages) => all.add_chat(encoder, place, data::unanswered(&messages))?,
                    Content::Pair { prompt, .. } => {
                        let again = format == Format::E2e && last.as_ref() == Some(&prompt);
                        if !again {
                            all.add(encoder, place, prompt.clone(), true)?;
                        }
                        last = Some(prompt);
                    }
                }
            }
        }
        (None, None) => bail!("give --prompt or --data"),
    }
    Ok(all)
}

/// One prompt's result as a line of the output.
fn line(
    (prompt, before): (&Prompt, &[u32]),
    generated: Generated,
    tokenizer: &Tokenizer,
    eos: &[u32],
    alone: bool,
    json: bool,
) -> anyhow::Result<String> {
    #[derive(Serialize)]
    struct Line<'a> {
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
    Ok(match (json, alone) {
        (true, _) => serde_json::to_string(&Line { prompt: &prompt.text, text, tokens: &tokens, finished, score })?,
        (false, true) => text.to_owned(),
        (false, false) => text.replace(['\r', '\n'], " "),
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
