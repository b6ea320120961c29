"""The cross-entropy in torch operations: losses, the objective of given weights, and the gradient.

Nothing here waits for a device: the host reads no value, and no shape or branch depends on one. Only
`check_labels` reads values, if it can without waiting.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rgd import _rgd
from rgd.torch._dtypes import accumulator
from rgd.torch._measure import spread
from rgd.torch._modes import values_can_be_read
from rgd.torch._problem import Problem


def check_labels(problem: Problem) -> None:
    """Refuse a class index that takes part and is no class, if values can be read.

    The message names its position in the caller's target, also if the problem is a chunk of it.

    Raises:
        IndexError: If there is one.
    """
    target, classes = problem.target, problem.classes()
    if not problem.has_labels() or not values_can_be_read(target):
        return
    wrong = ((target < 0) | (target >= classes)) & (target != problem.options.ignore_index)
    if not bool(wrong.any()):
        return
    position = cast("list[int]", wrong.nonzero()[0].tolist())  # pyright: ignore[reportUnknownMemberType]
    index = int(target[tuple(position)])
    if problem.head is not None and problem.head.chunking.shift:
        position[-1] += 1
    raise IndexError(_rgd.label_out_of_range(index, position, classes))


def losses_of(problem: Problem) -> Tensor:
    """The loss of each target, 0 for an ignored one. The problem has logits, and no linear head."""
    options, target, class_weight = problem.options, problem.target, problem.class_weight
    logits, smoothing = adjusted(problem.logits, problem.adjustment), options.label_smoothing
    if problem.has_labels() and class_weight is None and smoothing < 1:
        return F.cross_entropy(
            logits,
            target.to(torch.int64),
            ignore_index=options.ignore_index,
            reduction="none",
            label_smoothing=smoothing,
        )
    # A class may have no mass here, and F.cross_entropy would multiply 0 by -inf.
    axis = min(logits.dim() - 1, 1)
    classes, log_p = logits.shape[axis], F.log_softmax(logits, axis)
    c = logits.new_ones(classes) if class_weight is None else class_weight.detach().to(logits.dtype)
    by_class = _along_classes(c, logits)
    if not problem.has_labels():
        mass = target.to(logits.dtype)
        mass = mass * (1 - smoothing) + smoothing / classes if smoothing > 0 else mass
        mass = mass if class_weight is None else mass * by_class
        return -(mass * unless_massless(log_p, mass)).sum(axis)
    log_p = unless_massless(log_p, by_class)
    losses = log_p.new_zeros(target.shape)
    if smoothing > 0:
        losses = -smoothing / classes * (by_class * log_p).sum(axis)
    if smoothing < 1:
        on_label = F.nll_loss(
            log_p, target.to(torch.int64), c, ignore_index=options.ignore_index, reduction="none"
        )
        losses = losses + (1 - smoothing) * on_label
    return losses.masked_fill(~cast("Tensor", problem.counted()), 0)


def logsumexp_of(problem: Problem) -> Tensor:
    """The logsumexp `Z` of each target's adjusted logits, for a z-loss; 0 for an ignored target."""
    logits = adjusted(problem.logits, problem.adjustment)
    found = torch.logsumexp(logits, min(logits.dim() - 1, 1))
    counted = problem.counted()
    return found if counted is None else found.masked_fill(~counted, 0)


def unless_massless(values: Tensor, mass: Tensor) -> Tensor:
    """Logits or log-probabilities, with 0 for -inf in classes without mass, so that 0 times -inf is 0."""
    return values.masked_fill((mass == 0) & values.isneginf(), 0)


def adjusted(logits: Tensor, adjustment: Tensor | None) -> Tensor:
    """The logits in the dtype in which losses are computed, plus the adjustment of each class."""
    logits = logits.to(accumulator(logits.dtype))
    if adjustment is None:
        return logits
    return logits + _along_classes(adjustment.detach().to(logits.dtype), logits)


def _along_classes(numbers: Tensor, logits: Tensor) -> Tensor:
    """One number a class, in a shape that broadcasts along the class axis of logits."""
    return numbers.view(-1, *[1] * max(logits.dim() - 2, 0))


def objective_of(
    problem: Problem, losses: Tensor, weights: Tensor, logsumexp: Tensor | None = None
) -> tuple[Tensor, Tensor | float]:
    """The objective of given weights, and the `sum p c` of the targets; `logsumexp` is for a z-loss."""
    return reduce_losses(
        losses,
        weights,
        counted=problem.counted(),
        measure=problem.measure,
        reduction=problem.options.reduction,
        shares=shares_of(problem, losses.dtype),
        extra=None if logsumexp is None else problem.options.z_loss * logsumexp.square(),
        normalizer=problem.normalizer,
    )


def reduce_losses(
    losses: Tensor,
    weights: Tensor,
    *,
    counted: Tensor | None,
    measure: Tensor | None,
    reduction: str,
    shares: Tensor | None = None,
    extra: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> tuple[Tensor, Tensor | float]:
    """`sum p (w l + e)` reduced, and `sum p c` with `c` the `shares`, or ones.

    Weights and measure are one a target, or one a sample of the leading axis; `e` is `extra`, or 0. "mean"
    divides by the `normalizer`, or without one by `sum p c`.
    """
    p = None if measure is None else spread(measure.detach().to(losses.dtype), losses)
    products = product(spread(weights, losses), losses)
    if extra is not None:
        products = products + extra
    if p is not None:
        products = (p * products).masked_fill(p == 0, 0)
    if counted is not None:
        products = products.masked_fill(~counted, 0)
    divisor = divisor_of(losses, counted, p, shares)
    if reduction == "none":
        return products, divisor
    if reduction == "sum":
        return products.sum(), divisor
    if reduction == "mean":
        return mean_of(products.sum(), divisor if normalizer is None else normalizer), divisor
    raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")


def mean_of(total: Tensor, divisor: Tensor | float) -> Tensor:
    """The quotient; NaN if the divisor is 0, for any total, as in `nn.CrossEntropyLoss`."""
    if isinstance(divisor, Tensor):
        divisor = divisor.masked_fill(divisor == 0, float("nan")).to(total.dtype)
    return total / divisor


def divisor_of(
    losses: Tensor, counted: Tensor | None, p: Tensor | None, shares: Tensor | None
) -> Tensor | float:
    """The divisor of "mean": `sum p c` over the targets that count, with `c` the `shares`, or ones."""
    if counted is None and p is None and shares is None:
        return float(losses.numel())
    total = torch.ones_like(losses) if shares is None else shares
    total = total.detach() if p is None else total.detach() * p
    return (total if counted is None else total.masked_fill(~counted, 0)).sum()


def shares_of(problem: Problem, dtype: torch.dtype) -> Tensor | None:
    """The class weight of each target's class; None if "mean" counts every target as one."""
    class_weight, counted = problem.class_weight, problem.counted()
    if class_weight is None or counted is None:
        return None
    return class_weight.detach().to(dtype)[problem.target.to(torch.int64).masked_fill(~counted, 0)]


def factors_of(
    losses: Tensor,
    weights: Tensor,
    counted: Tensor | None,
    measure: Tensor | None,
    divisor: Tensor | float | None = None,
) -> Tensor:
    """The factor of each loss in the objective, of the losses' shape; 0 where a target takes no part.

    Without a divisor it is the factor in the weighted sum.
    """
    factors = spread(weights, losses).expand(losses.shape)
    left_out = torch.zeros_like(losses, dtype=torch.bool) if counted is None else ~counted
    if measure is not None:
        p = spread(measure.detach().to(losses.dtype), losses).expand(losses.shape)
        factors, left_out = factors * p, left_out | (p == 0)
    factors = factors if divisor is None else mean_of(factors, divisor)
    return factors.masked_fill(left_out, 0)


def z_factors_of(problem: Problem, like: Tensor, divisor: Tensor | float | None = None) -> Tensor | None:
    """The factor of the squared logsumexp of each target in the objective, of the shape of `like`.

    None without a z-loss. Without a divisor it is the factor in the sum.
    """
    z_loss = problem.options.z_loss
    if z_loss == 0.0:
        return None
    constant = torch.full_like(like, z_loss)
    return factors_of(like, constant, problem.counted(), problem.measure, divisor)


def gradient_of(problem: Problem, factors: Tensor, z_factors: Tensor | None = None) -> Tensor:
    """The gradient of `sum_i factors_i l_i + z_factors_i Z_i^2` with respect to rows of logits.

    With `t` the mass of a target over the classes, the gradient of the first part is
    `factors ((sum_k t_k) softmax(x) - t)`, and that of the second `2 z_factors Z softmax(x)`.

    Args:
        problem: Logits (n, C), and class indices, (n,), or probabilities, (n, C).
        factors: (n,), 0 for rows that take no part. The gradient of these rows is 0, even if they hold NaN.
        z_factors: (n,), likewise; None for zeros.

    Returns:
        The gradient, (n, C), in the accumulator's dtype.
    """
    logits, target = adjusted(problem.logits, problem.adjustment), problem.target
    dtype, classes = logits.dtype, logits.shape[1]
    smoothing = problem.options.label_smoothing
    c = None if problem.class_weight is None else problem.class_weight.to(dtype)
    softmax = torch.softmax(logits, 1)
    if not problem.has_labels():
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
    rows = (rows * factors.unsqueeze(1)).masked_fill((factors == 0).unsqueeze(1), 0)
    if z_factors is None:
        return rows
    by_z = 2 * (z_factors * torch.logsumexp(logits, 1)).unsqueeze(1) * softmax
    return rows + by_z.masked_fill((z_factors == 0).unsqueeze(1), 0)


def product(weights: Tensor, losses: Tensor) -> Tensor:
    """`w * l`; a weight of 0 makes product and gradient 0, even if the loss is infinite; NaN stays NaN."""
    return weights * losses.masked_fill((weights == 0) & ~losses.isnan(), 0)


def differentiable_gradient(problem: Problem, weights: Tensor, above: Tensor) -> Tensor:
    """The gradient of the objective times `above`, itself differentiable; the weights stay constant."""
    with torch.enable_grad():
        logsumexp = logsumexp_of(problem) if problem.options.z_loss else None
        objective, _ = objective_of(problem, losses_of(problem), weights, logsumexp)
        (gradient,) = torch.autograd.grad(objective, problem.logits, above, create_graph=True)
    return gradient
