//! The functions of `rgd._rgd` for boosted trees.

use super::call::{read_weighting, released, values};
use super::tensor::{Dtype, Tensor, distinct};
use crate::boosting::{self, Error, Inputs, Loss, Outputs, Weights};
use crate::layout::Values;
use ndarray::{ArrayView2, ArrayViewMut2, Ix2};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use std::mem::MaybeUninit;

/// The fault, and the first sample that has it.
type Wrong = (&'static str, usize);

fn read_wrong(error: Error) -> Wrong {
    match error {
        Error::Label(i) => ("label", i),
        Error::Measure(i) => ("measure", i),
        Error::Overflow(i) => ("overflow", i),
    }
}

fn read_loss(name: &str) -> PyResult<Loss> {
    Loss::named(name).ok_or_else(|| {
        PyValueError::new_err(format!("loss must be 'logistic', 'softmax' or 'squared_error', got '{name}'"))
    })
}

/// A column of numbers, one a sample.
fn column<'a>(
    name: &'static str,
    tensor: &'a Tensor,
    samples: usize,
) -> PyResult<Box<dyn Values + Send + 'a>> {
    if tensor.shape() != [samples] {
        return Err(PyValueError::new_err(format!(
            "{name} must have the shape [{samples}], got {:?}",
            tensor.shape()
        )));
    }
    values(name, tensor)
}

fn samples_of(margins: &Tensor, loss: Loss) -> PyResult<usize> {
    match *margins.shape() {
        [samples, columns] if columns == 1 || loss == Loss::Softmax => Ok(samples),
        _ => Err(PyValueError::new_err(format!(
            "margins must have a row a sample and a column a margin, got shape {:?}",
            margins.shape()
        ))),
    }
}

fn output<'a>(name: &str, tensor: &'a mut Tensor) -> PyResult<ArrayViewMut2<'a, MaybeUninit<f64>>> {
    tensor
        .view_mut()?
        .into_dimensionality::<Ix2>()
        .map_err(|_| PyValueError::new_err(format!("{name} must have the shape of margins")))
}

/// Evaluates `$body` with `$view` the margins as a view of `float32` or `float64`.
macro_rules! with_margins {
    ($margins:expr, $view:ident => $body:expr) => {
        match $margins.dtype() {
            Dtype::F64 => {
                let $view: ArrayView2<f64> = $margins.view()?.into_dimensionality().expect("two axes");
                $body
            }
            Dtype::F32 => {
                let $view: ArrayView2<f32> = $margins.view()?.into_dimensionality().expect("two axes");
                $body
            }
            other => Err(PyTypeError::new_err(format!("margins must be float32 or float64, got {other}"))),
        }
    };
}

#[pyfunction]
pub(super) fn boosting_losses(
    py: Python,
    loss: &str,
    margins: &Bound<PyAny>,
    labels: &Bound<PyAny>,
    losses: &Bound<PyAny>,
    threads: usize,
) -> PyResult<Option<usize>> {
    let loss = read_loss(loss)?;
    let (margins, labels) = (Tensor::import("margins", margins)?, Tensor::import("labels", labels)?);
    let mut losses = Tensor::import("losses", losses)?;
    distinct(&[&losses], &[&margins, &labels])?;
    let samples = samples_of(&margins, loss)?;
    let labels = column("labels", &labels, samples)?;
    let losses = losses.slice_mut()?;
    if losses.len() != samples {
        return Err(PyValueError::new_err(format!("losses must have the shape [{samples}]")));
    }
    with_margins!(margins, margins => {
        let inputs = Inputs { loss, margins, labels: &*labels, threads };
        Ok(released(py, || boosting::losses(&inputs, losses))?.err().map(|error| read_wrong(error).1))
    })
}

#[pyfunction]
#[pyo3(signature = (loss, margins, labels, measure, weights, kind, numbers, curvature, gradient, hessian, threads))]
#[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)] // one for each tensor and setting
pub(super) fn boosting_derivatives(
    py: Python,
    loss: &str,
    margins: &Bound<PyAny>,
    labels: &Bound<PyAny>,
    measure: Option<&Bound<PyAny>>,
    weights: Option<&Bound<PyAny>>,
    kind: Option<&str>,
    numbers: Vec<f64>,
    curvature: Option<f64>,
    gradient: &Bound<PyAny>,
    hessian: &Bound<PyAny>,
    threads: usize,
) -> PyResult<(Option<Wrong>, f64)> {
    let loss = read_loss(loss)?;
    let (margins, labels) = (Tensor::import("margins", margins)?, Tensor::import("labels", labels)?);
    let measure = measure.map(|measure| Tensor::import("measure", measure)).transpose()?;
    let weights = weights.map(|weights| Tensor::import("weights", weights)).transpose()?;
    let mut gradient = Tensor::import("gradient", gradient)?;
    let mut hessian = Tensor::import("hessian", hessian)?;
    let inputs: Vec<&Tensor> = [&margins, &labels].into_iter().chain(&measure).chain(&weights).collect();
    distinct(&[&gradient, &hessian], &inputs)?;
    let samples = samples_of(&margins, loss)?;
    if gradient.shape() != margins.shape() || hessian.shape() != margins.shape() {
        return Err(PyValueError::new_err("gradient and hessian must have the shape of margins"));
    }
    let labels = column("labels", &labels, samples)?;
    let measure = measure.as_ref().map(|measure| column("measure", measure, samples)).transpose()?;
    let weights = weights.as_ref().map(|weights| column("weights", weights, samples)).transpose()?;
    let weighting = kind.map(|kind| read_weighting(kind, &numbers)).transpose()?;
    let weights = match (&weights, weighting) {
        (Some(weights), None) => Weights::Given(&**weights),
        (None, Some(weighting)) if weighting.is_pointwise() => Weights::Pointwise(weighting),
        _ => return Err(PyValueError::new_err("give either weights or a pointwise weighting")),
    };
    with_margins!(margins, margins => {
        let inputs = Inputs { loss, margins, labels: &*labels, threads };
        let outputs = Outputs {
            measure: measure.as_deref().map(|measure| measure as _),
            weights,
            curvature,
            gradient: output("gradient", &mut gradient)?,
            hessian: output("hessian", &mut hessian)?,
        };
        Ok(match released(py, || boosting::derivatives(&inputs, outputs))? {
            Ok(largest) => (None, largest),
            Err(error) => (Some(read_wrong(error)), f64::NAN),
        })
    })
}
