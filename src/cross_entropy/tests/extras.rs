//! Tests of entropy, logsumexp and the first class against their equations.

use super::*;

fn run_extras<T: Element>(inputs: &Inputs<T>, threads: usize) -> [Vec<f64>; 3] {
    let [targets, ..] = sizes(inputs, &SETTINGS);
    let mut out: [Vec<MaybeUninit<T::Real>>; 3] = std::array::from_fn(|_| unwritten(targets));
    let [entropy, logsumexp, correct] = &mut out;
    let wanted = Extras { entropy: Some(entropy), logsumexp: Some(logsumexp), correct: Some(correct) };
    extras(inputs, &Settings { threads, ..SETTINGS }, wanted).unwrap();
    out.map(|numbers| read(&numbers).into_iter().map(Real::to_f64).collect())
}

fn as_written(row: &[f64], label: usize) -> [f64; 3] {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = max + row.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
    let entropy = row.iter().filter(|x| x.is_finite()).map(|x| -(x - log_sum).exp() * (x - log_sum)).sum();
    let first = row.iter().position(|&x| x == max).unwrap();
    [entropy, log_sum, f64::from(u8::from(first == label))]
}

#[test]
fn extras_are_those_of_their_equations_for_any_number_of_classes_and_threads() {
    for classes in [1, 2, 15, 16, 17, 100, 40_000] {
        let logits =
            ArrayD::from_shape_fn(IxDyn(&[5, classes]), |i| ((i[0] * 7 + i[1] * 13) % 29) as f64 / 3.0);
        let labels =
            ArrayD::from_shape_fn(
                IxDyn(&[5]),
                |i| if i[0] == 3 { -100 } else { ((i[0] * 2) % classes) as i64 },
            );
        let inputs = plain(&logits, &labels);
        let found = run_extras(&inputs, 1);
        for i in 0..5 {
            let row: Vec<f64> = logits.index_axis(Axis(0), i).iter().copied().collect();
            let expected = if i == 3 { [0.0; 3] } else { as_written(&row, labels[[i]] as usize) };
            // The equations are summed one class after the other: an error of eps each, and 16 for the functions.
            let allowed = |expected: f64| (classes + 16) as f64 * f64::EPSILON * (1.0 + expected.abs());
            for (found, expected) in found.iter().zip(expected) {
                let error = (found[i] - expected).abs();
                assert!(error <= allowed(expected), "{classes} classes: {} {expected}", found[i]);
            }
        }
        assert_eq!(run_extras(&inputs, 3), found);
    }
}

#[test]
fn rows_with_infinite_or_unknown_logits_have_the_limits() {
    let (inf, nan) = (f64::INFINITY, f64::NAN);
    let rows = [[0.0, -inf, 0.0], [-inf, -inf, -inf], [0.0, inf, 1.0], [0.0, nan, 1.0], [2.0, 2.0, 1.0]];
    let logits = ArrayD::from_shape_fn(IxDyn(&[5, 3]), |i| rows[i[0]][i[1]]);
    let labels = Array::from(vec![0i64, 0, 1, 2, 1]).into_dyn();
    let [entropy, logsumexp, correct] = run_extras(&plain(&logits, &labels), 1);
    assert!((entropy[0] - 2f64.ln()).abs() < 1e-15 && entropy[1].is_nan() && entropy[3].is_nan());
    assert!((logsumexp[0] - 2f64.ln()).abs() < 1e-15);
    assert!(logsumexp[1] == -inf && logsumexp[2] == inf && logsumexp[3].is_nan());
    // Of equal logits the first is the largest; a row with NaN has none.
    assert_eq!(correct, [1.0, 1.0, 1.0, 0.0, 0.0]);
}

#[test]
fn strided_and_narrow_logits_with_an_adjustment_are_read_as_they_lie() {
    let values =
        ArrayD::from_shape_fn(IxDyn(&[2, 3, 30]), |i| ((i[0] + 5 * i[1] + 3 * i[2]) % 11) as f32 / 4.0);
    let logits = values.mapv(bf16::from_f32).permuted_axes(IxDyn(&[0, 2, 1]));
    let labels = ArrayD::from_shape_fn(IxDyn(&[2, 3]), |i| (i[0] * 9 + i[1]) as i64);
    let adjustment: Vec<f32> =
        (0..30u8).map(|k| if k == 4 { f32::NEG_INFINITY } else { -f32::from(k) / 8.0 }).collect();
    let inputs =
        Inputs { logits: logits.view(), logit_adjustment: Some(&adjustment), ..plain(&logits, &labels) };
    let found = run_extras(&inputs, 1);
    for i in 0..2 {
        for j in 0..3 {
            let row = (0..30).map(|k| f64::from(logits[[i, k, j]].to_f32() + adjustment[k]));
            let expected = as_written(&row.collect::<Vec<_>>(), labels[[i, j]] as usize);
            for (found, expected) in found.iter().zip(expected) {
                assert!((found[i * 3 + j] - expected).abs() < 3e-6, "{} {expected}", found[i * 3 + j]);
            }
        }
    }
}
