"""The mode of torch during a call: training, evaluating, compiling, transforming, or repeating a pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_internals: Any = torch._C  # pyright: ignore[reportPrivateUsage]
_forward_ad: Any = forward_ad
graph_is_kept: Any = _internals._autograd._get_current_graph_task_keep_graph
"""Whether the backward pass that is running keeps its graph for another one."""
saved_tensors_hooks: Any = _internals._autograd._top_saved_tensors_default_hooks
"""The active hooks on saved tensors, or None; its argument says whether they must not be traced."""
_transforms_active = _internals._are_functorch_transforms_active
_dispatch_modes = _internals._len_torch_dispatch_stack
_tracing_state = _internals._get_tracing_state
_is_grad_enabled = torch.is_grad_enabled
_graph_task_id = _internals._current_graph_task_id
PLAIN = frozenset((Tensor, torch.nn.Parameter))
"""The types of tensors that have no behaviour of their own."""
# This is called once, here, since older torch cannot compile a call of is_autocast_available.
_AUTOCASTING = frozenset(
    kind
    for kind in ("cpu", "cuda", "hpu", "mps", "mtia", "privateuseone", "xla", "xpu")
    if torch.amp.is_autocast_available(kind)
)


# --- training, evaluating, repeating ---


def trains_plainly() -> bool:
    """Whether gradients are on, and this is a plain eager call that will not be repeated.

    No backward pass is running, no hook on saved tensors is set, and no mode or transform is active.
    """
    return (
        _is_grad_enabled()
        and _graph_task_id() == -1
        and saved_tensors_hooks(False) is None
        # As in `_mode_is_eager`, without another call.
        and not _transforms_active()
        and _forward_ad._current_level < 0
        and not _dispatch_modes()
        and _tracing_state() is None
    )


def evaluates() -> bool:
    """Whether the caller has turned gradients off by `torch.no_grad()` or inference mode.

    Gradients are also off inside an `autograd.Function.forward`, as in a reentrant checkpoint or a loss
    computed in chunks, under forward-mode differentiation in `no_grad`, and where `torch.jit.trace` checks
    what it recorded. None of these is an evaluation.
    """
    if torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return True
    differentiates = not _internals._is_fwd_grad_enabled() or _forward_ad._current_level >= 0
    return not differentiates and _tracing_state() is None


def recomputes() -> bool:
    """Whether a backward pass is running: a forward pass within it repeats an earlier one (a checkpoint)."""
    return not torch.compiler.is_compiling() and _internals._current_graph_task_id() != -1


def may_be_recomputed() -> bool:
    """Whether a backward pass may repeat this call: hooks on saved tensors, or a reentrant checkpoint."""
    if torch.compiler.is_compiling():
        return False
    return saved_tensors_hooks(False) is not None or not (torch.is_grad_enabled() or evaluates())


# --- compiling, exporting, transforming ---


def is_exporting() -> bool:
    """Whether `torch.export` is tracing."""
    return _compiler._is_exporting_flag if _HAS_EXPORTING_FLAG else torch.compiler.is_exporting()


# Read the flag itself if it exists: torch 2.8 traces `is_exporting` as True in any compiled graph.
_compiler: Any = torch.compiler
_HAS_EXPORTING_FLAG = hasattr(_compiler, "_is_exporting_flag")


def in_transform() -> bool:
    """Whether a `torch.func` transform is active. Its tensors must not be used after it."""
    return _transforms_active()


def must_forget() -> bool:
    """Whether the tensors of this call must not outlive it: in a `torch.func` transform or `torch.export`."""
    return _transforms_active() or (torch.compiler.is_compiling() and is_exporting())


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a kind of device; False for kinds without autocast, such as "meta"."""
    return device_type in _AUTOCASTING and torch.is_autocast_enabled(device_type)


# --- plain tensors in plain calls ---


def on_the_cpu_and_eager(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether all tensors are plain and on the CPU, and no mode that intercepts calls is active."""
    for tensor in tensors:
        if tensor is not None and not (type(tensor) in PLAIN and tensor.is_cpu):
            return False
    return _mode_is_eager()


def plain_and_eager(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether all tensors are plain and have memory, and no mode that intercepts calls is active."""
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in PLAIN or tensor.is_meta):
            return False
    return _mode_is_eager()


def _mode_is_eager() -> bool:
    return (
        not _transforms_active()
        and _forward_ad._current_level < 0
        and not _dispatch_modes()
        and _tracing_state() is None
    )


def values_can_be_read(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be read without waiting for a device or breaking a trace."""
    return not torch.compiler.is_compiling() and on_the_cpu_and_eager((tensor,))
