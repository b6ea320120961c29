"""A criterion inside an activation checkpoint: its state moves once, and a repeated call uses the old one."""

import copy

import pytest
import rgd
import torch
from rgd.torch import RGD, LinearRGDLoss, RGDLoss
from torch import nn
from torch.utils.checkpoint import checkpoint

GROUPS = torch.arange(8) % 2
TARGET = torch.arange(8) % 3
MEMBERS = {
    "groups": rgd.GroupDRO(2, 0.5),
    "average": rgd.MovingAverage(rgd.KL(tau=1.0), decay=0.5),
    "pointwise": rgd.KL(scale=-0.7),
    "batch": rgd.CVaR(0.3),
}
STATEFUL = ["groups", "average"]


def inputs(step):
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


class Model(nn.Module):
    """A layer and its loss, the two inside one checkpoint, or none."""

    def __init__(self, weighting, *, linear=False, base=False):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.linear = linear
        if linear:
            self.criterion = LinearRGDLoss.tie(self.head, weighting=weighting)
        elif base:
            self.criterion = RGDLoss(weighting=weighting, base=nn.CrossEntropyLoss(reduction="none"))
        else:
            self.criterion = RGDLoss(weighting=weighting)
        self.criterion.reset_stats()

    def loss(self, x, target):
        hidden = self.layer(x).tanh()
        groups = GROUPS if isinstance(self.criterion.weighting, rgd.GroupDRO) else None
        return self.criterion(hidden if self.linear else self.head(hidden), target, groups=groups)

    def forward(self, x, target, reentrant=None):
        if reentrant is None:
            return self.loss(x, target)
        return checkpoint(self.loss, x.requires_grad_(), target, use_reentrant=reentrant)

    def left(self):
        """What a training leaves behind."""
        sums = self.criterion.stats(total=True)
        state = {name: one for name, one in self.state_dict().items() if "weighting_state" in name}
        return [one.grad for one in self.parameters()], state, sums.count, sums.objective


@pytest.mark.parametrize("kind", ["dense", "linear", "base"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("name", MEMBERS)
def test_gradients_state_and_totals_are_those_without_the_checkpoint(name, reentrant, kind):
    settings = {"linear": kind == "linear", "base": kind == "base"}
    found = []
    for mode in (None, reentrant):
        model = Model(MEMBERS[name], **settings)
        for step in range(3):
            model.zero_grad()
            model(inputs(step), TARGET, mode).backward()
        found.append(model.left())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_recomputations_in_another_order_than_the_calls_use_their_own_states(name, reentrant):
    found = []
    for mode in (None, reentrant):
        model = Model(MEMBERS[name])
        first, second, third = (model(inputs(step), TARGET, mode) for step in range(3))
        (third + 2 * first).backward()
        (4 * second).backward()
        found.append(model.left())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", STATEFUL)
def test_the_same_batch_twice_is_told_apart_by_the_backward_pass_between(name):
    found = []
    for mode in (None, False):
        model = Model(MEMBERS[name])
        for _ in range(2):
            model(inputs(0), TARGET, mode).backward()
        found.append(model.left())
    torch.testing.assert_close(*found)


def test_a_graph_that_is_kept_is_repeated_more_than_once():
    found = []
    for mode in (None, False):
        model = Model(MEMBERS["groups"])
        loss = model(inputs(0), TARGET, mode)
        loss.backward(retain_graph=True)
        loss.backward()
        found.append(model.left())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_a_call_whose_state_is_not_known_is_refused(reentrant):
    model = Model(MEMBERS["groups"])
    first, second = (model(inputs(0), TARGET, reentrant) for _ in range(2))
    with pytest.raises(RuntimeError, match="call the criterion outside the checkpoint"):
        (first + second).backward()


def test_a_call_that_no_forward_pass_made_is_refused():
    model = Model(MEMBERS["groups"])
    x = inputs(0).requires_grad_()
    y = x * 1

    @torch.enable_grad()
    def hook(_gradient):
        model(inputs(1), TARGET)

    y.register_hook(hook)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="call the criterion outside the checkpoint"):
        y.sum().backward()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("compiled_inside", [True, False], ids=["graph in checkpoint", "checkpoint in graph"])
@pytest.mark.parametrize("name", STATEFUL)
def test_a_compiled_call_has_the_right_gradient_or_is_refused(name, compiled_inside):
    plain = Model(MEMBERS[name])
    model = Model(MEMBERS[name])
    if compiled_inside:
        graph = torch.compile(model.loss, backend="aot_eager")

        def call(x):
            return checkpoint(graph, x.requires_grad_(), TARGET, use_reentrant=False)
    else:
        call = torch.compile(lambda x: model(x, TARGET, False), backend="aot_eager")
    for step in range(2):
        plain.zero_grad()
        plain(inputs(step), TARGET).backward()
        model.zero_grad()
        try:
            call(inputs(step)).backward()
        except RuntimeError as error:
            assert "outside the checkpoint" in str(error)  # noqa: PT017
            return
        torch.testing.assert_close(model.left(), plain.left())


def test_totals_of_a_compiled_call_inside_a_checkpoint_count_it_once():
    plain, model = Model(MEMBERS["pointwise"]), Model(MEMBERS["pointwise"])
    graph = torch.compile(model.loss, backend="aot_eager")
    for step in range(2):
        plain.zero_grad()
        plain(inputs(step), TARGET).backward()
        model.zero_grad()
        checkpoint(graph, inputs(step).requires_grad_(), TARGET, use_reentrant=False).backward()
    torch.testing.assert_close(model.left(), plain.left())


def test_the_objective_of_an_optimizer_inside_a_checkpoint_moves_the_state_once():
    found = []
    for mode in (None, False, True):
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        optimizer = RGD(torch.optim.SGD(layer.parameters(), lr=0.1), MEMBERS["average"])

        def objective(x, layer=layer, optimizer=optimizer):
            return optimizer.objective(nn.functional.cross_entropy(layer(x), TARGET, reduction="none"))

        for step in range(3):
            optimizer.zero_grad()
            x = inputs(step).requires_grad_()
            loss = objective(x) if mode is None else checkpoint(objective, x, use_reentrant=mode)
            loss.backward()
            optimizer.step()
        found.append((layer.state_dict(), optimizer.weighting_state.state_dict()))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_the_record_of_the_forward_pass_stays_and_the_advisor_counts_it_once():
    model = Model(MEMBERS["pointwise"])
    model.criterion._advisor = None
    model.criterion = RGDLoss(warn=True)
    model.criterion.reset_stats()
    loss = model(inputs(0), TARGET, False)
    record = model.criterion._record
    loss.backward()
    assert model.criterion._record is record
    assert model.criterion._advisor.calls == 1
