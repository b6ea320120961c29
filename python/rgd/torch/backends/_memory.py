"""Memory for the large outputs of the kernels."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Below this size huge pages gain nothing. NumPy uses the same number.
_LARGE = 1 << 22


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous tensor of a shape and dtype, on the device of `like`."""
    return _on_huge_pages(like.new_empty(shape, dtype=dtype))


def empty_like(tensor: Tensor) -> Tensor:
    """An uninitialised tensor of the same shape, strides and dtype."""
    return _on_huge_pages(torch.empty_like(tensor))


def allocator(tensor: Tensor) -> Callable[[Tensor], Tensor]:
    """What makes tensors like this one as `empty_like` does, without a look at their size."""
    large = tensor.numel() * tensor.element_size() >= _LARGE
    return empty_like if large else torch.empty_like


def _on_huge_pages(fresh: Tensor) -> Tensor:
    """The tensor; if it is large, this asks the system for huge pages for it.

    The first write to each page of a new buffer costs a page fault. With huge pages, filling the buffer takes
    half the time. The memory is torch's own, so it can be resized.
    """
    size = fresh.numel() * fresh.element_size()
    if size >= _LARGE and _madvise is not None and fresh.is_cpu:
        skipped = -fresh.data_ptr() % mmap.PAGESIZE
        # This is advice: if the system refuses it, the memory works as before.
        _madvise(fresh.data_ptr() + skipped, size - skipped, mmap.MADV_HUGEPAGE)
    return fresh


def _system_madvise() -> Any:
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


_madvise = _system_madvise()
