"""The losses of each sample of a data set over a training, to find wrong labels."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rgd.torch._dtypes import INTEGERS, wide


class LossHistory:
    """The sum of the losses of each sample, and how often it was seen.

    Give it the plain losses of each batch, and the places of its samples in the data set:

        history = LossHistory(len(data))
        for inputs, target, index in loader:
            criterion(model(inputs), target).backward()
            history.update(index, criterion.last_losses)
        found = rgd.suspects(history.mean(), share=0.1)

    `reset()` sets all sums to zero. With a scale of -0.7 the mean over the last third of the training
    says slightly more than the mean over all of it; in plain training it says less.

    Args:
        count: The number of samples of the data set.
        device: Where the sums are kept; updates from this device wait for nothing.

    Raises:
        ValueError: If `count` is negative.
    """

    def __init__(self, count: int, device: torch.device | str | None = None) -> None:
        if count < 0:
            raise ValueError(f"count must be the number of samples, got {count}")
        self._seen = torch.zeros(count, dtype=torch.int64, device=device)
        self._sums = torch.zeros_like(self._seen, dtype=wide(self._seen))

    def __len__(self) -> int:
        """The number of samples."""
        return len(self._sums)

    @torch.no_grad()
    def update(self, index: Tensor, losses: Tensor | None) -> None:
        """Add the losses of a batch.

        Args:
            index: The places of the samples in the data set, integers, shape (n,). A sample may come twice.
            losses: Their plain losses, floating, shape (n,), as `criterion.last_losses`. With shape (n, ...)
                a sample has several targets, and their mean is taken. A target that takes no part counts as
                loss 0.

        Raises:
            IndexError: If a place is out of range.
            TypeError: If one is no tensor, `index` holds no integers, or `losses` no floating numbers.
            ValueError: If the shapes do not fit.
        """
        if losses is None:
            raise ValueError(
                "there are no losses: update the history after a call of the criterion in training"
            )
        for name, given in (("index", index), ("losses", losses)):
            if not isinstance(given, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"{name} must be a tensor, got {type(given).__name__}")
        if index.dtype not in INTEGERS:
            raise TypeError(f"index must hold integers, got {index.dtype}")
        if not losses.is_floating_point():
            raise TypeError(f"losses must hold floating numbers, got {losses.dtype}")
        if index.dim() != 1 or losses.shape[:1] != index.shape:
            raise ValueError(
                f"index must have shape (n,) and losses (n, ...), one place for each sample, got "
                f"{tuple(index.shape)} and {tuple(losses.shape)}: criterion.last_losses are not reduced"
            )
        index = index.to(self._sums.device, torch.int64)
        values = losses.detach().to(self._sums.device, self._sums.dtype)
        values = values if values.dim() == 1 else values.flatten(1).mean(1)
        outside = (index < 0) | (index >= len(self))
        if index.is_cpu and bool(outside.any()):
            raise IndexError(
                f"index {int(index[outside][0])} is out of range: the data set has {len(self)} samples"
            )
        self._sums.index_add_(0, index, values)
        self._seen.index_add_(0, index, torch.ones_like(index))

    def mean(self) -> Tensor:
        """The mean loss of each sample, float64, shape (count,); NaN for a sample that was not seen."""
        return self._sums / self._seen

    def seen(self) -> Tensor:
        """How often each sample was seen, int64, shape (count,)."""
        return self._seen.clone()

    def reset(self) -> None:
        """Set all sums and counts to zero."""
        self._sums.zero_()
        self._seen.zero_()

    def gather(self, group: Any = None) -> LossHistory:
        """A new history of all processes together. Each process must call this.

        Args:
            group: The processes; None for all. If `torch.distributed` is not initialised, the result is a
                copy.
        """
        merged = LossHistory(len(self), self._sums.device)
        merged._sums.copy_(self._sums)
        merged._seen.copy_(self._seen)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(merged._sums, group=group)
            dist.all_reduce(merged._seen, group=group)
        return merged

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of sums and counts, for a checkpoint."""
        return {"sums": self._sums.clone(), "seen": self._seen.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the result of `state_dict`.

        Raises:
            ValueError: If it is of another number of samples.
        """
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        if shapes != {"sums": (len(self),), "seen": (len(self),)}:
            raise ValueError(f"the state must hold sums and seen of {len(self)} samples, got {shapes}")
        self._sums.copy_(state["sums"])
        self._seen.copy_(state["seen"])
