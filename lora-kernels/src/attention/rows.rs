//! Loops over one row, written so that they become vector code: reductions keep one partial result per lane.

use crate::{
    dropout::{CHUNK, Mask},
    real::Real,
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
    let tail = at.iter().zip(bt).fold(T::ZERO, |s, (&a, &b)| a.mul_add(b, s));
    fold(acc, |a, b| a + b) + tail
}

/// The largest element.
#[inline(always)]
pub(super) fn max<T: Real>(x: &[T]) -> T {
    let (x, tail) = x.as_chunks::<LANES>();
    let mut acc = [T::NEG_INFINITY; LANES];
    for x in x {
        for l in 0..LANES {
            acc[l] = acc[l].max(x[l]);
        }
    }
    tail.iter().fold(fold(acc, T::max), |m, &v| m.max(v))
}

/// xᵢ = exp(xᵢ − shift); returns their sum.
#[inline(always)]
pub(super) fn exp_sum<T: Real>(x: &mut [T], shift: T) -> T {
    let (x, tail) = x.as_chunks_mut::<LANES>();
    let mut acc = [T::ZERO; LANES];
    for x in x {
        for l in 0..LANES {
            x[l] = (x[l] - shift).exp();
            acc[l] += x[l];
        }
    }
    let mut sum = T::ZERO;
    for v in tail {
        *v = (*v - shift).exp();
        sum += *v;
    }
    fold(acc, |a, b| a + b) + sum
}

/// A row of P becomes P ∘ M; its first element is key 0.
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

/// The lanes as one, pairwise.
#[inline(always)]
fn fold<T: Real>(mut acc: [T; LANES], f: impl Fn(T, T) -> T) -> T {
    let mut n = LANES / 2;
    while n > 0 {
        for l in 0..n {
            acc[l] = f(acc[l], acc[l + n]);
        }
        n /= 2;
    }
    acc[0]
}
