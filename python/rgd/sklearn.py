"""scikit-learn: `Reweighted` gives any estimator that takes `sample_weight` the weights of its own losses.

Example:
    >>> from sklearn.datasets import make_classification
    >>> from sklearn.linear_model import LogisticRegression
    >>> import rgd
    >>> from rgd.sklearn import Reweighted
    >>> X, y = make_classification(random_state=0)
    >>> model = Reweighted(LogisticRegression(), rgd.KL(tau=2.0)).fit(X, y)
    >>> model.weights_.shape, model.settled_
    ((100,), True)

References:
    Kumar et al., arXiv 2306.09222: if the weights have settled, the model is a stationary point of the
    objective of Re-weighted Gradient Descent.
"""

from __future__ import annotations

import importlib
import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from sklearn import base, exceptions, utils  # pyright: ignore[reportMissingTypeStubs]
from sklearn.utils import metaestimators, multiclass, validation  # pyright: ignore[reportMissingTypeStubs]

import rgd
from rgd._arrays import refuse_masked
from rgd.weightings import Weighting
from rgd.weightings._call import refuse_without_logits, resolve_weighting

__all__ = ["Reweighted"]

_Floats = npt.NDArray[np.float64]
# scikit-learn has no types.
_base, _utils, _validation = cast("Any", base), cast("Any", utils), cast("Any", validation)
_multiclass, _metaestimators = cast("Any", multiclass), cast("Any", metaestimators)


def _inner_has(name: str) -> Callable[[Any], bool]:
    """Whether the estimator has a method; an `AttributeError` that says which one lacks it."""

    def check(model: Any) -> bool:
        getattr(getattr(model, "estimator_", model.estimator), name)
        return True

    return check


class Reweighted(_base.MetaEstimatorMixin, _base.BaseEstimator):
    """Fits an estimator several times. The losses of each fit are the source of the weights of the next one.

    The first fit is plain. After each fit the loss of every training sample is computed, and from it the
    weight. The loss is `l_i = -log p(y_i)` for a classifier with `predict_proba`. For a regressor it is half
    the squared error, `(f_i - y_i)^2 / 2` as in `rgd.boosting.squared_error`, averaged over the outputs if
    there are several. The next fit has `p_i w_i` as its `sample_weight`. This ends when no weight changes by
    more than `tolerance`, or after `rounds`.

    The weights of linear models settle; with `rgd.CVaR` they need its `smoothing` and a small `step`. Those
    of trees and forests change in jumps and often do not settle, so `rounds` limits the work.

    A model that can memorise its training samples, such as an unlimited tree, has losses near 0, and then all
    weights are equal. If an estimator is random, give it `random_state`, or the weights never settle. Weights
    that average to more than one act as a weaker regularisation; `rgd.KL(..., normalize=True)` does not
    change it. Weightings that remember earlier batches, `rgd.MovingAverage` and `rgd.GroupDRO`, are refused,
    since every round uses all samples.

    Inside a pipeline wrap the last step: `make_pipeline(StandardScaler(), Reweighted(LogisticRegression()))`.

    Args:
        estimator: A classifier with `predict_proba`, or a regressor, whose `fit` takes `sample_weight`.
        weighting: Turns losses into weights; `KL(tau=1.0)` if neither this nor `tau` nor `scale` is given.
        rounds: The largest number of fits after the first, an integer >= 0; 0 gives the plain model.
        tau: Short for `weighting=KL(tau=tau)`.
        scale: Short for `weighting=KL(scale=scale)`; with `tau`, for `KL(tau, scale=scale)`.
        step: How far the weights move towards those of the last losses in every round after the first, in
            (0, 1]. A step near 1 is fast for weak re-weighting and for negative scales. A smaller step stops
            weights from oscillating that favour large losses.
        tolerance: The change of weights, relative to the largest, at which they have settled; a number >= 0.
        verbose: Whether to show a progress bar; it needs tqdm.

    Attributes:
        estimator_: The last fit.
        weights_: The weights that it was fitted with, shape (n,), without `sample_weight`; 0 where that is 0.
        n_rounds_: The number of fits after the first.
        settled_: Whether the weights had settled.
        classes_: The classes of a classifier.
        n_features_in_: The number of features, if the estimator has it.
        feature_names_in_: Their names, if the estimator has them.

    Example:
        >>> import numpy as np
        >>> from sklearn.linear_model import LinearRegression
        >>> import rgd
        >>> X, y = np.arange(6.0)[:, None], np.array([0.0, 1.0, 2.0, 3.0, 4.0, 11.0])
        >>> robust = Reweighted(LinearRegression(), rgd.KL(scale=-1.0), rounds=100).fit(X, y)
        >>> bool(robust.weights_[-1] < 1e-3), robust.predict([[7.0]]).round(1).tolist()
        (True, [7.0])

    References:
        Kumar et al., arXiv 2306.09222, Algorithm 1, with a fit in the place of a gradient step.
    """

    def __init__(
        self,
        estimator: Any,
        weighting: Weighting | None = None,
        rounds: int = 10,
        *,
        tau: float | None = None,
        scale: float | None = None,
        step: float = 0.5,
        tolerance: float = 1e-2,
        verbose: bool = False,
    ) -> None:
        self.estimator = estimator
        self.weighting = weighting
        self.rounds = rounds
        self.tau = tau
        self.scale = scale
        self.step = step
        self.tolerance = tolerance
        self.verbose = verbose

    def fit(self, X: Any, y: Any, sample_weight: Any = None, **fit_params: Any) -> Reweighted:  # noqa: N803
        """Fit until the weights settle.

        Args:
            X: Samples, in any form that the estimator takes.
            y: Classes or values, shape (n,), for regressors also (n, outputs).
            sample_weight: The base measure `p`, numbers >= 0, shape (n,); None for ones. An integer counts as
                that many equal samples.
            **fit_params: Passed on to the estimator's `fit`.

        Returns:
            self.

        Raises:
            TypeError: If the estimator is neither a regressor nor a classifier with `predict_proba`, its
                `fit` takes no `sample_weight`, or a setting has the wrong type.
            ValueError: If a setting is out of range, a shape does not fit, or the weighting remembers; if
                weights overflow, or all of them are 0.
        """
        weighting = self._check_settings()
        refuse_masked("y", y, "leave masked samples out")
        classifier = _base.is_classifier(self.estimator)
        measure = None if sample_weight is None else _read_measure(sample_weight, X)
        if len(getattr(y, "shape", ())) == 2 and not _utils.get_tags(self).target_tags.multi_output:
            y = _validation.column_or_1d(y, warn=True)
        fitted = self._fit_once(X, y, measure, fit_params)
        target = _read_target(y, classifier)
        weights = np.ones(len(target)) if measure is None else (measure > 0).astype(np.float64)
        rounds, settled = 0, False
        with self._bar() as bar:
            while True:
                losses = _log_losses(fitted, X, target) if classifier else _squared_errors(fitted, X, target)
                fresh = rgd.sample_weights(losses, weighting, sample_weight=measure)
                if self.rounds:
                    _check_weights(fresh, measure, losses, classifier)
                change = float(np.max(np.abs(fresh - weights)))
                settled = math.isfinite(change) and change <= self.tolerance * float(np.max(fresh))
                if settled or rounds == self.rounds:
                    break
                # The first step has length 1: the weights of the plain fit are not close to the final ones.
                weights = fresh if rounds == 0 else weights + self.step * (fresh - weights)
                fitted = self._fit_once(X, y, weights if measure is None else measure * weights, fit_params)
                rounds += 1
                bar.update()
                bar.set_postfix(
                    loss=rgd.reweighted_mean(losses, rgd.ERM(), sample_weight=measure), change=change
                )
        if self.rounds and not settled:
            warnings.warn(
                f"the weights have not settled after {rounds} rounds: the last change was {change:.2g}. "
                "Raise rounds; if they swing, pass a smaller step; if the estimator is random, give it a "
                "random_state",
                exceptions.ConvergenceWarning,
                stacklevel=2,
            )
        self.estimator_, self.weights_, self.n_rounds_, self.settled_ = fitted, weights, rounds, settled
        if classifier:
            self.classes_ = fitted.classes_
        return self

    def predict(self, X: Any) -> Any:  # noqa: N803
        """The predictions of the last fit.

        Args:
            X: Samples.
        """
        return self._fitted().predict(X)

    @_metaestimators.available_if(_inner_has("predict_proba"))
    def predict_proba(self, X: Any) -> Any:  # noqa: N803
        """The probabilities of the classes, by the last fit.

        Args:
            X: Samples.
        """
        return self._fitted().predict_proba(X)

    @_metaestimators.available_if(_inner_has("predict_log_proba"))
    def predict_log_proba(self, X: Any) -> Any:  # noqa: N803
        """The logarithms of the probabilities of the classes, by the last fit.

        Args:
            X: Samples.
        """
        return self._fitted().predict_log_proba(X)

    @_metaestimators.available_if(_inner_has("decision_function"))
    def decision_function(self, X: Any) -> Any:  # noqa: N803
        """The decision function of the last fit.

        Args:
            X: Samples.
        """
        return self._fitted().decision_function(X)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:  # noqa: N803
        """The score of the last fit, unweighted but for `sample_weight`: accuracy, or R^2.

        Args:
            X: Samples.
            y: Classes or values.
            sample_weight: As the estimator's `score` takes it.
        """
        refuse_masked("y", y, "leave masked samples out")
        if sample_weight is None:
            return self._fitted().score(X, y)
        refuse_masked("sample_weight", sample_weight, "pass sample_weight.filled(0)")
        return self._fitted().score(X, y, sample_weight=sample_weight)

    @property
    def n_features_in_(self) -> int:
        """The number of features, if the estimator has it."""
        return self._told("n_features_in_")

    @property
    def feature_names_in_(self) -> Any:
        """The names of the features, if the estimator has them."""
        return self._told("feature_names_in_")

    def __sklearn_tags__(self) -> Any:
        parent: Any = super()
        tags = parent.__sklearn_tags__()
        inner = _utils.get_tags(self.estimator)
        for name in ("estimator_type", "classifier_tags", "regressor_tags", "input_tags", "target_tags"):
            setattr(tags, name, getattr(inner, name))
        if tags.classifier_tags is not None:  # a classifier has one loss a sample, so one output
            tags.classifier_tags.multi_label = tags.target_tags.multi_output = False
        return tags

    def _fitted(self) -> Any:
        _validation.check_is_fitted(self, "estimator_")
        return self.estimator_

    def _told(self, name: str) -> Any:
        if "estimator_" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no {name} before fit")
        return getattr(self.estimator_, name)

    def _fit_once(self, X: Any, y: Any, sample_weight: _Floats | None, fit_params: dict[str, Any]) -> Any:  # noqa: N803
        fitted = _base.clone(self.estimator)
        if sample_weight is None:
            fitted.fit(X, y, **fit_params)
        else:
            fitted.fit(X, y, sample_weight=sample_weight, **fit_params)
        return fitted

    def _check_settings(self) -> Weighting:
        """The weighting, after all settings were checked."""
        weighting = resolve_weighting(self.weighting, self.tau, self.scale)
        refuse_without_logits(weighting, "give another weighting")
        if weighting.stateful:
            raise ValueError(
                f"{type(weighting).__name__} remembers earlier batches, and every round sees all samples: "
                "use a weighting without state, such as rgd.KL(tau=1.0)"
            )
        for name in ("rounds", "step", "tolerance"):
            value, kind = getattr(self, name), numbers.Integral if name == "rounds" else numbers.Real
            if isinstance(value, bool) or not isinstance(value, kind):
                noun = "an integer" if name == "rounds" else "a number"
                raise TypeError(f"{name} must be {noun}, got {value!r}")
        if self.rounds < 0:
            raise ValueError(f"rounds must be at least 0, got {self.rounds}")
        if not 0 < self.step <= 1:
            raise ValueError(f"step must be in (0, 1], got {self.step}")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance must be at least 0, got {self.tolerance}")
        estimator = self.estimator
        if isinstance(estimator, type):
            raise TypeError(
                f"estimator must be an object, got the class {estimator.__name__}: call it, as in "
                f"{estimator.__name__}()"
            )
        name = type(estimator).__name__
        if not _base.is_classifier(estimator) and not _base.is_regressor(estimator):
            raise TypeError(f"estimator must be a classifier or a regressor of scikit-learn, got {name}")
        if _base.is_classifier(estimator) and not hasattr(estimator, "predict_proba"):
            raise TypeError(
                f"{name} has no predict_proba, from which the losses of a classifier are computed: use one "
                "that has, or wrap it, as in sklearn.calibration.CalibratedClassifierCV(...)"
            )
        if not _validation.has_fit_parameter(estimator, "sample_weight"):
            raise TypeError(
                f"{name}.fit takes no sample_weight, and so cannot be re-weighted. Inside a pipeline wrap "
                "the last step: make_pipeline(StandardScaler(), Reweighted(LogisticRegression()))"
            )
        return weighting

    def _bar(self) -> Any:
        """A progress bar over the rounds, or something with its methods that shows nothing."""
        if not self.verbose:
            return _NoBar()
        try:
            tqdm = importlib.import_module("tqdm.auto").tqdm
        except ImportError as error:
            raise ImportError("verbose=True shows a progress bar and needs tqdm: pip install tqdm") from error
        return tqdm(total=self.rounds, desc="Reweighted", unit="round")


class _NoBar:
    """Replaces the progress bar if none was asked for."""

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self) -> None:
        pass

    def set_postfix(self, **_: float) -> None:
        pass


def _read_measure(sample_weight: Any, X: Any) -> _Floats:  # noqa: N803
    """The base measure, shape (n,), checked for its shape; its values are checked with the losses."""
    refuse_masked("sample_weight", sample_weight, "pass sample_weight.filled(0)")
    measure = np.asarray(sample_weight, dtype=np.float64)
    shape = tuple(X.shape if hasattr(X, "shape") else np.asarray(X).shape)[:1]
    if measure.shape != shape:
        raise ValueError(
            f"sample_weight must have one number for each sample, shape {shape}, got {measure.shape}"
        )
    return measure


def _check_weights(weights: _Floats, measure: _Floats | None, losses: _Floats, classifier: bool) -> None:
    """Refuse weights that no estimator can be fitted with."""
    if measure is not None:
        with np.errstate(over="ignore"):
            weights, losses = (measure * weights)[measure > 0], losses[measure > 0]
    finite = np.isfinite(weights).all()
    if not losses.size or (finite and weights.any()):
        return
    what = "all weights are 0" if finite else "weights are not finite"
    if not losses.any():
        raise ValueError(
            f"{what}: the estimator has learnt every sample by heart, so limit it, or use another weighting"
        )
    scale = "" if classifier else "scale the target, as in (y - y.mean()) / y.std(), "
    raise ValueError(
        f"{what}, for losses of {losses.min():.3g} to {losses.max():.3g}: {scale}give tau, or use a scale "
        "nearer to 0"
    )


def _read_target(y: Any, classifier: bool) -> npt.NDArray[Any]:
    if classifier:
        _multiclass.check_classification_targets(y)
        return _validation.column_or_1d(y)
    return np.asarray(y, dtype=np.float64)


def _log_losses(fitted: Any, X: Any, target: npt.NDArray[Any]) -> _Floats:  # noqa: N803
    """`-log p(y_i)`; a probability of 0 counts as the dtype's eps, as in `sklearn.metrics.log_loss`."""
    probability = np.asarray(fitted.predict_proba(X))
    column = np.searchsorted(fitted.classes_, target)
    chosen = probability[np.arange(len(target)), column]
    return -np.log(np.maximum(chosen, np.finfo(chosen.dtype).eps)).astype(np.float64)


def _squared_errors(fitted: Any, X: Any, target: npt.NDArray[Any]) -> _Floats:  # noqa: N803
    """`(f_i - y_i)^2 / 2`, averaged over outputs."""
    predicted: _Floats = np.asarray(fitted.predict(X), dtype=np.float64)
    errors = np.square(np.reshape(predicted, target.shape) - target) / 2
    return errors if errors.ndim == 1 else errors.mean(axis=1)
