"""The worst share of a batch: conditional value at risk, sharp and smoothed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from rgd.weightings._base import Kernel, Weighting, is_array, setting
from rgd.weightings._batch import Batch
from rgd.weightings._limits import difference
from rgd.weightings._root import polished
from rgd.weightings._sorted import in_order
from rgd.weightings._tail import edge_of_tail, share_in_tail


@dataclasses.dataclass(frozen=True)
class CVaR(Weighting):
    """Conditional value at risk: weight `1 / alpha` on the worst share `alpha` of the measure.

    The sample at the edge of that share counts in part, and samples of equal loss have equal weights. The
    objective `mean(w * l)` is the mean loss of the worst share, also known as the superquantile.

    With `smoothing = nu > 0` the weights are `min(1 / alpha, exp((l - eta) / nu))`, `eta` the root of
    `mean(w) = 1`: the solution of `max_q <q, l> - nu * KL(q || p)` subject to `q <= p / alpha`.

    Args:
        alpha: The share, in (0, 1]; 1 is plain empirical risk minimization.
        smoothing: `nu`, a finite number >= 0 in units of the loss.

    Raises:
        TypeError: If a setting is not a number.
        ValueError: If `alpha` is not in (0, 1], or `smoothing` is negative or not finite.

    Example:
        >>> import numpy as np, rgd
        >>> rgd.sample_weights(np.array([0.0, 1.0, 2.0, 3.0]), rgd.CVaR(0.5))
        array([0., 0., 2., 2.])

    References:
        Rockafellar, Uryasev, "Optimization of Conditional Value-at-Risk", Journal of Risk 2000; Laguel,
        Pillutla, Malick, Harchaoui, "Superquantiles at Work", 2021 (smoothing by a divergence).
    """

    kernel_name = "cvar"

    alpha: float = setting("in (0, 1]", lambda alpha: (alpha > 0) & (alpha <= 1))
    smoothing: float = setting(
        "a finite number >= 0", lambda smoothing: (smoothing >= 0) & (smoothing < math.inf), default=0.0
    )

    mean_one = True

    def weights(self, batch: Batch) -> Any:
        """`min(1 / alpha, exp((l - eta) / nu))`, or the tail's share over `alpha` without smoothing."""
        xp, nu = batch.xp, self.smoothing
        if not is_array(nu):
            weights = self._smooth(batch, nu) if nu > 0 else self._sharp(batch)
        else:
            smooth = self._smooth(batch, xp.where(nu > 0, nu, 1.0))
            weights = xp.where(nu > 0, smooth, self._sharp(batch))
        return xp.where(batch.any(xp.isnan(batch.losses)), float("nan"), weights)

    def kernel(self) -> Kernel:
        """The kernel `cvar`: share and smoothing."""
        return self.kernel_name, (self.alpha, self.smoothing)

    @classmethod
    def of_kernel(cls, numbers: tuple[float, ...]) -> CVaR:
        """The weighting of a kernel's numbers."""
        return cls(*numbers)

    def _sharp(self, batch: Batch) -> Any:
        return share_in_tail(batch, self.alpha) / self.alpha

    def _smooth(self, batch: Batch, nu: Any) -> Any:
        xp, losses = batch.xp, batch.losses
        edge = edge_of_tail(batch, self.alpha)
        gaps = batch.only(difference(xp, losses, edge) / nu)
        bound = batch.scalar(1.0 / self.alpha)
        ceiling = xp.log(bound)

        def excess(u: Any) -> tuple[Any, Any]:
            exponent = gaps + u
            free = exponent < ceiling
            weights = xp.exp(xp.where(free, exponent, ceiling))
            slope = batch.mean(xp.where(free, weights, 0.0))
            # If all weights are at the bound, u is known.
            return batch.mean(weights) - 1.0, xp.where(slope > 0, slope, float("inf"))

        # If all losses above the k smallest have the weight 1 / alpha, the mean is 1 at u_k. At a given u,
        # the mean is smallest if exactly these losses reach the bound. So the root for the whole batch is the
        # largest u_k. At the ceiling the whole tail is at the bound.
        rising, measure = in_order(batch, gaps, falling=False)
        room = batch.count - (batch.count - batch.cumulative_sum(measure)) / self.alpha
        roots = xp.log(room / batch.cumulative_sum(measure * xp.exp(rising)))
        u = xp.max(xp.where(room > 0, roots, -float("inf")))
        u = xp.where(u < ceiling, u, ceiling)
        u = polished(batch, excess, u, (u - 1.0, ceiling))
        exponent = gaps + u
        return xp.where(exponent < ceiling, xp.exp(xp.where(exponent < ceiling, exponent, 0.0)), bound)
