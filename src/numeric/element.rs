//! The float types of tensors, and the float types that kernels compute in.
//!
//! Kernels compute `f32` and `f64` in their own type. `bf16` and `f16` are converted to `f32` when they are read, which
//! is exact, and rounded to the nearest value when they are written. No conversion has a branch.

use super::exp_ln::{exp_nonpositive_f32, exp_nonpositive_f64, exp_of_f32, exp_of_f64};
use super::isa::{Isa, MulAdd};
use half::{bf16, f16};
use std::ops::{Add, AddAssign, Div, Mul, Sub};

/// A float the kernels compute in: `f32` or `f64`.
pub trait Real:
    Element<Real = Self>
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + AddAssign
    + MulAdd
    + Default
{
    /// Negative infinity.
    const NEG_INFINITY: Self;
    /// Rounds to the nearest value.
    fn from_f64(x: f64) -> Self;
    /// Exact.
    fn to_f64(self) -> f64;
    /// `exp(self)` for `self <= 0`, to 2 ulp; results below the smallest normal number are 0, NaN stays NaN.
    #[must_use]
    fn exp_nonpositive<I: Isa>(self) -> Self;
    /// `exp(hi + lo)`, where `lo` is at most a few ulp of `hi`: a number of this type, to 2 ulp of it. NaN stays NaN.
    #[must_use]
    fn exp_of<I: Isa>(hi: f64, lo: f64) -> f64;
}

/// A float type of tensors, with the float type that kernels compute in.
pub trait Element: Copy + Send + Sync + 'static {
    /// The type of sums and intermediate results.
    type Real: Real;
    /// Exact.
    fn widen(self) -> Self::Real;
    /// Rounds to the nearest value, ties to even.
    fn narrow(x: Self::Real) -> Self;
    /// The same address where `Self` is `Self::Real`; `None` for a type that must be widened first.
    fn as_real(address: *mut Self) -> Option<*mut Self::Real>;
}

macro_rules! real {
    ($t:ident, $exp_nonpositive:ident, $exp_of:ident) => {
        impl Element for $t {
            type Real = Self;
            #[inline(always)]
            fn widen(self) -> Self {
                self
            }
            #[inline(always)]
            fn narrow(x: Self) -> Self {
                x
            }
            #[inline(always)]
            fn as_real(address: *mut Self) -> Option<*mut Self> {
                Some(address)
            }
        }

        impl Real for $t {
            const NEG_INFINITY: Self = $t::NEG_INFINITY;

            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                x as $t
            }

            #[inline(always)]
            fn to_f64(self) -> f64 {
                self as f64
            }

            #[inline(always)]
            fn exp_nonpositive<I: Isa>(self) -> Self {
                $exp_nonpositive::<I>(self)
            }

            #[inline(always)]
            fn exp_of<I: Isa>(hi: f64, lo: f64) -> f64 {
                $exp_of::<I>(hi, lo)
            }
        }
    };
}

real!(f32, exp_nonpositive_f32, exp_of_f32);
real!(f64, exp_nonpositive_f64, exp_of_f64);

impl Element for bf16 {
    type Real = f32;
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        Self::from_bits((if x.is_nan() { quiet } else { rounded }) as u16)
    }
    #[inline(always)]
    fn as_real(_: *mut Self) -> Option<*mut f32> {
        None
    }
}

impl Element for f16 {
    type Real = f32;
    #[inline(always)]
    fn widen(self) -> f32 {
        // Shifting exponent and mantissa into place leaves the exponent 112 too small. Multiplying by 2^112 corrects
        // this, for subnormal numbers too.
        const BIAS: f32 = f32::from_bits((127 + 112) << 23);
        let magnitude = u32::from(self.to_bits() & 0x7fff) << 13;
        let finite = (f32::from_bits(magnitude) * BIAS).to_bits();
        let special = magnitude | 0x7f80_0000;
        let value = if magnitude >= 0x0f80_0000 { special } else { finite };
        f32::from_bits(value | (u32::from(self.to_bits() & 0x8000) << 16))
    }
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        let bits = x.to_bits();
        let magnitude = bits & 0x7fff_ffff;
        // Below 2^-14 the result is subnormal: adding 1/2 rounds at its last place, 2^-24.
        let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0x3f00_0000);
        let odd = (magnitude >> 13) & 1;
        let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0x0fff + odd) >> 13;
        let special = if magnitude > 0x7f80_0000 { 0x7e00 } else { 0x7c00 };
        let value = if magnitude >= 0x477f_f000 {
            special
        } else if magnitude < 0x3880_0000 {
            subnormal
        } else {
            normal
        };
        Self::from_bits((value | ((bits >> 16) & 0x8000)) as u16)
    }
    #[inline(always)]
    fn as_real(_: *mut Self) -> Option<*mut f32> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_types_widen_exactly_and_narrow_to_the_nearest() {
        for bits in 0..=u16::MAX {
            let (h, b) = (f16::from_bits(bits), bf16::from_bits(bits));
            assert!(h.widen() == h.to_f32() || (h.is_nan() && h.widen().is_nan()));
            assert!(b.widen() == b.to_f32() || (b.is_nan() && b.widen().is_nan()));
            assert_eq!(h.widen().is_sign_negative(), h.is_sign_negative());
        }
        for i in 0..2_000_003u32 {
            let x = f32::from_bits(i.wrapping_mul(2147));
            let (h, b) = (<f16 as Element>::narrow(x), <bf16 as Element>::narrow(x));
            if x.is_nan() {
                assert!(h.is_nan() && b.is_nan());
            } else {
                assert_eq!(h.to_bits(), f16::from_f32(x).to_bits(), "{x}");
                assert_eq!(b.to_bits(), bf16::from_f32(x).to_bits(), "{x}");
            }
        }
        for x in [65519.996, 65520.0, 65504.0, 6.1e-5, 5.96e-8, 2.98e-8, 2.99e-8, f32::INFINITY, -0.0] {
            assert_eq!(<f16 as Element>::narrow(x).to_bits(), f16::from_f32(x).to_bits(), "{x}");
        }
    }
}
