"""The cross-entropy of inputs and a kernel, a chunk of rows at a time: the logits of all rows never exist.

The logits of a chunk are `z = x @ kernel + bias`. With their losses `l`, and the factor `a` that the
objective gives to each loss, the chunk adds to the gradients

    g = a * dl/dz
    d_inputs = g @ kernel.T
    d_kernel = d_kernel + x.T @ g
    d_bias = d_bias + sum(g)

`weighted_total` knows `a`, the weight of the loss itself, inside the chunk, and computes the gradients in the
forward pass: three products. `token_losses` gets `a` from above: its forward pass computes losses, its
backward pass the logits again, and then the gradients: four products.

Where the classes are spread over the devices of a mapped axis, the maximum, the sum of exponentials and the
label's logit of a row are reduced over that axis. What all devices then know alike is kept by the first and
summed over the axis at the end, so that the transpose of this sum, whatever it is under `jax.shard_map` and
`jax.vmap`, hands each device the cotangent of the whole.
"""

# The types of jax leave members partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rgd.jax import _ffi
from rgd.jax._batch import Losses, mapped_axes, pmax, psum, vary, weighted, weights_of
from rgd.jax._rows import IGNORED, OUT_OF_RANGE, adjusted, unless_massless
from rgd.weightings import Weighting
from rgd.weightings._base import Kernel


class Plan(NamedTuple):
    """What is fixed when a call is traced.

    Attributes:
        rows: The rows of a chunk.
        classes: The number of classes, of all slices together.
        smoothing: Label smoothing.
        softcap: `cap` of `cap * tanh(z / cap)`, or None.
        accumulate: The dtype in which the kernel's gradient is summed.
        vocab_axis: The mapped axis over which the classes are spread, or None.
        kind: The name of the Rust kernel that serves, or None for `jax.numpy`.
        weighting: The weighting's structure and those of its numbers that are no arrays.
    """

    rows: int
    classes: int
    smoothing: float
    softcap: float | None
    accumulate: Any
    vocab_axis: str | None
    kind: str | None
    weighting: Any


class Operands(NamedTuple):
    """What the gradient is taken of: (N, D) and (D, C) of one dtype; (C,) in the accumulator's, or None."""

    inputs: Any
    kernel: Any
    bias: Any


class Rows(NamedTuple):
    """What belongs to a row.

    Attributes:
        codes: Class indices and codes, (N,), as from `rgd.jax._rows.encode`.
        base: The base measure, (N,) in the accumulator's dtype, 0 where a row does not count.
        own_weight: The class weight of the row's class, (N,), or None for ones.
        groups: Groups, (N,), or None.
    """

    codes: Any
    base: Any
    own_weight: Any
    groups: Any


class Constants(NamedTuple):
    """What no gradient is taken of.

    Attributes:
        rows: What belongs to the rows.
        class_weight: Class weights of this device's classes, (C,), or None for ones.
        weight_sum: The sum of all class weights, or None for their number.
        adjustment: What is added to the logits of this device's classes, (C,), or None for nothing.
        first_class: Where the classes are spread over devices, the first of this one; else None.
        arrays: The arrays of the weighting.
        numbers: The numbers of its Rust kernel.
    """

    rows: Rows
    class_weight: Any
    weight_sum: Any
    adjustment: Any
    first_class: Any
    arrays: Any
    numbers: Any


def weighted_total(plan: Plan, operands: Operands, constants: Constants) -> jax.Array:
    """`sum_i p_i * sg(w_i) * l_i`, (), for a pointwise weighting; its gradients come in the same pass."""
    return _over_devices(plan, _weighted_total, operands, constants)


def token_losses(plan: Plan, operands: Operands, constants: Constants) -> jax.Array:
    """The loss of each row, (N,), in the accumulator's dtype; 0 where a row does not count."""
    return _over_devices(plan, _token_losses, operands, constants)


def split_weighting(weighting: Weighting) -> tuple[Any, list[Any]]:
    """What of a weighting is fixed when a call is traced, and its arrays."""
    leaves, structure = jax.tree_util.tree_flatten(weighting)
    arrays = [leaf if hasattr(leaf, "shape") else None for leaf in leaves]
    return (structure, tuple(None if hasattr(leaf, "shape") else leaf for leaf in leaves)), arrays


def kernel_numbers(kernel: Kernel | None, dtype: Any) -> tuple[str | None, list[jax.Array]]:
    """The kernel's name and its numbers as arrays."""
    if kernel is None:
        return None, []
    return kernel[0], [jnp.asarray(number, dtype) for number in kernel[1]]


def _over_devices(
    plan: Plan, compute: Callable[..., Any], operands: Operands, constants: Constants
) -> jax.Array:
    axes: frozenset[Any] = frozenset()
    for leaf in jax.tree_util.tree_leaves((operands, constants)):
        axes |= mapped_axes(leaf)
    # Cast before the derivative is taken: the transpose of the cast sums the gradient of what was replicated.
    result = compute(plan, vary(operands, axes), lax.stop_gradient(vary(constants, axes)))
    return psum(result, plan.vocab_axis)


# The derivatives.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_total(plan: Plan, operands: Operands, constants: Constants) -> jax.Array:
    return _compiled(_one_pass, plan, Operands(None, None, None), operands, constants)[0]


def _weighted_total_forward(plan: Plan, operands: Operands, constants: Constants) -> tuple[jax.Array, Any]:
    wanted, operands, constants = _unwrapped(operands, constants)
    value, gradients = _value_and_gradients(plan, wanted, operands, constants)
    any_counts = jnp.any(constants.rows.codes != IGNORED)
    return value, (gradients, _no_entries(operands), any_counts)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _value_and_gradients(
    plan: Plan, wanted: Operands, operands: Operands, constants: Constants
) -> tuple[jax.Array, Operands]:
    """One pass, of which the derivative is that of `jax.numpy`, whatever computes the pass itself."""
    return _compiled(_one_pass, plan, wanted, operands, constants)


@_value_and_gradients.defjvp
def _(
    plan: Plan, wanted: Operands, primals: tuple[Operands, Constants], tangents: tuple[Any, Any]
) -> tuple[Any, Any]:
    operands, constants = primals

    def of_operands(operands: Operands) -> Any:
        return _compiled(_one_pass, plan._replace(kind=None), wanted, operands, constants)

    return _value_and_gradients(plan, wanted, *primals), jax.jvp(of_operands, (operands,), (tangents[0],))[1]


def _weighted_total_backward(plan: Plan, residuals: Any, cotangent: Any) -> tuple[Any, None]:
    del plan
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
def _token_losses(plan: Plan, operands: Operands, constants: Constants) -> jax.Array:
    return _compiled(_losses_pass, plan, None, operands, constants)[0]


def _token_losses_forward(plan: Plan, operands: Operands, constants: Constants) -> tuple[jax.Array, Any]:
    wanted, operands, constants = _unwrapped(operands, constants)
    losses, sums = _compiled(_losses_pass, plan, None, operands, constants)
    return losses, (wanted, operands, constants, sums)


def _token_losses_backward(plan: Plan, residuals: Any, cotangent: Any) -> tuple[Any, None]:
    wanted, operands, constants, sums = residuals
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None
    gradients = _compiled(_gradient_pass, plan, wanted, operands, constants, sums, cotangent)
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


def _no_entries(operands: Operands) -> Operands:
    """Arrays of no elements that remember the dtypes."""
    return Operands(*(None if x is None else jnp.zeros((0,), x.dtype) for x in operands))


def _compiled(function: Callable[..., Any], plan: Plan, wanted: Operands | None, *arguments: Any) -> Any:
    """The function under `jax.jit`: called outside of any, its loop is then compiled once."""
    try:
        hash(plan)
    except TypeError:  # a setting of the user's that cannot be a key of jax.jit's cache
        return function(plan, wanted, *arguments)
    return compiled_once(function, plan, wanted, *arguments)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def compiled_once(function: Callable[..., Any], plan: Plan, wanted: Operands | None, *arguments: Any) -> Any:
    """`function(plan, wanted, *arguments)`, compiled once for each plan and shape."""
    return function(plan, wanted, *arguments)


# The passes over the chunks.


def _one_pass(plan: Plan, wanted: Operands, operands: Operands, constants: Constants) -> tuple[Any, Operands]:
    """The sum of the weighted losses, and the gradients of it that are wanted."""
    differentiated = wanted != Operands(None, None, None)
    weighting = _whole_weighting(plan, constants)

    def body(carry: Any, part: tuple[jax.Array, Rows]) -> tuple[Any, Any]:
        total, sums = carry
        x, rows = _clean(*part)
        logits = _logits(plan, operands, x)
        if plan.kind is not None and differentiated:
            options = _ffi.Options(plan.kind, plan.smoothing)
            settings = _kernel_settings(plan, rows, constants)
            nothing = jnp.zeros(0, settings.dtype)
            added = nothing if constants.adjustment is None else constants.adjustment
            losses, weights, gradient = _ffi.kernel(options, logits, rows.codes, added, settings, weighting)
        else:
            shifted = adjusted(logits, constants.adjustment)
            losses, (largest, exp_sum) = _losses(plan, shifted, rows, constants)
            weights, _ = weights_of(Losses(losses, rows.base, rows.groups, (0,), None), weighting)
            factor = rows.base * jnp.where((weights == 0) & ~jnp.isnan(losses), 0, weights)
            gradient = _gradient(plan, shifted, rows, constants, largest, exp_sum, factor)
        total = total + jnp.sum(weighted(weights, Losses(losses, rows.base, None, (), None)))
        sums, d_inputs = _products(plan, wanted, operands, sums, x, _through_cap(plan, logits, gradient))
        return (total, sums), d_inputs

    start = jnp.zeros((), _accumulator(operands)), _zeros(plan, wanted, operands)
    (total, sums), d_inputs = _scan(plan, body, start, (operands.inputs, constants.rows))
    return _share(constants, total), Operands(d_inputs, *sums)


def _losses_pass(plan: Plan, wanted: None, operands: Operands, constants: Constants) -> tuple[Any, Any]:
    """The losses, and for the gradient the largest logit and the sum of exponentials of each row."""
    del wanted

    def body(carry: None, part: tuple[jax.Array, Rows]) -> tuple[None, Any]:
        x, rows = _clean(*part)
        logits = adjusted(_logits(plan, operands, x), constants.adjustment)
        losses, sums = _losses(plan, logits, rows, constants)
        return carry, vary((_share(constants, losses), sums), mapped_axes(x))

    return _scan(plan, body, None, (operands.inputs, constants.rows))[1]


def _gradient_pass(  # noqa: PLR0917 - as `_compiled` gives them
    plan: Plan, wanted: Operands, operands: Operands, constants: Constants, sums: Any, cotangent: jax.Array
) -> Operands:
    """The gradients of the losses times their cotangent."""

    def body(carry: Any, part: Any) -> tuple[Any, Any]:
        x, rows = _clean(*part[:2])
        (largest, exp_sum), factor = part[2:]
        logits = _logits(plan, operands, x)
        shifted = adjusted(logits, constants.adjustment)
        gradient = _gradient(plan, shifted, rows, constants, largest, exp_sum, factor)
        return _products(plan, wanted, operands, carry, x, _through_cap(plan, logits, gradient))

    parts = (operands.inputs, constants.rows, sums, cotangent)
    summed, d_inputs = _scan(plan, body, _zeros(plan, wanted, operands), parts)
    return Operands(d_inputs, *summed)


def _scan(plan: Plan, body: Callable[..., Any], start: Any, arrays: Any) -> tuple[Any, Any]:
    """`lax.scan` over chunks of the rows, the last filled up with rows that do not count."""
    leaves = jax.tree_util.tree_leaves(arrays)
    count = leaves[0].shape[0]
    chunks = -(-count // plan.rows)
    axes: frozenset[Any] = frozenset().union(*(mapped_axes(leaf) for leaf in leaves))

    def split(array: jax.Array) -> jax.Array:
        fill = IGNORED if jnp.issubdtype(array.dtype, jnp.integer) else 0
        missing = [(0, chunks * plan.rows - count)] + [(0, 0)] * (array.ndim - 1)
        padded = jnp.pad(array, missing, constant_values=fill) if missing[0][1] else array
        return padded.reshape(chunks, plan.rows, *array.shape[1:])

    def whole(array: jax.Array) -> jax.Array:
        return array.reshape(chunks * plan.rows, *array.shape[2:])[:count]

    carry, stacked = lax.scan(body, vary(start, axes), jax.tree_util.tree_map(split, arrays))
    return carry, jax.tree_util.tree_map(whole, stacked)


# One chunk.


def _clean(inputs: jax.Array, rows: Rows) -> tuple[jax.Array, Rows]:
    """Inputs that are 0 where a row does not count, whatever they held: 0 * NaN is NaN."""
    return jnp.where((rows.codes != IGNORED)[:, None], inputs, 0), rows


def _logits(plan: Plan, operands: Operands, x: jax.Array) -> jax.Array:
    dtype = _accumulator(operands)
    logits = lax.dot_general(x, operands.kernel, (((1,), (0,)), ((), ())), preferred_element_type=dtype)
    if operands.bias is not None:
        logits = logits + operands.bias
    return logits if plan.softcap is None else plan.softcap * jnp.tanh(logits / plan.softcap)


def _through_cap(plan: Plan, logits: jax.Array, gradient: jax.Array) -> jax.Array:
    """The gradient over the logits before they were capped."""
    return gradient if plan.softcap is None else gradient * (1 - (logits / plan.softcap) ** 2)


def _losses(
    plan: Plan, logits: jax.Array, rows: Rows, constants: Constants
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The loss of each row as in `rgd.jax._rows.index_losses`; the largest logit, the sum of exponentials."""
    largest = pmax(lax.stop_gradient(jnp.max(logits, axis=-1)), plan.vocab_axis)
    shifted = logits - largest[:, None]
    exp_sum = psum(jnp.sum(jnp.exp(shifted), axis=-1), plan.vocab_axis)
    log_sum = jnp.log(exp_sum)
    index, inside = position(rows.codes, constants.first_class, logits.shape[-1])
    at_label = jnp.take_along_axis(shifted, index[:, None], axis=-1, mode="promise_in_bounds")[:, 0]
    own, smooth, weight_sum = _shares(plan, rows, constants, logits.dtype)
    at_label = psum(jnp.where(inside, unless_massless(at_label, own), 0), plan.vocab_axis)
    losses = own * (log_sum - at_label)
    if plan.smoothing > 0:
        ones = 1 if constants.class_weight is None else constants.class_weight
        over_all = psum(jnp.sum(ones * unless_massless(shifted, ones), axis=-1), plan.vocab_axis)
        losses = losses + smooth * (log_sum * weight_sum - over_all)
    return jnp.where(rows.codes == IGNORED, 0, losses), (largest, exp_sum)


def _gradient(  # noqa: PLR0917 - all of a chunk
    plan: Plan,
    logits: jax.Array,
    rows: Rows,
    constants: Constants,
    largest: jax.Array,
    exp_sum: jax.Array,
    factor: jax.Array,
) -> jax.Array:
    """The gradient over the logits of `factor` times the losses; 0 where a row does not count."""
    own, smooth, weight_sum = _shares(plan, rows, constants, logits.dtype)
    index, inside = position(rows.codes, constants.first_class, logits.shape[-1])
    counted = rows.codes != IGNORED
    # Rows that fill up a chunk have no sum, and a quotient by 0 has no derivative.
    of_softmax = factor * (own + smooth * weight_sum) / jnp.where(counted, exp_sum, 1)
    is_label = lax.broadcasted_iota(index.dtype, logits.shape, 1) == jnp.where(inside, index, -1)[:, None]
    gradient = jnp.exp(logits - largest[:, None]) * of_softmax[:, None]
    gradient = gradient - jnp.where(is_label, (factor * own)[:, None], 0)
    if plan.smoothing > 0:
        ones = jnp.ones((), logits.dtype) if constants.class_weight is None else constants.class_weight
        gradient = gradient - (factor * smooth)[:, None] * ones
    return jnp.where(counted[:, None], gradient, 0)


def _shares(
    plan: Plan, rows: Rows, constants: Constants, dtype: Any
) -> tuple[jax.Array, float, jax.Array | float]:
    """The factors of `-log p` of the label and of every class in a loss; the sum of class weights."""
    own = jnp.ones(rows.codes.shape, dtype) if rows.own_weight is None else rows.own_weight
    own = jnp.where(rows.codes == OUT_OF_RANGE, jnp.nan, (1 - plan.smoothing) * own)
    weight_sum = float(plan.classes) if constants.weight_sum is None else constants.weight_sum
    return own, plan.smoothing / plan.classes, weight_sum


def position(codes: jax.Array, first_class: jax.Array | None, classes: int) -> tuple[jax.Array, jax.Array]:
    """Where the label stands among this device's classes, and whether it does."""
    index = codes if first_class is None else codes - first_class
    inside = (codes >= 0) & (index >= 0) & (index < classes)
    return jnp.where(inside, index, 0), inside


def _kernel_settings(plan: Plan, rows: Rows, constants: Constants) -> jax.Array:
    """What the Rust kernel reads of each row: its factor, label smoothing, the weighting's numbers."""
    columns = [rows.base, plan.smoothing, *constants.numbers]
    shape, dtype = rows.base.shape, rows.base.dtype
    return jnp.stack([jnp.broadcast_to(jnp.asarray(x, dtype), shape) for x in columns], axis=-1)


def _products(  # noqa: PLR0917 - all of a chunk
    plan: Plan, wanted: Operands, operands: Operands, sums: Any, x: jax.Array, gradient: jax.Array
) -> tuple[Any, Any]:
    """The sums with this chunk's part of the kernel's and the bias's gradient, and the inputs' gradient."""
    dtype = gradient.dtype
    d_kernel, d_bias = sums
    # In the operands' precision, as a processor multiplies them fastest and as without chunks.
    narrow = gradient.astype(x.dtype)
    if d_kernel is not None:
        part = lax.dot_general(x, narrow, (((0,), (0,)), ((), ())), preferred_element_type=dtype)
        d_kernel = d_kernel + part.astype(plan.accumulate)
    if d_bias is not None:
        d_bias = d_bias + jnp.sum(gradient, axis=0)
    if wanted.inputs is None:
        return (d_kernel, d_bias), None
    d_inputs = lax.dot_general(
        narrow, operands.kernel, (((1,), (1,)), ((), ())), preferred_element_type=dtype
    )
    return (d_kernel, d_bias), d_inputs


def _zeros(plan: Plan, wanted: Operands, operands: Operands) -> tuple[Any, Any]:
    """What the sums over chunks start from."""
    d_kernel = None if wanted.kernel is None else jnp.zeros(operands.kernel.shape, plan.accumulate)
    return d_kernel, None if wanted.bias is None else jnp.zeros_like(operands.bias)


def _accumulator(operands: Operands) -> Any:
    return jnp.promote_types(operands.inputs.dtype, jnp.float32)


def _share(constants: Constants, value: jax.Array) -> jax.Array:
    """This device's part of a value that all devices of the vocabulary's axis know: the first has it all."""
    return value if constants.first_class is None else jnp.where(constants.first_class == 0, value, 0)


def _whole_weighting(plan: Plan, constants: Constants) -> Weighting:
    structure, numbers = plan.weighting
    leaves = [
        number if array is None else array for number, array in zip(numbers, constants.arrays, strict=True)
    ]
    return jax.tree_util.tree_unflatten(structure, leaves)
