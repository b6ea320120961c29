"""What is computed from the logits of a chunk: by Rust kernels, in torch operations, over a split vocabulary.

Each class here is a `Step` of `rgd.torch._chunks`.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rgd import _rgd
from rgd.torch._weigher import Weigher
from rgd.torch.backends import composite
from rgd.torch.backends._options import Options, accumulator
from rgd.torch.backends.rust import fill_losses


class _Formula:
    """Weights by the weighting's formula, between the losses and the gradient."""

    def losses(self, logits: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError

    def turn(self, logits: Tensor, target: Tensor, factors: Tensor) -> None:
        raise NotImplementedError

    def weigh_and_turn(  # noqa: PLR0917
        self,
        logits: Tensor,
        target: Tensor,
        base: Tensor | None,
        norm: Tensor,
        weigher: Weigher,
        losses: Tensor,
        weights: Tensor,
    ) -> None:
        losses[...] = self.losses(logits, target)
        weights[...] = composite.weigh(losses, base, weigher)
        self.turn(logits, target, (norm * weights).masked_fill(norm == 0, 0))


class RustStep(_Formula):
    """The Rust kernels, in place on the logits.

    Args:
        class_weight: Of the classes, or None; as the adjustment contiguous, in the accumulator's dtype.
        options: The options of the cross-entropy.
        adjustment: What is added to the logits, (C,), or None.
    """

    def __init__(
        self, class_weight: Tensor | None, options: Options, adjustment: Tensor | None = None
    ) -> None:
        self._class_weight = class_weight
        self._options = options
        self._adjustment = adjustment

    def losses(self, logits: Tensor, target: Tensor) -> Tensor:
        options = self._options
        return fill_losses(
            logits,
            target,
            self._class_weight,
            options.ignore_index,
            options.label_smoothing,
            self._adjustment,
        )

    def turn(self, logits: Tensor, target: Tensor, factors: Tensor) -> None:
        options = self._options
        _rgd.cross_entropy_rows_gradient(
            logits, target, self._class_weight, factors, None, options.ignore_index, options.label_smoothing,
            logits, torch.get_num_threads(), self._adjustment,
        )  # fmt: skip

    def weigh_and_turn(  # noqa: PLR0917
        self,
        logits: Tensor,
        target: Tensor,
        base: Tensor | None,
        norm: Tensor,
        weigher: Weigher,
        losses: Tensor,
        weights: Tensor,
    ) -> None:
        if weigher.plan.kernel is None:
            super().weigh_and_turn(logits, target, base, norm, weigher, losses, weights)
            return
        options = self._options
        _rgd.cross_entropy_rows(
            logits, target, self._class_weight, norm, *weigher.plan.kernel, options.ignore_index,
            options.label_smoothing, losses, weights, logits, torch.get_num_threads(), self._adjustment,
        )  # fmt: skip


class ComposedStep(_Formula):
    """Torch operations; on a GPU the gradient's formula is compiled, once for each shape."""

    def __init__(
        self, class_weight: Tensor | None, options: Options, adjustment: Tensor | None = None
    ) -> None:
        self._class_weight = class_weight
        self._options = options
        self._adjustment = adjustment

    def losses(self, logits: Tensor, target: Tensor) -> Tensor:
        return composite.cross_entropy_losses(
            logits, target, self._class_weight, self._options, self._adjustment
        )[0]

    def turn(self, logits: Tensor, target: Tensor, factors: Tensor) -> None:
        formula = _formula_for(logits)
        adjusted = logits if self._adjustment is None else composite.adjusted(logits, self._adjustment)
        logits.copy_(formula(adjusted, target, self._class_weight, factors, self._options))


def _formula_for(logits: Tensor) -> Any:
    """The formula of the gradient: as one kernel on a GPU, where torch can compile it."""
    return _compiled() if logits.is_cuda else composite.gradient


@functools.cache
def _compiled() -> Any:
    if importlib.util.find_spec("triton") is None:
        return composite.gradient
    return torch.compile(composite.gradient, dynamic=False)


class VocabStep(_Formula):
    """One process's slice of the vocabulary: the sums over all classes are taken with the others.

    Every process has the same rows and targets, and classes `first` to `first + C - 1` of all. A chunk takes
    one exchange of two numbers a row and process (three with label smoothing).

    Args:
        class_weight: Of all classes, or None.
        options: The options of the cross-entropy.
        group: The processes that hold the slices.
        first: The class of this slice's first column.
        classes: The number of classes of all slices together.
        adjustment: What is added to the logits, of all classes, or None.
    """

    def __init__(  # noqa: PLR0917
        self,
        class_weight: Tensor | None,
        options: Options,
        group: Any,
        first: int,
        classes: int,
        adjustment: Tensor | None = None,
    ) -> None:
        self._class_weight = class_weight
        self._options = options
        self._group = group
        self._first = first
        self._classes = classes
        self._adjustment = adjustment
        self._logsumexp: Tensor | None = None

    def losses(self, logits: Tensor, target: Tensor) -> Tensor:
        smoothing, dtype = self._options.label_smoothing, accumulator(logits.dtype)
        logits = self._adjusted(logits)
        here, local = self._local(target, logits.shape[1])
        at_label = logits.gather(1, local.unsqueeze(1)).squeeze(1).to(dtype).masked_fill(~here, 0)
        own = [torch.logsumexp(logits.to(dtype), 1), at_label]
        if smoothing > 0:
            c = self._slice(self._class_weight, logits.shape[1])
            wide = logits.to(dtype)
            own.append((wide if c is None else composite.unless_massless(wide, c) * c.to(dtype)).sum(1))
        parts = self._exchange(torch.stack(own))
        self._logsumexp = logsumexp = torch.logsumexp(parts[:, 0], 0)
        counted, on_label, spread = self._mass(target, dtype)
        at_label = composite.unless_massless(parts[:, 1].sum(0), on_label)
        losses = on_label * (logsumexp - at_label)
        if smoothing > 0:
            losses = losses + spread * logsumexp - smoothing / self._classes * parts[:, 2].sum(0)
        # On a GPU nobody has looked whether every label is a class.
        unknown = (target < 0) | (target >= self._classes)
        return losses.masked_fill(unknown, float("nan")).masked_fill(~counted, 0)

    def turn(self, logits: Tensor, target: Tensor, factors: Tensor) -> None:
        dtype = accumulator(logits.dtype)
        logsumexp, self._logsumexp = self._logsumexp, None
        if logsumexp is None:
            own = torch.logsumexp(self._adjusted(logits).to(dtype), 1)
            logsumexp = torch.logsumexp(self._exchange(own.unsqueeze(0))[:, 0], 0)
        here, local = self._local(target, logits.shape[1])
        _, on_label, spread = self._mass(target, dtype)
        rows = (
            (self._adjusted(logits).to(dtype) - logsumexp.unsqueeze(1))
            .exp_()
            .mul_((on_label + spread).unsqueeze(1))
        )
        rows.scatter_add_(1, local.unsqueeze(1), (-on_label).masked_fill(~here, 0).unsqueeze(1))
        smoothing = self._options.label_smoothing
        if smoothing > 0:
            c = self._slice(self._class_weight, logits.shape[1])
            rows -= smoothing / self._classes * (1.0 if c is None else c.to(dtype))
        rows.mul_(factors.unsqueeze(1)).masked_fill_((factors == 0).unsqueeze(1), 0)
        logits.copy_(rows)

    def _local(self, target: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Which labels are classes of this slice, and their columns, 0 for the others."""
        local = target.to(torch.int64) - self._first
        here = (local >= 0) & (local < columns) & (target != self._options.ignore_index)
        return here, local.masked_fill(~here, 0)

    def _mass(self, target: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | float]:
        """Which targets count, the mass on each label, and that spread over all classes."""
        counted, smoothing = target != self._options.ignore_index, self._options.label_smoothing
        c = self._class_weight
        if c is None:
            return counted, torch.full_like(target, 1 - smoothing, dtype=dtype), smoothing
        of_label = c.to(dtype)[target.to(torch.int64).masked_fill(~counted, 0)]
        return counted, (1 - smoothing) * of_label, smoothing * c.to(dtype).mean()

    def _adjusted(self, logits: Tensor) -> Tensor:
        """The logits, and what is added to those of this slice."""
        return composite.adjusted(logits, self._slice(self._adjustment, logits.shape[1]))

    def _slice(self, by_class: Tensor | None, columns: int) -> Tensor | None:
        """The part of a vector over all classes that belongs to this slice."""
        return None if by_class is None else by_class[self._first : self._first + columns]

    def _exchange(self, own: Tensor) -> Tensor:
        """Numbers of all processes, stacked in the order of their ranks."""
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(parts, own.contiguous(), group=self._group)
        return torch.stack(parts)
