"""Shared code of the worst cases within a ball: gaps to the largest loss, and the extreme radii."""

from __future__ import annotations

from typing import Any, NamedTuple

from rgd.weightings._batch import Batch
from rgd.weightings._limits import difference, small


class Gaps(NamedTuple):
    """Losses up to a shift and a positive factor, which do not change the weights of a ball.

    Attributes:
        batch: The batch without losses of -inf, whose weight is 0 in every ball.
        left: The share of the measure in `batch`, 0-d.
        below: Gaps to the largest loss, at most 0, shape (n,).
        values: The gaps over the largest one, in [-1, 0], shape (n,). Gaps much smaller than others can be 0
            here. In JAX they are where they fall below the smallest normal number.
        on_top: 1 for the samples of the largest loss, else 0, shape (n,).
        share: The part of this measure on the samples of the largest loss, 0-d.
        infinite: Whether the largest loss is infinite, so that it gets all the weight, 0-d.
    """

    batch: Batch
    left: Any
    below: Any
    values: Any
    on_top: Any
    share: Any
    infinite: Any

    def mean(self, values: Any) -> Any:
        """`mean_of` with this batch."""
        return mean_of(self.batch, values)


def gaps_of(batch: Batch) -> Gaps:
    """The gaps of a batch."""
    batch, left = _above_minus_infinity(batch)
    xp = batch.xp
    losses = small(batch.losses)
    top, bottom = batch.max(losses), batch.min(losses)
    extent = top - bottom
    extent = xp.where(extent > 0, extent, 1.0)
    below = batch.only(difference(xp, losses, top))
    on_top = xp.astype(losses == top, losses.dtype)
    return Gaps(batch, left, below, below / extent, on_top, mean_of(batch, on_top), top == float("inf"))


def with_corners(batch: Batch, gaps: Gaps, weights: Any, *, radius: Any, radius_left: Any, limit: Any) -> Any:
    """The weights of a ball, with the exact weights at radius 0 and from `limit` on, which no search reaches.

    Args:
        batch: The whole batch.
        gaps: Its gaps.
        weights: The weights of `gaps.batch` for a radius between 0 and the limit.
        radius: The radius, 0-d.
        radius_left: The part of the radius that is left for `gaps.batch`, 0-d.
        limit: The radius from which on all weight is on the largest losses, 0-d.
    """
    xp = batch.xp
    weights = xp.where(radius_left == 0, 1.0, weights)
    weights = xp.where((radius_left >= limit) | gaps.infinite, gaps.on_top / gaps.share, weights)
    weights = gaps.batch.only(weights) / gaps.left
    # All weights are 1 if the radius is 0, also for infinite losses, and if all losses are -inf.
    weights = xp.where((radius == 0) | (gaps.left == 0), 1.0, weights)
    return xp.where(batch.any(xp.isnan(batch.losses)), float("nan"), weights)


def mean_of(batch: Batch, values: Any) -> Any:
    """The mean of numbers, (n,) or (m, n), as `batch.mean` but with fewer operations.

    The numbers must be finite where a sample takes no part.
    """
    if batch.is_plain():
        return batch.xp.mean(values, axis=-1)
    return batch.xp.sum(values * batch.measure, axis=-1) / batch.count


def _above_minus_infinity(batch: Batch) -> tuple[Batch, Any]:
    """The batch without losses of -inf, and the share of the measure that is in it, 0-d."""
    lowest = batch.losses == -float("inf")
    if batch.concrete and not bool(batch.any(lowest)):
        return batch, batch.scalar(1.0)
    rest = batch.reweighed(batch.xp.where(lowest, 0.0, batch.measure))
    return rest, rest.count / batch.count
