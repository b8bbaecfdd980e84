//! Prompts with all that may be said to them, and what a model said.

use std::{collections::HashSet, path::Path};

use serde_json::Value;

use super::{
    Content, Corpus, Error, Format, Result,
    read::{object, utf8},
};

/// A prompt and the texts that are right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct References<'a> {
    /// Line of the first of them.
    pub line: usize,
    /// The prompt.
    pub prompt: &'a str,
    /// At least one.
    pub texts: Vec<&'a str>,
}

/// The completions of equal prompts that are neighbours, together. Examples without a prompt are passed over; of a prompt that
/// comes again after another one is warned.
pub fn references(corpus: &Corpus) -> Vec<References<'_>> {
    let mut all: Vec<References> = Vec::new();
    for example in &corpus.examples {
        let Content::Pair { prompt, completion } = &example.content else { continue };
        match all.last_mut().filter(|last| last.prompt == prompt) {
            Some(last) => last.texts.push(completion),
            None => all.push(References { line: example.line, prompt, texts: vec![completion] }),
        }
    }
    let apart = all.len() - all.iter().map(|r| r.prompt).collect::<HashSet<_>>().len();
    if apart > 0 {
        let plural = if apart == 1 { "" } else { "s" };
        tracing::warn!(
            "{}: {apart} time{plural} a prompt comes again after others, and is judged there by the references there alone; \
             put the lines of equal prompts together",
            corpus.path.display()
        );
    }
    all
}

/// Reads what was said to the prompts of `data`: a text a line, where an empty line is an empty text; or, from a file that is
/// named so, JSON lines with a `text`. Line breaks in texts become spaces.
///
/// # Errors
/// A missing, non-UTF-8 or empty file; in JSONL a line that is no object with a string `text`; another number of texts than
/// of prompts.
pub fn read_predictions(path: impl AsRef<Path>, prompts: &[References], data: &Path) -> Result<Vec<String>> {
    let path = path.as_ref();
    let bytes = std::fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
    let text = utf8(path, bytes)?;
    let body = text.strip_prefix('\u{feff}').unwrap_or(&text);
    if body.is_empty() {
        return Err(Error::Empty { path: path.to_owned(), bytes: text.len() });
    }
    let texts: Vec<String> = match Format::of_path(path) {
        Format::Jsonl => {
            let array = body.trim_start().starts_with('[');
            let lines = body.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
            let text = |(i, line)| match object(path, i + 1, line, array)?.remove("text") {
                Some(Value::String(text)) => Ok(text.replace(['\r', '\n'], " ")),
                _ => Err(Error::NotAPrediction { path: path.to_owned(), line: i + 1 }),
            };
            lines.map(text).collect::<Result<_>>()?
        }
        _ => body.lines().map(str::to_owned).collect(),
    };
    if texts.len() != prompts.len() {
        let (path, data) = (path.to_owned(), data.to_owned());
        return Err(Error::Predictions { path, found: texts.len(), data, prompts: prompts.len() });
    }
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Example;

    #[test]
    fn equal_neighbours_are_one_prompt() {
        let pair = |(i, (prompt, completion)): (usize, (&str, &str))| Example {
            line: i + 1,
            content: Content::Pair { prompt: prompt.into(), completion: completion.into() },
        };
        let pairs = [("a", "x"), ("a", "y"), ("b", "z"), ("a", "x"), ("a", "x")];
        let mut examples: Vec<Example> = pairs.into_iter().enumerate().map(pair).collect();
        examples.insert(2, Example { line: 9, content: Content::Text("t".into()) });
        let corpus = Corpus { path: "data".into(), format: Format::E2e, examples };
        let found: Vec<_> = references(&corpus).into_iter().map(|r| (r.line, r.prompt, r.texts)).collect();
        assert_eq!(found, [(1, "a", vec!["x", "y"]), (3, "b", vec!["z"]), (4, "a", vec!["x", "x"])]);
    }
}
