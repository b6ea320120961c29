"""The dtypes of the torch front: what it takes, and what it computes in."""

from __future__ import annotations

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


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype that weights are computed in, to be rounded once: float64, where the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
