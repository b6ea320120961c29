"""Every member of the family in the torch front: both backends, every option, against the float64 oracle."""

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import rgd
import torch
import torch.nn.functional as F
from family import MEMBERS, members, root_allowance
from rgd import KL, CVaR, Focal, GroupDRO, KLBall, MovingAverage, Pointwise, Trimmed, reference
from rgd.torch import RGD, RGDLoss, backend, cross_entropy, reweighted_mean, sample_weights, weight_stats


def falling(losses):
    """Weights of a user's own, in arithmetic that every front's arrays have."""
    return 1 / (1 + losses * losses)


GROUPS = 3
STATEFUL = [
    MovingAverage(KL(2.0), 0.7),
    MovingAverage(Focal(2.0), 0.0),
    GroupDRO(GROUPS, 0.5),
    Trimmed(MovingAverage(KL(1.0), 0.9), 0.25),
]
EVERY = [*MEMBERS, Pointwise(falling), *STATEFUL]
BACKENDS = ["rust", "composite"]
every_member = members(EVERY)
both_backends = pytest.mark.parametrize("name", BACKENDS)
N, C, T = 9, 4, 3


# --- the problems, and how far a right answer may be off ---


def logits_of(shape=(N, C, T), seed=0):
    return 2 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(kind, dtype=torch.float64, seed=0):
    """Logits, target, class weights and label smoothing; one index in five is ignored, one sample whole."""
    logits = logits_of(seed=seed).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    if kind == "probabilities":
        target = torch.randn(N, C, T, generator=generator).softmax(1).to(dtype)
        return logits, target, None, 0.0
    target = torch.randint(C, (N, T), generator=generator)
    target.view(-1)[::5] = -100
    target[2] = -100
    weight = torch.linspace(0.5, 2.0, C, dtype=torch.float64).to(dtype)
    return logits, target, weight, 0.1


def groups_of(per, seed=0):
    shape = (N,) if per == "sample" else (N, T)
    return torch.randint(GROUPS, shape, generator=torch.Generator().manual_seed(seed + 2))


def extras(weighting, per, seed=0):
    """What a call needs for some members alone: groups, and a state."""
    given = {}
    if isinstance(weighting, GroupDRO):
        given["groups"] = groups_of(per, seed)
    if weighting.stateful:
        given["state"] = weighting.init()
    return given


def arrays(settings):
    return {
        key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in settings.items()
    }


def first(result, weighting):
    return result[0] if weighting.stateful else result


def sensitivity(losses, weights, weighting):
    """How fast the weights move with the losses: they are a function of the loss, so its steepest slope.

    Errors of single losses reach the other weights through the batch's sums, by at most as much again.
    """
    if isinstance(weighting, GroupDRO):  # by its group's share, a weight moves step_size times itself
        return weighting.step_size * np.max(weights, initial=0.0)
    order = np.argsort(losses)
    steps, gaps = np.abs(np.diff(weights[order])), np.diff(losses[order])
    return np.max(steps[gaps > 0] / gaps[gaps > 0], initial=0.0)


def weight_allowance(losses, weights, weighting, loss_error, eps):
    """The error of weights: roundings of sums over the batch, and what the errors of losses make of it."""
    losses, weights = losses.reshape(-1), weights.reshape(-1)
    largest = np.max(weights, initial=0.0)
    roundings = (2 * losses.size + 32) * eps * largest
    moved = 2 * max(1.0, largest) * sensitivity(losses, weights, weighting) * loss_error
    return roundings + moved + np.max(root_allowance(weights, weighting), initial=0.0)


def in_numpy(*tensors):
    """The same numbers, floats in float64."""
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in tensors]
    return [None if x is None else x.numpy() for x in wide]


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


def assert_within(actual, expected, allowed, rounding=0.0):
    """Equal to an absolute allowance and, where the result is rounded to a narrow dtype, to half a unit."""
    actual, expected = np.asarray(actual.detach().double()), np.asarray(expected)
    assert actual.shape == expected.shape
    difference = np.abs(actual - expected)
    assert np.all(np.isfinite(expected))
    assert np.all(difference <= allowed + rounding * np.abs(expected)), (
        f"off by {np.max(difference)}, allowed {np.max(allowed)}"
    )


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


def leaves(tree):
    if isinstance(tree, dict):
        return [leaf for part in tree.values() for leaf in leaves(part)]
    if isinstance(tree, (tuple, list)):
        return [leaf for part in tree for leaf in leaves(part)]
    return [tree]


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


# --- groups ---


@both_backends
def test_group_dro_gains_weight_for_the_group_of_large_loss(name):
    losses = torch.tensor([0.1, 0.2, 3.0, 2.0, 0.3], dtype=torch.float64)
    groups = torch.tensor([0, 0, 1, 1, 0])
    weighting = GroupDRO(3, 0.5)  # group 2 is absent
    q = torch.tensor([1 / 3] * 3, dtype=torch.float64)
    criterion = RGDLoss(weighting=weighting, base=lambda x: x)
    parameter = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = RGD(torch.optim.SGD([parameter], lr=0.1), weighting)
    state = weighting.init()
    for _ in range(3):
        q = q * torch.exp(0.5 * torch.tensor([0.2, 2.5, 0.0], dtype=torch.float64))
        q /= q.sum()
        expected = q[0] * 0.2 + q[1] * 2.5
        with backend(name):
            objective = criterion(losses, groups=groups)
            mean, state = reweighted_mean(losses, weighting, groups=groups, state=state)
            descended = optimizer.objective(losses * parameter, groups=groups)
        for value in (objective, mean, descended.detach()):
            torch.testing.assert_close(value, expected, rtol=1e-14, atol=0)
        torch.testing.assert_close(state["shares"], q, rtol=1e-14, atol=0)
    torch.testing.assert_close(criterion.weighting_state.shares, q, rtol=1e-14, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["weighting_state"]["shares"], q, rtol=1e-14, atol=0)


@both_backends
def test_groups_of_samples_serve_all_their_targets(name):
    logits, target, _, _ = problem("indices")
    by_sample = torch.arange(N) % GROUPS
    weighting = GroupDRO(GROUPS, 0.5)
    with backend(name):
        for dtype in (torch.int64, torch.int32, torch.uint8):
            one = RGDLoss(weighting=weighting)(logits, target, groups=by_sample.to(dtype))
            each = RGDLoss(weighting=weighting)(logits, target, groups=by_sample[:, None].expand(N, T))
            assert torch.equal(one, each)


CALLS = {
    "sample_weights": lambda m, **k: sample_weights(torch.ones(4), m, state=m.init(), **k),
    "reweighted_mean": lambda m, **k: reweighted_mean(torch.ones(4), m, state=m.init(), **k),
    "cross_entropy": lambda m, **k: cross_entropy(
        torch.zeros(4, 3), torch.arange(4) % 3, weighting=m, state=m.init(), **k
    ),
    "RGDLoss": lambda m, **k: RGDLoss(weighting=m)(torch.zeros(4, 3), torch.arange(4) % 3, **k),
    "RGDLoss of a base": lambda m, **k: RGDLoss(weighting=m, base=lambda x: x)(torch.ones(4), **k),
    "RGD": lambda m, **k: RGD(torch.optim.SGD([torch.ones(1)], lr=1.0), m).objective(torch.ones(4), **k),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@calls
@both_backends
def test_groups_that_are_missing_or_out_of_range_are_refused(call, name):
    weighting = GroupDRO(2, 0.1)
    with backend(name):
        with pytest.raises(ValueError, match=r"GroupDRO needs the group of each sample: give groups="):
            call(weighting)
        for wrong, said in ([0, 1, 2, 0], "0 to 2"), ([0, 1, -1, 0], "-1 to 1"):
            with pytest.raises(
                ValueError, match=rf"groups must lie in 0\.\.1 for GroupDRO\(groups=2\), got {said}"
            ):
                call(weighting, groups=torch.tensor(wrong))


@calls
def test_groups_of_the_wrong_kind_are_refused(call):
    weighting = GroupDRO(2, 0.1)
    for wrong, error, said in [
        ([0, 1, 0, 1], TypeError, r"groups must be a torch\.Tensor of integers, got list"),
        (torch.zeros(4), TypeError, r"groups must be a torch\.Tensor of integers, got torch\.float32"),
        (torch.zeros(4, dtype=torch.bool), TypeError, r"of integers, got torch\.bool"),
        (
            torch.zeros(3, dtype=torch.int64),
            ValueError,
            r"groups must have the shape of the losses, \(4,\), .* got \(3,\)",
        ),
        (
            torch.zeros(4, dtype=torch.int64, device="meta"),
            ValueError,
            r"losses are on cpu and groups on meta: move",
        ),
    ]:
        with pytest.raises(error, match=said):
            call(weighting, groups=wrong)


def test_a_group_out_of_range_makes_its_weight_nan_where_values_cannot_be_read():
    weighting = GroupDRO(2, 0.1)
    losses, groups = torch.ones(1, 3), torch.tensor([[0, 1, 2]])
    state = {"shares": torch.full((1, 2), 0.5)}
    weights, _ = torch.vmap(lambda x, g, s: sample_weights(x, weighting, groups=g, state=s))(
        losses, groups, state
    )
    assert weights.isnan().tolist() == [[False, False, True]]


# --- statistics ---


def assert_same_stats(stats, expected, n):
    """Sums of `n` terms in another order, and logarithms of them."""
    tolerance = (2 * n + 16) * np.finfo(np.float64).eps
    groups, wanted = stats.groups, expected.groups
    assert (groups is None) == (wanted is None)
    for field in dataclasses.fields(stats):
        if field.name == "groups":
            continue
        got, other = getattr(stats, field.name), getattr(expected, field.name)
        assert got is other or got == pytest.approx(other, rel=tolerance, abs=tolerance, nan_ok=True), (
            field.name
        )
    if groups is not None:
        assert groups.count == wanted.count
        assert groups.mean_loss == pytest.approx(wanted.mean_loss, rel=tolerance, nan_ok=True)
        assert groups.weight_share == pytest.approx(wanted.weight_share, rel=tolerance, nan_ok=True)


@every_member
def test_statistics_are_those_of_numpy(weighting):
    losses = torch.tensor(np.random.default_rng(7).gamma(1.0, 1.5, (N, T)))
    weights = first(sample_weights(losses, weighting, **extras(weighting, "element")), weighting)
    where = torch.arange(N * T).view(N, T) % 4 != 0
    for options in (
        {},
        {"where": where},
        {"sample_weight": torch.arange(N) / 4},
        {"where": where, "sample_weight": torch.rand(N, T).double(), "groups": torch.arange(N) % 4 * 2},
    ):
        stats = weight_stats(losses, weights, weighting, **options)
        expected = rgd.weight_stats(losses.numpy(), weights.numpy(), weighting, **arrays(options))
        assert_same_stats(stats, expected, N * T)


@both_backends
@pytest.mark.parametrize("per", ["element", "sample"])
@members([KL(1.0), KL(1.0, normalize=True), CVaR(0.3), GroupDRO(GROUPS, 0.5)])
def test_the_loss_describes_its_groups_and_base_measure(weighting, per, name):
    logits, target, _, _ = problem("indices")
    p = torch.linspace(0.0, 2.0, N, dtype=torch.float64)
    groups = torch.arange(N) % GROUPS
    criterion = RGDLoss(weighting=weighting, per=per)
    with backend(name):
        criterion(logits, target, sample_weight=p, groups=groups)
    losses = F.cross_entropy(logits, target, reduction="none")
    kept = target != -100
    if per == "sample":
        losses, kept, base, members_of = losses.sum(1) / kept.sum(1).clamp(min=1), kept.any(1), p, groups
    else:
        base, members_of = p[:, None].expand(N, T), groups[:, None].expand(N, T)
    given = {"sample_weight": base.numpy(), "groups": members_of.numpy()}
    where = kept.numpy()
    state = {"state": weighting.init()} if weighting.stateful else {}
    weights = first(reference.sample_weights(losses.numpy(), weighting, where, **given, **state), weighting)
    expected = reference.weight_stats(losses.numpy(), weights, weighting, where=where, **given)
    stats = criterion.stats()
    if per == "sample":
        # The objective is over targets, all of a sample's with its weight.
        of_targets = F.cross_entropy(logits, target, reduction="none").sum(1).numpy()
        mass = float((p[:, None] * (target != -100)).sum())
        plain, weighted = (
            float(np.sum(p.numpy() * of_targets)),
            float(np.sum(p.numpy() * weights * of_targets)),
        )
        expected = dataclasses.replace(expected, mean_loss=plain / mass, objective=weighted / mass)
    assert_same_stats(stats, expected, N * T)
    assert stats == criterion.stats(groups=groups)
    other = criterion.stats(groups=torch.zeros(N, dtype=torch.int64))
    assert other.groups.count == (stats.count,)
    assert other.groups.weight_share == pytest.approx((1.0,))


def test_groups_of_statistics_are_checked():
    criterion = RGDLoss()
    criterion(torch.zeros(4, 3), torch.arange(4) % 3)
    assert criterion.stats().groups is None
    with pytest.raises(ValueError, match=r"groups must be integers >= 0, got -1"):
        criterion.stats(groups=torch.tensor([0, -1, 0, 0]))
    with pytest.raises(ValueError, match=r"groups must have the shape of the losses, \(4,\)"):
        criterion.stats(groups=torch.zeros(5, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"groups must be a torch\.Tensor of integers"):
        criterion.stats(groups=[0, 1, 0, 1])


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
