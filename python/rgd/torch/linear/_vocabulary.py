"""A chunk of logits whose vocabulary is split over several processes: losses, gradient and extras."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from rgd.torch._dtypes import accumulator
from rgd.torch._head import Shard
from rgd.torch._problem import Problem
from rgd.torch.backends._extras import Extras, where_counted
from rgd.torch.backends._formulas import adjusted, unless_massless
from rgd.torch.backends._steps import FormulaStep


class VocabStep(FormulaStep):
    """One process's slice of the vocabulary: the sums over all classes are taken with the others.

    Every process has the same rows and targets, and classes `first` to `first + C - 1` of all. A chunk takes
    one exchange of two numbers a row and process (three with label smoothing).

    Args:
        problem: The call; class weight and adjustment are of all classes.
        shard: This process's slice.
    """

    def __init__(self, problem: Problem, shard: Shard) -> None:
        super().__init__(problem)
        self._shard = shard
        self._logsumexp: Tensor | None = None

    def losses(self, logits: Tensor, target: Tensor, logsumexp: Tensor | None = None) -> Tensor:
        smoothing, dtype = self.problem.options.label_smoothing, accumulator(logits.dtype)
        logits = self._adjusted(logits)
        here, local = self._local(target, logits.shape[1])
        at_label = logits.gather(1, local.unsqueeze(1)).squeeze(1).to(dtype).masked_fill(~here, 0)
        own = [torch.logsumexp(logits.to(dtype), 1), at_label]
        if smoothing > 0:
            c = self._slice(self.problem.class_weight, logits.shape[1])
            wide = logits.to(dtype)
            own.append((wide if c is None else unless_massless(wide, c) * c.to(dtype)).sum(1))
        parts = self._exchange(torch.stack(own))
        self._logsumexp = log_sum = torch.logsumexp(parts[:, 0], 0)
        counted, on_label, spread = self._mass(target, dtype)
        if logsumexp is not None:
            logsumexp[...] = log_sum.masked_fill(~counted, 0)
        at_label = unless_massless(parts[:, 1].sum(0), on_label)
        losses = on_label * (log_sum - at_label)
        if smoothing > 0:
            losses = losses + spread * log_sum - smoothing / self._shard.classes * parts[:, 2].sum(0)
        # On a GPU no check has found out whether every label is a class.
        unknown = (target < 0) | (target >= self._shard.classes)
        return losses.masked_fill(unknown, float("nan")).masked_fill(~counted, 0)

    def write_gradient(
        self, logits: Tensor, target: Tensor, factors: Tensor, z_factors: Tensor | None = None
    ) -> None:
        dtype = accumulator(logits.dtype)
        logsumexp, self._logsumexp = self._logsumexp, None
        if logsumexp is None:
            own = torch.logsumexp(self._adjusted(logits).to(dtype), 1)
            logsumexp = torch.logsumexp(self._exchange(own.unsqueeze(0))[:, 0], 0)
        here, local = self._local(target, logits.shape[1])
        _, on_label, spread = self._mass(target, dtype)
        rows = (self._adjusted(logits).to(dtype) - logsumexp.unsqueeze(1)).exp_()
        by_z = None if z_factors is None else rows * (2 * z_factors * logsumexp).unsqueeze(1)
        rows.mul_((on_label + spread).unsqueeze(1))
        rows.scatter_add_(1, local.unsqueeze(1), (-on_label).masked_fill(~here, 0).unsqueeze(1))
        smoothing = self.problem.options.label_smoothing
        if smoothing > 0:
            c = self._slice(self.problem.class_weight, logits.shape[1])
            rows -= smoothing / self._shard.classes * (1.0 if c is None else c.to(dtype))
        rows.mul_(factors.unsqueeze(1)).masked_fill_((factors == 0).unsqueeze(1), 0)
        if z_factors is not None and by_z is not None:
            rows += by_z.masked_fill_((z_factors == 0).unsqueeze(1), 0)
        logits.copy_(rows)

    def extras(self, problem: Problem) -> Extras:
        """What `problem` wants of all slices together, by one exchange of four numbers a row and process."""
        logits = self._adjusted(problem.logits)
        logits = logits.to(accumulator(logits.dtype))
        own_sum = torch.logsumexp(logits, 1)
        # The mean of the logits of this slice under their softmax; a class without mass adds nothing.
        p = torch.softmax(logits, 1)
        own_mean = (p * logits.masked_fill(p == 0, 0)).sum(1)
        largest, first = logits.amax(1), logits.argmax(1) + self._shard.first
        parts = self._exchange(torch.stack([own_sum, own_mean, largest, first.to(logits.dtype)]))
        sums, means, largest, first = parts.unbind(1)
        total = torch.logsumexp(sums, 0)
        shares = (sums - total).exp()
        entropy = (total - (shares * means.masked_fill(shares == 0, 0)).sum(0)).clamp(min=0)
        best = largest.argmax(0, keepdim=True)
        correct = (first.gather(0, best)[0] == problem.target) & ~largest.amax(0).isnan()
        found = {"entropy": entropy, "logsumexp": total, "correct": correct}
        return where_counted(problem, {name: found[name] for name in problem.returns})

    def _local(self, target: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Which labels are classes of this slice, and their columns, 0 for the others."""
        local = target.to(torch.int64) - self._shard.first
        here = (local >= 0) & (local < columns) & (target != self.problem.options.ignore_index)
        return here, local.masked_fill(~here, 0)

    def _mass(self, target: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | float]:
        """Which targets count, the mass on each label, and that spread over all classes."""
        counted, smoothing = target != self.problem.options.ignore_index, self.problem.options.label_smoothing
        c = self.problem.class_weight
        if c is None:
            return counted, torch.full_like(target, 1 - smoothing, dtype=dtype), smoothing
        of_label = c.to(dtype)[target.to(torch.int64).masked_fill(~counted, 0)]
        return counted, (1 - smoothing) * of_label, smoothing * c.to(dtype).mean()

    def _adjusted(self, logits: Tensor) -> Tensor:
        """The logits, and the numbers that are added to those of this slice."""
        return adjusted(logits, self._slice(self.problem.adjustment, logits.shape[1]))

    def _slice(self, by_class: Tensor | None, columns: int) -> Tensor | None:
        """The part of a vector over all classes that belongs to this slice."""
        return None if by_class is None else by_class[self._shard.first : self._shard.first + columns]

    def _exchange(self, own: Tensor) -> Tensor:
        """Numbers of all processes, stacked in the order of their ranks."""
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(self._shard.group))]
        dist.all_gather(parts, own.contiguous(), group=self._shard.group)
        return torch.stack(parts)
