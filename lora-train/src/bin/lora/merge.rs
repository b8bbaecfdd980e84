//! `lora merge`.

use std::{
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use clap::Args;
use indicatif::HumanBytes;
use lora_kernels::Device;
use lora_model::{files, tokenizer::Tokenizer};
use lora_train::Place;
use serde_json::json;

use crate::{
    base::{self, Loaded},
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
    refuse_used(out)?;
    // Made beside its place and moved there when it is whole.
    let Some(name) = out.file_name() else { bail!("{}: --out has to name a folder", out.display()) };
    let partial = out.with_file_name(format!(".{}.partial", name.to_string_lossy()));
    remove_stale(&partial)?;
    let loaded = base::load(&args.model, Some(&args.adapter), &Place::CPU)?;
    let changed = loaded.adapted.merged(&*loaded.model);
    let changed = changed.with_context(|| format!("{} with {}", args.model.display(), args.adapter.display()))?;

    files::create_folder(&partial)?;
    let _lock = lock(&partial)?;
    ui::catch_interrupt("stopping after this file")?;
    let made = write(&partial, &loaded, &changed).and_then(|bytes| {
        go_on()?;
        fs::rename(&partial, out)
            .with_context(|| format!("could not rename {} to {}", partial.display(), out.display()))?;
        Ok(bytes)
    });
    let bytes = made.inspect_err(|e| {
        // The first error is the one to tell of.
        let _ = fs::remove_dir_all(&partial);
        if e.is::<ui::Interrupted>() {
            ui::say(format_args!("stopped: nothing is left of {}", out.display()));
        }
    })?;

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

fn refuse_used(out: &Path) -> anyhow::Result<()> {
    match fs::read_dir(out) {
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => bail!("{} is not empty; name a new folder as --out", out.display()),
        },
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).with_context(|| format!("{}: --out has to be a folder, new or empty", out.display())),
    }
}

/// Removes what a merge that was killed has left.
fn remove_stale(partial: &Path) -> anyhow::Result<()> {
    if !partial.is_dir() {
        return Ok(());
    }
    let _lock = lock(partial)?;
    fs::remove_dir_all(partial).with_context(|| format!("could not remove {}", partial.display()))
}

/// Marks the folder as one that is being written, as long as the process lives; `None` where the system cannot.
fn lock(partial: &Path) -> anyhow::Result<Option<File>> {
    let Ok(file) = File::open(partial) else { return Ok(None) };
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => {
            bail!("another process is merging into {}; wait for it, or name another --out", partial.display())
        }
        Err(TryLockError::Error(_)) => Ok(None),
    }
}

fn go_on() -> anyhow::Result<()> {
    if ui::interrupted() { Err(ui::Interrupted.into()) } else { Ok(()) }
}

/// Writes the model, reads it again, and gives its size.
fn write(
    dir: &Path,
    loaded: &Loaded,
    changed: &std::collections::BTreeMap<String, lora_core::Tensor>,
) -> anyhow::Result<u64> {
    Tokenizer::copy_files(&loaded.dir, dir)?;
    go_on()?;
    loaded.model.save(dir, changed)?;
    go_on()?;
    lora_model::load(dir, &Device::Cpu)?;
    size(dir)
}

/// Bytes of the files in a folder and below.
pub(crate) fn size(dir: &Path) -> anyhow::Result<u64> {
    let read = || format!("could not read {}", dir.display());
    let mut bytes = 0;
    for entry in fs::read_dir(dir).with_context(read)? {
        let entry = entry.with_context(read)?;
        let kind = entry.metadata().with_context(read)?;
        bytes += if kind.is_dir() { size(&entry.path())? } else { kind.len() };
    }
    Ok(bytes)
}
