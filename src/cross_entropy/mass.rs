//! The mass of a target over the classes: how it splits into a part on the label and a soft part over all classes.
//!
//! With class weights `c`, smoothing `e` and `C` classes, a label `y` has `(1 - e) c_y` on `y` and `t_k = e c_k / C` on
//! every class; a distribution `q` has `t_k = c_k ((1 - e) q_k + e / C)` and nothing apart.

use super::arguments::Target;
use crate::layout::Shared;
use crate::numeric::{Element, LANES, Real, read_tile};
use crate::parallel::with_capacity;
use crate::reduce;

/// The soft part `t` of a target's mass.
pub(super) enum SoftMass<T: Element> {
    /// None: the mass lies on the label.
    Nothing,
    /// `label_smoothing / C * c_k`, and its sum over the classes.
    Smoothing { mass: Vec<T::Real>, total: T::Real },
    /// `slope_k q_k + mass_k = c_k ((1 - label_smoothing) q_k + label_smoothing / C)` of probabilities `q`.
    Probabilities { q: Shared<T>, class_stride: isize, slope: Vec<T::Real>, mass: Vec<T::Real> },
}

impl<T: Element> SoftMass<T> {
    /// Keeps the address of class probabilities, which must stay borrowed as long as this is used.
    pub fn new(
        target: &Target<T>,
        classes: usize,
        class_weight: Option<&[T::Real]>,
        label_smoothing: f64,
    ) -> Self {
        let weighted = |x: f64| -> Vec<T::Real> {
            let mut masses = with_capacity(classes);
            masses.extend(
                (0..classes).map(|k| T::Real::from_f64(class_weight.map_or(x, |c| c[k].to_f64() * x))),
            );
            masses
        };
        let smoothing = label_smoothing / classes as f64;
        match target {
            Target::Probabilities(p) => Self::Probabilities {
                q: Shared(p.as_ptr().cast_mut()),
                class_stride: p.strides()[usize::from(p.ndim() > 1)],
                slope: weighted(1.0 - label_smoothing),
                mass: weighted(smoothing),
            },
            _ if label_smoothing == 0.0 => Self::Nothing,
            _ => {
                let mass = weighted(smoothing);
                let total = T::Real::from_f64(reduce::total(mass.iter().map(|t| t.to_f64())));
                Self::Smoothing { mass, total }
            }
        }
    }

    pub fn is_some(&self) -> bool {
        !matches!(self, Self::Nothing)
    }

    pub fn is_probabilities(&self) -> bool {
        matches!(self, Self::Probabilities { .. })
    }
}

/// `t z`, and 0 where a class has no mass: a logit of -inf is then worth nothing. A NaN logit reaches the loss by the
/// sum of exponentials.
#[inline(always)]
pub(super) fn times<A: Real>(t: A, z: A) -> A {
    if t == A::default() { t } else { t * z }
}

/// The soft mass `t` of a row.
pub(super) trait RowMass<A> {
    /// Whether there is any.
    const SOME: bool;

    /// That of the classes from `k` on.
    ///
    /// # Safety
    /// There are [`LANES`] of them.
    unsafe fn tile(&self, k: usize) -> [A; LANES];

    /// That of class `k`.
    fn at(&self, k: usize) -> A;
}

pub(super) struct NoMass;
impl<A: Real> RowMass<A> for NoMass {
    const SOME: bool = false;
    #[inline(always)]
    unsafe fn tile(&self, _: usize) -> [A; LANES] {
        [A::default(); LANES]
    }
    #[inline(always)]
    fn at(&self, _: usize) -> A {
        A::default()
    }
}

pub(super) struct SmoothingMass<'a, A>(pub &'a [A]);
impl<A: Real> RowMass<A> for SmoothingMass<'_, A> {
    const SOME: bool = true;
    #[inline(always)]
    unsafe fn tile(&self, k: usize) -> [A; LANES] {
        // SAFETY: what the caller promises.
        unsafe { read_tile(self.0.as_ptr().add(k)) }
    }
    #[inline(always)]
    fn at(&self, k: usize) -> A {
        self.0[k]
    }
}

pub(super) struct ProbabilityMass<'a, T: Element>(pub &'a [T], pub &'a [T::Real], pub &'a [T::Real]);
impl<T: Element> RowMass<T::Real> for ProbabilityMass<'_, T> {
    const SOME: bool = true;
    #[inline(always)]
    unsafe fn tile(&self, k: usize) -> [T::Real; LANES] {
        // SAFETY: what the caller promises.
        let (q, slope, mass) = unsafe {
            let Self(q, slope, mass) = self;
            (read_tile(q.as_ptr().add(k)), read_tile(slope.as_ptr().add(k)), read_tile(mass.as_ptr().add(k)))
        };
        let mut tile = mass;
        for lane in 0..LANES {
            tile[lane] = q[lane].widen() * slope[lane] + mass[lane];
        }
        tile
    }
    #[inline(always)]
    fn at(&self, k: usize) -> T::Real {
        self.0[k].widen() * self.1[k] + self.2[k]
    }
}
