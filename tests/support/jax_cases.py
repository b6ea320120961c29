"""Losses, logits, weightings and tolerances for the tests of the JAX front."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
jnp = jax.numpy
DTYPES = ["float32", "bfloat16", "float16", "float64"]
ROWS, CLASSES = 7, 5


def rounding(dtype, terms=ROWS * CLASSES):
    """Relative error of `terms` roundings in the accumulator's dtype (half precision is widened, exactly)."""
    return (terms + 16) * float(jnp.finfo(jnp.promote_types(dtype, jnp.float32)).eps)


def exact(array):
    """The array's own values in float64."""
    return np.asarray(array.astype(jnp.float32) if array.dtype.itemsize < 4 else array, dtype=np.float64)
