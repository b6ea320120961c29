"""`rgd.boosting` as the objective of LightGBM, XGBoost and CatBoost, each skipped where it is absent."""

import dataclasses
import math
import pathlib
import pickle
import re
import subprocess
import sys
import types
import warnings

import numpy as np
import pytest
import rgd
from rgd import boosting
from rgd.boosting import _libraries

EPS, EPS32 = (float(np.finfo(dtype).eps) for dtype in (np.float64, np.float32))
ROUNDS, SAMPLES, CLASSES = 8, 200, 3
# The libraries keep derivatives in float32, and each tree adds one rounding of a leaf to a margin.
TREES = ROUNDS * EPS32

RNG = np.random.default_rng(0)
X = RNG.normal(size=(SAMPLES, 4))
SCORE = (X @ [1.0, -1.0, 0.5, 0.0] + RNG.normal(size=SAMPLES)).astype(np.float32)
TARGETS = {
    "logistic": (SCORE > 0).astype(int),
    "softmax": np.digitize(SCORE, [-1.0, 1.0]),
    "squared_error": SCORE,
}
MASS = RNG.integers(1, 4, SAMPLES).astype(float)
KINDS = list(TARGETS)


def make(kind, weighting=None, **settings):
    if kind == "softmax":
        return boosting.softmax(CLASSES, weighting, **settings)
    return getattr(boosting, kind)(weighting, **settings)


def margins_for(kind, seed=1):
    shape = (SAMPLES, CLASSES) if kind == "softmax" else (SAMPLES,)
    return np.random.default_rng(seed).normal(scale=2.0, size=shape)


def loss(kind, y, f):
    """The loss of one sample, as the equation says."""
    if kind == "logistic":
        return math.log1p(math.exp(-f)) if y == 1 else math.log1p(math.exp(f))
    if kind == "softmax":
        return math.log(sum(math.exp(g) for g in f)) - f[int(y)]
    return (f - y) ** 2 / 2


@pytest.mark.parametrize("mass", [None, MASS], ids=["plain", "sample_weight"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_and_hessian_are_those_of_the_weighted_loss_with_constant_weights(kind, mass):
    y, f = TARGETS[kind], margins_for(kind)
    objective = make(kind, tau=1.5)
    losses = np.array([loss(kind, *pair) for pair in zip(y.tolist(), f.tolist(), strict=True)])
    weights = np.exp(np.minimum(losses, 1.5) / 2.5)
    # Softmax sums over the classes; the loss is up to 20, and its rounding enters the exponent.
    tolerance = 20 * CLASSES * 8 * EPS
    np.testing.assert_allclose(objective.losses(y, f), losses, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(objective.weights(y, f, mass), weights, rtol=tolerance)
    gradient, hessian = objective(y, f, mass)
    factor = weights if mass is None else weights * mass
    curvature = CLASSES / (CLASSES - 1) if kind == "softmax" else 1.0
    step = 1e-4
    for i in range(0, SAMPLES, 10):
        for j in range(CLASSES if kind == "softmax" else 1):
            shift = np.zeros(f.shape[1:])
            shift[(j,) if shift.ndim else ()] = step
            up, at, down = (loss(kind, y[i], f[i] + sign * shift) for sign in (1, 0, -1))
            index = (i, j) if kind == "softmax" else i
            # Central differences: errors of the order step^2, and for the second eps * loss / step^2.
            assert gradient[index] == pytest.approx(factor[i] * (up - down) / (2 * step), abs=1e-6)
            second = factor[i] * curvature * (up - 2 * at + down) / step**2
            assert hessian[index] == pytest.approx(second, abs=1e-5)


@pytest.mark.parametrize("weighting", [rgd.KL(tau=2.0), rgd.KLBall(0.2), rgd.CVaR(0.3)], ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_an_integer_sample_weight_counts_as_that_many_equal_samples(kind, weighting):
    y, f, times = TARGETS[kind], margins_for(kind), MASS.astype(int)
    objective = make(kind, weighting)
    once = objective(y, f, MASS)
    repeated = objective(np.repeat(y, times), np.repeat(f, times, axis=0))
    first = np.cumsum(times) - times
    for values, others in zip(once, repeated, strict=True):
        expected = (others[first].T * times).T
        # KLBall's root is found to the rounding of sums over all samples.
        tolerance = 100 * times.sum() * EPS
        np.testing.assert_allclose(values, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_margins_overflow_nowhere(kind):
    y, f = TARGETS[kind], 1e4 * margins_for(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values in (*make(kind)(y, f), make(kind).losses(y, f)):
            assert np.isfinite(values).all()


NAN, NEGATIVE = (
    rgd.Pointwise(function) for function in (lambda losses: losses * math.nan, lambda losses: -losses)
)


@pytest.mark.parametrize(
    ("kind", "weighting", "scale", "message"),
    [
        (
            "squared_error",
            rgd.KL(math.inf, scale=10.0),
            146.0,
            r"a weight of inf, .*scale the labels.*give tau",
        ),
        # exp(0.1 * 1000) = 3e43 is a float64 and no float32.
        ("squared_error", rgd.KL(math.inf, scale=0.1), 16.0, r"a weight of \d.*e\+\d\d, .*scale the labels"),
        ("logistic", rgd.KL(math.inf, scale=500.0), 1.0, "a weight of .*float32.*: give tau"),
        ("softmax", rgd.KL(math.inf, scale=500.0), 1.0, "a weight of .*float32.*: give tau"),
        ("softmax", rgd.MovingAverage(rgd.KL(math.inf, scale=500.0), 0.9), math.inf, "are not finite"),
        ("squared_error", rgd.ERM(), 1e200, "a weight of 1, .*scale the labels"),
        ("squared_error", rgd.CVaR(0.5), 1e200, "a weight of .*scale the labels"),
        ("logistic", rgd.ERM(), math.nan, "are not finite: .* smaller learning rate"),
        ("softmax", rgd.ERM(), math.nan, "are not finite: .* smaller learning rate"),
        ("logistic", NAN, 1.0, "a weight of nan"),
        ("squared_error", NEGATIVE, 1.0, "weights must be >= 0, got -"),
    ],
)
def test_derivatives_that_do_not_fit_into_float32_are_refused_with_the_fix(kind, weighting, scale, message):
    f = margins_for(kind)
    f = np.sign(f) * scale if not math.isfinite(scale) else f * scale
    with pytest.raises(ValueError, match=message):
        make(kind, weighting)(TARGETS[kind], f)


def test_a_sample_weight_that_leaves_float32_is_refused():
    with pytest.raises(ValueError, match="derivatives too large for float32"):
        boosting.squared_error(rgd.ERM())([0.0, 1.0], [9.0, 9.0], [1.0, 1e38])


@pytest.mark.parametrize(
    "weighting", [rgd.KL(math.inf, scale=1.0), rgd.KL(math.inf, scale=1.0, normalize=True)], ids=repr
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_weight_0_counts_for_nothing_whatever_its_loss_weighs(kind, weighting):
    y, f, p = TARGETS[kind].copy(), margins_for(kind), MASS.copy()
    y[0], p[0] = 0, 0.0
    f[0] = [0.0, 1e4, 0.0] if kind == "softmax" else 1e4  # of a loss above 1000, which weighs exp(1000)
    found = make(kind, weighting)(y, f, p)
    expected = make(kind, weighting)(y[1:], f[1:], p[1:])
    for values, others in zip(found, expected, strict=True):
        np.testing.assert_array_equal(values[0], 0.0)
        np.testing.assert_allclose(values[1:], others, rtol=SAMPLES * EPS)


@pytest.mark.parametrize("mass", [None, MASS], ids=["plain", "sample_weight"])
def test_weights_that_leave_nothing_to_train_on_are_a_warning(mass):
    objective = boosting.squared_error(rgd.KL(scale=-1.0))
    far = 1000.0 + TARGETS["squared_error"]
    with pytest.warns(RuntimeWarning, match=r"largest weight of KL.* is 0, .*scale the labels"):
        objective(far, np.zeros(SAMPLES), mass)
    # One sample that counts is enough, and samples without mass were never to count.
    far[0] = 0.0
    objective(far, np.zeros(SAMPLES), mass)
    objective(far, np.zeros(SAMPLES), np.zeros(SAMPLES))
    # CatBoost shows a part of the samples at a time.
    objective.calc_ders_range(np.zeros(2), far[1:3], None)


def in_numpy(kind, y, f, p):
    """Losses, gradient and Hessian of many samples, as the equations say."""
    y, f = y.astype(np.float64), f.astype(np.float64)
    if kind == "logistic":
        losses = np.where(y == 1, np.logaddexp(0, -f), np.logaddexp(0, f))
        q = 1 / (1 + np.exp(-f))
        gradient, hessian = q - y, q * (1 - q)
    elif kind == "squared_error":
        losses, gradient, hessian = (f - y) ** 2 / 2, f - y, np.ones_like(f)
    else:
        logs = f - f.max(1, keepdims=True)
        logs -= np.log(np.exp(logs).sum(1, keepdims=True))
        own = np.eye(CLASSES)[y.astype(int)]
        q = np.exp(logs)
        losses, gradient, hessian = -(own * logs).sum(1), q - own, CLASSES / (CLASSES - 1) * q * (1 - q)
    factor = p * np.exp(np.minimum(losses, 1.5) / 2.5)
    factor = factor if f.ndim == 1 else factor[:, None]
    return factor * gradient, factor * hessian


@pytest.mark.parametrize("layout", ["C", "F", "reversed"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_many_samples_in_any_layout_are_as_the_equations_say(kind, dtype, layout):
    n = 30_001  # above the size from which several threads share the work
    rng = np.random.default_rng(3)
    shape = (n, CLASSES) if kind == "softmax" else (n,)
    f = np.asarray(rng.normal(scale=3.0, size=shape).astype(dtype), order="F" if layout == "F" else "C")
    f = f[::-1] if layout == "reversed" else f
    y = rng.normal(size=n) if kind == "squared_error" else rng.integers(0, 3 if kind == "softmax" else 2, n)
    p = rng.integers(0, 4, n).astype(dtype)
    objective = make(kind, tau=1.5)
    # LightGBM's factor of the Hessian's diagonal does not depend on the margins' dtype.
    data_set = type("Dataset", (), {"get_label": lambda self: y, "get_weight": lambda self: p})
    data_set.__module__ = "lightgbm.basic"
    found = objective(f, data_set())
    for values, expected in zip(found, in_numpy(kind, y, f, p), strict=True):
        # A loss of up to 100, whose rounding enters the exponent, and a difference of probabilities.
        np.testing.assert_allclose(values, expected, rtol=100 * 8 * EPS, atol=100 * 8 * EPS)
        assert values.dtype == np.float64


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_any_integer_dtype_and_margins_of_float16_are_taken(kind):
    y, f = TARGETS[kind], margins_for(kind).astype(np.float16)
    expected = make(kind)(y.astype(np.float64), f.astype(np.float64))
    dtypes = [np.float32] if kind == "squared_error" else [np.int8, np.uint64, np.float32]
    for dtype in dtypes:
        for values, other in zip(make(kind)(y.astype(dtype), f), expected, strict=True):
            np.testing.assert_array_equal(values, other)


@pytest.mark.parametrize("kind", KINDS)
def test_no_samples_have_no_derivatives(kind):
    shape = (0, CLASSES) if kind == "softmax" else (0,)
    for weighting in (rgd.KL(), rgd.CVaR(0.5)):
        for values in make(kind, weighting)(np.zeros(0), np.zeros(shape)):
            assert values.shape == shape


def test_lists_series_and_frames_are_taken():
    pandas = pytest.importorskip("pandas")
    y, f, p = TARGETS["logistic"], margins_for("logistic"), MASS
    objective = boosting.logistic()
    expected = objective(y, f, p)
    index = np.arange(SAMPLES)[::-1]
    givens = (
        (y.tolist(), f.tolist(), p.tolist()),
        (pandas.Series(y, index=index), pandas.Series(f), pandas.Series(p, index=index)),
        (pandas.DataFrame({"y": y}), f, pandas.DataFrame({"p": p})),
        (pandas.Series(y, dtype=object), f, p),
        (y[:, None], f, p),
    )
    for given in givens:
        for values, other in zip(objective(*given), expected, strict=True):
            assert type(values) is np.ndarray
            np.testing.assert_array_equal(values, other)
    f = margins_for("softmax")
    objective = boosting.softmax(CLASSES)
    frames = objective(pandas.Series(TARGETS["softmax"]), pandas.DataFrame(f))
    np.testing.assert_array_equal(frames[0], objective(TARGETS["softmax"], f)[0])


def test_the_flat_margins_of_old_data_sets_keep_their_order():
    y, f = TARGETS["softmax"], margins_for("softmax")
    objective = boosting.softmax(CLASSES)

    def data_set(module):
        kind = type("Dataset", (), {"get_label": lambda self: y, "get_weight": lambda self: np.empty(0)})
        kind.__module__ = module
        return kind()

    gradient, hessian = objective(y, f)
    flat = objective(f.ravel(order="F"), data_set("lightgbm.basic"))
    np.testing.assert_array_equal(flat[0], gradient.ravel(order="F"))
    np.testing.assert_array_equal(flat[1], hessian.ravel(order="F"))
    flat = objective(f.ravel(), data_set("xgboost.core"))
    np.testing.assert_array_equal(flat[0], gradient.ravel())
    with pytest.raises(ValueError, match="num_class=3 too"):
        objective(f.ravel()[:-1], data_set("xgboost.core"))


@dataclasses.dataclass(frozen=True)
class Remembers(rgd.Weighting):
    """Each weight depends on its own loss and on the number of batches."""

    pointwise = True

    def init(self):
        return {"batches": 0.0}

    def step(self, batch, state):
        return 1 + batch.losses * state["batches"], {"batches": state["batches"] + 1.0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: boosting.logistic()([-1, 1], [0.0, 0.0]), r"labels -1 and 1 pass \(y > 0\)"),
        (lambda: boosting.logistic()([0, 2], [0.0, 0.0]), r"got 2: .*softmax\(num_class\)"),
        (lambda: boosting.logistic()([0.0, math.nan], [0.0, 0.0]), "got nan"),
        (lambda: boosting.logistic()([0, 1], np.zeros((2, 3))), r"one entry a sample, shape \(n,\)"),
        (lambda: boosting.logistic()([0, 1, 1], [0.0, 0.0]), r"\(3,\) and \(2,\)"),
        (lambda: boosting.softmax(3)([0, 3], np.zeros((2, 3))), r"0\.\.2 as whole numbers, got 3"),
        (lambda: boosting.softmax(3)([0, 0.5], np.zeros((2, 3))), "got 0.5"),
        (lambda: boosting.softmax(3)([0, 1], np.zeros((2, 4))), r"\(2, 3\), got \(2, 4\)"),
        (lambda: boosting.softmax(3)([0, 1], np.zeros(6)), r"\(2, 3\), got \(6,\)"),
        (lambda: boosting.softmax(1), "at least 2, got 1"),
        (lambda: boosting.squared_error()([0.0, math.inf], [0.0, 0.0]), "finite numbers, got inf"),
        (lambda: boosting.logistic()([0, 1], [0.0, 0.0], [1.0]), r"\(2,\), got \(1,\)"),
        (lambda: boosting.logistic()([0, 1], [0.0, 0.0], [1.0, -1.0]), "finite numbers >= 0, got -1"),
        (
            lambda: boosting.logistic(rgd.GroupDRO(2, 0.1))([0, 1], [0.0, 0.0]),
            "needs the group of each sample",
        ),
        (
            lambda: boosting.logistic(rgd.GroupDRO(2, 0.1), groups=[0, 1])([0, 1, 1], [0.0, 0.0, 0.0]),
            r"groups must have one entry a training sample, \(3,\), got \(2,\): .* each fold",
        ),
        (lambda: boosting.logistic(rgd.GroupDRO(2, 0.1), groups=[[0], [1]]), r"\(2,\), got \(2, 1\)"),
        (lambda: boosting.logistic(rgd.KL(), tau=1.0), "tau or weighting, not both"),
        (
            lambda: boosting.logistic(rgd.KLBall(0.1)).calc_ders_range([0.0], [0], None),
            "CatBoost shows .* KLBall depend on all of them",
        ),
        (
            lambda: boosting.logistic(Remembers()).calc_ders_range([0.0], [0], None),
            "CatBoost shows .* Remembers depend on all of them",
        ),
        (
            lambda: boosting.softmax(2, rgd.KL(math.inf, scale=999.0)).calc_ders_multi([0.0, 0.0], 1, None),
            "a weight of .*float32.*: give tau",
        ),
        (
            lambda: boosting.squared_error(rgd.KL(1.0, scale=-0.5))([1e50], [0.0]),
            "a weight of 0.607, and so derivatives",
        ),
        (
            lambda: boosting.softmax(2).calc_ders_multi([math.inf, 0.0], 1, None),
            "margins of sample 0 are not finite",
        ),
        (
            lambda: boosting.logistic(groups=[0, 1]).calc_ders_range([0.0], [0], None),
            "CatBoost shows .*: leave groups out",
        ),
        (lambda: boosting.squared_error().start([1.0, 2.0], [1.0, -1.0]), "finite numbers >= 0"),
        (lambda: boosting.metric("rmse").value([1.0, 2.0], [1.0, 2.0], [0.0, 0.0]), "not only 0"),
        (lambda: boosting.logistic().start([1, 1]), "both classes, got a mean label of 1"),
        (lambda: boosting.logistic().start([-1, 1]), r"labels -1 and 1 pass \(y > 0\)"),
        (lambda: boosting.softmax(3).start([0, 2, 2]), "every class, got no sample of class 1"),
        (lambda: boosting.metric("logloss"), "'log_loss', 'error', 'rmse', got 'logloss'"),
        (
            lambda: boosting.metric("log_loss").value([0, 1], np.full((2, 2), 0.5)),
            "y_pred holds probabilities",
        ),
        (lambda: boosting.metric("error").value([0, 2], np.zeros(2)), "got 2"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: boosting.logistic()(["no", "yes"], [0.0, 0.0]), "LabelEncoder"),
        (lambda: boosting.softmax(2.5), "an integer, got 2.5"),
        (lambda: boosting.logistic()(np.ma.array([0, 1]), [0.0, 0.0]), "y_true is a masked array"),
        (lambda: boosting.logistic()([0, 1], [0.0, 0.0], np.ma.ones(2)), "sample_weight is a masked array"),
        (lambda: boosting.logistic(groups=np.ma.array([0, 1])), "groups is a masked array"),
        (lambda: boosting.logistic(2.0), "did you mean tau=2.0"),
        (lambda: boosting.logistic(rgd.GroupDRO(2, 0.1), groups=[0.0, 1.0]), "array of integers"),
    ],
)
def test_the_wrong_type_is_refused_with_the_fix(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("kind", KINDS)
def test_an_objective_pickles_and_names_itself(kind):
    objective = make(kind, tau=2.0)
    copy = pickle.loads(pickle.dumps(objective))
    assert repr(copy) == repr(objective)
    assert eval(repr(objective).replace("KL(", "rgd.KL("), {"rgd": rgd}).weighting == objective.weighting


def test_no_library_is_imported():
    code = (
        "import sys, rgd.boosting; print({'lightgbm', 'xgboost', 'catboost', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def quiet(function, *arguments, **keywords):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **keywords)


def client(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its dependencies warn at import
        return pytest.importorskip(name)


class LightGBM:
    own = types.MappingProxyType(
        {"logistic": "binary", "softmax": "multiclass", "squared_error": "regression"}
    )
    settings = types.MappingProxyType({"num_leaves": 7, "verbose": -1, "boost_from_average": False})

    def scikit(self, kind, objective, mass):
        lgb = client("lightgbm")
        model = lgb.LGBMRegressor if kind == "squared_error" else lgb.LGBMClassifier
        model = model(objective=objective, n_estimators=ROUNDS, n_jobs=1, **self.settings)
        return quiet(lambda: model.fit(X, TARGETS[kind], sample_weight=mass).predict(X, raw_score=True))

    def native(self, kind, objective, mass):
        lgb = client("lightgbm")
        classes = {"num_class": CLASSES} if kind == "softmax" else {}
        data = lgb.Dataset(X, TARGETS[kind], weight=mass)
        settings = {"objective": objective, "num_threads": 1, **self.settings, **classes}
        return lgb.train(settings, data, ROUNDS).predict(X, raw_score=True)


class XGBoost:
    own = types.MappingProxyType(
        {"logistic": "binary:logistic", "softmax": "multi:softprob", "squared_error": "reg:squarederror"}
    )

    def scikit(self, kind, objective, mass):
        xgb = client("xgboost")
        model = xgb.XGBRegressor if kind == "squared_error" else xgb.XGBClassifier
        # Both start at margin 0; for a classifier of two classes base_score is a probability.
        start = 0.5 if kind == "logistic" else 0.0
        model = model(objective=objective, n_estimators=ROUNDS, max_depth=3, n_jobs=1, base_score=start)
        return model.fit(X, TARGETS[kind], sample_weight=mass).predict(X, output_margin=True)

    def native(self, kind, objective, mass):
        xgb = client("xgboost")
        custom = not isinstance(objective, str)
        settings = {"max_depth": 3, "nthread": 1, "base_score": 0.0}
        if kind == "softmax":
            settings["num_class"] = CLASSES
        if not custom:
            settings |= {"objective": objective} | ({"base_score": 0.5} if kind == "logistic" else {})
        data = xgb.DMatrix(X, TARGETS[kind], weight=mass)
        booster = xgb.train(settings, data, ROUNDS, obj=objective if custom else None)
        return booster.predict(data, output_margin=True)


class CatBoost:
    own = types.MappingProxyType({"logistic": "Logloss", "softmax": "MultiClass", "squared_error": "RMSE"})
    settings = types.MappingProxyType(
        {
            "iterations": ROUNDS,
            "depth": 3,
            "learning_rate": 0.1,
            "leaf_estimation_method": "Newton",
            "leaf_estimation_iterations": 1,
            "leaf_estimation_backtracking": "No",
            "boost_from_average": False,
            "bootstrap_type": "No",
            "random_strength": 0,
            "thread_count": 1,
            "verbose": 0,
            "allow_writing_files": False,
        }
    )

    def scikit(self, kind, objective, mass):
        catboost = client("catboost")
        settings = {**self.settings, "loss_function": objective, "eval_metric": self.own[kind]}
        if kind == "squared_error":
            model = catboost.CatBoostRegressor(**settings)
        else:
            model = catboost.CatBoostClassifier(**settings)
            if kind == "softmax":
                model.set_params(classes_count=CLASSES)
        # It warns that numba, which compiles simple objectives, is not there.
        quiet(model.fit, X, TARGETS[kind], sample_weight=mass)
        return model.predict(X, prediction_type="RawFormulaVal")


INTERFACES = [
    pytest.param(LightGBM(), "scikit", 0.0, id="LightGBM-sklearn"),
    pytest.param(LightGBM(), "native", 0.0, id="LightGBM-native"),
    pytest.param(XGBoost(), "scikit", TREES, id="XGBoost-sklearn"),
    pytest.param(XGBoost(), "native", TREES, id="XGBoost-native"),
    pytest.param(CatBoost(), "scikit", ROUNDS * SAMPLES * EPS, id="CatBoost"),
]


@pytest.mark.parametrize("mass", [None, MASS], ids=["plain", "sample_weight"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("library", "interface", "tolerance"), INTERFACES)
def test_without_reweighting_the_trees_are_the_librarys_own(library, interface, tolerance, kind, mass):
    train = getattr(library, interface)
    plain = train(kind, library.own[kind], mass)
    ours = train(kind, make(kind, rgd.KL(scale=0.0)), mass)
    if kind == "squared_error" and mass is not None:
        tolerance = max(tolerance, TREES)  # LightGBM multiplies by the sample weight in float32
    assert np.abs(plain).max() > 0.3
    np.testing.assert_allclose(ours, plain, rtol=0, atol=tolerance * np.abs(plain).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("library", "interface", "tolerance"), INTERFACES)
def test_reweighting_reaches_the_trees(library, interface, tolerance, kind):
    train = getattr(library, interface)
    plain, ours = (train(kind, make(kind, rgd.KL(scale=s)), None) for s in (0.0, 0.7))
    assert np.abs(plain - ours).max() > 1e-3
    if kind == "squared_error":
        # The largest losses end smaller, which is what the weights are for.
        objective, y = make(kind), TARGETS[kind]
        tails = [np.sort(objective.losses(y, f))[-20:].mean() for f in (plain, ours)]
        assert tails[1] < tails[0]


@pytest.mark.parametrize(("library", "interface", "tolerance"), INTERFACES[:4])
def test_a_weighting_of_the_whole_batch_trains(library, interface, tolerance):
    margins = getattr(library, interface)("softmax", make("softmax", rgd.KLBall(0.1)), None)
    assert margins.shape == (SAMPLES, CLASSES)
    assert (margins.argmax(1) == TARGETS["softmax"]).mean() > 0.7


@pytest.mark.parametrize(("library", "interface", "tolerance"), INTERFACES)
def test_targets_whose_weights_overflow_stop_the_training(library, interface, tolerance, monkeypatch):
    monkeypatch.setitem(TARGETS, "squared_error", 146 * SCORE)
    # CatBoost wraps the error into one of its own, which quotes it.
    with pytest.raises(Exception, match=r"scale the labels, as in \(y - y.mean\(\)\) / y.std\(\), give tau"):
        getattr(library, interface)("squared_error", make("squared_error", rgd.KL(math.inf, scale=0.1)), None)


GROUPS = (X[:, 3] > 1).astype(int)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("library", "interface", "tolerance"), INTERFACES[:4])
def test_group_dro_takes_a_step_at_every_tree(library, interface, tolerance, kind):
    weighting, base = rgd.GroupDRO(2, step_size=0.5), make(kind, rgd.ERM())
    state = weighting.init()

    def by_hand(y_true, y_pred, sample_weight=None):
        nonlocal state
        y, f = (y_pred.get_label(), y_true) if hasattr(y_pred, "get_label") else (y_true, y_pred)
        weights, state = rgd.sample_weights(base.losses(y, f), weighting, groups=GROUPS, state=state)
        columns = weights[:, None] if kind == "softmax" else weights
        return tuple(columns * values for values in base(y_true, y_pred))

    objective, train = make(kind, weighting, groups=GROUPS), getattr(library, interface)
    found, expected = train(kind, objective, None), train(kind, by_hand, None)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TREES * np.abs(expected).max())
    assert abs(state["shares"][1] - 0.5) > 0.01
    # The next training starts with equal shares.
    np.testing.assert_array_equal(train(kind, objective, None), found)


def test_a_weighting_that_remembers_moves_with_derivatives_alone():
    y, f = TARGETS["logistic"], margins_for("logistic")
    objective = boosting.logistic(rgd.GroupDRO(2, 0.5), groups=GROUPS)
    first = objective.weights(y, f)
    np.testing.assert_array_equal(objective.weights(y, f), first)
    objective(y, f)
    second = objective.weights(y, f)
    assert (second != first).all()
    with pytest.raises(ValueError, match="not finite"):
        objective(y, np.full(SAMPLES, math.nan))
    with pytest.raises(ValueError, match="finite numbers >= 0"):
        objective(y, f, -MASS)
    np.testing.assert_array_equal(objective.weights(y, f), second)
    # Losses of 1e100 are finite, and move the shares, unless the derivatives overflow.
    objective = boosting.squared_error(rgd.GroupDRO(2, 0.5), groups=GROUPS)
    second = objective.weights(SCORE, f)
    with pytest.raises(ValueError, match="too large for float32"):
        objective(SCORE, np.where(GROUPS == 1, 1e50, f))
    np.testing.assert_array_equal(objective.weights(SCORE, f), second)


def test_the_start_is_the_margin_of_the_mean_label():
    y, p = np.array([0, 1, 1, 2]), np.array([3.0, 1.0, 1.0, 1.0])
    assert boosting.squared_error().start(y, p) == pytest.approx(4 / 6)
    assert boosting.logistic().start(y > 0, p) == pytest.approx(0.0)
    np.testing.assert_allclose(np.exp(boosting.softmax(3).start(y, p)), np.array([3, 2, 1]) / 6 ** (1 / 3))


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_base_score_of_0_or_1_is_refused_where_it_is_a_probability(sign):
    start = np.full(SAMPLES, 13.8155 * sign, np.float32)
    with pytest.raises(ValueError, match=r"base_score is a probability. Give base_score=y.mean\(\), or 0.5"):
        boosting.logistic()(TARGETS["logistic"], start)
    start[0] = 0  # those are margins of trees
    boosting.logistic()(TARGETS["logistic"], start)
    boosting.squared_error()(TARGETS["squared_error"], np.full(SAMPLES, 14, np.float32))


def test_xgboost_does_not_start_at_probability_0():
    xgb = client("xgboost")
    model = xgb.XGBClassifier(objective=boosting.logistic(), n_estimators=2, n_jobs=1, base_score=0)
    with pytest.raises(ValueError, match="base_score is a probability"):
        model.fit(X, TARGETS["logistic"])


@pytest.mark.parametrize(
    ("covers", "changed"),
    [((4 / 9, 4 / 9, 4 / 9), False), ((2 / 3, 1 / 3, 1 / 3), True)],
    ids=["2q(1-q)", "|q-y|"],
)
def test_softmax_has_the_hessian_of_the_xgboost_that_is_installed(covers, changed, monkeypatch):
    trees = [f'{{"nodeid": 0, "leaf": 0, "cover": {cover}}}' for cover in covers]
    booster = types.SimpleNamespace(get_dump=lambda **_: trees)
    fake = types.SimpleNamespace(DMatrix=lambda *_, **__: None, train=lambda *_: booster)
    monkeypatch.setitem(sys.modules, "xgboost", fake)
    _libraries.measured_curvature.cache_clear()
    y, f = TARGETS["softmax"], margins_for("softmax").astype(np.float32)
    try:
        gradient, hessian = boosting.softmax(CLASSES)(y, f, MASS)
    finally:
        _libraries.measured_curvature.cache_clear()
    _, diagonal = boosting.softmax(CLASSES)(y, f.astype(np.float64), MASS)
    # LightGBM's factor for the diagonal is 3/2.
    expected = np.abs(gradient) if changed else diagonal * (2 / 1.5)
    np.testing.assert_allclose(hessian, expected, rtol=4 * EPS)


@pytest.mark.parametrize("value", [5.0, "2"])
def test_lightgbm_refuses_a_scale_pos_weight_that_would_do_nothing(value):
    lgb = client("lightgbm")
    settings = {"objective": boosting.logistic(), "verbose": -1, "scale_pos_weight": value}
    with pytest.raises(ValueError, match=r"ignores scale_pos_weight .*weight=np.where\(y == 1, ratio"):
        lgb.train(settings, lgb.Dataset(X, TARGETS["logistic"]), 2)


@pytest.mark.parametrize("name", ["is_unbalance", "unbalance", "unbalanced_sets"])
def test_lightgbm_refuses_a_balance_that_would_do_nothing(name):
    lgb = client("lightgbm")
    settings = {"objective": boosting.logistic(), "verbose": -1, "scale_pos_weight": 1.0}
    lgb.train({**settings, name: False}, lgb.Dataset(X, TARGETS["logistic"]), 2)
    with pytest.raises(ValueError, match=f"ignores {name} "):
        lgb.train({**settings, name: True}, lgb.Dataset(X, TARGETS["logistic"]), 2)


@pytest.mark.parametrize("metric", ["binary_logloss", ["auc", "binary_error"], "auc,binary_logloss"], ids=str)
def test_lightgbm_refuses_its_metrics_that_read_margins_as_probabilities(metric):
    lgb = client("lightgbm")
    data = lgb.Dataset(X, TARGETS["logistic"])
    with pytest.raises(
        ValueError, match=r"reads margins as probabilities .*rgd.boosting.metric\(.log_loss.\)"
    ):
        lgb.train({"objective": boosting.logistic(), "verbose": -1, "metric": metric}, data, 2)
    data = lgb.Dataset(X, TARGETS["logistic"])
    lgb.train({"objective": boosting.logistic(), "verbose": -1, "metric": ["auc"]}, data, 2)


def test_a_data_set_that_lightgbms_own_objective_was_trained_on_serves_another_training():
    lgb = client("lightgbm")
    data = lgb.Dataset(X, TARGETS["logistic"])
    settings = {"objective": "binary", "verbose": -1, "metric": "binary_logloss", "is_unbalance": True}
    lgb.train(settings, data, 2)
    lgb.train({"objective": boosting.logistic(), "verbose": -1, "metric": "None"}, data, 2)


def test_a_sample_weight_does_what_scale_pos_weight_does_with_the_librarys_own_objective():
    lgb = client("lightgbm")
    y, settings = TARGETS["logistic"], {"verbose": -1, "num_threads": 1, "boost_from_average": False}
    own = lgb.train({"objective": "binary", "scale_pos_weight": 5.0, **settings}, lgb.Dataset(X, y), ROUNDS)
    data = lgb.Dataset(X, y, weight=np.where(y == 1, 5.0, 1.0))
    ours = lgb.train({"objective": boosting.logistic(rgd.ERM()), **settings}, data, ROUNDS)
    np.testing.assert_allclose(ours.predict(X, raw_score=True), own.predict(X, raw_score=True), rtol=TREES)


def test_lightgbm_draws_other_features_for_any_objective_of_ones_own():
    lgb = client("lightgbm")
    y = TARGETS["logistic"]

    def by_hand(f, data):
        q = 1 / (1 + np.exp(-f))
        return q - y, q * (1 - q)

    settings = {"verbose": -1, "num_threads": 1, "boost_from_average": False, "feature_fraction": 0.5}
    own, other, ours = (
        lgb.train({"objective": o, **settings}, lgb.Dataset(X, y), ROUNDS).predict(X, raw_score=True)
        for o in ("binary", by_hand, boosting.logistic(rgd.ERM()))
    )
    np.testing.assert_allclose(ours, other, rtol=0, atol=TREES * np.abs(own).max())
    assert np.abs(ours - own).max() > 0.01


def plain_value(name, y, f, p):
    """A metric as its equation says."""
    several = f.ndim == 2
    if name == "rmse":
        return math.sqrt(np.average((f - y) ** 2, weights=p))
    if name == "error":
        return np.average((f.argmax(1) if several else f > 0) != y, weights=p)
    kind = "softmax" if several else "logistic"
    return np.average([loss(kind, *pair) for pair in zip(y.tolist(), f.tolist(), strict=True)], weights=p)


@pytest.mark.parametrize("mass", [None, MASS], ids=["plain", "sample_weight"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("log_loss", "logistic"),
        ("log_loss", "softmax"),
        ("error", "logistic"),
        ("error", "softmax"),
        ("rmse", "squared_error"),
    ],
)
def test_a_metric_reads_margins_in_the_form_of_each_library(name, kind, mass):
    metric, y, f = boosting.metric(name), TARGETS[kind], margins_for(kind)
    expected = pytest.approx(plain_value(name, y, f, mass), rel=SAMPLES * EPS)
    assert metric.value(y, f, mass) == expected
    assert metric(y, f, mass) == (name, expected, False)
    single = f.astype(np.float32)
    assert metric(y, single, sample_weight=mass) == pytest.approx(expected.expected, rel=16 * EPS32)
    for module, form in (("lightgbm.basic", (name, expected, False)), ("xgboost.core", (name, expected))):
        kept = {"get_label": lambda self: y, "get_weight": lambda self: mass, "__module__": module}
        assert metric(f, type("Dataset", (), kept)()) == form
    columns = list(f.T) if kind == "softmax" else [f]
    assert metric.get_final_error(*metric.evaluate(columns, y, mass)) == expected
    assert not metric.is_max_optimal()
    assert repr(pickle.loads(pickle.dumps(metric))) == f"rgd.boosting.metric({name!r})"


def test_margins_that_are_positive_and_small_are_no_probabilities():
    # Their sum is not 1.
    assert boosting.metric("error").value([0, 1], [[0.2, 0.3], [0.1, 0.4]]) == 0.5


def test_a_metric_of_no_samples_is_nan():
    assert math.isnan(boosting.metric("error").get_final_error(0.0, 0.0))


TRAIN, VALID = np.arange(SAMPLES) % 2 == 0, np.arange(SAMPLES) % 2 == 1
MOST, PATIENCE = 100, 5
PLAIN = types.MappingProxyType({"logistic": "log_loss", "softmax": "log_loss", "squared_error": "rmse"})


def stopped_lightgbm(interface, kind, own):
    """Margins of the validation samples after early stopping, and the best tree, from the mean label on."""
    lgb = client("lightgbm")
    y, stop = TARGETS[kind], [lgb.early_stopping(PATIENCE, verbose=False)]
    objective = make(kind, rgd.ERM())
    start = np.tile(objective.start(y[TRAIN]), (100, 1) if kind == "softmax" else 100)
    settings = {"num_leaves": 7, "learning_rate": 0.2, "verbose": -1, "num_threads": 1}
    metric, init = boosting.metric(PLAIN[kind]), {"init_score": start}
    if own:
        name = {"logistic": "binary_logloss", "softmax": "multi_logloss", "squared_error": "rmse"}[kind]
        settings |= {"objective": LightGBM.own[kind], "metric": name}
        metric, init, start = None, {}, 0.0
    else:
        settings |= {"objective": objective, "metric": "None"}
    if interface == "scikit":
        model = lgb.LGBMRegressor if kind == "squared_error" else lgb.LGBMClassifier
        model = model(n_estimators=MOST, **settings)
        held_out = {"eval_init_score": [start]} if init else {}
        held_out |= {"eval_set": [(X[VALID], y[VALID])], "eval_metric": metric, "callbacks": stop}
        quiet(model.fit, X[TRAIN], y[TRAIN], **init, **held_out)
        return quiet(model.predict, X[VALID], raw_score=True) + start, model.best_iteration_
    if kind == "softmax":
        settings["num_class"] = CLASSES
    data = lgb.Dataset(X[TRAIN], y[TRAIN], **init)
    valid = lgb.Dataset(X[VALID], y[VALID], reference=data, **init)
    model = lgb.train(settings, data, MOST, [valid], feval=metric, callbacks=stop)
    return model.predict(X[VALID], raw_score=True) + start, model.best_iteration


def stopped_xgboost(interface, kind, own, with_metric=False):
    xgb = client("xgboost")
    y, objective = TARGETS[kind], make(kind, rgd.ERM())
    name = {"logistic": "logloss", "softmax": "mlogloss", "squared_error": "rmse"}[kind]
    metric = boosting.metric(PLAIN[kind]) if with_metric else name
    settings = {"max_depth": 3, "n_jobs": 1}
    if not own:
        start = objective.start(y[TRAIN]).tolist() if kind == "softmax" else float(y[TRAIN].mean())
        settings["base_score"] = start
    if interface == "scikit":
        model = xgb.XGBRegressor if kind == "squared_error" else xgb.XGBClassifier
        settings |= {} if own else {"objective": objective}
        model = model(n_estimators=MOST, early_stopping_rounds=PATIENCE, eval_metric=metric, **settings)
        model.fit(X[TRAIN], y[TRAIN], eval_set=[(X[VALID], y[VALID])], verbose=False)
        return model.predict(X[VALID], output_margin=True), model.best_iteration
    settings["objective"] = XGBoost.own[kind]
    if kind == "softmax":
        settings["num_class"] = CLASSES
    given = {"custom_metric": metric} if with_metric else {}
    settings |= {"disable_default_eval_metric": True} if with_metric else {"eval_metric": metric}
    valid = xgb.DMatrix(X[VALID], y[VALID])
    given |= {"obj": None if own else objective, "evals": [(valid, "valid")], "verbose_eval": False}
    data = xgb.DMatrix(X[TRAIN], y[TRAIN])
    model = xgb.train(settings, data, MOST, early_stopping_rounds=PATIENCE, **given)
    margins = model.predict(valid, output_margin=True, iteration_range=(0, model.best_iteration + 1))
    return margins, model.best_iteration


def stopped_catboost(kind, own, with_metric=False):
    catboost = client("catboost")
    y, name = TARGETS[kind], CatBoost.own[kind]
    settings = {
        **CatBoost.settings,
        "iterations": MOST,
        "early_stopping_rounds": PATIENCE,
        "learning_rate": 0.4,
    }
    settings["loss_function"] = name if own else make(kind, rgd.ERM())
    settings["eval_metric"] = boosting.metric(PLAIN[kind]) if with_metric else name
    if kind == "softmax":
        settings["classes_count"] = CLASSES
    pools = [catboost.Pool(X[part], y[part]) for part in (TRAIN, VALID)]
    model = quiet(catboost.train, pool=pools[0], params=settings, eval_set=pools[1])
    return model.predict(pools[1], prediction_type="RawFormulaVal"), model.tree_count_


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("stopped", "settings"),
    [
        pytest.param(stopped_lightgbm, {"interface": "native"}, id="LightGBM-native"),
        pytest.param(stopped_lightgbm, {"interface": "scikit"}, id="LightGBM-sklearn"),
        pytest.param(stopped_xgboost, {"interface": "native"}, id="XGBoost-native"),
        pytest.param(
            stopped_xgboost, {"interface": "native", "with_metric": True}, id="XGBoost-native-metric"
        ),
        pytest.param(stopped_xgboost, {"interface": "scikit"}, id="XGBoost-sklearn"),
        pytest.param(
            stopped_xgboost, {"interface": "scikit", "with_metric": True}, id="XGBoost-sklearn-metric"
        ),
        pytest.param(stopped_catboost, {}, id="CatBoost"),
        pytest.param(stopped_catboost, {"with_metric": True}, id="CatBoost-metric"),
    ],
)
def test_early_stopping_stops_at_the_tree_of_the_librarys_own_objective(stopped, settings, kind):
    plain, best = stopped(kind=kind, own=True, **{k: v for k, v in settings.items() if k != "with_metric"})
    ours, found = stopped(kind=kind, own=False, **settings)
    assert 2 < best < MOST - PATIENCE
    assert found == best
    if kind == "softmax":  # a number added to all margins of a sample changes no probability
        plain, ours = (f - f.mean(axis=1, keepdims=True) for f in (plain, ours))
    np.testing.assert_allclose(ours, plain, rtol=0, atol=MOST * EPS32 * np.abs(plain).max())


PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "boosting.md").read_text(encoding="utf-8")


def recipes(title):
    """The code of a section of docs/boosting.md: blocks before its subsections, and those of each of them."""
    first, *rest = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0].split("\n### ")
    blocks = [re.findall(r"^```py\n(.*?)^```$", part, re.MULTILINE | re.DOTALL) for part in (first, *rest)]
    assert any(blocks)
    return blocks[0], {part.partition("\n")[0]: found for part, found in zip(rest, blocks[1:], strict=True)}


@pytest.mark.parametrize("interface", [0, 1], ids=["scikit-learn", "native"])
@pytest.mark.parametrize("task", ["Two classes", "Several classes", "Numbers"])
@pytest.mark.parametrize("library", ["LightGBM", "XGBoost", "CatBoost"])
def test_a_recipe_of_the_page_trains_stops_early_and_predicts(library, task, interface):
    client("sklearn")
    client(library.lower())
    data, _ = recipes("Data for the recipes")
    shared, tasks = recipes(library)
    page = {"__name__": "page"}
    for code in (*data, *shared, tasks[task][interface]):
        quiet(exec, compile(code, f"docs/boosting.md: {library}, {task}", "exec"), page)
    model, y = page["model"], page["y_valid"]
    if task == "Numbers":
        found = math.sqrt(np.mean((page["prediction"] - y) ** 2))
        chance = math.sqrt(np.mean((page["y"].mean() - y) ** 2))
    else:
        q, share = page["probability"], np.bincount(page["y"]) / len(page["y"])
        assert q.min() >= 0
        assert q.max() <= 1
        if task == "Several classes":
            np.testing.assert_allclose(q.sum(axis=1), 1, rtol=CLASSES * EPS32)
        else:
            q = np.stack([1 - q, q], axis=1)
        found, chance = (
            -np.mean(np.log(np.broadcast_to(p, (len(y), len(share)))[np.arange(len(y)), y]))
            for p in (q, share)
        )
    assert found < 0.85 * chance
    # What was predicted is what the best tree was found by.
    best = model.best_score if hasattr(model, "best_score") else model.best_score_
    while isinstance(best, dict):
        best = list(best.values())[-1]
    assert found == pytest.approx(float(best), rel=len(y) * EPS32)
    trees = next(getattr(model, n) for n in ("best_iteration", "best_iteration_") if hasattr(model, n))
    assert 2 < trees < 490


def test_the_recipe_for_scikit_learn_runs(capsys):
    client("sklearn")
    (code,), _ = recipes("scikit-learn")
    quiet(exec, compile(code, "docs/boosting.md: scikit-learn", "exec"), {"__name__": "page"})
    assert capsys.readouterr().out.strip()
