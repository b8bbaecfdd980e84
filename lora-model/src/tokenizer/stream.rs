use super::Tokenizer;
use crate::Result;

/// Tokens of context that are kept: enough for any character, and for decoders that treat a text's beginning in their
/// own way.
const KEPT: usize = 8;
const MOST: usize = 4 * KEPT;

/// Turns tokens into text as they come, holding back what does not yet form a whole character.
///
/// The pieces, with that of [`finish`](DecodeStream::finish), join to what [`Tokenizer::decode_after`] gives for all
/// tokens at once.
#[derive(Clone, Debug)]
pub struct DecodeStream<'t> {
    tokenizer: &'t Tokenizer,
    skip_special: bool,
    /// The latest tokens.
    ids: Vec<u32>,
    /// How many bytes of their text have been given out.
    given: usize,
}

impl<'t> DecodeStream<'t> {
    pub(super) fn new(tokenizer: &'t Tokenizer, before: &[u32], skip_special: bool) -> Result<DecodeStream<'t>> {
        let ids = before[before.len().saturating_sub(KEPT)..].to_vec();
        let mut stream = DecodeStream { tokenizer, skip_special, ids, given: 0 };
        stream.given = certain(&stream.text()?);
        Ok(stream)
    }

    /// Takes one token; gives the text that has become certain by it, which may be empty.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.text().inspect_err(|_| {
            self.ids.pop();
        })?;
        let new = text.get(self.given..certain(&text)).unwrap_or_default().to_owned();
        self.given = self.given.max(certain(&text));
        if self.ids.len() > MOST {
            // UTF-8 finds its characters again from any byte on, so that the end of the text reads the same.
            self.ids.drain(..self.ids.len() - KEPT);
            self.given = certain(&self.text()?);
        }
        Ok(new)
    }

    /// Gives what was held back, an incomplete character as U+FFFD, and starts anew.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(&mut self) -> Result<String> {
        let text = self.text()?;
        let rest = text.get(self.given..).unwrap_or_default().to_owned();
        self.ids.clear();
        self.given = 0;
        Ok(rest)
    }

    fn text(&self) -> Result<String> {
        self.tokenizer.decode(&self.ids, self.skip_special)
    }
}

/// The length of `text` without the one U+FFFD at its end that may yet become a character.
fn certain(text: &str) -> usize {
    text.strip_suffix(char::REPLACEMENT_CHARACTER).unwrap_or(text).len()
}
