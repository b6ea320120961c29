//! The edges of the crate: the only rooms that know Python, `DLPack` and XLA. They check and translate; kernels compute.

mod boosting;
mod python;
mod tensor;
mod xla;
