use super::Tokenizer;
use crate::Result;

/// Tokens of context that are kept: enough for any character, and for decoders that treat a text's beginning in their
/// own way.
const KEPT: usize = 8;
const MOST: usize = 4 * KEPT;
/// Tokens that can come between the first byte of a character and its last.
const WITHIN: usize = 3;

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
    /// How many tokens ago the text was whole.
    held: usize,
}

impl<'t> DecodeStream<'t> {
    pub(super) fn new(tokenizer: &'t Tokenizer, before: &[u32], skip_special: bool) -> Result<DecodeStream<'t>> {
        let mut stream = DecodeStream { tokenizer, skip_special, ids: before.to_vec(), given: 0, held: 0 };
        stream.given = whole(&stream.text()?).len();
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
        let mut certain = whole(&text).len();
        if certain == text.len() {
            self.held = 0;
        } else if certain > self.given {
            // A character ended, and in the same token another began.
            self.held = 1;
        } else if self.held < WITHIN {
            self.held += 1;
        } else {
            // Bytes that will never be a character.
            (certain, self.held) = (text.len(), 0);
        }
        let new = text.get(self.given..certain).unwrap_or_default().to_owned();
        self.given = self.given.max(certain);
        if self.ids.len() > MOST && self.held == 0 {
            self.forget(&text)?;
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
        (self.given, self.held) = (0, 0);
        Ok(rest)
    }

    /// Drops early tokens where the rest reads the same without them. (It does not where that cuts a run of bytes within
    /// a character; some later token will do.)
    fn forget(&mut self, text: &str) -> Result<()> {
        let kept = &self.ids[self.ids.len() - KEPT..];
        let end = self.tokenizer.decode(kept, self.skip_special)?;
        if text.ends_with(&end) {
            self.ids = kept.to_vec();
            self.given = end.len();
        }
        Ok(())
    }

    fn text(&self) -> Result<String> {
        self.tokenizer.decode(&self.ids, self.skip_special)
    }
}

/// `text` without what may yet become a character at its end: U+FFFD, as many as some decoders make of its bytes and of
/// those before it.
pub(super) fn whole(text: &str) -> &str {
    text.trim_end_matches(char::REPLACEMENT_CHARACTER)
}
