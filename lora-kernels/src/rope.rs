use rayon::prelude::*;

use crate::{
    Acc, Mat, Result,
    real::{Real, dispatch, simd},
};

/// Rotary position embedding: each head's two halves are turned by angles that grow with the position.
///
/// For token t at position p, head columns x = [x₁, x₂] (halves, as Hugging Face's `rotate_half`) and c = cos\[p\],
/// s = sin\[p\],
/// ```text
/// y₁ = x₁ ∘ c − x₂ ∘ s
/// y₂ = x₂ ∘ c + x₁ ∘ s        y = result + β·y
/// ```
/// `inverse` turns back (s → −s), which is also the gradient: dx = rope(dy, inverse). x, y: [tokens, heads · head_dim];
/// positions: [1, tokens] of `U32`; cos, sin: [positions, head_dim / 2]. Source: Su et al., "RoFormer", 2021, section 3.2.
///
/// # Panics
/// When the shapes or types do not fit or a position lies outside the tables.
#[allow(clippy::too_many_arguments)] // the tables and what is turned by them
pub fn rope(x: Mat, positions: Mat, cos: Mat, sin: Mat, head_dim: usize, inverse: bool, y: Acc) -> Result<()> {
    let Acc { to: y, beta } = y;
    assert_eq!((x.rows(), x.cols()), (y.rows(), y.cols()), "rope: x and y are alike");
    assert_eq!((positions.rows(), positions.cols()), (1, y.rows()), "rope: one position per token");
    assert!(head_dim > 0 && head_dim.is_multiple_of(2), "rope: heads of {head_dim} columns have no halves");
    assert!(y.cols().is_multiple_of(head_dim), "rope: {} columns in heads of {head_dim}", y.cols());
    assert_eq!([cos.cols(), sin.cols()], [head_dim / 2; 2], "rope: cos and sin are [positions, head_dim / 2]");
    dispatch!("rope", y.dtype(), T => {
        let (x, cos, sin) = (x.host::<T>(), cos.host::<T>(), sin.host::<T>());
        let (positions, beta) = (positions.host::<u32>().row(0), T::of(beta));
        let sign = if inverse { -T::ONE } else { T::ONE };
        let rows = (ELEMENTS / y.cols().max(1)).max(1);
        y.host::<T>().row_chunks(rows).into_par_iter().enumerate().for_each(|(i, mut y)| {
            simd(#[inline(always)] || {
                for r in 0..y.rows {
                    let t = i * rows + r;
                    let p = positions[t] as usize;
                    rotate(x.row(t), cos.row(p), sin.row(p), sign, beta, y.row_mut(r));
                }
            });
        });
        Ok(())
    })
}

/// Elements of one task, about 10 µs of work.
const ELEMENTS: usize = 1 << 15;

#[inline(always)]
fn rotate<T: Real>(x: &[T], cos: &[T], sin: &[T], sign: T, beta: T, y: &mut [T]) {
    let half = cos.len();
    for (x, y) in x.chunks_exact(2 * half).zip(y.chunks_exact_mut(2 * half)) {
        let ((x1, x2), (y1, y2)) = (x.split_at(half), y.split_at_mut(half));
        let pairs = y1.iter_mut().zip(y2).zip(x1.iter().zip(x2)).zip(cos.iter().zip(sin));
        if beta == T::ZERO {
            for (((y1, y2), (&x1, &x2)), (&c, &s)) in pairs {
                let s = sign * s;
                *y1 = x1 * c - x2 * s;
                *y2 = x2 * c + x1 * s;
            }
        } else {
            for (((y1, y2), (&x1, &x2)), (&c, &s)) in pairs {
                let s = sign * s;
                *y1 = x1 * c - x2 * s + beta * *y1;
                *y2 = x2 * c + x1 * s + beta * *y2;
            }
        }
    }
}
