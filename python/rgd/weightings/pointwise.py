"""A function of the loss as a weighting."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from rgd.weightings._base import Weighting
from rgd.weightings._batch import Batch


@dataclasses.dataclass(frozen=True)
class Pointwise(Weighting):
    """Weights that are a function of the loss: `w_i = function(l_i)`.

    Args:
        function: Maps losses, shape (n,), to weights of that shape, element by element, in operations that
            every front's arrays have: arithmetic, comparisons, `abs`. For others write a subclass of
            `rgd.Weighting`, whose batch knows the namespace of its arrays.

    Raises:
        TypeError: If `function` cannot be called.

    Example:
        >>> import numpy as np, rgd
        >>> rgd.sample_weights(np.array([0.0, 3.0]), rgd.Pointwise(lambda losses: 1 / (1 + losses)))
        array([1.  , 0.25])
    """

    function: Callable[[Any], Any]

    pointwise = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.function):
            raise TypeError(f"function must be a function of the losses, got {self.function!r}")

    def weights(self, batch: Batch) -> Any:
        """`function(losses)`."""
        return self.function(batch.losses)
