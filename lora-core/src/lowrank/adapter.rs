//! An adapter's two factors and its scale.

use super::dense::{check_finite, narrow, product, widen};
use super::{Error, Real, Result};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis};

/// Rows of x that [`LowRank::apply`] holds in f64 at once.
const BLOCK: usize = 64;

/// How α and the rank r make the scale s of s·B·A.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scaling {
    /// s = α/r (section 4.1).
    #[default]
    Lora,
    /// s = α/√r, which keeps the size of the update's gradients independent of r
    /// (rsLoRA; Kalajdzievski 2023, [arXiv:2312.03732](https://arxiv.org/abs/2312.03732)).
    RsLora,
}

impl Scaling {
    /// The scale s of an adapter of this α and rank.
    ///
    /// # Errors
    /// [`Error::Alpha`] if `alpha` is NaN or infinite, or `rank` is 0.
    pub fn scale(self, alpha: f64, rank: usize) -> Result<f64> {
        let scale = match self {
            Scaling::Lora => alpha / rank as f64,
            Scaling::RsLora => alpha / (rank as f64).sqrt(),
        };
        if !scale.is_finite() {
            return Err(Error::Alpha { alpha, rank });
        }
        Ok(scale)
    }
}

/// A low-rank update ΔW = s·B·A of a weight W₀ [out, in] (equation 3): A is [r, in], B is [out, r].
///
/// Holds only what the mathematics can use: shapes that fit, r ≥ 1, finite numbers. r may be above min(out, in), the rank that
/// ΔW itself can have.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank<T> {
    a: Array2<T>,
    b: Array2<T>,
    scale: f64,
}

impl<T: Real> LowRank<T> {
    /// The update `scale`·`b`·`a` of A [r, in] and B [out, r].
    ///
    /// # Errors
    /// [`Error::Shape`] if A and B disagree on r, [`Error::Rank`] if r is 0 or ΔW holds nothing, [`Error::NonFinite`] or
    /// [`Error::Scale`] for a NaN or an infinity in A, B or the scale.
    pub fn new(a: Array2<T>, b: Array2<T>, scale: f64) -> Result<Self> {
        let (rank, cols) = a.dim();
        let rows = b.nrows();
        if b.ncols() != rank {
            return Err(Error::Shape {
                left: "A",
                left_shape: [rank, cols],
                right: "B",
                right_shape: [rows, b.ncols()],
                rule: "A is [r, in] and B is [out, r], with one rank r",
            });
        }
        check_rank(rank, (rows.min(cols) == 0).then_some(0), (rows, cols))?;
        if !scale.is_finite() {
            return Err(Error::Scale { scale });
        }
        check_finite("A", a.view())?;
        check_finite("B", b.view())?;
        Ok(LowRank { a, b, scale })
    }

    /// As [`new`](LowRank::new), with the scale that `scaling` makes of `alpha` and r.
    ///
    /// # Errors
    /// Those of [`new`](LowRank::new) and [`Scaling::scale`].
    pub fn with_alpha(a: Array2<T>, b: Array2<T>, alpha: f64, scaling: Scaling) -> Result<Self> {
        let scale = scaling.scale(alpha, a.nrows())?;
        LowRank::new(a, b, scale)
    }

    /// A, [r, in]: what the update reads of its input.
    pub fn a(&self) -> ArrayView2<'_, T> {
        self.a.view()
    }

    /// B, [out, r]: where it writes in the output.
    pub fn b(&self) -> ArrayView2<'_, T> {
        self.b.view()
    }

    /// s.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// r, the number of rows of A and columns of B; ΔW's own rank is at most this.
    pub fn rank(&self) -> usize {
        self.a.nrows()
    }

    /// The shape of ΔW, `(out, in)`.
    pub fn dim(&self) -> (usize, usize) {
        (self.b.nrows(), self.a.ncols())
    }

    /// A, B and s.
    pub fn into_parts(self) -> (Array2<T>, Array2<T>, f64) {
        (self.a, self.b, self.scale)
    }

    /// ΔW = s·B·A, [out, in], in O(out·r·in).
    ///
    /// Elements beyond the range of `T` become infinite.
    pub fn delta(&self) -> Array2<T> {
        narrow(&product(self.scale, widen(self.b()).view(), widen(self.a()).view()))
    }

    /// y += s·(x·Aᵀ)·Bᵀ for x [n, in] and y [n, out]: the adapter beside its layer, in O(n·r·(in + out)).
    ///
    /// NaN and infinities in x or y go the way of IEEE arithmetic.
    ///
    /// # Errors
    /// [`Error::Shape`] if x or y does not fit; y is untouched then.
    pub fn apply(&self, x: ArrayView2<'_, T>, mut y: ArrayViewMut2<'_, T>) -> Result<()> {
        let (out, cols) = self.dim();
        let [x_shape, y_shape] = [x.dim().into(), y.dim().into()];
        if x.ncols() != cols {
            return Err(Error::Shape {
                left: "x",
                left_shape: x_shape,
                right: "A",
                right_shape: self.a.dim().into(),
                rule: "x is [n, in] and A is [r, in]",
            });
        }
        if y_shape != [x.nrows(), out] {
            return Err(Error::Shape {
                left: "y",
                left_shape: y_shape,
                right: "x·Aᵀ·Bᵀ",
                right_shape: [x.nrows(), out],
                rule: "y takes the sum, so both are [n, out]",
            });
        }
        let (at, bt) = (widen(self.a.t()), widen(self.b.t()));
        for (x, mut y) in x.axis_chunks_iter(Axis(0), BLOCK).zip(y.axis_chunks_iter_mut(Axis(0), BLOCK)) {
            let u = product(1.0, widen(x).view(), at.view());
            let dy = product(self.scale, u.view(), bt.view());
            y.zip_mut_with(&dy, |y, dy| *y = T::round((*y).into() + dy));
        }
        Ok(())
    }
}

/// Refuses rank 0 and those above `most`, where there is a highest one, for a ΔW of shape `dim`.
pub(super) fn check_rank(rank: usize, most: Option<usize>, dim: (usize, usize)) -> Result<()> {
    if rank == 0 || most.is_some_and(|most| rank > most) {
        return Err(Error::Rank { rank, most, shape: dim.into() });
    }
    Ok(())
}
