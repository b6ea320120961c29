"""The samples that look mislabelled in a training: their losses stay large."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rgd._to_numpy import as_floats, as_labels


class Suspects(NamedTuple):
    """The samples whose losses are the largest, the largest first.

    Attributes:
        indices: Where they are among the samples, int64, shape (k,).
        losses: Their losses, float64, shape (k,).
        proposed: The class of the largest logit of each, int64, shape (k,); None where no logits were given.
    """

    indices: npt.NDArray[np.int64]
    losses: npt.NDArray[np.float64]
    proposed: npt.NDArray[np.int64] | None


def suspects(
    losses: Any,
    *,
    k: int | None = None,
    share: float | None = None,
    threshold: float | None = None,
    target: Any = None,
    logits: Any = None,
) -> Suspects:
    """The samples that look mislabelled: those with the largest losses.

    A network learns right labels before it memorises wrong ones. A negative scale strengthens this, since
    samples with large losses hardly count. Take losses averaged over some epochs (`rgd.torch.LossHistory`),
    and check the first samples of the result.

    Give exactly one of `k`, `share` and `threshold`. Samples whose loss is NaN are left out; the mean loss of
    a sample that was never seen is NaN.

    Args:
        losses: One plain loss a sample, shape (N,), floating: a list, or an array of NumPy, torch or JAX.
        k: How many samples to return, from 0 to N. Fewer are returned if fewer are left.
        share: The share of the N samples to return, in [0, 1], rounded to a whole number of samples.
        threshold: Returns the samples whose loss is larger than this.
        target: The given labels, integers, shape (N,). Samples with a negative label (ignored ones) are left
            out. If `logits` are given too, samples are left out whose given label the model predicts.
        logits: The model's logits or probabilities, shape (N, C), floating.

    Returns:
        Their indices, losses and, with `logits`, the labels that the model predicts. Samples with equal
        losses keep their order.

    Raises:
        TypeError: If `losses` or `logits` hold no floating numbers, `target` no integers, or `k` is none.
        ValueError: If not exactly one of `k`, `share` and `threshold` is given, one of them is out of range,
            or a shape does not fit.

    Example:
        >>> import rgd
        >>> found = rgd.suspects([0.1, 4.0, 0.3, 2.5], k=2)
        >>> found.indices, found.losses
        (array([1, 3]), array([4. , 2.5]))

    References:
        Large losses as a sign of wrong labels: Arazo et al., "Unsupervised Label Noise Modeling and Loss
        Correction", ICML 2019, arXiv 1904.11238; averaged over the training: Huang et al., "O2U-Net", ICCV
        2019.
    """
    values = as_floats("losses", losses)
    if values.ndim != 1:
        raise ValueError(f"losses must have shape (N,), one loss a sample, got {values.shape}")
    known = ~np.isnan(values)
    labels = None if target is None else _labels(target, len(values))
    if labels is not None:
        known &= labels >= 0
    proposed = None if logits is None else _classes(logits, len(values))
    if labels is not None and proposed is not None:
        known &= labels != proposed
    at_most, above = _limits(len(values), k, share, threshold)
    order = np.argsort(-values, kind="stable")
    order = order[known[order] & (values[order] > above)][:at_most].astype(np.int64)
    return Suspects(order, values[order], None if proposed is None else proposed[order])


def _limits(count: int, k: int | None, share: float | None, threshold: float | None) -> tuple[int, float]:
    """How many samples at most, and above which loss."""
    given = {"k": k, "share": share, "threshold": threshold}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(
            f"give exactly one of k, share and threshold, got {' and '.join(named) or 'none of them'}"
        )
    if k is not None:
        try:
            k = operator.index(k)
        except TypeError:
            raise TypeError(f"k must be an integer, got {k!r}") from None
        if not 0 <= k <= count:
            raise ValueError(f"k must be from 0 to {count}, the number of samples, got {k}")
        return k, -np.inf
    if share is not None:
        if not 0 <= share <= 1:
            raise ValueError(f"share must be in [0, 1], got {share}")
        return round(share * count), -np.inf
    if threshold is None or np.isnan(threshold):
        raise ValueError(f"threshold must be a number, got {threshold}")
    return count, threshold


def _labels(target: Any, count: int) -> npt.NDArray[Any]:
    labels = as_labels("target", target)
    if labels.shape != (count,):
        raise ValueError(f"target must have the shape of losses, ({count},), got {labels.shape}")
    return labels


def _classes(logits: Any, count: int) -> npt.NDArray[np.int64]:
    values = as_floats("logits", logits)
    if values.ndim != 2 or len(values) != count or not values.shape[1]:
        raise ValueError(f"logits must have shape (N, C) with N = {count}, got {values.shape}")
    return values.argmax(axis=1).astype(np.int64)
