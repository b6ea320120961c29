"""The weights to 50 digits, and how far a computed one may be from them."""

import functools
import math

import mpmath
import numpy as np
from rgd import ERM, KL, ChiSquare, ChiSquareBall, CVaR, Focal, KLBall, MidrangeKL, Threshold, Trimmed

DIGITS = 50
ULPS = 4
EPS = np.finfo(np.float64).eps
BALL_TOLERANCE = 1e-10
"""How near the ball's divergence comes to its radius, relative to it."""


def weights(losses, weighting, base=None):
    """The weights of finite losses, and the allowed error of each in addition to its own rounding.

    It comes from the tolerance of a root, and from the rounding of sums over the batch.
    """
    with mpmath.workdps(DIGITS + orders_of_magnitude(losses)):
        losses = [mpmath.mpf(float(loss)) for loss in losses]
        base = [mpmath.mpf(1 if base is None else float(base[i])) for i in range(len(losses))]
        if not losses:
            return [], []
        return equation(weighting, losses, base)


def orders_of_magnitude(losses):
    """The number of digits between the largest and the smallest loss that is not 0."""
    sizes = [abs(float(loss)) for loss in losses if loss != 0]
    return math.ceil(math.log10(max(sizes)) - math.log10(min(sizes))) if sizes else 0


def divergence(weights):
    """KL of the distribution proportional to `weights` from the uniform one."""
    with mpmath.workdps(DIGITS):
        weights = [mpmath.mpf(float(weight)) for weight in weights]
        total = mpmath.fsum(weights)
        shares = [weight / total for weight in weights if weight]
        return mpmath.fsum(share * mpmath.log(len(weights) * share) for share in shares)


def assert_within_ulps(actual, losses, weighting, base=None):
    """Each of `actual` is within 4 units in the last place of its dtype, or infinite where it overflows."""
    expected, slack = weights(losses, weighting, base)
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


@functools.singledispatch
def equation(weighting, losses, base):
    raise TypeError(f"no exact equation of {weighting}")


@equation.register(ERM)
def _erm(weighting, losses, base):
    return exactly([mpmath.mpf(1)] * len(losses))


@equation.register(KL)
def _kl(weighting, losses, base):
    tau, scale = mpmath.mpf(weighting.tau), mpmath.mpf(weighting.effective_scale)
    values = [mpmath.exp(scale * min(loss, tau)) if scale else mpmath.mpf(1) for loss in losses]
    return exactly(over_mean(values, base) if weighting.normalize else values)


@equation.register(Focal)
def _focal(weighting, losses, base):
    return exactly([max(1 - mpmath.exp(-loss), 0) ** mpmath.mpf(weighting.gamma) for loss in losses])


@equation.register(Threshold)
def _threshold(weighting, losses, base):
    return exactly([mpmath.mpf(loss <= weighting.max_loss) for loss in losses])


@equation.register(MidrangeKL)
def _midrange_kl(weighting, losses, base):
    low, high = min(losses), max(losses)
    unit = (high - low) / 2 if weighting.relative and high > low else 1
    exponents = [mpmath.mpf(weighting.scale) * (min(loss, (low + high) / 2) - low) / unit for loss in losses]
    values = over_mean([mpmath.exp(exponent) for exponent in exponents], base)
    # A rounded exponent x moves exp(x) by |x| eps; the sum has one rounding for each loss.
    largest = max(abs(exponent) for exponent in exponents)
    return values, [(2 * largest + len(losses)) * EPS * value for value in values]


@equation.register(KLBall)
def _kl_ball(weighting, losses, base):
    top, mass = max(losses), mpmath.fsum(base)
    limit = mass / mpmath.fsum(p for p, loss in zip(base, losses, strict=True) if loss == top)
    if weighting.radius == 0 or limit == 1:
        return exactly([mpmath.mpf(1)] * len(losses))
    if weighting.radius >= math.log(limit):
        return exactly([limit if loss == top else mpmath.mpf(0) for loss in losses])
    radius = mpmath.mpf(weighting.radius)
    gaps = [loss - top for loss in losses]

    def moments(log_beta):
        beta = mpmath.exp(log_beta)
        values = over_mean([mpmath.exp(beta * gap) for gap in gaps], base)
        mean_gap = mean([value * gap for value, gap in zip(values, gaps, strict=True)], base)
        return beta, values, mean_gap

    def excess(log_beta):
        beta, _, mean_gap = moments(log_beta)
        return beta * mean_gap - mpmath.log(mean([mpmath.exp(beta * gap) for gap in gaps], base)) - radius

    start = mpmath.log(1 / -min(gaps))
    high = expand(excess, start, 1, lambda value: value >= 0)
    low = expand(excess, high - 1, -1, lambda value: value <= 0)
    log_beta = mpmath.findroot(
        excess, (low, high), solver="anderson", tol=mpmath.mpf(10) ** (10 - 2 * mpmath.mp.dps)
    )
    beta, values, mean_gap = moments(log_beta)
    variance = mean([value * (gap - mean_gap) ** 2 for value, gap in zip(values, gaps, strict=True)], base)
    # d radius / d beta = beta * variance, and d log w_i / d beta = gap_i - mean_gap.
    beta_slack = BALL_TOLERANCE * radius / (beta * variance)
    return values, [value * abs(gap - mean_gap) * beta_slack for value, gap in zip(values, gaps, strict=True)]


@equation.register(ChiSquare)
def _chi_square(weighting, losses, base):
    gamma = mpmath.mpf(weighting.gamma)

    def values(eta):
        return [max(loss - eta, 0) / gamma for loss in losses]

    eta = bisect(lambda eta: 1 - mean(values(eta), base), min(losses) - gamma, max(losses))
    return rounded(values(eta))


@equation.register(ChiSquareBall)
def _chi_square_ball(weighting, losses, base):
    radius, top, mass = mpmath.mpf(weighting.radius), max(losses), mpmath.fsum(base)
    limit = mass / mpmath.fsum(p for p, loss in zip(base, losses, strict=True) if loss == top)
    if radius == 0 or limit == 1:
        return exactly([mpmath.mpf(1)] * len(losses))
    if radius >= (limit - 1) / 2:
        return exactly([limit if loss == top else mpmath.mpf(0) for loss in losses])
    gaps = [loss - top for loss in losses]

    def values(t):
        return over_mean([max(gap + t, 0) for gap in gaps], base)

    def excess(t):
        return radius - (mean([value**2 for value in values(t)], base) - 1) / 2

    # The closest to the largest: all weight is there.
    low = min(-gap for gap in gaps if gap < 0)
    t = bisect(excess, low, expand(excess, -min(gaps), None, lambda value: value >= 0))
    result = values(t)
    # With m and v the mean and variance of the gaps above -t: d w_i / d radius = (gap_i - m) * (m + t) / v.
    active = [gap + t > 0 for gap in gaps]
    share = mean([mpmath.mpf(a) for a in active], base)
    m = mean([gap if a else mpmath.mpf(0) for gap, a in zip(gaps, active, strict=True)], base) / share
    v = (
        mean([(gap - m) ** 2 if a else mpmath.mpf(0) for gap, a in zip(gaps, active, strict=True)], base)
        / share
    )
    # mean(w^2) = 1 + 2 radius is a sum of one rounding for each loss.
    radius_slack = (len(losses) + 8) * EPS * (1 + 2 * radius)
    slack = [
        abs(gap - m) * (m + t) / v * radius_slack if a else mpmath.mpf(0)
        for gap, a in zip(gaps, active, strict=True)
    ]
    return result, [one + other for one, other in zip(slack, rounded(result)[1], strict=True)]


@equation.register(CVaR)
def _cvar(weighting, losses, base):
    alpha, nu = mpmath.mpf(weighting.alpha), mpmath.mpf(weighting.smoothing)
    if alpha == 1:
        return exactly([mpmath.mpf(1)] * len(losses))
    if nu == 0:
        return rounded([share / alpha for share in shares_of_worst(losses, base, alpha)])

    def values(eta):
        return [min(1 / alpha, mpmath.exp((loss - eta) / nu)) for loss in losses]

    # At the smallest eta all weights are at least 1 / alpha, at the largest at most one.
    low = min(losses) + nu * mpmath.log(alpha)
    return rounded(values(bisect(lambda eta: 1 - mean(values(eta), base), low, max(losses))))


@equation.register(Trimmed)
def _trimmed(weighting, losses, base):
    kept = [1 - share for share in shares_of_worst(losses, base, mpmath.mpf(weighting.fraction))]
    part = [i for i, share in enumerate(kept) if share > 0]
    inner, slack = equation(weighting.weighting, [losses[i] for i in part], [kept[i] * base[i] for i in part])
    values, allowed = [mpmath.mpf(0)] * len(losses), [mpmath.mpf(0)] * len(losses)
    for i, value, allowance in zip(part, inner, slack, strict=True):
        values[i], allowed[i] = kept[i] * value, kept[i] * allowance
    return values, [one + other for one, other in zip(allowed, rounded(values)[1], strict=True)]


def exactly(values):
    return values, [mpmath.mpf(0)] * len(values)


def rounded(values):
    """The allowed error of weights that are differences or shares of sums over the batch."""
    return values, [(len(values) + 8) * EPS * max(values)] * len(values)


def mean(values, base):
    return mpmath.fsum(p * value for p, value in zip(base, values, strict=True)) / mpmath.fsum(base)


def over_mean(values, base):
    divisor = mean(values, base)
    return [value / divisor for value in values]


def shares_of_worst(losses, base, fraction):
    """The part of each sample in the worst `fraction` of the mass, from the largest down, equal for ties."""
    left, shares = fraction * mpmath.fsum(base), {}
    for level in sorted(set(losses), reverse=True):
        mass = mpmath.fsum(p for p, loss in zip(base, losses, strict=True) if loss == level)
        shares[level] = min(left / mass, mpmath.mpf(1))
        left -= shares[level] * mass
    return [shares[loss] for loss in losses]


def bisect(increasing, low, high):
    """The root of an increasing function, to the working precision."""
    for _ in range(4 * mpmath.mp.dps):
        middle = (low + high) / 2
        low, high = (middle, high) if increasing(middle) < 0 else (low, middle)
    return high


def expand(function, start, step, reached):
    """The first of `start, start + step, ...` (doubled without a step) where `reached(function(x))`."""
    x = start
    while not reached(function(x)):
        x = 2 * x if step is None else x + step
    return x
