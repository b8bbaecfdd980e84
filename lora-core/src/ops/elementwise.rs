use lora_kernels::{
    self as k, Acc, Activation, Dropout, activation as kernel, activation_backward, axpby, dropout as mask,
};

use crate::{Result, Tape, Tensor, Var, tape::Open};

/// y = a + b of one shape: a residual connection. Writes onto whichever of the two nobody else holds.
///
/// Backward: da = db = dy.
///
/// # Panics
/// When the shapes differ.
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

/// y = a − b of one shape. Writes onto a where nobody else holds it.
///
/// Backward: da = dy, db = −dy.
///
/// # Panics
/// When the shapes differ.
pub fn subtract(t: &mut Tape, a: Var, b: &Var) -> Result<Var> {
    assert_eq!(a.value.shape(), b.value.shape(), "subtract: one shape");
    let Var { value: mut y, slot } = a;
    axpby(-1.0, b.value.mat(), 1.0, y.make_mut()?)?;
    let db = b.slot.map(|s| (s, b.value.shape().to_vec()));
    Ok(t.record_onto(y, slot, db.is_some(), move |dy, g| {
        let Some((s, shape)) = db else { return Ok(()) };
        g.add(s, &shape, &dy, |db| Ok(axpby(-1.0, dy.mat(), db.beta, db.to)?))
    }))
}

/// y = x + b on every row, with x [n, d] and b \[d\]. Writes onto x where nobody else holds it.
///
/// Backward: dx = dy, db = Σᵢ dyᵢ.
pub fn add_bias(t: &mut Tape, x: Var, b: &Var) -> Result<Var> {
    let Var { value: mut y, slot } = x;
    k::add_bias(b.value.mat(), y.make_mut()?)?;
    let db = b.slot.map(|s| (s, b.value.shape().to_vec()));
    Ok(t.record_onto(y, slot, db.is_some(), move |dy, g| {
        let Some((s, shape)) = db else { return Ok(()) };
        g.add(s, &shape, &dy, |db| Ok(k::sum_rows(dy.mat(), db)?))
    }))
}

/// Inverted dropout, y = x·m/(1−p) with m Bernoulli(1−p); the identity outside of training and for p = 0.
/// Srivastava et al. 2014. x is of any shape.
///
/// Backward: dx = dy·m/(1−p), with the same m.
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

/// y = f(x) elementwise, of any shape.
///
/// Backward: dx = f′(x)·dy.
pub fn activation(t: &mut Tape, kind: Activation, x: &Var) -> Result<Var> {
    let mut y = Tensor::empty(&t.device(), x.value.dtype(), x.value.shape())?;
    kernel(kind, x.value.mat(), y.make_mut()?)?;
    let dx = x.slot.map(|s| (s, x.value.clone()));
    Ok(t.record(y, dx.is_some(), move |dy, g| {
        let Some((s, x)) = dx else { return Ok(()) };
        g.add(s, x.shape(), &dy, |dx| Ok(activation_backward(kind, x.mat(), dy.mat(), dx)?))
    }))
}

/// y = silu(gate) ∘ up, of one shape: the gate of SwiGLU. Shazeer 2020.
///
/// Backward: dgate = silu′(gate) ∘ up ∘ dy, dup = silu(gate) ∘ dy.
///
/// # Panics
/// When the shapes differ.
pub fn silu_gate(t: &mut Tape, gate: &Var, up: &Var) -> Result<Var> {
    let mut y = Tensor::empty(&t.device(), gate.value.dtype(), gate.value.shape())?;
    k::silu_gate(gate.value.mat(), up.value.mat(), y.make_mut()?)?;
    let slots = (gate.slot, up.slot);
    // The gradient of the gate needs both, that of `up` the gate alone.
    let saved = (gate.value.clone(), slots.0.map(|_| up.value.clone()), up.value.shape().to_vec());
    Ok(t.record(y, slots.0.is_some() || slots.1.is_some(), move |dy, g| {
        let (gate, up, up_shape) = saved;
        let mut dgate = slots.0.map(|s| g.open(s, gate.shape(), &dy)).transpose()?;
        let mut dup = slots.1.map(|s| g.open(s, &up_shape, &dy)).transpose()?;
        k::silu_gate_backward(
            gate.mat(),
            // Not read where the gate has no gradient: any matrix of that shape.
            up.as_ref().unwrap_or(&gate).mat(),
            dy.mat(),
            dgate.as_mut().map(Open::acc).transpose()?,
            dup.as_mut().map(Open::acc).transpose()?,
        )?;
        [dgate, dup].into_iter().flatten().try_for_each(|open| g.close(open))
    }))
}
