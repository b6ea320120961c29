"""What `returns=` asks of a call beside the loss: of the logits of each target, without gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rgd._extras import EXTRAS
from rgd.torch._measure import spread, units_of
from rgd.torch._plan import OfLogits, Weigher
from rgd.torch._problem import Problem
from rgd.torch.backends._formulas import adjusted
from rgd.torch.backends._registry import Backend
from rgd.torch.segments import Segments

Extras = dict[str, Tensor]


def extras_by(backend: Backend) -> Callable[[Problem], Extras] | None:
    """What computes the extras of a problem: the method of this name, or torch operations.

    None if the backend leaves them in the weigher itself, by `take_extras` in its `cross_entropy`.
    """
    if getattr(backend, "takes_extras", False):
        return None
    return getattr(backend, "extras", extras_by_formula)


def take_extras(weigher: Weigher, problem: Problem, extras: Extras) -> None:
    """Leave the extras of a problem in what weights its losses."""
    entropy = None
    if weigher.plan.needs_entropy:
        entropy = mean_of_units(extras["entropy"], problem.counted(), problem.options.per, problem.segments)
    weigher.extras = OfLogits(extras, entropy, problem.classes())


def mean_of_units(of_targets: Tensor, counted: Tensor | None, per: str, segments: Segments | None) -> Tensor:
    """The mean of numbers of the targets for each unit, such as the losses of a reference model."""
    if segments is not None and counted is not None:
        return segments.units(of_targets, counted, None)[0]
    return units_of(of_targets, counted, None, per)[0]


def extras_by_formula(problem: Problem) -> Extras:
    """The extras in torch operations."""
    logits = adjusted(problem.logits.detach(), problem.adjustment)
    axis = min(logits.dim() - 1, 1)
    found: Extras = {}
    for name in problem.returns:
        if name == "entropy":
            log_p = F.log_softmax(logits, axis)
            p = log_p.exp()
            found[name] = (p * log_p.masked_fill(p == 0, 0)).sum(axis).neg().clamp(min=0)
        elif name == "logsumexp":
            found[name] = torch.logsumexp(logits, axis)
        else:
            target = problem.target if problem.has_labels() else problem.target.detach().argmax(axis)
            found[name] = (logits.argmax(axis) == target) & ~logits.amax(axis).isnan()
    return where_counted(problem, found)


def extras_of_rows(problem: Problem, rows: Tensor) -> Extras:
    """The extras that a problem wants, of a tensor with a row for each of `EXTRAS` and a number a target.

    "correct" is 1 or 0 there.
    """
    by_name = dict(zip(EXTRAS, rows.view(len(EXTRAS), *problem.losses_shape()), strict=True))
    found = {name: by_name[name] for name in problem.returns}
    if "correct" in found:
        found["correct"] = found["correct"] != 0
    return found if problem.has_labels() else where_counted(problem, found)


def where_counted(problem: Problem, extras: Extras) -> Extras:
    """The extras, and 0 for targets that take no part."""
    counted = problem.counted()
    if counted is None and problem.measure is not None:
        counted = spread(problem.measure, problem.measure.new_empty(problem.losses_shape())) != 0
    if counted is None:
        return extras
    return {name: one.masked_fill(~cast("Any", counted), 0) for name, one in extras.items()}
