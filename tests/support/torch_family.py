"""The problems that the tests of the torch front solve, and the allowed error of an answer."""

import dataclasses

import numpy as np
import pytest
import torch
from family import MEMBERS, members, root_allowance
from rgd import KL, Focal, GroupDRO, MovingAverage, Pointwise, Trimmed
from rgd.torch import RGD, RGDLoss, cross_entropy, reweighted_mean, sample_weights


def falling(losses):
    """Weights of a user's own, in arithmetic that every front's arrays have."""
    return 1 / (1 + losses * losses)


GROUPS = 3
STATEFUL = [
    MovingAverage(KL(2.0), 0.7),
    MovingAverage(Focal(2.0), 0.0),
    GroupDRO(GROUPS, 0.5),
    Trimmed(MovingAverage(KL(1.0), 0.9), 0.25),
]
EVERY = [*MEMBERS, Pointwise(falling), *STATEFUL]
BACKENDS = ["rust", "composite"]
every_member = members(EVERY)
both_backends = pytest.mark.parametrize("name", BACKENDS)
N, C, T = 9, 4, 3


# --- the problems, and how far a right answer may be off ---


def logits_of(shape=(N, C, T), seed=0):
    return 2 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(kind, dtype=torch.float64, seed=0):
    """Logits, target, class weights and label smoothing; one index in five is ignored, one sample whole."""
    logits = logits_of(seed=seed).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    if kind == "probabilities":
        target = torch.randn(N, C, T, generator=generator).softmax(1).to(dtype)
        return logits, target, None, 0.0
    target = torch.randint(C, (N, T), generator=generator)
    target.view(-1)[::5] = -100
    target[2] = -100
    weight = torch.linspace(0.5, 2.0, C, dtype=torch.float64).to(dtype)
    return logits, target, weight, 0.1


def groups_of(per, seed=0):
    shape = (N,) if per == "sample" else (N, T)
    return torch.randint(GROUPS, shape, generator=torch.Generator().manual_seed(seed + 2))


def extras(weighting, per, seed=0):
    """The arguments that only some members need: groups, and a state."""
    given = {}
    if isinstance(weighting, GroupDRO):
        given["groups"] = groups_of(per, seed)
    if weighting.stateful:
        given["state"] = weighting.init()
    return given


def arrays(settings):
    return {
        key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in settings.items()
    }


def first(result, weighting):
    return result[0] if weighting.stateful else result


def sensitivity(losses, weights, weighting):
    """The largest slope of the weights as a function of the loss.

    Errors of single losses change the other weights through sums over the batch, by at most the same amount.
    """
    if isinstance(weighting, GroupDRO):  # through its group's share, the slope is step_size times the weight
        return weighting.step_size * np.max(weights, initial=0.0)
    order = np.argsort(losses)
    steps, gaps = np.abs(np.diff(weights[order])), np.diff(losses[order])
    return np.max(steps[gaps > 0] / gaps[gaps > 0], initial=0.0)


def weight_allowance(losses, weights, weighting, loss_error, eps):
    """The allowed error of weights, from roundings of sums over the batch and from errors of losses."""
    losses, weights = losses.reshape(-1), weights.reshape(-1)
    largest = np.max(weights, initial=0.0)
    roundings = (2 * losses.size + 32) * eps * largest
    moved = 2 * max(1.0, largest) * sensitivity(losses, weights, weighting) * loss_error
    return roundings + moved + np.max(root_allowance(weights, weighting), initial=0.0)


def in_numpy(*tensors):
    """The same numbers, floats in float64."""
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in tensors]
    return [None if x is None else x.numpy() for x in wide]


def assert_within(actual, expected, allowed, rounding=0.0):
    """Equal to an absolute allowance and, where the result is rounded to a narrow dtype, to half a unit."""
    actual, expected = np.asarray(actual.detach().double()), np.asarray(expected)
    assert actual.shape == expected.shape
    difference = np.abs(actual - expected)
    assert np.all(np.isfinite(expected))
    assert np.all(difference <= allowed + rounding * np.abs(expected)), (
        f"off by {np.max(difference)}, allowed {np.max(allowed)}"
    )


def leaves(tree):
    if isinstance(tree, dict):
        return [leaf for part in tree.values() for leaf in leaves(part)]
    if isinstance(tree, (tuple, list)):
        return [leaf for part in tree for leaf in leaves(part)]
    return [tree]


CALLS = {
    "sample_weights": lambda m, **k: sample_weights(torch.ones(4), m, state=m.init(), **k),
    "reweighted_mean": lambda m, **k: reweighted_mean(torch.ones(4), m, state=m.init(), **k),
    "cross_entropy": lambda m, **k: cross_entropy(
        torch.zeros(4, 3), torch.arange(4) % 3, weighting=m, state=m.init(), **k
    ),
    "RGDLoss": lambda m, **k: RGDLoss(weighting=m)(torch.zeros(4, 3), torch.arange(4) % 3, **k),
    "RGDLoss of a base": lambda m, **k: RGDLoss(weighting=m, base=lambda x: x)(torch.ones(4), **k),
    "RGD": lambda m, **k: RGD(torch.optim.SGD([torch.ones(1)], lr=1.0), m).objective(torch.ones(4), **k),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def assert_same_stats(stats, expected, n):
    """Assert equal statistics up to the rounding of sums of `n` terms in another order and of logarithms."""
    tolerance = (2 * n + 16) * np.finfo(np.float64).eps
    groups, wanted = stats.groups, expected.groups
    assert (groups is None) == (wanted is None)
    for field in dataclasses.fields(stats):
        if field.name == "groups":
            continue
        got, other = getattr(stats, field.name), getattr(expected, field.name)
        assert got is other or got == pytest.approx(other, rel=tolerance, abs=tolerance, nan_ok=True), (
            field.name
        )
    if groups is not None:
        assert groups.count == wanted.count
        assert groups.mean_loss == pytest.approx(wanted.mean_loss, rel=tolerance, nan_ok=True)
        assert groups.weight_share == pytest.approx(wanted.weight_share, rel=tolerance, nan_ok=True)
