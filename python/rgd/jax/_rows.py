"""The cross-entropy of each row of logits, for class indices or class probabilities.

Ignored class indices and those out of range are encoded once, as `IGNORED` and `OUT_OF_RANGE`. `jax.numpy`
and the Rust kernel read the same codes.
"""

# Some types of jax are partly unknown to pyright.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rgd.jax._inputs import comparable

IGNORED, OUT_OF_RANGE = -1, -2
"""Codes that replace a class index, as the kernel reads them."""


def encode(
    labels: jax.Array | np.ndarray, classes: int, ignore_index: int, takes_part: jax.Array | None
) -> jax.Array:
    """The class index of each row as int32, or one of the codes.

    Args:
        labels: Class indices, integers.
        classes: The number of classes.
        ignore_index: The class index of rows that do not count.
        takes_part: Which rows count, of the labels' shape; None for all.
    """
    # JAX without 64-bit numbers would truncate those of NumPy before the comparison.
    xp: Any = np if isinstance(labels, np.ndarray) else jnp
    given = comparable(labels)
    inside = (given >= 0) & (given < classes)
    codes = xp.where(inside, given.astype(np.int32), OUT_OF_RANGE)
    limits = jnp.iinfo(given.dtype)
    if limits.min <= ignore_index <= limits.max:
        codes = xp.where(given == ignore_index, IGNORED, codes)
    return jnp.asarray(codes, jnp.int32) if takes_part is None else jnp.where(takes_part, codes, IGNORED)


def adjusted(logits: jax.Array, adjustment: jax.Array | None) -> jax.Array:
    """Logits plus the adjustment of each class, in the accumulator's dtype; unchanged without adjustment."""
    if adjustment is None:
        return logits
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) + adjustment


def index_losses(
    logits: jax.Array, codes: jax.Array, class_weight: jax.Array | None, smoothing: float
) -> jax.Array:
    """The loss of each row, float32 at least: 0 for `IGNORED`, NaN for `OUT_OF_RANGE`; differentiable.

    Args:
        logits: (..., C).
        codes: As from `encode`, (...).
        class_weight: (C,), or None for ones.
        smoothing: Label smoothing.
    """
    counted, index = codes != IGNORED, jnp.maximum(codes, 0)
    logits, shifted, log_sum = _shifted(logits, counted)
    own = 1 - smoothing if class_weight is None else (1 - smoothing) * class_weight[index]
    losses = log_sum - unless_massless(at_label(shifted, index), own)
    if class_weight is not None or smoothing > 0:
        losses = own * losses
    if smoothing > 0:
        classes = logits.shape[-1]
        ones, mass = (1, classes) if class_weight is None else (class_weight, jnp.sum(class_weight))
        over_all = log_sum * mass - jnp.sum(ones * unless_massless(shifted, ones), axis=-1)
        losses = losses + smoothing / classes * over_all
    losses = losses * jnp.where(codes == OUT_OF_RANGE, jnp.nan, 1).astype(losses.dtype)
    return jnp.where(counted, losses, 0)


def probability_losses(
    logits: jax.Array,
    probabilities: jax.Array,
    class_weight: jax.Array | None,
    smoothing: float,
    counted: jax.Array | None,
) -> jax.Array:
    """The loss of each row for class probabilities (..., C); 0 where `counted` is False."""
    logits, shifted, log_sum = _shifted(logits, counted)
    smoothed = probabilities.astype(logits.dtype) * (1 - smoothing) + smoothing / logits.shape[-1]
    smoothed = smoothed if class_weight is None else smoothed * class_weight
    shifted = unless_massless(shifted, smoothed)
    losses = -jnp.sum(smoothed * (shifted - log_sum[..., None]), axis=-1)
    return losses if counted is None else jnp.where(counted, losses, 0)


@jax.custom_jvp
def at_label(values: jax.Array, index: jax.Array) -> jax.Array:
    """The entry of each row at its label; differentiable.

    XLA does not fuse the computation of the values into a gather. The gather's transpose is a scatter, which
    no GPU fuses. So on a GPU the entry is a sum over the row, and its derivative is one on every device.

    Args:
        values: (..., C).
        index: Classes, (...), integers.
    """
    return lax.platform_dependent(values, index, cpu=_gathered, default=_summed)


def _gathered(values: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, index[..., None], axis=-1, mode="promise_in_bounds")[..., 0]


def _summed(values: jax.Array, index: jax.Array) -> jax.Array:
    classes = lax.broadcasted_iota(index.dtype, values.shape, values.ndim - 1)
    return jnp.sum(jnp.where(classes == index[..., None], values, 0), axis=-1)


@at_label.defjvp
def _(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    return at_label(*primals), _summed(tangents[0], primals[1])


def log_normalizers(logits: jax.Array, counted: jax.Array | None) -> jax.Array:
    """The logsumexp of each row, float32 at least; 0 where `counted` is False; differentiable."""
    logits, _, log_sum = _shifted(logits, counted)
    normalizers = lax.stop_gradient(jnp.max(logits, axis=-1)) + log_sum
    return normalizers if counted is None else jnp.where(counted, normalizers, 0)


def unless_massless(values: jax.Array, mass: jax.Array | float) -> jax.Array:
    """The logits, with 0 instead of -inf if the target has no mass there: 0 times -inf counts as 0."""
    if isinstance(mass, (int, float)) and mass != 0:
        return values
    return jnp.where((mass == 0) & jnp.isneginf(values), 0, values)


def _shifted(logits: jax.Array, counted: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits in the accumulator's dtype, the same minus the largest of their row, and their logsumexp."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if counted is not None:
        logits = _gradient_where(logits, counted)
    shifted = logits - lax.stop_gradient(jnp.max(logits, axis=-1))[..., None]
    return logits, shifted, jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))


@jax.custom_jvp
def _gradient_where(logits: jax.Array, counted: jax.Array) -> jax.Array:
    """`logits`, where a row that does not count has gradient 0, even if it holds NaN."""
    del counted
    return logits


@_gradient_where.defjvp
def _(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    logits, counted = primals
    return logits, jnp.where(counted[..., None], tangents[0], 0)
