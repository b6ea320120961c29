"""The weights of a checked batch.

The steps are the same for every weighting. The losses become vectors, one for each batch. The losses of all
mapped devices are gathered, the weighting computes all weights, and each device keeps its own part. Pointwise
weights need no gathering.
"""

# Some types of jax are partly unknown to pyright.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rgd.jax._devices import gather, own_part, pmax
from rgd.jax._inputs import Losses, is_known
from rgd.jax._pytrees import Structure, joined, split
from rgd.weightings import Batch, Weighting
from rgd.weightings._call import (
    check_reference_is_read,
    map_state,
    refuse_without_logits,
    require_state,
    weigh,
)
from rgd.weightings._fields import holds_everywhere, map_numbers


def as_constants(weighting: Weighting, dtype: Any) -> Weighting:
    """The weighting with each number that is an array as a constant of the losses' dtype."""

    def constant(number: Any) -> Any:
        if not hasattr(number, "shape"):
            return number
        if number.shape:
            raise ValueError(
                f"a number of {type(weighting).__name__} must be one number for a batch, got shape "
                f"{number.shape}: to sweep it, jax.vmap over the weighting"
            )
        return lax.stop_gradient(jnp.asarray(number, dtype))

    return map_numbers(weighting, constant)


def weights_of(losses: Losses, weighting: Weighting, state: Any = None) -> tuple[jax.Array, Any]:
    """The weights of a checked batch, constants, 0 where a loss takes no part, and the state after it.

    Raises:
        ValueError: If a weighting that remembers is given no state, or a state cannot be used.
    """
    require_state(weighting, state)
    if losses.entropy is None:
        refuse_without_logits(weighting)
    if losses.reference is not None:
        check_reference_is_read(weighting)
    losses = losses._replace(values=lax.stop_gradient(losses.values))
    weighting = as_constants(weighting, losses.values.dtype)
    old = None if state is None else lax.stop_gradient(map_state(jnp.asarray, state))
    if losses.values.size == 0:
        weights, new = jnp.zeros_like(losses.values), old
    elif weighting.pointwise and not weighting.stateful:
        weights, new = pointwise_weights(losses, weighting), None
    else:
        weights, new = _weights_of_batches(losses, weighting, old)
    weights = weights.astype(losses.values.dtype)
    allowed = holds_everywhere(weighting)
    if allowed is not True:
        weights = jnp.where(allowed, weights, jnp.nan)
        new = None if new is None else map_state(functools.partial(jnp.where, allowed), new, old)
    if losses.measure is not None:
        unknown = jnp.isnan(losses.measure)
        weights = jnp.where(losses.measure != 0, jnp.where(unknown, jnp.nan, weights), 0)
    return lax.stop_gradient(weights), lax.stop_gradient(new)


def pointwise_weights(losses: Losses, weighting: Weighting) -> jax.Array:
    """The weights of a pointwise weighting without state; the losses keep their shape, and their sharding."""
    vectors: Any = _vectors_of(losses)
    if losses.values.ndim == 0:
        vectors = tuple(None if array is None else array[None] for array in vectors)

    def along_last_axis(values: Any, measure: Any, groups: Any, reference: Any, entropy: Any) -> jax.Array:
        beside: Any = {"reference": reference, "entropy": entropy, "classes": losses.classes}
        return weigh(weighting, Batch(values, measure, groups, xp=jnp, **beside))[0]

    for _ in range(losses.values.ndim - 1):
        along_last_axis = jax.vmap(along_last_axis)
    weights = along_last_axis(*vectors)
    return weights[0] if losses.values.ndim == 0 else weights


def weighted_losses(weights: jax.Array, losses: Losses) -> jax.Array:
    """`p_i * w_i * l_i`. A weight of 0 makes product and gradient 0 unless the loss is NaN."""
    dropped = (weights == 0) & ~jnp.isnan(losses.values)
    product = weights * jnp.where(dropped, 0, losses.values)
    return product if losses.measure is None else losses.measure * product


def _weights_of_batches(losses: Losses, weighting: Weighting, state: Any) -> tuple[jax.Array, Any]:
    """The weights of each batch along `losses.axes`, and the state after it."""
    values, axes, axis_name = losses.values, losses.axes, losses.axis_name
    others = tuple(axis for axis in range(values.ndim) if axis not in axes)
    if state is not None and others:
        raise ValueError(
            f"a state follows one batch, and with axis={axes} losses of shape {values.shape} are several: "
            "jax.vmap over losses and state"
        )
    order = (*others, *axes)
    own_shape = tuple(values.shape[axis] for axis in order)

    def whole(array: jax.Array) -> jax.Array:
        vectors = array.transpose(order).reshape(*own_shape[: len(others)], -1)
        return gather(vectors, axis_name)

    # Only group numbers have to be read. Everything else is compiled: concrete values would gain nothing.
    concrete = losses.groups is not None and not others and all(is_known(a) for a in losses[:3])
    compute = _weigh if concrete else _weigh_compiled
    vectors = tuple(None if array is None else whole(array) for array in _vectors_of(losses))
    batches = _losses_of(vectors, losses.classes)
    weights, after = compute(weighting, len(others), batches, state)
    count = int(np.prod(own_shape[len(others) :]))
    weights = own_part(weights, count, axis_name).reshape(own_shape)
    weights = weights.transpose(tuple(int(axis) for axis in np.argsort(order)))
    if after is not None:
        # JAX takes the gathered losses as varying over the mapped axes. The state is equal on all devices, so
        # it must not vary.
        after = map_state(functools.partial(pmax, axis_name=axis_name), after)
    return weights, after


def _weigh(weighting: Weighting, vmapped: int, batches: Losses, state: Any) -> tuple[jax.Array, Any]:
    """The weights of batches along the last axis, after `vmapped` axes, and the state after them."""

    def one_batch(values: jax.Array, measure: Any, groups: Any, reference: Any, entropy: Any) -> Any:
        concrete = all(is_known(array) for array in (values, measure, groups))
        beside: Any = {"reference": reference, "entropy": entropy, "classes": batches.classes}
        batch = Batch(values, measure, groups, xp=jnp, concrete=concrete, **beside)
        weights, after = weigh(weighting, batch, state)
        return weights if measure is None else jnp.where(jnp.isnan(batch.count), jnp.nan, weights), after

    for _ in range(vmapped):
        one_batch = jax.vmap(one_batch)
    return one_batch(*_vectors_of(batches))


def _weigh_compiled(weighting: Weighting, vmapped: int, batches: Losses, state: Any) -> tuple[jax.Array, Any]:
    """`_weigh` under `jax.jit`. Python numbers of the weighting are static; its arrays are traced."""
    structure, arrays = split(weighting)
    try:
        hash(structure)
    except TypeError:  # the user's weighting has a field that cannot be a key of jax.jit's cache
        return _weigh(weighting, vmapped, batches, state)
    return _compiled(structure, (vmapped, batches.classes), arrays, _vectors_of(batches), state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(
    structure: Structure, fixed: tuple[int, int | None], arrays: Any, vectors: Any, state: Any
) -> Any:
    vmapped, classes = fixed
    return _weigh(joined(structure, arrays), vmapped, _losses_of(vectors, classes), state)


def _vectors_of(losses: Losses) -> tuple[Any, ...]:
    """The arrays of losses, of which each has one entry a loss."""
    return losses.values, losses.measure, losses.groups, losses.reference, losses.entropy


def _losses_of(vectors: tuple[Any, ...], classes: int | None) -> Losses:
    """The losses of which `_vectors_of` gives these arrays."""
    values, measure, groups, reference, entropy = vectors
    return Losses(values, measure, groups, reference=reference, entropy=entropy, classes=classes)
