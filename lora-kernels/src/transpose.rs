#[cfg(feature = "cuda")]
pub(crate) mod cuda;

use crate::{
    Mat, MatMut, Result, axpby,
    real::dispatch,
    reduce::{rows_per_task, run},
};

/// Rows and columns of a block: both its rows in x and those in y stay in the first-level cache.
const BLOCK: usize = 32;

/// `y = xᵀ`, with x [rows, cols] and y [cols, rows]: the transpose in memory, where a descriptor ([`Mat::t`]) will not do.
///
/// # Errors
/// [`Error::DType`](crate::Error::DType) for 16-bit types on the CPU, and f64 on a CUDA device.
///
/// # Panics
/// When the shapes do not fit or the types differ.
pub fn transpose(x: Mat, y: MatMut) -> Result<()> {
    assert_eq!((x.rows(), x.cols()), (y.cols(), y.rows()), "transpose: [rows, cols] into [cols, rows]");
    assert_eq!(x.dtype(), y.dtype(), "transpose: both matrices are of one type");
    if x.is_transposed() {
        // It lies in memory as y wants it.
        return axpby(1.0, x.t(), 0.0, y);
    }
    #[cfg(feature = "cuda")]
    if let Some(gpu) = y.gpu() {
        return cuda::transpose(gpu, x, y);
    }
    dispatch!("transpose", y.dtype(), T => {
        let (x, y) = (x.host::<T>(), y.host::<T>());
        let step = rows_per_task(x.rows).next_multiple_of(BLOCK);
        run(y.row_chunks(step), |task, mut y| {
            for first in (0..y.rows).step_by(BLOCK) {
                let last = y.rows.min(first + BLOCK);
                for row in (0..x.rows).step_by(BLOCK) {
                    for r in row..x.rows.min(row + BLOCK) {
                        let from = &x.row(r)[task * step..];
                        for (c, &v) in (first..last).zip(&from[first..last]) {
                            y.row_mut(c)[r] = v;
                        }
                    }
                }
            }
        });
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, testing::*};

    #[test]
    fn rows_become_columns() {
        for (rows, cols) in [(0, 3), (3, 0), (1, 1), (1, 65), (33, 1), (32, 64), (31, 65), (300, 517), (5, 70_000)] {
            let x = random(1, rows * cols, 2.0);
            for dtype in FLOATS {
                for (pad, turned) in [(0, false), (3, false), (0, true), (3, true)] {
                    let x = rounded(dtype, &x);
                    let (r, c) = if turned { (cols, rows) } else { (rows, cols) };
                    let (px, mut y) = (Padded::new(dtype, r, c, pad, &x), Padded::poison(dtype, cols, rows, pad));
                    transpose(px.mat().t_if(turned), y.mat_mut()).unwrap();
                    let want = |i: usize| if turned { x[i] } else { x[i % rows * cols + i / rows] };
                    assert_eq!(y.get(), (0..rows * cols).map(want).collect::<Vec<_>>(), "{dtype:?} {rows}×{cols}");
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "transpose: [rows, cols] into [cols, rows]")]
    fn another_shape_is_refused() {
        let (x, mut y) = (Padded::poison(DType::F32, 2, 3, 0), Padded::poison(DType::F32, 2, 3, 0));
        transpose(x.mat(), y.mat_mut()).unwrap();
    }
}
