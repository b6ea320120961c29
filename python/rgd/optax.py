"""Re-weighted Gradient Descent as optax transformations, for gradients taken example by example.

    losses, grads = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0, 0))(params, x, y)   # leading axis:
    batch updates, state = tx.update(grads, state, params, losses=losses)

The update that the inner optimizer sees is `(1/n) * sum_i w_i * g_i`, with `w_i` the weight that the loss
`l_i` calls for. Where the gradients of single examples are not needed for anything else,
`rgd.jax.value_and_grad` gives the same mean from one backward pass.
"""

# The types of jax and optax leave members partly unknown; optax has no stubs.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false, reportUnknownParameterType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from rgd.jax._weights import AxisName, as_batch, count_of, psum, resolve, weights_of
from rgd.weightings import Weighting

__all__ = ["RGDState", "ReweightState", "reweight", "rgd"]

Schedule: TypeAlias = Callable[[ArrayLike], ArrayLike]
"""An optax schedule: from the step count to a number."""


class ReweightState(NamedTuple):
    """State of `reweight`: how many updates were made, as int32 of shape ()."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


class RGDState(NamedTuple):
    """State of `rgd`: how many updates were made, as int32 of shape (), and the inner optimizer's state."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    inner_state: Any


def reweight(
    tau: ArrayLike | Schedule | None = None,
    *,
    weighting: Weighting | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Reduce per-example gradients to their re-weighted mean, `(1/n) * sum_i w_i * g_i`.

    The first link of an `optax.chain`, since it takes the leading axis off the gradients.

    Args:
        tau: Clipping factor of `rgd.KL(tau)`, or an optax schedule of it. By default 1.
        weighting: `rgd.KL` or `rgd.KLBall`, in place of `tau`.
        axis_name: Name or names of mapped axes over which the batch is spread; the mean is then over the
            whole batch.

    Returns:
        A transformation whose `update(grads, state, params=None, *, losses, where=None)` takes gradients with
        a leading axis of examples, their losses (batch,), and booleans (batch,) that say which examples take
        part. An example that takes no part may hold NaN.

    Raises:
        ValueError: If both `tau` and `weighting` are given; from `update`, if `losses` are not given, are not
            of shape (batch,), or a gradient has not that leading axis.
        TypeError: If `weighting` is not a weighting; from `update`, if the losses are not floating.

    Example:
        >>> import jax.numpy as jnp, optax, rgd.optax
        >>> tx = optax.chain(rgd.optax.reweight(tau=1.0), optax.sgd(0.1))
        >>> params = jnp.zeros(2)
        >>> grads = jnp.array([[1.0, 0.0], [0.0, 1.0]])  # of two examples
        >>> updates, state = tx.update(grads, tx.init(params), params, losses=jnp.array([0.0, 3.0]))
        >>> updates.round(4)
        Array([-0.05  , -0.0824], dtype=float32)

    References:
        Kumar, Majmundar, Nagaraj, Suggala, "Stochastic Re-weighted Gradient Descent via Distributionally
        Robust Optimization", TMLR 2024, arXiv 2306.09222, Algorithm 1.
    """
    if callable(tau) and weighting is not None:
        raise ValueError("give tau or weighting, not both: tau=t is short for weighting=rgd.KL(tau=t)")
    constant = None if callable(tau) else resolve(tau, weighting)

    def weighting_at(count: jax.Array) -> Weighting:
        return constant or resolve(cast("Schedule", tau)(count), None)

    def init(params: optax.Params) -> ReweightState:
        del params
        return ReweightState(jnp.zeros((), jnp.int32))

    def update(
        updates: optax.Updates,
        state: ReweightState,
        params: optax.Params | None = None,
        *,
        losses: ArrayLike | None = None,
        where: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ReweightState]:
        del params, extra_args
        mean = _reweighted_mean_gradient(updates, losses, where, weighting_at(state.count), axis_name)
        return mean, ReweightState(cast("jax.Array", optax.safe_increment(state.count)))

    return optax.GradientTransformationExtraArgs(init, cast("Any", update))


def rgd(
    inner: optax.GradientTransformation | optax.MultiSteps,
    tau: ArrayLike | Schedule | None = None,
    *,
    weighting: Weighting | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Re-weighted gradient descent around any optax optimizer.

    Per-example gradients and their losses go in; `inner` gets the one gradient `(1/n) * sum_i w_i * g_i`.

    It changes the shape of the gradients, so what expects gradients of the parameters' shape goes inside it:
    `rgd(optax.MultiSteps(optax.adam(1e-3), 4))`, `rgd(optax.apply_if_finite(...))`, `rgd(optax.masked(...))`.
    With the pointwise weights, accumulation over micro-batches of one size is exactly the update of the large
    batch. `optax.inject_hyperparams(rgd.optax.rgd)(inner, tau=...)` and `optax.multi_transform` wrap it.

    Args:
        inner: The optimizer; extra arguments of `update` reach it, but for `losses` and `where`.
        tau: Clipping factor of `rgd.KL(tau)`, or an optax schedule of it. By default 1.
        weighting: `rgd.KL` or `rgd.KLBall`, in place of `tau`.
        axis_name: Name or names of mapped axes over which the batch is spread; the mean is then over the
            whole batch.

    Returns:
        A transformation; its `update` is called as that of `reweight`.

    Raises:
        ValueError: As `reweight`.
        TypeError: As `reweight`; if `inner` is no gradient transformation.

    Example:
        >>> import jax, jax.numpy as jnp, optax, rgd.optax
        >>> def loss(slope, x, y):
        ...     return (slope * x - y) ** 2
        >>> x, y = jnp.array([1.0, 2.0, 3.0]), jnp.array([2.0, 4.0, 6.0])
        >>> tx = rgd.optax.rgd(optax.adam(0.1), tau=1.0)
        >>> slope = jnp.array(0.0)
        >>> state = tx.init(slope)
        >>> for _ in range(100):
        ...     losses, grads = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0, 0))(slope, x, y)
        ...     updates, state = tx.update(grads, state, slope, losses=losses)
        ...     slope = optax.apply_updates(slope, updates)
        >>> print(f"{slope:.2f} after {state.count} steps")
        2.00 after 100 steps

    References:
        Kumar et al., arXiv 2306.09222, Algorithm 1.
    """
    outer = reweight(tau, weighting=weighting, axis_name=axis_name)
    if isinstance(inner, optax.MultiSteps):
        inner = optax.GradientTransformationExtraArgs(inner.init, cast("Any", inner.update))
    given: Any = inner
    if not isinstance(given, optax.GradientTransformation):
        raise TypeError(
            "inner must be an optax.GradientTransformation, such as optax.adam(1e-3) returns, got "
            f"{getattr(given, '__name__', type(given).__name__)}"
        )
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> RGDState:
        return RGDState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(
        updates: optax.Updates,
        state: RGDState,
        params: optax.Params | None = None,
        *,
        losses: ArrayLike | None = None,
        where: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RGDState]:
        mean, reweighted = outer.update(
            updates, ReweightState(state.count), params, losses=losses, where=where
        )
        mean, inner_state = inner.update(mean, state.inner_state, params, **extra_args)
        return mean, RGDState(cast("ReweightState", reweighted).count, inner_state)

    return optax.GradientTransformationExtraArgs(init, cast("Any", update))


def _reweighted_mean_gradient(
    grads: optax.Updates,
    losses: ArrayLike | None,
    where: ArrayLike | None,
    weighting: Weighting,
    axis_name: AxisName,
) -> optax.Updates:
    if losses is None:
        raise ValueError(
            "losses are needed: call update(grads, state, params, losses=losses) with the loss of each "
            "example, as from jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0, 0))(params, x, y)"
        )
    batch = as_batch(losses, where, None, axis_name)
    if batch.losses.ndim != 1:
        raise ValueError(f"losses must have shape (batch,), one for each gradient, got {batch.losses.shape}")
    weights = weights_of(batch, weighting)
    count = jnp.squeeze(count_of(batch))

    def mean(path: Any, grad: jax.Array) -> jax.Array:
        if grad.ndim == 0 or grad.shape[:1] != weights.shape:
            raise ValueError(
                f"a gradient must have the leading axis of the losses, {weights.shape}, got {grad.shape} at "
                f"{jax.tree_util.keystr(path) or 'the root'}: take gradients example by example, with "
                "jax.vmap(jax.grad(loss), in_axes=(None, 0, 0)). What expects gradients of the shape of the "
                "parameters goes inside rgd, as in rgd(optax.MultiSteps(...))"
            )
        dtype = jnp.promote_types(grad.dtype, weights.dtype)
        if batch.where is not None:
            grad = jnp.where(batch.where.reshape((-1,) + (1,) * (grad.ndim - 1)), grad, 0)
        total = jnp.tensordot(
            weights.astype(dtype), grad.astype(dtype), axes=1, precision=jax.lax.Precision.HIGHEST
        )
        return (psum(total, axis_name) / count.astype(dtype)).astype(grad.dtype)

    return jax.tree_util.tree_map_with_path(mean, grads)
