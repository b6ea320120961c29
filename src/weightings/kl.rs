//! Exponential weights of clipped losses (arXiv 2306.09222, Algorithm 1 and Proposition 3.1).
//!
//! Pointwise: `w_i = exp(s min(l_i, tau))`. Normalised: the same divided by its mean over the batch, computed as
//! `w_i = exp(e_i - max e) sum_j p_j / sum_j p_j exp(e_j - max e)` with `e_i = s min(l_i, tau)`. The scale `s` may be
//! negative, and `tau` infinite.

use super::batch::Batch;
use super::blocks::{BlockMap, BlockSum, Extent, fill, put_on, sum, write};
use super::compensated::Compensated;
use super::member::{Member, Pointwise};
use crate::layout::{Shared, f32s};
use crate::numeric::{Isa, Kernel, Real, dispatch, exp, exp_to_f32, two_difference, two_product};
use crate::parallel::for_each_block;
use std::marker::PhantomData;
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
    fn pointwise<W: Real, I: Isa>(&self, losses: &mut [f64]) {
        let exponent = Exponent { tau: self.tau, scale: self.scale, origin: 0.0, power_of_two: 1.0 };
        for l in losses {
            let (hi, lo) = exponent.at::<I>(*l);
            let w = W::exp_of::<I>(hi, lo);
            // With a scale of zero the weight is 1, also for an infinite loss, for which 0 * inf is NaN.
            *l = if self.scale == 0.0 && !l.is_nan() { 1.0 } else { w };
        }
    }

    fn weigh<W: Real>(&self, batch: &Batch, _: &mut [Vec<f64>], weights: &mut [MaybeUninit<W>]) {
        if !self.normalize {
            return self.write(batch, weights);
        }
        let extent = Extent::of(batch);
        // The loss with the largest exponent.
        let top = if self.scale < 0.0 { extent.min } else { extent.max };
        let origin = if top > self.tau { self.tau } else { top };
        softmax(batch, weights, Exponent { tau: self.tau, scale: self.scale, origin, power_of_two: 1.0 });
    }
}

impl Kl {
    fn write<W: Real>(self, batch: &Batch, weights: &mut [MaybeUninit<W>]) {
        let losses = batch.losses.f32s().filter(|_| batch.measure.is_none() && self.scale != 0.0);
        let (Some(losses), Some(out)) = (losses, f32s(weights)) else {
            return write(batch, weights, Pointwise::<_, W>(self, PhantomData));
        };
        let out = Shared(out.as_mut_ptr());
        for_each_block(losses.len().div_ceil(BLOCK), batch.threads, |i| {
            let (start, end) = (i * BLOCK, losses.len().min((i + 1) * BLOCK));
            // SAFETY: blocks are disjoint parts of `weights`, which outlives the call.
            let weights = unsafe { out.part(start, end) };
            dispatch(Singles { kl: self, losses: &losses[start..end], weights });
        });
    }
}

/// Losses of a block: enough that a thread need not ask for the next one often.
const BLOCK: usize = 1 << 14;

/// Pointwise weights from `f32` to `f32`, without a copy in `f64`: the same numbers.
struct Singles<'a> {
    kl: Kl,
    losses: &'a [f32],
    weights: &'a mut [MaybeUninit<f32>],
}

impl Kernel for Singles<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let Kl { tau, scale, .. } = self.kl;
        for (w, &l) in self.weights.iter_mut().zip(self.losses) {
            let l = f64::from(l);
            w.write(exp_to_f32::<I>((if l > tau { tau } else { l }) * scale));
        }
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
