use lora_kernels::{self as k, Acc};

use crate::{Result, Tape, Tensor, Var, tape::Open};

/// y = γ·(x − mean)/√(var + ε) + β over each row of x [n, d], with the biased variance, γ \[d\] and β \[d\]. Ba et al. 2016.
///
/// Backward, with x̂ = (x − mean)/√(var + ε) and u = γ∘dy: dx = (u − mean(u) − x̂·mean(u∘x̂))/√(var + ε), dγ = Σᵢ dyᵢ∘x̂ᵢ,
/// dβ = Σᵢ dyᵢ.
///
/// # Panics
/// When the shapes do not fit.
pub fn layer_norm(t: &mut Tape, x: &Var, gamma: &Var, beta: &Var, eps: f64) -> Result<Var> {
    let (device, dtype) = (t.device(), x.value.dtype());
    let mut y = Tensor::empty(&device, dtype, x.value.shape())?;
    let mut stats = Tensor::empty(&device, dtype.accumulator(), &[x.value.rows(), 2])?;
    k::layer_norm(x.value.mat(), gamma.value.mat(), beta.value.mat(), eps, y.make_mut()?, stats.make_mut()?)?;
    let slots = (x.slot, gamma.slot, beta.slot);
    // β alone needs neither x nor the statistics, but a trainable β without a trainable γ is too rare to save for.
    let saved = (x.value.clone(), stats, gamma.value.clone());
    let tracked = slots.0.is_some() || slots.1.is_some() || slots.2.is_some();
    Ok(t.record(y, tracked, move |dy, g| {
        let (x, stats, gamma) = saved;
        let mut dx = slots.0.map(|s| g.open(s, x.shape(), &dy)).transpose()?;
        let mut dgamma = slots.1.map(|s| g.open(s, gamma.shape(), &dy)).transpose()?;
        let mut dbeta = slots.2.map(|s| g.open(s, gamma.shape(), &dy)).transpose()?;
        k::layer_norm_backward(
            x.mat(),
            gamma.mat(),
            stats.mat(),
            dy.mat(),
            dx.as_mut().map(Open::acc).transpose()?,
            dgamma.as_mut().map(Open::acc).transpose()?,
            dbeta.as_mut().map(Open::acc).transpose()?,
        )?;
        for open in [dx, dgamma, dbeta].into_iter().flatten() {
            g.close(open)?;
        }
        Ok(())
    }))
}

/// y = γ·x/√(mean(x²) + ε) over each row, or over each head of it: x [rows, heads·n], γ \[n\]. Zhang and Sennrich 2019.
///
/// # Panics
/// When the columns of x are not some times those of γ.
pub fn rms_norm(t: &mut Tape, x: &Var, gamma: &Var, eps: f64) -> Result<Var> {
    let (device, dtype, n) = (t.device(), x.value.dtype(), gamma.value.cols());
    assert!(x.value.cols().is_multiple_of(n), "rms_norm: {} columns in heads of {n}", x.value.cols());
    let rows = x.value.len() / n;
    let by_head = x.value.clone().reshape(&[rows, n]);
    let mut y = Tensor::empty(&device, dtype, x.value.shape())?;
    let mut stats = Tensor::empty(&device, dtype.accumulator(), &[rows, 1])?;
    k::rms_norm(by_head.mat(), gamma.value.mat(), eps, y.make_mut()?.reshape(rows, n), stats.make_mut()?)?;
    let slots = (x.slot, gamma.slot);
    let saved = (x.value.shape().to_vec(), by_head, stats, gamma.value.clone());
    Ok(t.record(y, slots.0.is_some() || slots.1.is_some(), move |dy, g| {
        let (shape, x, stats, gamma) = saved;
        let mut dx = slots.0.map(|s| g.open(s, &shape, &dy)).transpose()?;
        let mut dgamma = slots.1.map(|s| g.open(s, gamma.shape(), &dy)).transpose()?;
        k::rms_norm_backward(
            x.mat(),
            gamma.mat(),
            stats.mat(),
            dy.reshape(&[rows, n]).mat(),
            dx.as_mut().map(Open::acc).transpose()?.map(|dx| Acc { to: dx.to.reshape(rows, n), beta: dx.beta }),
            dgamma.as_mut().map(Open::acc).transpose()?,
        )?;
        for open in [dx, dgamma].into_iter().flatten() {
            g.close(open)?;
        }
        Ok(())
    }))
}
