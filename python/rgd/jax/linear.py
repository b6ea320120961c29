"""Re-weighted cross-entropy of a linear layer, whose logits exist a chunk at a time.

With `logits = inputs @ kernel + bias`, an output layer of C classes, the objective and its gradients are
those of `rgd.jax.cross_entropy(logits, labels, ...)`. Logits are computed, used and dropped for some rows at
a time, so that memory does not grow with the number of rows times C.
"""

# The types of jax leave members partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from rgd.jax import _ffi
from rgd.jax._batch import (
    AxisName,
    Losses,
    an_array,
    as_constants,
    as_groups,
    as_mask,
    as_mass,
    base_measure,
    check_bound,
    in_unit,
    names_of,
    psum,
    weighted,
)
from rgd.jax._chunks import (
    Constants,
    Operands,
    Plan,
    Rows,
    kernel_numbers,
    position,
    split_weighting,
    token_losses,
    weighted_total,
)
from rgd.jax._rows import IGNORED, encode
from rgd.jax._targets import (
    Backend,
    Per,
    Reduction,
    as_class_weight,
    by_class,
    check_options,
    kernel_is_faster,
    mean_of,
    refuse_out_of_range,
    target_weights,
)
from rgd.weightings import Weighting
from rgd.weightings._call import kernel_of, require_state, resolve_weighting
from rgd.weightings._fields import holds_everywhere

CHUNK_BYTES = 32 << 20


@overload
def linear_cross_entropy(
    inputs: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    logit_adjustment: ArrayLike | None = None,
    weighting: Weighting | None = None,
    tau: ArrayLike | None = None,
    per: Per = "element",
    where: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    state: None = None,
    logit_softcap: float | None = None,
    shift: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    accumulate_dtype: Any = None,
    axis_name: AxisName = None,
    vocab_axis_name: str | None = None,
    backend: Backend | None = None,
) -> jax.Array: ...
@overload
def linear_cross_entropy(
    inputs: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    logit_adjustment: ArrayLike | None = None,
    weighting: Weighting | None = None,
    tau: ArrayLike | None = None,
    per: Per = "element",
    where: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    state: Any,
    logit_softcap: float | None = None,
    shift: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    accumulate_dtype: Any = None,
    axis_name: AxisName = None,
    vocab_axis_name: str | None = None,
    backend: Backend | None = None,
) -> Any: ...
def linear_cross_entropy(
    inputs: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    logit_adjustment: ArrayLike | None = None,
    weighting: Weighting | None = None,
    tau: ArrayLike | None = None,
    per: Per = "element",
    where: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    state: Any = None,
    logit_softcap: float | None = None,
    shift: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    accumulate_dtype: Any = None,
    axis_name: AxisName = None,
    vocab_axis_name: str | None = None,
    backend: Backend | None = None,
) -> Any:
    """The re-weighted cross-entropy of `inputs @ kernel + bias`, without an array of all logits.

    The same as `rgd.jax.cross_entropy(inputs @ kernel + bias, labels, ...)`, in value and gradients. A
    pointwise weighting (`rgd.KL`, `rgd.ERM`, ...) with `per="element"` and "mean" or "sum" takes one pass
    over the chunks: the weight of a target is known as soon as its loss is, so the gradients come with the
    value, by three matrix products. Weights that depend on the batch, `per="sample"`, a `state` and "none"
    take two passes, losses and then gradients, and four products. Without differentiation only losses are
    computed.

    `jax.checkpoint` around this function computes the losses once more, and saves nothing but the gradients.
    Reverse mode may be repeated (`jax.hessian` too), and then holds all logits. There is no `jax.jvp` of it
    alone: take `rgd.jax.cross_entropy(inputs @ kernel, ...)`.

    Args:
        inputs: (..., D), floating: (N, D), or (B, T, D) for sequences.
        kernel: (D, C), floating, as in Flax. A tied embedding, (C, D), goes in transposed: `embedding.T`.
        labels: Class indices, integers of the inputs' shape without D.
        bias: (C,), floating, or None.
        weight: Class weights, (C,), constants; None for ones.
        ignore_index: The class index that counts for nothing.
        reduction: "none", "mean" or "sum".
        label_smoothing: Share of a target that is spread over all classes, in [0, 1].
        logit_adjustment: Numbers added to the logits of each class, (C,), after a soft cap; constants.
        weighting: Turns losses into weights; `KL(tau=1.0)` if neither this nor `tau` is given. Its numbers
            may be traced; a traced number that is not allowed cannot raise, and makes the weights NaN.
        tau: Short for `weighting=rgd.KL(tau=tau)`.
        per: "element" weights each target by its own loss; "sample" weights all targets of a sample of the
            leading dimension of `labels` by the mean of their losses, over the targets that count.
        where: Booleans that broadcast to the labels' shape: which targets count. What the inputs of the
            others hold, be it NaN, reaches no result.
        sample_weight: The base measure, numbers >= 0, constants: of the labels' shape, or (N,) for the
            leading axis; with `per="sample"` (N,). A target where it is 0 counts for nothing.
        groups: The group of each target, integers shaped as `sample_weight`, for `rgd.GroupDRO`.
        state: The state of a weighting that remembers: what `weighting.init()` or the last call returned.
        logit_softcap: `cap` > 0 puts `cap * tanh(logits / cap)` in the place of the logits.
        shift: For (B, T, D): position t predicts the label at t + 1, and the last position nothing. Labels
            stay as they are given, and so do `where`, `sample_weight` and `groups`, which belong to the
            labels; no inputs are copied. With "none" the loss of the label at t + 1 stands at t.
        chunk_bytes: The size of a chunk of logits; there is at least one row in it. Larger chunks are faster
            and take more memory.
        accumulate_dtype: The dtype in which the kernel's gradient is summed over chunks; None for float64
            where inputs or kernel are, else float32.
        axis_name: Name or names of mapped axes over which the rows are spread, as in `rgd.jax.cross_entropy`.
        vocab_axis_name: Name of a mapped axis (`jax.shard_map`) over which the classes are spread: `kernel`
            is (D, C/k), and `bias`, `weight` and `logit_adjustment` (C/k,), the slices in order; inputs and
            labels are the same on all devices of that axis, and labels count through all slices. The gradient
            of the inputs is then that of all classes.
        backend: What computes the rows of a chunk in one pass, as in `rgd.jax.cross_entropy`: "jnp" is plain
            `jax.numpy`, "rust" a kernel on the CPU. "rust" serves pointwise weightings that have a kernel,
            without class weights and `vocab_axis_name`. By default the kernel is taken where it serves, JAX
            runs on one CPU device, C >= 512, and there are at least 2^22 logits in all.

    Returns:
        The objective: float64 where inputs or kernel are, else float32, in which half precision is computed:
        shape () or, for "none", the labels'. Gradients have the dtypes of the arguments. With `state`: the
        objective and the new state. A label out of range raises where `labels` are concrete; under `jit` its
        loss is NaN.

    Raises:
        IndexError: If a concrete class index is out of range; names it and its position.
        TypeError: If a dtype does not fit.
        ValueError: If a shape does not fit, an option is not one of those above, or an axis is not bound; as
            `rgd.jax.cross_entropy`.

    Example:
        >>> import jax, jax.numpy as jnp, rgd, rgd.jax
        >>> inputs, kernel = jnp.array([[2.0, 0.0], [0.0, 2.0]]), jnp.eye(2)
        >>> loss, (d_inputs, d_kernel) = jax.jit(
        ...     jax.value_and_grad(rgd.jax.linear_cross_entropy, argnums=(0, 1))
        ... )(inputs, kernel, jnp.array([0, 0]))
        >>> print(f"{loss:.4f}")
        1.8210
        >>> d_kernel.round(3)
        Array([[-0.127,  0.127],
               [-1.452,  1.452]], dtype=float32)

    References:
        Kumar, Majmundar, Nagaraj, Suggala, "Stochastic Re-weighted Gradient Descent via Distributionally
        Robust Optimization", TMLR 2024, arXiv 2306.09222, Algorithm 1.
    """
    check_options(reduction, per, label_smoothing, backend)
    chosen = resolve_weighting(weighting, tau)
    require_state(chosen, state)
    check_bound(axis_name)
    _check_vocab_axis(vocab_axis_name, axis_name)
    _check_chunks(chunk_bytes, logit_softcap)
    operands = _as_operands(inputs, kernel, bias, shift)
    shape = jnp.shape(inputs)[:-1]
    dtype = jnp.promote_types(operands.inputs.dtype, jnp.float32)
    slices = 1 if vocab_axis_name is None else int(lax.psum(1, vocab_axis_name))
    own_classes = operands.kernel.shape[1]
    targets = _as_targets(
        labels,
        shape,
        slices * own_classes,
        dtype,
        ignore_index=ignore_index,
        where=where,
        sample_weight=sample_weight,
        groups=groups,
        reduction=reduction,
        per=per,
        shift=shift,
    )
    class_weight = as_class_weight(weight, own_classes, dtype)
    adjustment = by_class("logit_adjustment", logit_adjustment, own_classes, dtype)
    first = None if vocab_axis_name is None else lax.axis_index(vocab_axis_name) * own_classes
    own = weight_sum = None
    if class_weight is not None:
        index, inside = position(targets.codes, first, own_classes)
        own = psum(jnp.where(inside, class_weight[index], 0), vocab_axis_name)
        weight_sum = psum(jnp.sum(class_weight), vocab_axis_name)
    one_pass = chosen.pointwise and not chosen.stateful and per == "element" and reduction != "none"
    refusal = _no_kernel(
        chosen,
        one_pass=one_pass,
        reduction=reduction,
        per=per,
        class_weight=class_weight,
        vocab_axis_name=vocab_axis_name,
    )
    if backend == "rust" and refusal:
        raise ValueError(f"backend='rust' cannot serve {refusal}: leave backend out")
    in_rust = backend == "rust" or (
        backend is None and not refusal and kernel_is_faster((math.prod(shape), own_classes))
    )
    if in_rust:
        _ffi.register()
    constant = as_constants(chosen, dtype)
    kind, numbers = kernel_numbers(kernel_of(constant) if in_rust else None, dtype)
    fixed, arrays = split_weighting(constant)
    plan = Plan(
        rows=_chunk_rows(math.prod(shape), own_classes * dtype.itemsize, chunk_bytes),
        classes=slices * own_classes,
        smoothing=float(label_smoothing),
        softcap=None if logit_softcap is None else float(logit_softcap),
        accumulate=_accumulate_dtype(accumulate_dtype, dtype),
        vocab_axis=vocab_axis_name,
        kind=kind,
        weighting=fixed if one_pass else None,
    )

    def flat(array: jax.Array | None) -> jax.Array | None:
        return None if array is None else array.reshape(-1)

    scales = sample_weight is not None and reduction == "mean"
    base = cast("jax.Array", in_unit(targets.base, axis_name)) if scales else targets.base
    rows = Rows(
        codes=flat(targets.codes),
        base=flat(base),
        own_weight=flat(own),
        groups=flat(targets.groups) if one_pass else None,
    )
    constants = Constants(
        rows, class_weight, weight_sum, adjustment, first, arrays if one_pass else [], numbers
    )
    if one_pass:
        result = weighted_total(plan, operands, constants)
        allowed = holds_everywhere(constant)
        if allowed is not True:
            result = result * jnp.where(allowed, 1, jnp.nan).astype(dtype)
        new = None
    else:
        values = token_losses(plan, operands, constants).reshape(shape)
        losses = Losses(values, targets.base, targets.groups, (), axis_name)
        weights, new = target_weights(losses, chosen, per, state)
        result = weighted(weights, losses._replace(base=base))
    if reduction != "none":
        result = psum(jnp.sum(result), axis_name)
    if reduction == "mean":
        counted = base if own is None else jnp.where(base != 0, base * own, 0)
        result = mean_of(result, psum(jnp.sum(counted), axis_name))
    return result if state is None else (result, new)


class Targets(NamedTuple):
    """Targets that were checked, of the labels' shape.

    Attributes:
        codes: Class indices and codes, int32, as from `rgd.jax._rows.encode`.
        base: The base measure in the accumulator's dtype, 0 for a target that counts for nothing.
        groups: Groups, or None; with `per="sample"` one a sample.
    """

    codes: jax.Array
    base: jax.Array
    groups: jax.Array | None


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


def _as_targets(
    labels: ArrayLike,
    shape: tuple[int, ...],
    classes: int,
    dtype: Any,
    *,
    ignore_index: int,
    where: ArrayLike | None,
    sample_weight: ArrayLike | None,
    groups: ArrayLike | None,
    reduction: Reduction,
    per: Per,
    shift: bool,
) -> Targets:
    """Check what belongs to the targets, and move it by one position where `shift` says so."""
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
    of_units = shape if per == "element" else shape[:1]
    mask = as_mask(where, shape)
    mass = as_mass(sample_weight, of_units, dtype, reduction)
    if mass is not None:
        mass = jnp.broadcast_to(mass.reshape(mass.shape + (1,) * (len(shape) - mass.ndim)), shape)
    base = base_measure(mask, mass, dtype)
    takes_part = None if base is None else base != 0
    refuse_out_of_range(values, classes, ignore_index, takes_part)
    codes = encode(values, classes, ignore_index, takes_part)
    members = as_groups(groups, of_units)
    if shift:
        codes = jnp.roll(codes, -1, axis=1).at[:, -1:].set(IGNORED)
        mass = None if mass is None else jnp.roll(mass, -1, axis=1)
        if members is not None and per == "element":
            members = jnp.roll(members, -1, axis=1)
    counted = codes != IGNORED
    base = counted.astype(dtype) if mass is None else jnp.where(counted, mass, 0)
    return Targets(codes, base, members)


def _no_kernel(
    weighting: Weighting,
    *,
    one_pass: bool,
    reduction: Reduction,
    per: Per,
    class_weight: jax.Array | None,
    vocab_axis_name: str | None,
) -> str:
    """What of a call the Rust kernel does not serve; empty if nothing."""
    if not weighting.pointwise:
        return f"{weighting}, whose weights depend on the whole batch"
    if kernel_of(weighting) is None:
        return f"{weighting}, which has no kernel"
    if class_weight is not None:
        return "class weights"
    if vocab_axis_name is not None:
        return f"vocab_axis_name={vocab_axis_name!r}"
    if not one_pass:
        return f"reduction={reduction!r} with per={per!r}"
    return ""


def _check_vocab_axis(vocab_axis_name: str | None, axis_name: AxisName) -> None:
    if vocab_axis_name is None:
        return
    check_bound(vocab_axis_name, "vocab_axis_name")
    if vocab_axis_name in names_of(axis_name):
        raise ValueError(
            f"axis_name names the axes that rows are spread over, vocab_axis_name that of the classes, and "
            f"{vocab_axis_name!r} is in both: leave it out of axis_name"
        )


def _check_chunks(chunk_bytes: Any, logit_softcap: Any) -> None:
    if isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, (int, np.integer)) or chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes must be a positive integer, bytes of logits, got {chunk_bytes!r}")
    if logit_softcap is None:
        return
    number = isinstance(logit_softcap, (int, float, np.number)) and not isinstance(logit_softcap, bool)
    if not number or not 0 < logit_softcap < math.inf:
        raise ValueError(f"logit_softcap must be a positive number or None, got {logit_softcap!r}")


def _chunk_rows(rows: int, row_bytes: int, chunk_bytes: int) -> int:
    """The rows of a chunk: at most as many as `chunk_bytes` holds, spread evenly over the chunks."""
    most = max(1, chunk_bytes // row_bytes)
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


def _accumulate_dtype(accumulate_dtype: Any, dtype: Any) -> Any:
    chosen = jnp.dtype(dtype if accumulate_dtype is None else accumulate_dtype)
    if not jnp.issubdtype(chosen, jnp.floating):
        raise TypeError(f"accumulate_dtype must be a floating dtype, got {chosen}")
    return chosen
