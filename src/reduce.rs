//! Weighted sums, and the sums that the diagnostics are made of.
//!
//! `sum_i w_i l_i` in f64, per block of a fixed size and then over the blocks in order.

use crate::parallel::map_blocks;
use crate::simd::{Isa, Kernel, LANES, Real, dispatch};

const BLOCK: usize = 4096;

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

struct Dot<'a, V, W>(&'a [V], &'a [W]);

impl<V: Real, W: Real> Kernel for Dot<'_, V, W> {
    type Output = f64;
    #[inline(always)]
    fn run<I: Isa>(self) -> f64 {
        let mut lanes = [0.0; LANES];
        let (values, values_rest) = self.0.as_chunks::<LANES>();
        let (weights, weights_rest) = self.1.as_chunks::<LANES>();
        for (v, w) in values.iter().zip(weights) {
            for lane in 0..LANES {
                lanes[lane] = Real::mul_add::<I>(v[lane].to_f64(), w[lane].to_f64(), lanes[lane]);
            }
        }
        for (v, w) in values_rest.iter().zip(weights_rest) {
            lanes[0] += v.to_f64() * w.to_f64();
        }
        lanes.iter().sum()
    }
}

/// `sum_i values_i weights_i`.
///
/// # Panics
/// If the lengths differ.
pub fn weighted_sum<V: Real, W: Real>(values: &[V], weights: &[W], threads: usize) -> f64 {
    assert_eq!(values.len(), weights.len());
    let threads = if values.len() < PARALLEL { 1 } else { threads };
    map_blocks(values.len().div_ceil(BLOCK), threads, |i| {
        let part = i * BLOCK..values.len().min((i + 1) * BLOCK);
        dispatch(Dot(&values[part.clone()], &weights[part]))
    })
    .into_iter()
    .sum()
}

/// The sums of the diagnostics; `tau` is the loss above which a sample counts as clipped.
///
/// # Panics
/// If the lengths differ.
pub fn sums<V: Real, W: Real>(losses: &[V], weights: &[W], tau: f64, threads: usize) -> Sums {
    assert_eq!(losses.len(), weights.len());
    let threads = if losses.len() < PARALLEL { 1 } else { threads };
    let blocks = map_blocks(losses.len().div_ceil(BLOCK), threads, |i| {
        let part = i * BLOCK..losses.len().min((i + 1) * BLOCK);
        let mut s = Sums::default();
        for (l, w) in losses[part.clone()].iter().zip(&weights[part]) {
            let (l, w) = (l.to_f64(), w.to_f64());
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
    use proptest::prelude::*;

    #[test]
    fn the_sums_of_a_small_batch_are_as_by_hand() {
        let s = sums(&[1.0, 3.0f32], &[0.0, 2.0f64], 1.0, 1);
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
        assert_eq!(sums::<f32, f32>(&[], &[], 1.0, 1), Sums::default());
        let nan = [f64::NAN, 1.0];
        assert!(sums(&nan, &nan, 1.0, 1).max.is_nan());
    }

    proptest! {
        #[test]
        fn a_weighted_sum_is_exact_to_its_rounding_and_the_same_for_any_threads(
            pairs in prop::collection::vec((-10f64..10.0, 0f64..3.0), 0..300), repeat in 1usize..600
        ) {
            let (v, w): (Vec<f64>, Vec<f64>) = pairs.iter().copied().cycle().take(pairs.len() * repeat).unzip();
            let sum = weighted_sum(&v, &w, 1);
            prop_assert_eq!(sum.to_bits(), weighted_sum(&v, &w, 3).to_bits());
            let magnitude: f64 = v.iter().zip(&w).map(|(v, w)| (v * w).abs()).sum();
            let plain: f64 = v.iter().zip(&w).map(|(v, w)| v * w).sum();
            prop_assert!((sum - plain).abs() <= 2.0 * f64::EPSILON * v.len() as f64 * magnitude + f64::MIN_POSITIVE);
        }
    }
}
