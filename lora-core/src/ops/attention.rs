use lora_kernels::{self as k, Acc, Attention, Mat, Sequences};

use crate::{Result, Tape, Tensor, Var, tape::Open};

/// What attention reads.
#[derive(Clone, Copy, Debug)]
pub enum Qkv<'a> {
    /// One projection [tokens, (heads + 2·kv_heads)·head_dim] with q, k and v side by side.
    Fused(&'a Var),
    /// A projection each.
    Separate {
        /// Queries [tokens, heads·head_dim].
        q: &'a Var,
        /// Keys [tokens, kv_heads·head_dim].
        k: &'a Var,
        /// Values [tokens, kv_heads·head_dim].
        v: &'a Var,
    },
}

impl<'a> Qkv<'a> {
    /// The matrices of q, k and v.
    ///
    /// # Panics
    /// When a fused projection has not the columns of its three parts.
    pub fn mats(&self, cfg: &Attention) -> [Mat<'a>; 3] {
        match self {
            Qkv::Fused(qkv) => parts(cfg, &qkv.value),
            Qkv::Separate { q, k, v } => [q.value.mat(), k.value.mat(), v.value.mat()],
        }
    }
}

/// Multi-head attention over the projections of `qkv`; the result is [tokens, heads·head_dim]. Tokens attend within their
/// sequence only, and when `cfg.causal` only to earlier positions and themselves. Vaswani et al. 2017; the backward
/// recomputes the probabilities from one log-sum-exp per row, as Dao 2023.
///
/// Of separate projections each gets a gradient that something trainable lies below; the kernel makes all three, so that
/// the others cost a matrix that is thrown away.
///
/// # Panics
/// When the projections are not of the sizes of `cfg`, or not of as many tokens as `sequences` has.
pub fn attention(t: &mut Tape, cfg: Attention, sequences: &Sequences, qkv: Qkv) -> Result<Var> {
    let [q, key, v] = qkv.mats(&cfg);
    let (n, q_cols, kv_cols) = (q.rows(), cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim);
    let (device, dtype) = (t.device(), q.dtype());
    let mut y = Tensor::empty(&device, dtype, &[n, q_cols])?;
    let mut lse = Tensor::empty(&device, dtype.accumulator(), &[n, cfg.heads])?;
    k::attention(&cfg, sequences, q, key, v, y.make_mut()?, lse.make_mut()?)?;
    match qkv {
        Qkv::Fused(qkv) => {
            let saved = qkv.slot.map(|s| (s, qkv.value.clone(), y.clone(), lse, sequences.clone()));
            Ok(t.record(y, saved.is_some(), move |dy, g| {
                let Some((slot, qkv, y, lse, sequences)) = saved else { return Ok(()) };
                let [q, key, v] = parts(&cfg, &qkv);
                g.add(slot, qkv.shape(), &dy, |dqkv| {
                    let beta = dqkv.beta;
                    let (dq, dkv) = dqkv.to.split_cols(q_cols);
                    let (dk, dv) = dkv.split_cols(kv_cols);
                    let [dq, dk, dv] = [dq, dk, dv].map(|to| Acc { to, beta });
                    Ok(k::attention_backward(&cfg, &sequences, q, key, v, y.mat(), lse.mat(), dy.mat(), dq, dk, dv)?)
                })
            }))
        }
        Qkv::Separate { q, k: key, v } => {
            let all = [q, key, v];
            let tracked = all.iter().any(|part| part.slot.is_some());
            let saved = tracked.then(|| (all.map(|part| part.value.clone()), y.clone(), lse, sequences.clone()));
            let slots = all.map(|part| part.slot);
            Ok(t.record(y, tracked, move |dy, g| {
                let Some((all, y, lse, sequences)) = saved else { return Ok(()) };
                let mut gradients = Vec::with_capacity(3);
                for (slot, part) in slots.into_iter().zip(&all) {
                    gradients.push(match slot {
                        Some(s) => Gradient::Wanted(g.open(s, part.shape(), &dy)?),
                        None => Gradient::Scratch(Tensor::empty(&dy.device(), dy.dtype(), part.shape())?),
                    });
                }
                let accs: Vec<Acc> = gradients.iter_mut().map(Gradient::acc).collect::<Result<_>>()?;
                let [dq, dk, dv] = accs.try_into().unwrap_or_else(|_| unreachable!("q, k and v"));
                let [q, key, v] = all.each_ref().map(Tensor::mat);
                k::attention_backward(&cfg, &sequences, q, key, v, y.mat(), lse.mat(), dy.mat(), dq, dk, dv)?;
                gradients.into_iter().try_for_each(|gradient| match gradient {
                    Gradient::Wanted(open) => g.close(open),
                    Gradient::Scratch(_) => Ok(()),
                })
            }))
        }
    }
}

/// One of the three gradients that the kernel makes.
enum Gradient {
    /// Somebody takes it.
    Wanted(Open),
    /// Nobody does.
    Scratch(Tensor),
}

impl Gradient {
    fn acc(&mut self) -> Result<Acc<'_>> {
        match self {
            Gradient::Wanted(open) => open.acc(),
            Gradient::Scratch(to) => Ok(Acc { to: to.make_mut()?, beta: 0.0 }),
        }
    }
}

/// The columns of q, k and v.
fn parts<'a>(cfg: &Attention, qkv: &'a Tensor) -> [Mat<'a>; 3] {
    let (q, kv) = (cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim);
    assert_eq!(qkv.cols(), q + 2 * kv, "attention: q, k and v side by side");
    let m = qkv.mat();
    [m.cols_in(0..q), m.cols_in(q..q + kv), m.cols_in(q + kv..q + 2 * kv)]
}
