"""The objective of a linear layer and the losses of its rows, and how each is differentiated.

`weighted_total` knows the weight of a loss inside its chunk, and computes the gradients in the forward pass:
three matrix products. `token_losses` gets the factor of each loss from above: its forward pass computes
losses, its backward pass the logits again, and then the gradients: four products. Forward mode takes as many:
the tangent is the gradients times the tangents of the operands, or comes from a second pass.
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
from rgd.jax._extras import Extras
from rgd.jax._linear_map import linear_map
from rgd.jax._rows import IGNORED
from rgd.jax.linear._chunks import (
    Above,
    Along,
    counted_inputs,
    gradient_pass,
    losses_pass,
    one_pass,
    tangents_pass,
)
from rgd.jax.linear._problem import Constants, Operands, Settings


def weighted_total(settings: Settings, operands: Operands, constants: Constants) -> tuple[jax.Array, Extras]:
    """`sum_i p_i * (sg(w_i) * l_i + z_loss * Z_i^2)`, (), for a pointwise weighting; and the extras, (N,).

    Its gradients come in the same pass.
    """
    return _over_devices(_weighted_total, settings, operands, constants)


def token_losses(
    settings: Settings, operands: Operands, constants: Constants
) -> tuple[jax.Array, jax.Array | None, Extras]:
    """The loss of each row, (N,), in the accumulator's dtype, with a z-loss its logsumexp, and the extras.

    All are 0 where a row does not count.
    """
    return _over_devices(_token_losses, settings, operands, constants)


def _over_devices(
    compute: Callable[..., Any], settings: Settings, operands: Operands, constants: Constants
) -> Any:
    axes = mapped_axes((operands, constants))
    # Cast before the derivative is taken: the transpose of the cast sums the gradient of what was replicated.
    result = compute(settings, vary(operands, axes), lax.stop_gradient(vary(constants, axes)))
    return jax.tree_util.tree_map(functools.partial(psum, axis_name=settings.vocab_axis), result)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _weighted_total(settings: Settings, operands: Operands, constants: Constants) -> tuple[jax.Array, Extras]:
    return _compiled(one_pass, settings, Operands(None, None, None), operands, constants)[0]


@functools.partial(_weighted_total.defjvp, symbolic_zeros=True)
def _(
    settings: Settings, primals: tuple[Operands, Constants], tangents: tuple[Operands, Any]
) -> tuple[Any, Any]:
    moves = _nonzero(tangents[0])
    (value, extras), gradients = _value_and_gradients(settings, _wanted(moves), *primals)
    known = gradients, primals[1].rows.codes
    tangent = linear_map(_along_gradients, _times_gradients, known, moves)
    return (value, extras), (tangent, _still(extras))


def _still(extras: Extras) -> Extras:
    """The tangents of extras, which are constants."""
    # JAX 0.6 forgets over which mapped axes an array varies.
    return {name: vary(jnp.zeros_like(one), mapped_axes(one)) for name, one in extras.items()}


@jax.jit
def _along_gradients(known: tuple[Operands, jax.Array], moves: Operands) -> jax.Array:
    gradients, codes = known
    moves = moves._replace(inputs=counted_inputs(moves.inputs, codes))

    def product(gradient: jax.Array, move: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(move.dtype, jnp.float32)
        return jnp.sum(gradient * move.astype(dtype)).astype(dtype)

    products = jax.tree_util.tree_map(product, gradients, moves)
    return jnp.where(_any_counts(codes), sum(jax.tree_util.tree_leaves(products)), 0)


def _times_gradients(known: tuple[Operands, jax.Array], cotangent: jax.Array) -> Operands:
    gradients, codes = known
    cotangent = jnp.where(_any_counts(codes), cotangent, 0)
    return Operands(*(None if gradient is None else cotangent * gradient for gradient in gradients))


def _any_counts(codes: jax.Array) -> jax.Array:
    """Where no row counts, "mean" divides by 0, and infinity times a gradient of 0 is NaN."""
    return jnp.any(codes != IGNORED)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _value_and_gradients(
    settings: Settings, wanted: Operands, operands: Operands, constants: Constants
) -> tuple[tuple[jax.Array, Extras], Operands]:
    """One pass. Its derivative is that of `jax.numpy`, also where a kernel computes the pass."""
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


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _token_losses(
    settings: Settings, operands: Operands, constants: Constants
) -> tuple[jax.Array, jax.Array | None, Extras]:
    return _compiled(losses_pass, settings, None, operands, constants)[:3]


@functools.partial(_token_losses.defjvp, symbolic_zeros=True)
def _(
    settings: Settings, primals: tuple[Operands, Constants], tangents: tuple[Operands, Any]
) -> tuple[Any, Any]:
    moves = _nonzero(tangents[0])
    wanted = _wanted(moves)
    losses, logs, extras, normalizer = _compiled(losses_pass, settings, None, *primals)

    def forward(known: Any, moves: Operands) -> Any:
        operands, constants, normalizer = known
        return _compiled(tangents_pass, settings, None, operands, constants, Along(normalizer, moves))

    def backward(known: Any, cotangents: Any) -> Operands:
        operands, constants, normalizer = known
        above = Above(normalizer, *cotangents)
        return _compiled(gradient_pass, settings, wanted, operands, constants, above)

    tangents_of_both = linear_map(forward, backward, (*primals, normalizer), moves)
    return (losses, logs, extras), (*tangents_of_both, _still(extras))


def _nonzero(tangents: Operands) -> Operands:
    """The tangents, None for one that is known to be 0."""
    return Operands(*(None if isinstance(x, jax.custom_derivatives.SymbolicZero) else x for x in tangents))


def _wanted(moves: Operands) -> Operands:
    """The operands of which a gradient is wanted: () or None, which a setting may hold."""
    return Operands(*(None if move is None else () for move in moves))


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
