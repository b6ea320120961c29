"""Launches of the programs on torch's tensors: strides, and the rows and classes of a program."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from rgd.torch._problem import Problem
from rgd.torch.backends.triton import _kernels

_module = cast("Any", _kernels)
INTERPRETED = type(_module.cross_entropy_rows).__name__ == "InterpretedFunction"
"""Whether Triton's interpreter runs the programs, on the CPU."""
ONCE_CLASSES, ONCE_SOFT_CLASSES = 16384, 8192
"""Rows of at most this many classes are kept in registers and read once; fewer if all classes have mass."""
_BLOCK, _TILE = 4096, 2048
# If neighbours in memory are rows, a program takes many rows and few classes.
_ALONG_ROWS, _BLOCK_ALONG_ROWS = 64, 16
_ELEMENTS_A_THREAD, _THREADS_A_WARP, _MOST_WARPS = 16, 32, 32


class Tile(NamedTuple):
    """The part of the logits that a program computes at a time.

    Attributes:
        rows: How many rows, a power of two.
        block: How many classes, a power of two.
        once: Whether a block holds all classes.
        warps: How many warps of 32 threads.
    """

    rows: int
    block: int
    once: bool
    warps: int


def tile_of(classes: int, along_rows: bool = False, soft: bool = False) -> Tile:
    """The tile for rows of logits.

    Args:
        classes: How many classes.
        along_rows: Whether neighbours in memory are rows, as in images, and not classes.
        soft: Whether all classes have mass, which needs more registers.
    """
    needed = 1 << max(0, classes - 1).bit_length()
    once = needed <= (_ALONG_ROWS if along_rows else ONCE_SOFT_CLASSES if soft else ONCE_CLASSES)
    block = needed if once else _BLOCK_ALONG_ROWS if along_rows else _BLOCK
    rows = max(1, _TILE // block)
    warps = rows * block // (_ELEMENTS_A_THREAD * _THREADS_A_WARP)
    return Tile(rows, block, once, min(_MOST_WARPS, max(4, warps)))


class Rows(NamedTuple):
    """A tensor of logits, probabilities or their gradient, as rows of classes.

    Attributes:
        outer: The stride between runs of rows.
        inner: The stride within a run.
        classes: The stride between classes.
    """

    outer: int
    inner: int
    classes: int


class Shape(NamedTuple):
    """The number of rows, of classes, and of rows in a run."""

    rows: int
    classes: int
    inner: int


def shape_of(logits: Tensor) -> Shape:
    """The rows of logits of shape (C,), (N, C) or (N, C, d1, ..., dk)."""
    if logits.dim() == 1:
        return Shape(1, logits.shape[0], 1)
    inner = 1
    for size in logits.shape[2:]:
        inner *= size
    return Shape(logits.shape[0] * inner, logits.shape[1], inner)


def as_runs(tensor: Tensor) -> Tensor:
    """A tensor (C,), (N, C) or (N, C, d1, ..., dk) as (N, C, D): a view, if its strides allow one."""
    if tensor.dim() == 1:
        return tensor.view(1, -1, 1)
    return tensor.unsqueeze(2) if tensor.dim() == 2 else tensor.flatten(2)


def rows_of(runs: Tensor) -> Rows:
    """The strides of a tensor (N, C, D)."""
    outer, classes, inner = runs.stride()
    return Rows(outer, inner, classes)


class Passed(NamedTuple):
    """The results of one pass over the logits: vectors of one number a row in float32, without grad.

    Attributes:
        losses: The losses.
        logsumexp: The logsumexp of the adjusted logits, or None.
        sums: The sums of each row that `run_factors` reads, in the first 3 rows; or None.
        weights: The weights, or None.
        values: The term of each row in the sum of the objective, or None.
        extras: The entropies of the rows, their logsumexps, and 1 or 0 for whether they put the class of the
            target first, (3, rows), in the order of `rgd._extras.EXTRAS`; or None.
    """

    losses: Tensor
    logsumexp: Tensor | None = None
    sums: Tensor | None = None
    weights: Tensor | None = None
    values: Tensor | None = None
    extras: Tensor | None = None


def run_losses(problem: Problem, *, losses: Tensor | None = None, logsumexp: Tensor | None = None) -> Passed:
    """The losses of rows and their sums, by one read of the logits, into given or new vectors.

    If the problem wants further results, they are in the same memory, behind the sums.
    """
    call = _Call(problem)
    losses = call.vector() if losses is None else losses
    if logsumexp is None and problem.options.z_loss:
        logsumexp = call.vector()
    both = call.vector(6 if problem.returns else 3)
    found = Passed(losses, logsumexp, both[:3], extras=both[3:] if problem.returns else None)
    call.run_rows("none", found)
    return found._replace(sums=both)


def run_weighted(
    problem: Problem,
    kernel: tuple[str, Tensor],
    gradient: Tensor | None,
    *,
    measure: Tensor | None = None,
    divisor: Tensor | None = None,
    given: Passed | None = None,
) -> Passed:
    """Losses and pointwise weights of rows, and the gradient of the objective, by one pass.

    Args:
        problem: Logits and target.
        kernel: The name of the weighting's kernel, and its numbers, float64 on the device of the logits.
        gradient: Filled; the logits themselves, another tensor of their shape, or None.
        measure: One number a row, contiguous, float32, the factor of its part of the objective; None
            for ones.
        divisor: The divisor of the gradient, one number; None for 1.
        given: Vectors to fill, or None.
    """
    call = _Call(problem)
    if given is None:
        vector = call.vector
        logsumexp = vector() if problem.options.z_loss else None
        extras = vector(3) if problem.returns else None
        given = Passed(vector(), logsumexp, None, vector(), vector(), extras)
    kind, numbers = kernel
    call.run_rows(kind, given, gradient, measure=measure, divisor=divisor, numbers=numbers)
    return given


def run_factors(
    problem: Problem,
    gradient: Tensor,
    factors: Tensor,
    z_factors: Tensor | None,
    sums: Tensor | None = None,
) -> None:
    """Fill the gradient of `sum_i factors_i l_i + z_factors_i Z_i^2`; factors are contiguous, float32.

    With the `sums` of the rows, each logit is read once.
    """
    call = _Call(problem)
    if sums is None:
        call.run_rows("given", None, gradient, factors=factors, z_factors=z_factors)
    else:
        call.run_blocks(gradient, sums, factors, z_factors)


def scale(gradient: Tensor, above: Tensor) -> None:
    """Multiply a gradient in place by one number, or by one a row. If a number is 1, no memory is moved.

    The device decides this, so nothing waits for it.
    """
    shape, runs = shape_of(gradient), as_runs(gradient)
    if not shape.rows * shape.classes:
        return
    strides = rows_of(runs)
    tile = _block_tile(shape, strides)
    above = above.detach().reshape(-1).contiguous()
    _launch(
        _module.scale_blocks, _grid_of_blocks(shape, tile), gradient, tile.warps,
        runs, above, *shape, *strides, int(above.numel() > 1 or shape.rows == 1),
        ALIGN=_alignment(shape, strides), ROWS=tile.rows, BLOCK=tile.block,
    )  # fmt: skip
    _write_back(runs, gradient)


class _Call:
    """One launch: the arguments that all programs of the cross-entropy have."""

    def __init__(self, problem: Problem) -> None:
        logits = problem.logits.detach()
        self.logits = logits.resolve_neg() if logits.is_neg() else logits
        self.runs, self.shape = as_runs(self.logits), shape_of(self.logits)
        self.strides, self.problem = rows_of(self.runs), problem
        self.labels = problem.has_labels()
        target = problem.target.detach()
        if self.labels:
            self.target, self.target_strides = target.reshape(-1).contiguous(), Rows(0, 0, 0)
        else:
            self.target = as_runs(target.resolve_neg() if target.is_neg() else target)
            self.target_strides = rows_of(self.target)
        self.class_weight, self.adjustment = (
            None if one is None else one.detach().to(torch.float32).contiguous()
            for one in (problem.class_weight, problem.adjustment)
        )
        smoothing = problem.options.label_smoothing
        self.keep, self.share = 1.0 - smoothing, smoothing / max(1, self.shape.classes)
        self.soft = smoothing > 0 or not self.labels

    def vector(self, rows: int | None = None) -> Tensor:
        """A vector of one uninitialised number a row, or `rows` such vectors."""
        shape = (self.shape.rows,) if rows is None else (rows, self.shape.rows)
        return self.logits.new_empty(shape, dtype=torch.float32)

    def run_rows(
        self, kind: str, found: Passed | None, gradient: Tensor | None = None, *,
        measure: Tensor | None = None, divisor: Tensor | None = None, numbers: Tensor | None = None,
        factors: Tensor | None = None, z_factors: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Start `cross_entropy_rows`."""
        if not self.shape.rows:
            return
        losses, logsumexp, sums, weights, values, extras = (None,) * 6 if found is None else found
        runs, strides = self._gradient(gradient)
        tile = tile_of(self.shape.classes, self.strides.classes != 1 and self.shape.inner > 1, self.soft)
        z_loss = self.problem.options.z_loss
        _launch(
            _module.cross_entropy_rows, (_divided(self.shape.rows, tile.rows),), self.logits, tile.warps,
            self.runs, self.target, self.class_weight, self.adjustment, measure, divisor, numbers, factors,
            z_factors, losses, logsumexp, sums, weights, values, extras, runs,
            *self.shape, self.problem.options.ignore_index, self.keep, self.share, z_loss,
            *self.strides, *self.target_strides, *strides,
            KIND=kind, LABELS=self.labels, SOFT=self.soft, Z_LOSS=z_loss > 0, ONCE=tile.once,
            ALIGN=_alignment(self.shape, self.strides, strides), ROWS=tile.rows, BLOCK=tile.block,
        )  # fmt: skip
        _write_back(runs, gradient)

    def run_blocks(self, gradient: Tensor, sums: Tensor, factors: Tensor, z_factors: Tensor | None) -> None:
        """Start `gradient_blocks`."""
        if not self.shape.rows * self.shape.classes:
            return
        runs, strides = self._gradient(gradient)
        tile = _block_tile(self.shape, self.strides)
        _launch(
            _module.gradient_blocks, _grid_of_blocks(self.shape, tile), self.logits, tile.warps,
            self.runs, self.target, self.class_weight, self.adjustment, factors, z_factors, sums, runs,
            *self.shape, self.problem.options.ignore_index, self.keep, self.share,
            *self.strides, *self.target_strides, *strides,
            LABELS=self.labels, SOFT=self.soft, ALIGN=_alignment(self.shape, self.strides, strides),
            ROWS=tile.rows, BLOCK=tile.block,
        )  # fmt: skip
        _write_back(runs, gradient)

    def _gradient(self, gradient: Tensor | None) -> tuple[Tensor | None, Rows]:
        if gradient is None:
            return None, Rows(0, 0, 0)
        if gradient.data_ptr() == self.logits.data_ptr():
            return self.runs, self.strides
        runs = as_runs(gradient)
        return runs, rows_of(runs)


def _block_tile(shape: Shape, strides: Rows) -> Tile:
    """The tile of programs that need no sums over a row."""
    along_rows = strides.classes != 1 and shape.inner > 1
    block = min(_BLOCK_ALONG_ROWS if along_rows else _TILE, tile_of(shape.classes, along_rows).block)
    return Tile(max(1, _TILE // block), block, False, 4)


def _grid_of_blocks(shape: Shape, tile: Tile) -> tuple[int, int]:
    return _divided(shape.rows, tile.rows), _divided(shape.classes, tile.block)


def _alignment(shape: Shape, *strides: Rows) -> int:
    """8 or 4 if it divides the classes and the strides between rows, so that loads may be wide; else 1.

    Triton finds divisibility by 16 by itself.
    """
    numbers = (shape.classes, *(one.outer for one in strides))
    if all(number % 16 == 0 for number in numbers):
        return 1
    return next(align for align in (8, 4, 1) if all(number % align == 0 for number in numbers))


def _divided(number: int, by: int) -> int:
    """The quotient, rounded up."""
    return -(-number // by)


def _write_back(runs: Tensor | None, gradient: Tensor | None) -> None:
    """Copy a gradient back to its tensor, if the strides of that allow no view as runs."""
    if runs is not None and gradient is not None and runs.data_ptr() != gradient.data_ptr():
        gradient.copy_(runs.view(gradient.shape))


def _launch(
    kernel: Any, grid: tuple[int, ...], like: Tensor, warps: int, *arguments: Any, **constants: Any
) -> None:
    """Start a program on the device of a tensor."""
    if INTERPRETED:
        # The interpreter computes in NumPy, which warns of overflows and the like. A device does not.
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kernel[grid](*arguments, **constants)
        return
    # A warp has 64 threads on AMD's GPUs.
    warps = warps if torch.version.hip is None else max(1, warps // 2)
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[grid](*arguments, **constants, num_warps=warps, enable_fp_fusion=True)
