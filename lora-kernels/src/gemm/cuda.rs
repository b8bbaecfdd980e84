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
mod tests {
    use super::*;
    use crate::{cuda::testing::*, gemm_batched, gemm_with, testing::Padded};

    /// A matrix of a test, stored so that its rows begin at multiples of 16 bytes and end anywhere (`Aligned`), right
    /// after each other (`Packed`), or at odd places (`Odd`).
    #[derive(Clone, Copy)]
    enum Store {
        Aligned,
        Packed,
        Odd,
    }

    impl Store {
        fn of(i: usize) -> Store {
            [Store::Aligned, Store::Odd, Store::Packed][i % 3]
        }

        /// Columns and padding of what is stored for `cols` columns.
        fn width(self, cols: usize) -> (usize, usize) {
            match self {
                Store::Aligned => (cols.next_multiple_of(8), 0),
                Store::Packed => (cols, 0),
                Store::Odd => (cols, 3),
            }
        }
    }

    struct Stored {
        whole: Padded,
        cols: usize,
    }

    impl Stored {
        fn random(s: &Side, seed: u64, rows: usize, cols: usize, store: Store) -> Stored {
            let (width, pad) = store.width(cols);
            Stored { whole: s.random(seed, rows, width, pad, 1.0), cols }
        }

        /// A C, or a residual, of the accumulator's type or of the tested one.
        fn sums(s: &Side, acc: bool, seed: u64, rows: usize, cols: usize, store: Store, beta: f64) -> Stored {
            let (width, pad) = store.width(cols);
            let whole = match acc {
                true => s.target_acc(seed, rows, width, pad, beta),
                false => s.target(seed, rows, width, pad, beta),
            };
            Stored { whole, cols }
        }

        fn mat(&self) -> Mat<'_> {
            self.whole.mat().cols_in(0..self.cols)
        }

        fn mat_mut(&mut self) -> MatMut<'_> {
            self.whole.mat_mut().cols_in(0..self.cols)
        }
    }

    /// One product of a test.
    struct Case {
        m: usize,
        n: usize,
        k: usize,
        ta: bool,
        tb: bool,
        /// C in the accumulator's type.
        acc: bool,
        /// Everything else varies with it.
        i: usize,
    }

    /// Computes the case and reports C with all that stands around it. `forced`: the kernel and the ranges of k.
    fn product(s: &Side, case: &Case, forced: Option<(bool, Kernel, usize)>) {
        let Case { m, n, k, ta, tb, acc, i } = *case;
        let shape = |rows, cols, t: bool| if t { (cols, rows) } else { (rows, cols) };
        let ((am, an), (bm, bn)) = (shape(m, k, ta), shape(k, n, tb));
        let a = Stored::random(s, 1, am, an, Store::of(i));
        let b = Stored::random(s, 2, bm, bn, Store::of(i / 2));
        let beta = [0.0, 1.0, -0.5][i % 3];
        let alpha = [1.0, 0.5][i % 2];
        let mut c = Stored::sums(s, acc, 3, m, n, Store::of(i / 3), beta);
        let bias = if acc { s.random_acc(4, 1, n, 0, 1.0) } else { s.random(4, 1, n, i % 2, 1.0) };
        let residual = Stored::sums(s, acc, 5, m, n, Store::of(i / 3), 1.0);
        let kinds = [
            None,
            Some(Activation::GeluTanh),
            Some(Activation::GeluErf),
            Some(Activation::Relu),
            Some(Activation::Silu),
            Some(Activation::Tanh),
        ];
        let epilogue = Epilogue {
            bias: (i % 4 != 0).then(|| bias.mat()),
            activation: kinds[i % 6],
            residual: (i % 5 > 1).then(|| residual.mat()),
        };
        let (x, y) = (a.mat().t_if(ta), b.mat().t_if(tb));
        match (s.device(), forced) {
            (Device::Cuda(gpu), Some((tf32, kernel, splits))) => {
                let p = Problem::single(alpha, x, y, beta, c.mat_mut(), epilogue);
                let family = family(p.a.dtype(), tf32).unwrap();
                let shape = Sizes::of(&p);
                let k_split = split(k, splits, tile(family, kernel, &shape).depth);
                run(gpu, &p, family, Cut { kernel, k_split }).unwrap();
            }
            _ => gemm_with(alpha, x, y, beta, c.mat_mut(), &epilogue).unwrap(),
        }
        let layout = Sizes { m, n, k, count: 1, ta, tb }.layout();
        s.out(format!("{m}×{n}×{k} {layout} i {i} {forced:?}"), c.whole.get());
    }

    const LAYOUTS: [(bool, bool); 4] = [(false, false), (false, true), (true, false), (true, true)];

    /// All layouts and edges of tiles, with every storage, epilogue and number of ranges somewhere.
    fn tiles(s: &Side, tf32: bool, acc: bool) {
        let sizes = [(1, 1, 1), (31, 129, 33), (129, 33, 40), (7, 127, 8), (64, 64, 64), (33, 8, 127), (127, 31, 130)];
        let mut i = 0;
        for (j, &(ta, tb)) in LAYOUTS.iter().enumerate() {
            for (l, &(m, n, k)) in sizes.iter().enumerate() {
                let mma = tf32 || s.tested() != F32;
                let kernel = if (j + l) % 2 == 0 && !(mma && ta && tb) { Kernel::Large } else { Kernel::Small };
                let splits = [1, 1, 3, 2][i % 4];
                product(s, &Case { m, n, k, ta, tb, acc, i }, Some((tf32, kernel, splits)));
                i += 1;
            }
        }
        // No steps at all: what remains is the epilogue.
        product(s, &Case { m: 9, n: 5, k: 0, ta: false, tb: false, acc, i: 7 }, Some((tf32, Kernel::Small, 1)));
        // More rows of tiles than go together.
        product(s, &Case { m: 650, n: 70, k: 3, ta: true, tb: false, acc, i: 0 }, Some((tf32, Kernel::Small, 1)));
    }

    fn few_rows(s: &Side, acc: bool) {
        for (i, (m, n, k)) in
            [(1, 1, 1), (1, 33, 129), (3, 129, 33), (8, 7, 127), (2, 64, 600), (1, 72, 320), (1, 50, 0)]
                .into_iter()
                .enumerate()
        {
            for tb in [false, true] {
                let splits = if tb || k == 0 { 1 } else { 1 + i % 3 };
                product(s, &Case { m, n, k, ta: false, tb, acc, i }, Some((false, Kernel::Gemv, splits)));
            }
        }
    }

    #[test]
    fn f32_tiles_equal_the_reference() {
        parity("simt", &[(F32, 1e-5)], |s| tiles(s, false, false));
    }

    #[test]
    fn bf16_tiles_equal_the_reference() {
        parity("mma", &[(Bf16, 1e-2)], |s| tiles(s, false, false));
        // Products of bf16 are exact in f32: only the sums round.
        parity("mma into f32", &[(Bf16, 1e-5)], |s| tiles(s, false, true));
    }

    #[test]
    fn f16_tiles_equal_the_reference() {
        parity("mma", &[(F16, 2e-3)], |s| tiles(s, false, false));
        parity("mma into f32", &[(F16, 1e-5)], |s| tiles(s, false, true));
    }

    #[test]
    fn tf32_tiles_equal_the_reference() {
        parity("mma tf32", &[(F32, 1e-2)], |s| tiles(s, true, false));
    }

    #[test]
    fn few_rows_equal_the_reference() {
        parity("gemv", &[(F32, 1e-5), (Bf16, 1e-2), (F16, 2e-3)], |s| few_rows(s, false));
        parity("gemv into f32", &[(Bf16, 1e-5)], |s| few_rows(s, true));
    }

    /// Through the public functions: whatever plan they make.
    #[test]
    fn products_and_batches_equal_the_reference() {
        parity("gemm", &[(F32, 1e-5), (Bf16, 1e-2)], |s| {
            for (i, (m, n, k)) in
                [(0, 3, 2), (3, 0, 2), (5, 3, 0), (1, 70, 31), (40, 8, 300), (8, 40, 300)].into_iter().enumerate()
            {
                for (ta, tb) in LAYOUTS {
                    product(s, &Case { m, n, k, ta, tb, acc: i % 2 == 0, i }, None);
                }
            }
            batches(s);
        });
    }

    fn batches(s: &Side) {
        use Stack::*;
        let count = 3;
        let stacked = |stack, rows, cols| match stack {
            Rows => (count * rows, cols),
            Cols => (rows, count * cols),
            Shared => (rows, cols),
        };
        for (i, (a, b, c)) in
            [(Rows, Rows, Rows), (Cols, Shared, Cols), (Shared, Cols, Rows), (Rows, Cols, Cols)].into_iter().enumerate()
        {
            for (ta, tb) in LAYOUTS {
                for (m, n, k) in [(7, 9, 33), (16, 8, 24)] {
                    let beta = [0.0, 1.0][i % 2];
                    let store = |stack, rows, cols, t: bool| {
                        let (rows, cols) = stacked(stack, rows, cols);
                        if t { (cols, rows) } else { (rows, cols) }
                    };
                    let ((am, an), (bm, bn), (cm, cn)) =
                        (store(a, m, k, ta), store(b, k, n, tb), store(c, m, n, false));
                    let x = Stored::random(s, 1, am, an, Store::of(i));
                    let y = Stored::random(s, 2, bm, bn, Store::of(i));
                    let mut z = Stored::sums(s, i == 2, 3, cm, cn, Store::of(i), beta);
                    let batch = Batch { count, a, b, c };
                    gemm_batched(0.5, x.mat().t_if(ta), y.mat().t_if(tb), beta, z.mat_mut(), &batch).unwrap();
                    s.out(format!("{batch:?} {m}×{n}×{k} {ta} {tb}"), z.whole.get());
                    // The same, over ranges of k.
                    if let Device::Cuda(gpu) = s.device() {
                        let mut again = Stored::sums(s, i == 2, 3, cm, cn, Store::of(i), beta);
                        let p =
                            Problem::batched(0.5, x.mat().t_if(ta), y.mat().t_if(tb), beta, again.mat_mut(), &batch);
                        let family = family(p.a.dtype(), false).unwrap();
                        run(gpu, &p, family, Cut { kernel: Kernel::Small, k_split: 16 }).unwrap();
                        s.out("over ranges", again.whole.get());
                    } else {
                        s.out("over ranges", z.whole.get());
                    }
                }
            }
        }
    }

    const FAMILIES: [Family; 4] = [Family::Simt, Family::Bf16, Family::F16, Family::Tf32];

    fn shapes() -> Vec<Sizes> {
        let sizes = [1, 7, 8, 9, 31, 64, 127, 129, 768, 4096, 50257];
        let mut shapes = Vec::new();
        for (i, &m) in sizes.iter().enumerate() {
            for (j, &n) in sizes.iter().enumerate() {
                for k in [0, 1, 31, 129, 768, 8192, 100_003] {
                    let (ta, tb) = LAYOUTS[(i + j) % 4];
                    shapes.push(Sizes { m, n, k, count: 1 + (i * j) % 3, ta, tb });
                }
            }
        }
        shapes
    }

    #[test]
    fn plans_cover_every_product_once() {
        for s in shapes() {
            for family in FAMILIES {
                for multiprocessors in [4, 108, 132] {
                    let cut = cut(family, &s, multiprocessors);
                    let tile = tile(family, cut.kernel, &s);
                    let what = format!("{s:?} {family:?} {cut:?}");
                    // As many tiles as reach the last row and column, none beyond them.
                    let (rows, cols) = (s.m.div_ceil(tile.rows), s.n.div_ceil(tile.cols));
                    assert_eq!(blocks(&tile, &s), rows * cols * s.count, "{what}");
                    assert!((rows - 1) * tile.rows < s.m && s.m <= rows * tile.rows, "{what}");
                    assert!((cols - 1) * tile.cols < s.n && s.n <= cols * tile.cols, "{what}");
                    // Ranges of k follow each other, none is empty, and vectors of 16 bytes do not straddle them.
                    let splits = s.k.div_ceil(cut.k_split).max(1);
                    assert!(cut.k_split.is_multiple_of(tile.depth) && cut.k_split > 0, "{what}");
                    assert!((splits - 1) * cut.k_split < s.k.max(1) && s.k <= splits * cut.k_split, "{what}");
                    assert!(splits == 1 || tile.depth.is_multiple_of(16 / family.size()), "{what}");
                    // What a launch may be.
                    assert!(splits < 1 << 16 && blocks(&tile, &s) < 1 << 31, "{what}");
                    assert!((tile.shared + 1024) * tile.resident <= 164 << 10, "{what}");
                    assert!(
                        splits == 1 || cut.kernel == Kernel::Gemv || partials(&s, splits) <= MOST_PARTIALS,
                        "{what}"
                    );
                    // What the kernels do not do.
                    if cut.kernel == Kernel::Gemv {
                        assert!(s.m <= 8 && !s.ta && s.count == 1 && (!s.tb || splits == 1), "{what}");
                    }
                    assert!(!(cut.kernel == Kernel::Large && s.ta && s.tb && family != Family::Simt), "{what}");
                }
            }
        }
    }

    #[test]
    fn partial_sums_have_whole_vectors_for_every_row() {
        let s = Sizes { m: 3, n: 33, k: 500, count: 2, ta: false, tb: false };
        assert_eq!(partials(&s, 5), 2 * 5 * 3 * 40);
        assert_eq!(partials(&Sizes { n: 40, ..s }, 1), 2 * 3 * 40);
    }

    #[test]
    fn the_shapes_of_lora_fill_a_device() {
        let of = |m, n, k, ta, tb| {
            let s = Sizes { m, n, k, count: 1, ta, tb };
            let cut = cut(Family::Bf16, &s, 132);
            (cut.kernel, blocks(&tile(Family::Bf16, cut.kernel, &s), &s) * k.div_ceil(cut.k_split))
        };
        assert_eq!(of(4096, 4096, 4096, false, true), (Kernel::Large, 1024));
        for (what, (_, blocks)) in [
            ("h = x·Aᵀ", of(8192, 16, 768, false, true)),
            ("dA = gᵀ·x", of(16, 768, 8192, true, false)),
            ("dB = dyᵀ·h", of(768, 16, 8192, true, false)),
            ("dx of a few rows", of(256, 768, 2304, false, false)),
            ("decoding, W as [k, n]", of(1, 2304, 768, false, false)),
            ("decoding, the head", of(1, 50257, 768, false, true)),
        ] {
            assert!(blocks >= 100, "{what}: {blocks} blocks");
        }
        // Nothing to gain by ranges: each block has enough to do, and there are enough of them.
        assert_eq!(of(8192, 768, 16, false, true).1, of(8192, 768, 15, false, true).1);
    }

    #[test]
    fn arguments_are_laid_out_as_in_c() {
        assert_eq!((size_of::<Arguments>(), align_of::<Arguments>()), (136, 8));
        assert_eq!(std::mem::offset_of!(Arguments, lda), 64);
        assert_eq!(std::mem::offset_of!(Arguments, flags), 128);
    }

    pub(crate) const MUTATIONS: &[Mutation] = &[
        Mutation {
            name: "no barrier before a panel is multiplied",
            module: "gemm_mma_bf16",
            from: "cp_async_wait<STAGES - 2>();\n    __syncthreads();",
            to: "cp_async_wait<STAGES - 2>();",
            check: bf16_tiles_equal_the_reference,
        },
        Mutation {
            name: "the wait for a panel lets one group too many be under way",
            module: "gemm_mma_bf16",
            from: "cp_async_wait<STAGES - 2>",
            to: "cp_async_wait<STAGES - 1>",
            check: bf16_tiles_equal_the_reference,
        },
        Mutation {
            name: "copies go into the buffer that is being multiplied",
            module: "gemm_mma_bf16",
            from: "free = now;",
            to: "free = now + 1 == STAGES ? 0 : now + 1;",
            check: bf16_tiles_equal_the_reference,
        },
        Mutation {
            name: "one row too many is loaded",
            module: "gemm_mma_bf16",
            from: "rows(rows - row)",
            to: "rows(rows - row + 1)",
            check: bf16_tiles_equal_the_reference,
        },
        Mutation {
            name: "one step too many, contiguous along k",
            module: "gemm_mma_bf16",
            from: "k_end - k - first",
            to: "k_end - k - first + 1",
            check: bf16_tiles_equal_the_reference,
        },
        Mutation {
            name: "one step too many, contiguous across",
            module: "gemm_mma_bf16",
            from: "rows : k_end - k;",
            to: "rows : k_end - k + 1;",
            check: bf16_tiles_equal_the_reference,
        },
        Mutation {
            name: "one step of the next range of k",
            module: "gemm_mma_bf16",
            from: "imin(g.k, begin + g.k_split)",
            to: "imin(g.k, begin + g.k_split + 1)",
            check: bf16_tiles_equal_the_reference,
        },
        Mutation {
            name: "the wrong matrices of a fragment of A",
            module: "gemm_mma_bf16",
            from: "pa + A::at(r + l8 + 8 * low, k / 8 + high)",
            to: "pa + A::at(r + l8 + 8 * high, k / 8 + low)",
            check: bf16_tiles_equal_the_reference,
        },
        Mutation {
            name: "the wrong matrices of a transposed fragment of B",
            module: "gemm_mma_bf16",
            from: "pb + B::at(k + l8 + 8 * low, c / 8 + high)",
            to: "pb + B::at(k + l8 + 8 * high, c / 8 + low)",
            check: bf16_tiles_equal_the_reference,
        },
        Mutation {
            name: "sums put down while panels are still read",
            module: "gemm_mma_bf16",
            from: "turn++) {\n    __syncthreads();",
            to: "turn++) {",
            check: bf16_tiles_equal_the_reference,
        },
        Mutation {
            name: "sums read before they are all put down",
            module: "gemm_mma_bf16",
            from: "    __syncthreads();\n    finish_tile",
            to: "    finish_tile",
            check: bf16_tiles_equal_the_reference,
        },
        Mutation {
            name: "one row too many is written",
            module: "gemm_mma_f16",
            from: "row + r >= g.m",
            to: "row + r > g.m",
            check: f16_tiles_equal_the_reference,
        },
        Mutation {
            name: "one column too many is written",
            module: "gemm_mma_f16",
            from: "int valid = g.n - col;",
            to: "int valid = g.n - col + 1;",
            check: f16_tiles_equal_the_reference,
        },
        Mutation {
            name: "no bias",
            module: "gemm_mma_bf16",
            from: "if (g.bias)",
            to: "if (false)",
            check: bf16_tiles_equal_the_reference,
        },
        Mutation {
            name: "β is forgotten",
            module: "gemm_mma_bf16",
            from: "if (g.beta != 0.f)",
            to: "if (false)",
            check: bf16_tiles_equal_the_reference,
        },
        Mutation {
            name: "C is read though β is 0",
            module: "gemm_mma_bf16",
            from: "if (g.beta != 0.f)",
            to: "if (true)",
            check: bf16_tiles_equal_the_reference,
        },
        Mutation {
            name: "no residual",
            module: "gemm_mma_bf16",
            from: "if (g.residual)",
            to: "if (false)",
            check: bf16_tiles_equal_the_reference,
        },
        Mutation {
            name: "no activation",
            module: "gemm_mma_bf16",
            from: "if (kind)",
            to: "if (false)",
            check: bf16_tiles_equal_the_reference,
        },
        Mutation {
            name: "the last range of k is not added",
            module: "gemm_simt",
            from: "s < splits",
            to: "s + 1 < splits",
            check: f32_tiles_equal_the_reference,
        },
        Mutation {
            name: "a band of tiles is one too high",
            module: "gemm_simt",
            from: "imin(rows - band * 8, 8)",
            to: "8",
            check: f32_tiles_equal_the_reference,
        },
        Mutation {
            name: "no barrier between panels",
            module: "gemm_simt",
            from: "    __syncthreads();\n  }\n\n  // The two rows",
            to: "  }\n\n  // The two rows",
            check: f32_tiles_equal_the_reference,
        },
        Mutation {
            name: "no barrier before the first panel",
            module: "gemm_simt",
            from: "  __syncthreads();\n  int now = 0;",
            to: "  int now = 0;",
            check: f32_tiles_equal_the_reference,
        },
        Mutation {
            name: "a panel is laid into the buffer that is being read",
            module: "gemm_simt",
            from: "    now ^= 1;\n    if (more) {",
            to: "    if (more) {",
            check: f32_tiles_equal_the_reference,
        },
        Mutation {
            name: "one step too many of the f32 panel",
            module: "gemm_simt",
            from: "k_end - p : 0",
            to: "k_end - p + 1 : 0",
            check: f32_tiles_equal_the_reference,
        },
        Mutation {
            name: "tf32 fragments in another order",
            module: "gemm_mma_tf32",
            from: "x % 2 * 8, k + t + x / 2 * 4",
            to: "x / 2 * 8, k + t + x % 2 * 4",
            check: tf32_tiles_equal_the_reference,
        },
        Mutation {
            name: "the second B of a batch is the first",
            module: "gemm_mma_bf16",
            from: "tile.batch * g.step_b",
            to: "0 * g.step_b",
            check: products_and_batches_equal_the_reference,
        },
        Mutation {
            name: "no barrier before the warps' sums are added up",
            module: "gemv",
            from: "  __syncthreads();\n  for (int i = threadIdx.x; i < g.m * WIDTH",
            to: "  for (int i = threadIdx.x; i < g.m * WIDTH",
            check: few_rows_equal_the_reference,
        },
        Mutation {
            name: "half of the lanes' sums are lost",
            module: "gemv",
            from: "v += shfl_xor(v, 16);",
            to: "",
            check: few_rows_equal_the_reference,
        },
        Mutation {
            name: "a column too many is read",
            module: "gemv",
            from: "col + c < g.n ? g.k - k : 0",
            to: "g.k - k",
            check: few_rows_equal_the_reference,
        },
    ];

    #[cfg(feature = "emulator")]
    #[test]
    fn planted_bugs_are_caught() {
        all_are_caught(MUTATIONS);
    }
}
