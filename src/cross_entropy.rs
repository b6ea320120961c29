//! Logits and targets to losses, weights, the re-weighted objective and its gradient, in one pass over the logits.
//!
//! With `t` the target's mass over the classes (class weight and label smoothing included) and `T = sum_k t_k`, a
//! target's loss is `l = sum_k t_k (logsumexp(x) - x_k)`, and the gradient of `w l`, `w` a constant, is
//! `w (T softmax(x) - t)`. A pointwise weight depends on its own loss alone, so the gradient is written while the
//! logits are still in cache; weights that depend on more than that take a second pass.
//!
//! There are two loops. `Row` has the lanes along the classes, for rows that are contiguous and long. `Tile` has the
//! lanes across [`LANES`] targets, for few classes or a strided class axis.

use crate::layout::{Positions, Run, Shared};
use crate::parallel::for_each_block;
use crate::reduce;
use crate::simd::{Element, Isa, Kernel, LANES, Real, dispatch, ln};
use crate::weights::{self, Kl, Losses, Weighting};
use ndarray::{ArrayView1, ArrayViewD, ArrayViewMutD};
use std::fmt;
use std::sync::atomic::{Ordering, compiler_fence};

/// How losses become an objective, as in `torch.nn.CrossEntropyLoss`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Reduction {
    /// `w_i l_i` each.
    None,
    /// `sum_i w_i l_i` over the sum of the class weights of the targets not ignored (for class probabilities: over
    /// the number of targets).
    Mean,
    /// `sum_i w_i l_i`.
    Sum,
    /// `sum_i w_i l_i` times a number: a part of a larger batch, of which that number is known.
    Times(f64),
}

impl Reduction {
    /// What a weighted loss is multiplied by.
    fn factor(self, totals: &Totals) -> f64 {
        match self {
            Self::None | Self::Sum => 1.0,
            Self::Mean => 1.0 / totals.denominator,
            Self::Times(factor) => factor,
        }
    }
}

/// The settings of a re-weighted cross-entropy.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Turns losses into weights.
    pub weighting: Weighting,
    /// The class index that counts for nothing.
    pub ignore_index: i64,
    /// In `[0, 1]`.
    pub label_smoothing: f64,
    /// Whether all targets of a sample of the leading dimension share a weight, that of their mean loss.
    pub per_sample: bool,
    /// How losses become an objective.
    pub reduction: Reduction,
    /// The largest number of threads to use.
    pub threads: usize,
}

/// What the logits are held against.
#[derive(Debug)]
pub enum Target<'a, T> {
    /// A class index each, of the logits' shape without the class axis.
    Int64(ArrayViewD<'a, i64>),
    /// The same in 32 bits.
    Int32(ArrayViewD<'a, i32>),
    /// A probability for each class, of the logits' shape.
    Probabilities(ArrayViewD<'a, T>),
}

/// What a call fills, row-major and contiguous but for the gradient.
#[derive(Debug)]
pub struct Outputs<'a, T: Element> {
    /// One loss a target, 0 for an ignored one.
    pub losses: &'a mut [T::Real],
    /// One weight a target or, with `per_sample`, a sample; 0 where all is ignored.
    pub weights: &'a mut [T::Real],
    /// One value, or for [`Reduction::None`] one a target.
    pub objective: &'a mut [T::Real],
    /// The gradient of the objective (for [`Reduction::None`]: of its sum) with respect to the logits, whose shape it
    /// has.
    pub grad: Option<ArrayViewMutD<'a, T>>,
}

/// What the objective was divided by, and how many targets counted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Totals {
    /// The denominator of [`Reduction::Mean`].
    pub denominator: f64,
    /// The number of targets that are not ignored.
    pub counted: usize,
}

/// Why a call was refused.
#[derive(Debug, Clone, PartialEq)]
pub enum Error {
    /// A class index is neither a class nor `ignore_index`.
    OutOfRange {
        /// The index found.
        index: i64,
        /// Where it stands in the target.
        position: Vec<usize>,
        /// The number of classes.
        classes: usize,
    },
    /// Shapes do not fit.
    Shape(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfRange { index, position, classes } => write!(
                f,
                "target {index} at position {position:?} is out of range for logits with {classes} classes: give a class \
                 in 0..{classes}, or name {index} in ignore_index"
            ),
            Self::Shape(message) => f.write_str(message),
        }
    }
}

impl std::error::Error for Error {}

/// A label that counts for nothing.
const IGNORED: u32 = u32::MAX;

/// Classes from which on lanes run along a contiguous row.
const ROW_CLASSES: usize = 24;

/// Logits of a block, the unit of work of a thread.
const BLOCK: usize = 1 << 15;

/// Logits below which waking a thread costs more than it saves.
const PARALLEL: usize = 1 << 18;

/// Fills `out` from `logits` of shape `(C,)`, `(N, C)` or `(N, C, d1, ..., dk)`.
///
/// Everything is checked before anything is written.
///
/// # Errors
/// [`Error::OutOfRange`] for a class index that is no class; [`Error::Shape`] where shapes do not fit.
pub fn cross_entropy<T: Element>(
    logits: &ArrayViewD<T>,
    target: &Target<T>,
    class_weight: Option<&[T::Real]>,
    settings: &Settings,
    out: Outputs<T>,
) -> Result<Totals, Error> {
    let dims = Dimensions::of(logits, settings)?;
    dims.check(target, class_weight, settings, &out)?;
    let Dimensions { classes, class_axis, ref shape, targets, unit, .. } = dims;
    let (labels, totals) = read_labels(target, targets, classes, class_weight, settings.ignore_index)?;

    let Outputs { losses, weights, objective, mut grad } = out;
    let without_class = |strides: &[isize]| -> Vec<isize> {
        strides.iter().enumerate().filter(|&(axis, _)| axis != class_axis).map(|(_, &s)| s).collect()
    };
    let x_strides = without_class(logits.strides());
    let (g_strides, g_class) = grad.as_ref().map_or_else(
        || (x_strides.clone(), logits.strides()[class_axis]),
        |g| (without_class(g.strides()), g.strides()[class_axis]),
    );
    let soft = Soft::new(target, classes, class_weight, settings.label_smoothing);
    let t_strides = match target {
        Target::Probabilities(p) => without_class(p.strides()),
        _ => vec![0; shape.len()],
    };
    let problem = Problem {
        classes,
        positions: Positions::new(shape, [&x_strides, &g_strides, &t_strides]),
        logits: Shared(logits.as_ptr().cast_mut()),
        logits_class: if classes == 1 { 1 } else { logits.strides()[class_axis] },
        grad: grad.as_mut().map(|g| Shared(g.as_mut_ptr())),
        grad_class: if classes == 1 { 1 } else { g_class },
        labels: labels.as_deref(),
        class_weight,
        hard: 1.0 - settings.label_smoothing,
        soft,
        norm: settings.reduction.factor(&totals),
        losses: Shared(losses.as_mut_ptr()),
    };
    let threads = if targets * classes < PARALLEL { 1 } else { settings.threads };

    match settings.weighting {
        Weighting::Kl(kl) if !kl.normalize && !settings.per_sample => {
            problem.run(Plan::Pointwise(kl, Shared(weights.as_mut_ptr())), threads);
        }
        _ => {
            problem.run(Plan::Losses, threads);
            unit_weights(losses, labels.as_deref(), unit, settings, weights);
            if grad.is_some() {
                problem.run(Plan::Given { weights, unit }, threads);
            }
        }
    }

    match settings.reduction {
        Reduction::None => {
            for (i, (o, &l)) in objective.iter_mut().zip(&*losses).enumerate() {
                let ignored = labels.as_ref().is_some_and(|labels| labels[i] == IGNORED);
                *o = if ignored { T::Real::default() } else { weights[i / unit] * l };
            }
        }
        Reduction::Mean | Reduction::Sum | Reduction::Times(_) => {
            let sum = if unit == 1 {
                {
                    let vector = |x| Losses::new(ArrayView1::from(x).into_dyn());
                    reduce::weighted_sum(&vector(&*losses), &vector(&*weights), settings.threads)
                }
            } else {
                let sample = |l: &[T::Real]| l.iter().map(|l| l.to_f64()).sum::<f64>();
                losses.chunks(unit.max(1)).zip(&*weights).map(|(l, w)| sample(l) * w.to_f64()).sum()
            };
            let value = match settings.reduction {
                Reduction::Mean => sum / totals.denominator,
                reduction => sum * reduction.factor(&totals),
            };
            objective[0] = T::Real::from_f64(value);
        }
    }
    Ok(totals)
}

/// The shapes a call's arguments must have.
struct Dimensions<'a> {
    logits: &'a [usize],
    classes: usize,
    class_axis: usize,
    /// That of the targets.
    shape: Vec<usize>,
    targets: usize,
    /// How many targets share a weight.
    unit: usize,
    /// How many weights there are.
    units: usize,
}

impl<'a> Dimensions<'a> {
    fn of<T>(logits: &'a ArrayViewD<T>, settings: &Settings) -> Result<Self, Error> {
        if logits.ndim() == 0 {
            return Err(Error::Shape(
                "logits must have a class axis: (C,), (N, C) or (N, C, d1, ..., dk), got 0 dimensions".into(),
            ));
        }
        let class_axis = usize::from(logits.ndim() > 1);
        let mut shape = logits.shape().to_vec();
        let classes = shape.remove(class_axis);
        let targets: usize = shape.iter().product();
        let samples = if logits.ndim() > 1 { shape[0] } else { 1 };
        let (unit, units) =
            if settings.per_sample { (targets / samples.max(1), samples) } else { (1, targets) };
        Ok(Self { logits: logits.shape(), classes, class_axis, shape, targets, unit, units })
    }

    fn check<T: Element>(
        &self,
        target: &Target<T>,
        class_weight: Option<&[T::Real]>,
        settings: &Settings,
        out: &Outputs<T>,
    ) -> Result<(), Error> {
        let values = if settings.reduction == Reduction::None { self.targets } else { 1 };
        let lengths = [
            ("weight", class_weight.map_or(self.classes, <[_]>::len), self.classes),
            ("losses", out.losses.len(), self.targets),
            ("weights", out.weights.len(), self.units),
            ("objective", out.objective.len(), values),
        ];
        for (name, got, wanted) in lengths {
            if got != wanted {
                return Err(Error::Shape(format!(
                    "{name} must have {wanted} elements for logits of shape {:?}, got {got}",
                    self.logits
                )));
            }
        }
        let targets = if let Target::Probabilities(_) = target { self.logits } else { &self.shape };
        let grad = out.grad.as_ref().map_or(self.logits, |grad| grad.shape());
        for (name, got, wanted) in [("target", target.shape(), targets), ("grad", grad, self.logits)] {
            if got != wanted {
                return Err(Error::Shape(format!(
                    "{name} must have shape {wanted:?} for logits of shape {:?}, got {got:?}",
                    self.logits
                )));
            }
        }
        Ok(())
    }
}

impl<T> Target<'_, T> {
    fn shape(&self) -> &[usize] {
        match self {
            Self::Int64(t) => t.shape(),
            Self::Int32(t) => t.shape(),
            Self::Probabilities(t) => t.shape(),
        }
    }
}

/// Checks the class indices and brings them to one form; `None` for class probabilities.
fn read_labels<T: Element>(
    target: &Target<T>,
    targets: usize,
    classes: usize,
    class_weight: Option<&[T::Real]>,
    ignore_index: i64,
) -> Result<(Option<Vec<u32>>, Totals), Error> {
    let mut labels = vec![IGNORED; targets];
    let counted = match target {
        Target::Int64(t) => encode(t, classes, ignore_index, &mut labels)?,
        Target::Int32(t) => encode(t, classes, ignore_index, &mut labels)?,
        Target::Probabilities(_) => {
            return Ok((None, Totals { denominator: targets as f64, counted: targets }));
        }
    };
    let denominator = class_weight.map_or(counted as f64, |class_weight| {
        let counting = labels.iter().filter(|&&label| label != IGNORED);
        counting.map(|&label| class_weight[label as usize].to_f64()).sum()
    });
    Ok((Some(labels), Totals { denominator, counted }))
}

/// Class indices as labels, and how many count.
fn encode<L: Copy + Into<i64>>(
    target: &ArrayViewD<L>,
    classes: usize,
    ignore_index: i64,
    labels: &mut [u32],
) -> Result<usize, Error> {
    let ranged = |index: i64| (index as u64) < classes as u64;
    let valid = if let Some(indices) = target.as_slice() {
        dispatch(Encode { indices, classes, ignore_index, labels })
    } else {
        let mut valid = true;
        for (label, &index) in labels.iter_mut().zip(target) {
            let index = index.into();
            *label = if index == ignore_index { IGNORED } else { index as u32 };
            valid &= ranged(index) || index == ignore_index;
        }
        valid
    };
    if valid {
        return Ok(labels.iter().filter(|&&label| label != IGNORED).count());
    }
    let refused = |&(_, &index): &(usize, &L)| !ranged(index.into()) && index.into() != ignore_index;
    let (mut rest, &index) = target.iter().enumerate().find(refused).expect("one was seen");
    let mut position = target.shape().to_vec();
    for p in position.iter_mut().rev() {
        let size = *p;
        *p = rest % size;
        rest /= size;
    }
    Err(Error::OutOfRange { index: index.into(), position, classes })
}

/// Writes labels; whether all indices are classes or the ignored one.
struct Encode<'a, L> {
    indices: &'a [L],
    classes: usize,
    ignore_index: i64,
    labels: &'a mut [u32],
}

impl<L: Copy + Into<i64>> Kernel for Encode<'_, L> {
    type Output = bool;

    #[inline(always)]
    fn run<I: Isa>(self) -> bool {
        let mut refused = 0;
        for (label, &index) in self.labels.iter_mut().zip(self.indices) {
            let index = index.into();
            let ignored = index == self.ignore_index;
            let ranged = (index as u64) < self.classes as u64;
            *label = if ignored { IGNORED } else { index as u32 };
            refused |= u32::from(!(ranged | ignored));
        }
        refused == 0
    }
}

/// Weights of units of targets (single targets, or samples) from their mean losses; ignored targets take no part.
fn unit_weights<A: Real>(
    losses: &[A],
    labels: Option<&[u32]>,
    unit: usize,
    settings: &Settings,
    weights: &mut [A],
) {
    let counts = |i: usize| labels.is_none_or(|labels| labels[i] != IGNORED);
    let mut counted = Vec::with_capacity(weights.len());
    let mut means = Vec::with_capacity(weights.len());
    for (u, weight) in weights.iter_mut().enumerate() {
        let targets = u * unit..(u + 1) * unit;
        let count = targets.clone().filter(|&i| counts(i)).count();
        if count == 0 {
            *weight = A::default();
        } else {
            counted.push(u);
            means.push(losses[targets].iter().map(|l| l.to_f64()).sum::<f64>() / count as f64);
        }
    }
    let means = ArrayView1::from(&means).into_dyn();
    let mut of_counted = vec![A::default(); counted.len()];
    weights::sample_weights(&Losses::new(means), settings.weighting, &mut of_counted, settings.threads);
    for (u, w) in counted.into_iter().zip(of_counted) {
        weights[u] = w;
    }
}

/// The part of the target's mass that is spread over the classes.
enum Soft<T: Element> {
    /// None: the mass lies on the label.
    Nothing,
    /// `label_smoothing / C * c_k`.
    Smoothing { mass: Vec<T::Real> },
    /// `c_k ((1 - label_smoothing) p_k + label_smoothing / C)`.
    Probabilities { p: Shared<T>, class_stride: isize, factor: Vec<T::Real>, mass: Vec<T::Real> },
}

impl<T: Element> Soft<T> {
    /// Keeps the address of class probabilities, which must stay borrowed as long as this is used.
    fn new(
        target: &Target<T>,
        classes: usize,
        class_weight: Option<&[T::Real]>,
        label_smoothing: f64,
    ) -> Self {
        let weighted = |x: f64| -> Vec<T::Real> {
            (0..classes).map(|k| T::Real::from_f64(class_weight.map_or(x, |c| c[k].to_f64() * x))).collect()
        };
        let mass = weighted(label_smoothing / classes as f64);
        match target {
            Target::Probabilities(p) => Self::Probabilities {
                p: Shared(p.as_ptr().cast_mut()),
                class_stride: p.strides()[usize::from(p.ndim() > 1)],
                factor: weighted(1.0 - label_smoothing),
                mass,
            },
            _ if label_smoothing == 0.0 => Self::Nothing,
            _ => Self::Smoothing { mass },
        }
    }
}

impl<T: Element> Soft<T> {
    fn is_some(&self) -> bool {
        !matches!(self, Self::Nothing)
    }
}

/// Where the weights come from, and so what a pass writes.
#[derive(Clone, Copy)]
enum Plan<'a, A> {
    /// Losses only.
    Losses,
    /// Losses, weights, and the gradient if it is wanted.
    Pointwise(Kl, Shared<A>),
    /// The gradient, from weights of units of targets.
    Given { weights: &'a [A], unit: usize },
}

struct Problem<'a, T: Element> {
    classes: usize,
    positions: Positions<3>,
    logits: Shared<T>,
    logits_class: isize,
    grad: Option<Shared<T>>,
    grad_class: isize,
    labels: Option<&'a [u32]>,
    class_weight: Option<&'a [T::Real]>,
    hard: f64,
    soft: Soft<T>,
    norm: f64,
    losses: Shared<T::Real>,
}

/// Targets that are worked on together: their number is large enough for the lanes of every loop over them, and their
/// numbers stay in the first-level cache.
const GROUP: usize = 256;

/// What is known of a group of targets, one entry each; `m` is the largest logit, `t` the mass spread over the classes.
struct Group<A> {
    /// `m`.
    max: [A; GROUP],
    /// `x_y - m` at the label `y`.
    at_label: [A; GROUP],
    /// `sum_k exp(x_k - m)`.
    sum: [A; GROUP],
    /// `sum_k t_k (x_k - m)`.
    dot: [A; GROUP],
    /// `sum_k t_k`.
    spread: [A; GROUP],
    /// The mass on the label.
    hard: [A; GROUP],
    /// What the gradient of the target's loss is multiplied by; 0 where the target is ignored.
    factor: [A; GROUP],
    /// `factor` times all mass over `sum`.
    scale: [A; GROUP],
}

impl<A: Real> Group<A> {
    fn new() -> Self {
        let zero = [A::default(); GROUP];
        Self {
            max: zero,
            at_label: zero,
            sum: zero,
            dot: zero,
            spread: zero,
            hard: zero,
            factor: zero,
            scale: zero,
        }
    }
}

impl<T: Element> Problem<'_, T> {
    fn run(&self, plan: Plan<T::Real>, threads: usize) {
        let targets = self.positions.len();
        let rows = self.logits_class == 1
            && self.classes >= ROW_CLASSES
            && (self.grad.is_none() || self.grad_class == 1)
            && !matches!(self.soft, Soft::Probabilities { class_stride, .. } if class_stride != 1);
        let size = (BLOCK / self.classes.max(1)).max(1);
        let size = if rows { size } else { size.next_multiple_of(LANES) };
        for_each_block(targets.div_ceil(size), threads, |i| {
            let (start, end) = (i * size, targets.min((i + 1) * size));
            if rows {
                dispatch(Rows { problem: self, plan, start, end });
            } else {
                dispatch(Tiles { problem: self, plan, start, end });
            }
        });
    }

    /// The label of target `i`; `None` where it is ignored, and where the target is a distribution.
    #[inline(always)]
    fn label(&self, i: usize) -> Option<usize> {
        self.labels.and_then(|labels| (labels[i] != IGNORED).then(|| labels[i] as usize))
    }

    /// Sets the mass on each label, and what its logit is, from `logit(i, y)`.
    #[inline(always)]
    fn look_at_labels(
        &self,
        start: usize,
        count: usize,
        group: &mut Group<T::Real>,
        logit: impl Fn(usize, usize) -> T::Real,
    ) {
        for i in 0..count {
            (group.hard[i], group.at_label[i]) = match self.label(start + i) {
                Some(y) => {
                    let c = self.class_weight.map_or(1.0, |c| c[y].to_f64());
                    (T::Real::from_f64(self.hard * c), logit(i, y) - group.max[i])
                }
                None => (T::Real::default(), T::Real::default()),
            };
        }
    }

    /// From the sums over the classes to losses and weights, written as the plan says, and on to `factor` and `scale`.
    #[inline(always)]
    fn weigh<I: Isa>(&self, plan: Plan<T::Real>, start: usize, count: usize, group: &mut Group<T::Real>) {
        let mut buffer = [0.0; GROUP];
        let values = &mut buffer[..count];
        if self.soft.is_some() {
            let sums = group.sum[..count].iter().zip(&group.dot[..count]).zip(&group.spread[..count]);
            let labels = group.hard[..count].iter().zip(&group.at_label[..count]);
            for ((value, ((&sum, &dot), &spread)), (&hard, &at_label)) in
                values.iter_mut().zip(sums).zip(labels)
            {
                let log_sum = ln::<I>(sum.to_f64());
                let hard = hard.to_f64() * (log_sum - at_label.to_f64());
                let spread = spread.to_f64() * log_sum - dot.to_f64();
                *value = if self.labels.is_some() { hard + spread } else { spread };
            }
        } else {
            let labels = group.hard[..count].iter().zip(&group.at_label[..count]);
            for ((value, &sum), (&hard, &at_label)) in values.iter_mut().zip(&group.sum[..count]).zip(labels)
            {
                *value = hard.to_f64() * (ln::<I>(sum.to_f64()) - at_label.to_f64());
            }
        }
        for value in &mut *values {
            *value = T::Real::from_f64(*value).to_f64();
        }
        let ignored = |i: usize| self.labels.is_some_and(|labels| labels[start + i] == IGNORED);
        if self.labels.is_some() {
            for (i, value) in values.iter_mut().enumerate() {
                *value = if ignored(i) { 0.0 } else { *value };
            }
        }
        // SAFETY: a block writes the losses and the weights of its own targets only, and both slices outlive the call.
        unsafe {
            if !matches!(plan, Plan::Given { .. }) {
                for (loss, &value) in self.losses.part(start, start + count).iter_mut().zip(&*values) {
                    *loss = T::Real::from_f64(value);
                }
            }
            match plan {
                Plan::Losses => return,
                Plan::Pointwise(kl, out) => {
                    kl.pointwise::<I>(values);
                    let weights = out.part(start, start + count);
                    for (weight, &value) in weights.iter_mut().zip(&*values) {
                        *weight = T::Real::from_f64(value);
                    }
                    for (i, (weight, value)) in weights.iter_mut().zip(&mut *values).enumerate() {
                        *weight = if ignored(i) { T::Real::default() } else { *weight };
                        *value = weight.to_f64();
                    }
                }
                Plan::Given { weights, unit } => {
                    for (i, value) in values.iter_mut().enumerate() {
                        *value = weights[(start + i) / unit].to_f64();
                    }
                }
            }
        }
        for (i, value) in values.iter().enumerate() {
            // The norm may be infinite, where no target counts.
            group.factor[i] = T::Real::from_f64(if ignored(i) { 0.0 } else { value * self.norm });
        }
        for i in 0..count {
            group.scale[i] = group.factor[i] * (group.hard[i] + group.spread[i]) / group.sum[i];
        }
    }

    fn wants_grad(&self, plan: Plan<T::Real>) -> Option<Shared<T>> {
        if matches!(plan, Plan::Losses) { None } else { self.grad }
    }
}

/// Lanes across targets: a tile of at most [`GROUP`] targets and all classes, widened into scratch memory.
struct Tiles<'a, 'b, T: Element> {
    problem: &'a Problem<'b, T>,
    plan: Plan<'a, T::Real>,
    start: usize,
    end: usize,
}

impl<T: Element> Kernel for Tiles<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let p = self.problem;
        let [x_step, g_step, t_step] = p.positions.inner();
        let width =
            (BLOCK / p.classes.max(1)).next_multiple_of(LANES).clamp(LANES, GROUP).min(self.end - self.start);
        let mut tile = vec![T::Real::default(); p.classes * width];
        let mut masses = match p.soft {
            Soft::Probabilities { .. } => vec![T::Real::default(); p.classes * width],
            _ => Vec::new(),
        };
        let mut group = Group::new();
        for Run { position, length, offsets: [x, g, t] } in p.positions.runs(self.start, self.end) {
            let mut done = 0;
            while done < length {
                let count = width.min(length - done);
                let at = done as isize;
                // SAFETY: the offsets come from `Positions`, made of the shape and strides of the very views that the
                // addresses are of; a tile writes the gradient of its own targets only.
                unsafe {
                    load_tile(
                        p.logits.0.offset(x + at * x_step),
                        x_step,
                        p.logits_class,
                        width,
                        count,
                        &mut tile,
                    );
                    if let Soft::Probabilities { p: probabilities, class_stride, factor, mass } = &p.soft {
                        let first = probabilities.0.offset(t + at * t_step);
                        load_tile(first, t_step, *class_stride, width, count, &mut masses);
                        for (row, (&f, &m)) in masses.chunks_exact_mut(width).zip(factor.iter().zip(mass)) {
                            for x in row {
                                *x = *x * f + m;
                            }
                        }
                    }
                    tile_step::<T, I>(
                        p,
                        self.plan,
                        position + done,
                        width,
                        count,
                        &mut group,
                        &mut tile,
                        &masses,
                    );
                    if let Some(grad) = p.wants_grad(self.plan) {
                        store_tile(grad.0.offset(g + at * g_step), g_step, p.grad_class, width, count, &tile);
                    }
                }
                done += count;
            }
        }
    }
}

/// Reads `count` targets into a tile, each class a row of `width` lanes.
///
/// # Safety
/// `first` and the strides describe `count` targets of as many classes as `tile` has rows.
#[inline(always)]
unsafe fn load_tile<T: Element>(
    first: *const T,
    step: isize,
    class: isize,
    width: usize,
    count: usize,
    tile: &mut [T::Real],
) {
    for (k, row) in tile.chunks_exact_mut(width).enumerate() {
        // SAFETY: what the caller promises.
        unsafe {
            let source = first.offset(k as isize * class);
            if step == 1 {
                for (x, y) in row.iter_mut().zip(std::slice::from_raw_parts(source, count)) {
                    *x = y.widen();
                }
            } else {
                for (lane, x) in row[..count].iter_mut().enumerate() {
                    *x = (*source.offset(lane as isize * step)).widen();
                }
            }
        }
    }
}

/// Writes `count` targets of a tile.
///
/// # Safety
/// As [`load_tile`], and the memory may be written.
#[inline(always)]
unsafe fn store_tile<T: Element>(
    first: *mut T,
    step: isize,
    class: isize,
    width: usize,
    count: usize,
    tile: &[T::Real],
) {
    for (k, row) in tile.chunks_exact(width).enumerate() {
        // SAFETY: what the caller promises.
        unsafe {
            let sink = first.offset(k as isize * class);
            if step == 1 {
                for (x, &y) in std::slice::from_raw_parts_mut(sink, count).iter_mut().zip(row) {
                    *x = T::narrow(y);
                }
            } else {
                for (lane, &y) in row[..count].iter().enumerate() {
                    *sink.offset(lane as isize * step) = T::narrow(y);
                }
            }
        }
    }
}

/// Turns a tile of logits into the gradient, writing losses and weights on the way as the plan says.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "one step of one loop")]
fn tile_step<T: Element, I: Isa>(
    p: &Problem<T>,
    plan: Plan<T::Real>,
    start: usize,
    width: usize,
    count: usize,
    group: &mut Group<T::Real>,
    tile: &mut [T::Real],
    masses: &[T::Real],
) {
    let zero = T::Real::default();
    group.max[..count].fill(T::Real::NEG_INFINITY);
    for row in tile.chunks_exact(width) {
        for (max, &x) in group.max[..count].iter_mut().zip(row) {
            *max = if x > *max { x } else { *max };
        }
    }
    p.look_at_labels(start, count, group, |i, y| tile[y * width + i]);

    group.sum[..count].fill(zero);
    if p.soft.is_some() {
        group.dot[..count].fill(zero);
        group.spread[..count].fill(zero);
    }
    for (k, row) in tile.chunks_exact_mut(width).enumerate() {
        match &p.soft {
            Soft::Nothing => {}
            Soft::Smoothing { mass } => {
                let sums = group.dot[..count].iter_mut().zip(&mut group.spread[..count]);
                for ((&x, &max), (dot, spread)) in row.iter().zip(&group.max[..count]).zip(sums) {
                    *dot += mass[k] * (x - max);
                    *spread += mass[k];
                }
            }
            Soft::Probabilities { .. } => {
                let sums = group.dot[..count].iter_mut().zip(&mut group.spread[..count]);
                let masses = &masses[k * width..][..count];
                for (((&x, &max), &mass), (dot, spread)) in
                    row.iter().zip(&group.max[..count]).zip(masses).zip(sums)
                {
                    *dot += mass * (x - max);
                    *spread += mass;
                }
            }
        }
        for ((x, &max), sum) in row.iter_mut().zip(&group.max[..count]).zip(&mut group.sum[..count]) {
            *x = (*x - max).exp_nonpositive::<I>();
            *sum += *x;
        }
    }

    p.weigh::<I>(plan, start, count, group);
    if p.wants_grad(plan).is_none() {
        return;
    }
    for (k, row) in tile.chunks_exact_mut(width).enumerate() {
        for (x, &scale) in row.iter_mut().zip(&group.scale[..count]) {
            *x = *x * scale;
        }
        match &p.soft {
            Soft::Nothing => {}
            Soft::Smoothing { mass } => {
                for (x, &factor) in row.iter_mut().zip(&group.factor[..count]) {
                    *x = *x - factor * mass[k];
                }
            }
            Soft::Probabilities { .. } => {
                let masses = &masses[k * width..][..count];
                for ((x, &factor), &mass) in row.iter_mut().zip(&group.factor[..count]).zip(masses) {
                    *x = *x - factor * mass;
                }
            }
        }
    }
    for i in 0..count {
        if let Some(y) = p.label(start + i) {
            let x = &mut tile[y * width + i];
            *x = *x - group.factor[i] * group.hard[i];
        }
    }
}

/// Lanes along the classes: contiguous rows, of which a group stays in the second-level cache from the first pass over
/// it to the last. The exponentials are kept in the gradient's own memory or, where that is too narrow for them, in
/// scratch memory.
struct Rows<'a, 'b, T: Element> {
    problem: &'a Problem<'b, T>,
    plan: Plan<'a, T::Real>,
    start: usize,
    end: usize,
}

/// The spread mass of a row.
trait Mass<A> {
    /// Whether there is any.
    const SOME: bool;

    /// That of the classes from `k` on.
    ///
    /// # Safety
    /// There are [`LANES`] of them.
    unsafe fn tile(&self, k: usize) -> [A; LANES];

    /// That of class `k`.
    fn at(&self, k: usize) -> A;
}

struct NoMass;
impl<A: Real> Mass<A> for NoMass {
    const SOME: bool = false;
    #[inline(always)]
    unsafe fn tile(&self, _: usize) -> [A; LANES] {
        [A::default(); LANES]
    }
    #[inline(always)]
    fn at(&self, _: usize) -> A {
        A::default()
    }
}

struct SmoothingMass<'a, A>(&'a [A]);
impl<A: Real> Mass<A> for SmoothingMass<'_, A> {
    const SOME: bool = true;
    #[inline(always)]
    unsafe fn tile(&self, k: usize) -> [A; LANES] {
        // SAFETY: what the caller promises.
        unsafe { read_tile(self.0.as_ptr().add(k)) }
    }
    #[inline(always)]
    fn at(&self, k: usize) -> A {
        self.0[k]
    }
}

struct ProbabilityMass<'a, T: Element>(&'a [T], &'a [T::Real], &'a [T::Real]);
impl<T: Element> Mass<T::Real> for ProbabilityMass<'_, T> {
    const SOME: bool = true;
    #[inline(always)]
    unsafe fn tile(&self, k: usize) -> [T::Real; LANES] {
        // SAFETY: what the caller promises.
        let (p, factor, mass) = unsafe {
            let Self(p, factor, mass) = self;
            (read_tile(p.as_ptr().add(k)), read_tile(factor.as_ptr().add(k)), read_tile(mass.as_ptr().add(k)))
        };
        let mut tile = mass;
        for lane in 0..LANES {
            tile[lane] = p[lane].widen() * factor[lane] + mass[lane];
        }
        tile
    }
    #[inline(always)]
    fn at(&self, k: usize) -> T::Real {
        self.0[k].widen() * self.1[k] + self.2[k]
    }
}

/// # Safety
/// [`LANES`] numbers may be read there.
#[inline(always)]
unsafe fn read_tile<T: Copy>(address: *const T) -> [T; LANES] {
    // SAFETY: what the caller promises.
    unsafe { address.cast::<[T; LANES]>().read() }
}

/// # Safety
/// [`LANES`] numbers may be written there.
#[inline(always)]
unsafe fn write_tile<T: Copy>(address: *mut T, tile: [T; LANES]) {
    // SAFETY: what the caller promises.
    unsafe { address.cast::<[T; LANES]>().write(tile) }
}

impl<T: Element> Kernel for Rows<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let p = self.problem;
        let classes = p.classes;
        let [x_step, g_step, t_step] = p.positions.inner();
        let mut group = Group::new();
        let grad = p.wants_grad(self.plan);
        let own = grad.and_then(|grad| T::as_real(grad.0));
        // Without a gradient to come, one row of exponentials after the other may take the same place.
        let kept = if grad.is_none() && T::as_real(p.logits.0).is_some() { 1 } else { GROUP };
        let kept = if own.is_some() { 0 } else { kept.min(self.end - self.start) };
        let mut scratch = Vec::<T::Real>::with_capacity(classes * kept);
        for Run { position, length, offsets: [x, g, t] } in p.positions.runs(self.start, self.end) {
            let mut done = 0;
            while done < length {
                let count = GROUP.min(length - done);
                let at = done as isize;
                // SAFETY: the offsets come from `Positions`, made of the shape and strides of the very views that the
                // addresses are of, with a class stride of 1; a block writes the gradient of its own targets only.
                unsafe {
                    let rows = RowsOf { first: p.logits.0.offset(x + at * x_step), step: x_step, classes };
                    let grads = grad.map(|grad| RowsOf {
                        first: grad.0.offset(g + at * g_step),
                        step: g_step,
                        classes,
                    });
                    let exps = match own {
                        Some(own) => RowsOf { first: own.offset(g + at * g_step), step: g_step, classes },
                        None => RowsOf {
                            first: scratch.as_mut_ptr(),
                            step: if kept == 1 { 0 } else { classes as isize },
                            classes,
                        },
                    };
                    let steps =
                        RowSteps { p, plan: self.plan, start: position + done, count, rows, grads, exps };
                    match &p.soft {
                        Soft::Nothing => steps.run::<I, _>(&mut group, |_| NoMass),
                        Soft::Smoothing { mass } => steps.run::<I, _>(&mut group, |_| SmoothingMass(mass)),
                        Soft::Probabilities { p: q, factor, mass, .. } => {
                            let q = RowsOf { first: q.0.offset(t + at * t_step), step: t_step, classes };
                            steps.run::<I, _>(&mut group, |i| ProbabilityMass::<T>(q.row(i), factor, mass));
                        }
                    }
                }
                done += count;
            }
        }
    }
}

/// Contiguous rows at equal steps.
#[derive(Clone, Copy)]
struct RowsOf<T> {
    first: *mut T,
    step: isize,
    classes: usize,
}

impl<T: Copy> RowsOf<T> {
    /// # Safety
    /// There is a row `i`.
    #[inline(always)]
    unsafe fn address(self, i: usize) -> *mut T {
        // SAFETY: what the caller promises.
        unsafe { self.first.offset(i as isize * self.step) }
    }

    /// # Safety
    /// There is a row `i`, and nobody writes to it meanwhile.
    #[inline(always)]
    unsafe fn row<'a>(self, i: usize) -> &'a [T] {
        // SAFETY: what the caller promises.
        unsafe { std::slice::from_raw_parts(self.address(i), self.classes) }
    }
}

/// The steps over a group of rows.
struct RowSteps<'a, 'b, T: Element> {
    p: &'a Problem<'b, T>,
    plan: Plan<'a, T::Real>,
    start: usize,
    count: usize,
    rows: RowsOf<T>,
    /// Where the gradient goes, if it is wanted.
    grads: Option<RowsOf<T>>,
    /// Where the exponentials go, which become the gradient: for wide types into `grads`.
    exps: RowsOf<T::Real>,
}

impl<T: Element> RowSteps<'_, '_, T> {
    /// # Safety
    /// `rows`, `grads` and `exps` have `count` rows; the last two are this call's alone.
    #[inline(always)]
    unsafe fn run<I: Isa, M: Mass<T::Real>>(self, group: &mut Group<T::Real>, mass: impl Fn(usize) -> M) {
        let Self { p, plan, start, count, rows, grads, exps } = self;
        // SAFETY of every block below: what the caller promises.
        let own = T::as_real(rows.first);
        let source = own.map_or(exps, |first| RowsOf { first, step: rows.step, classes: rows.classes });
        // The maxima first, for each is long in coming, and the next row's need not wait for it.
        for i in 0..count {
            // SAFETY: as above.
            unsafe {
                if own.is_none() {
                    row_widen(rows.address(i), exps.address(i), p.classes);
                }
                group.max[i] = row_max(source.row(i));
            }
        }
        for i in 0..count {
            // SAFETY: as above.
            let [sum, dot, spread] = unsafe {
                row_exps::<_, I, _>(source.address(i), exps.address(i), p.classes, group.max[i], &mass(i))
            };
            (group.sum[i], group.dot[i], group.spread[i]) = (sum, dot, spread);
        }
        // SAFETY: as above.
        p.look_at_labels(start, count, group, |i, y| unsafe { rows.row(i) }[y].widen());
        p.weigh::<I>(plan, start, count, group);
        let Some(grads) = grads else {
            return;
        };
        for i in 0..count {
            let (scale, factor) = (group.scale[i], group.factor[i]);
            let mass = mass(i);
            // SAFETY: as above.
            unsafe {
                let (exps, grad) = (exps.address(i).cast_const(), grads.address(i));
                let at_label = p.label(start + i).map(|y| (y, exps.add(y).read()));
                row_gradient(exps, grad, p.classes, scale, factor, &mass);
                if let Some((y, e)) = at_label {
                    let g = e * scale - factor * mass.at(y) - factor * group.hard[i];
                    grad.add(y).write(T::narrow(g));
                }
            }
        }
    }
}

/// Keeps a loop to one tile a step, along whose lanes it is vectorised; across tiles it would gather and scatter.
#[inline(always)]
fn one_tile_a_step() {
    compiler_fence(Ordering::SeqCst);
}

/// Independent accumulators of a row, each of [`LANES`] lanes.
const CHAINS: usize = 4;

/// Widens a row.
///
/// # Safety
/// The addresses are of rows of at least [`LANES`] numbers that do not overlap, the latter this call's alone.
#[inline(always)]
unsafe fn row_widen<T: Element>(row: *const T, wide: *mut T::Real, classes: usize) {
    let mut k = 0;
    while k < classes {
        // What full tiles leave over is the end of the last lanes.
        let at = k.min(classes - LANES);
        // SAFETY: what the caller promises.
        let x = unsafe { read_tile(row.add(at)) };
        let mut y = [T::Real::default(); LANES];
        for lane in 0..LANES {
            y[lane] = x[lane].widen();
        }
        // SAFETY: as above.
        unsafe { write_tile(wide.add(at), y) };
        k += LANES;
        one_tile_a_step();
    }
}

/// The largest logit; NaN logits are passed over, and show in the sum.
#[inline(always)]
fn row_max<A: Real>(row: &[A]) -> A {
    let mut lanes = [[A::NEG_INFINITY; LANES]; CHAINS];
    let (tiles, _) = row.as_chunks::<LANES>();
    let (groups, tiles) = tiles.as_chunks::<CHAINS>();
    for group in groups {
        for chain in 0..CHAINS {
            for lane in 0..LANES {
                let x = group[chain][lane];
                lanes[chain][lane] = if x > lanes[chain][lane] { x } else { lanes[chain][lane] };
            }
        }
    }
    let last: &[A; LANES] = row.last_chunk().expect("rows are longer than their lanes");
    for tile in tiles.iter().chain([last]) {
        for lane in 0..LANES {
            lanes[0][lane] = if tile[lane] > lanes[0][lane] { tile[lane] } else { lanes[0][lane] };
        }
    }
    let [mut a, b, mut c, d] = lanes;
    for lane in 0..LANES {
        a[lane] = if b[lane] > a[lane] { b[lane] } else { a[lane] };
        c[lane] = if d[lane] > c[lane] { d[lane] } else { c[lane] };
        a[lane] = if c[lane] > a[lane] { c[lane] } else { a[lane] };
    }
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            a[lane] = if a[lane + half] > a[lane] { a[lane + half] } else { a[lane] };
        }
        half /= 2;
    }
    a[0]
}

/// The sum of the lanes of all chains.
#[inline(always)]
fn join<A: Real>([mut a, b, c, d]: [[A; LANES]; CHAINS]) -> A {
    for lane in 0..LANES {
        a[lane] = (a[lane] + b[lane]) + (c[lane] + d[lane]);
    }
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            a[lane] += a[lane + half];
        }
        half /= 2;
    }
    a[0]
}

/// Sums over the classes, lane by lane: of `exp(x_k - max)`, of `t_k (x_k - max)` and of `t_k`, `t` the spread mass.
#[derive(Clone, Copy)]
struct Sums<A> {
    exps: [A; LANES],
    dot: [A; LANES],
    mass: [A; LANES],
}

impl<A: Real> Sums<A> {
    /// Adds the lanes from `first` on; the exponentials of all lanes. One short loop after the other, for those the
    /// compiler unrolls.
    #[inline(always)]
    fn add<I: Isa>(
        &mut self,
        mut x: [A; LANES],
        max: A,
        mass: Option<[A; LANES]>,
        first: usize,
    ) -> [A; LANES] {
        let kept = |lane: usize, x: A| if lane >= first { x } else { A::default() };
        for z in &mut x {
            *z = *z - max;
        }
        if let Some(mass) = mass {
            for (lane, (dot, (&t, &z))) in self.dot.iter_mut().zip(mass.iter().zip(&x)).enumerate() {
                *dot += kept(lane, t * z);
            }
            for (lane, (sum, &t)) in self.mass.iter_mut().zip(&mass).enumerate() {
                *sum += kept(lane, t);
            }
        }
        for z in &mut x {
            *z = z.exp_nonpositive::<I>();
        }
        for (lane, (sum, &e)) in self.exps.iter_mut().zip(&x).enumerate() {
            *sum += kept(lane, e);
        }
        x
    }
}

/// Writes `exp(x_k - max)`; `sum_k exp(x_k - max)`, `sum_k t_k (x_k - max)` and `sum_k t_k` of the spread mass `t`.
///
/// # Safety
/// `source` and `exps`, which may be the same, are rows of at least [`LANES`] numbers, the latter this call's alone, and
/// `mass` is that of a row as long.
#[inline(always)]
unsafe fn row_exps<A: Real, I: Isa, M: Mass<A>>(
    source: *const A,
    exps: *mut A,
    classes: usize,
    max: A,
    mass: &M,
) -> [A; 3] {
    let zero = [A::default(); LANES];
    let mut sums = [Sums { exps: zero, dot: zero, mass: zero }; CHAINS];
    // What full tiles leave of the row is the end of its last lanes, which are read before anything is written.
    let rest = classes % LANES;
    let last = classes - LANES;
    // SAFETY: what the caller promises.
    let mut end = unsafe { read_tile(source.add(last)) };
    if rest != 0 {
        // SAFETY: as above.
        let t = if M::SOME { Some(unsafe { mass.tile(last) }) } else { None };
        end = sums[1].add::<I>(end, max, t, LANES - rest);
    }
    let mut k = 0;
    while k + CHAINS * LANES <= classes {
        for (chain, sums) in sums.iter_mut().enumerate() {
            let k = k + chain * LANES;
            // SAFETY: as above.
            unsafe {
                let t = if M::SOME { Some(mass.tile(k)) } else { None };
                write_tile(exps.add(k), sums.add::<I>(read_tile(source.add(k)), max, t, 0));
            }
        }
        k += CHAINS * LANES;
        one_tile_a_step();
    }
    while k + LANES <= classes {
        // SAFETY: as above.
        unsafe {
            let t = if M::SOME { Some(mass.tile(k)) } else { None };
            write_tile(exps.add(k), sums[0].add::<I>(read_tile(source.add(k)), max, t, 0));
        }
        k += LANES;
        one_tile_a_step();
    }
    if rest != 0 {
        // SAFETY: as above.
        unsafe { write_tile(exps.add(last), end) };
    }
    let [a, b, c, d] = sums;
    let exps = join([a.exps, b.exps, c.exps, d.exps]);
    if M::SOME {
        [exps, join([a.dot, b.dot, c.dot, d.dot]), join([a.mass, b.mass, c.mass, d.mass])]
    } else {
        [exps, A::default(), A::default()]
    }
}

/// Writes `exps_k scale - factor t_k`, `t` the spread mass.
///
/// # Safety
/// `exps` and `grad` are rows of at least [`LANES`] numbers, the latter this call's alone; they overlap only where they
/// are the same. `mass` is that of a row as long.
#[inline(always)]
unsafe fn row_gradient<T: Element, M: Mass<T::Real>>(
    exps: *const T::Real,
    grad: *mut T,
    classes: usize,
    scale: T::Real,
    factor: T::Real,
    mass: &M,
) {
    let last = classes - LANES;
    // SAFETY: what the caller promises.
    let end = unsafe { read_tile(exps.add(last)) };
    let mut k = 0;
    while k <= last {
        // SAFETY: as above.
        unsafe {
            let t = if M::SOME { Some(mass.tile(k)) } else { None };
            write_tile(grad.add(k), tile_gradient(read_tile(exps.add(k)), scale, factor, t));
        }
        k += LANES;
        one_tile_a_step();
    }
    // SAFETY: as above.
    unsafe {
        let t = if M::SOME { Some(mass.tile(last)) } else { None };
        write_tile(grad.add(last), tile_gradient(end, scale, factor, t));
    }
}

#[inline(always)]
fn tile_gradient<T: Element>(
    mut x: [T::Real; LANES],
    scale: T::Real,
    factor: T::Real,
    mass: Option<[T::Real; LANES]>,
) -> [T; LANES] {
    for x in &mut x {
        *x = *x * scale;
    }
    if let Some(mass) = mass {
        for (x, &t) in x.iter_mut().zip(&mass) {
            *x = *x - factor * t;
        }
    }
    let mut grad = [T::narrow(scale); LANES];
    for (grad, &x) in grad.iter_mut().zip(&x) {
        *grad = T::narrow(x);
    }
    grad
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};
    use ndarray::{Array, ArrayD, Axis, IxDyn, ShapeBuilder};
    use proptest::prelude::*;

    const KL: Weighting = Weighting::Kl(Kl { tau: 1.0, scale: 0.5, normalize: false });
    const SETTINGS: Settings = Settings {
        weighting: KL,
        ignore_index: -100,
        label_smoothing: 0.0,
        per_sample: false,
        reduction: Reduction::Mean,
        threads: 1,
    };

    struct Result<T: Element> {
        losses: Vec<T::Real>,
        weights: Vec<T::Real>,
        objective: Vec<T::Real>,
        grad: ArrayD<T>,
        totals: Totals,
    }

    fn run<T: Element>(
        logits: &ArrayViewD<T>,
        target: &Target<T>,
        class_weight: Option<&[T::Real]>,
        settings: &Settings,
    ) -> std::result::Result<Result<T>, Error> {
        let targets = logits.len() / logits.len_of(Axis(usize::from(logits.ndim() > 1)));
        let units = if settings.per_sample { logits.shape()[0] } else { targets };
        let zero = T::Real::default();
        let values = if settings.reduction == Reduction::None { targets } else { 1 };
        let (mut losses, mut weights, mut objective) =
            (vec![zero; targets], vec![zero; units], vec![zero; values]);
        let mut grad = logits.to_owned();
        let out = Outputs {
            losses: &mut losses,
            weights: &mut weights,
            objective: &mut objective,
            grad: Some(grad.view_mut()),
        };
        let totals = cross_entropy(logits, target, class_weight, settings, out)?;
        Ok(Result { losses, weights, objective, grad, totals })
    }

    /// Rows of logits and of target mass, to losses and the gradient of `sum_i factor_i l_i`.
    fn by_hand(logits: &[Vec<f64>], mass: &[Vec<f64>], factor: impl Fn(f64) -> f64) -> (Vec<f64>, Vec<f64>) {
        let (mut losses, mut grad) = (Vec::new(), Vec::new());
        for (x, t) in logits.iter().zip(mass) {
            let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = x.iter().map(|x| (x - max).exp()).sum();
            let loss: f64 = x.iter().zip(t).map(|(x, t)| t * (max + sum.ln() - x)).sum();
            let total: f64 = t.iter().sum();
            grad.extend(x.iter().zip(t).map(|(x, t)| factor(loss) * (total * (x - max).exp() / sum - t)));
            losses.push(loss);
        }
        (losses, grad)
    }

    fn noise(n: usize, seed: u64) -> impl Iterator<Item = f64> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        (0..n).map(move |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1u64 << 53) as f64
        })
    }

    fn check<T: Element>(
        n: usize,
        classes: usize,
        smoothing: f64,
        weighted: bool,
        soft: bool,
        seed: u64,
        eps: f64,
    ) {
        let narrow = |x: f64| T::narrow(T::Real::from_f64(x));
        let logits: Vec<T> = noise(n * classes, seed).map(|x| narrow(16.0 * x - 8.0)).collect();
        let labels: Vec<i64> = noise(n, seed + 1).map(|x| (x * classes as f64) as i64).collect();
        let c: Vec<T::Real> = noise(classes, seed + 2).map(|x| T::Real::from_f64(0.1 + x)).collect();
        let p: Vec<T> = noise(n * classes, seed + 3).map(|x| narrow(x / classes as f64)).collect();
        let shape = IxDyn(&[n, classes]);
        let logits = ArrayD::from_shape_vec(shape.clone(), logits).unwrap();
        let labels_view = ArrayD::from_shape_vec(IxDyn(&[n]), labels.clone()).unwrap();
        let p = ArrayD::from_shape_vec(shape, p).unwrap();
        let target = if soft { Target::Probabilities(p.view()) } else { Target::Int64(labels_view.view()) };
        let settings = Settings { label_smoothing: smoothing, reduction: Reduction::Sum, ..SETTINGS };
        let result = run(&logits.view(), &target, weighted.then_some(&c[..]), &settings).unwrap();

        let class_weight = |k: usize| if weighted { c[k].to_f64() } else { 1.0 };
        let rows = |a: &ArrayD<T>| -> Vec<Vec<f64>> {
            a.rows().into_iter().map(|r| r.iter().map(|x| x.widen().to_f64()).collect()).collect()
        };
        let mass: Vec<Vec<f64>> = rows(&p)
            .iter()
            .zip(&labels)
            .map(|(p, &y)| {
                let hard = |k: usize| if soft { p[k] } else { f64::from(u8::from(k as i64 == y)) };
                let spread = smoothing / classes as f64;
                (0..classes).map(|k| class_weight(k) * ((1.0 - smoothing) * hard(k) + spread)).collect()
            })
            .collect();
        let (losses, grad) = by_hand(&rows(&logits), &mass, |l| (0.5 * l.min(1.0)).exp());
        // Sums of `classes` terms in the accumulator, each rounded once; the gradient is rounded to the logits' type.
        let sum_eps = if size_of::<T::Real>() == 8 { f64::EPSILON } else { f64::from(f32::EPSILON) };
        let tolerance = sum_eps * (16.0 + classes as f64);
        for (a, e) in result.losses.iter().zip(&losses) {
            assert!((a.to_f64() - e).abs() <= tolerance * (8.0 + e.abs()), "loss {} {e}", a.to_f64());
        }
        for (a, e) in result.grad.iter().zip(&grad) {
            let error = (a.widen().to_f64() - e).abs();
            assert!(
                error <= tolerance * 2.0 + eps * e.abs() + eps * 1e-4,
                "gradient {} {e}",
                a.widen().to_f64()
            );
        }
        let objective: f64 = losses.iter().map(|&l| l * (0.5 * l.min(1.0)).exp()).sum();
        assert!((result.objective[0].to_f64() - objective).abs() <= tolerance * 16.0 * n as f64);
        assert_eq!(result.totals.counted, n);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn losses_objective_and_gradient_follow_the_equations(
            n in 1usize..150, classes in prop::sample::select(vec![1, 2, 5, 16, 47, 48, 49, 63, 64, 65, 130]),
            smoothing in prop::sample::select(vec![0.0, 0.2, 1.0]), weighted: bool, soft: bool, seed in 0u64..1000
        ) {
            check::<f64>(n, classes, smoothing, weighted, soft, seed, 0.0);
            check::<f32>(n, classes, smoothing, weighted, soft, seed, 1e-6);
            check::<bf16>(n, classes, smoothing, weighted, soft, seed, 1.0 / 128.0);
            check::<f16>(n, classes, smoothing, weighted, soft, seed, 1.0 / 1024.0);
        }

        #[test]
        fn any_layout_gives_the_same_losses(seed in 0u64..1000, classes in prop::sample::select(vec![3, 48, 60])) {
            let shape = [4, classes, 3, 5];
            let logits = Array::from_shape_vec(IxDyn(&shape), noise(4 * classes * 15, seed).collect()).unwrap();
            let labels = Array::from_shape_fn(IxDyn(&[4, 3, 5]), |i| ((i[0] + i[1] * 7 + i[2]) % classes) as i32);
            let target = Target::Int32(labels.view());
            let plain = run(&logits.view(), &target, None, &SETTINGS).unwrap();
            let mut classes_last = ArrayD::zeros(IxDyn(&shape).f());
            classes_last.assign(&logits);
            for mut view in [classes_last.view(), logits.view()] {
                view.invert_axis(Axis(0));
                let mut flipped = labels.view();
                flipped.invert_axis(Axis(0));
                let other = run(&view, &Target::Int32(flipped), None, &SETTINGS).unwrap();
                for i in 0..60 {
                    let (a, b) = (plain.losses[i], other.losses[(3 - i / 15) * 15 + i % 15]);
                    prop_assert!((a - b).abs() < 1e-13);
                }
                prop_assert!((plain.objective[0] - other.objective[0]).abs() < 1e-13);
                prop_assert!((plain.weights[0] - other.weights[45]).abs() < 1e-13);
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        for shape in [[3000, 10], [700, 200]] {
            let logits: Vec<f32> = noise(shape[0] * shape[1], 5).map(|x| x as f32).collect();
            let logits = ArrayD::from_shape_vec(IxDyn(&shape), logits).unwrap();
            let labels = Array::from_shape_fn(IxDyn(&shape[..1]), |i| (i[0] % shape[1]) as i64);
            let [one, three] = [1, 3].map(|threads| {
                let settings = Settings { threads, ..SETTINGS };
                run(&logits.view(), &Target::Int64(labels.view()), None, &settings).unwrap()
            });
            assert_eq!(one.grad, three.grad);
            assert_eq!(one.objective[0].to_bits(), three.objective[0].to_bits());
        }
    }

    #[test]
    fn a_label_out_of_range_is_refused_before_anything_is_written() {
        let logits = ArrayD::<f32>::zeros(IxDyn(&[2, 3, 2]));
        let mut labels = ArrayD::<i64>::zeros(IxDyn(&[2, 2]));
        labels[[1, 0]] = 3;
        let mut losses = [7.0; 4];
        let out = Outputs { losses: &mut losses, weights: &mut [7.0; 4], objective: &mut [7.0], grad: None };
        let error =
            cross_entropy(&logits.view(), &Target::Int64(labels.view()), None, &SETTINGS, out).unwrap_err();
        assert_eq!(error, Error::OutOfRange { index: 3, position: vec![1, 0], classes: 3 });
        assert_eq!(losses, [7.0; 4]);
    }

    #[test]
    fn ignored_targets_weigh_nothing_and_get_no_gradient() {
        let logits = ArrayD::from_shape_vec(IxDyn(&[2, 3]), vec![1.0, 2.0, 3.0, 1.0, 2.0, 3.0]).unwrap();
        let labels = ArrayD::from_shape_vec(IxDyn(&[2]), vec![-100i64, 0]).unwrap();
        for weighting in [KL, Weighting::KlBall { radius: 0.1 }] {
            let settings = Settings { weighting, ..SETTINGS };
            let result = run::<f64>(&logits.view(), &Target::Int64(labels.view()), None, &settings).unwrap();
            assert_eq!(result.weights[0], 0.0);
            assert_eq!(result.grad.as_slice().unwrap()[..3], [0.0; 3]);
            assert!((result.objective[0] - result.weights[1] * result.losses[1]).abs() < 1e-15);
            assert_eq!(result.totals, Totals { denominator: 1.0, counted: 1 });
        }
    }
}
