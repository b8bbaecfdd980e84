use std::path::Path;

use crate::{Result, config::RawConfig};

/// How to generate, beside a model's configuration.
const GENERATION_FILE: &str = "generation_config.json";

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
