//! The functions of `rgd._rgd` for losses and their weights.

use super::call::{for_float, read_weighting, released, same_shape, values};
use super::tensor::{Tensor, distinct};
use crate::layout::Vector;
use crate::numeric::Element;
use crate::reduce::{self, WeightSums};
use crate::weightings;
use pyo3::prelude::*;

#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // PyO3 reads a sequence of numbers as a vector only
pub(super) fn sample_weights(
    py: Python,
    losses: &Bound<PyAny>,
    weights: &Bound<PyAny>,
    kind: &str,
    numbers: Vec<f64>,
    threads: usize,
) -> PyResult<()> {
    let weighting = read_weighting(kind, &numbers)?;
    let (losses, mut weights) = (Tensor::import("losses", losses)?, Tensor::import("weights", weights)?);
    same_shape(["losses", "weights"], &losses, &weights)?;
    distinct(&[&weights], &[&losses])?;
    for_float!(losses.dtype(), "losses", T => {
        let losses = Vector::new(losses.view::<T>()?);
        let weights = weights.slice_mut::<<T as Element>::Real>()?;
        released(py, || weightings::sample_weights(&losses, weighting, weights, threads))
    })
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
