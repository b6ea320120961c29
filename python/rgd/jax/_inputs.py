"""Checks a caller's arrays at trace time: losses, masks, the measure and groups."""

# Some types of jax are partly unknown to pyright.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from rgd._arrays import power_of, refuse_masked
from rgd.jax._devices import AxisName, check_bound
from rgd.weightings import Weighting

Axis: TypeAlias = int | Sequence[int] | None


class Losses(NamedTuple):
    """Losses that were checked.

    Attributes:
        values: The losses, in float64 or float32, 0 where they take no part.
        measure: The base measure, of the losses' shape: 0 where a loss takes no part, NaN where a traced
            `sample_weight` is not allowed; None for ones.
        groups: The group of each loss, of the losses' shape, or None.
        axes: The axes that a batch lies along.
        axis_name: Name or names of mapped axes over which the batch is spread.
        reference: The losses of a reference model, of the losses' shape and dtype, or None.
        entropy: The entropy of the logits of each loss, of the losses' shape and dtype, or None.
        classes: How many classes these logits have, or None.
    """

    values: jax.Array
    measure: jax.Array | None
    groups: jax.Array | None = None
    axes: tuple[int, ...] = ()
    axis_name: AxisName = None
    reference: jax.Array | None = None
    entropy: jax.Array | None = None
    classes: int | None = None

    @property
    def full_measure(self) -> jax.Array:
        """The measure, ones where none was given."""
        return jnp.ones_like(self.values) if self.measure is None else self.measure


def as_losses(
    losses: ArrayLike,
    *,
    where: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    axis: Axis = None,
    axis_name: AxisName = None,
    reduction: str = "mean",
    reference: ArrayLike | None = None,
) -> Losses:
    """Check a user's arrays; a measure is not rescaled if `reduction` depends on its scale."""
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
    measure = as_measure(sample_weight, losses.shape, losses.dtype, reduction)
    measure = masked_measure(mask, measure, losses.dtype)
    if measure is not None:
        losses = jnp.where(measure != 0, losses, 0)
    members = as_groups(groups, losses.shape)
    compared = as_reference(reference, losses.shape, losses.dtype, measure)
    return Losses(losses, measure, members, _axes(axis, losses.shape), axis_name, compared)


def an_array(name: str, given: ArrayLike) -> ArrayLike:
    """The argument, unless JAX would misread it: refuses a tensor of torch, and an array with a mask."""
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


def as_measure(
    sample_weight: ArrayLike | None, shape: tuple[int, ...], dtype: Any, reduction: str = "mean"
) -> jax.Array | None:
    """`sample_weight`, checked, a constant of the losses' shape; NaN where a traced number is not allowed.

    "mean" and the weights do not depend on a common factor of the measure. So numbers that `dtype` cannot
    hold are divided by a power of two, if they can be read.
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
            factor = power_of(largest)
            given = given if factor == 1.0 else known / factor
        elif largest > float(jnp.finfo(dtype).max):
            raise ValueError(
                f"sample_weight holds {largest:g}, more than {jnp.dtype(dtype).name} can, and "
                f"reduction={reduction!r} depends on its size: give float64 logits, or smaller numbers"
            )
        return _by_sample("sample_weight", jnp.asarray(given, dtype), shape)
    measure = lax.stop_gradient(jnp.asarray(given, dtype))
    measure = jnp.where((measure >= 0) & (measure < jnp.inf), measure, jnp.nan)
    return _by_sample("sample_weight", measure, shape)


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


def as_reference(
    reference: ArrayLike | None, shape: tuple[int, ...], dtype: Any, measure: jax.Array | None
) -> jax.Array | None:
    """The losses of a reference model, checked, constants of the losses' shape and dtype.

    A loss that takes part and is not finite is refused if it is known, and becomes NaN if it is traced.
    """
    if reference is None:
        return None
    given = an_array("reference", reference)
    given = given if isinstance(given, np.ndarray) else jnp.asarray(given)
    if not jnp.issubdtype(given.dtype, jnp.floating):
        raise TypeError(f"reference must be an array of losses, floats, got {given.dtype}")
    if given.shape != shape:
        raise ValueError(
            f"reference must have the shape of the losses, {shape}, got {given.shape}: the losses of the "
            'reference model for the same targets, as reduction="none" with weighting=rgd.ERM() gives them'
        )
    if is_known(given) and is_known(measure):
        wrong = ~np.isfinite(np.asarray(given, np.float64))
        wrong = wrong if measure is None else wrong & (np.asarray(measure) != 0)
        if wrong.any():
            raise ValueError(
                "reference must hold finite losses wherever a target takes part, got "
                f"{np.asarray(given)[wrong][0]}: leave such targets out, by where= or sample_weight="
            )
    compared = lax.stop_gradient(jnp.asarray(given, dtype))
    return jnp.where(jnp.isfinite(compared), compared, jnp.nan)


def comparable(integers: Any) -> Any:
    """The integers in at least 32 bits: in a narrower dtype, the number they are compared with would wrap."""
    return integers.astype(np.int32) if integers.dtype.itemsize < 4 else integers


def masked_measure(mask: jax.Array | None, measure: jax.Array | None, dtype: Any) -> jax.Array | None:
    """The measure, 0 where `mask` is False; None where neither is given."""
    if mask is None:
        return measure
    return mask.astype(dtype) if measure is None else jnp.where(mask, measure, 0)


def is_known(array: Any) -> bool:
    """Whether an array's values can be read now."""
    if isinstance(array, jax.core.Tracer):
        return False
    return not isinstance(array, jax.Array) or array.is_fully_addressable


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
