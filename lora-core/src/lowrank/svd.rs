//! Singular values and directions, and the adapter nearest to a ΔW.

use super::adapter::check_rank;
use super::dense::{check_finite, narrow, norm, product, thin_qr, thin_svd, widen};
use super::{LowRank, Real, Result};
use ndarray::{Array1, Array2, ArrayView2, Axis, s};

/// A thin singular value decomposition M = U·diag(σ)·Vᵀ of M [m, n], with k triples of value and directions.
///
/// The signs are made unique: in each column of U the element of largest magnitude (the first of equals) is positive.
#[derive(Debug, Clone, PartialEq)]
pub struct Svd {
    /// U, [m, k]: the left singular directions, one per column.
    pub u: Array2<f64>,
    /// σ, \[k\]: the singular values, descending.
    pub sigma: Array1<f64>,
    /// V, [n, k]: the right singular directions, one per column.
    pub v: Array2<f64>,
}

/// An adapter of some rank and how far it is from what it stands for.
#[derive(Debug, Clone, PartialEq)]
pub struct Truncated<T> {
    /// B = U_r·√σ_r and A = √σ_r·V_rᵀ, equal in norm; s = 1, which an adapter file states as α = r.
    pub adapter: LowRank<T>,
    /// ‖ΔW − B·A‖_F = √(σ²_{r+1} + σ²_{r+2} + …), the least that any rank r can leave (Eckart and Young 1936).
    /// Rounding A and B to `T` comes on top.
    pub error: f64,
}

/// The thin SVD of `m` [m, n], with k = min(m, n), in O(m·n·k).
///
/// Squares are taken on the way, so f64 elements far outside 10^±150 are beyond it: larger ones are refused, smaller
/// ones lose their digits. Every finite f32 is well inside.
///
/// # Errors
/// [`Error::NonFinite`](super::Error::NonFinite) for a NaN or an infinity, [`Error::Svd`](super::Error::Svd) if f64
/// overflows.
pub fn svd<T: Real>(m: ArrayView2<'_, T>) -> Result<Svd> {
    check_finite("the matrix", m)?;
    let (u, sigma, v) = thin_svd(widen(m).view())?;
    Ok(Svd { u, sigma, v }.with_signs())
}

/// The SVD of ΔW = s·B·A through its factors, with k = min(out, r, in): O((out + in)·r²) and never an [out, in] array.
///
/// B = Q_B·R_B and Aᵀ = Q_A·R_A; the small s·R_B·R_Aᵀ [r, r] = U'·diag(σ)·V'ᵀ gives U = Q_B·U' and V = Q_A·V'.
///
/// # Errors
/// [`Error::Svd`](super::Error::Svd) if f64 overflows.
pub fn svd_of<T: Real>(adapter: &LowRank<T>) -> Result<Svd> {
    svd_of_factors(widen(adapter.b()).view(), widen(adapter.a()).view(), adapter.scale())
}

/// The SVD of s·B·A, with at most min(out, r, in) triples.
pub(super) fn svd_of_factors(b: ArrayView2<'_, f64>, a: ArrayView2<'_, f64>, scale: f64) -> Result<Svd> {
    let (qb, rb) = thin_qr(b);
    let (qa, ra) = thin_qr(widen(a.t()).view());
    let core = product(scale, rb.view(), widen(ra.t()).view());
    let (u, sigma, v) = thin_svd(core.view())?;
    let (u, v) = (product(1.0, qb.view(), u.view()), product(1.0, qa.view(), v.view()));
    Ok(Svd { u, sigma, v }.with_signs())
}

/// The adapter of rank `rank` nearest to `delta` [out, in] in the Frobenius norm (and in the spectral norm).
///
/// Turns a fully fine-tuned W − W₀ into an adapter, in O(out·in·min(out, in)). For a ΔW stored [in, out], pass
/// `delta.t()`. To lower the rank of an adapter, `svd_of(&adapter)?.truncate(rank)` is far cheaper.
///
/// # Errors
/// [`Error::Rank`](super::Error::Rank) if `rank` is 0 or above min(out, in), and those of [`svd`].
pub fn truncate<T: Real>(delta: ArrayView2<'_, T>, rank: usize) -> Result<Truncated<T>> {
    let (rows, cols) = delta.dim();
    check_rank(rank, Some(rows.min(cols)), (rows, cols))?;
    svd(delta)?.truncate(rank)
}

impl Svd {
    /// The nearest adapter of rank `rank`.
    ///
    /// # Errors
    /// [`Error::Rank`](super::Error::Rank) if `rank` is 0 or above k, [`Error::NonFinite`](super::Error::NonFinite) if a
    /// factor overflows `T`.
    pub fn truncate<T: Real>(&self, rank: usize) -> Result<Truncated<T>> {
        check_rank(rank, Some(self.sigma.len()), (self.u.nrows(), self.v.nrows()))?;
        // √σ on both sides keeps A and B equally large, as the factors of training are not.
        let (kept, dropped) = self.sigma.view().split_at(Axis(0), rank);
        let root = kept.mapv(f64::sqrt);
        let b = narrow(&(&self.u.slice(s![.., ..rank]) * &root));
        let at = &self.v.slice(s![.., ..rank]) * &root;
        let a = narrow(&widen(at.t()));
        // Smallest first, so that none is lost beside a larger one.
        let error = norm(dropped.iter().rev());
        Ok(Truncated { adapter: LowRank::new(a, b, 1.0)?, error })
    }

    /// How many singular values are not zero to the precision of the computation: σᵢ > max(m, n)·2⁻⁵²·σ₁.
    ///
    /// The directions beyond this are arbitrary.
    pub fn rank(&self) -> usize {
        let largest = self.sigma.first().copied().unwrap_or(0.0);
        let zero = self.u.nrows().max(self.v.nrows()) as f64 * f64::EPSILON * largest;
        self.sigma.iter().take_while(|s| **s > zero).count()
    }

    /// A pair (u, v) may be (−u, −v) as well; this chooses.
    pub(super) fn with_signs(mut self) -> Svd {
        for (mut u, mut v) in self.u.columns_mut().into_iter().zip(self.v.columns_mut()) {
            let largest = u.iter().fold(0.0_f64, |largest, &x| if x.abs() > largest.abs() { x } else { largest });
            if largest < 0.0 {
                u.mapv_inplace(|x| -x);
                v.mapv_inplace(|x| -x);
            }
        }
        self
    }
}
