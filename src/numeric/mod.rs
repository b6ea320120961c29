//! The arithmetic of the kernels: float types, the exponential and the logarithm, and the choice of an instruction set.
//!
//! [`isa`] compiles a kernel once for each instruction set, [`element`] says which floats tensors hold and which floats
//! are computed in, [`exp_ln`] computes `exp` and `ln` without branches, so that loops over them become vector code.

pub mod element;
pub mod exp_ln;
pub mod isa;

pub use element::{Element, Real};
pub use exp_ln::{exp, ln, two_difference, two_product};
pub use isa::{Isa, Kernel, LANES, dispatch};
