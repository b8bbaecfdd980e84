//! Where a model's folder keeps its chat template.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{ChatTemplate, TEMPLATE_FILE};
use crate::{Error, Result, config::RawConfig, files, tokenizer::TOKENIZER_CONFIG};

const KEY: &str = "chat_template";
const LEGACY_TOKENS: &str = "special_tokens_map.json";

/// The names by which templates read special tokens.
const SPECIAL: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

pub(super) fn from_dir(dir: &Path) -> Result<ChatTemplate> {
    let (own, config_file) = (dir.join(TEMPLATE_FILE), dir.join(TOKENIZER_CONFIG));
    let config = match config_file.is_file() {
        true => RawConfig::from_file(&config_file)?,
        false => RawConfig::new(&config_file, Map::new()),
    };
    let (path, source): (PathBuf, String) = match own.is_file() {
        true => (own.clone(), files::read_to_string(&own)?),
        false => (config_file, in_config(&config, dir)?),
    };
    ChatTemplate::new(path, &source, special_tokens(dir, &config)?)
}

/// The template in `tokenizer_config.json`: a string, or of several with names the one that is called `default`.
fn in_config(config: &RawConfig, dir: &Path) -> Result<String> {
    let named = |list: &[Value]| {
        let find = list.iter().find(|t| t["name"] == "default");
        find.and_then(|t| t["template"].as_str()).map(str::to_owned)
    };
    match config.value(KEY) {
        Some(Value::String(source)) => Ok(source.clone()),
        Some(Value::Array(list)) => named(list).ok_or_else(|| {
            let names: Vec<&str> = list.iter().filter_map(|t| t["name"].as_str()).collect();
            let found = if names.is_empty() { "none with a name".to_owned() } else { names.join(", ") };
            config.error(
                KEY,
                format_args!("no template is called \"default\", found {found}; write it to {TEMPLATE_FILE}"),
            )
        }),
        Some(_) => Err(config.error(KEY, "expected a template as a string, or a list of templates with names")),
        None => Err(Error::ChatTemplate {
            path: dir.to_owned(),
            line: None,
            problem: format!(
                "this model has no chat template: there is no {TEMPLATE_FILE} and no \"{KEY}\" in {TOKENIZER_CONFIG}; copy \
                 one from the model's version for conversations, or train on prompts and completions"
            ),
        }),
    }
}

/// What the tokenizer's files call their special tokens; the older file counts where the newer one lists no tokens.
fn special_tokens(dir: &Path, config: &RawConfig) -> Result<Map<String, Value>> {
    let legacy = dir.join(LEGACY_TOKENS);
    let legacy = match config.value("added_tokens_decoder").is_none() && legacy.is_file() {
        true => Some(RawConfig::from_file(&legacy)?),
        false => None,
    };
    let mut tokens = Map::new();
    for key in SPECIAL {
        let value = legacy.as_ref().and_then(|l| l.value(key)).or_else(|| config.value(key));
        let text = value.and_then(|v| v.as_str().or_else(|| v.get("content")?.as_str()));
        tokens.extend(text.map(|text| (key.to_owned(), text.into())));
    }
    Ok(tokens)
}
