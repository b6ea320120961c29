//! `rgd._rgd`: one function per kernel. Arguments are checked, the interpreter is released, a panic becomes an error.
//!
//! The functions are private to the Python package, whose fronts allocate the outputs; `python/rgd/_rgd.pyi` describes
//! them.

use crate::cross_entropy::{self as ce, Outputs, Reduction, Settings, Target};
use crate::reduce;
use crate::simd::{Element, Real};
use crate::tensor::{Dtype, HasDtype, Tensor, distinct};
use crate::weights::{self, Kl, Losses, Weighting};
use half::{bf16, f16};
use pyo3::exceptions::{PyIndexError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs a kernel without holding the interpreter; a panic, which would be a bug of ours, becomes a `RuntimeError`.
fn released<R: Send>(py: Python, kernel: impl FnOnce() -> R + Send) -> PyResult<R> {
    py.detach(|| catch_unwind(AssertUnwindSafe(kernel))).map_err(|panic| {
        let message = panic
            .downcast_ref::<&str>()
            .map(ToString::to_string)
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_default();
        PyRuntimeError::new_err(format!("a kernel of rgd failed: {message}"))
    })
}

/// `rgd.KL` or `rgd.KLBall`, by their fields.
fn read_weighting(weighting: &Bound<PyAny>) -> PyResult<Weighting> {
    let py = weighting.py();
    let number = |name: &Bound<'_, pyo3::types::PyString>| weighting.getattr(name)?.extract::<f64>();
    if weighting.hasattr(pyo3::intern!(py, "radius"))? {
        return Ok(Weighting::KlBall { radius: number(pyo3::intern!(py, "radius"))? });
    }
    Ok(Weighting::Kl(Kl {
        tau: number(pyo3::intern!(py, "tau"))?,
        scale: number(pyo3::intern!(py, "effective_scale"))?,
        normalize: weighting.getattr(pyo3::intern!(py, "normalize"))?.extract()?,
    }))
}

/// Evaluates `$body` with `$t` the Rust type of a float dtype.
macro_rules! for_float {
    ($dtype:expr, $name:literal, $t:ident => $body:expr) => {
        match $dtype {
            Dtype::F32 => {
                type $t = f32;
                $body
            }
            Dtype::F64 => {
                type $t = f64;
                $body
            }
            Dtype::F16 => {
                type $t = f16;
                $body
            }
            Dtype::Bf16 => {
                type $t = bf16;
                $body
            }
            other => Err(PyTypeError::new_err(format!(
                concat!($name, " must be float32, float64, float16 or bfloat16, got {:?}"),
                other
            ))),
        }
    };
}

fn same_shape(names: [&str; 2], a: &Tensor, b: &Tensor) -> PyResult<()> {
    if a.shape() == b.shape() {
        return Ok(());
    }
    Err(PyValueError::new_err(format!(
        "{} and {} must have the same shape, got {:?} and {:?}",
        names[0],
        names[1],
        a.shape(),
        b.shape()
    )))
}

#[pyfunction]
fn sample_weights(
    py: Python,
    losses: &Bound<PyAny>,
    weights: &Bound<PyAny>,
    weighting: &Bound<PyAny>,
    threads: usize,
) -> PyResult<()> {
    let weighting = read_weighting(weighting)?;
    let (losses, mut weights) = (Tensor::import("losses", losses)?, Tensor::import("weights", weights)?);
    same_shape(["losses", "weights"], &losses, &weights)?;
    distinct(&[&weights], &[&losses])?;
    for_float!(losses.dtype(), "losses", T => {
        let losses = Losses::new(losses.view::<T>()?);
        let weights = weights.slice_mut::<<T as Element>::Real>()?;
        released(py, || weights::sample_weights(&losses, weighting, weights, threads))
    })
}

#[pyfunction]
fn weighted_sum(py: Python, values: &Bound<PyAny>, weights: &Bound<PyAny>, threads: usize) -> PyResult<f64> {
    let (values, weights) = (Tensor::import("values", values)?, Tensor::import("weights", weights)?);
    same_shape(["values", "weights"], &values, &weights)?;
    for_float!(values.dtype(), "values", V => for_float!(weights.dtype(), "weights", W => {
        let (values, weights) = (Losses::new(values.view::<V>()?), Losses::new(weights.view::<W>()?));
        released(py, || reduce::weighted_sum(&values, &weights, threads))
    }))
}

type Sums = (usize, f64, f64, f64, f64, f64, f64, usize);

#[pyfunction]
fn weight_sums(
    py: Python,
    losses: &Bound<PyAny>,
    weights: &Bound<PyAny>,
    tau: f64,
    threads: usize,
) -> PyResult<Sums> {
    let (losses, weights) = (Tensor::import("losses", losses)?, Tensor::import("weights", weights)?);
    same_shape(["losses", "weights"], &losses, &weights)?;
    for_float!(losses.dtype(), "losses", V => for_float!(weights.dtype(), "weights", W => {
        let (losses, weights) = (Losses::new(losses.view::<V>()?), Losses::new(weights.view::<W>()?));
        let s = released(py, || reduce::sums(&losses, &weights, tau, threads))?;
        Ok((losses.len(), s.losses, s.weights, s.objective, s.squares, s.entropy, s.max, s.clipped))
    }))
}

/// The outputs of `cross_entropy`, as Python gave them.
struct Filled<'py> {
    losses: Tensor<'py>,
    weights: Tensor<'py>,
    objective: Tensor<'py>,
    grad: Option<Tensor<'py>>,
}

#[pyfunction]
#[allow(clippy::too_many_arguments)] // one for each tensor and setting; Python's front bundles them
fn cross_entropy(
    py: Python,
    logits: &Bound<PyAny>,
    target: &Bound<PyAny>,
    class_weight: Option<&Bound<PyAny>>,
    weighting: &Bound<PyAny>,
    ignore_index: i64,
    label_smoothing: f64,
    per_sample: bool,
    reduction: &str,
    losses: &Bound<PyAny>,
    weights: &Bound<PyAny>,
    objective: &Bound<PyAny>,
    grad: Option<&Bound<PyAny>>,
    threads: usize,
) -> PyResult<(f64, usize)> {
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
    let weighting = read_weighting(weighting)?;
    let settings = Settings { weighting, ignore_index, label_smoothing, per_sample, reduction, threads };
    let logits = Tensor::import("logits", logits)?;
    let target = Tensor::import("target", target)?;
    let class_weight = class_weight.map(|c| Tensor::import("weight", c)).transpose()?;
    let out = Filled {
        losses: Tensor::import("losses", losses)?,
        weights: Tensor::import("weights", weights)?,
        objective: Tensor::import("objective", objective)?,
        grad: grad.map(|g| Tensor::import("grad", g)).transpose()?,
    };
    let inputs: Vec<&Tensor> = [&logits, &target].into_iter().chain(&class_weight).collect();
    let outputs: Vec<&Tensor> =
        [&out.losses, &out.weights, &out.objective].into_iter().chain(&out.grad).collect();
    distinct(&outputs, &inputs)?;
    for_float!(logits.dtype(), "logits", T => fill::<T>(py, &logits, &target, class_weight.as_ref(), &settings, out))
}

fn fill<T: Element + HasDtype>(
    py: Python,
    logits: &Tensor,
    target: &Tensor,
    class_weight: Option<&Tensor>,
    settings: &Settings,
    mut out: Filled,
) -> PyResult<(f64, usize)>
where
    T::Real: HasDtype + Real,
{
    let logits = logits.view::<T>()?;
    let target = match target.dtype() {
        Dtype::I64 => Target::Int64(target.view()?),
        Dtype::I32 => Target::Int32(target.view()?),
        _ => Target::Probabilities(target.view::<T>()?),
    };
    let class_weight = class_weight.map(Tensor::slice::<T::Real>).transpose()?;
    let outputs = Outputs {
        losses: out.losses.slice_mut()?,
        weights: out.weights.slice_mut()?,
        objective: out.objective.slice_mut()?,
        grad: out.grad.as_mut().map(Tensor::view_mut).transpose()?,
    };
    let totals = released(py, || ce::cross_entropy(&logits, &target, class_weight, settings, outputs))?;
    match totals {
        Ok(totals) => Ok((totals.denominator, totals.counted)),
        Err(error @ ce::Error::OutOfRange { .. }) => Err(PyIndexError::new_err(error.to_string())),
        Err(error @ ce::Error::Shape(_)) => Err(PyValueError::new_err(error.to_string())),
    }
}

/// The XLA FFI handler of the fused cross-entropy, in the capsule that `jax.ffi.register_ffi_target` takes.
#[pyfunction]
fn xla_handler(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    // SAFETY: the interpreter is attached, the address is that of a function, which lives as long as the module's code,
    // and a capsule without a name is what jax expects.
    unsafe {
        let capsule = pyo3::ffi::PyCapsule_New(crate::xla::address().cast_mut(), std::ptr::null(), None);
        Bound::from_owned_ptr_or_err(py, capsule)
    }
}

#[pymodule]
fn _rgd(module: &Bound<PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(sample_weights, module)?)?;
    module.add_function(wrap_pyfunction!(weighted_sum, module)?)?;
    module.add_function(wrap_pyfunction!(weight_sums, module)?)?;
    module.add_function(wrap_pyfunction!(cross_entropy, module)?)?;
    module.add_function(wrap_pyfunction!(xla_handler, module)?)
}
