//! `rgd._rgd`: one function per kernel. Arguments are checked, the interpreter is released, a panic becomes an error.
//!
//! The functions are private to the Python package, whose fronts allocate the outputs; `python/rgd/_rgd.pyi` describes
//! them.

use super::tensor::{Borrowed, Dtype, HasDtype, Tensor, distinct};
use super::{boosting, xla};
use crate::cross_entropy::{
    self as ce, Given, Gradient, Inputs, Outputs, Overwrite, Reduction, Settings, Target, Totals,
};
use crate::layout::{Values, Vector};
use crate::numeric::Element;
use crate::parallel::{Stop, watch};
use crate::reduce;
use crate::weightings::{self, Weighting};
use half::{bf16, f16};
use pyo3::exceptions::{
    PyIndexError, PyKeyboardInterrupt, PyMemoryError, PyRuntimeError, PyTypeError, PyValueError,
};
use pyo3::prelude::*;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    /// What a signal's handler has raised while this thread was in a kernel.
    static RAISED: Cell<Option<PyErr>> = const { Cell::new(None) };
}

/// Runs the handlers of signals that have come in; whether one has raised an error, as that of Ctrl-C does.
fn interrupted() -> bool {
    // On any other thread than the main one this finds nothing. A daemon thread's kernel may outlive the interpreter, to
    // which nothing can be attached then.
    #[expect(clippy::redundant_closure_for_method_calls, reason = "the method is of one lifetime only")]
    let raised = Python::try_attach(|py| py.check_signals()).and_then(Result::err);
    let found = raised.is_some();
    RAISED.set(raised);
    found
}

/// Runs a kernel without holding the interpreter. One that ran out of memory becomes a `MemoryError`, one that was
/// interrupted what the signal's handler raised; a panic, which would be a bug of ours, becomes a `RuntimeError`.
pub(super) fn released<R: Send>(py: Python, kernel: impl FnOnce() -> R + Send) -> PyResult<R> {
    py.detach(|| catch_unwind(AssertUnwindSafe(|| watch(interrupted, kernel)))).map_err(|panic| {
        match panic.downcast_ref::<Stop>() {
            Some(Stop::Interrupted) => {
                return RAISED.take().unwrap_or_else(|| PyKeyboardInterrupt::new_err(()));
            }
            Some(Stop::OutOfMemory(bytes)) => {
                return PyMemoryError::new_err(format!(
                    "rgd could not allocate {bytes} bytes ({:.1} GiB) of working memory: give fewer samples or classes \
                     at a time, or fewer threads",
                    *bytes as f64 / f64::from(1 << 30)
                ));
            }
            None => {}
        }
        let message = panic
            .downcast_ref::<&str>()
            .map(ToString::to_string)
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_default();
        PyRuntimeError::new_err(format!("a kernel of rgd failed: {message}"))
    })
}

pub(super) fn read_weighting(kind: &str, numbers: &[f64]) -> PyResult<Weighting> {
    Weighting::new(kind, numbers).map_err(|error| PyValueError::new_err(error.to_string()))
}

/// Evaluates `$body` with `$t` the Rust type of a float dtype.
macro_rules! for_float {
    ($dtype:expr, $name:expr, $t:ident => $body:expr) => {
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
                "{} must be float32, float64, float16 or bfloat16, got {other}",
                $name
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

/// The elements of a float tensor, whatever its dtype.
pub(super) fn values<'a>(name: &'static str, tensor: &'a Tensor) -> PyResult<Box<dyn Values + Send + 'a>> {
    for_float!(tensor.dtype(), name, T => Ok(Box::new(Vector::new(tensor.view::<T>()?))))
}

#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // PyO3 reads a sequence of numbers as a vector only
fn sample_weights(
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
fn widen(py: Python, values: &Bound<PyAny>, out: &Bound<PyAny>, threads: usize) -> PyResult<()> {
    let (read, mut out) = (Tensor::import("values", values)?, Tensor::import("out", out)?);
    same_shape(["values", "out"], &read, &out)?;
    distinct(&[&out], &[&read])?;
    let (values, out) = (self::values("values", &read)?, out.slice_mut::<f64>()?);
    released(py, || reduce::widen(&*values, out, threads))
}

#[pyfunction]
#[pyo3(signature = (values, weights, base, threads))]
fn weighted_sum(
    py: Python,
    values: &Bound<PyAny>,
    weights: &Bound<PyAny>,
    base: Option<&Bound<PyAny>>,
    threads: usize,
) -> PyResult<f64> {
    let (read, weights) = (Tensor::import("values", values)?, Tensor::import("weights", weights)?);
    same_shape(["values", "weights"], &read, &weights)?;
    let base = base.map(|base| Tensor::import("base", base)).transpose()?;
    if let Some(base) = &base {
        same_shape(["values", "base"], &read, base)?;
    }
    let (values, weights) = (self::values("values", &read)?, self::values("weights", &weights)?);
    let base = base.as_ref().map(|base| self::values("base", base)).transpose()?;
    released(py, || reduce::weighted_sum(&*values, &*weights, base.as_deref().map(|base| base as _), threads))
}

type Sums = (usize, f64, f64, f64, f64, f64, f64, f64, f64);

#[pyfunction]
#[pyo3(signature = (losses, weights, base, clip, threads))]
fn weight_sums(
    py: Python,
    losses: &Bound<PyAny>,
    weights: &Bound<PyAny>,
    base: Option<&Bound<PyAny>>,
    clip: f64,
    threads: usize,
) -> PyResult<Sums> {
    let (losses, weights) = (Tensor::import("losses", losses)?, Tensor::import("weights", weights)?);
    same_shape(["losses", "weights"], &losses, &weights)?;
    let base = base.map(|base| Tensor::import("base", base)).transpose()?;
    if let Some(base) = &base {
        same_shape(["losses", "base"], &losses, base)?;
    }
    let (losses, weights) = (values("losses", &losses)?, values("weights", &weights)?);
    let base = base.as_ref().map(|base| values("base", base)).transpose()?;
    let s = released(py, || {
        reduce::weight_sums(&*losses, &*weights, base.as_deref().map(|base| base as _), clip, threads)
    })?;
    Ok((s.count, s.mass, s.loss, s.weight, s.objective, s.square, s.entropy, s.largest, s.clipped))
}

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

    /// Refuses outputs that share memory with each other, with these inputs or with `others`. A gradient that is the very
    /// tensor of the logits is allowed: then the logits are an output.
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
        // SAFETY: the view that is dropped here says that the logits, which are the same tensor, may be written and do not
        // overlap themselves; `distinct_from` has seen to it that no other argument overlaps them, and Python's caller
        // promises that nobody touches an output during the call.
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
fn cross_entropy(
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
fn cross_entropy_losses(
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
fn cross_entropy_gradient(
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
fn label_out_of_range(label: i64, position: Vec<usize>, classes: usize) -> String {
    ce::Error::OutOfRange { index: label, position, classes }.to_string()
}

/// The XLA FFI handler of the fused cross-entropy, in the capsule that `jax.ffi.register_ffi_target` takes.
#[pyfunction]
fn xla_handler(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    // SAFETY: the interpreter is attached, the address is that of a function, which lives as long as the module's code,
    // and a capsule without a name is what jax expects.
    unsafe {
        let capsule = pyo3::ffi::PyCapsule_New(xla::address().cast_mut(), std::ptr::null(), None);
        Bound::from_owned_ptr_or_err(py, capsule)
    }
}

#[pymodule]
fn _rgd(module: &Bound<PyModule>) -> PyResult<()> {
    module.add_class::<Borrowed>()?;
    module.add_function(wrap_pyfunction!(sample_weights, module)?)?;
    module.add_function(wrap_pyfunction!(widen, module)?)?;
    module.add_function(wrap_pyfunction!(weighted_sum, module)?)?;
    module.add_function(wrap_pyfunction!(weight_sums, module)?)?;
    module.add_function(wrap_pyfunction!(cross_entropy, module)?)?;
    module.add_function(wrap_pyfunction!(cross_entropy_losses, module)?)?;
    module.add_function(wrap_pyfunction!(cross_entropy_gradient, module)?)?;
    module.add_function(wrap_pyfunction!(boosting::boosting_losses, module)?)?;
    module.add_function(wrap_pyfunction!(boosting::boosting_derivatives, module)?)?;
    module.add_function(wrap_pyfunction!(label_out_of_range, module)?)?;
    module.add_function(wrap_pyfunction!(xla_handler, module)?)
}
