"""A problem as the arguments of an operator of torch, which compiled graphs call.

The operator also takes the weighting as `(kind, numbers)`: the name of its kernel and a float64 tensor. So a
schedule that changes a number compiles nothing again, and a new kernel changes no schema.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from rgd._extras import EXTRAS
from rgd.torch._dtypes import extra_dtype
from rgd.torch._head import Chunking, LinearHead
from rgd.torch._problem import Options, Problem

PROBLEM = (
    "Tensor logits, Tensor target, Tensor? class_weight, Tensor? adjustment, Tensor? measure, "
    "Tensor? normalizer, Tensor? head_weight, Tensor? head_bias, int ignore_index, float label_smoothing, "
    "str reduction, str per, float z_loss, float? logit_softcap, bool shift, int? chunk_bytes, "
    "str? accumulate_dtype, str[] returns"
)
"""The part of an operator's schema that a problem takes."""
LENGTH = PROBLEM.count(",") + 1
library: Any = torch.library


def flattened(problem: Problem) -> tuple[Any, ...]:
    """The arguments that `PROBLEM` names; `rebuilt` is the inverse."""
    options = problem.options
    chunking = Chunking() if problem.head is None else problem.head.chunking
    dtype = chunking.accumulate_dtype
    no_head = (None, None) if problem.head is None else ()
    return (
        *problem.tensors(), *no_head,
        options.ignore_index, options.label_smoothing, options.reduction, options.per, options.z_loss,
        chunking.logit_softcap, chunking.shift, chunking.chunk_bytes,
        None if dtype is None else str(dtype).removeprefix("torch."), list(problem.returns),
    )  # fmt: skip


def rebuilt(arguments: tuple[Any, ...]) -> Problem:
    """The problem of the first `LENGTH` arguments of an operator."""
    logits, target, class_weight, adjustment, measure, normalizer, *others = arguments[:LENGTH]
    weight, bias, *settings = others
    ignore_index, smoothing, reduction, per, z_loss, softcap, shift, chunk_bytes, name, returns = settings
    options = Options(ignore_index, smoothing, reduction, per, z_loss=z_loss)
    head = None
    if weight is not None:
        dtype = None if name is None else getattr(torch, name)
        head = LinearHead(weight, bias, Chunking(softcap, shift, chunk_bytes, dtype))
    return Problem(
        logits, target, options, logits.dtype, class_weight, adjustment, measure,
        head=head, normalizer=normalizer, returns=tuple(returns),
    )  # fmt: skip


def define(schemas: Mapping[str, str]) -> None:
    """Define operators, by their names and schemas."""
    for name, schema in schemas.items():
        library.define(f"rgd::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the function that an operator runs while it is traced, which allocates no memory.

    torch also runs it if a call mixes tensors of the meta device with others. The result would then be
    uninitialised memory, so such a call is refused.
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

        library.register_fake(name)(checked)
        return function

    return register


def numbers_of(tensor: Tensor) -> tuple[float, ...]:
    """The numbers of a kernel, read from their tensor."""
    return tuple(cast("list[float]", tensor.tolist()))  # pyright: ignore[reportUnknownMemberType]


def empty_extras(problem: Problem, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """An uninitialised tensor for each extra that a problem wants, and an empty one for each other."""
    return tuple(
        problem.logits.new_empty(shape, dtype=extra_dtype(name, dtype))
        if name in problem.returns
        else problem.logits.new_empty(0)
        for name in EXTRAS
    )


def extras_in_order(extras: Mapping[str, Tensor], like: Tensor) -> tuple[Tensor, ...]:
    """The extras as an operator returns them: all of them, an empty tensor for each that is not wanted."""
    return tuple(or_empty(extras.get(name), like) for name in EXTRAS)


def extras_by_name(problem: Problem, extras: Sequence[Tensor]) -> dict[str, Tensor]:
    """The extras that a problem wants, of those that an operator has returned."""
    found = dict(zip(EXTRAS, extras, strict=True))
    return {name: found[name] for name in problem.returns}


def or_empty(result: Tensor | None, like: Tensor) -> Tensor:
    """A result, or an empty tensor if it is not wanted."""
    return like.new_empty(0) if result is None else result
