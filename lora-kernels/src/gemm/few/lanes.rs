#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use half::bf16;

/// Elements of a vector, whatever the processor's have: sums over lanes have one order everywhere.
pub(super) const LANES: usize = 16;

/// A vector of 16 f32. Loads and stores take the number of elements, at most 16, and touch no others.
///
/// # Safety of its functions
/// The memory they are given, and the processor has what the type stands for.
pub(crate) trait Lanes: Copy {
    unsafe fn splat(x: f32) -> Self;
    /// Lanes from `n` on are 0.
    unsafe fn load(p: *const f32, n: usize) -> Self;
    /// As `load`, from bf16.
    unsafe fn widen(p: *const bf16, n: usize) -> Self;
    unsafe fn store(self, p: *mut f32, n: usize);
    /// `self · a + b` in one rounding.
    unsafe fn mul_add(self, a: Self, b: Self) -> Self;
    /// Halves are added until one number is left.
    unsafe fn sum(self) -> f32;
}

/// Arrays, of which the compiler makes vectors.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; LANES]);

impl Lanes for Portable {
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Portable([x; LANES])
    }

    #[inline(always)]
    unsafe fn load(p: *const f32, n: usize) -> Self {
        if n == LANES {
            // SAFETY: the caller gives so many elements.
            return Portable(unsafe { p.cast::<[f32; LANES]>().read() });
        }
        let mut x = [0.0; LANES];
        for (i, x) in x.iter_mut().enumerate().take(n) {
            // SAFETY: as above.
            *x = unsafe { *p.add(i) };
        }
        Portable(x)
    }

    #[inline(always)]
    unsafe fn widen(p: *const bf16, n: usize) -> Self {
        let mut bits = [0u16; LANES];
        if n == LANES {
            // SAFETY: the caller gives so many elements.
            bits = unsafe { p.cast::<[u16; LANES]>().read() };
        } else {
            for (i, x) in bits.iter_mut().enumerate().take(n) {
                // SAFETY: as above.
                *x = unsafe { *p.add(i) }.to_bits();
            }
        }
        Portable(bits.map(|b| f32::from_bits(u32::from(b) << 16)))
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, n: usize) {
        if n == LANES {
            // SAFETY: the caller gives so many elements.
            return unsafe { p.cast::<[f32; LANES]>().write(self.0) };
        }
        for (i, x) in self.0.into_iter().enumerate().take(n) {
            // SAFETY: as above.
            unsafe { *p.add(i) = x };
        }
    }

    #[inline(always)]
    unsafe fn mul_add(self, a: Self, b: Self) -> Self {
        let mut y = b.0;
        for ((y, x), a) in y.iter_mut().zip(self.0).zip(a.0) {
            *y = f32::mul_add(x, a, *y);
        }
        Portable(y)
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let x = self.0;
        let x: [f32; 8] = std::array::from_fn(|l| x[l] + x[l + 8]);
        let x: [f32; 4] = std::array::from_fn(|l| x[l] + x[l + 4]);
        (x[0] + x[2]) + (x[1] + x[3])
    }
}

/// AVX-512 with what loads 16-bit elements under a mask.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx512(__m512);

#[cfg(target_arch = "x86_64")]
impl Avx512 {
    pub(super) fn is_there() -> bool {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
    }
}

#[cfg(target_arch = "x86_64")]
fn mask(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as __mmask16
}

// The processor was asked before any of this is called, and memory is what the caller gives: 16 elements, or those under
// the mask.
#[cfg(target_arch = "x86_64")]
impl Lanes for Avx512 {
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_set1_ps(x) })
    }

    #[inline(always)]
    unsafe fn load(p: *const f32, n: usize) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { if n == LANES { _mm512_loadu_ps(p) } else { _mm512_maskz_loadu_ps(mask(n), p) } })
    }

    #[inline(always)]
    unsafe fn widen(p: *const bf16, n: usize) -> Self {
        // SAFETY: see above.
        unsafe {
            let bits = match n {
                LANES => _mm256_loadu_si256(p.cast()),
                n => _mm256_maskz_loadu_epi16(mask(n), p.cast()),
            };
            Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits))))
        }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, n: usize) {
        // SAFETY: see above.
        unsafe { if n == LANES { _mm512_storeu_ps(p, self.0) } else { _mm512_mask_storeu_ps(p, mask(n), self.0) } }
    }

    #[inline(always)]
    unsafe fn mul_add(self, a: Self, b: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_fmadd_ps(self.0, a.0, b.0) })
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: see above.
        unsafe {
            let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(self.0)));
            let x = _mm256_add_ps(_mm512_castps512_ps256(self.0), high);
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps::<1>(x, x)))
        }
    }
}

/// Asks for the cache line of an address, which need not be one of the program's. It waits in the second cache, so that
/// what the loops use again stays in the first.
#[inline(always)]
pub(super) fn fetch<T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which reads nothing.
    unsafe {
        _mm_prefetch::<_MM_HINT_T1>(p.cast())
    };
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}
