"""The whole computation in plain torch operations, for whatever the Rust kernels do not serve.

With losses `l_1..l_n` the weights are constants to autograd,

    KL(tau, scale):             w_i = exp(scale * min(l_i, tau)) KL(..., normalize=True):    w_i = exp(scale
    * min(l_i, tau)) / mean_j exp(scale * min(l_j, tau)) KLBall(radius):             w = n * softmax(l /
    gamma), gamma the root of KL(softmax(l / gamma) || uniform) = radius

Nothing here waits for a device: no value is read by the host, and no shape or branch depends on one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rgd.torch._record import Record
from rgd.torch._settings import CrossEntropySettings, accumulator
from rgd.weightings import KL, KLBall, Weighting

BALL_STEPS = 64
"""Steps of the search for a ball's `1 / gamma`: the median is 5; of 4000 hostile batches none took 53."""


def sample_weights(losses: Tensor, weighting: Weighting, where: Tensor | None = None) -> Tensor:
    """The weights of a batch.

    Args:
        losses: Any shape but (), floating.
        weighting: Turns losses into weights.
        where: Booleans of the losses' shape. A loss where it is False has weight 0 and takes no part in the
            others'.

    Returns:
        Weights of the losses' shape, without grad; float64 for float64 losses, else float32.
    """
    dtype = accumulator(losses.dtype)
    plain = losses.detach().to(_wide(losses))
    if plain.numel() == 0:
        return plain.to(dtype)
    if where is not None:
        plain = plain.masked_fill(~where, 0)
    batch = Batch(plain, where)
    if isinstance(weighting, KLBall):
        weights = _ball_weights(batch, weighting.radius)
    elif weighting.normalize:
        weights = _normalised_weights(batch, weighting)
    else:
        weights = torch.exp(_exponent(plain, weighting))
    if where is not None:
        weights = weights.masked_fill(~where, 0)
    return weights.to(dtype)


class Batch:
    """Losses, detached, 0 where they take no part, and the sums and maxima over those that do."""

    def __init__(self, losses: Tensor, where: Tensor | None) -> None:
        self.losses = losses
        self.where = where
        self.count = (
            torch.full((), losses.numel(), dtype=losses.dtype, device=losses.device)
            if where is None
            else where.sum(dtype=losses.dtype)
        )

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the losses that take part."""
        if self.where is not None:
            values = values.masked_fill(~self.where, 0)
        return values.sum() / self.count

    def max(self, values: Tensor) -> Tensor:
        """The maximum over the losses that take part."""
        return self.values_or(values, -math.inf).amax()

    def values_or(self, values: Tensor, other: float) -> Tensor:
        """The values, and `other` where a loss takes no part."""
        return values if self.where is None else values.masked_fill(~self.where, other)


def _wide(losses: Tensor) -> torch.dtype:
    """The dtype weights are computed in, to be rounded once: float64, where the device has it."""
    return torch.float32 if losses.device.type == "mps" else torch.float64


def _exponent(losses: Tensor, weighting: KL) -> Tensor:
    """`scale * min(losses, tau)`; 0 for a scale of 0, also where a loss is infinite. NaN stays NaN."""
    if weighting.effective_scale == 0:
        return torch.where(losses.isnan(), losses, 0.0)
    return weighting.effective_scale * losses.clamp(max=weighting.tau)


def _normalised_weights(batch: Batch, weighting: KL) -> Tensor:
    exponent = _exponent(batch.losses, weighting)
    unnormalised = torch.exp(exponent - batch.max(exponent))
    return unnormalised / batch.mean(unnormalised)


def _ball_weights(batch: Batch, radius: float) -> Tensor:
    """`n * softmax(l / gamma)` with `D(1 / gamma) = radius`, by a fixed number of safeguarded Newton steps.

    The divergence `D` grows with `b = 1 / gamma` from 0 to `limit = log(n / m)`, `m` the number of largest
    losses. Newton's steps solve `sqrt(D) = sqrt(radius)`, nearly linear in `b` while `D` is small, or
    `log(limit - D) = log(limit - radius)`, nearly linear where it saturates; `D'(b) = b * var_q(l)`. A step
    that leaves the interval known to hold the root is replaced by its middle, or by `4 * b` where it is
    unbounded.
    """
    losses = batch.losses
    # The weights depend on the losses up to a shift and a positive factor; gaps of at most 1 cannot overflow.
    halves = losses / 2
    largest = batch.max(halves)
    spread = largest + batch.max(-halves)
    gaps = batch.values_or((halves - largest) / torch.where(spread > 0, spread, 1.0), 0)
    on_largest = batch.mean((gaps == 0).to(gaps.dtype))  # m / n
    limit = -torch.log(on_largest)
    weights = torch.where(gaps == 0, 1 / on_largest, 0.0)
    if 0 < radius < math.inf:
        inside = torch.exp(_tilted(batch, gaps, _inverse_gamma(batch, gaps, limit, radius)))
        weights = torch.where(radius >= limit, weights, inside)
    broken = batch.values_or((~losses.isfinite()).to(losses.dtype), 0).amax() > 0
    weights = torch.where(broken, math.nan, weights)
    # Losses that are all the same number, or no ball at all, give ones, infinite losses too; NaN does not.
    same = largest == -batch.max(-halves)
    nan = batch.values_or(losses.isnan().to(losses.dtype), 0).amax() > 0
    if radius == 0:
        return torch.where(nan, math.nan, torch.ones_like(losses))
    return torch.where(same, torch.ones_like(losses), weights)


def _inverse_gamma(batch: Batch, gaps: Tensor, limit: Tensor, radius: float) -> Tensor:
    start = math.sqrt(8 * radius)  # D(b) <= b^2 / 8 for gaps of at most 1: never beyond the root
    b = torch.full_like(limit, start)
    below, above = torch.zeros_like(b), torch.full_like(b, math.inf)
    for _ in range(BALL_STEPS):
        logarithm = _tilted(batch, gaps, b)
        weights = torch.exp(logarithm)
        # mean(w * log(w)), and 1 - mean(w) = 0, so that the error of the logarithms' common shift cancels.
        # What is left, eps * |log(w)| in each term, moves a weight by about eps.
        divergence = batch.mean(logarithm * weights - torch.expm1(logarithm))
        deviation = gaps - batch.mean(weights * gaps)
        slope = b * batch.mean(weights * deviation.square())
        below = torch.where(divergence < radius, b, below)
        above = torch.where(divergence >= radius, b, above)
        small = 2 * divergence.sqrt() * (math.sqrt(radius) - divergence.sqrt())
        saturated = torch.log((limit - divergence) / (limit - radius)) * (limit - divergence)
        proposed = b + torch.where(divergence < 0.5 * limit, small, saturated) / slope
        middle = torch.where(above.isinf(), 4 * b, 0.5 * (below + above))
        proposed = torch.where((proposed > below) & (proposed < above), proposed, middle)
        b = torch.minimum(proposed, 16 * b)
    return b


def _tilted(batch: Batch, gaps: Tensor, b: Tensor) -> Tensor:
    """The logarithm of the weights of mean one at one `1 / gamma`."""
    exponent = b * gaps
    return exponent - torch.log1p(batch.mean(torch.expm1(exponent)))


def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, settings: CrossEntropySettings
) -> tuple[Tensor, Record]:
    """The re-weighted objective, in the dtype losses are computed in, and the record of its weights.

    Differentiable with respect to `logits` and class probabilities, any number of times, in either mode.
    """
    losses, counted = cross_entropy_losses(logits, target, weight, settings)
    weights = loss_weights(losses, counted, settings)
    objective, denominator = reduce(losses, weights, counted, target, weight, settings)
    indices = None if counted is None else target
    return objective, Record(
        losses.detach(), weights, denominator, indices, settings.ignore_index, path="composite"
    )


def cross_entropy_losses(
    logits: Tensor, target: Tensor, weight: Tensor | None, settings: CrossEntropySettings
) -> tuple[Tensor, Tensor | None]:
    """The loss of each target, and, for class indices, which of them are not ignored."""
    dtype = accumulator(logits.dtype)
    counted = None
    if not target.is_floating_point():
        counted = target != settings.ignore_index
    losses = F.cross_entropy(
        logits.to(dtype),
        target.to(dtype if counted is None else torch.int64),
        None if weight is None else weight.detach().to(dtype),
        ignore_index=settings.ignore_index,
        reduction="none",
        label_smoothing=settings.label_smoothing,
    )
    return losses, counted


def loss_weights(losses: Tensor, counted: Tensor | None, settings: CrossEntropySettings) -> Tensor:
    """One weight a loss or, with `per="sample"`, one a sample of the leading axis; 0 where all is ignored."""
    if settings.per == "element" or losses.dim() == 0:
        return sample_weights(losses, settings.weighting, counted)
    means, taking_part = sample_means(losses, counted)
    return sample_weights(means, settings.weighting, taking_part).to(losses.dtype)


def sample_means(losses: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The mean loss of each sample of the leading axis, over what counts, and which have any that counts."""
    plain = losses.detach()
    if plain.dim() == 1:
        return plain, counted
    flat = plain.flatten(1).to(_wide(plain))
    if counted is None:
        return flat.mean(1), None
    kept = counted.flatten(1)
    number = kept.sum(1)
    return flat.masked_fill(~kept, 0).sum(1) / number.clamp(min=1), number > 0


def reduce(  # noqa: PLR0917
    losses: Tensor,
    weights: Tensor,
    counted: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    settings: CrossEntropySettings,
) -> tuple[Tensor, Tensor | float]:
    """The objective of given weights, and what "mean" divides by."""
    weights = weights.view(-1, *[1] * (losses.dim() - 1)) if losses.dim() > weights.dim() else weights
    products = weights * losses
    if counted is not None:
        products = products.masked_fill(~counted, 0)
    if counted is None:
        denominator: Tensor | float = float(losses.numel())
    elif weight is None:
        denominator = counted.sum(dtype=losses.dtype)
    else:
        of_target = weight.detach().to(losses.dtype)[target.to(torch.int64).masked_fill(~counted, 0)]
        denominator = of_target.masked_fill(~counted, 0).sum()
    if settings.reduction == "none":
        return products, denominator
    if settings.reduction == "sum":
        return products.sum(), denominator
    return products.sum() / denominator, denominator
