//! Tests of losses, weights, objective and gradient against their equations, and of the passes against each other.

use super::*;
use crate::weightings::{Kl, KlBall};
use half::{bf16, f16};
use ndarray::{Array, ArrayD, ArrayViewMutD, Axis, IxDyn, ShapeBuilder};
use proptest::prelude::*;

mod adjustment;
mod extras;
mod in_place;
mod normalizer;
mod norms;
mod z_loss;

const KL: Weighting = Weighting::Kl(Kl { tau: 1.0, scale: 0.5, normalize: false });
const BALL: Weighting = Weighting::KlBall(KlBall { radius: 0.1 });
const SETTINGS: Settings = Settings::PLAIN;

#[derive(Debug)]
struct Result<T: Element> {
    losses: Vec<T::Real>,
    weights: Vec<T::Real>,
    objective: Vec<T::Real>,
    grad: ArrayD<T>,
    totals: Totals,
}

/// Memory for outputs, filled with a number that no kernel would leave.
fn unwritten<A: Real>(count: usize) -> Vec<MaybeUninit<A>> {
    vec![MaybeUninit::new(A::from_f64(777.0)); count]
}

fn read<A: Real>(out: &[MaybeUninit<A>]) -> Vec<A> {
    // SAFETY: `unwritten` wrote every element.
    unsafe { written(out) }.to_vec()
}

/// The memory of a gradient of the shape and the strides of `like`, filled with `like`'s numbers.
fn grad_memory<'a, T: Element>(like: &'a mut ArrayD<T>) -> ArrayViewMutD<'a, MaybeUninit<T>> {
    // SAFETY: a `MaybeUninit` has the layout of what it holds, and kernels write numbers only.
    unsafe { std::mem::transmute::<ArrayViewMutD<'a, T>, ArrayViewMutD<'a, MaybeUninit<T>>>(like.view_mut()) }
}

fn sizes<T: Element>(inputs: &Inputs<T>, settings: &Settings) -> [usize; 3] {
    let targets = inputs.logits.len() / inputs.logits.len_of(Axis(usize::from(inputs.logits.ndim() > 1)));
    let units = if settings.per_sample { inputs.logits.shape()[0] } else { targets };
    [targets, units, if settings.reduction == Reduction::None { targets } else { 1 }]
}

/// Inputs of logits and labels alone.
fn plain<'a, T: Element>(logits: &'a ArrayD<T>, labels: &'a ArrayD<i64>) -> Inputs<'a, T> {
    let target = Target::Int64(labels.view());
    Inputs { logits: logits.view(), target, class_weight: None, logit_adjustment: None, measure: None }
}

fn run<T: Element>(
    inputs: &Inputs<T>,
    weighting: Weighting,
    settings: &Settings,
) -> std::result::Result<Result<T>, Error> {
    let [targets, units, values] = sizes(inputs, settings);
    let (mut losses, mut weights) = (unwritten(targets), unwritten(units));
    let (mut objective, mut grad) = (unwritten(values), inputs.logits.to_owned());
    let out = Outputs {
        losses: &mut losses,
        weights: &mut weights,
        objective: &mut objective,
        grad: Gradient::Separate(grad_memory(&mut grad)),
    };
    let totals = cross_entropy(inputs, weighting, settings, out)?;
    let (losses, weights, objective) = (read(&losses), read(&weights), read(&objective));
    Ok(Result { losses, weights, objective, grad, totals })
}

/// The same in two passes, with weights from `weigh` of the losses.
fn run_in_two<T: Element>(
    inputs: &Inputs<T>,
    settings: &Settings,
    weigh: impl Fn(&[T::Real]) -> Vec<T::Real>,
) -> Result<T> {
    let [targets, _, values] = sizes(inputs, settings);
    let (mut out, mut logsumexp) = (unwritten(targets), unwritten(targets));
    let (mut objective, mut grad) = (unwritten(values), inputs.logits.to_owned());
    losses(inputs, settings, &mut out, Some(&mut logsumexp)).unwrap();
    let (losses, logsumexp) = (read(&out), read(&logsumexp));
    let weights = weigh(&losses);
    let given = Given { losses: &losses, weights: &weights, logsumexp: Some(&logsumexp) };
    let memory = Gradient::Separate(grad_memory(&mut grad));
    let totals = gradient(inputs, given, settings, &mut objective, memory).unwrap();
    Result { weights, objective: read(&objective), losses, grad, totals }
}

fn bits<A: Real>(numbers: &[A]) -> Vec<u64> {
    numbers.iter().map(|x| x.to_f64().to_bits()).collect()
}

fn grad_bits<T: Element>(grad: &ArrayD<T>) -> Vec<u64> {
    grad.iter().map(|x| x.widen().to_f64().to_bits()).collect()
}

/// Rows of logits and of target mass, to losses and the gradient of `sum_i factor_i l_i`.
fn by_hand(logits: &[Vec<f64>], mass: &[Vec<f64>], factor: impl Fn(f64) -> f64) -> (Vec<f64>, Vec<f64>) {
    let (mut losses, mut grad) = (Vec::new(), Vec::new());
    for (x, t) in logits.iter().zip(mass) {
        let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = x.iter().map(|x| (x - max).exp()).sum();
        let loss: f64 = x.iter().zip(t).map(|(x, t)| t * (max + sum.ln() - x)).sum();
        let total: f64 = t.iter().sum();
        grad.extend(x.iter().zip(t).map(|(x, t)| factor(loss) * (total * (x - max).exp() / sum - t)));
        losses.push(loss);
    }
    (losses, grad)
}

fn noise(n: usize, seed: u64) -> impl Iterator<Item = f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n).map(move |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 53) as f64
    })
}

fn check<T: Element>(
    n: usize,
    classes: usize,
    smoothing: f64,
    weighted: bool,
    soft: bool,
    seed: u64,
    eps: f64,
) {
    let narrow = |x: f64| T::narrow(T::Real::from_f64(x));
    let logits: Vec<T> = noise(n * classes, seed).map(|x| narrow(16.0 * x - 8.0)).collect();
    let labels: Vec<i64> = noise(n, seed + 1).map(|x| (x * classes as f64) as i64).collect();
    let c: Vec<T::Real> = noise(classes, seed + 2).map(|x| T::Real::from_f64(0.1 + x)).collect();
    let p: Vec<T> = noise(n * classes, seed + 3).map(|x| narrow(x / classes as f64)).collect();
    let shape = IxDyn(&[n, classes]);
    let logits = ArrayD::from_shape_vec(shape.clone(), logits).unwrap();
    let labels_view = ArrayD::from_shape_vec(IxDyn(&[n]), labels.clone()).unwrap();
    let p = ArrayD::from_shape_vec(shape, p).unwrap();
    let target = if soft { Target::Probabilities(p.view()) } else { Target::Int64(labels_view.view()) };
    let settings = Settings { label_smoothing: smoothing, reduction: Reduction::Sum, ..SETTINGS };
    let class_weight = weighted.then_some(&c[..]);
    let inputs = Inputs { target, class_weight, ..plain(&logits, &labels_view) };
    let result = run(&inputs, KL, &settings).unwrap();

    let class_weight = |k: usize| if weighted { c[k].to_f64() } else { 1.0 };
    let rows = |a: &ArrayD<T>| -> Vec<Vec<f64>> {
        a.rows().into_iter().map(|r| r.iter().map(|x| x.widen().to_f64()).collect()).collect()
    };
    let mass: Vec<Vec<f64>> = rows(&p)
        .iter()
        .zip(&labels)
        .map(|(p, &y)| {
            let hard = |k: usize| if soft { p[k] } else { f64::from(u8::from(k as i64 == y)) };
            let spread = smoothing / classes as f64;
            (0..classes).map(|k| class_weight(k) * ((1.0 - smoothing) * hard(k) + spread)).collect()
        })
        .collect();
    let (losses, grad) = by_hand(&rows(&logits), &mass, |l| (0.5 * l.min(1.0)).exp());
    // Sums of `classes` terms in the accumulator, each rounded once; the gradient is rounded to the logits' type.
    let sum_eps = if size_of::<T::Real>() == 8 { f64::EPSILON } else { f64::from(f32::EPSILON) };
    let tolerance = sum_eps * (16.0 + classes as f64);
    for (a, e) in result.losses.iter().zip(&losses) {
        assert!((a.to_f64() - e).abs() <= tolerance * (8.0 + e.abs()), "loss {} {e}", a.to_f64());
    }
    for (a, e) in result.grad.iter().zip(&grad) {
        let error = (a.widen().to_f64() - e).abs();
        assert!(error <= tolerance * 2.0 + eps * e.abs() + eps * 1e-4, "gradient {} {e}", a.widen().to_f64());
    }
    let objective: f64 = losses.iter().map(|&l| l * (0.5 * l.min(1.0)).exp()).sum();
    assert!((result.objective[0].to_f64() - objective).abs() <= tolerance * 16.0 * n as f64);
    assert_eq!(result.totals.counted, n);
}

/// Rows of logits are contiguous and the gradient's are not: its class axis is the outer one in memory.
#[test]
fn a_gradient_of_another_layout_than_the_logits_gets_the_same_numbers() {
    for classes in [5, 24, 70] {
        let shape = IxDyn(&[7, classes]);
        let numbers = noise(7 * classes, 3).map(|x| 8.0 * x - 4.0).collect();
        let logits = ArrayD::from_shape_vec(shape.clone(), numbers).unwrap();
        let labels = Array::from_shape_fn(IxDyn(&[7]), |i| (3 * i[0] % classes) as i64);
        let inputs = plain(&logits, &labels);
        for weighting in [KL, BALL] {
            let expected = run(&inputs, weighting, &SETTINGS).unwrap();
            let mut grad = ArrayD::from_elem(shape.clone().f(), 777.0);
            let (mut losses, mut weights, mut objective) = (unwritten(7), unwritten(7), unwritten(1));
            let out = Outputs {
                losses: &mut losses,
                weights: &mut weights,
                objective: &mut objective,
                grad: Gradient::Separate(grad_memory(&mut grad)),
            };
            cross_entropy(&inputs, weighting, &SETTINGS, out).unwrap();
            for (a, e) in grad.iter().zip(&expected.grad) {
                // Softmax sums over the classes, in another order.
                assert!((a - e).abs() <= classes as f64 * f64::EPSILON, "{classes} classes: {a} {e}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn losses_objective_and_gradient_follow_the_equations(
        n in 1usize..150, classes in prop::sample::select(vec![1, 2, 5, 16, 47, 48, 49, 63, 64, 65, 130]),
        smoothing in prop::sample::select(vec![0.0, 0.2, 1.0]), weighted: bool, soft: bool, seed in 0u64..1000
    ) {
        check::<f64>(n, classes, smoothing, weighted, soft, seed, 0.0);
        check::<f32>(n, classes, smoothing, weighted, soft, seed, 1e-6);
        check::<bf16>(n, classes, smoothing, weighted, soft, seed, 1.0 / 128.0);
        check::<f16>(n, classes, smoothing, weighted, soft, seed, 1.0 / 1024.0);
    }

    #[test]
    fn any_layout_gives_the_same_losses(seed in 0u64..1000, classes in prop::sample::select(vec![3, 48, 60])) {
        let shape = [4, classes, 3, 5];
        let logits = Array::from_shape_vec(IxDyn(&shape), noise(4 * classes * 15, seed).collect()).unwrap();
        let labels = Array::from_shape_fn(IxDyn(&[4, 3, 5]), |i| ((i[0] + i[1] * 7 + i[2]) % classes) as i32);
        let inputs = |logits, target| Inputs {
            logits, target, class_weight: None, logit_adjustment: None, measure: None
        };
        let plain = run(&inputs(logits.view(), Target::Int32(labels.view())), KL, &SETTINGS).unwrap();
        let mut classes_last = ArrayD::zeros(IxDyn(&shape).f());
        classes_last.assign(&logits);
        for mut view in [classes_last.view(), logits.view()] {
            view.invert_axis(Axis(0));
            let mut flipped = labels.view();
            flipped.invert_axis(Axis(0));
            let other = run(&inputs(view, Target::Int32(flipped)), KL, &SETTINGS).unwrap();
            for i in 0..60 {
                let (a, b) = (plain.losses[i], other.losses[(3 - i / 15) * 15 + i % 15]);
                prop_assert!((a - b).abs() < 1e-13);
            }
            prop_assert!((plain.objective[0] - other.objective[0]).abs() < 1e-13);
            prop_assert!((plain.weights[0] - other.weights[45]).abs() < 1e-13);
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    for shape in [[3000, 10], [700, 200]] {
        let logits: Vec<f32> = noise(shape[0] * shape[1], 5).map(|x| x as f32).collect();
        let logits = ArrayD::from_shape_vec(IxDyn(&shape), logits).unwrap();
        let labels = Array::from_shape_fn(IxDyn(&shape[..1]), |i| (i[0] % shape[1]) as i64);
        let [one, three] = [1, 3].map(|threads| {
            let settings = Settings { threads, ..SETTINGS };
            run(&plain(&logits, &labels), KL, &settings).unwrap()
        });
        assert_eq!(one.grad, three.grad);
        assert_eq!(one.objective[0].to_bits(), three.objective[0].to_bits());
    }
}

#[test]
fn a_label_out_of_range_is_refused_before_anything_is_written() {
    let logits = ArrayD::<f32>::zeros(IxDyn(&[2, 3, 2]));
    let mut labels = ArrayD::<i64>::zeros(IxDyn(&[2, 2]));
    labels[[1, 0]] = 3;
    let mut in_columns = ArrayD::zeros(IxDyn(&[2, 2]).f());
    in_columns.assign(&labels);
    // Labels that lie in row-major order and have no sample weights are read by a loop of their own.
    let cases = [(&labels, None), (&in_columns, None), (&labels, Some(&[1.0f32; 4][..]))];
    for (labels, measure) in cases {
        let (mut losses, mut weights, mut objective) = (unwritten(4), unwritten(4), unwritten(1));
        let out = Outputs {
            losses: &mut losses,
            weights: &mut weights,
            objective: &mut objective,
            grad: Gradient::Unwanted,
        };
        let inputs = Inputs { measure, ..plain(&logits, labels) };
        let error = cross_entropy(&inputs, KL, &SETTINGS, out).unwrap_err();
        assert_eq!(error, Error::OutOfRange { index: 3, position: vec![1, 0], classes: 3 });
        assert_eq!(read(&losses), [777.0; 4]);
    }
}

#[test]
fn ignored_targets_weigh_nothing_and_get_no_gradient() {
    let logits = ArrayD::from_shape_vec(IxDyn(&[2, 3]), vec![1.0, 2.0, 3.0, 1.0, 2.0, 3.0]).unwrap();
    let labels = ArrayD::from_shape_vec(IxDyn(&[2]), vec![-100i64, 0]).unwrap();
    for weighting in [KL, BALL] {
        let result = run::<f64>(&plain(&logits, &labels), weighting, &SETTINGS).unwrap();
        assert_eq!(result.weights[0], 0.0);
        assert_eq!(result.grad.as_slice().unwrap()[..3], [0.0; 3]);
        assert!((result.objective[0] - result.weights[1] * result.losses[1]).abs() < 1e-15);
        assert_eq!(result.totals, Totals { denominator: 1.0, counted: 1 });
    }
}

/// Logits and labels of a shape, one label in eight ignored.
fn example<T: Element>(shape: &[usize], seed: u64) -> (ArrayD<T>, ArrayD<i64>) {
    let mut targets = shape.to_vec();
    let classes = targets.remove(1);
    let logits = noise(shape.iter().product(), seed).map(|x| T::narrow(T::Real::from_f64(8.0 * x - 4.0)));
    let labels = noise(targets.iter().product(), seed + 1)
        .map(|x| if x < 0.125 { -100 } else { ((x - 0.125) / 0.875 * classes as f64) as i64 });
    let logits = ArrayD::from_shape_vec(IxDyn(shape), logits.collect()).unwrap();
    (logits, ArrayD::from_shape_vec(IxDyn(&targets), labels.collect()).unwrap())
}

const SHAPES: [&[usize]; 4] = [&[300, 5], &[40, 70], &[6, 4, 7], &[3, 40, 5]];
const REDUCTIONS: [Reduction; 3] = [Reduction::None, Reduction::Mean, Reduction::Sum];

fn two_passes_equal_one<T: Element>() {
    for shape in SHAPES {
        for (reduction, label_smoothing) in REDUCTIONS.into_iter().zip([0.0, 0.1, 0.0]) {
            let (logits, labels) = example::<T>(shape, 3);
            let settings = Settings { label_smoothing, reduction, ..SETTINGS };
            let c: Vec<T::Real> = noise(shape[1], 9).map(|x| T::Real::from_f64(x + 0.5)).collect();
            let p: Vec<T::Real> =
                noise(labels.len(), 8).map(|x| T::Real::from_f64((4.0 * x).floor())).collect();
            for measure in [None, Some(&p[..])] {
                let inputs = Inputs { class_weight: Some(&c), measure, ..plain(&logits, &labels) };
                let one = run(&inputs, KL, &settings).unwrap();
                let two = run_in_two(&inputs, &settings, |_| one.weights.clone());
                assert_eq!(grad_bits(&one.grad), grad_bits(&two.grad), "{shape:?} {reduction:?}");
                assert_eq!(bits(&one.objective), bits(&two.objective), "{shape:?} {reduction:?}");
                assert_eq!(one.totals, two.totals);
                // A sample weight of 0 leaves a target out of the single pass; `losses` does not know of it.
                for (i, (a, b)) in one.losses.iter().zip(&two.losses).enumerate() {
                    let left_out = measure.is_some_and(|p| p[i] == T::Real::default());
                    assert!(left_out || a == b);
                }
            }
        }
    }
}

#[test]
fn the_gradient_of_given_weights_equals_the_single_pass_bit_for_bit() {
    two_passes_equal_one::<f32>();
    two_passes_equal_one::<f64>();
    two_passes_equal_one::<bf16>();
}

#[test]
fn weights_of_a_whole_batch_equal_those_given_to_the_second_pass() {
    for (weighting, per_sample) in [(BALL, false), (BALL, true), (KL, true)] {
        let (logits, labels) = example::<f64>(&[6, 4, 7], 5);
        let settings = Settings { per_sample, ..SETTINGS };
        let inputs = plain(&logits, &labels);
        let one = run(&inputs, weighting, &settings).unwrap();
        let two = run_in_two(&inputs, &settings, |_| one.weights.clone());
        assert_eq!(grad_bits(&one.grad), grad_bits(&two.grad));
        assert_eq!(bits(&one.objective), bits(&two.objective));
        if per_sample {
            let counted = labels.iter().map(|&label| f64::from(u8::from(label >= 0)));
            let counted: Vec<f64> = counted.collect();
            let means = one.losses.chunks(7).zip(counted.chunks(7));
            let means: Vec<f64> = means.map(|(l, c)| l.iter().sum::<f64>() / c.iter().sum::<f64>()).collect();
            let mut expected = unwritten(means.len());
            let means = Vector::of(&means);
            sample_weights(&Batch::new(&means, None, None, 1), weighting, &mut [], &mut expected).unwrap();
            for (w, e) in one.weights.iter().zip(read::<f64>(&expected)) {
                // The sums of a mean may be in another order; a ball's root is found to 1e-15 of its radius.
                assert!((w - e).abs() <= 1e-13, "{w} {e}");
            }
        }
    }
}

#[test]
fn a_sample_weight_of_zero_is_as_an_ignored_label_and_its_label_is_not_looked_at() {
    for shape in SHAPES {
        for per_sample in [false, true] {
            for reduction in REDUCTIONS {
                let (logits, labels) = example::<f64>(shape, 11);
                let settings = Settings { per_sample, reduction, ..SETTINGS };
                let units = if per_sample { shape[0] } else { labels.len() };
                let p: Vec<f64> = noise(units, 4).map(|x| if x < 0.3 { 0.0 } else { 1.0 }).collect();
                let (mut ignored, mut wrong) = (labels.clone(), labels.clone());
                for (i, (ignored, wrong)) in ignored.iter_mut().zip(&mut wrong).enumerate() {
                    if p[i * units / labels.len()] == 0.0 {
                        (*ignored, *wrong) = (-100, 12345);
                    }
                }
                let expected = run(&plain(&logits, &ignored), KL, &settings).unwrap();
                let inputs = Inputs { measure: Some(&p), ..plain(&logits, &wrong) };
                let result = run(&inputs, KL, &settings).unwrap();
                assert_eq!(result.losses, expected.losses);
                assert_eq!(result.weights, expected.weights);
                assert_eq!(result.objective, expected.objective);
                assert_eq!(result.grad, expected.grad);
                assert_eq!(result.totals, expected.totals);
            }
        }
    }
}

#[test]
fn a_class_distribution_of_sample_weight_zero_takes_no_part() {
    let (mut logits, _) = example::<f64>(&[9, 30], 2);
    logits.index_axis_mut(Axis(0), 4).fill(f64::NAN);
    let mut q = ArrayD::from_shape_vec(IxDyn(&[9, 30]), noise(270, 6).collect()).unwrap();
    q.index_axis_mut(Axis(0), 4).fill(f64::NAN);
    let mut p = [1.0; 9];
    p[4] = 0.0;
    for classes in [5, 30] {
        let logits = logits.slice_axis(Axis(1), (..classes).into());
        let q = q.slice_axis(Axis(1), (..classes).into());
        let inputs = |keep: std::ops::Range<usize>, measure| Inputs {
            logits: logits.slice_axis(Axis(0), keep.clone().into()),
            target: Target::Probabilities(q.slice_axis(Axis(0), keep.into())),
            class_weight: None,
            logit_adjustment: None,
            measure,
        };
        let settings = Settings { reduction: Reduction::Sum, ..SETTINGS };
        let all = run(&inputs(0..9, Some(&p)), KL, &settings).unwrap();
        let (first, last) =
            (run(&inputs(0..4, None), KL, &settings), run(&inputs(5..9, None), KL, &settings));
        let (first, last) = (first.unwrap(), last.unwrap());
        assert_eq!(all.totals, Totals { denominator: 8.0, counted: 8 });
        assert_eq!(all.losses, [&first.losses[..], &[0.0], &last.losses].concat());
        assert_eq!(all.weights, [&first.weights[..], &[0.0], &last.weights].concat());
        assert!(all.grad.index_axis(Axis(0), 3).iter().all(|&g| g.is_finite()));
        let sum = first.objective[0] + last.objective[0];
        assert!((all.objective[0] - sum).abs() <= 8.0 * f64::EPSILON * sum);
    }
}

#[test]
fn an_integer_sample_weight_equals_repetition() {
    for (shape, per_sample) in [(&[30usize, 4][..], false), (&[30, 40], false), (&[8, 3, 5], true)] {
        let (logits, labels) = example::<f64>(shape, 21);
        let p: Vec<f64> = noise(shape[0], 1).map(|x| (4.0 * x).floor()).collect();
        let index: Vec<usize> = (0..shape[0]).flat_map(|i| vec![i; p[i] as usize]).collect();
        let (repeated, repeated_labels) = (logits.select(Axis(0), &index), labels.select(Axis(0), &index));
        let c: Vec<f64> = noise(shape[1], 5).map(|x| x + 0.5).collect();
        for reduction in REDUCTIONS {
            let settings = Settings { per_sample, reduction, ..SETTINGS };
            let class_weight = Some(&c[..]);
            let inputs = Inputs { class_weight, measure: Some(&p), ..plain(&logits, &labels) };
            let once = run(&inputs, KL, &settings).unwrap();
            let inputs = Inputs { class_weight, ..plain(&repeated, &repeated_labels) };
            let often = run(&inputs, KL, &settings).unwrap();
            // Sums of as many terms, each rounded once.
            let tolerance = f64::EPSILON * (8.0 + repeated_labels.len() as f64);
            let (a, b): (f64, f64) = (once.objective.iter().sum(), often.objective.iter().sum());
            assert!((a - b).abs() <= tolerance * b.abs(), "{a} {b}");
            let (a, b) = (once.totals.denominator, often.totals.denominator);
            assert!((a - b).abs() <= tolerance * b, "{a} {b}");
            let mut sum = ArrayD::<f64>::zeros(logits.raw_dim());
            for (k, &i) in index.iter().enumerate() {
                sum.index_axis_mut(Axis(0), i)
                    .zip_mut_with(&often.grad.index_axis(Axis(0), k), |s, g| *s += g);
            }
            for (a, b) in once.grad.iter().zip(&sum) {
                assert!((a - b).abs() <= tolerance * (b.abs() + 1e-3), "{a} {b}");
            }
        }
    }
}

#[test]
fn weights_of_a_whole_batch_heed_sample_weights() {
    let (logits, labels) = example::<f32>(&[4, 3], 1);
    let inputs = Inputs { measure: Some(&[1.0, 0.0, 2.0, 1.0]), ..plain(&logits, &labels) };
    let weights = run(&inputs, BALL, &SETTINGS).unwrap().weights;
    // The label of the last row is ignored.
    let mean = (weights[0] + 2.0 * weights[2]) / 3.0;
    assert!(weights[1] == 0.0 && weights[3] == 0.0 && (mean - 1.0).abs() < 1e-6, "{weights:?}");
    let inputs = Inputs { measure: Some(&[1.0; 3]), ..plain(&logits, &labels) };
    let error = run(&inputs, KL, &SETTINGS).unwrap_err();
    assert!(error.to_string().contains("sample_weight must have 4 elements"), "{error}");
}

#[test]
fn a_weight_of_zero_silences_an_infinite_loss_but_not_a_nan() {
    let falling = Weighting::Kl(Kl { tau: f64::INFINITY, scale: -1.0, normalize: false });
    for (classes, reduction) in [(3, Reduction::Sum), (40, Reduction::Sum), (3, Reduction::None)] {
        let mut logits = ArrayD::<f32>::zeros(IxDyn(&[3, classes]));
        logits[[1, 0]] = f32::NEG_INFINITY;
        let labels = ArrayD::<i64>::zeros(IxDyn(&[3]));
        let settings = Settings { reduction, ..SETTINGS };
        let result = run(&plain(&logits, &labels), falling, &settings).unwrap();
        assert_eq!((result.losses[1], result.weights[1]), (f32::INFINITY, 0.0));
        assert!(result.objective.iter().all(|o| o.is_finite()));
        assert!(result.grad.index_axis(Axis(0), 1).iter().all(|&g| g == 0.0));
        assert!(result.grad.index_axis(Axis(0), 2).iter().all(|&g| g.is_finite() && g != 0.0));

        logits[[1, 0]] = f32::NAN;
        let result = run_in_two(&plain(&logits, &labels), &settings, |_| vec![1.0, 0.0, 1.0]);
        assert!(result.losses[1].is_nan());
        assert!(result.objective[result.objective.len() / 2].is_nan());
        assert!(result.grad.index_axis(Axis(0), 1).iter().all(|g| g.is_nan()));
        assert!(result.grad.index_axis(Axis(0), 2).iter().all(|g| g.is_finite()));
    }
}

#[test]
fn nan_logits_of_an_ignored_target_reach_its_own_gradient_alone() {
    for (shape, at) in [(&[4, 3][..], 1), (&[4, 40], 2)] {
        let mut logits = ArrayD::<f32>::ones(IxDyn(shape));
        logits.index_axis_mut(Axis(0), at).fill(f32::NAN);
        let mut labels = ArrayD::<i64>::zeros(IxDyn(&[4]));
        labels[at] = -100;
        for label_smoothing in [0.0, 0.2] {
            let settings = Settings { label_smoothing, ..SETTINGS };
            let result = run(&plain(&logits, &labels), KL, &settings).unwrap();
            assert_eq!((result.losses[at], result.weights[at]), (0.0, 0.0));
            assert!(result.objective[0].is_finite());
            assert!(result.grad.index_axis(Axis(0), at).iter().all(|g| g.is_nan()));
            assert_eq!(result.grad.iter().filter(|g| !g.is_finite()).count(), shape[1]);
        }
    }
}
