#![allow(unsafe_code)]

use std::sync::Arc;

use super::{AdamW, Rule};
use crate::{
    Buffer, DType, Error, Mat, MatMut, Result,
    cuda::{Arch, Gpu, Module, suffix},
};

pub(crate) static MODULE: Module = Module::new("adamw", include_str!("adamw.cu"), Arch::Any);

/// Threads of a block, as in adamw.cu.
const THREADS: usize = 256;

/// Vectors of 16 bytes of one thread in one segment of [`sum_squares`], as in adamw.cu.
const VECTORS: usize = 4;

/// Blocks of [`sum_squares`], and so partial sums, at most: enough for eight on each of a large device's multiprocessors.
/// A constant, because the order of the sums follows from it.
const PARTIALS: usize = 1024;

/// The numbers of a step, as the kernel takes them.
#[repr(C)]
#[derive(Clone, Copy)]
struct DeviceRule([f32; 7]);

pub(super) fn adamw(
    gpu: &Arc<Gpu>,
    cfg: &AdamW,
    factor: Option<Mat>,
    p: MatMut,
    g: Mat,
    m: MatMut,
    v: MatMut,
) -> Result<()> {
    let shape = (p.rows(), p.cols());
    assert!(
        [g.rows(), m.rows(), v.rows()] == [shape.0; 3] && [g.cols(), m.cols(), v.cols()] == [shape.1; 3],
        "adamw: all matrices are {}×{}",
        shape.0,
        shape.1
    );
    assert!(!g.is_transposed(), "adamw: a gradient as it is stored");
    for dtype in [p.dtype(), g.dtype(), m.dtype(), v.dtype()].into_iter().chain(factor.map(|f| f.dtype())) {
        if dtype != DType::F32 {
            return Err(Error::DType { kernel: "adamw", dtype });
        }
    }
    let Rule { keep, new1, beta2, new2, step, root, eps } = cfg.rule::<f32>();
    let ((rows, cols), flat) = flattened(shape, [p.ld(), g.ld(), m.ld(), v.ld()]);
    let ld = |ld: usize| if flat { cols } else { ld };
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let mut l = gpu.launch(&MODULE, "adamw_f32")?;
    l.mat_mut(&p).i64(ld(p.ld())).mat(g).i64(ld(g.ld())).mat_mut(&m).i64(ld(m.ld())).mat_mut(&v).i64(ld(v.ld()));
    l.i64(rows).i64(cols).raw(DeviceRule([keep, new1, beta2, new2, step, root, eps])).mat_or_null(factor);
    // SAFETY: each thread takes the elements of its window that lie inside the rows and columns, which all four matrices
    // have; a factor, where there is one, is one f32.
    unsafe { l.run([windows(cols).div_ceil(THREADS), rows.min(65_535), 1], THREADS, 0) }
}

/// Windows of four elements that cover a row, however many elements of the first one lie before it.
fn windows(cols: usize) -> usize {
    (cols + 3).div_ceil(4)
}

/// The shape as one row where no matrix has gaps, and whether it is one.
fn flattened<const N: usize>((rows, cols): (usize, usize), lds: [usize; N]) -> ((usize, usize), bool) {
    let flat = rows <= 1 || lds.iter().all(|&ld| ld == cols);
    (if flat { (rows.min(1), rows * cols) } else { (rows, cols) }, flat)
}

/// Segments of a row of [`sum_squares`], for elements of `size` bytes: they cover it wherever in 16 bytes it begins.
fn segments(cols: usize, size: usize) -> usize {
    let vector = 16 / size;
    (cols + vector - 1).div_ceil(THREADS * VECTORS * vector)
}

pub(super) fn sum_squares(gpu: &Arc<Gpu>, x: Mat, out: MatMut) -> Result<()> {
    let suffix = suffix("sum_squares", x.dtype())?;
    // A sum does not care for the order of rows and columns.
    let x = x.t_if(x.is_transposed());
    let ((rows, cols), flat) = flattened((x.rows(), x.cols()), [x.ld()]);
    let per_row = if rows == 0 || cols == 0 { 0 } else { segments(cols, x.dtype().size()) };
    let blocks = (rows * per_row).min(PARTIALS);
    let mut partial = Buffer::empty(x.device(), DType::F64, blocks)?;
    let partial = MatMut::new(&mut partial, 0, 1, blocks);
    if blocks > 0 {
        let mut l = gpu.launch(&MODULE, &format!("sum_squares_{suffix}"))?;
        l.mat(x).i64(if flat { cols } else { x.ld() }).i64(rows).i64(cols).i64(per_row).mat_mut(&partial);
        // SAFETY: elements before and behind a row are left out; block b writes partial sum b.
        unsafe { l.run([blocks, 1, 1], THREADS, 0)? };
    }
    let mut l = gpu.launch(&MODULE, "sum_partials")?;
    l.mat_mut(&partial).i32(blocks).mat_mut(&out);
    // SAFETY: reads that many partial sums and writes one f64, which `out` is.
    unsafe { l.run([1, 1, 1], THREADS, 0) }
}

pub(super) fn clip_factor(gpu: &Arc<Gpu>, loss: Mat, sum_squares: Mat, limit: f64, factor: MatMut) -> Result<()> {
    for dtype in [loss.dtype(), factor.dtype()] {
        if dtype != DType::F32 {
            return Err(Error::DType { kernel: "clip_factor", dtype });
        }
    }
    let mut l = gpu.launch(&MODULE, "clip_factor")?;
    l.mat(loss).mat(sum_squares).raw(limit).mat_mut(&factor);
    // SAFETY: single numbers of the kernel's types, as checked here and by the caller.
    unsafe { l.run([1, 1, 1], 32, 0) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::{PARTIALS, flattened, segments, windows};
    use crate::{
        AdamW, Buffer, DType, Device, Mat, MatMut, adamw, adamw_clipped, all_finite, clip_factor,
        cuda::testing::*,
        sum_squares, sum_squares_into,
        testing::{Padded, close, random},
    };

    fn cfg(step: u64) -> AdamW {
        AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, step }
    }

    /// Shapes, gaps, and a shift between the gradient's gaps and the others': it takes the vectors away.
    const SHAPES: [(usize, usize, usize, usize); 8] = [
        (0, 3, 0, 0),
        (1, 1, 0, 0),
        (1, 7, 2, 0),
        (1, 33, 3, 0),
        (3, 129, 3, 0),
        (3, 31, 0, 1),
        (2, 64, 0, 0),
        (1, 2100, 5, 0),
    ];

    /// Parameters and both moments after some steps: f32 on `device`, bit for bit what f32 is on the CPU.
    fn steps(device: &Device, (rows, cols, pad, shift): (usize, usize, usize, usize), factor: Option<f64>) -> Vec<f64> {
        let n = rows * cols;
        let on = |pad, data: &[f64]| Padded::on(device, DType::F32, rows, cols, pad, data);
        let mut p = on(pad, &random(1, n, 1.0));
        let (mut m, mut v) =
            (on(pad, &random(2, n, 0.1)), on(pad, &random(3, n, 0.1).iter().map(|v| v * v).collect::<Vec<_>>()));
        for step in [1, 2, 1000] {
            let g = on(pad + shift, &random(step + 3, n, 2.0));
            match factor {
                None => adamw(&cfg(step), p.mat_mut(), g.mat(), m.mat_mut(), v.mat_mut()).unwrap(),
                Some(f) => {
                    let f = Padded::on(device, DType::F32, 1, 1, 0, &[f]);
                    adamw_clipped(&cfg(step), f.mat(), p.mat_mut(), g.mat(), m.mat_mut(), v.mat_mut()).unwrap();
                }
            }
        }
        [p.get(), m.get(), v.get()].concat()
    }

    #[test]
    fn adamw_equals_the_cpu_bit_for_bit() {
        for gpu in gpus() {
            for shape in SHAPES {
                for factor in [None, Some(1.0), Some(0.3), Some(f64::NAN), Some(f64::INFINITY)] {
                    let (got, want) =
                        (steps(&Device::Cuda(gpu.clone()), shape, factor), steps(&Device::Cpu, shape, factor));
                    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                        assert!(
                            got.to_bits() == want.to_bits(),
                            "{shape:?}, {factor:?}, at {i}: {got}, expected {want}"
                        );
                    }
                }
            }
            gpu.synchronize().unwrap();
        }
    }

    #[test]
    fn sums_of_squares_equal_the_reference() {
        for gpu in gpus() {
            let device = Device::Cuda(gpu.clone());
            for dtype in [F32, Bf16, F16] {
                // The last ones take several segments, in one row and in rows with gaps.
                for (rows, cols, pad) in [
                    (0, 3, 0),
                    (3, 0, 2),
                    (1, 1, 0),
                    (1, 7, 2),
                    (3, 33, 2),
                    (2, 129, 0),
                    (1, 9000, 3),
                    (3, 8191, 1),
                    (5, 8200, 0),
                ] {
                    let x = crate::testing::rounded(dtype, &random(1, rows * cols, 2.0));
                    let px = Padded::on(&device, dtype, rows, cols, pad, &x);
                    let want = sum_squares(Padded::new(DType::F64, rows, cols, 0, &x).mat()).unwrap();
                    close("Σ x²", &[sum_squares(px.mat()).unwrap()], &[want], 1e-13);
                    close("Σ x²", &[sum_squares(px.mat().t()).unwrap()], &[want], 1e-13);
                    assert!(all_finite(px.mat()).unwrap());
                    for bad in [f64::NAN, f64::NEG_INFINITY] {
                        for at in [0, x.len() / 2, x.len().wrapping_sub(1)] {
                            if at < x.len() {
                                let mut y = x.clone();
                                y[at] = bad;
                                let py = Padded::on(&device, dtype, rows, cols, pad, &y);
                                assert!(!all_finite(py.mat()).unwrap(), "{bad} at {at} of {rows}×{cols}");
                            }
                        }
                    }
                }
            }
            // Squares that f32 cannot hold.
            let x = Padded::on(&device, F32, 1, 2, 0, &[1e30, 1e30]);
            let square = f64::from(1e30f32).powi(2);
            close("Σ x²", &[sum_squares(x.mat()).unwrap() / square], &[2.0], 1e-13);
            gpu.synchronize().unwrap();
        }
    }

    /// More segments than blocks, so that each block takes several.
    #[test]
    fn more_segments_than_partial_sums() {
        for gpu in gpus() {
            let device = Device::Cuda(gpu.clone());
            let (rows, cols) = (PARTIALS + 70, 3);
            let x = random(5, rows * cols, 2.0);
            let px = Padded::on(&device, F32, rows, cols, 1, &x);
            let want: f64 = x.iter().map(|x| x * x).sum();
            close("Σ x²", &[sum_squares(px.mat()).unwrap()], &[want], 1e-13);
        }
    }

    #[test]
    fn clip_factors_equal_the_cpu() {
        let device_factor = |device: &Device, loss: f64, norm: f64, limit: f64, before: f64| {
            let one = |dtype, value| Padded::on(device, dtype, 1, 1, 0, &[value]);
            let mut factor = one(F32, before);
            let sum = one(DType::F64, norm * norm);
            clip_factor(one(F32, loss).mat(), sum.mat(), limit, factor.mat_mut()).unwrap();
            factor.get()[0]
        };
        for gpu in gpus() {
            for (loss, norm, limit, before) in [
                (2.5, 4.1, 1.3, 1.0),
                (2.5, 4.0, 8.0, 0.5),
                (2.5, 4.0, 4.0, 1.0),
                (2.5, 4.0, 0.0, 1.0),
                (2.5, 0.0, 1.0, 1.0),
                (2.5, 1.84e19, 1.0, 1.0),
                (2.5, 1.85e19, 1.0, 1.0),
                (f64::NAN, 1.0, 1.0, 1.0),
                (f64::INFINITY, 1.0, 1.0, 1.0),
                (1.0, f64::NAN, 1.0, 1.0),
                (1.0, f64::INFINITY, 0.0, 1.0),
                (1.0, 1.0, 1.0, f64::NAN),
            ] {
                let got = device_factor(&Device::Cuda(gpu.clone()), loss, norm, limit, before);
                let want = device_factor(&Device::Cpu, loss, norm, limit, before);
                let same = got == want || got.is_nan() && want.is_nan();
                assert!(same, "loss {loss}, norm {norm}, limit {limit}, before {before}: {got}, expected {want}");
            }
        }
    }

    /// A step as the trainer does it, all numbers staying on the device, in parts that begin anywhere.
    #[test]
    fn a_step_of_parts_of_flat_buffers_is_that_of_the_cpu() {
        let step = |device: &Device| {
            let n = 301;
            let buffer = |seed| {
                Buffer::from_slice(device, &random(seed, n, 1.0).iter().map(|&x| x as f32).collect::<Vec<_>>()).unwrap()
            };
            let (mut p, g, mut m) = (buffer(1), buffer(2), buffer(3));
            let mut v = Buffer::zeros(device, F32, n).unwrap();
            let mut factor = Buffer::from_slice(device, &[1f32]).unwrap();
            let loss = Buffer::from_slice(device, &[3f32]).unwrap();
            let mut sum = Buffer::empty(device, DType::F64, 1).unwrap();
            sum_squares_into(Mat::new(&g, 0, 1, n), MatMut::new(&mut sum, 0, 1, 1)).unwrap();
            let to = MatMut::new(&mut factor, 0, 1, 1);
            clip_factor(Mat::new(&loss, 0, 1, 1), Mat::new(&sum, 0, 1, 1), 0.7, to).unwrap();
            for r in [0..33, 33..34, 34..250, 250..301] {
                let part = |x| MatMut::new(x, 0, 1, n).cols_in(r.clone());
                let (f, g) = (Mat::new(&factor, 0, 1, 1), Mat::new(&g, 0, 1, n).cols_in(r.clone()));
                adamw_clipped(&cfg(1), f, part(&mut p), g, part(&mut m), part(&mut v)).unwrap();
            }
            [p, m, v].map(|x| x.to_vec::<f32>(0..n).unwrap()).concat()
        };
        let want = step(&Device::Cpu);
        for gpu in gpus() {
            assert!(step(&Device::Cuda(gpu)) == want, "other bits");
        }
    }

    #[test]
    fn launches_cover_every_element() {
        for cols in [1, 3, 4, 5, 1023, 1024, 1025] {
            for skew in 0..4 {
                // The last window ends at or behind the row's end, and none is superfluous for every skew.
                assert!(windows(cols) * 4 - skew >= cols && (windows(cols) - 1) * 4 < cols + 3);
            }
        }
        for (size, vector) in [(4, 4), (2, 8)] {
            let segment = 1024 * vector;
            for cols in [1, segment - vector, segment - vector + 1, segment, segment + 1, 10 * segment] {
                let n = segments(cols, size);
                assert!(n * segment - (vector - 1) >= cols && (n - 1) * segment < cols + vector - 1);
            }
        }
        assert_eq!(flattened((3, 5), [5, 5]), ((1, 15), true));
        assert_eq!(flattened((3, 5), [5, 6]), ((3, 5), false));
        assert_eq!(flattened((1, 5), [9, 7]), ((1, 5), true));
        assert_eq!(flattened((0, 5), [9]), ((0, 0), true));
    }

    pub(crate) const MUTATIONS: &[Mutation] = &[
        Mutation {
            name: "the square of the gradient is taken in another order",
            module: "adamw",
            from: "__fmul_rn(__fmul_rn(r.new2, g), g)",
            to: "__fmul_rn(r.new2, __fmul_rn(g, g))",
            check: adamw_equals_the_cpu_bit_for_bit,
        },
        Mutation {
            name: "the mean is updated without a fused operation",
            module: "adamw",
            from: "m = __fmaf_rn(__fadd_rn(g, -m), r.new1, m);",
            to: "m = __fadd_rn(__fmul_rn(__fadd_rn(g, -m), r.new1), m);",
            check: adamw_equals_the_cpu_bit_for_bit,
        },
        Mutation {
            name: "the window before a row's first vector is left out",
            module: "adamw",
            from: "for (i64 j = max(i, (i64)0); j < min(i + 4, cols); j++)",
            to: "for (i64 j = i; j >= 0 && j < min(i + 4, cols); j++)",
            check: adamw_equals_the_cpu_bit_for_bit,
        },
        Mutation {
            name: "the last vector goes past the row's end",
            module: "adamw",
            from: "aligned && i >= 0 && i + 4 <= cols",
            to: "aligned && i >= 0 && i < cols",
            check: a_step_of_parts_of_flat_buffers_is_that_of_the_cpu,
        },
        Mutation {
            name: "the gradient's alignment is not looked at",
            module: "adamw",
            from: "((u64)pr ^ (u64)gr) | ",
            to: "",
            check: adamw_equals_the_cpu_bit_for_bit,
        },
        Mutation {
            name: "a step with an infinite factor is done",
            module: "adamw",
            from: "if (f - f != 0.f) return;",
            to: "if (f != f) return;",
            check: adamw_equals_the_cpu_bit_for_bit,
        },
        Mutation {
            name: "no barrier between the levels of the tree",
            module: "adamw",
            from: "__syncthreads();\n    if (threadIdx.x < half)",
            to: "if (half == THREADS / 2) __syncthreads();\n    if (threadIdx.x < half)",
            check: sums_of_squares_equal_the_reference,
        },
        Mutation {
            name: "no barrier before the tree",
            module: "adamw",
            from: "__syncthreads();\n    if (threadIdx.x < half)",
            to: "if (half < THREADS / 2) __syncthreads();\n    if (threadIdx.x < half)",
            check: sums_of_squares_equal_the_reference,
        },
        Mutation {
            name: "segments begin where an aligned row would",
            module: "adamw",
            from: " - (i64)((u64)row % 16 / sizeof(T));",
            to: ";",
            check: sums_of_squares_equal_the_reference,
        },
        Mutation {
            name: "partial sums beyond the first block's are left out",
            module: "adamw",
            from: "partial[blockIdx.x] = sum;",
            to: "partial[0] = sum;",
            check: sums_of_squares_equal_the_reference,
        },
        Mutation {
            name: "squares in f32",
            module: "adamw",
            from: "(double)x * (double)x",
            to: "(double)(x * x)",
            check: sums_of_squares_equal_the_reference,
        },
        Mutation {
            name: "a step after one that was left out is done",
            module: "adamw",
            from: "*factor - *factor == 0.f && ",
            to: "",
            check: clip_factors_equal_the_cpu,
        },
        Mutation {
            name: "a limit of 0 clips",
            module: "adamw",
            from: "limit > 0. && ",
            to: "",
            check: clip_factors_equal_the_cpu,
        },
    ];

    #[cfg(feature = "emulator")]
    #[test]
    fn planted_bugs_are_caught() {
        all_are_caught(MUTATIONS);
    }
}
