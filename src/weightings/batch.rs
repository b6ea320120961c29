//! What a member is given: the losses of a batch, their measure and their groups.

use super::blocks::{BlockSum, Compensated, PARALLEL, measure_where, sum};
use crate::layout::Values;
use crate::numeric::Isa;

/// The losses of a batch. A sample with measure 0 takes no part.
pub struct Batch<'a> {
    pub(super) losses: &'a dyn Values,
    pub(super) measure: Option<&'a [f64]>,
    pub(super) groups: Option<&'a [i64]>,
    /// The sum of the measure: how many samples there are where none is given.
    pub(super) total: f64,
    pub(super) threads: usize,
}

impl<'a> Batch<'a> {
    /// The batch of `losses`, worked on by at most `threads` threads.
    ///
    /// - `measure`: finite numbers >= 0, one a loss; `None` for ones.
    /// - `groups`: the group of each loss, for members that ask for it.
    ///
    /// # Panics
    /// If lengths differ.
    #[must_use]
    pub fn new(
        losses: &'a dyn Values,
        measure: Option<&'a [f64]>,
        groups: Option<&'a [i64]>,
        threads: usize,
    ) -> Self {
        let n = losses.count();
        assert!(measure.is_none_or(|measure| measure.len() == n));
        assert!(groups.is_none_or(|groups| groups.len() == n));
        let threads = if n < PARALLEL { 1 } else { threads };
        let mut batch = Self { losses, measure, groups, total: n as f64, threads };
        if measure.is_some() {
            batch.total = sum(&batch, Total).value();
        }
        batch
    }

    /// The measure of the losses `start..end`.
    pub(super) fn measure_of(&self, start: usize, end: usize) -> Option<&'a [f64]> {
        self.measure.map(|measure| &measure[start..end])
    }

    /// The losses, widened.
    pub(super) fn read(&self) -> Vec<f64> {
        let mut losses = vec![0.0; self.losses.count()];
        self.losses.read(0, &mut losses);
        losses
    }

    /// The measure of sample `i`.
    pub(super) fn p(&self, i: usize) -> f64 {
        self.measure.map_or(1.0, |measure| measure[i])
    }

    /// Whether at least one loss takes part, and all that do are finite.
    pub(super) fn is_usable(&self) -> bool {
        self.total > 0.0 && sum(self, Infinite).value() == 0.0
    }
}

#[derive(Clone, Copy)]
struct Total;

impl BlockSum for Total {
    type Sum = Compensated;

    #[inline(always)]
    fn sum<I: Isa>(&self, block: &mut [f64], measure: Option<&[f64]>) -> Compensated {
        measure_where(block, measure, |_| true)
    }

    fn join(a: Compensated, b: Compensated) -> Compensated {
        a.join(b)
    }
}

/// The measure of the losses that are not finite.
#[derive(Clone, Copy)]
struct Infinite;

impl BlockSum for Infinite {
    type Sum = Compensated;

    #[inline(always)]
    fn sum<I: Isa>(&self, block: &mut [f64], measure: Option<&[f64]>) -> Compensated {
        measure_where(block, measure, |l| !l.is_finite())
    }

    fn join(a: Compensated, b: Compensated) -> Compensated {
        a.join(b)
    }
}
