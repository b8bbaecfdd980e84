use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use super::{Module, nvrtc::OPTIONS};
use crate::hash::fnv1a;

/// Where compiled modules are kept: `$LORA_CACHE`, else `lora-kernels` under `$XDG_CACHE_HOME` or `~/.cache`. `None` where
/// there is no such place: what is loaded from it runs, so a folder that other users may write in does not do.
pub(super) fn folder() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| !path.as_os_str().is_empty());
    if let Some(folder) = set("LORA_CACHE") {
        return Some(folder);
    }
    let caches = set("XDG_CACHE_HOME").filter(|path| path.is_absolute());
    let caches = caches.or_else(|| set("HOME").map(|home| home.join(".cache")));
    // On Windows the folder for temporary files is the user's own.
    caches.or_else(|| cfg!(windows).then(std::env::temp_dir)).map(|caches| caches.join("lora-kernels"))
}

/// The place of one compiled module: a file with its image and, after it, the image's hash.
pub(super) struct Entry(PathBuf);

impl Entry {
    /// The entry of a module for `arch`, named by the hash of all that its image depends on.
    pub(super) fn new(folder: &Path, module: &Module, arch: &str, version: (i32, i32)) -> Entry {
        let key = format!("{arch} {version:?} {OPTIONS:?} {}", module.text());
        Entry(folder.join(format!("{}-{arch}-{:016x}", module.name, fnv1a(key.bytes()))))
    }

    /// The image, if there is one and it is whole: the driver is given no length and would read past a truncated one.
    pub(super) fn read(&self) -> Option<Vec<u8>> {
        let mut image = fs::read(&self.0).ok()?;
        let hash = image.split_off(image.len().checked_sub(8)?);
        (hash == fnv1a(image.iter().copied()).to_le_bytes()).then_some(image)
    }

    /// Keeps an image, if that can be done: without it the module is compiled again next time. Readers see the old file or
    /// the whole new one.
    pub(super) fn write(&self, image: &[u8]) {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let partial = self.0.with_extension(format!("{}-{count}.tmp", std::process::id()));
        let write = || -> io::Result<()> {
            if let Some(folder) = self.0.parent() {
                fs::create_dir_all(folder)?;
            }
            let mut file = fs::File::create(&partial)?;
            file.write_all(image)?;
            file.write_all(&fnv1a(image.iter().copied()).to_le_bytes())?;
            file.sync_all()?;
            fs::rename(&partial, &self.0)
        };
        if write().is_err() {
            let _ = fs::remove_file(&partial);
        }
    }
}
