"""Paired differences, their intervals and tests."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

Vector = npt.NDArray[np.float64]

FINDING = 0.001
MOST_EXACT = 16


class Paired(NamedTuple):
    """A mean difference over seeds, half the width of its 95% interval, and the larger p of two tests."""

    mean: float
    half: float
    p: float

    @property
    def finding(self) -> bool:
        """Whether p is below .001. Everything else is no finding."""
        return self.p < FINDING


def interval(values: Vector) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval by Student's t."""
    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)
    return float(np.mean(values)), float(half)


@functools.cache
def every_sign(n: int) -> Vector:
    """All rows of n signs, (2^n, n)."""
    return np.array(list(itertools.product((-1.0, 1.0), repeat=n)))


def signed_rank(differences: Vector) -> float:
    """p of Wilcoxon's signed-rank test, two-sided, by counting all signs.

    Ties share their ranks, and zeros are dropped. Accuracies tie, and scipy's exact table is for values that
    do not.
    """
    nonzero = differences[differences != 0]
    n = len(nonzero)
    if n == 0:
        return 1.0
    ranks = stats.rankdata(np.abs(nonzero))
    if n > MOST_EXACT:
        return float(stats.wilcoxon(nonzero).pvalue)
    seen = abs(float(np.sign(nonzero) @ ranks))
    return float(np.mean(np.abs(every_sign(n) @ ranks) >= seen - 1e-9))


def compare(values: Vector, baseline: Vector) -> Paired:
    """The difference of two arms, seed by seed.

    Args:
        values: A metric of one arm, of each seed, (S,).
        baseline: The same metric of the other arm for the same seeds.

    Returns:
        The mean difference, half of its 95% interval, and the larger p of the paired t test and of
        Wilcoxon's signed-rank test.

    Raises:
        ValueError: If the two are not pairs, or fewer than 2.
    """
    if values.shape != baseline.shape or values.ndim != 1 or len(values) < 2:
        raise ValueError(
            f"pairs of at least 2 seeds are needed, got values of shape {values.shape} and {baseline.shape}"
        )
    differences = values - baseline
    mean, half = interval(differences)
    if half == 0:
        return Paired(mean, half, 1.0 if mean == 0 else signed_rank(differences))
    t = float(stats.ttest_rel(values, baseline).pvalue)
    return Paired(mean, half, max(t, signed_rank(differences)))


def compare_over_families(values: Vector, baseline: Vector, families: Sequence[str]) -> Paired:
    """The difference of two arms over data sets, some of which are versions of the same original.

    Args:
        values: A metric of one arm on each data set, (D,).
        baseline: The same metric of the other arm on the same data sets.
        families: The original of each data set.

    Returns:
        The mean difference over the data sets, half of its 95% interval by a bootstrap over the families, and
        the larger p of the t test and of Wilcoxon's signed-rank test over the families' mean differences.
    """
    differences = values - baseline
    mean, low, high = bootstrap_over_families(differences, families)
    names = np.array(families)
    of_family = np.array([differences[names == name].mean() for name in sorted(set(families))])
    return Paired(mean, (high - low) / 2, compare(of_family, np.zeros_like(of_family)).p)


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
    low, high = np.quantile(means, (0.025, 0.975))
    return float(differences.mean()), float(low), float(high)
