"""Weights times the entropy of the logits: sure and wrong is held back."""

from __future__ import annotations

import dataclasses
from typing import Any

from rgd.weightings._base import Weighting
from rgd.weightings._batch import Batch
from rgd.weightings._call import refuse_without_logits, weigh
from rgd.weightings._fields import nested
from rgd.weightings.trimmed import require_weighting


@dataclasses.dataclass(frozen=True)
class EntropyGate(Weighting):
    """The weights of another weighting times the entropy of the logits: `w_i = v_i * H_i / log(C)`.

    `H_i = -sum_k q_k log(q_k)` with `q = softmax(logits)`, the entropy that `returns=("entropy",)` gives, and
    C is the number of classes. A token of which the model is unsure keeps its weight. A token of which the
    model is sure hardly counts, also where it is sure of another class than the label's: such labels
    contradict what a pretrained model knows. `EntropyGate(ERM())` is the gate alone.

    It serves calls that have logits: `cross_entropy`, `linear_cross_entropy` and the modules in `rgd.torch`,
    and the two functions in `rgd.jax`. Losses alone have no entropy, and are refused. With `per="sample"` the
    gate is the mean entropy of the sample's targets over `log(C)`. All C classes count, also those that a
    `logit_adjustment` of -inf rules out.

    Entropy-adaptive fine-tuning takes the entropy of the 20 largest logits over log(20). Here it is the full
    entropy over its largest value. Where 20 classes have all the mass the two entropies are equal, and the
    weight here is `log(20) / log(C)` of the paper's: a quarter for 150,000 classes. That acts like a smaller
    learning rate.

    Args:
        weighting: Turns losses into the weights `v`: any but an `EntropyGate`. The result is pointwise if it
            is, and remembers if it does. It does not average to one.

    Raises:
        TypeError: If `weighting` is no weighting.
        ValueError: If `weighting` is an `EntropyGate`, or has one inside. When weights are asked for: if the
            logits have one class, whose entropy is always 0.

    Example:
        >>> import numpy as np, rgd
        >>> gate = rgd.EntropyGate(rgd.ERM())
        >>> gate.weights(rgd.Batch(np.ones(3), entropy=np.array([0.0, np.log(2), np.log(4)]), classes=4))
        array([0. , 0.5, 1. ])

    References:
        Diao et al., "Entropy-Adaptive Fine-Tuning: Resolving Confident Conflicts to Mitigate Forgetting",
        2026, arXiv 2601.02151.
    """

    weighting: Weighting

    needs = ("entropy",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weighting(self.weighting)
        if any(isinstance(one, EntropyGate) for one in (self.weighting, *nested(self.weighting))):
            raise ValueError(
                f"EntropyGate cannot take {self.weighting}: its weights are times the entropy already"
            )

    @property
    def pointwise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether each weight depends on the logits of its own target alone."""
        return self.weighting.pointwise

    @property
    def clip(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The clip of the inner weighting."""
        return self.weighting.clip

    @property
    def stateful(self) -> bool:
        """Whether the inner weighting remembers earlier batches."""
        return self.weighting.stateful

    def init(self) -> Any:
        """The state of the inner weighting."""
        return self.weighting.init()

    def log_weights(self, batch: Batch) -> Any:
        """The logarithms of the inner weights, and of the gate."""
        xp, gate = batch.xp, self._gate(batch)
        inner = self.weighting.log_weights(batch)
        return xp.where(_is_shut(xp, gate, inner), -float("inf"), inner + xp.log(gate))

    def weights(self, batch: Batch) -> Any:
        """The inner weights times the gate."""
        return self.step(batch, None)[0]

    def step(self, batch: Batch, state: Any) -> tuple[Any, Any]:
        """The inner weights times the gate, and the state of the inner weighting."""
        xp, gate = batch.xp, self._gate(batch)
        weights, state = weigh(self.weighting, batch, state)
        return xp.where(_is_shut(xp, gate, weights), 0.0, gate * weights), state

    def _gate(self, batch: Batch) -> Any:
        """`H / log(C)` of each loss."""
        if batch.entropy is None:
            refuse_without_logits(self)
        if batch.classes == 1:
            raise ValueError(
                "EntropyGate divides the entropy of the logits by log(C), which is 0 for one class, as the "
                "entropy is: give its inner weighting alone"
            )
        return batch.entropy / batch.xp.log(batch.scalar(batch.classes))


def _is_shut(xp: Any, gate: Any, weights: Any) -> Any:
    """Where a gate of 0 makes every weight 0, an infinite one too."""
    return (gate == 0) & ~xp.isnan(weights)
