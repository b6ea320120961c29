//! The kernels of Re-weighted Gradient Descent (RGD), and the Python extension `rgd._rgd` that serves them.
//!
//! Kernels know neither Python nor `DLPack`: [`weightings`] turns losses into sample weights, one file a member of the
//! family; [`cross_entropy`] turns logits into losses, weights and the gradient of the re-weighted objective;
//! [`reduce`] sums; [`boosting`] fills the derivatives for boosted trees. They use [`numeric`] (float types, `exp` and
//! `ln`, the choice of instruction set), [`layout`] (strided tensors) and [`parallel`] (the thread pool). `team` runs
//! work on the threads of the host program's OpenMP library, `parts` is what threads share, and `job` what those of XLA
//! share.
//!
//! With the feature `python`, `bindings` holds the Python module: `tensor` reads `NumPy` arrays and `DLPack` tensors as
//! typed views, `call` reads arguments and releases the interpreter, `weights`, `cross_entropy` and `boosting` hold the
//! functions, and `xla` holds the custom call for JAX.
//!
//! Source of the mathematics: Kumar, Majmundar, Nagaraj, Suggala, "Stochastic Re-weighted Gradient Descent via
//! Distributionally Robust Optimization", TMLR 2024, arXiv 2306.09222.

pub mod boosting;
pub mod cross_entropy;
#[cfg(any(feature = "python", loom))]
mod job;
pub mod layout;
#[cfg(all(test, loom))]
mod models;
pub mod numeric;
pub mod parallel;
mod parts;
pub mod reduce;
mod team;
pub mod weightings;

#[cfg(feature = "python")]
mod bindings;
