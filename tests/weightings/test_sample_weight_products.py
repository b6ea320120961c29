"""Products of sample weight, weight and loss stay where the losses are, in every front."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rgd
import rgd.jax
import torch
from rgd.torch import (
    RGD,
    LinearRGDLoss,
    RGDLoss,
    backend,
    cross_entropy,
    linear_cross_entropy,
    reweighted_mean,
)

# float32 holds each of a pair, and not their product.
FACTORS = [(1e27, 1e14), (3e30, 1e12), (1.5e-30, 3e-15), (1e-25, 1e-17), (2e37, 1e17)]
SPREAD = np.array([1.0, 0.5, 0.25, 1.0])
MASS = np.array([1.0, 3.0, 2.0, 0.5])
PLAIN = float((MASS * SPREAD).sum() / MASS.sum())


def float32(values):
    return np.asarray(values, np.float32)


def torch_mean(losses, mass):
    return float(reweighted_mean(torch.tensor(losses), rgd.ERM(), sample_weight=torch.tensor(mass)))


def torch_base(losses, mass):
    criterion = RGDLoss(base=lambda given: given, weighting=rgd.ERM())
    return float(criterion(torch.tensor(losses), sample_weight=torch.tensor(mass)))


def torch_optimizer(losses, mass):
    optimizer = RGD(torch.optim.SGD([torch.zeros(1)], lr=0.1), rgd.ERM())
    return float(optimizer.objective(torch.tensor(losses), sample_weight=torch.tensor(mass)))


def composite_mean(losses, mass):
    with backend("composite"):
        return torch_mean(losses, mass)


def numpy_mean(losses, mass):
    return rgd.reweighted_mean(losses, rgd.ERM(), sample_weight=mass)


def jax_mean(losses, mass):
    return float(rgd.jax.reweighted_mean(jnp.asarray(losses), rgd.ERM(), sample_weight=jnp.asarray(mass)))


def jitted_mean(losses, mass):
    mean = jax.jit(lambda losses, mass: rgd.jax.reweighted_mean(losses, rgd.ERM(), sample_weight=mass))
    return float(mean(jnp.asarray(losses), jnp.asarray(mass)))


MEANS = [torch_mean, torch_base, torch_optimizer, composite_mean, numpy_mean, jax_mean, jitted_mean]


@pytest.mark.parametrize(("size", "mass"), FACTORS)
@pytest.mark.parametrize("mean", MEANS)
def test_the_mean_of_losses_is_that_of_their_numbers(mean, size, mass):
    # Three roundings of float32 in a product of three, and the sums.
    assert mean(float32(SPREAD * size), float32(MASS * mass)) == pytest.approx(PLAIN * size, rel=1e-6)


def two_classes(losses):
    """Logits whose cross-entropy with class 0 are the losses: large ones are the gap itself."""
    return np.stack([np.zeros_like(losses), losses], 1).astype(np.float32)


LARGE = [pair for pair in FACTORS if pair[0] > 1]


@pytest.mark.parametrize(("size", "mass"), LARGE)
@pytest.mark.parametrize("name", ["rust", "composite"])
def test_cross_entropy_and_its_gradient_too(name, size, mass):
    logits = torch.tensor(two_classes(SPREAD * size), requires_grad=True)
    target = torch.zeros(4, dtype=torch.long)
    with backend(name):
        loss = cross_entropy(
            logits, target, weighting=rgd.ERM(), sample_weight=torch.tensor(MASS * mass, dtype=torch.float32)
        )
        loss.backward()
    assert loss.item() == pytest.approx(PLAIN * size, rel=1e-6)
    np.testing.assert_allclose(logits.grad[:, 1].numpy(), MASS / MASS.sum(), rtol=1e-6)


@pytest.mark.parametrize(("size", "mass"), LARGE)
@pytest.mark.parametrize("weighting", [rgd.ERM(), rgd.GroupDRO(1, 0.0)], ids=["one pass", "two passes"])
def test_the_linear_heads_too(weighting, size, mass):
    hidden = float32(SPREAD * size)[:, None]
    head = float32([[0.0], [1.0]])
    groups = np.zeros(4, np.int64)
    given = {"groups": torch.tensor(groups)} if isinstance(weighting, rgd.GroupDRO) else {}
    criterion = LinearRGDLoss(linear_weight=torch.nn.Parameter(torch.tensor(head)), weighting=weighting)
    p = float32(MASS * mass)
    value = criterion(torch.tensor(hidden), torch.zeros(4).long(), sample_weight=torch.tensor(p), **given)
    assert value.item() == pytest.approx(PLAIN * size, rel=1e-6)
    if isinstance(weighting, rgd.ERM):
        value = linear_cross_entropy(
            torch.tensor(hidden), torch.tensor(head), torch.zeros(4).long(), weighting=weighting,
            sample_weight=torch.tensor(p),
        )  # fmt: skip
        assert float(value) == pytest.approx(PLAIN * size, rel=1e-6)
        value = rgd.jax.linear_cross_entropy(
            jnp.asarray(hidden), jnp.asarray(head.T), jnp.zeros(4, int), weighting=weighting,
            sample_weight=jnp.asarray(p),
        )  # fmt: skip
        assert float(value) == pytest.approx(PLAIN * size, rel=1e-6)


@pytest.mark.parametrize(("size", "mass"), LARGE)
@pytest.mark.parametrize("name", ["jnp", "rust"])
def test_cross_entropy_of_jax_too(name, size, mass):
    given = jnp.asarray(two_classes(SPREAD * size)), jnp.zeros(4, int)
    value = rgd.jax.cross_entropy(
        *given, weighting=rgd.ERM(), sample_weight=jnp.asarray(float32(MASS * mass)), backend=name
    )
    assert float(value) == pytest.approx(PLAIN * size, rel=1e-6)


class Counting(rgd.Weighting):
    """Weights by the number of samples, as a user's formula may."""

    def weights(self, batch):
        return 1 / batch.count + 0 * batch.losses


@pytest.mark.parametrize("mass", [1.0, 3.0, 1e-6, 7e9])
def test_a_formula_sees_the_numbers_that_were_given(mass):
    losses, p = float32(SPREAD), float32(MASS * mass)
    expected = 1 / p.astype(np.float64).sum()
    for weights in (
        rgd.sample_weights(losses, Counting(), sample_weight=p),
        rgd.torch.sample_weights(torch.tensor(losses), Counting(), sample_weight=torch.tensor(p)).numpy(),
        rgd.jax.sample_weights(jnp.asarray(losses), Counting(), sample_weight=jnp.asarray(p)),
    ):
        np.testing.assert_allclose(weights, expected, rtol=1e-6)
    criterion = RGDLoss(base=lambda given: given, weighting=Counting())
    criterion(torch.tensor(losses), sample_weight=torch.tensor(p))
    np.testing.assert_allclose(criterion.last_weights.numpy(), expected, rtol=1e-6)
