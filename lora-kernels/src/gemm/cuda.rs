//! Launches our own GEMM kernels: which one, with which tiles, over how many ranges of k.

#![allow(unsafe_code)]

use std::sync::Arc;

use super::{
    Batch, Epilogue, Stack,
    plan::{self, Engine},
};
use crate::{
    Activation, Buffer, DType, Device, Error, Mat, MatMut, Result,
    cuda::{Arch, Gpu, Module, suffix},
};

macro_rules! module {
    ($name:literal, $source:literal, $kernels:literal) => {
        Module::new(
            $name,
            concat!(
                include_str!("../activation/functions.cuh"),
                include_str!("epilogue.cuh"),
                include_str!($source),
                $kernels
            ),
            Arch::Any,
        )
    };
}

/// f32 on CUDA cores.
pub(crate) static SIMT: Module = module!("gemm_simt", "simt.cu", "SIMT_KERNELS\n");
/// bf16 on tensor cores.
pub(crate) static MMA_BF16: Module = module!("gemm_mma_bf16", "mma.cu", "TENSOR(bf16, bf16, 32)\n");
/// f16 on tensor cores.
pub(crate) static MMA_F16: Module = module!("gemm_mma_f16", "mma.cu", "TENSOR(f16, f16, 32)\n");
/// f32 rounded to tf32 on tensor cores.
pub(crate) static MMA_TF32: Module = module!("gemm_mma_tf32", "mma.cu", "TENSOR(float, tf32, 16)\n");
/// A few rows of A.
pub(crate) static GEMV: Module = module!("gemv", "gemv.cu", "");

/// A product, or a batch of them: `C = act(α·A·B + β·C + bias) + residual`.
pub(crate) struct Problem<'a> {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) alpha: f64,
    /// The first A of a batch.
    pub(crate) a: Mat<'a>,
    /// The first B.
    pub(crate) b: Mat<'a>,
    pub(crate) beta: f64,
    /// All of C.
    pub(crate) c: MatMut<'a>,
    pub(crate) epilogue: Epilogue<'a>,
    /// Products, 1 or more.
    pub(crate) count: usize,
    /// Elements from one matrix of a batch to the next, for A, B and C.
    pub(crate) step: [usize; 3],
}

impl<'a> Problem<'a> {
    pub(crate) fn single(
        alpha: f64,
        a: Mat<'a>,
        b: Mat<'a>,
        beta: f64,
        c: MatMut<'a>,
        epilogue: Epilogue<'a>,
    ) -> Problem<'a> {
        let (m, n, k) = (c.rows(), c.cols(), a.cols());
        Problem { m, n, k, alpha, a, b, beta, c, epilogue, count: 1, step: [0; 3] }
    }

    /// The shapes were checked.
    pub(super) fn batched(alpha: f64, a: Mat<'a>, b: Mat<'a>, beta: f64, c: MatMut<'a>, batch: &Batch) -> Problem<'a> {
        let count = batch.count;
        let (first_a, first_b) = (batch.a.pick(a, 0, count), batch.b.pick(b, 0, count));
        let (m, n, k) = (first_a.rows(), first_b.cols(), first_a.cols());
        let step = [step(batch.a, a, count), step(batch.b, b, count), step(batch.c, c.as_mat(), count)];
        let epilogue = Epilogue::default();
        Problem { m, n, k, alpha, a: first_a, b: first_b, beta, c, epilogue, count, step }
    }
}

/// Elements from one matrix of a batch to the next.
fn step(stack: Stack, x: Mat, count: usize) -> usize {
    match (stack, x.is_transposed()) {
        (Stack::Shared, _) => 0,
        (Stack::Rows, false) => x.rows() / count * x.ld(),
        (Stack::Cols, true) => x.cols() / count * x.ld(),
        (Stack::Rows, true) => x.rows() / count,
        (Stack::Cols, false) => x.cols() / count,
    }
}

/// Computes a product on a device, with the engine that [`plan::gemm`] settles on.
///
/// # Errors
/// [`Error::DType`] for operands of another type than f32, bf16 and f16; what a launch or a bad environment variable gives.
pub(super) fn gemm(gpu: &Arc<Gpu>, p: &Problem) -> Result<()> {
    if p.m == 0 || p.n == 0 {
        return Ok(());
    }
    let tf32 = plan::tf32()?;
    let family = family(p.a.dtype(), tf32)?;
    let cut = cut(family, &Sizes::of(p), gpu.info().multiprocessors);
    match p.k {
        0 => run(gpu, p, family, cut),
        _ => plan::gemm(gpu, p, tf32, &mut |p| run(gpu, p, family, cut)),
    }
}

/// The product, with k not 0, by our kernels for any device.
///
/// # Errors
/// As [`gemm`].
pub(super) fn base(gpu: &Arc<Gpu>, p: &Problem, tf32: bool) -> Result<()> {
    let family = family(p.a.dtype(), tf32)?;
    run(gpu, p, family, cut(family, &Sizes::of(p), gpu.info().multiprocessors))
}

/// What computes a product best that low-rank terms are added to on the way, where the engine allows it. As
/// [`plan::engine`], C may be written.
///
/// # Errors
/// As [`gemm`].
pub(crate) fn engine(gpu: &Arc<Gpu>, p: &Problem) -> Result<Engine> {
    if p.m == 0 || p.n == 0 || p.k == 0 {
        return Ok(Engine::Base);
    }
    let tf32 = plan::tf32()?;
    Ok(plan::engine(gpu, p, tf32, &mut |p| base(gpu, p, tf32))?.with_terms)
}

/// A set of kernels for one type of operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Simt,
    Bf16,
    F16,
    Tf32,
}

/// The kernels for operands of a type; `tf32` allows f32 to be rounded.
fn family(dtype: DType, tf32: bool) -> Result<Family> {
    match dtype {
        DType::F32 if tf32 => Ok(Family::Tf32),
        DType::F32 => Ok(Family::Simt),
        DType::Bf16 => Ok(Family::Bf16),
        DType::F16 => Ok(Family::F16),
        dtype => Err(Error::DType { kernel: "gemm", dtype }),
    }
}

impl Family {
    fn module(self) -> &'static Module {
        match self {
            Family::Simt => &SIMT,
            Family::Bf16 => &MMA_BF16,
            Family::F16 => &MMA_F16,
            Family::Tf32 => &MMA_TF32,
        }
    }

    /// Bytes of an element of A and B.
    fn size(self) -> usize {
        if matches!(self, Family::Bf16 | Family::F16) { 2 } else { 4 }
    }

    fn kernel(self, tile: &str, layout: &str) -> String {
        match self {
            Family::Simt => format!("simt_{tile}_{layout}"),
            Family::Bf16 => format!("mma_{tile}_{layout}_bf16"),
            Family::F16 => format!("mma_{tile}_{layout}_f16"),
            Family::Tf32 => format!("mma_{tile}_{layout}_tf32"),
        }
    }

    fn reduce(self) -> &'static str {
        match self {
            Family::Simt => "simt_reduce",
            Family::Bf16 => "mma_reduce_bf16",
            Family::F16 => "mma_reduce_f16",
            Family::Tf32 => "mma_reduce_tf32",
        }
    }

    /// Products that a multiprocessor adds up per clock, roughly; for choosing between tiles only.
    fn rate(self) -> f64 {
        match self {
            Family::Simt => 100.0,
            Family::Tf32 => 300.0,
            Family::Bf16 | Family::F16 => 600.0,
        }
    }
}

/// What decides about the launch.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    m: usize,
    n: usize,
    k: usize,
    count: usize,
    ta: bool,
    tb: bool,
}

impl Sizes {
    fn of(p: &Problem) -> Sizes {
        let Problem { m, n, k, count, .. } = *p;
        Sizes { m, n, k, count, ta: p.a.is_transposed(), tb: p.b.is_transposed() }
    }

    fn layout(&self) -> &'static str {
        match (self.ta, self.tb) {
            (false, false) => "nn",
            (false, true) => "nt",
            (true, false) => "tn",
            (true, true) => "tt",
        }
    }
}

/// The kernels of a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kernel {
    /// Tiles of 128×128.
    Large,
    /// Tiles of 64×64.
    Small,
    /// Up to 8 rows of A, which is not transposed.
    Gemv,
}

/// A kernel and how the work is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cut {
    kernel: Kernel,
    /// Steps of k per block; several ranges are summed by a second kernel.
    k_split: usize,
}

/// Tiles of one kernel: rows and columns of C, steps of k per panel, threads, and dynamic shared memory.
#[derive(Clone, Copy, Debug)]
struct Tile {
    rows: usize,
    cols: usize,
    depth: usize,
    threads: usize,
    shared: usize,
    /// Blocks that fit on a multiprocessor of compute capability 8.0 at a time.
    resident: usize,
}

/// Stages of the pipeline of the tensor cores' kernels.
const STAGES: usize = 4;

fn tile(family: Family, kernel: Kernel, s: &Sizes) -> Tile {
    let (rows, cols) = match kernel {
        Kernel::Large => (128, 128),
        Kernel::Small => (64, 64),
        // B as [n, k]: two columns for each of 4 warps. As [k, n]: 8 vectors of 16 bytes for each of 8 warps.
        Kernel::Gemv if s.tb => return Tile { rows: 8, cols: 8, depth: 1, threads: 128, shared: 0, resident: 6 },
        Kernel::Gemv => {
            return Tile { rows: 8, cols: 128 / family.size(), depth: 32, threads: 256, shared: 0, resident: 2 };
        }
    };
    let large = kernel == Kernel::Large;
    if family == Family::Simt {
        let depth = if large { 8 } else { 16 };
        return Tile { rows, cols, depth, threads: 256, shared: 0, resident: 2 };
    }
    // Panels of 64 bytes along k, or twice as many for the small tiles.
    let depth = if large { 64 } else { 128 } / family.size();
    let panel = |width: usize, k_major: bool| match (family, k_major) {
        // Padded lines against bank conflicts.
        (Family::Tf32, true) => width * (depth + 4),
        (Family::Tf32, false) => depth * (width + 8),
        _ => depth * width,
    };
    let stage = panel(rows, !s.ta) + panel(cols, s.tb);
    let threads = if large { 256 } else { 128 };
    Tile { rows, cols, depth, threads, shared: STAGES * stage * family.size(), resident: 2 }
}

/// Blocks for one range of k.
fn blocks(tile: &Tile, s: &Sizes) -> usize {
    s.m.div_ceil(tile.rows) * s.n.div_ceil(tile.cols) * s.count
}

/// Elements of the partial sums of `splits` ranges: rows of whole vectors.
fn partials(s: &Sizes, splits: usize) -> usize {
    s.count * splits * s.m * s.n.next_multiple_of(8)
}

/// The most partial sums that a product may take memory for: 256 MiB.
const MOST_PARTIALS: usize = 64 << 20;

/// The kernel and the ranges of k that promise the shortest time on so many multiprocessors.
fn cut(family: Family, s: &Sizes, multiprocessors: usize) -> Cut {
    if s.m <= 8 && !s.ta && s.count == 1 {
        let tile = tile(family, Kernel::Gemv, s);
        // B as [n, k] is walked along k by one warp. As [k, n] ranges of k fill the device.
        let most = if s.tb { 1 } else { s.k / 64 };
        let splits = (tile.resident * multiprocessors).div_ceil(blocks(&tile, s)).min(most).max(1);
        return Cut { kernel: Kernel::Gemv, k_split: split(s.k, splits, tile.depth) };
    }
    let mut best: Option<(f64, Cut)> = None;
    for kernel in [Kernel::Large, Kernel::Small] {
        // Two transposes are rare, and have small tiles only on tensor cores.
        if kernel == Kernel::Large && s.ta && s.tb && family != Family::Simt {
            continue;
        }
        let tile = tile(family, kernel, s);
        for splits in 1..=(s.k / 128).clamp(1, 64) {
            if splits > 1 && partials(s, splits) > MOST_PARTIALS {
                break;
            }
            let k_split = split(s.k, splits, tile.depth);
            let time = estimate(family, &tile, s, k_split, multiprocessors);
            if best.is_none_or(|(shortest, _)| time < shortest) {
                best = Some((time, Cut { kernel, k_split }));
            }
        }
    }
    best.expect("small tiles take every shape").1
}

/// Steps of k per range, whole panels each, so that there are `splits` ranges or a few less.
fn split(k: usize, splits: usize, depth: usize) -> usize {
    k.div_ceil(splits).next_multiple_of(depth).max(depth)
}

/// Clocks that a product takes, roughly: a model of the kernels, which plans compare.
fn estimate(family: Family, tile: &Tile, s: &Sizes, k_split: usize, multiprocessors: usize) -> f64 {
    let splits = s.k.div_ceil(k_split).max(1);
    let blocks = blocks(tile, s) * splits;
    let (slots, fit) = (multiprocessors * tile.resident, tile.resident);
    // Blocks that one multiprocessor has to compute.
    let rounds = if blocks <= slots { blocks.div_ceil(multiprocessors) } else { blocks.div_ceil(slots) * fit } as f64;
    let depth = k_split.min(s.k) as f64;
    // Small tiles read twice as much shared memory per product.
    let rate = if tile.rows == 128 { family.rate() } else { family.rate() * 0.6 };
    let products = (tile.rows * tile.cols) as f64 * depth / rate;
    // Bytes of the operands, at 32 per clock from L2.
    let bytes = (tile.rows.min(s.m) + tile.cols.min(s.n)) as f64 * depth * family.size() as f64 / 32.0;
    // To fill the pipeline and to write the tile.
    let block = products.max(bytes) + 1500.0;
    // Partial sums are written and read, at 15 bytes per clock from memory, by one more kernel.
    let partial =
        if splits > 1 { (partials(s, splits) * 8) as f64 / (15 * multiprocessors) as f64 + 3000.0 } else { 0.0 };
    rounds * block + partial
}

/// What a kernel is told: `Gemm` in epilogue.cuh.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Arguments {
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
    step_a: i64,
    step_b: i64,
    step_c: i64,
    alpha: f32,
    beta: f32,
    flags: u32,
}

const C_F32: u32 = 8;
const BIAS_F32: u32 = 16;
const VECTOR_A: u32 = 32;
const VECTOR_B: u32 = 64;
const VECTOR_C: u32 = 128;

/// The number of an activation in epilogue.cuh.
fn number(activation: Option<Activation>) -> u32 {
    match activation {
        None => 0,
        Some(Activation::GeluTanh) => 1,
        Some(Activation::GeluErf) => 2,
        Some(Activation::Relu) => 3,
        Some(Activation::Silu) => 4,
        Some(Activation::Tanh) => 5,
    }
}

/// Whether every row of every matrix of a batch starts at a multiple of 16 bytes.
fn vectors(x: Mat, step: usize) -> bool {
    [x.address() as usize, x.ld() * x.dtype().size(), step * x.dtype().size()].iter().all(|n| n.is_multiple_of(16))
}

/// The arguments of a product, but for the ranges of k.
///
/// # Panics
/// When a matrix lies on another device, a size does not fit an int, or a bias or residual is transposed.
pub(super) fn arguments(gpu: &Gpu, p: &Problem) -> Arguments {
    let Epilogue { bias, residual, activation } = p.epilogue;
    let c = p.c.as_mat();
    for x in [Some(p.a), Some(p.b), Some(c), bias, residual].into_iter().flatten() {
        assert!(x.gpu().is_some_and(|g| **g == *gpu), "gemm: a matrix on {} among those on {gpu}", x.device());
    }
    for x in [bias, residual].into_iter().flatten() {
        assert!(!x.is_transposed(), "gemm: a transposed bias or residual");
    }
    let int = |x: usize| i32::try_from(x).expect("gemm: sizes fit an int");
    let flag = |bit: u32, set: bool| if set { bit } else { 0 };
    let flags = number(activation)
        | flag(C_F32, c.dtype() == DType::F32)
        | flag(BIAS_F32, bias.is_some_and(|b| b.dtype() == DType::F32))
        | flag(VECTOR_A, vectors(p.a, p.step[0]))
        | flag(VECTOR_B, vectors(p.b, p.step[1]))
        | flag(
            VECTOR_C,
            vectors(c, p.step[2])
                && residual.is_none_or(|r| vectors(r, 0))
                && bias.is_none_or(|b| b.address().is_multiple_of(16)),
        );
    Arguments {
        a: p.a.address(),
        b: p.b.address(),
        c: c.address(),
        bias: bias.map_or(0, |x| x.address()),
        residual: residual.map_or(0, |x| x.address()),
        partial: 0,
        m: int(p.m),
        n: int(p.n),
        k: int(p.k),
        k_split: int(p.k),
        lda: p.a.ld() as i64,
        ldb: p.b.ld() as i64,
        ldc: c.ld() as i64,
        ldr: residual.map_or(0, |x| x.ld() as i64),
        step_a: p.step[0] as i64,
        step_b: p.step[1] as i64,
        step_c: p.step[2] as i64,
        alpha: p.alpha as f32,
        beta: p.beta as f32,
        flags,
    }
}

/// Puts a product into the stream, cut in one way.
fn run(gpu: &Arc<Gpu>, p: &Problem, family: Family, cut: Cut) -> Result<()> {
    let s = Sizes::of(p);
    let tile = tile(family, cut.kernel, &s);
    let splits = s.k.div_ceil(cut.k_split).max(1);
    let mut arguments = Arguments { k_split: cut.k_split as i32, ..arguments(gpu, p) };
    let mut scratch = None;
    if splits > 1 {
        let partial = Buffer::empty(&Device::Cuda(gpu.clone()), DType::F32, partials(&s, splits))?;
        arguments.partial = Mat::new(&partial, 0, 1, partial.len()).address();
        scratch = Some(partial);
    }
    let mut launch = match cut.kernel {
        Kernel::Gemv => {
            let rows = if s.m == 1 { 1 } else { 8 };
            gpu.launch(&GEMV, &format!("gemv_{}_{rows}_{}", s.layout(), suffix("gemm", p.a.dtype())?))?
        }
        Kernel::Large => gpu.launch(family.module(), &family.kernel("large", s.layout()))?,
        Kernel::Small => gpu.launch(family.module(), &family.kernel("small", s.layout()))?,
    };
    // SAFETY: the arguments are the kernel's, and all matrices lie in live memory: `Mat` and `MatMut` checked it, of a
    // batch with all its steps. Kernels read A at rows below m and steps below k, B at steps below k and columns below n;
    // they write C, or the partial sums, which hold whole vectors of each row, at rows below m and columns below n.
    unsafe { launch.raw(arguments).run([blocks(&tile, &s), splits, 1], tile.threads, tile.shared)? };
    if scratch.is_some() {
        let mut reduce = match cut.kernel {
            Kernel::Gemv => gpu.launch(&GEMV, &format!("gemv_reduce_{}", suffix("gemm", p.a.dtype())?))?,
            _ => gpu.launch(family.module(), family.reduce())?,
        };
        let threads = s.count * s.m * s.n.div_ceil(16 / family.size());
        // SAFETY: as above; the partial sums were all written by the kernel before.
        unsafe { reduce.raw(arguments).i64(s.count).run([threads.div_ceil(256), 1, 1], 256, 0)? };
    }
    Ok(())
}

#[cfg(test)]
mod tests;
