#![allow(unsafe_code)]

use std::sync::Arc;

use crate::{
    Acc, Buffer, DType, Mat, MatMut, Result,
    cuda::{
        Arch, Gpu, Module,
        map::{THREADS, grid, typed, vector_of},
        suffix,
    },
};

const SOURCE: &str = concat!(include_str!("../cuda/map.cuh"), include_str!("mix.cu"));
pub(crate) static MODULE: Module = Module::new("mix", SOURCE, Arch::Any);

/// Rows of a block of `mix_scores`, a warp each.
const ROWS: usize = 8;

pub(super) fn mix(gpu: &Arc<Gpu>, q: Mat, z: Mat, mut probs: MatMut, y: MatMut) -> Result<()> {
    typed("mix", y.dtype(), &[q, z]);
    typed("mix", DType::F32, &[probs.as_mat()]);
    scores(gpu, q, z, None, probs.reborrow())?;
    weighted(gpu, probs.as_mat(), z, &Acc { to: y, beta: 0.0 })
}

pub(super) fn mix_backward(
    gpu: &Arc<Gpu>,
    q: Mat,
    z: Mat,
    probs: Mat,
    dy: Mat,
    dq: Option<Acc>,
    dz: Option<Acc>,
) -> Result<()> {
    let gradients = dq.iter().chain(&dz).map(|d| d.to.as_mat());
    typed("mix_backward", dy.dtype(), &[q, z].into_iter().chain(gradients).collect::<Vec<_>>());
    typed("mix_backward", DType::F32, &[probs]);
    let (n, many) = (probs.rows(), probs.cols());
    let mut slopes = Buffer::empty(probs.device(), DType::F32, n * many)?;
    scores(gpu, dy, z, Some(probs), MatMut::new(&mut slopes, 0, n, many))?;
    let g = Mat::new(&slopes, 0, n, many);
    if let Some(dq) = dq {
        weighted(gpu, g, z, &dq)?;
    }
    let Some(dz) = dz.filter(|_| n * q.cols() > 0) else { return Ok(()) };
    let dtype = dy.dtype();
    let mut l = gpu.launch(&MODULE, &format!("mix_spread_{}", suffix("mix_backward", dtype)?))?;
    l.mat(probs).i64(probs.ld()).mat(g).mat(q).i64(q.ld()).mat(dy).i64(dy.ld()).i32(many);
    l.acc(Some(&dz)).i64(dz.to.ld()).i32(n).i32(q.cols());
    // SAFETY: dz has `many` times the n rows of q, dy and both weights, of which the kernel takes row i and column c for
    // row c·n + i; columns stay below those of all.
    unsafe { l.run(grid((n * many, q.cols()), vector_of(dtype, dtype)), THREADS, 0) }
}

/// The probabilities of the rows' candidates, or with `probs` the slopes of their scores.
fn scores(gpu: &Arc<Gpu>, a: Mat, z: Mat, probs: Option<Mat>, to: MatMut) -> Result<()> {
    let (n, many) = (to.rows(), to.cols());
    if n == 0 {
        return Ok(());
    }
    let mut l = gpu.launch(&MODULE, &format!("mix_scores_{}", suffix("mix", a.dtype())?))?;
    l.mat(a).i64(a.ld()).mat(z).i64(z.ld()).mat_or_null(probs).i64(probs.map_or(0, |p| p.ld()));
    l.mat_mut(&to).i64(to.ld()).i32(n).i32(a.cols()).i32(many);
    // SAFETY: a and `to` have n rows, z has `many` times as many, `to` and `probs` have `many` columns; rows and columns
    // stay below these.
    unsafe { l.run([n.div_ceil(ROWS), 1, 1], 32 * ROWS, 0) }
}

/// y = Σ_c w_c·z_c + β·y.
fn weighted(gpu: &Arc<Gpu>, w: Mat, z: Mat, y: &Acc) -> Result<()> {
    let (shape, dtype) = ((y.to.rows(), y.to.cols()), z.dtype());
    if shape.0 * shape.1 == 0 {
        return Ok(());
    }
    let mut l = gpu.launch(&MODULE, &format!("mix_weighted_{}", suffix("mix", dtype)?))?;
    l.mat(w).i64(w.ld()).mat(z).i64(z.ld()).i32(w.cols()).acc(Some(y)).i64(y.to.ld()).i32(shape.0).i32(shape.1);
    // SAFETY: y has the rows of w and the columns of z, which has a row for each element of w; the kernel touches nothing
    // else.
    unsafe { l.run(grid(shape, vector_of(dtype, dtype)), THREADS, 0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cuda::testing::*, mix, mix_backward};

    const TYPES: [(DType, f64); 3] = [(F32, 1e-5), (Bf16, 2e-2), (F16, 3e-3)];

    fn mixtures() {
        parity("mix", &TYPES, |s| {
            for (n, many, d, pad) in
                [(0, 2, 3, 0), (1, 1, 1, 0), (9, 3, 7, 2), (5, 2, 64, 0), (10, 4, 64, 8), (3, 2, 1100, 4)]
            {
                for beta in [0.0, 0.5] {
                    let (q, z) = (s.random(1, n, d, pad, 0.5), s.random(2, many * n, d, pad, 1.0));
                    let (mut p, mut y) = (s.poison_acc(n, many, pad), s.poison(n, d, pad));
                    mix(q.mat(), z.mat(), p.mat_mut(), y.mat_mut()).unwrap();
                    s.out(format!("p of {n}, {many}, {d}"), p.get());
                    s.out(format!("y of {n}, {many}, {d}"), y.get());
                    let dy = s.random(3, n, d, pad, 0.5);
                    let (mut dq, mut dz) = (s.target(4, n, d, pad, beta), s.target(5, many * n, d, pad, beta));
                    let (to_q, to_z) = (Some(dq.acc(beta)), Some(dz.acc(beta)));
                    mix_backward(q.mat(), z.mat(), p.mat(), dy.mat(), to_q, to_z).unwrap();
                    s.out(format!("dq of {n}, {many}, {d}"), dq.get());
                    s.out(format!("dz of {n}, {many}, {d}"), dz.get());
                }
            }
        });
    }

    #[test]
    fn mixtures_equal_the_reference() {
        mixtures();
    }

    #[cfg(feature = "emulator")]
    const MUTATIONS: &[Mutation] = &[
        Mutation {
            name: "candidates lie side by side",
            module: "mix",
            from: "const T* zc = z + ((i64)c * rows + row) * ldz;",
            to: "const T* zc = z + ((i64)row * many + c) * ldz;",
            check: mixtures,
        },
        Mutation {
            name: "slopes keep their mean",
            module: "mix",
            from: "p[c] * (to[c] - mean)",
            to: "p[c] * to[c]",
            check: mixtures,
        },
        Mutation {
            name: "the gap of the probabilities is forgotten",
            module: "mix",
            from: "p[i * ldp + c]",
            to: "p[i * many + c]",
            check: mixtures,
        },
        Mutation {
            name: "the last rows of a block are left out",
            module: "mix",
            from: "if (row >= rows) return;",
            to: "if (row + 1 >= rows) return;",
            check: mixtures,
        },
    ];

    #[test]
    #[cfg(feature = "emulator")]
    fn planted_bugs_are_caught() {
        all_are_caught(MUTATIONS);
    }
}
