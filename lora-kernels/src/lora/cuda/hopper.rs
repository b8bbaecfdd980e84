//! The low-rank terms as a second run over k of the kernels for Hopper.

#![allow(unsafe_code)]

use std::sync::Arc;

use super::*;

/// The ranks of several parts of a projection that are multiplied as one matrix, at most: the products with its zeros, at
/// 2·256 operations an element, take no longer than to read and write the element once more.
pub(super) const MOST_PACKED: usize = 256;

/// `Block` of pack.cu.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Block {
    from: u64,
    step_col: i64,
    step_rank: i64,
    col: i32,
    end: i32,
    rank: i32,
    rank_end: i32,
}

/// `Pack`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Pack {
    blocks: [Block; TERMS],
    to: u64,
    ld: i64,
    rows: i32,
    cols: i32,
    by_rank: i32,
}

/// B of all terms of a projection with n columns, in memory of its own whose rows TMA can read: [Σ r, n] where it lies by
/// rank, else [n, Σ r]. Returns the elements from one row to the next as well.
pub(super) fn packed(gpu: &Arc<Gpu>, job: &Job, n: usize) -> Result<(Buffer, usize)> {
    let ranks = job.low.cols();
    let (rows, cols) = if job.by_rank() { (ranks, n) } else { (n, ranks) };
    let ld = cols.next_multiple_of(8);
    let mut to = Buffer::empty(&Device::Cuda(gpu.clone()), DType::Bf16, rows * ld)?;
    let mut blocks = [Block::default(); TERMS];
    let mut rank = 0;
    for (block, (a, b, first)) in blocks.iter_mut().zip(&job.terms) {
        let (columns, step_col, step_rank) =
            if job.what == "forward" { (b.rows(), b.ld(), 1) } else { (b.cols(), 1, b.ld()) };
        let [col, end, from, rank_end] = [*first, first + columns, rank, rank + a.cols()].map(int);
        *block = Block {
            from: b.address(),
            step_col: step_col as i64,
            step_rank: step_rank as i64,
            col,
            end,
            rank: from,
            rank_end,
        };
        rank += a.cols();
    }
    let address = MatMut::new(&mut to, 0, rows, ld).address();
    let by_rank = job.by_rank().into();
    let pack = Pack { blocks, to: address, ld: ld as i64, rows: int(rows), cols: int(cols), by_rank };
    let mut l = gpu.launch(&LORA_BF16, "lora_pack_bf16")?;
    // SAFETY: the arguments are the kernel's; it reads each block at its columns and ranks, which are those of a live
    // matrix, and writes rows and columns of the buffer.
    unsafe { l.raw(pack).run([(rows * cols).div_ceil(256), 1, 1], 256, 0)? };
    Ok((to, ld))
}

/// A job on Hopper's tensor cores: the terms as one, behind the steps of the projection.
///
/// # Safety
/// The variant is one of those for the job's projection on this device.
pub(super) unsafe fn launch_hopper(gpu: &Arc<Gpu>, job: &Job, c: &mut MatMut, variant: Variant) -> Result<()> {
    let (m, n, ranks) = (c.rows(), c.cols(), job.low.cols());
    let width = ranks.next_multiple_of(8);
    // Of odd ranks, rows of h and g begin where TMA cannot read: a copy then, small as they are.
    let copy = match wgmma::is_readable(job.low) {
        true => None,
        false => {
            let mut copy = Buffer::empty(&Device::Cuda(gpu.clone()), DType::Bf16, m * width)?;
            axpby(1.0, job.low, 0.0, MatMut::new(&mut copy, 0, m, width).cols_in(0..ranks))?;
            Some(copy)
        }
    };
    let a = copy.as_ref().map_or(job.low, |copy| Mat::new(copy, 0, m, width).cols_in(0..ranks));
    let all;
    let b = match job.whole(n) {
        Some(whole) => whole,
        None => {
            let ld;
            (all, ld) = packed(gpu, job, n)?;
            if job.by_rank() {
                Mat::new(&all, 0, ranks, ld).cols_in(0..n)
            } else {
                Mat::new(&all, 0, n, ld).cols_in(0..ranks).t()
            }
        }
    };
    let problem = job.projection(c.reborrow());
    let shape = Shape::of(&problem, false);
    // SAFETY: the shape is that of the projection, and the variant one for it. The buffers outlive the kernel in the stream.
    unsafe { wgmma::run_with(gpu, &shape, variant, &problem, Some(wgmma::Term { a, b })) }
}
