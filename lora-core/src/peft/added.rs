use std::ops::Range;

use ndarray::{Array2, Axis};

use super::LinearSite;
use crate::{Params, Result, Tensor, lowrank};

/// Rows of an update that are held in f64 at once.
const BLOCK: usize = 64;

/// W₀ + ΔW for a ΔW [out, in] of which `rows` makes some rows: summed in f64, rounded once, in the layout of W₀.
///
/// # Errors
/// [`lowrank::Error::NonFinite`].
pub(super) fn added(
    params: &Params,
    w: &Tensor,
    linear: &LinearSite,
    rows: impl Fn(Range<usize>) -> Array2<f64>,
) -> Result<Tensor> {
    let mut merged = w.to_array()?;
    let outputs = match linear.layout {
        lowrank::Layout::OutIn => Axis(0),
        lowrank::Layout::InOut => Axis(1),
    };
    for from in (0..linear.outputs).step_by(BLOCK) {
        let block = from..linear.outputs.min(from + BLOCK);
        let delta = rows(block.clone());
        let delta = if outputs == Axis(0) { delta.view() } else { delta.t() };
        merged.slice_axis_mut(outputs, block.into()).zip_mut_with(&delta, |w, d| *w = (f64::from(*w) + d) as f32);
    }
    if let Some(((row, col), v)) = merged.indexed_iter().find(|(_, v)| !v.is_finite()) {
        return Err(lowrank::Error::NonFinite { what: "the merged weight", row, col, value: f64::from(*v) }.into());
    }
    let values: Vec<f32> = merged.into_iter().collect();
    Tensor::from_slice(&params.device(), w.shape(), &values)
}
