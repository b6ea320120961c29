"""The Rust kernel of the cross-entropy as a differentiable function: a custom call on the CPU, jnp elsewhere.

A row of logits has loss `l`, weight `w` and logsumexp `Z`. In one pass the kernel writes these and the
gradient of `a * (w * l + z * Z^2)`, with a factor `a` for each row. The gradient overwrites the logits if XLA
may reuse their memory.
"""

# Some types of jax are partly unknown to pyright.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.ffi
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from rgd import _rgd
from rgd.jax._devices import mapped_axes
from rgd.jax._inputs import Losses
from rgd.jax._rows import IGNORED, adjusted, index_losses, log_normalizers
from rgd.jax._targets import squared_normalizers
from rgd.jax._weights import as_constants, pointwise_weights, weighted_losses
from rgd.weightings import Weighting
from rgd.weightings._base import Kernel
from rgd.weightings._call import kernel_of
from rgd.weightings._fields import holds_everywhere

TARGET = "rgd_cross_entropy"


class Options(NamedTuple):
    """The options of a call that are fixed when it is traced.

    Attributes:
        kind: The kernel's name.
        smoothing: Label smoothing.
        has_z_loss: Whether the rows have a z-loss.
    """

    kind: str
    smoothing: float
    has_z_loss: bool


class Rows(NamedTuple):
    """The inputs of the kernel beside the logits.

    Attributes:
        codes: Class indices and codes, (...), as from `rgd.jax._rows.encode`.
        adjustment: The numbers added to the logits, (C,) in the accumulator's dtype, or (0,) for none.
        settings: For each row its factor `a`, label smoothing, the z-loss `z`, and the weighting's numbers:
            (..., 3 + k) in the accumulator's dtype.
        weighting: The pointwise weighting, whose formula replaces the kernel on other devices.
    """

    codes: jax.Array
    adjustment: jax.Array
    settings: jax.Array
    weighting: Weighting


class Results(NamedTuple):
    """The outputs of the kernel.

    Attributes:
        losses: The losses of the rows, (...).
        weights: Their weights, (...).
        gradient: The gradient of the sum of `a * (w * l + z * Z^2)`, of the logits' shape.
        normalizers: `Z`, (...), 0 for a row that does not count; None without a z-loss.
    """

    losses: jax.Array
    weights: jax.Array
    gradient: jax.Array
    normalizers: jax.Array | None


class _Sum(NamedTuple):
    """The inputs of the sum over the rows beside their losses: the measure or None, and factors, ()."""

    measure: jax.Array | None
    factor: jax.Array
    z_loss: jax.Array | None


def cross_entropy_sum(
    logits: jax.Array,
    codes: jax.Array,
    weighting: Weighting,
    *,
    measure: jax.Array | None,
    factor: ArrayLike,
    smoothing: float,
    adjustment: jax.Array | None,
    z_loss: jax.Array | None,
) -> jax.Array:
    """`factor * sum_i p_i * (sg(w_i) * l_i + z_loss * Z_i^2)`; the kernel computes its gradient.

    Args:
        logits: (..., C).
        codes: Class indices and codes, (...), as from `rgd.jax._rows.encode`.
        weighting: A pointwise weighting that has a kernel.
        measure: The measure `p`, (...), or None for ones.
        factor: The factor of the sum, ().
        smoothing: Label smoothing.
        adjustment: The numbers added to the logits, (C,), or None.
        z_loss: (), or None.

    Returns:
        The sum, in the accumulator's dtype.
    """
    register()
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    weighting = as_constants(weighting, dtype)
    kind, numbers = cast("Kernel", kernel_of(weighting))
    factor = jnp.asarray(factor, dtype)
    allowed = holds_everywhere(weighting)
    if allowed is not True:
        factor = jnp.where(allowed, factor, jnp.nan)
    row_factor = factor if measure is None else factor * measure
    columns = row_settings(row_factor, smoothing, z_loss, *numbers, shape=codes.shape, dtype=dtype)
    rows = Rows(codes, adjustment_or_nothing(adjustment, dtype), columns, weighting)
    constants = lax.stop_gradient((rows, _Sum(measure, factor, z_loss)))
    return _cross_entropy_sum(Options(kind, smoothing, z_loss is not None), logits, *constants)


def row_settings(
    factor: ArrayLike,
    smoothing: ArrayLike,
    z_loss: jax.Array | None,
    *numbers: ArrayLike,
    shape: tuple[int, ...],
    dtype: Any,
) -> jax.Array:
    """The `settings` of rows of this shape: each a number for all rows, or one for each."""
    columns = factor, smoothing, 0.0 if z_loss is None else z_loss, *numbers
    return jnp.stack([jnp.broadcast_to(jnp.asarray(x, dtype), shape) for x in columns], axis=-1)


def adjustment_or_nothing(adjustment: jax.Array | None, dtype: Any) -> jax.Array:
    """The adjustment as the kernel reads it: an array without entries if there is none."""
    return jnp.zeros(0, dtype) if adjustment is None else adjustment.astype(dtype)


@functools.cache
def register() -> None:
    """Make the kernel known to XLA, once."""
    # Start XLA's CPU client first: it must not find our handler when it starts.
    jax.local_devices(backend="cpu")
    jax.ffi.register_ffi_target(TARGET, _rgd.xla_handler(), platform="cpu", api_version=1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _cross_entropy_sum(options: Options, logits: jax.Array, rows: Rows, of: _Sum) -> jax.Array:
    return _total(_in_jnp(options, logits, rows), of)


@_cross_entropy_sum.defjvp
def _(options: Options, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    logits, rows, of = primals
    results = native(options, logits, rows)
    value = _total(results, of)
    return value, jnp.sum(results.gradient.astype(value.dtype) * tangents[0].astype(value.dtype))


def _total(results: Results, of: _Sum) -> jax.Array:
    losses = Losses(results.losses, of.measure)
    terms = weighted_losses(results.weights, losses)
    if of.z_loss is not None and results.normalizers is not None:
        terms = terms + squared_normalizers(losses, of.z_loss, results.normalizers)
    return of.factor * jnp.sum(terms)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def native(options: Options, logits: jax.Array, rows: Rows) -> Results:
    """Losses, weights and gradient of the rows, from the Rust kernel on the CPU."""
    varying = tuple(mapped_axes((logits, rows[:3])))

    def on_cpu(logits: jax.Array, rows: Rows) -> Results:
        row = jax.ShapeDtypeStruct(rows.codes.shape, rows.settings.dtype)
        like_logits = jax.ShapeDtypeStruct(logits.shape, logits.dtype)
        unwanted = jax.ShapeDtypeStruct((0,), rows.settings.dtype)
        results = (row, row, like_logits, row if options.has_z_loss else unwanted)
        call = jax.ffi.ffi_call(TARGET, results, vmap_method="broadcast_all", input_output_aliases={0: 2})
        outputs: Any = call(logits, rows.codes, rows.settings, rows.adjustment, kind=options.kind)
        # JAX before 0.9 treats the outputs of a custom call as varying by itself.
        cast_needed = varying and hasattr(lax, "pcast")
        outputs = [lax.pcast(x, varying, to="varying") if cast_needed else x for x in outputs]
        losses, weights, gradient, normalizers = outputs
        counted = jnp.where(rows.codes == IGNORED, 0, normalizers) if options.has_z_loss else None
        return Results(losses, weights, gradient, counted)

    return lax.platform_dependent(logits, rows, cpu=on_cpu, default=functools.partial(_in_jnp, options))


@native.defjvp
def _(options: Options, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Results, Results]:
    logits, rows = primals

    def of_logits(logits: jax.Array) -> Results:
        return _in_jnp(options, logits, rows)

    return native(options, logits, rows), jax.jvp(of_logits, (logits,), (tangents[0],))[1]


def _in_jnp(options: Options, logits: jax.Array, rows: Rows) -> Results:
    """The outputs of the kernel, computed in `jax.numpy` by the weighting's formula."""
    codes, dtype = rows.codes, rows.settings.dtype
    adjustment = rows.adjustment if rows.adjustment.size else None

    def of_logits(logits: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        logits = adjusted(logits, adjustment)
        normalizers = log_normalizers(logits, codes != IGNORED) if options.has_z_loss else None
        return index_losses(logits, codes, None, options.smoothing), normalizers

    (losses, normalizers), gradient_of = jax.vjp(of_logits, logits)
    known = Losses(lax.stop_gradient(losses), None)
    weights = pointwise_weights(known, as_constants(rows.weighting, dtype))
    weights = lax.stop_gradient(jnp.where(codes == IGNORED, 0, weights.astype(dtype)))
    dropped = (weights == 0) & ~jnp.isnan(losses)
    row_factor, z_loss = rows.settings[..., 0], rows.settings[..., 2]
    factor = jnp.where(dropped, 0, row_factor * weights)
    of_normalizers = None if normalizers is None else 2 * row_factor * z_loss * normalizers
    return Results(losses, weights, gradient_of((factor, of_normalizers))[0], normalizers)
