"""Weights divided by their running mean."""

from __future__ import annotations

import dataclasses
from typing import Any

from rgd.weightings._base import Kernel, Weighting, setting
from rgd.weightings._batch import Batch
from rgd.weightings._call import kernel_of
from rgd.weightings._limits import difference
from rgd.weightings.trimmed import require_weighting


@dataclasses.dataclass(frozen=True)
class MovingAverage(Weighting):
    """The weights of a pointwise weighting, divided by their running mean: about one on average.

    First `u <- decay * u + (1 - decay) * mean(w)`, then the weights are `w / u`. `u` starts as the mean of
    the first batch. Division by the mean of a small batch is biased. The running mean covers about
    `1 / (1 - decay)` batches and is less biased. The computation uses logarithms.

    The state is `{"log_mean": log(u), "updates": number of batches}`. A batch with a loss that is not finite
    does not change it, nor do first batches whose weights are all 0; their weights stay 0.

    Args:
        weighting: A pointwise weighting, such as `rgd.KL(math.inf, scale=1.0)`.
        decay: How much of the old mean stays, in [0, 1).

    Raises:
        TypeError: If `weighting` is no weighting, or `decay` not a number.
        ValueError: If `weighting` is not pointwise, or `decay` is not in [0, 1).

    Example:
        >>> import numpy as np, rgd
        >>> weighting = rgd.MovingAverage(rgd.KL(tau=1.0), decay=0.9)
        >>> state = weighting.init()
        >>> weights, state = rgd.sample_weights(np.array([0.0, 5.0]), weighting, state=state)
        >>> weights.round(4), int(state["updates"])
        (array([0.7551, 1.2449]), 1)

    References:
        Wang, Yang, "Finite-Sum Coupled Compositional Stochastic Optimization: Theory and Applications",
        ICML 2022 (SOX); Qi, Xu, Yin, Jin, Yang, "Attentional-Biased Stochastic Gradient Descent", TMLR 2023
        (ABSGD), Algorithm 1.
    """

    kernel_name = "moving_average"

    weighting: Weighting
    decay: float = setting("in [0, 1)", lambda decay: (decay >= 0) & (decay < 1))

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weighting(self.weighting)
        if not self.weighting.pointwise:
            raise ValueError(
                f"weighting must be pointwise, as rgd.KL(tau=1.0) is, got {self.weighting}: its weights "
                "depend on the batch, which a running mean cannot mend"
            )

    @property
    def clip(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The clip of the inner weighting."""
        return self.weighting.clip

    def init(self) -> dict[str, float | int]:
        """The state before the first batch: no mean, and no batches."""
        return {"log_mean": 0.0, "updates": 0}

    def step(self, batch: Batch, state: Any) -> tuple[Any, Any]:
        """`w / u` with the new `u`."""
        xp, decay = batch.xp, batch.scalar(self.decay)
        logarithm = self.weighting.log_weights(batch)
        old, updates = state["log_mean"], state["updates"]
        # Logarithms are relative to the largest weight, or to 1 if all weights are 0.
        top = batch.max(logarithm)
        top = xp.where(top == -float("inf"), 0.0, top)
        logarithm = difference(xp, logarithm, top)
        mean = xp.log(batch.mean(xp.exp(logarithm)))
        mixed = xp.logaddexp(xp.log(decay) + difference(xp, old, top), xp.log1p(-decay) + mean)
        mean = xp.where(updates == 0, mean, mixed)
        new = mean + top
        # If all weights so far were 0, there is no mean to divide by, and the weights stay 0.
        weights = xp.exp(logarithm - xp.where(mean == -float("inf"), 0.0, mean))
        known = xp.isfinite(new)
        after = {"log_mean": xp.where(known, new, old), "updates": xp.where(known, updates + 1, updates)}
        return weights, after

    def kernel(self) -> Kernel | None:
        """The kernel `moving_average(kl)`: the decay, and the numbers of the inner kernel."""
        inner = kernel_of(self.weighting)
        if inner is None or inner[0] != "kl":
            return None
        return f"{self.kernel_name}({inner[0]})", (self.decay, *inner[1])
