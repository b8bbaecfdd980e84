use crate::{
    Acc, Buffer, Device, Mat, MatMut, Result,
    elementwise::add_up,
    mat::HostMut,
    real::{Real, dispatch, simd},
    reduce::{put, rows_per_task, run, sum, sums},
};

/// Layer normalisation (Ba et al. 2016, arXiv:1607.06450; PyTorch's `layer_norm`), row by row over n columns:
///
/// ```text
/// μ = Σ x / n    σ² = Σ (x − μ)² / n    y = (x − μ) / √(σ² + ε) · γ + β
/// ```
///
/// x, y [rows, n], γ, β [1, n]; `stats` [rows, 2] receives (μ, 1/√(σ² + ε)) for the backward pass. The mean is taken
/// twice, the second time of the centred row, so that a mean far larger than σ costs no digits.
///
/// # Panics
/// When the shapes or types differ.
pub fn layer_norm(x: Mat, gamma: Mat, beta: Mat, eps: f64, y: MatMut, stats: MatMut) -> Result<()> {
    let (rows, n) = (y.rows(), y.cols());
    assert_eq!((x.rows(), x.cols()), (rows, n), "layer_norm: x and y have one shape");
    assert_eq!((gamma.rows(), gamma.cols()), (1, n), "layer_norm: one γ per column");
    assert_eq!((beta.rows(), beta.cols()), (1, n), "layer_norm: one β per column");
    assert_eq!((stats.rows(), stats.cols()), (rows, 2), "layer_norm: two statistics per row");
    dispatch!("layer_norm", y.dtype(), T => {
        let (x, gamma, beta) = (x.host::<T>(), gamma.host::<T>(), beta.host::<T>());
        let (gamma, beta) = (gamma.row(0), beta.row(0));
        let (step, eps, inv_n) = (rows_per_task(n), T::of(eps), T::of(1.0 / n as f64));
        let tasks = y.host::<T>().row_chunks(step).into_iter().zip(stats.host::<T>().row_chunks(step)).collect();
        run(tasks, |i, (mut y, mut stats)| simd(#[inline(always)] || {
            for r in 0..y.rows {
                let (x, y) = (&x.row(i * step + r)[..n], &mut y.row_mut(r)[..n]);
                let mean = sum(x, #[inline(always)] |x| x) * inv_n;
                let [d, d2] = sums([x], #[inline(always)] |[x]| [x - mean, (x - mean) * (x - mean)]);
                let d = d * inv_n;
                let rstd = T::ONE / ((d2 * inv_n - d * d).max(T::ZERO) + eps).sqrt();
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
    dispatch!("layer_norm_backward", x.dtype(), T => {
        let (x, gamma, stats, dy) = (x.host::<T>(), gamma.host::<T>(), stats.host::<T>(), dy.host::<T>());
        let (gamma, inv_n) = (gamma.row(0), T::of(1.0 / n as f64));
        let outputs = Outputs::new(rows, n, dx, [dgamma, dbeta]);
        outputs.fill::<T>(#[inline(always)] |r, beta, dx, [dgamma, dbeta]| {
            let (x, dy, gamma) = (&x.row(r)[..n], &dy.row(r)[..n], &gamma[..n]);
            let (mean, rstd) = (stats.row(r)[0], stats.row(r)[1]);
            // What the stored mean, rounded to the type, is off.
            let mut d = T::ZERO;
            if let Some(dx) = dx {
                let [c, g, gc] = sums([x, dy, gamma], #[inline(always)] |[x, dy, gamma]| {
                    let (c, g) = (x - mean, dy * gamma);
                    [c, g, g * c]
                });
                d = c * inv_n;
                let (g, gx) = (g * inv_n, (gc - d * g) * inv_n * rstd);
                let k = gx * rstd;
                put(&mut dx[..n], beta, #[inline(always)] |j| {
                    (dy[j] * gamma[j] - g - ((x[j] - mean) - d) * k) * rstd
                });
            } else if dgamma.is_some() {
                d = sum(x, #[inline(always)] |x| x - mean) * inv_n;
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
/// `y = x / √(Σ x² / n + ε) · γ`. x, y [rows, n], γ [1, n]; `stats` [rows, 1] receives 1/√(…) for the backward pass.
///
/// # Panics
/// When the shapes or types differ.
pub fn rms_norm(x: Mat, gamma: Mat, eps: f64, y: MatMut, stats: MatMut) -> Result<()> {
    let (rows, n) = (y.rows(), y.cols());
    assert_eq!((x.rows(), x.cols()), (rows, n), "rms_norm: x and y have one shape");
    assert_eq!((gamma.rows(), gamma.cols()), (1, n), "rms_norm: one γ per column");
    assert_eq!((stats.rows(), stats.cols()), (rows, 1), "rms_norm: one statistic per row");
    dispatch!("rms_norm", y.dtype(), T => {
        let (x, gamma) = (x.host::<T>(), gamma.host::<T>());
        let gamma = gamma.row(0);
        let (step, eps, inv_n) = (rows_per_task(n), T::of(eps), T::of(1.0 / n as f64));
        let tasks = y.host::<T>().row_chunks(step).into_iter().zip(stats.host::<T>().row_chunks(step)).collect();
        run(tasks, |i, (mut y, mut stats)| simd(#[inline(always)] || {
            for r in 0..y.rows {
                let (x, y, gamma) = (&x.row(i * step + r)[..n], &mut y.row_mut(r)[..n], &gamma[..n]);
                let scale = T::ONE / (sum(x, #[inline(always)] |x| x * x) * inv_n + eps).sqrt();
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
/// `dx = s·(g − x·s²·mean(g·x))` and `dγ = Σ_rows dy·x·s`.
///
/// # Panics
/// When the shapes or types differ.
pub fn rms_norm_backward(
    x: Mat,
    gamma: Mat,
    stats: Mat,
    dy: Mat,
    dx: Option<Acc>,
    dgamma: Option<Acc>,
) -> Result<()> {
    let (rows, n) = (x.rows(), x.cols());
    assert_eq!((dy.rows(), dy.cols()), (rows, n), "rms_norm_backward: x and dy have one shape");
    assert_eq!((gamma.rows(), gamma.cols()), (1, n), "rms_norm_backward: one γ per column");
    assert_eq!((stats.rows(), stats.cols()), (rows, 1), "rms_norm_backward: one statistic per row");
    dispatch!("rms_norm_backward", x.dtype(), T => {
        let (x, gamma, stats, dy) = (x.host::<T>(), gamma.host::<T>(), stats.host::<T>(), dy.host::<T>());
        let (gamma, inv_n) = (gamma.row(0), T::of(1.0 / n as f64));
        let outputs = Outputs::new(rows, n, dx, [dgamma, None]);
        outputs.fill::<T>(#[inline(always)] |r, beta, dx, [dgamma, _]| {
            let (x, dy, gamma, s) = (&x.row(r)[..n], &dy.row(r)[..n], &gamma[..n], stats.row(r)[0]);
            if let Some(dx) = dx {
                let [gx] = sums([x, dy, gamma], #[inline(always)] |[x, dy, gamma]| [dy * gamma * x]);
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
        // The running sums are written once per chunk and read once more at the end: at least 16 rows keep that cheap.
        let step = rows_per_task(cols).max(16);
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
