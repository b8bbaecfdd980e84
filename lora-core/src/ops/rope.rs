use lora_kernels::{Acc, rope as kernel};

use crate::{Result, Tape, Tensor, Var};

/// Rotary position embedding of each head of x [tokens, heads·head_dim]: with c = cos\[p\], s = sin\[p\] for a token at
/// position p, and the two halves of a head as Hugging Face's `rotate_half` has them,
///
/// y₁ = x₁ ∘ c − x₂ ∘ s,  y₂ = x₂ ∘ c + x₁ ∘ s
///
/// positions \[tokens\] of u32; cos and sin [positions, head_dim / 2], in the [accumulator](lora_kernels::DType::accumulator)
/// of x's type. Su et al. 2021, section 3.2.
///
/// Backward: dy turned back by the same angles. x itself is not kept.
///
/// # Panics
/// When the shapes or types do not fit, or (on the CPU) a position lies outside the tables.
pub fn rope(t: &mut Tape, x: &Var, positions: &Tensor, cos: &Tensor, sin: &Tensor, head_dim: usize) -> Result<Var> {
    let mut y = Tensor::empty(&t.device(), x.value.dtype(), x.value.shape())?;
    let to = Acc { to: y.make_mut()?, beta: 0.0 };
    kernel(x.value.mat(), positions.mat(), cos.mat(), sin.mat(), head_dim, false, to)?;
    let saved = x.slot.map(|s| (s, positions.clone(), cos.clone(), sin.clone()));
    Ok(t.record(y, saved.is_some(), move |dy, g| {
        let Some((s, positions, cos, sin)) = saved else { return Ok(()) };
        g.add(s, dy.shape(), &dy, |dx| Ok(kernel(dy.mat(), positions.mat(), cos.mat(), sin.mat(), head_dim, true, dx)?))
    }))
}
