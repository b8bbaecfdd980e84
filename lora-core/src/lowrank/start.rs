//! Where A and B can begin other than at B = 0: at what a weight has most of, or apart from each other.

use super::adapter::check_rank;
use super::dense::{check_finite, narrow, product, thin_qr, thin_svd, widen};
use super::svd::{Svd, svd};
use super::{LowRank, Real, Result};
use ndarray::{Array2, ArrayView2, s};

/// PiSSA (Meng et al. 2024, [arXiv:2404.02948](https://arxiv.org/abs/2404.02948), section 3): s·B·A is the best
/// approximation of W [out, in] of rank r, with B = U_r·√(σ_r/s) and A = √(σ_r/s)·V_rᵀ. Training then moves what W has
/// most of, beside W − s·B·A.
///
/// # Errors
/// Those of [`truncate`](super::truncate), and [`Error::Scale`](super::Error::Scale) for a scale that is not finite.
pub fn pissa<T: Real>(w: ArrayView2<'_, T>, rank: usize, scale: f64) -> Result<LowRank<T>> {
    principal(svd(w)?, rank, scale)
}

/// [`pissa`] by `niter` subspace iterations from `omega` [in, r], whose elements are standard normal (Halko et al. 2011,
/// algorithms 4.4 and 5.1, as PyTorch's `svd_lowrank`): O(out·in·r) for each, where the whole decomposition takes
/// O(out·in·min(out, in)).
///
/// # Errors
/// Those of [`pissa`]; [`Error::Rank`](super::Error::Rank) when `omega` has more columns than W has rows or columns.
///
/// # Panics
/// When `omega` has not a row for each of W's columns.
pub fn pissa_by_iterations<T: Real>(
    w: ArrayView2<'_, T>,
    omega: ArrayView2<'_, f64>,
    niter: usize,
    scale: f64,
) -> Result<LowRank<T>> {
    let (out, cols) = w.dim();
    check_rank(omega.ncols(), Some(out.min(cols)), (out, cols))?;
    check_finite("W", w)?;
    let w = widen(w);
    let wt = widen(w.t());
    // The columns of Q come to span what W's largest singular directions span.
    let mut q = thin_qr(product(1.0, w.view(), omega).view()).0;
    for _ in 0..niter {
        let p = thin_qr(product(1.0, wt.view(), q.view()).view()).0;
        q = thin_qr(product(1.0, w.view(), p.view()).view()).0;
    }
    let (u, sigma, v) = thin_svd(product(1.0, widen(q.t()).view(), w.view()).view())?;
    let u = product(1.0, q.view(), u.view());
    principal(Svd { u, sigma, v }.with_signs(), omega.ncols(), scale)
}

/// The `rank` largest directions, as factors that `scale` goes before.
fn principal<T: Real>(mut svd: Svd, rank: usize, scale: f64) -> Result<LowRank<T>> {
    svd.sigma.mapv_inplace(|sigma| sigma / scale);
    let (a, b, _) = svd.truncate(rank)?.adapter.into_parts();
    LowRank::new(a, b, scale)
}

/// OLoRA (Büyükakyüz 2024, [arXiv:2406.01775](https://arxiv.org/abs/2406.01775), section 3): with W = Q·R, B begins at the
/// first r columns of Q, which are orthonormal, and A at the first r rows of R. Training goes on beside W − s·B·A.
///
/// The signs are made unique: no element on R's diagonal is negative.
///
/// # Errors
/// [`Error::Rank`](super::Error::Rank) if `rank` is 0 or above min(out, in),
/// [`Error::NonFinite`](super::Error::NonFinite) for a NaN or an infinity,
/// [`Error::Scale`](super::Error::Scale) for a scale that is not finite.
pub fn olora<T: Real>(w: ArrayView2<'_, T>, rank: usize, scale: f64) -> Result<LowRank<T>> {
    let (out, cols) = w.dim();
    check_rank(rank, Some(out.min(cols)), (out, cols))?;
    check_finite("W", w)?;
    let (mut q, mut r) = thin_qr(widen(w).view());
    for i in 0..rank {
        if r[[i, i]] < 0.0 {
            q.column_mut(i).mapv_inplace(|x| -x);
            r.row_mut(i).mapv_inplace(|x| -x);
        }
    }
    LowRank::new(narrow(&r.slice(s![..rank, ..]).to_owned()), narrow(&q.slice(s![.., ..rank]).to_owned()), scale)
}

/// A and B of rank r that are not zero and whose product is (PEFT's `orthogonal`): of an orthogonal Q [r, r] every other
/// row goes to A, A = (`right`·Q₀,₂,…)ᵀ/10, and the rest to B, B = `left`·Q₁,₃,…/10.
///
/// # Panics
/// When `x` is not square of an even size r, or `left` and `right` do not have r/2 columns.
pub fn orthogonal(
    x: ArrayView2<'_, f64>,
    left: ArrayView2<'_, f64>,
    right: ArrayView2<'_, f64>,
) -> (Array2<f64>, Array2<f64>) {
    let (q, _) = thin_qr(x);
    let rows = |first: usize| q.slice(s![first..;2, ..]).to_owned();
    let a = product(0.1, right, rows(0).view());
    (widen(a.t()), product(0.1, left, rows(1).view()))
}
