"""Losses that are weighted already are refused where they would be weighted again, and only there."""

import copy
import functools

import pytest
import rgd
import torch
from rgd.torch import (
    RGD,
    LinearRGDLoss,
    RGDLoss,
    backend,
    cross_entropy,
    linear_cross_entropy,
    reweighted_mean,
    sample_weights,
)
from torch import nn
from torch.nn import functional as F

N, C, D = 6, 3, 4
WEIGHTINGS = [rgd.KL(1.0), rgd.CVaR(0.5), rgd.Focal(2.0)]
PLAIN = [rgd.ERM(), rgd.KL(scale=0.0)]
TARGET = torch.arange(N) % C


def cross_entropies(weighting):
    """Every way to weighted losses, of logits (N, C) or hidden states (N, D)."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(C, D, generator=generator)
    options = {"weighting": weighting, "reduction": "none"}
    base = nn.CrossEntropyLoss(reduction="none")
    linear = LinearRGDLoss(D, C, **options)

    def of_linear(call):
        # Hidden states stand behind the graph that the logits bring.
        return lambda x: call(F.pad(x, (0, D - C)), TARGET)

    return {
        "RGDLoss": lambda x: RGDLoss(**options)(x, TARGET),
        "by sample": lambda x: RGDLoss(per="sample", **options)(x, TARGET),
        "with a base": lambda x: RGDLoss(base=base, **options)(x, TARGET),
        "cross_entropy": lambda x: cross_entropy(x, TARGET, **options),
        "half precision": lambda x: cross_entropy(x.bfloat16(), TARGET, **options),
        "linear_cross_entropy": of_linear(lambda h, y: linear_cross_entropy(h, head, y, **options)),
        "LinearRGDLoss": of_linear(lambda h, y: linear(h.detach() if not h.requires_grad else h, y)),
    }


WAYS = list(cross_entropies(rgd.KL(1.0)))
RESHAPED = {
    "as it is": lambda losses: losses,
    "view": lambda losses: losses.view(2, -1),
    "transposed": lambda losses: losses.reshape(2, 3).t().unsqueeze(0),
    "another dtype": lambda losses: losses.double(),
    "selected": lambda losses: losses[losses > 0][1:],
    "indexed": lambda losses: losses[torch.tensor([0, 2])],
    "joined": lambda losses: torch.cat([torch.ones(2), losses.float()]),
    "stacked": lambda losses: torch.stack(list(losses)),
    "copied": lambda losses: losses.clone().squeeze(),
}


def logits():
    return torch.randn(N, C, generator=torch.Generator().manual_seed(1)).requires_grad_()


def optimizer(weighting):
    return RGD(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1), weighting)


USES = {
    "RGD.backward": lambda losses, w: optimizer(w).backward(losses, retain_graph=True),
    "RGD.objective": lambda losses, w: optimizer(w).objective(losses),
    "reweighted_mean": reweighted_mean,
    "sample_weights": sample_weights,
    "base": lambda losses, w: RGDLoss(base=lambda given: given, weighting=w)(losses),
}
uses = pytest.mark.parametrize("use", list(USES))
both_backends = pytest.mark.parametrize("name", ["rust", "composite"])


@both_backends
@uses
@pytest.mark.parametrize("way", WAYS)
def test_weighted_losses_are_refused_wherever_they_would_be_weighted_again(way, use, name):
    for weighting in WEIGHTINGS:
        with backend(name):
            losses = cross_entropies(weighting)[way](logits())
        with pytest.raises(ValueError, match=r'weighted already.* twice: give the plain .*reduction="none"'):
            USES[use](losses, rgd.KL(2.0))


@both_backends
@pytest.mark.parametrize("reshaped", list(RESHAPED))
def test_so_are_they_behind_a_reshape_or_a_selection(reshaped, name):
    for way in WAYS:
        with backend(name):
            losses = RESHAPED[reshaped](cross_entropies(rgd.KL(1.0))[way](logits()))
        with pytest.raises(ValueError, match="weighted already"):
            reweighted_mean(losses)


@both_backends
@pytest.mark.parametrize("use", [use for use in USES if use != "RGD.backward"])
def test_so_are_they_without_a_graph(use, name):
    for way in ("RGDLoss", "cross_entropy", "with a base"):
        with backend(name):
            losses = cross_entropies(rgd.KL(1.0))[way](logits().detach())
        with pytest.raises(ValueError, match="weighted already"):
            USES[use](losses, None)
    with pytest.raises(ValueError, match="weighted already"):
        torch.func.vmap(lambda x: reweighted_mean(cross_entropy(x, TARGET, reduction="none")))(logits()[None])


def test_a_base_that_weights_is_refused():
    inner = RGDLoss(reduction="none")
    for base in (
        functools.partial(cross_entropy, reduction="none"),
        lambda x, y: inner(x, target=y),
        nn.Sequential(nn.Identity(), _Applied(inner)),
    ):
        arguments = (logits(),) if isinstance(base, nn.Module) else (logits(), TARGET)
        with pytest.raises(ValueError, match="weighted already"):
            RGDLoss(base=base)(*arguments)
    with pytest.raises(ValueError, match="base is an RGDLoss already"):
        RGDLoss(base=torch.compile(inner))


class _Applied(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, x):
        return self.loss(x, TARGET)


def test_a_refused_call_changes_no_state():
    losses = cross_entropy(logits(), TARGET, reduction="none")
    remembers = optimizer(rgd.MovingAverage(rgd.KL(1.0), 0.9))
    before = copy.deepcopy(remembers.weighting_state.state_dict())
    with pytest.raises(ValueError, match="weighted already"):
        remembers.backward(losses)
    after = remembers.weighting_state.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


# --- no false alarm ---


@both_backends
@uses
@pytest.mark.parametrize("way", WAYS)
def test_weights_of_one_are_no_weights(way, use, name):
    for plain in PLAIN:
        with backend(name):
            USES[use](cross_entropies(plain)[way](logits()), rgd.KL(1.0))
            USES[use](cross_entropies(rgd.KL(1.0))[way](logits()), plain)


def test_what_is_computed_from_weighted_losses_may_be_weighted():
    x = logits()
    of_sequences = cross_entropy(x, TARGET, reduction="none").view(2, 3).mean(1)
    tasks = zip(x.split(2), TARGET.split(2), strict=True)
    of_tasks = torch.stack([cross_entropy(rows, labels) for rows, labels in tasks])
    for losses in (
        F.cross_entropy(x, TARGET, reduction="none"),
        of_sequences,
        of_tasks,
        cross_entropy(x, TARGET, reduction="none").detach(),
        cross_entropy(x, TARGET, reduction="none") * 0.5 + 1,
    ):
        assert reweighted_mean(losses).isfinite()
        assert optimizer(None).objective(losses).isfinite()
        assert RGDLoss(base=lambda given: given)(losses).isfinite()


def test_losses_of_an_evaluation_are_plain():
    criterion = RGDLoss(reduction="none").eval()
    with torch.no_grad():
        losses = criterion(logits(), TARGET)
    assert reweighted_mean(losses).isfinite()
    # Nor does an evaluation weight what is weighted.
    outer = RGDLoss(base=lambda given: given).eval()
    with torch.no_grad():
        outer(cross_entropy(logits(), TARGET, reduction="none"))


def test_a_compiled_step_is_left_alone():
    def step(x):
        return reweighted_mean(F.cross_entropy(x, TARGET, reduction="none"))

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logits()), step(logits()))
