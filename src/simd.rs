//! Lane arithmetic: element types, the exponential and the logarithm, and one choice of instruction set at run time.
//!
//! A kernel is ordinary Rust over short arrays of lanes. [`dispatch`] compiles it once per instruction set, inside a
//! function with that set's `#[target_feature]`s, so that the compiler turns the lane loops into vector instructions,
//! and picks the widest the processor has. AVX2 and AVX-512 have the same lanes and both fuse multiplication and
//! addition, so they give the same bits.

use half::{bf16, f16};
use std::ops::{Add, AddAssign, Div, Mul, Sub};

/// Lanes of one step of a kernel, for every element type.
pub const LANES: usize = 16;

/// An instruction set, as far as arithmetic depends on it.
pub trait Isa: Copy {
    /// Whether `a * b + c` is one instruction.
    const FMA: bool;
}

/// A computation that [`dispatch`] compiles for each instruction set. `run` must be `#[inline(always)]`.
pub trait Kernel {
    /// What it returns.
    type Output;
    /// The computation.
    fn run<I: Isa>(self) -> Self::Output;
}

#[derive(Clone, Copy)]
struct Fused;

impl Isa for Fused {
    const FMA: bool = true;
}

#[cfg(not(target_arch = "aarch64"))]
#[derive(Clone, Copy)]
struct Baseline;

#[cfg(not(target_arch = "aarch64"))]
impl Isa for Baseline {
    const FMA: bool = false;
}

/// Runs a kernel with the widest instruction set this processor has.
#[inline]
pub fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        fn avx512<K: Kernel>(kernel: K) -> K::Output {
            kernel.run::<Fused>()
        }
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2<K: Kernel>(kernel: K) -> K::Output {
            kernel.run::<Fused>()
        }
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                // SAFETY: the processor was just asked for every feature the function enables.
                return unsafe { avx512(kernel) };
            }
            // SAFETY: as above.
            return unsafe { avx2(kernel) };
        }
        kernel.run::<Baseline>()
    }
    // NEON and its fused multiply-add are part of every aarch64 target.
    #[cfg(target_arch = "aarch64")]
    {
        kernel.run::<Fused>()
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        kernel.run::<Baseline>()
    }
}

/// A float the kernels compute in: `f32` or `f64`.
pub trait Real:
    Element<Real = Self>
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + AddAssign
    + Default
{
    /// Negative infinity.
    const NEG_INFINITY: Self;
    /// Rounds to the nearest value.
    fn from_f64(x: f64) -> Self;
    /// Exact.
    fn to_f64(self) -> f64;
    /// `self * a + b`, rounded once where the instruction set can.
    #[must_use]
    fn mul_add<I: Isa>(self, a: Self, b: Self) -> Self;
    /// `exp(self)` for `self <= 0`, to 2 ulp; results below the smallest normal number are 0, NaN stays NaN.
    #[must_use]
    fn exp_nonpositive<I: Isa>(self) -> Self;
}

/// A float as it lies in memory, with the float it is computed in.
pub trait Element: Copy + Send + Sync + 'static {
    /// The type of sums and intermediate results.
    type Real: Real;
    /// Exact.
    fn widen(self) -> Self::Real;
    /// Rounds to the nearest value, ties to even.
    fn narrow(x: Self::Real) -> Self;
    /// The same address, if what lies there is computed in as it is.
    fn as_real(address: *mut Self) -> Option<*mut Self::Real>;
}

macro_rules! real {
    ($t:ident, $bits:ident, mantissa $mantissa:literal, ln2 $ln2_hi:literal $ln2_lo:literal, min $min:literal,
     terms $terms:literal) => {
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
            fn mul_add<I: Isa>(self, a: Self, b: Self) -> Self {
                if I::FMA { $t::mul_add(self, a, b) } else { self * a + b }
            }

            #[inline(always)]
            fn exp_nonpositive<I: Isa>(self) -> Self {
                // exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2) / 2; exp(r) by its Taylor series.
                const ROUND: $t = 1.5 * (1u64 << $mantissa) as $t;
                const ONE: $bits = (1.0 as $t).to_bits();
                const TAYLOR: [$t; $terms] = taylor!($t, $terms);
                let t = Real::mul_add::<I>(self, std::$t::consts::LOG2_E, ROUND);
                let n = t - ROUND;
                let r = Real::mul_add::<I>(n, -$ln2_hi, self);
                let r = Real::mul_add::<I>(n, -$ln2_lo, r);
                let mut q = TAYLOR[$terms - 1];
                let mut k = $terms - 1;
                while k > 0 {
                    k -= 1;
                    q = Real::mul_add::<I>(q, r, TAYLOR[k]);
                }
                let p = Real::mul_add::<I>(r * r, q, r) + 1.0;
                let power = $t::from_bits((t.to_bits() << $mantissa).wrapping_add(ONE));
                if self < $min { 0.0 } else { p * power }
            }
        }
    };
}

/// `1/2!, 1/3!, ...`: the Taylor series of `(exp(r) - 1 - r) / r^2`.
macro_rules! taylor {
    ($t:ident, $terms:literal) => {{
        let mut c = [0.0; $terms];
        let (mut factorial, mut k) = (1.0f64, 0);
        while k < $terms {
            factorial *= (k + 2) as f64;
            c[k] = (1.0 / factorial) as $t;
            k += 1;
        }
        c
    }};
}

// ln 2 in two parts, the first with enough trailing zeros that its product with n is exact.
real!(f32, u32, mantissa 23, ln2 0.693_359_4 -2.121_944_4e-4, min -87.336_54, terms 6);
real!(f64, u64, mantissa 52, ln2 6.931_471_803_691_238e-1 1.908_214_929_270_587_7e-10, min -708.396_418_532_264_1,
      terms 12);

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
        // Shifting exponent and mantissa into place leaves the exponent 112 too small; multiplying by 2^112 mends that
        // for normal and subnormal numbers alike.
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

/// `factor * exp(hi + lo)` for any `hi`, a `lo` of at most a few ulp of it and a `factor` from 1 to `2^60`, to 2 ulp over
/// the whole range of `f64`, subnormal results included.
#[inline(always)]
#[must_use]
pub fn exp<I: Isa>(hi: f64, lo: f64, factor: f64) -> f64 {
    const ROUND: f64 = 1.5 * (1u64 << 52) as f64;
    const ONE: u64 = 1.0f64.to_bits();
    const TAYLOR: [f64; 12] = taylor!(f64, 12);
    let power = |n: f64| f64::from_bits(((n + ROUND).to_bits() << 52).wrapping_add(ONE));
    let n = Real::mul_add::<I>(hi, std::f64::consts::LOG2_E, ROUND) - ROUND;
    let r = Real::mul_add::<I>(n, -6.931_471_803_691_238e-1, hi);
    let r_lo = Real::mul_add::<I>(n, -1.908_214_929_270_587_7e-10, lo);
    let r = r + r_lo;
    let mut q = TAYLOR[11];
    let mut k = 11;
    while k > 0 {
        k -= 1;
        q = Real::mul_add::<I>(q, r, TAYLOR[k]);
    }
    let p = Real::mul_add::<I>(r * r, q, r) + 1.0;
    // 2^n in two factors, for n reaches past the exponents of normal numbers; only the last product can be subnormal.
    let half = Real::mul_add::<I>(n, 0.5, ROUND) - ROUND;
    let y = p * factor * power(half) * power(n - half);
    if hi > 709.79 {
        f64::INFINITY
    } else if hi < -800.0 {
        0.0
    } else {
        y
    }
}

/// `ln(x)` for `x >= 1`, to 2 ulp; NaN and infinity stay.
#[inline(always)]
#[must_use]
pub fn ln<I: Isa>(x: f64) -> f64 {
    // x = 2^e m, m in [sqrt(1/2), sqrt(2)); ln m = f - f^2/2 + s (f^2/2 + R), f = m - 1, s = f / (2 + f),
    // R = sum over k >= 1 of 2/(2k+1) s^(2k).
    const SQRT_HALF: u64 = std::f64::consts::FRAC_1_SQRT_2.to_bits();
    const SERIES: [f64; 10] = {
        let mut c = [0.0; 10];
        let mut k = 0;
        while k < 10 {
            c[k] = 2.0 / (2 * k + 3) as f64;
            k += 1;
        }
        c
    };
    let exponent = x.to_bits().wrapping_sub(SQRT_HALF) >> 52;
    let m = f64::from_bits(x.to_bits().wrapping_sub(exponent << 52));
    let e = f64::from_bits(exponent | 0x4330_0000_0000_0000) - (1u64 << 52) as f64;
    let f = m - 1.0;
    let s = f / (2.0 + f);
    let z = s * s;
    let mut r = SERIES[9];
    let mut k = 9;
    while k > 0 {
        k -= 1;
        r = Real::mul_add::<I>(r, z, SERIES[k]);
    }
    let half_square = 0.5 * f * f;
    let tail = Real::mul_add::<I>(s, Real::mul_add::<I>(r, z, half_square), e * 1.908_214_929_270_587_7e-10);
    let y = Real::mul_add::<I>(e, 6.931_471_803_691_238e-1, f - (half_square - tail));
    if x < f64::INFINITY { y } else { x }
}

/// `a * b` as a rounded product and its rounding error.
#[inline(always)]
#[must_use]
pub fn two_product<I: Isa>(a: f64, b: f64) -> (f64, f64) {
    let p = a * b;
    let error = if I::FMA {
        a.mul_add(b, -p)
    } else {
        // Veltkamp's split into halves whose products are exact.
        let split = |x: f64| {
            let t = 134_217_729.0 * x;
            let hi = t - (t - x);
            (hi, x - hi)
        };
        let ((a1, a2), (b1, b2)) = (split(a), split(b));
        ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2
    };
    (p, if p.is_finite() { error } else { 0.0 })
}

/// `a - b` as a rounded difference and its rounding error.
#[inline(always)]
#[must_use]
pub fn two_difference(a: f64, b: f64) -> (f64, f64) {
    let d = a - b;
    let bb = d - a;
    let error = (a - (d - bb)) - (b + bb);
    (d, if d.is_finite() { error } else { 0.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Map<F>(F);

    macro_rules! on_every_isa {
        ($kernel:expr) => {{
            let fused = $kernel.run::<Fused>();
            #[cfg(not(target_arch = "aarch64"))]
            let plain = $kernel.run::<Baseline>();
            #[cfg(target_arch = "aarch64")]
            let plain = $kernel.run::<Fused>();
            [fused, plain, dispatch($kernel)]
        }};
    }

    struct Exp32(Vec<f32>);
    impl Kernel for Exp32 {
        type Output = Vec<f32>;
        #[inline(always)]
        fn run<I: Isa>(self) -> Vec<f32> {
            self.0.iter().map(|x| x.exp_nonpositive::<I>()).collect()
        }
    }

    struct Exp64(Vec<f64>);
    impl Kernel for Exp64 {
        type Output = Vec<f64>;
        #[inline(always)]
        fn run<I: Isa>(self) -> Vec<f64> {
            self.0.iter().map(|x| x.exp_nonpositive::<I>()).collect()
        }
    }

    impl Kernel for Map<Vec<(f64, f64)>> {
        type Output = Vec<f64>;
        #[inline(always)]
        fn run<I: Isa>(self) -> Vec<f64> {
            self.0.iter().map(|&(hi, lo)| exp::<I>(hi, lo, 1.0)).collect()
        }
    }

    struct Ln(Vec<f64>);
    impl Kernel for Ln {
        type Output = Vec<f64>;
        #[inline(always)]
        fn run<I: Isa>(self) -> Vec<f64> {
            self.0.iter().map(|&x| ln::<I>(x)).collect()
        }
    }

    fn ulps(a: f64, b: f64) -> f64 {
        if a == b || (a.is_nan() && b.is_nan()) {
            return 0.0;
        }
        ((a - b) / (f64::from_bits(b.abs().to_bits() + 1) - b.abs())).abs()
    }

    #[test]
    fn exp_of_f32_is_within_two_ulp_and_zero_below_the_normal_numbers() {
        let xs: Vec<f32> = (0..=400_000).map(|i| -(i as f32) * 2.5e-4).collect();
        for ys in on_every_isa!(Exp32(xs.clone())) {
            for (&x, &y) in xs.iter().zip(&ys) {
                let exact = f64::from(x).exp();
                if exact < f64::from(f32::MIN_POSITIVE) {
                    assert!(f64::from(y) <= 1.2e-38, "{x}");
                } else {
                    assert!((f64::from(y) / exact - 1.0).abs() < 2.0 * 2f64.powi(-24) * 2.0, "{x}: {y}");
                }
            }
        }
        for ys in on_every_isa!(Exp32(vec![f32::NEG_INFINITY, 0.0, f32::NAN])) {
            assert_eq!(ys[..2], [0.0, 1.0]);
            assert!(ys[2].is_nan());
        }
    }

    #[test]
    fn exp_of_f64_is_within_two_ulp_over_the_whole_range() {
        let xs: Vec<f64> = (0..200_000).map(|i| -(f64::from(i)) * 3.5e-3).collect();
        for ys in on_every_isa!(Exp64(xs.clone())) {
            for (&x, &y) in xs.iter().zip(&ys) {
                assert!(ulps(y, x.exp()) <= 2.0, "{x}: {y} {}", x.exp());
            }
        }
        let pairs: Vec<(f64, f64)> =
            (0..300_000).map(|i| (f64::from(i) * 4.8e-3 - 730.0, 0.0)).filter(|x| x.0 < 709.7).collect();
        for ys in on_every_isa!(Map(pairs.clone())) {
            for (&(x, _), &y) in pairs.iter().zip(&ys) {
                if x > -708.0 {
                    assert!(ulps(y, x.exp()) <= 2.0, "{x}: {y} {}", x.exp());
                } else {
                    assert!((y - x.exp()).abs() <= 1e-323, "{x}");
                }
            }
        }
        let edges =
            [(f64::NAN, 0.0), (f64::NEG_INFINITY, 0.0), (f64::INFINITY, 0.0), (800.0, 0.0), (0.0, 0.0)];
        for ys in on_every_isa!(Map(edges.to_vec())) {
            assert!(ys[0].is_nan());
            assert_eq!(ys[1..], [0.0, f64::INFINITY, f64::INFINITY, 1.0]);
        }
    }

    #[test]
    fn ln_is_within_two_ulp_from_one_upwards() {
        let xs: Vec<f64> = (0..200_000).map(|i| (f64::from(i) * 4e-4).exp()).collect();
        let near_one: Vec<f64> = (0..1000).map(|i| 1.0 + f64::from(i) * 1e-9).collect();
        for xs in [xs, near_one] {
            for ys in on_every_isa!(Ln(xs.clone())) {
                for (&x, &y) in xs.iter().zip(&ys) {
                    assert!(ulps(y, x.ln()) <= 2.0, "{x}: {y} {}", x.ln());
                }
            }
        }
        for ys in on_every_isa!(Ln(vec![f64::NAN, f64::INFINITY, 1.0])) {
            assert!(ys[0].is_nan());
            assert_eq!(ys[1..], [f64::INFINITY, 0.0]);
        }
    }

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
