use lora_kernels::{Acc, Activation, Dropout, activation as kernel, activation_backward, axpby, dropout as mask};

use crate::{Result, Tape, Tensor, Var};

/// y = a + b: a residual connection. Writes onto whichever of the two nobody else holds.
pub fn add(t: &mut Tape, a: Var, b: Var) -> Result<Var> {
    assert_eq!(a.value.shape(), b.value.shape(), "add: one shape");
    let (a, b) = if b.value.is_unshared() { (b, a) } else { (a, b) };
    let Var { mut value, slot } = a;
    axpby(1.0, b.value.mat(), 1.0, value.make_mut()?)?;
    let (da, db) = (slot, b.slot);
    Ok(t.record(value, da.is_some() || db.is_some(), move |dy, g| match (da, db) {
        (Some(a), Some(b)) => {
            g.pass(a, dy.clone())?;
            g.pass(b, dy)
        }
        (Some(s), None) | (None, Some(s)) => g.pass(s, dy),
        (None, None) => Ok(()),
    }))
}

/// Inverted dropout, y = x·m/(1−p) with m Bernoulli(1−p); the identity outside of training and for p = 0.
/// Srivastava et al. 2014.
pub fn dropout(t: &mut Tape, x: Var, p: f64) -> Result<Var> {
    match t.dropout_mask(p) {
        Some(mask) => dropout_by(t, x, mask),
        None => Ok(x),
    }
}

/// [`dropout`] by a given mask.
pub fn dropout_by(t: &mut Tape, x: Var, d: Dropout) -> Result<Var> {
    let Var { value: x, slot } = x;
    let mut y = Tensor::empty(&t.device(), x.dtype(), x.shape())?;
    mask(&d, x.mat(), Acc { to: y.make_mut()?, beta: 0.0 })?;
    Ok(t.record(y, slot.is_some(), move |dy, g| {
        let Some(s) = slot else { return Ok(()) };
        g.add(s, dy.shape(), &dy, |dx| Ok(mask(&d, dy.mat(), dx)?))
    }))
}

/// y = f(x) elementwise.
pub fn activation(t: &mut Tape, kind: Activation, x: &Var) -> Result<Var> {
    let mut y = Tensor::empty(&t.device(), x.value.dtype(), x.value.shape())?;
    kernel(kind, x.value.mat(), y.make_mut()?)?;
    let dx = x.slot.map(|s| (s, x.value.clone()));
    Ok(t.record(y, dx.is_some(), move |dy, g| {
        let Some((s, x)) = dx else { return Ok(()) };
        g.add(s, x.shape(), &dy, |dx| Ok(activation_backward(kind, x.mat(), dy.mat(), dx)?))
    }))
}
