"""The old place of `rgd.torch._head`, as `_weigher` is of `_plan`; it goes with the next release."""

from rgd.torch._head import Chunking

__all__ = ["Chunking"]
