//! Weighted sums, the sums for the statistics of a batch of weights, and conversion to `f64`.
//!
//! With base measure `p` (1 if none is given) these are `sum_i p_i w_i l_i`, `sum_i p_i w_i^2` and so on. They are
//! summed in `f64`, per block of a fixed size and then over the blocks in order. A sample with `p_i = 0` takes no part.
//! A weight of zero gives a product of zero, also with an infinite loss; a NaN loss stays NaN.

use crate::layout::{Shared, Values};
use crate::numeric::{Isa, Kernel, MulAdd, Real, dispatch};
use crate::parallel::{for_each_block, map_blocks};
use std::mem::MaybeUninit;

/// Elements of a block, which is summed by one thread.
const BLOCK: usize = 2048;

/// Elements of a block that are read at a time.
const CHUNK: usize = 256;

/// The number of partial sums. Adding a row of this many products to them compiles to vector code.
const ROW: usize = 64;

/// Elements below which waking a thread costs more than it saves.
const PARALLEL: usize = 32 * BLOCK;

/// The sums over a batch of losses `l` and their weights `w` with base measure `p`. Python gets them by these names.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[cfg_attr(feature = "python", derive(pyo3::IntoPyObject))]
pub struct WeightSums {
    /// The number of samples with `p > 0`.
    pub count: usize,
    /// `sum p`.
    pub mass: f64,
    /// `sum p l`.
    pub loss: f64,
    /// `sum p w`.
    pub weight: f64,
    /// `sum p w l`.
    pub objective: f64,
    /// `sum p w^2`.
    pub square: f64,
    /// `sum p w log w`, with `0 log 0 = 0`.
    pub entropy: f64,
    /// The largest weight; NaN if one is NaN, 0 for an empty batch.
    pub largest: f64,
    /// `sum p` over the losses above the clip.
    pub clipped: f64,
}

/// `weight * value`; 0 where the weight is 0, unless the value is NaN.
#[inline(always)]
#[must_use]
pub fn product<A: Real>(weight: A, value: A) -> A {
    let zero = A::default();
    if weight == zero && !value.to_f64().is_nan() { zero } else { weight * value }
}

/// Adds the products of a chunk to `lanes`. The weights have been multiplied by the base measure already.
struct Products<'a> {
    values: &'a [f64],
    weights: &'a [f64],
    lanes: &'a mut [f64; ROW],
}

impl Kernel for Products<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        for (values, weights) in self.values.chunks(ROW).zip(self.weights.chunks(ROW)) {
            for ((lane, &v), &w) in self.lanes.iter_mut().zip(values).zip(weights) {
                let v = if w == 0.0 && !v.is_nan() { 0.0 } else { v };
                *lane = MulAdd::mul_add::<I>(v, w, *lane);
            }
        }
    }
}

/// `sum_i base_i values_i weights_i`.
///
/// # Panics
/// If the lengths differ.
#[must_use]
pub fn weighted_sum(
    values: &dyn Values,
    weights: &dyn Values,
    measure: Option<&dyn Values>,
    threads: usize,
) -> f64 {
    let n = values.count();
    assert_eq!(n, weights.count());
    assert!(measure.is_none_or(|measure| measure.count() == n));
    let threads = if n < PARALLEL { 1 } else { threads };
    let sum = |i: usize| {
        let (mut first, mut second, mut lanes) = ([0.0; CHUNK], [0.0; CHUNK], [0.0; ROW]);
        for (start, count) in chunks(i, n) {
            let (v, w) = (&mut first[..count], &mut second[..count]);
            values.read(start, v);
            weights.read(start, w);
            if let Some(measure) = measure {
                let mut third = [0.0; CHUNK];
                let p = &mut third[..count];
                measure.read(start, p);
                for ((v, w), &mut p) in v.iter_mut().zip(&mut *w).zip(p) {
                    (*v, *w) = if p == 0.0 { (0.0, 0.0) } else { (*v, p * *w) };
                }
            }
            dispatch(Products { values: v, weights: w, lanes: &mut lanes });
        }
        total(lanes)
    };
    total(map_blocks(n.div_ceil(BLOCK), threads, sum))
}

/// The sum of numbers in order. Without numbers it is 0; `Iterator::sum` would return -0.
pub fn total(numbers: impl IntoIterator<Item = f64>) -> f64 {
    numbers.into_iter().fold(0.0, |sum, x| sum + x)
}

/// Start and length of each chunk of block `i` of `n` elements.
fn chunks(i: usize, n: usize) -> impl Iterator<Item = (usize, usize)> {
    let end = n.min((i + 1) * BLOCK);
    (i * BLOCK..end).step_by(CHUNK).map(move |start| (start, CHUNK.min(end - start)))
}

/// The sums of the statistics; `clip` is the loss above which a sample counts as clipped.
///
/// # Panics
/// If the lengths differ.
#[must_use]
pub fn weight_sums(
    losses: &dyn Values,
    weights: &dyn Values,
    measure: Option<&dyn Values>,
    clip: f64,
    threads: usize,
) -> WeightSums {
    let n = losses.count();
    assert_eq!(n, weights.count());
    assert!(measure.is_none_or(|measure| measure.count() == n));
    let threads = if n < PARALLEL { 1 } else { threads };
    let blocks = map_blocks(n.div_ceil(BLOCK), threads, |i| {
        let (mut first, mut second, mut third) = ([0.0; CHUNK], [0.0; CHUNK], [0.0; CHUNK]);
        let mut sums = WeightSums::default();
        for (start, count) in chunks(i, n) {
            let (l, w, p) = (&mut first[..count], &mut second[..count], &mut third[..count]);
            losses.read(start, l);
            weights.read(start, w);
            if let Some(measure) = measure {
                measure.read(start, p);
                for ((&mut l, &mut w), &mut p) in l.iter_mut().zip(w).zip(p) {
                    sums.add(l, w, p, clip);
                }
            } else {
                for (&mut l, &mut w) in l.iter_mut().zip(w) {
                    sums.add(l, w, 1.0, clip);
                }
            }
        }
        sums
    });
    blocks.into_iter().fold(WeightSums::default(), WeightSums::join)
}

impl WeightSums {
    #[inline(always)]
    fn add(&mut self, l: f64, w: f64, p: f64, clip: f64) {
        if p == 0.0 {
            return;
        }
        self.count += 1;
        self.mass += p;
        self.loss += p * l;
        self.weight += p * w;
        self.objective += product(p * w, l);
        self.square += p * (w * w);
        self.entropy += if w == 0.0 { 0.0 } else { p * (w * w.ln()) };
        self.largest = larger(self.largest, w);
        self.clipped += if l > clip { p } else { 0.0 };
    }

    fn join(self, other: Self) -> Self {
        Self {
            count: self.count + other.count,
            mass: self.mass + other.mass,
            loss: self.loss + other.loss,
            weight: self.weight + other.weight,
            objective: self.objective + other.objective,
            square: self.square + other.square,
            entropy: self.entropy + other.entropy,
            largest: larger(self.largest, other.largest),
            clipped: self.clipped + other.clipped,
        }
    }
}

/// The larger of two numbers; NaN if one is.
fn larger(a: f64, b: f64) -> f64 {
    if a.is_nan() || b <= a { a } else { b }
}

/// Fills `out` with the values.
///
/// # Panics
/// If the lengths differ.
pub fn widen(values: &dyn Values, out: &mut [MaybeUninit<f64>], threads: usize) {
    let n = values.count();
    assert_eq!(n, out.len());
    let threads = if n < PARALLEL { 1 } else { threads };
    let address = Shared(out.as_mut_ptr());
    for_each_block(n.div_ceil(BLOCK), threads, |i| {
        let mut buffer = [0.0; CHUNK];
        for (start, count) in chunks(i, n) {
            let chunk = &mut buffer[..count];
            values.read(start, chunk);
            // SAFETY: chunks are disjoint parts of `out`, which outlives the call.
            for (out, &x) in unsafe { address.part(start, start + count) }.iter_mut().zip(&*chunk) {
                out.write(x);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{Vector, written};
    use half::bf16;
    use proptest::prelude::*;

    fn sums(losses: &[f64], weights: &[f64], measure: Option<&[f64]>) -> WeightSums {
        let measure = measure.map(Vector::of);
        let measure = measure.as_ref().map(|measure| measure as _);
        weight_sums(&Vector::of(losses), &Vector::of(weights), measure, 1.0, 1)
    }

    fn sum(values: &[f64], weights: &[f64], measure: Option<&[f64]>, threads: usize) -> f64 {
        let measure = measure.map(Vector::of);
        let measure = measure.as_ref().map(|measure| measure as _);
        weighted_sum(&Vector::of(values), &Vector::of(weights), measure, threads)
    }

    #[test]
    fn the_sums_of_a_small_batch_are_as_by_hand() {
        let expected = WeightSums {
            count: 2,
            mass: 2.0,
            loss: 4.0,
            weight: 2.0,
            objective: 6.0,
            square: 4.0,
            entropy: 2.0 * 2f64.ln(),
            largest: 2.0,
            clipped: 1.0,
        };
        assert_eq!(sums(&[1.0, 3.0], &[0.0, 2.0], None), expected);
        // The loss at the clip itself does not count as clipped.
        assert_eq!(sums(&[1.0, 3.0, 4.0], &[1.0; 3], None).clipped, 2.0);
        assert_eq!(sums(&[], &[], None), WeightSums::default());
        assert_eq!(sum(&[], &[], None, 1).to_bits(), 0);
        assert!(sums(&[f64::NAN, 1.0], &[f64::NAN, 1.0], None).largest.is_nan());
    }

    #[test]
    fn an_integer_base_counts_a_sample_that_often_and_a_base_of_zero_leaves_it_out() {
        let (l, w) = ([1.0, 3.0, f64::NAN, 0.5], [0.25, 2.0, f64::INFINITY, 4.0]);
        let with_base = sums(&l, &w, Some(&[1.0, 2.0, 0.0, 3.0]));
        let repeated = sums(&[1.0, 3.0, 3.0, 0.5, 0.5, 0.5], &[0.25, 2.0, 2.0, 4.0, 4.0, 4.0], None);
        let entropy = with_base.entropy;
        assert!((entropy - repeated.entropy).abs() <= 6.0 * f64::EPSILON * entropy);
        assert_eq!(with_base, WeightSums { count: 3, entropy, ..repeated });
        assert_eq!(sum(&l, &w, Some(&[1.0, 2.0, 0.0, 3.0]), 1), repeated.objective);
    }

    #[test]
    fn a_weight_of_zero_silences_an_infinite_value_but_not_a_nan() {
        let inf = f64::INFINITY;
        assert_eq!(sum(&[inf, 2.0, -inf], &[0.0, 3.0, 0.0], None, 1), 6.0);
        assert_eq!(sums(&[inf, 2.0], &[0.0, 3.0], None).objective, 6.0);
        assert!(sum(&[f64::NAN, 2.0], &[0.0, 3.0], None, 1).is_nan());
        assert!(sums(&[f64::NAN, 2.0], &[0.0, 3.0], None).objective.is_nan());
        assert_eq!(sum(&[inf, 2.0], &[1.0, 3.0], None, 1), inf);
        assert_eq!([product(0.0f32, f32::INFINITY), product(-0.0, 5.0), product(2.0, 3.0)], [0.0, 0.0, 6.0]);
    }

    #[test]
    fn widening_is_exact_for_any_number_of_threads() {
        let values: Vec<bf16> = (0..100_003u32).map(|i| bf16::from_bits(i as u16 & 0x7f7f)).collect();
        for threads in [1, 3] {
            let mut out = vec![MaybeUninit::uninit(); values.len()];
            widen(&Vector::of(&values), &mut out, threads);
            // SAFETY: all values were written.
            let out = unsafe { written(&out) };
            assert!(values.iter().zip(out).all(|(value, &x)| value.to_f64() == x));
        }
    }

    proptest! {
        #[test]
        fn a_weighted_sum_is_exact_to_its_rounding_and_the_same_for_any_threads(
            pairs in prop::collection::vec((-10f64..10.0, 0f64..3.0), 0..300), repeat in 1usize..600
        ) {
            let (v, w): (Vec<f64>, Vec<f64>) = pairs.iter().copied().cycle().take(pairs.len() * repeat).unzip();
            let total = sum(&v, &w, None, 1);
            prop_assert_eq!(total.to_bits(), sum(&v, &w, None, 3).to_bits());
            let magnitude: f64 = v.iter().zip(&w).map(|(v, w)| (v * w).abs()).sum();
            let plain: f64 = v.iter().zip(&w).map(|(v, w)| v * w).sum();
            prop_assert!((total - plain).abs() <= 2.0 * f64::EPSILON * v.len() as f64 * magnitude + f64::MIN_POSITIVE);
        }
    }
}
