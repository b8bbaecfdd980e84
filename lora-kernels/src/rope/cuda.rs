#![allow(unsafe_code)]

use std::sync::Arc;

use crate::{
    Acc, DType, Mat, Result,
    cuda::{
        Arch, Gpu, Module,
        map::{THREADS, grid, typed, vector_of},
        suffix,
    },
};

const SOURCE: &str = concat!(include_str!("../cuda/map.cuh"), include_str!("rope.cu"));
pub(crate) static MODULE: Module = Module::new("rope", SOURCE, Arch::Any);

#[allow(clippy::too_many_arguments)] // those of the public function
pub(super) fn rope(
    gpu: &Arc<Gpu>,
    x: Mat,
    positions: Mat,
    cos: Mat,
    sin: Mat,
    head_dim: usize,
    inverse: bool,
    y: &Acc,
) -> Result<()> {
    let dtype = y.to.dtype();
    let table = if cos.dtype() == DType::F32 { DType::F32 } else { dtype };
    let kernel = format!("rope_{}_{}", suffix("rope", dtype)?, suffix("rope", table)?);
    typed("rope", dtype, &[x]);
    typed("rope", table, &[cos, sin]);
    typed("rope", DType::U32, &[positions]);
    let (half, known) = (head_dim / 2, cos.rows().min(sin.rows()));
    let shape = (y.to.rows(), y.to.cols() / 2);
    if shape.0 * shape.1 == 0 {
        return Ok(());
    }
    let mut l = gpu.launch(&MODULE, &kernel)?;
    l.mat(x).i64(x.ld()).mat(positions).mat(cos).i64(cos.ld()).mat(sin).i64(sin.ld()).i32(known).i32(half);
    l.f32(if inverse { -1.0 } else { 1.0 }).acc(Some(y)).i64(y.to.ld()).i32(shape.0).i32(shape.1);
    // SAFETY: x and y have twice that many columns, a row of pairs stays within them, and rows of the tables are read
    // only below the number of their rows.
    unsafe { l.run(grid(shape, vector_of(dtype, dtype)), THREADS, 0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cuda::testing::*, rope};

    const TYPES: [(DType, f64); 3] = [(F32, 1e-6), (Bf16, 1.6e-2), (F16, 2e-3)];

    fn turned(s: &Side, heads: usize, head_dim: usize, pad: usize, wide_tables: bool) {
        let known = 12;
        let positions = [0, 1, 11, 2, 7];
        let angle = |i: usize| (i / (head_dim / 2)) as f64 * 0.1f64.powf((i % (head_dim / 2)) as f64 / head_dim as f64);
        let table = |f: fn(f64) -> f64| {
            let data: Vec<f64> = (0..known * head_dim / 2).map(|i| f(angle(i))).collect();
            if wide_tables {
                s.given_acc(known, head_dim / 2, pad, &data)
            } else {
                s.given(known, head_dim / 2, pad, &data)
            }
        };
        let (cos, sin, ids) = (table(f64::cos), table(f64::sin), s.ids(&positions));
        let x = s.random(1, positions.len(), heads * head_dim, pad, 1.0);
        for (inverse, beta) in [(false, 0.0), (true, 0.5)] {
            let mut y = s.target(2, positions.len(), heads * head_dim, pad, beta);
            let at = Mat::new(&ids, 0, 1, positions.len());
            rope(x.mat(), at, cos.mat(), sin.mat(), head_dim, inverse, y.acc(beta)).unwrap();
            s.out(format!("{heads} heads of {head_dim}, gap {pad}, inverse {inverse}"), y.get());
        }
    }

    fn turned_heads() {
        parity("rope", &TYPES, |s| {
            for (heads, head_dim, pad) in [(1, 2, 0), (3, 8, 0), (3, 10, 3), (2, 64, 0), (5, 16, 8), (17, 32, 0)] {
                for wide_tables in [false, true] {
                    turned(s, heads, head_dim, pad, wide_tables);
                }
            }
        });
    }

    #[test]
    fn turned_heads_equal_the_reference() {
        turned_heads();
    }

    #[test]
    fn a_position_outside_the_tables_gives_nan() {
        for gpu in gpus() {
            let device = crate::Device::Cuda(gpu);
            let floats = |n: usize| crate::Buffer::from_slice(&device, &vec![0.5f32; n]).unwrap();
            let (x, cos, sin, mut y) = (floats(16), floats(8), floats(8), floats(16));
            let ids = crate::Buffer::from_slice(&device, &[1u32, 2]).unwrap();
            let table = |b| Mat::new(b, 0, 2, 4);
            let to = Acc { to: crate::MatMut::new(&mut y, 0, 2, 8), beta: 0.0 };
            rope(Mat::new(&x, 0, 2, 8), Mat::new(&ids, 0, 1, 2), table(&cos), table(&sin), 8, false, to).unwrap();
            let y = y.to_vec::<f32>(0..16).unwrap();
            assert!(y[..8].iter().all(|v| v.is_finite()) && y[8..].iter().all(|v| v.is_nan()), "{y:?}");
        }
    }

    #[cfg(feature = "emulator")]
    const MUTATIONS: &[Mutation] = &[
        Mutation {
            name: "the inverse turns forward",
            module: "rope",
            from: "s = sign * in[3][k]",
            to: "s = in[3][k]",
            check: turned_heads,
        },
        Mutation {
            name: "heads lie half as far apart",
            module: "rope",
            from: "(i64)head * (2 * half) + i",
            to: "(i64)head * half + i",
            check: turned_heads,
        },
        Mutation {
            name: "vectors in heads that they do not fit",
            module: "rope",
            from: "half % V == 0 && ",
            to: "",
            check: turned_heads,
        },
    ];

    #[test]
    #[cfg(feature = "emulator")]
    fn planted_bugs_are_caught() {
        all_are_caught(MUTATIONS);
    }
}
