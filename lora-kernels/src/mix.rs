#[cfg(feature = "cuda")]
pub(crate) mod cuda;

use crate::{
    Acc, Buffer, Mat, MatMut, Result,
    mat::{HostMat, HostMut},
    real::{Real, dispatch, simd},
    reduce::{max, put, rows_per_task, run, sum},
};

/// Attention of each row over a few candidates of its own: for row i of n and candidate c of C,
/// ```text
/// s_ic = q_i·z_ci        p_i = softmax(s_i)        y_i = Σ_c p_ic·z_ci
/// ```
/// q, y: [n, d]; z: [C·n, d], the rows of candidate 0 first, so that z_ci is row c·n + i; probs: [n, C], the p that
/// [`mix_backward`] needs, in the [`accumulator`](crate::DType::accumulator) of z's type. Source: Pfeiffer et al.,
/// "AdapterFusion: non-destructive task composition for transfer learning", 2021, section 3.2.
///
/// # Panics
/// When the shapes or types do not fit.
pub fn mix(q: Mat, z: Mat, probs: MatMut, y: MatMut) -> Result<()> {
    check("mix", q, z, probs.as_mat(), y.as_mat());
    #[cfg(feature = "cuda")]
    if let Some(gpu) = y.gpu() {
        return cuda::mix(gpu, q, z, probs, y);
    }
    dispatch!("mix", y.dtype(), T => {
        let (z, mut probs) = (z.host::<T>(), probs.host::<T>());
        scores(q.host(), z, probs.reborrow(), |_, s| {
            let m = max(s);
            let mut total = T::ZERO;
            for s in s.iter_mut() {
                *s = (*s - m).exp();
                total += *s;
            }
            for s in s.iter_mut() {
                *s /= total;
            }
        });
        weighted(&probs, z, Acc { to: y, beta: 0.0 });
        Ok(())
    })
}

/// Gradients of [`mix`] from dy = ∂loss/∂y and what the forward pass was given and gave:
/// ```text
/// g_ic = p_ic·(dy_i·z_ci − Σ_c' p_ic'·dy_i·z_c'i)        ∂loss/∂s
/// dq_i = Σ_c g_ic·z_ci        dz_ci = p_ic·dy_i + g_ic·q_i
/// ```
/// Shapes as there.
///
/// # Panics
/// When the shapes or types do not fit.
pub fn mix_backward(q: Mat, z: Mat, probs: Mat, dy: Mat, dq: Option<Acc>, dz: Option<Acc>) -> Result<()> {
    check("mix_backward", q, z, probs, dy);
    for (d, like) in [(&dq, q), (&dz, z)] {
        let same = d.as_ref().is_none_or(|d| (d.to.rows(), d.to.cols()) == (like.rows(), like.cols()));
        assert!(same, "mix_backward: a gradient is as large as its value");
    }
    #[cfg(feature = "cuda")]
    if let Some(gpu) = dy.gpu() {
        return cuda::mix_backward(gpu, q, z, probs, dy, dq, dz);
    }
    dispatch!("mix_backward", dy.dtype(), T => {
        let (n, many) = (probs.rows(), probs.cols());
        let (q, z, p, dy) = (q.host::<T>(), z.host::<T>(), probs.host::<T>(), dy.host::<T>());
        let mut slopes = Buffer::empty(probs.device(), probs.dtype(), n * many)?;
        let mut g = HostMut::from_slice(slopes.host_mut::<T>(), n, many);
        scores(dy, z, g.reborrow(), |i, s| {
            let p = p.row(i);
            let mean = sum([p, s], #[inline(always)] |[p, s]| p * s);
            for (s, &p) in s.iter_mut().zip(p) {
                *s = p * (*s - mean);
            }
        });
        if let Some(dq) = dq {
            weighted(&g, z, dq);
        }
        if let Some(Acc { to, beta }) = dz {
            let (beta, step) = (T::of(beta), rows_per_task(z.cols));
            run(to.host::<T>().row_chunks(step), |task, mut dz| simd(#[inline(always)] || {
                for r in 0..dz.rows {
                    let (c, i) = ((task * step + r) / n, (task * step + r) % n);
                    let (p, g, q, dy) = (p.row(i)[c], g.row(i)[c], q.row(i), dy.row(i));
                    put(dz.row_mut(r), beta, #[inline(always)] |j| dy[j].mul_add(p, q[j] * g));
                }
            }));
        }
        Ok(())
    })
}

fn check(kernel: &str, q: Mat, z: Mat, probs: Mat, y: Mat) {
    let (n, d, many) = (q.rows(), q.cols(), probs.cols());
    assert!(many > 0, "{kernel}: at least one candidate");
    assert_eq!((y.rows(), y.cols()), (n, d), "{kernel}: q and y are alike");
    assert_eq!((z.rows(), z.cols()), (many * n, d), "{kernel}: a row for each candidate of each row");
    assert_eq!(probs.rows(), n, "{kernel}: a row of probabilities for each row");
}

/// to_ic = a_i·z_ci, and what `finish` then makes of row i.
fn scores<T: Real>(a: HostMat<T>, z: HostMat<T>, to: HostMut<T>, finish: impl Fn(usize, &mut [T]) + Sync) {
    let n = a.rows;
    let step = rows_per_task(a.cols * to.cols);
    run(to.row_chunks(step), |task, mut to| {
        simd(
            #[inline(always)]
            || {
                for r in 0..to.rows {
                    let i = task * step + r;
                    let row = to.row_mut(r);
                    for (c, s) in row.iter_mut().enumerate() {
                        *s = sum(
                            [a.row(i), z.row(c * n + i)],
                            #[inline(always)]
                            |[a, z]| a * z,
                        );
                    }
                    finish(i, row);
                }
            },
        );
    });
}

/// to_i = Σ_c w_ic·z_ci + β·to_i.
fn weighted<T: Real>(w: &HostMut<T>, z: HostMat<T>, Acc { to, beta }: Acc) {
    let n = w.rows;
    let (beta, step) = (T::of(beta), rows_per_task(z.cols * w.cols));
    run(to.host::<T>().row_chunks(step), |task, mut to| {
        simd(
            #[inline(always)]
            || {
                for r in 0..to.rows {
                    let i = task * step + r;
                    for (c, &w) in w.row(i).iter().enumerate() {
                        let z = z.row(c * n + i);
                        let beta = if c == 0 { beta } else { T::ONE };
                        put(
                            to.row_mut(r),
                            beta,
                            #[inline(always)]
                            |j| w * z[j],
                        );
                    }
                }
            },
        );
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, testing::*};

    /// p and y by plain loops in f64.
    fn oracle(q: &[f64], z: &[f64], n: usize, many: usize, d: usize) -> (Vec<f64>, Vec<f64>) {
        let (mut probs, mut y) = (Vec::new(), vec![0.0; n * d]);
        for i in 0..n {
            let s: Vec<f64> = (0..many).map(|c| (0..d).map(|j| q[i * d + j] * z[(c * n + i) * d + j]).sum()).collect();
            let m = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = s.iter().map(|s| (s - m).exp()).sum();
            for (c, s) in s.iter().enumerate() {
                let p = (s - m).exp() / total;
                probs.push(p);
                for j in 0..d {
                    y[i * d + j] += p * z[(c * n + i) * d + j];
                }
            }
        }
        (probs, y)
    }

    const SHAPES: [(usize, usize, usize); 6] = [(0, 2, 3), (1, 1, 1), (5, 1, 8), (4, 3, 7), (33, 2, 40), (70, 5, 1030)];

    #[test]
    fn mixtures_equal_their_formulas() {
        for (n, many, d) in SHAPES {
            let (q, z) = (random(1, n * d, 1.0), random(2, many * n * d, 1.0));
            let (probs, want) = oracle(&q, &z, n, many, d);
            for (dtype, pad) in [(DType::F32, 0), (DType::F64, 3)] {
                let (pq, pz) = (Padded::new(dtype, n, d, pad, &q), Padded::new(dtype, many * n, d, pad, &z));
                let (mut p, mut y) = (Padded::poison(dtype, n, many, pad), Padded::poison(dtype, n, d, pad));
                mix(pq.mat(), pz.mat(), p.mat_mut(), y.mat_mut()).unwrap();
                close(&format!("p of {n}, {many}, {d}"), &p.get(), &probs, tol(dtype, 2e-5));
                close(&format!("y of {n}, {many}, {d}"), &y.get(), &want, tol(dtype, 2e-5));
            }
        }
    }

    /// dq and dz.
    fn gradients(dtype: DType, (n, many, d): (usize, usize, usize), beta: f64) -> [Vec<f64>; 2] {
        let (q, z, dy) = (random(1, n * d, 1.0), random(2, many * n * d, 1.0), random(3, n * d, 1.0));
        let old = random(4, (many + 1) * n * d, 1.0);
        let (pq, pz) = (Padded::new(dtype, n, d, 1, &q), Padded::new(dtype, many * n, d, 2, &z));
        let (mut p, mut y) = (Padded::poison(dtype, n, many, 0), Padded::poison(dtype, n, d, 0));
        mix(pq.mat(), pz.mat(), p.mat_mut(), y.mat_mut()).unwrap();
        let dy = Padded::new(dtype, n, d, 3, &dy);
        let mut dq = Padded::target(dtype, n, d, 1, beta, &old[..n * d]);
        let mut dz = Padded::target(dtype, many * n, d, 2, beta, &old[n * d..]);
        mix_backward(pq.mat(), pz.mat(), p.mat(), dy.mat(), Some(dq.acc(beta)), None).unwrap();
        mix_backward(pq.mat(), pz.mat(), p.mat(), dy.mat(), None, Some(dz.acc(beta))).unwrap();
        [dq.get(), dz.get()]
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        for shape in SHAPES {
            let (n, many, d) = shape;
            if n * d > 100 {
                continue;
            }
            let (q, z, dy) = (random(1, n * d, 1.0), random(2, many * n * d, 1.0), random(3, n * d, 1.0));
            let value = |q: &[f64], z: &[f64]| -> f64 {
                oracle(q, z, n, many, d).1.iter().zip(&dy).map(|(y, dy)| y * dy).sum()
            };
            let want = [slopes(&q, |q| value(q, &z)), slopes(&z, |z| value(&q, z))];
            let old = random(4, (many + 1) * n * d, 1.0);
            for beta in [0.0, 0.5] {
                for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::F64, 1e-8)] {
                    let got = gradients(dtype, shape, beta);
                    close("dq", &got[0], &accumulated(&want[0], beta, &old[..n * d]), tolerance);
                    close("dz", &got[1], &accumulated(&want[1], beta, &old[n * d..]), tolerance);
                }
            }
        }
    }

    #[test]
    fn same_bits_for_any_number_of_threads() {
        same_bits("mix", || gradients(DType::F32, (70, 5, 1030), 1.0).concat());
    }

    #[test]
    #[should_panic(expected = "mix: a row for each candidate of each row")]
    fn candidates_that_do_not_fit_are_refused() {
        let (q, z) = (Padded::poison(DType::F32, 2, 3, 0), Padded::poison(DType::F32, 5, 3, 0));
        let (mut p, mut y) = (Padded::poison(DType::F32, 2, 2, 0), Padded::poison(DType::F32, 2, 3, 0));
        mix(q.mat(), z.mat(), p.mat_mut(), y.mat_mut()).unwrap();
    }
}
