#![allow(unsafe_code)]

use std::sync::Arc;

use crate::{
    Acc, Buffer, DType, Mat, MatMut, Result,
    cuda::{
        Arch, Gpu, Module,
        map::{THREADS, grid, typed, vector_of},
        suffix,
    },
    fill, scale,
};

const SOURCE: &str = concat!(include_str!("../cuda/map.cuh"), include_str!("gather.cu"));
pub(crate) static MODULE: Module = Module::new("gather", SOURCE, Arch::Any);

pub(super) fn gather(gpu: &Arc<Gpu>, table: Mat, ids: Mat, y: &Acc) -> Result<()> {
    let kernel = format!("gather_{}", suffix("gather", table.dtype())?);
    typed("gather", table.dtype(), &[table, y.to.as_mat()]);
    typed("gather", DType::U32, &[ids]);
    let shape = (y.to.rows(), y.to.cols());
    if shape.0 * shape.1 == 0 {
        return Ok(());
    }
    let mut l = gpu.launch(&MODULE, &kernel)?;
    l.mat(table).i64(table.ld()).i32(table.rows()).mat(ids).acc(Some(y)).i64(y.to.ld()).i32(shape.0).i32(shape.1);
    // SAFETY: y and the table's rows have that many columns, there is an id for each row of y, and rows of the table are
    // read only below the number of its rows.
    unsafe { l.run(grid(shape, vector_of(table.dtype(), table.dtype())), THREADS, 0) }
}

pub(super) fn put_rows(gpu: &Arc<Gpu>, x: Mat, ids: Mat, table: &MatMut) -> Result<()> {
    let kernel = format!("put_rows_{}", suffix("put_rows", x.dtype())?);
    typed("put_rows", x.dtype(), &[x, table.as_mat()]);
    typed("put_rows", DType::U32, &[ids]);
    let shape = (x.rows(), x.cols());
    if shape.0 * shape.1 == 0 {
        return Ok(());
    }
    let mut l = gpu.launch(&MODULE, &kernel)?;
    l.mat(x).i64(x.ld()).mat(ids).mat_mut(table).i64(table.ld()).i32(table.rows()).i32(shape.0).i32(shape.1);
    // SAFETY: x and the table have that many columns, there is an id for each row of x, and rows of the table are written
    // only below the number of its rows.
    unsafe { l.run(grid(shape, vector_of(x.dtype(), x.dtype())), THREADS, 0) }
}

pub(super) fn scatter(gpu: &Arc<Gpu>, dy: Mat, ids: Mat, mut dtable: Acc) -> Result<()> {
    let (dtype, to) = (dy.dtype(), dtable.to.dtype());
    let kernel = format!("scatter_{}_{}", suffix("scatter", dtype)?, suffix("scatter", to)?);
    typed("scatter", DType::U32, &[ids]);
    assert!(!dy.is_transposed() && [dtype, DType::F32].contains(&to), "scatter: gradients are f32 or as dy is");
    // β goes over the whole table, once; the sums are then added to what is left.
    match dtable.beta {
        0.0 => fill(0.0, dtable.to.reborrow())?,
        1.0 => {}
        beta => scale(beta, dtable.to.reborrow())?,
    }
    let (n, cols, known) = (dy.rows(), dy.cols(), dtable.to.rows());
    if n * cols == 0 {
        return Ok(());
    }
    let mut places = Buffer::empty(dy.device(), DType::U32, 2 * n)?;
    let (sorted, order) = MatMut::new(&mut places, 0, 1, 2 * n).split_cols(n);
    let mut l = gpu.launch(&MODULE, "sort_ids")?;
    l.mat(ids).i32(n).mat_mut(&sorted).mat_mut(&order);
    // SAFETY: there are n ids, and the places are a permutation of 0 … n − 1.
    unsafe { l.run([n.div_ceil(32), 1, 1], 256, 0)? };
    let mut l = gpu.launch(&MODULE, &kernel)?;
    l.mat(dy).i64(dy.ld()).mat_mut(&sorted).mat_mut(&order).i32(n).i32(known);
    l.mat_mut(&dtable.to).i64(dtable.to.ld()).i32(cols);
    // SAFETY: `order` names each of dy's n rows once; rows of the table are written only below the number of its rows,
    // each by the one block that finds the beginning of its id; columns stay below `cols`.
    unsafe { l.run([n.div_ceil(8), cols.div_ceil(32 * vector_of(dtype, to)), 1], 256, 0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cuda::testing::*, gather, put_rows, scatter};

    /// (rows of the table, columns, number of ids)
    const SHAPES: [(usize, usize, usize); 7] =
        [(1, 1, 1), (5, 7, 0), (3, 8, 33), (100, 31, 7), (40, 128, 270), (2, 40, 300), (900, 33, 129)];

    /// Half of them from the first few rows, so that rows repeat.
    fn numbers(rows: usize, n: usize) -> Vec<u32> {
        (0..n).map(|i| (i * 7919 % if i % 2 == 0 { rows } else { rows.min(3) }) as u32).collect()
    }

    fn rows_taken() {
        parity("gather", &[(F32, 3e-7), (Bf16, 8e-3), (F16, 1e-3)], |s| {
            for (rows, d, n) in SHAPES {
                for (pad, beta) in [(0, 0.0), (3, 1.0), (8, 0.5)] {
                    let ids = s.ids(&numbers(rows, n));
                    let (table, mut y) = (s.random(1, rows, d, pad, 1.0), s.target(2, n, d, pad, beta));
                    gather(table.mat(), Mat::new(&ids, 0, 1, n), y.acc(beta)).unwrap();
                    s.out(format!("{n} of {rows}×{d}"), y.get());
                }
            }
        });
    }

    fn rows_put() {
        parity("put_rows", &[(F32, 0.0), (Bf16, 0.0), (F16, 0.0)], |s| {
            for (rows, d, n) in [(1, 1, 1), (5, 7, 0), (70, 31, 33), (40, 128, 7)] {
                for pad in [0, 3, 8] {
                    // Each id once, in no order.
                    let ids: Vec<u32> = (0..n as u32).map(|i| (i * 37 + 11) % rows).collect();
                    let ids = s.ids(&ids);
                    let (x, mut table) = (s.random(1, n, d, pad, 1.0), s.random(2, rows as usize, d, pad, 1.0));
                    put_rows(x.mat(), Mat::new(&ids, 0, 1, n), table.mat_mut()).unwrap();
                    s.out(format!("{n} into {rows}×{d}"), table.get());
                }
            }
        });
    }

    #[test]
    fn rows_are_put() {
        rows_put();
    }

    #[test]
    fn rows_are_taken() {
        rows_taken();
    }

    fn rows_given_back() {
        // Sums in f32, of up to 200 terms.
        parity("scatter", &[(F32, 3e-6), (Bf16, 3e-6), (F16, 3e-6)], |s| {
            for (rows, d, n) in SHAPES {
                for (pad, beta) in [(0, 0.0), (3, 1.0), (8, 0.5)] {
                    let ids = s.ids(&numbers(rows, n));
                    let (dy, mut to) = (s.random(1, n, d, pad, 1.0), s.target_acc(2, rows, d, pad, beta));
                    scatter(dy.mat(), Mat::new(&ids, 0, 1, n), to.acc(beta)).unwrap();
                    s.out(format!("{n} to {rows}×{d}, β {beta}"), to.get());
                }
            }
            // Rows of wider matrices, which begin where vectors may and where they may not.
            for (gap, skip) in [(8, 8), (3, 0)] {
                let (ids, part) = (s.ids(&numbers(9, 50)), skip..skip + 256);
                let (dy, mut to) = (s.random(1, 50, 256 + gap, 0, 1.0), s.random_acc(2, 9, 256 + gap, 0, 1.0));
                let acc = Acc { to: to.mat_mut().cols_in(part.clone()), beta: 0.5 };
                scatter(dy.mat().cols_in(part), Mat::new(&ids, 0, 1, 50), acc).unwrap();
                s.out(format!("256 columns of {}", 256 + gap), to.get());
            }
        });
    }

    #[test]
    fn rows_are_given_back() {
        rows_given_back();
        parity("scatter in the type", &[(Bf16, 1.6e-2), (F16, 2e-3)], |s| {
            let ids = s.ids(&numbers(5, 9));
            let (dy, mut to) = (s.random(1, 9, 24, 0, 1.0), s.target(2, 5, 24, 0, 0.5));
            scatter(dy.mat(), Mat::new(&ids, 0, 1, 9), to.acc(0.5)).unwrap();
            s.out("dtable", to.get());
        });
    }

    #[test]
    fn an_id_outside_the_table_gives_nan_and_takes_nothing() {
        for gpu in gpus() {
            let device = crate::Device::Cuda(gpu);
            let ids = Buffer::from_slice(&device, &[1u32, 2, u32::MAX, 0]).unwrap();
            let table = Buffer::from_slice(&device, &[1f32, 2.0]).unwrap();
            let mut y = Buffer::from_slice(&device, &[0f32; 4]).unwrap();
            let ids = Mat::new(&ids, 0, 1, 4);
            gather(Mat::new(&table, 0, 2, 1), ids, Acc { to: MatMut::new(&mut y, 0, 4, 1), beta: 0.0 }).unwrap();
            let got = y.to_vec::<f32>(0..4).unwrap();
            assert!(got[0] == 2.0 && got[1].is_nan() && got[2].is_nan() && got[3] == 1.0, "{got:?}");
            let dy = Buffer::from_slice(&device, &[1f32, 10.0, 100.0, 1000.0]).unwrap();
            let mut to = Buffer::from_slice(&device, &[f32::NAN; 2]).unwrap();
            scatter(Mat::new(&dy, 0, 4, 1), ids, Acc { to: MatMut::new(&mut to, 0, 2, 1), beta: 0.0 }).unwrap();
            assert_eq!(to.to_vec::<f32>(0..2).unwrap(), [1000.0, 1.0]);
        }
    }

    #[cfg(feature = "emulator")]
    const MUTATIONS: &[Mutation] = &[
        Mutation {
            name: "equal ids change places",
            module: "gather",
            from: "others[e] == id && from + e < i",
            to: "others[e] == id && from + e <= i",
            check: rows_given_back,
        },
        Mutation {
            name: "no barrier before the next tile of ids",
            module: "gather",
            from: "    __syncthreads();\n    int j = base",
            to: "    int j = base",
            check: rows_given_back,
        },
        Mutation {
            name: "no barrier after a tile of ids is loaded",
            module: "gather",
            from: "ids[j] : 0xffffffffu;\n    __syncthreads();",
            to: "ids[j] : 0xffffffffu;",
            check: rows_given_back,
        },
        Mutation {
            name: "long runs of an id end at 32",
            module: "gather",
            from: "low = start + 31, high = n",
            to: "low = start + 31, high = start + 32",
            check: rows_given_back,
        },
        Mutation {
            name: "no barrier before the sums of a long run are read",
            module: "gather",
            from: "= acc[i];\n    __syncthreads();",
            to: "= acc[i];",
            check: rows_given_back,
        },
        Mutation {
            name: "every place of an id starts it",
            module: "gather",
            from: "(s == 0 || sorted[s - 1] != id)",
            to: "true",
            check: rows_given_back,
        },
    ];

    #[test]
    #[cfg(feature = "emulator")]
    fn planted_bugs_are_caught() {
        all_are_caught(MUTATIONS);
    }
}
