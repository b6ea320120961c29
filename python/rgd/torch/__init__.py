"""RGD for PyTorch: a drop-in for `nn.CrossEntropyLoss`, and re-weighting for any other per-sample loss."""

from rgd.torch._backend import backend
from rgd.torch.functional import cross_entropy, reweighted_mean, sample_weights
from rgd.torch.loss import RGDLoss
from rgd.torch.optimizer import RGD
from rgd.weightings import KL, KLBall, Weighting

__all__ = [
    "KL",
    "RGD",
    "KLBall",
    "RGDLoss",
    "Weighting",
    "backend",
    "cross_entropy",
    "reweighted_mean",
    "sample_weights",
]
