//! The kernels by themselves, in bytes a second beside what a copy of the same memory takes.
//!
//! `cargo bench` runs all of them on one thread, `cargo bench -- cross_entropy/512x100` those whose name fits.

#![allow(missing_docs)]

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use half::bf16;
use ndarray::{Array2, ArrayViewMutD, IxDyn};
use rgd::cross_entropy::{self as ce, Gradient, Inputs, Outputs, Settings, Target};
use rgd::layout::Vector;
use rgd::numeric::Element;
use rgd::weightings::{Batch, Weighting, sample_weights};
use std::mem::MaybeUninit;

fn main() {
    divan::main();
}

/// Rows and classes.
const SIZES: [(usize, usize); 5] = [(128, 10), (4096, 10), (512, 100), (256, 1000), (1024, 1000)];

/// How many losses a batch of weights has.
const COUNTS: [usize; 3] = [128, 4096, 1_000_000];

/// One member of each way to compute weights, by kind and numbers.
const MEMBERS: [(&str, &[f64]); 7] = [
    ("kl", &[1.0, 0.5, 0.0]),
    ("kl_ball", &[0.1, 0.0]),
    ("chi_square", &[1.0]),
    ("chi_square_ball", &[0.1]),
    ("cvar", &[0.5, 0.0]),
    ("focal", &[1.0]),
    ("midrange_kl", &[0.5]),
];

/// Numbers that repeat on every machine, about as wide as logits.
fn numbers(count: usize) -> impl Iterator<Item = f64> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    (0..count).map(move |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f64 / 4_194_304.0 - 2.0
    })
}

trait Narrowed: Element {
    fn of(x: f64) -> Self;
}

impl Narrowed for f32 {
    fn of(x: f64) -> Self {
        x as f32
    }
}

impl Narrowed for bf16 {
    fn of(x: f64) -> Self {
        Self::from_f64(x)
    }
}

#[divan::bench(types = [f32, bf16], args = SIZES)]
fn copy<T: Narrowed>(bencher: Bencher, (rows, classes): (usize, usize)) {
    let logits: Vec<T> = numbers(rows * classes).map(T::of).collect();
    let mut grad = logits.clone();
    bencher.counter(BytesCount::of_slice(&logits)).bench_local(|| {
        grad.copy_from_slice(black_box(&logits));
        black_box(&mut grad);
    });
}

/// Losses, weights and gradient by a pointwise weighting.
#[divan::bench(types = [f32, bf16], args = SIZES)]
fn cross_entropy<T: Narrowed>(bencher: Bencher, size: (usize, usize)) {
    step::<T>(bencher, size, Weighting::new("kl", &[1.0, 0.5, 0.0]).unwrap());
}

/// The same by one that looks at the batch, and so passes twice.
#[divan::bench(types = [f32, bf16], args = SIZES)]
fn cross_entropy_by_cvar<T: Narrowed>(bencher: Bencher, size: (usize, usize)) {
    step::<T>(bencher, size, Weighting::new("cvar", &[0.5, 0.0]).unwrap());
}

fn step<T: Narrowed>(bencher: Bencher, (rows, classes): (usize, usize), weighting: Weighting) {
    let logits = Array2::from_shape_vec((rows, classes), numbers(rows * classes).map(T::of).collect())
        .expect("as many numbers as the shape has")
        .into_dyn();
    let target: Vec<i64> = (0..rows).map(|i| (i * 7 % classes) as i64).collect();
    let target = ndarray::ArrayView1::from(&target[..]).into_dyn();
    let mut grad = vec![MaybeUninit::<T>::uninit(); rows * classes];
    let mut losses = vec![MaybeUninit::uninit(); rows];
    let mut weights = vec![MaybeUninit::uninit(); rows];
    let mut objective = [MaybeUninit::uninit()];
    bencher.counter(BytesCount::of_many::<T>(rows * classes)).bench_local(|| {
        let inputs = Inputs {
            logits: logits.view(),
            target: Target::Int64(target.clone()),
            class_weight: None,
            logit_adjustment: None,
            measure: None,
        };
        let grad = ArrayViewMutD::from_shape(IxDyn(&[rows, classes]), &mut grad).unwrap();
        let out = Outputs {
            losses: &mut losses,
            weights: &mut weights,
            objective: &mut objective,
            grad: Gradient::Separate(grad),
        };
        ce::cross_entropy(black_box(&inputs), weighting, &Settings::PLAIN, out).expect("the inputs fit")
    });
}

/// The weights of float32 losses.
#[divan::bench(args = MEMBERS.iter().flat_map(|&(kind, numbers)| COUNTS.map(|n| Case { kind, numbers, n })))]
fn weights(bencher: Bencher, case: &Case) {
    let losses: Vec<f32> = numbers(case.n).map(|x| (x + 2.0) as f32).collect();
    let weighting = Weighting::new(case.kind, case.numbers).expect("a member and its numbers");
    let mut weights = vec![MaybeUninit::<f32>::uninit(); case.n];
    bencher.counter(BytesCount::of_slice(&losses)).bench_local(|| {
        let losses = Vector::of(black_box(&losses));
        sample_weights(&Batch::new(&losses, None, None, 1), weighting, &mut [], &mut weights)
            .expect("the member keeps no state");
    });
}

struct Case {
    kind: &'static str,
    numbers: &'static [f64],
    n: usize,
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{} of {}", self.kind, self.n)
    }
}
