//! `lora merge`.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::Context;
use clap::Args;
use indicatif::HumanBytes;
use lora_core::Tensor;
use lora_kernels::Device;
use lora_model::tokenizer::Tokenizer;
use lora_train::{
    Place,
    task::{self, Fitted},
};
use serde_json::json;

use crate::{
    base::{self, Loaded},
    new_folder::{NewFolder, go_on, size},
    ui,
};

#[derive(Args)]
pub(crate) struct MergeArgs {
    /// Folder of the model, or its id on the Hugging Face hub
    #[arg(long, value_name = "DIR|HUB_ID")]
    model: PathBuf,
    /// Folder of the adapter
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// Folder for the merged model: new, or empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Print a summary as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: MergeArgs) -> anyhow::Result<()> {
    let out = &args.out;
    let folder = NewFolder::new(out)?;
    let task = task::of_adapter(&args.adapter)?;
    let loaded = base::load(&args.model, Some(&args.adapter), &Place::CPU)?;
    let changed = loaded.adapted.merged(&*loaded.model);
    let changed = changed.with_context(|| format!("{} with {}", args.model.display(), args.adapter.display()))?;
    let bytes = folder.write(|dir| write(dir, &loaded, &changed, task.as_ref()))?;

    let tensors = loaded.model.tensors().count();
    ui::say(format_args!(
        "merged the adapter into {} of {tensors} tensors; {} in {}",
        changed.len(),
        HumanBytes(bytes),
        out.display()
    ));
    match args.json {
        true => ui::print_json(&json!({"out": out, "changed": changed.len(), "tensors": tensors, "bytes": bytes})),
        false => Ok(()),
    }
}

/// Writes the model, with the names of its labels, reads it again, and gives its size.
fn write(
    dir: &Path,
    loaded: &Loaded,
    changed: &BTreeMap<String, Tensor>,
    task: Option<&Fitted>,
) -> anyhow::Result<u64> {
    Tokenizer::copy_files(&loaded.dir, dir)?;
    go_on()?;
    loaded.model.save(dir, changed)?;
    task.map_or(Ok(()), |task| task.name_labels(dir))?;
    go_on()?;
    lora_model::load(dir, &Device::Cpu)?;
    size(dir)
}
