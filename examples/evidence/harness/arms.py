"""What is compared: a per-sample loss, a weighting of rgd over it, class weights; and the controls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import rgd
from torch import Tensor

# Of outputs (M, B, C), targets (M, B) and the training samples of each class (M, C): losses (M, B).
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
# Of the training samples of each class (M, C): class weights (M, C).
ClassWeights = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        name: What the tables call it.
        weighting: The weighting of rgd that multiplies the losses; None for plain training.
        loss: The per-sample loss; None for the problem's own.
        class_weights: From the training samples of each class (M, C) to class weights (M, C), used as
            `weight=` of `torch.nn.CrossEntropyLoss` is; None for none.
        cosine: Whether the last layer gives cosines, as LDAM asks.
    """

    name: str
    weighting: rgd.Weighting | None = None
    loss: Loss | None = None
    class_weights: ClassWeights | None = None
    cosine: bool = False

    def key(self) -> str:
        """What decides the result of a run; the name does not."""
        loss, weights = (None if f is None else f.__qualname__ for f in (self.loss, self.class_weights))
        return f"{self.weighting!r} {loss} {weights} {self.cosine}"


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
