"""`stats()` has the means of what `returns=` names, by group: of a call, of an epoch, over processes."""

import numpy as np
import pytest
import rgd
import torch
from linear_heads import Case
from rgd.torch import LinearRGDLoss, RGDLoss, backend
from torch import distributed as dist

NAMES = ("entropy", "logsumexp", "correct")
N, T, C = 6, 4, 5
EPS = torch.finfo(torch.float64).eps


def batch(rows=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, C, T, generator=generator, dtype=torch.float64)
    target = torch.randint(C, (rows, T), generator=generator)
    target[0, 1] = target[1, 0] = -100
    target[-1] = logits.argmax(1)[-1]
    measure = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.5
    return logits.requires_grad_(), target, measure, torch.arange(rows) % 3


def extras_of(logits):
    """Entropy and logsumexp of each row of logits, whose classes are the second axis."""
    log_q = logits.detach().log_softmax(1)
    return -(log_q.exp() * log_q).sum(1), logits.detach().logsumexp(1)


def means(values, counted, measure, groups):
    """The mean of each group of units, of the mean over the targets of each unit."""
    values, counted = values.double(), counted.double()
    if values.dim() > 1:
        values = (values * counted).sum(1) / counted.sum(1)
    p = measure * (counted if counted.dim() == 1 else counted.sum(1) > 0)
    return [float((p * values)[groups == g].sum() / p[groups == g].sum()) for g in range(3)]


def close(found, expected, terms=N * T):
    # Sums of so many numbers up to 10, of either side.
    np.testing.assert_allclose(found, expected, rtol=0, atol=20 * terms * EPS)


@pytest.mark.parametrize("kind", ["rust", "composite"])
@pytest.mark.parametrize("per", ["element", "sample"])
def test_a_group_has_the_means_of_its_units(kind, per):
    logits, target, measure, groups = batch()
    counted = target != -100
    of_units = groups if per == "sample" else groups[:, None].expand(N, T).contiguous()
    entropy, logsumexp = extras_of(logits)
    correct = logits.argmax(1) == target
    criterion = RGDLoss(per=per, returns=NAMES)
    with backend(kind):
        criterion(logits, target, sample_weight=measure, groups=of_units).backward()
    found = criterion.stats().groups.extras
    assert list(found) == list(NAMES)
    for name, values in zip(NAMES, (entropy, logsumexp, correct), strict=True):
        if per == "sample":
            expected = means(values, counted, measure, groups)
        else:
            p = (measure[:, None] * counted).flatten()
            expected = means(values.flatten(), torch.ones(N * T), p, of_units.flatten())
        close(found[name], expected)
    assert 0 < found["correct"][0] < 1
    # Groups may be told later, and the groups of the call are then left aside.
    later = criterion.stats(groups=(of_units + 1) % 3).groups.extras
    close(later["entropy"], np.roll(found["entropy"], 1))


def test_segments_are_the_units_of_a_packed_row():
    logits, target, _, _ = batch()
    segments = torch.tensor([[0, 0, 1, 1]] * N)
    groups = torch.tensor([[0, 1]] * N)
    criterion = RGDLoss(per="sample", returns=("entropy",))
    criterion(logits, target, segments=segments, groups=groups)
    entropy, counted = extras_of(logits)[0], target != -100
    halves = [
        [float(entropy[row, own][counted[row, own]].mean()) for row in range(N)]
        for own in (slice(0, 2), slice(2, 4))
    ]
    close(criterion.stats().groups.extras["entropy"], [np.mean(half) for half in halves])


def test_a_linear_head_has_them_too():
    case = Case()
    groups = torch.arange(15).view(3, 5) % 2
    criterion = LinearRGDLoss(
        linear_weight=torch.nn.Parameter(case.weight.detach()), returns=("entropy", "correct"), shift=True
    )
    criterion(case.input, case.target, groups=groups).backward()
    logits = (case.input @ case.weight.T).detach()[:, :-1].movedim(-1, 1)
    of_targets = groups[:, 1:]
    for name, values in (
        ("entropy", extras_of(logits)[0]),
        ("correct", logits.argmax(1) == case.target[:, 1:]),
    ):
        expected = [float(values[of_targets == g].double().mean()) for g in range(2)]
        close(criterion.stats().groups.extras[name], expected)


def test_a_loss_that_returns_nothing_has_none():
    logits, target, _, groups = batch()
    criterion = RGDLoss(per="sample")
    criterion.reset_stats()
    criterion(logits, target, groups=groups)
    assert criterion.stats().groups.extras is None
    assert criterion.stats(total=True).groups.extras is None
    gated = RGDLoss(weighting=rgd.EntropyGate(rgd.ERM()))
    gated(logits, target, groups=target.clamp(min=0))
    assert gated.stats().groups.extras is None


def test_names_and_numbers_of_a_logger():
    logits, target, _, groups = batch()
    criterion = RGDLoss(per="sample", returns=("entropy", "correct"))
    criterion(logits, target, groups=groups)
    stats = criterion.stats()
    numbers = stats.to_dict("rgd/")
    for group in range(3):
        assert numbers[f"rgd/group_{group}/entropy"] == stats.groups.extras["entropy"][group]
        assert numbers[f"rgd/group_{group}/correct"] == stats.groups.extras["correct"][group]
    assert "rgd/group_0/logsumexp" not in numbers


def test_groups_that_are_absent_or_far_apart():
    logits, target, _, groups = batch()
    criterion = RGDLoss(per="sample", returns=("entropy",))
    criterion(logits, target, groups=2 * groups)
    of_groups = criterion.stats().groups.extras["entropy"]
    assert np.isnan(of_groups).tolist() == [False, True, False, True, False]
    far = criterion.stats(groups=2_000_000 * groups).groups
    assert far.numbers == (0, 2_000_000, 4_000_000)
    close(far.extras["entropy"], of_groups[::2])


def test_an_evaluation_leaves_those_of_the_last_step():
    logits, target, _, groups = batch()
    criterion = RGDLoss(per="sample", returns=("entropy",))
    criterion(logits, target, groups=groups)
    before = criterion.stats().groups.extras
    with torch.no_grad():
        criterion(3 * logits, target)
    assert criterion.stats().groups.extras == before


def test_totals_are_those_of_one_call_over_all_samples():
    logits, target, measure, groups = batch(12)
    criterion = RGDLoss(per="sample", returns=NAMES)
    criterion.reset_stats()
    for some in (slice(0, 5), slice(5, 7), slice(7, 12)):
        criterion(logits[some], target[some], sample_weight=measure[some], groups=groups[some])
    total = criterion.stats(total=True).groups
    criterion(logits, target, sample_weight=measure, groups=groups)
    whole = criterion.stats().groups
    assert total.count == whole.count
    for name in NAMES:
        close(total.extras[name], whole.extras[name], 12 * T)
    criterion.reset_stats()
    assert criterion.stats(total=True).groups is None


def test_a_compiled_loss_leaves_them_too():
    torch.compiler.reset()
    logits, target, _, groups = batch()
    criterion = RGDLoss(per="sample", returns=NAMES)
    criterion(logits, target, groups=groups)
    expected = criterion.stats().groups.extras
    torch.compile(criterion, fullgraph=True, backend="aot_eager")(logits, target, groups=groups).backward()
    found = criterion.stats().groups.extras
    for name in NAMES:
        close(found[name], expected[name])


# --- over processes ---


def on_a_rank(rank, size, weighed, per):
    """The statistics of a rank's part of a batch, of its call and in total, over all ranks."""
    logits, target, measure, groups = batch(5)
    own = slice(0, 3) if rank == 0 else slice(3, 5)
    criterion = RGDLoss(per=per, returns=NAMES)
    criterion.reset_stats()
    given = {"sample_weight": measure[own]} if rank in weighed else {}
    criterion(logits[own], target[own], groups=of_units(groups[own], per), **given)
    return criterion.stats(sync=True).groups, criterion.stats(total=True, sync=True).groups


def of_units(groups, per):
    return groups if per == "sample" else groups[:, None].expand(-1, T).contiguous()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("weighed", [(), (0, 1)], ids=["plain", "measured"])
@pytest.mark.parametrize("per", ["element", "sample"])
def test_the_groups_of_all_processes_are_those_of_one_batch(run, weighed, per):
    logits, target, measure, groups = batch(5)
    assert bool((target[3:] != -100).all())  # the second process leaves nothing out, and the first does
    criterion = RGDLoss(per=per, returns=NAMES, sync=False)
    given = {"sample_weight": measure} if weighed else {}
    criterion(logits, target, groups=of_units(groups, per), **given)
    expected = criterion.stats().groups
    for outcomes in run(2, on_a_rank, weighed, per):
        for found in outcomes:
            assert found.count == expected.count
            close(found.mean_loss, expected.mean_loss)
            for name in NAMES:
                close(found.extras[name], expected.extras[name])
