"""The NumPy front and the kernels below it, against mpmath, the reference, and themselves."""

import concurrent.futures
import importlib.metadata
import itertools
import math
import subprocess
import sys
import textwrap
import tracemalloc

import exact
import numpy as np
import pytest
import rgd
from hypothesis import given
from hypothesis import strategies as st
from rgd import _rgd, reference
from rgd.weightings._base import kernel_of

DTYPES = [np.float64, np.float32, np.float16]
POINTWISE = [rgd.KL(1.0), rgd.KL(1 / 9), rgd.KL(7.0), rgd.KL(math.inf, scale=1.0)]
DECREASING = [rgd.KL(scale=-0.7), rgd.KL(2.0, scale=-1.0)]
BATCH = [
    rgd.KL(1.0, normalize=True),
    rgd.KL(math.inf, scale=1.0, normalize=True),
    rgd.KL(math.inf, scale=0.1, normalize=True),
    rgd.KLBall(1e-6),
    rgd.KLBall(0.05),
    rgd.KLBall(1.0),
]
DECREASING_BATCH = [rgd.KL(scale=-0.7, normalize=True), rgd.KL(2.0, scale=-1.0, normalize=True)]
WEIGHTINGS = POINTWISE + BATCH
WITH_KERNEL = [rgd.ERM(), *WEIGHTINGS, *DECREASING, *DECREASING_BATCH]
WITHOUT_KERNEL = [
    rgd.MidrangeKL(1.0),
    rgd.ChiSquare(1.0),
    rgd.ChiSquareBall(0.3),
    rgd.CVaR(0.3),
    rgd.CVaR(0.3, smoothing=0.5),
    rgd.Focal(2.0),
    rgd.Trimmed(rgd.KL(), 0.2),
]
STATEFUL = [rgd.MovingAverage(rgd.KL(), 0.9), rgd.GroupDRO(3, 0.1)]

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


def weigh(losses, weighting, threads=1):
    """The kernel's weights, without the front."""
    weights = np.empty(losses.shape, weight_dtype(losses.dtype))
    _rgd.sample_weights(losses, weights, *kernel_of(weighting), threads)
    return weights


def weight_dtype(dtype):
    return np.float64 if dtype == np.float64 else np.float32


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


# Known values, and exact ones.


def test_weights_of_known_losses():
    weights = rgd.sample_weights(np.array([0.0, 0.5, 1.0, 7.0, -1.0]), tau=1.0)
    expected = [1.0, math.exp(0.25), math.exp(0.5), math.exp(0.5), math.exp(-0.5)]
    np.testing.assert_allclose(weights, expected, rtol=exact.ULPS * np.finfo(float).eps)


def test_without_settings_tau_is_one():
    losses = np.linspace(0, 3, 11)
    assert_same_bits(rgd.sample_weights(losses), rgd.sample_weights(losses, rgd.KL(tau=1.0)))
    assert_same_bits(rgd.sample_weights(losses, tau=0.3), rgd.sample_weights(losses, rgd.KL(tau=0.3)))


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
    for threads in [2, 3, 8]:
        assert _rgd.weight_sums(losses, weights, base, 1.0, threads) == sums
        assert _rgd.weighted_sum(losses, weights, base, threads) == total


# Memory: shapes, strides, dtypes, who owns what.


@st.composite
def views(draw):
    """Float arrays that are views: steps of either sign, zero strides, swapped axes, byte offsets."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    offset = draw(st.integers(0, 3))
    steps = [draw(st.sampled_from([1, 2, 3, -1, -2])) for _ in shape]
    base_shape = [max(abs(step) * length, 1) for step, length in zip(steps, shape, strict=True)]
    count = math.prod(base_shape)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    memory = rng.normal(scale=4, size=offset + count).astype(dtype).tobytes()
    array = np.frombuffer(memory, dtype, count, offset * dtype.itemsize).reshape(base_shape)
    array = array[tuple(slice(None, None, step) for step in steps)]
    array = array[tuple(slice(0, length) for length in shape)]
    if draw(st.booleans()):
        array = array[..., None]
    if draw(st.booleans()):
        array = np.broadcast_to(array, (draw(st.integers(1, 4)), *array.shape))
    return array.transpose(draw(st.permutations(range(array.ndim))))


@pytest.mark.parametrize("weighting", [rgd.KL(1.0), rgd.KL(2.0, normalize=True), rgd.KLBall(0.2)], ids=str)
@given(losses=views())
def test_a_view_has_the_weights_of_its_copy_bit_for_bit(weighting, losses):
    weights = rgd.sample_weights(losses, weighting)
    assert type(weights) is np.ndarray
    assert_same_bits(weights, rgd.sample_weights(np.ascontiguousarray(losses), weighting))


@pytest.mark.parametrize("weighting", [rgd.KL(1.0), rgd.KL(2.0, normalize=True), rgd.KLBall(0.2)], ids=str)
@given(losses=views())
def test_the_mean_and_the_statistics_of_a_view_are_those_of_the_reference(weighting, losses):
    wide = losses.astype(np.float64)
    mean = rgd.reweighted_mean(losses, weighting)
    weights = rgd.sample_weights(losses, weighting)
    stats = rgd.weight_stats(losses, weights, weighting)
    if not losses.size:
        assert math.isnan(mean)
        assert stats.count == 0
        return
    expected = reference.weight_stats(wide, weights, weighting)
    # Products in float64 and their sums: each side is off by at most size * eps of the sum of magnitudes.
    relative = 2 * losses.size * np.finfo(float).eps
    magnitude = float(np.mean(np.abs(wide) * weights))
    assert mean == pytest.approx(expected.objective, abs=2 * relative * magnitude)
    assert stats.objective == pytest.approx(expected.objective, abs=relative * magnitude)
    assert stats.mean_loss == pytest.approx(expected.mean_loss, abs=relative * float(np.mean(np.abs(wide))))
    assert stats.effective_sample_size == pytest.approx(expected.effective_sample_size, rel=3 * relative)
    assert stats.kl_to_uniform == pytest.approx(expected.kl_to_uniform, abs=2 * relative * 50)
    assert stats.max_weight == expected.max_weight
    assert stats.clipped_share == expected.clipped_share
    assert stats.count == expected.count


@pytest.mark.parametrize("shape", [(1,), (7,), (0,), (3, 4), (2, 0, 5), (1, 1, 1), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize(("dtype", "result"), [("f8", "f8"), ("f4", "f4"), ("f2", "f4")])
def test_weights_have_the_losses_shape_and_at_least_single_precision(shape, dtype, result):
    weights = rgd.sample_weights(np.ones(shape, dtype), rgd.KLBall(0.1))
    assert weights.shape == shape
    assert weights.dtype == result
    assert weights.flags.writeable
    assert weights.flags.c_contiguous


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_half_precision_losses_have_the_weights_of_the_same_numbers_in_single(weighting):
    losses = np.random.default_rng(0).normal(scale=3, size=300).astype(np.float16)
    assert_same_bits(
        rgd.sample_weights(losses, weighting), rgd.sample_weights(losses.astype(np.float32), weighting)
    )


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_bfloat16_losses_have_the_weights_of_the_same_numbers_in_single(weighting):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    losses = np.random.default_rng(0).normal(scale=3, size=300).astype(ml_dtypes.bfloat16)
    assert_same_bits(
        rgd.sample_weights(losses, weighting), rgd.sample_weights(losses.astype(np.float32), weighting)
    )
    assert rgd.reweighted_mean(losses, weighting) == rgd.reweighted_mean(losses.astype(np.float32), weighting)


@given(losses=views())
def test_losses_are_read_only_and_not_written_to(losses):
    kept = losses.copy()
    losses.flags.writeable = False
    rgd.sample_weights(losses)
    rgd.reweighted_mean(losses)
    np.testing.assert_array_equal(losses, kept)


@pytest.mark.parametrize("step", [1, -2])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16], ids=lambda dtype: dtype.__name__)
def test_losses_are_not_copied(step, dtype):
    losses = np.ones(1 << 20, dtype)[::step]
    output = losses.size * np.dtype(weight_dtype(dtype)).itemsize
    rgd.reweighted_mean(losses)
    tracemalloc.start()
    try:
        rgd.reweighted_mean(losses)
        rgd.sample_weights(losses)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert output <= peak < output + 100_000


def test_the_memory_of_losses_is_let_go():
    class Owner(np.ndarray):
        pass

    losses = np.ones(100).view(Owner)
    before = sys.getrefcount(losses)
    for _ in range(100):
        rgd.sample_weights(losses)
        rgd.reweighted_mean(losses)
    assert sys.getrefcount(losses) == before


# Other libraries' arrays.


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_a_torch_tensor_gives_a_torch_tensor(dtype, weighting):
    torch = pytest.importorskip("torch")
    losses = torch.linspace(-2, 5, 60, dtype=getattr(torch, dtype)).reshape(3, 4, 5)
    weights = rgd.sample_weights(losses, weighting)
    assert type(weights) is torch.Tensor
    wide = losses if dtype in ("float64", "float32") else losses.float()
    assert weights.dtype == wide.dtype
    assert_same_bits(weights.numpy(), rgd.sample_weights(wide.numpy(), weighting))
    assert rgd.reweighted_mean(losses, weighting) == rgd.reweighted_mean(wide.numpy(), weighting)
    assert rgd.weight_stats(losses, weights, weighting) == rgd.weight_stats(
        wide.numpy(), weights.numpy(), weighting
    )


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_views_of_torch_tensors_are_read_in_place(dtype):
    torch = pytest.importorskip("torch")
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    for view in [
        base.T,
        base[1:, ::3],
        base[2],
        base[:, :1],
        base[:0],
        base[0, :1].expand(5, 1),
        base[None, :, 2],
    ]:
        assert_same_bits(rgd.sample_weights(view).numpy(), rgd.sample_weights(view.clone()).numpy())


def test_a_parameter_without_gradient_and_an_inference_tensor_are_read():
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    with torch.inference_mode():
        inference = torch.ones(3)
    for losses in (parameter, inference):
        assert type(rgd.sample_weights(losses)) is torch.Tensor


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("weighting", [rgd.KL(), rgd.KLBall(0.1)], ids=str)
def test_a_jax_array_gives_a_jax_array(dtype, weighting):
    jax = pytest.importorskip("jax")
    losses = jax.numpy.linspace(-2, 5, 60, dtype=dtype).reshape(3, 20)
    weights = rgd.sample_weights(losses, weighting)
    assert isinstance(weights, jax.Array)
    assert weights.dtype == "float32"
    wide = np.asarray(losses, dtype=np.float32)
    assert_same_bits(np.asarray(weights), rgd.sample_weights(wide, weighting))
    assert rgd.reweighted_mean(losses, weighting) == rgd.reweighted_mean(wide, weighting)


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


# Threads and processes.


def test_calls_from_many_threads_do_not_disturb_each_other():
    rng = np.random.default_rng(0)
    cases = [
        (rng.exponential(size=size).astype(dtype), weighting)
        for size in (10, 3000, 100_000)
        for dtype in (np.float64, np.float32)
        for weighting in (rgd.KL(), rgd.KL(normalize=True), rgd.KLBall(0.1))
    ]
    expected = [(weigh(*case), rgd.reweighted_mean(*case)) for case in cases]

    def work(seed):
        for i in np.random.default_rng(seed).permutation(len(cases)):
            assert_same_bits(rgd.sample_weights(*cases[i]), expected[i][0])
            assert rgd.reweighted_mean(*cases[i]) == expected[i][1]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(work, seed) for seed in range(24)]:
                done.result(timeout=60)
    finally:
        sys.setswitchinterval(interval)


def run_python(code, *arguments, timeout=60):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system has no fork")
def test_a_forked_child_computes_after_its_parent_has_used_the_pool():
    # In a process of its own, so that no other library's threads are there to be forked.
    run_python(
        """
        import multiprocessing, warnings
        import numpy as np
        from rgd import KL, KLBall, _rgd
        from rgd.weightings._base import kernel_of

        losses = np.random.default_rng(0).exponential(size=1 << 20)

        def weigh(weighting):
            weights = np.empty_like(losses)
            _rgd.sample_weights(losses, weights, *kernel_of(weighting), 2)
            return weights

        expected = {weighting: weigh(weighting) for weighting in (KL(), KLBall(0.1))}

        def grandchild():
            for weighting, weights in expected.items():
                assert (weigh(weighting) == weights).all()

        def run(target):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                process = multiprocessing.get_context("fork").Process(target=target)
                process.start()
            process.join(20)
            alive = process.is_alive()
            if alive:
                process.kill()
            assert not alive and process.exitcode == 0, process.exitcode

        def child():
            grandchild()
            run(grandchild)

        run(child)
        run(child)
        grandchild()
        """
    )


# The package.


def test_importing_rgd_imports_no_framework():
    loaded = run_python("import sys, rgd; print(*{name.partition('.')[0] for name in sys.modules})").split()
    assert not {"torch", "jax", "jaxlib", "optax", "scipy", "ml_dtypes"} & set(loaded)


def test_importing_rgd_adds_less_than_100_ms_to_numpy():
    code = """
        import time
        import numpy
        start = time.process_time()
        import rgd
        print(time.process_time() - start)
    """
    # The time of the processor, which other processes on the machine do not lengthen.
    assert min(float(run_python(code)) for _ in range(3)) < 0.1


def test_the_version_is_that_of_the_distribution():
    try:
        expected = importlib.metadata.version("rgd")
    except importlib.metadata.PackageNotFoundError:
        expected = "0+unknown"
    assert rgd.__version__ == expected


def test_what_the_package_offers_is_listed():
    for name in rgd.__all__:
        assert getattr(rgd, name).__doc__ or name == "Weighting"
