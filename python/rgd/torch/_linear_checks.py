"""The settings of a linear head, and what of its tensors is refused, in which words."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rgd.torch._checks import FLOATS, INTEGERS, DtypeError, MismatchError, check_dense, refuse_dtype
from rgd.torch._distributed import Sync
from rgd.torch.backends._options import Options
from rgd.torch.backends._registry import autocasts


class Chunking(NamedTuple):
    """How a head is worked through.

    Attributes:
        logit_softcap: Logits are `logit_softcap * tanh(z / logit_softcap)`; None for `z` itself.
        shift: Whether position t predicts the target of position t + 1.
        chunk_bytes: How large the logits of a chunk may be; None for the default.
        accumulate_dtype: The dtype that the gradient of the head is summed in; None for float32 (float64).
        vocab_group: The processes that hold slices of the vocabulary; None for a whole one.
    """

    logit_softcap: float | None = None
    shift: bool = False
    chunk_bytes: int | None = None
    accumulate_dtype: torch.dtype | None = None
    vocab_group: Any = None

    def checked(self) -> Chunking:
        """The same with plain numbers.

        Raises:
            TypeError, ValueError: If a setting is not allowed.
        """
        cap, size = self.logit_softcap, self.chunk_bytes
        if cap is not None and (isinstance(cap, bool) or not isinstance(cap, numbers.Real)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"logit_softcap must be a positive number or None, got {cap!r}")
        if cap is not None and not 0 < float(cap) < math.inf:
            raise ValueError(f"logit_softcap must be a positive number, or None for no cap, got {cap}")
        if not isinstance(self.shift, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"shift must be True or False, got {self.shift!r}")
        if size is not None and (isinstance(size, bool) or not isinstance(size, numbers.Integral)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"chunk_bytes must be a whole number of bytes or None, got {size!r}")
        if size is not None and size <= 0:
            raise ValueError(f"chunk_bytes must be positive: the bytes of a chunk's logits, got {size}")
        dtype = self.accumulate_dtype
        if dtype is not None and dtype not in FLOATS:
            raise TypeError(f"accumulate_dtype must be a float dtype such as torch.float32, got {dtype!r}")
        return Chunking(
            None if cap is None else float(cap), self.shift, None if size is None else int(size), dtype,
            self.vocab_group,
        )  # fmt: skip


class Shard(NamedTuple):
    """This process's slice of a split vocabulary."""

    group: Any
    first: int
    classes: int
    widest: int
    even: bool

    @classmethod
    def of(cls, group: Any, weight: Tensor) -> Shard:
        Sync(group)  # refuses what is no group
        own = torch.tensor([weight.shape[0]], device=weight.device)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own, group=group)
        sizes = [int(size) for size in torch.cat(parts).cpu()]
        if min(sizes) == 0:
            raise ValueError(
                f"every process of vocab_group must hold at least one class, got slices of {sizes} classes"
            )
        first = sum(sizes[: dist.get_rank(group)])
        return cls(group, first, sum(sizes), max(sizes), min(sizes) == max(sizes))


def check_head(input: Any, weight: Any, bias: Any) -> None:
    """Refuse hidden states and a head that do not fit each other."""
    for name, tensor in (("input", input), ("linear_weight", weight), ("linear_bias", bias)):
        if tensor is None and name == "linear_bias":
            continue
        if not isinstance(tensor, Tensor):
            hint = ": give its weight, head.weight" if isinstance(tensor, torch.nn.Module) else ""
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}{hint}")
        check_dense(name, tensor)
        if hasattr(tensor, "full_tensor") and not hasattr(input, "full_tensor"):
            raise TypeError(
                f"{name} is a DTensor, the part of a parameter that FSDP keeps between calls: let the loss "
                "be a unit of its own, fully_shard(criterion) for criterion = LinearRGDLoss.tie(head), or "
                "read the head inside the forward pass of the unit that it belongs to"
            )
        if tensor.dtype not in FLOATS:
            refuse_dtype(name, tensor, "be float32, float64, float16 or bfloat16")
        if tensor.device != input.device:
            raise MismatchError(
                f"input is on {input.device} and {name} on {tensor.device}: move both to one device"
            )
    if input.dim() < 2:
        raise MismatchError(
            f"input must be hidden states of shape (N, D) or (B, T, D), got {tuple(input.shape)}: for one "
            "sample give input.unsqueeze(0)"
        )
    if weight.dim() != 2:
        raise MismatchError(f"linear_weight must have shape (C, D), got {tuple(weight.shape)}")
    if weight.shape[1] != input.shape[-1]:
        transposed = weight.shape[0] == input.shape[-1]
        raise MismatchError(
            f"linear_weight must have shape (C, D) with D = {input.shape[-1]}, the last axis of input, got "
            f"{tuple(weight.shape)}" + (": give linear_weight.t()" if transposed else "")
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise MismatchError(
            f"linear_bias must have shape ({weight.shape[0]},), one number a class, got {tuple(bias.shape)}"
        )
    if not autocasts(input.device.type):
        for name, tensor in (("linear_weight", weight), ("linear_bias", bias)):
            if tensor is not None and tensor.dtype != input.dtype:
                raise DtypeError(
                    f"input is {input.dtype} and {name} {tensor.dtype}: convert one of them, or run under "
                    "torch.autocast"
                )


def check_targets(  # noqa: PLR0917
    input: Tensor,
    target: Any,
    class_weight: Tensor | None,
    classes: int,
    options: Options,
    chunking: Chunking,
    shard: Shard | None,
) -> None:
    """Refuse targets, class weights and settings that do not fit the head."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a torch.Tensor, got {type(target).__name__}")
    check_dense("target", target)
    probabilities = target.is_floating_point() and target.dtype in FLOATS
    if not probabilities and target.dtype not in INTEGERS:
        refuse_dtype("target", target, "hold class indices (int64) or class probabilities (floats)")
    rows = input.shape[:-1]
    expected = (*rows, classes) if probabilities else tuple(rows)
    if tuple(target.shape) != expected:
        what = "class probabilities" if probabilities else "class indices"
        raise MismatchError(
            f"target holds {what}, which must have shape {expected} for input of shape "
            f"{tuple(input.shape)} and {classes} classes, got {tuple(target.shape)}"
        )
    if target.device != input.device:
        raise ValueError(f"input is on {input.device} and target on {target.device}: move both to one device")
    if probabilities and options.ignore_index >= 0:
        raise ValueError(
            f"ignore_index does not apply to class probabilities, got {options.ignore_index}: leave it out"
        )
    if chunking.shift and input.dim() != 3:
        raise MismatchError(
            f"shift=True needs input of shape (B, T, D), got {tuple(input.shape)}: for one sequence give "
            "input.unsqueeze(0) and target.unsqueeze(0)"
        )
    if probabilities and (chunking.shift or shard is not None):
        name = "shift" if chunking.shift else "vocab_group"
        raise ValueError(f"{name} takes class indices, got class probabilities as target")
    if class_weight is not None and class_weight.shape[0] != classes:
        raise MismatchError(
            f"weight must hold one number for each of the {classes} classes, got {class_weight.shape[0]}"
        )
    if class_weight is not None and class_weight.device != input.device:
        raise ValueError(
            f"input is on {input.device} and weight on {class_weight.device}: move both to one device"
        )
    if shard is not None and options.label_smoothing > 0 and not shard.even:
        raise ValueError(
            "label_smoothing over a vocabulary in slices of different sizes is refused, since slices are "
            "mostly uneven where one is padded, and the padding would get its share of the label: split "
            "the vocabulary evenly, or leave label_smoothing out"
        )
