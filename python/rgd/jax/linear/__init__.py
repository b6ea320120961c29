"""Re-weighted cross-entropy of a linear layer, whose logits exist a chunk at a time.

With `logits = inputs @ kernel + bias`, an output layer of C classes, the objective and its gradients are
those of `rgd.jax.cross_entropy(logits, labels, ...)`. Logits are computed, used and dropped for some rows at
a time, so that memory does not grow with the number of rows times C.
"""

# The types of jax leave members partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike

from rgd._chunk_rows import chunk_rows
from rgd._extras import check_returns, read_entropy, with_extras, with_needed
from rgd.jax import _ffi
from rgd.jax._devices import AxisName, check_bound, divided_by_factor, psum
from rgd.jax._inputs import Losses, as_reference
from rgd.jax._pytrees import split
from rgd.jax._targets import (
    Backend,
    Per,
    Reduction,
    as_normalizer,
    as_z_loss,
    check_options,
    mean_of,
    native_refusal,
    squared_normalizers,
    takes_native,
    target_weights,
)
from rgd.jax._weights import as_constants, weighted_losses
from rgd.jax.linear._derivatives import token_losses, weighted_total
from rgd.jax.linear._problem import (
    Settings,
    as_accumulate_dtype,
    as_problem,
    check_chunks,
    check_vocab_axis,
)
from rgd.weightings import Weighting
from rgd.weightings._call import (
    check_reference_is_read,
    kernel_of,
    require_state,
    resolve_weighting,
)
from rgd.weightings._fields import holds_everywhere

__all__ = ["linear_cross_entropy"]


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)


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
    scale: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    per: Per = "element",
    where: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    segments: ArrayLike | None = None,
    num_segments: int | None = None,
    state: Any = None,
    logit_softcap: float | None = None,
    shift: bool = False,
    chunk_bytes: int | None = None,
    accumulate_dtype: Any = None,
    axis_name: AxisName = None,
    vocab_axis_name: str | None = None,
    backend: Backend | None = None,
    reference: ArrayLike | None = None,
    returns: tuple[str, ...] = (),
) -> Any:
    """The re-weighted cross-entropy of `inputs @ kernel + bias`, without an array of all logits.

    The same as `rgd.jax.cross_entropy(inputs @ kernel + bias, labels, ...)`, in value and gradients. A
    pointwise weighting (`rgd.KL`, `rgd.ERM`, ...) with `per="element"` and "mean" or "sum" takes one pass
    over the chunks: the weight of a target is known as soon as its loss is, so the gradients come with the
    value, by three matrix products. Weights that depend on the batch, `per="sample"`, a `state` and "none"
    take two passes, losses and then gradients, and four products. Without differentiation only losses are
    computed.

    `jax.checkpoint` around this function computes the losses once more, and saves nothing but the gradients.
    Forward mode (`jax.jvp`, `jax.jacfwd`, `jax.linearize`) takes as many passes and products, also in chunks.
    Derivatives may be repeated (`jax.hessian`); reverse mode of a derivative holds all logits.

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
        weighting: Turns losses into weights; `KL(tau=1.0)` if neither this nor `tau` nor `scale` is given.
            Its numbers may be traced; a traced number that is not allowed cannot raise, and makes the weights
            NaN.
        tau: Short for `weighting=rgd.KL(tau=tau)`.
        scale: Short for `weighting=rgd.KL(scale=scale)`; with `tau`, for `rgd.KL(tau, scale=scale)`.
        z_loss: A number >= 0, constant, which may be traced. The objective then has
            `p_i w_i l_i + p_i z_loss Z_i^2` in the place of `p_i w_i l_i`, with `Z_i` the logsumexp of the
            logits as capped and adjusted: it keeps logits from drifting. Weights, and what "mean" divides by,
            stay those of the losses alone. 0 adds nothing.
        per: "element" weights each target by its own loss; "sample" weights all targets of a sample of the
            leading dimension of `labels` by the mean of their losses, over the targets that count.
        where: Booleans that broadcast to the labels' shape: which targets count. What the inputs of the
            others hold, be it NaN, reaches no result.
        sample_weight: The base measure, numbers >= 0, constants: of the labels' shape, or (N,) for the
            leading axis; with `per="sample"` (N,). A target where it is 0 counts for nothing.
        groups: The group of each target, integers shaped as `sample_weight`, for `rgd.GroupDRO`.
        normalizer: What "mean" divides by, as in `rgd.jax.cross_entropy`.
        segments: As in `rgd.jax.cross_entropy`. With `shift` the label at t + 1 counts only if it is of the
            segment of position t.
        num_segments: As in `rgd.jax.cross_entropy`.
        state: The state of a weighting that remembers: what `weighting.init()` or the last call returned.
        logit_softcap: `cap` > 0 puts `cap * tanh(logits / cap)` in the place of the logits.
        shift: For (B, T, D): position t predicts the label at t + 1, and the last position nothing. Labels
            stay as they are given, and so do `where`, `sample_weight` and `groups`, which belong to the
            labels; no inputs are copied. With "none" the loss of the label at t + 1 stands at t.
        chunk_bytes: The size of a chunk of logits; there is at least one row in it. Larger chunks are faster
            and take more memory. None stands for 32 MiB, or for an eighth of the kernel's gradient where that
            is more; and for at least 128 rows.
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
            runs on one CPU device, C >= 100, and there are at least 2^13 logits in all.
        reference: The losses of a reference model, for `rgd.Excess`, as for `rgd.jax.cross_entropy`. With
            `shift` the loss of the label at t + 1 stands at t, as "none" returns it.
        returns: As in `rgd.jax.cross_entropy`, of the logits after a soft cap, read while a chunk is in
            memory. With `shift` what belongs to the label at t + 1 stands at t.

    Returns:
        The objective: float64 where inputs or kernel are, else float32, in which half precision is computed:
        shape () or, for "none", the labels'. Gradients have the dtypes of the arguments. With `state`: the
        objective and the new state; with `returns` as `rgd.jax.cross_entropy`. A label out of range raises
        where `labels` are concrete; under `jit` its loss is NaN.

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

        Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, arXiv 2204.02311, section 5
        (`z_loss`).
    """
    check_options(reduction, per, label_smoothing, backend)
    returns = check_returns(returns)
    chosen = resolve_weighting(weighting, tau, scale)
    require_state(chosen, state)
    check_bound(axis_name)
    check_vocab_axis(vocab_axis_name, axis_name)
    check_chunks(chunk_bytes, logit_softcap)
    problem = as_problem(
        inputs,
        kernel,
        labels,
        bias,
        weight=weight,
        ignore_index=ignore_index,
        logit_adjustment=logit_adjustment,
        where=where,
        sample_weight=sample_weight,
        groups=groups,
        segments=segments,
        num_segments=num_segments,
        reduction=reduction if normalizer is None else "sum",
        per=per,
        shift=shift,
        vocab_axis_name=vocab_axis_name,
    )
    operands, dtype = problem.operands, problem.dtype
    divisor = as_normalizer(normalizer, reduction, dtype)
    constants = problem.constants._replace(z_loss=as_z_loss(z_loss, dtype))
    if reference is not None:
        check_reference_is_read(chosen)
        compared = as_reference(reference, constants.rows.codes.shape, dtype, constants.rows.measure)
        constants = constants._replace(rows=constants.rows._replace(reference=compared))
        problem = problem._replace(constants=constants)
    shape, (features, own_classes) = constants.rows.codes.shape, operands.kernel.shape
    refusal = native_refusal(chosen, class_weight=constants.class_weight, reduction=reduction, per=per)
    if vocab_axis_name is not None:
        refusal = refusal or f"vocab_axis_name={vocab_axis_name!r}"
    native = takes_native(backend, refusal, (math.prod(shape), own_classes))
    constant = as_constants(chosen, dtype)
    kind = None
    if native and (found := kernel_of(constant)) is not None:
        _ffi.register()
        kind = found[0]
        constants = constants._replace(native=[jnp.asarray(number, dtype) for number in found[1]])
    one_pass = chosen.pointwise and not chosen.stateful and per == "element" and reduction != "none"
    structure = None
    if one_pass:
        structure, arrays = split(constant)
        constants = constants._replace(weighting=arrays)
    accumulate = as_accumulate_dtype(accumulate_dtype, dtype)
    settings = Settings(
        rows=chunk_rows(
            chunk_bytes,
            row_bytes=own_classes * dtype.itemsize,
            gradient_bytes=features * own_classes * accumulate.itemsize,
            rows=math.prod(shape),
        ),
        classes=problem.classes,
        smoothing=float(label_smoothing),
        softcap=None if logit_softcap is None else float(logit_softcap),
        accumulate=accumulate,
        vocab_axis=vocab_axis_name,
        native=kind,
        weighting=structure,
        returns=with_needed(returns, chosen),
    )
    given = constants.rows
    measure: Any = given.measure
    if sample_weight is not None and reduction == "mean" and divisor is None:
        measure = divided_by_factor(measure, axis_name)
    rows = problem.flat_rows()
    if not one_pass:
        rows = rows._replace(groups=None, reference=None)
    constants = constants._replace(rows=rows._replace(measure=measure.reshape(-1)))
    if one_pass:
        (result, extras), new = weighted_total(settings, operands, constants), None
        allowed = holds_everywhere(constant)
        if allowed is not True:
            result = result * jnp.where(allowed, 1, jnp.nan).astype(dtype)
    else:
        values, logs, extras = token_losses(settings, operands, constants)
        entropy = read_entropy(extras, chosen)
        entropy = None if entropy is None else entropy.reshape(shape)
        beside = given.reference, entropy, problem.classes
        losses = Losses(values.reshape(shape), given.measure, given.groups, (), axis_name, *beside)
        weights, new = target_weights(losses, chosen, per, state, problem.segments)
        losses = losses._replace(measure=measure)
        result = weighted_losses(weights, losses)
        if logs is not None:
            result = result + squared_normalizers(losses, constants.z_loss, logs.reshape(shape))
    if reduction != "none":
        result = psum(jnp.sum(result), axis_name)
    if divisor is not None:
        result = result / divisor
    elif reduction == "mean":
        own = given.own_weight
        counted = measure if own is None else jnp.where(measure != 0, measure * own, 0)
        result = mean_of(result, psum(jnp.sum(counted), axis_name))
    found = {name: one.reshape(shape) for name, one in extras.items()}
    if "correct" in found:
        found["correct"] = found["correct"] != 0
    return with_extras(result, found, returns, state, new)
