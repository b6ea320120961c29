"""The functions behind `RGDLoss`: weights, the re-weighted mean, and the re-weighted cross-entropy."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rgd.torch import _composite, _distributed, _ops
from rgd.torch._backend import autocasts, must_forget
from rgd.torch._checks import (
    REDUCTIONS,
    UNITS,
    check_choice,
    check_class_weight,
    check_classification,
    check_label_smoothing,
    check_losses,
    check_where,
)
from rgd.torch._group import Sync
from rgd.torch._record import Record
from rgd.weightings import Weighting, resolve_weighting


def sample_weights(
    losses: Tensor,
    weighting: Weighting | None = None,
    *,
    tau: float | None = None,
    where: Tensor | None = None,
) -> Tensor:
    """The weight of each sample, a constant to autograd.

    `w_i = exp(scale * min(l_i, tau))` for the default weighting `KL`; see `rgd.KL` and `rgd.KLBall`.

    Args:
        losses: Losses of any shape with at least one axis; float32, float64, float16 or bfloat16.
        weighting: What turns losses into weights; `KL(tau=1.0)` if neither it nor `tau` is given.
        tau: Short for `weighting=KL(tau)`.
        where: Mask, bool, of the losses' shape. A loss where it is False, padding for instance, has weight
            0 and takes no part in the weights of the others, whatever it is.

    Returns:
        Weights of the losses' shape, without grad; float64 for float64 losses, else float32.

    Raises:
        TypeError: If `losses` is not a float tensor, or `where` not a bool tensor.
        ValueError: If `losses` is a scalar, `where` of another shape or device, or both `tau` and
            `weighting` are given.

    Example:
        >>> import torch
        >>> sample_weights(torch.tensor([0.0, 1.0, 9.0]), tau=1.0)
        tensor([1.0000, 1.6487, 1.6487])

    References:
        Kumar et al., arXiv 2306.09222, Algorithm 1.
    """
    check_losses(losses)
    check_where(where, losses)
    return _ops.sample_weights(losses, resolve_weighting(tau, weighting), where)[0]


def reweighted_mean(
    losses: Tensor,
    weighting: Weighting | None = None,
    *,
    tau: float | None = None,
    where: Tensor | None = None,
    process_group: Any = None,
    sync: bool = True,
) -> Tensor:
    """The objective of RGD over any losses: `mean(w * losses)`, `w` constant.

    Args:
        losses: Losses of any shape with at least one axis, of samples, tasks, domains or sequences;
            float32, float64, float16 or bfloat16.
        weighting: What turns losses into weights; `KL(tau=1.0)` if neither it nor `tau` is given.
        tau: Short for `weighting=KL(tau)`.
        where: Mask, bool, of the losses' shape. Only losses where it is True are weighted and averaged. The
            others, be they NaN, reach neither the objective nor the gradient, which is 0 there.
        process_group: With normalised weights or a `KLBall`, the processes that share the batch: the weights
            are those of their losses together, and average to one over these. None: the default group, once
            `torch.distributed` is initialised. Every process of the group then has to make the call, one
            with an empty batch too. Pointwise weights ask no one.
        sync: False for weights of this process's losses alone.

    Returns:
        A scalar of the losses' dtype, differentiable with respect to `losses`. NaN, as `torch.mean` gives,
        where there is no loss, or `where` is all False.

    Raises:
        TypeError: If `losses` is not a float tensor, or `where` not a bool tensor.
        ValueError: If `losses` is a scalar, `where` of another shape or device, or both `tau` and
            `weighting` are given.

    Example:
        >>> import torch
        >>> losses = torch.tensor([0.0, 2.0], requires_grad=True)
        >>> reweighted_mean(losses, tau=1.0).backward()
        >>> losses.grad
        tensor([0.5000, 0.8244])
        >>> padded = torch.tensor([0.0, 2.0, torch.nan])
        >>> reweighted_mean(padded, tau=1.0, where=~padded.isnan())
        tensor(1.6487)

    References:
        Kumar et al., arXiv 2306.09222, Algorithm 1.
    """
    check_losses(losses)
    check_where(where, losses)
    weighting = resolve_weighting(tau, weighting)
    return weighted(losses, weighting, "mean", "element", where, Sync(process_group, sync))[0]


def weighted(  # noqa: PLR0917
    losses: Tensor, weighting: Weighting, reduction: str, per: str, where: Tensor | None, sync: Sync
) -> tuple[Tensor, Record | None]:
    """The reduction of `w * losses`, and the record of the weights, if its tensors may outlive the call."""
    wide = losses.to(_ops.accumulator(losses.dtype))
    if where is not None:
        wide = wide.masked_fill(~where, 0)
    plain = wide.detach()
    of_target = weights = None
    if per == "sample" and plain.dim() > 1:
        units, taking_part = _composite.sample_means(plain, where)
        weights, path = _sample_weights(units, weighting, taking_part, sync)
        weights = weights.to(plain.dtype)
        of_target = weights.view(-1, *[1] * (plain.dim() - 1))
        of_target = of_target if where is None else of_target.masked_fill(~where, 0)
    else:
        weights, path = _sample_weights(plain, weighting, where, sync)
        of_target = weights
    products = wide * of_target
    denominator: float | Tensor = plain.numel() if where is None else where.sum(dtype=plain.dtype)
    if reduction == "mean":
        objective = products.mean() if where is None else products.sum() / denominator
    else:
        objective = products if reduction == "none" else products.sum()
    record = None
    if not must_forget():
        record = Record(plain, weights, denominator, where=where, path=path)
    return objective.to(losses.dtype), record


def _sample_weights(
    losses: Tensor, weighting: Weighting, where: Tensor | None, sync: Sync
) -> tuple[Tensor, str]:
    group = sync.group_for(weighting)
    if group is None:
        return _ops.sample_weights(losses, weighting, where)
    return _distributed.sample_weights(losses, weighting, where, group)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    tau: float | None = None,
    weighting: Weighting | None = None,
    per: str = "element",
    process_group: Any = None,
    sync: bool = True,
) -> Tensor:
    """Re-weighted cross-entropy: `F.cross_entropy` with each target's loss `l_i` weighted by its own `w_i`.

    `l_i` is what `F.cross_entropy(..., reduction="none")` gives, class weight and label smoothing included.
    With `reduction="mean"` the result is `sum_i w_i l_i` over the sum of the class weights of the targets
    not ignored.

    Args:
        logits: Shape (C,), (N, C) or (N, C, d1, ..., dk); float32, float64, float16 or bfloat16.
        target: Class indices (any integer dtype) of the logits' shape without C, or class probabilities of
            the logits' shape.
        weight: Class weights, shape (C,).
        ignore_index: Class index of targets that count for nothing.
        reduction: "none", "mean" or "sum".
        label_smoothing: In [0, 1].
        tau: Short for `weighting=KL(tau)`.
        weighting: What turns losses into weights; `KL(tau=1.0)` if neither it nor `tau` is given.
        per: "element" weights each target by its own loss; "sample" weights all targets of a sample of the
            leading axis by their mean loss, ignored ones left out.
        process_group: As in `reweighted_mean`.
        sync: As in `reweighted_mean`.

    Returns:
        A scalar, or for `reduction="none"` a tensor of the targets' shape. Its dtype is the logits', and
        float32 for half precision under autocast, as for `F.cross_entropy`.

    Raises:
        IndexError: If a class index is out of range.
        TypeError: If a tensor's dtype does not fit.
        ValueError: If a shape or a setting does not fit.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]], requires_grad=True)
        >>> cross_entropy(logits, torch.tensor([0, 1]), tau=1.0)
        tensor(1.8210, grad_fn=...)

    References:
        Kumar et al., arXiv 2306.09222, Algorithm 1.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("per", per, UNITS)
    check_class_weight(weight)
    settings = _ops.CrossEntropySettings(
        resolve_weighting(tau, weighting),
        ignore_index,
        check_label_smoothing(label_smoothing),
        reduction,
        per,
    )
    return classify(logits, target, weight, settings, Sync(process_group, sync))[0]


def classify(
    logits: Tensor, target: Tensor, weight: Tensor | None, settings: _ops.CrossEntropySettings, sync: Sync
) -> tuple[Tensor, Record | None]:
    """The re-weighted cross-entropy for checked settings, and the record of its weights if it may be kept."""
    check_classification(logits, target, weight, settings.ignore_index)
    group = sync.group_for(settings.weighting)
    if group is None:
        objective, record = _ops.cross_entropy(logits, target, weight, settings)
    else:
        objective, record = _distributed.cross_entropy(logits, target, weight, settings, group)
    if objective.dtype != logits.dtype and not autocasts(logits.device.type):
        objective = objective.to(logits.dtype)
    return objective, record
