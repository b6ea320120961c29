"""Plain training."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from rgd.weightings._base import Kernel, Weighting
from rgd.weightings._batch import Batch


@dataclasses.dataclass(frozen=True)
class ERM(Weighting):
    """Empirical risk minimization: every weight is 1. A NaN loss has a NaN weight.

    Example:
        >>> import numpy as np, rgd
        >>> rgd.sample_weights(np.array([0.5, 3.0]), rgd.ERM())
        array([1., 1.])

    References:
        Vapnik, "Principles of Risk Minimization for Learning Theory", NeurIPS 1991.
    """

    pointwise = True
    mean_one = True
    is_plain = True

    def weights(self, batch: Batch) -> Any:
        """Ones."""
        return batch.xp.where(batch.xp.isnan(batch.losses), batch.losses, 1.0)

    def log_weights(self, batch: Batch) -> Any:
        """Zeros."""
        return batch.xp.where(batch.xp.isnan(batch.losses), batch.losses, 0.0)

    def kernel(self) -> Kernel:
        """The kernel of exponential weights at scale 0."""
        return "kl", (math.inf, 0.0, 0.0)
