//! Losses to sample weights: the members of the family that have a kernel, in one table by name.
//!
//! A member is a function from the losses `l_1, ..., l_n` of a batch to their weights `w_1, ..., w_n`; a pointwise one
//! has `w_i = f(l_i)`. All of it is computed in `f64`, with the rounding errors of differences and products carried
//! along, and rounded once at the end.
//!
//! `member` says what a member implements, `blocks` has the loops over a batch. To add a member, write its file in this
//! folder, declare the module, and add its line to the table below.

mod blocks;
mod kl;
mod kl_ball;
mod member;

#[cfg(test)]
mod tests;

use crate::layout::Vector;
use crate::numeric::{Element, Isa, Real};
use blocks::PARALLEL;
use std::fmt;
use std::mem::MaybeUninit;

pub use kl::Kl;
pub use kl_ball::KlBall;
pub use member::Member;

/// Defines [`Weighting`], an enum with a variant for each line `name: Member`, and the functions that call the member
/// it holds.
macro_rules! table {
    ($($kind:literal: $Member:ident),* $(,)?) => {
        /// A member of the family, with its numbers.
        #[derive(Debug, Clone, Copy, PartialEq)]
        pub enum Weighting {
            $(#[doc = concat!("The member named `", $kind, "`.")] $Member($Member),)*
        }

        impl Weighting {
            /// The names of all members.
            pub const KINDS: &'static [&'static str] = &[$($kind),*];

            /// The member named `kind`, with its numbers.
            ///
            /// # Errors
            /// If there is no such member, or if it has another number of numbers.
            pub fn new(kind: &str, numbers: &[f64]) -> Result<Self, Error> {
                match kind {
                    $($kind => read($kind, numbers).map(Self::$Member),)*
                    _ => Err(Error::UnknownKind(kind.to_owned())),
                }
            }

            /// The member's name in the table.
            #[must_use]
            pub fn kind(&self) -> &'static str {
                match self {
                    $(Self::$Member(_) => $kind,)*
                }
            }

            /// Whether each weight depends on its own loss alone.
            #[must_use]
            pub fn is_pointwise(&self) -> bool {
                match self {
                    $(Self::$Member(member) => member.is_pointwise(),)*
                }
            }

            /// Replaces losses by their weights; only where [`Weighting::is_pointwise`] holds. NaN stays NaN.
            #[inline(always)]
            pub(crate) fn pointwise<I: Isa>(&self, losses: &mut [f64]) {
                match self {
                    $(Self::$Member(member) => member.pointwise::<I>(losses),)*
                }
            }

            fn weigh<T: Element, W: Real>(
                &self,
                losses: &Vector<T>,
                weights: &mut [MaybeUninit<W>],
                threads: usize,
            ) {
                match self {
                    $(Self::$Member(member) => member.weigh(losses, weights, threads),)*
                }
            }
        }
    };
}

table! {
    "kl": Kl,
    "kl_ball": KlBall,
}

/// Why no weighting was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// No member has this name.
    UnknownKind(String),
    /// A member was given another number of numbers than it has.
    Numbers {
        /// The member's name.
        kind: &'static str,
        /// The names of its numbers.
        expected: &'static [&'static str],
        /// How many were given.
        got: usize,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownKind(kind) => write!(
                f,
                "no Rust kernel has the kind '{kind}': the kinds known are '{}'",
                Weighting::KINDS.join("', '")
            ),
            Self::Numbers { kind, expected, got } => write!(
                f,
                "a weighting of kind '{kind}' has {} numbers ({}), got {got}",
                expected.len(),
                expected.join(", ")
            ),
        }
    }
}

impl std::error::Error for Error {}

fn read<M: Member>(kind: &'static str, numbers: &[f64]) -> Result<M, Error> {
    if numbers.len() == M::NUMBERS.len() {
        Ok(M::from_numbers(numbers))
    } else {
        Err(Error::Numbers { kind, expected: M::NUMBERS, got: numbers.len() })
    }
}

/// Fills `weights` with the weights of `losses`, in row-major order, on at most `threads` threads.
///
/// A NaN loss makes its own weight NaN, and every weight where weights depend on the batch.
///
/// # Panics
/// If `weights` is not as long as `losses`.
pub fn sample_weights<T: Element, W: Real>(
    losses: &Vector<T>,
    weighting: Weighting,
    weights: &mut [MaybeUninit<W>],
    threads: usize,
) {
    assert_eq!(losses.len(), weights.len());
    let threads = if losses.len() < PARALLEL { 1 } else { threads };
    weighting.weigh(losses, weights, threads);
}
