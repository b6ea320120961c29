"""The computation in torch operations against the Rust kernels and against the float64 reference."""

import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rgd import KL, KLBall, reference
from rgd.torch import RGDLoss, backend, cross_entropy, reweighted_mean, sample_weights

INF, NAN = math.inf, math.nan
WEIGHTINGS = [
    KL(),
    KL(0.5, scale=2.0),
    KL(scale=0.0),
    KL(normalize=True),
    KL(INF, scale=0.7, normalize=True),
    KLBall(0.1),
    KLBall(1e-8),
    KLBall(0.0),
    KLBall(50.0),
]
# A logarithm of a softmax over 30 classes, an exponential of at most 1, a sum of 40 terms in pairs and a
# division: at most 16 roundings in a row.
ROUNDINGS = {dtype: 16 * torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32)}
SHAPES = [(5,), (12, 4), (40, 30), (3, 4, 5), (2, 3, 4, 2)]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def composite(function, *args, **kwargs):
    with backend("composite") as ran:
        result = function(*args, **kwargs)
    assert ran == ["composite"]
    return result


def rust(function, *args, **kwargs):
    with backend("rust") as ran:
        result = function(*args, **kwargs)
    assert ran == ["rust"]
    return result


def batch(shape, dtype=torch.float64, soft=False, ignored=True):
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    logits = torch.randn(shape, dtype=dtype, generator=generator) * 3
    axis = 1 if len(shape) > 1 else 0
    if soft:
        return logits, torch.randn(shape, dtype=dtype, generator=generator).softmax(axis)
    target = torch.randint(0, shape[axis], shape[:axis] + shape[axis + 1 :], generator=generator)
    if ignored and len(shape) > 1:
        target[0] = -100
    return logits, target


def value_and_grad(logits, target, weight, **kwargs):
    logits = logits.clone().requires_grad_()
    value = cross_entropy(logits, target, weight, **kwargs)
    upstream = torch.linspace(1, 2, max(value.numel(), 1), dtype=value.dtype).view(value.shape)
    (grad,) = torch.autograd.grad(value, logits, upstream)
    return value.detach(), grad


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (1000,)], ids=str)
def test_weights_agree_with_the_kernels_and_the_reference(weighting, shape):
    losses = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).exp() * 3 - 2
    weights = composite(sample_weights, losses, weighting)
    torch.testing.assert_close(weights, rust(sample_weights, losses, weighting), rtol=1e-13, atol=0)
    expected = reference.sample_weights(losses.numpy(), weighting)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-13, atol=0)
    narrow = composite(sample_weights, losses.float(), weighting)
    assert narrow.dtype == torch.float32
    eps = torch.finfo(torch.float32).eps  # one rounding, of a value computed in float64
    torch.testing.assert_close(narrow, rust(sample_weights, losses.float(), weighting), rtol=eps, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
@pytest.mark.parametrize(
    "losses",
    [
        [1.0, INF, 2.0],
        [INF, INF],
        [-INF, 1.0, 2.0],
        [-INF, INF, 0.0],
        [-INF, -INF],
        [NAN, 1.0, 2.0],
        [NAN, INF],
        [2.0, 2.0, 2.0],
        [1.0, 2.0, 2.0],
        [5.0],
        [1e308, -1e308],
        [],
    ],
    ids=str,
)
def test_extreme_losses_get_the_weights_of_the_reference(weighting, losses):
    losses = torch.tensor(losses, dtype=torch.float64)
    with np.errstate(all="ignore"):
        expected = reference.sample_weights(losses.numpy(), weighting)
    np.testing.assert_allclose(composite(sample_weights, losses, weighting).numpy(), expected, rtol=1e-13)


@pytest.mark.parametrize("radius", [1e-12, 1e-4, 0.5, 0.999])
def test_the_root_of_the_ball_is_found_for_hostile_batches(radius):
    rng = np.random.default_rng(0)
    batches = [
        np.r_[np.zeros(999), 1.0],
        np.r_[1.0, 1 - 1e-9 * rng.random(500), 0.0],
        np.r_[rng.random(3000) * 1e-6, 5.0],
        np.exp(3 * rng.normal(size=4000)),
        rng.integers(0, 3, 50).astype(float),
        np.array([0.0, 1e-300, 1e300]),
    ]
    for losses in batches:
        limit = math.log(losses.size / np.count_nonzero(losses == losses.max()))
        weighting = KLBall(radius * limit)
        weights = composite(sample_weights, torch.from_numpy(losses), weighting).numpy()
        kl = reference.weight_stats(losses, weights).kl_to_uniform
        # The reference's own sum for the divergence cancels to a few roundings of 1.
        assert abs(kl - radius * limit) < 1e-10 * radius * limit + 1e-14
        np.testing.assert_allclose(
            weights, reference.sample_weights(losses, weighting), rtol=1e-9, atol=1e-12 * losses.size
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
def test_cross_entropy_agrees_with_the_kernels_for_every_option(shape, soft, dtype):
    logits, target = batch(shape, dtype, soft)
    class_weight = torch.linspace(0.5, 2, shape[1 if len(shape) > 1 else 0], dtype=dtype)
    options = itertools.product(
        [None, class_weight],
        ["none", "mean", "sum"],
        [0.0, 0.2],
        ["element", "sample"],
        [KL(), KL(normalize=True), KLBall(0.1)],
    )
    for weight, reduction, smoothing, per, weighting in options:
        kwargs = {
            "reduction": reduction,
            "label_smoothing": smoothing,
            "per": per,
            "weighting": weighting,
        }
        value, grad = composite(value_and_grad, logits, target, weight, **kwargs)
        expected_value, expected_grad = rust(value_and_grad, logits, target, weight, **kwargs)
        rtol = ROUNDINGS[dtype]
        # The gradient is a difference, p - [k = y], of numbers up to 1: its error is absolute in the largest.
        largest = float(expected_grad.abs().max())
        torch.testing.assert_close(value, expected_value, rtol=rtol, atol=rtol * float(value.abs().max()))
        torch.testing.assert_close(grad, expected_grad, rtol=rtol, atol=rtol * largest)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("per", ["element", "sample"])
def test_cross_entropy_agrees_with_the_reference(shape, soft, per):
    logits, target = batch(shape, soft=soft)
    weight = torch.linspace(0.5, 2, shape[1 if len(shape) > 1 else 0], dtype=torch.float64)
    for reduction, weighting in itertools.product(["none", "mean", "sum"], WEIGHTINGS[:6]):
        kwargs = {"label_smoothing": 0.1, "reduction": reduction, "weighting": weighting, "per": per}
        value = composite(cross_entropy, logits, target, weight, **kwargs)
        expected = reference.cross_entropy(logits.numpy(), target.numpy(), weight.numpy(), **kwargs)
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    logits, target = batch((40, 30), torch.float32)
    logits = logits.to(dtype)
    value, grad = composite(value_and_grad, logits, target, None)
    expected_value, expected_grad = rust(value_and_grad, logits, target, None)
    assert (value.dtype, grad.dtype) == (dtype, dtype)
    # Equal but for the last bit, where float32 results lie on two sides of a tie.
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(value, expected_value, rtol=ulp, atol=0)
    torch.testing.assert_close(
        grad, expected_grad, rtol=ulp, atol=8 * torch.finfo(torch.float32).eps * float(grad.abs().max())
    )


def test_float32_is_returned_for_half_logits_under_autocast():
    logits, target = batch((8, 3), torch.float32)
    for name, dtype in itertools.product(["rust", "composite"], [torch.bfloat16, torch.float16]):
        half = logits.to(dtype).requires_grad_()
        with backend(name), torch.autocast("cpu", torch.bfloat16):
            value = RGDLoss()(half, target)
            losses = sample_weights(half)
        value.backward()
        assert (value.dtype, losses.dtype, half.grad.dtype) == (torch.float32, torch.float32, dtype)
        torch.testing.assert_close(value, cross_entropy(half.float(), target))


@pytest.mark.parametrize("name", ["rust", "composite"])
def test_all_ignored_and_empty_batches_give_what_cross_entropy_loss_gives(name):
    logits, target = batch((4, 3))
    empty = (logits[:0], target[:0])
    with backend(name):
        for x, y in [(logits, torch.full_like(target, -100)), empty]:
            for per in ("element", "sample"):
                value, grad = value_and_grad(x, y, None, per=per)
                assert value.isnan()
                assert not grad.any()
                assert not cross_entropy(x, y, reduction="sum", per=per)
                assert not cross_entropy(x, y, reduction="none", per=per).any()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_logits_that_are_not_finite_do_what_cross_entropy_loss_does(value):
    logits, target = batch((4, 3))
    logits[1, 0] = logits[2, target[2]] = value
    erm = KL(scale=0.0)
    expected = F.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(
        composite(cross_entropy, logits, target, weighting=erm, reduction="none"), expected, equal_nan=True
    )


def test_an_infinite_loss_has_a_finite_weight_where_it_is_clipped():
    losses = torch.tensor([0.5, INF])
    weights = composite(sample_weights, losses, tau=1.0)
    torch.testing.assert_close(weights, torch.tensor([0.25, 0.5]).exp())


# Derivatives


# torch compiles decompositions with its own deprecated compiler when forward mode is first used.
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script:FutureWarning", "ignore:`torch.jit.script:DeprecationWarning"
)
def test_gradcheck_and_gradgradcheck_of_the_composite_with_constant_weights():
    for shape, soft in itertools.product([(4,), (3, 4), (2, 3, 2)], [False, True]):
        logits, target = batch(shape, soft=soft)
        logits.requires_grad_()
        inputs = (logits, target.requires_grad_()) if soft else (logits, target)
        for reduction in ("none", "mean"):

            def function(x, y, reduction=reduction):
                return cross_entropy(x, y, weighting=KL(scale=0.0), reduction=reduction, label_smoothing=0.1)

            with backend("composite"):
                assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
                assert torch.autograd.gradgradcheck(function, inputs)


def second_derivatives(objective, logits):
    """The gradient, and the gradient of its squares."""
    (grad,) = torch.autograd.grad(objective, logits, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), logits)
    return grad.detach(), second


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("per", ["element", "sample"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighting", [KL(), KLBall(0.2)], ids=str)
def test_double_backward_of_the_kernels_is_that_of_the_formula_with_frozen_weights(
    soft, per, reduction, weighting
):
    logits, target = batch((4, 3, 2), soft=soft)
    logits.requires_grad_()
    plain = F.cross_entropy(logits, target, reduction="none")
    counted = torch.ones_like(plain, dtype=torch.bool) if soft else target != -100
    means = plain.detach().sum(1) / counted.sum(1).clamp(min=1)
    if per == "element":
        weights = sample_weights(plain.detach(), weighting, where=counted)
    else:
        weights = sample_weights(means, weighting, where=counted.any(1)).unsqueeze(1)
    products = weights * plain
    formula = products.sum() / counted.sum() if reduction == "mean" else products.sum()
    objective = rust(cross_entropy, logits, target, weighting=weighting, per=per, reduction=reduction).sum()
    for got, expected in zip(
        second_derivatives(objective, logits), second_derivatives(formula, logits), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_double_backward_differentiates_the_upstream_gradient_too():
    logits, target = batch((4, 3))
    logits.requires_grad_()
    factor = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(cross_entropy(logits, target), logits, factor, create_graph=True)
    (of_factor,) = torch.autograd.grad(grad.sum() + grad[1, 0], factor)
    (plain,) = torch.autograd.grad(cross_entropy(logits, target), logits)
    torch.testing.assert_close(of_factor, plain.sum() + plain[1, 0])


def test_class_probabilities_that_require_grad_get_that_of_cross_entropy_loss():
    logits, target = batch((5, 4), soft=True)
    logits.requires_grad_()
    target.requires_grad_()
    for smoothing in (0.0, 0.3):
        with backend() as ran:
            value = cross_entropy(logits, target, weighting=KL(scale=0.0), label_smoothing=smoothing)
        assert ran == ["composite"]
        expected = F.cross_entropy(logits, target, label_smoothing=smoothing)
        torch.testing.assert_close(value, expected)
        got = torch.autograd.grad(value, (logits, target))
        torch.testing.assert_close(got, torch.autograd.grad(expected, (logits, target)))


def test_a_gradient_scaler_s_factor_multiplies_the_gradient_before_it_is_rounded_to_half():
    logits, target = batch((12, 4), torch.float16)
    factor = 2.0**14
    for name in ("rust", "composite"):
        scaled = logits.clone().requires_grad_()
        with backend(name):
            with torch.autocast("cpu", torch.bfloat16):
                value = RGDLoss()(scaled, target)
            (value * factor).backward()
            _, grad = value_and_grad(logits.float(), target, None)
        # One rounding to float16, and the float32 ones of a difference of numbers up to 1 before it.
        eps = torch.finfo(torch.float32).eps
        torch.testing.assert_close(scaled.grad.float() / factor, grad, rtol=2**-11, atol=8 * eps)


# Masks


@pytest.mark.parametrize("name", ["rust", "composite"])
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_masked_losses_take_no_part_whatever_they_are(name, weighting):
    losses = torch.rand(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
    where = losses > 1
    with backend(name):
        for rubbish in (7.0, NAN, INF, -INF):
            padded = losses.masked_fill(~where, rubbish).requires_grad_()
            weights = sample_weights(padded, weighting, where=where)
            assert not weights[~where].any()
            expected = reference.sample_weights(losses.numpy(), weighting, where.numpy())
            np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-13)
            mean = reweighted_mean(padded, weighting, where=where)
            np.testing.assert_allclose(
                mean.item(), reference.reweighted_mean(losses.numpy(), weighting, where.numpy()), rtol=1e-13
            )
            (grad,) = torch.autograd.grad(mean, padded)
            torch.testing.assert_close(grad, weights / where.sum())


@pytest.mark.parametrize("name", ["rust", "composite"])
def test_a_mask_of_false_gives_nan_as_the_mean_of_nothing_does(name):
    losses = torch.rand(3, 2, requires_grad=True)
    nothing = torch.zeros(3, 2, dtype=torch.bool)
    with backend(name):
        for weighting in WEIGHTINGS:
            assert reweighted_mean(losses, weighting, where=nothing).isnan()
            assert not sample_weights(losses, weighting, where=nothing).any()
        total = RGDLoss(base=lambda x: x, reduction="sum")(losses, where=nothing)
        assert total == 0
        assert RGDLoss(base=lambda x: x, per="sample")(losses, where=nothing).isnan()


@pytest.mark.parametrize("name", ["rust", "composite"])
@pytest.mark.parametrize("trailing", [(), (3,), (3, 2)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_base_losses_of_any_trailing_shape_are_weighted_per_sample_within_a_mask(name, trailing, reduction):
    losses = torch.rand(6, *trailing, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    where = losses > 0.7
    where[0] = False
    where[1] = True
    losses.masked_fill_(~where, NAN)
    criterion = RGDLoss(base=lambda x: x, reduction=reduction, per="sample", weighting=KL(normalize=True))
    with backend(name):
        value = criterion(losses, where=where)
        stats = criterion.stats()
    flat, kept = losses.numpy().reshape(6, -1), where.numpy().reshape(6, -1)
    means = np.array([row[k].mean() if k.any() else 0.0 for row, k in zip(flat, kept, strict=True)])
    weights = reference.sample_weights(means, criterion.weighting, kept.any(1))
    products = np.where(kept, weights[:, None] * flat, 0.0)
    expected = {
        "none": products.reshape(losses.shape),
        "mean": products.sum() / kept.sum(),
        "sum": products.sum(),
    }
    np.testing.assert_allclose(value.numpy(), expected[reduction], rtol=1e-13)
    assert stats.count == kept.any(1).sum()
    np.testing.assert_allclose(stats.objective, expected["mean"], rtol=1e-13)
    np.testing.assert_allclose(stats.mean_loss, np.where(kept, flat, 0).sum() / kept.sum(), rtol=1e-13)
    assert stats.max_weight == pytest.approx(weights.max(), rel=1e-13)


def test_masks_of_the_wrong_kind_are_refused():
    losses = torch.rand(4, 3)
    criterion = RGDLoss(base=lambda x: x)
    for call in (sample_weights, reweighted_mean, criterion):
        with pytest.raises(TypeError, match=r"where must be a torch\.Tensor of bool, got torch\.float32"):
            call(losses, where=torch.ones(4, 3))
        with pytest.raises(TypeError, match=r"where must be a torch\.Tensor of bool, got list"):
            call(losses, where=[True] * 4)
        with pytest.raises(
            ValueError, match=r"where must have the shape of the losses, \(4, 3\), got \(3,\)"
        ):
            call(losses, where=torch.ones(3, dtype=torch.bool))
        with pytest.raises(ValueError, match="move both to one device"):
            call(losses, where=torch.ones(4, 3, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match=r"where must have the shape of the losses, \(4,\), got \(3,\)"):
        RGDLoss()(losses, torch.zeros(4, dtype=torch.long), where=torch.ones(3, dtype=torch.bool))


def test_ignore_index_is_refused_for_class_probabilities():
    logits, target = batch((4, 3), soft=True)
    for name in ("rust", "composite"):
        with backend(name), pytest.raises(ValueError, match="ignore_index does not apply"):
            cross_entropy(logits, target, ignore_index=1)


# Statistics and the switch


@pytest.mark.parametrize("per", ["element", "sample"])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_stats_are_the_same_from_both_paths(per, soft):
    logits, target = batch((5, 4, 3), soft=soft)
    weight = torch.linspace(0.5, 2, 4, dtype=torch.float64)
    criterion = RGDLoss(weight, per=per)
    found = {}
    for name in ("rust", "composite"):
        with backend(name):
            criterion(logits, target)
        assert criterion.backend == name
        found[name] = [value for value in vars(criterion.stats()).values() if value is not None]
    np.testing.assert_allclose(found["composite"], found["rust"], rtol=1e-12)


def test_the_switch_forces_and_shows_the_path():
    losses = torch.rand(4)
    with backend() as outer:
        sample_weights(losses)
        with backend("composite") as inner:
            sample_weights(losses)
            with backend() as innermost:
                reweighted_mean(losses)
        reweighted_mean(losses)
    assert (outer, inner, innermost) == (["rust", "rust"], ["composite"], ["composite"])
    with pytest.raises(ValueError, match="backend must be 'rust', 'composite', 'triton' or None"):
        backend("cuda")


def test_what_the_kernels_cannot_serve_is_an_error_where_they_are_asked_for():
    losses = torch.rand(4)
    logits, target = batch((4, 3), soft=True)
    with backend("rust"):
        with pytest.raises(RuntimeError, match="a tensor is on meta"):
            sample_weights(losses.to("meta"))
        with pytest.raises(RuntimeError, match="a tensor is a Tagged"):
            sample_weights(losses.as_subclass(Tagged))
        with pytest.raises(RuntimeError, match="plain eager calls"):
            torch.func.vmap(sample_weights)(losses.view(2, 2))
        with pytest.raises(RuntimeError, match=r"target.detach\(\)"):
            cross_entropy(logits, target.requires_grad_())


def test_the_environment_variable_is_the_default():
    program = """
import torch, rgd.torch
with rgd.torch.backend() as ran:
    rgd.torch.sample_weights(torch.ones(2))
assert ran == ["composite"], ran
"""
    environment = {**os.environ, "RGD_BACKEND": "composite"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_an_environment_variable_that_names_no_backend_is_an_error_at_the_first_call():
    program = """
import torch, rgd.torch
try:
    rgd.torch.sample_weights(torch.ones(2))
except ValueError as error:
    assert "variable RGD_BACKEND must be 'rust', 'composite', 'triton' or None" in str(error), error
else:
    raise AssertionError
"""
    environment = {**os.environ, "RGD_BACKEND": "gpu"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


class Tagged(torch.Tensor):
    """A tensor subclass, which keeps its class through operations."""


def test_a_tensor_subclass_is_served_and_kept():
    logits, target = batch((4, 3))
    tagged = logits.clone().as_subclass(Tagged).requires_grad_()
    criterion = RGDLoss(weighting=KLBall(0.1))
    value = criterion(tagged, target)
    assert isinstance(value, Tagged)
    assert criterion.backend == "composite"
    value.backward()
    expected, grad = value_and_grad(logits, target, None, weighting=KLBall(0.1))
    torch.testing.assert_close(value.detach().as_subclass(torch.Tensor), expected)
    torch.testing.assert_close(tagged.grad.as_subclass(torch.Tensor), grad)
    assert criterion.stats().count == 3


def test_a_lazily_negated_tensor_is_read_as_it_is():
    logits = torch.randn(4, 3, dtype=torch.complex64).conj().imag
    assert logits.is_neg()
    target = torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(
        rust(cross_entropy, logits, target), rust(cross_entropy, logits.resolve_neg(), target)
    )
    torch.testing.assert_close(rust(sample_weights, logits), rust(sample_weights, logits.resolve_neg()))


def test_a_default_device_does_not_move_the_kernels_outputs():
    logits, target = batch((4, 3))
    criterion = RGDLoss()
    with torch.device("meta"):
        value = criterion(logits, target)
        weights = sample_weights(logits)
    assert (value.device.type, weights.device.type) == ("cpu", "cpu")


# Devices


def test_meta_tensors_get_shapes_and_dtypes():
    logits = torch.empty(4, 3, 5, device="meta", dtype=torch.bfloat16, requires_grad=True)
    target = torch.empty(4, 5, device="meta", dtype=torch.long)
    for weighting, reduction in itertools.product(WEIGHTINGS[:6], ["none", "mean", "sum"]):
        value = cross_entropy(logits, target, weighting=weighting, reduction=reduction)
        assert (value.device.type, value.dtype) == ("meta", torch.bfloat16)
        assert value.shape == ((4, 5) if reduction == "none" else ())
    (grad,) = torch.autograd.grad(value, logits)
    assert (grad.shape, grad.dtype) == (logits.shape, logits.dtype)
    assert sample_weights(logits, KLBall(0.1)).shape == logits.shape


@needs_gpu
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_a_gpu_gives_the_kernels_numbers_without_waiting(weighting, soft):
    logits, target = batch((40, 30, 4), soft=soft)
    weight = torch.linspace(0.5, 2, 30, dtype=torch.float64)
    for per, reduction in itertools.product(["element", "sample"], ["none", "mean", "sum"]):
        kwargs = {"weighting": weighting, "per": per, "reduction": reduction, "label_smoothing": 0.1}
        expected, expected_grad = value_and_grad(logits, target, weight, **kwargs)
        on_gpu = [t.cuda() for t in (logits, target, weight)]
        on_gpu[0].requires_grad_()
        criterion = RGDLoss(on_gpu[2], **kwargs)
        upstream = (
            torch.linspace(1, 2, max(expected.numel(), 1), dtype=torch.float64).view(expected.shape).cuda()
        )
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            value = criterion(on_gpu[0], on_gpu[1])
            (grad,) = torch.autograd.grad(value, on_gpu[0], upstream)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(value.cpu(), expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(grad.cpu(), expected_grad, rtol=1e-12, atol=1e-13)
        assert math.isfinite(criterion.stats().objective)


@needs_gpu
def test_a_gpu_masks_without_waiting():
    losses = (torch.rand(64, 9) * 3).cuda().requires_grad_()
    where = losses > 1
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for weighting in WEIGHTINGS:
            reweighted_mean(losses, weighting, where=where).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not losses.grad[~where].any()


@needs_gpu
def test_tensors_on_two_devices_are_refused():
    logits, target = batch((4, 3))
    with pytest.raises(ValueError, match="move both to one device"):
        cross_entropy(logits.cuda(), target)
    with pytest.raises(ValueError, match="move both to one device"):
        RGDLoss(torch.ones(3))(logits.float().cuda(), target.cuda())
