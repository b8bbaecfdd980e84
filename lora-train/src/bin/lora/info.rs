//! `lora info`.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use clap::Args;
use indicatif::{HumanBytes, HumanCount};
use lora_core::peft::{METHODS, MethodRow, Options, Outline, find, trainable};
use lora_kernels::Device;
use lora_model::{
    LoadOptions, Task, adapter,
    checkpoint::{Checkpoint, Dtype, TensorFile, TensorInfo},
    config::{CONFIG_FILE, RawConfig},
};
use lora_train::{Place, RUN_FILE, TrainConfig, checkpoint, data::Labels, task};
use serde_json::{Map, Value, json};

use crate::{
    base::{self, Loaded},
    new_folder::size,
    ui,
};

#[derive(Args)]
pub(crate) struct InfoArgs {
    /// A model's, adapter's, run's or checkpoint's folder, or a safetensors file; without one, the devices that --device
    /// can name are listed
    #[arg(value_name = "DIR|FILE")]
    path: Option<PathBuf>,
    /// The base that an adapter belongs to, for its share of parameters [default: what its configuration names]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// List all tensors
    #[arg(long)]
    tensors: bool,
    /// For a model: what each method would train on it
    #[arg(long)]
    methods: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: InfoArgs) -> anyhow::Result<()> {
    let info = describe(&args)?;
    match args.json {
        true => ui::print_json(&info),
        false => ui::print(Listing(&info)),
    }
}

fn describe(args: &InfoArgs) -> anyhow::Result<Value> {
    let Some(path) = &args.path else { return Ok(machine()) };
    let about = std::fs::metadata(path).with_context(|| format!("could not read {}", path.display()))?;
    let holds = |name: &str| path.join(name).exists();
    let kind = match () {
        () if !about.is_dir() => "file",
        () if holds(checkpoint::STATE) => "checkpoint",
        () if holds(RUN_FILE) => "run",
        () if holds(adapter::CONFIG_FILE) => "adapter",
        () if holds(CONFIG_FILE) => "model",
        () => bail!(
            "{} holds no {CONFIG_FILE} (a model), {} (an adapter), {RUN_FILE} (a run) or {} (a checkpoint)",
            path.display(),
            adapter::CONFIG_FILE,
            checkpoint::STATE
        ),
    };
    let mut info = json!({"kind": kind, "path": path.display().to_string()});
    let more = match kind {
        "file" => file(path, args)?,
        "checkpoint" => checkpoint_of_run(path, args)?,
        "run" => whole_run(path, args)?,
        "adapter" => adapter_of(path, args)?,
        _ => model(path, args)?,
    };
    if let (Value::Object(info), Value::Object(more)) = (&mut info, more) {
        info.extend(more);
    }
    Ok(info)
}

/// The devices of this machine, and why CUDA cannot be used if it cannot.
fn machine() -> Value {
    let name = format!("{} threads, {}", rayon::current_num_threads(), lora_kernels::cpu_instructions());
    let cpu = json!({"device": "cpu", "name": name});
    #[cfg(not(feature = "cuda"))]
    let (found, problem) = (Vec::<Value>::new(), Device::cuda(0).err());
    #[cfg(feature = "cuda")]
    let (found, problem) = match lora_kernels::cuda::devices() {
        Ok(devices) => {
            let row = |d: &lora_kernels::cuda::GpuInfo| {
                let (major, minor) = d.compute_capability;
                let capability = format!("compute capability {major}.{minor}");
                json!({"device": format!("cuda:{}", d.ordinal), "name": d.name, "capability": capability, "bytes": d.memory})
            };
            // The first one may be there and too old.
            (devices.iter().map(row).collect::<Vec<_>>(), Device::cuda(0).err())
        }
        Err(e) => (Vec::new(), Some(e)),
    };
    let devices: Vec<Value> = [cpu].into_iter().chain(found).collect();
    json!({"kind": "machine", "devices": devices, "note": problem.map(|e| e.to_string())})
}

fn model(dir: &Path, args: &InfoArgs) -> anyhow::Result<Value> {
    let raw = RawConfig::from_dir(dir)?;
    let row = raw.architecture()?;
    let task = (row.task)(&raw)?;
    // An encoder without a head is described with one that a classifier of two labels would get.
    let options = LoadOptions { task: task.or(Some(Task::Classification { labels: 2 })), ..LoadOptions::default() };
    let outline = (row.outline)(&raw, &options)?;
    let weights = Checkpoint::open(dir)?;
    let tensors: Vec<TensorInfo> = weights.names().filter_map(|n| weights.info(n)).collect();
    let bare = task.is_none();
    let mut info = json!({
        "architecture": outline.architecture,
        "task_type": outline.task_type.filter(|_| !bare),
        "head": task.map_or("none: it gives hidden states alone".into(), head),
        "labels": labels(&raw, task),
    });
    // By the names that the file itself has.
    for key in SHAPE_KEYS {
        if let Some(value) = raw.value(key) {
            info[key] = value.clone();
        }
    }
    // Beside weights, old files hold the numbers of positions.
    let is_weight = |t: &&TensorInfo| matches!(t.dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16);
    let stored: usize = tensors.iter().filter(is_weight).map(TensorInfo::elements).sum();
    info["parameters"] = json!(if bare { stored as u64 } else { outline.parameters() as u64 });
    info["files"] = json!(weights.layout().files());
    if args.methods {
        info["methods"] = methods(&outline);
        info["methods_note"] =
            json!(bare.then_some("with a head for two labels, which begins at random and trains too"));
    }
    summarise(&mut info, &tensors, args);
    Ok(info)
}

/// What a head gives.
fn head(task: Task) -> String {
    match task {
        Task::Classification { labels } => format!("{}: {labels} labels", task.name()),
        task => task.name().into(),
    }
}

/// The names of a classifier's labels, in the order of its outputs.
fn labels(raw: &RawConfig, task: Option<Task>) -> Option<Vec<&str>> {
    let Some(Task::Classification { labels }) = task else { return None };
    (0..labels).map(|i| raw.value("id2label")?.get(i.to_string())?.as_str()).collect()
}

/// What a configuration says of a model's shape, under the names of all architectures.
const SHAPE_KEYS: [&str; 22] = [
    "vocab_size",
    "type_vocab_size",
    "n_positions",
    "max_position_embeddings",
    "sliding_window",
    "n_embd",
    "hidden_size",
    "n_layer",
    "num_hidden_layers",
    "n_head",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "n_inner",
    "intermediate_size",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "position_buckets",
    "pos_att_type",
    "share_att_key",
    "tie_word_embeddings",
];

/// What every method with its default options would train on a model.
fn methods(outline: &Outline) -> Value {
    let all = outline.parameters() as f64;
    let row = |m: &MethodRow| {
        let count = (m.build)(&Options::default()).and_then(|method| trainable(&*method, outline));
        match count {
            Ok(n) => json!({"method": m.name, "trainable": n, "trainable_share": n as f64 / all}),
            Err(e) => json!({"method": m.name, "note": e.to_string()}),
        }
    };
    Value::Array(METHODS.iter().map(row).collect())
}

fn adapter_of(dir: &Path, args: &InfoArgs) -> anyhow::Result<Value> {
    let adapter = adapter::load(dir)?;
    let mut info = json!({"method": adapter.method});
    // As a configuration of a run names them.
    let config = TrainConfig { method: adapter.method.into(), ..TrainConfig::default() };
    let own = adapter.row()?.options;
    if let Value::Object(options) = shown(serde_json::to_value(config.with_options(&adapter.options))?) {
        info.as_object_mut().expect("an object").extend(options.into_iter().filter(|(k, _)| own.contains(&k.as_str())));
    }
    if ["rank", "alpha"].iter().all(|option| own.contains(option)) {
        let (rank, alpha) = (adapter.options.rank as f64, adapter.options.alpha);
        info["scaling"] = json!(if adapter.options.rslora { alpha / rank.sqrt() } else { alpha / rank });
    }
    if !adapter.options.fuse.is_empty() {
        let bottlenecks = adapter.options.fuse.iter().map(|f| (f.name.clone(), json!(f.bottleneck)));
        info["fuse"] = Value::Object(bottlenecks.collect());
    }
    info["architecture"] = json!(adapter.architecture);
    info["task_type"] = json!(adapter.task_type);
    if let Some(fitted) = task::of_adapter(dir)? {
        info["task"] = json!(fitted.task.name);
        info["labels"] = json!(fitted.labels.as_ref().map(Labels::names));
    }
    info["base_model_name_or_path"] = json!(adapter.base_model_name_or_path);
    info["base_fingerprint"] = json!(adapter.base_fingerprint);
    summarise(&mut info, &adapter::stored_tensors(dir)?, args);
    let named = adapter.base_model_name_or_path.as_ref().map(PathBuf::from).filter(|p| p.join(CONFIG_FILE).exists());
    let beside = |base: &Path| base::load(base, Some(dir), &Place::CPU, false);
    let loaded = match (&args.model, &named) {
        (Some(base), _) => Some(beside(base)?),
        // What it names may have become another model since.
        (None, Some(base)) => match beside(base) {
            Ok(loaded) => Some(loaded),
            Err(e) => {
                info["note"] = json!(format!("the base that it names does not take it: {e:#}"));
                None
            }
        },
        (None, None) => None,
    };
    if let Some(Loaded { model, adapted, .. }) = loaded {
        let trainable = adapted.params.count();
        let parameters: usize = model.tensors().map(|(_, t)| t.len()).sum();
        info["trainable"] = json!(trainable);
        info["base_parameters"] = json!(parameters);
        info["trainable_share"] = json!(trainable as f64 / parameters as f64);
    }
    Ok(info)
}

fn whole_run(dir: &Path, args: &InfoArgs) -> anyhow::Result<Value> {
    let mut info = json!({"finished": false});
    let result = match () {
        () if adapter::is_adapter(dir) => Some(("adapter", adapter_of(dir, args)?)),
        () if dir.join(CONFIG_FILE).exists() => Some(("model", model(dir, args)?)),
        () => None,
    };
    if let Some((kind, result)) = result {
        info["finished"] = json!(true);
        info[kind] = result;
    }
    let checkpoints = checkpoint::list(dir)?.into_iter().map(|(step, path)| {
        let bytes = size(&path)?;
        anyhow::Ok(json!({"step": step, "path": path.display().to_string(), "bytes": bytes}))
    });
    info["checkpoints"] = Value::Array(checkpoints.collect::<anyhow::Result<_>>()?);
    let text = lora_model::files::read_to_string(&dir.join(RUN_FILE))?;
    let config: toml::Table = text.parse().with_context(|| format!("{} is damaged", dir.join(RUN_FILE).display()))?;
    info["config"] = shown(serde_json::to_value(config)?);
    Ok(info)
}

fn checkpoint_of_run(dir: &Path, args: &InfoArgs) -> anyhow::Result<Value> {
    let state = checkpoint::state(dir)?;
    let tensors = tensors_of(&dir.join(checkpoint::TENSORS))?;
    let trainable: usize =
        tensors.iter().filter(|t| t.stored_name.starts_with("trainable.")).map(TensorInfo::elements).sum();
    let mut info = json!({
        "step": state.step,
        "method": state.config.method,
        "trainable": trainable,
        "sequences": state.inputs.sequences,
        "tokens": state.inputs.tokens,
    });
    summarise(&mut info, &tensors, args);
    info["bytes"] = json!(size(dir)?);
    info["config"] = shown(serde_json::to_value(&state.config)?);
    Ok(info)
}

/// A run's configuration without the options that its method does not read.
fn shown(mut config: Value) -> Value {
    if let Some(keys) = config.as_object_mut() {
        let row = keys.get("method").and_then(Value::as_str).and_then(|m| find(m).ok());
        let of_others = |key: &str| METHODS.iter().any(|m| m.options.contains(&key));
        keys.retain(|key, _| row.is_none_or(|r| r.options.contains(&key.as_str())) || !of_others(key));
    }
    config
}

fn file(path: &Path, args: &InfoArgs) -> anyhow::Result<Value> {
    ensure!(
        path.extension().is_some_and(|e| e == "safetensors"),
        "{}: is neither a folder nor a .safetensors file, and no other kind of file is read",
        path.display()
    );
    let mut info = json!({"metadata": TensorFile::open(path)?.metadata()});
    summarise(&mut info, &tensors_of(path)?, args);
    // A file is its tensors: they are always listed.
    list(&mut info, &tensors_of(path)?);
    Ok(info)
}

fn tensors_of(path: &Path) -> anyhow::Result<Vec<TensorInfo>> {
    let file = TensorFile::open(path)?;
    Ok(file.names().filter_map(|n| file.info(n)).collect())
}

/// How many tensors, elements and bytes there are, of which types; and all of them when asked for.
fn summarise(info: &mut Value, tensors: &[TensorInfo], args: &InfoArgs) {
    let mut types: Map<String, Value> = Map::new();
    for t in tensors {
        let n = types.get(&t.dtype.to_string()).and_then(Value::as_u64).unwrap_or(0);
        types.insert(t.dtype.to_string(), json!(n + 1));
    }
    info["tensor_count"] = json!(tensors.len());
    info["elements"] = json!(tensors.iter().map(TensorInfo::elements).sum::<usize>());
    info["bytes"] = json!(tensors.iter().map(TensorInfo::bytes).sum::<usize>());
    info["dtypes"] = Value::Object(types);
    if args.tensors {
        list(info, tensors);
    }
}

fn list(info: &mut Value, tensors: &[TensorInfo]) {
    let row = |t: &TensorInfo| json!({"name": t.stored_name, "dtype": t.dtype.to_string(), "shape": t.shape, "bytes": t.bytes()});
    info["tensors"] = Value::Array(tensors.iter().map(row).collect());
}

/// The same object for a person: a line per key, tensors and checkpoints as tables.
struct Listing<'a>(&'a Value);

impl std::fmt::Display for Listing<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        lines(f, self.0, 0)
    }
}

fn lines(f: &mut std::fmt::Formatter<'_>, object: &Value, indent: usize) -> std::fmt::Result {
    let Value::Object(keys) = object else { return Ok(()) };
    for (key, value) in keys.iter().filter(|(_, v)| !v.is_null()) {
        write!(f, "{:indent$}{key:<w$} ", "", w = 24usize.saturating_sub(indent))?;
        match value {
            Value::Object(_) => {
                writeln!(f)?;
                lines(f, value, indent + 2)?;
            }
            Value::Array(rows) if rows.first().is_some_and(Value::is_object) => {
                writeln!(f, "{}", rows.len())?;
                rows.iter().try_for_each(|r| writeln!(f, "{:w$}{}", "", row(r), w = indent + 2))?;
            }
            value => writeln!(f, "{}", scalar(key, value))?,
        }
    }
    Ok(())
}

/// An entry of a table: its values, bytes last.
fn row(entry: &Value) -> String {
    let Value::Object(keys) = entry else { return entry.to_string() };
    keys.iter()
        .map(|(k, v)| if k == "step" { format!("step {v}") } else { scalar(k, v) })
        .collect::<Vec<_>>()
        .join("  ")
}

fn scalar(key: &str, value: &Value) -> String {
    match value {
        Value::String(s) => s.clone(),
        Value::Array(items) if key != "shape" => items.iter().map(|v| scalar("", v)).collect::<Vec<_>>().join(", "),
        Value::Number(n) => match (key, n.as_u64(), n.as_f64()) {
            ("bytes", Some(n), _) => format!("{} ({} bytes)", HumanBytes(n), HumanCount(n)),
            ("parameters" | "elements" | "trainable" | "base_parameters" | "tokens", Some(n), _) => {
                HumanCount(n).to_string()
            }
            ("trainable_share", _, Some(share)) => format!("{:.4}%", 100.0 * share),
            _ => n.to_string(),
        },
        other => other.to_string(),
    }
}
