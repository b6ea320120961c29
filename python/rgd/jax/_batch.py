"""A batch of losses in JAX: checked at trace time, gathered from the devices, and weighted.

Every weighting takes the same way: the losses become vectors, one for each batch; those of all mapped devices
are gathered; the weighting computes; each device keeps its own part. Weights that depend on their own loss
alone need no gathering.
"""

# The types of jax leave members partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from rgd._arrays import refuse_masked, unit_of
from rgd.weightings import Batch, Weighting
from rgd.weightings._call import map_state, require_state, weigh
from rgd.weightings._fields import holds_everywhere, map_numbers

Axis: TypeAlias = int | Sequence[int] | None
AxisName: TypeAlias = str | Sequence[str] | None


class Losses(NamedTuple):
    """Losses that were checked.

    Attributes:
        values: The losses, in float64 or float32, 0 where they take no part.
        base: The base measure, of the losses' shape: 0 where a loss takes no part, NaN where a traced
            `sample_weight` is not allowed; None for ones.
        groups: The group of each loss, of the losses' shape, or None.
        axes: The axes that a batch lies along.
        axis_name: Name or names of mapped axes over which the batch is spread.
    """

    values: jax.Array
    base: jax.Array | None
    groups: jax.Array | None
    axes: tuple[int, ...]
    axis_name: AxisName

    @property
    def ones(self) -> jax.Array:
        """The base measure, ones where none was given."""
        return jnp.ones_like(self.values) if self.base is None else self.base


def as_losses(
    losses: ArrayLike,
    *,
    where: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    axis: Axis = None,
    axis_name: AxisName = None,
) -> Losses:
    """Check what a user gave, at trace time."""
    losses = jnp.asarray(an_array("losses", losses))
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
    check_bound(axis_name)
    mask = as_mask(where, losses.shape)
    base = base_measure(mask, as_mass(sample_weight, losses.shape, losses.dtype), losses.dtype)
    if base is not None:
        losses = jnp.where(base != 0, losses, 0)
    members = as_groups(groups, losses.shape)
    return Losses(losses, base, members, _axes(axis, losses.shape), axis_name)


def an_array(name: str, given: ArrayLike) -> ArrayLike:
    """What was given, if JAX may take it for an array: it would take a tensor of torch, and lose a mask."""
    thing: Any = given
    if isinstance(thing, getattr(sys.modules.get("torch"), "Tensor", ())):
        raise TypeError(
            f"{name} is a torch.Tensor: rgd.torch has the same functions, or convert it by "
            f"jnp.asarray({name}.numpy())"
        )
    refuse_masked(name, thing)
    if isinstance(thing, Weighting):
        raise TypeError(f"{name} got the weighting {thing}: name it, weighting={thing}")
    return given


def as_mask(where: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array | None:
    """`where`, checked and broadcast to the losses' shape."""
    if where is None:
        return None
    mask = jnp.asarray(an_array("where", where))
    if mask.dtype != jnp.bool_:
        raise TypeError(f"where must be boolean, got {mask.dtype}: compare it, as in where=mask > 0")
    try:
        return jnp.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(f"where must broadcast to the losses' shape {shape}, got {mask.shape}") from None


def as_mass(
    sample_weight: ArrayLike | None, shape: tuple[int, ...], dtype: Any, reduction: str = "mean"
) -> jax.Array | None:
    """`sample_weight`, checked, a constant of the losses' shape; NaN where a traced number is not allowed.

    What "mean" and the weights give does not depend on its unit, so that numbers that `dtype` cannot hold are
    measured in another one where they can be read.
    """
    if sample_weight is None:
        return None
    given = an_array("sample_weight", sample_weight)
    given = given if isinstance(given, np.ndarray) else jnp.asarray(given)
    if not (jnp.issubdtype(given.dtype, jnp.floating) or jnp.issubdtype(given.dtype, jnp.integer)):
        raise TypeError(f"sample_weight must be an array of numbers, got {given.dtype}")
    if is_known(given):
        known = np.asarray(given, np.float64)
        wrong = known[~(np.isfinite(known) & (known >= 0))]
        if wrong.size:
            raise ValueError(f"sample_weight must hold finite numbers >= 0, got {wrong[0]}")
        largest = float(known.max(initial=0.0))
        if reduction == "mean":
            unit = unit_of(largest)
            given = given if unit == 1.0 else known / unit
        elif largest > float(jnp.finfo(dtype).max):
            raise ValueError(
                f"sample_weight holds {largest:g}, more than {jnp.dtype(dtype).name} can, and "
                f"reduction={reduction!r} depends on its size: give float64 logits, or smaller numbers"
            )
        return _by_sample("sample_weight", jnp.asarray(given, dtype), shape)
    mass = lax.stop_gradient(jnp.asarray(given, dtype))
    mass = jnp.where((mass >= 0) & (mass < jnp.inf), mass, jnp.nan)
    return _by_sample("sample_weight", mass, shape)


def as_groups(groups: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array | None:
    """`groups`, checked, of the losses' shape."""
    if groups is None:
        return None
    given = an_array("groups", groups)
    given = given if isinstance(given, np.ndarray) else jnp.asarray(given)
    if not jnp.issubdtype(given.dtype, jnp.integer):
        raise TypeError(f"groups must be an array of integers, got {given.dtype}")
    members = jnp.asarray(given)
    if members.dtype != given.dtype and (cut := given[given != np.asarray(members)]).size:
        raise ValueError(
            f"groups holds {cut[0]}, more than {members.dtype} can: number the groups from 0, or call "
            'jax.config.update("jax_enable_x64", True) first'
        )
    return _by_sample("groups", comparable(members), shape)


def comparable(integers: Any) -> Any:
    """Integers of at least 32 bits: a narrower dtype would wrap the number that it is compared with."""
    return integers.astype(np.int32) if integers.dtype.itemsize < 4 else integers


def base_measure(mask: jax.Array | None, mass: jax.Array | None, dtype: Any) -> jax.Array | None:
    """The base measure, 0 where `mask` is False; None where neither is given."""
    if mask is None:
        return mass
    return mask.astype(dtype) if mass is None else jnp.where(mask, mass, 0)


def is_known(array: Any) -> bool:
    """Whether an array's values can be read now."""
    if isinstance(array, jax.core.Tracer):
        return False
    return not isinstance(array, jax.Array) or array.is_fully_addressable


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
    losses = losses._replace(values=lax.stop_gradient(losses.values))
    weighting = as_constants(weighting, losses.values.dtype)
    old = None if state is None else lax.stop_gradient(map_state(jnp.asarray, state))
    if losses.values.size == 0:
        weights, new = jnp.zeros_like(losses.values), old
    elif weighting.pointwise and not weighting.stateful:
        weights, new = pointwise_weights(losses.values, weighting, losses.base, losses.groups), None
    else:
        weights, new = _weights_of_batches(losses, weighting, old)
    weights = weights.astype(losses.values.dtype)
    allowed = holds_everywhere(weighting)
    if allowed is not True:
        weights = jnp.where(allowed, weights, jnp.nan)
        new = None if new is None else map_state(functools.partial(jnp.where, allowed), new, old)
    if losses.base is not None:
        weights = jnp.where(losses.base != 0, jnp.where(jnp.isnan(losses.base), jnp.nan, weights), 0)
    return lax.stop_gradient(weights), lax.stop_gradient(new)


def pointwise_weights(
    losses: jax.Array, weighting: Weighting, base: jax.Array | None = None, groups: jax.Array | None = None
) -> jax.Array:
    """The weights of a pointwise weighting without state; the losses keep their shape, and their sharding."""
    if losses.ndim == 0:
        return pointwise_weights(
            losses[None], weighting, *(None if a is None else a[None] for a in (base, groups))
        )[0]

    def along_last_axis(losses: jax.Array, base: jax.Array | None, groups: jax.Array | None) -> jax.Array:
        return weigh(weighting, Batch(losses, base, groups, xp=jnp))[0]

    for _ in range(losses.ndim - 1):
        along_last_axis = jax.vmap(along_last_axis)
    return along_last_axis(losses, base, groups)


def weighted(weights: jax.Array, losses: Losses) -> jax.Array:
    """`p_i * w_i * l_i`. A weight of 0 makes product and gradient 0 unless the loss is NaN."""
    dropped = (weights == 0) & ~jnp.isnan(losses.values)
    product = weights * jnp.where(dropped, 0, losses.values)
    return product if losses.base is None else losses.base * product


def in_unit(base: jax.Array | None, axis_name: AxisName) -> jax.Array | None:
    """The base measure over a power of two, at most 1, so that products with it stay where the losses are.

    For a mean, which does not depend on it. The power is the same on all devices of a batch.
    """
    if base is None or not base.size:
        return base
    exponent = jnp.frexp(pmax(jnp.max(lax.stop_gradient(base)), axis_name))[1]
    return jnp.ldexp(base, -exponent)


def psum(value: jax.Array, axis_name: AxisName) -> jax.Array:
    """The sum over the devices of a batch."""
    return value if axis_name is None else lax.psum(value, cast("Any", axis_name))


def pmax(value: jax.Array, axis_name: AxisName) -> jax.Array:
    """The maximum over the devices of a batch."""
    return value if axis_name is None else lax.pmax(value, cast("Any", axis_name))


def mapped_axes(array: jax.Array) -> frozenset[Any]:
    """The axes of `jax.shard_map` that an array varies over, by either of the names jax has had for them."""
    aval: Any = jax.typeof(array)
    if hasattr(aval, "vma"):
        return frozenset(aval.vma)
    return frozenset(getattr(getattr(aval, "manual_axis_type", None), "varying", ()))


def vary(tree: Any, axes: frozenset[Any]) -> Any:
    """The same arrays, varying over these axes of `jax.shard_map`; the transpose sums over those added."""

    def one(array: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - mapped_axes(array), key=str))
        if not missing:
            return array
        changed: Any = lax
        if hasattr(lax, "pcast"):
            return changed.pcast(array, missing, to="varying")
        return changed.pvary(array, missing)

    return jax.tree_util.tree_map(one, tree) if axes else tree


def check_bound(axis_name: AxisName, argument: str = "axis_name") -> None:
    """Raise where `axis_name`, given as `argument`, names no mapped axis."""
    try:
        psum(jnp.ones(()), axis_name)
    except NameError as error:
        raise ValueError(
            f"{argument}={axis_name!r} is not bound here: call this inside a jax.shard_map, jax.pmap or "
            f"jax.vmap that maps over an axis of that name, or leave {argument} out"
        ) from error


def _weights_of_batches(losses: Losses, weighting: Weighting, state: Any) -> tuple[jax.Array, Any]:
    """The weights of each batch along `losses.axes`, and the state after it."""
    values, base, groups, axes, axis_name = losses
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

    # Values are read for the sake of groups alone; all else is compiled, without a gain in being concrete.
    concrete = groups is not None and not others and all(is_known(a) for a in (values, base, groups))
    compute = _weigh if concrete else _weigh_compiled
    base, groups = (None if array is None else whole(array) for array in (base, groups))
    weights, after = compute(weighting, len(others), whole(values), base, groups, state)
    count = int(np.prod(own_shape[len(others) :]))
    weights = _own_part(weights, count, axis_name).reshape(own_shape)
    weights = weights.transpose(tuple(int(axis) for axis in np.argsort(order)))
    if after is not None:
        # The gathered losses vary over the mapped axes, as JAX sees it; the state, equal on all, must not.
        after = map_state(functools.partial(pmax, axis_name=axis_name), after)
    return weights, after


def _weigh(  # noqa: PLR0917 - jax.jit and jax.vmap take arguments by position
    weighting: Weighting,
    vmapped: int,
    values: jax.Array,
    base: jax.Array | None,
    groups: jax.Array | None,
    state: Any,
) -> tuple[jax.Array, Any]:
    """The weights of batches along the last axis, after `vmapped` axes, and the state after them."""

    def one_batch(values: jax.Array, base: jax.Array | None, groups: jax.Array | None) -> Any:
        concrete = all(is_known(array) for array in (values, base, groups))
        batch = Batch(values, base, groups, xp=jnp, concrete=concrete)
        weights, after = weigh(weighting, batch, state)
        return weights if base is None else jnp.where(jnp.isnan(batch.count), jnp.nan, weights), after

    for _ in range(vmapped):
        one_batch = jax.vmap(one_batch)
    return one_batch(values, base, groups)


def _weigh_compiled(weighting: Weighting, vmapped: int, *arguments: Any) -> tuple[jax.Array, Any]:
    """`_weigh` under `jax.jit`. Python numbers of the weighting stay what they are; its arrays are traced."""
    leaves, structure = jax.tree_util.tree_flatten(weighting)
    arrays = [leaf if hasattr(leaf, "shape") else None for leaf in leaves]
    numbers = tuple(None if hasattr(leaf, "shape") else leaf for leaf in leaves)
    try:
        hash((structure, numbers))
    except TypeError:  # a setting of the user's that cannot be a key of jax.jit's cache
        return _weigh(weighting, vmapped, *arguments)
    return _compiled(structure, numbers, vmapped, arrays, *arguments)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _compiled(structure: Any, numbers: Any, vmapped: int, arrays: Any, *arguments: Any) -> Any:
    leaves = [number if array is None else array for number, array in zip(numbers, arrays, strict=True)]
    return _weigh(jax.tree_util.tree_unflatten(structure, leaves), vmapped, *arguments)


def gather(array: jax.Array, axis_name: AxisName) -> jax.Array:
    """The last axes of all devices, one after the other."""
    for name in reversed(names_of(axis_name)):
        array = lax.all_gather(array, name, axis=array.ndim - 1, tiled=True)
    return array


def _own_part(array: jax.Array, count: int, axis_name: AxisName) -> jax.Array:
    """The `count` entries of the last axis that this device has given to `gather`."""
    names = names_of(axis_name)
    if not names:
        return array
    index: Any = 0
    for name in names:
        index = index * lax.psum(1, name) + lax.axis_index(name)
    return lax.dynamic_slice_in_dim(array, index * count, count, axis=array.ndim - 1)


def names_of(axis_name: AxisName) -> tuple[Any, ...]:
    """The names, as a tuple."""
    if axis_name is None:
        return ()
    return tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)


def _by_sample(name: str, array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """An array of the losses' shape, from one of that shape or of one entry for each of the leading axis."""
    if array.shape == shape:
        return array
    if array.shape == shape[:1]:
        return jnp.broadcast_to(array.reshape(-1, *[1] * (len(shape) - 1)), shape)
    raise ValueError(
        f"{name} must have the shape of the losses, {shape}, or one entry a sample, {shape[:1]}, got "
        f"{array.shape}"
    )


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
