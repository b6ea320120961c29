"""A re-weighted objective: the methods that the libraries call, and the parts that all losses share."""

from __future__ import annotations

import abc
import warnings
from collections.abc import Mapping
from typing import Any, NoReturn, cast

import numpy as np

import rgd
from rgd import _rgd
from rgd._arrays import available_cores, read_groups
from rgd.boosting._arrays import EPS32, Floats, Numbers, all_alike, as_array, as_column, as_measure, as_rows
from rgd.boosting._libraries import READS_PROBABILITIES
from rgd.weightings import Weighting
from rgd.weightings._base import Kernel
from rgd.weightings._call import kernel_of, refuse_without_logits


class Objective(abc.ABC):
    """A re-weighted objective; `logistic`, `softmax` and `squared_error` make one.

    It can be called as the objective of LightGBM and XGBoost, by their scikit-learn interface
    (`LGBMClassifier(objective=objective)`) and by their own (`params={"objective": objective}` for LightGBM,
    `xgboost.train(..., obj=objective)`), and has the methods that CatBoost calls
    (`CatBoostClassifier(loss_function=objective)`).

    A weighting that remembers, such as `rgd.GroupDRO`, takes one step at every tree. Its state starts again
    where all samples have the same margins, as at the first tree of a training. Where `init_score` or
    `base_margin` gives other first margins, make a new objective for every training.

    Attributes:
        weighting: Turns losses into weights.
        groups: The group of each training sample, shape (n,), or None.
        num_class: The number of classes of `softmax`; None for objectives with one margin a sample.
    """

    num_class: Any = None

    def __init__(self, weighting: Weighting, groups: Any) -> None:
        refuse_without_logits(weighting, "give another weighting")
        self.weighting = weighting
        self.groups = None if groups is None else read_groups(groups, as_array("groups", groups).shape[:1])
        self._state: Any = None

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> tuple[Floats, Floats]:
        """Gradient and Hessian of the margins.

        LightGBM and XGBoost also call `objective(margins, dataset)`; then labels and sample weights come
        from the data set. If no weight is above float32's eps, there is nothing to train on, and a
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
                or 1; if LightGBM's data set has settings that have no effect, or a wrong effect, with a
                custom objective (`scale_pos_weight`, `is_unbalance`, metrics that read margins as
                probabilities).
        """
        if hasattr(y_pred, "get_label"):
            dataset: Any = y_pred
            margins, labels, measure = as_array("y_pred", y_true), dataset.get_label(), dataset.get_weight()
            if labels is None:
                raise ValueError("the data set has no labels: give label= when you make it")
            library = type(dataset).__module__.partition(".")[0]
            settings: Any = getattr(dataset, "params", None) or {}
            # A data set keeps the settings of its first training, which may have used another objective.
            if library == "lightgbm" and settings.get("objective") == "none":
                self._check_settings(settings)
        else:
            margins, labels, measure = as_array("y_pred", y_pred), y_true, sample_weight
            library = "xgboost" if margins.dtype == np.float32 else "lightgbm"
        if self.num_class is not None and margins.ndim == 1 and margins is not y_pred:
            return self._flat(labels, margins, measure, library)
        return self._derivatives(*self._read(labels, margins), measure, library)

    def losses(self, y_true: Any, y_pred: Any) -> Floats:
        """The loss of each sample.

        Args:
            y_true: Labels, as for a call.
            y_pred: Margins, as for a call.

        Returns:
            Losses, shape (n,).
        """
        return self._losses(*self._read(y_true, y_pred))

    def weights(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Floats:
        """The weight of each sample, without its `sample_weight`.

        Args:
            y_true: Labels, as for a call.
            y_pred: Margins, as for a call.
            sample_weight: The base measure, as for a call.

        Returns:
            Weights, shape (n,).
        """
        labels, margins = self._read(y_true, y_pred)
        measure = as_measure(sample_weight, labels.size)
        return self._weigh(self._losses(labels, margins), measure, self._state_before(margins))[0]

    def start(self, y_true: Any, sample_weight: Any = None) -> Any:
        """The margin of the mean label, at which the libraries start their own objectives.

        Give it as `init_score` to LightGBM, and as `base_margin` to XGBoost, or as `base_score` except for
        `logistic`.

        Args:
            y_true: Labels, as for a call.
            sample_weight: The base measure, as for a call.

        Returns:
            A number; for `softmax` an array of shape (k,), of mean 0.

        Raises:
            TypeError: If an argument cannot be read as numbers.
            ValueError: If a shape or a label does not fit, or a class is missing, so that the start would be
                infinite.

        Example:
            >>> import rgd.boosting
            >>> round(rgd.boosting.logistic().start([0, 0, 0, 1]), 4)
            -1.0986
        """
        labels = as_column("y_true", y_true)
        self._losses(labels, np.zeros((labels.size, self.num_class) if self.num_class else labels.size))
        return self._start(labels, as_measure(sample_weight, labels.size))

    def calc_ders_range(self, approxes: Any, targets: Any, weights: Any) -> list[tuple[float, float]]:
        """CatBoost calls this for a part of the samples at a time if a sample has one margin.

        Args:
            approxes: Margins, n numbers.
            targets: Labels, n numbers.
            weights: The base measure, n numbers, or None.

        Returns:
            For each sample the first and the second derivative of `-l`, which CatBoost maximises.
        """
        self._require_pointwise()
        labels, margins = self._read(targets, approxes)
        gradient, hessian = self._derivatives(labels, margins, weights, "catboost")
        return list(zip((-gradient).tolist(), (-hessian).tolist(), strict=True))

    _kernel: str
    """The name of the loss in the kernels, and of the function that makes the objective."""

    @abc.abstractmethod
    def _read(self, labels: Any, margins: Any) -> tuple[Numbers, Numbers]:
        """Labels, shape (n,), and margins, shape (n,) or (n, k)."""

    @abc.abstractmethod
    def _refuse_label(self, label: float, labels: Numbers) -> NoReturn:
        """Refuse a label that the loss does not take."""
        raise NotImplementedError

    @abc.abstractmethod
    def _start(self, labels: Numbers, measure: Numbers | None) -> Any:
        """The margin of the mean label."""

    def _curvature(self, library: str) -> float | None:
        """A library's factor for the diagonal of the Hessian; None if it takes `|dl/df|` instead."""
        return 1.0

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings of LightGBM that would have no effect, or another effect than their name says."""
        for name in ("metric", "metrics", "metric_types"):
            given = settings.get(name)
            for value in given.split(",") if isinstance(given, str) else given or ():
                if value in READS_PROBABILITIES:
                    raise ValueError(
                        f"{value!r} of LightGBM reads margins as probabilities where the objective is not "
                        'its own: set metric="None" and feval=rgd.boosting.metric("log_loss"), and make '
                        "a new Dataset, which keeps its first settings"
                    )

    def _check_start(self, labels: Numbers, margins: Numbers) -> None:  # noqa: B027 - most losses have none
        """Refuse a start of XGBoost at probability 0 or 1, which must be a mistake."""

    def _losses(self, labels: Numbers, margins: Numbers) -> Floats:
        """The loss of each sample, shape (n,)."""
        losses = np.empty(labels.shape)
        wrong = _rgd.boosting_losses(self._kernel, as_rows(margins), labels, losses, available_cores())
        if wrong is not None:
            self._refuse_label(float(labels[wrong]), labels)
        return losses

    def _derivatives(
        self, labels: Numbers, margins: Numbers, sample_weight: Any, library: str
    ) -> tuple[Floats, Floats]:
        measure = as_measure(sample_weight, labels.size)
        if library == "xgboost":
            self._check_start(labels, margins)
        weights: Floats | None = None
        state = self._state_before(margins)
        kernel: Kernel | None = kernel_of(self.weighting) if self.weighting.pointwise else None
        if kernel is None:
            weights, state = self._weigh(self._losses(labels, margins), measure, state)
        # Results have the margins' order in memory, which may be class after class.
        gradient, hessian = (np.empty_like(margins, dtype=np.float64) for _ in range(2))
        wrong, largest = _rgd.boosting_derivatives(
            self._kernel, as_rows(margins), labels, measure, weights, *(kernel or (None, ())),
            self._curvature(library), as_rows(gradient), as_rows(hessian), available_cores(),
        )  # fmt: skip
        match wrong:
            case ("label", sample):
                self._refuse_label(float(labels[sample]), labels)
            case ("measure", sample):
                wrong = None if measure is None else measure[sample]
                raise ValueError(f"sample_weight must hold finite numbers >= 0, got {wrong}")
            case ("overflow", sample):
                self._refuse_overflow(sample, labels, margins, weights)
            case _:  # nothing is
                pass
        # CatBoost passes a part of the samples. All of them may have wrong labels, and so tiny weights.
        if largest < EPS32 and library != "catboost" and (labels.size if measure is None else measure.any()):
            warnings.warn(
                f"the largest weight of {self.weighting} is {largest:.2g}, so that nothing is left to train "
                f"on: {self._scale_hint}give a scale nearer to 0, or stop earlier",
                RuntimeWarning,
                stacklevel=3,
            )
        self._state = state
        return gradient, hessian

    _scale_hint = ""
    """A hint for messages: what to do about large losses, before the hint to change the weighting."""

    def _refuse_overflow(
        self, sample: int, labels: Numbers, margins: Numbers, weights: Floats | None
    ) -> NoReturn:
        if not np.isfinite(margins[sample]).all():
            raise ValueError(
                f"the margins of sample {sample} are not finite: the trees have diverged, so train with a "
                "smaller learning rate"
            )
        losses = self._losses(labels[sample : sample + 1], margins[sample : sample + 1])
        # `weights` is None if a pointwise kernel computed them. Then one loss is enough for its weight.
        weight = rgd.sample_weights(losses, self.weighting)[0] if weights is None else weights[sample]
        if weight < 0:
            raise ValueError(f"weights must be >= 0, got {weight:.3g} for a loss of {losses[0]:.3g}")
        raise ValueError(
            f"sample {sample} has a loss of {losses[0]:.3g} and a weight of {weight:.3g}, and so derivatives "
            f"too large for float32, in which the libraries keep them: {self._scale_hint}give tau, or use a "
            "scale nearer to 0"
        )

    def _state_before(self, margins: Numbers) -> Any:
        """The weighting's state before the next tree; None for a weighting that keeps none."""
        if not self.weighting.stateful:
            return None
        return self.weighting.init() if self._state is None or all_alike(margins) else self._state

    def _weigh(self, losses: Floats, measure: Numbers | None, state: Any) -> tuple[Floats, Any]:
        if self.groups is not None and self.groups.shape != losses.shape:
            raise ValueError(
                f"groups must have one entry a training sample, {losses.shape}, got {self.groups.shape}: in "
                "cross-validation make an objective for each fold"
            )
        given: dict[str, Any] = {"sample_weight": measure, "groups": self.groups}
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

    def _flat(self, labels: Any, margins: Any, measure: Any, library: str) -> tuple[Floats, Floats]:
        """The derivatives for margins of several classes in one flat array, and in its order."""
        order: Any = "F" if library == "lightgbm" else "C"  # LightGBM before 4 wants class after class
        if not self.num_class or margins.size % self.num_class:
            raise ValueError(
                f"margins must be {self.num_class} for each sample, got {margins.size} in all: give the "
                f"library num_class={self.num_class} too"
            )
        rows = margins.reshape((-1, self.num_class), order=order)
        gradient, hessian = self._derivatives(*self._read(labels, rows), measure, library)
        return gradient.ravel(order=order), hessian.ravel(order=order)

    def __repr__(self) -> str:
        return f"rgd.boosting.{self._kernel}({self.weighting})"
