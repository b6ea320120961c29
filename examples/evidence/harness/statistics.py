"""Paired differences, their intervals and tests."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

Vector = npt.NDArray[np.float64]

LEVEL = 0.05
# Standard deviations of the differences over 12 seeds that a test cannot miss: with Holm's strictest
# threshold among fifteen rows, p < .05 / 15, two in a hundred are missed. See `power` and `detectable`.
DETECTABLE, PAIRS, STRICTEST = 1.8, 12, LEVEL / 15


class Paired(NamedTuple):
    """A mean difference over seeds, half of its 95% interval, p of the t test, and their deviation."""

    mean: float
    half: float
    p: float
    deviation: float


def interval(values: Vector) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval by Student's t."""
    n = len(values)
    half = stats.t.ppf(1 - LEVEL / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n)
    return float(np.mean(values)), float(half)


def power(deviations: float, pairs: int, level: float) -> float:
    """How often a paired t test of `level` finds a difference of so many standard deviations."""
    bound, shift = stats.t.ppf(1 - level / 2, pairs - 1), deviations * np.sqrt(pairs)
    return float(stats.nct.sf(bound, pairs - 1, shift) + stats.nct.cdf(-bound, pairs - 1, shift))


@functools.cache
def detectable(pairs: int) -> float:
    """How many standard deviations so many pairs miss as seldom as 12 miss `DETECTABLE`; 12 or more."""
    if pairs == PAIRS:
        return DETECTABLE
    if pairs < PAIRS:  # no committed table has so few
        return math.inf
    wanted = power(DETECTABLE, PAIRS, STRICTEST)
    most = DETECTABLE * math.sqrt(PAIRS / pairs)  # enough, for the threshold of t falls with the pairs
    low = 0.7 * most
    for _ in range(40):
        middle = (low + most) / 2
        # scipy gives NaN here and there, which counts as too few
        low, most = (low, middle) if power(middle, pairs, STRICTEST) >= wanted else (middle, most)
    return most


def compare(values: Vector, baseline: Vector) -> Paired:
    """The difference of two arms, seed by seed.

    Args:
        values: A metric of one arm, of each seed, (S,).
        baseline: The same metric of the other arm for the same seeds.

    Returns:
        The mean difference, half of its 95% interval, p of the paired t test, and the standard deviation of
        the differences. Where all differences are equal, p is 1 if they are 0, else 0.

    Raises:
        ValueError: If the two are not pairs, or fewer than 2.
    """
    if values.shape != baseline.shape or values.ndim != 1 or len(values) < 2:
        raise ValueError(
            f"pairs of at least 2 seeds are needed, got values of shape {values.shape} and {baseline.shape}"
        )
    differences = values - baseline
    mean, half = interval(differences)
    deviation = float(np.std(differences, ddof=1))
    if half == 0:
        return Paired(mean, half, float(mean == 0), deviation)
    return Paired(mean, half, float(stats.ttest_rel(values, baseline).pvalue), deviation)


def compare_over_families(values: Vector, baseline: Vector, families: Sequence[str]) -> Paired:
    """The difference of two arms over data sets, some of which are versions of the same original.

    Args:
        values: A metric of one arm on each data set, (D,).
        baseline: The same metric of the other arm on the same data sets.
        families: The original of each data set.

    Returns:
        The mean difference over the data sets, half of its 95% interval by a bootstrap over the families, p
        of the t test over the families' mean differences, and the deviation of 12 pairs with that interval.
    """
    differences = values - baseline
    mean, low, high = bootstrap_over_families(differences, families)
    names = np.array(families)
    of_family = np.array([differences[names == name].mean() for name in sorted(set(families))])
    p = compare(of_family, np.zeros_like(of_family)).p
    of_twelve = stats.t.ppf(1 - LEVEL / 2, PAIRS - 1) / np.sqrt(PAIRS)
    return Paired(mean, (high - low) / 2, p, float((high - low) / 2 / of_twelve))


def bootstrap_over_families(
    differences: Vector, families: Sequence[str], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean over data sets, and its 95% interval, where data sets of one family stand or fall together.

    Args:
        differences: Of each data set, (D,).
        families: The family of each data set. Families are drawn with replacement, with all their sets.
        resamples: How many draws.
        seed: Of the draws.

    Returns:
        The mean, the lower and the upper end (2.5% and 97.5% of the resampled means).
    """
    names = sorted(set(families))
    of_family = [differences[np.array([family == name for family in families])] for name in names]
    sums, sizes = np.array([f.sum() for f in of_family]), np.array([len(f) for f in of_family])
    drawn = np.random.default_rng(seed).integers(0, len(names), (resamples, len(names)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, (LEVEL / 2, 1 - LEVEL / 2))
    return float(differences.mean()), float(low), float(high)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p values adjusted for their number: Holm, "A simple sequentially rejective multiple test procedure".

    Scandinavian Journal of Statistics, 1979. The smallest of m is multiplied by m, the next by m - 1, and so
    on; none is smaller than the one before it, and none is above 1.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for k, name in enumerate(sorted(p, key=lambda name: p[name])):
        largest = max(largest, min(1.0, (len(p) - k) * p[name]))
        adjusted[name] = largest
    return adjusted
