//! Logits with an adjustment, against logits to which it was added before: the same, bit for bit.

use super::*;

/// The sums of logits and their adjustment in the accumulator's type, in the layout of the logits.
fn adjusted<T: Element>(logits: &ArrayD<T>, adjustment: &[T::Real]) -> ArrayD<T::Real> {
    let mut sums = logits.map(|x| x.widen());
    for (mut class, &a) in sums.axis_iter_mut(Axis(usize::from(logits.ndim() > 1))).zip(adjustment) {
        class.map_inplace(|x| *x += a);
    }
    sums
}

fn compare<T: Element>(shape: &[usize], soft: bool, settings: &Settings, masked: bool, seed: u64) {
    let (logits, labels) = example::<T>(shape, seed);
    let mut a: Vec<T::Real> = noise(shape[1], seed + 5).map(|x| T::Real::from_f64(8.0 * x - 6.0)).collect();
    if masked {
        a[0] = T::Real::NEG_INFINITY;
    }
    let number = |x: f64| T::narrow(T::Real::from_f64(x));
    let q =
        ArrayD::from_shape_vec(IxDyn(shape), noise(logits.len(), seed + 2).map(number).collect()).unwrap();
    let sums = adjusted(&logits, &a);
    let (wide, c) = (q.map(|x| x.widen()), vec![T::Real::from_f64(1.5); shape[1]]);
    for weighting in [KL, BALL] {
        let mut one =
            Inputs { class_weight: Some(&c), logit_adjustment: Some(&a), ..plain(&logits, &labels) };
        let mut other = Inputs { class_weight: Some(&c), ..plain(&sums, &labels) };
        if soft {
            (one.target, other.target) =
                (Target::Probabilities(q.view()), Target::Probabilities(wide.view()));
        }
        let expected = run(&other, weighting, settings).unwrap();
        let rounded = expected.grad.map(|&x| T::narrow(x));
        for result in [
            run(&one, weighting, settings).unwrap(),
            run_in_two(&one, settings, |_| expected.weights.clone()),
        ] {
            assert_eq!(bits(&result.losses), bits(&expected.losses), "{shape:?}");
            assert_eq!(bits(&result.weights), bits(&expected.weights), "{shape:?}");
            assert_eq!(bits(&result.objective), bits(&expected.objective), "{shape:?}");
            assert_eq!(grad_bits(&result.grad), grad_bits(&rounded), "{shape:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn an_adjustment_acts_as_if_it_had_been_added_to_the_logits(
        classes in prop::sample::select(vec![1, 5, 24, 31, 48, 65, 130, 700]),
        n in 1usize..9, inner in prop::sample::select(vec![None, Some(1), Some(3)]), soft: bool, masked: bool,
        per_sample: bool, reduction in prop::sample::select(REDUCTIONS.to_vec()),
        label_smoothing in prop::sample::select(vec![0.0, 0.1, 1.0]), seed in 0u64..1000,
        z_loss in prop::sample::select(vec![0.0, 0.3])
    ) {
        let settings = Settings { label_smoothing, z_loss, per_sample, reduction, ..SETTINGS };
        let mut shape = vec![n, classes];
        shape.extend(inner);
        compare::<f32>(&shape, soft, &settings, masked, seed);
        compare::<f64>(&shape, soft, &settings, masked, seed);
        compare::<bf16>(&shape, soft, &settings, masked, seed);
        compare::<f16>(&shape, soft, &settings, masked, seed);
    }
}

#[test]
fn an_adjustment_of_another_length_is_refused() {
    let (logits, labels) = example::<f32>(&[4, 3], 1);
    let inputs = Inputs { logit_adjustment: Some(&[0.0; 4]), ..plain(&logits, &labels) };
    let error = run(&inputs, KL, &SETTINGS).unwrap_err();
    assert!(error.to_string().contains("logit_adjustment must have 3 elements"), "{error}");
}
