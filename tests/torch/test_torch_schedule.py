"""Weightings that change over the training: set between steps, by a schedule, in compiled graphs too."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from rgd import ERM, KL, CVaR, Focal, GroupDRO, KLBall, MovingAverage, Trimmed
from rgd.torch import RGD, RGDLoss, WeightingSchedule, backend, cross_entropy, reweighted_mean
from torch._dynamo.testing import CompileCounterWithBackend

N, C = 8, 4
LOGITS = 2 * torch.randn(N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TARGET = torch.arange(N) % C
LOSSES = torch.tensor(np.random.default_rng(0).gamma(1.0, 1.5, N))


def warming_up(step):
    return KL(math.inf, scale=0.1 * step)


def optimizer_of(weighting=None):
    parameter = torch.ones((), dtype=torch.float64, requires_grad=True)
    return parameter, RGD(torch.optim.SGD([parameter], lr=0.1), weighting)


# --- setting it by hand ---


@pytest.mark.parametrize("name", ["rust", "composite"])
@pytest.mark.parametrize("other", [KL(2.0), KL(1.0, normalize=True), CVaR(0.3), KLBall(0.1), ERM()], ids=str)
def test_a_weighting_that_is_set_is_the_one_that_weighs(other, name):
    criterion = RGDLoss(tau=1.0)
    _, optimizer = optimizer_of()
    with backend(name):
        criterion(LOGITS, TARGET)
        optimizer.objective(LOSSES)
        criterion.weighting = optimizer.weighting = other
        assert torch.equal(criterion(LOGITS, TARGET), cross_entropy(LOGITS, TARGET, weighting=other))
        assert torch.equal(optimizer.objective(LOSSES), reweighted_mean(LOSSES, other))
        criterion.weighting = optimizer.weighting = KL(1.0)
        assert torch.equal(criterion(LOGITS, TARGET), cross_entropy(LOGITS, TARGET, tau=1.0))
        assert torch.equal(optimizer.objective(LOSSES), reweighted_mean(LOSSES, tau=1.0))


def test_a_copy_does_not_hear_of_a_later_weighting():
    criterion = RGDLoss(weighting=CVaR(0.3))
    other = copy.deepcopy(criterion)
    criterion.weighting = CVaR(0.9)
    assert other.weighting == CVaR(0.3)
    assert torch.equal(other(LOGITS, TARGET), cross_entropy(LOGITS, TARGET, weighting=CVaR(0.3)))
    torch.compiler.reset()
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(LOGITS, TARGET), other(LOGITS, TARGET))


@pytest.mark.parametrize("target", [RGDLoss(), optimizer_of()[1]], ids=["RGDLoss", "RGD"])
@pytest.mark.parametrize(
    ("wrong", "said"), [(1.0, "did you mean tau="), (KL, r"call it, as in KL\(\.\.\.\)"), ("kl", "got 'kl'")]
)
def test_what_is_no_weighting_is_refused_and_changes_nothing(target, wrong, said):
    with pytest.raises(TypeError, match=said):
        target.weighting = wrong
    assert target.weighting == KL(1.0)


# --- the schedule ---


@pytest.mark.parametrize("target", [RGDLoss, lambda: optimizer_of()[1]], ids=["RGDLoss", "RGD"])
def test_a_schedule_sets_the_weighting_of_each_step(target):
    target = target()
    schedule = WeightingSchedule(target, warming_up)
    assert target.weighting == warming_up(0)
    for step in range(1, 5):
        schedule.step()
        assert schedule.count == step
        assert target.weighting == warming_up(step)


def test_training_by_a_schedule_equals_setting_each_weighting_by_hand():
    parameter, optimizer = optimizer_of()
    schedule = WeightingSchedule(optimizer, warming_up)
    expected, plain = optimizer_of()
    for step in range(4):
        plain.weighting = warming_up(step)
        for p, wrapped in ((parameter, optimizer), (expected, plain)):
            wrapped.zero_grad()
            wrapped.backward(LOSSES * p)
            wrapped.step()
        schedule.step()
    assert torch.equal(parameter, expected)


def test_a_schedule_is_resumed_from_its_state_dict():
    schedule = WeightingSchedule(RGDLoss(), warming_up)
    for _ in range(3):
        schedule.step()
    saved = schedule.state_dict()
    assert saved == {"count": 3}
    criterion = RGDLoss()
    other = WeightingSchedule(criterion, warming_up)
    other.load_state_dict(saved)
    assert criterion.weighting == warming_up(3)
    other.step()
    assert criterion.weighting == warming_up(4)
    assert schedule.state_dict() == {"count": 3}


def test_a_resumed_run_ends_where_an_unbroken_one_does():
    def averaged(step):
        return MovingAverage(KL(math.inf, scale=0.1 * step), 0.8)

    def run(criterion, schedule, steps):
        values = []
        for step in steps:
            values.append(criterion(LOGITS * (1 + step), TARGET))
            schedule.step()
        return values

    criterion = RGDLoss(weighting=averaged(0))
    schedule = WeightingSchedule(criterion, averaged)
    run(criterion, schedule, range(3))
    saved = copy.deepcopy((criterion.state_dict(), schedule.state_dict()))
    unbroken = run(criterion, schedule, range(3, 6))
    again = RGDLoss(weighting=averaged(0))
    resumed = WeightingSchedule(again, averaged)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert run(again, resumed, range(3, 6)) == unbroken


def test_a_schedule_of_one_class_keeps_the_state_and_one_that_changes_class_starts_anew():
    criterion = RGDLoss(weighting=MovingAverage(KL(), 0.9), base=lambda losses: losses)
    schedule = WeightingSchedule(
        criterion, lambda step: GroupDRO(2, 0.1) if step > 2 else MovingAverage(KL(1.0 + step), 0.9)
    )
    for step in range(3):
        criterion(LOSSES)
        assert criterion.weighting_state.updates == step + 1
        schedule.step()
    assert criterion.state_dict().keys() == {"weighting_state.shares"}


def test_a_schedule_refuses_what_has_no_weighting_and_what_gives_none():
    for wrong in (torch.nn.CrossEntropyLoss(), torch.optim.SGD([torch.ones(1)], lr=1.0), None, KL()):
        with pytest.raises(
            TypeError, match=r"target must be a loss or an optimizer with a weighting, .* got "
        ):
            WeightingSchedule(wrong, warming_up)
    with pytest.raises(TypeError, match="function must map a step to a weighting, as lambda step: "):
        WeightingSchedule(RGDLoss(), KL())
    with pytest.raises(TypeError, match=r"function must return an rgd\.Weighting, .* got None at step 0"):
        WeightingSchedule(RGDLoss(), lambda step: None)
    with pytest.raises(TypeError, match=r"such as rgd\.KL\(tau=2\.0\), got 1\.0 at step 0"):
        WeightingSchedule(RGDLoss(), lambda step: 1.0 + step)
    with pytest.raises(ValueError, match="tau must be a positive number"):
        WeightingSchedule(RGDLoss(), lambda step: KL(-1.0))


# --- compiled ---


def averaged(step):
    return MovingAverage(KL(0.5 + 0.1 * step), 0.5 + 0.01 * step)


SCHEDULES = {
    "with a kernel": (lambda step: KL(0.5 + 0.1 * step, scale=0.3), True),
    "normalised, with a kernel": (lambda step: KL(math.inf, scale=0.1 * step, normalize=True), True),
    "nested, with a kernel": (lambda step: Trimmed(CVaR(0.3 + 0.05 * step), 0.2 + 0.01 * step), True),
    "without a kernel": (lambda step: Trimmed(KLBall(0.1 + 0.05 * step), 0.2 + 0.01 * step), False),
    "with a state": (averaged, False),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize(("function", "has_kernel"), SCHEDULES.values(), ids=SCHEDULES)
def test_a_compiled_loss_is_compiled_once_whatever_its_schedule_sets(function, has_kernel):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    criterion, eager = RGDLoss(weighting=function(0)), RGDLoss(weighting=function(0))
    compiled = torch.compile(criterion, backend=counter, fullgraph=True)
    schedules = [WeightingSchedule(loss, function) for loss in (criterion, eager)]
    values = []
    for _ in range(10):  # more often than torch compiles one function again
        results = []
        for loss in (compiled, eager):
            logits = LOGITS.clone().requires_grad_()
            loss(logits, TARGET).backward()
            results.append((loss(LOGITS, TARGET), logits.grad))
        # Numbers from tensors in place of Python floats: sums and exponents of the same size.
        torch.testing.assert_close(*results, rtol=1e-13, atol=1e-16)
        values.append(results[0][0].item())
        for schedule in schedules:
            schedule.step()
    assert len(set(values)) == len(values)
    # One graph for logits that require grad, one for those that do not.
    assert counter.frame_count == 2
    operators = {str(node.target) for graph in counter.graphs for node in graph.graph.nodes}
    assert ("rgd.cross_entropy.default" in operators) == has_kernel
    assert ("rgd.cross_entropy_gradient.default" in operators) != has_kernel


def test_a_weighting_of_another_class_is_compiled_anew_and_right():
    torch.compiler.reset()
    criterion = RGDLoss(weighting=CVaR(0.3))
    compiled = torch.compile(criterion, backend="eager", fullgraph=True)
    for weighting in (CVaR(0.3), Focal(2.0), KL(1.0), KL(1.0, normalize=True), CVaR(0.7)):
        criterion.weighting = weighting
        expected = cross_entropy(LOGITS, TARGET, weighting=weighting)
        torch.testing.assert_close(compiled(LOGITS, TARGET), expected, rtol=1e-13, atol=0)


def test_numbers_that_no_schedule_may_change_are_part_of_the_class():
    criterion = RGDLoss(weighting=KL(1.0))
    criterion.weighting = dataclasses.replace(criterion.weighting, normalize=True)
    assert torch.equal(
        criterion(LOGITS, TARGET), cross_entropy(LOGITS, TARGET, weighting=KL(1.0, normalize=True))
    )
