"""The tail of a batch: its edge, and the part of each sample that is among the largest losses."""

from __future__ import annotations

from typing import Any

from rgd.weightings._batch import Batch


def edge_of_tail(batch: Batch, fraction: Any) -> Any:
    """The smallest loss that belongs to the share `fraction` of the measure with the largest losses.

    Args:
        batch: The batch.
        fraction: A number in [0, 1].

    Returns:
        The loss, 0-d; the largest loss for a fraction of 0.
    """
    xp = batch.xp
    order = xp.argsort(batch.losses, descending=True)
    measure = batch.cumulative_sum(xp.take(batch.measure, order, axis=0))
    reached = measure >= fraction * batch.count - _rounding(batch)
    edge = xp.max(xp.where(reached, xp.take(batch.losses, order, axis=0), -float("inf")))
    smallest, largest = batch.min(batch.losses), batch.max(batch.losses)
    # Rounding may keep the sum below a fraction of 1, and samples that take no part reach a fraction of 0.
    edge = xp.where(edge < smallest, smallest, edge)
    return xp.where(edge > largest, largest, edge)


def share_in_tail(batch: Batch, fraction: Any) -> Any:
    """The part of each sample that belongs to the share `fraction` of the measure with the largest losses.

    It is 1 above the edge of the tail and 0 below it. The samples at the edge, which have equal losses, share
    the rest in equal parts. A part that is 0 or 1 up to rounding is exactly 0 or 1.

    Args:
        batch: The batch.
        fraction: A number in [0, 1].

    Returns:
        Numbers in [0, 1], shape (n,), with `sum_i p_i share_i = fraction * sum_i p_i`.
    """
    xp, losses = batch.xp, batch.losses
    edge, rounding = edge_of_tail(batch, fraction), _rounding(batch)
    above = xp.astype(losses > edge, losses.dtype)
    at_edge = xp.astype(losses == edge, losses.dtype)
    mass_at_edge = batch.sum(at_edge)
    left = fraction * batch.count - batch.sum(above)
    part = left / xp.where(mass_at_edge > 0, mass_at_edge, 1.0)
    part = xp.where(left > rounding, part, 0.0)
    part = xp.where(left < mass_at_edge - rounding, part, 1.0)
    return above + at_edge * xp.where(mass_at_edge > 0, part, 0.0)


def _rounding(batch: Batch) -> Any:
    """A bound on the rounding error of a sum of the measure."""
    return 8.0 * batch.xp.finfo(batch.losses.dtype).eps * batch.count
