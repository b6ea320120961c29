//! A weighting without the largest losses (DORO; Zhai et al., ICML 2021, Algorithm 1).
//!
//! The share `fraction` of the measure with the largest losses has weight 0; a sample at the edge is in it in part. The
//! inner member weights the rest, and its weights are multiplied by the kept part of each sample.

use super::batch::Batch;
use super::blocks::fill;
use super::member::Member;
use super::tail::Tail;
use crate::numeric::Real;
use std::mem::MaybeUninit;

/// A member without the largest losses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Trimmed<M> {
    /// The share that is left out, in `[0, 1)`.
    pub fraction: f64,
    /// The member that weights the rest.
    pub inner: M,
}

/// Implements `Member` for `Trimmed` of each inner member, with the names of its numbers, which must be listed.
macro_rules! trimmed {
    ($($Inner:ty: $numbers:expr),* $(,)?) => {
        $(impl Member for Trimmed<$Inner> {
            const NUMBERS: &'static [&'static str] = $numbers;

            fn from_numbers(numbers: &[f64]) -> Self {
                Self { fraction: numbers[0], inner: <$Inner>::from_numbers(&numbers[1..]) }
            }

            fn is_pointwise(&self) -> bool {
                false
            }

            fn weigh<W: Real>(&self, batch: &Batch, state: &mut [Vec<f64>], weights: &mut [MaybeUninit<W>]) {
                weigh(self.fraction, &self.inner, (batch, state), weights);
            }
        })*
    };
}

trimmed! {
    super::kl::Kl: &["fraction", "tau", "scale", "normalize"],
    super::cvar::Cvar: &["fraction", "alpha", "smoothing"],
    super::chi_square::ChiSquare: &["fraction", "gamma"],
}

fn weigh<M: Member, W: Real>(
    fraction: f64,
    inner: &M,
    (batch, state): (&Batch, &mut [Vec<f64>]),
    weights: &mut [MaybeUninit<W>],
) {
    let Some(tail) = Tail::of(batch, fraction).filter(|_| !fraction.is_nan()) else {
        return fill(batch, weights, f64::NAN);
    };
    let losses = batch.read();
    let kept: Vec<f64> = losses.iter().map(|&loss| 1.0 - tail.part_of(loss)).collect();
    let measure: Vec<f64> = kept.iter().enumerate().map(|(i, kept)| batch.p(i) * kept).collect();
    let rest = Batch::new(batch.losses, Some(&measure), batch.groups, batch.threads);
    if rest.total == 0.0 {
        return fill(batch, weights, 0.0);
    }
    inner.weigh(&rest, state, weights);
    for (weight, kept) in weights.iter_mut().zip(kept) {
        if kept > 0.0 && kept < 1.0 {
            // SAFETY: the member has filled all weights.
            let whole = unsafe { weight.assume_init() }.to_f64();
            weight.write(W::from_f64(kept * whole));
        }
    }
}
