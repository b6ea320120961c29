"""A weighting that changes over the training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rgd.weightings import Weighting


class WeightingSchedule:
    """Sets the weighting of a loss or an optimizer at each step, as a scheduler sets the learning rate.

    Args:
        target: The object with the weighting: an `RGDLoss`, an `RGD` optimizer, or a loss function of
            `rgd.integrations`.
        function: Maps the number of steps made, 0 at first, to a weighting. If only its numbers change, a
            compiled graph is not compiled again. A weighting of the same class keeps its state.

    Attributes:
        count: The number of steps made.

    Raises:
        TypeError: If `target` has no weighting, or `function` returns none.

    Example:
        >>> import rgd
        >>> from rgd.torch import RGDLoss
        >>> criterion = RGDLoss()
        >>> schedule = WeightingSchedule(criterion, lambda step: rgd.KL(tau=1.0 + step))
        >>> schedule.step()
        >>> criterion.weighting.tau
        2.0
    """

    def __init__(self, target: Any, function: Callable[[int], Weighting]) -> None:
        if not isinstance(getattr(target, "weighting", None), Weighting):
            raise TypeError(
                "target must be a loss or an optimizer with a weighting, such as rgd.torch.RGDLoss or "
                f"rgd.torch.RGD, got {type(target).__name__}"
            )
        if not callable(function):
            raise TypeError(f"function must map a step to a weighting, as lambda step: ..., got {function!r}")
        self._target = target
        self._function = function
        self.count = 0
        self._set()

    def step(self) -> None:
        """Count a step, and set the weighting of the next."""
        self.count += 1
        self._set()

    def state_dict(self) -> dict[str, int]:
        """The number of steps made, for a checkpoint."""
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Load the number of steps from a checkpoint, and set the weighting of that step."""
        self.count = int(state_dict["count"])
        self._set()

    def _set(self) -> None:
        weighting: Any = self._function(self.count)
        if not isinstance(weighting, Weighting):
            raise TypeError(
                f"function must return an rgd.Weighting, such as rgd.KL(tau=2.0), got {weighting!r} at step "
                f"{self.count}"
            )
        self._target.weighting = weighting
