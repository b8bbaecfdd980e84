use std::{
    fmt::Debug,
    iter::Sum,
    ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub},
};

use crate::{Element, gemm::Serial};

/// Arithmetic of the host's kernels, over f32 and f64. The elementary functions of f32 are branch-free polynomials, so
/// that loops over them become vector code; those of f64 are the library's, for checks in which speed does not count.
pub(crate) trait Real:
    Element
    + Serial
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + MulAssign
    + Sum
    + Debug
{
    const ZERO: Self;
    const ONE: Self;
    const NEG_INFINITY: Self;
    /// Rounded to the type.
    fn of(v: f64) -> Self;
    fn f64(self) -> f64;
    /// `self · a + b` in one rounding.
    fn mul_add(self, a: Self, b: Self) -> Self;
    fn sqrt(self) -> Self;
    fn max(self, o: Self) -> Self;
    fn ln(self) -> Self;
    /// eˣ; underflows to 0 and overflows to ∞; relative error of f32 below 2⁻²².
    fn exp(self) -> Self;
    /// Absolute error of f32 below 2⁻²².
    fn tanh(self) -> Self;
    /// The error function 2/√π ∫₀ˣ e^(−t²) dt; absolute error of f32 below 2⁻²¹.
    fn erf(self) -> Self;
}

impl Real for f32 {
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;
    const NEG_INFINITY: f32 = f32::NEG_INFINITY;

    #[inline(always)]
    fn of(v: f64) -> f32 {
        v as f32
    }
    #[inline(always)]
    fn f64(self) -> f64 {
        self.into()
    }
    #[inline(always)]
    fn mul_add(self, a: f32, b: f32) -> f32 {
        f32::mul_add(self, a, b)
    }
    #[inline(always)]
    fn sqrt(self) -> f32 {
        f32::sqrt(self)
    }
    #[inline(always)]
    fn max(self, o: f32) -> f32 {
        if self > o { self } else { o }
    }
    #[inline(always)]
    fn ln(self) -> f32 {
        f32::ln(self)
    }

    /// x = n·ln 2 + r with |r| ≤ ln 2 / 2; e^r by its degree-6 minimax polynomial (Cephes); 2ⁿ through the exponent bits,
    /// in two factors so that results near the ends of the range are right.
    #[inline(always)]
    fn exp(self) -> f32 {
        const LN2_HI: f32 = 0.693_359_4;
        const LN2_LO: f32 = -2.121_944_4e-4;
        // Comparisons rather than min and max, so that NaN goes through.
        let x = if self > 89.0 { 89.0 } else { self };
        let x = if x < -104.0 { -104.0 } else { x };
        // Adding 1.5·2²³ rounds to the nearest integer and leaves it in the low bits.
        const ROUND: f32 = 12_582_912.0;
        let shifted = f32::mul_add(x, std::f32::consts::LOG2_E, ROUND);
        let n = shifted - ROUND;
        let r = f32::mul_add(n, -LN2_LO, f32::mul_add(n, -LN2_HI, x));
        let mut p = 1.987_569_1e-4f32;
        for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_66, 0.5] {
            p = f32::mul_add(p, r, c);
        }
        let e = f32::mul_add(p * r, r, r) + 1.0;
        let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
        let half = n >> 1;
        let pow2 = |k: i32| f32::from_bits((k.wrapping_add(127) as u32) << 23);
        e * pow2(half) * pow2(n.wrapping_sub(half))
    }

    #[inline(always)]
    fn tanh(self) -> f32 {
        1.0 - 2.0 / (Real::exp(2.0 * self) + 1.0)
    }

    /// A rational approximation on [−4, 4], beyond which erf is ±1 in f32 (the one of Eigen and XLA).
    #[inline(always)]
    fn erf(self) -> f32 {
        let x = if self > 4.0 { 4.0 } else { self };
        let x = if x < -4.0 { -4.0 } else { x };
        let s = x * x;
        let mut p = -2.726_142_4e-10f32;
        for c in [2.770_681_4e-8, -2.101_024e-6, -5.692_506_4e-5, -7.349_906e-4, -2.954_6e-3, -1.609_603_3e-2] {
            p = f32::mul_add(p, s, c);
        }
        let mut q = -1.456_607_2e-5f32;
        for c in [-2.133_740_6e-4, -1.682_827e-3, -7.373_329e-3, -1.426_473_9e-2] {
            q = f32::mul_add(q, s, c);
        }
        // Exactly ±1 out there: GELU multiplies what is missing to it by x.
        if self >= 4.0 {
            1.0
        } else if self <= -4.0 {
            -1.0
        } else {
            x * p / q
        }
    }
}

impl Real for f64 {
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;
    const NEG_INFINITY: f64 = f64::NEG_INFINITY;

    #[inline(always)]
    fn of(v: f64) -> f64 {
        v
    }
    #[inline(always)]
    fn f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn mul_add(self, a: f64, b: f64) -> f64 {
        f64::mul_add(self, a, b)
    }
    #[inline(always)]
    fn sqrt(self) -> f64 {
        f64::sqrt(self)
    }
    #[inline(always)]
    fn max(self, o: f64) -> f64 {
        if self > o { self } else { o }
    }
    #[inline(always)]
    fn ln(self) -> f64 {
        f64::ln(self)
    }
    #[inline(always)]
    fn exp(self) -> f64 {
        f64::exp(self)
    }
    #[inline(always)]
    fn tanh(self) -> f64 {
        f64::tanh(self)
    }
    #[inline(always)]
    fn erf(self) -> f64 {
        libm::erf(self)
    }
}

/// Runs `f` compiled for the widest vectors of this processor. What `f` calls must be `#[inline(always)]` to profit.
#[inline(always)]
pub(crate) fn simd<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// Calls `$body` with `$T` bound to the Rust type of a floating-point dtype.
macro_rules! dispatch {
    ($kernel:literal, $dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::DType::F64 => {
                type $T = f64;
                $body
            }
            dtype => Err($crate::Error::DType { kernel: $kernel, dtype }),
        }
    };
}
pub(crate) use dispatch;

#[cfg(test)]
mod tests {
    use super::*;

    fn worst(
        name: &str,
        xs: impl Iterator<Item = f32>,
        ours: impl Fn(f32) -> f32,
        exact: impl Fn(f64) -> f64,
        relative: bool,
    ) -> f64 {
        let (e, x) = xs
            .map(|x| {
                let want = exact(x.into());
                let err = (f64::from(ours(x)) - want).abs();
                // Below the smallest normal number a result has fewer digits.
                (if relative { err / want.abs().max(f64::from(f32::MIN_POSITIVE)) } else { err }, x)
            })
            .fold((0.0, 0.0), |a, b| if b.0 > a.0 { b } else { a });
        println!("{name}: worst {e:.2e} at {x}");
        e
    }

    fn grid(lo: f32, hi: f32) -> impl Iterator<Item = f32> {
        (0..=400_000).map(move |i| lo + (hi - lo) * (i as f32 / 400_000.0))
    }

    #[test]
    fn elementary_functions_keep_their_stated_errors() {
        assert!(worst("exp", grid(-87.0, 88.7), Real::exp, f64::exp, true) < 2f64.powi(-22));
        assert!(worst("tanh", grid(-12.0, 12.0), Real::tanh, f64::tanh, false) < 2f64.powi(-22));
        assert!(worst("erf", grid(-6.0, 6.0), Real::erf, libm::erf, false) < 2f64.powi(-21));
    }

    #[test]
    fn the_ends_of_the_range() {
        assert_eq!(Real::exp(0f32), 1.0);
        assert_eq!(Real::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(Real::exp(-1000f32), 0.0);
        assert_eq!(Real::exp(1000f32), f32::INFINITY);
        assert!(Real::exp(f32::NAN).is_nan() && Real::tanh(f32::NAN).is_nan() && Real::erf(f32::NAN).is_nan());
        assert_eq!((Real::tanh(100f32), Real::tanh(-100f32)), (1.0, -1.0));
    }
}
