"""The cross-entropy of a backend's kernels as operators of torch, which compiled graphs call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rgd.torch._dtypes import accumulator
from rgd.torch._operators import (
    LENGTH,
    PROBLEM,
    define,
    flattened,
    library,
    or_empty,
    rebuilt,
    register_fake,
)
from rgd.torch._problem import Problem, targets_shape
from rgd.torch.backends._formulas import differentiable_gradient
from rgd.torch.stats import Filled


class Computed(NamedTuple):
    """The results of kernels for one call.

    Attributes:
        objective: The objective, reduced.
        grad: Its gradient with respect to the logits (for "none", that of the sum); None if not wanted.
        filled: Losses, weights and divisor.
        extras: A row for each name of `rgd._extras.EXTRAS`, with a number a target; or None.
    """

    objective: Tensor
    grad: Tensor | None
    filled: Filled
    extras: Tensor | None = None

    def weighted_by(self, weights: Tensor) -> Computed:
        """The same results with the weights of the units, if the kernels got weights of targets."""
        filled = self.filled
        if filled.weights is weights:
            return self
        filled = Filled(filled.losses, filled.weights, filled.divisor, filled.all_count, weights)
        return Computed(self.objective, self.grad, filled, self.extras)


class Kernels(NamedTuple):
    """The functions of a backend, without autograd.

    Attributes:
        one_pass: Takes a problem, the name and numbers of a weighting's kernel, and whether the gradient is
            wanted. Returns all results.
        losses: Takes a problem. Returns its losses, and a tensor of rows that `gradient` reads.
        gradient: Takes a problem, its losses, their weights, the rows of `losses`, and whether the gradient
            is wanted. Returns all results.
        rows: Takes a problem and its losses. Returns an uninitialised tensor like the rows of `losses`.
        extras: Takes a problem and its losses. Returns an uninitialised tensor like the extras of `one_pass`;
            None if that has none.
    """

    one_pass: Callable[[Problem, str, Tensor, bool], Computed]
    losses: Callable[[Problem], tuple[Tensor, Tensor]]
    gradient: Callable[[Problem, Tensor, Tensor, Tensor | None, bool], Computed]
    rows: Callable[[Problem, Tensor], Tensor]
    extras: Callable[[Problem, Tensor], Tensor] | None = None


class Operators:
    """Three operators: one for one pass, and two for weights that depend on all losses.

    Args:
        name: The first operator is `rgd::name`, the others are `rgd::name_losses` and `rgd::name_gradient`.
        keys: The dispatch keys of the devices that the kernels serve.
        kernels: The functions that they call.
    """

    def __init__(self, name: str, keys: tuple[str, ...], kernels: Kernels) -> None:
        self._kernels = kernels
        define({
            name: f"({PROBLEM}, bool with_grad, str kind, Tensor numbers) "
            f"-> (Tensor, Tensor, Tensor, Tensor, Tensor{'' if kernels.extras is None else ', Tensor'})",
            f"{name}_losses": f"({PROBLEM}) -> (Tensor, Tensor)",
            f"{name}_gradient": f"({PROBLEM}, bool with_grad, Tensor losses, Tensor weights, Tensor? rows) "
            "-> (Tensor, Tensor, Tensor)",
        })  # fmt: skip
        parts = (
            ("", self._run_one_pass, self._fake_one_pass, _keep_of_one_pass, _backward),
            ("_losses", self._run_losses, self._fake_losses, is_constant, no_gradient),
            ("_gradient", self._run_gradient, self._fake_gradient, _keep_of_two_passes, _backward),
        )
        for ending, run, fake, keep, backward in parts:
            for key in keys:
                library.impl(f"rgd::{name}{ending}", key)(run)
            register_fake(f"rgd::{name}{ending}")(fake)
            library.register_autograd(f"rgd::{name}{ending}", backward, setup_context=keep)
        operators: Any = torch.ops.rgd
        self._one_pass = getattr(operators, name).default
        self._losses = getattr(operators, f"{name}_losses").default
        self._gradient = getattr(operators, f"{name}_gradient").default

    def one_pass(self, problem: Problem, kind: str, numbers: Tensor, with_grad: bool) -> Computed:
        """Losses, weights, objective and gradient."""
        objective, losses, weights, grad, divisor, *extras = self._one_pass(
            *flattened(problem), with_grad, kind, numbers
        )
        return Computed(objective, grad, Filled(losses, weights, divisor), *extras)

    def losses(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """The loss of each target, and the rows that `gradient` reads; without grad."""
        return self._losses(*flattened(problem.changed(logits=problem.logits.detach())))

    def gradient(
        self, problem: Problem, losses: Tensor, weights: Tensor, rows: Tensor | None, with_grad: bool
    ) -> Computed:
        """Objective and gradient of given losses and weights."""
        objective, grad, divisor = self._gradient(*flattened(problem), with_grad, losses, weights, rows)
        return Computed(objective, grad, Filled(losses, weights, divisor))

    # --- the operators, and the shapes of their results for tracing ---

    def _run_one_pass(self, *given: Any) -> tuple[Tensor, ...]:
        problem, (with_grad, kind, numbers) = rebuilt(given), given[LENGTH:]
        objective, grad, filled, extras = self._kernels.one_pass(problem, kind, numbers, with_grad)
        grad = or_empty(grad, problem.logits)
        found = objective, filled.losses, filled.weights, grad, _divisor(problem, filled)
        return found if self._kernels.extras is None else (*found, or_empty(extras, filled.losses))

    def _fake_one_pass(self, *given: Any) -> tuple[Tensor, ...]:
        problem, with_grad = rebuilt(given), given[LENGTH]
        losses = _reduced(problem.logits, "none")
        weights = losses.new_empty(losses.shape[:1] if problem.options.per == "sample" else losses.shape)
        objective, grad, divisor = _empty_gradient(problem, with_grad)
        found = objective, losses, weights, grad, divisor
        return found if self._kernels.extras is None else (*found, self._kernels.extras(problem, losses))

    def _run_losses(self, *given: Any) -> tuple[Tensor, Tensor]:
        return self._kernels.losses(rebuilt(given))

    def _fake_losses(self, *given: Any) -> tuple[Tensor, Tensor]:
        losses = _reduced(given[0], "none")
        return losses, self._kernels.rows(rebuilt(given), losses)

    def _run_gradient(self, *given: Any) -> tuple[Tensor, ...]:
        problem, (with_grad, losses, weights, rows) = rebuilt(given), given[LENGTH:]
        objective, grad, filled, _ = self._kernels.gradient(problem, losses, weights, rows, with_grad)
        return objective, or_empty(grad, problem.logits), _divisor(problem, filled)

    def _fake_gradient(self, *given: Any) -> tuple[Tensor, ...]:
        return _empty_gradient(rebuilt(given), given[LENGTH])


def gradient_dtype(logits: Tensor) -> torch.dtype:
    """The dtype in which the gradient is kept until backward.

    A float16 gradient of a mean underflows before the loss scale is applied, so it is kept in float32.
    """
    return torch.float32 if logits.dtype is torch.float16 else logits.dtype


def scaled(grad: Tensor, above: Tensor) -> Tensor:
    """The gradient of the sum of the objective's elements, times the incoming gradient."""
    if above.dim() or grad.dim() == 1:
        above = above.unsqueeze(1 if grad.dim() > 1 else 0)
    return grad * above.to(grad.dtype)


def _divisor(problem: Problem, filled: Filled) -> Tensor:
    divisor = filled.divisor
    if isinstance(divisor, Tensor):
        return divisor.double().clone()
    return problem.logits.new_full((), divisor, dtype=torch.float64)


def _empty_gradient(problem: Problem, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    logits = problem.logits
    grad = torch.empty_like(logits, dtype=gradient_dtype(logits)) if with_grad else logits.new_empty(0)
    return _reduced(logits, problem.options.reduction), grad, logits.new_empty((), dtype=torch.float64)


def _reduced(logits: Tensor, reduction: str) -> Tensor:
    shape = targets_shape(logits.shape) if reduction == "none" else ()
    return logits.new_empty(shape, dtype=accumulator(logits.dtype))


# --- autograd ---


def _keep(ctx: Any, inputs: tuple[Any, ...], weights: Tensor, grad: Tensor) -> None:
    problem = rebuilt(inputs)
    ctx.problem, ctx.length = problem.without_tensors(), len(inputs)
    ctx.save_for_backward(grad, weights, *problem.tensors())


def _keep_of_one_pass(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, losses, weights, grad, *others = output
    _keep(ctx, inputs, weights, grad)
    ctx.mark_non_differentiable(losses, weights, grad, *others)


def _keep_of_two_passes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, grad, divisor = output
    _keep(ctx, inputs, inputs[-2], grad)
    ctx.mark_non_differentiable(grad, divisor)


def _backward(ctx: Any, above: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grad, weights, *tensors = ctx.saved_tensors
    if torch.is_grad_enabled():
        gradient = differentiable_gradient(ctx.problem.with_tensors(tensors), weights, above)
    else:
        gradient = scaled(grad, above).to(tensors[0].dtype)
    return gradient, *[None] * (ctx.length - 1)


def is_constant(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
    """Tell autograd that an operator's output is a constant."""
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))
    ctx.length = len(inputs)


def no_gradient(ctx: Any, *_: Tensor) -> tuple[None, ...]:
    """The gradient of an output that `is_constant` has marked: none."""
    return (None,) * ctx.length
