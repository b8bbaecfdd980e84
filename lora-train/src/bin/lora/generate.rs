//! `lora generate`.

use std::{
    io::{self, IsTerminal},
    path::{Path, PathBuf},
};

use anyhow::{Context, anyhow, bail, ensure};
use clap::Args;
use lora_model::{
    Error, files,
    generate::{Generated, GenerationConfig, generate},
    tokenizer::Tokenizer,
};
use lora_train::{
    Encoder,
    data::{self, Content, Encode, Format},
};
use serde::Serialize;

use crate::{
    base::{BaseArgs, Loaded},
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
    /// File of prompts: contexts of e2e lines and prompts of JSON lines, ended as in training; texts as they are.
    /// References and completions need not be there. Equal contexts on neighbouring e2e lines are continued once
    #[arg(long, value_name = "FILE", help_heading = "Prompts")]
    data: Option<PathBuf>,
    /// Layout of --data [default: jsonl by its extension, otherwise e2e]
    #[arg(long, value_parser = formats(), requires = "data", help_heading = "Prompts")]
    format: Option<String>,

    /// Write to this file, when all is done, instead of standard output
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
    /// Tokens that end a text, by id or as the vocabulary spells them; `none` for none [default: the end of text]
    #[arg(long, value_name = "TOKEN,...", value_delimiter = ',', help_heading = "Generation")]
    eos: Option<Vec<String>>,
    /// Seed of the drawing
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
    tokens: Vec<u32>,
    /// Whether it ends as in training, so that what follows is a text of its own.
    ended: bool,
}

pub(crate) fn run(args: GenerateArgs) -> anyhow::Result<()> {
    ensure!(args.batch_size > 0, "batch-size = 0: must be at least 1");
    if let Some(out) = &args.out {
        check_writable(out)?;
    }
    let Loaded { dir, model, adapted } = args.base.load()?;
    let encoder = Encoder::from_dir(&dir, &*model)?;
    let config = config(&args, &encoder)?;
    config.check(model.limits().vocab_size)?;
    let prompts = prompts(&args, &encoder)?;
    let json = args.json || args.out.as_ref().is_some_and(|p| p.extension().is_some_and(|e| e == "jsonl"));

    let streamed = args.prompt.is_some() && !json && args.out.is_none() && io::stdout().is_terminal();
    if streamed {
        let mut stream = Stream::new(encoder.tokenizer());
        let mut on_token = |_, token| stream.push(token, &config.eos_token_id);
        generate(&*model, &adapted, &[prompts[0].tokens.clone()], &config, Some(&mut on_token))?;
        return stream.finish();
    }
    let bar = ui::counter(prompts.len() as u64, "prompts");
    let mut text = String::new();
    for (i, batch) in prompts.chunks(args.batch_size).enumerate() {
        let tokens: Vec<Vec<u32>> = batch.iter().map(|p| p.tokens.clone()).collect();
        // Prompts of different batches draw from different streams too.
        let config = GenerationConfig { seed: config.seed.wrapping_add((i as u64) << 32), ..config.clone() };
        let generated = generate(&*model, &adapted, &tokens, &config, None).map_err(|e| match e {
            Error::Prompt { index, problem } => anyhow!("{}: {problem}", batch[index].place),
            e => e.into(),
        })?;
        let mut batch_text = String::new();
        for (prompt, generated) in batch.iter().zip(generated) {
            batch_text +=
                &line(prompt, generated, encoder.tokenizer(), &config.eos_token_id, args.prompt.is_some(), json)?;
            batch_text.push('\n');
        }
        match &args.out {
            None => ui::print(batch_text)?,
            Some(_) => text += &batch_text,
        }
        bar.inc(batch.len() as u64);
    }
    bar.finish_and_clear();
    let Some(out) = &args.out else { return Ok(()) };
    match out.exists() && !out.is_file() {
        // A pipe or a terminal, which is not to be replaced by a file.
        true => std::fs::write(out, text).with_context(|| format!("could not write {}", out.display()))?,
        false => files::write_bytes(out, text.as_bytes())?,
    }
    ui::say(format_args!("{} texts in {}", prompts.len(), out.display()));
    Ok(())
}

fn config(args: &GenerateArgs, encoder: &Encoder) -> anyhow::Result<GenerationConfig> {
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
            None => vec![encoder.end_of_text()],
            Some([none]) if none == "none" => Vec::new(),
            Some(tokens) => tokens.iter().map(|t| token(t, encoder)).collect::<anyhow::Result<_>>()?,
        },
        seed: args.seed,
    })
}

/// A token by its spelling, or else by its number.
fn token(name: &str, encoder: &Encoder) -> anyhow::Result<u32> {
    let size = encoder.vocab_size();
    let number = || name.parse().ok().filter(|id| (*id as usize) < size);
    let found = encoder.tokenizer().token_id(name).or_else(number);
    found.with_context(|| format!("eos = {name}: is no token of the vocabulary and no id below {size}"))
}

fn prompts(args: &GenerateArgs, encoder: &Encoder) -> anyhow::Result<Vec<Prompt>> {
    let plain = |place: String, text: String| -> anyhow::Result<Prompt> {
        let tokens = encoder.tokenizer().encode(&text)?;
        Ok(Prompt { place, text, tokens, ended: false })
    };
    let ended = |place: String, text: String| -> anyhow::Result<Prompt> {
        Ok(Prompt { place, tokens: data::encode_prompt(&text, encoder)?, text, ended: true })
    };
    let (text, path) = match (&args.prompt, &args.data) {
        (Some(text), _) => (text, None),
        (None, Some(path)) => (&String::new(), Some(path)),
        (None, None) => bail!("give --prompt or --data"),
    };
    let Some(path) = path else {
        let place = "--prompt".to_owned();
        let prompt = if args.append_end_of_text { ended(place, text.clone())? } else { plain(place, text.clone())? };
        return Ok(vec![prompt]);
    };
    let format = args.format.as_ref().map(|f| f.parse()).transpose()?.unwrap_or_else(|| Format::of_path(path));
    let mut prompts: Vec<Prompt> = Vec::new();
    for example in data::read_prompts(path, format)?.examples {
        let place = format!("{}:{}", path.display(), example.line);
        match example.content {
            Content::Text(text) => prompts.push(plain(place, text)?),
            Content::Pair { prompt, .. } => {
                let again = prompts.last().is_some_and(|last| last.text == prompt);
                if format != Format::E2e || !again {
                    prompts.push(ended(place, prompt)?);
                }
            }
        }
    }
    Ok(prompts)
}

/// One prompt's result as a line of the output.
fn line(
    prompt: &Prompt,
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
    let Generated { tokens, score, finished } = generated;
    let shown = tokens.strip_suffix(eos_of(&tokens, eos)).unwrap_or(&tokens);
    let text = tokenizer.decode(shown, true)?;
    let text = if prompt.ended { text.trim() } else { &text };
    Ok(match (json, alone) {
        (true, _) => serde_json::to_string(&Line { prompt: &prompt.text, text, tokens: &tokens, finished, score })?,
        (false, true) => text.to_owned(),
        (false, false) => text.replace(['\r', '\n'], " "),
    })
}

/// The end token that a text ends with, if it does.
fn eos_of<'a>(tokens: &'a [u32], eos: &[u32]) -> &'a [u32] {
    let n = tokens.len();
    if tokens.last().is_some_and(|t| eos.contains(t)) { &tokens[n - 1..] } else { &[] }
}

/// A text that is shown while it is made.
struct Stream<'t> {
    text: lora_model::tokenizer::DecodeStream<'t>,
    failed: Option<anyhow::Error>,
}

impl<'t> Stream<'t> {
    fn new(tokenizer: &'t Tokenizer) -> Stream<'t> {
        Stream { text: tokenizer.decode_stream(true), failed: None }
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

/// Finds out before the work, rather than after it, that its result has no place.
fn check_writable(out: &Path) -> anyhow::Result<()> {
    ensure!(!out.is_dir(), "{}: is a folder; --out is a file", out.display());
    let folder = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    ensure!(folder.is_dir(), "{}: there is no folder {}; make it first", out.display(), folder.display());
    Ok(())
}
