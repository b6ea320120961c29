"""One call of the cross-entropy: its tensors and options, checked once and then passed on as one object."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rgd.torch._checks import (
    REDUCTIONS,
    UNITS,
    DtypeError,
    MismatchError,
    check_choice,
    check_dense,
    check_flag,
    check_label_smoothing,
    check_z_loss,
    no_tensor,
    refuse_dtype,
)
from rgd.torch._dtypes import FLOATS, INTEGERS, accumulator
from rgd.torch._head import LinearHead
from rgd.torch._measure import check_groups, check_reference, measure_of, spread, units_of, within_range
from rgd.torch._modes import plain_and_eager
from rgd.torch.normalizer import check_normalizer
from rgd.torch.segments import Segments, check_segments


class Options(NamedTuple):
    """The settings of a cross-entropy: those of `nn.CrossEntropyLoss`, and a few more.

    Attributes:
        ignore_index: The class index of targets that take no part.
        label_smoothing: In [0, 1].
        reduction: "none", "mean" or "sum".
        per: "element" where a target has a weight, "sample" where all targets of a sample share one.
        inplace: Whether the gradient overwrites the logits.
        z_loss: The factor of the square of the logsumexp of the logits in the objective.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: str = "mean"
    per: str = "element"
    inplace: bool = False
    z_loss: float = 0.0

    def by_element(self) -> Options:
        """The same options with `per="element"`, for targets that are given their weights."""
        return Options(
            self.ignore_index, self.label_smoothing, self.reduction, "element", self.inplace, self.z_loss
        )

    def refuse_beside_base(
        self, weight: Tensor | None, logit_adjustment: Tensor | None, returns: tuple[str, ...]
    ) -> None:
        """Refuse what only the built-in cross-entropy can do, where a loss of the user's stands in its place.

        Raises:
            ValueError: If an option is not at its default, or one of the other settings is given.
        """
        if returns:
            raise ValueError(
                "returns are of the logits of the built-in cross-entropy: leave it out with base"
            )
        if self.inplace:
            raise ValueError("inplace is for the built-in cross-entropy: leave it out with base")
        if weight is not None or self.ignore_index != -100 or self.label_smoothing != 0.0:
            raise ValueError(
                "weight, ignore_index and label_smoothing are settings of the built-in cross-entropy: "
                "with base, give them to base itself"
            )
        if self.z_loss:
            raise ValueError(
                "z_loss is a setting of the built-in cross-entropy: with base, add z_loss * "
                "logits.logsumexp(1).square() to the objective yourself"
            )
        if logit_adjustment is not None:
            raise ValueError(
                "logit_adjustment is a setting of the built-in cross-entropy: with base, add it to the "
                "logits that base gets"
            )

    def checked(self) -> Options:
        """The same options, checked, as plain numbers.

        Raises:
            TypeError, ValueError: If an option is not allowed.
        """
        check_choice("reduction", self.reduction, REDUCTIONS)
        check_choice("per", self.per, UNITS)
        index: Any = self.ignore_index
        if isinstance(index, bool) or not isinstance(index, numbers.Integral):
            raise TypeError(f"ignore_index must be an integer, got {index!r}")
        smoothing, z_loss = check_label_smoothing(self.label_smoothing), check_z_loss(self.z_loss)
        in_place = check_flag("inplace", self.inplace)
        return Options(int(index), smoothing, self.reduction, self.per, in_place, z_loss)


class Given(NamedTuple):
    """The tensors of a call as the caller gave them, not checked yet.

    Attributes:
        input: Logits, or the hidden states of a linear head.
        target: Class indices or probabilities.
        class_weight: (C,); it was checked before, as the adjustment was.
        adjustment: The numbers added to the logits, (C,).
        where: A mask.
        sample_weight: The base measure.
        groups: The group of each unit.
        normalizer: The number that "mean" divides by.
        segments: The sequence of each target, if several sequences share a row.
        num_segments: The largest number of sequences in a row.
        reference: The losses of a reference model.
    """

    input: Any
    target: Any
    class_weight: Tensor | None = None
    adjustment: Tensor | None = None
    where: Any = None
    sample_weight: Any = None
    groups: Any = None
    normalizer: Any = None
    segments: Any = None
    num_segments: Any = None
    reference: Any = None


class Problem(NamedTuple):
    """A cross-entropy to compute: tensors that fit each other, in the dtypes that backends read.

    Attributes:
        logits: (C,), (N, C) or (N, C, d1, ..., dk); with a linear head hidden states, (N, D) or (B, T, D).
        target: Class indices, int64 or int32, of the losses' shape, `ignore_index` where a target takes no
            part; or class probabilities.
        options: The settings.
        dtype: The dtype of the caller's input, and of the objective.
        class_weight: (C,), or None.
        adjustment: The numbers added to the logits, (C,) without grad, or None.
        measure: The base measure of each unit, without grad, 0 where it takes no part; None for ones. With
            segments, the base measure of each target.
        power: The power of two that `measure` was divided by.
        given_measure: The base measure before this division.
        groups: The group of each unit, int64, or None.
        head: The linear head that makes logits of hidden states; None if `logits` are logits.
        normalizer: The number that "mean" divides by instead of `sum p c`, over `power`: a float if it could
            be read, else a scalar on the device; None to divide by `sum p c`.
        segments: The unit of each target, if the sequences of a row are units. `options.per` is then
            "element", since every sum over targets gets a weight for each target.
        reference: The losses of a reference model, of the losses' shape, without grad; or None.
        returns: The further results that the call computes from the logits, names of `rgd._extras`.
    """

    logits: Tensor
    target: Tensor
    options: Options
    dtype: torch.dtype = torch.float32
    class_weight: Tensor | None = None
    adjustment: Tensor | None = None
    measure: Tensor | None = None
    power: float = 1.0
    given_measure: Tensor | None = None
    groups: Tensor | None = None
    head: LinearHead | None = None
    normalizer: Tensor | float | None = None
    segments: Segments | None = None
    reference: Tensor | None = None
    returns: tuple[str, ...] = ()

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors for a backend: logits, target, class weight, adjustment, measure, normalizer, head."""
        normalizer: Any = self.normalizer
        if normalizer.__class__ is float:
            normalizer = None
        dense = (self.logits, self.target, self.class_weight, self.adjustment, self.measure, normalizer)
        return dense if self.head is None else (*dense, self.head.weight, self.head.bias)

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> Problem:
        """The same settings with other `tensors`, such as those that autograd has kept."""
        logits, target, class_weight, adjustment, measure, normalizer, *of_head = cast("Any", tensors)
        normalizer = self.normalizer if isinstance(self.normalizer, float) else normalizer
        head = self.head
        if head is not None:
            weight, bias = of_head
            head = LinearHead(weight, bias, head.chunking, head.shard)
        return Problem(
            logits, target, self.options, self.dtype, class_weight, adjustment, measure,
            head=head, normalizer=normalizer,
        )  # fmt: skip

    def without_tensors(self) -> Problem:
        """The settings without tensors. Autograd keeps the tensors themselves."""
        return self.with_tensors((None,) * (6 if self.head is None else 8))

    def has_labels(self) -> bool:
        """Whether the target holds class indices, and not probabilities."""
        return not self.target.is_floating_point()

    def classes(self) -> int:
        """C."""
        if self.head is not None:
            return self.head.classes()
        return self.logits.shape[1 if self.logits.dim() > 1 else 0]

    def units(self, losses: Tensor) -> tuple[Tensor, Tensor | None]:
        """The loss of each unit, without grad, and its base measure."""
        if self.segments is None:
            return units_of(losses, self.counted(), self.measure, self.options.per)
        return self.segments.units(losses, cast("Tensor", self.counted()), self.measure)

    def spread(self, weights: Tensor) -> Tensor:
        """The weights of targets, if segments are the units; otherwise the weights of units unchanged."""
        if self.segments is None:
            return weights
        return self.segments.spread(weights, cast("Tensor", self.counted()))

    def losses_shape(self) -> torch.Size:
        """The shape of the losses: one a target."""
        shape = self.target.shape
        if self.has_labels():
            return shape
        return shape[:-1] if self.head is not None else targets_shape(shape)

    def counted(self) -> Tensor | None:
        """Which targets are not ignored, bool, of the losses' shape; None for class probabilities."""
        return self.target != self.options.ignore_index if self.has_labels() else None

    def wants_gradient(self) -> bool:
        """Whether autograd asks for the gradient of the logits."""
        return self.logits.requires_grad and torch.is_grad_enabled()

    def changed(self, **changes: Any) -> Problem:
        """As `_replace`, which torch 2.8 does not compile."""
        values: dict[str, Any] = {**dict(zip(_FIELDS, self, strict=True)), **changes}
        return Problem(**values)


_FIELDS = Problem._fields


def problem_of(given: Given, options: Options, head: LinearHead | None = None) -> Problem:
    """The problem that a call poses: the only place that checks whether its tensors fit each other.

    Args:
        given: The tensors; class weights and adjustment are vectors of floats.
        options: The settings, checked.
        head: A linear head, if `given.input` are hidden states; its settings are checked.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape, a device, a value or a setting does not fit.
    """
    (
        logits, target, class_weight, adjustment, where, sample_weight, groups, normalizer, segments, number,
        _,
    ) = given  # fmt: skip
    if head is None:
        shape = _check_logits(given)
        classes = logits.shape[1 if logits.dim() > 1 else 0]
        if options.inplace and logits.requires_grad and torch.is_grad_enabled():
            _check_in_place(logits, target)
    else:
        head = head.checked(logits)
        _check_hidden(given, head, options)
        shape, classes = logits.shape[:-1], head.classes()
    if class_weight is not None:
        _check_by_class("weight", class_weight, classes, target)
    if adjustment is not None:
        _check_by_class("logit_adjustment", adjustment, classes, target)
    if target.is_floating_point() and options.ignore_index >= 0:
        raise ValueError(
            f"ignore_index does not apply to class probabilities, got {options.ignore_index}: leave it out"
        )
    if head is not None and head.chunking.shift:
        target = target[:, 1:]
        shape = target.shape
        places = logits.shape[:2]
        where, sample_weight, groups = (_shifted(one, places) for one in (where, sample_weight, groups))
    dtype = logits.dtype
    inside = None
    if segments is not None or number is not None:
        segments, inside = _units_of_segments(given, options, shape, head)
        options = options.by_element()
        where, sample_weight = segments.given("where", where), segments.given("sample_weight", sample_weight)
        groups = segments.groups(groups, logits.device)
    if not target.is_floating_point():
        # An ignore_index that int32 cannot hold would wrap to another class index.
        narrow = target.dtype is torch.int32 and -(2**31) <= options.ignore_index < 2**31
        target = target if narrow or target.dtype is torch.int64 else target.to(torch.int64)
    elif head is None and target.dtype != logits.dtype:
        wider = torch.promote_types(target.dtype, logits.dtype)
        logits, target = logits.to(wider), target.to(wider)
    adjustment = None if adjustment is None else adjustment.detach()
    if inside is not None:
        target = target.masked_fill(~inside, options.ignore_index)
    if where is None and sample_weight is None and groups is None:
        if normalizer is not None:
            normalizer = check_normalizer(normalizer, options.reduction, logits.device)
        problem = Problem(
            logits, target, options, dtype, class_weight, adjustment,
            head=head, normalizer=normalizer, segments=segments,
        )  # fmt: skip
        return problem if given.reference is None else _compared(problem, given.reference)
    per = options.per if len(shape) > 0 else "element"
    measure = given_measure = measure_of(shape, logits, where, sample_weight, per)
    power = 1.0
    if segments is None:
        groups = check_groups(groups, shape, logits.device, per)
    if measure is not None and not target.is_floating_point():
        # Where the measure is 0, the label may be any number, also one that is no class.
        target = target.masked_fill(spread(measure, target) == 0, options.ignore_index)
    if measure is not None and sample_weight is not None:
        measure, power = within_range(measure, accumulator(logits.dtype), options.reduction)
    if normalizer is not None:
        normalizer = check_normalizer(normalizer, options.reduction, logits.device, power)
    problem = Problem(
        logits, target, options, dtype, class_weight, adjustment, measure, power, given_measure, groups, head,
        normalizer, segments,
    )  # fmt: skip
    return problem if given.reference is None else _compared(problem, given.reference)


def _compared(problem: Problem, reference: Any) -> Problem:
    """The problem with the checked losses of a reference model."""
    shape, takes_part = problem.losses_shape(), problem.counted()
    if takes_part is None and problem.measure is not None:
        takes_part = spread(problem.measure, problem.measure.new_empty(shape)) != 0
    reference = check_reference(reference, shape, problem.logits.device, takes_part)
    return problem.changed(reference=reference)


def _units_of_segments(
    given: Given, options: Options, shape: torch.Size, head: LinearHead | None
) -> tuple[Segments, Tensor]:
    """The units, and which targets belong to one; `shape` is that of the targets that are used."""
    if given.target.is_floating_point():
        raise ValueError("segments take class indices, got class probabilities as target")
    shift = head is not None and head.chunking.shift
    places = given.input.shape[:-1] if shift else shape
    found = check_segments(
        given.segments, given.num_segments, options.per, places, given.target.device, shift=shift
    )
    return cast("Any", found)


def targets_shape(shape: torch.Size) -> torch.Size:
    """The shape of the losses of logits: (C,), (N, C) or (N, C, d1, ..., dk) without the class axis."""
    return shape[:1] + shape[2:] if len(shape) > 1 else torch.Size(())


def _check_logits(given: Given) -> torch.Size:
    """Refuse logits and a target that do not fit each other; the shape of the losses."""
    logits, target = given.input, given.target
    if not isinstance(logits, Tensor):
        raise TypeError(no_tensor("input", logits))
    if not isinstance(target, Tensor):
        raise TypeError(no_tensor("target", target))
    for name, tensor in (("input", logits), ("target", target)):
        if tensor.is_nested or tensor.layout is not torch.strided:
            check_dense(name, tensor)
    if target.is_floating_point() and logits.dtype in (*INTEGERS, torch.bool):
        raise DtypeError(
            f"input holds {logits.dtype} and target {target.dtype}, so they look swapped: the logits come "
            "first, loss(logits, target)"
        )
    if logits.dtype not in FLOATS:
        refuse_dtype("input", logits, "hold float logits")
    if logits.dim() == 0:
        raise ValueError("input must have a class axis: shape (C,), (N, C) or (N, C, d1, ..., dk), got ()")
    shape, expected = logits.shape, targets_shape(logits.shape)
    if target.is_floating_point():
        _check_target_dtype(target)
        if target.shape != shape:
            raise MismatchError(
                f"target has shape {tuple(target.shape)} and {target.dtype}: class probabilities must have "
                f"the shape of input, {tuple(shape)}; class indices must be integers"
            )
    elif target.dtype in INTEGERS:
        if target.shape != expected:
            raise MismatchError(
                f"target must have shape {tuple(expected)} for input of shape {tuple(shape)}, "
                f"got {tuple(target.shape)}{_shape_hint(target.shape, shape)}"
            )
    else:
        _check_target_dtype(target)
    _check_device("target", target, logits.device)
    return expected


def _check_hidden(given: Given, head: LinearHead, options: Options) -> None:
    """Refuse a target and settings that do not fit a linear head."""
    input, target = given.input, given.target
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a torch.Tensor, got {type(target).__name__}")
    check_dense("target", target)
    _check_target_dtype(target)
    probabilities, shift, shard = target.is_floating_point(), head.chunking.shift, head.shard
    rows = input.shape[:-1]
    expected = (*rows, head.classes()) if probabilities else tuple(rows)
    if tuple(target.shape) != expected:
        what = "class probabilities" if probabilities else "class indices"
        raise MismatchError(
            f"target holds {what}, which must have shape {expected} for input of shape "
            f"{tuple(input.shape)} and {head.classes()} classes, got {tuple(target.shape)}"
        )
    _check_device("target", target, input.device)
    if shift and input.dim() != 3:
        raise MismatchError(
            f"shift=True needs input of shape (B, T, D), got {tuple(input.shape)}: for one sequence give "
            "input.unsqueeze(0) and target.unsqueeze(0)"
        )
    if probabilities and (shift or shard is not None):
        name = "shift" if shift else "vocab_group"
        raise ValueError(f"{name} takes class indices, got class probabilities as target")
    if shard is not None and options.label_smoothing > 0 and not shard.even:
        raise ValueError(
            "label_smoothing over a vocabulary in slices of different sizes is refused, since slices are "
            "mostly uneven where one is padded, and the padding would get its share of the label: split "
            "the vocabulary evenly, or leave label_smoothing out"
        )


def _check_target_dtype(target: Tensor) -> None:
    if target.dtype not in (FLOATS if target.is_floating_point() else INTEGERS):
        refuse_dtype("target", target, "hold class indices (int64) or class probabilities (floats)")


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"input is on {device} and {name} on {tensor.device}: move both to one device")


def _check_by_class(name: str, numbers: Tensor, classes: int, target: Tensor) -> None:
    if numbers.shape[0] != classes:
        raise MismatchError(
            f"{name} must hold one number for each of the {classes} classes, got {numbers.shape[0]}"
        )
    _check_device(name, numbers, target.device)


def _check_in_place(logits: Tensor, target: Tensor) -> None:
    """Refuse logits that the gradient cannot overwrite."""
    if torch.compiler.is_compiling() or not plain_and_eager((logits, target)):
        raise RuntimeError(
            "inplace=True serves plain tensors in eager calls: leave it out in compiled graphs, which plan "
            "their memory themselves, in torch.func transforms and for tensor subclasses"
        )
    if logits.is_leaf:
        raise ValueError(
            "inplace=True would overwrite logits that are a leaf, a tensor of yours that requires grad: it "
            "is for what a layer has computed"
        )
    if logits.dtype is torch.float16:
        raise ValueError(
            "inplace=True does not serve float16, whose gradient is computed in float32 until the loss "
            "scale is known: use bfloat16, or leave it out"
        )
    if target.is_floating_point() and target.requires_grad:
        raise ValueError("inplace=True does not serve class probabilities that require grad: detach them")
    if target.is_floating_point() and torch.promote_types(target.dtype, logits.dtype) != logits.dtype:
        raise ValueError(
            f"inplace=True needs class probabilities no wider than the logits, {logits.dtype}, got "
            f"{target.dtype}: convert them"
        )


def _shape_hint(target: torch.Size, shape: torch.Size) -> str:
    """A hint about the probable mistake in class indices of a wrong shape."""
    if target == shape and len(shape) == 1:
        return (
            ". For one logit a sample, which says yes or no: "
            'RGDLoss(base=nn.BCEWithLogitsLoss(reduction="none")) with target.float()'
        )
    if target == shape:
        return (
            ". One-hot targets of integers: give class indices, target.argmax(1), or probabilities, "
            "target.float()"
        )
    if len(shape) > 2 and target == shape[:-1]:
        return (
            ". The class axis is the second: for logits of shape (N, T, C) give input.transpose(1, 2)"
            if len(shape) == 3
            else ". The class axis is the second: give input.movedim(-1, 1)"
        )
    return ""


def _shifted(values: Any, places: torch.Size) -> Any:
    """The entries of used targets, of a tensor of the targets' shape; one with an entry a sample stays."""
    if not isinstance(values, Tensor) or values.shape != places:
        return values
    return values[:, 1:]
