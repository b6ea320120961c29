"""The gradient overwrites the logits (`inplace=True`), which saves a second tensor of their size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Overwritten(torch.autograd.Function):
    """Returns the objective; the logits hold its gradient already."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, objective: Tensor) -> Tensor:
        # The logits are overwritten. This makes backward raise if autograd had saved them before.
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
