use lora_kernels::{self as k, Attention, Mat, Sequences};

use crate::{Result, Tape, Tensor, Var};

/// Multi-head attention over a fused projection: `qkv` [tokens, (heads + 2·kv_heads)·head_dim] holds q, k and v side by
/// side, the result is [tokens, heads·head_dim]. Tokens attend within their sequence only, and when `cfg.causal` only
/// to earlier positions and themselves. Vaswani et al. 2017; the backward recomputes the probabilities from one
/// log-sum-exp per row, as Dao 2023.
pub fn attention(t: &mut Tape, cfg: Attention, sequences: &Sequences, qkv: &Var) -> Result<Var> {
    let (q_cols, kv_cols) = (cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim);
    assert_eq!(qkv.value.cols(), q_cols + 2 * kv_cols, "attention: q, k and v side by side");
    let (n, dtype) = (qkv.value.rows(), qkv.value.dtype());
    let mut y = Tensor::empty(&t.device(), dtype, &[n, q_cols])?;
    let mut lse = Tensor::empty(&t.device(), dtype.accumulator(), &[n, cfg.heads])?;
    let [q, key, v] = parts(&cfg, qkv.value.mat());
    k::attention(&cfg, sequences, q, key, v, y.make_mut()?, lse.make_mut()?)?;
    let saved = qkv.slot.map(|s| (s, qkv.value.clone(), y.clone(), lse, sequences.clone()));
    Ok(t.record(y, saved.is_some(), move |dy, g| {
        let Some((slot, qkv, y, lse, sequences)) = saved else { return Ok(()) };
        let [q, key, v] = parts(&cfg, qkv.mat());
        g.add(slot, qkv.shape(), &dy, |dqkv| {
            let beta = dqkv.beta;
            let (dq, dkv) = dqkv.to.split_cols(q_cols);
            let (dk, dv) = dkv.split_cols(kv_cols);
            let acc = |to| k::Acc { to, beta };
            let (dq, dk, dv) = (acc(dq), acc(dk), acc(dv));
            Ok(k::attention_backward(&cfg, &sequences, q, key, v, y.mat(), lse.mat(), dy.mat(), dq, dk, dv)?)
        })
    }))
}

/// The columns of q, k and v.
fn parts<'a>(cfg: &Attention, m: Mat<'a>) -> [Mat<'a>; 3] {
    let (q, kv) = (cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim);
    [m.cols_in(0..q), m.cols_in(q..q + kv), m.cols_in(q + kv..q + 2 * kv)]
}
