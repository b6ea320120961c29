"""Weights by the excess of a loss over that of a reference model."""

from __future__ import annotations

import dataclasses
from typing import Any

from rgd.weightings._base import Weighting
from rgd.weightings._batch import Batch
from rgd.weightings._call import weigh
from rgd.weightings._fields import nested
from rgd.weightings.focal import Focal
from rgd.weightings.trimmed import require_weighting


@dataclasses.dataclass(frozen=True)
class Excess(Weighting):
    """Weights each sample by its excess loss, `w(l_i - r_i)`, with `r_i` the loss of a reference model.

    A large excess means that the model can still learn the sample: the reference model, trained on clean or
    on similar data, has a smaller loss. Noise is hard for both models and has a small excess. Give the
    reference losses in the call, as `reference=`: constants of the losses' shape. The objective is still that
    of the losses, `sum p w l / sum p`.

    `rgd.Excess(rgd.CVaR(fraction))` is the selective language modeling of Rho-1: weight `1 / fraction` on the
    share `fraction` of largest excess, 0 elsewhere. With n tokens the paper divides the sum over the selected
    `n * fraction` tokens by `n * fraction`. This objective divides it by `n` and multiplies by
    `1 / fraction`, which is the same. If `n * fraction` is no integer, or excess losses are equal, the token
    at the edge counts in part here.

    With `per="sample"` the mean loss of a sample is compared with its mean reference loss. Settings of the
    inner weighting are in units of the excess: `tau` of `KL` clips the excess, and `clipped_share` of the
    statistics is the share that it clips.

    Args:
        weighting: Turns excesses into weights, such as `rgd.CVaR(0.6)` or `rgd.KL(math.inf, scale=1.0)`.

    Raises:
        TypeError: If `weighting` is no weighting.
        ValueError: If `weighting` is `Focal`, or has it inside: an excess may be negative, and is not the
            logarithm of a probability. If it has an `Excess` inside already.

    Example:
        >>> import numpy as np, rgd
        >>> losses, reference = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.5, 2.5, 1.0, 4.0])
        >>> rgd.sample_weights(losses, rgd.Excess(rgd.CVaR(0.5)), reference=reference)
        array([2., 0., 2., 0.])

    References:
        Lin et al., "Not All Tokens Are What You Need for Pretraining" (Rho-1), NeurIPS 2024, arXiv
        2404.07965, section 2.2. Mindermann et al., "Prioritized Training on Points that are Learnable, Worth
        Learning, and Not Yet Learnt", ICML 2022.
    """

    weighting: Weighting

    needs = ("reference",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weighting(self.weighting)
        for inner in (self.weighting, *nested(self.weighting)):
            if isinstance(inner, Focal):
                raise ValueError(
                    f"Excess cannot take {self.weighting}: focal weights are powers of probabilities, and an "
                    "excess may be negative; rgd.KL(math.inf, scale=1.0) weights what has more to learn"
                )
            if isinstance(inner, Excess):
                raise ValueError(
                    f"Excess cannot take {self.weighting}: its losses are less those of the reference already"
                )

    @property
    def pointwise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether each weight depends on its own excess alone."""
        return self.weighting.pointwise

    @property
    def mean_one(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the inner weights average to one."""
        return self.weighting.mean_one

    @property
    def clip(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The excess from which on a weight no longer changes."""
        return self.weighting.clip

    @property
    def stateful(self) -> bool:
        """Whether the inner weighting remembers earlier batches."""
        return self.weighting.stateful

    def init(self) -> Any:
        """The state of the inner weighting."""
        return self.weighting.init()

    def log_weights(self, batch: Batch) -> Any:
        """The logarithms of the inner weights of the excess."""
        return self.weighting.log_weights(_of_excess(batch))

    def weights(self, batch: Batch) -> Any:
        """The inner weights of the excess."""
        return self.step(batch, None)[0]

    def step(self, batch: Batch, state: Any) -> tuple[Any, Any]:
        """The inner weights of the excess, and the state of the inner weighting."""
        return weigh(self.weighting, _of_excess(batch), state)


def _of_excess(batch: Batch) -> Batch:
    if batch.reference is None:
        raise ValueError(
            "Excess compares losses with those of a reference model: give reference= with the losses, of "
            "their shape"
        )
    return batch.of_excess()
