"""A caller's losses, masks and measure as NumPy arrays, and the products of them."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]
Integers: TypeAlias = npt.NDArray[np.int_]


def product(weights: Array, values: Array, losses: Array) -> Array:
    """`weights * values`; 0 where a weight is 0 and its loss is not NaN, even if the loss is infinite."""
    return np.where((weights == 0) & ~np.isnan(losses), 0.0, weights * values)


def array_of(name: str, given: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> npt.NDArray[Any]:
    """An array of NumPy. A masked one is refused, since its masked numbers would count."""
    if isinstance(given, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, and its mask would be lost: leave numbers out by where=")
    return np.asarray(given, dtype=dtype)


def per_sample(name: str, losses: npt.ArrayLike) -> Array:
    losses = array_of(name, losses, np.float64)
    if losses.ndim == 0:
        raise ValueError(f'{name} is a scalar: weights need one loss a sample, as reduction="none" gives')
    return losses


def mask_of(where: npt.ArrayLike | None, shape: tuple[int, ...]) -> Mask:
    return np.broadcast_to(array_of("where", True if where is None else where, np.bool_), shape)


def measure_of(
    shape: tuple[int, ...], where: npt.ArrayLike | None, sample_weight: npt.ArrayLike | None
) -> tuple[Mask, Array]:
    """Which losses take part, and their measure, 0 for the others."""
    measure = (
        np.ones(shape) if sample_weight is None else array_of("sample_weight", sample_weight, np.float64)
    )
    measure = one_a_sample("sample_weight", measure, shape)
    refused = measure[~((measure >= 0) & (measure < math.inf))]
    if refused.size:
        raise ValueError(f"sample_weight must hold finite numbers >= 0, got {refused[0]}")
    measure = np.where(mask_of(where, shape), measure, 0.0)
    return measure > 0, measure


def one_a_sample(name: str, values: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Values of the losses' shape, or one a sample of the leading dimension, in the losses' shape."""
    if values.shape != shape:
        if values.shape != shape[:1]:
            raise ValueError(
                f"{name} must have shape {shape[:1]} or {shape}, as the losses, got {values.shape}"
            )
        values = np.reshape(values, values.shape + (1,) * (len(shape) - 1))
    return np.broadcast_to(values, shape)


def quotient(numerator: float, denominator: float) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.float64(numerator) / np.float64(denominator))
