#![allow(unsafe_code)]

use std::{ffi::c_void, mem::MaybeUninit};

use super::{Function, Gpu};
use crate::{Acc, DType, Error, Mat, MatMut, Result};

/// The end of a kernel's name: the type that it computes on.
pub(crate) fn suffix(kernel: &'static str, dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("f32"),
        DType::Bf16 => Ok("bf16"),
        DType::F16 => Ok("f16"),
        dtype => Err(Error::DType { kernel, dtype }),
    }
}

/// A kernel with its arguments, pushed in the order of its parameters.
pub(crate) struct Launch<'g> {
    gpu: &'g Gpu,
    function: Function,
    arguments: Arguments,
}

/// The arguments of a launch.
#[derive(Clone)]
pub(crate) struct Arguments {
    /// Their bytes, each argument from a multiple of 8 on.
    bytes: Vec<MaybeUninit<u64>>,
    /// Where each begins.
    starts: Vec<usize>,
}

impl Arguments {
    /// Where each argument lies, as CUDA wants it; valid while `self` is borrowed.
    pub(super) fn pointers(&mut self) -> Vec<*mut c_void> {
        let words: *mut u64 = self.bytes.as_mut_ptr().cast();
        // SAFETY: each start is the place of one argument.
        self.starts.iter().map(|&at| unsafe { words.add(at).cast() }).collect()
    }

    fn push<T: Copy>(&mut self, value: T) {
        let at = self.bytes.len();
        self.starts.push(at);
        self.bytes.resize(at + size_of::<T>().div_ceil(8), MaybeUninit::new(0));
        let from = (&raw const value).cast::<u8>();
        // SAFETY: room for the value was just made, and a `T: Copy` may be copied by its bytes.
        unsafe { std::ptr::copy_nonoverlapping(from, self.bytes[at..].as_mut_ptr().cast(), size_of::<T>()) };
    }
}

impl<'g> Launch<'g> {
    pub(super) fn new(gpu: &'g Gpu, function: Function) -> Launch<'g> {
        let arguments = Arguments { bytes: Vec::with_capacity(32), starts: Vec::with_capacity(16) };
        Launch { gpu, function, arguments }
    }

    /// A value of a C type that is plain bytes.
    pub(crate) fn raw<T: Copy>(&mut self, value: T) -> &mut Self {
        self.arguments.push(value);
        self
    }

    /// The address of a matrix's first element.
    ///
    /// # Panics
    /// When the matrix lies on another device.
    pub(crate) fn mat(&mut self, m: Mat) -> &mut Self {
        assert!(m.gpu().is_some_and(|g| **g == *self.gpu), "a matrix on {} among those on {}", m.device(), self.gpu);
        self.raw(m.address())
    }

    /// As [`Launch::mat`], of a matrix that the kernel writes.
    pub(crate) fn mat_mut(&mut self, m: &MatMut) -> &mut Self {
        self.mat(m.as_mat())
    }

    /// The address and β of a gradient; null and 0 when it is not asked for.
    pub(crate) fn acc(&mut self, acc: Option<&Acc>) -> &mut Self {
        match acc {
            Some(acc) => self.mat_mut(&acc.to).f32(acc.beta),
            None => self.null().f32(0.0),
        }
    }

    /// The address of a matrix's first element, or null.
    pub(crate) fn mat_or_null(&mut self, m: Option<Mat>) -> &mut Self {
        match m {
            Some(m) => self.mat(m),
            None => self.null(),
        }
    }

    /// A null pointer: what is not asked for.
    pub(crate) fn null(&mut self) -> &mut Self {
        self.raw(0u64)
    }

    /// An `int`.
    ///
    /// # Panics
    /// When the number does not fit.
    pub(crate) fn i32(&mut self, v: usize) -> &mut Self {
        self.raw(i32::try_from(v).expect("sizes of kernels fit an int"))
    }

    /// An `i64`.
    pub(crate) fn i64(&mut self, v: usize) -> &mut Self {
        self.raw(v as i64)
    }

    /// A `u32`.
    pub(crate) fn u32(&mut self, v: u32) -> &mut Self {
        self.raw(v)
    }

    /// A `u64`.
    pub(crate) fn u64(&mut self, v: u64) -> &mut Self {
        self.raw(v)
    }

    /// A `float`.
    pub(crate) fn f32(&mut self, v: f64) -> &mut Self {
        self.raw(v as f32)
    }

    /// Puts the kernel into the device's stream.
    ///
    /// # Panics
    /// When the grid or the block is larger than a device allows.
    ///
    /// # Safety
    /// The arguments are those of the kernel, and every access it makes with them lies in live memory that it may touch.
    pub(crate) unsafe fn run(&mut self, grid: [usize; 3], threads: usize, shared: usize) -> Result<()> {
        assert!(
            (1..1 << 31).contains(&grid[0]) && grid[1..].iter().all(|g| (1..1 << 16).contains(g)),
            "no device takes a grid of {grid:?}"
        );
        assert!(
            threads.is_multiple_of(32) && (32..=1024).contains(&threads),
            "no device takes {threads} threads a block"
        );
        // SAFETY: the caller's promise.
        unsafe {
            self.gpu.run(self.function, grid.map(|g| g as u32), threads as u32, shared as u32, &mut self.arguments)
        }
    }
}
