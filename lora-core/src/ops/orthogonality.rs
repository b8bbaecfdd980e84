use lora_kernels::{axpby, fill, gemm, reciprocal_norms, scale, scale_by};

use crate::{Result, Tape, Tensor, Var};

/// `c`·‖M‖ with M = X·Xᵀ − I, or with `columns` M = Xᵀ·X − I: how far the rows (the columns) of X are from orthonormal.
/// `identity` is I. ‖·‖ is Frobenius' norm, y \[1\]. Zhang et al. 2023 ("AdaLoRA"), equation 4, without its square, as in the
/// authors' code and PEFT.
///
/// Backward: dX = dy·2c·M·X/‖M‖, or dy·2c·X·M/‖M‖.
///
/// # Panics
/// When I does not have the shape of M; on a CUDA device when X is of 16 bits.
pub fn orthogonality(t: &mut Tape, x: &Var, identity: &Tensor, columns: bool, c: f64) -> Result<Var> {
    let (device, dtype) = (t.device(), x.value.dtype());
    let (r, rows) = (identity.rows(), x.value.mat().t_if(columns));
    let mut m = Tensor::empty(&device, dtype, &[r, r])?;
    gemm(1.0, rows, rows.t(), 0.0, m.make_mut()?)?;
    axpby(-1.0, identity.mat(), 1.0, m.make_mut()?)?;
    // The norm is ‖M‖²·(1/‖M‖), of which the second is needed for the gradient too.
    let m = m.reshape(&[1, r * r]);
    let scalar = || Tensor::empty(&device, dtype, &[1, 1]);
    let (mut zero, mut inverse, mut y) = (scalar()?, scalar()?, scalar()?);
    fill(0.0, zero.make_mut()?)?;
    reciprocal_norms(zero.mat(), m.mat(), m.mat(), inverse.make_mut()?)?;
    gemm(c, m.mat(), m.t(), 0.0, y.make_mut()?)?;
    scale_by(inverse.mat(), y.make_mut()?)?;
    let dx = x.slot.map(|s| (s, x.value.clone(), m));
    Ok(t.record(y.reshape(&[1]), dx.is_some(), move |dy, g| {
        let Some((s, x, mut m)) = dx else { return Ok(()) };
        scale_by(inverse.mat(), m.make_mut()?)?;
        scale_by(dy.reshape(&[1, 1]).mat(), m.make_mut()?)?;
        scale(2.0 * c, m.make_mut()?)?;
        let m = m.reshape(&[r, r]);
        g.add(s, x.shape(), &x, |dx| {
            let (a, b) = if columns { (x.mat(), m.mat()) } else { (m.mat(), x.mat()) };
            Ok(gemm(1.0, a, b, dx.beta, dx.to)?)
        })
    }))
}
