"""Re-weighted objectives for boosted trees: LightGBM, XGBoost and CatBoost.

`logistic`, `softmax` and `squared_error` make objects that each of the three libraries takes as its
objective, and `metric` makes plain metrics to stop early by. None of the libraries is imported here.

With `f` the margins, `l_i` the loss of sample `i`, `w_i` its weight (a constant) and `p_i` its
`sample_weight`, the trees descend `sum_i p_i w_i l_i`: the gradient is `p_i w_i dl_i/df_i`, and the Hessian,
of which the libraries take the diagonal, `p_i w_i d^2 l_i/df_i^2`. The weights are computed again at every
tree.

Example:
    >>> import numpy as np, rgd.boosting
    >>> objective = rgd.boosting.logistic(tau=1.0)
    >>> gradient, hessian = objective(np.array([0, 1]), np.array([0.0, 0.0]))
    >>> gradient.round(4), hessian.round(4)
    (array([ 0.7071, -0.7071]), array([0.3536, 0.3536]))

References:
    Kumar et al., arXiv 2306.09222, Algorithm 1, with a boosting round in the place of a gradient step.
    Friedman, Hastie, Tibshirani, "Additive Logistic Regression", Annals of Statistics 2000 (the Hessian of
    softmax).
    https://github.com/dmlc/xgboost/pull/12537 (XGBoost's later choice for softmax).
"""

from __future__ import annotations

from typing import Any

from rgd.boosting._losses import Logistic, Softmax, SquaredError
from rgd.boosting._metric import METRICS, Metric
from rgd.boosting._objective import Objective
from rgd.weightings import Weighting
from rgd.weightings._call import resolve_weighting

__all__ = ["Metric", "Objective", "logistic", "metric", "softmax", "squared_error"]


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)


def logistic(
    weighting: Weighting | None = None,
    *,
    tau: float | None = None,
    scale: float | None = None,
    groups: Any = None,
) -> Objective:
    """The logistic loss of two classes: `l = log(1 + exp(-f))` for label 1 and `log(1 + exp(f))` for 0.

    With `rgd.ERM()` it is LightGBM's `binary`, XGBoost's `binary:logistic` and CatBoost's `Logloss`. Their
    settings for rare classes, `scale_pos_weight` and `is_unbalance`, belong to these objectives and have no
    effect here: give `sample_weight=np.where(y == 1, ratio, 1.0)`.

    Args:
        weighting: Turns losses into weights; `KL(tau=1.0)` if neither this nor `tau` nor `scale` is given.
        tau: Short for `weighting=KL(tau=tau)`.
        scale: Short for `weighting=KL(scale=scale)`; with `tau`, for `KL(tau, scale=scale)`.
        groups: The group of each training sample, integers, shape (n,), for `rgd.GroupDRO`.

    Returns:
        An objective. It takes labels 0 and 1, and probabilities between.

    Raises:
        TypeError: If `weighting` is no weighting, or `groups` holds no integers.
        ValueError: If `tau` or `scale` is given beside `weighting`, or `groups` is not one-dimensional.

    Example:
        >>> import rgd, rgd.boosting
        >>> objective = rgd.boosting.logistic(rgd.ERM())
        >>> gradient, hessian = objective([1, 0], [0.0, 0.0], [1.0, 3.0])
        >>> gradient.tolist(), hessian.tolist()
        ([-0.5, 1.5], [0.25, 0.75])
    """
    return Logistic(resolve_weighting(weighting, tau, scale), groups)


def softmax(
    num_class: int,
    weighting: Weighting | None = None,
    *,
    tau: float | None = None,
    scale: float | None = None,
    groups: Any = None,
) -> Objective:
    """The cross-entropy of several classes: `l = log(sum_j exp(f_j)) - f_y`.

    With `rgd.ERM()` it is LightGBM's `multiclass`, XGBoost's `multi:softprob` and CatBoost's `MultiClass`.
    The diagonal of the Hessian is `q_j (1 - q_j)`, with `q` the probabilities. LightGBM and XGBoost change
    it, and this function does as they do. LightGBM multiplies it by `k / (k - 1)`. XGBoost multiplies it by 2
    in all releases up to 3.4, and replaces it by `|q_j - y_j|` after that; a tree of one sample shows which
    release is installed. A call by XGBoost is recognised by its data set or, if arrays are given, by their
    float32 margins. CatBoost takes the whole Hessian.

    Args:
        num_class: The number `k` of classes, at least 2.
        weighting: Turns losses into weights; `KL(tau=1.0)` if neither this nor `tau` nor `scale` is given.
        tau: Short for `weighting=KL(tau=tau)`.
        scale: Short for `weighting=KL(scale=scale)`; with `tau`, for `KL(tau, scale=scale)`.
        groups: The group of each training sample, integers, shape (n,), for `rgd.GroupDRO`.

    Returns:
        An objective. It takes labels 0..k-1 and margins of shape (n, k).

    Raises:
        TypeError: If `num_class` is not an integer, `weighting` no weighting, or `groups` holds no integers.
        ValueError: If `num_class` is below 2, `tau` or `scale` is given beside `weighting`, or `groups` is
            not one-dimensional.

    Example:
        >>> import numpy as np, rgd, rgd.boosting
        >>> gradient, _ = rgd.boosting.softmax(3, rgd.ERM())([2], np.zeros((1, 3)))
        >>> gradient.round(3)
        array([[ 0.333,  0.333, -0.667]])
    """
    return Softmax(num_class, resolve_weighting(weighting, tau, scale), groups)


def squared_error(
    weighting: Weighting | None = None,
    *,
    tau: float | None = None,
    scale: float | None = None,
    groups: Any = None,
) -> Objective:
    """The squared error, `l = (f - y)^2 / 2`, so that the gradient is `w (f - y)` and the Hessian `w`.

    With `rgd.ERM()` it is LightGBM's `regression`, XGBoost's `reg:squarederror` and CatBoost's `RMSE`.

    Args:
        weighting: Turns losses into weights; `KL(tau=1.0)` if neither this nor `tau` nor `scale` is given.
            Numbers of a weighting are in units of the loss: those of the label squared.
        tau: Short for `weighting=KL(tau=tau)`.
        scale: Short for `weighting=KL(scale=scale)`; with `tau`, for `KL(tau, scale=scale)`.
        groups: The group of each training sample, integers, shape (n,), for `rgd.GroupDRO`.

    Returns:
        An objective.

    Raises:
        TypeError: If `weighting` is no weighting, or `groups` holds no integers.
        ValueError: If `tau` or `scale` is given beside `weighting`, or `groups` is not one-dimensional.

    Example:
        >>> import rgd, rgd.boosting
        >>> gradient, hessian = rgd.boosting.squared_error(rgd.ERM())([1.0, 2.0], [1.5, 0.0])
        >>> gradient.tolist(), hessian.tolist()
        ([0.5, -2.0], [1.0, 1.0])
    """
    return SquaredError(resolve_weighting(weighting, tau, scale), groups)


def metric(name: str) -> Metric:
    """A plain metric for early stopping, which reads margins.

    With a custom objective LightGBM passes margins to its own metrics, and these read them as probabilities.
    The metrics of this function read them as margins.

    Args:
        name: "log_loss", the mean log-loss of two or more classes; "error", the share of samples whose class
            does not have the largest probability; "rmse", the root of the mean squared error.

    Returns:
        A metric that all three libraries take.

    Raises:
        ValueError: If there is no metric of this name.

    Example:
        >>> import rgd.boosting
        >>> rgd.boosting.metric("error").value([1, 0, 1, 1], [2.0, -1.0, 0.5, -3.0])
        0.25
    """
    if name not in METRICS:
        raise ValueError(f"name must be one of {', '.join(map(repr, METRICS))}, got {name!r}")
    return Metric(name)
