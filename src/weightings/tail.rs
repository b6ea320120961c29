//! The tail of a batch: the part of each sample that is in the share of the measure with the largest losses.

use super::batch::Batch;
use super::blocks::{BlockSum, measure_where, sum};
use super::compensated::Compensated;
use crate::numeric::Isa;

/// The edge of a tail. Samples above it are in the tail, samples below it are not, and samples at it are in it in part.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tail {
    /// The loss at the edge.
    pub edge: f64,
    /// The part of each sample at the edge that is in the tail, in `[0, 1]`.
    pub part: f64,
}

impl Tail {
    /// The tail that has the share `fraction` of the measure; `None` if a loss that takes part is NaN.
    ///
    /// A part that is 0 or 1 up to rounding is exactly 0 or 1. The edge is found by selection, without sorting.
    pub fn of(batch: &Batch, fraction: f64) -> Option<Self> {
        let mut samples = samples(batch)?;
        // A bound on the rounding error of a sum of the measure.
        let rounding = 8.0 * f64::EPSILON * batch.total;
        let edge = edge(&mut samples, fraction * batch.total - rounding);
        let [above, there] = sum(batch, AboveAndAt(edge)).map(Compensated::value);
        let left = fraction * batch.total - above;
        let part = if left >= there - rounding {
            1.0
        } else if left > rounding {
            left / there
        } else {
            0.0
        };
        Some(Self { edge, part })
    }

    /// The part of a sample that is in the tail.
    #[inline(always)]
    pub fn part_of(&self, loss: f64) -> f64 {
        if loss > self.edge {
            1.0
        } else if loss == self.edge {
            self.part
        } else {
            0.0
        }
    }
}

/// The losses that take part with their measure; `None` where one is NaN.
pub(super) fn samples(batch: &Batch) -> Option<Vec<(f64, f64)>> {
    let losses = batch.read().into_iter().enumerate();
    let samples: Vec<(f64, f64)> = losses.map(|(i, l)| (l, batch.p(i))).filter(|s| s.1 != 0.0).collect();
    (!samples.iter().any(|s| s.0.is_nan())).then_some(samples)
}

/// The largest loss such that losses at least as large have the measure `wanted`, by selection among halves.
fn edge(mut samples: &mut [(f64, f64)], wanted: f64) -> f64 {
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

/// The same of samples that are sorted, the smallest loss first.
pub(super) fn edge_of_sorted(samples: &[(f64, f64)], wanted: f64) -> f64 {
    let mut reached = 0.0;
    for &(loss, p) in samples.iter().rev() {
        reached += p;
        if reached >= wanted {
            return loss;
        }
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
