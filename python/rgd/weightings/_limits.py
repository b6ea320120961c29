"""Arithmetic with infinite losses: each result is the limit of the results as the loss grows."""

from __future__ import annotations

from typing import Any

from rgd.weightings._base import is_array


def difference(xp: Any, values: Any, end: Any) -> Any:
    """`values - end`, and exactly 0 where they are equal, also if both are the same infinity.

    Choose as `end` the loss of the largest weights, so that the differences near it are exact.
    """
    return xp.where(values == end, 0.0, values - end)


def small(losses: Any) -> Any:
    """A sixteenth of the losses. Their differences do not overflow, and the inverses do not underflow."""
    return losses / 16


def times(xp: Any, factor: Any, values: Any) -> Any:
    """`factor * values`, where a factor of 0 turns an infinite value into 0; NaN stays NaN."""
    if is_array(factor):
        zero = (factor == 0) & ~xp.isnan(values)
        return xp.where(zero, 0.0, factor * xp.where(zero, 0.0, values))
    return xp.where(xp.isnan(values), values, 0.0) if factor == 0 else factor * values
