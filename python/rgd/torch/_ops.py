"""Tensors to kernels and back: outputs allocated, gradients kept, autograd told.

The weights depend on each loss, and the loss on its row of logits, all of which the forward pass has in
cache. So it leaves the gradient of the objective ready, and the backward pass multiplies it by what comes
from above, or, where that is 1, hands it on as it is.

Eager calls go through an `autograd.Function`, the cheapest way. A compiled graph calls the same kernels by
the operators `rgd::cross_entropy` and `rgd::sample_weights`, which `torch.compile` need not look into.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rgd import _rgd
from rgd.torch import _composite
from rgd.torch._backend import must_forget, must_not_serve, op_serves, rust_serves
from rgd.torch._record import Record
from rgd.torch._settings import CrossEntropySettings, accumulator
from rgd.weightings import KL, KLBall, Weighting

__all__ = ["CrossEntropySettings", "accumulator", "cross_entropy", "sample_weights"]

# From this size on NumPy asks the system for huge pages: a fresh buffer is several times cheaper to fill.
_HUGE = 1 << 22


# Typed by torch without the types of NumPy.
_from_numpy = cast("Callable[[npt.NDArray[np.uint8]], Tensor]", torch.from_numpy)  # pyright: ignore[reportUnknownMemberType]


def _empty_like(tensor: Tensor) -> Tensor:
    """An uninitialised tensor of the same shape, strides and dtype."""
    if tensor.numel() * tensor.element_size() < _HUGE or not tensor.is_contiguous():
        return torch.empty_like(tensor)
    buffer = np.empty(tensor.numel() * tensor.element_size(), dtype=np.uint8)
    return _from_numpy(buffer).view(tensor.dtype).view(tensor.shape)


def sample_weights(losses: Tensor, weighting: Weighting, where: Tensor | None = None) -> tuple[Tensor, str]:
    """Weights of the losses (float64 for float64 losses, else float32), and the path that computed them."""
    if torch.compiler.is_compiling():
        if op_serves(losses, where):
            return _weights_op(losses.detach(), where, *_numbers(weighting)), "rust"
    elif rust_serves(losses, where):
        return _rust_sample_weights(losses.detach(), weighting, where), "rust"
    return _composite.sample_weights(losses, weighting, where), "composite"


def _rust_sample_weights(losses: Tensor, weighting: Weighting, where: Tensor | None) -> Tensor:
    if where is None:
        weights = losses.new_empty(losses.shape, dtype=accumulator(losses.dtype))
        _rgd.sample_weights(_plain(losses), weights, weighting, torch.get_num_threads())
        return weights
    weights = losses.new_zeros(losses.shape, dtype=accumulator(losses.dtype))
    weights[where] = _rust_sample_weights(losses[where], weighting, None)
    return weights


def _plain(tensor: Tensor) -> Tensor:
    """The tensor without a lazy negation (of a conjugate's imaginary part), which DLPack cannot express."""
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def _rust_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    settings: CrossEntropySettings,
    *,
    with_grad: bool,
) -> tuple[Tensor, Tensor | None, Record]:
    """The objective, its gradient, and the record, of tensors that do not require grad."""
    dtype = accumulator(logits.dtype)
    shape = target.shape
    soft = target.is_floating_point()
    if soft:
        shape = shape[:1] + shape[2:] if len(shape) > 1 else torch.Size(())
    losses = logits.new_empty(shape, dtype=dtype)
    per_sample = settings.per == "sample"
    # empty_like takes a third of the time of new_empty.
    weights = losses.new_empty(shape[:1]) if per_sample else torch.empty_like(losses)
    objective = torch.empty_like(losses) if settings.reduction == "none" else losses.new_empty(())
    grad = _empty_like(logits) if with_grad else None
    denominator, _ = _rgd.cross_entropy(
        logits if not logits.is_neg() else logits.resolve_neg(),
        target if not target.is_neg() else target.resolve_neg(),
        None if weight is None else _plain(weight.detach()).to(dtype).contiguous(),
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
    return (
        objective,
        grad,
        Record(losses, weights, denominator, None if soft else target, settings.ignore_index),
    )


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        settings: CrossEntropySettings,
        out: list[Record],
    ) -> Tensor:
        objective, grad, record = _rust_cross_entropy(
            logits.detach(), target.detach(), weight, settings, with_grad=True
        )
        ctx.save_for_backward(grad, logits, target, weight, record.weights)
        ctx.settings = settings
        out.append(record)
        return objective

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad, *saved = ctx.saved_tensors
        (grad_output,) = grad_outputs
        if torch.is_grad_enabled():
            return _differentiable_gradient(grad_output, ctx.settings, *saved), None, None, None, None
        if grad_output.dim() == 0 and grad_output.item() == 1.0:
            return grad, None, None, None, None
        return _scaled(grad, grad_output), None, None, None, None


def _scaled(grad: Tensor, grad_output: Tensor) -> Tensor:
    """The gradient of the sum of the objective's elements, times what comes from above."""
    if grad_output.dim() or grad.dim() == 1:
        grad_output = grad_output.unsqueeze(1 if grad.dim() > 1 else 0)
    return grad * grad_output.to(grad.dtype)


def _differentiable_gradient(  # noqa: PLR0917
    grad_output: Tensor,
    settings: CrossEntropySettings,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    weights: Tensor,
) -> Tensor:
    """The gradient, made of operations that can be differentiated again; the weights stay constant."""
    with torch.enable_grad():
        losses, counted = _composite.cross_entropy_losses(logits, target, weight, settings)
        objective, _ = _composite.reduce(losses, weights, counted, target, weight, settings)
        (gradient,) = torch.autograd.grad(objective, logits, grad_output, create_graph=True)
    return gradient


def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, settings: CrossEntropySettings
) -> tuple[Tensor, Record | None]:
    """The re-weighted objective, in the dtype losses are computed in, and the record of its weights.

    There is no record where its tensors must not outlive the call: under a `torch.func` transform and in
    `torch.export`.
    """
    if not target.is_floating_point():
        target = target if target.dtype in (torch.int64, torch.int32) else target.to(torch.int64)
    elif target.dtype != logits.dtype:
        dtype = torch.promote_types(target.dtype, logits.dtype)
        logits, target = logits.to(dtype), target.to(dtype)
    with_grad = torch.is_grad_enabled()
    if with_grad and target.requires_grad:
        must_not_serve()
        return _by_composite(logits, target, weight, settings)
    with_grad = with_grad and logits.requires_grad
    if torch.compiler.is_compiling():
        if op_serves(logits, target, weight):
            return _by_op(logits, target, weight, settings, with_grad)
        return _by_composite(logits, target, weight, settings)
    if not rust_serves(logits, target, weight):
        return _by_composite(logits, target, weight, settings)
    if not with_grad:
        objective, _, record = _rust_cross_entropy(
            logits.detach(), target.detach(), weight, settings, with_grad=False
        )
        return objective, record
    if logits.dtype is torch.float16:
        logits, target = _out_of_float16(logits, target)
    out: list[Record] = []
    return _CrossEntropy.apply(logits, target, weight, settings, out), out[0]  # pyright: ignore[reportReturnType]


def _by_composite(
    logits: Tensor, target: Tensor, weight: Tensor | None, settings: CrossEntropySettings
) -> tuple[Tensor, Record | None]:
    objective, record = _composite.cross_entropy(logits, target, weight, settings)
    return objective, None if must_forget() else record


def _out_of_float16(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    # float16 has no room for the gradient of a mean before the loss scale has been applied to it.
    return logits.float(), target.float() if target.is_floating_point() else target


def _by_op(
    logits: Tensor, target: Tensor, weight: Tensor | None, settings: CrossEntropySettings, with_grad: bool
) -> tuple[Tensor, Record]:
    if with_grad and logits.dtype is torch.float16:
        logits, target = _out_of_float16(logits, target)
    objective, losses, weights, _, denominator = _cross_entropy_op(
        logits,
        target.detach(),
        None if weight is None else weight.detach(),
        *_numbers(settings.weighting),
        settings.ignore_index,
        settings.label_smoothing,
        settings.reduction,
        settings.per,
        with_grad,
    )
    indices = None if target.is_floating_point() else target
    return objective, Record(losses, weights, denominator, indices, settings.ignore_index)


# The operators of compiled graphs. A schema knows numbers, not weightings: a radius stands for a ball.

_WEIGHTING = "float tau, float scale, bool normalize, float? radius"


def _numbers(weighting: Weighting) -> tuple[float, float, bool, float | None]:
    if isinstance(weighting, KLBall):
        return 1.0, 0.0, False, weighting.radius
    return weighting.tau, weighting.effective_scale, weighting.normalize, None


def _weighting(tau: float, scale: float, normalize: bool, radius: float | None) -> Weighting:
    return KL(tau, scale=scale, normalize=normalize) if radius is None else KLBall(radius)


_library: Any = torch.library
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define(
    "rgd::cross_entropy",
    f"(Tensor logits, Tensor target, Tensor? weight, {_WEIGHTING}, int ignore_index, float label_smoothing, "
    "str reduction, str per, bool with_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_library.define("rgd::sample_weights", f"(Tensor losses, Tensor? where, {_WEIGHTING}) -> Tensor", tags=_TAGS)
_cross_entropy_op: Any = torch.ops.rgd.cross_entropy.default
_weights_op: Any = torch.ops.rgd.sample_weights.default


@_library.impl("rgd::cross_entropy", "cpu")
def _cross_entropy_cpu(  # noqa: PLR0917
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    tau: float,
    scale: float,
    normalize: bool,
    radius: float | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    per: str,
    with_grad: bool,
) -> tuple[Tensor, ...]:
    settings = CrossEntropySettings(
        _weighting(tau, scale, normalize, radius), ignore_index, label_smoothing, reduction, per
    )
    objective, grad, record = _rust_cross_entropy(
        logits.detach(), target.detach(), weight, settings, with_grad=with_grad
    )
    denominator = logits.new_full((), float(record.denominator), dtype=torch.float64)
    grad = logits.new_empty(0) if grad is None else grad
    return objective, record.losses, record.weights, grad, denominator


@_library.register_fake("rgd::cross_entropy")
def _cross_entropy_fake(  # noqa: PLR0917
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    tau: float,
    scale: float,
    normalize: bool,
    radius: float | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    per: str,
    with_grad: bool,
) -> tuple[Tensor, ...]:
    dtype = accumulator(logits.dtype)
    shape = logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else torch.Size(())
    return (
        logits.new_empty(shape if reduction == "none" else (), dtype=dtype),
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(shape[:1] if per == "sample" else shape, dtype=dtype),
        torch.empty_like(logits) if with_grad else logits.new_empty(0),
        logits.new_empty((), dtype=torch.float64),
    )


def _cross_entropy_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, *numbers = inputs
    _, losses, weights, grad, denominator = output
    tau, scale, normalize, radius, ignore_index, label_smoothing, reduction, per, _ = numbers
    ctx.settings = CrossEntropySettings(
        _weighting(tau, scale, normalize, radius), ignore_index, label_smoothing, reduction, per
    )
    ctx.save_for_backward(grad, logits, target, weight, weights)
    ctx.mark_non_differentiable(losses, weights, grad, denominator)


def _cross_entropy_backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grad, *saved = ctx.saved_tensors
    if torch.is_grad_enabled():
        gradient = _differentiable_gradient(grad_output, ctx.settings, *saved)
    else:
        gradient = _scaled(grad, grad_output)
    return gradient, *[None] * 11


_library.register_autograd(
    "rgd::cross_entropy", _cross_entropy_backward, setup_context=_cross_entropy_context
)


@_library.impl("rgd::sample_weights", "cpu")
def _sample_weights_cpu(  # noqa: PLR0917
    losses: Tensor,
    where: Tensor | None,
    tau: float,
    scale: float,
    normalize: bool,
    radius: float | None,
) -> Tensor:
    return _rust_sample_weights(losses.detach(), _weighting(tau, scale, normalize, radius), where)


@_library.register_fake("rgd::sample_weights")
def _sample_weights_fake(  # noqa: PLR0917
    losses: Tensor,
    where: Tensor | None,
    tau: float,
    scale: float,
    normalize: bool,
    radius: float | None,
) -> Tensor:
    return losses.new_empty(losses.shape, dtype=accumulator(losses.dtype))


def _constant(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _no_gradient(ctx: Any, grad_output: Tensor) -> tuple[None, ...]:
    return (None,) * 6


_library.register_autograd("rgd::sample_weights", _no_gradient, setup_context=_constant)
