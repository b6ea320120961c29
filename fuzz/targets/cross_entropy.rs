//! Losses, weights, objective, gradient and extras of the cross-entropy, against their equations in `f64`.
//!
//! Results are checked in steps, so that each tolerance follows from the rounding of one step: losses from the logits,
//! weights from the losses that the kernel returned, the objective and the gradient from its losses and weights. With
//! `C` classes, a sum over the classes in the accumulator's type is good to `(C + 16) eps`. No loss is a difference
//! of large numbers: `l = sum_k t_k (log S - (x_k - m))` has no negative term.
#![no_main]

use half::{bf16, f16};
use libfuzzer_sys::fuzz_target;
use ndarray::{ArrayD, ArrayViewD, ArrayViewMutD, Axis};
use rgd::cross_entropy::{
    Error, Extras, Given, Gradient, Inputs, Outputs, Overwrite, Reduction, Settings, Target, cross_entropy,
    extras, gradient, losses,
};
use rgd::weightings::{Focal, Kl, Threshold, Weighting};
use rgd_fuzz::{Layout, Number, Source, check, read, rounding, unwritten, values};
use std::mem::MaybeUninit;

/// One target of a case.
struct Row {
    /// The logits as adjusted.
    x: Vec<f64>,
    /// The mass over the classes.
    mass: Vec<f64>,
    /// The class of the target.
    class: Option<usize>,
    /// What the target adds to the denominator of the mean, without the sample weight.
    share: f64,
    /// The sample weight.
    p: f64,
    counts: bool,
}

impl Row {
    fn max(&self) -> f64 {
        self.x.iter().copied().fold(f64::NEG_INFINITY, f64::max)
    }

    /// `S`; NaN where a logit is NaN or infinity.
    fn sum(&self) -> f64 {
        self.x.iter().map(|x| (x - self.max()).exp()).sum()
    }

    fn total(&self) -> f64 {
        self.mass.iter().sum()
    }

    fn loss(&self) -> f64 {
        let log_sum = self.sum().ln();
        let terms = self.x.iter().zip(&self.mass);
        self.total() * log_sum
            - terms.map(|(x, t)| if *t == 0.0 { 0.0 } else { t * (x - self.max()) }).sum::<f64>()
    }

    fn logsumexp(&self) -> f64 {
        self.max() + self.sum().ln()
    }
}

const CLASSES: [usize; 22] =
    [1, 2, 3, 5, 8, 15, 16, 17, 23, 24, 25, 31, 32, 33, 40, 48, 63, 64, 65, 81, 130, 257];

fn shape(source: &mut Source) -> Vec<usize> {
    let classes = source.pick(&CLASSES);
    let mut shape = match source.below(8) {
        0 => return vec![classes],
        1 => vec![source.below(5), classes, source.below(6)],
        2 => vec![source.below(4), classes, source.below(4), 1 + source.below(4)],
        3 => vec![source.below(300), classes],
        _ => vec![source.below(40), classes],
    };
    while shape.iter().product::<usize>() > 6000 {
        shape[0] /= 2;
    }
    shape
}

/// The rows of a tensor along its class axis, in row-major order of the other axes.
fn rows<T: Copy>(tensor: &ArrayViewD<T>, axis: usize) -> Vec<Vec<T>> {
    tensor.lanes(Axis(axis)).into_iter().map(|row| row.iter().copied().collect()).collect()
}

/// The inputs of a call in their memory, the settings, and what they mean.
struct Case<T: Number> {
    shape: Vec<usize>,
    axis: usize,
    settings: Settings,
    /// How many targets share a weight, and how many weights there are.
    unit: usize,
    units: usize,
    x: (Layout, ArrayD<T>),
    q: Option<(Layout, ArrayD<T>)>,
    labels: (Layout, ArrayD<i64>),
    narrow_labels: Option<ArrayD<i32>>,
    class_weight: Option<Vec<T::Real>>,
    adjustment: Option<Vec<T::Real>>,
    measure: Option<Vec<T::Real>>,
}

impl<T: Number> Case<T>
where
    T::Real: Number,
{
    fn any(s: &mut Source) -> Self {
        let shape = shape(s);
        let axis = usize::from(shape.len() > 1);
        let classes = shape[axis];
        let mut targets = shape.clone();
        targets.remove(axis);
        let n: usize = targets.iter().product();
        let wild = s.one_in(3);
        // The largest logits with which no difference overflows the accumulator.
        let huge = T::MAX.min(<T::Real as Number>::MAX / 64.0);
        let settings = Settings {
            ignore_index: s.pick(&[-100, -100, 0, 1]),
            label_smoothing: s.pick(&[0.0, 0.0, 0.1, 0.5, 1.0]),
            z_loss: s.pick(&[0.0, 0.0, 1e-4, 0.5]),
            per_sample: s.one_in(4),
            reduction: s.pick(&[Reduction::Mean, Reduction::Sum, Reduction::None]),
            normalizer: s.pick(&[None, None, Some(0.5), Some(7.0)]),
            threads: 1 + s.below(3),
        };
        let samples = if shape.len() > 1 { shape[0] } else { 1 };
        let (unit, units) = if settings.per_sample { (n / samples.max(1), samples) } else { (1, n) };
        let some = |s: &mut Source, count: usize, from: &[f64]| -> Option<Vec<T::Real>> {
            s.one_in(3).then(|| (0..count).map(|_| T::Real::of(s.pick(from))).collect())
        };
        let class_weight = some(s, classes, &[1.0, 0.25, 2.0, 0.0]);
        let adjustment = some(s, classes, &[0.0, 1.0, -2.5, if wild { f64::NEG_INFINITY } else { 0.5 }]);
        let measure = some(s, units, &[1.0, 0.5, 3.25, 0.0]);
        let x_layout = Layout::any(s, shape.len());
        let x_memory = x_layout.tensor(&shape, || s.number(wild, huge));
        let q = s.one_in(3).then(|| {
            let layout = Layout::any(s, shape.len());
            let memory = layout.tensor(&shape, || s.pick(&[0.0, 0.5, 1.0, 0.3]));
            (layout, memory)
        });
        let y_layout = Layout::any(s, targets.len());
        let wrong = s.one_in(16);
        let mut labels = y_layout.memory(&targets, 9_999_999i64);
        for label in y_layout.view_mut(&mut labels) {
            *label = match s.below(if wrong { 40 } else { 36 }) {
                0..4 => settings.ignore_index,
                4..36 => s.below(classes) as i64,
                _ => s.pick(&[classes as i64, -1, i64::MIN, i64::MAX, -100, 1 << 32]),
            };
        }
        let narrow_labels = (s.flag() && !wrong).then(|| labels.mapv(|label| label as i32));
        let (x, labels) = ((x_layout, x_memory), (y_layout, labels));
        Self {
            shape,
            axis,
            settings,
            unit,
            units,
            x,
            q,
            labels,
            narrow_labels,
            class_weight,
            adjustment,
            measure,
        }
    }

    fn inputs<'a>(&'a self, logits: ArrayViewD<'a, T>) -> Inputs<'a, T> {
        let target = match (&self.q, &self.narrow_labels) {
            (Some((layout, memory)), _) => Target::Probabilities(layout.view(memory)),
            (None, Some(labels)) => Target::Int32(self.labels.0.view(labels)),
            (None, None) => Target::Int64(self.labels.0.view(&self.labels.1)),
        };
        let (class_weight, measure) = (self.class_weight.as_deref(), self.measure.as_deref());
        Inputs { logits, target, class_weight, logit_adjustment: self.adjustment.as_deref(), measure }
    }

    /// The targets in row-major order, or the first that is out of range, with its label.
    fn rows(&self) -> Result<Vec<Row>, (usize, i64)> {
        let classes = self.shape[self.axis];
        let x = rows(&self.x.0.view(&self.x.1), self.axis);
        let q = self.q.as_ref().map(|(layout, memory)| rows(&layout.view(memory), self.axis));
        let c = |k: usize| self.class_weight.as_ref().map_or(1.0, |c| c[k].value());
        let e = self.settings.label_smoothing;
        let row = |(i, &label): (usize, &i64)| {
            let p = self.measure.as_ref().map_or(1.0, |p| p[i / self.unit].value());
            let counts = p != 0.0 && (q.is_some() || label != self.settings.ignore_index);
            let in_range = (0..classes as i64).contains(&label);
            if q.is_none() && counts && !in_range {
                return Err((i, label));
            }
            let on = |k: usize| match &q {
                Some(q) => q[i][k].value(),
                None => f64::from(u8::from(label == k as i64)),
            };
            // The adjustment is added in the accumulator's type: that is the promise.
            let adjusted = |k: usize| match &self.adjustment {
                Some(a) => T::Real::of(x[i][k].value() + a[k].value()).value(),
                None => x[i][k].value(),
            };
            let likelier = |best: usize, k: usize| if on(k) > on(best) { k } else { best };
            Ok(Row {
                x: (0..classes).map(adjusted).collect(),
                mass: (0..classes).map(|k| c(k) * ((1.0 - e) * on(k) + e / classes as f64)).collect(),
                class: if q.is_some() { (0..classes).reduce(likelier) } else { usize::try_from(label).ok() },
                share: if q.is_none() && in_range { c(label as usize) } else { 1.0 },
                p,
                counts,
            })
        };
        self.labels.0.view(&self.labels.1).iter().enumerate().map(row).collect()
    }
}

fn weighting(s: &mut Source) -> Weighting {
    match s.below(5) {
        0 => Weighting::Focal(Focal { gamma: s.pick(&[0.0, 0.5, 2.0]) }),
        1 => Weighting::Threshold(Threshold { max_loss: s.pick(&[0.0, 1.0, 4.0]) }),
        2 => Weighting::Kl(Kl { tau: f64::INFINITY, scale: s.pick(&[-1.0, -0.3, 0.0]), normalize: s.flag() }),
        _ => {
            let (tau, scale) = (s.pick(&[0.5, 4.0]), s.pick(&[0.5, 2.0, -1.0]));
            Weighting::Kl(Kl { tau, scale, normalize: s.one_in(3) })
        }
    }
}

/// The weights of losses with sample weights `p`, and the relative error of each.
fn weights_of(weighting: Weighting, losses: &[f64], p: &[f64]) -> (Vec<f64>, f64) {
    let n = losses.len() as f64;
    let eps = f64::EPSILON;
    match weighting {
        Weighting::Focal(Focal { gamma }) => {
            let weight = |l: &f64| if l.is_nan() { f64::NAN } else { (-(-l).exp_m1()).powf(gamma) };
            (losses.iter().map(weight).collect(), (8.0 + n) * eps * (1.0 + gamma))
        }
        Weighting::Threshold(Threshold { max_loss }) => {
            let weight = |l: &f64| if l.is_nan() { f64::NAN } else { f64::from(u8::from(*l <= max_loss)) };
            (losses.iter().map(weight).collect(), 0.0)
        }
        Weighting::Kl(Kl { tau, scale, normalize }) => {
            let exponent = |&l: &f64| match l {
                l if l.is_nan() => f64::NAN,
                _ if scale == 0.0 => 0.0,
                l if l > tau => scale * tau,
                l => scale * l,
            };
            let exponents: Vec<f64> = losses.iter().map(exponent).collect();
            let finite = exponents.iter().filter(|e| e.is_finite());
            let size = finite.fold(0.0, |size: f64, e| size.max(e.abs()));
            // Beyond 800 the weight is 0 in every way.
            let error = (8.0 + 2.0 * n + 2.0 * size.min(if normalize { f64::MAX } else { 800.0 })) * eps;
            if !normalize {
                return (exponents.iter().map(|e| e.exp()).collect(), error);
            }
            if exponents.iter().any(|e| e.is_nan()) {
                return (vec![f64::NAN; losses.len()], 0.0);
            }
            let top = exponents.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let ratios: Vec<f64> =
                exponents.iter().map(|&e| if e == top { 1.0 } else { (e - top).exp() }).collect();
            let sum: f64 = ratios.iter().zip(p).map(|(r, p)| r * p).sum();
            (ratios.iter().map(|r| r * p.iter().sum::<f64>() / sum).collect(), error)
        }
        _ => unreachable!("the weightings of this target"),
    }
}

/// What a call has filled.
struct Filled {
    losses: Vec<f64>,
    weights: Vec<f64>,
    objective: Vec<f64>,
}

impl<T: Number> Case<T>
where
    T::Real: Number,
{
    /// The error of a sum over the classes, relative to the sum of magnitudes.
    fn eps(&self) -> f64 {
        <T::Real as Number>::EPS * (self.shape[self.axis] as f64 + 16.0)
    }

    fn real(what: &str, at: usize, got: f64, expected: f64, tolerance: f64) {
        check(what, at, got, expected, tolerance + rounding::<T::Real>(expected), <T::Real as Number>::MAX);
    }

    fn check_losses(&self, rows: &[Row], losses: &[f64]) {
        for (i, (row, &got)) in rows.iter().zip(losses).enumerate() {
            let expected = if row.counts { row.loss() } else { 0.0 };
            let tolerance = if row.counts { self.eps() * (expected.abs() + row.total()) } else { 0.0 };
            Self::real("loss", i, got, expected, tolerance);
        }
    }

    fn check_weights(&self, rows: &[Row], weighting: Weighting, filled: &Filled) {
        let (mut counted, mut means, mut p) = (Vec::new(), Vec::new(), Vec::new());
        for u in 0..self.units {
            let own = (u * self.unit..(u + 1) * self.unit).filter(|&i| rows[i].counts);
            let losses: Vec<f64> = own.clone().map(|i| filled.losses[i]).collect();
            if losses.is_empty() {
                assert_eq!(filled.weights[u], 0.0, "the weight of unit {u}, of which nothing takes part");
            } else {
                counted.push(u);
                means.push(losses.iter().sum::<f64>() / losses.len() as f64);
                p.extend(own.take(1).map(|i| rows[i].p));
            }
        }
        let (expected, error) = weights_of(weighting, &means, &p);
        for ((&u, expected), mean) in counted.iter().zip(expected).zip(means) {
            if let Weighting::Threshold(Threshold { max_loss }) = weighting
                && self.unit > 1
                && (mean - max_loss).abs() <= self.unit as f64 * f64::EPSILON * max_loss
            {
                continue;
            }
            let tolerance =
                if expected.is_finite() { (error + self.unit as f64 * f64::EPSILON) * expected } else { 0.0 };
            Self::real("weight", u, filled.weights[u], expected, tolerance);
        }
    }

    /// What the mean divides by.
    fn divisor(&self, rows: &[Row]) -> f64 {
        let own: f64 = rows.iter().filter(|row| row.counts).map(|row| row.p * row.share).sum();
        self.settings.normalizer.unwrap_or(if own == 0.0 { f64::NAN } else { own })
    }

    fn norm(&self, rows: &[Row]) -> f64 {
        if self.settings.reduction == Reduction::Mean { 1.0 / self.divisor(rows) } else { 1.0 }
    }

    fn check_objective(&self, rows: &[Row], filled: &Filled) {
        let z_loss = self.settings.z_loss;
        let mut terms = Vec::new();
        for (i, row) in rows.iter().enumerate().filter(|(_, row)| row.counts) {
            let (w, l) = (filled.weights[i / self.unit], filled.losses[i]);
            let weighted = if w == 0.0 && !l.is_nan() { 0.0 } else { row.p * w * l };
            let z = if z_loss == 0.0 { 0.0 } else { row.logsumexp() };
            let squared = z_loss * row.p * z * z;
            // The logsumexp is good to `error`, and its square to twice the product.
            let error = self.eps() * (1.0 + z.abs());
            let tolerance = z_loss * row.p * error * (2.0 * z.abs() + error);
            terms.push((i, weighted + squared, tolerance));
        }
        if self.settings.reduction == Reduction::None {
            let mut expected = vec![(0.0, 0.0); rows.len()];
            for (i, value, tolerance) in terms {
                expected[i] = (value, tolerance + 4.0 * rounding::<T::Real>(value));
            }
            for (i, (&got, (expected, tolerance))) in filled.objective.iter().zip(expected).enumerate() {
                Self::real(
                    "objective",
                    i,
                    got,
                    expected,
                    if tolerance.is_finite() { tolerance } else { 0.0 },
                );
            }
            return;
        }
        let sum: f64 = terms.iter().map(|term| term.1).sum();
        let error: f64 = terms.iter().map(|term| term.2).sum();
        let norm = self.norm(rows);
        let tolerance = (error + (rows.len() as f64 + 8.0) * f64::EPSILON * sum) * norm;
        Self::real(
            "objective",
            0,
            filled.objective[0],
            sum * norm,
            if tolerance.is_finite() { tolerance } else { 0.0 },
        );
    }

    /// The gradient `(f M + 2 z p norm Z) softmax(x) - f t`, `f = norm p w` and `M` the sum of the mass `t`.
    fn check_gradient(&self, rows: &[Row], weights: &[f64], grad: &[Vec<T>]) {
        let (norm, z_loss) = (self.norm(rows), self.settings.z_loss);
        for (i, (row, grad)) in rows.iter().zip(grad).enumerate() {
            let (max, sum) = (row.max(), row.sum());
            if !row.counts || sum.is_nan() {
                let expected = if sum.is_nan() { f64::NAN } else { 0.0 };
                grad.iter().enumerate().for_each(|(k, g)| {
                    check("gradient of row", i * 1000 + k, g.value(), expected, 0.0, T::MAX)
                });
                continue;
            }
            let f = row.p * weights[i / self.unit] * norm;
            let of_z = if z_loss == 0.0 { 0.0 } else { 2.0 * row.p * z_loss * norm * row.logsumexp() };
            // The magnitude of what multiplies the softmax, and of the error of the logsumexp.
            let size = (f * row.total()).abs() + of_z.abs() + (2.0 * row.p * z_loss * norm).abs();
            for (k, g) in grad.iter().enumerate() {
                let gap = row.x[k] - max;
                let q = gap.exp() / sum;
                let expected = (f * row.total() + of_z) * q - f * row.mass[k];
                let of_gap = if q == 0.0 { 0.0 } else { <T::Real as Number>::EPS * gap.abs() };
                // An exponential below the smallest normal number of the accumulator is 0.
                let flushed = size * 1.2e-38;
                let tolerance =
                    (self.eps() + of_gap) * size * q + self.eps() * (f * row.mass[k]).abs() + flushed;
                let tolerance = tolerance + rounding::<T>(expected) + rounding::<T::Real>(expected);
                check("gradient of row", i * 1000 + k, g.value(), expected, tolerance, T::MAX);
            }
        }
    }

    fn check_extras(&self, rows: &[Row]) {
        let n = rows.len();
        let (mut entropy, mut logsumexp, mut correct) = (unwritten(n), unwritten(n), unwritten(n));
        let out = Extras {
            entropy: Some(&mut entropy),
            logsumexp: Some(&mut logsumexp),
            correct: Some(&mut correct),
        };
        extras(&self.inputs(self.x.0.view(&self.x.1)), &self.settings, out).unwrap();
        let [entropy, logsumexp, correct] =
            [entropy, logsumexp, correct].map(|out| values(&read::<T::Real>(&out)));
        for (i, row) in rows.iter().enumerate() {
            let (max, sum) = (row.max(), row.sum());
            let has_nan = row.x.iter().any(|x| x.is_nan());
            let (h, z) = match () {
                () if !row.counts => (0.0, 0.0),
                () if has_nan => (f64::NAN, f64::NAN),
                () if max.is_infinite() => (f64::NAN, max),
                () => {
                    let gaps = row.x.iter().map(|x| x - max);
                    let dot: f64 = gaps.map(|z| if z.exp() == 0.0 { 0.0 } else { z.exp() * z }).sum();
                    (sum.ln() - dot / sum, row.logsumexp())
                }
            };
            let tolerance =
                |x: f64| if x.is_finite() && row.counts { self.eps() * (1.0 + x.abs()) } else { 0.0 };
            Self::real("entropy", i, entropy[i], h, tolerance(h));
            Self::real("logsumexp", i, logsumexp[i], z, tolerance(z));
            let first = row.x.iter().position(|&x| x == max);
            let expected = row.counts && !has_nan && first.is_some() && first == row.class;
            assert_eq!(correct[i], f64::from(u8::from(expected)), "correct {i}: {:?} {:?}", row.x, row.class);
        }
    }
}

/// Where the gradient of a call goes.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    Nowhere,
    Separate,
    OverTheLogits,
}

/// A number that no gradient has.
const GAP: f64 = -555.0;

/// Memory for what a call fills.
struct Memory<A> {
    losses: Vec<MaybeUninit<A>>,
    weights: Vec<MaybeUninit<A>>,
    objective: Vec<MaybeUninit<A>>,
}

/// Calls `call` with the logits, the place for the gradient and `out`; returns its result, and the gradient if there is
/// one.
fn with_gradient<T: Number, R>(
    case: &Case<T>,
    s: &mut Source,
    out: &mut Memory<T::Real>,
    call: impl for<'b> FnOnce(Inputs<'b, T>, Gradient<'b, T>, &'b mut Memory<T::Real>) -> R,
) -> (R, Option<Vec<Vec<T>>>)
where
    T::Real: Number,
{
    let (x_layout, x_memory) = &case.x;
    let place = s.pick(&[Place::Separate, Place::OverTheLogits, Place::Separate, Place::Nowhere]);
    let layout =
        if place == Place::OverTheLogits { x_layout.clone() } else { Layout::any(s, case.shape.len()) };
    let mut memory = layout.memory(&case.shape, T::of(GAP));
    let result = match place {
        Place::Nowhere => return (call(case.inputs(x_layout.view(x_memory)), Gradient::Unwanted, out), None),
        Place::Separate => {
            let grad = layout.view_mut(&mut memory);
            // SAFETY: a `MaybeUninit` has the layout of what it holds, and kernels write numbers only.
            let grad =
                unsafe { std::mem::transmute::<ArrayViewMutD<T>, ArrayViewMutD<MaybeUninit<T>>>(grad) };
            call(case.inputs(x_layout.view(x_memory)), Gradient::Separate(grad), out)
        }
        Place::OverTheLogits => {
            layout.view_mut(&mut memory).assign(&x_layout.view(x_memory));
            // SAFETY: the view is made of a pointer that may be written through, and the memory is this call's alone.
            let (logits, right) = unsafe {
                let view = layout.view_mut(&mut memory).raw_view_mut().raw_view().deref_into_view();
                (view, Overwrite::granted())
            };
            call(case.inputs(logits), Gradient::InPlace(right), out)
        }
    };
    let grad = rows(&layout.view(&memory), case.axis);
    layout.view_mut(&mut memory).fill(T::of(GAP));
    assert!(
        memory.iter().all(|x| x.value() == T::of(GAP).value()),
        "nothing is written between the elements"
    );
    (result, Some(grad))
}

fn run<T: Number>(s: &mut Source)
where
    T::Real: Number,
{
    let case = Case::<T>::any(s);
    let weighting = weighting(s);
    let n: usize = case.shape.iter().product::<usize>() / case.shape[case.axis];
    let objectives = if case.settings.reduction == Reduction::None { n } else { 1 };
    let mut out =
        Memory { losses: unwritten(n), weights: unwritten(case.units), objective: unwritten(objectives) };
    let (result, grad) = with_gradient(&case, s, &mut out, |inputs, grad, out| {
        let Memory { losses, weights, objective } = out;
        cross_entropy(&inputs, weighting, &case.settings, Outputs { losses, weights, objective, grad })
    });
    let [kept, weights, objective] =
        [&out.losses, &out.weights, &out.objective].map(|out| read::<T::Real>(out));
    let filled = Filled { losses: values(&kept), weights: values(&weights), objective: values(&objective) };
    let rows = match case.rows() {
        Ok(rows) => rows,
        Err((target, label)) => {
            let Err(Error::OutOfRange { index, position, classes }) = result else {
                panic!("label {label} of target {target} was not refused");
            };
            assert_eq!((index, classes), (label, case.shape[case.axis]));
            let mut shape = case.shape.clone();
            shape.remove(case.axis);
            let flat = position.iter().zip(shape).fold(0, |flat, (&i, size)| flat * size + i);
            assert_eq!(flat, target);
            assert!(kept.iter().all(|x| x.value() == 777.0), "nothing is written before a label is refused");
            return;
        }
    };
    let totals = result.unwrap();
    assert_eq!(totals.counted, rows.iter().filter(|row| row.counts).count());
    case.check_losses(&rows, &filled.losses);
    case.check_weights(&rows, weighting, &filled);
    case.check_objective(&rows, &filled);
    if let Some(grad) = grad {
        case.check_gradient(&rows, &filled.weights, &grad);
    }
    case.check_extras(&rows);

    // The same by two passes, with weights of the caller's own.
    let (mut l, mut z) = (unwritten(n), unwritten(n));
    losses(&case.inputs(case.x.0.view(&case.x.1)), &case.settings, &mut l, Some(&mut z)).unwrap();
    let [kept, logsumexp] = [l, z].map(|out| read::<T::Real>(&out));
    let weights: Vec<T::Real> = (0..case.units).map(|_| T::Real::of(s.pick(&[1.0, 0.0, 0.5, 3.0]))).collect();
    let given = Given { losses: &kept, weights: &weights, logsumexp: Some(&logsumexp) };
    let (result, grad) = with_gradient(&case, s, &mut out, |inputs, grad, out| {
        gradient(&inputs, given, &case.settings, &mut out.objective, grad)
    });
    result.unwrap();
    let objective = read::<T::Real>(&out.objective);
    let filled = Filled { losses: values(&kept), weights: values(&weights), objective: values(&objective) };
    case.check_losses(&rows, &filled.losses);
    case.check_objective(&rows, &filled);
    if let Some(grad) = grad {
        case.check_gradient(&rows, &filled.weights, &grad);
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut source = Source::new(bytes);
    match source.below(4) {
        0 => run::<f64>(&mut source),
        1 => run::<f32>(&mut source),
        2 => run::<bf16>(&mut source),
        _ => run::<f16>(&mut source),
    }
});
