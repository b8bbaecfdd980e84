//! Kernels that do little with each number, against the bandwidth of the device's own copies.

use anyhow::Result;
use lora_core::Tensor;
use lora_kernels::{
    Acc, Activation, AdamW, Buffer, DType, Mat, activation, activation_backward, adamw, axpby, cross_entropy,
    layer_norm, layer_norm_backward, rms_norm, rms_norm_backward, silu_gate, silu_gate_backward, sum_squares_into,
};

use super::{Bench, Measure, Rows, goal, needed};
use crate::report::{Goal, Row};

const BF16: DType = DType::Bf16;
const F32: DType = DType::F32;
const EPS: f64 = 1e-5;

/// Does one kernel on the matrices of a copy.
type Kernel = fn(&mut Set) -> Result<()>;

/// The matrices of one copy: those that are read, those that are written, and numbers per row or column.
struct Set {
    x: Vec<Tensor>,
    y: Vec<Tensor>,
    /// Two rows as long as a row of the others.
    vectors: [Tensor; 2],
    /// Two f32 per row.
    stats: Tensor,
    targets: Tensor,
}

/// What one kernel is measured on.
#[derive(Clone, Copy)]
struct Case {
    dtype: DType,
    rows: usize,
    cols: usize,
    /// Matrices that are read, and written.
    matrices: [usize; 2],
    /// Times that the kernel has to read and write a matrix at least.
    passes: usize,
    kernel: Kernel,
}

pub(super) fn rows(bench: &Bench) -> Rows {
    let mut rows: Rows = Vec::new();
    let mut add = |what: &str, goal: Option<Goal>, case: Case| {
        let measure: Measure = Box::new(move |bench, row| measure(bench, &case, row));
        let dtype = if case.dtype == F32 { "f32" } else { "bf16" };
        rows.push((Row::new(format!("{what}, {dtype}, {}×{}", case.rows, case.cols), "GB/s", goal), measure));
    };
    let close = goal(0.85, 0.92);
    let (rows_, cols) = bench.size((8192, 4096), (9, 72));
    let wide = |matrices: [usize; 2], kernel| Case {
        dtype: BF16,
        rows: rows_,
        cols,
        matrices,
        passes: matrices[0] + matrices[1],
        kernel,
    };
    add(
        "layer norm",
        close,
        wide([1, 1], |s| {
            Ok(layer_norm(
                s.x[0].mat(),
                s.vectors[0].mat(),
                s.vectors[1].mat(),
                EPS,
                s.y[0].make_mut()?,
                s.stats.make_mut()?,
            )?)
        }),
    );
    add(
        "layer norm backward, dx",
        close,
        wide([2, 1], |s| {
            let dx = Acc { to: s.y[0].make_mut()?, beta: 0.0 };
            Ok(layer_norm_backward(
                s.x[0].mat(),
                s.vectors[0].mat(),
                s.stats.mat(),
                s.x[1].mat(),
                Some(dx),
                None,
                None,
            )?)
        }),
    );
    add(
        "RMS norm",
        close,
        wide([1, 1], |s| {
            Ok(rms_norm(s.x[0].mat(), s.vectors[0].mat(), EPS, s.y[0].make_mut()?, s.stats.make_mut()?.cols_in(0..1))?)
        }),
    );
    add(
        "RMS norm backward, dx",
        close,
        wide([2, 1], |s| {
            let (dx, stats) = (Acc { to: s.y[0].make_mut()?, beta: 0.0 }, s.stats.mat().cols_in(0..1));
            Ok(rms_norm_backward(s.x[0].mat(), s.vectors[0].mat(), stats, s.x[1].mat(), Some(dx), None)?)
        }),
    );
    add("GELU", close, wide([1, 1], |s| Ok(activation(Activation::GeluTanh, s.x[0].mat(), s.y[0].make_mut()?)?)));
    add(
        "GELU backward",
        close,
        wide([2, 1], |s| {
            let dx = Acc { to: s.y[0].make_mut()?, beta: 0.0 };
            Ok(activation_backward(Activation::GeluTanh, s.x[0].mat(), s.x[1].mat(), dx)?)
        }),
    );
    add("SiLU·gate", close, wide([2, 1], |s| Ok(silu_gate(s.x[0].mat(), s.x[1].mat(), s.y[0].make_mut()?)?)));
    add(
        "SiLU·gate backward",
        close,
        wide([3, 2], |s| {
            let [dgate, dup] = &mut s.y[..] else { unreachable!("two matrices are written") };
            let acc = |to| Some(Acc { to, beta: 0.0 });
            let (dgate, dup) = (acc(dgate.make_mut()?), acc(dup.make_mut()?));
            Ok(silu_gate_backward(s.x[0].mat(), s.x[1].mat(), s.x[2].mat(), dgate, dup)?)
        }),
    );
    add(
        "residual, y += x",
        None,
        Case { passes: 3, ..wide([1, 1], |s| Ok(axpby(1.0, s.x[0].mat(), 1.0, s.y[0].make_mut()?)?)) },
    );
    // In place: logits are read and written once, however often the kernel looks at them.
    let (tokens, vocabulary) = bench.size((2048, 50257), (9, 77));
    add(
        "cross-entropy and its gradient",
        close,
        Case {
            dtype: F32,
            rows: tokens,
            cols: vocabulary,
            matrices: [0, 1],
            passes: 2,
            kernel: |s| {
                let losses = s.stats.make_mut()?.cols_in(0..1);
                Ok(cross_entropy(s.y[0].make_mut()?, s.targets.mat(), 0.1, 1.0 / 2048.0, losses)?)
            },
        },
    );
    let parameters = bench.size(32 << 20, 999);
    add(
        "AdamW",
        close,
        Case {
            dtype: F32,
            rows: 1,
            cols: parameters,
            matrices: [1, 3],
            passes: 7,
            kernel: |s| {
                let rule = AdamW { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step: 10 };
                let [p, m, v] = &mut s.y[..] else { unreachable!("three matrices are written") };
                Ok(adamw(&rule, p.make_mut()?, s.x[0].mat(), m.make_mut()?, v.make_mut()?)?)
            },
        },
    );
    add(
        "sum of squares",
        None,
        Case {
            dtype: F32,
            rows: 1,
            cols: parameters,
            matrices: [1, 0],
            passes: 1,
            kernel: |s| {
                let mut sum = Tensor::zeros(&s.x[0].device(), DType::F64, &[1, 1])?;
                Ok(sum_squares_into(s.x[0].mat(), sum.make_mut()?)?)
            },
        },
    );
    rows
}

fn measure(bench: &Bench, case: &Case, row: Row) -> Result<Row> {
    let Case { dtype, rows, cols, matrices: [read, written], passes, kernel } = *case;
    let matrix = rows * cols * dtype.size();
    let copies = bench.copies((read + written) * matrix);
    let targets: Vec<u32> = (0..rows).map(|i| (i * 7919 % cols) as u32).collect();
    let mut sets = Vec::with_capacity(copies);
    for _ in 0..copies {
        let normal = |n| bench.normal_copies(n, dtype, rows, cols);
        let mut stats = Tensor::empty(&bench.device, F32, &[rows, 2])?;
        // Plausible, for backward passes: mean 0, deviation 1.
        axpby(1.0, ones(bench, rows)?.mat(), 0.0, stats.make_mut()?.cols_in(1..2))?;
        axpby(0.0, ones(bench, rows)?.mat(), 0.0, stats.make_mut()?.cols_in(0..1))?;
        let vectors = [bench.normal(dtype, 1, cols)?, bench.normal(dtype, 1, cols)?];
        let targets = Tensor::from_slice(&bench.device, &[1, rows], &targets)?;
        let (x, mut y) = (normal(read)?, normal(written)?);
        // A mean of squares is not negative.
        if let [_, _, v] = &mut y[..] {
            lora_kernels::fill(1.0, v.make_mut()?)?;
        }
        sets.push(Set { x, y, vectors, stats, targets });
    }
    let source = copy_source(bench)?;
    let times = bench.medians(2, &mut |way, copy| match way {
        0 => kernel(&mut sets[copy % copies]),
        _ => {
            source.try_clone(0..source.len())?;
            Ok(())
        }
    });
    let rate = |way: usize, bytes: usize| {
        Ok::<_, anyhow::Error>(needed(&times[way])?.map(|seconds| bytes as f64 / seconds / 1e9))
    };
    // A copy reads and writes.
    let (ours, reference) = (rate(0, passes * matrix)?, rate(1, 2 * source.len() * 4)?);
    Ok(Row { ours, reference, note: "reference: copy within the device".into(), ..row })
}

fn ones(bench: &Bench, rows: usize) -> Result<Tensor> {
    Ok(Tensor::from_slice(&bench.device, &[rows, 1], &vec![1f32; rows])?)
}

/// 256 MiB of numbers to copy.
fn copy_source(bench: &Bench) -> Result<Buffer> {
    let n = bench.size(64 << 20, 1024);
    let numbers = bench.normal(F32, 1, n)?;
    let mut source = Buffer::empty(&bench.device, F32, n)?;
    let from: Mat = numbers.mat();
    axpby(1.0, from, 0.0, lora_kernels::MatMut::new(&mut source, 0, 1, n))?;
    Ok(source)
}
