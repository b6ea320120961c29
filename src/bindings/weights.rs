//! The functions of `rgd._rgd` for losses and their weights.

use super::call::{read_weighting, released, same_shape, values};
use super::tensor::{Dtype, Tensor, distinct};
use crate::reduce::{self, WeightSums};
use crate::weightings::{self, Batch};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

#[pyfunction]
#[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)] // one for each tensor and setting
#[pyo3(signature = (losses, weights, kind, numbers, threads, measure=None, groups=None, state=None))]
pub(super) fn sample_weights(
    py: Python,
    losses: &Bound<PyAny>,
    weights: &Bound<PyAny>,
    kind: &str,
    numbers: Vec<f64>,
    threads: usize,
    measure: Option<&Bound<PyAny>>,
    groups: Option<&Bound<PyAny>>,
    state: Option<Vec<Bound<PyAny>>>,
) -> PyResult<()> {
    let weighting = read_weighting(kind, &numbers)?;
    let (losses, mut weights) = (Tensor::import("losses", losses)?, Tensor::import("weights", weights)?);
    same_shape(["losses", "weights"], &losses, &weights)?;
    let measure = measure.map(|measure| Tensor::import("measure", measure)).transpose()?;
    let groups = groups.map(|groups| Tensor::import("groups", groups)).transpose()?;
    let leaves = state.unwrap_or_default();
    let mut leaves =
        leaves.iter().map(|leaf| Tensor::import("state", leaf)).collect::<PyResult<Vec<Tensor>>>()?;
    let outputs: Vec<&Tensor> = std::iter::once(&weights).chain(&leaves).collect();
    let inputs: Vec<&Tensor> = std::iter::once(&losses).chain(&measure).chain(&groups).collect();
    distinct(&outputs, &inputs)?;
    for (name, given) in [("measure", &measure), ("groups", &groups)] {
        given.as_ref().map_or(Ok(()), |given| same_shape(["losses", name], &losses, given))?;
    }
    let measure = measure.as_ref().map(read_measure).transpose()?;
    let groups = groups.as_ref().map(read_groups).transpose()?;
    let mut state =
        leaves.iter().map(|leaf| Ok(leaf.slice::<f64>()?.to_vec())).collect::<PyResult<Vec<_>>>()?;
    // A leaf that cannot be written is refused before anything is written.
    for leaf in &mut leaves {
        leaf.slice_mut::<f64>()?;
    }
    let dtype = losses.dtype();
    let losses = values("losses", &losses)?;
    let batch = || Batch::new(&*losses, measure.as_deref(), groups.as_deref(), threads);
    let done = if dtype == Dtype::F64 {
        let weights = weights.slice_mut::<f64>()?;
        released(py, || weightings::sample_weights(&batch(), weighting, &mut state, weights))
    } else {
        let weights = weights.slice_mut::<f32>()?;
        released(py, || weightings::sample_weights(&batch(), weighting, &mut state, weights))
    };
    done?.map_err(|error| PyValueError::new_err(error.to_string()))?;
    for (leaf, numbers) in leaves.iter_mut().zip(&state) {
        for (out, &number) in leaf.slice_mut::<f64>()?.iter_mut().zip(numbers) {
            out.write(number);
        }
    }
    Ok(())
}

/// A measure as a vector, after a check of its numbers.
fn read_measure(measure: &Tensor) -> PyResult<Vec<f64>> {
    let values = values("measure", measure)?;
    let mut numbers = vec![0.0; values.count()];
    values.read(0, &mut numbers);
    match numbers.iter().find(|&&p| !(p >= 0.0 && p.is_finite())) {
        Some(p) => Err(PyValueError::new_err(format!("measure must hold finite numbers >= 0, got {p}"))),
        None => Ok(numbers),
    }
}

/// Groups as a vector.
fn read_groups(groups: &Tensor) -> PyResult<Vec<i64>> {
    match groups.dtype() {
        Dtype::I64 => Ok(groups.view::<i64>()?.iter().copied().collect()),
        Dtype::I32 => Ok(groups.view::<i32>()?.iter().map(|&g| i64::from(g)).collect()),
        other => Err(PyTypeError::new_err(format!("groups must be int64 or int32, got {other}"))),
    }
}

#[pyfunction]
pub(super) fn widen(py: Python, values: &Bound<PyAny>, out: &Bound<PyAny>, threads: usize) -> PyResult<()> {
    let (read, mut out) = (Tensor::import("values", values)?, Tensor::import("out", out)?);
    same_shape(["values", "out"], &read, &out)?;
    distinct(&[&out], &[&read])?;
    let (values, out) = (self::values("values", &read)?, out.slice_mut::<f64>()?);
    released(py, || reduce::widen(&*values, out, threads))
}

#[pyfunction]
#[pyo3(signature = (values, weights, measure, threads))]
pub(super) fn weighted_sum(
    py: Python,
    values: &Bound<PyAny>,
    weights: &Bound<PyAny>,
    measure: Option<&Bound<PyAny>>,
    threads: usize,
) -> PyResult<f64> {
    let (read, weights) = (Tensor::import("values", values)?, Tensor::import("weights", weights)?);
    same_shape(["values", "weights"], &read, &weights)?;
    let measure = measure.map(|measure| Tensor::import("measure", measure)).transpose()?;
    if let Some(measure) = &measure {
        same_shape(["values", "measure"], &read, measure)?;
    }
    let (values, weights) = (self::values("values", &read)?, self::values("weights", &weights)?);
    let measure = measure.as_ref().map(|measure| self::values("measure", measure)).transpose()?;
    released(py, || {
        reduce::weighted_sum(&*values, &*weights, measure.as_deref().map(|measure| measure as _), threads)
    })
}

#[pyfunction]
#[pyo3(signature = (losses, weights, measure, clip, threads))]
pub(super) fn weight_sums(
    py: Python,
    losses: &Bound<PyAny>,
    weights: &Bound<PyAny>,
    measure: Option<&Bound<PyAny>>,
    clip: f64,
    threads: usize,
) -> PyResult<WeightSums> {
    let (losses, weights) = (Tensor::import("losses", losses)?, Tensor::import("weights", weights)?);
    same_shape(["losses", "weights"], &losses, &weights)?;
    let measure = measure.map(|measure| Tensor::import("measure", measure)).transpose()?;
    if let Some(measure) = &measure {
        same_shape(["losses", "measure"], &losses, measure)?;
    }
    let (losses, weights) = (values("losses", &losses)?, values("weights", &weights)?);
    let measure = measure.as_ref().map(|measure| values("measure", measure)).transpose()?;
    released(py, || {
        reduce::weight_sums(
            &*losses,
            &*weights,
            measure.as_deref().map(|measure| measure as _),
            clip,
            threads,
        )
    })
}
