"""The Rust kernels as a backend for torch tensors on the CPU.

A pointwise weight depends on its own loss, and the loss on its row of logits, which the forward pass has in
cache. So the forward pass also computes the gradient of the objective. The backward pass multiplies it by the
incoming gradient, or returns it unchanged if that is 1. Other weights take two passes over the logits: one
for the losses, and one for the gradient once the weights are known.

Eager calls use an `autograd.Function`, which costs least. A compiled graph calls the same kernels as
operators, which `torch.compile` does not trace into.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from rgd.torch._dtypes import accumulator
from rgd.torch._modes import (
    PLAIN,
    in_transform,
    is_exporting,
    on_the_cpu_and_eager,
)
from rgd.torch._plan import Weigher
from rgd.torch._problem import Problem
from rgd.torch.backends._extras import Extras
from rgd.torch.backends._graph import Computed
from rgd.torch.backends._in_place import Overwritten
from rgd.torch.backends._objective import Objective
from rgd.torch.backends._steps import Step
from rgd.torch.backends.rust import _ops
from rgd.torch.backends.rust._again import (
    Accepted,
    Left,
    accepted,
    again,
    plain_objective,
    plain_weights,
    record_of,
)
from rgd.torch.backends.rust._kernels import (
    RustStep,
    fill,
    fill_extras,
    fill_gradient,
    fill_losses,
    fill_plain_weights,
    fill_weights,
)
from rgd.torch.backends.rust._threads import share_threads
from rgd.torch.stats import Record

__all__ = [
    "Accepted",
    "Left",
    "Rust",
    "accepted",
    "again",
    "plain_objective",
    "plain_weights",
    "record_of",
]

share_threads()


class Rust:
    """The Rust kernels: serve plain tensors on the CPU, eagerly and as operators of compiled graphs."""

    name = "rust"

    def refusal(self, tensors: tuple[Tensor | None, ...], compiling: bool) -> str | None:
        """The reason why the kernels cannot serve a call; None if they can."""
        if compiling:
            if not _served_in_graphs(tensors):
                return "the graph is exported, transformed, or not for the CPU"
        elif not on_the_cpu_and_eager(tensors):
            return _why_not(tensors)
        target = tensors[1]
        if target is not None and target.requires_grad and torch.is_grad_enabled():
            return (
                "class probabilities that require grad take torch operations: call target.detach() first, or "
                "leave the choice to rgd"
            )
        return None

    def sample_weights(self, losses: Tensor, measure: Tensor | None, weigher: Weigher) -> Tensor:
        """The weights by the weighting's kernel, or by its formula if it has no kernel."""
        plan: Any = weigher.plan
        compiling = torch.compiler.is_compiling()
        # The operator for compiled graphs takes no measure.
        if not weigher.kernel_serves or (compiling and measure is not None and not plan.pointwise):
            return weigher.weigh(losses, measure, by_kernel=True)
        if not compiling:
            return (
                fill_plain_weights(losses, plan)
                if measure is None
                else fill_weights(losses, plan.kernel, measure)
            )
        weights = _ops.sample_weights(losses.detach(), plan.kind, plan.numbers)
        return weights if measure is None else weights.masked_fill(measure == 0, 0)

    def cross_entropy(self, problem: Problem, weigher: Weigher) -> tuple[Tensor, Record | None]:
        """The re-weighted objective, and the record of its weights."""
        logits, with_grad = problem.logits, problem.wants_gradient()
        if with_grad and logits.dtype is torch.float16:
            # A float16 gradient of a mean underflows before the loss scale is applied: compute it in float32.
            target = problem.target if problem.has_labels() else problem.target.float()
            problem = problem.changed(logits=logits.float(), target=target)
        if problem.measure is not None:
            measure = problem.measure.detach().to(accumulator(logits.dtype)).contiguous()
            problem = problem.changed(measure=measure)
        if torch.compiler.is_compiling():
            computed = self._by_operators(problem, weigher, with_grad)
            return computed.objective, Record.of(problem, computed.filled, self.name)
        if weigher.kernel_serves and problem.segments is None:
            kernel: Any = weigher.plan.kernel
            computed = fill(problem, kernel, with_grad)
        else:
            computed = self._in_two_passes(problem, weigher, with_grad)
        objective: Any = computed.objective
        if with_grad and problem.options.inplace:
            objective = Overwritten.apply(problem.logits, objective)
        elif with_grad:
            read = (computed.filled.weights, *problem.tensors()[:5])
            given = (objective, computed.grad), read, problem.options, problem.normalizer
            objective = Objective.apply(problem.logits, *given)
        return objective, Record.of(problem, computed.filled, self.name)

    def extras(self, problem: Problem) -> Extras:
        """What the problem wants of its logits beside the losses."""
        return _ops.extras(problem) if torch.compiler.is_compiling() else fill_extras(problem)

    def step(self, problem: Problem) -> Step:
        """The step over a chunk of a linear head."""
        return RustStep(problem)

    def _in_two_passes(self, problem: Problem, weigher: Weigher, with_grad: bool) -> Computed:
        """The losses in a first pass; then their weights, and the gradient in a second pass."""
        losses, logsumexp = fill_losses(problem)
        of_units = self.sample_weights(*problem.units(losses), weigher).to(losses.dtype)
        computed = fill_gradient(problem, losses, problem.spread(of_units), logsumexp, with_grad)
        return computed.weighted_by(of_units)

    def _by_operators(self, problem: Problem, weigher: Weigher, with_grad: bool) -> Computed:
        """The same by operators, for a compiled graph; autograd knows the gradient of these operators."""
        class_weight = None if problem.class_weight is None else problem.class_weight.detach()
        problem = problem.changed(target=problem.target.detach(), class_weight=class_weight)
        operators, plan = _ops.cross_entropy, weigher.plan
        if weigher.kernel_serves and problem.segments is None:
            return operators.one_pass(
                problem, cast("str", plan.kind), cast("Tensor", plan.numbers), with_grad
            )
        losses, rows = operators.losses(problem)
        of_units = self.sample_weights(*problem.units(losses), weigher).to(losses.dtype)
        computed = operators.gradient(problem, losses, problem.spread(of_units), rows, with_grad)
        return computed.weighted_by(of_units)


def _served_in_graphs(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a graph that is being compiled may call the kernels as operators.

    An exported graph uses torch operations instead, so that it also runs without `rgd`.
    """
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "cpu":
            return False
    return not is_exporting() and not in_transform()


def _why_not(tensors: tuple[Tensor | None, ...]) -> str:
    """The property of the tensors, or the mode, because of which the kernels cannot serve a call."""
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}: the Rust kernels serve the CPU"
        if tensor is not None and type(tensor) not in PLAIN:
            return f"a tensor is a {type(tensor).__name__}: the Rust kernels serve plain tensors"
    return (
        "a torch.func transform, forward-mode differentiation, a dispatch mode or a tracer is active: the "
        "Rust kernels serve plain eager calls"
    )
