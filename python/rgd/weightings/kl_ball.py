"""The worst distribution within a Kullback-Leibler ball."""

from __future__ import annotations

import dataclasses
from typing import Any

from rgd.weightings._ball import gaps_of, with_corners
from rgd.weightings._base import Kernel, Weighting, setting
from rgd.weightings._batch import Batch
from rgd.weightings._root import root


@dataclasses.dataclass(frozen=True)
class KLBall(Weighting):
    """Weights of the worst distribution within a Kullback-Leibler ball around the measure.

    The weights are `q / p` with `q` the solution of `max_q <q, l>` subject to `KL(q || p) <= radius`:
    `w = softmax(l / gamma) / p`, with `gamma` the root of `KL = radius`. They average to one. A radius of
    `-log(m)` or more, where the samples of the largest loss have the share `m` of the measure, puts all
    weight on those; equal losses get equal weights. Infinite losses share all the weight, whatever the
    radius.

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
        xp, losses, whole, radius = batch.xp, batch.losses, batch, batch.scalar(self.radius)
        ball = gaps_of(batch)
        batch, gaps = ball.batch, ball.values
        # Losses of -inf, which weigh nothing, take their part of the divergence.
        left = radius + xp.log(ball.left)
        left = xp.where(left < 0, 0.0, left)
        limit = -xp.log(ball.share)
        inside = (left > 0) & (left < limit)
        target = xp.where(inside, left, 0.5)
        nearest = batch.min(xp.where(gaps < 0, -gaps, float("inf")))
        nearest = xp.where(inside, nearest, 1.0)

        def divergence(log_b: Any) -> tuple[Any, Any]:
            """KL - radius and its derivative with respect to `log(b)`, at several `b` at once."""
            b = xp.exp(log_b)
            exponent = b * gaps
            logarithm = exponent - xp.log1p(batch.mean(xp.expm1(exponent)))[:, None]
            weights = xp.exp(logarithm)
            # mean(w log w) + 1 - mean(w), where the error of the logarithms' common shift cancels.
            value = batch.mean(logarithm * weights - xp.expm1(logarithm))
            deviation = gaps - batch.mean(weights * gaps)[:, None]
            slope = batch.mean(weights * (b * deviation) ** 2)
            return value - target, slope

        # With gaps in [-1, 0], KL(b) <= b^2 / 8; at 1000 / nearest all weight lies on the largest losses.
        largest = xp.finfo(losses.dtype).max / 8
        high = 1000.0 / nearest
        low = xp.log(8.0 * target) / 2
        log_b = root(batch, divergence, low, xp.log(xp.where(high < largest, high, largest)))
        weights = xp.exp(xp.exp(log_b) * gaps)
        weights = weights / batch.mean(weights)
        return with_corners(whole, ball, weights, radius=radius, radius_left=left, limit=limit)

    def kernel(self) -> Kernel:
        """The kernel `kl_ball`: the radius."""
        return self.kernel_name, (self.radius,)

    @classmethod
    def of_kernel(cls, numbers: tuple[float, ...]) -> KLBall:
        """The ball of a kernel's numbers."""
        return cls(*numbers)
