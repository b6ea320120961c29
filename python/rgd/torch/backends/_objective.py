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
            read: The tensors of a second derivative: weights, logits, target, class weight, adjustment,
                measure.
            options: The settings.
            normalizer: The number that "mean" divides by; None for `sum p c`.
        """
        # Reading a saved tensor that was changed in place is an error. So the gradient is kept otherwise;
        # only a second derivative reads the others. Hooks on saved tensors get all, to offload or drop it.
        objective, grad = computed
        if saved_tensors_hooks(False) is None:
            ctx.grad = grad
            ctx.save_for_backward(None, *read)
        else:
            ctx.grad = None
            ctx.save_for_backward(grad, *read)
        ctx.options = options
        if normalizer is not None:
            ctx.normalizer = normalizer
        return objective

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the logits, times the incoming gradient."""
        (above,) = grad_outputs
        grad, kept = ctx.grad, graph_is_kept()
        if not kept:
            ctx.grad = None
        if torch.is_grad_enabled():
            _, weights, logits, target, *others = ctx.saved_tensors
            measure = others[-1]
            if measure is not None and not target.is_floating_point():
                # Where the measure is 0, a label may be no class at all.
                target = target.masked_fill(spread(measure, target) == 0, ctx.options[0])
            problem = Problem(
                logits, target, ctx.options, logits.dtype, *others,
                normalizer=getattr(ctx, "normalizer", None),
            )  # fmt: skip
            gradient = differentiable_gradient(problem, weights, above.to(weights.dtype))
        else:
            grad = ctx.saved_tensors[0] if grad is None else grad
            if above.dim() or above.item() != 1.0:
                gradient = scaled(grad, above)
            else:
                # The caller may change the result in place, and a kept graph needs the gradient again.
                gradient = grad.clone() if kept else grad
        return gradient, None, None, None, None
