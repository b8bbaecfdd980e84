//! Blocks of C, which are computed side by side: products in f32 and in bf16 on a processor with AVX-512.
//!
//! Each task packs what it needs of A (rows) and B (panels of [`NR`] columns) just before it is used, so frozen weights are
//! read once and nothing is kept in a second layout. What is packed are words of 32 bits: one element of f32, or two of
//! bf16 that follow each other along k. Every element's sum goes over k in the same order wherever a block begins.

mod avx512;

use std::cell::RefCell;

use rayon::prelude::*;

use avx512::{Arithmetic, F32, Source};
pub(super) use avx512::{Bf16, Widened};
use half::bf16;

use super::bf16::Operand;
use crate::{
    Buffer, DType, Device, Result,
    mat::{HostMat, HostMut},
    reduce::bounds,
};

/// Words along k that are packed at a time: a panel of B then fits the first cache, a block of A the second.
const WORDS: usize = 192;
/// Columns of C that a kernel computes at a time: two vectors.
const NR: usize = 32;
/// Rows of C that a kernel computes at a time: with two vectors each, 24 of the 32 registers hold sums.
const MR: usize = 12;
/// Most rows of a task.
const ROWS: usize = 20 * MR;

/// Whether this processor has what the products below need.
pub(super) fn available() -> bool {
    avx512::available()
}

/// `C = α·A·B + β·C` in f32, on a processor that is [`available`].
pub(super) fn f32_product(alpha: f64, a: HostMat<f32>, b: HostMat<f32>, beta: f64, c: HostMut<f32>) -> Result<()> {
    run::<F32, _, _>((alpha as f32, beta as f32), a, b, c)
}

/// `C = α·A·B + β·C` of bf16 numbers, to which f32 operands are rounded, with f32 sums, on a processor that is
/// [`available`].
pub(super) fn bf16_product(alpha: f64, a: Operand, b: Operand, beta: f64, c: HostMut<f32>) -> Result<()> {
    let by = if avx512::pairs_pay() { bf16_by::<Bf16> } else { bf16_by::<Widened> };
    by(alpha, a, b, beta, c)
}

/// The same by one arithmetic.
pub(super) fn bf16_by<T: Arithmetic>(alpha: f64, a: Operand, b: Operand, beta: f64, c: HostMut<f32>) -> Result<()>
where
    f32: Source<T>,
    bf16: Source<T>,
{
    let scalars = (alpha as f32, beta as f32);
    match (a, b) {
        (Operand::F32(a), Operand::F32(b)) => run::<T, _, _>(scalars, a, b, c),
        (Operand::F32(a), Operand::Bf16(b)) => run::<T, _, _>(scalars, a, b, c),
        (Operand::Bf16(a), Operand::F32(b)) => run::<T, _, _>(scalars, a, b, c),
        (Operand::Bf16(a), Operand::Bf16(b)) => run::<T, _, _>(scalars, a, b, c),
    }
}

fn run<T: Arithmetic, A: Source<T>, B: Source<T>>(
    scalars: (f32, f32),
    a: HostMat<A>,
    b: HostMat<B>,
    c: HostMut<f32>,
) -> Result<()> {
    let (m, n, k) = (c.rows, c.cols, if a.transposed { a.rows } else { a.cols });
    let threads = if m * n * k > 1 << 18 { rayon::current_num_threads() } else { 1 };
    let rows = even(m, ROWS, MR);
    // Two tasks a thread, so that one that is held up does not hold up all; columns are cut where rows do not suffice.
    let stripes = if threads > 1 { (2 * threads).div_ceil(rows.len() - 1) } else { 1 };
    let cols = even(n, n.div_ceil(stripes).max(4 * NR), NR);
    let firsts = |bounds: &[usize]| bounds[..bounds.len() - 1].to_vec();
    let places = firsts(&rows).into_iter().flat_map(|i| firsts(&cols).into_iter().map(move |j| (i, j)));
    let tasks: Vec<_> = places.zip(c.grid(&rows, &cols)).collect();
    let one = |((i, j), c)| {
        with_scratch(|scratch| {
            // SAFETY: the products are only called where `available`.
            unsafe { avx512::block::<T, A, B>(scalars, (a, i), (b, j), k, c, scratch) };
        })
    };
    match tasks.len() {
        0 | 1 => tasks.into_iter().try_for_each(one),
        _ => tasks.into_par_iter().try_for_each(one),
    }
}

/// Calls `f` with this thread's own room for [`ROWS`] packed rows of A and a panel of B, which it keeps.
fn with_scratch(f: impl FnOnce([&mut [u32]; 2])) -> Result<()> {
    thread_local!(static SCRATCH: RefCell<Option<Buffer>> = const { RefCell::new(None) });
    SCRATCH.with_borrow_mut(|scratch| {
        let buffer = match scratch {
            Some(buffer) => buffer,
            None => scratch.insert(Buffer::empty(&Device::Cpu, DType::U32, (ROWS + NR) * WORDS)?),
        };
        let (left, right) = buffer.host_mut().split_at_mut(ROWS * WORDS);
        f([left, right]);
        Ok(())
    })
}

/// Boundaries 0 to n of parts as even as multiples of `unit` allow, none above `most`, which is rounded up to such.
fn even(n: usize, most: usize, unit: usize) -> Vec<usize> {
    let parts = n.div_ceil(most.next_multiple_of(unit)).max(1);
    bounds(n, n.div_ceil(parts).next_multiple_of(unit).max(unit))
}
