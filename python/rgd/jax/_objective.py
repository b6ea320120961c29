"""`jax.value_and_grad` for a function that returns the loss of each example."""

# The types of jax leave members partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.typing import ArrayLike

from rgd.jax._weights import AxisName, resolve, reweighted_mean
from rgd.weightings import Weighting


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    weighting: Weighting | None = None,
    tau: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> Callable[..., tuple[Any, Any]]:
    """Turn a function that returns per-example losses into the re-weighted objective and its gradient.

    The objective is `(1/n) * sum_i sg(w_i) * l_i`, its gradient `(1/n) * sum_i w_i * grad l_i`: one backward
    pass, the cost of `jax.value_and_grad` of the mean.

    Args:
        fun: Returns losses, any shape but (), floating; or with `has_aux` a pair of losses and auxiliary
            data.
        argnums: Which positional arguments to differentiate with respect to, as in `jax.value_and_grad`.
        has_aux: Whether `fun` returns auxiliary data too.
        weighting: `rgd.KL` or `rgd.KLBall`. By default `KL(tau=1.0)`.
        tau: Short for `weighting=rgd.KL(tau=tau)`.
        axis_name: Name or names of mapped axes over which the batch is spread, as in `reweighted_mean`.

    Returns:
        A function of the same arguments that returns `(objective, gradient)`, or with `has_aux`
        `((objective, aux), gradient)`. Where a mask is needed, call `jax.value_and_grad` on a function that
        ends in `reweighted_mean(losses, where=mask)`.

    Raises:
        TypeError: When called, if `fun` does not return what `has_aux` says, or losses that are not floating.
        ValueError: When called, if the losses are 0-d.

    Example:
        >>> import jax.numpy as jnp, rgd.jax
        >>> def losses(slope, x, y):
        ...     return (slope * x - y) ** 2
        >>> x, y = jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])
        >>> objective, gradient = rgd.jax.value_and_grad(losses, tau=1.0)(1.0, x, y)
        >>> print(f"{objective:.4f} {gradient:.4f}")
        3.2974 -6.5949

    References:
        Kumar et al., arXiv 2306.09222, Algorithm 1.
    """
    chosen = resolve(tau, weighting)

    @functools.wraps(fun)
    def objective(*args: Any, **kwargs: Any) -> Any:
        returned: Any = fun(*args, **kwargs)
        pair = returned.__class__ is tuple
        if has_aux and not (pair and len(returned) == 2):
            raise TypeError(f"with has_aux=True the function must return (losses, aux), got {type(returned)}")
        if pair and not has_aux:
            raise TypeError(
                "the function returned a tuple, where an array of per-example losses is needed: give "
                "has_aux=True if it returns (losses, aux)"
            )
        if not has_aux:
            return reweighted_mean(returned, chosen, axis_name=axis_name)
        return reweighted_mean(returned[0], chosen, axis_name=axis_name), returned[1]

    return jax.value_and_grad(objective, argnums, has_aux)
