"""The whole computation in plain torch operations, for calls that no other backend serves.

Weights come from the weightings' own formulas. Nothing here waits for a device.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from rgd.torch._modes import must_forget
from rgd.torch._plan import Weigher
from rgd.torch._problem import Problem
from rgd.torch.backends._formulas import (
    check_labels,
    factors_of,
    gradient_of,
    logsumexp_of,
    losses_of,
    objective_of,
    z_factors_of,
)
from rgd.torch.backends._in_place import Overwritten
from rgd.torch.backends._steps import FormulaStep, Step
from rgd.torch.stats import Filled, Record


class Composite:
    """Plain torch operations: serves every call."""

    name = "composite"

    def refusal(self, tensors: tuple[Tensor | None, ...], compiling: bool) -> str | None:
        """None: this backend refuses nothing."""
        return None

    def sample_weights(self, losses: Tensor, measure: Tensor | None, weigher: Weigher) -> Tensor:
        """The weights by the formula of the weighting."""
        return weigher.weigh(losses, measure)

    def cross_entropy(self, problem: Problem, weigher: Weigher) -> tuple[Tensor, Record | None]:
        """The re-weighted objective, and the record of its weights.

        Differentiable with respect to logits and class probabilities, any number of times, in either mode.
        """
        in_place = problem.options.inplace and problem.wants_gradient()
        given = problem.changed(logits=problem.logits.detach()) if in_place else problem
        check_labels(problem)
        losses, counted = losses_of(given), problem.counted()
        of_units = weigher.weigh(*problem.units(losses)).to(losses.dtype)
        weights = problem.spread(of_units)
        logsumexp = logsumexp_of(given) if problem.options.z_loss else None
        objective, divisor = objective_of(given, losses, weights, logsumexp)
        if in_place:
            mean = divisor if problem.normalizer is None else problem.normalizer
            mean = mean if problem.options.reduction == "mean" else None
            factors = factors_of(losses, weights, counted, problem.measure, mean)
            _overwrite(given, factors, z_factors_of(given, losses, mean))
            objective = Overwritten.apply(problem.logits, objective)
        if must_forget():
            return objective, None
        return objective, Record.of(
            problem, Filled(losses.detach(), weights, divisor, of_units=of_units), self.name
        )

    def step(self, problem: Problem) -> Step:
        """The step over a chunk of a linear head."""
        return ComposedStep(problem)


class ComposedStep(FormulaStep):
    """Torch operations; on a GPU the gradient's formula is compiled, once for each shape."""

    def losses(self, logits: Tensor, target: Tensor, logsumexp: Tensor | None = None) -> Tensor:
        """As `Step.losses`."""
        problem = self.problem.changed(logits=logits, target=target)
        if logsumexp is not None:
            logsumexp[...] = logsumexp_of(problem)
        return losses_of(problem)

    def write_gradient(
        self, logits: Tensor, target: Tensor, factors: Tensor, z_factors: Tensor | None = None
    ) -> None:
        """As `Step.write_gradient`."""
        formula = _formula_for(logits)
        logits.copy_(formula(self.problem.changed(logits=logits, target=target), factors, z_factors))


def _formula_for(logits: Tensor) -> Any:
    """The formula of the gradient; compiled to one kernel on a GPU, if torch can compile it."""
    return _compiled() if logits.is_cuda else gradient_of


@functools.cache
def _compiled() -> Any:
    if importlib.util.find_spec("triton") is None:
        return gradient_of
    return torch.compile(gradient_of, dynamic=False)


def _overwrite(problem: Problem, factors: Tensor, z_factors: Tensor | None) -> None:
    """Write the gradient of `sum_i factors_i l_i + z_factors_i Z_i^2` over logits of any shape."""
    logits, target, classes = problem.logits, problem.target, problem.classes()
    rows = logits if logits.dim() < 3 else logits.movedim(1, -1)
    labels = target if problem.has_labels() or target.dim() < 3 else target.movedim(1, -1)
    labels = labels.reshape(-1) if problem.has_labels() else labels.reshape(-1, classes)
    flat = problem.changed(logits=rows.reshape(-1, classes), target=labels)
    z_factors = None if z_factors is None else z_factors.reshape(-1)
    rows.copy_(gradient_of(flat, factors.reshape(-1), z_factors).view(rows.shape))
