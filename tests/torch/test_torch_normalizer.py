"""`normalizer=`: one denominator for a step; and `count_targets`, which counts it. In float64, to 1e-12."""

import math

import pytest
import rgd
import torch
from rgd.torch import (
    LinearRGDLoss,
    RGDLoss,
    backend,
    count_targets,
    cross_entropy,
    linear_cross_entropy,
    reweighted_mean,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

N, T, C, D, STEP = 7, 4, 5, 6, 17.25
BACKENDS = ["rust", "composite"]
MEMBERS = [rgd.KL(), rgd.Focal(2.0), rgd.CVaR(0.5)]
MASK = torch.arange(N * T).view(N, T) % 5 != 3
P = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 3.0, 1.25], dtype=torch.float64)
CLASS_WEIGHT = torch.linspace(0.5, 2.0, C, dtype=torch.float64)
OPTIONS = {
    "plain": {},
    "classes": {"weight": CLASS_WEIGHT, "label_smoothing": 0.1},
    "by sample": {"per": "sample", "sample_weight": P},
    "weighted": {"sample_weight": P, "z_loss": 0.05},
    "masked": {"where": MASK},
    "huge weights": {"sample_weight": P * 1e300},
}


def batch():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, T, D, generator=generator, dtype=torch.float64)
    head = torch.randn(C, D, generator=generator, dtype=torch.float64)
    target = torch.randint(0, C, (N, T), generator=generator)
    target[0, 1] = target[2, 3] = -100
    return hidden, head, target


def logits_of(hidden, head):
    return F.linear(hidden, head).movedim(-1, 1)


def results(loss, inputs):
    objective = loss(*inputs)
    return objective.detach(), *torch.autograd.grad(objective, inputs)


def assert_same(mine, other, tolerance=1e-12):
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", BACKENDS)
def test_the_mean_is_the_sum_over_the_normalizer(kind, name):
    hidden, head, target = batch()
    logits = logits_of(hidden, head).requires_grad_()
    inputs = hidden.requires_grad_(), head.requires_grad_()
    step = STEP * 1e300 if name == "huge weights" else STEP
    for weighting in MEMBERS:
        settings = {"weighting": weighting, **OPTIONS[name]}

        def summed(x, settings=settings):
            return cross_entropy(x, target, reduction="sum", **settings) / step

        for given in (step, torch.tensor(step), torch.tensor(step, dtype=torch.float64)):
            if float(given) != step:
                continue  # float32 does not hold it
            with backend(kind):
                other = results(summed, (logits,))
                mine = results(
                    lambda x, n=given, s=settings: cross_entropy(x, target, normalizer=n, **s), (logits,)
                )
                assert_same(mine, other)

                def chunked(h, w, n=given, settings=settings):
                    bytes_of_rows = 3 * C * 8
                    return linear_cross_entropy(
                        h, w, target, normalizer=n, chunk_bytes=bytes_of_rows, **settings
                    )

                whole = results(lambda h, w, summed=summed: summed(logits_of(h, w)), inputs)
                assert_same(results(chunked, inputs), whole)


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("settings", [{}, {"weight": CLASS_WEIGHT}, {"shift": True}], ids=str)
def test_unequal_micro_batches_add_up_to_one_big_batch(settings, kind):
    hidden, head, target = batch()
    target[5:, 1:] = -100  # two tokens are left of eight
    inputs = hidden.requires_grad_(), head.requires_grad_()
    parts = [slice(0, 5), slice(5, 7)]
    total = count_targets([target[part] for part in parts], **settings)

    def one(h, w):
        return linear_cross_entropy(h, w, target, **settings)

    def added(h, w):
        parts_of = [
            linear_cross_entropy(h[part], w, target[part], normalizer=total, **settings) for part in parts
        ]
        return sum(parts_of)

    def mean_of_means(h, w):
        return sum(linear_cross_entropy(h[part], w, target[part], **settings) for part in parts) / 2

    with backend(kind):
        whole = results(one, inputs)
        assert_same(results(added, inputs), whole)
        assert (results(mean_of_means, inputs)[2] - whole[2]).abs().max() > 0.01


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("weighting", [rgd.KL(), rgd.CVaR(0.5)], ids=str)
def test_compiled_graphs_and_second_derivatives_give_the_same(weighting, kind):
    hidden, head, target = batch()
    logits = logits_of(hidden, head).requires_grad_()
    inputs = hidden.requires_grad_(), head.requires_grad_()

    def dense(x, n):
        return cross_entropy(x, target, weighting=weighting, normalizer=n)

    def linear(h, w, n):
        return linear_cross_entropy(h, w, target, weighting=weighting, normalizer=n)

    with backend(kind):
        for loss, given in ((dense, (logits,)), (linear, inputs)):
            torch._dynamo.reset()
            counter = CompileCounterWithBackend("aot_eager")
            graph = torch.compile(loss, fullgraph=True, backend=counter)
            for n in (torch.tensor(4.0), torch.tensor(STEP), torch.tensor(9)):
                assert_same(
                    results(lambda *x, n=n, graph=graph: graph(*x, n), given),
                    results(lambda *x, n=n, loss=loss: loss(*x, n), given),
                )
            assert counter.frame_count <= 2  # the integer is another dtype
            assert_same(
                results(lambda *x, graph=graph: graph(*x, 4), given),
                results(lambda *x, loss=loss: loss(*x, 4), given),
            )
            assert graph(*given, torch.tensor(-1.0)).isnan()

    def second(loss, given):
        first = torch.autograd.grad(loss(*given, STEP), given, create_graph=True)
        return torch.autograd.grad(sum(one.square().sum() for one in first), given)

    with backend(kind):
        mine = (*second(dense, (logits,)), *second(linear, inputs))
    with backend("composite"):
        other = second(dense, (logits,))
        other = (*other, *second(lambda h, w, n: dense(logits_of(h, w), n), inputs))
    assert_same(mine, other, 1e-10)


@pytest.mark.parametrize("kind", BACKENDS)
def test_the_gradient_is_that_of_finite_differences(kind):
    hidden, head, target = batch()
    inputs = hidden[:3].requires_grad_(), head.requires_grad_()
    for weighting in (rgd.ERM(), rgd.Pointwise(lambda losses: torch.full_like(losses, 0.5))):
        with backend(kind):
            assert torch.autograd.gradcheck(
                lambda h, w, m=weighting: linear_cross_entropy(h, w, target[:3], weighting=m, normalizer=3.5),
                inputs,
            )


@pytest.mark.parametrize("kind", BACKENDS)
def test_over_the_logits(kind):
    hidden, head, target = batch()
    head = head.requires_grad_()
    for weighting in (rgd.KL(), rgd.CVaR(0.5)):
        found = []
        for inplace in (False, True):
            with backend(kind):
                value = cross_entropy(
                    logits_of(hidden, head), target, weighting=weighting, normalizer=STEP, inplace=inplace
                )
            found.append((value.detach(), *torch.autograd.grad(value, head)))
        assert_same(*found)


def test_modules_take_it_and_statistics_divide_the_objective_by_it():
    hidden, head, target = batch()
    linear = LinearRGDLoss(D, C, dtype=torch.float64)
    base = RGDLoss(base=nn.BCEWithLogitsLoss(reduction="none"))
    dense = RGDLoss()
    for criterion, given in (
        (dense, (logits_of(hidden, head).requires_grad_(), target)),
        (linear, (hidden, target)),
        (base, (hidden, (hidden > 0).double())),
    ):
        own = criterion(*given)
        before = criterion.stats()
        mine = criterion(*given, normalizer=STEP)
        after = criterion.stats()
        count = before.count
        torch.testing.assert_close(mine, own * count / STEP, rtol=1e-12, atol=0)
        assert math.isclose(after.objective, before.objective * count / STEP, rel_tol=1e-12)
        assert math.isclose(after.objective, mine.item(), rel_tol=1e-12)
        assert (after.mean_loss, after.worst_tenth) == (before.mean_loss, before.worst_tenth)
        # A call without it, which looks like the one before the last, is not taken for the last one.
        assert torch.equal(criterion(*given), own)
        with torch.no_grad():  # an evaluation
            torch.testing.assert_close(
                criterion(*given, normalizer=STEP), criterion(*given) * count / STEP, rtol=1e-12, atol=0
            )


def test_the_totals_of_a_step_are_those_of_one_big_batch():
    hidden, head, target = batch()
    logits = logits_of(hidden, head).requires_grad_()
    criterion, whole = RGDLoss(), RGDLoss()
    criterion.reset_stats()
    total = count_targets([target])
    for part in (slice(0, 5), slice(5, 7)):
        criterion(logits[part], target[part], normalizer=total)
    whole(logits, target)
    assert math.isclose(criterion.stats(total=True).objective, whole.stats().objective, rel_tol=1e-12)


def test_the_mean_of_any_losses_takes_it():
    losses = torch.rand(N, T, dtype=torch.float64, requires_grad=True)
    p = torch.rand(N, T, dtype=torch.float64)
    for options in ({}, {"sample_weight": p}, {"where": MASK}, {"sample_weight": p * 1e300}):
        step = STEP * (1e300 if options.get("sample_weight", p).max() > 1 else 1.0)
        weight = options.get("sample_weight", torch.ones_like(p)) / step
        weight = weight * options.get("where", True)
        expected = (weight * losses * rgd.torch.sample_weights(losses)).sum()
        assert_same([reweighted_mean(losses, normalizer=step, **options)], [expected])


def test_nothing_over_a_normalizer_is_nothing():
    hidden, head, target = batch()
    nothing = torch.full_like(target, -100)
    for kind in BACKENDS:
        with backend(kind):
            assert cross_entropy(logits_of(hidden, head), nothing, normalizer=3) == 0
            assert linear_cross_entropy(hidden.requires_grad_(), head, nothing, normalizer=3) == 0


def test_targets_are_counted_as_the_loss_divides_by_them():
    _, _, target = batch()
    p = torch.rand(N, T, dtype=torch.float64)
    cases = [
        ({}, {}), ({"where": MASK}, {}), ({"sample_weight": P}, {}), ({"sample_weight": p}, {}),
        ({"where": MASK, "sample_weight": p}, {"weight": CLASS_WEIGHT}),
    ]  # fmt: skip
    logits = torch.zeros(N, C, T, dtype=torch.float64)
    for given, settings in cases:
        ones = {"weighting": rgd.ERM(), **settings, **given}
        expected = cross_entropy(logits, target, reduction="sum", **ones) / cross_entropy(
            logits, target, **ones
        )
        parts = [
            {"labels": target[part], **{name: value[part] for name, value in given.items()}}
            for part in (slice(0, 2), slice(2, 7))
        ]
        torch.testing.assert_close(count_targets(parts, **settings), expected, rtol=1e-12, atol=0)
    soft = torch.softmax(torch.randn(N, C, T, dtype=torch.float64), 1)
    assert count_targets([(logits, soft)], weight=CLASS_WEIGHT) == N * T
    assert count_targets([{"target": target, "where": P > 0.7}]) == (target[P > 0.7] != -100).sum()
    assert count_targets([target], shift=True) == (target[:, 1:] != -100).sum()
    assert count_targets(iter([target]), ignore_index=1) == (target != 1).sum()


def test_what_cannot_be_counted_is_refused():
    _, _, target = batch()
    for wrong, message in (
        ({"input_ids": target}, "a mapping with 'input_ids'"),
        ((target, target, target), "tuple of 3"),
        ([0, 1, 2, 3], "list of 4"),
    ):
        with pytest.raises(TypeError, match=message):
            count_targets([wrong])
    with pytest.raises(TypeError, match=r"target must be a torch\.Tensor"):
        count_targets([(target, [1, 2])])
    with pytest.raises(TypeError, match="class indices or class probabilities"):
        count_targets([target > 0])
    with pytest.raises(ValueError, match="batches is empty"):
        count_targets([])
    with pytest.raises(ValueError, match=r"shift=True takes class indices of shape \(B, T\)"):
        count_targets([target[0]], shift=True)
    with pytest.raises(ValueError, match="sample_weight must have the shape of the losses"):
        count_targets([{"target": target, "sample_weight": torch.ones(3)}])


@pytest.mark.parametrize(
    "call",
    [
        lambda n, **s: cross_entropy(
            torch.randn(3, 2, requires_grad=True), torch.tensor([0, 1, 1]), normalizer=n, **s
        ),
        lambda n, **s: linear_cross_entropy(
            torch.randn(3, 2), torch.randn(4, 2), torch.tensor([0, 1, 1]), normalizer=n, **s
        ),
        lambda n, **s: RGDLoss(base=nn.CrossEntropyLoss(reduction="none"), **s)(
            torch.randn(3, 2), torch.tensor([0, 1, 1]), normalizer=n
        ),
    ],
    ids=["logits", "linear head", "base"],
)
def test_what_is_no_normalizer_is_refused(call):
    for wrong in (0, -1.0, math.nan, math.inf, torch.tensor(0), torch.tensor(-2.0)):
        with pytest.raises(ValueError, match="normalizer must be a positive number"):
            call(wrong)
    for wrong in ("3", True, torch.ones(3), torch.tensor(True), torch.tensor(1j)):
        with pytest.raises(TypeError, match="normalizer must be a positive number"):
            call(wrong)
    for reduction in ("sum", "none"):
        with pytest.raises(ValueError, match="normalizer is what reduction='mean' divides by"):
            call(3.0, reduction=reduction)
