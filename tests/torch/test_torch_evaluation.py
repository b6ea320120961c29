"""In evaluation the loss is the plain one; its settings are attributes; mistakes are refused with the fix."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import rgd
import torch
from rgd.torch import RGD, LinearRGDLoss, RGDLoss, backend, cross_entropy, reweighted_mean, sample_weights
from torch import nn
from torch.nn import functional as F

LOGITS = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
TARGET = torch.arange(8) % 4


# --- evaluation ---


@pytest.mark.parametrize("weighting", [rgd.KL(), rgd.KLBall(0.2), rgd.MovingAverage(rgd.KL(), 0.9)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_in_eval_mode_without_gradients_the_loss_is_cross_entropy(weighting, reduction):
    weight = torch.linspace(0.5, 2, 4)
    criterion = RGDLoss(weight, weighting=weighting, reduction=reduction).eval()
    expected = F.cross_entropy(LOGITS, TARGET, weight, reduction=reduction)
    torch.testing.assert_close(criterion(LOGITS, TARGET), expected)
    with torch.no_grad():
        leaf = LOGITS.clone().requires_grad_()
        torch.testing.assert_close(criterion(leaf, TARGET), expected)
    kept = RGDLoss(weight, weighting=weighting, reduction=reduction, evaluate="weighted").eval()
    assert not torch.allclose(kept(LOGITS, TARGET), expected)


def test_in_eval_mode_with_gradients_it_is_weighted_as_in_training():
    criterion = RGDLoss()
    training = criterion(LOGITS, TARGET)
    leaf = LOGITS.clone().requires_grad_()
    objective = criterion.eval()(leaf, TARGET)
    torch.testing.assert_close(objective, training)
    objective.backward()
    assert leaf.grad.abs().sum() > 0


def test_an_evaluation_counts_sample_weights_and_leaves_state_and_statistics():
    criterion = RGDLoss(weighting=rgd.MovingAverage(rgd.KL(), 0.9))
    criterion(LOGITS, TARGET)
    before, stats = copy.deepcopy(criterion.state_dict()), criterion.stats()
    p = torch.tensor([1.0, 2, 0, 1, 1, 3, 1, 1])
    losses = F.cross_entropy(LOGITS, TARGET, reduction="none")
    plain = criterion.eval()(LOGITS * 2, TARGET, sample_weight=p)
    torch.testing.assert_close(
        plain, (p * F.cross_entropy(LOGITS * 2, TARGET, reduction="none")).sum() / p.sum()
    )
    assert criterion.stats() == stats
    assert criterion.state_dict() == before
    with_base = RGDLoss(base=lambda values: values).eval()
    torch.testing.assert_close(with_base(losses), losses.mean())


def dense(**settings):
    return RGDLoss(**settings), (LOGITS.clone().requires_grad_(), TARGET)


def with_a_base(**settings):
    base = nn.CrossEntropyLoss(reduction="none")
    return RGDLoss(base=base, **settings), (LOGITS.clone().requires_grad_(), TARGET)


def linear(**settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LinearRGDLoss(4, 4, **settings), (LOGITS.clone().requires_grad_(), TARGET)


KINDS = [dense, with_a_base, linear]
AVERAGE = rgd.MovingAverage(rgd.KL(scale=-3.0), decay=0.9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_a_call_with_gradients_off_is_an_evaluation_whatever_the_mode_of_the_module(kind, mode, training):
    criterion, given = kind(weighting=AVERAGE)
    plain, _ = kind(weighting=rgd.ERM())
    criterion.reset_stats()
    criterion(*given)
    criterion.train(training)
    before, stats = copy.deepcopy(criterion.state_dict()), criterion.stats()
    with mode():
        evaluated = criterion(given[0] * 2, given[1]).clone()
    torch.testing.assert_close(evaluated, plain(given[0] * 2, given[1]).detach())
    assert criterion.stats() == stats
    assert criterion.stats(total=True).count == 8
    torch.testing.assert_close(criterion.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_keeps_its_weights_in_evaluation_trains_without_gradients_and_moves_no_state(kind):
    criterion, given = kind(weighting=AVERAGE, evaluate="weighted")
    expected = criterion(*given).detach()
    criterion.reset_parameters()
    before = copy.deepcopy(criterion.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(criterion(*given), expected)
    torch.testing.assert_close(criterion.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_inside_the_forward_of_a_function_trains_though_gradients_are_off_there(kind):
    criterion, given = kind(weighting=AVERAGE)

    class Chunked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            return criterion(logits, given[1])

        @staticmethod
        def backward(ctx, above):
            return None

    weighted = kind(weighting=AVERAGE)[0](*given).detach()
    torch.testing.assert_close(Chunked.apply(given[0]).detach(), weighted)
    assert int(criterion.weighting_state.updates) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_a_call_under_forward_mode_differentiation_is_weighted_with_gradients_off_too():
    criterion = RGDLoss()
    weighted = criterion(LOGITS, TARGET)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(LOGITS, torch.ones_like(LOGITS))
        value = torch.autograd.forward_ad.unpack_dual(criterion(dual, TARGET)).primal
    torch.testing.assert_close(value, weighted)


def test_functions_weight_as_told_with_gradients_off():
    losses = F.cross_entropy(LOGITS, TARGET, reduction="none")
    optimizer = RGD(torch.optim.SGD([torch.zeros(1)], lr=0.1), AVERAGE)
    before = copy.deepcopy(optimizer.weighting_state.state_dict())
    calls = [
        lambda: sample_weights(losses),
        lambda: reweighted_mean(losses),
        lambda: cross_entropy(LOGITS, TARGET),
        lambda: optimizer.objective(losses),
    ]
    for call in calls:
        with torch.no_grad():
            off = call()
        torch.testing.assert_close(optimizer.weighting_state.state_dict(), before, rtol=0, atol=0)
        torch.testing.assert_close(call(), off)
    assert int(optimizer.weighting_state.updates) == 1


def test_a_base_with_parameters_that_need_a_gradient_is_trained_in_eval_mode():
    layer = nn.Linear(4, 1)
    criterion = RGDLoss(base=lambda x: layer(x).squeeze(1) ** 2).eval()
    losses = (layer(LOGITS).squeeze(1) ** 2).detach()
    expected = torch.tensor(rgd.reweighted_mean(losses.numpy())).float()
    torch.testing.assert_close(criterion(LOGITS), expected, check_dtype=False)


def test_repr_tells_how_it_evaluates():
    assert "evaluate='plain'" in repr(RGDLoss())
    with pytest.raises(ValueError, match="evaluate must be 'plain' or 'weighted', got 'none'"):
        RGDLoss(evaluate="none")


# --- a cross-entropy to those who ask ---


def test_without_base_it_is_an_instance_of_cross_entropy_loss_and_with_base_it_is_not():
    criterion = RGDLoss(tau=2.0)
    assert isinstance(criterion, nn.CrossEntropyLoss)
    assert not isinstance(RGDLoss(base=nn.MSELoss(reduction="none")), nn.CrossEntropyLoss)
    assert repr(criterion).startswith("RGDLoss(")
    for twin in (pickle.loads(pickle.dumps(criterion)), copy.deepcopy(criterion)):
        assert isinstance(twin, nn.CrossEntropyLoss)
        torch.testing.assert_close(twin(LOGITS, TARGET), criterion(LOGITS, TARGET))


def test_its_settings_are_plain_attributes():
    criterion = RGDLoss()
    criterion.reduction, criterion.ignore_index, criterion.label_smoothing = "none", 1, 0.1
    expected = RGDLoss(reduction="none", ignore_index=1, label_smoothing=0.1)(LOGITS, TARGET)
    torch.testing.assert_close(criterion(LOGITS, TARGET), expected)
    criterion.reduction = "average"
    for name in ("rust", "composite"):
        with backend(name), pytest.raises(ValueError, match="reduction must be 'none', 'mean' or 'sum'"):
            criterion(LOGITS, TARGET)


def test_numbers_of_numpy_are_taken_as_settings():
    criterion = RGDLoss(ignore_index=np.int64(3), label_smoothing=np.float32(0.25))
    expected = RGDLoss(ignore_index=3, label_smoothing=0.25)(LOGITS, TARGET)
    torch.testing.assert_close(criterion(LOGITS, TARGET), expected)


def test_tau_set_on_a_loss_or_an_optimizer_takes_effect():
    criterion = RGDLoss()
    criterion.tau = 5.0
    assert criterion.weighting == rgd.KL(tau=5.0)
    torch.testing.assert_close(criterion(LOGITS, TARGET), RGDLoss(tau=5.0)(LOGITS, TARGET))
    optimizer = RGD(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1), rgd.KL(normalize=True))
    optimizer.tau = 3.0
    assert optimizer.weighting == rgd.KL(tau=3.0, normalize=True)
    with pytest.raises(ValueError, match="tau must be a positive number"):
        criterion.tau = -1.0
    ball = RGDLoss(weighting=rgd.KLBall(0.1))
    with pytest.raises(TypeError, match="has no tau: set weighting="):
        ball.tau = 1.0
    with pytest.raises(TypeError, match=r"KLBall\(radius=0.1\) has no tau: set weighting="):
        _ = ball.tau


@pytest.mark.parametrize("ignore_index", [2**32, 2**40, -(2**63)])
@pytest.mark.parametrize("name", ["rust", "composite"])
def test_an_ignore_index_beyond_int32_ignores_no_int32_target(ignore_index, name):
    target = TARGET.to(torch.int32)
    expected = F.cross_entropy(LOGITS, TARGET, reduction="none")
    criterion = RGDLoss(weighting=rgd.ERM(), ignore_index=ignore_index, reduction="none")
    with backend(name):
        torch.testing.assert_close(criterion(LOGITS, target), expected)
    assert criterion.stats().count == 8
    for weighting in (rgd.KL(1.0), rgd.Focal(2.0), rgd.CVaR(0.5)):
        options = {"weighting": weighting, "ignore_index": ignore_index}
        with backend(name):
            narrow, wide = (cross_entropy(LOGITS, labels, **options) for labels in (target, TARGET))
        assert narrow == wide


# --- bases ---


@dataclasses.dataclass
class FromElsewhere:
    reduction: str = "mean"

    def __call__(self, values):
        return values**2


def test_a_base_from_elsewhere_is_judged_by_what_it_returns():
    losses = torch.rand(5)
    expected = RGDLoss(base=lambda values: values**2)(losses)
    torch.testing.assert_close(RGDLoss(base=FromElsewhere())(losses), expected)
    with pytest.raises(ValueError, match="base reduces its losses to one number"):
        RGDLoss(base=nn.MSELoss())


def test_a_base_that_is_weighted_already_a_class_or_returns_no_losses_is_refused():
    with pytest.raises(ValueError, match=r"a second one would weigh every loss twice"):
        RGDLoss(base=RGDLoss(reduction="none"))
    with pytest.raises(
        TypeError, match=r"got the class MSELoss: call it, as in MSELoss\(reduction=\"none\"\)"
    ):
        RGDLoss(base=nn.MSELoss)
    with pytest.raises(TypeError, match=r"got the class KLBall: call it, as in KLBall\(\.\.\.\)"):
        RGDLoss(weighting=rgd.KLBall)
    with pytest.raises(
        TypeError, match=r"what base returns must be a torch.Tensor, got tuple: base must return"
    ):
        RGDLoss(base=lambda values: (values, values))(torch.rand(3))


# --- messages ---


def test_wrong_shapes_are_told_what_they_were_meant_to_be():
    one_hot = F.one_hot(TARGET, 4)
    with pytest.raises(
        ValueError, match=r"One-hot .* target\.argmax\(1\), or probabilities, target\.float\(\)"
    ):
        RGDLoss()(LOGITS, one_hot)
    with pytest.raises(ValueError, match=r"give input\.transpose\(1, 2\)"):
        RGDLoss()(torch.randn(2, 5, 7), torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(TypeError, match=r"did you mean tau=2\.0"):
        RGDLoss(2.0)
    with pytest.raises(TypeError, match="name it, weighting=KL"):
        RGDLoss(rgd.KL())
    with pytest.raises(TypeError, match=r"the loss takes input and target .* got no target"):
        RGDLoss()(LOGITS)


def test_mistakes_raise_what_cross_entropy_loss_raises():
    wrong = [
        (LOGITS, TARGET[:5], {}),
        (LOGITS, torch.zeros(8, 3), {}),
        (LOGITS, TARGET.bool(), {}),
        (LOGITS.long(), TARGET, {}),
        (LOGITS, TARGET, {"weight": torch.ones(3)}),
        (LOGITS, TARGET + 4, {}),
    ]
    for logits, target, options in wrong:
        with pytest.raises(Exception) as expected:  # noqa: PT011 - whatever it is
            F.cross_entropy(logits, target, **options)
        wanted = RuntimeError if expected.type is NotImplementedError else expected.type
        with pytest.raises(wanted):
            cross_entropy(logits, target, **options)


# --- statistics as data ---


def test_statistics_are_a_dict_and_last_weights_those_of_the_call():
    criterion = RGDLoss()
    assert criterion.last_weights is None
    criterion(LOGITS, TARGET, groups=TARGET % 2)
    losses = F.cross_entropy(LOGITS, TARGET, reduction="none")
    torch.testing.assert_close(criterion.last_weights, torch.exp(losses.clamp(max=1.0) / 2))
    stats = criterion.stats()
    assert dict(stats) == vars(stats)
    numbers = stats.to_dict("rgd/")
    assert numbers["rgd/mean_loss"] == stats.mean_loss
    assert numbers["rgd/group_1/count"] == 4
    assert all(isinstance(value, (int, float)) for value in numbers.values())
    without = rgd.weight_stats(np.ones(3), np.ones(3))
    assert "clipped_share" not in without.to_dict()
    with pytest.raises(KeyError):
        stats["mean"]


def test_advice_tells_when_reweighting_cannot_matter_and_when_few_samples_have_the_weight():
    def advice(losses, weighting):
        return " ".join(rgd.weight_stats(losses, rgd.sample_weights(losses, weighting), weighting).advice())

    assert "tau near the losses" in advice(np.full(64, np.log(32000)), rgd.KL())
    assert "near zero" in advice(np.full(64, 1e-4), rgd.KL())
    few = np.ones(64)
    few[3] = 20.0
    assert "few samples" in advice(few, rgd.KL(np.inf, scale=1.0))
    assert advice(np.linspace(0, 2, 64), rgd.KL()) == ""
    assert advice(np.empty(0), rgd.KL()) == ""


def test_advice_tells_of_weights_near_zero_and_of_logits_that_are_probabilities():
    far = torch.full((8, 4), -9.0)
    far[:, 3] = 9.0
    fine_tuning = RGDLoss(weighting=rgd.KL(scale=-1.0), warn=True)
    with pytest.warns(UserWarning, match="near zero, the largest is 1.5e-08, and so are the steps"):
        fine_tuning(far.requires_grad_(), torch.zeros(8, dtype=torch.long))
    assert "normalize=True" in fine_tuning.stats().advice()[0]
    for given, axis in ((LOGITS, 1), (LOGITS.view(2, 4, 4), 1), (LOGITS[0], 0)):
        probabilities = torch.softmax(given, axis)
        target = torch.zeros(given.select(axis, 0).shape, dtype=torch.long)
        criterion = RGDLoss(warn=True)
        with pytest.warns(UserWarning, match="call 1: The logits are probabilities: every row sums to one"):
            criterion(probabilities.requires_grad_(), target)
        assert "before the model's softmax" in criterion.stats().advice()[-1]
    plain = RGDLoss(warn=True)
    plain(LOGITS.clone().requires_grad_(), TARGET)
    assert plain.stats().advice() == []


def test_the_mean_weight_is_a_statistic():
    criterion = RGDLoss(weighting=rgd.KL(scale=-0.7))
    logits = LOGITS.clone()
    criterion(logits, TARGET, sample_weight=torch.arange(8.0))
    p = torch.arange(8.0)
    expected = float((p * criterion.last_weights).sum() / p.sum())
    stats = criterion.stats()
    assert stats.mean_weight == pytest.approx(expected, rel=1e-6)
    assert stats.to_dict("rgd/")["rgd/mean_weight"] == stats.mean_weight == stats["mean_weight"]
    criterion.reset_stats()
    criterion(logits, TARGET)
    criterion(2 * logits, TARGET)
    first = RGDLoss(weighting=rgd.KL(scale=-0.7))
    first(logits, TARGET)
    second = criterion.stats().mean_weight
    assert criterion.stats(total=True).mean_weight == pytest.approx((first.stats().mean_weight + second) / 2)


def test_a_class_out_of_range_is_told_the_last_one_there_is():
    with pytest.raises(IndexError, match=r"label 4 at position \[0\] .* give a class from 0 to 3, or name 4"):
        RGDLoss()(LOGITS[:1], torch.tensor([4]))


@pytest.mark.parametrize("per", ["element", "sample"])
@pytest.mark.parametrize("name", ["rust", "composite"])
def test_statistics_heed_sample_weights_beside_ignored_targets(name, per):
    logits = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = torch.arange(18).view(6, 3) % 4
    target[0], target[1, 0] = -100, -100
    p = torch.tensor([5.0, 2, 0, 1, 3, 1], dtype=torch.float64)
    criterion = RGDLoss(per=per)
    with backend(name):
        objective = criterion(logits, target, sample_weight=p)
    stats = criterion.stats()
    losses = F.cross_entropy(logits, target, reduction="none")
    mass = p[:, None] * (target != -100)
    assert stats.mean_loss == pytest.approx(((mass * losses).sum() / mass.sum()).item(), rel=1e-13)
    assert stats.objective == pytest.approx(objective.item(), rel=1e-13)
    assert stats.count == (11 if per == "element" else 4)
