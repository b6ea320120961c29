"""`segments=`: sequences that share a row are units. Packed batches give the numbers of padded ones.

In float64, to 1e-12: sums of at most 30 losses in another order.
"""

import math

import numpy as np
import pytest
import rgd
import torch
from rgd import reference
from rgd.torch import (
    LinearRGDLoss,
    RGDLoss,
    backend,
    count_targets,
    cross_entropy,
    linear_cross_entropy,
    segments_of,
)
from torch import nn
from torch.nn import functional as F

C, D = 7, 5
LENGTHS = (4, 9, 6)
BACKENDS = ["rust", "composite"]
MEMBERS = [rgd.KL(4.0), rgd.Focal(2.0), rgd.CVaR(0.5), rgd.KLBall(0.1), rgd.ChiSquare(0.5)]
P = torch.tensor([1.0, 0.25, 2.0], dtype=torch.float64)


def sequences():
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(n, D, generator=generator, dtype=torch.float64) for n in LENGTHS]
    target = [torch.randint(0, C, (n,), generator=generator) for n in LENGTHS]
    target[1][2] = -100
    head = 2 * torch.randn(C, D, generator=generator, dtype=torch.float64)
    return hidden, target, head


def padded():
    hidden, target, head = sequences()
    pad = nn.utils.rnn.pad_sequence
    return pad(hidden, batch_first=True), pad(target, batch_first=True, padding_value=-100), head


def packed():
    hidden, target, head = sequences()
    numbers = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)])
    return torch.cat(hidden)[None], torch.cat(target)[None], head, numbers[None]


def in_two_rows():
    """The sequences with 4 and 9 tokens in one row, interleaved; that with 6 in another, after padding."""
    hidden, target, head = sequences()
    order = torch.cat([torch.arange(4), torch.arange(9) + 0.5]).argsort()
    first = torch.cat(hidden[:2])[order]
    labels, numbers = torch.cat(target[:2])[order], (order >= 4).long()
    pad = torch.full((7,), 3)  # what stands there does not matter
    return (
        torch.stack([first, torch.cat([torch.full((7, D), math.nan).double(), hidden[2]])]),
        torch.stack([labels, torch.cat([pad, target[2]])]),
        head,
        torch.stack([numbers, torch.cat([torch.full((7,), -1), torch.zeros(6, dtype=torch.long)])]),
    )


def gradients(objective, hidden, head):
    """The objective, the gradient of the head, and those of all hidden states that have one, sorted."""
    of_hidden, of_head = torch.autograd.grad(objective, (hidden, head))
    rows = of_hidden.reshape(-1, D)
    rows = rows[(rows != 0).any(1)]
    return objective.detach(), of_head, rows[rows[:, 0].argsort()]


def linear(hidden, target, head, **options):
    hidden, head = hidden.requires_grad_(), head.requires_grad_()
    objective = linear_cross_entropy(hidden, head, target, per="sample", chunk_bytes=5 * C * 8, **options)
    return gradients(objective, hidden, head)


def dense(hidden, target, head, **options):
    hidden, head = hidden.requires_grad_(), head.requires_grad_()
    if options.pop("shift", False):
        hidden_used, target = hidden[:, :-1], target[:, 1:]
        if options.get("segments") is not None:
            segments = options["segments"]
            options["segments"] = segments[:, 1:].masked_fill(segments[:, 1:] != segments[:, :-1], -1)
    else:
        hidden_used = hidden
    objective = cross_entropy(F.linear(hidden_used, head).movedim(-1, 1), target, per="sample", **options)
    return gradients(objective, hidden, head)


def assert_same(mine, other, tolerance=1e-12):
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("weighting", MEMBERS, ids=str)
def test_a_packed_batch_is_the_padded_batch_of_the_same_sequences(weighting, shift, kind):
    options = {"weighting": weighting, "shift": shift}
    extras = [{}, {"normalizer": 11.5}, {"weight": torch.linspace(0.5, 2, C).double(), "z_loss": 0.03}]
    for extra in extras:
        with backend(kind):
            expected = linear(*padded(), **options, **extra)
            hidden, target, head, segments = packed()
            for way in (linear, dense):
                assert_same(way(hidden, target, head, segments=segments, **options, **extra), expected)
            if not shift:
                hidden, target, head, segments = in_two_rows()
                assert_same(linear(hidden, target, head, segments=segments, **options, **extra), expected)


@pytest.mark.parametrize("kind", BACKENDS)
def test_the_measure_and_groups_are_of_segments_or_of_their_targets(kind):
    hidden, target, head, segments = packed()
    groups = torch.tensor([1, 0, 1])
    weighting = rgd.GroupDRO(groups=2, step_size=0.5)
    for given, members in ((P, groups), (P[segments[0]], groups[segments[0]])):
        for scaled in (1.0, 1e300):
            options = {"sample_weight": given[None] * scaled, "segments": segments}
            with backend(kind):
                expected = linear(*padded(), sample_weight=P * scaled, weighting=rgd.KLBall(0.1))
                for way in (linear, dense):
                    assert_same(way(hidden, target, head, weighting=rgd.KLBall(0.1), **options), expected)
        state = weighting.init()
        with backend(kind):
            mine, after = linear_cross_entropy(
                hidden, head, target, per="sample", weighting=weighting, state=state,
                groups=members[None], segments=segments,
            )  # fmt: skip
            rows, labels, _ = padded()
            other, expected_after = linear_cross_entropy(
                rows, head, labels, per="sample", weighting=weighting, state=state, groups=groups
            )
        assert_same([mine], [other])
        np.testing.assert_allclose(after["shares"], expected_after["shares"], rtol=1e-12)


@pytest.mark.parametrize("kind", BACKENDS)
def test_weights_and_statistics_are_those_of_the_segments(kind):
    hidden, target, head, segments = packed()
    rows, labels, _ = padded()
    groups = torch.tensor([1, 0, 1])
    for make in (
        lambda: RGDLoss(weighting=rgd.CVaR(0.5), per="sample"),
        lambda: LinearRGDLoss.tie(
            nn.Linear(D, C, bias=False).double(), weighting=rgd.CVaR(0.5), per="sample"
        ),
        lambda: RGDLoss(
            weighting=rgd.CVaR(0.5),
            per="sample",
            base=nn.CrossEntropyLoss(reduction="none", ignore_index=-100),
        ),
    ):
        mine, other = make(), make()
        inputs, expected = (hidden, rows)
        where = {}
        if isinstance(mine, LinearRGDLoss):
            other.linear = mine.linear
        else:
            inputs, expected = (F.linear(one, head).movedim(-1, 1) for one in (hidden, rows))
        if mine.base is not None:
            where = {"where": labels != -100}
        mine.reset_stats()
        other.reset_stats()
        kept = {"where": target != -100} if where else {}
        with backend(kind):
            assert_same(
                [mine(inputs, target, segments=segments, num_segments=5, groups=groups[segments], **kept)],
                [other(expected, labels, groups=groups, **where)],
            )
        assert mine.last_weights.shape == (1, 5)
        torch.testing.assert_close(mine.last_weights[0, :3], other.last_weights, rtol=1e-12, atol=0)
        assert not mine.last_weights[0, 3:].any()
        assert mine.stats().count == 3
        for total in (False, True):
            numbers, wanted = mine.stats(total=total).to_dict(), other.stats(total=total).to_dict()
            assert numbers.keys() == wanted.keys()
            for name, value in wanted.items():
                assert math.isclose(numbers[name], value, rel_tol=1e-12, abs_tol=1e-12), name
        by = mine.stats(groups=torch.tensor([[1, 0, 1, 0, 0]])).groups
        np.testing.assert_allclose(by.mean_loss, other.stats().groups.mean_loss, rtol=1e-12)
        with torch.no_grad():  # an evaluation leaves out the same targets
            assert_same(
                [mine(inputs, target, segments=segments.masked_fill(segments == 2, -1), **kept)],
                [other(expected[:2], labels[:2], **{name: value[:2] for name, value in where.items()})],
            )


@pytest.mark.parametrize("weighting", MEMBERS, ids=str)
def test_the_reference_says_the_same(weighting):
    hidden, target, head, segments = packed()
    logits = F.linear(hidden, head).movedim(-1, 1).requires_grad_()
    for p in (None, P[None], P[segments]):
        options = {"per": "sample", "weighting": weighting, "segments": segments, "sample_weight": p}
        mine = cross_entropy(logits, target, **options)
        given = {
            name: np.asarray(one) if isinstance(one, torch.Tensor) else one for name, one in options.items()
        }
        z = logits.detach().numpy()
        assert math.isclose(mine.item(), reference.cross_entropy(z, target.numpy(), **given), rel_tol=1e-12)
        (gradient,) = torch.autograd.grad(mine, logits)
        np.testing.assert_allclose(
            gradient, reference.cross_entropy_grad(z, target.numpy(), **given), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("weighting", [rgd.KL(4.0), rgd.CVaR(0.5)], ids=str)
def test_compiled_graphs_and_second_derivatives_give_the_same(weighting, kind):
    hidden, target, head, segments = packed()
    inputs = hidden.requires_grad_(), head.requires_grad_()
    p = P[segments]

    def chunked(h, w, segments):
        return linear_cross_entropy(
            h, w, target, per="sample", weighting=weighting, segments=segments, sample_weight=p, shift=True
        )

    def whole(h, w, segments):
        logits = F.linear(h, w).movedim(-1, 1)
        return cross_entropy(
            logits, target, per="sample", weighting=weighting, segments=segments, num_segments=3
        )

    for loss in (chunked, whole):
        with backend(kind):
            torch._dynamo.reset()
            graph = torch.compile(loss, fullgraph=True, backend="aot_eager")
            found = [
                (value.detach(), *torch.autograd.grad(value, inputs))
                for value in (graph(*inputs, segments), loss(*inputs, segments))
            ]
            assert_same(*found)
            wrong = segments.masked_fill(segments == 1, 99)
            assert graph(*inputs, wrong).isnan()

    def second(loss):
        first = torch.autograd.grad(loss(*inputs, segments), inputs, create_graph=True)
        return torch.autograd.grad(sum(one.square().sum() for one in first), inputs)

    with backend(kind):
        mine = second(chunked), second(whole)
    with backend("composite"):

        def all_logits(h, w, segments):
            numbers = segments[:, 1:].masked_fill(segments[:, 1:] != segments[:, :-1], -1)
            logits = F.linear(h[:, :-1], w).movedim(-1, 1)
            return cross_entropy(
                logits, target[:, 1:], per="sample", weighting=weighting, segments=numbers,
                sample_weight=p[:, 1:],
            )  # fmt: skip

        other = second(all_logits), second(whole)
    for a, b in zip(mine, other, strict=True):
        assert_same(a, b, 1e-10)


@pytest.mark.parametrize("kind", BACKENDS)
def test_the_gradient_is_that_of_finite_differences_of_constant_weights(kind):
    hidden, target, head, segments = packed()
    inputs = hidden.requires_grad_(), head.requires_grad_()
    with backend(kind):
        assert torch.autograd.gradcheck(
            lambda h, w: linear_cross_entropy(
                h, w, target, per="sample", weighting=rgd.ERM(), segments=segments, sample_weight=P[None]
            ),
            inputs,
        )


def test_targets_in_one_axis_are_one_row_and_other_reductions_are_served():
    hidden, target, head, segments = packed()
    logits = F.linear(hidden, head)
    for reduction in ("mean", "sum", "none"):
        options = {"per": "sample", "weighting": rgd.CVaR(0.5), "reduction": reduction}
        row = cross_entropy(logits[0], target[0], segments=segments[0], **options)
        whole = cross_entropy(logits.movedim(-1, 1), target, segments=segments, **options)
        assert_same([row.reshape(whole.shape)], [whole])
        chunks = linear_cross_entropy(hidden[0], head, target[0], segments=segments[0], **options)
        assert_same([chunks], [row])


def test_half_precision_in_place_and_autocast_are_served():
    hidden, target, head, segments = packed()
    options = {"per": "sample", "weighting": rgd.KL(4.0), "segments": segments}
    wanted = cross_entropy(F.linear(hidden, head).movedim(-1, 1), target, **options)
    for dtype, tolerance in ((torch.float16, 1e-2), (torch.bfloat16, 5e-2), (torch.float32, 1e-5)):
        logits = F.linear(hidden, head).to(dtype).movedim(-1, 1).requires_grad_()
        value = cross_entropy(logits, target, **options)
        value.backward()
        torch.testing.assert_close(value.double(), wanted, rtol=tolerance, atol=0)
    head = head.requires_grad_()
    found = []
    for inplace in (False, True):
        value = cross_entropy(F.linear(hidden, head).movedim(-1, 1), target, inplace=inplace, **options)
        found.append((value.detach(), *torch.autograd.grad(value, head)))
    assert_same(*found)


def test_segments_of_positions_and_of_lengths():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 0, 0], [1, 1, 0, 1, 2], [5, 6, 3, 4, 0]])
    expected = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 2, 3], [0, 0, 1, 1, 1], [0, 0, 1, 1, 2]])
    assert torch.equal(segments_of(position_ids=positions), expected)
    assert torch.equal(segments_of(position_ids=positions[0].int()), expected[0])
    assert torch.equal(segments_of(position_ids=positions.expand(3, -1, -1)), expected)
    ends = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    assert segments_of(cu_seqlens=ends).tolist() == [0, 0, 0, 2, 2]
    assert segments_of(cu_seqlens=ends, length=7).tolist() == [0, 0, 0, 2, 2, -1, -1]
    for wrong in (
        {},
        {"position_ids": positions, "cu_seqlens": ends},
        {"position_ids": positions, "length": 3},
    ):
        with pytest.raises(TypeError, match="position_ids"):
            segments_of(**wrong)
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor of integers"):
        segments_of(position_ids=positions.float())
    with pytest.raises(ValueError, match="position_ids must have shape"):
        segments_of(position_ids=torch.tensor(0))
    with pytest.raises(ValueError, match="cu_seqlens must have shape"):
        segments_of(cu_seqlens=positions)


@pytest.mark.parametrize(
    "call",
    [
        lambda segments, **options: cross_entropy(
            torch.randn(1, C, 6, requires_grad=True), torch.ones(1, 6).long(), segments=segments, **options
        ),
        lambda segments, **options: linear_cross_entropy(
            torch.randn(1, 6, D), torch.randn(C, D), torch.ones(1, 6).long(), segments=segments, **options
        ),
        lambda segments, per="element", num_segments=None, **options: RGDLoss(
            base=nn.CrossEntropyLoss(reduction="none"), per=per
        )(
            torch.randn(1, C, 6),
            torch.ones(1, 6).long(),
            segments=segments,
            num_segments=num_segments,
            **options,
        ),
    ],
    ids=["logits", "linear head", "base"],
)
def test_what_does_not_fit_is_refused(call):
    good, by = torch.tensor([[0, 0, 1, 1, -1, 2]]), {"per": "sample"}
    call(good, **by)
    cases = [
        (ValueError, 'segments are the units of per="sample"', good, {}),
        (ValueError, "num_segments goes with segments", None, {**by, "num_segments": 3}),
        (ValueError, "segments must have the shape of the targets", good[0], by),
        (TypeError, "segments must be a torch.Tensor of integers", good.float(), by),
        (TypeError, "segments must be a torch.Tensor of integers, got list", [[0] * 6], by),
        (ValueError, "or -1 for a target that takes no part, got -2", good - 1, by),
        (ValueError, "below num_segments=2, .* got 2", good, {**by, "num_segments": 2}),
        (ValueError, "num_segments must be a positive integer", good, {**by, "num_segments": 0}),
        (ValueError, "sample_weight must be constant within a segment", good,
         {**by, "sample_weight": torch.arange(6.0)[None]}),
        (ValueError, "groups must be constant within a segment.* at \\(0, ", good,
         {**by, "groups": torch.arange(6)[None]}),
        (ValueError, "sample_weight must have the shape of the targets, .* or that of the units", good,
         {**by, "sample_weight": torch.ones(1)}),
        (ValueError, "sample_weight must hold finite numbers >= 0", good,
         {**by, "sample_weight": torch.full((1, 3), -1.0)}),
    ]  # fmt: skip
    for error, message, segments, options in cases:
        with pytest.raises(error, match=message):
            call(segments, **options)
    with pytest.raises(ValueError, match="segments take class indices"):
        cross_entropy(torch.randn(1, C, 6), torch.rand(1, C, 6), segments=good, per="sample")


def test_a_call_like_the_last_one_but_for_segments_hears_them():
    hidden, target, head, segments = packed()
    logits = F.linear(hidden, head).movedim(-1, 1)
    criterion = RGDLoss(tau=20.0, per="sample")
    plain = [criterion(logits, target) for _ in range(3)][-1]
    with pytest.raises(ValueError, match="num_segments goes with segments"):
        criterion(logits, target, num_segments=3)
    assert criterion(logits, target, segments=segments) != plain
    assert criterion(logits, target) == plain


@pytest.mark.parametrize("shift", [False, True])
def test_packed_micro_batches_with_one_denominator_make_the_step_of_one_batch(shift):
    hidden, target, head, segments = in_two_rows()
    hidden = hidden.nan_to_num()
    p = torch.tensor([[1.0, 0.25], [2.0, 0.5]], dtype=torch.float64)
    head = head.requires_grad_()

    def objective(rows, **options):
        return linear_cross_entropy(
            hidden[rows], head, target[rows], per="sample", tau=4.0, shift=shift, segments=segments[rows],
            sample_weight=p[rows], num_segments=2, **options,
        )  # fmt: skip

    parts = [slice(0, 1), slice(1, 2)]
    step = [
        {"labels": target[s], "segments": segments[s], "num_segments": 2, "sample_weight": p[s]}
        for s in parts
    ]
    total = count_targets(step, shift=shift)
    mine, whole = sum(objective(rows, normalizer=total) for rows in parts), objective(slice(None))
    assert_same([mine, *torch.autograd.grad(mine, head)], [whole, *torch.autograd.grad(whole, head)])
