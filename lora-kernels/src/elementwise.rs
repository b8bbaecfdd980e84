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

/// `y = α·x + β·y`, element by element. With β = 0 the old contents of y are not read: a scaled copy.
///
/// # Panics
/// When the shapes or types differ.
pub fn axpby(alpha: f64, x: Mat, beta: f64, y: MatMut) -> Result<()> {
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

/// Adds `bias` [1, n] to every row of y [rows, n].
///
/// # Panics
/// When the shapes or types differ.
pub fn add_bias(bias: Mat, y: MatMut) -> Result<()> {
    assert_eq!((bias.rows(), bias.cols()), (1, y.cols()), "add_bias: one number per column");
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
/// Rows are added within fixed tiles, the tiles in order.
///
/// # Panics
/// When the shapes or types differ.
pub fn sum_rows(dy: Mat, db: Acc) -> Result<()> {
    assert_eq!((1, dy.cols()), (db.to.rows(), db.to.cols()), "sum_rows: one sum per column");
    dispatch!("sum_rows", dy.dtype(), T => {
        let dy = dy.host::<T>();
        let cols = bounds(dy.cols, TILE_COLS);
        let rows = bounds(dy.rows, TILE / dy.cols.clamp(1, TILE_COLS));
        let mut partial = Buffer::empty(&db.to.device(), T::DTYPE, (rows.len() - 1) * dy.cols)?;
        let mut partial = HostMut::from_slice(partial.host_mut::<T>(), rows.len() - 1, dy.cols);
        let each_row: Vec<usize> = (0..rows.len()).collect();
        run(partial.reborrow().grid(&each_row, &cols), |i, mut acc| {
            let (r, c) = (i / (cols.len() - 1), i % (cols.len() - 1));
            let dy = dy.block(rows[r]..rows[r + 1], cols[c]..cols[c + 1]);
            let acc = acc.row_mut(0);
            acc.fill(T::ZERO);
            let n = acc.len();
            simd(#[inline(always)] || {
                let quads = dy.rows - dy.rows % 4;
                for r in (0..quads).step_by(4) {
                    let x: [&[T]; 4] = std::array::from_fn(|k| &dy.row(r + k)[..n]);
                    for j in 0..n {
                        acc[j] += (x[0][j] + x[1][j]) + (x[2][j] + x[3][j]);
                    }
                }
                for r in quads..dy.rows {
                    add(acc, dy.row(r));
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
