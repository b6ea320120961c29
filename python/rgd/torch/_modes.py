"""What torch is doing around a call: training, evaluating, or computing a forward pass again."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

_internals: Any = torch._C  # pyright: ignore[reportPrivateUsage]
_forward_ad: Any = forward_ad


def evaluates() -> bool:
    """Whether gradients are off because nothing is trained: `torch.no_grad()` or inference mode.

    Gradients are also off inside an `autograd.Function.forward`, as in a reentrant checkpoint or a loss
    computed in chunks, and under forward-mode differentiation in `no_grad`. Both are training.
    """
    if torch.is_grad_enabled():
        return False
    if torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
        return True
    return _internals._is_fwd_grad_enabled() and _forward_ad._current_level < 0


def recomputes() -> bool:
    """Whether a backward pass is running: a forward pass within it repeats an earlier one (a checkpoint)."""
    return not torch.compiler.is_compiling() and _internals._current_graph_task_id() != -1
