#![allow(unsafe_code)]

use std::sync::Arc;

use super::Dropout;
use crate::{
    Acc, Mat, Result,
    cuda::{
        Arch, Gpu, Module,
        map::{THREADS, grid, typed, vector_of},
        suffix,
    },
};

const SOURCE: &str = concat!(include_str!("../cuda/map.cuh"), include_str!("philox.cuh"), include_str!("dropout.cu"));
pub(crate) static MODULE: Module = Module::new("dropout", SOURCE, Arch::Any);

pub(super) fn dropout(gpu: &Arc<Gpu>, d: &Dropout, x: Mat, y: &Acc) -> Result<()> {
    let mask = d.mask::<f32>();
    let kernel = format!("dropout_{}", suffix("dropout", y.to.dtype())?);
    typed("dropout", y.to.dtype(), &[x]);
    // Rows and columns are what the generator counts by: never one long row.
    let shape = (y.to.rows(), y.to.cols());
    if shape.0 * shape.1 == 0 {
        return Ok(());
    }
    let mut l = gpu.launch(&MODULE, &kernel)?;
    l.mat(x).i64(x.ld()).acc(Some(y)).i64(y.to.ld()).i32(shape.0).i32(shape.1);
    l.u64(d.seed).u32(d.step).u32(d.site).u32(d.row_offset).u32(mask.threshold).f32(f64::from(mask.scale));
    // SAFETY: both matrices have that shape, and the kernel touches nothing outside it.
    unsafe { l.run(grid(shape, vector_of(x.dtype(), x.dtype())), THREADS, 0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cuda::testing::*, dropout};

    fn masks_and_values() {
        parity("dropout", &[(F32, 3e-7), (Bf16, 8e-3), (F16, 1e-3)], |s| {
            for (rows, cols, pad) in
                [(0, 3, 0), (1, 1, 0), (5, 7, 3), (3, 33, 0), (4, 129, 8), (130, 16, 0), (2, 2049, 0)]
            {
                for p in [0.0, 0.3, 0.999] {
                    for (row_offset, seed) in [(0, 77), (u32::MAX - 1, 0xfedc_ba98_7654_3210)] {
                        let d = Dropout { p, seed, step: 5, site: 0x2_0009, row_offset };
                        // Nowhere 0, so that every 0 of the result was dropped.
                        let ones: Vec<f64> = (0..rows * cols).map(|i| 1.0 + (i % 97) as f64 / 97.0).collect();
                        let x = s.given(rows, cols, pad, &ones);
                        let mut y = s.poison(rows, cols, pad);
                        dropout(&d, x.mat(), y.acc(0.0)).unwrap();
                        // Compared within the tolerance, which no 0 for a 1 passes: exactly the mask.
                        let kept = y.get().iter().map(|&v| f64::from(v != 0.0)).collect();
                        s.out(format!("mask {rows}×{cols}, p {p}"), kept);
                        s.out(format!("y {rows}×{cols}, p {p}"), y.get());
                        let mut y = s.target(3, rows, cols, pad, 0.5);
                        dropout(&d, x.mat(), y.acc(0.5)).unwrap();
                        s.out(format!("y + β·y {rows}×{cols}, p {p}"), y.get());
                    }
                }
            }
        });
    }

    #[test]
    fn the_masks_are_those_of_the_host() {
        masks_and_values();
    }

    #[cfg(feature = "emulator")]
    const MUTATIONS: &[Mutation] = &[
        Mutation {
            name: "nine rounds",
            module: "dropout",
            from: "round < 10",
            to: "round < 9",
            check: masks_and_values,
        },
        Mutation {
            name: "the second counter of a run is the first again",
            module: "dropout",
            from: "col / 4 + i / 4",
            to: "col / 4",
            check: masks_and_values,
        },
        Mutation {
            name: "the upper half of the key is dropped",
            module: "dropout",
            from: "k1 = (u32)(key >> 32)",
            to: "k1 = 0",
            check: masks_and_values,
        },
    ];

    #[test]
    #[cfg(feature = "emulator")]
    fn planted_bugs_are_caught() {
        all_are_caught(MUTATIONS);
    }
}
