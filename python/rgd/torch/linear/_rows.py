"""A problem of a linear head as rows of hidden states, of which some predict nothing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rgd._chunk_rows import chunk_rows
from rgd.torch._dtypes import accumulator
from rgd.torch._head import LinearHead
from rgd.torch._measure import spread
from rgd.torch._problem import Problem
from rgd.torch.backends._extras import Extras, extras_by, extras_by_formula
from rgd.torch.backends._registry import Backend
from rgd.torch.linear._chunks import ChunkedHead, Wants
from rgd.torch.linear._products import products_of
from rgd.torch.linear._vocabulary import VocabStep


def as_rows(problem: Problem, values: Tensor, fill: float) -> Tensor:
    """A tensor of the losses' shape, perhaps with a class axis, as entries for each row of the input."""
    places, shape = problem.logits.shape[:-1], problem.losses_shape()
    head = cast("LinearHead", problem.head)
    if head.chunking.shift:
        values = F.pad(values, (0, places[1] - shape[1]), value=fill)
    # torch.Size.numel would make the number of rows a constant of a graph.
    return values.reshape(math.prod(places), *values.shape[len(shape) :])


def as_losses(problem: Problem, values: Tensor) -> Tensor:
    """Entries for each row of the input as a tensor of the losses' shape."""
    values = values.view(problem.logits.shape[:-1])
    return values[:, :-1] if cast("LinearHead", problem.head).chunking.shift else values


def measure_of_targets(problem: Problem, dtype: torch.dtype) -> Tensor | None:
    """The base measure, one a target, 0 for one that takes no part; None where all is one."""
    counted, measure = problem.counted(), problem.measure
    if measure is None:
        return None if counted is None else counted.to(dtype)
    measure = measure.to(dtype)
    shape = problem.losses_shape()
    measure = spread(measure, measure.new_empty(shape)).expand(shape)
    # The kernels read the memory as it is, and `expand` alone does not change it.
    return measure.contiguous() if counted is None else measure.masked_fill(~counted, 0)


def _extras_of_chunk(
    of_rows: Callable[[Problem], Extras], problem: Problem, logits: Tensor, target: Tensor
) -> Extras:
    """The extras of a chunk of a problem, of its logits and targets."""
    return of_rows(problem.changed(logits=logits, target=target))


def chunked(problem: Problem, dtype: torch.dtype, backend: Backend) -> ChunkedHead:
    """The head of a problem, detached, made ready for its chunks.

    Args:
        problem: Class weight and adjustment are without grad, contiguous and in the accumulator's dtype.
        dtype: The dtype that the logits are computed in.
        backend: What computes a chunk, where the vocabulary is whole.
    """
    weight, bias, chunking, shard = cast("LinearHead", problem.head)
    measure = measure_of_targets(problem, accumulator(dtype))
    takes_part = None
    if measure is not None or chunking.shift:
        ones = torch.ones(problem.losses_shape(), dtype=torch.bool, device=problem.target.device)
        takes_part = as_rows(problem, ones if measure is None else measure != 0, 0)
    weight = weight.detach().to(dtype)
    products = products_of(weight, None if bias is None else bias.detach().to(dtype).contiguous())
    classes = weight.shape[0] if shard is None else shard.widest
    accumulate = chunking.accumulate_dtype or accumulator(dtype)
    step = backend.step(problem) if shard is None else VocabStep(problem, shard)
    wants = None
    if problem.returns:
        compute = None
        if not getattr(step, "fills_extras", False):
            of_rows = step.extras if isinstance(step, VocabStep) else extras_by(backend)
            settings = problem.changed(measure=None, given_measure=None, segments=None, head=None)
            compute = functools.partial(_extras_of_chunk, of_rows or extras_by_formula, settings)
        wants = Wants(problem.returns, compute, problem.classes())
    return ChunkedHead(
        problem.logits.detach().to(dtype).flatten(0, -2),
        products,
        as_rows(problem, problem.target.detach(), problem.options.ignore_index),
        takes_part,
        chunking.logit_softcap,
        chunk_rows(
            chunking.chunk_bytes,
            row_bytes=classes * products.dtype.itemsize,
            gradient_bytes=classes * weight.shape[1] * accumulate.itemsize,
        ),
        accumulate,
        step,
        problem.options.z_loss,
        wants,
    )
