"""What computes a call of `rgd.torch`: each file a backend, chosen by the registry."""

from rgd.torch.backends import (
    composite,  # the last resort, registered first
    rust,
)
from rgd.torch.backends._registry import backend

__all__ = ["backend", "composite", "rust"]
