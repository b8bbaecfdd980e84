//! Operands in the order in which [`kernel::tile`](super::kernel::tile) reads them.

use std::ops::Range;

use half::bf16;

use super::{KC, NR, Operand, kernel::avx512};
use crate::{Element, mat::HostMat};

/// A number that becomes a bf16, and its vectors.
pub(super) trait Packed: Element {
    fn narrow(self) -> bf16;
    /// `n ≤ 32` elements as 32 numbers of bf16, zeros behind them.
    ///
    /// # Safety
    /// The processor has AVX-512 with BF16, and the elements can be read.
    unsafe fn load32(from: *const Self, n: usize) -> avx512::Words;
    /// As `load32` of 16 elements of two rows: pairs of the elements above each other; no second row counts as zeros.
    ///
    /// # Safety
    /// As there.
    unsafe fn pairs16(even: *const Self, odd: Option<*const Self>, n: usize) -> avx512::Words;
}

impl Packed for f32 {
    fn narrow(self) -> bf16 {
        bf16::from_f32(self)
    }
    unsafe fn load32(from: *const f32, n: usize) -> avx512::Words {
        // SAFETY: the caller's promise.
        unsafe { avx512::narrowed(from, n) }
    }
    unsafe fn pairs16(even: *const f32, odd: Option<*const f32>, n: usize) -> avx512::Words {
        // SAFETY: the caller's promise.
        unsafe { avx512::narrowed_pairs(even, odd, n) }
    }
}

impl Packed for bf16 {
    fn narrow(self) -> bf16 {
        self
    }
    unsafe fn load32(from: *const bf16, n: usize) -> avx512::Words {
        // SAFETY: the caller's promise.
        unsafe { avx512::words(from, n) }
    }
    unsafe fn pairs16(even: *const bf16, odd: Option<*const bf16>, n: usize) -> avx512::Words {
        // SAFETY: the caller's promise.
        unsafe { avx512::pairs(even, odd, n) }
    }
}
