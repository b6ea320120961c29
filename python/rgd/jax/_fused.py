"""The Rust kernel of the cross-entropy as a differentiable function: a custom call on the CPU, jnp elsewhere.

Of a row of logits with loss `l` and weight `w = exp(scale * min(l, tau))` the kernel writes `l`, `w` and the
gradient of `norm * w * l` in one pass. The gradient takes the place of the logits where XLA may reuse their
memory.
"""

# The types of jax leave members partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.ffi
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from rgd import _rgd

TARGET = "rgd_cross_entropy"
IGNORED, OUT_OF_RANGE = -1, -2

Outputs = tuple[jax.Array, jax.Array, jax.Array]


def weighted_sum(
    logits: jax.Array,
    labels: jax.Array,
    *,
    tau: ArrayLike,
    scale: ArrayLike,
    norm: ArrayLike,
    smoothing: float,
) -> jax.Array:
    """`norm * sum_i sg(w_i) * l_i`, of which the gradient comes from the kernel.

    Args:
        logits: (..., C).
        labels: (...), int32; `IGNORED` for a target that counts for nothing, `OUT_OF_RANGE` for one that
            makes its row NaN.
        tau: Clipping factor.
        scale: Scaling factor.
        norm: What the sum is multiplied by.
        smoothing: Label smoothing.

    Returns:
        The sum, in the accumulator's dtype.
    """
    _register()
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    settings = jnp.stack([jnp.asarray(value, dtype) for value in (tau, scale, norm, smoothing)])
    settings = jnp.broadcast_to(lax.stop_gradient(settings), (*labels.shape, 4))
    return _weighted_sum(logits, labels, settings, lax.stop_gradient(jnp.asarray(norm, dtype)))


@functools.cache
def _register() -> None:
    # The backend first: a handler must not stand in the way of its start.
    jax.local_devices(backend="cpu")
    jax.ffi.register_ffi_target(TARGET, _rgd.xla_handler(), platform="cpu", api_version=1)


@jax.custom_jvp
def _weighted_sum(logits: jax.Array, labels: jax.Array, settings: jax.Array, norm: jax.Array) -> jax.Array:
    losses, weights, _ = _composed(logits, labels, settings)
    return norm * jnp.sum(weights * losses)


@_weighted_sum.defjvp
def _(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    losses, weights, gradient = _kernel(*primals[:3])
    value = primals[3] * jnp.sum(weights * losses)
    return value, jnp.sum(gradient.astype(value.dtype) * tangents[0].astype(value.dtype))


@jax.custom_jvp
def _kernel(logits: jax.Array, labels: jax.Array, settings: jax.Array) -> Outputs:
    """Losses, weights and the gradient of `norm * w * l`."""
    varying = tuple(_mapped_axes(logits) | _mapped_axes(labels) | _mapped_axes(settings))

    def rust(logits: jax.Array, labels: jax.Array, settings: jax.Array) -> Outputs:
        row = jax.ShapeDtypeStruct(labels.shape, settings.dtype)
        like_logits = jax.ShapeDtypeStruct(logits.shape, logits.dtype)
        call = jax.ffi.ffi_call(
            TARGET, (row, row, like_logits), vmap_method="broadcast_all", input_output_aliases={0: 2}
        )
        outputs: Any = call(logits, labels, settings)
        # JAX before 0.9 takes the outputs of a custom call for varying without being told.
        cast = varying and hasattr(lax, "pcast")
        return tuple(lax.pcast(x, varying, to="varying") if cast else x for x in outputs)

    return lax.platform_dependent(logits, labels, settings, cpu=rust, default=_composed)


@_kernel.defjvp
def _(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Outputs, Outputs]:
    logits, labels, settings = primals
    outputs = _kernel(logits, labels, settings)

    def of_logits(logits: jax.Array) -> Outputs:
        return _composed(logits, labels, settings)

    return outputs, jax.jvp(of_logits, (logits,), (tangents[0],))[1]


def _mapped_axes(array: jax.Array) -> frozenset[Any]:
    """The axes of `jax.shard_map` that an array varies over, by either of the names jax has had for them."""
    aval: Any = jax.typeof(array)
    if hasattr(aval, "vma"):
        return frozenset(aval.vma)
    return frozenset(getattr(getattr(aval, "manual_axis_type", None), "varying", ()))


def _composed(logits: jax.Array, labels: jax.Array, settings: jax.Array) -> Outputs:
    """What the kernel computes, in jnp."""
    tau, scale, norm, smoothing = (settings[..., k] for k in range(4))
    classes = logits.shape[-1]
    counted = labels != IGNORED
    index = jnp.clip(labels, 0, classes - 1)
    x = logits.astype(settings.dtype)
    largest = lax.stop_gradient(jnp.max(x, axis=-1))
    exponentials = jnp.exp(x - largest[..., None])
    total = jnp.sum(exponentials, axis=-1)
    own = jnp.take_along_axis(x, index[..., None], axis=-1, mode="promise_in_bounds")[..., 0]
    spread = jnp.where(smoothing > 0, -jnp.mean(x - largest[..., None], axis=-1), 0)
    losses = jnp.log(total) - (1 - smoothing) * (own - largest) + smoothing * spread
    losses = losses * jnp.where(labels == OUT_OF_RANGE, jnp.nan, 1).astype(x.dtype)
    losses = jnp.where(counted, losses, 0)
    clipped = jnp.minimum(losses, tau)
    weights = jnp.exp(jnp.where((scale == 0) & ~jnp.isnan(losses), 0, scale * clipped))
    weights = lax.stop_gradient(jnp.where(counted, weights, 0))
    factor = jnp.where(counted, norm * weights, 0)[..., None]
    mass = jnp.where(np.arange(classes) == labels[..., None], 1 - smoothing[..., None], 0)
    mass = mass + smoothing[..., None] / classes
    gradient = jnp.where(counted[..., None], factor * (exponentials / total[..., None] - mass), 0)
    return losses, weights, gradient.astype(logits.dtype)
