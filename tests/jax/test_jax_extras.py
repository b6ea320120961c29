"""`returns=` in JAX: entropy, logsumexp and the first class of the logits, against `rgd.reference`."""

import numpy as np
import pytest
import rgd
import rgd.reference as oracle
from devices import outcomes_on_four_devices

jax = pytest.importorskip("jax")
jnp = jax.numpy

import rgd.jax as rj  # noqa: E402
from x64 import enable_x64  # noqa: E402

NAMES = ("entropy", "logsumexp", "correct")
C = 7


@pytest.fixture(autouse=True)
def _in_float64(compiled_in_a_hurry):
    with enable_x64(True):
        yield


def batch():
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((6, C)) * 3, rng.integers(0, C, 6)
    labels[0], labels[2] = logits[0].argmax(), -100
    # Of equal logits the first counts.
    logits[3:5], labels[3], labels[4] = 0.0, 0, 1
    return logits, labels


def assert_extras(found, expected):
    assert set(found) == set(NAMES)
    assert found["correct"].dtype == bool
    for name in NAMES:
        # Sums of 7 numbers up to 12 in float64.
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", ["jnp", "rust"])
def test_a_gradient_comes_with_extras_beside_it(backend):
    logits, labels = batch()
    adjustment, where = np.linspace(-1, 1, C), np.arange(6) != 5

    def loss(logits):
        options = {"logit_adjustment": adjustment, "where": where, "returns": NAMES, "backend": backend}
        return rj.cross_entropy(logits, labels, **options)

    (value, extras), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits)
    given = {"logit_adjustment": adjustment, "where": where}
    assert_extras(extras, oracle.cross_entropy_extras(logits, labels, **given))
    np.testing.assert_allclose(value, oracle.cross_entropy(logits, labels, **given), rtol=1e-13)
    expected = oracle.cross_entropy_grad(logits, labels, **given)
    np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-14)


def test_a_state_comes_beside_the_extras():
    logits, labels = batch()
    average = rgd.MovingAverage(rgd.KL(), 0.5)

    def loss(logits, returns):
        return rj.cross_entropy(logits, labels, weighting=average, state=average.init(), returns=returns)

    value, (extras, state) = loss(logits, NAMES)
    plain, after = loss(logits, ())
    assert value == plain
    jax.tree.map(np.testing.assert_array_equal, state, after)
    assert_extras(extras, oracle.cross_entropy_extras(logits, labels))


def test_class_probabilities_have_the_most_probable_class():
    logits, _ = batch()
    target = np.random.default_rng(1).dirichlet(np.ones(C), 6)
    _, extras = rj.cross_entropy(logits, target, returns=NAMES)
    assert_extras(extras, oracle.cross_entropy_extras(logits, target))


@pytest.mark.parametrize(
    "options",
    [{}, {"weighting": rgd.CVaR(0.5)}, {"reduction": "none"}, {"logit_softcap": 2.0}],
    ids=["one pass", "two passes", "elements", "capped"],
)
def test_a_linear_head_returns_what_its_logits_have(options):
    rng = np.random.default_rng(0)
    operands = rng.standard_normal((5, 4)), rng.standard_normal((4, C))
    labels = rng.integers(0, C, 5)
    labels[1] = -100

    def summed(operands, returns):
        result = rj.linear_cross_entropy(*operands, labels, returns=returns, chunk_bytes=120, **options)
        loss, extras = result if returns else (result, {})
        return jnp.sum(loss), extras

    value_and_grad = jax.jit(jax.value_and_grad(summed, has_aux=True), static_argnums=1)
    (value, extras), gradients = value_and_grad(operands, NAMES)
    (plain, _), others = value_and_grad(operands, ())
    np.testing.assert_allclose(value, plain, rtol=1e-14)
    for one, other in zip(gradients, others, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-14)
    logits = operands[0] @ operands[1]
    logits = 2 * np.tanh(logits / 2) if "logit_softcap" in options else logits
    assert_extras(extras, oracle.cross_entropy_extras(logits, labels))


def test_names_that_are_not_known_are_refused():
    logits, labels = batch()
    with pytest.raises(TypeError, match=r"give returns=\('entropy',\)"):
        rj.cross_entropy(logits, labels, returns="entropy")
    with pytest.raises(ValueError, match="out of 'entropy', 'logsumexp', 'correct'"):
        rj.linear_cross_entropy(logits, np.eye(C), labels, returns=("perplexity",))


PROGRAM = """
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec as P

import rgd, rgd.jax as rj

jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(0)
inputs, kernel = jnp.asarray(rng.standard_normal((8, 4))), rng.standard_normal((4, 6))
kernel[:, 5] = kernel[:, 1]  # equal logits on two devices: the first counts
kernel = jnp.asarray(kernel)
labels = jnp.asarray(rng.integers(0, 6, 8)).at[3].set(-100).at[4].set(5).at[5].set(1)
NAMES = ("entropy", "logsumexp", "correct")
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "classes"))
specs = (P("data"), P(None, "classes"), P("data"))
_, expected = rj.cross_entropy(inputs @ kernel, labels, returns=NAMES)

def extras(inputs, kernel, labels, **options):
    return rj.linear_cross_entropy(inputs, kernel, labels, axis_name="data", vocab_axis_name="classes",
                                   returns=NAMES, chunk_bytes=100, **options)[1]

def same(found):
    for name in NAMES:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-13, atol=1e-13)

def linear_head(**options):
    mapped = jax.shard_map(lambda *x: extras(*x, **options), mesh=mesh, in_specs=specs, out_specs=P("data"))
    same(jax.jit(mapped)(inputs, kernel, labels))

def rows():
    one = jax.shard_map(lambda x, y: rj.cross_entropy(x, y, axis_name="data", returns=NAMES)[1],
                        mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P("data"))
    same(one(inputs @ kernel, labels))

CHECKS = {"one pass": linear_head, "two passes": lambda: linear_head(weighting=rgd.CVaR(0.5)), "rows": rows}
"""


@pytest.fixture(scope="module")
def outcomes():
    return outcomes_on_four_devices(PROGRAM)


@pytest.mark.parametrize("check", ["one pass", "two passes", "rows"])
def test_extras_of_rows_and_classes_over_devices_are_those_of_one(outcomes, check):
    assert outcomes[check] == "equal", outcomes[check]
