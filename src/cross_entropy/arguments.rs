//! The arguments of a cross-entropy: logits and targets, settings, and the memory of its results.

use crate::numeric::Element;
use ndarray::{ArrayViewD, ArrayViewMutD};
use std::mem::MaybeUninit;

/// How losses become an objective, as in `torch.nn.CrossEntropyLoss`; `p` is the sample weight, 1 where none is given.
/// With [`Settings::z_loss`], `p_i w_i l_i + p_i z Z_i^2` takes the place of `p_i w_i l_i`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduction {
    /// `p_i w_i l_i` each.
    None,
    /// `sum_i p_i w_i l_i` over the sum of `p_i` times the target's class weight (for class probabilities: of `p_i`),
    /// both over the targets that take part.
    Mean,
    /// `sum_i p_i w_i l_i`.
    Sum,
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

impl<T> Target<'_, T> {
    pub(super) fn shape(&self) -> &[usize] {
        match self {
            Self::Int64(t) => t.shape(),
            Self::Int32(t) => t.shape(),
            Self::Probabilities(t) => t.shape(),
        }
    }

    pub(super) fn is_probabilities(&self) -> bool {
        matches!(self, Self::Probabilities(_))
    }
}

/// The settings of a cross-entropy.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// The class index of a target that takes no part.
    pub ignore_index: i64,
    /// In `[0, 1]`.
    pub label_smoothing: f64,
    /// The factor `z` of `p_i z Z_i^2` in the objective, `Z_i` the logsumexp of the logits as adjusted. Neither the
    /// weight nor the class weight multiplies it, and losses and weights do not see it. 0 for nothing.
    pub z_loss: f64,
    /// Whether all targets of a sample of the leading axis share a weight, that of their mean loss.
    pub per_sample: bool,
    /// How losses become an objective.
    pub reduction: Reduction,
    /// What [`Reduction::Mean`] divides by in the place of the denominator of this call; `None` for that.
    pub normalizer: Option<f64>,
    /// The largest number of threads to use.
    pub threads: usize,
}

impl Settings {
    /// Those of `torch.nn.CrossEntropyLoss`, on one thread.
    pub const PLAIN: Self = Self {
        ignore_index: -100,
        label_smoothing: 0.0,
        z_loss: 0.0,
        per_sample: false,
        reduction: Reduction::Mean,
        normalizer: None,
        threads: 1,
    };
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
    pub measure: Option<&'a [T::Real]>,
}

/// What some weightings look at beside the losses.
#[derive(Debug, Default)]
pub struct Memory<'a> {
    /// The group of each unit.
    pub groups: Option<&'a [i64]>,
    /// The leaves of the weighting's state, which are moved.
    pub state: &'a mut [Vec<f64>],
}

/// Losses as [`super::losses()`] fills them, and the weights that were made of them.
#[derive(Debug, Clone, Copy)]
pub struct Given<'a, A> {
    /// One loss a target, 0 for one that is ignored.
    pub losses: &'a [A],
    /// One weight a target or, with `per_sample`, a sample; a constant of the gradient.
    pub weights: &'a [A],
    /// The logsumexp of each target's logits, 0 for one that takes no part; needed where [`Settings::z_loss`] is not 0.
    pub logsumexp: Option<&'a [A]>,
}

/// One output of each target, where it is wanted.
pub type PerTarget<'a, A> = Option<&'a mut [MaybeUninit<A>]>;

/// What [`super::cross_entropy`] fills, row-major and contiguous but for the gradient.
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

/// What [`super::with_norms`] fills, as [`Outputs`].
#[derive(Debug)]
pub struct NormedOutputs<'a, T: Element> {
    /// One loss a target, 0 for one that takes no part.
    pub losses: &'a mut [MaybeUninit<T::Real>],
    /// One weight a target, 0 for one that takes no part.
    pub weights: &'a mut [MaybeUninit<T::Real>],
    /// The logsumexp of each target's logits, 0 for one that takes no part.
    pub logsumexp: PerTarget<'a, T::Real>,
    /// The gradient with respect to the logits.
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
    pub(super) fn is_wanted(&self) -> bool {
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
    /// The view of the logits was made from a pointer that may be written through, no two of its indices share an
    /// element, and as long as the call lasts nothing else reads or writes that memory: neither another thread nor
    /// another argument.
    #[must_use]
    pub unsafe fn granted() -> Self {
        Self(())
    }
}
