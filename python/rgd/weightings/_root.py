"""The root of an increasing function, in a fixed number of operations: none of them waits for a value.

A bracket `[low, high]` is cut into equal parts at several candidates at once, and the part that holds the
root is kept, until it is 2^-24 of the first bracket. Newton's steps, kept near the bracket, then find the
root to rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from rgd.weightings._batch import Batch

BITS = 24
"""The bracket shrinks by this power of two before Newton's steps."""

NEWTON_STEPS = 3
"""As many find a root to rounding from anywhere within that; two do from a solution but for rounding."""

ELEMENTS = 1 << 20
"""Numbers that the candidates of one round may make together: fewer candidates for larger batches."""

_ROUNDS = [(2**bits - 1, BITS // bits) for bits in (6, 4, 2, 1)]


def root(batch: Batch, function: Callable[[Any], tuple[Any, Any]], low: Any, high: Any) -> Any:
    """The `x` in `[low, high]` at which an increasing function is 0.

    Args:
        batch: The batch the function is about; its size decides how many candidates are evaluated at once.
        function: Maps candidates, shape (m, 1), to the function's values and its derivatives, each of shape
            (m,), as `batch.mean` of shape (m, n) gives them.
        low: Where the search starts, 0-d.
        high: Where it ends, 0-d.

    Returns:
        The root, 0-d. `low` or `high` where the function has no sign change between them.
    """
    xp = batch.xp
    candidates, rounds = _ROUNDS[0]
    if not batch.any_size:
        size = int(batch.losses.shape[-1])
        fitting = [(number, times) for number, times in _ROUNDS if number * size <= ELEMENTS]
        candidates, rounds = fitting[0] if fitting else _ROUNDS[-1]
    fractions = batch.arange(1, candidates + 1) / (candidates + 1)

    def narrow(bracket: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = bracket
        width = high - low
        values, _ = function((low + width * fractions)[:, None])
        below = xp.sum(xp.astype(values < 0, batch.losses.dtype)) / (candidates + 1)
        return low + width * below, low + width * (below + 1 / (candidates + 1))

    # The first round is apart: what JAX knows of an array (dtype, mapped axes) is then as it stays in a loop.
    low, high = _repeat(xp, rounds - 1, narrow, narrow((low, high)))

    # A root on the bracket's end may lie beyond it by a rounding.
    middle, width = (low + high) / 2, high - low
    return polished(batch, function, middle, (low - width, high + width))


def polished(
    batch: Batch,
    function: Callable[[Any], tuple[Any, Any]],
    x: Any,
    bracket: tuple[Any, Any],
    steps: int = NEWTON_STEPS,
) -> Any:
    """The root of an increasing function near `x`, by Newton's steps within a bracket.

    Args:
        batch: The batch the function is about.
        function: As for `root`.
        x: A number near the root, 0-d.
        bracket: The ends that no step goes beyond, 0-d.
        steps: How many steps.
    """
    xp, (low, high) = batch.xp, bracket

    def polish(x: Any) -> Any:
        values, slopes = function(xp.reshape(x, (1, 1)))
        step = x - xp.reshape(values / slopes, ())
        step = xp.where(step < low, low, xp.where(step > high, high, step))
        return xp.where(xp.isnan(step), x, step)

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
