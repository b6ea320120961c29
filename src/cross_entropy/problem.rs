//! The inputs of a call by their addresses, and a group of targets between the two steps over its logits: from sums
//! over the classes to losses, weights and factors.
//!
//! With the largest logit `m`, the mass `h` on the label `y` and the soft mass `t`, a target's loss is
//! `l = h (log S - (x_y - m)) + (sum_k t_k) log S - sum_k t_k (x_k - m)` with `S = sum_k exp(x_k - m)`. The gradient of
//! `f l` is `f (h + sum_k t_k) / S exp(x_k - m) - f t_k`, at the label less `f h`, where `f = norm p w`. A z-loss adds
//! `norm p z Z^2` with `Z = m + log S`, and so `2 norm p z Z` to `f (h + sum_k t_k)`.

use super::arguments::{Gradient, Inputs, PerTarget, Settings, Target};
use super::labels::{Label, Labels};
use super::mass::SoftMass;
use super::shape::Dimensions;
use crate::layout::{Positions, Shared};
use crate::numeric::{Element, Isa, Real, ln};
use crate::weightings::Weighting;
use std::mem::MaybeUninit;

/// Logits of a block, the unit of work of a thread.
pub(super) const BLOCK: usize = 1 << 15;

/// The source of the weights, which decides the outputs of a pass.
#[derive(Clone, Copy)]
pub(super) enum Plan<'a, A> {
    /// Writes the losses. With `kept`, leaves the exponentials where the gradient goes, and in `kept` their sum and the
    /// soft mass of each target.
    Losses { losses: Losses<A>, kept: Option<Shared<MaybeUninit<[A; 2]>>> },
    /// Writes the losses, their pointwise weights, and the gradient if it is wanted.
    Pointwise { weighting: Weighting, losses: Losses<A>, weights: Shared<MaybeUninit<A>> },
    /// Writes the gradient, from one weight a unit; from ones where none are given. With `kept`, from what an earlier
    /// pass has left.
    Given { weights: Option<&'a [A]>, kept: Option<&'a [[A; 2]]> },
}

impl<'a, A> Plan<'a, A> {
    /// Whether the pass leaves the exponentials where the gradient goes.
    pub fn keeps(self) -> bool {
        matches!(self, Self::Losses { kept: Some(_), .. })
    }

    /// What an earlier pass has left.
    pub fn kept(self) -> Option<&'a [[A; 2]]> {
        if let Self::Given { kept, .. } = self { kept } else { None }
    }
}

/// Where the loss of each target goes and, if it is wanted, the logsumexp of its logits.
#[derive(Clone, Copy)]
pub(super) struct Losses<A> {
    losses: Shared<MaybeUninit<A>>,
    logsumexp: Option<Shared<MaybeUninit<A>>>,
}

impl<A> Losses<A> {
    pub fn new(losses: &mut [MaybeUninit<A>], logsumexp: PerTarget<A>) -> Self {
        Self {
            losses: Shared(losses.as_mut_ptr()),
            logsumexp: logsumexp.map(|logsumexp| Shared(logsumexp.as_mut_ptr())),
        }
    }
}

/// The inputs and the gradient of a call, by their addresses.
pub(super) struct Problem<'a, T: Element> {
    pub classes: usize,
    /// Where each target's logits, gradient and probabilities lie.
    pub positions: Positions<3>,
    pub logits: Shared<T>,
    /// The stride of the class axis.
    pub logits_class: isize,
    /// Where the gradient goes, if it is wanted: memory of its own or that of the logits.
    pub grad: Option<Shared<T>>,
    /// The stride of the class axis.
    pub grad_class: isize,
    pub labels: &'a Labels,
    pub class_weight: Option<&'a [T::Real]>,
    /// What is added to the logits of each class.
    pub adjustment: Option<&'a [T::Real]>,
    /// One number a unit that multiplies the factors.
    pub measure: Option<&'a [T::Real]>,
    /// How many targets share a weight.
    pub unit: usize,
    /// What multiplies all factors.
    pub norm: f64,
    /// `1 - label_smoothing`.
    pub on_label: f64,
    pub z_loss: f64,
    pub soft: SoftMass<T>,
}

impl<'a, T: Element> Problem<'a, T> {
    /// Keeps addresses of `inputs` and `grad`, which must stay borrowed as long as this is used.
    pub fn new(
        inputs: &'a Inputs<T>,
        dims: &Dimensions,
        labels: &'a Labels,
        settings: &Settings,
        grad: &mut Gradient<T>,
    ) -> Self {
        let Dimensions { classes, class_axis, .. } = *dims;
        let Settings { label_smoothing, z_loss, .. } = *settings;
        let logits = &inputs.logits;
        let without_class = |strides: &[isize]| -> Vec<isize> {
            strides.iter().enumerate().filter(|&(axis, _)| axis != class_axis).map(|(_, &s)| s).collect()
        };
        let x_strides = without_class(logits.strides());
        let logits_address = Shared(logits.as_ptr().cast_mut());
        let (grad, g_strides) = match grad {
            Gradient::Unwanted => (None, logits.strides()),
            Gradient::Separate(grad) => (Some(Shared(grad.as_mut_ptr().cast())), grad.strides()),
            Gradient::InPlace(_) => (Some(logits_address), logits.strides()),
        };
        let (g_strides, g_class) = (without_class(g_strides), g_strides[class_axis]);
        let q_strides = match &inputs.target {
            Target::Probabilities(q) => without_class(q.strides()),
            _ => vec![0; dims.shape.len()],
        };
        Self {
            classes,
            positions: Positions::new(&dims.shape, [&x_strides, &g_strides, &q_strides]),
            logits: logits_address,
            logits_class: if classes == 1 { 1 } else { logits.strides()[class_axis] },
            grad,
            grad_class: if classes == 1 { 1 } else { g_class },
            labels,
            class_weight: inputs.class_weight,
            adjustment: inputs.logit_adjustment,
            measure: inputs.measure,
            unit: dims.unit,
            norm: 1.0,
            on_label: 1.0 - label_smoothing,
            z_loss,
            soft: SoftMass::new(&inputs.target, classes, inputs.class_weight, label_smoothing),
        }
    }

    /// The gradient's address, if the plan writes it.
    pub fn wanted_grad(&self, plan: Plan<T::Real>) -> Option<Shared<T>> {
        if matches!(plan, Plan::Losses { .. }) { None } else { self.grad }
    }

    /// Sets the mass on each label, and the label's logit less the largest, from `logit(i, y)`.
    #[inline(always)]
    pub fn look_at_labels(
        &self,
        start: usize,
        count: usize,
        group: &mut Group<T::Real>,
        logit: impl Fn(usize, usize) -> T::Real,
    ) {
        let Some(labels) = self.labels.part(start, count) else {
            group.label_mass[..count].fill(T::Real::default());
            group.at_label[..count].fill(T::Real::default());
            return;
        };
        for (i, label) in labels.iter().enumerate() {
            (group.label_mass[i], group.at_label[i]) = match label.class() {
                Some(y) => {
                    let c = self.class_weight.map_or(1.0, |c| c[y].to_f64());
                    let mass = T::Real::from_f64(self.on_label * c);
                    // 0 times -inf is 0: without mass the label's logit does not matter.
                    let zero = T::Real::default();
                    (mass, if mass == zero { zero } else { logit(i, y) - group.max[i] })
                }
                None => (T::Real::default(), T::Real::default()),
            };
        }
    }

    /// From the sums over the classes to losses and weights, written as the plan says, and on to the factors.
    #[inline(always)]
    pub fn weigh<I: Isa>(&self, plan: Plan<T::Real>, start: usize, count: usize, group: &mut Group<T::Real>) {
        let mut buffer = [0.0; GROUP];
        let values = &mut buffer[..count];
        let labels = self.labels.part(start, count);
        // Below, "as above" means: a block writes the losses and the weights of its own targets only, and both slices
        // outlive the call.
        match plan {
            Plan::Losses { losses, .. } => {
                self.losses::<I>(labels, group, values);
                // SAFETY: as above.
                unsafe { losses.store::<I>(labels, group, start, values) };
                return;
            }
            Plan::Pointwise { weighting, losses, weights } => {
                self.losses::<I>(labels, group, values);
                // SAFETY: as above.
                unsafe { losses.store::<I>(labels, group, start, values) };
                weighting.pointwise::<T::Real, I>(values);
                for value in &mut *values {
                    *value = T::Real::from_f64(*value).to_f64();
                }
                clear_ignored(labels, values);
                // SAFETY: as above.
                store(unsafe { weights.part(start, start + count) }, values);
            }
            Plan::Given { weights: Some(weights), .. } => {
                for (i, value) in values.iter_mut().enumerate() {
                    *value = weights[(start + i) / self.unit].to_f64();
                }
            }
            Plan::Given { weights: None, .. } => values.fill(1.0),
        }
        if let Some(measure) = self.measure {
            for (i, value) in values.iter_mut().enumerate() {
                let p = measure[(start + i) / self.unit].to_f64();
                // Where the base measure is 0 there is no gradient, however large the weight.
                *value = if p == 0.0 { 0.0 } else { *value * p };
            }
        }
        for value in &mut *values {
            *value *= self.norm;
        }
        // The norm is NaN where no target counts.
        clear_ignored(labels, values);
        for (factor, &value) in group.factor.iter_mut().zip(&*values) {
            *factor = T::Real::from_f64(value);
        }
        for i in 0..count {
            group.exp_factor[i] = group.factor[i] * (group.label_mass[i] + group.soft_mass[i]);
        }
        if self.z_loss != 0.0 {
            for (i, value) in values.iter_mut().enumerate() {
                let p = self.measure.map_or(1.0, |measure| measure[(start + i) / self.unit].to_f64());
                *value = 2.0 * p * self.z_loss * self.norm * group.logsumexp::<I>(i);
            }
            clear_ignored(labels, values);
            for (factor, &value) in group.exp_factor.iter_mut().zip(&*values) {
                *factor += T::Real::from_f64(value);
            }
        }
        for (factor, &sum) in group.exp_factor.iter_mut().zip(&group.sum[..count]) {
            *factor = *factor / sum;
        }
    }

    /// The losses of a group, rounded to the accumulator's type.
    #[inline(always)]
    fn losses<I: Isa>(&self, labels: Option<&[Label]>, group: &Group<T::Real>, losses: &mut [f64]) {
        let count = losses.len();
        let on_labels = group.label_mass[..count].iter().zip(&group.at_label[..count]);
        if self.soft.is_some() {
            let sums = group.sum[..count].iter().zip(&group.soft_dot[..count]).zip(&group.soft_mass[..count]);
            let probabilities = self.soft.is_probabilities();
            for ((loss, ((&sum, &dot), &mass)), (&label_mass, &at_label)) in
                losses.iter_mut().zip(sums).zip(on_labels)
            {
                let log_sum = ln::<I>(sum.to_f64());
                let on_label = label_mass.to_f64() * (log_sum - at_label.to_f64());
                let soft = mass.to_f64() * log_sum - dot.to_f64();
                *loss = if probabilities { soft } else { on_label + soft };
            }
        } else {
            for ((loss, &sum), (&label_mass, &at_label)) in
                losses.iter_mut().zip(&group.sum[..count]).zip(on_labels)
            {
                *loss = label_mass.to_f64() * (ln::<I>(sum.to_f64()) - at_label.to_f64());
            }
        }
        for loss in &mut *losses {
            *loss = T::Real::from_f64(*loss).to_f64();
        }
        clear_ignored(labels, losses);
    }
}

impl<A: Real> Losses<A> {
    /// Writes the losses of the targets from `start` on, and the logsumexp of their logits.
    ///
    /// # Safety
    /// They are targets of the problem, and no other thread writes their results meanwhile.
    #[inline(always)]
    unsafe fn store<I: Isa>(self, labels: Option<&[Label]>, group: &Group<A>, start: usize, losses: &[f64]) {
        let end = start + losses.len();
        // SAFETY: what the caller promises.
        store(unsafe { self.losses.part(start, end) }, losses);
        let Some(logsumexp) = self.logsumexp else { return };
        // SAFETY: as above.
        for (i, out) in unsafe { logsumexp.part(start, end) }.iter_mut().enumerate() {
            let counts = labels.is_none_or(|labels| labels[i].counts());
            out.write(A::from_f64(if counts { group.logsumexp::<I>(i) } else { 0.0 }));
        }
    }
}

/// Sets the values of targets that take no part to 0.
#[inline(always)]
fn clear_ignored(labels: Option<&[Label]>, values: &mut [f64]) {
    for (value, label) in values.iter_mut().zip(labels.unwrap_or_default()) {
        *value = if label.counts() { *value } else { 0.0 };
    }
}

/// Writes numbers in the accumulator's type.
#[inline(always)]
fn store<A: Real>(out: &mut [MaybeUninit<A>], values: &[f64]) {
    for (out, &value) in out.iter_mut().zip(values) {
        out.write(A::from_f64(value));
    }
}

/// Targets that are worked on together: their number is large enough for the lanes of every loop over them, and their
/// numbers stay in the first-level cache.
pub(super) const GROUP: usize = 256;

/// What is known of a group of targets, one entry each; `m` is the largest logit, `t` the soft mass.
pub(super) struct Group<A> {
    /// `m`.
    pub max: [A; GROUP],
    /// `x_y - m` at the label `y`.
    pub at_label: [A; GROUP],
    /// `sum_k exp(x_k - m)`.
    pub sum: [A; GROUP],
    /// `sum_k t_k (x_k - m)`.
    pub soft_dot: [A; GROUP],
    /// `sum_k t_k`.
    pub soft_mass: [A; GROUP],
    /// The mass on the label.
    pub label_mass: [A; GROUP],
    /// `sum`, `soft_dot` and `soft_mass` over the classes so far, where there are many.
    pub totals: Vec<[f64; GROUP]>,
    /// The factor of the gradient of the target's loss; 0 where the target takes no part.
    pub factor: [A; GROUP],
    /// The factor of the exponentials: `factor` times all mass, plus the part of a z-loss, over `sum`.
    pub exp_factor: [A; GROUP],
}

impl<A: Real> Group<A> {
    /// `log sum_k exp(x_k)` of a target.
    #[inline(always)]
    fn logsumexp<I: Isa>(&self, i: usize) -> f64 {
        self.max[i].to_f64() + ln::<I>(self.sum[i].to_f64())
    }

    pub fn new() -> Self {
        let zero = [A::default(); GROUP];
        Self {
            max: zero,
            at_label: zero,
            sum: zero,
            soft_dot: zero,
            soft_mass: zero,
            label_mass: zero,
            totals: Vec::new(),
            factor: zero,
            exp_factor: zero,
        }
    }
}
