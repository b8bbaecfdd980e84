//! From text files to batches of tokens.
//!
//! ```text
//! file ──read──▶ Corpus of Examples ──encode──▶ Dataset of Sequences ──Sampler──▶ micro-batches of one optimiser step
//! ```
//!
//! - [`read`] parses one file in one of the [`Format`]s and knows nothing of tokens.
//! - [`encode`] turns examples into token [`Sequence`]s with whatever implements [`Encode`], and cuts them at a length.
//! - [`read_task`] and [`encode_task`] do so for texts with labels or numbers, by a row of [`TASKS`].
//! - [`references()`] gathers the completions of equal prompts, [`read_predictions`] reads what a model made of them.
//! - [`Sampler`] is a pure function from the number of an optimiser step to the sequences of that step, so a run is
//!   resumed from its step number alone.
//! - [`Batch`] is one flat run of tokens with boundaries: no padding anywhere.
//!
//! Every step is deterministic: the same files, settings and seed give the same batches for any number of threads.

mod batch;
mod chat;
mod encode;
mod error;
mod hold_out;
mod labelled;
mod labels;
mod read;
mod references;
mod sampler;
mod task;

use std::{fmt, path::Path, path::PathBuf, str::FromStr};

use lora_model::tokenizer::chat::Message;
use serde::{Deserialize, Serialize};

pub use batch::{Batch, Targets};
pub use chat::unanswered;
pub use encode::{Dataset, Encode, EncodeError, Goal, Sequence, encode, encode_prompt};
pub use error::{Error, Result};
pub use labelled::read_task;
pub use labels::{Join, Labels, encode_task};
pub use read::{read, read_key, read_prompts};
pub use references::{References, read_predictions, references};
pub use sampler::{Position, Sampler};
pub use task::{TASKS, TaskKind, TaskRow, task};

/// How a data file is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// One example a line: `context||reference`, split at the first `||`, both sides trimmed.
    E2e,
    /// One JSON object a line with `prompt` and `completion`, with `text`, or with `messages`, a list of objects with
    /// `role` and `content`; a file may hold all kinds. Other keys are ignored.
    Jsonl,
    /// The whole file is one document for pretraining.
    Text,
    /// Columns between tabs, for the examples of a task: see [`read_task`].
    Tsv,
}

impl Format {
    /// Every format, in the order of the documentation.
    pub const ALL: [Format; 4] = [Format::E2e, Format::Jsonl, Format::Text, Format::Tsv];

    /// The format that a file is read in when none is asked for: [`Format::Jsonl`] for `.jsonl` and `.json` (in any
    /// case), otherwise [`Format::E2e`].
    pub fn of_path(path: &Path) -> Format {
        match path.extension().and_then(|e| e.to_str()) {
            Some(e) if e.eq_ignore_ascii_case("jsonl") || e.eq_ignore_ascii_case("json") => Format::Jsonl,
            _ => Format::E2e,
        }
    }

    /// As [`Format::of_path`], for the examples of a task: [`Format::Tsv`] where it is no JSON.
    pub fn of_task_path(path: &Path) -> Format {
        match Format::of_path(path) {
            Format::Jsonl => Format::Jsonl,
            _ => Format::Tsv,
        }
    }

    /// The name on the command line and in configuration files.
    pub fn name(self) -> &'static str {
        match self {
            Format::E2e => "e2e",
            Format::Jsonl => "jsonl",
            Format::Text => "text",
            Format::Tsv => "tsv",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(name: &str) -> Result<Format> {
        let found = Format::ALL.into_iter().find(|f| f.name() == name);
        found.ok_or_else(|| Error::UnknownFormat { name: name.to_owned() })
    }
}

/// What one file held.
#[derive(Debug, Clone, PartialEq)]
pub struct Corpus {
    /// The file, for messages about its lines.
    pub path: PathBuf,
    /// The format it was read in.
    pub format: Format,
    /// At least one example, in the order of the file.
    pub examples: Vec<Example>,
}

impl Corpus {
    /// Examples that stand in no file: messages call them by this name, and count them from 1 as lines.
    pub fn new(name: impl Into<PathBuf>, contents: impl IntoIterator<Item = Content>) -> Corpus {
        let example = |(i, content)| Example { line: i + 1, content };
        Corpus {
            path: name.into(),
            format: Format::Jsonl,
            examples: contents.into_iter().enumerate().map(example).collect(),
        }
    }
}

/// One example and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// Line of the file, counted from 1.
    pub line: usize,
    /// Its text.
    pub content: Content,
}

/// The text of an [`Example`].
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// A prompt and what should follow it: the loss is on the completion alone. Both are trimmed.
    Pair {
        /// What is given; may be empty.
        prompt: String,
        /// What is to be learned; never empty but in a file of prompts ([`read_prompts`]).
        completion: String,
    },
    /// Text that is learned from its first token to its last.
    Text(String),
    /// A conversation: the loss is on what the assistant says. At least one message; of the assistant's one that says
    /// something, but in a file of prompts, where one of another comes first.
    Chat(Vec<Message>),
    /// A text, or two, and what is to be said of them ([`read_task`]).
    Labelled {
        /// The text.
        text: String,
        /// The second text of a pair.
        second: Option<String>,
        /// What is to be said.
        answer: Answer,
    },
}

/// What is to be said of a text.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// The name of its label; never empty.
    Label(String),
    /// A number; never infinite.
    Value(f32),
}
