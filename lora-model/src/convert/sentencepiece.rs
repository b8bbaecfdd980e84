use std::{
    collections::{HashMap, HashSet},
    fs,
    path::Path,
};

use serde_json::{Map, Value, json};

use crate::{Error, Result};

/// The first three tokens, as Hugging Face spells them.
pub(super) const SPECIAL: [&str; 3] = ["<unk>", "<s>", "</s>"];
/// The token of byte 0; the others follow.
const FIRST_BYTE: usize = SPECIAL.len();
const FIRST_PIECE: usize = FIRST_BYTE + 256;
/// SentencePiece's space.
const SPACE: &str = "▁";

/// A vocabulary of SentencePiece's BPE as llama2.c stores it (`tokenizer.bin`): the longest piece's length as i32, then for
/// each piece its score as f32, its length as i32, and its UTF-8.
#[derive(Clone, Debug)]
pub struct Vocabulary {
    pieces: Vec<Piece>,
}

#[derive(Clone, Debug)]
struct Piece {
    text: String,
    score: f32,
}

impl Vocabulary {
    /// Reads the vocabulary of a model that has `size` tokens.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] for a file that is damaged, holds fewer or more tokens, lacks a byte, or has a piece twice;
    /// [`Error::Io`].
    pub fn open(path: &Path, size: usize) -> Result<Vocabulary> {
        let bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
        parse(&bytes, size).map_err(|problem| Error::Tokenizer { path: path.to_owned(), problem })
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.pieces.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// `tokenizer.json` of a BPE that encodes as llama2.c does: a space before the text, then single characters (bytes
    /// where there is no piece for one), of which the pair whose piece has the highest score is joined until there is
    /// none, the leftmost first. [`BOS`](super::BOS) comes before the text where special tokens are asked for.
    ///
    /// A BPE here joins in the order of a list of pairs, so that two ways to make one and the same piece (`aa`·`a` and
    /// `a`·`aa`) come one after the other, the longer left part first, wherever they stand.
    pub(super) fn to_json(&self) -> Value {
        let bos = json!({"SpecialToken": {"id": SPECIAL[1], "type_id": 0}});
        let sequence = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
        let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
        let special = |id: usize| {
            json!({"id": id, "content": SPECIAL[id], "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        };
        let vocab: Map<String, Value> =
            self.pieces.iter().enumerate().map(|(id, piece)| (piece.text.clone(), id.into())).collect();
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": [special(0), special(1), special(2)],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                replace(" ", SPACE),
            ]},
            "pre_tokenizer": null,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [bos, sequence("A")],
                "pair": [bos, sequence("A"), bos, sequence("B")],
                "special_tokens": {SPECIAL[1]: {"id": SPECIAL[1], "ids": [super::BOS], "tokens": [SPECIAL[1]]}},
            },
            "decoder": {"type": "Sequence", "decoders": [
                replace(SPACE, " "),
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ]},
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": SPECIAL[0],
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": true,
                "byte_fallback": true,
                "ignore_merges": false,
                "vocab": vocab,
                "merges": self.merges(),
            },
        })
    }

    /// All pairs of pieces that make a piece, the one with the highest score first.
    fn merges(&self) -> Vec<[&str; 2]> {
        let pieces = &self.pieces[FIRST_PIECE..];
        let known: HashSet<&str> = pieces.iter().map(|p| p.text.as_str()).collect();
        let mut order: Vec<&Piece> = pieces.iter().collect();
        // Stable: of equal scores the lower id.
        order.sort_by(|a, b| b.score.total_cmp(&a.score));
        let mut merges = Vec::new();
        for piece in order {
            let cuts: Vec<usize> = piece.text.char_indices().map(|(at, _)| at).skip(1).collect();
            for at in cuts.into_iter().rev() {
                let (left, right) = piece.text.split_at(at);
                if known.contains(left) && known.contains(right) {
                    merges.push([left, right]);
                }
            }
        }
        merges
    }
}

fn parse(bytes: &[u8], size: usize) -> std::result::Result<Vocabulary, String> {
    let mut rest = bytes;
    let mut take = |n: usize, what: &str| -> std::result::Result<&[u8], String> {
        let at = bytes.len() - rest.len();
        let (taken, more) =
            rest.split_at_checked(n).ok_or_else(|| format!("it ends within {what}, at byte {at}: fetch it again"))?;
        rest = more;
        Ok(taken)
    };
    let int = |b: &[u8]| i32::from_le_bytes(b.try_into().expect("four bytes"));
    let longest = int(take(4, "the length of its longest piece")?);
    let mut pieces: Vec<Piece> = Vec::new();
    let mut ids: HashMap<String, usize> = HashMap::new();
    for id in 0..size {
        let what = format!("token {id} of the model's {size}");
        let score = f32::from_bits(int(take(4, &what)?) as u32);
        let length = int(take(4, &what)?);
        if !(0..=longest).contains(&length) || !score.is_finite() {
            return Err(format!(
                "{what} has the length {length} and the score {score}; is it a vocabulary of llama2.c?"
            ));
        }
        let text = std::str::from_utf8(take(length as usize, &what)?)
            .map_err(|_| format!("{what} is not UTF-8; is it a vocabulary of llama2.c?"))?;
        let text = match SPECIAL.get(id) {
            // llama2.c has line breaks around some of them.
            Some(special) => fixed(text.trim(), special, &what)?,
            None if id < FIRST_PIECE => fixed(text, &format!("<0x{:02X}>", id - FIRST_BYTE), &what)?,
            None => text.replace(' ', SPACE),
        };
        if text.is_empty() {
            return Err(format!("{what} is empty"));
        }
        if let Some(other) = ids.insert(text.clone(), id) {
            return Err(format!("{what} is {text:?}, as token {other} is"));
        }
        pieces.push(Piece { text, score });
    }
    if size < FIRST_PIECE {
        return Err(format!("the model's {size} tokens are too few for the {FIRST_PIECE} special ones and bytes"));
    }
    match rest.len() {
        0 => Ok(Vocabulary { pieces }),
        n => Err(format!("{n} bytes follow the model's {size} tokens; it is the vocabulary of another model")),
    }
}

/// A token that stands in this place of every vocabulary.
fn fixed(found: &str, expected: &str, what: &str) -> std::result::Result<String, String> {
    match found == expected {
        true => Ok(expected.to_owned()),
        false => Err(format!("{what} is {found:?} in place of {expected}; is it a vocabulary of llama2.c?")),
    }
}
