"""The Rust kernels as operators of torch, which compiled graphs call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rgd.torch._dtypes import accumulator
from rgd.torch._operators import (
    PROBLEM,
    define,
    empty_extras,
    extras_by_name,
    extras_in_order,
    flattened,
    library,
    numbers_of,
    or_empty,
    rebuilt,
    register_fake,
)
from rgd.torch._problem import Problem, targets_shape
from rgd.torch.backends._extras import Extras
from rgd.torch.backends._graph import Computed, Kernels, Operators, is_constant, no_gradient
from rgd.torch.backends.rust._kernels import fill, fill_extras, fill_gradient, fill_losses, fill_weights

define(
    {
        "sample_weights": "(Tensor losses, str kind, Tensor numbers) -> Tensor",
        "cross_entropy_extras": f"({PROBLEM}) -> (Tensor, Tensor, Tensor)",
    }
)
sample_weights: Any = torch.ops.rgd.sample_weights.default


@library.impl("rgd::sample_weights", "cpu")
def _(losses: Tensor, kind: str, numbers: Tensor) -> Tensor:
    return fill_weights(losses.detach(), (kind, numbers_of(numbers)))


@register_fake("rgd::sample_weights")
def _(losses: Tensor, kind: str, numbers: Tensor) -> Tensor:
    return losses.new_empty(losses.shape, dtype=accumulator(losses.dtype))


library.register_autograd("rgd::sample_weights", no_gradient, setup_context=is_constant)


def extras(problem: Problem) -> Extras:
    """What a problem wants of its logits beside the losses."""
    given = flattened(problem.changed(logits=problem.logits.detach(), target=problem.target.detach()))
    return extras_by_name(problem, _extras(*given))


_extras: Any = torch.ops.rgd.cross_entropy_extras.default


@library.impl("rgd::cross_entropy_extras", "cpu")
def _(*given: Any) -> tuple[Tensor, ...]:
    problem = rebuilt(given)
    return extras_in_order(fill_extras(problem), problem.logits)


@register_fake("rgd::cross_entropy_extras")
def _(*given: Any) -> tuple[Tensor, ...]:
    problem = rebuilt(given)
    return empty_extras(problem, targets_shape(problem.logits.shape), accumulator(problem.logits.dtype))


library.register_autograd("rgd::cross_entropy_extras", no_gradient, setup_context=is_constant)


def _one_pass(problem: Problem, kind: str, numbers: Tensor, with_grad: bool) -> Computed:
    return fill(problem, (kind, numbers_of(numbers)), with_grad)


def _losses(problem: Problem) -> tuple[Tensor, Tensor]:
    losses, logsumexp = fill_losses(problem)
    return losses, or_empty(logsumexp, losses)


def _gradient(
    problem: Problem, losses: Tensor, weights: Tensor, rows: Tensor | None, with_grad: bool
) -> Computed:
    return fill_gradient(problem, losses, weights, rows if problem.options.z_loss else None, with_grad)


def _rows(problem: Problem, losses: Tensor) -> Tensor:
    return torch.empty_like(losses) if problem.options.z_loss else losses.new_empty(0)


cross_entropy = Operators("cross_entropy", ("cpu",), Kernels(_one_pass, _losses, _gradient, _rows))
