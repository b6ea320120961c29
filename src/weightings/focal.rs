//! The factor of focal loss as a constant weight, `w_i = (1 - exp(-l_i))^gamma` (Lin et al., ICCV 2017, equation 4). A
//! negative loss counts as 0.

use super::member::Member;
use crate::numeric::Isa;

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
    fn pointwise<I: Isa>(&self, losses: &mut [f64]) {
        for l in losses {
            let unlikely = -(-l.max(0.0)).exp_m1();
            // Without this, NaN to the power of 0 would be 1, and 1 to the power of NaN too.
            *l = if l.is_nan() || self.gamma.is_nan() { f64::NAN } else { unlikely.powf(self.gamma) };
        }
    }
}
