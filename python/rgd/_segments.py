"""Checks of `segments=` for every front: whether the call can have them, and which numbers they may hold."""

from __future__ import annotations

from typing import Any


def are_given(segments: Any, number: Any, per: str) -> bool:
    """Whether a call has segments.

    Args:
        segments: The argument of the call, or None.
        number: `num_segments`, or None.
        per: The argument of the call.

    Raises:
        ValueError: If `number` is given without segments, or `per` is not "sample".
    """
    if segments is None:
        if number is not None:
            raise ValueError("num_segments goes with segments: leave it out without them")
        return False
    if per != "sample":
        raise ValueError(
            'segments are the units of per="sample": give that, or leave segments out. With per="element" '
            "each token is weighted by its own loss, packed or not"
        )
    return True


def count(least: int, largest: int, number: int | None) -> int:
    """How many units a row has: `number`, or by default one more than the largest number.

    Raises:
        ValueError: If the numbers do not lie from -1 on and below `number`.
    """
    if least < -1 or (number is not None and largest >= number):
        wrong, allowed = (least, "") if least < -1 else (largest, f" below num_segments={number}")
        raise ValueError(
            f"segments must be numbers from 0 on{allowed}, or -1 for a target that takes no part, got {wrong}"
        )
    return max(largest + 1, 1) if number is None else number
