"""The objective in the graph of autograd; its gradient is multiplied in place, without waiting.

The incoming gradient is on the device, and is mostly 1. Reading it would wait for the device. So the program
that multiplies by it checks whether it is 1, and then moves no memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rgd.torch.backends._in_place import Overwritten
from rgd.torch.backends._objective import Objective, take_gradient
from rgd.torch.backends.triton._launch import scale


class ObjectiveOnDevice(Objective):
    """Returns the objective, and keeps its gradient for the backward pass."""

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return Objective.backward(ctx, *grad_outputs)
        grad, stays = take_gradient(ctx)
        grad = grad.clone() if stays else grad
        scale(grad, grad_outputs[0])
        return grad, None, None, None


class OverwrittenOnDevice(Overwritten):
    """Returns the objective; the logits hold its gradient already."""

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return Overwritten.backward(ctx, *grad_outputs)
        (gradient,) = ctx.saved_tensors
        scale(gradient, grad_outputs[0])
        return gradient, None
