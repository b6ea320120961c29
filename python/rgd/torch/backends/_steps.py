"""The computation of a backend on the logits of one chunk of a linear head."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from rgd.torch._plan import Weigher
from rgd.torch._problem import Problem


class Rows(NamedTuple):
    """The rows of a chunk.

    Attributes:
        logits: (n, C); a step may overwrite them.
        target: Class indices, (n,), or probabilities, (n, C).
        measure: The base measure of each row, (n,), 0 for a row that takes no part; None for ones.
        norm: The factor of `w l` of each row in the objective, (n,), 0 for a row that takes no part.
    """

    logits: Tensor
    target: Tensor
    measure: Tensor | None
    norm: Tensor


class Step(Protocol):
    """Computes losses and gradients from the logits of one chunk, (n, C)."""

    def losses(self, logits: Tensor, target: Tensor, logsumexp: Tensor | None = None) -> Tensor:
        """The loss of each row, (n,), in the accumulator's dtype; `logsumexp`, if given, is filled."""
        ...

    def write_gradient(
        self, logits: Tensor, target: Tensor, factors: Tensor, z_factors: Tensor | None = None
    ) -> None:
        """Overwrite logits with the gradient of `sum_i factors_i l_i + z_factors_i Z_i^2`."""
        ...

    def weigh_and_write_gradient(
        self, rows: Rows, weigher: Weigher, losses: Tensor, weights: Tensor, logsumexp: Tensor | None = None
    ) -> None:
        """Fill losses and pointwise weights, (n,), and overwrite logits with the gradient.

        The gradient is that of `sum_i norm_i (w_i l_i + z_loss Z_i^2)`. With a z-loss, `logsumexp` is filled.
        """
        ...


class FormulaStep(Step):
    """A step whose weights come from the weighting's formula, between the losses and the gradient.

    Args:
        problem: The call; its class weight and adjustment are without grad, contiguous and in the
            accumulator's dtype.

    Attributes:
        fills_extras: Whether `losses` takes `extras`, vectors by name, and fills them from the logits it
            reads; and `weigh_and_write_gradient` those that the weigher holds.
    """

    fills_extras = False

    def __init__(self, problem: Problem) -> None:
        self.problem = problem.changed(
            measure=None, given_measure=None, groups=None, head=None, reference=None
        )

    def losses(self, logits: Tensor, target: Tensor, logsumexp: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def write_gradient(
        self, logits: Tensor, target: Tensor, factors: Tensor, z_factors: Tensor | None = None
    ) -> None:
        raise NotImplementedError

    def weigh_and_write_gradient(
        self, rows: Rows, weigher: Weigher, losses: Tensor, weights: Tensor, logsumexp: Tensor | None = None
    ) -> None:
        beside: Any = {}
        if self.fills_extras and weigher.extras is not None:
            beside = {"extras": weigher.extras.found}
        losses[...] = self.losses(rows.logits, rows.target, logsumexp, **beside)
        weights[...] = weigher.weigh(losses, rows.measure)
        factors = (rows.norm * weights).masked_fill(rows.norm == 0, 0)
        z_factors = None if logsumexp is None else rows.norm * self.problem.options.z_loss
        self.write_gradient(rows.logits, rows.target, factors, z_factors)
