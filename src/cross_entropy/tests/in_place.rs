//! The gradient in the place of the logits, against the gradient in memory of its own: the same, bit for bit.

use super::*;

/// As [`run`] and, with weights, as [`run_in_two`], with the gradient in the place of the logits.
fn run_in_place<T: Element>(
    logits: &ArrayD<T>,
    (target, class_weight, logit_adjustment, measure): Rest<'_, T>,
    weighting: Weighting,
    settings: &Settings,
    given: Option<&[T::Real]>,
) -> Result<T> {
    let mut grad = logits.clone();
    // SAFETY: the array, which this function alone has, is read next when the calls are over, and the view is made of a
    // pointer that may be written through.
    let (view, right) = unsafe { (grad.raw_view_mut().raw_view().deref_into_view(), Overwrite::granted()) };
    let inputs = Inputs { logits: view, target, class_weight, logit_adjustment, measure };
    let [targets, units, values] = sizes(&inputs, settings);
    let (mut out, mut objective, memory) = (unwritten(targets), unwritten(values), Gradient::InPlace(right));
    let (losses, weights, totals) = if let Some(weights) = given {
        let mut logsumexp = unwritten(targets);
        losses(&inputs, settings, &mut out, Some(&mut logsumexp)).unwrap();
        let (losses, logsumexp) = (read(&out), read(&logsumexp));
        let given = Given { losses: &losses, weights, logsumexp: Some(&logsumexp) };
        let totals = gradient(&inputs, given, settings, &mut objective, memory).unwrap();
        (losses, weights.to_vec(), totals)
    } else {
        let mut weights = unwritten(units);
        let (losses, weights, objective) = (&mut out[..], &mut weights[..], &mut objective[..]);
        let outputs = Outputs { losses, weights, objective, grad: memory };
        let totals = cross_entropy(&inputs, weighting, settings, outputs).unwrap();
        (read(&out), read(weights), totals)
    };
    drop(inputs);
    Result { losses, weights, objective: read(&objective), grad, totals }
}

/// Target, class weights, logit adjustment and sample weights.
type Rest<'a, T> = (
    Target<'a, T>,
    Option<&'a [<T as Element>::Real]>,
    Option<&'a [<T as Element>::Real]>,
    Option<&'a [<T as Element>::Real]>,
);

/// `order` names the axes of the logits in the order they have in memory.
fn compare<T: Element>(shape: &[usize], order: &[usize], soft: bool, settings: &Settings, seed: u64) {
    let (numbers, mut labels) = example::<T>(shape, seed);
    let stored: Vec<usize> = order.iter().map(|&axis| shape[axis]).collect();
    let mut axes = vec![0; order.len()];
    for (i, &axis) in order.iter().enumerate() {
        axes[axis] = i;
    }
    let number = |x: f64| T::narrow(T::Real::from_f64(x));
    let mut logits = ArrayD::from_elem(IxDyn(&stored), number(0.0)).permuted_axes(axes);
    logits.assign(&numbers);
    // An ignored target may have NaN logits.
    logits.index_axis_mut(Axis(0), 0).fill(number(f64::NAN));
    labels.index_axis_mut(Axis(0), 0).fill(-100);
    let q =
        ArrayD::from_shape_vec(IxDyn(shape), noise(logits.len(), seed + 2).map(number).collect()).unwrap();
    let c: Vec<T::Real> = noise(shape[1], seed + 3).map(|x| T::Real::from_f64(x + 0.5)).collect();
    let a: Vec<T::Real> = noise(shape[1], seed + 5).map(|x| T::Real::from_f64(4.0 * x - 2.0)).collect();
    let units = if settings.per_sample { shape[0] } else { labels.len() };
    let p: Vec<T::Real> = noise(units, seed + 4).map(|x| T::Real::from_f64((4.0 * x).floor())).collect();
    for (weighting, class_weight, measure) in
        [(KL, None, None), (KL, Some(&c[..]), Some(&p[..])), (BALL, Some(&c[..]), None)]
    {
        let adjustment = (measure.is_some() || weighting == BALL).then_some(&a[..]);
        let rest = || {
            let target = if soft { Target::Probabilities(q.view()) } else { Target::Int64(labels.view()) };
            (target, class_weight, adjustment, measure)
        };
        let (target, class_weight, logit_adjustment, measure) = rest();
        let inputs = Inputs { logits: logits.view(), target, class_weight, logit_adjustment, measure };
        let one = run(&inputs, weighting, settings).unwrap();
        let two = run_in_two(&inputs, settings, |_| one.weights.clone());
        for (expected, given) in [(&one, None), (&two, Some(&one.weights[..]))] {
            let result = run_in_place(&logits, rest(), weighting, settings, given);
            assert_eq!(grad_bits(&result.grad), grad_bits(&expected.grad));
            assert_eq!(bits(&result.objective), bits(&expected.objective));
            assert_eq!(bits(&result.losses), bits(&expected.losses));
            assert_eq!(bits(&result.weights), bits(&expected.weights));
            assert_eq!(result.totals, expected.totals);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn the_gradient_in_place_is_the_separate_one_bit_for_bit(
        classes in prop::sample::select(vec![1, 5, 24, 31, 48, 65, 130, 700]),
        n in 1usize..9, inner in 1usize..6, last in 0..3usize, soft: bool, per_sample: bool,
        reduction in prop::sample::select(REDUCTIONS.to_vec()),
        label_smoothing in prop::sample::select(vec![0.0, 0.1, 1.0]), threads in 1usize..3, seed in 0u64..1000,
        z_loss in prop::sample::select(vec![0.0, 0.3])
    ) {
        let settings = Settings { label_smoothing, z_loss, per_sample, reduction, threads, ..SETTINGS };
        let order = [[0, 1, 2], [0, 2, 1], [2, 0, 1]][last];
        let shape = [n, classes, inner];
        compare::<f32>(&shape, &order, soft, &settings, seed);
        compare::<f64>(&shape, &order, soft, &settings, seed);
        compare::<bf16>(&shape, &order, soft, &settings, seed);
        compare::<f16>(&shape, &order, soft, &settings, seed);
    }
}

#[test]
fn threads_that_share_a_large_batch_in_place_do_not_change_a_bit() {
    for shape in [&[600, 500][..], &[30_000, 10]] {
        compare::<f32>(shape, &[0, 1], false, &Settings { threads: 2, ..SETTINGS }, 7);
        compare::<bf16>(shape, &[0, 1], true, &Settings { threads: 2, ..SETTINGS }, 8);
    }
}
