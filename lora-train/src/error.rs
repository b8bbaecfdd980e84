use std::path::PathBuf;

/// What a user, a file or a device can cause in training.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model, a tokenizer or an adapter, or a file of one.
    #[error(transparent)]
    Model(#[from] lora_model::Error),
    /// A data file.
    #[error(transparent)]
    Data(#[from] crate::data::Error),
    /// An option that makes no sense.
    #[error("{option} = {value}: {why}")]
    Option {
        /// The option, as the command line and the config file name it.
        option: &'static str,
        /// What was given.
        value: String,
        /// What is allowed.
        why: String,
    },
    /// A configuration file that cannot be understood.
    #[error("{}: {problem}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and key.
        problem: String,
    },
    /// The loss, the gradient or what was trained is no longer a number.
    #[error(
        "step {step}: {what} is {value}; training stopped, and the checkpoints so far are kept. Lower --lr, set --clip 1, or \
         look for damaged data; --init-adapter CHECKPOINT starts a new run from an adapter saved before"
    )]
    Diverged {
        /// The step.
        step: u64,
        /// Such as `the loss` or `the gradient's norm`.
        what: &'static str,
        /// NaN or infinity.
        value: f64,
    },
    /// The loss of what was evaluated is no number.
    #[error(
        "the loss is {loss}: the model's weights or the adapter hold values that are no numbers, or too large ones; look at \
         the run that made them"
    )]
    NotFinite {
        /// NaN or infinity.
        loss: f64,
    },
    /// The output folder belongs to something else.
    #[error("{}: {problem}", dir.display())]
    Output {
        /// The folder.
        dir: PathBuf,
        /// What is there and what to do.
        problem: String,
    },
    /// A checkpoint cannot be continued with this configuration, or is damaged.
    #[error("{}: {problem}", path.display())]
    Checkpoint {
        /// The checkpoint or a file of it.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
}

impl Error {
    pub(crate) fn option(option: &'static str, value: impl ToString, why: impl Into<String>) -> Error {
        Error::Option { option, value: value.to_string(), why: why.into() }
    }
}

impl From<lora_core::Error> for Error {
    fn from(e: lora_core::Error) -> Error {
        Error::Model(e.into())
    }
}

impl From<lora_kernels::Error> for Error {
    fn from(e: lora_kernels::Error) -> Error {
        Error::Model(e.into())
    }
}

/// The result of training.
pub type Result<T> = std::result::Result<T, Error>;
