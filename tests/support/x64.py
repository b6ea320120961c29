"""`jax.enable_x64`, which JAX before 0.8 has under another name."""

import jax

if hasattr(jax, "enable_x64"):
    enable_x64 = jax.enable_x64
else:
    from jax.experimental import enable_x64

__all__ = ["enable_x64"]
