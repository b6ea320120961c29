//! The factor of focal loss as a constant weight, `w_i = (1 - exp(-l_i))^gamma` (Lin et al., ICCV 2017, equation 4). A
//! negative loss counts as 0.

use super::member::Member;
use crate::numeric::{Isa, Real, exp_m1_nonpositive};

/// The settings of the focal factor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Focal {
    /// The exponent; >= 0.
    pub gamma: f64,
}

impl Member for Focal {
    const NUMBERS: &'static [&'static str] = &["gamma"];

    fn from_numbers(numbers: &[f64]) -> Self {
        Self { gamma: numbers[0] }
    }

    fn is_pointwise(&self) -> bool {
        true
    }

    #[inline(always)]
    fn pointwise<W: Real, I: Isa>(&self, losses: &mut [f64]) {
        for l in &mut *losses {
            let x = if *l < 0.0 { 0.0 } else { -*l };
            // Not the negative, which would be -0 where the loss is 0.
            *l = 0.0 - exp_m1_nonpositive::<I>(x);
        }
        for factor in losses {
            *factor = self.power(*factor);
        }
    }
}

impl Focal {
    /// `unlikely^gamma`. NaN stays NaN, where a power of 0 of NaN would be 1, and a power of NaN of 1 too.
    #[inline(always)]
    fn power(self, unlikely: f64) -> f64 {
        // The usual exponents, without a call of `pow` for each loss.
        if self.gamma == 1.0 {
            unlikely
        } else if self.gamma == 2.0 {
            unlikely * unlikely
        } else if unlikely.is_nan() || self.gamma.is_nan() {
            f64::NAN
        } else {
            unlikely.powf(self.gamma)
        }
    }
}
