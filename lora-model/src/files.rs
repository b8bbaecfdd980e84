//! Files written whole or not at all, and errors that name the path.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use crate::{Error, Result};

const BUFFER: usize = 1 << 20;
const SUFFIX: &str = ".tmp";

/// Writes `path` so that a reader, or a machine that dies at any moment, finds either the old contents or the new ones:
/// into a temporary file in the same folder, flushed to the disk, renamed over `path`, and the folder flushed in turn.
///
/// Whatever maps or has opened the old file keeps its old contents, so a folder can be saved over the very files that
/// its tensors are mapped from. A link stays a link to the new contents, and what is no file (a pipe, a terminal,
/// `/dev/null`) is written to as it is.
///
/// `write` may fail with an [`io::Error`] or, through `?`, with an [`Error`], which comes back as it is.
///
/// # Errors
/// [`Error::Io`] with the path and the system's reason (a full disk, say). The temporary file is then gone and `path`
/// is as it was.
pub fn write_atomic(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let told = |e: io::Error| e.downcast::<Error>().unwrap_or_else(|e| Error::io("write", path, e));
    let Some(place) = replaceable(path) else {
        return OpenOptions::new().write(true).open(path).and_then(|f| write_to(f, write)).map(drop).map_err(told);
    };
    let temporary = temporary(&place)?;
    let written = write_new(&temporary, write).and_then(|()| fs::rename(&temporary, &place));
    if let Err(e) = written {
        // Best effort: the first error is the one worth telling.
        let _ = fs::remove_file(&temporary);
        return Err(told(e));
    }
    sync_folder(folder(&place)).map_err(|e| Error::io("flush the folder of", path, e))
}

/// The file whose place new contents of `path` can take: `path` itself, or what a link leads to. `None` for a pipe, a
/// terminal or a device: renaming a file over one would take it from every other program.
pub fn replaceable(path: &Path) -> Option<PathBuf> {
    match fs::metadata(path) {
        Ok(m) if !m.is_file() && !m.is_dir() => None,
        _ => Some(if path.is_symlink() { fs::canonicalize(path).unwrap_or(path.into()) } else { path.into() }),
    }
}

/// [`write_atomic`] of bytes that are already there.
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic(path, |w| w.write_all(bytes))
}

/// The whole of a text file.
///
/// # Errors
/// [`Error::Io`] when it cannot be read, also when it is not UTF-8 (the message says at which byte).
pub fn read_to_string(path: &Path) -> Result<String> {
    let bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        let reason = format!("it is not UTF-8 text: byte {at} starts no valid character; save it as UTF-8");
        Error::io("read", path, io::Error::new(io::ErrorKind::InvalidData, reason))
    })
}

/// Copies a file, as atomically as [`write_atomic`].
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut source = File::open(from).map_err(|e| Error::io("read", from, e))?;
    write_atomic(to, |w| io::copy(&mut source, w).map(drop))
}

/// Makes a folder and those above it, where they do not exist yet.
pub fn create_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| Error::io("create the folder", path, e))
}

/// Removes what a killed [`write_atomic`] left in `folder`. Only for a folder that no other process is writing to.
pub fn remove_temporary(folder: &Path) -> Result<()> {
    let entries = fs::read_dir(folder).map_err(|e| Error::io("read the folder", folder, e))?;
    for entry in entries {
        let entry = entry.map_err(|e| Error::io("read the folder", folder, e))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with('.') && name.ends_with(SUFFIX) {
            fs::remove_file(entry.path()).map_err(|e| Error::io("remove", &entry.path(), e))?;
        }
    }
    Ok(())
}

fn write_new(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    write_to(OpenOptions::new().write(true).create_new(true).open(path)?, write)?.sync_all()
}

fn write_to(file: File, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<File> {
    let mut buffered = BufWriter::with_capacity(BUFFER, file);
    write(&mut buffered)?;
    buffered.into_inner().map_err(|e| e.into_error())
}

/// A name beside `path` that no other process and no other thread uses.
fn temporary(path: &Path) -> Result<PathBuf> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let Some(name) = path.file_name() else {
        return Err(Error::io("write", path, io::Error::new(io::ErrorKind::InvalidInput, "it names no file")));
    };
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = format!(".{}.{}-{count}{SUFFIX}", name.to_string_lossy(), std::process::id());
    Ok(folder(path).join(name))
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

/// Makes the rename itself durable; only Unix lets a folder be opened and flushed.
fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut v: Vec<_> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        v.sort();
        v
    }

    #[test]
    fn writing_replaces_the_whole_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        write_bytes(&path, b"first, and longer").unwrap();
        write_bytes(&path, b"second").unwrap();
        copy(&path, &dir.path().join("b.txt")).unwrap();
        assert_eq!(read_to_string(&dir.path().join("b.txt")).unwrap(), "second");
        assert_eq!(names(dir.path()), ["a.txt", "b.txt"]);
    }

    #[test]
    fn a_failed_write_leaves_the_target_and_no_litter() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        write_bytes(&path, b"old").unwrap();
        let e = write_atomic(&path, |w| {
            w.write_all(&[b'x'; 3 << 20])?;
            Err(io::Error::new(io::ErrorKind::StorageFull, "no space left on device"))
        })
        .unwrap_err();
        let text = e.to_string();
        assert!(text.contains("a.txt") && text.contains("no space left"), "{text}");
        assert_eq!(read_to_string(&path).unwrap(), "old");
        assert_eq!(names(dir.path()), ["a.txt"]);
    }

    #[cfg(unix)]
    #[test]
    fn a_link_and_what_is_no_file_stay_what_they_are() {
        use std::os::unix::{fs::FileTypeExt, fs::symlink, net::UnixListener};
        let dir = tempfile::tempdir().unwrap();
        let [file, link, lost, pipe, socket] =
            ["file", "link", "lost", "pipe", "socket"].map(|name| dir.path().join(name));
        write_bytes(&file, b"old").unwrap();
        symlink("file", &link).unwrap();
        write_bytes(&link, b"new").unwrap();
        assert!(link.is_symlink());
        assert_eq!(read_to_string(&file).unwrap(), "new");
        symlink("nowhere", &lost).unwrap();
        write_bytes(&lost, b"found").unwrap();
        assert_eq!(read_to_string(&lost).unwrap(), "found");

        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let reader = std::thread::spawn({
            let pipe = pipe.clone();
            move || read_to_string(&pipe).unwrap()
        });
        write_bytes(&pipe, b"through the pipe").unwrap();
        assert_eq!(reader.join().unwrap(), "through the pipe");
        assert!(fs::symlink_metadata(&pipe).unwrap().file_type().is_fifo());

        // A file that may not be opened is not replaced either.
        let _held = UnixListener::bind(&socket).unwrap();
        assert!(write_bytes(&socket, b"x").unwrap_err().to_string().contains("socket"));
        assert!(fs::symlink_metadata(&socket).unwrap().file_type().is_socket());
        assert_eq!(names(dir.path()), ["file", "link", "lost", "pipe", "socket"]);
    }

    #[test]
    fn an_error_of_ours_inside_a_write_comes_back_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let e = write_atomic(&dir.path().join("a"), |_| {
            Err(Error::Tokenizer { path: "inner.json".into(), problem: "inner problem".into() })?;
            Ok(())
        })
        .unwrap_err();
        assert!(matches!(e, Error::Tokenizer { .. }), "{e}");
    }

    #[test]
    fn every_error_names_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let bad = dir.path().join("bad.txt");
        fs::write(&bad, b"ab\xff").unwrap();
        let missing = dir.path().join("missing");
        for (e, wanted) in [
            (read_to_string(&missing).unwrap_err(), "missing"),
            (read_to_string(&bad).unwrap_err(), "byte 2"),
            (copy(&missing, &dir.path().join("c")).unwrap_err(), "missing"),
            (write_bytes(&missing.join("deeper"), b"").unwrap_err(), "deeper"),
            (write_bytes(Path::new("/"), b"").unwrap_err(), "names no file"),
            (write_bytes(dir.path(), b"").unwrap_err(), &dir.path().to_string_lossy()),
            (create_folder(&bad).unwrap_err(), "bad.txt"),
            (remove_temporary(&missing).unwrap_err(), "missing"),
        ] {
            assert!(e.to_string().contains(wanted), "{e}");
        }
    }

    #[test]
    fn what_a_kill_left_is_removed_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        for name in [".a.json.77-0.tmp", "b.tmp", ".hidden"] {
            fs::write(dir.path().join(name), "x").unwrap();
        }
        remove_temporary(dir.path()).unwrap();
        assert_eq!(names(dir.path()), [".hidden", "b.tmp"]);
    }
}
