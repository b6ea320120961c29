//! Calls with a norm for each target, against calls with a base measure.

use super::*;

/// What [`with_norms`] and [`gradient_with_norms`] fill.
struct Normed<T: Element> {
    losses: Vec<T::Real>,
    weights: Vec<T::Real>,
    logsumexp: Vec<T::Real>,
    grad: ArrayD<T>,
    second: ArrayD<T>,
}

fn run_with_norms<T: Element>(
    inputs: &Inputs<T>,
    weighting: Weighting,
    settings: &Settings,
    norms: &[T::Real],
) -> Normed<T> {
    let [mut losses, mut weights, mut logsumexp] = [(); 3].map(|()| unwritten(norms.len()));
    let (mut grad, mut second) = (inputs.logits.to_owned(), inputs.logits.to_owned());
    let out = NormedOutputs {
        losses: &mut losses,
        weights: &mut weights,
        logsumexp: Some(&mut logsumexp),
        grad: Gradient::Separate(grad_memory(&mut grad)),
    };
    with_norms(inputs, weighting, settings, norms, out).unwrap();
    let weights = read(&weights);
    let memory = Gradient::Separate(grad_memory(&mut second));
    gradient_with_norms(inputs, settings, norms, Some(&weights), memory).unwrap();
    Normed { losses: read(&losses), weights, logsumexp: read(&logsumexp), grad, second }
}

fn compare<T: Element>(shape: &[usize], label_smoothing: f64, z_loss: f64) {
    let (logits, labels) = example::<T>(shape, 13);
    let settings = Settings { label_smoothing, z_loss, reduction: Reduction::Sum, ..SETTINGS };
    let norms: Vec<T::Real> =
        noise(labels.len(), 2).map(|x| T::Real::from_f64((4.0 * x).floor() / 3.0)).collect();
    let inputs = plain(&logits, &labels);
    let normed = run_with_norms(&inputs, KL, &settings, &norms);
    let measured = run(&Inputs { measure: Some(&norms), ..plain(&logits, &labels) }, KL, &settings).unwrap();
    let bare = run(&inputs, KL, &settings).unwrap();
    assert_eq!(grad_bits(&normed.grad), grad_bits(&measured.grad));
    assert_eq!(grad_bits(&normed.second), grad_bits(&measured.grad));
    // A norm of 0 leaves loss and weight as they are.
    assert_eq!((bits(&normed.losses), bits(&normed.weights)), (bits(&bare.losses), bits(&bare.weights)));
    let mut logsumexp = unwritten(labels.len());
    losses(&inputs, &settings, &mut unwritten(labels.len()), Some(&mut logsumexp)).unwrap();
    assert_eq!(bits(&normed.logsumexp), bits(&read(&logsumexp)));
}

#[test]
fn norms_act_on_the_gradient_as_a_base_measure_does() {
    for shape in SHAPES {
        for (label_smoothing, z_loss) in [(0.0, 0.0), (0.1, 0.0), (0.0, 0.2), (0.1, 0.2)] {
            compare::<f32>(shape, label_smoothing, z_loss);
            compare::<f64>(shape, label_smoothing, z_loss);
            compare::<bf16>(shape, label_smoothing, z_loss);
        }
    }
}

#[test]
fn without_weights_the_norms_alone_are_the_factors() {
    for shape in SHAPES {
        let (logits, labels) = example::<f64>(shape, 13);
        let norms: Vec<f64> = noise(labels.len(), 2).map(|x| 3.0 * x).collect();
        let inputs = plain(&logits, &labels);
        let [ones, none] = [Some(&vec![1.0; norms.len()][..]), None].map(|weights| {
            let mut grad = logits.clone();
            let memory = Gradient::Separate(grad_memory(&mut grad));
            gradient_with_norms(&inputs, &SETTINGS, &norms, weights, memory).unwrap();
            grad
        });
        assert_eq!(ones, none);
    }
}

#[test]
fn a_norm_of_zero_gives_no_gradient_however_large_the_weight() {
    let infinite = Weighting::Kl(Kl { tau: f64::INFINITY, scale: 1000.0, normalize: false });
    for shape in [[8, 5], [8, 50]] {
        let (logits, labels) = example::<f32>(&shape, 13);
        let logits = logits.mapv(|x| 10.0 * x);
        let norms = [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0];
        let normed = run_with_norms(&plain(&logits, &labels), infinite, &SETTINGS, &norms);
        assert!(normed.weights.iter().skip(1).step_by(2).any(|w| w.is_infinite()));
        for grad in [normed.grad, normed.second] {
            for row in grad.rows().into_iter().skip(1).step_by(2) {
                assert!(row.iter().all(|&g| g == 0.0), "{row}");
            }
        }
    }
}
