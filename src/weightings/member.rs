//! The trait that a member of the family implements.

use super::batch::Batch;
use super::blocks::{BlockMap, write};
use crate::numeric::{Isa, Real};
use std::marker::PhantomData;
use std::mem::MaybeUninit;

/// A function from losses to weights, with its numbers.
pub trait Member: Copy + Sync {
    /// The names of its numbers, in order.
    const NUMBERS: &'static [&'static str];

    /// The member with these numbers, one for each of [`Member::NUMBERS`].
    fn from_numbers(numbers: &[f64]) -> Self;

    /// Whether each weight depends on its own loss alone.
    fn is_pointwise(&self) -> bool;

    /// The length of each leaf of its state, in the order of the leaves; empty for a member without state.
    fn state_lengths(&self) -> Vec<usize> {
        Vec::new()
    }

    /// The number of its groups; `None` if it needs no groups.
    fn groups(&self) -> Option<usize> {
        None
    }

    /// Replaces losses by their weights, which the caller rounds to `W`; called only where [`Member::is_pointwise`]
    /// holds. NaN stays NaN.
    #[inline(always)]
    fn pointwise<W: Real, I: Isa>(&self, losses: &mut [f64]) {
        let _ = losses;
        unreachable!("these weights depend on the whole batch");
    }

    /// Fills `weights` with the weights of a batch in which at least one sample takes part, and updates the state,
    /// which has the lengths of [`Member::state_lengths`].
    fn weigh<W: Real>(&self, batch: &Batch, state: &mut [Vec<f64>], weights: &mut [MaybeUninit<W>]) {
        let _ = state;
        write(batch, weights, Pointwise::<_, W>(*self, PhantomData));
    }
}

/// The pointwise weights of a block, for `W`.
#[derive(Clone, Copy)]
pub(super) struct Pointwise<M, W>(pub M, pub PhantomData<W>);

impl<M: Member, W: Real> BlockMap for Pointwise<M, W> {
    #[inline(always)]
    fn apply<I: Isa>(&self, block: &mut [f64]) {
        self.0.pointwise::<W, I>(block);
    }
}
