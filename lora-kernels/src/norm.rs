#[cfg(feature = "cuda")]
pub(crate) mod cuda;

use crate::{
    Acc, Buffer, Device, Mat, MatMut, Result,
    elementwise::add_up,
    mat::HostMut,
    real::{Real, dispatch, simd},
    reduce::{put, rows_per_task, run, sum},
};

/// Layer normalisation (Ba et al. 2016, arXiv:1607.06450; PyTorch's `layer_norm`), row by row over n columns:
///
/// ```text
/// μ = Σ x / n    σ² = Σ (x − μ)² / n    y = (x − μ) / √(σ² + ε) · γ + β
/// ```
///
/// x, y [rows, n], γ, β [1, n]; `stats` [rows, 2] receives (μ, 1/√(σ² + ε)) for the backward pass. The mean is taken
/// twice, the second time of the centred row, so that a mean far larger than σ costs no digits. On a CUDA device the
/// statistics are f32 whatever the type of the rest.
///
/// # Panics
/// When the shapes or types differ.
pub fn layer_norm(x: Mat, gamma: Mat, beta: Mat, eps: f64, y: MatMut, stats: MatMut) -> Result<()> {
    let (rows, n) = (y.rows(), y.cols());
    assert_eq!((x.rows(), x.cols()), (rows, n), "layer_norm: x and y have one shape");
    assert_eq!((gamma.rows(), gamma.cols()), (1, n), "layer_norm: one γ per column");
    assert_eq!((beta.rows(), beta.cols()), (1, n), "layer_norm: one β per column");
    assert_eq!((stats.rows(), stats.cols()), (rows, 2), "layer_norm: two statistics per row");
    #[cfg(feature = "cuda")]
    if let Some(gpu) = y.gpu() {
        return cuda::forward(gpu, x, gamma, Some(beta), eps, y, stats);
    }
    dispatch!("layer_norm", y.dtype(), T => {
        let (x, gamma, beta) = (x.host::<T>(), gamma.host::<T>(), beta.host::<T>());
        let (gamma, beta) = (gamma.row(0), beta.row(0));
        let (step, eps, inv_n) = (rows_per_task(n), T::of(eps), T::of(1.0 / n as f64));
        let tasks = y.host::<T>().row_chunks(step).into_iter().zip(stats.host::<T>().row_chunks(step)).collect();
        run(tasks, |i, (mut y, mut stats)| simd(#[inline(always)] || {
            for r in 0..y.rows {
                let (x, y) = (&x.row(i * step + r)[..n], &mut y.row_mut(r)[..n]);
                let mean = sum([x], #[inline(always)] |[x]| x) * inv_n;
                let d = sum([x], #[inline(always)] |[x]| x - mean) * inv_n;
                let var = sum([x], #[inline(always)] |[x]| ((x - mean) - d) * ((x - mean) - d)) * inv_n;
                let rstd = T::ONE / Real::sqrt(var + eps);
                let (gamma, beta) = (&gamma[..n], &beta[..n]);
                for j in 0..n {
                    y[j] = (((x[j] - mean) - d) * rstd).mul_add(gamma[j], beta[j]);
                }
                stats.row_mut(r).copy_from_slice(&[mean, rstd]);
            }
        }));
        Ok(())
    })
}

/// The backward pass of [`layer_norm`]. With x̂ = (x − μ)/√(σ² + ε) and g = dy·γ, row by row,
///
/// ```text
/// dx = (g − mean(g) − x̂ · mean(g·x̂)) / √(σ² + ε)    dγ = Σ_rows dy·x̂    dβ = Σ_rows dy
/// ```
///
/// On a CUDA device dγ and dβ may be f32 whatever the type of the rest.
///
/// # Panics
/// When the shapes or types differ.
pub fn layer_norm_backward(
    x: Mat,
    gamma: Mat,
    stats: Mat,
    dy: Mat,
    dx: Option<Acc>,
    dgamma: Option<Acc>,
    dbeta: Option<Acc>,
) -> Result<()> {
    let (rows, n) = (x.rows(), x.cols());
    assert_eq!((dy.rows(), dy.cols()), (rows, n), "layer_norm_backward: x and dy have one shape");
    assert_eq!((gamma.rows(), gamma.cols()), (1, n), "layer_norm_backward: one γ per column");
    assert_eq!((stats.rows(), stats.cols()), (rows, 2), "layer_norm_backward: two statistics per row");
    #[cfg(feature = "cuda")]
    if let Some(gpu) = x.gpu() {
        return cuda::backward(gpu, true, x, gamma, stats, dy, dx, [dgamma, dbeta]);
    }
    dispatch!("layer_norm_backward", x.dtype(), T => {
        let (x, gamma, stats, dy) = (x.host::<T>(), gamma.host::<T>(), stats.host::<T>(), dy.host::<T>());
        let (gamma, inv_n) = (gamma.row(0), T::of(1.0 / n as f64));
        let outputs = Outputs::new(rows, n, dx, [dgamma, dbeta]);
        outputs.fill::<T>(#[inline(always)] |r, beta, dx, [dgamma, dbeta]| {
            let (x, dy, gamma) = (&x.row(r)[..n], &dy.row(r)[..n], &gamma[..n]);
            let (mean, rstd) = (stats.row(r)[0], stats.row(r)[1]);
            // What the stored mean, rounded to the type, is off.
            let d = if dx.is_some() || dgamma.is_some() {
                sum([x], #[inline(always)] |[x]| x - mean) * inv_n
            } else {
                T::ZERO
            };
            if let Some(dx) = dx {
                let g = sum([dy, gamma], #[inline(always)] |[dy, gamma]| dy * gamma) * inv_n;
                let gx = sum([x, dy, gamma], #[inline(always)] |[x, dy, gamma]| dy * gamma * ((x - mean) - d));
                let k = gx * inv_n * rstd * rstd;
                put(&mut dx[..n], beta, #[inline(always)] |j| {
                    (dy[j] * gamma[j] - g - ((x[j] - mean) - d) * k) * rstd
                });
            }
            if let Some(to) = dgamma {
                put(&mut to[..n], T::ONE, #[inline(always)] |j| dy[j] * (((x[j] - mean) - d) * rstd));
            }
            if let Some(to) = dbeta {
                put(&mut to[..n], T::ONE, #[inline(always)] |j| dy[j]);
            }
        })
    })
}

/// Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467), row by row over n columns:
/// `y = x / √(Σ x² / n + ε) · γ`. x, y [rows, n], γ [1, n]; `stats` [rows, 1] receives 1/√(…) for the backward pass, on a
/// CUDA device as f32.
///
/// # Panics
/// When the shapes or types differ.
pub fn rms_norm(x: Mat, gamma: Mat, eps: f64, y: MatMut, stats: MatMut) -> Result<()> {
    let (rows, n) = (y.rows(), y.cols());
    assert_eq!((x.rows(), x.cols()), (rows, n), "rms_norm: x and y have one shape");
    assert_eq!((gamma.rows(), gamma.cols()), (1, n), "rms_norm: one γ per column");
    assert_eq!((stats.rows(), stats.cols()), (rows, 1), "rms_norm: one statistic per row");
    #[cfg(feature = "cuda")]
    if let Some(gpu) = y.gpu() {
        return cuda::forward(gpu, x, gamma, None, eps, y, stats);
    }
    dispatch!("rms_norm", y.dtype(), T => {
        let (x, gamma) = (x.host::<T>(), gamma.host::<T>());
        let gamma = gamma.row(0);
        let (step, eps, inv_n) = (rows_per_task(n), T::of(eps), T::of(1.0 / n as f64));
        let tasks = y.host::<T>().row_chunks(step).into_iter().zip(stats.host::<T>().row_chunks(step)).collect();
        run(tasks, |i, (mut y, mut stats)| simd(#[inline(always)] || {
            for r in 0..y.rows {
                let (x, y, gamma) = (&x.row(i * step + r)[..n], &mut y.row_mut(r)[..n], &gamma[..n]);
                let scale = T::ONE / Real::sqrt(sum([x], #[inline(always)] |[x]| x * x) * inv_n + eps);
                for j in 0..n {
                    y[j] = x[j] * scale * gamma[j];
                }
                stats.row_mut(r)[0] = scale;
            }
        }));
        Ok(())
    })
}

/// The backward pass of [`rms_norm`]. With s = 1/√(Σ x² / n + ε) and g = dy·γ, row by row,
/// `dx = s·(g − x·s²·mean(g·x))` and `dγ = Σ_rows dy·x·s`. On a CUDA device dγ may be f32 whatever the type of the rest.
///
/// # Panics
/// When the shapes or types differ.
pub fn rms_norm_backward(x: Mat, gamma: Mat, stats: Mat, dy: Mat, dx: Option<Acc>, dgamma: Option<Acc>) -> Result<()> {
    let (rows, n) = (x.rows(), x.cols());
    assert_eq!((dy.rows(), dy.cols()), (rows, n), "rms_norm_backward: x and dy have one shape");
    assert_eq!((gamma.rows(), gamma.cols()), (1, n), "rms_norm_backward: one γ per column");
    assert_eq!((stats.rows(), stats.cols()), (rows, 1), "rms_norm_backward: one statistic per row");
    #[cfg(feature = "cuda")]
    if let Some(gpu) = x.gpu() {
        return cuda::backward(gpu, false, x, gamma, stats, dy, dx, [dgamma, None]);
    }
    dispatch!("rms_norm_backward", x.dtype(), T => {
        let (x, gamma, stats, dy) = (x.host::<T>(), gamma.host::<T>(), stats.host::<T>(), dy.host::<T>());
        let (gamma, inv_n) = (gamma.row(0), T::of(1.0 / n as f64));
        let outputs = Outputs::new(rows, n, dx, [dgamma, None]);
        outputs.fill::<T>(#[inline(always)] |r, beta, dx, [dgamma, _]| {
            let (x, dy, gamma, s) = (&x.row(r)[..n], &dy.row(r)[..n], &gamma[..n], stats.row(r)[0]);
            if let Some(dx) = dx {
                let gx = sum([x, dy, gamma], #[inline(always)] |[x, dy, gamma]| dy * gamma * x);
                // Taken in this order nothing leaves the range of f32 before the result does.
                let k = gx * s * inv_n * s;
                put(&mut dx[..n], beta, #[inline(always)] |j| (dy[j] * gamma[j] - x[j] * k) * s);
            }
            if let Some(to) = dgamma {
                put(&mut to[..n], T::ONE, #[inline(always)] |j| dy[j] * (x[j] * s));
            }
        })
    })
}

/// Where a norm's backward pass writes: dx row by row, and sums over the rows, taken within fixed chunks of rows and
/// then over the chunks in order.
struct Outputs<'a> {
    rows: usize,
    cols: usize,
    dx: Option<Acc<'a>>,
    sums: [Option<Acc<'a>>; 2],
}

/// One row of dx and the running sums, each where it was asked for.
type Row<'r, T> = (Option<&'r mut [T]>, [Option<&'r mut [T]>; 2]);

impl<'a> Outputs<'a> {
    fn new(rows: usize, cols: usize, dx: Option<Acc<'a>>, sums: [Option<Acc<'a>>; 2]) -> Self {
        if let Some(dx) = &dx {
            assert_eq!((dx.to.rows(), dx.to.cols()), (rows, cols), "norm: dx has the shape of x");
        }
        for s in sums.iter().flatten() {
            assert_eq!((s.to.rows(), s.to.cols()), (1, cols), "norm: one sum per column");
        }
        Outputs { rows, cols, dx, sums }
    }

    /// Calls `f(row, β of dx, its row of dx, sums)` for every row.
    fn fill<T: Real>(self, f: impl Fn(usize, T, Option<&mut [T]>, [Option<&mut [T]>; 2]) + Sync) -> Result<()> {
        let Outputs { rows, cols, dx, sums } = self;
        // At least 16 rows, because each chunk's sums are written and read once more; not many, because a long sum in
        // f32 loses digits.
        let step = rows_per_task(cols).clamp(16, 256);
        let chunks = rows.div_ceil(step);
        let beta = T::of(dx.as_ref().map_or(0.0, |dx| dx.beta));
        let mut dx = dx.map(|dx| dx.to.host::<T>().row_chunks(step).into_iter());
        let mut scratch = Buffer::empty(&Device::Cpu, T::DTYPE, sums.iter().flatten().count() * chunks * cols)?;
        let mut rest = scratch.host_mut::<T>();
        let mut partial = sums.each_ref().map(|s| {
            s.as_ref().map(|_| {
                let (mine, others) = std::mem::take(&mut rest).split_at_mut(chunks * cols);
                rest = others;
                HostMut::from_slice(mine, chunks, cols)
            })
        });
        let mut chunk_sums = partial.each_mut().map(|p| p.as_mut().map(|p| p.reborrow().row_chunks(1).into_iter()));
        let tasks = (0..chunks)
            .map(|_| {
                let sums = chunk_sums.each_mut().map(|s| s.as_mut().and_then(Iterator::next));
                (dx.as_mut().and_then(Iterator::next), sums)
            })
            .collect();
        run(tasks, |i, (mut dx, mut sums): (Option<HostMut<T>>, [Option<HostMut<T>>; 2])| {
            simd(
                #[inline(always)]
                || {
                    for s in sums.iter_mut().flatten() {
                        s.row_mut(0).fill(T::ZERO);
                    }
                    for r in 0..step.min(rows - i * step) {
                        let (dx, sums): Row<T> = (
                            dx.as_mut().map(|dx| dx.row_mut(r)),
                            sums.each_mut().map(|s| s.as_mut().map(|s| s.row_mut(0))),
                        );
                        f(i * step + r, beta, dx, sums);
                    }
                },
            );
        });
        for (partial, to) in partial.iter().zip(sums) {
            if let (Some(partial), Some(to)) = (partial, to) {
                add_up(partial, to);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, testing::*};

    /// Which norm a test runs.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Kind {
        Layer,
        Rms,
    }
    use Kind::{Layer, Rms};

    const EPS: f64 = 1e-5;

    /// Inputs of one test. An RMS norm ignores β.
    struct Case {
        rows: usize,
        n: usize,
        x: Vec<f64>,
        gamma: Vec<f64>,
        beta: Vec<f64>,
        dy: Vec<f64>,
    }

    fn case(rows: usize, n: usize, mean: f32, scale: f32) -> Case {
        let x = random(1, rows * n, scale).iter().map(|v| f64::from(*v as f32 + mean)).collect();
        Case { rows, n, x, gamma: random(2, n, 2.0), beta: random(3, n, 1.0), dy: random(4, rows * n, 1.0) }
    }

    /// y by plain loops in f64.
    fn oracle(kind: Kind, c: &Case) -> Vec<f64> {
        let n = c.n as f64;
        let row = |x: &[f64]| -> Vec<f64> {
            let mean = if kind == Layer { x.iter().sum::<f64>() / n } else { 0.0 };
            let scale = (x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n + EPS).sqrt();
            let shift = |j: usize| if kind == Layer { c.beta[j] } else { 0.0 };
            x.iter().enumerate().map(|(j, x)| (x - mean) / scale * c.gamma[j] + shift(j)).collect()
        };
        c.x.chunks(c.n.max(1)).flat_map(row).collect()
    }

    /// y and the statistics.
    fn forward(kind: Kind, c: &Case, dtype: DType, pad: usize) -> (Padded, Padded) {
        let width = if kind == Layer { 2 } else { 1 };
        let (x, gamma, beta) = (
            Padded::new(dtype, c.rows, c.n, pad, &c.x),
            Padded::new(dtype, 1, c.n, 0, &c.gamma),
            Padded::new(dtype, 1, c.n, 0, &c.beta),
        );
        let (mut y, mut stats) = (Padded::poison(dtype, c.rows, c.n, pad), Padded::poison(dtype, c.rows, width, pad));
        match kind {
            Layer => layer_norm(x.mat(), gamma.mat(), beta.mat(), EPS, y.mat_mut(), stats.mat_mut()).unwrap(),
            Rms => rms_norm(x.mat(), gamma.mat(), EPS, y.mat_mut(), stats.mat_mut()).unwrap(),
        }
        (y, stats)
    }

    /// dx, dγ, dβ: those that are asked for, added to β times something.
    fn backward(kind: Kind, c: &Case, dtype: DType, pad: usize, beta: f64, ask: [bool; 3]) -> [Vec<f64>; 3] {
        let stats = forward(kind, c, dtype, 0).1;
        let (x, gamma, dy) = (
            Padded::new(dtype, c.rows, c.n, pad, &c.x),
            Padded::new(dtype, 1, c.n, 0, &c.gamma),
            Padded::new(dtype, c.rows, c.n, pad, &c.dy),
        );
        let mut dx = Padded::target(dtype, c.rows, c.n, pad, beta, &c.x);
        let mut dgamma = Padded::target(dtype, 1, c.n, pad, beta, &c.gamma);
        let mut dbeta = Padded::target(dtype, 1, c.n, pad, beta, &c.beta);
        let (x, gamma, stats, dy) = (x.mat(), gamma.mat(), stats.mat(), dy.mat());
        let (to_x, to_gamma) = (ask[0].then(|| dx.acc(beta)), ask[1].then(|| dgamma.acc(beta)));
        match kind {
            Layer => {
                let to_beta = ask[2].then(|| dbeta.acc(beta));
                layer_norm_backward(x, gamma, stats, dy, to_x, to_gamma, to_beta).unwrap();
            }
            Rms => rms_norm_backward(x, gamma, stats, dy, to_x, to_gamma).unwrap(),
        }
        [dx.get(), dgamma.get(), dbeta.get()]
    }

    #[test]
    fn equal_their_formulas() {
        for kind in [Layer, Rms] {
            for (rows, mean, scale) in [(1, 0.0, 1.0), (45, 0.5, 3.0), (3, 1000.0, 1.0), (2, 0.0, 1e4), (2, 7.0, 0.0)] {
                for n in SIZES {
                    let c = case(rows, n, mean, scale + f32::MIN_POSITIVE);
                    let want = oracle(kind, &c);
                    for (dtype, pad) in [(DType::F32, 0), (DType::F32, 3), (DType::F64, 2)] {
                        let what = format!("{kind:?} {rows}×{n}, mean {mean}, {dtype:?}");
                        close(&what, &forward(kind, &c, dtype, pad).0.get(), &want, tol(dtype, 1e-6).max(1e-10));
                    }
                }
            }
        }
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        for kind in [Layer, Rms] {
            for (rows, n) in [(1, 1), (3, 7), (18, 8), (2, 33)] {
                let c = case(rows, n, 0.5, 1.0);
                let loss = |x: &[f64], gamma: &[f64], beta: &[f64]| {
                    let (x, gamma, beta) = (x.to_vec(), gamma.to_vec(), beta.to_vec());
                    dot(&forward(kind, &Case { x, gamma, beta, dy: vec![], ..c }, DType::F64, 0).0.get(), &c.dy)
                };
                let want = [
                    slopes(&c.x, |x| loss(x, &c.gamma, &c.beta)),
                    slopes(&c.gamma, |g| loss(&c.x, g, &c.beta)),
                    slopes(&c.beta, |b| loss(&c.x, &c.gamma, b)),
                ];
                for beta in [0.0, 1.0] {
                    let got = backward(kind, &c, DType::F64, 1, beta, [true; 3]);
                    let names = if kind == Layer { &["dx", "dγ", "dβ"][..] } else { &["dx", "dγ"] };
                    for ((what, got), (want, old)) in
                        names.iter().zip(&got).zip(want.iter().zip([&c.x, &c.gamma, &c.beta]))
                    {
                        close(&format!("{kind:?} {what}"), got, &accumulated(want, beta, old), 1e-7);
                    }
                }
            }
        }
    }

    #[test]
    fn single_precision_follows_double_and_each_output_stands_alone() {
        for kind in [Layer, Rms] {
            for (rows, n, mean) in [(129, 768, 0.1), (100, 31, 0.0), (3, 1100, 1000.0), (0, 8, 0.0)] {
                let c = case(rows, n, mean, 1.0);
                for beta in [0.0, 1.0] {
                    let want = backward(kind, &c, DType::F64, 0, beta, [true; 3]);
                    let all = backward(kind, &c, DType::F32, 3, beta, [true; 3]);
                    for k in 0..if kind == Layer { 3 } else { 2 } {
                        close(&format!("{kind:?} {rows}×{n} output {k}"), &all[k], &want[k], 5e-6);
                        let alone = backward(kind, &c, DType::F32, 3, beta, std::array::from_fn(|i| i == k));
                        close("alone", &alone[k], &all[k], 1e-6);
                    }
                }
            }
        }
    }

    #[test]
    fn same_bits_for_any_number_of_threads() {
        let c = case(300, 129, 0.5, 1.0);
        for kind in [Layer, Rms] {
            same_bits("forward", || forward(kind, &c, DType::F32, 0).0.get());
            same_bits("backward", || backward(kind, &c, DType::F32, 0, 1.0, [true; 3]).concat());
        }
    }
}
