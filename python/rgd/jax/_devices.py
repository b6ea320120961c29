"""A batch that is spread over mapped devices: gathered, reduced, and brought back to each."""

# Some types of jax are partly unknown to pyright.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
from jax import lax

AxisName: TypeAlias = str | Sequence[str] | None


def check_bound(axis_name: AxisName, argument: str = "axis_name") -> None:
    """Raise if `axis_name`, given as `argument`, names no mapped axis."""
    try:
        psum(jnp.ones(()), axis_name)
    except NameError as error:
        raise ValueError(
            f"{argument}={axis_name!r} is not bound here: call this inside a jax.shard_map, jax.pmap or "
            f"jax.vmap that maps over an axis of that name, or leave {argument} out"
        ) from error


def names_of(axis_name: AxisName) -> tuple[Any, ...]:
    """The names, as a tuple."""
    if axis_name is None:
        return ()
    return tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)


def psum(value: jax.Array, axis_name: AxisName) -> jax.Array:
    """The sum over the devices of a batch."""
    return value if axis_name is None else lax.psum(value, cast("Any", axis_name))


def pmax(value: jax.Array, axis_name: AxisName) -> jax.Array:
    """The maximum over the devices of a batch."""
    return value if axis_name is None else lax.pmax(value, cast("Any", axis_name))


def gather(array: jax.Array, axis_name: AxisName) -> jax.Array:
    """The last axes of all devices, one after the other."""
    for name in reversed(names_of(axis_name)):
        array = lax.all_gather(array, name, axis=array.ndim - 1, tiled=True)
    return array


def own_part(array: jax.Array, count: int, axis_name: AxisName) -> jax.Array:
    """The `count` entries of the last axis that this device has given to `gather`."""
    names = names_of(axis_name)
    if not names:
        return array
    index: Any = 0
    for name in names:
        index = index * lax.psum(1, name) + lax.axis_index(name)
    return lax.dynamic_slice_in_dim(array, index * count, count, axis=array.ndim - 1)


def divided_by_factor(measure: jax.Array | None, axis_name: AxisName) -> jax.Array | None:
    """The measure over a power of two, at most 1, so that its products are not larger than the losses.

    It is for a mean, which does not depend on the factor. The factor is the same on all devices of a batch.
    """
    if measure is None or not measure.size:
        return measure
    exponent = jnp.frexp(pmax(jnp.max(lax.stop_gradient(measure)), axis_name))[1]
    return jnp.ldexp(measure, -exponent)


def mapped_axes(tree: Any) -> frozenset[Any]:
    """The axes of `jax.shard_map` that arrays vary over; jax has had two names for them."""
    axes: frozenset[Any] = frozenset()
    for leaf in jax.tree_util.tree_leaves(tree):
        aval: Any = jax.typeof(leaf)
        if hasattr(aval, "vma"):
            axes |= frozenset(aval.vma)
        else:
            axes |= frozenset(getattr(getattr(aval, "manual_axis_type", None), "varying", ()))
    return axes


def vary(tree: Any, axes: frozenset[Any]) -> Any:
    """The same arrays, varying over these axes of `jax.shard_map`; the transpose sums over the added axes."""

    def one(array: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - mapped_axes(array), key=str))
        if not missing:
            return array
        changed: Any = lax
        if hasattr(lax, "pcast"):
            return changed.pcast(array, missing, to="varying")
        return changed.pvary(array, missing)

    return jax.tree_util.tree_map(one, tree) if axes else tree
