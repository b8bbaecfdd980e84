#![allow(unsafe_code)]

use std::sync::Arc;

use crate::{
    Acc, Buffer, DType, Mat, MatMut, Result,
    cuda::{
        Arch, Gpu, Module,
        map::{THREADS, extent, grid, typed, vector_of},
        suffix,
    },
};

const SOURCE: &str = concat!(include_str!("../cuda/map.cuh"), include_str!("elementwise.cu"));
pub(crate) static MODULE: Module = Module::new("elementwise", SOURCE, Arch::Any);

/// The number of partial sums that a reduction over rows is cut into, at most: four blocks for each processor of an H100.
const PARTS: usize = 528;

pub(super) fn axpby(gpu: &Arc<Gpu>, alpha: f64, x: Mat, beta: f64, y: MatMut) -> Result<()> {
    let shape = extent("axpby", &[x, y.as_mat()]);
    let kernel = format!("axpby_{}_{}", suffix("axpby", x.dtype())?, suffix("axpby", y.dtype())?);
    if shape.1 == 0 || shape.0 == 0 {
        return Ok(());
    }
    let mut l = gpu.launch(&MODULE, &kernel)?;
    l.mat(x).i64(x.ld()).mat_mut(&y).i64(y.ld()).i32(shape.0).i32(shape.1).f32(alpha).f32(beta);
    // SAFETY: both matrices have that shape, and the kernel touches nothing outside it.
    unsafe { l.run(grid(shape, vector_of(x.dtype(), y.dtype())), THREADS, 0) }
}

pub(super) fn scale(gpu: &Arc<Gpu>, alpha: f64, y: MatMut) -> Result<()> {
    in_place(gpu, "scale", None, Some(alpha), y)
}

pub(super) fn scale_by(gpu: &Arc<Gpu>, factor: Mat, y: MatMut) -> Result<()> {
    in_place(gpu, "scale_by", Some(factor), None, y)
}

pub(super) fn fill(gpu: &Arc<Gpu>, value: f64, y: MatMut) -> Result<()> {
    in_place(gpu, "fill", None, Some(value), y)
}

fn in_place(gpu: &Arc<Gpu>, kernel: &'static str, factor: Option<Mat>, value: Option<f64>, y: MatMut) -> Result<()> {
    let shape = extent(kernel, &[y.as_mat()]);
    let mut name = kernel.to_owned();
    for dtype in factor.iter().map(Mat::dtype).chain([y.dtype()]) {
        name += "_";
        name += suffix(kernel, dtype)?;
    }
    if shape.1 == 0 || shape.0 == 0 {
        return Ok(());
    }
    let mut l = gpu.launch(&MODULE, &name)?;
    if let Some(factor) = factor {
        l.mat(factor);
    }
    l.mat_mut(&y).i64(y.ld()).i32(shape.0).i32(shape.1);
    if let Some(value) = value {
        l.f32(value);
    }
    // SAFETY: y has that shape, the factor is one element, and the kernel touches nothing else.
    unsafe { l.run(grid(shape, vector_of(y.dtype(), y.dtype())), THREADS, 0) }
}

pub(super) fn add_bias(gpu: &Arc<Gpu>, bias: Mat, y: MatMut) -> Result<()> {
    typed("add_bias", y.dtype(), &[bias]);
    let kernel = format!("add_bias_{}", suffix("add_bias", y.dtype())?);
    let shape = (y.rows(), y.cols());
    if shape.0 * shape.1 == 0 {
        return Ok(());
    }
    let mut l = gpu.launch(&MODULE, &kernel)?;
    l.mat(bias).mat_mut(&y).i64(y.ld()).i32(shape.0).i32(shape.1);
    // SAFETY: y has that shape, the bias as many columns, and the kernel touches nothing else.
    unsafe { l.run(grid(shape, vector_of(y.dtype(), y.dtype())), THREADS, 0) }
}

/// Rows of one partial sum: at least 32, so that a part is a small fraction of what it sums.
fn rows_per_part(rows: usize, tiles: usize) -> usize {
    rows.div_ceil((PARTS / tiles.max(1)).max(1)).max(32)
}

pub(super) fn sum_rows(gpu: &Arc<Gpu>, dy: Mat, db: Acc) -> Result<()> {
    let (rows, cols) = (dy.rows(), dy.cols());
    assert!(!dy.is_transposed(), "sum_rows: dy lies row by row");
    let kernel = format!("sum_rows_{}", suffix("sum_rows", dy.dtype())?);
    let tiles = cols.div_ceil(32 * vector_of(dy.dtype(), dy.dtype()));
    let step = rows_per_part(rows, tiles);
    let parts = rows.div_ceil(step);
    let mut partial = Buffer::empty(dy.device(), DType::F32, parts * cols)?;
    if parts * cols > 0 {
        let mut l = gpu.launch(&MODULE, &kernel)?;
        l.mat(dy).i64(dy.ld()).i32(rows).i32(cols).i32(step).mat_mut(&MatMut::new(&mut partial, 0, parts, cols));
        // SAFETY: the blocks read dy's rows and columns, and block (c, p) writes columns of row p of `partial`.
        unsafe { l.run([tiles, parts, 1], 256, 0)? };
    }
    add_partial(gpu, Mat::new(&partial, 0, parts, cols), db)
}

/// `to[j] = Σ_p partial[p, j] + β·to[j]`, the parts in a fixed order: the end of a reduction over rows. `partial` is f32
/// without gaps.
pub(crate) fn add_partial(gpu: &Arc<Gpu>, partial: Mat, to: Acc) -> Result<()> {
    let (parts, cols) = (partial.rows(), partial.cols());
    assert_eq!((1, cols), (to.to.rows(), to.to.cols()), "add_partial: one sum per column");
    assert!(partial.dtype() == DType::F32 && (partial.ld() == cols || parts <= 1), "add_partial: parts without gaps");
    let kernel = format!("add_partial_{}", suffix("add_partial", to.to.dtype())?);
    if cols == 0 {
        return Ok(());
    }
    let mut l = gpu.launch(&MODULE, &kernel)?;
    l.mat(partial).i32(parts).i32(cols).acc(Some(&to));
    // SAFETY: reads `partial` and writes the row `to`, both within their columns.
    unsafe { l.run([cols.div_ceil(32), 1, 1], 512, 0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        add_bias, axpby,
        cuda::testing::*,
        fill, scale, scale_by, sum_rows,
        testing::{Padded, random, rounded},
    };

    const TYPES: [(DType, f64); 3] = [(F32, 3e-7), (Bf16, 8e-3), (F16, 1e-3)];
    /// Odd ones, whole vectors, and one of several blocks.
    const SHAPES: [(usize, usize); 9] =
        [(0, 3), (1, 1), (3, 7), (8, 31), (5, 33), (9, 128), (2, 1100), (1, 8193), (129, 16)];

    fn axpby_equals_the_reference() {
        parity("axpby", &TYPES, |s| {
            for (rows, cols) in SHAPES {
                for pad in [0, 3, 8] {
                    for (alpha, beta) in [(1.0, 0.0), (-2.0, 0.25)] {
                        let (x, mut y) = (s.random(1, rows, cols, pad, 2.0), s.target(2, rows, cols, pad, beta));
                        axpby(alpha, x.mat(), beta, y.mat_mut()).unwrap();
                        s.out(format!("{alpha}·x + {beta}·y, {rows}×{cols}"), y.get());
                    }
                }
            }
            // Columns of wider matrices that begin where vectors may, in rows that all do and in rows that do not.
            for (rows, cols, gap, skip) in [(5, 64, 8, 8), (5, 60, 16, 8), (5, 64, 3, 0)] {
                let part = skip..skip + cols;
                let (x, mut y) = (s.random(1, rows, cols + gap, 0, 2.0), s.random(2, rows, cols + gap, 0, 2.0));
                axpby(-2.0, x.mat().cols_in(part.clone()), 0.25, y.mat_mut().cols_in(part)).unwrap();
                s.out(format!("columns {skip} to {} of {}", skip + cols, cols + gap), y.get());
            }
        });
    }

    #[test]
    fn linear_combinations_equal_the_reference() {
        axpby_equals_the_reference();
    }

    #[test]
    fn every_type_is_cast_to_every_other() {
        for gpu in gpus() {
            let device = crate::Device::Cuda(gpu);
            for (rows, cols, pad) in [(3, 37, 3), (2, 64, 0), (1, 1, 0)] {
                let x = random(1, rows * cols, 2.0);
                for from in [F32, Bf16, F16] {
                    for to in [F32, Bf16, F16] {
                        let x = rounded(from, &x);
                        let px = Padded::on(&device, from, rows, cols, pad, &x);
                        let mut y = Padded::on(&device, to, rows, cols, pad, &vec![f64::NAN; rows * cols]);
                        axpby(1.0, px.mat(), 0.0, y.mat_mut()).unwrap();
                        assert_eq!(y.get(), rounded(to, &x), "{from:?} to {to:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn in_place_kernels_equal_the_reference() {
        parity("scale", &TYPES, |s| {
            for (rows, cols) in SHAPES {
                for pad in [0, 3, 8] {
                    let mut y = s.random(6, rows, cols, pad, 2.0);
                    scale(-0.3, y.mat_mut()).unwrap();
                    s.out("scale", y.get());
                    let mut y = s.poison(rows, cols, pad);
                    fill(0.75, y.mat_mut()).unwrap();
                    s.out("fill", y.get());
                    let (bias, mut y) = (s.random(4, 1, cols, pad, 1.0), s.random(3, rows, cols, pad, 1.0));
                    add_bias(bias.mat(), y.mat_mut()).unwrap();
                    s.out("add_bias", y.get());
                }
            }
            let mut y = s.given(1, 3, 0, &[1.0, f64::NAN, 2.0]);
            scale(0.0, y.mat_mut()).unwrap();
            s.out("0·NaN", y.get());
        });
    }

    #[test]
    fn a_factor_on_the_device_scales() {
        parity("scale_by", &TYPES, |s| {
            for factor in [0.3, 1.0, 0.0] {
                let mut y = s.random(6, 7, 33, 3, 2.0);
                scale_by(s.given_acc(1, 1, 0, &[factor]).mat(), y.mat_mut()).unwrap();
                s.out(format!("{factor} in f32"), y.get());
                let mut y = s.random(6, 7, 40, 0, 2.0);
                scale_by(s.given(1, 1, 0, &[factor]).mat(), y.mat_mut()).unwrap();
                s.out(format!("{factor}"), y.get());
            }
        });
    }

    fn sums_equal_the_reference() {
        // Sums are f32, of terms of both signs.
        parity("sum_rows", &[(F32, 2e-6), (Bf16, 2e-6), (F16, 2e-6)], |s| {
            for (rows, cols) in [(0, 3), (1, 1), (33, 7), (77, 129), (40, 256), (1100, 33)] {
                for (pad, beta) in [(0, 0.0), (3, 0.5), (8, 1.0)] {
                    let (dy, mut db) = (s.random(3, rows, cols, pad, 1.0), s.target_acc(4, 1, cols, pad, beta));
                    sum_rows(dy.mat(), db.acc(beta)).unwrap();
                    s.out(format!("{rows}×{cols}"), db.get());
                }
            }
            for (gap, skip) in [(8, 8), (3, 0)] {
                let (dy, mut db) = (s.random(3, 70, 256 + gap, 0, 1.0), s.poison_acc(1, 256, 0));
                sum_rows(dy.mat().cols_in(skip..skip + 256), db.acc(0.0)).unwrap();
                s.out(format!("256 columns of {}", 256 + gap), db.get());
            }
        });
    }

    #[test]
    fn column_sums_equal_the_reference() {
        sums_equal_the_reference();
        parity("sum_rows in the type", &TYPES, |s| {
            let (dy, mut db) = (s.random(3, 50, 70, 0, 1.0), s.target(4, 1, 70, 0, 1.0));
            sum_rows(dy.mat(), db.acc(1.0)).unwrap();
            s.out("db", db.get());
        });
    }

    #[test]
    fn parts_of_a_column_sum_cover_its_rows() {
        for (rows, cols, v) in
            [(0, 3, 4), (1, 1, 8), (8192, 768, 8), (8192, 50_257, 8), (1 << 20, 8, 4), (33, 1 << 20, 8)]
        {
            let (tiles, step) = (usize::div_ceil(cols, 32 * v), rows_per_part(rows, usize::div_ceil(cols, 32 * v)));
            let parts = usize::div_ceil(rows, step);
            assert!(
                parts * step >= rows && step >= 32 && parts <= PARTS,
                "{rows}×{cols}: {parts} parts of {step} rows"
            );
            assert!(tiles * parts <= PARTS.max(tiles), "{rows}×{cols}");
        }
    }

    #[cfg(feature = "emulator")]
    const MUTATIONS: &[Mutation] = &[
        Mutation {
            name: "the cut-off run of a row is left out",
            module: "elementwise",
            from: "run < runs; run += step",
            to: "run < whole; run += step",
            check: axpby_equals_the_reference,
        },
        Mutation {
            name: "the second of two runs is the first again",
            module: "elementwise",
            from: "f.load(b, row, (run + step) * N)",
            to: "f.load(b, row, run * N)",
            check: axpby_equals_the_reference,
        },
        Mutation {
            name: "vectors where rows are not aligned",
            module: "elementwise",
            from: "(rows > 1 ? (u64)ld * sizeof(T) : 0)",
            to: "0",
            check: axpby_equals_the_reference,
        },
        Mutation {
            name: "β is dropped",
            module: "elementwise",
            from: "result[i] + beta * old[i]",
            to: "result[i]",
            check: axpby_equals_the_reference,
        },
        Mutation {
            name: "no barrier before the warps' sums are added",
            module: "elementwise",
            from: "sums[warp][lane + 32 * i] = acc[i];\n  __syncthreads();",
            to: "sums[warp][lane + 32 * i] = acc[i];",
            check: sums_equal_the_reference,
        },
        Mutation {
            name: "the last rows of a part are left out",
            module: "elementwise",
            from: "first + step < rows ? first + step : rows;",
            to: "first + step < rows ? first + step : rows - 1;",
            check: sums_equal_the_reference,
        },
        Mutation {
            name: "the last warp's parts are forgotten",
            module: "elementwise",
            from: "for (int w = 1; w < WARPS; w++) sum += sums[w][lane];",
            to: "for (int w = 1; w < WARPS - 1; w++) sum += sums[w][lane];",
            check: sums_equal_the_reference,
        },
    ];

    #[test]
    #[cfg(feature = "emulator")]
    fn planted_bugs_are_caught() {
        all_are_caught(MUTATIONS);
    }
}
