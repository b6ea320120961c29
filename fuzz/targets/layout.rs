//! Strided tensors: [`Positions`] against nested indices, and [`Vector`] against ndarray's own iterator.
#![no_main]

use half::{bf16, f16};
use libfuzzer_sys::fuzz_target;
use rgd::layout::{Positions, Run, Values, Vector};
use rgd_fuzz::{Layout, Number, Source};

/// The offset of every index of a shape, in row-major order, by counting the index up.
fn offsets<const K: usize>(shape: &[usize], strides: [&[isize]; K]) -> Vec<[isize; K]> {
    let mut found = Vec::new();
    let mut index = vec![0usize; shape.len()];
    'next: loop {
        if shape.contains(&0) {
            return found;
        }
        found.push(strides.map(|strides| index.iter().zip(strides).map(|(&i, s)| i as isize * s).sum()));
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            if index[axis] < shape[axis] {
                continue 'next;
            }
            index[axis] = 0;
        }
        return found;
    }
}

fn shape(source: &mut Source) -> Vec<usize> {
    let mut shape: Vec<usize> =
        (0..source.below(6)).map(|_| source.pick(&[1, 2, 3, 4, 5, 1, 2, 7, 11, 0])).collect();
    while shape.iter().product::<usize>() > 3000 {
        shape.pop();
    }
    shape
}

fn positions(source: &mut Source) {
    let shape = shape(source);
    let contiguous = source.one_in(3);
    let mut strides = [vec![0isize; shape.len()], vec![0; shape.len()], vec![0; shape.len()]];
    for strides in &mut strides {
        let mut step = 1;
        for (axis, stride) in strides.iter_mut().enumerate().rev() {
            *stride = if contiguous { step } else { source.pick(&[1, 2, -1, 0, 6, 24, step, step, -step]) };
            step *= shape[axis].max(1) as isize;
        }
    }
    let strides = [&strides[0][..], &strides[1][..], &strides[2][..]];
    let expected = offsets(&shape, strides);
    let walked = Positions::new(&shape, strides);
    let n = expected.len();
    assert_eq!((walked.len(), walked.is_empty()), (n, n == 0));
    let (a, b) = (source.below(n + 1), source.below(n + 1));
    for (start, end) in [(0, n), (a.min(b), a.max(b))] {
        let mut next = start;
        for Run { position, length, offsets } in walked.runs(start, end) {
            assert!(position == next && length > 0 && position + length <= end);
            for i in 0..length {
                let at = std::array::from_fn(|k| offsets[k] + i as isize * walked.inner()[k]);
                assert_eq!(at, expected[position + i], "{shape:?} {strides:?} at {}", position + i);
            }
            next += length;
        }
        assert_eq!(next, end);
        assert!(!contiguous || walked.runs(start, end).count() <= 1, "a contiguous tensor is one run");
    }
}

fn vector<T: Number>(source: &mut Source) {
    let shape = shape(source);
    let layout = Layout::any(source, shape.len());
    let mut next = 0.0;
    // As many numbers as every type tells apart.
    let memory = layout.tensor::<T>(&shape, || {
        next = (next + 1.0) % 251.0;
        next
    });
    let expected: Vec<f64> = layout.view(&memory).iter().map(|x| x.value()).collect();
    let vector = Vector::new(layout.view(&memory));
    let n = expected.len();
    assert_eq!((vector.count(), vector.is_empty()), (n, n == 0));
    let (a, b) = (source.below(n + 1), source.below(n + 1));
    for (start, end) in [(0, n), (a.min(b), a.max(b))] {
        let mut read = vec![f64::NAN; end - start];
        vector.read(start, &mut read);
        assert_eq!(read, expected[start..end], "{shape:?} {start}..{end}");
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut source = Source::new(bytes);
    match source.below(8) {
        0 => vector::<f64>(&mut source),
        1 => vector::<f32>(&mut source),
        2 => vector::<f16>(&mut source),
        3 => vector::<bf16>(&mut source),
        _ => positions(&mut source),
    }
});
