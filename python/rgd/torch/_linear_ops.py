"""The passes over the chunks of a linear head as operators of torch, which compiled graphs call.

As in `rgd.torch._ops`, a weighting comes as the name of its kernel and a tensor of numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rgd.torch._chunks import Gradients, Head, Wanted, gradients_of, in_one_pass, losses_of
from rgd.torch._ops import register_fake
from rgd.torch._steps import ComposedStep, RustStep
from rgd.torch._weigher import KernelPlan, Weigher
from rgd.torch.backends import composite
from rgd.torch.backends._options import Options, accumulator
from rgd.torch.backends._registry import choose

_HEAD = (
    "Tensor input, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, Tensor? takes_part, "
    "Tensor? adjustment, int ignore_index, float label_smoothing, float? softcap, SymInt rows, str dtype, "
    "bool shift"
)
_WANTED = "bool want_input, bool want_weight, bool want_bias"
_library: Any = torch.library
for _name, _schema in {
    "linear_one_pass": f"({_HEAD}, {_WANTED}, Tensor norm, str kind, Tensor numbers) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "linear_losses": f"({_HEAD}) -> Tensor",
    "linear_products": f"({_HEAD}, {_WANTED}, Tensor losses, Tensor factors) -> Tensor",
    "linear_gradients": f"({_HEAD}, {_WANTED}, Tensor factors) -> (Tensor, Tensor, Tensor)",
}.items():
    _library.define(f"rgd::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))

one_pass: Any = torch.ops.rgd.linear_one_pass.default
losses: Any = torch.ops.rgd.linear_losses.default
products: Any = torch.ops.rgd.linear_products.default
gradients: Any = torch.ops.rgd.linear_gradients.default

_KEY = "CompositeExplicitAutograd"
_INPUTS = 13  # of _HEAD


def _head(given: tuple[Any, ...]) -> tuple[Head, Tensor | None]:
    """The head of the arguments of `_HEAD`, and which rows take part; its target has the losses' shape."""
    input, weight, bias, target, class_weight, takes_part, adjustment, *settings = given
    ignore_index, smoothing, softcap, rows, dtype, shift = settings
    if target.is_floating_point():
        target = target.detach().flatten(0, -2)
    else:
        # The call could not check them: values cannot be read while a graph is compiled.
        composite.check_labels(target, weight.shape[0], ignore_index, shift)
        target = (F.pad(target, (0, 1), value=ignore_index) if shift else target).flatten()
    options = Options(ignore_index, smoothing, "sum", "element")
    step = RustStep if choose(input, target, weight, bias).name == "rust" else ComposedStep
    bias, class_weight, adjustment = (
        None if one is None else one.detach().contiguous() for one in (bias, class_weight, adjustment)
    )
    head = Head(
        input.detach(), weight.detach(), bias, target, softcap, rows, getattr(torch, dtype),
        step(class_weight, options, adjustment),
    )  # fmt: skip
    return head, takes_part


def _or_empty(found: Gradients, given: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the dtype of what they belong to, an empty tensor for one not asked for."""
    like = given[0]
    filled = [like.new_empty(0) if one is None else one.to(like.dtype) for one in found]
    return filled[0], filled[1], filled[2]


def _fake_gradients(given: tuple[Any, ...], wanted: tuple[bool, ...]) -> tuple[Tensor, Tensor, Tensor]:
    input, weight = given[:2]
    shapes = [input.shape, weight.shape, weight.shape[:1]]
    made = [input.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True)]
    return made[0], made[1], made[2]


def _fake_losses(given: tuple[Any, ...]) -> Tensor:
    return given[0].new_empty(given[0].shape[:1], dtype=accumulator(given[0].dtype))


@_library.impl("rgd::linear_one_pass", _KEY)
@torch.no_grad()
def _(*given: Any) -> tuple[Tensor, ...]:
    head, takes_part = _head(given[:_INPUTS])
    wanted, (norm, kind, numbers) = Wanted(*given[_INPUTS : _INPUTS + 3]), given[_INPUTS + 3 :]
    weigher = Weigher(KernelPlan((kind, tuple(numbers.tolist()))))
    losses, weights, found = in_one_pass(head, takes_part, norm, norm, weigher, wanted)
    objective = (norm.double() * weights.double() * losses.double()).masked_fill(norm * weights == 0, 0).sum()
    return objective.to(losses.dtype), losses, weights, *_or_empty(found, given)


@register_fake("rgd::linear_one_pass")
def _(*given: Any) -> tuple[Tensor, ...]:
    losses = _fake_losses(given)
    return (
        losses.new_empty(()), losses, torch.empty_like(losses),
        *_fake_gradients(given, given[_INPUTS : _INPUTS + 3]),
    )  # fmt: skip


@_library.impl("rgd::linear_losses", _KEY)
@torch.no_grad()
def _(*given: Any) -> Tensor:
    return losses_of(*_head(given))


@register_fake("rgd::linear_losses")
def _(*given: Any) -> Tensor:
    return _fake_losses(given)


@_library.impl("rgd::linear_products", _KEY)
def _(*given: Any) -> Tensor:
    losses, factors = given[_INPUTS + 3 :]
    return factors * losses.masked_fill((factors == 0) & ~losses.isnan(), 0)


@register_fake("rgd::linear_products")
def _(*given: Any) -> Tensor:
    return _fake_losses(given)


@_library.impl("rgd::linear_gradients", _KEY)
@torch.no_grad()
def _(*given: Any) -> tuple[Tensor, ...]:
    head, takes_part = _head(given[:_INPUTS])
    found = gradients_of(head, takes_part, given[-1], Wanted(*given[_INPUTS : _INPUTS + 3]))
    return _or_empty(found, given)


@register_fake("rgd::linear_gradients")
def _(*given: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(given, given[_INPUTS : _INPUTS + 3])


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, losses, weights, *found = output
    ctx.save_for_backward(*found)
    ctx.wanted = inputs[_INPUTS : _INPUTS + 3]
    ctx.mark_non_differentiable(losses, weights, *found)


def _scaled(ctx: Any, above: Tensor, *_: Any) -> tuple[Any, ...]:
    pairs = zip(ctx.saved_tensors, ctx.wanted, strict=True)
    found = (one * above.to(one.dtype) if want else None for one, want in pairs)
    return *found, *[None] * (_INPUTS + 3)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *head, _, factors = inputs
    ctx.save_for_backward(*head[:7], factors)
    ctx.settings = head[7:]


def _by_a_pass(ctx: Any, above: Tensor) -> tuple[Any, ...]:
    *tensors, factors = ctx.saved_tensors
    factors = torch.where(factors == 0, 0, factors * above)
    found = gradients(*tensors, *ctx.settings, factors)
    wanted = ctx.settings[-3:]
    of = (one if want else None for one, want in zip(found, wanted, strict=True))
    return *of, *[None] * (_INPUTS + 2)


_library.register_autograd("rgd::linear_one_pass", _scaled, setup_context=_keep_gradients)
_library.register_autograd("rgd::linear_products", _by_a_pass, setup_context=_keep_inputs)
