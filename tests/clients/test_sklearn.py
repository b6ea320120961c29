"""`rgd.sklearn.Reweighted`: scikit-learn's own checks, and the weights of the fixed point."""

import sys
import warnings

import numpy as np
import pytest
import rgd
import rgd.boosting

pytest.importorskip("sklearn", minversion="1.6")

from rgd.sklearn import Reweighted
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.cluster import KMeans
from sklearn.datasets import make_classification, make_regression
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor
from sklearn.utils.estimator_checks import parametrize_with_checks

EPS = np.finfo(np.float64).eps
X, Y = make_classification(120, 5, n_informative=4, n_redundant=0, n_classes=3, flip_y=0.2, random_state=0)
FEATURES, VALUES = make_regression(80, 4, noise=20.0, random_state=0)
VALUES = VALUES / VALUES.std()
MASS = np.random.default_rng(0).integers(0, 4, len(Y))
PRECISE = LogisticRegression(solver="newton-cholesky", tol=1e-8)


@pytest.mark.filterwarnings("ignore")  # the checks fit what does not converge, on purpose
@parametrize_with_checks(
    [
        Reweighted(LogisticRegression()),
        Reweighted(Ridge(), rgd.KLBall(0.1), rounds=3),
        Reweighted(DecisionTreeClassifier(max_depth=3, random_state=0), rounds=3),
        Reweighted(DecisionTreeRegressor(max_depth=3, random_state=0), rounds=3),
    ]
)
def test_it_passes_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize(
    ("weighting", "step"),
    [(rgd.KL(), 0.5), (rgd.KL(tau=2.0), 0.5), (rgd.KL(scale=-0.5), 1.0), (rgd.KLBall(0.1), 0.5)],
    ids=repr,
)
@pytest.mark.parametrize("mass", [None, MASS], ids=["plain", "sample_weight"])
def test_where_it_settles_the_weights_are_those_of_the_models_own_losses(weighting, step, mass):
    model = Reweighted(PRECISE, weighting, rounds=100, step=step, tolerance=1e-5).fit(X, Y, mass)
    assert model.settled_
    assert model.n_rounds_ > 0
    losses = -np.log(model.predict_proba(X)[np.arange(len(Y)), Y])
    expected = rgd.sample_weights(losses, weighting, sample_weight=mass)
    np.testing.assert_allclose(model.weights_, expected, rtol=0, atol=1e-5 * expected.max())
    # And the model is the one that those weights give.
    base = np.ones(len(Y)) if mass is None else mass
    again = clone(PRECISE).fit(X, Y, sample_weight=base * model.weights_)
    np.testing.assert_array_equal(model.predict_proba(X), again.predict_proba(X))


def test_each_round_is_the_formula():
    model = Reweighted(LinearRegression(), tau=1.5, rounds=3, step=0.25, tolerance=0.0)
    with pytest.warns(ConvergenceWarning, match="not settled after 3 rounds"):
        model.fit(FEATURES, VALUES)
    twin = LinearRegression().fit(FEATURES, VALUES)
    weights = None
    for _ in range(3):
        losses = (twin.predict(FEATURES) - VALUES) ** 2 / 2
        fresh = np.exp(np.minimum(losses, 1.5) / 2.5)
        weights = fresh if weights is None else weights + 0.25 * (fresh - weights)
        twin = LinearRegression().fit(FEATURES, VALUES, sample_weight=weights)
    # The fit is least squares in 4 features and 80 samples, of condition number below 10.
    tolerance = 3 * 80 * 4 * 10 * EPS
    np.testing.assert_allclose(model.weights_, weights, rtol=tolerance)
    np.testing.assert_allclose(model.predict(FEATURES), twin.predict(FEATURES), rtol=0, atol=10 * tolerance)
    assert (model.n_rounds_, model.settled_) == (3, False)


@pytest.mark.parametrize("settings", [{"rounds": 0}, {"weighting": rgd.ERM()}], ids=["no round", "ERM"])
def test_without_reweighting_it_is_the_estimator_fitted_once(settings):
    model = Reweighted(PRECISE, **settings).fit(X, Y, MASS)
    plain = clone(PRECISE).fit(X, Y, sample_weight=MASS)
    np.testing.assert_array_equal(model.predict_proba(X), plain.predict_proba(X))
    assert model.n_rounds_ == 0
    np.testing.assert_array_equal(model.weights_, (MASS > 0).astype(float))
    assert model.score(X, Y, MASS) == plain.score(X, Y, MASS)


@pytest.mark.parametrize("weighting", [rgd.KL(), rgd.KLBall(0.1)], ids=repr)
def test_an_integer_sample_weight_counts_as_that_many_samples(weighting):
    once = Reweighted(PRECISE, weighting, rounds=4, tolerance=0.1).fit(X, Y, MASS)
    repeated = Reweighted(PRECISE, weighting, rounds=4, tolerance=0.1)
    repeated.fit(np.repeat(X, MASS, axis=0), np.repeat(Y, MASS))
    assert once.n_rounds_ == repeated.n_rounds_
    # A fit stops at gradients of 1e-8, over a Hessian that the penalty keeps above 1 / n.
    np.testing.assert_allclose(np.repeat(once.weights_, MASS), repeated.weights_, rtol=4 * 1e-8 * len(Y))


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_the_tolerance_is_relative_to_the_largest_weight(unit):
    # A least-squares fit does not depend on the unit of the weights, and a power of two changes no digit.
    unit = 2.0 ** round(np.log2(unit))
    scaled = rgd.Pointwise(lambda losses: unit * np.exp(np.minimum(losses, 2.0) / 3.0))
    once = Reweighted(LinearRegression(), tau=2.0, rounds=50, tolerance=1e-6).fit(FEATURES, VALUES)
    other = Reweighted(LinearRegression(), scaled, rounds=50, tolerance=1e-6).fit(FEATURES, VALUES)
    assert other.settled_
    assert other.n_rounds_ == once.n_rounds_ > 1
    np.testing.assert_allclose(other.weights_, unit * once.weights_, rtol=1e-9)


@pytest.mark.parametrize(
    ("weighting", "message"),
    [
        (rgd.KL(np.inf, scale=1.0), r"not finite, for losses of .*scale the target, as in \(y - y.mean"),
        (rgd.KL(scale=-1.0), "all weights are 0, for losses of .*scale the target"),
        (rgd.Pointwise(lambda losses: losses * np.nan), "weights are not finite"),
    ],
    ids=["infinite", "zero", "NaN"],
)
@pytest.mark.parametrize("mass", [None, np.arange(80) % 3], ids=["plain", "sample_weight"])
def test_weights_that_no_estimator_can_be_fitted_with_are_refused(weighting, message, mass):
    target = np.where(np.arange(80) % 2, 146.0, -146.0)  # no line comes near
    with pytest.raises(ValueError, match=message):
        Reweighted(LinearRegression(), weighting).fit(FEATURES, target, mass)


def test_weights_that_only_overflow_with_the_sample_weight_are_refused():
    with pytest.raises(ValueError, match="weights are not finite"):
        Reweighted(Ridge(), rgd.KL(np.inf, scale=1.0)).fit(FEATURES, 30 * VALUES, np.full(80, 1e200))


def test_a_classifier_whose_weights_overflow_is_told_to_bound_them():
    with pytest.raises(
        ValueError, match=r"weights are not finite, for losses of [\d.e+-]+ to [\d.e+-]+: give tau"
    ):
        Reweighted(LogisticRegression(), rgd.KL(np.inf, scale=1000.0)).fit(X, Y)


def test_samples_learnt_by_heart_leave_nothing_to_weight():
    with pytest.raises(ValueError, match="learnt every sample by heart"):
        Reweighted(DecisionTreeClassifier(random_state=0), rgd.Focal(2.0)).fit(X, Y)


def test_without_rounds_no_weight_can_overflow():
    model = Reweighted(Ridge(), rgd.KL(np.inf, scale=1000.0), rounds=0).fit(FEATURES, 146 * VALUES)
    assert not model.settled_
    np.testing.assert_array_equal(
        model.predict(FEATURES), Ridge().fit(FEATURES, 146 * VALUES).predict(FEATURES)
    )


def test_a_negative_scale_leaves_out_what_does_not_fit():
    features = np.arange(12.0)[:, None]
    values = 2 * features[:, 0]
    values[3] += 9
    model = Reweighted(LinearRegression(), rgd.KL(scale=-1.0), rounds=50).fit(features, values)
    assert model.weights_[3] < 1e-10
    assert model.predict([[20.0]])[0] == pytest.approx(40.0, abs=0.1)


def test_a_squared_error_weighs_as_in_boosted_trees():
    model = Reweighted(LinearRegression(), rounds=50, tolerance=1e-10).fit(FEATURES, VALUES)
    # The Hessian of the squared error is the weight.
    _, weights = rgd.boosting.squared_error()(VALUES, model.predict(FEATURES))
    np.testing.assert_allclose(model.weights_, weights, rtol=1e-9)


def test_several_outputs_weigh_by_their_mean_loss():
    values = np.stack([VALUES, VALUES[::-1]], axis=1)
    model = Reweighted(LinearRegression(), rounds=30, tolerance=1e-8).fit(FEATURES, values)
    losses = np.square(model.predict(FEATURES) - values).mean(axis=1) / 2
    np.testing.assert_allclose(model.weights_, rgd.sample_weights(losses), rtol=1e-7)


def test_it_has_the_kind_and_the_methods_of_its_estimator():
    classifier, regressor = Reweighted(LogisticRegression()), Reweighted(Ridge())
    assert is_classifier(classifier)
    assert not is_regressor(classifier)
    assert is_regressor(regressor)
    assert not hasattr(regressor, "predict_proba")
    classifier.fit(X, Y)
    assert classifier.classes_.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(classifier.predict_log_proba(X), np.log(classifier.predict_proba(X)))
    assert classifier.decision_function(X).shape == (120, 3)
    assert not hasattr(Reweighted(DecisionTreeClassifier()), "decision_function")


def test_classes_may_have_names_and_frames_keep_theirs():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=list("abcde"))
    names = pandas.Series(np.array(["low", "mid", "top"])[Y])
    model = Reweighted(PRECISE).fit(frame, names)
    plain = Reweighted(PRECISE).fit(X, Y)
    assert model.feature_names_in_.tolist() == list("abcde")
    np.testing.assert_array_equal(model.predict_proba(frame), plain.predict_proba(X))
    assert set(model.predict(frame)) <= {"low", "mid", "top"}


def test_it_works_inside_a_pipeline_and_a_grid_search():
    pipeline = make_pipeline(StandardScaler(), Reweighted(LogisticRegression()))
    grid = {"reweighted__tau": [0.5, 2.0], "reweighted__estimator__C": [0.1, 1.0]}
    search = GridSearchCV(pipeline, grid, cv=2).fit(X, Y)
    best = search.best_estimator_[-1]
    assert best.tau == search.best_params_["reweighted__tau"]
    assert search.best_params_["reweighted__estimator__C"] == best.estimator_.C


def test_the_progress_bar_comes_on_request(capsys):
    pytest.importorskip("tqdm")
    Reweighted(LogisticRegression()).fit(X, Y)
    assert capsys.readouterr().err == ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # outside a notebook tqdm.auto warns of ipywidgets
        Reweighted(LogisticRegression(), verbose=True).fit(X, Y)
    assert "Reweighted" in capsys.readouterr().err


def test_a_progress_bar_without_tqdm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        Reweighted(LogisticRegression(), verbose=True).fit(X, Y)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (Reweighted(LogisticRegression), TypeError, r"LogisticRegression\(\)"),
        (Reweighted(KMeans()), TypeError, "a classifier or a regressor .* got KMeans"),
        (Reweighted(LinearSVC()), TypeError, "LinearSVC has no predict_proba"),
        (Reweighted(KNeighborsClassifier()), TypeError, r"fit takes no sample_weight.*\n?.*make_pipeline"),
        (Reweighted(make_pipeline(StandardScaler(), Ridge())), TypeError, "wrap the last step"),
        (Reweighted(Ridge(), rgd.GroupDRO(2, 0.1)), ValueError, "GroupDRO remembers earlier batches"),
        (Reweighted(Ridge(), rgd.KL(), tau=1.0), ValueError, "tau or weighting, not both"),
        (Reweighted(Ridge(), 2.0), TypeError, r"did you mean tau=2\.0"),
        (Reweighted(Ridge(), rounds=2.5), TypeError, "rounds must be an integer, got 2.5"),
        (Reweighted(Ridge(), rounds=-1), ValueError, "rounds must be at least 0"),
        (Reweighted(Ridge(), step=0.0), ValueError, r"step must be in \(0, 1\], got 0"),
        (Reweighted(Ridge(), tolerance=-1.0), ValueError, "tolerance must be at least 0"),
    ],
    ids=lambda value: "" if isinstance(value, type) else None,
)
def test_what_cannot_be_reweighted_is_refused_with_the_fix(model, error, message):
    with pytest.raises(error, match=message):
        model.fit(FEATURES, VALUES > 0)


@pytest.mark.parametrize("weight", [np.ones(3), np.ones((120, 1)), 2.0], ids=["short", "column", "number"])
def test_a_sample_weight_of_another_shape_is_refused(weight):
    with pytest.raises(ValueError, match=r"one number for each sample, shape \(120,\)"):
        Reweighted(LogisticRegression()).fit(X, Y, weight)


def test_a_masked_sample_weight_is_refused():
    with pytest.raises(TypeError, match="masked array"):
        Reweighted(LogisticRegression()).fit(X, Y, np.ma.ones(120))


def test_a_forest_that_never_settles_says_so_and_stays_usable():
    forest = RandomForestClassifier(5, max_depth=2, random_state=0)
    with pytest.warns(ConvergenceWarning, match="a random_state"):
        model = Reweighted(forest, rgd.KLBall(0.2), rounds=2).fit(X, Y)
    assert model.score(X, Y) > 0.5
