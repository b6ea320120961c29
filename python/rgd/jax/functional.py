"""Weights, the re-weighted mean, its gradient and the statistics, in `jax.numpy`.

With the losses `l` of a batch (over all devices of `axis_name`, where that is given), their weights `w` and
the base measure `p` (`sample_weight`, or ones), the objective is

    sum(p * sg(w) * l) / sum(p)

with `sg` the stop-gradient.
"""

# Some types of jax are partly unknown to pyright.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from rgd._arrays import refuse_masked
from rgd.jax._devices import AxisName, divided_by_factor, gather, pmax, psum
from rgd.jax._inputs import Axis, Losses, as_losses, is_known
from rgd.jax._targets import as_normalizer
from rgd.jax._weights import as_constants, weighted_losses, weights_of
from rgd.stats import MOST_GROUPS, GroupStats, WeightStats
from rgd.weightings import ERM, Weighting
from rgd.weightings._call import (
    check_reference_is_given,
    check_reference_is_read,
    refuse_without_logits,
    resolve_weighting,
)


def sample_weights(
    losses: ArrayLike,
    weighting: Weighting | None = None,
    *,
    tau: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    where: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    state: Any = None,
    axis: Axis = None,
    axis_name: AxisName = None,
    reference: ArrayLike | None = None,
) -> Any:
    """The weight of each sample of a batch, as a constant of the gradient.

    `KL(tau)` gives `w_i = exp(min(l_i, tau) / (tau + 1))`; each weighting has its formula.

    Args:
        losses: Losses, any shape but (), floating.
        weighting: Turns losses into weights; `KL(tau=1.0)` if neither this nor `tau` nor `scale` is given.
            Its numbers may be traced; a traced number that is not allowed cannot raise, and makes the weights
            NaN.
        tau: Short for `weighting=rgd.KL(tau=tau)`.
        scale: Short for `weighting=rgd.KL(scale=scale)`; with `tau`, for `rgd.KL(tau, scale=scale)`.
        where: Booleans that broadcast to the losses' shape. A loss where it is False has weight 0 and takes
            no part in the others' weights.
        sample_weight: The base measure `p`, numbers >= 0, constants: of the losses' shape, or (N,) for the
            leading axis. Weightings that depend on the batch use it: an integer `p` counts as that many
            equal samples, 0 as masked out. A traced number that is not allowed makes weights NaN.
        groups: The group of each sample, integers of the losses' shape or (N,), for `rgd.GroupDRO`.
        state: The state of a weighting that remembers: what `weighting.init()` or the last call returned.
        axis: The axes that a batch lies along; None for all. Each position of the other axes is a batch of
            its own.
        axis_name: Name or names of mapped axes (`jax.shard_map`, `jax.pmap`, `jax.vmap`) over which the batch
            is spread. Weights that depend on the batch are then those of the whole batch, as is the state.
        reference: The losses of a reference model, for `rgd.Excess`: of the losses' shape, constants, finite
            wherever a loss takes part. A traced one that is not makes weights NaN.

    Returns:
        Weights of the losses' shape (`w`, without `p`): float64 for float64 losses, else float32. With
        `state`: the weights and the new state, of arrays.

    Raises:
        TypeError: If `losses` are not floating, or another argument is of the wrong type.
        ValueError: If `losses` are 0-d, a number of the weighting is not a scalar, a shape does not fit,
            `sample_weight` holds a number that is negative or not finite, `axis_name` is not bound, `tau`
            or `scale` is given beside `weighting`, the weighting remembers and `state` is missing, or it is
            an `rgd.Excess` and `reference` is missing, or none and `reference` is given.

    Example:
        >>> import jax.numpy as jnp, rgd, rgd.jax
        >>> rgd.jax.sample_weights(jnp.array([0.0, 1.0, 5.0]), rgd.KL(tau=1.0)).round(4)
        Array([1.    , 1.6487, 1.6487], dtype=float32)
        >>> average = rgd.MovingAverage(rgd.KL(tau=1.0), decay=0.9)
        >>> weights, state = rgd.jax.sample_weights(jnp.array([0.0, 5.0]), average, state=average.init())
        >>> print([f"{w:.4f}" for w in weights], state["updates"])
        ['0.7551', '1.2449'] 1

    References:
        Kumar, Majmundar, Nagaraj, Suggala, "Stochastic Re-weighted Gradient Descent via Distributionally
        Robust Optimization", TMLR 2024, arXiv 2306.09222, Algorithm 1. Each weighting names its own source.
    """
    chosen = resolve_weighting(weighting, tau, scale)
    batch = as_losses(
        losses,
        where=where,
        sample_weight=sample_weight,
        groups=groups,
        axis=axis,
        axis_name=axis_name,
        reference=reference,
    )
    weights, new = weights_of(batch, chosen, state)
    return weights if state is None else (weights, new)


def reweighted_mean(
    losses: ArrayLike,
    weighting: Weighting | None = None,
    *,
    tau: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    where: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    state: Any = None,
    axis: Axis = None,
    axis_name: AxisName = None,
    reference: ArrayLike | None = None,
) -> Any:
    """The re-weighted objective, `sum_i p_i * sg(w_i) * l_i / sum_i p_i`; `mean(w * l)` without a `p`.

    Its gradient is the mean of the samples' gradients, each times its weight. A sample of weight 0 adds 0 to
    both, even if its loss is infinite; a NaN loss gives NaN.

    Args:
        losses: Losses, any shape but (), floating: of examples, tasks, domains or sequences.
        weighting: As for `sample_weights`.
        tau: Short for `weighting=rgd.KL(tau=tau)`.
        scale: Short for `weighting=rgd.KL(scale=scale)`; with `tau`, for `rgd.KL(tau, scale=scale)`.
        where: Booleans that broadcast to the losses' shape: which losses take part. The others change neither
            the objective nor its gradient, even if they are NaN.
        sample_weight: The base measure `p`, as for `sample_weights`; no gradient is taken of it.
        groups: As for `sample_weights`.
        normalizer: A number that the sum is divided by instead of the sum of `p_i`, as for `cross_entropy`.
        state: As for `sample_weights`.
        axis: The axes that a batch lies along; None for all. Each position of the other axes is a batch of
            its own.
        axis_name: Name or names of mapped axes over which the batch is spread; the objective is then that of
            the whole batch, the same on every device. Under `jax.shard_map` its gradient with respect to a
            replicated value is that of the whole batch too; under `jax.pmap` take `jax.lax.pmean` of it, as
            for any summed loss.
        reference: As for `sample_weights`.

    Returns:
        The objective, of the losses' shape without `axis`: float64 for float64 losses, else float32. NaN
        where no loss takes part. With `state`: the objective and the new state.

    Raises:
        TypeError, ValueError: As `sample_weights`.

    Example:
        >>> import jax, jax.numpy as jnp, rgd, rgd.jax
        >>> losses = jnp.array([0.5, 3.0])
        >>> float(rgd.jax.reweighted_mean(losses, rgd.ERM()))
        1.75
        >>> [f"{g:.4f}" for g in jax.grad(rgd.jax.reweighted_mean)(losses)]  # w / n
        ['0.6420', '0.8244']

    References:
        Kumar et al., arXiv 2306.09222, Algorithm 1.
    """
    chosen = resolve_weighting(weighting, tau, scale)
    batch = as_losses(
        losses,
        where=where,
        sample_weight=sample_weight,
        groups=groups,
        axis=axis,
        axis_name=axis_name,
        reduction="mean" if normalizer is None else "sum",
        reference=reference,
    )
    divisor = as_normalizer(normalizer, "mean", batch.values.dtype)
    weights, new = weights_of(batch, chosen, state)
    if sample_weight is not None and divisor is None:
        batch = batch._replace(measure=divided_by_factor(batch.measure, axis_name))
    total = psum(jnp.sum(weighted_losses(weights, batch), axis=batch.axes), axis_name)
    if divisor is None:
        divisor = psum(jnp.sum(batch.full_measure, axis=batch.axes), axis_name)
    mean = total / divisor
    return mean if state is None else (mean, new)


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    weighting: Weighting | None = None,
    tau: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> Callable[..., Any]:
    """Turn a function that returns per-example losses into the re-weighted objective and its gradient.

    The objective is `sum_i p_i * sg(w_i) * l_i / sum_i p_i`, its gradient `sum_i p_i * w_i * grad l_i /
    sum_i p_i`: one backward pass, the cost of `jax.value_and_grad` of the mean.

    Args:
        fun: Returns losses, any shape but (), floating; or with `has_aux` a pair of losses and auxiliary
            data.
        argnums: Which positional arguments to differentiate with respect to, as in `jax.value_and_grad`.
        has_aux: Whether `fun` returns auxiliary data too.
        weighting: As for `sample_weights`.
        tau: Short for `weighting=rgd.KL(tau=tau)`.
        scale: Short for `weighting=rgd.KL(scale=scale)`; with `tau`, for `rgd.KL(tau, scale=scale)`.
        axis_name: Name or names of mapped axes over which the batch is spread, as in `reweighted_mean`.

    Returns:
        A function of the same arguments that returns `(objective, gradient)`, or with `has_aux`
        `((objective, aux), gradient)`.

        It takes six more keywords for `reweighted_mean`: `where`, `sample_weight`, `groups`, `normalizer`,
        `state` and `reference`. If an argument of `fun` has one of these names, give it by position. With
        `state` it returns a pair: the result as above, and the new state.

    Raises:
        TypeError: When called, if `fun` does not return what `has_aux` says, or losses that are not floating.
        ValueError: When called, if the losses are 0-d; as `reweighted_mean`.

    Example:
        >>> import jax.numpy as jnp, rgd, rgd.jax
        >>> def losses(slope, x, y):
        ...     return (slope * x - y) ** 2
        >>> x, y = jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])
        >>> objective, gradient = rgd.jax.value_and_grad(losses, tau=1.0)(1.0, x, y)
        >>> print(f"{objective:.4f} {gradient:.4f}")
        3.2974 -6.5949
        >>> weighting = rgd.GroupDRO(groups=2, step_size=0.1)
        >>> step = rgd.jax.value_and_grad(losses, weighting=weighting)
        >>> (objective, gradient), state = step(1.0, x, y, groups=jnp.array([0, 1]), state=weighting.init())
        >>> [f"{share:.4f}" for share in state["shares"]]
        ['0.4013', '0.5987']

    References:
        Kumar et al., arXiv 2306.09222, Algorithm 1.
    """
    chosen = resolve_weighting(weighting, tau, scale)
    refuse_without_logits(chosen)

    @functools.wraps(fun)
    def with_gradient(
        *args: Any,
        where: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        groups: ArrayLike | None = None,
        normalizer: ArrayLike | None = None,
        state: Any = None,
        reference: ArrayLike | None = None,
        **kwargs: Any,
    ) -> Any:
        def objective(*args: Any, **kwargs: Any) -> tuple[jax.Array, tuple[Any, Any]]:
            losses, aux = _losses_and_aux(fun(*args, **kwargs), has_aux)
            mean: Any = reweighted_mean(
                losses,
                chosen,
                where=where,
                sample_weight=sample_weight,
                groups=groups,
                normalizer=normalizer,
                state=state,
                axis_name=axis_name,
                reference=reference,
            )
            mean, new = (mean, None) if state is None else mean
            return mean, (aux, new)

        (value, (aux, new)), gradient = jax.value_and_grad(objective, argnums, has_aux=True)(*args, **kwargs)
        result = ((value, aux) if has_aux else value), gradient
        return result if state is None else (result, new)

    return with_gradient


def weight_stats(
    losses: ArrayLike,
    weights: ArrayLike,
    weighting: Weighting | None = None,
    *,
    where: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    num_groups: int | None = None,
    axis_name: AxisName = None,
    reference: ArrayLike | None = None,
) -> WeightStats:
    """The statistics of a set of weights, as a pytree of arrays, which functions under `jit` can return.

    Args:
        losses: Losses `l`, any shape but (), floating.
        weights: Weights `w`, of the same shape.
        weighting: The weighting that made the weights; with None, `clipped_share` is None.
        where: Booleans that broadcast to the losses' shape: which samples are counted.
        sample_weight: The base measure, as for `sample_weights`.
        groups: The group of each sample, integers >= 0 of the losses' shape or (N,): adds the statistics of
            each group.
        num_groups: How many groups there are; needed where `groups` are traced. By default the largest of
            `groups`, plus one. A traced group that is not below it makes the statistics of groups NaN.
        axis_name: Name or names of mapped axes over which the batch is spread.
        reference: The losses of a reference model, which `rgd.Excess` compared with.

    Returns:
        `rgd.WeightStats`, whose numbers are 0-d arrays, and whose groups, where they are given, have arrays
        of shape (num_groups,). It is not differentiated through.

    Raises:
        TypeError: As `sample_weights`.
        ValueError: As `sample_weights`; if the shapes differ; if `groups` are traced and `num_groups` is not
            given; if a concrete group is out of range.

    Example:
        >>> import jax.numpy as jnp, rgd, rgd.jax
        >>> losses = jnp.array([0.5, 0.5, 3.0])
        >>> stats = rgd.jax.weight_stats(losses, rgd.jax.sample_weights(losses), rgd.KL())
        >>> print(f"{stats.effective_sample_size:.3f} of {stats.count}, {stats.clipped_share:.1%} clipped")
        2.956 of 3, 33.3% clipped
    """
    batch = as_losses(
        losses,
        where=where,
        sample_weight=sample_weight,
        groups=groups,
        axis_name=axis_name,
        reference=reference,
    )
    chosen = ERM() if weighting is None else resolve_weighting(weighting)
    check_reference_is_given(chosen, reference)
    if reference is not None:
        check_reference_is_read(chosen)
    refuse_masked("weights", weights)
    weights = jnp.asarray(weights, batch.values.dtype)
    if weights.shape != batch.values.shape:
        raise ValueError(f"weights must have the shape of losses, {batch.values.shape}, got {weights.shape}")
    batch = batch._replace(values=lax.stop_gradient(batch.values))
    p, loss = batch.full_measure, batch.values
    takes_part = p != 0
    weight = jnp.where(takes_part, lax.stop_gradient(weights), 0)

    def total(values: jax.Array) -> jax.Array:
        return psum(jnp.sum(values), axis_name)

    whole, count = total(p), total(takes_part.astype(int))
    weight_sum = total(p * weight)
    relative = weight * (whole / weight_sum)  # averages to one: q / p' = relative
    entropy = jnp.where(relative == 0, 0, relative * jnp.log(jnp.where(relative == 0, 1, relative)))
    largest = pmax(jnp.max(weight, initial=-jnp.inf, where=takes_part), axis_name)
    stats: dict[str, Any] = {
        "mean_loss": total(p * loss) / whole,
        "worst_tenth": _worst_tenth(batch),
        "objective": total(weighted_losses(weight, batch)) / whole,
        "effective_sample_size": count * (weight_sum / whole) * (weight_sum / total(p * weight * weight)),
        # Subtract the mean of `relative - 1`, which is 0 but for the rounding of a common factor.
        "kl_to_uniform": total(p * (entropy - (relative - 1))) / whole,
        "max_weight": jnp.where(count > 0, largest, jnp.nan),
        "clipped_share": None,
        "count": count,
        "mean_weight": weight_sum / whole,
    }
    if weighting is not None:
        clip: Any = as_constants(chosen, loss.dtype).clip
        clipped = loss if batch.reference is None else loss - batch.reference
        share = total(p * (clipped > clip)) / whole
        stats["clipped_share"] = jnp.where(jnp.isinf(clip), 0, share)
    if batch.groups is not None:
        number = _number_of_groups(batch, num_groups)
        stats["groups"] = _group_stats(batch, weight, batch.groups, number, weight_sum)
    return WeightStats(**stats)


def _worst_tenth(batch: Losses) -> jax.Array:
    """The mean loss of the worst tenth of the measure; the sample at its edge counts in part."""
    losses, measure = (
        gather(array.reshape(-1), batch.axis_name) for array in (batch.values, batch.full_measure)
    )
    if not losses.size:
        return jnp.full((), jnp.nan, losses.dtype)
    order = jnp.argsort(-losses)
    losses, measure = losses[order], measure[order]
    reached = jnp.cumsum(measure)
    tenth = reached[-1] / 10
    taken = jnp.clip(tenth - (reached - measure), 0, measure)
    mean = jnp.sum(jnp.where(taken > 0, taken * losses, 0)) / tenth
    unknown = jnp.any(jnp.isnan(losses) & (measure != 0))
    # JAX takes the gathered losses as varying over the mapped axes. Their mean is equal on all devices, so it
    # must not vary.
    return pmax(jnp.where(unknown, jnp.nan, mean), batch.axis_name)


def _number_of_groups(batch: Losses, num_groups: int | None) -> int:
    """`num_groups`, or one more than the largest group that takes part; a known group out of range raises."""
    if not is_known(batch.groups):
        if num_groups is None:
            raise ValueError(
                "groups are traced, and how many there are cannot be read: give num_groups, a Python integer"
            )
        return num_groups
    members = np.asarray(batch.groups)
    if batch.measure is not None and is_known(batch.measure):
        members = members[np.asarray(batch.measure) != 0]
    largest = int(members.max(initial=-1))
    if members.size and members.min() < 0:
        raise ValueError(f"groups must be integers >= 0, got {members.min()}")
    if num_groups is not None and largest >= num_groups:
        raise ValueError(f"groups must be below num_groups={num_groups}, got {largest}")
    if num_groups is None and largest >= MOST_GROUPS:
        raise ValueError(
            f"groups hold {largest}, and every group below would have an entry: number the groups from 0"
        )
    return largest + 1 if num_groups is None else num_groups


def _group_stats(
    batch: Losses, weights: jax.Array, groups: jax.Array, number: int, weight_sum: jax.Array
) -> GroupStats:
    p = batch.full_measure
    takes_part = p != 0

    def by_group(values: jax.Array) -> Any:
        sums = jax.ops.segment_sum(values.reshape(-1), groups.reshape(-1), num_segments=number)
        return psum(sums, batch.axis_name)

    outside = jnp.any(((groups < 0) | (groups >= number)) & takes_part)
    valid = jnp.where(psum(outside.astype(p.dtype), batch.axis_name) > 0, jnp.nan, 1).astype(p.dtype)
    return GroupStats(
        mean_loss=valid * by_group(p * batch.values) / by_group(p),
        weight_share=valid * by_group(p * weights) / weight_sum,
        count=by_group(takes_part.astype(int)),
    )


def _losses_and_aux(returned: Any, has_aux: bool) -> tuple[Any, Any]:
    pair = returned.__class__ is tuple
    if has_aux and not (pair and len(returned) == 2):
        raise TypeError(f"with has_aux=True the function must return (losses, aux), got {type(returned)}")
    if pair and not has_aux:
        raise TypeError(
            "the function returned a tuple, where an array of per-example losses is needed: give "
            "has_aux=True if it returns (losses, aux)"
        )
    return returned if has_aux else (returned, None)
