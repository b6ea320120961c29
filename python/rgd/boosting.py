"""Re-weighted objectives for boosted trees: LightGBM, XGBoost and CatBoost.

`logistic`, `softmax` and `squared_error` make objects that each of the three libraries takes as its
objective, and `metric` makes plain metrics to stop early by. None of the libraries is imported here.

With `f` the margins, `l_i` the loss of sample `i`, `w_i` its weight (a constant) and `p_i` its
`sample_weight`, the trees descend `sum_i p_i w_i l_i`: the gradient is `p_i w_i dl_i/df_i`, and the Hessian,
of which the libraries take the diagonal, `p_i w_i d^2 l_i/df_i^2`. The weights are computed anew at every
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

import abc
import contextlib
import functools
import json
import numbers
import sys
import warnings
from collections.abc import Mapping
from concurrent import futures
from typing import Any, NoReturn, cast

import numpy as np
import numpy.typing as npt

import rgd
from rgd import _rgd
from rgd._arrays import available_cores, read_groups, refuse_masked
from rgd.weightings import Weighting
from rgd.weightings._base import Kernel
from rgd.weightings._call import kernel_of, resolve_weighting

__all__ = ["Metric", "Objective", "logistic", "metric", "softmax", "squared_error"]

_Floats = npt.NDArray[np.float64]
_Numbers = npt.NDArray[np.float32 | np.float64]
_EPS32, _MAX32 = float(np.finfo(np.float32).eps), float(np.finfo(np.float32).max)


class Objective(abc.ABC):
    """A re-weighted objective; `logistic`, `softmax` and `squared_error` make one.

    It can be called as the objective of LightGBM and XGBoost, by their scikit-learn interface
    (`LGBMClassifier(objective=objective)`) and by their own (`params={"objective": objective}` for LightGBM,
    `xgboost.train(..., obj=objective)`), and has the methods that CatBoost calls
    (`CatBoostClassifier(loss_function=objective)`).

    A weighting that remembers, such as `rgd.GroupDRO`, takes one step at every tree. Its state starts anew
    where all samples have the same margins, as at the first tree of a training. Where `init_score` or
    `base_margin` gives other first margins, make a new objective for every training.

    Attributes:
        weighting: What turns losses into weights.
        groups: The group of each training sample, shape (n,), or None.
        num_class: The number of classes of `softmax`; None for objectives with one margin a sample.
    """

    num_class: Any = None

    def __init__(self, weighting: Weighting | None, tau: float | None, groups: Any) -> None:
        self.weighting = resolve_weighting(weighting, tau)
        self.groups = None if groups is None else read_groups(groups, _array("groups", groups).shape[:1])
        self._state: Any = None

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> tuple[_Floats, _Floats]:
        """Gradient and Hessian of the margins.

        LightGBM and XGBoost also call `objective(margins, dataset)`; then labels and sample weights come
        from the data set. Where no weight is above float32's eps, which leaves nothing to train on, a
        `RuntimeWarning` says so.

        Args:
            y_true: Labels, shape (n,): an array, list, pandas Series or frame of one column.
            y_pred: Margins (raw scores), shape (n,), for `softmax` (n, k).
            sample_weight: The base measure `p`, numbers >= 0, shape (n,); None, or an empty array, for ones.

        Returns:
            The gradient and the diagonal of the Hessian, both of the margins' shape.

        Raises:
            TypeError: If an argument cannot be read as numbers.
            ValueError: If a shape or a label does not fit; if a weight is negative, or a derivative too large
                for float32, in which the libraries keep it; if `base_score` starts XGBoost at probability 0
                or 1; if LightGBM's data set has settings that have no effect, or a wrong one, with an
                objective of one's own (`scale_pos_weight`, `is_unbalance`, metrics that read margins as
                probabilities).
        """
        if hasattr(y_pred, "get_label"):
            dataset: Any = y_pred
            margins, labels, mass = _array("y_pred", y_true), dataset.get_label(), dataset.get_weight()
            if labels is None:
                raise ValueError("the data set has no labels: give label= when you make it")
            library = type(dataset).__module__.partition(".")[0]
            settings: Any = getattr(dataset, "params", None) or {}
            # A data set keeps the settings of its first training, which may have been LightGBM's own.
            if library == "lightgbm" and settings.get("objective") == "none":
                self._check_settings(settings)
        else:
            margins, labels, mass = _array("y_pred", y_pred), y_true, sample_weight
            library = "xgboost" if margins.dtype == np.float32 else "lightgbm"
        if self.num_class is not None and margins.ndim == 1 and margins is not y_pred:
            return self._flat(labels, margins, mass, library)
        return self._weighted(*self._read(labels, margins), mass, library)

    def losses(self, y_true: Any, y_pred: Any) -> _Floats:
        """The loss of each sample.

        Args:
            y_true: Labels, as for a call.
            y_pred: Margins, as for a call.

        Returns:
            Losses, shape (n,).
        """
        return self._losses(*self._read(y_true, y_pred))

    def weights(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> _Floats:
        """The weight of each sample, without its `sample_weight`.

        Args:
            y_true: Labels, as for a call.
            y_pred: Margins, as for a call.
            sample_weight: The base measure, as for a call.

        Returns:
            Weights, shape (n,).
        """
        labels, margins = self._read(y_true, y_pred)
        mass = _mass(sample_weight, labels.size)
        return self._weigh(self._losses(labels, margins), mass, self._state_before(margins))[0]

    def start(self, y_true: Any, sample_weight: Any = None) -> Any:
        """The margin of the mean label, at which the libraries start objectives of their own.

        It is for `init_score` of LightGBM, and for `base_margin` or, but for `logistic`, `base_score` of
        XGBoost.

        Args:
            y_true: Labels, as for a call.
            sample_weight: The base measure, as for a call.

        Returns:
            A number; for `softmax` an array of shape (k,), of mean 0.

        Raises:
            TypeError: If an argument cannot be read as numbers.
            ValueError: If a shape or a label does not fit, or the start would be infinite: a class is
                missing.

        Example:
            >>> import rgd.boosting
            >>> round(rgd.boosting.logistic().start([0, 0, 0, 1]), 4)
            -1.0986
        """
        labels = _column("y_true", y_true)
        self._losses(labels, np.zeros((labels.size, self.num_class) if self.num_class else labels.size))
        return self._start(labels, _mass(sample_weight, labels.size))

    def calc_ders_range(self, approxes: Any, targets: Any, weights: Any) -> list[tuple[float, float]]:
        """What CatBoost calls where a sample has one margin, for a part of the samples at a time.

        Args:
            approxes: Margins, n numbers.
            targets: Labels, n numbers.
            weights: The base measure, n numbers, or None.

        Returns:
            For each sample the first and the second derivative of what CatBoost maximises: `-l`.
        """
        self._require_pointwise()
        labels, margins = self._read(targets, approxes)
        gradient, hessian = self._weighted(labels, margins, weights, "catboost")
        return list(zip((-gradient).tolist(), (-hessian).tolist(), strict=True))

    _kernel: str
    """The name of the loss in the kernels."""

    @abc.abstractmethod
    def _read(self, labels: Any, margins: Any) -> tuple[_Numbers, _Numbers]:
        """Labels, shape (n,), and margins, shape (n,) or (n, k)."""

    @abc.abstractmethod
    def _refuse_label(self, label: float, labels: _Numbers) -> NoReturn:
        """Refuse a label that the loss does not take."""
        raise NotImplementedError

    @abc.abstractmethod
    def _start(self, labels: _Numbers, mass: _Numbers | None) -> Any:
        """The margin of the mean label."""

    def _curvature(self, library: str) -> float | None:
        """What a library multiplies the diagonal of the Hessian by; None where it has `|dl/df|` instead."""
        return 1.0

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings of LightGBM that would do nothing, or another thing than they say."""
        for name in ("metric", "metrics", "metric_types"):
            given = settings.get(name)
            for value in given.split(",") if isinstance(given, str) else given or ():
                if value in _READS_PROBABILITIES:
                    raise ValueError(
                        f"{value!r} of LightGBM reads margins as probabilities where the objective is not "
                        'its own: set metric="None" and feval=rgd.boosting.metric("log_loss"), and make '
                        "a new Dataset, which keeps its first settings"
                    )

    def _check_start(self, labels: _Numbers, margins: _Numbers) -> None:  # noqa: B027 - most losses have none
        """Refuse a start of XGBoost that cannot be meant."""

    def _losses(self, labels: _Numbers, margins: _Numbers) -> _Floats:
        """The loss of each sample, shape (n,)."""
        losses = np.empty(labels.shape)
        wrong = _rgd.boosting_losses(self._kernel, _rows(margins), labels, losses, available_cores())
        if wrong is not None:
            self._refuse_label(float(labels[wrong]), labels)
        return losses

    def _weighted(
        self, labels: _Numbers, margins: _Numbers, sample_weight: Any, library: str
    ) -> tuple[_Floats, _Floats]:
        mass = _mass(sample_weight, labels.size)
        if library == "xgboost":
            self._check_start(labels, margins)
        weights: _Floats | None = None
        state = self._state_before(margins)
        kernel: Kernel | None = kernel_of(self.weighting) if self.weighting.pointwise else None
        if kernel is None:
            weights, state = self._weigh(self._losses(labels, margins), mass, state)
        # Of the same order in memory: class after class where the margins are.
        gradient, hessian = (np.empty_like(margins, dtype=np.float64) for _ in range(2))
        wrong, largest = _rgd.boosting_derivatives(
            self._kernel, _rows(margins), labels, mass, weights, *(kernel or (None, ())),
            self._curvature(library), _rows(gradient), _rows(hessian), available_cores(),
        )  # fmt: skip
        match wrong:
            case ("label", sample):
                self._refuse_label(float(labels[sample]), labels)
            case ("mass", sample):
                wrong_mass = None if mass is None else mass[sample]
                raise ValueError(f"sample_weight must hold finite numbers >= 0, got {wrong_mass}")
            case ("overflow", sample):
                self._refuse_overflow(sample, labels, margins, weights)
            case _:  # nothing is
                pass
        # CatBoost shows a part of the samples, which may be all wrong ones.
        if largest < _EPS32 and library != "catboost" and (labels.size if mass is None else mass.any()):
            warnings.warn(
                f"the largest weight of {self.weighting} is {largest:.2g}, so that nothing is left to train "
                f"on: {self._scale_hint}give a scale nearer to 0, or stop earlier",
                RuntimeWarning,
                stacklevel=3,
            )
        self._state = state
        return gradient, hessian

    _scale_hint = ""
    """What to do about large losses before the weighting is changed."""

    def _refuse_overflow(
        self, sample: int, labels: _Numbers, margins: _Numbers, weights: _Floats | None
    ) -> NoReturn:
        if not np.isfinite(margins[sample]).all():
            raise ValueError(
                f"the margins of sample {sample} are not finite: the trees have diverged, so train with a "
                "smaller learning rate"
            )
        losses = self._losses(labels[sample : sample + 1], margins[sample : sample + 1])
        # Without weights it was a kernel, of one loss each.
        weight = rgd.sample_weights(losses, self.weighting)[0] if weights is None else weights[sample]
        if weight < 0:
            raise ValueError(f"weights must be >= 0, got {weight:.3g} for a loss of {losses[0]:.3g}")
        raise ValueError(
            f"sample {sample} has a loss of {losses[0]:.3g} and a weight of {weight:.3g}, and so derivatives "
            f"too large for float32, in which the libraries keep them: {self._scale_hint}give tau, or use a "
            "scale nearer to 0"
        )

    def _state_before(self, margins: _Numbers) -> Any:
        """The weighting's state before the next tree; None for a weighting that keeps none."""
        if not self.weighting.stateful:
            return None
        return self.weighting.init() if self._state is None or _all_alike(margins) else self._state

    def _weigh(self, losses: _Floats, mass: _Numbers | None, state: Any) -> tuple[_Floats, Any]:
        if self.groups is not None and self.groups.shape != losses.shape:
            raise ValueError(
                f"groups must have one entry a training sample, {losses.shape}, got {self.groups.shape}: in "
                "cross-validation make an objective for each fold"
            )
        given: dict[str, Any] = {"sample_weight": mass, "groups": self.groups}
        if state is not None:
            return rgd.sample_weights(losses, self.weighting, state=state, **given)
        return cast("Any", rgd.sample_weights(losses, self.weighting, **given)), None

    def _require_pointwise(self) -> None:
        if not self.weighting.pointwise or self.weighting.stateful:
            raise ValueError(
                f"CatBoost shows an objective a part of the samples at a time, and the weights of "
                f"{type(self.weighting).__name__} depend on all of them: use a pointwise weighting without "
                "state, such as rgd.KL(tau=1.0), or LightGBM or XGBoost"
            )
        if self.groups is not None:
            raise ValueError(
                "CatBoost shows an objective a part of the samples at a time, and does not say which: leave "
                "groups out, or use LightGBM or XGBoost"
            )

    def _flat(self, labels: Any, margins: Any, mass: Any, library: str) -> tuple[_Floats, _Floats]:
        """The derivatives for margins of several classes in one flat array, and in its order."""
        order: Any = "F" if library == "lightgbm" else "C"  # LightGBM before version 4: class after class
        if not self.num_class or margins.size % self.num_class:
            raise ValueError(
                f"margins must be {self.num_class} for each sample, got {margins.size} in all: give the "
                f"library num_class={self.num_class} too"
            )
        rows = margins.reshape((-1, self.num_class), order=order)
        gradient, hessian = self._weighted(*self._read(labels, rows), mass, library)
        return gradient.ravel(order=order), hessian.ravel(order=order)

    def __repr__(self) -> str:
        return f"rgd.boosting.{type(self).__name__.lstrip('_').lower()}({self.weighting})"


class _OneMargin(Objective):
    """An objective with one margin a sample."""

    def _read(self, labels: Any, margins: Any) -> tuple[_Numbers, _Numbers]:
        target, scores = _column("y_true", labels), _column("y_pred", margins)
        if target.shape != scores.shape:
            raise ValueError(
                f"y_true and y_pred must have one entry a sample each, got {target.shape} and "
                f"{_array('y_pred', margins).shape}: {self._hint}"
            )
        return target, scores

    _hint = "pass margins of shape (n,)"


class _Logistic(_OneMargin):
    _kernel = "logistic"
    _hint = "for more than two classes use rgd.boosting.softmax(num_class)"

    def _start(self, labels: _Numbers, mass: _Numbers | None) -> float:
        mean = _average(labels, mass)
        if not 0 < mean < 1:
            raise ValueError(f"y_true must hold both classes, got a mean label of {mean:g}")
        return float(np.log(mean) - np.log1p(-mean))

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        super()._check_settings(settings)
        for name, off in _BALANCING.items():
            if str(settings.get(name)).lower() not in off:
                raise ValueError(
                    f"LightGBM ignores {name} where the objective is not its own: leave it out, and make a "
                    "new Dataset with weight=np.where(y == 1, ratio, 1.0)"
                )

    def _check_start(self, labels: _Numbers, margins: _Numbers) -> None:
        # XGBoost takes probabilities of 0 and 1 for 1e-6 and 1 - 1e-6.
        if (
            margins.size
            and abs(margins[0]) > 13.8
            and 1e-5 < labels.mean() < 1 - 1e-5
            and _all_alike(margins)
        ):
            raise ValueError(
                f"XGBoost starts at margin {margins[0]:.3g}, where no tree can grow: its base_score is a "
                "probability. Give base_score=y.mean(), or 0.5 to start at margin 0"
            )

    def _refuse_label(self, label: float, labels: _Numbers) -> NoReturn:
        hint = ""
        if np.isin(labels, (-1.0, 1.0)).all():
            hint = ": for labels -1 and 1 pass (y > 0).astype(int)"
        elif np.isfinite(label) and label > 1:
            hint = ": for more than two classes use rgd.boosting.softmax(num_class)"
        raise ValueError(f"y_true must hold 0 and 1 (or probabilities between), got {label:g}{hint}")


class _Squared_Error(_OneMargin):  # noqa: N801 - `repr` shows the name of the function
    _kernel = "squared_error"
    _scale_hint = "scale the labels, as in (y - y.mean()) / y.std(), "

    def _start(self, labels: _Numbers, mass: _Numbers | None) -> float:
        return _average(labels, mass)

    def _refuse_label(self, label: float, labels: _Numbers) -> NoReturn:
        raise ValueError(f"y_true must hold finite numbers, got {label}")


class _Softmax(Objective):
    num_class: int
    _kernel = "softmax"

    def __init__(self, num_class: int, weighting: Weighting | None, tau: float | None, groups: Any) -> None:
        super().__init__(weighting, tau, groups)
        if isinstance(num_class, bool) or not isinstance(num_class, numbers.Integral):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"num_class must be the number of classes, an integer, got {num_class!r}")
        if num_class < 2:
            raise ValueError(f"num_class must be the number of classes, at least 2, got {num_class}")
        self.num_class = int(num_class)

    def __repr__(self) -> str:
        return f"rgd.boosting.softmax({self.num_class}, {self.weighting})"

    def calc_ders_multi(
        self, approx: Any, target: float, weight: float | None
    ) -> tuple[list[float], list[list[float]]]:
        """What CatBoost calls where a sample has several margins, for one sample at a time.

        Args:
            approx: The margins of the sample, k numbers.
            target: Its label.
            weight: Its base measure, or None.

        Returns:
            The first derivatives, k numbers, and the second, k rows of k, of what CatBoost maximises: `-l`.
        """
        self._require_pointwise()
        labels, margins = self._read([target], np.asarray(approx, np.float64)[None])
        mass = None if weight is None else np.array([weight], np.float64)
        weights, _ = self._weigh(self._losses(labels, margins), mass, None)
        factor = float(weights[0]) * (1.0 if weight is None else float(weight))
        if not (np.isfinite(margins).all() and 0 <= factor <= _MAX32):
            self._refuse_overflow(0, labels, margins, weights)
        probability = np.exp(_log_softmax(margins))[0]
        first = -probability
        first[int(labels[0])] += 1.0
        second = np.outer(probability, probability)
        second[np.diag_indices(self.num_class)] -= probability
        return (factor * first).tolist(), (factor * second).tolist()

    def _read(self, labels: Any, margins: Any) -> tuple[_Numbers, _Numbers]:
        target = _column("y_true", labels)
        scores = _as_floats(_array("y_pred", margins))
        shape = (target.size, self.num_class)
        if scores.shape != shape:
            raise ValueError(
                f"y_pred must have a row a sample and a column a class, {shape}, got {scores.shape}: give "
                f"the library num_class={self.num_class} too, and rgd.boosting.softmax its number of classes"
            )
        return target, scores

    def _refuse_label(self, label: float, labels: _Numbers) -> NoReturn:
        raise ValueError(
            f"y_true must hold the classes 0..{self.num_class - 1} as whole numbers, got {label:g}"
        )

    def _curvature(self, library: str) -> float | None:
        # The diagonal alone is steeper than the whole Hessian; each library has its factor for that.
        return _xgboost_curvature() if library == "xgboost" else self.num_class / (self.num_class - 1.0)

    def _start(self, labels: _Numbers, mass: _Numbers | None) -> _Floats:
        shares = np.array([_average(labels == j, mass) for j in range(self.num_class)])
        if not shares.all():
            raise ValueError(f"y_true must hold every class, got no sample of class {shares.argmin()}")
        return np.log(shares) - np.log(shares).mean()


def logistic(
    weighting: Weighting | None = None, *, tau: float | None = None, groups: Any = None
) -> Objective:
    """The logistic loss of two classes: `l = log(1 + exp(-f))` for label 1 and `log(1 + exp(f))` for 0.

    With `rgd.ERM()` it is LightGBM's `binary`, XGBoost's `binary:logistic` and CatBoost's `Logloss`. Their
    settings for rare classes, `scale_pos_weight` and `is_unbalance`, belong to these objectives and have no
    effect here: give `sample_weight=np.where(y == 1, ratio, 1.0)`.

    Args:
        weighting: Turns losses into weights; `KL(tau=1.0)` if neither this nor `tau` is given.
        tau: Short for `weighting=KL(tau=tau)`.
        groups: The group of each training sample, integers, shape (n,), for `rgd.GroupDRO`.

    Returns:
        An objective. It takes labels 0 and 1, and probabilities between.

    Raises:
        TypeError: If `weighting` is no weighting, or `groups` holds no integers.
        ValueError: If both are given, or `groups` is not one-dimensional.

    Example:
        >>> import rgd, rgd.boosting
        >>> objective = rgd.boosting.logistic(rgd.ERM())
        >>> gradient, hessian = objective([1, 0], [0.0, 0.0], [1.0, 3.0])
        >>> gradient.tolist(), hessian.tolist()
        ([-0.5, 1.5], [0.25, 0.75])
    """
    return _Logistic(weighting, tau, groups)


def softmax(
    num_class: int, weighting: Weighting | None = None, *, tau: float | None = None, groups: Any = None
) -> Objective:
    """The cross-entropy of several classes: `l = log(sum_j exp(f_j)) - f_y`.

    With `rgd.ERM()` it is LightGBM's `multiclass`, XGBoost's `multi:softprob` and CatBoost's `MultiClass`.
    LightGBM and XGBoost do not use the diagonal of the Hessian, `q_j (1 - q_j)` with `q` the probabilities,
    as it is, and this does as they do: LightGBM multiplies it by `k / (k - 1)`. XGBoost multiplies it by 2
    in all releases up to 3.4, and takes `|q_j - y_j|` in its place after that; a tree of one sample tells
    which is installed. XGBoost is known by its data set or, where arrays are given, by their float32
    margins. CatBoost takes the whole Hessian.

    Args:
        num_class: The number `k` of classes, at least 2.
        weighting: Turns losses into weights; `KL(tau=1.0)` if neither this nor `tau` is given.
        tau: Short for `weighting=KL(tau=tau)`.
        groups: The group of each training sample, integers, shape (n,), for `rgd.GroupDRO`.

    Returns:
        An objective. It takes labels 0..k-1 and margins of shape (n, k).

    Raises:
        TypeError: If `num_class` is not an integer, `weighting` no weighting, or `groups` holds no integers.
        ValueError: If `num_class` is below 2, both `weighting` and `tau` are given, or `groups` is not
            one-dimensional.

    Example:
        >>> import numpy as np, rgd, rgd.boosting
        >>> gradient, _ = rgd.boosting.softmax(3, rgd.ERM())([2], np.zeros((1, 3)))
        >>> gradient.round(3)
        array([[ 0.333,  0.333, -0.667]])
    """
    return _Softmax(num_class, weighting, tau, groups)


def squared_error(
    weighting: Weighting | None = None, *, tau: float | None = None, groups: Any = None
) -> Objective:
    """The squared error, `l = (f - y)^2 / 2`, so that the gradient is `w (f - y)` and the Hessian `w`.

    With `rgd.ERM()` it is LightGBM's `regression`, XGBoost's `reg:squarederror` and CatBoost's `RMSE`.

    Args:
        weighting: Turns losses into weights; `KL(tau=1.0)` if neither this nor `tau` is given. Numbers of a
            weighting are in units of the loss: those of the label squared.
        tau: Short for `weighting=KL(tau=tau)`.
        groups: The group of each training sample, integers, shape (n,), for `rgd.GroupDRO`.

    Returns:
        An objective.

    Raises:
        TypeError: If `weighting` is no weighting, or `groups` holds no integers.
        ValueError: If both are given, or `groups` is not one-dimensional.

    Example:
        >>> import rgd, rgd.boosting
        >>> gradient, hessian = rgd.boosting.squared_error(rgd.ERM())([1.0, 2.0], [1.5, 0.0])
        >>> gradient.tolist(), hessian.tolist()
        ([0.5, -2.0], [1.0, 1.0])
    """
    return _Squared_Error(weighting, tau, groups)


class Metric:
    """A plain metric of margins, the smaller the better; `metric` makes one.

    LightGBM takes it as `feval` and, in scikit-learn's interface, as `eval_metric`; XGBoost as
    `custom_metric` and `eval_metric`; CatBoost as `eval_metric`. It reads margins, which the libraries hand
    over where the objective is one of `rgd.boosting`.
    """

    def __init__(self, name: str) -> None:
        self.__name__ = name  # XGBoost reports it

    def value(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> float:
        """The metric as a number.

        Args:
            y_true: Labels, shape (n,).
            y_pred: Margins, shape (n,), of several classes (n, k).
            sample_weight: Numbers >= 0, shape (n,); None, or an empty array, for ones.

        Returns:
            The mean over the samples, in float64.

        Raises:
            TypeError: If an argument cannot be read as numbers.
            ValueError: If a shape or a label does not fit, or `y_pred` holds the probabilities of several
                classes.
        """
        errors = self._errors(y_true, _array("y_pred", y_pred))
        return self.get_final_error(_average(errors, _mass(sample_weight, errors.size)), 1.0)

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """What LightGBM and XGBoost call: `value` in the form that each of them expects.

        The library is known by its data set or, where arrays are given, by the dtype of the margins, as for
        an `Objective`.

        Args:
            y_true: Labels, or margins where `y_pred` is a data set.
            y_pred: Margins, or a data set.
            sample_weight: As for `value`.

        Returns:
            `(name, value, False)` for LightGBM, `(name, value)` for `xgboost.train`, and `value` for
            XGBoost's scikit-learn interface.
        """
        if hasattr(y_pred, "get_label"):
            dataset: Any = y_pred
            value = self.value(dataset.get_label(), y_true, dataset.get_weight())
            xgboost = type(dataset).__module__.startswith("xgboost")
            return (self.__name__, value) if xgboost else (self.__name__, value, False)
        value = self.value(y_true, y_pred, sample_weight)
        return value if _array("y_pred", y_pred).dtype == np.float32 else (self.__name__, value, False)

    def is_max_optimal(self) -> bool:
        """Whether CatBoost shall look for the largest value."""
        return False

    def evaluate(self, approxes: Any, target: Any, weight: Any) -> tuple[float, float]:
        """What CatBoost calls.

        Args:
            approxes: Margins: for each class n numbers.
            target: Labels, n numbers.
            weight: The base measure, n numbers, or None.

        Returns:
            The sum over the samples, and the sum of their weights.
        """
        margins = np.stack([np.asarray(approx, np.float64) for approx in approxes], axis=1)
        errors = self._errors(target, margins[:, 0] if margins.shape[1] == 1 else margins)
        mass = _mass(weight, errors.size)
        mass = np.ones(errors.size) if mass is None else mass
        return float(np.dot(mass, errors)), float(mass.sum())

    def get_final_error(self, error: float, weight: float) -> float:
        """The metric, from the sums that `evaluate` returns.

        Args:
            error: The first sum.
            weight: The second.
        """
        mean = error / weight if weight else float("nan")
        return float(np.sqrt(mean)) if self.__name__ == "rmse" else mean

    def _errors(self, labels: Any, margins: npt.NDArray[Any]) -> _Floats:
        """What the metric averages, one number a sample."""
        if self.__name__ == "rmse":
            return 2 * squared_error(rgd.ERM()).losses(labels, margins)
        several = margins.ndim == 2 and margins.shape[1] > 1
        if several and margins.size and margins.min() >= 0 and abs(margins.sum(axis=1) - 1).max() < 1e-3:
            raise ValueError(
                "y_pred holds probabilities, and rgd.boosting.metric reads margins: use it with an objective "
                "of rgd.boosting, and the library's own metrics with its own objectives"
            )
        objective = softmax(margins.shape[1], rgd.ERM()) if several else logistic(rgd.ERM())
        losses = objective.losses(labels, margins)
        if self.__name__ == "log_loss":
            return losses
        target = _column("y_true", labels)
        if several:
            return (margins.argmax(axis=1) != target).astype(np.float64)
        return ((_column("y_pred", margins) > 0) != (target > 0.5)).astype(np.float64)

    def __repr__(self) -> str:
        return f"rgd.boosting.metric({self.__name__!r})"


def metric(name: str) -> Metric:
    """A plain metric for early stopping: what the libraries' own metrics measure, but of margins.

    Where the objective is not its own, LightGBM hands margins to its metrics, and these read them as
    probabilities. Metrics of this function read them as margins.

    Args:
        name: "log_loss", the mean log-loss of two or more classes; "error", the share of samples whose class
            has not the largest probability; "rmse", the root of the mean squared error.

    Returns:
        A metric that all three libraries take.

    Raises:
        ValueError: If there is no metric of this name.

    Example:
        >>> import rgd.boosting
        >>> rgd.boosting.metric("error").value([1, 0, 1, 1], [2.0, -1.0, 0.5, -3.0])
        0.25
    """
    if name not in _METRICS:
        raise ValueError(f"name must be one of {', '.join(map(repr, _METRICS))}, got {name!r}")
    return Metric(name)


_METRICS = ("log_loss", "error", "rmse")
_READS_PROBABILITIES = {
    "binary", "binary_logloss", "binary_error", "cross_entropy", "xentropy", "kullback_leibler", "kldiv",
    "multiclass", "multi_logloss", "softmax", "multiclassova", "multiclass_ova", "ova", "ovr",
}  # fmt: skip
"""Metrics of LightGBM that need its own objective."""
_BALANCING = {
    "scale_pos_weight": ("none", "1", "1.0"),
    **dict.fromkeys(("is_unbalance", "unbalance", "unbalanced_sets"), ("none", "false", "0")),
}
"""Settings of LightGBM that belong to its own objective, and the values that change nothing there."""


def _xgboost_curvature() -> float | None:
    """What XGBoost multiplies `q (1 - q)` of softmax by; None where its Hessian is `|q - y|`."""
    return _measured_curvature() if "xgboost" in sys.modules else 2.0


@functools.cache
def _measured_curvature() -> float | None:
    def covers() -> list[float]:
        xgboost = sys.modules["xgboost"]
        settings = {"objective": "multi:softprob", "num_class": 3, "base_score": 0.5, "nthread": 1}
        booster = xgboost.train(settings, xgboost.DMatrix(np.zeros((1, 1)), label=[0.0]), 1)
        return [json.loads(tree)["cover"] for tree in booster.get_dump(with_stats=True, dump_format="json")]

    # Distributed training is known to the thread it runs in: from another one, no worker waits for others.
    with futures.ThreadPoolExecutor(1) as thread:
        own, other, _ = thread.submit(covers).result()
    # Of a sample with probabilities 1/3 all `q (1 - q)` are equal, and `|q - y|` is larger for its own class.
    return 2.0 if own < 1.5 * other else None


def _all_alike(margins: _Numbers) -> bool:
    """Whether all samples have the same margins."""
    return bool((margins == margins[:1]).all())


def _log_softmax(margins: _Numbers) -> _Numbers:
    shifted = margins - margins.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _array(name: str, given: Any) -> npt.NDArray[Any]:
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


def _as_floats(array: npt.NDArray[Any]) -> _Numbers:
    """The array itself where the kernels can read it, float32 or float64, else a copy in float64."""
    dtype: Any = array.dtype
    if dtype.kind == "f" and dtype.itemsize in (4, 8) and dtype.isnative and array.flags.aligned:
        return array
    return array.astype(np.float64)


def _rows(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Values of shape (n,) as a column; (n, k) stays."""
    return values if values.ndim == 2 else values[:, None]


def _mass(sample_weight: Any, count: int) -> _Numbers | None:
    """The base measure, shape (n,); None for ones."""
    if sample_weight is None:
        return None
    mass = _column("sample_weight", sample_weight)
    if not mass.size:
        # XGBoost's data set gives an empty array where no weights were set.
        return None
    if mass.size != count:
        raise ValueError(f"sample_weight must have one entry a sample, {(count,)}, got {mass.shape}")
    return mass


def _average(values: npt.NDArray[Any], mass: _Numbers | None) -> float:
    if mass is not None and not (np.isfinite(mass).all() and mass.min() >= 0 and mass.any()):
        raise ValueError("sample_weight must hold finite numbers >= 0, and not only 0")
    return float(np.average(values, weights=mass))


def _column(name: str, given: Any) -> _Numbers:
    """Numbers of shape (n,), from that or (n, 1)."""
    array = _array(name, given)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"{name} must have one entry a sample, shape (n,), got shape {array.shape}")
    return _as_floats(array)
