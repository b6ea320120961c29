"""The functions behind `RGDLoss`: weights, the re-weighted mean and cross-entropy, statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rgd.stats import WeightStats, clip_of, stats_from_sums
from rgd.torch._checks import (
    FLOATS,
    REDUCTIONS,
    UNITS,
    check_base,
    check_choice,
    check_class_weight,
    check_classification,
    check_dense,
    check_flag,
    check_groups,
    check_label_smoothing,
    check_logit_adjustment,
    check_losses,
    check_where,
    in_unit,
    refuse_dtype,
    targets_shape,
)
from rgd.torch._distributed import Sync
from rgd.torch._record import Record, stats_by_group, sums_of, tail_of
from rgd.torch._weigher import Plan, Weigher, functional_state
from rgd.torch._weighted import mark_weighted, refuse_weighted
from rgd.torch.backends import composite as _composite
from rgd.torch.backends._in_place import check_in_place
from rgd.torch.backends._options import Options, accumulator
from rgd.torch.backends._registry import autocasts, choose, must_forget, values_can_be_read
from rgd.weightings import Weighting
from rgd.weightings._call import resolve_weighting


def sample_weights(
    losses: Tensor,
    weighting: Weighting | None = None,
    *,
    tau: float | None = None,
    where: Tensor | None = None,
    sample_weight: Tensor | None = None,
    groups: Tensor | None = None,
    state: Any = None,
    process_group: Any = None,
    sync: bool = True,
) -> Any:
    """The weight of each sample, a constant to autograd.

    `w_i = exp(scale * min(l_i, tau))` for the default weighting `KL`; each member of `rgd` says its own.

    Args:
        losses: Losses of any shape with at least one axis; float32, float64, float16 or bfloat16.
        weighting: What turns losses into weights; `KL(tau=1.0)` if neither it nor `tau` is given.
        tau: Short for `weighting=KL(tau)`.
        where: Mask, bool, of the losses' shape. A loss where it is False, padding for instance, has weight
            0 and takes no part in the weights of the others, whatever it is.
        sample_weight: The base measure `p`, numbers >= 0, of the losses' shape or (N,). Weightings that
            depend on the batch heed it: an integer `p` counts as that many equal samples, 0 as masked out.
            Where values cannot be read without waiting (on a GPU, in a compiled graph), a number that is
            not allowed makes the weights NaN instead of raising.
        groups: The group of each sample, integers of the losses' shape or (N,), for `GroupDRO`.
        state: The state of a weighting that remembers: `weighting.init()`, or what the last call returned.
        process_group: For a weighting that depends on the batch, the processes that share it, as in
            `reweighted_mean`.
        sync: False for weights of this process's losses alone.

    Returns:
        Weights of the losses' shape (`w`, without `p`), without grad; float64 for float64 losses, else
        float32. With `state`: the weights and the new state.

    Raises:
        TypeError: If `losses` is not a float tensor, or another argument is of the wrong type.
        ValueError: If `losses` is a scalar or weighted already (by an rgd loss with `reduction="none"`), a
            shape or device does not fit, `sample_weight` holds a number that is negative or not finite, both
            `tau` and `weighting` are given, or the weighting remembers and `state` is missing.

    Example:
        >>> import torch
        >>> sample_weights(torch.tensor([0.0, 1.0, 9.0]), tau=1.0)
        tensor([1.0000, 1.6487, 1.6487])

    References:
        Kumar et al., arXiv 2306.09222, Algorithm 1.
    """
    check_losses(losses)
    base = base_of(losses.shape, losses, where, sample_weight)
    sharing = Sync(process_group, sync)
    weigher = _weigher(losses, resolve_weighting(weighting, tau), groups, state, sharing)
    refuse_weighted(losses, weigher.plan.kernel)
    if base is not None and sample_weight is not None:
        base, weigher.unit = in_unit(base, base.dtype, "mean")
    weights = choose(losses, base).sample_weights(losses, base, weigher)
    if base is not None and not values_can_be_read(base):
        # `check_base` marks a wrong number by NaN where it cannot raise; a pointwise formula may not see it.
        weights = weights.masked_fill(base.isnan(), float("nan"))
    return weights if state is None else (weights, weigher.state)


def reweighted_mean(
    losses: Tensor,
    weighting: Weighting | None = None,
    *,
    tau: float | None = None,
    where: Tensor | None = None,
    sample_weight: Tensor | None = None,
    groups: Tensor | None = None,
    state: Any = None,
    process_group: Any = None,
    sync: bool = True,
) -> Any:
    """The re-weighted objective over any losses, `sum p w l / sum p`: `mean(w * l)` without `sample_weight`.

    Args:
        losses: Losses of any shape with at least one axis, of samples, tasks, domains or sequences;
            float32, float64, float16 or bfloat16.
        weighting: What turns losses into weights; `KL(tau=1.0)` if neither it nor `tau` is given.
        tau: Short for `weighting=KL(tau)`.
        where: Mask, bool, of the losses' shape. Only losses where it is True are weighted and averaged. The
            others, be they NaN, reach neither the objective nor the gradient, which is 0 there.
        sample_weight: The base measure `p`, as for `sample_weights`.
        groups: As for `sample_weights`.
        state: As for `sample_weights`.
        process_group: For a weighting that depends on the batch, the processes that share it: the weights
            are those of their losses together. None: the default group, once `torch.distributed` is
            initialised. Every process of the group then has to make the call, one with an empty batch too.
            Pointwise weights ask no one.
        sync: False for weights of this process's losses alone.

    Returns:
        A scalar of the losses' dtype, differentiable with respect to `losses`. NaN, as `torch.mean` gives,
        where no loss takes part. A sample of weight 0 adds 0 and has gradient 0, an infinite loss too. With
        `state`: the objective and the new state.

    Raises:
        TypeError, ValueError: As `sample_weights`.

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
    sharing = Sync(process_group, sync)
    weigher = _weigher(losses, resolve_weighting(weighting, tau), groups, state, sharing)
    objective, _ = weighted(losses, weigher, "mean", "element", where, sample_weight)
    return objective if state is None else (objective, weigher.state)


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
    logit_adjustment: Tensor | None = None,
    where: Tensor | None = None,
    sample_weight: Tensor | None = None,
    groups: Tensor | None = None,
    state: Any = None,
    inplace: bool = False,
    process_group: Any = None,
    sync: bool = True,
) -> Any:
    """Re-weighted cross-entropy: `F.cross_entropy` with each target's loss `l_i` weighted by its own `w_i`.

    `l_i` is what `F.cross_entropy(..., reduction="none")` gives, class weight and label smoothing included.
    With `reduction="mean"` the result is `sum_i p_i w_i l_i / sum_i p_i c_{y_i}` over the targets that count,
    with `p` the `sample_weight` and `c` the class weights, ones where they are not given; "sum" is
    `sum_i p_i w_i l_i`, and "none" is `p_i w_i l_i`.

    Unlike in `F.cross_entropy`, a class without mass in the target (a probability or a class weight of 0)
    adds nothing where its logit is -inf: 0 times -inf is 0, not NaN.

    Args:
        logits: Shape (C,), (N, C) or (N, C, d1, ..., dk); float32, float64, float16 or bfloat16.
        target: Class indices (any integer dtype) of the logits' shape without C, or class probabilities of
            the logits' shape.
        weight: Class weights, shape (C,).
        ignore_index: Class index of targets that count for nothing. As in `F.cross_entropy`, the gradient of
            such a row is 0, or NaN where its logits hold NaN.
        reduction: "none", "mean" or "sum".
        label_smoothing: In [0, 1].
        tau: Short for `weighting=KL(tau)`.
        weighting: What turns losses into weights; `KL(tau=1.0)` if neither it nor `tau` is given.
        per: "element" weights each target by its own loss; "sample" weights all targets of a sample of the
            leading axis by their mean loss, ignored ones left out.
        logit_adjustment: Numbers `a`, shape (C,), constants: every loss is that of `logits + a`, summed in
            the dtype that losses are computed in, at no pass over the logits more. `rgd.log_prior` makes
            them of class counts; -inf rules a class out.
        where: Mask, bool, of the targets' shape: a target where it is False counts as ignored, whatever it
            is. With `per="sample"` it has shape (N,).
        sample_weight: The base measure `p`, numbers >= 0, of the targets' shape or (N,); with `per="sample"`
            of shape (N,). As for `sample_weights`.
        groups: As for `sample_weights`; with `per="sample"` of shape (N,).
        state: As for `sample_weights`.
        inplace: True to let the gradient take the place of the logits, which saves a tensor of their size:
            after the call they hold it. For logits that a layer has computed and nothing else reads. What
            autograd kept of them, or a second backward pass where the objective is scaled, is an error then.
        process_group: As in `reweighted_mean`.
        sync: As in `reweighted_mean`.

    Returns:
        A scalar, or for `reduction="none"` a tensor of the targets' shape. Its dtype is the logits', and
        float32 for half precision under autocast, as for `F.cross_entropy`. With `state`: that and the new
        state.

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
        Kumar et al., arXiv 2306.09222, Algorithm 1. Logit adjustment: Menon et al., arXiv 2007.07314,
        equation 10.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("per", per, UNITS)
    weight, logit_adjustment = check_class_weight(weight), check_logit_adjustment(logit_adjustment)
    options = Options(
        ignore_index, check_label_smoothing(label_smoothing), reduction, per, check_flag("inplace", inplace)
    )
    plan = Plan(resolve_weighting(weighting, tau))
    given = functional_state(plan.weighting, state, getattr(logits, "device", None))
    sharing = Sync(process_group, sync)
    objective, _, new = classify(
        logits, target, weight, options, plan, sharing, where, sample_weight, groups, given, logit_adjustment
    )
    return objective if state is None else (objective, new)


def weight_stats(
    losses: Tensor,
    weights: Tensor,
    weighting: Weighting | None = None,
    *,
    where: Tensor | None = None,
    sample_weight: Tensor | None = None,
    groups: Tensor | None = None,
) -> WeightStats:
    """How strongly a batch was re-weighted; waits for the device that the losses are on.

    Args:
        losses: Losses of any shape with at least one axis, floating.
        weights: The weight of each, of the same shape, floating.
        weighting: What the weights came from, which tells the share of clipped losses; None if it is not
            known.
        where: Mask, bool, of the losses' shape: which samples are counted.
        sample_weight: The base measure, as for `sample_weights`.
        groups: The group of each sample, integers >= 0: adds the statistics of each group.

    Returns:
        The statistics, from sums taken in float64 where the device has it.

    Raises:
        TypeError: If `losses` or `weights` is not a float tensor, or `weighting` is no weighting.
        ValueError: If a shape or device does not fit.

    Example:
        >>> import torch, rgd
        >>> losses = torch.tensor([1.0, 1.0, 4.0])
        >>> print(weight_stats(losses, sample_weights(losses), rgd.KL()))
        3 samples: mean loss 2, worst tenth 4, objective 3.297, ESS 3 (100.0%), KL 0, max weight 1.649, ...
    """
    check_losses(losses)
    if weighting is not None:
        weighting = resolve_weighting(weighting)
    if not isinstance(weights, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"weights must be a float torch.Tensor, got {type(weights).__name__}")
    check_dense("weights", weights)
    if weights.dtype not in FLOATS:
        refuse_dtype("weights", weights, "be float32, float64, float16 or bfloat16")
    if weights.shape != losses.shape or weights.device != losses.device:
        raise ValueError(
            f"weights must have the shape and device of losses, {tuple(losses.shape)} on {losses.device}, "
            f"got {tuple(weights.shape)} on {weights.device}"
        )
    base = base_of(losses.shape, losses, where, sample_weight)
    if base is not None and sample_weight is not None:
        base, _ = in_unit(base, base.dtype, "mean")
    plain, weights = losses.detach(), weights.detach()
    members = check_groups(groups, losses.shape, losses.device, "element")
    by_group = None if members is None else stats_by_group(plain, weights, base, members)
    sums = sums_of(plain, weights, base, clip_of(weighting))
    return stats_from_sums(sums, weighting, worst_tenth=tail_of(plain, base), groups=by_group)


def weighted(  # noqa: PLR0917
    losses: Tensor,
    weigher: Weigher,
    reduction: str,
    per: str,
    where: Tensor | None,
    sample_weight: Tensor | None,
) -> tuple[Tensor, Record | None]:
    """The reduction of `p w l`, and the record of the weights, if its tensors may outlive the call."""
    refuse_weighted(losses, weigher.plan.kernel)
    if where is not None:
        check_where(where, losses.shape, losses.device)
    base = check_base(sample_weight, losses.shape, losses.device, per)
    values = losses.to(accumulator(losses.dtype))
    given = base
    if base is not None:
        base, weigher.unit = in_unit(base, values.dtype, reduction)
    if where is not None:
        values = values.masked_fill(~where, 0)
    units, unit_base = _composite.units_of(values, where, base, per)
    backend = choose(units, unit_base)
    weights = backend.sample_weights(units, unit_base, weigher).to(values.dtype)
    objective, denominator = _composite.reduce_losses(values, weights, where, base, reduction)
    record = None
    if not must_forget():
        plain = values.detach()
        record = Record(plain, weights, denominator, base, where, weigher.groups, backend.name)
    objective = objective.to(losses.dtype)
    if reduction == "none":
        mark_weighted(objective, weigher.plan.kernel)
    return objective, in_ones(record, given, weigher.unit)


def classify(  # noqa: PLR0917
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    options: Options,
    plan: Plan,
    sync: Sync,
    where: Tensor | None = None,
    sample_weight: Tensor | None = None,
    groups: Tensor | None = None,
    state: Any = None,
    logit_adjustment: Tensor | None = None,
) -> tuple[Tensor, Record | None, Any]:
    """The re-weighted cross-entropy for checked options, the record if it may be kept, and the state."""
    check_classification(logits, target, class_weight, options.ignore_index)
    if options.inplace and logits.requires_grad and torch.is_grad_enabled():
        check_in_place(logits, target)
    check_logit_adjustment(logit_adjustment, logits)
    adjustment = None if logit_adjustment is None else logit_adjustment.detach()
    given = logits.dtype
    if not target.is_floating_point():
        # An ignore_index that int32 cannot hold would be wrapped into one that it can.
        narrow = target.dtype is torch.int32 and -(2**31) <= options.ignore_index < 2**31
        target = target if narrow or target.dtype is torch.int64 else target.to(torch.int64)
    elif target.dtype != logits.dtype:
        dtype = torch.promote_types(target.dtype, logits.dtype)
        logits, target = logits.to(dtype), target.to(dtype)
    base = None
    if where is not None or sample_weight is not None or groups is not None:
        shape, per = targets_shape(logits), options.per if logits.dim() > 1 else "element"
        base = base_of(shape, logits, where, sample_weight, per)
        groups = check_groups(groups, shape, logits.device, per)
        target = _composite.labels_in_use(target, base, options.ignore_index)
    weigher, full = Weigher(plan, groups, state, sync), base
    if base is not None and sample_weight is not None:
        base, weigher.unit = in_unit(base, accumulator(logits.dtype), options.reduction)
    backend = choose(logits, target, class_weight, base, adjustment)
    objective, record = backend.cross_entropy(
        logits, target, class_weight, base, options, weigher, adjustment
    )
    if objective.dtype != given and not autocasts(logits.device.type):
        objective = objective.to(given)
    if options.reduction == "none":
        mark_weighted(objective, plan.kernel)
    return objective, in_ones(record, full, weigher.unit), weigher.state


def in_ones(record: Record | None, base: Tensor | None, unit: float) -> Record | None:
    """A record whose base measure was measured in a unit, with the one that was given."""
    if record is None or unit == 1.0:
        return record
    denominator = record.denominator
    wide = denominator.double() if isinstance(denominator, Tensor) else denominator
    return record.changed(base=base, denominator=wide * unit)


def _weigher(
    losses: Tensor, weighting: Weighting, groups: Tensor | None, state: Any, sync: Sync | None
) -> Weigher:
    members = check_groups(groups, losses.shape, losses.device, "element")
    return Weigher(Plan(weighting), members, functional_state(weighting, state, losses.device), sync)


def base_of(
    shape: torch.Size, like: Tensor, where: Tensor | None, sample_weight: Tensor | None, per: str = "element"
) -> Tensor | None:
    """The base measure of losses of a shape, of the device and dtype of `like`: one a target or a sample.

    It is 0 where `where` is False; None where both are left out.
    """
    base = check_base(sample_weight, shape, like.device, per)
    if where is None:
        return base
    check_where(where, shape[:1] if per == "sample" else shape, like.device)
    return where.to(accumulator(like.dtype)) if base is None else base.masked_fill(~where, 0)
