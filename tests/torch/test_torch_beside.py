"""What a call is given beside its losses, over processes and under Inductor.

These are the losses of a reference model, the entropy of the logits, and sample weights.
"""

import math

import pytest
import rgd
import torch
import torch.distributed as dist
from family import label
from rgd.torch import LinearRGDLoss, RGDLoss, reweighted_mean
from torch import nn
from torch.nn import functional as F

B, T, D, C = 5, 3, 4, 6
EXCESS = rgd.Excess(rgd.CVaR(0.5))
POINTWISE = rgd.Excess(rgd.KL(math.inf, scale=1.0))
GATE = rgd.EntropyGate(rgd.CVaR(0.5))
BOTH = rgd.EntropyGate(rgd.Excess(rgd.KLBall(0.1)))


def given(rows=B, dtype=torch.float64):
    """Hidden states, targets, the losses of a reference model and sample weights."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, T, D, generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randint(C, (rows, T), generator=generator)
    target[0, 1] = -100
    reference = torch.rand(rows, T, generator=generator, dtype=torch.float64).to(dtype) * 2
    p = (torch.randint(0, 4, (rows,), generator=generator) / 2).to(dtype)
    return hidden, target, reference, p


def head(dtype=torch.float64):
    weight = torch.randn(C, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return nn.Parameter(2 * weight.to(dtype))


def losses_of(hidden, weight, target):
    return F.cross_entropy((hidden @ weight.T).movedim(-1, 1), target, reduction="none")


# --- over processes ---

requires_processes = pytest.mark.skipif(
    not dist.is_available(), reason="torch was built without torch.distributed"
)


def on_a_rank(rank, size, sizes, weighting, way):
    """The weights of a rank's part of the batch, and the gradient of the sum of its weighted losses."""
    per, linear = way
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    hidden, target, reference, p = (one[own] for one in given())
    weight = head()
    options = {"weighting": weighting, "per": per, "reduction": "sum"}
    beside = {"sample_weight": p if per == "sample" else p[:, None].expand(-1, T)}
    if "Excess" in str(weighting):
        beside["reference"] = reference
    if linear:
        criterion = LinearRGDLoss(linear_weight=weight, **options)
        criterion(hidden, target, **beside).backward()
    else:
        criterion = RGDLoss(**options)
        criterion((hidden @ weight.T).movedim(-1, 1), target, **beside).backward()
    return criterion.last_weights, weight.grad


@requires_processes
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
@pytest.mark.parametrize("per", ["element", "sample"])
@pytest.mark.parametrize("sizes", [[2, 3], [1, 4]], ids=str)
@pytest.mark.parametrize("weighting", [EXCESS, GATE, BOTH, POINTWISE], ids=label)
def test_the_weights_are_those_of_the_whole_batch(run, weighting, sizes, per, linear):
    weights, gradient = on_a_rank(0, 1, [B], weighting, (per, linear))
    assert weights.std() > 0.1
    outcomes = run(2, on_a_rank, sizes, weighting, (per, linear))
    # Sums of at most 15 numbers in another order; the search for the root of the ball ends within 1e-12.
    torch.testing.assert_close(torch.cat([one for one, _ in outcomes]), weights, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(sum(one for _, one in outcomes), gradient, rtol=1e-11, atol=1e-12)


def losses_on_a_rank(rank, size, sizes):
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    hidden, target, reference, p = (one[own] for one in given())
    losses = losses_of(hidden, head().detach(), target).requires_grad_()
    beside = {"reference": reference, "sample_weight": p, "where": target != -100}
    (reweighted_mean(losses, EXCESS, **beside) * (beside["where"] * p[:, None]).sum()).backward()
    return losses.grad


@requires_processes
def test_losses_of_ones_own_are_compared_over_processes(run):
    expected = losses_on_a_rank(0, 1, [B])
    assert expected.std() > 0.1
    found = torch.cat(run(2, losses_on_a_rank, [3, 2]))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


# --- under Inductor, the default of torch.compile ---


@pytest.mark.parametrize(
    ("weighting", "per", "linear"),
    [
        (POINTWISE, "element", False),
        (POINTWISE, "element", True),
        (BOTH, "element", False),
        (BOTH, "sample", True),
    ],
    ids=label,
)
def test_inductor_gives_what_eager_calls_give(weighting, per, linear):
    torch.compiler.reset()
    # In float32, as models are: sums of at most 15 products, each rounded in another order.
    hidden, target, reference, p = given(dtype=torch.float32)
    weight = head(torch.float32)
    options = {"weighting": weighting, "per": per, "returns": ("entropy",)}
    criterion = LinearRGDLoss(linear_weight=weight, **options) if linear else RGDLoss(**options)
    beside = {"reference": reference, "sample_weight": p}

    def objective(hidden, target, beside):
        if linear:
            return criterion(hidden, target, **beside)
        return criterion((hidden @ weight.T).movedim(-1, 1), target, **beside)

    found = []
    for function in (objective, torch.compile(objective, fullgraph=True)):
        weight.grad = None
        value = function(hidden, target, beside)
        value.backward()
        found.append([value.detach(), weight.grad, criterion.last_weights, criterion.extras["entropy"]])
    allowed = 64 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(*found, rtol=allowed, atol=allowed)


def test_inductor_reads_new_references_and_weights_at_each_step():
    torch.compiler.reset()
    criterion = RGDLoss(weighting=EXCESS)
    compiled = torch.compile(criterion, fullgraph=True)
    hidden, target, reference, p = given()
    logits = (hidden @ head().detach().T).movedim(-1, 1).requires_grad_()
    for step in range(3):
        beside = {"reference": reference * step, "sample_weight": p + step}
        expected = criterion(logits, target, **beside)
        torch.testing.assert_close(compiled(logits, target, **beside), expected, rtol=1e-12, atol=0)
