use std::path::{Path, PathBuf};

use lora_core::peft::{self, InitLoraWeights, METHODS, Modules};
use serde::{Deserialize, Deserializer, Serialize};

use crate::{
    Error, Place, Result,
    data::{self, Format},
    schedule::Schedule,
};

/// Everything that a training run depends on: the flags of `lora train`, the keys of its TOML file, and what a checkpoint
/// remembers. Every field is a flag of the same name (`batch-size`), and has its default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct TrainConfig {
    /// Folder of the base model (config.json, safetensors, tokenizer).
    pub model: PathBuf,
    /// Training data.
    pub data: PathBuf,
    /// Output folder.
    pub out: PathBuf,
    /// Validation data.
    pub valid: Option<PathBuf>,
    /// Share of the training data that is kept from training and evaluated on, in place of `valid`: see
    /// [`Dataset::hold_out`](crate::data::Dataset::hold_out).
    pub hold_out: f64,
    /// Layout of the data files; by their extension when absent.
    pub format: Option<Format>,
    /// What is learned, a row of [`TASKS`](crate::data::TASKS); a model that continues text needs none.
    pub task: Option<String>,
    /// A row of [`peft::METHODS`].
    pub method: String,
    /// Rank r of low-rank updates; PEFT's `r`.
    #[serde(alias = "r")]
    pub rank: usize,
    /// α of the scale α/r; PEFT's `lora_alpha`.
    #[serde(alias = "lora-alpha")]
    pub alpha: f64,
    /// Dropout on an adapter's input; PEFT's `lora_dropout`, and of VeRA `vera_dropout`.
    #[serde(alias = "lora-dropout", alias = "vera-dropout")]
    pub dropout: f64,
    /// Scale by α/√r; PEFT's `use_rslora`.
    #[serde(alias = "use-rslora")]
    pub rslora: bool,
    /// Modules to adapt: a list of names, or as text a regular expression or `all-linear`; without any the architecture's
    /// default, as in PEFT, where it is `target_modules`.
    #[serde(alias = "target-modules", with = "modules")]
    pub targets: Modules,
    /// Modules not to adapt, although a target says so: names, or a regular expression.
    #[serde(with = "modules")]
    pub exclude_modules: Modules,
    /// The layers that are adapted, from 0; none: all of them. One may stand without a list.
    #[serde(deserialize_with = "one_or_more")]
    pub layers_to_transform: Vec<usize>,
    /// What stands before the number of a layer in the names of modules; none: anything. One may stand without a list.
    #[serde(deserialize_with = "one_or_more")]
    pub layers_pattern: Vec<String>,
    /// Ranks of modules that differ from `rank`, by [`peft::Pattern`]: of several keys that match, the first holds.
    #[serde(with = "pattern")]
    pub rank_pattern: Vec<(String, usize)>,
    /// α's of modules that differ from `alpha`, likewise.
    #[serde(with = "pattern")]
    pub alpha_pattern: Vec<(String, f64)>,
    /// Modules of the base that train whole beside LoRA, by the ends of their names.
    pub modules_to_save: Vec<String>,
    /// Biases of the base that train beside LoRA: none, all, or lora_only.
    pub bias: String,
    /// DoRA on LoRA's targets.
    pub use_dora: bool,
    /// How LoRA's A and B begin, by PEFT's words: true, false, gaussian, pissa, pissa_niter_N, olora, orthogonal.
    #[serde(with = "init_lora_weights")]
    pub init_lora_weights: InitLoraWeights,
    /// Whether LoRA's weights are stored [in, out], as GPT-2's are; the base knows, and what is said has to agree.
    pub fan_in_fan_out: Option<bool>,
    /// Among the targets of (IA)³ those whose inputs are multiplied.
    #[serde(with = "modules")]
    pub feedforward_modules: Modules,
    /// Width of the bottleneck of adapters.
    pub bottleneck: usize,
    /// What stands between its two maps, by Hugging Face's names; the method's own when absent.
    pub non_linearity: Option<String>,
    /// Train the base's normalisations beside adapters.
    pub train_norms: bool,
    /// The layers that `top2` trains: see [`peft::Layers`].
    pub layers: String,
    /// The layers that `adapter-d` leaves without an adapter; the lowest ⌊5·L/12⌋ when absent.
    pub drop_layers: Option<String>,
    /// Virtual tokens before the text; PEFT's `num_virtual_tokens`.
    #[serde(alias = "num-virtual-tokens")]
    pub prefix: usize,
    /// Virtual tokens after the prompt.
    pub infix: usize,
    /// Whether the virtual tokens of `pre-layer` count as positions of the text.
    pub count_prefix: bool,
    /// Width of the hidden layer that a prefix is reparametrised with; 0 is none.
    pub reparam: usize,
    /// Folders of the trained adapters that `fusion` combines.
    pub fuse: Vec<PathBuf>,
    /// Factor both factors of LoKr's product.
    pub decompose_both: bool,
    /// One of LoKr's two factors of inputs and outputs, where it divides them; −1: near the square root.
    pub decompose_factor: i64,
    /// What the vector between VeRA's random matrices begins at.
    pub d_initial: f64,
    /// The seed of VeRA's random matrices.
    pub projection_prng_key: u64,
    /// Save VeRA's random matrices with it; without them a reader has to draw the same ones.
    pub save_projection: bool,
    /// Rank of each of AdaLoRA's updates when training begins.
    pub init_r: usize,
    /// Their mean rank when it ends.
    pub target_r: usize,
    /// AdaLoRA's steps before ranks are taken away.
    pub tinit: u64,
    /// Its steps after the last were.
    pub tfinal: u64,
    /// Steps from one time that ranks are taken away to the next; PEFT's `deltaT`.
    #[serde(alias = "deltaT")]
    pub delta_t: u64,
    /// Steps of AdaLoRA's schedule; when absent those of the run.
    pub total_step: Option<u64>,
    /// AdaLoRA's β₁, of the mean of sensitivities; PEFT's `beta1`.
    pub adalora_beta1: f64,
    /// AdaLoRA's β₂, of the mean of their deviations; PEFT's `beta2`.
    pub adalora_beta2: f64,
    /// Weight of AdaLoRA's penalty on the loss, that keeps its factors near orthonormal.
    pub orth_reg_weight: f64,
    /// An adapter to start from.
    pub init_adapter: Option<PathBuf>,
    /// Refuse an adapter (`init_adapter`, `fuse`) that was trained on another base, rather than warn of it.
    pub strict: bool,
    /// Passes over the data; not together with `steps`.
    pub epochs: Option<f64>,
    /// Optimiser steps; not together with `epochs`.
    pub steps: Option<u64>,
    /// Sequences of one optimiser step.
    pub batch_size: usize,
    /// Micro-batches that a step's batch is split into: less memory, the same result.
    pub grad_accum: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// AdamW's decoupled weight decay λ.
    pub weight_decay: f64,
    /// Spare vectors (biases, norms) from weight decay.
    pub no_decay_vectors: bool,
    /// LoRA+: how many times the learning rate is that of B (and of all vectors), by PEFT's name; none: it is the same.
    pub loraplus_lr_ratio: Option<f64>,
    /// LoRA+: the learning rate of adapted embeddings, by PEFT's name.
    pub loraplus_lr_embedding: f64,
    /// AdamW's β₁.
    pub beta1: f64,
    /// AdamW's β₂.
    pub beta2: f64,
    /// AdamW's ε.
    pub eps: f64,
    /// Course of the learning rate.
    pub schedule: Schedule,
    /// Steps over which the learning rate rises from 0.
    pub warmup: u64,
    /// Label smoothing ε.
    pub label_smoothing: f64,
    /// Tokens at which a sequence is cut.
    pub max_length: usize,
    /// Largest norm of the gradient; 0 is no limit.
    pub clip: f64,
    /// Take the data in the order of the file.
    pub no_shuffle: bool,
    /// Dropout of the base itself; the model's configuration decides when absent.
    pub base_dropout: Option<f64>,
    /// Seed of initialisation, order and dropout.
    pub seed: u64,
    /// `cpu`, `cuda`, `cuda:N`, or `auto`: CUDA when there is a device; see [`Place`](crate::Place). A run may be continued
    /// on another device.
    pub device: String,
    /// The type of the base's weights and of activations: `f32`, `bf16`, `f16`, or `auto`: that of the run that is
    /// continued, else bf16 on CUDA and f32 on the CPU, where bf16 is the type of frozen matrices and of their products
    /// alone.
    pub dtype: String,
    /// Steps between evaluations on `valid`, with one at the end; 0 is at the end of every epoch.
    pub eval_every: u64,
    /// Steps between checkpoints, with one at the end; 0 is none.
    pub save_every: u64,
    /// Checkpoints to keep, the newest; 0 keeps all.
    pub keep: usize,
    /// File that gets one JSON object per step.
    pub log: Option<PathBuf>,
}

/// PEFT's default.
const LORAPLUS_LR_EMBEDDING: f64 = 1e-6;

impl Default for TrainConfig {
    fn default() -> Self {
        let options = peft::Options::default();
        TrainConfig {
            model: PathBuf::new(),
            data: PathBuf::new(),
            out: PathBuf::new(),
            valid: None,
            hold_out: 0.0,
            format: None,
            task: None,
            method: "lora".into(),
            rank: options.rank,
            alpha: options.alpha,
            dropout: options.dropout,
            rslora: options.rslora,
            targets: options.targets,
            exclude_modules: options.exclude_modules,
            layers_to_transform: options.layers_to_transform,
            layers_pattern: options.layers_pattern,
            rank_pattern: options.rank_pattern,
            alpha_pattern: options.alpha_pattern,
            modules_to_save: options.modules_to_save,
            bias: options.bias.word().into(),
            use_dora: options.use_dora,
            init_lora_weights: options.init_lora_weights,
            fan_in_fan_out: options.fan_in_fan_out,
            feedforward_modules: options.feedforward_modules,
            bottleneck: options.bottleneck,
            non_linearity: None,
            train_norms: options.train_norms,
            layers: options.layers.to_string(),
            drop_layers: None,
            prefix: options.prefix,
            infix: options.infix,
            count_prefix: options.count_prefix,
            reparam: options.reparam,
            fuse: Vec::new(),
            decompose_both: options.decompose_both,
            decompose_factor: options.decompose_factor,
            d_initial: options.d_initial,
            projection_prng_key: options.projection_prng_key,
            save_projection: options.save_projection,
            init_r: options.adalora.init_r,
            target_r: options.adalora.target_r,
            tinit: options.adalora.tinit,
            tfinal: options.adalora.tfinal,
            delta_t: options.adalora.delta_t,
            total_step: options.adalora.total_step,
            adalora_beta1: options.adalora.beta1,
            adalora_beta2: options.adalora.beta2,
            orth_reg_weight: options.adalora.orth_reg_weight,
            init_adapter: None,
            strict: false,
            epochs: None,
            steps: None,
            batch_size: 8,
            grad_accum: 1,
            lr: 2e-4,
            weight_decay: 0.01,
            no_decay_vectors: false,
            loraplus_lr_ratio: None,
            loraplus_lr_embedding: LORAPLUS_LR_EMBEDDING,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            schedule: Schedule::Linear,
            warmup: 0,
            label_smoothing: 0.0,
            max_length: 512,
            clip: 0.0,
            no_shuffle: false,
            base_dropout: None,
            seed: 0,
            device: "cpu".into(),
            dtype: "auto".into(),
            eval_every: 0,
            save_every: 0,
            keep: 0,
            log: None,
        }
    }
}

impl TrainConfig {
    /// Refuses what makes no sense on any model or data, naming the option.
    ///
    /// # Errors
    /// [`Error::Option`].
    pub fn check(&self) -> Result<()> {
        let positive = |option, v: usize| match v {
            0 => Err(Error::option(option, v, "must be at least 1")),
            _ => Ok(()),
        };
        let within = |option, v: f64, lo: f64, hi: f64, why: &str| match v >= lo && v < hi {
            true => Ok(()),
            false => Err(Error::option(option, v, why)),
        };
        positive("batch-size", self.batch_size)?;
        positive("grad-accum", self.grad_accum)?;
        if self.grad_accum > self.batch_size {
            let why = format!("a batch of {} sequences cannot be split into more micro-batches", self.batch_size);
            return Err(Error::option("grad-accum", self.grad_accum, why));
        }
        if self.max_length < 2 {
            return Err(Error::option("max-length", self.max_length, "a sequence needs two tokens to predict one"));
        }
        within("hold-out", self.hold_out, 0.0, 1.0, "a share of the data is in [0, 1)")?;
        if self.hold_out > 0.0 && self.valid.is_some() {
            return Err(Error::option("hold-out", self.hold_out, "give either --valid or --hold-out, not both"));
        }
        within("lr", self.lr, f64::MIN_POSITIVE, 1e3, "a learning rate is a positive number, usually below 0.1")?;
        within("weight-decay", self.weight_decay, 0.0, 1e3, "weight decay is a number ≥ 0, usually below 1")?;
        if let Some(ratio) = self.loraplus_lr_ratio {
            const OPTION: &str = "loraplus-lr-ratio";
            within(
                OPTION,
                ratio,
                f64::MIN_POSITIVE,
                1e6,
                "a ratio of learning rates is a positive number, usually 2 to 32",
            )?;
            // LoRA's own options and AdaLoRA's, alone or in a combination.
            if !self.row()?.options.iter().any(|option| ["use-dora", "init-r"].contains(option)) {
                let why = format!("it is for methods with LoRA's B, and method {} has none; leave it out", self.method);
                return Err(Error::option(OPTION, ratio, why));
            }
        }
        const EMBEDDING: &str = "loraplus-lr-embedding";
        let why = "a learning rate is a number ≥ 0, usually far below that of other parameters";
        within(EMBEDDING, self.loraplus_lr_embedding, 0.0, 1e3, why)?;
        if self.loraplus_lr_ratio.is_none() && self.loraplus_lr_embedding != LORAPLUS_LR_EMBEDDING {
            let why = "it is a rate of LoRA+, and without loraplus-lr-ratio there is none; give both";
            return Err(Error::option(EMBEDDING, self.loraplus_lr_embedding, why));
        }
        within("beta1", self.beta1, 0.0, 1.0, "β₁ is in [0, 1)")?;
        within("beta2", self.beta2, 0.0, 1.0, "β₂ is in [0, 1)")?;
        within("eps", self.eps, f64::MIN_POSITIVE, 1.0, "ε is a small positive number")?;
        within("label-smoothing", self.label_smoothing, 0.0, 1.0, "label smoothing is in [0, 1)")?;
        const LARGEST: u64 = i64::MAX as u64;
        for (option, v, most) in [
            ("steps", self.steps.unwrap_or(0), u64::from(u32::MAX)),
            ("warmup", self.warmup, u64::from(u32::MAX)),
            ("tinit", self.tinit, u64::from(u32::MAX)),
            ("tfinal", self.tfinal, u64::from(u32::MAX)),
            ("delta-t", self.delta_t, u64::from(u32::MAX)),
            ("total-step", self.total_step.unwrap_or(0), u64::from(u32::MAX)),
            ("seed", self.seed, LARGEST),
            ("projection-prng-key", self.projection_prng_key, LARGEST),
            ("save-every", self.save_every, LARGEST),
            ("eval-every", self.eval_every, LARGEST),
        ] {
            if v > most {
                return Err(Error::option(option, v, format!("is at most {most}")));
            }
        }
        for (option, v) in [
            ("rank", self.rank),
            ("bottleneck", self.bottleneck),
            ("batch-size", self.batch_size),
            ("max-length", self.max_length),
            ("keep", self.keep),
        ] {
            if v > u32::MAX as usize {
                return Err(Error::option(option, v, format!("is at most {}", u32::MAX)));
            }
        }
        // They are written down in TOML and JSON.
        let paths = [("model", &self.model), ("data", &self.data), ("out", &self.out)].map(|(o, p)| (o, Some(p)));
        let others = [("valid", &self.valid), ("init-adapter", &self.init_adapter), ("log", &self.log)];
        let fused = self.fuse.iter().map(|p| ("fuse", Some(p)));
        for (option, path) in paths.into_iter().chain(others.map(|(o, p)| (o, p.as_ref()))).chain(fused) {
            if let Some(path) = path.filter(|p| p.to_str().is_none()) {
                return Err(Error::option(option, path.display(), "is not UTF-8; rename it"));
            }
        }
        // What an adapter's file may say.
        within("alpha", self.alpha, f64::MIN_POSITIVE, 1e9f64.next_up(), "α is a positive number of at most 1e9")?;
        if self.init_adapter.is_some() && self.row()?.whole_model {
            return Err(Error::option("init-adapter", "given", format!("method {} has no adapter", self.method)));
        }
        within("clip", self.clip, 0.0, 1e30, "the largest gradient norm is a number ≥ 0; 0 is no limit")?;
        within("dropout", self.dropout, 0.0, 1.0, "a dropout rate is in [0, 1)")?;
        if let Some(p) = self.base_dropout {
            within("base-dropout", p, 0.0, 1.0, "a dropout rate is in [0, 1)")?;
        }
        match (self.epochs, self.steps) {
            (Some(e), Some(_)) => {
                return Err(Error::option("epochs", e, "give either --epochs or --steps, not both"));
            }
            (Some(e), None) => {
                within("epochs", e, f64::MIN_POSITIVE, 1e9, "a number of epochs is positive, and below 1e9")?
            }
            (None, Some(0)) => return Err(Error::option("steps", 0, "must be at least 1")),
            _ => {}
        }
        Place::check(&self.device, &self.dtype)?;
        self.task_row()?;
        self.method_options()?;
        Ok(())
    }

    /// The method's row in the table.
    ///
    /// # Errors
    /// An unknown method.
    pub fn row(&self) -> Result<&'static peft::MethodRow> {
        Ok(peft::find(&self.method)?)
    }

    /// The task's row in the table, where there is a task.
    ///
    /// # Errors
    /// An unknown task.
    pub fn task_row(&self) -> Result<Option<&'static data::TaskRow>> {
        Ok(self.task.as_deref().map(data::task).transpose()?)
    }

    /// Steps of the whole run, for data of `per_epoch` steps: `steps`, or `epochs` of it (3 when neither is given).
    pub fn total_steps(&self, per_epoch: u64) -> u64 {
        match self.steps {
            Some(n) => n,
            None => ((self.epochs.unwrap_or(3.0) * per_epoch as f64).ceil() as u64).max(1),
        }
    }

    /// Reads a TOML file and lays `flags` (the same keys) over it. Keys may be written with `-` or `_`. A run that starts
    /// from an adapter (`init-adapter`) takes the method and its options from there, except for dropout, which may be
    /// another.
    ///
    /// # Errors
    /// [`Error::Config`] with file, line and key; [`Error::Option`] for a value that contradicts the adapter's, and for a β of
    /// the file that could be AdamW's or AdaLoRA's;
    /// [`Error::Model`] when the file or the adapter cannot be read.
    pub fn from_toml(file: Option<&Path>, flags: toml::Table) -> Result<TrainConfig> {
        let mut table = match file {
            None => toml::Table::new(),
            Some(path) => read_table(path)?,
        };
        // Of two that exclude each other, the flag wins.
        for (flag, other) in [("steps", "epochs"), ("epochs", "steps")] {
            if flags.contains_key(flag) && !flags.contains_key(other) {
                table.remove(other);
            }
        }
        let flagged: Vec<String> = flags.keys().cloned().collect();
        // PEFT's keys for what is adalora-beta1 and -beta2 here, or AdamW's.
        let betas = ["beta1", "beta2"].into_iter().filter(|key| table.contains_key(*key) && !flags.contains_key(*key));
        let betas: Vec<&str> = betas.collect();
        table.extend(flags);
        let given: Vec<String> = table.keys().cloned().collect();
        let path = file.unwrap_or(Path::new("command line"));
        let mut config: TrainConfig = toml::Value::Table(table)
            .try_into()
            .map_err(|e: toml::de::Error| Error::Config { path: path.into(), problem: e.message().into() })?;
        if let Some(dir) = config.init_adapter.clone() {
            let adapter = lora_model::adapter::load(&dir)?;
            config.adopt(&dir, &adapter, |key| given.iter().any(|g| g == key))?;
        }
        let row = config.row()?;
        for (key, value) in [("beta1", config.beta1), ("beta2", config.beta2)] {
            let own = format!("adalora-{key}");
            if row.options.contains(&own.as_str()) && betas.contains(&key) && !given.contains(&own) {
                let why = format!(
                    "with method {} it could be AdamW's, or what PEFT calls so, which is {own} here; give {own} too, and {key} \
                     is AdamW's",
                    row.name
                );
                return Err(Error::option(key, value, why));
            }
        }
        // A file may serve several methods; a flag is meant for this one.
        for method in METHODS {
            if let Some(option) =
                method.options.iter().find(|o| !row.options.contains(o) && flagged.iter().any(|f| f == *o))
            {
                let why = format!("method {} does not read it; leave it out, or choose another method", row.name);
                return Err(Error::option(option, "given", why));
            }
        }
        Ok(config)
    }

    /// As a TOML file that gives this configuration again.
    pub(crate) fn to_toml(&self) -> String {
        toml::to_string(self).expect("numbers within the range of TOML: checked")
    }

    /// The first key that must not change between a run and its continuation, and has: its name and both values.
    pub(crate) fn difference(&self, old: &TrainConfig) -> Option<(String, String, String)> {
        // Where things are kept and how often is no part of the result; data is known by its contents, wherever it lies.
        let result = |c: &TrainConfig| {
            let mut c = c.clone();
            (c.out, c.log, c.save_every, c.keep, c.strict) = Default::default();
            (c.data, c.valid, c.eval_every) = Default::default();
            // Any device can continue a run; its type stays, and `auto` asks for just that.
            c.device = String::new();
            if self.dtype == "auto" || old.dtype == "auto" {
                c.dtype = String::new();
            }
            c.model = c.model.canonicalize().unwrap_or(c.model);
            toml::Table::try_from(c).unwrap_or_default()
        };
        let (new, old) = (result(self), result(old));
        let keys: std::collections::BTreeSet<&String> = new.keys().chain(old.keys()).collect();
        let shown = |t: &toml::Table, k: &str| t.get(k).map_or("not set".into(), |v| v.to_string());
        // By their texts, in which the order of patterns counts.
        let key = keys.into_iter().find(|k| shown(&new, k) != shown(&old, k))?;
        Some((key.clone(), shown(&old, key), shown(&new, key)))
    }
}

/// Names of PEFT for keys that have shorter ones here.
const PEFT_NAMES: [(&str, &str); 8] = [
    ("r", "rank"),
    ("lora-alpha", "alpha"),
    ("lora-dropout", "dropout"),
    ("use-rslora", "rslora"),
    ("target-modules", "targets"),
    ("vera-dropout", "dropout"),
    ("num-virtual-tokens", "prefix"),
    ("deltaT", "delta-t"),
];

/// The name here of a key: spelt with `-`, and of PEFT's other names ours.
pub(crate) fn our_name(key: &str) -> String {
    let key = key.replace('_', "-");
    PEFT_NAMES.iter().find(|(theirs, _)| *theirs == key).map_or(key, |(_, ours)| ours.to_string())
}

/// A table's keys by [`our_name`].
///
/// # Errors
/// The name of a key that stands there twice.
pub(crate) fn by_our_names(table: toml::Table) -> std::result::Result<toml::Table, String> {
    let mut named = toml::Table::new();
    for (key, value) in table {
        let name = our_name(&key);
        if named.insert(name.clone(), value).is_some() {
            return Err(name);
        }
    }
    Ok(named)
}

/// A list, or what would be the only one in it.
fn one_or_more<'de, T: Deserialize<'de>, D: Deserializer<'de>>(from: D) -> std::result::Result<Vec<T>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a value or a list of such")]
    enum Read<T> {
        One(T),
        More(Vec<T>),
    }
    Ok(match Read::deserialize(from)? {
        Read::One(one) => vec![one],
        Read::More(list) => list,
    })
}

/// Keys and values in TOML and JSON, in their order.
mod pattern {
    use std::{fmt, marker::PhantomData};

    use serde::{
        Deserialize, Deserializer, Serialize, Serializer,
        de::{MapAccess, Visitor},
    };

    struct Entries<T>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
        type Value = Vec<(String, T)>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("names of modules and numbers")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut entries = Vec::new();
            while let Some(entry) = map.next_entry()? {
                entries.push(entry);
            }
            Ok(entries)
        }
    }

    pub(super) fn serialize<T: Serialize, S: Serializer>(entries: &[(String, T)], to: S) -> Result<S::Ok, S::Error> {
        to.collect_map(entries.iter().map(|(key, value)| (key, value)))
    }

    pub(super) fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Vec<(String, T)>, D::Error> {
        from.deserialize_map(Entries(PhantomData))
    }
}

/// [`Modules`] in TOML and JSON: a list of names, or a text.
mod modules {
    use lora_core::peft::Modules;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a list of names, a regular expression, or \"all-linear\"")]
    enum Read {
        Names(Vec<String>),
        Text(String),
    }

    pub(super) fn serialize<S: Serializer>(modules: &Modules, to: S) -> Result<S::Ok, S::Error> {
        match modules {
            Modules::Names(names) => names.serialize(to),
            other => other.to_string().serialize(to),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Modules, D::Error> {
        Ok(match Read::deserialize(from)? {
            Read::Names(names) => Modules::Names(names),
            Read::Text(text) => Modules::of_text(&text),
        })
    }
}

/// [`InitLoraWeights`] in TOML and JSON: a truth value, or a word.
mod init_lora_weights {
    use lora_core::peft::InitLoraWeights;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected true, false, or a word for how A and B begin, such as \"pissa\"")]
    enum Read {
        Zero(bool),
        Word(String),
    }

    pub(super) fn serialize<S: Serializer>(init: &InitLoraWeights, to: S) -> Result<S::Ok, S::Error> {
        match init {
            InitLoraWeights::Kaiming => true.serialize(to),
            InitLoraWeights::Random => false.serialize(to),
            other => other.word().serialize(to),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<InitLoraWeights, D::Error> {
        let word = match Read::deserialize(from)? {
            Read::Zero(zero) => zero.to_string(),
            Read::Word(word) => word,
        };
        InitLoraWeights::parse(&word).map_err(D::Error::custom)
    }
}

/// The keys of a TOML file, spelt with `-`, those of PEFT by their names here; each is known and has a value of its type.
fn read_table(path: &Path) -> Result<toml::Table> {
    let text = lora_model::files::read_to_string(path)?;
    // The spelling is changed in the text, so that the parser's places stay true.
    let spelt = |key: &str| key.trim().chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
    let mut in_table = false;
    let mut dashed = |line: &str| {
        if line.trim_start().starts_with('[') && !line.contains('=') {
            // The names of modules follow, which are spelt as they are.
            in_table = true;
            return line.replace('_', "-");
        }
        match line.split_once('=') {
            Some((key, value)) if spelt(key) && !in_table => format!("{}={value}", key.replace('_', "-")),
            _ => line.to_owned(),
        }
    };
    let text: String = text.split_inclusive('\n').map(&mut dashed).collect();
    let problem = |e: toml::de::Error| {
        let line = e.span().map_or(1, |s| 1 + text[..s.start].matches('\n').count());
        let problem = format!("line {line}: {}", e.message().trim().replace('\n', " "));
        Error::Config { path: path.into(), problem }
    };
    toml::from_str::<TrainConfig>(&text).map_err(problem)?;
    let table: toml::Table = text.parse().map_err(problem)?;
    by_our_names(table).map_err(|key| Error::Config {
        path: path.into(),
        problem: format!("key {key}: stands there under two names; leave one out"),
    })
}
