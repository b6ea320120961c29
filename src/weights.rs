//! Losses to KL-DRO sample weights (design: arXiv 2306.09222, Algorithm 1 and Proposition 3.1).
//!
//! Pointwise KL: `w_i = exp(s min(l_i, tau))`. Normalised KL: the same divided by its mean over the batch. KL ball:
//! `w_i = n softmax(l / gamma)_i` with `gamma` the root of `KL(softmax(l / gamma) || uniform) = radius`.
//!
//! All of it is computed in f64, with the rounding errors of differences and products carried along, and rounded once
//! at the end. A batch is worked through in blocks of a fixed size that fit the first-level cache.

use crate::layout::{Positions, Run, Shared};
use crate::parallel::{for_each_block, map_blocks};
use crate::simd::{Element, Isa, Kernel, Real, dispatch, exp, two_difference, two_product};
use ndarray::ArrayViewD;

/// How losses become weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Weighting {
    /// Exponential weights of the clipped loss.
    Kl(Kl),
    /// The worst distribution within a Kullback-Leibler ball.
    KlBall {
        /// Its radius, in nats; >= 0.
        radius: f64,
    },
}

/// The settings of exponential weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Kl {
    /// Clipping factor: losses above it count as it; > 0.
    pub tau: f64,
    /// Scaling factor; >= 0.
    pub scale: f64,
    /// Whether weights are divided by their mean.
    pub normalize: bool,
}

impl Weighting {
    /// The loss above which a sample's weight no longer grows; infinite for the ball.
    #[must_use]
    pub fn tau(&self) -> f64 {
        match self {
            Self::Kl(kl) => kl.tau,
            Self::KlBall { .. } => f64::INFINITY,
        }
    }
}

/// Elements of a block: 16 KiB of f64.
const BLOCK: usize = 2048;

/// Elements below which waking a thread costs more than it saves.
const PARALLEL: usize = 16 * BLOCK;

/// A vector of losses in memory, of any element type and strides.
#[derive(Debug)]
pub struct Losses<'a, T> {
    view: ArrayViewD<'a, T>,
    positions: Positions<1>,
}

impl<'a, T: Element> Losses<'a, T> {
    /// Reads `view` in row-major order.
    #[must_use]
    pub fn new(view: ArrayViewD<'a, T>) -> Self {
        let positions = Positions::new(view.shape(), [view.strides()]);
        Self { view, positions }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The losses `start..start + out.len()`, widened.
    #[inline(always)]
    pub(crate) fn load(&self, start: usize, out: &mut [f64]) {
        let base = self.view.as_ptr();
        let [stride] = self.positions.inner();
        for Run { position, length, offsets: [offset] } in self.positions.runs(start, start + out.len()) {
            let out = &mut out[position - start..position - start + length];
            // SAFETY: `Positions` was made of the view's own shape and strides, so every address is an element of it.
            unsafe {
                let first = base.offset(offset);
                if stride == 1 {
                    for (x, y) in out.iter_mut().zip(std::slice::from_raw_parts(first, length)) {
                        *x = y.widen().to_f64();
                    }
                } else {
                    for (i, x) in out.iter_mut().enumerate() {
                        *x = (*first.offset(i as isize * stride)).widen().to_f64();
                    }
                }
            }
        }
    }
}

impl Kl {
    /// `exp(scale * min(loss, tau))` in place, without normalisation. NaN stays NaN.
    #[inline(always)]
    pub fn pointwise<I: Isa>(&self, losses: &mut [f64]) {
        for l in losses {
            let c = if *l > self.tau { self.tau } else { *l };
            let (hi, lo) = two_product::<I>(c, self.scale);
            let w = exp::<I>(hi, lo, 1.0);
            // 0 * inf is not the 1 that a scale of zero stands for.
            *l = if self.scale == 0.0 && !l.is_nan() { 1.0 } else { w };
        }
    }
}

/// Fills `weights` with the weights of `losses`, in row-major order, on at most `threads` threads.
///
/// A NaN loss makes its own weight NaN, and every weight where weights depend on the batch.
///
/// # Panics
/// If `weights` is not as long as `losses`.
pub fn sample_weights<T: Element, W: Real>(
    losses: &Losses<T>,
    weighting: Weighting,
    weights: &mut [W],
    threads: usize,
) {
    assert_eq!(losses.len(), weights.len());
    let threads = if losses.len() < PARALLEL { 1 } else { threads };
    match weighting {
        Weighting::Kl(kl) if !kl.normalize => {
            write(losses, weights, threads, Pointwise(kl));
        }
        Weighting::Kl(kl) => {
            let extent = Extent::of(losses, threads);
            let top = if extent.max > kl.tau { kl.tau } else { extent.max };
            softmax(losses, weights, threads, Exponent { tau: kl.tau, top, beta: kl.scale }, extent);
        }
        Weighting::KlBall { radius } => {
            let extent = Extent::of(losses, threads);
            match inverse_temperature(losses, radius, extent, threads) {
                Some(beta) => {
                    let exponent = Exponent { tau: f64::INFINITY, top: extent.max, beta };
                    softmax(losses, weights, threads, exponent, extent);
                }
                None => write(
                    losses,
                    weights,
                    threads,
                    OnTop { max: extent.max, weight: losses.len() as f64 / extent.at_max as f64 },
                ),
            }
        }
    }
}

/// A function of a block of losses, applied in place.
trait BlockMap: Copy + Sync {
    fn apply<I: Isa>(&self, block: &mut [f64]);
}

#[derive(Clone, Copy)]
struct Pointwise(Kl);

impl BlockMap for Pointwise {
    #[inline(always)]
    fn apply<I: Isa>(&self, block: &mut [f64]) {
        self.0.pointwise::<I>(block);
    }
}

/// All weight on the samples of the largest loss.
#[derive(Clone, Copy)]
struct OnTop {
    max: f64,
    weight: f64,
}

impl BlockMap for OnTop {
    #[inline(always)]
    fn apply<I: Isa>(&self, block: &mut [f64]) {
        for l in block {
            *l = if *l == self.max { self.weight } else { 0.0 };
        }
    }
}

/// `beta (min(l, tau) - top)`, the shifted exponent of a softmax, in two parts.
#[derive(Clone, Copy)]
struct Exponent {
    tau: f64,
    top: f64,
    beta: f64,
}

impl Exponent {
    #[inline(always)]
    fn at<I: Isa>(&self, loss: f64) -> (f64, f64) {
        let clipped = if loss > self.tau { self.tau } else { loss };
        let (difference, error) = two_difference(clipped, self.top);
        let (hi, lo) = two_product::<I>(difference, self.beta);
        (hi, lo + error * self.beta)
    }
}

/// `exp` of an exponent, times a factor.
#[derive(Clone, Copy)]
struct Scaled {
    exponent: Exponent,
    factor: f64,
}

impl BlockMap for Scaled {
    #[inline(always)]
    fn apply<I: Isa>(&self, block: &mut [f64]) {
        for l in block {
            let (hi, lo) = self.exponent.at::<I>(*l);
            *l = exp::<I>(hi, lo, self.factor);
        }
    }
}

struct Write<'a, 'b, T, W, M> {
    losses: &'a Losses<'b, T>,
    start: usize,
    weights: &'a mut [W],
    map: M,
}

impl<T: Element, W: Real, M: BlockMap> Kernel for Write<'_, '_, T, W, M> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        let mut buffer = [0.0; BLOCK];
        let block = &mut buffer[..self.weights.len()];
        self.losses.load(self.start, block);
        self.map.apply::<I>(block);
        for (w, &x) in self.weights.iter_mut().zip(&*block) {
            *w = W::from_f64(x);
        }
    }
}

fn write<T: Element, W: Real>(losses: &Losses<T>, weights: &mut [W], threads: usize, map: impl BlockMap) {
    let (n, out) = (losses.len(), Shared(weights.as_mut_ptr()));
    for_each_block(n.div_ceil(BLOCK), threads, |i| {
        let (start, end) = (i * BLOCK, n.min((i + 1) * BLOCK));
        // SAFETY: blocks are disjoint parts of `weights`, which outlives the call.
        let weights = unsafe { out.part(start, end) };
        dispatch(Write { losses, start, weights, map });
    });
}

/// A function of a block of losses, which it may overwrite, and how values of neighbouring blocks join.
trait BlockSum: Copy + Sync {
    type Sum: Send + Clone + Default;
    fn sum<I: Isa>(&self, block: &mut [f64]) -> Self::Sum;
    fn join(a: Self::Sum, b: Self::Sum) -> Self::Sum;
}

struct Sum<'a, 'b, T, F> {
    losses: &'a Losses<'b, T>,
    start: usize,
    end: usize,
    of: F,
}

impl<T: Element, F: BlockSum> Kernel for Sum<'_, '_, T, F> {
    type Output = F::Sum;
    #[inline(always)]
    fn run<I: Isa>(self) -> F::Sum {
        let mut buffer = [0.0; BLOCK];
        let block = &mut buffer[..self.end - self.start];
        self.losses.load(self.start, block);
        self.of.sum::<I>(block)
    }
}

fn sum<T: Element, F: BlockSum>(losses: &Losses<T>, threads: usize, of: F) -> F::Sum {
    let n = losses.len();
    let blocks = map_blocks(n.div_ceil(BLOCK), threads, |i| {
        dispatch(Sum { losses, start: i * BLOCK, end: n.min((i + 1) * BLOCK), of })
    });
    blocks.into_iter().reduce(F::join).unwrap_or_default()
}

/// Sums that are kept side by side, so that adding a row of numbers to them fills the lanes.
const ROW: usize = 64;

/// A sum and its rounding error so far.
#[derive(Debug, Clone, Copy, Default)]
struct Compensated {
    sum: f64,
    error: f64,
}

impl Compensated {
    #[inline(always)]
    fn of_lanes(numbers: &[f64]) -> Self {
        let (mut sums, mut errors) = ([0.0; ROW], [0.0; ROW]);
        Self::add_rows(numbers, &mut sums, &mut errors);
        let mut total = Self::default();
        for (sum, error) in sums.into_iter().zip(errors) {
            total = total.join(Self { sum, error });
        }
        total
    }

    /// Adds each row of numbers to `sums` and the rounding errors of that to `errors`.
    #[inline(always)]
    fn add_rows(numbers: &[f64], sums: &mut [f64], errors: &mut [f64]) {
        for row in numbers.chunks(ROW) {
            for ((sum, error), &x) in sums.iter_mut().zip(&mut *errors).zip(row) {
                let next = *sum + x;
                let part = next - *sum;
                *error += (*sum - (next - part)) + (x - part);
                *sum = next;
            }
        }
    }

    fn join(self, other: Self) -> Self {
        let sum = self.sum + other.sum;
        let part = sum - self.sum;
        let error = (self.sum - (sum - part)) + (other.sum - part);
        Self { sum, error: self.error + other.error + error }
    }

    fn value(self) -> f64 {
        self.sum + self.error
    }
}

/// The range of a batch of losses.
#[derive(Debug, Clone, Copy, Default)]
struct Extent {
    min: f64,
    max: f64,
    /// How many losses are the largest.
    at_max: usize,
}

#[derive(Clone, Copy)]
struct ExtentOf;

impl BlockSum for ExtentOf {
    type Sum = Option<Extent>;

    #[inline(always)]
    fn sum<I: Isa>(&self, block: &mut [f64]) -> Option<Extent> {
        let (mut mins, mut maxs, mut nans) = ([f64::INFINITY; ROW], [f64::NEG_INFINITY; ROW], [0.0; ROW]);
        for row in block.chunks(ROW) {
            for (((min, max), nan), &l) in mins.iter_mut().zip(&mut maxs).zip(&mut nans).zip(row) {
                *min = if l < *min { l } else { *min };
                *max = if l > *max { l } else { *max };
                *nan = if l.is_nan() { l } else { *nan };
            }
        }
        let min = mins.into_iter().fold(f64::INFINITY, f64::min);
        let max = maxs.into_iter().fold(f64::NEG_INFINITY, f64::max);
        if nans.into_iter().any(f64::is_nan) {
            return Some(Extent { min: f64::NAN, max: f64::NAN, at_max: 0 });
        }
        Some(Extent { min, max, at_max: block.iter().filter(|&&l| l == max).count() })
    }

    fn join(a: Option<Extent>, b: Option<Extent>) -> Option<Extent> {
        let (Some(a), Some(b)) = (a, b) else { return a.or(b) };
        if a.max.is_nan() || b.max.is_nan() {
            return Some(if a.max.is_nan() { a } else { b });
        }
        let max = a.max.max(b.max);
        let count = |e: Extent| if e.max == max { e.at_max } else { 0 };
        Some(Extent { min: a.min.min(b.min), max, at_max: count(a) + count(b) })
    }
}

impl Extent {
    /// The extent of `losses`; if one of them is NaN, `min` and `max` are too.
    fn of<T: Element>(losses: &Losses<T>, threads: usize) -> Self {
        sum(losses, threads, ExtentOf).unwrap_or_default()
    }
}

#[derive(Clone, Copy)]
struct ExpSum(Exponent);

impl BlockSum for ExpSum {
    type Sum = Compensated;

    #[inline(always)]
    fn sum<I: Isa>(&self, block: &mut [f64]) -> Compensated {
        Scaled { exponent: self.0, factor: 1.0 }.apply::<I>(block);
        Compensated::of_lanes(block)
    }

    fn join(a: Compensated, b: Compensated) -> Compensated {
        a.join(b)
    }
}

/// `w = exp(e) / mean exp(e)`.
fn softmax<T: Element, W: Real>(
    losses: &Losses<T>,
    weights: &mut [W],
    threads: usize,
    exponent: Exponent,
    extent: Extent,
) {
    if exponent.beta == 0.0 && !extent.max.is_nan() {
        weights.fill(W::from_f64(1.0));
        return;
    }
    if exponent.top.is_infinite() {
        // The largest loss is infinite, and so is its distance to itself.
        weights.fill(W::from_f64(f64::NAN));
        return;
    }
    let total = sum(losses, threads, ExpSum(exponent)).value();
    write(losses, weights, threads, Scaled { exponent, factor: losses.len() as f64 / total });
}

/// `KL(q || uniform)` and the variance of `v` under `q`, for `v = log(q n)`: the divergence is the mean of
/// `phi(v) = v exp(v) - exp(v) + 1 >= 0`, a sum without cancellation.
#[derive(Clone, Copy)]
struct Divergence {
    exponent: Exponent,
    log_mean: f64,
}

impl BlockSum for Divergence {
    type Sum = [Compensated; 3];

    #[inline(always)]
    fn sum<I: Isa>(&self, block: &mut [f64]) -> [Compensated; 3] {
        // phi(v) = v^2 (1/2 + v/3 + v^2/8 + ...): the series sum over k >= 2 of (k - 1) / k! v^k.
        const SERIES: [f64; 9] = [
            0.5,
            1.0 / 3.0,
            0.125,
            1.0 / 30.0,
            1.0 / 144.0,
            1.0 / 840.0,
            1.0 / 5760.0,
            1.0 / 45360.0,
            1.0 / 403_200.0,
        ];
        let (mut first, mut second) = ([0.0; BLOCK], [0.0; BLOCK]);
        let (vw, vvw) = (&mut first[..block.len()], &mut second[..block.len()]);
        for ((l, vw), vvw) in block.iter_mut().zip(&mut *vw).zip(&mut *vvw) {
            let (hi, lo) = self.exponent.at::<I>(*l);
            let v = (hi - self.log_mean) + lo;
            let w = exp::<I>(v, 0.0, 1.0);
            // w = 0 stands for v = -inf, and v w for its limit.
            *vw = if w == 0.0 { 0.0 } else { v * w };
            *vvw = if w == 0.0 { 0.0 } else { v * *vw };
            let mut q = SERIES[8];
            let mut k = 8;
            while k > 0 {
                k -= 1;
                q = Real::mul_add::<I>(q, v, SERIES[k]);
            }
            *l = if v.abs() < 0.1 { v * v * q } else { *vw - w + 1.0 };
        }
        [Compensated::of_lanes(block), Compensated::of_lanes(vw), Compensated::of_lanes(vvw)]
    }

    fn join(a: [Compensated; 3], b: [Compensated; 3]) -> [Compensated; 3] {
        std::array::from_fn(|k| a[k].join(b[k]))
    }
}

/// The inverse temperature `beta = 1 / gamma` at which `KL(softmax(beta l) || uniform) = radius`; `None` if the ball
/// reaches the distribution on the largest losses alone. NaN, for which there is no such distribution, where a loss is NaN
/// or where losses lie infinitely far apart.
///
/// `KL` grows with `beta`, from 0 to `log(n / m)`. Newton's iteration solves `sqrt(KL) = sqrt(radius)`, nearly linear
/// in `beta` as long as `KL` is small, or `log(limit - KL) = log(limit - radius)`, nearly linear where it saturates; a
/// bracket that every evaluation tightens keeps it safe.
fn inverse_temperature<T: Element>(
    losses: &Losses<T>,
    radius: f64,
    extent: Extent,
    threads: usize,
) -> Option<f64> {
    let n = losses.len() as f64;
    if extent.max.is_nan() {
        return Some(f64::NAN);
    }
    if radius == 0.0 || losses.is_empty() || extent.min == extent.max {
        return Some(0.0);
    }
    let spread = extent.max - extent.min;
    if !spread.is_finite() {
        return Some(f64::NAN);
    }
    let limit = (n / extent.at_max as f64).ln();
    if radius >= limit {
        return None;
    }
    let (mut low, mut high) = (0.0, f64::INFINITY);
    // The radius at which a two-point distribution of this spread would be reached.
    let mut beta = (8.0 * radius).sqrt() / spread;
    for _ in 0..200 {
        let exponent = Exponent { tau: f64::INFINITY, top: extent.max, beta };
        let log_mean = (sum(losses, threads, ExpSum(exponent)).value() / n).ln();
        let [kl, mean, square] =
            sum(losses, threads, Divergence { exponent, log_mean }).map(|s| s.value() / n);
        if kl < radius {
            low = beta;
        } else {
            high = beta;
        }
        let slope = (square - mean * mean) / beta;
        let gap = (limit - kl) / (limit - radius);
        let step = if kl < 0.5 * limit {
            2.0 * kl.sqrt() * (radius.sqrt() - kl.sqrt()) / slope
        } else {
            gap.ln() * (limit - kl) / slope
        };
        let mut next = beta + step;
        if !(next > low && next < high) {
            next = if high.is_infinite() { 4.0 * beta } else { 0.5 * (low + high) };
        }
        next = next.min(16.0 * beta);
        if (kl - radius).abs() <= 1e-15 * radius || (next - beta).abs() <= 2e-16 * beta {
            return Some(beta);
        }
        // Every loss but the largest has weight zero already: the root lies in the last bit below the limit.
        if beta.is_infinite() || (low > 0.0 && high <= low * (1.0 + 4e-16)) {
            break;
        }
        beta = next;
    }
    if beta.is_finite() { Some(beta) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array, ArrayD, IxDyn};
    use proptest::prelude::*;

    fn weigh(losses: &[f64], weighting: Weighting) -> Vec<f64> {
        let losses = ArrayD::from_shape_vec(IxDyn(&[losses.len()]), losses.to_vec()).unwrap();
        let mut weights = vec![0.0; losses.len()];
        sample_weights(&Losses::new(losses.view()), weighting, &mut weights, 1);
        weights
    }

    fn divergence(weights: &[f64]) -> f64 {
        let n = weights.len() as f64;
        weights.iter().map(|&w| if w > 0.0 { w * w.ln() - w + 1.0 } else { 1.0 }).sum::<f64>() / n
    }

    const KL: Kl = Kl { tau: 1.0, scale: 0.5, normalize: false };

    #[test]
    fn pointwise_weights_follow_the_formula() {
        let w = weigh(&[0.0, 0.5, 1.0, 7.0, f64::INFINITY, -1.0, f64::NEG_INFINITY], Weighting::Kl(KL));
        let e = [0.0f64, 0.25, 0.5, 0.5, 0.5, -0.5].map(f64::exp);
        for (w, e) in w.iter().zip(e) {
            assert!((w / e - 1.0).abs() < 4e-16);
        }
        assert_eq!(w[6], 0.0);
        assert!(weigh(&[f64::NAN], Weighting::Kl(KL))[0].is_nan());
    }

    #[test]
    fn a_scale_of_zero_is_exactly_one_for_every_number() {
        let kl = Kl { tau: f64::INFINITY, scale: 0.0, normalize: false };
        assert_eq!(weigh(&[3.0, f64::INFINITY, -2.0], Weighting::Kl(kl)), [1.0; 3]);
        assert!(weigh(&[f64::NAN], Weighting::Kl(kl))[0].is_nan());
    }

    #[test]
    fn a_nan_spreads_as_far_as_weights_depend_on_it() {
        let losses = [1.0, f64::NAN, 2.0];
        let w = weigh(&losses, Weighting::Kl(KL));
        assert!(w[0].is_finite() && w[1].is_nan() && w[2].is_finite());
        for weighting in [Weighting::Kl(Kl { normalize: true, ..KL }), Weighting::KlBall { radius: 0.1 }] {
            assert!(weigh(&losses, weighting).iter().all(|w| w.is_nan()));
        }
    }

    #[test]
    fn the_ball_knows_its_corners() {
        let ball = |radius| Weighting::KlBall { radius };
        assert_eq!(weigh(&[1.0, 2.0, 2.0], ball(0.0)), [1.0; 3]);
        assert_eq!(weigh(&[2.0, 2.0, 2.0], ball(1.0)), [1.0; 3]);
        assert_eq!(weigh(&[1.0, 2.0, 2.0], ball(5.0)), [0.0, 1.5, 1.5]);
        assert_eq!(weigh(&[1.0, 2.0, 2.0], ball(f64::INFINITY)), [0.0, 1.5, 1.5]);
        assert_eq!(weigh(&[4.0], ball(0.3)), [1.0]);
        assert!(weigh(&[], ball(0.3)).is_empty());
    }

    #[test]
    fn the_root_is_found_for_many_sizes_and_one_outlier() {
        for n in [2usize, 3, 10, 1000, 200_000] {
            let mut losses: Vec<f64> = (0..n).map(|i| ((i * 7919) % 1013) as f64 / 1013.0).collect();
            losses[0] = 30.0;
            for radius in [1e-12, 1e-6, 1e-3, 0.3, 0.6] {
                let w = weigh(&losses, Weighting::KlBall { radius });
                let phi: f64 = w
                    .iter()
                    .map(|&w| {
                        let d = w - 1.0;
                        if d.abs() < 1e-4 {
                            d * d * (0.5 - d / 6.0 + d * d / 12.0)
                        } else if w == 0.0 {
                            1.0
                        } else {
                            w * w.ln() - d
                        }
                    })
                    .sum::<f64>()
                    / n as f64;
                // The weights themselves are rounded: eps / |w - 1| each, about eps / sqrt(radius).
                let tolerance = 1e-10 + 1e-15 / radius.sqrt();
                assert!((phi / radius - 1.0).abs() < tolerance, "{n} {radius}: {phi}");
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let losses =
            Array::from_shape_fn(IxDyn(&[301, 409]), |i| ((i[0] * 31 + i[1] * 17) % 1000) as f32 / 99.0);
        let losses = Losses::new(losses.view());
        for weighting in [
            Weighting::Kl(KL),
            Weighting::Kl(Kl { normalize: true, ..KL }),
            Weighting::KlBall { radius: 0.2 },
        ] {
            let [one, two, many] = [1, 2, 5].map(|threads| {
                let mut w = vec![0f32; losses.len()];
                sample_weights(&losses, weighting, &mut w, threads);
                w
            });
            assert!(one == two && two == many);
        }
    }

    #[test]
    fn strided_losses_are_read_in_place() {
        let a = Array::from_shape_fn(IxDyn(&[6, 10]), |i| (i[0] * 10 + i[1]) as f64 / 20.0);
        let view = a.slice(ndarray::s![..;-2, 1..;3]);
        let mut strided = vec![0.0; 9];
        sample_weights(&Losses::new(view.into_dyn()), Weighting::Kl(KL), &mut strided, 1);
        let flat: Vec<f64> = view.iter().copied().collect();
        assert_eq!(strided, weigh(&flat, Weighting::Kl(KL)));
    }

    proptest! {
        #[test]
        fn normalised_weights_average_to_one(losses in prop::collection::vec(-50f64..50.0, 1..200), tau in 0.1f64..60.0) {
            let w = weigh(&losses, Weighting::Kl(Kl { tau, scale: 0.7, normalize: true }));
            prop_assert!((w.iter().sum::<f64>() / w.len() as f64 - 1.0).abs() < 1e-14 * w.len() as f64);
        }

        #[test]
        fn the_ball_is_filled_and_its_weights_grow_with_the_loss(
            losses in prop::collection::vec(-50f64..50.0, 2..200), radius in 0.001f64..6.0
        ) {
            let w = weigh(&losses, Weighting::KlBall { radius });
            prop_assert!((w.iter().sum::<f64>() / w.len() as f64 - 1.0).abs() < 1e-13 * w.len() as f64);
            let max = losses.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let at_max = losses.iter().filter(|&&l| l == max).count();
            let reachable = radius.min((losses.len() as f64 / at_max as f64).ln());
            prop_assert!((divergence(&w) / reachable - 1.0).abs() < 1e-10, "{} {}", divergence(&w), reachable);
            let mut order: Vec<usize> = (0..w.len()).collect();
            order.sort_by(|&a, &b| losses[a].total_cmp(&losses[b]));
            prop_assert!(order.windows(2).all(|p| w[p[0]] <= w[p[1]]));
        }
    }
}
