"""The root of an increasing function, in a fixed number of operations, none of which waits for a value.

A search evaluates several candidates at once, which cut a range into equal parts, and keeps the part that
holds the root. Newton's steps then find the root to rounding.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

from rgd.weightings._batch import Batch

NEWTON_STEPS = 2
"""This many of Newton's steps find a root to rounding from any point near it."""

ELEMENTS = 1 << 20
"""The largest size of all candidates of one round times the batch: a larger batch has fewer candidates."""

MOST_PARTS = 512
"""A round cuts a range into at most so many parts: more parts need fewer rounds, so fewer operations."""

MOST_PARTS_COMPILED = 64
"""The same in JAX, and where the size of the batch is not known: less to compute, in more rounds."""


def cuts(batch: Batch, fineness: float) -> tuple[int, int]:
    """How many parts a round cuts a range into, and how many rounds make parts of `1 / fineness` of it.

    Args:
        batch: The batch of the function; its size decides how many candidates are evaluated at once.
        fineness: A number above 1.
    """
    compiled = batch.any_size or "jax" in batch.xp.__name__
    most = MOST_PARTS_COMPILED if compiled else MOST_PARTS
    if not batch.any_size:
        most = max(2, min(most, 1 + ELEMENTS // int(batch.losses.shape[-1])))
    rounds = math.ceil(math.log(fineness) / math.log(most))
    return min(most, math.ceil(fineness ** (1 / rounds))), rounds


def polished(
    batch: Batch,
    function: Callable[[Any], tuple[Any, Any]],
    x: Any,
    bracket: tuple[Any, Any],
    steps: int = NEWTON_STEPS,
) -> Any:
    """The root of an increasing function near `x`, by Newton's steps within a bracket.

    Args:
        batch: The batch of the function.
        function: Maps a number, 0-d, to the function's value and its derivative, 0-d.
        x: A number near the root, 0-d.
        bracket: The ends, 0-d. A step that would reach them or pass them is not taken.
        steps: How many steps.
    """
    xp, (low, high) = batch.xp, bracket

    def polish(x: Any) -> Any:
        value, slope = function(x)
        step = x - value / slope
        # If the function is flat up to rounding, x is as good as any number near it.
        return xp.where((step > low) & (step < high), step, x)

    return repeat(xp, steps, polish, x)


def repeat(xp: Any, times: int, step: Callable[[Any], Any], carry: Any) -> Any:
    """`step(...step(carry))`, so many times. In JAX one loop: each round written out would be compiled."""
    if "jax" in xp.__name__:

        def body(_: Any, carry: Any) -> Any:
            return step(carry)

        return sys.modules["jax"].lax.fori_loop(0, times, body, carry)
    for _ in range(times):
        carry = step(carry)
    return carry
