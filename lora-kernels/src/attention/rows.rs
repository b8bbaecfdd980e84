//! Loops over one row, written so that they become vector code: reductions keep one partial result per lane.

use crate::{
    dropout::{CHUNK, Mask},
    real::Real,
    reduce::total,
};

const LANES: usize = 16;

/// Σ aᵢ bᵢ.
#[inline(always)]
pub(super) fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    let ((a, at), (b, bt)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut acc = [T::ZERO; LANES];
    for (a, b) in a.iter().zip(b) {
        for l in 0..LANES {
            acc[l] = a[l].mul_add(b[l], acc[l]);
        }
    }
    for ((acc, &a), &b) in acc.iter_mut().zip(at).zip(bt) {
        *acc = a.mul_add(b, *acc);
    }
    total(acc)
}

/// Calls `f` on [`LANES`] elements of all rows at a time, the last of which are filled up: rows of attention are short, and
/// what is left over of them would be most of the work, one element after the other.
#[inline(always)]
pub(super) fn lanes<T: Real, const N: usize>(rows: [&mut [T]; N], fill: T, mut f: impl FnMut([&mut [T; LANES]; N])) {
    let mut parts = rows.map(|row| row.as_chunks_mut::<LANES>());
    for i in 0..parts[0].0.len() {
        f(parts.each_mut().map(
            #[inline(always)]
            |(whole, _)| &mut whole[i],
        ));
    }
    let n = parts[0].1.len();
    if n > 0 {
        let mut filled = [[fill; LANES]; N];
        for (filled, (_, rest)) in filled.iter_mut().zip(&parts) {
            filled[..n].copy_from_slice(rest);
        }
        f(filled.each_mut());
        for (filled, (_, rest)) in filled.iter().zip(&mut parts) {
            rest.copy_from_slice(&filled[..n]);
        }
    }
}

/// xᵢ = exp(xᵢ − max x) in place; returns the maximum and the sum.
#[inline(always)]
pub(super) fn exp<T: Real>(x: &mut [T]) -> (T, T) {
    let mut acc = [T::NEG_INFINITY; LANES];
    lanes(
        [&mut *x],
        T::NEG_INFINITY,
        #[inline(always)]
        |[x]| {
            for l in 0..LANES {
                acc[l] = acc[l].max(x[l]);
            }
        },
    );
    let max = acc.iter().fold(T::NEG_INFINITY, |a, &b| Real::max(a, b));
    let mut acc = [T::ZERO; LANES];
    // What fills up adds exp(−∞) = 0.
    lanes(
        [x],
        T::NEG_INFINITY,
        #[inline(always)]
        |[x]| {
            for l in 0..LANES {
                x[l] = (x[l] - max).exp();
                acc[l] += x[l];
            }
        },
    );
    (max, total(acc))
}

/// A row of P, from key 0 on, becomes P ∘ M.
#[inline(always)]
pub(super) fn drop<T: Real>(mask: &Mask<T>, row: u32, site: u32, p: &mut [T]) {
    let mut factors = [T::ZERO; CHUNK];
    for (c, p) in p.chunks_mut(CHUNK).enumerate() {
        mask.chunk(c * CHUNK, row, site, &mut factors);
        for (p, &f) in p.iter_mut().zip(&factors) {
            *p *= f;
        }
    }
}
