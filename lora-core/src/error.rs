/// What a user, a file or a device can cause. Wrong shapes inside a model are programmer errors and panic instead.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A kernel or the device's memory.
    #[error(transparent)]
    Kernel(#[from] lora_kernels::Error),
    /// Low-rank mathematics.
    #[error(transparent)]
    LowRank(#[from] crate::lowrank::Error),
    /// A method's option that makes no sense.
    #[error("{option} = {value}: {why}")]
    Option {
        /// The option, as the command line and the config file name it.
        option: &'static str,
        /// What was given.
        value: String,
        /// What is allowed.
        why: String,
    },
    /// A target that names no module of the model.
    #[error("target `{target}` matches no module of this model; it has: {}", .modules.join(", "))]
    NoSuchTarget {
        /// The target.
        target: String,
        /// What a target can name.
        modules: Vec<String>,
    },
    /// Two targets that would adapt the same weights twice.
    #[error("targets `{first}` and `{second}` both adapt {module}; keep one of them")]
    OverlappingTargets {
        /// One target.
        first: String,
        /// The other.
        second: String,
        /// The module in question.
        module: String,
    },
    /// A method that found nothing to train.
    #[error("method `{method}` trains nothing on this model of architecture {architecture}; choose another method")]
    NothingTrainable {
        /// The method.
        method: String,
        /// `model_type` of the architecture.
        architecture: String,
    },
    /// A method that an architecture has no place for.
    #[error("method `{method}` does not fit the architecture {architecture}: {why}; choose another method")]
    DoesNotFit {
        /// The method.
        method: String,
        /// `model_type` of the architecture.
        architecture: String,
        /// What it lacks.
        why: String,
    },
    /// An adapter's tensor of a wrong shape.
    #[error("tensor `{name}` has shape {found:?}, but this model and configuration need {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that fits.
        expected: Vec<usize>,
    },
    /// A tensor that an adapter needs and does not have.
    #[error("tensor `{name}` is missing")]
    Missing {
        /// The tensor.
        name: String,
    },
    /// Tensors that nothing of the model uses.
    #[error("{} not used by this model and configuration: {}", if .names.len() == 1 { "a tensor is" } else { "tensors are" }, .names.join(", "))]
    Unexpected {
        /// The tensors.
        names: Vec<String>,
    },
    /// An adapter that cannot be merged into a weight of the base.
    #[error("the adapter cannot be merged into tensor `{name}`: {reason}")]
    Merge {
        /// The base's tensor.
        name: String,
        /// What is wrong with it or with the adapter. W₀ is the tensor, rows and columns as of ΔW: [out, in].
        reason: crate::lowrank::Error,
    },
    /// An adapter that cannot share a batch with others.
    #[error("adapter {adapter} cannot share a batch with others: {why}")]
    Mixed {
        /// Its number among them.
        adapter: usize,
        /// What is in the way.
        why: String,
    },
    /// A saved adapter whose values contradict its structure.
    #[error("tensor `{name}`: {why}")]
    Structure {
        /// The tensor.
        name: String,
        /// What is wrong with it.
        why: String,
    },
}

/// The result of an operation.
pub type Result<T> = std::result::Result<T, Error>;
