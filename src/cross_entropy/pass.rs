//! One pass over the logits: which loop serves them, and how the targets are cut into blocks for the threads.

use super::mass::SoftMass;
use super::problem::{BLOCK, Plan, Problem};
use super::rows::Rows;
use super::tiles::Tiles;
use crate::numeric::{Element, LANES, dispatch};
use crate::parallel::for_each_block;

/// Classes from which on lanes run along a contiguous row.
const ROW_CLASSES: usize = 24;

/// Logits below which waking a thread costs more than it saves.
const PARALLEL: usize = 1 << 18;

/// Works through all targets of a problem as the plan says.
pub(super) fn run<T: Element>(problem: &Problem<T>, plan: Plan<T::Real>, threads: usize) {
    let targets = problem.positions.len();
    let threads = if targets * problem.classes < PARALLEL { 1 } else { threads };
    let rows = problem.logits_class == 1
        && problem.classes >= ROW_CLASSES
        && (problem.grad.is_none() || problem.grad_class == 1)
        && !matches!(problem.soft, SoftMass::Probabilities { class_stride, .. } if class_stride != 1);
    let size = (BLOCK / problem.classes.max(1)).max(1);
    let size = if rows { size } else { size.next_multiple_of(LANES) };
    for_each_block(targets.div_ceil(size), threads, |i| {
        let (start, end) = (i * size, targets.min((i + 1) * size));
        if rows {
            dispatch(Rows { problem, plan, start, end });
        } else {
            dispatch(Tiles { problem, plan, start, end });
        }
    });
}
