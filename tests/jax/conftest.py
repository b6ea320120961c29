"""What the tests of the JAX front share."""

import pytest


@pytest.fixture
def compiled_in_a_hurry():
    """Most time goes into compiling: for tests that ask which numbers come out, not how fast.

    Programs with all optimisations are those of test_jax_rust.py and test_optax.py.
    """
    jax = pytest.importorskip("jax")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
