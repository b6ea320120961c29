"""Re-weighted objectives for boosted trees: LightGBM, XGBoost and CatBoost.

`logistic`, `softmax` and `squared_error` make objects that each of the three libraries takes as its
objective. None of the libraries is imported here.

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
"""

from __future__ import annotations

import abc
import contextlib
import numbers
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

import rgd
from rgd import _rgd
from rgd._arrays import available_cores
from rgd.weightings import Weighting
from rgd.weightings._base import Kernel, kernel_of, resolve_weighting

__all__ = ["Objective", "logistic", "softmax", "squared_error"]

_Floats = npt.NDArray[np.float64]
_Numbers = npt.NDArray[np.float32 | np.float64]


class Objective(abc.ABC):
    """A re-weighted objective; `logistic`, `softmax` and `squared_error` make one.

    It can be called as the objective of LightGBM and XGBoost, by their scikit-learn interface
    (`LGBMClassifier(objective=objective)`) and by their own (`params={"objective": objective}` for LightGBM,
    `xgboost.train(..., obj=objective)`), and has the methods that CatBoost calls
    (`CatBoostClassifier(loss_function=objective)`).

    Attributes:
        weighting: What turns losses into weights.
        num_class: The number of classes of `softmax`; None for objectives with one margin a sample.
    """

    num_class: Any = None

    def __init__(self, weighting: Weighting | None, tau: float | None) -> None:
        self.weighting = resolve_weighting(weighting, tau)
        if self.weighting.stateful:
            raise ValueError(
                f"{type(self.weighting).__name__} remembers earlier batches, and an objective for boosted "
                "trees sees all samples at every tree: use a weighting without state, such as rgd.KL(tau=1.0)"
            )

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> tuple[_Floats, _Floats]:
        """Gradient and Hessian of the margins.

        LightGBM and XGBoost also call `objective(margins, dataset)`; then labels and sample weights come
        from the data set.

        Args:
            y_true: Labels, shape (n,): an array, list, pandas Series or frame of one column.
            y_pred: Margins (raw scores), shape (n,), for `softmax` (n, k).
            sample_weight: The base measure `p`, numbers >= 0, shape (n,); None, or an empty array, for ones.

        Returns:
            The gradient and the diagonal of the Hessian, both of the margins' shape.

        Raises:
            TypeError: If an argument cannot be read as numbers.
            ValueError: If a shape or a label does not fit.
        """
        if hasattr(y_pred, "get_label"):
            dataset: Any = y_pred
            margins, labels, mass = _array("y_pred", y_true), dataset.get_label(), dataset.get_weight()
            if labels is None:
                raise ValueError("the data set has no labels: give label= when you make it")
            library = type(dataset).__module__.partition(".")[0]
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
        losses = self.losses(y_true, y_pred)
        return self._weights(losses, _mass(sample_weight, losses.size))

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

    def _curvature(self, library: str) -> float:
        """What a library multiplies the diagonal of the Hessian by."""
        return 1.0

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
        weights: _Floats | None = None
        kernel: Kernel | None = kernel_of(self.weighting) if self.weighting.pointwise else None
        if kernel is None:
            weights = self._weights(self._losses(labels, margins), mass)
        # Of the same order in memory: class after class where the margins are.
        gradient, hessian = (np.empty_like(margins, dtype=np.float64) for _ in range(2))
        wrong_label, wrong_mass = _rgd.boosting_derivatives(
            self._kernel, _rows(margins), labels, mass, weights, *(kernel or (None, ())),
            self._curvature(library), _rows(gradient), _rows(hessian), available_cores(),
        )  # fmt: skip
        if wrong_label is not None:
            self._refuse_label(float(labels[wrong_label]), labels)
        if mass is not None and wrong_mass is not None:
            raise ValueError(f"sample_weight must hold finite numbers >= 0, got {mass[wrong_mass]}")
        return gradient, hessian

    def _weights(self, losses: _Floats, mass: _Numbers | None) -> _Floats:
        return rgd.sample_weights(losses, self.weighting, sample_weight=mass)

    def _require_pointwise(self) -> None:
        if not self.weighting.pointwise:
            raise ValueError(
                f"CatBoost shows an objective a part of the samples at a time, and the weights of "
                f"{type(self.weighting).__name__} depend on all of them: use a pointwise weighting, such as "
                "rgd.KL(tau=1.0), or LightGBM or XGBoost"
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

    def _refuse_label(self, label: float, labels: _Numbers) -> NoReturn:
        hint = ""
        if np.isin(labels, (-1.0, 1.0)).all():
            hint = ": for labels -1 and 1 pass (y > 0).astype(int)"
        elif np.isfinite(label) and label > 1:
            hint = ": for more than two classes use rgd.boosting.softmax(num_class)"
        raise ValueError(f"y_true must hold 0 and 1 (or probabilities between), got {label:g}{hint}")


class _Squared_Error(_OneMargin):  # noqa: N801 - `repr` shows the name of the function
    _kernel = "squared_error"

    def _refuse_label(self, label: float, labels: _Numbers) -> NoReturn:
        raise ValueError(f"y_true must hold finite numbers, got {label}")


class _Softmax(Objective):
    num_class: int
    _kernel = "softmax"

    def __init__(self, num_class: int, weighting: Weighting | None, tau: float | None) -> None:
        super().__init__(weighting, tau)
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
        weights = self._weights(self._losses(labels, margins), mass)
        factor = float(weights[0]) * (1.0 if weight is None else float(weight))
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

    def _curvature(self, library: str) -> float:
        # The diagonal alone is steeper than the whole Hessian; each library has its factor for that.
        return 2.0 if library == "xgboost" else self.num_class / (self.num_class - 1.0)


def logistic(weighting: Weighting | None = None, *, tau: float | None = None) -> Objective:
    """The logistic loss of two classes: `l = log(1 + exp(-f))` for label 1 and `log(1 + exp(f))` for 0.

    With `rgd.ERM()` it is LightGBM's `binary` and XGBoost's `binary:logistic`. The trees start at margin 0
    (both libraries start their own objectives at the mean label).

    Args:
        weighting: Turns losses into weights; `KL(tau=1.0)` if neither this nor `tau` is given.
        tau: Short for `weighting=KL(tau=tau)`.

    Returns:
        An objective. It takes labels 0 and 1, and probabilities between.

    Raises:
        TypeError: If `weighting` is no weighting.
        ValueError: If both are given, or the weighting remembers earlier batches.

    Example:
        >>> import rgd, rgd.boosting
        >>> objective = rgd.boosting.logistic(rgd.ERM())
        >>> gradient, hessian = objective([1, 0], [0.0, 0.0], [1.0, 3.0])
        >>> gradient.tolist(), hessian.tolist()
        ([-0.5, 1.5], [0.25, 0.75])
    """
    return _Logistic(weighting, tau)


def softmax(num_class: int, weighting: Weighting | None = None, *, tau: float | None = None) -> Objective:
    """The cross-entropy of several classes: `l = log(sum_j exp(f_j)) - f_y`.

    With `rgd.ERM()` it is LightGBM's `multiclass` and XGBoost's `multi:softprob`. Both multiply the diagonal
    of the Hessian, `q_j (1 - q_j)` with `q` the probabilities, by a factor of their own, and this does as
    they do: `k / (k - 1)` for LightGBM and 2 for XGBoost, which is known by its data set or, where arrays
    are given, by their float32 margins. CatBoost takes the whole Hessian.

    Args:
        num_class: The number `k` of classes, at least 2.
        weighting: Turns losses into weights; `KL(tau=1.0)` if neither this nor `tau` is given.
        tau: Short for `weighting=KL(tau=tau)`.

    Returns:
        An objective. It takes labels 0..k-1 and margins of shape (n, k).

    Raises:
        TypeError: If `num_class` is not an integer, or `weighting` no weighting.
        ValueError: If `num_class` is below 2, both `weighting` and `tau` are given, or the weighting
            remembers earlier batches.

    Example:
        >>> import numpy as np, rgd, rgd.boosting
        >>> gradient, _ = rgd.boosting.softmax(3, rgd.ERM())([2], np.zeros((1, 3)))
        >>> gradient.round(3)
        array([[ 0.333,  0.333, -0.667]])
    """
    return _Softmax(num_class, weighting, tau)


def squared_error(weighting: Weighting | None = None, *, tau: float | None = None) -> Objective:
    """The squared error, `l = (f - y)^2 / 2`, so that the gradient is `w (f - y)` and the Hessian `w`.

    With `rgd.ERM()` it is LightGBM's `regression`, XGBoost's `reg:squarederror` and CatBoost's `RMSE`. The
    trees start at 0 (the libraries start their own objectives at the mean label): subtract the mean.

    Args:
        weighting: Turns losses into weights; `KL(tau=1.0)` if neither this nor `tau` is given. Numbers of a
            weighting are in units of the loss: those of the label squared.
        tau: Short for `weighting=KL(tau=tau)`.

    Returns:
        An objective.

    Raises:
        TypeError: If `weighting` is no weighting.
        ValueError: If both are given, or the weighting remembers earlier batches.

    Example:
        >>> import rgd, rgd.boosting
        >>> gradient, hessian = rgd.boosting.squared_error(rgd.ERM())([1.0, 2.0], [1.5, 0.0])
        >>> gradient.tolist(), hessian.tolist()
        ([0.5, -2.0], [1.0, 1.0])
    """
    return _Squared_Error(weighting, tau)


def _log_softmax(margins: _Numbers) -> _Numbers:
    shifted = margins - margins.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _array(name: str, given: Any) -> npt.NDArray[Any]:
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


def _column(name: str, given: Any) -> _Numbers:
    """Numbers of shape (n,), from that or (n, 1)."""
    array = _array(name, given)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"{name} must have one entry a sample, shape (n,), got shape {array.shape}")
    return _as_floats(array)
