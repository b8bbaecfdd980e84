mod cache;
#[cfg(test)]
mod gate;
mod nvrtc;
mod prebuilt;

use std::path::Path;

use self::nvrtc::Compiler;
use crate::{Error, Result};

/// What every kernel uses; stands before each module's source.
const COMMON: &str = include_str!("common.cuh");

/// The source of some kernels, compiled together.
#[derive(Debug)]
pub(crate) struct Module {
    /// Its name in messages, in the cache and among the prebuilt images.
    pub(crate) name: &'static str,
    source: &'static str,
    arch: Arch,
}

/// What a module's kernels need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arch {
    /// Any device from compute capability 8.0 on.
    Any,
    /// Exactly 9.0 with its own instructions (wgmma, TMA).
    Sm90a,
}

impl Module {
    pub(crate) const fn new(name: &'static str, source: &'static str, arch: Arch) -> Module {
        Module { name, source, arch }
    }

    /// The whole text.
    pub(crate) fn text(&self) -> String {
        format!("#line 1 \"common.cuh\"\n{COMMON}\n#line 1 \"{}.cu\"\n{}", self.name, self.source)
    }
}

/// Makes the machine code of a module and hands it to `load`: from the cache, else compiled by NVRTC, else, where NVRTC is
/// not there or of no use, as it was compiled beforehand. `LORA_NVRTC=off` asks for the last.
pub(super) fn image<T>(module: &Module, cc: (u32, u32), load: &dyn Fn(&[u8]) -> Result<T>) -> Result<T> {
    image_from(module, cc, nvrtc::compiler(), cache::folder().as_deref(), load)
}

fn image_from<T>(
    module: &Module,
    cc: (u32, u32),
    compiler: Result<Compiler>,
    cache: Option<&Path>,
    load: &dyn Fn(&[u8]) -> Result<T>,
) -> Result<T> {
    let (major, minor) = cc;
    if module.arch == Arch::Sm90a && cc != (9, 0) {
        let what =
            format!("module {} is for compute capability 9.0, not {major}.{minor}: a bug, report it", module.name);
        return Err(Error::Cuda { what });
    }
    let compiled = compiler.and_then(|compiler| {
        let arch = target(cc, &compiler.archs).ok_or_else(|| {
            let (new, old) = compiler.version;
            Error::Cuda { what: format!("NVRTC {new}.{old} compiles nothing for compute capability {major}.{minor}") }
        })?;
        let entry = cache.map(|folder| cache::Entry::new(folder, module, &arch, compiler.version));
        // An entry that does not load counts as none: it is written anew.
        if let Some(loaded) = entry.as_ref().and_then(cache::Entry::read).and_then(|image| load(&image).ok()) {
            return Ok(loaded);
        }
        let image = (compiler.compile)(module, &arch)?;
        let loaded = load(&image)?;
        if let Some(entry) = entry {
            entry.write(&image);
        }
        Ok(loaded)
    });
    compiled.or_else(|e| match (prebuilt::image(module, cc), e) {
        (Some(image), _) => load(&image),
        (None, Error::Cuda { what }) => {
            Err(Error::Cuda { what: format!("{what} (module {} for sm_{major}{minor}, not built in)", module.name) })
        }
        (None, e) => Err(e),
    })
}

/// What to compile for: the machine code of the device's own architecture where NVRTC knows it, else PTX of the latest
/// one before, which the driver translates.
fn target((major, minor): (u32, u32), archs: &[u32]) -> Option<String> {
    let device = 10 * major + minor;
    match archs.iter().copied().filter(|a| (80..=device).contains(a)).max()? {
        90 if device == 90 => Some("sm_90a".into()),
        arch if arch == device => Some(format!("sm_{arch}")),
        arch => Some(format!("compute_{arch}")),
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, fs, path::PathBuf};

    use super::*;
    use crate::cuda::testing::missing;

    static MODULE: Module = Module::new("of a test", "KERNEL(32) copy(int* x) { *x = 1; }", Arch::Any);

    /// A folder that is removed at the end.
    struct Folder(PathBuf);

    impl Folder {
        fn new(test: &str) -> Folder {
            let folder = std::env::temp_dir().join(format!("lora-kernels-{test}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&folder);
            Folder(folder)
        }

        fn files(&self) -> Vec<PathBuf> {
            fs::read_dir(&self.0).map(|d| d.map(|f| f.unwrap().path()).collect()).unwrap_or_default()
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// Gets an image through a compiler that stands in for NVRTC and a driver that loads what `loads` accepts: the image
    /// that was loaded, and how often the compiler ran.
    fn get(cache: &Path, version: (i32, i32), code: &str, loads: impl Fn(&[u8]) -> bool) -> (Result<Vec<u8>>, usize) {
        let runs = RefCell::new(0);
        let compile = |_: &Module, arch: &str| {
            *runs.borrow_mut() += 1;
            Ok(format!("{code} for {arch}").into_bytes())
        };
        let compiler = Compiler { version, archs: vec![75, 80, 90, 100], compile: &compile };
        let image = image_from(&MODULE, (9, 0), Ok(compiler), Some(cache), &|image| match loads(image) {
            true => Ok(image.to_vec()),
            false => Err(Error::Cuda { what: "the driver refuses it".into() }),
        });
        (image, runs.into_inner())
    }

    #[test]
    fn a_module_is_compiled_once_and_then_comes_from_the_cache() {
        let folder = Folder::new("cache");
        let (image, runs) = get(&folder.0, (13, 0), "code", |_| true);
        assert_eq!((image.unwrap(), runs), (b"code for sm_90a".to_vec(), 1));
        let (image, runs) = get(&folder.0, (13, 0), "other", |_| true);
        assert_eq!((image.unwrap(), runs), (b"code for sm_90a".to_vec(), 0));
        let (image, runs) = get(&folder.0, (13, 1), "newer", |_| true);
        assert_eq!(
            (image.unwrap(), runs),
            (b"newer for sm_90a".to_vec(), 1),
            "the version of NVRTC is part of the key"
        );
        assert_eq!(folder.files().len(), 2, "two entries and no temporary file: {:?}", folder.files());
    }

    #[test]
    fn a_damaged_or_refused_cache_entry_is_replaced() {
        let folder = Folder::new("poisoned");
        get(&folder.0, (13, 0), "code", |_| true).0.unwrap();
        let entry = folder.files().pop().unwrap();
        let whole = fs::read(&entry).unwrap();
        let mut flipped = whole.clone();
        flipped[2] ^= 1;
        for damage in [&whole[..whole.len() - 3], &flipped, b"", b"1234567"] {
            fs::write(&entry, damage).unwrap();
            let (image, runs) = get(&folder.0, (13, 0), "code", |image| {
                assert_eq!(image, b"code for sm_90a", "a damaged image reaches the driver");
                true
            });
            assert_eq!((image.unwrap(), runs), (b"code for sm_90a".to_vec(), 1));
            assert_eq!(fs::read(&entry).unwrap(), whole);
        }
        // Whole, and yet refused by the driver.
        let (image, runs) = get(&folder.0, (13, 0), "better", |image| image.starts_with(b"better"));
        assert_eq!((image.unwrap(), runs), (b"better for sm_90a".to_vec(), 1));
        let (image, runs) = get(&folder.0, (13, 0), "unused", |_| true);
        assert_eq!((image.unwrap(), runs), (b"better for sm_90a".to_vec(), 0));
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_no_error() {
        let folder = Folder::new("unwritable");
        fs::create_dir_all(&folder.0).unwrap();
        let file = folder.0.join("a file, not a folder");
        fs::write(&file, "").unwrap();
        let (image, runs) = get(&file, (13, 0), "code", |_| true);
        assert_eq!((image.unwrap(), runs), (b"code for sm_90a".to_vec(), 1));
    }

    #[test]
    fn what_the_driver_refuses_is_an_error_and_not_cached() {
        let folder = Folder::new("refused");
        let (image, runs) = get(&folder.0, (13, 0), "code", |_| false);
        assert!(image.unwrap_err().to_string().contains("the driver refuses it") && runs == 1);
        assert!(folder.files().is_empty());
    }

    #[test]
    fn without_nvrtc_a_module_that_is_not_built_in_is_an_error_that_says_what_to_install() {
        let lost = Err(nvrtc::not_found());
        let e = image_from(&MODULE, (8, 6), lost, None, &|_| Ok(())).unwrap_err().to_string();
        for part in ["libnvrtc", "install", "nvidia-cuda-nvrtc", "LD_LIBRARY_PATH", "of a test", "sm_86"] {
            assert!(e.contains(part), "{part}: {e}");
        }
    }

    #[test]
    fn without_nvrtc_built_in_images_serve_every_device() {
        for module in crate::cuda::modules::ALL {
            let devices: &[_] =
                if module.arch == Arch::Any { &[(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)] } else { &[(9, 0)] };
            for &cc in devices {
                let image = image_from(module, cc, Err(nvrtc::not_found()), None, &|image| Ok(image.to_vec()))
                    .unwrap_or_else(|e| panic!("{e}; {}", prebuilt::REMEDY));
                if cc <= (9, 0) {
                    assert!(image.starts_with(b"\x7fELF"), "{} for {cc:?}", module.name);
                } else {
                    assert!(image.ends_with(b"\0") && image.starts_with(b"//"), "{} for {cc:?}", module.name);
                }
            }
        }
    }

    #[test]
    fn a_module_for_hopper_is_asked_for_on_hopper_only() {
        static WGMMA: Module = Module::new("of a test", "", Arch::Sm90a);
        let compile = |_: &Module, _: &str| -> Result<Vec<u8>> { panic!("it is compiled") };
        for cc in [(8, 0), (10, 0)] {
            let compiler = Compiler { version: (13, 0), archs: vec![80, 90, 100], compile: &compile };
            let e = image_from(&WGMMA, cc, Ok(compiler), None, &|_| Ok(())).unwrap_err();
            assert!(e.to_string().contains("a bug"), "{e}");
        }
    }

    #[test]
    fn the_target_is_the_device_or_ptx_before_it() {
        let archs = [75, 80, 86, 89, 90, 100, 120];
        let target = |cc| super::target(cc, &archs);
        assert_eq!(target((8, 0)).unwrap(), "sm_80");
        assert_eq!(target((8, 6)).unwrap(), "sm_86");
        assert_eq!(target((8, 7)).unwrap(), "compute_86");
        assert_eq!(target((9, 0)).unwrap(), "sm_90a");
        assert_eq!(target((10, 0)).unwrap(), "sm_100");
        assert_eq!(target((10, 3)).unwrap(), "compute_100");
        assert_eq!(target((15, 0)).unwrap(), "compute_120");
        assert_eq!(super::target((8, 9), &[75, 90, 100]), None, "an NVRTC that has dropped the device");
        assert_eq!(super::target((9, 0), &[75, 80]).unwrap(), "compute_80", "an NVRTC that does not know it yet");
    }

    #[test]
    fn source_that_does_not_compile_is_an_error_with_the_lines_of_the_compiler() {
        static WRONG: Module = Module::new("wrong", "// A comment.\nKERNEL(32) f() { undeclared = 1; }", Arch::Any);
        let compiler = match nvrtc::compiler() {
            Ok(compiler) => compiler,
            Err(e) => return missing(&format!("no NVRTC ({e})")),
        };
        let e = image_from(&WRONG, (8, 0), Ok(compiler), None, &|_| Ok(())).unwrap_err().to_string();
        for part in ["module wrong for sm_80", "wrong.cu(2)", "\"undeclared\" is undefined"] {
            assert!(e.contains(part), "{part}: {e}");
        }
    }

    #[test]
    fn nvrtc_makes_machine_code_and_ptx() {
        if let Err(e) = nvrtc::compiler() {
            return missing(&format!("no NVRTC ({e})"));
        }
        let compiler = || nvrtc::compiler();
        let cubin = image_from(&MODULE, (9, 0), compiler(), None, &|image| Ok(image.to_vec())).unwrap();
        assert!(cubin.starts_with(b"\x7fELF"));
        let ptx = image_from(&MODULE, (99, 0), compiler(), None, &|image| Ok(image.to_vec())).unwrap();
        let text = std::str::from_utf8(&ptx).unwrap();
        assert!(text.contains(".entry copy(") && text.ends_with('\0') && text.matches('\0').count() == 1);
    }
}
