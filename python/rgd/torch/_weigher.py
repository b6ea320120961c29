"""The old place of `rgd.torch._plan`, from which an RGDLoss pickled by rgd 0.1.0 takes its parts.

It goes with the next release.
"""

from rgd.torch._plan import Plan, Weigher
from rgd.torch._state import WeightingState

__all__ = ["Plan", "Weigher", "WeightingState"]
