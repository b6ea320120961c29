"""The worst distribution within a Kullback-Leibler ball."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from rgd.weightings._ball import gaps_of, with_corners
from rgd.weightings._base import Kernel, Weighting, setting
from rgd.weightings._batch import Batch
from rgd.weightings._root import bracketed, polished

_FAR = 2.0**-64
"""Where the smallest gap over the largest is below this, gaps have a unit between the two."""


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
        xp, losses, radius = batch.xp, batch.losses, batch.scalar(self.radius)
        ball = gaps_of(batch)
        mean = ball.mean
        # Losses of -inf have weight 0, which uses a part of the divergence.
        left = radius + xp.log(ball.left)
        left = xp.where(left < 0, 0.0, left)
        limit = -xp.log(ball.share)
        inside = (left > 0) & (left < limit)
        target = xp.where(inside, left, 0.5)
        nearest = ball.batch.min(xp.where(ball.below < 0, -ball.below, float("inf")))
        nearest = xp.where(inside, nearest, ball.extent)
        # The unit of gaps is the largest one. Where the smallest would be 0 in this unit, the unit is between
        # the two.
        far = nearest / ball.extent < _FAR
        unit = xp.where(far, ball.extent**0.5 * nearest**0.5, ball.extent)
        gaps, extent, nearest = ball.below / unit, ball.extent / unit, nearest / unit
        # A weight of exp(least) is 0; its logarithm must be finite, since they are multiplied.
        least = -2.0 * math.log(xp.finfo(losses.dtype).max)

        def divergence(log_b: Any) -> tuple[Any, Any, Any]:
            """KL of the weights, the weights and their logarithms, at one `b` or several."""
            exponent = xp.exp(log_b) * gaps
            exponent = xp.where(exponent > least, exponent, least)
            logarithm = exponent - xp.log1p(mean(xp.expm1(exponent)))[..., None]
            weights = xp.exp(logarithm)
            # mean(w log w) + 1 - mean(w), where the error of the logarithms' common shift cancels.
            return mean(logarithm * weights - xp.expm1(logarithm)), weights, logarithm

        def excess(log_b: Any) -> tuple[Any, Any]:
            """KL - radius and its derivative with respect to `log(b)`."""
            value, weights, logarithm = divergence(log_b)
            return value - target, mean(weights * (logarithm - value) ** 2)

        # KL(b) <= (b extent)^2 / 8. At b = 1000 / nearest all weight is on the largest losses.
        largest = xp.finfo(losses.dtype).max / 8
        high = 1000.0 / nearest
        high = xp.log(xp.where(high < largest, high, largest))
        low, high = bracketed(
            batch,
            lambda log_b: divergence(log_b)[0] - target,
            xp.log(8.0 * target) / 2 - xp.log(extent),
            high,
        )
        # Rounding may put a root at the bracket's end just beyond it.
        width = high - low
        log_b = polished(batch, excess, (low + high) / 2, (low - width, high + width))
        weights = xp.exp(xp.exp(log_b) * gaps)
        weights = weights / mean(weights)
        return with_corners(batch, ball, weights, radius=radius, radius_left=left, limit=limit)

    def kernel(self) -> Kernel:
        """The kernel `kl_ball`: the radius."""
        return self.kernel_name, (self.radius,)

    @classmethod
    def of_kernel(cls, numbers: tuple[float, ...]) -> KLBall:
        """The ball of a kernel's numbers."""
        return cls(*numbers)
