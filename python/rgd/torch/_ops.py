"""Tensors to kernels and back: outputs allocated, gradients kept, autograd told.

The weights depend on each loss, and the loss on its row of logits, all of which the forward pass has in cache. So it
leaves the gradient of the objective ready, and the backward pass multiplies it by what comes from above, or, where that
is 1, hands it on as it is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgd import _rgd
from rgd.torch._record import Record
from rgd.weightings import Weighting


@dataclasses.dataclass(frozen=True)
class CrossEntropySettings:
    """What, besides tensors, a re-weighted cross-entropy depends on."""

    weighting: Weighting
    ignore_index: int
    label_smoothing: float
    reduction: str
    per: str


def serves(*tensors: Tensor | None) -> bool:
    """Whether the Rust kernels take these tensors as they are."""
    return all(t is None or (t.device.type == "cpu" and type(t) in _PLAIN) for t in tensors)


_PLAIN = (Tensor, torch.nn.Parameter)

# From this size on NumPy asks the system for huge pages, which makes a fresh buffer several times cheaper to fill.
_HUGE = 1 << 22


def _empty_like(tensor: Tensor) -> Tensor:
    """An uninitialised tensor of the same shape, strides and dtype."""
    if tensor.numel() * tensor.element_size() < _HUGE or not tensor.is_contiguous():
        return torch.empty_like(tensor)
    buffer = np.empty(tensor.numel() * tensor.element_size(), dtype=np.uint8)
    return torch.from_numpy(buffer).view(tensor.dtype).view(tensor.shape)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that losses and weights of a dtype are computed in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def sample_weights(losses: Tensor, weighting: Weighting) -> Tensor:
    """Weights of the losses, shape kept; float64 for float64 losses, else float32."""
    weights = torch.empty(losses.shape, dtype=accumulator(losses.dtype))
    _rgd.sample_weights(losses.detach(), weights, weighting, torch.get_num_threads())
    return weights


def _cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, settings: CrossEntropySettings, *, with_grad: bool
) -> tuple[Tensor, Tensor | None, Record]:
    logits, target = logits.detach(), target.detach()
    dtype = accumulator(logits.dtype)
    shape = logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else torch.Size(())
    per_sample = settings.per == "sample"
    losses = torch.empty(shape, dtype=dtype)
    weights = torch.empty(shape[:1] if per_sample else shape, dtype=dtype)
    objective = torch.empty(shape if settings.reduction == "none" else (), dtype=dtype)
    grad = _empty_like(logits) if with_grad else None
    denominator, _ = _rgd.cross_entropy(
        logits,
        target,
        None if weight is None else weight.detach().to(dtype).contiguous(),
        settings.weighting,
        settings.ignore_index,
        settings.label_smoothing,
        per_sample,
        settings.reduction,
        losses,
        weights,
        objective,
        grad,
        torch.get_num_threads(),
    )
    indices = None if target.is_floating_point() else target
    return objective, grad, Record(losses, weights, denominator, indices, settings.ignore_index)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        settings: CrossEntropySettings,
        out: list[Record],
    ) -> Tensor:
        objective, grad, record = _cross_entropy(logits, target, weight, settings, with_grad=True)
        ctx.save_for_backward(grad)
        out.append(record)
        return objective

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        (grad,) = ctx.saved_tensors
        if grad_output.dim() == 0 and grad.dim() > 1:
            scaled = grad if grad_output.item() == 1.0 else grad * grad_output.to(grad.dtype)
        else:
            scaled = grad * grad_output.to(grad.dtype).unsqueeze(1 if grad.dim() > 1 else 0)
        return scaled, None, None, None, None


def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, settings: CrossEntropySettings
) -> tuple[Tensor, Record]:
    """The re-weighted objective, in the dtype losses are computed in, and the record of its weights."""
    if not target.is_floating_point():
        target = target if target.dtype in (torch.int64, torch.int32) else target.to(torch.int64)
    elif target.dtype != logits.dtype:
        dtype = torch.promote_types(target.dtype, logits.dtype)
        logits, target = logits.to(dtype), target.to(dtype)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        objective, _, record = _cross_entropy(logits, target, weight, settings, with_grad=False)
        return objective, record
    if logits.dtype is torch.float16:
        # float16 has no room for the gradient of a mean before the loss scale has been applied to it.
        logits = logits.float()
        target = target.float() if target.is_floating_point() else target
    out: list[Record] = []
    return _CrossEntropy.apply(logits, target, weight, settings, out), out[0]  # pyright: ignore[reportReturnType]
