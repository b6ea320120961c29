"""The members of the family that tests run through, and the ways to compute their weights."""

import math
import re

import exact
import numpy as np
import pytest
import rgd
from rgd import (
    ERM,
    KL,
    ChiSquare,
    ChiSquareBall,
    CVaR,
    Focal,
    KLBall,
    MidrangeKL,
    Threshold,
    Trimmed,
)

EPS = np.finfo(np.float64).eps

POINTWISE = [
    ERM(),
    KL(1.0),
    KL(1 / 9),
    KL(math.inf, scale=0.4),
    KL(scale=-0.7),
    Focal(2.0),
    Focal(0.0),
    Threshold(1.0),
]
NORMALISED = [
    KL(5.0, normalize=True),
    KL(math.inf, scale=1.5, normalize=True),
    KL(scale=-0.7, normalize=True),
    MidrangeKL(0.8),
    MidrangeKL(-0.8),
    MidrangeKL(2.0, relative=True),
    KLBall(0.05),
    KLBall(1.0),
    ChiSquare(0.5),
    ChiSquare(20.0),
    ChiSquareBall(0.02),
    ChiSquareBall(0.7),
    CVaR(0.3),
    CVaR(1.0),
    CVaR(0.3, smoothing=0.5),
    CVaR(0.05, smoothing=4.0),
]
TRIMMED = [Trimmed(ERM(), 0.25), Trimmed(KL(2.0), 0.1), Trimmed(KLBall(0.2), 0.25), Trimmed(CVaR(0.5), 0.25)]
MEMBERS = [*POINTWISE, *NORMALISED, *TRIMMED]
"""All that an exact equation is written for; `Pointwise` and those with a state have tests of their own."""
BATCH_DEPENDENT = [*NORMALISED, *TRIMMED]


def label(weighting):
    """A name that is the same in every process."""
    return re.sub(r"<[^>]*>", "function", str(weighting))


def members(weightings):
    return pytest.mark.parametrize("weighting", weightings, ids=label)


def front(losses, weighting, **options):
    return rgd.sample_weights(np.asarray(losses, dtype=np.float64), weighting, **options)


def formula(losses, weighting, *, where=None, sample_weight=None):
    """The member's own formula, also if the front has a kernel for it."""
    losses = np.asarray(losses, dtype=np.float64)
    measure = np.ones(losses.shape) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    measure = measure if where is None else np.where(where, measure, 0.0)
    batch = rgd.Batch(losses, None if where is None and sample_weight is None else measure)
    with np.errstate(all="ignore"):
        return batch.only(weighting.weights(batch))


def same(actual, expected, losses, weighting):
    """Assert that two computations of weights differ only by rounding and by the tolerance of a root."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    largest = np.max(expected, initial=0.0)
    # Sums over the batch, and an exponent x, which moves exp(x) by |x| eps.
    spread = np.ptp(losses) if np.size(losses) else 0.0
    rate = abs(getattr(weighting, "effective_scale", getattr(weighting, "scale", 1.0)))
    allowed = (2 * np.size(losses) + 32 + 4 * min(rate * spread, 750.0)) * EPS * largest
    np.testing.assert_array_less(
        np.abs(actual - expected), allowed + root_allowance(expected, weighting) + 1e-300
    )


def root_allowance(weights, weighting):
    """The change of a ball's weights by its tolerance: d log w_i / d radius = (log w_i - m) / v under q."""
    inner = getattr(weighting, "weighting", weighting)
    if not isinstance(inner, KLBall):
        return np.zeros(weights.shape)
    with np.errstate(divide="ignore"):
        logarithm = np.where(weights > 0, np.log(weights), 0.0)
    share = weights / np.sum(weights)
    deviation = logarithm - np.sum(share * logarithm)
    variance = np.sum(share * deviation**2)
    if variance < 1e-20:
        return np.zeros(weights.shape)
    # Twice, for both are within it.
    return 2 * weights * np.abs(deviation) / variance * exact.BALL_TOLERANCE * inner.radius
