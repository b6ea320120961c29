//! The input of a member: the losses of a batch, their measure and their groups.

use super::compensated::Compensated;
use crate::layout::Values;

/// Losses below which waking a thread costs more than it saves.
const PARALLEL: usize = 1 << 15;

/// The losses of a batch. A sample with measure 0 takes no part.
pub struct Batch<'a> {
    pub(super) losses: &'a dyn Values,
    pub(super) measure: Option<&'a [f64]>,
    pub(super) groups: Option<&'a [i64]>,
    /// The sum of the measure; without a measure, the number of samples.
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
        let total = measure.map_or(n as f64, |measure| Compensated::of_lanes(measure).value());
        Self { losses, measure, groups, total, threads }
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
}
