//! Conditional value at risk: weight `1 / alpha` on the worst share `alpha` of the measure.
//!
//! Smoothed by `nu > 0`, the weights are `min(1 / alpha, exp((l - eta) / nu))` with `eta` such that their mean is 1
//! (Laguel et al., "Superquantiles at Work", 2021). If all losses above the `k` smallest have the weight `1 / alpha`,
//! `eta` follows from sums over the `k` smallest. The right `k` is the one whose weights have the smallest mean.

use super::batch::Batch;
use super::blocks::{BlockMap, fill, write};
use super::compensated::Compensated;
use super::member::Member;
use super::tail::{Tail, edge_of_sorted, samples};
use crate::numeric::{Isa, Kernel, Real, dispatch, exp};
use std::mem::MaybeUninit;

/// The settings of conditional value at risk.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cvar {
    /// The share, in `(0, 1]`.
    pub alpha: f64,
    /// `nu`; >= 0.
    pub smoothing: f64,
}

impl Member for Cvar {
    const NUMBERS: &'static [&'static str] = &["alpha", "smoothing"];

    fn from_numbers(numbers: &[f64]) -> Self {
        Self { alpha: numbers[0], smoothing: numbers[1] }
    }

    fn is_pointwise(&self) -> bool {
        false
    }

    fn weigh<W: Real>(&self, batch: &Batch, _: &mut [Vec<f64>], weights: &mut [MaybeUninit<W>]) {
        if self.alpha.is_nan() || self.smoothing.is_nan() {
            return fill(batch, weights, f64::NAN);
        }
        if self.smoothing > 0.0 {
            return match self.smooth(batch) {
                Some(smooth) => write(batch, weights, smooth),
                None => fill(batch, weights, f64::NAN),
            };
        }
        match Tail::of(batch, self.alpha) {
            Some(tail) => write(batch, weights, Sharp { tail, bound: 1.0 / self.alpha }),
            None => fill(batch, weights, f64::NAN),
        }
    }
}

impl Cvar {
    fn smooth(&self, batch: &Batch) -> Option<Smooth> {
        let mut samples = samples(batch)?;
        let rounding = 8.0 * f64::EPSILON * batch.total;
        samples.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        let edge = edge_of_sorted(&samples, self.alpha * batch.total - rounding);
        let bound = 1.0 / self.alpha;
        let mut smooth = Smooth { edge, smoothing: self.smoothing, shift: 0.0, bound };
        let mut free: Vec<f64> = samples.iter().map(|s| s.0).collect();
        dispatch(Free { smooth, losses: &mut free });
        let (mut measure, mut sum, mut least) = (Compensated::default(), Compensated::default(), 0.0);
        for (&(_, p), &free) in samples.iter().zip(&free) {
            measure.add(p);
            sum.add(p * free);
            let room = batch.total - (batch.total - measure.value()) / self.alpha;
            if room > 0.0 {
                least = f64::max(least, room / sum.value());
            }
        }
        // Where there is no other, the whole tail has the weight `1 / alpha`.
        smooth.shift = least.ln().min(bound.ln());
        Some(smooth)
    }
}

#[derive(Clone, Copy)]
struct Sharp {
    tail: Tail,
    bound: f64,
}

impl BlockMap for Sharp {
    #[inline(always)]
    fn apply<I: Isa>(&self, block: &mut [f64]) {
        for l in block {
            *l = self.tail.part_of(*l) * self.bound;
        }
    }
}

/// `min(bound, exp((l - edge) / smoothing + shift))`.
#[derive(Clone, Copy)]
struct Smooth {
    edge: f64,
    smoothing: f64,
    shift: f64,
    bound: f64,
}

impl Smooth {
    #[inline(always)]
    fn gap(self, loss: f64) -> f64 {
        if loss == self.edge { 0.0 } else { (loss - self.edge) / self.smoothing }
    }
}

impl BlockMap for Smooth {
    #[inline(always)]
    fn apply<I: Isa>(&self, block: &mut [f64]) {
        for l in block {
            *l = exp::<I>(self.gap(*l) + self.shift, 0.0, 1.0).min(self.bound);
        }
    }
}

/// Turns losses into weights that have no bound.
struct Free<'a> {
    smooth: Smooth,
    losses: &'a mut [f64],
}

impl Kernel for Free<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        for l in self.losses {
            *l = exp::<I>(self.smooth.gap(*l), 0.0, 1.0);
        }
    }
}
