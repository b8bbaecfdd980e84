use super::{Module, nvrtc::OPTIONS};
use crate::hash::fnv1a;

/// A module as it was compiled beforehand, for machines without NVRTC.
struct Prebuilt {
    module: &'static str,
    /// The fingerprint of the source that it was compiled from.
    source: u64,
    /// Compressed cubins by architecture, and PTX.
    images: &'static [(&'static str, &'static [u8])],
}

/// All of them; the file is written by the test below.
const ALL: &[Prebuilt] = include!("../../../cubins/manifest.rs");

/// The NVRTC that makes them: that of the oldest driver that is supported, which would refuse PTX of a later one.
#[cfg(test)]
pub(super) const NVRTC: (i32, i32) = (13, 0);

/// How to bring the images up to date.
#[cfg(test)]
pub(super) const REMEDY: &str = "write the images in lora-kernels/cubins anew: \
    LORA_PREBUILD=1 .ci/cuda cargo test -p lora-kernels --features cuda --lib prebuilt";

/// The image of a module for a device of that compute capability. One that was compiled from another source counts as
/// none, because its kernels may take other arguments. Machine code for 8.0 runs on every 8.x; all after 9.0 take PTX.
pub(super) fn image(module: &Module, (major, minor): (u32, u32)) -> Option<Vec<u8>> {
    let arch = match (major, minor) {
        (8, _) => "sm_80",
        (9, 0) => "sm_90a",
        _ => "ptx",
    };
    image_of(module, arch)
}

/// The same for `sm_80`, `sm_90a` or `ptx`.
pub(super) fn image_of(module: &Module, arch: &str) -> Option<Vec<u8>> {
    let prebuilt = ALL.iter().find(|p| p.module == module.name && p.source == fingerprint(module))?;
    let (_, compressed) = prebuilt.images.iter().find(|(a, _)| *a == arch)?;
    miniz_oxide::inflate::decompress_to_vec_zlib(compressed).ok()
}

/// The hash of what a module's images are compiled from.
fn fingerprint(module: &Module) -> u64 {
    fnv1a(format!("{OPTIONS:?} {}", module.text()).bytes())
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fmt::Write as _, fs, path::Path};

    use rayon::prelude::*;

    use super::*;
    use crate::cuda::{
        module::{Arch, nvrtc},
        modules,
    };

    /// The architectures of a module's images.
    fn images(module: &Module) -> &'static [&'static str] {
        match module.arch {
            Arch::Any => &["sm_80", "sm_90a", "ptx"],
            Arch::Sm90a => &["sm_90a"],
        }
    }

    /// The images of a module as NVRTC makes them now.
    fn compile(module: &Module) -> Vec<(&'static str, Vec<u8>)> {
        let compiled = |arch| nvrtc::compile(module, arch).unwrap_or_else(|e| panic!("{e}"));
        let hopper = ("sm_90a", compiled("sm_90a").cubin);
        match module.arch {
            Arch::Any => {
                // PTX for 8.0 is what its machine code was made from.
                let ampere = compiled("sm_80");
                vec![("sm_80", ampere.cubin), hopper, ("ptx", ampere.ptx)]
            }
            Arch::Sm90a => vec![hopper],
        }
    }

    /// With `LORA_PREBUILD=1` writes the images; without, says whether they are those of the sources.
    #[test]
    fn the_prebuilt_images_are_up_to_date() {
        if std::env::var_os("LORA_PREBUILD").is_some_and(|v| v == "1") {
            let version = nvrtc::compiler().unwrap_or_else(|e| panic!("{e}")).version;
            assert_eq!(version, NVRTC, "another NVRTC: take the Python package nvidia-cuda-nvrtc==13.0.88");
            return write();
        }
        let stale = |m: &&&Module| {
            let prebuilt = ALL.iter().find(|p| p.module == m.name && p.source == fingerprint(m));
            prebuilt.is_none_or(|p| p.images.iter().map(|(arch, _)| *arch).ne(images(m).iter().copied()))
        };
        let stale: Vec<_> = modules::ALL.iter().filter(stale).map(|m| m.name).collect();
        assert!(stale.is_empty(), "the sources of {stale:?} have changed; {REMEDY}");
        assert_eq!(ALL.len(), modules::ALL.len(), "there are images of modules that are gone; {REMEDY}");
        for module in modules::ALL {
            assert!(image(module, (9, 0)).is_some(), "{}", module.name);
            let changed = Module::new(module.name, "// Changed.", module.arch);
            assert_eq!(image(&changed, (9, 0)), None, "an image of another source");
        }
    }

    fn write() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cubins");
        let compiled: Vec<_> = modules::ALL.par_iter().map(|m| (*m, compile(m))).collect();
        let mut manifest = format!("// Do not edit: {REMEDY}\n&[\n");
        let mut files = BTreeSet::from(["manifest.rs".to_owned()]);
        let (mut raw, mut packed) = (0, 0);
        for (module, images) in compiled {
            let (name, source) = (module.name, fingerprint(module));
            writeln!(manifest, "    Prebuilt {{ module: {name:?}, source: {source:#018x}, images: &[").unwrap();
            for (arch, image) in images {
                let file = if arch == "ptx" { format!("{name}.ptx.z") } else { format!("{name}.{arch}.cubin.z") };
                let compressed = miniz_oxide::deflate::compress_to_vec_zlib(&image, 10);
                (raw, packed) = (raw + image.len(), packed + compressed.len());
                fs::write(folder.join(&file), compressed).unwrap();
                writeln!(manifest, "        ({arch:?}, include_bytes!({file:?})),").unwrap();
                files.insert(file);
            }
            manifest += "    ] },\n";
        }
        fs::write(folder.join("manifest.rs"), manifest + "]\n").unwrap();
        for file in fs::read_dir(&folder).unwrap().map(|f| f.unwrap()) {
            let name = file.file_name().to_string_lossy().into_owned();
            if name.ends_with(".z") && !files.contains(&name) {
                fs::remove_file(file.path()).unwrap();
            }
        }
        println!("{} files, {packed} bytes ({raw} before compression)", files.len());
    }
}
