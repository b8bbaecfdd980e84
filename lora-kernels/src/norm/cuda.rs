#![allow(unsafe_code)]

use std::sync::Arc;

use crate::{
    Acc, Buffer, DType, Mat, MatMut, Result,
    cuda::{Arch, Gpu, Module, map::typed, suffix},
    elementwise::cuda::add_partial,
};

const SOURCE: &str = concat!(include_str!("../cuda/map.cuh"), include_str!("norm.cu"));
pub(crate) static MODULE: Module = Module::new("norm", SOURCE, Arch::Any);

/// Blocks of a backward pass with sums over the rows, at most; each makes one partial sum. Twice the processors of an
/// H100, as many as run at once.
const PARTS: usize = 264;

/// How rows are dealt to threads: the part of a kernel's name, rows of a block, threads of a block.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Size {
    name: &'static str,
    rows: usize,
    threads: usize,
}

/// Rows that 128-bit words fit go to a warp or a block that keeps them in registers, all others are read again.
fn size(n: usize, mats: &[Mat]) -> Size {
    let fits = |m: &Mat| {
        let vector = 16 / m.dtype().size();
        n.is_multiple_of(vector) && m.address().is_multiple_of(16) && (m.rows() <= 1 || m.ld().is_multiple_of(vector))
    };
    match n {
        ..=1024 if mats.iter().all(fits) => Size { name: "short", rows: 4, threads: 128 },
        ..=8192 if mats.iter().all(fits) => Size { name: "long", rows: 1, threads: 256 },
        _ => Size { name: "any", rows: 1, threads: 256 },
    }
}

/// [`super::layer_norm`] with a β, [`super::rms_norm`] without.
pub(super) fn forward(
    gpu: &Arc<Gpu>,
    x: Mat,
    gamma: Mat,
    beta: Option<Mat>,
    eps: f64,
    y: MatMut,
    stats: MatMut,
) -> Result<()> {
    let (rows, n, dtype) = (y.rows(), y.cols(), y.dtype());
    let name = if beta.is_some() { "layer_norm" } else { "rms_norm" };
    let end = suffix(name, dtype)?;
    let mats: Vec<Mat> = [x, gamma].into_iter().chain(beta).chain([y.as_mat()]).collect();
    typed(name, dtype, &mats);
    typed(name, DType::F32, &[stats.as_mat()]);
    if rows == 0 {
        return Ok(());
    }
    let size = size(n, &mats);
    let mut l = gpu.launch(&MODULE, &format!("norm_{}_{end}", size.name))?;
    l.mat(x).i64(x.ld()).mat(gamma).mat_or_null(beta).mat_mut(&y).i64(y.ld()).mat_mut(&stats).i64(stats.ld());
    l.i32(rows).i32(n).i32(beta.is_some().into()).f32(eps);
    // SAFETY: x and y are rows × n, γ and β have n elements, the statistics a column more than `centred`; rows and
    // columns stay below these, and the sizes that use vectors are only chosen where all rows allow them.
    unsafe { l.run([rows.div_ceil(size.rows), 1, 1], size.threads, 0) }
}

/// [`super::layer_norm_backward`] when `centred`, [`super::rms_norm_backward`] else.
#[allow(clippy::too_many_arguments)] // those of the public functions
pub(super) fn backward(
    gpu: &Arc<Gpu>,
    centred: bool,
    x: Mat,
    gamma: Mat,
    stats: Mat,
    dy: Mat,
    dx: Option<Acc>,
    sums: [Option<Acc>; 2],
) -> Result<()> {
    let (rows, n, dtype) = (x.rows(), x.cols(), x.dtype());
    let name = if centred { "layer_norm_backward" } else { "rms_norm_backward" };
    let end = suffix(name, dtype)?;
    let mats: Vec<Mat> = [x, gamma, dy].into_iter().chain(dx.as_ref().map(|dx| dx.to.as_mat())).collect();
    typed(name, dtype, &mats);
    typed(name, DType::F32, &[stats]);
    assert!(dx.as_ref().is_none_or(|dx| (dx.to.rows(), dx.to.cols()) == (rows, n)), "{name}: dx has the shape of x");
    let asked = sums.iter().flatten().count();
    if asked == 0 && (dx.is_none() || rows * n == 0) {
        return Ok(());
    }
    let size = size(n, &mats);
    let blocks = rows.div_ceil(size.rows);
    // Without sums no block is longer than it must be; the size that keeps nothing has them always.
    let kernel = if asked == 0 && size.name != "any" { "norm_dx" } else { "norm_backward" };
    let parts = if asked == 0 { blocks } else { blocks.min(PARTS) };
    let mut partial = Buffer::empty(x.device(), DType::F32, asked * parts * n)?;
    if parts * n > 0 {
        let to = MatMut::new(&mut partial, 0, asked * parts, n);
        let mut l = gpu.launch(&MODULE, &format!("{kernel}_{}_{end}", size.name))?;
        l.mat(x).i64(x.ld()).mat(gamma).mat(stats).i64(stats.ld()).mat(dy).i64(dy.ld());
        l.acc(dx.as_ref()).i64(dx.as_ref().map_or(0, |dx| dx.to.ld()));
        let mut first = 0;
        for sum in &sums {
            let place = sum.as_ref().map(|_| first..first + parts);
            first += place.as_ref().map_or(0, |p| p.len());
            l.mat_or_null(place.map(|p| to.as_mat().rows_in(p)));
        }
        l.i32(rows).i32(n).i32(centred.into());
        let threads = if (kernel, size.name) == ("norm_backward", "long") { 512 } else { size.threads };
        // SAFETY: as in `forward`; each block writes its own row of the partial sums, [parts, n] each.
        unsafe { l.run([parts, 1, 1], threads, 0)? };
    }
    let mut first = 0;
    for sum in sums.into_iter().flatten() {
        add_partial(gpu, Mat::new(&partial, first * n, parts, n), sum)?;
        first += parts;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cuda::testing::*,
        layer_norm, layer_norm_backward, rms_norm, rms_norm_backward,
        testing::{Padded, random},
    };

    const EPS: f64 = 1e-5;
    /// (rows, columns, gap): every size of kernel, whole and cut-off runs, no rows.
    const SHAPES: [(usize, usize, usize); 10] = [
        (0, 8, 0),
        (1, 1, 0),
        (7, 33, 0),
        (5, 8, 8),
        (9, 128, 0),
        (3, 768, 0),
        (2, 1024, 3),
        (2, 1100, 0),
        (3, 1600, 8),
        (2, 8200, 0),
    ];

    fn inputs(s: &Side, rows: usize, n: usize, pad: usize) -> Padded {
        s.given(rows, n, pad, &random(1, rows * n, 2.0).iter().map(|x| x + 0.5).collect::<Vec<_>>())
    }

    fn rows_of_mean_0() {
        parity("norm", &[(F32, 4e-6), (Bf16, 1.6e-2), (F16, 2e-3)], |s| {
            for (rows, n, pad) in SHAPES {
                let x = inputs(s, rows, n, pad);
                let (gamma, beta) = (s.random(2, 1, n, 0, 2.0), s.random(3, 1, n, 0, 1.0));
                let (mut y, mut stats) = (s.poison(rows, n, pad), s.poison_acc(rows, 2, pad));
                layer_norm(x.mat(), gamma.mat(), beta.mat(), EPS, y.mat_mut(), stats.mat_mut()).unwrap();
                s.out(format!("layer {rows}×{n}"), y.get());
                s.out(format!("layer {rows}×{n}, statistics"), stats.get());
                let (mut y, mut stats) = (s.poison(rows, n, pad), s.poison_acc(rows, 1, pad));
                rms_norm(x.mat(), gamma.mat(), EPS, y.mat_mut(), stats.mat_mut()).unwrap();
                s.out(format!("rms {rows}×{n}"), y.get());
                s.out(format!("rms {rows}×{n}, statistics"), stats.get());
            }
            // Columns of wider matrices that begin where vectors may, in rows that all do and in rows that do not.
            for (n, gap, skip) in [(64, 8, 8), (1200, 16, 8), (64, 3, 0)] {
                let (x, mut y, mut stats) =
                    (s.random(1, 5, n + gap, 0, 2.0), s.random(4, 5, n + gap, 0, 1.0), s.poison_acc(5, 2, 0));
                let (gamma, beta, part) = (s.random(2, 1, n, 0, 2.0), s.random(3, 1, n, 0, 1.0), skip..skip + n);
                let (from, to) = (x.mat().cols_in(part.clone()), y.mat_mut().cols_in(part));
                layer_norm(from, gamma.mat(), beta.mat(), EPS, to, stats.mat_mut()).unwrap();
                s.out(format!("{n} columns of {}", n + gap), y.get());
            }
        });
    }

    #[test]
    fn forward_equals_the_reference() {
        rows_of_mean_0();
        // A mean that f32 holds with few of its digits, and a row without variance.
        parity("norm, far from 0", &[(F32, 1e-5)], |s| {
            for (mean, scale) in [(1000.0, 1.0), (7.0, 0.0)] {
                let data: Vec<f64> = random(1, 3 * 128, 1.0).iter().map(|x| mean + scale * x).collect();
                let (x, gamma, beta) =
                    (s.given(3, 128, 0, &data), s.random(2, 1, 128, 0, 2.0), s.random(3, 1, 128, 0, 1.0));
                let (mut y, mut stats) = (s.poison(3, 128, 0), s.poison_acc(3, 2, 0));
                layer_norm(x.mat(), gamma.mat(), beta.mat(), EPS, y.mat_mut(), stats.mat_mut()).unwrap();
                s.out(format!("mean {mean}"), y.get());
            }
        });
    }

    /// dx and the sums, those that are asked for; sums in f32 or in the tested type.
    fn gradients(s: &Side, rms: bool, (rows, n, pad): (usize, usize, usize), beta: f64, ask: [bool; 3], wide: bool) {
        let (x, gamma, dy) = (inputs(s, rows, n, pad), s.random(2, 1, n, 0, 2.0), s.random(4, rows, n, pad, 1.0));
        let mut stats = s.poison_acc(rows, 2 - usize::from(rms), 0);
        let (shift, mut y) = (s.random(3, 1, n, 0, 1.0), s.poison(rows, n, 0));
        let mut dx = s.target(5, rows, n, pad, beta);
        let sum = |seed| if wide { s.target_acc(seed, 1, n, pad, beta) } else { s.target(seed, 1, n, pad, beta) };
        let (mut dgamma, mut dbeta) = (sum(6), sum(7));
        let to = (ask[0].then(|| dx.acc(beta)), ask[1].then(|| dgamma.acc(beta)), ask[2].then(|| dbeta.acc(beta)));
        if rms {
            rms_norm(x.mat(), gamma.mat(), EPS, y.mat_mut(), stats.mat_mut()).unwrap();
            rms_norm_backward(x.mat(), gamma.mat(), stats.mat(), dy.mat(), to.0, to.1).unwrap();
        } else {
            layer_norm(x.mat(), gamma.mat(), shift.mat(), EPS, y.mat_mut(), stats.mat_mut()).unwrap();
            layer_norm_backward(x.mat(), gamma.mat(), stats.mat(), dy.mat(), to.0, to.1, to.2).unwrap();
        }
        for (what, got) in [("dx", dx), ("dγ", dgamma), ("dβ", dbeta)] {
            s.out(format!("{what} {rows}×{n}, rms {rms}, {ask:?}, β {beta}"), got.get());
        }
    }

    fn all_gradients() {
        parity("norm backward", &[(F32, 6e-6), (Bf16, 1.6e-2), (F16, 2e-3)], |s| {
            for shape in SHAPES {
                for rms in [false, true] {
                    gradients(s, rms, shape, 0.0, [true; 3], true);
                    gradients(s, rms, shape, 1.0, [true, false, false], true);
                }
            }
            gradients(s, false, (6, 40, 0), 0.5, [false, true, false], true);
            gradients(s, false, (6, 40, 0), 0.5, [false, false, true], false);
            gradients(s, false, (6, 33, 1), 0.5, [true, false, true], false);
            gradients(s, true, (6, 1600, 0), 0.0, [false, true, false], true);
        });
    }

    #[test]
    fn backward_equals_the_reference() {
        all_gradients();
    }

    #[test]
    fn more_rows_than_blocks_are_all_summed() {
        parity("norm backward, rows", &[(F32, 2e-5)], |s| {
            gradients(s, false, (4 * PARTS + 7, 8, 0), 0.0, [true; 3], true);
            gradients(s, false, (PARTS + 3, 7, 0), 0.0, [true; 3], true);
        });
    }

    #[test]
    fn the_size_follows_length_and_alignment() {
        let buf = Buffer::zeros(&crate::Device::Cpu, DType::F32, 3 * 8196).unwrap();
        let m = |rows, ld, n| Mat::new(&buf, 0, rows, ld).cols_in(0..n);
        let name = |m: Mat| size(m.cols(), &[m]).name;
        assert_eq!([name(m(3, 768, 768)), name(m(2, 1028, 1024)), name(m(3, 1028, 1028))], ["short", "short", "long"]);
        assert_eq!([name(m(3, 8192, 8192)), name(m(3, 8196, 8196)), name(m(3, 769, 768))], ["long", "any", "any"]);
        assert_eq!(
            [name(m(1, 769, 768)), name(m(3, 770, 770)), name(m(1, 16, 16).cols_in(1..9))],
            ["short", "any", "any"]
        );
    }

    #[cfg(feature = "emulator")]
    const MUTATIONS: &[Mutation] = &[
        Mutation {
            name: "no barrier before the warps' sums are read",
            module: "norm",
            from: "v[i];\n    }\n    __syncthreads();",
            to: "v[i];\n    }",
            check: rows_of_mean_0,
        },
        Mutation {
            name: "no barrier before the warps' sums are overwritten",
            module: "norm",
            from: "    __syncthreads();\n    if (threadIdx.x % 32 == 0) {\n#pragma unroll",
            to: "    if (threadIdx.x % 32 == 0) {\n#pragma unroll",
            check: rows_of_mean_0,
        },
        Mutation {
            name: "the mean goes into the variance",
            module: "norm",
            from: "float c = v[i] - mean[0];",
            to: "float c = v[i];",
            check: rows_of_mean_0,
        },
        Mutation {
            name: "the last run of a row is left out",
            module: "norm",
            from: "if (col < n) f(k, col);",
            to: "if (col + G < n) f(k, col);",
            check: rows_of_mean_0,
        },
        Mutation {
            name: "no barrier between the warps' turns",
            module: "norm",
            from: "        }\n        __syncthreads();\n      }",
            to: "        }\n      }",
            check: all_gradients,
        },
        Mutation {
            name: "the mean of g is forgotten",
            module: "norm",
            from: "g[i] * w[i] - g_mean - v[i] * k_x",
            to: "g[i] * w[i] - v[i] * k_x",
            check: all_gradients,
        },
        Mutation {
            name: "the first warp's sums are forgotten",
            module: "norm",
            from: "turn == 0 ? sum_gamma[k][i]",
            to: "turn <= 1 ? sum_gamma[k][i]",
            check: all_gradients,
        },
    ];

    #[test]
    #[cfg(feature = "emulator")]
    fn planted_bugs_are_caught() {
        all_are_caught(MUTATIONS);
    }
}
