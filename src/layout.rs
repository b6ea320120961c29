//! Strided tensors: [`Positions`] walks one or more tensors of equal shape in row-major order, [`Vector`] reads the
//! elements of one as `f64`.
//!
//! An element with index `(i_1, ..., i_d)` lies at the address `first + sum_k i_k stride_k`. Neighbouring axes that are
//! contiguous with each other in every tensor are merged, so that a contiguous tensor is one run and a contiguous
//! `(N, C, H, W)` tensor without its class axis is `N` runs of `H * W`.

use crate::numeric::{Element, Isa, Kernel, Real, dispatch};
use ndarray::{ArrayView1, ArrayViewD};
use std::any::TypeId;
use std::mem::MaybeUninit;

/// The positions of `K` tensors of one shape, with their strides in elements.
#[derive(Debug, Clone)]
pub struct Positions<const K: usize> {
    shape: Vec<usize>,
    strides: Vec<[isize; K]>,
    len: usize,
}

impl<const K: usize> Positions<K> {
    /// Merges the axes of `shape`; `strides[k]` are the strides of tensor `k`, one an axis.
    #[must_use]
    pub fn new(shape: &[usize], strides: [&[isize]; K]) -> Self {
        let len = shape.iter().product();
        let mut merged = Self { shape: Vec::new(), strides: Vec::new(), len };
        for axis in (0..shape.len()).filter(|&axis| shape[axis] != 1) {
            let step = strides.map(|s| s[axis]);
            if let (Some(size), Some(outer)) = (merged.shape.last_mut(), merged.strides.last_mut())
                && (0..K).all(|k| outer[k] == step[k] * shape[axis] as isize)
            {
                *size *= shape[axis];
                *outer = step;
                continue;
            }
            merged.shape.push(shape[axis]);
            merged.strides.push(step);
        }
        if merged.shape.is_empty() {
            merged.shape.push(1);
            merged.strides.push([0; K]);
        }
        merged
    }

    /// The number of positions.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The strides between neighbours within a run.
    #[must_use]
    pub fn inner(&self) -> [isize; K] {
        self.strides[self.strides.len() - 1]
    }

    /// The runs of the positions `start..end`, in order.
    #[inline(always)]
    #[must_use]
    pub fn runs(&self, start: usize, end: usize) -> Runs<'_, K> {
        Runs { positions: self, next: start, end }
    }
}

/// Positions that lie at equal steps, those of [`Positions::inner`], in every tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run<const K: usize> {
    /// The first position.
    pub position: usize,
    /// How many there are.
    pub length: usize,
    /// The offset of the first position in each tensor, in elements.
    pub offsets: [isize; K],
}

/// The iterator of [`Positions::runs`].
#[derive(Debug, Clone)]
pub struct Runs<'a, const K: usize> {
    positions: &'a Positions<K>,
    next: usize,
    end: usize,
}

impl<const K: usize> Iterator for Runs<'_, K> {
    type Item = Run<K>;

    #[inline(always)]
    fn next(&mut self) -> Option<Run<K>> {
        let Positions { shape, strides, .. } = self.positions;
        let position = self.next;
        if position >= self.end {
            return None;
        }
        let mut rest = position;
        let mut offsets = [0; K];
        for (size, step) in shape.iter().zip(strides).rev() {
            let index = (rest % size) as isize;
            rest /= size;
            for k in 0..K {
                offsets[k] += index * step[k];
            }
        }
        let size = shape[shape.len() - 1];
        let length = (size - position % size).min(self.end - position);
        self.next = position + length;
        Some(Run { position, length, offsets })
    }
}

/// A tensor of any float type and strides, read as a vector in row-major order.
#[derive(Debug)]
pub struct Vector<'a, T> {
    view: ArrayViewD<'a, T>,
    positions: Positions<1>,
}

impl<'a, T: Element> Vector<'a, T> {
    /// The elements of `view`.
    #[must_use]
    pub fn new(view: ArrayViewD<'a, T>) -> Self {
        let positions = Positions::new(view.shape(), [view.strides()]);
        Self { view, positions }
    }

    /// The elements of a slice.
    #[must_use]
    pub fn of(slice: &'a [T]) -> Self {
        Self::new(ArrayView1::from(slice).into_dyn())
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

    /// Copies the elements `start..start + out.len()`, widened.
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

/// A vector of any float type.
pub trait Values: Sync {
    /// How many there are.
    fn count(&self) -> usize;
    /// Copies the elements `start..start + out.len()`, widened.
    fn read(&self, start: usize, out: &mut [f64]);
    /// The elements, if they are contiguous `f32`.
    fn f32s(&self) -> Option<&[f32]>;
}

struct Load<'a, 'b, 'c, T> {
    vector: &'a Vector<'b, T>,
    start: usize,
    out: &'c mut [f64],
}

impl<T: Element> Kernel for Load<'_, '_, '_, T> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        self.vector.load(self.start, self.out);
    }
}

impl<T: Element> Values for Vector<'_, T> {
    fn count(&self) -> usize {
        self.len()
    }

    fn read(&self, start: usize, out: &mut [f64]) {
        dispatch(Load { vector: self, start, out });
    }

    fn f32s(&self) -> Option<&[f32]> {
        let elements = self.view.as_slice().filter(|_| TypeId::of::<T>() == TypeId::of::<f32>())?;
        // SAFETY: `T` is `f32`.
        Some(unsafe { std::slice::from_raw_parts(elements.as_ptr().cast(), elements.len()) })
    }
}

/// Memory for `f32`, if it is for that.
pub(crate) fn f32s<T: 'static>(out: &mut [MaybeUninit<T>]) -> Option<&mut [MaybeUninit<f32>]> {
    if TypeId::of::<T>() != TypeId::of::<f32>() {
        return None;
    }
    // SAFETY: `T` is `f32`.
    Some(unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast(), out.len()) })
}

/// A slice whose elements have all been written, as a slice of numbers.
///
/// # Safety
/// They have all been written.
pub(crate) unsafe fn written<T: Copy>(slice: &[MaybeUninit<T>]) -> &[T] {
    // SAFETY: the layouts are the same, and the caller promises that the elements are initialised.
    unsafe { std::slice::from_raw_parts(slice.as_ptr().cast(), slice.len()) }
}

/// A tensor's memory, shared by the threads of one kernel call. Each thread uses its own part.
#[derive(Debug)]
pub(crate) struct Shared<T>(pub *mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Shared<T> {}

// SAFETY: an address may be sent to another thread; each place that dereferences it says why no two threads touch the
// same elements.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// The address of element `i`.
    ///
    /// # Safety
    /// There is such an element, or it is the end.
    #[inline(always)]
    pub(crate) unsafe fn address(self, i: usize) -> *mut T {
        // SAFETY: what the caller promises.
        unsafe { self.0.add(i) }
    }

    /// The part `start..end` of a slice given at construction.
    ///
    /// # Safety
    /// The part lies within the slice, the slice outlives `'a`, and no other thread touches that part meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn part<'a>(self, start: usize, end: usize) -> &'a mut [T] {
        // SAFETY: what the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.address(start), end - start) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk<const K: usize>(p: &Positions<K>, start: usize, end: usize) -> Vec<[isize; K]> {
        let mut out = Vec::new();
        for Run { length, offsets, .. } in p.runs(start, end) {
            for i in 0..length as isize {
                out.push(std::array::from_fn(|k| offsets[k] + i * p.inner()[k]));
            }
        }
        out
    }

    #[test]
    fn a_contiguous_tensor_is_one_run() {
        let p = Positions::new(&[2, 3, 4], [&[12, 4, 1]]);
        assert_eq!(p.runs(0, 24).count(), 1);
        assert_eq!(walk(&p, 0, 24), (0..24).map(|i| [i]).collect::<Vec<_>>());
    }

    #[test]
    fn odd_strides_are_walked_in_row_major_order_from_any_start() {
        let shape = [2, 1, 3, 2];
        let (a, b): ([isize; 4], [isize; 4]) = ([-1, 99, 4, 2], [6, 7, 2, 1]);
        let p = Positions::new(&shape, [&a, &b]);
        let mut expected = Vec::new();
        for i in 0..2isize {
            for j in 0..3isize {
                for k in 0..2isize {
                    expected.push([-i + 4 * j + 2 * k, 6 * i + 2 * j + k]);
                }
            }
        }
        for start in 0..12 {
            for end in start..=12 {
                assert_eq!(walk(&p, start, end), expected[start..end]);
            }
        }
    }

    #[test]
    fn scalars_and_empty_shapes_are_walked() {
        assert_eq!(walk(&Positions::new(&[], [&[]]), 0, 1), [[0]]);
        assert!(Positions::new(&[3, 0], [&[0, 1]]).is_empty());
        assert!(!Positions::new(&[3], [&[1]]).is_empty());
        assert!(Vector::<f64>::of(&[]).is_empty() && !Vector::of(&[1.0]).is_empty());
        assert_eq!(walk(&Positions::new(&[3], [&[0]]), 0, 3), [[0]; 3]);
    }

    #[test]
    fn a_vector_reads_any_strides_widened() {
        let numbers: Vec<half::f16> = (0..60u8).map(half::f16::from).collect();
        let array = ndarray::ArrayView2::from_shape((6, 10), &numbers).unwrap();
        let view = array.slice(ndarray::s![..;-2, 1..;3]);
        let vector = Vector::new(view.into_dyn());
        let mut read = [0.0; 7];
        vector.read(1, &mut read);
        assert_eq!((vector.count(), read), (9, [54.0, 57.0, 31.0, 34.0, 37.0, 11.0, 14.0]));
    }
}
