"""What a call of a loss leaves behind, and the statistics computed from it when somebody asks."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rgd import _rgd
from rgd.diagnostics import WeightStats, WeightSums, clipping_factor, stats_from_sums
from rgd.torch._backend import RUST
from rgd.torch._group import reduce_max, reduce_sums
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

    def stats(self, weighting: Weighting, group: Any = None) -> WeightStats:
        """The statistics of the weights, which `weighting` gave; waits for the device they lie on.

        With a process group: of the weights of all its processes.
        """
        losses, weights, count = self.losses, self.weights, self.losses.numel()
        denominator = float(self.denominator)
        counted = self.where
        if self.target is not None:
            counted = self.target != self.ignore_index
        tau = clipping_factor(weighting)
        if weights.dim() < losses.dim():
            totals = losses.flatten(1).to(_wide(losses)).sum(1)
            kept = torch.ones_like(losses, dtype=torch.bool) if counted is None else counted
            targets = kept.flatten(1).sum(1)
            units, _, weight, _, *rest = _all_sums(totals / targets.clamp(min=1), weights, tau)
            # Weights belong to samples, losses to targets.
            sums = (units, float(totals.sum()), weight, float((totals * weights).sum()), *rest)
            count = int((targets > 0).sum())
        else:
            sums = _all_sums(losses, weights, tau)
            count = count if counted is None else int(counted.sum())
        if group is not None:
            *additive, largest, clipped = sums
            additive = reduce_sums([*additive, clipped, count, denominator], losses.device, group)
            largest = reduce_max(largest, losses.device, group)
            number, *additive, clipped, count, denominator = additive
            sums = (int(number), *additive, largest, int(clipped))
        return stats_from_sums(cast("WeightSums", sums), weighting, count=int(count), denominator=denominator)


def _all_sums(losses: Tensor, weights: Tensor, tau: float) -> WeightSums:
    if losses.is_cpu and type(losses) is Tensor and type(weights) is Tensor:
        return _rgd.weight_sums(losses.contiguous(), weights.contiguous(), tau, torch.get_num_threads())
    return _sums(losses, weights, tau)


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
