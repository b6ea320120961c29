//! A mean that is divided by a number of the caller, against the sum.

use super::*;

/// Halving is exact, so that a quotient by a power of two has the bits of the sum.
const NORMALIZER: f64 = 8.0;

fn check<T: Element>(shape: &[usize], weighting: Weighting, z_loss: f64, per_sample: bool) {
    let (logits, labels) = example::<T>(shape, 17);
    let inputs = plain(&logits, &labels);
    let sum = Settings { z_loss, per_sample, reduction: Reduction::Sum, ..SETTINGS };
    let mean = Settings { reduction: Reduction::Mean, normalizer: Some(NORMALIZER), ..sum };
    let (summed, normalized) =
        (run(&inputs, weighting, &sum).unwrap(), run(&inputs, weighting, &mean).unwrap());
    assert_eq!(bits(&normalized.weights), bits(&summed.weights));
    assert_eq!(normalized.totals, summed.totals);
    assert_eq!(normalized.objective[0].to_f64() * NORMALIZER, summed.objective[0].to_f64());
    for (n, s) in normalized.grad.iter().zip(&summed.grad) {
        assert_eq!(n.widen().to_f64() * NORMALIZER, s.widen().to_f64());
    }
    let two = run_in_two(&inputs, &mean, |_| summed.weights.clone());
    assert_eq!(grad_bits(&two.grad), grad_bits(&normalized.grad));
    assert_eq!(bits(&two.objective), bits(&normalized.objective));
}

#[test]
fn a_normalizer_takes_the_place_of_the_denominator() {
    for shape in [&[5, 3][..], &[7, 40], &[3, 5, 4]] {
        for weighting in [KL, BALL] {
            for (z_loss, per_sample) in [(0.0, false), (0.2, false), (0.1, true)] {
                check::<f32>(shape, weighting, z_loss, per_sample);
                check::<f64>(shape, weighting, z_loss, per_sample);
            }
        }
    }
}

#[test]
fn nothing_over_a_normalizer_is_nothing() {
    let (logits, mut labels) = example::<f32>(&[4, 3], 1);
    labels.fill(-100);
    let settings = Settings { normalizer: Some(NORMALIZER), ..SETTINGS };
    let result = run(&plain(&logits, &labels), KL, &settings).unwrap();
    assert_eq!((result.objective[0], result.totals.denominator), (0.0, 0.0));
    assert!(result.grad.iter().all(|&g| g == 0.0));
}
