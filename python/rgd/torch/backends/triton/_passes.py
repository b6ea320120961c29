"""Computes a problem by the programs: objective and gradient, in one pass over the logits or in two."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from rgd._extras import EXTRAS
from rgd.torch._dtypes import wide
from rgd.torch._plan import Weigher
from rgd.torch._problem import Problem
from rgd.torch.backends._extras import Extras, extras_of_rows
from rgd.torch.backends._formulas import (
    divisor_of,
    factors_of,
    mean_of,
    objective_of,
    shares_of,
    z_factors_of,
)
from rgd.torch.backends._graph import Computed, gradient_dtype
from rgd.torch.backends._steps import FormulaStep, Rows
from rgd.torch.backends.triton._launch import Passed, run_factors, run_losses, run_weighted
from rgd.torch.stats import Filled

KINDS = frozenset(("focal", "kl", "threshold"))
"""The kernels of weightings that the programs can compute."""


def one_pass(problem: Problem, kind: str, numbers: Tensor, with_grad: bool) -> Computed:
    """Losses, pointwise weights, objective and gradient; the numbers are on the device of the logits."""
    target, reduction = problem.target, problem.options.reduction
    shape, measure = problem.losses_shape(), problem.measure
    measure = None if measure is None else measure.detach().to(torch.float32).contiguous()
    like = target.new_empty(shape, dtype=torch.float32)
    divisor = divisor_of(like, problem.counted(), measure, shares_of(problem, torch.float32))
    mean = divisor if problem.normalizer is None else problem.normalizer
    by = None
    if reduction == "mean":
        by = mean if isinstance(mean, Tensor) else like.new_full((), mean, dtype=wide(like))
    grad = _empty_gradient(problem) if with_grad else None
    found = run_weighted(problem, (kind, numbers), grad, measure=measure, divisor=by)
    losses, weights, values = (
        cast("Tensor", one).view(shape) for one in (found.losses, found.weights, found.values)
    )
    objective = values
    if reduction != "none":
        objective = values.sum(dtype=wide(values))
        objective = mean_of(objective, mean) if reduction == "mean" else objective
    return Computed(objective.to(torch.float32), grad, Filled(losses, weights, divisor), found.extras)


def losses_of_rows(problem: Problem) -> tuple[Tensor, Tensor]:
    """The loss of each target, and the sums of its row; behind them the extras that the problem wants."""
    found = run_losses(problem)
    return found.losses.view(problem.losses_shape()), cast("Tensor", found.sums)


def gradient_of_rows(
    problem: Problem, losses: Tensor, weights: Tensor, sums: Tensor | None, with_grad: bool
) -> Computed:
    """Objective and gradient of given losses and weights; `sums` comes from `losses_of_rows`."""
    sums, options = cast("Tensor", sums), problem.options
    logsumexp = None
    if options.z_loss:
        counted = problem.counted()
        logsumexp = (sums[0] + sums[1].log()).view(losses.shape)
        logsumexp = logsumexp if counted is None else logsumexp.masked_fill(~counted, 0)
    vectors = (None if one is None else one.to(wide(losses)) for one in (losses, weights, logsumexp))
    objective, divisor = objective_of(problem, *vectors)  # pyright: ignore[reportArgumentType]
    grad = None
    if with_grad:
        mean = divisor if problem.normalizer is None else problem.normalizer
        mean = mean if options.reduction == "mean" else None
        factors = factors_of(losses, weights, problem.counted(), problem.measure, mean)
        z_factors = z_factors_of(problem, losses, mean)
        grad = _empty_gradient(problem)
        run_factors(problem, grad, _vector(factors), None if z_factors is None else _vector(z_factors), sums)
    return Computed(objective.to(torch.float32), grad, Filled(losses, weights, divisor))


class TritonStep(FormulaStep):
    """The step over a chunk of a linear head by the programs, in place on its logits."""

    fills_extras = True

    def losses(
        self,
        logits: Tensor,
        target: Tensor,
        logsumexp: Tensor | None = None,
        extras: Extras | None = None,
    ) -> Tensor:
        returns = self.problem.returns if extras is not None else ()
        problem = self.problem.changed(logits=logits, target=target, returns=returns)
        found = run_losses(problem, logsumexp=logsumexp)
        self._fill(extras, problem, found.extras)
        return found.losses

    def write_gradient(
        self, logits: Tensor, target: Tensor, factors: Tensor, z_factors: Tensor | None = None
    ) -> None:
        problem = self.problem.changed(logits=logits, target=target)
        run_factors(problem, logits, _vector(factors), None if z_factors is None else _vector(z_factors))

    def weigh_and_write_gradient(
        self, rows: Rows, weigher: Weigher, losses: Tensor, weights: Tensor, logsumexp: Tensor | None = None
    ) -> None:
        plan = weigher.plan
        if plan.kind not in KINDS:
            super().weigh_and_write_gradient(rows, weigher, losses, weights, logsumexp)
            return
        problem = self.problem.changed(logits=rows.logits, target=rows.target)
        numbers = cast("Tensor", plan.numbers_on(rows.logits.device))
        extras = None if weigher.extras is None else losses.new_empty((len(EXTRAS), losses.numel()))
        given = Passed(losses, logsumexp, None, weights, torch.empty_like(losses), extras)
        run_weighted(problem, (plan.kind, numbers), rows.logits, measure=_vector(rows.norm), given=given)
        self._fill(None if weigher.extras is None else weigher.extras.found, problem, extras)

    @staticmethod
    def _fill(wanted: Extras | None, problem: Problem, extras: Tensor | None) -> None:
        """Copy the extras of a pass into the vectors of a chunk."""
        if wanted is not None and extras is not None:
            for name, one in extras_of_rows(problem, extras).items():
                wanted[name].copy_(one)


def _empty_gradient(problem: Problem) -> Tensor:
    logits = problem.logits.detach()
    if problem.options.inplace:
        return logits
    return torch.empty_like(logits, dtype=gradient_dtype(logits))


def _vector(numbers: Tensor) -> Tensor:
    return numbers.reshape(-1).to(torch.float32).contiguous()
