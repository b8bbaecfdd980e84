use std::path::Path;

use serde_json::Value;

use crate::{Result, config::RawConfig};

/// How to generate, beside a model's configuration.
const GENERATION_FILE: &str = "generation_config.json";

/// What `generation_config.json` of a model's folder says of generation that Transformers would do without being asked, as
/// `key = value`: here it is [`GenerationConfig`](super::GenerationConfig) alone that says how.
///
/// # Errors
/// A file that cannot be read.
pub fn unasked(dir: &Path) -> Result<Vec<String>> {
    let file = dir.join(GENERATION_FILE);
    if !file.is_file() {
        return Ok(Vec::new());
    }
    let raw = RawConfig::from_file(&file)?;
    let drawn = raw.value("do_sample") == Some(&Value::Bool(true));
    const OF_DRAWING: [&str; 4] = ["temperature", "top_k", "top_p", "min_p"];
    const NEUTRAL: [(&str, Option<f64>); 14] = [
        ("do_sample", None),
        ("temperature", Some(1.0)),
        ("top_k", Some(50.0)),
        ("top_p", Some(1.0)),
        ("min_p", Some(0.0)),
        ("repetition_penalty", Some(1.0)),
        ("no_repeat_ngram_size", Some(0.0)),
        ("num_beams", Some(1.0)),
        ("length_penalty", Some(1.0)),
        ("min_length", Some(0.0)),
        ("min_new_tokens", Some(0.0)),
        ("bad_words_ids", None),
        ("suppress_tokens", None),
        ("forced_eos_token_id", None),
    ];
    let told = |(key, neutral): (&str, Option<f64>)| {
        let value = raw.value(key).filter(|v| !matches!(v, Value::Null | Value::Bool(false)))?;
        let asks = neutral.is_none_or(|n| value.as_f64() != Some(n)) && (drawn || !OF_DRAWING.contains(&key));
        asks.then(|| format!("{key} = {value}"))
    };
    Ok(NEUTRAL.into_iter().filter_map(told).collect())
}

/// The tokens that end a text of the model in a folder: `eos_token_id` of `generation_config.json`, else that of
/// `config.json`, as in Transformers; each may list several, such as the end of a text and that of a turn in a
/// conversation. None where neither names any.
///
/// # Errors
/// A file that cannot be read, or a value that is no token id, naming file and key.
pub fn end_tokens(dir: &Path) -> Result<Vec<u32>> {
    const KEY: &str = "eos_token_id";
    let file = dir.join(GENERATION_FILE);
    let own = match file.is_file() {
        true => RawConfig::from_file(&file)?.tokens(KEY)?,
        false => None,
    };
    match own {
        Some(ids) => Ok(ids),
        None => Ok(RawConfig::from_dir(dir)?.tokens(KEY)?.unwrap_or_default()),
    }
}
