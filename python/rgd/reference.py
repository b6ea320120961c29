"""The equations of Re-weighted Gradient Descent as written, in float64 NumPy: the oracle of the tests.

Nothing here is quick. Each function is its equation, so that it can be read beside the paper and checked by
eye; the kernels are tested against it. With losses `l_1..l_n` the weights are

    KL(tau, scale):             w_i = exp(scale * min(l_i, tau))
    KL(..., normalize=True):    w_i = exp(scale * min(l_i, tau)) / mean_j exp(scale * min(l_j, tau))
    KLBall(radius):             w = n * argmax_q sum_i q_i * l_i  subject to  sum_i q_i * log(n * q_i) <=
    radius

and the objective is `(1/n) * sum_i w_i * l_i`, with the weights taken as constants.

References:
    Kumar, Majmundar, Nagaraj, Suggala, "Stochastic Re-weighted Gradient Descent via Distributionally Robust
    Optimization", TMLR 2024, arXiv 2306.09222.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from rgd.diagnostics import WeightStats
from rgd.weightings import KL, KLBall, Weighting

__all__ = [
    "cross_entropy",
    "cross_entropy_grad",
    "cross_entropy_losses",
    "reweighted_mean",
    "sample_weights",
    "weight_stats",
]

Array: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]
Reduction: TypeAlias = Literal["none", "mean", "sum"]
Per: TypeAlias = Literal["element", "sample"]


def sample_weights(losses: npt.ArrayLike, weighting: Weighting, where: npt.ArrayLike | None = None) -> Array:
    """The weight of each sample, by the equations at the head of this module.

    A NaN loss makes its own pointwise weight NaN, and all weights of a batch that are normalised or from a
    ball. An infinite loss has a finite weight where it is clipped; where it is not, weights that are
    normalised or from a ball are all NaN. `scale=0` and `radius=0` give exactly 1 for every loss that is not
    NaN.

    Args:
        losses: Losses, any shape but (), any real dtype; computed with in float64.
        weighting: Turns losses into weights.
        where: Booleans that broadcast to the losses' shape. A loss where it is False has weight 0 and takes
            no part in the others' weights.

    Returns:
        Weights, float64, of the losses' shape.

    Raises:
        ValueError: If `losses` is a scalar.

    Example:
        >>> import numpy as np, rgd
        >>> sample_weights(np.array([0.0, 1.0, 5.0]), rgd.KL(tau=1.0)).round(4)
        array([1.    , 1.6487, 1.6487])

    References:
        Kumar et al., Algorithm 1 (pointwise), Proposition 3.1 (normalised, tau infinite) and section 3
        (ball).
    """
    losses = _per_sample("losses", losses)
    weights = np.zeros(losses.shape)
    taking_part = _mask(where, losses.shape)
    weights[taking_part] = _weights(losses[taking_part], weighting)
    return weights


def reweighted_mean(losses: npt.ArrayLike, weighting: Weighting, where: npt.ArrayLike | None = None) -> float:
    """The objective `(1/n) * sum_i w_i * l_i` over the losses that take part.

    Args:
        losses: Losses, any shape but (), any real dtype; computed with in float64.
        weighting: Turns losses into weights.
        where: Booleans that broadcast to the losses' shape: which losses take part, and are counted in `n`.

    Returns:
        The objective; NaN where no loss takes part.

    Raises:
        ValueError: If `losses` is a scalar.

    Example:
        >>> import numpy as np, rgd
        >>> round(reweighted_mean(np.array([0.0, 2.0]), rgd.KL(tau=1.0)), 6)
        1.648721

    References:
        Kumar et al., Algorithm 1.
    """
    losses = _per_sample("losses", losses)
    taking_part = _mask(where, losses.shape)
    weights = sample_weights(losses, weighting, taking_part)
    with np.errstate(invalid="ignore", over="ignore"):
        total = float(np.sum(weights[taking_part] * losses[taking_part]))
    return _quotient(total, float(np.count_nonzero(taking_part)))


def weight_stats(
    losses: npt.ArrayLike, weights: npt.ArrayLike, weighting: Weighting | None = None
) -> WeightStats:
    """The diagnostics of a set of weights, each by its formula in `WeightStats`.

    Args:
        losses: Losses `l`, any shape but (), any real dtype; computed with in float64.
        weights: Weights `w`, of the same shape.
        weighting: What the weights came from; None leaves `clipped_share` unknown.

    Returns:
        The statistics.

    Raises:
        ValueError: If `losses` is a scalar, or the shapes differ.

    Example:
        >>> import numpy as np
        >>> weight_stats(np.array([1.0, 3.0]), np.array([1.0, 1.0])).mean_loss
        2.0
    """
    losses, weights = _per_sample("losses", losses), np.asarray(weights, dtype=np.float64)
    if losses.shape != weights.shape:
        raise ValueError(f"weights must have the shape of losses, {losses.shape}, got {weights.shape}")
    count = losses.size
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        share = weights / np.sum(weights)
        logarithm = np.log(np.where(share == 0, 1.0, count * share))
        clipped_share = None
        if isinstance(weighting, KL) and math.isfinite(weighting.tau):
            clipped_share = _quotient(float(np.sum(losses > weighting.tau)), count)
        elif weighting is not None:
            clipped_share = 0.0
        return WeightStats(
            mean_loss=_quotient(float(np.sum(losses)), count),
            objective=_quotient(float(np.sum(weights * losses)), count),
            effective_sample_size=_quotient(float(np.sum(weights)) ** 2, float(np.sum(weights**2))),
            kl_to_uniform=float(np.sum(share * logarithm)) if count else math.nan,
            max_weight=float(np.max(weights)) if count else math.nan,
            clipped_share=clipped_share,
            count=count,
        )


def cross_entropy_losses(
    logits: npt.ArrayLike,
    target: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Array:
    """The loss of each target, as `torch.nn.functional.cross_entropy(..., reduction="none")` gives it.

    With `p = softmax(logits)` over the class axis, class weights `c` and label smoothing `e`, a class index
    `y` costs

        l = -(1 - e) * c_y * log p_y - (e / C) * sum_k c_k * log p_k

    and class probabilities `t` cost `l = -sum_k c_k * ((1 - e) * t_k + e / C) * log p_k`.

    Args:
        logits: (C,), (N, C) or (N, C, d1, ..., dk), any real dtype; computed with in float64.
        target: Class indices, integers of the logits' shape without the class axis; or class probabilities,
            floats of the logits' shape.
        weight: Class weights (C,); None for ones.
        ignore_index: The class index whose loss is 0.
        label_smoothing: Share of the target spread over all classes, in [0, 1].

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
    return _problem(logits, target, weight, ignore_index, label_smoothing).losses


def cross_entropy(
    logits: npt.ArrayLike,
    target: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    weighting: Weighting = KL(),  # noqa: B008
    per: Per = "element",
) -> Array:
    """The re-weighted cross-entropy, reduced as `torch.nn.CrossEntropyLoss` reduces.

    With `l_i` from `cross_entropy_losses` and `w_i` its weight, "none" is `w_i * l_i`, "sum" is `sum_i w_i *
    l_i`, and "mean" is `sum_i w_i * l_i / sum_i c_{y_i}` over targets not ignored, or `sum_i w_i * l_i / (N *
    d1 * ... * dk)` for class probabilities.

    Args:
        logits: (C,), (N, C) or (N, C, d1, ..., dk), any real dtype; computed with in float64.
        target: Class indices, integers of the logits' shape without the class axis; or class probabilities,
            floats of the logits' shape.
        weight: Class weights (C,); None for ones.
        ignore_index: The class index that counts for nothing.
        label_smoothing: Share of the target spread over all classes, in [0, 1].
        reduction: "none", "mean" or "sum".
        weighting: Turns losses into weights. Ignored targets take no part.
        per: "element" weights each target by its own loss; "sample" weights all targets of a sample of the
            leading dimension by the mean of their losses, over targets not ignored. One that is all ignored
            has weight 0.

    Returns:
        The objective, float64: shape () or, for "none", the logits' shape without the class axis. With every
        target ignored, "mean" is NaN.

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
    problem = _problem(logits, target, weight, ignore_index, label_smoothing)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        weighted = _loss_weights(problem, weighting, per) * problem.losses
        weighted = np.where(problem.counted, weighted, 0.0)
        if reduction == "none":
            return weighted
        return np.sum(weighted) / _denominator(problem, reduction)


def cross_entropy_grad(
    logits: npt.ArrayLike,
    target: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    weighting: Weighting = KL(),  # noqa: B008
    per: Per = "element",
) -> Array:
    """The gradient of `cross_entropy` with respect to the logits, the weights `w_i` held constant.

    A class index `y` gives the logit of class `k`

        dl/dz_k = (1 - e) * c_y * (p_k - [k = y]) + (e / C) * (p_k * sum_j c_j - c_k)

    and class probabilities `t`, smoothed to `t'_k = (1 - e) * t_k + e / C`, give it
    `dl/dz_k = p_k * sum_j c_j * t'_j - c_k * t'_k`; both times `w_i` and, for "mean", over its denominator.

    Args:
        logits: (C,), (N, C) or (N, C, d1, ..., dk), any real dtype; computed with in float64.
        target: Class indices or class probabilities, as in `cross_entropy`.
        weight: Class weights (C,); None for ones.
        ignore_index: The class index that counts for nothing.
        label_smoothing: Share of the target spread over all classes, in [0, 1].
        reduction: "none" (the gradient of the sum of the elements), "mean" or "sum".
        weighting: Turns losses into weights.
        per: "element" or "sample", as in `cross_entropy`.

    Returns:
        The gradient, float64, of the logits' shape; 0 for an ignored target, NaN where its logits hold NaN.

    Raises:
        ValueError, TypeError, IndexError: As `cross_entropy`.

    Example:
        >>> import numpy as np, rgd
        >>> cross_entropy_grad(np.zeros(2), np.array(1), weighting=rgd.KL(scale=0.0))
        array([ 0.5, -0.5])

    References:
        Kumar et al., Algorithm 1: the step `sum_i w_i * grad l_i / n`.
    """
    problem = _problem(logits, target, weight, ignore_index, label_smoothing)
    weights = np.expand_dims(_loss_weights(problem, weighting, per), problem.class_axis)
    counted = np.expand_dims(problem.counted, problem.class_axis)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        gradient = weights * problem.gradients / _denominator(problem, reduction)
        return np.where(counted, gradient, 0.0 * problem.gradients)


def _weights(losses: Array, weighting: Weighting) -> Array:
    """Weights of a vector of losses that all take part."""
    if isinstance(weighting, KLBall):
        return _ball_weights(losses, weighting.radius)
    exponent = _clipped_exponent(losses, weighting)
    with np.errstate(over="ignore", invalid="ignore"):
        if not weighting.normalize:
            return np.exp(exponent)
        if not exponent.size:
            return exponent
        unnormalised = np.exp(exponent - np.max(exponent))
        return unnormalised / np.mean(unnormalised)


def _clipped_exponent(losses: Array, weighting: KL) -> Array:
    """`scale * min(losses, tau)`; 0 for `scale=0`, also where a loss is infinite."""
    if weighting.effective_scale == 0:
        return np.where(np.isnan(losses), np.nan, 0.0)
    with np.errstate(over="ignore"):
        return weighting.effective_scale * np.minimum(losses, weighting.tau)


def _ball_weights(losses: Array, radius: float) -> Array:
    """`n * q` with `q = softmax(losses / gamma)` and `KL(q || uniform) = radius`, solved for `1 / gamma`.

    The divergence grows with `1 / gamma` from 0 to `log(n / m)`, `m` the number of largest losses: double or
    halve until the root is enclosed, then bisect until no number lies between.
    """
    if not losses.size:
        return losses
    largest = losses == np.max(losses)
    if not np.any(np.isnan(losses)) and (radius == 0 or np.all(largest)):
        return np.ones(losses.shape)
    if not np.all(np.isfinite(losses)):
        return np.full(losses.shape, np.nan)
    on_largest = np.where(largest, losses.size / np.count_nonzero(largest), 0.0)
    if radius >= math.log(losses.size / np.count_nonzero(largest)):
        return on_largest

    # The weights depend on losses up to a shift and a positive factor; gaps of at most 1 cannot overflow.
    halves = losses / 2
    gaps = (halves - np.max(halves)) / (np.max(halves) - np.min(halves))
    below, above = 0.0, 1.0
    while _ball_divergence(gaps, above) < radius:
        below, above = above, 2 * above
        if not np.any(np.exp(below * gaps[~largest])):
            return on_largest
    while below == 0 and _ball_divergence(gaps, above / 2) >= radius:
        above /= 2
    below = max(below, above / 2)
    while below < (middle := (below + above) / 2) < above:
        below, above = (middle, above) if _ball_divergence(gaps, middle) < radius else (below, middle)
    unnormalised = np.exp(above * gaps)
    return unnormalised / np.mean(unnormalised)


def _ball_divergence(gaps: Array, inverse_gamma: float) -> float:
    """`KL(q || uniform)` of `q = softmax(gaps * inverse_gamma)`, with largest gap 0.

    Equal to `mean(w * log(w) - w + 1)` with `w = n * q`, where no term is negative and none cancels another.
    Near `u = log(w) = 0` the term is summed as its series, `sum_k u^k * (k - 1) / k!` from `k = 2`.
    """
    exponent = inverse_gamma * gaps
    logarithm = exponent - math.log1p(float(np.mean(np.expm1(exponent))))
    near = np.abs(logarithm) < 0.1
    term = np.where(near, 0.0, logarithm * np.exp(logarithm) - np.expm1(logarithm))
    small = np.where(near, logarithm, 0.0)
    for k in range(2, 14):
        term += small**k * ((k - 1) / math.factorial(k))
    return float(np.mean(term))


class _Problem(NamedTuple):
    """A cross-entropy before its losses are weighted."""

    losses: Array
    """One a target; 0 where it is ignored."""
    gradients: Array
    """d losses / d logits, of the logits' shape."""
    counted: Mask
    """Which targets are not ignored."""
    denominator: float
    """What "mean" divides by."""
    class_axis: int


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def _problem(
    logits: npt.ArrayLike,
    target: npt.ArrayLike,
    weight: npt.ArrayLike | None,
    ignore_index: int,
    label_smoothing: float,
) -> _Problem:
    logits = np.asarray(logits, dtype=np.float64)
    target = np.asarray(target)
    if logits.ndim == 0:
        raise ValueError("logits must have a class axis, as in (C,) or (N, C), got a scalar")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    class_axis = 0 if logits.ndim == 1 else 1
    classes = logits.shape[class_axis]
    weight = np.ones(classes) if weight is None else np.asarray(weight, dtype=np.float64)
    if weight.shape != (classes,):
        raise ValueError(f"weight must have one entry a class, shape {(classes,)}, got {weight.shape}")

    rows = np.moveaxis(logits, class_axis, -1)
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
        denominator = float(losses.size)
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
        denominator = float(np.sum(weight[index[counted]]))
    losses = np.where(counted, losses, 0.0)
    return _Problem(
        losses, np.moveaxis(gradients, -1, class_axis), np.asarray(counted), denominator, class_axis
    )


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
    losses = -own * np.sum(np.where(one_hot, log_p, 0.0), axis=-1)
    gradients = own[..., None] * (p - one_hot)
    if smoothing > 0:
        spread = -np.sum(weight * log_p, axis=-1)
        losses = (1 - smoothing) * losses + smoothing / classes * spread
        gradients = (1 - smoothing) * gradients + smoothing / classes * (p * np.sum(weight) - weight)
    return losses, gradients


def _soft_losses(log_p: Array, probabilities: Array, weight: Array, smoothing: float) -> tuple[Array, Array]:
    """Losses and d losses / d logits of class probabilities; the class axis is the last."""
    smoothed = (1 - smoothing) * probabilities + (smoothing / weight.size if smoothing else 0.0)
    losses = -np.sum(weight * smoothed * log_p, axis=-1)
    mass = np.sum(weight * smoothed, axis=-1, keepdims=True)
    return losses, np.exp(log_p) * mass - weight * smoothed


def _loss_weights(problem: _Problem, weighting: Weighting, per: Per) -> Array:
    """The weight of each target; 0 for one that is ignored."""
    losses, counted = problem.losses, problem.counted
    if per == "element":
        weights = sample_weights(np.ravel(losses), weighting, np.ravel(counted))
        return np.reshape(weights, losses.shape)
    if per != "sample":
        raise ValueError(f"per must be 'element' or 'sample', got {per!r}")
    samples = losses.shape[0] if losses.ndim else 1
    flat = (samples, math.prod(losses.shape[1:]))
    losses, counted = np.reshape(losses, flat), np.reshape(counted, flat)
    targets = np.count_nonzero(counted, axis=1)
    mean_loss = np.sum(losses, axis=1) / np.maximum(targets, 1)
    weights = sample_weights(mean_loss, weighting, targets > 0)
    return np.reshape(np.where(counted, weights[:, None], 0.0), problem.losses.shape)


def _denominator(problem: _Problem, reduction: Reduction) -> float:
    if reduction == "mean":
        return problem.denominator
    if reduction not in ("none", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    return 1.0


def _per_sample(name: str, losses: npt.ArrayLike) -> Array:
    losses = np.asarray(losses, dtype=np.float64)
    if losses.ndim == 0:
        raise ValueError(f'{name} is a scalar: weights need one loss a sample, as reduction="none" gives')
    return losses


def _mask(where: npt.ArrayLike | None, shape: tuple[int, ...]) -> Mask:
    return np.broadcast_to(np.asarray(True if where is None else where, dtype=np.bool_), shape)


def _quotient(numerator: float, denominator: float) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.float64(numerator) / np.float64(denominator))
