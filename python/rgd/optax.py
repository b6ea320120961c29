"""Re-weighted Gradient Descent as optax transformations, for gradients taken example by example.

    per_example = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0, 0))
    losses, grads = per_example(params, x, y)  # with a leading axis: the batch
    updates, state = tx.update(grads, state, params, losses=losses)

The inner optimizer gets `sum_i p_i * w_i * g_i / sum_i p_i`, with `w_i` the weight for the loss `l_i` and
`p_i` its `sample_weight`, or 1. If you need the gradients of single examples for nothing else,
`rgd.jax.value_and_grad` computes the same mean in one backward pass.
"""

# Some types of jax and optax are partly unknown to pyright; optax has no stubs.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false, reportUnknownParameterType=false

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from rgd.jax._devices import AxisName, psum
from rgd.jax._inputs import Losses, as_losses
from rgd.jax._weights import weights_of
from rgd.weightings import Weighting
from rgd.weightings._call import map_state, refuse_without_logits, resolve_weighting

__all__ = ["RGDState", "ReweightState", "reweight", "rgd"]


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)


Schedule: TypeAlias = Callable[[ArrayLike], ArrayLike]
"""An optax schedule: from the step count to a number."""

WeightingSchedule: TypeAlias = Callable[[ArrayLike], Weighting]
"""A function from the step count to weightings, which are all of one class."""


class ReweightState(NamedTuple):
    """State of `reweight`.

    Attributes:
        count: How many updates were made, int32 of shape ().
        weighting_state: The state of the weighting, as `weighting.init()` returns it; () for a weighting
            without state.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    weighting_state: Any = ()


class RGDState(NamedTuple):
    """State of `rgd`.

    Attributes:
        count: How many updates were made, int32 of shape ().
        inner_state: The inner optimizer's state.
        weighting_state: As in `ReweightState`.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    inner_state: Any
    weighting_state: Any = ()


def reweight(
    weighting: Weighting | WeightingSchedule | None = None,
    *,
    tau: ArrayLike | Schedule | None = None,
    scale: ArrayLike | Schedule | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Reduce per-example gradients to their re-weighted mean, `sum_i p_i * w_i * g_i / sum_i p_i`.

    It must be the first link of an `optax.chain`, since it removes the leading axis of the gradients. A link
    before it would get per-example gradients, without an error: `optax.clip_by_global_norm` would clip by the
    norm of all examples' gradients together, and `optax.add_decayed_weights` would decay by the mean weight
    times its rate.

    Args:
        weighting: Turns losses into weights, `rgd.KL(tau=1.0)` if neither this nor `tau` nor `scale` is
            given; or a schedule, a function from the step count to weightings of one class.
        tau: Short for `weighting=rgd.KL(tau=tau)`; or an optax schedule of it.
        scale: Short for `weighting=rgd.KL(scale=scale)`; with `tau`, for `rgd.KL(tau, scale=scale)`; or an
            optax schedule of it.
        axis_name: Name or names of mapped axes over which the batch is spread; the mean is then over the
            whole batch.

    Returns:
        A transformation whose `update(grads, state, params=None, *, losses, where=None, sample_weight=None,
        groups=None)` takes gradients with a leading axis of examples, and vectors of shape (batch,): their
        losses; booleans that say which examples take part; the base measure `p`, numbers >= 0; the group of
        each, integers, for `rgd.GroupDRO`. The gradients of an example that takes no part, or whose weight is
        0, may hold any number. If no example takes part, the mean is 0. The weighting's state is part of the
        state.

    Raises:
        ValueError: If `tau` or `scale` is given beside `weighting`; from `update`, if `losses` are not given,
            are not of shape (batch,), or a gradient does not have that leading axis.
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
    weighting_at = _schedule(weighting, tau, scale)

    def init(params: optax.Params) -> ReweightState:
        del params
        count = jnp.zeros((), jnp.int32)
        # Through NumPy, so that no leaf is weakly typed: otherwise the second update would compile again.
        return ReweightState(count, map_state(jnp.asarray, map_state(np.asarray, weighting_at(count).init())))

    def update(
        updates: optax.Updates,
        state: ReweightState,
        params: optax.Params | None = None,
        *,
        losses: ArrayLike | None = None,
        where: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        groups: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ReweightState]:
        del params, extra_args
        _refuse_apply_if_finite()
        if losses is None:
            raise ValueError(
                "losses are needed: call update(grads, state, params, losses=losses) with the loss of each "
                "example, as from jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0, 0))(params, x, y)"
            )
        batch = as_losses(
            losses, where=where, sample_weight=sample_weight, groups=groups, axis_name=axis_name
        )
        if batch.values.ndim != 1:
            raise ValueError(
                f"losses must have shape (batch,), one for each gradient, got {batch.values.shape}"
            )
        current = weighting_at(state.count)
        old = state.weighting_state
        weights, new = weights_of(batch, current, old if current.stateful else None)
        mean = _reweighted_mean_gradient(updates, batch, weights)
        count = cast("jax.Array", optax.safe_increment(state.count))
        return mean, ReweightState(count, new if current.stateful else old)

    return optax.GradientTransformationExtraArgs(init, cast("Any", update))


def _refuse_apply_if_finite() -> None:
    """Refuse a call from `optax.apply_if_finite`, which expects updates of the gradients' shape."""
    frame = inspect.currentframe()
    for _ in range(8):
        frame = None if frame is None else frame.f_back
        if frame is None:
            return
        if frame.f_code.co_name == "do_update" and frame.f_globals.get("__name__", "").startswith("optax."):
            raise TypeError(
                "optax.apply_if_finite goes inside, around the optimizer: "
                "rgd.optax.rgd(optax.apply_if_finite(inner, n)). Around rgd it gets gradients of each "
                "example, and expects updates of their shape"
            )


def rgd(
    inner: optax.GradientTransformation | optax.MultiSteps,
    weighting: Weighting | WeightingSchedule | None = None,
    *,
    tau: ArrayLike | Schedule | None = None,
    scale: ArrayLike | Schedule | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Re-weighted gradient descent around any optax optimizer.

    `update` takes per-example gradients and their losses; `inner` gets one gradient, `sum_i p_i * w_i * g_i /
    sum_i p_i`.

    It changes the shape of the gradients, so transformations of gradients of the parameters' shape must be
    inside it: `rgd(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)))`. `chain(clip, rgd(...))`
    would clip by the norm of all examples' gradients together, without an error. The same is true of
    `optax.add_decayed_weights`, `optax.MultiSteps`, `optax.apply_if_finite` and `optax.masked`.
    With pointwise weights, accumulation over micro-batches of equal size gives exactly the update of the
    large batch. It can be wrapped by `optax.multi_transform`, and by
    `optax.inject_hyperparams(rgd.optax.rgd)(inner, tau=...)`.

    Args:
        inner: The optimizer. It gets extra arguments of `update`, except `losses`, `where`, `sample_weight`
            and `groups`.
        weighting: Turns losses into weights, `rgd.KL(tau=1.0)` if neither this nor `tau` nor `scale` is
            given; or a schedule, a function from the step count to weightings of one class.
        tau: Short for `weighting=rgd.KL(tau=tau)`; or an optax schedule of it.
        scale: Short for `weighting=rgd.KL(scale=scale)`; with `tau`, for `rgd.KL(tau, scale=scale)`; or an
            optax schedule of it.
        axis_name: Name or names of mapped axes over which the batch is spread; the mean is then over the
            whole batch.

    Returns:
        A transformation. Its `update` takes the arguments of that of `reweight`.

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
    outer = reweight(weighting, tau=tau, scale=scale, axis_name=axis_name)
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
        count, weighting_state = cast("ReweightState", outer.init(params))
        return RGDState(count, inner.init(params), weighting_state)

    def update(
        updates: optax.Updates,
        state: RGDState,
        params: optax.Params | None = None,
        *,
        losses: ArrayLike | None = None,
        where: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        groups: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RGDState]:
        mean, reweighted = outer.update(
            updates,
            ReweightState(state.count, state.weighting_state),
            params,
            losses=losses,
            where=where,
            sample_weight=sample_weight,
            groups=groups,
        )
        count, weighting_state = cast("ReweightState", reweighted)
        mean, inner_state = inner.update(mean, state.inner_state, params, **extra_args)
        return mean, RGDState(count, inner_state, weighting_state)

    return optax.GradientTransformationExtraArgs(init, cast("Any", update))


def _schedule(weighting: Any, tau: Any, scale: Any) -> Callable[[jax.Array], Weighting]:
    """The weighting at each step count, from a weighting, the numbers of `KL`, or schedules of them."""

    def at(number: Any, count: jax.Array) -> Any:
        return number(count) if callable(number) else number

    if weighting is None and (callable(tau) or callable(scale)):
        return lambda count: resolve_weighting(None, at(tau, count), at(scale, count))
    # The class of a weighting is callable too. resolve_weighting raises the error that says to call it.
    is_schedule = callable(weighting) and not isinstance(weighting, (Weighting, type))
    if is_schedule and tau is None and scale is None:
        at_count: Any = weighting
        return lambda count: resolve_weighting(at_count(count))
    constant = resolve_weighting(weighting, tau, scale)
    refuse_without_logits(constant, "take the gradient of rgd.jax.cross_entropy, and the optimizer alone")
    return lambda count: constant


def _reweighted_mean_gradient(grads: optax.Updates, batch: Losses, weights: jax.Array) -> optax.Updates:
    measure = batch.full_measure
    divisor = psum(jnp.sum(measure), batch.axis_name)
    # If no example takes part, the sum is 0 too, and so is the update.
    divisor = jnp.where(divisor == 0, 1, divisor)
    dropped = (measure == 0) | ((weights == 0) & ~jnp.isnan(batch.values))

    def mean(path: Any, grad: jax.Array) -> jax.Array:
        if grad.ndim == 0 or grad.shape[:1] != weights.shape:
            raise ValueError(
                f"a gradient must have the leading axis of the losses, {weights.shape}, got {grad.shape} at "
                f"{jax.tree_util.keystr(path) or 'the root'}: take gradients example by example, with "
                "jax.vmap(jax.grad(loss), in_axes=(None, 0, 0)). What expects gradients of the shape of the "
                "parameters, such as clipping, weight decay or MultiSteps, comes after reweight in a chain, "
                "and inside rgd: rgd(optax.chain(clip, adam))"
            )
        dtype = jnp.promote_types(grad.dtype, weights.dtype)
        kept = jnp.where(dropped.reshape((-1,) + (1,) * (grad.ndim - 1)), 0, grad)
        total = jnp.tensordot(
            (measure * weights).astype(dtype), kept.astype(dtype), axes=1, precision=jax.lax.Precision.HIGHEST
        )
        return (psum(total, batch.axis_name) / divisor.astype(dtype)).astype(grad.dtype)

    return jax.tree_util.tree_map_with_path(mean, grads)
