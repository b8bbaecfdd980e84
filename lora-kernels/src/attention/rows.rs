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

/// xᵢ = exp(xᵢ − max x) in place; returns the maximum and the sum.
#[inline(always)]
pub(super) fn exp<T: Real>(x: &mut [T]) -> (T, T) {
    let (chunks, tail) = x.as_chunks_mut::<LANES>();
    let mut acc = [T::NEG_INFINITY; LANES];
    for x in chunks.iter() {
        for l in 0..LANES {
            acc[l] = acc[l].max(x[l]);
        }
    }
    for (a, &x) in acc.iter_mut().zip(tail.iter()) {
        *a = a.max(x);
    }
    let max = acc.iter().fold(T::NEG_INFINITY, |a, &b| Real::max(a, b));
    let mut acc = [T::ZERO; LANES];
    for x in chunks {
        for l in 0..LANES {
            x[l] = (x[l] - max).exp();
            acc[l] += x[l];
        }
    }
    for (a, x) in acc.iter_mut().zip(tail) {
        *x = (*x - max).exp();
        *a += *x;
    }
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
