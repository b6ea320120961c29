"""Objectives in the graph of autograd, with the gradients that the forward pass has computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rgd.torch._measure import spread
from rgd.torch._modes import graph_is_kept, saved_tensors_hooks
from rgd.torch._problem import Options, Problem
from rgd.torch.backends._formulas import differentiable_gradient
from rgd.torch.backends._graph import scaled


class OfLosses(torch.autograd.Function):
    """Returns the objective of any losses, `sum_i factors_i l_i` or its parts; the factors are constants."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, objective: Tensor, factors: Tensor) -> Tensor:
        """Returns the objective."""
        ctx.save_for_backward(factors)
        return objective

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The factors, times the incoming gradient."""
        (above,), (factors,) = grad_outputs, ctx.saved_tensors
        return above * factors, None, None


class Objective(torch.autograd.Function):
    """Returns the objective, and keeps its gradient for the backward pass."""

    @staticmethod
    def forward(  # noqa: PLR0917 - the signature is torch's
        ctx: Any,
        logits: Tensor,
        computed: tuple[Tensor, Tensor],
        read: tuple[Any, ...],
        options: Options,
        normalizer: float | None = None,
    ) -> Tensor:
        """Returns the objective.

        Args:
            ctx: The context.
            logits: The logits.
            computed: The objective, and its gradient with respect to the logits.
            read: The tensors of a second derivative: weights (or losses and weights, stacked), logits,
                target, class weight, adjustment, measure.
            options: The settings.
            normalizer: The number that "mean" divides by; None for `sum p c`.
        """
        # Autograd's own way to save tensors takes longer, and refuses those that were changed in place,
        # although a first derivative reads none of them. Hooks on saved tensors get all, to offload or drop
        # it.
        objective, grad = computed
        versions = None if saved_tensors_hooks(False) is not None else _versions(read)
        if versions is None:
            ctx.kept = None
            ctx.save_for_backward(grad, *read)
        else:
            ctx.kept = grad, read, versions
        ctx.options = options
        if normalizer is not None:
            ctx.normalizer = normalizer
        return objective

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the logits, times the incoming gradient."""
        (above,) = grad_outputs
        if torch.is_grad_enabled():
            weights, logits, target, *others = _read_again(ctx)
            weights = weights[1] if weights.dim() > target.dim() else weights
            measure = others[-1]
            if measure is not None and not target.is_floating_point():
                # Where the measure is 0, a label may be no class at all.
                target = target.masked_fill(spread(measure, target) == 0, ctx.options[0])
            problem = Problem(
                logits, target, ctx.options, logits.dtype, *others,
                normalizer=getattr(ctx, "normalizer", None),
            )  # fmt: skip
            gradient = differentiable_gradient(problem, weights, above.to(weights.dtype))
            take_gradient(ctx)
            return gradient, None, None, None, None
        grad, stays = take_gradient(ctx)
        if above.dim() or above.item() != 1.0:
            return scaled(grad, above), None, None, None, None
        # The caller may change the result in place, and a kept graph needs the gradient again.
        return grad.clone() if stays else grad, None, None, None, None


def take_gradient(ctx: Any) -> tuple[Tensor, bool]:
    """The gradient that the forward pass has computed, and whether the graph is kept and needs it again."""
    kept, stays = ctx.kept, graph_is_kept()
    if kept is None:  # autograd has saved it; or the graph is gone, and autograd says so
        return ctx.saved_tensors[0], stays
    if not stays:
        ctx.kept = None
    return kept[0], stays


def _read_again(ctx: Any) -> tuple[Any, ...]:
    """The tensors of a second derivative.

    Raises:
        RuntimeError: If one was changed in place since the forward pass.
    """
    if ctx.kept is None:
        return ctx.saved_tensors[1:]
    _, read, versions = ctx.kept
    for name, version, now in zip(_READ, versions, _versions(read) or (), strict=True):
        if version != now:
            raise RuntimeError(
                f"the {name} of the loss, read by a second derivative, has been modified by an inplace "
                "operation since the loss was computed: change a copy"
            )
    return read


_READ = ("tensor of weights", "input", "target", "class weight", "logit adjustment", "base measure")

_VERSION, _NONE = ("_version",) * len(_READ), (0,) * len(_READ)


def _versions(read: tuple[Any, ...]) -> tuple[int, ...] | None:
    """How often each tensor was changed in place; None where one does not know, and autograd refuses it."""
    try:
        return tuple(map(getattr, read, _VERSION, _NONE))  # without a step of the interpreter for each
    except RuntimeError:  # a tensor of inference mode
        return None
