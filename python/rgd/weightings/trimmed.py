"""A weighting without the largest losses, which may be outliers."""

from __future__ import annotations

import dataclasses
from typing import Any

from rgd.weightings._base import Kernel, Weighting, setting
from rgd.weightings._batch import Batch
from rgd.weightings._call import kernel_of, weigh, weighting_of
from rgd.weightings._tail import share_in_tail


@dataclasses.dataclass(frozen=True)
class Trimmed(Weighting):
    """Leaves out the share `fraction` of the measure with the largest losses, and weights the rest.

    The sample at the edge of that share is left out in part, and of samples with equal losses equal parts are
    left out. The weighting gets the rest. The objective still divides by all samples, so the weights do not
    average to one.

    Args:
        weighting: Weights the rest.
        fraction: The share that is left out, in [0, 1).

    Raises:
        TypeError: If `weighting` is no weighting, or `fraction` not a number.
        ValueError: If `fraction` is not in [0, 1).

    Example:
        >>> import numpy as np, rgd
        >>> losses = np.array([0.0, 1.0, 2.0, 90.0])
        >>> rgd.sample_weights(losses, rgd.Trimmed(rgd.CVaR(1 / 3), fraction=0.25))
        array([0., 0., 3., 0.])

    References:
        Zhai, Dan, Kolter, Ravikumar, "DORO: Distributional and Outlier Robust Optimization", ICML 2021,
        Algorithm 1.
    """

    kernel_name = "trimmed"

    weighting: Weighting
    fraction: float = setting("in [0, 1)", lambda fraction: (fraction >= 0) & (fraction < 1))

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weighting(self.weighting)

    @property
    def stateful(self) -> bool:
        """Whether the inner weighting remembers earlier batches."""
        return self.weighting.stateful

    def init(self) -> Any:
        """The state of the inner weighting."""
        return self.weighting.init()

    def weights(self, batch: Batch) -> Any:
        """The kept share of each sample, times its weight among the rest."""
        return self.step(batch, None)[0]

    def step(self, batch: Batch, state: Any) -> tuple[Any, Any]:
        """The same weights, and the state of the inner weighting."""
        xp = batch.xp
        kept = 1.0 - share_in_tail(batch, self.fraction)
        weights, state = weigh(self.weighting, batch.reweighed(batch.measure * kept), state)
        weights = kept * weights
        return xp.where(batch.any(xp.isnan(batch.losses)), float("nan"), weights), state

    def kernel(self) -> Kernel | None:
        """The kernel `trimmed(...)` of an inner kernel: the share, and the inner numbers."""
        inner = kernel_of(self.weighting)
        if inner is None or inner[0] not in ("chi_square", "cvar", "kl"):
            return None
        return f"{self.kernel_name}({inner[0]})", (self.fraction, *inner[1])

    @classmethod
    def of_kernel(cls, numbers: tuple[float, ...], inner: str = "") -> Trimmed:
        """The weighting of a kernel's numbers and the name of its inner kernel."""
        return cls(weighting_of((inner, numbers[1:])), numbers[0])


def require_weighting(weighting: Any) -> None:
    """Refuse an inner weighting that is no weighting."""
    if not isinstance(weighting, Weighting):
        raise TypeError(f"weighting must be an rgd.Weighting, such as rgd.KL(tau=1.0), got {weighting!r}")
