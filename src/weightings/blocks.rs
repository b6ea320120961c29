//! Functions of a batch of losses and sums over it, block by block.
//!
//! A batch is cut into blocks of a fixed size that fit the first-level cache. The sums of blocks are joined in the
//! order of the blocks, so that a result does not depend on the number of threads. If the batch has a measure `p`, sums
//! are `sum_i p_i x_i`, and a sample with `p_i = 0` takes no part, for any loss.

use super::batch::Batch;
use super::compensated::{Compensated, ROW};
use crate::layout::{Shared, Values};
use crate::numeric::{Isa, Kernel, Real, dispatch};
use crate::parallel::{for_each_block, map_blocks};
use std::mem::MaybeUninit;

/// Elements of a block: 16 KiB of f64, kept off the stack, which may be small.
const BLOCK: usize = 2048;

/// A function of a block of losses, applied in place.
pub(super) trait BlockMap: Copy + Sync {
    fn apply<I: Isa>(&self, block: &mut [f64]);
}

struct Write<'a, W, M> {
    losses: &'a dyn Values,
    measure: Option<&'a [f64]>,
    start: usize,
    weights: &'a mut [MaybeUninit<W>],
    map: M,
}

impl<W: Real, M: BlockMap> Kernel for Write<'_, W, M> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        let mut block = vec![0.0; self.weights.len()];
        self.losses.read(self.start, &mut block);
        self.map.apply::<I>(&mut block);
        if let Some(measure) = self.measure {
            for (x, &p) in block.iter_mut().zip(measure) {
                *x = if p == 0.0 { 0.0 } else { *x };
            }
        }
        for (w, &x) in self.weights.iter_mut().zip(&block) {
            w.write(W::from_f64(x));
        }
    }
}

/// Writes a function of each block of losses as the block's weights; 0 where a sample takes no part.
pub(super) fn write<W: Real>(batch: &Batch, weights: &mut [MaybeUninit<W>], map: impl BlockMap) {
    let (losses, n, out) = (batch.losses, batch.losses.count(), Shared(weights.as_mut_ptr()));
    for_each_block(n.div_ceil(BLOCK), batch.threads, |i| {
        let (start, end) = (i * BLOCK, n.min((i + 1) * BLOCK));
        // SAFETY: blocks are disjoint parts of `weights`, which outlives the call.
        let weights = unsafe { out.part(start, end) };
        dispatch(Write { losses, measure: batch.measure_of(start, end), start, weights, map });
    });
}

/// The same number for every loss.
#[derive(Clone, Copy)]
struct Constant(f64);

impl BlockMap for Constant {
    #[inline(always)]
    fn apply<I: Isa>(&self, block: &mut [f64]) {
        block.fill(self.0);
    }
}

/// Writes one number as the weight of every sample that takes part.
pub(super) fn fill<W: Real>(batch: &Batch, weights: &mut [MaybeUninit<W>], weight: f64) {
    write(batch, weights, Constant(weight));
}

/// A sum over a block of losses, which `sum` may overwrite, and how the sums of neighbouring blocks are joined.
/// `measure` has as many numbers as the block, or is `None` for ones.
pub(super) trait BlockSum: Copy + Sync {
    type Sum: Send + Clone + Default;
    fn sum<I: Isa>(&self, block: &mut [f64], measure: Option<&[f64]>) -> Self::Sum;
    fn join(a: Self::Sum, b: Self::Sum) -> Self::Sum;
}

struct Sum<'a, F> {
    losses: &'a dyn Values,
    measure: Option<&'a [f64]>,
    start: usize,
    end: usize,
    of: F,
}

impl<F: BlockSum> Kernel for Sum<'_, F> {
    type Output = F::Sum;
    #[inline(always)]
    fn run<I: Isa>(self) -> F::Sum {
        let mut block = vec![0.0; self.end - self.start];
        self.losses.read(self.start, &mut block);
        self.of.sum::<I>(&mut block, self.measure)
    }
}

/// Joins a function of each block of losses, in the order of the blocks.
pub(super) fn sum<F: BlockSum>(batch: &Batch, of: F) -> F::Sum {
    let (losses, n) = (batch.losses, batch.losses.count());
    let blocks = map_blocks(n.div_ceil(BLOCK), batch.threads, |i| {
        let (start, end) = (i * BLOCK, n.min((i + 1) * BLOCK));
        dispatch(Sum { losses, measure: batch.measure_of(start, end), start, end, of })
    });
    blocks.into_iter().reduce(F::join).unwrap_or_default()
}

/// Equal weights on the samples of one loss, and 0 on the others.
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

/// The measure of the losses that are equal to a number.
#[derive(Clone, Copy)]
struct MeasureOf(f64);

impl BlockSum for MeasureOf {
    type Sum = Compensated;

    #[inline(always)]
    fn sum<I: Isa>(&self, block: &mut [f64], measure: Option<&[f64]>) -> Compensated {
        measure_where(block, measure, |l| l == self.0)
    }

    fn join(a: Compensated, b: Compensated) -> Compensated {
        a.join(b)
    }
}

/// The measure of the losses of a block for which `holds` is true; without a measure, their number. It overwrites the
/// block.
#[inline(always)]
pub(super) fn measure_where(
    block: &mut [f64],
    measure: Option<&[f64]>,
    holds: impl Fn(f64) -> bool,
) -> Compensated {
    if measure.is_none() {
        return Compensated::exact(block.iter().filter(|&&l| holds(l)).count() as f64);
    }
    for l in block.iter_mut() {
        *l = f64::from(u8::from(holds(*l)));
    }
    Compensated::measured(block, measure)
}

/// Puts all weight on the samples of one loss, which is among the losses that take part.
pub(super) fn put_on<W: Real>(loss: f64, batch: &Batch, weights: &mut [MaybeUninit<W>]) {
    let there = sum(batch, MeasureOf(loss)).value();
    write(batch, weights, OnLoss { loss, weight: batch.total / there });
}

/// Whether at least one loss takes part, and all that do are finite.
pub(super) fn is_usable(batch: &Batch) -> bool {
    batch.total > 0.0 && sum(batch, Infinite).value() == 0.0
}

/// The measure of the losses that are not finite.
#[derive(Clone, Copy)]
struct Infinite;

impl BlockSum for Infinite {
    type Sum = Compensated;

    #[inline(always)]
    fn sum<I: Isa>(&self, block: &mut [f64], measure: Option<&[f64]>) -> Compensated {
        measure_where(block, measure, |l| !l.is_finite())
    }

    fn join(a: Compensated, b: Compensated) -> Compensated {
        a.join(b)
    }
}

/// The range of the losses that take part.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Extent {
    pub min: f64,
    pub max: f64,
    /// The measure of the losses that are the largest.
    pub at_max: Compensated,
}

#[derive(Clone, Copy)]
struct ExtentOf;

impl BlockSum for ExtentOf {
    type Sum = Option<Extent>;

    #[inline(always)]
    fn sum<I: Isa>(&self, block: &mut [f64], measure: Option<&[f64]>) -> Option<Extent> {
        let (mut mins, mut maxs, mut nans) = ([f64::INFINITY; ROW], [f64::NEG_INFINITY; ROW], [0.0; ROW]);
        if let Some(measure) = measure {
            // Samples that take no part are replaced by one that does.
            let one = measure.iter().position(|&p| p != 0.0).map(|i| block[i])?;
            for (l, &p) in block.iter_mut().zip(measure) {
                *l = if p == 0.0 { one } else { *l };
            }
        }
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
            return Some(Extent { min: f64::NAN, max: f64::NAN, at_max: Compensated::default() });
        }
        Some(Extent { min, max, at_max: measure_where(block, measure, |l| l == max) })
    }

    fn join(a: Option<Extent>, b: Option<Extent>) -> Option<Extent> {
        let (Some(a), Some(b)) = (a, b) else { return a.or(b) };
        if a.max.is_nan() || b.max.is_nan() {
            return Some(if a.max.is_nan() { a } else { b });
        }
        let max = a.max.max(b.max);
        let there = |e: Extent| if e.max == max { e.at_max } else { Compensated::default() };
        Some(Extent { min: a.min.min(b.min), max, at_max: there(a).join(there(b)) })
    }
}

impl Extent {
    /// The extent of the losses; if one of them is NaN, `min` and `max` are too.
    pub fn of(batch: &Batch) -> Self {
        sum(batch, ExtentOf).unwrap_or_default()
    }
}
