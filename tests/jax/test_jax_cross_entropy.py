"""The cross-entropy of the JAX front, against the reference and transformed. Tolerances as in test_jax.py."""

import functools
import math

import numpy as np
import pytest
import rgd
from rgd import reference

jax = pytest.importorskip("jax")
jnp = jax.numpy

import jax.export  # noqa: E402
import rgd.jax as rj  # noqa: E402
from jax.test_util import check_grads  # noqa: E402
from jax_cases import CLASSES, DTYPES, ROWS, exact, rounding  # noqa: E402
from x64 import enable_x64  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")


@pytest.fixture(params=DTYPES)
def dtype(request):
    with enable_x64(request.param == "float64"):
        yield jnp.dtype(request.param)


def some_logits(dtype, shape=(ROWS, CLASSES), seed=0):
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(2 * rng.standard_normal(shape)).astype(dtype)
    return logits, jnp.asarray(rng.integers(0, shape[-1], shape[:-1]))


# Cross-entropy.


CASES = {
    "plain": {},
    "weight": {"weight": np.array([0.5, 1.0, 2.0, 0.25, 3.0])},
    "smoothing": {"label_smoothing": 0.2},
    "both": {"weight": np.array([0.5, 1.0, 2.0, 0.25, 3.0]), "label_smoothing": 0.3},
    "ignore": {"ignore_index": 2},
}


# Every option in every dtype with the default weighting; every weighting and reduction with all options.
COMBINATIONS = [
    *[(rgd.KL(), case, ("mean",), kind) for case in CASES for kind in ("indices", "probabilities")],
    *[
        (weighting, "both", ("mean", "sum", "none"), kind)
        for weighting in (rgd.KL(normalize=True), rgd.KLBall(0.3), rgd.KL(scale=0.0))
        for kind in ("indices", "probabilities")
    ],
]


COMBINATIONS.remove((rgd.KL(), "ignore", ("mean",), "probabilities"))  # refused: see below


@pytest.mark.parametrize(("weighting", "case", "reductions", "kind"), COMBINATIONS, ids=str)
def test_cross_entropy_equals_the_reference(weighting, case, reductions, kind, dtype):
    if case == "both" and dtype.itemsize == 2:
        pytest.skip("half precision differs in reading and writing alone: covered by the other options")
    options = dict(CASES[case], weighting=weighting)
    logits, labels = some_logits(dtype)
    if kind == "probabilities":
        labels = jax.nn.softmax(some_logits("float32", seed=3)[0]).astype(dtype)
        target = exact(labels)
    else:
        labels = labels.at[1].set(options.get("ignore_index", -100))
        target = np.asarray(labels)

    def total(logits, reduction):
        return rj.cross_entropy(logits, labels, reduction=reduction, **options).sum()

    results = jax.jit(lambda z: [jax.value_and_grad(total)(z, reduction) for reduction in reductions])(logits)
    # Losses and exponents reach 10 in size; a half-precision gradient is rounded once more, to its own dtype.
    tolerance = 10 * rounding(dtype)
    own = tolerance + float(jnp.finfo(dtype).eps)
    tiny = float(jnp.finfo(dtype).smallest_subnormal) if dtype == jnp.float16 else 0
    for reduction, (value, gradient) in zip(reductions, results, strict=True):
        assert gradient.dtype == dtype
        assert value.dtype == jnp.promote_types(dtype, jnp.float32)
        expected = reference.cross_entropy(exact(logits), target, reduction=reduction, **options)
        np.testing.assert_allclose(value, expected.sum(), rtol=tolerance)
        expected = reference.cross_entropy_grad(exact(logits), target, reduction=reduction, **options)
        np.testing.assert_allclose(
            exact(gradient), expected, rtol=own, atol=tolerance * np.abs(expected).max() + tiny
        )


@pytest.mark.parametrize("per", ["element", "sample"])
@pytest.mark.parametrize("weighting", [rgd.KL(), rgd.KLBall(0.3)], ids=str)
def test_cross_entropy_takes_any_layout_and_weights_elements_or_samples(per, weighting):
    logits, labels = some_logits("float32", (3, 4, 2, CLASSES))
    labels = labels.at[0].set(-100).at[1, 2].set(-100)
    options = {"per": per, "weighting": weighting}
    torch_layout = np.moveaxis(np.asarray(logits), -1, 1)
    expected = reference.cross_entropy(torch_layout, np.asarray(labels), **options)
    tolerance = 20 * rounding("float32", 120)
    np.testing.assert_allclose(rj.cross_entropy(logits, labels, **options), expected, rtol=tolerance)
    value, gradient = jax.value_and_grad(rj.cross_entropy)(
        jnp.asarray(torch_layout), labels, axis=1, **options
    )
    np.testing.assert_allclose(value, expected, rtol=tolerance)
    expected = reference.cross_entropy_grad(torch_layout, np.asarray(labels), **options)
    np.testing.assert_allclose(gradient, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def test_cross_entropy_of_one_example_is_vmapped_to_that_of_each():
    logits, labels = some_logits("float32")
    together = rj.cross_entropy(logits, labels, reduction="none")
    np.testing.assert_allclose(jax.vmap(rj.cross_entropy)(logits, labels), together, rtol=rounding("float32"))
    gradients = jax.vmap(jax.grad(rj.cross_entropy))(logits, labels)
    whole = jax.grad(lambda z: rj.cross_entropy(z, labels, reduction="sum"))(logits)
    np.testing.assert_allclose(gradients, whole, rtol=rounding("float32"), atol=rounding("float32"))


def test_cross_entropy_passes_check_grads_where_the_weights_are_constant():
    with enable_x64(True):
        logits, labels = some_logits("float64")
        labels = labels.at[2].set(-100)
        for options in ({}, {"weight": jnp.arange(1.0, 6.0), "label_smoothing": 0.1}):
            plain = functools.partial(rj.cross_entropy, labels=labels, weighting=rgd.ERM(), **options)
            check_grads(jax.jit(plain), (logits,), order=2, modes=("fwd", "rev"))
        weights = rj.sample_weights(
            rj.cross_entropy(logits, labels, weighting=rgd.KL(scale=0.0), reduction="none")
        )

        def composed(z):
            return (
                jnp.sum(weights * rj.cross_entropy(z, labels, weighting=rgd.KL(scale=0.0), reduction="none"))
                / 6
            )

        np.testing.assert_allclose(
            jax.grad(rj.cross_entropy)(logits, labels), jax.grad(composed)(logits), rtol=1e-12, atol=1e-15
        )


BAD_SETTINGS = [
    *((rgd.KL, "tau", value) for value in (-1.0, -0.5, 0.0, math.inf, math.nan)),
    *((rgd.KL, "scale", value) for value in (-math.inf, math.inf, math.nan)),
    *((rgd.KLBall, "radius", value) for value in (-1.0, math.nan)),
]


@pytest.mark.parametrize(("weighting", "name", "value"), BAD_SETTINGS)
def test_a_setting_that_is_not_allowed_raises_or_is_nan_where_traced(weighting, name, value):
    logits, labels = some_logits("float32")
    with pytest.raises(ValueError, match=name):
        weighting(**{name: value})

    def objective(z, number, backend):
        chosen = weighting(**{name: number})
        return rj.cross_entropy(z, labels, weighting=chosen, backend=backend)

    for backend in ("jnp", "rust") if weighting is rgd.KL else ("jnp",):
        compiled = jax.jit(jax.value_and_grad(objective), static_argnums=2)
        result, gradient = compiled(logits, value, backend)
        assert jnp.isnan(result)
        assert jnp.all(jnp.isnan(gradient))
    weights = jax.jit(lambda number: rj.sample_weights(jnp.arange(3.0), weighting(**{name: number})))(value)
    assert jnp.all(jnp.isnan(weights))


@pytest.mark.parametrize("label", [-1, CLASSES, 10**6])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": jnp.ones(CLASSES)}], ids=str)
def test_label_out_of_range_raises_or_is_nan_under_jit(label, options):
    logits, labels = some_logits("float32")
    labels = labels.at[3].set(label)
    with pytest.raises(IndexError, match=rf"label {label} at position \[3\] is out of range for 5 classes"):
        rj.cross_entropy(logits, labels, **options)
    losses = jax.jit(lambda z, y: rj.cross_entropy(z, y, reduction="none", **options))(logits, labels)
    value, gradient = jax.jit(jax.value_and_grad(lambda z, y: rj.cross_entropy(z, y, **options)))(
        logits, labels
    )
    assert jnp.isnan(value)
    np.testing.assert_array_equal(np.isnan(losses), np.arange(ROWS) == 3)
    np.testing.assert_array_equal(
        np.isnan(gradient), np.broadcast_to(np.arange(ROWS)[:, None] == 3, gradient.shape)
    )
    kept = jnp.arange(ROWS) != 3
    assert jnp.isfinite(rj.cross_entropy(logits, labels, where=kept, **options))


@pytest.mark.parametrize("label_dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int64])
def test_labels_may_be_of_any_integer_dtype(label_dtype):
    logits, labels = some_logits("float32")
    plain = rj.cross_entropy(logits, labels)
    narrow = np.asarray(labels).astype(label_dtype)
    np.testing.assert_array_equal(rj.cross_entropy(logits, narrow), plain)


def test_padding_that_holds_nan_reaches_nothing():
    logits, labels = some_logits("float32")
    nan_rows = logits.at[jnp.array([1, 4])].set(jnp.nan)
    keep = jnp.array([True, False, True, True, False, True, True])
    for options in ({"where": keep}, {"labels": jnp.where(keep, labels, -100)}):
        function = lambda z, o=options: rj.cross_entropy(z, **{"labels": labels, **o})  # noqa: E731
        value, gradient = jax.jit(jax.value_and_grad(function))(nan_rows)
        expected, rows = jax.value_and_grad(rj.cross_entropy)(logits[keep], labels[keep])
        np.testing.assert_allclose(value, expected, rtol=rounding("float32"))
        np.testing.assert_allclose(gradient[keep], rows, rtol=rounding("float32"), atol=rounding("float32"))
        np.testing.assert_array_equal(gradient[~keep], 0)


def test_extreme_logits_are_those_of_the_reference():
    logits = np.array([[1e4, -1e4, 0.0], [-np.inf, 0.0, 1.0], [1e30, 1e30, -1e30]])
    labels = np.array([1, 2, 0])
    value, gradient = jax.value_and_grad(rj.cross_entropy)(jnp.asarray(logits, jnp.float32), labels)
    np.testing.assert_allclose(value, reference.cross_entropy(logits, labels), rtol=rounding("float32"))
    expected = reference.cross_entropy_grad(logits, labels)
    np.testing.assert_allclose(gradient, expected, rtol=rounding("float32"), atol=rounding("float32"))


@pytest.mark.parametrize(
    ("reduction", "shape", "expected"),
    [("mean", (0, CLASSES), math.nan), ("sum", (0, CLASSES), 0.0), ("mean", (2, CLASSES), math.nan)],
)
def test_no_target_that_counts_gives_what_the_plain_loss_gives(reduction, shape, expected):
    labels = jnp.full(shape[:1], -100)
    np.testing.assert_equal(float(rj.cross_entropy(jnp.ones(shape), labels, reduction=reduction)), expected)


def test_cross_entropy_runs_under_scan_remat_donation_and_export():
    logits, labels = some_logits("float32")
    value = rj.cross_entropy(logits, labels)
    scanned = jax.lax.scan(
        lambda c, z: (c + rj.cross_entropy(z, labels), None), 0.0, jnp.stack([logits] * 2)
    )[0]
    np.testing.assert_allclose(scanned, 2 * value, rtol=rounding("float32"))
    gradient = jax.grad(rj.cross_entropy)(logits, labels)
    remat = jax.grad(jax.checkpoint(rj.cross_entropy))(logits, labels)
    np.testing.assert_allclose(remat, gradient, rtol=rounding("float32"), atol=rounding("float32"))
    donated = jax.jit(jax.grad(rj.cross_entropy), donate_argnums=0)(logits + 0, labels)
    np.testing.assert_allclose(donated, gradient, rtol=rounding("float32"), atol=rounding("float32"))
