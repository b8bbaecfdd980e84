//! W = W₀ + s·B·A, without ever writing W₀.

use super::dense::{product, widen};
use super::{Error, LowRank, Real, Result};
use ndarray::{Array2, ArrayView2, s};

/// Rows of ΔW that are held in f64 at once: 64 rows of 768 are 384 KiB, which stay in the cache.
const BLOCK: usize = 64;

/// How a weight lies in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// [out, in], as a `Linear` has it: y = x·Wᵀ.
    OutIn,
    /// [in, out], as GPT-2's `Conv1D` has it: y = x·W. The adapter's A and B are not transposed, ΔW is.
    InOut,
}

impl Layout {
    /// The shape that a weight of `out` outputs and `cols` inputs has in this layout.
    pub(super) fn shape(self, (out, cols): (usize, usize)) -> [usize; 2] {
        match self {
            Layout::OutIn => [out, cols],
            Layout::InOut => [cols, out],
        }
    }

    pub(super) fn check<T: Real>(self, w0: ArrayView2<'_, T>, adapter: &LowRank<T>) -> Result<()> {
        let (w0, delta) = (w0.dim().into(), self.shape(adapter.dim()));
        if w0 == delta {
            return Ok(());
        }
        Err(Error::Shape {
            left: "W₀",
            left_shape: w0,
            right: "ΔW in W₀'s layout",
            right_shape: delta,
            rule: "they are added, so they have one shape (is W₀ stored [out, in] or [in, out]?)",
        })
    }
}

/// A merged weight W = W₀ + s·B·A beside the W₀ it was made from.
///
/// W₀ is borrowed, so nothing can write it while this lives: merging makes a new array, unmerging drops it, and a
/// thousand merges leave every bit of W₀ as it was. Subtracting ΔW again could not promise that.
#[derive(Debug)]
pub struct Merged<'a, T> {
    base: ArrayView2<'a, T>,
    weight: Array2<T>,
}

impl<'a, T> Merged<'a, T> {
    /// W, in W₀'s layout.
    pub fn weight(&self) -> ArrayView2<'_, T> {
        self.weight.view()
    }

    /// W, for those who no longer need W₀.
    pub fn into_weight(self) -> Array2<T> {
        self.weight
    }

    /// Drops W and gives back the very W₀ that was merged.
    pub fn unmerge(self) -> ArrayView2<'a, T> {
        self.base
    }
}

/// W = W₀ + s·B·A for a W₀ stored [out, in], W₀ + s·(B·A)ᵀ for one stored [in, out] (section 4.1).
///
/// Takes O(out·r·in) time and, beyond W, scratch memory of one block of rows. Product and sum are made in f64 and
/// rounded once, so W is off by at most half a unit in its last place and, from f64 itself, (r + 2)·2⁻⁵² of
/// |W₀| + |s|·|B|·|A|: an f32 weight is the f32 nearest to the exact sum, all but always.
///
/// # Errors
/// [`Error::Shape`] if ΔW does not have W₀'s shape, [`Error::NonFinite`] if W₀ holds NaN or an infinity or the sum
/// overflows.
pub fn merge<'a, T: Real>(w0: ArrayView2<'a, T>, adapter: &LowRank<T>, layout: Layout) -> Result<Merged<'a, T>> {
    layout.check(w0, adapter)?;
    let (left, right) = match layout {
        Layout::OutIn => (widen(adapter.b()), widen(adapter.a())),
        Layout::InOut => (widen(adapter.a().t()), widen(adapter.b().t())),
    };
    let mut weight = Vec::with_capacity(w0.len());
    for start in (0..w0.nrows()).step_by(BLOCK) {
        let rows = s![start..w0.nrows().min(start + BLOCK), ..];
        let delta = product(adapter.scale(), left.slice(rows), right.view());
        for (i, (w0, delta)) in w0.slice(rows).outer_iter().zip(delta.outer_iter()).enumerate() {
            let row = weight.len();
            weight.extend(w0.iter().zip(delta).map(|(&w, d)| T::round(w.into() + d)));
            check_row(start + i, w0.iter().copied(), &weight[row..])?;
        }
    }
    let weight = Array2::from_shape_vec(w0.dim(), weight).expect("one element for each of W₀");
    Ok(Merged { base: w0, weight })
}

/// NaN and infinities of W₀ survive the sum, so looking at W alone finds both them and an overflow.
fn check_row<T: Real>(row: usize, w0: impl Iterator<Item = T>, w: &[T]) -> Result<()> {
    // A fold without early exit, which vectorises: this runs over every weight of a model.
    if w.iter().fold(true, |ok, &w| ok & w.into().is_finite()) {
        return Ok(());
    }
    let bad = w0.zip(w).enumerate().find(|(_, (_, w))| !(**w).into().is_finite());
    let (col, (w0, w)) = bad.expect("the fold saw one");
    let (what, value) = match w0.into() {
        w0 if w0.is_finite() => ("W₀ + ΔW", (*w).into()),
        w0 => ("W₀", w0),
    };
    Err(Error::NonFinite { what, row, col, value })
}
