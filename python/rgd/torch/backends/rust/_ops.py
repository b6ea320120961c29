"""The Rust kernels as operators of torch, which compiled graphs call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rgd.torch._dtypes import accumulator
from rgd.torch._operators import (
    LENGTH,
    PROBLEM,
    define,
    flattened,
    library,
    numbers_of,
    or_empty,
    rebuilt,
    register_fake,
)
from rgd.torch._plan import Plan
from rgd.torch._problem import Problem, targets_shape
from rgd.torch.backends._formulas import differentiable_gradient
from rgd.torch.backends.rust._kernels import (
    Computed,
    fill,
    fill_gradient,
    fill_losses,
    fill_weights,
    scaled,
)
from rgd.torch.stats import Filled

define({
    "sample_weights": "(Tensor losses, str kind, Tensor numbers) -> Tensor",
    "cross_entropy": f"({PROBLEM}, bool with_grad, str kind, Tensor numbers) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "cross_entropy_losses": f"({PROBLEM}) -> (Tensor, Tensor)",
    "cross_entropy_gradient": f"({PROBLEM}, bool with_grad, Tensor losses, Tensor weights, "
    "Tensor? logsumexp) "
    "-> (Tensor, Tensor, Tensor)",
})  # fmt: skip
sample_weights: Any = torch.ops.rgd.sample_weights.default
_cross_entropy: Any = torch.ops.rgd.cross_entropy.default
_cross_entropy_losses: Any = torch.ops.rgd.cross_entropy_losses.default
_cross_entropy_gradient: Any = torch.ops.rgd.cross_entropy_gradient.default


def cross_entropy(problem: Problem, plan: Plan, with_grad: bool) -> Computed:
    """Losses, weights, objective and gradient in one pass."""
    objective, losses, weights, grad, divisor = _cross_entropy(
        *flattened(problem), with_grad, plan.kind, plan.numbers
    )
    return Computed(objective, grad, Filled(losses, weights, divisor))


def cross_entropy_losses(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """The loss of each target and, where there is a z-loss, the logsumexp of its logits; without grad."""
    plain = problem.changed(logits=problem.logits.detach())
    losses, logsumexp = _cross_entropy_losses(*flattened(plain))
    return losses, logsumexp if problem.options.z_loss else None


def cross_entropy_gradient(
    problem: Problem, losses: Tensor, weights: Tensor, logsumexp: Tensor | None, with_grad: bool
) -> Computed:
    """Objective and gradient of given losses and weights."""
    objective, grad, divisor = _cross_entropy_gradient(
        *flattened(problem), with_grad, losses, weights, logsumexp
    )
    return Computed(objective, grad, Filled(losses, weights, divisor))


# --- what an operator does, and what it returns where it is only traced ---


@library.impl("rgd::sample_weights", "cpu")
def _(losses: Tensor, kind: str, numbers: Tensor) -> Tensor:
    return fill_weights(losses.detach(), (kind, numbers_of(numbers)))


@register_fake("rgd::sample_weights")
def _(losses: Tensor, kind: str, numbers: Tensor) -> Tensor:
    return losses.new_empty(losses.shape, dtype=accumulator(losses.dtype))


@library.impl("rgd::cross_entropy", "cpu")
def _(*given: Any) -> tuple[Tensor, ...]:
    problem, (with_grad, kind, numbers) = rebuilt(given), given[LENGTH:]
    objective, grad, filled = fill(problem, (kind, numbers_of(numbers)), with_grad)
    return objective, filled.losses, filled.weights, or_empty(grad, problem.logits), _divisor(problem, filled)


@register_fake("rgd::cross_entropy")
def _(*given: Any) -> tuple[Tensor, ...]:
    problem, with_grad = rebuilt(given), given[LENGTH]
    losses = _reduced(problem.logits, "none")
    weights = losses.new_empty(losses.shape[:1]) if problem.options.per == "sample" else _like(losses)
    objective, grad, divisor = _fake_gradient(problem, with_grad)
    return objective, losses, weights, grad, divisor


@library.impl("rgd::cross_entropy_losses", "cpu")
def _(*given: Any) -> tuple[Tensor, Tensor]:
    losses, logsumexp = fill_losses(rebuilt(given))
    return losses, or_empty(logsumexp, losses)


@register_fake("rgd::cross_entropy_losses")
def _(*given: Any) -> tuple[Tensor, Tensor]:
    losses = _reduced(given[0], "none")
    return losses, _like(losses) if rebuilt(given).options.z_loss else losses.new_empty(0)


@library.impl("rgd::cross_entropy_gradient", "cpu")
def _(*given: Any) -> tuple[Tensor, ...]:
    problem, (with_grad, losses, weights, logsumexp) = rebuilt(given), given[LENGTH:]
    objective, grad, filled = fill_gradient(problem, losses, weights, logsumexp, with_grad)
    return objective, or_empty(grad, problem.logits), _divisor(problem, filled)


@register_fake("rgd::cross_entropy_gradient")
def _(*given: Any) -> tuple[Tensor, ...]:
    return _fake_gradient(rebuilt(given), given[LENGTH])


def _divisor(problem: Problem, filled: Filled) -> Tensor:
    return problem.logits.new_full((), float(filled.divisor), dtype=torch.float64)


def _fake_gradient(problem: Problem, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    logits = problem.logits
    grad = _like(logits) if with_grad else logits.new_empty(0)
    return _reduced(logits, problem.options.reduction), grad, logits.new_empty((), dtype=torch.float64)


def _reduced(logits: Tensor, reduction: str) -> Tensor:
    shape = targets_shape(logits.shape) if reduction == "none" else ()
    return logits.new_empty(shape, dtype=accumulator(logits.dtype))


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor)


# --- what autograd is told ---


def _keep(ctx: Any, inputs: tuple[Any, ...], weights: Tensor, grad: Tensor) -> None:
    problem = rebuilt(inputs)
    ctx.problem, ctx.length = problem.without_tensors(), len(inputs)
    ctx.save_for_backward(grad, weights, *problem.tensors())


def _keep_of_one_pass(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, losses, weights, grad, divisor = output
    _keep(ctx, inputs, weights, grad)
    ctx.mark_non_differentiable(losses, weights, grad, divisor)


def _keep_of_two_passes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, grad, divisor = output
    _keep(ctx, inputs, inputs[-2], grad)
    ctx.mark_non_differentiable(grad, divisor)


def _backward(ctx: Any, above: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grad, weights, *tensors = ctx.saved_tensors
    if torch.is_grad_enabled():
        gradient = differentiable_gradient(ctx.problem.with_tensors(tensors), weights, above)
    else:
        gradient = scaled(grad, above)
    return gradient, *[None] * (ctx.length - 1)


def _is_constant(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))
    ctx.length = len(inputs)


def _no_gradient(ctx: Any, *_: Tensor) -> tuple[None, ...]:
    return (None,) * ctx.length


library.register_autograd("rgd::cross_entropy", _backward, setup_context=_keep_of_one_pass)
library.register_autograd("rgd::cross_entropy_gradient", _backward, setup_context=_keep_of_two_passes)
library.register_autograd("rgd::sample_weights", _no_gradient, setup_context=_is_constant)
library.register_autograd("rgd::cross_entropy_losses", _no_gradient, setup_context=_is_constant)
