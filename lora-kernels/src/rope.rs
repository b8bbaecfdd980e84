#[cfg(feature = "cuda")]
pub(crate) mod cuda;

use rayon::prelude::*;

use crate::{
    Acc, Mat, Result,
    real::{Real, dispatch, simd},
    reduce::rows_per_task,
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
/// On a CUDA device the tables may be f32 whatever the type of x, and a token whose position lies outside of them becomes
/// NaN, since the host does not see positions there.
///
/// # Panics
/// When the shapes or types do not fit or, on the CPU, a position lies outside the tables.
#[allow(clippy::too_many_arguments)] // the tables and what is turned by them
pub fn rope(x: Mat, positions: Mat, cos: Mat, sin: Mat, head_dim: usize, inverse: bool, y: Acc) -> Result<()> {
    let Acc { to: y, beta } = y;
    assert_eq!((x.rows(), x.cols()), (y.rows(), y.cols()), "rope: x and y are alike");
    assert_eq!((positions.rows(), positions.cols()), (1, y.rows()), "rope: one position per token");
    assert!(head_dim > 0 && head_dim.is_multiple_of(2), "rope: heads of {head_dim} columns have no halves");
    assert!(y.cols().is_multiple_of(head_dim), "rope: {} columns in heads of {head_dim}", y.cols());
    assert_eq!([cos.cols(), sin.cols()], [head_dim / 2; 2], "rope: cos and sin are [positions, head_dim / 2]");
    #[cfg(feature = "cuda")]
    if let Some(gpu) = y.gpu() {
        return cuda::rope(gpu, x, positions, cos, sin, head_dim, inverse, &Acc { to: y, beta });
    }
    dispatch!("rope", y.dtype(), T => {
        let (x, cos, sin) = (x.host::<T>(), cos.host::<T>(), sin.host::<T>());
        let (positions, beta) = (positions.host::<u32>().row(0), T::of(beta));
        let sign = if inverse { -T::ONE } else { T::ONE };
        let rows = rows_per_task(y.cols());
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Buffer, Device, Element, MatMut};

    const HEADS: usize = 3;
    const HD: usize = 10;
    const POSITIONS: [u32; 5] = [0, 1, 2, 11, 4];

    /// (cos, sin) of 12 positions.
    fn angles() -> (Vec<f64>, Vec<f64>) {
        let angle = |i: usize| (i / (HD / 2)) as f64 * 10_000f64.powf(-2.0 * (i % (HD / 2)) as f64 / HD as f64);
        (0..12 * HD / 2).map(|i| angle(i).sin_cos()).map(|(s, c)| (c, s)).unzip()
    }

    fn run<T: Element>(x: &[f64], inverse: bool, beta: f64, y: &[f64], of: fn(f64) -> T) -> Vec<T> {
        let buffer =
            |x: &[f64]| Buffer::from_slice(&Device::Cpu, &x.iter().map(|&v| of(v)).collect::<Vec<_>>()).unwrap();
        let (cos, sin) = angles();
        let (x, cos, sin, mut y) = (buffer(x), buffer(&cos), buffer(&sin), buffer(y));
        let positions = Buffer::from_slice(&Device::Cpu, &POSITIONS).unwrap();
        let rows = POSITIONS.len();
        rope(
            Mat::new(&x, 0, rows, HEADS * HD),
            Mat::new(&positions, 0, 1, rows),
            Mat::new(&cos, 0, 12, HD / 2),
            Mat::new(&sin, 0, 12, HD / 2),
            HD,
            inverse,
            Acc { to: MatMut::new(&mut y, 0, rows, HEADS * HD), beta },
        )
        .unwrap();
        y.to_vec(0..y.len()).unwrap()
    }

    fn wave(n: usize, f: f64) -> Vec<f64> {
        (0..n).map(|i| (f * i as f64).sin()).collect()
    }

    const N: usize = POSITIONS.len() * HEADS * HD;

    #[test]
    fn equals_the_formula_of_hugging_face() {
        // q·cos + rotate_half(q)·sin with cos and sin repeated over both halves, rotate_half(q) = [−q₂, q₁].
        let (x, (cos, sin)) = (wave(N, 0.7), angles());
        let half = HD / 2;
        let want = |i: usize| {
            let (t, c) = (i / (HEADS * HD), i % HD);
            let at = POSITIONS[t] as usize * half + c % half;
            let rotated = if c < half { -x[i + half] } else { x[i - half] };
            x[i] * cos[at] + rotated * sin[at]
        };
        let nan = vec![f64::NAN; N];
        let (y, y32) = (run(&x, false, 0.0, &nan, |v| v), run(&x, false, 0.0, &nan, |v| v as f32));
        let added = run(&x, false, 2.0, &x, |v| v);
        for i in 0..N {
            assert!((y[i] - want(i)).abs() < 1e-14, "{i}: {} for {}", y[i], want(i));
            assert!((f64::from(y32[i]) - want(i)).abs() < 1e-6);
            assert!((added[i] - want(i) - 2.0 * x[i]).abs() < 1e-14);
        }
    }

    #[test]
    fn the_inverse_undoes_and_is_the_gradient() {
        let (x, dy, nan) = (wave(N, 0.7), wave(N, 1.3), vec![f64::NAN; N]);
        let y = run(&x, false, 0.0, &nan, |v| v);
        for (back, x) in run(&y, true, 0.0, &nan, |v| v).iter().zip(&x) {
            assert!((back - x).abs() < 1e-14);
        }
        // A linear map: ⟨rope(x), dy⟩ = ⟨x, dx⟩.
        let dx = run(&dy, true, 0.0, &nan, |v| v);
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        approx::assert_relative_eq!(dot(&y, &dy), dot(&x, &dx), max_relative = 1e-12);
    }
}
