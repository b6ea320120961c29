"""`normalizer=` in `rgd`, `rgd.jax` and `rgd.reference`: the sum over it, in float64.

In float64 a tolerance is eps times the roundings of the sums over a row and the batch; exponents and roots
magnify them by at most 20 here.
"""

import math

import numpy as np
import pytest
import rgd
from rgd import reference

jax = pytest.importorskip("jax")
jnp = jax.numpy

import rgd.jax as rj  # noqa: E402
from x64 import enable_x64  # noqa: E402

ROWS, WIDTH, CLASSES, STEP = 9, 4, 6, 13.5
TOLERANCE = 20 * (ROWS + WIDTH + CLASSES + 16) * np.finfo(np.float64).eps
RNG = np.random.default_rng(0)
INPUTS, KERNEL = RNG.standard_normal((ROWS, WIDTH)), RNG.standard_normal((WIDTH, CLASSES))
LOGITS = INPUTS @ KERNEL
LABELS = RNG.integers(0, CLASSES, ROWS)
LABELS[2] = -100
MEASURE = np.array([1.0, 2.5, 3, 0, 1, 0.5, 1, 2, 1])
OPTIONS = [
    {},
    {"sample_weight": MEASURE, "z_loss": 0.03},
    {"weight": np.linspace(0.5, 2.0, CLASSES), "label_smoothing": 0.2},
    {"weighting": rgd.CVaR(0.4), "where": np.arange(ROWS) != 5},
    {"weighting": rgd.KLBall(0.2), "sample_weight": MEASURE},
    {"sample_weight": 1e290 * MEASURE},
]


@pytest.fixture(autouse=True)
def float64():
    with enable_x64(True):
        yield


def close(actual, expected):
    def one(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= TOLERANCE * np.linalg.norm(b)

    jax.tree.map(one, actual, expected)


def served(options):
    return not {"weight", "weighting"} & set(options)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
@pytest.mark.parametrize("backend", ["jnp", "rust"])
def test_the_mean_is_the_sum_over_the_normalizer(backend, options):
    if backend == "rust" and not served(options):
        pytest.skip("the kernel does not serve it")
    if np.max(options.get("sample_weight", 1)) > 1e9:
        options = {**options, "sample_weight": options["sample_weight"] / 1e290 * 1e150}

    def summed(z):
        return rj.cross_entropy(z, LABELS, reduction="sum", backend=backend, **options) / STEP

    def linear_sum(x, k):
        return rj.linear_cross_entropy(x, k, LABELS, reduction="sum", backend=backend, **options) / STEP

    expected = jax.value_and_grad(summed)(jnp.asarray(LOGITS))
    of_linear = jax.value_and_grad(linear_sum, (0, 1))(jnp.asarray(INPUTS), jnp.asarray(KERNEL))
    for given in (STEP, np.float64(STEP), jnp.asarray(STEP)):

        @jax.jit
        def mine(z, n):
            return rj.cross_entropy(z, LABELS, normalizer=n, backend=backend, **options)

        @jax.jit
        def linear(x, k, n):
            return rj.linear_cross_entropy(
                x, k, LABELS, normalizer=n, backend=backend, chunk_bytes=2 * 8 * CLASSES, **options
            )

        close(jax.value_and_grad(mine)(jnp.asarray(LOGITS), given), expected)
        close(jax.value_and_grad(linear, (0, 1))(jnp.asarray(INPUTS), jnp.asarray(KERNEL), given), of_linear)
        close(rj.cross_entropy(LOGITS, LABELS, normalizer=given, backend=backend, **options), expected[0])


@pytest.mark.parametrize("options", OPTIONS[:-1], ids=lambda options: "-".join(options) or "default")
def test_the_reference_says_the_same(options):
    given = {"weighting": rgd.KL(), **options}
    value, gradient = jax.value_and_grad(lambda z: rj.cross_entropy(z, LABELS, normalizer=STEP, **options))(
        jnp.asarray(LOGITS)
    )
    close(reference.cross_entropy(LOGITS, LABELS, normalizer=STEP, **given), value)
    close(reference.cross_entropy_grad(LOGITS, LABELS, normalizer=STEP, **given), gradient)


def test_unequal_micro_batches_add_up_to_one_big_batch():
    def step(z, labels, n):
        return rj.cross_entropy(z, labels, normalizer=n)

    total = np.sum(LABELS != -100)
    expected = jax.value_and_grad(rj.cross_entropy)(jnp.asarray(LOGITS), LABELS)
    parts = [slice(0, 7), slice(7, 9)]
    values, gradients = zip(
        *(jax.jit(jax.value_and_grad(step))(jnp.asarray(LOGITS[p]), LABELS[p], total) for p in parts),
        strict=True,
    )
    close((sum(values), jnp.concatenate(gradients)), expected)


def test_means_of_any_losses_take_it():
    losses = RNG.gamma(1.0, 1.5, ROWS)
    for options in ({}, {"sample_weight": MEASURE}, {"where": MEASURE > 0.7}, {"weighting": rgd.CVaR(0.3)}):
        own = options.get("where", np.ones(ROWS)) * options.get("sample_weight", 1)
        given = {"weighting": rgd.KL(), **options}
        expected = reference.reweighted_mean(losses, **given) * np.sum(own) / STEP
        close(reference.reweighted_mean(losses, normalizer=STEP, **given), expected)
        for normalizer in (STEP, np.asarray(STEP), np.float32(STEP)):
            close(rgd.reweighted_mean(losses, normalizer=normalizer, **options), expected)
            close(rj.reweighted_mean(losses, normalizer=normalizer, **options), expected)
    # What cannot be scaled, since the result depends on its size.
    huge = rgd.reweighted_mean(losses, sample_weight=1e200 * MEASURE, normalizer=1e200 * STEP)
    close(huge, rgd.reweighted_mean(losses, sample_weight=MEASURE, normalizer=STEP))
    huge = rj.reweighted_mean(losses, sample_weight=1e200 * MEASURE, normalizer=1e200 * STEP)
    close(huge, rgd.reweighted_mean(losses, sample_weight=MEASURE, normalizer=STEP))
    step = rj.value_and_grad(lambda x: x * losses)
    close(step(1.0, normalizer=STEP)[0], rj.reweighted_mean(losses, normalizer=STEP))


def test_a_traced_number_compiles_once_and_a_wrong_one_gives_nan():
    @jax.jit
    def step(n):
        return [
            rj.cross_entropy(LOGITS, LABELS, normalizer=n),
            rj.linear_cross_entropy(INPUTS, KERNEL, LABELS, normalizer=n),
            rj.reweighted_mean(np.ones(3), normalizer=n),
        ]

    assert not np.isnan(step(2.0)).any()
    assert np.isnan(step(-1.0)).all()
    assert np.isnan(step(0.0)).all()
    assert step._cache_size() == 1


@pytest.mark.parametrize("backend", ["jnp", "rust"])
def test_over_mapped_axes_it_is_that_of_the_whole_batch(backend):
    settings = {"normalizer": STEP, "weighting": rgd.KL() if backend == "rust" else rgd.CVaR(0.4)}

    def step(z, labels):
        return rj.cross_entropy(z, labels, axis_name="data", backend=backend, **settings)

    spread = jax.jit(jax.vmap(step, axis_name="data"))
    expected = rj.cross_entropy(LOGITS, LABELS, **settings)
    close(spread(LOGITS.reshape(3, 3, CLASSES), LABELS.reshape(3, 3)), np.full(3, expected))


@pytest.mark.parametrize(
    "call",
    [
        lambda n: rj.cross_entropy(LOGITS, LABELS, normalizer=n),
        lambda n: rj.linear_cross_entropy(INPUTS, KERNEL, LABELS, normalizer=n),
        lambda n: rj.reweighted_mean(np.ones(3), normalizer=n),
        lambda n: rgd.reweighted_mean(np.ones(3), normalizer=n),
    ],
    ids=["jax", "jax linear", "jax mean", "numpy"],
)
def test_what_is_no_normalizer_is_refused(call):
    for wrong in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="normalizer must be a positive number"):
            call(wrong)
    for wrong in (True, "3", np.ones(2), np.asarray(1j)):
        with pytest.raises(TypeError, match="normalizer must be a"):
            call(wrong)


def test_other_reductions_are_refused():
    for reduction in ("sum", "none"):
        with pytest.raises(ValueError, match="normalizer is what reduction='mean' divides by"):
            rj.cross_entropy(LOGITS, LABELS, normalizer=3.0, reduction=reduction)
        with pytest.raises(ValueError, match="normalizer must be a positive number, for 'mean'"):
            reference.cross_entropy(LOGITS, LABELS, normalizer=3.0, reduction=reduction)
    with pytest.raises(ValueError, match="normalizer must be a positive number"):
        reference.cross_entropy_grad(LOGITS, LABELS, normalizer=0.0)
