//! The loop for contiguous rows of many classes: the lanes run along the classes.
//!
//! A row is read twice, for its maximum `m` and for `exp(x_k - m)` with its sums, and then turned into the gradient. A
//! group of rows stays in the second-level cache from the first of these steps to the last. The exponentials are kept
//! in the gradient's own memory, which may be that of the logits, or, where its type is too narrow for them, in scratch
//! memory.

use super::labels::Label;
use super::mass::{NoMass, ProbabilityMass, RowMass, SmoothingMass, SoftMass, times};
use super::problem::{Group, Plan, Problem};
use crate::layout::Run;
use crate::numeric::{Element, Isa, Kernel, LANES, Real, read_tile, write_tile};
use crate::parallel::with_capacity;
use std::sync::atomic::{Ordering, compiler_fence};

/// Rows of a group: their number is large enough for the lanes of every loop over them, and their exponentials stay in
/// the first-level cache where there are about a hundred classes.
const ROWS: usize = 32;

/// The rows `start..end` of a problem, a group after the other.
pub(super) struct Rows<'a, 'b, T: Element> {
    pub problem: &'a Problem<'b, T>,
    pub plan: Plan<'a, T::Real>,
    pub start: usize,
    pub end: usize,
}

impl<T: Element> Kernel for Rows<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let p = self.problem;
        let classes = p.classes;
        let [x_step, g_step, q_step] = p.positions.inner();
        let mut group = Group::new();
        let grad = p.wanted_grad(self.plan);
        let own = if self.plan.keeps() { p.grad } else { grad }.and_then(|grad| T::as_real(grad.0));
        // Where no gradient is written, exponentials are not needed after their sum, so that all rows share one row of
        // scratch memory.
        let kept = if grad.is_none() && T::as_real(p.logits.0).is_some() { 1 } else { ROWS };
        let kept = if own.is_some() { 0 } else { kept.min(self.end - self.start) };
        let mut scratch = with_capacity::<T::Real>(classes.saturating_mul(kept));
        for Run { position, length, offsets: [x, g, q_offset] } in p.positions.runs(self.start, self.end) {
            let mut done = 0;
            while done < length {
                let count = ROWS.min(length - done);
                let at = done as isize;
                // SAFETY: the offsets come from `Positions`, made of the shape and strides of the very views that the
                // addresses are of, with a class stride of 1; a block writes the gradient of its own targets only.
                unsafe {
                    let rows = RowsOf { first: p.logits.0.offset(x + at * x_step), step: x_step, classes };
                    let grads = grad.map(|grad| RowsOf {
                        first: grad.0.offset(g + at * g_step),
                        step: g_step,
                        classes,
                    });
                    let exps = match own {
                        Some(own) => RowsOf { first: own.offset(g + at * g_step), step: g_step, classes },
                        None => RowsOf {
                            first: scratch.as_mut_ptr(),
                            step: if kept == 1 { 0 } else { classes as isize },
                            classes,
                        },
                    };
                    let steps =
                        RowSteps { p, plan: self.plan, start: position + done, count, rows, grads, exps };
                    match &p.soft {
                        SoftMass::Nothing => steps.run::<I, _>(&mut group, |_| NoMass),
                        SoftMass::Smoothing { mass, .. } => {
                            steps.run::<I, _>(&mut group, |_| SmoothingMass(mass));
                        }
                        SoftMass::Probabilities { q, slope, mass, .. } => {
                            let q =
                                RowsOf { first: q.0.offset(q_offset + at * q_step), step: q_step, classes };
                            steps.run::<I, _>(&mut group, |i| ProbabilityMass::<T>(q.row(i), slope, mass));
                        }
                    }
                }
                done += count;
            }
        }
    }
}

/// Contiguous rows at equal steps.
#[derive(Clone, Copy)]
struct RowsOf<T> {
    first: *mut T,
    step: isize,
    classes: usize,
}

impl<T: Copy> RowsOf<T> {
    /// # Safety
    /// There is a row `i`.
    #[inline(always)]
    unsafe fn address(self, i: usize) -> *mut T {
        // SAFETY: what the caller promises.
        unsafe { self.first.offset(i as isize * self.step) }
    }

    /// # Safety
    /// There is a row `i`, and nobody writes to it meanwhile.
    #[inline(always)]
    unsafe fn row<'a>(self, i: usize) -> &'a [T] {
        // SAFETY: what the caller promises.
        unsafe { std::slice::from_raw_parts(self.address(i), self.classes) }
    }
}

/// The steps over a group of rows.
struct RowSteps<'a, 'b, T: Element> {
    p: &'a Problem<'b, T>,
    plan: Plan<'a, T::Real>,
    start: usize,
    count: usize,
    rows: RowsOf<T>,
    /// Where the gradient goes, if it is wanted.
    grads: Option<RowsOf<T>>,
    /// Where the exponentials go, which become the gradient: for wide types into `grads`. Narrow logits are
    /// widened into the same place before.
    exps: RowsOf<T::Real>,
}

impl<T: Element> RowSteps<'_, '_, T> {
    /// # Safety
    /// `rows`, `grads` and `exps` have `count` rows; the last two are this call's alone, and overlap `rows` only where
    /// row `i` is the same for every `i`.
    #[inline(always)]
    unsafe fn run<I: Isa, M: RowMass<T::Real>>(self, group: &mut Group<T::Real>, mass: impl Fn(usize) -> M) {
        let Self { p, rows, exps, .. } = self;
        // SAFETY of every block below: what the caller promises.
        match (T::as_real(rows.first), p.adjustment) {
            (Some(first), None) => {
                let rows = RowsOf { first, step: rows.step, classes: rows.classes };
                // SAFETY: as above.
                unsafe { self.finish::<I, _, _>(group, mass, |i| PlainRow(rows.address(i))) }
            }
            (Some(first), Some(adjustment)) => {
                let rows = RowsOf { first, step: rows.step, classes: rows.classes };
                // SAFETY: as above.
                unsafe { self.finish::<I, _, _>(group, mass, |i| AdjustedRow(rows.address(i), adjustment)) }
            }
            // Narrow logits are first written to where their exponentials go.
            // SAFETY: as above.
            (None, _) => unsafe { self.finish::<I, _, _>(group, mass, |i| PlainRow(exps.address(i))) },
        }
    }

    /// # Safety
    /// As [`Self::run`], and `logits` gives the logits of a row; for narrow ones, those that were widened into `exps`.
    #[inline(always)]
    unsafe fn finish<I: Isa, M: RowMass<T::Real>, L: RowLogits<T::Real>>(
        self,
        group: &mut Group<T::Real>,
        mass: impl Fn(usize) -> M,
        logits: impl Fn(usize) -> L,
    ) {
        let Self { p, plan, start, count, rows, grads, exps } = self;
        // SAFETY of every block below: what the caller promises.
        let mut lanes = [[T::Real::default(); LANES]; ROWS];
        if let Some(sums) = plan.kept() {
            // An earlier pass has left the exponentials in `exps`.
            for (i, &[sum, soft_mass]) in sums[start..start + count].iter().enumerate() {
                (group.sum[i], group.soft_mass[i]) = (sum, soft_mass);
            }
            p.look_at_labels(start, count, group, |_, _| T::Real::default());
        } else {
            for (i, lanes) in lanes[..count].iter_mut().enumerate() {
                // SAFETY: as above.
                unsafe {
                    if T::as_real(rows.first).is_none() {
                        row_widen(rows.address(i), exps.address(i), p.classes, p.adjustment);
                    }
                    *lanes = row_max(&logits(i), p.classes);
                }
            }
            fold(&mut lanes[..count], &mut group.max, larger);
            // The exponentials may take the place of the logits, so the labels' logits are read before them.
            // SAFETY: as above.
            p.look_at_labels(start, count, group, |i, y| unsafe { logits(i).at(y) });
            let ends = Ends::new();
            let mut soft = [[[T::Real::default(); LANES]; ROWS]; 2];
            for (i, lanes) in lanes[..count].iter_mut().enumerate() {
                // SAFETY: as above.
                let sums = unsafe {
                    row_exps::<_, I, _>(&logits(i), exps.address(i), p.classes, group.max[i], &mass(i), &ends)
                };
                *lanes = sums.exps;
                if M::SOME {
                    (soft[0][i], soft[1][i]) = (sums.dot, sums.mass);
                }
            }
            fold(&mut lanes[..count], &mut group.sum, |a, b| a + b);
            if M::SOME {
                fold(&mut soft[0][..count], &mut group.soft_dot, |a, b| a + b);
                fold(&mut soft[1][..count], &mut group.soft_mass, |a, b| a + b);
            } else {
                group.soft_mass[..count].fill(T::Real::default());
            }
            if let Plan::Losses { kept: Some(kept), .. } = plan {
                // SAFETY: a block writes the sums of its own targets only.
                for (i, out) in unsafe { kept.part(start, start + count) }.iter_mut().enumerate() {
                    out.write([group.sum[i], group.soft_mass[i]]);
                }
            }
        }
        p.weigh::<I>(plan, start, count, group);
        let Some(grads) = grads else {
            return;
        };
        let labels = p.labels.part(start, count);
        for i in 0..count {
            let label = labels.map(|labels| labels[i]);
            let (exp_factor, factor) = (group.exp_factor[i], group.factor[i]);
            let mass = mass(i);
            // SAFETY: as above.
            unsafe {
                let (exps, grad) = (exps.address(i).cast_const(), grads.address(i));
                if label.is_some_and(|label| !label.counts()) {
                    // 0, but NaN logits stay NaN, as in `torch.nn.CrossEntropyLoss`.
                    let nothing = T::narrow(T::Real::default() * group.sum[i]);
                    for k in 0..p.classes {
                        grad.add(k).write(nothing);
                    }
                    continue;
                }
                let at_label = label.and_then(Label::class).map(|y| (y, exps.add(y).read()));
                row_gradient(exps, grad, p.classes, exp_factor, factor, &mass);
                if let Some((y, e)) = at_label {
                    let g = e * exp_factor - factor * mass.at(y) - factor * group.label_mass[i];
                    grad.add(y).write(T::narrow(g));
                }
            }
        }
    }
}

/// Fence: stops LLVM from vectorising across tiles, which would gather and scatter. Within a tile the lanes become
/// vectors.
#[inline(always)]
fn fence() {
    compiler_fence(Ordering::SeqCst);
}

/// Independent accumulators of a row, each of [`LANES`] lanes.
const CHAINS: usize = 4;

/// The logits of a row, in the accumulator's type.
trait RowLogits<A> {
    /// Those of the classes from `k` on.
    ///
    /// # Safety
    /// There are [`LANES`] of them, and nobody writes to them meanwhile.
    unsafe fn tile(&self, k: usize) -> [A; LANES];

    /// That of class `k`.
    ///
    /// # Safety
    /// There is such a class.
    unsafe fn at(&self, k: usize) -> A;
}

struct PlainRow<A>(*const A);
impl<A: Real> RowLogits<A> for PlainRow<A> {
    #[inline(always)]
    unsafe fn tile(&self, k: usize) -> [A; LANES] {
        // SAFETY: what the caller promises.
        unsafe { read_tile(self.0.add(k)) }
    }
    #[inline(always)]
    unsafe fn at(&self, k: usize) -> A {
        // SAFETY: what the caller promises.
        unsafe { self.0.add(k).read() }
    }
}

/// Logits to which an adjustment is added.
struct AdjustedRow<'a, A>(*const A, &'a [A]);
impl<A: Real> RowLogits<A> for AdjustedRow<'_, A> {
    #[inline(always)]
    unsafe fn tile(&self, k: usize) -> [A; LANES] {
        // SAFETY: what the caller promises; there is an adjustment for every class.
        let (mut x, a) = unsafe { (read_tile(self.0.add(k)), read_tile(self.1.as_ptr().add(k))) };
        for lane in 0..LANES {
            x[lane] += a[lane];
        }
        x
    }
    #[inline(always)]
    unsafe fn at(&self, k: usize) -> A {
        // SAFETY: what the caller promises.
        unsafe { self.0.add(k).read() + self.1[k] }
    }
}

/// Widens a row, and adds an adjustment to it.
///
/// # Safety
/// The addresses are of rows of at least [`LANES`] numbers that do not overlap, the latter this call's alone; there is
/// an adjustment for every class.
#[inline(always)]
unsafe fn row_widen<T: Element>(
    row: *const T,
    wide: *mut T::Real,
    classes: usize,
    adjustment: Option<&[T::Real]>,
) {
    let mut k = 0;
    while k < classes {
        // The last tile may overlap the one before it.
        let at = k.min(classes - LANES);
        // SAFETY: what the caller promises.
        let x = unsafe { read_tile(row.add(at)) };
        let mut y = [T::Real::default(); LANES];
        for lane in 0..LANES {
            y[lane] = x[lane].widen();
        }
        if let Some(adjustment) = adjustment {
            // SAFETY: as above.
            let a = unsafe { read_tile(adjustment.as_ptr().add(at)) };
            for lane in 0..LANES {
                y[lane] += a[lane];
            }
        }
        // SAFETY: as above.
        unsafe { write_tile(wide.add(at), y) };
        k += LANES;
        fence();
    }
}

/// The lanes of the largest logit. NaN logits are skipped here; they make the sum of exponentials NaN.
///
/// # Safety
/// The row has as many classes, at least [`LANES`].
#[inline(always)]
unsafe fn row_max<A: Real>(row: &impl RowLogits<A>, classes: usize) -> [A; LANES] {
    let mut lanes = [[A::NEG_INFINITY; LANES]; CHAINS];
    let mut k = 0;
    while k + CHAINS * LANES <= classes {
        for (chain, max) in lanes.iter_mut().enumerate() {
            // SAFETY: what the caller promises.
            let tile = unsafe { row.tile(k + chain * LANES) };
            for lane in 0..LANES {
                max[lane] = if tile[lane] > max[lane] { tile[lane] } else { max[lane] };
            }
        }
        k += CHAINS * LANES;
    }
    if k < classes {
        for (chain, max) in lanes.iter_mut().enumerate() {
            // Tiles may overlap.
            // SAFETY: as above.
            let tile = unsafe { row.tile((k + chain * LANES).min(classes - LANES)) };
            for lane in 0..LANES {
                max[lane] = if tile[lane] > max[lane] { tile[lane] } else { max[lane] };
            }
        }
    }
    let [a, b, c, d] = lanes;
    let mut max = a;
    for lane in 0..LANES {
        max[lane] = larger(larger(a[lane], b[lane]), larger(c[lane], d[lane]));
    }
    max
}

#[inline(always)]
fn larger<A: Real>(a: A, b: A) -> A {
    if b > a { b } else { a }
}

/// Folds the lanes of each row, halves onto each other. All rows are folded together and in memory: in registers, row
/// by row, the compiler would extract the lanes one by one. Without the fences it would gather the lanes of several
/// rows, which takes several times as long.
#[inline(always)]
fn fold<A: Real>(rows: &mut [[A; LANES]], out: &mut [A], op: impl Fn(A, A) -> A) {
    let mut half = LANES / 2;
    while half > 2 {
        for row in &mut *rows {
            let (low, high) = row.split_at_mut(half);
            for (a, &b) in low.iter_mut().zip(&high[..half]) {
                *a = op(*a, b);
            }
            fence();
        }
        half /= 2;
    }
    for (out, row) in out.iter_mut().zip(&*rows) {
        *out = op(op(row[0], row[2]), op(row[1], row[3]));
        fence();
    }
}

/// Adds the chains lane by lane, into one.
#[inline(always)]
fn join<A: Real>([mut a, b, c, d]: [[A; LANES]; CHAINS]) -> [A; LANES] {
    for lane in 0..LANES {
        a[lane] = (a[lane] + b[lane]) + (c[lane] + d[lane]);
    }
    a
}

/// Which lanes of a row's last tile count: those that no full tile has.
struct Ends<A>([A; 2 * LANES]);

impl<A: Real> Ends<A> {
    fn new() -> Self {
        let mut ends = [A::default(); 2 * LANES];
        ends[LANES..].fill(A::from_f64(1.0));
        Self(ends)
    }

    /// Ones for the last `rest` lanes.
    #[inline(always)]
    fn tile(&self, rest: usize) -> [A; LANES] {
        // SAFETY: `rest` is at most `LANES`.
        unsafe { read_tile(self.0.as_ptr().add(rest.min(LANES))) }
    }
}

/// Sums over the classes, lane by lane: of `exp(x_k - max)`, of `t_k (x_k - max)` and of `t_k`, `t` the soft mass.
#[derive(Clone, Copy)]
struct RowSums<A> {
    exps: [A; LANES],
    dot: [A; LANES],
    mass: [A; LANES],
}

impl<A: Real> RowSums<A> {
    /// Adds the lanes that count to the sums, and returns the exponentials of all lanes. The loops are separate and
    /// short, so that the compiler unrolls each of them.
    #[inline(always)]
    fn add<I: Isa>(
        &mut self,
        mut x: [A; LANES],
        max: A,
        mass: Option<[A; LANES]>,
        counts: Option<[A; LANES]>,
    ) -> [A; LANES] {
        let zero = A::default();
        let kept = |lane: usize, x: A| match counts {
            Some(counts) if counts[lane] == zero => zero,
            _ => x,
        };
        for z in &mut x {
            *z = *z - max;
        }
        if let Some(mass) = mass {
            for (lane, (dot, (&t, &z))) in self.dot.iter_mut().zip(mass.iter().zip(&x)).enumerate() {
                *dot += kept(lane, times(t, z));
            }
            for (lane, (sum, &t)) in self.mass.iter_mut().zip(&mass).enumerate() {
                *sum += kept(lane, t);
            }
        }
        for z in &mut x {
            *z = z.exp_nonpositive::<I>();
        }
        for (lane, (sum, &e)) in self.exps.iter_mut().zip(&x).enumerate() {
            *sum += kept(lane, e);
        }
        x
    }
}

/// Writes `exp(x_k - max)`, and returns the lanes of `sum_k exp(x_k - max)`, `sum_k t_k (x_k - max)` and `sum_k t_k` of
/// the soft mass `t`.
///
/// # Safety
/// `source` and `exps`, whose memory may be the same, are rows of at least [`LANES`] numbers, the latter this call's
/// alone, and `mass` is that of a row as long.
#[inline(always)]
unsafe fn row_exps<A: Real, I: Isa, M: RowMass<A>>(
    source: &impl RowLogits<A>,
    exps: *mut A,
    classes: usize,
    max: A,
    mass: &M,
    ends: &Ends<A>,
) -> RowSums<A> {
    let zero = [A::default(); LANES];
    let mut sums = [RowSums { exps: zero, dot: zero, mass: zero }; CHAINS];
    // The classes after the last full tile are the end of the row's last `LANES` classes. That tile overlaps the full
    // ones and `exps` may be `source`, so it is read before anything is written.
    let rest = classes % LANES;
    let last = classes - LANES;
    // SAFETY: what the caller promises.
    let mut end = unsafe { source.tile(last) };
    if rest != 0 {
        // SAFETY: as above.
        let t = if M::SOME { Some(unsafe { mass.tile(last) }) } else { None };
        end = sums[1].add::<I>(end, max, t, Some(ends.tile(rest)));
    }
    let mut k = 0;
    while k + CHAINS * LANES <= classes {
        for (chain, sums) in sums.iter_mut().enumerate() {
            let k = k + chain * LANES;
            // SAFETY: as above.
            unsafe {
                let t = if M::SOME { Some(mass.tile(k)) } else { None };
                write_tile(exps.add(k), sums.add::<I>(source.tile(k), max, t, None));
            }
        }
        k += CHAINS * LANES;
        fence();
    }
    while k + LANES <= classes {
        // SAFETY: as above.
        unsafe {
            let t = if M::SOME { Some(mass.tile(k)) } else { None };
            write_tile(exps.add(k), sums[0].add::<I>(source.tile(k), max, t, None));
        }
        k += LANES;
        fence();
    }
    if rest != 0 {
        // SAFETY: as above.
        unsafe { write_tile(exps.add(last), end) };
    }
    let [a, b, c, d] = sums;
    let exps = join([a.exps, b.exps, c.exps, d.exps]);
    if M::SOME {
        let (dot, mass) = (join([a.dot, b.dot, c.dot, d.dot]), join([a.mass, b.mass, c.mass, d.mass]));
        RowSums { exps, dot, mass }
    } else {
        RowSums { exps, dot: zero, mass: zero }
    }
}

/// Writes `exps_k exp_factor - factor t_k`, `t` the soft mass.
///
/// # Safety
/// `exps` and `grad` are rows of at least [`LANES`] numbers, the latter this call's alone; they overlap only where they
/// are the same. `mass` is that of a row as long.
#[inline(always)]
unsafe fn row_gradient<T: Element, M: RowMass<T::Real>>(
    exps: *const T::Real,
    grad: *mut T,
    classes: usize,
    exp_factor: T::Real,
    factor: T::Real,
    mass: &M,
) {
    let last = classes - LANES;
    // SAFETY: what the caller promises.
    let end = unsafe { read_tile(exps.add(last)) };
    let mut k = 0;
    while k <= last {
        // SAFETY: as above.
        unsafe {
            let t = if M::SOME { Some(mass.tile(k)) } else { None };
            write_tile(grad.add(k), tile_gradient(read_tile(exps.add(k)), exp_factor, factor, t));
        }
        k += LANES;
        fence();
    }
    // SAFETY: as above.
    unsafe {
        let t = if M::SOME { Some(mass.tile(last)) } else { None };
        write_tile(grad.add(last), tile_gradient(end, exp_factor, factor, t));
    }
}

#[inline(always)]
fn tile_gradient<T: Element>(
    mut x: [T::Real; LANES],
    exp_factor: T::Real,
    factor: T::Real,
    mass: Option<[T::Real; LANES]>,
) -> [T; LANES] {
    for x in &mut x {
        *x = *x * exp_factor;
    }
    if let Some(mass) = mass {
        for (x, &t) in x.iter_mut().zip(&mass) {
            *x = *x - factor * t;
        }
    }
    let mut grad = [T::narrow(exp_factor); LANES];
    for (grad, &x) in grad.iter_mut().zip(&x) {
        *grad = T::narrow(x);
    }
    grad
}
