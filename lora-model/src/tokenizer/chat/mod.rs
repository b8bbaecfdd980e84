//! Conversations as text and tokens, by the chat template that a model's folder brings.
//!
//! ```text
//! messages ──template──▶ text, and the assistant's parts of it ──tokenizer──▶ tokens, and the assistant's among them
//! ```
//! Templates are Jinja as Transformers renders it (`apply_chat_template`), without tools and documents.

mod jinja;
mod load;
mod message;
mod python;
mod turns;

use std::{
    fmt,
    ops::Range,
    path::{Path, PathBuf},
};

use minijinja::Environment;
use serde_json::{Map, Value};

use super::Tokenizer;
use crate::{Error, Result};

pub use message::Message;
use turns::Rendered;

/// Hugging Face's newer place of a chat template, in a file of its own.
pub(super) const TEMPLATE_FILE: &str = "chat_template.jinja";

/// How a model writes conversations.
pub struct ChatTemplate {
    env: Environment<'static>,
    /// Where it comes from: stands in messages.
    path: PathBuf,
    /// The special tokens, by the names that templates use.
    special: Map<String, Value>,
    /// Whether it marks with `{% generation %}` what the assistant says.
    marks: bool,
}

/// A conversation as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conversation {
    /// All of it: the tokens of Transformers' `apply_chat_template`.
    pub tokens: Vec<u32>,
    /// Which of them the assistant is to say; ascending, apart, none empty, and as long as they can be.
    pub turns: Vec<Range<usize>>,
}

/// A conversation that awaits the assistant's next turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatPrompt {
    /// As the template writes it.
    pub text: String,
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// The token that ends the assistant's turn, where the template ends turns with a token of their own.
    pub end_of_turn: Option<u32>,
}

impl ChatTemplate {
    /// Reads the template of a model's folder: the file `chat_template.jinja`, or else `chat_template` in
    /// `tokenizer_config.json`, of several templates with names the one called `default`.
    ///
    /// # Errors
    /// [`Error::ChatTemplate`] when there is none or it is no template, with its line; [`Error::Config`] or [`Error::Io`] for
    /// a damaged file.
    pub fn from_dir(dir: &Path) -> Result<ChatTemplate> {
        load::from_dir(dir)
    }

    fn new(path: PathBuf, source: &str, special: Map<String, Value>) -> Result<ChatTemplate> {
        match jinja::environment(source) {
            Ok((env, marks)) => Ok(ChatTemplate { env, path, special, marks }),
            Err(e) => Err(Error::ChatTemplate { path, line: e.line(), problem: told(&e) }),
        }
    }

    /// The text of a conversation; with `add_generation_prompt` up to where the assistant's next turn begins.
    ///
    /// # Errors
    /// [`Error::ChatTemplate`] when the template fails or raises an exception, with its line.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let mut text = self.render_marked(messages, add_generation_prompt)?;
        if self.marks {
            text.retain(|c| !jinja::MARKS.contains(&c));
        }
        Ok(text)
    }

    fn render_marked(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let messages: Vec<_> = messages.iter().map(Message::for_template).collect();
        let variables = jinja::variables(&self.special, &messages, add_generation_prompt);
        let template = self.env.get_template(jinja::NAME).expect("added when it was made");
        template.render(variables).map_err(|e| self.error(e.line(), told(&e)))
    }

    /// The tokens of a conversation, and which of them are the assistant's: what the template has in `{% generation %}`
    /// blocks (the mask of `return_assistant_tokens_mask`), or else what follows each generation prompt up to the end of the
    /// turn, with the token that ends it. White space after that token is not the assistant's, which has stopped there.
    ///
    /// A token belongs to a turn when any character of it does. (Of a character that several tokens make up at the end of a
    /// block, such as 🙂, Transformers' mask has the first token alone.) Special tokens are recognised wherever they stand, in the
    /// template as in what a message says, as in Transformers: who trains on texts of strangers removes them first.
    ///
    /// # Errors
    /// As of [`render`](ChatTemplate::render); a template that does not write its turns one after the other; a tokenizer
    /// that fails.
    pub fn encode(&self, tokenizer: &Tokenizer, messages: &[Message]) -> Result<Conversation> {
        let Rendered { text, turns } = match self.marks {
            true => self.marked_turns(messages)?,
            false => self.found_turns(messages)?,
        };
        let (tokens, places) = tokenizer.encode_with_places(&text)?;
        let mut runs: Vec<Range<usize>> = Vec::with_capacity(turns.len());
        for turn in turns {
            let within = |place: &Range<usize>| place.start < turn.end && turn.start < place.end;
            let Some(start) = places.iter().position(within) else { continue };
            let mut end = 1 + places.iter().rposition(within).expect("at least the first");
            if !self.marks {
                let blank = |i: &usize| text[places[*i].clone()].trim().is_empty() && !tokenizer.is_added(tokens[*i]);
                let last = (start..end).rev().find(|i| !blank(i));
                end = last.filter(|i| tokenizer.is_added(tokens[*i])).map_or(end, |i| i + 1);
            }
            match runs.last_mut() {
                Some(last) if start <= last.end => last.end = end,
                _ => runs.push(start..end),
            }
        }
        Ok(Conversation { tokens, turns: runs })
    }

    /// What the assistant is given for its next turn.
    ///
    /// # Errors
    /// As of [`render`](ChatTemplate::render); a tokenizer that fails.
    pub fn prompt(&self, tokenizer: &Tokenizer, messages: &[Message]) -> Result<ChatPrompt> {
        let text = self.render(messages, true)?;
        let tokens = tokenizer.encode(&text)?;
        Ok(ChatPrompt { text, tokens, end_of_turn: self.end_of_turn(tokenizer, messages) })
    }

    /// The token that ends a turn of the assistant after `messages`: the last of such a turn or the one after it, if it is
    /// none of the ordinary ones.
    fn end_of_turn(&self, tokenizer: &Tokenizer, messages: &[Message]) -> Option<u32> {
        let answered = [messages, &[Message::new("assistant", "yes")]].concat();
        // A template that cannot place such a turn has ended the prompt all the same.
        let Conversation { tokens, turns } = self.encode(tokenizer, &answered).ok()?;
        let end = turns.last()?.end;
        [Some(&tokens[end - 1]), tokens.get(end)].into_iter().flatten().copied().find(|t| tokenizer.is_added(*t))
    }

    fn error(&self, line: Option<usize>, problem: String) -> Error {
        Error::ChatTemplate { path: self.path.clone(), line, problem }
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate").field("path", &self.path).field("special", &self.special).finish_non_exhaustive()
    }
}

/// What minijinja says, without the place, which stands in front; an exception of the template's own in its words.
fn told(e: &minijinja::Error) -> String {
    let mut source: Option<&dyn std::error::Error> = Some(e);
    while let Some(cause) = source {
        if let Some(jinja::Raised(message)) = cause.downcast_ref() {
            return format!("the template refuses the conversation: {message}");
        }
        source = cause.source();
    }
    match e.detail() {
        Some(detail) => format!("{}: {detail}", e.kind()),
        None => e.kind().to_string(),
    }
}
