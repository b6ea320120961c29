"""The record of a call of a loss, and the statistics that are computed from it on request."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from rgd import _rgd
from rgd._arrays import power_of
from rgd.stats import (
    GroupStats,
    WeightStats,
    WeightSums,
    clip_of,
    group_stats,
    quotient,
    stats_from_sums,
    worst_tenth,
)
from rgd.torch._distributed import gather, reduce_max, reduce_sums
from rgd.torch._dtypes import wide
from rgd.torch._measure import check_groups, units_of
from rgd.torch._problem import Problem
from rgd.torch.segments import Segments
from rgd.weightings import Weighting


class Filled(NamedTuple):
    """The results of a backend for a problem.

    Attributes:
        losses: One a target, detached.
        weights: One a unit; with segments, one a target.
        divisor: `sum p c` of the targets, by which "mean" divides without a normalizer.
        all_count: Whether it is known that no target is ignored.
        of_units: With segments, the weights of the units.
    """

    losses: Tensor
    weights: Tensor
    divisor: float | Tensor
    all_count: bool = False
    of_units: Tensor | None = None


class Record(NamedTuple):
    """The plain losses of a call and their weights, detached, with masks, measure and groups.

    Attributes:
        losses: One a target, 0 where the target is ignored.
        weights: One a target, one a sample of the leading axis, or one a segment; 0 if all is ignored.
        divisor: `sum p c` of the targets; a tensor if it is on a device that has not been waited for.
        measure: The base measure of each weight; with segments, of each target; None for ones.
        counted: Which losses count, bool; None for all that `measure` counts.
        groups: The group of each weight, or None.
        backend: The name of the backend.
        version: The version counter of `losses` at the call, if they are the caller's tensor; else None.
        normalizer: The number that the objective was divided by instead of the divisor, or None.
        segments: The unit of each target, if segments are the units.
        reference: The losses of a reference model that these were compared with; or None.
        extras: What the call returns of its logits, by name, of the losses' shape.
    """

    losses: Tensor
    weights: Tensor
    divisor: float | Tensor
    measure: Tensor | None
    counted: Tensor | None
    groups: Tensor | None
    backend: str
    version: int | None = None
    normalizer: float | Tensor | None = None
    segments: Segments | None = None
    reference: Tensor | None = None
    extras: dict[str, Tensor] | None = None

    @classmethod
    def of(cls, problem: Problem, filled: Filled, backend: str) -> Record:
        """The record of a problem, with the caller's measure, which is not divided by a power of two."""
        measure, divisor, normalizer = problem.measure, filled.divisor, problem.normalizer
        if problem.power != 1.0:
            measure, divisor = problem.given_measure, times_power(divisor, problem.power)
            normalizer = None if normalizer is None else times_power(normalizer, problem.power)
        counted = None if filled.all_count else problem.counted()
        weights = filled.weights
        if problem.segments is not None:
            weights, counted = cast("Tensor", filled.of_units), problem.counted()
        return cls(
            filled.losses, weights, divisor, measure, counted, problem.groups, backend,
            normalizer=normalizer, segments=problem.segments, reference=problem.reference,
        )  # fmt: skip

    def changed(self, **changes: Any) -> Record:
        """As `_replace`, which torch 2.8 does not compile."""
        values: dict[str, Any] = {**dict(zip(_FIELDS, self, strict=True)), **changes}
        return Record(**values)

    def with_copies(self) -> Record:
        """The record with copies of measure, groups and reference, which the caller may change in place."""
        copies = {name: _copy(getattr(self, name)) for name in ("measure", "groups", "reference")}
        return self.changed(**copies)

    def guarded(self) -> Record:
        """The record for losses and a mask of the caller: copies the mask, and notes the losses' version."""
        if self.version is not None:
            return self
        record = self.changed(counted=_copy(self.counted))
        if torch.compiler.is_compiling() or self.losses.is_inference():
            return record.changed(losses=self.losses.clone())
        return record.changed(version=self.losses._version)

    def check_unchanged(self) -> None:
        """Refuse losses of the caller that were changed in place since the call."""
        if self.version is not None and self.losses._version != self.version:
            raise RuntimeError(
                "the losses that base returned have been changed in place since the call, so nothing is left "
                "to describe: ask for stats() before, or let base return a tensor of its own"
            )

    def units(self) -> Units:
        """The units, which have one weight each: targets, or samples with their mean losses."""
        losses, measure, counted, reference = self.losses, self.measure, self.counted, self.reference
        number = of_targets = None
        segments = self.segments
        if segments is not None:
            kept = cast("Tensor", counted)
            of_targets, number = segments.totals(losses, kept)
            measure = segments.measure(kept, measure, of_targets.dtype)
            losses, excess = of_targets / number.clamp(min=1), None
            if reference is not None:
                excess = losses - segments.units(reference, kept, None)[0]
            return Units(losses, self.weights, measure, of_targets, number, excess)
        if self.weights.dim() < losses.dim():
            of_targets = losses.flatten(1).to(wide(losses))
            kept = torch.ones_like(of_targets, dtype=torch.bool) if counted is None else counted.flatten(1)
            of_targets, number = of_targets.masked_fill(~kept, 0).sum(1), kept.sum(1)
            if reference is not None:
                reference = units_of(reference, counted, None, "sample")[0]
            losses, counted = of_targets / number.clamp(min=1), number > 0
        if counted is not None:
            kept = counted.to(wide(losses))
            measure = kept if measure is None else kept * measure
        excess = None if reference is None else losses.to(wide(losses)) - reference.to(wide(losses))
        return Units(losses, self.weights, measure, of_targets, number, excess)

    def extras_of_units(self) -> dict[str, Tensor]:
        """The mean of each of the extras over the targets of a unit that count, by name."""
        if self.extras is None:
            return {}
        values = {name: one.to(wide(self.losses)) for name, one in self.extras.items()}
        if self.segments is not None:
            kept = cast("Tensor", self.counted)
            return {name: self.segments.units(one, kept, None)[0] for name, one in values.items()}
        per = "sample" if self.weights.dim() < self.losses.dim() else "element"
        return {name: units_of(one, self.counted, None, per)[0] for name, one in values.items()}

    def groups_of(self, groups: Tensor | None) -> Tensor | None:
        """The group of each unit, checked, from the caller's groups."""
        if self.segments is not None:
            return self.segments.groups(groups, self.losses.device)
        per = "sample" if self.weights.dim() < self.losses.dim() else "element"
        return check_groups(groups, self.losses.shape, self.losses.device, per)

    def within_range(self) -> Record:
        """The record with its measure divided by a power of two, so that no sum overflows."""
        if self.measure is None or not self.measure.numel():
            return self
        power = power_of(float(self.measure.max()))
        if power == 1.0:
            return self
        normalizer = None if self.normalizer is None else self.normalizer / power
        return self._replace(
            measure=self.measure / power, divisor=self.divisor / power, normalizer=normalizer
        )

    def stats(
        self, weighting: Weighting | None, groups: Tensor | None = None, group: Any = None
    ) -> WeightStats:
        """The statistics of the weights, which `weighting` made. This waits for the device.

        With a process group they cover the weights of all its processes.

        Raises:
            RuntimeError: If the losses were changed in place since the call.
        """
        self.check_unchanged()
        record = self.within_range() if group is None else self
        units = record.units()
        losses, weights, measure = units.losses, units.weights, units.measure
        sums, divisor = units.sums(clip_of(weighting)), float(record.divisor)
        normalizer = divisor if record.normalizer is None else float(record.normalizer)
        # The number of targets. Without class weights it is equal to the divisor.
        targets = sums.mass
        if units.number is not None:
            targets = float((units.number if measure is None else units.number * measure).sum())
        groups = self.groups if groups is None else groups
        tail: Any = losses, measure
        if group is not None:
            own_numbers = [divisor, targets, normalizer]
            sums, (divisor, targets, normalizer) = _over_processes(sums, own_numbers, losses.device, group)
            own = [losses.reshape(-1), torch.ones_like(losses) if measure is None else measure]
            tail = gather([vector.reshape(-1).to(wide(losses)) for vector in own], group)[0]
        by_group = None
        if groups is not None:
            extras = record.extras_of_units()
            by_group = stats_by_group(losses, weights, measure, groups, group, extras=extras)
        return stats_from_sums(
            sums,
            weighting,
            worst_tenth=tail_of(*tail) * quotient(targets, divisor),
            denominator=divisor,
            normalizer=normalizer,
            groups=by_group,
        )


class Units(NamedTuple):
    """Losses and weights of one shape.

    Attributes:
        losses: One a target or a sample.
        weights: The weight of each.
        measure: The base measure of each, 0 for a unit that takes no part; None for ones.
        of_targets: If the units are samples, the sum of the losses of each one's targets; else None.
        number: If the units are samples, the number of targets of each; else None.
        excess: Each loss minus that of a reference model; None without one.
    """

    losses: Tensor
    weights: Tensor
    measure: Tensor | None
    of_targets: Tensor | None
    number: Tensor | None
    excess: Tensor | None = None

    def sums(self, clip: float) -> WeightSums:
        """The sums of the statistics: shares and weights over units, losses and objective over targets."""
        sums = sums_of(self.losses, self.weights, self.measure, clip, self.excess)
        if self.of_targets is None:
            return sums
        over_targets = sums_of(self.of_targets, self.weights, self.measure, math.inf)
        return sums._replace(loss=over_targets.loss, objective=over_targets.objective)

    def are_on_the_host(self) -> bool:
        """Whether the sums can be read now, without waiting for a device or ending a compiled graph."""
        return not torch.compiler.is_compiling() and self.losses.is_cpu and type(self.losses) is Tensor

    def sum_tensor(self, clip: float) -> Tensor:
        """The same as a vector on the device, without waiting for it; in a compiled graph too."""
        sums = _sum_tensor(self.losses, self.weights, self.measure, clip)
        if self.excess is not None:
            clipped = WeightSums._fields.index("clipped")
            sums[clipped] = _sum_tensor(self.excess, self.weights, self.measure, clip)[clipped]
        if self.of_targets is None:
            return sums
        over_targets = _sum_tensor(self.of_targets, self.weights, self.measure, math.inf)
        replaced = [WeightSums._fields.index(name) for name in ("loss", "objective")]
        sums[replaced] = over_targets[replaced]
        return sums


def tail_of(losses: Tensor, measure: Tensor | None) -> float:
    """The mean loss of the worst tenth of the mass; waits for the device."""
    if losses.is_cpu and type(losses) is Tensor:
        arrays = [
            None if one is None else np.asarray(one.detach().to(wide(losses))) for one in (losses, measure)
        ]
        return worst_tenth(cast("Any", arrays[0]), arrays[1])
    losses = losses.detach().reshape(-1).to(wide(losses))
    mass = torch.ones_like(losses) if measure is None else measure.reshape(-1).to(losses.dtype)
    if not losses.numel():
        return math.nan
    losses, order = losses.masked_fill(mass == 0, 0).sort(descending=True)  # NaN first
    mass = mass[order]
    reached = mass.cumsum(0)
    tenth = reached[-1] / 10
    taken = torch.minimum((tenth - (reached - mass)).clamp(min=0), mass)
    return float((taken * losses).masked_fill(taken == 0, 0).sum() / tenth)


def _over_processes(
    sums: WeightSums, others: list[float], device: torch.device, group: Any
) -> tuple[WeightSums, list[float]]:
    """Each number, summed (or maximised) over all processes of a group."""
    reduced = reduce_sums([*sums, *others], device, group)
    totals, others = reduced[: len(sums)], reduced[len(sums) :]
    largest = reduce_max(sums.largest, device, group)
    return WeightSums(int(totals[0]), *totals[1:])._replace(largest=largest), others


_FIELDS = Record._fields


def times_power(divisor: Tensor | float, power: float) -> Tensor | float:
    """The divisor for the caller's measure, from the divisor for the measure over a power of two."""
    return (divisor.double() if isinstance(divisor, Tensor) else divisor) * power


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def sums_of(
    losses: Tensor, weights: Tensor, measure: Tensor | None, clip: float, excess: Tensor | None = None
) -> WeightSums:
    """The sums of the statistics, over tensors of one shape. If `excess` is given, the clip applies to it."""
    if excess is not None:
        clipped = sums_of(excess, weights, measure, clip).clipped
        return sums_of(losses, weights, measure, clip)._replace(clipped=clipped)
    if losses.is_cpu and type(losses) is Tensor and type(weights) is Tensor:
        measure = None if measure is None else measure.double().contiguous()
        threads = torch.get_num_threads()
        sums = _rgd.weight_sums(losses.contiguous(), weights.contiguous(), measure, clip, threads)
        return WeightSums(**sums)
    return _sums(losses, weights, measure, clip)


def stats_by_group(
    losses: Tensor,
    weights: Tensor,
    measure: Tensor | None,
    groups: Tensor,
    group: Any = None,
    *,
    extras: dict[str, Tensor],
) -> GroupStats:
    """The statistics of each group, over the processes of a process group if there is one."""
    if measure is None and group is not None:
        measure = torch.ones_like(losses)  # another process may have one
    vectors = [losses.to(wide(losses)), weights.to(wide(losses)), groups.to(torch.int64)]
    vectors += [one.to(wide(losses)) for one in extras.values()]
    vectors += [] if measure is None else [measure.to(wide(losses))]
    vectors = [vector.detach().reshape(-1) for vector in vectors]
    if group is not None:
        vectors = gather(vectors, group)[0]
    arrays = [np.asarray(vector.cpu()) for vector in vectors]
    of_extras = dict(zip(extras, arrays[3:], strict=False))
    return group_stats(arrays[0], arrays[1], None if measure is None else arrays[-1], arrays[2], of_extras)


def _sums(losses: Tensor, weights: Tensor, measure: Tensor | None, clip: float) -> WeightSums:
    """The sums of `_rgd.weight_sums`, computed by torch operations, with one wait for the device."""
    numbers = cast("list[float]", _sum_tensor(losses, weights, measure, clip).tolist())  # pyright: ignore[reportUnknownMemberType]
    return WeightSums(int(numbers[0]), *numbers[1:])


def _sum_tensor(losses: Tensor, weights: Tensor, measure: Tensor | None, clip: float) -> Tensor:
    """The same as a vector on the device."""
    dtype = wide(losses)
    if not losses.numel():
        return torch.zeros(len(WeightSums._fields), dtype=dtype, device=losses.device)
    losses, weights = losses.detach().to(dtype), weights.detach().to(dtype)
    p = torch.ones_like(losses) if measure is None else measure.to(dtype)
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
    return torch.stack(sums)
