//! What AVX-512, with BF16, does: packing, and the innermost loop.

use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::OnceLock;

use half::bf16;

use super::{DEEP, Form, MR, NR, WORDS};
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

/// Whether products of pairs in bf16 are faster than those of the same numbers in f32. Intel's processors start half as many
/// of the former in a cycle as of the latter, and AMD's as many.
pub(super) fn pairs_pay() -> bool {
    static PAY: OnceLock<bool> = OnceLock::new();
    *PAY.get_or_init(|| {
        let maker = __cpuid(0);
        [maker.ebx, maker.edx, maker.ecx].map(u32::to_le_bytes).concat() != b"GenuineIntel"
    })
}

/// The lowest `n` bits.
pub(super) fn mask(n: usize) -> u32 {
    if n >= 32 { u32::MAX } else { (1 << n) - 1 }
}

/// What two words make of a sum.
pub(in super::super) trait Arithmetic {
    /// Elements in a word.
    const PER: usize;

    /// `sum + a·b`, in each of sixteen lanes; of the pairs in bf16, the sum of both products.
    ///
    /// # Safety
    /// The processor is [`available`].
    unsafe fn multiply_add(sum: __m512, a: __m512i, b: __m512i) -> __m512;
}

/// Words of one f32.
pub(super) enum F32 {}

/// Words of two bf16, the first in the lower half.
pub(in super::super) enum Bf16 {}

/// Words of one f32 that is a number of bf16.
pub(in super::super) enum Widened {}

impl Arithmetic for F32 {
    const PER: usize = 1;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn multiply_add(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
        _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum)
    }
}

impl Arithmetic for Widened {
    const PER: usize = F32::PER;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn multiply_add(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { F32::multiply_add(sum, a, b) }
    }
}

impl Arithmetic for Bf16 {
    const PER: usize = 2;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn multiply_add(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
        // SAFETY: 64 bytes without a structure.
        let [a, b] = [a, b].map(|v| unsafe { std::mem::transmute::<__m512i, __m512bh>(v) });
        _mm512_dpbf16_ps(sum, a, b)
    }
}

/// Elements that become words of an arithmetic.
pub(in super::super) trait Source<T: Arithmetic>: Element {
    /// The first `n ≤ 16·PER` elements of a row as words, zeros behind them.
    ///
    /// # Safety
    /// The processor is [`available`], and there are `n` elements.
    unsafe fn load(from: *const Self, n: usize) -> __m512i;

    /// The first `n ≤ 16` elements of PER rows, those above each other in one word, zeros behind them; `lower` is the second
    /// row, if a word has one and it exists.
    ///
    /// # Safety
    /// The processor is [`available`], and there are `n` elements in each.
    unsafe fn stack(upper: *const Self, lower: Option<*const Self>, n: usize) -> __m512i;
}

impl Source<F32> for f32 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn load(from: *const f32, n: usize) -> __m512i {
        // SAFETY: lanes without a bit are not read, and the others exist.
        unsafe { _mm512_maskz_loadu_epi32(mask(n) as u16, from.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn stack(upper: *const f32, _: Option<*const f32>, n: usize) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { <f32 as Source<F32>>::load(upper, n) }
    }
}

/// Sixteen bf16 as f32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn widen(x: __m256i) -> __m512i {
    _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x))
}

impl Source<Widened> for f32 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn load(from: *const f32, n: usize) -> __m512i {
        // SAFETY: lanes without a bit are not read, and the others exist.
        let rounded = _mm512_cvtneps_pbh(unsafe { _mm512_maskz_loadu_ps(mask(n) as u16, from) });
        // SAFETY: both are 32 bytes without a structure.
        widen(unsafe { std::mem::transmute::<__m256bh, __m256i>(rounded) })
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn stack(upper: *const f32, _: Option<*const f32>, n: usize) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { <f32 as Source<Widened>>::load(upper, n) }
    }
}

impl Source<Widened> for bf16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn load(from: *const bf16, n: usize) -> __m512i {
        // SAFETY: lanes without a bit are not read, and the others exist.
        widen(unsafe { _mm256_maskz_loadu_epi16(mask(n) as u16, from.cast()) })
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn stack(upper: *const bf16, _: Option<*const bf16>, n: usize) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { <bf16 as Source<Widened>>::load(upper, n) }
    }
}

impl Source<Bf16> for f32 {
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
    unsafe fn stack(upper: *const f32, lower: Option<*const f32>, n: usize) -> __m512i {
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

impl Source<Bf16> for bf16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn load(from: *const bf16, n: usize) -> __m512i {
        // SAFETY: lanes without a bit are not read, and the others exist.
        unsafe { _mm512_maskz_loadu_epi16(mask(n), from.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn stack(upper: *const bf16, lower: Option<*const bf16>, n: usize) -> __m512i {
        let bits = mask(n) as u16;
        // SAFETY: lanes without a bit are not read, and the others exist.
        let (a, b) = unsafe {
            (
                _mm256_maskz_loadu_epi16(bits, upper.cast()),
                lower.map_or(_mm256_setzero_si256(), |lower| _mm256_maskz_loadu_epi16(bits, lower.cast())),
            )
        };
        _mm512_or_si512(_mm512_cvtepu16_epi32(a), widen(b))
    }
}

/// One block of C, whose first row and column stand beside A and B; with room for what is packed of A, and for a panel of B.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) fn block<T: Arithmetic, A: Source<T>, B: Source<T>>(
    form: Form,
    (a, i0): (HostMat<A>, usize),
    (b, j0): (HostMat<B>, usize),
    k: usize,
    c: HostMut<f32>,
    [left, right]: [&mut [u32]; 2],
) {
    let (rows, step) = (i0..i0 + c.rows, WORDS * T::PER);
    // An empty sum is still a sum: C = β·C.
    let steps = k.div_ceil(step).max(1);
    let ks = |q: usize| (q * step).min(k)..((q + 1) * step).min(k);
    let mut block = Block { form, b, j0, k, c, right };
    let packed = rows.len() * WORDS;
    if packed * steps <= DEEP {
        for q in 0..steps {
            pack_rows(a, rows.clone(), ks(q), &mut left[q * packed..]);
        }
        for panel in 0..block.panels() {
            for q in 0..steps {
                // The next panel along k, or the first of the next columns.
                let next = if q + 1 < steps { (ks(q + 1), panel) } else { (ks(0), panel + 1) };
                block.panel(ks(q), panel, &left[q * packed..], next, |_, _| ());
            }
        }
        return;
    }
    for q in 0..steps {
        pack_rows(a, rows.clone(), ks(q), left);
        let panels = block.panels();
        for panel in 0..panels {
            // What is packed next of A is on its way while this is used.
            let ahead = |tile, tiles| prefetch(a, rows.clone(), ks(q + 1), (panel * tiles + tile, panels * tiles));
            block.panel(ks(q), panel, left, (ks(q), panel + 1), ahead);
        }
    }
}

/// What a task works on.
struct Block<'a, B: Element> {
    form: Form<'a>,
    b: HostMat<'a, B>,
    /// Column of B that belongs to the first of C.
    j0: usize,
    k: usize,
    c: HostMut<'a, f32>,
    /// Room for a panel of B.
    right: &'a mut [u32],
}

impl<B: Element> Block<'_, B> {
    fn panels(&self) -> usize {
        self.c.cols.div_ceil(NR)
    }

    /// Columns of a panel in C; none past the last.
    fn cols(&self, panel: usize) -> Range<usize> {
        (panel * NR).min(self.c.cols)..((panel + 1) * NR).min(self.c.cols)
    }

    /// Adds what `ks` along k give to a panel, from packed rows of A. The panel that comes `next` is on its way while this one is
    /// used; `ahead` is called for each tile, of how many, to ask for something else.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn panel<T: Arithmetic>(
        &mut self,
        ks: Range<usize>,
        panel: usize,
        left: &[u32],
        next: (Range<usize>, usize),
        ahead: impl Fn(usize, usize),
    ) where
        B: Source<T>,
    {
        let (cols, next) = (self.cols(panel), (next.0, self.cols(next.1)));
        let of_b = |cols: &Range<usize>| self.j0 + cols.start..self.j0 + cols.end;
        let (here, coming) = (of_b(&cols), of_b(&next.1));
        pack_panel(self.b, ks.clone(), here.clone(), self.right);
        let form = Form {
            beta: if ks.start == 0 { self.form.beta } else { 1.0 },
            bias: self.form.bias.filter(|_| ks.end == self.k).map(|bias| &bias[here]),
            ..self.form
        };
        let tiles = self.c.rows.div_ceil(MR);
        for t in 0..tiles {
            prefetch(self.b, next.0.clone(), coming.clone(), (t, tiles));
            ahead(t, tiles);
            let rows = t * MR..((t + 1) * MR).min(self.c.rows);
            let words = ks.len().div_ceil(T::PER);
            tile::<T>(words, &left[rows.start * WORDS..], self.right, form, self.c.block_mut(rows, cols.clone()));
        }
    }
}

/// Rows `rows` of A, columns `ks`, as rows of [`WORDS`] words in `to`; zeros up to the next whole word.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn pack_rows<T: Arithmetic, A: Source<T>>(a: HostMat<A>, rows: Range<usize>, ks: Range<usize>, to: &mut [u32]) {
    if a.transposed {
        let a = a.t();
        for (word, k) in ks.clone().step_by(16 * T::PER).enumerate() {
            for (i, row) in rows.clone().step_by(16).enumerate() {
                let n = (rows.end - row).min(16);
                let at = |k: usize| a.row(k)[row..row + n].as_ptr();
                let mut lanes = [_mm512_setzero_si512(); 16];
                for (lane, k) in lanes.iter_mut().zip((k..ks.end).step_by(T::PER)) {
                    // SAFETY: `n` elements from `row` on lie in each row.
                    *lane = unsafe { A::stack(at(k), (k + 1 < ks.end).then(|| at(k + 1)), n) };
                }
                transpose(lanes, n, &mut to[16 * i * WORDS + 16 * word..], WORDS);
            }
        }
        return;
    }
    for (row, to) in rows.zip(to.chunks_exact_mut(WORDS)) {
        let from = &a.row(row)[ks.clone()];
        for (from, to) in from.chunks(16 * T::PER).zip(to.chunks_exact_mut(16)) {
            // SAFETY: as many elements as there are, into sixteen words.
            store(unsafe { A::load(from.as_ptr(), from.len()) }, to);
        }
    }
}

/// Rows `ks` and columns `cols` of B, at most [`NR`]: for each row of words [`NR`] of them, zeros where there are none.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) fn pack_panel<T: Arithmetic, B: Source<T>>(
    b: HostMat<B>,
    ks: Range<usize>,
    cols: Range<usize>,
    to: &mut [u32],
) {
    if !b.transposed {
        for (k, to) in ks.clone().step_by(T::PER).zip(to.chunks_exact_mut(NR)) {
            let upper = &b.row(k)[cols.clone()];
            let lower = (T::PER > 1 && k + 1 < ks.end).then(|| &b.row(k + 1)[cols.clone()]);
            for (half, to) in to.chunks_exact_mut(16).enumerate() {
                let n = upper.len().saturating_sub(half * 16).min(16);
                let at = |row: &[B]| row.as_ptr().wrapping_add(half * 16);
                // SAFETY: the n elements from `half * 16` on lie in both rows.
                store(unsafe { B::stack(at(upper), lower.map(at), n) }, to);
            }
        }
        return;
    }
    let b = b.t();
    for (k, to) in ks.clone().step_by(16 * T::PER).zip(to.chunks_mut(16 * NR)) {
        let n = (ks.end - k).min(16 * T::PER);
        for half in 0..NR / 16 {
            // A loop: what `array::from_fn` calls was not inlined, because it lacks these features, and lanes went through memory.
            let mut lanes = [_mm512_setzero_si512(); 16];
            for (lane, j) in lanes.iter_mut().zip(cols.start + half * 16..cols.end) {
                // SAFETY: n elements from k on lie in each lane's row.
                *lane = unsafe { B::load(b.row(j)[k..k + n].as_ptr(), n) };
            }
            transpose(lanes, n.div_ceil(T::PER), &mut to[half * 16..], NR);
        }
    }
}

/// Asks for part `part` of `parts` of what packing these rows and columns will read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn prefetch<T: Element>(m: HostMat<T>, rows: Range<usize>, cols: Range<usize>, (part, parts): (usize, usize)) {
    // As they lie in memory. A copy of the matrix for that, between two tiles, would wait for the stores of the first.
    let (rows, cols) = if m.transposed { (cols, rows) } else { (rows, cols) };
    for row in rows.start + rows.len() * part / parts..rows.start + rows.len() * (part + 1) / parts {
        for at in cols.clone().step_by(64 / size_of::<T>()) {
            _mm_prefetch::<_MM_HINT_T1>(m.ptr().wrapping_add(row * m.ld + at).cast());
        }
    }
}

/// Into the first sixteen of the words.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn store(v: __m512i, to: &mut [u32]) {
    // SAFETY: sixteen words, or a panic.
    unsafe { _mm512_storeu_si512(to[..16].as_mut_ptr().cast(), v) };
}

/// Sixteen lanes of words as rows: row p, `stride` words after the one before it in `to`, holds word p of all lanes. The
/// first `rows` of them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn transpose(mut x: [__m512i; 16], rows: usize, to: &mut [u32], stride: usize) {
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
    // Now x[4·i + j], quarter q, holds word 4·q + j of lanes 4·i to 4·i + 3.
    for j in 0..4 {
        let [a, b, c, d] = [x[j], x[4 + j], x[8 + j], x[12 + j]];
        let (ab_even, ab_odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        let (cd_even, cd_odd) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
        y[j] = _mm512_shuffle_i32x4::<0x88>(ab_even, cd_even);
        y[8 + j] = _mm512_shuffle_i32x4::<0xdd>(ab_even, cd_even);
        y[4 + j] = _mm512_shuffle_i32x4::<0x88>(ab_odd, cd_odd);
        y[12 + j] = _mm512_shuffle_i32x4::<0xdd>(ab_odd, cd_odd);
    }
    for (row, to) in y[..rows].iter().zip(to.chunks_mut(stride)) {
        store(*row, to);
    }
}

/// `C = α·(A·B) + β·C + bias` for up to [`MR`] packed rows of A and a packed panel of B, over `words` words along k.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn tile<T: Arithmetic>(words: usize, a: &[u32], b: &[u32], form: Form, c: HostMut<f32>) {
    assert!(c.rows <= MR && c.cols <= NR && words <= WORDS && b.len() >= words * NR);
    assert!(form.bias.is_none_or(|bias| bias.len() == c.cols));
    let height = c.rows.next_multiple_of(4);
    assert!(a.len() >= height * WORDS);
    // SAFETY: A and B hold what was just checked, C is a block of rows × cols.
    unsafe {
        match (height, c.cols > 16) {
            (12, true) => tile_of::<T, 12, 2>(words, a.as_ptr(), b.as_ptr(), form, c),
            (8, true) => tile_of::<T, 8, 2>(words, a.as_ptr(), b.as_ptr(), form, c),
            (_, true) => tile_of::<T, 4, 2>(words, a.as_ptr(), b.as_ptr(), form, c),
            (12, false) => tile_of::<T, 12, 1>(words, a.as_ptr(), b.as_ptr(), form, c),
            (8, false) => tile_of::<T, 8, 1>(words, a.as_ptr(), b.as_ptr(), form, c),
            (_, false) => tile_of::<T, 4, 1>(words, a.as_ptr(), b.as_ptr(), form, c),
        }
    }
}

/// # Safety
/// A has M rows of [`WORDS`] words, of which those past C's may be anything, B has `words`
/// rows of [`NR`] words, C no more columns than V vectors, and the bias as many as C.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn tile_of<T: Arithmetic, const M: usize, const V: usize>(
    words: usize,
    a: *const u32,
    b: *const u32,
    Form { alpha, beta, bias }: Form,
    mut c: HostMut<f32>,
) {
    // C's rows are far apart: they come while the sums are taken.
    for i in 0..c.rows {
        for at in c.row(i).chunks(16) {
            _mm_prefetch::<_MM_HINT_ET0>(at.as_ptr().cast());
        }
    }
    let mut sum = [[_mm512_setzero_ps(); V]; M];
    for p in 0..words {
        // SAFETY: both operands are as long as the caller promised.
        unsafe {
            let right: [__m512i; V] = std::array::from_fn(|v| _mm512_loadu_si512(b.add(p * NR + 16 * v).cast()));
            for (i, sum) in sum.iter_mut().enumerate() {
                let left = _mm512_set1_epi32(a.add(i * WORDS + p).read() as i32);
                for (sum, &right) in sum.iter_mut().zip(&right) {
                    *sum = T::multiply_add(*sum, left, right);
                }
            }
        }
    }
    let bits = mask(c.cols);
    let (alpha, scale) = (_mm512_set1_ps(alpha), _mm512_set1_ps(beta));
    // Without a branch below: with one the loop is not unrolled, and then the sums would not stay in registers above.
    let bias: [__m512; V] = std::array::from_fn(|v| match bias {
        // SAFETY: as many numbers as C has columns; lanes without a bit are not read.
        Some(bias) => unsafe { _mm512_maskz_loadu_ps((bits >> (16 * v)) as u16, bias.as_ptr().wrapping_add(16 * v)) },
        None => _mm512_setzero_ps(),
    });
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
                _mm512_mask_storeu_ps(to, bits, _mm512_add_ps(y, bias[half]));
            }
        }
    }
}
