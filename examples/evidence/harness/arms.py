"""What is compared: a per-sample loss, a weighting of rgd over it, class weights; and the controls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import rgd
from torch import Tensor

# Of outputs (M, B, C), targets (M, B) and the training samples of each class (M, C): losses (M, B).
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@runtime_checkable
class Memory(Protocol):
    """A loss that remembers each training sample, as early-learning regularisation does."""

    def begin(self, models: int, samples: int, classes: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """A function of outputs (M, B, C), targets (M, B) and the samples' numbers (M, B): losses (M, B)."""
        ...


@dataclasses.dataclass(frozen=True)
class Ramp:
    """The dial turned from 0 to `scale` during the first `share` of the steps, and left there."""

    scale: float
    share: float = 0.5

    def at(self, done: float) -> rgd.Weighting:
        """The weighting where a share `done` of the steps is over."""
        return rgd.KL(scale=self.scale * min(1.0, done / self.share))


# Of the training samples of each class (M, C): class weights (M, C).
ClassWeights = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        name: What the tables call it.
        weighting: The weighting of rgd that multiplies the losses, or one that changes during the training;
            None for plain training.
        loss: The per-sample loss; None for the problem's own.
        class_weights: From the training samples of each class (M, C) to class weights (M, C), used as
            `weight=` of `torch.nn.CrossEntropyLoss` is; None for none.
        cosine: Whether the last layer gives cosines, as LDAM asks.
        mixup: The parameter alpha of mixup, 0 for none.
        balance: Whether each batch is drawn with equal chances for all groups, with replacement.
        start: Arms of different starts have other initial networks and other orders of batches, on the same
            split. It stands for one more run of the same training.
    """

    name: str
    weighting: rgd.Weighting | Ramp | None = None
    loss: Loss | Memory | None = None
    class_weights: ClassWeights | None = None
    cosine: bool = False
    mixup: float = 0.0
    balance: bool = False
    start: int = 0

    def key(self) -> str:
        """What decides the result of a run; the name does not."""
        loss, weights = (
            None if f is None else getattr(f, "__qualname__", repr(f))
            for f in (self.loss, self.class_weights)
        )
        return f"{self.weighting!r} {loss} {weights} {self.cosine} {self.mixup} {self.balance} {self.start}"

    def started(self, start: int) -> Arm:
        """The same training with another initial network and order of batches."""
        return dataclasses.replace(self, start=start)

    def seed(self, seed: int) -> int:
        """The seed of initial network and order of batches, where `seed` is that of the split."""
        return seed + 10_000 * self.start


@dataclasses.dataclass(frozen=True)
class MeanOne(rgd.Weighting):
    """The weights of another member, divided by their mean over the batch."""

    weighting: rgd.Weighting
    mean_one = True

    def weights(self, batch: rgd.Batch) -> Any:
        """`w / mean(w)`."""
        weights = self.weighting.weights(batch)
        return weights / batch.mean(weights)


@dataclasses.dataclass(frozen=True)
class Constant(rgd.Weighting):
    """The same weight for every sample."""

    factor: float
    pointwise = True

    def weights(self, batch: rgd.Batch) -> Any:
        """`factor`."""
        return 0 * batch.losses + self.factor


def mean_one(arm: Arm) -> Arm:
    """The control that tells re-weighting from a larger step and a weaker weight decay."""
    if arm.weighting is None:
        raise ValueError(f"{arm.name} has no weighting, so its weights average to one already")
    if isinstance(arm.weighting, Ramp):
        raise TypeError(f"{arm.name} changes its weighting, and mean_one takes one that stays")
    return dataclasses.replace(arm, name=f"{arm.name}, mean one", weighting=MeanOne(arm.weighting))


def times_mean_weight(arm: Arm, mean_weight: float) -> Arm:
    """The control that multiplies the plain loss by the mean weight that a re-weighted run had."""
    return dataclasses.replace(
        arm, name=f"plain x mean weight of {arm.name}", weighting=Constant(mean_weight)
    )


def opposite_sign(arm: Arm) -> Arm:
    """The control that turns the dial the other way; `KL` only."""
    if not isinstance(arm.weighting, rgd.KL):
        raise ValueError(f"the opposite sign is that of KL's scale; {arm.name} has {arm.weighting!r}")
    weighting = rgd.KL(
        arm.weighting.tau, scale=-arm.weighting.effective_scale, normalize=arm.weighting.normalize
    )
    return dataclasses.replace(arm, name=f"{arm.name}, opposite sign", weighting=weighting)
