//! Sums that carry their rounding errors along.

/// The number of partial sums. Adding a row of this many numbers to them compiles to vector code.
pub(super) const ROW: usize = 64;

/// A sum and its rounding error so far.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Compensated {
    sum: f64,
    error: f64,
}

impl Compensated {
    /// `sum_i p_i x_i`; the numbers `x_i` become the products.
    #[inline(always)]
    pub fn measured(numbers: &mut [f64], measure: Option<&[f64]>) -> Self {
        if let Some(measure) = measure {
            for (x, &p) in numbers.iter_mut().zip(measure) {
                *x = if p == 0.0 { 0.0 } else { p * *x };
            }
        }
        Self::of_lanes(numbers)
    }

    #[inline(always)]
    pub fn of_lanes(numbers: &[f64]) -> Self {
        let (mut sums, mut errors) = ([0.0; ROW], [0.0; ROW]);
        Self::add_rows(numbers, &mut sums, &mut errors);
        // Halves are added to each other, as vectors.
        let mut half = ROW / 2;
        while half > 0 {
            let (low, high) = sums.split_at_mut(half);
            let (errors, other_errors) = errors.split_at_mut(half);
            for (((a, &b), error), &other) in low.iter_mut().zip(&*high).zip(errors).zip(&*other_errors) {
                let sum = *a + b;
                let part = sum - *a;
                *error += other + ((*a - (sum - part)) + (b - part));
                *a = sum;
            }
            half /= 2;
        }
        Self { sum: sums[0], error: errors[0] }
    }

    /// Adds each row of numbers to `sums`, and the rounding errors of these additions to `errors`.
    #[inline(always)]
    fn add_rows(numbers: &[f64], sums: &mut [f64], errors: &mut [f64]) {
        for row in numbers.chunks(ROW) {
            for ((sum, error), &x) in sums.iter_mut().zip(&mut *errors).zip(row) {
                let next = *sum + x;
                let part = next - *sum;
                *error += (*sum - (next - part)) + (x - part);
                *sum = next;
            }
        }
    }

    /// A number without an error.
    pub fn exact(sum: f64) -> Self {
        Self { sum, error: 0.0 }
    }

    /// Adds one number.
    pub fn add(&mut self, number: f64) {
        *self = self.join(Self { sum: number, error: 0.0 });
    }

    pub fn join(self, other: Self) -> Self {
        let sum = self.sum + other.sum;
        let part = sum - self.sum;
        let error = (self.sum - (sum - part)) + (other.sum - part);
        Self { sum, error: self.error + other.error + error }
    }

    pub fn value(self) -> f64 {
        // An infinite sum has no rounding error.
        if self.sum.is_finite() { self.sum + self.error } else { self.sum }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joined_sums_keep_the_errors_of_both() {
        let small = 2f64.powi(-60);
        let part = || {
            let mut part = Compensated::exact(1.0);
            part.add(small);
            part
        };
        let total = part().join(part()).join(Compensated::exact(-2.0));
        assert_eq!(total.value(), 2.0 * small);
    }
}
