//! Targets: class indices are checked and brought to one form, which marks the targets that take no part.
//!
//! A target takes no part if its index is `ignore_index` or its sample weight `p` is 0. The denominator of the mean is
//! `sum_i p_i c_{y_i}` over those that do, with class weights `c` (for class probabilities: `sum_i p_i`).

use super::arguments::{Inputs, Settings, Target};
use super::shape::{Dimensions, Error};
use crate::numeric::{Element, Isa, Kernel, Real, dispatch};
use crate::parallel::{STRETCH, filled, stop_if_interrupted};
use crate::reduce::total;
use ndarray::ArrayViewD;

/// The denominator of the mean, and how many targets take part.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Totals {
    /// The denominator of the reduction "mean".
    pub denominator: f64,
    /// The number of targets that take part.
    pub counted: usize,
}

impl Totals {
    /// What the mean divides by: the normalizer, or the denominator, and NaN in the place of 0. The mean over no mass
    /// is NaN, as in `torch.nn.CrossEntropyLoss`.
    pub(super) fn divisor(&self, settings: &Settings) -> f64 {
        let own = if self.denominator == 0.0 { f64::NAN } else { self.denominator };
        settings.normalizer.unwrap_or(own)
    }
}

/// A target's class, [`Label::IGNORED`] or [`Label::DISTRIBUTION`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Label(u32);

impl Label {
    /// A target that takes no part.
    const IGNORED: Self = Self(u32::MAX);

    /// A target that is a distribution over the classes.
    const DISTRIBUTION: Self = Self(u32::MAX - 1);

    /// Whether the target takes part.
    #[inline(always)]
    pub fn counts(self) -> bool {
        self != Self::IGNORED
    }

    /// The class; `None` where the target takes no part, and where it is a distribution.
    #[inline(always)]
    pub fn class(self) -> Option<usize> {
        (self.0 < Self::DISTRIBUTION.0).then_some(self.0 as usize)
    }
}

/// One label a target; nothing is stored where all are [`Label::DISTRIBUTION`].
pub(super) struct Labels {
    labels: Option<Vec<Label>>,
    all_count: bool,
}

impl Labels {
    /// Reads the targets of a call.
    pub fn read<T: Element>(
        inputs: &Inputs<T>,
        dims: &Dimensions,
        ignore_index: i64,
    ) -> Result<(Self, Totals), Error> {
        let measure = inputs.measure;
        let mut labels = filled(dims.targets, Label::IGNORED);
        match &inputs.target {
            Target::Int64(target) => encode(target, dims, measure, ignore_index, &mut labels)?,
            Target::Int32(target) => encode(target, dims, measure, ignore_index, &mut labels)?,
            Target::Probabilities(_) => {
                let Some(measure) = measure else {
                    let totals = Totals { denominator: dims.targets as f64, counted: dims.targets };
                    return Ok((Self { labels: None, all_count: true }, totals));
                };
                for (labels, &p) in labels.chunks_mut(dims.unit.max(1)).zip(measure) {
                    labels.fill(if p == T::Real::default() { Label::IGNORED } else { Label::DISTRIBUTION });
                }
            }
        }
        let mut counted = 0;
        for labels in labels.chunks(STRETCH) {
            stop_if_interrupted();
            counted += labels.iter().filter(|label| label.counts()).count();
        }
        let class_weight = |label: Label| match (inputs.class_weight, label.class()) {
            (Some(c), Some(y)) => c[y].to_f64(),
            _ => 1.0,
        };
        let counting = labels.iter().enumerate().filter(|(_, label)| label.counts());
        let denominator = match (measure, inputs.class_weight) {
            (None, None) => counted as f64,
            (None, Some(_)) => total(counting.map(|(_, &label)| class_weight(label))),
            (Some(p), _) => {
                total(counting.map(|(i, &label)| p[i / dims.unit].to_f64() * class_weight(label)))
            }
        };
        let all_count = counted == labels.len();
        Ok((Self { labels: Some(labels), all_count }, Totals { denominator, counted }))
    }

    /// Whether every target takes part.
    pub fn all_count(&self) -> bool {
        self.all_count
    }

    /// Whether target `i` takes part.
    #[inline(always)]
    pub fn counts(&self, i: usize) -> bool {
        self.labels.as_deref().is_none_or(|labels| labels[i].counts())
    }

    /// The labels of the targets from `start` on; `None` where all targets are distributions that take part.
    #[inline(always)]
    pub fn part(&self, start: usize, count: usize) -> Option<&[Label]> {
        self.labels.as_deref().map(|labels| &labels[start..start + count])
    }
}

/// Writes the labels of class indices, or names the first that is no class.
fn encode<L: Copy + Into<i64>, A: Real>(
    target: &ArrayViewD<L>,
    dims: &Dimensions,
    measure: Option<&[A]>,
    ignore_index: i64,
    labels: &mut [Label],
) -> Result<(), Error> {
    let classes = dims.classes;
    let takes_part = |i: usize, index: i64| {
        index != ignore_index && measure.is_none_or(|p| p[i / dims.unit] != A::default())
    };
    let in_range = |index: i64| (index as u64) < classes as u64;
    if let (Some(indices), None) = (target.as_slice(), measure) {
        let mut valid = true;
        for (indices, labels) in indices.chunks(STRETCH).zip(labels.chunks_mut(STRETCH)) {
            stop_if_interrupted();
            valid &= dispatch(Encode { indices, classes, ignore_index, labels });
        }
        if valid {
            return Ok(());
        }
    } else {
        let mut valid = true;
        for (i, (label, &index)) in labels.iter_mut().zip(target).enumerate() {
            if i.is_multiple_of(STRETCH) {
                stop_if_interrupted();
            }
            let index = index.into();
            let counts = takes_part(i, index);
            *label = if counts { Label(index as u32) } else { Label::IGNORED };
            valid &= in_range(index) || !counts;
        }
        if valid {
            return Ok(());
        }
    }
    let refused = |&(i, &index): &(usize, &L)| !in_range(index.into()) && takes_part(i, index.into());
    let (mut rest, &index) = target.iter().enumerate().find(refused).expect("an index out of range was seen");
    let mut position = target.shape().to_vec();
    for p in position.iter_mut().rev() {
        let size = *p;
        *p = rest % size;
        rest /= size;
    }
    Err(Error::OutOfRange { index: index.into(), position, classes })
}

/// Writes the labels of contiguous indices; returns whether all are classes or the ignored one.
struct Encode<'a, L> {
    indices: &'a [L],
    classes: usize,
    ignore_index: i64,
    labels: &'a mut [Label],
}

impl<L: Copy + Into<i64>> Kernel for Encode<'_, L> {
    type Output = bool;

    #[inline(always)]
    fn run<I: Isa>(self) -> bool {
        let mut refused = 0;
        for (label, &index) in self.labels.iter_mut().zip(self.indices) {
            let index = index.into();
            let ignored = index == self.ignore_index;
            let in_range = (index as u64) < self.classes as u64;
            *label = if ignored { Label::IGNORED } else { Label(index as u32) };
            refused |= u32::from(!(in_range | ignored));
        }
        refused == 0
    }
}
