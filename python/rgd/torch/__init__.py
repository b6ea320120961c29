"""RGD for PyTorch: a drop-in for `nn.CrossEntropyLoss`, and re-weighting for any other per-sample loss."""

from rgd.torch.backends import backend
from rgd.torch.functional import cross_entropy, reweighted_mean, sample_weights, weight_stats
from rgd.torch.history import LossHistory
from rgd.torch.linear import LinearRGDLoss, linear_cross_entropy
from rgd.torch.loss import RGDLoss
from rgd.torch.normalizer import count_targets
from rgd.torch.optimizer import RGD
from rgd.torch.schedule import WeightingSchedule
from rgd.torch.segments import segments_of

__all__ = [
    "RGD",
    "LinearRGDLoss",
    "LossHistory",
    "RGDLoss",
    "WeightingSchedule",
    "backend",
    "count_targets",
    "cross_entropy",
    "linear_cross_entropy",
    "reweighted_mean",
    "sample_weights",
    "segments_of",
    "weight_stats",
]


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
