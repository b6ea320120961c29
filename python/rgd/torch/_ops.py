"""The Rust kernels as operators of torch, which compiled graphs call.

The weighting comes as `(kind, numbers)`: the name of its kernel and a float64 tensor. So a schedule that
changes a number compiles nothing again, and a new kernel changes no schema.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from rgd.torch.backends._options import Options, accumulator

_OPTIONS = "int ignore_index, float label_smoothing"
_ADJUSTMENT = "Tensor? adjustment=None"
_REDUCED = f"{_OPTIONS}, str reduction, str per, bool with_grad, {_ADJUSTMENT}"
_TENSORS = "Tensor logits, Tensor target, Tensor? class_weight"
_library: Any = torch.library
for _name, _schema in {
    "sample_weights": "(Tensor losses, str kind, Tensor numbers) -> Tensor",
    "cross_entropy": f"({_TENSORS}, Tensor? base, str kind, Tensor numbers, {_REDUCED}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "cross_entropy_losses": f"({_TENSORS}, {_OPTIONS}, {_ADJUSTMENT}) -> Tensor",
    "cross_entropy_gradient": f"({_TENSORS}, Tensor? base, Tensor losses, Tensor weights, {_REDUCED}) "
    "-> (Tensor, Tensor, Tensor)",
}.items():
    _library.define(f"rgd::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))

sample_weights: Any = torch.ops.rgd.sample_weights.default
cross_entropy: Any = torch.ops.rgd.cross_entropy.default
cross_entropy_losses: Any = torch.ops.rgd.cross_entropy_losses.default
cross_entropy_gradient: Any = torch.ops.rgd.cross_entropy_gradient.default


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what an operator returns where it is only traced, which needs no memory.

    A call that mixes tensors of the meta device with others ends there too, and would return memory that
    nobody has written to.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*given: Any, **named: Any) -> Any:
            devices = {str(one.device) for one in (*given, *named.values()) if isinstance(one, Tensor)}
            if "meta" in devices and len(devices) > 1:
                raise RuntimeError(
                    f"{name} got tensors on {', '.join(sorted(devices))}, and one on the meta device has no "
                    "memory: move all of them to one device"
                )
            return function(*given, **named)

        _library.register_fake(name)(checked)
        return function

    return register


def _kernels() -> Any:
    # Imported when an operator runs, since the module of the backend imports this one.
    from rgd.torch.backends import rust  # noqa: PLC0415

    return rust


def _floats(numbers: Tensor) -> tuple[float, ...]:
    return tuple(cast("list[float]", numbers.tolist()))  # pyright: ignore[reportUnknownMemberType]


def _shape(logits: Tensor) -> torch.Size:
    """The shape of the targets."""
    return logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else torch.Size(())


def _reduced(logits: Tensor, reduction: str) -> Tensor:
    return logits.new_empty(_shape(logits) if reduction == "none" else (), dtype=accumulator(logits.dtype))


def _gradient(logits: Tensor, with_grad: bool) -> Tensor:
    return torch.empty_like(logits) if with_grad else logits.new_empty(0)


@_library.impl("rgd::sample_weights", "cpu")
def _(losses: Tensor, kind: str, numbers: Tensor) -> Tensor:
    return _kernels().fill_weights(losses.detach(), kind, _floats(numbers))


@register_fake("rgd::sample_weights")
def _(losses: Tensor, kind: str, numbers: Tensor) -> Tensor:
    return losses.new_empty(losses.shape, dtype=accumulator(losses.dtype))


@_library.impl("rgd::cross_entropy", "cpu")
def _(  # noqa: PLR0917
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    base: Tensor | None,
    kind: str,
    numbers: Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    per: str,
    with_grad: bool,
    adjustment: Tensor | None = None,
) -> tuple[Tensor, ...]:
    options = Options(ignore_index, label_smoothing, reduction, per)
    kernel = kind, _floats(numbers)
    objective, grad, losses, weights, denominator, _ = _kernels().fill(
        logits, target, class_weight, base, options, kernel, with_grad, adjustment
    )
    grad = logits.new_empty(0) if grad is None else grad
    return objective, losses, weights, grad, logits.new_full((), denominator, dtype=torch.float64)


@register_fake("rgd::cross_entropy")
def _(  # noqa: PLR0917
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    base: Tensor | None,
    kind: str,
    numbers: Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    per: str,
    with_grad: bool,
    adjustment: Tensor | None = None,
) -> tuple[Tensor, ...]:
    losses = _reduced(logits, "none")
    weights = losses.new_empty(losses.shape[:1]) if per == "sample" else torch.empty_like(losses)
    denominator = logits.new_empty((), dtype=torch.float64)
    return _reduced(logits, reduction), losses, weights, _gradient(logits, with_grad), denominator


@_library.impl("rgd::cross_entropy_losses", "cpu")
def _(  # noqa: PLR0917
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    adjustment: Tensor | None = None,
) -> Tensor:
    return _kernels().fill_losses(logits, target, class_weight, ignore_index, label_smoothing, adjustment)


@register_fake("rgd::cross_entropy_losses")
def _(  # noqa: PLR0917
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    adjustment: Tensor | None = None,
) -> Tensor:
    return _reduced(logits, "none")


@_library.impl("rgd::cross_entropy_gradient", "cpu")
def _(  # noqa: PLR0917
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    base: Tensor | None,
    losses: Tensor,
    weights: Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    per: str,
    with_grad: bool,
    adjustment: Tensor | None = None,
) -> tuple[Tensor, ...]:
    options = Options(ignore_index, label_smoothing, reduction, per)
    objective, grad, denominator = _kernels().fill_gradient(
        logits, target, class_weight, base, losses, weights, options, with_grad, adjustment
    )
    grad = logits.new_empty(0) if grad is None else grad
    return objective, grad, logits.new_full((), denominator, dtype=torch.float64)


@register_fake("rgd::cross_entropy_gradient")
def _(  # noqa: PLR0917
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    base: Tensor | None,
    losses: Tensor,
    weights: Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    per: str,
    with_grad: bool,
    adjustment: Tensor | None = None,
) -> tuple[Tensor, ...]:
    denominator = logits.new_empty((), dtype=torch.float64)
    return _reduced(logits, reduction), _gradient(logits, with_grad), denominator


def _keep(ctx: Any, inputs: tuple[Any, ...], weights: Tensor, grad: Tensor) -> None:
    logits, target, class_weight, base = inputs[:4]
    ctx.options = Options(*inputs[6:10])
    ctx.save_for_backward(grad, logits, target, class_weight, base, weights, inputs[11])


def _backward(ctx: Any, grad_output: Tensor) -> Tensor:
    grad, *saved = ctx.saved_tensors
    if torch.is_grad_enabled():
        return _kernels().differentiable_gradient(grad_output, ctx.options, *saved)
    return _kernels().scaled(grad, grad_output)


def _context_of_one_pass(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, losses, weights, grad, denominator = output
    _keep(ctx, inputs, weights, grad)
    ctx.mark_non_differentiable(losses, weights, grad, denominator)


def _context_of_two_passes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, grad, denominator = output
    _keep(ctx, inputs, inputs[5], grad)
    ctx.mark_non_differentiable(grad, denominator)


def _constant(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _one_gradient(inputs: int) -> Any:
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad_output), *[None] * (inputs - 1)

    return backward


def _no_gradient(inputs: int) -> Any:
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, ...]:
        return (None,) * inputs

    return backward


_library.register_autograd("rgd::cross_entropy", _one_gradient(12), setup_context=_context_of_one_pass)
_library.register_autograd(
    "rgd::cross_entropy_gradient", _one_gradient(12), setup_context=_context_of_two_passes
)
_library.register_autograd("rgd::sample_weights", _no_gradient(3), setup_context=_constant)
_library.register_autograd("rgd::cross_entropy_losses", _no_gradient(6), setup_context=_constant)
