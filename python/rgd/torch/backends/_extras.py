"""What `returns=` asks of a call beside the loss: of the logits of each target, without gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rgd.torch._measure import spread
from rgd.torch._problem import Problem
from rgd.torch.backends._formulas import adjusted
from rgd.torch.backends._registry import Backend, choose

Extras = dict[str, Tensor]


def extras_of(problem: Problem) -> Extras:
    """What `problem.returns` names, each of the losses' shape; of logits, not of a linear head.

    A backend may have a method of this name. For others torch operations compute it.
    """
    return extras_by(choose(problem.tensors()))(problem)


def extras_by(backend: Backend) -> Callable[[Problem], Extras]:
    """What computes the extras of a problem with a backend."""
    return getattr(backend, "extras", extras_by_formula)


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


def where_counted(problem: Problem, extras: Extras) -> Extras:
    """The extras, and 0 for targets that take no part."""
    counted = problem.counted()
    if counted is None and problem.measure is not None:
        counted = spread(problem.measure, problem.measure.new_empty(problem.losses_shape())) != 0
    if counted is None:
        return extras
    return {name: one.masked_fill(~cast("Any", counted), 0) for name, one in extras.items()}
