//! `lora convert`.

use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use indicatif::{HumanBytes, HumanCount};
use lora_core::peft::{Adapted, Modules, Options};
use lora_kernels::Device;
use lora_model::{
    Model, Task, adapter,
    convert::{self, Llama2c, Vocabulary},
    tokenizer::Tokenizer,
};
use lora_train::task::{self, Fitted};
use serde_json::{Value, json};

use crate::{
    base::load_with_head,
    new_folder::{NewFolder, go_on, size},
    part::check_writable,
    ui,
};

#[derive(Args)]
#[command(
    after_help = "Models: --from llama2.c WEIGHTS --tokenizer FILE. Adapters, for their base --model: --from loralib FILE.pt \
                  --alpha A [--parts q,v], --from adapterhub FOLDER, and back: --to loralib FOLDER --out FILE.pt, --to \
                  adapterhub FOLDER --name NAME. Files of torch.save are read without running what is in them."
)]
pub(crate) struct ConvertArgs {
    /// File of the weights, or the adapter's file or folder
    #[arg(value_name = "FILE|DIR")]
    input: PathBuf,
    /// The format that is read
    #[arg(long, value_name = "FORMAT", required_unless_present = "to", conflicts_with = "to")]
    from: Option<From>,
    /// The format that an adapter of this program, or of PEFT, is written in
    #[arg(long, value_name = "FORMAT")]
    to: Option<To>,
    /// llama2.c: file of the vocabulary, as its `tokenizer.py` writes it (.bin)
    #[arg(long, value_name = "FILE", required_if_eq("from", "llama2.c"))]
    tokenizer: Option<PathBuf>,
    /// Adapters: folder of the base, or its id on the Hugging Face hub
    #[arg(
        long,
        value_name = "DIR|HUB_ID",
        required_if_eq_any([("from", "loralib"), ("from", "adapterhub"), ("to", "loralib"), ("to", "adapterhub")])
    )]
    model: Option<PathBuf>,
    /// loralib: lora_alpha, which its file does not hold
    #[arg(long, required_if_eq("from", "loralib"))]
    alpha: Option<f64>,
    /// loralib: the parts of fused projections that enable_lora enabled
    #[arg(long, value_name = "q,k,v", value_delimiter = ',')]
    parts: Vec<String>,
    /// Adapters that are read for a classifier: how many labels it tells apart; 1 is for a number
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    labels: Option<u32>,
    /// adapterhub: what the adapter is called there [default: adapter]
    #[arg(long)]
    name: Option<String>,
    /// Folder for the result, new or empty; with --to loralib a file
    #[arg(long, value_name = "DIR|FILE")]
    out: PathBuf,
    /// Print a summary as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum From {
    /// Models of llama2.c, version 0 of `export.py` (.bin)
    #[value(name = "llama2.c")]
    Llama2c,
    /// Checkpoints of loralib (.pt, .bin, .safetensors)
    Loralib,
    /// Bottleneck adapters and prefixes of AdapterHub
    Adapterhub,
}

#[derive(Clone, Copy, ValueEnum)]
enum To {
    /// A checkpoint of loralib (.pt)
    Loralib,
    /// An adapter of AdapterHub
    Adapterhub,
}

impl ConvertArgs {
    /// Refuses what this conversion would not read.
    fn check(&self) -> anyhow::Result<()> {
        let reads = self.from.is_some_and(|from| !matches!(from, From::Llama2c));
        let from_loralib = matches!(self.from, Some(From::Loralib));
        let rows = [
            ("tokenizer", self.tokenizer.is_some(), matches!(self.from, Some(From::Llama2c)), "--from llama2.c"),
            ("model", self.model.is_some(), reads || self.to.is_some(), "adapters"),
            ("alpha", self.alpha.is_some(), from_loralib, "--from loralib"),
            ("parts", !self.parts.is_empty(), from_loralib, "--from loralib"),
            ("labels", self.labels.is_some(), reads, "--from loralib and --from adapterhub"),
            ("name", self.name.is_some(), matches!(self.to, Some(To::Adapterhub)), "--to adapterhub"),
        ];
        match rows.into_iter().find(|(_, given, read, _)| *given && !read) {
            None => Ok(()),
            Some((flag, _, _, of)) => anyhow::bail!("--{flag} is for {of}; leave it out"),
        }
    }
}

pub(crate) fn run(args: ConvertArgs) -> anyhow::Result<()> {
    args.check()?;
    match (args.from, args.to) {
        (Some(From::Llama2c), _) => llama2c(&args),
        (Some(From::Loralib), _) => {
            let alpha = args.alpha.context("--alpha is missing")?;
            let folder = NewFolder::new(&args.out)?;
            let base = foreign_base(&args)?;
            let (config, adapted) = convert::from_loralib(&args.input, &*base, alpha, &args.parts)?;
            adapter_folder(&args, folder, &*base, "lora", &Options::from(&config), &adapted)
        }
        (Some(From::Adapterhub), _) => {
            let folder = NewFolder::new(&args.out)?;
            let base = foreign_base(&args)?;
            let (method, options, adapted) = convert::from_adapterhub(&args.input, &*base)?;
            adapter_folder(&args, folder, &*base, method, &options, &adapted)
        }
        (None, Some(To::Loralib)) => to_loralib(&args),
        (None, Some(To::Adapterhub)) => {
            let folder = NewFolder::new(&args.out)?;
            let base = own_base(&args)?;
            let file = adapter::load(&args.input)?;
            let name = args.name.as_deref().unwrap_or("adapter");
            let bytes = folder.write(|dir| {
                convert::to_adapterhub(&file, &*base, name, dir)?;
                size(dir)
            })?;
            let method = file.method;
            ui::say(format_args!(
                "converted {method} to AdapterHub's {name}; {} in {}",
                HumanBytes(bytes),
                args.out.display()
            ));
            summary(
                &args,
                json!({"out": args.out.display().to_string(), "method": method, "name": name, "bytes": bytes}),
            )
        }
        (None, None) => anyhow::bail!("name a format: --from or --to"),
    }
}

/// The base of an adapter of another program, with the head that --labels asks for.
fn foreign_base(args: &ConvertArgs) -> anyhow::Result<Box<dyn Model>> {
    let task = args.labels.map(|labels| match labels {
        1 => Task::Regression,
        labels => Task::Classification { labels: labels as usize },
    });
    base(args, task)
}

/// The base of an adapter of this program, with the head of the adapter's task.
fn own_base(args: &ConvertArgs) -> anyhow::Result<Box<dyn Model>> {
    base(args, task::of_adapter(&args.input)?.as_ref().map(Fitted::head))
}

fn base(args: &ConvertArgs, task: Option<Task>) -> anyhow::Result<Box<dyn Model>> {
    let model = args.model.as_deref().context("--model is missing: name the base that the adapter belongs to")?;
    Ok(load_with_head(model, task, true)?.model)
}

fn adapter_folder(
    args: &ConvertArgs,
    folder: NewFolder,
    base: &dyn Model,
    method: &str,
    options: &Options,
    adapted: &Adapted,
) -> anyhow::Result<()> {
    let name = args.model.as_ref().map(|m| m.to_string_lossy().into_owned());
    let bytes = folder.write(|dir| {
        adapter::save(dir, method, options, adapted, base, name.as_deref())?;
        // Whatever is written is read again.
        adapter::attach(dir, base, &Device::Cpu)?;
        size(dir)
    })?;
    let parameters = adapted.params.count() as u64;
    ui::say(format_args!(
        "converted {} parameters of {method} at {} place{}; {} in {}",
        HumanCount(parameters),
        adapted.site_count(),
        if adapted.site_count() == 1 { "" } else { "s" },
        HumanBytes(bytes),
        args.out.display()
    ));
    let targets = (method == "lora").then(|| match &options.targets {
        Modules::Names(names) => json!(names),
        other => json!(other.to_string()),
    });
    summary(
        args,
        json!({"out": args.out.display().to_string(), "method": method, "parameters": parameters, "places": adapted.site_count(), "targets": targets, "bytes": bytes}),
    )
}

fn to_loralib(args: &ConvertArgs) -> anyhow::Result<()> {
    check_writable("out", &args.out)?;
    ensure!(!args.out.exists(), "{} is there already; name a new file", args.out.display());
    let base = own_base(args)?;
    let converted = convert::to_loralib(&adapter::load(&args.input)?, &*base)?;
    convert::write_state_dict(&args.out, &converted.tensors)?;
    let enabled = |flags: &Vec<bool>| {
        let flags: Vec<&str> = flags.iter().map(|on| if *on { "True" } else { "False" }).collect();
        format!("[{}]", flags.join(", "))
    };
    ui::say(format_args!(
        "converted {} tensors for loralib in {}: load them with strict=False into modules of r={}, lora_alpha={}{}",
        converted.tensors.len(),
        args.out.display(),
        converted.r,
        converted.alpha,
        converted
            .enable_lora
            .iter()
            .map(|(m, f)| format!(", {m} a MergedLinear with enable_lora={}", enabled(f)))
            .collect::<String>()
    ));
    summary(
        args,
        json!({
            "out": args.out.display().to_string(),
            "tensors": converted.tensors.len(),
            "r": converted.r,
            "lora_alpha": converted.alpha,
            "enable_lora": converted.enable_lora,
        }),
    )
}

fn summary(args: &ConvertArgs, summary: Value) -> anyhow::Result<()> {
    if args.json { ui::print_json(&summary) } else { Ok(()) }
}

fn llama2c(args: &ConvertArgs) -> anyhow::Result<()> {
    let out = &args.out;
    let tokenizer = args.tokenizer.as_deref().context("--tokenizer is missing")?;
    let folder = NewFolder::new(out)?;
    let model = Llama2c::open(&args.input)?;
    let vocabulary = Vocabulary::open(tokenizer, model.config().vocab_size)?;
    let bytes = folder.write(|dir| {
        convert::write(&model, &vocabulary, dir)?;
        go_on()?;
        lora_model::load(dir, &Device::Cpu)?;
        Tokenizer::from_dir(dir)?;
        size(dir)
    })?;
    let (config, tensors) = (model.config(), model.tensors());
    let parameters = config.parameters() as u64;
    ui::say(format_args!(
        "converted {} parameters in {tensors} tensors; {} in {}",
        HumanCount(parameters),
        HumanBytes(bytes),
        out.display()
    ));
    summary(
        args,
        json!({
            "out": out.display().to_string(),
            "architecture": config.kind.model_type(),
            "parameters": parameters,
            "vocab_size": config.vocab_size,
            "tensors": tensors,
            "bytes": bytes,
        }),
    )
}
