"""The gradient in the place of the logits (`inplace=True`): no second tensor of their size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rgd.torch.backends._registry import plain_and_eager


def check_in_place(logits: Tensor, target: Tensor) -> None:
    """Refuse logits whose memory the gradient cannot take.

    Raises:
        RuntimeError: In a compiled or exported graph, a transform, forward-mode differentiation, or for a
            tensor subclass.
        ValueError: If the logits are a leaf, or the gradient is computed in another dtype than theirs.
    """
    if torch.compiler.is_compiling() or not plain_and_eager((logits, target)):
        raise RuntimeError(
            "inplace=True serves plain tensors in eager calls: leave it out in compiled graphs, which plan "
            "their memory themselves, in torch.func transforms and for tensor subclasses"
        )
    if logits.is_leaf:
        raise ValueError(
            "inplace=True would overwrite logits that are a leaf, a tensor of yours that requires grad: it "
            "is for what a layer has computed"
        )
    if logits.dtype is torch.float16:
        raise ValueError(
            "inplace=True does not serve float16, whose gradient is computed in float32 until the loss "
            "scale is known: use bfloat16, or leave it out"
        )
    if target.is_floating_point() and target.requires_grad:
        raise ValueError("inplace=True does not serve class probabilities that require grad: detach them")
    if target.is_floating_point() and torch.promote_types(target.dtype, logits.dtype) != logits.dtype:
        raise ValueError(
            f"inplace=True needs class probabilities no wider than the logits, {logits.dtype}, got "
            f"{target.dtype}: convert them"
        )


class Overwritten(torch.autograd.Function):
    """Hands the objective on; the logits hold its gradient already."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, objective: Tensor) -> Tensor:
        # What autograd saved of the logits before is gone; the version counter tells it.
        torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(logits.detach())
        return objective

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        (above,) = grad_outputs
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a second derivative needs the logits, which inplace=True has overwritten: leave "
                "inplace=True out"
            )
        if above.dim() == 0 and above.is_cpu and above.item() == 1.0:
            return gradient, None
        if above.dim() or gradient.dim() == 1:
            above = above.unsqueeze(1 if gradient.dim() > 1 else 0)
        return gradient.mul_(above.to(gradient.dtype)), None
