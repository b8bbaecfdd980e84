//! Hugging Face weights: `model.safetensors`, or shards named by `model.safetensors.index.json`, mapped rather than
//! read, checked strictly, and written back in the same layout under the same names.

mod file;
mod header;
mod layout;
mod save;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use lora_core::Tensor;
use lora_kernels::{DType, Device};

use crate::{Error, Result};

pub use file::{TensorFile, TensorInfo};
pub use layout::Layout;
pub use safetensors::Dtype;
pub use save::{file_bytes, save, write_tensors};

/// The weights of a model in one file.
pub const SINGLE_FILE: &str = "model.safetensors";
/// The index of weights in several files.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// The name and the shape of a tensor: what a model expects to read, or is about to write, and then in which type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// The name, as the model's code has it.
    pub name: String,
    /// The length of each dimension.
    pub shape: Vec<usize>,
    /// The type that it is written in: f32, or what f32 is rounded to, bf16 or f16. Not compared with what is read.
    pub dtype: DType,
}

impl TensorSpec {
    /// A spec of `name` with `shape`, in f32.
    pub fn new(name: impl Into<String>, shape: impl Into<Vec<usize>>) -> TensorSpec {
        TensorSpec { name: name.into(), shape: shape.into(), dtype: DType::F32 }
    }

    /// To be written in another type.
    pub fn in_dtype(self, dtype: DType) -> TensorSpec {
        TensorSpec { dtype, ..self }
    }
}

/// The weights of a model's folder.
///
/// Opening maps the files and reads their headers; a tensor's bytes are first touched when it is used.
///
/// ```
/// # use lora_core::Tensor;
/// # use lora_kernels::Device;
/// # use lora_model::checkpoint::{Checkpoint, Layout, TensorSpec, save};
/// # let dir = tempfile::tempdir()?;
/// # let dir = dir.path();
/// let w = Tensor::from_slice(&Device::Cpu, &[2, 2], &[1.0f32, 2.0, 3.0, 4.0])?;
/// let spec = TensorSpec::new("h.0.mlp.weight", [2, 2]);
/// save(dir, &Layout::single(), &[spec], |_| Ok(w.clone()))?;
///
/// let weights = Checkpoint::open(dir)?;
/// let w = weights.tensor("h.0.mlp.weight", &[2, 2], &Device::Cpu)?;
/// assert_eq!(w.shape(), [2, 2]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    files: Vec<TensorFile>,
    layout: Layout,
}

impl Checkpoint {
    /// Opens `model.safetensors`, or else the shards of `model.safetensors.index.json`, in `dir`.
    ///
    /// # Errors
    /// [`Error::NoWeights`] and [`Error::Pickled`] for a folder without such files; [`Error::Weights`] for a damaged
    /// file, and for an index that names a file outside the folder or disagrees with the shards; [`Error::Io`].
    pub fn open(dir: &Path) -> Result<Checkpoint> {
        let (single, index) = (dir.join(SINGLE_FILE), dir.join(INDEX_FILE));
        if single.exists() {
            let file = TensorFile::open(&single)?;
            let layout = Layout::of_single(file.names());
            return Ok(Checkpoint { dir: dir.to_owned(), files: vec![file], layout });
        }
        if index.exists() {
            let layout = Layout::from_index(&index)?;
            let files: Vec<TensorFile> =
                layout.files().iter().map(|name| open_shard(dir, name, &index)).collect::<Result<_>>()?;
            layout.check_shards(&index, &files)?;
            return Ok(Checkpoint { dir: dir.to_owned(), files, layout });
        }
        Err(no_weights(dir))
    }

    /// Gives every tensor the name that `rename` makes of the one in the file; tensors for which it gives `None` are
    /// left out. The names in the files are kept for [`save`].
    ///
    /// # Errors
    /// [`Error::Weights`] when two tensors get the same name.
    pub fn rename(self, rename: impl Fn(&str) -> Option<String>) -> Result<Checkpoint> {
        let layout =
            self.layout.rename(&rename).map_err(|problem| Error::Weights { file: self.dir.clone(), problem })?;
        Ok(Checkpoint { layout, ..self })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.layout.names()
    }

    /// Type, shape and file of a tensor.
    pub fn info(&self, name: &str) -> Option<TensorInfo> {
        let (file, stored) = self.layout.place(name)?;
        self.files[file].info(stored)
    }

    /// How the tensors are spread over files, and what they are called there: for [`save`].
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Checks that the tensors are exactly `expected`.
    ///
    /// # Errors
    /// [`Error::TensorNames`] with all that are missing and all that are unexpected, or [`Error::Shape`] for the first
    /// that has another shape.
    pub fn expect(&self, expected: &[TensorSpec]) -> Result<()> {
        check_names(&self.dir, self.names(), expected)?;
        for spec in expected {
            if let Some((file, stored)) = self.layout.place(&spec.name) {
                self.files[file].check_shape(stored, &spec.shape)?;
            }
        }
        Ok(())
    }

    /// A tensor in f32. F32 weights are used where they are mapped, without a copy; F16, BF16 and F64 are converted,
    /// each element rounded to the nearest (F64 beyond the range of f32 becomes ±∞).
    ///
    /// # Errors
    /// [`Error::TensorNames`] when there is none of this name, [`Error::Shape`], and [`Error::DType`] when its elements
    /// are of another type.
    pub fn tensor(&self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor> {
        let (file, stored) = self.place(name)?;
        file.tensor(stored, shape, device)
    }

    /// A tensor in bf16 on the host: BF16 weights where they are mapped, others rounded to the nearest.
    ///
    /// # Errors
    /// As of [`Checkpoint::tensor`].
    pub fn tensor_bf16(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let (file, stored) = self.place(name)?;
        file.tensor_bf16(stored, shape)
    }

    /// The file of a tensor, and its name there.
    fn place(&self, name: &str) -> Result<(&TensorFile, &str)> {
        let (file, stored) = self.layout.place(name).ok_or_else(|| missing(&self.dir, name))?;
        Ok((&self.files[file], stored))
    }
}

/// Opens a shard; one that is missing is the index's promise broken.
fn open_shard(dir: &Path, name: &str, index: &Path) -> Result<TensorFile> {
    let path = dir.join(name);
    if path.exists() {
        return TensorFile::open(&path);
    }
    let problem = format!("it names the shard {name}, which is not in the folder; fetch that file too");
    Err(Error::Weights { file: index.to_owned(), problem })
}

fn missing(place: &Path, name: &str) -> Error {
    Error::TensorNames { place: place.to_owned(), missing: vec![name.to_owned()], unexpected: Vec::new() }
}

/// Compares the names there are with those expected.
fn check_names<'a>(place: &Path, found: impl Iterator<Item = &'a str>, expected: &[TensorSpec]) -> Result<()> {
    let found: BTreeSet<&str> = found.collect();
    let wanted: BTreeMap<&str, ()> = expected.iter().map(|s| (s.name.as_str(), ())).collect();
    // In the order of the model, which is the order in which a reader thinks of its tensors.
    let missing = expected.iter().filter(|s| !found.contains(s.name.as_str()));
    let missing: Vec<String> = missing.map(|s| s.name.clone()).collect();
    let unexpected = found.iter().filter(|name| !wanted.contains_key(*name));
    let unexpected: Vec<String> = unexpected.map(|name| name.to_string()).collect();
    if missing.is_empty() && unexpected.is_empty() {
        return Ok(());
    }
    Err(Error::TensorNames { place: place.to_owned(), missing, unexpected })
}

/// Why a folder has no safetensors: it is none, it holds another format, or nothing at all.
fn no_weights(dir: &Path) -> Error {
    const OTHER: [&str; 4] = ["bin", "pt", "pth", "ckpt"];
    const NO_WEIGHTS: [&str; 5] =
        ["training_args.bin", "optimizer.pt", "scheduler.pt", "optimizer.bin", "rng_state.pth"];
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) => return Error::io("read the model's folder", dir, e),
    };
    let mut pickled: Vec<PathBuf> = entries
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|x| OTHER.iter().any(|o| x == *o)))
        .filter(|p| p.file_name().is_some_and(|n| NO_WEIGHTS.iter().all(|o| n != *o)))
        .collect();
    pickled.sort();
    match pickled.into_iter().next() {
        Some(file) => Error::Pickled { file },
        None => Error::NoWeights {
            dir: dir.to_owned(),
            looked_for: "model.safetensors, and model.safetensors.index.json with its shards",
        },
    }
}
