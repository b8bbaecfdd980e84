//! What AVX-512 with BF16 does: packing, and the innermost loop.

use std::arch::x86_64::*;
use std::ops::Range;

use half::bf16;

use super::blocked::{KC, MR, NR};
use crate::{
    Element,
    mat::{HostMat, HostMut},
};

/// Whether this processor has what the functions below need.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bf16")
}

/// The lowest `n` bits.
fn mask(n: usize) -> u32 {
    if n >= 32 { u32::MAX } else { (1 << n) - 1 }
}

/// Elements that are loaded as bf16.
pub(super) trait Source: Element {
    fn narrow(self) -> bf16;

    /// The first `n ≤ 32` elements, zeros behind them.
    ///
    /// # Safety
    /// The processor is [`available`], and there are `n` elements.
    unsafe fn load(from: *const Self, n: usize) -> __m512i;

    /// The first `n ≤ 16` elements of two rows, those above each other side by side, zeros behind them; for a second
    /// row that does not exist zeros.
    ///
    /// # Safety
    /// The processor is [`available`], and there are `n` elements in each.
    unsafe fn load_pairs(upper: *const Self, lower: Option<*const Self>, n: usize) -> __m512i;
}

impl Source for f32 {
    fn narrow(self) -> bf16 {
        bf16::from_f32(self)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn load(from: *const f32, n: usize) -> __m512i {
        let bits = mask(n);
        // SAFETY: lanes without a bit are not read, and the others exist.
        let (a, b) = unsafe {
            (
                _mm512_maskz_loadu_ps(bits as u16, from),
                _mm512_maskz_loadu_ps((bits >> 16) as u16, from.wrapping_add(16)),
            )
        };
        // SAFETY: both are 64 bytes without a structure.
        unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(b, a)) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn load_pairs(upper: *const f32, lower: Option<*const f32>, n: usize) -> __m512i {
        let bits = mask(n) as u16;
        // SAFETY: lanes without a bit are not read, and the others exist.
        let (a, b) = unsafe {
            (
                _mm512_maskz_loadu_ps(bits, upper),
                lower.map_or(_mm512_setzero_ps(), |lower| _mm512_maskz_loadu_ps(bits, lower)),
            )
        };
        // SAFETY: both are 64 bytes without a structure.
        let halves = unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(b, a)) };
        const INTERLEAVE: [u16; 32] = {
            let mut order = [0; 32];
            let mut i = 0;
            while i < 32 {
                order[i] = (i / 2 + i % 2 * 16) as u16;
                i += 1;
            }
            order
        };
        // SAFETY: 64 bytes of numbers.
        let order = unsafe { _mm512_loadu_si512(INTERLEAVE.as_ptr().cast()) };
        _mm512_permutexvar_epi16(order, halves)
    }
}

impl Source for bf16 {
    fn narrow(self) -> bf16 {
        self
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn load(from: *const bf16, n: usize) -> __m512i {
        // SAFETY: lanes without a bit are not read, and the others exist.
        unsafe { _mm512_maskz_loadu_epi16(mask(n), from.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn load_pairs(upper: *const bf16, lower: Option<*const bf16>, n: usize) -> __m512i {
        let bits = mask(n) as u16;
        // SAFETY: lanes without a bit are not read, and the others exist.
        let (a, b) = unsafe {
            (
                _mm256_maskz_loadu_epi16(bits, upper.cast()),
                lower.map_or(_mm256_setzero_si256(), |lower| _mm256_maskz_loadu_epi16(bits, lower.cast())),
            )
        };
        _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(b)))
    }
}

/// Rows `rows` of A, columns `ks`, as bf16: rows of [`KC`] elements in `to`, zeros up to the next even length.
pub(super) fn pack_rows<T: Source>(a: HostMat<T>, rows: Range<usize>, ks: Range<usize>, to: &mut [bf16]) {
    if a.transposed {
        let a = a.t();
        for (p, k) in ks.clone().enumerate() {
            for (i, &v) in a.row(k)[rows.clone()].iter().enumerate() {
                to[i * KC + p] = v.narrow();
            }
        }
        if ks.len() % 2 == 1 {
            (0..rows.len()).for_each(|i| to[i * KC + ks.len()] = bf16::ZERO);
        }
        return;
    }
    for (row, to) in rows.zip(to.chunks_exact_mut(KC)) {
        let from = &a.row(row)[ks.clone()];
        for (from, to) in from.chunks(32).zip(to.chunks_exact_mut(32)) {
            // SAFETY: `pack_rows` is only called where `available`; as many elements as there are, into 32.
            unsafe { store(T::load(from.as_ptr(), from.len()), to.as_mut_ptr().cast()) };
        }
    }
}

/// Rows `ks` and columns `cols` of B, at most [`NR`]: for each pair of rows the [`NR`] pairs of numbers, zeros where there
/// are none.
pub(super) fn pack_panel<T: Source>(b: HostMat<T>, ks: Range<usize>, cols: Range<usize>, to: &mut [u32]) {
    if !b.transposed {
        for (k, to) in ks.clone().step_by(2).zip(to.chunks_exact_mut(NR)) {
            let upper = &b.row(k)[cols.clone()];
            let lower = (k + 1 < ks.end).then(|| &b.row(k + 1)[cols.clone()]);
            for (half, to) in to.chunks_exact_mut(16).enumerate() {
                let n = upper.len().saturating_sub(half * 16).min(16);
                let at = |row: &[T]| row.as_ptr().wrapping_add(half * 16);
                // SAFETY: only called where `available`; the n elements from `half * 16` on lie in both rows.
                unsafe { store(T::load_pairs(at(upper), lower.map(at), n), to.as_mut_ptr()) };
            }
        }
        return;
    }
    let b = b.t();
    for (k, to) in ks.clone().step_by(32).zip(to.chunks_mut(16 * NR)) {
        let n = (ks.end - k).min(32);
        for half in 0..NR / 16 {
            let lane = |i: usize| {
                let j = cols.start + half * 16 + i;
                (j < cols.end).then(|| b.row(j)[k..k + n].as_ptr())
            };
            // SAFETY: only called where `available`; n elements from k on lie in each lane's row; the panel has sixteen
            // rows of pairs here, or as many as it has left.
            unsafe { transpose(std::array::from_fn(lane), n, &mut to[half * 16..]) };
        }
    }
}

/// Asks for part `part` of `parts` of what [`pack_panel`] will read.
pub(super) fn prefetch_panel<T: Source>(
    b: HostMat<T>,
    ks: Range<usize>,
    cols: Range<usize>,
    (part, parts): (usize, usize),
) {
    let line = 64 / size_of::<T>();
    let share = |n: usize| (n * part / parts, n * (part + 1) / parts);
    let (rows, cols, b) = if b.transposed { (cols, ks, b.t()) } else { (ks, cols, b) };
    let (from, to) = share(rows.len());
    for row in rows.start + from..rows.start + to {
        for at in b.row(row)[cols.clone()].chunks(line) {
            // SAFETY: a hint, which reads nothing.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(at.as_ptr().cast()) };
        }
    }
}

/// # Safety
/// The processor is [`available`], and 64 bytes can be written.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store(v: __m512i, to: *mut u32) {
    // SAFETY: the caller's promise.
    unsafe { _mm512_storeu_si512(to.cast(), v) };
}

/// Sixteen lanes of up to 32 numbers each, as rows of pairs, [`NR`] apart in `to`: row p holds pair p of all lanes.
///
/// # Safety
/// The processor is [`available`], and every lane that exists has `n` elements.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn transpose<T: Source>(lanes: [Option<*const T>; 16], n: usize, to: &mut [u32]) {
    let mut x = [_mm512_setzero_si512(); 16];
    for (x, lane) in x.iter_mut().zip(lanes) {
        if let Some(lane) = lane {
            // SAFETY: the caller's promise.
            *x = unsafe { T::load(lane, n) };
        }
    }
    // Pairs of lanes, then fours, within each quarter of the vectors; then the quarters change places.
    let mut y = x;
    for i in 0..8 {
        y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    for i in 0..4 {
        let [a, b, c, d] = [y[4 * i], y[4 * i + 1], y[4 * i + 2], y[4 * i + 3]];
        x[4 * i] = _mm512_unpacklo_epi64(a, c);
        x[4 * i + 1] = _mm512_unpackhi_epi64(a, c);
        x[4 * i + 2] = _mm512_unpacklo_epi64(b, d);
        x[4 * i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    // Now x[4·i + j], quarter q, holds pair 4·q + j of lanes 4·i to 4·i + 3.
    for j in 0..4 {
        let [a, b, c, d] = [x[j], x[4 + j], x[8 + j], x[12 + j]];
        let (ab_even, ab_odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        let (cd_even, cd_odd) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
        y[j] = _mm512_shuffle_i32x4::<0x88>(ab_even, cd_even);
        y[8 + j] = _mm512_shuffle_i32x4::<0xdd>(ab_even, cd_even);
        y[4 + j] = _mm512_shuffle_i32x4::<0x88>(ab_odd, cd_odd);
        y[12 + j] = _mm512_shuffle_i32x4::<0xdd>(ab_odd, cd_odd);
    }
    for (row, to) in y[..n.div_ceil(2)].iter().zip(to.chunks_mut(NR)) {
        // SAFETY: the first sixteen of a row of the panel.
        unsafe { store(*row, to[..16].as_mut_ptr()) };
    }
}

/// `C = α·(A·B) + β·C` for up to [`MR`] rows of packed A and a packed panel of B, over `pairs` pairs along k.
pub(super) fn tile(pairs: usize, a: &[bf16], b: &[u32], alpha: f32, beta: f32, mut c: HostMut<f32>) {
    let rows = c.rows;
    assert!(rows <= MR && c.cols <= NR && pairs <= KC / 2 && b.len() >= pairs * NR);
    let height = rows.next_multiple_of(4);
    assert!(a.len() >= height * KC);
    // SAFETY: only called where `available`; A and B hold what was just checked, C is a block of rows × cols.
    unsafe {
        match height {
            12 => tile_of::<12>(pairs, a.as_ptr(), b.as_ptr(), alpha, beta, &mut c),
            8 => tile_of::<8>(pairs, a.as_ptr(), b.as_ptr(), alpha, beta, &mut c),
            _ => tile_of::<4>(pairs, a.as_ptr(), b.as_ptr(), alpha, beta, &mut c),
        }
    }
}

/// # Safety
/// The processor is [`available`]; A has M rows of [`KC`] elements, of which those past C's may be anything, B has
/// `pairs` rows of [`NR`] pairs.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn tile_of<const M: usize>(
    pairs: usize,
    a: *const bf16,
    b: *const u32,
    alpha: f32,
    beta: f32,
    c: &mut HostMut<f32>,
) {
    // C's rows are far apart: they come while the sums are taken.
    for i in 0..c.rows {
        for at in c.row(i).chunks(16) {
            _mm_prefetch::<_MM_HINT_ET0>(at.as_ptr().cast());
        }
    }
    let mut sum = [[_mm512_setzero_ps(); 2]; M];
    // SAFETY: two numbers that stand side by side are a pair; both operands are as long as the caller promised.
    let pair = |v: __m512i| unsafe { std::mem::transmute::<__m512i, __m512bh>(v) };
    for p in 0..pairs {
        // SAFETY: as above.
        let (b0, b1) = unsafe {
            let row = b.add(p * NR);
            (pair(_mm512_loadu_si512(row.cast())), pair(_mm512_loadu_si512(row.add(16).cast())))
        };
        for (i, sum) in sum.iter_mut().enumerate() {
            // SAFETY: as above.
            let a = unsafe { pair(_mm512_set1_epi32(a.add(i * KC + 2 * p).cast::<i32>().read_unaligned())) };
            sum[0] = _mm512_dpbf16_ps(sum[0], a, b0);
            sum[1] = _mm512_dpbf16_ps(sum[1], a, b1);
        }
    }
    let bits = mask(c.cols);
    let (alpha, scale) = (_mm512_set1_ps(alpha), _mm512_set1_ps(beta));
    for (i, sum) in sum.iter().enumerate().take(c.rows) {
        let row = c.row_mut(i).as_mut_ptr();
        for (half, &sum) in sum.iter().enumerate() {
            let (bits, to) = ((bits >> (16 * half)) as u16, row.wrapping_add(16 * half));
            let mut y = _mm512_mul_ps(alpha, sum);
            // SAFETY: lanes without a bit are neither read nor written, and the others lie in the row.
            unsafe {
                if beta != 0.0 {
                    y = _mm512_fmadd_ps(scale, _mm512_maskz_loadu_ps(bits, to), y);
                }
                _mm512_mask_storeu_ps(to, bits, y);
            }
        }
    }
}
