"""The mean and the statistics of the NumPy front; masks, base measures, groups and states."""

import itertools
import math

import numpy as np
import pytest
import rgd
import torch
from numpy_losses import DTYPES, WEIGHTINGS, WITH_KERNEL, assert_same_bits
from rgd import reference

WITHOUT_KERNEL = [
    rgd.MidrangeKL(1.0),
    rgd.ChiSquare(1.0),
    rgd.ChiSquareBall(0.3),
    rgd.CVaR(0.3),
    rgd.CVaR(0.3, smoothing=0.5),
    rgd.Focal(2.0),
    rgd.Threshold(1.0),
    rgd.Trimmed(rgd.KL(), 0.2),
]
STATEFUL = [rgd.MovingAverage(rgd.KL(), 0.9), rgd.GroupDRO(3, 0.1)]


# The mean and the statistics.


def test_the_mean_of_known_losses():
    assert rgd.reweighted_mean(np.array([0.0, 2.0]), tau=1.0) == pytest.approx(math.exp(0.5), rel=1e-15)
    assert rgd.reweighted_mean(np.array([1.0, 4.0]), rgd.KLBall(9.0)) == 4.0


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_the_mean_is_a_python_float_summed_in_float64(dtype):
    losses = np.full(200_000, 0.1, dtype)
    mean = rgd.reweighted_mean(losses, rgd.KL(scale=0.0))
    assert type(mean) is float
    assert mean == pytest.approx(float(losses[0]), rel=1e-12)


def test_the_mean_of_no_losses_is_nan():
    assert math.isnan(rgd.reweighted_mean(np.empty(0)))
    assert math.isnan(rgd.reweighted_mean(np.empty((3, 0), np.float32), rgd.KLBall(0.1)))


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_mean_of_a_loss_that_is_not_finite_is_not_finite(weighting, bad):
    assert not math.isfinite(rgd.reweighted_mean(np.array([1.0, bad, 2.0]), weighting))


def test_the_statistics_of_equal_weights():
    stats = rgd.weight_stats(np.array([1.0, 2.0, 6.0]), np.ones(3), rgd.KL(5.0))
    assert stats == rgd.WeightStats(
        mean_loss=3.0,
        worst_tenth=6.0,
        objective=3.0,
        effective_sample_size=3.0,
        kl_to_uniform=0.0,
        max_weight=1.0,
        clipped_share=1 / 3,
        count=3,
        mean_weight=1.0,
    )


def test_the_statistics_of_all_weight_on_one_sample():
    stats = rgd.weight_stats(np.array([1.0, 2.0, 6.0, 0.0]), np.array([0.0, 0.0, 4.0, 0.0]), rgd.KLBall(9.0))
    assert stats.effective_sample_size == 1.0
    assert stats.kl_to_uniform == pytest.approx(math.log(4), rel=2 * np.finfo(float).eps)
    assert (stats.objective, stats.max_weight, stats.clipped_share) == (6.0, 4.0, 0.0)


def test_the_divergence_of_a_balls_weights_is_its_radius():
    losses = np.random.default_rng(0).exponential(size=500)
    for radius in (0.01, 0.5, 2.0):
        stats = rgd.weight_stats(losses, rgd.sample_weights(losses, rgd.KLBall(radius)))
        # On top of the root's 1e-10, the sums' rounding: 500 eps of terms that sum to less than 5 * 500.
        assert stats.kl_to_uniform == pytest.approx(radius, rel=1e-10, abs=5 * 500 * np.finfo(float).eps)


def test_the_clipped_share_is_unknown_without_the_weighting_and_zero_where_nothing_is_clipped():
    losses = np.array([0.5, 1.0, 3.0, 4.0])
    weights = np.ones(4)
    assert rgd.weight_stats(losses, weights).clipped_share is None
    assert rgd.weight_stats(losses, weights, rgd.KL(1.0)).clipped_share == 0.5
    assert rgd.weight_stats(losses, weights, rgd.KL(math.inf, scale=1.0)).clipped_share == 0.0
    assert rgd.weight_stats(losses, weights, rgd.KLBall(0.1)).clipped_share == 0.0


def test_the_statistics_of_no_losses_are_nan():
    stats = rgd.weight_stats(np.empty(0), np.empty(0), rgd.KL())
    assert stats.count == 0
    for number in (stats.mean_loss, stats.objective, stats.effective_sample_size, stats.kl_to_uniform):
        assert math.isnan(number)
    assert math.isnan(stats.max_weight)
    assert math.isnan(stats.clipped_share)


def test_a_nan_loss_or_weight_shows_in_the_statistics():
    stats = rgd.weight_stats(np.array([1.0, math.nan]), np.array([1.0, math.nan]), rgd.KL())
    for number in (stats.mean_loss, stats.objective, stats.effective_sample_size, stats.kl_to_uniform):
        assert math.isnan(number)
    assert math.isnan(stats.max_weight)


@pytest.mark.parametrize(("losses", "weights"), list(itertools.product(["f8", "f4", "f2"], repeat=2)))
def test_losses_and_weights_may_differ_in_dtype(losses, weights):
    stats = rgd.weight_stats(np.array([1.0, 3.0], losses), np.array([0.5, 1.5], weights))
    assert (stats.mean_loss, stats.objective, stats.effective_sample_size) == (2.0, 2.5, 1.6)


def test_the_statistics_read_as_one_line():
    stats = rgd.weight_stats(np.array([1.0, 3.0]), np.array([1.0, 1.0]), rgd.KL(2.0))
    assert str(stats) == (
        "2 samples: mean loss 2, worst tenth 3, objective 2, ESS 2 (100.0%), KL 0, max weight 1, "
        "50.0% clipped"
    )
    assert "clipped" not in str(rgd.weight_stats(np.array([1.0, 3.0]), np.array([1.0, 1.0])))


# Masks, base measure, groups, state.

ALL = [*WITH_KERNEL, *WITHOUT_KERNEL, *STATEFUL]
MASK = np.arange(24) % 4 != 1
MASS = np.array([2, 0, 1, 3, 1, 0.5, 2, 4] * 3)
GROUPS = np.arange(24) % 3


def call(function, losses, weighting, **options):
    """The result, whether the weighting remembers or not."""
    if not weighting.stateful:
        return function(losses, weighting, **options)
    return function(
        losses, weighting, **{"state": weighting.init(), "groups": GROUPS[: losses.shape[0]], **options}
    )[0]


@pytest.mark.parametrize("weighting", ALL, ids=str)
@pytest.mark.parametrize(
    "options",
    [{"where": MASK}, {"sample_weight": MASS}, {"where": MASK, "sample_weight": MASS}],
    ids=["where", "sample_weight", "both"],
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16], ids=lambda dtype: dtype.__name__)
def test_weights_and_mean_with_mask_and_base_measure_are_those_of_the_reference(weighting, options, dtype):
    losses = np.random.default_rng(0).exponential(size=24).astype(dtype)
    wide = losses.astype(np.float64)
    weights = call(rgd.sample_weights, losses, weighting, **options)
    expected = call(reference.sample_weights, wide, weighting, **options)
    # 24 products in a sum of float64, of weights rounded to their own dtype; exponents of at most 10.
    rtol = 10 * 24 * np.finfo(float).eps + 2 * np.finfo(weights.dtype).eps
    largest = np.abs(expected).max()
    np.testing.assert_allclose(weights, expected, rtol=rtol, atol=rtol * largest)
    mean = call(rgd.reweighted_mean, losses, weighting, **options)
    base = np.where(options.get("where", True), options.get("sample_weight", 1.0), 0.0)
    assert type(mean) is float
    objective = math.fsum(base * expected * wide) / math.fsum(np.broadcast_to(base, 24))
    assert mean == pytest.approx(objective, rel=rtol * largest / min(largest, 1))


@pytest.mark.parametrize("weighting", ALL, ids=str)
def test_what_is_masked_out_or_of_mass_zero_weighs_zero_and_is_not_looked_at(weighting):
    losses = np.random.default_rng(0).exponential(size=24)
    hidden = np.where(MASK, losses, [math.nan, math.inf, -math.inf, 1e300] * 6)
    clean = call(rgd.sample_weights, losses, weighting, where=MASK)
    for options in (
        {"where": MASK},
        {"sample_weight": MASK.astype(int)},
        {"sample_weight": MASK.astype(np.float32)},
    ):
        weights = call(rgd.sample_weights, hidden, weighting, **options)
        np.testing.assert_array_equal(weights, clean)
        np.testing.assert_array_equal(weights[~MASK], 0.0)
        mean = call(rgd.reweighted_mean, hidden, weighting, **options)
        assert mean == call(rgd.reweighted_mean, losses, weighting, where=MASK)


@pytest.mark.parametrize("weighting", ALL, ids=str)
def test_a_batch_in_which_nothing_takes_part_weighs_zero_and_has_no_mean(weighting):
    losses = np.random.default_rng(0).exponential(size=24)
    for options in ({"where": np.zeros(24, bool)}, {"sample_weight": np.zeros(24)}):
        np.testing.assert_array_equal(call(rgd.sample_weights, losses, weighting, **options), np.zeros(24))
        assert math.isnan(call(rgd.reweighted_mean, losses, weighting, **options))
    assert call(rgd.sample_weights, losses[:0], weighting).shape == (0,)
    assert math.isnan(call(rgd.reweighted_mean, losses[:0], weighting))


@pytest.mark.parametrize(
    "weighting", [*WITHOUT_KERNEL, rgd.KLBall(0.1), rgd.KL(), rgd.GroupDRO(3, 0.1)], ids=str
)
def test_one_number_a_sample_counts_for_all_its_losses(weighting):
    losses = np.random.default_rng(0).exponential(size=(8, 3))
    mass, groups = MASS[:8], GROUPS[:8]

    def full(row):
        return np.repeat(row, 3).reshape(8, 3)

    groups_by_loss = {"groups": full(groups)} if weighting.stateful else {}
    weights = call(rgd.sample_weights, losses, weighting, sample_weight=mass)
    assert weights.shape == (8, 3)
    expected = call(rgd.sample_weights, losses, weighting, sample_weight=full(mass), **groups_by_loss)
    assert_same_bits(weights, expected)


@pytest.mark.parametrize("kind", ["int64", "uint8", "float16", "float32", "list", "torch"])
def test_a_base_measure_may_be_numbers_of_any_kind(kind):
    losses, mass = np.array([0.5, 1.0, 3.0]), [2, 0, 1]
    if kind == "torch":
        given_mass = pytest.importorskip("torch").tensor(mass)
    else:
        given_mass = mass if kind == "list" else np.array(mass, kind)
    weights = rgd.sample_weights(losses, rgd.CVaR(0.5), sample_weight=given_mass)
    np.testing.assert_allclose(weights, [0.5, 0.0, 2.0], rtol=4 * np.finfo(float).eps)


@pytest.mark.parametrize("weighting", STATEFUL, ids=str)
def test_a_weighting_that_remembers_returns_its_state_and_is_followed_over_batches(weighting):
    rng = np.random.default_rng(0)
    state = expected_state = weighting.init()
    for _ in range(4):
        losses = rng.exponential(size=24)
        mean, _ = rgd.reweighted_mean(losses, weighting, groups=GROUPS, state=state)
        weights, state = rgd.sample_weights(losses, weighting, groups=GROUPS, state=state)
        expected, expected_state = reference.sample_weights(
            losses, weighting, groups=GROUPS, state=expected_state
        )
        np.testing.assert_allclose(weights, expected, rtol=1e-13)
        assert mean == pytest.approx(float(np.mean(expected * losses)), rel=1e-13)
        for name in state:
            np.testing.assert_allclose(state[name], expected_state[name], rtol=1e-13)


@pytest.mark.parametrize("weighting", STATEFUL, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None], ids=str)
def test_a_batch_that_is_empty_or_not_finite_leaves_the_state_as_it_was(weighting, bad):
    losses = np.random.default_rng(0).exponential(size=24)
    _, state = rgd.sample_weights(losses, weighting, groups=GROUPS, state=weighting.init())
    if bad is None:
        options = [{"where": np.zeros(24, bool)}, {"sample_weight": np.zeros(24)}]
    else:
        losses[7] = bad
        options = [{}, {"where": MASK}]
    for option in options:
        _, after = rgd.sample_weights(losses, weighting, groups=GROUPS, state=state, **option)
        assert after.keys() == state.keys()
        for name in state:
            np.testing.assert_array_equal(after[name], state[name])
    _, after = rgd.sample_weights(losses[:0], weighting, groups=GROUPS[:0], state=state)
    for name in state:
        np.testing.assert_array_equal(after[name], state[name])


def test_a_state_given_is_not_written_to():
    weighting = rgd.GroupDRO(3, 0.1)
    state = weighting.init()
    rgd.sample_weights(np.arange(24.0), weighting, groups=GROUPS, state=state)
    np.testing.assert_array_equal(state["shares"], np.full(3, 1 / 3))


def test_the_statistics_of_masks_and_base_measures_are_sums_of_the_definition():
    rng = np.random.default_rng(0)
    losses, weights = rng.exponential(size=24), rng.random(24)
    stats = rgd.weight_stats(losses, weights, rgd.KL(1.0), where=MASK, sample_weight=MASS, groups=GROUPS)
    p = np.where(MASK, MASS, 0.0)
    q = p * weights / np.sum(p * weights)
    taken = p > 0
    close = {"rtol": 24 * np.finfo(float).eps}
    assert stats.count == np.count_nonzero(taken)
    np.testing.assert_allclose(stats.mean_loss, np.sum(p * losses) / p.sum(), **close)
    np.testing.assert_allclose(stats.objective, np.sum(p * weights * losses) / p.sum(), **close)
    square = np.sum(p * weights) ** 2 / (p.sum() * np.sum(p * weights**2))
    np.testing.assert_allclose(stats.effective_sample_size, stats.count * square, **close)
    divergence = np.sum(q[taken] * np.log(q[taken] / (p[taken] / p.sum())))
    np.testing.assert_allclose(stats.kl_to_uniform, divergence, rtol=1e-13)
    assert stats.max_weight == weights[taken].max()
    np.testing.assert_allclose(stats.clipped_share, p[losses > 1.0].sum() / p.sum(), **close)
    for g in range(3):
        member = g == GROUPS
        mean = np.sum(p[member] * losses[member]) / p[member].sum()
        np.testing.assert_allclose(stats.groups.mean_loss[g], mean, **close)
        np.testing.assert_allclose(stats.groups.weight_share[g], q[member].sum(), **close)
        assert stats.groups.count[g] == np.count_nonzero(member & taken)


def test_an_absent_group_has_no_mean_loss_and_no_share():
    stats = rgd.weight_stats(np.ones(3), np.ones(3), groups=np.array([0, 2, 2]))
    assert math.isnan(stats.groups.mean_loss[1])
    assert stats.groups.weight_share == pytest.approx((1 / 3, 0, 2 / 3))
    assert stats.groups.count == (1, 0, 2)
    assert rgd.weight_stats(np.ones(3), np.ones(3)).groups is None


@pytest.mark.parametrize("far", [10**12, 2**62, 1_000_000])
def test_groups_of_any_number_take_no_more_room_than_they_are(far):
    losses, weights = np.array([1.0, 3.0, 5.0, 7.0]), np.array([1.0, 2.0, 3.0, 4.0])
    groups = np.array([far, 3, far, 3])
    stats = rgd.weight_stats(losses, weights, groups=groups)
    assert stats.groups == reference.weight_stats(losses, weights, groups=groups).groups
    assert stats.groups == rgd.GroupStats((5.0, 3.0), (0.6, 0.4), (2, 2), numbers=(3, far))
    assert stats.to_dict()[f"group_{far}/mean_loss"] == 3.0
    near = rgd.weight_stats(losses, weights, groups=np.array([1, 3, 1, 3])).groups
    assert (near.numbers, len(near.count)) == (None, 4)
    in_torch = rgd.torch.weight_stats(
        *(torch.tensor(array) for array in (losses, weights)), groups=torch.tensor(groups)
    )
    assert in_torch.groups == stats.groups


@pytest.mark.parametrize("size", [3, 20, 57])
def test_a_sample_is_in_the_worst_tenth_as_often_as_its_weight_says(size):
    rng = np.random.default_rng(size)
    losses, mass = rng.permutation(np.linspace(0.0, 4.0, size)), rng.integers(0, 5, size).astype(float)
    mass[0] = 2.0
    found = rgd.weight_stats(losses, np.ones(size), sample_weight=mass).worst_tenth
    repeated = np.repeat(losses, mass.astype(int))
    expected = rgd.weight_stats(repeated, np.ones(repeated.size)).worst_tenth
    assert found == pytest.approx(expected, rel=2 * repeated.size * np.finfo(np.float64).eps, abs=0)
