//! Weighted sums, and the sums that the diagnostics are made of.
//!
//! `sum_i w_i l_i` in f64, per block of a fixed size and then over the blocks in order.

use crate::parallel::map_blocks;
use crate::simd::{Element, Isa, Kernel, Real, dispatch};
use crate::weights::Losses;

const BLOCK: usize = 2048;

/// Sums that are kept side by side, so that adding a row of products to them fills the lanes.
const ROW: usize = 64;

/// Elements below which waking a thread costs more than it saves.
const PARALLEL: usize = 32 * BLOCK;

/// The sums over a batch of losses and their weights.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sums {
    /// `sum l`.
    pub losses: f64,
    /// `sum w`.
    pub weights: f64,
    /// `sum w l`.
    pub objective: f64,
    /// `sum w^2`.
    pub squares: f64,
    /// `sum w log w`, with `0 log 0 = 0`.
    pub entropy: f64,
    /// The largest weight; NaN if one is NaN, 0 for an empty batch.
    pub max: f64,
    /// How many losses lie above tau.
    pub clipped: usize,
}

struct Dot<'a, 'b, 'c, V, W> {
    values: &'a Losses<'b, V>,
    weights: &'a Losses<'c, W>,
    start: usize,
    end: usize,
}

impl<V: Element, W: Element> Kernel for Dot<'_, '_, '_, V, W> {
    type Output = f64;
    #[inline(always)]
    fn run<I: Isa>(self) -> f64 {
        let (mut first, mut second, mut lanes) = ([0.0; BLOCK], [0.0; BLOCK], [0.0; ROW]);
        let (values, weights) = (&mut first[..self.end - self.start], &mut second[..self.end - self.start]);
        self.values.load(self.start, values);
        self.weights.load(self.start, weights);
        for (values, weights) in values.chunks(ROW).zip(weights.chunks(ROW)) {
            for ((lane, &v), &w) in lanes.iter_mut().zip(values).zip(weights) {
                *lane = Real::mul_add::<I>(v, w, *lane);
            }
        }
        lanes.iter().sum()
    }
}

/// `sum_i values_i weights_i`.
///
/// # Panics
/// If the lengths differ.
#[must_use]
pub fn weighted_sum<V: Element, W: Element>(values: &Losses<V>, weights: &Losses<W>, threads: usize) -> f64 {
    assert_eq!(values.len(), weights.len());
    let threads = if values.len() < PARALLEL { 1 } else { threads };
    map_blocks(values.len().div_ceil(BLOCK), threads, |i| {
        dispatch(Dot { values, weights, start: i * BLOCK, end: values.len().min((i + 1) * BLOCK) })
    })
    .into_iter()
    .sum()
}

/// The sums of the diagnostics; `tau` is the loss above which a sample counts as clipped.
///
/// # Panics
/// If the lengths differ.
#[must_use]
pub fn sums<V: Element, W: Element>(
    losses: &Losses<V>,
    weights: &Losses<W>,
    tau: f64,
    threads: usize,
) -> Sums {
    assert_eq!(losses.len(), weights.len());
    let threads = if losses.len() < PARALLEL { 1 } else { threads };
    let blocks = map_blocks(losses.len().div_ceil(BLOCK), threads, |i| {
        let (start, end) = (i * BLOCK, losses.len().min((i + 1) * BLOCK));
        let (mut first, mut second) = ([0.0; BLOCK], [0.0; BLOCK]);
        let (l, w) = (&mut first[..end - start], &mut second[..end - start]);
        losses.load(start, l);
        weights.load(start, w);
        let mut s = Sums::default();
        for (&mut l, &mut w) in l.iter_mut().zip(w) {
            s.losses += l;
            s.weights += w;
            s.objective += w * l;
            s.squares += w * w;
            s.entropy += if w == 0.0 { 0.0 } else { w * w.ln() };
            s.max = if s.max.is_nan() || w <= s.max { s.max } else { w };
            s.clipped += usize::from(l > tau);
        }
        s
    });
    blocks.into_iter().fold(Sums::default(), |a, b| Sums {
        losses: a.losses + b.losses,
        weights: a.weights + b.weights,
        objective: a.objective + b.objective,
        squares: a.squares + b.squares,
        entropy: a.entropy + b.entropy,
        max: if a.max.is_nan() || b.max <= a.max { a.max } else { b.max },
        clipped: a.clipped + b.clipped,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::ArrayView1;
    use proptest::prelude::*;

    fn vector<T: Element>(values: &[T]) -> Losses<'_, T> {
        Losses::new(ArrayView1::from(values).into_dyn())
    }

    #[test]
    fn the_sums_of_a_small_batch_are_as_by_hand() {
        let s = sums(&vector(&[1.0, 3.0f32]), &vector(&[0.0, 2.0f64]), 1.0, 1);
        let expected = Sums {
            losses: 4.0,
            weights: 2.0,
            objective: 6.0,
            squares: 4.0,
            entropy: 2.0 * 2f64.ln(),
            max: 2.0,
            clipped: 1,
        };
        assert_eq!(s, expected);
        assert_eq!(sums(&vector::<f32>(&[]), &vector::<f32>(&[]), 1.0, 1), Sums::default());
        let nan = [f64::NAN, 1.0];
        assert!(sums(&vector(&nan), &vector(&nan), 1.0, 1).max.is_nan());
    }

    proptest! {
        #[test]
        fn a_weighted_sum_is_exact_to_its_rounding_and_the_same_for_any_threads(
            pairs in prop::collection::vec((-10f64..10.0, 0f64..3.0), 0..300), repeat in 1usize..600
        ) {
            let (v, w): (Vec<f64>, Vec<f64>) = pairs.iter().copied().cycle().take(pairs.len() * repeat).unzip();
            let sum = weighted_sum(&vector(&v), &vector(&w), 1);
            prop_assert_eq!(sum.to_bits(), weighted_sum(&vector(&v), &vector(&w), 3).to_bits());
            let magnitude: f64 = v.iter().zip(&w).map(|(v, w)| (v * w).abs()).sum();
            let plain: f64 = v.iter().zip(&w).map(|(v, w)| v * w).sum();
            prop_assert!((sum - plain).abs() <= 2.0 * f64::EPSILON * v.len() as f64 * magnitude + f64::MIN_POSITIVE);
        }
    }
}
