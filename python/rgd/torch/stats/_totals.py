"""The totals of an `RGDLoss` over many calls: the sums of its statistics, and a warning about weights."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rgd.stats import WeightStats, WeightSums, clip_of, group_stats_from_sums, group_sums, stats_from_sums
from rgd.torch._distributed import all_of, reduce_max, reduce_sums
from rgd.torch._state import is_first_pass, one_at_a_time
from rgd.torch.stats._record import Record, Units
from rgd.weightings import Weighting

# The position of the maximum among the sums. The last number is the divisor.
_LARGEST = WeightSums._fields.index("largest")
_ZERO = [0.0] * (len(WeightSums._fields) + 1)


class Totals:
    """The sums of the statistics and of the divisors, over the calls since the last reset.

    They are plain numbers for eager calls on the CPU. Otherwise they are a tensor on the device of the
    losses: nothing waits for it, and a compiled graph adds to it.
    """

    def __init__(self) -> None:
        self._numbers = _ZERO
        self._sums: Tensor | None = None
        self._groups: dict[int, npt.NDArray[np.float64]] = {}

    def add(self, record: Record, weighting: Weighting) -> None:
        """Add the sums of a call."""
        with one_at_a_time():
            self._add(record, weighting)

    def _add(self, record: Record, weighting: Weighting) -> None:
        units, clip, divisor = record.units(), clip_of(weighting), record.divisor
        if units.are_on_the_host() and not isinstance(divisor, Tensor):
            self._numbers = _merged(self._numbers, [*units.sums(clip), divisor])
            if record.groups is not None:
                self._add_groups(units, record.groups, record.extras_of_units())
            return
        sums = units.sum_tensor(clip)
        if not isinstance(divisor, Tensor):
            divisor = sums.new_full((), divisor)
        sums = torch.cat([sums, divisor.to(sums).reshape(1)])
        before = torch.zeros_like(sums) if self._sums is None else self._sums.to(sums.device)
        both = before + sums
        both[_LARGEST] = torch.maximum(before[_LARGEST], sums[_LARGEST])
        if torch.compiler.is_compiling():  # a checkpoint around the graph runs it again in backward
            both = torch.where(is_first_pass(sums), both, before)
        self._sums = both

    def _add_groups(self, units: Units, groups: Tensor, extras: dict[str, Tensor]) -> None:
        losses, weights = (np.asarray(one.detach().double()) for one in (units.losses, units.weights))
        measure = None if units.measure is None else np.asarray(units.measure.double())
        of_units = np.asarray(groups.reshape(units.losses.shape))
        more = {name: np.asarray(one.double()) for name, one in extras.items()}
        numbers, rows = group_sums(losses, weights, measure, of_units, more)
        for number, row in zip(numbers.tolist(), rows, strict=True):
            self._groups[number] = self._groups.get(number, 0.0) + row

    def reset(self) -> None:
        """Set all sums to zero."""
        self._numbers, self._groups = _ZERO, {}
        # Do not set None: a graph is compiled again if a tensor replaces None.
        self._sums = None if self._sums is None else torch.zeros_like(self._sums)

    def stats(self, weighting: Weighting, group: Any = None, returns: tuple[str, ...] = ()) -> WeightStats:
        """The statistics of all calls together, over all processes of a group; waits for the device.

        `returns` are the names of the extras of the calls.
        """
        device, numbers = torch.device("cpu"), self._numbers
        if self._sums is not None:
            device, numbers = self._sums.device, _merged(numbers, [float(one) for one in self._sums.cpu()])
        largest = numbers[_LARGEST]
        if group is not None:
            numbers, largest = reduce_sums(numbers, device, group), reduce_max(largest, device, group)
        groups = [self._groups] if group is None else all_of(self._groups, group)
        merged_groups: dict[int, npt.NDArray[np.float64]] = {}
        for part in groups:
            for number, row in part.items():
                merged_groups[number] = merged_groups.get(number, 0.0) + row
        by_group = group_stats_from_sums(merged_groups, returns) if merged_groups else None
        *sums, divisor = numbers
        merged = WeightSums(int(sums[0]), *sums[1:])._replace(largest=largest)
        return stats_from_sums(merged, weighting, denominator=divisor, groups=by_group)


def _merged(one: list[float], other: list[float]) -> list[float]:
    merged = [a + b for a, b in zip(one, other, strict=True)]
    merged[_LARGEST] = max(one[_LARGEST], other[_LARGEST])
    return merged


def remark_on(logits: Tensor | None) -> str | None:
    """A sentence if the logits are probabilities, else None. This waits for their device."""
    if logits is None or not logits.numel() or not logits.is_floating_point():
        return None
    rows = logits.detach().movedim(1 if logits.dim() > 1 else 0, -1).float()
    total = (rows.sum(-1) - 1).abs()
    if rows.shape[-1] < 2 or not bool((rows >= 0).all() and (total < 1e-3).all()):
        return None
    return (
        "The logits are probabilities: every row sums to one. The loss takes a softmax itself, so give what "
        "comes before the model's softmax."
    )


class Advisor:
    """Warns once if re-weighting has no effect. It checks the calls 1, 2, 4, 8 and so on."""

    def __init__(self) -> None:
        self.calls = 0
        self.has_warned = False

    def look(self, record: Record, weighting: Weighting, logits: Tensor | None = None) -> None:
        """Count a call, and check its statistics and its logits if it is one of these calls."""
        with one_at_a_time():
            self._look(record, weighting, logits)

    def _look(self, record: Record, weighting: Weighting, logits: Tensor | None) -> None:
        self.calls += 1
        if self.has_warned or self.calls & (self.calls - 1):
            return
        sentence = remark_on(logits) or record.stats(weighting).no_effect()
        if sentence is not None:
            self.has_warned = True
            warnings.warn(f"call {self.calls}: {sentence}", UserWarning, stacklevel=4)
