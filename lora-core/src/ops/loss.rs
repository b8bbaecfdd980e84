use lora_kernels::{self as k, Acc, MatMut, axpby, gemm, sum_rows};

use crate::{Result, Slot, Tape, Tensor, Var};

/// The head of a model and its loss: `scale`·Σᵢ CE(xᵢ·Wᵀ + b, targetsᵢ), with x [n, d] (only rows that have a target),
/// W [classes, d], b \[classes\], targets \[n\] of u32, and label smoothing ε as PyTorch's `cross_entropy` has it:
///
/// CE(z, t) = log Σⱼ e^{zⱼ} − (1 − ε)·z_t − ε·meanⱼ zⱼ
///
/// Classes are the vocabulary of a language model, or labels. Logits exist for one chunk of rows at a time, and the
/// gradient is made while they are there: [n, classes] is never held. `scale` is 1 / (number of targets of the whole
/// optimiser step), so that micro-batches add up to its mean.
///
/// # Panics
/// When the shapes do not fit.
pub fn loss_head(
    t: &mut Tape,
    x: &Var,
    w: &Var,
    bias: Option<&Var>,
    targets: &Tensor,
    smoothing: f64,
    scale: f64,
) -> Result<Var> {
    loss_head_beside(t, x, w, bias, &[], targets, smoothing, scale)
}

/// A product that adds to the logits of a head: factor·x·Wᵀ, with x [n, d] and W [classes, d] of a d of its own.
#[derive(Debug)]
pub struct BesideHead {
    /// The factor.
    pub factor: f64,
    /// x.
    pub x: Var,
    /// W.
    pub w: Var,
}

/// [`loss_head`] of logits that `more` adds to: x·Wᵀ + b + Σ cᵢ·xᵢ·Wᵢᵀ.
///
/// # Panics
/// When the shapes do not fit.
#[allow(clippy::too_many_arguments)]
pub fn loss_head_beside(
    t: &mut Tape,
    x: &Var,
    w: &Var,
    bias: Option<&Var>,
    more: &[BesideHead],
    targets: &Tensor,
    smoothing: f64,
    scale: f64,
) -> Result<Var> {
    let (device, dtype, n) = (t.device(), x.value.dtype(), x.value.rows());
    assert_eq!(targets.len(), n, "one target per row");
    // Losses and gradients of parameters keep the digits that 16-bit activations do not have.
    let sums = dtype.accumulator();
    let mut losses = Tensor::empty(&device, sums, &[n, 1])?;
    let like = |v: &Var| {
        let dtype = |s| if matches!(s, Slot::Param(_)) { sums } else { dtype };
        v.slot.map(|s| Tensor::empty(&device, dtype(s), v.value.shape())).transpose()
    };
    let all: Vec<(f64, &Var, &Var)> =
        [(1.0, x, w)].into_iter().chain(more.iter().map(|m| (m.factor, &m.x, &m.w))).collect();
    let gradients = all.iter().map(|(_, x, w)| Ok([like(x)?, like(w)?])).collect::<Result<Vec<_>>>();
    let (mut gradients, mut db) = (gradients?, bias.map_or(Ok(None), like)?);
    let mut terms = Vec::new();
    for ((factor, x, w), [dx, dw]) in all.iter().zip(&mut gradients) {
        let [dx, dw] = [dx, dw].map(|d| d.as_mut().map(Tensor::make_mut).transpose());
        let (dx, dw) = (dx?.map(first), dw?.map(first));
        terms.push(k::HeadTerm { factor: *factor, x: x.value.mat(), w: w.value.t(), dx, dw });
    }
    let (b, to_b) = (bias.map(|b| b.value.mat()), db.as_mut().map(Tensor::make_mut).transpose()?.map(first));
    k::loss_head_of(terms, b, targets.mat(), smoothing, scale, losses.make_mut()?, to_b)?;
    let mut loss = Tensor::empty(&device, sums, &[1])?;
    sum_rows(losses.mat(), Acc { to: loss.make_mut()?, beta: 0.0 })?;
    k::scale(scale, loss.make_mut()?)?;
    let slots: Vec<_> = all.iter().flat_map(|(_, x, w)| [x.slot, w.slot]).chain([bias.and_then(|b| b.slot)]).collect();
    let gradients: Vec<_> = gradients.into_iter().flatten().chain([db]).collect();
    Ok(t.record(loss, slots.iter().any(Option::is_some), move |dy, g| {
        // The gradients are ready for ∂total/∂loss = 1, the usual case; any other factor scales them.
        for (slot, grad) in slots.into_iter().zip(gradients) {
            let (Some(slot), Some(mut grad)) = (slot, grad) else { continue };
            k::scale_by(dy.mat(), grad.make_mut()?)?;
            g.pass(slot, grad)?;
        }
        Ok(())
    }))
}

/// A gradient that nobody has written.
fn first(to: MatMut) -> Acc {
    Acc { to, beta: 0.0 }
}

/// The loss of a regression: `scale`·Σᵢ (xᵢ − yᵢ)², with as many targets y of a floating-point type as x has elements.
/// With `scale` = 1 / (number of targets of the whole optimiser step) it is PyTorch's `mse_loss`.
///
/// Backward: dx = 2·`scale`·(x − y). The differences are taken in the [accumulator](lora_kernels::DType::accumulator) of x's
/// type.
///
/// # Panics
/// When there are not as many targets as elements.
pub fn squared_error(t: &mut Tape, x: &Var, targets: &Tensor, scale: f64) -> Result<Var> {
    let (device, sums, n) = (t.device(), x.value.dtype().accumulator(), x.value.len());
    assert_eq!(targets.len(), n, "squared_error: one target per element");
    let targets = targets.to_dtype(sums)?.reshape(x.value.shape());
    let mut difference = Tensor::empty(&device, sums, x.value.shape())?;
    axpby(1.0, x.value.mat(), 0.0, difference.make_mut()?)?;
    axpby(-1.0, targets.mat(), 1.0, difference.make_mut()?)?;
    let row = difference.reshape(&[1, n]);
    let mut loss = Tensor::empty(&device, sums, &[1])?;
    gemm(scale, row.mat(), row.t(), 0.0, loss.make_mut()?)?;
    let dx = x.slot.map(|s| (s, row.reshape(x.value.shape()), x.value.dtype()));
    Ok(t.record(loss, dx.is_some(), move |dy, g| {
        let Some((slot, difference, dtype)) = dx else { return Ok(()) };
        let mut dx = Tensor::empty(&dy.device(), dtype, difference.shape())?;
        axpby(2.0 * scale, difference.mat(), 0.0, dx.make_mut()?)?;
        k::scale_by(dy.mat(), dx.make_mut()?)?;
        g.pass(slot, dx)
    }))
}
