"""What a re-weighted cross-entropy depends on besides tensors and the weighting, and the dtypes it uses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """The options of `nn.CrossEntropyLoss`, what a weight belongs to, whether the logits are overwritten."""

    ignore_index: int
    label_smoothing: float
    reduction: str
    per: str
    inplace: bool = False


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that losses and weights of a dtype are computed in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype that weights are computed in, to be rounded once: float64, where the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
