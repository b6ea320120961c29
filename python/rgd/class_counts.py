"""The log prior and class-balanced weights, from the class counts of a training set.

Both help with class imbalance, and re-weighting by loss does not. One adds the log prior of each class to the
logits, the other weights each class. They work with any weighting:

    criterion = RGDLoss(logit_adjustment=torch.as_tensor(rgd.log_prior(counts)))
    criterion = RGDLoss(torch.as_tensor(rgd.class_balanced(counts)))
"""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import numpy.typing as npt

from rgd._arrays import refuse_masked


def log_prior(counts: Any) -> npt.NDArray[np.float64]:
    """The logarithm of each class's share of the samples, `log(n_k / sum_j n_j)`.

    Given as `logit_adjustment`, it trains logits whose largest is the best prediction if all classes are
    equally frequent. It is added in training only, not for predictions. `t * log_prior(counts)` adjusts by
    more or less.

    Args:
        counts: The number of samples of each class, shape (C,), or any finite numbers >= 0 in proportion to
            it: a list, a NumPy array, a torch tensor or any CPU array that supports DLPack.

    Returns:
        float64, shape (C,). A class without samples has -inf, which excludes it: a target of that class has
        an infinite loss. With label smoothing every target has, since each class then has a share of it.
        `log_prior(counts + 1)` keeps every class.

    Raises:
        TypeError: If `counts` is no array of numbers.
        ValueError: If `counts` is no vector, holds a number that is negative or not finite, or holds no
            positive number.

    Example:
        >>> import rgd
        >>> rgd.log_prior([900, 90, 10]).round(3)
        array([-0.105, -2.408, -4.605])

    References:
        Menon, Jayasumana, Rawat, Jain, Veit, Kumar, "Long-tail learning via logit adjustment", ICLR 2021,
        arXiv 2007.07314, equation 10.
    """
    samples = _read(counts)
    if not samples.any():
        raise ValueError("counts must hold a positive number, got zeros alone")
    # Divide by the largest first, since the sum of finite numbers may overflow.
    shares = samples / samples.max()
    with np.errstate(divide="ignore"):
        return np.log(shares) - np.log(shares.sum())


def class_balanced(counts: Any, beta: float = 0.9999) -> npt.NDArray[np.float64]:
    """Class weights by the effective number of samples, in proportion to `(1 - beta) / (1 - beta ** n_k)`.

    They sum to the number of classes, as the reference normalises them.

    Args:
        counts: The number of samples of each class, shape (C,), finite numbers > 0: a list, a NumPy array, a
            torch tensor or any CPU array that supports DLPack.
        beta: In [0, 1): 0 gives every class the weight 1; near 1 the weights approach inverse frequency.

    Returns:
        float64, shape (C,), for `weight=`.

    Raises:
        TypeError: If `counts` is no array of numbers, or `beta` no number.
        ValueError: If `counts` is no vector of positive finite numbers, or `beta` is not in [0, 1).

    Example:
        >>> import rgd
        >>> rgd.class_balanced([900, 90, 10], beta=0.99).round(3)
        array([0.228, 0.384, 2.388])
        >>> rgd.class_balanced([900, 90, 10], beta=0.0)
        array([1., 1., 1.])

    References:
        Cui, Jia, Lin, Song, Belongie, "Class-balanced loss based on effective number of samples", CVPR 2019,
        arXiv 1901.05555, equations 4 and 5.
    """
    if isinstance(beta, bool) or not isinstance(beta, numbers.Real):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"beta must be a number in [0, 1), got {beta!r}")
    if not 0 <= beta < 1:
        raise ValueError(f"beta must lie in [0, 1), got {beta}: 0.9999 is the usual choice")
    samples = _read(counts)
    if not samples.all():
        empty = int(np.argmin(samples))
        raise ValueError(
            f"counts must be positive, but class {empty} has no sample: leave it out, or give "
            "np.maximum(counts, 1)"
        )
    with np.errstate(divide="ignore"):
        # This is 1 - beta ** n without the cancellation for beta near 1.
        weights = 1 / -np.expm1(samples * np.log(np.float64(beta)))
    return weights * (samples.size / weights.sum())


def _read(counts: Any) -> npt.NDArray[np.float64]:
    """Counts as a vector of float64, checked."""
    refuse_masked("counts", counts, "pass counts.filled(0)")
    foreign = not issubclass(type(counts), np.ndarray) and hasattr(counts, "__dlpack__")
    try:
        array: npt.NDArray[Any] = np.from_dlpack(counts) if foreign else np.asarray(counts)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise TypeError(f"counts cannot be read as a NumPy array: {reason}") from error
    if array.dtype.kind not in "fiu":
        raise TypeError(f"counts must be an array of numbers, got {array.dtype}")
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"counts must hold the number of samples of each class, shape (C,), got shape {array.shape}: "
            "np.bincount(labels, minlength=C) counts them"
        )
    values = array.astype(np.float64)
    wrong = ~(np.isfinite(values) & (values >= 0))
    if wrong.any():
        raise ValueError(
            f"counts must hold finite numbers >= 0, got {values[wrong][0]} for class {int(np.argmax(wrong))}"
        )
    return values
