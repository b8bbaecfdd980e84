//! The file of a comparison: its keys by their names here, and the lines that they stand on, for messages.

use std::{fmt, path::Path};

use toml::{
    Spanned, Table, Value,
    de::{DeTable, DeValue},
};

use crate::{
    Error, Result, TrainConfig,
    config::{by_our_names, our_name},
};

/// A part of the file.
#[derive(Clone, Copy)]
pub(super) enum Part {
    /// The keys above all tables.
    Shared,
    /// A table of that name.
    Table(&'static str),
    /// The `[[run]]` of that index.
    Run(usize),
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Shared => Ok(()),
            Part::Table(name) => write!(f, "[{name}]: "),
            Part::Run(index) => write!(f, "[[run]] {}: ", index + 1),
        }
    }
}

/// The file as it was written.
pub(super) struct Source<'a> {
    path: &'a Path,
    text: &'a str,
    keys: DeTable<'a>,
}

impl<'a> Source<'a> {
    /// # Errors
    /// Text that is no TOML, with its line.
    pub(super) fn parse(path: &'a Path, text: &'a str) -> Result<Source<'a>> {
        let keys = DeTable::parse(text).map_err(|e| not_toml(path, text, &e))?.into_inner();
        Ok(Source { path, text, keys })
    }

    /// All of it. Keys of the comparison, of its tables and of its runs may be spelt with `_` and have PEFT's names; what
    /// lies deeper are names of modules.
    ///
    /// # Errors
    /// A key that stands twice in a part, under two names.
    pub(super) fn table(&self) -> Result<Table> {
        let table = self.text.parse().map_err(|e| not_toml(self.path, self.text, &e))?;
        let named = |part: Part, table: Table| {
            by_our_names(table).map_err(|key| {
                let problem = format!("key {key}: stands there under two names; leave one out");
                self.problem(part, Some(&key), problem)
            })
        };
        let mut table = named(Part::Shared, table)?;
        for name in ["search", "eval"] {
            if let Some(Value::Table(part)) = table.get_mut(name) {
                *part = named(Part::Table(name), std::mem::take(part))?;
            }
        }
        for (i, run) in table.get_mut("run").and_then(Value::as_array_mut).into_iter().flatten().enumerate() {
            if let Value::Table(run) = run {
                *run = named(Part::Run(i), std::mem::take(run))?;
            }
        }
        Ok(table)
    }

    /// Tries each key of training alone, so that the one at fault is named. Of an unknown one it is said which there are:
    /// the part's `own`, and those of training but for `others`.
    ///
    /// # Errors
    /// A key that training does not know, a value of another type.
    pub(super) fn check_keys(&self, part: Part, table: &Table, own: &[&str], others: &[&[&str]]) -> Result<()> {
        for (key, value) in table.iter().filter(|(key, _)| *key != "lr") {
            let alone: Table = [(key.clone(), value.clone())].into_iter().collect();
            if let Err(e) = Value::Table(alone).try_into::<TrainConfig>() {
                let said = e.message().trim();
                let said = match said.strip_prefix("unknown field ") {
                    // The names that are quoted after that of the key.
                    Some(names) => {
                        let of_training = names.split('`').skip(3).step_by(2);
                        let named_so = of_training.filter(|name| our_name(name) == **name);
                        let of_part = named_so.filter(|name| !others.iter().any(|o| o.contains(name)));
                        let names: Vec<&str> = own.iter().copied().chain(of_part).collect();
                        format!("unknown field; there are {}", names.join(", "))
                    }
                    None => said.replace('\n', " "),
                };
                return Err(self.problem(part, Some(key), format!("key {key}: {said}")));
            }
        }
        Ok(())
    }

    /// A value that is none of what was wanted.
    pub(super) fn wrong(&self, part: Part, key: &str, wanted: &str, found: &Value) -> Error {
        self.problem(part, Some(key), format!("key {key}: is {found} in place of {wanted}"))
    }

    /// An error with its place in the file.
    pub(super) fn placed(&self, part: Part, e: Error) -> Error {
        self.problem(part, option_of(&e), e.to_string())
    }

    /// What is wrong in a part of the file, with the line of the key (or of the part, where it has none of that name).
    pub(super) fn problem(&self, part: Part, key: Option<&str>, problem: String) -> Error {
        let line = self.offset(part, key).map_or(String::new(), |at| format!("line {}: ", line(self.text, at)));
        Error::Config { path: self.path.into(), problem: format!("{line}{part}{problem}") }
    }

    /// Where a key stands: in its part, else among what is shared; without it, where its part begins.
    fn offset(&self, part: Part, key: Option<&str>) -> Option<usize> {
        let own = match part {
            Part::Shared => None,
            Part::Table(name) => find(&self.keys, name).map(|(at, value)| (at, value.get_ref())),
            Part::Run(index) => find(&self.keys, "run")
                .and_then(|(_, runs)| runs.get_ref().as_array()?.get(index))
                .map(|run| (run.span().start, run.get_ref())),
        };
        let tables = [own.and_then(|(_, value)| value.as_table()), Some(&self.keys)].into_iter().flatten();
        let found = key.and_then(|key| tables.filter_map(|table| find(table, key)).next());
        found.map(|(at, _)| at).or(own.map(|(at, _)| at))
    }
}

/// The option that an error is about.
pub(super) fn option_of(e: &Error) -> Option<&'static str> {
    use lora_model::Error::{Core, Option as OfModel};
    match e {
        Error::Option { option, .. }
        | Error::Model(OfModel { option, .. } | Core(lora_core::Error::Option { option, .. })) => Some(option),
        _ => None,
    }
}

/// A key of a table by its name here: where it stands, and its value.
fn find<'t, 'a>(table: &'t DeTable<'a>, name: &str) -> Option<(usize, &'t Spanned<DeValue<'a>>)> {
    table.iter().find(|(key, _)| our_name(key.get_ref()) == name).map(|(key, value)| (key.span().start, value))
}

fn not_toml(path: &Path, text: &str, e: &toml::de::Error) -> Error {
    let line = e.span().map_or(1, |s| line(text, s.start));
    Error::Config { path: path.into(), problem: format!("line {line}: {}", e.message().trim().replace('\n', " ")) }
}

/// The line, from 1, of a place in a text.
fn line(text: &str, at: usize) -> usize {
    1 + text[..at].matches('\n').count()
}
