//! The worst distribution within a Kullback-Leibler ball (the constrained form of arXiv 2306.09222, Proposition 3.1).
//!
//! `w_i = n softmax(l / gamma)_i` with `gamma` the root of `KL(softmax(l / gamma) || uniform) = radius`. If the radius
//! is larger than the divergence of every such distribution, all weight is on the largest losses.

use super::batch::Batch;
use super::blocks::{BlockSum, Extent, measure_where, put_on, sum};
use super::compensated::Compensated;
use super::kl::{Exponent, softmax};
use super::member::Member;
use crate::numeric::{Isa, MulAdd, Real, exp};
use std::mem::MaybeUninit;

/// The settings of the ball.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KlBall {
    /// Its radius, in nats; >= 0.
    pub radius: f64,
}

impl Member for KlBall {
    const NUMBERS: &'static [&'static str] = &["radius"];

    fn from_numbers(numbers: &[f64]) -> Self {
        Self { radius: numbers[0] }
    }

    fn is_pointwise(&self) -> bool {
        false
    }

    fn weigh<W: Real>(&self, batch: &Batch, _: &mut [Vec<f64>], weights: &mut [MaybeUninit<W>]) {
        let extent = Extent::of(batch);
        match temperature(batch, self.radius, extent) {
            Some(exponent) => softmax(batch, weights, exponent),
            None => put_on(extent.max, batch, weights),
        }
    }
}

/// The smallest loss above `-inf`, and the measure of the losses above `-inf`.
#[derive(Clone, Copy)]
struct Above;

impl BlockSum for Above {
    type Sum = Option<(f64, Compensated)>;

    #[inline(always)]
    fn sum<I: Isa>(&self, block: &mut [f64], measure: Option<&[f64]>) -> Option<(f64, Compensated)> {
        if let Some(measure) = measure {
            for (l, &p) in block.iter_mut().zip(measure) {
                *l = if p == 0.0 { f64::NEG_INFINITY } else { *l };
            }
        }
        let above = block.iter().filter(|&&l| l > f64::NEG_INFINITY);
        let smallest = above.copied().fold(f64::INFINITY, f64::min);
        Some((smallest, measure_where(block, measure, |l| l > f64::NEG_INFINITY)))
    }

    fn join(a: Option<(f64, Compensated)>, b: Option<(f64, Compensated)>) -> Option<(f64, Compensated)> {
        let (Some(a), Some(b)) = (a, b) else { return a.or(b) };
        Some((a.0.min(b.0), a.1.join(b.1)))
    }
}

/// `sum_i p_i e_i`, `sum_i p_i e_i z_i` and `sum_i p_i e_i z_i^2`, for `e = exp(z)` of exponents `z <= 0`.
#[derive(Clone, Copy)]
struct Moments(Exponent);

impl BlockSum for Moments {
    type Sum = [Compensated; 3];

    #[inline(always)]
    fn sum<I: Isa>(&self, block: &mut [f64], measure: Option<&[f64]>) -> [Compensated; 3] {
        let mut products = vec![0.0; 2 * block.len()];
        let (ez, ezz) = products.split_at_mut(block.len());
        for ((l, ez), ezz) in block.iter_mut().zip(&mut *ez).zip(&mut *ezz) {
            let (z, lo) = self.0.at::<I>(*l);
            let e = exp::<I>(z, lo, 1.0);
            // e = 0 stands for z = -inf, and e z for its limit.
            *ez = if e == 0.0 { 0.0 } else { e * z };
            *ezz = if e == 0.0 { 0.0 } else { *ez * z };
            *l = e;
        }
        // `map` of an array would not be inlined into the code of the instruction set.
        [
            Compensated::measured(block, measure),
            Compensated::measured(ez, measure),
            Compensated::measured(ezz, measure),
        ]
    }

    fn join(a: [Compensated; 3], b: [Compensated; 3]) -> [Compensated; 3] {
        std::array::from_fn(|k| a[k].join(b[k]))
    }
}

/// `KL(q || p)` and the variance of `v` under `q`, for `v = log(q / p)`: the divergence is the mean of
/// `phi(v) = v exp(v) - exp(v) + 1 >= 0`, a sum without cancellation. Losses of `-inf` are left out.
#[derive(Clone, Copy)]
struct Divergence {
    exponent: Exponent,
    log_mean: f64,
}

impl BlockSum for Divergence {
    type Sum = [Compensated; 3];

    #[inline(always)]
    fn sum<I: Isa>(&self, block: &mut [f64], measure: Option<&[f64]>) -> [Compensated; 3] {
        // phi(v) = v^2 (1/2 + v/3 + v^2/8 + ...): the series sum over k >= 2 of (k - 1) / k! v^k.
        const SERIES: [f64; 9] = [
            0.5,
            1.0 / 3.0,
            0.125,
            1.0 / 30.0,
            1.0 / 144.0,
            1.0 / 840.0,
            1.0 / 5760.0,
            1.0 / 45360.0,
            1.0 / 403_200.0,
        ];
        let mut products = vec![0.0; 2 * block.len()];
        let (vw, vvw) = products.split_at_mut(block.len());
        for ((l, vw), vvw) in block.iter_mut().zip(&mut *vw).zip(&mut *vvw) {
            let (hi, lo) = self.exponent.at::<I>(*l);
            let v = (hi - self.log_mean) + lo;
            let w = exp::<I>(v, 0.0, 1.0);
            // w = 0 stands for v = -inf, and v w for its limit.
            *vw = if w == 0.0 { 0.0 } else { v * w };
            *vvw = if w == 0.0 { 0.0 } else { v * *vw };
            let mut q = SERIES[8];
            let mut k = 8;
            while k > 0 {
                k -= 1;
                q = MulAdd::mul_add::<I>(q, v, SERIES[k]);
            }
            let phi = if v.abs() < 0.1 { v * v * q } else { *vw - w + 1.0 };
            *l = if *l == f64::NEG_INFINITY { 0.0 } else { phi };
        }
        [
            Compensated::measured(block, measure),
            Compensated::measured(vw, measure),
            Compensated::measured(vvw, measure),
        ]
    }

    fn join(a: [Compensated; 3], b: [Compensated; 3]) -> [Compensated; 3] {
        std::array::from_fn(|k| a[k].join(b[k]))
    }
}

/// The power of two in which losses of this extent are measured, so that neither their range nor the inverse
/// temperature overflows.
fn power_of_two_for(extent: Extent) -> f64 {
    let range = extent.max - extent.min;
    if range > 1e300 {
        2f64.powi(-64)
    } else if range < 1e-280 {
        2f64.powi(128)
    } else {
        1.0
    }
}

/// The exponent `beta (l - max l)` with the inverse temperature `beta = 1 / gamma` at which the divergence of `q_i =
/// p_i exp(beta l_i) / sum_j p_j exp(beta l_j)` from `p` is the radius; `None` if the ball contains the distribution on
/// the largest losses alone, or if these are infinite. `beta` is NaN if a loss is NaN. Losses of `-inf` have weight 0
/// at any `beta > 0`. This uses `log(n / k)` of the radius, if the other losses have the measure `k` of `n`. If no
/// radius remains, `beta` is next to 0, and the other losses have equal weights.
///
/// `KL` grows with `beta`, from 0 to `log(n / m)`, where `m` is the measure of the largest losses. Newton's iteration
/// solves `sqrt(KL) = sqrt(radius)`, which is nearly linear in `beta` if `KL` is small, or
/// `log(limit - KL) = log(limit - radius)`, which is nearly linear near the limit. Every evaluation tightens a bracket
/// of the root, and steps stay within it. With a far outlier `KL` has a flat part: there `beta` is large enough to
/// separate the outlier from the other losses, and too small to separate these. Newton's step is too long there. So a
/// step upwards is limited to a factor, which is squared each time, and a wide bracket is halved in the logarithm.
fn temperature(batch: &Batch, mut radius: f64, mut extent: Extent) -> Option<Exponent> {
    let mut n = batch.total;
    let constant = |scale| Exponent { tau: f64::INFINITY, scale, origin: 0.0, power_of_two: 1.0 };
    if extent.max.is_nan() {
        return Some(constant(f64::NAN));
    }
    if radius == 0.0 || extent.min == extent.max {
        return Some(constant(0.0));
    }
    if extent.max.is_infinite() {
        return None;
    }
    if extent.min.is_infinite() {
        let (min, above) = sum(batch, Above).unwrap_or_default();
        extent.min = min;
        radius += (above.value() / n).ln();
        n = above.value();
    }
    let limit = (n / extent.at_max.value()).ln();
    if radius >= limit || extent.min == extent.max {
        return None;
    }
    let power_of_two = power_of_two_for(extent);
    let exponent =
        |scale| Exponent { tau: f64::INFINITY, scale, origin: power_of_two * extent.max, power_of_two };
    if radius <= 0.0 {
        return Some(exponent(f64::MIN_POSITIVE));
    }
    let range = power_of_two * extent.max - power_of_two * extent.min;
    let (mut low, mut high) = (0.0, f64::INFINITY);
    // The `beta` at which a two-point distribution of this range would have the radius.
    let mut beta = (8.0 * radius).sqrt() / range;
    let mut growth: f64 = 16.0;
    for _ in 0..200 {
        let exponent = exponent(beta);
        let [total, first, second] = sum(batch, Moments(exponent)).map(Compensated::value);
        let (log_mean, mean) = ((total / n).ln(), first / total);
        let (mut kl, mut variance) = (mean - log_mean, second / total - mean * mean);
        // The difference has lost digits. Near the root, and where few are left, it is computed without one.
        if kl < 1e-9 || (kl - radius).abs() < 1e-6 * radius + 1e-9 || limit - kl < 1e-6 * limit {
            let [exact, mean, square] = sum(batch, Divergence { exponent, log_mean }).map(|s| s.value() / n);
            (kl, variance) = (exact, square - mean * mean);
        }
        if kl < radius {
            low = beta;
        } else {
            high = beta;
        }
        let slope = variance / beta;
        let gap = (limit - kl) / (limit - radius);
        let step = if kl < 0.5 * limit {
            2.0 * kl.sqrt() * (radius.sqrt() - kl.sqrt()) / slope
        } else {
            gap.ln() * (limit - kl) / slope
        };
        let mut next = beta + step;
        if !(next > low && next < high) {
            next = if high.is_infinite() {
                f64::INFINITY
            } else if high > 4.0 * low && low > 0.0 {
                low.sqrt() * high.sqrt()
            } else {
                0.5 * (low + high)
            };
        }
        if next > growth * beta {
            next = growth * beta;
            growth *= growth;
        }
        if (kl - radius).abs() <= 1e-15 * radius || (next - beta).abs() <= 2e-16 * beta {
            // A last step of some units in the last place removes the error that the test above allows.
            let close = (next - beta).abs() <= 4e-15 * beta;
            return Some(if close { Exponent { scale: next, ..exponent } } else { exponent });
        }
        // All losses but the largest have weight zero already: the root is within the last bit below the limit.
        if beta.is_infinite() || (low > 0.0 && high <= low * (1.0 + 4e-16)) {
            break;
        }
        beta = next;
    }
    if beta.is_finite() { Some(exponent(beta)) } else { None }
}
