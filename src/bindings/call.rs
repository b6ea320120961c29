//! Steps that all functions of `rgd._rgd` share: read arguments, release the interpreter, turn a panic into an error.

use super::tensor::Tensor;
use crate::layout::{Values, Vector};
use crate::parallel::{Stop, on_team, watch};
use crate::weightings::Weighting;
use pyo3::exceptions::{PyKeyboardInterrupt, PyMemoryError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    /// The error that a signal's handler raised while this thread was in a kernel.
    static RAISED: Cell<Option<PyErr>> = const { Cell::new(None) };
}

/// Runs the handlers of pending signals. True if one has raised an error, as that of Ctrl-C does.
fn interrupted() -> bool {
    // Python runs signal handlers on the main thread only. The kernel of a daemon thread may run longer than the
    // interpreter; attaching fails then.
    #[expect(clippy::redundant_closure_for_method_calls, reason = "the method is of one lifetime only")]
    let raised = Python::try_attach(|py| py.check_signals()).and_then(Result::err);
    let found = raised.is_some();
    RAISED.set(raised);
    found
}

/// Runs a kernel without holding the interpreter. If the kernel runs out of memory, this is a `MemoryError`; if it is
/// interrupted, the error of the signal's handler. A panic, which would be a bug of ours, becomes a `RuntimeError`.
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

/// The same for kernels of the torch front, whose blocks may run on torch's own threads.
pub(super) fn released_on_team<R: Send>(py: Python, kernel: impl FnOnce() -> R + Send) -> PyResult<R> {
    released(py, || on_team(kernel))
}

pub(super) fn read_weighting(kind: &str, numbers: &[f64]) -> PyResult<Weighting> {
    Weighting::new(kind, numbers).map_err(|error| PyValueError::new_err(error.to_string()))
}

/// Evaluates `$body` with `$t` the Rust type of a float dtype.
macro_rules! for_float {
    ($dtype:expr, $name:expr, $t:ident => $body:expr) => {
        match $dtype {
            $crate::bindings::tensor::Dtype::F32 => {
                type $t = f32;
                $body
            }
            $crate::bindings::tensor::Dtype::F64 => {
                type $t = f64;
                $body
            }
            $crate::bindings::tensor::Dtype::F16 => {
                type $t = half::f16;
                $body
            }
            $crate::bindings::tensor::Dtype::Bf16 => {
                type $t = half::bf16;
                $body
            }
            other => Err(pyo3::exceptions::PyTypeError::new_err(format!(
                "{} must be float32, float64, float16 or bfloat16, got {other}",
                $name
            ))),
        }
    };
}
pub(super) use for_float;

pub(super) fn same_shape(names: [&str; 2], a: &Tensor, b: &Tensor) -> PyResult<()> {
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

/// The elements of a float tensor of any dtype.
pub(super) fn values<'a>(name: &'static str, tensor: &'a Tensor) -> PyResult<Box<dyn Values + Send + 'a>> {
    for_float!(tensor.dtype(), name, T => Ok(Box::new(Vector::new(tensor.view::<T>()?))))
}
