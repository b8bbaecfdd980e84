use std::{
    collections::HashSet,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::{
    AddedToken,
    models::bpe::{BPE, Merges, Vocab},
    pre_tokenizers::byte_level::ByteLevel,
};

use super::{END_OF_TEXT, TOKENIZER_CONFIG, TOKENIZER_FILE, Tokenizer};
use crate::{
    Error, Result,
    config::{CONFIG_FILE, RawConfig},
    files,
};

pub(super) fn from_dir(dir: &Path) -> Result<Tokenizer> {
    let json = dir.join(TOKENIZER_FILE);
    let (vocab, merges) = (dir.join("vocab.json"), dir.join("merges.txt"));
    let (path, inner) = if json.is_file() {
        (json.clone(), from_json(&json)?)
    } else if vocab.is_file() && merges.is_file() {
        check_class(dir, &vocab)?;
        let mut inner = from_vocab_and_merges(&vocab, &merges)?;
        add_tokens(&mut inner, &dir.join("added_tokens.json"))?;
        (vocab, inner)
    } else {
        let problem = format!(
            "no tokenizer here; looked for {TOKENIZER_FILE}, and for vocab.json with merges.txt: copy them from the \
             model that the weights come from"
        );
        return Err(Error::Tokenizer { path: dir.to_owned(), problem });
    };
    let (begin, end) = (begin_of_text(dir, &inner, &path)?, end_of_text(dir, &inner)?);
    Tokenizer::new(inner, path, begin, end)
}

/// Refuses a vocabulary with merges whose tokenizer cuts texts in another way than GPT-2's, as far as the folder tells.
fn check_class(dir: &Path, vocab: &Path) -> Result<()> {
    let of = |file: &str, key: &str| -> Result<Option<String>> {
        let path = dir.join(file);
        let raw = if path.is_file() { Some(RawConfig::from_file(&path)?) } else { None };
        Ok(raw.as_ref().and_then(|raw| raw.value(key)?.as_str()).map(str::to_owned))
    };
    let (class, model) = (of(TOKENIZER_CONFIG, "tokenizer_class")?, of(CONFIG_FILE, "model_type")?);
    let own = match (&class, &model) {
        (Some(class), _) => {
            ["GPT2", "Roberta"].iter().any(|own| class.trim_end_matches("Fast") == format!("{own}Tokenizer"))
        }
        (None, Some(model)) => ["gpt2", "roberta"].contains(&model.as_str()),
        (None, None) => true,
    };
    if own {
        return Ok(());
    }
    let problem = format!(
        "these files do not say how {} cuts texts into words, which is not GPT-2's way: copy {TOKENIZER_FILE} beside them",
        class.or(model).unwrap_or_default()
    );
    Err(Error::Tokenizer { path: vocab.into(), problem })
}

/// A byte-level BPE with GPT-2's way of cutting text into words.
pub(super) fn byte_level(model: BPE) -> tokenizers::Tokenizer {
    let mut inner = tokenizers::Tokenizer::new(model);
    inner.with_pre_tokenizer(Some(ByteLevel::default().add_prefix_space(false)));
    inner.with_post_processor(Some(ByteLevel::default().trim_offsets(false)));
    inner.with_decoder(Some(ByteLevel::default()));
    inner
}

fn from_json(path: &Path) -> Result<tokenizers::Tokenizer> {
    let text = files::read_to_string(path)?;
    check_prefix(path, &text)?;
    let mut inner: tokenizers::Tokenizer =
        caught(|| text.parse()).map_err(|problem| bad(path, format!("not a tokenizer file: {problem}")))?;
    // What the file says of lengths is of no use here, and may not even be possible.
    inner.with_truncation(None).map_err(|e| bad(path, e.to_string()))?;
    Ok(inner)
}

/// What `f` gives of the library, which panics over some damaged files rather than say what is wrong with them.
pub(super) fn caught<T>(f: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(e)) => Err(e.to_string()),
        Err(panic) => {
            let said = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            Err(format!("a part of it makes no sense to the library ({}); correct it", said.unwrap_or("it panicked")))
        }
    }
}

/// Refuses a `continuing_subword_prefix` that a merge's second half does not begin with: the library would cut that
/// half at a byte that need not exist.
fn check_prefix(path: &Path, text: &str) -> Result<()> {
    #[derive(Deserialize)]
    struct File {
        model: Model,
    }
    #[derive(Deserialize)]
    struct Model {
        continuing_subword_prefix: Option<String>,
    }
    let prefix = match serde_json::from_str::<File>(text) {
        Ok(File { model: Model { continuing_subword_prefix: Some(prefix) } }) if !prefix.is_empty() => prefix,
        // Anything else that may be wrong with the file is told by the library.
        _ => return Ok(()),
    };
    let file: Value = serde_json::from_str(text).map_err(|e| bad(path, format!("not valid JSON: {e}")))?;
    for merge in file["model"]["merges"].as_array().into_iter().flatten() {
        let second = match merge {
            Value::String(s) => s.split(' ').nth(1),
            pair => pair[1].as_str(),
        };
        if !second.is_some_and(|s| s.starts_with(&prefix)) {
            return Err(bad(path, format!("merge {merge} does not continue with the prefix {prefix:?}")));
        }
    }
    Ok(())
}

fn from_vocab_and_merges(vocab_file: &Path, merges_file: &Path) -> Result<tokenizers::Tokenizer> {
    let vocab = read_vocab(vocab_file)?;
    let merges = read_merges(merges_file, &vocab)?;
    let missing = ByteLevel::alphabet().into_iter().filter(|c| !vocab.contains_key(&c.to_string())).count();
    if missing > 0 {
        tracing::warn!("{}: {missing} of 256 bytes have no token; text with them loses them", vocab_file.display());
    }
    let end = vocab.contains_key(END_OF_TEXT);
    let model = BPE::builder().vocab_and_merges(vocab, merges).build().map_err(|e| bad(merges_file, e.to_string()))?;
    let mut inner = byte_level(model);
    if end {
        inner.add_special_tokens(&[AddedToken::from(END_OF_TEXT, true)]);
    }
    Ok(inner)
}

fn read_vocab(path: &Path) -> Result<Vocab> {
    let raw = RawConfig::from_file(path).map_err(|e| match e {
        Error::Config { path, problem } => Error::Tokenizer { path, problem },
        e => e,
    })?;
    let mut seen = HashSet::new();
    let mut vocab = Vocab::with_capacity(raw.keys().len());
    for (token, id) in raw.keys() {
        let Some(n) = id.as_u64().and_then(|n| u32::try_from(n).ok()) else {
            return Err(bad(path, format!("token {token:?} has the id {id}; ids are whole numbers below 2^32")));
        };
        if !seen.insert(n) {
            return Err(bad(path, format!("id {n} is given twice, the second time to token {token:?}")));
        }
        vocab.insert(token.clone(), n);
    }
    if vocab.is_empty() { Err(bad(path, "the vocabulary is empty".to_owned())) } else { Ok(vocab) }
}

fn read_merges(path: &Path, vocab: &Vocab) -> Result<Merges> {
    let text = files::read_to_string(path)?;
    let mut merges = Merges::new();
    for (i, line) in text.lines().enumerate() {
        if line.is_empty() || (i == 0 && line.starts_with("#version")) {
            continue;
        }
        let Some((a, b)) = line.split_once(' ').filter(|(a, b)| !a.is_empty() && !b.is_empty() && !b.contains(' '))
        else {
            return Err(bad(path, format!("line {}: expected two tokens and one space, found {line:?}", i + 1)));
        };
        if let Some(t) = [a, b, &format!("{a}{b}")].into_iter().find(|t| !vocab.contains_key(*t)) {
            return Err(bad(path, format!("line {}: token {t:?} is not in vocab.json", i + 1)));
        }
        merges.push((a.to_owned(), b.to_owned()));
    }
    Ok(merges)
}

/// `added_tokens.json`, where it exists: tokens beyond the vocabulary, each with the id it must get.
fn add_tokens(inner: &mut tokenizers::Tokenizer, path: &Path) -> Result<()> {
    if !path.is_file() {
        return Ok(());
    }
    let raw = RawConfig::from_file(path)?;
    let mut tokens: Vec<(&String, &Value)> = raw.keys().iter().collect();
    tokens.sort_by_key(|(_, id)| id.as_u64());
    for (token, id) in tokens {
        inner.add_special_tokens(&[AddedToken::from(token.as_str(), true)]);
        let got = inner.token_to_id(token);
        if got.map(u64::from) != id.as_u64() {
            return Err(bad(path, format!("token {token:?} has the id {id}, but the next free one is {got:?}")));
        }
    }
    Ok(())
}

fn begin_of_text(dir: &Path, inner: &tokenizers::Tokenizer, path: &Path) -> Result<Option<u32>> {
    let config = dir.join(TOKENIZER_CONFIG);
    if config.is_file() {
        let raw = RawConfig::from_file(&config)?;
        match (raw.bool("add_bos_token")?, special(&raw, "bos_token", inner)) {
            (Some(true), Some(id)) => return Ok(Some(id)),
            (Some(false), _) => return Ok(None),
            _ => {}
        }
    }
    let ids = |special| {
        let encoding = caught(|| inner.encode_fast("a", special)).map_err(|problem| bad(path, problem))?;
        Ok::<_, Error>(encoding.get_ids().to_vec())
    };
    let (with, without) = (ids(true)?, ids(false)?);
    Ok(match with.split_first() {
        Some((&first, rest)) if rest.starts_with(&without) && with.len() > without.len() => Some(first),
        _ => None,
    })
}

/// The id of a token that `tokenizer_config.json` names.
fn special(raw: &RawConfig, key: &str, inner: &tokenizers::Tokenizer) -> Option<u32> {
    let token = match raw.value(key)? {
        Value::Object(token) => token.get("content")?.as_str(),
        token => token.as_str(),
    };
    inner.token_to_id(token?)
}

fn end_of_text(dir: &Path, inner: &tokenizers::Tokenizer) -> Result<Option<u32>> {
    if let Some(id) = inner.token_to_id(END_OF_TEXT) {
        return Ok(Some(id));
    }
    let config = dir.join(TOKENIZER_CONFIG);
    if config.is_file()
        && let Some(id) = special(&RawConfig::from_file(&config)?, "eos_token", inner)
    {
        return Ok(Some(id));
    }
    if !dir.join(crate::config::CONFIG_FILE).is_file() {
        return Ok(None);
    }
    let raw = RawConfig::from_dir(dir)?;
    let id = match raw.value("eos_token_id") {
        Some(Value::Array(ids)) => ids.first().and_then(Value::as_u64),
        Some(id) => id.as_u64(),
        None => None,
    };
    Ok(id.and_then(|id| u32::try_from(id).ok()).filter(|&id| inner.id_to_token(id).is_some()))
}

fn bad(path: &Path, problem: String) -> Error {
    Error::Tokenizer { path: PathBuf::from(path), problem }
}
