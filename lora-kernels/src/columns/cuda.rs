#![allow(unsafe_code)]

use std::sync::Arc;

use crate::{
    Acc, Buffer, DType, Mat, MatMut, Result,
    cuda::{
        Arch, Gpu, Module,
        map::{THREADS, grid, typed, vector_of},
        suffix,
    },
    elementwise::cuda::add_partial,
};

const SOURCE: &str = concat!(include_str!("../cuda/map.cuh"), include_str!("columns.cu"));
pub(crate) static MODULE: Module = Module::new("columns", SOURCE, Arch::Any);

/// The number of partial sums that a reduction over rows is cut into, at most.
const PARTS: usize = 528;

pub(super) fn scale_columns(gpu: &Arc<Gpu>, x: Mat, g: Mat, y: Acc) -> Result<()> {
    let (rows, cols, dtype) = (x.rows(), x.cols(), y.to.dtype());
    typed("scale_columns", dtype, &[x, g, y.to.as_mat()]);
    if rows * cols == 0 {
        return Ok(());
    }
    let mut l = gpu.launch(&MODULE, &format!("scale_columns_{}", suffix("scale_columns", dtype)?))?;
    l.mat(x).i64(x.ld()).mat(g).acc(Some(&y)).i64(y.to.ld()).i32(rows).i32(cols);
    // SAFETY: x and y have that shape, g as many columns, and the kernel touches nothing else.
    unsafe { l.run(grid((rows, cols), vector_of(dtype, dtype)), THREADS, 0) }
}

pub(super) fn dot_columns(gpu: &Arc<Gpu>, a: Mat, b: Mat, d: Acc) -> Result<()> {
    let (rows, cols, dtype) = (a.rows(), a.cols(), a.dtype());
    typed("dot_columns", dtype, &[a, b]);
    let tiles = cols.div_ceil(32);
    let step = rows.div_ceil((PARTS / tiles.max(1)).max(1)).max(32);
    let parts = rows.div_ceil(step);
    let mut partial = Buffer::empty(a.device(), DType::F32, parts * cols)?;
    if parts * cols > 0 {
        let mut l = gpu.launch(&MODULE, &format!("dot_columns_{}", suffix("dot_columns", dtype)?))?;
        l.mat(a).i64(a.ld()).mat(b).i64(b.ld()).i32(rows).i32(cols).i32(step);
        l.mat_mut(&MatMut::new(&mut partial, 0, parts, cols));
        // SAFETY: the blocks read the rows and columns of a and b, and block (c, p) writes columns of row p of `partial`.
        unsafe { l.run([tiles, parts, 1], 256, 0)? };
    }
    add_partial(gpu, Mat::new(&partial, 0, parts, cols), d)
}

pub(super) fn reciprocal_norms(gpu: &Arc<Gpu>, n: Mat, a: Mat, b: Mat, f: MatMut) -> Result<()> {
    let (rows, cols, dtype) = (a.rows(), a.cols(), a.dtype());
    typed("reciprocal_norms", dtype, &[a, b]);
    typed("reciprocal_norms", DType::F32, &[n, f.as_mat()]);
    if rows == 0 {
        return Ok(());
    }
    let mut l = gpu.launch(&MODULE, &format!("reciprocal_norms_{}", suffix("reciprocal_norms", dtype)?))?;
    l.mat(n).mat(a).i64(a.ld()).mat(b).i64(b.ld()).mat_mut(&f).i32(rows).i32(cols);
    // SAFETY: a warp reads one row of a and b and its number of n, and writes its number of f; rows stay below theirs.
    unsafe { l.run([rows.div_ceil(8), 1, 1], 256, 0) }
}

#[cfg(test)]
mod tests {
    use crate::{cuda::testing::*, dot_columns, reciprocal_norms, scale_columns};

    const TYPES: [(crate::DType, f64); 3] = [(F32, 3e-7), (Bf16, 8e-3), (F16, 1e-3)];
    const SHAPES: [(usize, usize); 8] = [(0, 3), (1, 1), (3, 7), (8, 31), (9, 128), (2, 1100), (129, 16), (1100, 33)];

    fn columns_equal_the_reference() {
        parity("scale_columns", &TYPES, |s| {
            for (rows, cols) in SHAPES {
                for (pad, beta) in [(0, 0.0), (3, 0.5), (8, 1.0)] {
                    let (x, g) = (s.random(1, rows, cols, pad, 2.0), s.random(2, 1, cols, 0, 2.0));
                    let mut y = s.target(3, rows, cols, pad, beta);
                    scale_columns(x.mat(), g.mat(), y.acc(beta)).unwrap();
                    s.out(format!("x·g + {beta}·y, {rows}×{cols}"), y.get());
                }
            }
        });
    }

    fn products_equal_the_reference() {
        // Sums are f32, of terms of both signs.
        parity("dot_columns", &[(F32, 3e-6), (Bf16, 3e-6), (F16, 3e-6)], |s| {
            for (rows, cols) in SHAPES {
                for (pad, beta) in [(0, 0.0), (3, 0.5), (8, 1.0)] {
                    let (a, b) = (s.random(1, rows, cols, pad, 1.0), s.random(2, rows, cols, pad, 1.0));
                    let mut d = s.target_acc(3, 1, cols, 0, beta);
                    dot_columns(a.mat(), b.mat(), d.acc(beta)).unwrap();
                    s.out(format!("{rows}×{cols}"), d.get());
                }
            }
        });
    }

    fn norms_equal_the_reference() {
        parity("reciprocal_norms", &[(F32, 1e-6), (Bf16, 1e-6), (F16, 1e-6)], |s| {
            for (rows, k) in [(0, 3), (1, 1), (9, 5), (40, 33), (7, 64)] {
                let (a, b) = (s.random(1, rows, k, 3, 0.3), s.random(2, rows, k, 0, 0.3));
                let n = s.given_acc(1, rows, 0, &(0..rows).map(|i| 9.0 + i as f64).collect::<Vec<_>>());
                let mut f = s.poison_acc(1, rows, 0);
                reciprocal_norms(n.mat(), a.mat(), b.mat(), f.mat_mut()).unwrap();
                s.out(format!("{rows}×{k}"), f.get());
            }
        });
    }

    #[test]
    fn kernels_of_columns_equal_the_reference() {
        columns_equal_the_reference();
        products_equal_the_reference();
        norms_equal_the_reference();
    }

    #[cfg(feature = "emulator")]
    const MUTATIONS: &[Mutation] = &[
        Mutation {
            name: "every column by the first number",
            module: "columns",
            from: "read(in[1], g + col)",
            to: "read(in[1], g)",
            check: columns_equal_the_reference,
        },
        Mutation {
            name: "no barrier before the warps' sums are added",
            module: "columns",
            from: "sums[warp][lane] = sum;\n  __syncthreads();",
            to: "sums[warp][lane] = sum;",
            check: products_equal_the_reference,
        },
        Mutation {
            name: "the last rows of a part are left out",
            module: "columns",
            from: "first + step < rows ? first + step : rows;",
            to: "first + step < rows ? first + step : rows - 1;",
            check: products_equal_the_reference,
        },
        Mutation {
            name: "a norm without its correction",
            module: "columns",
            from: "sqrtf(n[row] + sum)",
            to: "sqrtf(n[row])",
            check: norms_equal_the_reference,
        },
    ];

    #[test]
    #[cfg(feature = "emulator")]
    fn planted_bugs_are_caught() {
        all_are_caught(MUTATIONS);
    }
}
