"""What the torch front refuses, and in which words."""

from __future__ import annotations

import numbers
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor, nn

from rgd._arrays import unit_of, unit_of_products
from rgd.torch.backends._registry import values_can_be_read
from rgd.weightings import Weighting


class MismatchError(ValueError, RuntimeError):
    """Tensors that do not fit each other: a ValueError in some of torch's losses, RuntimeError in others."""


class DtypeError(TypeError, RuntimeError):
    """A tensor of a dtype or layout that does not fit: TypeError here, RuntimeError in torch's losses."""


FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
REDUCTIONS = ("none", "mean", "sum")
UNITS = ("element", "sample")
EVALUATIONS = ("plain", "weighted")
# Losses of torch that compare each entry of the predictions with one of the targets.
ENTRYWISE = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.PoissonNLLLoss,
    nn.SoftMarginLoss,
    nn.MultiLabelSoftMarginLoss,
    nn.HingeEmbeddingLoss,
    nn.GaussianNLLLoss,
    nn.KLDivLoss,
)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse a setting that is none of `choices`."""
    if value not in choices:
        allowed = " or ".join([", ".join(repr(c) for c in choices[:-1]), repr(choices[-1])])
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def check_flag(name: str, value: Any) -> bool:
    """Refuse a switch that is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_dense(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that does not hold its numbers in rows of one length: a nested or a sparse one."""
    if tensor.is_nested:
        raise DtypeError(
            f"{name} is a nested tensor, whose rows differ in length: call torch.cat on its .unbind(), or "
            ".to_padded_tensor on it and leave the padding out by where="
        )
    if tensor.layout is not torch.strided:
        raise DtypeError(f"{name} has layout {tensor.layout}, expected torch.strided: call .to_dense() on it")


def no_tensor(name: str, value: Any, wanted: str = "a torch.Tensor") -> str:
    """What to say of an argument that is no tensor: an array or a list has only to be converted."""
    kind = type(value).__name__
    there = isinstance(value, (list, tuple, numbers.Number)) or hasattr(value, "__array__")
    return f"{name} must be {wanted}, got {kind}" + (f": pass torch.as_tensor({name})" if there else "")


def refuse_dtype(name: str, tensor: Tensor, expected: str) -> NoReturn:
    """Refuse a dtype, with the conversion: `expected` completes "must"."""
    fix = ".real" if tensor.is_complex() else ".dequantize()" if tensor.is_quantized else ".float()"
    raise DtypeError(f"{name} must {expected}, got {tensor.dtype}: convert it by {fix}")


def check_losses(losses: Any, name: str = "losses", hint: str = "") -> Tensor:
    """Refuse what is no tensor of per-sample losses; `name` and `hint` are for the message."""
    if not isinstance(losses, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor, got {type(losses).__name__}{hint}"
            if hint
            else no_tensor(name, losses)
        )
    check_dense(name, losses)
    if losses.dtype not in FLOATS:
        refuse_dtype(name, losses, "be float32, float64, float16 or bfloat16")
    if losses.dim() == 0:
        raise ValueError(
            f"{name} has 0 dimensions: it is already reduced to one number, and weighting that re-weights "
            'nothing. Compute the loss of each sample, with reduction="none"'
        )
    return losses


def check_not_broadcast(base: Any, losses: Tensor, given: tuple[Any, ...]) -> None:
    """Refuse the losses of all pairs of entries of tensors that were to be compared entry by entry.

    Torch's losses broadcast predictions (N, 1) against targets (N,), and make N x N losses of them.

    Args:
        base: The loss. One of torch's that compares entries is known to have broadcast what it was given.
        losses: What it made. Another loss is taken to have broadcast where these are more than it was given.
        given: What it was given; only the tensors matter.

    Raises:
        ValueError: If the shapes of the tensors make more pairs than one of them has entries.
    """
    shapes = [one.shape for one in given if isinstance(one, Tensor)]
    if not isinstance(base, ENTRYWISE):
        if losses.numel() <= max((shape.numel() for shape in shapes), default=losses.numel()):
            return
    elif all(shape == shapes[0] for shape in shapes):
        return
    try:
        broadcast: torch.Size = cast("Any", torch).broadcast_shapes(*shapes)
    except RuntimeError:  # they cannot be broadcast
        return
    if all(broadcast.numel() > shape.numel() for shape in shapes):
        raise ValueError(
            f"base made losses of shape {tuple(losses.shape)} from tensors of the shapes "
            f"{', '.join(str(tuple(shape)) for shape in shapes)}, so one was broadcast against the other: "
            "give all one shape, as by predictions.squeeze(-1) for predictions (N, 1) and targets (N,)"
        )


def check_where(where: Any, shape: torch.Size, device: torch.device) -> None:
    """Refuse what is no mask of losses of a shape, on a device."""
    if where is None:
        return
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


def check_base(sample_weight: Any, losses_shape: torch.Size, device: torch.device, per: str) -> Tensor | None:
    """The base measure `p` of each unit that has a weight, in a float dtype; None stays None.

    Args:
        sample_weight: What the caller gave: numbers >= 0, of the losses' shape, or one for each sample of the
            leading axis.
        losses_shape: The losses' shape.
        device: Where the losses are.
        per: "element" where a unit is a loss, "sample" where it is a sample.

    Returns:
        A tensor of the units' shape, without grad. Where values cannot be read now, one that is negative or
        not finite is NaN in it.
    """
    if sample_weight is None:
        return None
    if not isinstance(sample_weight, Tensor):
        raise TypeError(no_tensor("sample_weight", sample_weight))
    check_dense("sample_weight", sample_weight)
    if sample_weight.dtype not in (*FLOATS, *INTEGERS):
        refuse_dtype("sample_weight", sample_weight, "hold numbers")
    p = by_unit("sample_weight", sample_weight, losses_shape, device, per).detach()
    p = p.to(torch.float64 if p.dtype is torch.float64 else torch.float32)
    allowed = (p >= 0) & (p < float("inf"))
    if values_can_be_read(p):
        if not bool(allowed.all()):
            raise ValueError(f"sample_weight must hold finite numbers >= 0, got {float(p[~allowed][0])}")
        return p
    return p.masked_fill(~allowed, float("nan"))


def in_unit(base: Tensor, dtype: torch.dtype, reduction: str) -> tuple[Tensor, float]:
    """A base measure in a unit in which `dtype` can hold it, and that unit.

    "mean" and the weights do not depend on the unit. Where values cannot be read now, it stays as it is.

    Raises:
        ValueError: If `dtype` cannot hold it, and `reduction` depends on the unit.
    """
    if not base.numel() or not values_can_be_read(base):
        return base, 1.0
    largest = float(base.max())
    if reduction == "mean":
        unit = unit_of_products(largest)
        wide = base.double() if unit_of(largest) != 1.0 else base
        return (base, 1.0) if unit == 1.0 else (wide / unit, unit)
    if largest > torch.finfo(dtype).max:
        raise ValueError(
            f"sample_weight holds {largest:g}, more than {dtype} can, and reduction={reduction!r} depends on "
            "its size: give float64 losses or input, or smaller numbers"
        )
    return base, 1.0


def check_groups(groups: Any, losses_shape: torch.Size, device: torch.device, per: str) -> Tensor | None:
    """The group of each unit that has a weight, int64; None stays None. Arguments as for `check_base`."""
    if groups is None:
        return None
    if isinstance(groups, Tensor):
        check_dense("groups", groups)
    if not isinstance(groups, Tensor):
        raise TypeError(no_tensor("groups", groups, "a torch.Tensor of integers"))
    if groups.dtype not in INTEGERS:
        raise TypeError(f"groups must be a torch.Tensor of integers, got {groups.dtype}: call groups.long()")
    return by_unit("groups", groups, losses_shape, device, per).to(torch.int64)


def by_unit(name: str, values: Tensor, losses_shape: torch.Size, device: torch.device, per: str) -> Tensor:
    """Values of the units' shape, from ones of the losses' shape or of one entry a sample."""
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


def targets_shape(logits: Tensor) -> torch.Size:
    """The shape of the losses of logits: (C,), (N, C) or (N, C, d1, ..., dk) without the class axis."""
    return logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else torch.Size(())


def check_label_smoothing(label_smoothing: Any) -> float:
    """Refuse a label smoothing outside [0, 1]."""
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, numbers.Real):
        raise TypeError(f"label_smoothing must be a number in [0, 1], got {label_smoothing!r}")
    if not 0.0 <= float(label_smoothing) <= 1.0:
        raise MismatchError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    return float(label_smoothing)


def check_class_weight(weight: Any) -> Tensor | None:
    """Class weights as a tensor, from one or from an array of NumPy, such as `rgd.class_balanced` returns."""
    if weight is None:
        return None
    if isinstance(weight, numbers.Real):
        raise TypeError(
            f"weight must be a torch.Tensor of one weight a class, got the number {weight!r}: did you mean "
            f"tau={weight!r}?"
        )
    if isinstance(weight, Weighting):
        raise TypeError(f"weight takes class weights, got {weight}: name it, weighting={weight}")
    weight = _of_classes(weight)
    if not isinstance(weight, Tensor):
        raise TypeError(no_tensor("weight", weight))
    check_dense("weight", weight)
    if weight.dtype not in FLOATS:
        refuse_dtype("weight", weight, "hold one float a class")
    if weight.dim() != 1:
        raise ValueError(f"weight must be a vector of one float a class, got shape {tuple(weight.shape)}")
    return weight


def _of_classes(values: Any) -> Any:
    """Numbers of the classes: an array of floats as a tensor on the CPU, anything else as it is."""
    is_array = type(values) is np.ndarray and values.dtype.kind == "f"
    return torch.tensor(values, dtype=torch.get_default_dtype(), device="cpu") if is_array else values


def check_logit_adjustment(adjustment: Any, logits: Tensor | None = None) -> Tensor | None:
    """A logit adjustment as a tensor, one that fits the logits; from an array too, as of `rgd.log_prior`."""
    if adjustment is None:
        return None
    adjustment = _of_classes(adjustment)
    if not isinstance(adjustment, Tensor):
        raise TypeError(no_tensor("logit_adjustment", adjustment))
    check_dense("logit_adjustment", adjustment)
    if adjustment.dim() != 1 or adjustment.dtype not in FLOATS:
        raise ValueError(
            "logit_adjustment must be a vector of one float a class, got shape "
            f"{tuple(adjustment.shape)} and {adjustment.dtype}"
        )
    if logits is None:
        return adjustment
    classes = logits.shape[1 if logits.dim() > 1 else 0]
    if adjustment.shape[0] != classes:
        raise MismatchError(
            f"logit_adjustment must hold one number for each of the {classes} classes, got "
            f"{adjustment.shape[0]}"
        )
    if adjustment.device != logits.device:
        raise ValueError(
            f"input is on {logits.device} and logit_adjustment on {adjustment.device}: move both to one "
            "device"
        )
    return adjustment


def check_classification(logits: Any, target: Any, weight: Tensor | None, ignore_index: int = -100) -> None:
    """Refuse logits, target and class weight that do not fit each other."""
    if not isinstance(logits, Tensor):
        raise TypeError(no_tensor("input", logits))
    if not isinstance(target, Tensor):
        raise TypeError(no_tensor("target", target))
    check_dense("input", logits)
    check_dense("target", target)
    if target.is_floating_point() and logits.dtype in (*INTEGERS, torch.bool):
        raise DtypeError(
            f"input holds {logits.dtype} and target {target.dtype}, so they look swapped: the logits come "
            "first, loss(logits, target)"
        )
    if logits.dtype not in FLOATS:
        refuse_dtype("input", logits, "hold float logits")
    if logits.dim() == 0:
        raise ValueError("input must have a class axis: shape (C,), (N, C) or (N, C, d1, ..., dk), got ()")
    axis = 1 if logits.dim() > 1 else 0
    shape = logits.shape
    if target.is_floating_point():
        if target.dtype not in FLOATS:
            refuse_dtype("target", target, "hold class indices (int64) or class probabilities (floats)")
        if target.shape != shape:
            raise MismatchError(
                f"target has shape {tuple(target.shape)} and {target.dtype}: class probabilities must have "
                f"the shape of input, {tuple(shape)}; class indices must be integers"
            )
        if ignore_index >= 0:
            raise ValueError(
                f"ignore_index does not apply to class probabilities, got {ignore_index}: leave it out"
            )
    elif target.dtype in INTEGERS:
        expected = shape[:axis] + shape[axis + 1 :]
        if target.shape != expected:
            raise MismatchError(
                f"target must have shape {tuple(expected)} for input of shape {tuple(shape)}, "
                f"got {tuple(target.shape)}{_shape_hint(target, shape, axis)}"
            )
    else:
        refuse_dtype("target", target, "hold class indices (int64) or class probabilities (floats)")
    if target.device != logits.device:
        raise ValueError(
            f"input is on {logits.device} and target on {target.device}: move both to one device"
        )
    if weight is not None:
        if weight.shape[0] != shape[axis]:
            raise MismatchError(
                f"weight must hold one number for each of the {shape[axis]} classes, got {weight.shape[0]}"
            )
        if weight.device != logits.device:
            raise ValueError(
                f"input is on {logits.device} and weight on {weight.device}: move both to one device"
            )


def _shape_hint(target: Tensor, shape: torch.Size, axis: int) -> str:
    """What class indices of a wrong shape were probably meant to be."""
    if target.shape == shape and len(shape) == 1:
        return (
            ". For one logit a sample, which says yes or no: "
            'RGDLoss(base=nn.BCEWithLogitsLoss(reduction="none")) with target.float()'
        )
    if target.shape == shape:
        return (
            f". One-hot targets of integers: give class indices, target.argmax({axis}), or probabilities, "
            "target.float()"
        )
    if len(shape) > 2 and target.shape == shape[:-1]:
        return (
            ". The class axis is the second: for logits of shape (N, T, C) give input.transpose(1, 2)"
            if len(shape) == 3
            else ". The class axis is the second: give input.movedim(-1, 1)"
        )
    return ""
