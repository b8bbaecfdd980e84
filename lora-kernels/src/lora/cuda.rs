//! Launches the fused steps of low-rank adaptation, and says where they are not the fastest way.

#![allow(unsafe_code)]

mod grouped;
mod hopper;
mod up;

use std::{ops::Range, sync::Arc};

use hopper::{MOST_PACKED, launch_hopper};

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

pub(super) use grouped::grouped;
pub(super) use up::backward_up;

#[cfg(test)]
pub(crate) mod tests;
