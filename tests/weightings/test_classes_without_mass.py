"""0 times -inf is 0: a class of logit -inf without mass in the target is as if it did not exist.

`F.cross_entropy` gives NaN there. A class of logit -inf that has mass makes an infinite loss, as in torch.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rgd
import rgd.jax
import torch
import torch.nn.functional as F
from rgd import reference
from rgd.torch import RGDLoss, backend, cross_entropy, linear_cross_entropy
from x64 import enable_x64

INF = math.inf
# Both loops of the kernel, the second with and without a rest.
CLASSES = [5, 40, 64]
# JAX compiles each number anew, and a class axis has no loop there.
COMPILED = ("jnp", "linear jnp")
GONE = [1, 3]
TERMS = 64 * 6 + 16


@pytest.fixture(autouse=True)
def float64():
    with enable_x64(True):
        yield


def problem(classes, dtype="float64"):
    """Logits of which two classes are -inf, mixed targets without mass on them, and the other classes."""
    rng = np.random.default_rng(classes)
    logits = 3 * rng.standard_normal((6, classes))
    logits[:, GONE] = -INF
    target = rng.dirichlet(np.ones(classes), 6)
    target[:, GONE] = 0
    target /= target.sum(1, keepdims=True)
    left = np.setdiff1d(np.arange(classes), GONE)
    return logits.astype(dtype), target.astype(dtype), left


def by_torch(name):
    def front(logits, target, **options):
        x = torch.tensor(logits).requires_grad_()
        options = {key: torch.as_tensor(v) if isinstance(v, np.ndarray) else v for key, v in options.items()}
        with backend(name) as ran:
            value = cross_entropy(x, torch.tensor(target), **options)
        assert ran == [name]
        return value.detach().numpy(), torch.autograd.grad(value.sum(), x)[0].numpy()

    return front


def by_strided_torch(logits, target, **options):
    """With the class axis the second of three, in the kernel's other loop."""

    def spread(array):
        return np.ascontiguousarray(array[:, None]).swapaxes(1, 2) if array.ndim > 1 else array[:, None]

    value, gradient = by_torch("rust")(spread(logits), spread(target), **options)
    return value.reshape(-1) if value.ndim else value, gradient[:, :, 0]


def by_linear_torch(name):
    """The gradient of the inputs under an identity is that of the logits."""

    def front(logits, target, **options):
        finite = np.isfinite(logits).all(0)
        x = torch.tensor(np.where(finite, logits, 0)).requires_grad_()
        bias = torch.tensor(np.where(finite, 0, -INF).astype(logits.dtype))
        options = {key: torch.as_tensor(v) if isinstance(v, np.ndarray) else v for key, v in options.items()}
        with backend(name):
            value = linear_cross_entropy(
                x,
                torch.eye(len(bias), dtype=x.dtype),
                torch.tensor(target),
                linear_bias=bias,
                chunk_bytes=1000,
                **options,
            )
        return value.detach().numpy(), torch.autograd.grad(value.sum(), x)[0].numpy()

    return front


def by_jax(name):
    def front(logits, target, **options):
        def total(x):
            value = rgd.jax.cross_entropy(x, jnp.asarray(target), backend=name, **options)
            return jnp.sum(value), value

        (_, value), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(logits))
        return np.asarray(value), np.asarray(gradient)

    return front


def by_linear_jax(logits, target, **options):
    finite = np.isfinite(logits).all(0)
    bias = np.where(finite, 0, -INF).astype(logits.dtype)

    def total(x):
        value = rgd.jax.linear_cross_entropy(
            x, jnp.eye(len(bias), dtype=x.dtype), target, bias, chunk_bytes=1000, **options
        )
        return jnp.sum(value), value

    (_, value), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(np.where(finite, logits, 0)))
    return np.asarray(value), np.asarray(gradient)


def by_reference(logits, target, **options):
    value = reference.cross_entropy(logits, target, **options)
    return value, reference.cross_entropy_grad(logits, target, **options)


SOFT = {
    "rust": by_torch("rust"),
    "composite": by_torch("composite"),
    "strided": by_strided_torch,
    "linear rust": by_linear_torch("rust"),
    "linear composite": by_linear_torch("composite"),
    "jnp": by_jax("jnp"),
    "reference": by_reference,
}
# Class weights have no kernel in JAX.
HARD = {**SOFT, "linear jnp": by_linear_jax}


def sized(fronts, sizes=CLASSES):
    """Each front by its name with each number of classes that may change what it does."""
    return [(name, n) for name in fronts for n in (sizes[:1] if name in COMPILED else sizes)]


def close(actual, expected, dtype):
    tolerance = TERMS * np.finfo(dtype).eps
    scale = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize(("name", "classes"), sized(SOFT))
@pytest.mark.parametrize("weighting", [rgd.KL(), rgd.CVaR(0.5), rgd.ERM()], ids=str)
def test_probabilities_of_zero_on_a_class_of_minus_infinity_are_as_without_the_class(
    weighting, name, classes
):
    front = SOFT[name]
    logits, target, left = problem(classes)
    c = np.linspace(0.5, 2, classes)
    for reduction in ("mean", "none"):
        for weight in (None, c):
            options = {"weighting": weighting, "reduction": reduction}
            expected = by_reference(
                logits[:, left],
                target[:, left],
                weight=None if weight is None else weight[left],
                **options,
            )
            value, gradient = front(logits, target, weight=weight, **options)
            close(value, expected[0], "float64")
            close(gradient[:, left], expected[1], "float64")
            np.testing.assert_array_equal(gradient[:, GONE], 0)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("classes", CLASSES)
def test_they_are_right_in_every_precision(classes, dtype):
    logits, target, left = problem(classes)
    x = torch.tensor(logits).to(getattr(torch, dtype))
    t = torch.tensor(target).to(getattr(torch, dtype))
    exact = x.double().numpy()[:, left], t.double().numpy()[:, left]
    expected, slope = by_reference(*exact)
    eps = torch.finfo(x.dtype).eps if x.element_size() == 2 else 0.0
    for name in ("rust", "composite"):
        leaf = x.clone().requires_grad_()
        with backend(name):
            value = cross_entropy(leaf, t)
        (gradient,) = torch.autograd.grad(value, leaf)
        tolerance = eps + TERMS * np.finfo(np.float32).eps
        np.testing.assert_allclose(value.double().detach(), expected, rtol=tolerance)
        atol = tolerance * np.abs(slope).max()
        np.testing.assert_allclose(gradient.double()[:, left], slope, rtol=tolerance, atol=atol)
        assert not gradient[:, GONE].any()


def test_the_loss_is_that_of_optax():
    logits, target, _ = problem(5)
    expected = optax.losses.safe_softmax_cross_entropy(logits, target)
    for front in SOFT.values():
        close(front(logits, target, weighting=rgd.ERM(), reduction="none")[0], expected, "float64")


def test_a_mixed_batch_trains_where_the_prior_rules_a_class_out():
    logits, target = problem(5)[:2]
    logits[:, GONE] = 1.0
    prior = rgd.log_prior([90, 0, 10, 0, 5])
    expected = by_reference(logits, target, logit_adjustment=prior)
    assert np.isfinite(expected[0])
    assert np.isfinite(expected[1]).all()
    for front in SOFT.values():
        value, gradient = front(logits, target, logit_adjustment=prior)
        close(value, expected[0], "float64")
        close(gradient, expected[1], "float64")
    compiled = torch.compile(
        RGDLoss(logit_adjustment=torch.tensor(prior)), backend="aot_eager", fullgraph=True
    )
    for name in ("rust", "composite"):
        torch._dynamo.reset()
        leaf = torch.tensor(logits).requires_grad_()
        with backend(name):
            value = compiled(leaf, torch.tensor(target))
        value.backward()
        close(value.detach().numpy(), expected[0], "float64")
        close(leaf.grad.numpy(), expected[1], "float64")


@pytest.mark.parametrize(("name", "classes"), sized(HARD))
def test_a_class_of_weight_zero_and_logit_minus_infinity_costs_nothing(name, classes):
    front = HARD[name]
    logits, _, left = problem(classes)
    labels = np.random.default_rng(3).choice(left, 6)
    labels[2] = GONE[0]  # a label without mass of its own
    c = np.linspace(0.5, 2, classes)
    c[GONE] = 0
    for smoothing in (0.0, 0.3, 1.0):
        # Finite logits of weight 0 give the same, once their exponentials are 0.
        finite = np.where(np.isneginf(logits), -1e3, logits)
        options = {"weight": c, "label_smoothing": smoothing, "weighting": rgd.ERM(), "reduction": "sum"}
        expected = by_reference(finite, labels, **options)
        value, gradient = front(logits, labels, **options)
        close(value, expected[0], "float64")
        close(gradient, expected[1], "float64")


@pytest.mark.parametrize(("name", "classes"), sized(HARD))
def test_smoothing_gives_a_class_of_minus_infinity_mass_and_an_infinite_loss_as_in_torch(name, classes):
    front = HARD[name]
    logits, target, left = problem(classes)
    labels = np.random.default_rng(3).choice(left, 6)
    for given in (labels, target) if front is not by_linear_jax else (labels,):
        x = torch.tensor(logits).requires_grad_()
        torchs = F.cross_entropy(x, torch.tensor(given), label_smoothing=0.1)
        torchs.backward()
        value, gradient = front(logits, given, label_smoothing=0.1, weighting=rgd.ERM())
        assert value == torchs.item() == INF
        close(gradient, x.grad.numpy(), "float64")


# The helpers of the linear heads keep what is not finite in the bias, which all rows share.
DENSE = {name: front for name, front in HARD.items() if "linear" not in name}


@pytest.mark.parametrize("front", DENSE.values(), ids=DENSE)
@pytest.mark.parametrize("held", [math.nan, INF])
def test_nan_and_infinity_without_mass_still_make_the_loss_nan(held, front):
    logits, target, left = problem(5)
    logits[2, GONE[0]] = held
    c = np.linspace(0.5, 2, 5)
    c[GONE] = 0
    labels = np.random.default_rng(3).choice(left, 6)
    for given, options in (
        (target, {}),
        (labels, {"weight": c}),
        (labels, {"weight": c, "label_smoothing": 0.2}),
    ):
        losses, gradient = front(logits, given, reduction="none", weighting=rgd.ERM(), **options)
        np.testing.assert_array_equal(np.isnan(losses), np.arange(6) == 2)
        np.testing.assert_array_equal(np.isnan(gradient).any(1), np.arange(6) == 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("name", "classes"), sized(HARD, [5, 40]))
def test_targets_of_class_weight_zero_alone_have_the_mean_of_torch(name, classes, smoothing):
    front = HARD[name]
    logits, _, left = problem(classes)
    logits = np.where(np.isneginf(logits), 0.5, logits)
    c = np.ones(classes)
    c[left[0]] = 0
    labels = np.full(6, left[0])
    x = torch.tensor(logits).requires_grad_()
    torchs = F.cross_entropy(x, torch.tensor(labels), torch.tensor(c), label_smoothing=smoothing)
    torchs.backward()
    assert torchs.isnan()
    assert x.grad.isnan().all()
    for weighting in (rgd.KL(), rgd.KLBall(0.1)):
        value, gradient = front(logits, labels, weight=c, label_smoothing=smoothing, weighting=weighting)
        assert np.isnan(value)
        assert np.isnan(gradient).all()
        total, _ = front(
            logits, labels, weight=c, label_smoothing=smoothing, weighting=weighting, reduction="sum"
        )
        assert np.isfinite(total)


def test_the_kernel_of_jax_takes_a_label_without_mass():
    logits, _, left = problem(40)
    labels = np.random.default_rng(3).choice(left, 6)
    labels[2] = GONE[0]
    for smoothing in (0.0, 1.0):
        options = {"label_smoothing": smoothing, "weighting": rgd.KL()}
        results = [by_jax(name)(logits, labels, **options) for name in ("jnp", "rust")]
        expected = by_reference(logits, labels, **options)
        for value, gradient in results:
            assert value == expected[0] == INF
            close(gradient, expected[1], "float64")


@pytest.mark.parametrize("name", ["rust", "composite"])
def test_second_derivatives_are_finite_too(name):
    logits, target, left = problem(5)
    x = torch.tensor(logits).requires_grad_()
    with backend(name):
        value = cross_entropy(x, torch.tensor(target), weighting=rgd.ERM())
    (slope,) = torch.autograd.grad(value, x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.square().sum(), x)

    def steepness(x):
        return jnp.sum(
            jax.grad(lambda x: rgd.jax.cross_entropy(x, target[:, left], weighting=rgd.ERM()))(x) ** 2
        )

    close(
        curvature.numpy()[:, left], np.asarray(jax.grad(steepness)(jnp.asarray(logits[:, left]))), "float64"
    )
    assert not curvature[:, GONE].any()


def test_the_slope_of_probabilities_is_that_of_the_loss_where_it_is_finite():
    logits, target, left = problem(5)
    t = torch.tensor(target).requires_grad_()
    cross_entropy(torch.tensor(logits), t, weighting=rgd.ERM(), reduction="sum").backward()
    x = torch.tensor(logits)
    torch.testing.assert_close(t.grad[:, left], -F.log_softmax(x, 1)[:, left])
    slope = jax.grad(lambda t: rgd.jax.cross_entropy(logits, t, weighting=rgd.ERM(), reduction="sum"))(target)
    close(np.asarray(slope)[:, left], t.grad.numpy()[:, left], "float64")
    assert np.isfinite(slope).all()
    assert t.grad.isfinite().all()
