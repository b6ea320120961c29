"""Weights, the re-weighted mean and the diagnostics, in `jax.numpy`, and the weightings as pytrees.

With the losses `l_i` of a batch of `n` (over all devices of `axis_name`, where that is given):

    KL(tau, scale):             w_i = exp(scale * min(l_i, tau))
    KL(..., normalize=True):    w_i = exp(scale * min(l_i, tau)) / mean_j exp(scale * min(l_j, tau))
    KLBall(radius):             w = n * argmax_q <q, l>  subject to  KL(q || uniform) <= radius

and the objective is `(1/n) * sum_i sg(w_i) * l_i`, with `sg` the stop-gradient.
"""

# The types of jax leave members partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from rgd.diagnostics import WeightStats
from rgd.weightings import KL, KLBall, Weighting, resolve_weighting

Axis: TypeAlias = int | Sequence[int] | None
AxisName: TypeAlias = str | Sequence[str] | None


def sample_weights(
    losses: ArrayLike,
    weighting: Weighting | None = None,
    *,
    tau: ArrayLike | None = None,
    where: ArrayLike | None = None,
    axis: Axis = None,
    axis_name: AxisName = None,
) -> jax.Array:
    """The weight of each sample of a batch, as a constant of the gradient.

    `KL(tau, scale)` gives `w_i = exp(scale * min(l_i, tau))`; with `normalize=True` the weights are divided
    by their mean over the batch. `KLBall(radius)` gives `w = n * softmax(l / gamma)`, with `gamma` such that
    the Kullback-Leibler divergence of the softmax from the uniform distribution is `radius`.

    Args:
        losses: Losses, any shape but (), floating.
        weighting: `rgd.KL` or `rgd.KLBall`, of which every number may be traced; a traced number that is not
            allowed cannot raise, and makes the weights NaN. By default `KL(tau=1.0)`.
        tau: Short for `weighting=rgd.KL(tau=tau)`.
        where: Booleans that broadcast to the losses' shape. A loss where it is False has weight 0 and takes
            no part in the others' weights.
        axis: The axes that a batch lies along; None for all. Each position of the other axes is a batch of
            its own.
        axis_name: Name or names of mapped axes (`jax.shard_map`, `jax.pmap`, `jax.vmap`) over which the batch
            is spread. Weights that are normalised or from a ball are then those of the whole batch.

    Returns:
        Weights of the losses' shape: float64 for float64 losses, else float32.

    Raises:
        TypeError: If `losses` are not floating, or `where` is not boolean.
        ValueError: If `losses` are 0-d, a number of the weighting is not a scalar, `where` or `axis` does not
            fit the losses' shape, `axis_name` is not bound, or both `tau` and `weighting` are given.

    Example:
        >>> import jax.numpy as jnp, rgd.jax
        >>> rgd.jax.sample_weights(jnp.array([0.0, 1.0, 5.0]), rgd.KL(tau=1.0)).round(4)
        Array([1.    , 1.6487, 1.6487], dtype=float32)

    References:
        Kumar, Majmundar, Nagaraj, Suggala, "Stochastic Re-weighted Gradient Descent via Distributionally
        Robust Optimization", TMLR 2024, arXiv 2306.09222: Algorithm 1 (pointwise), Proposition 3.1
        (normalised, tau infinite), section 3 (ball).
    """
    batch = as_batch(losses, where, axis, axis_name)
    return weights_of(batch, resolve(tau, weighting))


def reweighted_mean(
    losses: ArrayLike,
    weighting: Weighting | None = None,
    *,
    tau: ArrayLike | None = None,
    where: ArrayLike | None = None,
    axis: Axis = None,
    axis_name: AxisName = None,
) -> jax.Array:
    """The objective of re-weighted gradient descent, `(1/n) * sum_i sg(w_i) * l_i`.

    Its gradient is the mean of the samples' gradients, each times its weight.

    Args:
        losses: Losses, any shape but (), floating: of examples, tasks, domains or sequences.
        weighting: `rgd.KL` or `rgd.KLBall`, of which every number may be traced; a traced number that is not
            allowed cannot raise, and makes the weights NaN. By default `KL(tau=1.0)`.
        tau: Short for `weighting=rgd.KL(tau=tau)`.
        where: Booleans that broadcast to the losses' shape: which losses take part, and are counted in `n`.
            What the others hold, be it NaN, reaches neither the objective nor its gradient.
        axis: The axes that a batch lies along; None for all. Each position of the other axes is a batch of
            its own.
        axis_name: Name or names of mapped axes over which the batch is spread; the objective is then that of
            the whole batch, the same on every device. Under `jax.shard_map` its gradient with respect to a
            replicated value is that of the whole batch too; under `jax.pmap` take `jax.lax.pmean` of it, as
            for any summed loss.

    Returns:
        The objective, of the losses' shape without `axis`: float64 for float64 losses, else float32. NaN
        where no loss takes part.

    Raises:
        TypeError: As `sample_weights`.
        ValueError: As `sample_weights`.

    Example:
        >>> import jax, jax.numpy as jnp, rgd.jax
        >>> losses = jnp.array([0.5, 3.0])
        >>> float(rgd.jax.reweighted_mean(losses, rgd.KL(scale=0.0)))  # empirical risk minimization
        1.75
        >>> [f"{g:.4f}" for g in jax.grad(rgd.jax.reweighted_mean)(losses)]  # w / n
        ['0.6420', '0.8244']

    References:
        Kumar et al., arXiv 2306.09222, Algorithm 1.
    """
    batch = as_batch(losses, where, axis, axis_name)
    weights = weights_of(batch, resolve(tau, weighting))
    total = jnp.sum(weights * batch.losses, axis=batch.axes)
    return psum(total, batch.axis_name) / jnp.squeeze(count_of(batch), batch.axes)


def weight_stats(
    losses: ArrayLike,
    weights: ArrayLike,
    weighting: Weighting | None = None,
    *,
    where: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> WeightStats:
    """The diagnostics of a set of weights, as a pytree of scalars: call it under `jit`, return it, log it.

    Args:
        losses: Losses `l`, any shape but (), floating.
        weights: Weights `w`, of the same shape.
        weighting: What the weights came from; None leaves `clipped_share` None.
        where: Booleans that broadcast to the losses' shape: which samples are counted.
        axis_name: Name or names of mapped axes over which the batch is spread.

    Returns:
        `rgd.diagnostics.WeightStats`, whose numbers are 0-d arrays. It is not differentiated through.

    Raises:
        TypeError: As `sample_weights`.
        ValueError: As `sample_weights`, and if the shapes differ.

    Example:
        >>> import jax.numpy as jnp, rgd.jax
        >>> losses = jnp.array([0.5, 0.5, 3.0])
        >>> stats = rgd.jax.weight_stats(losses, rgd.jax.sample_weights(losses), rgd.KL())
        >>> print(f"{stats.effective_sample_size:.3f} of {stats.count}, {stats.clipped_share:.1%} clipped")
        2.956 of 3, 33.3% clipped
    """
    batch = as_batch(losses, where, None, axis_name)
    weights = jnp.asarray(weights, batch.losses.dtype)
    if weights.shape != batch.losses.shape:
        raise ValueError(f"weights must have the shape of losses, {batch.losses.shape}, got {weights.shape}")
    loss = lax.stop_gradient(batch.losses)
    weight = lax.stop_gradient(weights) if batch.where is None else jnp.where(batch.where, weights, 0)
    count = jnp.squeeze(count_of(batch))

    def total(values: jax.Array) -> jax.Array:
        return psum(jnp.sum(values, where=batch.where), batch.axis_name)

    weight_sum = total(weight)
    relative = weight * (count / weight_sum)  # averages to one: q = relative / n
    entropy = jnp.where(relative == 0, 0, relative * jnp.log(jnp.where(relative == 0, 1, relative)))
    clipped_share = None
    if isinstance(weighting, KL):
        clipped_share = total(loss > setting("tau", weighting.tau, loss.dtype)).astype(loss.dtype) / count
    elif weighting is not None:
        clipped_share = jnp.zeros_like(count) / count
    largest = jnp.max(weight, initial=-jnp.inf)
    stats: dict[str, Any] = {
        "mean_loss": total(loss) / count,
        "objective": total(weight * loss) / count,
        "effective_sample_size": weight_sum * (weight_sum / total(weight * weight)),
        "kl_to_uniform": total(entropy - (relative - 1)) / count,
        "max_weight": jnp.where(count > 0, pmax(largest, batch.axis_name), jnp.nan),
        "clipped_share": clipped_share,
        "count": count.astype(int),
    }
    return WeightStats(**stats)


class Batch(NamedTuple):
    """Losses that were checked: in the accumulator's dtype, 0 where they take no part."""

    losses: jax.Array
    where: jax.Array | None
    axes: tuple[int, ...]
    axis_name: AxisName


def as_batch(losses: ArrayLike, where: ArrayLike | None, axis: Axis, axis_name: AxisName) -> Batch:
    """Check what a user gave, at trace time."""
    losses = jnp.asarray(losses)
    if losses.ndim == 0:
        raise ValueError(
            "losses are 0-d: a mean was taken already, and to weight it re-weights nothing. Give the "
            "per-example losses, of shape (batch,): leave out the jnp.mean (optax losses have none)"
        )
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise TypeError(
            f"losses must be floating, got {losses.dtype}: convert them with losses.astype(jnp.float32)"
        )
    losses = losses.astype(jnp.promote_types(losses.dtype, jnp.float32))
    mask = as_mask(where, losses.shape)
    check_bound(axis_name)
    if mask is not None:
        losses = jnp.where(mask, losses, 0)
    return Batch(losses, mask, _axes(axis, losses.shape), axis_name)


def as_mask(where: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array | None:
    """`where`, checked and broadcast to the losses' shape."""
    if where is None:
        return None
    mask = jnp.asarray(where)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"where must be boolean, got {mask.dtype}: compare it, as in where=mask > 0")
    try:
        return jnp.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(f"where must broadcast to the losses' shape {shape}, got {mask.shape}") from None


def weights_of(batch: Batch, weighting: Weighting) -> jax.Array:
    """The weights of a checked batch: constants, 0 where a loss takes no part."""
    batch = batch._replace(losses=lax.stop_gradient(batch.losses))
    weights = _kl_weights(batch, weighting) if isinstance(weighting, KL) else _ball_weights(batch, weighting)
    weights = weights if batch.where is None else jnp.where(batch.where, weights, 0)
    return lax.stop_gradient(weights)


def resolve(tau: ArrayLike | None, weighting: Weighting | None) -> Weighting:
    """The weighting asked for by `tau` or `weighting`; a traced `tau` passes unchecked."""
    return resolve_weighting(cast("float | None", tau), weighting)


def setting(name: str, value: ArrayLike, dtype: jnp.dtype) -> jax.Array:
    """A number of a weighting, as a constant of the losses' dtype."""
    array = jnp.asarray(value, dtype)
    if array.ndim:
        raise ValueError(
            f"{name} must be one number for a batch, got shape {array.shape}: to sweep it, "
            "jax.vmap over the weighting"
        )
    return lax.stop_gradient(array)


def kl_settings(weighting: KL, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """`tau` and the scale, as constants of the losses' dtype; the scale is NaN for a bad traced number."""
    tau = setting("KL.tau", weighting.tau, dtype)
    scale = setting("KL.scale", weighting.effective_scale, dtype)
    if isinstance(weighting.tau, jax.core.Tracer):
        scale = jnp.where((tau > 0) & (jnp.isfinite(tau) | (weighting.scale is not None)), scale, jnp.nan)
    if isinstance(weighting.scale, jax.core.Tracer):
        scale = jnp.where((scale >= 0) & jnp.isfinite(scale), scale, jnp.nan)
    return tau, scale


def count_of(batch: Batch) -> jax.Array:
    """How many losses take part, with the batch's axes kept as 1, in the losses' dtype."""
    taking_part = (
        jnp.ones_like(batch.losses) if batch.where is None else batch.where.astype(batch.losses.dtype)
    )
    return psum(jnp.sum(taking_part, axis=batch.axes, keepdims=True), batch.axis_name)


def psum(value: jax.Array, axis_name: AxisName) -> jax.Array:
    """The sum over the devices of a batch."""
    return value if axis_name is None else lax.psum(value, cast("Any", axis_name))


def pmax(value: jax.Array, axis_name: AxisName) -> jax.Array:
    """The maximum over the devices of a batch."""
    return value if axis_name is None else lax.pmax(value, cast("Any", axis_name))


def check_bound(axis_name: AxisName) -> None:
    """Raise where `axis_name` names no mapped axis."""
    try:
        psum(jnp.ones(()), axis_name)
    except NameError as error:
        raise ValueError(
            f"axis_name={axis_name!r} is not bound here: call this inside a jax.shard_map, jax.pmap or "
            "jax.vmap that maps over an axis of that name, or leave axis_name out"
        ) from error


def _axes(axis: Axis, shape: tuple[int, ...]) -> tuple[int, ...]:
    dimensions = len(shape)
    if axis is None:
        return tuple(range(dimensions))
    given = (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -dimensions <= a < dimensions for a in given):
        raise ValueError(f"axis {axis} is out of range for losses of shape {shape}")
    axes = tuple(a % dimensions for a in given)
    if len(set(axes)) != len(axes):
        raise ValueError(f"axis names a dimension twice, got {axis}")
    return axes


def _kl_weights(batch: Batch, weighting: KL) -> jax.Array:
    losses = batch.losses
    tau, scale = kl_settings(weighting, losses.dtype)
    clipped = jnp.minimum(losses, tau)
    # An infinite loss times a scale of 0 is 0 here: without re-weighting it weighs 1.
    exponent = jnp.where((scale == 0) & ~jnp.isnan(losses), 0, scale * clipped)
    if not weighting.normalize:
        return jnp.exp(exponent)
    unnormalised = jnp.exp(exponent - _max(exponent, batch))
    return unnormalised / _mean(unnormalised, batch)


class _Search(NamedTuple):
    """Where the search for `inverse_gamma` stands: the root lies in (below, above), one for each batch."""

    inverse_gamma: jax.Array
    below: jax.Array
    above: jax.Array
    done: jax.Array
    step: jax.Array


_MAX_STEPS = 100


def _ball_weights(batch: Batch, weighting: KLBall) -> jax.Array:
    """`n * softmax(l / gamma)` with `D(1 / gamma) = radius`, by a safeguarded Newton iteration.

    `D`, the divergence from uniform, grows with `b = 1 / gamma` from 0 to `log(n / m)`, `m` the number of
    largest losses, near 0 as a square: `D(b) ~ b^2 * var(l) / 2`. Newton's steps are for
    `sqrt(D(b)) = sqrt(radius)`, which starts as a straight line. With `D'(b) = b * var_q(l)` a step is
    `(radius - D) / (b * var_q) * 2 / (1 + sqrt(radius / D))`. A step that leaves the interval known to hold
    the root is replaced by its middle, or by `2 * b` where it is unbounded.
    """
    losses = batch.losses
    dtype = losses.dtype
    radius = setting("KLBall.radius", weighting.radius, dtype)
    # The weights depend on the losses up to a shift and a positive factor; gaps of at most 1 cannot overflow.
    halves = losses / 2
    largest = _max(halves, batch)
    spread = largest + _max(-halves, batch)
    gaps = (halves - largest) / jnp.where(spread > 0, spread, 1)
    gaps = gaps if batch.where is None else jnp.where(batch.where, gaps, 0)
    on_largest = _mean((gaps == 0).astype(dtype), batch)  # m / n

    def tilted(inverse_gamma: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weights of mean one, and their logarithms, for one `1 / gamma`."""
        exponent = inverse_gamma * gaps
        logarithm = exponent - jnp.log1p(_mean(jnp.expm1(exponent), batch))
        return jnp.exp(logarithm), logarithm

    def advance(search: _Search) -> _Search:
        b = search.inverse_gamma
        weights, logarithm = tilted(b)
        # mean(w log w), plus 1 - mean(w) = 0: the error of a logarithm's common shift then cancels.
        divergence = _mean(logarithm * weights - jnp.expm1(logarithm), batch)
        deviation = gaps - _mean(weights * gaps, batch)
        variance = _mean(weights * deviation * deviation, batch)
        below = jnp.where(divergence < radius, b, search.below)
        above = jnp.where(divergence >= radius, b, search.above)
        step = (radius - divergence) / (b * variance) * 2 / (1 + jnp.sqrt(radius / divergence))
        middle = jnp.where(jnp.isinf(above), 2 * b, (below + above) / 2)
        proposed = jnp.where((b + step > below) & (b + step < above), b + step, middle)
        converged = jnp.abs(divergence - radius) <= 4 * jnp.finfo(dtype).eps * radius
        settled = jnp.abs(proposed - b) <= jnp.finfo(dtype).eps * b
        done = search.done | converged | settled
        return _Search(jnp.where(done, b, proposed), below, above, done, search.step + 1)

    uniform_variance = _mean(jnp.square(gaps - _mean(gaps, batch)), batch)
    start = jnp.sqrt(2 * radius / uniform_variance)
    concentrated = (radius > 0) & (radius >= -jnp.log(on_largest))
    none_or_all = (radius == 0) | (spread == 0)
    # NaN compares false: what is not finite never enters the loop. Built from `start`, every field varies
    # over the mapped axes that it varies over, as a loop's state must.
    done = ~((start > 0) & jnp.isfinite(start)) | concentrated | none_or_all
    start = jnp.where(done, 1, start)
    search = _Search(start, 0 * start, start / 0, done, jnp.zeros((), jnp.int32))
    search = lax.while_loop(lambda s: jnp.any(~s.done) & (s.step < _MAX_STEPS), advance, search)
    weights, _ = tilted(search.inverse_gamma)
    weights = jnp.where(concentrated, (gaps == 0) / on_largest, weights)
    weights = jnp.where(none_or_all, 1, weights)
    # An infinite loss has no weight in a ball, but weighs 1 without re-weighting.
    bad = jnp.where(radius == 0, jnp.isnan(losses), ~jnp.isfinite(losses))
    any_bad = psum(jnp.sum(bad, axis=batch.axes, keepdims=True), batch.axis_name) > 0
    return jnp.where(any_bad | ~(radius >= 0), jnp.nan, weights)


def _mean(values: jax.Array, batch: Batch) -> jax.Array:
    """Mean over the losses that take part, axes kept."""
    total = jnp.sum(values, axis=batch.axes, keepdims=True, where=batch.where)
    return psum(total, batch.axis_name) / count_of(batch)


def _max(values: jax.Array, batch: Batch) -> jax.Array:
    """Maximum over the losses that take part, axes kept."""
    local = jnp.max(values, axis=batch.axes, keepdims=True, initial=-jnp.inf, where=batch.where)
    return pmax(local, batch.axis_name)


def _unflatten_kl(normalize: bool, numbers: Iterable[Any]) -> KL:
    tau, scale = numbers
    return _unchecked(KL, tau=tau, scale=scale, normalize=normalize)


def _unflatten_ball(_: None, numbers: Iterable[Any]) -> KLBall:
    (radius,) = numbers
    return _unchecked(KLBall, radius=radius)


def _unchecked(kind: type[Any], **fields: Any) -> Any:
    """A weighting of any contents: a pytree's leaves may be tracers, shapes or placeholders."""
    weighting = object.__new__(kind)
    for name, value in fields.items():
        object.__setattr__(weighting, name, value)
    return weighting


_KEY = jax.tree_util.GetAttrKey
jax.tree_util.register_pytree_with_keys(
    KL,
    lambda kl: (((_KEY("tau"), kl.tau), (_KEY("scale"), kl.scale)), kl.normalize),
    _unflatten_kl,
    lambda kl: ((kl.tau, kl.scale), kl.normalize),
)
jax.tree_util.register_pytree_with_keys(
    KLBall,
    lambda ball: (((_KEY("radius"), ball.radius),), None),
    _unflatten_ball,
    lambda ball: ((ball.radius,), None),
)
jax.tree_util.register_dataclass(
    WeightStats,
    data_fields=[
        "mean_loss",
        "objective",
        "effective_sample_size",
        "kl_to_uniform",
        "max_weight",
        "clipped_share",
        "count",
    ],
    meta_fields=[],
)
