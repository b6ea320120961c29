//! What the logits of a target say beside its loss: their entropy, their logsumexp, and whether they put its class
//! first.
//!
//! With `m` the largest logit as adjusted, `S = sum_k exp(x_k - m)` and `q = softmax(x)`, the logsumexp is
//! `Z = m + log S`, and the entropy `H = -sum_k q_k log q_k = log S - sum_k exp(x_k - m) (x_k - m) / S`. A target is
//! correct if its class is the first of those with the largest logit; the class of a distribution is the first of those
//! with the largest probability.

use super::arguments::{Gradient, Inputs, PerTarget, Settings};
use super::labels::{Label, Labels};
use super::mass::SoftMass;
use super::problem::{BLOCK, Problem};
use super::shape::{Dimensions, Error};
use crate::layout::{Run, Shared};
use crate::numeric::{Element, Isa, Kernel, LANES, Real, dispatch, ln};
use crate::parallel::{filled, for_each_block};
use std::mem::MaybeUninit;

/// The results of [`extras`]: one number a target, 0 for a target that takes no part; `None` if a result is not wanted.
#[derive(Debug)]
pub struct Extras<'a, A> {
    /// The entropy, in nats.
    pub entropy: PerTarget<'a, A>,
    /// The logsumexp.
    pub logsumexp: PerTarget<'a, A>,
    /// 1 where the logits put the target's class first, else 0; 0 too where one of them is NaN.
    pub correct: PerTarget<'a, A>,
}

/// Fills the results that are wanted, in one pass over the logits. A row of them is in the cache at a time.
///
/// # Errors
/// [`Error::OutOfRange`] for a class index that is no class; [`Error::Shape`] where shapes do not fit.
pub fn extras<T: Element>(
    inputs: &Inputs<T>,
    settings: &Settings,
    out: Extras<T::Real>,
) -> Result<(), Error> {
    let dims = Dimensions::of(inputs, settings)?;
    for (name, wanted) in
        [("entropy", &out.entropy), ("logsumexp", &out.logsumexp), ("correct", &out.correct)]
    {
        dims.per_target(name, wanted.as_deref())?;
    }
    let (labels, _) = Labels::read(inputs, &dims, settings.ignore_index)?;
    let problem = Problem::new(inputs, &dims, &labels, settings, &mut Gradient::Unwanted);
    let address = |wanted: PerTarget<T::Real>| wanted.map(|slice| Shared(slice.as_mut_ptr()));
    let out = Addresses {
        entropy: address(out.entropy),
        logsumexp: address(out.logsumexp),
        correct: address(out.correct),
    };
    let size = (BLOCK / problem.classes.max(1)).max(1);
    for_each_block(dims.targets.div_ceil(size), settings.threads, |i| {
        let (start, end) = (i * size, dims.targets.min((i + 1) * size));
        dispatch(Targets { problem: &problem, out, start, end });
    });
    Ok(())
}

/// Where the numbers of each target go.
#[derive(Clone, Copy)]
struct Addresses<A> {
    entropy: Option<Shared<MaybeUninit<A>>>,
    logsumexp: Option<Shared<MaybeUninit<A>>>,
    correct: Option<Shared<MaybeUninit<A>>>,
}

/// The targets `start..end` of a problem, one after the other.
struct Targets<'a, 'b, T: Element> {
    problem: &'a Problem<'b, T>,
    out: Addresses<T::Real>,
    start: usize,
    end: usize,
}

impl<T: Element> Kernel for Targets<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let Self { problem: p, out, start, end } = self;
        let [x_step, _, q_step] = p.positions.inner();
        // Lanes beyond the classes are -inf, which adds nothing to any sum.
        let mut row = filled(p.classes.next_multiple_of(LANES), T::Real::NEG_INFINITY);
        for Run { position, length, offsets: [x, _, q] } in p.positions.runs(start, end) {
            for i in 0..length {
                let (target, at) = (position + i, i as isize);
                let label = p.labels.part(target, 1).map(|labels| labels[0]);
                // SAFETY: the offsets come from `Positions`, made of the shape and strides of the very views that the
                // addresses are of.
                let class = unsafe {
                    read_row(p, x + at * x_step, &mut row[..p.classes]);
                    class_of(p, label, q + at * q_step)
                };
                let counts = label.is_none_or(Label::counts);
                let (max, has_nan) = largest(&row);
                if out.entropy.is_some() || out.logsumexp.is_some() {
                    let (entropy, logsumexp) = if counts {
                        entropy_and_logsumexp::<T::Real, I>(&row, max, has_nan)
                    } else {
                        (0.0, 0.0)
                    };
                    write(out.entropy, target, T::Real::from_f64(entropy));
                    write(out.logsumexp, target, T::Real::from_f64(logsumexp));
                }
                let first = class.is_some_and(|y| row[y] == max && row[..y].iter().all(|&x| x != max));
                let correct = counts && first && !has_nan;
                write(out.correct, target, T::Real::from_f64(f64::from(u8::from(correct))));
            }
        }
    }
}

/// Writes the number of a target, where it is wanted.
#[inline(always)]
fn write<A>(out: Option<Shared<MaybeUninit<A>>>, target: usize, value: A) {
    if let Some(out) = out {
        // SAFETY: there is such a target, and a block writes what belongs to its own targets only.
        let own = unsafe { out.part(target, target + 1) };
        own[0].write(value);
    }
}

/// Reads a row of logits, widened and adjusted.
///
/// # Safety
/// The row begins at `offset` from the address of the logits.
#[inline(always)]
unsafe fn read_row<T: Element>(p: &Problem<T>, offset: isize, row: &mut [T::Real]) {
    // SAFETY: what the caller promises.
    let first = unsafe { p.logits.0.offset(offset) };
    if p.logits_class == 1 {
        // SAFETY: as above: the classes lie next to each other.
        let logits = unsafe { std::slice::from_raw_parts(first.cast_const(), p.classes) };
        for (x, &logit) in row.iter_mut().zip(logits) {
            *x = logit.widen();
        }
    } else {
        for (k, x) in row.iter_mut().enumerate() {
            // SAFETY: as above.
            *x = unsafe { first.offset(k as isize * p.logits_class).read() }.widen();
        }
    }
    if let Some(adjustment) = p.adjustment {
        for (x, &a) in row.iter_mut().zip(adjustment) {
            *x += a;
        }
    }
}

/// The class of a target: its label, or the most probable class; `None` where it takes no part.
///
/// # Safety
/// The probabilities of the target begin at `offset` from their address, where there are any.
#[inline(always)]
unsafe fn class_of<T: Element>(p: &Problem<T>, label: Option<Label>, offset: isize) -> Option<usize> {
    let SoftMass::Probabilities { q, class_stride, .. } = &p.soft else {
        return label.and_then(Label::class);
    };
    // SAFETY: what the caller promises.
    let probability = |k: usize| unsafe { q.0.offset(offset + k as isize * class_stride).read() }.widen();
    (0..p.classes).reduce(|best, k| if probability(k) > probability(best) { k } else { best })
}

/// The largest number of a row, and whether one of them is NaN, which is skipped.
#[inline(always)]
fn largest<A: Real>(row: &[A]) -> (A, bool) {
    let (mut max, mut equal) = ([A::NEG_INFINITY; LANES], [true; LANES]);
    for tile in row.chunks_exact(LANES) {
        for lane in 0..LANES {
            let x = tile[lane];
            max[lane] = if x > max[lane] { x } else { max[lane] };
            #[expect(clippy::eq_op, reason = "NaN alone differs from itself")]
            let is_number = x == x;
            equal[lane] &= is_number;
        }
    }
    let max = max.into_iter().reduce(|a, b| if b > a { b } else { a });
    (max.unwrap_or(A::NEG_INFINITY), equal.contains(&false))
}

/// The entropy and the logsumexp of a row with this largest number.
#[inline(always)]
fn entropy_and_logsumexp<A: Real, I: Isa>(row: &[A], max: A, has_nan: bool) -> (f64, f64) {
    if has_nan {
        return (f64::NAN, f64::NAN);
    }
    if max.to_f64().is_infinite() {
        return (f64::NAN, max.to_f64());
    }
    let zero = A::default();
    let (mut sum, mut dot) = ([zero; LANES], [zero; LANES]);
    for tile in row.chunks_exact(LANES) {
        let mut exps = [zero; LANES];
        for lane in 0..LANES {
            exps[lane] = (tile[lane] - max).exp_nonpositive::<I>();
        }
        for lane in 0..LANES {
            sum[lane] += exps[lane];
            // 0 times -inf is 0.
            let z = if exps[lane] == zero { zero } else { tile[lane] - max };
            dot[lane] += exps[lane] * z;
        }
    }
    let total = |lanes: [A; LANES]| lanes.iter().map(|x| x.to_f64()).sum::<f64>();
    let (sum, dot) = (total(sum), total(dot));
    let log_sum = ln::<I>(sum);
    // Rounding must not make the entropy of one sure class negative.
    ((log_sum - dot / sum).max(0.0), max.to_f64() + log_sum)
}
