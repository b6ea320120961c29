//! What a member of the family implements.

use super::blocks::{BlockMap, write};
use crate::layout::Vector;
use crate::numeric::{Element, Isa, Real};
use std::mem::MaybeUninit;

/// A function from losses to weights, with its numbers.
pub trait Member: Copy + Sync {
    /// The names of its numbers, in order.
    const NUMBERS: &'static [&'static str];

    /// The member with these numbers, one for each of [`Member::NUMBERS`].
    fn from_numbers(numbers: &[f64]) -> Self;

    /// Whether each weight depends on its own loss alone.
    fn is_pointwise(&self) -> bool;

    /// Replaces losses by their weights; called only where [`Member::is_pointwise`] holds. NaN stays NaN.
    #[inline(always)]
    fn pointwise<I: Isa>(&self, losses: &mut [f64]) {
        let _ = losses;
        unreachable!("these weights depend on the whole batch");
    }

    /// Fills `weights` with the weights of `losses`, which are as many.
    fn weigh<T: Element, W: Real>(&self, losses: &Vector<T>, weights: &mut [MaybeUninit<W>], threads: usize) {
        write(losses, weights, threads, Pointwise(*self));
    }
}

/// The pointwise weights of a block.
#[derive(Clone, Copy)]
pub(super) struct Pointwise<M>(pub M);

impl<M: Member> BlockMap for Pointwise<M> {
    #[inline(always)]
    fn apply<I: Isa>(&self, block: &mut [f64]) {
        self.0.pointwise::<I>(block);
    }
}
