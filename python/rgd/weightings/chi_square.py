"""Worst cases with a chi-square divergence: penalised, and within a ball."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from rgd.weightings._ball import gaps_of, with_corners
from rgd.weightings._base import Kernel, Weighting, setting
from rgd.weightings._batch import Batch
from rgd.weightings._limits import difference
from rgd.weightings._sorted import first_enough, in_order

_STEPS = 2
"""The number of Newton's steps after the exact solution, since its running sums have rounding errors."""


@dataclasses.dataclass(frozen=True)
class ChiSquare(Weighting):
    """Weights of the worst case with a chi-square penalty: linear in the loss above a threshold, 0 below.

    `w_i = max(0, (l_i - eta) / gamma)` with `eta` the root of `mean(w) = 1`: the solution of
    `max_q <q, l> - gamma / 2 * mean((w - 1)^2)` with `w = q / p`. Infinite losses share all the weight.

    Args:
        gamma: Strength of the penalty, a positive, finite number in units of the loss; the smaller it is,
            the more weight goes to the largest losses.

    Raises:
        TypeError: If `gamma` is not a number.
        ValueError: If `gamma` is not positive and finite.

    Example:
        >>> import numpy as np, rgd
        >>> rgd.sample_weights(np.array([0.0, 1.0, 2.0]), rgd.ChiSquare(2.0))
        array([0.5, 1. , 1.5])

    References:
        Namkoong, Duchi, "Variance-based Regularization with Convex Objectives", NeurIPS 2017, section 2.
    """

    kernel_name = "chi_square"

    gamma: float = setting("a positive, finite number", lambda gamma: (gamma > 0) & (gamma < math.inf))

    mean_one = True

    def weights(self, batch: Batch) -> Any:
        """`max(0, gap + u)` for gaps to the largest loss in units of gamma, `u` the root of `mean(w) = 1`."""
        xp, losses = batch.xp, batch.losses
        gaps = batch.only(difference(xp, losses, batch.max(losses)) / self.gamma)
        # At u_k, the sum of gap + u over the k largest gaps gives a mean of 1. At a given u, this sum is
        # largest if these k are the ones above 0. So the root for the whole batch is the smallest u_k.
        falling, measure = in_order(batch, gaps, falling=True)
        measured = batch.cumulative_sum(measure)
        roots = (batch.count - batch.cumulative_sum(measure * falling)) / measured
        u = xp.min(xp.where(measured > 0, roots, float("inf")))
        for _ in range(_STEPS):
            above = gaps + u
            mean = batch.mean(xp.where(above > 0, above, 0.0))
            u = u - (mean - 1.0) / batch.mean(xp.astype(above > 0, losses.dtype))
        above = gaps + u
        weights = xp.where(above > 0, above, 0.0)
        return xp.where(batch.any(xp.isnan(losses)), float("nan"), weights)

    def kernel(self) -> Kernel:
        """The kernel `chi_square`: the penalty's strength."""
        return self.kernel_name, (self.gamma,)

    @classmethod
    def of_kernel(cls, numbers: tuple[float, ...]) -> ChiSquare:
        """The weighting of a kernel's numbers."""
        return cls(*numbers)


@dataclasses.dataclass(frozen=True)
class ChiSquareBall(Weighting):
    """Weights of the worst distribution within a chi-square ball around the measure.

    `w_i = max(0, l_i - eta) / mean(max(0, l - eta))` with `eta` the root of
    `(mean(w^2) - 1) / 2 = radius`: the solution of `max_q <q, l>` subject to `mean((w - 1)^2) / 2 <= radius`
    with `w = q / p`. A radius of `(1 / m - 1) / 2` or more, where the samples of the largest loss have the
    share `m` of the measure, puts all weight on those; equal losses get equal weights. Infinite losses share
    all the weight, for any radius above 0.

    Args:
        radius: Radius of the ball, a number >= 0. 0 is plain empirical risk minimization.

    Raises:
        TypeError: If `radius` is not a number.
        ValueError: If `radius` is negative or NaN.

    Example:
        >>> import numpy as np, rgd
        >>> weights = rgd.sample_weights(np.array([0.0, 1.0, 2.0]), rgd.ChiSquareBall(0.5))
        >>> weights.round(4), round(float(np.mean((weights - 1) ** 2) / 2), 6)
        (array([0.   , 0.634, 2.366]), 0.5)

    References:
        Namkoong, Duchi, "Stochastic Gradient Methods for Distributionally Robust Optimization with
        f-divergences", NeurIPS 2016; Duchi, Namkoong, "Learning Models with Uniform Performance via
        Distributionally Robust Optimization", Annals of Statistics 2021, section 2.
    """

    kernel_name = "chi_square_ball"

    radius: float = setting("a number >= 0", lambda radius: radius >= 0)

    mean_one = True

    def weights(self, batch: Batch) -> Any:
        """`max(0, gap + t) / mean(max(0, gap + t))`, `t` such that the divergence is the radius."""
        xp, losses, radius = batch.xp, batch.losses, batch.scalar(self.radius)
        ball = gaps_of(batch)
        gaps, below, mean_of = ball.values, ball.below, ball.mean
        # Losses of -inf have weight 0, which uses a part of the divergence.
        left = radius * ball.left - (1.0 - ball.left) / 2.0
        left = xp.where(left < 0, 0.0, left)
        limit = (1.0 / ball.share - 1.0) / 2.0
        mean = mean_of(gaps)
        deviation = gaps - mean
        variance = mean_of(deviation**2)
        variance = xp.where(variance > 0, variance, 1.0)
        # If no weight is 0, the weights are linear in the loss.
        linear = 1.0 + deviation * (2.0 * left / variance) ** 0.5
        all_positive = ball.batch.min(linear) >= 0
        square = 1.0 + 2.0 * left

        def enough(t: Any) -> Any:
            """Whether the mean square of the weights is at most what the radius allows, at several `t`."""
            # In units of t, so that the range of the losses does not matter. At t = 0 no loss is above.
            above = xp.where(below + t > 0, below + t, 0.0) / xp.where(t > 0, t, 1.0)
            mean = mean_of(above)[:, None]
            return (mean_of((above / xp.where(mean > 0, mean, 1.0)) ** 2) <= square) & (mean[:, 0] > 0)

        # The threshold lies between this loss and the one above it. The share of the measure, the mean and
        # the variance of the losses above it give t: (1 + variance / (mean + t)^2) / share = square.
        in_play = below + first_enough(ball.batch, xp.sort(-below), enough) > 0
        extent = ball.batch.max(xp.where(in_play, -below, 0.0))
        scaled = below / xp.where(extent > 0, extent, 1.0)
        share = mean_of(xp.astype(in_play, losses.dtype))
        mean = mean_of(xp.where(in_play, scaled, 0.0)) / share
        variance = mean_of(xp.where(in_play, scaled - mean, 0.0) ** 2) / share
        beyond = (share - 1.0) + 2.0 * left * share
        above = scaled - mean + (variance / xp.where(beyond > 0, beyond, 1.0)) ** 0.5
        above = xp.where(above > 0, above, 0.0)
        weights = xp.where(all_positive, linear, above / mean_of(above))
        return with_corners(batch, ball, weights, radius=radius, radius_left=left, limit=limit)

    def kernel(self) -> Kernel:
        """The kernel `chi_square_ball`: the radius."""
        return self.kernel_name, (self.radius,)

    @classmethod
    def of_kernel(cls, numbers: tuple[float, ...]) -> ChiSquareBall:
        """The ball of a kernel's numbers."""
        return cls(*numbers)
