//! Blocks of C, which are computed side by side: products in f32 and in bf16 on a processor with AVX-512.
//!
//! Each task packs what it needs of A (rows) and B (panels of [`NR`] columns) just before it is used, so frozen weights are
//! read once and nothing is kept in a second layout. What is packed are words of 32 bits: one element of f32, or two of
//! bf16 that follow each other along k. Every element's sum goes over k in the same order wherever a block begins.

mod avx512;
mod direct;

use std::cell::RefCell;

use rayon::prelude::*;

use avx512::{Arithmetic, F32, Source};
pub(super) use avx512::{Bf16, Widened};
use half::bf16;

use super::{Part, bf16::Operand, sizes};
use crate::{
    Buffer, DType, Device, Result,
    mat::{HostMat, HostMut},
};

/// Words along k that are packed at a time: a panel of B then fits the first cache, a block of A the second.
const WORDS: usize = 192;
/// Columns of C that a kernel computes at a time: two vectors.
const NR: usize = 32;
/// Rows of C that a kernel computes at a time: with two vectors each, 24 of the 32 registers hold sums.
const MR: usize = 12;
/// Most rows of a task: packed, one step of them along k fills less than half of the second cache.
const ROWS: usize = 43 * MR;
/// Words of A that are packed at once where a task's are no more: then its columns of C are done one panel after the other,
/// and stay in the first cache from step to step along k.
const DEEP: usize = 4 * 20 * MR * WORDS;

/// Room for what a task packs of A; a kernel reads up to three rows past the last, whatever stands there.
const LEFT: usize = if DEEP > ROWS * WORDS { DEEP } else { ROWS * WORDS } + 3 * WORDS;

/// Whether this processor has what the products below need.
pub(super) fn available() -> bool {
    avx512::available()
}

/// What becomes of a product: `C = α·A·B + β·C + bias`.
#[derive(Clone, Copy)]
pub(super) struct Form<'a> {
    pub(super) alpha: f32,
    pub(super) beta: f32,
    /// One for each column of C.
    pub(super) bias: Option<&'a [f32]>,
}

/// A product in f32, on a processor that is [`available`].
pub(super) fn f32_product(form: Form, a: HostMat<f32>, b: HostMat<f32>, c: HostMut<f32>) -> Result<()> {
    run::<F32, _, _>(form, a, b, c)
}

/// A product of bf16 numbers, to which f32 operands are rounded, with f32 sums, on a processor that is [`available`].
pub(super) fn bf16_product(form: Form, a: Operand, b: Operand, c: HostMut<f32>) -> Result<()> {
    let by = if avx512::pairs_pay() { bf16_by::<Bf16> } else { bf16_by::<Widened> };
    by(form, a, b, c)
}

/// The same by one arithmetic.
pub(super) fn bf16_by<T: Arithmetic>(form: Form, a: Operand, b: Operand, c: HostMut<f32>) -> Result<()>
where
    f32: Source<T>,
    bf16: Source<T>,
{
    match (a, b) {
        (Operand::F32(a), Operand::F32(b)) => run::<T, _, _>(form, a, b, c),
        (Operand::F32(a), Operand::Bf16(b)) => run::<T, _, _>(form, a, b, c),
        (Operand::Bf16(a), Operand::F32(b)) => run::<T, _, _>(form, a, b, c),
        (Operand::Bf16(a), Operand::Bf16(b)) => run::<T, _, _>(form, a, b, c),
    }
}

/// `C = α·A·B + β·C` in f32 on the calling thread, as far as `part` wants it, on a processor that is [`available`].
pub(super) fn direct(alpha: f64, a: HostMat<f32>, b: HostMat<f32>, beta: f64, c: HostMut<f32>, part: Part) {
    let [_, k, _] = sizes(&a, &b, &c);
    // SAFETY: the products are only called where `available`.
    unsafe { direct::product((alpha as f32, beta as f32), a, b, k, c, part) };
}

fn run<T: Arithmetic, A: Source<T>, B: Source<T>>(
    form: Form,
    a: HostMat<A>,
    b: HostMat<B>,
    c: HostMut<f32>,
) -> Result<()> {
    let (m, n, k) = (c.rows, c.cols, if a.transposed { a.rows } else { a.cols });
    let threads = if m * n * k > 1 << 18 { rayon::current_num_threads() } else { 1 };
    let [blocks, stripes] = cut(m, n, threads);
    let (rows, cols) = (even(m, blocks, MR), even(n, stripes, NR));
    let firsts = |bounds: &[usize]| bounds[..bounds.len() - 1].to_vec();
    let places = firsts(&rows).into_iter().flat_map(|i| firsts(&cols).into_iter().map(move |j| (i, j)));
    let mut tasks: Vec<_> = places.zip(c.grid(&rows, &cols)).collect();
    // Blocks may differ by some rows, stripes hardly: a thread that has a stripe's blocks has as much as the others.
    tasks.sort_by_key(|((i, j), _)| (*j, *i));
    let one = |((i, j), c)| {
        with_scratch(|scratch| {
            // SAFETY: the products are only called where `available`.
            unsafe { avx512::block::<T, A, B>(form, (a, i), (b, j), k, c, scratch) };
        })
    };
    match tasks.len() {
        0 | 1 => tasks.into_iter().try_for_each(one),
        // One by one: handed out in runs, the last of them would keep one thread busy and the others idle.
        _ => tasks.into_par_iter().with_max_len(1).try_for_each(one),
    }
}

/// Into how many blocks of rows and stripes of columns C is cut: such that the thread with the most tasks is done first, by
/// what a task has to multiply and to pack for each step along k.
fn cut(m: usize, n: usize, threads: usize) -> [usize; 2] {
    /// What packing an element costs, in multiplications.
    const PACK: usize = 16;
    /// One task in so many is held up, and with it everything: a reason for smaller ones.
    const STEADY: usize = 16;
    let least = m.div_ceil(ROWS).max(1);
    if threads == 1 {
        return [least, 1];
    }
    let time = |&[blocks, stripes]: &[usize; 2]| {
        let part = |n: usize, parts: usize, unit: usize| n.div_ceil(unit).div_ceil(parts) * unit;
        let (rows, cols) = (part(m, blocks, MR), part(n, stripes, NR));
        (STEADY * (blocks * stripes).div_ceil(threads) + 1) * (rows * cols + PACK * (rows + cols))
    };
    let ways = |least: usize, parts: usize| least..=parts.min(least + 15).max(least);
    let all = ways(least, m.div_ceil(MR)).flat_map(|b| ways(1, n.div_ceil(NR)).map(move |s| [b, s]));
    all.min_by_key(time).unwrap_or([least, 1])
}

/// Calls `f` with this thread's own room for what a task packs of A and for a panel of B, which it keeps.
fn with_scratch(f: impl FnOnce([&mut [u32]; 2])) -> Result<()> {
    thread_local!(static SCRATCH: RefCell<Option<Buffer>> = const { RefCell::new(None) });
    SCRATCH.with_borrow_mut(|scratch| {
        let buffer = match scratch {
            Some(buffer) => buffer,
            None => scratch.insert(Buffer::empty(&Device::Cpu, DType::U32, LEFT + NR * WORDS)?),
        };
        let (left, right) = buffer.host_mut().split_at_mut(LEFT);
        f([left, right]);
        Ok(())
    })
}

/// Boundaries 0 to n of `parts` parts, as even as multiples of `unit` allow.
fn even(n: usize, parts: usize, unit: usize) -> Vec<usize> {
    let units = n.div_ceil(unit).max(1);
    (0..=parts).map(|i| (units * i / parts * unit).min(n)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_even_and_cover_all() {
        for (n, parts, unit, want) in [
            (0, 1, 12, &[0, 0][..]),
            (1, 1, 12, &[0, 1]),
            (241, 2, 12, &[0, 120, 241]),
            (1016, 5, 12, &[0, 204, 408, 612, 816, 1016]),
            (576, 4, 32, &[0, 128, 288, 416, 576]),
        ] {
            assert_eq!(even(n, parts, unit), want, "{n} in {parts}");
        }
    }

    /// Blocks fit their room, none is empty, and no thread waits long for another.
    #[test]
    fn work_is_cut_so_that_all_threads_have_some() {
        let sizes = [0, 1, 12, 146, 192, 240, 241, 400, 576, 768, 1000, 1016, 1024, 2048, 4064, 50_257];
        for (m, n, threads) in
            sizes.iter().flat_map(|&m| sizes.iter().flat_map(move |&n| [1, 2, 3, 8, 64].map(|t| (m, n, t))))
        {
            let [blocks, stripes] = cut(m, n, threads);
            let (rows, cols) = (even(m, blocks, MR), even(n, stripes, NR));
            for (bounds, most, all) in [(&rows, ROWS, m), (&cols, usize::MAX, n)] {
                let sizes = bounds.windows(2).map(|w| w[1] - w[0]);
                assert!(sizes.into_iter().all(|s| s <= most && (s > 0 || all == 0)), "{m}×{n}, {threads}: {bounds:?}");
            }
            let tasks = blocks * stripes;
            let busy = tasks as f64 / tasks.next_multiple_of(threads) as f64;
            assert!(busy > 0.9 || m < 1000 || n < 576 || threads > 8, "{m}×{n}, {threads}: {tasks} tasks");
        }
        assert_eq!(
            [(1016, 768), (1016, 192), (192, 192), (146, 768)].map(|(m, n)| cut(m, n, 2)),
            [[2, 2], [2, 1], [1, 2], [1, 2]]
        );
    }
}
