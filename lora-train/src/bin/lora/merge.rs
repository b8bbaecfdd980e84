//! `lora merge`.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use indicatif::HumanBytes;
use lora_core::{Tensor, lowrank::MajoritySign};
use lora_kernels::{DType, Device};
use lora_model::{
    adapter::{self, COMBINATIONS, Combined, Recipe, Rounding, Updates, Weighted},
    tokenizer::Tokenizer,
};
use lora_train::{
    Place,
    task::{self, Fitted},
};
use serde_json::{Value, json};

use crate::{
    base::{self, Loaded},
    new_folder::{NewFolder, go_on, size},
    ui,
};

#[derive(Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "With --adapter (and --model) that one is merged into the model. With --adapters several become one: an \
                  adapter, or with --model a model that has it in its weights. linear sums A and B, ties and \
                  magnitude_prune keep their largest elements, dare_* random ones; cat puts ranks together, which is the \
                  sum of the updates exactly, and svd cuts that sum to a rank; *_svd work on the updates themselves."
)]
pub(crate) struct MergeArgs {
    /// Folder of the model, or its id on the Hugging Face hub
    #[arg(long, value_name = "DIR|HUB_ID", required_unless_present = "adapters")]
    model: Option<PathBuf>,
    /// Folder of the adapter
    #[arg(long, value_name = "DIR", required_unless_present = "adapters")]
    adapter: Option<PathBuf>,
    /// Folders of adapters and their weights, which may be negative [default: 1]
    #[arg(long, value_name = "DIR:WEIGHT,...", value_delimiter = ',', value_parser = weighted, conflicts_with = "adapter")]
    adapters: Vec<(PathBuf, f64)>,
    /// Refuse adapters that were trained on different bases, or on another than --model, rather than warn of it
    #[arg(long)]
    strict: bool,
    /// What to write [default: a model if --model is given]
    #[arg(long)]
    into: Option<Written>,
    /// Folder for the merged model or adapter: new, or empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Type of the merged model's weights; of bf16 and f16 it is told what rounding costs the update
    #[arg(long, default_value = "f32")]
    dtype: Weights,
    /// Print a summary as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    how: HowArgs,
}

#[derive(Args)]
#[command(next_help_heading = "Several adapters")]
struct HowArgs {
    /// PEFT's combination_type [default: linear]
    #[arg(long, value_parser = COMBINATIONS)]
    how: Option<String>,
    /// The share of elements that ties, dare and magnitude_prune keep
    #[arg(long, value_name = "SHARE")]
    density: Option<f64>,
    /// What elects signs with ties [default: total]
    #[arg(long, value_name = "BY")]
    majority_sign: Option<Sign>,
    /// The rank that svd cuts to [default: the highest of the adapters']
    #[arg(long, value_name = "R")]
    svd_rank: Option<usize>,
    /// What dare drops [default: 0]
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Written {
    Adapter,
    Model,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Weights {
    F32,
    Bf16,
    F16,
}

impl Weights {
    fn dtype(self) -> DType {
        match self {
            Weights::F32 => DType::F32,
            Weights::Bf16 => DType::Bf16,
            Weights::F16 => DType::F16,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Sign {
    Total,
    Frequency,
}

/// `DIR:WEIGHT`, or `DIR` for a weight of 1.
fn weighted(text: &str) -> Result<(PathBuf, f64), String> {
    let (dir, weight) = match text.rsplit_once(':').map(|(dir, weight)| (dir, weight.trim().parse::<f64>())) {
        Some((dir, Ok(weight))) => (dir, weight),
        Some((_, Err(_))) | None => (text, 1.0),
    };
    match () {
        () if dir.trim().is_empty() => Err("name an adapter's folder before the weight".into()),
        () if !weight.is_finite() => Err("a weight is a number".into()),
        () => Ok((dir.trim().into(), weight)),
    }
}

pub(crate) fn run(args: MergeArgs) -> anyhow::Result<()> {
    match (&args.model, &args.adapter) {
        (Some(model), Some(adapter)) => one(&args, model, adapter),
        _ => several(&args),
    }
}

/// One adapter into its base.
fn one(args: &MergeArgs, model: &Path, adapter: &Path) -> anyhow::Result<()> {
    let HowArgs { how, density, majority_sign, svd_rank, seed } = &args.how;
    let of_several = [
        ("how", how.is_some()),
        ("density", density.is_some()),
        ("majority-sign", majority_sign.is_some()),
        ("svd-rank", svd_rank.is_some()),
        ("seed", seed.is_some()),
        ("into", args.into.is_some()),
    ];
    if let Some((flag, _)) = of_several.into_iter().find(|(_, given)| *given) {
        bail!("--{flag} is for several adapters: give them as --adapters, not --adapter");
    }
    let folder = NewFolder::new(&args.out)?;
    let task = task::of_adapter(adapter)?;
    let loaded = base::load(model, Some(adapter), &Place::CPU, args.strict)?;
    let changed = loaded.adapted.merged(&*loaded.model);
    let changed = changed.with_context(|| format!("{} with {}", model.display(), adapter.display()))?;
    write_model(args, folder, &loaded, &changed, task.as_ref(), "the adapter", json!({}))
}

/// Several adapters into one, or into their base.
fn several(args: &MergeArgs) -> anyhow::Result<()> {
    let folder = NewFolder::new(&args.out)?;
    let HowArgs { how, density, majority_sign, svd_rank, seed } = &args.how;
    let sign = majority_sign.map(|by| match by {
        Sign::Total => MajoritySign::Total,
        Sign::Frequency => MajoritySign::Frequency,
    });
    let how = how.as_deref().unwrap_or("linear");
    anyhow::ensure!(seed.is_none() || how.starts_with("dare"), "--seed is for what dare drops; {how} drops nothing");
    let recipe = Recipe { how: how.to_owned(), density: *density, sign, rank: *svd_rank, seed: seed.unwrap_or(0) };
    recipe.check()?;
    let mut task: Option<Fitted> = None;
    let mut parts = Vec::new();
    for (dir, weight) in &args.adapters {
        let updates = Updates::load(dir)?;
        // Of those that were trained for a task, the one with the head: another's would be refused.
        if !updates.whole.is_empty() {
            task = task::of_adapter(dir)?;
        }
        if args.strict {
            base::say_unchecked(dir, updates.base_fingerprint.as_deref());
        }
        parts.push(Weighted { name: dir.display().to_string(), weight: *weight, updates });
    }
    same(args, adapter::check_one_base(&parts))?;
    let Combined { updates, cut } = adapter::combine(&parts, &recipe)?;
    for part in parts.iter().filter(|part| part.weight != 1.0 && !part.updates.whole.is_empty()) {
        let Weighted { name, weight, updates } = part;
        ui::note(format_args!(
            "{name}: its weight {weight} is for its updates; what it trained whole is taken as it is: {}",
            updates.whole.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
        ));
    }
    if cut > 0.0 {
        ui::note(format_args!("cutting to rank {} leaves out {:.2}% of the sum", updates.rank(), 100.0 * cut));
    }
    let names = parts.iter().map(|p| json!({"adapter": p.name, "weight": p.weight}));
    let about = json!({"adapters": names.collect::<Vec<_>>(), "how": how, "rank": updates.rank(), "cut": cut});
    let loaded = match &args.model {
        None => None,
        Some(model) => {
            let loaded = base::load_with_head(model, task.as_ref().map(Fitted::head), !updates.whole.is_empty())?;
            let at = || format!("{} with the merged adapter", model.display());
            updates.check_base(loaded.model.outline()).with_context(at)?;
            for part in &parts {
                let same_base = part.updates.check_same_base(&*loaded.model);
                same(args, same_base.with_context(|| part.name.clone()))?;
            }
            Some(loaded)
        }
    };
    match loaded.filter(|_| args.into != Some(Written::Adapter)) {
        Some(loaded) => {
            let changed = updates.merged(&*loaded.model)?;
            let what = format!("{} adapter{}", parts.len(), if parts.len() == 1 { "" } else { "s" });
            write_model(args, folder, &loaded, &changed, task.as_ref(), &what, about)
        }
        None => {
            anyhow::ensure!(args.into != Some(Written::Model), "--into model needs the base: give it as --model");
            anyhow::ensure!(args.dtype == Weights::F32, "--dtype is for a merged model; an adapter is written in f32");
            let bytes = folder.write(|dir| {
                task.as_ref().map_or(Ok(()), |task| task.save(dir))?;
                updates.save(dir)?;
                size(dir)
            })?;
            let modules = updates.modules.len();
            ui::say(format_args!(
                "merged {} into one adapter of rank {} on {modules} modules; {} in {}",
                parts.iter().map(|p| p.name.as_str()).collect::<Vec<_>>().join(", "),
                updates.rank(),
                HumanBytes(bytes),
                args.out.display()
            ));
            summary(args, about, json!({"out": args.out.display().to_string(), "modules": modules, "bytes": bytes}))
        }
    }
}

/// A base that is another than it should be is an error with --strict, and else a warning.
fn same<E: Into<anyhow::Error>>(args: &MergeArgs, checked: Result<(), E>) -> anyhow::Result<()> {
    match checked.map_err(Into::into) {
        Err(e) if args.strict => Err(e.context("--strict")),
        Err(e) => {
            tracing::warn!("{e:#}");
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

fn write_model(
    args: &MergeArgs,
    folder: NewFolder,
    loaded: &Loaded,
    changed: &BTreeMap<String, Tensor>,
    task: Option<&Fitted>,
    what: &str,
    about: Value,
) -> anyhow::Result<()> {
    let (out, dtype) = (&args.out, args.dtype.dtype());
    let bytes = folder.write(|dir| write(dir, loaded, changed, task, dtype))?;
    let tensors = loaded.model.tensors().count();
    ui::say(format_args!(
        "merged {what} into {} of {tensors} tensors; {} in {}",
        changed.len(),
        HumanBytes(bytes),
        out.display()
    ));
    let mut more =
        json!({"out": out.display().to_string(), "changed": changed.len(), "tensors": tensors, "bytes": bytes});
    if dtype != DType::F32
        && let Some(Rounding { share, worst: (name, most), largest }) =
            adapter::rounding(&*loaded.model, changed, dtype)?
    {
        let word = args.dtype.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned());
        ui::note(format_args!(
            "rounding to {word} changes the update by {:.2}% of it, at most by {:.2}% ({name}); no weight of what the update \
             changes by more than {largest:.1e}",
            100.0 * share,
            100.0 * most
        ));
        more["rounding"] = json!({"share": share, "worst": most, "worst_tensor": name, "largest": largest});
    }
    summary(args, about, more)
}

fn summary(args: &MergeArgs, mut about: Value, more: Value) -> anyhow::Result<()> {
    if !args.json {
        return Ok(());
    }
    if let (Value::Object(about), Value::Object(more)) = (&mut about, more) {
        about.extend(more);
    }
    ui::print_json(&about)
}

/// Writes the model, with the names of its labels, reads it again, and gives its size.
fn write(
    dir: &Path,
    loaded: &Loaded,
    changed: &BTreeMap<String, Tensor>,
    task: Option<&Fitted>,
    dtype: DType,
) -> anyhow::Result<u64> {
    Tokenizer::copy_files(&loaded.dir, dir)?;
    go_on()?;
    loaded.model.save_in(dtype, dir, changed)?;
    task.map_or(Ok(()), |task| task.name_labels(dir))?;
    go_on()?;
    lora_model::load(dir, &Device::Cpu)?;
    size(dir)
}
