"""The passes over the rows, a chunk at a time: the logits of all rows never exist.

The logits of a chunk are `z = x @ kernel + bias`. With their losses `l`, and the factor `a` that the
objective gives to each loss, the chunk adds to the gradients

    g = a * dl/dz
    d_inputs = g @ kernel.T
    d_kernel = d_kernel + x.T @ g
    d_bias = d_bias + sum(g)

and with a z-loss `g` has `2 * p * z_loss * Z * softmax(z)` too, of the logsumexp `Z`.

Where the classes are spread over the devices of a mapped axis, the maximum, the sum of exponentials and the
label's logit of a row are reduced over that axis. What all devices then know alike is kept by the first and
summed over the axis at the end, so that the transpose of this sum, whatever it is under `jax.shard_map` and
`jax.vmap`, hands each device the cotangent of the whole.
"""

# The types of jax leave members partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rgd._extras import read_entropy
from rgd.jax import _ffi
from rgd.jax._devices import mapped_axes, pmax, psum, vary
from rgd.jax._extras import Extras, extras_of
from rgd.jax._inputs import Losses
from rgd.jax._pytrees import joined
from rgd.jax._rows import IGNORED, OUT_OF_RANGE, adjusted, at_label, unless_massless
from rgd.jax._targets import squared_normalizers
from rgd.jax._weights import weighted_losses, weights_of
from rgd.jax.linear._problem import Constants, Operands, Rows, Settings, accumulator, position


class Normalizer(NamedTuple):
    """Of the softmax of each row: its largest logit, and the sum of the exponentials relative to it."""

    largest: Any
    exp_sum: Any

    def log(self, rows: Rows) -> jax.Array:
        """The logsumexp of each row; 0 where a row does not count."""
        return jnp.where(rows.codes == IGNORED, 0, self.largest + jnp.log(self.exp_sum))


class Above(NamedTuple):
    """What the gradient of known losses is made of.

    Attributes:
        normalizer: Of each row, as `losses_pass` gives it.
        of_losses: The factor of each loss, (N,).
        of_logs: The factor of the logsumexp of each row, (N,), or None for none.
    """

    normalizer: Normalizer
    of_losses: Any
    of_logs: Any


class Along(NamedTuple):
    """What the tangents of known losses are made of.

    Attributes:
        normalizer: Of each row, as `losses_pass` gives it.
        moves: The tangents of the operands, None for one that stays.
    """

    normalizer: Normalizer
    moves: Operands


def one_pass(
    settings: Settings, wanted: Operands, operands: Operands, constants: Constants
) -> tuple[tuple[Any, Extras], Operands]:
    """The objective before it is divided, with the extras; and its gradients, those not None in `wanted`."""
    differentiated = wanted != Operands(None, None, None)
    assert settings.weighting is not None
    z_loss: Any = constants.z_loss
    weighting = joined(settings.weighting, constants.weighting)

    def body(carry: Any, chunk: tuple[jax.Array, Rows]) -> tuple[Any, Any]:
        total, sums = carry
        own, known = _of_chunk(operands, constants, chunk)
        rows, logits = known.rows, _logits(settings, own)
        extras = _extras(settings, known, logits)
        if settings.native is not None and differentiated:
            losses, weights, gradient, logs = _native(settings, known, logits, weighting)
        else:
            shifted = adjusted(logits, constants.adjustment)
            losses, normalizer = _losses(settings, known, shifted)
            beside = rows.reference, read_entropy(extras, weighting), settings.classes
            known_losses = Losses(losses, rows.measure, rows.groups, (0,), None, *beside)
            weights, _ = weights_of(known_losses, weighting)
            factor = rows.measure * jnp.where((weights == 0) & ~jnp.isnan(losses), 0, weights)
            logs = of_logs = None
            if constants.z_loss is not None:
                logs = normalizer.log(rows)
                of_logs = 2 * rows.measure * constants.z_loss * logs
            gradient = _gradient(settings, known, shifted, Above(normalizer, factor, of_logs))
        measured = Losses(losses, rows.measure)
        total = total + jnp.sum(weighted_losses(weights, measured))
        if logs is not None:
            total = total + jnp.sum(squared_normalizers(measured, z_loss, logs))
        sums, d_inputs = _products(settings, wanted, own, sums, _through_cap(settings, logits, gradient))
        return (total, sums), (d_inputs, _parts(constants, own, extras))

    start = jnp.zeros((), accumulator(operands)), _zeros(settings, wanted, operands)
    (total, sums), (d_inputs, extras) = _scan(settings, body, start, (operands.inputs, constants.rows))
    return (_kept_by_first(constants, total), extras), Operands(d_inputs, *sums)


def losses_pass(
    settings: Settings, wanted: None, operands: Operands, constants: Constants
) -> tuple[jax.Array, jax.Array | None, Extras, Normalizer]:
    """The loss of each row, its logsumexp with a z-loss, the extras, and the residuals of the gradient."""
    del wanted

    def body(carry: None, chunk: tuple[jax.Array, Rows]) -> tuple[None, Any]:
        own, known = _of_chunk(operands, constants, chunk)
        logits = _logits(settings, own)
        extras = _parts(constants, own, _extras(settings, known, logits))
        losses, normalizer = _losses(settings, known, adjusted(logits, constants.adjustment))
        logs = None if constants.z_loss is None else _kept_by_first(constants, normalizer.log(known.rows))
        results = _kept_by_first(constants, losses), logs, extras, normalizer
        return carry, vary(results, mapped_axes(own.inputs))

    return _scan(settings, body, None, (operands.inputs, constants.rows))[1]


def gradient_pass(
    settings: Settings, wanted: Operands, operands: Operands, constants: Constants, above: Above
) -> Operands:
    """The gradients that are wanted of the losses, and the logsumexp, times their factors."""

    def body(carry: Any, chunk: Any) -> tuple[Any, Any]:
        own, known = _of_chunk(operands, constants, chunk[:2])
        logits = _logits(settings, own)
        gradient = _gradient(settings, known, adjusted(logits, constants.adjustment), chunk[2])
        return _products(settings, wanted, own, carry, _through_cap(settings, logits, gradient))

    start = _zeros(settings, wanted, operands)
    sums, d_inputs = _scan(settings, body, start, (operands.inputs, constants.rows, above))
    return Operands(d_inputs, *sums)


def tangents_pass(
    settings: Settings, wanted: None, operands: Operands, constants: Constants, along: Along
) -> tuple[jax.Array, jax.Array | None]:
    """The tangents of the losses, and with a z-loss of the logsumexp: this device's part of them."""
    del wanted

    def body(carry: None, chunk: Any) -> tuple[None, Any]:
        own, known = _of_chunk(operands, constants, chunk[:2])
        normalizer, d_inputs = chunk[2:]
        moves = along.moves._replace(inputs=counted_inputs(d_inputs, known.rows.codes))
        logits = _logits(settings, own)
        shifted = adjusted(logits, constants.adjustment)
        moved = _through_cap(settings, logits, _moved_logits(own, moves))
        zeros, ones = jnp.zeros_like(known.rows.measure), jnp.ones_like(known.rows.measure)

        def tangent(above: Above) -> jax.Array:
            return jnp.sum(_gradient(settings, known, shifted, above) * moved, axis=-1)

        of_losses = tangent(Above(normalizer, ones, None))
        of_logs = None if constants.z_loss is None else tangent(Above(normalizer, zeros, ones))
        return carry, (of_losses, of_logs)

    arrays = operands.inputs, constants.rows, along.normalizer, along.moves.inputs
    return _scan(settings, body, None, arrays)[1]


def _scan(settings: Settings, body: Callable[..., Any], start: Any, arrays: Any) -> tuple[Any, Any]:
    """`lax.scan` over chunks of the rows, the last filled up with rows that do not count."""
    leaves = jax.tree_util.tree_leaves(arrays)
    count = leaves[0].shape[0]
    chunks = -(-count // settings.rows)
    axes = mapped_axes(leaves)

    def split(array: jax.Array) -> jax.Array:
        fill = IGNORED if jnp.issubdtype(array.dtype, jnp.integer) else 0
        missing = [(0, chunks * settings.rows - count)] + [(0, 0)] * (array.ndim - 1)
        padded = jnp.pad(array, missing, constant_values=fill) if missing[0][1] else array
        return padded.reshape(chunks, settings.rows, *array.shape[1:])

    def whole(array: jax.Array) -> jax.Array:
        return array.reshape(chunks * settings.rows, *array.shape[2:])[:count]

    carry, stacked = lax.scan(body, vary(start, axes), jax.tree_util.tree_map(split, arrays))
    return carry, jax.tree_util.tree_map(whole, stacked)


# One chunk.


def _of_chunk(
    operands: Operands, constants: Constants, chunk: tuple[jax.Array, Rows]
) -> tuple[Operands, Constants]:
    """The operands and constants of a chunk."""
    inputs, rows = chunk
    return operands._replace(inputs=counted_inputs(inputs, rows.codes)), constants._replace(rows=rows)


def counted_inputs(inputs: Any, codes: jax.Array) -> Any:
    """Inputs, or their tangents if any, of 0 where a row does not count: 0 * NaN is NaN."""
    return None if inputs is None else jnp.where((codes != IGNORED)[:, None], inputs, 0)


def _logits(settings: Settings, operands: Operands) -> jax.Array:
    inputs, kernel, bias = operands
    dtype = accumulator(operands)
    logits = lax.dot_general(inputs, kernel, (((1,), (0,)), ((), ())), preferred_element_type=dtype)
    if bias is not None:
        logits = logits + bias
    return logits if settings.softcap is None else settings.softcap * jnp.tanh(logits / settings.softcap)


def _moved_logits(operands: Operands, moves: Operands) -> jax.Array:
    """The tangent of the logits before they are capped."""
    dtype = accumulator(operands)
    moved: Any = jnp.zeros((), dtype)
    for inputs, kernel in ((moves.inputs, operands.kernel), (operands.inputs, moves.kernel)):
        if inputs is not None and kernel is not None:
            product = lax.dot_general(inputs, kernel, (((1,), (0,)), ((), ())), preferred_element_type=dtype)
            moved = moved + product
    return moved if moves.bias is None else moved + moves.bias


def _through_cap(settings: Settings, logits: jax.Array, gradient: jax.Array) -> jax.Array:
    """The gradient over the logits before they were capped, or the tangent of those after."""
    return gradient if settings.softcap is None else gradient * (1 - (logits / settings.softcap) ** 2)


def _native(settings: Settings, constants: Constants, logits: jax.Array, weighting: Any) -> _ffi.Results:
    """Losses, weights and gradient of a chunk from the Rust kernel."""
    rows = constants.rows
    dtype = rows.measure.dtype
    columns = rows.measure, settings.smoothing, constants.z_loss, *constants.native
    given = _ffi.Rows(
        rows.codes,
        _ffi.adjustment_or_nothing(constants.adjustment, dtype),
        _ffi.row_settings(*columns, shape=rows.measure.shape, dtype=dtype),
        weighting,
    )
    assert settings.native is not None
    options = _ffi.Options(settings.native, settings.smoothing, constants.z_loss is not None)
    return _ffi.native(options, logits, given)


def _losses(settings: Settings, constants: Constants, logits: jax.Array) -> tuple[jax.Array, Normalizer]:
    """The loss of each row as in `rgd.jax._rows.index_losses`, and its normalizer."""
    codes = constants.rows.codes
    largest = pmax(lax.stop_gradient(jnp.max(logits, axis=-1)), settings.vocab_axis)
    shifted = logits - largest[:, None]
    exp_sum = psum(jnp.sum(jnp.exp(shifted), axis=-1), settings.vocab_axis)
    log_sum = jnp.log(exp_sum)
    index, inside = position(codes, constants.first_class, logits.shape[-1])
    own, smooth, weight_sum = _shares(settings, constants, logits.dtype)
    of_label = jnp.where(inside, unless_massless(at_label(shifted, index), own), 0)
    losses = own * (log_sum - psum(of_label, settings.vocab_axis))
    if settings.smoothing > 0:
        ones = 1 if constants.class_weight is None else constants.class_weight
        over_all = psum(jnp.sum(ones * unless_massless(shifted, ones), axis=-1), settings.vocab_axis)
        losses = losses + smooth * (log_sum * weight_sum - over_all)
    return jnp.where(codes == IGNORED, 0, losses), Normalizer(largest, exp_sum)


def _extras(settings: Settings, constants: Constants, logits: jax.Array) -> Extras:
    """What else is wanted of the logits of a chunk, in the accumulator's dtype."""
    if not settings.returns:
        return {}
    codes, logits = constants.rows.codes, adjusted(logits, constants.adjustment)
    axis, first = settings.vocab_axis, constants.first_class
    found = extras_of(settings.returns, logits, codes, codes != IGNORED, vocab_axis=axis, first_class=first)
    return {name: one.astype(logits.dtype) for name, one in found.items()}


def _parts(constants: Constants, operands: Operands, extras: Extras) -> Extras:
    """This device's part of the extras of a chunk."""
    parts = {name: _kept_by_first(constants, one) for name, one in extras.items()}
    return vary(parts, mapped_axes(operands.inputs))


def _gradient(settings: Settings, constants: Constants, logits: jax.Array, above: Above) -> jax.Array:
    """The gradient of the logits, from the factors in `above`; 0 where a row does not count."""
    (largest, exp_sum), factor, of_logs = above
    codes = constants.rows.codes
    own, smooth, weight_sum = _shares(settings, constants, logits.dtype)
    index, inside = position(codes, constants.first_class, logits.shape[-1])
    counted = codes != IGNORED
    # Rows that fill up a chunk have no sum, and a quotient by 0 has no derivative.
    of_softmax = factor * (own + smooth * weight_sum)
    of_softmax = of_softmax if of_logs is None else of_softmax + of_logs
    of_softmax = of_softmax / jnp.where(counted, exp_sum, 1)
    is_label = lax.broadcasted_iota(index.dtype, logits.shape, 1) == jnp.where(inside, index, -1)[:, None]
    gradient = jnp.exp(logits - largest[:, None]) * of_softmax[:, None]
    gradient = gradient - jnp.where(is_label, (factor * own)[:, None], 0)
    if settings.smoothing > 0:
        ones = jnp.ones((), logits.dtype) if constants.class_weight is None else constants.class_weight
        gradient = gradient - (factor * smooth)[:, None] * ones
    return jnp.where(counted[:, None], gradient, 0)


def _shares(
    settings: Settings, constants: Constants, dtype: Any
) -> tuple[jax.Array, float, jax.Array | float]:
    """The factors of `-log p` of the label and of every class in a loss; the sum of class weights."""
    codes, own = constants.rows.codes, constants.rows.own_weight
    own = jnp.ones(codes.shape, dtype) if own is None else own
    own = jnp.where(codes == OUT_OF_RANGE, jnp.nan, (1 - settings.smoothing) * own)
    weight_sum = float(settings.classes) if constants.weight_sum is None else constants.weight_sum
    return own, settings.smoothing / settings.classes, weight_sum


def _products(
    settings: Settings, wanted: Operands, operands: Operands, sums: Any, gradient: jax.Array
) -> tuple[Any, Any]:
    """The sums with this chunk's part of the kernel's and the bias's gradient, and the inputs' gradient."""
    dtype = gradient.dtype
    d_kernel, d_bias = sums
    # In the operands' precision, as a processor multiplies them fastest and as without chunks.
    narrow = gradient.astype(operands.inputs.dtype)
    if d_kernel is not None:
        part = lax.dot_general(
            operands.inputs, narrow, (((0,), (0,)), ((), ())), preferred_element_type=dtype
        )
        d_kernel = d_kernel + part.astype(settings.accumulate)
    if d_bias is not None:
        d_bias = d_bias + jnp.sum(gradient, axis=0)
    if wanted.inputs is None:
        return (d_kernel, d_bias), None
    d_inputs = lax.dot_general(
        narrow, operands.kernel, (((1,), (1,)), ((), ())), preferred_element_type=dtype
    )
    return (d_kernel, d_bias), d_inputs


def _zeros(settings: Settings, wanted: Operands, operands: Operands) -> tuple[Any, Any]:
    """What the sums over chunks start from."""
    d_kernel = None if wanted.kernel is None else jnp.zeros(operands.kernel.shape, settings.accumulate)
    return d_kernel, None if wanted.bias is None else jnp.zeros_like(operands.bias)


def _kept_by_first(constants: Constants, value: jax.Array) -> jax.Array:
    """This device's part of a value that all devices of the vocabulary's axis know: the first has it all."""
    return value if constants.first_class is None else jnp.where(constants.first_class == 0, value, 0)
