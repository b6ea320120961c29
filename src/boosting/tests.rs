//! Tests of the derivatives against differences, and of what is refused.

use super::*;
use crate::layout::{Vector, written};
use ndarray::{Array2, ShapeBuilder};
use proptest::prelude::*;

const KL: [f64; 3] = [1.5, 0.4, 0.0];

fn kl() -> Weighting {
    Weighting::new("kl", &KL).unwrap()
}

/// Loss, gradient and diagonal of the Hessian of one sample, as the equations say.
fn by_hand(loss: Loss, f: &[f64], y: f64) -> (f64, Vec<f64>, Vec<f64>) {
    match loss {
        Loss::Logistic => {
            let (q, r) = (1.0 / (1.0 + (-f[0]).exp()), 1.0 / (1.0 + f[0].exp()));
            (
                y * (-f[0]).exp().ln_1p() + (1.0 - y) * f[0].exp().ln_1p(),
                vec![(1.0 - y) * q - y * r],
                vec![q * r],
            )
        }
        Loss::Softmax => {
            let max = f.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = f.iter().map(|f| (f - max).exp()).sum();
            let q: Vec<f64> = f.iter().map(|f| (f - max).exp() / sum).collect();
            let own = |j: usize| f64::from(u8::from(j == y as usize));
            let gradient = (0..f.len()).map(|j| q[j] - own(j)).collect();
            (sum.ln() + max - f[y as usize], gradient, q.iter().map(|q| q * (1.0 - q)).collect())
        }
        Loss::SquaredError => (0.5 * (f[0] - y).powi(2), vec![f[0] - y], vec![1.0]),
    }
}

type Filled = (Vec<f64>, Array2<f64>, Array2<f64>);

fn fill(
    loss: Loss,
    margins: &Array2<f64>,
    labels: &[f64],
    measure: Option<&[f64]>,
    threads: usize,
) -> Result<Filled, Error> {
    fill_with(kl(), Some(2.0), loss, margins, labels, measure, threads).map(|(filled, _)| filled)
}

fn fill_with(
    weighting: Weighting,
    curvature: Option<f64>,
    loss: Loss,
    margins: &Array2<f64>,
    labels: &[f64],
    measure: Option<&[f64]>,
    threads: usize,
) -> Result<(Filled, f64), Error> {
    let labels = Vector::of(labels);
    let inputs = Inputs { loss, margins: margins.view(), labels: &labels, threads };
    let mut found = vec![MaybeUninit::uninit(); margins.nrows()];
    losses(&inputs, &mut found)?;
    // SAFETY: all losses were written.
    let found = unsafe { written(&found) }.to_vec();
    let mut out = [0, 1].map(|_| Array2::from_elem(margins.dim().f(), MaybeUninit::new(0.0)));
    let measure = measure.map(Vector::of);
    let [gradient, hessian] = &mut out;
    let (gradient, hessian) = (gradient.view_mut(), hessian.view_mut());
    let measure = measure.as_ref().map(|measure| measure as _);
    let weights = Weights::Pointwise(weighting);
    let largest = derivatives(&inputs, Outputs { measure, weights, curvature, gradient, hessian })?;
    // SAFETY: they were initialised from the start.
    let [gradient, hessian] = out.map(|out| out.mapv(|x| unsafe { x.assume_init() }));
    Ok(((found, gradient, hessian), largest))
}

fn samples(loss: Loss, count: usize, scale: f64) -> (Array2<f64>, Vec<f64>, Vec<f64>) {
    let classes = if loss == Loss::Softmax { 5 } else { 1 };
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    let margins = Array2::from_shape_fn((count, classes), |_| scale * (random() - 0.5));
    let labels = (0..count)
        .map(|_| match loss {
            Loss::Softmax => (random() * classes as f64).floor(),
            Loss::Logistic => [0.0, 1.0, 0.3][(random() * 3.0) as usize],
            Loss::SquaredError => random(),
        })
        .collect();
    (margins, labels, (0..count).map(|i| (i % 4) as f64).collect())
}

proptest! {
    #[test]
    fn losses_and_derivatives_are_those_of_the_equations(
        which in 0..3usize, count in 0usize..300, scale in 0.0f64..60.0, with_measure in any::<bool>()
    ) {
        let loss = [Loss::Logistic, Loss::Softmax, Loss::SquaredError][which];
        let (margins, labels, measure) = samples(loss, count, scale);
        let (found, gradient, hessian) =
            fill(loss, &margins, &labels, with_measure.then_some(&measure[..]), 1).unwrap();
        for i in 0..count {
            let row: Vec<f64> = margins.row(i).to_vec();
            let (l, g, h) = by_hand(loss, &row, labels[i]);
            let [tau, s, _] = KL;
            let p = if with_measure { measure[i] } else { 1.0 };
            let w = p * (s * l.min(tau)).exp();
            // The loss is a sum of a few terms of at most the margins' size; each exponential has 2 ulp.
            let bound = 16.0 * f64::EPSILON * (1.0 + scale + l);
            prop_assert!((found[i] - l).abs() <= bound, "{} {}", found[i], l);
            for j in 0..row.len() {
                let bound = bound * w * (1.0 + g[j].abs());
                prop_assert!((gradient[(i, j)] - w * g[j]).abs() <= bound);
                prop_assert!((hessian[(i, j)] - 2.0 * w * h[j]).abs() <= bound);
            }
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    for loss in [Loss::Logistic, Loss::Softmax, Loss::SquaredError] {
        let (margins, labels, measure) = samples(loss, 50_000, 9.0);
        let one = fill(loss, &margins, &labels, Some(&measure), 1).unwrap();
        assert_eq!(one, fill(loss, &margins, &labels, Some(&measure), 3).unwrap());
    }
}

#[test]
fn tiny_losses_keep_their_digits() {
    let margins = Array2::from_shape_vec((3, 1), vec![30.0, 300.0, -700.0]).unwrap();
    let (found, ..) = fill(Loss::Logistic, &margins, &[1.0, 1.0, 0.0], None, 1).unwrap();
    for (l, f) in found.into_iter().zip([30.0f64, 300.0, 700.0]) {
        let exact = (-f).exp().ln_1p();
        assert!((l - exact).abs() <= 4.0 * f64::EPSILON * exact, "{l} {exact}");
    }
}

#[test]
fn a_margin_that_is_infinite_and_right_has_no_loss() {
    let margins = Array2::from_shape_vec((2, 1), vec![f64::INFINITY, f64::NEG_INFINITY]).unwrap();
    let (found, gradient, _) = fill(Loss::Logistic, &margins, &[1.0, 0.0], None, 1).unwrap();
    assert_eq!((found, gradient.into_raw_vec_and_offset().0), (vec![0.0; 2], vec![0.0; 2]));
}

#[test]
fn the_absolute_gradient_can_take_the_place_of_the_hessian() {
    let (margins, labels, measure) = samples(Loss::Softmax, 50, 9.0);
    let ((_, gradient, hessian), _) =
        fill_with(kl(), None, Loss::Softmax, &margins, &labels, Some(&measure), 1).unwrap();
    assert_eq!(gradient.mapv(f64::abs), hessian);
    assert!(gradient.iter().any(|&g| g < 0.0));
}

#[test]
fn derivatives_beyond_single_precision_are_told_unless_their_sample_has_no_measure() {
    // A loss of 1800 weighs exp(1800), which is infinite; one of 100 weighs exp(100) = 3e43, beyond f32.
    let weighting = Weighting::new("kl", &[f64::INFINITY, 1.0, 0.0]).unwrap();
    let labels = vec![0.0; 3000];
    for (margin, finite) in [(60.0f64, false), (200.0f64.sqrt(), false), (3.0, true)] {
        let margins = Array2::from_shape_fn((3000, 1), |(i, _)| if i == 2000 { margin } else { 1.0 });
        let fill = |measure: Option<&[f64]>| {
            fill_with(weighting, Some(1.0), Loss::SquaredError, &margins, &labels, measure, 3)
        };
        assert_eq!(fill(None).err(), (!finite).then_some(Error::Overflow(2000)));
        let mut measure = vec![1.0; 3000];
        measure[2000] = 0.0;
        let ((_, gradient, hessian), largest) = fill(Some(&measure)).unwrap();
        assert_eq!((gradient[(2000, 0)], hessian[(2000, 0)]), (0.0, 0.0));
        assert!((largest - 0.5f64.exp()).abs() <= 4.0 * f64::EPSILON);
    }
}

#[test]
fn the_first_wrong_label_or_mass_is_told() {
    for (loss, wrong) in
        [(Loss::Logistic, [-0.1, f64::NAN]), (Loss::Softmax, [5.0, 0.5]), (Loss::SquaredError, [f64::NAN; 2])]
    {
        let (margins, mut labels, mut measure) = samples(loss, 3000, 1.0);
        measure[2500] = -1.0;
        assert_eq!(fill(loss, &margins, &labels, Some(&measure), 3), Err(Error::Measure(2500)));
        labels[2900] = wrong[0];
        labels[1700] = wrong[1];
        assert_eq!(fill(loss, &margins, &labels, Some(&measure), 3), Err(Error::Label(1700)));
    }
}
