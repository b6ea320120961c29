"""The Rust kernels for torch tensors on the CPU: outputs allocated, gradients kept, autograd told.

A pointwise weight depends on its own loss, and the loss on its row of logits, all of which the forward pass
has in cache. So it leaves the gradient of the objective ready, and the backward pass multiplies it by what
comes from above, or, where that is 1, hands it on as it is. Other weights take two passes over the logits:
one for the losses, and, once the weights are known, one for the gradient.

Eager calls go through an `autograd.Function`, the cheapest way. A compiled graph calls the same kernels by
the operators of `rgd.torch._ops`, which `torch.compile` need not look into.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rgd import _rgd
from rgd.torch import _ops
from rgd.torch._modes import graph_is_kept, saved_tensors_hooks
from rgd.torch._record import Record
from rgd.torch._weigher import Weigher
from rgd.torch.backends import composite
from rgd.torch.backends._in_place import Overwritten
from rgd.torch.backends._memory import empty_like
from rgd.torch.backends._options import Options, accumulator
from rgd.torch.backends._registry import (
    register,
    served_in_eager_mode,
    served_in_graphs,
    why_not_plain,
)
from rgd.weightings._base import Kernel

NAME = "rust"


class Rust:
    """The Rust kernels: serve plain tensors on the CPU, eagerly and as operators of compiled graphs."""

    name = NAME

    def refusal(self, tensors: tuple[Tensor | None, ...], compiling: bool) -> str | None:
        """Why the kernels cannot serve a call; None where they can."""
        if compiling:
            if not served_in_graphs(tensors):
                return "the graph is exported, transformed, or not for the CPU"
        elif not served_in_eager_mode(tensors):
            return why_not_plain(tensors)
        target = tensors[1] if len(tensors) > 1 else None
        if target is not None and target.requires_grad and torch.is_grad_enabled():
            return (
                "class probabilities that require grad take torch operations: call target.detach() first, or "
                "leave the choice to rgd"
            )
        return None

    def sample_weights(self, losses: Tensor, base: Tensor | None, weigher: Weigher) -> Tensor:
        """The weights by the weighting's kernel where it has one, by its formula where not."""
        if not weigher.kernel_serves(base):
            return composite.weigh(losses, base, weigher)
        plan = weigher.plan
        if torch.compiler.is_compiling():
            weights = _ops.sample_weights(losses.detach(), plan.kind, plan.numbers)
        else:
            weights = fill_weights(losses.detach(), *cast("Kernel", plan.kernel))
        return weights if base is None else weights.masked_fill(base == 0, 0)

    def cross_entropy(  # noqa: PLR0917
        self,
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        base: Tensor | None,
        options: Options,
        weigher: Weigher,
        adjustment: Tensor | None = None,
    ) -> tuple[Tensor, Record]:
        """The re-weighted objective, and the record of its weights."""
        with_grad = logits.requires_grad and torch.is_grad_enabled()
        if with_grad and logits.dtype is torch.float16:
            # float16 has no room for the gradient of a mean before the loss scale has been applied to it.
            logits, target = logits.float(), target.float() if target.is_floating_point() else target
        if base is not None:
            base = base.detach().to(accumulator(logits.dtype)).contiguous()
        if torch.compiler.is_compiling():
            filled = _fill_by_op(logits, target, class_weight, base, options, weigher, with_grad, adjustment)
            objective = filled.objective
        else:
            if weigher.kernel_serves(base):
                kernel = cast("Kernel", weigher.plan.kernel)
                filled = fill(logits, target, class_weight, base, options, kernel, with_grad, adjustment)
            else:
                filled = _fill_in_two_passes(
                    logits, target, class_weight, base, options, weigher, with_grad, adjustment
                )
            objective = filled.objective
            if with_grad and options.inplace:
                objective = Overwritten.apply(logits, objective)
            elif with_grad:
                objective = _Objective.apply(logits, target, class_weight, base, filled, options, adjustment)
        record = Record(
            filled.losses, filled.weights, filled.denominator, base, filled.counted, weigher.groups, NAME
        )
        return objective, record  # pyright: ignore[reportReturnType]


class Filled(NamedTuple):
    """What the kernels fill for one call."""

    objective: Tensor
    grad: Tensor | None
    losses: Tensor
    weights: Tensor
    denominator: float | Tensor
    counted: Tensor | None


class _Objective(torch.autograd.Function):
    """Hands the objective on, and keeps its gradient for the backward pass."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        base: Tensor | None,
        filled: Filled,
        options: Options,
        adjustment: Tensor | None,
    ) -> Tensor:
        # To read saved tensors is an error where one was changed in place since. The gradient is kept apart,
        # so that only a second derivative reads them. Hooks offload or drop what is saved: they get it all.
        hooked = saved_tensors_hooks(False) is not None
        saved = filled.grad if hooked else None
        ctx.save_for_backward(saved, logits, target, class_weight, base, filled.weights, adjustment)
        ctx.grad = None if hooked else filled.grad
        ctx.options = options
        return filled.objective

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        grad, kept = ctx.grad, graph_is_kept()
        if not kept:
            ctx.grad = None
        if torch.is_grad_enabled():
            gradient = differentiable_gradient(grad_output, ctx.options, *ctx.saved_tensors[1:])
        else:
            grad = ctx.saved_tensors[0] if grad is None else grad
            if grad_output.dim() or grad_output.item() != 1.0:
                gradient = scaled(grad, grad_output)
            else:
                # The caller may change what it gets in place, and a kept graph needs it once more.
                gradient = grad.clone() if kept else grad
        return gradient, None, None, None, None, None, None


def scaled(grad: Tensor, grad_output: Tensor) -> Tensor:
    """The gradient of the sum of the objective's elements, times what comes from above."""
    if grad_output.dim() or grad.dim() == 1:
        grad_output = grad_output.unsqueeze(1 if grad.dim() > 1 else 0)
    return grad * grad_output.to(grad.dtype)


def differentiable_gradient(  # noqa: PLR0917
    grad_output: Tensor,
    options: Options,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    base: Tensor | None,
    weights: Tensor,
    adjustment: Tensor | None = None,
) -> Tensor:
    """The gradient, made of operations that can be differentiated again; the weights stay constant."""
    with torch.enable_grad():
        losses, counted = composite.cross_entropy_losses(logits, target, class_weight, options, adjustment)
        objective, _ = composite.reduce(losses, weights, counted, target, class_weight, base, options)
        (gradient,) = torch.autograd.grad(objective, logits, grad_output, create_graph=True)
    return gradient


def _gradient_of(logits: Tensor, options: Options) -> Tensor:
    """Where the gradient goes: a new tensor, or the place of the logits."""
    return logits if options.inplace else empty_like(logits)


def _plain(tensor: Tensor) -> Tensor:
    """The tensor without a lazy negation (of a conjugate's imaginary part), which DLPack cannot express."""
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def fill_weights(losses: Tensor, kind: str, numbers: tuple[float, ...]) -> Tensor:
    """The weights of losses by the kernel of a weighting."""
    weights = losses.new_empty(losses.shape, dtype=accumulator(losses.dtype))
    _rgd.sample_weights(_plain(losses), weights, kind, numbers, torch.get_num_threads())
    return weights


def fill(  # noqa: PLR0917
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    base: Tensor | None,
    options: Options,
    kernel: Kernel,
    with_grad: bool,
    adjustment: Tensor | None = None,
) -> Filled:
    """Losses, weights, objective and gradient in one call of the kernels."""
    logits, target = _plain(logits.detach()), _plain(target.detach())
    ignore_index, smoothing, reduction, per = options[:4]
    losses = _empty_losses(logits, target)
    # empty_like takes a third of the time of new_empty.
    weights = losses.new_empty(losses.shape[:1]) if per == "sample" else torch.empty_like(losses)
    objective = torch.empty_like(losses) if reduction == "none" else losses.new_empty(())
    grad = _gradient_of(logits, options) if with_grad else None
    denominator, count = _rgd.cross_entropy(
        logits, target, _by_class(class_weight, losses.dtype), base, *kernel, ignore_index, smoothing,
        per == "sample", reduction, losses, weights, objective, grad, torch.get_num_threads(),
        _by_class(adjustment, losses.dtype),
    )  # fmt: skip
    # A mask only where a target is left out: not for most calls.
    counted = None if count == losses.numel() else _counted(target, ignore_index)
    return Filled(objective, grad, losses, weights, denominator, counted)


def _counted(target: Tensor, ignore_index: int) -> Tensor | None:
    """Which targets are not ignored; None for class probabilities."""
    return None if target.is_floating_point() else target != ignore_index


def fill_losses(  # noqa: PLR0917
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    adjustment: Tensor | None = None,
) -> Tensor:
    """The loss of each target."""
    logits, target = _plain(logits.detach()), _plain(target.detach())
    losses = _empty_losses(logits, target)
    _rgd.cross_entropy_losses(
        logits, target, _by_class(class_weight, losses.dtype), ignore_index, label_smoothing, losses,
        torch.get_num_threads(), _by_class(adjustment, losses.dtype),
    )  # fmt: skip
    return losses


def fill_gradient(  # noqa: PLR0917
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    base: Tensor | None,
    losses: Tensor,
    weights: Tensor,
    options: Options,
    with_grad: bool,
    adjustment: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, float]:
    """Objective, gradient and denominator of given weights."""
    logits, target = _plain(logits.detach()), _plain(target.detach())
    ignore_index, smoothing, reduction, per = options[:4]
    objective = torch.empty_like(losses) if reduction == "none" else losses.new_empty(())
    grad = _gradient_of(logits, options) if with_grad else None
    denominator, _ = _rgd.cross_entropy_gradient(
        logits, target, _by_class(class_weight, losses.dtype), base, ignore_index, smoothing,
        per == "sample", reduction, losses, weights.contiguous(), objective, grad, torch.get_num_threads(),
        _by_class(adjustment, losses.dtype),
    )  # fmt: skip
    return objective, grad, denominator


def _empty_losses(logits: Tensor, target: Tensor) -> Tensor:
    """An uninitialised loss for each target."""
    dtype = accumulator(logits.dtype)
    if not target.is_floating_point():
        return torch.empty_like(target, dtype=dtype, memory_format=torch.contiguous_format)
    shape = target.shape
    return logits.new_empty(shape[:1] + shape[2:] if len(shape) > 1 else (), dtype=dtype)


def _by_class(numbers: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Numbers of the classes as the kernels read them."""
    return None if numbers is None else _plain(numbers.detach()).to(dtype).contiguous()


def _fill_in_two_passes(  # noqa: PLR0917
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    base: Tensor | None,
    options: Options,
    weigher: Weigher,
    with_grad: bool,
    adjustment: Tensor | None,
) -> Filled:
    """First the losses, then, with the weights they call for, the gradient."""
    losses = fill_losses(
        logits, target, class_weight, options.ignore_index, options.label_smoothing, adjustment
    )
    counted = _counted(target, options.ignore_index)
    weights = composite.weigh(*composite.units_of(losses, counted, base, options.per), weigher)
    weights = weights.to(losses.dtype)
    objective, grad, denominator = fill_gradient(
        logits, target, class_weight, base, losses, weights, options, with_grad, adjustment
    )
    return Filled(objective, grad, losses, weights, denominator, counted)


def _fill_by_op(  # noqa: PLR0917
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    base: Tensor | None,
    options: Options,
    weigher: Weigher,
    with_grad: bool,
    adjustment: Tensor | None,
) -> Filled:
    """The same by operators, for a compiled graph: their objective carries the gradient."""
    target = target.detach()
    class_weight = None if class_weight is None else class_weight.detach()
    # torch 2.8 does not compile a slice of a named tuple.
    ignore_index, smoothing = options.ignore_index, options.label_smoothing
    reduction, per = options.reduction, options.per
    counted = _counted(target, ignore_index)
    if weigher.kernel_serves(base):
        objective, losses, weights, grad, denominator = _ops.cross_entropy(
            logits, target, class_weight, base, weigher.plan.kind, weigher.plan.numbers,
            ignore_index, smoothing, reduction, per, with_grad, adjustment,
        )  # fmt: skip
        return Filled(objective, grad, losses, weights, denominator, counted)
    losses = _ops.cross_entropy_losses(
        logits.detach(), target, class_weight, ignore_index, smoothing, adjustment
    )
    weights = composite.weigh(*composite.units_of(losses, counted, base, per), weigher).to(losses.dtype)
    objective, grad, denominator = _ops.cross_entropy_gradient(
        logits,
        target,
        class_weight,
        base,
        losses,
        weights,
        ignore_index,
        smoothing,
        reduction,
        per,
        with_grad,
        adjustment,
    )
    return Filled(objective, grad, losses, weights, denominator, counted)


register(Rust(), first=True)
