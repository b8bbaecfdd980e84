#![allow(unsafe_code)]

use std::{fmt, ops::Range, sync::Arc};

use half::{bf16, f16};

#[cfg(feature = "cuda")]
use crate::cuda::DeviceBlock;
use crate::{DType, Device, Element, Error, Result, pool::Block};

/// Typed memory on one device: pooled and writable, or a borrowed range of bytes (a mapped file) that is only read.
pub struct Buffer {
    storage: Storage,
    dtype: DType,
    len: usize,
    device: Device,
}

enum Storage {
    Pooled(Block),
    #[cfg(feature = "cuda")]
    Device(DeviceBlock),
    /// `start` is a byte offset into the owner, aligned for the dtype.
    Borrowed {
        owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
        start: usize,
    },
}

impl Buffer {
    /// Memory for `len` elements whose contents are unspecified: the caller writes before it reads.
    pub fn empty(device: &Device, dtype: DType, len: usize) -> Result<Buffer> {
        let bytes = len
            .checked_mul(dtype.size())
            .ok_or_else(|| Error::OutOfMemory { bytes: usize::MAX, device: device.to_string() })?;
        let storage = match device {
            Device::Cpu => Storage::Pooled(Block::take(bytes)?),
            #[cfg(feature = "cuda")]
            Device::Cuda(gpu) => Storage::Device(DeviceBlock::take(gpu, bytes)?),
        };
        Ok(Buffer { storage, dtype, len, device: device.clone() })
    }

    /// Memory for `len` elements, all zero.
    pub fn zeros(device: &Device, dtype: DType, len: usize) -> Result<Buffer> {
        let mut b = Buffer::empty(device, dtype, len)?;
        match &mut b.storage {
            #[cfg(feature = "cuda")]
            Storage::Device(block) => block.zero(len * dtype.size())?,
            // SAFETY: the block holds `len` elements, is uniquely borrowed, and zero bytes are a value of every dtype.
            _ => unsafe { std::ptr::write_bytes(b.ptr_mut(), 0, len * dtype.size()) },
        }
        Ok(b)
    }

    /// A copy of `data` on `device`.
    pub fn from_slice<T: Element>(device: &Device, data: &[T]) -> Result<Buffer> {
        let mut b = Buffer::empty(device, T::DTYPE, data.len())?;
        b.write(0, data)?;
        Ok(b)
    }

    /// The bytes `range` of `owner` as elements of `dtype`, without a copy. A range that is not aligned for the type
    /// is copied instead. The elements are little-endian, as safetensors files are.
    ///
    /// # Errors
    /// [`Error::Range`] when the range lies outside the owner's bytes.
    pub fn borrowed(owner: Arc<dyn AsRef<[u8]> + Send + Sync>, range: Range<usize>, dtype: DType) -> Result<Buffer> {
        const { assert!(cfg!(target_endian = "little"), "weights are read as little-endian bytes") };
        let bytes = (*owner).as_ref();
        let Some(part) = bytes.get(range.clone()) else {
            return Err(Error::Range { start: range.start, end: range.end, len: bytes.len() });
        };
        let len = part.len() / dtype.size();
        if part.as_ptr().align_offset(dtype.size()) == 0 {
            return Ok(Buffer {
                storage: Storage::Borrowed { owner, start: range.start },
                dtype,
                len,
                device: Device::Cpu,
            });
        }
        let mut b = Buffer::empty(&Device::Cpu, dtype, len)?;
        // SAFETY: both sides hold `len` elements; a fresh block does not overlap the owner's bytes.
        unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), b.ptr_mut(), len * dtype.size()) };
        Ok(b)
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the memory lies.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The address of the first element on its device: for telling memory apart, not for following.
    pub fn address(&self) -> usize {
        self.ptr() as usize
    }

    /// Whether the memory is somebody else's and must not be written.
    pub fn is_borrowed(&self) -> bool {
        matches!(self.storage, Storage::Borrowed { .. })
    }

    /// The elements of `range`, copied to the host; waits for what the device still has to do.
    ///
    /// # Panics
    /// When `T` is not the buffer's type or the range lies outside it.
    pub fn to_vec<T: Element>(&self, range: Range<usize>) -> Result<Vec<T>> {
        let mut to = Vec::new();
        self.read(range, &mut to)?;
        Ok(to)
    }

    /// As [`to_vec`](Buffer::to_vec), in place of what `to` contains, in its memory: for what is read again and again.
    ///
    /// # Panics
    /// When `T` is not the buffer's type or the range lies outside it.
    pub fn read<T: Element>(&self, range: Range<usize>, to: &mut Vec<T>) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Storage::Device(block) = &self.storage {
            self.check::<T>(&range);
            to.resize(range.len(), T::default());
            return block.read(range.start * self.dtype.size(), as_bytes_mut(to));
        }
        to.clear();
        to.extend_from_slice(&self.host::<T>()[range]);
        Ok(())
    }

    /// Overwrites the elements from `offset` on with `data`.
    ///
    /// # Panics
    /// When `T` is not the buffer's type, the range lies outside it, or the buffer is borrowed.
    pub fn write<T: Element>(&mut self, offset: usize, data: &[T]) -> Result<()> {
        #[cfg(feature = "cuda")]
        if !self.device.is_cpu() {
            self.check::<T>(&(offset..offset + data.len()));
            if let Storage::Device(block) = &mut self.storage {
                return block.write(offset * T::DTYPE.size(), as_bytes(data));
            }
        }
        self.host_mut::<T>()[offset..offset + data.len()].copy_from_slice(data);
        Ok(())
    }

    /// A copy on the same device, in pooled memory.
    ///
    /// # Panics
    /// When the range is not within the buffer.
    pub fn try_clone(&self, range: Range<usize>) -> Result<Buffer> {
        assert!(range.start <= range.end && range.end <= self.len, "range {range:?} of {} elements", self.len);
        let mut b = Buffer::empty(&self.device, self.dtype, range.len())?;
        let (skip, bytes) = (range.start * self.dtype.size(), range.len() * self.dtype.size());
        #[cfg(feature = "cuda")]
        if let (Storage::Device(from), Storage::Device(to)) = (&self.storage, &mut b.storage) {
            to.copy(from, skip, bytes)?;
            return Ok(b);
        }
        // SAFETY: the source range was checked, the fresh block holds as many elements and does not overlap it.
        unsafe { std::ptr::copy_nonoverlapping(self.ptr().add(skip), b.ptr_mut(), bytes) };
        Ok(b)
    }

    /// A copy on another device; by way of the host when both are not the host.
    pub fn to_device(&self, range: Range<usize>, device: &Device) -> Result<Buffer> {
        if *device == self.device {
            return self.try_clone(range);
        }
        match self.dtype {
            DType::F32 => self.moved::<f32>(range, device),
            DType::Bf16 => self.moved::<bf16>(range, device),
            DType::F16 => self.moved::<f16>(range, device),
            DType::F64 => self.moved::<f64>(range, device),
            DType::U32 => self.moved::<u32>(range, device),
        }
    }

    fn moved<T: Element>(&self, range: Range<usize>, device: &Device) -> Result<Buffer> {
        match self.device.is_cpu() {
            true => Buffer::from_slice(device, &self.host::<T>()[range]),
            false => Buffer::from_slice(device, &self.to_vec::<T>(range)?),
        }
    }

    #[cfg(feature = "cuda")]
    fn check<T: Element>(&self, range: &Range<usize>) {
        assert_eq!(self.dtype, T::DTYPE, "buffer used as another type");
        assert!(range.start <= range.end && range.end <= self.len, "range {range:?} of {} elements", self.len);
    }

    pub(crate) fn host<T: Element>(&self) -> &[T] {
        assert_eq!(self.dtype, T::DTYPE, "buffer read as another type");
        assert!(self.device.is_cpu(), "memory of {} read by the host", self.device);
        // SAFETY: the memory holds `len` initialised elements, is aligned for them, and every bit pattern is a value.
        unsafe { std::slice::from_raw_parts(self.ptr().cast(), self.len) }
    }

    pub(crate) fn host_mut<T: Element>(&mut self) -> &mut [T] {
        assert_eq!(self.dtype, T::DTYPE, "buffer written as another type");
        assert!(self.device.is_cpu(), "memory of {} written by the host", self.device);
        // SAFETY: as in `host`; `ptr_mut` refuses borrowed memory and `&mut self` makes the access unique.
        unsafe { std::slice::from_raw_parts_mut(self.ptr_mut().cast(), self.len) }
    }

    /// The first byte; on a CUDA device its address there, which the host never follows.
    pub(crate) fn ptr(&self) -> *const u8 {
        match &self.storage {
            Storage::Pooled(block) => block.ptr(),
            #[cfg(feature = "cuda")]
            Storage::Device(block) => block.ptr(),
            Storage::Borrowed { owner, start } => {
                // Checked at every use: safe code may implement `AsRef` so that it answers differently each time.
                let part = &(**owner).as_ref()[*start..][..self.len * self.dtype.size()];
                assert!(part.as_ptr().align_offset(self.dtype.size()) == 0, "the owner's bytes moved");
                part.as_ptr()
            }
        }
    }

    pub(crate) fn ptr_mut(&mut self) -> *mut u8 {
        match &mut self.storage {
            Storage::Pooled(block) => block.ptr(),
            #[cfg(feature = "cuda")]
            Storage::Device(block) => block.ptr(),
            Storage::Borrowed { .. } => panic!("borrowed memory is never written"),
        }
    }
}

#[cfg(feature = "cuda")]
fn as_bytes<T: Element>(data: &[T]) -> &[u8] {
    // SAFETY: elements are plain numbers without padding, so their bytes are initialised.
    unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), size_of_val(data)) }
}

#[cfg(feature = "cuda")]
fn as_bytes_mut<T: Element>(data: &mut [T]) -> &mut [u8] {
    // SAFETY: as above, and every bit pattern is a value of every element type.
    unsafe { std::slice::from_raw_parts_mut(data.as_mut_ptr().cast(), size_of_val(data)) }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_borrowed() { "borrowed" } else { "pooled" };
        write!(f, "Buffer({kind} {:?} × {} on {})", self.dtype, self.len, self.device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn borrowed_ranges_are_used_in_place_when_aligned_and_copied_when_not() {
        let bytes: Vec<u8> = [1.0f32, 2.0, 3.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let mut shifted = vec![0u8];
        shifted.extend(&bytes);
        // A vector of bytes may itself start anywhere: find out, so that both cases are sure to be met.
        for (owner, skip) in [(bytes, 0), (shifted, 1)] {
            let owner: Arc<dyn AsRef<[u8]> + Send + Sync> = Arc::new(owner);
            let aligned = (*owner).as_ref()[skip..].as_ptr().align_offset(4) == 0;
            let b = Buffer::borrowed(owner.clone(), skip..skip + 12, DType::F32).unwrap();
            assert_eq!(b.is_borrowed(), aligned);
            assert_eq!(b.to_vec::<f32>(0..3).unwrap(), [1.0, 2.0, 3.0]);
            assert!(matches!(Buffer::borrowed(owner, 8..40, DType::F32), Err(Error::Range { .. })));
        }
    }

    #[test]
    fn copies_are_independent() {
        let mut a = Buffer::from_slice(&Device::Cpu, &[1u32, 2, 3, 4]).unwrap();
        let b = a.try_clone(1..3).unwrap();
        a.write(0, &[9u32, 9, 9, 9]).unwrap();
        assert_eq!(b.to_vec::<u32>(0..2).unwrap(), [2, 3]);
        assert_eq!(Buffer::zeros(&Device::Cpu, DType::F64, 2).unwrap().to_vec::<f64>(0..2).unwrap(), [0.0, 0.0]);
    }
}
