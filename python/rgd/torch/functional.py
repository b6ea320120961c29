"""The functions behind `RGDLoss`: weights, the re-weighted mean and cross-entropy, statistics."""

from __future__ import annotations

import threading
from typing import Any, cast

import torch
from torch import Tensor

from rgd._extras import check_returns, with_extras
from rgd.stats import WeightStats, clip_of, stats_from_sums
from rgd.torch._checks import (
    check_class_weight,
    check_dense,
    check_logit_adjustment,
    check_losses,
    refuse_dtype,
)
from rgd.torch._distributed import Sync, sync_of
from rgd.torch._dtypes import FLOATS, accumulator, wide
from rgd.torch._measure import (
    check_groups,
    check_reference,
    check_sample_weight,
    check_where,
    measure_of,
    spread,
    units_of,
    within_range,
)
from rgd.torch._modes import autocasts, must_forget, values_can_be_read
from rgd.torch._plan import OfLogits, Plan, Weigher, plan_of
from rgd.torch._problem import Given, Options, Problem, problem_of
from rgd.torch._state import functional_state
from rgd.torch._weighted import mark_weighted, refuse_weighted
from rgd.torch.backends._extras import Extras, extras_by, mean_of_units, take_extras
from rgd.torch.backends._formulas import reduce_losses
from rgd.torch.backends._registry import choose
from rgd.torch.backends.rust import Accepted, accepted, again, plain_objective, plain_weights
from rgd.torch.normalizer import check_normalizer
from rgd.torch.segments import Segments
from rgd.torch.stats import Record, stats_by_group, sums_of, tail_of, times_power
from rgd.weightings import ERM, Weighting
from rgd.weightings._call import (
    check_reference_is_given,
    check_reference_is_read,
    refuse_without_logits,
    resolve_weighting,
)


def sample_weights(
    losses: Tensor,
    weighting: Weighting | None = None,
    *,
    tau: float | None = None,
    scale: float | None = None,
    where: Tensor | None = None,
    sample_weight: Tensor | None = None,
    groups: Tensor | None = None,
    state: Any = None,
    process_group: Any = None,
    sync: bool = True,
    reference: Tensor | None = None,
) -> Any:
    """The weight of each sample, a constant to autograd.

    `w_i = exp(scale * min(l_i, tau))` for the default weighting `KL`; each member of `rgd` says its own.

    Args:
        losses: Losses of any shape with at least one axis; float32, float64, float16 or bfloat16.
        weighting: What turns losses into weights; `KL(tau=1.0)` if neither it nor `tau` nor `scale` is given.
        tau: Short for `weighting=KL(tau, scale=scale)`.
        scale: The dial; short for the same.
        where: Mask, bool, of the losses' shape. A loss where it is False, padding for instance, has weight
            0 and takes no part in the weights of the others, whatever it is.
        sample_weight: The base measure `p`, numbers >= 0, of the losses' shape or (N,). Weightings that
            depend on the batch use it: an integer `p` counts as that many equal samples, 0 as masked out.
            Where values cannot be read without waiting (on a GPU, in a compiled graph), a number that is
            not allowed makes the weights NaN instead of raising.
        groups: The group of each sample, integers of the losses' shape or (N,), for `GroupDRO`.
        state: The state of a weighting that remembers: `weighting.init()`, or what the last call returned.
        process_group: For a weighting that depends on the batch, the processes that share it, as in
            `reweighted_mean`.
        sync: False for weights of this process's losses alone.
        reference: The losses of a reference model, for `rgd.Excess`: of the losses' shape, constants, finite
            wherever a loss takes part. Where values cannot be read without waiting, one that is not makes
            weights NaN instead of raising.

    Returns:
        Weights of the losses' shape (`w`, without `p`), without grad; float64 for float64 losses, else
        float32. With `state`: the weights and the new state.

    Raises:
        TypeError: If `losses` is not a float tensor, or another argument is of the wrong type.
        ValueError: If `losses` is a scalar or weighted already (by an rgd loss with `reduction="none"`), a
            shape or device does not fit, `sample_weight` holds a number that is negative or not finite, both
            `tau` and `weighting` are given, the weighting remembers and `state` is missing, or it is an
            `rgd.Excess` and `reference` is missing, or none and `reference` is given.

    Example:
        >>> import torch
        >>> sample_weights(torch.tensor([0.0, 1.0, 9.0]), tau=1.0)
        tensor([1.0000, 1.6487, 1.6487])

    References:
        Kumar et al., arXiv 2306.09222, Algorithm 1.
    """
    check_losses(losses)
    plan, sharing = plan_of(weighting, tau, scale), sync_of(process_group, sync)
    if plan.needs_entropy:
        refuse_without_logits(plan.weighting)
    simple = where is None and sample_weight is None and groups is None and state is None
    if simple and reference is None and not torch.compiler.is_compiling():
        refuse_weighted(losses, plan.weighting)
        weights = plain_weights(losses, plan, sharing)
        if weights is not None:
            return weights
    measure, power = measure_of(losses.shape, losses, where, sample_weight), 1.0
    members = check_groups(groups, losses.shape, losses.device, "element")
    given = functional_state(plan.weighting, state, losses.device)
    refuse_weighted(losses, plan.weighting)
    if measure is not None and sample_weight is not None:
        measure, power = within_range(measure, measure.dtype, "mean")
    compared = _reference_of(reference, losses, plan.weighting, None if measure is None else measure != 0)
    weigher = Weigher(plan, members, given, sharing, power, reference=compared)
    weights = choose((losses, None, measure)).sample_weights(losses, measure, weigher)
    if measure is not None and not values_can_be_read(measure):
        # A wrong number is NaN in the measure where it cannot raise; a pointwise formula may not see it.
        weights = weights.masked_fill(measure.isnan(), float("nan"))
    return weights if state is None else (weights, weigher.state)


def reweighted_mean(
    losses: Tensor,
    weighting: Weighting | None = None,
    *,
    tau: float | None = None,
    scale: float | None = None,
    where: Tensor | None = None,
    sample_weight: Tensor | None = None,
    groups: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    state: Any = None,
    process_group: Any = None,
    sync: bool = True,
    reference: Tensor | None = None,
) -> Any:
    """The re-weighted objective over any losses, `sum p w l / sum p`: `mean(w * l)` without `sample_weight`.

    Args:
        losses: Losses of any shape with at least one axis, of samples, tasks, domains or sequences;
            float32, float64, float16 or bfloat16.
        weighting: What turns losses into weights; `KL(tau=1.0)` if neither it nor `tau` nor `scale` is given.
        tau: Short for `weighting=KL(tau, scale=scale)`.
        scale: The dial; short for the same.
        where: Mask, bool, of the losses' shape. Only losses where it is True are weighted and averaged. The
            others, be they NaN, reach neither the objective nor the gradient, which is 0 there.
        sample_weight: The base measure `p`, as for `sample_weights`.
        groups: As for `sample_weights`.
        normalizer: What the sum is divided by in the place of `sum p`, as for `cross_entropy`.
        state: As for `sample_weights`.
        process_group: For a weighting that depends on the batch, the processes that share it: the weights
            are those of their losses together. None: the default group, once `torch.distributed` is
            initialised. Every process of the group then has to make the call, one with an empty batch too.
            Pointwise weights ask no one.
        sync: False for weights of this process's losses alone.
        reference: As for `sample_weights`.

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
    plan, sharing = plan_of(weighting, tau, scale), sync_of(process_group, sync)
    if plan.needs_entropy:
        refuse_without_logits(plan.weighting)
    members = check_groups(groups, losses.shape, losses.device, "element")
    weigher = Weigher(plan, members, functional_state(plan.weighting, state, losses.device), sharing)
    objective, _ = reweighted(
        losses, weigher, where=where, sample_weight=sample_weight, normalizer=normalizer, reference=reference
    )
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
    scale: float | None = None,
    weighting: Weighting | None = None,
    per: str = "element",
    logit_adjustment: Tensor | None = None,
    z_loss: float = 0.0,
    where: Tensor | None = None,
    sample_weight: Tensor | None = None,
    groups: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    segments: Tensor | None = None,
    num_segments: int | None = None,
    state: Any = None,
    inplace: bool = False,
    process_group: Any = None,
    sync: bool = True,
    reference: Tensor | None = None,
    returns: tuple[str, ...] = (),
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
        tau: Short for `weighting=KL(tau, scale=scale)`.
        scale: The dial; short for the same.
        weighting: What turns losses into weights; `KL(tau=1.0)` if neither it nor `tau` nor `scale` is given.
        per: "element" weights each target by its own loss; "sample" weights all targets of a sample of the
            leading axis by their mean loss, ignored ones left out.
        logit_adjustment: Numbers `a`, shape (C,), constants: every loss is that of `logits + a`, summed in
            the dtype that losses are computed in, at no pass over the logits more. `rgd.log_prior` makes
            them of class counts; -inf rules a class out.
        z_loss: A number `z` >= 0. The objective then has `p_i w_i l_i + p_i z Z_i^2` for `p_i w_i l_i`, with
            `Z_i` the logsumexp of the logits as adjusted, which keeps them from drifting. Weights and
            statistics see the cross-entropy alone.
        where: Mask, bool, of the targets' shape: a target where it is False counts as ignored, whatever it
            is. With `per="sample"` it has shape (N,).
        sample_weight: The base measure `p`, numbers >= 0, of the targets' shape or (N,); with `per="sample"`
            of shape (N,). As for `sample_weights`.
        groups: As for `sample_weights`; with `per="sample"` of shape (N,).
        normalizer: What "mean" divides by in the place of `sum_i p_i c_{y_i}`, a positive number or a scalar
            tensor, constant: the same for all micro-batches of a step, as `count_targets` gives it. Then
            their objectives add up to that of one big batch, however unequal they are. Where values cannot be
            read without waiting, a number that is not allowed makes the objective NaN instead of raising.
        segments: Which sequence of its row a target belongs to, integers of the targets' shape, with
            `per="sample"`: targets of a row with one number are a unit, adjacent or not, and share a weight,
            that of their mean loss. -1 takes no part. For targets (N,) the call is one row. `where`,
            `sample_weight` and `groups` then have the targets' shape, constant within a segment but for
            `where`, or the units', (B, S). `segments_of` makes them of position ids.
        num_segments: S, how many units a row has. None: the largest number and one more where it can be read
            without waiting, else how many targets a row has.
        state: As for `sample_weights`.
        inplace: True to let the gradient take the place of the logits, which saves a tensor of their size:
            after the call they hold it. For logits that a layer has computed and nothing else reads. What
            autograd kept of them, or a second backward pass where the objective is scaled, is an error then.
        process_group: As in `reweighted_mean`.
        sync: As in `reweighted_mean`.
        reference: The losses of a reference model, for `rgd.Excess`: of the targets' shape, as
            `reduction="none"` with `weighting=rgd.ERM()` gives them; else as for `sample_weights`. With
            `per="sample"` the means over the targets that count are compared.
        returns: What else to return of the logits that the loss is of, with `logit_adjustment`, by name: a
            tuple of "entropy", `-sum_k q_k log q_k` of `q = softmax(logits)`; "logsumexp", the `Z_i` of a
            z-loss; and "correct", whether the class of the target is the first of those with the largest
            logit. For class probabilities that is the first of the most probable. Class weights, label
            smoothing and weights change none of them.

    Returns:
        A scalar, or for `reduction="none"` a tensor of the targets' shape. Its dtype is the logits', and
        float32 for half precision under autocast, as for `F.cross_entropy`. With `state`: that and the new
        state. With `returns`: that and a dict of tensors of the targets' shape, without gradient, 0 where a
        target takes no part: "correct" is bool, the others are in the dtype that losses are computed in. With
        both: `(loss, (extras, state))`.

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
        equation 10. z-loss: Chowdhery et al., "PaLM", arXiv 2204.02311, section 5.
    """
    plan, sharing = plan_of(weighting, tau, scale), sync_of(process_group, sync)
    repeatable = (
        normalizer is None and segments is None and num_segments is None and state is None
        and reference is None and returns == () and not torch.compiler.is_compiling()
    )  # fmt: skip
    known = _last.accepted if repeatable else None
    if known is not None:
        bare = where is None and sample_weight is None and groups is None
        beside = None if bare else (where, sample_weight, groups)
        settings = ignore_index, label_smoothing, reduction, per, inplace, z_loss
        by_class = weight, logit_adjustment
        found = again(
            known, logits, target, beside,
            options=settings, plan=plan, by_class=by_class, sharing=sharing,
        )  # fmt: skip
        if found is not None:
            return found[0]
    class_weight, adjustment = check_class_weight(weight), check_logit_adjustment(logit_adjustment)
    options = Options(ignore_index, label_smoothing, reduction, per, inplace, z_loss).checked()
    memory = functional_state(plan.weighting, state, getattr(logits, "device", None))
    given = Given(
        logits,
        target,
        class_weight,
        adjustment,
        where,
        sample_weight,
        groups,
        normalizer,
        segments,
        num_segments,
        reference,
    )
    problem = problem_of(given, options)
    if returns != () or plan.needs_entropy:
        returns = check_returns(returns)
        problem = wanting(problem, returns, plan)
    weigher = weigher_of(problem, plan, memory, sharing)
    objective, record = compute(problem, weigher)
    if returns:
        return with_extras(objective, found_by(weigher), returns, state, weigher.state)
    if repeatable:
        if plan is _last.plan:
            _last.accepted = accepted(given, problem, plan, record)
        _last.plan = plan
    return objective if state is None else (objective, weigher.state)


class _Last(threading.local):
    """What this thread's last call of `cross_entropy` that went the whole way has left behind.

    Attributes:
        plan: Its weighting. Only a second call with it is taken to begin a series.
        accepted: What the next call of the series must look like, or None.
    """

    plan: Plan | None = None
    accepted: Accepted | None = None


_last = _Last()


def weight_stats(
    losses: Tensor,
    weights: Tensor,
    weighting: Weighting | None = None,
    *,
    where: Tensor | None = None,
    sample_weight: Tensor | None = None,
    groups: Tensor | None = None,
    reference: Tensor | None = None,
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
        reference: The losses of a reference model, which `rgd.Excess` compared with.

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
    measure = measure_of(losses.shape, losses, where, sample_weight)
    if measure is not None and sample_weight is not None:
        measure, _ = within_range(measure, measure.dtype, "mean")
    plain, weights = losses.detach(), weights.detach()
    members = check_groups(groups, losses.shape, losses.device, "element")
    by_group = None if members is None else stats_by_group(plain, weights, measure, members, extras={})
    takes_part = None if measure is None else measure != 0
    compared = _reference_of(reference, plain, ERM() if weighting is None else weighting, takes_part)
    if weighting is not None:
        check_reference_is_given(weighting, reference)
    excess = None if compared is None else plain.to(wide(plain)) - compared.to(wide(plain))
    sums = sums_of(plain, weights, measure, clip_of(weighting), excess)
    return stats_from_sums(sums, weighting, worst_tenth=tail_of(plain, measure), groups=by_group)


def compute(problem: Problem, weigher: Weigher) -> tuple[Tensor, Record | None]:
    """The objective of a problem of logits, and the record of its weights if it may be kept.

    The state after the call and the extras are left in the weigher.
    """
    backend = choose(problem.tensors())
    compute_extras = extras_by(backend) if problem.returns else None
    if compute_extras is not None:
        # Before the gradient may overwrite the logits.
        take_extras(weigher, problem, compute_extras(problem))
    objective, record = backend.cross_entropy(problem, weigher)
    return finished(objective, problem, weigher), record


def wanting(problem: Problem, returns: tuple[str, ...], plan: Plan) -> Problem:
    """The same problem, which wants of its logits what the caller asks for and the weighting needs."""
    needed = ("entropy",) if plan.needs_entropy and "entropy" not in returns else ()
    return problem.changed(returns=(*returns, *needed))


def found_by(weigher: Weigher) -> Extras:
    """The extras of a call that wanted some."""
    return cast("OfLogits", weigher.extras).found


def weigher_of(problem: Problem, plan: Plan, memory: Any, sync: Sync) -> Weigher:
    """What weights the losses of a problem.

    Raises:
        ValueError: If the problem has the losses of a reference model, and the weighting looks at none.
    """
    reference = problem.reference
    if reference is not None:
        check_reference_is_read(plan.weighting)
        reference = mean_of_units(reference, problem.counted(), problem.options.per, problem.segments)
    return Weigher(plan, problem.groups, memory, sync, problem.power, reference=reference)


def _reference_of(
    reference: Any, losses: Tensor, weighting: Weighting, takes_part: Tensor | None
) -> Tensor | None:
    """The losses of a reference model, checked, where they are given and the weighting looks at them."""
    if reference is None:
        return None
    check_reference_is_read(weighting)
    return check_reference(reference, losses.shape, losses.device, takes_part)


def finished(objective: Tensor, problem: Problem, weigher: Weigher) -> Tensor:
    """The objective in the dtype that the caller gets, marked if it holds weighted losses."""
    if objective.dtype != problem.dtype and not autocasts(objective.device.type):
        objective = objective.to(problem.dtype)
    if problem.options.reduction == "none":
        mark_weighted(objective, weigher.plan.weighting)
    return objective


def reweighted(
    losses: Tensor,
    weigher: Weigher,
    *,
    reduction: str = "mean",
    per: str = "element",
    where: Tensor | None = None,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    segments: tuple[Segments, Tensor] | None = None,
    reference: Tensor | None = None,
) -> tuple[Tensor, Record | None]:
    """The reduction of `p w l` for any losses, and the record of the weights if it may be kept.

    The state after the call is left in the weigher.
    """
    refuse_weighted(losses, weigher.plan.weighting)
    bare = where is None and sample_weight is None and normalizer is None and segments is None
    if (
        bare and reference is None and weigher.groups is None and (per == "element" or losses.dim() == 1)
        and not torch.compiler.is_compiling()
    ):  # fmt: skip
        found = plain_objective(losses, weigher.plan, weigher.group, reduction)
        if found is not None:
            return found
    units_of_rows, inside = (None, None) if segments is None else segments
    if units_of_rows is not None:
        per, sample_weight = "element", units_of_rows.given("sample_weight", sample_weight)
        where = units_of_rows.given("where", where)
    if where is not None:
        check_where(where, losses.shape, losses.device)
    if inside is not None:
        where = inside if where is None else where & inside
    measure = given = check_sample_weight(sample_weight, losses.shape, losses.device, per)
    values = losses.to(accumulator(losses.dtype))
    if measure is not None:
        measure, weigher.power = within_range(measure, values.dtype, reduction)
    if normalizer is not None:
        normalizer = check_normalizer(normalizer, reduction, losses.device, weigher.power)
    if where is not None:
        values = values.masked_fill(~where, 0)
    if reference is not None:
        takes_part = where
        if measure is not None:
            counted = spread(measure, values) != 0
            takes_part = counted if where is None else counted & where
        reference = _reference_of(reference, losses, weigher.plan.weighting, takes_part)
        weigher.reference = mean_of_units(cast("Tensor", reference), where, per, units_of_rows)
    if units_of_rows is not None and where is not None:
        units, unit_measure = units_of_rows.units(values, where, measure)
    else:
        units, unit_measure = units_of(values, where, measure, per)
    backend = choose((units, None, unit_measure))
    weights = of_units = backend.sample_weights(units, unit_measure, weigher).to(values.dtype)
    if units_of_rows is not None and where is not None:
        weights = units_of_rows.spread(of_units, where)
    objective, divisor = reduce_losses(
        values, weights, counted=where, measure=measure, reduction=reduction, normalizer=normalizer
    )
    record = None
    if not must_forget():
        if weigher.power != 1.0:
            measure, divisor = given, times_power(divisor, weigher.power)
            normalizer = None if normalizer is None else times_power(normalizer, weigher.power)
        record = Record(
            values.detach(), of_units, divisor, measure, where, weigher.groups, backend.name,
            normalizer=normalizer, segments=units_of_rows, reference=reference,
        )  # fmt: skip
    objective = objective.to(losses.dtype)
    if reduction == "none":
        mark_weighted(objective, weigher.plan.weighting)
    return objective, record
