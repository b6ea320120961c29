"""What is changed in place after a call: gradients and statistics stay those of the call, or say so."""

import numpy as np
import pytest
import rgd
import torch
from rgd.torch import RGDLoss, backend
from torch import nn

CHANGES = [lambda tensor: tensor.add_(1), lambda tensor: tensor.zero_()]
WEIGHTINGS = [rgd.KL(), rgd.CVaR(0.5)]  # one pass over the logits, and two


def batch(count=12, classes=4):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (count,), generator=generator)


def gradient(criterion, logits, target, change=lambda hidden: None):
    leaf = logits.clone().requires_grad_()
    hidden = leaf * 1
    objective = criterion(hidden, target)
    change(hidden)
    objective.backward()
    return leaf.grad


# --- gradients ---


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["rust", "composite"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_logits_may_be_changed_in_place_before_backward_as_with_cross_entropy_loss(change, name, weighting):
    logits, target = batch()
    for criterion in (nn.CrossEntropyLoss(), RGDLoss(weighting=weighting)):
        with backend(name):
            expected = gradient(criterion, logits, target)
            assert torch.equal(gradient(criterion, logits, target, change), expected)


def test_a_second_derivative_reads_the_logits_and_refuses_changed_ones():
    logits, target = batch()
    leaf = logits.clone().requires_grad_()
    hidden = leaf * 1
    objective = RGDLoss()(hidden, target)
    hidden.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(objective, leaf, create_graph=True)


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_gradient_of_a_kept_graph_may_be_changed_in_place(factor, hooked):
    logits, target = batch()
    logits.requires_grad_()
    hooks = [torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)] if hooked else []
    for hook in hooks:
        hook.__enter__()
    objective = RGDLoss()(logits, target)
    for hook in hooks:
        hook.__exit__()
    factor = torch.tensor(factor, dtype=torch.float64)
    (first,) = torch.autograd.grad(objective, logits, factor, retain_graph=True)
    expected = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(objective, logits, factor, retain_graph=True)
    assert torch.equal(second, expected)
    second.zero_()
    assert torch.equal(torch.autograd.grad(objective, logits, factor)[0], expected)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(objective, logits, factor)


@pytest.mark.parametrize("shape", [(8, 4), (1100, 1000)])
def test_gradients_of_any_size_can_be_resized(shape):
    leaf = torch.zeros(shape, requires_grad=True)
    RGDLoss()(leaf, torch.zeros(shape[0], dtype=torch.int64)).backward()
    before = leaf.grad.clone().flatten()
    larger = 2 * leaf.numel()
    assert torch.equal(leaf.grad.resize_(larger)[: leaf.numel()], before)


# --- statistics ---


@pytest.mark.parametrize("name", ["rust", "composite"])
@pytest.mark.parametrize("per", ["element", "sample"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_statistics_do_not_follow_the_target_and_masks_of_the_call(name, per, weighting):
    logits, target = torch.randn(6, 4, 5), torch.randint(4, (6, 5))
    target[0] = -100
    target[2, 2] = -100
    units = (6,) if per == "sample" else (6, 5)
    given = {
        "where": torch.rand(units) > 0.3,
        "sample_weight": torch.rand(units),
        "groups": torch.randint(3, units),
    }
    for chosen in ({}, *({key: value} for key, value in given.items()), given):
        options = {key: value.clone() for key, value in chosen.items()}
        labels, criterion = target.clone(), RGDLoss(weighting=weighting, per=per)
        with backend(name):
            criterion(logits, labels, **options)
        expected, weights = repr(criterion.stats()), criterion.last_weights  # repr: NaN equals NaN
        labels.copy_(torch.where(labels == -100, 0, -100))
        for tensor in options.values():
            tensor.copy_(tensor == 0)
        weights.zero_()
        assert repr(criterion.stats()) == expected


def test_statistics_do_not_follow_a_target_that_numpy_changes():
    array = np.array([0, 1, -100, 2])
    criterion = RGDLoss()
    criterion(torch.randn(4, 3), torch.from_numpy(array))
    expected = criterion.stats()
    array[:] = 0
    assert criterion.stats() == expected


@pytest.mark.parametrize("per", ["element", "sample"])
def test_statistics_of_a_base_do_not_follow_its_masks_and_refuse_changed_losses(per):
    losses, where = torch.rand(6, 5), torch.rand(6, 5) > 0.3
    criterion = RGDLoss(base=lambda given: given, per=per)
    mask = where.clone()
    criterion(losses, where=mask)
    expected = criterion.stats()
    mask.fill_(True)
    assert criterion.stats() == expected
    criterion(losses)
    losses.add_(1)
    with pytest.raises(RuntimeError, match="changed in place since the call"):
        criterion.stats()
    criterion.evaluate = "weighted"
    with torch.inference_mode():
        losses = torch.rand(6, 5)
        criterion(losses)
        expected = criterion.stats()
        losses.add_(1)
        assert criterion.stats() == expected
