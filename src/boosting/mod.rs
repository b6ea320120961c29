//! Gradients and Hessians of re-weighted losses, for boosted trees.
//!
//! Of margins `f` and labels `y`, with `w` the weights of the losses `l`, constants, and `p` the base measure (1 where
//! none is given), one call fills `p w dl/df` and `p w d^2 l/df^2`, of several classes the diagonal. The losses are
//!
//! - logistic: `l = y log(1 + exp(-f)) + (1 - y) log(1 + exp(f))` for `y` in `[0, 1]`;
//! - softmax: `l = log(sum_j exp(f_j)) - f_y`;
//! - squared error: `l = (f - y)^2 / 2`.
//!
//! Everything is computed in `f64`. The libraries keep derivatives in `f32`, so one that does not fit is an error.
//! Blocks of samples fit the first-level cache, so that losses, pointwise weights and derivatives take one pass over
//! the margins.

#[cfg(test)]
mod tests;

use crate::layout::{Shared, Values};
use crate::numeric::{Element, Isa, Kernel, Real, dispatch, ln};
use crate::parallel::{filled, for_each_block};
use crate::reduce::product;
use crate::weightings::Weighting;
use ndarray::{ArrayView2, ArrayViewMut2};
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Margins of a block: 32 KiB of f64.
const BLOCK: usize = 4096;

/// Margins below which waking a thread costs more than it saves.
const PARALLEL: usize = 8 * BLOCK;

/// The loss of a sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Of two classes: labels in `[0, 1]`, one margin.
    Logistic,
    /// Of several classes: labels `0, 1, ...`, a margin a class.
    Softmax,
    /// Labels are any finite numbers; one margin.
    SquaredError,
}

impl Loss {
    /// The loss of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "logistic" => Some(Self::Logistic),
            "softmax" => Some(Self::Softmax),
            "squared_error" => Some(Self::SquaredError),
            _ => None,
        }
    }

    fn takes(self, label: f64, classes: usize) -> bool {
        match self {
            Self::Logistic => (0.0..=1.0).contains(&label),
            Self::Softmax => label >= 0.0 && label < classes as f64 && label.fract() == 0.0,
            Self::SquaredError => label.is_finite(),
        }
    }
}

/// Samples, and how many threads may work on them.
pub struct Inputs<'a, T> {
    /// Their loss.
    pub loss: Loss,
    /// A row a sample; one column for losses of one margin.
    pub margins: ArrayView2<'a, T>,
    /// A label a sample.
    pub labels: &'a dyn Values,
    /// The largest number of threads.
    pub threads: usize,
}

/// The weights of the losses.
#[derive(Clone, Copy)]
pub enum Weights<'a> {
    /// The weights of a pointwise weighting.
    Pointwise(Weighting),
    /// Given weights.
    Given(&'a dyn Values),
}

/// The derivatives to be filled, and their factors.
pub struct Outputs<'a> {
    /// The base measure; `None` for ones.
    pub measure: Option<&'a dyn Values>,
    /// The weights.
    pub weights: Weights<'a>,
    /// A factor of the Hessian; `None` to take the gradient's absolute value in the Hessian's place.
    pub curvature: Option<f64>,
    /// Of the margins' shape, any strides.
    pub gradient: ArrayViewMut2<'a, MaybeUninit<f64>>,
    /// Of the margins' shape, any strides.
    pub hessian: ArrayViewMut2<'a, MaybeUninit<f64>>,
}

/// The first sample whose numbers are not allowed. The outputs are then undefined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Error {
    /// The loss does not allow its label.
    Label(usize),
    /// Its base measure is negative or not finite.
    Measure(usize),
    /// Its derivatives do not fit into `f32`, or its weight is negative.
    Overflow(usize),
}

/// Fills the loss of each sample.
///
/// # Errors
/// If a label is not allowed.
///
/// # Panics
/// If lengths differ.
pub fn losses<T: Element>(inputs: &Inputs<T>, losses: &mut [MaybeUninit<f64>]) -> Result<(), Error> {
    assert_eq!(losses.len(), inputs.margins.nrows());
    let out = Shared(losses.as_mut_ptr());
    inputs.for_each_block(|block| {
        // SAFETY: blocks are disjoint parts of `losses`, which outlives the call.
        let out = unsafe { out.part(block.start, block.end) };
        let work = Work::new(inputs, block.end - block.start);
        dispatch(LossesOf { inputs, block, work, out });
    })
}

/// Fills gradient and Hessian, and returns the largest weight of the samples whose base measure is not 0; 0 without
/// such samples.
///
/// # Errors
/// If a label or a base measure is not allowed, a weight is negative, or a derivative does not fit into `f32`.
///
/// # Panics
/// If lengths or shapes differ, or if a weighting of [`Weights::Pointwise`] depends on the batch.
pub fn derivatives<T: Element>(inputs: &Inputs<T>, mut outputs: Outputs) -> Result<f64, Error> {
    let shape = inputs.margins.dim();
    assert_eq!(outputs.gradient.dim(), shape);
    assert_eq!(outputs.hessian.dim(), shape);
    assert!(outputs.measure.is_none_or(|measure| measure.count() == shape.0));
    match outputs.weights {
        Weights::Pointwise(weighting) => assert!(weighting.is_pointwise()),
        Weights::Given(weights) => assert_eq!(weights.count(), shape.0),
    }
    let to = [Rows::of(&mut outputs.gradient), Rows::of(&mut outputs.hessian)];
    let outputs = &outputs;
    // Floats >= 0 have the same order as their bits.
    let largest = AtomicU64::new(0);
    inputs.for_each_block(|block| {
        let work = Work::new(inputs, block.end - block.start);
        let weight = dispatch(DerivativesOf {
            inputs,
            measure: outputs.measure,
            weights: outputs.weights,
            curvature: outputs.curvature,
            block,
            work,
            to,
        });
        largest.fetch_max(weight.to_bits(), Ordering::Relaxed);
    })?;
    Ok(f64::from_bits(largest.into_inner()))
}

/// The samples of a block, and the place to note a wrong one.
struct Block<'a> {
    start: usize,
    end: usize,
    wrong_label: &'a AtomicUsize,
    wrong_measure: &'a AtomicUsize,
    overflow: &'a AtomicUsize,
}

impl<T: Element> Inputs<'_, T> {
    fn for_each_block(&self, work: impl Fn(Block) + Sync) -> Result<(), Error> {
        let (samples, classes) = self.margins.dim();
        assert_eq!(self.labels.count(), samples);
        assert!(classes == 1 || self.loss == Loss::Softmax);
        let size = (BLOCK / classes.max(1)).clamp(16, BLOCK / 4);
        let threads = if self.margins.len() < PARALLEL { 1 } else { self.threads };
        let [wrong_label, wrong_measure, overflow] = [(); 3].map(|()| AtomicUsize::new(samples));
        for_each_block(samples.div_ceil(size), threads, |i| {
            let (start, end) = (i * size, samples.min((i + 1) * size));
            work(Block {
                start,
                end,
                wrong_label: &wrong_label,
                wrong_measure: &wrong_measure,
                overflow: &overflow,
            });
        });
        match (wrong_label.into_inner(), wrong_measure.into_inner(), overflow.into_inner()) {
            (label, ..) if label < samples => Err(Error::Label(label)),
            (_, measure, _) if measure < samples => Err(Error::Measure(measure)),
            (.., sample) if sample < samples => Err(Error::Overflow(sample)),
            _ => Ok(()),
        }
    }
}

/// The numbers that are computed for a block's samples.
struct Work {
    labels: Vec<f64>,
    /// Class after class, the margins of all samples, which become `exp(f_j - max f)`, or for the logistic loss
    /// `exp(-|f|)`.
    tile: Vec<f64>,
    /// For softmax the largest margin, otherwise the margin.
    margin: Vec<f64>,
    /// For softmax the sum of the exponentials.
    sum: Vec<f64>,
    /// Losses, which become weights, which become `p w`.
    values: Vec<f64>,
}

impl Work {
    fn new<T: Element>(inputs: &Inputs<T>, count: usize) -> Self {
        let vector = || filled(count, 0.0);
        Self {
            labels: vector(),
            tile: filled(count * inputs.margins.ncols(), 0.0),
            margin: vector(),
            sum: vector(),
            values: vector(),
        }
    }

    /// Reads labels and margins of a block and fills the losses.
    #[inline(always)]
    fn losses<T: Element, I: Isa>(&mut self, inputs: &Inputs<T>, block: &Block) {
        let classes = inputs.margins.ncols();
        inputs.labels.read(block.start, &mut self.labels);
        for (i, label) in self.labels.iter_mut().enumerate() {
            if !inputs.loss.takes(*label, classes) {
                block.wrong_label.fetch_min(block.start + i, Ordering::Relaxed);
                *label = 0.0;
            }
        }
        self.read_margins(inputs, block.start);
        match inputs.loss {
            Loss::Logistic => self.logistic::<I>(),
            Loss::Softmax => self.softmax::<I>(),
            Loss::SquaredError => {
                for ((l, &f), &y) in self.values.iter_mut().zip(&self.tile).zip(&self.labels) {
                    *l = 0.5 * (f - y) * (f - y);
                }
                self.margin.copy_from_slice(&self.tile);
            }
        }
    }

    #[inline(always)]
    fn read_margins<T: Element>(&mut self, inputs: &Inputs<T>, start: usize) {
        let count = self.labels.len();
        if count == 0 {
            return;
        }
        let (row, column) = (inputs.margins.strides()[0], inputs.margins.strides()[1]);
        for (j, values) in self.tile.chunks_mut(count).enumerate() {
            let first = inputs.margins.as_ptr();
            for (i, x) in values.iter_mut().enumerate() {
                // SAFETY: the samples `start..start + count` and the columns below the tile's are indices of the view.
                *x = unsafe { *first.offset((start + i) as isize * row + j as isize * column) }
                    .widen()
                    .to_f64();
            }
        }
    }

    #[inline(always)]
    fn logistic<I: Isa>(&mut self) {
        self.margin.copy_from_slice(&self.tile);
        for ((l, x), &y) in self.values.iter_mut().zip(&mut self.tile).zip(&self.labels) {
            let f = *x;
            let e = Real::exp_nonpositive::<I>(-f.abs());
            // log(1 + e), corrected by the rounding error of the sum.
            let u = 1.0 + e;
            let log = ln::<I>(u) + (e - (u - 1.0)) / u;
            let positive = if f < 0.0 { log - f } else { log };
            let negative = if f > 0.0 { log + f } else { log };
            let first = if y == 0.0 { 0.0 } else { y * positive };
            let second = if y == 1.0 { 0.0 } else { (1.0 - y) * negative };
            *l = first + second;
            *x = e;
        }
    }

    #[inline(always)]
    fn softmax<I: Isa>(&mut self) {
        let count = self.labels.len().max(1);
        self.margin.fill(f64::NEG_INFINITY);
        for class in self.tile.chunks(count) {
            for (max, &f) in self.margin.iter_mut().zip(class) {
                *max = if f > *max { f } else { *max };
            }
        }
        for (i, (l, &y)) in self.values.iter_mut().zip(&self.labels).enumerate() {
            *l = self.tile[y as usize * count + i] - self.margin[i];
        }
        self.sum.fill(0.0);
        for class in self.tile.chunks_mut(count) {
            for ((sum, x), &max) in self.sum.iter_mut().zip(class).zip(&self.margin) {
                *x = Real::exp_nonpositive::<I>(*x - max);
                *sum += *x;
            }
        }
        for (l, &sum) in self.values.iter_mut().zip(&self.sum) {
            *l = ln::<I>(sum) - *l;
        }
    }
}

struct LossesOf<'a, 'b, T> {
    inputs: &'a Inputs<'b, T>,
    block: Block<'a>,
    work: Work,
    out: &'a mut [MaybeUninit<f64>],
}

impl<T: Element> Kernel for LossesOf<'_, '_, T> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(mut self) {
        self.work.losses::<T, I>(self.inputs, &self.block);
        for (out, &l) in self.out.iter_mut().zip(&self.work.values) {
            out.write(l);
        }
    }
}

/// Where rows of an output lie.
#[derive(Clone, Copy)]
struct Rows {
    first: Shared<MaybeUninit<f64>>,
    row: isize,
    column: isize,
}

impl Rows {
    fn of(view: &mut ArrayViewMut2<MaybeUninit<f64>>) -> Self {
        let (row, column) = (view.strides()[0], view.strides()[1]);
        Self { first: Shared(view.as_mut_ptr()), row, column }
    }

    /// Writes an element.
    ///
    /// # Safety
    /// It is one of the view's, the view outlives the call, and no other thread touches the row.
    #[inline(always)]
    unsafe fn write(self, i: usize, j: usize, value: f64) {
        // SAFETY: what the caller promises.
        unsafe { (*self.first.0.offset(i as isize * self.row + j as isize * self.column)).write(value) };
    }
}

struct DerivativesOf<'a, 'b, T> {
    inputs: &'a Inputs<'b, T>,
    measure: Option<&'a dyn Values>,
    weights: Weights<'a>,
    curvature: Option<f64>,
    block: Block<'a>,
    work: Work,
    to: [Rows; 2],
}

impl<T: Element> Kernel for DerivativesOf<'_, '_, T> {
    /// The largest weight.
    type Output = f64;
    #[inline(always)]
    fn run<I: Isa>(mut self) -> f64 {
        let (start, classes) = (self.block.start, self.inputs.margins.ncols());
        self.work.losses::<T, I>(self.inputs, &self.block);
        let Work { labels, tile, margin, sum, values } = &mut self.work;
        match self.weights {
            Weights::Pointwise(weighting) => weighting.pointwise::<f64, I>(values),
            Weights::Given(weights) => weights.read(start, values),
        }
        let [gradient, hessian] = self.to;
        let curvature = self.curvature;
        let overflow = self.block.overflow;
        let put = |i: usize, j: usize, w: f64, g: f64, h: f64| {
            let g = product(w, g);
            let h = curvature.map_or(g.abs(), |factor| product(w, factor * h));
            let largest = f64::from(f32::MAX);
            if !(w >= 0.0 && g.abs() <= largest && h <= largest) {
                overflow.fetch_min(start + i, Ordering::Relaxed);
            }
            // SAFETY: `i` is a sample of this block, whose rows no other block writes; `derivatives` has compared the
            // shapes, and the outputs outlive it.
            unsafe {
                gradient.write(start + i, j, g);
                hessian.write(start + i, j, h);
            }
        };
        let mut largest_weight = 0.0f64;
        if let Some(measure) = self.measure {
            // Softmax still needs its sums but not its margins. The other losses need their margins but not the sums.
            let p = if self.inputs.loss == Loss::Softmax { &mut *margin } else { &mut *sum };
            measure.read(start, p);
            for (i, (w, &p)) in values.iter_mut().zip(&*p).enumerate() {
                if !(0.0..f64::INFINITY).contains(&p) {
                    self.block.wrong_measure.fetch_min(start + i, Ordering::Relaxed);
                }
                if p == 0.0 {
                    *w = 0.0;
                } else {
                    largest_weight = largest_weight.max(*w);
                    *w *= p;
                }
            }
        } else {
            largest_weight = values.iter().copied().fold(0.0, f64::max);
        }
        match self.inputs.loss {
            Loss::Logistic => {
                for i in 0..labels.len() {
                    let (f, y, e) = (margin[i], labels[i], tile[i]);
                    let large = 1.0 / (1.0 + e);
                    let small = e * large;
                    let (positive, negative) = if f < 0.0 { (small, large) } else { (large, small) };
                    put(i, 0, values[i], (1.0 - y) * positive - y * negative, large * small);
                }
            }
            Loss::Softmax => {
                let count = labels.len().max(1);
                for sum in sum.iter_mut() {
                    *sum = 1.0 / *sum;
                }
                for j in 0..classes {
                    for i in 0..labels.len() {
                        let q = tile[j * count + i] * sum[i];
                        let own = if labels[i] == j as f64 { 1.0 } else { 0.0 };
                        put(i, j, values[i], q - own, q * (1.0 - q));
                    }
                }
            }
            Loss::SquaredError => {
                for i in 0..labels.len() {
                    put(i, 0, values[i], margin[i] - labels[i], 1.0);
                }
            }
        }
        largest_weight
    }
}
