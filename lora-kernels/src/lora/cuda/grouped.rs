//! Rows of one batch that belong to different adapters.

#![allow(unsafe_code)]

use std::sync::Arc;

use super::*;

/// `Grouped`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Grouped {
    entries: u64,
    x: u64,
    h: u64,
    y: u64,
    ldx: i64,
    ldh: i64,
    ldy: i64,
    pub(super) k: i32,
    flags: u32,
}

/// Rows and columns of a block.
pub(super) const GROUP: usize = 64;

/// The words of an `Entry`: some rows of one adapter.
pub(super) fn entry(rows: &Range<usize>, adapter: &LoraAdapter, y: Mat) -> [u32; 16] {
    let LoraAdapter { scale, a, b, cols } = adapter;
    let long = |v: u64| [v as u32, (v >> 32) as u32];
    let [a0, a1] = long(a.address());
    let [b0, b1] = long(b.address());
    let [lda0, lda1] = long(a.ld() as u64);
    let [ldb0, ldb1] = long(b.ld() as u64);
    let [row, count, rank, col, columns] =
        [rows.start, rows.len(), a.rows(), cols.start, cols.len()].map(|v| int(v) as u32);
    let flags =
        flag(VECTOR_A, vectors(*a)) | flag(VECTOR_B, vectors(*b)) | flag(VECTOR_C, vectors(y.cols_in(cols.clone())));
    let scale = (*scale as f32).to_bits();
    [a0, a1, b0, b1, lda0, lda1, ldb0, ldb1, row, count, rank, col, columns, scale, flags, 0]
}

/// [`super::lora_grouped`] in two kernels.
///
/// # Panics
/// When matrices are of different types, transposed, or on different devices.
pub(in crate::lora) fn grouped(
    gpu: &Arc<Gpu>,
    x: Mat,
    groups: &[(Range<usize>, Option<LoraAdapter>)],
    y: &MatMut,
) -> Result<()> {
    let (dtype, device) = (x.dtype(), Device::Cuda(gpu.clone()));
    let suffix = suffix("lora_grouped", dtype)?;
    let groups = groups.iter().filter_map(|(rows, adapter)| Some((rows, adapter.as_ref()?)));
    let groups: Vec<_> = groups.filter(|(rows, a)| !rows.is_empty() && !a.cols.is_empty() && a.a.rows() > 0).collect();
    let adapters = groups.iter().flat_map(|(_, adapter)| [adapter.a, adapter.b]);
    assert!(plain(gpu, dtype, [x, y.as_mat()].into_iter().chain(adapters)), "lora_grouped: all matrices are {dtype:?}");
    let mut words = Vec::new();
    for (rows, adapter) in &groups {
        for start in (rows.start..rows.end).step_by(GROUP) {
            words.extend(entry(&(start..rows.end.min(start + GROUP)), adapter, y.as_mat()));
        }
    }
    let (Some(rank), Some(cols)) =
        (groups.iter().map(|(_, a)| a.a.rows()).max(), groups.iter().map(|(_, a)| a.cols.len()).max())
    else {
        return Ok(());
    };
    let count = words.len() / 16;
    let entries = Buffer::from_slice(&device, &words)?;
    // Rows of whole vectors.
    let width = rank.next_multiple_of(8);
    let h = Buffer::empty(&device, dtype, x.rows() * width)?;
    let arguments = Grouped {
        entries: Mat::new(&entries, 0, 1, words.len()).address(),
        x: x.address(),
        h: Mat::new(&h, 0, x.rows(), width).address(),
        y: y.address(),
        ldx: x.ld() as i64,
        ldh: width as i64,
        ldy: y.ld() as i64,
        k: int(x.cols()),
        flags: flag(VECTOR_A, vectors(x)) | flag(VECTOR_C, vectors(y.as_mat())),
    };
    for (step, size) in [("down", rank), ("up", cols)] {
        let mut l = gpu.launch(module(dtype), &format!("lora_grouped_{step}_{suffix}"))?;
        let (threads, shared) = (Size::Small.threads(dtype), Size::Small.shared(dtype));
        // SAFETY: the arguments are the kernel's; each entry names rows of x, h and y and an adapter whose shapes were
        // checked, and the kernels stay below its rows, rank and columns. The buffers outlive the kernels in the stream.
        unsafe { l.raw(arguments).run([count, size.div_ceil(GROUP), 1], threads, shared)? };
    }
    Ok(())
}
