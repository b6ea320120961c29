"""Turns any array into a NumPy array without its autograd graph, for pictures and lists of samples."""

from __future__ import annotations

import sys
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from rgd._arrays import refuse_masked


def as_floats(name: str, given: Any) -> npt.NDArray[np.float64]:
    """Losses, weights or logits as float64 on the CPU, of their own shape."""
    numbers = as_numpy(given, name)
    kind, dtype = numbers.dtype.kind, str(cast("Any", numbers.dtype))
    # A list of integers is taken as numbers. An array of integers is refused: it may hold labels.
    if kind != "f" and dtype != "bfloat16" and not (isinstance(given, (list, tuple)) and kind in "iu"):
        raise TypeError(f"{name} must hold floating numbers, got {dtype}")
    if numbers.ndim == 0:
        raise ValueError(
            f"{name} is a scalar: it is already reduced to one number. Give one number a sample; for losses, "
            'reduction="none" keeps them'
        )
    return numbers.astype(np.float64)


def as_labels(name: str, given: Any) -> npt.NDArray[Any]:
    """Class indices on the CPU, in the dtype they were given in."""
    labels = as_numpy(given, name)
    if labels.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold class indices, integers, got {labels.dtype}")
    return labels


def as_numpy(given: Any, name: str) -> npt.NDArray[Any]:
    """Any array as a NumPy array: detached from its graph and copied to the CPU."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(given, torch.Tensor):
        tensor: Any = given.detach().cpu().resolve_neg()
        # NumPy has no bfloat16.
        return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
    if isinstance(given, (list, tuple)):
        entries = cast("list[Any]", given)
        return np.stack([as_numpy(entry, name) for entry in entries]) if entries else np.empty(0)
    refuse_masked(name, given, "leave out what is masked")
    return np.asarray(given)
