"""What XLA makes of the loss in `jax.numpy`: no scatter anywhere, no gather on a GPU, few bytes."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from rgd.jax import _rows

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benches"))

import jax_bytes
from x64 import enable_x64

SHAPES = jax.ShapeDtypeStruct((8, 128), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)


@pytest.mark.parametrize("name", ["rgd.jax.cross_entropy", "the same with label smoothing"])
def test_a_step_has_no_scatter_and_for_a_gpu_no_gather(name):
    step = jax.jit(jax.value_and_grad(jax_bytes.LOSSES[name]))
    for platform in ("cpu", "cuda", "rocm", "tpu"):
        text = step.trace(*SHAPES).lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.exponential" in text
        assert "scatter" not in text
        assert ("gather" in text) == (platform == "cpu")


def test_a_step_accesses_fewer_bytes_than_a_mean_of_log_softmax():
    ours, plain = (
        jax_bytes.accessed(jax_bytes.compiled(jax.value_and_grad(jax_bytes.LOSSES[name]), jnp.float32))
        for name in ("rgd.jax.cross_entropy", "the mean of jax.nn.log_softmax")
    )
    logits = 4 * jax_bytes.ROWS * jax_bytes.CLASSES
    assert jax_bytes.FLOOR["training"] * logits <= ours <= 0.75 * plain


def test_the_entry_at_a_label_is_the_same_on_a_gpu_whatever_the_others_are():
    values = jnp.array([[-jnp.inf, 1.0, jnp.nan], [jnp.inf, -jnp.inf, 2.0], [0.5, jnp.nan, jnp.inf]])
    for labels in ([1, 2, 0], [0, 1, 2], [2, 0, 1]):
        index = jnp.array(labels)
        np.testing.assert_array_equal(_rows._summed(values, index), _rows._gathered(values, index))
        np.testing.assert_array_equal(_rows.at_label(values, index), _rows._gathered(values, index))


def test_the_entry_at_a_label_has_derivatives_of_both_modes():
    with enable_x64(True):
        values, index = jnp.arange(12.0).reshape(2, 2, 3), jnp.array([[0, 2], [1, 1]])
        check_grads(lambda x: _rows.at_label(x, index) ** 2, (values,), 2, ("fwd", "rev"))
