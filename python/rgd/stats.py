"""The statistics of a set of weights.

Each front computes `WeightStats` from the same sums over losses and weights. One kernel computes these sums
in one pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rgd.weightings import Weighting


@dataclasses.dataclass(frozen=True)
class GroupStats:
    """The statistics of the weights of each group, one entry a group from 0 on.

    If groups have numbers above a million, only those that take part have an entry, and `numbers` holds their
    numbers.

    Attributes:
        mean_loss: `sum(p * l) / sum(p)` over the group; NaN for a group that is absent.
        weight_share: The group's part of the weight, `sum(p * w)` over the group divided by that over all.
        count: How many samples of the group take part.
        numbers: The number of each entry's group, ascending; None for 0, 1, 2 and so on.
        extras: By name, the mean `sum(p * x) / sum(p)` over the group of each result of the logits that a
            loss of `rgd.torch` returns, as `returns=` names them; "correct" is then the accuracy. None where
            there are none.
    """

    mean_loss: Sequence[float]
    weight_share: Sequence[float]
    count: Sequence[int]
    # `static` tells JAX that these fields are not arrays.
    numbers: Sequence[int] | None = dataclasses.field(default=None, metadata={"static": True})
    extras: Mapping[str, Sequence[float]] | None = None


@dataclasses.dataclass(frozen=True)
class WeightStats:
    """How strongly a batch was re-weighted.

    With `l` the losses, `w` their weights, `p` the base measure (`sample_weight`, or ones) and `n` the number
    of samples that take part:

    Attributes:
        mean_loss: `sum(p * l) / sum(p)`, the objective of empirical risk minimization. Compare runs by it.
        worst_tenth: The mean of `l` over the worst tenth of the mass, with a part of the sample at its edge:
            `min over eta of eta + sum(p * max(0, l - eta)) / (0.1 * sum(p))`. None if only sums over
            several batches are known.
        objective: `sum(p * w * l) / sum(p)`, the objective of the re-weighted step. If the call had a
            `normalizer`, the sum is divided by it.
        effective_sample_size: `n * sum(p * w)^2 / (sum(p) * sum(p * w^2))`, from 1 (one sample has all the
            weight) to `n` (equal weights).
        kl_to_uniform: `sum(q * log(q / p'))` with `q = p * w / sum(p * w)` and `p' = p / sum(p)`, in nats,
            from 0 (equal weights) to `log(n)`.
        max_weight: `max(w)`.
        clipped_share: The share of losses above the weighting's clip, `sum(p * (l > clip)) / sum(p)`; 0.0 for
            a weighting that clips nothing, None where the weighting is not known.
        count: `n`.
        groups: The same for each group, where groups were given.
        mean_weight: `sum(p * w) / sum(p)`, which acts like a factor of the learning rate.

    Without samples, every share and mean is NaN. A NaN loss or weight makes every number that uses it NaN.

    Example:
        >>> import numpy as np, rgd
        >>> losses = np.array([0.0, 0.0, 3.0])
        >>> stats = rgd.weight_stats(losses, rgd.sample_weights(losses), rgd.KL())
        >>> print(stats)
        3 samples: mean loss 1, worst tenth 3, objective 1.649, ESS 2.822 (94.1%), KL 0.0302, max weight ...
    """

    mean_loss: float
    worst_tenth: float | None
    objective: float
    effective_sample_size: float
    kl_to_uniform: float
    max_weight: float
    clipped_share: float | None
    count: int
    groups: GroupStats | None = None
    mean_weight: float | None = None

    def keys(self) -> list[str]:
        """The names of the statistics. With this method `dict(stats)` gives all statistics by name."""
        return [field.name for field in dataclasses.fields(self)]

    def remarked(self, sentence: str) -> WeightStats:
        """The same statistics with one more sentence at the end of `advice()`."""
        copy = dataclasses.replace(self)
        object.__setattr__(copy, "_remark", sentence)
        return copy

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)

    def to_dict(self, prefix: str = "") -> dict[str, float]:
        """The statistics as numbers by name, for a logger; those that are not known are left out.

        Args:
            prefix: What the names begin with, such as "rgd/".

        Returns:
            Names and numbers; those of group 0 are named "group_0/mean_loss" and so on.

        Example:
            >>> import numpy as np, rgd
            >>> stats = rgd.weight_stats(np.array([1.0, 3.0]), np.ones(2))
            >>> stats.to_dict("rgd/")["rgd/mean_loss"]
            2.0
        """
        numbers = {f"{prefix}{name}": self[name] for name in self.keys() if name != "groups"}
        if self.groups is not None:
            named = self.groups.numbers or range(len(self.groups.count))
            columns: dict[str, Any] = {
                name: getattr(self.groups, name) for name in ("mean_loss", "weight_share", "count")
            }
            for name, column in {**columns, **(self.groups.extras or {})}.items():
                for group, value in zip(named, column, strict=True):
                    numbers[f"{prefix}group_{group}/{name}"] = value
        return {name: value for name, value in numbers.items() if value is not None}

    def advice(self) -> list[str]:
        """Sentences about problems that these statistics show; empty if there are none.

        It reports weights that are almost equal, because all losses are clipped or near zero, so that
        re-weighting has no effect; weights that are all near zero; most of the weight on a few samples, whose
        labels may be wrong; and, after a call of `RGDLoss`, logits that are probabilities.

        Example:
            >>> import numpy as np, rgd
            >>> losses = np.full(8, np.log(32000))  # of a fresh language model
            >>> stats = rgd.weight_stats(losses, rgd.sample_weights(losses), rgd.KL())
            >>> print(*stats.advice())
            All weights are equal: all losses are above the clip (tau). Re-weighting is then only a larger ...
        """
        remarks = [vars(self)["_remark"]] if "_remark" in vars(self) else []
        if (equal := self.no_effect()) is not None:
            return [equal, *remarks]
        share = quotient(self.effective_sample_size, self.count)
        if self.count >= 20 and share < 0.1:
            return [
                f"Most of the weight lies on few samples: {self.effective_sample_size:.1f} of {self.count} "
                "count in effect. If those are wrong labels or outliers (rgd.plot.largest_losses shows "
                "them), use a smaller tau, rgd.Trimmed, or a negative scale.",
                *remarks,
            ]
        return remarks

    def no_effect(self) -> str | None:
        """The reason why re-weighting has no effect here, in a sentence; None if it has one.

        Example:
            >>> import numpy as np, rgd
            >>> rgd.weight_stats(np.zeros(8), np.ones(8), rgd.KL()).no_effect()
            'All weights are equal: the losses are near zero, ...
        """
        if self.count and self.max_weight < _NEAR_ZERO:
            return (
                f"All weights are near zero, the largest is {self.max_weight:.2g}, and so are the steps: the "
                "losses are large for this scale, as they are from scratch. Turn the scale from 0 to its "
                "value over the training (WeightingSchedule), or give normalize=True."
            )
        if self.count < 2 or not self.effective_sample_size / self.count > 0.999:
            return None
        if self.clipped_share is not None and self.clipped_share > 0.999:
            return (
                "All weights are equal: all losses are above the clip (tau). Re-weighting is then only a "
                "larger learning rate. Start with tau near the losses, log(C) for C classes, or use "
                "rgd.MidrangeKL."
            )
        if 0 <= self.mean_loss < 0.01:
            return (
                "All weights are equal: the losses are near zero, so the model fits these samples already, "
                "and re-weighting by loss changes nothing."
            )
        return None

    def __str__(self) -> str:
        share = quotient(self.effective_sample_size, self.count)
        clipped = "" if self.clipped_share is None else f", {self.clipped_share:.1%} clipped"
        tail = "" if self.worst_tenth is None else f", worst tenth {self.worst_tenth:.4g}"
        return (
            f"{self.count} samples: mean loss {self.mean_loss:.4g}{tail}, objective {self.objective:.4g}, "
            f"ESS {self.effective_sample_size:.4g} ({share:.1%}), KL {self.kl_to_uniform:.3g}, "
            f"max weight {self.max_weight:.4g}{clipped}"
        )


# Groups with this number or a larger one have an entry only if they take part.
MOST_GROUPS = 1_000_000
# How many sums of a group stand before those of the extras.
_COLUMNS = 4
# If the largest weight is below this number, a step is less than a tenth of a plain one.
_NEAR_ZERO = 0.1


class WeightSums(NamedTuple):
    """The sums the statistics are made of, as `_rgd.weight_sums` returns them by name.

    Attributes:
        count: How many samples take part.
        mass: `sum(p)`.
        loss: `sum(p * l)`.
        weight: `sum(p * w)`.
        objective: `sum(p * w * l)`.
        square: `sum(p * w^2)`.
        entropy: `sum(p * w * log(w))`.
        largest: `max(w)`.
        clipped: `sum(p * (l > clip))`.
    """

    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    mass: float
    loss: float
    weight: float
    objective: float
    square: float
    entropy: float
    largest: float
    clipped: float


def clip_of(weighting: Weighting | None) -> float:
    """The loss above which a weight no longer changes; infinity if there is none, or if it is not known.

    Example:
        >>> import rgd
        >>> clip_of(rgd.KL(tau=2.0)), clip_of(rgd.KLBall(radius=0.1))
        (2.0, inf)
    """
    return math.inf if weighting is None else float(weighting.clip)


def stats_from_sums(
    sums: WeightSums,
    weighting: Weighting | None = None,
    *,
    worst_tenth: float | None = None,
    denominator: float | None = None,
    normalizer: float | None = None,
    groups: GroupStats | None = None,
) -> WeightStats:
    """`WeightStats` from the sums over a batch.

    Args:
        sums: Taken with `clip_of(weighting)`.
        weighting: The weighting that made the weights; with None, `clipped_share` is None.
        worst_tenth: The result of `worst_tenth`, which cannot be computed from the sums.
        denominator: The divisor of `mean_loss` and `objective`, if it is not the mass: with class weights,
            the sum of those of the targets.
        normalizer: The divisor of `objective`, if it is another number.
        groups: The statistics of each group.

    Returns:
        The statistics. Divisions by zero follow IEEE 754.

    Example:
        >>> stats_from_sums(WeightSums(2, 2.0, 3.0, 2.0, 3.0, 2.0, 0.0, 1.0, 0.0)).effective_sample_size
        2.0
    """
    denominator = sums.mass if denominator is None else denominator
    clipped_share = None
    if weighting is not None:
        clipped_share = quotient(sums.clipped, sums.mass) if math.isfinite(clip_of(weighting)) else 0.0
    effective = math.nan
    if math.isfinite(sums.square):
        effective = sums.count * quotient(sums.weight, sums.square) * quotient(sums.weight, sums.mass)
    return WeightStats(
        mean_loss=quotient(sums.loss, denominator),
        worst_tenth=worst_tenth,
        objective=quotient(sums.objective, denominator if normalizer is None else normalizer),
        effective_sample_size=effective,
        kl_to_uniform=_kl_to_uniform(sums),
        max_weight=sums.largest if sums.count else math.nan,
        clipped_share=clipped_share,
        count=sums.count,
        groups=groups,
        mean_weight=quotient(sums.weight, sums.mass),
    )


def worst_tenth(losses: npt.NDArray[Any], measure: npt.NDArray[Any] | None = None) -> float:
    """The mean loss of the worst tenth of the mass; the sample at the edge of the tenth counts in part.

    Args:
        losses: Losses, any shape, floating.
        measure: The base measure, of the same shape, 0 where a sample takes no part; None for ones.

    Returns:
        The mean, in float64; NaN of no samples, or where one of them is NaN.

    Example:
        >>> worst_tenth(np.arange(15.0))  # 14, and half of 13
        13.66...
    """
    losses = losses.ravel()
    if measure is not None:
        measure = measure.ravel()
        losses, measure = losses[measure != 0], measure[measure != 0]
        measure = None if measure.size and (measure == measure[0]).all() else measure
    if not losses.size or np.isnan(losses).any():
        return math.nan
    if measure is None:
        tenth = losses.size / 10
        whole = math.floor(tenth)
        edge = losses.size - whole - 1
        ordered = np.partition(losses, edge)
        total = float(np.sum(ordered[edge + 1 :], dtype=np.float64))
        return (total + (tenth - whole) * float(ordered[edge]) if tenth > whole else total) / tenth
    order = np.argsort(-losses)
    losses, mass = losses[order].astype(np.float64), measure[order].astype(np.float64)
    reached = np.cumsum(mass)
    tenth = reached[-1] / 10
    taken = np.minimum(np.maximum(tenth - (reached - mass), 0.0), mass)
    return float(np.sum(taken[taken > 0] * losses[taken > 0]) / tenth)


def group_stats(
    losses: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64],
    measure: npt.NDArray[np.float64] | None,
    groups: npt.NDArray[np.int64],
    extras: Mapping[str, npt.NDArray[Any]] | None = None,
) -> GroupStats:
    """The statistics of each group; arguments and errors as for `group_sums`."""
    numbers, rows = group_sums(losses, weights, measure, groups, extras)
    return _stats_of_groups(numbers, rows, tuple(extras or ()))


def group_sums(
    losses: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64],
    measure: npt.NDArray[np.float64] | None,
    groups: npt.NDArray[np.int64],
    extras: Mapping[str, npt.NDArray[Any]] | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The sums of each group, which add up over batches.

    Args:
        losses: Losses, any shape.
        weights: Their weights, of the same shape.
        measure: The base measure, of the same shape, 0 where a sample takes no part; None for ones.
        groups: The group of each sample, of the same shape.
        extras: More numbers `x` of each sample, by name, of the same shape.

    Returns:
        The numbers of the groups that take part, rising, and for each group a row: `sum(p)`, `sum(p * l)`,
        `sum(p * w)`, the number of samples that take part, and `sum(p * x)` of each of `extras`.

    Raises:
        ValueError: If a group number is negative.
    """
    takes_part = np.ones(losses.shape, np.bool_) if measure is None else measure != 0
    p = np.ones(losses.shape) if measure is None else measure
    losses, weights, p = losses[takes_part], weights[takes_part], p[takes_part]
    numbers, index = np.unique(groups[takes_part], return_inverse=True)
    if numbers.size and numbers[0] < 0:
        raise ValueError(f"groups must be integers >= 0, got {numbers[0]}")
    with np.errstate(all="ignore"):
        more = [p * one[takes_part] for one in (extras or {}).values()]
        values = (p, p * losses, p * weights, np.ones(p.shape), *more)
        columns = [np.bincount(index, column, numbers.size) for column in values]
    return numbers, np.stack(columns, 1).astype(np.float64)


def group_stats_from_sums(
    sums: dict[int, npt.NDArray[np.float64]], names: tuple[str, ...] = ()
) -> GroupStats:
    """`GroupStats` from the rows of `group_sums`, added up over batches; `names` are those of the extras."""
    numbers = sorted(sums)
    rows = np.zeros((len(numbers), _COLUMNS + len(names)))
    for row, number in zip(rows, numbers, strict=True):
        row[:] = sums[number]
    return _stats_of_groups(np.array(numbers, np.int64), rows, names)


def _stats_of_groups(
    numbers: npt.NDArray[np.int64], rows: npt.NDArray[np.float64], names: tuple[str, ...]
) -> GroupStats:
    """The statistics from rows of sums: of each group from 0 on; with large numbers, of groups with a row."""
    sparse = numbers.size > 0 and numbers[-1] >= MOST_GROUPS
    if not sparse:
        dense = np.zeros((numbers[-1] + 1 if numbers.size else 0, rows.shape[1]))
        dense[numbers] = rows
        rows = dense
    measure, loss, weight, count = (rows[:, column] for column in range(_COLUMNS))
    with np.errstate(all="ignore"):
        mean_loss, share = loss / measure, weight / np.sum(weight)
        columns: list[list[float]] = [(rows[:, _COLUMNS + i] / measure).tolist() for i in range(len(names))]
    return GroupStats(
        tuple(mean_loss.tolist()),
        tuple(share.tolist()),
        tuple(count.astype(np.int64).tolist()),
        tuple(numbers.tolist()) if sparse else None,
        dict(zip(names, map(tuple, columns), strict=True)) if names else None,
    )


def quotient(numerator: float, denominator: float) -> float:
    """The quotient by IEEE 754; Python would raise ZeroDivisionError."""
    if denominator != 0:
        return numerator / denominator
    return math.copysign(math.inf, numerator) if abs(numerator) > 0 else math.nan


def _kl_to_uniform(sums: WeightSums) -> float:
    """`sum(q * log(q / p'))`, never below 0, from `sum(p * w * log(w))`, `sum(p * w)` and `sum(p)`."""
    if not (0 < sums.weight < math.inf and sums.count):
        return math.nan
    divergence = sums.entropy / sums.weight + math.log(sums.mass / sums.weight)
    return 0.0 if divergence < 0 else divergence
