"""Every member of the family: against the oracle and 50 digits, and what all of them must do."""

import math

import exact
import numpy as np
import pytest
import rgd
from family import BATCH_DEPENDENT, EPS, MEMBERS, NORMALISED, POINTWISE, formula, front, label, members, same
from hypothesis import given, settings
from hypothesis import strategies as st
from rgd import (
    ERM,
    KL,
    ChiSquare,
    ChiSquareBall,
    CVaR,
    Focal,
    GroupDRO,
    KLBall,
    MidrangeKL,
    MovingAverage,
    Pointwise,
    Trimmed,
    reference,
)


@pytest.fixture(params=[front, formula, reference.sample_weights], ids=["front", "formula", "reference"])
def weigh(request):
    return request.param


# The oracle.


@pytest.mark.parametrize("size", [1, 2, 7, 200, 3000])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@members(MEMBERS)
def test_front_and_formula_give_the_references_weights(weighting, scale, size):
    rng = np.random.default_rng(size)
    losses = scale * rng.exponential(size=size)
    mass = rng.uniform(0.2, 3.0, size=size)
    for base in (None, mass):
        expected = reference.sample_weights(losses, weighting, sample_weight=base)
        same(front(losses, weighting, sample_weight=base), expected, losses, weighting)
        same(formula(losses, weighting, sample_weight=base), expected, losses, weighting)


def test_a_function_of_the_loss_is_its_own_weight(weigh):
    losses = np.array([0.0, 1.0, 3.0])
    weights = weigh(losses, Pointwise(lambda losses: 1 / (1 + losses)))
    np.testing.assert_array_equal(weights, [1.0, 0.5, 0.25])


def test_the_reference_asks_for_the_equation_of_a_weighting_it_does_not_know():
    class Unknown(rgd.Weighting):
        pass

    with pytest.raises(TypeError, match=r"no equation of Unknown: register one"):
        reference.sample_weights([1.0], Unknown())


# 50 digits.


@members(MEMBERS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_weights_agree_with_50_digits(weighting, data):
    losses = data.draw(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=8), label="losses")
    masses = st.lists(st.integers(1, 5), min_size=len(losses), max_size=len(losses))
    base = data.draw(st.none() | masses, label="sample_weight")
    expected, slack = exact.weights(losses, weighting, base)
    # An exponent x, rounded, moves exp(x) by |x| units in the last place; the scales here are at most 2.
    rounding = [(2 * 40 + len(losses) + 8) * EPS * value + math.ulp(0.0) for value in expected]
    for weigh in (front, formula, reference.sample_weights):
        got = weigh(losses, weighting, sample_weight=base)
        for value, target, unit, allowance in zip(got, expected, rounding, slack, strict=True):
            assert abs(value - target) <= unit + allowance, weigh


# What every member must do.


@members([weighting for weighting in MEMBERS if weighting.mean_one])
def test_weights_that_say_so_average_to_one(weigh, weighting):
    rng = np.random.default_rng(3)
    for size in (1, 2, 9, 500):
        losses, base = rng.normal(scale=3.0, size=size), rng.uniform(0.1, 4.0, size=size)
        assert np.mean(weigh(losses, weighting)) == pytest.approx(1.0, abs=(size + 16) * EPS)
        mean = np.sum(base * weigh(losses, weighting, sample_weight=base)) / np.sum(base)
        assert mean == pytest.approx(1.0, abs=(size + 16) * EPS)


@members(MEMBERS)
def test_equal_losses_have_equal_weights(weigh, weighting):
    losses = np.array([2.0, 0.5, 3.0, 0.5, 2.0, 2.0, 3.0, 0.1])
    weights = weigh(losses, weighting)
    for loss in np.unique(losses):
        assert np.ptp(weights[losses == loss]) == 0


@members(MEMBERS)
def test_the_order_of_a_batch_does_not_matter(weigh, weighting):
    rng = np.random.default_rng(4)
    losses, order = rng.exponential(size=30), rng.permutation(30)
    same(weigh(losses[order], weighting), weigh(losses, weighting)[order], losses, weighting)


@members(MEMBERS)
def test_what_is_masked_or_has_no_mass_is_as_if_it_were_not_there(weigh, weighting):
    losses = np.array([0.3, math.nan, 5.0, math.inf, 1.0, -math.inf, 0.1, 2.0])
    taken = np.isfinite(losses)
    expected = weigh(losses[taken], weighting)
    for options in ({"where": taken}, {"sample_weight": taken.astype(float)}):
        weights = weigh(losses, weighting, **options)
        np.testing.assert_array_equal(weights[~taken], 0.0)
        same(weights[taken], expected, losses[taken], weighting)
        for mean in (rgd.reweighted_mean, reference.reweighted_mean):
            value = mean(losses, weighting=weighting, **options)
            assert value == pytest.approx(np.mean(expected * losses[taken]), rel=1e-9)


@members(MEMBERS)
def test_an_integer_mass_is_as_a_sample_repeated(weigh, weighting):
    losses, times = np.array([0.3, 4.0, 1.0, 2.0, 0.1]), np.array([3, 1, 2, 1, 4])
    repeated = np.repeat(losses, times)
    weights = weigh(losses, weighting, sample_weight=times)
    same(np.repeat(weights, times), weigh(repeated, weighting), repeated, weighting)
    options = {"weighting": weighting, "sample_weight": times}
    for mean in (rgd.reweighted_mean, reference.reweighted_mean):
        assert mean(losses, **options) == pytest.approx(mean(repeated, weighting), rel=1e-9)


@members(MEMBERS)
def test_a_common_factor_of_all_masses_does_not_matter(weigh, weighting):
    losses, base = np.array([0.3, 4.0, 1.0, 2.0, 0.1]), np.array([0.5, 1.0, 2.0, 1.0, 0.25])
    # A power of two changes no rounding.
    expected = weigh(losses, weighting, sample_weight=base)
    np.testing.assert_array_equal(weigh(losses, weighting, sample_weight=1024 * base), expected)


@members(NORMALISED)
@pytest.mark.parametrize("size", [1, 2, 9])
def test_equal_losses_weigh_one_where_the_mean_is_one(weigh, weighting, size):
    for loss in (0.0, -3.0, 1e300):
        weights = weigh(np.full(size, loss), weighting)
        np.testing.assert_allclose(weights, np.ones(size), rtol=0, atol=(size + 8) * EPS)


@members([*BATCH_DEPENDENT, KLBall(0.0), ChiSquareBall(0.0), MidrangeKL(0.0), KL(scale=0.0, normalize=True)])
def test_a_nan_loss_makes_all_weights_nan_that_depend_on_the_batch(weigh, weighting):
    assert np.isnan(weigh([1.0, math.nan, 2.0, 0.5], weighting)).all()
    assert np.isnan(weigh([math.nan], weighting)).all()


@members(POINTWISE)
def test_a_nan_loss_makes_only_its_own_pointwise_weight_nan(weigh, weighting):
    weights = weigh([1.0, math.nan, 2.0], weighting)
    np.testing.assert_array_equal(np.isnan(weights), [False, True, False])


RISING = [
    KL(math.inf, scale=1.5, normalize=True),
    KLBall(0.1),
    KLBall(50.0),
    ChiSquare(1.0),
    ChiSquareBall(0.1),
    ChiSquareBall(50.0),
    MidrangeKL(1.0),
    MidrangeKL(1.0, relative=True),
    Trimmed(KLBall(0.1), 0.0),
]
"""Members that send weight to the largest losses without a bound."""
FALLING = [
    KL(scale=-1.0, normalize=True),
    MidrangeKL(-1.0),
    MidrangeKL(-1.0, relative=True),
    Trimmed(MidrangeKL(-1.0), 0.0),
]
"""Members that send weight away from the largest losses."""


@members(RISING)
def test_infinite_losses_share_all_the_weight_where_weight_goes_to_the_largest(weigh, weighting):
    np.testing.assert_allclose(weigh([1.0, math.inf, 2.0, 0.5], weighting), [0, 4, 0, 0], rtol=8 * EPS)
    losses, base = [math.inf, 2.0, -math.inf, math.inf, 0.5], [1.0, 3.0, 2.0, 4.0, 1.0]
    expected = [11 / 5, 0, 0, 11 / 5, 0]
    np.testing.assert_allclose(weigh(losses, weighting, sample_weight=base), expected, rtol=16 * EPS)


@members(FALLING)
def test_minus_infinite_losses_share_all_the_weight_where_weight_goes_to_the_smallest(weigh, weighting):
    np.testing.assert_allclose(weigh([1.0, -math.inf, 2.0, 0.5], weighting), [0, 4, 0, 0], rtol=8 * EPS)


@members([*RISING, *FALLING])
@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
def test_an_infinite_loss_weighs_nothing_where_weight_is_sent_away_from_it(weigh, weighting, infinity):
    if (weighting in RISING) == (infinity > 0):
        pytest.skip("all weight goes there")
    losses, base = np.array([1.0, infinity, 2.0, 0.5]), np.array([1.0, 2.0, 3.0, 4.0])
    for mass in (None, base):
        weights = weigh(losses, weighting, sample_weight=mass)
        assert weights[1] == 0.0
        assert np.average(weights, weights=mass) == pytest.approx(1.0, rel=16 * EPS)


@members([KLBall(0.6), ChiSquareBall(0.6)])
def test_losses_of_minus_infinity_take_their_part_of_the_radius_of_a_ball(weigh, weighting):
    losses, base = np.array([1.0, -math.inf, 2.0, 0.5]), np.array([1.0, 2.0, 3.0, 4.0])
    for mass in (np.ones(4), base):
        weights = weigh(losses, weighting, sample_weight=mass)
        if isinstance(weighting, KLBall):
            terms = weights * np.log(np.where(weights > 0, weights, 1.0))
        else:
            terms = (weights - 1) ** 2 / 2
        assert np.average(terms, weights=mass) == pytest.approx(0.6, rel=64 * EPS)
    # A radius that is too small for that: the others are all alike.
    small = type(weighting)(0.01)
    np.testing.assert_allclose(weigh(losses, small), [4 / 3, 0, 4 / 3, 4 / 3], rtol=8 * EPS)


SOFT = np.exp([0.25, 0.5, 0.0])


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        (ERM(), [1.0, 1.0, 1.0, 1.0]),
        (KL(2.0, scale=0.5), [math.exp(0.5), math.e, math.e, 1.0]),
        (KL(scale=-1.0), [math.exp(-1.0), 0.0, math.exp(-2.0), 1.0]),
        (
            KL(scale=-1.0, normalize=True),
            np.exp([-1.0, -math.inf, -2.0, 0.0]) / np.mean(np.exp([-1, -np.inf, -2, 0])),
        ),
        (KL(scale=0.0, normalize=True), [1.0, 1.0, 1.0, 1.0]),
        (KLBall(0.0), [1.0, 1.0, 1.0, 1.0]),
        (ChiSquareBall(0.0), [1.0, 1.0, 1.0, 1.0]),
        (CVaR(0.5), [0.0, 2.0, 2.0, 0.0]),
        (CVaR(0.25), [0.0, 4.0, 0.0, 0.0]),
        (CVaR(0.25, smoothing=0.3), [0.0, 4.0, 0.0, 0.0]),
        (CVaR(0.1, smoothing=0.3), [0.0, 4.0, 0.0, 0.0]),
        # What the infinite loss leaves, 2 of 4, is shared by the others as exp(l / 4).
        (CVaR(0.5, smoothing=4.0), np.insert(2 * SOFT / SOFT.sum(), 1, 2.0)),
        (MidrangeKL(0.0), [1.0, 1.0, 1.0, 1.0]),
        # The middle of the batch is infinite, and clips no finite loss.
        (MidrangeKL(-0.25), np.insert(4 / SOFT / np.sum(1 / SOFT), 1, 0.0)),
        (MidrangeKL(-1.0, relative=True), [4 / 3, 0.0, 4 / 3, 4 / 3]),
        (Focal(2.0), [(1 - math.exp(-1)) ** 2, 1.0, (1 - math.exp(-2)) ** 2, 0.0]),
        (Trimmed(ERM(), 0.25), [1.0, 0.0, 1.0, 1.0]),
        (Trimmed(KL(math.inf, scale=1.0), 0.25), [math.e, 0.0, math.exp(2.0), 1.0]),
        (Trimmed(KLBall(50.0), 0.25), [0.0, 0.0, 3.0, 0.0]),
    ],
    ids=label,
)
def test_an_infinite_loss_counts_by_its_rank_its_clip_or_its_bound(weigh, weighting, expected):
    weights = weigh([1.0, math.inf, 2.0, 0.0], weighting)
    np.testing.assert_allclose(weights, expected, rtol=8 * EPS)


@members([*RISING, *FALLING, CVaR(0.5, smoothing=0.3)])
@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
def test_losses_that_are_all_infinite_weigh_one(weigh, weighting, infinity):
    np.testing.assert_allclose(weigh([infinity, infinity], weighting), [1.0, 1.0], rtol=4 * EPS)


OUTLIERS = [
    *RISING[:-1],
    *FALLING[:-1],
    KL(1.0, normalize=True),
    CVaR(0.5, smoothing=0.3),
    Trimmed(MidrangeKL(-1.0), 0.1),
]


@members(OUTLIERS)
@pytest.mark.parametrize("outlier", [1e6, 1e9, 1e12, 1e16])
def test_a_far_outlier_leaves_the_losses_that_count_their_differences(weigh, weighting, outlier):
    for losses in ([outlier, 0.3, 0.1], [-outlier, 0.3, 0.1], [outlier, -outlier, 0.3, 0.1, 0.1]):
        expected, slack = exact.weights(losses, weighting)
        # Exponents are differences of losses that count, at most 1 here, whatever the outlier.
        slack = [0.0] * len(losses) if isinstance(weighting, MidrangeKL) else slack
        for value, target, allowance in zip(weigh(losses, weighting), expected, slack, strict=True):
            assert abs(value - target) <= 32 * EPS * len(losses) + allowance, losses


@members([weighting for weighting in OUTLIERS if not isinstance(weighting, Trimmed)])
def test_the_largest_finite_losses_have_finite_weights(weigh, weighting):
    for losses in ([1e307, 0.3, 0.1], [-1e307, 0.3, 0.1], [1e308, -1e308, 1e308]):
        assert np.mean(weigh(losses, weighting)) == pytest.approx(1.0, rel=8 * EPS), losses


@members([KL(scale=-1.0), KL(scale=-1.0, normalize=True), Trimmed(ERM(), 0.25), Trimmed(CVaR(0.5), 0.25)])
def test_an_infinite_loss_of_weight_zero_does_not_reach_the_mean(weighting):
    losses = np.array([1.0, math.inf, 2.0, 0.0])
    weights = reference.sample_weights(losses, weighting)
    expected = np.sum(np.where(weights == 0, 0.0, weights * np.where(weights == 0, 0.0, losses))) / 4
    for mean in (rgd.reweighted_mean, reference.reweighted_mean):
        assert mean(losses, weighting) == pytest.approx(expected, rel=16 * EPS)


@members([*MEMBERS, Pointwise(np.exp)])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)], ids=str)
def test_no_losses_have_no_weights(weighting, shape):
    for function in (front, reference.sample_weights):
        assert function(np.empty(shape), weighting).shape == shape


@members(MEMBERS)
def test_where_nothing_takes_part_all_weights_are_zero_and_the_mean_is_nan(weighting):
    options = {"weighting": weighting, "where": np.zeros(3, bool)}
    for function in (rgd.sample_weights, reference.sample_weights):
        np.testing.assert_array_equal(function(np.array([1.0, math.nan, math.inf]), **options), np.zeros(3))
    for mean in (rgd.reweighted_mean, reference.reweighted_mean):
        assert math.isnan(mean(np.ones(3), **options))


MILLION = 1_000_000


@pytest.fixture(scope="module")
def million():
    return np.random.default_rng(5).exponential(size=MILLION)


@pytest.mark.parametrize("percent", [7, 14, 28, 29, 55, 56, 57, 58])
@pytest.mark.parametrize("weigh", [front, formula])
def test_a_share_that_is_whole_but_for_rounding_cuts_no_sample(weigh, percent):
    # 100 * 0.07 is 7.000000000000001, and 100 * 0.29 is 28.999999999999996.
    losses, alpha = np.random.default_rng(6).permutation(np.arange(100.0)), percent / 100
    for base in (None, np.full(100, 3.0)):
        weights = weigh(losses, CVaR(alpha), sample_weight=base)
        np.testing.assert_array_equal(weights[losses < 100 - percent], 0.0)
        np.testing.assert_array_equal(weights[losses >= 100 - percent], 1 / alpha)
        kept = weigh(losses, Trimmed(ERM(), alpha), sample_weight=base)
        np.testing.assert_array_equal(kept, np.where(losses < 100 - percent, 1.0, 0.0))


@members(
    [
        KL(1.0),
        KL(math.inf, scale=0.5, normalize=True),
        MidrangeKL(0.5),
        KLBall(0.1),
        ChiSquare(3.0),
        ChiSquareBall(0.1),
        CVaR(0.01),
        CVaR(0.01, smoothing=0.1),
        Focal(2.0),
        Trimmed(CVaR(0.01), 0.001),
    ]
)
def test_a_million_losses(million, weighting):
    weights = front(million, weighting)
    if weighting.mean_one:
        # Sums in pairs or blocks lose far less than one eps a loss; the root is found to as much.
        assert math.fsum(weights) / MILLION == pytest.approx(1.0, abs=1000 * EPS)
    if isinstance(weighting, KLBall):
        divergence = np.mean(weights * np.log(weights))
        assert divergence == pytest.approx(weighting.radius, rel=exact.BALL_TOLERANCE)
    else:
        expected = reference.sample_weights(million, weighting)
        np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-11 * expected.max())


@pytest.mark.parametrize("base", [[1.0, -1.0], [1.0, math.nan], [math.inf, 1.0]], ids=str)
def test_a_mass_that_is_negative_nan_or_infinite_is_refused(base):
    for function in (
        rgd.sample_weights,
        rgd.reweighted_mean,
        reference.sample_weights,
        reference.reweighted_mean,
    ):
        with pytest.raises(ValueError, match="sample_weight"):
            function(np.ones(2), KL(), sample_weight=np.array(base))


def test_a_mass_of_another_shape_is_refused():
    for function in (rgd.sample_weights, reference.sample_weights):
        with pytest.raises(ValueError, match="sample_weight"):
            function(np.ones((3, 2)), KL(), sample_weight=np.ones(2))


def test_one_mass_a_sample_holds_for_all_its_losses():
    losses, base = np.arange(6.0).reshape(3, 2), np.array([1.0, 0.0, 2.5])
    for function in (rgd.sample_weights, reference.sample_weights):
        expected = function(losses, KLBall(0.2), sample_weight=np.repeat(base, 2).reshape(3, 2))
        np.testing.assert_array_equal(function(losses, KLBall(0.2), sample_weight=base), expected)


# The members that remember.


@pytest.fixture(params=[rgd.sample_weights, reference.sample_weights], ids=["front", "reference"])
def remember(request):
    return request.param


STATEFUL = [MovingAverage(KL(), 0.9), Trimmed(MovingAverage(KL(), 0.9), 0.25), GroupDRO(3, 0.5)]
GROUPS = np.array([0, 2, 2, 0])


@pytest.mark.parametrize("base", [None, np.array([1.0, 2.0, 0.5, 0.0])], ids=["ones", "masses"])
def test_a_moving_average_divides_by_the_running_mean_of_the_weights(remember, base):
    weighting, state = MovingAverage(KL(2.0), 0.75), MovingAverage(KL(2.0), 0.75).init()
    running = None
    for losses in np.random.default_rng(8).exponential(size=(4, 4)):
        plain = np.exp(np.minimum(losses, 2.0) / 3)
        mean = np.average(plain, weights=base)
        running = mean if running is None else 0.75 * running + 0.25 * mean
        weights, state = remember(losses, weighting, sample_weight=base, state=state)
        expected = plain / running * (1 if base is None else base > 0)
        np.testing.assert_allclose(weights, expected, rtol=32 * EPS)
        assert float(state["log_mean"]) == pytest.approx(math.log(running), abs=32 * EPS)
    assert int(state["updates"]) == 4


def test_a_moving_average_of_weights_beyond_floating_point_stays_finite(remember):
    weighting = MovingAverage(KL(math.inf, scale=1.0), 0.5)
    weights, state = remember(np.array([5000.0, 5001.0]), weighting, state=weighting.init())
    np.testing.assert_allclose(weights, 2 / (1 + np.exp([1.0, -1.0])), rtol=5000 * 4 * EPS)
    weights, _ = remember(np.array([5001.0, 5001.0]), weighting, state=state)
    mean = 0.5 * (1 + math.exp(-1)) / 2 + 0.5
    np.testing.assert_allclose(weights, np.full(2, 1 / mean), rtol=5000 * 8 * EPS)


@pytest.mark.parametrize("base", [None, np.array([1.0, 2.0, 0.5, 1.0])], ids=["ones", "masses"])
def test_group_dro_moves_its_shares_towards_the_worst_group(remember, base):
    weighting, shares = GroupDRO(4, 0.5), np.full(4, 0.25)
    state, mass = weighting.init(), np.ones(4) if base is None else base
    for losses in np.random.default_rng(9).exponential(size=(3, 4)):
        # Groups 1 and 3 are absent, and count as losses of 0.
        for group in (0, 2):
            members = group == GROUPS
            shares[group] *= math.exp(0.5 * np.average(losses[members], weights=mass[members]))
        shares /= shares.sum()
        weights, state = remember(losses, weighting, sample_weight=base, groups=GROUPS, state=state)
        np.testing.assert_allclose(state["shares"], shares, rtol=32 * EPS)
        sizes = np.array([mass[group == GROUPS].sum() for group in GROUPS])
        np.testing.assert_allclose(weights, mass.sum() * shares[GROUPS] / sizes, rtol=32 * EPS)


@members(STATEFUL)
@pytest.mark.parametrize(
    ("losses", "where"),
    [
        ([1.0, math.nan, 2.0, 0.5], None),
        ([1.0, math.inf, 2.0, 0.5], None),
        ([1.0, 2.0, 3.0, 4.0], np.zeros(4, bool)),
        ([], None),
    ],
    ids=["nan", "infinite", "masked", "empty"],
)
def test_a_batch_that_is_empty_or_not_finite_leaves_the_state_as_it_was(remember, weighting, losses, where):
    _, state = remember(np.array([1.0, 3.0, 0.2, 0.7]), weighting, groups=GROUPS, state=weighting.init())
    groups = GROUPS[: len(losses)]
    weights, after = remember(np.array(losses), weighting, where=where, groups=groups, state=state)
    assert weights.shape == (len(losses),)
    assert after.keys() == state.keys()
    for name in state:
        np.testing.assert_array_equal(after[name], state[name])


@members(STATEFUL)
def test_a_masked_loss_reaches_neither_weights_nor_state(remember, weighting):
    losses, taken = np.array([1.0, math.nan, 0.2, 0.7]), np.array([True, False, True, True])
    weights, after = remember(losses, weighting, where=taken, groups=GROUPS, state=weighting.init())
    expected, state = remember(losses[taken], weighting, groups=GROUPS[taken], state=weighting.init())
    np.testing.assert_array_equal(weights[~taken], 0.0)
    np.testing.assert_allclose(weights[taken], expected, rtol=8 * EPS)
    for name in state:
        np.testing.assert_allclose(after[name], state[name], rtol=8 * EPS, atol=8 * EPS)


@members(STATEFUL)
def test_a_weighting_that_remembers_is_refused_without_its_state(remember, weighting):
    with pytest.raises(ValueError, match=r"init\(\)"):
        remember(np.ones(4), weighting, groups=GROUPS)


def test_group_dro_is_refused_without_groups_or_with_one_out_of_range(remember):
    weighting = GroupDRO(3, 0.5)
    with pytest.raises(ValueError, match="groups"):
        remember(np.ones(4), weighting, state=weighting.init())
    with pytest.raises(ValueError, match="groups"):
        remember(np.ones(4), weighting, groups=np.array([0, 1, 2, 3]), state=weighting.init())
