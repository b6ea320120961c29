"""The dtypes that the torch front takes, and those that it computes in."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that losses and weights of a dtype are computed in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def extra_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of an extra, one of the names of `rgd._extras`, of logits whose losses have `dtype`."""
    return torch.bool if name == "correct" else dtype


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype that weights are computed in before they are rounded once: float64, if the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that matrix products of a tensor are computed in.

    It is float32 for bfloat16 on an x86 processor without bfloat16 instructions, where torch takes several
    times as long for a product in bfloat16.
    """
    slow = tensor.is_cpu and tensor.dtype is torch.bfloat16 and not multiplies_bfloat16()
    return torch.float32 if slow else tensor.dtype


def multiplies_bfloat16() -> bool:
    """Whether the processor multiplies matrices of bfloat16; True if torch does not know."""
    if platform.machine().lower() not in {"x86_64", "amd64"}:
        return True
    cpu: Any = torch.cpu
    known = [
        asked for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        if (asked := getattr(cpu, name, None)) is not None
    ]  # fmt: skip
    return not known or any(asked() for asked in known)
