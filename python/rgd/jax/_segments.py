"""Sequences that share a row: which unit each target belongs to, and the weights of such units."""

# Some types of jax are partly unknown to pyright.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from rgd._segments import are_given, count
from rgd.jax._inputs import Losses, an_array, as_groups, comparable, is_known
from rgd.jax._weights import weights_of
from rgd.weightings import Weighting


class Segments(NamedTuple):
    """Which unit each target belongs to.

    Attributes:
        unit: The number of each target's unit, of the labels' shape; the number of units for no unit.
        inside: False where the segment is -1. True also where a traced number is not allowed.
        shape: The shape of the units, (B, S).
    """

    unit: jax.Array
    inside: jax.Array
    shape: tuple[int, int]

    def mask(self, where: jax.Array | None) -> jax.Array:
        """`where`, and False for targets that belong to no unit."""
        return self.inside if where is None else where & self.inside

    def to_targets(self, name: str, given: ArrayLike | None) -> ArrayLike | None:
        """An argument for the units or the targets, as one entry for each target; None stays None.

        Raises:
            ValueError: If it has another shape; or, if its values can be read, differs within a unit.
        """
        if given is None:
            return None
        array: Any = an_array(name, given)
        array = array if isinstance(array, np.ndarray) else jnp.asarray(array)
        if array.shape == self.unit.shape:
            self._check_constant(name, array)
            return array
        if array.shape != self.shape:
            raise ValueError(
                f"{name} must have the shape of the labels, {self.unit.shape}, or that of the units, "
                f"{self.shape}, with segments, got {array.shape}"
            )
        return self._spread(jnp.asarray(array), 0)

    def groups(self, groups: ArrayLike | None) -> jax.Array | None:
        """The group of each unit."""
        members = as_groups(self.to_targets("groups", groups), self.unit.shape)
        if members is None:
            return None
        return self._reduced(jax.ops.segment_max, jnp.where(self.inside, members, 0), 0)

    def weigh(self, losses: Losses, weighting: Weighting, state: Any) -> tuple[jax.Array, Any]:
        """The weight of each target, from the mean loss of its unit, and the state after the batch."""
        takes_part = losses.full_measure != 0
        counted = takes_part.astype(losses.values.dtype)
        number = self._reduced(jax.ops.segment_sum, counted, 0)
        total = self._reduced(jax.ops.segment_sum, jnp.where(takes_part, losses.values, 0), 0)
        measure = counted if losses.measure is None else losses.measure
        measure = jnp.where(number > 0, self._reduced(jax.ops.segment_max, measure, 0), 0)

        def mean(values: jax.Array | None) -> jax.Array | None:
            if values is None:
                return None
            summed = self._reduced(jax.ops.segment_sum, jnp.where(takes_part, values, 0), -jnp.inf)
            return summed / jnp.maximum(number, 1)

        batch = losses._replace(
            values=total / jnp.maximum(number, 1),
            measure=measure,
            axes=(0, 1),
            reference=mean(losses.reference),
            entropy=mean(losses.entropy),
        )
        weights, new = weights_of(batch, weighting, state)
        return jnp.where(takes_part, lax.stop_gradient(self._spread(weights, jnp.nan)), 0), new

    def shifted(self) -> Segments:
        """The segments if position t predicts target t + 1 of the same segment, one entry for each position.

        The last position belongs to no unit.
        """
        none = self.shape[0] * self.shape[1]
        same = self.inside[:, 1:] & (self.unit[:, 1:] == self.unit[:, :-1])
        unit = jnp.where(same, self.unit[:, 1:], none)
        pads = ((0, 0), (0, 1))
        return Segments(
            jnp.pad(unit, pads, constant_values=none), jnp.pad(same, pads, constant_values=False), self.shape
        )

    def _check_constant(self, name: str, array: Any) -> None:
        if not (is_known(array) and is_known(self.unit)):
            return
        values, unit = np.asarray(array).reshape(-1), np.asarray(self.unit).reshape(-1)
        order = np.argsort(unit, kind="stable")
        same_unit = unit[order][1:] == unit[order][:-1]
        differs = values[order][1:] != values[order][:-1]
        wrong = same_unit & differs & (unit[order][1:] < math.prod(self.shape))
        if wrong.any():
            place = np.unravel_index(order[1:][wrong][0], self.unit.shape)
            raise ValueError(
                f"{name} must be constant within a segment, which is weighted as one unit, and is not at "
                f"{tuple(int(i) for i in place)}: leave single targets out by where or ignore_index"
            )

    def _reduced(self, reduction: Any, values: jax.Array, least: float) -> jax.Array:
        """A value for each unit, `least` for an empty one."""
        slots = math.prod(self.shape) + 1
        found = reduction(values.reshape(-1), self.unit.reshape(-1), num_segments=slots)[:-1]
        return jnp.maximum(found, least).reshape(self.shape)

    def _spread(self, values: jax.Array, otherwise: float) -> jax.Array:
        """The value of each target's unit; `otherwise` for a target that belongs to none."""
        flat = jnp.append(values.reshape(-1), jnp.asarray(otherwise, values.dtype))
        return flat[self.unit]


def as_segments(segments: ArrayLike | None, number: Any, per: str, shape: tuple[int, ...]) -> Segments | None:
    """The units that a caller's segments make, checked.

    Args:
        segments: Integers of the labels' shape, -1 for a target that takes no part.
        number: `num_segments`, or None.
        per: The argument of the call.
        shape: The labels' shape.

    Returns:
        The units. A target whose traced number is not allowed belongs to no unit, and has a NaN weight.
    """
    if not are_given(segments, number, per):
        return None
    given: Any = an_array("segments", cast("ArrayLike", segments))
    given = given if isinstance(given, np.ndarray) else jnp.asarray(given)
    if not jnp.issubdtype(given.dtype, jnp.integer):
        raise TypeError(f"segments must be an array of integers, got {given.dtype}")
    if given.shape != shape or not shape:
        raise ValueError(f"segments must have the labels' shape, {shape}, got {given.shape}")
    if number is not None and (
        isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < 1
    ):
        raise ValueError(f"num_segments must be a positive integer, got {number!r}")
    rows = shape[0] if len(shape) > 1 else 1
    if is_known(given):
        known = np.asarray(given)
        least, largest = (int(known.min()), int(known.max())) if known.size else (0, 0)
        number = count(least, largest, None if number is None else int(number))
    if number is None:
        number = max(math.prod(shape) // max(rows, 1), 1)
    numbers = comparable(jnp.asarray(given))
    inside = numbers != -1
    allowed_here = inside & (numbers >= 0) & (numbers < number)
    first = jnp.arange(rows, dtype=numbers.dtype).reshape(-1, *[1] * (len(shape) - 1)) * number
    unit = numbers + (first if len(shape) > 1 else 0)
    return Segments(jnp.where(allowed_here, unit, rows * number), inside, (rows, int(number)))
