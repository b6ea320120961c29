"""Checks of single arguments of the torch front, with their error messages."""

from __future__ import annotations

import numbers
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor, nn

from rgd.torch._dtypes import FLOATS
from rgd.weightings import Weighting


class MismatchError(ValueError, RuntimeError):
    """Tensors that do not fit each other: a ValueError in some of torch's losses, RuntimeError in others."""


class DtypeError(TypeError, RuntimeError):
    """A tensor of a dtype or layout that does not fit: TypeError here, RuntimeError in torch's losses."""


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
    """Refuse a setting that is not one of `choices`."""
    if value not in choices:
        allowed = " or ".join([", ".join(repr(c) for c in choices[:-1]), repr(choices[-1])])
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def check_flag(name: str, value: Any) -> bool:
    """Refuse a switch that is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_dense(name: str, tensor: Tensor) -> None:
    """Refuse a nested or sparse tensor."""
    if tensor.is_nested:
        raise DtypeError(
            f"{name} is a nested tensor, whose rows differ in length: call torch.cat on its .unbind(), or "
            ".to_padded_tensor on it and leave the padding out by where="
        )
    if tensor.layout is not torch.strided:
        raise DtypeError(f"{name} has layout {tensor.layout}, expected torch.strided: call .to_dense() on it")


def no_tensor(name: str, value: Any, wanted: str = "a torch.Tensor") -> str:
    """The message for an argument that is no tensor; for an array or a list it names the conversion."""
    kind = type(value).__name__
    there = isinstance(value, (list, tuple, numbers.Number)) or hasattr(value, "__array__")
    return f"{name} must be {wanted}, got {kind}" + (f": pass torch.as_tensor({name})" if there else "")


def refuse_dtype(name: str, tensor: Tensor, expected: str) -> NoReturn:
    """Refuse a dtype, and name the conversion. In the message `expected` follows "must"."""
    fix = ".real" if tensor.is_complex() else ".dequantize()" if tensor.is_quantized else ".float()"
    raise DtypeError(f"{name} must {expected}, got {tensor.dtype}: convert it by {fix}")


def check_losses(losses: Any, name: str = "losses", hint: str = "") -> Tensor:
    """Refuse anything but a tensor of per-sample losses; `name` and `hint` are for the message."""
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
    """Refuse losses that were broadcast to all pairs of entries instead of compared entry by entry.

    Torch's losses broadcast predictions (N, 1) against targets (N,) to N x N losses.

    Args:
        base: The loss. Those of torch that compare entries always broadcast their arguments.
        losses: Its result. Another loss has broadcast if its result has more entries than the arguments.
        given: Its arguments; only the tensors matter.

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


def check_label_smoothing(label_smoothing: Any) -> float:
    """Refuse a label smoothing outside [0, 1]."""
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, numbers.Real):
        raise TypeError(f"label_smoothing must be a number in [0, 1], got {label_smoothing!r}")
    if not 0.0 <= float(label_smoothing) <= 1.0:
        raise MismatchError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    return float(label_smoothing)


def check_z_loss(z_loss: Any) -> float:
    """Refuse a z-loss that is no finite number >= 0."""
    if isinstance(z_loss, bool) or not isinstance(z_loss, numbers.Real):
        raise TypeError(f"z_loss must be a number >= 0, such as 1e-4, got {z_loss!r}")
    if not 0.0 <= float(z_loss) < float("inf"):
        raise ValueError(f"z_loss must be a finite number >= 0, got {z_loss}")
    return float(z_loss)


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
    """One number a class: an array of floats becomes a tensor on the CPU, anything else stays."""
    is_array = type(values) is np.ndarray and values.dtype.kind == "f"
    return torch.tensor(values, dtype=torch.get_default_dtype(), device="cpu") if is_array else values


def check_logit_adjustment(adjustment: Any) -> Tensor | None:
    """A logit adjustment as a tensor, from one or from an array of NumPy, such as `rgd.log_prior` returns."""
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
    return adjustment
