//! Worst cases with a chi-square divergence, penalised and within a ball, solved exactly by one sort and running sums.
//!
//! Penalised: `w_i = max(0, (l_i - eta) / gamma)` with `eta` such that `mean(w) = 1`. Within a ball, with
//! `g_i = max(0, l_i - eta)`: `w_i = g_i / mean(g)` with `eta` such that `mean((w - 1)^2) / 2 = radius`. In both cases
//! only the largest losses get weight. Once the number of these losses is known, `eta` follows from their measure, mean
//! and variance.
//!
//! Sources: Namkoong, Duchi, `NeurIPS` 2016 and 2017; Duchi, Namkoong, Annals of Statistics 2021, section 2.

use super::batch::Batch;
use super::blocks::{BlockMap, fill, put_on, write};
use super::member::Member;
use super::tail::samples;
use crate::numeric::{Isa, Real};
use std::mem::MaybeUninit;

/// The settings of the penalty.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ChiSquare {
    /// Its strength; > 0.
    pub gamma: f64,
}

impl Member for ChiSquare {
    const NUMBERS: &'static [&'static str] = &["gamma"];

    fn from_numbers(numbers: &[f64]) -> Self {
        Self { gamma: numbers[0] }
    }

    fn is_pointwise(&self) -> bool {
        false
    }

    fn weigh<W: Real>(&self, batch: &Batch, _: &mut [Vec<f64>], weights: &mut [MaybeUninit<W>]) {
        let Some(samples) = falling(batch).filter(|_| !self.gamma.is_nan()) else {
            return fill(batch, weights, f64::NAN);
        };
        let origin = Origin { top: samples[0].0, size: 1.0, range: self.gamma };
        // With the measure P and the mean m of the gaps in play: P (m + u) = total.
        let mut above = Running::default();
        let mut u = f64::INFINITY;
        for &(loss, p) in &samples {
            let gap = origin.gap(loss);
            if gap + u <= 0.0 || gap == f64::NEG_INFINITY {
                break;
            }
            above.add(gap, p);
            u = batch.total / above.measure - above.mean;
        }
        write(batch, weights, Line { origin, offset: 0.0, center: -u, width: 1.0, height: 1.0 });
    }
}

/// The settings of the ball.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ChiSquareBall {
    /// Its radius; >= 0.
    pub radius: f64,
}

impl Member for ChiSquareBall {
    const NUMBERS: &'static [&'static str] = &["radius"];

    fn from_numbers(numbers: &[f64]) -> Self {
        Self { radius: numbers[0] }
    }

    fn is_pointwise(&self) -> bool {
        false
    }

    fn weigh<W: Real>(&self, batch: &Batch, _: &mut [Vec<f64>], weights: &mut [MaybeUninit<W>]) {
        let Some(mut samples) = falling(batch).filter(|_| !self.radius.is_nan()) else {
            return fill(batch, weights, f64::NAN);
        };
        // Losses of -inf have weight 0, which uses a part of the divergence.
        samples.truncate(samples.partition_point(|s| s.0 > f64::NEG_INFINITY));
        if self.radius == 0.0 || samples.is_empty() {
            return fill(batch, weights, 1.0);
        }
        let (top, bottom) = (samples[0].0, samples[samples.len() - 1].0);
        let measure: f64 = samples.iter().map(|s| s.1).sum();
        let share = measure / batch.total;
        let left = (self.radius * share - (1.0 - share) / 2.0).max(0.0);
        let at_top: f64 = samples.iter().take_while(|s| s.0 == top).map(|s| s.1).sum();
        if top == f64::INFINITY || left >= (measure / at_top - 1.0) / 2.0 {
            return put_on(top, batch, weights);
        }
        // A sixteenth of the losses, so that no difference of finite ones overflows.
        let mut origin = Origin { top: top / 16.0, size: 1.0 / 16.0, range: 1.0 };
        if left == 0.0 || origin.gap(bottom) == 0.0 {
            // Equal weights on the losses above -inf.
            let (width, height) = (f64::INFINITY, batch.total / measure);
            return write(batch, weights, Line { origin, offset: 1.0, center: 0.0, width, height });
        }
        // With the measure P, the mean m and the variance v of the gaps in play, and d = m - eta, the weights have the
        // mean square (1 + v / d^2) measure / P, which must be 1 + 2 left. Small differences from 1 are kept exact.
        let beyond_one = |p: f64| (p - measure + 2.0 * left * p) / measure;
        let mut above = Running::default();
        for (k, &(loss, p)) in samples.iter().enumerate() {
            // Gaps are measured in the first that is not 0, and in a later one before their squares overflow.
            let distance = origin.top - origin.size * loss;
            if distance > 0.0 && (above.squares == 0.0 || distance > LARGE * origin.range) {
                above.measure_in(distance / origin.range);
                origin.range = distance;
            }
            above.add(origin.gap(loss), p);
            let Some(next) = samples.get(k + 1).map(|s| origin.gap(s.0)) else { break };
            // The mean square of the weights if they begin at the next loss: it falls from loss to loss.
            let (ratio, wanted) = (above.variance() / (above.mean - next).powi(2), beyond_one(above.measure));
            if above.squares > 0.0 && wanted > 0.0 && ratio <= wanted {
                break;
            }
        }
        let width = (above.variance() / beyond_one(above.measure)).sqrt();
        let height = batch.total / above.measure;
        write(batch, weights, Line { origin, offset: 1.0, center: above.mean, width, height });
    }
}

/// `2^400`: the square of such a gap, times any measure, is far from overflow.
const LARGE: f64 = f64::from_bits((1023 + 400) << 52);

/// The losses that take part with their measure, the largest first; `None` where one is NaN.
fn falling(batch: &Batch) -> Option<Vec<(f64, f64)>> {
    let mut samples = samples(batch)?;
    samples.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
    Some(samples)
}

/// The origin and the unit of gaps: a gap is `(size l - top) / range`.
#[derive(Clone, Copy)]
struct Origin {
    top: f64,
    size: f64,
    range: f64,
}

impl Origin {
    /// The gap of a loss: at most 0, and 0 for the largest loss, also where that is infinite.
    #[inline(always)]
    fn gap(self, loss: f64) -> f64 {
        let loss = self.size * loss;
        if loss == self.top { 0.0 } else { (loss - self.top) / self.range }
    }
}

/// Measure, mean and variance of the gaps so far (West, Communications of the ACM 1979).
#[derive(Default)]
struct Running {
    measure: f64,
    mean: f64,
    squares: f64,
}

impl Running {
    fn add(&mut self, gap: f64, p: f64) {
        self.measure += p;
        let deviation = gap - self.mean;
        self.mean += deviation * (p / self.measure);
        self.squares += p * deviation * (gap - self.mean);
    }

    /// Measures the gaps so far in another unit, given in the old one.
    fn measure_in(&mut self, unit: f64) {
        self.mean /= unit;
        self.squares = self.squares / unit / unit;
    }

    fn variance(&self) -> f64 {
        self.squares / self.measure
    }
}

/// `height max(0, offset + (gap - center) / width)`, and 0 for a gap of `-inf`.
#[derive(Clone, Copy)]
struct Line {
    origin: Origin,
    offset: f64,
    center: f64,
    width: f64,
    height: f64,
}

impl BlockMap for Line {
    #[inline(always)]
    fn apply<I: Isa>(&self, block: &mut [f64]) {
        for l in block {
            let part = self.offset + (self.origin.gap(*l) - self.center) / self.width;
            // An infinite gap over an infinite width is NaN; its weight is 0.
            *l = if part > 0.0 { part * self.height } else { 0.0 };
        }
    }
}
