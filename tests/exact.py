"""The weights to 50 digits, and how far a computed one is from them."""

import math

import mpmath
import numpy as np
from rgd import KLBall

DIGITS = 50
ULPS = 4
BALL_TOLERANCE = 1e-10
"""How near the ball's divergence comes to its radius, relative to it."""


def weights(losses, weighting):
    """The weights of finite losses, and how far a ball's may be off for its root's tolerance."""
    with mpmath.workdps(DIGITS):
        losses = [mpmath.mpf(float(loss)) for loss in losses]
        if isinstance(weighting, KLBall):
            return _ball_weights(losses, weighting.radius)
        tau, scale = mpmath.mpf(weighting.tau), mpmath.mpf(weighting.effective_scale)
        values = [mpmath.exp(scale * min(loss, tau)) for loss in losses]
        if weighting.normalize:
            mean = mpmath.fsum(values) / len(values)
            values = [value / mean for value in values]
        return values, [mpmath.mpf(0)] * len(values)


def divergence(weights):
    """KL of the distribution proportional to `weights` from the uniform one."""
    with mpmath.workdps(DIGITS):
        weights = [mpmath.mpf(float(weight)) for weight in weights]
        total = mpmath.fsum(weights)
        shares = [weight / total for weight in weights if weight]
        return mpmath.fsum(share * mpmath.log(len(weights) * share) for share in shares)


def assert_within_ulps(actual, losses, weighting):
    """Each of `actual` is within 4 units in the last place of its dtype, or infinite where it overflows."""
    expected, slack = weights(losses, weighting)
    with mpmath.workdps(DIGITS):
        for index, (got, value, allowance) in enumerate(zip(actual, expected, slack, strict=True)):
            with np.errstate(over="ignore"):
                nearest = actual.dtype.type(float(value))
            if np.isinf(nearest):
                assert np.isinf(got)
                continue
            unit = mpmath.mpf(float(np.spacing(nearest)))
            error = abs(mpmath.mpf(float(got)) - value)
            assert error <= ULPS * unit + allowance, (
                f"weight {index} of loss {losses[index]!r} under {weighting}: {got!r}, exactly "
                f"{mpmath.nstr(value, 20)}, off by {mpmath.nstr(error / unit, 4)} ulp"
            )


def _ball_weights(losses, radius):
    count, top = len(losses), max(losses)
    at_top = sum(loss == top for loss in losses)
    if radius == 0 or at_top == count:
        return [mpmath.mpf(1)] * count, [mpmath.mpf(0)] * count
    if radius >= math.log(count / at_top):
        value = mpmath.mpf(count) / at_top
        return [value if loss == top else mpmath.mpf(0) for loss in losses], [mpmath.mpf(0)] * count
    gaps = [loss - top for loss in losses]
    radius = mpmath.mpf(radius)

    def shares_at(beta):
        values = [mpmath.exp(beta * gap) for gap in gaps]
        total = mpmath.fsum(values)
        return [value / total for value in values]

    def excess(log_beta):
        beta = mpmath.exp(log_beta)
        values = [mpmath.exp(beta * gap) for gap in gaps]
        total = mpmath.fsum(values)
        mean_gap = mpmath.fsum(value * gap for value, gap in zip(values, gaps, strict=True)) / total
        return beta * mean_gap - mpmath.log(total / count) - radius

    high = mpmath.log(1 / -min(gaps))
    while excess(high) < 0:
        high += 1
    low = high - 1
    while excess(low) > 0:
        low -= 1
    log_beta = mpmath.findroot(
        excess, (low, high), solver="anderson", tol=mpmath.mpf(10) ** (10 - 2 * DIGITS)
    )
    beta = mpmath.exp(log_beta)
    shares = shares_at(beta)
    mean_gap = mpmath.fsum(share * gap for share, gap in zip(shares, gaps, strict=True))
    variance = mpmath.fsum(share * (gap - mean_gap) ** 2 for share, gap in zip(shares, gaps, strict=True))
    # d radius / d beta = beta * variance, and d log w_i / d beta = gap_i - mean_gap.
    beta_slack = BALL_TOLERANCE * radius / (beta * variance)
    values = [count * share for share in shares]
    slack = [value * abs(gap - mean_gap) * beta_slack for value, gap in zip(values, gaps, strict=True)]
    return values, slack
