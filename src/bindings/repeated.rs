//! Computations that are made again and again, on tensors that lie elsewhere each time and else are alike.
//!
//! To describe six tensors through `DLPack` takes longer than to compute a hundred rows. So everything but the
//! addresses is read once, and a call passes the addresses.

use super::call::{for_float, read_weighting, released_on_team};
use super::cross_entropy::{read_reduction, read_settings, read_totals};
use super::tensor::{Dtype, HasDtype, Tensor};
use crate::cross_entropy::{self as ce, Gradient, Inputs, Memory, Outputs, Settings, Target};
use crate::layout::Vector;
use crate::numeric::{Element, Real};
use crate::reduce;
use crate::weightings::{self, Batch, Weighting};
use ndarray::{ArrayViewD, ArrayViewMutD, IxDyn};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use std::mem::MaybeUninit;

/// The arguments of `cross_entropy` that are the same in every call.
#[pyclass(frozen, module = "rgd._rgd")]
pub(super) struct RepeatedCrossEntropy {
    dtype: Dtype,
    shape: Vec<usize>,
    targets_shape: Vec<usize>,
    narrow: bool,
    weighting: Weighting,
    settings: Settings,
}

/// The addresses of a call's tensors, which are contiguous, and of which no output overlaps another. A tensor that the
/// call does not have is `None`.
struct Places {
    logits: usize,
    target: usize,
    measure: Option<usize>,
    groups: Option<usize>,
    state: Vec<Leaf>,
    losses: usize,
    weights: usize,
    objective: usize,
    grad: usize,
}

/// Where a leaf of a state lies, and whether it holds `i64` and not `f64`.
type Leaf = (usize, bool);

#[pymethods]
impl RepeatedCrossEntropy {
    #[new]
    #[pyo3(signature = (
        dtype, shape, narrow, kind, numbers, ignore_index, label_smoothing, per_sample, reduction, z_loss
    ))]
    #[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)] // one for each setting
    fn new(
        dtype: &str,
        shape: Vec<usize>,
        narrow: bool,
        kind: &str,
        numbers: Vec<f64>,
        ignore_index: i64,
        label_smoothing: f64,
        per_sample: bool,
        reduction: &str,
        z_loss: f64,
    ) -> PyResult<Self> {
        let dtype = read_dtype(dtype)?;
        let reduction = read_reduction(reduction)?;
        if shape.len() < 2 || shape.contains(&0) {
            return Err(PyValueError::new_err(format!(
                "a repeated call has logits of shape (N, C, ...) with elements, got {shape:?}"
            )));
        }
        let targets_shape = shape[..1].iter().chain(&shape[2..]).copied().collect();
        let settings = read_settings(ignore_index, label_smoothing, per_sample, reduction, 1, z_loss)?;
        Ok(Self { dtype, shape, targets_shape, narrow, weighting: read_weighting(kind, &numbers)?, settings })
    }

    /// The divisor of "mean", how many targets take part, and how many the measure lets take part. `None`, and nothing
    /// is written, for a measure that only the front can take or refuse.
    #[pyo3(signature = (
        logits, target, losses, weights, objective, grad, threads, class_weight, logit_adjustment,
        measure=None, groups=None, state=vec![]
    ))]
    #[allow(clippy::too_many_arguments)] // one for each tensor
    fn __call__(
        &self,
        py: Python,
        logits: usize,
        target: usize,
        losses: usize,
        weights: usize,
        objective: usize,
        grad: usize,
        threads: usize,
        class_weight: Option<&Bound<PyAny>>,
        logit_adjustment: Option<&Bound<PyAny>>,
        measure: Option<usize>,
        groups: Option<usize>,
        state: Vec<Leaf>,
    ) -> PyResult<Option<(f64, usize, usize)>> {
        let places = Places { logits, target, measure, groups, state, losses, weights, objective, grad };
        let class_weight = class_weight.map(|c| Tensor::import("weight", c)).transpose()?;
        let adjustment = logit_adjustment.map(|a| Tensor::import("logit_adjustment", a)).transpose()?;
        let by_class = [class_weight.as_ref(), adjustment.as_ref()];
        for_float!(self.dtype, "logits", T => self.compute::<T>(py, &places, by_class, threads))
    }
}

impl RepeatedCrossEntropy {
    fn compute<T: Element<Real: HasDtype> + HasDtype>(
        &self,
        py: Python,
        places: &Places,
        [class_weight, logit_adjustment]: [Option<&Tensor>; 2],
        threads: usize,
    ) -> PyResult<Option<(f64, usize, usize)>> {
        let targets = self.targets_shape.iter().product();
        let units = if self.settings.per_sample { self.shape[0] } else { targets };
        let logits = view::<T>(places.logits, &self.shape)?;
        let target = if self.narrow {
            Target::Int32(view(places.target, &self.targets_shape)?)
        } else {
            Target::Int64(view(places.target, &self.targets_shape)?)
        };
        let (mut measure, mut power, mut offered) = (None, 1.0, targets);
        if let Some(address) = places.measure {
            let given = view::<T::Real>(address, &[units])?;
            let divides = self.settings.reduction == ce::Reduction::Mean;
            let Some(scaled) = scaled(given.iter().copied(), divides) else { return Ok(None) };
            let some = scaled.0.iter().filter(|&&p| p != T::Real::default()).count();
            (measure, power, offered) = (Some(scaled.0), scaled.1, some * (targets / units));
        }
        let inputs = Inputs {
            logits,
            target,
            class_weight: class_weight.map(Tensor::slice).transpose()?,
            logit_adjustment: logit_adjustment.map(Tensor::slice).transpose()?,
            measure: measure.as_deref(),
        };
        let groups: Option<Vec<i64>> = places
            .groups
            .map(|groups| Ok::<_, PyErr>(view(groups, &[units])?.iter().copied().collect()))
            .transpose()?;
        let lengths = self.weighting.state_lengths();
        if lengths.len() != places.state.len() {
            return Err(PyValueError::new_err("a state with other leaves than the weighting's"));
        }
        let leaves = places.state.iter().zip(&lengths);
        let mut state = leaves
            .clone()
            .map(|(&leaf, &length)| read_leaf(leaf, length))
            .collect::<PyResult<Vec<Vec<f64>>>>()?;
        let grad: *mut MaybeUninit<T> = pointer(places.grad)?;
        let mut reduced = [MaybeUninit::<T::Real>::uninit()];
        let parts = self.settings.reduction == ce::Reduction::None;
        // SAFETY: the caller vouches for the outputs: contiguous memory of these lengths and types that no other
        // argument shares. `pointer` has checked that they are there and aligned.
        let out = unsafe {
            Outputs {
                losses: std::slice::from_raw_parts_mut(pointer(places.losses)?, targets),
                weights: std::slice::from_raw_parts_mut(pointer(places.weights)?, units),
                objective: if parts {
                    std::slice::from_raw_parts_mut(pointer(places.objective)?, targets)
                } else {
                    &mut reduced
                },
                grad: Gradient::Separate(ArrayViewMutD::from_shape_ptr(IxDyn(&self.shape), grad)),
            }
        };
        let settings = Settings { threads, ..self.settings };
        let memory = Memory { groups: groups.as_deref(), state: &mut state };
        let (divisor, count) = read_totals(released_on_team(py, || {
            ce::cross_entropy_with(&inputs, self.weighting, memory, &settings, out)
        })?)?;
        for ((&leaf, &length), numbers) in leaves.zip(&state) {
            write_leaf(leaf, length, numbers)?;
        }
        if !parts {
            let objective: *mut T = pointer(places.objective)?;
            // SAFETY: as above; the kernel has written the objective.
            unsafe { objective.write(T::narrow(reduced[0].assume_init())) };
        }
        Ok(Some((divisor * power, count, offered)))
    }
}

/// The numbers of a leaf of a state.
fn read_leaf((address, integers): Leaf, length: usize) -> PyResult<Vec<f64>> {
    Ok(if integers {
        view::<i64>(address, &[length])?.iter().map(|&number| number as f64).collect()
    } else {
        view::<f64>(address, &[length])?.iter().copied().collect()
    })
}

/// Writes the numbers of a leaf of a state.
fn write_leaf((address, integers): Leaf, length: usize, numbers: &[f64]) -> PyResult<()> {
    // SAFETY: the caller vouches for the leaves: contiguous memory of these lengths that it lets nobody else use
    // meanwhile. `pointer` checks that they are there and aligned.
    unsafe {
        if integers {
            let leaf = std::slice::from_raw_parts_mut(pointer::<i64>(address)?, length);
            leaf.iter_mut().zip(numbers).for_each(|(leaf, &number)| *leaf = number as i64);
        } else {
            std::slice::from_raw_parts_mut(pointer::<f64>(address)?, length).copy_from_slice(numbers);
        }
    }
    Ok(())
}

/// A base measure over a power of two, and that power, as `rgd.torch` divides what it was given. `None` if a
/// number is negative, not finite or above 1e18, or if the largest is below 1e-18 and not 0.
fn scaled<A: Real>(measure: impl Iterator<Item = A> + Clone, divides: bool) -> Option<(Vec<A>, f64)> {
    let mut largest = 0.0;
    for p in measure.clone() {
        let p = p.to_f64();
        if !(0.0..=1e18).contains(&p) {
            return None;
        }
        largest = if p > largest { p } else { largest };
    }
    if largest != 0.0 && largest < 1e-18 {
        return None;
    }
    let power = if divides && largest != 0.0 { power_above(largest) } else { 1.0 };
    Some((measure.map(|p| A::from_f64(p.to_f64() / power)).collect(), power))
}

/// The smallest power of two that is not below a normal number.
fn power_above(x: f64) -> f64 {
    const MANTISSA: u64 = (1 << 52) - 1;
    let below = f64::from_bits(x.to_bits() & !MANTISSA);
    if below == x { x } else { 2.0 * below }
}

/// The arguments of `sample_weights` that are the same in every call.
#[pyclass(frozen, module = "rgd._rgd")]
pub(super) struct RepeatedWeights {
    dtype: Dtype,
    weighting: Weighting,
}

#[pymethods]
impl RepeatedWeights {
    #[new]
    #[allow(clippy::needless_pass_by_value)] // PyO3 reads a sequence as a vector only
    fn new(dtype: &str, kind: &str, numbers: Vec<f64>) -> PyResult<Self> {
        Ok(Self { dtype: read_dtype(dtype)?, weighting: read_weighting(kind, &numbers)? })
    }

    fn __call__(
        &self,
        py: Python,
        losses: usize,
        weights: usize,
        count: usize,
        threads: usize,
    ) -> PyResult<()> {
        if count == 0 {
            return Ok(());
        }
        for_float!(self.dtype, "losses", T => self.fill::<T>(py, losses, weights, count, threads))
    }

    /// Weights, the objective of losses that are float32 or float64, and the factor of each loss in it: `w`, over
    /// `count` for "mean".
    #[allow(clippy::too_many_arguments)] // one for each tensor
    fn objective(
        &self,
        py: Python,
        losses: usize,
        weights: usize,
        objective: usize,
        factors: usize,
        count: usize,
        threads: usize,
        reduction: &str,
    ) -> PyResult<()> {
        let reduction = read_reduction(reduction)?;
        if count == 0 {
            return Err(PyValueError::new_err("there are no losses to reduce"));
        }
        let places = [losses, weights, objective, factors];
        match self.dtype {
            Dtype::F32 => self.reduce::<f32>(py, places, count, threads, reduction),
            Dtype::F64 => self.reduce::<f64>(py, places, count, threads, reduction),
            _ => {
                Err(PyTypeError::new_err("losses must be float32 or float64 for an objective of their dtype"))
            }
        }
    }
}

impl RepeatedWeights {
    fn fill<T: Element<Real: HasDtype> + HasDtype>(
        &self,
        py: Python,
        losses: usize,
        weights: usize,
        count: usize,
        threads: usize,
    ) -> PyResult<()> {
        let losses = Vector::new(view::<T>(losses, &[count])?);
        let batch = Batch::new(&losses, None, None, threads);
        // SAFETY: as above; the weights are as many numbers of the accumulator's type, which nothing shares.
        let weights: &mut [MaybeUninit<T::Real>] =
            unsafe { std::slice::from_raw_parts_mut(pointer(weights)?, count) };
        released_on_team(py, || weightings::sample_weights(&batch, self.weighting, &mut [], weights))?
            .map_err(|error| PyValueError::new_err(error.to_string()))
    }

    fn reduce<A: Real + Element<Real = A> + HasDtype>(
        &self,
        py: Python,
        [losses, weights, objective, factors]: [usize; 4],
        count: usize,
        threads: usize,
        reduction: ce::Reduction,
    ) -> PyResult<()> {
        self.fill::<A>(py, losses, weights, count, threads)?;
        let (losses, weights) = (view::<A>(losses, &[count])?, view::<A>(weights, &[count])?);
        let values = if reduction == ce::Reduction::None { count } else { 1 };
        // SAFETY: as above, for outputs of the losses' type that nothing shares.
        let (objective, factors): (&mut [MaybeUninit<A>], &mut [MaybeUninit<A>]) = unsafe {
            (
                std::slice::from_raw_parts_mut(pointer(objective)?, values),
                std::slice::from_raw_parts_mut(pointer(factors)?, count),
            )
        };
        released_on_team(py, || {
            #[allow(clippy::cast_precision_loss)] // a count
            let divisor = if reduction == ce::Reduction::Mean { count as f64 } else { 1.0 };
            for (factor, weight) in factors.iter_mut().zip(&weights) {
                factor.write(A::from_f64(weight.to_f64() / divisor));
            }
            if reduction == ce::Reduction::None {
                for ((product, &loss), &weight) in objective.iter_mut().zip(&losses).zip(&weights) {
                    product.write(reduce::product(weight, loss));
                }
            } else {
                let sum = reduce::weighted_sum(&Vector::new(losses), &Vector::new(weights), None, threads);
                objective[0].write(A::from_f64(sum / divisor));
            }
        })
    }
}

fn read_dtype(dtype: &str) -> PyResult<Dtype> {
    match dtype {
        "float64" => Ok(Dtype::F64),
        "float32" => Ok(Dtype::F32),
        "float16" => Ok(Dtype::F16),
        "bfloat16" => Ok(Dtype::Bf16),
        other => Err(PyTypeError::new_err(format!(
            "dtype must be float64, float32, float16 or bfloat16, got {other}"
        ))),
    }
}

fn view<'a, T>(address: usize, shape: &[usize]) -> PyResult<ArrayViewD<'a, T>> {
    let first: *mut T = pointer(address)?;
    // SAFETY: the caller vouches for the inputs: contiguous memory of this shape and type that stays during the call.
    Ok(unsafe { ArrayViewD::from_shape_ptr(IxDyn(shape), first.cast_const()) })
}

fn pointer<T>(address: usize) -> PyResult<*mut T> {
    if address == 0 || !address.is_multiple_of(align_of::<T>()) {
        return Err(PyValueError::new_err("a tensor has elements and no data, or lies at an odd address"));
    }
    Ok(std::ptr::with_exposed_provenance_mut(address))
}
