"""The parts that the cross-entropy of logits and that of a linear layer share: options, targets, weights."""

# Some types of jax are partly unknown to pyright.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from rgd import _rgd
from rgd.jax._inputs import Losses, an_array, comparable, is_known
from rgd.jax._segments import Segments
from rgd.jax._weights import weights_of
from rgd.weightings import Weighting
from rgd.weightings._call import kernel_of

Reduction: TypeAlias = Literal["none", "mean", "sum"]
Per: TypeAlias = Literal["element", "sample"]
Backend: TypeAlias = Literal["jnp", "rust"]


def check_options(reduction: Any, per: Any, label_smoothing: float, backend: Any) -> None:
    """Raise for an unknown value of an option."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if per not in ("element", "sample"):
        raise ValueError(f"per must be 'element' or 'sample', got {per!r}")
    if backend not in (None, "jnp", "rust"):
        raise ValueError(f"backend must be 'jnp', 'rust' or None, got {backend!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")


def as_class_weight(weight: ArrayLike | None, classes: int, dtype: Any) -> jax.Array | None:
    """Class weights, checked, as constants."""
    if weight is None:
        return None
    if isinstance(weight, Weighting):
        raise TypeError(f"weight takes class weights, got {weight!r}: name it weighting={weight!r}")
    return by_class("weight", weight, classes, dtype)


def by_class(name: str, given: ArrayLike | None, classes: int, dtype: Any) -> jax.Array | None:
    """One number a class, checked, as constants of a dtype."""
    if given is None:
        return None
    array = jnp.asarray(an_array(name, given))
    if array.shape != (classes,):
        raise ValueError(f"{name} must have one entry a class, shape {(classes,)}, got {array.shape}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be floating, got {array.dtype}: convert it with {name}.astype(jnp.float32)"
        )
    return lax.stop_gradient(array.astype(dtype))


def as_z_loss(z_loss: Any, dtype: Any) -> jax.Array | None:
    """`z_loss`, checked, a constant, (); None for 0; NaN where a traced number is not allowed."""
    given: Any = an_array("z_loss", z_loss)
    numeric = isinstance(given, (int, float, np.number, np.ndarray, jax.Array)) and jnp.ndim(given) == 0
    kind: Any = jnp.result_type(given) if numeric else None
    if isinstance(given, bool) or not numeric or not jnp.issubdtype(kind, jnp.number) or kind.kind == "c":
        raise TypeError(f"z_loss must be a number >= 0, such as 1e-4, got {z_loss!r}")
    if is_known(given):
        if not 0 <= float(given) < math.inf:
            raise ValueError(f"z_loss must be a finite number >= 0, got {float(given)}")
        return jnp.asarray(given, dtype) if float(given) else None
    factor = lax.stop_gradient(jnp.asarray(given, dtype))
    return jnp.where((factor >= 0) & (factor < jnp.inf), factor, jnp.nan)


def as_normalizer(normalizer: Any, reduction: Reduction, dtype: Any) -> jax.Array | None:
    """`normalizer`, checked, a constant, (); None for None; NaN where a traced number is not allowed."""
    if normalizer is None:
        return None
    if reduction != "mean":
        raise ValueError(
            f"normalizer is what reduction='mean' divides by, and reduction={reduction!r} divides by "
            "nothing: leave normalizer out"
        )
    given: Any = an_array("normalizer", normalizer)
    numeric = isinstance(given, (int, float, np.number, np.ndarray, jax.Array)) and jnp.ndim(given) == 0
    kind: Any = jnp.result_type(given) if numeric else None
    if isinstance(given, bool) or not numeric or not jnp.issubdtype(kind, jnp.number) or kind.kind == "c":
        raise TypeError(f"normalizer must be a positive number or an array of shape (), got {normalizer!r}")
    if is_known(given) and not 0 < float(given) < math.inf:
        raise ValueError(
            f"normalizer must be a positive number, got {float(given)}: how many targets count, or the sum "
            "of their sample weights, over all micro-batches of a step"
        )
    number = lax.stop_gradient(jnp.asarray(given, dtype))
    return jnp.where((number > 0) & (number < jnp.inf), number, jnp.nan)


def squared_normalizers(losses: Losses, z_loss: jax.Array, normalizers: jax.Array) -> jax.Array:
    """`p_i * z_loss * Z_i^2`, which is not weighted."""
    squares = z_loss * normalizers**2
    return squares if losses.measure is None else jnp.where(losses.measure != 0, losses.measure * squares, 0)


def refuse_out_of_range(
    labels: jax.Array | np.ndarray, classes: int, ignore_index: int, takes_part: jax.Array | None
) -> None:
    """Raise for a class index out of range, if its value is known."""
    if not is_known(labels) or not is_known(takes_part):
        return
    known = comparable(np.asarray(labels))
    outside = (known != ignore_index) & ((known < 0) | (known >= classes))
    if takes_part is not None:
        outside &= np.asarray(takes_part)
    if outside.any():
        position = tuple(int(i) for i in np.argwhere(outside)[0])
        raise IndexError(_rgd.label_out_of_range(int(known[position]), position, classes))


def target_weights(
    losses: Losses, weighting: Weighting, per: Per, state: Any, segments: Segments | None = None
) -> tuple[jax.Array, Any]:
    """The weights of the targets, which broadcast to the losses, and the state after the batch."""
    if segments is not None:
        return segments.weigh(losses, weighting, state)
    values, measure = losses.values, losses.measure
    if values.ndim == 0:
        beside = measure, losses.groups, losses.reference, losses.entropy
        one = [None if x is None else x[None] for x in beside]
        batch = losses._replace(
            values=values[None],
            measure=one[0],
            groups=one[1],
            axes=(0,),
            reference=one[2],
            entropy=one[3],
        )
        weights, new = weights_of(batch, weighting, state)
        return weights[0], new
    if per == "element":
        return weights_of(losses._replace(axes=tuple(range(values.ndim))), weighting, state)
    rest = tuple(range(1, values.ndim))
    takes_part = losses.full_measure != 0
    counted = takes_part.astype(values.dtype)
    number = jnp.maximum(jnp.sum(counted, axis=rest), 1)
    means = jnp.sum(values, axis=rest) / number
    reference, entropy = (
        None if one is None else jnp.sum(jnp.where(takes_part, one, 0), axis=rest) / number
        for one in (losses.reference, losses.entropy)
    )
    # The targets of a sample that count have the same measure.
    measure = None if measure is None else jnp.max(measure, axis=rest, initial=0)
    batch = losses._replace(values=means, measure=measure, axes=(0,), reference=reference, entropy=entropy)
    weights, new = weights_of(batch, weighting, state)
    weights = jnp.expand_dims(weights, rest)
    return jnp.where(takes_part, weights, 0), new


def mean_of(total: jax.Array, denominator: jax.Array) -> jax.Array:
    """The quotient; NaN if the measure is 0, for any total, as in `torch.nn.CrossEntropyLoss`."""
    return total / jnp.where(denominator == 0, jnp.nan, denominator)


def native_refusal(
    weighting: Weighting, *, class_weight: jax.Array | None, reduction: Reduction, per: Per
) -> str:
    """The reason why the Rust kernel cannot serve a call, apart from its logits; empty if it can."""
    if not weighting.pointwise:
        return f"{weighting}, whose weights depend on the whole batch"
    if kernel_of(weighting) is None:
        return f"{weighting}, which has no kernel"
    if class_weight is not None:
        return "class weights"
    if reduction == "none" or per == "sample":
        return f"reduction={reduction!r} with per={per!r}"
    return ""


def takes_native(backend: Backend | None, refusal: str, shape: tuple[int, ...]) -> bool:
    """Whether the Rust kernel computes logits of this shape.

    Raises:
        ValueError: If the caller chose it and it cannot serve the call.
    """
    if backend == "rust" and refusal:
        raise ValueError(f"backend='rust' cannot serve {refusal}: leave backend out")
    return backend == "rust" or (backend is None and not refusal and _native_is_faster(shape))


def _native_is_faster(shape: tuple[int, ...]) -> bool:
    """Whether the kernel is the default for logits of this size, from facts that are known when tracing.

    The number of cores does not matter, so that a program gives the same numbers, and compiles to the same
    code, on every host. XLA does not split a custom call over devices: with more than one device, sharded
    logits would be gathered. From about a hundred classes on, the kernel takes 0.4 to 0.9 of jnp's time. With
    few classes or small logits it takes as long (`benches/jax_cross_entropy.py`, on two cores).
    """
    here = jax.default_backend() == "cpu" and jax.device_count() == 1
    return here and shape[-1] >= 100 and math.prod(shape) >= 1 << 13
