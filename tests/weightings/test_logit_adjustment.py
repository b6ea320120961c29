"""`logit_adjustment=`: the loss of `logits + a`, in every front, with everything else a loss can have.

The plain check is `F.cross_entropy(logits + a)`; with weights it is `rgd.reference`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rgd
import rgd.jax
import torch
import torch.nn.functional as F
from rgd import reference
from rgd.torch import RGDLoss, backend, cross_entropy
from torch._dynamo.testing import CompileCounterWithBackend
from x64 import enable_x64

INF, NAN = math.inf, math.nan
# Rows of few and of many classes, one class axis that is not the last, and a single sample: both loops of the
# kernel, with and without a rest.
SHAPES = [(6,), (9, 4), (5, 40), (3, 130), (2, 33, 5)]
WEIGHTINGS = [rgd.KL(), rgd.KL(INF, scale=-0.7), rgd.KLBall(0.1), rgd.CVaR(0.5), rgd.ERM()]


def problem(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    classes = shape[1 if len(shape) > 1 else 0]
    logits = (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    target = torch.randint(classes, shape[:1] + shape[2:] if len(shape) > 1 else (), generator=generator)
    adjustment = torch.as_tensor(rgd.log_prior(np.arange(1, classes + 1) ** 2))
    return logits, target, adjustment


def shaped(adjustment, logits):
    return adjustment.view(-1, *[1] * max(logits.dim() - 2, 0))


def value_and_grad(function, logits):
    logits = logits.detach().clone().requires_grad_()
    value = function(logits)
    return value.detach(), torch.autograd.grad(value.sum(), logits)[0]


def bound(dtype, terms):
    """Roundings of sums over the classes and the batch in the accumulator, and one to the dtype."""
    accumulator = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    own = 0.0 if torch.finfo(dtype).bits >= 32 else torch.finfo(dtype).eps
    return (terms + 16) * accumulator + own


def wide(numbers):
    return numbers.double().numpy() if isinstance(numbers, torch.Tensor) else np.asarray(numbers, np.float64)


def close(actual, expected, tolerance):
    """Relative to each number, or to the largest that is finite."""
    actual, expected = wide(actual), wide(expected)
    scale = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * scale)


OPTIONS = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "weight": True},
    {"label_smoothing": 1.0, "weight": True},
]


@pytest.mark.parametrize("name", ["rust", "composite"])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_weights_it_is_the_cross_entropy_of_the_adjusted_logits(shape, options, soft, name):
    for dtype in (torch.float64, torch.float32):
        logits, target, adjustment = problem(shape, dtype)
        given = dict(options)
        if soft:
            target = torch.rand(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
        if given.pop("weight", False):
            given["weight"] = torch.linspace(0.5, 2, len(adjustment), dtype=dtype)
        expected = value_and_grad(
            lambda x, t=target, a=adjustment, g=given: F.cross_entropy(x + shaped(a.to(x.dtype), x), t, **g),
            logits,
        )
        with backend(name) as ran:
            result = value_and_grad(
                lambda x, t=target, a=adjustment, g=given: cross_entropy(
                    x, t, weighting=rgd.ERM(), logit_adjustment=a, **g
                ),
                logits,
            )
        assert ran == [name]
        for mine, torchs in zip(result, expected, strict=True):
            close(mine, torchs, bound(dtype, logits.numel()))


@pytest.mark.parametrize("name", ["rust", "composite"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
@pytest.mark.parametrize("per", ["element", "sample"])
def test_torch_gives_the_weights_and_the_gradient_of_the_reference(per, weighting, dtype, name):
    for shape in ((7, 5), (4, 40), (3, 33, 4)):
        logits, target, adjustment = problem(shape, dtype)
        target.view(-1)[1] = -100
        mass = torch.arange(1.0, shape[0] + 1)
        given = {"ignore_index": -100, "label_smoothing": 0.1, "per": per, "weighting": weighting}
        arrays = [logits.double().numpy(), target.numpy(), np.linspace(0.5, 2, shape[1])]
        adjusting = {"logit_adjustment": adjustment.float().double().numpy(), "sample_weight": mass.numpy()}
        expected = reference.cross_entropy(*arrays, **given, **adjusting)
        gradient = reference.cross_entropy_grad(*arrays, **given, **adjusting)
        with backend(name):
            value, grad = value_and_grad(
                lambda x, t=target, a=adjustment, g=given, m=mass: cross_entropy(
                    x, t, torch.linspace(0.5, 2, len(a), dtype=torch.float64), sample_weight=m,
                    logit_adjustment=a.float(), **g,
                ),
                logits,
            )  # fmt: skip
        # The root of a ball is exact to 1e-10 in its divergence; float16 has subnormal gradients.
        tolerance = bound(dtype, logits.numel()) + (1e-9 if isinstance(weighting, rgd.KLBall) else 0)
        tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps if dtype is torch.float16 else 0.0
        close(value, expected, tolerance)
        scale = float(np.abs(gradient).max())
        np.testing.assert_allclose(
            grad.double().numpy(), gradient, rtol=tolerance, atol=tolerance * scale + tiny
        )


# The kernel has a loop for few and for many classes, and jnp none.
IN_JAX = [("rust", (7, 5)), ("rust", (33, 101)), ("rust", (2, 3, 64)), ("jnp", (2, 3, 64))]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("which", "shape"), IN_JAX)
def test_jax_gives_the_value_and_the_gradient_of_the_reference(shape, dtype, which):
    with enable_x64(dtype == "float64"):
        rng = np.random.default_rng(0)
        logits = jnp.asarray(2 * rng.standard_normal(shape)).astype(dtype)
        labels = rng.integers(0, shape[-1], shape[:-1])
        labels.reshape(-1)[0] = -100
        adjustment = rgd.log_prior(np.arange(1, shape[-1] + 1)).astype(np.float32)
        mass = np.arange(1.0, shape[0] + 1)
        given = {"weighting": rgd.KL(2.0), "label_smoothing": 0.1, "reduction": "sum", "sample_weight": mass}
        step = jax.jit(
            jax.value_and_grad(
                lambda z, a: rgd.jax.cross_entropy(z, labels, logit_adjustment=a, backend=which, **given)
            )
        )
        value, gradient = step(logits, jnp.asarray(adjustment))
        assert gradient.dtype == dtype
        exact = np.moveaxis(np.asarray(logits.astype("float32" if dtype != "float64" else dtype)), -1, 1)
        given["logit_adjustment"] = adjustment.astype(np.float64)
        tolerance = 4 * bound(getattr(torch, dtype), logits.size)
        close(value, reference.cross_entropy(exact, labels, **given), tolerance)
        expected = np.moveaxis(reference.cross_entropy_grad(exact, labels, **given), 1, -1)
        close(np.asarray(gradient, np.float64), expected, tolerance)


@pytest.mark.parametrize("which", ["jnp", "rust"])
def test_jax_maps_over_adjustments(which):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((4, 9, 65)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 65, (4, 9)))
    adjustments = jnp.asarray(rng.standard_normal((4, 65)), jnp.float32)

    @jax.jit
    def step(z, y, a):
        return jax.value_and_grad(
            lambda z: rgd.jax.cross_entropy(z, y, logit_adjustment=a, backend=which, tau=2.0)
        )(z)

    mapped = jax.vmap(step)(logits, labels, adjustments)
    for i in range(4):
        value, gradient = step(logits[i], labels[i], adjustments[i])
        close(mapped[0][i], value, bound(torch.float32, 9 * 65))
        close(mapped[1][i], gradient, bound(torch.float32, 65))
    one = jax.vmap(step, in_axes=(None, None, 0))(logits[0], labels[0], adjustments)
    close(one[0][0], mapped[0][0], bound(torch.float32, 9 * 65))


def test_jax_has_no_gradient_through_the_adjustment_and_takes_class_probabilities():
    rng = np.random.default_rng(0)
    logits, q = jnp.asarray(rng.standard_normal((5, 4))), jnp.asarray(rng.random((5, 4)))
    a = jnp.asarray([0.0, 1.0, -2.0, 3.0])
    for which, target in (("jnp", q), ("rust", jnp.arange(5) % 4)):
        gradient = jax.jit(
            jax.grad(
                lambda a, t=target, w=which: rgd.jax.cross_entropy(logits, t, logit_adjustment=a, backend=w)
            )
        )(a)
        np.testing.assert_array_equal(gradient, 0)
    given = {"weight": np.array([1.0, 2.0, 3.0, 4.0]), "weighting": rgd.KLBall(0.1)}
    value = jax.jit(lambda a: rgd.jax.cross_entropy(logits, q, logit_adjustment=a, **given))(a)
    close(
        value,
        reference.cross_entropy(np.asarray(logits), np.asarray(q), logit_adjustment=a, **given),
        1e-5,  # float32, and a ball's root of float32 losses
    )


@pytest.mark.parametrize("name", ["rust", "composite"])
@pytest.mark.parametrize("classes", [5, 40])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_class_of_minus_infinity_is_ruled_out_as_in_torch(smoothing, classes, name):
    logits, target, adjustment = problem((8, classes), torch.float32)
    adjustment = adjustment.float()
    adjustment[2] = -INF
    target[:] = torch.arange(8) % 2
    target[3] = 2
    given = {"label_smoothing": smoothing, "reduction": "none"}
    expected = value_and_grad(lambda x: F.cross_entropy(x + adjustment, target, **given), logits)
    with backend(name):
        result = value_and_grad(
            lambda x: cross_entropy(x, target, weighting=rgd.ERM(), logit_adjustment=adjustment, **given),
            logits,
        )
    assert expected[0][3] == INF
    for mine, torchs in zip(result, expected, strict=True):
        close(mine, torchs, bound(torch.float32, classes))
    if not smoothing:
        np.testing.assert_array_equal(result[1][np.arange(8) != 3, 2], 0)


@pytest.mark.parametrize("name", ["rust", "composite"])
@pytest.mark.parametrize("classes", [5, 40])
def test_nan_in_the_adjustment_reaches_every_loss(classes, name):
    logits, target, adjustment = problem((8, classes), torch.float32)
    adjustment[1] = NAN
    with backend(name):
        losses, grad = value_and_grad(
            lambda x: cross_entropy(x, target, reduction="none", logit_adjustment=adjustment), logits
        )
    assert losses.isnan().all()
    assert grad.isnan().all()


@pytest.mark.parametrize("name", ["rust", "composite"])
def test_derivatives_are_those_of_differences(name):
    logits, target, adjustment = problem((4, 5))
    logits.requires_grad_()
    # The weights are constants of the gradient, so differences see plain weights only.
    with backend(name):
        given = {"weighting": rgd.ERM(), "logit_adjustment": adjustment, "label_smoothing": 0.1}
        assert torch.autograd.gradcheck(lambda x: cross_entropy(x, target, **given), logits)
        assert torch.autograd.gradgradcheck(lambda x: cross_entropy(x, target, **given), logits)


def test_the_adjustment_is_a_constant_of_the_gradient():
    logits, target, adjustment = problem((4, 5))
    adjustment.requires_grad_()
    for name in ("rust", "composite"):
        with backend(name):
            value = cross_entropy(logits, target, logit_adjustment=adjustment)
        assert not value.requires_grad


@pytest.mark.parametrize(
    ("weighting", "compiler"), [(rgd.KL(), "inductor"), (rgd.CVaR(0.5), "aot_eager")], ids=str
)
def test_one_compiled_graph_serves_every_adjustment(weighting, compiler):
    logits, target, adjustment = problem((6, 40), torch.float32)

    def loss(x, a):
        return cross_entropy(x, target, weighting=weighting, logit_adjustment=a)

    torch.compiler.reset()
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for a in (adjustment, 2 * adjustment, torch.zeros_like(adjustment)):
        expected = value_and_grad(lambda x, a=a: loss(x, a), logits)
        result = value_and_grad(lambda x, a=a: compiled(x, a), logits)
        for mine, eager in zip(result, expected, strict=True):
            close(mine, eager, bound(torch.float32, logits.numel()))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["rust", "composite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighting", [rgd.KL(), rgd.CVaR(0.5)], ids=str)
def test_in_the_place_of_the_logits_the_gradient_is_the_same(weighting, dtype, name):
    for shape in ((6, 5), (4, 40), (2, 33, 5)):
        logits, target, adjustment = problem(shape, dtype)
        given = {"weighting": weighting, "logit_adjustment": adjustment, "label_smoothing": 0.1}
        with backend(name):
            expected = value_and_grad(lambda x, t=target, g=given: cross_entropy(x, t, **g), logits)
            result = value_and_grad(
                lambda x, t=target, g=given: cross_entropy(x + 0, t, inplace=True, **g), logits
            )
        for mine, separate in zip(result, expected, strict=True):
            close(mine, separate, bound(dtype, logits.numel()))


def test_torch_maps_over_adjustments():
    logits, target, adjustment = problem((6, 5))
    many = torch.stack([adjustment, 2 * adjustment, torch.zeros_like(adjustment)])
    mapped = torch.func.vmap(lambda a: cross_entropy(logits, target, logit_adjustment=a))(many)
    for a, value in zip(many, mapped, strict=True):
        close(value, cross_entropy(logits, target, logit_adjustment=a), bound(torch.float64, 30))


def test_the_module_keeps_the_adjustment_and_evaluates_with_it():
    logits, target, adjustment = problem((6, 5), torch.float32)
    criterion = RGDLoss(tau=2.0, logit_adjustment=adjustment)
    assert torch.equal(criterion.state_dict()["logit_adjustment"], adjustment)
    assert "logit_adjustment" not in RGDLoss().state_dict()
    expected = cross_entropy(logits, target, tau=2.0, logit_adjustment=adjustment)
    assert torch.equal(criterion(logits, target), expected)
    other = RGDLoss(tau=2.0, logit_adjustment=torch.zeros(5, dtype=torch.float64))
    other.load_state_dict(criterion.state_dict())
    assert torch.equal(other(logits, target), expected)
    plain = F.cross_entropy(logits + adjustment.float(), target)
    close(criterion.eval()(logits, target), plain, bound(torch.float32, 30))
    criterion.logit_adjustment = None
    close(criterion(logits, target), F.cross_entropy(logits, target), bound(torch.float32, 30))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([0.0] * 5, TypeError, "pass torch.as_tensor"),
        (np.zeros(5, int), TypeError, "pass torch.as_tensor"),
        (0.5, TypeError, "got float"),
        (torch.zeros(1, 5), ValueError, r"vector of one float a class, got shape \(1, 5\)"),
        (torch.zeros(5, dtype=torch.int64), ValueError, "torch.int64"),
        (torch.zeros(4), ValueError, "each of the 5 classes, got 4"),
        (torch.zeros(5, device="meta"), ValueError, "input is on cpu and logit_adjustment on meta"),
    ],
    ids=["list", "array of integers", "number", "matrix", "integers", "length", "device"],
)
def test_torch_refuses_an_adjustment_that_does_not_fit(given, error, message):
    logits, target, _ = problem((6, 5))
    with pytest.raises(error, match=message):
        cross_entropy(logits, target, logit_adjustment=given)
    with pytest.raises(error, match=message):
        RGDLoss(logit_adjustment=given)(logits, target)


def test_with_base_the_adjustment_is_refused():
    base = torch.nn.BCEWithLogitsLoss(reduction="none")
    with pytest.raises(ValueError, match="add it to the logits that base gets"):
        RGDLoss(base=base, logit_adjustment=torch.zeros(5))


def test_jax_and_the_reference_refuse_an_adjustment_that_does_not_fit():
    logits, labels = np.zeros((6, 5)), np.zeros(6, np.int64)
    with pytest.raises(ValueError, match=r"logit_adjustment must have one entry a class, shape \(5,\)"):
        rgd.jax.cross_entropy(logits, labels, logit_adjustment=np.zeros(4))
    with pytest.raises(TypeError, match="logit_adjustment must be floating"):
        rgd.jax.cross_entropy(logits, labels, logit_adjustment=np.zeros(5, int))
    with pytest.raises(ValueError, match=r"logit_adjustment must have one entry a class, shape \(5,\)"):
        reference.cross_entropy(logits, labels, logit_adjustment=np.zeros(4))
