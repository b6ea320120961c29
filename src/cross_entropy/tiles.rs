//! The loop for few classes or a strided class axis: the lanes run across targets.
//!
//! A tile holds at most [`GROUP`] targets and all classes, widened, each class a row of the tile. It is turned in place
//! from logits `x_k` into `exp(x_k - m)` and then into the gradient.

use super::mass::{SoftMass, times};
use super::problem::{BLOCK, GROUP, Group, Plan, Problem};
use crate::layout::Run;
use crate::numeric::{Element, Isa, Kernel, LANES, Real};
use crate::parallel::filled;
use std::mem::MaybeUninit;

/// Classes whose sums are taken in the accumulator's type; more are summed in `f64`, a chunk after the other, so that
/// the rounding error of a sum does not grow with the number of classes.
const CHUNK: usize = 32;

/// The targets `start..end` of a problem, a tile after the other.
pub(super) struct Tiles<'a, 'b, T: Element> {
    pub problem: &'a Problem<'b, T>,
    pub plan: Plan<'a, T::Real>,
    pub start: usize,
    pub end: usize,
}

impl<T: Element> Kernel for Tiles<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let p = self.problem;
        let [x_step, g_step, q_step] = p.positions.inner();
        let width =
            (BLOCK / p.classes.max(1)).next_multiple_of(LANES).clamp(LANES, GROUP).min(self.end - self.start);
        let mut tile = filled(p.classes.saturating_mul(width), T::Real::default());
        let mut masses = match p.soft {
            SoftMass::Probabilities { .. } => filled(tile.len(), T::Real::default()),
            _ => Vec::new(),
        };
        let mut group = Group::new();
        if p.classes > CHUNK {
            group.totals.resize(3, [0.0; GROUP]);
        }
        for Run { position, length, offsets: [x, g, q_offset] } in p.positions.runs(self.start, self.end) {
            let mut done = 0;
            while done < length {
                let count = width.min(length - done);
                let at = done as isize;
                // SAFETY: the offsets come from `Positions`, made of the shape and strides of the very views that the
                // addresses are of; a tile writes the gradient of its own targets only.
                unsafe {
                    load_tile(
                        p.logits.0.offset(x + at * x_step),
                        x_step,
                        p.logits_class,
                        width,
                        count,
                        &mut tile,
                    );
                    if let Some(adjustment) = p.adjustment {
                        for (row, &a) in tile.chunks_exact_mut(width).zip(adjustment) {
                            for x in &mut row[..count] {
                                *x += a;
                            }
                        }
                    }
                    if let SoftMass::Probabilities { q, class_stride, slope, mass } = &p.soft {
                        let first = q.0.offset(q_offset + at * q_step);
                        load_tile(first, q_step, *class_stride, width, count, &mut masses);
                        for (row, (&slope, &mass)) in
                            masses.chunks_exact_mut(width).zip(slope.iter().zip(mass))
                        {
                            for x in row {
                                *x = *x * slope + mass;
                            }
                        }
                    }
                    tile_step::<T, I>(
                        p,
                        self.plan,
                        position + done,
                        width,
                        count,
                        &mut group,
                        &mut tile,
                        &masses,
                    );
                    if let Some(grad) = p.wanted_grad(self.plan) {
                        store_tile(grad.0.offset(g + at * g_step), g_step, p.grad_class, width, count, &tile);
                    }
                }
                done += count;
            }
        }
    }
}

/// Reads `count` targets into a tile, each class a row of `width` lanes.
///
/// # Safety
/// `first` and the strides describe `count` targets of as many classes as `tile` has rows.
#[inline(always)]
unsafe fn load_tile<T: Element>(
    first: *const T,
    step: isize,
    class: isize,
    width: usize,
    count: usize,
    tile: &mut [T::Real],
) {
    for (k, row) in tile.chunks_exact_mut(width).enumerate() {
        // SAFETY: what the caller promises.
        unsafe {
            let source = first.offset(k as isize * class);
            if step == 1 {
                for (x, y) in row.iter_mut().zip(std::slice::from_raw_parts(source, count)) {
                    *x = y.widen();
                }
            } else {
                for (lane, x) in row[..count].iter_mut().enumerate() {
                    *x = (*source.offset(lane as isize * step)).widen();
                }
            }
        }
    }
}

/// Writes `count` targets of a tile.
///
/// # Safety
/// As [`load_tile`], and the memory may be written.
#[inline(always)]
unsafe fn store_tile<T: Element>(
    first: *mut T,
    step: isize,
    class: isize,
    width: usize,
    count: usize,
    tile: &[T::Real],
) {
    for (k, row) in tile.chunks_exact(width).enumerate() {
        // SAFETY: what the caller promises.
        unsafe {
            let sink = first.offset(k as isize * class);
            if step == 1 {
                let sink = std::slice::from_raw_parts_mut(sink.cast::<MaybeUninit<T>>(), count);
                for (x, &y) in sink.iter_mut().zip(row) {
                    x.write(T::narrow(y));
                }
            } else {
                for (lane, &y) in row[..count].iter().enumerate() {
                    sink.offset(lane as isize * step).write(T::narrow(y));
                }
            }
        }
    }
}

/// Turns a tile of logits into the gradient, writing losses and weights on the way as the plan says.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "one step of one loop")]
fn tile_step<T: Element, I: Isa>(
    p: &Problem<T>,
    plan: Plan<T::Real>,
    start: usize,
    width: usize,
    count: usize,
    group: &mut Group<T::Real>,
    tile: &mut [T::Real],
    masses: &[T::Real],
) {
    group.max[..count].fill(T::Real::NEG_INFINITY);
    for row in tile.chunks_exact(width) {
        for (max, &x) in group.max[..count].iter_mut().zip(row) {
            *max = if x > *max { x } else { *max };
        }
    }
    p.look_at_labels(start, count, group, |i, y| tile[y * width + i]);

    for totals in &mut group.totals {
        totals[..count].fill(0.0);
    }
    for (chunk, rows) in tile.chunks_mut(CHUNK * width).enumerate() {
        sum_chunk::<T, I>(&p.soft, chunk * CHUNK, width, count, group, rows, masses);
        for (totals, sums) in group
            .totals
            .iter_mut()
            .zip([&group.sum, &group.soft_dot, &group.soft_mass])
            .take(sums_of(&p.soft))
        {
            for (total, &sum) in totals[..count].iter_mut().zip(&sums[..count]) {
                *total += sum.to_f64();
            }
        }
    }
    let sums = [&mut group.sum, &mut group.soft_dot, &mut group.soft_mass];
    for (totals, sums) in group.totals.iter().zip(sums).take(sums_of(&p.soft)) {
        for (sum, &total) in sums[..count].iter_mut().zip(&totals[..count]) {
            *sum = T::Real::from_f64(total);
        }
    }
    if let SoftMass::Smoothing { total, .. } = p.soft {
        group.soft_mass[..count].fill(total);
    }

    p.weigh::<I>(plan, start, count, group);
    if p.wanted_grad(plan).is_none() {
        return;
    }
    for (k, row) in tile.chunks_exact_mut(width).enumerate() {
        for (x, &factor) in row.iter_mut().zip(&group.exp_factor[..count]) {
            *x = *x * factor;
        }
        match &p.soft {
            SoftMass::Nothing => {}
            SoftMass::Smoothing { mass, .. } => {
                for (x, &factor) in row.iter_mut().zip(&group.factor[..count]) {
                    *x = *x - factor * mass[k];
                }
            }
            SoftMass::Probabilities { .. } => {
                let masses = &masses[k * width..][..count];
                for ((x, &factor), &mass) in row.iter_mut().zip(&group.factor[..count]).zip(masses) {
                    *x = *x - factor * mass;
                }
            }
        }
    }
    for (i, label) in p.labels.part(start, count).unwrap_or_default().iter().enumerate() {
        if let Some(y) = label.class() {
            let x = &mut tile[y * width + i];
            *x = *x - group.factor[i] * group.label_mass[i];
        }
    }
}

/// How many of the sums of [`sum_chunk`] differ from target to target.
fn sums_of<T: Element>(soft: &SoftMass<T>) -> usize {
    match soft {
        SoftMass::Nothing => 1,
        SoftMass::Smoothing { .. } => 2,
        SoftMass::Probabilities { .. } => 3,
    }
}

/// Turns the classes from `first` on from logits into exponentials, and sums these and the soft mass over them.
#[inline(always)]
fn sum_chunk<T: Element, I: Isa>(
    soft: &SoftMass<T>,
    first: usize,
    width: usize,
    count: usize,
    group: &mut Group<T::Real>,
    rows: &mut [T::Real],
    masses: &[T::Real],
) {
    let zero = T::Real::default();
    group.sum[..count].fill(zero);
    if !matches!(soft, SoftMass::Nothing) {
        group.soft_dot[..count].fill(zero);
        group.soft_mass[..count].fill(zero);
    }
    for (k, row) in rows.chunks_exact_mut(width).enumerate() {
        let k = first + k;
        match soft {
            SoftMass::Nothing => {}
            SoftMass::Smoothing { mass, .. } => {
                let dots = group.soft_dot[..count].iter_mut();
                for ((&x, &max), dot) in row.iter().zip(&group.max[..count]).zip(dots) {
                    *dot += times(mass[k], x - max);
                }
            }
            SoftMass::Probabilities { .. } => {
                let sums = group.soft_dot[..count].iter_mut().zip(&mut group.soft_mass[..count]);
                let masses = &masses[k * width..][..count];
                for (((&x, &max), &mass), (dot, sum)) in
                    row.iter().zip(&group.max[..count]).zip(masses).zip(sums)
                {
                    *dot += times(mass, x - max);
                    *sum += mass;
                }
            }
        }
        for ((x, &max), sum) in row.iter_mut().zip(&group.max[..count]).zip(&mut group.sum[..count]) {
            *x = (*x - max).exp_nonpositive::<I>();
            *sum += *x;
        }
    }
}
