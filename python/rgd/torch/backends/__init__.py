"""What computes a call of `rgd.torch`: each file or folder a backend, chosen by the registry."""

from rgd.torch.backends import (
    composite,
    rust,
)
from rgd.torch.backends._registry import backend, register

__all__ = ["backend", "composite", "register", "rust"]

# The last one is asked first.
register(composite.Composite())
register(rust.Rust())
