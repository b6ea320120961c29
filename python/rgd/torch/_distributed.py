"""Weights of the global batch, when it is spread over the processes of a group.

A pointwise weight depends on its own loss, and needs no one else. Normalised weights and those of a KL ball
depend on every loss of the batch: the losses of all processes are gathered, in the order of their ranks,
every process computes all weights, and keeps its own. Weights are constants to autograd, so nothing is
communicated in the backward pass.

Each process still averages over its own samples, and DistributedDataParallel averages the gradients of the
processes. Where all local batches have the same size, that is the gradient of the global batch; where they
differ, it is the average of local means, as for `nn.CrossEntropyLoss`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor

from rgd.torch import _composite, _ops
from rgd.torch._backend import must_forget
from rgd.torch._group import gather
from rgd.torch._record import Record
from rgd.torch._settings import CrossEntropySettings
from rgd.weightings import KL, Weighting

# A compiled graph is left for the collectives, whose sizes are known only when it runs.
_outside_of_graphs = cast("Any", torch.compiler).disable


@_outside_of_graphs
@torch.no_grad()
def sample_weights(
    losses: Tensor, weighting: Weighting, where: Tensor | None, group: Any
) -> tuple[Tensor, str]:
    """The weights of this process's losses within those of all, and the path that computed them.

    Every process of the group has to call this, one without losses too.

    Args:
        losses: This process's, of any shape, and of another number than elsewhere.
        weighting: Turns losses into weights.
        where: Which losses take part; None for all.
        group: The process group.

    Returns:
        Weights of the losses' shape, without grad; they average to one over all processes' losses.

    Raises:
        ValueError: If the group cannot communicate from the losses' device.
    """
    own = (losses if where is None else losses[where]).detach().flatten()
    gathered, first = gather(own, group)
    weights, path = _ops.sample_weights(gathered, weighting)
    weights = weights[first : first + own.numel()]
    if where is None:
        return weights.view(losses.shape), path
    spread = weights.new_zeros(losses.shape)
    spread[where] = weights
    return spread, path


def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, settings: CrossEntropySettings, group: Any
) -> tuple[Tensor, Record | None]:
    """`_ops.cross_entropy` with the weights of the global batch: first all losses, then their weights."""
    plain = dataclasses.replace(settings, weighting=KL(scale=0.0), reduction="none")
    losses, _ = _ops.cross_entropy(logits, target, weight, plain)
    counted = None if target.is_floating_point() else target != settings.ignore_index
    units, taking_part = losses.detach(), counted
    if settings.per == "sample" and losses.dim() > 1:
        units, taking_part = _composite.sample_means(losses, counted)
    weights, path = sample_weights(units, settings.weighting, taking_part, group)
    weights = weights.to(losses.dtype)
    objective, denominator = _composite.reduce(losses, weights, counted, target, weight, settings)
    if must_forget():
        return objective, None
    indices = None if counted is None else target
    record = Record(losses.detach(), weights, denominator, indices, settings.ignore_index, path=path)
    return objective, record
