//! What `lora generate` continues.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use lora_model::tokenizer::chat::{ChatPrompt, Message};
use lora_train::{
    Encoder,
    data::{self, Content, Format},
};

use crate::generate::GenerateArgs;

/// What is continued.
#[derive(Clone)]
pub(crate) struct Prompt {
    /// Where it stands, for messages.
    pub(crate) place: String,
    pub(crate) text: String,
    /// The adapter that continues it, of several.
    pub(crate) adapter: Option<String>,
    /// Whether it ends as in training, so that what follows is a text of its own.
    pub(crate) ended: bool,
}

/// The prompts, apart from them their tokens, and the tokens that end the assistant's turn after a conversation.
#[derive(Default)]
pub(crate) struct Prompts {
    pub(crate) prompts: Vec<Prompt>,
    pub(crate) tokens: Vec<Vec<u32>>,
    pub(crate) ends: Vec<u32>,
}

impl Prompts {
    fn add(&mut self, encoder: &Encoder, place: String, text: String, ended: bool) -> anyhow::Result<()> {
        let encoded = match ended {
            true => data::encode_prompt(&text, encoder).map_err(anyhow::Error::new),
            false => encoder.encode_start(&text).map_err(anyhow::Error::new),
        };
        self.tokens.push(encoded.with_context(|| place.clone())?);
        self.prompts.push(Prompt { place, text, adapter: None, ended });
        Ok(())
    }

    /// What has been added counts once for each of these adapters.
    fn for_each(&mut self, adapters: &[(String, PathBuf)]) {
        let (prompts, tokens) = (std::mem::take(&mut self.prompts), std::mem::take(&mut self.tokens));
        for (prompt, tokens) in prompts.into_iter().zip(tokens) {
            for (name, _) in adapters {
                self.prompts.push(Prompt { adapter: Some(name.clone()), ..prompt.clone() });
                self.tokens.push(tokens.clone());
            }
        }
    }

    fn add_chat(&mut self, encoder: &Encoder, place: String, messages: &[Message]) -> anyhow::Result<()> {
        let ChatPrompt { text, tokens, end_of_turn } = encoder.chat_prompt(messages).with_context(|| place.clone())?;
        self.tokens.push(tokens);
        self.prompts.push(Prompt { place, text, adapter: None, ended: true });
        self.ends.extend(end_of_turn.filter(|end| !self.ends.contains(end)));
        Ok(())
    }
}

pub(crate) fn prompts(args: &GenerateArgs, encoder: &Encoder) -> anyhow::Result<Prompts> {
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
            let corpus = data::read_prompts(path, format)?;
            let names = adapters_of(args, path, format)?;
            let mut last = None;
            for (i, example) in corpus.examples.into_iter().enumerate() {
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
                if let Some(Some(name)) = names.get(i) {
                    all.prompts.last_mut().expect("added just now").adapter = Some(name.clone());
                }
            }
        }
        (None, None) => bail!("give --prompt or --data"),
    }
    if args.prompt.is_some() && !args.adapters.is_empty() {
        all.for_each(&args.adapters);
    }
    Ok(all)
}

/// The adapter that each example of a file names; none of a file that cannot name any.
fn adapters_of(args: &GenerateArgs, path: &Path, format: Format) -> anyhow::Result<Vec<Option<String>>> {
    const KEY: &str = "adapter";
    if format != Format::Jsonl {
        ensure!(
            args.adapters.is_empty(),
            "{}: --adapters goes with JSON lines, each of which can name one under the key \"{KEY}\"; with one for all, give \
             --adapter",
            path.display()
        );
        return Ok(Vec::new());
    }
    let names = data::read_key(path, KEY)?;
    let named = names.iter().flatten().next();
    if let Some(name) = named.filter(|_| args.adapters.is_empty()) {
        bail!("{}: the key \"{KEY}\" asks for `{name}`; give --adapters {name}=DIR", path.display());
    }
    Ok(names)
}
