"""The Rust kernel of the cross-entropy under JAX: equal to the jnp path, under every transformation.

The kernel's lanes run along long rows and across short ones: both are asked for, and a row count that fills
no block. Tolerances as in test_jax.py.
"""

import numpy as np
import pytest
import rgd
from rgd import reference

jax = pytest.importorskip("jax")
jnp = jax.numpy

import rgd.jax as rj  # noqa: E402
from rgd.jax import _ffi  # noqa: E402
from x64 import enable_x64  # noqa: E402

SHAPES = [(7, 5), (33, 101), (1, 3000), (2, 3, 64)]


def problem(shape, dtype="float32"):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(2 * rng.standard_normal(shape)).astype(dtype)
    labels = jnp.asarray(rng.integers(0, shape[-1], shape[:-1]))
    return logits, labels.at[(0,) * (len(shape) - 1)].set(-100) if labels.size > 1 else labels


def close(a, b, dtype, terms):
    """Sums of `terms` in the accumulator, then one rounding to the dtype (float16: at least a subnormal)."""
    accumulator = float(jnp.finfo(jnp.promote_types(dtype, jnp.float32)).eps)
    own = 0 if jnp.dtype(dtype).itemsize > 2 else float(jnp.finfo(dtype).eps)
    b = np.asarray(b, dtype=np.float64)
    floor = float(jnp.finfo(dtype).smallest_subnormal) if jnp.dtype(dtype) == jnp.float16 else 0
    scale = np.abs(b[np.isfinite(b)]).max(initial=0)
    tolerance = 10 * (terms + 16) * accumulator
    np.testing.assert_allclose(
        np.asarray(a, dtype=np.float64), b, rtol=tolerance + own, atol=tolerance * scale + floor
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "sum", "tau": 3.0}, {"label_smoothing": 0.2, "weighting": rgd.KL(scale=0.0)}],
    ids=str,
)
def test_kernel_gives_the_value_and_gradient_of_jnp_and_of_the_reference(shape, dtype, options):
    with enable_x64(dtype == "float64"):
        logits, labels = problem(shape, dtype)
        (value, gradient), (other_value, other_gradient) = (
            jax.jit(jax.value_and_grad(lambda z, w=which: rj.cross_entropy(z, labels, backend=w, **options)))(
                logits
            )
            for which in ("rust", "jnp")
        )
        assert gradient.dtype == dtype
        close(value, other_value, jnp.promote_types(dtype, jnp.float32), logits.size)
        close(gradient, other_gradient, dtype, shape[-1])
        wide = np.moveaxis(
            np.asarray(logits.astype(jnp.promote_types(dtype, jnp.float32)), np.float64), -1, 1
        )
        given = {"weighting": rgd.KL(options.get("tau", 1.0)), **options}
        given.pop("tau", None)
        expected = reference.cross_entropy_grad(wide, np.asarray(labels), **given)
        close(gradient, np.moveaxis(expected, 1, -1), dtype, logits.size)


@pytest.mark.parametrize("classes", [7, 300])
def test_rows_shared_among_threads_are_those_of_a_thread_alone(classes):
    """A part has 2^15 logits: the whole has many, of which threads take any, and a slice has one."""
    rows = (1 << 17) // classes
    logits, labels = problem((rows, classes))
    labels = labels.at[rows // 2].set(classes + 5)
    step = jax.jit(jax.value_and_grad(lambda z, y: rj.cross_entropy(z, y, reduction="sum", backend="rust")))
    value, gradient = step(logits, labels)
    assert jnp.isnan(value)
    own = (1 << 14) // classes
    for start in range(0, rows - own, own):
        part = slice(start, start + own)
        np.testing.assert_array_equal(gradient[part], step(logits[part], labels[part])[1])
    for _ in range(20):
        np.testing.assert_array_equal(step(logits, labels)[1], gradient)


@pytest.mark.parametrize("classes", [5, 101])
@pytest.mark.parametrize("wanted", [True, False])
def test_the_raw_call_takes_a_z_loss_of_each_row_and_gives_the_logsumexp(classes, wanted):
    _ffi.register()
    logits, labels = problem((2, 9, classes))
    codes = jnp.where(labels == -100, -1, labels).astype("int32")
    rng = np.random.default_rng(1)
    norm, adjustment = (
        jnp.asarray(rng.random((2, 9)), "float32"),
        jnp.asarray(rng.normal(size=classes), "float32"),
    )
    z = jnp.asarray(rng.choice([0.0, 0.3], (2, 9)), "float32")
    numbers = [jnp.full((2, 9), number, "float32") for number in (0.1, 1.0, 0.5, 0.0)]
    settings = jnp.stack([norm, numbers[0], z, *numbers[1:]], -1)
    row, rest = jax.ShapeDtypeStruct((2, 9), "float32"), jax.ShapeDtypeStruct(logits.shape, "float32")
    last = row if wanted else jax.ShapeDtypeStruct((2, 0), "float32")
    call = jax.ffi.ffi_call(_ffi.TARGET, (row, row, rest, last))
    losses, weights, gradient, logsumexp = call(logits, codes, settings, adjustment, kind="kl")
    weights = jnp.where(codes == -1, 0, weights)

    def objective(logits):
        parts = jax.nn.log_softmax(logits + adjustment)
        on_label = jnp.take_along_axis(parts, jnp.maximum(codes, 0)[..., None], -1)[..., 0]
        of_row = -(0.9 * on_label + 0.1 * parts.mean(-1))
        square = jax.scipy.special.logsumexp(logits + adjustment, axis=-1) ** 2
        return jnp.sum(jnp.where(codes == -1, 0, norm * (weights * of_row + z * square)))

    close(gradient, jax.grad(objective)(logits), "float32", classes)
    plain = call(logits, codes, settings.at[..., 2].set(0), adjustment, kind="kl")
    np.testing.assert_array_equal(losses, plain[0])
    np.testing.assert_array_equal(weights, plain[1])
    if wanted:
        expected = jnp.where(codes == -1, 0, jax.scipy.special.logsumexp(logits + adjustment, axis=-1))
        close(logsumexp, expected, "float32", classes)


def test_numbers_may_be_traced_and_vmapped():
    logits, labels = problem((4, 9, 65))
    taus = jnp.array([0.3, 1.0, 2.0, 5.0])

    def step(logits, labels, tau, backend):
        return jax.value_and_grad(rj.cross_entropy)(logits, labels, tau=tau, backend=backend)

    rust, plain = (
        jax.jit(jax.vmap(lambda *a, w=w: step(*a, w)))(logits, labels, taus) for w in ("rust", "jnp")
    )
    close(rust[0], plain[0], "float32", 65 * 9)
    close(rust[1], plain[1], "float32", 65)


def test_second_derivatives_and_forward_mode_are_those_of_jnp():
    with enable_x64(True):
        logits, labels = problem((3, 6), "float64")
        direction = jnp.cos(jnp.arange(18.0)).reshape(3, 6)
        results = []
        for which in ("rust", "jnp"):
            loss = lambda z, w=which: rj.cross_entropy(z, labels, label_smoothing=0.1, backend=w)  # noqa: E731
            results.append((jax.jvp(loss, (logits,), (direction,)), jax.jit(jax.hessian(loss))(logits)))
        jax.tree.map(lambda a, b: close(a, b, "float64", 18), *results)


def test_remat_and_scan_give_the_plain_gradient():
    logits, labels = problem((33, 101))
    loss = lambda z: rj.cross_entropy(z, labels, backend="rust")  # noqa: E731
    plain = jax.jit(jax.grad(loss))(logits)
    close(jax.jit(jax.grad(jax.checkpoint(loss)))(logits), plain, "float32", 101)
    scanned = jax.jit(jax.grad(lambda z: jax.lax.scan(lambda c, _: (c + loss(z), None), 0.0, length=2)[0]))(
        logits
    )
    close(scanned, 2 * plain, "float32", 101)


@pytest.mark.parametrize("weighting", [rgd.KL(scale=-0.7), rgd.ERM(), rgd.KL(tau=0.4)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 64)], ids=str)
def test_sample_weights_and_any_pointwise_kernel_give_what_jnp_gives(weighting, reduction, shape):
    logits, labels = problem(shape)
    mass = jnp.asarray(np.random.default_rng(1).integers(0, 3, shape[:1]))
    options = {"weighting": weighting, "reduction": reduction, "label_smoothing": 0.1, "sample_weight": mass}

    @jax.jit
    def both(logits):
        step = jax.value_and_grad(rj.cross_entropy)
        return [step(logits, labels, backend=backend, **options) for backend in ("rust", "jnp")]

    rust, plain = both(logits)
    close(rust[0], plain[0], "float32", logits.size)
    close(rust[1], plain[1], "float32", logits.size)
    np.testing.assert_array_equal(rust[1][mass == 0], 0)


def test_a_schedule_of_settings_compiles_once():
    logits, labels = problem((7, 64))
    step = jax.jit(lambda w: rj.cross_entropy(logits, labels, weighting=w, backend="rust"))
    for tau in (0.5, 1.0, 2.0):
        close(step(rgd.KL(tau)), rj.cross_entropy(logits, labels, tau=tau, backend="jnp"), "float32", 448)
    assert step._cache_size() == 1


@pytest.mark.parametrize("classes", [5, 64])
def test_label_out_of_range_makes_its_row_nan_under_jit(classes):
    logits, labels = problem((7, classes))
    labels = labels.at[3].set(classes)
    with pytest.raises(IndexError, match="out of range"):
        rj.cross_entropy(logits, labels, backend="rust")
    step = jax.jit(jax.value_and_grad(lambda z, y: rj.cross_entropy(z, y, backend="rust")))
    value, gradient = step(logits, labels)
    assert jnp.isnan(value)
    np.testing.assert_array_equal(
        np.isnan(gradient), np.broadcast_to(np.arange(7)[:, None] == 3, gradient.shape)
    )


@pytest.mark.parametrize("mask", ["ignore_index", "where"])
@pytest.mark.parametrize("classes", [5, 64])
def test_what_masked_logits_hold_reaches_no_result(classes, mask):
    logits, labels = problem((7, classes))
    counted = np.arange(7) != 3
    options = {"where": counted} if mask == "where" else {}
    labels = labels if mask == "where" else jnp.where(counted, labels, -100)
    step = jax.jit(jax.value_and_grad(lambda z: rj.cross_entropy(z, labels, backend="rust", **options)))
    expected = step(logits)
    for value, gradient in (step(logits.at[3].set(jnp.nan)), step(logits.at[3, 1].set(jnp.inf))):
        assert value == expected[0]
        np.testing.assert_array_equal(gradient, expected[1])
        np.testing.assert_array_equal(gradient[3], 0)


@pytest.mark.parametrize("rows", [0, 3])
def test_no_target_that_counts_gives_nan_and_a_gradient_of_zero(rows):
    step = jax.jit(jax.value_and_grad(lambda z, y: rj.cross_entropy(z, y, backend="rust")))
    value, gradient = step(jnp.ones((rows, 64)), jnp.full(rows, -100))
    assert jnp.isnan(value)
    np.testing.assert_array_equal(gradient, 0)


def test_gradient_takes_the_place_of_donated_logits():
    logits, labels = problem((64, 1000))
    step = jax.jit(jax.value_and_grad(lambda z, y: rj.cross_entropy(z, y, backend="rust")), donate_argnums=0)
    text = step.lower(logits, labels).compile().as_text()
    assert "rgd_cross_entropy" in text
    assert "input_output_alias" in text
    assert not [line for line in text.splitlines() if " copy(" in line and "f32[64,1000]" in line]
    given = logits + 0
    address = given.unsafe_buffer_pointer()
    _, gradient = step(given, labels)
    assert gradient.unsafe_buffer_pointer() == address
    close(gradient, jax.grad(rj.cross_entropy)(logits, labels), "float32", 1000)


def test_one_function_lowers_for_other_platforms_without_the_kernel():
    logits, labels = problem((33, 101))
    step = jax.jit(jax.value_and_grad(lambda z, y: rj.cross_entropy(z, y, backend="rust")))
    text = step.trace(logits, labels).lower(lowering_platforms=("cuda",)).as_text()
    assert "rgd_cross_entropy" not in text


@pytest.mark.parametrize("cores", [2, 64])
def test_kernel_is_chosen_by_size_and_refused_where_it_does_not_serve(monkeypatch, cores):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    small = problem((7, 5))
    large, few_classes, few_rows = (
        (jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:1], jnp.int32))
        for shape in ((128, 100), (4096, 99), (8, 1000))
    )
    step = jax.jit(jax.value_and_grad(rj.cross_entropy), static_argnames="backend")
    for other in (small, few_classes, few_rows):
        assert "rgd_cross_entropy" not in step.lower(*other).as_text()
    assert "rgd_cross_entropy" in step.lower(*large).as_text()
    assert "rgd_cross_entropy" not in step.lower(*large, backend="jnp").as_text()
    assert "rgd_cross_entropy" in step.lower(*small, backend="rust").as_text()
    for options, match in [
        ({"weighting": rgd.KLBall(0.1)}, "KLBall"),
        ({"weight": jnp.ones(5)}, "class weights"),
        ({"reduction": "none"}, "reduction"),
        ({"per": "sample"}, "per"),
        ({"axis": 0}, "axis=0"),
    ]:
        labels = small[1] if "axis" not in options else jnp.zeros(5, int)
        with pytest.raises(ValueError, match=match):
            rj.cross_entropy(small[0], labels, backend="rust", **options)
    with pytest.raises(ValueError, match="backend must be"):
        rj.cross_entropy(*small, backend="c++")
