//! The bridge between `ndarray` and `faer`: f64, row-major, one thread.

use super::{Error, Result};
use faer::{Accum, MatRef, Par};
use ndarray::{Array1, Array2, ArrayView2};

/// The number types a weight can have: `f32` and `f64`.
pub trait Real: sealed::Sealed + Copy + Into<f64> + std::fmt::Debug + 'static {
    /// The nearest value of this type; overflow goes to infinity.
    fn round(x: f64) -> Self;
}

impl Real for f32 {
    fn round(x: f64) -> f32 {
        x as f32
    }
}

impl Real for f64 {
    fn round(x: f64) -> f64 {
        x
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// `m` in f64 and row-major, whatever its strides were.
pub(super) fn widen<T: Real>(m: ArrayView2<'_, T>) -> Array2<f64> {
    let mut wide = Array2::zeros(m.dim());
    wide.zip_mut_with(&m, |w, &x| *w = x.into());
    wide
}

/// `m` in `T`, each element rounded once.
pub(super) fn narrow<T: Real>(m: &Array2<f64>) -> Array2<T> {
    m.mapv(T::round)
}

pub(super) fn check_finite<T: Real>(what: &'static str, m: ArrayView2<'_, T>) -> Result<()> {
    match m.indexed_iter().map(|(at, &x)| (at, x.into())).find(|(_, x): &(_, f64)| !x.is_finite()) {
        Some(((row, col), value)) => Err(Error::NonFinite { what, row, col, value }),
        None => Ok(()),
    }
}

/// α·x·y for row-major x and y: [m, k]·[k, n] → [m, n].
pub(super) fn product(alpha: f64, x: ArrayView2<'_, f64>, y: ArrayView2<'_, f64>) -> Array2<f64> {
    let (m, n) = (x.nrows(), y.ncols());
    let mut xy = vec![0.0; m * n];
    let into = faer::MatMut::from_row_major_slice_mut(&mut xy, m, n);
    faer::linalg::matmul::matmul(into, Accum::Replace, lend(&x), lend(&y), alpha, Par::Seq);
    Array2::from_shape_vec((m, n), xy).expect("m·n elements")
}

/// √Σ x²: ‖m‖_F of a matrix's elements, or of its singular values.
pub(super) fn norm<'a>(x: impl IntoIterator<Item = &'a f64>) -> f64 {
    x.into_iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// m = U·diag(σ)·Vᵀ, thin: U [m, k], σ descending [k], V [n, k] with k = min(m, n). The signs are faer's.
pub(super) fn thin_svd(m: ArrayView2<'_, f64>) -> Result<(Array2<f64>, Array1<f64>, Array2<f64>)> {
    let (rows, cols) = m.dim();
    if rows.min(cols) == 0 {
        return Ok((Array2::zeros((rows, 0)), Array1::zeros(0), Array2::zeros((cols, 0))));
    }
    let svd = lend(&m).thin_svd().map_err(|_| Error::Svd { rows, cols })?;
    Ok((own(svd.U()), svd.S().column_vector().iter().copied().collect(), own(svd.V())))
}

/// m = Q·R, thin: Q [m, k] with orthonormal columns, R [k, n] upper triangular, k = min(m, n).
pub(super) fn thin_qr(m: ArrayView2<'_, f64>) -> (Array2<f64>, Array2<f64>) {
    let qr = lend(&m).qr();
    (own(qr.compute_thin_Q().as_ref()), own(qr.thin_R()))
}

fn lend<'a>(m: &'a ArrayView2<'_, f64>) -> MatRef<'a, f64> {
    MatRef::from_row_major_slice(m.as_slice().expect("row-major"), m.nrows(), m.ncols())
}

fn own(m: MatRef<'_, f64>) -> Array2<f64> {
    Array2::from_shape_fn((m.nrows(), m.ncols()), |(i, j)| m[(i, j)])
}
