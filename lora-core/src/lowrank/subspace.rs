//! What an adapter has learnt: the measures of section 7.

use super::dense::{check_finite, norm, product, widen};
use super::{Error, Layout, LowRank, Real, Result, Svd, svd, svd_of};
use ndarray::{Array2, ArrayView2, s};

/// Which singular directions of a matrix to compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The left ones, in the space of the rows' index: for B [out, r], directions in the output.
    Left,
    /// The right ones, in the space of the columns' index: for A [r, in], directions in the input.
    Right,
}

/// How similar the leading singular directions of two matrices are (section 7.2, equation 4):
///
/// φ(i, j) = ‖Uᵢᵀ·Uⱼ'‖²_F / min(i, j) ∈ [0, 1]
///
/// where Uᵢ are the first i directions of `x` and Uⱼ' the first j of `y`: 1 if one span contains the other, 0 if
/// they are orthogonal. Element `[[i - 1, j - 1]]` is φ(i, j), for every i up to the rank of `x` and j up to that of
/// `y`: r × r' for factors of full rank, fewer where a factor has none to compare ([`Svd::rank`]). Where singular
/// values are equal, so that their order is arbitrary, φ is meaningful only for i and j that take all of them.
///
/// The paper compares `A` of two ranks or two seeds, by [`Side::Right`], and `B` by [`Side::Left`]. Costs the two
/// SVDs and O(d·r·r').
///
/// # Errors
/// [`Error::Shape`] if the directions lie in spaces of different dimension, [`Error::Zero`] if a matrix is zero,
/// and those of [`svd`].
pub fn subspace_similarity<T: Real>(x: ArrayView2<'_, T>, y: ArrayView2<'_, T>, side: Side) -> Result<Array2<f64>> {
    let (fits, rule) = match side {
        Side::Left => (x.nrows() == y.nrows(), "left directions need the same number of rows"),
        Side::Right => (x.ncols() == y.ncols(), "right directions need the same number of columns"),
    };
    if !fits {
        let [left_shape, right_shape] = [x.dim().into(), y.dim().into()];
        return Err(Error::Shape { left: "one matrix", left_shape, right: "the other", right_shape, rule });
    }
    let (ux, uy) = (directions("one matrix", svd(x)?, side)?, directions("the other matrix", svd(y)?, side)?);

    let mut phi = product(1.0, widen(ux.t()).view(), uy.view());
    let (rows, cols) = phi.dim();
    // ‖·‖²_F of every leading block at once: sums along the rows, then along the columns …
    phi.mapv_inplace(|x| x * x);
    for i in 0..rows {
        let mut sum = 0.0;
        for j in 0..cols {
            sum += phi[[i, j]];
            phi[[i, j]] = sum + if i > 0 { phi[[i - 1, j]] } else { 0.0 };
        }
    }
    // … each over its min(i, j), which it can pass only by rounding.
    Ok(Array2::from_shape_fn((rows, cols), |(i, j)| (phi[[i, j]] / (i.min(j) + 1) as f64).min(1.0)))
}

/// What [`amplification`] measures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Amplification {
    /// ‖ΔW‖_F.
    pub delta_norm: f64,
    /// ‖Uᵀ·W₀·V‖_F: how much of W₀ lies in the directions of ΔW.
    pub projected_norm: f64,
}

impl Amplification {
    /// ‖ΔW‖_F / ‖Uᵀ·W₀·V‖_F, infinite if W₀ has nothing at all in the directions of ΔW.
    pub fn factor(&self) -> f64 {
        self.delta_norm / self.projected_norm
    }
}

/// How strongly ΔW = s·B·A amplifies directions that W₀ has already (section 7.3, table 7):
/// ‖ΔW‖_F / ‖Uᵀ·W₀·V‖_F, with the left and right singular directions U [out, r] and V [in, r] of ΔW.
///
/// (The paper writes Vᵀ because its V holds directions as rows.) Only directions with a singular value above zero
/// count ([`Svd::rank`]). Takes O(out·in·r).
///
/// # Errors
/// [`Error::Shape`] if ΔW does not have W₀'s shape, [`Error::NonFinite`] if W₀ holds NaN or an infinity,
/// [`Error::Zero`] if ΔW is zero, [`Error::Svd`] if f64 overflows.
pub fn amplification<T: Real>(w0: ArrayView2<'_, T>, adapter: &LowRank<T>, layout: Layout) -> Result<Amplification> {
    layout.check(w0, adapter)?;
    check_finite("W₀", w0)?;
    let svd = svd_of(adapter)?;
    let delta_norm = norm(&svd.sigma);
    let u = directions("ΔW", svd.clone(), Side::Left)?;
    let v = directions("ΔW", svd, Side::Right)?;
    let (rows, cols) = match layout {
        Layout::OutIn => (u, v),
        Layout::InOut => (v, u),
    };
    let right = product(1.0, widen(w0).view(), cols.view());
    let projected = product(1.0, widen(rows.t()).view(), right.view());
    Ok(Amplification { delta_norm, projected_norm: norm(&projected) })
}

/// The directions of one side that belong to a singular value above zero, as the columns of a row-major array.
fn directions(what: &'static str, svd: Svd, side: Side) -> Result<Array2<f64>> {
    let rank = svd.rank();
    if rank == 0 {
        return Err(Error::Zero { what });
    }
    let all = match side {
        Side::Left => svd.u,
        Side::Right => svd.v,
    };
    Ok(all.slice(s![.., ..rank]).as_standard_layout().into_owned())
}
