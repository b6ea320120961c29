"""The base of the losses of the integrations: a criterion, with its weighting and its statistics."""

from __future__ import annotations

from typing import Any

from rgd.stats import WeightStats
from rgd.torch._dial import Dial
from rgd.weightings import Weighting


class HasCriterion(Dial):
    """A loss that is computed by a criterion, an `RGDLoss`.

    Attributes:
        criterion: The loss that is re-weighted.
    """

    criterion: Any

    @property
    def weighting(self) -> Weighting:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weighting. You may set another one between steps, as `WeightingSchedule` does."""
        return self.criterion.weighting

    @weighting.setter
    def weighting(self, weighting: Weighting) -> None:
        self.criterion.weighting = weighting

    def stats(self) -> WeightStats:
        """The statistics of the weights of the last weighted call, as `RGDLoss.stats()` returns them."""
        return self.criterion.stats()
