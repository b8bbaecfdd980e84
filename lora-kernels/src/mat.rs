#![allow(unsafe_code)]

use std::{marker::PhantomData, ops::Range};

#[cfg(feature = "cuda")]
use std::sync::Arc;

#[cfg(feature = "cuda")]
use crate::cuda::Gpu;
use crate::{Buffer, DType, Device, Element};

/// A matrix of elements inside a [`Buffer`]: what every kernel reads.
///
/// Element (i, j) stands at `offset + i·ld + j`, or at `offset + j·ld + i` when `transposed`. Transposes, column ranges
/// and head slices are descriptors; nothing is copied. A vector is a matrix of one row.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    ptr: *const u8,
    device: &'a Device,
    dtype: DType,
    rows: usize,
    cols: usize,
    ld: usize,
    transposed: bool,
}

/// A matrix that a kernel writes: as [`Mat`], never transposed.
pub struct MatMut<'a> {
    ptr: *mut u8,
    device: &'a Device,
    dtype: DType,
    rows: usize,
    cols: usize,
    ld: usize,
    life: PhantomData<&'a mut Buffer>,
}

/// Where a backward kernel puts a gradient: `to = result + beta · to`. With β = 0 the old contents are not read, so
/// the first writer of a gradient needs no zero-fill.
pub struct Acc<'a> {
    /// The gradient.
    pub to: MatMut<'a>,
    /// 0 for the first writer, 1 for those after it.
    pub beta: f64,
}

// SAFETY: a `Mat` is a shared borrow of plain memory.
unsafe impl Send for Mat<'_> {}
// SAFETY: as above.
unsafe impl Sync for Mat<'_> {}
// SAFETY: a `MatMut` is a unique borrow of the elements it describes.
unsafe impl Send for MatMut<'_> {}
// SAFETY: through `&MatMut` nothing is written.
unsafe impl Sync for MatMut<'_> {}

/// Elements from the first to the last one of a matrix, gaps included.
fn extent(rows: usize, cols: usize, ld: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * ld + cols }
}

impl<'a> Mat<'a> {
    /// `rows × cols` contiguous elements of `buf` from `offset` on.
    ///
    /// # Panics
    /// When they do not lie inside the buffer.
    pub fn new(buf: &'a Buffer, offset: usize, rows: usize, cols: usize) -> Mat<'a> {
        let end = rows.checked_mul(cols).and_then(|n| n.checked_add(offset));
        assert!(end.is_some_and(|e| e <= buf.len()), "{rows}×{cols} at {offset} of {} elements", buf.len());
        // SAFETY: `offset` is at most the buffer's length.
        let ptr = unsafe { buf.ptr().add(offset * buf.dtype().size()) };
        Mat { ptr, device: buf.device(), dtype: buf.dtype(), rows, cols, ld: cols, transposed: false }
    }

    /// Logical rows.
    pub fn rows(&self) -> usize {
        if self.transposed { self.cols } else { self.rows }
    }

    /// Logical columns.
    pub fn cols(&self) -> usize {
        if self.transposed { self.rows } else { self.cols }
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the memory lies.
    pub fn device(&self) -> &'a Device {
        self.device
    }

    /// The CUDA device that the memory lies on, if it does.
    #[cfg(feature = "cuda")]
    pub(crate) fn gpu(&self) -> Option<&'a Arc<Gpu>> {
        self.device.gpu()
    }

    /// Elements from one stored row to the next.
    #[cfg(feature = "cuda")]
    pub(crate) fn ld(&self) -> usize {
        self.ld
    }

    /// The address of the first element on its device, for a launch: a graph that is being recorded keeps its memory.
    #[cfg(feature = "cuda")]
    pub(crate) fn address(&self) -> u64 {
        if let Some(gpu) = self.gpu() {
            gpu.note(self.ptr as u64);
        }
        self.ptr as u64
    }

    /// Whether rows and columns are exchanged against how the elements are stored.
    pub(crate) fn is_transposed(&self) -> bool {
        self.transposed
    }

    /// Whether `below` continues this matrix in a device's memory: its rows follow those of this one.
    #[cfg(feature = "cuda")]
    pub(crate) fn is_above(&self, below: Mat) -> bool {
        let end = self.address() + (self.rows * self.ld * self.dtype.size()) as u64;
        let alike = (self.cols, self.ld, self.dtype, self.device) == (below.cols, below.ld, below.dtype, below.device);
        alike && self.gpu().is_some() && !self.transposed && !below.transposed && end == below.address()
    }

    /// This matrix and the one that continues it ([`Mat::is_above`]) as one.
    #[cfg(feature = "cuda")]
    pub(crate) fn joined(self, below: Mat<'a>) -> Mat<'a> {
        assert!(self.is_above(below), "matrices that do not lie together");
        Mat { rows: self.rows + below.rows, ..self }
    }

    /// The transpose.
    pub fn t(self) -> Mat<'a> {
        Mat { transposed: !self.transposed, ..self }
    }

    /// The transpose, or the matrix itself.
    pub fn t_if(self, transpose: bool) -> Mat<'a> {
        if transpose { self.t() } else { self }
    }

    /// The given logical rows.
    pub fn rows_in(self, r: Range<usize>) -> Mat<'a> {
        if self.transposed { self.t().cols_in(r).t() } else { self.part(r, 0..self.cols) }
    }

    /// The given logical columns.
    pub fn cols_in(self, r: Range<usize>) -> Mat<'a> {
        if self.transposed { self.t().rows_in(r).t() } else { self.part(0..self.rows, r) }
    }

    fn part(self, r: Range<usize>, c: Range<usize>) -> Mat<'a> {
        assert!(r.start <= r.end && r.end <= self.rows, "rows {r:?} of {}", self.rows);
        assert!(c.start <= c.end && c.end <= self.cols, "columns {c:?} of {}", self.cols);
        let (rows, cols) = (r.len(), c.len());
        let skip = if extent(rows, cols, self.ld) == 0 { 0 } else { r.start * self.ld + c.start };
        // SAFETY: the first element of a nonempty part lies inside the matrix; an empty part does not move.
        let ptr = unsafe { self.ptr.add(skip * self.dtype.size()) };
        Mat { ptr, rows, cols, ..self }
    }

    /// The matrix for the host's kernels, as stored.
    pub(crate) fn host<T: Element>(self) -> HostMat<'a, T> {
        assert_eq!(self.dtype, T::DTYPE, "matrix read as another type");
        assert!(self.device.is_cpu(), "a matrix on {} among those on the host", self.device);
        HostMat {
            ptr: self.ptr.cast(),
            rows: self.rows,
            cols: self.cols,
            ld: self.ld,
            transposed: self.transposed,
            life: PhantomData,
        }
    }
}

impl<'a> MatMut<'a> {
    /// `rows × cols` contiguous elements of `buf` from `offset` on.
    ///
    /// # Panics
    /// When they do not lie inside the buffer, or it is borrowed memory.
    pub fn new(buf: &'a mut Buffer, offset: usize, rows: usize, cols: usize) -> MatMut<'a> {
        let end = rows.checked_mul(cols).and_then(|n| n.checked_add(offset));
        assert!(end.is_some_and(|e| e <= buf.len()), "{rows}×{cols} at {offset} of {} elements", buf.len());
        let dtype = buf.dtype();
        // SAFETY: `offset` is at most the buffer's length.
        let ptr = unsafe { buf.ptr_mut().add(offset * dtype.size()) };
        let buf: &'a Buffer = buf;
        MatMut { ptr, device: buf.device(), dtype, rows, cols, ld: cols, life: PhantomData }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the memory lies.
    pub fn device(&self) -> &'a Device {
        self.device
    }

    /// The CUDA device that the memory lies on, if it does.
    #[cfg(feature = "cuda")]
    pub(crate) fn gpu(&self) -> Option<&'a Arc<Gpu>> {
        self.device.gpu()
    }

    /// Elements from one stored row to the next.
    #[cfg(feature = "cuda")]
    pub(crate) fn ld(&self) -> usize {
        self.ld
    }

    /// As [`Mat::address`].
    #[cfg(feature = "cuda")]
    pub(crate) fn address(&self) -> u64 {
        self.as_mat().address()
    }

    /// A shorter borrow of the same matrix.
    pub fn reborrow(&mut self) -> MatMut<'_> {
        MatMut { life: PhantomData, ..*self }
    }

    /// The matrix for reading.
    pub fn as_mat(&self) -> Mat<'_> {
        Mat {
            ptr: self.ptr,
            device: self.device,
            dtype: self.dtype,
            rows: self.rows,
            cols: self.cols,
            ld: self.ld,
            transposed: false,
        }
    }

    /// The given rows.
    pub fn rows_in(self, r: Range<usize>) -> MatMut<'a> {
        let cols = 0..self.cols;
        self.part(r, cols)
    }

    /// The given columns.
    pub fn cols_in(self, r: Range<usize>) -> MatMut<'a> {
        let rows = 0..self.rows;
        self.part(rows, r)
    }

    /// This matrix and the one that continues it ([`Mat::is_above`]) as one.
    #[cfg(feature = "cuda")]
    pub(crate) fn joined(self, below: MatMut<'a>) -> MatMut<'a> {
        assert!(self.as_mat().is_above(below.as_mat()), "matrices that do not lie together");
        MatMut { rows: self.rows + below.rows, life: PhantomData, ..self }
    }

    /// The elements of a matrix without gaps in another shape.
    ///
    /// # Panics
    /// When the number of elements differs, or there are gaps between the rows.
    pub fn reshape(self, rows: usize, cols: usize) -> MatMut<'a> {
        assert!(self.rows <= 1 || self.ld == self.cols, "a matrix with gaps between its rows in another shape");
        assert_eq!(self.rows * self.cols, rows * cols, "{}×{} as {rows}×{cols}", self.rows, self.cols);
        MatMut { rows, cols, ld: cols, life: PhantomData, ..self }
    }

    /// The first `n` columns and the others: two matrices that can be written at the same time.
    pub fn split_cols(self, n: usize) -> (MatMut<'a>, MatMut<'a>) {
        let (rows, cols) = (0..self.rows, self.cols);
        let left = MatMut { life: PhantomData, ..self };
        (left.part(rows.clone(), 0..n), self.part(rows, n..cols))
    }

    fn part(self, r: Range<usize>, c: Range<usize>) -> MatMut<'a> {
        assert!(r.start <= r.end && r.end <= self.rows, "rows {r:?} of {}", self.rows);
        assert!(c.start <= c.end && c.end <= self.cols, "columns {c:?} of {}", self.cols);
        let (rows, cols) = (r.len(), c.len());
        let skip = if extent(rows, cols, self.ld) == 0 { 0 } else { r.start * self.ld + c.start };
        // SAFETY: the first element of a nonempty part lies inside the matrix; an empty part does not move.
        let ptr = unsafe { self.ptr.add(skip * self.dtype.size()) };
        MatMut { ptr, rows, cols, ..self }
    }

    /// The matrix for the host's kernels.
    pub(crate) fn host<T: Element>(self) -> HostMut<'a, T> {
        assert_eq!(self.dtype, T::DTYPE, "matrix written as another type");
        assert!(self.device.is_cpu(), "a matrix on {} among those on the host", self.device);
        HostMut { ptr: self.ptr.cast(), rows: self.rows, cols: self.cols, ld: self.ld, life: PhantomData }
    }
}

/// A typed matrix in host memory, for reading: `rows` and `cols` as stored, so that `transposed` only tells the reader.
#[derive(Clone, Copy)]
pub(crate) struct HostMat<'a, T> {
    ptr: *const T,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) ld: usize,
    pub(crate) transposed: bool,
    life: PhantomData<&'a T>,
}

/// A typed matrix in host memory, for writing.
pub(crate) struct HostMut<'a, T> {
    ptr: *mut T,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) ld: usize,
    life: PhantomData<&'a mut T>,
}

// SAFETY: a shared borrow of plain memory.
unsafe impl<T: Element> Send for HostMat<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Element> Sync for HostMat<'_, T> {}
// SAFETY: a unique borrow of the elements it describes.
unsafe impl<T: Element> Send for HostMut<'_, T> {}
// SAFETY: through `&HostMut` elements are only read.
unsafe impl<T: Element> Sync for HostMut<'_, T> {}

impl<'a, T: Element> HostMat<'a, T> {
    /// A contiguous matrix over a slice (scratch memory of a kernel).
    pub(crate) fn from_slice(data: &'a [T], rows: usize, cols: usize) -> Self {
        assert!(data.len() >= rows * cols, "{rows}×{cols} of {} elements", data.len());
        HostMat { ptr: data.as_ptr(), rows, cols, ld: cols, transposed: false, life: PhantomData }
    }

    pub(crate) fn ptr(&self) -> *const T {
        self.ptr
    }

    /// Row `i` of a matrix that is not transposed.
    #[inline(always)]
    pub(crate) fn row(&self, i: usize) -> &'a [T] {
        assert!(!self.transposed && i < self.rows, "row {i} of {}", self.rows);
        // SAFETY: the row lies inside the matrix, whose elements are borrowed for 'a.
        unsafe { std::slice::from_raw_parts(self.ptr.add(i * self.ld), self.cols) }
    }

    /// All elements in order, of a matrix without gaps.
    pub(crate) fn data(&self) -> &'a [T] {
        assert!(!self.transposed && (self.ld == self.cols || self.rows <= 1), "a matrix with gaps has no flat data");
        // SAFETY: rows·cols elements lie together, borrowed for 'a.
        unsafe { std::slice::from_raw_parts(self.ptr, self.rows * self.cols) }
    }

    /// A block of rows and columns of a matrix that is not transposed.
    pub(crate) fn block(&self, r: Range<usize>, c: Range<usize>) -> Self {
        assert!(
            !self.transposed && r.end <= self.rows && c.end <= self.cols,
            "block {r:?}, {c:?} of {}×{}",
            self.rows,
            self.cols
        );
        let (rows, cols) = (r.len(), c.len());
        let skip = if extent(rows, cols, self.ld) == 0 { 0 } else { r.start * self.ld + c.start };
        // SAFETY: the first element of a nonempty block lies inside the matrix.
        HostMat { ptr: unsafe { self.ptr.add(skip) }, rows, cols, ..*self }
    }

    /// The transpose.
    pub(crate) fn t(self) -> Self {
        HostMat { transposed: !self.transposed, ..self }
    }
}

impl<'a, T: Element> HostMut<'a, T> {
    /// A contiguous matrix over a slice (scratch memory of a kernel).
    pub(crate) fn from_slice(data: &'a mut [T], rows: usize, cols: usize) -> Self {
        assert!(data.len() >= rows * cols, "{rows}×{cols} of {} elements", data.len());
        HostMut { ptr: data.as_mut_ptr(), rows, cols, ld: cols, life: PhantomData }
    }

    pub(crate) fn ptr(&mut self) -> *mut T {
        self.ptr
    }

    #[inline(always)]
    pub(crate) fn row(&self, i: usize) -> &[T] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        // SAFETY: the row lies inside the matrix, borrowed with `self`.
        unsafe { std::slice::from_raw_parts(self.ptr.add(i * self.ld), self.cols) }
    }

    #[inline(always)]
    pub(crate) fn row_mut(&mut self, i: usize) -> &mut [T] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        // SAFETY: the row lies inside the matrix, uniquely borrowed with `self`.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(i * self.ld), self.cols) }
    }

    /// All elements in order, of a matrix without gaps.
    pub(crate) fn into_data(self) -> &'a mut [T] {
        assert!(self.ld == self.cols || self.rows <= 1, "a matrix with gaps has no flat data");
        // SAFETY: rows·cols elements lie together, uniquely borrowed for 'a, and `self` is consumed.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.rows * self.cols) }
    }

    pub(crate) fn reborrow(&mut self) -> HostMut<'_, T> {
        HostMut { life: PhantomData, ..*self }
    }

    /// A block of rows and columns.
    pub(crate) fn block_mut(&mut self, r: Range<usize>, c: Range<usize>) -> HostMut<'_, T> {
        assert!(r.end <= self.rows && c.end <= self.cols, "block {r:?}, {c:?} of {}×{}", self.rows, self.cols);
        let (rows, cols) = (r.len(), c.len());
        let skip = if extent(rows, cols, self.ld) == 0 { 0 } else { r.start * self.ld + c.start };
        // SAFETY: the first element of a nonempty block lies inside the matrix, uniquely borrowed with `self`.
        HostMut { ptr: unsafe { self.ptr.add(skip) }, rows, cols, ld: self.ld, life: PhantomData }
    }

    /// Cuts the matrix into blocks at the given row and column boundaries (each ascending, from 0 to the size), row by
    /// row: disjoint matrices that different tasks may write at the same time.
    pub(crate) fn grid(self, rows: &[usize], cols: &[usize]) -> Vec<HostMut<'a, T>> {
        let ascending = |b: &[usize], n: usize| b.first() == Some(&0) && b.last() == Some(&n) && b.is_sorted();
        assert!(ascending(rows, self.rows) && ascending(cols, self.cols), "boundaries do not cover the matrix");
        let mut blocks = Vec::with_capacity(rows.len() * cols.len());
        for r in rows.windows(2) {
            for c in cols.windows(2) {
                let (m, n) = (r[1] - r[0], c[1] - c[0]);
                let skip = if extent(m, n, self.ld) == 0 { 0 } else { r[0] * self.ld + c[0] };
                // SAFETY: blocks lie inside the matrix and, their boundaries being ascending, never overlap.
                let ptr = unsafe { self.ptr.add(skip) };
                blocks.push(HostMut { ptr, rows: m, cols: n, ld: self.ld, life: PhantomData });
            }
        }
        blocks
    }

    /// Cuts the matrix into blocks of `n` rows (the last may be shorter): one task each.
    pub(crate) fn row_chunks(self, n: usize) -> Vec<HostMut<'a, T>> {
        let mut bounds: Vec<usize> = (0..self.rows).step_by(n.max(1)).collect();
        bounds.push(self.rows);
        if self.rows == 0 {
            return Vec::new();
        }
        let cols = [0, self.cols];
        self.grid(&bounds, &cols)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers() -> Buffer {
        Buffer::from_slice(&Device::Cpu, &(0..12).map(|i| i as f32).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn views_describe_what_they_say() {
        let buf = numbers();
        let m = Mat::new(&buf, 0, 3, 4);
        let at = |m: Mat, i: usize, j: usize| {
            let (i, j) = if m.transposed { (j, i) } else { (i, j) };
            Mat { transposed: false, ..m }.host::<f32>().row(i)[j]
        };
        assert_eq!(at(m, 1, 2), 6.0);
        assert_eq!(at(m.t(), 2, 1), 6.0);
        assert_eq!(at(m.cols_in(1..3), 2, 1), 10.0);
        assert_eq!(at(m.rows_in(1..3).cols_in(2..4), 0, 1), 7.0);
        assert_eq!(at(m.t().rows_in(1..3), 1, 2), 10.0);
        let e = m.rows_in(3..3).cols_in(4..4);
        assert_eq!((e.rows(), e.cols()), (0, 0));
    }

    #[test]
    fn split_columns_write_side_by_side() {
        let mut buf = numbers();
        let (left, right) = MatMut::new(&mut buf, 0, 3, 4).split_cols(1);
        left.host::<f32>().row_mut(2)[0] = -1.0;
        right.host::<f32>().row_mut(2)[2] = -2.0;
        assert_eq!(buf.to_vec::<f32>(8..12).unwrap(), [-1.0, 9.0, 10.0, -2.0]);
    }

    #[test]
    #[should_panic(expected = "3×5 at 0 of 12 elements")]
    fn a_view_outside_its_buffer_is_refused() {
        Mat::new(&numbers(), 0, 3, 5);
    }

    #[test]
    fn chunks_cover_every_row_once() {
        let mut buf = numbers();
        for (i, mut c) in MatMut::new(&mut buf, 0, 6, 2).host::<f32>().row_chunks(4).into_iter().enumerate() {
            for r in 0..c.rows {
                c.row_mut(r).fill(i as f32);
            }
        }
        assert_eq!(buf.to_vec::<f32>(0..12).unwrap(), [0., 0., 0., 0., 0., 0., 0., 0., 1., 1., 1., 1.]);
    }
}
