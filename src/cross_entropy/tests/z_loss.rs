//! The z-loss: its part of objective and gradient, against its formula in `f64`, and the results that it must not change.

use super::*;

/// `Z` and the softmax of each target, in `f64`, the targets in row-major order.
fn softmaxes<T: Element>(logits: &ArrayD<T>, adjustment: Option<&[T::Real]>) -> Vec<(f64, Vec<f64>)> {
    let mut last = logits.view();
    let classes = last.len_of(Axis(1));
    let axes: Vec<usize> = (0..last.ndim()).filter(|&axis| axis != 1).chain([1]).collect();
    last = last.permuted_axes(axes);
    let numbers: Vec<f64> = last.iter().map(|x| x.widen().to_f64()).collect();
    let row = |row: &[f64]| {
        let a = |k: usize| adjustment.map_or(0.0, |a| a[k].to_f64());
        let row: Vec<f64> = row.iter().enumerate().map(|(k, x)| x + a(k)).collect();
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = row.iter().map(|x| (x - max).exp()).sum();
        (max + sum.ln(), row.iter().map(|x| (x - max).exp() / sum).collect())
    };
    numbers.chunks(classes).map(row).collect()
}

/// What a call has beside logits and labels.
#[derive(Debug, Clone, Copy)]
struct Case {
    soft: bool,
    with_weights: bool,
    adjusted: bool,
    seed: u64,
}

fn check<T: Element>(shape: &[usize], case: Case, weighting: Weighting, settings: &Settings) {
    let Case { soft, with_weights, adjusted, seed } = case;
    let (logits, labels) = example::<T>(shape, seed);
    let classes = shape[1];
    let numbers = |count: usize, seed: u64, of: &dyn Fn(f64) -> f64| -> Vec<T::Real> {
        noise(count, seed).map(|x| T::Real::from_f64(of(x))).collect()
    };
    let narrow = |x: f64| T::narrow(T::Real::from_f64(x));
    let q = noise(logits.len(), seed + 2).map(|x| narrow(2.0 * x / classes as f64)).collect();
    let q = ArrayD::from_shape_vec(IxDyn(shape), q).unwrap();
    let c = numbers(classes, seed + 3, &|x| x + 0.5);
    let a = numbers(classes, seed + 4, &|x| 4.0 * x - 2.0);
    let targets = labels.len();
    let units = if settings.per_sample { shape[0] } else { targets };
    let p = numbers(units, seed + 5, &|x| (4.0 * x).floor());
    let p = (with_weights && weighting.is_pointwise()).then_some(&p[..]);
    let inputs = Inputs {
        target: if soft { Target::Probabilities(q.view()) } else { Target::Int64(labels.view()) },
        class_weight: with_weights.then_some(&c),
        logit_adjustment: adjusted.then_some(&a),
        measure: p,
        ..plain(&logits, &labels)
    };
    let plain = run(&inputs, weighting, &Settings { z_loss: 0.0, ..*settings }).unwrap();
    let result = run(&inputs, weighting, settings).unwrap();
    let two = run_in_two(&inputs, settings, |_| result.weights.clone());
    assert_eq!(grad_bits(&two.grad), grad_bits(&result.grad));
    assert_eq!(bits(&two.objective), bits(&result.objective));
    assert_eq!(bits(&result.losses), bits(&plain.losses));
    assert_eq!(bits(&result.weights), bits(&plain.weights));
    assert_eq!(result.totals, plain.totals);

    let norm = match settings.reduction {
        Reduction::Mean => 1.0 / plain.totals.denominator,
        _ => 1.0,
    };
    let labels: Vec<i64> = labels.iter().copied().collect();
    let share = |i: usize| {
        let counts = soft || labels[i] != settings.ignore_index;
        if counts { p.map_or(1.0, |p| p[i * units / targets].to_f64()) } else { 0.0 }
    };
    let eps = if size_of::<T::Real>() == 8 { f64::EPSILON } else { f64::from(f32::EPSILON) };
    let narrow_eps = if size_of::<T>() == 2 { 1.0 / 128.0 } else { 0.0 };
    // The numbers of float16 next to 0 are this far apart.
    let smallest = if size_of::<T>() == 2 { 2.0f64.powi(-24) } else { 0.0 };
    let rows = softmaxes(&logits, inputs.logit_adjustment);
    let z = settings.z_loss;
    // A sum of `classes` exponentials in the accumulator, and some roundings; the logits lie within 6 of 0.
    let tolerance = eps * (16.0 + classes as f64);

    let (mut sum, mut magnitude) = (0.0, 0.0);
    for (i, (logsumexp, _)) in rows.iter().enumerate() {
        let added = z * share(i) * logsumexp * logsumexp;
        sum += added;
        magnitude += added + share(i);
        if settings.reduction == Reduction::None {
            let (a, b) = (result.objective[i].to_f64(), plain.objective[i].to_f64());
            assert!((a - b - added).abs() <= tolerance * (1.0 + b.abs() + added), "{i}: {a} {b} {added}");
        }
    }
    if settings.reduction != Reduction::None && plain.totals.denominator > 0.0 {
        let (a, b) = (result.objective[0].to_f64(), plain.objective[0].to_f64());
        let bound = tolerance * (b.abs() + norm * magnitude);
        assert!((a - b - norm * sum).abs() <= bound, "{a} {b} {}", norm * sum);
    }
    let axes: Vec<usize> = (0..shape.len()).filter(|&axis| axis != 1).chain([1]).collect();
    let of = |grad: &ArrayD<T>| -> Vec<f64> {
        grad.view().permuted_axes(axes.clone()).iter().map(|x| x.widen().to_f64()).collect()
    };
    for (k, (a, b)) in of(&result.grad).into_iter().zip(of(&plain.grad)).enumerate() {
        let (i, class) = (k / classes, k % classes);
        let (logsumexp, softmax) = &rows[i];
        if plain.totals.denominator == 0.0 {
            continue;
        }
        let added = 2.0 * norm * z * share(i) * logsumexp * softmax[class];
        let weight = result.weights[i * units / targets].to_f64();
        let size = b.abs() + added.abs() + norm * share(i) * softmax[class] * weight.max(8.0);
        assert!(
            (a - b - added).abs() <= tolerance * size + narrow_eps * (a.abs() + b.abs()) + smallest,
            "{k}: {a} {b} {added}"
        );
    }
}

#[test]
fn a_gradient_below_the_normal_numbers_of_float16_is_rounded() {
    let case = Case { soft: false, with_weights: false, adjusted: true, seed: 28 };
    check::<f16>(&[6, 31, 3], case, KL, &Settings { z_loss: 1e-4, reduction: Reduction::Mean, ..SETTINGS });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn a_z_loss_adds_its_square_and_its_gradient_and_nothing_else(
        classes in prop::sample::select(vec![1, 5, 24, 31, 48, 65, 130]),
        n in 1usize..9, inner in prop::sample::select(vec![None, Some(1), Some(3)]),
        soft: bool, with_weights: bool, adjusted: bool, per_sample: bool,
        reduction in prop::sample::select(REDUCTIONS.to_vec()), seed in 0u64..1000,
        label_smoothing in prop::sample::select(vec![0.0, 0.1, 1.0]), z_loss in prop::sample::select(vec![1e-4, 2.0]),
        weighting in prop::sample::select(vec![KL, BALL])
    ) {
        let settings = Settings { label_smoothing, z_loss, per_sample, reduction, ..SETTINGS };
        let mut shape = vec![n, classes];
        shape.extend(inner);
        let case = Case { soft, with_weights, adjusted, seed };
        check::<f32>(&shape, case, weighting, &settings);
        check::<f64>(&shape, case, weighting, &settings);
        check::<bf16>(&shape, case, weighting, &settings);
        check::<f16>(&shape, case, weighting, &settings);
    }
}

#[test]
fn the_logsumexp_is_that_of_the_adjusted_logits_and_zero_for_an_ignored_target() {
    for shape in SHAPES {
        let (logits, labels) = example::<f64>(shape, 4);
        let a: Vec<f64> = noise(shape[1], 5).map(|x| 4.0 * x - 2.0).collect();
        let inputs = Inputs { logit_adjustment: Some(&a), ..plain(&logits, &labels) };
        let mut logsumexp = unwritten(labels.len());
        losses(&inputs, &SETTINGS, &mut unwritten(labels.len()), Some(&mut logsumexp)).unwrap();
        let expected = softmaxes(&logits, Some(&a));
        for ((z, (expected, _)), &label) in read(&logsumexp).into_iter().zip(expected).zip(&labels) {
            let expected = if label == -100 { 0.0 } else { expected };
            assert!((z - expected).abs() <= 8.0 * f64::EPSILON * (1.0 + expected.abs()), "{z} {expected}");
        }
    }
}

#[test]
fn targets_that_take_no_part_add_nothing_whatever_their_logits() {
    for (shape, per_sample) in
        [(&[4, 3][..], false), (&[4, 40], false), (&[4, 3, 2], true), (&[4, 40, 2], true)]
    {
        for reduction in REDUCTIONS {
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                let mut logits = ArrayD::<f64>::ones(IxDyn(shape));
                logits.index_axis_mut(Axis(0), 1).fill(bad);
                let mut labels = ArrayD::<i64>::zeros(IxDyn(&[&shape[..1], &shape[2..]].concat()));
                let settings = Settings { z_loss: 0.5, per_sample, reduction, ..SETTINGS };
                let p = noise(if per_sample { 4 } else { labels.len() }, 1).map(|_| 1.0).collect::<Vec<_>>();
                let mut measure = p.clone();
                measure[1] = 0.0;
                let by_measure = Inputs { measure: Some(&measure), ..plain(&logits, &labels) };
                let measured = run(&by_measure, KL, &settings).unwrap();
                let two = run_in_two(&by_measure, &settings, |_| measured.weights.clone());
                labels.index_axis_mut(Axis(0), 1).fill(-100);
                let ignored = run(&plain(&logits, &labels), KL, &settings).unwrap();
                for result in [measured, two, ignored] {
                    assert!(result.objective.iter().all(|o| o.is_finite()), "{shape:?} {bad}");
                    assert!(result.grad.index_axis(Axis(0), 2).iter().all(|g| g.is_finite()));
                }
            }
        }
    }
}

#[test]
fn a_weight_of_zero_silences_an_infinite_loss_and_not_the_z_loss() {
    let resist = Weighting::Kl(Kl { tau: f64::INFINITY, scale: -1.0, normalize: false });
    for classes in [3, 40] {
        let mut logits = ArrayD::<f64>::zeros(IxDyn(&[2, classes]));
        logits[[0, 1]] = f64::NEG_INFINITY;
        let labels = ArrayD::from_elem(IxDyn(&[2]), 1i64);
        let settings = Settings { z_loss: 0.5, reduction: Reduction::None, ..SETTINGS };
        let result = run(&plain(&logits, &labels), resist, &settings).unwrap();
        let z = ((classes - 1) as f64).ln();
        assert_eq!((result.losses[0], result.weights[0]), (f64::INFINITY, 0.0));
        assert!((result.objective[0] - 0.5 * z * z).abs() <= 4.0 * f64::EPSILON * z * z);
        let g = result.grad[[0, 0]];
        assert!((g - z / (classes - 1) as f64).abs() <= 8.0 * f64::EPSILON, "{g}");
    }
}

#[test]
fn given_losses_need_their_logsumexp_for_a_z_loss() {
    let (logits, labels) = example::<f32>(&[4, 3], 1);
    let settings = Settings { z_loss: 0.1, ..SETTINGS };
    let given = Given { losses: &[0.0; 4], weights: &[1.0; 4], logsumexp: None };
    let mut objective = unwritten(1);
    let error = gradient(&plain(&logits, &labels), given, &settings, &mut objective, Gradient::Unwanted);
    assert_eq!(error, Err(Error::Logsumexp));
    assert_eq!(read(&objective), [777.0]);
}
