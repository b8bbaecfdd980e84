//! The files of tasks to examples.

use std::path::Path;

use serde_json::{Map, Value};

use super::{
    Answer, Content, Corpus, Error, Example, Format, Result, TaskKind, TaskRow,
    error::start_of,
    read::{by_line, kind, object, read, text_of},
    task::Second,
};

/// Reads a file of labelled examples: tab-separated columns, or JSON lines. Of a task of completions, pairs as [`read`]
/// has them.
///
/// Columns are found by their headings where the first line has them; one that has some of them and not all is refused.
/// Nothing is quoted: a quotation mark is a character like any other, as the publishers of these files mean it. A
/// byte-order mark and CRLF line ends are accepted, blank lines are skipped, spaces around a field do not count.
///
/// In JSON lines the keys are the headings; a label may be a string, a number, or a truth value (1 or 0), and of a task
/// that knows its labels also the number of one.
///
/// # Errors
/// A missing, non-UTF-8 or empty file; a column that is not there; a row with another number of columns than the first;
/// an example without text or label; a number that is none; of completions, those of [`read`], and text without a prompt.
pub fn read_task(path: impl AsRef<Path>, task: &'static TaskRow, format: Format) -> Result<Corpus> {
    let path = path.as_ref();
    if task.kind == TaskKind::Completions {
        return pairs(path, task, format);
    }
    let text = text_of(path)?;
    let body = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let examples = match format {
        Format::Tsv => tsv(path, body, task)?,
        Format::Jsonl => by_line(body, |line, text| json(path, line, text, body, task))?,
        Format::E2e | Format::Text => return Err(Error::NoAnswers { path: path.to_owned(), format, task: task.name }),
    };
    if examples.is_empty() {
        return Err(Error::NoRows { path: path.to_owned() });
    }
    Ok(Corpus { path: path.to_owned(), format, examples })
}

fn pairs(path: &Path, task: &'static TaskRow, format: Format) -> Result<Corpus> {
    if !matches!(format, Format::E2e | Format::Jsonl) {
        return Err(Error::NoPrompts { path: path.to_owned(), format, task: task.name });
    }
    let corpus = read(path, format)?;
    let found = |content: &Content| match content {
        Content::Pair { .. } => None,
        Content::Chat(_) => Some("a conversation"),
        Content::Text(_) | Content::Labelled { .. } => Some("a text without a prompt"),
    };
    match corpus.examples.iter().find_map(|e| Some((e.line, found(&e.content)?))) {
        Some((line, found)) => Err(Error::NoPrompt { path: path.to_owned(), line, task: task.name, found }),
        None => Ok(corpus),
    }
}

/// Where the parts of an example stand.
struct Columns {
    first: usize,
    second: Option<usize>,
    answer: usize,
    count: usize,
}

fn tsv(path: &Path, body: &str, task: &'static TaskRow) -> Result<Vec<Example>> {
    let mut lines = body.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).peekable();
    let Some(&(at, first)) = lines.peek() else { return Ok(Vec::new()) };
    let fields: Vec<&str> = first.split('\t').map(str::trim).collect();
    let headed = headed(task, &fields);
    let headless = headed.is_none();
    if !headless {
        lines.next();
    }
    let partly = || task.headings().any(|heading| position(&fields, heading).is_some());
    let columns = headed.or_else(|| bare(task, fields.len()).filter(|_| !partly()));
    let columns = columns.ok_or_else(|| no_column(path, at + 1, task, &fields))?;
    let mut examples = Vec::new();
    let mut short = 0;
    for (i, text) in lines {
        let line = i + 1;
        let fields: Vec<&str> = text.split('\t').map(str::trim).collect();
        if fields.len() != columns.count {
            if task.skips_short_rows && fields.len() < columns.count {
                short += 1;
                continue;
            }
            let (path, start) = (path.to_owned(), start_of(text));
            return Err(Error::Ragged { path, line, found: fields.len(), expected: columns.count, start });
        }
        let answer = answer(path, line, columns.answer + 1, task, Raw::Text(fields[columns.answer]))?;
        let second = columns.second.map(|c| fields[c].to_owned());
        examples.push(example(path, line, text, fields[columns.first].to_owned(), second, answer)?);
    }
    if short > 0 {
        tracing::warn!("{}: passed over {short} rows that are cut short", path.display());
    }
    if headless
        && task.kind == TaskKind::Labels(&[])
        && let Some(label) = lone_label(&examples)
    {
        tracing::warn!(
            "{}:{}: no other line has the label \"{}\"; if these are headings, call the columns {}",
            path.display(),
            at + 1,
            start_of(label),
            [task.first, task.answer].map(|names| names[0]).join(" and ")
        );
    }
    Ok(examples)
}

/// The label of the first of several examples, where no other has it.
fn lone_label(examples: &[Example]) -> Option<&str> {
    let mut labels = examples.iter().filter_map(|e| match &e.content {
        Content::Labelled { answer: Answer::Label(name), .. } => Some(name.as_str()),
        _ => None,
    });
    let first = labels.next()?;
    (examples.len() > 2 && labels.all(|other| other != first)).then_some(first)
}

/// The column of a heading.
fn position(fields: &[&str], heading: &str) -> Option<usize> {
    fields.iter().position(|f| f.eq_ignore_ascii_case(heading))
}

/// The columns by their headings, where all that are needed are there.
fn headed(task: &TaskRow, fields: &[&str]) -> Option<Columns> {
    let find = |names: &[&str]| names.iter().find_map(|name| position(fields, name));
    let second = find(task.second.headings());
    if matches!(task.second, Second::Yes(_)) && second.is_none() {
        return None;
    }
    Some(Columns { first: find(task.first)?, second, answer: find(task.answer)?, count: fields.len() })
}

/// The columns of a file without headings.
fn bare(task: &TaskRow, count: usize) -> Option<Columns> {
    let (_, [first, second, answer]) = task.bare.iter().find(|(n, _)| *n == count)?;
    Some(Columns { first: (*first)?, second: *second, answer: (*answer)?, count })
}

fn no_column(path: &Path, line: usize, task: &'static TaskRow, found: &[&str]) -> Error {
    let second = if let Second::Yes(names) = task.second { Some(names) } else { None };
    let missing = [Some(task.first), second, Some(task.answer)]
        .into_iter()
        .flatten()
        .find(|names| !names.iter().any(|n| position(found, n).is_some()));
    Error::NoColumn {
        path: path.to_owned(),
        line,
        task,
        missing: missing.unwrap_or(task.answer).join(" or "),
        found: found.iter().map(|f| format!("\"{}\"", start_of(f))).collect::<Vec<_>>().join(", "),
    }
}

fn json(path: &Path, line: usize, text: &str, body: &str, task: &'static TaskRow) -> Result<Content> {
    let object = object(path, line, text, body.trim_start().starts_with('['))?;
    let not = |found: String| Error::NotLabelled { path: path.to_owned(), line, task: task.name, found };
    let find = |names: &[&str]| names.iter().find_map(|name| object.get(*name).map(|v| (name.to_string(), v)));
    let string = |names: &'static [&'static str], needed: bool| match find(names) {
        Some((_, Value::String(s))) => Ok(Some(s.trim().to_owned())),
        Some((_, Value::Null)) if !needed => Ok(None),
        Some((key, other)) => Err(not(format!("\"{key}\" is {} in place of a string", kind(other)))),
        None if needed => Err(not(format!("no \"{}\" among {}", names.join("\" or \""), keys(&object)))),
        None => Ok(None),
    };
    let first = string(task.first, true)?.unwrap_or_default();
    let second = string(task.second.headings(), matches!(task.second, Second::Yes(_)))?;
    let Some((key, value)) = find(task.answer) else {
        return Err(not(format!("no \"{}\" among {}", task.answer.join("\" or \""), keys(&object))));
    };
    let raw = match value {
        Value::String(s) => Raw::Text(s.trim()),
        Value::Number(n) => {
            let number = n.as_f64().unwrap_or(f64::NAN);
            // 1 and 1.0 are one label.
            let whole = n.is_f64() && number.fract() == 0.0 && number.abs() < 1e15;
            Raw::Number(number, if whole { (number as i64).to_string() } else { n.to_string() })
        }
        Value::Bool(b) => Raw::Number(f64::from(u8::from(*b)), u8::from(*b).to_string()),
        other => return Err(not(format!("\"{key}\" is {} in place of a label", kind(other)))),
    };
    let answer = answer(path, line, 0, task, raw)?;
    Ok(example(path, line, text, first, second, answer)?.content)
}

fn keys(object: &Map<String, Value>) -> String {
    let keys: Vec<String> = object.keys().take(8).map(|k| format!("\"{}\"", start_of(k))).collect();
    if keys.is_empty() { "no keys".to_owned() } else { format!("the keys {}", keys.join(", ")) }
}

/// A label or number as it stands.
enum Raw<'a> {
    Text(&'a str),
    Number(f64, String),
}

/// `column`: that of the file, from 1; 0 in a file without columns.
fn answer(path: &Path, line: usize, column: usize, task: &'static TaskRow, raw: Raw) -> Result<Answer> {
    let place = || (path.to_owned(), line, column);
    match task.kind {
        TaskKind::Completions => unreachable!("pairs have no labels"),
        TaskKind::Values => {
            let (value, shown) = match raw {
                Raw::Text(text) => (text.parse().unwrap_or(f64::NAN), text.to_owned()),
                Raw::Number(value, shown) => (value, shown),
            };
            // What f32 cannot hold is no number to learn.
            if !(value as f32).is_finite() {
                let (path, line, column) = place();
                return Err(Error::NotANumber { path, line, column, found: start_of(&shown) });
            }
            Ok(Answer::Value(value as f32))
        }
        TaskKind::Labels(names) => {
            let name = match raw {
                Raw::Text(text) => text.to_owned(),
                Raw::Number(_, text) if names.contains(&text.as_str()) => text,
                Raw::Number(n, text) => match names.iter().enumerate().find(|(i, _)| *i as f64 == n) {
                    Some((_, name)) => (*name).to_owned(),
                    None => text,
                },
            };
            if name.is_empty() {
                let (path, line, column) = place();
                return Err(Error::NoLabel { path, line, column });
            }
            if !names.is_empty() && !names.contains(&name.as_str()) {
                let (path, line, column) = place();
                let known = names.iter().map(|n| n.to_string()).collect();
                return Err(Error::UnknownLabel { path, line, column, found: start_of(&name), known });
            }
            Ok(Answer::Label(name))
        }
    }
}

fn example(
    path: &Path,
    line: usize,
    row: &str,
    text: String,
    second: Option<String>,
    answer: Answer,
) -> Result<Example> {
    if text.is_empty() && second.as_ref().is_none_or(String::is_empty) {
        let (path, start) = (path.to_owned(), start_of(row));
        return Err(Error::EmptyTarget { path, line, part: "text", start });
    }
    Ok(Example { line, content: Content::Labelled { text, second, answer } })
}
