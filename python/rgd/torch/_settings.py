"""What a re-weighted cross-entropy depends on besides tensors."""

from __future__ import annotations

import dataclasses

import torch

from rgd.weightings import Weighting


@dataclasses.dataclass(frozen=True)
class CrossEntropySettings:
    """What, besides tensors, a re-weighted cross-entropy depends on."""

    weighting: Weighting
    ignore_index: int
    label_smoothing: float
    reduction: str
    per: str


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that losses and weights of a dtype are computed in."""
    return torch.float64 if dtype is torch.float64 else torch.float32
