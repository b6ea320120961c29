"""Weightings that remember: their state as buffers of `RGDLoss`, in `RGD`, and explicit in the functions."""

import copy
import dataclasses
import io
import math
import pickle

import numpy as np
import pytest
import rgd
import torch
from rgd import KL, CVaR, Focal, GroupDRO, MovingAverage, Trimmed, reference
from rgd.torch import RGD, RGDLoss, backend, cross_entropy, reweighted_mean, sample_weights

MOVING = MovingAverage(KL(2.0), 0.7)
GROUPED = GroupDRO(3, 0.5)
TRIMMED = Trimmed(MovingAverage(KL(1.0), 0.9), 0.25)
STATEFUL = [MOVING, GROUPED, TRIMMED]
every_stateful = pytest.mark.parametrize("weighting", STATEFUL, ids=["MovingAverage", "GroupDRO", "Trimmed"])
both_backends = pytest.mark.parametrize("name", ["rust", "composite"])
N = 8
GROUPS = torch.arange(N) % 3
# A sum of 8 in another order, its logarithm, and three steps of a running mean.
CLOSE = {"rtol": 64 * torch.finfo(torch.float64).eps, "atol": 64 * torch.finfo(torch.float64).eps}


@dataclasses.dataclass(frozen=True)
class Nested(rgd.Weighting):
    """Keeps numbers, an array and integers in a nested state, and returns plain weights."""

    def init(self):
        return {"sums": ({"total": 0.0}, np.zeros(2)), "calls": [0]}

    def step(self, batch, state):
        xp, total = batch.xp, batch.sum(batch.losses)
        (sums, pair), calls = state["sums"], state["calls"][0]
        new = {"sums": ({"total": sums["total"] + total}, pair + total), "calls": [calls + 1]}
        return xp.ones_like(batch.losses), new


def losses_of(seed):
    return torch.tensor(np.random.default_rng(seed).gamma(1.0, 1.5, N))


def identity(losses):
    return losses


def loss_of(weighting, **settings):
    return RGDLoss(weighting=weighting, base=identity, **settings)


def groups_for(weighting):
    return GROUPS if isinstance(weighting, GroupDRO) else None


def trained(criterion, steps=3):
    for seed in range(steps):
        criterion(losses_of(seed), groups=groups_for(criterion.weighting))
    return criterion


def oracle(weighting, steps):
    """Objectives of a number of batches, and the state after all, by the reference."""
    state, objectives = weighting.init(), []
    groups = None if groups_for(weighting) is None else GROUPS.numpy()
    for seed in range(steps):
        value, state = reference.reweighted_mean(
            losses_of(seed).numpy(), weighting, groups=groups, state=state
        )
        objectives.append(value)
    return objectives, state


def saved_state(criterion):
    return {key: value.clone() for key, value in criterion.state_dict().items()}


def assert_same_state(mine, theirs):
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert value.dtype == theirs[key].dtype
        assert torch.equal(value, theirs[key]), key


# --- buffers ---


def test_buffers_exist_from_construction_with_the_values_of_init():
    state = RGDLoss(weighting=MOVING).state_dict()
    assert {key: (value.item(), value.dtype) for key, value in state.items()} == {
        "weighting_state.log_mean": (0.0, torch.float64),
        "weighting_state.updates": (0, torch.int64),
    }
    shares = RGDLoss(weighting=GROUPED).state_dict()["weighting_state.shares"]
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=0)
    assert RGDLoss(weighting=TRIMMED).state_dict().keys() == state.keys()
    assert not RGDLoss().state_dict()
    assert [name for name, _ in RGDLoss(weighting=MOVING).named_buffers()] == list(state)
    assert not list(RGDLoss(weighting=MOVING).parameters())


@both_backends
@every_stateful
def test_the_state_and_the_objectives_are_those_of_the_reference(weighting, name):
    expected, state = oracle(weighting, 3)
    groups = groups_for(weighting)
    criterion = loss_of(weighting)
    given = weighting.init()
    with backend(name):
        for seed in range(3):
            objective = criterion(losses_of(seed), groups=groups)
            mean, given = reweighted_mean(losses_of(seed), weighting, groups=groups, state=given)
            wanted = torch.tensor(expected[seed], dtype=torch.float64)
            torch.testing.assert_close(objective, wanted, **CLOSE)
            torch.testing.assert_close(mean, wanted, **CLOSE)
    for key, value in state.items():
        for got in (criterion.state_dict()[f"weighting_state.{key}"], given[key]):
            torch.testing.assert_close(got, torch.as_tensor(value, dtype=got.dtype), **CLOSE)


@both_backends
def test_a_nested_state_is_kept_in_its_structure(name):
    criterion = trained(loss_of(Nested()))
    total = sum(losses_of(seed).sum() for seed in range(3))
    state = criterion.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "weighting_state.sums_0_total": (),
        "weighting_state.sums_1": (2,),
        "weighting_state.calls_0": (),
    }
    torch.testing.assert_close(state["weighting_state.sums_0_total"], total, **CLOSE)
    torch.testing.assert_close(state["weighting_state.sums_1"], total.expand(2), **CLOSE)
    assert state["weighting_state.calls_0"] == 3
    given = Nested().init()
    with backend(name):
        for seed in range(3):
            _, given = sample_weights(losses_of(seed), Nested(), state=given)
    assert isinstance(given["sums"], tuple)
    assert isinstance(given["calls"], list)
    torch.testing.assert_close(given["sums"][0]["total"], total, **CLOSE)


# --- dtypes, devices, copies ---


@every_stateful
def test_narrow_dtypes_leave_the_state_as_wide_as_it_is(weighting):
    criterion = trained(RGDLoss(weighting=weighting, base=identity))
    before = saved_state(criterion)
    for change in (
        lambda module: module.half(),
        lambda module: module.bfloat16(),
        lambda module: module.to(torch.float16),
        lambda module: module.to("cpu", torch.bfloat16),
        lambda module: torch.nn.Sequential(module).half(),
        lambda module: module.double(),
    ):
        change(criterion)
        assert_same_state(saved_state(criterion), before)
    criterion.float()
    assert all(value.dtype != torch.float64 for value in criterion.state_dict().values())
    for key, value in criterion.state_dict().items():
        torch.testing.assert_close(value, before[key].to(value.dtype), rtol=0, atol=0)


def test_class_weights_beside_the_state_are_narrowed_as_ever():
    criterion = RGDLoss(torch.ones(3), weighting=MOVING).half()
    assert criterion.weight.dtype is torch.float16
    assert criterion.weighting_state.log_mean.dtype is torch.float64


def test_the_state_moves_with_the_module():
    criterion = RGDLoss(weighting=GROUPED).to("meta")
    assert criterion.weighting_state.shares.device.type == "meta"
    assert criterion.weighting_state.shares.dtype is torch.float64
    assert criterion.to_empty(device="cpu").weighting_state.shares.device.type == "cpu"


@both_backends
@every_stateful
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_losses_update_a_float64_state(weighting, dtype, name):
    criterion = loss_of(weighting)
    narrow = [losses_of(seed).to(dtype) for seed in range(3)]
    groups, given = groups_for(weighting), weighting.init()
    with backend(name):
        for losses in narrow:
            assert criterion(losses, groups=groups).dtype is dtype
            _, given = reference.sample_weights(
                losses.double().numpy(),
                weighting,
                groups=None if groups is None else groups.numpy(),
                state=given,
            )
    for key, value in given.items():
        got = criterion.state_dict()[f"weighting_state.{key}"]
        assert got.dtype in (torch.float64, torch.int64)
        torch.testing.assert_close(got, torch.as_tensor(value, dtype=got.dtype), **CLOSE)


def by_pickle(criterion):
    return pickle.loads(pickle.dumps(criterion))


def by_torch_save(criterion):
    file = io.BytesIO()
    torch.save(criterion, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_state_dict(criterion):
    file = io.BytesIO()
    torch.save(criterion.state_dict(), file)
    file.seek(0)
    other = loss_of(criterion.weighting)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@every_stateful
@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch_save, by_state_dict])
def test_a_copy_goes_on_where_the_first_was_and_apart_from_it(weighting, copied):
    criterion = trained(loss_of(weighting))
    before = saved_state(criterion)
    other = copied(criterion)
    assert_same_state(saved_state(other), before)
    trained(other)
    assert_same_state(saved_state(criterion), before)
    assert not torch.equal(*(next(iter(c.state_dict().values())) for c in (criterion, other)))
    trained(criterion)
    assert_same_state(saved_state(criterion), saved_state(other))


def test_the_checkpoint_of_another_weighting_is_refused():
    with pytest.raises(RuntimeError, match="weighting_state"):
        RGDLoss(weighting=MOVING).load_state_dict(RGDLoss(weighting=GROUPED).state_dict())
    with pytest.raises(RuntimeError, match="weighting_state"):
        RGDLoss().load_state_dict(RGDLoss(weighting=GROUPED).state_dict())


# --- when it is updated ---


@both_backends
@every_stateful
def test_in_evaluation_mode_a_weighted_loss_uses_the_state_and_leaves_it(weighting, name):
    criterion, fresh = trained(loss_of(weighting)).eval(), loss_of(weighting).eval()
    before = saved_state(criterion)
    # With a graph, as in adversarial training: weights are for what is trained.
    losses, groups = losses_of(9).requires_grad_(), groups_for(weighting)
    with backend(name):
        values = [criterion(losses, groups=groups) for _ in range(2)]
        assert torch.equal(*values)
        assert_same_state(saved_state(criterion), before)
        assert not torch.equal(values[0], fresh(losses, groups=groups))
        assert torch.equal(values[0], criterion.train()(losses, groups=groups))
    assert not torch.equal(*(next(iter(s.values())) for s in (saved_state(criterion), before)))


@both_backends
@every_stateful
def test_nothing_to_weigh_or_a_loss_that_is_not_finite_leaves_the_state(weighting, name):
    criterion = trained(loss_of(weighting))
    before = saved_state(criterion)
    groups, given = groups_for(weighting), {k[16:]: v for k, v in before.items()}
    for value in (math.inf, -math.inf, math.nan):
        broken = losses_of(4)
        broken[3] = value
        with backend(name):
            criterion(broken, groups=groups)
            _, after = reweighted_mean(broken, weighting, groups=groups, state=given)
        assert_same_state(saved_state(criterion), before)
        assert_same_state(after, given)
    empty = torch.empty(0, dtype=torch.float64)
    with backend(name):
        assert criterion(empty, groups=None if groups is None else groups[:0]).isnan()
        criterion(losses_of(4), groups=groups, where=torch.zeros(N, dtype=torch.bool))
        criterion(losses_of(4), groups=groups, sample_weight=torch.zeros(N))
    assert_same_state(saved_state(criterion), before)
    # One that is left out does not count.
    shown = torch.arange(N) != 3
    with backend(name):
        criterion(broken, groups=groups, where=shown)
    clean = trained(loss_of(weighting))
    with backend(name):
        clean(losses_of(4), groups=groups, where=shown)
    assert_same_state(saved_state(criterion), saved_state(clean))


@both_backends
def test_an_empty_batch_of_logits_and_one_all_ignored_leave_the_state(name):
    criterion = RGDLoss(weighting=MOVING)
    criterion(torch.eye(3), torch.arange(3))
    before = saved_state(criterion)
    with backend(name):
        criterion(torch.empty(0, 3), torch.empty(0, dtype=torch.int64))
        criterion(torch.eye(3), torch.full((3,), -100))
    assert_same_state(saved_state(criterion), before)


@every_stateful
def test_the_updates_leave_no_graph_behind(weighting):
    criterion = loss_of(weighting)
    for seed in range(2):
        losses = losses_of(seed).requires_grad_()
        criterion(losses, groups=groups_for(weighting)).backward()
        assert losses.grad.isfinite().all()
    assert not any(buffer.requires_grad for buffer in criterion.buffers())


def test_two_forwards_before_one_backward_keep_the_weights_of_each():
    criterion = loss_of(MOVING)
    first, second = losses_of(0).requires_grad_(), losses_of(1).requires_grad_()
    objectives = criterion(first), criterion(second)
    sum(objectives).backward()
    state = MOVING.init()
    for losses in (first, second):
        weights, state = sample_weights(losses.detach(), MOVING, state=state)
        torch.testing.assert_close(losses.grad, weights / N, **CLOSE)


# --- another weighting ---


def test_another_weighting_of_the_same_class_keeps_the_state():
    for before, after in [
        (MOVING, MovingAverage(KL(3.0), 0.5)),
        (MOVING, MovingAverage(Focal(2.0), 0.5)),
        (GROUPED, GroupDRO(3, 0.1)),
        (TRIMMED, Trimmed(MovingAverage(KL(1.0), 0.9), 0.5)),
    ]:
        criterion = trained(loss_of(before))
        state = criterion.weighting_state
        kept = saved_state(criterion)
        criterion.weighting = after
        assert criterion.weighting_state is state
        assert_same_state(saved_state(criterion), kept)


def test_a_weighting_of_another_class_or_state_starts_anew():
    for before, after in [
        (MOVING, GROUPED),
        (GROUPED, MOVING),
        (MOVING, TRIMMED),
        (GROUPED, GroupDRO(4, 0.5)),
        (TRIMMED, Trimmed(GROUPED, 0.25)),
    ]:
        criterion = trained(loss_of(before))
        criterion.weighting = after
        assert_same_state(saved_state(criterion), saved_state(loss_of(after)))
    criterion.weighting = KL()
    assert not criterion.state_dict()
    criterion.weighting = MOVING
    assert_same_state(saved_state(criterion), saved_state(loss_of(MOVING)))


# --- RGD ---


def optimizer_of(weighting):
    parameter = torch.ones((), dtype=torch.float64, requires_grad=True)
    return parameter, RGD(torch.optim.SGD([parameter], lr=0.01, momentum=0.9), weighting)


def descend(parameter, optimizer, seeds):
    objectives = []
    for seed in seeds:
        optimizer.zero_grad()
        losses = losses_of(seed) * parameter
        objectives.append(optimizer.backward(losses, groups=groups_for(optimizer.weighting)))
        optimizer.step()
    return objectives


@both_backends
@every_stateful
def test_the_optimizer_remembers_and_its_checkpoint_resumes(weighting, name):
    with backend(name):
        parameter, optimizer = optimizer_of(weighting)
        objectives = descend(parameter, optimizer, range(2))
        criterion = loss_of(weighting)
        first = criterion(losses_of(0), groups=groups_for(weighting))
        torch.testing.assert_close(objectives[0], first, **CLOSE)
        file = io.BytesIO()
        torch.save((parameter.detach(), optimizer.state_dict()), file)
        others = []
        for other, wrapped in (optimizer_of(weighting), copy.deepcopy((parameter, optimizer))):
            file.seek(0)  # an optimizer keeps the tensors that it loads
            position, saved = torch.load(file, weights_only=True)
            with torch.no_grad():
                other.copy_(position)
            wrapped.load_state_dict(saved)
            others.append(descend(other, wrapped, range(2, 5)))
        going_on = descend(parameter, optimizer, range(2, 5))
    assert others == [going_on, going_on]
    forgetful, fresh = optimizer_of(weighting)
    with torch.no_grad():
        forgetful.copy_(position)
    assert descend(forgetful, fresh, [2]) != going_on[:1]


def test_the_wrapped_optimizer_loads_the_checkpoint_and_a_plain_one_loads_into_the_wrapper():
    parameter, optimizer = optimizer_of(GROUPED)
    descend(parameter, optimizer, range(2))
    plain = torch.optim.SGD([torch.ones((), dtype=torch.float64, requires_grad=True)], lr=1.0)
    plain.load_state_dict(optimizer.state_dict())
    assert plain.param_groups[0]["lr"] == 0.01
    before = optimizer.state_dict()["weighting_state"]["shares"].clone()
    optimizer.load_state_dict(plain.state_dict())
    assert torch.equal(optimizer.state_dict()["weighting_state"]["shares"], before)
    stateless = optimizer_of(KL())[1]
    stateless.load_state_dict(optimizer.state_dict())
    assert "weighting_state" not in stateless.state_dict()
    with pytest.raises(RuntimeError, match="shares"):
        optimizer_of(MOVING)[1].load_state_dict(optimizer.state_dict())


def test_the_optimizer_s_state_is_left_by_an_objective_without_grad_and_by_broken_losses():
    parameter, optimizer = optimizer_of(MOVING)
    descend(parameter, optimizer, range(2))
    before = {key: value.clone() for key, value in optimizer.state_dict()["weighting_state"].items()}
    with torch.no_grad():
        optimizer.objective(losses_of(3))
    optimizer.objective(losses_of(3) * math.inf * parameter)
    assert_same_state(optimizer.state_dict()["weighting_state"], before)
    optimizer.weighting = MovingAverage(KL(3.0), 0.5)
    assert_same_state(optimizer.state_dict()["weighting_state"], before)
    optimizer.weighting = GROUPED
    assert optimizer.state_dict()["weighting_state"].keys() == {"shares"}


def test_a_pickled_optimizer_keeps_the_state():
    parameter, optimizer = optimizer_of(MOVING)
    descend(parameter, optimizer, range(2))
    other = pickle.loads(pickle.dumps(optimizer))
    assert_same_state(other.state_dict()["weighting_state"], optimizer.state_dict()["weighting_state"])
    descend(other.param_groups[0]["params"][0], other, range(2))
    assert other.state_dict()["weighting_state"]["updates"] == 4
    assert optimizer.state_dict()["weighting_state"]["updates"] == 2


# --- functions ---


@every_stateful
def test_functions_return_the_state_and_leave_the_one_given(weighting):
    losses, groups = losses_of(0), groups_for(weighting)
    logits = torch.stack([losses, -losses], 1)
    target = torch.zeros(N, dtype=torch.int64)
    given = {key: torch.as_tensor(value) for key, value in weighting.init().items()}
    before = {key: value.clone() for key, value in given.items()}
    for result, after in (
        sample_weights(losses, weighting, groups=groups, state=given),
        reweighted_mean(losses, weighting, groups=groups, state=given),
        cross_entropy(logits, target, weighting=weighting, groups=groups, state=given),
    ):
        assert isinstance(result, torch.Tensor)
        assert_same_state(given, before)
        assert after.keys() == given.keys()
        assert not torch.equal(next(iter(after.values())), next(iter(given.values())))
        assert {key: value.dtype for key, value in after.items()} == {k: v.dtype for k, v in given.items()}


def test_numbers_of_python_in_a_state_are_float64():
    _, state = sample_weights(losses_of(0), MOVING, state=MOVING.init())
    assert state["log_mean"].dtype is torch.float64
    assert state["updates"].dtype is torch.int64


@pytest.mark.parametrize("weighting", STATEFUL, ids=["MovingAverage", "GroupDRO", "Trimmed"])
def test_a_missing_state_or_one_too_many_is_refused(weighting):
    losses = losses_of(0)
    logits, target = torch.stack([losses, -losses], 1), torch.zeros(N, dtype=torch.int64)
    for call in (
        lambda m, **k: sample_weights(losses, m, **k),
        lambda m, **k: reweighted_mean(losses, m, **k),
        lambda m, **k: cross_entropy(logits, target, weighting=m, **k),
    ):
        with pytest.raises(ValueError, match=r"remembers .*: start with state = weighting\.init\(\)"):
            call(weighting, groups=groups_for(weighting))
        with pytest.raises(ValueError, match="CVaR keeps no state: leave state out"):
            call(CVaR(0.5), state=weighting.init())


@pytest.mark.filterwarnings("ignore:torch.distributed is")  # one process saves and loads alone
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch 2.8 warns of itself
def test_a_distributed_checkpoint_resumes_with_the_weighting_s_state_beside_it(tmp_path):
    from torch.distributed.checkpoint import load, save  # noqa: PLC0415
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict  # noqa: PLC0415

    def start(seed):
        torch.manual_seed(seed)
        model = torch.nn.Linear(3, 1)
        return model, RGD(torch.optim.Adam(model.parameters()), MOVING)

    def step(model, optimizer, seed):
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        optimizer.backward(model(inputs).square().mean(1))
        optimizer.step()

    def parts(model, optimizer):
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments, "weighting": optimizer.weighting_state.state_dict()}

    model, optimizer = start(0)
    step(model, optimizer, 1)
    save(parts(model, optimizer), checkpoint_id=tmp_path, no_dist=True)
    other, resumed = start(5)
    loaded = parts(other, resumed)
    load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(other, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    resumed.weighting_state.load_state_dict(loaded["weighting"])
    for trained in ((model, optimizer), (other, resumed)):
        step(*trained, 2)
    assert torch.equal(model.weight, other.weight)
    states = (one.weighting_state.state_dict() for one in (optimizer, resumed))
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))
    assert RGD(torch.optim.SGD(model.parameters())).weighting_state is None


# --- all or nothing ---


def stateful_optimizer():
    parameter = torch.zeros(3, requires_grad=True)
    return parameter, RGD(torch.optim.SGD([parameter], lr=0.1), rgd.MovingAverage(rgd.KL(), decay=0.5))


class Boom(Exception):
    pass


def test_a_backward_that_is_refused_or_fails_leaves_the_optimizer_as_it_was():
    parameter, optimizer = stateful_optimizer()
    optimizer.backward(parameter + torch.tensor([0.0, 1.0, 2.0]))
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    failing = parameter + torch.tensor([3.0, 1.0, 2.0])

    def fail(_gradient):
        raise Boom

    failing.register_hook(fail)
    with pytest.raises(RuntimeError, match="does not require grad"):
        optimizer.backward(torch.ones(3))
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        optimizer.backward(parameter + 1.0)
    with pytest.raises(Boom):
        optimizer.backward(failing)
    with pytest.raises(ValueError, match="shape"):
        optimizer.backward(parameter + 1.0, sample_weight=torch.ones(2))
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
    parameter.grad = None
    optimizer.step()  # no objective waits for its gradient


@pytest.mark.parametrize("wrong", ["weighting", "optimizer"])
def test_a_checkpoint_that_does_not_fit_changes_nothing_of_an_optimizer(wrong):
    parameter, optimizer = stateful_optimizer()
    optimizer.backward(parameter + torch.tensor([0.0, 1.0, 2.0]))
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    saved = copy.deepcopy(before)
    saved["weighting_state"]["updates"] += 5
    saved["param_groups"][0]["lr"] = 7.0
    if wrong == "weighting":
        saved["weighting_state"] = {"shares": torch.ones(2)}
    else:
        saved["param_groups"] = saved["param_groups"] * 2
    with pytest.raises((RuntimeError, ValueError)):
        optimizer.load_state_dict(saved)
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("other", [rgd.GroupDRO(2, 0.1), rgd.GroupDRO(3, 0.1)])
def test_the_state_of_another_weighting_is_refused_also_where_the_loading_is_not_strict(strict, other):
    mine = rgd.GroupDRO(2, 0.1) if other.groups == 3 else rgd.MovingAverage(rgd.KL(), 0.5)
    criterion = RGDLoss(weighting=mine)
    before = copy.deepcopy(criterion.state_dict())
    with pytest.raises(RuntimeError, match=r"weighting_state holds the state of another weighting"):
        criterion.load_state_dict(RGDLoss(weighting=other).state_dict(), strict=strict)
    torch.testing.assert_close(criterion.state_dict(), before, rtol=0, atol=0)
    criterion.load_state_dict(RGDLoss().state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="Missing key"):
        criterion.load_state_dict(RGDLoss().state_dict())


def moved_by_rank(rank, size):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    model.add_module("criterion", RGDLoss(weighting=rgd.MovingAverage(rgd.KL(), decay=0.5), sync=False))

    class WithLoss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, target):
            return self.model.criterion(self.model[0](x), target)

    torch.manual_seed(0)
    parallel = torch.nn.parallel.DistributedDataParallel(WithLoss(), broadcast_buffers=True)
    alone = RGDLoss(weighting=rgd.MovingAverage(rgd.KL(), decay=0.5), sync=False)
    for step in range(3):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * rank + step)) * (rank + 1)
        alone(model[0](x), torch.arange(4) % 3)
        parallel(x, torch.arange(4) % 3)
    saved = parallel.module.state_dict()
    resumed = WithLoss()
    resumed.load_state_dict(saved)
    names = ["log_mean", "updates"]
    return (
        [float(saved[f"model.criterion.weighting_state.{name}"]) for name in names],
        [float(alone.state_dict()[f"weighting_state.{name}"]) for name in names],
        [float(getattr(model.criterion.weighting_state, name)) for name in names],
    )


def test_without_sync_each_process_keeps_a_state_of_its_own_inside_ddp(run):
    outcomes = run(2, moved_by_rank)
    for saved, alone, _ in outcomes:
        assert saved == pytest.approx(alone, rel=1e-6)
    assert outcomes[0][0] != outcomes[1][0]


def test_a_state_of_a_process_of_its_own_moves_and_resumes_as_any():
    criterion = RGDLoss(weighting=rgd.MovingAverage(rgd.KL(), decay=0.5), sync=False)
    criterion(torch.eye(3), torch.arange(3))
    assert not list(criterion.buffers())
    other = RGDLoss(weighting=rgd.MovingAverage(rgd.KL(), decay=0.5), sync=False)
    other.load_state_dict(criterion.state_dict())
    torch.testing.assert_close(
        copy.deepcopy(other).half().state_dict(), criterion.state_dict(), rtol=0, atol=0
    )
    assert criterion.to("meta").weighting_state.log_mean.is_meta
