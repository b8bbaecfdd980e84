use crate::{Error, Result};

/// A regular expression of Python's kind (look-around and back-references included, as PEFT's users write them), with
/// what PEFT puts around it.
#[derive(Clone, Debug)]
pub(super) struct Regex {
    option: &'static str,
    text: String,
    compiled: fancy_regex::Regex,
}

impl Regex {
    /// `text` between `before` and `after`; `option` stands in messages.
    ///
    /// # Errors
    /// [`Error::Option`] for what is no regular expression.
    pub(super) fn new(option: &'static str, text: &str, before: &str, after: &str) -> Result<Regex> {
        match fancy_regex::Regex::new(&format!("{before}{text}{after}")) {
            Ok(compiled) => Ok(Regex { option, text: text.into(), compiled }),
            Err(e) => Err(refused(option, text, &e)),
        }
    }

    /// As Python's `re.fullmatch`.
    ///
    /// # Errors
    /// Those of [`Regex::new`].
    pub(super) fn whole(option: &'static str, text: &str) -> Result<Regex> {
        Regex::new(option, text, r"\A(?:", r")\z")
    }

    /// As it was given.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// # Errors
    /// [`Error::Option`] when deciding takes too long.
    pub(super) fn is_match(&self, name: &str) -> Result<bool> {
        self.compiled.is_match(name).map_err(|e| refused(self.option, &self.text, &e))
    }

    /// The group of that name in the first match.
    ///
    /// # Errors
    /// Those of [`Regex::is_match`].
    pub(super) fn group<'a>(&self, group: &str, name: &'a str) -> Result<Option<&'a str>> {
        let captures = self.compiled.captures(name).map_err(|e| refused(self.option, &self.text, &e))?;
        Ok(captures.and_then(|c| Some(c.name(group)?.as_str())))
    }
}

fn refused(option: &'static str, text: &str, e: &fancy_regex::Error) -> Error {
    // Some of its messages draw the place in several lines.
    let e = e.to_string();
    let why =
        format!("no regular expression that can be used here: {}", e.lines().next_back().unwrap_or_default().trim());
    Error::Option { option, value: text.into(), why }
}
