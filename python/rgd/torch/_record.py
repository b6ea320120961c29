"""What a call of a loss leaves behind, and the statistics computed from it when somebody asks."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, cast

import torch
from torch import Tensor

from rgd import _rgd
from rgd.diagnostics import WeightStats, WeightSums, clipping_factor, stats_from_sums
from rgd.torch._backend import RUST
from rgd.weightings import Weighting


class Record(NamedTuple):
    """The plain losses of a call and their weights, detached, and what was left out.

    Attributes:
        losses: One a target, 0 where the target is ignored.
        weights: One a target, or one a sample of the leading axis; 0 where all is ignored.
        denominator: What the mean divides by; a tensor where it lies on a device that nobody has waited for.
        target: The class indices, where some may be ignored.
        ignore_index: The class index that counts for nothing.
        where: Which losses count, where a mask was given.
        path: "rust" or "composite": what computed it.
    """

    losses: Tensor
    weights: Tensor
    denominator: float | Tensor
    target: Tensor | None = None
    ignore_index: int = -100
    where: Tensor | None = None
    path: str = RUST

    def stats(self, weighting: Weighting) -> WeightStats:
        """The statistics of the weights, which `weighting` gave; waits for the device they lie on."""
        losses, weights, count = self.losses, self.weights, self.losses.numel()
        denominator = float(self.denominator)
        counted = self.where
        if self.target is not None:
            counted = self.target != self.ignore_index
        if weights.dim() < losses.dim():
            wide = losses.flatten(1).to(_wide(losses))
            sums = wide.sum(1)
            kept = torch.ones_like(losses, dtype=torch.bool) if counted is None else counted
            targets = kept.flatten(1).sum(1)
            units = sums / targets.clamp(min=1)
            stats = _stats(units, weights, weighting, int((targets > 0).sum()), denominator)
            return dataclasses.replace(
                stats,
                mean_loss=_quotient(sums.sum(), denominator),
                objective=_quotient((sums * weights).sum(), denominator),
            )
        if counted is not None:
            count = int(counted.sum())
        return _stats(losses, weights, weighting, count, denominator)


def _quotient(numerator: Tensor, denominator: float) -> float:
    return float(
        numerator.double() / denominator if numerator.device.type != "mps" else numerator / denominator
    )


def _stats(
    losses: Tensor, weights: Tensor, weighting: Weighting, count: int, denominator: float
) -> WeightStats:
    tau = clipping_factor(weighting)
    if losses.is_cpu and type(losses) is Tensor and type(weights) is Tensor:
        sums = _rgd.weight_sums(losses.contiguous(), weights.contiguous(), tau, torch.get_num_threads())
    else:
        sums = _sums(losses, weights, tau)
    return stats_from_sums(sums, weighting, count=count, denominator=denominator)


def _sums(losses: Tensor, weights: Tensor, tau: float) -> WeightSums:
    """What `_rgd.weight_sums` returns, by torch operations and one wait for the device."""
    if not losses.numel():
        return 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0
    above = (losses > tau).sum()
    losses, weights = losses.to(_wide(losses)), weights.to(_wide(weights))
    sums = [
        losses.sum(),
        weights.sum(),
        (weights * losses).sum(),
        weights.square().sum(),
        torch.xlogy(weights, weights).sum(),
        weights.max(),
        above.to(losses.dtype),
    ]
    numbers = cast("list[float]", torch.stack(sums).tolist())  # pyright: ignore[reportUnknownMemberType]
    loss, weight, weighted_loss, square, entropy, largest, clipped = numbers
    return losses.numel(), loss, weight, weighted_loss, square, entropy, largest, int(clipped)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64
