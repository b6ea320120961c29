"""The re-weighted cross-entropy and its gradient as written."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from rgd.reference._arrays import (
    Array,
    Mask,
    array_of,
    mask_of,
    measure_of,
    one_a_sample,
    product,
)
from rgd.reference._equations import State
from rgd.reference._weights import sample_weights
from rgd.weightings import KL, Weighting

Reduction: TypeAlias = Literal["none", "mean", "sum"]
Per: TypeAlias = Literal["element", "sample"]


def cross_entropy_losses(
    logits: npt.ArrayLike,
    target: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_adjustment: npt.ArrayLike | None = None,
    where: npt.ArrayLike | None = None,
) -> Array:
    """The loss of each target, as `torch.nn.functional.cross_entropy(..., reduction="none")` gives it.

    With `p = softmax(logits)` over the class axis, class weights `c` and label smoothing `e`, a class index
    `y` costs

        l = -(1 - e) * c_y * log p_y - (e / C) * sum_k c_k * log p_k

    and class probabilities `t` cost `l = -sum_k c_k * ((1 - e) * t_k + e / C) * log p_k`. 0 times -inf is 0
    in these products, where torch has NaN.

    Args:
        logits: (C,), (N, C) or (N, C, d1, ..., dk), any real dtype; computed with in float64.
        target: Class indices, integers of the logits' shape without the class axis; or class probabilities,
            floats of the logits' shape.
        weight: Class weights (C,); None for ones.
        ignore_index: The class index whose loss is 0.
        label_smoothing: Share of the target spread over all classes, in [0, 1].
        logit_adjustment: Numbers (C,) that are added to the logits; None for zeros.
        where: Booleans that broadcast to the losses' shape. The loss is 0 where it is False.

    Returns:
        Losses, float64, of the logits' shape without the class axis.

    Raises:
        ValueError: If shapes do not fit, `label_smoothing` is not in [0, 1], or `ignore_index` >= 0 is given
            with class probabilities.
        TypeError: If `target` is of another dtype than its shape asks for.
        IndexError: If a class index is out of range.

    Example:
        >>> import numpy as np
        >>> cross_entropy_losses(np.zeros((2, 4)), np.array([3, -100])).round(4)
        array([1.3863, 0.    ])
    """
    problem = problem_of(
        logits,
        target,
        weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        logit_adjustment=logit_adjustment,
        where=where,
    )
    return problem.losses


def cross_entropy(
    logits: npt.ArrayLike,
    target: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    weighting: Weighting = KL(),  # noqa: B008
    per: Per = "element",
    logit_adjustment: npt.ArrayLike | None = None,
    where: npt.ArrayLike | None = None,
    sample_weight: npt.ArrayLike | None = None,
    groups: npt.ArrayLike | None = None,
    normalizer: float | None = None,
    segments: npt.ArrayLike | None = None,
    num_segments: int | None = None,
    state: State = None,
    reference: npt.ArrayLike | None = None,
) -> Any:
    """The re-weighted cross-entropy, reduced as `torch.nn.CrossEntropyLoss` reduces.

    With `l` from `cross_entropy_losses`, `w` its weights, `p` the measure and `c[y]` the class weight of
    each target (1 for class probabilities), the value is

        p * w * l                              # reduction="none"
        total(p * w * l)                       # reduction="sum"
        total(p * w * l) / total(p * c[y])     # reduction="mean"

    with totals over the targets that take part. A weight of zero makes a product zero, also of an infinite
    loss. With a factor `z_loss` each `p * w * l` becomes

        p * w * l + p * z_loss * Z ** 2        # Z = log(sum(exp(logits))), of the logits as adjusted

    and the weights stay those of `l` alone.

    Args:
        logits: (C,), (N, C) or (N, C, d1, ..., dk), any real dtype; computed with in float64.
        target: Class indices, integers of the logits' shape without the class axis; or class probabilities,
            floats of the logits' shape.
        weight: Class weights (C,); None for ones.
        ignore_index: The class index of targets that do not count.
        label_smoothing: Share of the target spread over all classes, in [0, 1].
        z_loss: The factor of the square of the logsumexp, a number >= 0.
        reduction: "none", "mean" or "sum".
        weighting: Turns losses into weights. Ignored targets take no part.
        per: "element" weights each target by its own loss; "sample" weights all targets of a sample of the
            leading dimension by the mean of their losses, over targets not ignored. One that is all ignored
            has weight 0.
        logit_adjustment: Numbers (C,) that are added to the logits; None for zeros.
        where: Booleans that broadcast to the losses' shape. A target is ignored where it is False.
        sample_weight: The measure `p`, finite numbers >= 0, one a sample of the leading dimension or,
            with `per="element"`, one a target. A target is ignored where it is 0.
        groups: The group of each sample or target, integers shaped as `sample_weight`.
        normalizer: A positive number that "mean" divides by instead of `total(p * c[y])`.
        segments: With `per="sample"`, the number of the sequence in its row that a target belongs to,
            integers of the targets' shape; targets with -1 are ignored. Targets of a row with the same number
            share the weight of their mean loss. `sample_weight` and `groups` then have this shape, or (rows,
            numbers).
        num_segments: How many numbers a row has; None for one more than the largest.
        state: State of a weighting that remembers.
        reference: The losses of a reference model, for `Excess`, of the losses' shape. With `per="sample"`
            the means over targets not ignored are compared.

    Returns:
        The objective, float64: shape () or, for "none", the logits' shape without the class axis; with a
        state, the objective and the state after it. If every target is ignored or has
        class weight 0, "mean" is NaN.

    Raises:
        ValueError: As `cross_entropy_losses`, and if `reduction` or `per` is none of the above.
        TypeError: If `target` is of another dtype than its shape asks for.
        IndexError: If a class index is out of range.

    Example:
        >>> import numpy as np, rgd
        >>> logits, target = np.array([[2.0, 0.0], [0.0, 2.0]]), np.array([0, 0])
        >>> print(cross_entropy(logits, target, weighting=rgd.KL(scale=0.0)).round(6))
        1.126928
        >>> print(cross_entropy(logits, target, weighting=rgd.KL(tau=1.0)).round(6))
        1.820978

    References:
        Kumar et al., Algorithm 1 and section 3.
    """
    problem = problem_of(
        logits,
        target,
        weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        logit_adjustment=logit_adjustment,
        where=where,
    )
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be a finite number >= 0, got {z_loss}")
    weights, measure, after = _target_weights(
        problem,
        weighting,
        per,
        sample_weight=sample_weight,
        groups=groups,
        units=_units(segments, num_segments, per, problem.losses.shape),
        state=state,
        reference=reference,
    )
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        value = product(weights, problem.losses, problem.losses)
        if z_loss > 0:
            value = value + z_loss * problem.normalizers**2
        value = np.where(measure > 0, measure * value, 0.0)
        denominator = _denominator(problem, measure, reduction, normalizer)
        if reduction != "none":
            value = np.sum(value) / denominator
    return value if state is None else (value, after)


def cross_entropy_grad(
    logits: npt.ArrayLike,
    target: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    weighting: Weighting = KL(),  # noqa: B008
    per: Per = "element",
    logit_adjustment: npt.ArrayLike | None = None,
    where: npt.ArrayLike | None = None,
    sample_weight: npt.ArrayLike | None = None,
    groups: npt.ArrayLike | None = None,
    normalizer: float | None = None,
    segments: npt.ArrayLike | None = None,
    num_segments: int | None = None,
    state: State = None,
    reference: npt.ArrayLike | None = None,
) -> Any:
    """The gradient of `cross_entropy` with respect to the logits, the weights `w_i` held constant.

    A class index `y` gives the logit of class `k`

        dl/dz_k = (1 - e) * c_y * (p_k - [k = y]) + (e / C) * (p_k * sum_j c_j - c_k)

    with `p = softmax(logits)`. Class probabilities `t`, smoothed to `t'_k = (1 - e) * t_k + e / C`, give
    `dl/dz_k = p_k * sum_j c_j * t'_j - c_k * t'_k`. Both are multiplied by the target's weight and measure
    and, for "mean", divided by its denominator. A factor `z_loss` adds `2 * z_loss * Z * p_k` times the
    measure, over the same denominator.

    Args:
        logits: (C,), (N, C) or (N, C, d1, ..., dk), any real dtype; computed with in float64.
        target: Class indices or class probabilities, as in `cross_entropy`.
        weight: Class weights (C,); None for ones.
        ignore_index: The class index of targets that do not count.
        label_smoothing: Share of the target spread over all classes, in [0, 1].
        z_loss: As in `cross_entropy`.
        reduction: "none" (the gradient of the sum of the elements), "mean" or "sum".
        weighting: Turns losses into weights.
        per: "element" or "sample", as in `cross_entropy`.
        logit_adjustment: As in `cross_entropy`, and so are the next seven.
        where: Which targets take part.
        sample_weight: The measure.
        groups: The group of each sample or target.
        normalizer: The number that "mean" divides by.
        segments: The sequence of each target.
        num_segments: How many a row has.
        state: State of a weighting that remembers.
        reference: The losses of a reference model, for `Excess`, of the losses' shape. With `per="sample"`
            the means over targets not ignored are compared.

    Returns:
        The gradient, float64, of the logits' shape; with a state, the gradient and the state after it. For a
        target that takes no part it is 0, or NaN where its logits hold NaN.

    Raises:
        ValueError, TypeError, IndexError: As `cross_entropy`.

    Example:
        >>> import numpy as np, rgd
        >>> cross_entropy_grad(np.zeros(2), np.array(1), weighting=rgd.KL(scale=0.0))
        array([ 0.5, -0.5])

    References:
        Kumar et al., Algorithm 1: the step `sum_i w_i * grad l_i / n`.
    """
    problem = problem_of(
        logits,
        target,
        weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        logit_adjustment=logit_adjustment,
        where=where,
    )
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be a finite number >= 0, got {z_loss}")
    weights, measure, after = _target_weights(
        problem,
        weighting,
        per,
        sample_weight=sample_weight,
        groups=groups,
        units=_units(segments, num_segments, per, problem.losses.shape),
        state=state,
        reference=reference,
    )
    denominator = _denominator(problem, measure, reduction, normalizer)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        w, p, loss = (np.expand_dims(x, problem.class_axis) for x in (weights, measure, problem.losses))
        gradient = product(w, problem.gradients, loss)
        if z_loss > 0:
            normalizers = np.expand_dims(problem.normalizers, problem.class_axis)
            gradient = gradient + 2 * z_loss * normalizers * problem.softmax
        gradient = p * gradient / denominator
        gradient = np.where(p > 0, gradient, 0.0 * problem.gradients)
    return gradient if state is None else (gradient, after)


class _Problem(NamedTuple):
    """A cross-entropy before its losses are weighted."""

    losses: Array
    """One a target; 0 where it is ignored."""
    gradients: Array
    """d losses / d logits, of the logits' shape."""
    counted: Mask
    """Which targets are neither ignored nor masked."""
    class_weights: Array
    """The class weight of each target; 1 for class probabilities."""
    normalizers: Array
    """The logsumexp of the logits, as adjusted, of each target."""
    softmax: Array
    """The derivatives of `normalizers`, of the logits' shape."""
    class_axis: int
    entropy: Array
    """The entropy of `softmax`, of each target; 0 where it does not count."""


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def problem_of(
    logits: npt.ArrayLike,
    target: npt.ArrayLike,
    weight: npt.ArrayLike | None,
    *,
    ignore_index: int,
    label_smoothing: float,
    logit_adjustment: npt.ArrayLike | None,
    where: npt.ArrayLike | None,
) -> _Problem:
    logits = array_of("logits", logits, np.float64)
    target = array_of("target", target)
    if logits.ndim == 0:
        raise ValueError("logits must have a class axis, as in (C,) or (N, C), got a scalar")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    class_axis = 0 if logits.ndim == 1 else 1
    classes = logits.shape[class_axis]
    weight = np.ones(classes) if weight is None else array_of("weight", weight, np.float64)
    if weight.shape != (classes,):
        raise ValueError(f"weight must have one entry a class, shape {(classes,)}, got {weight.shape}")
    adjustment = (
        np.zeros(classes)
        if logit_adjustment is None
        else array_of("logit_adjustment", logit_adjustment, np.float64)
    )
    if adjustment.shape != (classes,):
        raise ValueError(
            f"logit_adjustment must have one entry a class, shape {(classes,)}, got {adjustment.shape}"
        )

    rows = np.moveaxis(logits, class_axis, -1) + adjustment
    log_p = _log_softmax(rows)
    if target.shape == logits.shape:
        if target.dtype.kind != "f":
            raise TypeError(
                f"target of the logits' shape must be floating class probabilities, got {target.dtype}"
            )
        if ignore_index >= 0:
            raise ValueError(f"ignore_index does not apply to class probabilities, got {ignore_index}")
        probabilities = np.moveaxis(target.astype(np.float64), class_axis, -1)
        losses, gradients = _soft_losses(log_p, probabilities, weight, label_smoothing)
        counted = np.ones(losses.shape, dtype=np.bool_)
        class_weights = np.ones(losses.shape)
    else:
        if target.dtype.kind not in "iu":
            raise TypeError(f"target must be integer class indices, got {target.dtype}")
        if target.shape != rows.shape[:-1]:
            raise ValueError(
                f"target must have shape {rows.shape[:-1]} (class indices) or {logits.shape} "
                f"(class probabilities), got {target.shape}"
            )
        counted = target != ignore_index
        outside = counted & ((target < 0) | (target >= classes))
        if np.any(outside):
            position = tuple(int(i) for i in np.argwhere(outside)[0])
            raise IndexError(f"target {target[position]} at {position} is out of range for {classes} classes")
        index = np.where(counted, target, 0)
        losses, gradients = _hard_losses(log_p, index, weight, label_smoothing)
        class_weights = weight[index] if classes else np.zeros(index.shape)
    counted = np.asarray(counted & mask_of(where, losses.shape))
    losses = np.where(counted, losses, 0.0)
    largest = np.max(rows, axis=-1, initial=-np.inf)
    normalizers = largest + np.log(np.sum(np.exp(rows - largest[..., None]), axis=-1))
    gradients, softmax = (np.moveaxis(x, -1, class_axis) for x in (gradients, np.exp(log_p)))
    q = np.exp(log_p)
    entropy = np.where(counted, -np.sum(np.where(q == 0, 0.0, q * np.log(q)), axis=-1), 0.0)
    return _Problem(losses, gradients, counted, class_weights, normalizers, softmax, class_axis, entropy)


def _log_softmax(rows: Array) -> Array:
    if not rows.size:
        return rows
    shifted = rows - np.max(rows, axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


def _hard_losses(
    log_p: Array, index: npt.NDArray[np.int_], weight: Array, smoothing: float
) -> tuple[Array, Array]:
    """Losses and d losses / d logits of class indices; the class axis is the last."""
    classes = weight.size
    one_hot = np.arange(classes) == index[..., None]
    p = np.exp(log_p)
    own = weight[index] if classes else np.zeros(index.shape)
    on_label = (1 - smoothing) * own
    losses = -np.sum(_times(on_label[..., None] * one_hot, log_p), axis=-1)
    gradients = own[..., None] * (p - one_hot)
    if smoothing > 0:
        losses = losses - smoothing / classes * np.sum(_times(weight, log_p), axis=-1)
        gradients = (1 - smoothing) * gradients + smoothing / classes * (p * np.sum(weight) - weight)
    return losses, gradients


def _soft_losses(log_p: Array, probabilities: Array, weight: Array, smoothing: float) -> tuple[Array, Array]:
    """Losses and d losses / d logits of class probabilities; the class axis is the last."""
    smoothed = (1 - smoothing) * probabilities + (smoothing / weight.size if smoothing else 0.0)
    losses = -np.sum(_times(weight * smoothed, log_p), axis=-1)
    mass = np.sum(weight * smoothed, axis=-1, keepdims=True)
    return losses, np.exp(log_p) * mass - weight * smoothed


def _times(mass: Array, log_p: Array) -> Array:
    """`mass * log_p`, where a mass of 0 times -inf is 0."""
    return mass * np.where((mass == 0) & np.isneginf(log_p), 0.0, log_p)


def _target_weights(
    problem: _Problem,
    weighting: Weighting,
    per: Per,
    *,
    sample_weight: npt.ArrayLike | None,
    groups: npt.ArrayLike | None,
    units: _Units | None,
    state: State,
    reference: npt.ArrayLike | None,
) -> tuple[Array, Array, State]:
    """The weight and the measure of each target, 0 for one that takes no part, and the state after."""
    losses, counted = problem.losses, problem.counted
    compared = None if reference is None else array_of("reference", reference, np.float64)
    if compared is not None:
        if compared.shape != losses.shape:
            raise ValueError(f"reference must have the losses' shape, {losses.shape}, got {compared.shape}")
        compared = np.where(counted, compared, 0.0)
    beside: dict[str, Array | None] = {"reference": compared, "entropy": problem.entropy}
    classes = problem.softmax.shape[problem.class_axis]
    if units is not None:
        return _segment_weights(
            losses,
            counted,
            weighting,
            units,
            sample_weight=sample_weight,
            groups=groups,
            state=state,
            beside=beside,
            classes=classes,
        )
    if per == "element":
        shape, means, part = losses.shape, losses, counted
    elif per == "sample":
        shape = losses.shape[:1]
        axes = tuple(range(1, losses.ndim))
        number = np.count_nonzero(counted, axis=axes)
        means, part = np.sum(losses, axis=axes) / np.maximum(number, 1), number > 0
        beside = {
            name: None if one is None else np.sum(one, axis=axes) / np.maximum(number, 1)
            for name, one in beside.items()
        }
    else:
        raise ValueError(f"per must be 'element' or 'sample', got {per!r}")
    part, measure = measure_of(shape, part, sample_weight)
    group = None if groups is None else np.ravel(one_a_sample("groups", array_of("groups", groups), shape))
    result = sample_weights(
        np.ravel(means),
        weighting,
        np.ravel(part),
        sample_weight=np.ravel(measure),
        groups=group,
        state=state,
        classes=classes,
        **{name: None if one is None else np.ravel(one) for name, one in beside.items()},
    )
    weights, after = (result, None) if state is None else result
    weights, measure = (
        one_a_sample("weights", np.reshape(x, shape), losses.shape) for x in (weights, measure)
    )
    return np.where(counted, weights, 0.0), np.where(counted, measure, 0.0), after


class _Units(NamedTuple):
    """The targets of each unit, masks of the targets' shape, and the shape of the units."""

    members: list[Mask]
    shape: tuple[int, int]


def _units(
    segments: npt.ArrayLike | None, number: int | None, per: Per, shape: tuple[int, ...]
) -> _Units | None:
    if segments is None:
        return None
    given = array_of("segments", segments)
    if per != "sample" or given.shape != shape or given.dtype.kind not in "iu":
        raise ValueError(f"segments are integers of shape {shape}, with per='sample', got {given.shape}")
    number = int(np.max(given, initial=0)) + 1 if number is None else number
    if np.any((given < -1) | (given >= number)):
        raise ValueError(f"segments must lie between -1 and {number - 1}")
    rows = np.zeros(shape, int) if given.ndim == 1 else np.indices(shape)[0]
    count = 1 if given.ndim == 1 else shape[0]
    members = [(rows == row) & (given == unit) for row in range(count) for unit in range(number)]
    return _Units(members, (count, number))


def _segment_weights(
    losses: Array,
    counted: Mask,
    weighting: Weighting,
    units: _Units,
    *,
    sample_weight: npt.ArrayLike | None,
    groups: npt.ArrayLike | None,
    state: State,
    beside: dict[str, Array | None],
    classes: int,
) -> tuple[Array, Array, State]:
    """As `_target_weights`, where the segments of a row are its units."""

    def by_unit(name: str, values: npt.ArrayLike | None, otherwise: float) -> Array:
        if values is None:
            return np.full(len(units.members), otherwise)
        given = array_of(name, values)
        if given.shape == losses.shape:
            own = [given[members] for members in units.members]
            if any(np.any(one != one[0]) for one in own if one.size):
                raise ValueError(f"{name} must be constant within a segment")
            return np.array([one[0] if one.size else otherwise for one in own])
        if given.shape != units.shape:
            raise ValueError(f"{name} must have shape {losses.shape} or {units.shape}, got {given.shape}")
        return np.ravel(given)

    p, group = by_unit("sample_weight", sample_weight, 1.0), by_unit("groups", groups, 0)
    kept = [members & counted for members in units.members]
    filled: Mask = np.array([bool(np.any(one)) for one in kept], dtype=np.bool_)
    part, p = measure_of(p.shape, filled, p)
    means = np.array([np.mean(losses[one]) if np.any(one) else 0.0 for one in kept])
    given = None if groups is None else group.astype(int)
    of_each = {
        name: np.array([np.mean(values[one]) if np.any(one) else 0.0 for one in kept])
        for name, values in beside.items()
        if values is not None
    }
    result = sample_weights(
        means, weighting, part, sample_weight=p, groups=given, state=state, classes=classes, **of_each
    )
    of_units, after = (result, None) if state is None else result
    weights, measure = np.zeros(losses.shape), np.zeros(losses.shape)
    for one, w, mass in zip(kept, of_units, p, strict=True):
        weights[one], measure[one] = w, mass
    return weights, measure, after


def _denominator(problem: _Problem, measure: Array, reduction: Reduction, normalizer: float | None) -> float:
    """The divisor of a reduction, for a measure that is 0 where a target takes no part."""
    if normalizer is not None and not (reduction == "mean" and 0 < normalizer < math.inf):
        raise ValueError(f"normalizer must be a positive number, for 'mean', got {normalizer}")
    if reduction == "mean" and normalizer is not None:
        return normalizer
    if reduction == "mean":
        return float(np.sum(measure * problem.class_weights)) or math.nan
    if reduction not in ("none", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    return 1.0
