//! Conditional value at risk: weight `1 / alpha` on the worst share `alpha` of the measure.
//!
//! Samples above the edge of that share weigh `1 / alpha`, and those at the edge share what is left in equal parts. A
//! part that is 0 or 1 but for rounding is 0 or 1. The edge is selected; nothing is sorted.

use super::batch::Batch;
use super::blocks::{BlockMap, BlockSum, Compensated, fill, measure_where, sum, write};
use super::member::Member;
use crate::numeric::{Isa, Real};
use std::mem::MaybeUninit;

/// The settings of conditional value at risk, sharp.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cvar {
    /// The share, in `(0, 1]`.
    pub alpha: f64,
}

impl Member for Cvar {
    const NUMBERS: &'static [&'static str] = &["alpha"];

    fn from_numbers(numbers: &[f64]) -> Self {
        Self { alpha: numbers[0] }
    }

    fn is_pointwise(&self) -> bool {
        false
    }

    fn weigh<W: Real>(&self, batch: &Batch, _: &mut [Vec<f64>], weights: &mut [MaybeUninit<W>]) {
        let losses = batch.read();
        let mut samples: Vec<(f64, f64)> =
            losses.into_iter().enumerate().map(|(i, l)| (l, batch.p(i))).filter(|s| s.1 != 0.0).collect();
        if self.alpha.is_nan() || samples.iter().any(|s| s.0.is_nan()) {
            return fill(batch, weights, f64::NAN);
        }
        // How far a sum of the measure may be off.
        let rounding = 8.0 * f64::EPSILON * batch.total;
        let edge = edge_of_tail(&mut samples, self.alpha * batch.total - rounding);
        let [above, there] = sum(batch, AboveAndAt(edge)).map(Compensated::value);
        let left = self.alpha * batch.total - above;
        let part = if left >= there - rounding {
            1.0
        } else if left > rounding {
            left / there
        } else {
            0.0
        };
        write(batch, weights, Tail { edge, above: 1.0 / self.alpha, at_edge: part / self.alpha });
    }
}

/// The largest loss such that losses at least as large have the measure `wanted`, by selection among halves.
fn edge_of_tail(mut samples: &mut [(f64, f64)], wanted: f64) -> f64 {
    let mut before = 0.0;
    while samples.len() > 1 {
        let middle = samples.len() / 2;
        samples.select_nth_unstable_by(middle, |a, b| b.0.total_cmp(&a.0));
        let (larger, rest) = samples.split_at_mut(middle);
        let reached = before + larger.iter().map(|s| s.1).sum::<f64>();
        samples = if reached >= wanted {
            larger
        } else {
            before = reached;
            rest
        };
    }
    samples[0].0
}

/// The measure of the losses above the edge and of those at it.
#[derive(Clone, Copy)]
struct AboveAndAt(f64);

impl BlockSum for AboveAndAt {
    type Sum = [Compensated; 2];

    #[inline(always)]
    fn sum<I: Isa>(&self, block: &mut [f64], measure: Option<&[f64]>) -> [Compensated; 2] {
        let mut copy = block.to_vec();
        [measure_where(&mut copy, measure, |l| l > self.0), measure_where(block, measure, |l| l == self.0)]
    }

    fn join(a: [Compensated; 2], b: [Compensated; 2]) -> [Compensated; 2] {
        [a[0].join(b[0]), a[1].join(b[1])]
    }
}

#[derive(Clone, Copy)]
struct Tail {
    edge: f64,
    above: f64,
    at_edge: f64,
}

impl BlockMap for Tail {
    #[inline(always)]
    fn apply<I: Isa>(&self, block: &mut [f64]) {
        for l in block {
            *l = if *l > self.edge {
                self.above
            } else if *l == self.edge {
                self.at_edge
            } else {
                0.0
            };
        }
    }
}
