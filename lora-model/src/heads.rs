//! The heads of encoders: which one a folder has or is to get, and what stands between the hidden states and its
//! matrix.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use lora_core::{Tape, Tensor, Var, ops, peft::Adapted};
use lora_kernels::{Activation, Device};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};
use serde_json::{Map, Value, json};

use crate::{
    Head, LoadOptions, Parts, Result, Task,
    build::{self, Build, Describe},
    checkpoint::Checkpoint,
    config::RawConfig,
    error::List,
    layers::{LayerNorm, Projection, Weight},
};

const MOST_LABELS: usize = 1 << 20;

/// The head of an encoder: dense, activation and, for filling in tokens, a norm; then a matrix with its bias.
pub(crate) struct EncoderHead {
    pub(crate) task: Task,
    pub(crate) dense: Projection,
    pub(crate) activation: Activation,
    pub(crate) norm: Option<LayerNorm>,
    pub(crate) weight: Weight,
    pub(crate) bias: Weight,
}

impl EncoderHead {
    /// What the matrix is applied to, of the hidden states x; dropout in training at the given rates before `dense` and
    /// before the matrix.
    pub(crate) fn features(&self, t: &mut Tape, adapted: &Adapted, x: Var, dropout: [f64; 2]) -> Result<Var> {
        let [before, after] = dropout;
        let x = ops::dropout(t, x, before)?;
        let x = self.dense.apply(t, adapted, &x)?;
        let mut x = ops::activation(t, self.activation, &x)?;
        if let Some(norm) = &self.norm {
            x = norm.apply(t, adapted, &x)?;
        }
        Ok(ops::dropout(t, x, after)?)
    }

    pub(crate) fn head(&self) -> Head<'_> {
        Head { task: self.task, weight: &self.weight, bias: Some(&self.bias) }
    }
}

/// The outputs of a head that looks at whole sequences.
pub(crate) fn outputs(task: Task) -> usize {
    match task {
        Task::Classification { labels } => labels,
        Task::Regression => 1,
        Task::CausalLm | Task::MaskedLm => panic!("the outputs of {task:?} are the vocabulary"),
    }
}

/// What the head of an encoder is to give: what was asked for, else what the configuration says.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) for a task that an encoder has no head for, and for a configuration that
/// names none when none was asked for.
pub(crate) fn task(raw: &RawConfig, options: &LoadOptions) -> Result<Task> {
    match options.task {
        Some(Task::CausalLm) => Err(raw.error("model_type", "an encoder has no head for continuing text")),
        Some(Task::Classification { labels }) => labels_checked(raw, labels),
        Some(task) => Ok(task),
        None => own_task(raw)?.ok_or_else(|| {
            let named = class(raw).map_or("it is missing".to_owned(), |c| format!("{c:?} has no head that is known"));
            raw.error(
                "architectures",
                format_args!(
                    "{named}; ask for a task (classification, regression, or filling in hidden tokens), for which \
                         the model gets a head that begins at random"
                ),
            )
        }),
    }
}

/// The first class of Transformers that the configuration names.
fn class(raw: &RawConfig) -> Option<&str> {
    raw.value("architectures")?.as_array()?.first()?.as_str()
}

/// The task of the class of Transformers that the configuration names, where it has a head that is known here.
pub(crate) fn own_task(raw: &RawConfig) -> Result<Option<Task>> {
    let Some(class) = class(raw) else { return Ok(None) };
    if class.ends_with("ForMaskedLM") || class.ends_with("ForPreTraining") {
        return Ok(Some(Task::MaskedLm));
    }
    if !class.ends_with("ForSequenceClassification") {
        return Ok(None);
    }
    let labels = match (raw.usize("num_labels")?, raw.value("id2label")) {
        (Some(n), _) => n,
        (None, Some(Value::Object(names))) => names.len(),
        (None, Some(_)) => return Err(raw.error("id2label", "expected an object with a name for each label")),
        (None, None) => 2,
    };
    match raw.str("problem_type")? {
        None if labels == 1 => Ok(Some(Task::Regression)),
        Some("regression") if labels == 1 => Ok(Some(Task::Regression)),
        None | Some("single_label_classification") => labels_checked(raw, labels).map(Some),
        Some("regression") => {
            Err(raw.error("problem_type", format_args!("a regression gives one number, but there are {labels} labels")))
        }
        Some(other) => Err(raw.error(
            "problem_type",
            format_args!("{other:?} is not supported; only \"regression\" and \"single_label_classification\" are"),
        )),
    }
}

fn labels_checked(raw: &RawConfig, labels: usize) -> Result<Task> {
    match labels {
        2..=MOST_LABELS => Ok(Task::Classification { labels }),
        _ => {
            Err(raw
                .error("num_labels", format_args!("a classifier tells 2 to {MOST_LABELS} labels apart, not {labels}")))
        }
    }
}

/// Refuses a masked-LM head with a matrix of its own.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config), naming the key.
pub(crate) fn check_tied(raw: &RawConfig, task: Task, tied: bool) -> Result<()> {
    match task {
        Task::MaskedLm if !tied => Err(raw.error(
            "tie_word_embeddings",
            "a masked-LM head with a matrix of its own is not supported; only one tied to the embeddings is",
        )),
        _ => Ok(()),
    }
}

/// The name here of an encoder's tensor: bare encoders lack the prefix `{root}.`, files from before PyTorch have other
/// names for the parts of norms, and older files hold the numbers of positions as a buffer.
pub(crate) fn encoder_name(name: &str, root: &str) -> Option<String> {
    if name.ends_with("embeddings.position_ids") {
        return None;
    }
    let mut name = match ["embeddings.", "encoder.", "pooler."].iter().any(|p| name.starts_with(p)) {
        true => format!("{root}.{name}"),
        false => name.to_owned(),
    };
    for (old, new) in [("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")] {
        if let Some(module) = name.strip_suffix(old) {
            name = format!("{module}{new}");
        }
    }
    Some(name)
}

/// Makes the configuration say what the head gives, so that the model can be written and read again; `family` stands
/// before `ForMaskedLM` in the name of Transformers' class.
fn set_task(raw: &mut RawConfig, family: &str, task: Task) {
    let class = if task == Task::MaskedLm { "ForMaskedLM" } else { "ForSequenceClassification" };
    raw.set("architectures", json!([format!("{family}{class}")]));
    if task == Task::MaskedLm {
        return;
    }
    let n = outputs(task);
    if raw.value("num_labels").is_some() {
        raw.set("num_labels", n);
    }
    let label = |i: usize| format!("LABEL_{i}");
    raw.set("id2label", (0..n).map(|i| (i.to_string(), json!(label(i)))).collect::<Map<_, _>>());
    raw.set("label2id", (0..n).map(|i| (label(i), json!(i))).collect::<Map<_, _>>());
    let problem = if task == Task::Regression { "regression" } else { "single_label_classification" };
    raw.set("problem_type", problem);
}

/// Makes the configuration say what a head that was asked for gives, where it says something else.
pub(crate) fn set_asked(raw: &mut RawConfig, family: &str, options: &LoadOptions) {
    if let Some(task) = options.task
        && own_task(raw).ok().flatten() != Some(task)
    {
        set_task(raw, family, task);
    }
}

/// How an architecture with exchangeable heads reads a folder.
pub(crate) struct EncoderFiles<'a> {
    /// What stands before `ForMaskedLM` in the name of Transformers' class: `Bert`.
    pub(crate) family: &'static str,
    /// The name here of each tensor of the file; `None` leaves it out.
    pub(crate) rename: &'a dyn Fn(&str) -> Option<String>,
    /// Whether a tensor, by its name here, belongs to a head: of this task or of another.
    pub(crate) is_head: fn(&str) -> bool,
    /// Standard deviation of a fresh head's matrices.
    pub(crate) initializer_range: f64,
}

/// The model in a folder whose configuration was read. Tensors of other heads are left out. Those of the head that the
/// folder lacks, or has in another shape, begin at random when a task was asked for: normal with deviation
/// `initializer_range`, biases 0, norms 1, as in Transformers. They then train with every method.
///
/// # Errors
/// Weights that are missing, damaged or of another shape.
pub(crate) fn load<M>(
    dir: &Path,
    mut raw: RawConfig,
    device: &Device,
    options: &LoadOptions,
    files: &EncoderFiles,
    describe: impl Describe<Model = M>,
) -> Result<(M, Parts)> {
    let specs = build::specs(&build::outline(&describe));
    let weights = Checkpoint::open(dir)?.rename(files.rename)?;
    let asked = options.task.is_some();
    let fits = |name: &str| {
        let Some(spec) = specs.iter().find(|s| s.name == name) else { return false };
        !asked || weights.info(name).is_some_and(|i| i.shape == spec.shape)
    };
    let unused: BTreeSet<String> =
        weights.names().filter(|n| (files.is_head)(n) && !fits(n)).map(str::to_owned).collect();
    let weights = weights.rename(|n| (files.rename)(n).filter(|n| !unused.contains(n)))?;
    let there: BTreeSet<&str> = weights.names().collect();
    let (fresh, expected): (Vec<_>, Vec<_>) =
        specs.into_iter().partition(|s| asked && (files.is_head)(&s.name) && !there.contains(s.name.as_str()));
    weights.expect(&expected)?;
    build::check_tied_head(dir, &weights, build::outline(&describe).tied_embedding())?;
    let fresh: Vec<String> = fresh.into_iter().map(|s| s.name).collect();
    if !unused.is_empty() {
        let names: Vec<String> = unused.into_iter().collect();
        tracing::warn!("{}: of another head, and not used: {}", dir.display(), List(&names));
    }
    if !fresh.is_empty() && !options.head_follows {
        tracing::warn!(
            "{}: without a head of this kind; it begins at random and has to be trained: {}",
            dir.display(),
            List(&fresh)
        );
    }
    set_asked(&mut raw, files.family, options);
    let (mut stream, mut before) = (0, BTreeMap::new());
    let mut tensor = |name: &str, shape: &[usize]| {
        stream += 1;
        if !fresh.iter().any(|f| f == name) {
            return build::kept(&weights, name, shape, (device, options), &mut before);
        }
        let t = begin(name, shape, files.initializer_range, options.seed, stream)?;
        Ok(t.to(device, options.kept(device, shape))?)
    };
    let describe = |b: &mut Build| {
        let model = describe(b)?;
        fresh.iter().for_each(|name| b.save_module_of(name));
        Ok(model)
    };
    let (model, mut parts) = build::make(raw, weights.layout().clone(), &mut tensor, describe)?;
    parts.outline.before_rounding = before;
    Ok((model, parts))
}

/// A tensor that begins at random, or as its kind begins.
fn begin(name: &str, shape: &[usize], std: f64, seed: u64, stream: u64) -> Result<Tensor> {
    let len = shape.iter().product();
    let values: Vec<f32> = match shape.len() {
        1 if name.ends_with("bias") => vec![0.0; len],
        1 => vec![1.0; len],
        _ => {
            let normal = Normal::new(0.0, std).expect("a checked deviation");
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(stream);
            (0..len).map(|_| normal.sample(&mut rng) as f32).collect()
        }
    };
    Ok(Tensor::from_slice(&Device::Cpu, shape, &values)?)
}
