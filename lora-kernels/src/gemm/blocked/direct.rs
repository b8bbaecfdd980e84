//! Small products in f32 on the calling thread, such as those of attention: too small to be worth packing.
//!
//! A and B are read where they lie; only a transposed B, whose columns do not follow each other, is packed, a panel at a time.

use std::{arch::x86_64::*, cell::RefCell};

use super::{
    MR, NR, WORDS,
    avx512::{F32, mask, pack_panel},
};
use crate::{
    gemm::Part,
    mat::{HostMat, HostMut},
};

/// `C = α·A·B + β·C` with an inner dimension of `k`, as far as `part` wants it.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) fn product(
    (alpha, beta): (f32, f32),
    a: HostMat<f32>,
    b: HostMat<f32>,
    k: usize,
    mut c: HostMut<f32>,
    part: Part,
) {
    thread_local!(static PANEL: RefCell<[u32; NR * WORDS]> = const { RefCell::new([0; NR * WORDS]) });
    let a = Left { at: a.ptr(), strides: if a.transposed { [1, a.ld] } else { [a.ld, 1] } };
    let step = if b.transposed { WORDS } else { k.max(1) };
    PANEL.with_borrow_mut(|panel| {
        for j in (0..c.cols).step_by(NR) {
            let cols = j..(j + NR).min(c.cols);
            // An empty sum is still a sum: C = β·C.
            for k0 in (0..k.max(1)).step_by(step) {
                let ks = k0..(k0 + step).min(k);
                let right = if b.transposed {
                    pack_panel::<F32, f32>(b, ks.clone(), cols.clone(), panel);
                    Right { at: panel.as_ptr().cast(), ld: NR }
                } else {
                    Right { at: b.ptr().wrapping_add(k0 * b.ld + j), ld: b.ld }
                };
                for i in (0..c.rows).step_by(MR) {
                    let rows = i..(i + MR).min(c.rows);
                    let Some(mine) = part.of(&rows, &cols, &ks) else { continue };
                    let (left, right) = (a.from(i, mine.start), right.from(mine.start - k0));
                    let scalars = (alpha, if k0 == 0 { beta } else { 1.0 });
                    let c = c.block_mut(rows, cols.clone());
                    // SAFETY: A has C's rows and B its columns, and both have all of `mine`.
                    unsafe { tile(mine.len(), left, right, scalars, c) };
                }
            }
        }
    });
}

/// Where an element of A lies, and how far the next row and the next column are.
#[derive(Clone, Copy)]
struct Left {
    at: *const f32,
    strides: [usize; 2],
}

impl Left {
    fn from(self, row: usize, col: usize) -> Left {
        Left { at: self.at.wrapping_add(row * self.strides[0] + col * self.strides[1]), ..self }
    }
}

/// Where a row of B lies, and how far the next one is.
#[derive(Clone, Copy)]
struct Right {
    at: *const f32,
    ld: usize,
}

impl Right {
    fn from(self, row: usize) -> Right {
        Right { at: self.at.wrapping_add(row * self.ld), ..self }
    }
}

/// `C = α·(A·B) + β·C` for up to [`MR`] rows and [`NR`] columns, over `n` steps along k.
///
/// # Safety
/// The processor is available; A has C's rows, B C's columns, and both `n` steps from where they begin.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn tile(n: usize, a: Left, b: Right, scalars: (f32, f32), c: HostMut<f32>) {
    assert!(c.rows <= MR && c.cols <= NR);
    // SAFETY: the caller's promise; V vectors are as many as C's columns need.
    unsafe {
        match (c.rows.next_multiple_of(4), c.cols > 16) {
            (12, true) => tile_of::<12, 2>(n, a, b, scalars, c),
            (8, true) => tile_of::<8, 2>(n, a, b, scalars, c),
            (_, true) => tile_of::<4, 2>(n, a, b, scalars, c),
            (12, false) => tile_of::<12, 1>(n, a, b, scalars, c),
            (8, false) => tile_of::<8, 1>(n, a, b, scalars, c),
            (_, false) => tile_of::<4, 1>(n, a, b, scalars, c),
        }
    }
}

/// # Safety
/// As of [`tile`]; C has at most M rows and V vectors of columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn tile_of<const M: usize, const V: usize>(
    n: usize,
    a: Left,
    b: Right,
    (alpha, beta): (f32, f32),
    mut c: HostMut<f32>,
) {
    let [row, col] = a.strides;
    // Rows that C does not have are its last once more.
    let lefts: [*const f32; M] = std::array::from_fn(|i| a.at.wrapping_add(i.min(c.rows - 1) * row));
    let bits: [u16; V] = std::array::from_fn(|v| (mask(c.cols) >> (16 * v)) as u16);
    let mut sum = [[_mm512_setzero_ps(); V]; M];
    for p in 0..n {
        // SAFETY: step p exists in both; lanes without a bit are not read.
        unsafe {
            let right: [__m512; V] =
                std::array::from_fn(|v| _mm512_maskz_loadu_ps(bits[v], b.at.wrapping_add(p * b.ld + 16 * v)));
            for (left, sum) in lefts.iter().zip(&mut sum) {
                let left = _mm512_set1_ps(*left.add(p * col));
                for (sum, &right) in sum.iter_mut().zip(&right) {
                    *sum = _mm512_fmadd_ps(left, right, *sum);
                }
            }
        }
    }
    let (alpha, scale) = (_mm512_set1_ps(alpha), _mm512_set1_ps(beta));
    for (i, sum) in sum.iter().enumerate().take(c.rows) {
        let row = c.row_mut(i).as_mut_ptr();
        for (v, &sum) in sum.iter().enumerate() {
            let to = row.wrapping_add(16 * v);
            let mut y = _mm512_mul_ps(alpha, sum);
            // SAFETY: lanes without a bit are neither read nor written, and the others lie in the row.
            unsafe {
                if beta != 0.0 {
                    y = _mm512_fmadd_ps(scale, _mm512_maskz_loadu_ps(bits[v], to), y);
                }
                _mm512_mask_storeu_ps(to, bits[v], y);
            }
        }
    }
}
