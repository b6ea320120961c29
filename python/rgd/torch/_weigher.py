"""The old place of `rgd.torch._plan`, where a loss that rgd 0.1.0 pickled looks for its parts.

It goes with the next release.
"""

from rgd.torch._plan import Plan

__all__ = ["Plan"]
