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
    #[error("unknown data format '{name}': use e2e, jsonl, text or tsv")]
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
         example with iconv -f {} -t UTF-8",
        path.display(), likely_encoding(*offset, *byte)
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

    /// A line of a JSONL file is JSON, but no object.
    #[error("{}:{line}: found {found} in place of an object{}", path.display(), hint(*array))]
    NotAnObject {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
        /// What stands there instead.
        found: &'static str,
        /// The file begins with `[`, so it is likely one JSON array.
        array: bool,
    },

    /// A line of a JSONL file is a JSON object, but not an example.
    #[error(
        "{}:{line}: {found}; each line must be an object with the strings \"prompt\" and \"completion\", with the string \
         \"text\", or with the list \"messages\"",
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

    /// A line of a JSONL file has messages that are no conversation to learn from.
    #[error("{}:{line}: {problem}", path.display())]
    Chat {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
        /// What is wrong, with the message's number from 1, and what to do.
        problem: String,
    },

    /// The model has no chat template, or its template refuses a conversation.
    #[error("{}:{line}: the messages cannot be written as this model reads them: {source}", path.display())]
    Template {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
        /// What the template says.
        source: EncodeError,
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
         alone are that long; raise --max-length, or where the model has no more positions (virtual tokens take some), \
         shorten them",
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

    /// The name is none of the [`TASKS`](super::TASKS).
    #[error("unknown task '{name}': use one of {}", super::task::names())]
    UnknownTask {
        /// What was asked for.
        name: String,
    },

    /// Columns hold the examples of a task, and none was named.
    #[error(
        "{}: columns between tabs hold the examples of a task: say which with --task (for a text and a label, --task labels)",
        path.display()
    )]
    NeedsTask {
        /// The file.
        path: PathBuf,
    },

    /// A format without labels for a task.
    #[error("{}: --format {format} has no labels, which --task {task} needs: use tsv or jsonl", path.display())]
    NoAnswers {
        /// The file.
        path: PathBuf,
        /// The format asked for.
        format: super::Format,
        /// The task.
        task: &'static str,
    },

    /// A format without prompts for a task of completions.
    #[error(
        "{}: --format {format} has no prompts and completions, which --task {task} needs: use e2e or jsonl", path.display()
    )]
    NoPrompts {
        /// The file.
        path: PathBuf,
        /// The format asked for.
        format: super::Format,
        /// The task.
        task: &'static str,
    },

    /// A line of a JSONL file is no prompt with its completion, in a task of completions.
    #[error(
        "{}:{line}: there is {found}; --task {task} needs the strings \"prompt\" and \"completion\"",
        path.display()
    )]
    NoPrompt {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
        /// The task.
        task: &'static str,
        /// What stands there instead.
        found: &'static str,
    },

    /// A prompt that cannot be continued.
    #[error("{}:{line}: {problem}", path.display())]
    Unprompted {
        /// The file.
        path: PathBuf,
        /// The line of the first example with this prompt.
        line: usize,
        /// What is wrong and what to do.
        problem: String,
    },

    /// There are not as many predictions as prompts.
    #[error(
        "{}: {found} predictions for the {prompts} prompts of {}: there must be one line for each, in their order (equal \
         prompts on neighbouring lines are one)",
        path.display(), data.display()
    )]
    Predictions {
        /// The file of predictions.
        path: PathBuf,
        /// How many are in it.
        found: usize,
        /// The file of prompts.
        data: PathBuf,
        /// How many prompts there are.
        prompts: usize,
    },

    /// A line of a JSONL file of predictions is none.
    #[error("{}:{line}: no string \"text\", which a prediction is", path.display())]
    NotAPrediction {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
    },

    /// A file of columns has headings and nothing below them.
    #[error("{}: there are headings, but no examples below them; give a file with at least one", path.display())]
    NoRows {
        /// The file.
        path: PathBuf,
    },

    /// A column that the task needs is not there.
    #[error(
        "{}:{line}: no column {missing} for --task {} among {found}{}",
        path.display(), task.name, column_hint(task, missing)
    )]
    NoColumn {
        /// The file.
        path: PathBuf,
        /// The line that was read as headings.
        line: usize,
        /// The task.
        task: &'static super::TaskRow,
        /// The headings, any of which would have done.
        missing: String,
        /// What stands there.
        found: String,
    },

    /// A row has more or fewer columns than the first one.
    #[error(
        "{}:{line}: {found} columns between tabs in place of {expected}, in \"{start}\"; a text must hold no tab and no line \
         break, and quotation marks do not change that",
        path.display()
    )]
    Ragged {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
        /// Columns of this row.
        found: usize,
        /// Columns of the first one.
        expected: usize,
        /// How the line begins.
        start: String,
    },

    /// A line of a JSONL file is an object, but no example of the task.
    #[error("{}:{line}: {found}, which --task {task} needs", path.display())]
    NotLabelled {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
        /// The task.
        task: &'static str,
        /// What is missing, or stands there instead.
        found: String,
    },

    /// A text of which the tokenizer makes nothing.
    #[error("{}:{line}: the tokenizer makes no token of the text; delete the line", path.display())]
    NoTokens {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
    },

    /// A label is empty.
    #[error("{}:{line}{}: the label is empty; fill it in or delete the line", path.display(), place(*column))]
    NoLabel {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
        /// The column, from 1; 0 in a file without columns.
        column: usize,
    },

    /// A label that the task, the training data or the model does not have.
    #[error(
        "{}:{line}{}: the label \"{found}\" is none of {}; correct the line, or train on data that has it",
        path.display(), place(*column), listed(known)
    )]
    UnknownLabel {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
        /// The column, from 1; 0 where it is not known any more.
        column: usize,
        /// The label.
        found: String,
        /// Those that there are.
        known: Vec<String>,
    },

    /// All examples have one label.
    #[error("{}: every example has the label \"{label}\", so there is nothing to tell apart; give examples of at least two", path.display())]
    OneLabel {
        /// The file.
        path: PathBuf,
        /// The label.
        label: String,
    },

    /// What is to be predicted is no number.
    #[error(
        "{}:{line}{}: \"{found}\" is no number that could be predicted; write one such as 3.8, or delete the line (labels that are \
         words are --task labels)",
        path.display(), place(*column)
    )]
    NotANumber {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
        /// The column, from 1; 0 in a file without columns.
        column: usize,
        /// What stands there.
        found: String,
    },

    /// A length that the tokens around the texts fill alone.
    #[error("a maximum length of {max_length} leaves no room for text: give at least {least} tokens")]
    NoRoom {
        /// What was asked for.
        max_length: usize,
        /// The least that would do.
        least: usize,
    },

    /// No data was given at all.
    #[error("there is no data: give at least one file")]
    NoData,

    /// A share of the data that leaves nothing to train on, or nothing to evaluate on.
    #[error(
        "hold-out = {share}: of {sequences} sequences that leaves none on one of the sides (completions of one prompt stay \
         together); give a smaller share, or more data"
    )]
    HoldOut {
        /// What was asked for.
        share: f64,
        /// The sequences there are.
        sequences: usize,
    },

    /// A batch size or a number of micro-batches is zero.
    #[error("a batch size of {batch_size} and {grad_accum} micro-batches make no step: both must be at least 1")]
    BatchSize {
        /// Sequences in a step.
        batch_size: usize,
        /// Micro-batches in a step.
        grad_accum: usize,
    },
}

/// What a file is likely written in whose first byte that is no UTF-8 is this one.
fn likely_encoding(offset: usize, byte: u8) -> &'static str {
    // The marks of both orders of bytes.
    if offset == 0 && byte >= 0xfe { "UTF-16" } else { "LATIN1" }
}

fn emptiness(bytes: usize) -> &'static str {
    if bytes == 0 { "is empty" } else { "holds nothing but blank lines" }
}

/// A column, as it stands behind the line.
fn place(column: usize) -> String {
    if column == 0 { String::new() } else { format!(":{column}") }
}

fn column_hint(task: &super::TaskRow, missing: &str) -> String {
    let counts: Vec<String> = task.bare.iter().map(|(count, _)| count.to_string()).collect();
    let bare = match counts.is_empty() {
        true => String::new(),
        false => format!("; without headings the file has {} columns", counts.join(" or ")),
    };
    match missing == task.answer.join(" or ") {
        true => bare + "; files for testing have no labels: train and evaluate on those that have",
        false => bare,
    }
}

/// The first few labels.
fn listed(labels: &[String]) -> String {
    const SHOWN: usize = 8;
    let shown: Vec<String> = labels.iter().take(SHOWN).map(|l| format!("\"{l}\"")).collect();
    let more = labels.len().saturating_sub(SHOWN);
    shown.join(", ") + &if more > 0 { format!(" and {more} more") } else { String::new() }
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
