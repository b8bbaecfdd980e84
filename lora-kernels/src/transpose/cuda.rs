#![allow(unsafe_code)]

use std::sync::Arc;

use crate::{
    Mat, MatMut, Result,
    cuda::{Arch, Gpu, Module, suffix},
};

pub(crate) static MODULE: Module = Module::new("transpose", include_str!("transpose.cu"), Arch::Any);

/// Rows and columns of a block's tile.
const TILE: usize = 64;

/// The shapes and types were checked, and x lies row by row.
pub(super) fn transpose(gpu: &Arc<Gpu>, x: Mat, y: MatMut) -> Result<()> {
    let kernel = format!("transpose_{}", suffix("transpose", x.dtype())?);
    let (rows, cols) = (x.rows(), x.cols());
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let mut l = gpu.launch(&MODULE, &kernel)?;
    l.mat(x).i64(x.ld()).mat_mut(&y).i64(y.ld()).i32(rows).i32(cols);
    // SAFETY: x has that shape and y its transpose's, and the kernel touches nothing outside of them.
    unsafe { l.run([rows.div_ceil(TILE) * cols.div_ceil(TILE), 1, 1], 256, 0) }
}

#[cfg(test)]
mod tests {
    use crate::{cuda::testing::*, transpose};

    fn transposes_equal_the_reference() {
        parity("transpose", &[(F32, 0.0), (Bf16, 0.0), (F16, 0.0)], |s| {
            for (rows, cols) in [(0, 3), (1, 1), (7, 33), (64, 64), (65, 129), (130, 31), (130, 64), (1, 200)] {
                for (pad, turned) in [(0, false), (3, false), (3, true)] {
                    let (r, c) = if turned { (cols, rows) } else { (rows, cols) };
                    let (x, mut y) = (s.random(1, r, c, pad, 2.0), s.poison(cols, rows, pad));
                    transpose(x.mat().t_if(turned), y.mat_mut()).unwrap();
                    s.out(format!("{rows}×{cols}"), y.get());
                }
            }
        });
    }

    #[test]
    fn columns_become_rows() {
        transposes_equal_the_reference();
    }

    #[cfg(feature = "emulator")]
    const MUTATIONS: &[Mutation] = &[
        Mutation {
            name: "no barrier between putting down and taking up",
            module: "transpose",
            from: "  __syncthreads();\n#pragma unroll\n  for (int i = 0; i < N; i++) {\n    int c = warp",
            to: "#pragma unroll\n  for (int i = 0; i < N; i++) {\n    int c = warp",
            check: transposes_equal_the_reference,
        },
        Mutation {
            name: "a row too many is written",
            module: "transpose",
            from: "row + r < rows) y",
            to: "row + r <= rows) y",
            check: transposes_equal_the_reference,
        },
        Mutation {
            name: "tiles are one row of tiles too long",
            module: "transpose",
            from: "((i64)cols + SIZE - 1) / SIZE",
            to: "(i64)cols / SIZE + 1",
            check: transposes_equal_the_reference,
        },
    ];

    #[test]
    #[cfg(feature = "emulator")]
    fn planted_bugs_are_caught() {
        all_are_caught(MUTATIONS);
    }
}
