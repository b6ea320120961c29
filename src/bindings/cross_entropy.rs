//! The functions of `rgd._rgd` for logits and targets.

use super::call::{for_float, read_weighting, released_on_team};
use super::tensor::{Dtype, HasDtype, Tensor, distinct};
use crate::cross_entropy::{
    self as ce, Extras, Given, Gradient, Inputs, NormedOutputs, Outputs, Overwrite, Reduction, Settings,
    Target, Totals,
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
    measure: Option<Tensor<'py>>,
}

impl<'py> Read<'py> {
    fn import(
        logits: &Bound<'py, PyAny>,
        target: &Bound<'py, PyAny>,
        class_weight: Option<&Bound<'py, PyAny>>,
        logit_adjustment: Option<&Bound<'py, PyAny>>,
        measure: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Self> {
        Ok(Self {
            logits: Tensor::import("logits", logits)?,
            target: Tensor::import("target", target)?,
            class_weight: class_weight.map(|c| Tensor::import("weight", c)).transpose()?,
            logit_adjustment: logit_adjustment.map(|a| Tensor::import("logit_adjustment", a)).transpose()?,
            measure: measure.map(|p| Tensor::import("sample_weight", p)).transpose()?,
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
        let inputs = inputs.chain(&self.measure);
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
            measure: self.measure.as_ref().map(Tensor::slice).transpose()?,
        })
    }
}

/// Outputs, and an optional one.
fn outputs<'a, 'py>(outputs: &[&'a Tensor<'py>], optional: Option<&'a Tensor<'py>>) -> Vec<&'a Tensor<'py>> {
    outputs.iter().copied().chain(optional).collect()
}

pub(super) fn read_settings(
    ignore_index: i64,
    label_smoothing: f64,
    per_sample: bool,
    reduction: Reduction,
    threads: usize,
    z_loss: f64,
) -> PyResult<Settings> {
    if !(0.0..=1.0).contains(&label_smoothing) {
        return Err(PyValueError::new_err(format!(
            "label_smoothing must lie in [0, 1], got {label_smoothing}"
        )));
    }
    if !(0.0..f64::INFINITY).contains(&z_loss) {
        return Err(PyValueError::new_err(format!("z_loss must be a finite number >= 0, got {z_loss}")));
    }
    Ok(Settings { ignore_index, label_smoothing, z_loss, per_sample, reduction, normalizer: None, threads })
}

/// The settings of a mean that is divided by a number of the caller.
fn with_normalizer(settings: Settings, normalizer: Option<f64>) -> PyResult<Settings> {
    let Some(number) = normalizer else { return Ok(settings) };
    // NaN stands for a number that could not be checked in Python.
    if number <= 0.0 || number == f64::INFINITY || settings.reduction != Reduction::Mean {
        return Err(PyValueError::new_err(format!(
            "normalizer must be a positive number, for the reduction 'mean', got {number}"
        )));
    }
    Ok(Settings { normalizer, ..settings })
}

pub(super) fn read_reduction(reduction: &str) -> PyResult<Reduction> {
    match reduction {
        "none" => Ok(Reduction::None),
        "mean" => Ok(Reduction::Mean),
        "sum" => Ok(Reduction::Sum),
        other => {
            Err(PyValueError::new_err(format!("reduction must be 'none', 'mean' or 'sum', got '{other}'")))
        }
    }
}

pub(super) fn read_totals(totals: Result<Totals, ce::Error>) -> PyResult<(f64, usize)> {
    match totals {
        Ok(totals) => Ok((totals.denominator, totals.counted)),
        Err(error) => Err(refused(&error)),
    }
}

fn refused(error: &ce::Error) -> PyErr {
    match error {
        ce::Error::OutOfRange { .. } => PyIndexError::new_err(error.to_string()),
        _ => PyValueError::new_err(error.to_string()),
    }
}

#[pyfunction]
#[pyo3(signature = (
    logits, target, class_weight, measure, kind, numbers, ignore_index, label_smoothing, per_sample, reduction,
    losses, weights, objective, grad, threads, logit_adjustment=None, z_loss=0.0, normalizer=None
))]
#[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)] // one for each tensor and setting
pub(super) fn cross_entropy(
    py: Python,
    logits: &Bound<PyAny>,
    target: &Bound<PyAny>,
    class_weight: Option<&Bound<PyAny>>,
    measure: Option<&Bound<PyAny>>,
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
    z_loss: f64,
    normalizer: Option<f64>,
) -> PyResult<(f64, usize)> {
    let settings = read_settings(
        ignore_index,
        label_smoothing,
        per_sample,
        read_reduction(reduction)?,
        threads,
        z_loss,
    )?;
    let settings = with_normalizer(settings, normalizer)?;
    let weighting = read_weighting(kind, &numbers)?;
    let read = Read::import(logits, target, class_weight, logit_adjustment, measure)?;
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
        read_totals(released_on_team(py, || ce::cross_entropy(&inputs, weighting, &settings, out))?)
    })
}

#[pyfunction]
#[pyo3(signature = (
    logits, target, class_weight, ignore_index, label_smoothing, losses, threads, logit_adjustment=None, logsumexp=None
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
    logsumexp: Option<&Bound<PyAny>>,
) -> PyResult<usize> {
    let settings = read_settings(ignore_index, label_smoothing, false, Reduction::None, threads, 0.0)?;
    let read = Read::import(logits, target, class_weight, logit_adjustment, None)?;
    let mut losses = Tensor::import("losses", losses)?;
    let mut logsumexp = logsumexp.map(|z| Tensor::import("logsumexp", z)).transpose()?;
    read.distinct_from(&outputs(&[&losses], logsumexp.as_ref()), None, &[])?;
    let (_, counted) = for_float!(read.logits.dtype(), "logits", T => {
        let (inputs, losses) = (read.inputs::<T>()?, losses.slice_mut()?);
        let logsumexp = logsumexp.as_mut().map(Tensor::slice_mut).transpose()?;
        read_totals(released_on_team(py, || ce::losses(&inputs, &settings, losses, logsumexp))?)
    })?;
    Ok(counted)
}

#[pyfunction]
#[pyo3(signature = (
    logits, target, class_weight, measure, ignore_index, label_smoothing, per_sample, reduction, losses, weights,
    objective, grad, threads, logit_adjustment=None, z_loss=0.0, logsumexp=None, normalizer=None
))]
#[allow(clippy::too_many_arguments)] // as above
pub(super) fn cross_entropy_gradient(
    py: Python,
    logits: &Bound<PyAny>,
    target: &Bound<PyAny>,
    class_weight: Option<&Bound<PyAny>>,
    measure: Option<&Bound<PyAny>>,
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
    z_loss: f64,
    logsumexp: Option<&Bound<PyAny>>,
    normalizer: Option<f64>,
) -> PyResult<(f64, usize)> {
    let settings = read_settings(
        ignore_index,
        label_smoothing,
        per_sample,
        read_reduction(reduction)?,
        threads,
        z_loss,
    )?;
    let settings = with_normalizer(settings, normalizer)?;
    let read = Read::import(logits, target, class_weight, logit_adjustment, measure)?;
    let (losses, weights) = (Tensor::import("losses", losses)?, Tensor::import("weights", weights)?);
    let logsumexp = logsumexp.map(|z| Tensor::import("logsumexp", z)).transpose()?;
    let mut objective = Tensor::import("objective", objective)?;
    let mut grad = grad.map(|g| Tensor::import("grad", g)).transpose()?;
    let given: Vec<&Tensor> = [&losses, &weights].into_iter().chain(&logsumexp).collect();
    read.distinct_from(&[&objective], grad.as_ref(), &given)?;
    for_float!(read.logits.dtype(), "logits", T => {
        let inputs = read.inputs::<T>()?;
        let logsumexp = logsumexp.as_ref().map(Tensor::slice).transpose()?;
        let given = Given { losses: losses.slice()?, weights: weights.slice()?, logsumexp };
        let objective = objective.slice_mut()?;
        let grad = read.gradient(grad.as_mut())?;
        read_totals(released_on_team(py, || ce::gradient(&inputs, given, &settings, objective, grad))?)
    })
}

#[pyfunction]
#[pyo3(signature = (
    logits, target, class_weight, norms, kind, numbers, ignore_index, label_smoothing, losses, weights, grad, threads,
    logit_adjustment=None, z_loss=0.0, logsumexp=None
))]
#[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)] // as above
pub(super) fn cross_entropy_rows(
    py: Python,
    logits: &Bound<PyAny>,
    target: &Bound<PyAny>,
    class_weight: Option<&Bound<PyAny>>,
    norms: &Bound<PyAny>,
    kind: &str,
    numbers: Vec<f64>,
    ignore_index: i64,
    label_smoothing: f64,
    losses: &Bound<PyAny>,
    weights: &Bound<PyAny>,
    grad: Option<&Bound<PyAny>>,
    threads: usize,
    logit_adjustment: Option<&Bound<PyAny>>,
    z_loss: f64,
    logsumexp: Option<&Bound<PyAny>>,
) -> PyResult<usize> {
    let settings = read_settings(ignore_index, label_smoothing, false, Reduction::Sum, threads, z_loss)?;
    let weighting = read_weighting(kind, &numbers)?;
    if !weighting.is_pointwise() {
        return Err(PyValueError::new_err(format!(
            "weights of kind '{kind}' with these numbers depend on the whole batch: give them to \
             cross_entropy_rows_gradient"
        )));
    }
    let read = Read::import(logits, target, class_weight, logit_adjustment, None)?;
    let norms = Tensor::import("norms", norms)?;
    let mut losses = Tensor::import("losses", losses)?;
    let mut weights = Tensor::import("weights", weights)?;
    let mut logsumexp = logsumexp.map(|z| Tensor::import("logsumexp", z)).transpose()?;
    let mut grad = grad.map(|g| Tensor::import("grad", g)).transpose()?;
    read.distinct_from(&outputs(&[&losses, &weights], logsumexp.as_ref()), grad.as_ref(), &[&norms])?;
    let (_, counted) = for_float!(read.logits.dtype(), "logits", T => {
        let (inputs, norms) = (read.inputs::<T>()?, norms.slice()?);
        let out = NormedOutputs {
            losses: losses.slice_mut()?,
            weights: weights.slice_mut()?,
            logsumexp: logsumexp.as_mut().map(Tensor::slice_mut).transpose()?,
            grad: read.gradient(grad.as_mut())?,
        };
        read_totals(released_on_team(py, || ce::with_norms(&inputs, weighting, &settings, norms, out))?)
    })?;
    Ok(counted)
}

#[pyfunction]
#[pyo3(signature = (
    logits, target, class_weight, norms, weights, ignore_index, label_smoothing, grad, threads, logit_adjustment=None,
    z_loss=0.0
))]
#[allow(clippy::too_many_arguments)] // as above
pub(super) fn cross_entropy_rows_gradient(
    py: Python,
    logits: &Bound<PyAny>,
    target: &Bound<PyAny>,
    class_weight: Option<&Bound<PyAny>>,
    norms: &Bound<PyAny>,
    weights: Option<&Bound<PyAny>>,
    ignore_index: i64,
    label_smoothing: f64,
    grad: &Bound<PyAny>,
    threads: usize,
    logit_adjustment: Option<&Bound<PyAny>>,
    z_loss: f64,
) -> PyResult<usize> {
    let settings = read_settings(ignore_index, label_smoothing, false, Reduction::Sum, threads, z_loss)?;
    let read = Read::import(logits, target, class_weight, logit_adjustment, None)?;
    let norms = Tensor::import("norms", norms)?;
    let weights = weights.map(|w| Tensor::import("weights", w)).transpose()?;
    let mut grad = Tensor::import("grad", grad)?;
    let given: Vec<&Tensor> = [&norms].into_iter().chain(&weights).collect();
    read.distinct_from(&[], Some(&grad), &given)?;
    let (_, counted) = for_float!(read.logits.dtype(), "logits", T => {
        let (inputs, norms) = (read.inputs::<T>()?, norms.slice()?);
        let weights = weights.as_ref().map(Tensor::slice).transpose()?;
        let grad = read.gradient(Some(&mut grad))?;
        read_totals(released_on_team(py, || ce::gradient_with_norms(&inputs, &settings, norms, weights, grad))?)
    })?;
    Ok(counted)
}

#[pyfunction]
#[pyo3(signature = (
    logits, target, ignore_index, threads, logit_adjustment=None, entropy=None, logsumexp=None, correct=None
))]
#[allow(clippy::too_many_arguments)] // as above
pub(super) fn cross_entropy_extras(
    py: Python,
    logits: &Bound<PyAny>,
    target: &Bound<PyAny>,
    ignore_index: i64,
    threads: usize,
    logit_adjustment: Option<&Bound<PyAny>>,
    entropy: Option<&Bound<PyAny>>,
    logsumexp: Option<&Bound<PyAny>>,
    correct: Option<&Bound<PyAny>>,
) -> PyResult<()> {
    let settings = read_settings(ignore_index, 0.0, false, Reduction::None, threads, 0.0)?;
    let read = Read::import(logits, target, None, logit_adjustment, None)?;
    let mut entropy = entropy.map(|h| Tensor::import("entropy", h)).transpose()?;
    let mut logsumexp = logsumexp.map(|z| Tensor::import("logsumexp", z)).transpose()?;
    let mut correct = correct.map(|c| Tensor::import("correct", c)).transpose()?;
    let wanted: Vec<&Tensor> = entropy.iter().chain(&logsumexp).chain(&correct).collect();
    read.distinct_from(&wanted, None, &[])?;
    for_float!(read.logits.dtype(), "logits", T => {
        let inputs = read.inputs::<T>()?;
        let out = Extras {
            entropy: entropy.as_mut().map(Tensor::slice_mut).transpose()?,
            logsumexp: logsumexp.as_mut().map(Tensor::slice_mut).transpose()?,
            correct: correct.as_mut().map(Tensor::slice_mut).transpose()?,
        };
        match released_on_team(py, || ce::extras(&inputs, &settings, out))? {
            Ok(()) => Ok(()),
            Err(error) => Err(refused(&error)),
        }
    })
}

/// The message of the kernels for a wrong label, for fronts that find it themselves.
#[pyfunction]
pub(super) fn label_out_of_range(label: i64, position: Vec<usize>, classes: usize) -> String {
    ce::Error::OutOfRange { index: label, position, classes }.to_string()
}
