//! Exponential weights clipped at the middle between the smallest and the largest loss (arXiv 2502.06733).
//!
//! `w_i = exp(s min(l_i, (min l + max l) / 2))` over their mean. Losses are divided by 16, so that no difference of
//! finite ones overflows, and are measured from the end where weights are largest.

use super::batch::Batch;
use super::blocks::{BlockMap, BlockSum, Extent, fill, sum, write};
use super::compensated::Compensated;
use super::member::Member;
use crate::numeric::{Isa, Real, exp};
use std::mem::MaybeUninit;

/// The settings of weights clipped at the middle.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MidrangeKl {
    /// Scaling factor, of either sign.
    pub scale: f64,
    /// Whether losses are measured in half ranges.
    pub relative: bool,
}

impl Member for MidrangeKl {
    const NUMBERS: &'static [&'static str] = &["scale", "relative"];

    fn from_numbers(numbers: &[f64]) -> Self {
        Self { scale: numbers[0], relative: numbers[1] != 0.0 }
    }

    fn is_pointwise(&self) -> bool {
        false
    }

    fn weigh<W: Real>(&self, batch: &Batch, _: &mut [Vec<f64>], weights: &mut [MaybeUninit<W>]) {
        let extent = Extent::of(batch);
        if extent.max.is_nan() || self.scale.is_nan() {
            return fill(batch, weights, f64::NAN);
        }
        let (top, bottom) = (extent.max / 16.0, extent.min / 16.0);
        let half_range = if top > bottom { (top - bottom) / 2.0 } else { 0.0 };
        let falling = self.scale < 0.0;
        let unit = if self.relative { if half_range > 0.0 { half_range } else { 1.0 } } else { 1.0 / 16.0 };
        let end = if falling { bottom } else { top };
        let exponents = Clipped { end, half_range, falling, unit, scale: self.scale, factor: 1.0 };
        let factor = batch.total / sum(batch, exponents).value();
        write(batch, weights, Clipped { factor, ..exponents });
    }
}

/// `factor exp(exponent)` of each loss, the exponent 0 at the end where weights are largest.
#[derive(Clone, Copy)]
struct Clipped {
    end: f64,
    half_range: f64,
    falling: bool,
    unit: f64,
    scale: f64,
    factor: f64,
}

impl BlockMap for Clipped {
    #[inline(always)]
    fn apply<I: Isa>(&self, block: &mut [f64]) {
        for l in block {
            let loss = *l / 16.0;
            let distance = if loss == self.end { 0.0 } else { (loss - self.end).abs() };
            // Above the middle the weight does not change.
            let clipped = if self.falling {
                if distance > self.half_range { self.half_range } else { distance }
            } else if distance <= self.half_range {
                0.0
            } else {
                distance - self.half_range
            };
            let clipped = if distance == f64::INFINITY { distance } else { clipped / self.unit };
            let exponent = if self.scale == 0.0 { 0.0 } else { -self.scale.abs() * clipped };
            *l = exp::<I>(exponent, 0.0, self.factor);
        }
    }
}

impl BlockSum for Clipped {
    type Sum = Compensated;

    #[inline(always)]
    fn sum<I: Isa>(&self, block: &mut [f64], measure: Option<&[f64]>) -> Compensated {
        self.apply::<I>(block);
        Compensated::measured(block, measure)
    }

    fn join(a: Compensated, b: Compensated) -> Compensated {
        a.join(b)
    }
}
