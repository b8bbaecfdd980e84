//! What tells whether a base, a folder or a file is still the same, wherever it lies: FNV-1a, in hexadecimal. It finds
//! accidents, not attacks.

use std::{
    fs::{self, File},
    io::{BufReader, Read},
    path::{Path, PathBuf},
};

use half::bf16;
use lora_core::{Tensor, hash::fnv1a, peft::Base};
use lora_kernels::Acc;

use crate::{Error, Result, adapter::PICKLED_FILE};

/// Elements of every tensor that are looked at: reading all would touch every page of a mapped file.
const SAMPLE: usize = 61;

/// The fingerprint of a base for the adapters that are trained on it: names, shapes and a sample of the elements of all
/// tensors but those of modules that adapters bring themselves (a classifier's head). The sample is rounded to bf16 from the
/// values of the file ([`Outline::before_rounding`](lora_core::peft::Outline::before_rounding)), so that a base is the same
/// base in whatever type it is loaded, on every device, and so is a copy of it in bf16. A copy in f16 is another base: it was
/// rounded in a way of its own.
///
/// # Errors
/// What reading from a device can cause.
pub fn of_base(base: &dyn Base) -> Result<String> {
    let bytes = sampled(base, |name| !base.outline().is_saved_module(name), true)?;
    Ok(format!("{:016x}", fnv1a(bytes)))
}

/// As [`of_base`], with the modules that adapters bring: of the model that a run trains on, with all digits of its values where
/// it keeps them, and else as they are in 16 bits on any device.
///
/// # Errors
/// What reading from a device can cause.
pub fn of_model(base: &dyn Base) -> Result<u64> {
    let halves = base.tensors().any(|(_, t)| t.dtype().size() < 4);
    Ok(fnv1a(sampled(base, |_| true, halves)?))
}

/// Names, shapes and the sample of the tensors whose names are `wanted`, rounded to bf16 or as it is.
fn sampled(base: &dyn Base, wanted: impl Fn(&str) -> bool, round: bool) -> Result<Vec<u8>> {
    let outline = base.outline();
    let own = || base.tensors().filter(|(name, _)| wanted(name));
    let kept: Vec<&Tensor> =
        own().filter(|(name, _)| !outline.before_rounding.contains_key(*name)).map(|(_, t)| t).collect();
    let sample = sample(&kept, base)?;
    let (mut bytes, mut rest) = (Vec::new(), sample.as_slice());
    let rounded = |v: f32| bf16::from_f32(v).to_le_bytes();
    for (name, t) in own() {
        bytes.extend(name.bytes().chain(t.shape().iter().flat_map(|n| (*n as u64).to_le_bytes())));
        if let Some(values) = outline.before_rounding.get(name) {
            bytes.extend(values.iter().flat_map(|v| rounded(*v)));
            continue;
        }
        let (part, after) = rest.split_at(places(t).len());
        match round {
            true => bytes.extend(part.iter().flat_map(|v| rounded(*v as f32))),
            false => bytes.extend(part.iter().flat_map(|v| v.to_le_bytes())),
        }
        rest = after;
    }
    Ok(bytes)
}

/// The elements of a tensor of the host at its [`places`].
pub(crate) fn elements(t: &Tensor) -> Result<Vec<f32>> {
    let column = t.clone().reshape(&[t.len(), 1]);
    let one = |i: u32| Ok(column.rows_in(i as usize..i as usize + 1).to_vec::<f32>()?[0]);
    places(t).map(one).collect()
}

/// Places of the elements that are looked at.
fn places(t: &Tensor) -> impl ExactSizeIterator<Item = u32> + use<> {
    (0..t.len()).step_by(t.len().div_ceil(SAMPLE).max(1)).map(|i| i as u32)
}

/// The elements of tensors of `base` at their [`places`], one tensor after the other.
///
/// # Errors
/// What reading from a device can cause.
fn sample(tensors: &[&Tensor], base: &dyn Base) -> Result<Vec<f64>> {
    let Some(device) = tensors.first().map(|t| t.device()) else { return Ok(Vec::new()) };
    let ids: Vec<u32> = tensors.iter().flat_map(|t| places(t)).collect();
    // They are collected where they lie and read together: a device's host waits once, not for every element.
    let ids = Tensor::from_slice(&device, &[ids.len(), 1], &ids)?;
    let mut sample = Tensor::empty(&device, base.dtype(), &[ids.len(), 1])?;
    let mut at = 0;
    for t in tensors {
        let part = at..at + places(t).len();
        let column = (*t).clone().reshape(&[t.len(), 1]);
        let to = Acc { to: sample.make_mut()?.rows_in(part.clone()), beta: 0.0 };
        lora_kernels::gather(column.mat(), ids.rows_in(part.clone()).reshape(&[part.len()]).mat(), to)?;
        at = part.end;
    }
    Ok(sample.to_f64()?)
}

/// The fingerprint of a file's contents.
///
/// # Errors
/// [`Error::Io`].
pub fn of_file(path: &Path) -> Result<String> {
    let hash = contents(path).map_err(|e| Error::io("read", path, e))?;
    Ok(format!("{hash:016x}"))
}

/// The fingerprint of the files in a model's or an adapter's folder, by their names: configuration, tokenizer, chat template
/// and weights.
///
/// # Errors
/// [`Error::Io`].
pub fn of_folder(dir: &Path) -> Result<String> {
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| Error::io("read", dir, e))? {
        let path = entry.map_err(|e| Error::io("read", dir, e))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let part = ["json", "safetensors", "model", "txt", "jinja"].iter().any(|e| name.ends_with(&format!(".{e}")));
        if (part || name == PICKLED_FILE) && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    let mut bytes = Vec::new();
    for path in &files {
        bytes.extend(path.file_name().unwrap_or_default().as_encoded_bytes());
        bytes.extend(contents(path).map_err(|e| Error::io("read", path, e))?.to_le_bytes());
    }
    Ok(format!("{:016x}", fnv1a(bytes)))
}

fn contents(path: &Path) -> std::io::Result<u64> {
    let mut bytes = BufReader::with_capacity(1 << 20, File::open(path)?).bytes();
    let mut failed = None;
    let hash = fnv1a(std::iter::from_fn(|| match bytes.next()? {
        Ok(byte) => Some(byte),
        Err(e) => {
            failed = Some(e);
            None
        }
    }));
    failed.map_or(Ok(hash), Err)
}

#[cfg(test)]
mod tests {
    use lora_kernels::{DType, Device};

    use super::*;
    use crate::{LoadOptions, load_with};

    /// f16 rounds once before bf16 does, which is another value now and then: the file's values count, whatever they became.
    #[test]
    fn a_base_is_the_same_in_every_type() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        for name in ["gpt2", "bert_classification"] {
            let of = |dtype: DType| {
                let options = LoadOptions { dtype, ..LoadOptions::default() };
                let model = load_with(&golden.join(name).join("model"), &Device::Cpu, &options).unwrap();
                assert!(model.tensors().any(|(_, t)| t.dtype() == dtype), "{name}: {dtype:?}");
                of_base(&*model).unwrap()
            };
            let exact = of(DType::F32);
            assert_eq!([of(DType::Bf16), of(DType::F16)], [exact.clone(), exact], "{name}");
        }
    }

    #[test]
    fn a_folder_is_known_by_its_files_not_by_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let of = |name: &str, files: &[(&str, &[u8])]| {
            let dir = dir.path().join(name);
            fs::create_dir(&dir).unwrap();
            files.iter().for_each(|(name, bytes)| fs::write(dir.join(name), bytes).unwrap());
            of_folder(&dir).unwrap()
        };
        let a = of("a", &[("config.json", b"{}"), ("model.safetensors", b"12")]);
        assert_eq!(a, of("b", &[("model.safetensors", b"12"), ("config.json", b"{}"), ("README.md", b"x")]));
        assert_ne!(a, of("c", &[("model.safetensors", b"13"), ("config.json", b"{}")]));
        assert_ne!(a, of("d", &[("config.json", b"{}")]));
        assert!(of_folder(&dir.path().join("none")).unwrap_err().to_string().contains("none"));
        let template: [(&str, &[u8]); 3] =
            [("config.json", b"{}"), ("model.safetensors", b"12"), ("chat_template.jinja", b"x")];
        assert_ne!(a, of("e", &template));
        // Of the formats of pickles adapters alone are read, where there is nothing else.
        let pickled = |dir, weights: &[u8]| of(dir, &[("adapter_config.json", b"{}"), (PICKLED_FILE, weights)]);
        assert_ne!(pickled("f", b"12"), pickled("g", b"13"));
        let one = dir.path().join("one");
        let of_bytes = |bytes: &[u8]| {
            fs::write(&one, bytes).unwrap();
            of_file(&one).unwrap()
        };
        assert_ne!(of_bytes(&[1; 100_000]), of_bytes(&[&[1; 99_999][..], &[2]].concat()));
    }
}
