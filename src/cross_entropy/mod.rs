//! Logits and targets to losses, weights, the re-weighted objective and its gradient.
//!
//! With `t` the target's mass over the classes (class weight and label smoothing included), a target's loss is
//! `l = sum_k t_k (logsumexp(x) - x_k)`, and the gradient of `f l`, `f` a constant, is `f ((sum_k t_k) softmax(x) - t)`.
//! A pointwise weight depends on its own loss alone, so [`cross_entropy`] writes losses, weights and gradient in one pass
//! over the logits. Weights that depend on more than that take two: [`losses`], and [`gradient`] of given weights.
//!
//! With a logit adjustment `a`, one number a class, `x_k` stands for the logit `x_k + a_k`, summed in the accumulator's type.
//!
//! `shape` checks the arguments, `labels` reads the targets, `mass` says how their mass lies on the classes. There are two
//! loops over the logits: `rows` has the lanes along the classes, `tiles` across targets; `groups` has what they share.

mod groups;
mod labels;
mod mass;
mod rows;
mod shape;
mod tiles;

#[cfg(test)]
mod tests;

pub use labels::{Target, Totals};
pub use shape::Error;

use crate::layout::{Shared, Vector, written};
use crate::numeric::{Element, Real};
use crate::parallel::{filled, with_capacity};
use crate::reduce::{self, product};
use crate::weightings::{self, Weighting};
use groups::{Plan, Problem};
use labels::Labels;
use ndarray::{ArrayViewD, ArrayViewMutD};
use shape::Dimensions;
use std::mem::MaybeUninit;

/// How losses become an objective, as in `torch.nn.CrossEntropyLoss`; `p` is the sample weight, 1 where none is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduction {
    /// `p_i w_i l_i` each.
    None,
    /// `sum_i p_i w_i l_i` over the sum of `p_i` times the target's class weight (for class probabilities: of `p_i`), both
    /// over the targets that take part.
    Mean,
    /// `sum_i p_i w_i l_i`.
    Sum,
}

/// The settings of a cross-entropy.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// The class index of a target that takes no part.
    pub ignore_index: i64,
    /// In `[0, 1]`.
    pub label_smoothing: f64,
    /// Whether all targets of a sample of the leading axis share a weight, that of their mean loss.
    pub per_sample: bool,
    /// How losses become an objective.
    pub reduction: Reduction,
    /// The largest number of threads to use.
    pub threads: usize,
}

/// What a call reads.
#[derive(Debug)]
pub struct Inputs<'a, T: Element> {
    /// Of shape `(C,)`, `(N, C)` or `(N, C, d1, ..., dk)`.
    pub logits: ArrayViewD<'a, T>,
    /// What the logits are held against.
    pub target: Target<'a, T>,
    /// One a class.
    pub class_weight: Option<&'a [T::Real]>,
    /// One a class: `x_k + a_k` takes the place of every logit `x_k`. A constant of the gradient.
    pub logit_adjustment: Option<&'a [T::Real]>,
    /// The base measure `p`, one a target or, with `per_sample`, a sample. What has 0 takes no part.
    pub sample_weight: Option<&'a [T::Real]>,
}

/// What [`cross_entropy`] fills, row-major and contiguous but for the gradient.
#[derive(Debug)]
pub struct Outputs<'a, T: Element> {
    /// One loss a target, 0 for one that takes no part.
    pub losses: &'a mut [MaybeUninit<T::Real>],
    /// One weight a target or, with `per_sample`, a sample; 0 where nothing takes part.
    pub weights: &'a mut [MaybeUninit<T::Real>],
    /// One value, or for [`Reduction::None`] one a target.
    pub objective: &'a mut [MaybeUninit<T::Real>],
    /// The gradient of the objective (for [`Reduction::None`]: of its sum) with respect to the logits.
    pub grad: Gradient<'a, T>,
}

/// Where the gradient with respect to the logits goes.
#[derive(Debug)]
pub enum Gradient<'a, T> {
    /// Nowhere: it is not computed.
    Unwanted,
    /// Into memory of its own, of the logits' shape.
    Separate(ArrayViewMutD<'a, MaybeUninit<T>>),
    /// Over the logits. A call that is given up leaves some of them overwritten.
    InPlace(Overwrite),
}

impl<T> Gradient<'_, T> {
    fn is_wanted(&self) -> bool {
        !matches!(self, Self::Unwanted)
    }
}

/// The right to write the gradient over the logits, although [`Inputs`] has only a view of them to read.
#[derive(Debug)]
pub struct Overwrite(());

impl Overwrite {
    /// Grants the right for one call.
    ///
    /// # Safety
    /// The view of the logits was made from a pointer that may be written through, no two of its indices share an element,
    /// and as long as the call lasts nothing else reads or writes that memory: neither another thread nor another argument.
    #[must_use]
    pub unsafe fn granted() -> Self {
        Self(())
    }
}

/// Fills `out` with losses, their weights, the objective and its gradient.
///
/// Everything is checked before anything is written.
///
/// # Errors
/// [`Error::OutOfRange`] for a class index that is no class; [`Error::Shape`] where shapes do not fit;
/// [`Error::SampleWeight`] for sample weights with a weighting that is not pointwise.
pub fn cross_entropy<T: Element>(
    inputs: &Inputs<T>,
    weighting: Weighting,
    settings: &Settings,
    out: Outputs<T>,
) -> Result<Totals, Error> {
    if inputs.sample_weight.is_some() && !weighting.is_pointwise() {
        return Err(Error::SampleWeight(weighting.kind()));
    }
    let Outputs { losses, weights, objective, mut grad } = out;
    let dims = Dimensions::of(inputs, settings)?;
    dims.length("losses", losses.len(), dims.targets)?;
    dims.length("weights", weights.len(), dims.units)?;
    dims.length("objective", objective.len(), dims.objectives(settings))?;
    dims.gradient(&grad)?;
    let (labels, totals) = Labels::read(inputs, &dims, settings.ignore_index)?;

    let mut problem = Problem::new(inputs, &dims, &labels, settings.label_smoothing, &mut grad);
    problem.norm = norm(settings.reduction, &totals);
    let on_losses = Shared(losses.as_mut_ptr());
    if weighting.is_pointwise() && !settings.per_sample {
        let weights = Shared(weights.as_mut_ptr());
        problem.run(Plan::Pointwise { weighting, losses: on_losses, weights }, settings.threads);
    } else {
        problem.run(Plan::Losses { losses: on_losses }, settings.threads);
        // SAFETY: the pass wrote the loss of every target.
        let losses = unsafe { written(losses) };
        unit_weights(losses, &labels, &dims, weighting, settings.threads, weights);
        if problem.grad.is_some() {
            // SAFETY: the weight of every unit was written.
            problem.run(Plan::Given { weights: unsafe { written(weights) } }, settings.threads);
        }
    }
    // SAFETY: either branch wrote all of both.
    let (losses, weights) = unsafe { (written(losses), written(weights)) };
    let given = Given { losses, weights };
    write_objective(given, inputs.sample_weight, &labels, dims.unit, &totals, settings, objective);
    Ok(totals)
}

/// Fills `losses` alone, one a target, 0 for one that takes no part.
///
/// # Errors
/// As [`cross_entropy`].
pub fn losses<T: Element>(
    inputs: &Inputs<T>,
    settings: &Settings,
    losses: &mut [MaybeUninit<T::Real>],
) -> Result<Totals, Error> {
    let dims = Dimensions::of(inputs, settings)?;
    dims.length("losses", losses.len(), dims.targets)?;
    let (labels, totals) = Labels::read(inputs, &dims, settings.ignore_index)?;
    let problem = Problem::new(inputs, &dims, &labels, settings.label_smoothing, &mut Gradient::Unwanted);
    problem.run(Plan::Losses { losses: Shared(losses.as_mut_ptr()) }, settings.threads);
    Ok(totals)
}

/// Losses as [`losses`] fills them, and the weights that were made of them.
#[derive(Debug, Clone, Copy)]
pub struct Given<'a, A> {
    /// One loss a target, 0 for one that is ignored.
    pub losses: &'a [A],
    /// One weight a target or, with `per_sample`, a sample; a constant of the gradient.
    pub weights: &'a [A],
}

/// Fills the objective of given losses and weights and, if it is wanted, its gradient with respect to the logits.
///
/// Everything is checked before anything is written.
///
/// # Errors
/// As [`cross_entropy`].
pub fn gradient<T: Element>(
    inputs: &Inputs<T>,
    given: Given<T::Real>,
    settings: &Settings,
    objective: &mut [MaybeUninit<T::Real>],
    mut grad: Gradient<T>,
) -> Result<Totals, Error> {
    let dims = Dimensions::of(inputs, settings)?;
    dims.length("losses", given.losses.len(), dims.targets)?;
    dims.length("weights", given.weights.len(), dims.units)?;
    dims.length("objective", objective.len(), dims.objectives(settings))?;
    dims.gradient(&grad)?;
    let (labels, totals) = Labels::read(inputs, &dims, settings.ignore_index)?;
    if grad.is_wanted() {
        let mut problem = Problem::new(inputs, &dims, &labels, settings.label_smoothing, &mut grad);
        problem.norm = norm(settings.reduction, &totals);
        problem.run(Plan::Given { weights: given.weights }, settings.threads);
    }
    write_objective(given, inputs.sample_weight, &labels, dims.unit, &totals, settings, objective);
    Ok(totals)
}

/// Fills losses, pointwise weights and the gradient of `sum_i norm_i w_i l_i`, with a number `norm_i` for each target.
///
/// # Errors
/// As [`cross_entropy`].
///
/// # Panics
/// If the weighting is not pointwise.
pub fn with_norms<T: Element>(
    inputs: &Inputs<T>,
    weighting: Weighting,
    settings: &Settings,
    norms: &[T::Real],
    losses: &mut [MaybeUninit<T::Real>],
    weights: &mut [MaybeUninit<T::Real>],
    mut grad: Gradient<T>,
) -> Result<Totals, Error> {
    assert!(weighting.is_pointwise() && !settings.per_sample);
    let dims = Dimensions::of(inputs, settings)?;
    for (name, got) in [("norms", norms.len()), ("losses", losses.len()), ("weights", weights.len())] {
        dims.length(name, got, dims.targets)?;
    }
    dims.gradient(&grad)?;
    let (labels, totals) = Labels::read(inputs, &dims, settings.ignore_index)?;
    let mut problem = Problem::new(inputs, &dims, &labels, settings.label_smoothing, &mut grad);
    problem.base = Some(norms);
    let (losses, weights) = (Shared(losses.as_mut_ptr()), Shared(weights.as_mut_ptr()));
    problem.run(Plan::Pointwise { weighting, losses, weights }, settings.threads);
    Ok(totals)
}

/// What a weighted loss is multiplied by in the objective.
fn norm(reduction: Reduction, totals: &Totals) -> f64 {
    match reduction {
        Reduction::None | Reduction::Sum => 1.0,
        Reduction::Mean => 1.0 / totals.divisor(),
    }
}

/// Weights of units (single targets, or samples) from their mean losses; targets that do not count take no part.
fn unit_weights<A: Real>(
    losses: &[A],
    labels: &Labels,
    dims: &Dimensions,
    weighting: Weighting,
    threads: usize,
    weights: &mut [MaybeUninit<A>],
) {
    let mut counted = with_capacity(weights.len());
    let mut means = with_capacity(weights.len());
    for (u, weight) in weights.iter_mut().enumerate() {
        let targets = u * dims.unit..(u + 1) * dims.unit;
        let count = targets.clone().filter(|&i| labels.counts(i)).count();
        if count == 0 {
            weight.write(A::default());
        } else {
            counted.push(u);
            means.push(reduce::total(losses[targets].iter().map(|l| l.to_f64())) / count as f64);
        }
    }
    let mut of_counted = filled(counted.len(), MaybeUninit::<A>::uninit());
    weightings::sample_weights(&Vector::of(&means), weighting, &mut of_counted, threads);
    for (u, w) in counted.into_iter().zip(of_counted) {
        weights[u] = w;
    }
}

/// Writes the objective; a weight of zero gives a product of zero, unless the loss is NaN.
fn write_objective<A: Real>(
    Given { losses, weights }: Given<A>,
    base: Option<&[A]>,
    labels: &Labels,
    unit: usize,
    totals: &Totals,
    settings: &Settings,
    objective: &mut [MaybeUninit<A>],
) {
    if settings.reduction == Reduction::None {
        for (i, (out, &loss)) in objective.iter_mut().zip(losses).enumerate() {
            let weight = weights[i / unit];
            let weight = base.map_or(weight, |p| p[i / unit] * weight);
            out.write(if labels.counts(i) { product(weight, loss) } else { A::default() });
        }
        return;
    }
    let sum = if unit == 1 {
        let (losses, weights, base) = (Vector::of(losses), Vector::of(weights), base.map(Vector::of));
        let base = base.as_ref().map(|base| base as _);
        reduce::weighted_sum(&losses, &weights, base, settings.threads)
    } else {
        let samples = losses.chunks(unit.max(1)).zip(weights).enumerate();
        reduce::total(samples.map(|(u, (losses, w))| {
            let p = base.map_or(1.0, |p| p[u].to_f64());
            let loss = reduce::total(losses.iter().map(|l| l.to_f64()));
            if p == 0.0 { 0.0 } else { product(p * w.to_f64(), loss) }
        }))
    };
    let value = if settings.reduction == Reduction::Mean { sum / totals.divisor() } else { sum };
    objective[0].write(A::from_f64(value));
}
