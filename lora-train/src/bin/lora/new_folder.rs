//! A folder that appears whole or not at all.

use std::{
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use lora_model::files;

use crate::ui;

/// The place of a model that is about to be written.
pub(crate) struct NewFolder {
    out: PathBuf,
    /// Beside its place, to be moved there.
    partial: PathBuf,
}

/// Refuses a folder that holds something.
pub(crate) fn free(out: &Path) -> anyhow::Result<()> {
    match fs::read_dir(out) {
        Ok(mut entries) => {
            ensure!(entries.next().is_none(), "{} is not empty; name a new folder as --out", out.display());
            Ok(())
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).with_context(|| format!("{}: --out has to be a folder, new or empty", out.display())),
    }
}

impl NewFolder {
    /// Makes sure, before the work, that `out` is free, and clears away what a killed process has left of it.
    pub(crate) fn new(out: &Path) -> anyhow::Result<NewFolder> {
        free(out)?;
        let Some(name) = out.file_name() else { bail!("{}: --out has to name a folder", out.display()) };
        let partial = out.with_file_name(format!(".{}.partial", name.to_string_lossy()));
        if partial.is_dir() {
            let _lock = lock(&partial)?;
            fs::remove_dir_all(&partial).with_context(|| format!("could not remove {}", partial.display()))?;
        }
        Ok(NewFolder { out: out.to_owned(), partial })
    }

    /// Lets `make` write into a folder, which then takes its place. After an error or Ctrl-C nothing is left of it; `make`
    /// asks [`go_on`] between files.
    pub(crate) fn write<T>(self, make: impl FnOnce(&Path) -> anyhow::Result<T>) -> anyhow::Result<T> {
        let NewFolder { out, partial } = self;
        files::create_folder(&partial)?;
        let _lock = lock(&partial)?;
        ui::catch_interrupt("stopping after this file")?;
        let made = make(&partial).and_then(|made| {
            go_on()?;
            fs::rename(&partial, &out)
                .with_context(|| format!("could not rename {} to {}", partial.display(), out.display()))?;
            Ok(made)
        });
        made.inspect_err(|e| {
            // The first error is the one to tell of.
            let _ = fs::remove_dir_all(&partial);
            if e.is::<ui::Interrupted>() {
                ui::say(format_args!("stopped: nothing is left of {}", out.display()));
            }
        })
    }
}

/// An error after Ctrl-C.
pub(crate) fn go_on() -> anyhow::Result<()> {
    if ui::interrupted() { Err(ui::Interrupted.into()) } else { Ok(()) }
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

/// Marks the folder as one that is being written, as long as the process lives; `None` where the system cannot.
fn lock(partial: &Path) -> anyhow::Result<Option<File>> {
    let Ok(file) = File::open(partial) else { return Ok(None) };
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => {
            bail!("another process is writing {}; wait for it, or name another --out", partial.display())
        }
        Err(TryLockError::Error(_)) => Ok(None),
    }
}
