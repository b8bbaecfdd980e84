//! What the tests on golden models, and those of bad adapters, share.

use std::{
    fs,
    path::{Path, PathBuf},
};

use lora_core::{Params, Tensor};
use lora_kernels::{DType, Device, axpby};
use lora_model::{Model, adapter, checkpoint::TensorFile};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

pub(crate) const CPU: Device = Device::Cpu;

/// Where a model computes.
#[derive(Clone)]
pub(crate) struct Place {
    pub device: Device,
    pub dtype: DType,
    /// Largest |x − ref| / |ref| of logits, losses and the whole gradient.
    pub close: f64,
    /// The same of one parameter's gradient. In bf16 PyTorch 2.15 under autocast reaches 4.3e-2 on the small GPT-2, and
    /// 2.0e-2 over the whole gradient.
    pub each: f64,
}

/// The host and every GPU, in f32 and bf16.
pub(crate) fn places() -> Vec<Place> {
    let both = |device: Device| {
        let single = Place { device: device.clone(), dtype: DType::F32, close: 1e-5, each: 1e-5 };
        [single, Place { device, dtype: DType::Bf16, close: 2e-2, each: 4e-2 }]
    };
    std::iter::once(CPU).chain(gpus()).flat_map(both).collect()
}

/// With their features the emulated device and the first CUDA device.
pub(crate) fn gpus() -> Vec<Device> {
    let gpus: Vec<Device> = [
        #[cfg(feature = "emulator")]
        lora_kernels::cuda::Gpu::emulated(0).map(Device::Cuda),
        #[cfg(feature = "cuda")]
        Device::cuda(0),
    ]
    .into_iter()
    .filter_map(|gpu: Result<Device, lora_kernels::Error>| {
        gpu.inspect_err(|e| println!("skipped: no CUDA device ({e})")).ok()
    })
    .collect();
    let required = std::env::var_os("LORA_GATES").is_some_and(|v| v == "required");
    assert!(!(required && gpus.is_empty()), "required, but there is no CUDA device");
    gpus
}

/// The folder of all goldens.
pub(crate) fn goldens() -> PathBuf {
    // As cargo says when the test runs, so that a copied executable finds a copied folder.
    let package = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&package).join("tests/golden")
}

/// A tensor of a golden file.
pub(crate) fn reference(file: &TensorFile, name: &str) -> Tensor {
    let info = file.info(name).unwrap_or_else(|| panic!("no {name} in {}", file.path().display()));
    file.tensor(name, &info.shape, &CPU).unwrap()
}

/// Moves every parameter away from where it began: nothing is zero any more.
pub(crate) fn disturb(params: &mut Params, scale: f32) {
    let mut rng = ChaCha8Rng::seed_from_u64(77);
    let noise: Vec<f32> = (0..params.count()).map(|_| rng.random_range(-scale..scale)).collect();
    let noise = Tensor::from_slice(&CPU, &[1, params.count()], &noise).unwrap();
    let noise = noise.to(&params.device(), params.dtype()).unwrap();
    axpby(1.0, noise.mat(), 1.0, params.flat_mut().unwrap()).unwrap();
}

/// |x − ref| / |ref|.
pub(crate) fn relative(x: &Tensor, reference: &Tensor) -> f64 {
    distance(x, reference) / norm(reference)
}

/// |x − ref|.
pub(crate) fn distance(x: &Tensor, reference: &Tensor) -> f64 {
    assert_eq!(x.shape(), reference.shape());
    let (x, r) = (x.to_f64().unwrap(), reference.to_f64().unwrap());
    x.iter().zip(&r).map(|(x, r)| (x - r).powi(2)).sum::<f64>().sqrt()
}

/// |x|.
pub(crate) fn norm(x: &Tensor) -> f64 {
    x.to_f64().unwrap().iter().map(|x| x * x).sum::<f64>().sqrt()
}

#[track_caller]
pub(crate) fn within(what: &str, error: f64, most: f64) {
    // Not `error > most`: a NaN is not within anything.
    assert!(error <= most, "{what}: {error:.2e} is above {most:.0e}");
    println!("{what}: {error:.2e}");
}

// Adapters that are changed ------------------------------------------------------------------------------------------

/// A copy of an adapter's folder.
pub(crate) fn copied(folder: &Path) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in [adapter::CONFIG_FILE, adapter::WEIGHTS_FILE] {
        fs::copy(folder.join(file), dir.path().join(file)).unwrap();
    }
    dir
}

/// The configuration of an adapter.
pub(crate) fn saved_config(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join(adapter::CONFIG_FILE)).unwrap()).unwrap()
}

/// Changes the header and the bytes of the tensors' file.
pub(crate) fn edit(dir: &Path, change: impl FnOnce(&mut Value, &mut Vec<u8>)) {
    let path = dir.join(adapter::WEIGHTS_FILE);
    let bytes = fs::read(&path).unwrap();
    let n = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
    let mut data = bytes[8 + n..].to_vec();
    change(&mut header, &mut data);
    let header = header.to_string();
    fs::write(path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()).unwrap();
}

/// Gives a tensor another name.
pub(crate) fn rename(from: &'static str, to: &'static str) -> impl Fn(&mut Value, &mut Vec<u8>) {
    move |header, _| {
        let header = header.as_object_mut().unwrap();
        let t = header.remove(from).unwrap();
        header.insert(to.to_owned(), t);
    }
}

/// Changes a key of the configuration.
pub(crate) fn set(dir: &Path, key: &str, value: Value) {
    let mut c = saved_config(dir);
    c[key] = value;
    fs::write(dir.join(adapter::CONFIG_FILE), c.to_string()).unwrap();
}

/// Checks that loading or attaching fails and that the message says all of this.
#[track_caller]
pub(crate) fn refused(dir: &Path, model: &dyn Model, wanted: &[&str]) {
    let Err(e) = adapter::attach(dir, model, &CPU) else { panic!("accepted, instead of an error about {wanted:?}") };
    let text = e.to_string();
    for part in wanted {
        assert!(text.contains(part), "{text:?} does not say {part:?}");
    }
    assert!(!text.contains('\n'), "{text:?} is more than one paragraph");
}
