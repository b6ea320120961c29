"""Worst cases are the worst: against brute force, peers and the dual; and what a negative scale is."""

import importlib.util
import itertools
import math
import pathlib
import warnings

import numpy as np
import pytest
from family import EPS, formula, front
from rgd import KL, Batch, ChiSquare, ChiSquareBall, CVaR, KLBall, Trimmed, reference


@pytest.fixture(params=[front, formula, reference.sample_weights], ids=["front", "formula", "reference"])
def weigh(request):
    return request.param


# Brute force.


def small_batches():
    rng = np.random.default_rng(10)
    for size in (1, 2, 3, 5, 8):
        yield rng.normal(size=size), np.ones(size)
        yield rng.exponential(size=size), rng.uniform(0.3, 2.0, size=size)
    yield np.array([1.0, 1.0, 0.5, 2.0, 2.0, 2.0]), np.ones(6)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.5, 0.77, 1.0])
def test_cvar_solves_its_linear_program(weigh, alpha):
    optimize = pytest.importorskip("scipy.optimize")
    for losses, base in small_batches():
        p = base / base.sum()
        program = optimize.linprog(
            -losses, A_eq=[np.ones(len(p))], b_eq=[1.0], bounds=[(0, x / alpha) for x in p]
        )
        q = p * weigh(losses, CVaR(alpha), sample_weight=base)
        assert q.sum() == pytest.approx(1.0, rel=16 * EPS)
        assert (q <= p / alpha * (1 + 4 * EPS)).all()
        # The program's solution is feasible to 1e-7, so its value is right to that.
        assert q @ losses == pytest.approx(-program.fun, abs=1e-6 * np.abs(losses).max())


def supports(losses, p):
    """Every set of samples that may carry weight, equal losses alike, and its share of the mass."""
    levels, place = np.unique(losses, return_inverse=True)
    for chosen in itertools.product([False, True], repeat=levels.size):
        if any(chosen):
            samples = np.array(chosen)[place]
            yield samples, 1.0 if all(chosen) else p[samples].sum()


@pytest.mark.parametrize("gamma", [0.05, 0.7, 3.0, 100.0])
def test_chi_square_is_the_best_over_all_supports(weigh, gamma):
    for losses, base in small_batches():
        p = base / base.sum()

        def value(w, losses=losses, p=p):
            return p @ (w * losses) - gamma / 2 * (p @ (w - 1) ** 2)

        candidates = []
        for chosen, share in supports(losses, p):
            w = np.where(chosen, 1 / share + (losses - p[chosen] @ losses[chosen] / share) / gamma, 0.0)
            if (w >= 0).all():
                candidates.append(w)
        best = max(candidates, key=value)
        np.testing.assert_allclose(
            weigh(losses, ChiSquare(gamma), sample_weight=base), best, rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("radius", [0.0, 1e-4, 0.1, 0.6, 2.0, 100.0])
def test_the_chi_square_ball_is_the_best_over_all_supports(weigh, radius):
    for losses, base in small_batches():
        p = base / base.sum()
        candidates = []
        for chosen, share in supports(losses, p):
            deviation = np.where(chosen, losses - p[chosen] @ losses[chosen] / share, 0.0)
            variance = p @ deviation**2 / share
            room = 2 * radius * share - (1 - share)
            if room < -1e-12:
                continue
            # On a support either all weights are equal, or the weights reach the sphere.
            factor = math.sqrt(max(room, 0.0) / variance) if variance > 1e-20 else 0.0
            w = np.where(chosen, (1 + factor * deviation) / share, 0.0)
            if (w >= 0).all():
                candidates.append(w)
        best = max(candidates, key=lambda w, losses=losses, p=p: p @ (w * losses))
        got = weigh(losses, ChiSquareBall(radius), sample_weight=base)
        np.testing.assert_allclose(got, best, rtol=0, atol=1e-9)
        assert p @ (got - 1) ** 2 / 2 <= radius + 1e-12


def test_the_smallest_divergences_are_reached(weigh):
    losses = np.array([0.0, 1.0, 2.0, 5.0])
    for radius in (1e-12, 1e-8, 1e-3):
        w = weigh(losses, ChiSquareBall(radius))
        # Each weight, near one, is rounded to eps.
        assert np.mean((w - 1) ** 2) / 2 == pytest.approx(radius, rel=16 * EPS / math.sqrt(radius))


# Peers.


@pytest.mark.parametrize(("size", "alpha"), [(10, 0.3), (10, 0.5), (40, 0.05), (40, 1.0), (1, 0.5), (5, 0.1)])
def test_cvar_is_sqwashs_superquantile(weigh, size, alpha):
    torch, sqwash = pytest.importorskip("torch"), import_quietly("sqwash")
    # Where alpha * n is an integer, or below 1, sqwash's interpolated quantile is an exact one.
    losses = np.random.default_rng(size).exponential(size=size)
    expected = sqwash.reduce_superquantile(torch.tensor(losses), alpha)
    # The quantile that torch interpolates is rounded, and then divided by alpha.
    assert np.mean(weigh(losses, CVaR(alpha)) * losses) == pytest.approx(
        float(expected), rel=(size + 8) * EPS / alpha
    )


@pytest.mark.parametrize("gamma", [0.02, 0.5, 4.0])
def test_chi_square_is_sqwashs_quadratically_smoothed_maximum(weigh, gamma):
    torch = pytest.importorskip("torch")
    solver = import_quietly("sqwash.qp_solve").solve_qp_for_l2_smooth_superquantile
    for size in (2, 7, 40):
        losses = np.random.default_rng(size).exponential(size=size)
        # Its penalty is nu / (2 n) |q - 1/n|^2, and with a tail of 1/n its cap on q is 1.
        q = solver(torch.tensor(losses), 1 / size, gamma * size**2).numpy()
        np.testing.assert_allclose(weigh(losses, ChiSquare(gamma)), size * q, rtol=0, atol=1e-10 * size)


def import_quietly(name):
    """A peer whose own docstrings warn when they are compiled."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def dro():
    """The one file of `dro` that has divergences: its package imports gradient boosting and cvxpy."""
    pytest.importorskip("torch")
    package = importlib.util.find_spec("dro")
    if package is None:
        pytest.skip("dro is not installed")
    path = pathlib.Path(package.origin).parent / "neural_model" / "fdro_utils.py"
    spec = importlib.util.spec_from_file_location("dro_divergences", path)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("size", [2, 10, 50])
@pytest.mark.parametrize(
    ("weighting", "options"),
    [
        (CVaR(0.25), {"geometry": "cvar", "size": 0.25, "reg": 0.0}),
        (CVaR(0.25, smoothing=0.5), {"geometry": "cvar", "size": 0.25, "reg": 0.5}),
        (CVaR(0.5, smoothing=2.0), {"geometry": "cvar", "size": 0.5, "reg": 2.0}),
        (ChiSquareBall(0.1), {"geometry": "chi-square", "size": 0.1, "reg": 0.0}),
        (ChiSquareBall(0.45), {"geometry": "chi-square", "size": 0.45, "reg": 0.0}),
        (ChiSquareBall(3.0), {"geometry": "chi-square", "size": 3.0, "reg": 0.0}),
    ],
    ids=str,
)
def test_weights_are_those_of_dro(weigh, dro, weighting, options, size):
    import torch  # noqa: PLC0415

    losses = np.random.default_rng(size).exponential(size=size) + 0.5
    peer = dro.RobustLoss(**options, tol=1e-13)
    expected = size * peer._compute_optimal_weights(torch.tensor(losses)).numpy()
    # It bisects until its constraint holds to 1e-13, which the search multiplies by the range of the losses.
    np.testing.assert_allclose(weigh(losses, weighting), expected, rtol=0, atol=1e-9 * size)


def test_trimmed_cvar_is_dros_doro(weigh, dro):
    import torch  # noqa: PLC0415

    logits, target = torch.randn(20, 3, dtype=torch.float64), torch.randint(0, 3, (20,))
    losses = torch.nn.functional.cross_entropy(logits, target, reduction="none").numpy()
    expected = dro.cvar_doro(logits, target, eps=0.25, alpha=0.4)
    weights = weigh(losses, Trimmed(CVaR(0.4), 0.25))
    # DORO divides by what is left, 15 of 20.
    assert np.mean(weights * losses) * 20 / 15 == pytest.approx(float(expected), rel=64 * EPS)


# Duality: no distribution does better than the dual's value, so a small gap proves a worst case.


@pytest.fixture(params=[(2, 1.0), (17, 1e-3), (300, 1.0), (300, 1e4), (5000, 1.0)], ids=str)
def worst(request):
    """Losses and masses (which sum to one) of several sizes and scales, and the scale."""
    size, scale = request.param
    rng = np.random.default_rng(size)
    base = rng.uniform(0.1, 2.0, size=size)
    return scale * rng.exponential(size=size), base / base.sum(), scale


def lowest(function, low, high):
    """The least value of a convex function between two numbers."""
    from scipy import optimize  # noqa: PLC0415

    found = optimize.minimize_scalar(
        function,
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-10 * (high - low), "maxiter": 500},
    )
    return found.fun


def assert_gap_closed(primal, dual):
    assert -1e-8 * abs(dual) <= dual - primal <= 1e-8 * abs(dual)


def soft_maximum(losses, p, gamma):
    top = losses.max()
    return top + gamma * math.log(p @ np.exp((losses - top) / gamma))


def kl(p, weights):
    return p @ np.where(weights > 0, weights * np.log(np.where(weights > 0, weights, 1.0)), 0.0)


@pytest.mark.parametrize("strength", [0.1, 1.0, 30.0])
def test_the_kl_penalty_has_no_duality_gap(weigh, worst, strength):
    losses, p, scale = worst
    gamma = strength * scale
    w = weigh(losses, KL(math.inf, scale=1 / gamma, normalize=True), sample_weight=p)
    assert_gap_closed(p @ (w * losses) - gamma * kl(p, w), soft_maximum(losses, p, gamma))


@pytest.mark.parametrize("radius", [1e-15, 1e-12, 1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("size", [50, 300])
def test_the_formula_of_a_small_kl_ball_is_as_exact_in_float32_as_its_losses(radius, size):
    """Its divergence is a small difference, whose rounding errors must not decide the weights."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        # Far outliers make most logarithms of weights differences of larger numbers.
        losses = rng.exponential(size=size).astype(np.float32) ** 3
        with np.errstate(over="ignore"):  # of an exponent, whose weight is then 0; the fronts ignore it too
            actual = KLBall(radius).weights(Batch(losses))
            expected = KLBall(radius).weights(Batch(losses.astype(np.float64)))
        np.testing.assert_allclose(actual, expected, rtol=8 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("radius", [1e-3, 0.1, 0.5])
def test_the_kl_ball_has_no_duality_gap(weigh, worst, radius):
    pytest.importorskip("scipy")
    losses, p, scale = worst
    w = weigh(losses, KLBall(radius), sample_weight=p)
    assert kl(p, w) <= radius * (1 + 1e-9)

    def dual(log_gamma):
        gamma = scale * math.exp(log_gamma)
        return gamma * radius + soft_maximum(losses, p, gamma)

    # Two losses of unlike mass: the ball may hold the whole worst case, whose dual is at gamma = 0.
    assert_gap_closed(p @ (w * losses), min(lowest(dual, -12.0, 8.0), dual(-40.0)))


@pytest.mark.parametrize("strength", [0.1, 1.0, 30.0])
def test_the_chi_square_penalty_has_no_duality_gap(weigh, worst, strength):
    pytest.importorskip("scipy")
    losses, p, scale = worst
    gamma = strength * scale
    w = weigh(losses, ChiSquare(gamma), sample_weight=p)

    def dual(eta):
        # max over w >= 0 of w (l - eta - gamma) - gamma / 2 (w - 1)^2, where eta + gamma is the multiplier.
        return eta + gamma / 2 + p @ np.maximum(losses - eta, 0) ** 2 / (2 * gamma)

    primal = p @ (w * losses) - gamma / 2 * (p @ (w - 1) ** 2)
    assert_gap_closed(primal, lowest(dual, losses.min() - 2 * gamma, losses.max()))


@pytest.mark.parametrize("radius", [1e-3, 0.1, 0.5, 5.0])
def test_the_chi_square_ball_has_no_duality_gap(weigh, worst, radius):
    pytest.importorskip("scipy")
    losses, p, _ = worst
    w = weigh(losses, ChiSquareBall(radius), sample_weight=p)
    assert p @ (w - 1) ** 2 / 2 <= radius * (1 + 1e-9)

    def dual(eta):
        return eta + math.sqrt((1 + 2 * radius) * (p @ np.maximum(losses - eta, 0) ** 2))

    low = losses.min() - 2 * np.ptp(losses) / math.sqrt(2 * radius)
    assert_gap_closed(p @ (w * losses), min(lowest(dual, low, losses.max()), dual(losses.max())))


@pytest.mark.parametrize("alpha", [0.01, 0.3, 0.9])
def test_cvar_has_no_duality_gap(weigh, worst, alpha):
    losses, p, _ = worst
    w = weigh(losses, CVaR(alpha), sample_weight=p)
    assert (w <= 1 / alpha * (1 + 4 * EPS)).all()
    # Piecewise linear in eta: the least value is at a loss. The candidates near the quantile suffice.
    order = np.argsort(losses)
    edge = np.searchsorted(np.cumsum(p[order]), 1 - alpha)
    candidates = losses[order[max(edge - 2, 0) : edge + 3]]
    assert_gap_closed(
        p @ (w * losses), min(eta + p @ np.maximum(losses - eta, 0) / alpha for eta in candidates)
    )


@pytest.mark.parametrize("alpha", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("strength", [0.05, 1.0])
def test_smoothed_cvar_has_no_duality_gap(weigh, worst, alpha, strength):
    pytest.importorskip("scipy")
    losses, p, scale = worst
    nu = strength * scale
    w = weigh(losses, CVaR(alpha, smoothing=nu), sample_weight=p)
    assert (w <= 1 / alpha * (1 + 4 * EPS)).all()

    def dual(eta):
        # max over 0 <= w <= 1 / alpha of w (l - eta) - nu w log(w).
        exponent = np.minimum((losses - eta) / nu - 1, -math.log(alpha))
        best = np.exp(exponent)
        return eta + p @ (best * (losses - eta) - nu * best * exponent)

    low, high = losses.min() - nu + nu * math.log(alpha), losses.max()
    assert_gap_closed(p @ (w * losses) - nu * kl(p, w), lowest(dual, low, high))


# A negative scale.


@pytest.mark.parametrize("q", [0.1, 0.7, 1.0])
def test_a_negative_scale_is_the_gradient_of_generalized_cross_entropy(q):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(6)
    logits, target = rng.normal(scale=2.0, size=(12, 5)), rng.integers(0, 5, size=12)
    tensor = torch.tensor(logits, requires_grad=True)
    probability = torch.softmax(tensor, 1)[torch.arange(12), torch.tensor(target)]
    ((1 - probability**q) / q).mean().backward()
    gradient = reference.cross_entropy_grad(logits, target, weighting=KL(math.inf, scale=-q))
    # Torch's 1 - p cancels, hence the absolute part.
    np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=64 * EPS, atol=8 * EPS)


def test_a_scale_of_minus_one_weights_by_the_labels_probability(weigh):
    probabilities = np.array([0.9, 0.25, 1e-8, 1.0])
    # The logarithm's rounding moves the exponential by |log p| eps, below 19 eps.
    np.testing.assert_allclose(weigh(-np.log(probabilities), KL(scale=-1.0)), probabilities, rtol=20 * EPS)


@pytest.mark.parametrize("tilt", [-0.3, -2.0])
def test_a_negative_scale_normalised_is_the_gradient_of_terms_tilted_risk(weigh, tilt):
    torch = pytest.importorskip("torch")
    losses = np.random.default_rng(7).exponential(size=9)
    tensor = torch.tensor(losses, requires_grad=True)
    ((tilt * tensor).exp().mean().log() / tilt).backward()
    weights = weigh(losses, KL(scale=tilt, normalize=True))
    np.testing.assert_allclose(weights, 9 * tensor.grad.numpy(), rtol=64 * EPS)
