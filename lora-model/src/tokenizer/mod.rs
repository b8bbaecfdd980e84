//! Text to token ids and back, with the tokenizer files of Hugging Face folders.

pub mod chat;
mod join;
mod load;
mod stream;
mod train;

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use tokenizers::PreTokenizerWrapper;

use crate::{Error, Result, files};

pub use join::{Joined, Joiner};
pub use stream::DecodeStream;

/// The token with which GPT-2 ends a text.
pub const END_OF_TEXT: &str = "<|endoftext|>";

const TOKENIZER_FILE: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// Every file of a model's folder that belongs to its tokenizer or to generation, by its name.
pub const FILES: [&str; 8] = [
    TOKENIZER_FILE,
    TOKENIZER_CONFIG,
    chat::TEMPLATE_FILE,
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
];

/// Long texts are encoded piece by piece of about this many bytes: the memory of encoding grows with the piece.
const PIECE: usize = 1 << 16;

/// That many pieces at once, so that all cores have some.
const BATCH: usize = 32;

/// A vocabulary and the rules by which text is cut into its tokens.
///
/// ```
/// # use lora_model::tokenizer::Tokenizer;
/// let texts = ["low lower lowest", "new newer newest"];
/// let tokenizer = Tokenizer::train_bpe(texts.into_iter(), 270)?;
/// let ids = tokenizer.encode("lower and newer")?;
/// assert_eq!(tokenizer.decode(&ids, true)?, "lower and newer");
/// # Ok::<(), lora_model::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Where it comes from: stands in messages.
    path: PathBuf,
    ids: usize,
    begin: Option<u32>,
    end: Option<u32>,
    /// Whether a text may be cut before `\n` and encoded piece by piece with the same result.
    splits: bool,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, or `vocab.json` and `merges.txt` (GPT-2's byte-level BPE), from a model's folder.
    ///
    /// Truncation and padding that `tokenizer.json` may ask for are ignored, as Transformers does by default.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] or [`Error::Io`], naming the file, when there is no tokenizer or it is damaged.
    pub fn from_dir(dir: &Path) -> Result<Tokenizer> {
        load::from_dir(dir)
    }

    /// Learns a byte-level BPE of `vocab_size` tokens from `texts`: [`END_OF_TEXT`], the 256 bytes, then merges.
    ///
    /// The same texts give the same tokenizer, whatever the number of threads and however the texts are divided
    /// between them. Texts too short for as many merges give a smaller vocabulary: see [`Tokenizer::vocab_size`].
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when `vocab_size` is below 257 or the texts are empty.
    pub fn train_bpe<S>(texts: impl Iterator<Item = S> + Send, vocab_size: usize) -> Result<Tokenizer>
    where
        S: AsRef<str> + Send,
    {
        train::train_bpe(texts, vocab_size)
    }

    fn new(mut inner: tokenizers::Tokenizer, path: PathBuf, begin: Option<u32>, end: Option<u32>) -> Result<Tokenizer> {
        if let Err(e) = inner.with_truncation(None) {
            return Err(Error::Tokenizer { path, problem: e.to_string() });
        }
        inner.with_padding(None);
        let ids = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let splits = splits_before_newlines(&inner);
        Ok(Tokenizer { inner, path, ids, begin, end, splits })
    }

    /// The token ids of `text`; no special token is added. Special tokens that stand in the text are recognised.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the model of the tokenizer cannot represent the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 4 + 1);
        let mut pieces = pieces(text, if self.splits { PIECE } else { usize::MAX });
        loop {
            let batch: Vec<&str> = pieces.by_ref().take(BATCH).collect();
            match batch[..] {
                [] => return Ok(ids),
                [piece] => {
                    let encoding = self.caught(|inner| inner.encode_fast(piece, false))?;
                    ids.extend_from_slice(encoding.get_ids());
                }
                _ => self.encode_all(&batch)?.iter().for_each(|part| ids.extend_from_slice(part)),
            }
        }
    }

    /// [`encode`](Tokenizer::encode) of many texts, on all cores; in their order.
    ///
    /// # Errors
    /// As [`encode`](Tokenizer::encode).
    pub fn encode_all(&self, texts: &[&str]) -> Result<Vec<Vec<u32>>> {
        let encodings = self.caught(|inner| inner.encode_batch_fast(texts.to_vec(), false))?;
        Ok(encodings.iter().map(|e| e.get_ids().to_vec()).collect())
    }

    /// [`encode`](Tokenizer::encode), with the bytes of `text` that each token stands for.
    fn encode_with_places(&self, text: &str) -> Result<(Vec<u32>, Vec<Range<usize>>)> {
        let encoding = self.caught(|inner| inner.encode(text, false))?;
        let places = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
        Ok((encoding.get_ids().to_vec(), places))
    }

    /// Whether a token was added to the vocabulary as a whole, as special tokens are, rather than learned from text.
    fn is_added(&self, id: u32) -> bool {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id)
    }

    /// The text of `ids`, with or without special tokens. Bytes that form no character become U+FFFD. Ids beyond the vocabulary,
    /// of which some models have rows, have no text, as in Transformers.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the library fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.caught(|inner| inner.decode(ids, skip_special))
    }

    /// The text of `ids` as it stands after the text of `before`: the space that some vocabularies put before a text, and
    /// take away from its beginning, stays within it.
    ///
    /// # Errors
    /// As [`decode`](Tokenizer::decode).
    pub fn decode_after(&self, before: &[u32], ids: &[u32], skip_special: bool) -> Result<String> {
        let (start, whole) = (self.decode(before, skip_special)?, self.decode(&[before, ids].concat(), skip_special)?);
        match whole.strip_prefix(stream::whole(&start)) {
            Some(text) => Ok(text.to_owned()),
            None => self.decode(ids, skip_special),
        }
    }

    /// Decodes token by token what comes after `before`, for text that is shown while it is generated.
    ///
    /// # Errors
    /// As [`decode`](Tokenizer::decode).
    pub fn decode_stream(&self, before: &[u32], skip_special: bool) -> Result<DecodeStream<'_>> {
        DecodeStream::new(self, before, skip_special)
    }

    /// One more than the largest token id: the least number of rows that an embedding for this tokenizer needs.
    pub fn vocab_size(&self) -> usize {
        self.ids
    }

    /// The id of a token, as the vocabulary spells it.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The id that stands before every text, if one does: `bos_token` of `tokenizer_config.json` where `add_bos_token` there
    /// says so, else what `tokenizer.json` puts there. [`encode`](Tokenizer::encode) leaves it to its callers.
    pub fn begin_of_text(&self) -> Option<u32> {
        self.begin
    }

    /// The id that ends a text: [`END_OF_TEXT`], else `eos_token` of `tokenizer_config.json`, else `eos_token_id` of
    /// `config.json`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the folder names none.
    pub fn end_of_text(&self) -> Result<u32> {
        self.end.ok_or_else(|| {
            self.error(format!(
                "no token ends a text: {END_OF_TEXT} is not in the vocabulary, {TOKENIZER_CONFIG} has no known \
                 \"eos_token\" and config.json no \"eos_token_id\"; add one of them"
            ))
        })
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json`, which Transformers' `AutoTokenizer` reads.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let text = self.inner.to_string(true).map_err(|e| self.error(e.to_string()))?;
        files::write_bytes(&dir.join(TOKENIZER_FILE), text.as_bytes())?;
        let mut config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": false,
        });
        if let Some(end) = self.end.and_then(|id| self.inner.id_to_token(id)) {
            for key in ["bos_token", "eos_token", "unk_token"] {
                config[key] = Value::String(end.clone());
            }
        }
        files::write_bytes(&dir.join(TOKENIZER_CONFIG), format!("{config:#}\n").as_bytes())
    }

    /// Copies the tokenizer's files, and `generation_config.json`, as far as they exist, from one model's folder to
    /// another.
    pub fn copy_files(from: &Path, to: &Path) -> Result<()> {
        for name in FILES.iter().filter(|name| from.join(name).is_file()) {
            files::copy(&from.join(name), &to.join(name))?;
        }
        Ok(())
    }

    /// What the library gives.
    fn caught<T>(&self, f: impl FnOnce(&tokenizers::Tokenizer) -> tokenizers::Result<T>) -> Result<T> {
        load::caught(|| f(&self.inner)).map_err(|problem| self.error(problem))
    }

    fn error(&self, problem: String) -> Error {
        Error::Tokenizer { path: self.path.clone(), problem }
    }
}

/// Whether the tokenizer is GPT-2's in what matters to [`pieces`]: it cuts by GPT-2's expression, and nothing before
/// or in that expression looks across a newline.
fn splits_before_newlines(inner: &tokenizers::Tokenizer) -> bool {
    let gpt2 = match inner.get_pre_tokenizer() {
        Some(PreTokenizerWrapper::ByteLevel(b)) => b.use_regex && !b.add_prefix_space,
        _ => false,
    };
    let added = inner.get_added_tokens_decoder();
    gpt2 && inner.get_normalizer().is_none()
        && added.values().all(|t| !t.lstrip && !t.rstrip && !t.single_word && !t.content.contains('\n'))
}

/// Cuts `text` into pieces of about `size` bytes that GPT-2's expression matches apart from each other.
///
/// A cut goes before a `\n` that a letter or digit follows. `\s+(?!\S)` leaves that last `\n` of a run of spaces out of
/// its match, no other branch matches across it, and at the end of a piece the same branch takes the run that remains:
/// so both sides match as they do in one piece.
fn pieces(text: &str, size: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let bytes = rest.as_bytes();
        if bytes.is_empty() {
            return None;
        }
        let cut = (size.max(1)..bytes.len().saturating_sub(1))
            .find(|&i| bytes[i] == b'\n' && bytes[i + 1].is_ascii_alphanumeric());
        let (piece, more) = rest.split_at(cut.unwrap_or(bytes.len()));
        rest = more;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_encode_as_the_whole_does() {
        let text = "a\n\nbc  \n \nd's\t\n1\r\nxé\nf\n\n\n g\nü \n\u{a0}\nh<|endoftext|>\ni";
        let tokenizer = Tokenizer::train_bpe([text, "\n\nbc \n\n\n g"].into_iter(), 280).unwrap();
        assert!(tokenizer.splits);
        let whole = tokenizer.inner.encode_fast(text, false).unwrap().get_ids().to_vec();
        for size in 1..text.len() {
            let parts: Vec<&str> = pieces(text, size).collect();
            assert_eq!(parts.concat(), text);
            let ids: Vec<u32> =
                parts.iter().flat_map(|p| tokenizer.inner.encode_fast(*p, false).unwrap().get_ids().to_vec()).collect();
            assert_eq!(ids, whole, "size {size}: {parts:?}");
        }
        assert!(pieces(text, 1).count() > 5);
        assert_eq!(pieces("", 5).count(), 0);
    }
}
