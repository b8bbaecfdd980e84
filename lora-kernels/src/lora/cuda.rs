//! Launches the fused steps of low-rank adaptation, and says where they are not the fastest way.

#![allow(unsafe_code)]

use std::{ops::Range, sync::Arc};

use super::{LoraAdapter, LoraPart, ranges};
use crate::{
    Acc, Buffer, DType, Device, Epilogue, Mat, MatMut, Result, axpby,
    cuda::{Arch, Gpu, Module, suffix},
    gemm::{
        cuda::{self as product, Problem},
        plan::{self, Engine, Shape},
        wgmma::{self, Variant},
    },
};

/// f32 on CUDA cores.
pub(crate) static LORA_F32: Module = Module::new(
    "lora_f32",
    concat!(
        include_str!("../activation/functions.cuh"),
        include_str!("../gemm/epilogue.cuh"),
        include_str!("../gemm/simt.cu"),
        include_str!("../gemm/mma.cu"),
        include_str!("terms.cu"),
        include_str!("simt.cu"),
        include_str!("up.cu"),
        "LORA_TERMS(float, f32, 256)\nLORA_UP(float, f32, 16, 2)\nLORA_UP(float, f32, 32, 2)\nLORA_UP_REDUCE(float, f32)\n"
    ),
    Arch::Any,
);

macro_rules! tensor {
    ($name:literal, $kernels:literal) => {
        Module::new(
            $name,
            concat!(
                include_str!("../activation/functions.cuh"),
                include_str!("../gemm/epilogue.cuh"),
                include_str!("../gemm/mma.cu"),
                include_str!("terms.cu"),
                include_str!("up.cu"),
                include_str!("pack.cu"),
                $kernels
            ),
            Arch::Any,
        )
    };
}

/// bf16 on tensor cores.
pub(crate) static LORA_BF16: Module = tensor!(
    "lora_bf16",
    "LORA_TERMS(bf16, bf16, 128)\nLORA_UP(bf16, bf16, 16, 3)\nLORA_UP(bf16, bf16, 32, 3)\nLORA_UP(bf16, bf16, 64, 3)\n\
     LORA_UP_REDUCE(bf16, bf16)\nLORA_PACK(bf16, bf16)\n"
);
/// f16 on tensor cores.
pub(crate) static LORA_F16: Module = tensor!(
    "lora_f16",
    "LORA_TERMS(f16, f16, 128)\nLORA_UP(f16, f16, 16, 3)\nLORA_UP(f16, f16, 32, 3)\nLORA_UP(f16, f16, 64, 3)\n\
     LORA_UP_REDUCE(f16, f16)\n"
);

fn module(dtype: DType) -> &'static Module {
    match dtype {
        DType::F32 => &LORA_F32,
        DType::F16 => &LORA_F16,
        _ => &LORA_BF16,
    }
}

/// The matrices as one, where each begins in memory right below the one before.
pub(super) fn stacked<'a>(mats: &[Mat<'a>]) -> Option<Mat<'a>> {
    let (first, rest) = mats.split_first()?;
    rest.iter().try_fold(*first, |above, &below| above.is_above(below).then(|| above.joined(below)))
}

/// The same for gradients that are written: joins those that can be.
pub(super) fn joined(gradients: Vec<(Range<usize>, Acc)>) -> Vec<(Range<usize>, Acc)> {
    let mut all: Vec<(Range<usize>, Acc)> = Vec::with_capacity(gradients.len());
    for (range, acc) in gradients {
        match all.pop() {
            Some((above, to))
                if above.end == range.start && to.beta == acc.beta && to.to.as_mat().is_above(acc.to.as_mat()) =>
            {
                all.push((above.start..range.end, Acc { to: to.to.joined(acc.to), beta: acc.beta }));
            }
            before => all.extend(before.into_iter().chain([(range, acc)])),
        }
    }
    all
}

// What a kernel is told, as in epilogue.cuh, terms.cu and up.cu.

/// `Gemm`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Product {
    a: u64,
    b: u64,
    c: u64,
    bias: u64,
    residual: u64,
    partial: u64,
    m: i32,
    n: i32,
    k: i32,
    k_split: i32,
    lda: i64,
    ldb: i64,
    ldc: i64,
    ldr: i64,
    step: [i64; 3],
    alpha: f32,
    beta: f32,
    flags: u32,
}

/// `Term`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Term {
    a: u64,
    b: u64,
    lda: i64,
    ldb: i64,
    k: i32,
    first: i32,
    flags: u32,
    unused: u32,
}

/// `Segment`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
struct Segment {
    col: i32,
    end: i32,
    tile: i32,
    from: i32,
    to: i32,
}

/// `TERMS`: parts that one kernel can take.
const TERMS: usize = 3;
/// `SEGMENTS`.
const SEGMENTS: usize = 2 * TERMS + 1;

/// `Lora`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Arguments {
    product: Product,
    terms: [Term; TERMS],
    segments: [Segment; SEGMENTS],
    tiles: i32,
}

const C_F32: u32 = 8;
const BIAS_F32: u32 = 16;
const VECTOR_A: u32 = 32;
const VECTOR_B: u32 = 64;
const VECTOR_C: u32 = 128;

fn flag(bit: u32, set: bool) -> u32 {
    if set { bit } else { 0 }
}

/// Whether every row starts at a multiple of 16 bytes.
fn vectors(x: Mat) -> bool {
    x.address().is_multiple_of(16) && (x.ld() * x.dtype().size()).is_multiple_of(16)
}

fn int(x: usize) -> i32 {
    i32::try_from(x).expect("lora: sizes fit an int")
}

/// Whether all matrices are as the kernels take them: of the type, and not transposed.
///
/// # Panics
/// When one lies on another device.
fn plain<'m>(gpu: &Gpu, dtype: DType, mats: impl IntoIterator<Item = Mat<'m>>) -> bool {
    let mut plain = true;
    for x in mats {
        assert!(x.gpu().is_some_and(|g| **g == *gpu), "lora: a matrix on {} among those on {gpu}", x.device());
        plain &= x.dtype() == dtype && !x.is_transposed();
    }
    plain
}

/// Tiles of the kernels that compute a projection with its terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Size {
    /// 128×128.
    Large,
    /// 64×64.
    Small,
}

impl Size {
    fn name(self) -> &'static str {
        match self {
            Size::Large => "large",
            Size::Small => "small",
        }
    }

    fn tile(self) -> usize {
        match self {
            Size::Large => 128,
            Size::Small => 64,
        }
    }

    fn threads(self, dtype: DType) -> usize {
        if dtype == DType::F32 || self == Size::Large { 256 } else { 128 }
    }

    /// Bytes of dynamic shared memory: four stages of two panels, each 64 bytes deep or twice that for small tiles.
    fn shared(self, dtype: DType) -> usize {
        let depth = if self == Size::Large { 64 } else { 128 };
        if dtype == DType::F32 { 0 } else { 4 * 2 * self.tile() * depth }
    }
}

/// The tiles with which one kernel computes a projection with its terms, for pieces of so many columns; none with so few
/// rows that ranges of k have to fill the device, or that only the reading of W matters: then it is better to compute the
/// projection first and to add the terms to it, with one more pass over the result.
fn size(multiprocessors: usize, rows: usize, widths: &[usize]) -> Option<Size> {
    if rows <= 8 {
        return None;
    }
    let across = |size: Size| widths.iter().map(|w| w.div_ceil(size.tile())).sum::<usize>();
    let blocks = |size: Size| rows.div_ceil(size.tile()) * across(size);
    if blocks(Size::Large) >= multiprocessors {
        return Some(Size::Large);
    }
    (blocks(Size::Small) >= multiprocessors).then_some(Size::Small)
}

/// How a projection gets its terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// In the kernel of [`launch`], with tiles of that size.
    Tiles(Size),
    /// In the kernel for Hopper's tensor cores.
    Hopper(Variant),
    /// After the projection, which another engine computes.
    Apart,
}

/// The way that follows from the engine that [`engine`] names for the projection.
fn way(engine: Engine, rounded: bool, packable: bool, size: Option<Size>) -> Way {
    match engine {
        Engine::Wgmma(variant) if packable => Way::Hopper(variant),
        // True f32 would be many times slower than a projection on tensor cores.
        Engine::Base if !rounded => size.map_or(Way::Apart, Way::Tiles),
        _ => Way::Apart,
    }
}

/// Cuts `n` columns at the edges of the parts. Each piece has the number of its part, if it has one.
fn pieces<'a>(n: usize, parts: impl IntoIterator<Item = &'a Range<usize>>) -> Vec<(Range<usize>, Option<usize>)> {
    let mut pieces = Vec::new();
    let mut col = 0;
    for (i, part) in parts.into_iter().enumerate() {
        pieces.extend([(col..part.start, None), (part.clone(), Some(i))]);
        col = part.end;
    }
    pieces.push((col..n, None));
    pieces.retain(|(cols, _)| !cols.is_empty());
    pieces
}

/// The segments of a row of tiles, and how many tiles they have together.
fn segments(pieces: &[(Range<usize>, Range<usize>)], tile: usize) -> ([Segment; SEGMENTS], usize) {
    let mut segments = [Segment { col: 0, end: 0, tile: i32::MAX, from: 0, to: 0 }; SEGMENTS];
    let mut tiles = 0;
    for (segment, (cols, terms)) in segments.iter_mut().zip(pieces) {
        let [col, end, tile_number, from, to] = [cols.start, cols.end, tiles, terms.start, terms.end].map(int);
        *segment = Segment { col, end, tile: tile_number, from, to };
        tiles += cols.len().div_ceil(tile);
    }
    (segments, tiles)
}

/// One product with its terms.
struct Job<'a> {
    what: &'static str,
    a: Mat<'a>,
    b: Mat<'a>,
    bias: Option<Mat<'a>>,
    beta: f64,
    /// All h or g, [m, Σ r].
    low: Mat<'a>,
    /// [m, r] and [r, …], and the first column of C that it goes to.
    terms: Vec<(Mat<'a>, Mat<'a>, usize)>,
    /// Columns of C and the terms that they get.
    pieces: Vec<(Range<usize>, Range<usize>)>,
}

impl<'a> Job<'a> {
    /// The projection without its terms.
    fn projection<'b>(&'b self, c: MatMut<'b>) -> Problem<'b> {
        Problem::single(1.0, self.a, self.b, self.beta, c, Epilogue { bias: self.bias, ..Epilogue::default() })
    }

    /// B of all terms, [Σ r, n], as it lies in memory: contiguous along the ranks where that of the projection is
    /// contiguous along k.
    fn by_rank(&self) -> bool {
        !self.b.is_transposed()
    }

    /// That matrix where it exists already and TMA can read it: one term, which goes to all columns and lies that way.
    fn whole(&self, n: usize) -> Option<Mat<'a>> {
        let &[(_, b, first)] = &self.terms[..] else { return None };
        // B is [c, r], A is [r, c].
        let (of_ranks, columns) = if self.what == "forward" { (false, b.rows()) } else { (true, b.cols()) };
        let fits = (first, columns, of_ranks) == (0, n, self.by_rank()) && wgmma::is_readable(b);
        fits.then(|| b.t_if(!of_ranks))
    }

    /// Whether one matrix for all terms is worth its zeros. It has as many steps of k as there are ranks; up to 64, one
    /// panel, they cost nothing. Far beyond, the parts' own products take less time, for all their passes over C.
    fn is_packable(&self) -> bool {
        self.what == "input" || self.terms.len() == 1 || self.low.cols() <= MOST_PACKED
    }
}

/// The ranks of several parts of a projection that are multiplied as one matrix, at most: the products with its zeros, at
/// 2·256 operations an element, take no longer than to read and write the element once more.
const MOST_PACKED: usize = 256;

/// `Block` of pack.cu.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Block {
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
struct Pack {
    blocks: [Block; TERMS],
    to: u64,
    ld: i64,
    rows: i32,
    cols: i32,
    by_rank: i32,
}

/// B of all terms of a projection with n columns, in memory of its own whose rows TMA can read: [Σ r, n] where it lies by
/// rank, else [n, Σ r]. Returns the elements from one row to the next as well.
fn packed(gpu: &Arc<Gpu>, job: &Job, n: usize) -> Result<(Buffer, usize)> {
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
unsafe fn launch_hopper(gpu: &Arc<Gpu>, job: &Job, c: &mut MatMut, variant: Variant) -> Result<()> {
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

/// Computes a job; `false`, with nothing done, where the terms are better added after the projection.
fn run(gpu: &Arc<Gpu>, job: &Job, c: &mut MatMut) -> Result<bool> {
    let widths: Vec<_> = job.pieces.iter().map(|(cols, _)| cols.len()).collect();
    let size = size(gpu.info().multiprocessors, c.rows(), &widths);
    let rounded = job.a.dtype() == DType::F32 && plan::tf32()?;
    let engine = product::engine(gpu, &job.projection(c.reborrow()))?;
    match way(engine, rounded, job.is_packable(), size) {
        Way::Tiles(size) => launch(gpu, job, c, size)?,
        // SAFETY: the engine is one that computes the projection on this device.
        Way::Hopper(variant) => unsafe { launch_hopper(gpu, job, c, variant)? },
        Way::Apart => return Ok(false),
    }
    Ok(true)
}

fn launch(gpu: &Gpu, job: &Job, c: &mut MatMut, size: Size) -> Result<()> {
    let Job { what, a, b, bias, beta, terms, pieces, .. } = job;
    let (dtype, layout) = (a.dtype(), if b.is_transposed() { "nt" } else { "nn" });
    let (segments, tiles) = segments(pieces, size.tile());
    let mut list = [Term::default(); TERMS];
    for (to, (a, b, first)) in list.iter_mut().zip(terms) {
        let flags = flag(VECTOR_A, vectors(*a)) | flag(VECTOR_B, vectors(*b));
        let (lda, ldb) = (a.ld() as i64, b.ld() as i64);
        *to = Term { a: a.address(), b: b.address(), lda, ldb, k: int(a.cols()), first: int(*first), flags, unused: 0 };
    }
    let flags = flag(C_F32, c.dtype() == DType::F32)
        | flag(BIAS_F32, bias.is_some_and(|b| b.dtype() == DType::F32))
        | flag(VECTOR_A, vectors(*a))
        | flag(VECTOR_B, vectors(*b))
        | flag(VECTOR_C, vectors(c.as_mat()) && bias.is_none_or(|b| b.address().is_multiple_of(16)));
    let product = Product {
        a: a.address(),
        b: b.address(),
        c: c.address(),
        bias: bias.map_or(0, |b| b.address()),
        residual: 0,
        partial: 0,
        m: int(c.rows()),
        n: int(c.cols()),
        k: int(a.cols()),
        k_split: int(a.cols()),
        lda: a.ld() as i64,
        ldb: b.ld() as i64,
        ldc: c.ld() as i64,
        ldr: 0,
        step: [0; 3],
        alpha: 1.0,
        beta: *beta as f32,
        flags,
    };
    let arguments = Arguments { product, terms: list, segments, tiles: int(tiles) };
    let mut l = gpu.launch(module(dtype), &format!("lora_{what}_{}_{layout}_{}", size.name(), suffix(what, dtype)?))?;
    let blocks = c.rows().div_ceil(size.tile()) * tiles;
    // SAFETY: the arguments are the kernel's; A, B, C, the bias and the terms are live matrices of shapes that were
    // checked against each other, and the kernel stays below m rows, the end of each segment and the steps of each product.
    unsafe { l.raw(arguments).run([blocks, 1, 1], size.threads(dtype), size.shared(dtype)) }
}

/// [`super::lora_forward`] in one kernel; `false`, with nothing done, where that is not the fastest way.
pub(super) fn forward(
    gpu: &Arc<Gpu>,
    x: Mat,
    w: Mat,
    bias: Option<Mat>,
    h: Mat,
    parts: &[LoraPart],
    y: &mut MatMut,
) -> Result<bool> {
    let Some(job) = forward_job(gpu, x, w, bias, h, parts, y) else { return Ok(false) };
    run(gpu, &job, y)
}

fn forward_job<'a>(
    gpu: &Gpu,
    x: Mat<'a>,
    w: Mat<'a>,
    bias: Option<Mat<'a>>,
    h: Mat<'a>,
    parts: &[LoraPart<'a>],
    y: &MatMut,
) -> Option<Job<'a>> {
    let dtype = x.dtype();
    let stored = w.t_if(w.is_transposed());
    let fits = plain(gpu, dtype, [x, h, stored].into_iter().chain(parts.iter().map(|p| p.b)))
        && bias.is_none_or(|b| plain(gpu, b.dtype(), [b]) && [dtype, dtype.accumulator()].contains(&b.dtype()))
        && plain(gpu, y.dtype(), [y.as_mat()])
        && [dtype, dtype.accumulator()].contains(&y.dtype())
        && parts.len() <= TERMS
        && y.rows() > 0
        && y.cols() > 0
        && parts.iter().all(|p| p.b.cols() > 0);
    if !fits {
        return None;
    }
    let ranges = ranges(parts.iter().map(|p| p.b.cols()));
    let terms = parts.iter().zip(ranges).map(|(p, range)| (h.cols_in(range), p.b, p.cols.start)).collect();
    let pieces = pieces(y.cols(), parts.iter().map(|p| &p.cols));
    let pieces = pieces.into_iter().map(|(cols, part)| (cols, part.map_or(0..0, |i| i..i + 1))).collect();
    Some(Job { what: "forward", a: x, b: w, bias, beta: 0.0, low: h, terms, pieces })
}

/// [`super::lora_backward_input`] in one kernel; `false`, with nothing done, where that is not the fastest way.
pub(super) fn backward_input(gpu: &Arc<Gpu>, dy: Mat, w: Mat, g: Mat, a: &[Mat], dx: &mut Acc) -> Result<bool> {
    let Some(job) = input_job(gpu, dy, w, g, a, dx) else { return Ok(false) };
    run(gpu, &job, &mut dx.to)
}

fn input_job<'a>(gpu: &Gpu, dy: Mat<'a>, w: Mat<'a>, g: Mat<'a>, a: &[Mat<'a>], dx: &Acc) -> Option<Job<'a>> {
    let (dtype, to) = (dy.dtype(), dx.to.as_mat());
    let stored = w.t_if(w.is_transposed());
    let fits = plain(gpu, dtype, [dy, g, stored].into_iter().chain(a.iter().copied()))
        && plain(gpu, to.dtype(), [to])
        && [dtype, dtype.accumulator()].contains(&to.dtype())
        && a.len() <= TERMS
        && to.rows() > 0
        && to.cols() > 0
        && a.iter().all(|a| a.rows() > 0);
    if !fits {
        return None;
    }
    // A's that lie together are one term.
    let terms: Vec<_> = match stacked(a) {
        Some(all) => vec![(g, all, 0)],
        None => a.iter().zip(ranges(a.iter().map(Mat::rows))).map(|(a, range)| (g.cols_in(range), *a, 0)).collect(),
    };
    let pieces = vec![(0..to.cols(), 0..terms.len())];
    Some(Job { what: "input", a: dy, b: w.t(), bias: None, beta: dx.beta, low: g, terms, pieces })
}

/// `UpPart`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct UpPart {
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
struct Up {
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
const WIDTH: usize = 256;

/// The rank that the kernel for the given largest rank has room for.
fn padded(dtype: DType, rank: usize) -> Option<usize> {
    let most = if dtype == DType::F32 { 32 } else { 64 };
    [16, 32, 64].into_iter().find(|&r| rank <= r && r <= most)
}

/// Bytes of shared memory of `up_backward`: B, the stages of tiles of dy and h, and the sums for dB.
fn up_shared(dtype: DType, padded: usize) -> usize {
    let (tile, thin, stages) = match (dtype, padded) {
        (DType::F32, r) => (64 * 68, 64 * (r + 8), 2),
        (_, 16) => (64 * 64, 64 * 24, 3),
        (_, r) => (64 * 64, 64 * r, 3),
    };
    (WIDTH / 64 * thin + stages * (tile + thin)) * dtype.size() + WIDTH * padded * 4
}

/// Rows of a block, so that two blocks for each multiprocessor share `n` rows and so many blocks side by side.
fn up_rows(n: usize, across: usize, multiprocessors: usize) -> usize {
    (n * across).div_ceil(2 * multiprocessors).next_multiple_of(64).max(64)
}

/// [`super::lora_backward_up`] with dy read once; `false`, with nothing done, where that is not the fastest way.
pub(super) fn backward_up(
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

/// `Grouped`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Grouped {
    entries: u64,
    x: u64,
    h: u64,
    y: u64,
    ldx: i64,
    ldh: i64,
    ldy: i64,
    k: i32,
    flags: u32,
}

/// Rows and columns of a block.
const GROUP: usize = 64;

/// The words of an `Entry`: some rows of one adapter.
fn entry(rows: &Range<usize>, adapter: &LoraAdapter, y: Mat) -> [u32; 16] {
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
pub(super) fn grouped(
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{
        cuda::testing::*, lora_backward_down, lora_backward_input, lora_backward_up, lora_down, lora_forward,
        lora_grouped, testing::Padded,
    };

    /// Columns and rank of each part.
    type Parts = &'static [(Range<usize>, usize)];

    /// A projection of a test.
    struct Case {
        n: usize,
        k: usize,
        out: usize,
        parts: Parts,
        /// Padding of every matrix: where rows begin.
        pad: usize,
    }

    const CASES: &[Case] = &[
        // All edges inside of vectors and tiles.
        Case { n: 33, k: 40, out: 129, parts: &[(0..129, 8)], pad: 0 },
        Case { n: 129, k: 33, out: 150, parts: &[(0..50, 4), (100..150, 7)], pad: 3 },
        Case { n: 9, k: 7, out: 31, parts: &[(3..20, 1)], pad: 1 },
        // A fused projection whose parts begin where tiles do, and one whose parts begin where vectors do not.
        Case { n: 64, k: 64, out: 192, parts: &[(0..64, 16), (64..128, 16), (128..192, 16)], pad: 0 },
        Case { n: 31, k: 72, out: 144, parts: &[(4..20, 8), (20..21, 8), (44..140, 8)], pad: 0 },
        // A rank of several panels; a projection that is all rank.
        Case { n: 130, k: 72, out: 140, parts: &[(64..140, 70)], pad: 0 },
        Case { n: 20, k: 0, out: 16, parts: &[(0..16, 5)], pad: 0 },
    ];

    impl Case {
        fn rank(&self) -> usize {
            self.parts.iter().map(|(_, r)| r).sum()
        }

        /// The B's, in matrices of their own.
        fn b(&self, s: &Side) -> Vec<Padded> {
            self.parts.iter().zip(20..).map(|((cols, r), seed)| s.random(seed, cols.len(), *r, self.pad, 1.0)).collect()
        }

        /// The A's, one below the other.
        fn a(&self, s: &Side) -> Padded {
            s.random(30, self.rank(), self.k, self.pad, 1.0)
        }

        fn list<'a>(&self, b: &'a [Padded]) -> Vec<LoraPart<'a>> {
            self.parts.iter().zip(b).map(|((cols, _), b)| LoraPart { cols: cols.clone(), b: b.mat() }).collect()
        }

        fn ranges(&self) -> Vec<Range<usize>> {
            ranges(self.parts.iter().map(|(_, r)| *r))
        }
    }

    fn a_list<'a>(a: &'a Padded, case: &Case) -> Vec<Mat<'a>> {
        case.ranges().into_iter().map(|range| a.mat().rows_in(range)).collect()
    }

    /// The fused kernel with given tiles on a device, the composition on the host.
    fn forward_once(s: &Side, case: &Case, i: usize, size: Size) {
        let Case { n, k, out, pad, .. } = *case;
        let transposed = i.is_multiple_of(2);
        let x = s.random(1, n, k, pad, 1.0);
        let w = if transposed { s.random(2, out, k, pad, 1.0) } else { s.random(2, k, out, pad, 1.0) };
        let w = w.mat().t_if(transposed);
        let bias = if i.is_multiple_of(3) { s.random_acc(3, 1, out, 0, 1.0) } else { s.random(3, 1, out, i % 2, 1.0) };
        let bias = (i % 4 != 3).then(|| bias.mat());
        let h = s.random(4, n, case.rank(), pad, 1.0);
        let b = case.b(s);
        let mut y = if i % 5 == 4 { s.poison_acc(n, out, pad) } else { s.poison(n, out, pad) };
        match s.device() {
            Device::Cuda(gpu) => {
                let mut y = y.mat_mut();
                let job =
                    forward_job(gpu, x.mat(), w, bias, h.mat(), &case.list(&b), &y).expect("a shape for the kernel");
                launch(gpu, &job, &mut y, size).unwrap();
            }
            _ => lora_forward(x.mat(), w, bias, h.mat(), &case.list(&b), y.mat_mut()).unwrap(),
        }
        s.out(format!("y {n}×{k}×{out} {:?} {size:?} {i}", case.parts), y.get());
    }

    fn input_once(s: &Side, case: &Case, i: usize, size: Size) {
        let Case { n, k, out, pad, .. } = *case;
        if k == 0 {
            return;
        }
        let transposed = i.is_multiple_of(2);
        let dy = s.random(1, n, out, pad, 1.0);
        let w = if transposed { s.random(2, out, k, pad, 1.0) } else { s.random(2, k, out, pad, 1.0) };
        let w = w.mat().t_if(transposed);
        let g = s.random(4, n, case.rank(), pad, 1.0);
        // One below the other, or each in memory of its own.
        let together = case.a(s);
        let apart = apart(s, case);
        let a: Vec<_> = if i % 4 < 2 { a_list(&together, case) } else { apart.iter().map(Padded::mat).collect() };
        let beta = [0.0, 1.0][i % 2];
        let mut dx = s.target(5, n, k, pad, beta);
        match s.device() {
            Device::Cuda(gpu) => {
                let mut dx = dx.acc(beta);
                let job = input_job(gpu, dy.mat(), w, g.mat(), &a, &dx).expect("a shape for the kernel");
                launch(gpu, &job, &mut dx.to, size).unwrap();
            }
            _ => lora_backward_input(dy.mat(), w, g.mat(), &a, dx.acc(beta)).unwrap(),
        }
        s.out(format!("dx {n}×{k}×{out} {:?} {size:?} {i}", case.parts), dx.get());
    }

    fn terms(s: &Side) {
        for (i, case) in CASES.iter().enumerate() {
            let (one, other) =
                if i.is_multiple_of(2) { (Size::Small, Size::Large) } else { (Size::Large, Size::Small) };
            forward_once(s, case, i, one);
            forward_once(s, case, i + 1, other);
            input_once(s, case, i, other);
            input_once(s, case, i + 1, one);
        }
    }

    #[test]
    fn projections_with_their_terms_equal_the_reference() {
        parity("lora terms", &[(Bf16, 2e-2), (F16, 3e-3)], terms);
    }

    #[test]
    fn projections_with_their_terms_equal_the_reference_in_f32() {
        parity("lora terms", &[(F32, 1e-5)], terms);
    }

    /// A's in memory of their own.
    fn apart(s: &Side, case: &Case) -> Vec<Padded> {
        case.parts.iter().zip(40..).map(|((_, r), seed)| s.random(seed, *r, case.k, case.pad, 1.0)).collect()
    }

    fn weight(s: &Side, case: &Case, transposed: bool) -> Padded {
        let (rows, cols) = if transposed { (case.out, case.k) } else { (case.k, case.out) };
        s.random(2, rows, cols, case.pad, 1.0)
    }

    /// B of all terms as the device puts it together, [Σ r, n].
    fn unpacked(gpu: &Arc<Gpu>, job: &Job, n: usize) -> Vec<f64> {
        let (to, ld) = packed(gpu, job, n).unwrap();
        assert_eq!(ld % 8, 0);
        let values = to.to_vec::<half::bf16>(0..to.len()).unwrap();
        let at = |i: usize| if job.by_rank() { i / n * ld + i % n } else { i % n * ld + i / n };
        (0..job.low.cols() * n).map(|i| values[at(i)].to_f64()).collect()
    }

    fn packs(s: &Side) {
        for (i, case) in CASES.iter().enumerate() {
            let &Case { n, k, out, parts, pad } = case;
            for transposed in [false, true] {
                let (x, h, w) =
                    (s.random(1, n, k, pad, 1.0), s.random(4, n, case.rank(), pad, 1.0), weight(s, case, transposed));
                let (w, b, a) = (w.mat().t_if(transposed), case.b(s), apart(s, case));
                let (mut y, dy, mut dx) = (s.poison(n, out, pad), s.random(5, n, out, pad, 1.0), s.poison(n, k, pad));
                let Device::Cuda(gpu) = s.device() else {
                    let mut of_b = vec![0.0; case.rank() * out];
                    for ((b, range), (cols, r)) in b.iter().zip(case.ranges()).zip(parts) {
                        for (j, v) in b.get().into_iter().enumerate() {
                            of_b[(range.start + j % r) * out + cols.start + j / r] = v;
                        }
                    }
                    s.out(format!("B {i}"), of_b);
                    s.out(format!("A {i}"), a.iter().flat_map(Padded::get).collect());
                    continue;
                };
                let (one, aligned) = (parts.len() == 1, pad == 0);
                let job = forward_job(gpu, x.mat(), w, None, h.mat(), &case.list(&b), &y.mat_mut()).unwrap();
                let direct = one && aligned && transposed && parts[0].0 == (0..out) && case.rank().is_multiple_of(8);
                assert_eq!(job.whole(out).is_some(), s.tested() == Bf16 && direct, "{i}");
                s.out(format!("B {i}"), unpacked(gpu, &job, out));
                let a: Vec<_> = a.iter().map(Padded::mat).collect();
                let Some(job) = input_job(gpu, dy.mat(), w, h.mat(), &a, &dx.acc(0.0)) else {
                    assert_eq!(k, 0);
                    s.out("nothing", Vec::new());
                    continue;
                };
                let direct = one && aligned && transposed && k.is_multiple_of(8);
                assert_eq!(job.whole(k).is_some(), direct, "{i}");
                s.out(format!("A {i}"), unpacked(gpu, &job, k));
            }
        }
    }

    #[test]
    fn matrices_of_all_parts_are_put_together() {
        parity("lora pack", &[(Bf16, 0.0)], packs);
    }

    /// Results of the variants on a device, for a job that they can compute.
    type OfVariants<'a> = dyn Fn(&Arc<Gpu>) -> Option<Vec<Vec<f64>>> + 'a;

    /// Kernels for Hopper, where there is one: every variant by itself. Elsewhere what the public functions choose.
    #[test]
    fn projections_on_hopper_equal_the_reference() {
        const VARIANTS: usize = 5;
        let cases = [
            // More panels than the ring has stages; B as it lies, or turned.
            Case { n: 130, k: 520, out: 328, parts: &[(0..328, 16)], pad: 0 },
            // Zeros between the blocks of two parts, and ranks in more than one panel in rows that TMA cannot read.
            Case { n: 257, k: 64, out: 192, parts: &[(0..64, 8), (128..192, 8)], pad: 0 },
            Case { n: 64, k: 72, out: 200, parts: &[(8..101, 5), (101..200, 70)], pad: 0 },
        ];
        parity("lora hopper", &[(Bf16, 2e-2)], |s| {
            // Each variant's result, or one result as that of each.
            let each = |job: &OfVariants, other: &dyn Fn() -> Vec<f64>| {
                let results = match s.device() {
                    Device::Cuda(gpu) if gpu.info().compute_capability == (9, 0) => job(gpu).expect("a job"),
                    _ => vec![other(); VARIANTS],
                };
                assert_eq!(results.len(), VARIANTS);
                results.into_iter().for_each(|v| s.out("C", v));
            };
            for case in &cases {
                let &Case { n, k, out, .. } = case;
                for transposed in [false, true] {
                    let (x, h, w) =
                        (s.random(1, n, k, 0, 0.1), s.random(4, n, case.rank(), 0, 0.25), weight(s, case, transposed));
                    let (w, b, a) = (w.mat().t_if(transposed), case.b(s), apart(s, case));
                    let (bias, dy) = (s.random_acc(3, 1, out, 0, 1.0), s.random(5, n, out, 0, 0.1));
                    let bias = transposed.then(|| bias.mat());
                    let a: Vec<_> = a.iter().map(Padded::mat).collect();
                    let forward = |gpu: &Arc<Gpu>| {
                        let mut y = s.poison(n, out, 0);
                        let job = forward_job(gpu, x.mat(), w, bias, h.mat(), &case.list(&b), &y.mat_mut())?;
                        Some(every_variant(gpu, &job, &mut y, None))
                    };
                    each(&forward, &|| {
                        let mut y = s.poison(n, out, 0);
                        lora_forward(x.mat(), w, bias, h.mat(), &case.list(&b), y.mat_mut()).unwrap();
                        y.get()
                    });
                    let old = || s.random(6, n, k, 0, 1.0);
                    let input = |gpu: &Arc<Gpu>| {
                        let mut dx = old();
                        let job = input_job(gpu, dy.mat(), w, h.mat(), &a, &dx.acc(1.0))?;
                        Some(every_variant(gpu, &job, &mut dx, Some(&old)))
                    };
                    each(&input, &|| {
                        let mut dx = old();
                        lora_backward_input(dy.mat(), w, h.mat(), &a, dx.acc(1.0)).unwrap();
                        dx.get()
                    });
                }
            }
        });
    }

    /// What each variant makes of a job, in a C that is new each time where it is read.
    fn every_variant(gpu: &Arc<Gpu>, job: &Job, c: &mut Padded, new: Option<&dyn Fn() -> Padded>) -> Vec<Vec<f64>> {
        let info = gpu.info();
        let shape = Shape::of(&job.projection(c.mat_mut()), false);
        let variants = wgmma::variants(info.compute_capability, info.multiprocessors, &shape);
        let mut result = |variant| {
            if let Some(new) = new {
                *c = new();
            }
            // SAFETY: one of the variants for the projection on this device.
            unsafe { launch_hopper(gpu, job, &mut c.mat_mut(), variant).unwrap() };
            c.get()
        };
        variants.into_iter().map(&mut result).collect()
    }

    #[test]
    fn the_engine_of_the_projection_decides() {
        let variant = Variant { columns: 256, cluster: 2 };
        let (hopper, tiles) = (Engine::Wgmma(variant), Way::Tiles(Size::Large));
        let large = Some(Size::Large);
        assert_eq!(way(hopper, false, true, large), Way::Hopper(variant));
        assert_eq!(way(hopper, false, false, large), Way::Apart, "too many zeros");
        assert_eq!(way(Engine::Base, false, false, large), tiles);
        assert_eq!(way(Engine::Base, false, true, None), Way::Apart, "few rows");
        assert_eq!(way(Engine::Base, true, true, large), Way::Apart, "tf32");
        assert_eq!(way(Engine::CublasLt(0), false, true, large), Way::Apart, "the faster, or what LORA_GEMM asks for");
        assert_eq!(size(132, 8192, &[768, 768, 768]), large);
        assert_eq!(size(132, 512, &[768]), None);
        assert_eq!(size(132, 1024, &[768]), Some(Size::Small));
        assert_eq!(size(1, 8, &[768]), None);
    }

    /// dy read once: shapes for one block and for several across and down.
    fn up(s: &Side) {
        let cases: &[(usize, Parts, usize)] = &[
            (33, &[(0..129, 8)], 0),
            (129, &[(0..50, 4), (100..150, 16)], 3),
            (1, &[(3..20, 1)], 1),
            (600, &[(0..257, 24)], 0),
            (70, &[(8..72, 17), (72..73, 32), (80..120, 1)], 0),
        ];
        for (i, &(n, parts, pad)) in cases.iter().enumerate() {
            let case = Case { n, k: 0, out: 300, parts, pad };
            let dy = s.random(1, n, 300, pad, 1.0);
            let h = s.random(2, n, case.rank(), pad, 1.0);
            let b = case.b(s);
            let mut g = s.poison(n, case.rank(), pad);
            let beta = [0.0, 1.0][i % 2];
            let mut db: Vec<Padded> = parts
                .iter()
                .zip(50..)
                .map(|((cols, r), seed)| match i % 3 {
                    0 => s.target(seed, cols.len(), *r, pad, beta),
                    _ => s.target_acc(seed, cols.len(), *r, pad, beta),
                })
                .collect();
            // Sometimes one of the gradients is not asked for.
            let skip = if parts.len() > 1 { Some(i % 2) } else { None };
            let mut wanted: Vec<_> =
                db.iter_mut().enumerate().map(|(j, db)| (Some(j) != skip).then(|| db.acc(beta))).collect();
            match s.device() {
                Device::Cuda(gpu) => {
                    let mut g = g.mat_mut();
                    let parts = case.list(&b);
                    assert!(backward_up(gpu, -0.5, dy.mat(), h.mat(), &parts, &mut g, &mut wanted).unwrap());
                }
                _ => {
                    lora_backward_up(-0.5, dy.mat(), Some(h.mat()), &case.list(&b), Some(g.mat_mut()), wanted).unwrap()
                }
            }
            s.out(format!("g {i}"), g.get());
            for (j, db) in db.iter().enumerate() {
                s.out(format!("dB {j} of {i}"), db.get());
            }
        }
    }

    #[test]
    fn gradients_that_read_dy_once_equal_the_reference() {
        parity("lora up", &[(F32, 2e-5), (Bf16, 2e-2), (F16, 4e-3)], up);
        // Ranks up to 64 on tensor cores.
        parity("lora up, rank 64", &[(Bf16, 2e-2)], |s| {
            let case = Case { n: 70, k: 0, out: 270, parts: &[(0..264, 61)], pad: 0 };
            let (dy, h, b) = (s.random(1, 70, 270, 0, 1.0), s.random(2, 70, 61, 3, 1.0), case.b(s));
            let (mut g, mut db) = (s.poison(70, 61, 0), s.poison_acc(264, 61, 1));
            let wanted = vec![Some(db.acc(0.0))];
            lora_backward_up(0.25, dy.mat(), Some(h.mat()), &case.list(&b), Some(g.mat_mut()), wanted).unwrap();
            s.out("g", g.get());
            s.out("dB", db.get());
        });
    }

    /// The public functions one after the other, whatever way they choose: large enough that the kernels are chosen.
    #[test]
    fn a_step_of_training_equals_the_reference() {
        parity("lora step", &[(F32, 2e-5), (Bf16, 4e-2)], |s| {
            for (i, n) in [3, 70].into_iter().enumerate() {
                let case = Case { n, k: 48, out: 160, parts: &[(0..64, 4), (96..160, 4)], pad: 0 };
                let (x, dy) = (s.random(1, n, 48, 0, 1.0), s.random(2, n, 160, 0, 1.0));
                let (w, b, a) = (s.random(3, 48, 160, 0, 0.5), case.b(s), case.a(s));
                let apart: Vec<_> = (40..42).map(|seed| s.random(seed, 4, 48, 0, 1.0)).collect();
                let a = if i == 0 { apart.iter().map(Padded::mat).collect() } else { a_list(&a, &case) };
                let (mut h, mut y, mut g) = (s.poison(n, 8, 0), s.poison(n, 160, 0), s.poison(n, 8, 0));
                lora_down(0.25, x.mat(), &a, h.mat_mut()).unwrap();
                lora_forward(x.mat(), w.mat(), None, h.mat(), &case.list(&b), y.mat_mut()).unwrap();
                let mut db = [s.poison_acc(64, 4, 0), s.poison_acc(64, 4, 0)];
                let wanted = db.iter_mut().map(|db| Some(db.acc(0.0))).collect();
                lora_backward_up(0.25, dy.mat(), Some(h.mat()), &case.list(&b), Some(g.mat_mut()), wanted).unwrap();
                // Gradients that lie together, and apart.
                let mut da = s.poison_acc(8, 48, 0);
                let [mut first, mut second] = [40, 41].map(|_| s.poison_acc(4, 48, 1));
                let (top, bottom) = da.mat_mut().reshape(1, 8 * 48).split_cols(4 * 48);
                let [top, bottom] = [top, bottom].map(|to| Acc { to: to.reshape(4, 48), beta: 0.0 });
                lora_backward_down(g.mat(), x.mat(), vec![(0..4, top), (4..8, bottom)]).unwrap();
                lora_backward_down(g.mat(), x.mat(), vec![(0..4, first.acc(0.0)), (4..8, second.acc(0.0))]).unwrap();
                let mut dx = s.target(9, n, 48, 0, 1.0);
                lora_backward_input(dy.mat(), w.mat(), g.mat(), &a, dx.acc(1.0)).unwrap();
                for (what, v) in [
                    ("h", &h),
                    ("y", &y),
                    ("g", &g),
                    ("dB", &db[1]),
                    ("dA", &da),
                    ("dA 0", &first),
                    ("dA 1", &second),
                    ("dx", &dx),
                ] {
                    s.out(format!("{what} of {n}"), v.get());
                }
            }
        });
    }

    #[test]
    fn rows_with_adapters_of_their_own_equal_the_reference() {
        parity("lora grouped", &[(F32, 2e-5), (Bf16, 2e-2), (F16, 3e-3)], |s| {
            for (k, out, pad) in [(40, 72, 0), (33, 70, 3)] {
                let x = s.random(1, 150, k, pad, 1.0);
                let mut y = s.random(2, 150, out, pad, 1.0);
                let of = |seed, rows, cols| s.random(seed, rows, cols, pad, 0.5);
                let (a1, b1, a2, b2) = (of(3, 5, k), of(4, out, 5), of(5, 66, k), of(6, 9, 66));
                let first = LoraAdapter { scale: 0.5, a: a1.mat(), b: b1.mat(), cols: 0..out };
                let second = LoraAdapter { scale: -0.25, a: a2.mat(), b: b2.mat(), cols: 8..17 };
                let groups = [
                    (0..70, Some(first.clone())),
                    (70..80, None),
                    (80..80, Some(first.clone())),
                    (80..81, Some(second.clone())),
                    (84..149, Some(second)),
                    (149..150, Some(first)),
                ];
                lora_grouped(x.mat(), &groups, y.mat_mut()).unwrap();
                s.out(format!("y {k} {out}"), y.get());
                // Nobody has an adapter.
                lora_grouped(x.mat(), &[(0..150, None)], y.mat_mut()).unwrap();
                s.out("y as it was", y.get());
            }
        });
    }

    #[test]
    fn matrices_that_lie_together_are_one() {
        for gpu in gpus() {
            let device = Device::Cuda(gpu);
            let mut whole = Buffer::zeros(&device, F32, 60).unwrap();
            let m = Mat::new(&whole, 0, 10, 6);
            let all = stacked(&[m.rows_in(1..3), m.rows_in(3..4), m.rows_in(4..9)]).expect("they lie together");
            assert_eq!((all.rows(), all.address()), (8, m.rows_in(1..2).address()));
            // Columns of wider rows do too; others do not.
            assert!(stacked(&[m.cols_in(1..3).rows_in(0..2), m.cols_in(1..3).rows_in(2..5)]).is_some());
            assert!(stacked(&[m.rows_in(1..3), m.rows_in(4..9)]).is_none());
            assert!(stacked(&[m.rows_in(3..4), m.rows_in(1..3)]).is_none());
            assert!(stacked(&[m.t().cols_in(0..2).t(), m.rows_in(2..3).t()]).is_none());
            // Gradients as well, if they are written the same way.
            for (beta, count) in [(0.0, 1), (1.0, 2)] {
                let (top, bottom) = MatMut::new(&mut whole, 0, 1, 60).split_cols(24);
                let top = (0..4, Acc { to: top.reshape(4, 6), beta: 0.0 });
                let bottom = (4..10, Acc { to: bottom.reshape(6, 6), beta });
                assert_eq!(joined(vec![top, bottom]).len(), count);
            }
        }
    }

    #[test]
    fn tiles_cover_the_columns_once_and_never_an_edge_of_a_part() {
        for (n, parts) in [
            (129, &[(0, 129)][..]),
            (150, &[(0, 50), (100, 150)]),
            (2304, &[(0, 768), (768, 1536), (1536, 2304)]),
            (2304, &[(768, 1536)]),
            (31, &[(3, 20), (20, 21), (22, 30)]),
            (5, &[]),
        ] {
            let parts: Vec<Range<usize>> = parts.iter().map(|&(from, to)| from..to).collect();
            let pieces = pieces(n, &parts);
            assert!(pieces.len() <= SEGMENTS);
            let list: Vec<_> = pieces.iter().map(|(c, p)| (c.clone(), p.map_or(0..0, |i| i..i + 1))).collect();
            for tile in [64, 128] {
                let (segments, tiles) = segments(&list, tile);
                let mut seen = vec![None; n];
                for number in 0..tiles {
                    // As place_of_block finds it.
                    let s = segments.iter().rfind(|s| s.tile <= number as i32).unwrap();
                    let col = s.col as usize + (number - s.tile as usize) * tile;
                    assert!(col < s.end as usize, "{n} {parts:?}: an empty tile");
                    let end = (col + tile).min(s.end as usize);
                    for (c, seen) in seen.iter_mut().enumerate().take(end).skip(col) {
                        assert!(seen.replace(s.from..s.to).is_none(), "{n} {parts:?}: column {c} twice");
                    }
                }
                for (c, terms) in seen.into_iter().enumerate() {
                    let part = parts.iter().position(|p| p.contains(&c));
                    assert_eq!(terms, Some(part.map_or(0..0, |i| i as i32..i as i32 + 1)), "{n} {parts:?}: column {c}");
                }
            }
        }
    }

    #[test]
    fn blocks_fit_a_multiprocessor_and_cover_all_rows() {
        for dtype in [F32, Bf16, F16] {
            for size in [Size::Large, Size::Small] {
                assert!(2 * size.shared(dtype) <= 163 << 10, "{dtype:?} {size:?}");
            }
            for rank in [1, 8, 16, 17, 32, 33, 64, 65, 256] {
                let limit = if dtype == F32 { 32 } else { 64 };
                let padded = padded(dtype, rank);
                assert_eq!(padded.is_some(), rank <= limit, "{dtype:?} {rank}");
                assert!(padded.is_none_or(|r| r >= rank && up_shared(dtype, r) <= 163 << 10), "{dtype:?} {rank}");
            }
        }
        // B, three stages of dy and h, and the sums, in bytes.
        assert_eq!(up_shared(Bf16, 16), (4 * 64 * 24 + 3 * (64 * 64 + 64 * 24)) * 2 + 256 * 16 * 4);
        for (n, across) in [(1, 1), (63, 3), (8192, 16), (8192, 9), (100_000, 43)] {
            for multiprocessors in [4, 108, 132] {
                let rows = up_rows(n, across, multiprocessors);
                assert!(rows.is_multiple_of(64) && rows > 0);
                let down = n.div_ceil(rows);
                assert!((down - 1) * rows < n && n <= down * rows && down < 1 << 16);
                // One wave of two blocks for each multiprocessor, more or less.
                assert!(down * across <= 2 * multiprocessors + across, "{n} {across}: {down} blocks down");
            }
        }
        assert_eq!(up_rows(8192, 16, 132), 512);
    }

    #[test]
    fn arguments_are_laid_out_as_in_c() {
        assert_eq!((size_of::<Product>(), size_of::<Term>(), size_of::<Segment>()), (136, 48, 20));
        assert_eq!((size_of::<Arguments>(), std::mem::offset_of!(Arguments, segments)), (424, 280));
        assert_eq!((size_of::<Block>(), size_of::<Pack>()), (40, 152));
        assert_eq!((size_of::<UpPart>(), size_of::<Up>()), (88, 304));
        assert_eq!((size_of::<Grouped>(), std::mem::offset_of!(Grouped, k)), (64, 56));
    }

    pub(crate) const MUTATIONS: &[Mutation] = &[
        Mutation {
            name: "no barrier before a panel of a projection is multiplied",
            module: "lora_bf16",
            from: "cp_async_wait<STAGES - 2>();\n    __syncthreads();\n    if (p + STAGES - 1 < panels) feed",
            to: "cp_async_wait<STAGES - 2>();\n    if (p + STAGES - 1 < panels) feed",
            check: projections_with_their_terms_equal_the_reference,
        },
        Mutation {
            name: "the last steps of a term are left out",
            module: "lora_bf16",
            from: "panels += (terms[t].k + BK - 1) / BK",
            to: "panels += terms[t].k / BK",
            check: projections_with_their_terms_equal_the_reference,
        },
        Mutation {
            name: "a term begins at C's first column",
            module: "lora_bf16",
            from: "at.col - t.first, g.n - t.first",
            to: "at.col, g.n - t.first",
            check: projections_with_their_terms_equal_the_reference,
        },
        Mutation {
            name: "a term's panels are read as the projection's lie",
            module: "lora_bf16",
            from: "if (TB == TB2 || p < base)",
            to: "if (true)",
            check: projections_with_their_terms_equal_the_reference,
        },
        Mutation {
            name: "vectors across the edge of a part",
            module: "lora_bf16",
            from: "g.flags &= ~(TB ? VECTOR_C : VECTOR_B | VECTOR_C);",
            to: "g.flags &= ~0u;",
            check: projections_with_their_terms_equal_the_reference,
        },
        Mutation {
            name: "a tile of the next segment",
            module: "lora_f32",
            from: "l.segments[i].tile <= number",
            to: "l.segments[i].tile <= number + 1",
            check: projections_with_their_terms_equal_the_reference_in_f32,
        },
        Mutation {
            name: "no barrier between a term's panel and its products",
            module: "lora_f32",
            from: "    __syncthreads();\n    simt_panel",
            to: "    simt_panel",
            check: projections_with_their_terms_equal_the_reference_in_f32,
        },
        Mutation {
            name: "no barrier after a term's products",
            module: "lora_f32",
            from: "buffers + DEPTH * LA + in_b);\n    __syncthreads();",
            to: "buffers + DEPTH * LA + in_b);",
            check: projections_with_their_terms_equal_the_reference_in_f32,
        },
        Mutation {
            name: "blocks of another storage",
            module: "lora_bf16",
            from: "(col - k.col) * k.step_col + (rank - k.rank) * k.step_rank",
            to: "(col - k.col) * k.step_rank + (rank - k.rank) * k.step_col",
            check: matrices_of_all_parts_are_put_together,
        },
        Mutation {
            name: "a block is one rank too wide",
            module: "lora_bf16",
            from: "rank < k.rank_end",
            to: "rank <= k.rank_end",
            check: matrices_of_all_parts_are_put_together,
        },
        Mutation {
            name: "no barrier before a tile of dy is multiplied",
            module: "lora_bf16",
            from: "    __syncthreads();\n    if (t + STAGES",
            to: "    if (t + STAGES",
            check: gradients_that_read_dy_once_equal_the_reference,
        },
        Mutation {
            name: "dB of the last row of tiles only",
            module: "lora_bf16",
            from: "down == 0 ? 0.f : mine[e * UP_THREADS]",
            to: "0.f",
            check: gradients_that_read_dy_once_equal_the_reference,
        },
        Mutation {
            name: "g of the last tile across only",
            module: "lora_f32",
            from: "if (right_of == 0) {",
            to: "if (true) {",
            check: gradients_that_read_dy_once_equal_the_reference,
        },
        Mutation {
            name: "the last block of rows is not added to dB",
            module: "lora_bf16",
            from: "(u.n + u.rows - 1) / u.rows",
            to: "imax(u.n / u.rows, 1)",
            check: gradients_that_read_dy_once_equal_the_reference,
        },
        Mutation {
            name: "rows of another block count for dB",
            module: "lora_f16",
            from: "row, bottom, part.flags & VECTOR_C",
            to: "row, bottom + 1, part.flags & VECTOR_C",
            check: gradients_that_read_dy_once_equal_the_reference,
        },
        Mutation {
            name: "g is not scaled",
            module: "lora_f32",
            from: "from_f32<T>(u.scale * sum)",
            to: "from_f32<T>(sum)",
            check: gradients_that_read_dy_once_equal_the_reference,
        },
        Mutation {
            name: "an adapter's scale is forgotten",
            module: "lora_bf16",
            from: "g.alpha = e.scale",
            to: "g.alpha = 1.f",
            check: rows_with_adapters_of_their_own_equal_the_reference,
        },
        Mutation {
            name: "an adapter has a rank of 64 at most",
            module: "lora_bf16",
            from: "g.m = e.rows, g.n = e.rank, g.k = p.k",
            to: "g.m = e.rows, g.n = imin(e.rank, 64), g.k = p.k",
            check: rows_with_adapters_of_their_own_equal_the_reference,
        },
    ];

    #[cfg(feature = "emulator")]
    #[test]
    fn planted_bugs_are_caught() {
        all_are_caught(MUTATIONS);
    }
}
