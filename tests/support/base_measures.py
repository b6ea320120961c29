"""Base measures, masks and losses for the tests of `sample_weight=` and `where=` in the torch front."""

import math

import numpy as np
import torch
from rgd import ERM, KL, CVaR, KLBall, Trimmed
from torch_family import (
    N,
    T,
)

INF, NAN = math.inf, math.nan
SOME = [KL(1.0), KL(scale=-0.7), KL(2.0, normalize=True), KLBall(0.2), CVaR(0.3), Trimmed(ERM(), 0.25)]


def base_measure(per, seed=0):
    """Multiples of 1/4, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    shape = (N,) if per == "sample" else (N, T)
    return torch.randint(0, 8, shape, generator=generator).double() / 4


def mask(per):
    shape = (N,) if per == "sample" else (N, T)
    return torch.arange(math.prod(shape)).view(shape) % 4 != 1


def losses_of(shape=(N, T), seed=0):
    return torch.tensor(np.random.default_rng(seed).gamma(1.0, 1.5, shape))


def run(function, inputs, weighting):
    """The result of a function of a leaf tensor, its gradient, and the state after it."""
    leaf = inputs.clone().requires_grad_()
    result = function(leaf)
    value, state = result if weighting.stateful else (result, None)
    value.sum().backward()
    return value.detach(), leaf.grad, state
