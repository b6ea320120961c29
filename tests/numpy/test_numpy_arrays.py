"""What the NumPy front reads: shapes, strides, dtypes, memory, and arrays of other libraries."""

import math
import sys
import tracemalloc

import numpy as np
import pytest
import rgd
from hypothesis import given
from hypothesis import strategies as st
from numpy_losses import DTYPES, WEIGHTINGS, assert_same_bits, weight_dtype
from rgd import reference

# Memory: shapes, strides, dtypes, who owns what.


@st.composite
def views(draw):
    """Float arrays that are views: steps of either sign, zero strides, swapped axes, byte offsets."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    offset = draw(st.integers(0, 3))
    steps = [draw(st.sampled_from([1, 2, 3, -1, -2])) for _ in shape]
    base_shape = [max(abs(step) * length, 1) for step, length in zip(steps, shape, strict=True)]
    count = math.prod(base_shape)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    memory = rng.normal(scale=4, size=offset + count).astype(dtype).tobytes()
    array = np.frombuffer(memory, dtype, count, offset * dtype.itemsize).reshape(base_shape)
    array = array[tuple(slice(None, None, step) for step in steps)]
    array = array[tuple(slice(0, length) for length in shape)]
    if draw(st.booleans()):
        array = array[..., None]
    if draw(st.booleans()):
        array = np.broadcast_to(array, (draw(st.integers(1, 4)), *array.shape))
    return array.transpose(draw(st.permutations(range(array.ndim))))


@pytest.mark.parametrize("weighting", [rgd.KL(1.0), rgd.KL(2.0, normalize=True), rgd.KLBall(0.2)], ids=str)
@given(losses=views())
def test_a_view_has_the_weights_of_its_copy_bit_for_bit(weighting, losses):
    weights = rgd.sample_weights(losses, weighting)
    assert type(weights) is np.ndarray
    assert_same_bits(weights, rgd.sample_weights(np.ascontiguousarray(losses), weighting))


@pytest.mark.parametrize("weighting", [rgd.KL(1.0), rgd.KL(2.0, normalize=True), rgd.KLBall(0.2)], ids=str)
@given(losses=views())
def test_the_mean_and_the_statistics_of_a_view_are_those_of_the_reference(weighting, losses):
    wide = losses.astype(np.float64)
    mean = rgd.reweighted_mean(losses, weighting)
    weights = rgd.sample_weights(losses, weighting)
    stats = rgd.weight_stats(losses, weights, weighting)
    if not losses.size:
        assert math.isnan(mean)
        assert stats.count == 0
        return
    expected = reference.weight_stats(wide, weights, weighting)
    # Products in float64 and their sums: each side is off by at most size * eps of the sum of magnitudes.
    relative = 2 * losses.size * np.finfo(float).eps
    magnitude = float(np.mean(np.abs(wide) * weights))
    assert mean == pytest.approx(expected.objective, abs=2 * relative * magnitude)
    assert stats.objective == pytest.approx(expected.objective, abs=relative * magnitude)
    assert stats.mean_loss == pytest.approx(expected.mean_loss, abs=relative * float(np.mean(np.abs(wide))))
    assert stats.effective_sample_size == pytest.approx(expected.effective_sample_size, rel=3 * relative)
    assert stats.kl_to_uniform == pytest.approx(expected.kl_to_uniform, abs=2 * relative * 50)
    assert stats.max_weight == expected.max_weight
    assert stats.clipped_share == expected.clipped_share
    assert stats.count == expected.count


@pytest.mark.parametrize("shape", [(1,), (7,), (0,), (3, 4), (2, 0, 5), (1, 1, 1), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize(("dtype", "result"), [("f8", "f8"), ("f4", "f4"), ("f2", "f4")])
def test_weights_have_the_losses_shape_and_at_least_single_precision(shape, dtype, result):
    weights = rgd.sample_weights(np.ones(shape, dtype), rgd.KLBall(0.1))
    assert weights.shape == shape
    assert weights.dtype == result
    assert weights.flags.writeable
    assert weights.flags.c_contiguous


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_half_precision_losses_have_the_weights_of_the_same_numbers_in_single(weighting):
    losses = np.random.default_rng(0).normal(scale=3, size=300).astype(np.float16)
    assert_same_bits(
        rgd.sample_weights(losses, weighting), rgd.sample_weights(losses.astype(np.float32), weighting)
    )


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_bfloat16_losses_have_the_weights_of_the_same_numbers_in_single(weighting):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    losses = np.random.default_rng(0).normal(scale=3, size=300).astype(ml_dtypes.bfloat16)
    assert_same_bits(
        rgd.sample_weights(losses, weighting), rgd.sample_weights(losses.astype(np.float32), weighting)
    )
    assert rgd.reweighted_mean(losses, weighting) == rgd.reweighted_mean(losses.astype(np.float32), weighting)


@given(losses=views())
def test_losses_are_read_only_and_not_written_to(losses):
    kept = losses.copy()
    losses.flags.writeable = False
    rgd.sample_weights(losses)
    rgd.reweighted_mean(losses)
    np.testing.assert_array_equal(losses, kept)


@pytest.mark.parametrize("step", [1, -2])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16], ids=lambda dtype: dtype.__name__)
def test_losses_are_not_copied(step, dtype):
    losses = np.ones(1 << 20, dtype)[::step]
    output = losses.size * np.dtype(weight_dtype(dtype)).itemsize
    rgd.reweighted_mean(losses)
    tracemalloc.start()
    try:
        rgd.reweighted_mean(losses)
        rgd.sample_weights(losses)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert output <= peak < output + 100_000


def test_the_memory_of_losses_is_let_go():
    class Owner(np.ndarray):
        pass

    losses = np.ones(100).view(Owner)
    before = sys.getrefcount(losses)
    for _ in range(100):
        rgd.sample_weights(losses)
        rgd.reweighted_mean(losses)
    assert sys.getrefcount(losses) == before


# Other libraries' arrays.


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_a_torch_tensor_gives_a_torch_tensor(dtype, weighting):
    torch = pytest.importorskip("torch")
    losses = torch.linspace(-2, 5, 60, dtype=getattr(torch, dtype)).reshape(3, 4, 5)
    weights = rgd.sample_weights(losses, weighting)
    assert type(weights) is torch.Tensor
    wide = losses if dtype in ("float64", "float32") else losses.float()
    assert weights.dtype == wide.dtype
    assert_same_bits(weights.numpy(), rgd.sample_weights(wide.numpy(), weighting))
    assert rgd.reweighted_mean(losses, weighting) == rgd.reweighted_mean(wide.numpy(), weighting)
    assert rgd.weight_stats(losses, weights, weighting) == rgd.weight_stats(
        wide.numpy(), weights.numpy(), weighting
    )


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_views_of_torch_tensors_are_read_in_place(dtype):
    torch = pytest.importorskip("torch")
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    for view in [
        base.T,
        base[1:, ::3],
        base[2],
        base[:, :1],
        base[:0],
        base[0, :1].expand(5, 1),
        base[None, :, 2],
    ]:
        assert_same_bits(rgd.sample_weights(view).numpy(), rgd.sample_weights(view.clone()).numpy())


def test_a_parameter_without_gradient_and_an_inference_tensor_are_read():
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    with torch.inference_mode():
        inference = torch.ones(3)
    for losses in (parameter, inference):
        assert type(rgd.sample_weights(losses)) is torch.Tensor


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("weighting", [rgd.KL(), rgd.KLBall(0.1)], ids=str)
def test_a_jax_array_gives_a_jax_array(dtype, weighting):
    jax = pytest.importorskip("jax")
    losses = jax.numpy.linspace(-2, 5, 60, dtype=dtype).reshape(3, 20)
    weights = rgd.sample_weights(losses, weighting)
    assert isinstance(weights, jax.Array)
    assert weights.dtype == "float32"
    wide = np.asarray(losses, dtype=np.float32)
    assert_same_bits(np.asarray(weights), rgd.sample_weights(wide, weighting))
    assert rgd.reweighted_mean(losses, weighting) == rgd.reweighted_mean(wide, weighting)
