"""Re-weighted cross-entropy of a linear head in chunks of its input, so that all logits never exist at once.

A chunk is some rows of the input. Its logits take one buffer, which the next chunk uses again: the head's
product fills it, losses and weights are read from it, the gradient with respect to the logits overwrites it,
and two more products carry that on to the gradients of input and head.

A pointwise weight is known inside the chunk, so `in_one_pass` needs these three products and no more. Weights
that depend on the batch are known after `losses_in_chunks`; then `gradients_in_chunks` makes the logits once
more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rgd.torch._dtypes import accumulator, extra_dtype
from rgd.torch._plan import OfLogits, Weigher
from rgd.torch.backends._extras import Extras
from rgd.torch.backends._memory import empty
from rgd.torch.backends._steps import Rows, Step
from rgd.torch.linear._products import Products


class Wanted(NamedTuple):
    """The gradients that are wanted."""

    input: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """The gradients of an objective; None for one that is not wanted."""

    input: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class OnePass(NamedTuple):
    """What one pass over the chunks gives; vectors are (N,), 0 for rows that take no part.

    Attributes:
        losses: The loss of each row.
        weights: Its pointwise weight.
        logsumexp: With a z-loss, that of its logits; else None.
        gradients: The gradients of the objective.
        extras: What else was wanted of the logits.
    """

    losses: Tensor
    weights: Tensor
    logsumexp: Tensor | None
    gradients: Gradients
    extras: Extras


class Wants(NamedTuple):
    """What a call wants of its logits beside losses and gradients.

    Attributes:
        names: Of the extras.
        compute: The extras of the logits of a chunk and its target; None if the step fills them.
        classes: How many classes there are, of all slices of the vocabulary.
    """

    names: tuple[str, ...]
    compute: Callable[[Tensor, Tensor], Extras] | None
    classes: int


class ChunkedHead(NamedTuple):
    """A linear head and how its chunks are computed; tensors are detached and of one dtype.

    Attributes:
        input: (N, D).
        products: The matrix products with its weight, (C, D), and bias.
        target: Class indices, int64 or int32, (N,), or probabilities, (N, C).
        takes_part: Which rows take part, (N,), bool; None for all of them.
        softcap: Logits are `softcap * tanh(z / softcap)`; None for `z` itself.
        rows: How many rows a chunk has at most.
        dtype: The dtype that the gradients of weight and bias are summed in.
        step: What computes a chunk.
        z_loss: What multiplies the squared logsumexp of each row.
        wants: What else is wanted of the logits; None for nothing.
    """

    input: Tensor
    products: Products
    target: Tensor
    takes_part: Tensor | None
    softcap: float | None
    rows: int
    dtype: torch.dtype
    step: Step
    z_loss: float = 0.0
    wants: Wants | None = None


class _Chunk(NamedTuple):
    """Some rows.

    Attributes:
        own: Their place among the rows that take part.
        rows: Their input, (n, D).
        target: Their target.
        at: Their indices among all rows; None where no row is left out.
    """

    own: slice
    rows: Tensor
    target: Tensor
    at: Tensor | None

    def of(self, values: Tensor) -> Tensor:
        """The entries of a vector over all rows that belong to the chunk."""
        return values[self.own] if self.at is None else values.index_select(0, self.at)


class _Extras:
    """The extras of a pass, filled chunk by chunk."""

    def __init__(self, run: _Run, wants: Wants) -> None:
        self._run, self._wants, head = run, wants, run.head
        dtype = accumulator(head.input.dtype)
        self._found: Extras = {
            name: head.input.new_empty(run.count, dtype=extra_dtype(name, dtype)) for name in wants.names
        }

    def take(self, chunk: _Chunk, logits: Tensor) -> OfLogits:
        """Those of a chunk, of its logits before the gradient overwrites them; or for the step to fill."""
        own = {name: one[chunk.own] for name, one in self._found.items()}
        if self._wants.compute is not None:
            for name, one in self._wants.compute(logits, chunk.target).items():
                own[name].copy_(one)
        return OfLogits(own, own.get("entropy"), self._wants.classes)

    def for_step(self, chunk: _Chunk, logits: Tensor) -> dict[str, Extras]:
        """As `take`, for the argument of a step's `losses`, which it fills."""
        found = self.take(chunk, logits).found
        return {} if self._wants.compute is not None else {"extras": found}

    def whole(self) -> Extras:
        """Those of all rows, (N,), 0 where one takes no part."""
        mask = self._run.mask
        found = {name: self._run.spread(one) for name, one in self._found.items()}
        return found if mask is None else {name: one.masked_fill(~mask, 0) for name, one in found.items()}


class _Run:
    """One pass over the chunks: the buffers, and the gradients as they are summed."""

    def __init__(self, head: ChunkedHead, wanted: Wanted) -> None:
        self.head, takes_part = head, head.takes_part
        # Rows that take no part are left out on the CPU. Elsewhere, to find them would wait for the device.
        # They are set to 0 there, since 0 times NaN is NaN.
        self._kept = self.mask = None
        if takes_part is not None and not takes_part.is_cpu:
            self.mask = takes_part
        elif takes_part is not None and not bool(takes_part.all()):
            self._kept = takes_part.nonzero().view(-1)
        self.count = head.input.shape[0] if self._kept is None else self._kept.numel()
        weight, dtype = head.products.weight, head.products.dtype
        classes = weight.shape[0]
        self._size = max(1, min(head.rows, self.count))
        self._buffer = empty((self._size, classes), weight, dtype)
        self._tanh = None if head.softcap is None else empty((self._size, classes), weight, dtype)
        make = torch.empty_like if self._kept is None else torch.zeros_like
        self._input = make(head.input) if wanted.input else None
        self._weight = weight.new_zeros(weight.shape, dtype=head.dtype) if wanted.weight else None
        self._bias = weight.new_zeros((classes,), dtype=head.dtype) if wanted.bias else None

    def __iter__(self) -> Iterator[tuple[_Chunk, Tensor]]:
        """The chunks, each with its logits."""
        head = self.head
        for start in range(0, self.count, self._size):
            own = slice(start, min(start + self._size, self.count))
            if self._kept is None:
                rows = head.input[own]
                if self.mask is not None:
                    rows = rows.masked_fill(~self.mask[own].unsqueeze(1), 0)
                chunk = _Chunk(own, rows, self._target(head.target[own]), None)
            else:
                at = self._kept[own]
                target = self._target(head.target.index_select(0, at))
                chunk = _Chunk(own, head.input.index_select(0, at), target, at)
            yield chunk, self._logits(chunk)

    def _target(self, target: Tensor) -> Tensor:
        """Class probabilities in the dtype of the logits."""
        return target.to(self._buffer.dtype) if target.is_floating_point() else target

    def _logits(self, chunk: _Chunk) -> Tensor:
        head = self.head
        logits = self._buffer[: chunk.rows.shape[0]]
        head.products.write_logits(chunk.rows, logits)
        if head.softcap is not None and self._tanh is not None:
            tanh = self._tanh[: logits.shape[0]]
            torch.tanh(logits.div_(head.softcap), out=tanh)
            torch.mul(tanh, head.softcap, out=logits)
        return logits

    def collect(self, chunk: _Chunk, gradient: Tensor) -> None:
        """Add a chunk's part, from the gradient of its logits, to the gradients that are wanted."""
        head = self.head
        if self._tanh is not None:
            gradient.mul_(self._tanh[: gradient.shape[0]].square_().neg_().add_(1))
        if self._input is not None:
            if chunk.at is None:
                head.products.write_input_gradient(gradient, self._input[chunk.own])
            else:
                own = torch.empty_like(chunk.rows)
                head.products.write_input_gradient(gradient, own)
                self._input.index_copy_(0, chunk.at, own)
        if self._bias is not None:
            self._bias += gradient.sum(0, dtype=head.dtype)
        if self._weight is not None:
            head.products.add_weight_gradient(self._weight, gradient, chunk.rows)

    def spread(self, values: Tensor) -> Tensor:
        """A vector over the rows that take part as one over all rows, 0 elsewhere."""
        if self._kept is None:
            return values
        return values.new_zeros(self.head.input.shape[0]).index_copy_(0, self._kept, values)

    def gradients(self) -> Gradients:
        """The sums, that of the input in its dtype, the others in the head's `dtype`."""
        return Gradients(self._input, self._weight, self._bias)


def losses_in_chunks(head: ChunkedHead) -> tuple[Tensor, Tensor | None, Extras]:
    """The loss of each row, with a z-loss the logsumexp of its logits, and the extras that are wanted.

    Each is (N,), 0 for a row that is left out.
    """
    run = _Run(head, Wanted(False, False, False))
    losses = head.input.new_empty(run.count, dtype=accumulator(head.input.dtype))
    logsumexp = torch.empty_like(losses) if head.z_loss else None
    extras = None if head.wants is None else _Extras(run, head.wants)
    for chunk, logits in run:
        beside: Any = {} if extras is None else extras.for_step(chunk, logits)
        own = None if logsumexp is None else logsumexp[chunk.own]
        losses[chunk.own] = head.step.losses(logits, chunk.target, own, **beside)
    return (
        run.spread(losses),
        None if logsumexp is None else run.spread(logsumexp),
        {} if extras is None else extras.whole(),
    )


def in_one_pass(
    head: ChunkedHead, measure: Tensor | None, norm: Tensor, weigher: Weigher, wanted: Wanted
) -> OnePass:
    """Losses and pointwise weights, and the gradients of `sum_i norm_i (w_i l_i + z_loss Z_i^2)`.

    Args:
        head: The head.
        measure: The base measure of the rows, (N,), 0 for one that takes no part; None for ones.
        norm: (N,), 0 for rows that take no part.
        weigher: A pointwise weighting, with the group and the reference loss of each row, if it needs them.
        wanted: Which gradients are asked for.
    """
    run = _Run(head, wanted)
    losses = head.input.new_empty(run.count, dtype=accumulator(head.input.dtype))
    weights = torch.empty_like(losses)
    logsumexp = torch.empty_like(losses) if head.z_loss else None
    extras = None if head.wants is None else _Extras(run, head.wants)
    for chunk, logits in run:
        p, groups, reference = (
            None if one is None else chunk.of(one) for one in (measure, weigher.groups, weigher.reference)
        )
        rows = Rows(logits, chunk.target, p, chunk.of(norm))
        alone = Weigher(weigher.plan, groups, reference=reference)
        if extras is not None:
            alone.extras = extras.take(chunk, logits)
        own = losses[chunk.own], weights[chunk.own]
        of_z = None if logsumexp is None else logsumexp[chunk.own]
        head.step.weigh_and_write_gradient(rows, alone, *own, of_z)
        run.collect(chunk, logits)
    of_z = None if logsumexp is None else run.spread(logsumexp)
    return OnePass(
        run.spread(losses),
        run.spread(weights),
        of_z,
        run.gradients(),
        {} if extras is None else extras.whole(),
    )


def gradients_in_chunks(
    head: ChunkedHead, factors: Tensor, z_factors: Tensor | None, wanted: Wanted
) -> Gradients:
    """The gradients of `sum_i factors_i l_i + z_factors_i Z_i^2`, with numbers for each row, (N,)."""
    run = _Run(head, wanted)
    for chunk, logits in run:
        of_z = None if z_factors is None else chunk.of(z_factors)
        head.step.write_gradient(logits, chunk.target, chunk.of(factors), of_z)
        run.collect(chunk, logits)
    return run.gradients()
