"""The worst distribution within a Kullback-Leibler ball."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from rgd.weightings._ball import mean_of
from rgd.weightings._base import Kernel, Weighting, setting
from rgd.weightings._batch import Batch
from rgd.weightings._limits import small
from rgd.weightings._root import NEWTON_STEPS, cuts, repeat

_FINER = 6
"""The last parts are smaller by this factor than the number whose digits Newton's steps double to all."""

_LONGEST = 1 / 4
"""Newton's steps change `b` by a smaller part than this."""


@dataclasses.dataclass(frozen=True)
class KLBall(Weighting):
    """Weights of the worst distribution within a Kullback-Leibler ball around the measure.

    The weights are `q / p` with `q` the solution of `max_q <q, l>` subject to `KL(q || p) <= radius`:
    `w = softmax(l / gamma) / p`, with `gamma` the root of `KL = radius`. They average to one. A radius of
    `-log(m)` or more, where the samples of the largest loss have the share `m` of the measure, puts all
    weight on those; equal losses get equal weights. Infinite losses share all the weight, for any radius
    above 0.

    Args:
        radius: Radius of the ball in nats, a number >= 0. 0 is plain empirical risk minimization.

    Raises:
        TypeError: If `radius` is not a number.
        ValueError: If `radius` is negative or NaN.

    Example:
        >>> import numpy as np, rgd
        >>> rgd.sample_weights(np.array([0.5, 0.5, 3.0]), rgd.KLBall(radius=10.0))
        array([0., 0., 3.])

    References:
        Kumar et al., arXiv 2306.09222, section 3 (the constrained form of DRO with a KL divergence).
    """

    kernel_name = "kl_ball"

    radius: float = setting("a number >= 0 (nats)", lambda radius: radius >= 0)

    mean_one = True

    def weights(self, batch: Batch) -> Any:
        """`exp(b * gap) / mean(exp(b * gap))`, `b` the root of `KL = radius`."""
        xp, radius, zero = batch.xp, batch.scalar(self.radius), batch.scalar(0.0)
        losses = small(batch.losses)
        top = batch.max(losses)
        is_top = losses == top
        # Gaps to the largest loss, at most 0. Among infinite ones, those of 0 have all the weight at any `b`.
        gaps = batch.only(xp.where(is_top, zero, losses - top))
        on_top = xp.astype(is_top, losses.dtype)
        share = mean_of(batch, on_top)
        # With NaN among the losses, no loss equals the largest, and this is 0 / 0.
        one = share / share
        weights = xp.exp(_exponents(batch, gaps, radius, zero, one))
        weights = weights / mean_of(batch, weights)
        # No `b` reaches the radius from which on all weight is on the largest losses.
        weights = xp.where(radius >= -xp.log(share), on_top / share, weights)
        # If the radius is 0, infinite losses do not count.
        return xp.where(radius == 0, one, weights)

    def kernel(self) -> Kernel:
        """The kernel `kl_ball`: the radius."""
        return self.kernel_name, (self.radius,)

    @classmethod
    def of_kernel(cls, numbers: tuple[float, ...]) -> KLBall:
        """The ball of a kernel's numbers."""
        return cls(*numbers)


def _exponents(batch: Batch, gaps: Any, radius: Any, zero: Any, one: Any) -> Any:
    """`b * gaps`, shape (n,), with the `b` at which the divergence is the radius.

    The divergence grows with `b`. The search cuts a range of `log(b)` into equal parts and keeps the one that
    holds the root; then it cuts this one. The first range holds every root of the dtype. At its lower end
    all weights of finite losses are equal, as for a radius that losses of -inf use up; at its upper end, all
    weight is on the largest losses. Newton's steps find the root to rounding.
    """
    xp, limits = batch.xp, batch.xp.finfo(gaps.dtype)
    digits = math.log(limits.max)
    low, high = -1.55 * digits, 1.2 * digits
    # Each of Newton's steps doubles the digits that are right.
    parts, rounds = cuts(batch, (high - low) / (limits.eps ** (0.5**NEWTON_STEPS) / _FINER))
    part = (high - low) / parts
    numbers = batch.arange(1, parts)[:, None]
    # Weights of exp(least) are 0. Their logarithms must be finite, since they are multiplied.
    least = batch.scalar(-2.0 * digits)
    measure = None if batch.is_plain() else batch.measure / batch.count

    def mean(values: Any) -> Any:
        """The mean of finite numbers, (n,) or (m, n), with the last axis kept."""
        if measure is None:
            return xp.mean(values, axis=-1, keepdims=True)
        return xp.sum(values * measure, axis=-1, keepdims=True)

    def divergence(exponents: Any) -> tuple[Any, Any, Any]:
        """KL of the weights, the weights and their logarithms, at one `b` or several."""
        logarithms = exponents - xp.log1p(mean(xp.expm1(exponents)))
        weights = xp.exp(logarithms)
        # mean(w log w) + 1 - mean(w), where the error of the logarithms' common shift cancels.
        return mean(logarithms * weights - xp.expm1(logarithms)), weights, logarithms

    def best(candidates: Any, exponents: Any, lower_end: Any) -> Any:
        """The largest candidate below the root, or the lower end, 0-d."""
        return xp.max(xp.where(divergence(exponents)[0] < radius, candidates, lower_end))

    def narrow(carry: tuple[Any, Any]) -> tuple[Any, Any]:
        """The exponents at the lower end of a part, for those at the lower end of all parts of a range."""
        exponents, ratio = carry
        factors = ratio**numbers
        return exponents * best(factors, exponents * factors, one), ratio ** (1.0 / parts)

    def polish(exponents: Any) -> Any:
        value, weights, logarithms = divergence(exponents)
        step = (radius - value) / mean(weights * (logarithms - value) ** 2)
        # If the function is flat up to rounding, its root is as good as any number near it.
        return exponents * (xp.where(abs(step) < _LONGEST, step, zero) + 1.0)

    # `b` itself may overflow where its product with a gap does not, so its root multiplies twice.
    ratio, lower_end = math.exp(part / 2), math.exp(low / 2)
    roots = ratio ** (numbers + low / part)
    root = best(roots, xp.maximum(gaps * roots * roots, least), batch.scalar(lower_end))
    exponents = xp.maximum(gaps * root * root, least)
    exponents, _ = repeat(xp, rounds - 1, narrow, (exponents, math.exp(part / parts)))
    return repeat(xp, NEWTON_STEPS, polish, exponents)
