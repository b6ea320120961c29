//! The threads that kernels run on where the host program has its own.

use crate::parallel::{has_openmp, set_openmp};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::ffi::c_void;

/// Lets the kernels of the torch front run on the threads of an OpenMP library, given the address of its
/// `GOMP_parallel`. The library must stay loaded. Only the first call has an effect.
#[pyfunction]
pub(super) fn share_threads(gomp_parallel: usize) -> PyResult<()> {
    if gomp_parallel == 0 {
        return Err(PyValueError::new_err("0 is the address of no function"));
    }
    // SAFETY: the front has found the address in a library that torch needs.
    unsafe { set_openmp(gomp_parallel as *const c_void) };
    Ok(())
}

/// Whether they do in this process: a child of `fork` has threads of its own.
#[pyfunction]
pub(super) fn shares_threads() -> bool {
    has_openmp()
}
