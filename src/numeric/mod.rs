//! The arithmetic of the kernels: float types, `exp` and `ln`, and the choice of an instruction set.
//!
//! [`isa`] compiles a kernel once for each instruction set, [`exp_ln`] computes `exp` and `ln` without branches, so
//! that loops over them become vector code, [`element`] says which floats tensors hold and which floats are computed
//! in, and [`tile`] reads and writes as many numbers as a step of a kernel has lanes.

pub mod element;
pub mod exp_ln;
pub mod isa;
pub mod tile;

pub use element::{Element, Real};
pub use exp_ln::{exp, exp_m1_nonpositive, exp_to_f32, ln, two_difference, two_product};
pub use isa::{InstructionSet, Isa, Kernel, LANES, MulAdd, dispatch};
pub use tile::{read_tile, write_tile};
