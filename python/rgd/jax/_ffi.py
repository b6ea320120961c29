"""The Rust kernel of the cross-entropy as a differentiable function: a custom call on the CPU, jnp elsewhere.

Of a row of logits with loss `l` and weight `w` the kernel writes `l`, `w` and the gradient of `norm * w * l`
in one pass. The gradient takes the place of the logits where XLA may reuse their memory.
"""

# The types of jax leave members partly unknown.
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
from rgd.jax._batch import Losses, as_constants, mapped_axes, pointwise_weights, weighted
from rgd.jax._rows import IGNORED, adjusted, index_losses
from rgd.weightings import Weighting
from rgd.weightings._base import Kernel
from rgd.weightings._call import kernel_of
from rgd.weightings._fields import holds_everywhere

TARGET = "rgd_cross_entropy"

Outputs = tuple[jax.Array, jax.Array, jax.Array]


class Options(NamedTuple):
    """What is fixed when a call is traced: the kernel's name, and label smoothing."""

    kind: str
    smoothing: float


def weighted_sum(
    logits: jax.Array,
    codes: jax.Array,
    weighting: Weighting,
    *,
    mass: jax.Array | None,
    norm: ArrayLike,
    smoothing: float,
    adjustment: jax.Array | None,
) -> jax.Array:
    """`norm * sum_i p_i * sg(w_i) * l_i`, of which the gradient comes from the kernel.

    Args:
        logits: (..., C).
        codes: Class indices and codes, (...), as from `rgd.jax._rows.encode`.
        weighting: A pointwise weighting that has a kernel.
        mass: The base measure `p`, (...), or None for ones.
        norm: What the sum is multiplied by, ().
        smoothing: Label smoothing.
        adjustment: What is added to the logits, (C,), or None for nothing.

    Returns:
        The sum, in the accumulator's dtype.
    """
    register()
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    weighting = as_constants(weighting, dtype)
    kind, numbers = cast("Kernel", kernel_of(weighting))
    norm = jnp.asarray(norm, dtype)
    allowed = holds_everywhere(weighting)
    if allowed is not True:
        norm = jnp.where(allowed, norm, jnp.nan)
    row_norm = norm if mass is None else norm * mass
    of_row = (row_norm, smoothing, 0.0, *numbers)  # 0: no z-loss
    settings = [jnp.broadcast_to(jnp.asarray(x, dtype), codes.shape) for x in of_row]
    added = jnp.zeros(0, dtype) if adjustment is None else adjustment.astype(dtype)
    constants = lax.stop_gradient((added, jnp.stack(settings, axis=-1), mass, norm, weighting))
    return _weighted_sum(Options(kind, smoothing), logits, codes, *constants)


@functools.cache
def register() -> None:
    """Make the kernel known to XLA, once."""
    # XLA's CPU client is started first: it must not find a handler of ours at its start.
    jax.local_devices(backend="cpu")
    jax.ffi.register_ffi_target(TARGET, _rgd.xla_handler(), platform="cpu", api_version=1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _weighted_sum(  # noqa: PLR0917 - a custom derivative takes its arguments by position
    options: Options,
    logits: jax.Array,
    codes: jax.Array,
    added: jax.Array,
    settings: jax.Array,
    mass: jax.Array | None,
    norm: jax.Array,
    weighting: Weighting,
) -> jax.Array:
    losses, weights, _ = _in_jnp(options, logits, codes, added, settings, weighting)
    return _total(losses, weights, mass, norm)


@_weighted_sum.defjvp
def _(options: Options, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    logits, codes, added, settings, mass, norm, weighting = primals
    losses, weights, gradient = kernel(options, logits, codes, added, settings, weighting)
    value = _total(losses, weights, mass, norm)
    return value, jnp.sum(gradient.astype(value.dtype) * tangents[0].astype(value.dtype))


def _total(losses: jax.Array, weights: jax.Array, mass: jax.Array | None, norm: jax.Array) -> jax.Array:
    return norm * jnp.sum(weighted(weights, Losses(losses, mass, None, (), None)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def kernel(  # noqa: PLR0917
    options: Options,
    logits: jax.Array,
    codes: jax.Array,
    added: jax.Array,
    settings: jax.Array,
    weighting: Weighting,
) -> Outputs:
    """Losses, weights and the gradient of `norm * p * w * l`."""
    varying = tuple(frozenset[Any]().union(*map(mapped_axes, (logits, codes, added, settings))))

    def rust(
        logits: jax.Array, codes: jax.Array, added: jax.Array, settings: jax.Array, weighting: Weighting
    ) -> Outputs:
        del weighting
        row = jax.ShapeDtypeStruct(codes.shape, settings.dtype)
        like_logits = jax.ShapeDtypeStruct(logits.shape, logits.dtype)
        logsumexp = jax.ShapeDtypeStruct((0,), settings.dtype)  # not wanted
        results = (row, row, like_logits, logsumexp)
        call = jax.ffi.ffi_call(TARGET, results, vmap_method="broadcast_all", input_output_aliases={0: 2})
        outputs: Any = call(logits, codes, settings, added, kind=options.kind)[:3]
        # JAX before 0.9 takes the outputs of a custom call for varying without being told.
        cast_needed = varying and hasattr(lax, "pcast")
        return tuple(lax.pcast(x, varying, to="varying") if cast_needed else x for x in outputs)

    default = functools.partial(_in_jnp, options)
    return lax.platform_dependent(logits, codes, added, settings, weighting, cpu=rust, default=default)


@kernel.defjvp
def _(options: Options, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Outputs, Outputs]:
    logits, codes, added, settings, weighting = primals
    outputs = kernel(options, logits, codes, added, settings, weighting)

    def of_logits(logits: jax.Array) -> Outputs:
        return _in_jnp(options, logits, codes, added, settings, weighting)

    return outputs, jax.jvp(of_logits, (logits,), (tangents[0],))[1]


def _in_jnp(  # noqa: PLR0917
    options: Options,
    logits: jax.Array,
    codes: jax.Array,
    added: jax.Array,
    settings: jax.Array,
    weighting: Weighting,
) -> Outputs:
    """What the kernel computes, from the weighting's own formula."""

    def losses_of(logits: jax.Array) -> jax.Array:
        return index_losses(adjusted(logits, added if added.size else None), codes, None, options.smoothing)

    losses, gradient_of = jax.vjp(losses_of, logits)
    weights = pointwise_weights(lax.stop_gradient(losses), as_constants(weighting, settings.dtype))
    weights = lax.stop_gradient(jnp.where(codes == IGNORED, 0, weights.astype(settings.dtype)))
    dropped = (weights == 0) & ~jnp.isnan(losses)
    factor = jnp.where(dropped, 0, settings[..., 0] * weights)
    return losses, weights, gradient_of(factor)[0]
