#![allow(unsafe_code)]

use std::sync::Arc;

use crate::{
    DType, Mat, MatMut, Result,
    cuda::{Arch, Gpu, Module, suffix},
};

pub(crate) static MODULE: Module = Module::new("loss", include_str!("loss.cu"), Arch::Any);

/// Threads of a row, as in loss.cu.
const THREADS: usize = 512;

/// Of a block's static shared memory and the kibibyte that each block costs besides, generously.
const RESERVED: usize = 2 << 10;

/// Bytes of a row that a block keeps in shared memory: two blocks share a multiprocessor, so that one reads while the
/// other one writes.
fn cache_bytes(row_bytes: usize, shared_memory: usize) -> usize {
    row_bytes.min((shared_memory / 2).saturating_sub(RESERVED)) / 16 * 16
}

/// The gradient of `logits` into dz, or in place of them.
pub(super) fn cross_entropy(
    gpu: &Arc<Gpu>,
    logits: Option<Mat>,
    targets: Mat,
    smoothing: f64,
    scale: f64,
    dz: MatMut,
    losses: MatMut,
) -> Result<()> {
    let to = suffix("cross_entropy", dz.dtype())?;
    let name = match logits {
        Some(z) if z.dtype() != dz.dtype() => format!("{}_{to}", suffix("cross_entropy", z.dtype())?),
        _ => to.to_owned(),
    };
    let (n, v) = (dz.rows(), dz.cols());
    let z = logits.unwrap_or(dz.as_mat());
    check(z, targets, &losses);
    assert_eq!((z.rows(), z.cols()), (n, v), "cross_entropy: logits and gradient");
    if n == 0 {
        return Ok(());
    }
    let cache = cache_bytes(v * z.dtype().size(), gpu.info().shared_memory);
    let mut l = gpu.launch(&MODULE, &format!("cross_entropy_{name}"))?;
    l.mat(z).i64(z.ld()).mat_mut(&dz).i64(dz.ld()).mat(targets).mat_mut(&losses).i64(losses.ld());
    l.i32(v).f32(smoothing).f32(scale).i32(cache / 16);
    // SAFETY: block i reads row i of the logits, target i, and writes row i of dz and loss i; there are n of each, of v
    // classes. A target is compared to v before it is used. The logits are apart from dz or the same matrix: each thread
    // reads what it later overwrites. Types are those in the kernel's name.
    unsafe { l.run([n, 1, 1], THREADS, cache) }
}

pub(super) fn nll(gpu: &Arc<Gpu>, z: Mat, targets: Mat, smoothing: f64, losses: MatMut) -> Result<()> {
    let suffix = suffix("nll", z.dtype())?;
    check(z, targets, &losses);
    if z.rows() == 0 {
        return Ok(());
    }
    let mut l = gpu.launch(&MODULE, &format!("nll_{suffix}"))?;
    l.mat(z).i64(z.ld()).mat(targets).mat_mut(&losses).i64(losses.ld()).i32(z.cols()).f32(smoothing);
    // SAFETY: block i reads row i of the logits and target i, and writes loss i; there are as many of each as blocks. A
    // target is compared to the number of classes before it is used.
    unsafe { l.run([z.rows(), 1, 1], THREADS, 0) }
}

fn check(z: Mat, targets: Mat, losses: &MatMut) {
    assert!(!z.is_transposed() && !targets.is_transposed(), "cross_entropy: rows as they are stored");
    let types = (targets.dtype(), losses.dtype());
    assert_eq!(types, (DType::U32, z.dtype().accumulator()), "cross_entropy: types of targets and losses");
}

#[cfg(test)]
pub(crate) mod tests {
    use crate::{
        Acc, HeadTerm, Mat, MatMut,
        cuda::testing::*,
        loss::{cross_entropy, in_chunks, narrowed, nll},
    };

    fn classes(n: usize, v: usize) -> Vec<u32> {
        (0..n).map(|i| ((i * 7919 + v / 2) % v) as u32).collect()
    }

    /// Rows around the widths of vectors, of a block's first step, and longer than what shared memory keeps: with every
    /// alignment that a stride can bring about.
    const SHAPES: [(usize, usize, usize); 9] = [
        (3, 1, 0),
        (9, 7, 2),
        (2, 8, 0),
        (9, 31, 0),
        (5, 33, 5),
        (3, 129, 3),
        (2, 4097, 0),
        (1, 21_003, 0),
        (2, 42_011, 2),
    ];

    #[test]
    fn losses_and_gradients_equal_the_reference() {
        parity("cross_entropy", &[(F32, 2e-6), (Bf16, 4e-3), (F16, 5e-4)], |s| {
            for (n, v, pad) in SHAPES {
                for smoothing in if v > 5000 { &[0.1][..] } else { &[0.0, 0.1] } {
                    let ids = s.ids(&classes(n, v));
                    let t = Mat::new(&ids, 0, 1, n);
                    let mut z = s.random(1, n, v, pad, 8.0);
                    let mut l = s.poison_acc(n, 1, pad);
                    nll(z.mat(), t, *smoothing, l.mat_mut()).unwrap();
                    s.out(format!("nll {n}×{v}"), l.get());
                    let mut l = s.poison_acc(n, 1, 0);
                    // Scaled so that small probabilities count.
                    cross_entropy(z.mat_mut(), t, *smoothing, 3.0, l.mat_mut()).unwrap();
                    s.out(format!("losses {n}×{v}"), l.get());
                    s.out(format!("gradients {n}×{v}"), z.get());
                }
            }
        });
    }

    /// Losses have f32's accuracy whatever the logits' type, also where all logits are large; gradients far below 1 have
    /// theirs.
    #[test]
    fn losses_and_small_gradients_are_exact() {
        parity("cross_entropy", &[(F32, 1e-6), (Bf16, 1e-6), (F16, 1e-6)], |s| {
            let (n, v) = (3, 1001);
            let ids = s.ids(&classes(n, v));
            let t = Mat::new(&ids, 0, 1, n);
            for (shift, scale) in [(0.0, 20.0), (1000.0, 3.0), (-1000.0, 3.0)] {
                let data: Vec<f64> = crate::testing::random(2, n * v, scale).iter().map(|z| z + shift).collect();
                let z = s.given(n, v, 1, &data);
                let mut l = s.poison_acc(n, 1, 0);
                nll(z.mat(), t, 0.1, l.mat_mut()).unwrap();
                s.out(format!("nll at {shift}"), l.get());
            }
        });
        parity("cross_entropy", &[(F32, 3e-6)], |s| {
            let (n, v) = (3, 1001);
            let ids = s.ids(&classes(n, v));
            let (mut z, mut l) = (s.random(3, n, v, 1, 3.0), s.poison_acc(n, 1, 0));
            cross_entropy(z.mat_mut(), Mat::new(&ids, 0, 1, n), 0.1, 1001.0, l.mat_mut()).unwrap();
            s.out("gradients · V", z.get());
        });
    }

    /// f32 logits to 16-bit gradients, at every alignment of both.
    #[test]
    fn narrowed_gradients_equal_the_reference() {
        parity("cross_entropy to 16 bits", &[(Bf16, 4e-3), (F16, 5e-4)], |s| {
            for (n, v, pad) in [(3, 1, 0), (9, 31, 0), (5, 129, 7), (2, 4100, 4), (1, 21_003, 0)] {
                for to_pad in [0, 3] {
                    let ids = s.ids(&classes(n, v));
                    let t = Mat::new(&ids, 0, 1, n);
                    let mut z = s.random_acc(1, n, v, pad, 8.0);
                    let mut l = s.poison_acc(n, 1, 0);
                    let gradients = if s.is_reference() {
                        cross_entropy(z.mat_mut(), t, 0.1, 3.0, l.mat_mut()).unwrap();
                        z.get()
                    } else {
                        let before = z.get();
                        let mut dz = s.poison(n, v, to_pad);
                        narrowed(z.mat(), t, 0.1, 3.0, dz.mat_mut(), l.mat_mut()).unwrap();
                        assert_eq!(z.get(), before, "the logits stay");
                        dz.get()
                    };
                    s.out(format!("losses {n}×{v}"), l.get());
                    s.out(format!("gradients {n}×{v}"), gradients);
                }
            }
        });
    }

    #[test]
    fn what_is_no_number_and_no_class_is_nan_in_its_row_alone() {
        parity("cross_entropy", &[(F32, 1e-6), (Bf16, 4e-3)], |s| {
            let (n, v) = (6, 700);
            let mut data = crate::testing::random(4, n * v, 2.0);
            data[3] = f64::NAN;
            data[v + 2..v + 600].fill(f64::NEG_INFINITY);
            data[2 * v..3 * v].fill(f64::NEG_INFINITY);
            data[3 * v + 699] = f64::INFINITY;
            // Row 4's target is no class: the reference gets NaN instead.
            let mut targets = vec![1u32; n];
            if s.is_reference() {
                data[4 * v] = f64::NAN;
            } else {
                targets[4] = v as u32;
            }
            let ids = s.ids(&targets);
            let t = Mat::new(&ids, 0, 1, n);
            let (mut z, mut l) = (s.given(n, v, 0, &data), s.poison_acc(n, 1, 0));
            nll(z.mat(), t, 0.0, l.mat_mut()).unwrap();
            s.out("nll", l.get());
            cross_entropy(z.mat_mut(), t, 0.0, 1.0, l.mat_mut()).unwrap();
            s.out("losses", l.get());
            s.out("gradients", z.get());
        });
    }

    #[test]
    fn the_head_equals_the_reference() {
        parity("loss_head", &[(F32, 1e-5), (Bf16, 2e-2), (F16, 4e-3)], |s| {
            for (n, d, v) in [(0usize, 3, 5), (1, 1, 1), (7, 8, 33), (33, 31, 129)] {
                for stored in [true, false] {
                    // All rows at once, and three chunks of which the last is short.
                    for rows in [n, n.div_ceil(3).max(1)] {
                        for (beta, wide_bias) in [(0.0, false), (1.0, true)] {
                            let x = s.random(4, n, d, 3, 1.0);
                            let (r, c) = if stored { (v, d) } else { (d, v) };
                            let w = s.random(5, r, c, 2, 1.0);
                            // Of the type of w, or of the accumulator's.
                            let b = if wide_bias { s.random_acc(8, 1, v, 0, 2.0) } else { s.random(8, 1, v, 0, 2.0) };
                            let ids = s.ids(&classes(n, v));
                            let t = Mat::new(&ids, 0, 1, n);
                            let mut l = s.poison_acc(n, 1, 0);
                            let mut dx = s.target(6, n, d, 1, beta);
                            let mut dw = s.target_acc(7, r, c, 1, beta);
                            let mut db = s.target_acc(9, 1, v, 1, beta);
                            let (w, b) = (w.mat().t_if(stored), Some(b.mat()));
                            let run = |l: MatMut, [dx, dw, db]: [Option<Acc>; 3]| {
                                let term = HeadTerm { factor: 1.0, x: x.mat(), w, dx, dw };
                                in_chunks(rows, vec![term], b, t, 0.1, 0.5, l, db).unwrap();
                            };
                            run(l.mat_mut(), [Some(dx.acc(beta)), Some(dw.acc(beta)), Some(db.acc(beta))]);
                            s.out(format!("losses {n}×{d}×{v}"), l.get());
                            s.out(format!("dx {n}×{d}×{v}"), dx.get());
                            s.out(format!("dw {n}×{d}×{v}"), dw.get());
                            s.out(format!("db {n}×{d}×{v}"), db.get());
                            let mut l = s.poison_acc(n, 1, 0);
                            run(l.mat_mut(), [None, None, None]);
                            s.out(format!("losses alone {n}×{d}×{v}"), l.get());

                            // With a low-rank product beside it.
                            let (h, up) = (s.random(10, n, 2, 1, 1.0), s.random(11, v, 2, 0, 1.0));
                            let (mut l, mut dx) = (s.poison_acc(n, 1, 0), s.target(6, n, d, 1, beta));
                            let (mut dh, mut du) = (s.target(12, n, 2, 0, beta), s.target_acc(13, v, 2, 1, beta));
                            let (to_h, to_u) = (Some(dh.acc(beta)), Some(du.acc(beta)));
                            let terms = vec![
                                HeadTerm { factor: 1.0, x: x.mat(), w, dx: Some(dx.acc(beta)), dw: None },
                                HeadTerm { factor: 0.5, x: h.mat(), w: up.mat().t(), dx: to_h, dw: to_u },
                            ];
                            in_chunks(rows, terms, b, t, 0.1, 0.5, l.mat_mut(), None).unwrap();
                            s.out(format!("losses of two {n}×{d}×{v}"), l.get());
                            s.out(format!("dx of two {n}×{d}×{v}"), dx.get());
                            s.out(format!("dh {n}×{d}×{v}"), dh.get());
                            s.out(format!("du {n}×{d}×{v}"), du.get());
                        }
                    }
                }
            }
        });
    }

    #[test]
    fn rows_are_kept_where_two_blocks_fit() {
        use super::cache_bytes;
        // bf16 rows of GPT-2 fit twice into an H100, not into an A100; f32 rows in part.
        let (h100, a100) = (227 << 10, 163 << 10);
        assert_eq!(cache_bytes(2 * 50_257, h100), 100_512);
        assert_eq!(cache_bytes(2 * 50_257, a100), 81_408);
        assert_eq!(cache_bytes(4 * 50_257, h100), 114_176);
        assert_eq!(cache_bytes(0, h100), 0);
        assert_eq!(cache_bytes(15, h100), 0);
        for (per_block, per_multiprocessor) in [(h100, 228 << 10), (a100, 164 << 10), (99 << 10, 100 << 10)] {
            // Each block costs a kibibyte besides, and has two arrays of 16 floats of its own.
            assert!(2 * (cache_bytes(usize::MAX, per_block) + (1 << 10) + 128) <= per_multiprocessor);
        }
    }

    pub(crate) const MUTATIONS: &[Mutation] = &[
        Mutation {
            name: "the head of an unaligned row is left out",
            module: "loss",
            from: "const int edge = t < head ? t : t + vectors * N;",
            to: "const int edge = t + vectors * N;",
            check: losses_and_gradients_equal_the_reference,
        },
        Mutation {
            name: "the tail of a row is one element short",
            module: "loss",
            from: "const int edges = cols - vectors * N;",
            to: "const int edges = cols - vectors * N - 1;",
            check: losses_and_gradients_equal_the_reference,
        },
        Mutation {
            name: "the sum is not rescaled when the maximum grows",
            module: "loss",
            from: "r.sum *= fast_exp2((r.max - m) * LOG2E);",
            to: "",
            check: losses_and_gradients_equal_the_reference,
        },
        Mutation {
            name: "threads' sums are not brought to the block's maximum",
            module: "loss",
            from: "block_sum<THREADS>(r.sum * fast_exp2((r.max - top) * LOG2E), scratch[1])",
            to: "block_sum<THREADS>(r.sum, scratch[1])",
            check: losses_and_gradients_equal_the_reference,
        },
        Mutation {
            name: "no barrier before the target's element is written",
            module: "loss",
            from: "  __syncthreads();\n  if (t == 0 && valid)",
            to: "  if (t == 0 && valid)",
            check: losses_and_gradients_equal_the_reference,
        },
        Mutation {
            name: "one vector more than shared memory holds is kept",
            module: "loss",
            from: "if (GRADIENT && i < cached)",
            to: "if (GRADIENT && i <= cached)",
            check: losses_and_gradients_equal_the_reference,
        },
        Mutation {
            name: "what is not kept is taken from shared memory all the same",
            module: "loss",
            from: "i < cached ? cache[i] : body[i]",
            to: "cache[i]",
            check: losses_and_gradients_equal_the_reference,
        },
        Mutation {
            name: "smoothing is left out of the loss",
            module: "loss",
            from: "if (smooth) l -= smoothing",
            to: "if (false) l -= smoothing",
            check: losses_and_gradients_equal_the_reference,
        },
        Mutation {
            name: "the stores' alignment is not looked at",
            module: "loss",
            from: "const bool aligned = (u64)out % (N * sizeof(U)) == 0;",
            to: "const bool aligned = true;",
            check: narrowed_gradients_equal_the_reference,
        },
        Mutation {
            name: "a target is not compared to the number of classes",
            module: "loss",
            from: "const bool valid = target < (u32)cols",
            to: "const bool valid = true",
            check: what_is_no_number_and_no_class_is_nan_in_its_row_alone,
        },
        Mutation {
            name: "the running maximum starts at −∞",
            module: "loss",
            from: "LOWEST = -3.402823466e38f",
            to: "LOWEST = -__builtin_inff()",
            check: what_is_no_number_and_no_class_is_nan_in_its_row_alone,
        },
    ];

    #[cfg(feature = "emulator")]
    #[test]
    fn planted_bugs_are_caught() {
        all_are_caught(MUTATIONS);
    }
}
