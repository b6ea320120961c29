"""`z_loss=` in `rgd.reference` and `rgd.jax`: the dense formula in float64, with weights of the losses alone.

Nine rows fill no chunk of two. In float64 a tolerance is eps times the roundings of the sums over a row and
the batch; exponents and roots magnify them by at most 20 here.
"""

import numpy as np
import pytest
import rgd
from rgd import reference

jax = pytest.importorskip("jax")
jnp = jax.numpy

import rgd.jax as rj  # noqa: E402
from x64 import enable_x64  # noqa: E402

ROWS, WIDTH, CLASSES = 9, 4, 6
Z_LOSS = 0.03
TOLERANCE = 20 * (ROWS + WIDTH + CLASSES + 16) * np.finfo(np.float64).eps
RNG = np.random.default_rng(0)
INPUTS, KERNEL, BIAS = (RNG.standard_normal(shape) for shape in ((ROWS, WIDTH), (WIDTH, CLASSES), CLASSES))
LABELS = RNG.integers(0, CLASSES, ROWS)
LABELS[2] = -100
MEASURE = np.array([1.0, 2.5, 3, 0, 1, 0.5, 1, 2, 1])
CLASS_WEIGHT, ADJUSTMENT = np.linspace(0.5, 2.0, CLASSES), np.linspace(-1.0, 1.0, CLASSES)
OPTIONS = [
    {},
    {"reduction": "sum", "tau": 0.4},
    {"reduction": "none", "label_smoothing": 0.2, "sample_weight": MEASURE},
    {"weight": CLASS_WEIGHT, "label_smoothing": 0.2, "sample_weight": MEASURE},
    {"weighting": rgd.CVaR(0.4), "logit_adjustment": ADJUSTMENT},
    {"weighting": rgd.KLBall(0.2), "where": np.arange(ROWS) != 5},
    {"scale": -0.7, "logit_adjustment": ADJUSTMENT, "sample_weight": MEASURE},
]


@pytest.fixture(autouse=True)
def float64():
    with enable_x64(True):
        yield


def dense(logits, labels, z_loss=Z_LOSS, *, logit_softcap=None, backend=None, **options):
    """What every call equals: the objective without a z-loss, and `p z Z^2` over the same divisor."""
    del backend
    if logit_softcap is not None:
        logits = logit_softcap * jnp.tanh(logits / logit_softcap)
    plain = rj.cross_entropy(logits, labels, backend="jnp", **options)
    adjusted = logits + options.get("logit_adjustment", 0)
    counted = np.asarray(options.get("where", True)) & (LABELS != -100 if labels.ndim == 1 else True)
    p = jnp.where(counted, options.get("sample_weight", jnp.ones(ROWS)), 0)
    normalizers = jax.scipy.special.logsumexp(adjusted, axis=-1)
    terms = jnp.where(counted, p * z_loss * jnp.where(counted, normalizers, 0) ** 2, 0)
    if options.get("reduction") == "none":
        return plain + terms
    own = options["weight"][np.maximum(LABELS, 0)] if "weight" in options and labels.ndim == 1 else 1
    divisor = 1 if options.get("reduction") == "sum" else jnp.sum(p * own)
    return plain + jnp.sum(terms) / divisor


def total(values):
    """One number in which every element has a factor of its own."""
    return jnp.sum(values * jnp.sin(1 + jnp.arange(values.size)).reshape(values.shape))


def close(actual, expected, tolerance=TOLERANCE):
    def one(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)

    jax.tree.map(one, actual, expected)


def with_gradient(function, *at):
    return jax.jit(jax.value_and_grad(lambda at: total(function(*at))))(at)


LOGITS = INPUTS @ KERNEL


@pytest.mark.parametrize("backend", ["jnp", "rust"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
def test_cross_entropy_is_the_dense_formula(options, backend):
    native = not {"weight", "weighting"} & set(options) and options.get("reduction") != "none"
    if backend == "rust" and not native:
        pytest.skip("the kernel does not serve it")
    logits = jnp.asarray(INPUTS @ KERNEL).at[2].set(jnp.nan)  # ignored
    actual = with_gradient(
        lambda z: rj.cross_entropy(z, LABELS, z_loss=Z_LOSS, backend=backend, **options), logits
    )
    close(actual, with_gradient(lambda z: dense(z, LABELS, **options), logits.at[2].set(0)))
    assert not np.any(actual[1][0][2])


@pytest.mark.parametrize("backend", ["jnp", "rust"])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
def test_linear_cross_entropy_is_the_dense_formula(options, softcap, backend):
    native = not {"weight", "weighting"} & set(options) and options.get("reduction") != "none"
    if backend == "rust" and not native:
        pytest.skip("the kernel does not serve it")
    options = {**options, "logit_softcap": softcap, "backend": backend}
    at = jnp.asarray(INPUTS).at[2].set(jnp.nan), jnp.asarray(KERNEL), jnp.asarray(BIAS)
    actual = with_gradient(
        lambda x, k, b: rj.linear_cross_entropy(
            x, k, LABELS, b, z_loss=Z_LOSS, chunk_bytes=2 * 8 * CLASSES, **options
        ),
        *at,
    )
    at = at[0].at[2].set(0), *at[1:]
    close(actual, with_gradient(lambda x, k, b: dense(x @ k + b, LABELS, **options), *at))


def test_class_probabilities_have_a_z_loss_too():
    target = jax.nn.softmax(jnp.asarray(RNG.standard_normal((ROWS, CLASSES))))
    options = {"sample_weight": MEASURE, "weight": CLASS_WEIGHT, "weighting": rgd.KL(0.4)}
    actual = with_gradient(lambda z: rj.cross_entropy(z, target, z_loss=Z_LOSS, **options), LOGITS)
    close(actual, with_gradient(lambda z: dense(z, target, **options), LOGITS))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
def test_the_reference_says_the_same(options):
    given = {**options, "weighting": options.get("weighting")}
    if given["weighting"] is None:
        given["weighting"] = rgd.KL(given.get("tau"), scale=given.get("scale"))
    given = {name: value for name, value in given.items() if name not in ("tau", "scale")}
    value, gradient = jax.value_and_grad(lambda z: jnp.sum(dense(z, LABELS, **options)))(LOGITS)
    close(np.sum(reference.cross_entropy(LOGITS, LABELS, z_loss=Z_LOSS, **given)), value)
    close(reference.cross_entropy_grad(LOGITS, LABELS, z_loss=Z_LOSS, **given), gradient)


@pytest.mark.parametrize("backend", ["jnp", "rust"])
def test_a_traced_z_loss_compiles_once_and_may_be_zero(backend):
    @jax.jit
    def step(z_loss):
        return [
            rj.cross_entropy(LOGITS, LABELS, z_loss=z_loss, backend=backend),
            rj.linear_cross_entropy(INPUTS, KERNEL, LABELS, z_loss=z_loss, backend=backend),
        ]

    for z_loss in (0.0, 0.1, 2.0):
        close(step(z_loss), [dense(LOGITS, LABELS, z_loss)] * 2)
    assert step._cache_size() == 1
    assert all(np.isnan(one) for one in step(-1.0))


@pytest.mark.parametrize("backend", ["jnp", "rust"])
def test_second_derivatives_are_those_of_the_dense_formula(backend):
    hessian = jax.jit(jax.hessian(lambda z: rj.cross_entropy(z, LABELS, z_loss=Z_LOSS, backend=backend)))
    close(hessian(LOGITS), jax.hessian(lambda z: dense(z, LABELS))(LOGITS), 10 * TOLERANCE)


@pytest.mark.parametrize(
    "call", [rj.cross_entropy, lambda *a, **k: rj.linear_cross_entropy(INPUTS, KERNEL, *a[1:], **k)]
)
def test_what_is_no_factor_is_refused(call):
    for wrong in (-1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="z_loss must be a finite number >= 0"):
            call(LOGITS, LABELS, z_loss=wrong)
    for wrong in (True, "1e-4", None, np.ones(2), 1j):
        with pytest.raises(TypeError, match="z_loss must be a number >= 0"):
            call(LOGITS, LABELS, z_loss=wrong)
    with pytest.raises(ValueError, match="z_loss must be a finite number >= 0"):
        reference.cross_entropy(LOGITS, LABELS, z_loss=-1.0)


def test_an_integer_factor_of_numpy_or_jax_is_taken():
    expected = dense(LOGITS, LABELS, 1.0)
    for one in (1, np.float32(1), np.int64(1), jnp.ones(())):
        close(rj.cross_entropy(LOGITS, LABELS, z_loss=one), expected)
