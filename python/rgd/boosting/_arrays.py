"""Labels, margins and the measure as the kernels read them."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import numpy.typing as npt

from rgd._arrays import refuse_masked

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.float32 | np.float64]
EPS32, MAX32 = float(np.finfo(np.float32).eps), float(np.finfo(np.float32).max)


def as_array(name: str, given: Any) -> npt.NDArray[Any]:
    refuse_masked(name, given, f"leave masked samples out, or give them weight 0 and pass {name}.filled(0)")
    array = np.asarray(given)
    if array.dtype == object:
        with contextlib.suppress(TypeError, ValueError):
            array = array.astype(np.float64)
    if array.dtype.kind not in "fiub":
        raise TypeError(
            f"{name} must hold numbers, got {array.dtype}: encode classes first, as "
            "sklearn.preprocessing.LabelEncoder does"
        )
    return array


def as_floats(array: npt.NDArray[Any]) -> Numbers:
    """The array itself if the kernels can read it (float32 or float64), else a copy in float64."""
    dtype: Any = array.dtype
    if dtype.kind == "f" and dtype.itemsize in (4, 8) and dtype.isnative and array.flags.aligned:
        return array
    return array.astype(np.float64)


def as_rows(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Values of shape (n,) as a column; (n, k) stays."""
    return values if values.ndim == 2 else values[:, None]


def as_measure(sample_weight: Any, count: int) -> Numbers | None:
    """The base measure, shape (n,); None for ones."""
    if sample_weight is None:
        return None
    measure = as_column("sample_weight", sample_weight)
    if not measure.size:
        # XGBoost's data set gives an empty array where no weights were set.
        return None
    if measure.size != count:
        raise ValueError(f"sample_weight must have one entry a sample, {(count,)}, got {measure.shape}")
    return measure


def average(values: npt.NDArray[Any], measure: Numbers | None) -> float:
    if measure is not None and not (np.isfinite(measure).all() and measure.min() >= 0 and measure.any()):
        raise ValueError("sample_weight must hold finite numbers >= 0, and not only 0")
    return float(np.average(values, weights=measure))


def as_column(name: str, given: Any) -> Numbers:
    """Numbers of shape (n,), from that or (n, 1)."""
    array = as_array(name, given)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"{name} must have one entry a sample, shape (n,), got shape {array.shape}")
    return as_floats(array)


def all_alike(margins: Numbers) -> bool:
    """Whether all samples have the same margins."""
    return bool((margins == margins[:1]).all())
