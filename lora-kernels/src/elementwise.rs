#[cfg(feature = "cuda")]
pub(crate) mod cuda;

use crate::{
    Acc, Buffer, Element, Mat, MatMut, Result,
    mat::HostMut,
    real::{Real, dispatch, simd},
    reduce::{bounds, each, put, rows_per_task, run},
};

/// Rows that one task of [`sum_rows`] adds up, times its columns.
const TILE: usize = 64 << 10;
/// Columns of one task of [`sum_rows`]: their running sums stay in the first-level cache.
const TILE_COLS: usize = 512;
/// Rows that [`sum_rows`] adds up before they join a longer sum.
const SHORT: usize = 64;

/// `y = α·x + β·y`, element by element. With β = 0 the old contents of y are not read: a scaled copy.
///
/// On a CUDA device x and y may be of different floating-point types: with α = 1 and β = 0 this is the cast.
///
/// # Panics
/// When the shapes differ, or on the CPU the types.
pub fn axpby(alpha: f64, x: Mat, beta: f64, y: MatMut) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = y.gpu() {
        return cuda::axpby(gpu, alpha, x, beta, y);
    }
    dispatch!("axpby", y.dtype(), T => {
        let (a, b) = (T::of(alpha), T::of(beta));
        each("axpby", [x.host::<T>()], [y.host::<T>()], #[inline(always)] |[x], [y]| {
            if alpha == 1.0 && beta == 0.0 {
                y.copy_from_slice(x);
            } else {
                let x = &x[..y.len()];
                put(y, b, #[inline(always)] |i| a * x[i]);
            }
        });
        Ok(())
    })
}

/// `y = α·y` in place, with IEEE's rules: 0·NaN and 0·∞ are NaN. (To overwrite, there is [`fill`].)
pub fn scale(alpha: f64, y: MatMut) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = y.gpu() {
        return cuda::scale(gpu, alpha, y);
    }
    dispatch!("scale", y.dtype(), T => {
        let a = T::of(alpha);
        each("scale", [], [y.host::<T>()], #[inline(always)] |[], [y]| {
            for y in y {
                *y *= a;
            }
        });
        Ok(())
    })
}

/// `y = factor·y` in place, with a factor [1, 1] that lies where y does: gradient clipping on a device without reading the
/// norm back. A factor of exactly 1 leaves y untouched. On a CUDA device the factor may be f32 whatever the type of y.
///
/// # Panics
/// When there is not one factor, or on the CPU when the types differ.
pub fn scale_by(factor: Mat, y: MatMut) -> Result<()> {
    assert_eq!((factor.rows(), factor.cols()), (1, 1), "scale_by: one factor");
    #[cfg(feature = "cuda")]
    if let Some(gpu) = y.gpu() {
        return cuda::scale_by(gpu, factor, y);
    }
    dispatch!("scale_by", y.dtype(), T => {
        let factor = factor.host::<T>().row(0)[0].f64();
        if factor == 1.0 { Ok(()) } else { scale(factor, y) }
    })
}

/// Sets every element of y to `value`; its old contents are not read.
pub fn fill(value: f64, y: MatMut) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = y.gpu() {
        return cuda::fill(gpu, value, y);
    }
    dispatch!("fill", y.dtype(), T => {
        let v = T::of(value);
        each("fill", [], [y.host::<T>()], #[inline(always)] |[], [y]| y.fill(v));
        Ok(())
    })
}

/// Adds `bias` [1, n] to every row of y [rows, n].
///
/// # Panics
/// When the shapes or types differ.
pub fn add_bias(bias: Mat, y: MatMut) -> Result<()> {
    assert_eq!((bias.rows(), bias.cols()), (1, y.cols()), "add_bias: one number per column");
    #[cfg(feature = "cuda")]
    if let Some(gpu) = y.gpu() {
        return cuda::add_bias(gpu, bias, y);
    }
    dispatch!("add_bias", y.dtype(), T => {
        let (bias, y) = (bias.host::<T>(), y.host::<T>());
        let bias = bias.row(0);
        run(y.row_chunks(rows_per_task(bias.len())), |_, mut y| simd(#[inline(always)] || {
            for r in 0..y.rows {
                let y = y.row_mut(r);
                let bias = &bias[..y.len()];
                for (y, &b) in y.iter_mut().zip(bias) {
                    *y += b;
                }
            }
        }));
        Ok(())
    })
}

/// The sums of the columns, `db[j] = Σᵢ dy[i, j] + β·db[j]`: the gradient of a bias. dy is [rows, n], db [1, n].
///
/// Rows are added within fixed tiles, the tiles in order. On a CUDA device the sums are taken in f32, and db may be f32
/// whatever the type of dy.
///
/// # Panics
/// When the shapes differ, or on the CPU the types.
pub fn sum_rows(dy: Mat, db: Acc) -> Result<()> {
    assert_eq!((1, dy.cols()), (db.to.rows(), db.to.cols()), "sum_rows: one sum per column");
    #[cfg(feature = "cuda")]
    if let Some(gpu) = dy.gpu() {
        return cuda::sum_rows(gpu, dy, db);
    }
    dispatch!("sum_rows", dy.dtype(), T => {
        let dy = dy.host::<T>();
        let cols = bounds(dy.cols, TILE_COLS);
        let rows = bounds(dy.rows, TILE / dy.cols.clamp(1, TILE_COLS));
        let mut partial = Buffer::empty(db.to.device(), T::DTYPE, (rows.len() - 1) * dy.cols)?;
        let mut partial = HostMut::from_slice(partial.host_mut::<T>(), rows.len() - 1, dy.cols);
        let each_row: Vec<usize> = (0..rows.len()).collect();
        run(partial.reborrow().grid(&each_row, &cols), |i, mut acc| {
            let (r, c) = (i / (cols.len() - 1), i % (cols.len() - 1));
            let dy = dy.block(rows[r]..rows[r + 1], cols[c]..cols[c + 1]);
            let acc = acc.row_mut(0);
            acc.fill(T::ZERO);
            let n = acc.len();
            simd(#[inline(always)] || {
                // Short sums first: a long one in f32 loses digits.
                let mut short = [T::ZERO; TILE_COLS];
                let short = &mut short[..n];
                for first in (0..dy.rows).step_by(SHORT) {
                    let end = (first + SHORT).min(dy.rows);
                    let quads = end - (end - first) % 4;
                    short.fill(T::ZERO);
                    for r in (first..quads).step_by(4) {
                        let x: [&[T]; 4] = std::array::from_fn(#[inline(always)] |k| &dy.row(r + k)[..n]);
                        for j in 0..n {
                            short[j] += (x[0][j] + x[1][j]) + (x[2][j] + x[3][j]);
                        }
                    }
                    for r in quads..end {
                        add(short, dy.row(r));
                    }
                    add(acc, short);
                }
            });
        });
        add_up(&partial, db);
        Ok(())
    })
}

/// `to += x`.
#[inline(always)]
pub(crate) fn add<T: Real>(to: &mut [T], x: &[T]) {
    for (to, &x) in to.iter_mut().zip(x) {
        *to += x;
    }
}

/// `to = Σ rows of partial + β·to`: the end of a reduction over row chunks, the chunks in order.
pub(crate) fn add_up<T: Real>(partial: &HostMut<T>, to: Acc) {
    let (beta, mut to) = (T::of(to.beta), to.to.host::<T>());
    let to = to.row_mut(0);
    simd(
        #[inline(always)]
        || {
            let first = if partial.rows == 0 { &[] } else { partial.row(0) };
            put(to, beta, |i| if first.is_empty() { T::ZERO } else { first[i] });
            for r in 1..partial.rows {
                add(to, partial.row(r));
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, testing::*};

    const SHAPES: [(usize, usize); 8] = [(0, 3), (1, 1), (3, 7), (8, 31), (33, 8), (129, 768), (2, 40_000), (5000, 8)];

    #[test]
    fn axpby_equals_its_formula() {
        for (rows, cols) in SHAPES {
            let (x, old) = (random(1, rows * cols, 2.0), random(2, rows * cols, 2.0));
            for (dtype, pad) in [(DType::F32, 0), (DType::F32, 3), (DType::F64, 0), (DType::F64, 2)] {
                for (alpha, beta) in [(1.0, 0.0), (0.5, 0.0), (1.0, 1.0), (-2.0, 0.25)] {
                    let (px, mut y) =
                        (Padded::new(dtype, rows, cols, pad, &x), Padded::target(dtype, rows, cols, pad, beta, &old));
                    axpby(alpha, px.mat(), beta, y.mat_mut()).unwrap();
                    let want: Vec<f64> = x.iter().map(|x| alpha * x).collect();
                    close("axpby", &y.get(), &accumulated(&want, beta, &old), tol(dtype, 2e-7));
                }
            }
        }
    }

    #[test]
    fn scale_and_fill_write_every_element_and_nothing_beside() {
        for (rows, cols) in SHAPES {
            let x = random(6, rows * cols, 2.0);
            for (dtype, pad) in [(DType::F32, 0), (DType::F32, 3), (DType::F64, 0), (DType::F64, 2)] {
                for alpha in [0.0, 1.0, -0.3] {
                    let mut y = Padded::new(dtype, rows, cols, pad, &x);
                    scale(alpha, y.mat_mut()).unwrap();
                    let want: Vec<f64> = x.iter().map(|x| alpha * x).collect();
                    close("scale", &y.get(), &want, tol(dtype, 2e-7));
                    let mut y = Padded::new(dtype, rows, cols, pad, &x);
                    scale_by(Padded::new(dtype, 1, 1, 0, &[alpha]).mat(), y.mat_mut()).unwrap();
                    close("scale_by", &y.get(), &want, tol(dtype, 2e-7));
                    let mut y = Padded::poison(dtype, rows, cols, pad);
                    fill(alpha, y.mat_mut()).unwrap();
                    close("fill", &y.get(), &vec![alpha; rows * cols], tol(dtype, 2e-7));
                }
            }
        }
    }

    #[test]
    fn scale_keeps_what_is_no_number() {
        for dtype in FLOATS {
            for (alpha, want) in [(0.0, [0.0, f64::NAN, f64::NAN]), (2.0, [2.0, f64::NAN, f64::INFINITY])] {
                let mut y = Padded::new(dtype, 1, 3, 0, &[1.0, f64::NAN, f64::INFINITY]);
                scale(alpha, y.mat_mut()).unwrap();
                let same = |(a, b): (&f64, &f64)| a == b || (a.is_nan() && b.is_nan());
                assert!(y.get().iter().zip(&want).all(same), "{:?} is not {want:?}", y.get());
            }
        }
    }

    #[test]
    fn biases_go_on_rows_and_come_off_as_sums() {
        for (rows, cols) in SHAPES {
            let (y, bias) = (random(3, rows * cols, 1.0), random(4, cols, 1.0));
            let want: Vec<f64> = y.iter().enumerate().map(|(i, y)| y + bias[i % cols]).collect();
            let mut sums = vec![0.0; cols];
            y.iter().enumerate().for_each(|(i, y)| sums[i % cols] += y);
            for (dtype, pad) in [(DType::F32, 0), (DType::F32, 3), (DType::F64, 2)] {
                let (mut py, pb) = (Padded::new(dtype, rows, cols, pad, &y), Padded::new(dtype, 1, cols, 0, &bias));
                for beta in [0.0, 1.0, 0.5] {
                    let mut db = Padded::target(dtype, 1, cols, pad, beta, &bias);
                    sum_rows(py.mat(), db.acc(beta)).unwrap();
                    // The terms are of both signs: the error goes with their number, not with the sum.
                    let tolerance = tol(dtype, 2e-7) * (rows as f64).sqrt().max(1.0);
                    close("sum_rows", &db.get(), &accumulated(&sums, beta, &bias), tolerance);
                }
                add_bias(pb.mat(), py.mat_mut()).unwrap();
                close("add_bias", &py.get(), &want, tol(dtype, 1e-7));
            }
        }
    }

    #[test]
    fn same_bits_for_any_number_of_threads() {
        for (rows, cols) in SHAPES {
            let dy = Padded::new(DType::F32, rows, cols, 1, &random(5, rows * cols, 1.0));
            same_bits("sum_rows", || {
                let mut db = Padded::poison(DType::F32, 1, cols, 0);
                sum_rows(dy.mat(), db.acc(0.0)).unwrap();
                db.get()
            });
        }
    }

    #[test]
    #[should_panic(expected = "axpby: all matrices are 2×2")]
    fn another_shape_is_refused() {
        let (x, mut y) = (Padded::poison(DType::F32, 2, 3, 0), Padded::poison(DType::F32, 2, 2, 0));
        axpby(1.0, x.mat(), 0.0, y.mat_mut()).unwrap();
    }
}
