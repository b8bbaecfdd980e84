#[cfg(feature = "cuda")]
pub(crate) mod cuda;

use half::bf16;

use crate::{
    Acc, DType, Element, Mat, MatMut, Result,
    elementwise::add,
    mat::HostMat,
    real::{Real, dispatch, simd},
    reduce::{put, rows_per_task, run},
};

/// Rows of a table by number: `y[i] = table[ids[i]] + β·y[i]`. table [rows, d], ids [1, n] of [`DType::U32`], y [n, d].
///
/// An embedding, with β = 1 for the second one added to it, and the choice of rows that the loss head needs. On the CPU
/// the table may be bf16 where y is f32. On a CUDA
/// device, whose ids the host does not see, a row of an id outside the table becomes NaN.
///
/// # Panics
/// When the shapes or types differ or, on the CPU, an id is not below the table's rows.
///
/// [`DType::U32`]: crate::DType::U32
pub fn gather(table: Mat, ids: Mat, y: Acc) -> Result<()> {
    assert_eq!((1, y.to.rows()), (ids.rows(), ids.cols()), "gather: one id per row");
    assert_eq!(table.cols(), y.to.cols(), "gather: rows of one length");
    #[cfg(feature = "cuda")]
    if let Some(gpu) = y.to.gpu() {
        return cuda::gather(gpu, table, ids, &y);
    }
    let ids = checked("gather", ids, table.rows());
    if table.dtype() == DType::Bf16 {
        rows_of(
            table.host::<bf16>(),
            ids,
            y,
            #[inline(always)]
            |v| v.to_f32(),
        );
        return Ok(());
    }
    dispatch!("gather", table.dtype(), T => {
        rows_of(table.host::<T>(), ids, y, #[inline(always)] |v| v);
        Ok(())
    })
}

/// The rows of a table on the host, each element as `of` makes it.
fn rows_of<S: Element, T: Real>(table: HostMat<S>, ids: &[u32], y: Acc, of: impl Fn(S) -> T + Sync) {
    let (beta, y) = (T::of(y.beta), y.to.host::<T>());
    let step = rows_per_task(y.cols);
    run(y.row_chunks(step), |i, mut y| {
        simd(
            #[inline(always)]
            || {
                for r in 0..y.rows {
                    let (row, y) = (table.row(ids[i * step + r] as usize), y.row_mut(r));
                    let row = &row[..y.len()];
                    put(
                        y,
                        beta,
                        #[inline(always)]
                        |j| of(row[j]),
                    );
                }
            },
        );
    });
}

/// Rows into a table by number: `table[ids[i]] = x[i]`. x [n, d], ids [1, n] of [`DType::U32`], each once, table [rows, d].
///
/// Where the numbers lie on a CUDA device, recorded work writes to whatever rows they name each time; an id outside the
/// table is passed over there.
///
/// # Panics
/// When the shapes or types differ or, on the CPU, an id is not below the table's rows.
///
/// [`DType::U32`]: crate::DType::U32
pub fn put_rows(x: Mat, ids: Mat, table: MatMut) -> Result<()> {
    assert_eq!((1, x.rows()), (ids.rows(), ids.cols()), "put_rows: one id per row");
    assert_eq!(x.cols(), table.cols(), "put_rows: rows of one length");
    #[cfg(feature = "cuda")]
    if let Some(gpu) = table.gpu() {
        return cuda::put_rows(gpu, x, ids, &table);
    }
    let ids = checked("put_rows", ids, table.rows());
    dispatch!("put_rows", table.dtype(), T => {
        let (x, mut table) = (x.host::<T>(), table.host::<T>());
        for (i, &id) in ids.iter().enumerate() {
            table.row_mut(id as usize).copy_from_slice(x.row(i));
        }
        Ok(())
    })
}

/// The backward pass of [`gather`]: `dtable = β·dtable`, then `dtable[ids[i]] += dy[i]` for all i. dy [n, d],
/// ids [1, n], dtable [rows, d].
///
/// Each row of the table is summed by one task, in the order of i. On a CUDA device 32 rows or more of one id are dealt
/// to eight warps, whose sums are added in order, dtable may be f32 whatever the type of dy, and rows of dy whose id lies
/// outside the table are left out.
///
/// # Panics
/// When the shapes or types differ or, on the CPU, an id is not below the table's rows.
pub fn scatter(dy: Mat, ids: Mat, dtable: Acc) -> Result<()> {
    assert_eq!((1, dy.rows()), (ids.rows(), ids.cols()), "scatter: one id per row");
    assert_eq!(dy.cols(), dtable.to.cols(), "scatter: rows of one length");
    #[cfg(feature = "cuda")]
    if let Some(gpu) = dy.gpu() {
        return cuda::scatter(gpu, dy, ids, dtable);
    }
    let ids = checked("scatter", ids, dtable.to.rows());
    // (id, row of dy), by id and within it by row.
    let mut order: Vec<(u32, usize)> = ids.iter().copied().zip(0..).collect();
    order.sort_unstable();
    dispatch!("scatter", dy.dtype(), T => {
        let (dy, beta, table) = (dy.host::<T>(), T::of(dtable.beta), dtable.to.host::<T>());
        let step = rows_per_task(table.cols);
        run(table.row_chunks(step), |i, mut table| {
            let first = order.partition_point(|&(id, _)| (id as usize) < i * step);
            let mut mine = order[first..].iter().peekable();
            simd(#[inline(always)] || {
                for r in 0..table.rows {
                    let to = table.row_mut(r);
                    let mut next = || mine.next_if(|(id, _)| *id as usize == i * step + r).map(|&(_, row)| dy.row(row));
                    match next() {
                        Some(row) => {
                            let row = &row[..to.len()];
                            put(to, beta, #[inline(always)] |j| row[j]);
                            while let Some(row) = next() {
                                add(to, row);
                            }
                        }
                        None if beta == T::ONE => {}
                        None => put(to, beta, #[inline(always)] |_| T::ZERO),
                    }
                }
            });
        });
        Ok(())
    })
}

/// The ids, all below `rows`.
fn checked<'a>(kernel: &str, ids: Mat<'a>, rows: usize) -> &'a [u32] {
    let ids = ids.host::<u32>().row(0);
    if let Some((i, id)) = ids.iter().enumerate().find(|&(_, &id)| id as usize >= rows) {
        panic!("{kernel}: id {id} at {i} of a table of {rows} rows");
    }
    ids
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, testing::*};
    use rand::{RngExt, SeedableRng};

    /// (rows of the table, columns, number of ids)
    const SHAPES: [(usize, usize, usize); 7] =
        [(1, 1, 1), (5, 7, 0), (3, 8, 33), (100, 31, 7), (257, 768, 400), (5000, 33, 129), (0, 3, 0)];

    fn numbers(rows: usize, n: usize) -> Vec<u32> {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(9);
        // Half of them from the first few rows, so that rows repeat.
        (0..n).map(|i| rng.random_range(0..if i % 2 == 0 { rows } else { rows.min(3) }) as u32).collect()
    }

    #[test]
    fn rows_are_taken_and_given_back() {
        for (rows, d, n) in SHAPES {
            let (table, old, dy) = (random(1, rows * d, 1.0), random(2, n * d, 1.0), random(3, n * d, 1.0));
            let row = numbers(rows, n);
            let taken: Vec<f64> = row.iter().flat_map(|&i| &table[i as usize * d..][..d]).copied().collect();
            let mut given = vec![0.0; rows * d];
            for (i, &r) in row.iter().enumerate() {
                (0..d).for_each(|j| given[r as usize * d + j] += dy[i * d + j]);
            }
            let id_buf = ids(&row);
            let id = Mat::new(&id_buf, 0, 1, n);
            for (dtype, pad) in [(DType::F32, 0), (DType::F32, 3), (DType::F64, 2)] {
                for beta in [0.0, 1.0, 0.5] {
                    let source = Padded::new(dtype, rows, d, pad, &table);
                    let mut y = Padded::target(dtype, n, d, pad, beta, &old);
                    gather(source.mat(), id, y.acc(beta)).unwrap();
                    close("gather", &y.get(), &accumulated(&taken, beta, &old), tol(dtype, 1e-7));

                    let source = Padded::new(dtype, n, d, pad, &dy);
                    let mut to = Padded::target(dtype, rows, d, pad, beta, &table);
                    scatter(source.mat(), id, to.acc(beta)).unwrap();
                    close("scatter", &to.get(), &accumulated(&given, beta, &table), tol(dtype, 2e-6));
                }
            }
        }
    }

    #[test]
    fn same_bits_for_any_number_of_threads() {
        let (row, dy) = (ids(&numbers(500, 3000)), Padded::new(DType::F32, 3000, 129, 0, &random(4, 3000 * 129, 1.0)));
        same_bits("scatter", || {
            let mut to = Padded::poison(DType::F32, 500, 129, 0);
            scatter(dy.mat(), Mat::new(&row, 0, 1, 3000), to.acc(0.0)).unwrap();
            to.get()
        });
    }

    #[test]
    #[should_panic(expected = "gather: id 3 at 1 of a table of 3 rows")]
    fn an_id_outside_the_table_is_refused() {
        let (table, mut y, id) =
            (Padded::poison(DType::F32, 3, 2, 0), Padded::poison(DType::F32, 2, 2, 0), ids(&[2, 3]));
        gather(table.mat(), Mat::new(&id, 0, 1, 2), y.acc(0.0)).unwrap();
    }
}
