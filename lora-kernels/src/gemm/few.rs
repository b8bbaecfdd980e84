#![allow(unsafe_code)]

//! Products with few rows, on the host: one new token of some sequences times a weight. They are bound by reading B, so
//! each element of it is read once, nearly in the order of memory and asked for ahead, and used for all rows of A. Products
//! with few columns, such as tokens times the A of LoRA, are the same of the transposes.
//!
//! B may be bf16; A is then rounded to bf16, as it is in products of many rows, so that a token's numbers do not depend on
//! how many come with it. Sums are f32. An element of C is summed in an order that depends on k and on how B is stored
//! alone: neither threads, nor the other rows, nor the width of the processor's vectors change a bit of it.

mod lanes;
mod loops;
#[cfg(test)]
mod tests;

use half::bf16;
use rayon::prelude::*;

use self::lanes::{Lanes, Portable};
use crate::{
    Buffer, DType, Device, Element, Result,
    mat::{HostMat, HostMut},
    real::simd,
};

/// The most rows. With more of them arithmetic outweighs reading, and a product in blocks is as fast.
const ROWS: usize = 16;

/// The longest sum. One over all tokens or all of a vocabulary would lose more digits here than in blocks of blocks.
const LONG: usize = 1 << 15;

/// Elements of B that are worth waking another thread for: some microseconds of reading.
const SHARE: usize = 1 << 15;

/// Columns of C for one task when those of B lie one after the other: enough to read on without a stop.
const COLS: usize = 1024;

/// Whether [`product`] is made for A [m, k] times B [k, n]: few rows, and a B that does not lie in a near cache already.
pub(crate) fn fits(m: usize, k: usize, n: usize) -> bool {
    (1..=ROWS).contains(&m) && k <= LONG && k * n >= SHARE
}

/// What B may consist of.
pub(crate) trait Weight: Element {
    /// `n ≤ 16` elements from `p` on, then zeros.
    ///
    /// # Safety
    /// They can be read, and the processor has the vectors of `V`.
    unsafe fn load<V: Lanes>(p: *const Self, n: usize) -> V;
    /// A number of A as it is multiplied.
    fn beside(a: f32) -> f32;
}

impl Weight for f32 {
    #[inline(always)]
    unsafe fn load<V: Lanes>(p: *const f32, n: usize) -> V {
        // SAFETY: as the caller promises.
        unsafe { V::load(p, n) }
    }
    #[inline(always)]
    fn beside(a: f32) -> f32 {
        a
    }
}

impl Weight for bf16 {
    #[inline(always)]
    unsafe fn load<V: Lanes>(p: *const bf16, n: usize) -> V {
        // SAFETY: as the caller promises.
        unsafe { V::widen(p, n) }
    }
    #[inline(always)]
    fn beside(a: f32) -> f32 {
        bf16::from_f32(a).to_f32()
    }
}

/// `C = α·A·B + β·C` in f32; fast for shapes that [`fits`] accepts. With β = 0 the old contents of C are not read.
///
/// # Panics
/// When the shapes do not fit.
pub(crate) fn product<W: Weight>(alpha: f64, a: HostMat<f32>, b: HostMat<W>, beta: f64, c: HostMut<f32>) -> Result<()> {
    on(Vectors::best(), alpha, a, b, beta, c)
}

/// Whether [`narrow`] is made for A [m, k] times B [k, n] on this processor: the transposes have few rows, and they are not
/// taken one by one.
pub(crate) fn fits_narrow(m: usize, k: usize, n: usize) -> bool {
    Vectors::best().tall() > 1 && fits(n, k, m)
}

/// `C = α·A·B + β·C` in f32 as `Cᵀ = α·Bᵀ·Aᵀ + β·Cᵀ`; fast for shapes that [`fits_narrow`] accepts.
///
/// # Panics
/// When the shapes do not fit.
pub(crate) fn narrow(alpha: f64, a: HostMat<f32>, b: HostMat<f32>, beta: f64, mut c: HostMut<f32>) -> Result<()> {
    let (m, n, beta) = (c.rows, c.cols, beta as f32);
    let mut scratch = Buffer::empty(&Device::Cpu, DType::F32, n * m)?;
    let across = scratch.host_mut::<f32>();
    product(alpha, b.t(), a.t(), 0.0, HostMut::from_slice(across, n, m))?;
    for i in 0..m {
        for (j, c) in c.row_mut(i).iter_mut().enumerate() {
            *c = across[j * m + i] + if beta == 0.0 { 0.0 } else { beta * *c };
        }
    }
    Ok(())
}

/// Whether the loops are those for AVX-512.
#[cfg(target_arch = "x86_64")]
pub(crate) fn by_avx512() -> bool {
    Vectors::best() == Vectors::Avx512
}

/// Which vectors compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vectors {
    /// What the compiler makes of arrays.
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Vectors {
    fn best() -> Vectors {
        #[cfg(target_arch = "x86_64")]
        if lanes::Avx512::is_there() {
            return Vectors::Avx512;
        }
        Vectors::Portable
    }

    /// The most rows that the loops keep in registers.
    fn tall(self) -> usize {
        match self {
            Vectors::Portable => 1,
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx512 => 8,
        }
    }
}

fn on<W: Weight>(
    vectors: Vectors,
    alpha: f64,
    a: HostMat<f32>,
    b: HostMat<W>,
    beta: f64,
    mut c: HostMut<f32>,
) -> Result<()> {
    let (m, k) = if a.transposed { (a.cols, a.rows) } else { (a.rows, a.cols) };
    let (k2, n) = if b.transposed { (b.cols, b.rows) } else { (b.rows, b.cols) };
    assert_eq!((m, k, n), (c.rows, k2, c.cols), "gemm: [m, k]·[k, n] into [m, n]");
    if m == 0 || n == 0 {
        return Ok(());
    }
    let rows = Rows { m, groups: m.div_ceil(vectors.tall()) };
    let mut scratch = Buffer::empty(&Device::Cpu, DType::F32, m * k)?;
    let packed = &mut scratch.host_mut::<f32>()[..m * k];
    pack::<W>(a, packed);
    let threads = rayon::current_num_threads();
    let step = match n * k / SHARE {
        _ if threads == 1 => n,
        0 | 1 => n,
        // Else as wide as can be: the wider, the longer are the runs that are read.
        _ => n.div_ceil(threads).next_multiple_of(64).min(if b.transposed { COLS } else { n }),
    };
    let work = |(i, mut c): (usize, HostMut<f32>)| {
        let (from, to) = (i * step, i * step + c.cols);
        let b = if b.transposed { b.t().block(from..to, 0..k).t() } else { b.block(0..k, from..to) };
        let part =
            Part { rows, k, n: c.cols, a: packed, b, alpha: alpha as f32, beta: beta as f32, ldc: c.ld, c: c.ptr() };
        match vectors {
            // SAFETY: `Part` describes live memory: A packed, a block of B and the uniquely borrowed one of C.
            Vectors::Portable => simd(
                #[inline(always)]
                || unsafe { part.run::<Portable>() },
            ),
            // SAFETY: as above, and the processor has been asked.
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx512 => unsafe { avx512(part) },
        }
    };
    if step >= n {
        work((0, c.reborrow()));
        return Ok(());
    }
    let bounds: Vec<usize> = (0..n).step_by(step).chain([n]).collect();
    c.grid(&[0, m], &bounds).into_par_iter().enumerate().with_max_len(1).for_each(work);
    Ok(())
}

/// [`Part::run`] with AVX-512.
///
/// # Safety
/// As there.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn avx512<W: Weight>(part: Part<W>) {
    // SAFETY: as the caller promises, and these are the vectors' features.
    unsafe { part.run::<lanes::Avx512>() }
}

/// Rows in groups whose sizes differ by one at most; a group is what the loops keep in registers.
#[derive(Clone, Copy)]
struct Rows {
    m: usize,
    groups: usize,
}

impl Rows {
    /// The rows of the largest group.
    #[inline(always)]
    fn most(self) -> usize {
        self.m.div_ceil(self.groups)
    }

    /// First row and size of each group.
    #[inline(always)]
    fn groups(self) -> impl Iterator<Item = (usize, usize)> {
        let (size, more) = (self.m / self.groups, self.m % self.groups);
        (0..self.groups).map(move |g| (g * size + g.min(more), size + usize::from(g < more)))
    }
}

/// A as the loops read it: row after row, in the numbers that are multiplied.
fn pack<W: Weight>(a: HostMat<f32>, to: &mut [f32]) {
    if a.transposed {
        for p in 0..a.rows {
            let column = to[p..].iter_mut().step_by(a.rows);
            column.zip(a.t().row(p)).for_each(|(to, &x)| *to = W::beside(x));
        }
    } else {
        for (i, to) in to.chunks_exact_mut(a.cols.max(1)).enumerate() {
            to.iter_mut().zip(a.row(i)).for_each(|(to, &x)| *to = W::beside(x));
        }
    }
}

/// Some columns of a product: C [m, n], A packed, B [k, n].
struct Part<'a, W> {
    rows: Rows,
    k: usize,
    n: usize,
    a: &'a [f32],
    b: HostMat<'a, W>,
    alpha: f32,
    beta: f32,
    c: *mut f32,
    ldc: usize,
}
