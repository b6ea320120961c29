"""The equations of the weightings as written, in float64 NumPy: the oracle of the tests.

This code is slow, and shares nothing with `rgd.weightings` but its classes, which are the keys of the
equations. Each equation is one function, to be compared with its paper by reading. With losses `l`, measure
`p` (ones, or `sample_weight`), `total` for a sum over the samples that take part and
`mean(x) = total(p * x) / total(p)`, the pointwise weights are

    w = ones(n)                                  # ERM
    w = exp(scale * minimum(l, tau))             # KL
    w = maximum(1 - exp(-l), 0) ** gamma         # Focal
    w = where(l <= max_loss, 1, 0)               # Threshold

and those that depend on the batch, most of them the solution of a worst case, are

    v = exp(scale * minimum(l, tau))             # KL with normalize=True
    w = v / mean(v)
    tau = (min(l) + max(l)) / 2                  # MidrangeKL: the same with this tau
    w = exp(l / gamma) / mean(exp(l / gamma))    # KLBall: gamma makes mean(w * log(w)) the radius
    w = maximum(l - eta, 0) / gamma              # ChiSquare: eta makes mean(w) one
    v = maximum(l - eta, 0)                      # ChiSquareBall: eta makes mean((w - 1) ** 2) / 2 the radius
    w = v / mean(v)
    w = share / alpha                            # CVaR: share of a sample in the worst alpha of the measure
    w = minimum(1 / alpha, exp((l - eta) / nu))  # CVaR with smoothing nu: eta makes mean(w) one
    w = kept * inner(l, p * kept)                # Trimmed: kept is 0 in the worst share, else 1
    w = inner(l - reference)                     # Excess
    w = inner(l) * entropy / log(C)              # EntropyGate, with the entropy of the logits of C classes
    u = decay * u + (1 - decay) * mean(inner(l)) # MovingAverage
    w = inner(l) / u
    q = q * exp(step_size * mean_losses)         # GroupDRO, the mean loss of each group
    q = q / sum(q)
    w = n * q[g] / n_g[g]

The objective is `total(p * w * l) / total(p)`, with the weights taken as constants. A weight of zero makes a
product zero, even if the loss is infinite; NaN stays NaN.

A new member needs one more function, registered with `equation`, or with `step` if it has a state:

    @equation.register(Softer)
    def softer(weighting, batch):
        return (1 + batch.losses) ** weighting.power

References:
    Kumar, Majmundar, Nagaraj, Suggala, "Stochastic Re-weighted Gradient Descent via Distributionally Robust
    Optimization", TMLR 2024, arXiv 2306.09222. Each member of `rgd.weightings` names its own source.
"""

from rgd.reference._cross_entropy import cross_entropy, cross_entropy_grad, cross_entropy_losses
from rgd.reference._equations import Batch, equation, log_equation, step
from rgd.reference._extras import cross_entropy_extras
from rgd.reference._stats import weight_stats
from rgd.reference._weights import reweighted_mean, sample_weights

__all__ = [
    "Batch",
    "cross_entropy",
    "cross_entropy_extras",
    "cross_entropy_grad",
    "cross_entropy_losses",
    "equation",
    "log_equation",
    "reweighted_mean",
    "sample_weights",
    "step",
    "weight_stats",
]
