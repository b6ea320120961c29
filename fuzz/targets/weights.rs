//! The weights of every member that has a kernel, for any losses, measure and numbers.
//!
//! No call panics. A sample without measure has weight 0, NaN losses reach the weights that depend on them, and equal
//! losses have equal weights. Weights follow their formula in plain `f64`, for members that have one, and keep their
//! promises: their mean, their order, their bound, their divergence. All sums here are over `n` samples, each rounded
//! once: `n eps` of the sum of magnitudes.
#![no_main]

use half::f16;
use libfuzzer_sys::fuzz_target;
use rgd::layout::Vector;
use rgd::numeric::Real;
use rgd::weightings::{Batch, Weighting, sample_weights};
use rgd_fuzz::{Number, Source, check, read, rounding, unwritten};
use std::mem::MaybeUninit;

const EPS: f64 = f64::EPSILON;

/// A batch, as the oracle sees it.
#[derive(Debug)]
struct Samples {
    losses: Vec<f64>,
    p: Vec<f64>,
    measured: bool,
    groups: Vec<i64>,
}

impl Samples {
    fn any(s: &mut Source) -> Self {
        // A block of the kernels has 2048 losses.
        let n = match s.below(40) {
            0 => 2040 + s.below(20),
            1 => 4090 + s.below(10),
            2..12 => s.below(300),
            _ => s.below(12),
        };
        let (wild, tied, tiny) = (s.one_in(3), s.one_in(3), s.one_in(8));
        let losses = (0..n).map(|_| match s.number(wild, 1.7e308) {
            x if tied && x.is_finite() => (x / 4.0).trunc(),
            x if tiny => x * 1e-290,
            x => x,
        });
        let losses = losses.collect();
        let measured = s.flag();
        let p = (0..n).map(|_| if measured { s.pick(&[1.0, 0.5, 3.0, 0.0, 0.1]) } else { 1.0 }).collect();
        let groups = (0..n).map(|_| s.below(3) as i64).collect();
        Self { losses, p, measured, groups }
    }

    /// The numbers of the samples that take part.
    fn counted(&self) -> impl Iterator<Item = usize> + Clone + '_ {
        (0..self.p.len()).filter(|&i| self.p[i] != 0.0)
    }

    fn total(&self) -> f64 {
        self.p.iter().sum()
    }
}

/// The numbers of a member: mostly ones that its Python class allows, the corners of their domain among them.
fn numbers(kind: &str, s: &mut Source) -> Vec<f64> {
    let inf = f64::INFINITY;
    let tau = s.pick(&[1.0, 0.1, 5.0, inf, 1e-300]);
    let scale = s.pick(&[0.5, 1.0, -0.7, 0.0, 20.0, -20.0, 1e-300, 1e300]);
    let kl = [tau, scale];
    let share = s.pick(&[0.1, 0.5, 0.25, 1.0, 1.0 / 3.0, 1e-12]);
    let left_out = s.pick(&[0.0, 0.1, 0.5, 0.25, 0.999]);
    let smoothing = s.pick(&[0.0, 0.0, 0.1, 3.0]);
    let gamma = s.pick(&[1.0, 0.1, 30.0, 1e-3]);
    let normalize = f64::from(u8::from(s.flag()));
    match kind {
        "chi_square" => vec![gamma],
        "chi_square_ball" | "kl_ball" => vec![s.pick(&[0.1, 0.0, 1e-9, 0.6, 3.0, inf])],
        "cvar" => vec![share, smoothing],
        "focal" => vec![s.pick(&[0.0, 0.5, 1.0, 2.0, 100.0])],
        "group_dro" => vec![3.0, s.pick(&[0.0, 0.01, 1.0, 100.0])],
        "kl" => [&kl[..], &[normalize]].concat(),
        "midrange_kl" => vec![scale, normalize],
        // The front lets only pointwise weights have a running mean.
        "moving_average(kl)" => vec![s.pick(&[0.9, 0.0, 0.5]), tau, scale, 0.0],
        "threshold" => vec![s.pick(&[1.0, 0.0, -2.0, 1e300])],
        "trimmed(chi_square)" => vec![left_out, gamma],
        "trimmed(cvar)" => vec![left_out, share, smoothing],
        "trimmed(kl)" => [&[left_out], &kl[..], &[normalize]].concat(),
        other => panic!("the target does not know the numbers of '{other}': add them"),
    }
}

/// The weights of a member, and its state after the batch.
fn weigh<W: Number + Real>(
    weighting: Weighting,
    samples: &Samples,
    narrow: bool,
    threads: usize,
) -> (Vec<f64>, Vec<Vec<f64>>) {
    let halves: Vec<f16> =
        if narrow { samples.losses.iter().map(|&l| f16::from_f64(l)).collect() } else { Vec::new() };
    let (wide, halves) = (Vector::of(&samples.losses), Vector::of(&halves));
    let mut state: Vec<Vec<f64>> = match weighting.kind() {
        "group_dro" => vec![vec![0.5, 0.25, 0.25]],
        _ => weighting.state_lengths().into_iter().map(|length| vec![0.0; length]).collect(),
    };
    let measure = samples.measured.then_some(&samples.p[..]);
    let groups = Some(&samples.groups[..]);
    let batch = Batch::new(if narrow { &halves } else { &wide }, measure, groups, threads);
    let mut weights: Vec<MaybeUninit<W>> = unwritten(samples.p.len());
    sample_weights(&batch, weighting, &mut state, &mut weights).unwrap();
    (read(&weights).into_iter().map(Number::value).collect(), state)
}

/// The weights by a plain formula, and the relative error of each; `None` for members without one.
fn formula(kind: &str, numbers: &[f64], samples: &Samples) -> Option<(Vec<f64>, f64)> {
    let each = |weight: &dyn Fn(f64) -> f64| {
        samples.losses.iter().map(|&l| if l.is_nan() { f64::NAN } else { weight(l) }).collect()
    };
    match (kind, numbers) {
        ("focal", &[gamma]) => {
            // gamma multiplies the relative error of the base.
            Some((each(&|l| (-(-l.max(0.0)).exp_m1()).powf(gamma)), (8.0 + 2.0 * gamma) * EPS))
        }
        ("threshold", &[max_loss]) => Some((each(&|l| f64::from(u8::from(l <= max_loss))), 0.0)),
        ("kl", &[tau, scale, 0.0]) => {
            // The exponent is rounded once; beyond 800 the weight is 0 or infinity in every way.
            let exponent = |l: f64| if scale == 0.0 { 0.0 } else { scale * l.min(tau) };
            Some((each(&|l| exponent(l).exp()), 808.0 * EPS))
        }
        _ => None,
    }
}

fn member(s: &mut Source) {
    let kind = s.pick(Weighting::KINDS);
    let mut samples = Samples::any(s);
    let mut numbers = numbers(kind, s);
    // A number that was not allowed is NaN in a traced call of JAX.
    let poisoned = s.one_in(32) && kind != "group_dro";
    if poisoned {
        let at = s.below(numbers.len() - usize::from(numbers.len() > 2));
        numbers[at] = f64::NAN;
    }
    let weighting = Weighting::new(kind, &numbers).unwrap();
    let narrow = s.one_in(4);
    let rounded = s.one_in(4);
    let threads = 1 + s.below(3);
    let (weights, state) = if rounded {
        weigh::<f32>(weighting, &samples, narrow, threads)
    } else {
        weigh::<f64>(weighting, &samples, narrow, threads)
    };
    if narrow {
        samples.losses.iter_mut().for_each(|l| *l = f16::from_f64(*l).to_f64());
    }
    let losses = &samples.losses;
    for i in 0..weights.len() {
        assert!(samples.p[i] != 0.0 || weights[i] == 0.0, "{kind}: sample {i} takes no part");
        assert!(!(weights[i] < 0.0), "{kind}: weight {i} is {}", weights[i]);
    }
    let some = samples.counted().next().is_some();
    if poisoned {
        // NaN wherever the number is used.
        return;
    }
    let has_nan = samples.counted().any(|i| losses[i].is_nan());
    for i in samples.counted().filter(|_| has_nan) {
        let expected = losses[i].is_nan() || !weighting.is_pointwise() && kind != "group_dro";
        let everywhere = !matches!(kind, "group_dro" | "trimmed(kl)" | "moving_average(kl)");
        assert!(
            !losses[i].is_nan() || weights[i].is_nan(),
            "{kind}: the weight of a NaN loss is {}",
            weights[i]
        );
        assert!(
            !(expected && everywhere) || weights[i].is_nan(),
            "{kind}: a NaN loss does not reach weight {i}"
        );
    }
    let eps_of = |x: f64| if rounded { rounding::<f32>(x) } else { rounding::<f64>(x) };
    let max = if rounded { f32::MAX as f64 } else { f64::MAX };
    if let Some((expected, error)) = formula(kind, &numbers, &samples) {
        for i in samples.counted() {
            let tolerance =
                if expected[i].is_finite() { error * expected[i] + eps_of(expected[i]) } else { 0.0 };
            check(kind, i, weights[i], expected[i], tolerance, max);
        }
    }
    let finite = samples.counted().all(|i| losses[i].is_finite());
    if has_nan || !some {
        return;
    }
    if !finite && !state.is_empty() {
        let before = if kind == "group_dro" { vec![vec![0.5, 0.25, 0.25]] } else { vec![vec![0.0]; 2] };
        assert_eq!(state, before, "{kind}: a batch that is not finite is not remembered");
    }
    promises(kind, &numbers, &samples, &weights, finite, eps_of(1.0));
}

/// What the weights of a whole batch promise.
fn promises(kind: &str, numbers: &[f64], samples: &Samples, weights: &[f64], finite: bool, eps: f64) {
    let (losses, p) = (&samples.losses, &samples.p);
    let (n, total) = (losses.len() as f64, samples.total());
    let weighted = |f: &dyn Fn(f64) -> f64| samples.counted().map(|i| p[i] * f(weights[i])).sum::<f64>();
    let error = (n + 64.0) * EPS + 2.0 * eps;
    let normalized = match kind {
        "kl" => numbers[2] != 0.0,
        "chi_square" | "chi_square_ball" | "cvar" | "kl_ball" | "midrange_kl" => true,
        _ => false,
    };
    if normalized {
        let mean = weighted(&|w| w) / total;
        assert!((mean - 1.0).abs() <= error, "{kind} {numbers:?}: the mean weight of {samples:?} is {mean}");
    }
    if kind == "group_dro" {
        // A group that is absent has a share too.
        let mean = weighted(&|w| w) / total;
        assert!(!finite || mean <= 1.0 + error, "{kind}: the mean weight is {mean}");
        return;
    }
    // Samples in the order of their losses: their weights rise, or fall, with them.
    let mut order: Vec<usize> = samples.counted().collect();
    order.sort_by(|&a, &b| losses[a].total_cmp(&losses[b]));
    let scale = match kind {
        "kl" => numbers[1],
        "midrange_kl" => numbers[0],
        "moving_average(kl)" => numbers[2],
        "threshold" => -1.0,
        _ => 1.0,
    };
    for pair in order.windows(2) {
        let (a, b) = (weights[pair[0]], weights[pair[1]]);
        if losses[pair[0]] == losses[pair[1]] {
            assert!(a == b, "{kind} {numbers:?}: equal losses have the weights {a:e} and {b:e}");
        } else if !kind.starts_with("trimmed") {
            let (low, high) = if scale >= 0.0 { (a, b) } else { (b, a) };
            // Each weight is good to some units in the last place.
            assert!(
                low <= high * (1.0 + 16.0 * EPS),
                "{kind} {numbers:?}: weights {a:e} and {b:e} of rising losses"
            );
        }
    }
    if kind == "cvar" || kind == "trimmed(cvar)" {
        let bound = 1.0 / numbers[numbers.len() - 2];
        let top = weights.iter().copied().fold(0.0, f64::max);
        assert!(top <= bound * (1.0 + 2.0 * eps), "{kind} {numbers:?}: the weight {top} is above {bound}");
    }
    if kind.starts_with("trimmed") {
        // The largest losses, of the share that is left out, have no weight.
        let left_out = numbers[0] * total;
        let mut measure = 0.0;
        for &i in order.iter().rev() {
            let tied = order.iter().filter(|&&j| losses[j] == losses[i]).map(|&j| p[j]).sum::<f64>();
            if measure + tied > left_out * (1.0 - error) - error {
                break;
            }
            assert_eq!(weights[i], 0.0, "{kind} {numbers:?}: loss {} is left out", losses[i]);
            if order.iter().rposition(|&j| losses[j] == losses[i]).map(|j| order[j]) == Some(i) {
                measure += tied;
            }
        }
    }
    // The divergence, of which the weights' own rounding is a part: about eps a term.
    let divergence = match kind {
        "kl_ball" => weighted(&|w| if w == 0.0 { 1.0 } else { w * w.ln() - w + 1.0 }) / total,
        "chi_square_ball" => weighted(&|w| (w - 1.0) * (w - 1.0)) / total / 2.0,
        _ => return,
    };
    let top = weights.iter().copied().fold(1.0, f64::max);
    let rounded = 8.0 * error * top;
    if finite {
        let most = numbers[0] * (1.0 + 1e-9) + rounded;
        assert!(divergence <= most, "{kind} {numbers:?}: the divergence is {divergence}");
        // Less only if the whole weight is on the largest losses.
        let largest = losses[order[order.len() - 1]];
        let there: f64 = samples.counted().filter(|&i| losses[i] == largest).map(|i| p[i]).sum();
        let on_top = if kind == "kl_ball" { (total / there).ln() } else { (total / there - 1.0) / 2.0 };
        let least = numbers[0].min(on_top) * (1.0 - 1e-9) - rounded;
        assert!(
            divergence >= least,
            "{kind} {numbers:?}: the divergence is {divergence}, {on_top} can be had"
        );
    }
}

fuzz_target!(|bytes: &[u8]| {
    member(&mut Source::new(bytes));
});
