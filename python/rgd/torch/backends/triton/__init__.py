"""Triton programs for torch tensors on CUDA and ROCm GPUs.

A pointwise weight depends on its own loss, so one program reads some rows of logits and writes their losses,
their weights and their gradient. Other weights take two passes: one for the losses, and one for the gradient
once the weights are known. Nothing waits for the device.

Compiled graphs call the same functions as operators, which `torch.compile` does not trace into.
`TRITON_INTERPRET=1` in the environment runs the programs in Triton's interpreter, on tensors of the CPU.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any, cast

import torch
from torch import Tensor

from rgd._extras import EXTRAS
from rgd.torch._modes import in_transform, is_exporting, plain_and_eager
from rgd.torch._plan import Weigher
from rgd.torch._problem import Problem
from rgd.torch.backends._extras import extras_of_rows, take_extras
from rgd.torch.backends._formulas import check_labels
from rgd.torch.backends._graph import Computed, Kernels, Operators
from rgd.torch.backends._steps import Step
from rgd.torch.stats import Record

__all__ = ["Triton"]

_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "yes", "on", "y"}
_DEVICE = "cpu" if _INTERPRETED else "cuda"


class Triton:
    """Triton programs: serve plain float32, float16 and bfloat16 tensors on a GPU, eagerly and in graphs.

    `takes_extras` says that `cross_entropy` leaves what `returns=` names in the weigher.
    """

    name = "triton"
    takes_extras = True

    def refusal(self, tensors: tuple[Tensor | None, ...], compiling: bool) -> str | None:
        """The reason why the programs cannot serve a call; None if they can."""
        if not _INSTALLED:
            return "the package triton is not installed: pip install triton"
        for tensor in tensors:
            if tensor is not None and tensor.device.type != _DEVICE:
                return (
                    f"a tensor is on {tensor.device}: the Triton programs serve {_DEVICE}. Leave "
                    'backend("triton") out, and another backend serves it'
                )
        if compiling and (is_exporting() or in_transform()):
            return "the graph is exported or transformed: the Triton programs serve plain calls"
        if not compiling and not plain_and_eager(tensors):
            return (
                "a tensor is of a subclass, or a torch.func transform, forward-mode differentiation, a "
                "dispatch mode or a tracer is active: the Triton programs serve plain eager calls"
            )
        first, target = tensors[0], tensors[1]
        if target is None:
            return None
        if first is not None and first.dtype is torch.float64:
            return "the logits are float64: the Triton programs compute in float32"
        if target.requires_grad and torch.is_grad_enabled():
            return "class probabilities that require grad take torch operations: call target.detach() first"
        return None

    def sample_weights(self, losses: Tensor, measure: Tensor | None, weigher: Weigher) -> Tensor:
        """The weights by the formula of the weighting."""
        return weigher.weigh(losses, measure)

    def cross_entropy(self, problem: Problem, weigher: Weigher) -> tuple[Tensor, Record | None]:
        """The re-weighted objective, and the record of its weights."""
        with_grad, plan = problem.wants_gradient(), weigher.plan
        compiling = torch.compiler.is_compiling()
        if compiling:
            class_weight = None if problem.class_weight is None else problem.class_weight.detach()
            problem = problem.changed(target=problem.target.detach(), class_weight=class_weight)
            kernels: Any = _operators
        else:
            check_labels(problem)
            kernels = _KERNELS
        per_target = problem.options.per == "element" or len(problem.losses_shape()) < 2
        per_target = per_target and problem.segments is None
        if plan.pointwise and per_target and weigher.kernel_serves and plan.kind in ("kl", "focal"):
            numbers = cast("Tensor", plan.numbers_on(problem.logits.device))
            computed: Computed = kernels.one_pass(problem, plan.kind, numbers, with_grad)
            if problem.returns:
                take_extras(weigher, problem, extras_of_rows(problem, cast("Tensor", computed.extras)))
        else:
            losses, sums = kernels.losses(problem)
            if problem.returns:
                take_extras(weigher, problem, extras_of_rows(problem, sums[-len(EXTRAS) :]))
            of_units = weigher.weigh(*problem.units(losses)).to(losses.dtype)
            computed = kernels.gradient(problem, losses, problem.spread(of_units), sums, with_grad)
            computed = computed.weighted_by(of_units)
        objective = computed.objective
        if with_grad and not compiling:
            objective = _in_autograd(problem, computed)
        return objective, Record.of(problem, computed.filled, self.name)

    def step(self, problem: Problem) -> Step:
        """The step over a chunk of a linear head."""
        from rgd.torch.backends.triton._passes import TritonStep  # noqa: PLC0415

        return TritonStep(problem)


# The first call that Triton serves imports it, since this takes as long as importing the rest of rgd.


def _one_pass(problem: Problem, kind: str, numbers: Tensor, with_grad: bool) -> Computed:
    from rgd.torch.backends.triton import _passes  # noqa: PLC0415

    return _passes.one_pass(problem, kind, numbers, with_grad)


def _losses(problem: Problem) -> tuple[Tensor, Tensor]:
    from rgd.torch.backends.triton import _passes  # noqa: PLC0415

    return _passes.losses_of_rows(problem)


def _gradient(
    problem: Problem, losses: Tensor, weights: Tensor, sums: Tensor | None, with_grad: bool
) -> Computed:
    from rgd.torch.backends.triton import _passes  # noqa: PLC0415

    return _passes.gradient_of_rows(problem, losses, weights, sums, with_grad)


def _rows(problem: Problem, losses: Tensor) -> Tensor:
    return losses.new_empty((3 + (len(EXTRAS) if problem.returns else 0), losses.numel()))


def _extras(problem: Problem, losses: Tensor) -> Tensor:
    return losses.new_empty((len(EXTRAS), losses.numel()) if problem.returns else (0,))


def _in_autograd(problem: Problem, computed: Computed) -> Tensor:
    from rgd.torch.backends.triton._objective import ObjectiveOnDevice, OverwrittenOnDevice  # noqa: PLC0415

    objective: Any = computed.objective
    if problem.options.inplace:
        return cast("Tensor", OverwrittenOnDevice.apply(problem.logits, objective))
    read = (computed.filled.weights, *problem.tensors()[:5])
    return cast(
        "Tensor", ObjectiveOnDevice.apply(problem.logits, (objective, computed.grad), read, problem.options)
    )


_KERNELS = Kernels(_one_pass, _losses, _gradient, _rows, _extras)
_operators = Operators("triton_cross_entropy", (_DEVICE,), _KERNELS)
