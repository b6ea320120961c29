"""`rgd.boosting` as the objective of LightGBM, XGBoost and CatBoost, each skipped where it is absent."""

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

EPS, EPS32 = np.finfo(np.float64).eps, np.finfo(np.float32).eps
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
        (lambda: boosting.logistic(rgd.GroupDRO(2, 0.1)), "GroupDRO remembers earlier batches"),
        (lambda: boosting.logistic(rgd.KL(), tau=1.0), "tau or weighting, not both"),
        (
            lambda: boosting.logistic(rgd.KLBall(0.1)).calc_ders_range([0.0], [0], None),
            "CatBoost shows .* KLBall depend on all of them",
        ),
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
        (lambda: boosting.logistic(2.0), "did you mean tau=2.0"),
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


def recipe(title):
    """The code of a section of docs/boosting.md."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "boosting.md").read_text(encoding="utf-8")
    section = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
    code = "\n".join(re.findall(r"^```py\n(.*?)^```$", section, re.MULTILINE | re.DOTALL))
    assert code
    return code


@pytest.mark.parametrize("title", ["LightGBM", "XGBoost", "CatBoost", "scikit-learn"])
def test_the_recipes_of_the_page_run(title, capsys):
    client("sklearn")
    if title != "scikit-learn":
        client(title.lower())
    namespace = {"__name__": "page"}
    quiet(exec, compile(recipe(title), f"docs/boosting.md: {title}", "exec"), namespace)
    assert capsys.readouterr().out.strip()
