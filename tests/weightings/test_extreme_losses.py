"""Infinite losses, far outliers and weights that are all zero, in every front."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import exact
import numpy as np
import pytest
import rgd
import torch
from rgd import reference
from rgd.torch import RGD, RGDLoss, backend, reweighted_mean, sample_weights

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
import rgd.jax  # noqa: E402
import rgd.optax  # noqa: E402
from x64 import enable_x64  # noqa: E402

INF = math.inf


def by_numpy(losses: Any, weighting: Any, **options: Any) -> Any:
    return rgd.sample_weights(losses, weighting, **options)


def _by_torch(name: str) -> Callable[..., Any]:
    def weigh(losses: Any, weighting: Any, **options: Any) -> Any:
        options = {key: torch.as_tensor(value) for key, value in options.items()}
        with backend(name):
            return sample_weights(torch.as_tensor(losses), weighting, **options).numpy()

    return weigh


def by_jax(losses: Any, weighting: Any, **options: Any) -> Any:
    return np.asarray(rgd.jax.sample_weights(jnp.asarray(losses), weighting, **options))


FRONTS = {
    "numpy": by_numpy,
    "torch, rust": _by_torch("rust"),
    "torch, composite": _by_torch("composite"),
    "jax": by_jax,
}
fronts = pytest.mark.parametrize("weigh", FRONTS.values(), ids=FRONTS)
MEMBERS = [
    rgd.KL(INF, scale=1.5, normalize=True),
    rgd.KL(scale=-1.0, normalize=True),
    rgd.KLBall(0.2),
    rgd.ChiSquare(1.0),
    rgd.ChiSquareBall(0.2),
    rgd.MidrangeKL(1.0),
    rgd.MidrangeKL(-1.0),
    rgd.MidrangeKL(1.0, relative=True),
    rgd.MidrangeKL(-1.0, relative=True),
    rgd.CVaR(0.5, smoothing=0.5),
    rgd.Trimmed(rgd.KLBall(0.2), 0.2),
]
members = pytest.mark.parametrize("weighting", MEMBERS, ids=str)
MASS = np.array([1.0, 2.0, 0.5, 1.0, 3.0])


def tolerance(dtype: str, size: int) -> float:
    """A rounding of each product, of the sum over the batch and of the exponents, which are below 16."""
    return (2 * size + 32) * float(np.finfo(dtype).eps)


@fronts
@members
@pytest.mark.parametrize("infinity", [INF, -INF])
def test_an_infinite_loss_has_the_same_limit_in_every_front(
    weigh: Any, weighting: Any, infinity: float
) -> None:
    losses = np.array([1.0, infinity, 2.0, 0.5, 1.5], np.float32)
    for options in ({}, {"sample_weight": MASS.astype(np.float32)}):
        expected = reference.sample_weights(losses, weighting, **options)
        assert np.isfinite(expected).all()
        close = tolerance("float32", losses.size)
        np.testing.assert_allclose(weigh(losses, weighting, **options), expected, rtol=close, atol=close)


@fronts
@members
def test_a_nan_beside_an_infinite_loss_still_makes_all_weights_nan(weigh: Any, weighting: Any) -> None:
    losses = np.array([1.0, INF, math.nan, -INF, 0.5], np.float32)
    assert np.isnan(weigh(losses, weighting)).all()


LOGITS = np.array([[2.0, 0.0, 1.0], [0.0, -INF, 1.0], [0.5, 0.0, 0.0], [0.0, 1.0, -1.0]], np.float32)
LABELS = np.array([0, 1, 0, 2])


@members
@pytest.mark.parametrize("name", ["rust", "composite"])
def test_one_infinite_loss_leaves_the_gradient_of_a_cross_entropy_in_torch(name: str, weighting: Any) -> None:
    logits = torch.tensor(LOGITS, requires_grad=True)
    criterion = RGDLoss(weighting=weighting)
    with backend(name):
        criterion(logits, torch.tensor(LABELS)).backward()
    _check_gradient(logits.grad.numpy(), weighting)


@pytest.mark.parametrize(
    "weighting", [rgd.KLBall(0.2), rgd.ChiSquareBall(0.2), rgd.MidrangeKL(-1.0)], ids=str
)
def test_one_infinite_loss_leaves_the_gradient_of_a_cross_entropy_in_jax(weighting: Any) -> None:
    gradient = jax.grad(rgd.jax.cross_entropy)(jnp.asarray(LOGITS), jnp.asarray(LABELS), weighting=weighting)
    _check_gradient(np.asarray(gradient), weighting)


def _check_gradient(gradient: Any, weighting: Any) -> None:
    shifted = np.exp(LOGITS - LOGITS.max(axis=1, keepdims=True))
    softmax = shifted / shifted.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        losses = -np.log(softmax[np.arange(4), LABELS])
    rows = softmax - np.eye(3)[LABELS]
    expected = reference.sample_weights(losses, weighting)[:, None] * rows / 4
    close = tolerance("float32", 4)
    np.testing.assert_allclose(gradient, expected, rtol=close, atol=close)


@fronts
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("outlier", [1e6, 1e9, 1e12, 1e30])
def test_a_negative_scale_tells_small_losses_apart_beside_any_outlier(
    weigh: Any, dtype: str, outlier: float
) -> None:
    with enable_x64(dtype == "float64"):
        weights = weigh(np.array([outlier, 0.3, 0.1], dtype), rgd.MidrangeKL(-1.0))
    ratio = math.exp(-0.2)
    expected = [0.0, 3 * ratio / (1 + ratio), 3 / (1 + ratio)]
    assert weights.dtype == dtype
    np.testing.assert_allclose(weights, expected, rtol=8 * np.finfo(dtype).eps)


@fronts
@members
def test_an_outlier_of_float32_gives_the_weights_of_float64(weigh: Any, weighting: Any) -> None:
    for outlier in (1e9, 1e16, 1e30, -1e9, -1e16, -1e30):
        losses = np.array([outlier, 0.25, 0.5, 1.5, 1.0], np.float32)
        expected = reference.sample_weights(losses, weighting)
        close = tolerance("float32", losses.size)
        np.testing.assert_allclose(weigh(losses, weighting), expected, rtol=close, atol=close)


# Group DRO: a group of infinite loss.


def test_a_group_of_infinite_loss_gets_all_the_weight_and_leaves_the_state() -> None:
    weighting, groups = rgd.GroupDRO(3, 0.5), np.array([0, 1, 1, 2])
    losses = np.array([1.0, INF, 2.0, 0.5], np.float32)
    # A share that has come down to 0 is no obstacle.
    for shares in (np.full(3, 1 / 3), np.array([0.5, 0.0, 0.5])):
        results = [
            rgd.sample_weights(losses, weighting, groups=groups, state={"shares": shares}),
            reference.sample_weights(losses, weighting, groups=groups, state={"shares": shares}),
            rgd.jax.sample_weights(
                jnp.asarray(losses),
                weighting,
                groups=jnp.asarray(groups),
                state={"shares": jnp.asarray(shares)},
            ),
            sample_weights(
                torch.tensor(losses),
                weighting,
                groups=torch.tensor(groups),
                state={"shares": torch.tensor(shares)},
            ),
        ]
        for weights, state in results:
            np.testing.assert_allclose(weights, [0.0, 2.0, 2.0, 0.0], rtol=1e-6)
            np.testing.assert_allclose(state["shares"], shares, rtol=1e-6)


# A moving average of weights that are all 0, and of one that is infinite.

ZEROS = np.zeros(3, np.float32)
USUAL = np.array([0.5, 1.0, 2.0], np.float32)
FOCAL = rgd.Focal(2.0)


def functions() -> list[Any]:
    """Each front's objective as `(losses, weighting, state) -> (value, state)`."""

    def by_torch(name: str) -> Any:
        def mean(losses: Any, weighting: Any, state: Any) -> Any:
            with backend(name):
                return reweighted_mean(torch.tensor(losses), weighting, state=state)

        return mean

    return [
        lambda losses, weighting, state: rgd.reweighted_mean(losses, weighting, state=state),
        lambda losses, weighting, state: reference.reweighted_mean(losses, weighting, state=state),
        lambda losses, weighting, state: rgd.jax.reweighted_mean(jnp.asarray(losses), weighting, state=state),
        by_torch("rust"),
        by_torch("composite"),
    ]


averages = pytest.mark.parametrize(
    "mean", functions(), ids=["numpy", "reference", "jax", "torch, rust", "torch, composite"]
)


@averages
@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_a_first_batch_of_zero_weights_is_as_if_it_had_not_been(mean: Any, decay: float) -> None:
    weighting = rgd.MovingAverage(FOCAL, decay)
    value, state = mean(ZEROS, weighting, weighting.init())
    assert float(value) == 0.0
    assert (float(state["log_mean"]), int(state["updates"])) == (0.0, 0)
    value, state = mean(USUAL, weighting, state)
    expected, after = mean(USUAL, weighting, weighting.init())
    assert float(value) == float(expected)
    assert (float(state["log_mean"]), int(state["updates"])) == (float(after["log_mean"]), 1)


@averages
@pytest.mark.parametrize("decay", [0.75, 0.0])
def test_a_later_batch_of_zero_weights_lets_the_mean_decay_and_stays_finite(mean: Any, decay: float) -> None:
    weighting = rgd.MovingAverage(FOCAL, decay)
    _, before = mean(USUAL, weighting, weighting.init())
    value, after = mean(ZEROS, weighting, before)
    assert float(value) == 0.0
    # Without a memory there is no mean of zeros to divide by.
    shift = math.log(decay) if decay else 0.0
    assert float(after["log_mean"]) == pytest.approx(float(before["log_mean"]) + shift, abs=1e-6)
    assert int(after["updates"]) == (2 if decay else 1)


@averages
def test_a_moving_average_follows_weights_that_fall_below_floating_point(mean: Any) -> None:
    weighting = rgd.MovingAverage(rgd.KL(INF, scale=1.0), 0.0)
    _, state = mean(np.full(2, 2000.0, np.float32), weighting, weighting.init())
    # Without memory, the mean of the last batch alone counts, however far below the one before.
    value, state = mean(np.full(2, 1.0, np.float32), weighting, state)
    assert float(value) == pytest.approx(1.0, rel=1e-6)
    assert float(state["log_mean"]) == pytest.approx(1.0, rel=1e-6)


def test_an_infinite_weight_of_a_moving_average_is_divided_by_its_part_of_the_mean() -> None:
    weighting = rgd.MovingAverage(rgd.KL(INF, scale=1.0), 0.75)
    results = [
        rgd.sample_weights(np.array([1.0, INF]), weighting, state={"log_mean": 0.5, "updates": 1}),
        reference.sample_weights([1.0, INF], weighting, state={"log_mean": 0.5, "updates": 1}),
        rgd.jax.sample_weights(jnp.array([1.0, INF]), weighting, state={"log_mean": 0.5, "updates": 1}),
        sample_weights(torch.tensor([1.0, INF]), weighting, state={"log_mean": 0.5, "updates": 1}),
    ]
    for weights, state in results:
        np.testing.assert_allclose(weights, [0.0, 8.0], rtol=1e-6)
        assert (float(state["log_mean"]), int(state["updates"])) == (0.5, 1)


def test_modules_and_optimizers_pass_over_a_first_batch_of_zero_weights() -> None:
    weighting = rgd.MovingAverage(FOCAL, 0.9)
    criterion = RGDLoss(base=lambda losses, _: losses, weighting=weighting)
    parameter = torch.zeros(3, requires_grad=True)
    optimizer = RGD(torch.optim.SGD([parameter], lr=0.0), weighting)
    for losses in (ZEROS, USUAL):
        found = criterion(torch.tensor(losses) + parameter, torch.zeros(3))
        optimizer.zero_grad()
        objective = optimizer.backward(torch.tensor(losses) + parameter)
        optimizer.step()
        expected = rgd.reweighted_mean(losses, weighting, state=weighting.init())[0]
        assert found.item() == pytest.approx(expected, rel=1e-6)
        assert objective.item() == pytest.approx(expected, rel=1e-6)
        assert bool(parameter.grad.isfinite().all())


def test_optax_passes_over_a_first_batch_of_zero_weights() -> None:
    optax = pytest.importorskip("optax")
    tx = rgd.optax.rgd(optax.sgd(1.0), rgd.MovingAverage(FOCAL, 0.9))
    parameters, gradients = jnp.zeros(2), jnp.ones((3, 2))
    fresh = tx.init(parameters)
    updates, state = tx.update(gradients, fresh, parameters, losses=jnp.asarray(ZEROS))
    np.testing.assert_array_equal(updates, np.zeros(2))
    updates, _ = tx.update(gradients, state, parameters, losses=jnp.asarray(USUAL))
    expected, _ = tx.update(gradients, fresh, parameters, losses=jnp.asarray(USUAL))
    np.testing.assert_array_equal(updates, expected)


@pytest.mark.parametrize("weigh", [*FRONTS.values(), reference.sample_weights], ids=[*FRONTS, "reference"])
@pytest.mark.parametrize(
    "weighting", [rgd.KLBall(0.6), rgd.ChiSquareBall(0.6), rgd.ChiSquareBall(0.4)], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("mass", [None, np.array([2.0, 1.0, 1.0, 0.25, 0.25])], ids=["plain", "mass"])
def test_a_ball_among_near_losses_does_not_see_how_far_the_others_are(
    weigh: Any, weighting: Any, dtype: str, mass: Any
) -> None:
    # Beside these, a gap between near losses is below the smallest normal number.
    far = -float(np.finfo(dtype).max)
    losses = np.array([0.25, 0.5, 1.0, far, 0.9 * far], dtype)
    options = {} if mass is None else {"sample_weight": mass.astype(dtype)}
    expected = [float(weight) for weight in exact.weights(losses, weighting, mass)[0]]
    assert len(set(expected[:3])) == 3
    with enable_x64():
        found = np.asarray(weigh(losses, weighting, **options))
    # The logarithm of the inverse temperature, which is at most that of the largest number, is rounded too.
    rounding = tolerance(dtype, losses.size) + math.log(-far) * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(found, expected, rtol=0, atol=rounding * max(expected))


@fronts
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("radius", [1e-12, 0.1, 1.0, 1.09])
def test_a_kl_ball_finds_its_root_for_the_smallest_and_the_largest_gaps(
    weigh: Any, dtype: str, radius: float
) -> None:
    limits = np.finfo(dtype)
    # The front divides losses by 16. JAX rounds numbers below the smallest normal one to 0.
    small, large = 16 * float(limits.tiny), float(limits.max)
    eps = float(limits.eps)
    for numbers in ([0.0, 3 * small, 5 * small], [-large, 0.0, large]):
        losses = np.array(numbers, dtype)
        expected = [float(weight) for weight in exact.weights(losses, rgd.KLBall(radius))[0]]
        with enable_x64():
            found = np.asarray(weigh(losses, rgd.KLBall(radius)))
        # An error of the radius moves the weights by it over the deviation of their logarithms.
        deviation = math.sqrt(2 * min(radius, math.log(3) - radius))
        close = tolerance(dtype, losses.size) + 8 * eps * radius / deviation
        np.testing.assert_allclose(found, expected, rtol=0, atol=close * max(expected))
