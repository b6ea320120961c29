"""What a set of weights does to a batch, in a handful of numbers.

Each front fills `WeightStats` from the same sums over losses and weights, which one kernel takes in a single
pass.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TypeAlias

from rgd.weightings import KL, Weighting

WeightSums: TypeAlias = tuple[int, float, float, float, float, float, float, int]
"""count, sum(l), sum(w), sum(w * l), sum(w * w), sum(w * log(w)), max(w), and how many losses exceed tau."""


@dataclasses.dataclass(frozen=True)
class WeightStats:
    """How strongly a batch was re-weighted, with `l` the losses, `w` their weights and `n` their number.

    Attributes:
        mean_loss: `sum(l) / n`, the objective of empirical risk minimization: the number to compare between
        runs.
        objective: `sum(w * l) / n`, what the re-weighted step descends.
        effective_sample_size: `sum(w)^2 / sum(w^2)`, from 1 (one sample has all the weight) to `n` (equal
        weights).
        kl_to_uniform: `sum(q * log(n * q))` with `q = w / sum(w)`, in nats, from 0 (equal weights) to
        `log(n)`.
        max_weight: `max(w)`.
        clipped_share: The share of losses above `tau`, `sum(l > tau) / n`; 0.0 for a weighting that clips
            nothing, None where the weighting is not known.
        count: `n`.

    Of no samples, every share and mean is NaN, as is what a NaN among losses or weights reaches.

    Example:
        >>> import numpy as np, rgd
        >>> losses = np.array([0.0, 0.0, 3.0])
        >>> stats = rgd.weight_stats(losses, rgd.sample_weights(losses), rgd.KL())
        >>> print(stats)
        3 samples: mean loss 1, objective 1.649, ESS 2.822 (94.1%), KL 0.0302, max weight 1.649, 33.3% clipped
    """

    mean_loss: float
    objective: float
    effective_sample_size: float
    kl_to_uniform: float
    max_weight: float
    clipped_share: float | None
    count: int

    def __str__(self) -> str:
        share = _ratio(self.effective_sample_size, self.count)
        clipped = "" if self.clipped_share is None else f", {self.clipped_share:.1%} clipped"
        return (
            f"{self.count} samples: mean loss {self.mean_loss:.4g}, objective {self.objective:.4g}, "
            f"ESS {self.effective_sample_size:.4g} ({share:.1%}), KL {self.kl_to_uniform:.3g}, "
            f"max weight {self.max_weight:.4g}{clipped}"
        )


def clipping_factor(weighting: Weighting | None) -> float:
    """The loss above which `weighting` clips: `tau` of a `KL`, infinity where nothing is clipped or known.

    Args:
        weighting: A weighting, or None.

    Returns:
        A positive number.

    Example:
        >>> import rgd
        >>> clipping_factor(rgd.KL(tau=2.0)), clipping_factor(rgd.KLBall(radius=0.1))
        (2.0, inf)
    """
    return float(weighting.tau) if isinstance(weighting, KL) else math.inf


def stats_from_sums(
    sums: WeightSums,
    weighting: Weighting | None = None,
    *,
    count: int | None = None,
    denominator: float | None = None,
) -> WeightStats:
    """`WeightStats` from the sums over a batch.

    Args:
        sums: What `_rgd.weight_sums` returns, taken with `clipping_factor(weighting)`.
        weighting: What the weights came from; None leaves `clipped_share` unknown.
        count: The number of samples, where it is less than that of the summed: a sample of loss 0 and weight
            0 (an ignored target) adds to no sum, but is in `sums`' own count.
        denominator: What `mean_loss` and `objective` are divided by, where it is not the number of samples:
            with class weights, the sum of those of the targets.

    Returns:
        The statistics. Divisions by zero give what IEEE 754 says.

    Example:
        >>> stats_from_sums((2, 3.0, 2.0, 3.0, 2.0, 0.0, 1.0, 0)).effective_sample_size
        2.0
    """
    summed, loss, weight, weighted_loss, square, entropy, largest, clipped = sums
    count = summed if count is None else count
    denominator = count if denominator is None else denominator
    clipped_share = None
    if weighting is not None:
        clipped_share = _ratio(clipped, count) if math.isfinite(clipping_factor(weighting)) else 0.0
    return WeightStats(
        mean_loss=_ratio(loss, denominator),
        objective=_ratio(weighted_loss, denominator),
        effective_sample_size=_ratio(weight, square) * weight if math.isfinite(square) else math.nan,
        kl_to_uniform=_kl_to_uniform(entropy, weight, count),
        max_weight=largest if count else math.nan,
        clipped_share=clipped_share,
        count=count,
    )


def _kl_to_uniform(entropy: float, weight: float, count: int) -> float:
    """`sum(q * log(n * q))` with `q = w / sum(w)`, from `sum(w * log(w))` and `sum(w)`; never below 0."""
    if not (0 < weight < math.inf and count):
        return math.nan
    divergence = entropy / weight + math.log(count / weight)
    return 0.0 if divergence < 0 else divergence


def _ratio(numerator: float, denominator: float) -> float:
    """The quotient of IEEE 754, where Python raises ZeroDivisionError."""
    if denominator != 0:
        return numerator / denominator
    return math.copysign(math.inf, numerator) if abs(numerator) > 0 else math.nan
