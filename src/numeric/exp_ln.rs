//! `exp` and `ln` by polynomials, without branches, and sums and products with their rounding errors.
//!
//! `exp(x) = 2^n exp(r)` with `n = round(x / ln 2)` and `|r| <= ln(2) / 2`, where `exp(r)` is its Taylor series or, in
//! `f32`, a polynomial of one term less that has the smallest largest error, `4e-9` of the result;
//! `ln(2^e m) = e ln 2 + ln m` with `m` in `[sqrt(1/2), sqrt(2))`, where `ln m` is a series in `(m - 1) / (m + 1)`.

use super::isa::{Isa, MulAdd};

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

macro_rules! exp_nonpositive {
    ($name:ident, $t:ident, $bits:ident, mantissa $mantissa:literal, ln2 $ln2_hi:literal $ln2_lo:literal,
     min $min:literal, series $series:expr) => {
        #[inline(always)]
        pub(super) fn $name<I: Isa>(x: $t) -> $t {
            const ROUND: $t = 1.5 * (1u64 << $mantissa) as $t;
            const ONE: $bits = (1.0 as $t).to_bits();
            const SERIES: &[$t] = &$series;
            let t = MulAdd::mul_add::<I>(x, std::$t::consts::LOG2_E, ROUND);
            let n = t - ROUND;
            let r = MulAdd::mul_add::<I>(n, -$ln2_hi, x);
            let r = MulAdd::mul_add::<I>(n, -$ln2_lo, r);
            let mut q = SERIES[SERIES.len() - 1];
            let mut k = SERIES.len() - 1;
            while k > 0 {
                k -= 1;
                q = MulAdd::mul_add::<I>(q, r, SERIES[k]);
            }
            let p = MulAdd::mul_add::<I>(r * r, q, r) + 1.0;
            let power = $t::from_bits((t.to_bits() << $mantissa).wrapping_add(ONE));
            if x < $min { 0.0 } else { p * power }
        }
    };
}

/// `(exp(r) - 1 - r) / r^2` in `f32`.
const MINIMAX: [f32; 5] = [0.499_999_94, 0.166_665_21, 0.041_668_39, 0.008_368_711, 0.001_381_461_4];

// ln 2 in two parts, the first with enough trailing zeros that its product with n is exact.
exp_nonpositive!(exp_nonpositive_f32, f32, u32, mantissa 23, ln2 0.693_359_4 -2.121_944_4e-4,
                 min -87.336_54, series MINIMAX);
exp_nonpositive!(exp_nonpositive_f64, f64, u64, mantissa 52,
                 ln2 6.931_471_803_691_238e-1 1.908_214_929_270_587_7e-10, min -708.396_418_532_264_1,
                 series taylor!(f64, 12));

/// `factor * exp(hi + lo)` for any `hi`, a `lo` of at most a few ulp of it and a `factor` from 1 to `2^60`, to 2 ulp
/// over the whole range of `f64`, subnormal results included.
#[inline(always)]
#[must_use]
pub fn exp<I: Isa>(hi: f64, lo: f64, factor: f64) -> f64 {
    const ROUND: f64 = 1.5 * (1u64 << 52) as f64;
    const ONE: u64 = 1.0f64.to_bits();
    const TAYLOR: [f64; 12] = taylor!(f64, 12);
    let power = |n: f64| f64::from_bits(((n + ROUND).to_bits() << 52).wrapping_add(ONE));
    let n = MulAdd::mul_add::<I>(hi, std::f64::consts::LOG2_E, ROUND) - ROUND;
    let r = MulAdd::mul_add::<I>(n, -6.931_471_803_691_238e-1, hi);
    let r_lo = MulAdd::mul_add::<I>(n, -1.908_214_929_270_587_7e-10, lo);
    let r = r + r_lo;
    let mut q = TAYLOR[11];
    let mut k = 11;
    while k > 0 {
        k -= 1;
        q = MulAdd::mul_add::<I>(q, r, TAYLOR[k]);
    }
    let p = MulAdd::mul_add::<I>(r * r, q, r) + 1.0;
    // 2^n is two factors, since n may exceed the exponents of normal numbers. Only the last product can be subnormal.
    let half = MulAdd::mul_add::<I>(n, 0.5, ROUND) - ROUND;
    let y = p * factor * power(half) * power(n - half);
    if hi > 709.79 {
        f64::INFINITY
    } else if hi < -800.0 {
        0.0
    } else {
        y
    }
}

/// `exp(x)` in `f32`, to 1 ulp over its whole range, subnormal results included; NaN stays. Only the polynomial is
/// computed in `f32`, for `x` has many digits to lose.
#[inline(always)]
#[must_use]
pub fn exp_to_f32<I: Isa>(x: f64) -> f32 {
    const ROUND: f64 = 1.5 * (1u64 << 52) as f64;
    // Beyond, the result is infinite or 0.
    let x = if x > 100.0 { 100.0 } else { x };
    let x = if x < -110.0 { -110.0 } else { x };
    let t = MulAdd::mul_add::<I>(x, std::f64::consts::LOG2_E, ROUND);
    let r = MulAdd::mul_add::<I>(t - ROUND, -std::f64::consts::LN_2, x) as f32;
    let mut q = MINIMAX[4];
    let mut k = 4;
    while k > 0 {
        k -= 1;
        q = MulAdd::mul_add::<I>(q, r, MINIMAX[k]);
    }
    let p = MulAdd::mul_add::<I>(r * r, q, r) + 1.0;
    // 2^n is two factors, as in `exp`. The last bits of `t` are `n`.
    let n = t.to_bits() as i32;
    let half = n >> 1;
    let power = |k: i32| f32::from_bits((k.wrapping_add(127) as u32) << 23);
    p * power(half) * power(n.wrapping_sub(half))
}

#[inline(always)]
pub(super) fn exp_of_f32<I: Isa>(hi: f64, _: f64) -> f64 {
    f64::from(exp_to_f32::<I>(hi))
}

#[inline(always)]
pub(super) fn exp_of_f64<I: Isa>(hi: f64, lo: f64) -> f64 {
    exp::<I>(hi, lo, 1.0)
}

/// `exp(x) - 1` for `x <= 0`, to 2 ulp; NaN stays.
#[inline(always)]
#[must_use]
pub fn exp_m1_nonpositive<I: Isa>(x: f64) -> f64 {
    const ROUND: f64 = 1.5 * (1u64 << 52) as f64;
    const ONE: u64 = 1.0f64.to_bits();
    const TAYLOR: [f64; 12] = taylor!(f64, 12);
    // Below, the result is -1.
    let x = if x < -40.0 { -40.0 } else { x };
    let t = MulAdd::mul_add::<I>(x, std::f64::consts::LOG2_E, ROUND);
    let n = t - ROUND;
    let r = MulAdd::mul_add::<I>(n, -6.931_471_803_691_238e-1, x);
    let r = MulAdd::mul_add::<I>(n, -1.908_214_929_270_587_7e-10, r);
    let mut q = TAYLOR[11];
    let mut k = 11;
    while k > 0 {
        k -= 1;
        q = MulAdd::mul_add::<I>(q, r, TAYLOR[k]);
    }
    // exp(x) - 1 = 2^n (exp(r) - 1) + (2^n - 1)
    let power = f64::from_bits((t.to_bits() << 52).wrapping_add(ONE));
    MulAdd::mul_add::<I>(power, MulAdd::mul_add::<I>(r * r, q, r), power - 1.0)
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
        r = MulAdd::mul_add::<I>(r, z, SERIES[k]);
    }
    let half_square = 0.5 * f * f;
    let tail =
        MulAdd::mul_add::<I>(s, MulAdd::mul_add::<I>(r, z, half_square), e * 1.908_214_929_270_587_7e-10);
    let y = MulAdd::mul_add::<I>(e, 6.931_471_803_691_238e-1, f - (half_square - tail));
    if x < f64::INFINITY { y } else { x }
}

/// `a * b` as a rounded product and its rounding error.
#[inline(always)]
#[must_use]
pub fn two_product<I: Isa>(a: f64, b: f64) -> (f64, f64) {
    /// `2^970`: larger factors are split at `2^-60` of their size.
    const HUGE: f64 = f64::from_bits((1023 + 970) << 52);
    const DOWN: f64 = f64::from_bits((1023 - 60) << 52);
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
        // The split of a factor near the largest numbers overflows. So it is multiplied by a power of two, which
        // multiplies the error of the product by the same power, exactly.
        let smaller = |x: f64| if x.abs() > HUGE { x * DOWN } else { x };
        let by = if a.abs() > HUGE || b.abs() > HUGE { DOWN } else { 1.0 };
        let ((a1, a2), (b1, b2)) = (split(smaller(a)), split(smaller(b)));
        (((a1 * b1 - p * by) + a1 * b2 + a2 * b1) + a2 * b2) / by
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
    use super::super::element::Real;
    #[cfg(not(target_arch = "aarch64"))]
    use super::super::isa::Baseline;
    use super::super::isa::{Fused, Kernel, dispatch};
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

    struct ExpTo32(Vec<f64>);
    impl Kernel for ExpTo32 {
        type Output = Vec<f32>;
        #[inline(always)]
        fn run<I: Isa>(self) -> Vec<f32> {
            self.0.iter().map(|&x| exp_to_f32::<I>(x)).collect()
        }
    }

    struct ExpM1(Vec<f64>);
    impl Kernel for ExpM1 {
        type Output = Vec<f64>;
        #[inline(always)]
        fn run<I: Isa>(self) -> Vec<f64> {
            self.0.iter().map(|&x| exp_m1_nonpositive::<I>(x)).collect()
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

    struct Products(Vec<(f64, f64)>);
    impl Kernel for Products {
        type Output = Vec<(f64, f64)>;
        #[inline(always)]
        fn run<I: Isa>(self) -> Vec<(f64, f64)> {
            self.0.iter().map(|&(a, b)| two_product::<I>(a, b)).collect()
        }
    }

    #[test]
    fn the_error_of_a_product_is_the_same_on_every_isa_for_factors_of_every_size() {
        let third = 1.0 / 3.0;
        let factors: Vec<(f64, f64)> = (-300..=308)
            .flat_map(|k| {
                let x = third * 10f64.powi(k);
                [(x, third), (third, x), (x, 0.7 / x), (-0.7 / x, x), (x, 0.0), (x, f64::INFINITY)]
            })
            .chain([(f64::MAX, third), (third, f64::MAX), (f64::MAX, 2.0), (1e305, 1e-305)])
            .collect();
        let [fused, plain, chosen] = on_every_isa!(Products(factors.clone()));
        for (i, factors) in factors.iter().enumerate() {
            let (p, error) = fused[i];
            assert!(error.abs() <= p.abs() * f64::EPSILON || p.is_nan(), "{factors:?}");
            // Without FMA, errors of products near the smallest numbers cannot be represented.
            if p.abs() > 1e-280 || p == 0.0 {
                assert_eq!([plain[i], chosen[i]], [(p, error); 2], "{factors:?}");
            }
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
    fn exp_to_f32_is_within_one_ulp_over_the_whole_range() {
        let xs: Vec<f64> = (0..400_000).map(|i| f64::from(i) * 5e-4 - 106.0).collect();
        for ys in on_every_isa!(ExpTo32(xs.clone())) {
            for (&x, &y) in xs.iter().zip(&ys) {
                let (exact, nearest) = (x.exp(), x.exp() as f32);
                let ulp = f64::from(f32::from_bits(nearest.to_bits() + 1)) - f64::from(nearest);
                let fits = (f64::from(y) - exact).abs() <= ulp || (y == nearest && nearest.is_infinite());
                assert!(fits, "{x}: {y} {exact}");
            }
        }
        let edges = vec![f64::NAN, f64::NEG_INFINITY, f64::INFINITY, 1e300, -1e300, 0.0];
        for ys in on_every_isa!(ExpTo32(edges.clone())) {
            assert!(ys[0].is_nan());
            assert_eq!(ys[1..], [0.0, f32::INFINITY, f32::INFINITY, 0.0, 1.0]);
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
    fn exp_m1_is_within_two_ulp_from_zero_downwards() {
        let far: Vec<f64> = (0..200_000).map(|i| -(f64::from(i)) * 2.5e-4).collect();
        let near_zero: Vec<f64> = (0..3000).map(|i| -(f64::from(i) * -0.2).exp()).collect();
        for xs in [far, near_zero] {
            for ys in on_every_isa!(ExpM1(xs.clone())) {
                for (&x, &y) in xs.iter().zip(&ys) {
                    assert!(ulps(y, x.exp_m1()) <= 2.0, "{x}: {y} {}", x.exp_m1());
                }
            }
        }
        for ys in on_every_isa!(ExpM1(vec![f64::NAN, f64::NEG_INFINITY, -0.0, -1e308])) {
            assert!(ys[0].is_nan());
            assert_eq!(ys[1..], [-1.0, 0.0, -1.0]);
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
}
