"""The objective of a linear layer and the losses of its rows, and how each is differentiated.

`weighted_total` knows the weight of a loss inside its chunk, and computes the gradients in the forward pass:
three matrix products. `token_losses` gets the factor of each loss from above: its forward pass computes
losses, its backward pass the logits again, and then the gradients: four products.
"""

# The types of jax leave members partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rgd.jax._devices import mapped_axes, psum, vary
from rgd.jax._rows import IGNORED
from rgd.jax.linear._chunks import Above, gradient_pass, losses_pass, one_pass
from rgd.jax.linear._problem import Constants, Operands, Settings


def weighted_total(settings: Settings, operands: Operands, constants: Constants) -> jax.Array:
    """`sum_i p_i * (sg(w_i) * l_i + z_loss * Z_i^2)`, (), for a pointwise weighting.

    Its gradients come in the same pass.
    """
    return _over_devices(_weighted_total, settings, operands, constants)


def token_losses(
    settings: Settings, operands: Operands, constants: Constants
) -> tuple[jax.Array, jax.Array | None]:
    """The loss of each row, (N,), in the accumulator's dtype, and with a z-loss its logsumexp, (N,).

    Both are 0 where a row does not count.
    """
    return _over_devices(_token_losses, settings, operands, constants)


def _over_devices(
    compute: Callable[..., Any], settings: Settings, operands: Operands, constants: Constants
) -> Any:
    axes = mapped_axes((operands, constants))
    # Cast before the derivative is taken: the transpose of the cast sums the gradient of what was replicated.
    result = compute(settings, vary(operands, axes), lax.stop_gradient(vary(constants, axes)))
    return jax.tree_util.tree_map(functools.partial(psum, axis_name=settings.vocab_axis), result)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_total(settings: Settings, operands: Operands, constants: Constants) -> jax.Array:
    return _compiled(one_pass, settings, Operands(None, None, None), operands, constants)[0]


def _weighted_total_forward(
    settings: Settings, operands: Operands, constants: Constants
) -> tuple[jax.Array, Any]:
    wanted, operands, constants = _unwrapped(operands, constants)
    value, gradients = _value_and_gradients(settings, wanted, operands, constants)
    any_counts = jnp.any(constants.rows.codes != IGNORED)
    return value, (gradients, _no_entries(operands), any_counts)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _value_and_gradients(
    settings: Settings, wanted: Operands, operands: Operands, constants: Constants
) -> tuple[jax.Array, Operands]:
    """One pass, of which the derivative is that of `jax.numpy`, whatever computes the pass itself."""
    return _compiled(one_pass, settings, wanted, operands, constants)


@_value_and_gradients.defjvp
def _(
    settings: Settings, wanted: Operands, primals: tuple[Operands, Constants], tangents: tuple[Any, Any]
) -> tuple[Any, Any]:
    operands, constants = primals

    def of_operands(operands: Operands) -> Any:
        return _compiled(one_pass, settings._replace(native=None), wanted, operands, constants)

    tangent = jax.jvp(of_operands, (operands,), (tangents[0],))[1]
    return _value_and_gradients(settings, wanted, *primals), tangent


def _weighted_total_backward(settings: Settings, residuals: Any, cotangent: Any) -> tuple[Any, None]:
    del settings
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None
    gradients, like, any_counts = residuals
    # Where no row counts, "mean" divides by 0, and infinity times a gradient of 0 is NaN.
    cotangent = jnp.where(any_counts, cotangent, 0)
    return Operands(
        *(
            None if g is None else (cotangent * g).astype(x.dtype)
            for g, x in zip(gradients, like, strict=True)
        )
    ), None


_weighted_total.defvjp(_weighted_total_forward, _weighted_total_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_losses(
    settings: Settings, operands: Operands, constants: Constants
) -> tuple[jax.Array, jax.Array | None]:
    return _compiled(losses_pass, settings, None, operands, constants)[:2]


def _token_losses_forward(settings: Settings, operands: Operands, constants: Constants) -> tuple[Any, Any]:
    wanted, operands, constants = _unwrapped(operands, constants)
    losses, logs, normalizer = _compiled(losses_pass, settings, None, operands, constants)
    return (losses, logs), (wanted, operands, constants, normalizer)


def _token_losses_backward(settings: Settings, residuals: Any, cotangents: Any) -> tuple[Any, None]:
    wanted, operands, constants, normalizer = residuals
    if all(x is None or isinstance(x, jax.custom_derivatives.SymbolicZero) for x in cotangents):
        return None, None
    of_losses, of_logs = map(_instantiated, cotangents)
    above = Above(normalizer, of_losses, of_logs)
    gradients = _compiled(gradient_pass, settings, wanted, operands, constants, above)
    return Operands(
        *(None if g is None else g.astype(x.dtype) for g, x in zip(gradients, operands, strict=True))
    ), None


_token_losses.defvjp(_token_losses_forward, _token_losses_backward, symbolic_zeros=True)


def _unwrapped(operands: Operands, constants: Constants) -> tuple[Operands, Operands, Constants]:
    """Of which operands a gradient is wanted, as () or None, which a residual may hold; and the values."""
    wanted = Operands(*(None if x is None or not x.perturbed else () for x in operands))

    def value(leaf: Any) -> Any:
        return leaf.value

    return wanted, *jax.tree_util.tree_map(value, (operands, constants))


def _instantiated(cotangent: Any) -> Any:
    """The cotangent, as an array where it is known to be 0."""
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        shape: Any = cotangent
        return jnp.zeros(shape.shape, shape.dtype)
    return cotangent


def _no_entries(operands: Operands) -> Operands:
    """Arrays of no elements that remember the dtypes."""
    return Operands(*(None if x is None else jnp.zeros((0,), x.dtype) for x in operands))


def _compiled(
    function: Callable[..., Any], settings: Settings, wanted: Operands | None, *arguments: Any
) -> Any:
    """The function under `jax.jit`: called outside of any, its loop is then compiled once."""
    try:
        hash(settings)
    except TypeError:  # a setting of the user's that cannot be a key of jax.jit's cache
        return function(settings, wanted, *arguments)
    return compiled_once(function, settings, wanted, *arguments)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def compiled_once(
    function: Callable[..., Any], settings: Settings, wanted: Operands | None, *arguments: Any
) -> Any:
    """`function(settings, wanted, *arguments)`, compiled once for each of the settings and shapes."""
    return function(settings, wanted, *arguments)
