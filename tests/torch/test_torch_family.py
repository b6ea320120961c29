"""Every member of the family in the torch front: both backends, every option, against the float64 oracle."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from rgd import CVaR, GroupDRO, KLBall, Pointwise, Trimmed, reference
from rgd.torch import RGD, RGDLoss, backend, cross_entropy, reweighted_mean, sample_weights, weight_stats
from torch_family import (
    GROUPS,
    C,
    N,
    T,
    arrays,
    assert_within,
    both_backends,
    every_member,
    extras,
    first,
    groups_of,
    in_numpy,
    leaves,
    problem,
    weight_allowance,
)


@functools.cache
def oracle(weighting, kind, per, dtype):
    """Losses and weights of the targets, which count, and how far each may be off for logits of a dtype."""
    *tensors, smoothing = problem(kind, dtype)
    logits, target, class_weight = in_numpy(*tensors)
    losses = reference.cross_entropy_losses(logits, target, class_weight, label_smoothing=smoothing)
    counted = np.ones((N, T), bool) if kind == "probabilities" else target != -100
    units, part = losses, counted
    if per == "sample":
        number = counted.sum(1)
        units, part = losses.sum(1) / np.maximum(number, 1), number > 0
    given = arrays(extras(weighting, per))
    weights = first(reference.sample_weights(units, weighting, part, **given), weighting)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    # A logarithm of a sum over the classes, less a logit; smoothing and class weights at most double it.
    loss_error = (C + 8) * eps * 2 * (2 * np.max(np.abs(logits)) + math.log(C))
    weight_error = weight_allowance(units[part], weights[part], weighting, loss_error, eps)
    if per == "sample":
        weights = weights[:, None]
    return losses, np.where(counted, weights, 0.0), counted, loss_error, weight_error, eps


def call_settings(weighting, per, reduction, smoothing):
    options = {"weighting": weighting, "per": per, "reduction": reduction, "label_smoothing": smoothing}
    return {**options, **extras(weighting, per)}


@functools.cache
def expected_of(weighting, kind, per, reduction, dtype):
    """The objective and its gradient by the reference, for logits of a dtype."""
    *tensors, smoothing = problem(kind, dtype)
    settings = arrays(call_settings(weighting, per, reduction, smoothing))
    calls = (reference.cross_entropy, reference.cross_entropy_grad)
    return [first(call(*in_numpy(*tensors), **settings), weighting) for call in calls]


def check_cross_entropy(weighting, name, dtype, *, kind, per, reduction):
    logits, target, class_weight, smoothing = problem(kind, dtype)
    settings = call_settings(weighting, per, reduction, smoothing)
    leaf = logits.clone().requires_grad_()
    with backend(name) as ran:
        result = cross_entropy(leaf, target, class_weight, **settings)
    assert ran == [name]
    value = first(result, weighting)
    assert value.dtype == dtype
    value.sum().backward()
    expected, gradient = expected_of(weighting, kind, per, reduction, dtype)

    losses, weights, counted, loss_error, weight_error, eps = oracle(weighting, kind, per, dtype)
    half_unit = torch.finfo(dtype).eps if dtype.itemsize < 4 else 0.0
    # Of w * l: the errors of its factors, and of a sum over the batch.
    products = weight_error * losses + weights * (loss_error + (N * T + 8) * eps * losses)
    # d l / d z is a difference of numbers of at most the largest class weight, 2.
    slopes = 4 * counted * (weight_error + weights * ((C + 8) * eps + 2 * loss_error))
    divisor = 1.0
    if reduction == "mean":
        shares = (
            np.ones((N, T))
            if class_weight is None
            else in_numpy(class_weight)[0][np.where(counted, target, 0)]
        )
        divisor = float(np.sum(shares * counted))
    if reduction != "none":
        products = np.sum(products * counted)
    assert_within(value, expected, products / divisor, half_unit)
    assert_within(leaf.grad, gradient, slopes[:, None, :] / divisor, half_unit)


@both_backends
@every_member
def test_cross_entropy_and_its_gradient_are_those_of_the_reference(weighting, name):
    for kind, per, reduction in itertools.product(
        ["indices", "probabilities"], ["element", "sample"], ["mean", "sum", "none"]
    ):
        check_cross_entropy(weighting, name, torch.float64, kind=kind, per=per, reduction=reduction)


@both_backends
@every_member
def test_narrower_dtypes_are_as_near_to_the_reference_as_their_rounding_allows(weighting, name):
    for dtype, (kind, per, reduction) in itertools.product(
        [torch.float32, torch.bfloat16],
        [("indices", "element", "mean"), ("indices", "sample", "none"), ("probabilities", "element", "sum")],
    ):
        check_cross_entropy(weighting, name, dtype, kind=kind, per=per, reduction=reduction)


@both_backends
@every_member
def test_weights_and_the_mean_of_any_losses_are_those_of_the_reference(weighting, name):
    losses = torch.tensor(np.random.default_rng(0).gamma(1.0, 1.5, (N, T)))
    where = torch.rand((N, T), generator=torch.Generator().manual_seed(1)) > 0.2
    p = torch.rand((N, T), generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.5
    for options in ({}, {"where": where}, {"sample_weight": p}, {"where": where, "sample_weight": p}):
        settings = {**options, **extras(weighting, "element")}
        given = arrays(settings)
        leaf = losses.clone().requires_grad_()
        with backend(name):
            weights = first(sample_weights(leaf, weighting, **settings), weighting)
            mean = first(reweighted_mean(leaf, weighting, **settings), weighting)
        mean.backward()
        expected = first(reference.sample_weights(losses.numpy(), weighting, **given), weighting)
        kept = where.numpy() if "where" in options else np.ones((N, T), bool)
        base = np.where(kept, p.numpy() if "sample_weight" in options else 1.0, 0.0)
        eps = np.finfo(np.float64).eps
        # Losses are given, without error, but a logarithm or exponential of one has some.
        loss_error = 4 * eps * np.max(losses.numpy())
        error = weight_allowance(losses.numpy()[kept], expected[kept], weighting, loss_error, eps)
        assert not weights.requires_grad
        assert_within(weights, expected, np.where(kept, error, 0.0))
        total = np.sum(base * losses.numpy()) * (error + (N * T + 8) * eps * np.max(expected))
        assert_within(
            mean,
            first(reference.reweighted_mean(losses.numpy(), weighting, **given), weighting),
            total / np.sum(base),
        )
        assert_within(leaf.grad, base * expected / np.sum(base), 2 * base * (error + eps * expected))


@both_backends
@every_member
def test_the_module_computes_what_the_function_does_batch_after_batch(weighting, name):
    for per in ("element", "sample"):
        logits, target, class_weight, smoothing = problem("indices")
        criterion = RGDLoss(class_weight, weighting=weighting, per=per, label_smoothing=smoothing)
        given = extras(weighting, per)
        for seed in range(3):
            logits, target, _, _ = problem("indices", seed=seed)
            if "groups" in given:
                given["groups"] = groups_of(per, seed)
            groups = given.get("groups")
            mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
            with backend(name):
                objective = criterion(mine, target, groups=groups)
                result = cross_entropy(
                    theirs,
                    target,
                    class_weight,
                    weighting=weighting,
                    per=per,
                    label_smoothing=smoothing,
                    **given,
                )
            if weighting.stateful:
                result, given["state"] = result
            objective.backward()
            result.backward()
            assert torch.equal(objective, result)
            assert torch.equal(mine.grad, theirs.grad)


@both_backends
@every_member
def test_a_base_loss_and_the_optimizer_weigh_as_the_mean_does(weighting, name):
    losses = torch.tensor(np.random.default_rng(3).gamma(1.0, 1.5, (N, T)))
    given = extras(weighting, "element")
    groups = given.get("groups")
    parameter = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = RGD(torch.optim.SGD([parameter], lr=1.0), weighting)
    with backend(name):
        expected = first(reweighted_mean(losses, weighting, **given), weighting)
        by_base = RGDLoss(weighting=weighting, base=lambda x: x)(losses, groups=groups)
        by_optimizer = optimizer.backward(losses * parameter, groups=groups)
    assert torch.equal(by_base, expected)
    assert torch.equal(by_optimizer, expected)
    # d (w * l * parameter) / d parameter is the objective itself: another order of the same sum.
    eps = torch.finfo(torch.float64).eps
    torch.testing.assert_close(parameter.grad, expected, rtol=2 * N * T * eps, atol=0)


# --- derivatives ---


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script:FutureWarning", "ignore:`torch.jit.script:DeprecationWarning"
)
@both_backends
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("per", ["element", "sample"])
def test_gradcheck_with_constant_weights_base_measure_and_mask(name, kind, per):
    logits, target, class_weight, smoothing = problem(kind)
    logits, target = logits[:4, :, :2].clone(), target[:4, ..., :2].clone()
    units = (4,) if per == "sample" else (4, 2)
    constants = torch.linspace(0.0, 2.0, math.prod(units), dtype=torch.float64)
    # Finite differences see weights move with the losses: these do not.
    weighting = Pointwise(lambda losses: constants + 0 * losses)
    p = torch.linspace(0.0, 1.5, constants.numel(), dtype=torch.float64).flip(0).reshape(units)
    where = torch.arange(constants.numel()).reshape(units) % 3 != 1
    for reduction in ("mean", "none"):
        options = {"label_smoothing": smoothing, "per": per, "weighting": weighting, "reduction": reduction}

        def objective(x, options=options):
            return cross_entropy(x, target, class_weight, sample_weight=p, where=where, **options)

        with backend(name):
            assert torch.autograd.gradcheck(objective, logits.clone().requires_grad_())
            scored = logits.clone().requires_grad_()
            assert torch.autograd.gradgradcheck(objective, scored, fast_mode=True)


# --- transforms ---


@every_member
def test_vmap_weighs_every_batch_by_itself(weighting):
    losses = torch.tensor(np.random.default_rng(5).gamma(1.0, 1.5, (3, 8)))
    p = torch.rand((3, 8), dtype=torch.float64, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    groups = torch.arange(24).view(3, 8) % GROUPS
    state = None
    if weighting.stateful:
        state = {
            key: torch.stack(
                [torch.as_tensor(leaf, dtype=torch.float64 if isinstance(leaf, float) else None)] * 3
            )
            for key, leaf in weighting.init().items()
        }

    def alone(row, weight, group, state=None):
        groups = group if isinstance(weighting, GroupDRO) else None
        settings = {"sample_weight": weight, "groups": groups, "state": state}
        weights = sample_weights(row, weighting, **settings)
        mean = reweighted_mean(row, weighting, **settings)
        logits = torch.stack([row, -row], 1)
        objective = cross_entropy(logits, group % 2, weighting=weighting, **settings)
        return weights, mean, objective

    arguments = (losses, p, groups) if state is None else (losses, p, groups, state)
    batched = torch.vmap(alone)(*arguments)
    with backend("composite"):
        rows = [
            alone(
                *(x[i] for x in arguments[:3]),
                *([] if state is None else [{k: v[i] for k, v in state.items()}]),
            )
            for i in range(3)
        ]
    for got, expected in zip(leaves(batched), leaves(zip_leaves(rows)), strict=True):
        # The same operations, a sum of 8 in another order.
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)


def zip_leaves(trees):
    return [torch.stack(same) for same in zip(*(leaves(tree) for tree in trees), strict=True)]


@pytest.mark.parametrize("weighting", [CVaR(0.3), Trimmed(KLBall(0.2), 0.25)], ids=str)
def test_a_member_without_a_kernel_is_exported_for_every_batch_size(weighting):
    class Training(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.criterion = RGDLoss(weighting=weighting)

        def forward(self, logits, target, p):
            return self.criterion(logits, target, sample_weight=p)

    def example(n, seed=0):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(n, C, generator=generator, dtype=torch.float64)
        return logits, torch.arange(n) % C, torch.rand(n, generator=generator, dtype=torch.float64)

    size = torch.export.Dim("n", min=2)
    shapes = {"logits": {0: size}, "target": {0: size}, "p": {0: size}}
    program = torch.export.export(Training(), example(6), dynamic_shapes=shapes)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert not [target for target in targets if "rgd" in str(target)]
    for n in (3, 11):
        inputs = example(n, seed=n)
        with backend("composite"):
            expected = Training()(*inputs)
        torch.testing.assert_close(program.module()(*inputs), expected, rtol=1e-13, atol=0)


# --- words ---


def test_a_number_in_place_of_a_weighting_is_refused_with_the_word_tau():
    losses = torch.ones(3)
    optimizer = torch.optim.SGD([torch.ones(1)], lr=1.0)
    for call in (
        lambda: RGD(optimizer, 1.0),
        lambda: sample_weights(losses, 1.0),
        lambda: reweighted_mean(losses, 2),
        lambda: RGDLoss(weighting=0.5),
        lambda: cross_entropy(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), weighting=1.0),
        lambda: weight_stats(losses, losses, 1.0),
    ):
        with pytest.raises(TypeError, match=r"weighting must be an rgd\.Weighting.*did you mean tau="):
            call()
    with pytest.raises(TypeError, match=r"got the class CVaR: call it, as in CVaR\(\.\.\.\)"):
        RGD(optimizer, CVaR)
