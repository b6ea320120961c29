//! One pass over the logits: which loop serves them, and how the targets are cut into blocks for the threads.

use super::mass::SoftMass;
use super::problem::{BLOCK, Plan, Problem};
use super::rows::Rows;
use super::tiles::Tiles;
use crate::numeric::{Element, LANES, dispatch};
use crate::parallel::{for_each_block, team};

/// Classes from which on lanes run along a contiguous row.
const ROW_CLASSES: usize = 24;

/// Logits below which waking a thread costs more than it saves.
const PARALLEL: usize = 1 << 18;

/// Likewise for a thread that waits for work actively.
const PARALLEL_ON_TEAM: usize = 1 << 15;

/// The smallest block where there are fewer than [`PARALLEL`] logits: else one for each thread.
const SMALL_BLOCK: usize = 1 << 13;

/// Works through all targets of a problem as the plan says.
pub(super) fn run<T: Element>(problem: &Problem<T>, plan: Plan<T::Real>, threads: usize) {
    let targets = problem.positions.len();
    let (small, classes) = (is_small(problem), problem.classes.max(1));
    let on_team = small && threads > 1 && targets * classes >= PARALLEL_ON_TEAM && team().is_some();
    let threads = if small && !on_team { 1 } else { threads };
    let rows = is_of_rows(problem);
    let size = if on_team { targets.div_ceil(threads).max(SMALL_BLOCK / classes) } else { BLOCK / classes };
    let size = size.max(1);
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

/// Whether a pass for the losses can leave the exponentials where the gradient goes, for the pass that writes it: they
/// stay in the cache, fit their place, and are all that the second pass has to know of the logits.
pub(super) fn can_keep<T: Element>(problem: &Problem<T>) -> bool {
    let wide = problem.grad.is_some_and(|grad| T::as_real(grad.0).is_some());
    wide && is_of_rows(problem) && is_small(problem) && problem.z_loss == 0.0
}

fn is_small<T: Element>(problem: &Problem<T>) -> bool {
    problem.positions.len() * problem.classes < PARALLEL
}

/// Whether lanes run along the classes.
fn is_of_rows<T: Element>(problem: &Problem<T>) -> bool {
    problem.logits_class == 1
        && problem.classes >= ROW_CLASSES
        && (problem.grad.is_none() || problem.grad_class == 1)
        && !matches!(problem.soft, SoftMass::Probabilities { class_stride, .. } if class_stride != 1)
}
