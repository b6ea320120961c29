//! The shapes of a call: those that the logits imply for every other argument, and the error if one does not fit.
//!
//! Logits of shape `(C,)`, `(N, C)` or `(N, C, d1, ..., dk)` have targets of the shape without `C`. A unit is what has
//! one weight: a target, or with `per_sample` all targets of a sample of the leading axis.

use super::arguments::{Gradient, Inputs, Reduction, Settings};
use crate::numeric::Element;
use std::fmt;

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
    /// The weighting remembers earlier batches; its kind.
    Stateful(&'static str),
    /// Groups or a state do not fit the weighting.
    Weighting(crate::weightings::Error),
    /// The objective of given losses has a z-loss, and their logsumexp was not given.
    Logsumexp,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfRange { index, position, classes } => write!(
                f,
                "label {index} at position {position:?} is out of range for {classes} classes: give a class from 0 \
                 to {}, or name {index} in ignore_index",
                classes.saturating_sub(1)
            ),
            Self::Shape(message) => f.write_str(message),
            Self::Stateful(kind) => write!(
                f,
                "weights of kind '{kind}' depend on earlier batches, whose state the front keeps: it gives \
                 their weights"
            ),
            Self::Weighting(error) => error.fmt(f),
            Self::Logsumexp => f.write_str(
                "a z_loss needs the logsumexp of each target: give what cross_entropy_losses has filled",
            ),
        }
    }
}

impl std::error::Error for Error {}

/// The shapes a call's arguments must have.
pub(super) struct Dimensions<'a> {
    pub logits: &'a [usize],
    pub classes: usize,
    pub class_axis: usize,
    /// That of the targets.
    pub shape: Vec<usize>,
    pub targets: usize,
    /// How many targets share a weight.
    pub unit: usize,
    /// How many weights there are.
    pub units: usize,
}

impl<'a> Dimensions<'a> {
    /// The dimensions that follow from the logits, after a check of all inputs against them.
    pub fn of<T: Element>(inputs: &'a Inputs<T>, settings: &Settings) -> Result<Self, Error> {
        let logits = &inputs.logits;
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
        let dims = Self { logits: logits.shape(), classes, class_axis, shape, targets, unit, units };
        dims.length("weight", inputs.class_weight.map_or(classes, <[_]>::len), classes)?;
        dims.length("logit_adjustment", inputs.logit_adjustment.map_or(classes, <[_]>::len), classes)?;
        dims.length("sample_weight", inputs.measure.map_or(units, <[_]>::len), units)?;
        let wanted = if inputs.target.is_probabilities() { dims.logits } else { &dims.shape };
        dims.shape("target", inputs.target.shape(), wanted)?;
        Ok(dims)
    }

    /// The length that an objective must have.
    pub fn objectives(&self, settings: &Settings) -> usize {
        if settings.reduction == Reduction::None { self.targets } else { 1 }
    }

    /// Refuses an argument that has another length than it must have.
    pub fn length(&self, name: &str, got: usize, wanted: usize) -> Result<(), Error> {
        if got == wanted {
            return Ok(());
        }
        Err(Error::Shape(format!(
            "{name} must have {wanted} elements for logits of shape {:?}, got {got}",
            self.logits
        )))
    }

    /// Refuses numbers, if there are any, that are not one a target.
    pub fn per_target<A>(&self, name: &str, numbers: Option<&[A]>) -> Result<(), Error> {
        self.length(name, numbers.map_or(self.targets, <[_]>::len), self.targets)
    }

    /// Refuses a gradient that has another shape than the logits.
    pub fn gradient<T>(&self, grad: &Gradient<T>) -> Result<(), Error> {
        match grad {
            Gradient::Separate(grad) => self.shape("grad", grad.shape(), self.logits),
            Gradient::Unwanted | Gradient::InPlace(_) => Ok(()),
        }
    }

    /// Refuses an argument that has another shape than it must have.
    pub fn shape(&self, name: &str, got: &[usize], wanted: &[usize]) -> Result<(), Error> {
        if got == wanted {
            return Ok(());
        }
        Err(Error::Shape(format!(
            "{name} must have shape {wanted:?} for logits of shape {:?}, got {got:?}",
            self.logits
        )))
    }
}
