"""Marks losses that are weighted already, so that weighting them again is an error.

The mark is on the node of autograd's graph that made the losses. It is found there after a reshape, a
selection or a change of dtype too. Losses without a graph are recognised by their identity. Results of other
operations on weighted losses, such as the mean of each sequence, are not marked, since weighting these may be
intended. Compiled graphs neither mark losses nor check for marks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from rgd.weightings import Weighting

_MARK = "rgd: weighted"
_without_graph: Any = WeakIdKeyDictionary()
# Operations that only copy or select numbers of their inputs: the names of their nodes, without the ending.
_KEEPING = frozenset((
    "Alias", "AsStrided", "Cat", "Clone", "Expand", "Flip", "Gather", "Index", "IndexSelect", "MaskedSelect",
    "Permute", "Repeat", "ReshapeAlias", "Select", "Slice", "Split", "SplitWithSizes", "Squeeze", "Stack",
    "T", "ToCopy", "Transpose", "Unbind", "UnsafeView", "Unsqueeze", "View",
))  # fmt: skip
# The search visits at most this many nodes, enough for a concatenation of some micro-batches.
_MOST_NODES = 256


def mark_weighted(losses: Tensor, weighting: Weighting) -> None:
    """Mark the losses of a call with `reduction="none"`, unless the weights are those of plain training.

    Args:
        losses: The result of the call.
        weighting: The weighting of the call.
    """
    if torch.compiler.is_compiling() or weighting.is_plain:
        return
    node: Any = losses.grad_fn
    if node is None:
        _without_graph[losses] = True
    else:
        node.metadata[_MARK] = True


def refuse_weighted(losses: Tensor, weighting: Weighting, name: str = "losses") -> None:
    """Refuse losses that are weighted already, unless the weighting of the call is plain.

    Args:
        losses: The losses of a call.
        weighting: The weighting of the call.
        name: The name of the losses in the message.

    Raises:
        ValueError: If they are weighted already.
    """
    if torch.compiler.is_compiling() or weighting.is_plain or not _is_marked(losses):
        return
    raise ValueError(
        f'{name} are weighted already, by an rgd loss with reduction="none", and would be weighted twice: '
        'give the plain loss of each sample, as F.cross_entropy(..., reduction="none") computes it, or use '
        "the weighted ones as they are, losses.mean()"
    )


def _is_marked(losses: Tensor) -> bool:
    node: Any = losses.grad_fn
    if node is None:
        return bool(_without_graph) and losses in _without_graph
    nodes = [node]
    for node in nodes:
        if _MARK in node.metadata:
            return True
        if node.name().rstrip("0123456789").removesuffix("Backward") in _KEEPING and len(nodes) < _MOST_NODES:
            nodes += [inner for inner, _ in node.next_functions if inner is not None]
    return False
