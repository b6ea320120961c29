"""A weighting that drops every loss above a number."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from rgd.weightings._base import Kernel, Weighting, setting
from rgd.weightings._batch import Batch


@dataclasses.dataclass(frozen=True)
class Threshold(Weighting):
    """Drops large losses: `w_i = 1` where `l_i <= max_loss`, else 0.

    Each sample is kept or left out by its own loss alone. The objective still divides by all samples, so the
    weights do not average to one. `Trimmed(ERM(), fraction)` leaves out a share of each batch instead.

    Args:
        max_loss: The largest loss that is kept, a finite number, in units of the loss. With `Excess` it is an
            excess, and may be negative.

    Raises:
        TypeError: If `max_loss` is not a number.
        ValueError: If `max_loss` is not finite.

    Example:
        >>> import numpy as np, rgd
        >>> rgd.sample_weights(np.array([0.5, 3.0, 3.1]), rgd.Threshold(3.0))
        array([1., 1., 0.])

    References:
        Kang, Hashimoto, "Improved Natural Language Generation via Loss Truncation", ACL 2020:
        there the number follows a quantile of recent losses.
    """

    kernel_name = "threshold"

    max_loss: float = setting(
        "a finite number", lambda max_loss: (max_loss > -math.inf) & (max_loss < math.inf)
    )

    pointwise = True

    def weights(self, batch: Batch) -> Any:
        """1 where `l <= max_loss`, else 0."""
        xp, losses = batch.xp, batch.losses
        kept = xp.astype(losses <= self.max_loss, losses.dtype)
        return xp.where(xp.isnan(losses), losses, kept)

    def kernel(self) -> Kernel:
        """The kernel `threshold`: the largest loss that is kept."""
        return self.kernel_name, (self.max_loss,)

    @classmethod
    def of_kernel(cls, numbers: tuple[float, ...]) -> Threshold:
        """The weighting of a kernel's numbers."""
        return cls(*numbers)
