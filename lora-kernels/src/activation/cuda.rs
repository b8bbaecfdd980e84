#![allow(unsafe_code)]

use std::sync::Arc;

use super::Activation;
use crate::{
    Acc, Mat, MatMut, Result,
    cuda::{
        Arch, Gpu, Module,
        map::{THREADS, extent, grid, typed, vector_of},
        suffix,
    },
};

const SOURCE: &str =
    concat!(include_str!("../cuda/map.cuh"), include_str!("functions.cuh"), include_str!("activation.cu"));
pub(crate) static MODULE: Module = Module::new("activation", SOURCE, Arch::Any);

/// The first part of a kernel's name.
fn function(kind: Activation) -> &'static str {
    match kind {
        Activation::GeluTanh => "gelu_tanh",
        Activation::GeluErf => "gelu_erf",
        Activation::Relu => "relu",
        Activation::Silu => "silu",
        Activation::Tanh => "tanh",
    }
}

pub(super) fn activation(gpu: &Arc<Gpu>, kind: Activation, x: Mat, y: MatMut) -> Result<()> {
    let kernel = format!("{}_{}", function(kind), suffix("activation", y.dtype())?);
    typed("activation", y.dtype(), &[x]);
    let shape = extent("activation", &[x, y.as_mat()]);
    if shape.0 * shape.1 == 0 {
        return Ok(());
    }
    let mut l = gpu.launch(&MODULE, &kernel)?;
    l.mat(x).i64(x.ld()).mat_mut(&y).i64(y.ld()).i32(shape.0).i32(shape.1);
    // SAFETY: both matrices have that shape, and the kernel touches nothing outside it.
    unsafe { l.run(grid(shape, vector_of(y.dtype(), y.dtype())), THREADS, 0) }
}

pub(super) fn activation_backward(gpu: &Arc<Gpu>, kind: Activation, x: Mat, dy: Mat, dx: Acc) -> Result<()> {
    let kernel = format!("{}_backward_{}", function(kind), suffix("activation_backward", x.dtype())?);
    typed("activation_backward", x.dtype(), &[dy, dx.to.as_mat()]);
    let shape = extent("activation_backward", &[x, dy, dx.to.as_mat()]);
    if shape.0 * shape.1 == 0 {
        return Ok(());
    }
    let mut l = gpu.launch(&MODULE, &kernel)?;
    l.mat(x).i64(x.ld()).mat(dy).i64(dy.ld()).acc(Some(&dx)).i64(dx.to.ld()).i32(shape.0).i32(shape.1);
    // SAFETY: all matrices have that shape, and the kernel touches nothing outside it.
    unsafe { l.run(grid(shape, vector_of(x.dtype(), x.dtype())), THREADS, 0) }
}

pub(super) fn silu_gate(gpu: &Arc<Gpu>, gate: Mat, up: Mat, y: MatMut) -> Result<()> {
    let kernel = format!("silu_gate_{}", suffix("silu_gate", y.dtype())?);
    typed("silu_gate", y.dtype(), &[gate, up]);
    let shape = extent("silu_gate", &[gate, up, y.as_mat()]);
    if shape.0 * shape.1 == 0 {
        return Ok(());
    }
    let mut l = gpu.launch(&MODULE, &kernel)?;
    l.mat(gate).i64(gate.ld()).mat(up).i64(up.ld()).mat_mut(&y).i64(y.ld()).i32(shape.0).i32(shape.1);
    // SAFETY: all matrices have that shape, and the kernel touches nothing outside it.
    unsafe { l.run(grid(shape, vector_of(y.dtype(), y.dtype())), THREADS, 0) }
}

pub(super) fn silu_gate_backward(
    gpu: &Arc<Gpu>,
    gate: Mat,
    up: Mat,
    dy: Mat,
    dgate: Option<Acc>,
    dup: Option<Acc>,
) -> Result<()> {
    let kernel = format!("silu_gate_backward_{}", suffix("silu_gate_backward", dy.dtype())?);
    let mats: Vec<Mat> =
        [gate, up, dy].into_iter().chain([&dgate, &dup].into_iter().flatten().map(|acc| acc.to.as_mat())).collect();
    typed("silu_gate_backward", dy.dtype(), &mats);
    let shape = extent("silu_gate_backward", &mats);
    if shape.0 * shape.1 == 0 || mats.len() == 3 {
        return Ok(());
    }
    // The row length of a gradient that is not asked for is one that does not forbid vectors.
    let ld = |acc: &Option<Acc>| acc.as_ref().map_or(0, |acc| acc.to.ld());
    let mut l = gpu.launch(&MODULE, &kernel)?;
    l.mat(gate).i64(gate.ld()).mat(up).i64(up.ld()).mat(dy).i64(dy.ld());
    l.acc(dgate.as_ref()).i64(ld(&dgate)).acc(dup.as_ref()).i64(ld(&dup)).i32(shape.0).i32(shape.1);
    // SAFETY: all matrices have that shape, the kernel touches nothing outside it, and of null ones nothing.
    unsafe { l.run(grid(shape, vector_of(dy.dtype(), dy.dtype())), THREADS, 0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{activation, activation_backward, cuda::testing::*, silu_gate, silu_gate_backward, testing::random};

    const KINDS: [Activation; 5] =
        [Activation::GeluTanh, Activation::GeluErf, Activation::Relu, Activation::Silu, Activation::Tanh];
    const TYPES: [(crate::DType, f64); 3] = [(F32, 2e-6), (Bf16, 8e-3), (F16, 1e-3)];
    const SHAPES: [(usize, usize, usize); 6] = [(0, 3, 0), (1, 1, 0), (3, 7, 3), (5, 33, 8), (2, 129, 0), (7, 8, 0)];

    /// Random numbers, some far out, and NaN.
    fn inputs(n: usize) -> Vec<f64> {
        let mut x = random(1, n, 6.0);
        for (x, far) in x.iter_mut().skip(1).zip([0.0, 20.0, -20.0, 100.0, -100.0, 1e4, -1e4, f64::NAN]) {
            *x = far;
        }
        x
    }

    fn values_and_slopes() {
        parity("activation", &TYPES, |s| {
            for kind in KINDS {
                for (rows, cols, pad) in SHAPES {
                    let x = s.given(rows, cols, pad, &inputs(rows * cols));
                    let mut y = s.poison(rows, cols, pad);
                    activation(kind, x.mat(), y.mat_mut()).unwrap();
                    s.out(format!("{kind:?} {rows}×{cols}"), y.get());
                    let dy = s.random(2, rows, cols, pad, 1.0);
                    for beta in [0.0, 0.5] {
                        let mut dx = s.target(3, rows, cols, pad, beta);
                        activation_backward(kind, x.mat(), dy.mat(), dx.acc(beta)).unwrap();
                        s.out(format!("{kind:?} backward {rows}×{cols}"), dx.get());
                    }
                }
            }
        });
    }

    #[test]
    fn values_and_slopes_equal_the_reference() {
        values_and_slopes();
    }

    fn gates() {
        parity("silu_gate", &TYPES, |s| {
            for (rows, cols, pad) in SHAPES {
                let gate = s.given(rows, cols, pad, &inputs(rows * cols));
                let (up, dy) = (s.random(4, rows, cols, pad, 2.0), s.random(5, rows, cols, pad, 1.0));
                let mut y = s.poison(rows, cols, pad);
                silu_gate(gate.mat(), up.mat(), y.mat_mut()).unwrap();
                s.out(format!("y {rows}×{cols}"), y.get());
                for (beta, ask) in
                    [(0.0, [true, true]), (1.0, [true, true]), (0.0, [true, false]), (0.5, [false, true])]
                {
                    let mut to = [6, 7].map(|seed| s.target(seed, rows, cols, pad, beta));
                    let [dgate, dup] = &mut to;
                    let (dgate, dup) = (ask[0].then(|| dgate.acc(beta)), ask[1].then(|| dup.acc(beta)));
                    silu_gate_backward(gate.mat(), up.mat(), dy.mat(), dgate, dup).unwrap();
                    to.iter().for_each(|to| s.out(format!("gradients {ask:?} {rows}×{cols}"), to.get()));
                }
            }
        });
    }

    #[test]
    fn gates_equal_the_reference() {
        gates();
    }

    #[cfg(feature = "emulator")]
    const MUTATIONS: &[Mutation] = &[
        Mutation {
            name: "a sigmoid that overflows",
            module: "activation",
            from: "-z > 80.f ? 80.f : -z",
            to: "-z",
            check: values_and_slopes,
        },
        Mutation {
            name: "the slope of σ is forgotten",
            module: "activation",
            from: "return g.s * fmaf(x * dz, g.rest, 1.f);",
            to: "return g.s;",
            check: values_and_slopes,
        },
        Mutation {
            name: "relu hides NaN",
            module: "activation",
            from: "return x <= 0.f ? 0.f : x;",
            to: "return x > 0.f ? x : 0.f;",
            check: values_and_slopes,
        },
        Mutation {
            name: "the gradients of gate and up share a β",
            module: "activation",
            from: "if (beta_up != 0.f) read(in[4], dup",
            to: "if (beta_gate != 0.f) read(in[4], dup",
            check: gates,
        },
    ];

    #[test]
    #[cfg(feature = "emulator")]
    fn planted_bugs_are_caught() {
        all_are_caught(MUTATIONS);
    }
}
