"""`inplace=True`: the gradient in the place of the logits, and what that makes impossible."""

import pytest
import rgd
import torch
from family import label
from rgd.torch import RGDLoss, backend, cross_entropy
from torch import nn
from torch.nn import functional as F

BACKENDS = ["rust", "composite"]
WEIGHTINGS = [rgd.KL(1.0), rgd.Focal(2.0), rgd.KLBall(0.1)]
SHAPES = [(5,), (4, 7), (3, 30), (2, 5, 4), (0, 3)]


def logits_of(values):
    """What a layer has computed."""
    leaf = values.clone().requires_grad_()
    return leaf, leaf * 1


def case(shape, dtype, *, probabilities):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    axis = 1 if len(shape) > 1 else 0
    if probabilities:
        return values, torch.softmax(torch.randn(shape, generator=generator), axis).to(dtype)
    target = torch.randint(shape[axis], shape[:axis] + shape[axis + 1 :], generator=generator)
    if target.numel() > 1:
        target.view(-1)[0] = -100
    return values, target


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=label)
def test_value_and_gradient_are_the_same(  # noqa: PLR0917
    weighting, reduction, shape, probabilities, dtype, name
):
    values, target = case(shape, dtype, probabilities=probabilities)
    class_weight = torch.linspace(0.5, 1.5, shape[1] if len(shape) > 1 else shape[0])
    found = []
    for inplace in (False, True):
        leaf, logits = logits_of(values)
        with backend(name):
            objective = cross_entropy(
                logits,
                target,
                class_weight,
                weighting=weighting,
                reduction=reduction,
                label_smoothing=0.1,
                inplace=inplace,
            )
        above = torch.linspace(1.0, 2.0, objective.numel(), dtype=objective.dtype).view(objective.shape)
        (objective * above).sum().backward()
        found.append((objective.detach(), leaf.grad))
    torch.testing.assert_close(found[1][0], found[0][0], equal_nan=True)
    # The composite's gradient comes from another formula, is rounded to the dtype, and then scaled in it.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found[1][1], found[0][1], rtol=4 * eps, atol=4 * eps, equal_nan=True)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_logits_hold_the_gradient_afterwards(name):
    values, target = case((4, 7), torch.float32, probabilities=False)
    leaf, logits = logits_of(values)
    with backend(name):
        RGDLoss(inplace=True)(logits, target).backward()
    torch.testing.assert_close(logits.detach(), leaf.grad)


@pytest.mark.parametrize("name", BACKENDS)
def test_without_a_gradient_the_logits_stay(name):
    values, target = case((4, 7), torch.float32, probabilities=False)
    with backend(name):
        kept = values.clone()
        cross_entropy(kept, target, inplace=True)
        assert torch.equal(kept, values)
        with torch.no_grad():
            _, logits = logits_of(values)
            cross_entropy(logits, target, inplace=True)
        assert torch.equal(logits, values)


@pytest.mark.parametrize("name", BACKENDS)
def test_misuse_is_an_error_before_a_wrong_number(name):
    values, target = case((4, 7), torch.float32, probabilities=False)
    with backend(name):
        leaf = values.clone().requires_grad_()
        with pytest.raises(ValueError, match="are a leaf"):
            cross_entropy(leaf, target, inplace=True)
        assert torch.equal(leaf, values)
        # exp keeps its result for the backward pass, and it is overwritten.
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            cross_entropy(leaf.exp(), target, inplace=True).backward()
        # The logits are used again, by something that autograd keeps them for.
        logits = leaf * 1
        other = logits.square().sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (cross_entropy(logits, target, inplace=True) + other).backward()
        # The gradient is changed before it is used.
        logits = leaf * 1
        objective = cross_entropy(logits, target, inplace=True)
        logits.detach().zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            objective.backward()
        # A second pass, where the first one has scaled it.
        objective = 2 * cross_entropy(leaf * 1, target, inplace=True)
        objective.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            objective.backward()
        objective = cross_entropy(leaf * 1, target, inplace=True)
        with pytest.raises(RuntimeError, match="a second derivative needs the logits"):
            torch.autograd.grad(objective, leaf, create_graph=True)


def test_what_cannot_be_overwritten_is_refused():
    values, target = case((4, 7), torch.float32, probabilities=False)
    _, logits = logits_of(values)
    with pytest.raises(ValueError, match="does not serve float16"):
        cross_entropy(logits.half(), target, inplace=True)
    probabilities = torch.softmax(values, 1)
    with pytest.raises(ValueError, match="no wider than the logits"):
        cross_entropy(logits.bfloat16(), probabilities, inplace=True)
    with pytest.raises(ValueError, match="that require grad: detach"):
        cross_entropy(logits, probabilities.requires_grad_(), inplace=True)
    with pytest.raises(RuntimeError, match="plain tensors in eager calls"):
        torch.func.grad(lambda x: cross_entropy(x * 1, target, inplace=True))(values)
    with pytest.raises(TypeError, match="inplace must be True or False"):
        cross_entropy(logits, target, inplace=1)
    with pytest.raises(ValueError, match="inplace is for the built-in cross-entropy"):
        RGDLoss(base=nn.MSELoss(reduction="none"), inplace=True)
    expanded = (values[:1].requires_grad_() * 1).expand(4, 7)
    with pytest.raises((ValueError, RuntimeError)):
        cross_entropy(expanded, target, inplace=True)


def test_the_gradient_of_a_linear_layer_needs_no_second_tensor():
    torch.manual_seed(0)
    layer, hidden = nn.Linear(8, 30), torch.randn(16, 8)
    target = torch.randint(30, (16,))
    RGDLoss()(layer(hidden), target).backward()
    expected = layer.weight.grad.clone()
    layer.weight.grad = None
    criterion = RGDLoss(inplace=True)
    assert "inplace=True" in repr(criterion)
    criterion(F.linear(hidden, layer.weight, layer.bias), target).backward()
    torch.testing.assert_close(layer.weight.grad, expected)
