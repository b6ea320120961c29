//! What the fuzz targets share: choices and numbers from the fuzzer's bytes, memory of any strides, and the comparison
//! of a result with what was expected.

use half::{bf16, f16};
use ndarray::{ArrayD, ArrayViewD, ArrayViewMutD, IxDyn, Slice};
use rgd::numeric::{Element, Real};
use std::mem::MaybeUninit;

/// Choices from the bytes of the fuzzer. When they are used up, a generator seeded by all of them goes on, so that a
/// short input describes a large case.
pub struct Source<'a> {
    bytes: &'a [u8],
    state: u64,
}

impl<'a> Source<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        let state = bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self { bytes, state }
    }

    pub fn byte(&mut self) -> u8 {
        if let Some((&first, rest)) = self.bytes.split_first() {
            self.bytes = rest;
            return first;
        }
        // splitmix64
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z >> 56) as u8
    }

    pub fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u8) -> bool {
        self.byte() % n == 0
    }

    /// An integer below `n`, which is at most 65536.
    pub fn below(&mut self, n: usize) -> usize {
        let low = usize::from(self.byte());
        if n <= 256 { low % n } else { (low + 256 * usize::from(self.byte())) % n }
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// A number in `[0, 1)`.
    pub fn unit(&mut self) -> f64 {
        let [a, b, c] = std::array::from_fn(|_| f64::from(self.byte()));
        (a + (b + c / 256.0) / 256.0) / 256.0
    }

    /// A number in `[-8, 8)` or, in a wild case, now and then an extreme one; `huge` is the largest finite one.
    pub fn number(&mut self, wild: bool, huge: f64) -> f64 {
        let x = 16.0 * self.unit() - 8.0;
        if !wild || !self.one_in(12) {
            return x;
        }
        let inf = f64::INFINITY;
        self.pick(&[inf, -inf, f64::NAN, huge, -huge, 0.0, -0.0, 1e-40, 1e4, -1e4, 1.0, huge * x / 8.0])
    }
}

/// A float type of the kernels, with its conversions by the standard library or by the crate `half`.
pub trait Number: Element {
    /// The distance from 1 to the next number.
    const EPS: f64;
    /// The largest finite number.
    const MAX: f64;
    /// The smallest positive number.
    const TINY: f64;
    fn of(x: f64) -> Self;
    fn value(self) -> f64;
}

macro_rules! number {
    ($($t:ty: $eps:expr, $max:expr, $tiny:expr, $of:expr, $value:expr;)*) => {
        $(impl Number for $t {
            const EPS: f64 = $eps;
            const MAX: f64 = $max;
            const TINY: f64 = $tiny;
            fn of(x: f64) -> Self {
                $of(x)
            }
            fn value(self) -> f64 {
                $value(self)
            }
        })*
    };
}

number! {
    f64: f64::EPSILON, f64::MAX, 5e-324, |x| x, |x| x;
    f32: f32::EPSILON as f64, f32::MAX as f64, 1.4e-45, |x| x as f32, f64::from;
    f16: 1.0 / 1024.0, 65504.0, 6e-8, f16::from_f64, f16::to_f64;
    bf16: 1.0 / 128.0, 3.389e38, 9.2e-41, bf16::from_f64, bf16::to_f64;
}

/// How a tensor lies in memory: the order of its axes there, and the step of each. A negative step turns its axis
/// around.
#[derive(Clone)]
pub struct Layout {
    order: Vec<usize>,
    steps: Vec<isize>,
}

impl Layout {
    pub fn any(source: &mut Source, axes: usize) -> Self {
        let mut order: Vec<usize> = (0..axes).collect();
        let mut steps = vec![1; axes];
        if source.flag() {
            for i in (1..axes).rev() {
                order.swap(i, source.below(i + 1));
            }
            for step in &mut steps {
                *step = source.pick(&[1, 1, 1, 2, 3, -1, -2]);
            }
        }
        Self { order, steps }
    }

    /// Memory for a tensor of this shape, not an element longer, filled with `gap`.
    pub fn memory<T: Clone>(&self, shape: &[usize], gap: T) -> ArrayD<T> {
        let length = |&axis: &usize| match shape[axis] {
            0 => 0,
            size => (size - 1) * self.steps[axis].unsigned_abs() + 1,
        };
        ArrayD::from_elem(self.order.iter().map(length).collect::<Vec<_>>(), gap)
    }

    fn axes(&self) -> IxDyn {
        let mut axes = vec![0; self.order.len()];
        for (position, &axis) in self.order.iter().enumerate() {
            axes[axis] = position;
        }
        IxDyn(&axes)
    }

    /// The tensor in its memory.
    pub fn view<'a, T>(&self, memory: &'a ArrayD<T>) -> ArrayViewD<'a, T> {
        let mut view = memory.view().permuted_axes(self.axes());
        view.slice_each_axis_inplace(|axis| Slice::new(0, None, self.steps[axis.axis.index()]));
        view
    }

    /// The tensor in its memory, to write.
    pub fn view_mut<'a, T>(&self, memory: &'a mut ArrayD<T>) -> ArrayViewMutD<'a, T> {
        let mut view = memory.view_mut().permuted_axes(self.axes());
        view.slice_each_axis_inplace(|axis| Slice::new(0, None, self.steps[axis.axis.index()]));
        view
    }

    /// A tensor of numbers, in memory of its own, with NaN between the elements.
    pub fn tensor<T: Number>(&self, shape: &[usize], mut number: impl FnMut() -> f64) -> ArrayD<T> {
        let mut memory = self.memory(shape, T::of(f64::NAN));
        self.view_mut(&mut memory).iter_mut().for_each(|x| *x = T::of(number()));
        memory
    }
}

/// Memory for outputs, filled with a number that no kernel would leave.
pub fn unwritten<A: Number>(count: usize) -> Vec<MaybeUninit<A>> {
    vec![MaybeUninit::new(A::of(777.0)); count]
}

/// The outputs as numbers.
pub fn read<A: Number>(out: &[MaybeUninit<A>]) -> Vec<A> {
    // SAFETY: `unwritten` wrote every element.
    out.iter().map(|x| unsafe { x.assume_init() }).collect()
}

/// Checks that `got`, a number of a type whose largest finite number is `max`, is `expected` up to `tolerance`: NaN for
/// NaN, and an infinity for what is larger than `max`.
#[track_caller]
pub fn check(what: &str, at: usize, got: f64, expected: f64, tolerance: f64, max: f64) {
    assert!(!tolerance.is_nan() || expected.is_nan(), "{what} {at}: no tolerance for {expected}");
    let near = (got - expected).abs() <= tolerance;
    let overflows = expected.abs() >= max * 0.99 && got.is_infinite() && got.signum() == expected.signum();
    let fine = if expected.is_nan() { got.is_nan() } else { near || overflows || got == expected };
    assert!(fine, "{what} {at}: got {got:e}, expected {expected:e} up to {tolerance:e}");
}

/// The rounding of a type: of a number, a half of its last place.
pub fn rounding<A: Number>(x: f64) -> f64 {
    if x.is_finite() { A::EPS * x.abs() + A::TINY } else { A::TINY }
}

/// `f64` of an accumulator's number, by way of the trait of the targets.
pub fn values<A: Real + Number>(numbers: &[A]) -> Vec<f64> {
    numbers.iter().map(|&x| x.value()).collect()
}
