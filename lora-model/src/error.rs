use std::{fmt, io, path::PathBuf};

/// What a file, a folder or a user can cause. Each message says what happened, where, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system refused to read or write.
    #[error("could not {action} {}: {reason}", path.display())]
    Io {
        /// What was being done: `read`, `write`, ...
        action: &'static str,
        /// To which file or folder.
        path: PathBuf,
        /// The system's reason.
        reason: io::Error,
    },
    /// A JSON configuration is not what it has to be.
    #[error("{}: {problem}", path.display())]
    Config {
        /// The configuration file.
        path: PathBuf,
        /// The key, what was found and what was expected.
        problem: String,
    },
    /// A choice that this library does not have: an architecture, an activation.
    #[error("{}: {what} {found:?} is not supported; supported: {}", path.display(), supported.join(", "))]
    Unsupported {
        /// The file that asks for it.
        path: PathBuf,
        /// What kind of choice: `the architecture`, ...
        what: &'static str,
        /// The one asked for.
        found: String,
        /// All there are.
        supported: &'static [&'static str],
    },
    /// A folder holds no weights at all.
    #[error("{} holds no weights; looked for {looked_for}", dir.display())]
    NoWeights {
        /// The folder.
        dir: PathBuf,
        /// The file names that would have done.
        looked_for: &'static str,
    },
    /// Weights in a format that runs code when it is read, or that is not read here.
    #[error(
        "{} is not a safetensors file, and the formats of .bin, .pt and the like are not read because loading them can \
         run code; convert the folder once in Python and use the new one: \
         from transformers import AutoModelForCausalLM; \
         AutoModelForCausalLM.from_pretrained(\"FOLDER\").save_pretrained(\"NEW_FOLDER\", safe_serialization=True)",
        file.display()
    )]
    Pickled {
        /// The file that was found instead of safetensors.
        file: PathBuf,
    },
    /// Adapters that do not belong together, or to a base.
    #[error("{problem}")]
    Adapters {
        /// Which, what is wrong and what to do.
        problem: String,
    },
    /// A safetensors file, or the index of a sharded one, is damaged.
    #[error("{}: {problem}", file.display())]
    Weights {
        /// The damaged file.
        file: PathBuf,
        /// What is wrong with it and what to do.
        problem: String,
    },
    /// A tensor has another shape than the model's configuration asks for.
    #[error(
        "{}: tensor {tensor} has shape {found:?} but {expected:?} is expected; the weights belong to another configuration",
        file.display()
    )]
    Shape {
        /// The file that holds the tensor.
        file: PathBuf,
        /// The tensor's name in that file.
        tensor: String,
        /// The shape asked for.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A tensor has an element type that weights cannot have.
    #[error("{}: tensor {tensor} holds {found} but weights must be F32, F16, BF16 or F64; save it as one of these", file.display())]
    DType {
        /// The file that holds the tensor.
        file: PathBuf,
        /// The tensor's name in that file.
        tensor: String,
        /// Its element type, as safetensors names it.
        found: String,
    },
    /// The tensors of a checkpoint are not exactly those of the model.
    #[error("{}: {}", place.display(), describe_names(missing, unexpected))]
    TensorNames {
        /// The file or folder of the weights.
        place: PathBuf,
        /// Tensors of the model that the weights lack.
        missing: Vec<String>,
        /// Tensors in the weights that the model does not have.
        unexpected: Vec<String>,
    },
    /// A tokenizer's files are missing or damaged, or a text or token does not fit it.
    #[error("{}: {problem}", path.display())]
    Tokenizer {
        /// The file or folder of the tokenizer.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A chat template is missing or damaged, or refuses a conversation.
    #[error("{}{}: {problem}", path.display(), line.map_or(String::new(), |n| format!(": chat template, line {n}")))]
    ChatTemplate {
        /// The file or folder of the template.
        path: PathBuf,
        /// The template's line, from 1, where it is known.
        line: Option<usize>,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A token id that the model's embedding does not have.
    #[error("token {token} is outside the model's vocabulary of {vocab_size}; the tokenizer belongs to another model")]
    Token {
        /// The id.
        token: u32,
        /// Number of tokens in the vocabulary.
        vocab_size: usize,
    },
    /// A label that the model's head does not have.
    #[error("label {label} is not one of the {labels} that the model's head has, counted from 0")]
    Label {
        /// The label.
        label: u32,
        /// Labels of the head.
        labels: usize,
    },
    /// A segment that the model does not have.
    #[error("segment {segment} is not one of the model's {segments}, counted from 0")]
    Segment {
        /// The segment.
        segment: u32,
        /// Segments of the model.
        segments: usize,
    },
    /// A model that is asked for what its head does not do.
    #[error("a model for {task} cannot {what}")]
    Task {
        /// What the model is for.
        task: &'static str,
        /// What was asked.
        what: &'static str,
    },
    /// A sequence longer than the model's positions.
    #[error(
        "a sequence of {length} tokens is longer than the model's {max_positions} positions; shorten it (--max-length)"
    )]
    TooLong {
        /// Tokens of the sequence.
        length: usize,
        /// The most that the model can place.
        max_positions: usize,
    },
    /// A sequence without a token.
    #[error("sequence {index} of the batch has no token; leave it out")]
    NoTokens {
        /// Its index in the batch.
        index: usize,
    },
    /// An option that makes no sense.
    #[error("{option} = {value}: {why}")]
    Option {
        /// The option, by its name in [`GenerationConfig`](crate::generate::GenerationConfig), or on the command line.
        option: &'static str,
        /// What was given.
        value: String,
        /// What is allowed.
        why: String,
    },
    /// A prompt after which nothing can be generated.
    #[error("prompt {}: {problem}", index + 1)]
    Prompt {
        /// Which of the prompts, from 0; the message counts from 1.
        index: usize,
        /// What is wrong with it and what to do.
        problem: String,
    },
    /// A model whose output is NaN or infinite.
    #[error(
        "the model's logits are not finite numbers, so no token can be chosen; its weights or its adapter are damaged, \
         or their training diverged: use an earlier checkpoint"
    )]
    NotFinite,
    /// A device or a kernel failed.
    #[error(transparent)]
    Kernel(#[from] lora_kernels::Error),
    /// Tensors or an adaptation method failed.
    #[error(transparent)]
    Core(#[from] lora_core::Error),
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &std::path::Path, reason: io::Error) -> Error {
        Error::Io { action, path: path.to_owned(), reason }
    }
}

/// So that a writer handed to [`files::write_atomic`](crate::files::write_atomic) can use `?` on both kinds of error.
impl From<Error> for io::Error {
    fn from(e: Error) -> io::Error {
        io::Error::other(e)
    }
}

/// The result of reading or writing a model.
pub type Result<T> = std::result::Result<T, Error>;

fn describe_names(missing: &[String], unexpected: &[String]) -> String {
    let mut parts = Vec::new();
    if !missing.is_empty() {
        parts.push(format!("{} missing: {}", count(missing), List(missing)));
    }
    if !unexpected.is_empty() {
        parts.push(format!("{} unexpected: {}", count(unexpected), List(unexpected)));
    }
    parts.push("the weights do not belong to this model's configuration".to_owned());
    parts.join("; ")
}

fn count(names: &[String]) -> String {
    if names.len() == 1 { "1 tensor is".to_owned() } else { format!("{} tensors are", names.len()) }
}

/// The first few of a list of names, and how many more there are.
pub(crate) struct List<'a>(pub(crate) &'a [String]);

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 8;
        f.write_str(&self.0[..self.0.len().min(SHOWN)].join(", "))?;
        match self.0.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            n => write!(f, " and {n} more"),
        }
    }
}
