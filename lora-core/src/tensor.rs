use std::{fmt, ops::Range, sync::Arc};

use half::{bf16, f16};
use lora_kernels::{Buffer, DType, Device, Element, Mat, MatMut};
use ndarray::Array2;

use crate::Result;

/// A contiguous, row-major array on one device. Cloning shares the memory; writing copies it first unless it is unshared
/// ([`Tensor::make_mut`]), so that no holder ever sees another's change.
#[derive(Clone)]
pub struct Tensor {
    shape: Vec<usize>,
    buf: Arc<Buffer>,
    offset: usize,
}

impl Tensor {
    /// A tensor whose contents are unspecified: the caller writes before it reads.
    pub fn empty(device: &Device, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::from_buffer(shape, Buffer::empty(device, dtype, shape.iter().product())?))
    }

    /// A tensor of zeros.
    pub fn zeros(device: &Device, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::from_buffer(shape, Buffer::zeros(device, dtype, shape.iter().product())?))
    }

    /// A copy of host data.
    ///
    /// # Panics
    /// When the shape does not have as many elements as the data.
    pub fn from_slice<T: Element>(device: &Device, shape: &[usize], data: &[T]) -> Result<Tensor> {
        Ok(Tensor::from_buffer(shape, Buffer::from_slice(device, data)?))
    }

    /// A tensor over a whole buffer.
    ///
    /// # Panics
    /// When the shape does not have as many elements as the buffer.
    pub fn from_buffer(shape: &[usize], buf: Buffer) -> Tensor {
        assert_eq!(shape.iter().product::<usize>(), buf.len(), "shape {shape:?} over {} elements", buf.len());
        Tensor { shape: shape.into(), buf: Arc::new(buf), offset: 0 }
    }

    /// A shape alone, without elements: what stands for a weight where a model is outlined and not loaded. To look at its
    /// elements is a programmer error and panics.
    pub fn unbacked(shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor { shape: shape.into(), buf: Arc::new(Buffer::empty(&Device::Cpu, DType::F32, 0)?), offset: 0 })
    }

    /// A part of a shared buffer.
    pub(crate) fn view(shape: &[usize], buf: Arc<Buffer>, offset: usize) -> Tensor {
        assert!(offset + shape.iter().product::<usize>() <= buf.len());
        Tensor { shape: shape.into(), buf, offset }
    }

    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Product of all dimensions but the last.
    pub fn rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }

    /// The last dimension; 1 for a scalar.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.buf.dtype()
    }

    /// Where the memory lies.
    pub fn device(&self) -> Device {
        self.buf.device().clone()
    }

    /// The tensor as a matrix [rows, cols].
    pub fn mat(&self) -> Mat<'_> {
        Mat::new(&self.buf, self.offset, self.rows(), self.cols())
    }

    /// The transposed matrix [cols, rows].
    pub fn t(&self) -> Mat<'_> {
        self.mat().t()
    }

    /// The same elements in another shape.
    ///
    /// # Panics
    /// When the number of elements differs.
    pub fn reshape(mut self, shape: &[usize]) -> Tensor {
        assert_eq!(self.len(), shape.iter().product::<usize>(), "{:?} reshaped to {shape:?}", self.shape);
        self.shape = shape.into();
        self
    }

    /// The given rows of a matrix, sharing memory.
    ///
    /// # Panics
    /// When there are no such rows.
    pub fn rows_in(&self, r: Range<usize>) -> Tensor {
        assert!(r.start <= r.end && r.end <= self.rows(), "rows {r:?} of {:?}", self.shape);
        Tensor::view(&[r.len(), self.cols()], self.buf.clone(), self.offset + r.start * self.cols())
    }

    /// The elements, copied to the host.
    ///
    /// # Panics
    /// When `T` is not the tensor's type.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        Ok(self.buf.to_vec(self.offset..self.offset + self.len())?)
    }

    /// As [`to_vec`](Tensor::to_vec), in place of what `to` contains, in its memory.
    ///
    /// # Panics
    /// When `T` is not the tensor's type.
    pub fn read<T: Element>(&self, to: &mut Vec<T>) -> Result<()> {
        Ok(self.buf.read(self.offset..self.offset + self.len(), to)?)
    }

    /// The matrix of [`rows`](Tensor::rows) and [`cols`](Tensor::cols) on the host, in f32, for the mathematics of
    /// [`lowrank`](crate::lowrank).
    pub fn to_array(&self) -> Result<Array2<f32>> {
        let values = self.to_dtype(DType::F32)?.to_vec()?;
        Ok(Array2::from_shape_vec((self.rows(), self.cols()), values).expect("as many elements as the shape says"))
    }

    /// The elements as f64, whatever floating-point type they have; for reports and checks.
    pub fn to_f64(&self) -> Result<Vec<f64>> {
        Ok(match self.dtype() {
            DType::F64 => self.to_vec()?,
            DType::U32 => self.to_vec::<u32>()?.into_iter().map(f64::from).collect(),
            DType::Bf16 => self.to_vec::<bf16>()?.into_iter().map(f64::from).collect(),
            DType::F16 => self.to_vec::<f16>()?.into_iter().map(f64::from).collect(),
            _ => self.to_vec::<f32>()?.into_iter().map(f64::from).collect(),
        })
    }

    /// The same values in another floating-point type; shares memory when it is already that.
    pub fn to_dtype(&self, dtype: DType) -> Result<Tensor> {
        if dtype == self.dtype() {
            return Ok(self.clone());
        }
        let (device, shape) = (self.device(), &self.shape);
        if !device.is_cpu() {
            let mut to = Tensor::empty(&device, dtype, shape)?;
            lora_kernels::axpby(1.0, self.mat(), 0.0, to.make_mut()?)?;
            return Ok(to);
        }
        let values = self.to_f64()?;
        match dtype {
            DType::F64 => Tensor::from_slice(&device, shape, &values),
            DType::F32 => Tensor::from_slice(&device, shape, &values.iter().map(|&v| v as f32).collect::<Vec<_>>()),
            DType::Bf16 => {
                Tensor::from_slice(&device, shape, &values.into_iter().map(rounded(bf16::from_f32)).collect::<Vec<_>>())
            }
            DType::F16 => {
                Tensor::from_slice(&device, shape, &values.into_iter().map(rounded(f16::from_f32)).collect::<Vec<_>>())
            }
            other => Err(lora_kernels::Error::DType { kernel: "to_dtype", dtype: other }.into()),
        }
    }

    /// The same values on another device; shares memory when it is already there.
    pub fn to_device(&self, device: &Device) -> Result<Tensor> {
        if *device == self.device() {
            return Ok(self.clone());
        }
        Ok(Tensor::from_buffer(&self.shape, self.buf.to_device(self.offset..self.offset + self.len(), device)?))
    }

    /// The same values on another device, in another floating-point type. What changes both is converted on the device.
    pub fn to(&self, device: &Device, dtype: DType) -> Result<Tensor> {
        if self.dtype() == DType::F64 {
            // Of which devices know nothing.
            return self.to_dtype(dtype)?.to_device(device);
        }
        self.to_device(device)?.to_dtype(dtype)
    }

    /// Whether both are the very same memory.
    pub fn same_memory(&self, other: &Tensor) -> bool {
        Arc::ptr_eq(&self.buf, &other.buf) && self.offset == other.offset
    }

    /// Whether a write would need no copy.
    pub fn is_unshared(&self) -> bool {
        Arc::strong_count(&self.buf) == 1 && !self.buf.is_borrowed()
    }

    /// Overwrites all elements: in place, unless anybody else holds the memory.
    ///
    /// # Panics
    /// When `T` is not the tensor's type or the number of elements differs.
    pub fn write<T: Element>(&mut self, data: &[T]) -> Result<()> {
        assert_eq!(data.len(), self.len(), "{:?} overwritten", self.shape);
        match Arc::get_mut(&mut self.buf).filter(|buf| !buf.is_borrowed()) {
            Some(buf) => Ok(buf.write(self.offset, data)?),
            None => {
                *self = Tensor::from_slice(&self.device(), &self.shape, data)?;
                Ok(())
            }
        }
    }

    /// The matrix for writing; first copies the memory when anybody else holds it or it is borrowed.
    pub fn make_mut(&mut self) -> Result<MatMut<'_>> {
        if !self.is_unshared() || Arc::get_mut(&mut self.buf).is_none() {
            let copy = self.buf.try_clone(self.offset..self.offset + self.len())?;
            (self.buf, self.offset) = (Arc::new(copy), 0);
        }
        let (rows, cols) = (self.rows(), self.cols());
        let buf = Arc::get_mut(&mut self.buf).expect("the buffer is unshared: it was checked or just made");
        Ok(MatMut::new(buf, self.offset, rows, cols))
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({:?} {:?})", self.dtype(), self.shape)
    }
}

/// To 16 bits by way of f32: `half` does not see the last three bits of an f32 when it rounds an f64.
fn rounded<T>(to: impl Fn(f32) -> T) -> impl Fn(f64) -> T {
    move |v| to(v as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_to_16_bits_sees_every_bit() {
        // Just above the middle of two neighbours, in bf16 and in f16.
        let just_above = [f32::from_bits(0x3f80_8001), f32::from_bits(0x3f80_1001)];
        let t = Tensor::from_slice(&Device::Cpu, &[2], &just_above).unwrap();
        assert_eq!(t.to_dtype(DType::Bf16).unwrap().to_f64().unwrap()[0], 1.0 + 2f64.powi(-7));
        assert_eq!(t.to_dtype(DType::F16).unwrap().to_f64().unwrap()[1], 1.0 + 2f64.powi(-10));
    }

    #[test]
    fn a_write_never_shows_through_a_clone() {
        let mut a = Tensor::from_slice(&Device::Cpu, &[2, 2], &[1f32, 2., 3., 4.]).unwrap();
        let (whole, row) = (a.clone(), a.rows_in(1..2));
        lora_kernels::axpby(0.0, whole.mat(), 0.0, a.make_mut().unwrap()).unwrap();
        assert_eq!(a.to_vec::<f32>().unwrap(), [0.; 4]);
        assert_eq!(whole.to_vec::<f32>().unwrap(), [1., 2., 3., 4.]);
        assert_eq!(row.to_vec::<f32>().unwrap(), [3., 4.]);
    }

    #[test]
    fn overwriting_is_in_place_unless_somebody_holds_the_memory() {
        let mut a = Tensor::from_slice(&Device::Cpu, &[2], &[1u32, 2]).unwrap();
        let place = Arc::as_ptr(&a.buf);
        a.write(&[3u32, 4]).unwrap();
        assert_eq!(Arc::as_ptr(&a.buf), place);
        let held = a.clone();
        a.write(&[5u32, 6]).unwrap();
        assert!(!a.same_memory(&held) && held.same_memory(&held.clone()));
        assert_eq!((a.to_vec::<u32>().unwrap(), held.to_vec::<u32>().unwrap()), (vec![5, 6], vec![3, 4]));
    }

    #[test]
    fn an_unshared_tensor_is_written_in_place() {
        let mut a = Tensor::zeros(&Device::Cpu, DType::F32, &[3]).unwrap();
        let before = Arc::as_ptr(&a.buf);
        a.make_mut().unwrap();
        assert_eq!(before, Arc::as_ptr(&a.buf));
        let other = a.clone();
        assert!(!a.is_unshared());
        drop(other);
        assert!(a.is_unshared());
    }
}
