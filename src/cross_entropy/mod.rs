//! Logits and targets to losses, weights, the re-weighted objective and its gradient.
//!
//! With `t` the target's mass over the classes (class weight and label smoothing included), a target's loss is `l =
//! sum_k t_k (logsumexp(x) - x_k)`, and the gradient of `f l`, `f` a constant, is `f ((sum_k t_k) softmax(x) - t)`. A
//! pointwise weight depends on its own loss alone, so [`cross_entropy`] writes losses, weights and gradient in one pass
//! over the logits. Weights that depend on more than that take two: [`losses`], and [`gradient`] of given weights.
//!
//! With a z-loss `z`, the objective has `z Z^2` beside the weighted loss, `Z` the logsumexp of the logits, and the
//! gradient `2 z Z softmax(x)`. With a logit adjustment `a`, one number a class, `x_k` stands for the logit `x_k +
//! a_k`, summed in the accumulator's type.
//!
//! `arguments` is what a call is given, `shape` checks it, `labels` reads the targets, `mass` says how their mass lies
//! on the classes. There are two loops over the logits: `rows` has the lanes along the classes, `tiles` across targets.
//! `problem` has what they share, and `pass` chooses one of them. `extras` is a pass of its own, for entropy, logsumexp
//! and the largest logit.

mod arguments;
mod extras;
mod labels;
mod mass;
mod pass;
mod problem;
mod rows;
mod shape;
mod tiles;

#[cfg(test)]
mod tests;

pub use arguments::{
    Given, Gradient, Inputs, Memory, NormedOutputs, Outputs, Overwrite, PerTarget, Reduction, Settings,
    Target,
};
pub use extras::{Extras, extras};
pub use labels::Totals;
pub use shape::Error;

use crate::layout::{Shared, Vector, written};
use crate::numeric::{Element, Real};
use crate::parallel::{filled, with_capacity};
use crate::reduce::{self, product};
use crate::weightings::{Batch, Weighting, sample_weights};
use labels::Labels;
use problem::{Losses, Plan, Problem};
use shape::Dimensions;
use std::mem::MaybeUninit;

/// Fills `out` with losses, their weights, the objective and its gradient.
///
/// Everything is checked before anything is written.
///
/// # Errors
/// [`Error::OutOfRange`] for a class index that is no class; [`Error::Shape`] where shapes do not fit;
/// [`Error::Stateful`] for a weighting that remembers earlier batches.
pub fn cross_entropy<T: Element>(
    inputs: &Inputs<T>,
    weighting: Weighting,
    settings: &Settings,
    out: Outputs<T>,
) -> Result<Totals, Error> {
    if !weighting.state_lengths().is_empty() {
        return Err(Error::Stateful(weighting.kind()));
    }
    cross_entropy_with(inputs, weighting, Memory::default(), settings, out)
}

/// As [`cross_entropy`], for a weighting that may look at groups and remember earlier batches.
///
/// # Errors
/// As [`cross_entropy`], and [`Error::Weighting`] for groups or a state that do not fit the weighting. The state stays
/// as it was then; outputs may be written.
pub fn cross_entropy_with<T: Element>(
    inputs: &Inputs<T>,
    weighting: Weighting,
    memory: Memory,
    settings: &Settings,
    out: Outputs<T>,
) -> Result<Totals, Error> {
    let Outputs { losses, weights, objective, mut grad } = out;
    let dims = Dimensions::of(inputs, settings)?;
    dims.length("losses", losses.len(), dims.targets)?;
    dims.length("weights", weights.len(), dims.units)?;
    dims.length("objective", objective.len(), dims.objectives(settings))?;
    dims.gradient(&grad)?;
    memory.groups.map_or(Ok(()), |groups| dims.length("groups", groups.len(), dims.units))?;
    let (labels, totals) = Labels::read(inputs, &dims, settings.ignore_index)?;

    let mut problem = Problem::new(inputs, &dims, &labels, settings, &mut grad);
    problem.norm = norm(settings, &totals);
    let mut logsumexp =
        (settings.z_loss != 0.0).then(|| filled(dims.targets, MaybeUninit::<T::Real>::uninit()));
    let to_losses = Losses::new(losses, logsumexp.as_deref_mut());
    if weighting.is_pointwise() && !settings.per_sample {
        let weights = Shared(weights.as_mut_ptr());
        pass::run(&problem, Plan::Pointwise { weighting, losses: to_losses, weights }, settings.threads);
    } else {
        let mut kept =
            pass::can_keep(&problem).then(|| filled(dims.targets, MaybeUninit::<[T::Real; 2]>::uninit()));
        let to_kept = kept.as_mut().map(|kept| Shared(kept.as_mut_ptr()));
        pass::run(&problem, Plan::Losses { losses: to_losses, kept: to_kept }, settings.threads);
        // SAFETY: the pass wrote the loss of every target.
        let losses = unsafe { written(losses) };
        unit_weights(losses, inputs.measure, &labels, &dims, weighting, memory, settings.threads, weights)?;
        if problem.grad.is_some() {
            // SAFETY: the weight of every unit was written, and what the first pass was to keep of every target.
            let (weights, kept) =
                unsafe { (Some(written(weights)), kept.as_deref().map(|kept| written(kept))) };
            pass::run(&problem, Plan::Given { weights, kept }, settings.threads);
        }
    }
    // SAFETY: either branch wrote all of these.
    let given = unsafe {
        let logsumexp = logsumexp.as_deref().map(|logsumexp| written(logsumexp));
        Given { losses: written(losses), weights: written(weights), logsumexp }
    };
    write_objective(given, inputs.measure, &labels, dims.unit, &totals, settings, objective);
    Ok(totals)
}

/// Fills `losses` alone, one a target, 0 for one that takes no part, and the logsumexp of its logits if it is wanted.
///
/// # Errors
/// As [`cross_entropy`].
pub fn losses<T: Element>(
    inputs: &Inputs<T>,
    settings: &Settings,
    losses: &mut [MaybeUninit<T::Real>],
    logsumexp: PerTarget<T::Real>,
) -> Result<Totals, Error> {
    let dims = Dimensions::of(inputs, settings)?;
    dims.length("losses", losses.len(), dims.targets)?;
    dims.per_target("logsumexp", logsumexp.as_deref())?;
    let (labels, totals) = Labels::read(inputs, &dims, settings.ignore_index)?;
    let problem = Problem::new(inputs, &dims, &labels, settings, &mut Gradient::Unwanted);
    pass::run(
        &problem,
        Plan::Losses { losses: Losses::new(losses, logsumexp), kept: None },
        settings.threads,
    );
    Ok(totals)
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
    dims.per_target("logsumexp", given.logsumexp)?;
    if settings.z_loss != 0.0 && given.logsumexp.is_none() {
        return Err(Error::Logsumexp);
    }
    dims.gradient(&grad)?;
    let (labels, totals) = Labels::read(inputs, &dims, settings.ignore_index)?;
    if grad.is_wanted() {
        let mut problem = Problem::new(inputs, &dims, &labels, settings, &mut grad);
        problem.norm = norm(settings, &totals);
        pass::run(&problem, Plan::Given { weights: Some(given.weights), kept: None }, settings.threads);
    }
    write_objective(given, inputs.measure, &labels, dims.unit, &totals, settings, objective);
    Ok(totals)
}

/// Fills losses, pointwise weights, the logsumexp of the logits if it is wanted, and the gradient of `sum_i norm_i (w_i
/// l_i + z Z_i^2)`, with a number `norm_i` for each target in the place of the base measure. Where it is 0, the
/// gradient is 0 whatever the weight.
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
    out: NormedOutputs<T>,
) -> Result<Totals, Error> {
    assert!(weighting.is_pointwise() && !settings.per_sample);
    let NormedOutputs { losses, weights, logsumexp, mut grad } = out;
    let dims = Dimensions::of(inputs, settings)?;
    for (name, got) in [("norms", norms.len()), ("losses", losses.len()), ("weights", weights.len())] {
        dims.length(name, got, dims.targets)?;
    }
    dims.per_target("logsumexp", logsumexp.as_deref())?;
    dims.gradient(&grad)?;
    let (labels, totals) = Labels::read(inputs, &dims, settings.ignore_index)?;
    let mut problem = Problem::new(inputs, &dims, &labels, settings, &mut grad);
    problem.measure = Some(norms);
    let (losses, weights) = (Losses::new(losses, logsumexp), Shared(weights.as_mut_ptr()));
    pass::run(&problem, Plan::Pointwise { weighting, losses, weights }, settings.threads);
    Ok(totals)
}

/// Fills the gradient of `sum_i norm_i (w_i l_i + z Z_i^2)` of given weights `w_i`, 1 if none are given. Each
/// target has a number `norm_i`, as in [`with_norms`].
///
/// # Errors
/// As [`cross_entropy`].
///
/// # Panics
/// If weights are shared by samples.
pub fn gradient_with_norms<T: Element>(
    inputs: &Inputs<T>,
    settings: &Settings,
    norms: &[T::Real],
    weights: Option<&[T::Real]>,
    mut grad: Gradient<T>,
) -> Result<Totals, Error> {
    assert!(!settings.per_sample);
    let dims = Dimensions::of(inputs, settings)?;
    dims.length("norms", norms.len(), dims.targets)?;
    dims.per_target("weights", weights)?;
    dims.gradient(&grad)?;
    let (labels, totals) = Labels::read(inputs, &dims, settings.ignore_index)?;
    let mut problem = Problem::new(inputs, &dims, &labels, settings, &mut grad);
    problem.measure = Some(norms);
    pass::run(&problem, Plan::Given { weights, kept: None }, settings.threads);
    Ok(totals)
}

/// What a weighted loss is multiplied by in the objective.
fn norm(settings: &Settings, totals: &Totals) -> f64 {
    match settings.reduction {
        Reduction::None | Reduction::Sum => 1.0,
        Reduction::Mean => 1.0 / totals.divisor(settings),
    }
}

/// Weights of units (single targets, or samples) from their mean losses; targets that do not count take no part.
#[expect(clippy::too_many_arguments, reason = "one step of one pass")]
fn unit_weights<A: Real>(
    losses: &[A],
    measure: Option<&[A]>,
    labels: &Labels,
    dims: &Dimensions,
    weighting: Weighting,
    memory: Memory,
    threads: usize,
    weights: &mut [MaybeUninit<A>],
) -> Result<(), Error> {
    let Memory { groups: group_of, state } = memory;
    if dims.unit == 1 && labels.all_count() {
        let measures: Option<Vec<f64>> = measure.map(|p| p.iter().map(|p| p.to_f64()).collect());
        let losses = Vector::of(losses);
        let batch = Batch::new(&losses, measures.as_deref(), group_of, threads);
        return sample_weights(&batch, weighting, state, weights).map_err(Error::Weighting);
    }
    let mut counted = with_capacity(weights.len());
    let mut means = with_capacity(weights.len());
    let mut measures = with_capacity(measure.map_or(0, <[A]>::len));
    let mut groups = with_capacity(group_of.map_or(0, <[i64]>::len));
    for (u, weight) in weights.iter_mut().enumerate() {
        let targets = u * dims.unit..(u + 1) * dims.unit;
        let count = targets.clone().filter(|&i| labels.counts(i)).count();
        if count == 0 {
            weight.write(A::default());
        } else {
            counted.push(u);
            means.push(reduce::total(losses[targets].iter().map(|l| l.to_f64())) / count as f64);
            measures.extend(measure.map(|p| p[u].to_f64()));
            groups.extend(group_of.map(|group_of| group_of[u]));
        }
    }
    let mut of_counted = filled(counted.len(), MaybeUninit::<A>::uninit());
    let means = Vector::of(&means);
    let (measures, groups) = (measure.map(|_| &measures[..]), group_of.map(|_| &groups[..]));
    let batch = Batch::new(&means, measures, groups, threads);
    sample_weights(&batch, weighting, state, &mut of_counted).map_err(Error::Weighting)?;
    for (u, w) in counted.into_iter().zip(of_counted) {
        weights[u] = w;
    }
    Ok(())
}

/// Writes the objective; a weight of zero gives a product of zero, unless the loss is NaN.
fn write_objective<A: Real>(
    given: Given<A>,
    measure: Option<&[A]>,
    labels: &Labels,
    unit: usize,
    totals: &Totals,
    settings: &Settings,
    objective: &mut [MaybeUninit<A>],
) {
    let Given { losses, weights, logsumexp } = given;
    let z_loss = settings.z_loss;
    let logsumexp = if z_loss == 0.0 { None } else { logsumexp };
    if settings.reduction == Reduction::None {
        for (i, (out, &loss)) in objective.iter_mut().zip(losses).enumerate() {
            let weight = weights[i / unit];
            let weight = measure.map_or(weight, |p| p[i / unit] * weight);
            let mut value = if labels.counts(i) { product(weight, loss) } else { A::default() };
            if let Some(logsumexp) = logsumexp.filter(|_| labels.counts(i)) {
                let p = measure.map_or(1.0, |p| p[i / unit].to_f64());
                let z = logsumexp[i].to_f64();
                value = A::from_f64(value.to_f64() + z_loss * p * (z * z));
            }
            out.write(value);
        }
        return;
    }
    let p = |u: usize| measure.map_or(1.0, |p| p[u].to_f64());
    let mut sum = if unit == 1 {
        measured_sum(losses, weights, measure, settings.threads)
    } else {
        let samples = losses.chunks(unit.max(1)).zip(weights).enumerate();
        reduce::total(samples.map(|(u, (losses, w))| {
            let loss = reduce::total(losses.iter().map(|l| l.to_f64()));
            if p(u) == 0.0 { 0.0 } else { product(p(u) * w.to_f64(), loss) }
        }))
    };
    if let Some(logsumexp) = logsumexp {
        sum +=
            z_loss
                * if unit == 1 {
                    measured_sum(logsumexp, logsumexp, measure, settings.threads)
                } else {
                    let samples = logsumexp.chunks(unit.max(1)).enumerate();
                    let square = |z: &A| z.to_f64() * z.to_f64();
                    reduce::total(samples.map(|(u, z)| {
                        if p(u) == 0.0 { 0.0 } else { p(u) * reduce::total(z.iter().map(square)) }
                    }))
                };
    }
    let value = if settings.reduction == Reduction::Mean { sum / totals.divisor(settings) } else { sum };
    objective[0].write(A::from_f64(value));
}

/// `sum_i p_i x_i y_i`.
fn measured_sum<A: Real>(values: &[A], factors: &[A], measure: Option<&[A]>, threads: usize) -> f64 {
    let (values, factors, measure) = (Vector::of(values), Vector::of(factors), measure.map(Vector::of));
    reduce::weighted_sum(&values, &factors, measure.as_ref().map(|measure| measure as _), threads)
}
