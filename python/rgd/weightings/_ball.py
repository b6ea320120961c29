"""What worst cases within a ball share: the gaps to the largest loss, and the corners of the ball."""

from __future__ import annotations

from typing import Any, NamedTuple

from rgd.weightings._batch import Batch


class Gaps(NamedTuple):
    """Losses up to a shift and a positive factor, which do not change the weights of a ball.

    Attributes:
        values: Gaps to the largest loss over the range of the losses, in [-1, 0], shape (n,).
        on_top: 1 for the samples of the largest loss, else 0, shape (n,).
        share: The share of the mass on those, 0-d.
        equal: Whether all losses are the same number, 0-d.
    """

    values: Any
    on_top: Any
    share: Any
    equal: Any


def gaps_of(batch: Batch) -> Gaps:
    """The gaps of a batch."""
    xp, losses = batch.xp, batch.losses
    # The difference of halves cannot overflow.
    halves = losses / 2
    top, bottom = batch.max(halves), batch.min(halves)
    extent = top - bottom
    values = batch.only((halves - top) / xp.where(extent > 0, extent, 1.0))
    on_top = xp.astype(values == 0, losses.dtype)
    return Gaps(values, on_top, batch.mean(on_top), top == bottom)


def with_corners(batch: Batch, gaps: Gaps, weights: Any, radius: Any, limit: Any) -> Any:
    """Weights from within a ball, with those of its corners where a search does not reach.

    Args:
        batch: The batch.
        gaps: Its gaps.
        weights: The weights for a radius between 0 and the limit.
        radius: The radius, 0-d.
        limit: The radius from which on all weight lies on the largest losses, 0-d.
    """
    xp, losses = batch.xp, batch.losses
    weights = xp.where(radius >= limit, gaps.on_top / gaps.share, weights)
    weights = xp.where(batch.any(~xp.isfinite(losses)), float("nan"), weights)
    # Losses that are all the same number, or no ball at all, give ones, infinite losses too.
    plain = ((radius == 0) & ~batch.any(xp.isnan(losses))) | gaps.equal
    return xp.where(plain, 1.0, weights)
