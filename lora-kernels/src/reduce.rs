//! Tasks and reductions that every row-wise kernel shares. Where work is cut and in which order sums are taken depends
//! on shapes alone, so results have the same bits for any number of threads.

use rayon::prelude::*;

use crate::{
    mat::{HostMat, HostMut},
    real::{Real, simd},
};

/// Elements of one task: some ten microseconds of work, far above the cost of handing it out.
pub(crate) const GRAIN: usize = 32 << 10;

/// Independent sums of a reduction: enough for two vectors of eight, whose additions then overlap.
const LANES: usize = 16;

/// Rows of one task.
pub(crate) fn rows_per_task(cols: usize) -> usize {
    (GRAIN / cols.max(1)).max(1)
}

/// Calls `f(index, task)` for all tasks, side by side when there are several.
pub(crate) fn run<I: Send>(tasks: Vec<I>, f: impl Fn(usize, I) + Sync + Send) {
    if tasks.len() > 1 {
        tasks.into_par_iter().with_max_len(1).enumerate().for_each(|(i, task)| f(i, task));
    } else {
        tasks.into_iter().enumerate().for_each(|(i, task)| f(i, task));
    }
}

/// Calls `f` on matching runs of elements of matrices of one shape, under [`simd`]: whole tasks where nothing has gaps,
/// else row by row. For element-wise kernels, which do not care where a run starts.
pub(crate) fn each<T: Real, const N: usize, const M: usize>(
    kernel: &str,
    mut xs: [HostMat<T>; N],
    mut ys: [HostMut<T>; M],
    f: impl Fn([&[T]; N], [&mut [T]; M]) + Sync,
) {
    let shape = (ys[0].rows, ys[0].cols);
    assert!(
        xs.iter().map(|x| (x.rows, x.cols)).chain(ys.iter().map(|y| (y.rows, y.cols))).all(|s| s == shape),
        "{kernel}: all matrices are {}×{}",
        shape.0,
        shape.1
    );
    let flat = |rows: usize, cols: usize, ld: usize| rows <= 1 || ld == cols;
    if xs.iter().all(|x| flat(x.rows, x.cols, x.ld)) && ys.iter().all(|y| flat(y.rows, y.cols, y.ld)) {
        xs = xs.map(|x| HostMat::from_slice(x.data(), 1, shape.0 * shape.1));
        ys = ys.map(|y| HostMut::from_slice(y.into_data(), 1, shape.0 * shape.1));
    }
    let (rows, cols) = (ys[0].rows, ys[0].cols);
    let row_step = if rows == 1 { 1 } else { rows_per_task(cols) };
    let (row_bounds, col_bounds) = (bounds(rows, row_step), bounds(cols, if rows == 1 { GRAIN } else { cols.max(1) }));
    let mut parts = ys.map(|y| y.grid(&row_bounds, &col_bounds).into_iter());
    let mut tasks = Vec::new();
    for r in row_bounds.windows(2) {
        for c in col_bounds.windows(2) {
            let ys: [HostMut<T>; M] = parts.each_mut().map(|p| p.next().expect("one block per pair of boundaries"));
            tasks.push((xs.map(|x| x.block(r[0]..r[1], c[0]..c[1])), ys));
        }
    }
    run(tasks, |_, (xs, mut ys)| {
        simd(
            #[inline(always)]
            || {
                for r in 0..ys[0].rows {
                    f(xs.map(|x| x.row(r)), ys.each_mut().map(|y| y.row_mut(r)));
                }
            },
        );
    });
}

/// Boundaries 0, step, 2·step, … up to n.
pub(crate) fn bounds(n: usize, step: usize) -> Vec<usize> {
    let mut b: Vec<usize> = (0..n).step_by(step).collect();
    if n == 0 {
        b.push(0);
    }
    b.push(n);
    b
}

/// `to[i] = f(i) + beta·to[i]`, where β = 0 does not read.
#[inline(always)]
pub(crate) fn put<T: Real>(to: &mut [T], beta: T, f: impl Fn(usize) -> T) {
    if beta == T::ZERO {
        for (i, to) in to.iter_mut().enumerate() {
            *to = f(i);
        }
    } else {
        for (i, to) in to.iter_mut().enumerate() {
            *to = to.mul_add(beta, f(i));
        }
    }
}

/// The sum of `f` over matching elements of `xs`, in [`LANES`] sums that are then added in pairs.
#[inline(always)]
pub(crate) fn sum<T: Real, const N: usize>(xs: [&[T]; N], f: impl Fn([T; N]) -> T) -> T {
    let n = xs[0].len();
    let parts = xs.map(
        #[inline(always)]
        |x| x[..n].as_chunks::<LANES>(),
    );
    let mut acc = [T::ZERO; LANES];
    for c in 0..n / LANES {
        let x = parts.map(
            #[inline(always)]
            |p| &p.0[c],
        );
        for l in 0..LANES {
            acc[l] += f(x.map(
                #[inline(always)]
                |x| x[l],
            ));
        }
    }
    for (l, acc) in acc.iter_mut().enumerate().take(n % LANES) {
        *acc += f(parts.map(
            #[inline(always)]
            |p| p.1[l],
        ));
    }
    total(acc)
}

/// The sum of the lanes, in pairs.
#[inline(always)]
pub(crate) fn total<T: Real, const N: usize>(mut lanes: [T; N]) -> T {
    let mut width = N / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] += lanes[l + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The largest element; −∞ of none.
#[inline(always)]
pub(crate) fn max<T: Real>(x: &[T]) -> T {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut acc = [T::NEG_INFINITY; LANES];
    for c in chunks {
        for l in 0..LANES {
            acc[l] = acc[l].max(c[l]);
        }
    }
    for (a, &x) in acc.iter_mut().zip(rest) {
        *a = a.max(x);
    }
    acc.iter().fold(T::NEG_INFINITY, |a, &b| Real::max(a, b))
}
