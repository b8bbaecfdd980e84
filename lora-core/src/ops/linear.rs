use std::ops::Range;

use lora_kernels::{DType, Epilogue, Mat, gemm, gemm_with, sum_rows};

use crate::{Result, Tape, Tensor, Var, lowrank::Layout};

/// W as the [in, out] matrix of y = x·Wᵀ (an `OutIn` weight is transposed for it, a GPT-2 Conv1D is stored that way).
pub(super) fn in_out(w: &Tensor, layout: Layout) -> Mat<'_> {
    w.mat().t_if(layout == Layout::OutIn)
}

/// y = x·Wᵀ + b, with x [n, in], W [out, in] (or [in, out], see [`Layout`]), b \[out\], y [n, out].
///
/// Backward: dx = dy·W, dW = dyᵀ·x, db = Σᵢ dyᵢ, each only where something trainable lies. With a frozen W, x is not
/// even kept.
pub fn linear(t: &mut Tape, x: &Var, w: &Var, layout: Layout, bias: Option<&Var>) -> Result<Var> {
    linear_in(t, x.value.dtype(), x, w, layout, bias)
}

/// [`linear`] with y in the [accumulator](DType::accumulator) of x's type, f32 for 16 bits: the outputs of a head, whose last
/// digits its loss needs.
pub fn linear_wide(t: &mut Tape, x: &Var, w: &Var, layout: Layout, bias: Option<&Var>) -> Result<Var> {
    linear_in(t, x.value.dtype().accumulator(), x, w, layout, bias)
}

fn linear_in(t: &mut Tape, to: DType, x: &Var, w: &Var, layout: Layout, bias: Option<&Var>) -> Result<Var> {
    let (n, out) = (x.value.rows(), in_out(&w.value, layout).cols());
    let mut y = Tensor::empty(&t.device(), to, &[n, out])?;
    let b = bias.map(|b| b.value.to_dtype(to)).transpose()?;
    let epilogue = Epilogue { bias: b.as_ref().map(Tensor::mat), ..Epilogue::default() };
    gemm_with(1.0, x.value.mat(), in_out(&w.value, layout), 0.0, y.make_mut()?, &epilogue)?;
    let dtype = x.value.dtype();
    let dx = x.slot.map(|s| (s, w.value.clone()));
    let dw = w.slot.map(|s| (s, x.value.clone(), w.value.shape().to_vec()));
    let db = bias.and_then(|b| Some((b.slot?, b.value.shape().to_vec())));
    let tracked = dx.is_some() || dw.is_some() || db.is_some();
    Ok(t.record(y, tracked, move |dy, g| {
        let dy = dy.to_dtype(dtype)?;
        if let Some((s, shape)) = db {
            g.add(s, &shape, &dy, |db| Ok(sum_rows(dy.mat(), db)?))?;
        }
        if let Some((s, x, shape)) = dw {
            g.add(s, &shape, &dy, |dw| {
                let (a, b) = if layout == Layout::OutIn { (dy.t(), x.mat()) } else { (x.t(), dy.mat()) };
                Ok(gemm(1.0, a, b, dw.beta, dw.to)?)
            })?;
        }
        if let Some((s, w)) = dx {
            let w = in_out(&w, layout).t();
            g.add(s, &[dy.rows(), w.cols()], &dy, |dx| Ok(gemm(1.0, dy.mat(), w, dx.beta, dx.to)?))?;
        }
        Ok(())
    }))
}

/// y[:, cols] += c·x·Wᵀ in place, with x [n, in], W [out, in] and as many columns as W has outputs: the low-rank update
/// of a projection or of one part of a fused one.
pub fn linear_onto(t: &mut Tape, y: Var, cols: Range<usize>, x: &Var, w: &Var, c: f64) -> Result<Var> {
    let Var { value: mut y, slot } = y;
    gemm(c, x.value.mat(), w.value.t(), 1.0, y.make_mut()?.cols_in(cols.clone()))?;
    let dx = x.slot.map(|s| (s, w.value.clone()));
    let dw = w.slot.map(|s| (s, x.value.clone()));
    let tracked = dx.is_some() || dw.is_some();
    Ok(t.record_onto(y, slot, tracked, move |dy, g| {
        let part = || dy.mat().cols_in(cols.clone());
        if let Some((s, x)) = dw {
            g.add(s, &[cols.len(), x.cols()], &dy, |dw| Ok(gemm(c, part().t(), x.mat(), dw.beta, dw.to)?))?;
        }
        if let Some((s, w)) = dx {
            g.add(s, &[dy.rows(), w.cols()], &dy, |dx| Ok(gemm(c, part(), w.mat(), dx.beta, dx.to)?))?;
        }
        Ok(())
    }))
}
