//! Functions of a batch of losses and sums over it, block by block.
//!
//! A batch is worked through in blocks of a fixed size that fit the first-level cache, and sums are joined in the order
//! of the blocks, so that a result does not depend on the number of threads.

use crate::layout::{Shared, Vector};
use crate::numeric::{Element, Isa, Kernel, Real, dispatch};
use crate::parallel::{for_each_block, map_blocks};
use std::mem::MaybeUninit;

/// Elements of a block: 16 KiB of f64, kept off the stack, which may be small.
const BLOCK: usize = 2048;

/// Elements below which waking a thread costs more than it saves.
pub(super) const PARALLEL: usize = 16 * BLOCK;

/// A function of a block of losses, applied in place.
pub(super) trait BlockMap: Copy + Sync {
    fn apply<I: Isa>(&self, block: &mut [f64]);
}

struct Write<'a, 'b, T, W, M> {
    losses: &'a Vector<'b, T>,
    start: usize,
    weights: &'a mut [MaybeUninit<W>],
    map: M,
}

impl<T: Element, W: Real, M: BlockMap> Kernel for Write<'_, '_, T, W, M> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        let mut block = vec![0.0; self.weights.len()];
        self.losses.load(self.start, &mut block);
        self.map.apply::<I>(&mut block);
        for (w, &x) in self.weights.iter_mut().zip(&block) {
            w.write(W::from_f64(x));
        }
    }
}

/// Writes a function of each block of losses as the block's weights.
pub(super) fn write<T: Element, W: Real>(
    losses: &Vector<T>,
    weights: &mut [MaybeUninit<W>],
    threads: usize,
    map: impl BlockMap,
) {
    let (n, out) = (losses.len(), Shared(weights.as_mut_ptr()));
    for_each_block(n.div_ceil(BLOCK), threads, |i| {
        let (start, end) = (i * BLOCK, n.min((i + 1) * BLOCK));
        // SAFETY: blocks are disjoint parts of `weights`, which outlives the call.
        let weights = unsafe { out.part(start, end) };
        dispatch(Write { losses, start, weights, map });
    });
}

/// Writes one number as every weight.
pub(super) fn fill<W: Real>(weights: &mut [MaybeUninit<W>], weight: f64) {
    for w in weights {
        w.write(W::from_f64(weight));
    }
}

/// A sum over a block of losses, which `sum` may overwrite, and how the sums of neighbouring blocks are joined.
pub(super) trait BlockSum: Copy + Sync {
    type Sum: Send + Clone + Default;
    fn sum<I: Isa>(&self, block: &mut [f64]) -> Self::Sum;
    fn join(a: Self::Sum, b: Self::Sum) -> Self::Sum;
}

struct Sum<'a, 'b, T, F> {
    losses: &'a Vector<'b, T>,
    start: usize,
    end: usize,
    of: F,
}

impl<T: Element, F: BlockSum> Kernel for Sum<'_, '_, T, F> {
    type Output = F::Sum;
    #[inline(always)]
    fn run<I: Isa>(self) -> F::Sum {
        let mut block = vec![0.0; self.end - self.start];
        self.losses.load(self.start, &mut block);
        self.of.sum::<I>(&mut block)
    }
}

/// Joins a function of each block of losses, in the order of the blocks.
pub(super) fn sum<T: Element, F: BlockSum>(losses: &Vector<T>, threads: usize, of: F) -> F::Sum {
    let n = losses.len();
    let blocks = map_blocks(n.div_ceil(BLOCK), threads, |i| {
        dispatch(Sum { losses, start: i * BLOCK, end: n.min((i + 1) * BLOCK), of })
    });
    blocks.into_iter().reduce(F::join).unwrap_or_default()
}

/// How many partial sums are kept, so that adding a row of as many numbers to them is vector code.
const ROW: usize = 64;

/// A sum and its rounding error so far.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Compensated {
    sum: f64,
    error: f64,
}

impl Compensated {
    #[inline(always)]
    pub fn of_lanes(numbers: &[f64]) -> Self {
        let (mut sums, mut errors) = ([0.0; ROW], [0.0; ROW]);
        Self::add_rows(numbers, &mut sums, &mut errors);
        let mut total = Self::default();
        for (sum, error) in sums.into_iter().zip(errors) {
            total = total.join(Self { sum, error });
        }
        total
    }

    /// Adds each row of numbers to `sums` and the rounding errors of that to `errors`.
    #[inline(always)]
    fn add_rows(numbers: &[f64], sums: &mut [f64], errors: &mut [f64]) {
        for row in numbers.chunks(ROW) {
            for ((sum, error), &x) in sums.iter_mut().zip(&mut *errors).zip(row) {
                let next = *sum + x;
                let part = next - *sum;
                *error += (*sum - (next - part)) + (x - part);
                *sum = next;
            }
        }
    }

    pub fn join(self, other: Self) -> Self {
        let sum = self.sum + other.sum;
        let part = sum - self.sum;
        let error = (self.sum - (sum - part)) + (other.sum - part);
        Self { sum, error: self.error + other.error + error }
    }

    pub fn value(self) -> f64 {
        self.sum + self.error
    }
}

/// All weight, in equal parts, on the samples of one loss.
#[derive(Clone, Copy)]
struct OnLoss {
    loss: f64,
    weight: f64,
}

impl BlockMap for OnLoss {
    #[inline(always)]
    fn apply<I: Isa>(&self, block: &mut [f64]) {
        for l in block {
            *l = if *l == self.loss { self.weight } else { 0.0 };
        }
    }
}

/// How many losses are one number.
#[derive(Clone, Copy)]
struct CountOf(f64);

impl BlockSum for CountOf {
    type Sum = usize;

    #[inline(always)]
    fn sum<I: Isa>(&self, block: &mut [f64]) -> usize {
        block.iter().filter(|&&l| l == self.0).count()
    }

    fn join(a: usize, b: usize) -> usize {
        a + b
    }
}

/// Puts all weight on the samples of one loss, which is among the losses.
pub(super) fn put_on<T: Element, W: Real>(
    loss: f64,
    losses: &Vector<T>,
    weights: &mut [MaybeUninit<W>],
    threads: usize,
) {
    let count = sum(losses, threads, CountOf(loss));
    write(losses, weights, threads, OnLoss { loss, weight: losses.len() as f64 / count as f64 });
}

/// The range of a batch of losses.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Extent {
    pub min: f64,
    pub max: f64,
    /// How many losses are the largest.
    pub at_max: usize,
}

#[derive(Clone, Copy)]
struct ExtentOf;

impl BlockSum for ExtentOf {
    type Sum = Option<Extent>;

    #[inline(always)]
    fn sum<I: Isa>(&self, block: &mut [f64]) -> Option<Extent> {
        let (mut mins, mut maxs, mut nans) = ([f64::INFINITY; ROW], [f64::NEG_INFINITY; ROW], [0.0; ROW]);
        for row in block.chunks(ROW) {
            for (((min, max), nan), &l) in mins.iter_mut().zip(&mut maxs).zip(&mut nans).zip(row) {
                *min = if l < *min { l } else { *min };
                *max = if l > *max { l } else { *max };
                *nan = if l.is_nan() { l } else { *nan };
            }
        }
        let min = mins.into_iter().fold(f64::INFINITY, f64::min);
        let max = maxs.into_iter().fold(f64::NEG_INFINITY, f64::max);
        if nans.into_iter().any(f64::is_nan) {
            return Some(Extent { min: f64::NAN, max: f64::NAN, at_max: 0 });
        }
        Some(Extent { min, max, at_max: block.iter().filter(|&&l| l == max).count() })
    }

    fn join(a: Option<Extent>, b: Option<Extent>) -> Option<Extent> {
        let (Some(a), Some(b)) = (a, b) else { return a.or(b) };
        if a.max.is_nan() || b.max.is_nan() {
            return Some(if a.max.is_nan() { a } else { b });
        }
        let max = a.max.max(b.max);
        let count = |e: Extent| if e.max == max { e.at_max } else { 0 };
        Some(Extent { min: a.min.min(b.min), max, at_max: count(a) + count(b) })
    }
}

impl Extent {
    /// The extent of `losses`; if one of them is NaN, `min` and `max` are too.
    pub fn of<T: Element>(losses: &Vector<T>, threads: usize) -> Self {
        sum(losses, threads, ExtentOf).unwrap_or_default()
    }
}
