"""One denominator for the micro-batches and processes of a step: `normalizer=`, and its computation."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from rgd.torch._checks import check_class_weight, check_flag, no_tensor
from rgd.torch._distributed import Sync
from rgd.torch._dtypes import INTEGERS
from rgd.torch._measure import measure_of, spread
from rgd.torch._modes import values_can_be_read
from rgd.torch.segments import check_segments

_TARGETS = ("target", "labels")


def count_targets(
    batches: Iterable[Any],
    *,
    ignore_index: int = -100,
    shift: bool = False,
    weight: Tensor | None = None,
    process_group: Any = None,
) -> Tensor:
    """The divisor of "mean", `sum p c`, over all micro-batches of a step: the `normalizer=` of each of them.

    With it, the sum of the gradients of the micro-batches is the gradient of one big batch, also if their
    numbers of targets differ. Over several processes it is the sum over the ranks divided by their number,
    because DistributedDataParallel and FSDP average gradients. Each call still computes its own weights, so
    this is exact for pointwise weightings.

    Args:
        batches: The micro-batches of this process, each one a target, a pair of inputs and a target, or a
            mapping with the target under "target" or "labels" and, if they are given to the loss, `where`,
            `sample_weight`, `segments` and `num_segments` under these names. A target holds class indices or,
            in floats, class probabilities of shape (N, C, ...).
        ignore_index: Class index of targets that do not count.
        shift: True if position t predicts target t + 1: the first target of each row is not counted.
        weight: Class weights, shape (C,).
        process_group: The processes of a step; None for the default group, once it is initialised. Every one
            of them has to call this.

    Returns:
        A float64 scalar (float32 on a device without float64) on the targets' device, without waiting for it.

    Raises:
        TypeError: If a batch holds no target, or a tensor of the wrong type.
        ValueError: If there are no batches, or a shape does not fit.

    Example:
        >>> import torch
        >>> from rgd.torch import RGDLoss, count_targets
        >>> logits, target = torch.zeros(7, 3, requires_grad=True), torch.arange(7) % 3
        >>> step = [(logits[:5], target[:5]), (logits[5:], target[5:])]
        >>> total, criterion = count_targets(step), RGDLoss(tau=1.0)
        >>> print(total)
        tensor(7., dtype=torch.float64)
        >>> sum(criterion(*batch, normalizer=total) for batch in step)  # as criterion(logits, target)
        tensor(1.8113, grad_fn=...)
    """
    check_flag("shift", shift)
    sharing, weight = Sync(process_group), check_class_weight(weight)
    counts = [_count(batch, ignore_index, shift, weight) for batch in batches]
    if not counts:
        raise ValueError("batches is empty: give the micro-batches of a step, count_targets([target])")
    total = torch.stack([count.to(counts[0].device) for count in counts]).sum()
    group = sharing.group()
    if group is None:
        return total
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)


def check_normalizer(
    normalizer: Any, reduction: str, device: torch.device, power: float = 1.0
) -> float | Tensor | None:
    """A normalizer, checked and divided by the power of two that the measure was divided by.

    Args:
        normalizer: The caller's argument: a positive number, or a tensor of shape ().
        reduction: The reduction of the call.
        device: Where the losses are.
        power: The power.

    Returns:
        A float if the value can be read; else a scalar on the device, float64 if it has that, and NaN for a
        number that is not allowed. None stays None.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not positive, or `reduction` does not divide.
    """
    if normalizer is None:
        return None
    if reduction != "mean":
        raise ValueError(
            f"normalizer is what reduction='mean' divides by, and reduction={reduction!r} divides by "
            "nothing: leave normalizer out"
        )
    if not isinstance(normalizer, Tensor):
        if isinstance(normalizer, bool) or not isinstance(normalizer, numbers.Real):
            raise TypeError(
                f"normalizer must be a positive number or a torch.Tensor of shape (), got {normalizer!r}"
            )
        if not torch.compiler.is_compiling():
            return _allowed(float(normalizer)) / power
        normalizer = torch.full((), cast("Any", normalizer), dtype=torch.float64, device=device)
    if normalizer.dim() or normalizer.dtype is torch.bool or normalizer.is_complex():
        raise TypeError(
            "normalizer must be a positive number or a torch.Tensor of shape (), got shape "
            f"{tuple(normalizer.shape)} and {normalizer.dtype}: one number for the whole step, as "
            "rgd.torch.count_targets gives it"
        )
    normalizer = normalizer.detach()
    if values_can_be_read(normalizer):
        return _allowed(float(normalizer)) / power
    if normalizer.device != device and not normalizer.is_cpu:
        raise ValueError(
            f"input is on {device} and normalizer on {normalizer.device}: move both to one device"
        )
    normalizer = normalizer.to(device, torch.float32 if device.type == "mps" else torch.float64)
    allowed = (normalizer > 0) & (normalizer < math.inf)
    return normalizer.masked_fill(~allowed, math.nan) / power


def _allowed(number: float) -> float:
    if not 0.0 < number < math.inf:
        raise ValueError(
            f"normalizer must be a positive number, got {number}: how many targets count, or the sum of "
            "their sample weights, over all micro-batches of a step"
        )
    return number


def _count(batch: Any, ignore_index: int, shift: bool, weight: Tensor | None) -> Tensor:
    """`sum p c` of one micro-batch."""
    target, where, sample_weight, segments, number = _parts(batch)
    probabilities = target.is_floating_point()
    if not probabilities and target.dtype not in INTEGERS:
        raise TypeError(f"a target must hold class indices or class probabilities, got {target.dtype}")
    if shift and (probabilities or target.dim() != 2):
        raise ValueError(f"shift=True takes class indices of shape (B, T), got {tuple(target.shape)}")
    places = target.shape[:1] + target.shape[2:] if probabilities else target.shape
    units = check_segments(segments, number, "sample", places, target.device, shift=shift)
    if shift:
        where, sample_weight, target = (
            one[:, 1:] if isinstance(one, Tensor) and one.shape == places else one
            for one in (where, sample_weight, target)
        )
    if units is not None:
        where = units[1] if where is None else units[0].given("where", where) & units[1]
        sample_weight = units[0].given("sample_weight", sample_weight)
    shape = target.shape[:1] + target.shape[2:] if probabilities else target.shape
    dtype = torch.float32 if target.device.type == "mps" else torch.float64
    like = torch.empty((), dtype=dtype, device=target.device)
    if isinstance(where, Tensor) and where.shape == shape[:1]:
        where = spread(where, like.expand(shape)).expand(shape)
    p = measure_of(shape, like, where, sample_weight)
    p = like.new_ones(()).expand(shape) if p is None else p.to(dtype)
    if not probabilities:
        counted = target != ignore_index
        if weight is not None:
            index = target.to(torch.int64).masked_fill(~counted | (p == 0), 0)
            p = p * weight.detach().to(like)[index]
        p = p.masked_fill(~counted, 0)
    return p.sum()


def _parts(batch: Any) -> tuple[Tensor, Any, Any, Any, Any]:
    """The target of a micro-batch, its mask, its sample weight, its segments and how many a row has."""
    others: tuple[Any, ...] = (None,) * 4
    target: Any = batch
    if isinstance(batch, Mapping):
        batch = cast("Mapping[str, Any]", batch)
        target = next((batch[name] for name in _TARGETS if batch.get(name) is not None), None)
        others = tuple(map(batch.get, ("where", "sample_weight", "segments", "num_segments")))
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        target = cast("Any", batch[1]) if len(cast("Any", batch)) == 2 else None
    if not isinstance(target, Tensor):
        if target is None:
            raise TypeError(
                "a micro-batch must be a target, a pair of inputs and a target, or a mapping with a target "
                f"under 'target' or 'labels', got {_described(batch)}"
            )
        raise TypeError(no_tensor("target", target))
    return cast("Any", (target, *others))


def _described(batch: Any) -> str:
    kind = type(batch).__name__
    if isinstance(batch, Mapping):
        return f"a mapping with {', '.join(map(repr, cast('Any', batch)))}"
    return f"{kind} of {len(cast('Any', batch))}" if isinstance(batch, Sequence) else kind
