//! Exponential weights over their running mean (SOX, ABSGD; Qi et al., TMLR 2023, Algorithm 1).
//!
//! First `u <- decay u + (1 - decay) mean(w)`, then the weights are `w / u`. `u` starts as the mean of the first batch.
//! The computation uses logarithms relative to the largest weight.

use super::batch::Batch;
use super::blocks::{BlockMap, BlockSum, sum, write};
use super::compensated::Compensated;
use super::kl::{Exponent, Kl};
use super::member::Member;
use crate::numeric::{Isa, Real, exp};
use std::mem::MaybeUninit;

/// Exponential weights over their running mean. The state is the logarithm of the mean and the number of batches.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MovingAverageOfKl {
    /// How much of the old mean stays, in `[0, 1)`.
    pub decay: f64,
    /// The weights that are divided: pointwise ones.
    pub inner: Kl,
}

impl Member for MovingAverageOfKl {
    const NUMBERS: &'static [&'static str] = &["decay", "tau", "scale", "normalize"];

    fn from_numbers(numbers: &[f64]) -> Self {
        Self { decay: numbers[0], inner: Kl::from_numbers(&numbers[1..]) }
    }

    fn is_pointwise(&self) -> bool {
        false
    }

    fn state_lengths(&self) -> Vec<usize> {
        vec![1, 1]
    }

    fn weigh<W: Real>(&self, batch: &Batch, state: &mut [Vec<f64>], weights: &mut [MaybeUninit<W>]) {
        assert!(self.inner.is_pointwise(), "a running mean divides pointwise weights");
        let (old, updates) = (state[0][0], state[1][0]);
        let top = sum(batch, Largest(self.inner)).unwrap_or(f64::NEG_INFINITY);
        // If all weights are 0, logarithms are relative to 1.
        let top = if top == f64::NEG_INFINITY { 0.0 } else { top };
        let gaps = Gaps { inner: self.inner, top, less: 0.0 };
        let mut mean = (sum(batch, Sum(gaps)).value() / batch.total).ln();
        if updates != 0.0 {
            mean = log_add_exp(self.decay.ln() + gap(old, top), (-self.decay).ln_1p() + mean);
        }
        // If all weights so far were 0, there is no mean to divide by, and the weights stay 0.
        let less = if mean == f64::NEG_INFINITY { 0.0 } else { mean };
        write(batch, weights, Gaps { less, ..gaps });
        let new = mean + top;
        if new.is_finite() {
            state[0][0] = new;
            state[1][0] = updates + 1.0;
        }
    }
}

/// `value - end`, and 0 if they are equal, also if both are the same infinity.
#[inline(always)]
fn gap(value: f64, end: f64) -> f64 {
    if value == end { 0.0 } else { value - end }
}

/// `log(exp(a) + exp(b))`.
fn log_add_exp(a: f64, b: f64) -> f64 {
    let (low, high) = if a < b { (a, b) } else { (b, a) };
    if low == high { low + std::f64::consts::LN_2 } else { high + (low - high).exp().ln_1p() }
}

/// The logarithm of a pointwise weight.
#[inline(always)]
fn log_weight<I: Isa>(kl: &Kl, loss: f64) -> f64 {
    if kl.scale == 0.0 {
        return if loss.is_nan() { loss } else { 0.0 };
    }
    let (hi, lo) = Exponent { tau: kl.tau, scale: kl.scale, origin: 0.0, power_of_two: 1.0 }.at::<I>(loss);
    // An infinite exponent has no rounding error.
    if hi.is_finite() { hi + lo } else { hi }
}

/// `exp(log w - top - less)` of each loss.
#[derive(Clone, Copy)]
struct Gaps {
    inner: Kl,
    top: f64,
    less: f64,
}

impl BlockMap for Gaps {
    #[inline(always)]
    fn apply<I: Isa>(&self, block: &mut [f64]) {
        for l in block {
            *l = exp::<I>(gap(log_weight::<I>(&self.inner, *l), self.top) - self.less, 0.0, 1.0);
        }
    }
}

/// The mean's numerator.
#[derive(Clone, Copy)]
struct Sum(Gaps);

impl BlockSum for Sum {
    type Sum = Compensated;

    #[inline(always)]
    fn sum<I: Isa>(&self, block: &mut [f64], measure: Option<&[f64]>) -> Compensated {
        self.0.apply::<I>(block);
        Compensated::measured(block, measure)
    }

    fn join(a: Compensated, b: Compensated) -> Compensated {
        a.join(b)
    }
}

/// The largest logarithm of a weight; NaN if one is NaN.
#[derive(Clone, Copy)]
struct Largest(Kl);

impl BlockSum for Largest {
    type Sum = Option<f64>;

    #[inline(always)]
    fn sum<I: Isa>(&self, block: &mut [f64], measure: Option<&[f64]>) -> Option<f64> {
        let mut largest = f64::NEG_INFINITY;
        for (i, &mut l) in block.iter_mut().enumerate() {
            if measure.is_none_or(|measure| measure[i] != 0.0) {
                largest = larger(largest, log_weight::<I>(&self.0, l));
            }
        }
        Some(largest)
    }

    fn join(a: Option<f64>, b: Option<f64>) -> Option<f64> {
        let (Some(a), Some(b)) = (a, b) else { return a.or(b) };
        Some(larger(a, b))
    }
}

/// The larger of two numbers; NaN if one is.
#[inline(always)]
fn larger(a: f64, b: f64) -> f64 {
    if b > a || b.is_nan() { b } else { a }
}
