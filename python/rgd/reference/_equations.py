"""The equations of the weightings, one function each."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from rgd.reference._arrays import Array, Integers, Mask, product
from rgd.weightings import (
    ERM,
    KL,
    ChiSquare,
    ChiSquareBall,
    CVaR,
    EntropyGate,
    Excess,
    Focal,
    GroupDRO,
    KLBall,
    MidrangeKL,
    MovingAverage,
    Pointwise,
    Threshold,
    Trimmed,
    Weighting,
)

State: TypeAlias = Any
"""The state from `weighting.init()` or from an earlier call."""


class Batch(NamedTuple):
    """The samples that take part, one entry each; never empty."""

    losses: Array
    measure: Array
    """The measure `p`, positive."""
    groups: Integers | None
    reference: Array | None = None
    """The losses of a reference model."""
    entropy: Array | None = None
    """The entropy of the logits of each loss."""
    classes: int | None = None
    """How many classes these logits have."""

    @property
    def total(self) -> float:
        """`total(p)`, the number of samples where `p` is one."""
        return float(np.sum(self.measure))

    def mean(self, values: Array | Mask) -> float:
        """`total(p * values) / total(p)`."""
        return float(np.sum(self.measure * values)) / self.total


# The equation of each member, for a batch in which everything takes part and has a measure above 0.


@functools.singledispatch
def equation(weighting: Weighting, batch: Batch) -> Array:
    """The weights of a batch by a weighting without state, one registered function for each class.

    Args:
        weighting: A weighting; its class picks the function.
        batch: What takes part.

    Returns:
        Weights, one for each loss.

    Raises:
        TypeError: If no function is registered for its class.

    Example:
        >>> import numpy as np, rgd
        >>> equation(rgd.CVaR(0.5), Batch(np.array([0.0, 1.0]), np.ones(2), None))
        array([0., 2.])
    """
    name = type(weighting).__name__
    raise TypeError(
        f"rgd.reference knows no equation of {name}: register one, a function of (weighting, batch), with "
        f"@rgd.reference.equation.register({name})"
    )


@functools.singledispatch
def step(weighting: Weighting, batch: Batch, state: State) -> tuple[Array, State]:
    """The weights of a batch and the state after it; a weighting without one returns what it was given.

    Args:
        weighting: A weighting; its class picks the function.
        batch: What takes part.
        state: The state before the batch; None for a weighting without.

    Returns:
        Weights, one for each loss, and the state.

    Raises:
        TypeError: If no function is registered for its class.

    Example:
        >>> import numpy as np, rgd
        >>> step(rgd.CVaR(0.5), Batch(np.array([0.0, 1.0]), np.ones(2), None), None)
        (array([0., 2.]), None)
    """
    return equation(weighting, batch), state


@functools.singledispatch
def log_equation(weighting: Weighting, batch: Batch) -> Array:
    """The logarithms of the weights; registered for weights that may overflow.

    Args:
        weighting: A pointwise weighting; its class picks the function.
        batch: What takes part.

    Returns:
        Logarithms of weights, one for each loss.

    Example:
        >>> import numpy as np, rgd
        >>> log_equation(rgd.KL(1.0), Batch(np.array([0.0, 1.0, 5.0]), np.ones(3), None))
        array([0. , 0.5, 0.5])
    """
    return np.log(equation(weighting, batch))


@equation.register(ERM)
def _erm(weighting: ERM, batch: Batch) -> Array:
    """`w = 1`."""
    return np.where(np.isnan(batch.losses), math.nan, 1.0)


@equation.register(KL)
def _kl(weighting: KL, batch: Batch) -> Array:
    """`w = exp(scale * min(l, tau))`; with `normalize`, over its mean."""
    if weighting.normalize:
        return _normalised_kl(batch, weighting.tau, weighting.effective_scale)
    return np.exp(log_equation(weighting, batch))


@log_equation.register(KL)
def _log_kl(weighting: KL, batch: Batch) -> Array:
    """`log w = scale * min(l, tau)`; 0 for `scale=0`, also where a loss is infinite."""
    if weighting.effective_scale == 0:
        return np.where(np.isnan(batch.losses), math.nan, 0.0)
    return weighting.effective_scale * np.minimum(batch.losses, weighting.tau)


def _normalised_kl(batch: Batch, tau: float, scale: float) -> Array:
    """`exp(scale * min(l, tau))` over its mean; the largest exponent is subtracted first."""
    if scale == 0:
        return np.full(batch.losses.shape, math.nan if np.any(np.isnan(batch.losses)) else 1.0)
    clipped = np.minimum(batch.losses, tau)
    unnormalised = np.exp(scale * _above(clipped, np.max(clipped) if scale > 0 else np.min(clipped)))
    return unnormalised / batch.mean(unnormalised)


@equation.register(MidrangeKL)
def _midrange_kl(weighting: MidrangeKL, batch: Batch) -> Array:
    """A normalised KL whose `tau` is the middle of the batch's range."""
    losses, scale = batch.losses, weighting.scale
    if np.any(np.isnan(losses)):
        return np.full(losses.shape, math.nan)
    low, high = float(np.min(losses)), float(np.max(losses))
    if low == high or scale == 0:
        return np.ones(losses.shape)
    if math.isinf(best := high if scale > 0 else low):
        return np.where(losses == best, 1 / batch.mean(losses == best), 0.0)
    if math.isinf(low if scale > 0 else high):
        # The middle is infinite too. It clips all finite losses or none, and in half ranges they are equal.
        clipped = weighting.relative or scale > 0
        measured = np.where(np.isfinite(losses), 0.0 if clipped else losses, losses)
        return _normalised_kl(batch._replace(losses=measured), math.inf, scale)
    if weighting.relative:
        # Measured from the smallest or the largest loss, so that the differences that matter do not cancel.
        unit = high / 2 - low / 2
        measured = (losses / 2 - (high if scale > 0 else low) / 2) / (unit / 2)
        return _normalised_kl(batch._replace(losses=measured), -1.0 if scale > 0 else 1.0, scale)
    return _normalised_kl(batch, low / 2 + high / 2, scale)


@equation.register(KLBall)
def _kl_ball(weighting: KLBall, batch: Batch) -> Array:
    """`w = exp(beta * l) / mean(exp(beta * l))`, solved for `beta = 1 / gamma` by bisection.

    The divergence grows with `beta`, from 0 to that of all weight on the largest losses. The search doubles
    or halves `beta` until the root is enclosed, then bisects until no float lies between.
    """
    losses, radius = batch.losses, weighting.radius
    if np.any(np.isnan(losses)):
        return np.full(losses.shape, math.nan)
    if radius == 0 or np.all(losses == losses[0]):
        return np.ones(losses.shape)
    if np.max(losses) == math.inf:
        return _on_largest(batch)
    if np.min(losses) == -math.inf:
        kept = batch.mean(losses > -math.inf)
        return _without_lowest(batch, KLBall(max(radius + math.log(kept), 0.0)), kept)
    on_largest = _on_largest(batch)
    if radius >= math.log(np.max(on_largest)):
        return on_largest
    gaps = losses / 4 - np.max(losses) / 4
    extent, nearest = -float(np.min(gaps)), -float(np.max(gaps[gaps < 0]))
    # With a unit between the two, `beta` is a normal number wherever it lies.
    gaps /= extent if nearest / extent > 1e-100 else math.sqrt(extent) * math.sqrt(nearest)

    def exponent(beta: float) -> Array:
        """`beta * gaps`, and -1000 below that, where `exp` is 0."""
        with np.errstate(over="ignore"):
            return np.maximum(beta * gaps, -1000.0)

    below, above = 0.0, 1.0
    while _kl_divergence(batch, exponent(above)) < radius:
        below, above = above, 2 * above
        if not np.any(np.exp(exponent(below)[gaps < 0])):
            return on_largest
    while below == 0 and _kl_divergence(batch, exponent(above / 2)) >= radius:
        above /= 2
    below = max(below, above / 2)
    while below < (middle := (below + above) / 2) < above:
        found = _kl_divergence(batch, exponent(middle))
        below, above = (middle, above) if found < radius else (below, middle)
    unnormalised = np.exp(exponent(above))
    return unnormalised / batch.mean(unnormalised)


def _kl_divergence(batch: Batch, exponent: Array) -> float:
    """`mean(w * log(w))` of `w = exp(exponent) / mean(exp(exponent))`, where the largest exponent is 0.

    It equals `mean(w * log(w) - w + 1)`, whose terms are never negative, so that they do not cancel. Near
    `u = log(w) = 0` the term is summed as its series, `total(u ** k * (k - 1) / k!)` from `k = 2`.
    """
    logarithm = exponent - math.log1p(batch.mean(np.expm1(exponent)))
    near = np.abs(logarithm) < 0.1
    term = np.where(near, 0.0, logarithm * np.exp(logarithm) - np.expm1(logarithm))
    small = logarithm[near]
    series = np.zeros(small.shape)
    for k in range(13, 1, -1):
        series = small * series + (k - 1) / math.factorial(k)
    term[near] = small**2 * series
    return batch.mean(term)


@equation.register(ChiSquare)
def _chi_square(weighting: ChiSquare, batch: Batch) -> Array:
    """`w = max(l - eta, 0) / gamma` with `mean(w) = 1`, solved once the losses above `eta` are known."""
    losses = batch.losses
    if np.any(np.isnan(losses)):
        return np.full(losses.shape, math.nan)
    if np.all(losses == losses[0]):
        return np.ones(losses.shape)
    finite = losses[np.isfinite(losses)]
    if np.max(losses) == math.inf or np.all(finite == finite[0]):
        return _on_largest(batch)
    gaps, gamma = _gaps(losses, weighting.gamma)
    if gamma == 0:
        return _on_largest(batch)
    positive = _above_root(gaps, lambda eta: batch.mean(np.maximum(gaps - eta, 0)) < gamma)
    share = batch.mean(positive)
    deviation = gaps - batch.mean(np.where(positive, gaps, 0.0)) / share
    return np.where(positive, np.maximum(1 / share + deviation / gamma, 0), 0.0)


@equation.register(ChiSquareBall)
def _chi_square_ball(weighting: ChiSquareBall, batch: Batch) -> Array:
    """`w = max(l - eta, 0) / mean(max(l - eta, 0))` with `mean((w - 1) ** 2) / 2` the radius.

    Where the losses above `eta` are known, with `share` of the measure, mean `m` and variance `v`, the square
    `mean(w ** 2)` is `(1 + v / (m - eta) ** 2) / share`, which is solved for `m - eta`.
    """
    losses, radius = batch.losses, weighting.radius
    if np.any(np.isnan(losses)):
        return np.full(losses.shape, math.nan)
    if radius == 0 or np.all(losses == losses[0]):
        return np.ones(losses.shape)
    if np.max(losses) == math.inf:
        return _on_largest(batch)
    if np.min(losses) == -math.inf:
        kept = batch.mean(losses > -math.inf)
        return _without_lowest(batch, ChiSquareBall(max(radius * kept - (1 - kept) / 2, 0.0)), kept)
    gaps = _gaps(losses)[0]
    on_largest = _on_largest(batch)
    if radius >= (np.max(on_largest) - 1) / 2:
        return on_largest

    def divergence(eta: float) -> float:
        excess = np.maximum(gaps - eta, 0)
        return batch.mean((excess / batch.mean(excess) - 1) ** 2) / 2

    positive = _above_root(gaps, lambda eta: divergence(eta) > radius)
    share = batch.mean(positive)
    deviation = np.where(positive, gaps - batch.mean(np.where(positive, gaps, 0.0)) / share, 0.0)
    deviation /= np.max(np.abs(deviation))
    ratio = math.sqrt(max(2 * radius * share - (1 - share), 0) * share / batch.mean(deviation**2))
    return np.where(positive, np.maximum((1 + ratio * deviation) / share, 0), 0.0)


@equation.register(CVaR)
def _cvar(weighting: CVaR, batch: Batch) -> Array:
    """`1 / alpha` on the worst; with smoothing `w = min(1 / alpha, exp((l - eta) / nu))` with `mean(w) = 1`.

    Where the capped losses are known, the rest share what is left of the measure in proportion to
    `exp(l / nu)`.
    """
    losses, alpha, smoothing = batch.losses, weighting.alpha, weighting.smoothing
    if np.any(np.isnan(losses)):
        return np.full(losses.shape, math.nan)
    if alpha == 1:
        return np.ones(losses.shape)
    if smoothing == 0:
        return _share_of_worst(batch, alpha) / alpha

    def mean_below_cap(cap: float) -> float:
        return batch.mean(np.exp(np.minimum(_above(losses, cap), 0) / smoothing))

    levels = np.unique(losses)
    index = bisect.bisect_left(levels, True, key=lambda level: mean_below_cap(level) < alpha)
    capped = losses >= levels[index] if index < levels.size else np.zeros(losses.shape, np.bool_)
    rest = np.where(capped, 0.0, np.exp(_above(losses, np.max(losses[~capped])) / smoothing))
    left = 1 - batch.mean(capped) / alpha
    return np.where(capped, 1 / alpha, np.minimum(left * rest / batch.mean(rest), 1 / alpha))


@equation.register(Focal)
def _focal(weighting: Focal, batch: Batch) -> Array:
    """`w = max(1 - exp(-l), 0) ** gamma`."""
    weights = np.maximum(-np.expm1(-batch.losses), 0) ** weighting.gamma
    return np.where(np.isnan(batch.losses), math.nan, weights)


@equation.register(Threshold)
def _threshold(weighting: Threshold, batch: Batch) -> Array:
    """`w = 1` where `l <= max_loss`, else 0."""
    weights = np.where(batch.losses <= weighting.max_loss, 1.0, 0.0)
    return np.where(np.isnan(batch.losses), math.nan, weights)


@step.register(Excess)
def _excess(weighting: Excess, batch: Batch, state: State) -> tuple[Array, State]:
    """`w = inner(l - reference)`; a state does not change if an excess is not finite."""
    if batch.reference is None:
        raise ValueError(f"{weighting} needs the losses of a reference model: give reference=")
    excess = batch.losses - batch.reference
    weights, after = step(weighting.weighting, batch._replace(losses=excess, reference=None), state)
    return weights, after if np.all(np.isfinite(excess)) else state


@log_equation.register(Excess)
def _log_excess(weighting: Excess, batch: Batch) -> Array:
    """`log w`, where `w = inner(l - reference)`."""
    if batch.reference is None:
        raise ValueError(f"{weighting} needs the losses of a reference model: give reference=")
    excess = batch.losses - batch.reference
    return log_equation(weighting.weighting, batch._replace(losses=excess, reference=None))


@step.register(EntropyGate)
def _entropy_gate(weighting: EntropyGate, batch: Batch, state: State) -> tuple[Array, State]:
    """`w = inner(l) * H / log(C)`; 0 where `H` is 0."""
    gate = _gate(weighting, batch)
    weights, state = step(weighting.weighting, batch, state)
    return product(gate, weights, weights), state


@log_equation.register(EntropyGate)
def _log_entropy_gate(weighting: EntropyGate, batch: Batch) -> Array:
    """`log w`, where `w = inner(l) * H / log(C)`."""
    gate, inner = _gate(weighting, batch), log_equation(weighting.weighting, batch)
    return np.where((gate == 0) & ~np.isnan(inner), -math.inf, np.log(gate) + inner)


def _gate(weighting: EntropyGate, batch: Batch) -> Array:
    """`H / log(C)`."""
    if batch.entropy is None or batch.classes is None:
        raise ValueError(f"{weighting} needs the entropy of the logits: give entropy= and classes=")
    if batch.classes == 1:
        raise ValueError(f"{weighting} needs more than one class, since log(1) is 0")
    return batch.entropy / math.log(batch.classes)


@equation.register(Pointwise)
def _pointwise(weighting: Pointwise, batch: Batch) -> Array:
    """`w = function(l)`."""
    return np.asarray(weighting.function(batch.losses), dtype=np.float64)


@step.register(Trimmed)
def _trimmed(weighting: Trimmed, batch: Batch, state: State) -> tuple[Array, State]:
    """`w = kept * inner(l, p * kept)`; samples with `kept = 0` take no part in the inner weighting."""
    if np.any(np.isnan(batch.losses)):
        return np.full(batch.losses.shape, math.nan), state
    kept = 1 - _share_of_worst(batch, weighting.fraction)
    part = kept > 0
    groups = None if batch.groups is None else batch.groups[part]
    reference, entropy = (None if one is None else one[part] for one in (batch.reference, batch.entropy))
    rest = Batch(batch.losses[part], (batch.measure * kept)[part], groups, reference, entropy, batch.classes)
    weights = np.zeros(batch.losses.shape)
    inner, state = step(weighting.weighting, rest, state)
    weights[part] = kept[part] * inner
    return weights, state


@step.register(MovingAverage)
def _moving_average(weighting: MovingAverage, batch: Batch, state: State) -> tuple[Array, State]:
    """`w = inner(l) / u`, in logarithms, after `u = decay * u + (1 - decay) * mean(inner(l))`.

    If `u` is 0, all weights are 0, and the state does not change. An infinite weight is divided by its own
    term of `u`, since that is all of `u`.
    """
    logarithm = log_equation(weighting.weighting, batch)
    part_of_mean = 1.0 if state["updates"] == 0 else 1 - weighting.decay
    if np.max(logarithm) == math.inf:
        infinite = logarithm == math.inf
        return np.where(infinite, 1 / (part_of_mean * batch.mean(infinite)), 0.0), state
    log_mean = -math.inf
    if np.max(logarithm) != -math.inf:
        log_mean = np.max(logarithm) + np.log(batch.mean(np.exp(logarithm - np.max(logarithm))))
    if state["updates"] > 0:
        log_mean = np.logaddexp(np.log(weighting.decay) + state["log_mean"], np.log(part_of_mean) + log_mean)
    if log_mean == -math.inf:
        return np.zeros(batch.losses.shape), state
    after = {"log_mean": float(log_mean), "updates": int(state["updates"]) + 1}
    return np.exp(logarithm - log_mean), after


@step.register(GroupDRO)
def _group_dro(weighting: GroupDRO, batch: Batch, state: State) -> tuple[Array, State]:
    """`w = n * q[g] / n_g` after `q = q * exp(step_size * mean_loss)`; the loss of an absent group is 0."""
    number, groups = weighting.groups, batch.groups
    if groups is None:
        raise ValueError(f"{weighting} needs groups=, one integer in 0..{number - 1} for each loss")
    if np.any((groups < 0) | (groups >= number)):
        raise ValueError(
            f"groups must be in 0..{number - 1}, got {int(np.min(groups))}..{int(np.max(groups))}"
        )
    counts = np.bincount(groups, weights=batch.measure, minlength=number)
    sums = np.bincount(groups, weights=batch.measure * batch.losses, minlength=number)
    mean = np.where(counts > 0, sums / counts, 0.0)
    if weighting.step_size > 0 and np.max(mean) == math.inf:
        unnormalised = np.where(mean == math.inf, 1.0, 0.0)
    else:
        rise = weighting.step_size * mean if weighting.step_size > 0 else np.where(np.isnan(mean), mean, 0.0)
        exponent = np.log(state["shares"]) + rise
        unnormalised = np.exp(_above(exponent, np.max(exponent)))
    shares = unnormalised / np.sum(unnormalised)
    return batch.total * shares[groups] / counts[groups], {"shares": shares}


def _above(values: Array, origin: Any) -> Array:
    """`values - origin`, 0 where both are the same infinity."""
    return np.where(values == origin, 0.0, values - origin)


def _without_lowest(batch: Batch, weighting: Weighting, kept: float) -> Array:
    """The weights without losses of -inf, which weigh 0; the others have the share `kept` of the measure."""
    part = batch.losses > -math.inf
    weights = np.zeros(batch.losses.shape)
    weights[part] = equation(weighting, Batch(batch.losses[part], batch.measure[part], None)) / kept
    return weights


def _gaps(losses: Array, number: float = 0.0) -> tuple[Array, float]:
    """`(losses - max) / (max - min)`, from -1 to 0, and `number / (max - min)`; not for equal losses.

    Worst cases do not change if a constant is added to the losses, or if losses and `number` are multiplied
    by one factor. A loss of -inf is left out of `min`, and has a gap of -inf.
    """
    smallest = np.min(losses[losses > -math.inf])
    shrink = 1.0 if math.isfinite(np.max(losses) - smallest) else 0.5
    losses = shrink * losses
    unit = float(np.max(losses) - shrink * smallest)
    return (losses - np.max(losses)) / unit, shrink * number / unit


def _on_largest(batch: Batch) -> Array:
    """All weight on the largest losses."""
    largest = batch.losses == np.max(batch.losses)
    return np.where(largest, 1 / batch.mean(largest), 0.0)


def _above_root(gaps: Array, lies_below: Callable[[float], bool]) -> Mask:
    """Which gaps exceed a root below the largest gap; `lies_below(eta)` says if the root is below `eta`."""
    levels = np.unique(gaps)
    return gaps >= levels[bisect.bisect_left(levels[:-1], True, key=lies_below)]


def _share_of_worst(batch: Batch, fraction: float) -> Array:
    """The part of each sample in the `fraction` of the measure with the largest losses, equal for ties."""
    levels, place = np.unique(batch.losses, return_inverse=True)
    counts = np.bincount(place, weights=batch.measure, minlength=levels.size)
    above = np.concatenate([[0.0], np.cumsum(counts[::-1])[:-1]])[::-1]
    return np.minimum(np.maximum((fraction * batch.total - above) / counts, 0.0), 1.0)[place]
