#[cfg(feature = "cuda")]
pub(crate) mod cuda;

use crate::{
    Acc, Buffer, Element, Mat, MatMut, Result,
    elementwise::add_up,
    mat::HostMut,
    real::{Real, dispatch, simd},
    reduce::{bounds, put, rows_per_task, run, sum},
};

/// Rows that one task of [`dot_columns`] adds up, times its columns.
const TILE: usize = 64 << 10;
/// Columns of one task of [`dot_columns`].
const TILE_COLS: usize = 512;
/// Rows that [`dot_columns`] adds up before they join a longer sum.
const SHORT: usize = 64;

/// `y[i, j] = x[i, j]·g[j] + β·y[i, j]`: every row by the same numbers, one for each column. x and y are [rows, n], g [1, n].
/// The gradient of x is the same of dy, that of g is [`dot_columns`] of dy and x.
///
/// # Panics
/// When the shapes or types differ.
pub fn scale_columns(x: Mat, g: Mat, y: Acc) -> Result<()> {
    let shape = (y.to.rows(), y.to.cols());
    assert!(
        (x.rows(), x.cols()) == shape && (g.rows(), g.cols()) == (1, shape.1),
        "scale_columns: one number per column"
    );
    #[cfg(feature = "cuda")]
    if let Some(gpu) = y.to.gpu() {
        return cuda::scale_columns(gpu, x, g, y);
    }
    dispatch!("scale_columns", y.to.dtype(), T => {
        let (x, g) = (x.host::<T>(), g.host::<T>());
        let (g, beta, step) = (g.row(0), T::of(y.beta), rows_per_task(x.cols));
        run(y.to.host::<T>().row_chunks(step), |task, mut y| simd(#[inline(always)] || {
            for r in 0..y.rows {
                let (x, y) = (x.row(task * step + r), y.row_mut(r));
                let (x, g) = (&x[..y.len()], &g[..y.len()]);
                put(y, beta, #[inline(always)] |j| x[j] * g[j]);
            }
        }));
        Ok(())
    })
}

/// `d[j] = Σᵢ a[i, j]·b[i, j] + β·d[j]`: the products of the columns of two matrices [rows, n]; d is [1, n].
///
/// Rows are added within fixed tiles, the tiles in order. On a CUDA device the sums are taken in f32, and d may be f32
/// whatever the type of a and b.
///
/// # Panics
/// When the shapes differ, or on the CPU the types.
pub fn dot_columns(a: Mat, b: Mat, d: Acc) -> Result<()> {
    assert!((a.rows(), a.cols()) == (b.rows(), b.cols()), "dot_columns: two matrices of one shape");
    assert_eq!((1, a.cols()), (d.to.rows(), d.to.cols()), "dot_columns: one product per column");
    #[cfg(feature = "cuda")]
    if let Some(gpu) = a.gpu() {
        return cuda::dot_columns(gpu, a, b, d);
    }
    dispatch!("dot_columns", a.dtype(), T => {
        let (a, b) = (a.host::<T>(), b.host::<T>());
        let cols = bounds(a.cols, TILE_COLS);
        let rows = bounds(a.rows, TILE / a.cols.clamp(1, TILE_COLS));
        let mut partial = Buffer::empty(d.to.device(), T::DTYPE, (rows.len() - 1) * a.cols)?;
        let mut partial = HostMut::from_slice(partial.host_mut::<T>(), rows.len() - 1, a.cols);
        let each_row: Vec<usize> = (0..rows.len()).collect();
        run(partial.reborrow().grid(&each_row, &cols), |i, mut acc| {
            let (r, c) = (i / (cols.len() - 1), i % (cols.len() - 1));
            let [a, b] = [a, b].map(|m| m.block(rows[r]..rows[r + 1], cols[c]..cols[c + 1]));
            let acc = acc.row_mut(0);
            acc.fill(T::ZERO);
            let n = acc.len();
            simd(#[inline(always)] || {
                // Short sums first: a long one in f32 loses digits.
                let mut short = [T::ZERO; TILE_COLS];
                let short = &mut short[..n];
                for first in (0..a.rows).step_by(SHORT) {
                    short.fill(T::ZERO);
                    for r in first..(first + SHORT).min(a.rows) {
                        let (a, b) = (&a.row(r)[..n], &b.row(r)[..n]);
                        for j in 0..n {
                            short[j] = a[j].mul_add(b[j], short[j]);
                        }
                    }
                    for j in 0..n {
                        acc[j] += short[j];
                    }
                }
            });
        });
        add_up(&partial, d);
        Ok(())
    })
}

/// `f[i] = 1/√(n[i] + Σₖ a[i, k]·b[i, k])`, the reciprocals of norms whose squares are those of n and a correction. a and b
/// are [rows, k], n and f [1, rows] in a's [accumulator](crate::DType::accumulator).
///
/// # Panics
/// When the shapes or types differ.
pub fn reciprocal_norms(n: Mat, a: Mat, b: Mat, f: MatMut) -> Result<()> {
    assert!((a.rows(), a.cols()) == (b.rows(), b.cols()), "reciprocal_norms: two matrices of one shape");
    let rows = a.rows();
    let one_per_row = [n, f.as_mat()].iter().all(|m| (m.rows(), m.cols()) == (1, rows));
    assert!(one_per_row, "reciprocal_norms: one norm per row");
    #[cfg(feature = "cuda")]
    if let Some(gpu) = a.gpu() {
        return cuda::reciprocal_norms(gpu, n, a, b, f);
    }
    dispatch!("reciprocal_norms", a.dtype(), T => {
        let (n, a, b, mut f) = (n.host::<T>(), a.host::<T>(), b.host::<T>(), f.host::<T>());
        let n = n.row(0);
        for (i, f) in f.row_mut(0).iter_mut().enumerate() {
            *f = T::ONE / (n[i] + sum([a.row(i), b.row(i)], |[a, b]| a * b)).sqrt();
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, testing::*};

    const SHAPES: [(usize, usize); 7] = [(0, 3), (1, 1), (3, 7), (8, 31), (129, 768), (2, 40_000), (5000, 8)];

    #[test]
    fn columns_are_scaled_and_multiplied_as_their_formulas_say() {
        for (rows, cols) in SHAPES {
            let [x, z] = [1, 2].map(|seed| random(seed, rows * cols, 2.0));
            let (g, old) = (random(3, cols, 2.0), random(4, rows * cols, 2.0));
            let scaled: Vec<f64> = x.iter().enumerate().map(|(i, x)| x * g[i % cols]).collect();
            let mut dots = vec![0.0; cols];
            x.iter().zip(&z).enumerate().for_each(|(i, (x, z))| dots[i % cols] += x * z);
            for (dtype, pad) in [(DType::F32, 0), (DType::F32, 3), (DType::F64, 2)] {
                let [px, pz] = [&x, &z].map(|x| Padded::new(dtype, rows, cols, pad, x));
                let pg = Padded::new(dtype, 1, cols, 0, &g);
                for beta in [0.0, 1.0, 0.25] {
                    let mut y = Padded::target(dtype, rows, cols, pad, beta, &old);
                    scale_columns(px.mat(), pg.mat(), y.acc(beta)).unwrap();
                    close("scale_columns", &y.get(), &accumulated(&scaled, beta, &old), tol(dtype, 3e-7));
                    let mut d = Padded::target(dtype, 1, cols, pad, beta, &g);
                    dot_columns(px.mat(), pz.mat(), d.acc(beta)).unwrap();
                    // The terms are of both signs: the error goes with their number, not with the sum.
                    let tolerance = tol(dtype, 1e-6) * (rows as f64).sqrt().max(1.0);
                    close("dot_columns", &d.get(), &accumulated(&dots, beta, &g), tolerance);
                }
            }
        }
    }

    #[test]
    fn norms_are_those_of_their_formula() {
        for (rows, k) in [(0, 3), (1, 1), (7, 0), (9, 5), (40, 33)] {
            let [a, b] = [1, 2].map(|seed| random(seed, rows * k, 0.3));
            let n: Vec<f64> = random(3, rows, 1.0).iter().map(|v| 9.0 + v).collect();
            let dot = |i: usize| (0..k).map(|j| a[i * k + j] * b[i * k + j]).sum::<f64>();
            let want: Vec<f64> = (0..rows).map(|i| 1.0 / (n[i] + dot(i)).sqrt()).collect();
            for (dtype, pad) in [(DType::F32, 0), (DType::F64, 2)] {
                let [pa, pb] = [&a, &b].map(|x| Padded::new(dtype, rows, k, pad, x));
                let (pn, mut f) = (Padded::new(dtype, 1, rows, 0, &n), Padded::poison(dtype, 1, rows, 0));
                reciprocal_norms(pn.mat(), pa.mat(), pb.mat(), f.mat_mut()).unwrap();
                close("reciprocal_norms", &f.get(), &want, tol(dtype, 3e-7));
            }
        }
    }

    #[test]
    fn same_bits_for_any_number_of_threads() {
        for (rows, cols) in SHAPES {
            let [a, b] = [1, 2].map(|seed| Padded::new(DType::F32, rows, cols, 1, &random(seed, rows * cols, 1.0)));
            same_bits("dot_columns", || {
                let mut d = Padded::poison(DType::F32, 1, cols, 0);
                dot_columns(a.mat(), b.mat(), d.acc(0.0)).unwrap();
                d.get()
            });
        }
    }

    #[test]
    #[should_panic(expected = "scale_columns: one number per column")]
    fn another_number_of_columns_is_refused() {
        let (x, g) = (Padded::poison(DType::F32, 2, 3, 0), Padded::poison(DType::F32, 1, 2, 0));
        let mut y = Padded::poison(DType::F32, 2, 3, 0);
        scale_columns(x.mat(), g.mat(), y.acc(0.0)).unwrap();
    }
}
