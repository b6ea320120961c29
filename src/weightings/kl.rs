//! Exponential weights of clipped losses (arXiv 2306.09222, Algorithm 1 and Proposition 3.1).
//!
//! Pointwise: `w_i = exp(s min(l_i, tau))`. Normalised: the same divided by its mean over the batch, computed as
//! `w_i = exp(e_i - max e) sum_j p_j / sum_j p_j exp(e_j - max e)` with `e_i = s min(l_i, tau)`. The scale `s` may be
//! negative, and `tau` infinite.

use super::batch::Batch;
use super::blocks::{BlockMap, BlockSum, Extent, fill, put_on, sum, write};
use super::compensated::Compensated;
use super::member::{Member, Pointwise};
use crate::numeric::{Isa, Real, exp, two_difference, two_product};
use std::mem::MaybeUninit;

/// The settings of exponential weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Kl {
    /// Clipping factor, > 0, may be infinite. A larger loss counts as this one.
    pub tau: f64,
    /// Scaling factor, of either sign.
    pub scale: f64,
    /// Whether weights are divided by their mean.
    pub normalize: bool,
}

impl Member for Kl {
    const NUMBERS: &'static [&'static str] = &["tau", "scale", "normalize"];

    fn from_numbers(numbers: &[f64]) -> Self {
        Self { tau: numbers[0], scale: numbers[1], normalize: numbers[2] != 0.0 }
    }

    fn is_pointwise(&self) -> bool {
        !self.normalize
    }

    #[inline(always)]
    fn pointwise<I: Isa>(&self, losses: &mut [f64]) {
        let exponent = Exponent { tau: self.tau, scale: self.scale, origin: 0.0, power_of_two: 1.0 };
        for l in losses {
            let (hi, lo) = exponent.at::<I>(*l);
            let w = exp::<I>(hi, lo, 1.0);
            // With a scale of zero the weight is 1, also for an infinite loss, for which 0 * inf is NaN.
            *l = if self.scale == 0.0 && !l.is_nan() { 1.0 } else { w };
        }
    }

    fn weigh<W: Real>(&self, batch: &Batch, _: &mut [Vec<f64>], weights: &mut [MaybeUninit<W>]) {
        if !self.normalize {
            return write(batch, weights, Pointwise(*self));
        }
        let extent = Extent::of(batch);
        // The loss with the largest exponent.
        let top = if self.scale < 0.0 { extent.min } else { extent.max };
        let origin = if top > self.tau { self.tau } else { top };
        softmax(batch, weights, Exponent { tau: self.tau, scale: self.scale, origin, power_of_two: 1.0 });
    }
}

/// `scale (min(power_of_two loss, tau) - origin)`.
#[derive(Clone, Copy)]
pub(super) struct Exponent {
    pub tau: f64,
    pub scale: f64,
    pub origin: f64,
    /// A power of two.
    pub power_of_two: f64,
}

impl Exponent {
    /// The exponent of a loss as a rounded number and its rounding error.
    #[inline(always)]
    pub fn at<I: Isa>(&self, loss: f64) -> (f64, f64) {
        let loss = self.power_of_two * loss;
        let clipped = if loss > self.tau { self.tau } else { loss };
        let (difference, error) =
            if self.origin == 0.0 { (clipped, 0.0) } else { two_difference(clipped, self.origin) };
        let (hi, lo) = two_product::<I>(difference, self.scale);
        (hi, lo + error * self.scale)
    }
}

/// `factor exp(exponent)` of each loss.
#[derive(Clone, Copy)]
struct Exponentials {
    exponent: Exponent,
    factor: f64,
}

impl BlockMap for Exponentials {
    #[inline(always)]
    fn apply<I: Isa>(&self, block: &mut [f64]) {
        for l in block {
            let (hi, lo) = self.exponent.at::<I>(*l);
            *l = exp::<I>(hi, lo, self.factor);
        }
    }
}

/// `sum_i p_i exp(exponent_i)`.
#[derive(Clone, Copy)]
pub(super) struct ExpSum(pub Exponent);

impl BlockSum for ExpSum {
    type Sum = Compensated;

    #[inline(always)]
    fn sum<I: Isa>(&self, block: &mut [f64], measure: Option<&[f64]>) -> Compensated {
        Exponentials { exponent: self.0, factor: 1.0 }.apply::<I>(block);
        Compensated::measured(block, measure)
    }

    fn join(a: Compensated, b: Compensated) -> Compensated {
        a.join(b)
    }
}

/// `w_i = exp(exponent_i) / mean_j exp(exponent_j)`. The loss with the largest exponent is the origin of exponents. If
/// it is infinite, all weight is on such losses.
pub(super) fn softmax<W: Real>(batch: &Batch, weights: &mut [MaybeUninit<W>], exponent: Exponent) {
    if exponent.scale == 0.0 && !exponent.origin.is_nan() {
        return fill(batch, weights, 1.0);
    }
    if exponent.origin.is_nan() || exponent.scale.is_nan() {
        return fill(batch, weights, f64::NAN);
    }
    if exponent.origin.is_infinite() {
        return put_on(exponent.origin, batch, weights);
    }
    let total = sum(batch, ExpSum(exponent)).value();
    write(batch, weights, Exponentials { exponent, factor: batch.total / total });
}
