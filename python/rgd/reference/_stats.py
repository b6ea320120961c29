"""The statistics of a set of weights, each by its formula."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from rgd.reference._arrays import (
    Array,
    Integers,
    array_of,
    measure_of,
    one_a_sample,
    per_sample,
    product,
    quotient,
)
from rgd.stats import MOST_GROUPS, GroupStats, WeightStats
from rgd.weightings import Weighting


def weight_stats(
    losses: npt.ArrayLike,
    weights: npt.ArrayLike,
    weighting: Weighting | None = None,
    *,
    where: npt.ArrayLike | None = None,
    sample_weight: npt.ArrayLike | None = None,
    groups: npt.ArrayLike | None = None,
    reference: npt.ArrayLike | None = None,
) -> WeightStats:
    """The statistics of a set of weights, each by its formula in `WeightStats`.

    Args:
        losses: Losses `l`, any shape but (), any real dtype; computed with in float64.
        weights: Weights `w`, of the same shape.
        weighting: The weighting that made the weights; with None, `clipped_share` is None.
        where: Booleans that broadcast to the losses' shape: which samples take part.
        sample_weight: The measure `p`, as in `sample_weights`.
        groups: The group of each loss, as in `sample_weights`; None for no statistics of groups.
        reference: The losses of a reference model, whose excess an `Excess` clips.

    Returns:
        The statistics.

    Raises:
        ValueError: If `losses` is a scalar, the shapes differ, or `sample_weight` holds a number that is
            negative or not finite.

    Example:
        >>> import numpy as np
        >>> weight_stats(np.array([1.0, 3.0]), np.array([1.0, 1.0])).mean_loss
        2.0
    """
    losses, weights = per_sample("losses", losses), array_of("weights", weights, np.float64)
    if losses.shape != weights.shape:
        raise ValueError(f"weights must have the shape of losses, {losses.shape}, got {weights.shape}")
    part, measure = measure_of(losses.shape, where, sample_weight)
    group = None if groups is None else one_a_sample("groups", array_of("groups", groups), losses.shape)
    compared = 0.0 if reference is None else array_of("reference", reference, np.float64)[part]
    losses, w, p = losses[part], weights[part], measure[part]
    count, total = losses.size, float(np.sum(p))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        weight = float(np.sum(p * w))
        q = p * w / weight
        logarithm = np.log(np.where(q == 0, 1.0, q * total / p))
        clipped = None if weighting is None else 0.0
        if weighting is not None and weighting.clip < math.inf:
            clipped = quotient(float(np.sum(p * (losses - compared > weighting.clip))), total)
        return WeightStats(
            mean_loss=quotient(float(np.sum(p * losses)), total),
            worst_tenth=_worst_tenth(losses, p),
            objective=quotient(float(np.sum(p * product(w, losses, losses))), total),
            effective_sample_size=quotient(count * weight**2, total * float(np.sum(p * w**2))),
            kl_to_uniform=float(np.sum(q * logarithm)) if count else math.nan,
            max_weight=float(np.max(w)) if count else math.nan,
            clipped_share=clipped,
            count=count,
            mean_weight=quotient(weight, total),
            groups=None if group is None else _group_stats(losses, w, p, group[part]),
        )


def _worst_tenth(losses: Array, measure: Array) -> float:
    """The minimum over `eta` of `eta + total(p * max(0, l - eta)) / (0.1 * total(p))`.

    It is attained where a tenth of the measure lies above `eta`.

    That is the mean of the worst tenth (Rockafellar and Uryasev, 2000, theorem 1).
    """
    if not losses.size or np.any(np.isnan(losses)):
        return math.nan
    tenth = 0.1 * float(np.sum(measure))
    order = np.argsort(losses)
    above = float(np.sum(measure)) - np.cumsum(measure[order])
    eta = losses[order][np.argmax(above <= tenth)]
    excess = np.where(losses > eta, losses - eta, 0.0)
    return float(eta + np.sum(measure * excess) / tenth)


def _group_stats(losses: Array, weights: Array, measure: Array, groups: Integers) -> GroupStats:
    """`GroupStats` of the groups 0 to the largest; with numbers above a million, of groups that occur."""
    largest = int(np.max(groups, initial=-1))
    numbers = np.unique(groups).tolist() if largest >= MOST_GROUPS else range(largest + 1)
    members = [groups == group for group in numbers]
    weight = float(np.sum(measure * weights))
    return GroupStats(
        mean_loss=tuple(
            quotient(float(np.sum((measure * losses)[m])), float(np.sum(measure[m]))) for m in members
        ),
        weight_share=tuple(quotient(float(np.sum((measure * weights)[m])), weight) for m in members),
        count=tuple(int(np.count_nonzero(m)) for m in members),
        numbers=tuple(numbers) if largest >= MOST_GROUPS else None,
    )
