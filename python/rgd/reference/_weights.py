"""The weights of losses and their objective, made of the equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rgd.reference._arrays import array_of, measure_of, one_a_sample, per_sample, product, quotient
from rgd.reference._equations import Batch, State, step
from rgd.weightings import Weighting


def sample_weights(
    losses: npt.ArrayLike,
    weighting: Weighting,
    where: npt.ArrayLike | None = None,
    *,
    sample_weight: npt.ArrayLike | None = None,
    groups: npt.ArrayLike | None = None,
    state: State = None,
    reference: npt.ArrayLike | None = None,
    entropy: npt.ArrayLike | None = None,
    classes: int | None = None,
) -> Any:
    """The weight of each sample, by the equations of this package.

    A NaN loss makes its own pointwise weight NaN, and all weights of a batch where they depend on the batch.
    For an infinite loss the weights are their limits as the loss grows: samples of infinite loss share all
    the weight, unless a clip or a bound limits it, or have weight 0 if the weight falls with the loss.
    `scale=0` and `radius=0` give exactly 1 for every loss that is not NaN.

    Args:
        losses: Losses, any shape but (), any real dtype; computed with in float64.
        weighting: Turns losses into weights.
        where: Booleans that broadcast to the losses' shape. A loss where it is False has weight 0 and takes
            no part in the others' weights.
        sample_weight: The measure `p`, finite numbers >= 0 of the losses' shape or one a sample of the
            leading dimension; None for ones. A loss where it is 0 is as one where `where` is False.
        groups: The group of each loss, integers shaped as `sample_weight`.
        state: State of a weighting that remembers.
        reference: The losses of a reference model, for `Excess`, of the losses' shape.
        entropy: The entropy of the logits of each loss, of the losses' shape, for weightings that need it.
        classes: How many classes these logits have.

    Returns:
        Weights, float64, of the losses' shape; with a state, the weights and the state after this batch. A
        batch in which no sample takes part, or in which a loss is not finite, does not change the state.

    Raises:
        ValueError: If `losses` is a scalar, a shape does not fit, `sample_weight` holds a number that is
            negative or not finite, the weighting needs a state or groups that are not given, or a group is
            out of range.
        TypeError: If no equation is registered for the weighting's class.

    Example:
        >>> import numpy as np, rgd
        >>> sample_weights(np.array([0.0, 1.0, 5.0]), rgd.KL(tau=1.0)).round(4)
        array([1.    , 1.6487, 1.6487])

    References:
        Kumar et al., Algorithm 1 (pointwise), Proposition 3.1 (normalised, tau infinite) and section 3
        (ball).
    """
    losses = per_sample("losses", losses)
    if weighting.stateful and state is None:
        raise ValueError(
            f"{weighting} needs its state: give state=weighting.init(), then what the call before returned"
        )
    part, measure = measure_of(losses.shape, where, sample_weight)
    group = None if groups is None else one_a_sample("groups", array_of("groups", groups), losses.shape)
    given = {"reference": reference, "entropy": entropy}
    beside = {name: array_of(name, one, np.float64) for name, one in given.items() if one is not None}
    for name, one in beside.items():
        if one.shape != losses.shape:
            raise ValueError(f"{name} must have the losses' shape, {losses.shape}, got {one.shape}")
    weights = np.zeros(losses.shape)
    if np.any(part):
        of_group = None if group is None else group[part]
        of_part = {name: one[part] for name, one in beside.items()}
        batch = Batch(losses[part], measure[part], of_group, classes=classes, **of_part)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            weights[part], after = step(weighting, batch, state)
        state = after if np.all(np.isfinite(batch.losses)) else state
    return weights if state is None else (weights, state)


def reweighted_mean(
    losses: npt.ArrayLike,
    weighting: Weighting,
    where: npt.ArrayLike | None = None,
    *,
    sample_weight: npt.ArrayLike | None = None,
    groups: npt.ArrayLike | None = None,
    normalizer: float | None = None,
    state: State = None,
    reference: npt.ArrayLike | None = None,
) -> Any:
    """The objective `total(p * w * l) / total(p)` over the losses that take part.

    Args:
        losses: Losses, any shape but (), any real dtype; computed with in float64.
        weighting: Turns losses into weights.
        where: Booleans that broadcast to the losses' shape: which losses take part.
        sample_weight: The measure `p`, as in `sample_weights`.
        groups: The group of each loss, as in `sample_weights`.
        normalizer: A positive number that replaces `total(p)`.
        state: State of a weighting that remembers.
        reference: The losses of a reference model, as in `sample_weights`.

    Returns:
        The objective, NaN where no loss takes part; with a state, the objective and the state after it.

    Raises:
        ValueError, TypeError: As `sample_weights`.

    Example:
        >>> import numpy as np, rgd
        >>> round(reweighted_mean(np.array([0.0, 2.0]), rgd.KL(tau=1.0)), 6)
        1.648721

    References:
        Kumar et al., Algorithm 1.
    """
    losses = per_sample("losses", losses)
    result = sample_weights(
        losses, weighting, where, sample_weight=sample_weight, groups=groups, state=state, reference=reference
    )
    weights, after = (result, None) if state is None else result
    part, measure = measure_of(losses.shape, where, sample_weight)
    with np.errstate(invalid="ignore", over="ignore"):
        total = float(np.sum(measure[part] * product(weights, losses, losses)[part]))
    mean = quotient(total, float(np.sum(measure[part])) if normalizer is None else normalizer)
    return mean if state is None else (mean, after)
