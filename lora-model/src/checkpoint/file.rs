use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Seek, SeekFrom},
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use half::{bf16, f16};
use lora_core::Tensor;
use lora_kernels::{Buffer, DType, Device, Element};
use memmap2::Mmap;
use safetensors::Dtype;

use super::{TensorSpec, check_names, header, missing};
use crate::{Error, Result};

/// Elements that are converted at a time.
const CHUNK: usize = 1 << 16;

/// One safetensors file, mapped.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    map: Arc<Mmap>,
    /// The same file, for what is converted: bytes that are read, rather than touched in the map, stay out of the
    /// process's memory.
    file: Mutex<File>,
    tensors: BTreeMap<String, Stored>,
    metadata: BTreeMap<String, String>,
}

#[derive(Debug)]
pub(super) struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

/// What a file says of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The type of its elements in the file.
    pub dtype: Dtype,
    /// The length of each dimension.
    pub shape: Vec<usize>,
    /// The file.
    pub file: PathBuf,
    /// The tensor's name in the file.
    pub stored_name: String,
}

impl TensorInfo {
    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The size in the file.
    pub fn bytes(&self) -> usize {
        self.elements() * self.dtype.bitsize() / 8
    }
}

impl TensorFile {
    /// Maps a file and checks its header.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Weights`] when the header is no header or lies about sizes or offsets.
    pub fn open(path: &Path) -> Result<TensorFile> {
        let file = File::open(path).map_err(|e| Error::io("read", path, e))?;
        let kind = file.metadata().map_err(|e| Error::io("read", path, e))?;
        if !kind.is_file() {
            return Err(Error::Weights { file: path.to_owned(), problem: "it is not a regular file".to_owned() });
        }
        let map = Arc::new(map(&file).map_err(|e| Error::io("map", path, e))?);
        let (header, start) = header::read(path, &map)?;
        let tensors = header.tensors().into_iter().map(|(name, t)| {
            let bytes = start + t.data_offsets.0..start + t.data_offsets.1;
            (name, Stored { dtype: t.dtype, shape: t.shape.clone(), bytes })
        });
        let tensors = tensors.collect();
        let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
        Ok(TensorFile { path: path.to_owned(), map, file: Mutex::new(file), tensors, metadata })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The free-form strings of the header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Type and shape of a tensor.
    pub fn info(&self, name: &str) -> Option<TensorInfo> {
        self.tensors.get(name).map(|t| TensorInfo {
            dtype: t.dtype,
            shape: t.shape.clone(),
            file: self.path.clone(),
            stored_name: name.to_owned(),
        })
    }

    /// Checks that the tensors are exactly `expected`; errors as of [`Checkpoint::expect`](super::Checkpoint::expect).
    pub fn expect(&self, expected: &[TensorSpec]) -> Result<()> {
        check_names(&self.path, self.names(), expected)?;
        expected.iter().try_for_each(|spec| self.check_shape(&spec.name, &spec.shape).map(drop))
    }

    /// A tensor in f32, as [`Checkpoint::tensor`](super::Checkpoint::tensor) gives it.
    pub fn tensor(&self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor> {
        let t = self.check_shape(name, shape)?;
        let buffer = match t.dtype {
            Dtype::F32 if *device == Device::Cpu => Buffer::borrowed(self.map.clone(), t.bytes.clone(), DType::F32)?,
            _ => self.converted::<f32>(name, t, device)?,
        };
        Ok(Tensor::from_buffer(shape, buffer))
    }

    /// A tensor in bf16, as [`Checkpoint::tensor_bf16`](super::Checkpoint::tensor_bf16) gives it.
    pub fn tensor_bf16(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let t = self.check_shape(name, shape)?;
        let buffer = match t.dtype {
            Dtype::BF16 => Buffer::borrowed(self.map.clone(), t.bytes.clone(), DType::Bf16)?,
            _ => self.converted::<bf16>(name, t, &Device::Cpu)?,
        };
        Ok(Tensor::from_buffer(shape, buffer))
    }

    pub(super) fn check_shape(&self, name: &str, expected: &[usize]) -> Result<&Stored> {
        let t = self.tensors.get(name).ok_or_else(|| missing(&self.path, name))?;
        if t.shape != expected {
            return Err(Error::Shape {
                file: self.path.clone(),
                tensor: name.to_owned(),
                expected: expected.to_vec(),
                found: t.shape.clone(),
            });
        }
        Ok(t)
    }

    /// A tensor as elements of `T`, whatever they are in the file.
    fn converted<T: Rounded>(&self, name: &str, t: &Stored, device: &Device) -> Result<Buffer> {
        match t.dtype {
            Dtype::F32 => self.convert(t, device, |b| T::of(f32::from_le_bytes(b))),
            Dtype::F16 => self.convert(t, device, |b| T::of(f16::from_le_bytes(b).to_f32())),
            Dtype::BF16 => self.convert(t, device, |b| T::of(bf16::from_le_bytes(b).to_f32())),
            Dtype::F64 => self.convert(t, device, |b| T::of_f64(f64::from_le_bytes(b))),
            other => Err(Error::DType { file: self.path.clone(), tensor: name.to_owned(), found: other.to_string() }),
        }
    }

    /// Reads a tensor of `N`-byte elements chunk by chunk into a buffer of another type.
    fn convert<const N: usize, T: Element>(
        &self,
        t: &Stored,
        device: &Device,
        f: impl Fn([u8; N]) -> T,
    ) -> Result<Buffer> {
        let failed = |e| Error::io("read", &self.path, e);
        let mut buffer = Buffer::empty(device, T::DTYPE, t.bytes.len() / N)?;
        // Nothing is left half-done by a reader that panicked: each one seeks first.
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(t.bytes.start as u64)).map_err(failed)?;
        let mut bytes = vec![0; t.bytes.len().min(CHUNK * N)];
        let mut values = Vec::with_capacity(CHUNK);
        let mut done = 0;
        while done < buffer.len() {
            let n = (buffer.len() - done).min(CHUNK);
            file.read_exact(&mut bytes[..n * N]).map_err(failed)?;
            values.clear();
            values.extend(bytes[..n * N].as_chunks::<N>().0.iter().map(|b| f(*b)));
            buffer.write(done, &values)?;
            done += n;
        }
        Ok(buffer)
    }
}

/// A type that numbers of a file are rounded to.
trait Rounded: Element {
    fn of(v: f32) -> Self;
    /// Rounded once.
    fn of_f64(v: f64) -> Self;
}

impl Rounded for f32 {
    fn of(v: f32) -> f32 {
        v
    }
    fn of_f64(v: f64) -> f32 {
        v as f32
    }
}

impl Rounded for bf16 {
    fn of(v: f32) -> bf16 {
        bf16::from_f32(v)
    }
    fn of_f64(v: f64) -> bf16 {
        bf16::from_f64(v)
    }
}

#[allow(unsafe_code)]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the mapping is private and only read. Another process that cuts the file short while it is in use would
    // end this one (SIGBUS), and one that rewrites it in place would change weights under us: no program can rule that
    // out for a mapped file. This crate itself never writes a file in place: it renames new ones over old ones, which
    // leaves the mapped contents as they are.
    unsafe { Mmap::map(file) }
}
