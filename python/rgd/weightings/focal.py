"""The factor of focal loss as a constant weight, a known baseline."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from rgd.weightings._base import Kernel, Weighting, setting
from rgd.weightings._batch import Batch


@dataclasses.dataclass(frozen=True)
class Focal(Weighting):
    """The focal factor `w_i = (1 - exp(-l_i))^gamma`, held constant.

    For cross-entropy, `l = -log p`, this is `(1 - p)^gamma`. Focal loss differentiates the factor too; here
    it is a weight, as everywhere in this package. A negative loss, which no cross-entropy has, weighs 0.

    Args:
        gamma: The exponent, a finite number >= 0; 0 is plain empirical risk minimization.

    Raises:
        TypeError: If `gamma` is not a number.
        ValueError: If `gamma` is negative or not finite.

    Example:
        >>> import numpy as np, rgd
        >>> rgd.sample_weights(np.array([0.0, np.log(2), 50.0]), rgd.Focal(2.0))
        array([0.  , 0.25, 1.  ])

    References:
        Lin, Goyal, Girshick, He, Dollár, "Focal Loss for Dense Object Detection", ICCV 2017, equation 4.
    """

    kernel_name = "focal"

    gamma: float = setting("a finite number >= 0", lambda gamma: (gamma >= 0) & (gamma < math.inf))

    pointwise = True

    def weights(self, batch: Batch) -> Any:
        """`(1 - exp(-l))^gamma`."""
        xp, losses = batch.xp, batch.losses
        unlikely = -xp.expm1(-xp.where(losses > 0, losses, 0.0))
        return xp.where(xp.isnan(losses), losses, unlikely**self.gamma)

    def kernel(self) -> Kernel:
        """The kernel `focal`: the exponent."""
        return self.kernel_name, (self.gamma,)

    @classmethod
    def of_kernel(cls, numbers: tuple[float, ...]) -> Focal:
        """The weighting of a kernel's numbers."""
        return cls(*numbers)
