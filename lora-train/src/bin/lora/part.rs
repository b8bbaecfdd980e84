//! A file of results that grows beside its place, and is moved there when it is whole.

use std::{
    fs::{self, File, TryLockError},
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};
use lora_model::files;

use crate::ui;

pub(crate) struct PartFile {
    out: PathBuf,
    /// The file that grows, and the one whose place it takes; `None` for a pipe or a terminal, which is written to as it is.
    part: Option<(PathBuf, PathBuf)>,
    file: File,
    texts: usize,
}

impl PartFile {
    pub(crate) fn create(out: &Path) -> anyhow::Result<PartFile> {
        let part = files::replaceable(out).map(|place| {
            let mut name = place.as_os_str().to_owned();
            name.push(".part");
            (PathBuf::from(name), place)
        });
        let path = part.as_ref().map_or(out, |(part, _)| part);
        let made = File::options().write(true).create(true).truncate(part.is_none()).open(path);
        let file = made.with_context(|| format!("could not make {}", path.display()))?;
        if part.is_some() {
            // Of two at once the second would move the first one's file away from it.
            let locked = !matches!(file.try_lock(), Err(TryLockError::WouldBlock));
            ensure!(locked, "{}: another process is writing it; wait for it, or name another file", path.display());
            file.set_len(0).with_context(|| format!("could not write {}", path.display()))?;
        }
        Ok(PartFile { out: out.into(), part, file, texts: 0 })
    }

    /// Adds lines that hold so many texts.
    pub(crate) fn write(&mut self, lines: &str, texts: usize) -> anyhow::Result<()> {
        let written = self.file.write_all(lines.as_bytes());
        written.with_context(|| format!("could not write {}", self.path().display()))?;
        self.texts += texts;
        Ok(())
    }

    /// All is there: the file takes its place.
    pub(crate) fn finish(self) -> anyhow::Result<()> {
        if let Some((part, place)) = &self.part {
            let moved = self.file.sync_all().and_then(|()| fs::rename(part, place));
            moved.with_context(|| format!("could not move {} to {}", part.display(), self.out.display()))?;
        }
        ui::say(format_args!("{} texts in {}", self.texts, self.out.display()));
        Ok(())
    }

    /// There will be no more: what is there stays beside the place, which is left as it was.
    pub(crate) fn give_up(self) {
        let Some((part, _)) = &self.part else { return };
        if self.texts == 0 {
            // What stopped the work is what is worth telling.
            let _ = fs::remove_file(part);
        } else {
            ui::say(format_args!("stopped: the first {} texts are kept in {}", self.texts, part.display()));
        }
    }

    fn path(&self) -> &Path {
        self.part.as_ref().map_or(&self.out, |(part, _)| part)
    }
}

/// Finds out before the work, rather than after it, that the result of a flag has no place.
pub(crate) fn check_writable(flag: &str, out: &Path) -> anyhow::Result<()> {
    ensure!(!out.is_dir(), "{}: is a folder; --{flag} is a file", out.display());
    let folder = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    ensure!(folder.is_dir(), "{}: there is no folder {}; make it first", out.display(), folder.display());
    Ok(())
}
