"""The losses of margins: logistic, softmax and the squared error."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from rgd.boosting._arrays import (
    MAX32,
    Floats,
    Numbers,
    all_alike,
    as_array,
    as_column,
    as_floats,
    average,
)
from rgd.boosting._libraries import BALANCING, xgboost_curvature
from rgd.boosting._objective import Objective
from rgd.weightings import Weighting


class _OneMargin(Objective):
    """An objective with one margin a sample."""

    def _read(self, labels: Any, margins: Any) -> tuple[Numbers, Numbers]:
        target, scores = as_column("y_true", labels), as_column("y_pred", margins)
        if target.shape != scores.shape:
            raise ValueError(
                f"y_true and y_pred must have one entry a sample each, got {target.shape} and "
                f"{as_array('y_pred', margins).shape}: {self._hint}"
            )
        return target, scores

    _hint = "pass margins of shape (n,)"


class Logistic(_OneMargin):
    _kernel = "logistic"
    _hint = "for more than two classes use rgd.boosting.softmax(num_class)"

    def _start(self, labels: Numbers, measure: Numbers | None) -> float:
        mean = average(labels, measure)
        if not 0 < mean < 1:
            raise ValueError(f"y_true must hold both classes, got a mean label of {mean:g}")
        return float(np.log(mean) - np.log1p(-mean))

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        super()._check_settings(settings)
        for name, off in BALANCING.items():
            if str(settings.get(name)).lower() not in off:
                raise ValueError(
                    f"LightGBM ignores {name} where the objective is not its own: leave it out, and make a "
                    "new Dataset with weight=np.where(y == 1, ratio, 1.0)"
                )

    def _check_start(self, labels: Numbers, margins: Numbers) -> None:
        # XGBoost replaces probabilities of 0 and 1 by 1e-6 and 1 - 1e-6.
        if margins.size and abs(margins[0]) > 13.8 and 1e-5 < labels.mean() < 1 - 1e-5 and all_alike(margins):
            raise ValueError(
                f"XGBoost starts at margin {margins[0]:.3g}, where no tree can grow: its base_score is a "
                "probability. Give base_score=y.mean(), or 0.5 to start at margin 0"
            )

    def _refuse_label(self, label: float, labels: Numbers) -> NoReturn:
        hint = ""
        if np.isin(labels, (-1.0, 1.0)).all():
            hint = ": for labels -1 and 1 pass (y > 0).astype(int)"
        elif np.isfinite(label) and label > 1:
            hint = ": for more than two classes use rgd.boosting.softmax(num_class)"
        raise ValueError(f"y_true must hold 0 and 1 (or probabilities between), got {label:g}{hint}")


class SquaredError(_OneMargin):
    _kernel = "squared_error"
    _scale_hint = "scale the labels, as in (y - y.mean()) / y.std(), "

    def _start(self, labels: Numbers, measure: Numbers | None) -> float:
        return average(labels, measure)

    def _refuse_label(self, label: float, labels: Numbers) -> NoReturn:
        raise ValueError(f"y_true must hold finite numbers, got {label}")


class Softmax(Objective):
    num_class: int
    _kernel = "softmax"

    def __init__(self, num_class: int, weighting: Weighting, groups: Any) -> None:
        super().__init__(weighting, groups)
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
        """CatBoost calls this for one sample at a time if a sample has several margins.

        Args:
            approx: The margins of the sample, k numbers.
            target: Its label.
            weight: Its base measure, or None.

        Returns:
            The first derivatives, k numbers, and the second, k rows of k, of `-l`, which CatBoost maximises.
        """
        self._require_pointwise()
        labels, margins = self._read([target], np.asarray(approx, np.float64)[None])
        measure = None if weight is None else np.array([weight], np.float64)
        weights, _ = self._weigh(self._losses(labels, margins), measure, None)
        factor = float(weights[0]) * (1.0 if weight is None else float(weight))
        if not (np.isfinite(margins).all() and 0 <= factor <= MAX32):
            self._refuse_overflow(0, labels, margins, weights)
        probability = np.exp(_log_softmax(margins))[0]
        first = -probability
        first[int(labels[0])] += 1.0
        second = np.outer(probability, probability)
        second[np.diag_indices(self.num_class)] -= probability
        return (factor * first).tolist(), (factor * second).tolist()

    def _read(self, labels: Any, margins: Any) -> tuple[Numbers, Numbers]:
        target = as_column("y_true", labels)
        scores = as_floats(as_array("y_pred", margins))
        shape = (target.size, self.num_class)
        if scores.shape != shape:
            raise ValueError(
                f"y_pred must have a row a sample and a column a class, {shape}, got {scores.shape}: give "
                f"the library num_class={self.num_class} too, and rgd.boosting.softmax its number of classes"
            )
        return target, scores

    def _refuse_label(self, label: float, labels: Numbers) -> NoReturn:
        raise ValueError(
            f"y_true must hold the classes 0..{self.num_class - 1} as whole numbers, got {label:g}"
        )

    def _curvature(self, library: str) -> float | None:
        # The diagonal alone underestimates the curvature; each library multiplies it by a factor of its own.
        return xgboost_curvature() if library == "xgboost" else self.num_class / (self.num_class - 1.0)

    def _start(self, labels: Numbers, measure: Numbers | None) -> Floats:
        shares = np.array([average(labels == j, measure) for j in range(self.num_class)])
        if not shares.all():
            raise ValueError(f"y_true must hold every class, got no sample of class {shares.argmin()}")
        return np.log(shares) - np.log(shares).mean()


def _log_softmax(margins: Numbers) -> Numbers:
    shifted = margins - margins.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
