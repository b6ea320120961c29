"""The root of an increasing function, in a fixed number of operations, none of which waits for a value.

Several candidates at once cut a bracket `[low, low + width]` into equal parts, and the part that holds the
root is kept. This is repeated until the part is 2^-18 of the first bracket. Newton's steps, kept near the
bracket, then find the root to rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from rgd.weightings._batch import Batch

BITS = 18
"""The bracket shrinks by this power of two before Newton's steps."""

NEWTON_STEPS = 2
"""This many of Newton's steps find a root to rounding from any point of the remaining bracket."""

ELEMENTS = 1 << 20
"""The largest size of all candidates of one round times the batch: a larger batch has fewer candidates."""

_ROUNDS = [(2**bits - 1, BITS // bits) for bits in (6, 3, 2, 1)]


def bracketed(batch: Batch, function: Callable[[Any], Any], low: Any, high: Any) -> tuple[Any, Any]:
    """The ends of a part of `[low, high]` that holds the root of an increasing function.

    Args:
        batch: The batch of the function; its size decides how many candidates are evaluated at once.
        function: Maps candidates, shape (m, 1), to the function's values, shape (m,).
        low: Where the search starts, 0-d.
        high: Where it ends, 0-d.

    Returns:
        The ends, 0-d: the first or last part where the function has no sign change between `low` and `high`.
    """
    xp = batch.xp
    candidates, rounds = _ROUNDS[0]
    if not batch.any_size:
        size = int(batch.losses.shape[-1])
        fitting = [(number, times) for number, times in _ROUNDS if number * size <= ELEMENTS]
        candidates, rounds = fitting[0] if fitting else _ROUNDS[-1]
    parts = candidates + 1
    fractions = batch.arange(1, parts)[:, None] / parts

    def narrow(bracket: tuple[Any, Any]) -> tuple[Any, Any]:
        low, width = bracket
        below = xp.sum(xp.astype(function(low + width * fractions) < 0, batch.losses.dtype))
        width = width / parts
        return low + width * below, width

    # The first round is outside of the loop, so that JAX's type of the carry (dtype, mapped axes) is that of
    # the later rounds.
    low, width = _repeat(xp, rounds - 1, narrow, narrow((low, high - low)))
    return low, low + width


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

    return _repeat(xp, steps, polish, x)


def _repeat(xp: Any, times: int, step: Callable[[Any], Any], carry: Any) -> Any:
    """`step(...step(carry))`. In JAX it is one loop, since each round written out would be compiled."""
    if "jax" in xp.__name__:

        def body(_: Any, carry: Any) -> Any:
            return step(carry)

        return sys.modules["jax"].lax.fori_loop(0, times, body, carry)
    for _ in range(times):
        carry = step(carry)
    return carry
