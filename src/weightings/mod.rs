//! Losses to sample weights: the members of the family that have a kernel, in one table by name.
//!
//! A member is a function from the losses `l_1, ..., l_n` of a batch to their weights `w_1, ..., w_n`; a pointwise one
//! has `w_i = f(l_i)`. A sample whose measure is 0 takes no part and has weight 0. Some members need groups, and some
//! remember earlier batches in a state of a few vectors. Weights are computed in `f64`, with the rounding errors of
//! differences and products carried along, and rounded at the end. (Pointwise `f32` weights of [`Kl`]: to 1 ulp.)
//!
//! `member` has the trait of a member, `batch` its input, and `blocks` the loops over a batch. To add a member, write
//! its file in this folder, declare the module, and add its line to the table below.

mod batch;
mod blocks;
mod chi_square;
mod compensated;
mod cvar;
mod focal;
mod group_dro;
mod kl;
mod kl_ball;
mod member;
mod midrange_kl;
mod moving_average;
mod tail;
mod threshold;
mod trimmed;

#[cfg(test)]
mod tests;

use crate::numeric::{Isa, Real};
use std::fmt;
use std::mem::MaybeUninit;

pub use batch::Batch;
pub use chi_square::{ChiSquare, ChiSquareBall};
pub use cvar::Cvar;
pub use focal::Focal;
pub use group_dro::GroupDro;
pub use kl::Kl;
pub use kl_ball::KlBall;
pub use member::Member;
pub use midrange_kl::MidrangeKl;
pub use moving_average::MovingAverageOfKl;
pub use threshold::Threshold;
pub use trimmed::Trimmed;

/// [`Trimmed`] members by the names that the table can hold.
type TrimmedChiSquare = Trimmed<ChiSquare>;
type TrimmedCvar = Trimmed<Cvar>;
type TrimmedKl = Trimmed<Kl>;

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
            /// If there is no such member, or if the number of `numbers` is wrong.
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

            /// The length of each leaf of its state; empty for a member without state.
            #[must_use]
            pub fn state_lengths(&self) -> Vec<usize> {
                match self {
                    $(Self::$Member(member) => member.state_lengths(),)*
                }
            }

            fn groups(&self) -> Option<usize> {
                match self {
                    $(Self::$Member(member) => member.groups(),)*
                }
            }

            /// Replaces losses by their weights, which the caller rounds to `W`; only where
            /// [`Weighting::is_pointwise`] holds. NaN stays NaN.
            #[inline(always)]
            pub(crate) fn pointwise<W: Real, I: Isa>(&self, losses: &mut [f64]) {
                match self {
                    $(Self::$Member(member) => member.pointwise::<W, I>(losses),)*
                }
            }

            fn weigh<W: Real>(
                &self,
                batch: &Batch,
                state: &mut [Vec<f64>],
                weights: &mut [MaybeUninit<W>],
            ) {
                match self {
                    $(Self::$Member(member) => member.weigh(batch, state, weights),)*
                }
            }
        }
    };
}

table! {
    "chi_square": ChiSquare,
    "chi_square_ball": ChiSquareBall,
    "cvar": Cvar,
    "focal": Focal,
    "group_dro": GroupDro,
    "kl": Kl,
    "kl_ball": KlBall,
    "midrange_kl": MidrangeKl,
    "moving_average(kl)": MovingAverageOfKl,
    "threshold": Threshold,
    "trimmed(chi_square)": TrimmedChiSquare,
    "trimmed(cvar)": TrimmedCvar,
    "trimmed(kl)": TrimmedKl,
}

/// Why a weighting could not be made, or could not compute weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// No member has this name.
    UnknownKind(String),
    /// A member was given a wrong number of numbers.
    Numbers {
        /// The member's name.
        kind: &'static str,
        /// The names of its numbers.
        expected: &'static [&'static str],
        /// How many were given.
        got: usize,
    },
    /// A member that needs groups was given none.
    NoGroups,
    /// The groups of some samples that take part are out of range.
    GroupOutOfRange {
        /// How many groups the member has.
        groups: usize,
        /// The smallest group that was given.
        smallest: i64,
        /// The largest.
        largest: i64,
    },
    /// The leaves of the state do not have the member's lengths.
    State {
        /// The member's name.
        kind: &'static str,
        /// How many numbers each leaf has.
        expected: Vec<usize>,
        /// What was given.
        got: Vec<usize>,
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
            Self::NoGroups => {
                write!(f, "GroupDRO needs the group of each sample: give groups= with the losses")
            }
            Self::GroupOutOfRange { groups, smallest, largest } => write!(
                f,
                "groups must lie in 0..{} for GroupDRO(groups={groups}), got {smallest} to {largest}",
                *groups as i64 - 1
            ),
            Self::State { kind, expected, got } => write!(
                f,
                "the state of a weighting of kind '{kind}' has leaves of {expected:?} numbers, got {got:?}"
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

/// Fills `weights` with the weights of a batch, in row-major order, and updates `state`, the leaves of the member's
/// state.
///
/// A NaN loss makes its own weight NaN, and every weight if weights depend on the batch. The state does not change if
/// no sample takes part, or if a loss that takes part is not finite.
///
/// # Errors
/// [`Error::State`], [`Error::NoGroups`] or [`Error::GroupOutOfRange`], before anything is written.
///
/// # Panics
/// If `weights` is not as long as the losses.
pub fn sample_weights<W: Real>(
    batch: &Batch,
    weighting: Weighting,
    state: &mut [Vec<f64>],
    weights: &mut [MaybeUninit<W>],
) -> Result<(), Error> {
    assert_eq!(batch.losses.count(), weights.len());
    check(batch, weighting, state)?;
    if batch.total == 0.0 {
        blocks::fill(batch, weights, 0.0);
    } else if state.is_empty() {
        weighting.weigh(batch, state, weights);
    } else {
        let mut next = state.to_vec();
        weighting.weigh(batch, &mut next, weights);
        if blocks::is_usable(batch) {
            state.clone_from_slice(&next);
        }
    }
    Ok(())
}

fn check(batch: &Batch, weighting: Weighting, state: &[Vec<f64>]) -> Result<(), Error> {
    let (expected, got) = (weighting.state_lengths(), state.iter().map(Vec::len).collect::<Vec<_>>());
    if expected != got {
        return Err(Error::State { kind: weighting.kind(), expected, got });
    }
    let Some(groups) = weighting.groups() else { return Ok(()) };
    let given = batch.groups.ok_or(Error::NoGroups)?;
    let outside =
        |(i, &g): (usize, &i64)| batch.p(i) != 0.0 && usize::try_from(g).map_or(true, |g| g >= groups);
    if given.iter().enumerate().any(outside) {
        let (smallest, largest) = given.iter().fold((i64::MAX, i64::MIN), |(a, b), &g| (a.min(g), b.max(g)));
        return Err(Error::GroupOutOfRange { groups, smallest, largest });
    }
    Ok(())
}
