"""Sample weights of any magnitude: a mean and the weights do not depend on their scale, in any front."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import rgd
import torch
from rgd.torch import RGDLoss, backend, cross_entropy, reweighted_mean, sample_weights, weight_stats

SCALES = [1e300, 1e307, 1e40, 1e-40, 1e-300, 5e-324]
MASS = np.array([1.0, 2.0, 0.0, 4.0, 1.0])
LOSSES = np.array([0.3, 2.0, 9.0, 0.1, 4.0])
WEIGHTINGS = [rgd.KL(), rgd.KL(normalize=True), rgd.KLBall(0.1), rgd.CVaR(0.4)]
LOGITS = np.random.default_rng(0).normal(size=(5, 3))
LABELS = np.array([0, 1, 2, 0, 1])
DTYPES = ["float32", "float64"]
# A float32 rounding of each product and of the sum over five; a power of two changes no bit.
TOLERANCE = 8 * float(np.finfo(np.float32).eps)

scales = pytest.mark.parametrize("scale", SCALES)
weightings = pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def scaled(scale: float) -> Any:
    """Weights in the ratio of `MASS`, which hold it exactly, the smallest numbers too."""
    return MASS * scale


@scales
@weightings
@dtypes
def test_numpys_weights_mean_and_statistics_do_not_depend_on_the_scale(
    dtype: str, weighting: Any, scale: float
) -> None:
    losses = LOSSES.astype(dtype)
    for function in (rgd.sample_weights, rgd.reweighted_mean):
        expected = function(losses, weighting, sample_weight=MASS)
        np.testing.assert_allclose(
            function(losses, weighting, sample_weight=scaled(scale)), expected, rtol=TOLERANCE
        )
    plain, extreme = (
        rgd.weight_stats(losses, losses, sample_weight=p, groups=LABELS) for p in (MASS, scaled(scale))
    )
    np.testing.assert_allclose(extreme.effective_sample_size, plain.effective_sample_size, rtol=TOLERANCE)
    np.testing.assert_allclose(extreme.groups.mean_loss, plain.groups.mean_loss, rtol=TOLERANCE)


@scales
@weightings
@dtypes
@pytest.mark.parametrize("name", ["rust", "composite"])
def test_torchs_weights_and_mean_do_not_depend_on_the_scale(
    name: str, dtype: str, weighting: Any, scale: float
) -> None:
    losses = torch.tensor(LOSSES, dtype=getattr(torch, dtype))
    p, extreme = torch.tensor(MASS), torch.tensor(scaled(scale))
    with backend(name):
        for function in (sample_weights, reweighted_mean):
            expected = function(losses, weighting, sample_weight=p)
            found = function(losses, weighting, sample_weight=extreme)
            torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=0.0)
        leaf = losses.clone().requires_grad_()
        reweighted_mean(leaf, weighting, sample_weight=extreme).backward()
        other = losses.clone().requires_grad_()
        reweighted_mean(other, weighting, sample_weight=p).backward()
        torch.testing.assert_close(leaf.grad, other.grad, rtol=TOLERANCE, atol=0.0)


@scales
@weightings
@dtypes
@pytest.mark.parametrize("per", ["element", "sample"])
@pytest.mark.parametrize("name", ["rust", "composite"])
def test_the_mean_of_a_cross_entropy_its_gradient_and_its_statistics_do_not_depend_on_the_scale(
    name: str, per: str, dtype: str, weighting: Any, scale: float
) -> None:
    found = []
    for p in (torch.tensor(MASS), torch.tensor(scaled(scale))):
        logits = torch.tensor(LOGITS, dtype=getattr(torch, dtype), requires_grad=True)
        criterion = RGDLoss(weighting=weighting, per=per)
        with backend(name):
            loss = criterion(logits, torch.tensor(LABELS), sample_weight=p)
            loss.backward()
        stats = criterion.stats()
        found.append((loss.detach(), logits.grad, stats.mean_loss, stats.objective, stats.kl_to_uniform))
    for extreme, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(extreme, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("name", ["rust", "composite"])
def test_a_sum_of_weights_that_float32_cannot_hold_is_refused_with_the_fix(name: str, reduction: str) -> None:
    p, target = torch.tensor(scaled(1e300)), torch.tensor(LABELS)
    logits = torch.tensor(LOGITS)
    with backend(name):
        with pytest.raises(
            ValueError, match=r"sample_weight holds 4e\+300, more than torch\.float32 can.*float64"
        ):
            cross_entropy(logits.float(), target, reduction=reduction, sample_weight=p)
        criterion = RGDLoss(base=lambda losses, _: losses, reduction=reduction)
        with pytest.raises(ValueError, match=r"sample_weight holds 4e\+300"):
            criterion(torch.tensor(LOSSES).float(), target, sample_weight=p)
        found = cross_entropy(logits, target, reduction=reduction, sample_weight=p)
        expected = cross_entropy(logits, target, reduction=reduction, sample_weight=torch.tensor(MASS))
        torch.testing.assert_close(found / 1e300, expected, rtol=1e-14, atol=0.0)


def test_statistics_of_torch_do_not_depend_on_the_scale() -> None:
    losses = torch.tensor(LOSSES)
    plain, extreme = (
        weight_stats(losses, losses, sample_weight=torch.tensor(p)) for p in (MASS, scaled(1e300))
    )
    assert extreme.mean_loss == pytest.approx(plain.mean_loss, rel=1e-14)


@scales
@weightings
def test_jaxs_weights_and_means_do_not_depend_on_the_scale(weighting: Any, scale: float) -> None:
    jax = pytest.importorskip("jax")
    import rgd.jax  # noqa: PLC0415

    losses, logits = jax.numpy.asarray(LOSSES, "float32"), jax.numpy.asarray(LOGITS, "float32")
    calls = [
        lambda p: rgd.jax.sample_weights(losses, weighting, sample_weight=p),
        lambda p: rgd.jax.reweighted_mean(losses, weighting, sample_weight=p),
        lambda p: rgd.jax.cross_entropy(logits, LABELS, weighting=weighting, sample_weight=p),
        jax.grad(lambda x: rgd.jax.cross_entropy(x, LABELS, weighting=weighting, sample_weight=MASS)),
    ]
    extreme = jax.grad(
        lambda x: rgd.jax.cross_entropy(x, LABELS, weighting=weighting, sample_weight=scaled(scale))
    )
    for call in calls[:3]:
        np.testing.assert_allclose(call(scaled(scale)), call(MASS), rtol=TOLERANCE)
    np.testing.assert_allclose(extreme(logits), calls[3](logits), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_jax_refuses_a_sum_of_weights_that_float32_cannot_hold(reduction: str) -> None:
    jax = pytest.importorskip("jax")
    import rgd.jax  # noqa: PLC0415

    logits = jax.numpy.asarray(LOGITS, "float32")
    with pytest.raises(ValueError, match=r"sample_weight holds 4e\+300, more than float32 can"):
        rgd.jax.cross_entropy(logits, LABELS, reduction=reduction, sample_weight=scaled(1e300))
