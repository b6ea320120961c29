"""NumPy, torch and JAX give the same numbers for the same input, those of `rgd.reference`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rgd
import rgd.jax
import rgd.torch
import torch
from rgd import reference
from x64 import enable_x64

WEIGHTINGS = [
    rgd.KL(),
    rgd.KL(tau=0.4, scale=2.0),
    rgd.KL(tau=2.0, normalize=True),
    rgd.KL(tau=math.inf, scale=0.5, normalize=True),
    rgd.KLBall(0.05),
    rgd.KLBall(9.0),
]
DTYPES = ["float64", "float32", "float16", "bfloat16"]
SAMPLES, CLASSES = 12, 7


def pair(values, dtype):
    """The same numbers as a torch tensor, a JAX array and, widened, in float64 NumPy."""
    tensor = torch.as_tensor(values).to(getattr(torch, dtype))
    array = jnp.asarray(values).astype(dtype)
    return tensor, array, tensor.double().numpy()


def tolerance(dtype, weighting):
    # Roundings of a sum over a row and one over the batch; a ball's root is exact to 1e-10 in KL.
    eps = float(np.finfo(np.float64 if dtype == "float64" else np.float32).eps)
    return max((SAMPLES * CLASSES + 16) * eps, 1e-9 if isinstance(weighting, rgd.KLBall) else 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_weights_and_their_mean_agree_in_every_front(weighting, dtype, masked):
    rng = np.random.default_rng(3)
    values = rng.gamma(1.0, 1.5, SAMPLES)
    mask = rng.random(SAMPLES) < 0.7 if masked else None
    with enable_x64(True):
        tensor, array, exact = pair(values, dtype)
        where = {"where": None if mask is None else torch.as_tensor(mask)}
        where_jax = {"where": None if mask is None else jnp.asarray(mask)}
        expected = reference.sample_weights(exact, weighting, where=mask)
        relative = tolerance(dtype, weighting)
        from_torch = rgd.torch.sample_weights(tensor, weighting, **where).double().numpy()
        if mask is None:
            from_jax = np.asarray(rgd.jax.sample_weights(array, weighting), np.float64)
            np.testing.assert_allclose(from_jax, expected, rtol=relative)
        np.testing.assert_allclose(from_torch, expected, rtol=relative)
        mean = reference.reweighted_mean(exact, weighting, where=mask)
        # torch rounds the mean to the losses' dtype, as `losses.mean()` does; JAX leaves it wide.
        rounded = float(torch.finfo(getattr(torch, dtype)).eps)
        torch_mean = float(rgd.torch.reweighted_mean(tensor, weighting, **where))
        jax_mean = float(rgd.jax.reweighted_mean(array, weighting, **where_jax))
        assert torch_mean == pytest.approx(mean, rel=relative + rounded)
        assert jax_mean == pytest.approx(mean, rel=relative)
        if mask is None and dtype in ("float64", "float32"):
            from_numpy = rgd.sample_weights(tensor.numpy(), weighting)
            np.testing.assert_array_equal(from_numpy, rgd.torch.sample_weights(tensor, weighting).numpy())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_cross_entropy_and_its_gradient_agree_in_every_front(weighting, dtype, kind):
    rng = np.random.default_rng(4)
    logits, class_weight = 2 * rng.normal(size=(SAMPLES, CLASSES)), rng.random(CLASSES) + 0.1
    labels = rng.integers(0, CLASSES, SAMPLES)
    labels[::5] = -100
    options = {"label_smoothing": 0.1, "weighting": weighting}
    with enable_x64(True):
        tensor, array, exact = pair(logits, dtype)
        weight, weight_jax, weight_exact = pair(class_weight, "float64" if dtype == "float64" else "float32")
        if kind == "indices":
            target, target_jax, target_exact = torch.as_tensor(labels), jnp.asarray(labels), labels
        else:
            probabilities = np.exp(rng.normal(size=logits.shape))
            probabilities /= probabilities.sum(1, keepdims=True)
            target, target_jax, target_exact = pair(probabilities, dtype)
        value = reference.cross_entropy(exact, target_exact, weight_exact, **options)
        grad = reference.cross_entropy_grad(exact, target_exact, weight_exact, **options)

        leaf = tensor.requires_grad_()
        objective = rgd.torch.cross_entropy(leaf, target, weight, **options)
        objective.backward()
        jax_value, jax_grad = jax.value_and_grad(rgd.jax.cross_entropy)(
            array, target_jax, weight_jax, **options
        )

        relative = tolerance(dtype, weighting)
        rounded = float(torch.finfo(getattr(torch, dtype)).eps)
        assert objective.item() == pytest.approx(float(value), rel=relative + rounded)
        assert float(jax_value) == pytest.approx(float(value), rel=relative + rounded)
        for actual in (leaf.grad.double().numpy(), np.asarray(jax_grad, np.float64)):
            largest = float(np.abs(grad).max())
            # float16 holds nothing smaller than its subnormals, 6e-8 apart.
            smallest = 6e-8 if dtype == "float16" else 0.0
            np.testing.assert_allclose(
                actual, grad, rtol=relative + rounded, atol=relative * largest + smallest
            )
