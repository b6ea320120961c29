//! The kernels of Re-weighted Gradient Descent (RGD), and the Python extension `rgd._rgd` that serves them.
//!
//! Kernels come first and know neither Python nor `DLPack`: [`weights`] turns losses into KL-DRO sample weights,
//! [`cross_entropy`] turns logits into losses, weights and the gradient of the re-weighted objective, [`reduce`] sums.
//! They stand on [`simd`] (lane arithmetic and the choice of instruction set), [`layout`] (strided tensors) and
//! [`parallel`] (the thread pool). With the feature `python`, `tensor` reads `NumPy` arrays and `DLPack` tensors into
//! typed views and `python` checks arguments and releases the interpreter.
//!
//! Source of the mathematics: Kumar, Majmundar, Nagaraj, Suggala, "Stochastic Re-weighted Gradient Descent via
//! Distributionally Robust Optimization", TMLR 2024, arXiv 2306.09222.

pub mod cross_entropy;
pub mod layout;
pub mod parallel;
pub mod reduce;
pub mod simd;
pub mod weights;

#[cfg(feature = "python")]
mod python;
#[cfg(feature = "python")]
mod tensor;
#[cfg(feature = "python")]
mod xla;
