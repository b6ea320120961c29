"""The recipes of docs/language_models.md give the gradients of the papers that they come from."""

import math

import pytest
import rgd
import torch
import torch.nn.functional as F
from rgd.torch import LinearRGDLoss, WeightingSchedule, cross_entropy, reweighted_mean

EPS = torch.finfo(torch.float64).eps
N = 12


def margins_of(spread):
    noise = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (spread * noise).requires_grad_()


def gradient(objective, leaf):
    return torch.autograd.grad(objective, leaf, retain_graph=True)[0]


@pytest.mark.parametrize("robustness", [0.25, 1.0, 10.0])
@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_robust_dpo_has_the_gradient_of_its_paper(robustness, spread):
    """Wu et al. 2024, arXiv 2407.07880: `-beta' log mean(exp(h / beta'))` with `h` less the DPO loss."""
    margins = margins_of(spread)
    losses = -F.logsigmoid(margins)
    paper = -robustness * torch.log(torch.exp(-losses / robustness).mean())
    ours = reweighted_mean(losses, rgd.KL(scale=-1 / robustness, normalize=True))
    # Exponents move exponentials by themselves times eps; then sums of N terms.
    exponent = losses.max().item() / robustness
    expected = gradient(paper, margins)
    allowed = (2 * exponent + 2 * N + 16) * EPS * float(expected.abs().max())
    assert torch.allclose(gradient(ours, margins), expected, rtol=0, atol=allowed)


def test_a_large_robustness_is_dpo_itself():
    margins = margins_of(1.0)
    losses = -F.logsigmoid(margins)
    robust = gradient(reweighted_mean(losses, rgd.KL(scale=-1e-9, normalize=True)), margins)
    assert torch.allclose(robust, gradient(losses.mean(), margins), rtol=1e-7)


def test_dynamic_fine_tuning_weights_a_token_by_its_probability():
    """Wu et al. 2025, arXiv 2508.05629: `-sg(p) log p`."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(N, 5, dtype=torch.float64, generator=generator).requires_grad_()
    target = torch.randint(5, (N,), generator=generator)
    probability = logits.softmax(1).gather(1, target.unsqueeze(1)).squeeze(1)
    paper = -(probability.detach() * probability.log()).mean()
    ours = cross_entropy(logits, target, scale=-1.0)
    assert ours.item() == pytest.approx(paper.item(), rel=64 * EPS)
    assert torch.allclose(gradient(ours, logits), gradient(paper, logits), rtol=0, atol=64 * EPS)


def test_the_dial_of_dynamic_fine_tuning_begins_with_plain_training_and_ends_with_probabilities():
    steps, criterion = 10, LinearRGDLoss(3, 4, scale=0.0)
    dial = WeightingSchedule(criterion, lambda step: rgd.KL(scale=-min(1.0, 2 * step / steps)))
    scales = []
    for _ in range(steps):
        scales.append(criterion.scale)
        dial.step()
    assert scales == pytest.approx([0, -0.2, -0.4, -0.6, -0.8, -1, -1, -1, -1, -1])
    assert criterion.weighting == rgd.KL(math.inf, scale=-1.0)
