//! Blocks of C, which are computed side by side.
//!
//! Each task packs what it needs of A (rows of [`KC`] elements) and B (panels of [`NR`] columns, pairs along k side by
//! side) just before it is used, so frozen weights are read once and nothing is kept in a second layout. Every element's
//! sum goes over k in the same order wherever a block begins.

use half::bf16;
use rayon::prelude::*;

use super::{
    Operand,
    avx512::{self, Source},
};
use crate::{
    Buffer, DType, Device, Result,
    mat::{HostMat, HostMut},
    reduce::bounds,
};

/// Elements along k that are packed at a time: a panel of B then fits the first cache, a block of A the second.
pub(super) const KC: usize = 384;
/// Columns of C that a kernel computes at a time: two vectors.
pub(super) const NR: usize = 32;
/// Rows of C that a kernel computes at a time: with two vectors each, 24 of the 32 registers hold sums.
pub(super) const MR: usize = 12;
/// Most rows of a task.
const ROWS: usize = 20 * MR;

/// `C = α·A·B + β·C`, on a processor that is [`available`](avx512::available).
pub(super) fn product(alpha: f64, a: Operand, b: Operand, beta: f64, c: HostMut<f32>) -> Result<()> {
    let scalars = (alpha as f32, beta as f32);
    match (a, b) {
        (Operand::F32(a), Operand::F32(b)) => run(scalars, a, b, c),
        (Operand::F32(a), Operand::Bf16(b)) => run(scalars, a, b, c),
        (Operand::Bf16(a), Operand::F32(b)) => run(scalars, a, b, c),
        (Operand::Bf16(a), Operand::Bf16(b)) => run(scalars, a, b, c),
    }
}

fn run<A: Source, B: Source>(scalars: (f32, f32), a: HostMat<A>, b: HostMat<B>, c: HostMut<f32>) -> Result<()> {
    let (m, n, k) = (c.rows, c.cols, if a.transposed { a.rows } else { a.cols });
    let threads = if m * n * k > 1 << 18 { rayon::current_num_threads() } else { 1 };
    let rows = even(m, ROWS, MR);
    // Two tasks a thread, so that one that is held up does not hold up all; columns are cut where rows do not suffice.
    let stripes = if threads > 1 { (2 * threads).div_ceil(rows.len() - 1) } else { 1 };
    let cols = even(n, n.div_ceil(stripes).max(4 * NR), NR);
    let firsts = |bounds: &[usize]| bounds[..bounds.len() - 1].to_vec();
    let places = firsts(&rows).into_iter().flat_map(|i| firsts(&cols).into_iter().map(move |j| (i, j)));
    let tasks: Vec<_> = places.zip(c.grid(&rows, &cols)).collect();
    let one = |((i, j), c)| block(scalars, (a, i), (b, j), k, c);
    match tasks.len() {
        0 | 1 => tasks.into_iter().try_for_each(one),
        _ => tasks.into_par_iter().try_for_each(one),
    }
}

/// Boundaries 0 to n of parts as even as multiples of `unit` allow, none above `most`, which is rounded up to such.
fn even(n: usize, most: usize, unit: usize) -> Vec<usize> {
    let parts = n.div_ceil(most.next_multiple_of(unit)).max(1);
    bounds(n, n.div_ceil(parts).next_multiple_of(unit).max(unit))
}

/// One block of C, whose first row and column stand beside A and B.
fn block<A: Source, B: Source>(
    (alpha, beta): (f32, f32),
    (a, i0): (HostMat<A>, usize),
    (b, j0): (HostMat<B>, usize),
    k: usize,
    mut c: HostMut<f32>,
) -> Result<()> {
    // All tasks ask for the same sizes, so that the pool serves every one of them from the same few blocks.
    let mut left = Buffer::empty(&Device::Cpu, DType::Bf16, ROWS * KC)?;
    let mut right = Buffer::empty(&Device::Cpu, DType::U32, KC / 2 * NR)?;
    let (left, right) = (left.host_mut::<bf16>(), right.host_mut::<u32>());
    let tiles = c.rows.div_ceil(MR);
    // An empty sum is still a sum: C = β·C.
    for k0 in (0..k.max(1)).step_by(KC) {
        let ks = k0..(k0 + KC).min(k);
        let beta = if k0 == 0 { beta } else { 1.0 };
        avx512::pack_rows(a, i0..i0 + c.rows, ks.clone(), left);
        for j in (0..c.cols).step_by(NR) {
            let [here, next, after] = [0, 1, 2].map(|panels| (j + panels * NR).min(c.cols));
            avx512::pack_panel(b, ks.clone(), j0 + here..j0 + next, right);
            for t in 0..tiles {
                // The next panel is on its way while this one is used.
                avx512::prefetch_panel(b, ks.clone(), j0 + next..j0 + after, (t, tiles));
                let rows = t * MR..((t + 1) * MR).min(c.rows);
                let packed = &left[rows.start * KC..];
                avx512::tile(ks.len().div_ceil(2), packed, right, alpha, beta, c.block_mut(rows, here..next));
            }
        }
    }
    Ok(())
}
