"""A linear head: its tensors, its settings, and their checks."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rgd.torch._checks import DtypeError, MismatchError, check_dense, refuse_dtype
from rgd.torch._distributed import Sync
from rgd.torch._dtypes import FLOATS
from rgd.torch._modes import autocasts


class Chunking(NamedTuple):
    """The settings of the computation of a head.

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
        """The same settings, checked, as plain numbers.

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
    """This process's slice of a split vocabulary.

    Attributes:
        group: The processes that hold the slices.
        first: The class of this slice's first column.
        classes: The number of classes of all slices together.
        widest: The number of classes of the largest slice.
        even: Whether all slices have the same size.
    """

    group: Any
    first: int
    classes: int
    widest: int
    even: bool


class LinearHead(NamedTuple):
    """The head that makes logits of hidden states.

    Attributes:
        weight: (C, D).
        bias: (C,), or None.
        chunking: Its settings.
        shard: This process's part of it; None for a whole one.
    """

    weight: Tensor
    bias: Tensor | None
    chunking: Chunking
    shard: Shard | None = None

    def classes(self) -> int:
        """C; for a split vocabulary, the number of classes of all slices."""
        return self.weight.shape[0] if self.shard is None else self.shard.classes

    def checked(self, input: Any) -> LinearHead:
        """The same head, checked to fit hidden states, with its shard.

        Args:
            input: Hidden states, (N, D) or (B, T, D).

        Raises:
            RuntimeError: If the vocabulary is split in a compiled function.
            TypeError, ValueError: If the tensors do not fit each other.
        """
        weight, bias, chunking, _ = self
        for name, tensor in (("input", input), ("linear_weight", weight), ("linear_bias", bias)):
            if tensor is None and name == "linear_bias":
                continue
            if not isinstance(tensor, Tensor):
                hint = ": give its weight, head.weight" if isinstance(tensor, torch.nn.Module) else ""
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}{hint}")
            if tensor.is_nested or tensor.layout is not torch.strided:
                check_dense(name, tensor)
            if hasattr(tensor, "full_tensor") and not hasattr(input, "full_tensor"):
                raise TypeError(
                    f"{name} is a DTensor, the part of a parameter that FSDP keeps between calls: let the "
                    "loss be a unit of its own, fully_shard(criterion) for criterion = "
                    "LinearRGDLoss.tie(head), or read the head inside the forward pass of the unit that it "
                    "belongs to"
                )
            if tensor.dtype not in FLOATS:
                refuse_dtype(name, tensor, "be float32, float64, float16 or bfloat16")
            if tensor.device != input.device:
                raise MismatchError(
                    f"input is on {input.device} and {name} on {tensor.device}: move both to one device"
                )
        _check_shapes(tuple(input.shape), weight, bias)
        if not autocasts(input.device.type):
            for name, tensor in (("linear_weight", weight), ("linear_bias", bias)):
                if tensor is not None and tensor.dtype != input.dtype:
                    raise DtypeError(
                        f"input is {input.dtype} and {name} {tensor.dtype}: convert one of them, or run "
                        "under torch.autocast"
                    )
        if chunking.vocab_group is None:
            return self
        if torch.compiler.is_compiling():
            raise RuntimeError("vocab_group is for eager calls: keep the loss out of the compiled function")
        return LinearHead(weight, bias, chunking, _shard_of(chunking.vocab_group, weight))


def _check_shapes(shape: tuple[int, ...], weight: Tensor, bias: Tensor | None) -> None:
    if len(shape) < 2:
        raise MismatchError(
            f"input must be hidden states of shape (N, D) or (B, T, D), got {shape}: for one "
            "sample give input.unsqueeze(0)"
        )
    if weight.dim() != 2:
        raise MismatchError(f"linear_weight must have shape (C, D), got {tuple(weight.shape)}")
    if weight.shape[1] != shape[-1]:
        transposed = weight.shape[0] == shape[-1]
        raise MismatchError(
            f"linear_weight must have shape (C, D) with D = {shape[-1]}, the last axis of input, got "
            f"{tuple(weight.shape)}" + (": give linear_weight.t()" if transposed else "")
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise MismatchError(
            f"linear_bias must have shape ({weight.shape[0]},), one number a class, got {tuple(bias.shape)}"
        )


def _shard_of(group: Any, weight: Tensor) -> Shard:
    Sync(group)  # raises if it is no group
    own = torch.tensor([weight.shape[0]], device=weight.device)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    sizes = [int(size) for size in torch.cat(parts).cpu()]
    if min(sizes) == 0:
        raise ValueError(
            f"every process of vocab_group must hold at least one class, got slices of {sizes} classes"
        )
    first = sum(sizes[: dist.get_rank(group)])
    return Shard(group, first, sum(sizes), max(sizes), min(sizes) == max(sizes))
