use lora_kernels::{self as k, Acc};

use crate::{Result, Tape, Tensor, Var};

/// y = x·diag(g): every row of x [n, d] by the same numbers g, of any shape with d elements; y [n, d].
///
/// Backward: dx = dy·diag(g), dg_j = Σᵢ dy_ij·x_ij, each only where something trainable lies; with a constant g, x is not
/// even kept.
///
/// # Panics
/// When g does not have as many elements as x has columns.
pub fn scale_columns(t: &mut Tape, x: &Var, g: &Var) -> Result<Var> {
    let d = x.value.cols();
    assert_eq!(g.value.len(), d, "scale_columns: {:?} for {d} columns", g.value.shape());
    let row = g.value.clone().reshape(&[1, d]);
    let mut y = Tensor::empty(&t.device(), x.value.dtype(), x.value.shape())?;
    k::scale_columns(x.value.mat(), row.mat(), Acc { to: y.make_mut()?, beta: 0.0 })?;
    let dx = x.slot.map(|s| (s, x.value.shape().to_vec(), row));
    let dg = g.slot.map(|s| (s, g.value.shape().to_vec(), x.value.clone()));
    Ok(t.record(y, dx.is_some() || dg.is_some(), move |dy, grads| {
        if let Some((s, shape, x)) = dg {
            grads.add(s, &shape, &dy, |dg| {
                Ok(k::dot_columns(dy.mat(), x.mat(), Acc { to: dg.to.reshape(1, d), beta: dg.beta })?)
            })?;
        }
        if let Some((s, shape, g)) = dx {
            grads.add(s, &shape, &dy, |dx| Ok(k::scale_columns(dy.mat(), g.mat(), dx)?))?;
        }
        Ok(())
    }))
}
