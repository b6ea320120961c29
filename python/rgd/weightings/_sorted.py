"""A sorted batch: sums over its largest or smallest values, and the smallest value that passes a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rgd.weightings._batch import Batch

MOST = 1 << 24
"""The largest batch of a formula that is traced for batches of any size."""

ELEMENTS = 1 << 20
"""The largest size of all candidates of one round times the batch: a larger batch has fewer candidates."""


def in_order(batch: Batch, values: Any, *, falling: bool) -> tuple[Any, Any]:
    """Values in order, and the measure of each; samples that take no part have measure 0.

    Args:
        batch: The batch.
        values: Numbers of shape (n,).
        falling: Whether the largest comes first.
    """
    xp = batch.xp
    if batch.is_plain():
        return xp.sort(values, descending=falling), batch.measure
    order = xp.argsort(values, descending=falling)
    return xp.take(values, order, axis=0), xp.take(batch.measure, order, axis=0)


def first_enough(batch: Batch, rising: Any, enough: Callable[[Any], Any]) -> Any:
    """The smallest value for which `enough` is True, found in a fixed number of operations.

    Args:
        batch: The batch.
        rising: Values in rising order, shape (n,); for the last one `enough` is assumed to be True.
        enough: Maps candidates, shape (m, 1), to booleans of shape (m,). If it is True for a value, it must
            be True for every larger value.

    Returns:
        The value, 0-d.
    """
    xp, size = batch.xp, rising.shape[0]
    width, candidates = (MOST, 15) if batch.any_size else (size, 63)
    while candidates > 1 and not batch.any_size and candidates * size > ELEMENTS:
        candidates //= 2
    first = xp.sum(xp.zeros_like(rising, dtype=xp.int32), dtype=xp.int32)
    ends = xp.astype(batch.arange(1, candidates + 1), xp.int32)
    while width > 1:
        # The result is among the `width` places from `first` on. Cut them into equal parts, and keep one.
        part = -(-width // (candidates + 1))
        places = first + part * ends - 1
        places = xp.where(places < size, places, size - 1)
        found = enough(xp.take(rising, places, axis=0)[:, None])
        first = first + part * xp.sum(xp.astype(~found, xp.int32), dtype=xp.int32)
        width = part
    place = xp.where(first < size, first, size - 1)
    return xp.take(rising, xp.reshape(place, (1,)), axis=0)[0]
