"""What a call of a loss leaves behind, and the statistics computed from it when somebody asks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from rgd import _rgd
from rgd._arrays import unit_of
from rgd.stats import GroupStats, WeightStats, WeightSums, clip_of, group_stats, stats_from_sums
from rgd.torch._distributed import gather, reduce_max, reduce_sums
from rgd.torch.backends._options import wide
from rgd.weightings import Weighting


class Record(NamedTuple):
    """The plain losses of a call and their weights, detached, and what was left out.

    Attributes:
        losses: One a target, 0 where the target is ignored.
        weights: One a target, or one a sample of the leading axis; 0 where all is ignored.
        denominator: What the mean divides by; a tensor where it lies on a device that nobody has waited for.
        base: The base measure of each weight; None for ones.
        counted: Which losses count, bool; None for all that `base` counts.
        groups: The group of each weight, where they were given.
        backend: What computed it.
        version: How often `losses` had been changed in place, where they are the caller's; else None.
    """

    losses: Tensor
    weights: Tensor
    denominator: float | Tensor
    base: Tensor | None
    counted: Tensor | None
    groups: Tensor | None
    backend: str
    version: int | None = None

    def with_copies(self) -> Record:
        """The record with copies of base measure and groups, which the caller may change in place."""
        if self.base is None and self.groups is None:
            return self
        return self._replace(base=_copy(self.base), groups=_copy(self.groups))

    def guarded(self) -> Record:
        """The record of losses and a mask of the caller: a copy of that, and word of changes of those."""
        record = self._replace(counted=_copy(self.counted))
        if torch.compiler.is_compiling() or self.losses.is_inference():
            return record._replace(losses=self.losses.clone())
        return record._replace(version=self.losses._version)

    def stats(
        self, weighting: Weighting | None, groups: Tensor | None = None, group: Any = None
    ) -> WeightStats:
        """The statistics of the weights, which `weighting` gave; waits for the device they lie on.

        With a process group: of the weights of all its processes.

        Raises:
            RuntimeError: If the losses were changed in place since the call.
        """
        losses, weights, base, counted = self.losses, self.weights, self.base, self.counted
        if self.version is not None and losses._version != self.version:
            raise RuntimeError(
                "the losses that base returned have been changed in place since the call, so nothing is left "
                "to describe: ask for stats() before, or let base return a tensor of its own"
            )
        denominator = float(self.denominator)
        if base is not None and base.numel() and group is None:
            unit = unit_of(float(base.max()))
            if unit != 1.0:
                base, denominator = base / unit, denominator / unit
        of_targets = None
        if weights.dim() < losses.dim():
            # Weights belong to samples, losses to targets.
            of_targets = losses.flatten(1).to(wide(losses))
            kept = torch.ones_like(of_targets, dtype=torch.bool) if counted is None else counted.flatten(1)
            of_targets, number = of_targets.masked_fill(~kept, 0).sum(1), kept.sum(1)
            losses, counted = of_targets / number.clamp(min=1), number > 0
        if counted is not None:
            kept = counted.to(wide(losses))
            base = kept if base is None else kept * base
        sums = sums_of(losses, weights, base, clip_of(weighting))
        if of_targets is not None:
            over_targets = sums_of(of_targets, weights, base, math.inf)
            sums = sums._replace(loss=over_targets.loss, objective=over_targets.objective)
        groups = self.groups if groups is None else groups
        if group is not None:
            *totals, denominator = reduce_sums([*sums, denominator], losses.device, group)
            largest = reduce_max(sums.largest, losses.device, group)
            sums = WeightSums(int(totals[0]), *totals[1:])._replace(largest=largest)
        by_group = None if groups is None else stats_by_group(losses, weights, base, groups, group)
        return stats_from_sums(sums, weighting, denominator=denominator, groups=by_group)


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def sums_of(losses: Tensor, weights: Tensor, base: Tensor | None, clip: float) -> WeightSums:
    """The sums of the statistics, over tensors of one shape."""
    if losses.is_cpu and type(losses) is Tensor and type(weights) is Tensor:
        base = None if base is None else base.double().contiguous()
        threads = torch.get_num_threads()
        return WeightSums(*_rgd.weight_sums(losses.contiguous(), weights.contiguous(), base, clip, threads))
    return _sums(losses, weights, base, clip)


def stats_by_group(
    losses: Tensor, weights: Tensor, base: Tensor | None, groups: Tensor, group: Any = None
) -> GroupStats:
    """The statistics of each group, over the processes of a process group if there is one."""
    vectors = [losses.to(wide(losses)), weights.to(wide(losses)), groups.to(torch.int64)]
    vectors += [] if base is None else [base.to(wide(losses))]
    vectors = [vector.detach().reshape(-1) for vector in vectors]
    if group is not None:
        vectors = gather(vectors, group)[0]
    arrays = [np.asarray(vector.cpu()) for vector in vectors]
    return group_stats(arrays[0], arrays[1], arrays[3] if len(arrays) > 3 else None, arrays[2])


def _sums(losses: Tensor, weights: Tensor, base: Tensor | None, clip: float) -> WeightSums:
    """What `_rgd.weight_sums` returns, by torch operations and one wait for the device."""
    if not losses.numel():
        return WeightSums(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    dtype = wide(losses)
    losses, weights = losses.detach().to(dtype), weights.detach().to(dtype)
    p = torch.ones_like(losses) if base is None else base.to(dtype)
    counted = p != 0
    losses, weights = losses.masked_fill(~counted, 0), weights.masked_fill(~counted, 0)
    safe = losses.masked_fill((weights == 0) & ~losses.isnan(), 0)
    sums = [
        counted.sum(dtype=dtype),
        p.sum(),
        (p * losses).sum(),
        (p * weights).sum(),
        (p * weights * safe).sum(),
        (p * weights.square()).sum(),
        (p * torch.xlogy(weights, weights)).sum(),
        weights.max(),
        (p * (losses > clip)).sum(),
    ]
    numbers = cast("list[float]", torch.stack(sums).tolist())  # pyright: ignore[reportUnknownMemberType]
    return WeightSums(int(numbers[0]), *numbers[1:])
