"""Plain metrics of margins, to stop early by."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rgd.boosting._arrays import Floats, as_array, as_column, as_measure, average
from rgd.boosting._losses import Logistic, Softmax, SquaredError
from rgd.weightings import ERM

METRICS = ("log_loss", "error", "rmse")


class Metric:
    """A plain metric of margins, of which smaller values are better; `metric` makes one.

    LightGBM takes it as `feval` and, in scikit-learn's interface, as `eval_metric`; XGBoost as
    `custom_metric` and `eval_metric`; CatBoost as `eval_metric`. It reads margins, which the libraries pass
    to metrics if the objective is one of `rgd.boosting`.
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
        errors = self._errors(y_true, as_array("y_pred", y_pred))
        return self.get_final_error(average(errors, as_measure(sample_weight, errors.size)), 1.0)

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """LightGBM and XGBoost call this; it returns `value` in the form that each of them expects.

        The library is recognised by its data set or, if arrays are given, by the dtype of the margins, as in
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
        return value if as_array("y_pred", y_pred).dtype == np.float32 else (self.__name__, value, False)

    def is_max_optimal(self) -> bool:
        """Whether CatBoost shall look for the largest value."""
        return False

    def evaluate(self, approxes: Any, target: Any, weight: Any) -> tuple[float, float]:
        """CatBoost calls this for the sums that the metric is computed from.

        Args:
            approxes: Margins: for each class n numbers.
            target: Labels, n numbers.
            weight: The base measure, n numbers, or None.

        Returns:
            The sum over the samples, and the sum of their weights.
        """
        margins = np.stack([np.asarray(approx, np.float64) for approx in approxes], axis=1)
        errors = self._errors(target, margins[:, 0] if margins.shape[1] == 1 else margins)
        measure = as_measure(weight, errors.size)
        measure = np.ones(errors.size) if measure is None else measure
        return float(np.dot(measure, errors)), float(measure.sum())

    def get_final_error(self, error: float, weight: float) -> float:
        """The metric, from the sums that `evaluate` returns.

        Args:
            error: The first sum.
            weight: The second.
        """
        mean = error / weight if weight else float("nan")
        return float(np.sqrt(mean)) if self.__name__ == "rmse" else mean

    def _errors(self, labels: Any, margins: npt.NDArray[Any]) -> Floats:
        """The numbers that the metric averages, one a sample."""
        if self.__name__ == "rmse":
            return 2 * SquaredError(ERM(), None).losses(labels, margins)
        several = margins.ndim == 2 and margins.shape[1] > 1
        if several and margins.size and margins.min() >= 0 and abs(margins.sum(axis=1) - 1).max() < 1e-3:
            raise ValueError(
                "y_pred holds probabilities, and rgd.boosting.metric reads margins: use it with an objective "
                "of rgd.boosting, and the library's own metrics with its own objectives"
            )
        objective = Softmax(margins.shape[1], ERM(), None) if several else Logistic(ERM(), None)
        losses = objective.losses(labels, margins)
        if self.__name__ == "log_loss":
            return losses
        target = as_column("y_true", labels)
        if several:
            return (margins.argmax(axis=1) != target).astype(np.float64)
        return ((as_column("y_pred", margins) > 0) != (target > 0.5)).astype(np.float64)

    def __repr__(self) -> str:
        return f"rgd.boosting.metric({self.__name__!r})"
