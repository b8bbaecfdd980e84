#[cfg(feature = "cuda")]
pub(crate) mod cuda;

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::Buffer;
use crate::{
    DType, Mat, MatMut, Result,
    mat::HostMat,
    real::{Real, dispatch, simd},
    reduce::{GRAIN, each, rows_per_task, sum},
};

/// One step of AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), with the arithmetic of `torch.optim.AdamW`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate η of this step.
    pub lr: f64,
    /// Decay β₁ of the mean of the gradients.
    pub beta1: f64,
    /// Decay β₂ of the mean of their squares.
    pub beta2: f64,
    /// ε, added to the root.
    pub eps: f64,
    /// Decoupled weight decay λ.
    pub weight_decay: f64,
    /// The number t of this step; the first is 1.
    pub step: u64,
}

/// Updates parameters p and both moments m, v by the gradient g, element by element:
///
/// ```text
/// p ← p·(1 − η·λ)    m ← m + (g − m)·(1 − β₁)    v ← v·β₂ + (1 − β₂)·g²
/// p ← p − η/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
/// ```
///
/// Scalars are taken in f64 and rounded once. On a CUDA device (f32 alone) the bits are those of the CPU.
///
/// # Panics
/// When the shapes or types differ, or the step is 0.
pub fn adamw(cfg: &AdamW, p: MatMut, g: Mat, m: MatMut, v: MatMut) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = p.gpu() {
        return cuda::adamw(gpu, cfg, None, p, g, m, v);
    }
    dispatch!("adamw", p.dtype(), T => {
        cfg.update::<T>(T::ONE, p, g, m, v);
        Ok(())
    })
}

/// As [`adamw`], with `factor`·g for g, where `factor` [1, 1] comes from [`clip_factor`]. When it is no finite number,
/// everything stays as it is: a step that must not be done costs no read-back to be found out.
///
/// # Panics
/// When the shapes or types differ, or the step is 0.
pub fn adamw_clipped(cfg: &AdamW, factor: Mat, p: MatMut, g: Mat, m: MatMut, v: MatMut) -> Result<()> {
    assert_eq!((factor.rows(), factor.cols()), (1, 1), "adamw_clipped: one factor");
    #[cfg(feature = "cuda")]
    if let Some(gpu) = p.gpu() {
        return cuda::adamw(gpu, cfg, Some(factor), p, g, m, v);
    }
    dispatch!("adamw_clipped", p.dtype(), T => {
        let factor = factor.host::<T>().row(0)[0];
        if factor.f64().is_finite() {
            cfg.update(factor, p, g, m, v);
        }
        Ok(())
    })
}

/// The numbers of a step in the precision T.
struct Rule<T> {
    keep: T,
    new1: T,
    beta2: T,
    new2: T,
    step: T,
    root: T,
    eps: T,
}

impl AdamW {
    fn rule<T: Real>(&self) -> Rule<T> {
        assert!(self.step > 0, "adamw: steps count from 1");
        let power = |b: f64| 1.0 - b.powf(self.step as f64);
        Rule {
            keep: T::of(1.0 - self.lr * self.weight_decay),
            new1: T::of(1.0 - self.beta1),
            beta2: T::of(self.beta2),
            new2: T::of(1.0 - self.beta2),
            step: T::of(-(self.lr / power(self.beta1))),
            root: T::of(power(self.beta2).sqrt()),
            eps: T::of(self.eps),
        }
    }

    fn update<T: Real>(&self, factor: T, p: MatMut, g: Mat, m: MatMut, v: MatMut) {
        let r = self.rule::<T>();
        each(
            "adamw",
            [g.host::<T>()],
            [p.host(), m.host(), v.host()],
            #[inline(always)]
            |[g], [p, m, v]| {
                let n = p.len();
                let (g, m, v) = (&g[..n], &mut m[..n], &mut v[..n]);
                for i in 0..n {
                    let g = g[i] * factor;
                    m[i] = (g - m[i]).mul_add(r.new1, m[i]);
                    v[i] = v[i] * r.beta2 + r.new2 * g * g;
                    p[i] = p[i] * r.keep + r.step * m[i] / (Real::sqrt(v[i]) / r.root + r.eps);
                }
            },
        );
    }
}

/// Σ x², in f64 whatever the type: the square of a gradient's norm. Fixed chunks, added in order; the square of an f32
/// is exact in f64, so that the relative error is below 2⁻⁵²·(terms that one thread adds in a row).
pub fn sum_squares(x: Mat) -> Result<f64> {
    #[cfg(feature = "cuda")]
    if x.gpu().is_some() {
        let mut sum = Buffer::empty(x.device(), DType::F64, 1)?;
        sum_squares_into(x, MatMut::new(&mut sum, 0, 1, 1))?;
        return Ok(sum.to_vec::<f64>(0..1)?[0]);
    }
    dispatch!("sum_squares", x.dtype(), T => {
        Ok(total(x.host::<T>(), #[inline(always)] |x| {
            let (chunks, rest) = x.as_chunks::<8>();
            let mut acc = [0.0f64; 8];
            for c in chunks {
                for l in 0..8 {
                    acc[l] += c[l].f64() * c[l].f64();
                }
            }
            acc.iter().sum::<f64>() + rest.iter().map(|x| x.f64() * x.f64()).sum::<f64>()
        }))
    })
}

/// [`sum_squares`] into `out` [1, 1] of f64, on x's device: nobody waits for it.
///
/// # Panics
/// When `out` is not one f64.
pub fn sum_squares_into(x: Mat, out: MatMut) -> Result<()> {
    assert_eq!((out.rows(), out.cols(), out.dtype()), (1, 1, DType::F64), "sum_squares_into: one f64");
    #[cfg(feature = "cuda")]
    if let Some(gpu) = x.gpu() {
        return cuda::sum_squares(gpu, x, out);
    }
    out.host::<f64>().row_mut(0)[0] = sum_squares(x)?;
    Ok(())
}

/// What [`adamw_clipped`] multiplies a gradient by, from `sum_squares` [1, 1] of f64, the square of its norm:
///
/// ```text
/// norm = √sum_squares    factor ← limit / (norm + 10⁻⁶) where limit > 0 and norm > limit, else 1
/// ```
///
/// as PyTorch's `clip_grad_norm_` does. NaN, so that the step is not done,
/// - when `loss` [1, 1] is no finite number,
/// - when sum_squares is none, or not below the largest f32 (beyond it AdamW's mean of squares overflows, and nothing
///   would move any more),
/// - when `factor` [1, 1] was none before: once a step was left out, all that follow are, until the caller sets the
///   factor to 1 again, as it does before the first.
///
/// So a caller may look at the factor as rarely as it likes, and finds parameters and moments as they were before the
/// first step that went wrong.
///
/// # Panics
/// When the shapes differ, sum_squares is not f64, or loss and factor are not of one type.
pub fn clip_factor(loss: Mat, sum_squares: Mat, limit: f64, factor: MatMut) -> Result<()> {
    for m in [loss, sum_squares, factor.as_mat()] {
        assert_eq!((m.rows(), m.cols()), (1, 1), "clip_factor: single numbers");
    }
    assert_eq!(sum_squares.dtype(), DType::F64, "clip_factor: a sum of squares in f64");
    #[cfg(feature = "cuda")]
    if let Some(gpu) = factor.gpu() {
        return cuda::clip_factor(gpu, loss, sum_squares, limit, factor);
    }
    dispatch!("clip_factor", factor.dtype(), T => {
        let (loss, sum) = (loss.host::<T>().row(0)[0].f64(), sum_squares.host::<f64>().row(0)[0]);
        let mut factor = factor.host::<T>();
        let factor = &mut factor.row_mut(0)[0];
        let norm = sum.sqrt();
        *factor = if !(factor.f64().is_finite() && loss.is_finite() && sum < f64::from(f32::MAX)) {
            T::of(f64::NAN)
        } else if limit > 0.0 && norm > limit {
            T::of(limit / (norm + 1e-6))
        } else {
            T::ONE
        };
        Ok(())
    })
}

/// Whether no element is infinite or NaN.
pub fn all_finite(x: Mat) -> Result<bool> {
    #[cfg(feature = "cuda")]
    if x.gpu().is_some() {
        // In f64 no sum of squares of the device's types overflows.
        return Ok(sum_squares(x)?.is_finite());
    }
    dispatch!("all_finite", x.dtype(), T => {
        // 0·x is 0 for a finite x, NaN for any other.
        Ok(total(x.host::<T>(), #[inline(always)] |x| sum([x], #[inline(always)] |[x]| x * T::ZERO).f64()) == 0.0)
    })
}

/// The sum of `f` over fixed runs of elements, in order.
fn total<T: Real>(x: HostMat<T>, f: impl Fn(&[T]) -> f64 + Sync) -> f64 {
    let flat = x.rows <= 1 || x.ld == x.cols;
    let x = if flat { HostMat::from_slice(x.data(), 1, x.rows * x.cols) } else { x };
    let (rows, cols) = if flat { (1, GRAIN) } else { (rows_per_task(x.cols), x.cols.max(1)) };
    let tasks: Vec<_> = (0..x.rows.div_ceil(rows))
        .flat_map(|r| (0..x.cols.div_ceil(cols)).map(move |c| (r * rows, c * cols)))
        .collect();
    let part = |&(r, c): &(usize, usize)| {
        let x = x.block(r..(r + rows).min(x.rows), c..(c + cols).min(x.cols));
        simd(
            #[inline(always)]
            || {
                let mut sum = 0.0;
                for r in 0..x.rows {
                    sum += f(x.row(r));
                }
                sum
            },
        )
    };
    let sums: Vec<f64> =
        if tasks.len() > 1 { tasks.par_iter().map(part).collect() } else { tasks.iter().map(part).collect() };
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    fn cfg(step: u64) -> AdamW {
        AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, step }
    }

    const START: [f64; 4] = [0.5, -1.25, 2.0, -0.03125];

    /// gᵢ(t) = sin(1.7·i + t)·10^(i−2), in f32.
    fn gradient(t: u64) -> Vec<f64> {
        (0..4).map(|i| f64::from(((1.7 * i as f64 + t as f64).sin() * 10f64.powi(i - 2)) as f32)).collect()
    }

    /// Five steps of `torch.optim.AdamW([p], lr=1e-2, weight_decay=0.1)` (PyTorch 2.15, CPU, f64) from `START` with
    /// those gradients.
    const TORCH: [[f64; 4]; 5] = [
        [0.4895000118839368, -1.2587499976601617, 2.007999999894914, -0.02121875005489604],
        [0.4789978382342745, -1.2559037276552116, 2.0158848625790156, -0.026793421083430365],
        [0.47010531915259746, -1.2486757875490677, 2.020876690564844, -0.03446588545686817],
        [0.4667634249702413, -1.2405661514494155, 2.0200616429464566, -0.041998577806960515],
        [0.4672687530813164, -1.23536976709648, 2.016260176750061, -0.045277243353216],
    ];
    /// The same in f32.
    const TORCH_F32: [[f64; 4]; 5] = [
        [0.4895000159740448, -1.2587499618530273, 2.008000135421753, -0.02121875062584877],
        [0.4789978265762329, -1.255903720855713, 2.0158851146698, -0.02679342031478882],
        [0.4701053202152252, -1.24867582321167, 2.020876884460449, -0.034465886652469635],
        [0.466763436794281, -1.2405661344528198, 2.02006196975708, -0.04199858009815216],
        [0.46726876497268677, -1.2353698015213013, 2.0162603855133057, -0.045277245342731476],
    ];
    const TORCH_M: [f64; 4] = [-0.0003107723662070928, -0.010065515404157338, 0.057014956538975224, 0.8596302355074881];
    const TORCH_V: [f64; 4] =
        [3.0411773372362833e-07, 1.9265116501505972e-05, 0.0030480694669532946, 0.1994095051449845];

    #[test]
    fn follows_torch() {
        for dtype in FLOATS {
            // Long enough for vectors, with a tail.
            let repeat = |x: &[f64]| x.iter().copied().cycle().take(4 * 9).collect::<Vec<_>>();
            let mut p = Padded::new(dtype, 2, 18, 3, &repeat(&START));
            let (mut m, mut v) = (Padded::new(dtype, 2, 18, 0, &[0.0; 36]), Padded::new(dtype, 2, 18, 0, &[0.0; 36]));
            for t in 1..=5 {
                let g = Padded::new(dtype, 2, 18, 0, &repeat(&gradient(t)));
                adamw(&cfg(t), p.mat_mut(), g.mat(), m.mat_mut(), v.mat_mut()).unwrap();
                let want = if dtype == DType::F32 { TORCH_F32 } else { TORCH }[t as usize - 1];
                // f32 bit for bit: the same operations in the same order.
                close("p", &p.get(), &repeat(&want), if dtype == DType::F32 { 0.0 } else { 1e-15 });
            }
            for (got, want) in [(m, TORCH_M), (v, TORCH_V)] {
                let relative: Vec<f64> = got.get().iter().zip(repeat(&want)).map(|(g, w)| g / w).collect();
                close("moment", &relative, &[1.0; 36], tol(dtype, 1e-6));
            }
        }
    }

    /// One number of a type.
    fn one(dtype: DType, value: f64) -> Padded {
        Padded::new(dtype, 1, 1, 0, &[value])
    }

    /// [`clip_factor`] of a norm, with the factor that was there before.
    fn factor(dtype: DType, loss: f64, norm: f64, limit: f64, before: f64) -> f64 {
        let mut factor = one(dtype, before);
        let sum = one(DType::F64, norm * norm);
        clip_factor(one(dtype, loss).mat(), sum.mat(), limit, factor.mat_mut()).unwrap();
        factor.get()[0]
    }

    #[test]
    fn gradients_are_clipped_to_the_limit_and_bad_steps_are_left_out() {
        for dtype in FLOATS {
            for (norm, limit, want) in
                [(4.0, 1.0, 1.0 / (4.0 + 1e-6)), (4.0, 8.0, 1.0), (4.0, 4.0, 1.0), (4.0, 0.0, 1.0), (0.0, 1.0, 1.0)]
            {
                close("factor", &[factor(dtype, 2.5, norm, limit, 1.0)], &[want], tol(dtype, 6e-8));
            }
            assert!(factor(dtype, 2.5, 1.84e19, 1.0, 0.5) > 0.0, "a norm whose square f32 can hold");
            for (loss, norm, before) in [
                (f64::NAN, 1.0, 1.0),
                (f64::INFINITY, 1.0, 1.0),
                (1.0, f64::NAN, 1.0),
                (1.0, f64::INFINITY, 1.0),
                (1.0, 1.85e19, 1.0),
                (1.0, 1.0, f64::NAN),
            ] {
                assert!(factor(dtype, loss, norm, 1.0, before).is_nan(), "loss {loss}, norm {norm}, before {before}");
            }
        }
    }

    #[test]
    fn a_factor_scales_the_gradient_and_nan_changes_nothing() {
        let n = 37;
        for dtype in FLOATS {
            // As if the gradient had been scaled before: the same bits.
            let run = |scaled: Option<f64>, by: Option<f64>| {
                let mut g = Padded::new(dtype, 1, n, 2, &random(1, n, 1.0));
                if let Some(alpha) = scaled {
                    crate::scale(alpha, g.mat_mut()).unwrap();
                }
                let mut x = [2, 3].map(|seed| Padded::new(dtype, 1, n, 1, &random(seed, n, 1.0)));
                let mut v = Padded::new(dtype, 1, n, 1, &vec![0.25; n]);
                let [p, m] = &mut x;
                match by {
                    None => adamw(&cfg(3), p.mat_mut(), g.mat(), m.mat_mut(), v.mat_mut()).unwrap(),
                    Some(by) => {
                        let by = one(dtype, by);
                        adamw_clipped(&cfg(3), by.mat(), p.mat_mut(), g.mat(), m.mat_mut(), v.mat_mut()).unwrap();
                    }
                }
                [p.get(), m.get(), v.get()].concat()
            };
            let start = [random(2, n, 1.0), random(3, n, 1.0), vec![0.25; n]].concat();
            assert_eq!(run(Some(0.3), None), run(None, Some(0.3)));
            assert_eq!(run(None, None), run(None, Some(1.0)));
            assert_ne!(run(None, None), start);
            for bad in [f64::NAN, f64::INFINITY] {
                assert_eq!(run(None, Some(bad)), start, "{bad}");
            }
        }
    }

    #[test]
    fn sums_and_finiteness_over_all_chunks() {
        for dtype in FLOATS {
            for (rows, cols, pad) in [(0, 3, 0), (1, 1, 0), (3, 33, 2), (1, 100_003, 0), (7, 40_000, 1)] {
                let x = random(3, rows * cols, 2.0);
                let mut px = Padded::new(dtype, rows, cols, pad, &x);
                close("Σ x²", &[sum_squares(px.mat()).unwrap()], &[dot(&x, &x)], 1e-12);
                let mut sum = Padded::poison(DType::F64, 1, 1, 0);
                sum_squares_into(px.mat(), sum.mat_mut()).unwrap();
                assert_eq!(sum.get(), [sum_squares(px.mat()).unwrap()]);
                assert!(all_finite(px.mat()).unwrap());
                for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                    for at in [0, x.len().wrapping_sub(1), x.len() / 2] {
                        if at < x.len() {
                            let mut y = x.clone();
                            y[at] = bad;
                            px = Padded::new(dtype, rows, cols, pad, &y);
                            assert!(!all_finite(px.mat()).unwrap(), "{bad} at {at} of {rows}×{cols}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn same_bits_for_any_number_of_threads() {
        let (n, g) = (100_003, random(4, 100_003, 1.0));
        same_bits("adamw", || {
            let mut x: [Padded; 3] = std::array::from_fn(|_| Padded::new(DType::F32, 1, n, 0, &vec![0.5; n]));
            let [p, m, v] = &mut x;
            let g = Padded::new(DType::F32, 1, n, 0, &g);
            adamw(&cfg(7), p.mat_mut(), g.mat(), m.mat_mut(), v.mat_mut()).unwrap();
            let mut out = p.get();
            out.push(sum_squares(g.mat()).unwrap());
            out
        });
    }
}
