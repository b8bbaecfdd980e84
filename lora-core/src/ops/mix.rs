use lora_kernels as k;

use crate::{Result, Tape, Tensor, Var, tape::Open};

/// Attention of each row over a few candidates of its own: q [n, d], z [C·n, d] with the rows of candidate 0 first, so
/// that z_ci is row c·n + i, and y [n, d]:
///
/// s_ic = q_i·z_ci,  p_i = softmax(s_i),  y_i = Σ_c p_ic·z_ci
///
/// Pfeiffer et al. 2021 (AdapterFusion), section 3.2, after the projections.
///
/// Backward: dq and dz, each only where something trainable lies; q, z and p are kept.
///
/// # Panics
/// When z does not have some times the rows of q, or other columns.
pub fn mix(t: &mut Tape, q: &Var, z: &Var) -> Result<Var> {
    let (device, dtype, n) = (t.device(), q.value.dtype(), q.value.rows());
    // Without rows there is nothing to tell how many candidates each has.
    let many = z.value.rows().checked_div(n).unwrap_or(1);
    let mut y = Tensor::empty(&device, dtype, q.value.shape())?;
    let mut p = Tensor::empty(&device, dtype.accumulator(), &[n, many])?;
    k::mix(q.value.mat(), z.value.mat(), p.make_mut()?, y.make_mut()?)?;
    let slots = (q.slot, z.slot);
    let saved = (q.value.clone(), z.value.clone(), p);
    Ok(t.record(y, slots.0.is_some() || slots.1.is_some(), move |dy, g| {
        let (q, z, p) = saved;
        let mut dq = slots.0.map(|s| g.open(s, q.shape(), &dy)).transpose()?;
        let mut dz = slots.1.map(|s| g.open(s, z.shape(), &dy)).transpose()?;
        let (to_q, to_z) = (dq.as_mut().map(Open::acc).transpose()?, dz.as_mut().map(Open::acc).transpose()?);
        k::mix_backward(q.mat(), z.mat(), p.mat(), dy.mat(), to_q, to_z)?;
        [dq, dz].into_iter().flatten().try_for_each(|open| g.close(open))
    }))
}
