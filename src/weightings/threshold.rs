//! One up to a loss and zero above it: `w_i = 1` where `l_i <= max_loss`, else 0.

use super::member::Member;
use crate::numeric::{Isa, Real};

/// The largest loss that is kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Threshold {
    /// A finite number.
    pub max_loss: f64,
}

impl Member for Threshold {
    const NUMBERS: &'static [&'static str] = &["max_loss"];

    fn from_numbers(numbers: &[f64]) -> Self {
        Self { max_loss: numbers[0] }
    }

    fn is_pointwise(&self) -> bool {
        true
    }

    #[inline(always)]
    fn pointwise<W: Real, I: Isa>(&self, losses: &mut [f64]) {
        for l in losses {
            let kept = if *l <= self.max_loss { 1.0 } else { 0.0 };
            *l = if l.is_nan() || self.max_loss.is_nan() { f64::NAN } else { kept };
        }
    }
}
