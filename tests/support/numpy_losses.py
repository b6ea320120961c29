"""Losses, weightings and helpers for the tests of the NumPy front."""

import math

import numpy as np
import rgd
from rgd import _rgd
from rgd.weightings._call import kernel_of

DTYPES = [np.float64, np.float32, np.float16]
POINTWISE = [rgd.KL(1.0), rgd.KL(1 / 9), rgd.KL(7.0), rgd.KL(math.inf, scale=1.0)]
DECREASING = [rgd.KL(scale=-0.7), rgd.KL(2.0, scale=-1.0)]
BATCH = [
    rgd.KL(1.0, normalize=True),
    rgd.KL(math.inf, scale=1.0, normalize=True),
    rgd.KL(math.inf, scale=0.1, normalize=True),
    rgd.KLBall(1e-6),
    rgd.KLBall(0.05),
    rgd.KLBall(1.0),
]
DECREASING_BATCH = [rgd.KL(scale=-0.7, normalize=True), rgd.KL(2.0, scale=-1.0, normalize=True)]
WEIGHTINGS = POINTWISE + BATCH
WITH_KERNEL = [rgd.ERM(), *WEIGHTINGS, *DECREASING, *DECREASING_BATCH]


def weigh(losses, weighting, threads=1):
    """The kernel's weights, without the front."""
    weights = np.empty(losses.shape, weight_dtype(losses.dtype))
    _rgd.sample_weights(losses, weights, *kernel_of(weighting), threads)
    return weights


def weight_dtype(dtype):
    return np.float64 if dtype == np.float64 else np.float32


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()
