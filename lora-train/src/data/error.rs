//! What can be wrong with data.

use std::path::PathBuf;

use super::EncodeError;

/// [`std::result::Result`] with the [`Error`] of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// What can be wrong with a data file or with the way it is asked to be read. Lines are counted from 1.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The name is none of the [`Format`](super::Format)s.
    #[error("unknown data format '{name}': use e2e, jsonl or text")]
    UnknownFormat {
        /// What was asked for.
        name: String,
    },

    /// The file is missing or unreadable.
    #[error("cannot read the data file {}: {source}; check the path and its permissions", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },

    /// The bytes are not UTF-8.
    #[error(
        "{}:{line}: the file is not UTF-8: byte 0x{byte:02x} at offset {offset} starts no valid character; convert it, for \
         example with iconv -f LATIN1 -t UTF-8",
        path.display()
    )]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Line of the first bad byte.
        line: usize,
        /// Its offset in the file, from 0.
        offset: usize,
        /// The byte.
        byte: u8,
    },

    /// The file has no bytes, or nothing but white space.
    #[error("{}: the file {}; give a file with at least one example", path.display(), emptiness(*bytes))]
    Empty {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        bytes: usize,
    },

    /// A line of an E2E file has no `||`.
    #[error(
        "{}:{line}: no '||' in \"{start}\": each line of an e2e file is context||reference; if the file is something else, \
         say --format jsonl or --format text",
        path.display()
    )]
    NoSeparator {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
        /// How the line begins.
        start: String,
    },

    /// Nothing is to be learned from this line: its reference, completion or text is blank.
    #[error(
        "{}:{line}: the {part} is empty, so there is nothing to learn from \"{start}\"; fill it in or delete the line",
        path.display()
    )]
    EmptyTarget {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
        /// `reference`, `completion` or `text`.
        part: &'static str,
        /// How the line begins.
        start: String,
    },

    /// A line of a JSONL file is not JSON.
    #[error("{}:{line}:{column}: not valid JSON: {message}{}", path.display(), hint(*array))]
    Json {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
        /// The column, in bytes from 1.
        column: usize,
        /// What the parser says.
        message: String,
        /// The file begins with `[`, so it is likely one JSON array.
        array: bool,
    },

    /// A line of a JSONL file is JSON, but not an example.
    #[error(
        "{}:{line}: {found}; each line must be an object with the strings \"prompt\" and \"completion\", or with the string \
         \"text\"",
        path.display()
    )]
    NotAnExample {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
        /// What stands there instead.
        found: String,
    },

    /// The tokenizer refused a text.
    #[error("{}:{line}: the tokenizer failed: {source}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
        /// What the tokenizer says.
        source: EncodeError,
    },

    /// The tokenizer refused a prompt that comes from no file.
    #[error("the tokenizer failed on the prompt \"{start}\": {source}")]
    Prompt {
        /// How the prompt begins.
        start: String,
        /// What the tokenizer says.
        source: EncodeError,
    },

    /// The tokenizer gave a token that the model has no row for.
    #[error(
        "{}:{line}: token {token} is outside the model's vocabulary of {vocab_size}: the tokenizer belongs to another model; \
         use the one that came with the weights",
        path.display()
    )]
    OutsideVocabulary {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
        /// The token.
        token: u32,
        /// Size of the vocabulary: tokens are 0 to `vocab_size - 1`.
        vocab_size: usize,
    },

    /// The token that ends every sequence is outside the vocabulary.
    #[error(
        "the end-of-text token {token} is outside the model's vocabulary of {vocab_size}: the tokenizer belongs to another \
         model; use the one that came with the weights"
    )]
    EndOfText {
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocab_size: usize,
    },

    /// Sequences of that length have no token to predict.
    #[error("a maximum length of {max_length} leaves nothing to predict: give at least 2 tokens")]
    MaxLength {
        /// What was asked for.
        max_length: usize,
    },

    /// No example keeps a token to predict after the cut.
    #[error(
        "{}: none of the {examples} examples has anything left to learn after the cut at {max_length} tokens: the prompts \
         alone are that long; raise --max-length",
        path.display()
    )]
    NothingLeft {
        /// The first file.
        path: PathBuf,
        /// How many examples there were.
        examples: usize,
        /// The length of the cut, in tokens.
        max_length: usize,
    },

    /// No data was given at all.
    #[error("there is no data: give at least one file")]
    NoData,

    /// A batch size or a number of micro-batches is zero.
    #[error("a batch size of {batch_size} and {grad_accum} micro-batches make no step: both must be at least 1")]
    BatchSize {
        /// Sequences in a step.
        batch_size: usize,
        /// Micro-batches in a step.
        grad_accum: usize,
    },
}

fn emptiness(bytes: usize) -> &'static str {
    if bytes == 0 { "is empty" } else { "holds nothing but blank lines" }
}

fn hint(array: bool) -> &'static str {
    if array {
        "; the file looks like one JSON array: write one object a line, for example with jq -c '.[]'"
    } else {
        "; each line must be one whole JSON object"
    }
}

/// The beginning of a line, short enough for a message.
pub(super) fn start_of(line: &str) -> String {
    const SHOWN: usize = 60;
    let line = line.trim();
    match line.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.to_owned(),
    }
}
