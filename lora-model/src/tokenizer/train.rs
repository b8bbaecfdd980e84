use std::path::PathBuf;

use tokenizers::{
    AddedToken, ModelWrapper,
    models::{
        TrainerWrapper,
        bpe::{BPE, BpeTrainer},
    },
    pre_tokenizers::byte_level::ByteLevel,
};

use super::{END_OF_TEXT, PIECE, Tokenizer, load::byte_level, pieces};
use crate::{Error, Result};

const BYTES: usize = 256;

pub(super) fn train_bpe<S>(texts: impl Iterator<Item = S> + Send, vocab_size: usize) -> Result<Tokenizer>
where
    S: AsRef<str> + Send,
{
    let path = PathBuf::from("a new tokenizer");
    let failed = |problem: String| Error::Tokenizer { path: path.clone(), problem };
    if vocab_size <= BYTES {
        return Err(failed(format!(
            "a vocabulary of {vocab_size} tokens is too small: the {BYTES} bytes and {END_OF_TEXT} need {} already",
            BYTES + 1
        )));
    }
    // Pieces, because the memory of cutting a text into words grows with the text; owned, because the iterator of
    // texts gives each one up before the next.
    let owned = |t: S| pieces(t.as_ref(), PIECE).map(str::to_owned).collect::<Vec<_>>();
    let mut parts = texts.flat_map(owned).peekable();
    if parts.peek().is_none() {
        return Err(failed("there is no text to learn it from".to_owned()));
    }
    let mut trainer = TrainerWrapper::BpeTrainer(
        BpeTrainer::builder()
            .vocab_size(vocab_size)
            .min_frequency(2)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .build(),
    );
    let mut inner = byte_level(BPE::default());
    inner.train(&mut trainer, parts).map_err(|e| failed(e.to_string()))?;
    debug_assert!(matches!(inner.get_model(), ModelWrapper::BPE(_)));
    let end = inner.token_to_id(END_OF_TEXT);
    Tokenizer::new(inner, path.clone(), None, end)
}
