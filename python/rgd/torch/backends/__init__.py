"""What computes a call of `rgd.torch`: each file or folder a backend, chosen by the registry."""

from rgd.torch.backends import (
    composite,
    rust,
    triton,
)
from rgd.torch.backends._registry import backend, register

__all__ = ["backend", "composite", "register", "rust", "triton"]

# The last one is asked first; Triton's programs only where they are asked for.
register(composite.Composite())
register(rust.Rust())
register(triton.Triton(), on_request=True)
