"""A call of a loss like its last one: what was accepted then is not checked, looked up or made again.

The whole way of a call costs more than the kernels where the logits are small, and a training loop makes the
same call at every step. So a call that went the whole way leaves an `Accepted` behind, and the next one goes
the short way if everything is as it was. `again` names every condition, and decides nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import string_at
from operator import attrgetter, is_
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rgd import _rgd
from rgd.torch._distributed import Sync
from rgd.torch._dtypes import accumulator
from rgd.torch._modes import PLAIN, on_the_cpu_and_eager, trains_plainly
from rgd.torch._plan import Plan
from rgd.torch._problem import Given, Options, Problem
from rgd.torch._state import WeightingState
from rgd.torch._weighted import mark_weighted
from rgd.torch.backends._memory import allocator
from rgd.torch.backends._objective import Objective, OfLosses
from rgd.torch.backends._registry import leads
from rgd.torch.backends.rust._kernels import fill_plain_weights, repeated_weights
from rgd.torch.stats import Record
from rgd.weightings._base import Kernel

_strided, _bfloat16, _bool, _int64 = torch.strided, torch.bfloat16, torch.bool, torch.int64
_empty_like, _get_num_threads = torch.empty_like, torch.get_num_threads
_OF_LOSSES = frozenset((torch.float32, torch.float64))
# Without the question for torch.func transforms, under which no call goes the short way.
_apply: Any = cast("Any", super(torch.autograd.Function, Objective)).apply
_apply_of_losses: Any = cast("Any", super(torch.autograd.Function, OfLosses)).apply
# Where there are more, the whole way costs next to nothing, and what is left behind would take memory.
_MOST_TARGETS = 2**16


class Accepted(NamedTuple):
    """What a call must look like to go the short way, and what the kernels then get. Nothing in it changes.

    Attributes:
        dtype: Of the logits.
        shape: Of the logits.
        target_dtype: Of the class indices.
        target_shape: Of the class indices.
        units_shape: Of the weights.
        options: The settings of the loss.
        plan: Its weighting.
        class_weight: Its class weights, as the kernels read them, or None.
        adjustment: Its adjustment of the logits, likewise.
        versions: How often these two had been changed in place.
        compute: The kernels for such a call.
        losses: A tensor like its losses; with one weight a target, like its losses and its weights, (2, ...).
        to_weights: From the address of its losses to that of its weights; 0 where they lie apart.
        objective: A tensor like its objective.
        allocate: What makes its gradient, given the logits.
    """

    dtype: torch.dtype
    shape: torch.Size
    target_dtype: torch.dtype
    target_shape: torch.Size
    units_shape: torch.Size
    options: Options
    plan: Plan
    class_weight: Tensor | None
    adjustment: Tensor | None
    versions: tuple[int, int]
    compute: Callable[..., Any]
    losses: Tensor
    to_weights: int
    objective: Tensor
    allocate: Callable[[Tensor], Tensor]


def accepted(given: Given, problem: Problem, plan: Plan, record: Record | None) -> Accepted | None:
    """What a call leaves behind that went the whole way; None where the next one must go it too."""
    logits, target, options = problem.logits, given.target, problem.options
    kernel = plan.step_kernel if plan.stateful else plan.kernel
    served = record is not None and record.backend == "rust" and kernel is not None
    plain = problem.has_labels() and problem.normalizer is None
    as_given = (
        logits is given.input and problem.target.dtype is target.dtype and logits.dtype != torch.float16
    )
    ordinary = problem.wants_gradient() and not options.inplace
    dense = logits.is_contiguous() and target.is_contiguous() and logits.dim() > 1 and logits.numel() > 0
    small = target.numel() <= _MOST_TARGETS
    if not (served and plain and as_given and ordinary and dense and small):
        return None
    dtype = accumulator(logits.dtype)
    by_class = given.class_weight, given.adjustment
    if not all(numbers is None or _readable(numbers, dtype) for numbers in by_class):
        return None
    versions = _version(by_class[0]), _version(by_class[1])
    kind, numbers = cast("Kernel", kernel)
    compute = _rgd.RepeatedCrossEntropy(
        str(logits.dtype).removeprefix("torch."), logits.shape, target.dtype is torch.int32, kind, numbers,
        options.ignore_index, options.label_smoothing, options.per == "sample", options.reduction,
        options.z_loss,
    )  # fmt: skip
    losses = torch.empty_like(target, dtype=dtype)
    objective = losses if options.reduction == "none" else logits.new_empty(())
    units_shape, to_weights = target.shape[:1], 0
    if options.per != "sample":
        # One piece of memory takes less time than two.
        units_shape, to_weights = target.shape, losses.numel() * losses.element_size()
        losses = losses.new_empty((2, *target.shape))
    return Accepted(
        logits.dtype, logits.shape, target.dtype, target.shape, units_shape, options, plan, *by_class,
        versions, compute, losses, to_weights, objective, allocator(logits),
    )  # fmt: skip


def again(
    known: Accepted,
    logits: Any,
    target: Any,
    beside: tuple[Any, Any, Any] | None,
    *,
    options: tuple[Any, ...],
    plan: Plan,
    by_class: tuple[Any, Any],
    sharing: Sync,
    state: WeightingState | None = None,
) -> tuple[Tensor, Left] | None:
    """The objective of a call like the accepted one, and what it leaves; None if it must go the whole way.

    Args:
        known: What an earlier call has left behind.
        logits: What this call was given.
        target: Likewise.
        beside: The mask, sample weights and groups of this call, each None if it has none; or None.
        options: The settings of this call, in the order of `Options`.
        plan: Its weighting.
        by_class: Its class weights and its adjustment of the logits.
        sharing: With whom its batch is shared.
        state: What a weighting that remembers has seen. It is moved.
    """
    (
        dtype, shape, target_dtype, target_shape, units_shape, settings, weighting,
        class_weight, adjustment, versions, compute, like_losses, to_weights, like_objective, allocate,
    ) = known  # fmt: skip
    if not (
        # Nobody else asks for a part of the call. (While `torch.jit.trace` records, even shapes are tensors.)
        trains_plainly()
        and leads("rust")
        # Tensors as they were; of a type, a device and a layout that have no behaviour of their own.
        and type(logits) in PLAIN
        and type(target) in PLAIN
        and logits.dtype is dtype
        and target.dtype is target_dtype
        and logits.layout is _strided
        and target.layout is _strided
        and not logits.is_nested
        and not target.is_nested
        and logits.shape == shape
        and target.shape == target_shape
        and logits.is_cpu
        and target.is_cpu
        and logits.is_contiguous()
        and target.is_contiguous()
        and logits.requires_grad
        and not logits.is_neg()
        and not target.is_neg()
        # The settings as they were.
        and plan is weighting
        and all(map(is_, options, settings))
        and by_class[0] is class_weight
        and by_class[1] is adjustment
        and (
            class_weight is None or (class_weight._version == versions[0] and not class_weight.requires_grad)
        )
        and (adjustment is None or adjustment._version == versions[1])
        and (beside is None or _fit(beside, like_losses.dtype, units_shape))
        # Options that depend on what is around the call.
        and (plan.pointwise or sharing.group() is None)
        and not (dtype is _bfloat16 and torch.is_autocast_enabled("cpu"))
    ):
        return None
    ignore_index, _, reduction, _, _, _ = settings
    losses, objective = _empty_like(like_losses), _empty_like(like_objective)
    to_losses = losses.data_ptr()
    if to_weights:
        weights, at_weights = losses, to_losses + to_weights
    else:
        weights = losses.new_empty(units_shape)
        at_weights = weights.data_ptr()
    grad = allocate(logits)
    given = (
        logits.data_ptr(), target.data_ptr(), to_losses, at_weights, objective.data_ptr(), grad.data_ptr(),
        _get_num_threads(), class_weight, adjustment,
    )  # fmt: skip
    if beside is None and state is None:
        divisor, count, offered = compute(*given)
        measure = groups = None
    else:
        found = _compute_beside(known, given, beside, state)
        if found is None:
            return None
        (divisor, count, offered), measure, groups = found
    counted = None if count == offered else target != ignore_index
    left = losses, weights, divisor, measure, counted, groups
    read = (weights, logits, target, class_weight, adjustment, measure)
    if reduction != "none":
        return _apply(logits, (objective, grad), read, settings), left
    # The kernels write products in the losses' dtype.
    objective = _apply(logits, (objective.to(dtype), grad), read, settings)
    mark_weighted(objective, plan.weighting)
    return objective, left


Left = tuple[Tensor, Tensor, float, Tensor | None, Tensor | None, bytes | None]
"""What a call leaves behind: losses, weights, divisor, measure, what counts, the numbers of the groups.

Losses and weights may be the same tensor, of shape (2, ...)."""


def record_of(left: Left) -> Record:
    """The record of a call, made only where somebody asks for it."""
    losses, weights, divisor, measure, counted, numbers = left
    if losses is weights:
        losses, weights = losses.unbind()
    groups = None
    if numbers is not None:
        groups = torch.frombuffer(bytearray(numbers), dtype=torch.int64).reshape(weights.shape)
    return Record(losses, weights, divisor, measure, counted, groups, "rust")


def _compute_beside(
    known: Accepted,
    given: tuple[Any, ...],
    beside: tuple[Any, Any, Any] | None,
    state: WeightingState | None,
) -> tuple[tuple[float, int, int], Tensor | None, bytes | None] | None:
    """Calls the kernels with a measure, groups and a state.

    Returns:
        What the kernels return, and copies of measure and groups, since the caller may change its own before
        the record is read; None where only the whole way can take or refuse the measure.
    """
    measure = numbers = at_measure = at_groups = None
    if beside is not None:
        where, sample_weight, groups = beside
        if sample_weight is not None:
            measure = sample_weight.detach().clone()
        elif where is not None:
            measure = where.to(known.losses.dtype)
        if measure is not None:
            at_measure = measure.data_ptr()
        if groups is not None:
            at_groups = groups.data_ptr()
            numbers = string_at(at_groups, groups.nbytes)  # in less time than a tensor
    given = (*given, at_measure, at_groups)
    found: Any = known.compute(*given) if state is None else state.moved_by(known.compute, given)
    return None if found is None else (found, measure, numbers)


def plain_weights(losses: Tensor, plan: Plan, sharing: Sync) -> Tensor | None:
    """The weights of losses without measure, groups and state, at once; None where more must be asked.

    Args:
        losses: Losses, checked.
        plan: The weighting.
        sharing: With whom the batch is shared.
    """
    if (
        plan.kernel is not None
        and on_the_cpu_and_eager((losses,))
        and leads("rust")
        and (plan.pointwise or sharing.group() is None)
    ):
        return fill_plain_weights(losses, plan)
    return None


def plain_objective(losses: Tensor, plan: Plan, group: Any, reduction: str) -> tuple[Tensor, Record] | None:
    """The objective of losses without measure, groups and state, and its record; None where more is asked.

    Args:
        losses: Losses, checked.
        plan: The weighting.
        group: The processes that share the batch, or None.
        reduction: "none", "mean" or "sum".
    """
    if not (
        trains_plainly()
        and leads("rust")
        and plan.kernel is not None
        and group is None
        and type(losses) in PLAIN
        and losses.dtype in _OF_LOSSES
        and losses.layout is _strided
        and not losses.is_nested
        and losses.is_cpu
        and losses.is_contiguous()
        and losses.requires_grad
        and not losses.is_neg()
        and losses.numel() > 0
    ):
        return None
    weights, factors = torch.empty_like(losses), torch.empty_like(losses)
    objective = torch.empty_like(losses) if reduction == "none" else losses.new_empty(())
    repeated_weights(losses.dtype, plan).objective(
        losses.data_ptr(), weights.data_ptr(), objective.data_ptr(), factors.data_ptr(), losses.numel(),
        torch.get_num_threads(), reduction,
    )  # fmt: skip
    record = Record(
        losses.detach(), weights, float(losses.numel()), None, None, None, "rust", losses._version
    )  # fmt: skip
    objective = _apply_of_losses(losses, objective, factors)
    if reduction == "none":
        mark_weighted(objective, plan.weighting)
    return objective, record


def _fit(beside: tuple[Any, Any, Any], dtype: torch.dtype, shape: torch.Size) -> bool:
    """Whether mask, sample weights and groups lie as the kernels read them; values are not looked at here."""
    where, sample_weight, groups = beside
    return (
        (where is None or (sample_weight is None and _is_plain(where, _bool, shape)))
        and (sample_weight is None or _is_plain(sample_weight, dtype, shape))
        and (groups is None or _is_plain(groups, _int64, shape))
    )


_look = attrgetter("dtype", "layout", "is_cpu", "is_nested")


def _is_plain(entries: Any, dtype: torch.dtype, shape: torch.Size) -> bool:
    """Whether entries of the units lie as the kernels read them."""
    return (
        type(entries) in PLAIN
        and _look(entries) == (dtype, _strided, True, False)
        and entries.shape == shape
        and entries.is_contiguous()
        and not entries.is_neg()
    )


def _readable(numbers: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels read numbers of the classes as they are."""
    return (
        type(numbers) in PLAIN
        and numbers.dtype is dtype
        and numbers.is_contiguous()
        and not (numbers.requires_grad or numbers.is_neg() or numbers.is_inference())
    )


def _version(numbers: Tensor | None) -> int:
    return 0 if numbers is None else numbers._version
