use crate::{
    Acc, Mat, Result,
    elementwise::add,
    real::{Real, dispatch, simd},
    reduce::{put, rows_per_task, run},
};

/// Rows of a table by number: `y[i] = table[ids[i]] + β·y[i]`. table [rows, d], ids [1, n] of [`DType::U32`], y [n, d].
///
/// An embedding, with β = 1 for the second one added to it, and the choice of rows that the loss head needs.
///
/// # Panics
/// When the shapes or types differ, or an id is not below the table's rows.
///
/// [`DType::U32`]: crate::DType::U32
pub fn gather(table: Mat, ids: Mat, y: Acc) -> Result<()> {
    assert_eq!((1, y.to.rows()), (ids.rows(), ids.cols()), "gather: one id per row");
    assert_eq!(table.cols(), y.to.cols(), "gather: rows of one length");
    let ids = checked("gather", ids, table.rows());
    dispatch!("gather", table.dtype(), T => {
        let (table, beta, y) = (table.host::<T>(), T::of(y.beta), y.to.host::<T>());
        let step = rows_per_task(y.cols);
        run(y.row_chunks(step), |i, mut y| simd(#[inline(always)] || {
            for r in 0..y.rows {
                let (row, y) = (table.row(ids[i * step + r] as usize), y.row_mut(r));
                if beta == T::ZERO {
                    y.copy_from_slice(row);
                } else {
                    let row = &row[..y.len()];
                    put(y, beta, #[inline(always)] |j| row[j]);
                }
            }
        }));
        Ok(())
    })
}

/// The backward pass of [`gather`]: `dtable = β·dtable`, then `dtable[ids[i]] += dy[i]` for all i. dy [n, d],
/// ids [1, n], dtable [rows, d].
///
/// Each row of the table is summed by one task, in the order of i.
///
/// # Panics
/// When the shapes or types differ, or an id is not below the table's rows.
pub fn scatter(dy: Mat, ids: Mat, dtable: Acc) -> Result<()> {
    assert_eq!((1, dy.rows()), (ids.rows(), ids.cols()), "scatter: one id per row");
    assert_eq!(dy.cols(), dtable.to.cols(), "scatter: rows of one length");
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
