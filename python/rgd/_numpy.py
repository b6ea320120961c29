"""The NumPy front: weights, the re-weighted mean and statistics of any CPU array that supports DLPack."""

from __future__ import annotations

import math
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from rgd import _rgd
from rgd._arrays import (
    Source,
    SupportsDLPack,
    available_cores,
    read,
    read_groups,
    read_mask,
    read_measure,
    read_normalizer,
    read_reference,
)
from rgd._by_kernel import ByKernel
from rgd.stats import WeightStats, WeightSums, clip_of, group_stats, stats_from_sums, worst_tenth
from rgd.weightings import ERM, Batch, Weighting
from rgd.weightings._call import (
    check_reference_is_given,
    check_reference_is_read,
    kernel_of,
    map_state,
    refuse_without_logits,
    require_state,
    resolve_weighting,
    step_kernel_of,
    weigh,
)

_Array = TypeVar("_Array", bound=SupportsDLPack)
_Measure = npt.NDArray[np.float64] | None


@overload
def sample_weights(
    losses: npt.NDArray[np.float64],
    weighting: Weighting | None = None,
    *,
    tau: float | None = None,
    scale: float | None = None,
    where: Any = None,
    sample_weight: Any = None,
    groups: Any = None,
    reference: Any = None,
) -> npt.NDArray[np.float64]: ...
@overload
def sample_weights(
    losses: npt.NDArray[np.float32 | np.float16],
    weighting: Weighting | None = None,
    *,
    tau: float | None = None,
    scale: float | None = None,
    where: Any = None,
    sample_weight: Any = None,
    groups: Any = None,
    reference: Any = None,
) -> npt.NDArray[np.float32]: ...
@overload
def sample_weights(
    losses: _Array,
    weighting: Weighting | None = None,
    *,
    tau: float | None = None,
    scale: float | None = None,
    where: Any = None,
    sample_weight: Any = None,
    groups: Any = None,
    reference: Any = None,
) -> _Array: ...
@overload
def sample_weights(
    losses: Any,
    weighting: Weighting | None = None,
    *,
    tau: float | None = None,
    scale: float | None = None,
    where: Any = None,
    sample_weight: Any = None,
    groups: Any = None,
    state: Any,
    reference: Any = None,
) -> tuple[Any, Any]: ...
def sample_weights(
    losses: Any,
    weighting: Weighting | None = None,
    *,
    tau: float | None = None,
    scale: float | None = None,
    where: Any = None,
    sample_weight: Any = None,
    groups: Any = None,
    state: Any = None,
    reference: Any = None,
) -> Any:
    """The weight of each sample: `w_i = exp(scale * min(l_i, tau))` for `KL`; each member has its formula.

    The losses are read in place. A pointwise weight depends on its own loss alone: splitting a batch does not
    change a bit of it.

    Args:
        losses: One loss a sample: float64, float32, float16 or bfloat16, of any shape but (), any strides. A
            NumPy array, a torch tensor or JAX array on the CPU, or any other CPU array (or capsule) that
            supports DLPack.
        weighting: Turns losses into weights; `KL(tau=1.0)` if neither this nor `tau` nor `scale` is given.
            One that depends on the batch takes all the elements together.
        tau: Short for `weighting=KL(tau)`.
        scale: Short for `weighting=KL(scale=scale)`; with `tau`, for `KL(tau, scale=scale)`.
        where: Mask, bool, of the losses' shape. A loss where it is False has weight 0 and does not change the
            weights of the others, even if it is NaN.
        sample_weight: The measure `p`, numbers >= 0: of the losses' shape, or (N,) for the leading axis.
            Weightings that depend on the batch use it: an integer `p` counts as that many equal samples, 0
            as masked out.
        groups: The group of each sample, integers of the losses' shape or (N,), for `GroupDRO`.
        state: The state of a weighting that remembers: what `weighting.init()` or the last call returned.
        reference: The losses of a reference model, for `Excess`: of the losses' shape, finite wherever a loss
            takes part.

    Returns:
        Weights of the losses' shape (`w`, without `p`), as the kind of array that was given (NumPy for a
        capsule): float64 for float64 losses, else float32. A NaN loss has a NaN weight, and so have all
        losses of its batch where weights depend on the batch. With `state`: the weights and the new state.

    Raises:
        TypeError: If `losses` is no array of floating numbers, or another argument is of the wrong type.
        ValueError: If `losses` is a scalar (already reduced), on another device than the CPU, requires grad,
            or is a capsule already consumed; if a shape does not fit; if `sample_weight` holds a number that
            is negative or not finite; if `tau` is not positive, or `scale` not finite; if `tau` or `scale` is
            given beside `weighting`; if the weighting remembers and `state` is missing; if it is an `Excess`
            and `reference` is missing, or none and `reference` is given.

    Example:
        >>> import numpy as np, rgd
        >>> rgd.sample_weights(np.array([0.0, 1.0, 5.0]), rgd.KL(tau=1.0)).round(4)
        array([1.    , 1.6487, 1.6487])
        >>> rgd.sample_weights(np.array([0.0, 1.0, 5.0]), rgd.KL(tau=1.0, normalize=True)).round(4)
        array([0.6981, 1.151 , 1.151 ])
        >>> rgd.sample_weights(np.array([0.0, 1.0, 5.0]), scale=-0.7).round(4)
        array([1.    , 0.4966, 0.0302])

    References:
        Kumar et al., arXiv 2306.09222, Algorithm 1; Proposition 3.1 and section 3 for the other KL members.
    """
    weighting = resolve_weighting(weighting, tau, scale)
    require_state(weighting, state)
    source = read("losses", losses)
    measure = _measure_of(source, where, sample_weight)
    compared = _reference_of(reference, source, weighting, measure)
    members = read_groups(groups, source.shape)
    weights, new = _weights(source, weighting, measure, members, state, reference=compared)
    return source.restore(weights) if state is None else (source.restore(weights), new)


def reweighted_mean(
    losses: SupportsDLPack,
    weighting: Weighting | None = None,
    *,
    tau: float | None = None,
    scale: float | None = None,
    where: Any = None,
    sample_weight: Any = None,
    groups: Any = None,
    normalizer: float | None = None,
    state: Any = None,
    reference: Any = None,
) -> Any:
    """The re-weighted objective, `sum_i p_i w_i l_i / sum_i p_i`: without `sample_weight`, `mean(w * l)`.

    Args:
        losses: One loss a sample, as for `sample_weights`.
        weighting: As for `sample_weights`.
        tau: As for `sample_weights`.
        scale: As for `sample_weights`.
        where: As for `sample_weights`.
        sample_weight: As for `sample_weights`.
        groups: As for `sample_weights`.
        normalizer: A positive number that the sum is divided by instead of `sum_i p_i`. If it is the sum over
            all micro-batches of a step, their objectives add up to that of one big batch.
        state: As for `sample_weights`.
        reference: As for `sample_weights`.

    Returns:
        A Python float, summed in float64 for any dtype of the losses. NaN if no loss takes part. A sample of
        weight 0 adds 0, even if its loss is infinite. With `state`: the objective and the new state.

    Raises:
        TypeError, ValueError: As `sample_weights`.

    Example:
        >>> import numpy as np, rgd
        >>> losses = np.array([0.0, 2.0])
        >>> rgd.reweighted_mean(losses, rgd.ERM())
        1.0
        >>> round(rgd.reweighted_mean(losses, tau=1.0), 6)
        1.648721
        >>> rgd.reweighted_mean(losses, rgd.ERM(), sample_weight=np.array([1, 3]))
        1.5

    References:
        Kumar et al., arXiv 2306.09222, Algorithm 1.
    """
    weighting = resolve_weighting(weighting, tau, scale)
    require_state(weighting, state)
    source = read("losses", losses)
    count = read_normalizer(normalizer)
    measure = _measure_of(source, where, sample_weight, scaled=count is None)
    compared = _reference_of(reference, source, weighting, measure)
    members = read_groups(groups, source.shape)
    weights, new = _weights(source, weighting, measure, members, state, reference=compared)
    if count is None:
        count = math.prod(source.shape) if measure is None else float(np.sum(measure))
    objective = math.nan
    if count:
        objective = _rgd.weighted_sum(source.values, weights, measure, available_cores()) / count
    return objective if state is None else (objective, new)


def weight_stats(
    losses: SupportsDLPack,
    weights: SupportsDLPack,
    weighting: Weighting | None = None,
    *,
    where: Any = None,
    sample_weight: Any = None,
    groups: Any = None,
    reference: Any = None,
) -> WeightStats:
    """How strongly a batch was re-weighted: effective sample size, KL to uniform and more of `WeightStats`.

    Args:
        losses: One loss a sample, as for `sample_weights`.
        weights: The weight of each, of the same shape; any floating dtype.
        weighting: The weighting that made the weights, for the share of clipped losses; None if it is not
            known.
        where: Mask, as for `sample_weights`: which samples are counted.
        sample_weight: The measure, as for `sample_weights`.
        groups: The group of each sample, integers >= 0 of the losses' shape or (N,): adds the statistics of
            each group.
        reference: The losses of a reference model, which `Excess` compared with.

    Returns:
        The statistics, from sums taken in float64.

    Raises:
        TypeError: If `losses` or `weights` is no array of floating numbers, or `weighting` is no weighting.
        ValueError: If the shapes differ, or one of the arrays is refused by `sample_weights`.

    Example:
        >>> import numpy as np, rgd
        >>> losses = np.array([1.0, 1.0, 4.0])
        >>> stats = rgd.weight_stats(losses, rgd.sample_weights(losses, rgd.KLBall(radius=0.2)))
        >>> round(stats.kl_to_uniform, 6), round(stats.effective_sample_size, 3)
        (0.2, 2.094)
        >>> rgd.weight_stats(losses, np.ones(3), groups=np.array([0, 1, 1])).groups.mean_loss
        (1.0, 2.5)
    """
    if weighting is not None:
        weighting = resolve_weighting(weighting)
    loss_source, weight_source = read("losses", losses), read("weights", weights)
    if loss_source.shape != weight_source.shape:
        raise ValueError(
            f"weights must have the shape of losses, {loss_source.shape}, got {weight_source.shape}: "
            "pass the losses that the weights were made from"
        )
    measure = _measure_of(loss_source, where, sample_weight)
    sums = _rgd.weight_sums(
        loss_source.values, weight_source.values, measure, clip_of(weighting), available_cores()
    )
    chosen = ERM() if weighting is None else weighting
    check_reference_is_given(chosen, reference)
    if (compared := _reference_of(reference, loss_source, chosen, measure)) is not None:
        excess = np.subtract(_wide(loss_source), compared)
        by_excess = excess, np.ones(excess.shape), measure, clip_of(weighting), available_cores()
        sums["clipped"] = _rgd.weight_sums(*by_excess)["clipped"]
    members = read_groups(groups, loss_source.shape)
    by_group = None
    if members is not None:
        by_group = group_stats(_wide(loss_source), _wide(weight_source), measure, members)
    tail = worst_tenth(_wide(loss_source), measure)
    return stats_from_sums(WeightSums(**sums), weighting, worst_tenth=tail, groups=by_group)


def _measure_of(source: Source, where: Any, sample_weight: Any, *, scaled: bool = True) -> _Measure:
    """The measure, 0 where `where` is False; None where both are left out."""
    mask = read_mask(where, source.shape)
    numbers = read_measure(sample_weight, source.shape, scaled=scaled)
    if mask is None:
        return numbers
    return mask.astype(np.float64) if numbers is None else np.where(mask, numbers, 0.0)


def _reference_of(reference: Any, source: Source, weighting: Weighting, measure: _Measure) -> Any:
    """The losses of a reference model in float64, if they are given and the weighting uses them."""
    if reference is None:
        return None
    check_reference_is_read(weighting)
    return read_reference(reference, source.shape, None if measure is None else measure != 0)


def _weights(
    source: Source, weighting: Weighting, measure: _Measure, groups: Any, state: Any, *, reference: Any
) -> tuple[npt.NDArray[Any], Any]:
    weights = np.empty(source.shape, source.dtype)
    kernel = kernel_of(weighting)
    if kernel is not None:
        _rgd.sample_weights(source.values, weights, *kernel, available_cores(), measure)
        return weights, state
    refuse_without_logits(weighting)
    if state is not None:
        state = map_state(np.asarray, state)
    if weights.size:
        import array_api_compat.numpy as xp  # noqa: PLC0415 - slow to import, and not needed by kernels

        batch = Batch(
            _wide(source).ravel(),
            None if measure is None else measure.ravel(),
            None if groups is None else groups.ravel(),
            xp=xp,
            concrete=True,
            reference=None if reference is None else reference.ravel(),
        )
        kernel = step_kernel_of(weighting)
        computing = weighting if kernel is None else ByKernel(weighting, kernel, available_cores())
        with np.errstate(all="ignore"):
            computed, state = weigh(computing, batch, state)
            weights[...] = computed.reshape(source.shape)
    return weights, state


def _wide(source: Source) -> npt.NDArray[np.float64]:
    """The values in float64."""
    wide = np.empty(source.shape)
    _rgd.widen(source.values, wide, available_cores())
    return wide
