"""The base measure `p` of a call, from `where=` and `sample_weight=`, and the groups, one for each unit.

A unit has one weight: it is a target, or with `per="sample"` a sample of the leading axis.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rgd._arrays import power_of, power_of_products
from rgd.torch._checks import check_dense, no_tensor, refuse_dtype
from rgd.torch._dtypes import FLOATS, INTEGERS, accumulator, wide
from rgd.torch._modes import values_can_be_read


def measure_of(
    shape: torch.Size, like: Tensor, where: Any, sample_weight: Any, per: str = "element"
) -> Tensor | None:
    """The base measure for losses of a shape, on the device and in the dtype of `like`: one number a unit.

    It is 0 where `where` is False. It is None if neither `where` nor a sample weight is given.
    """
    measure = check_sample_weight(sample_weight, shape, like.device, per)
    if where is None:
        return measure
    check_where(where, shape[:1] if per == "sample" else shape, like.device)
    return where.to(accumulator(like.dtype)) if measure is None else measure.masked_fill(~where, 0)


def check_where(where: Any, shape: torch.Size, device: torch.device) -> None:
    """Refuse anything but a mask for losses of this shape on this device."""
    if isinstance(where, Tensor):
        check_dense("where", where)
    if not isinstance(where, Tensor) or where.dtype is not torch.bool:
        got = where.dtype if isinstance(where, Tensor) else type(where).__name__
        raise TypeError(f"where must be a torch.Tensor of bool, got {got}: compare it, as in where=mask > 0")
    if where.shape != shape:
        raise ValueError(
            f"where must have the shape of the losses, {tuple(shape)}, got {tuple(where.shape)}: "
            "where.expand_as(losses) repeats it along axes of size 1"
        )
    if where.device != device:
        raise ValueError(f"losses is on {device} and where on {where.device}: move both to one device")


def check_sample_weight(
    sample_weight: Any, losses_shape: torch.Size, device: torch.device, per: str
) -> Tensor | None:
    """The base measure `p` of each unit, in a float dtype; None stays None.

    Args:
        sample_weight: The caller's argument: numbers >= 0, of the losses' shape, or one for each sample of
            the leading axis.
        losses_shape: The losses' shape.
        device: Where the losses are.
        per: "element" where a unit is a loss, "sample" where it is a sample.

    Returns:
        A tensor of the units' shape, without grad. If values cannot be read now, NaN replaces those that are
        negative or not finite.
    """
    if sample_weight is None:
        return None
    if not isinstance(sample_weight, Tensor):
        raise TypeError(no_tensor("sample_weight", sample_weight))
    check_dense("sample_weight", sample_weight)
    if sample_weight.dtype not in (*FLOATS, *INTEGERS):
        refuse_dtype("sample_weight", sample_weight, "hold numbers")
    p = _by_unit("sample_weight", sample_weight, losses_shape, device, per).detach()
    p = p.to(torch.float64 if p.dtype is torch.float64 else torch.float32)
    allowed = (p >= 0) & (p < float("inf"))
    if values_can_be_read(p):
        if not bool(allowed.all()):
            raise ValueError(f"sample_weight must hold finite numbers >= 0, got {float(p[~allowed][0])}")
        return p
    return p.masked_fill(~allowed, float("nan"))


def check_groups(groups: Any, losses_shape: torch.Size, device: torch.device, per: str) -> Tensor | None:
    """The group of each unit, int64; None stays None. Arguments as for `check_sample_weight`."""
    if groups is None:
        return None
    if isinstance(groups, Tensor):
        check_dense("groups", groups)
    if not isinstance(groups, Tensor):
        raise TypeError(no_tensor("groups", groups, "a torch.Tensor of integers"))
    if groups.dtype not in INTEGERS:
        raise TypeError(f"groups must be a torch.Tensor of integers, got {groups.dtype}: call groups.long()")
    return _by_unit("groups", groups, losses_shape, device, per).to(torch.int64)


def check_reference(
    reference: Any, losses_shape: torch.Size, device: torch.device, takes_part: Tensor | None
) -> Tensor | None:
    """The losses of a reference model, without grad; None stays None.

    Args:
        reference: The caller's argument: floats of the losses' shape.
        losses_shape: The losses' shape.
        device: Where the losses are.
        takes_part: Which of the losses take part, a mask that broadcasts to their shape; None for all. The
            reference losses of the others may be any number.

    Returns:
        A tensor of the losses' shape. If values cannot be read now, NaN replaces those that are not finite.
    """
    if reference is None:
        return None
    if not isinstance(reference, Tensor):
        raise TypeError(no_tensor("reference", reference))
    check_dense("reference", reference)
    if reference.dtype not in FLOATS:
        refuse_dtype("reference", reference, "hold losses, floats")
    if reference.shape != losses_shape:
        raise ValueError(
            f"reference must have the shape of the losses, {tuple(losses_shape)}, got "
            f"{tuple(reference.shape)}: the losses of the reference model for the same targets, as "
            'reduction="none" with weighting=rgd.ERM() gives them'
        )
    if reference.device != device:
        raise ValueError(
            f"losses are on {device} and reference on {reference.device}: move both to one device"
        )
    reference = reference.detach()
    allowed = reference.isfinite()
    if values_can_be_read(reference):
        if not bool(allowed.all()):
            wrong = ~allowed if takes_part is None else ~allowed & takes_part
            if bool(wrong.any()):
                raise ValueError(
                    "reference must hold finite losses wherever a target takes part, got "
                    f"{float(reference[wrong][0])}: leave such targets out, by where= or sample_weight="
                )
        return reference
    return reference.masked_fill(~allowed, float("nan"))


def within_range(measure: Tensor, dtype: torch.dtype, reduction: str) -> tuple[Tensor, float]:
    """A base measure divided by a power of two so that `dtype` can hold it, and that power.

    "mean" and the weights do not depend on the power. It is 1 if values cannot be read now.

    Raises:
        ValueError: If `dtype` cannot hold the measure, and `reduction` depends on its scale.
    """
    if not measure.numel() or not values_can_be_read(measure):
        return measure, 1.0
    largest = float(measure.max())
    if reduction == "mean":
        power = power_of_products(largest)
        wide = measure.double() if power_of(largest) != 1.0 else measure
        return (measure, 1.0) if power == 1.0 else (wide / power, power)
    if largest > torch.finfo(dtype).max:
        raise ValueError(
            f"sample_weight holds {largest:g}, more than {dtype} can, and reduction={reduction!r} depends on "
            "its size: give float64 losses or input, or smaller numbers"
        )
    return measure, 1.0


def spread(values: Tensor, losses: Tensor) -> Tensor:
    """Values of targets unchanged; values of samples in a shape that broadcasts along their targets."""
    return values.view(-1, *[1] * (losses.dim() - 1)) if losses.dim() > values.dim() else values


def units_of(
    losses: Tensor, counted: Tensor | None, measure: Tensor | None, per: str
) -> tuple[Tensor, Tensor | None]:
    """The loss of each unit, without grad, and its base measure.

    Args:
        losses: One a target.
        counted: Which targets count; None for all.
        measure: The base measure of each unit; None for ones.
        per: "element": a unit is a target; "sample": it is a sample of the leading axis, whose loss is the
            mean over its targets that count.
    """
    plain = losses.detach()
    if per == "sample" and plain.dim() > 1:
        flat = plain.flatten(1).to(wide(plain))
        if counted is None:
            return flat.mean(1), measure
        kept = counted.flatten(1)
        number = kept.sum(1)
        plain = flat.masked_fill(~kept, 0).sum(1) / number.clamp(min=1)
        counted = number > 0
    if counted is None:
        return plain, measure
    return plain, counted.to(plain.dtype) if measure is None else measure.masked_fill(~counted, 0)


def _by_unit(name: str, values: Tensor, losses_shape: torch.Size, device: torch.device, per: str) -> Tensor:
    """Values of the units' shape, from values of the losses' shape or with one entry a sample."""
    if values.device != device:
        raise ValueError(f"losses are on {device} and {name} on {values.device}: move both to one device")
    units = losses_shape[:1] if per == "sample" else losses_shape
    if values.shape == units:
        return values
    if values.shape == losses_shape[:1]:
        return values.view(-1, *[1] * (len(losses_shape) - 1)).expand(losses_shape)
    if per == "sample":
        raise ValueError(
            f'{name} must have one entry a sample, shape {tuple(units)}, with per="sample", got '
            f"{tuple(values.shape)}"
        )
    raise ValueError(
        f"{name} must have the shape of the losses, {tuple(losses_shape)}, or one entry a sample, "
        f"{tuple(losses_shape[:1])}, got {tuple(values.shape)}"
    )
