"""Losses and class weights of others, a few lines each from their papers, for rare classes and wrong labels.

All take outputs (M, B, C), targets (M, B) and the number of training samples of each class (M, C), and give
losses (M, B). `torch.nn.functional.cross_entropy` does the rest, so that rgd can weight them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(outputs: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy (M, B) of outputs (M, B, C)."""
    return F.cross_entropy(outputs.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)


def log_prior(counts: Tensor) -> Tensor:
    """Logarithm of the share of each class, (M, 1, C)."""
    return (counts / counts.sum(1, keepdim=True)).log().unsqueeze(1)


def logit_adjusted(outputs: Tensor, target: Tensor, counts: Tensor) -> Tensor:
    """Cross-entropy of `outputs + log prior`.

    Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 10 with temperature 1.
    The same loss is the balanced softmax of Ren et al., NeurIPS 2020, equation 3, which adds log counts:
    the two differ by a constant that the softmax takes out.
    """
    return cross_entropy(outputs + log_prior(counts), target)


def balanced_softmax(outputs: Tensor, target: Tensor, counts: Tensor) -> Tensor:
    """Softmax with each exponential multiplied by its class's count: Ren et al., NeurIPS 2020, equation 3."""
    return cross_entropy(outputs + counts.log().unsqueeze(1), target)


LARGEST_MARGIN, COSINE_SCALE = 0.5, 30.0


def ldam(cosines: Tensor, target: Tensor, counts: Tensor) -> Tensor:
    """Label-distribution-aware margins `C / n_j ** (1/4)`, the largest 0.5, on cosines times 30.

    Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss", NeurIPS 2019,
    equation 13, with the numbers of the authors' code. Without their deferred re-weighting.
    """
    margins = counts.pow(-0.25)
    margins = LARGEST_MARGIN * margins / margins.amax(1, keepdim=True)
    own = F.one_hot(target, cosines.shape[-1]) * margins.unsqueeze(1)
    return cross_entropy(COSINE_SCALE * (cosines - own), target)


def focal(outputs: Tensor, target: Tensor, counts: Tensor) -> Tensor:
    """`(1 - p)^2 * -log p`, differentiated through the factor: Lin et al., ICCV 2017, equation 4."""
    del counts
    losses = cross_entropy(outputs, target)
    return (1 - torch.exp(-losses)).square() * losses


EFFECTIVE_BETA = 0.999


def class_balanced(counts: Tensor) -> Tensor:
    """Class weights `(1 - beta) / (1 - beta ** n)`, beta 0.999, that sum to the number of classes.

    Cui et al., "Class-balanced loss based on effective number of samples", CVPR 2019, equation 9.
    """
    weights = (1 - EFFECTIVE_BETA) / (1 - EFFECTIVE_BETA**counts)
    return weights * counts.shape[1] / weights.sum(1, keepdim=True)


def inverse_frequency(counts: Tensor) -> Tensor:
    """Class weights in inverse proportion to the counts, which sum to the number of classes."""
    return counts.shape[1] / counts / (1 / counts).sum(1, keepdim=True)


@dataclasses.dataclass(frozen=True)
class Smoothed:
    """Cross-entropy against the label with probability `1 - amount + amount / C`, all others `amount / C`.

    Szegedy et al., "Rethinking the inception architecture", CVPR 2016, section 7; against wrong labels:
    Lukasik et al., "Does label smoothing mitigate label noise?", ICML 2020.
    """

    amount: float

    def __call__(self, outputs: Tensor, target: Tensor, counts: Tensor) -> Tensor:
        """Losses (M, B)."""
        del counts
        flat = F.cross_entropy(
            outputs.flatten(0, 1), target.flatten(), reduction="none", label_smoothing=self.amount
        )
        return flat.view(target.shape)


@dataclasses.dataclass(frozen=True)
class SymmetricCrossEntropy:
    """`alpha` times cross-entropy plus `beta` times `-A (1 - p)`, p the probability of the label, A = -4.

    Wang et al., "Symmetric cross entropy for robust learning with noisy labels", ICCV 2019, equation 7, whose
    reverse cross-entropy is `-A (1 - p)` where log 0 is taken as A. The numbers are theirs for CIFAR-10.
    """

    alpha: float = 0.1
    beta: float = 1.0
    log_zero: float = -4.0

    def __call__(self, outputs: Tensor, target: Tensor, counts: Tensor) -> Tensor:
        """Losses (M, B)."""
        del counts
        losses = cross_entropy(outputs, target)
        return self.alpha * losses - self.beta * self.log_zero * (1 - torch.exp(-losses))


@dataclasses.dataclass(frozen=True)
class EarlyLearning:
    """Cross-entropy plus `strength * log(1 - <p, t>)`, t the running mean of a sample's probabilities p.

    Liu et al., "Early-learning regularization prevents memorization of noisy labels", NeurIPS 2020, equations
    6 and 9, with their numbers for CIFAR-10; p is cut at 1e-4 as in their code.
    """

    strength: float = 3.0
    memory: float = 0.7

    def begin(self, models: int, samples: int, classes: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """A function of outputs (M, B, C), targets (M, B) and samples (M, B) that keeps t, (M, n, C)."""
        means = torch.zeros(models, samples, classes)

        def losses(outputs: Tensor, target: Tensor, index: Tensor) -> Tensor:
            p = outputs.softmax(-1).clamp(1e-4, 1 - 1e-4)
            now = p.detach() / p.detach().sum(-1, keepdim=True)
            rows = torch.arange(models)[:, None], index
            means[rows] = self.memory * means[rows] + (1 - self.memory) * now
            agreement = (means[rows] * p).sum(-1)
            return cross_entropy(outputs, target) + self.strength * (1 - agreement).log()

        return losses
