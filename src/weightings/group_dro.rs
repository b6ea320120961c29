//! Group distributionally robust optimization (Sagawa et al., ICLR 2020, Algorithm 1).
//!
//! Each group `g` has a share `q_g`. A batch updates the shares, `q_g <- q_g exp(step_size mean loss of g)`, and
//! divides them by their sum. A group that is absent counts as loss 0. Then `w_i = n q_g / n_g` in group `g`, with `n`
//! the measure of the batch and `n_g` that of the group.

use super::batch::Batch;
use super::compensated::Compensated;
use super::member::Member;
use crate::numeric::Real;
use std::mem::MaybeUninit;

/// The settings of group DRO. Its state is the shares.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupDro {
    /// The number of groups.
    pub groups: usize,
    /// Step size of the shares; >= 0.
    pub step_size: f64,
}

impl Member for GroupDro {
    const NUMBERS: &'static [&'static str] = &["groups", "step_size"];

    fn from_numbers(numbers: &[f64]) -> Self {
        Self { groups: numbers[0] as usize, step_size: numbers[1] }
    }

    fn is_pointwise(&self) -> bool {
        false
    }

    fn state_lengths(&self) -> Vec<usize> {
        vec![self.groups]
    }

    fn groups(&self) -> Option<usize> {
        Some(self.groups)
    }

    fn weigh<W: Real>(&self, batch: &Batch, state: &mut [Vec<f64>], weights: &mut [MaybeUninit<W>]) {
        let (losses, groups) = (batch.read(), batch.groups.unwrap_or_default());
        let mut sizes = vec![Compensated::default(); self.groups];
        let mut sums = sizes.clone();
        for (i, (&g, &l)) in groups.iter().zip(&losses).enumerate() {
            let p = batch.p(i);
            if p != 0.0 {
                sizes[g as usize].add(p);
                sums[g as usize].add(p * l);
            }
        }
        let shares = &mut state[0];
        for (share, (size, sum)) in shares.iter_mut().zip(sizes.iter().zip(&sums)) {
            let mean = if size.value() > 0.0 { sum.value() / size.value() } else { 0.0 };
            // With a step of 0 an infinite loss has no effect.
            let rise = if self.step_size == 0.0 && !mean.is_nan() { 0.0 } else { self.step_size * mean };
            // Groups of infinite loss share all the weight, also if their shares had become 0.
            *share = if rise == f64::INFINITY { rise } else { share.ln() + rise };
        }
        let top = shares
            .iter()
            .copied()
            .fold(f64::NEG_INFINITY, |top, l| if l > top || l.is_nan() { l } else { top });
        let mut total = Compensated::default();
        for share in shares.iter_mut() {
            *share = if *share == top { 1.0 } else { (*share - top).exp() };
            total.add(*share);
        }
        for share in shares.iter_mut() {
            *share /= total.value();
        }
        let of_group: Vec<f64> =
            shares.iter().zip(&sizes).map(|(share, size)| batch.total * share / size.value()).collect();
        for (i, weight) in weights.iter_mut().enumerate() {
            let w = if batch.p(i) == 0.0 { 0.0 } else { of_group[groups[i] as usize] };
            weight.write(W::from_f64(w));
        }
    }
}
