"""The whole computation in plain torch operations, for whatever the Rust kernels do not serve.

Weights come from the weightings' own formulas. Nothing here waits for a device: no value is read by the host,
and no shape or branch depends on one.
"""

from __future__ import annotations

from typing import Any, cast

import array_api_compat.torch as xp
import torch
import torch.nn.functional as F
from torch import Tensor

from rgd import _rgd
from rgd._arrays import unit_of
from rgd.torch._distributed import gather
from rgd.torch._modes import is_exporting
from rgd.torch._record import Record
from rgd.torch._weigher import Weigher
from rgd.torch.backends._in_place import Overwritten
from rgd.torch.backends._options import Options, accumulator, wide
from rgd.torch.backends._registry import must_forget, register, values_can_be_read
from rgd.weightings import Batch

NAME = "composite"


class Composite:
    """Plain torch operations: serves every call."""

    name = NAME

    def refusal(self, tensors: tuple[Tensor | None, ...], compiling: bool) -> str | None:
        """None: nothing is refused."""
        return None

    def sample_weights(self, losses: Tensor, base: Tensor | None, weigher: Weigher) -> Tensor:
        """As `weigh`."""
        return weigh(losses, base, weigher)

    def cross_entropy(  # noqa: PLR0917
        self,
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        base: Tensor | None,
        options: Options,
        weigher: Weigher,
        adjustment: Tensor | None = None,
    ) -> tuple[Tensor, Record | None]:
        """The re-weighted objective, in the dtype losses are computed in, and the record of its weights.

        Differentiable with respect to `logits` and class probabilities, any number of times, in either mode.
        """
        in_place = options.inplace and logits.requires_grad and torch.is_grad_enabled()
        given = logits.detach() if in_place else logits
        if not target.is_floating_point():
            check_labels(target, logits.shape[1 if logits.dim() > 1 else 0], options.ignore_index)
        losses, counted = cross_entropy_losses(given, target, class_weight, options, adjustment)
        units, unit_base = units_of(losses, counted, base, options.per)
        weights = weigh(units, unit_base, weigher).to(losses.dtype)
        objective, denominator = reduce(losses, weights, counted, target, class_weight, base, options)
        if in_place:
            factors = factors_of(losses, weights, counted, base, denominator, options.reduction)
            _overwrite(given, target, class_weight, factors, options, adjustment)
            objective = Overwritten.apply(logits, objective)
        if must_forget():
            return objective, None
        record = Record(losses.detach(), weights, denominator, base, counted, weigher.groups, NAME)
        return objective, record


def weigh(losses: Tensor, base: Tensor | None, weigher: Weigher) -> Tensor:
    """The weights of a batch by the weighting's formula; the state after it is left in `weigher`.

    Args:
        losses: Any shape, floating.
        base: The base measure, of the losses' shape, 0 where a loss takes no part; None for ones.
        weigher: The weighting, groups, state, and who shares the batch.

    Returns:
        Weights of the losses' shape, without grad; float64 for float64 losses, else float32.
    """
    dtype = wide(losses)
    flat = losses.detach().reshape(-1).to(dtype)
    mass = None if base is None else base.detach().reshape(-1).to(dtype)
    if mass is not None and weigher.group is None and unit_of(weigher.unit) == 1.0 != weigher.unit:
        mass = mass * weigher.unit  # a formula may count by it: it sees the numbers that were given
    groups = None if weigher.groups is None else weigher.groups.reshape(-1)
    given = tuple(one for one in (flat, mass, groups) if one is not None)
    own = slice(0, flat.shape[0])
    if weigher.group is not None:
        # Other processes may have another unit.
        vectors = [flat, torch.ones_like(flat) if mass is None else mass * weigher.unit]
        vectors += [] if groups is None else [groups]
        (flat, mass, *rest), first = gather(vectors, weigher.group)
        groups = rest[0] if rest else None
        own = slice(first, first + own.stop)
    if flat.shape[0] == 0:
        return losses.detach().to(accumulator(losses.dtype))
    exporting = torch.compiler.is_compiling() and is_exporting()
    in_graph = torch.compiler.is_compiling() and not exporting
    batch = Batch(flat, mass, groups, xp=xp, concrete=values_can_be_read(flat), any_size=exporting)
    weights = weigher.weigh(batch, given, in_graph)
    return weights[own].reshape(losses.shape).to(accumulator(losses.dtype))


def labels_in_use(target: Tensor, base: Tensor | None, ignore_index: int) -> Tensor:
    """Class indices, `ignore_index` where the base measure is 0: what stands there may be no class at all.

    Class probabilities stay as they are.
    """
    if base is None or target.is_floating_point():
        return target
    return target.masked_fill(spread(base, target) == 0, ignore_index)


def cross_entropy_losses(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    options: Options,
    adjustment: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The loss of each target, and, for class indices, which of them are not ignored."""
    logits, smoothing = adjusted(logits, adjustment), options.label_smoothing
    ignore_index = options.ignore_index
    counted = None if target.is_floating_point() else target != ignore_index
    if counted is not None and class_weight is None and smoothing < 1:
        labels = target.to(torch.int64)
        losses = F.cross_entropy(
            logits, labels, ignore_index=ignore_index, reduction="none", label_smoothing=smoothing
        )
        return losses, counted
    # A class may be without mass here, and F.cross_entropy would multiply 0 by -inf.
    axis = min(logits.dim() - 1, 1)
    classes, log_p = logits.shape[axis], F.log_softmax(logits, axis)
    c = logits.new_ones(classes) if class_weight is None else class_weight.detach().to(logits.dtype)
    by_class = _along_classes(c, logits)
    if counted is None:
        mass = target.to(logits.dtype)
        mass = mass * (1 - smoothing) + smoothing / classes if smoothing > 0 else mass
        mass = mass if class_weight is None else mass * by_class
        return -(mass * unless_massless(log_p, mass)).sum(axis), None
    log_p = unless_massless(log_p, by_class)
    losses = log_p.new_zeros(target.shape)
    if smoothing > 0:
        losses = -smoothing / classes * (by_class * log_p).sum(axis)
    if smoothing < 1:
        labels = target.to(torch.int64)
        on_label = F.nll_loss(log_p, labels, c, ignore_index=ignore_index, reduction="none")
        losses = losses + (1 - smoothing) * on_label
    return losses.masked_fill(~counted, 0), counted


def unless_massless(values: Tensor, mass: Tensor) -> Tensor:
    """Logits or their logarithms, and 0 where -inf meets no mass of the target: 0 times -inf is 0."""
    return values.masked_fill((mass == 0) & values.isneginf(), 0)


def check_labels(target: Tensor, classes: int, ignore_index: int, shift: bool = False) -> None:
    """Refuse a class index that takes part and is no class, where values can be read.

    The message names its place in the target that the caller gave, whatever rows a chunk holds.

    Args:
        target: Class indices of the losses' shape, `ignore_index` where a row takes no part.
        classes: How many classes there are.
        ignore_index: The index that is ignored.
        shift: Whether `target` begins with the second position of each sequence.

    Raises:
        IndexError: If there is one.
    """
    if not values_can_be_read(target):
        return
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if not bool(wrong.any()):
        return
    position = cast("list[int]", wrong.nonzero()[0].tolist())  # pyright: ignore[reportUnknownMemberType]
    index = int(target[tuple(position)])
    if shift:
        position[-1] += 1
    raise IndexError(_rgd.label_out_of_range(index, position, classes))


def adjusted(logits: Tensor, adjustment: Tensor | None) -> Tensor:
    """The logits in the dtype losses are computed in, and the adjustment of each class added to them."""
    logits = logits.to(accumulator(logits.dtype))
    if adjustment is None:
        return logits
    return logits + _along_classes(adjustment.detach().to(logits.dtype), logits)


def _along_classes(numbers: Tensor, logits: Tensor) -> Tensor:
    """One number a class, along the class axis of logits."""
    return numbers.view(-1, *[1] * max(logits.dim() - 2, 0))


def units_of(
    losses: Tensor, counted: Tensor | None, base: Tensor | None, per: str
) -> tuple[Tensor, Tensor | None]:
    """What a weight belongs to: the loss of each unit, without grad, and its base measure.

    Args:
        losses: One a target.
        counted: Which targets count; None for all.
        base: The base measure of each unit; None for ones.
        per: "element": a unit is a target; "sample": it is a sample of the leading axis, whose loss is the
            mean over its targets that count.
    """
    plain = losses.detach()
    if per == "sample" and plain.dim() > 1:
        flat = plain.flatten(1).to(wide(plain))
        if counted is None:
            return flat.mean(1), base
        kept = counted.flatten(1)
        number = kept.sum(1)
        plain = flat.masked_fill(~kept, 0).sum(1) / number.clamp(min=1)
        counted = number > 0
    if counted is None:
        return plain, base
    return plain, counted.to(plain.dtype) if base is None else base.masked_fill(~counted, 0)


def reduce(  # noqa: PLR0917
    losses: Tensor,
    weights: Tensor,
    counted: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    base: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor | float]:
    """The objective of given weights, and what "mean" divides by."""
    shares = shares_of(target, class_weight, counted, losses.dtype)
    return reduce_losses(losses, weights, counted, base, options.reduction, shares)


def reduce_losses(  # noqa: PLR0917
    losses: Tensor,
    weights: Tensor,
    counted: Tensor | None,
    base: Tensor | None,
    reduction: str,
    shares: Tensor | None = None,
) -> tuple[Tensor, Tensor | float]:
    """`sum p w l` reduced, and what "mean" divides by: `sum p c` with `c` the `shares`, or ones.

    Weights and base are one a target, or one a sample of the leading axis.
    """
    p = None if base is None else spread(base.detach().to(losses.dtype), losses)
    products = product(spread(weights, losses), losses)
    if p is not None:
        products = (p * products).masked_fill(p == 0, 0)
    if counted is not None:
        products = products.masked_fill(~counted, 0)
    denominator = mass_of(losses, counted, p, shares)
    if reduction == "none":
        return products, denominator
    if reduction == "sum":
        return products.sum(), denominator
    if reduction == "mean":
        return mean_of(products.sum(), denominator), denominator
    raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")


def mean_of(total: Tensor, denominator: Tensor | float) -> Tensor:
    """The quotient, NaN over no mass, whatever the total is, as in `nn.CrossEntropyLoss`."""
    if isinstance(denominator, Tensor):
        denominator = denominator.masked_fill(denominator == 0, float("nan"))
    return total / denominator


def mass_of(
    losses: Tensor, counted: Tensor | None, p: Tensor | None, shares: Tensor | None
) -> Tensor | float:
    """What "mean" divides by: `sum p c` over the targets that count, with `c` the `shares`, or ones."""
    if counted is None and p is None and shares is None:
        return float(losses.numel())
    mass = torch.ones_like(losses) if shares is None else shares
    mass = mass.detach() if p is None else mass.detach() * p
    return (mass if counted is None else mass.masked_fill(~counted, 0)).sum()


def shares_of(
    target: Tensor, class_weight: Tensor | None, counted: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """The class weight of each target's class; None where "mean" counts every target alike."""
    if class_weight is None or counted is None:
        return None
    return class_weight.detach().to(dtype)[target.to(torch.int64).masked_fill(~counted, 0)]


def factors_of(  # noqa: PLR0917
    losses: Tensor,
    weights: Tensor,
    counted: Tensor | None,
    base: Tensor | None,
    denominator: Tensor | float,
    reduction: str,
) -> Tensor:
    """What multiplies each loss in the objective, of the losses' shape; 0 where a target takes no part."""
    factors = spread(weights, losses).expand(losses.shape)
    left_out = torch.zeros_like(losses, dtype=torch.bool) if counted is None else ~counted
    if base is not None:
        p = spread(base.detach().to(losses.dtype), losses).expand(losses.shape)
        factors, left_out = factors * p, left_out | (p == 0)
    factors = mean_of(factors, denominator) if reduction == "mean" else factors
    return factors.masked_fill(left_out, 0)


def _overwrite(  # noqa: PLR0917
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    factors: Tensor,
    options: Options,
    adjustment: Tensor | None,
) -> None:
    """Write the gradient of `sum_i factors_i l_i` over logits of any shape."""
    classes = logits.shape[0 if logits.dim() == 1 else 1]
    rows = logits if logits.dim() < 3 else logits.movedim(1, -1)
    labels = target if not target.is_floating_point() or target.dim() < 3 else target.movedim(1, -1)
    labels = labels.reshape(-1) if not target.is_floating_point() else labels.reshape(-1, classes)
    found = gradient(
        adjusted(rows.reshape(-1, classes), adjustment), labels, class_weight, factors.reshape(-1), options
    )
    rows.copy_(found.view(rows.shape))


def gradient(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, factors: Tensor, options: Options
) -> Tensor:
    """The gradient of `sum_i factors_i l_i` with respect to logits, as one formula.

    With `t` the mass of a target over the classes it is `factors ((sum_k t_k) softmax(x) - t)`.

    Args:
        logits: (n, C).
        target: Class indices, (n,), or probabilities, (n, C).
        class_weight: (C,), or None.
        factors: (n,), 0 for rows that take no part, whose gradient is 0 whatever they hold.
        options: The options of the cross-entropy.

    Returns:
        The gradient, (n, C), in the accumulator's dtype.
    """
    dtype, classes = accumulator(logits.dtype), logits.shape[1]
    smoothing = options.label_smoothing
    c = None if class_weight is None else class_weight.to(dtype)
    softmax = torch.softmax(logits.to(dtype), 1)
    if target.is_floating_point():
        mass = target.to(dtype) * (1 - smoothing) + smoothing / classes
        mass = mass if c is None else mass * c
        rows = softmax * mass.sum(1, keepdim=True) - mass
    else:
        labels = target.to(torch.int64).masked_fill(factors == 0, 0).unsqueeze(1)
        on_label = torch.full_like(factors, 1 - smoothing) if c is None else (1 - smoothing) * c[labels[:, 0]]
        if smoothing == 0:
            rows = softmax * on_label.unsqueeze(1)
        else:
            soft = softmax.new_ones(classes) if c is None else c
            soft = soft * (smoothing / classes)
            rows = softmax * (on_label + soft.sum()).unsqueeze(1) - soft
        rows = rows.scatter_add(1, labels, -on_label.unsqueeze(1))
    return (rows * factors.unsqueeze(1)).masked_fill((factors == 0).unsqueeze(1), 0)


def product(weights: Tensor, losses: Tensor) -> Tensor:
    """`w * l`, where a weight of 0 makes product and gradient 0, for an infinite loss too; NaN stays NaN."""
    return weights * losses.masked_fill((weights == 0) & ~losses.isnan(), 0)


def spread(values: Tensor, losses: Tensor) -> Tensor:
    """Values of targets as they are, those of samples along all their targets."""
    return values.view(-1, *[1] * (losses.dim() - 1)) if losses.dim() > values.dim() else values


composite: Any = Composite()
register(composite)
