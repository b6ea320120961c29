"""A linear layer's cross-entropy, checked at trace time: the arguments of the passes over the chunks."""

# The types of jax leave members partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from rgd.jax._devices import AxisName, check_bound, names_of, psum
from rgd.jax._inputs import an_array, as_groups, as_mask, as_measure, masked_measure
from rgd.jax._pytrees import Structure
from rgd.jax._rows import IGNORED, encode
from rgd.jax._segments import Segments, as_segments
from rgd.jax._targets import Per, Reduction, as_class_weight, by_class, refuse_out_of_range


class Settings(NamedTuple):
    """What is fixed when a call is traced.

    Attributes:
        rows: The rows of a chunk.
        classes: The number of classes, of all slices together.
        smoothing: Label smoothing.
        softcap: `cap` of `cap * tanh(z / cap)`, or None.
        accumulate: The dtype in which the kernel's gradient is summed.
        vocab_axis: The mapped axis over which the classes are spread, or None.
        native: The name of the Rust kernel that serves, or None for `jax.numpy`.
        weighting: What is fixed of the weighting where it is known inside a chunk; else None.
        returns: The names of what else is wanted of the logits, by the caller or the weighting.
    """

    rows: int
    classes: int
    smoothing: float
    softcap: float | None
    accumulate: Any
    vocab_axis: str | None
    native: str | None
    weighting: Structure | None
    returns: tuple[str, ...] = ()


class Operands(NamedTuple):
    """What the gradient is taken of: (N, D) and (D, C) of one dtype; (C,) in the accumulator's, or None."""

    inputs: Any
    kernel: Any
    bias: Any


class Rows(NamedTuple):
    """What belongs to a row.

    Attributes:
        codes: Class indices and codes, (N,), as from `rgd.jax._rows.encode`.
        measure: The measure, (N,) in the accumulator's dtype, 0 where a row does not count.
        own_weight: The class weight of the row's class, (N,), or None for ones.
        groups: Groups, (N,), or None.
        reference: The losses of a reference model, (N,), or None.
    """

    codes: Any
    measure: Any
    own_weight: Any
    groups: Any
    reference: Any = None


class Constants(NamedTuple):
    """What no gradient is taken of.

    Attributes:
        rows: What belongs to the rows: to all, or to those of a chunk.
        class_weight: Class weights of this device's classes, (C,), or None for ones.
        weight_sum: The sum of all class weights, or None for their number.
        adjustment: What is added to the logits of this device's classes, (C,), or None for nothing.
        first_class: Where the classes are spread over devices, the first of this one; else None.
        weighting: The arrays of the weighting.
        native: The weighting's numbers as the Rust kernel reads them.
        z_loss: What multiplies the squares of the rows' logsumexp, (), or None for nothing.
    """

    rows: Rows
    class_weight: Any
    weight_sum: Any
    adjustment: Any
    first_class: Any
    weighting: Any = ()
    native: Any = ()
    z_loss: Any = None


class Problem(NamedTuple):
    """What a caller gave, checked.

    Attributes:
        operands: Inputs, kernel and bias.
        constants: The rest; `rows` have the labels' shape, but with `per="sample"` groups, one a sample.
        classes: The number of classes, of all slices together.
        segments: Which unit each row belongs to, where the sequences of a row are units.
    """

    operands: Operands
    constants: Constants
    classes: int
    segments: Segments | None = None

    @property
    def dtype(self) -> Any:
        """The dtype that losses are computed in."""
        return accumulator(self.operands)

    def flat_rows(self) -> Rows:
        """What belongs to the rows, (N,)."""
        return Rows(*(None if array is None else array.reshape(-1) for array in self.constants.rows))


def accumulator(operands: Operands) -> Any:
    """The dtype that products of the operands are summed in."""
    return jnp.promote_types(operands.inputs.dtype, jnp.float32)


def as_problem(
    inputs: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None,
    *,
    weight: ArrayLike | None,
    ignore_index: int,
    logit_adjustment: ArrayLike | None,
    where: ArrayLike | None,
    sample_weight: ArrayLike | None,
    groups: ArrayLike | None,
    segments: ArrayLike | None,
    num_segments: int | None,
    reduction: Reduction,
    per: Per,
    shift: bool,
    vocab_axis_name: str | None,
) -> Problem:
    """Check the arguments of a user."""
    operands = _as_operands(inputs, kernel, bias, shift)
    dtype = accumulator(operands)
    own_classes = operands.kernel.shape[1]
    classes = own_classes if vocab_axis_name is None else own_classes * int(lax.psum(1, vocab_axis_name))
    packed = as_segments(segments, num_segments, per, jnp.shape(inputs)[:-1])
    rows = _as_rows(
        labels,
        jnp.shape(inputs)[:-1],
        classes,
        dtype,
        ignore_index=ignore_index,
        where=where,
        sample_weight=sample_weight,
        groups=groups,
        segments=packed,
        reduction=reduction,
        per=per,
        shift=shift,
    )
    if packed is not None and shift:
        packed = packed.shifted()
    class_weight = as_class_weight(weight, own_classes, dtype)
    adjustment = by_class("logit_adjustment", logit_adjustment, own_classes, dtype)
    first = None if vocab_axis_name is None else lax.axis_index(vocab_axis_name) * own_classes
    weight_sum = None
    if class_weight is not None:
        index, inside = position(rows.codes, first, own_classes)
        rows = rows._replace(own_weight=psum(jnp.where(inside, class_weight[index], 0), vocab_axis_name))
        weight_sum = psum(jnp.sum(class_weight), vocab_axis_name)
    return Problem(operands, Constants(rows, class_weight, weight_sum, adjustment, first), classes, packed)


def position(codes: jax.Array, first_class: jax.Array | None, classes: int) -> tuple[jax.Array, jax.Array]:
    """Where the label stands among this device's classes, and whether it does."""
    index = codes if first_class is None else codes - first_class
    inside = (codes >= 0) & (index >= 0) & (index < classes)
    return jnp.where(inside, index, 0), inside


def check_vocab_axis(vocab_axis_name: str | None, axis_name: AxisName) -> None:
    """Refuse an axis that is not mapped, or that rows are spread over too."""
    if vocab_axis_name is None:
        return
    check_bound(vocab_axis_name, "vocab_axis_name")
    if vocab_axis_name in names_of(axis_name):
        raise ValueError(
            f"axis_name names the axes that rows are spread over, vocab_axis_name that of the classes, and "
            f"{vocab_axis_name!r} is in both: leave it out of axis_name"
        )


def check_chunks(chunk_bytes: Any, logit_softcap: Any) -> None:
    """Refuse numbers that are out of range."""
    integer = isinstance(chunk_bytes, (int, np.integer)) and not isinstance(chunk_bytes, bool)
    if chunk_bytes is not None and not (integer and chunk_bytes > 0):
        raise ValueError(
            f"chunk_bytes must be a positive integer, bytes of logits, or None, got {chunk_bytes!r}"
        )
    if logit_softcap is None:
        return
    number = isinstance(logit_softcap, (int, float, np.number)) and not isinstance(logit_softcap, bool)
    if not number or not 0 < logit_softcap < math.inf:
        raise ValueError(f"logit_softcap must be a positive number or None, got {logit_softcap!r}")


def as_accumulate_dtype(accumulate_dtype: Any, dtype: Any) -> Any:
    """The dtype in which the kernel's gradient is summed: `dtype` where none was given."""
    chosen = jnp.dtype(dtype if accumulate_dtype is None else accumulate_dtype)
    if not jnp.issubdtype(chosen, jnp.floating):
        raise TypeError(f"accumulate_dtype must be a floating dtype, got {chosen}")
    return chosen


def _as_operands(inputs: ArrayLike, kernel: ArrayLike, bias: ArrayLike | None, shift: bool) -> Operands:
    """Check inputs, kernel and bias; give the inputs as (N, D), both in the dtype of their product."""
    given, head = (jnp.asarray(an_array(*one)) for one in (("inputs", inputs), ("kernel", kernel)))
    if given.ndim == 0:
        raise ValueError("inputs must have shape (N, D) or (B, T, D), got ()")
    if head.ndim != 2 or head.shape[1] == 0:
        raise ValueError(f"kernel must have shape (D, C) with at least one class, got {head.shape}")
    if shift and given.ndim != 3:
        raise ValueError(f"shift=True is for inputs of shape (B, T, D), got {given.shape}: leave shift out")
    size = given.shape[-1]
    if head.shape[0] != size:
        hint = "; an embedding, (C, D), goes in as embedding.T" if head.shape[1] == size else ""
        raise ValueError(
            f"kernel must have shape ({size}, C) for inputs of shape {given.shape}, got {head.shape}{hint}"
        )
    offset = None if bias is None else jnp.asarray(an_array("bias", bias))
    if offset is not None and offset.shape != head.shape[1:]:
        raise ValueError(
            f"bias must have one entry a class, shape {head.shape[1:]} for a kernel of shape {head.shape}, "
            f"got {offset.shape}"
        )
    for name, array in (("inputs", given), ("kernel", head), ("bias", offset)):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"{name} must be floating, got {array.dtype}: convert with {name}.astype(jnp.float32)"
            )
    dtype = jnp.promote_types(given.dtype, head.dtype)
    if offset is not None:
        offset = offset.astype(jnp.promote_types(dtype, jnp.float32))
    return Operands(given.astype(dtype).reshape(-1, size), head.astype(dtype), offset)


def _as_rows(
    labels: ArrayLike,
    shape: tuple[int, ...],
    classes: int,
    dtype: Any,
    *,
    ignore_index: int,
    where: ArrayLike | None,
    sample_weight: ArrayLike | None,
    groups: ArrayLike | None,
    segments: Segments | None,
    reduction: Reduction,
    per: Per,
    shift: bool,
) -> Rows:
    """Check the targets and the arrays of their shape, and move them by one position if `shift` is True."""
    values = an_array("labels", labels)
    values = values if isinstance(values, np.ndarray) else jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise TypeError(
            f"labels must be class indices, integers, got {values.dtype}: for class probabilities take "
            "rgd.jax.cross_entropy(inputs @ kernel, labels)"
        )
    if values.shape != shape:
        raise ValueError(
            f"labels must have the inputs' shape without the last axis, {shape}, got {values.shape}"
        )
    of_units = shape if per == "element" or segments is not None else shape[:1]
    mask = as_mask(where, shape)
    if segments is not None:
        mask, sample_weight = segments.mask(mask), segments.to_targets("sample_weight", sample_weight)
    measure = as_measure(sample_weight, of_units, dtype, reduction)
    if measure is not None:
        measure = jnp.broadcast_to(measure.reshape(measure.shape + (1,) * (len(shape) - measure.ndim)), shape)
    masked = masked_measure(mask, measure, dtype)
    takes_part = None if masked is None else masked != 0
    refuse_out_of_range(values, classes, ignore_index, takes_part)
    codes = encode(values, classes, ignore_index, takes_part)
    members = as_groups(groups, of_units) if segments is None else segments.groups(groups)
    if shift:
        codes = jnp.roll(codes, -1, axis=1).at[:, -1:].set(IGNORED)
        measure = None if measure is None else jnp.roll(measure, -1, axis=1)
        if members is not None and per == "element":
            members = jnp.roll(members, -1, axis=1)
    counted = codes != IGNORED
    if shift and segments is not None:
        counted &= segments.shifted().inside
        codes = jnp.where(counted, codes, IGNORED)
    measure = counted.astype(dtype) if measure is None else jnp.where(counted, measure, 0)
    return Rows(codes, measure, None, members)
