"""What torch is doing around a call: training, evaluating, or computing a forward pass again."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

_internals: Any = torch._C  # pyright: ignore[reportPrivateUsage]
_forward_ad: Any = forward_ad
graph_is_kept: Any = _internals._autograd._get_current_graph_task_keep_graph
"""Whether the backward pass that is running keeps its graph for another one."""
saved_tensors_hooks: Any = _internals._autograd._top_saved_tensors_default_hooks
"""The hooks on saved tensors that hold now, or None; its argument: whether they must not be traced."""


def evaluates() -> bool:
    """Whether gradients are off because nothing is trained: `torch.no_grad()` or inference mode.

    Gradients are also off inside an `autograd.Function.forward`, as in a reentrant checkpoint or a loss
    computed in chunks, under forward-mode differentiation in `no_grad`, and where `torch.jit.trace` checks
    what it recorded. None of these is an evaluation.
    """
    if torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return True
    differentiates = not _internals._is_fwd_grad_enabled() or _forward_ad._current_level >= 0
    return not differentiates and _internals._get_tracing_state() is None


def recomputes() -> bool:
    """Whether a backward pass is running: a forward pass within it repeats an earlier one (a checkpoint)."""
    return not torch.compiler.is_compiling() and _internals._current_graph_task_id() != -1


def may_be_recomputed() -> bool:
    """Whether a backward pass may repeat this call: hooks on saved tensors, or a reentrant checkpoint."""
    if torch.compiler.is_compiling():
        return False
    return saved_tensors_hooks(False) is not None or not (torch.is_grad_enabled() or evaluates())


def is_exporting() -> bool:
    """Whether `torch.export` is tracing."""
    return _compiler._is_exporting_flag if _HAS_EXPORTING_FLAG else torch.compiler.is_exporting()


# The flag itself where there is one: torch 2.8 traces `is_exporting` as True in any compiled graph.
_compiler: Any = torch.compiler
_HAS_EXPORTING_FLAG = hasattr(_compiler, "_is_exporting_flag")
