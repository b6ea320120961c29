"""Re-weighted cross-entropy from logits.

With `p = softmax(logits)`, class weights `c` and label smoothing `e` the loss of a class index `y` is

    l = -(1 - e) * c_y * log p_y - (e / C) * sum_k c_k * log p_k

and that of class probabilities `t` is `l = -sum_k c_k * ((1 - e) * t_k + e / C) * log p_k`. The objective is
`sum_i sg(w_i) * l_i / sum_i c_{y_i}` ("mean"), with the weight `w_i` that `l_i` calls for.
"""

# The types of jax leave members partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import os
from typing import Literal, NamedTuple, TypeAlias, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from rgd.jax import _fused
from rgd.jax._weights import AxisName, Batch, as_mask, check_bound, kl_settings, psum, resolve, weights_of
from rgd.weightings import KL, KLBall, Weighting

Reduction: TypeAlias = Literal["none", "mean", "sum"]
Per: TypeAlias = Literal["element", "sample"]
Implementation: TypeAlias = Literal["jnp", "rust"]


def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    tau: ArrayLike | None = None,
    weighting: Weighting | None = None,
    per: Per = "element",
    where: ArrayLike | None = None,
    axis: int = -1,
    axis_name: AxisName = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """The re-weighted cross-entropy of logits, reduced as `torch.nn.CrossEntropyLoss` reduces.

    With `l_i` the loss of a target and `sg(w_i)` its weight, "none" is `w_i * l_i`, "sum" is `sum_i w_i *
    l_i` and "mean" is `sum_i w_i * l_i / sum_i c_{y_i}` over the targets that count; for class probabilities
    it is `sum_i w_i * l_i / n`. The weights are constants of the gradient.

    Args:
        logits: (..., C), floating: the class axis is the last, as everywhere in JAX. (For the layout of
            torch, (N, C, d1, ..., dk), give `axis=1`.) Half precision is computed with in float32.
        labels: Class indices, integers of the logits' shape without the class axis; or class probabilities,
            floats of the logits' shape.
        weight: Class weights `c`, (C,), constants; None for ones.
        ignore_index: The class index that counts for nothing.
        reduction: "none", "mean" or "sum".
        label_smoothing: Share `e` of a target that is spread over all classes, in [0, 1].
        tau: Short for `weighting=rgd.KL(tau=tau)`.
        weighting: `rgd.KL` or `rgd.KLBall`, of which every number may be traced; a traced number that is not
            allowed cannot raise, and makes the weights NaN. By default `KL(tau=1.0)`.
        per: "element" weights each target by its own loss; "sample" weights all targets of a sample of the
            leading dimension of `labels` by the mean of their losses, over the targets that count.
        where: Booleans that broadcast to the losses' shape. A target where it is False counts for nothing,
            and what its logits hold, be it NaN, reaches neither the objective nor the gradient.
        axis: The class axis.
        axis_name: Name or names of mapped axes (`jax.shard_map`, `jax.pmap`, `jax.vmap`) over which the batch
            is spread. "mean" and "sum", and weights that are normalised or from a ball, are then those of the
            whole batch.

        implementation: "jnp" is plain `jax.numpy`. "rust" takes loss and gradient from a Rust kernel in one
            pass over the logits, in place where they are donated or not needed again; on a platform other
            than the CPU the same function in `jax.numpy` takes its place. It serves pointwise `KL`, class
            indices without class weights, "mean" and "sum", `per="element"` and the class axis last. It
            cannot be exported by `jax.export`, and where logits are sharded it must be called inside
            `jax.shard_map`. By default the kernel is taken on one CPU device of few cores, where it serves
            and the logits are large enough for it to be faster.

    Returns:
        The objective, float64 for float64 logits, else float32: shape () or, for "none", the logits' shape
        without the class axis. With no target that counts, "mean" is NaN. The gradient has the logits' dtype.

        A class index out of range raises where `labels` are concrete. Under `jit`, where no value can raise,
        its loss and its row of the gradient are NaN.

    Raises:
        IndexError: If a concrete class index is out of range; names it and its position.
        TypeError: If a dtype does not fit.
        ValueError: If a shape does not fit, an option is not one of those above, `label_smoothing` is not in
            [0, 1], `ignore_index >= 0` is given with class probabilities, or both `tau` and `weighting` are
            given.

    Example:
        >>> import jax, jax.numpy as jnp, rgd, rgd.jax
        >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 2.0]]), jnp.array([0, 0])
        >>> print(f"{rgd.jax.cross_entropy(logits, labels, weighting=rgd.KL(scale=0.0)):.4f}")  # plain
        1.1269
        >>> print(f"{rgd.jax.cross_entropy(logits, labels, tau=1.0):.4f}")
        1.8210
        >>> jax.grad(rgd.jax.cross_entropy)(logits, labels).round(3)
        Array([[-0.064,  0.064],
               [-0.726,  0.726]], dtype=float32)

    References:
        Kumar, Majmundar, Nagaraj, Suggala, "Stochastic Re-weighted Gradient Descent via Distributionally
        Robust Optimization", TMLR 2024, arXiv 2306.09222, Algorithm 1.
    """
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if per not in ("element", "sample"):
        raise ValueError(f"per must be 'element' or 'sample', got {per!r}")
    if implementation not in (None, "jnp", "rust"):
        raise ValueError(f"implementation must be 'jnp', 'rust' or None, got {implementation!r}")
    chosen = resolve(tau, weighting)
    check_bound(axis_name)
    problem = as_problem(logits, labels, weight, where, ignore_index, label_smoothing, axis)
    refusal = _no_kernel(problem, chosen, reduction, per, axis)
    if implementation == "rust" and refusal:
        raise ValueError(f"implementation='rust' cannot serve {refusal}: leave implementation out")
    if implementation == "rust" or (
        implementation is None and not refusal and _kernel_is_faster(problem.logits)
    ):
        return _rust(problem, cast("KL", chosen), reduction, axis_name)
    losses = losses_of(problem)
    weighted = _target_weights(problem, losses, chosen, per, axis_name) * losses
    if reduction == "none":
        return weighted
    total = psum(jnp.sum(weighted), axis_name)
    return total if reduction == "sum" else total / psum(denominator_of(problem), axis_name)


class Problem(NamedTuple):
    """A cross-entropy that was checked, its class axis the last; `labels` are indices or probabilities.

    `counted` is None where every target counts; `out_of_range` is None where no class index can be out of
    range, and an index that does not count, or is out of range, is replaced by 0.
    """

    logits: jax.Array
    labels: jax.Array
    class_weight: jax.Array | None
    smoothing: float
    counted: jax.Array | None
    out_of_range: jax.Array | None

    @property
    def has_indices(self) -> bool:
        """Whether `labels` are class indices, rather than class probabilities."""
        return jnp.issubdtype(self.labels.dtype, jnp.integer)


def as_problem(  # noqa: PLR0917
    logits: ArrayLike,
    labels: ArrayLike,
    weight: ArrayLike | None,
    where: ArrayLike | None,
    ignore_index: int,
    label_smoothing: float,
    axis: int,
) -> Problem:
    """Check what a user gave, at trace time, and bring the class axis to the end."""
    logits = jnp.asarray(logits)
    if logits.ndim == 0 or not -logits.ndim <= axis < logits.ndim:
        raise ValueError(
            f"logits of shape {logits.shape} have no class axis {axis}: give (..., C), or name it by axis="
        )
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(
            f"logits must be floating, got {logits.dtype}: convert them with logits.astype(jnp.float32)"
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    given = logits.shape
    logits = jnp.moveaxis(logits, axis, -1)
    classes = logits.shape[-1]
    if classes == 0:
        raise ValueError(f"logits must have at least one class, got shape {given}")
    class_weight = _class_weight(weight, classes, jnp.promote_types(logits.dtype, jnp.float32))
    mask = as_mask(where, logits.shape[:-1])
    values = labels if isinstance(labels, np.ndarray) else jnp.asarray(labels)
    if jnp.issubdtype(values.dtype, jnp.floating):
        if values.shape == logits.shape[:-1] and values.shape != given:
            raise TypeError(
                f"labels of shape {values.shape} must be class indices, integers, got {values.dtype}"
            )
        if values.shape != given:
            raise ValueError(_label_shape(given, logits.shape[:-1], values.shape, axis))
        if ignore_index >= 0:
            raise ValueError(
                f"ignore_index does not apply to class probabilities, got {ignore_index}: leave it out"
            )
        return Problem(
            logits, jnp.moveaxis(jnp.asarray(values), axis, -1), class_weight, label_smoothing, mask, None
        )
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise TypeError(
            f"labels must be integers (class indices) or floats (class probabilities), got {values.dtype}"
        )
    if values.shape != logits.shape[:-1]:
        if values.shape == given:
            raise TypeError(
                f"labels of the logits' shape must be floating class probabilities, got {values.dtype}: "
                "convert one-hot labels with labels.astype(logits.dtype)"
            )
        raise ValueError(_label_shape(given, logits.shape[:-1], values.shape, axis))
    _refuse_out_of_range(values, classes, ignore_index, where)

    indices = jnp.asarray(values)
    if indices.dtype.itemsize < 4:
        indices = indices.astype(jnp.int32)
    limits = jnp.iinfo(indices.dtype)
    counted = mask
    if limits.min <= ignore_index <= limits.max:
        not_ignored = indices != ignore_index
        counted = not_ignored if mask is None else mask & not_ignored
    outside = (indices < 0) | (indices >= classes)
    if counted is not None:
        outside &= counted
    indices = jnp.where(outside, 0, indices)
    indices = indices if counted is None else jnp.where(counted, indices, 0)
    return Problem(logits, indices, class_weight, label_smoothing, counted, outside)


def losses_of(problem: Problem) -> jax.Array:
    """The loss of each target in the accumulator's dtype, differentiable; 0 where a target does not count."""
    logits, labels, class_weight, smoothing, counted, out_of_range = problem
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if counted is not None:
        logits = _gradient_where(logits, counted)
    largest = lax.stop_gradient(jnp.max(logits, axis=-1))
    log_sum = jnp.log(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))
    if not problem.has_indices:
        smoothed = labels.astype(logits.dtype) * (1 - smoothing) + smoothing / logits.shape[-1]
        smoothed = smoothed if class_weight is None else smoothed * class_weight
        log_p = logits - largest[..., None] - log_sum[..., None]
        losses = -jnp.sum(smoothed * log_p, axis=-1)
    else:
        own = jnp.take_along_axis(logits, labels[..., None], axis=-1, mode="promise_in_bounds")[..., 0]
        losses = log_sum - (own - largest)
        if class_weight is not None:
            losses = losses * class_weight[labels]
        if smoothing > 0:
            ones = jnp.ones(logits.shape[-1], logits.dtype) if class_weight is None else class_weight
            spread = log_sum * jnp.sum(ones) - jnp.sum(ones * (logits - largest[..., None]), axis=-1)
            losses = (1 - smoothing) * losses + smoothing / logits.shape[-1] * spread
    if out_of_range is not None:
        losses = losses * jnp.where(out_of_range, jnp.nan, 1).astype(losses.dtype)
    return losses if counted is None else jnp.where(counted, losses, 0)


def denominator_of(problem: Problem) -> jax.Array:
    """What "mean" divides by: the class weights of the targets that count, or their number."""
    dtype = jnp.promote_types(problem.logits.dtype, jnp.float32)
    if problem.class_weight is not None and problem.has_indices:
        return jnp.sum(problem.class_weight[problem.labels], where=problem.counted)
    if problem.counted is None:
        return jnp.full((), np.prod(problem.logits.shape[:-1]), dtype)
    return jnp.sum(problem.counted, dtype=dtype)


def _no_kernel(problem: Problem, weighting: Weighting, reduction: Reduction, per: Per, axis: int) -> str:
    """What of a call the kernel does not serve; empty if nothing."""
    if not isinstance(weighting, KL) or weighting.normalize:
        return f"{weighting}, whose weights depend on the whole batch"
    if not problem.has_indices:
        return "class probabilities"
    if problem.class_weight is not None:
        return "class weights"
    if reduction == "none" or per == "sample":
        return f"reduction={reduction!r} with per={per!r}"
    if axis not in (-1, problem.logits.ndim - 1):
        return f"axis={axis}, which is not the last"
    if problem.logits.dtype not in _KERNEL_DTYPES:
        return f"logits of dtype {problem.logits.dtype}"
    return ""


_KERNEL_DTYPES = (jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16)


def _kernel_is_faster(logits: jax.Array) -> bool:
    """Whether `benches/jax_cross_entropy.py` shows the kernel ahead for logits of this size, here.

    The kernel has one thread where jnp has all: it was measured on few cores, and is taken on few. XLA does
    not split a custom call over devices: where there are more than one, sharded logits would be gathered.
    Logits that are needed again are copied first, and then float32 takes about as long either way; in place,
    the kernel takes half of jnp's time or less. Below this size the gain is small.
    """
    here = jax.default_backend() == "cpu" and (os.cpu_count() or 1) <= 4 and jax.device_count() == 1
    return here and logits.shape[-1] >= 512 and logits.size >= 1 << 22


def _rust(problem: Problem, weighting: KL, reduction: Reduction, axis_name: AxisName) -> jax.Array:
    dtype = jnp.promote_types(problem.logits.dtype, jnp.float32)
    labels = problem.labels.astype(jnp.int32)
    if problem.counted is not None:
        labels = jnp.where(problem.counted, labels, _fused.IGNORED)
    if problem.out_of_range is not None:
        labels = jnp.where(problem.out_of_range, _fused.OUT_OF_RANGE, labels)
    tau, scale = kl_settings(weighting, dtype)
    norm = 1 if reduction == "sum" else 1 / psum(denominator_of(problem), axis_name)
    total = _fused.weighted_sum(
        problem.logits,
        labels,
        tau=tau,
        scale=scale,
        norm=norm,
        smoothing=problem.smoothing,
    )
    return psum(total, axis_name)


def _target_weights(
    problem: Problem, losses: jax.Array, weighting: Weighting, per: Per, axis_name: AxisName
) -> jax.Array:
    """The weight of each target; broadcasts to the losses."""
    counted = problem.counted
    if per == "element" or losses.ndim == 0:
        return weights_of(Batch(losses, counted, tuple(range(losses.ndim)), axis_name), weighting)
    rest = tuple(range(1, losses.ndim))
    counted = jnp.ones(losses.shape, jnp.bool_) if counted is None else counted
    targets = jnp.sum(counted, axis=rest, dtype=losses.dtype)
    mean_losses = jnp.sum(losses, axis=rest) / jnp.maximum(targets, 1)
    weights = weights_of(Batch(mean_losses, targets > 0, (0,), axis_name), weighting)
    return jnp.expand_dims(weights, rest)


@jax.custom_jvp
def _gradient_where(logits: jax.Array, counted: jax.Array) -> jax.Array:
    """`logits`, of which a row that does not count has gradient 0, whatever it holds."""
    return logits


@_gradient_where.defjvp
def _(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    logits, counted = primals
    return logits, jnp.where(counted[..., None], tangents[0], 0)


def _class_weight(weight: ArrayLike | None, classes: int, dtype: jnp.dtype) -> jax.Array | None:
    if weight is None:
        return None
    if isinstance(weight, (KL, KLBall)):
        raise TypeError(f"weight takes class weights, got {weight!r}: name it weighting={weight!r}")
    array = jnp.asarray(weight)
    if array.shape != (classes,):
        raise ValueError(f"weight must have one entry a class, shape {(classes,)}, got {array.shape}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"weight must be floating, got {array.dtype}: convert it with weight.astype(jnp.float32)"
        )
    return lax.stop_gradient(array.astype(dtype))


def _refuse_out_of_range(
    labels: jax.Array | np.ndarray, classes: int, ignore_index: int, where: ArrayLike | None
) -> None:
    """Raise for a class index out of range, where its value is known."""
    for array in (labels, where):
        if isinstance(array, jax.core.Tracer) or (
            isinstance(array, jax.Array) and not array.is_fully_addressable
        ):
            return
    known = np.asarray(labels)
    outside = (known != ignore_index) & ((known < 0) | (known >= classes))
    if where is not None:
        outside &= np.asarray(where)
    if outside.any():
        position = tuple(int(i) for i in np.argwhere(outside)[0])
        raise IndexError(f"label {known[position]} at {position} is out of range for {classes} classes")


def _label_shape(given: tuple[int, ...], rows: tuple[int, ...], got: tuple[int, ...], axis: int) -> str:
    hint = ""
    if len(given) > 2 and got == given[:1] + given[2:] and axis in (-1, len(given) - 1):
        hint = "; if the class axis is the second, as in torch, give axis=1"
    return (
        f"labels must have shape {rows} (class indices) or {given} (class probabilities) for logits of shape "
        f"{given} with class axis {axis}, got {got}{hint}"
    )
