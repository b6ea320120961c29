"""The algorithm classes for DomainBed and SubpopBench, mixed into stand-ins with the suites' interfaces."""

import pathlib
import re

import pytest
import rgd
import torch
from rgd.integrations.domainbed import DomainBedRGD, SubpopBenchRGD
from torch import nn
from torch.nn import functional as F

EPS = torch.finfo(torch.float64).eps


class DomainBedERM(nn.Module):
    """The interface of `domainbed.algorithms.ERM`."""

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__()
        self.hparams = hparams
        torch.manual_seed(0)
        self.network = nn.Linear(input_shape[0], num_classes, dtype=torch.float64)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=hparams["lr"])

    def update(self, minibatches, unlabeled=None):
        loss = F.cross_entropy(
            self.predict(torch.cat([x for x, _ in minibatches])), torch.cat([y for _, y in minibatches])
        )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item()}

    def predict(self, x):
        return self.network(x)


class SubpopBenchERM(nn.Module):
    """The interface of `subpopbench.learning.algorithms.ERM`."""

    def __init__(self, data_type, input_shape, *rest, grp_sizes=None):
        super().__init__()
        num_classes, num_attributes, _num_examples, hparams = rest
        self.hparams, self.data_type = hparams, data_type
        self.num_classes, self.num_attributes = num_classes, num_attributes
        torch.manual_seed(0)
        self.network = nn.Linear(input_shape[0], num_classes, dtype=torch.float64)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=hparams["lr"])
        self.loss = nn.CrossEntropyLoss(reduction="none")

    def _compute_loss(self, i, x, y, a, step):
        return self.loss(self.predict(x), y).mean()

    def update(self, minibatch, step):
        all_i, all_x, all_y, all_a = minibatch
        loss = self._compute_loss(all_i, all_x, all_y, all_a, step)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item()}

    def predict(self, x):
        return self.network(x)


HPARAMS = {"lr": 0.3}


def domainbed(**attributes):
    hparams = {**HPARAMS, **attributes.pop("hparams", {})}
    return type("RGD", (DomainBedRGD, DomainBedERM), attributes)((5,), 3, 2, hparams)


def subpopbench(**attributes):
    hparams = {**HPARAMS, **attributes.pop("hparams", {})}
    kind = type("RGD", (SubpopBenchRGD, SubpopBenchERM), attributes)
    return kind("tabular", (5,), 3, 2, 100, hparams, grp_sizes=[1] * 6)


def domains(step):
    generator = torch.Generator().manual_seed(step)
    return [
        (
            torch.randn(size, 5, generator=generator, dtype=torch.float64),
            torch.randint(3, (size,), generator=generator),
        )
        for size in (4, 7)
    ]


def minibatch(step):
    (x, y), (more_x, more_y) = domains(step)
    x, y = torch.cat([x, more_x]), torch.cat([y, more_y])
    return torch.arange(11), x, y, torch.arange(11) % 2


def formula(network, optimizer, x, y, tau):
    losses = F.cross_entropy(network(x), y, reduction="none")
    weights = torch.exp(losses.detach().clamp(max=tau) / (tau + 1))
    objective = (weights * losses).mean()
    optimizer.zero_grad()
    objective.backward()
    optimizer.step()
    return objective.item(), losses.mean().item(), weights


STEPS = 5


def close(expected):
    # Five steps, each of sums over at most 11 samples, 5 features and 3 classes.
    return pytest.approx(expected, rel=STEPS * 11 * 5 * 3 * EPS)


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_a_domainbed_algorithm_takes_the_steps_of_the_formula(tau):
    algorithm = domainbed(hparams={"rgd_tau": tau})
    twin = DomainBedERM((5,), 3, 2, HPARAMS)
    for step in range(STEPS):
        minibatches = domains(step)
        x, y = (torch.cat(parts) for parts in zip(*minibatches, strict=True))
        objective, mean, weights = formula(twin.network, twin.optimizer, x, y, tau)
        ess = (weights.sum().square() / weights.square().sum() / 11).item()
        assert algorithm.update(minibatches) == close({"loss": objective, "plain_loss": mean, "ess": ess})
    assert algorithm.network.weight.flatten().tolist() == close(twin.network.weight.flatten().tolist())


def test_a_subpopbench_algorithm_takes_the_steps_of_the_formula():
    algorithm = subpopbench()
    twin = SubpopBenchERM("tabular", (5,), 3, 2, 100, HPARAMS)
    for step in range(STEPS):
        _, x, y, _ = minibatch(step)
        objective, _, _ = formula(twin.network, twin.optimizer, x, y, 1.0)
        assert algorithm.update(minibatch(step), step) == close({"loss": objective})
    assert algorithm.network.weight.flatten().tolist() == close(twin.network.weight.flatten().tolist())


def test_with_plain_weights_both_are_the_suites_own_erm():
    algorithm, twin = domainbed(weighting=rgd.ERM()), DomainBedERM((5,), 3, 2, HPARAMS)
    other, other_twin = subpopbench(weighting=rgd.ERM()), SubpopBenchERM("tabular", (5,), 3, 2, 100, HPARAMS)
    for step in range(STEPS):
        assert algorithm.update(domains(step))["loss"] == close(twin.update(domains(step))["loss"])
        assert other.update(minibatch(step), step) == close(other_twin.update(minibatch(step), step))


def test_the_groups_are_domains_and_pairs_of_class_and_attribute():
    def make_weighting(self, hparams, groups):
        return rgd.GroupDRO(groups, step_size=0.5)

    algorithm, other = domainbed(make_weighting=make_weighting), subpopbench(make_weighting=make_weighting)
    minibatches = domains(0)
    x, y = (torch.cat(parts) for parts in zip(*minibatches, strict=True))
    losses = F.cross_entropy(algorithm.predict(x), y, reduction="none").detach()
    means = torch.stack([losses[:4].mean(), losses[4:].mean()])
    shares = torch.softmax(0.5 * means, 0)
    assert algorithm.update(minibatches)["loss"] == close((shares * means).sum().item())
    # The state is part of the algorithm, and so is saved and moved with it.
    state = algorithm.state_dict()
    (saved,) = [state[key] for key in state if "criterion" in key]
    assert saved.tolist() == close(shares.tolist())

    indices, x, y, attribute = minibatch(0)
    losses = F.cross_entropy(other.predict(x), y, reduction="none").detach()
    group = y * 2 + attribute
    means = torch.stack([losses[group == g].sum() / max((group == g).sum(), 1) for g in range(6)])
    shares = torch.softmax(0.5 * means, 0)
    assert other.update((indices, x, y, attribute), 0)["loss"] == close((shares * means).sum().item())


def test_validation_losses_are_plain_and_move_no_state():
    def make_weighting(self, hparams, groups):
        return rgd.GroupDRO(groups, step_size=0.5)

    algorithm, other = domainbed(make_weighting=make_weighting), subpopbench(make_weighting=make_weighting)
    algorithm.update(domains(0))
    other.update(minibatch(0), 0)
    state = [saved.criterion.state_dict() for saved in (algorithm, other)]
    before = [{name: value.tolist() for name, value in saved.items()} for saved in state]
    for training in (True, False):  # the suites only switch gradients off, or also the mode
        algorithm.train(training)
        other.train(training)
        with torch.no_grad():
            x, y = domains(1)[0]
            losses = algorithm.criterion(algorithm.predict(x), y, groups=torch.zeros_like(y))
            assert losses.item() == close(F.cross_entropy(algorithm.predict(x), y).item())
            batch = minibatch(1)
            loss = other._compute_loss(*batch, 1)
            assert loss.item() == close(F.cross_entropy(other.predict(batch[1]), batch[2]).item())
    after = [{name: value.tolist() for name, value in saved.items()} for saved in state]
    assert after == before


def test_a_plain_weighting_adds_nothing_to_a_checkpoint():
    assert domainbed().state_dict().keys() == DomainBedERM((5,), 3, 2, HPARAMS).state_dict().keys()


def test_a_weighting_and_a_tau_at_once_are_refused():
    with pytest.raises(ValueError, match="remove one of the two"):
        domainbed(weighting=rgd.CVaR(0.5), hparams={"rgd_tau": 1.0})


@pytest.mark.parametrize(
    ("title", "base", "names"),
    [
        ("DomainBed", DomainBedERM, ["RGD", "WorstTenth", "DomainDRO"]),
        ("SubpopBench", SubpopBenchERM, ["RGD", "WrongLabels"]),
    ],
)
def test_the_classes_of_the_page_train(title, base, names):
    page = (pathlib.Path(__file__).parents[2] / "docs" / "boosting.md").read_text(encoding="utf-8")
    (code,) = re.findall(rf"^## {title}$.*?^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    namespace = {"ERM": base, "__name__": "page"}
    exec(code, namespace)
    for name in names:
        if title == "DomainBed":
            algorithm = namespace[name]((5,), 3, 2, HPARAMS)
            losses = [algorithm.update(domains(0))["plain_loss"] for _ in range(10)]
        else:
            algorithm = namespace[name]("tabular", (5,), 3, 2, 100, HPARAMS)
            losses = [algorithm.update(minibatch(0), step)["loss"] for step in range(10)]
        assert losses[-1] < losses[0]
