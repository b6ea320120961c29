"""What a call of a loss leaves behind, and the statistics computed from it when somebody asks."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from rgd import _rgd
from rgd.diagnostics import WeightStats, clipping_factor, stats_from_sums
from rgd.weightings import Weighting


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """The plain losses of a call and their weights, detached, and what was left out.

    Attributes:
        losses: One a target, 0 where the target is ignored.
        weights: One a target, or one a sample of the leading axis; 0 where all is ignored.
        denominator: What the mean divides by.
        target: The class indices, where some may be ignored.
        ignore_index: The class index that counts for nothing.
    """

    losses: Tensor
    weights: Tensor
    denominator: float
    target: Tensor | None = None
    ignore_index: int = -100

    def stats(self, weighting: Weighting) -> WeightStats:
        """The statistics of the weights, which `weighting` gave."""
        losses, weights, count = self.losses, self.weights, self.losses.numel()
        counted = None if self.target is None else self.target != self.ignore_index
        if weights.dim() < losses.dim():
            kept = torch.ones_like(losses) if counted is None else counted.to(losses.dtype)
            targets = kept.flatten(1).sum(1)
            units = losses.flatten(1).sum(1) / targets.clamp(min=1)
            stats = _stats(units, weights, weighting, int((targets > 0).sum()), self.denominator)
            sums = losses.flatten(1).double().sum(1)
            return dataclasses.replace(
                stats,
                mean_loss=float(sums.sum() / self.denominator),
                objective=float((sums * weights).sum() / self.denominator),
            )
        if counted is not None:
            count = int(counted.sum())
        return _stats(losses, weights, weighting, count, self.denominator)


def _stats(
    losses: Tensor, weights: Tensor, weighting: Weighting, count: int, denominator: float
) -> WeightStats:
    sums = _rgd.weight_sums(
        losses.contiguous(), weights.contiguous(), clipping_factor(weighting), torch.get_num_threads()
    )
    return stats_from_sums(sums, weighting, count=count, denominator=denominator)
