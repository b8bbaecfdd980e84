//! The file of an adapter's tensors, in either of PEFT's formats.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use lora_core::Tensor;
use lora_kernels::Device;

use super::{PICKLED_FILE, WEIGHTS_FILE};
use crate::{
    Error, Result,
    checkpoint::{Dtype, TensorFile, TensorInfo},
    convert::read_state_dict,
    error::List,
};

/// The tensors of an adapter's folder.
pub(super) enum AdapterTensors {
    /// Mapped.
    Safetensors(TensorFile),
    /// Of a file of `torch.save`, in f32.
    Pickled { path: PathBuf, tensors: BTreeMap<String, Tensor>, metadata: BTreeMap<String, String> },
}

impl AdapterTensors {
    /// Opens `adapter_model.safetensors`, or where there is none `adapter_model.bin`.
    ///
    /// # Errors
    /// Those of [`TensorFile::open`] and [`read_state_dict`]; [`Error::Weights`] for a pickle with more than tensors of
    /// floating-point numbers.
    pub(super) fn open(dir: &Path) -> Result<AdapterTensors> {
        let (safe, path) = (dir.join(WEIGHTS_FILE), dir.join(PICKLED_FILE));
        if safe.exists() || !path.exists() {
            return Ok(AdapterTensors::Safetensors(TensorFile::open(&safe)?));
        }
        let state = read_state_dict(&path)?;
        if !state.others.is_empty() {
            let problem = format!("it holds what is no tensor of an adapter: {}", List(&state.others));
            return Err(Error::Weights { file: path, problem });
        }
        Ok(AdapterTensors::Pickled { path, tensors: state.tensors, metadata: BTreeMap::new() })
    }

    /// The file.
    pub(super) fn path(&self) -> &Path {
        match self {
            AdapterTensors::Safetensors(file) => file.path(),
            AdapterTensors::Pickled { path, .. } => path,
        }
    }

    /// The names of all tensors, sorted.
    pub(super) fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        match self {
            AdapterTensors::Safetensors(file) => Box::new(file.names()),
            AdapterTensors::Pickled { tensors, .. } => Box::new(tensors.keys().map(String::as_str)),
        }
    }

    /// The free-form strings of the header; a pickle has none.
    pub(super) fn metadata(&self) -> &BTreeMap<String, String> {
        match self {
            AdapterTensors::Safetensors(file) => file.metadata(),
            AdapterTensors::Pickled { metadata, .. } => metadata,
        }
    }

    /// Type and shape of a tensor.
    pub(super) fn info(&self, name: &str) -> Option<TensorInfo> {
        match self {
            AdapterTensors::Safetensors(file) => file.info(name),
            AdapterTensors::Pickled { path, tensors, .. } => tensors.get(name).map(|t| TensorInfo {
                dtype: Dtype::F32,
                shape: t.shape().to_vec(),
                file: path.clone(),
                stored_name: name.to_owned(),
            }),
        }
    }

    /// A tensor in f32.
    pub(super) fn tensor(&self, info: &TensorInfo) -> Result<Tensor> {
        match self {
            AdapterTensors::Safetensors(file) => file.tensor(&info.stored_name, &info.shape, &Device::Cpu),
            AdapterTensors::Pickled { tensors, .. } => Ok(tensors[&info.stored_name].clone()),
        }
    }
}
