//! The functions of `rgd._rgd` for logits and targets.

use super::call::{for_float, read_weighting, released};
use super::tensor::{Dtype, HasDtype, Tensor, distinct};
use crate::cross_entropy::{
    self as ce, Given, Gradient, Inputs, Outputs, Overwrite, Reduction, Settings, Target, Totals,
};
use crate::numeric::Element;
use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::prelude::*;

/// The inputs of a cross-entropy, as Python gave them.
struct Read<'py> {
    logits: Tensor<'py>,
    target: Tensor<'py>,
    class_weight: Option<Tensor<'py>>,
    logit_adjustment: Option<Tensor<'py>>,
    sample_weight: Option<Tensor<'py>>,
}

impl<'py> Read<'py> {
    fn import(
        logits: &Bound<'py, PyAny>,
        target: &Bound<'py, PyAny>,
        class_weight: Option<&Bound<'py, PyAny>>,
        logit_adjustment: Option<&Bound<'py, PyAny>>,
        sample_weight: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Self> {
        Ok(Self {
            logits: Tensor::import("logits", logits)?,
            target: Tensor::import("target", target)?,
            class_weight: class_weight.map(|c| Tensor::import("weight", c)).transpose()?,
            logit_adjustment: logit_adjustment.map(|a| Tensor::import("logit_adjustment", a)).transpose()?,
            sample_weight: sample_weight.map(|p| Tensor::import("sample_weight", p)).transpose()?,
        })
    }

    /// Refuses outputs that share memory with each other, with these inputs or with `others`. A gradient that is the
    /// very tensor of the logits is allowed: then the logits are an output.
    fn distinct_from<'a>(
        &'a self,
        outputs: &[&'a Tensor<'py>],
        grad: Option<&'a Tensor<'py>>,
        others: &[&'a Tensor<'py>],
    ) -> PyResult<()>
    where
        'py: 'a,
    {
        let in_place = grad.is_some_and(|grad| grad.is(&self.logits));
        let inputs = [&self.target].into_iter().chain(&self.class_weight).chain(&self.logit_adjustment);
        let inputs = inputs.chain(&self.sample_weight);
        let inputs = inputs.chain((!in_place).then_some(&self.logits)).chain(others.iter().copied());
        let outputs = outputs.iter().copied().chain(grad);
        distinct(&outputs.collect::<Vec<_>>(), &inputs.collect::<Vec<_>>())
    }

    /// Where the gradient goes, once [`Read::distinct_from`] has allowed it.
    fn gradient<'a, T: HasDtype>(&self, grad: Option<&'a mut Tensor>) -> PyResult<Gradient<'a, T>> {
        let Some(grad) = grad else { return Ok(Gradient::Unwanted) };
        let in_place = grad.is(&self.logits);
        let view = grad.view_mut()?;
        if !in_place {
            return Ok(Gradient::Separate(view));
        }
        // SAFETY: the view that is dropped here says that the logits, which are the same tensor, may be written and do
        // not overlap themselves; `distinct_from` has seen to it that no other argument overlaps them, and Python's
        // caller promises that nobody touches an output during the call.
        Ok(Gradient::InPlace(unsafe { Overwrite::granted() }))
    }

    fn inputs<T: Element<Real: HasDtype> + HasDtype>(&self) -> PyResult<Inputs<'_, T>> {
        let target = match self.target.dtype() {
            Dtype::I64 => Target::Int64(self.target.view()?),
            Dtype::I32 => Target::Int32(self.target.view()?),
            _ => Target::Probabilities(self.target.view()?),
        };
        Ok(Inputs {
            logits: self.logits.view()?,
            target,
            class_weight: self.class_weight.as_ref().map(Tensor::slice).transpose()?,
            logit_adjustment: self.logit_adjustment.as_ref().map(Tensor::slice).transpose()?,
            sample_weight: self.sample_weight.as_ref().map(Tensor::slice).transpose()?,
        })
    }
}

fn read_settings(
    ignore_index: i64,
    label_smoothing: f64,
    per_sample: bool,
    reduction: &str,
    threads: usize,
) -> PyResult<Settings> {
    let reduction = match reduction {
        "none" => Reduction::None,
        "mean" => Reduction::Mean,
        "sum" => Reduction::Sum,
        other => {
            return Err(PyValueError::new_err(format!(
                "reduction must be 'none', 'mean' or 'sum', got '{other}'"
            )));
        }
    };
    if !(0.0..=1.0).contains(&label_smoothing) {
        return Err(PyValueError::new_err(format!(
            "label_smoothing must lie in [0, 1], got {label_smoothing}"
        )));
    }
    Ok(Settings { ignore_index, label_smoothing, per_sample, reduction, threads })
}

fn read_totals(totals: Result<Totals, ce::Error>) -> PyResult<(f64, usize)> {
    match totals {
        Ok(totals) => Ok((totals.denominator, totals.counted)),
        Err(error @ ce::Error::OutOfRange { .. }) => Err(PyIndexError::new_err(error.to_string())),
        Err(error) => Err(PyValueError::new_err(error.to_string())),
    }
}

#[pyfunction]
#[pyo3(signature = (
    logits, target, class_weight, sample_weight, kind, numbers, ignore_index, label_smoothing, per_sample, reduction,
    losses, weights, objective, grad, threads, logit_adjustment=None
))]
#[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)] // one for each tensor and setting
pub(super) fn cross_entropy(
    py: Python,
    logits: &Bound<PyAny>,
    target: &Bound<PyAny>,
    class_weight: Option<&Bound<PyAny>>,
    sample_weight: Option<&Bound<PyAny>>,
    kind: &str,
    numbers: Vec<f64>,
    ignore_index: i64,
    label_smoothing: f64,
    per_sample: bool,
    reduction: &str,
    losses: &Bound<PyAny>,
    weights: &Bound<PyAny>,
    objective: &Bound<PyAny>,
    grad: Option<&Bound<PyAny>>,
    threads: usize,
    logit_adjustment: Option<&Bound<PyAny>>,
) -> PyResult<(f64, usize)> {
    let settings = read_settings(ignore_index, label_smoothing, per_sample, reduction, threads)?;
    let weighting = read_weighting(kind, &numbers)?;
    let read = Read::import(logits, target, class_weight, logit_adjustment, sample_weight)?;
    let mut losses = Tensor::import("losses", losses)?;
    let mut weights = Tensor::import("weights", weights)?;
    let mut objective = Tensor::import("objective", objective)?;
    let mut grad = grad.map(|g| Tensor::import("grad", g)).transpose()?;
    read.distinct_from(&[&losses, &weights, &objective], grad.as_ref(), &[])?;
    for_float!(read.logits.dtype(), "logits", T => {
        let inputs = read.inputs::<T>()?;
        let out = Outputs {
            losses: losses.slice_mut()?,
            weights: weights.slice_mut()?,
            objective: objective.slice_mut()?,
            grad: read.gradient(grad.as_mut())?,
        };
        read_totals(released(py, || ce::cross_entropy(&inputs, weighting, &settings, out))?)
    })
}

#[pyfunction]
#[pyo3(signature = (
    logits, target, class_weight, ignore_index, label_smoothing, losses, threads, logit_adjustment=None
))]
#[allow(clippy::too_many_arguments)] // as above
pub(super) fn cross_entropy_losses(
    py: Python,
    logits: &Bound<PyAny>,
    target: &Bound<PyAny>,
    class_weight: Option<&Bound<PyAny>>,
    ignore_index: i64,
    label_smoothing: f64,
    losses: &Bound<PyAny>,
    threads: usize,
    logit_adjustment: Option<&Bound<PyAny>>,
) -> PyResult<usize> {
    let settings = read_settings(ignore_index, label_smoothing, false, "none", threads)?;
    let read = Read::import(logits, target, class_weight, logit_adjustment, None)?;
    let mut losses = Tensor::import("losses", losses)?;
    read.distinct_from(&[&losses], None, &[])?;
    let (_, counted) = for_float!(read.logits.dtype(), "logits", T => {
        let (inputs, losses) = (read.inputs::<T>()?, losses.slice_mut()?);
        read_totals(released(py, || ce::losses(&inputs, &settings, losses))?)
    })?;
    Ok(counted)
}

#[pyfunction]
#[pyo3(signature = (
    logits, target, class_weight, sample_weight, ignore_index, label_smoothing, per_sample, reduction, losses, weights,
    objective, grad, threads, logit_adjustment=None
))]
#[allow(clippy::too_many_arguments)] // as above
pub(super) fn cross_entropy_gradient(
    py: Python,
    logits: &Bound<PyAny>,
    target: &Bound<PyAny>,
    class_weight: Option<&Bound<PyAny>>,
    sample_weight: Option<&Bound<PyAny>>,
    ignore_index: i64,
    label_smoothing: f64,
    per_sample: bool,
    reduction: &str,
    losses: &Bound<PyAny>,
    weights: &Bound<PyAny>,
    objective: &Bound<PyAny>,
    grad: Option<&Bound<PyAny>>,
    threads: usize,
    logit_adjustment: Option<&Bound<PyAny>>,
) -> PyResult<(f64, usize)> {
    let settings = read_settings(ignore_index, label_smoothing, per_sample, reduction, threads)?;
    let read = Read::import(logits, target, class_weight, logit_adjustment, sample_weight)?;
    let (losses, weights) = (Tensor::import("losses", losses)?, Tensor::import("weights", weights)?);
    let mut objective = Tensor::import("objective", objective)?;
    let mut grad = grad.map(|g| Tensor::import("grad", g)).transpose()?;
    read.distinct_from(&[&objective], grad.as_ref(), &[&losses, &weights])?;
    for_float!(read.logits.dtype(), "logits", T => {
        let inputs = read.inputs::<T>()?;
        let given = Given { losses: losses.slice()?, weights: weights.slice()? };
        let objective = objective.slice_mut()?;
        let grad = read.gradient(grad.as_mut())?;
        read_totals(released(py, || ce::gradient(&inputs, given, &settings, objective, grad))?)
    })
}

/// What is wrong with a label, in the words of the kernels, for those who find it elsewhere.
#[pyfunction]
pub(super) fn label_out_of_range(label: i64, position: Vec<usize>, classes: usize) -> String {
    ce::Error::OutOfRange { index: label, position, classes }.to_string()
}
