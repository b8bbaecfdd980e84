//! The backward pass of the low-rank terms, with dy read once.

#![allow(unsafe_code)]

use std::sync::Arc;

use super::*;

/// `UpPart`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct UpPart {
    dy: u64,
    h: u64,
    b: u64,
    g_sums: u64,
    db_sums: u64,
    g: u64,
    db: u64,
    ldb: i64,
    lddb: i64,
    cols: i32,
    rank: i32,
    beta: f32,
    flags: u32,
}

/// `Up`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Up {
    ld_dy: i64,
    ld_h: i64,
    ld_g: i64,
    n: i32,
    rows: i32,
    padded: i32,
    scale: f32,
    parts: [UpPart; 3],
}

/// `UP_WIDTH`: columns of a block.
pub(super) const WIDTH: usize = 256;

/// The rank that the kernel for the given largest rank has room for.
pub(super) fn padded(dtype: DType, rank: usize) -> Option<usize> {
    let most = if dtype == DType::F32 { 32 } else { 64 };
    [16, 32, 64].into_iter().find(|&r| rank <= r && r <= most)
}

/// Bytes of shared memory of `up_backward`: B, the stages of tiles of dy and h, and the sums for dB.
pub(super) fn up_shared(dtype: DType, padded: usize) -> usize {
    let (tile, thin, stages) = match (dtype, padded) {
        (DType::F32, r) => (64 * 68, 64 * (r + 8), 2),
        (_, 16) => (64 * 64, 64 * 24, 3),
        (_, r) => (64 * 64, 64 * r, 3),
    };
    (WIDTH / 64 * thin + stages * (tile + thin)) * dtype.size() + WIDTH * padded * 4
}

/// Rows of a block, so that two blocks for each multiprocessor share `n` rows and so many blocks side by side.
pub(super) fn up_rows(n: usize, across: usize, multiprocessors: usize) -> usize {
    (n * across).div_ceil(2 * multiprocessors).next_multiple_of(64).max(64)
}

/// [`super::lora_backward_up`] with dy read once; `false`, with nothing done, where that is not the fastest way.
pub(in crate::lora) fn backward_up(
    gpu: &Arc<Gpu>,
    scale: f64,
    dy: Mat,
    h: Mat,
    parts: &[LoraPart],
    g: &mut MatMut,
    db: &mut [Option<Acc>],
) -> Result<bool> {
    let (dtype, n) = (dy.dtype(), dy.rows());
    let suffix = suffix("lora_backward_up", dtype)?;
    let fits = plain(gpu, dtype, [dy, h, g.as_mat()].into_iter().chain(parts.iter().map(|p| p.b)))
        && db.iter().flatten().all(|db| {
            plain(gpu, db.to.dtype(), [db.to.as_mat()]) && [dtype, dtype.accumulator()].contains(&db.to.dtype())
        })
        && parts.len() <= 3
        && n > 0
        && parts.iter().all(|p| p.b.rows() > 0 && p.b.cols() > 0)
        && db.iter().any(Option::is_some);
    let rank = parts.iter().map(|p| p.b.cols()).max().unwrap_or(0);
    let Some(padded) = padded(dtype, rank).filter(|&r| fits && up_shared(dtype, r) <= gpu.info().shared_memory) else {
        return Ok(false);
    };
    let across = |part: &LoraPart| part.cols.len().div_ceil(WIDTH);
    let rows = up_rows(n, parts.iter().map(across).sum(), gpu.info().multiprocessors);
    let down = n.div_ceil(rows);
    // Sums of each part, in one piece of memory: of g, one for each block across; of dB, one for each block down.
    let sizes: Vec<_> = parts
        .iter()
        .zip(&*db)
        .map(|(p, db)| (across(p) * n * padded, if db.is_some() { down * p.cols.len() * padded } else { 0 }))
        .collect();
    let sums = Buffer::empty(&Device::Cuda(gpu.clone()), DType::F32, sizes.iter().map(|(g, db)| g + db).sum())?;
    let mut list = [UpPart::default(); 3];
    let mut at = 0;
    for (i, (part, range)) in parts.iter().zip(ranges(parts.iter().map(|p| p.b.cols()))).enumerate() {
        let (dy, h) = (dy.cols_in(part.cols.clone()), h.cols_in(range.clone()));
        let to = db[i].as_ref().map(|db| (db.to.as_mat(), db.beta));
        let mut place = |len| {
            at += len;
            Mat::new(&sums, at - len, 1, len).address()
        };
        list[i] = UpPart {
            dy: dy.address(),
            h: h.address(),
            b: part.b.address(),
            g_sums: place(sizes[i].0),
            db_sums: place(sizes[i].1),
            g: g.as_mat().cols_in(range).address(),
            db: to.map_or(0, |(to, _)| to.address()),
            ldb: part.b.ld() as i64,
            lddb: to.map_or(0, |(to, _)| to.ld() as i64),
            cols: int(part.b.rows()),
            rank: int(part.b.cols()),
            beta: to.map_or(0.0, |(_, beta)| beta as f32),
            flags: flag(VECTOR_A, vectors(dy))
                | flag(VECTOR_B, vectors(part.b))
                | flag(VECTOR_C, vectors(h))
                | flag(C_F32, to.is_some_and(|(to, _)| to.dtype() == DType::F32)),
        };
    }
    let up = Up {
        ld_dy: dy.ld() as i64,
        ld_h: h.ld() as i64,
        ld_g: g.ld() as i64,
        n: int(n),
        rows: int(rows),
        padded: int(padded),
        scale: scale as f32,
        parts: list,
    };
    let widest = parts.iter().map(|p| p.cols.len()).max().expect("there are parts");
    let mut l = gpu.launch(module(dtype), &format!("lora_up_{padded}_{suffix}"))?;
    // SAFETY: the arguments are the kernel's; dy, h and each B are live matrices of checked shapes, in which it stays below
    // n rows, the part's columns and its rank; it writes the sums, as many as there are blocks of columns and rows.
    unsafe { l.raw(up).run([down, widest.div_ceil(WIDTH), parts.len()], 128, up_shared(dtype, padded))? };
    let mut l = gpu.launch(module(dtype), &format!("lora_up_reduce_{suffix}"))?;
    // SAFETY: it reads the sums that the kernel before wrote, and writes each part's columns of g and its dB.
    unsafe { l.raw(up).run([(n.max(widest) * padded).div_ceil(256), 2 * parts.len(), 1], 256, 0)? };
    Ok(true)
}
