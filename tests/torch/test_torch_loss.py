"""`RGDLoss` and `cross_entropy` against torch's own loss, the composed formula, and finite differences."""

import copy
import functools
import itertools
import pickle

import numpy as np
import pytest
import rgd
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rgd import reference
from rgd.torch import RGDLoss, cross_entropy, reweighted_mean, sample_weights
from torch import nn

ERM = rgd.KL(scale=0)
PAPER = rgd.KL()
# (C,) and both sides of the switch between the two loops of the kernel, with and without trailing axes.
SHAPES = [(7,), (5, 10), (33, 100), (4, 7, 3, 5), (3, 60, 4), (2, 1), (300, 3), (17, 48)]
# Of the largest entry: a few units in the last place for each doubling of the number of terms.
RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-6}


def batch(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(shape, dtype=dtype, generator=generator)
    classes = shape[0] if len(shape) == 1 else shape[1]
    target = torch.randint(0, classes, shape[:1] + shape[2:] if len(shape) > 1 else (), generator=generator)
    return logits, target


def probabilities(logits, seed=1):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(logits.shape, dtype=logits.dtype, generator=generator)
    return noise.softmax(0 if logits.dim() == 1 else 1)


def value_and_grad(loss, logits, *args, **kwargs):
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = loss(leaf, *args, **kwargs)
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    value.backward(upstream)
    return value.detach(), leaf.grad


def assert_close(actual, expected, relative, floor=0.0):
    """Equal to `relative` of the largest entry or of `floor`, the size of the terms an entry sums."""
    finite = expected[expected.isfinite()].abs()
    scale = max(finite.max().item() if finite.numel() else 0.0, floor)
    torch.testing.assert_close(
        actual.to(expected.dtype),
        expected,
        rtol=relative,
        atol=relative * scale,
        equal_nan=True,
        check_stride=False,
    )


def widened(*tensors):
    """The same numbers in float64, where torch's own rounding errors do not show."""
    return [t if t is None or not t.is_floating_point() else t.double() for t in tensors]


def composed(
    logits,
    target,
    weight=None,
    *,
    weighting=PAPER,
    reduction="mean",
    ignore_index=-100,
    label_smoothing=0.0,
):
    """RGD in plain torch operations, pointwise weights."""
    losses = F.cross_entropy(
        logits, target, weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    weights = (weighting.effective_scale * losses.clamp(max=weighting.tau)).exp().detach()
    weighted = weights * losses
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    if target.is_floating_point():
        return weighted.sum() / losses.numel()
    counted = target != ignore_index
    c = torch.ones_like(losses) if weight is None else weight[target.where(counted, 0)]
    return weighted.sum() / c.where(counted, 0).sum()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scale_zero_is_cross_entropy_loss_for_every_argument(shape, dtype):
    logits, indices = batch(shape, dtype)
    classes = shape[0] if len(shape) == 1 else shape[1]
    ignoring = indices.clone()
    ignoring.view(-1)[::3] = 1
    class_weight = torch.rand(classes, dtype=dtype, generator=torch.Generator().manual_seed(2)) + 0.1
    for target, weight, smoothing, reduction, ignore_index in itertools.product(
        [indices, ignoring, probabilities(logits)],
        [None, class_weight],
        [0.0, 0.1, 1.0],
        ["mean", "sum", "none"],
        [-100, 1],
    ):
        if target.is_floating_point() and ignore_index != -100:
            continue
        if target is ignoring and ignore_index == -100 and classes == 1:
            continue  # class 1 is ignored or does not exist
        kwargs = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": smoothing}
        wide_logits, wide_target, wide_weight = widened(logits, target, weight)
        expected = value_and_grad(nn.CrossEntropyLoss(wide_weight, **kwargs), wide_logits, wide_target)
        actual = value_and_grad(RGDLoss(weight, weighting=ERM, **kwargs), logits, target)
        for a, e in zip(actual, expected, strict=True):
            assert a.shape == e.shape
            assert a.dtype == dtype
            assert_close(a, e, RELATIVE[dtype], floor=1 / indices.numel() if reduction == "mean" else 1.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_default_is_the_formula_composed_from_torch_operations(shape, dtype):
    logits, indices = batch(shape, dtype)
    classes = shape[0] if len(shape) == 1 else shape[1]
    class_weight = torch.rand(classes, dtype=dtype, generator=torch.Generator().manual_seed(2)) + 0.1
    for target, weight, smoothing, reduction in itertools.product(
        [indices, probabilities(logits)], [None, class_weight], [0.0, 0.2], ["mean", "sum", "none"]
    ):
        kwargs = {"reduction": reduction, "label_smoothing": smoothing}
        expected = value_and_grad(composed, *widened(logits, target, weight), **kwargs)
        actual = value_and_grad(RGDLoss(weight, **kwargs), logits, target)
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, RELATIVE[dtype], floor=1 / indices.numel() if reduction == "mean" else 1.0)


@pytest.mark.parametrize("weighting", [rgd.KL(2.0), rgd.KL(2.0, normalize=True), rgd.KLBall(0.1)], ids=str)
@pytest.mark.parametrize("per", ["element", "sample"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_weighting_agrees_with_the_reference(weighting, per, shape):
    logits, target = batch(shape)
    target.view(-1)[1::4] = -100
    class_weight = torch.rand(shape[0] if len(shape) == 1 else shape[1], dtype=torch.float64) + 0.1
    arguments = (logits.numpy(), target.numpy(), class_weight.numpy())
    for reduction in ("mean", "sum", "none"):
        kwargs = {"weighting": weighting, "per": per, "reduction": reduction, "label_smoothing": 0.1}
        leaf = logits.clone().requires_grad_()
        value = cross_entropy(leaf, target, class_weight, **kwargs)
        value.sum().backward()
        # A ball's root is exact to 1e-10 in KL; its weights follow to about as much.
        relative = 1e-9 if isinstance(weighting, rgd.KLBall) else 1e-12
        assert_close(value.detach(), torch.as_tensor(reference.cross_entropy(*arguments, **kwargs)), relative)
        expected = torch.as_tensor(reference.cross_entropy_grad(*arguments, **kwargs))
        assert_close(leaf.grad, expected, relative, floor=1 / target.numel() if reduction == "mean" else 1.0)


@pytest.mark.parametrize("shape", [(6,), (5, 4), (3, 50), (2, 3, 2, 2)])
def test_the_gradient_is_that_of_the_objective_with_its_weights_frozen(shape):
    logits, target = batch(shape)
    losses = F.cross_entropy(logits, target, reduction="none")
    weights = sample_weights(losses.reshape(-1)).view(losses.shape)
    leaf = logits.clone().requires_grad_()
    cross_entropy(leaf, target, reduction="sum").backward()
    step = 1e-6
    for i in range(logits.numel()):
        shift = torch.zeros(logits.numel(), dtype=logits.dtype)
        shift[i] = step
        shift = shift.view(shape)
        plus = F.cross_entropy(logits + shift, target, reduction="none")
        minus = F.cross_entropy(logits - shift, target, reduction="none")
        slope = (weights * (plus - minus)).sum() / (2 * step)
        # Central differences: step^2 from the third derivative, eps / step from rounding.
        assert abs(slope - leaf.grad.view(-1)[i]) < 1e-9 * max(1.0, losses.sum().item())


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("shape", [(6,), (5, 4), (3, 50), (2, 3, 2, 2)])
def test_gradcheck_of_cross_entropy_with_constant_weights(shape, kind):
    logits, target = batch(shape)
    if kind == "probabilities":
        target = probabilities(logits)
    for reduction, smoothing in itertools.product(["mean", "none"], [0.0, 0.3]):
        kwargs = {"weighting": ERM, "reduction": reduction, "label_smoothing": smoothing}
        function = functools.partial(cross_entropy, target=target, **kwargs)
        assert torch.autograd.gradcheck(function, logits.clone().requires_grad_())


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_strides_and_layouts_do_not_change_the_result(data):
    classes = data.draw(st.sampled_from([1, 2, 7, 16, 47, 48, 65]))
    trailing = data.draw(st.lists(st.integers(1, 5), max_size=2))
    shape = (data.draw(st.integers(1, 40)), classes, *trailing)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    logits, target = batch(shape, torch.float32, seed=data.draw(st.integers(0, 99)))
    logits = logits.to(dtype)
    axes = data.draw(st.permutations(range(len(shape))))
    inverse = [axes.index(i) for i in range(len(shape))]
    view = logits.permute(axes).contiguous().permute(inverse)
    every = data.draw(st.integers(1, 3))
    spread = torch.zeros((shape[0] * every, *shape[1:]), dtype=dtype)
    spread[::every] = view
    offset = torch.empty(view.numel() + 3, dtype=dtype)[3:].view(shape).copy_(view)
    expanded = target if target.dim() == 1 else target.transpose(0, -1).contiguous().transpose(0, -1)
    kwargs = {
        "reduction": data.draw(st.sampled_from(["none", "mean", "sum"])),
        "weighting": rgd.KL(normalize=True),
    }
    value, grad = value_and_grad(cross_entropy, logits.contiguous(), target, **kwargs)
    for other in (view, spread[::every], offset):
        other_value, other_grad = value_and_grad(cross_entropy, other, expanded, **kwargs)
        # The loops differ in the order of their sums: a unit in the last place each doubling of the classes.
        relative = 8 * max(
            torch.finfo(dtype).eps, torch.finfo(torch.float32).eps if dtype != torch.float64 else 0
        )
        assert_close(other_value, value, relative)
        assert_close(other_grad, grad, relative)
        assert other_grad.shape == grad.shape


def test_stride_zero_logits_are_read_in_place_and_get_a_full_gradient():
    row = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, 4])
    cross_entropy(row.expand(3, 5), target).backward()
    other = row.detach().repeat(3, 1).requires_grad_()
    cross_entropy(other, target).backward()
    torch.testing.assert_close(row.grad, other.grad.sum(0, keepdim=True))


@pytest.mark.parametrize("classes", [5, 64])
def test_extreme_logits_do_what_cross_entropy_loss_does(classes):
    for value in (1e4, -1e4, float("inf"), float("-inf"), float("nan")):
        for column in (0, 1, slice(None)):
            logits, target = batch((6, classes))
            logits[1, column] = value
            logits[4, column] = value
            target[4] = -100
            target[1] = 1
            for reduction in ("none", "mean"):
                expected = value_and_grad(composed, logits, target, reduction=reduction)
                actual = value_and_grad(RGDLoss(reduction=reduction), logits, target)
                for a, e in zip(actual, expected, strict=True):
                    assert_close(a, e, 1e-12)


def test_all_ignored_and_empty_batches_give_what_cross_entropy_loss_gives():
    for logits, target in [
        (torch.randn(3, 4), torch.full((3,), -100)),
        (torch.randn(0, 4), torch.empty(0, dtype=torch.long)),
        (torch.randn(2, 4, 0), torch.empty(2, 0, dtype=torch.long)),
    ]:
        for reduction, per in itertools.product(["mean", "sum", "none"], ["element", "sample"]):
            expected = value_and_grad(nn.CrossEntropyLoss(reduction=reduction), logits, target)
            for weighting in (rgd.KL(), rgd.KL(normalize=True), rgd.KLBall(0.5)):
                actual = value_and_grad(
                    RGDLoss(weighting=weighting, reduction=reduction, per=per), logits, target
                )
                for a, e in zip(actual, expected, strict=True):
                    torch.testing.assert_close(a, e, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 10), (64, 100), (2, 5, 6, 7)])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype, shape):
    logits, target = batch(shape, torch.float32)
    logits = logits.to(dtype)
    value, grad = value_and_grad(cross_entropy, logits, target)
    wide_value, wide_grad = value_and_grad(cross_entropy, logits.float(), target)
    assert value.dtype == grad.dtype == dtype
    torch.testing.assert_close(value, wide_value.to(dtype), rtol=0, atol=0)
    # Rounding a sum that was taken in another order may end one unit in the last place away.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        grad.float(), wide_grad, rtol=eps, atol=float(wide_grad.abs().max()) * 1e-6 + 6e-8
    )


def test_a_loss_scale_reaches_float16_gradients_before_they_are_rounded():
    logits = torch.randn(4096, 50).half()
    target = torch.randint(0, 50, (4096,))
    leaf = logits.clone().requires_grad_()
    with torch.autocast("cpu", enabled=False):
        loss = cross_entropy(leaf, target, reduction="sum")
    (loss.float() * 2.0**-14).backward()
    wide = logits.float().requires_grad_()
    (cross_entropy(wide, target, reduction="sum") * 2.0**-14).backward()
    torch.testing.assert_close(leaf.grad, wide.grad.half(), rtol=2e-3, atol=6e-8)


@pytest.mark.parametrize("target_dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_class_indices_of_every_integer_dtype_are_taken(target_dtype):
    logits, target = batch((9, 5))
    torch.testing.assert_close(cross_entropy(logits, target.to(target_dtype)), cross_entropy(logits, target))


def test_probabilities_of_another_dtype_lose_nothing():
    logits = torch.randn(8, 6).bfloat16()
    target = torch.randn(8, 6).softmax(1)
    torch.testing.assert_close(
        cross_entropy(logits, target), cross_entropy(logits.float(), target).bfloat16()
    )


def test_pointwise_weights_are_bit_for_bit_the_same_in_micro_batches():
    logits, target = batch((96, 10), torch.float32)
    whole, whole_grad = value_and_grad(cross_entropy, logits, target, reduction="none")
    parts = [
        value_and_grad(cross_entropy, logits[i : i + 32], target[i : i + 32], reduction="none")
        for i in (0, 32, 64)
    ]
    assert torch.equal(whole, torch.cat([value for value, _ in parts]))
    leaf = logits.clone().requires_grad_()
    cross_entropy(leaf, target, reduction="sum").backward()
    micro = logits.clone().requires_grad_()
    for i in (0, 32, 64):
        cross_entropy(micro[i : i + 32], target[i : i + 32], reduction="sum").backward()
    assert torch.equal(leaf.grad, micro.grad)
    assert whole_grad.shape == leaf.grad.shape


def test_the_weights_are_those_of_sample_weights_bit_for_bit():
    for shape in ((64, 10), (64, 100)):
        logits, target = batch(shape, torch.float32)
        plain = cross_entropy(logits, target, weighting=ERM, reduction="none")
        assert torch.equal(cross_entropy(logits, target, reduction="none"), sample_weights(plain) * plain)


def test_any_number_of_threads_gives_the_same_bits():
    before = torch.get_num_threads()
    try:
        for shape in ((3000, 10), (700, 200), (2, 21, 64, 64), (40, 8000)):
            logits, target = batch(shape, torch.float32)
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(
                    [
                        value_and_grad(cross_entropy, logits, target, weighting=w)
                        for w in (rgd.KL(), rgd.KLBall(0.2))
                    ]
                )
            for other in results[1:]:
                for (value, grad), (other_value, other_grad) in zip(results[0], other, strict=True):
                    assert torch.equal(value, other_value)
                    assert torch.equal(grad, other_grad)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("per", ["element", "sample"])
def test_any_per_sample_loss_can_be_the_base(reduction, per):
    criterion = RGDLoss(base=nn.BCEWithLogitsLoss(reduction="none"), tau=0.5, reduction=reduction, per=per)
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    target = torch.rand(6, 4, dtype=torch.float64)
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    units = losses.mean(1, keepdim=True) if per == "sample" else losses
    expected = (units.clamp(max=0.5) / 1.5).exp().detach() * losses
    expected = expected if reduction == "none" else getattr(expected, reduction)()
    actual = criterion(logits, target)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual.sum(), logits)[0], torch.autograd.grad(expected.sum(), logits)[0]
    )
    assert criterion.stats().count == (6 if per == "sample" else 24)


def test_reweighted_mean_weights_any_vector_of_losses():
    losses = torch.tensor([0.1, 0.7, 4.0], dtype=torch.float64, requires_grad=True)
    weights = (losses.detach().clamp(max=2.0) / 3.0).exp()
    value = reweighted_mean(losses, tau=2.0)
    torch.testing.assert_close(value, (weights * losses).mean())
    torch.testing.assert_close(torch.autograd.grad(value, losses)[0], weights / 3)
    half = reweighted_mean(losses.detach().half())
    assert half.dtype == torch.float16


def test_sample_weights_are_constants_of_the_losses_shape():
    losses = torch.rand(3, 4, requires_grad=True)
    weights = sample_weights(losses, rgd.KL(normalize=True))
    assert weights.shape == losses.shape
    assert not weights.requires_grad
    assert sample_weights(losses.bfloat16()).dtype == torch.float32


def test_stats_describe_the_last_call():
    logits, target = batch((50, 7), torch.float64)
    target[:5] = -100
    class_weight = torch.rand(7, dtype=torch.float64) + 0.5
    criterion = RGDLoss(class_weight, tau=2.0)
    objective = criterion(logits, target)
    stats = criterion.stats()
    losses = F.cross_entropy(logits, target, class_weight, reduction="none")[5:]
    weights = sample_weights(losses, tau=2.0)
    q = weights / weights.sum()
    assert stats.count == 45
    assert stats.mean_loss == pytest.approx(F.cross_entropy(logits, target, class_weight).item(), rel=1e-12)
    assert stats.objective == pytest.approx(objective.item(), rel=1e-12)
    assert stats.effective_sample_size == pytest.approx(1 / (q * q).sum().item(), rel=1e-12)
    assert stats.kl_to_uniform == pytest.approx((q * (45 * q).log()).sum().item(), rel=1e-9)
    assert stats.max_weight == pytest.approx(weights.max().item(), rel=1e-12)
    assert stats.clipped_share == pytest.approx((losses > 2).double().mean().item())


def test_stats_per_sample_count_samples():
    logits, target = batch((5, 7, 9), torch.float64)
    target[0] = -100
    target[1, :4] = -100
    criterion = RGDLoss(per="sample")
    objective = criterion(logits, target)
    stats = criterion.stats()
    assert stats.count == 4
    assert stats.objective == pytest.approx(objective.item(), rel=1e-12)
    assert stats.mean_loss == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-12)
    losses = F.cross_entropy(logits, target, reduction="none").sum(1) / (target != -100).sum(1).clamp(min=1)
    weights = sample_weights(losses[1:])
    assert stats.effective_sample_size == pytest.approx(
        (weights.sum() ** 2 / (weights**2).sum()).item(), rel=1e-12
    )


def test_it_behaves_as_a_module():
    weight = torch.rand(4)
    criterion = RGDLoss(weight, tau=2.0, label_smoothing=0.1)
    logits, target = batch((5, 4), torch.float32)
    value = criterion(logits, target)
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(other(logits, target), value)
    assert torch.equal(criterion.state_dict()["weight"], weight)
    assert criterion.to(torch.float64).weight.dtype == torch.float64
    assert "tau=2.0" in repr(criterion)
    assert "label_smoothing=0.1" in repr(criterion)
    empty = RGDLoss()
    assert not empty.state_dict()
    loaded = RGDLoss(torch.ones(4))
    loaded.load_state_dict({"weight": weight})
    assert torch.equal(loaded.weight, weight)


def test_backward_twice_with_a_retained_graph_accumulates():
    logits, target = batch((5, 4))
    leaf = logits.requires_grad_()
    loss = cross_entropy(leaf * 1.0, target)
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * first, rtol=0, atol=0)


def test_large_gradients_share_no_memory_between_steps():
    logits = torch.randn(1100, 1000, requires_grad=True)
    target = torch.randint(0, 1000, (1100,))
    cross_entropy(logits, target).backward()
    first = logits.grad
    kept = first.clone()
    logits.grad = None
    cross_entropy(logits, target, tau=5.0).backward()
    assert torch.equal(first, kept)
    assert not torch.equal(first, logits.grad)


def test_without_grad_no_gradient_is_computed_and_the_value_is_the_same():
    logits, target = batch((30, 12))
    value = cross_entropy(logits.clone().requires_grad_(), target)
    with torch.no_grad():
        assert torch.equal(cross_entropy(logits, target), value.detach())
    assert not cross_entropy(logits, target).requires_grad


def test_numpy_and_torch_fronts_give_the_same_weights():
    losses = torch.rand(100) * 5
    for weighting in (rgd.KL(), rgd.KL(normalize=True), rgd.KLBall(0.3)):
        np.testing.assert_array_equal(
            sample_weights(losses, weighting).numpy(), rgd.sample_weights(losses.numpy(), weighting)
        )
