"""The old place of `rgd.torch.stats`, as `_weigher` is of `_plan`; it goes with the next release."""

from rgd.torch.stats import Advisor

__all__ = ["Advisor"]
