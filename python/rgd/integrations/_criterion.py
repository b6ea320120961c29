"""What the losses of the integrations share: a criterion, whose weighting and statistics are theirs."""

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
        """What turns losses into weights; another may be set between steps, as `WeightingSchedule` does."""
        return self.criterion.weighting

    @weighting.setter
    def weighting(self, weighting: Weighting) -> None:
        self.criterion.weighting = weighting

    def stats(self) -> WeightStats:
        """What the weights of the last weighted call were like, as `RGDLoss.stats()` tells."""
        return self.criterion.stats()
