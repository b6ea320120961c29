"""The backends that compute calls of `rgd.torch`. Each is a file or a folder; the registry chooses one."""

from rgd.torch.backends import (
    composite,
    rust,
    triton,
)
from rgd.torch.backends._registry import backend, register

__all__ = ["backend", "composite", "register", "rust", "triton"]

# The last one is asked first. Triton serves only calls that name it.
register(composite.Composite())
register(rust.Rust())
register(triton.Triton(), on_request=True)
