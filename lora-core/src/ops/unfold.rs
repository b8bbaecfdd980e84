use lora_kernels::{self as k, Sequences};

use super::linear;
use crate::{Result, Tape, Tensor, Var, lowrank::Layout};

/// A convolution over the tokens of each sequence, with zeros around it:
/// ```text
/// y[t, o] = Σ_c Σⱼ w[o, c, j]·x[t + j − (k − 1)/2, c] + b[o]
/// ```
/// x [tokens, in], w [out, in, k] with k odd, b \[out\], y [tokens, out]. CPU only. Backward: that of [`unfold`] and
/// [`linear()`], which it is made of.
///
/// # Panics
/// When the shapes do not fit.
pub fn convolution(t: &mut Tape, sequences: &Sequences, x: &Var, w: &Var, bias: Option<&Var>) -> Result<Var> {
    let shape = w.value.shape().to_vec();
    let &[outputs, inputs, width] = &shape[..] else { panic!("convolution: w is [out, in, k], not {shape:?}") };
    let x = unfold(t, sequences, x, width)?;
    // The same memory as a matrix, and its gradient as w's.
    let matrix = w.value.clone().reshape(&[outputs, inputs * width]);
    let slot = w.slot;
    let w = t.record(matrix, slot.is_some(), move |dw, g| match slot {
        Some(slot) => g.pass(slot, dw.reshape(&shape)),
        None => Ok(()),
    });
    linear(t, &x, &w, Layout::OutIn, bias)
}

/// y[t, c·k + j] = x[t + j − (k − 1)/2, c], and 0 where that token lies outside t's sequence: x [tokens, c], y [tokens, c·k],
/// k odd. CPU only.
///
/// Backward: dx[t, c] = Σⱼ dy[t − j + (k − 1)/2, c·k + j].
pub fn unfold(t: &mut Tape, sequences: &Sequences, x: &Var, width: usize) -> Result<Var> {
    let mut y = Tensor::empty(&t.device(), x.value.dtype(), &[x.value.rows(), x.value.cols() * width])?;
    k::unfold(sequences, x.value.mat(), y.make_mut()?)?;
    let dx = x.slot.map(|s| (s, x.value.shape().to_vec(), sequences.clone()));
    Ok(t.record(y, dx.is_some(), move |dy, g| {
        let Some((slot, shape, sequences)) = dx else { return Ok(()) };
        g.add(slot, &shape, &dy, |dx| Ok(k::unfold_backward(&sequences, dy.mat(), dx)?))
    }))
}
