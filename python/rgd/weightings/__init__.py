"""The weightings, which turn the losses of a batch into weights. Each member has its own file.

Each is a small frozen dataclass that checks its own numbers and holds one formula. Every front (NumPy, torch,
JAX) takes them. Import them from `rgd`, as `rgd.KL`.
"""

from rgd.weightings._base import Weighting, setting
from rgd.weightings._batch import Batch
from rgd.weightings.chi_square import ChiSquare, ChiSquareBall
from rgd.weightings.cvar import CVaR
from rgd.weightings.entropy_gate import EntropyGate
from rgd.weightings.erm import ERM
from rgd.weightings.excess import Excess
from rgd.weightings.focal import Focal
from rgd.weightings.group_dro import GroupDRO
from rgd.weightings.kl import KL
from rgd.weightings.kl_ball import KLBall
from rgd.weightings.midrange_kl import MidrangeKL
from rgd.weightings.moving_average import MovingAverage
from rgd.weightings.pointwise import Pointwise
from rgd.weightings.threshold import Threshold
from rgd.weightings.trimmed import Trimmed

__all__ = [
    "ERM",
    "KL",
    "Batch",
    "CVaR",
    "ChiSquare",
    "ChiSquareBall",
    "EntropyGate",
    "Excess",
    "Focal",
    "GroupDRO",
    "KLBall",
    "MidrangeKL",
    "MovingAverage",
    "Pointwise",
    "Threshold",
    "Trimmed",
    "Weighting",
    "setting",
]
