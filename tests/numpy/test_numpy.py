"""The weights of the NumPy front and the kernels below it, against mpmath, the reference, and themselves."""

import math

import exact
import numpy as np
import pytest
import rgd
from hypothesis import given
from hypothesis import strategies as st
from numpy_losses import (
    BATCH,
    DECREASING,
    DECREASING_BATCH,
    DTYPES,
    POINTWISE,
    WEIGHTINGS,
    WITH_KERNEL,
    assert_same_bits,
    weigh,
)
from rgd import _rgd, reference
from rgd.stats import WeightSums

LOSSES = {
    "ordinary": lambda rng: rng.exponential(size=37),
    "negative": lambda rng: -50 * rng.random(37),
    "of both signs": lambda rng: 30 * rng.normal(size=37),
    "tiny": lambda rng: 1e-30 * rng.random(37),
    "huge": lambda rng: 1e4 + 100 * rng.random(37),
    "one far above": lambda rng: np.append(rng.random(36), 80.0),
    "600 apart": lambda rng: -600 * rng.random(37),
    "neighbours": lambda rng: 1 + np.arange(37) * np.finfo(np.float32).eps,
    "zeros": lambda rng: np.zeros(37),
    "one": lambda rng: np.array([2.5]),
    "two": lambda rng: np.array([0.1, 2.5]),
    "ties at the top": lambda rng: np.repeat([0.5, 4.0, 1.0], [9, 3, 7]),
}


# Known values, and exact ones.


def test_weights_of_known_losses():
    weights = rgd.sample_weights(np.array([0.0, 0.5, 1.0, 7.0, -1.0]), tau=1.0)
    expected = [1.0, math.exp(0.25), math.exp(0.5), math.exp(0.5), math.exp(-0.5)]
    np.testing.assert_allclose(weights, expected, rtol=exact.ULPS * np.finfo(float).eps)


def test_without_settings_tau_is_one():
    losses = np.linspace(0, 3, 11)
    assert_same_bits(rgd.sample_weights(losses), rgd.sample_weights(losses, rgd.KL(tau=1.0)))
    assert_same_bits(rgd.sample_weights(losses, tau=0.3), rgd.sample_weights(losses, rgd.KL(tau=0.3)))


@pytest.mark.parametrize(
    ("short", "weighting"),
    [
        ({"scale": -0.7}, rgd.KL(scale=-0.7)),
        ({"scale": 0.7}, rgd.KL(tau=1.0, scale=0.7)),
        ({"tau": 2.0, "scale": -0.7}, rgd.KL(2.0, scale=-0.7)),
    ],
)
def test_tau_and_scale_are_short_for_a_kl_weighting(short, weighting):
    losses = np.linspace(0, 9, 50)
    assert_same_bits(rgd.sample_weights(losses, **short), rgd.sample_weights(losses, weighting))
    assert rgd.reweighted_mean(losses, **short) == rgd.reweighted_mean(losses, weighting)


@pytest.mark.parametrize("weighting", WITH_KERNEL, ids=str)
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_weights_are_exact_to_four_units_in_the_last_place(weighting, kind, dtype):
    losses = LOSSES[kind](np.random.default_rng(0)).astype(dtype)
    exact.assert_within_ulps(weigh(losses, weighting), losses, weighting)


@pytest.mark.parametrize("weighting", [*WEIGHTINGS, DECREASING[0], DECREASING_BATCH[1]], ids=str)
@pytest.mark.parametrize("width", [64, 32, 16])
@given(data=st.data())
def test_weights_of_any_losses_are_exact_to_four_units_in_the_last_place(weighting, width, data):
    losses = data.draw(st.lists(st.floats(-60, 60, width=width), min_size=1, max_size=20))
    losses = np.array(losses, dtype=f"float{width}")
    exact.assert_within_ulps(weigh(losses, weighting), losses, weighting)


@pytest.mark.parametrize("weighting", [rgd.KL(math.inf, scale=1.0), *BATCH], ids=str)
def test_weights_that_underflow_do_so_gradually(weighting):
    losses = np.linspace(0, -800, 300)
    weights = weigh(losses, weighting)
    expected, _ = exact.weights(losses, weighting)
    # Below the normal numbers an exponential is rounded to their common spacing, then multiplied by n / sum,
    # here at most n.
    spacing = np.finfo(float).smallest_subnormal * (losses.size if weighting in BATCH else 1)
    for weight, value in zip(weights, expected, strict=True):
        if value < np.finfo(float).tiny:
            assert abs(weight - value) <= exact.ULPS * spacing


@pytest.mark.parametrize("weighting", [*POINTWISE, *DECREASING, *BATCH[:3], *DECREASING_BATCH], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_weights_of_more_losses_than_a_block_holds_are_exact(weighting, dtype):
    losses = np.random.default_rng(0).exponential(size=5001).astype(dtype)
    exact.assert_within_ulps(weigh(losses, weighting), losses, weighting)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("radius", [1e-8, 1e-4, 0.01, 0.3, 1.0, 2.5])
def test_the_balls_weights_lie_on_its_surface(kind, radius):
    losses = LOSSES[kind](np.random.default_rng(0))
    at_top = np.count_nonzero(losses == losses.max())
    weights = weigh(losses, rgd.KLBall(radius))
    if at_top == losses.size:
        np.testing.assert_array_equal(weights, 1.0)
    elif radius >= math.log(losses.size / at_top):
        np.testing.assert_array_equal(weights, np.where(losses == losses.max(), losses.size / at_top, 0.0))
    else:
        # Weights 4 units off move the divergence by at most 2 * sum q |log nq| of their relative error.
        shares = weights[weights > 0] / weights.sum()
        rounding = 8 * np.finfo(float).eps * np.sum(shares * np.abs(np.log(losses.size * shares)))
        assert abs(exact.divergence(weights) - radius) <= exact.BALL_TOLERANCE * radius + rounding


@pytest.mark.parametrize("radius", [1e-3, 0.3, 4.0])
def test_the_balls_weights_lie_on_its_surface_for_many_losses(radius):
    losses = np.random.default_rng(0).exponential(size=300_000)
    weights = weigh(losses, rgd.KLBall(radius), threads=2)
    divergence = math.fsum((weights * np.log(weights) - weights + 1).tolist()) / losses.size
    # Each term is rounded at the size of its largest part.
    rounding = 4 * np.finfo(float).eps * np.mean(weights * np.abs(np.log(weights)) + weights + 1)
    assert abs(divergence - radius) <= exact.BALL_TOLERANCE * radius + rounding


@pytest.mark.parametrize("weighting", [*BATCH, *DECREASING_BATCH], ids=str)
def test_weights_that_depend_on_the_batch_average_to_one(weighting):
    weights = weigh(np.random.default_rng(0).exponential(size=10_001), weighting)
    assert math.fsum(weights) / 10_001 == pytest.approx(1.0, abs=exact.ULPS * np.finfo(float).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    "weighting", [rgd.ERM(), rgd.KL(scale=0), rgd.KL(scale=0, normalize=True), rgd.KLBall(0)], ids=str
)
def test_no_re_weighting_is_exactly_one(weighting, dtype):
    losses = np.array([0.0, -3.0, 6e4, math.inf], dtype=dtype)
    np.testing.assert_array_equal(rgd.sample_weights(losses, weighting), np.ones(4))
    assert math.isnan(rgd.sample_weights(np.array([math.nan], dtype=dtype), weighting)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("weighting", [rgd.ERM(), *POINTWISE, *DECREASING, rgd.Focal(2.0)], ids=str)
def test_a_nan_loss_makes_only_its_own_pointwise_weight_nan(weighting, dtype):
    losses = np.linspace(0, 2, 41, dtype=dtype)
    clean = rgd.sample_weights(losses, weighting)
    losses[17] = np.nan
    weights = rgd.sample_weights(losses, weighting)
    assert math.isnan(weights[17])
    assert_same_bits(np.delete(weights, 17), np.delete(clean, 17))


@pytest.mark.parametrize(
    "weighting", [*BATCH, *DECREASING_BATCH, rgd.KLBall(0.0), rgd.KL(scale=0.0, normalize=True)], ids=str
)
@pytest.mark.parametrize("position", [0, 1, 40, 5000, -1])
def test_a_nan_loss_makes_all_weights_nan_that_depend_on_the_batch(weighting, position):
    losses = np.linspace(0, 2, 10_000)
    losses[position] = np.nan
    assert np.isnan(rgd.sample_weights(losses, weighting)).all()


@pytest.mark.parametrize("weighting", WITH_KERNEL, ids=str)
@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_an_infinite_loss_weighs_what_the_reference_says(weighting, bad):
    losses = np.array([0.5, bad, 2.0])
    expected = reference.sample_weights(losses, weighting)
    # The exponents are at most 2 here, so that the reference itself is off by no more than the kernel may be.
    np.testing.assert_allclose(weigh(losses, weighting), expected, rtol=2 * exact.ULPS * np.finfo(float).eps)


def test_an_infinite_loss_has_the_weight_of_tau():
    weights = rgd.sample_weights(np.array([math.inf, 3.0, -math.inf]), tau=3.0)
    assert weights[0] == weights[1] == pytest.approx(math.exp(0.75))
    assert weights[2] == 0


@pytest.mark.parametrize("tau", [1e-12, 1e-6, 1e-3])
def test_a_small_tau_tends_to_equal_weights(tau):
    weights = rgd.sample_weights(np.array([0.0, 0.3, 5.0, 1e6]), tau=tau)
    assert np.abs(weights - 1).max() <= math.expm1(tau) + exact.ULPS * np.finfo(float).eps


@pytest.mark.parametrize("tau", [1e4, 1e8, 1e12])
def test_a_large_tau_tends_to_equal_weights(tau):
    weights = rgd.sample_weights(np.array([0.0, 0.3, 5.0, 20.0]), tau=tau)
    assert np.abs(weights - 1).max() <= math.expm1(20 / (tau + 1)) + exact.ULPS * np.finfo(float).eps


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
@given(losses=st.lists(st.floats(-60, 60, width=32), min_size=2, max_size=30))
def test_a_larger_loss_never_weighs_less(weighting, losses):
    weights = weigh(np.sort(np.array(losses)), weighting)
    assert (weights[:-1] <= weights[1:] * (1 + 2 * exact.ULPS * np.finfo(float).eps)).all()


@pytest.mark.parametrize("weighting", [*DECREASING, *DECREASING_BATCH], ids=str)
@given(losses=st.lists(st.floats(-60, 60, width=32), min_size=2, max_size=30))
def test_with_a_negative_scale_a_larger_loss_never_weighs_more(weighting, losses):
    weights = weigh(np.sort(np.array(losses)), weighting)
    assert (weights[1:] <= weights[:-1] * (1 + 2 * exact.ULPS * np.finfo(float).eps)).all()


def test_a_negative_scale_weighs_an_infinite_loss_with_zero_and_it_adds_zero():
    losses = np.array([math.inf, 1.0])
    weighting = rgd.KL(scale=-0.7)
    np.testing.assert_array_equal(rgd.sample_weights(losses, weighting)[0], 0.0)
    assert rgd.reweighted_mean(losses, weighting) == rgd.reweighted_mean(losses[1:], weighting) / 2
    assert rgd.weight_stats(losses, rgd.sample_weights(losses, weighting)).objective == pytest.approx(
        math.exp(-0.7) / 2, rel=1e-15
    )
    assert math.isnan(rgd.reweighted_mean(np.array([math.nan, 1.0]), weighting))


@given(losses=st.lists(st.floats(0, 1e300), min_size=1, max_size=30), tau=st.floats(1e-9, 1e9))
def test_weights_of_losses_that_are_not_negative_lie_between_one_and_e(losses, tau):
    weights = rgd.sample_weights(np.array(losses), tau=tau)
    assert (weights >= 1).all()
    assert (weights <= math.e).all()


# Which weights depend on what.


@pytest.mark.parametrize("weighting", POINTWISE + DECREASING, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_pointwise_weights_do_not_depend_on_how_a_batch_is_split(weighting, dtype):
    rng = np.random.default_rng(0)
    losses = rng.normal(scale=3, size=9001).astype(dtype)
    whole = rgd.sample_weights(losses, weighting)
    for parts in [2, 7, 500]:
        cuts = np.sort(rng.choice(losses.size, parts - 1, replace=False))
        pieces = [rgd.sample_weights(piece, weighting) for piece in np.split(losses, cuts)]
        assert_same_bits(np.concatenate(pieces), whole)


@pytest.mark.parametrize("weighting", POINTWISE, ids=str)
def test_pointwise_weights_are_permuted_with_the_losses_bit_for_bit(weighting):
    rng = np.random.default_rng(0)
    losses, order = rng.exponential(size=1003), rng.permutation(1003)
    assert_same_bits(
        rgd.sample_weights(losses[order], weighting), rgd.sample_weights(losses, weighting)[order]
    )


@pytest.mark.parametrize("weighting", BATCH, ids=str)
def test_weights_that_depend_on_the_batch_are_permuted_with_the_losses(weighting):
    rng = np.random.default_rng(0)
    losses, order = rng.exponential(size=1003), rng.permutation(1003)
    # Both orders are within 4 units of the exact weights, but for the root of the ball.
    _, slack = exact.weights(losses, weighting)
    here, there = weigh(losses, weighting)[order], weigh(losses[order], weighting)
    allowance = 2 * np.array([float(x) for x in slack])[order]
    assert (np.abs(here - there) <= 2 * exact.ULPS * np.spacing(here) + allowance).all()


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_the_number_of_threads_changes_no_bit(weighting, dtype):
    losses = np.random.default_rng(0).exponential(size=400_003).astype(dtype)
    weights = weigh(losses, weighting, threads=1)
    for threads in [2, 3, 8]:
        assert_same_bits(weigh(losses, weighting, threads), weights)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=lambda dtype: dtype.__name__)
def test_the_number_of_threads_changes_no_bit_of_the_sums(dtype, with_base):
    rng = np.random.default_rng(0)
    losses = rng.exponential(size=1_000_003).astype(dtype)
    base = rng.integers(0, 3, losses.size).astype(np.float64) if with_base else None
    weights = weigh(losses, rgd.KL())
    sums = _rgd.weight_sums(losses, weights, base, 1.0, 1)
    total = _rgd.weighted_sum(losses, weights, base, 1)
    assert tuple(sums) == WeightSums._fields
    for threads in [2, 3, 8]:
        assert _rgd.weight_sums(losses, weights, base, 1.0, threads) == sums
        assert _rgd.weighted_sum(losses, weights, base, threads) == total
