//! The bindings: the only modules that know Python, `DLPack` and XLA. They check and translate; the kernels
//! compute.
//!
//! `rgd._rgd` has one function for each kernel. They are private to the Python package, whose fronts allocate the
//! outputs; `python/rgd/_rgd.pyi` describes them.

mod boosting;
mod call;
mod cross_entropy;
mod isa;
mod repeated;
mod tensor;
mod threads;
mod weights;
mod xla;
mod xla_api;
mod xla_pool;

use pyo3::prelude::*;

#[pymodule]
mod _rgd {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::boosting::{boosting_derivatives, boosting_losses};
    #[pymodule_export]
    use super::cross_entropy::{
        cross_entropy, cross_entropy_extras, cross_entropy_gradient, cross_entropy_losses,
        cross_entropy_rows, cross_entropy_rows_gradient, label_out_of_range,
    };
    #[pymodule_export]
    use super::isa::{available_isas, isa};
    #[pymodule_export]
    use super::repeated::{RepeatedCrossEntropy, RepeatedWeights};
    #[pymodule_export]
    use super::tensor::Borrowed;
    #[pymodule_export]
    use super::threads::{share_threads, shares_threads};
    #[pymodule_export]
    use super::weights::{sample_weights, weight_sums, weighted_sum, widen};
    #[pymodule_export]
    use super::xla::xla_handler;

    #[pymodule_init]
    fn init(_module: &Bound<'_, PyModule>) -> PyResult<()> {
        super::isa::check()
    }
}
