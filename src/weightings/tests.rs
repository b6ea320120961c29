//! Tests of the members against their formulas, and of the table.

use super::*;
use crate::layout::{Vector, written};
use crate::numeric::Element;
use ndarray::{Array, IxDyn};
use proptest::prelude::*;

/// The weights of losses, in the type `W`.
fn weigh_as<T: Element, W: Real>(losses: &Vector<T>, weighting: Weighting, threads: usize) -> Vec<W> {
    let mut weights = vec![MaybeUninit::uninit(); losses.len()];
    sample_weights(&Batch::new(losses, None, None, threads), weighting, &mut [], &mut weights).unwrap();
    // SAFETY: all weights were written.
    unsafe { written(&weights) }.to_vec()
}

fn weigh(losses: &[f64], weighting: Weighting) -> Vec<f64> {
    weigh_as(&Vector::of(losses), weighting, 1)
}

fn divergence(weights: &[f64]) -> f64 {
    let n = weights.len() as f64;
    weights.iter().map(|&w| if w > 0.0 { w * w.ln() - w + 1.0 } else { 1.0 }).sum::<f64>() / n
}

fn ball(radius: f64) -> Weighting {
    Weighting::KlBall(KlBall { radius })
}

const KL: Kl = Kl { tau: 1.0, scale: 0.5, normalize: false };

#[test]
fn pointwise_weights_follow_the_formula() {
    let w = weigh(&[0.0, 0.5, 1.0, 7.0, f64::INFINITY, -1.0, f64::NEG_INFINITY], Weighting::Kl(KL));
    let e = [0.0f64, 0.25, 0.5, 0.5, 0.5, -0.5].map(f64::exp);
    for (w, e) in w.iter().zip(e) {
        assert!((w / e - 1.0).abs() < 4e-16);
    }
    assert_eq!(w[6], 0.0);
    assert!(weigh(&[f64::NAN], Weighting::Kl(KL))[0].is_nan());
}

#[test]
fn a_scale_of_zero_is_exactly_one_for_every_number() {
    let kl = Kl { tau: f64::INFINITY, scale: 0.0, normalize: false };
    assert_eq!(weigh(&[3.0, f64::INFINITY, -2.0], Weighting::Kl(kl)), [1.0; 3]);
    assert!(weigh(&[f64::NAN], Weighting::Kl(kl))[0].is_nan());
}

#[test]
fn a_nan_spreads_as_far_as_weights_depend_on_it() {
    let losses = [1.0, f64::NAN, 2.0];
    let w = weigh(&losses, Weighting::Kl(KL));
    assert!(w[0].is_finite() && w[1].is_nan() && w[2].is_finite());
    for weighting in [Weighting::Kl(Kl { normalize: true, ..KL }), ball(0.1)] {
        assert!(weigh(&losses, weighting).iter().all(|w| w.is_nan()));
    }
}

#[test]
fn infinite_losses_share_all_the_weight_where_it_goes_to_them() {
    let inf = f64::INFINITY;
    let rising = Weighting::Kl(Kl { tau: inf, scale: 0.7, normalize: true });
    for weighting in [rising, ball(0.01), ball(9.0)] {
        assert_eq!(weigh(&[1.0, inf, -inf, inf, 2.0], weighting), [0.0, 2.5, 0.0, 2.5, 0.0]);
        assert_eq!(weigh(&[inf, inf], weighting), [1.0; 2]);
        assert_eq!(weigh(&[-inf, -inf], weighting), [1.0; 2]);
    }
    let falling = Weighting::Kl(Kl { tau: inf, scale: -0.7, normalize: true });
    assert_eq!(weigh(&[1.0, inf, -inf, 2.0], falling), [0.0, 0.0, 4.0, 0.0]);
    let mut many = vec![0.5; 5000];
    (many[17], many[4900]) = (inf, inf);
    assert_eq!(weigh(&many, rising)[4900], 2500.0);
    assert_eq!(weigh(&many, ball(0.01))[17], 2500.0);
}

#[test]
fn losses_of_minus_infinity_take_their_part_of_the_radius() {
    let inf = f64::INFINITY;
    let losses = [1.0, -inf, 2.0, 0.5];
    // Without them, a ball of what is left of the radius; it is nothing if they take more.
    let rest = weigh(&[1.0, 2.0, 0.5], ball(0.6 + 0.75f64.ln()));
    let w = weigh(&losses, ball(0.6));
    for (w, e) in w.iter().zip([rest[0], 0.0, rest[1], rest[2]]) {
        assert!((w - e / 0.75).abs() <= 1e-15 * w);
    }
    // As many samples of each loss, in several blocks, have the same weights.
    let many: Vec<f64> = (0..6000).map(|i| losses[i / 1500]).collect();
    for (i, many) in weigh(&many, ball(0.6)).iter().enumerate() {
        assert!((many - w[i / 1500]).abs() <= 6000.0 * f64::EPSILON * w[i / 1500], "{i}: {many} {w:?}");
    }
    assert_eq!(weigh(&losses, ball(0.01)), [4.0 / 3.0, 0.0, 4.0 / 3.0, 4.0 / 3.0]);
    assert_eq!(weigh(&losses, ball(9.0)), [0.0, 0.0, 4.0, 0.0]);
    assert_eq!(weigh(&losses, ball(0.0)), [1.0; 4]);
}

#[test]
fn the_ball_knows_its_corners() {
    assert_eq!(weigh(&[1.0, 2.0, 2.0], ball(0.0)), [1.0; 3]);
    assert_eq!(weigh(&[2.0, 2.0, 2.0], ball(1.0)), [1.0; 3]);
    assert_eq!(weigh(&[1.0, 2.0, 2.0], ball(5.0)), [0.0, 1.5, 1.5]);
    assert_eq!(weigh(&[1.0, 2.0, 2.0], ball(f64::INFINITY)), [0.0, 1.5, 1.5]);
    assert_eq!(weigh(&[4.0], ball(0.3)), [1.0]);
    assert!(weigh(&[], ball(0.3)).is_empty());
}

#[test]
fn the_root_is_found_for_many_sizes_and_one_outlier() {
    for n in [2usize, 3, 10, 1000, 200_000] {
        let mut losses: Vec<f64> = (0..n).map(|i| ((i * 7919) % 1013) as f64 / 1013.0).collect();
        losses[0] = 30.0;
        for radius in [1e-12, 1e-6, 1e-3, 0.3, 0.6] {
            let w = weigh(&losses, ball(radius));
            let phi: f64 = w
                .iter()
                .map(|&w| {
                    let d = w - 1.0;
                    if d.abs() < 1e-4 {
                        d * d * (0.5 - d / 6.0 + d * d / 12.0)
                    } else if w == 0.0 {
                        1.0
                    } else {
                        w * w.ln() - d
                    }
                })
                .sum::<f64>()
                / n as f64;
            // The weights themselves are rounded: eps / |w - 1| each, about eps / sqrt(radius).
            let tolerance = 1e-10 + 1e-15 / radius.sqrt();
            assert!((phi / radius - 1.0).abs() < tolerance, "{n} {radius}: {phi}");
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let losses = Array::from_shape_fn(IxDyn(&[301, 409]), |i| ((i[0] * 31 + i[1] * 17) % 1000) as f32 / 99.0);
    let losses = Vector::new(losses.view());
    for weighting in [Weighting::Kl(KL), Weighting::Kl(Kl { normalize: true, ..KL }), ball(0.2)] {
        let [one, two, many] = [1, 2, 5].map(|threads| weigh_as::<_, f32>(&losses, weighting, threads));
        assert!(one == two && two == many);
    }
}

#[test]
fn strided_losses_are_read_in_place() {
    let a = Array::from_shape_fn(IxDyn(&[6, 10]), |i| (i[0] * 10 + i[1]) as f64 / 20.0);
    let view = a.slice(ndarray::s![..;-2, 1..;3]);
    let strided: Vec<f64> = weigh_as(&Vector::new(view.into_dyn()), Weighting::Kl(KL), 1);
    let flat: Vec<f64> = view.iter().copied().collect();
    assert_eq!(strided, weigh(&flat, Weighting::Kl(KL)));
}

#[test]
fn f32_weights_of_losses_that_lie_next_to_each_other_are_those_of_others_bit_for_bit() {
    let mut losses: Vec<f32> = (0..40_000).map(|i| (i % 977) as f32 / 97.0 - 2.0).collect();
    losses[5..10].copy_from_slice(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 1e30]);
    let apart = Array::from_shape_fn(IxDyn(&[losses.len(), 2]), |i| losses[i[0]]);
    let apart = apart.slice(ndarray::s![.., 0]);
    let bits = |weights: Vec<f32>| weights.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    for (tau, scale) in
        [(1.0, 0.5), (0.1, 1.0 / 1.1), (f64::INFINITY, -0.7), (f64::INFINITY, 3.0), (1.0, 0.0)]
    {
        let kl = Weighting::Kl(Kl { tau, scale, normalize: false });
        let expected = bits(weigh_as(&Vector::new(apart.into_dyn()), kl, 1));
        for threads in [1, 3] {
            assert_eq!(bits(weigh_as(&Vector::of(&losses), kl, threads)), expected);
        }
        // They are the weights in f64, to 1 ulp.
        let wide: Vec<f64> = losses.iter().map(|&l| f64::from(l)).collect();
        for (&w, exact) in expected.iter().zip(weigh(&wide, kl)) {
            assert!(w.abs_diff((exact as f32).to_bits()) <= 1 || exact.is_nan(), "{w} {exact}");
        }
    }
}

proptest! {
    #[test]
    fn the_chi_square_ball_is_filled(
        losses in prop::collection::vec((-50i32..50).prop_map(|l| f64::from(l) / 3.0), 2..200),
        radius in 1e-6f64..9.0
    ) {
        let (w, n) = (chi_square_ball(&losses, radius), losses.len() as f64);
        let mean = |f: &dyn Fn(f64) -> f64| w.iter().map(|&w| f(w)).sum::<f64>() / n;
        prop_assert!((mean(&|w| w) - 1.0).abs() < 1e-13 * n);
        let max = losses.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let at_max = losses.iter().filter(|&&l| l == max).count() as f64;
        let reachable = radius.min((n / at_max - 1.0) / 2.0);
        let divergence = mean(&|w| (w - 1.0).powi(2)) / 2.0;
        prop_assert!((divergence - reachable).abs() <= 1e-12 * n * reachable.max(1e-2), "{divergence} {reachable}");
    }

    #[test]
    fn normalised_weights_average_to_one(losses in prop::collection::vec(-50f64..50.0, 1..200), tau in 0.1f64..60.0) {
        let w = weigh(&losses, Weighting::Kl(Kl { tau, scale: 0.7, normalize: true }));
        prop_assert!((w.iter().sum::<f64>() / w.len() as f64 - 1.0).abs() < 1e-14 * w.len() as f64);
    }

    #[test]
    fn the_ball_is_filled_and_its_weights_grow_with_the_loss(
        losses in prop::collection::vec(-50f64..50.0, 2..200), radius in 0.001f64..6.0
    ) {
        let w = weigh(&losses, ball(radius));
        prop_assert!((w.iter().sum::<f64>() / w.len() as f64 - 1.0).abs() < 1e-13 * w.len() as f64);
        let max = losses.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let at_max = losses.iter().filter(|&&l| l == max).count();
        let reachable = radius.min((losses.len() as f64 / at_max as f64).ln());
        prop_assert!((divergence(&w) / reachable - 1.0).abs() < 1e-10, "{} {}", divergence(&w), reachable);
        let mut order: Vec<usize> = (0..w.len()).collect();
        order.sort_by(|&a, &b| losses[a].total_cmp(&losses[b]));
        prop_assert!(order.windows(2).all(|p| w[p[0]] <= w[p[1]]));
    }
}

#[test]
fn a_negative_scale_lets_weights_fall_with_the_loss() {
    let kl = Kl { tau: f64::INFINITY, scale: -0.7, normalize: false };
    let losses = [0.0, 1.0, 5.0, 2000.0, -1.0, f64::INFINITY, f64::NAN];
    let w = weigh(&losses, Weighting::Kl(kl));
    for (w, l) in w[..5].iter().zip(losses) {
        let e = (-0.7 * l).exp();
        assert!((w - e).abs() <= 4e-16 * e, "{l}: {w} {e}");
    }
    assert_eq!(w[5], 0.0);
    assert!(w[6].is_nan());
    let clipped = weigh(&[3.0, f64::INFINITY], Weighting::Kl(Kl { tau: 2.0, ..kl }));
    for w in clipped {
        assert!((w / (-1.4f64).exp() - 1.0).abs() < 4e-16);
    }
}

#[test]
fn normalised_weights_of_a_negative_scale_start_from_the_smallest_loss() {
    // The mean of exp(-0.7 l) underflows, the ratios do not.
    let kl = Kl { tau: f64::INFINITY, scale: -0.7, normalize: true };
    let w = weigh(&[2e5, 2e5 + 1.0, 3e5, f64::INFINITY], Weighting::Kl(kl));
    let e = (-0.7f64).exp();
    for (w, e) in w.iter().zip([4.0 / (1.0 + e), 4.0 * e / (1.0 + e), 0.0, 0.0]) {
        assert!((w - e).abs() <= 1e-15 * e, "{w} {e}");
    }
    // With a clip below all losses the exponents are equal.
    assert_eq!(weigh(&[3.0, 4.0, f64::INFINITY], Weighting::Kl(Kl { tau: 2.0, ..kl })), [1.0; 3]);
    assert!(weigh(&[3.0, f64::NAN], Weighting::Kl(kl)).iter().all(|w| w.is_nan()));
}

#[test]
fn the_table_makes_members_by_name_and_names_what_it_does_not_know() {
    assert_eq!(Weighting::new("kl", &[1.0, 0.5, 0.0]), Ok(Weighting::Kl(KL)));
    assert_eq!(Weighting::new("kl_ball", &[0.1]), Ok(ball(0.1)));
    for kind in Weighting::KINDS {
        let count = match Weighting::new(kind, &[f64::NAN; 99]) {
            Err(Error::Numbers { kind: named, expected, got: 99 }) if named == *kind => expected.len(),
            other => panic!("{kind}: {other:?}"),
        };
        assert_eq!(Weighting::new(kind, &vec![1.0; count]).unwrap().kind(), *kind);
    }
    let unknown = Weighting::new("cauchy", &[0.1]).unwrap_err().to_string();
    assert!(unknown.contains("'cauchy'") && unknown.contains("'kl', 'kl_ball'"), "{unknown}");
    let numbers = Weighting::new("kl", &[1.0]).unwrap_err().to_string();
    assert!(numbers.contains("3 numbers (tau, scale, normalize), got 1"), "{numbers}");
}

#[test]
fn only_weights_that_need_no_batch_are_pointwise() {
    assert!(Weighting::Kl(KL).is_pointwise());
    assert!(!Weighting::Kl(Kl { normalize: true, ..KL }).is_pointwise());
    assert!(!ball(0.1).is_pointwise());
}

/// The weights under a measure.
fn weigh_measured(losses: &[f64], measure: &[f64], weighting: Weighting) -> Vec<f64> {
    let losses = Vector::of(losses);
    let mut weights = vec![MaybeUninit::uninit(); losses.len()];
    sample_weights(&Batch::new(&losses, Some(measure), None, 1), weighting, &mut [], &mut weights).unwrap();
    // SAFETY: all weights were written.
    unsafe { written(&weights) }.to_vec()
}

/// The weights of group DRO, and its shares after the batch.
fn group_dro(
    losses: &[f64],
    measure: Option<&[f64]>,
    groups: Option<&[i64]>,
    shares: &[f64],
) -> Result<(Vec<f64>, Vec<f64>), Error> {
    let weighting = Weighting::GroupDro(GroupDro { groups: 2, step_size: 1.0 });
    let losses = Vector::of(losses);
    let (mut weights, mut state) = (vec![MaybeUninit::new(7.0); losses.len()], vec![shares.to_vec()]);
    let done = sample_weights(&Batch::new(&losses, measure, groups, 1), weighting, &mut state, &mut weights);
    // SAFETY: all weights were initialised.
    done.map(|()| (unsafe { written(&weights) }.to_vec(), state.remove(0)))
}

#[test]
fn a_whole_measure_counts_as_copies_of_a_sample() {
    let (losses, measure) = ([0.3, 1.2, 0.3, 5.0, -2.0], [2.0, 1.0, 0.0, 1.0, 3.0]);
    let copies = [0.3, 0.3, 1.2, 5.0, -2.0, -2.0, -2.0];
    let first = [0, 2, usize::MAX, 3, 4];
    let normalised = Weighting::Kl(Kl { normalize: true, ..KL });
    let members = [Weighting::Kl(KL), normalised, ball(0.2), ball(0.0), ball(5.0)];
    let tails = [0.3, 1.0].map(|alpha| Weighting::Cvar(Cvar { alpha, smoothing: 0.0 }));
    let balls = [0.1, 0.9].map(|radius| Weighting::ChiSquareBall(ChiSquareBall { radius }));
    let [focal, penalty] =
        [Weighting::Focal(Focal { gamma: 2.0 }), Weighting::ChiSquare(ChiSquare { gamma: 3.0 })];
    let threshold = Weighting::Threshold(Threshold { max_loss: 0.3 });
    for weighting in members.into_iter().chain(tails).chain(balls).chain([focal, penalty, threshold]) {
        let (measured, copied) = (weigh_measured(&losses, &measure, weighting), weigh(&copies, weighting));
        for (w, i) in measured.iter().zip(first) {
            let expected = copied.get(i).copied().unwrap_or(0.0);
            assert!((w - expected).abs() <= 1e-14 * expected, "{weighting:?}: {w} {expected}");
        }
    }
}

#[test]
fn what_takes_no_part_may_be_anything() {
    let measure = [1.0, 0.0, 0.0, 2.0];
    for weighting in [
        Weighting::Kl(Kl { normalize: true, ..KL }),
        ball(0.1),
        Weighting::Cvar(Cvar { alpha: 0.5, smoothing: 0.0 }),
    ] {
        let w = weigh_measured(&[1.0, f64::NAN, f64::INFINITY, 2.0], &measure, weighting);
        assert_eq!(w, weigh_measured(&[1.0, 9.0, -9.0, 2.0], &measure, weighting));
        assert_eq!(weigh_measured(&[f64::NAN; 2], &[0.0; 2], weighting), [0.0; 2]);
    }
}

#[test]
fn the_tail_counts_its_edge_in_part_and_ties_alike() {
    let cvar = |alpha| Weighting::Cvar(Cvar { alpha, smoothing: 0.0 });
    assert_eq!(weigh(&[0.0, 1.0, 2.0, 3.0], cvar(0.5)), [0.0, 0.0, 2.0, 2.0]);
    assert_eq!(weigh(&[0.0, 1.0, 2.0, 3.0], cvar(0.375)), [0.0, 0.0, 0.5 / 0.375, 1.0 / 0.375]);
    assert_eq!(weigh(&[3.0, 1.0, 3.0, 3.0, 3.0], cvar(0.4)), [1.25, 0.0, 1.25, 1.25, 1.25]);
    assert_eq!(weigh(&[f64::INFINITY, 1.0], cvar(0.5)), [2.0, 0.0]);
    assert!(weigh(&[2.0; 3], cvar(0.1)).iter().all(|w| (w - 1.0).abs() <= f64::EPSILON));
    assert!(weigh(&[1.0, f64::NAN], cvar(0.5)).iter().all(|w| w.is_nan()));
}

fn chi_square_ball(losses: &[f64], radius: f64) -> Vec<f64> {
    weigh(losses, Weighting::ChiSquareBall(ChiSquareBall { radius }))
}

#[test]
fn the_chi_square_ball_knows_its_corners() {
    let inf = f64::INFINITY;
    assert_eq!(chi_square_ball(&[1.0, 2.0, 2.0], 0.0), [1.0; 3]);
    assert_eq!(chi_square_ball(&[2.0; 3], 1.0), [1.0; 3]);
    assert_eq!(chi_square_ball(&[1.0, 2.0, 2.0], 0.25), [0.0, 1.5, 1.5]);
    assert_eq!(chi_square_ball(&[1.0, 2.0, 2.0], inf), [0.0, 1.5, 1.5]);
    assert_eq!(chi_square_ball(&[inf, 2.0, inf, -inf], 0.01), [2.0, 0.0, 2.0, 0.0]);
    assert_eq!(chi_square_ball(&[inf, 2.0, inf, -inf], 0.0), [1.0; 4]);
    assert_eq!(chi_square_ball(&[-inf; 2], 0.3), [1.0; 2]);
    assert_eq!(chi_square_ball(&[1.0, -inf, 2.0], 0.1), [1.5, 0.0, 1.5]);
    assert_eq!(chi_square_ball(&[4.0], 0.3), [1.0]);
    assert!(chi_square_ball(&[1.0, f64::NAN], 0.1).iter().all(|w| w.is_nan()));
}

#[test]
fn finite_losses_far_below_the_others_do_not_change_the_chi_square_ball_above_them() {
    // The far losses have no weight, and the others one that they would also have beside a near one.
    let near = chi_square_ball(&[1.0, 2.0, 4.0, -60.0, -70.0], 0.6);
    assert!(near[3] == 0.0 && near[4] == 0.0 && near[0] > 0.0, "{near:?}");
    for far in [-1e100, -1e160, -1.7e308] {
        let w = chi_square_ball(&[1.0, 2.0, 4.0, far, 1.1 * (far / 1.2)], 0.6);
        for (w, e) in w.iter().zip(&near) {
            assert!((w - e).abs() <= 16.0 * f64::EPSILON, "{far}: {w} {e}");
        }
    }
    // Equal weights on all but the far loss fill this ball exactly.
    let w = chi_square_ball(&[6.5, -2.5, -5.5, -6.5, -7.0, -1.7e308], 0.1);
    for (w, e) in w.iter().zip([1.2, 1.2, 1.2, 1.2, 1.2, 0.0]) {
        // The divergence is met to its rounding, and so the weights to the root of that.
        assert!((w - e).abs() <= 4.0 * f64::EPSILON.sqrt(), "{w} {e}");
    }
    // The first step is the smallest there is.
    let (w, limit) = (chi_square_ball(&[1.6e-322, 0.0, -5.0], 0.1), chi_square_ball(&[0.0, 0.0, -5.0], 0.1));
    for (w, e) in w.iter().zip(limit) {
        assert!((w - e).abs() <= 16.0 * f64::EPSILON, "{w} {e}");
    }
    // Every step is large beside the one before it.
    let steps = chi_square_ball(&[0.0, -1.0, -1e150, -1e300], 0.1);
    assert!((steps.iter().sum::<f64>() - 4.0).abs() <= 16.0 * f64::EPSILON, "{steps:?}");
}

#[test]
fn the_chi_square_penalty_knows_its_corners() {
    let inf = f64::INFINITY;
    let penalty = |losses: &[f64], gamma| weigh(losses, Weighting::ChiSquare(ChiSquare { gamma }));
    assert_eq!(penalty(&[0.0, 1.0, 2.0], 2.0), [0.5, 1.0, 1.5]);
    assert_eq!(penalty(&[0.0, 1.0, 2.0], 0.1), [0.0, 0.0, 3.0]);
    assert_eq!(penalty(&[7.0; 3], 0.1), [1.0; 3]);
    assert_eq!(penalty(&[inf, -inf, 5.0, inf], 1.0), [2.0, 0.0, 0.0, 2.0]);
    assert_eq!(penalty(&[-inf; 2], 1.0), [1.0; 2]);
    assert_eq!(penalty(&[1.7e308, -1.7e308], 1.0), [2.0, 0.0]);
    assert!(penalty(&[1.0, f64::NAN], 1.0).iter().all(|w| w.is_nan()));
}

#[test]
fn group_dro_moves_its_shares_and_refuses_groups_that_it_does_not_have() {
    let (w, shares) = group_dro(&[0.0, 0.0, 2.0], None, Some(&[0, 0, 1]), &[0.5, 0.5]).unwrap();
    let q = 1.0 / (1.0 + 2f64.exp());
    for (got, expected) in w.iter().chain(&shares).zip([1.5 * q, 1.5 * q, 3.0 * (1.0 - q), q, 1.0 - q]) {
        assert!((got - expected).abs() < 1e-15, "{got} {expected}");
    }
    // The sample weights count in the mean loss of a group, and the step multiplies it: 0.5 * (1 * 2 + 3 * 6) / 4 = 2.5.
    let half = Weighting::GroupDro(GroupDro { groups: 2, step_size: 0.5 });
    let (losses, mut state) = (Vector::of(&[2.0, 6.0, 1.0]), vec![vec![0.25, 0.75]]);
    let batch = Batch::new(&losses, Some(&[1.0, 3.0, 2.0]), Some(&[0, 0, 1]), 1);
    sample_weights(&batch, half, &mut state, &mut [MaybeUninit::new(0.0f64); 3]).unwrap();
    let (a, b) = (0.25 * 2.5f64.exp(), 0.75 * 0.5f64.exp());
    assert!((state[0][0] - a / (a + b)).abs() < 1e-15, "{state:?}");
    let outside = |groups| group_dro(&[1.0, 1.0], Some(&[1.0, 0.0]), Some(groups), &[0.5, 0.5]);
    assert!(outside(&[1, -7]).is_ok());
    let error = outside(&[2, 0]).unwrap_err();
    assert_eq!(error, Error::GroupOutOfRange { groups: 2, smallest: 0, largest: 2 });
    assert_eq!(group_dro(&[1.0], None, None, &[0.5, 0.5]), Err(Error::NoGroups));
    let state = Error::State { kind: "group_dro", expected: vec![2], got: vec![1] };
    assert_eq!(group_dro(&[1.0], None, Some(&[0]), &[1.0]), Err(state));
    for loss in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let (_, shares) = group_dro(&[loss, 1.0], None, Some(&[0, 1]), &[0.25, 0.75]).unwrap();
        assert_eq!(shares, [0.25, 0.75]);
    }
}

#[test]
fn a_running_mean_begins_with_the_first_batch() {
    let inner = Kl { tau: f64::INFINITY, scale: 1.0, normalize: false };
    let weighting = Weighting::MovingAverageOfKl(MovingAverageOfKl { decay: 0.75, inner });
    let mut state = vec![vec![0.0], vec![0.0]];
    let mut weigh = |losses: &[f64]| {
        let losses = Vector::of(losses);
        let mut weights = vec![MaybeUninit::new(0.0f64); losses.len()];
        sample_weights(&Batch::new(&losses, None, None, 1), weighting, &mut state, &mut weights).unwrap();
        // SAFETY: all weights were initialised.
        (unsafe { written(&weights) }.to_vec(), state.clone())
    };
    let ln = f64::ln;
    let close =
        |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 4.0 * f64::EPSILON * b.abs());
    let (w, state) = weigh(&[ln(1.0), ln(3.0)]);
    assert!(close(&w, &[0.5, 1.5]) && close(&state[0], &[ln(2.0)]) && state[1] == [1.0]);
    let (w, state) = weigh(&[ln(10.0)]);
    assert!(close(&w, &[2.5]) && close(&state[0], &[ln(4.0)]) && state[1] == [2.0]);
    // An infinite loss gets its weight, and is not remembered.
    let (w, after) = weigh(&[f64::INFINITY, 0.0]);
    assert!(close(&w, &[8.0, 0.0]) && after == state);
}

#[test]
fn a_threshold_keeps_losses_up_to_it() {
    let threshold = |max_loss| Weighting::Threshold(Threshold { max_loss });
    let losses = [f64::NEG_INFINITY, -1.0, 2.0, 2.0f64.next_up(), f64::INFINITY];
    assert_eq!(weigh(&losses, threshold(2.0)), [1.0, 1.0, 1.0, 0.0, 0.0]);
    assert_eq!(weigh(&losses, threshold(-1.0)), [1.0, 1.0, 0.0, 0.0, 0.0]);
    assert!(weigh(&[f64::NAN], threshold(2.0))[0].is_nan());
    assert!(weigh(&[1.0], threshold(f64::NAN))[0].is_nan());
}

/// Losses of three blocks, with a sample weight of each; the largest and the smallest are in the second block.
fn three_blocks() -> (Vec<f64>, Vec<f64>) {
    let mut losses: Vec<f64> = (0..5000).map(|i| ((i * 7919) % 1013) as f64 / 300.0 + 0.25).collect();
    (losses[2900], losses[3000]) = (3.75, 0.125);
    (losses, (0..5000).map(|i| (1 + (i * 31) % 7) as f64 / 2.0).collect())
}

/// Compares with weights that are computed plainly, for sums of 5,000 terms.
fn assert_all_near(weights: &[f64], expected: impl Iterator<Item = f64>) {
    for (i, (w, e)) in weights.iter().zip(expected).enumerate() {
        assert!((w - e).abs() <= 5000.0 * f64::EPSILON * e.abs(), "{i}: {w} {e}");
    }
}

#[test]
fn focal_weights_are_powers_of_what_the_label_lacks() {
    let (losses, _) = three_blocks();
    for gamma in [0.0, 0.5, 1.0, 2.0, 3.0] {
        let weights = weigh(&losses, Weighting::Focal(Focal { gamma }));
        assert_all_near(&weights, losses.iter().map(|l| (1.0 - (-l).exp()).powf(gamma)));
        assert_eq!(
            weigh(&[0.0, -2.0], Weighting::Focal(Focal { gamma })),
            [if gamma == 0.0 { 1.0 } else { 0.0 }; 2]
        );
    }
    for gamma in [1.0, 2.0, 0.0] {
        assert!(weigh(&[f64::NAN, 1.0], Weighting::Focal(Focal { gamma }))[0].is_nan());
    }
}

#[test]
fn midrange_weights_are_flat_above_the_middle() {
    let (losses, measure) = three_blocks();
    let middle = 1.9375;
    for scale in [0.7, -0.7, 2.0, 0.0] {
        for (relative, unit) in [(true, (3.75 - 0.125) / 2.0), (false, 1.0)] {
            let weight = |l: f64| (scale * l.min(middle) / unit).exp();
            let weighting = Weighting::MidrangeKl(MidrangeKl { scale, relative });
            for measure in [None, Some(&measure[..])] {
                let p = |i: usize| measure.map_or(1.0, |measure| measure[i]);
                let total: f64 = (0..5000).map(p).sum();
                let mean = losses.iter().enumerate().map(|(i, &l)| p(i) * weight(l)).sum::<f64>() / total;
                let (vector, mut weights) = (Vector::of(&losses), vec![MaybeUninit::new(0.0f64); 5000]);
                sample_weights(&Batch::new(&vector, measure, None, 1), weighting, &mut [], &mut weights)
                    .unwrap();
                // SAFETY: all weights were written.
                assert_all_near(unsafe { written(&weights) }, losses.iter().map(|&l| weight(l) / mean));
            }
        }
    }
}

#[test]
fn a_running_mean_is_over_all_blocks_and_remembers_the_batch_before() {
    let (losses, measure) = three_blocks();
    for scale in [0.5, -0.5] {
        let inner = Kl { tau: f64::INFINITY, scale, normalize: false };
        let weighting = Weighting::MovingAverageOfKl(MovingAverageOfKl { decay: 0.75, inner });
        let mut state = vec![vec![0.0], vec![0.0]];
        let (mut mean, mut updates) = (0.0, 0);
        for far in [0.0, 30.0 * scale.signum(), -2000.0 * scale.signum()] {
            let losses: Vec<f64> = losses.iter().map(|l| l + far).collect();
            let (vector, mut weights) = (Vector::of(&losses), vec![MaybeUninit::new(0.0f64); 5000]);
            sample_weights(
                &Batch::new(&vector, Some(&measure), None, 1),
                weighting,
                &mut state,
                &mut weights,
            )
            .unwrap();
            let total: f64 = measure.iter().sum();
            let now = losses.iter().zip(&measure).map(|(l, p)| p * (scale * l).exp()).sum::<f64>() / total;
            mean = if updates == 0 { now } else { 0.75 * mean + 0.25 * now };
            updates += 1;
            // SAFETY: all weights were written.
            assert_all_near(unsafe { written(&weights) }, losses.iter().map(|l| (scale * l).exp() / mean));
            assert!((state[0][0] - f64::ln(mean)).abs() <= 5000.0 * f64::EPSILON, "{state:?} {mean}");
            assert_eq!(state[1], [f64::from(updates)]);
        }
    }
}

#[test]
fn a_ball_does_not_change_with_the_unit_of_the_losses() {
    let losses = [1.0, 0.0, -1.0, 0.5, -0.25];
    for radius in [0.01, 0.3, 1.0] {
        let expected = weigh(&losses, ball(radius));
        for unit in [1.7e308, 1e-300, 1e3] {
            for (w, e) in weigh(&losses.map(|l| unit * l), ball(radius)).iter().zip(&expected) {
                // The root is found to 1e-15 of the divergence.
                assert!((w - e).abs() <= 1e-13, "{unit} {radius}: {w} {e}");
            }
        }
    }
}

#[test]
fn a_running_mean_of_weights_beyond_the_numbers_divides_them_still() {
    let (losses, _) = three_blocks();
    for (scale, far) in [(0.5, -4000.0), (0.5, 4000.0), (-0.5, 4000.0)] {
        let inner = Kl { tau: f64::INFINITY, scale, normalize: false };
        let weighting = Weighting::MovingAverageOfKl(MovingAverageOfKl { decay: 0.75, inner });
        let moved: Vec<f64> = losses.iter().map(|l| l + far).collect();
        let (vector, mut weights) = (Vector::of(&moved), vec![MaybeUninit::new(0.0f64); 5000]);
        let mut state = vec![vec![0.0], vec![0.0]];
        sample_weights(&Batch::new(&vector, None, None, 1), weighting, &mut state, &mut weights).unwrap();
        let mean = losses.iter().map(|l| (scale * l).exp()).sum::<f64>() / 5000.0;
        // SAFETY: all weights were written.
        let weights = unsafe { written(&weights) };
        for (w, l) in weights.iter().zip(&losses) {
            let expected = (scale * l).exp() / mean;
            // The exponents are of 2,000, and rounded to that.
            assert!((w - expected).abs() <= 8.0 * 2000.0 * f64::EPSILON * expected, "{w} {expected}");
        }
    }
}
