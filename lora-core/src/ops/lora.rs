use std::ops::Range;

use lora_kernels::{self as k, Acc, Mat, gemm, sum_rows};

use super::linear::in_out;
use crate::{Result, Slot, Tape, Tensor, Var, lowrank::Layout};

/// The low-rank update of some columns of a projection: A [r, in], B [as many as the columns, r].
#[derive(Debug)]
pub struct LoraPart {
    /// Columns of y.
    pub cols: Range<usize>,
    /// A.
    pub a: Var,
    /// B.
    pub b: Var,
}

/// A tensor, and where its gradient goes.
type Saved = (Option<Slot>, Tensor);

/// y = x·Wᵀ + b, and y[:, cols] += s·(x·Aᵀ)·Bᵀ for each part: x [n, in], W [out, in] (or [in, out], see [`Layout`]), b
/// \[out\], y [n, out]. What [`super::linear`] and [`super::linear_onto`] compose, in as few kernels as the device allows.
/// Hu et al. 2021, section 4.1.
///
/// Backward, with h = s·x·Aᵀ from the way forward and g = s·dy·B: dB = dyᵀ·h, dA = gᵀ·x, dx = dy·W + g·A, and
/// dW = dyᵀ·x, db = Σᵢ dyᵢ, each only where something trainable lies. With nothing trainable below x there is no dx and W
/// is not kept.
///
/// # Panics
/// When the shapes do not fit, or the parts' columns are not apart and in order.
pub fn lora_linear(
    t: &mut Tape,
    x: &Var,
    w: &Var,
    layout: Layout,
    bias: Option<&Var>,
    parts: &[LoraPart],
    scale: f64,
) -> Result<Var> {
    let (n, out) = (x.value.rows(), in_out(&w.value, layout).cols());
    let a: Vec<Mat> = parts.iter().map(|p| p.a.value.mat()).collect();
    let b: Vec<_> = parts.iter().map(|p| k::LoraPart { cols: p.cols.clone(), b: p.b.value.mat() }).collect();
    let ranks: Vec<usize> = a.iter().map(Mat::rows).collect();
    let (device, dtype) = (t.device(), x.value.dtype());
    let mut h = Tensor::empty(&device, dtype, &[n, ranks.iter().sum()])?;
    k::lora_down(scale, x.value.mat(), &a, h.make_mut()?)?;
    let mut y = Tensor::empty(&device, dtype, &[n, out])?;
    let bias_mat = bias.map(|b| b.value.mat());
    k::lora_forward(x.value.mat(), in_out(&w.value, layout), bias_mat, h.mat(), &b, y.make_mut()?)?;

    let db = bias.and_then(|b| Some((b.slot?, b.value.shape().to_vec())));
    let dw = w.slot.map(|s| (s, w.value.shape().to_vec()));
    let (trains_a, trains_b) = (parts.iter().any(|p| p.a.slot.is_some()), parts.iter().any(|p| p.b.slot.is_some()));
    let x_kept = (trains_a || dw.is_some()).then(|| x.value.clone());
    let dx = x.slot.map(|s| (s, w.value.clone()));
    let tracked = db.is_some() || dw.is_some() || dx.is_some() || trains_a || trains_b;
    let h = trains_b.then_some(h);
    // A and B are small, and their memory is that of the parameters: all are kept.
    let saved = |v: &Var| -> Saved { (v.slot, v.value.clone()) };
    let all: Vec<(Range<usize>, Saved, Saved)> =
        parts.iter().map(|p| (p.cols.clone(), saved(&p.a), saved(&p.b))).collect();
    Ok(t.record(y, tracked, move |dy, g| {
        if let Some((s, shape)) = db {
            g.add(s, &shape, &dy, |db| Ok(sum_rows(dy.mat(), db)?))?;
        }
        if let Some((s, shape)) = dw {
            let x = x_kept.as_ref().expect("kept for dW");
            g.add(s, &shape, &dy, |dw| {
                let (a, b) = if layout == Layout::OutIn { (dy.t(), x.mat()) } else { (x.t(), dy.mat()) };
                Ok(gemm(1.0, a, b, dw.beta, dw.to)?)
            })?;
        }
        let below = dx.is_some() || trains_a;
        let mut back =
            below.then(|| Tensor::empty(&dy.device(), dy.dtype(), &[dy.rows(), ranks.iter().sum()])).transpose()?;
        let wanted = |saved: &Saved| Some((saved.0?, saved.1.shape().to_vec()));
        let of_b: Vec<_> = all.iter().filter_map(|(_, _, b)| wanted(b)).collect();
        if below || trains_b {
            g.add_all(&of_b, &dy, |accs| {
                let mut accs = accs.into_iter();
                let db = all.iter().map(|(_, _, (slot, _))| slot.and_then(|_| accs.next())).collect();
                let b: Vec<_> =
                    all.iter().map(|(cols, _, (_, b))| k::LoraPart { cols: cols.clone(), b: b.mat() }).collect();
                let back = back.as_mut().map(Tensor::make_mut).transpose()?;
                Ok(k::lora_backward_up(scale, dy.mat(), h.as_ref().map(Tensor::mat), &b, back, db)?)
            })?;
        }
        let Some(back) = back else { return Ok(()) };
        if trains_a {
            let x = x_kept.as_ref().expect("kept for dA");
            let of_a: Vec<_> = all.iter().filter_map(|(_, a, _)| wanted(a)).collect();
            g.add_all(&of_a, &dy, |accs| {
                let mut end = 0;
                let ranges = all.iter().zip(&ranks).filter_map(|((_, (slot, _), _), rank)| {
                    end += rank;
                    slot.map(|_| end - rank..end)
                });
                let da: Vec<(Range<usize>, Acc)> = ranges.zip(accs).collect();
                Ok(k::lora_backward_down(back.mat(), x.mat(), da)?)
            })?;
        }
        if let Some((s, w)) = dx {
            let (w, a) = (in_out(&w, layout), all.iter().map(|(_, (_, a), _)| a.mat()).collect::<Vec<_>>());
            g.add(s, &[dy.rows(), w.rows()], &dy, |dx| Ok(k::lora_backward_input(dy.mat(), w, back.mat(), &a, dx)?))?;
        }
        Ok(())
    }))
}
