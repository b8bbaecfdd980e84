//! Launches the product on Hopper's tensor cores.

#![allow(unsafe_code)]

use std::mem::MaybeUninit;

use cudarc::driver::sys;

use super::{
    cuda::{Problem, arguments},
    plan::Shape,
};
use crate::{
    DType, Error, Mat, Result,
    cuda::{Arch, Gpu, Module, guard},
};

macro_rules! module {
    ($name:literal, $a_mn:literal, $b_mn:literal) => {
        Module::new(
            $name,
            concat!(
                "#define A_MN ",
                $a_mn,
                "\n#define B_MN ",
                $b_mn,
                "\n",
                include_str!("../activation/functions.cuh"),
                include_str!("epilogue.cuh"),
                include_str!("wgmma.cu")
            ),
            Arch::Sm90a,
        )
    };
}

/// A·Bᵀ, with both operands contiguous along k.
pub(crate) static NT: Module = module!("wgmma_nt", "0", "0");
/// A·B.
pub(crate) static NN: Module = module!("wgmma_nn", "0", "1");
/// Aᵀ·B.
pub(crate) static TN: Module = module!("wgmma_tn", "1", "1");

/// Rows of a tile of C, and steps of k in a stage (`BM` and `BK` of the kernel).
const ROWS: usize = 128;
const DEPTH: usize = 64;
/// Threads of a block.
const THREADS: usize = 384;

/// One of the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Variant {
    /// Columns of a tile of C.
    pub(crate) columns: usize,
    /// Blocks of a cluster, which share the panels of B.
    pub(crate) cluster: usize,
}

/// The kernels, each with the time that a tile takes against one of the last, column for column: narrow tiles read more
/// shared memory per product, and blocks on their own read B twice from L2. Estimates, to be measured.
const VARIANTS: [(Variant, f64); 5] = [
    (Variant { columns: 128, cluster: 1 }, 1.30),
    (Variant { columns: 128, cluster: 2 }, 1.15),
    (Variant { columns: 192, cluster: 2 }, 1.04),
    (Variant { columns: 256, cluster: 1 }, 1.10),
    (Variant { columns: 256, cluster: 2 }, 1.00),
];

impl Variant {
    /// Stages of the ring: what fits beside 16 KiB for C.
    fn stages(self) -> usize {
        match self.columns {
            256 => 4,
            192 => 5,
            _ => 6,
        }
    }

    /// Bytes of dynamic shared memory: up to 1024 to align, the ring, 2 KiB per consumer warp, two barriers per stage.
    fn shared(self) -> usize {
        1024 + self.stages() * (ROWS + self.columns) * DEPTH * 2 + 8 * 2048 + 16 * self.stages()
    }

    /// Units of work, one tile per block of a cluster each: down and across.
    fn units(self, m: usize, n: usize) -> (usize, usize) {
        (m.div_ceil(ROWS * self.cluster), n.div_ceil(self.columns))
    }

    /// Blocks to start: one per multiprocessor, in whole clusters, no more than there is work for.
    fn grid(self, m: usize, n: usize, multiprocessors: usize) -> usize {
        let (rows, cols) = self.units(m, n);
        (rows * cols).min((multiprocessors / self.cluster).max(1)) * self.cluster
    }

    /// The time that all tiles take, up to a factor: the slowest block counts.
    fn estimate(self, cost: f64, m: usize, n: usize, multiprocessors: usize) -> f64 {
        let (rows, cols) = self.units(m, n);
        (rows * cols).div_ceil((multiprocessors / self.cluster).max(1)) as f64 * self.columns as f64 * cost
    }
}

/// The kernels that can compute a product on a device, the most promising first; none where it is not Hopper, the types
/// or the storage are not theirs, or the product is so small that another kernel is the better choice anyway.
///
/// TMA reads matrices at multiples of 16 bytes whose rows are multiples of 16 bytes apart.
pub(crate) fn variants(compute_capability: (u32, u32), multiprocessors: usize, s: &Shape) -> Vec<Variant> {
    let types = s.dtype == DType::Bf16 && matches!(s.out, DType::Bf16 | DType::F32);
    let aligned = s.alignment[0] == 16 && s.alignment[1] == 16 && [s.ld[0], s.ld[1]].iter().all(|ld| ld % 8 == 0);
    // Coordinates are ints, also those of the rows that a tile has too many.
    let sizes = [s.m, s.n, s.k].iter().all(|&x| (64..=(1 << 31) - 1024).contains(&x));
    let pitches = [s.ld[0], s.ld[1]].iter().all(|&ld| ld < 1 << 39);
    let count = s.m.div_ceil(ROWS) * s.n.div_ceil(128) < 1 << 31;
    let ours = compute_capability == (9, 0) && s.count == 1 && module_of(s).is_some();
    if !(ours && types && aligned && sizes && pitches && count) {
        return Vec::new();
    }
    let mut variants = VARIANTS.to_vec();
    variants.sort_by(|(a, x), (b, y)| {
        a.estimate(*x, s.m, s.n, multiprocessors).total_cmp(&b.estimate(*y, s.m, s.n, multiprocessors))
    });
    variants.into_iter().map(|(variant, _)| variant).collect()
}

fn module_of(s: &Shape) -> Option<&'static Module> {
    match (s.ta, s.tb) {
        (false, true) => Some(&NT),
        (false, false) => Some(&NN),
        (true, false) => Some(&TN),
        (true, true) => None,
    }
}

/// A matrix as TMA reads it: its sizes, contiguous direction first, the bytes from one row to the next, and the box that
/// one instruction copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Map {
    size: [u64; 2],
    pitch: u64,
    window: [u32; 2],
}

/// The maps of A and B.
///
/// Along k a box holds 64 elements, the span of the swizzle, by all rows of the panel (of B: those that one block of the
/// cluster fetches). Along m or n it holds 64 of them by 64 steps of k, and a panel takes several.
fn maps(s: &Shape, v: Variant) -> [Map; 2] {
    let map = |rows: usize, k_major: bool, ld: usize, panel: usize| {
        let (size, window) = if k_major { ([s.k, rows], panel) } else { ([rows, s.k], DEPTH) };
        Map { size: size.map(|x| x as u64), pitch: ld as u64 * 2, window: [64, window as u32] }
    };
    [map(s.m, !s.ta, s.ld[0], ROWS), map(s.n, s.tb, s.ld[1], v.columns / v.cluster)]
}

/// A `CUtensorMap`, passed to the kernel by value.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct TensorMap([u64; 16]);

/// Describes the bf16 matrix at `address` for TMA: boxes of a map, 128-byte swizzle, zeros outside of the matrix.
fn encode(address: u64, map: &Map) -> Result<TensorMap> {
    guard(|| {
        let mut encoded = MaybeUninit::<sys::CUtensorMap>::uninit();
        // SAFETY: sizes, boxes and steps have as many elements as the rank says, pitches one less; the driver checks
        // their values, reads nothing at the address, and has written the map when it reports success.
        let encoded = unsafe {
            sys::cuTensorMapEncodeTiled(
                encoded.as_mut_ptr(),
                sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                address as *mut _,
                map.size.as_ptr(),
                [map.pitch].as_ptr(),
                map.window.as_ptr(),
                [1u32, 1].as_ptr(),
                sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
            .result()
            .map_err(|e| Error::Cuda { what: format!("{e}, describing {map:?} to TMA") })?;
            encoded.assume_init()
        };
        Ok(TensorMap(encoded.opaque))
    })
}

/// Whether TMA can read a matrix: at a multiple of 16 bytes, rows multiples of 16 bytes apart, in bf16.
pub(crate) fn is_readable(x: Mat) -> bool {
    x.dtype() == DType::Bf16 && x.address().is_multiple_of(16) && x.ld().is_multiple_of(8) && x.ld() < 1 << 39
}

/// What is added to a product before it is completed, `A'·B'` with [m, r] and [r, n]: transposed where A and B are.
#[derive(Clone, Copy)]
pub(crate) struct Term<'a> {
    pub(crate) a: Mat<'a>,
    pub(crate) b: Mat<'a>,
}

/// The shape of a product's term: what its maps are made from.
fn term_shape(s: &Shape, term: &Term) -> Shape {
    let (ld_a, ld_b) = (term.a.ld(), term.b.ld());
    Shape { k: term.a.cols(), ld: [ld_a, ld_b, s.ld[2], s.ld[3]], ..*s }
}

/// `Maps` of the kernel.
#[derive(Clone, Copy)]
#[repr(C)]
struct Maps([TensorMap; 4]);

/// Puts a product into the stream.
///
/// # Errors
/// [`Error::Cuda`] when the driver refuses.
///
/// # Safety
/// The shape is that of the product, and `variant` is one of its [`variants`] on this device.
pub(super) unsafe fn run(gpu: &Gpu, s: &Shape, variant: Variant, p: &Problem) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { run_with(gpu, s, variant, p, None) }
}

/// The same with a term that costs its steps of k and no pass over C: `C = act(α·(A·B + A'·B') + β·C + bias) + residual`.
///
/// # Errors
/// As [`run`].
///
/// # Panics
/// When the term's shape or storage is not that of the product, [TMA cannot read](is_readable) it, or it lies elsewhere.
///
/// # Safety
/// As [`run`].
pub(crate) unsafe fn run_with(gpu: &Gpu, s: &Shape, variant: Variant, p: &Problem, term: Option<Term>) -> Result<()> {
    let module = module_of(s).expect("a shape that a variant was found for");
    let [a, b] = maps(s, variant);
    let (a, b) = (encode(p.a.address(), &a)?, encode(p.b.address(), &b)?);
    let (mut all, mut steps) = (Maps([a, b, a, b]), 0);
    if let Some(term) = term.filter(|term| term.a.cols() > 0) {
        let Term { a, b } = term;
        assert_eq!((a.rows(), a.cols(), b.cols()), (s.m, b.rows(), s.n), "gemm: a term is [m, r]·[r, n]");
        assert_eq!((a.is_transposed(), b.is_transposed()), (s.ta, s.tb), "gemm: a term is stored as the product is");
        for x in [a, b] {
            assert!(is_readable(x), "gemm: a term that TMA cannot read");
            assert!(x.gpu().is_some_and(|g| **g == *gpu), "gemm: a term on {} among those on {gpu}", x.device());
        }
        let [map_a, map_b] = maps(&term_shape(s, &term), variant);
        (all.0[2], all.0[3]) = (encode(a.address(), &map_a)?, encode(b.address(), &map_b)?);
        steps = a.cols();
    }
    let mut launch = gpu.launch(module, &format!("wgmma_{}x{}", variant.columns, variant.cluster))?;
    launch.raw(all).raw(arguments(gpu, p)).i32(steps);
    let grid = variant.grid(s.m, s.n, gpu.info().multiprocessors);
    // SAFETY: the parameters are the kernel's. TMA reads within the maps, which are those of A, B and the term; C is
    // written, and residual and bias are read, at rows below m and columns below n. All are live: `Mat` and `MatMut`
    // checked it.
    unsafe { launch.run([grid, 1, 1], THREADS, variant.shared()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(m: usize, n: usize, k: usize, ta: bool, tb: bool) -> Shape {
        let ld = [if ta { m } else { k }, if tb { k } else { n }, n, 0];
        Shape {
            m,
            n,
            k,
            ta,
            tb,
            dtype: DType::Bf16,
            out: DType::Bf16,
            ld,
            alignment: [16; 4],
            beta: false,
            bias: None,
            activation: None,
            count: 1,
            step: [0; 3],
            tf32: false,
        }
    }

    const HOPPER: (u32, u32) = (9, 0);

    #[test]
    fn shared_memory_fits_a_block_and_the_ring_is_deep() {
        for (v, _) in VARIANTS {
            assert!(v.shared() <= 227 << 10, "{v:?}: {} bytes", v.shared());
            assert!(v.stages() >= 4);
        }
        // 4·(128 + 256)·64·2 = 196608 for the ring, 16384 to stage C, 1024 to align, 64 of barriers.
        assert_eq!(Variant { columns: 256, cluster: 2 }.shared(), 214_080);
    }

    #[test]
    fn the_kernel_has_the_same_numbers() {
        for text in [
            "BM = 128, BK = 64, CONSUMERS = 2",
            "STAGES = BN == 256 ? 4 : BN == 192 ? 5 : 6;",
            "STAGING = 16 * 128",
            "struct Maps { TensorMap a, b, term_a, term_b; };",
            "(const __grid_constant__ Maps maps, Gemm g, int term_k)",
            "BYTES = 1024 + EMPTY + 8 * STAGES;",
            "u64 leading = mn_major ? BOX : 16, stride = 1024;",
            "return (u64)((address & 0x3ffff) >> 4) | leading >> 4 << 16 | stride >> 4 << 32 | 1ull << 62;",
            "DEVICE constexpr u64 k_step(bool mn_major) { return (mn_major ? 2048 : 32) >> 4; }",
        ] {
            assert!(NT.text().contains(text), "{text}");
        }
        for (v, _) in VARIANTS {
            assert!(NT.text().contains(&format!("WGMMA_KERNEL({}, {})", v.columns, v.cluster)), "{v:?}");
        }
    }

    #[test]
    fn boxes_are_those_of_the_storage() {
        let v = Variant { columns: 192, cluster: 2 };
        let map = |size, pitch, window| Map { size, pitch, window };
        // x·Wᵀ: rows of x and of W are contiguous along k; each block of two fetches 96 of 192 rows of W.
        assert_eq!(
            maps(&shape(8191, 50257, 768, false, true), v),
            [map([768, 8191], 1536, [64, 128]), map([768, 50257], 1536, [64, 96])]
        );
        // dy·W: W is contiguous along n.
        assert_eq!(
            maps(&shape(512, 776, 3072, false, false), v),
            [map([3072, 512], 6144, [64, 128]), map([776, 3072], 1552, [64, 64])]
        );
        // dyᵀ·x: both along m and n.
        assert_eq!(
            maps(&shape(768, 3072, 8191, true, false), v),
            [map([768, 8191], 1536, [64, 64]), map([3072, 8191], 6144, [64, 64])]
        );
        for (v, _) in VARIANTS {
            for (ta, tb) in [(false, true), (false, false), (true, false)] {
                for (map, rows) in maps(&shape(256, 256, 256, ta, tb), v).into_iter().zip([ROWS, v.columns]) {
                    assert!(map.window.iter().all(|w| (1..=256).contains(w)) && map.window[0] * 2 == 128);
                    // Boxes start at multiples of the swizzle's period, and together fill the panel.
                    let bytes = map.window[0] * map.window[1] * 2;
                    assert_eq!(bytes % 1024, 0);
                    assert_eq!((rows * DEPTH * 2) % bytes as usize, 0);
                }
            }
        }
    }

    #[test]
    fn a_term_has_the_boxes_of_its_product_and_ends_with_its_rank() {
        let v = Variant { columns: 192, cluster: 2 };
        let map = |size, pitch, window| Map { size, pitch, window };
        let device = crate::Device::Cpu;
        let buffer = crate::Buffer::zeros(&device, DType::Bf16, 800 * 64).unwrap();
        let of = |rows, cols| Mat::new(&buffer, 0, rows, cols);
        // Rank 10 in rows of 16: what lies beyond 10 is zero to TMA, whatever the padding holds.
        let (h, b) = (of(600, 16).cols_in(0..10), of(776, 16).cols_in(0..10));
        let s = shape(600, 776, 3072, false, true);
        assert_eq!(
            maps(&term_shape(&s, &Term { a: h, b: b.t() }), v),
            [map([10, 600], 32, [64, 128]), map([10, 776], 32, [64, 96])]
        );
        let s = shape(600, 776, 3072, false, false);
        assert_eq!(
            maps(&term_shape(&s, &Term { a: h, b: of(10, 784).cols_in(0..776) }), v),
            [map([10, 600], 32, [64, 128]), map([776, 10], 1568, [64, 64])]
        );
        assert_eq!((size_of::<Maps>(), align_of::<Maps>()), (512, 64));
    }

    #[test]
    fn only_what_tma_can_read_is_taken() {
        let good = shape(8191, 50257, 768, false, true);
        let count = |cc, s: &Shape| variants(cc, 132, s).len();
        assert_eq!(count(HOPPER, &good), VARIANTS.len());
        assert_eq!(count((8, 0), &good), 0);
        assert_eq!(count((10, 0), &good), 0);
        for bad in [
            shape(512, 777, 512, false, false),
            shape(777, 512, 512, true, false),
            shape(512, 512, 777, false, true),
            shape(512, 512, 512, true, true),
            shape(63, 512, 512, false, true),
            shape(512, 512, 0, false, true),
            Shape { alignment: [8, 16, 16, 16], ..good },
            Shape { alignment: [16, 2, 16, 16], ..good },
            Shape { dtype: DType::F16, ..good },
            Shape { out: DType::F16, ..good },
            Shape { count: 2, ..good },
        ] {
            assert_eq!(count(HOPPER, &bad), 0, "{bad:?}");
        }
        assert_eq!(count(HOPPER, &Shape { alignment: [16, 16, 2, 16], out: DType::F32, ..good }), VARIANTS.len());
    }

    #[test]
    fn the_first_variant_wastes_no_wave() {
        let first = |m, n| variants(HOPPER, 132, &shape(m, n, 4096, false, true))[0];
        assert_eq!(first(8192, 8192), Variant { columns: 256, cluster: 2 });
        // 32 × 4 units of 256×192 fill 66 clusters twice; 32 × 3 of 256×256 would need two rounds as well, of wider tiles.
        assert_eq!(first(8192, 768), Variant { columns: 192, cluster: 2 });
        assert_eq!(first(128, 128).columns, 128);
    }

    #[test]
    fn grids_are_whole_clusters_and_never_idle() {
        for (v, _) in VARIANTS {
            for (m, n) in [(64, 64), (128, 256), (129, 257), (4096, 4096), (8191, 50257)] {
                for multiprocessors in [1, 2, 114, 132] {
                    let grid = v.grid(m, n, multiprocessors);
                    let (rows, cols) = v.units(m, n);
                    assert!(grid >= v.cluster && grid % v.cluster == 0 && grid / v.cluster <= rows * cols);
                    assert!(grid <= multiprocessors.max(v.cluster));
                }
            }
        }
    }

    /// `unit_at` of the kernel.
    fn unit_at(id: usize, rows: usize, cols: usize) -> (usize, usize) {
        let (band, in_band) = (id / (8 * cols), id % (8 * cols));
        let height = (rows - 8 * band).min(8);
        (8 * band + in_band % height, in_band / height)
    }

    #[test]
    fn every_element_of_c_belongs_to_one_block_once() {
        for (v, _) in VARIANTS {
            for (m, n) in [(64, 64), (128, 128), (129, 257), (2305, 1000), (1024, 769), (8191, 640)] {
                let grid = v.grid(m, n, 132);
                let (rows, cols) = v.units(m, n);
                let mut owners = vec![0u8; rows * v.cluster * cols];
                for block in 0..grid {
                    for id in (block / v.cluster..rows * cols).step_by(grid / v.cluster) {
                        let (r, c) = unit_at(id, rows, cols);
                        owners[(r * v.cluster + block % v.cluster) * cols + c] += 1;
                    }
                }
                assert!(owners.iter().all(|&o| o == 1), "{v:?} {m}×{n}");
                assert!(rows * v.cluster * ROWS >= m && cols * v.columns >= n, "{v:?} {m}×{n}");
            }
        }
    }

    /// `descriptor` of the kernel.
    fn descriptor(address: u64, mn_major: bool) -> u64 {
        let leading: u64 = if mn_major { 8192 } else { 16 };
        (address & 0x3ffff) >> 4 | leading >> 4 << 16 | 1024 >> 4 << 32 | 1 << 62
    }

    #[test]
    fn descriptors_have_the_bits_of_the_manual() {
        // Fields by hand: address 0x8400 / 16 = 0x840; leading 1 or 512; stride 64; base offset 0; swizzle 1 (128 bytes).
        assert_eq!(descriptor(0x8400, false), 0x4000_0040_0001_0840);
        assert_eq!(descriptor(0x8400, true), 0x4000_0040_0200_0840);
        // 16 steps of k: 32 bytes along a row, or 16 rows of 128. The largest address keeps to its 14 bits.
        assert_eq!(descriptor(0x8400 + 32, false) - descriptor(0x8400, false), 2);
        assert_eq!(descriptor(0x8400 + 2048, true) - descriptor(0x8400, true), 128);
        assert_eq!(descriptor((227 << 10) + 3 * 2048, true) >> 14 & 3, 0);
    }

    /// Where TMA puts element (row, col) of a box of rows of 64 elements, in bytes: 16-byte units are exchanged with the
    /// number of the row in its atom of eight.
    fn swizzled(row: usize, col: usize) -> usize {
        row * 128 + ((col / 8) ^ (row % 8)) * 16 + col % 8 * 2
    }

    /// Where wgmma looks for element (across, along k) of a tile: through the fields of its descriptor, in the canonical
    /// layouts of the manual, with the swizzle applied to the address (bits 4 to 6 with bits 7 to 9).
    fn sought(descriptor: u64, mn_major: bool, across: usize, k: usize) -> usize {
        let field = |bit: u32| (descriptor >> bit & 0x3fff) as usize * 16;
        let (start, leading, stride) = (field(0), field(16), field(32));
        let at = if mn_major {
            start + across / 64 * leading + across % 64 * 2 + k / 8 * stride + k % 8 * 128
        } else {
            start + across / 8 * stride + across % 8 * 128 + k * 2
        };
        at ^ (at >> 7 & 7) << 4
    }

    #[test]
    fn wgmma_finds_what_tma_wrote() {
        let base = 3 * 49152;
        for across in 0..256 {
            for k in 0..64 {
                let (step, inside) = (k / 16, k % 16);
                // Along k: one box, row by row. Along m or n: boxes of 64.
                let written = base + swizzled(across, k);
                let by_k = descriptor(base as u64, false) + 2 * step as u64;
                assert_eq!(sought(by_k, false, across, inside), written, "row {across}, k {k}");
                let written = base + across / 64 * 8192 + swizzled(k, across % 64);
                let by_n = descriptor(base as u64, true) + 128 * step as u64;
                assert_eq!(sought(by_n, true, across, inside), written, "column {across}, k {k}");
            }
        }
    }
}
