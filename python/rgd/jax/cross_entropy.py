"""Re-weighted cross-entropy from logits.

With `q = softmax(logits)`, class weights `c` and label smoothing `e` the loss of a class index `y` is

    l = -(1 - e) * c[y] * log(q[y]) - (e / C) * sum(c * log(q))

and that of class probabilities `t` is

    l = -sum(c * ((1 - e) * t + e / C) * log(q))

With the weights `w` that these losses call for and the measure `p` (`sample_weight`, or ones) the
objective is `sum(p * sg(w) * l) / sum(p * c[y])` ("mean").
"""

# The types of jax leave members partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rgd._extras import check_returns, read_entropy, with_extras, with_needed
from rgd.jax import _ffi
from rgd.jax._devices import AxisName, check_bound, divided_by_factor, psum
from rgd.jax._extras import Extras, extras_of
from rgd.jax._inputs import (
    Losses,
    an_array,
    as_groups,
    as_mask,
    as_measure,
    as_reference,
    masked_measure,
)
from rgd.jax._rows import IGNORED, adjusted, encode, index_losses, log_normalizers, probability_losses
from rgd.jax._segments import Segments, as_segments
from rgd.jax._targets import (
    Backend,
    Per,
    Reduction,
    as_class_weight,
    as_normalizer,
    as_z_loss,
    by_class,
    check_options,
    mean_of,
    native_refusal,
    refuse_out_of_range,
    squared_normalizers,
    takes_native,
    target_weights,
)
from rgd.jax._weights import weighted_losses
from rgd.weightings import Weighting
from rgd.weightings._call import check_reference_is_read, require_state, resolve_weighting


def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    weighting: Weighting | None = None,
    tau: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    per: Per = "element",
    logit_adjustment: ArrayLike | None = None,
    where: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    segments: ArrayLike | None = None,
    num_segments: int | None = None,
    state: Any = None,
    axis: int = -1,
    axis_name: AxisName = None,
    backend: Backend | None = None,
    reference: ArrayLike | None = None,
    returns: tuple[str, ...] = (),
) -> Any:
    """The re-weighted cross-entropy of logits, reduced as `torch.nn.CrossEntropyLoss` reduces.

    With `l_i` the loss of a target, `sg(w_i)` its weight and `p_i` its `sample_weight` (1 without), "none" is
    `p_i * w_i * l_i`, "sum" is the sum of those and "mean" is the sum divided by `sum_i p_i * c_{y_i}` over
    the targets that count; for class probabilities by `sum_i p_i`. The weights are constants of the gradient.
    A target of weight 0 adds 0 to the objective and to the gradient, an infinite loss too. A class without
    mass in the target (a probability or a class weight of 0) adds nothing where its logit is -inf.

    Args:
        logits: (..., C), floating: the class axis is the last, as everywhere in JAX. (For the layout of
            torch, (N, C, d1, ..., dk), give `axis=1`.) Half precision is computed with in float32.
        labels: Class indices, integers of the logits' shape without the class axis; or class probabilities,
            floats of the logits' shape.
        weight: Class weights `c`, (C,), constants; None for ones.
        ignore_index: The class index that counts for nothing: its row of the gradient is 0, whatever the
            logits hold (`torch.nn.CrossEntropyLoss` has NaN for NaN).
        reduction: "none", "mean" or "sum".
        label_smoothing: Share `e` of a target that is spread over all classes, in [0, 1].
        weighting: Turns losses into weights; `KL(tau=1.0)` if neither this nor `tau` nor `scale` is given.
            Its numbers may be traced; a traced number that is not allowed cannot raise, and makes the weights
            NaN.
        tau: Short for `weighting=rgd.KL(tau=tau)`.
        scale: Short for `weighting=rgd.KL(scale=scale)`; with `tau`, for `rgd.KL(tau, scale=scale)`.
        z_loss: A number >= 0, constant, which may be traced. The objective then has
            `p_i w_i l_i + p_i z_loss Z_i^2` in the place of `p_i w_i l_i`, with `Z_i` the logsumexp of the
            logits as adjusted: it keeps logits from drifting. Weights, and what "mean" divides by, stay those
            of the losses alone. 0 adds nothing.
        per: "element" weights each target by its own loss; "sample" weights all targets of a sample of the
            leading dimension of `labels` by the mean of their losses, over the targets that count.
        logit_adjustment: Numbers `a`, (C,), constants: every loss is that of `logits + a`, summed in the
            dtype that losses are computed in. `rgd.log_prior` makes them of class counts; -inf rules a class
            out.
        where: Booleans that broadcast to the losses' shape. A target where it is False counts for nothing,
            and what its logits hold, be it NaN, reaches neither the objective nor the gradient.
        sample_weight: The base measure `p`, numbers >= 0, constants: of the losses' shape, or (N,) for the
            leading axis; with `per="sample"` (N,). A target where it is 0 counts for nothing.
        groups: The group of each target, integers shaped as `sample_weight`, for `rgd.GroupDRO`.
        normalizer: What "mean" divides by in the place of the sum of `p_i c_{y_i}`, a positive number or a
            scalar array, constant, which may be traced: the same for all micro-batches of a step, whose
            gradients then add up to those of one big batch. With `axis_name` it is that of the whole batch.
        segments: With `per="sample"`, which sequence of its row a target belongs to, integers of the labels'
            shape: targets of a row with one number are a unit, adjacent or not, and share a weight, that of
            their mean loss. -1 takes no part. For labels (N,) the call is one row. `sample_weight` and
            `groups` then have the labels' shape, constant within a segment, or the units', (B, S).
        num_segments: S, a Python integer, how many units a row has. None: the largest number and one more
            where `segments` are concrete, else how many targets a row has.
        state: The state of a weighting that remembers: what `weighting.init()` or the last call returned.
        axis: The class axis.
        axis_name: Name or names of mapped axes (`jax.shard_map`, `jax.pmap`, `jax.vmap`) over which the batch
            is spread. "mean" and "sum", weights that depend on the batch, and the state are then those of the
            whole batch.
        backend: "jnp" is plain `jax.numpy`. "rust" takes loss and gradient from a Rust kernel in one pass
            over the logits, in place where they are donated or not needed again; on a platform other than the
            CPU the same function in `jax.numpy` takes its place. It serves pointwise weightings that have a
            kernel (`rgd.KL`, `rgd.ERM`), class indices without class weights, "mean" and "sum",
            `per="element"` and the class axis last. It cannot be exported by `jax.export`, and where logits
            are sharded it must be called inside `jax.shard_map`. By default the kernel is taken where it
            serves, JAX runs on one CPU device, C >= 100, and logits have at least 2^13 entries.
        reference: The losses of a reference model, for `rgd.Excess`: of the labels' shape, as
            `reduction="none"` with `weighting=rgd.ERM()` gives them; else as for `rgd.jax.sample_weights`.
            With `per="sample"` the means over the targets that count are compared.
        returns: What else to return of the logits that the loss is of, with `logit_adjustment`, by name: a
            tuple of "entropy", `-sum_k q_k log q_k` of `q = softmax(logits)`; "logsumexp", the `Z_i` of a
            z-loss; and "correct", whether the class of the target is the first of those with the largest
            logit. For class probabilities that is the first of the most probable. Class weights, label
            smoothing and weights change none of them.

    Returns:
        The objective, float64 for float64 logits, else float32: shape () or, for "none", the logits' shape
        without the class axis. With no target that counts, or class weights of 0 alone, "mean" is NaN. The
        gradient has the logits' dtype.
        With `state`: the objective and the new state. With `returns`: the objective and a dict of arrays of
        the shape of "none", constants, 0 where a target does not count: "correct" is bool, the others are in
        the objective's dtype. With both: `(objective, (extras, state))`, which
        `value_and_grad(has_aux=True)` takes.

        A class index out of range raises where `labels` are concrete. Under `jit`, where no value can raise,
        its loss and its row of the gradient are NaN.

    Raises:
        IndexError: If a concrete class index is out of range; names it and its position.
        TypeError: If a dtype does not fit.
        ValueError: If a shape does not fit, an option is not one of those above, `label_smoothing` is not in
            [0, 1], `ignore_index >= 0` is given with class probabilities, `sample_weight` holds a number that
            is negative or not finite, `z_loss` is such a number, `normalizer` is not positive or `reduction`
            not "mean", `tau` or `scale` is given beside
            `weighting`, or the weighting remembers and `state` is missing.

    Example:
        >>> import jax, jax.numpy as jnp, rgd, rgd.jax
        >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 2.0]]), jnp.array([0, 0])
        >>> print(f"{rgd.jax.cross_entropy(logits, labels, weighting=rgd.ERM()):.4f}")
        1.1269
        >>> print(f"{rgd.jax.cross_entropy(logits, labels, tau=1.0):.4f}")
        1.8210
        >>> jax.grad(rgd.jax.cross_entropy)(logits, labels).round(3)
        Array([[-0.064,  0.064],
               [-0.726,  0.726]], dtype=float32)

    References:
        Kumar, Majmundar, Nagaraj, Suggala, "Stochastic Re-weighted Gradient Descent via Distributionally
        Robust Optimization", TMLR 2024, arXiv 2306.09222, Algorithm 1.

        Menon, Jayasumana, Rawat, Jain, Veit, Kumar, "Long-tail learning via logit adjustment", ICLR 2021,
        arXiv 2007.07314, equation 10.

        Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, arXiv 2204.02311, section 5
        (`z_loss`).
    """
    check_options(reduction, per, label_smoothing, backend)
    returns = check_returns(returns)
    chosen = resolve_weighting(weighting, tau, scale)
    require_state(chosen, state)
    check_bound(axis_name)
    problem = _as_problem(
        logits,
        labels,
        weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        # A measure whose size matters is not scaled.
        reduction=reduction if normalizer is None else "sum",
        per=per,
        logit_adjustment=logit_adjustment,
        where=where,
        sample_weight=sample_weight,
        segments=segments,
        num_segments=num_segments,
        axis=axis,
    )
    dtype = jnp.promote_types(problem.logits.dtype, jnp.float32)
    factor, divisor = as_z_loss(z_loss, dtype), as_normalizer(normalizer, reduction, dtype)
    units = problem.labels.shape[: problem.logits.ndim - 1]
    if problem.segments is not None:
        members = problem.segments.groups(groups)
    else:
        members = as_groups(groups, units if per == "element" else units[:1])
    if reference is not None:
        check_reference_is_read(chosen)
    compared = as_reference(reference, units, dtype, problem.measure)
    refusal = native_refusal(chosen, class_weight=problem.class_weight, reduction=reduction, per=per)
    native = takes_native(backend, refusal or _native_misfit(problem, axis), problem.logits.shape)
    scaled = problem
    if sample_weight is not None and reduction == "mean" and divisor is None:
        scaled = problem._replace(measure=divided_by_factor(problem.measure, axis_name))
    wanted = with_needed(returns, chosen)
    extras = _extras_of(problem, wanted) if wanted else {}
    if native:
        result = _native_objective(scaled, chosen, reduction, axis_name, z_loss=factor, normalizer=divisor)
        return with_extras(result, extras, returns, None, None)
    beside = compared, read_entropy(extras, chosen), problem.logits.shape[-1]
    losses = Losses(_losses_of(problem), problem.measure, members, (), axis_name, *beside)
    weights, new = target_weights(losses, chosen, per, state, problem.segments)
    losses, problem = losses._replace(measure=scaled.measure), scaled
    result = weighted_losses(weights, losses)
    if factor is not None:
        result = result + squared_normalizers(losses, factor, _normalizers_of(problem))
    if reduction != "none":
        result = psum(jnp.sum(result), axis_name)
    if reduction == "mean":
        result = mean_of(result, psum(_divisor_of(problem), axis_name) if divisor is None else divisor)
    return with_extras(result, extras, returns, state, new)


class Problem(NamedTuple):
    """A cross-entropy that was checked, its class axis the last.

    Attributes:
        logits: (..., C).
        labels: Class indices and codes, int32 of shape (...), as from `rgd.jax._rows.encode`; or class
            probabilities, (..., C).
        class_weight: (C,) in the accumulator's dtype, or None for ones.
        smoothing: Label smoothing.
        measure: The base measure, (...) in the accumulator's dtype: 0 for a target that counts for nothing;
            None where all count as 1.
        adjustment: What is added to the logits, (C,) in the accumulator's dtype; None for nothing.
        segments: Which unit each target belongs to, where the sequences of a row are units.
    """

    logits: jax.Array
    labels: jax.Array
    class_weight: jax.Array | None
    smoothing: float
    measure: jax.Array | None
    adjustment: jax.Array | None
    segments: Segments | None = None

    @property
    def has_indices(self) -> bool:
        """Whether `labels` are class indices, rather than class probabilities."""
        return jnp.issubdtype(self.labels.dtype, jnp.integer)


def _as_problem(
    logits: ArrayLike,
    labels: ArrayLike,
    weight: ArrayLike | None,
    *,
    ignore_index: int,
    label_smoothing: float,
    reduction: Reduction,
    per: Per,
    logit_adjustment: ArrayLike | None,
    where: ArrayLike | None,
    sample_weight: ArrayLike | None,
    segments: ArrayLike | None,
    num_segments: int | None,
    axis: int,
) -> Problem:
    """Check the arguments of a user, at trace time, and bring the class axis to the end."""
    logits = jnp.asarray(an_array("logits", logits))
    if logits.ndim == 0 or not -logits.ndim <= axis < logits.ndim:
        raise ValueError(
            f"logits of shape {logits.shape} have no class axis {axis}: give (..., C), or name it by axis="
        )
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(
            f"logits must be floating, got {logits.dtype}: convert them with logits.astype(jnp.float32)"
        )
    given = logits.shape
    logits = jnp.moveaxis(logits, axis, -1)
    rows, classes = logits.shape[:-1], logits.shape[-1]
    if classes == 0:
        raise ValueError(f"logits must have at least one class, got shape {given}")
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    class_weight = as_class_weight(weight, classes, dtype)
    adjustment = by_class("logit_adjustment", logit_adjustment, classes, dtype)
    mask = as_mask(where, rows)
    packed = as_segments(segments, num_segments, per, rows)
    of_samples = rows if per == "element" or packed is not None else rows[:1]
    if packed is not None:
        mask, sample_weight = packed.mask(mask), packed.to_targets("sample_weight", sample_weight)
    given_measure = as_measure(sample_weight, of_samples, dtype, reduction)
    if given_measure is not None:
        missing = (1,) * (len(rows) - given_measure.ndim)
        given_measure = jnp.broadcast_to(given_measure.reshape(given_measure.shape + missing), rows)
    measure = masked_measure(mask, given_measure, dtype)
    takes_part = None if measure is None else measure != 0
    values = an_array("labels", labels)
    values = values if isinstance(values, np.ndarray) else jnp.asarray(values)
    if jnp.issubdtype(values.dtype, jnp.floating):
        if values.shape == rows and values.shape != given:
            raise TypeError(
                f"labels of shape {values.shape} must be class indices, integers, got {values.dtype}"
            )
        if values.shape != given:
            raise ValueError(_label_shape(given, rows, values.shape, axis))
        if ignore_index >= 0:
            raise ValueError(
                f"ignore_index does not apply to class probabilities, got {ignore_index}: leave it out"
            )
        probabilities = jnp.moveaxis(jnp.asarray(values), axis, -1)
        return Problem(logits, probabilities, class_weight, label_smoothing, measure, adjustment, packed)
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise TypeError(
            f"labels must be integers (class indices) or floats (class probabilities), got {values.dtype}"
        )
    if values.shape != rows:
        if values.shape == given:
            raise TypeError(
                f"labels of the logits' shape must be floating class probabilities, got {values.dtype}: "
                "convert one-hot labels with labels.astype(logits.dtype)"
            )
        raise ValueError(_label_shape(given, rows, values.shape, axis))
    refuse_out_of_range(values, classes, ignore_index, takes_part)
    codes = encode(values, classes, ignore_index, takes_part)
    measure = masked_measure(codes != IGNORED, given_measure, dtype)
    return Problem(logits, codes, class_weight, label_smoothing, measure, adjustment, packed)


def _losses_of(problem: Problem) -> jax.Array:
    """The loss of each target in the accumulator's dtype, differentiable; 0 where a target does not count."""
    logits, labels, class_weight, smoothing, measure, adjustment, _ = problem
    logits = adjusted(logits, adjustment)
    if problem.has_indices:
        return index_losses(logits, labels, class_weight, smoothing)
    counted = None if measure is None else measure != 0
    return probability_losses(logits, labels, class_weight, smoothing, counted)


def _normalizers_of(problem: Problem) -> jax.Array:
    """The logsumexp of the logits of each target; 0 where a target does not count."""
    counted = None if problem.measure is None else problem.measure != 0
    return log_normalizers(adjusted(problem.logits, problem.adjustment), counted)


def _extras_of(problem: Problem, names: tuple[str, ...]) -> Extras:
    """The results that `names` lists, of the logits of each target."""
    label = problem.labels if problem.has_indices else jnp.argmax(problem.labels, axis=-1)
    counted = None if problem.measure is None else problem.measure != 0
    return extras_of(names, adjusted(problem.logits, problem.adjustment), label, counted)


def _divisor_of(problem: Problem) -> jax.Array:
    """What "mean" divides by: the class weights of the targets that count, or their number, times `p`."""
    if problem.measure is None:
        dtype = jnp.promote_types(problem.logits.dtype, jnp.float32)
        return jnp.full((), np.prod(problem.logits.shape[:-1]), dtype)
    if problem.class_weight is None or not problem.has_indices:
        return jnp.sum(problem.measure)
    own = problem.class_weight[jnp.maximum(problem.labels, 0)]
    return jnp.sum(jnp.where(problem.measure != 0, problem.measure * own, 0))


def _native_misfit(problem: Problem, axis: int) -> str:
    """What of the logits and labels the Rust kernel does not serve; empty if nothing."""
    if not problem.has_indices:
        return "class probabilities"
    if axis not in (-1, problem.logits.ndim - 1):
        return f"axis={axis}, which is not the last"
    if problem.logits.dtype not in _NATIVE_DTYPES:
        return f"logits of dtype {problem.logits.dtype}"
    return ""


_NATIVE_DTYPES = (jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16)


def _native_objective(
    problem: Problem,
    weighting: Weighting,
    reduction: Reduction,
    axis_name: AxisName,
    *,
    z_loss: jax.Array | None,
    normalizer: jax.Array | None,
) -> jax.Array:
    divisor = psum(_divisor_of(problem), axis_name) if normalizer is None else normalizer
    total = _ffi.cross_entropy_sum(
        problem.logits,
        problem.labels,
        weighting,
        measure=problem.measure,
        factor=1 if reduction == "sum" else 1 / divisor,
        smoothing=problem.smoothing,
        adjustment=problem.adjustment,
        z_loss=z_loss,
    )
    return psum(total, axis_name)


def _label_shape(given: tuple[int, ...], rows: tuple[int, ...], got: tuple[int, ...], axis: int) -> str:
    hint = ""
    if len(given) > 2 and got == given[:1] + given[2:] and axis in (-1, len(given) - 1):
        hint = "; if the class axis is the second, as in torch, give axis=1"
    return (
        f"labels must have shape {rows} (class indices) or {given} (class probabilities) for logits of shape "
        f"{given} with class axis {axis}, got {got}{hint}"
    )
