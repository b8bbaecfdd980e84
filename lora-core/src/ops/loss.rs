use lora_kernels::{self as k, Acc, sum_rows};

use crate::{Result, Slot, Tape, Tensor, Var};

/// The language-model head and its loss: `scale`·Σᵢ CE(xᵢ·Wᵀ, targetsᵢ), with x [n, d] (only rows that have a target),
/// W [vocabulary, d], targets \[n\] of u32, and label smoothing ε as PyTorch's `cross_entropy` has it:
///
/// CE(z, t) = log Σⱼ e^{zⱼ} − (1 − ε)·z_t − ε·meanⱼ zⱼ
///
/// Logits exist for one chunk of rows at a time, and the gradient is made while they are there: [n, vocabulary] is never
/// held. `scale` is 1 / (number of targets of the whole optimiser step), so that micro-batches add up to its mean.
pub fn loss_head(t: &mut Tape, x: &Var, w: &Var, targets: &Tensor, smoothing: f64, scale: f64) -> Result<Var> {
    let (device, dtype, n) = (t.device(), x.value.dtype(), x.value.rows());
    assert_eq!(targets.len(), n, "one target per row");
    // Losses and gradients of parameters keep the digits that 16-bit activations do not have.
    let sums = dtype.accumulator();
    let mut losses = Tensor::empty(&device, sums, &[n, 1])?;
    let like = |v: &Var| {
        let dtype = |s| if matches!(s, Slot::Param(_)) { sums } else { dtype };
        v.slot.map(|s| Tensor::empty(&device, dtype(s), v.value.shape())).transpose()
    };
    let (mut dx, mut dw) = (like(x)?, like(w)?);
    let to = |g| Acc { to: g, beta: 0.0 };
    k::loss_head(
        x.value.mat(),
        w.value.t(),
        targets.mat(),
        smoothing,
        scale,
        losses.make_mut()?,
        dx.as_mut().map(Tensor::make_mut).transpose()?.map(to),
        dw.as_mut().map(Tensor::make_mut).transpose()?.map(to),
    )?;
    let mut loss = Tensor::empty(&device, sums, &[1])?;
    sum_rows(losses.mat(), Acc { to: loss.make_mut()?, beta: 0.0 })?;
    k::scale(scale, loss.make_mut()?)?;
    let slots = (x.slot, w.slot);
    Ok(t.record(loss, slots.0.is_some() || slots.1.is_some(), move |dy, g| {
        // The gradients are ready for ∂total/∂loss = 1, the usual case; any other factor scales them.
        for (slot, grad) in [(slots.0, dx), (slots.1, dw)] {
            let (Some(slot), Some(mut grad)) = (slot, grad) else { continue };
            k::scale_by(dy.mat(), grad.make_mut()?)?;
            g.pass(slot, grad)?;
        }
        Ok(())
    }))
}
