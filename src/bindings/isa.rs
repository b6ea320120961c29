//! The functions of `rgd._rgd` that tell the instruction set of the kernels.

use crate::numeric::InstructionSet;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Refuses an `RGD_ISA` that names no instruction set of this processor.
pub(super) fn check() -> PyResult<()> {
    isa().map(|_| ())
}

#[pyfunction]
pub(super) fn isa() -> PyResult<&'static str> {
    InstructionSet::chosen().map(InstructionSet::name).map_err(PyValueError::new_err)
}

#[pyfunction]
pub(super) fn available_isas() -> Vec<&'static str> {
    InstructionSet::available().into_iter().map(InstructionSet::name).collect()
}
