"""Exponential weights that are clipped at the middle of the batch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from rgd.weightings._base import Kernel, Weighting, setting
from rgd.weightings._batch import Batch
from rgd.weightings._limits import difference, small, times


@dataclasses.dataclass(frozen=True)
class MidrangeKL(Weighting):
    """Exponential weights clipped at the middle between the smallest and the largest loss of the batch.

    `w_i = exp(s * min(l_i, (min l + max l) / 2))`, divided by their mean. You need not choose a clip, which
    helps with language models, whose losses begin far above any fixed `tau`. In the paper the scale grows
    from 0 after a warm-up: use `rgd.torch.WeightingSchedule` or an optax schedule for this.

    For infinite losses the weights are their limits as the loss grows: with `s > 0` these losses share all
    the weight, with `s < 0` their weight is 0.

    Args:
        scale: Scaling factor `s`, a finite number, in units of 1/loss, or with `relative` without a unit.
        relative: Whether losses are measured in half ranges, `(max l - min l) / 2`, before they are scaled.

    Raises:
        TypeError: If `scale` is not a number, or `relative` not a bool.
        ValueError: If `scale` is not finite.

    Example:
        >>> import numpy as np, rgd
        >>> rgd.sample_weights(np.array([0.0, 1.0, 2.0]), rgd.MidrangeKL(1.0)).round(4)
        array([0.4661, 1.267 , 1.267 ])
        >>> rgd.sample_weights(np.array([0.0, 10.0, 20.0]), rgd.MidrangeKL(1.0, relative=True)).round(4)
        array([0.4661, 1.267 , 1.267 ])

    References:
        Sow, Woisetschläger, Bulusu, Wang, Jacobsen, Liang, "Dynamic Loss-Based Sample Reweighting for
        Improved Large Language Model Pretraining", ICLR 2025, arXiv 2502.06733: the clip. Their released code
        measures losses in half ranges: `relative=True`.
    """

    kernel_name = "midrange_kl"

    scale: float = setting("a finite number", lambda scale: (scale > -math.inf) & (scale < math.inf))
    relative: bool = False

    mean_one = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.relative, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"relative must be True or False, got {self.relative!r}")

    def weights(self, batch: Batch) -> Any:
        """`exp(s * min(l, middle))`, divided by its mean."""
        xp, falling = batch.xp, batch.scalar(self.scale) < 0
        losses = small(batch.losses)
        top, bottom = batch.max(losses), batch.min(losses)
        half_range = xp.where(top > bottom, (top - bottom) / 2, 0.0)
        # Losses are measured from the end with the largest weights. Above the middle the weight does not
        # change.
        distance = xp.abs(difference(xp, losses, xp.where(falling, bottom, top)))
        clipped = xp.where(
            falling,
            xp.where(distance > half_range, half_range, distance),
            xp.where(distance <= half_range, 0.0, distance - half_range),
        )
        clipped = clipped / xp.where(half_range > 0, half_range, 1.0) if self.relative else 16 * clipped
        clipped = xp.where(distance == float("inf"), distance, clipped)
        weights = xp.exp(times(xp, self.scale, xp.where(falling, clipped, -clipped)))
        return weights / batch.mean(weights)

    def kernel(self) -> Kernel:
        """The kernel `midrange_kl`: the scale, and whether losses are measured in half ranges."""
        return self.kernel_name, (self.scale, self.relative)

    @classmethod
    def of_kernel(cls, numbers: tuple[float, ...]) -> MidrangeKL:
        """The weighting of a kernel's numbers."""
        return cls(numbers[0], bool(numbers[1]))
