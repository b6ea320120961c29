"""The mark of losses that are weighted already, so that to weight them again is an error.

The mark lies on the node that made them in the graph of autograd. There it is found behind a reshape, a
selection or a change of dtype too; a result without a graph is known by its identity. What is computed
otherwise from weighted losses, as the mean of each sequence, is no longer marked: to weight that may be
meant. Compiled graphs mark nothing and ask for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from rgd.weightings import Weighting

_MARK = "rgd: weighted"
_without_graph: Any = WeakIdKeyDictionary()
# Operations whose results are numbers of their inputs: the names of their nodes, without the ending.
_KEEPING = frozenset((
    "Alias", "AsStrided", "Cat", "Clone", "Expand", "Flip", "Gather", "Index", "IndexSelect", "MaskedSelect",
    "Permute", "Repeat", "ReshapeAlias", "Select", "Slice", "Split", "SplitWithSizes", "Squeeze", "Stack",
    "T", "ToCopy", "Transpose", "Unbind", "UnsafeView", "Unsqueeze", "View",
))  # fmt: skip
# More nodes than a concatenation of some micro-batches has are not looked at.
_MOST_NODES = 256


def mark_weighted(losses: Tensor, weighting: Weighting) -> None:
    """Mark the losses of a call with `reduction="none"`, unless the weights are those of plain training.

    Args:
        losses: What the call is about to return.
        weighting: What weighted them.
    """
    if torch.compiler.is_compiling() or weighting.is_plain:
        return
    node: Any = losses.grad_fn
    if node is None:
        _without_graph[losses] = True
    else:
        node.metadata[_MARK] = True


def refuse_weighted(losses: Tensor, weighting: Weighting, name: str = "losses") -> None:
    """Refuse losses that are weighted already where another weighting would weight them again.

    Args:
        losses: The losses of a call.
        weighting: The weighting of the call.
        name: What the message calls them.

    Raises:
        ValueError: If they are.
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
