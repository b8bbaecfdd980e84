//! Files to examples.

use std::path::Path;

use serde_json::{Map, Value};

use super::chat::{MESSAGES, conversation};
use super::error::start_of;
use super::{Content, Corpus, Error, Example, Format, Result};

/// Reads a file.
///
/// A byte-order mark and CRLF line ends are accepted, blank lines are skipped. Nothing of a faulty file is used: the
/// first fault is an error that names its line.
///
/// # Errors
/// A missing, non-UTF-8 or empty file; in E2E a line without `||` or without a reference; in JSONL a line that is not
/// JSON, or not an object with the strings `prompt` and `completion`, the string `text` or the list `messages` (two at once
/// are an error too, since only one could be meant), with a blank completion or text, or with messages that are none or
/// among which the assistant says nothing; [`Error::NeedsTask`] for columns ([`read_task`](super::read_task) reads those).
pub fn read(path: impl AsRef<Path>, format: Format) -> Result<Corpus> {
    parse(path.as_ref(), format, true)
}

/// Reads a file of prompts to continue: as [`read`], but a reference or completion may be empty, and in JSONL absent, and a
/// conversation need not have been answered.
///
/// # Errors
/// As of [`read`] otherwise.
pub fn read_prompts(path: impl AsRef<Path>, format: Format) -> Result<Corpus> {
    parse(path.as_ref(), format, false)
}

/// What each line of a file of JSON lines has under a key that no content uses, in the order of [`read`]'s examples; `None`
/// where it is not there, or null.
///
/// # Errors
/// A file that is not UTF-8 or empty, a line that is no JSON object, or that has something else than a string there.
pub fn read_key(path: impl AsRef<Path>, key: &str) -> Result<Vec<Option<String>>> {
    let path = path.as_ref();
    let text = text_of(path)?;
    let body = text.strip_prefix('\u{feff}').unwrap_or(&text);
    lines(body)
        .map(|(line, text)| match object(path, line, text, false)?.remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => {
                let found = format!("\"{key}\" is {} in place of a string", kind(&other));
                Err(Error::NotAnExample { path: path.to_owned(), line, found })
            }
        })
        .collect()
}

/// `whole`: a pair needs both of its sides.
fn parse(path: &Path, format: Format, whole: bool) -> Result<Corpus> {
    let text = text_of(path)?;
    // A mark in the middle of a file is a character like any other; only at its start does it say "UTF-8".
    let body = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let examples = match format {
        Format::Text => vec![Example { line: 1, content: Content::Text(body.replace("\r\n", "\n")) }],
        Format::E2e => by_line(body, |line, text| e2e(path, line, text, whole))?,
        Format::Jsonl => {
            let array = body.trim_start().starts_with('[');
            by_line(body, |line, text| jsonl(path, line, text, array, whole))?
        }
        Format::Tsv => return Err(Error::NeedsTask { path: path.to_owned() }),
    };
    Ok(Corpus { path: path.to_owned(), format, examples })
}

/// The text of a file that has some, with its byte-order mark.
pub(super) fn text_of(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
    let text = utf8(path, bytes)?;
    if text.strip_prefix('\u{feff}').unwrap_or(&text).trim().is_empty() {
        return Err(Error::Empty { path: path.to_owned(), bytes: text.len() });
    }
    Ok(text)
}

pub(super) fn utf8(path: &Path, bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| {
        let offset = e.utf8_error().valid_up_to();
        let line = 1 + e.as_bytes()[..offset].iter().filter(|&&b| b == b'\n').count();
        Error::NotUtf8 { path: path.to_owned(), line, offset, byte: e.as_bytes()[offset] }
    })
}

pub(super) fn by_line(text: &str, parse: impl Fn(usize, &str) -> Result<Content>) -> Result<Vec<Example>> {
    lines(text).map(|(line, text)| Ok(Example { line, content: parse(line, text)? })).collect()
}

/// The lines that are not blank, with their numbers from 1.
fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(|(i, text)| (i + 1, text))
}

fn e2e(path: &Path, line: usize, text: &str, whole: bool) -> Result<Content> {
    let Some((prompt, completion)) = text.split_once("||") else {
        return Err(Error::NoSeparator { path: path.to_owned(), line, start: start_of(text) });
    };
    if whole && completion.trim().is_empty() {
        return Err(empty_target(path, line, "reference", text));
    }
    Ok(pair(prompt, completion))
}

fn pair(prompt: &str, completion: &str) -> Content {
    Content::Pair { prompt: prompt.trim().to_owned(), completion: completion.trim().to_owned() }
}

fn empty_target(path: &Path, line: usize, part: &'static str, text: &str) -> Error {
    Error::EmptyTarget { path: path.to_owned(), line, part, start: start_of(text) }
}

/// The object that is a line; `array`: the file looks like one JSON array.
pub(super) fn object(path: &Path, line: usize, text: &str, array: bool) -> Result<Map<String, Value>> {
    let value: Value = serde_json::from_str(text).map_err(|e| Error::Json {
        path: path.to_owned(),
        line,
        column: e.column(),
        message: without_position(&e.to_string()),
        array,
    })?;
    match value {
        Value::Object(object) => Ok(object),
        other => Err(Error::NotAnObject { path: path.to_owned(), line, found: kind(&other), array }),
    }
}

fn jsonl(path: &Path, line: usize, text: &str, array: bool, whole: bool) -> Result<Content> {
    let object = object(path, line, text, array)?;
    if object.contains_key(MESSAGES) {
        return conversation(path, line, &object, whole);
    }
    let not = |found: String| Error::NotAnExample { path: path.to_owned(), line, found };
    let string = |key: &str| match object.get(key) {
        None => Ok(None),
        Some(Value::String(s)) => Ok(Some(s.as_str())),
        Some(other) => Err(not(format!("\"{key}\" is {} in place of a string", kind(other)))),
    };
    match (string("prompt")?, string("completion")?, string("text")?) {
        (Some(prompt), completion, None) if !whole => Ok(pair(prompt, completion.unwrap_or_default())),
        (Some(_), Some(completion), None) if completion.trim().is_empty() => {
            Err(empty_target(path, line, "completion", text))
        }
        (Some(prompt), Some(completion), None) => Ok(pair(prompt, completion)),
        (None, None, Some(t)) if t.trim().is_empty() => Err(empty_target(path, line, "text", text)),
        (None, None, Some(t)) => Ok(Content::Text(t.to_owned())),
        (None, None, None) if object.is_empty() => Err(not("the object is empty".into())),
        (_, _, Some(_)) => {
            Err(not("both \"text\" and parts of a prompt/completion pair are there; which is meant?".into()))
        }
        _ => {
            let keys: Vec<String> = object.keys().take(8).map(|k| format!("\"{}\"", start_of(k))).collect();
            Err(not(format!("found only the keys {}", keys.join(", "))))
        }
    }
}

/// Each line is parsed alone, so the parser's own "at line 1 column 7" would mislead; file and line stand in front.
fn without_position(message: &str) -> String {
    message.rsplit_once(" at line ").map_or(message, |(what, _)| what).to_owned()
}

pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
