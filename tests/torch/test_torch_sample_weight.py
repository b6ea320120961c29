"""`sample_weight=` (the base measure), `where=`, and weights of zero, in every call of the torch front."""

import itertools
import math

import numpy as np
import pytest
import rgd
import torch
import torch.nn.functional as F
from base_measures import INF, NAN, SOME, base_measure, losses_of, mask, run
from family import members
from rgd import ERM, KL, ChiSquare, ChiSquareBall, CVaR, GroupDRO, KLBall, MovingAverage, Trimmed, reference
from rgd.torch import RGD, RGDLoss, backend, cross_entropy, reweighted_mean, sample_weights
from torch_family import (
    EVERY,
    GROUPS,
    N,
    T,
    arrays,
    assert_same_stats,
    assert_within,
    both_backends,
    every_member,
    extras,
    first,
    in_numpy,
    leaves,
    problem,
    weight_allowance,
)

EPS = torch.finfo(torch.float64).eps
STATE = [MovingAverage(KL(2.0), 0.7), GroupDRO(GROUPS, 0.5)]


# --- against the reference ---


@both_backends
@every_member
def test_base_measure_and_mask_reach_the_objective_and_gradient_as_in_the_reference(weighting, name):
    for kind, per, reduction in [
        ("indices", "element", "mean"),
        ("indices", "sample", "mean"),
        ("indices", "element", "none"),
        ("probabilities", "sample", "sum"),
        ("probabilities", "element", "mean"),
    ]:
        logits, target, class_weight, smoothing = problem(kind)
        p, where = base_measure(per), mask(per)
        settings = {
            "weighting": weighting,
            "per": per,
            "reduction": reduction,
            "label_smoothing": smoothing,
            "sample_weight": p,
            "where": where,
            **extras(weighting, per),
        }
        with backend(name) as ran:
            value, gradient, _ = run(
                lambda x, y=target, c=class_weight, s=settings: cross_entropy(x, y, c, **s), logits, weighting
            )
        assert ran == [name]
        wide, given = in_numpy(logits, target, class_weight), arrays(settings)
        if per == "sample":  # there a mask is of the targets
            given["where"] = where.numpy()[:, None]
        expected = first(reference.cross_entropy(*wide, **given), weighting)
        slope = first(reference.cross_entropy_grad(*wide, **given), weighting)
        # How far the weights may be off: from those of the reference, of what takes part.
        losses = reference.cross_entropy_losses(*wide, label_smoothing=smoothing)
        units, part = losses, target.numpy() != -100 if kind == "indices" else np.ones((N, T), bool)
        if per == "sample":
            number = part.sum(1)
            units, part = losses.sum(1) / np.maximum(number, 1), number > 0
        part = part & where.numpy() & (p.numpy() > 0)
        state = {key: given[key] for key in ("state", "groups") if key in given}
        weights = first(
            reference.sample_weights(units, weighting, part, sample_weight=p.numpy(), **state), weighting
        )
        loss_error = 24 * EPS * (2 * float(logits.abs().max()) + math.log(logits.shape[1]))
        error = weight_allowance(units[part], weights[part], weighting, loss_error, EPS)
        # At most: every weight off by `error` times the largest loss and p; sums of N * T terms.
        largest_p, largest = 1.75, float(np.max(losses))
        allowed = largest_p * (error * largest + np.max(weights) * (loss_error + (N * T + 8) * EPS * largest))
        terms = {"mean": 4.0, "none": 1.0, "sum": float(N * T)}[reduction]
        assert_within(value, expected, terms * allowed)
        slopes = 4 * largest_p * (error + np.max(weights) * (12 * EPS + 2 * loss_error))
        assert_within(gradient, slope, slopes)


# --- an integer is a repetition ---


def repeated(tensor, times):
    return tensor.repeat_interleave(times, 0)


@both_backends
@every_member
@pytest.mark.parametrize("per", ["element", "sample"])
def test_an_integer_equals_repeating_the_sample(weighting, name, per):
    logits, target, class_weight, _ = problem("indices")
    if per == "element":
        logits, target = logits[..., 0], target[..., 0]
    times = torch.arange(N) % 4
    given = extras(weighting, "sample")
    groups = given.pop("groups", None)
    for reduction in ("mean", "sum"):
        options = {"weighting": weighting, "per": per, "reduction": reduction, **given}

        def weighed(x, options=options):
            return cross_entropy(x, target, class_weight, sample_weight=times, groups=groups, **options)

        def copied(x, options=options):
            several = None if groups is None else repeated(groups, times)
            return cross_entropy(
                repeated(x, times), repeated(target, times), class_weight, groups=several, **options
            )

        with backend(name):
            mine, expected = (run(function, logits, weighting) for function in (weighed, copied))
        # A sum of up to 14 samples in another order, and what it makes of the weights.
        losses = F.cross_entropy(logits, target, class_weight, reduction="none")
        units = losses if per == "element" else losses.sum(1) / (target != -100).sum(1).clamp(min=1)
        weights = sample_weights(
            units,
            weighting,
            sample_weight=times,
            groups=groups,
            **({"state": weighting.init()} if given else {}),
        )
        error = weight_allowance(
            units.numpy(), first(weights, weighting).numpy(), weighting, 4 * EPS * float(units.max()), EPS
        )
        scale = float(losses.max()) * 2 * (1.0 if reduction == "mean" else float(times.sum()) * T)
        torch.testing.assert_close(mine[0], expected[0], rtol=64 * EPS, atol=error * scale)
        torch.testing.assert_close(mine[1], expected[1], rtol=64 * EPS, atol=12 * error)
        for got, wanted in zip(leaves(mine[2]), leaves(expected[2]), strict=True):
            if got is not None:
                torch.testing.assert_close(got, wanted, rtol=64 * EPS, atol=64 * EPS)


@both_backends
@members([*SOME, *STATE])
def test_the_integer_dtype_does_not_matter(weighting, name):
    losses, p = losses_of((N,)), torch.arange(N) % 3
    given = extras(weighting, "sample")
    with backend(name):
        expected = first(reweighted_mean(losses, weighting, sample_weight=p.double(), **given), weighting)
        for dtype in (torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16):
            value = first(reweighted_mean(losses, weighting, sample_weight=p.to(dtype), **given), weighting)
            assert torch.equal(value, expected)


# --- zero is a mask ---


@both_backends
@every_member
def test_a_base_measure_of_zero_is_as_a_mask_whatever_the_loss(weighting, name):
    losses = losses_of()
    where = torch.arange(N * T).view(N, T) % 3 != 1
    broken = losses.masked_fill(~where, NAN)
    broken[0, 1] = INF
    given = extras(weighting, "element")
    settings = ({"where": where}, {"sample_weight": where.double()}, {"sample_weight": where.int()})
    with backend(name):
        results = [
            run(lambda x, s=s: reweighted_mean(x, weighting, **s, **given), broken, weighting)
            for s in settings
        ]
        weights = [first(sample_weights(broken, weighting, **s, **given), weighting) for s in settings]
        clean = run(lambda x: reweighted_mean(x, weighting, where=where, **given), losses, weighting)
    for value, gradient, state in results:
        assert torch.equal(value, clean[0])
        assert torch.equal(gradient, clean[1])
        assert all(map(torch.equal, leaves(state), leaves(clean[2]))) if weighting.stateful else state is None
        assert not gradient[~where].any()
    for w in weights:
        assert torch.equal(w, weights[0])
        assert not w[~where].any()


@both_backends
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("per", ["element", "sample"])
@members([*SOME, *STATE])
def test_a_masked_target_counts_as_little_as_one_that_is_not_there(weighting, per, kind, name):
    logits, target, class_weight, _ = problem(kind)
    if per == "element":
        logits, target = logits[..., 0], target[..., 0]
    kept = torch.arange(N) % 3 != 1
    given = extras(weighting, "sample")
    groups = given.pop("groups", None)
    few = RGDLoss(class_weight, weighting=weighting, per=per)
    shown = None if groups is None else groups[kept]
    with backend(name):
        expected = run(lambda x: few(x[kept], target[kept], groups=shown), logits, ERM())
        for extra in ({"where": kept}, {"sample_weight": kept.double()}):
            criterion = RGDLoss(class_weight, weighting=weighting, per=per)
            value, gradient, _ = run(
                lambda x, c=criterion, e=extra: c(x, target, groups=groups, **e), logits, ERM()
            )
            torch.testing.assert_close(value, expected[0], rtol=1e-13, atol=0)
            torch.testing.assert_close(gradient, expected[1], rtol=1e-12, atol=1e-16)
            assert criterion.stats().count == few.stats().count


@both_backends
def test_a_mask_of_indices_is_as_ignoring_them(name):
    logits, target, class_weight, _ = problem("indices")
    where = mask("element")
    for reduction, weighting in itertools.product(["mean", "sum", "none"], SOME):
        criterion = RGDLoss(class_weight, weighting=weighting, reduction=reduction, label_smoothing=0.1)
        with backend(name):
            mine = run(lambda x, c=criterion: c(x, target, where=where), logits, ERM())
            ignored = target.masked_fill(~where, -100)
            expected = run(lambda x, c=criterion, y=ignored: c(x, y), logits, ERM())
        for got, wanted in zip(mine[:2], expected[:2], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-15)


@both_backends
@members([*SOME, *STATE])
def test_nothing_that_takes_part_gives_nan_for_the_mean_and_zero_for_the_sum(weighting, name):
    logits, target, _, _ = problem("indices")
    criterion = RGDLoss(weighting=weighting)
    total = RGDLoss(weighting=weighting, reduction="sum")
    groups = torch.zeros(N, dtype=torch.int64)
    before = {key: value.clone() for key, value in criterion.state_dict().items()}
    for extra in ({"where": torch.zeros(N, T, dtype=torch.bool)}, {"sample_weight": torch.zeros(N)}):
        with backend(name):
            assert criterion(logits, target, groups=groups, **extra).isnan()
            assert total(logits, target, groups=groups, **extra) == 0
        assert criterion.stats().count == 0
    for key, value in criterion.state_dict().items():
        assert torch.equal(value, before[key])


@both_backends
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@members([*SOME, *STATE])
def test_broken_logits_of_a_masked_target_reach_no_other(weighting, kind, name):
    logits, target, class_weight, _ = problem(kind)
    logits, target = logits[..., 0], target[..., 0]
    kept = torch.arange(N) != 4
    broken = logits.clone()
    broken[4, 1] = NAN
    given = extras(weighting, "sample")

    def masked(x):
        return cross_entropy(x, target, class_weight, weighting=weighting, where=kept, **given)

    with backend(name):
        expected, mine = run(masked, logits, weighting), run(masked, broken, weighting)
    assert torch.equal(mine[0], expected[0])
    assert torch.equal(mine[1][kept], expected[1][kept])
    assert not expected[1][4].any()


# --- shapes ---


@both_backends
@members([*SOME, *STATE])
def test_one_entry_a_sample_serves_all_its_losses(weighting, name):
    logits, target, class_weight, _ = problem("indices")
    p = base_measure("sample")
    given = extras(weighting, "element")
    with backend(name):
        for call in (
            lambda p: cross_entropy(
                logits, target, class_weight, weighting=weighting, sample_weight=p, **given
            ),
            lambda p: reweighted_mean(losses_of(), weighting, sample_weight=p, **given),
            lambda p: sample_weights(losses_of(), weighting, sample_weight=p, **given),
        ):
            assert torch.equal(first(call(p), weighting), first(call(p[:, None].expand(N, T)), weighting))
        # A view with other strides is read as it is.
        strided = torch.stack([p, -p], 1)[:, 0]
        assert torch.equal(first(call(strided), weighting), first(call(p), weighting))


@both_backends
@members(SOME)
def test_with_class_weights_the_mean_divides_by_their_sum_over_the_base_measure(weighting, name):
    logits, target, class_weight, _ = problem("indices")
    kept = target != -100
    for per in ("element", "sample"):
        p = base_measure(per)
        spread = p[:, None].expand(N, T) if per == "sample" else p
        divisor = (spread * class_weight[target.clamp(min=0)] * kept).sum()
        settings = {"weighting": weighting, "per": per, "sample_weight": p}
        with backend(name):
            mean = cross_entropy(logits, target, class_weight, **settings)
            total = cross_entropy(logits, target, class_weight, reduction="sum", **settings)
            parts = cross_entropy(logits, target, class_weight, reduction="none", **settings)
        torch.testing.assert_close(mean, total / divisor, rtol=1e-14, atol=0)
        torch.testing.assert_close(parts.sum(), total, rtol=1e-14, atol=0)


@both_backends
def test_a_single_unbatched_sample_takes_a_number(name):
    logits, target = torch.randn(5, dtype=torch.float64), torch.tensor(2)
    with backend(name):
        plain = cross_entropy(logits, target)
        for p in (0.5, 2.0):
            number = torch.tensor(p)
            torch.testing.assert_close(cross_entropy(logits, target, sample_weight=number), plain)
            total = cross_entropy(logits, target, sample_weight=number, reduction="sum")
            torch.testing.assert_close(total, p * plain)
        assert cross_entropy(logits, target, where=torch.tensor(False), reduction="sum") == 0


def test_the_base_measure_is_a_constant_to_autograd():
    p = torch.ones(4, requires_grad=True)
    losses = torch.arange(4.0, requires_grad=True)
    reweighted_mean(losses, KL(2.0, normalize=True), sample_weight=p).backward()
    assert p.grad is None
    assert losses.grad is not None


# --- a weight of zero ---


@both_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per", ["element", "sample"])
def test_an_impossible_label_of_weight_zero_adds_nothing(name, per, dtype):
    # exp(-loss) is the label's probability: 0 where its logit is -inf.
    weighting = KL(INF, scale=-1.0)
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    target = torch.tensor([0, 1, 2, 0])
    logits[1, 1] = -INF
    others = [0, 2, 3]
    for reduction in ("mean", "sum", "none"):
        criterion = RGDLoss(weighting=weighting, per=per, reduction=reduction)
        with backend(name):
            value, gradient, _ = run(lambda x, c=criterion: c(x, target), logits, ERM())
            stats = criterion.stats()
            rest = RGDLoss(
                weighting=weighting, per=per, reduction="sum" if reduction == "mean" else reduction
            )
            expected, slope, _ = run(lambda x, r=rest: r(x[others], target[others]), logits, ERM())
        if reduction == "none":
            assert value[1] == 0
            assert torch.equal(value[others], expected)
        else:
            torch.testing.assert_close(value, expected / (4 if reduction == "mean" else 1))
        assert not gradient[1].any()
        torch.testing.assert_close(gradient[others], slope[others] / (4 if reduction == "mean" else 1))
        assert stats.mean_loss == INF
        assert math.isfinite(stats.objective)


@both_backends
def test_an_infinite_loss_of_weight_zero_adds_nothing_to_any_mean(name):
    low, high = torch.tensor([1.0, -INF, 2.0, 3.0]), torch.tensor([1.0, INF, 2.0, 3.0])
    for weighting, losses in [
        (KL(INF, scale=-1.0), high),
        (KL(INF, scale=1.0), low),
        (CVaR(0.5), low),
        (Trimmed(ERM(), 0.25), high),
        (Trimmed(KL(1.0), 0.3), high),
        (Trimmed(CVaR(0.5), 0.25), high),
    ]:
        losses = losses.double()  # noqa: PLW2901
        parameter = torch.ones((), dtype=torch.float64, requires_grad=True)
        optimizer = RGD(torch.optim.SGD([parameter], lr=1.0), weighting)
        with backend(name):
            weights = sample_weights(losses, weighting)
            value, gradient, _ = run(lambda x, m=weighting: reweighted_mean(x, m), losses, ERM())
            by_base = RGDLoss(weighting=weighting, base=lambda x: x)(losses)
            # Added: the product of a gradient of 0 with an infinite factor would be NaN.
            by_optimizer = optimizer.backward(losses + parameter - 1.0)
        assert weights[1] == 0
        expected = (weights * losses)[[0, 2, 3]].sum() / 4
        for got in (value, by_base, by_optimizer):
            torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)
        torch.testing.assert_close(gradient, weights / 4, rtol=1e-14, atol=0)
        torch.testing.assert_close(parameter.grad, weights.sum() / 4, rtol=1e-14, atol=0)


@both_backends
@members(EVERY)
def test_a_nan_loss_stays_nan(weighting, name):
    losses = losses_of((8,))
    losses[2] = NAN
    given = extras(weighting, "sample")
    if "groups" in given:
        given["groups"] = given["groups"][:8]
    criterion = RGDLoss(weighting=weighting, base=lambda x: x)
    logits = torch.stack([losses, -losses], 1)
    classified = RGDLoss(weighting=weighting)
    with backend(name):
        assert first(reweighted_mean(losses, weighting, **given), weighting).isnan()
        assert criterion(losses, groups=given.get("groups")).isnan()
        assert classified(logits, torch.zeros(8, dtype=torch.int64), groups=given.get("groups")).isnan()


# --- statistics ---


@both_backends
@members([*SOME, *STATE])
def test_the_statistics_of_a_loss_heed_base_measure_and_mask(weighting, name):
    losses, p, where = losses_of(), base_measure("element"), mask("element")
    given = extras(weighting, "element")
    criterion = RGDLoss(weighting=weighting, base=lambda x: x)
    with backend(name):
        objective = criterion(losses, sample_weight=p, where=where, groups=given.get("groups"))
        weights = first(sample_weights(losses, weighting, sample_weight=p, where=where, **given), weighting)
    stats = criterion.stats()
    expected = rgd.weight_stats(
        losses.numpy(),
        weights.numpy(),
        weighting,
        sample_weight=p.numpy(),
        where=where.numpy(),
        groups=None if "groups" not in given else given["groups"].numpy(),
    )
    assert_same_stats(stats, expected, N * T)
    assert stats.objective == pytest.approx(objective.item(), rel=1e-13)
    assert stats.count == int((where & (p > 0)).sum())


@pytest.mark.parametrize(
    "weighting",
    [KL(1.0, normalize=True), KLBall(0.3), ChiSquare(1.0), ChiSquareBall(0.3), CVaR(0.4)],
    ids=str,
)
def test_weights_over_a_batch_with_a_measure_come_from_the_kernel(weighting, monkeypatch):
    losses, measure = torch.rand(9, generator=torch.manual_seed(0)), torch.arange(9.0)
    logits, target = torch.randn(9, 4), torch.arange(9) % 4
    expected = reference.sample_weights(losses.numpy(), weighting, sample_weight=measure.numpy())

    def refuse(self, batch):
        raise AssertionError("the formula was asked")

    monkeypatch.setattr(type(weighting), "weights", refuse)
    weights = sample_weights(losses, weighting, sample_weight=measure)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)
    single = rgd.sample_weights(losses.numpy(), weighting, sample_weight=measure.numpy())
    np.testing.assert_array_equal(single, weights.numpy())
    criterion = RGDLoss(weighting=weighting)
    assert torch.isfinite(criterion(logits, target, sample_weight=measure))
