//! Data files as a model reads them.

use std::path::Path;

use lora_model::{Model, tokenizer::Tokenizer};

use crate::{
    Result,
    data::{self, Dataset, Encode, EncodeError},
};

/// A tokenizer as data needs it: with the model's vocabulary and its end of text.
pub struct Encoder {
    tokenizer: Tokenizer,
    end_of_text: u32,
    vocab_size: usize,
}

impl Encoder {
    /// The tokenizer in a model's folder.
    ///
    /// # Errors
    /// No tokenizer, a damaged one, or one without an end-of-text token.
    pub fn from_dir(dir: &Path, model: &dyn Model) -> Result<Encoder> {
        Encoder::new(Tokenizer::from_dir(dir)?, model)
    }

    /// A tokenizer for a model.
    ///
    /// # Errors
    /// A tokenizer without an end-of-text token.
    pub fn new(tokenizer: Tokenizer, model: &dyn Model) -> Result<Encoder> {
        let end_of_text = tokenizer.end_of_text()?;
        Ok(Encoder { tokenizer, end_of_text, vocab_size: model.limits().vocab_size })
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
}

impl Encode for Encoder {
    fn encode(&self, text: &str) -> std::result::Result<Vec<u32>, EncodeError> {
        Ok(self.tokenizer.encode(text)?)
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

/// Reads and encodes one data file for a model: sequences of at most `max_length` tokens, and never longer than the
/// model's positions.
///
/// # Errors
/// Those of [`data::read`] and [`data::encode`].
pub fn load_data(
    path: &Path,
    format: Option<data::Format>,
    encoder: &Encoder,
    model: &dyn Model,
    max_length: usize,
) -> Result<Dataset> {
    let corpus = data::read(path, format.unwrap_or_else(|| data::Format::of_path(path)))?;
    // The last token of a sequence takes no position: it is only predicted.
    let longest = max_length.min(model.limits().max_positions + 1);
    Ok(data::encode(&[corpus], encoder, longest)?)
}
