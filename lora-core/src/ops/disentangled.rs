use lora_kernels::{self as k, Disentangled, Sequences};

use crate::{Result, Slot, Tape, Tensor, Var, tape::Open};

/// What [`disentangled`] reads: q, k and v [tokens, heads·head_dim], and the projected tables of relative positions
/// [2·span, heads·head_dim].
#[derive(Clone, Copy, Debug)]
pub struct DisentangledInputs<'a> {
    /// Queries.
    pub q: &'a Var,
    /// Keys.
    pub k: &'a Var,
    /// Values.
    pub v: &'a Var,
    /// Keys of positions, for content to position (`c2p`).
    pub pos_key: Option<&'a Var>,
    /// Queries of positions, for position to content (`p2c`).
    pub pos_query: Option<&'a Var>,
}

/// Attention whose scores are sums over content and relative position, Sᵢⱼ = scale·(Qᵢ·Kⱼ + Qᵢ·K̂ᵣ + Kⱼ·Q̂ᵣ) with
/// r = row(i − j): see [`lora_kernels::disentangled`]. Tokens attend within their sequence, the result is
/// [tokens, heads·head_dim]. He et al. 2021, equation 4. CPU only.
///
/// Backward: gradients to whichever of the five are tracked, from probabilities that are made again.
pub fn disentangled(t: &mut Tape, cfg: Disentangled, sequences: &Sequences, x: DisentangledInputs) -> Result<Var> {
    let (n, dtype) = (x.q.value.rows(), x.q.value.dtype());
    let mut y = Tensor::empty(&t.device(), dtype, &[n, cfg.heads * cfg.head_dim])?;
    let mut lse = Tensor::empty(&t.device(), dtype.accumulator(), &[n, cfg.heads])?;
    let all = [Some(x.q), Some(x.k), Some(x.v), x.pos_key, x.pos_query];
    k::disentangled(&cfg, sequences, inputs(&all.map(|v| v.map(|v| &v.value))), y.make_mut()?, lse.make_mut()?)?;
    let slots: [Option<Slot>; 5] = all.map(|v| v.and_then(|v| v.slot));
    let saved = slots
        .iter()
        .any(Option::is_some)
        .then(|| (all.map(|v| v.map(|v| v.value.clone())), y.clone(), lse, sequences.clone()));
    Ok(t.record(y, saved.is_some(), move |dy, g| {
        let Some((all, y, lse, sequences)) = saved else { return Ok(()) };
        let all = all.each_ref().map(Option::as_ref);
        let mut open = [None, None, None, None, None];
        for ((open, slot), value) in open.iter_mut().zip(slots).zip(all) {
            if let Some((slot, value)) = slot.zip(value) {
                *open = Some(g.open(slot, value.shape(), &dy)?);
            }
        }
        let [dq, dk, dv, dpos_key, dpos_query] = open.each_mut().map(|o| o.as_mut().map(Open::acc).transpose());
        let grads = k::DisentangledGrads { q: dq?, k: dk?, v: dv?, pos_key: dpos_key?, pos_query: dpos_query? };
        k::disentangled_backward(&cfg, &sequences, inputs(&all), y.mat(), lse.mat(), dy.mat(), grads)?;
        open.into_iter().flatten().try_for_each(|open| g.close(open))
    }))
}

/// q, k, v and the two tables, if they are there.
fn inputs<'a>(all: &[Option<&'a Tensor>; 5]) -> k::DisentangledInputs<'a> {
    let [q, key, v, pos_key, pos_query] = all.map(|x| x.map(Tensor::mat));
    let (q, k, v) = (q.expect("q is given"), key.expect("k is given"), v.expect("v is given"));
    k::DisentangledInputs { q, k, v, pos_key, pos_query }
}
