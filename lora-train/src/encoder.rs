//! Data files as a model reads them.

use std::{
    path::{Path, PathBuf},
    sync::OnceLock,
};

use lora_core::peft::Adapted;
use lora_model::{
    Model,
    tokenizer::{
        Joined, Joiner, Tokenizer,
        chat::{ChatPrompt, ChatTemplate, Conversation, Message},
    },
};

use crate::{
    Result,
    data::{self, Dataset, Encode, EncodeError, Join},
    task::encode_completions,
};

/// A tokenizer as data needs it: with the model's vocabulary and its end of text.
pub struct Encoder {
    tokenizer: Tokenizer,
    end_of_text: u32,
    vocab_size: usize,
    /// Where the model is, if it is somewhere, and its chat template once it was asked for.
    dir: Option<PathBuf>,
    chat: OnceLock<ChatTemplate>,
}

impl Encoder {
    /// The tokenizer in a model's folder.
    ///
    /// # Errors
    /// No tokenizer, a damaged one, or one without an end-of-text token.
    pub fn from_dir(dir: &Path, model: &dyn Model) -> Result<Encoder> {
        Ok(Encoder { dir: Some(dir.to_owned()), ..Encoder::new(Tokenizer::from_dir(dir)?, model)? })
    }

    /// A tokenizer for a model.
    ///
    /// # Errors
    /// A tokenizer without an end-of-text token.
    pub fn new(tokenizer: Tokenizer, model: &dyn Model) -> Result<Encoder> {
        let end_of_text = tokenizer.end_of_text()?;
        let vocab_size = model.limits().vocab_size;
        Ok(Encoder { tokenizer, end_of_text, vocab_size, dir: None, chat: OnceLock::new() })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The tokens of a text that is to be continued: after the begin of text, in models that know one.
    ///
    /// # Errors
    /// A tokenizer that fails.
    pub fn encode_start(&self, text: &str) -> Result<Vec<u32>> {
        let tokens = self.tokenizer.encode(text)?;
        Ok(self.tokenizer.begin_of_text().into_iter().chain(tokens).collect())
    }

    /// What the model is given for the assistant's next turn in a conversation.
    ///
    /// # Errors
    /// No chat template in the model's folder, or one that refuses the conversation.
    pub fn chat_prompt(&self, messages: &[Message]) -> Result<ChatPrompt> {
        Ok(self.chat()?.prompt(&self.tokenizer, messages)?)
    }

    fn chat(&self) -> lora_model::Result<&ChatTemplate> {
        match self.chat.get() {
            Some(template) => Ok(template),
            None => {
                let template = ChatTemplate::from_dir(self.dir.as_deref().unwrap_or(Path::new("")))?;
                Ok(self.chat.get_or_init(|| template))
            }
        }
    }
}

impl Encode for Encoder {
    fn encode(&self, text: &str) -> std::result::Result<Vec<u32>, EncodeError> {
        Ok(self.tokenizer.encode(text)?)
    }

    fn encode_chat(&self, messages: &[Message]) -> std::result::Result<Conversation, EncodeError> {
        Ok(self.chat()?.encode(&self.tokenizer, messages)?)
    }

    fn begin_of_text(&self) -> Option<u32> {
        self.tokenizer.begin_of_text()
    }

    fn end_of_text(&self) -> u32 {
        self.end_of_text
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }
}

/// A tokenizer as labelled data needs it: with the tokens that stand around texts.
pub struct TextJoiner {
    joiner: Joiner,
    vocab_size: usize,
    segments: usize,
}

impl TextJoiner {
    /// The tokenizer in a model's folder.
    ///
    /// # Errors
    /// No tokenizer, a damaged one, or one that knows no tokens to stand around texts.
    pub fn from_dir(dir: &Path, model: &dyn Model) -> Result<TextJoiner> {
        let joiner = Tokenizer::from_dir(dir)?.joiner(dir)?;
        let limits = model.limits();
        Ok(TextJoiner { joiner, vocab_size: limits.vocab_size, segments: limits.segments })
    }
}

impl Join for TextJoiner {
    fn join(&self, text: &str, second: Option<&str>, max_length: usize) -> std::result::Result<Joined, EncodeError> {
        let joined = self.joiner.join(text, second, max_length)?;
        // A model that tells no segments apart reads all as one, whatever its tokenizer says.
        let second_from = if self.segments > 1 { joined.second_from } else { joined.ids.len() };
        Ok(Joined { second_from, ..joined })
    }

    fn around(&self, pair: bool) -> usize {
        self.joiner.around(pair)
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }
}

/// Reads one data file and encodes it for a model under a method, as [`encode_completions`] does.
///
/// # Errors
/// Those of [`data::read`] and [`data::encode`].
pub fn load_data(
    path: &Path,
    format: Option<data::Format>,
    encoder: &Encoder,
    model: &dyn Model,
    adapted: &Adapted,
    max_length: usize,
) -> Result<Dataset> {
    let corpus = data::read(path, format.unwrap_or_else(|| data::Format::of_path(path)))?;
    encode_completions(&corpus, encoder, model, adapted, max_length)
}
