//! Texts and pairs of texts as encoders read them: between the tokens that begin, separate and end them.

use std::path::Path;

use serde_json::Value;
use tokenizers::{
    PostProcessor,
    utils::truncation::{TruncationDirection, TruncationParams, TruncationStrategy, truncate_encodings},
};

use super::{TOKENIZER_CONFIG, Tokenizer};
use crate::{Result, config::RawConfig};

/// A text or a pair as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Joined {
    /// The tokens, with those around the texts.
    pub ids: Vec<u32>,
    /// Index of the first token of the second segment, as the tokenizer counts segments; their number where there is one.
    pub second_from: usize,
    /// Whether something was left out.
    pub cut: bool,
}

/// How a tokenizer joins texts.
#[derive(Clone, Debug)]
pub struct Joiner {
    tokenizer: Tokenizer,
    around: Around,
}

/// What stands around texts.
#[derive(Clone, Copy, Debug)]
enum Around {
    /// What the tokenizer's own post-processor puts there.
    PostProcessor,
    /// `[CLS] text [SEP]` and `[CLS] text [SEP] second [SEP]`; RoBERTa separates by two.
    Tokens { cls: u32, sep: u32, separators: usize },
}

impl Tokenizer {
    /// How the tokenizer of a folder joins texts: by its post-processor, or, where that adds nothing, by the tokens that
    /// `tokenizer_config.json` or `special_tokens_map.json` names as `cls_token` and `sep_token`, or by `[CLS]` and `[SEP]`
    /// or `<s>` and `</s>` of the vocabulary.
    ///
    /// # Errors
    /// [`Error::Tokenizer`](crate::Error::Tokenizer) when there are none of these.
    pub fn joiner(self, dir: &Path) -> Result<Joiner> {
        let around = match self.inner.get_post_processor().map_or(0, |p| p.added_tokens(true)) {
            0 => tokens(&self, dir)?,
            _ => Around::PostProcessor,
        };
        Ok(Joiner { tokenizer: self, around })
    }
}

fn tokens(tokenizer: &Tokenizer, dir: &Path) -> Result<Around> {
    let id = |token: &str| tokenizer.inner.token_to_id(token);
    let mut found = None;
    for file in [TOKENIZER_CONFIG, "special_tokens_map.json"] {
        let path = dir.join(file);
        if found.is_some() || !path.is_file() {
            continue;
        }
        let raw = RawConfig::from_file(&path)?;
        let named = |key: &str| match raw.value(key) {
            Some(Value::Object(token)) => token.get("content").and_then(Value::as_str),
            token => token.and_then(Value::as_str),
        };
        found = named("cls_token").and_then(id).zip(named("sep_token").and_then(id));
    }
    let known = || [("[CLS]", "[SEP]"), ("<s>", "</s>")].into_iter().find_map(|(cls, sep)| id(cls).zip(id(sep)));
    let Some((cls, sep)) = found.or_else(known) else {
        return Err(tokenizer.error(format!(
            "no tokens stand around a text: it has no post-processor, {TOKENIZER_CONFIG} no \"cls_token\" and \"sep_token\", \
             and the vocabulary neither [CLS] and [SEP] nor <s> and </s>; add one of them"
        )));
    };
    let separators = if id("</s>") == Some(sep) { 2 } else { 1 };
    Ok(Around::Tokens { cls, sep, separators })
}

impl Joiner {
    /// How many tokens stand around a text, or a pair.
    pub fn around(&self, pair: bool) -> usize {
        match (self.around, pair) {
            (Around::PostProcessor, _) => self.tokenizer.inner.get_post_processor().map_or(0, |p| p.added_tokens(pair)),
            (Around::Tokens { .. }, false) => 2,
            (Around::Tokens { separators, .. }, true) => 2 + separators,
        }
    }

    /// The tokens of a text or a pair, at most `max_length`: of a pair the longer text loses its end first, as with
    /// Transformers' `truncation=True`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`](crate::Error::Tokenizer): `max_length` leaves no room for text, or the second segment is not a run at the end.
    pub fn join(&self, text: &str, second: Option<&str>, max_length: usize) -> Result<Joined> {
        let failed = |e: tokenizers::Error| self.tokenizer.error(e.to_string());
        let encode = |text: &str| self.tokenizer.caught(|inner| inner.encode_fast(text, false));
        let (a, b) = (encode(text)?, second.map(encode).transpose()?);
        let around = self.around(b.is_some());
        let room = max_length.checked_sub(around).filter(|room| *room > usize::from(b.is_some())).ok_or_else(|| {
            self.tokenizer.error(format!("{max_length} tokens leave no room for text beside the {around} around it"))
        })?;
        let cut = a.len() + b.as_ref().map_or(0, |b| b.len()) > room;
        let params = TruncationParams {
            max_length: room,
            strategy: TruncationStrategy::LongestFirst,
            stride: 0,
            direction: TruncationDirection::Right,
        };
        let (a, b) = truncate_encodings(a, b, &params).map_err(failed)?;
        let (ids, second_from) = match self.around {
            Around::Tokens { cls, sep, separators } => {
                let mut ids = vec![cls];
                ids.extend(a.get_ids());
                ids.push(sep);
                let mut second_from = ids.len();
                if let Some(b) = b {
                    ids.extend(std::iter::repeat_n(sep, separators - 1));
                    second_from = ids.len();
                    ids.extend(b.get_ids());
                    ids.push(sep);
                }
                // RoBERTa has one segment.
                let second_from = if separators == 1 { second_from } else { ids.len() };
                (ids, second_from)
            }
            Around::PostProcessor => {
                let joined = self.tokenizer.caught(|inner| inner.post_process(a, b, true))?;
                let types = joined.get_type_ids();
                let second_from = types.iter().position(|t| *t != 0).unwrap_or(types.len());
                if types[second_from..].iter().any(|t| *t != 1) {
                    let problem = "its post-processor gives segments other than one run of 0 and one of 1 after it, which no \
                                   model here reads";
                    return Err(self.tokenizer.error(problem.to_owned()));
                }
                (joined.get_ids().to_vec(), second_from)
            }
        };
        Ok(Joined { ids, second_from, cut })
    }
}
