"""`tau=` and `scale=` are short for `weighting=rgd.KL(tau, scale=scale)` wherever both may be given."""

import numpy as np
import pytest
import rgd
import rgd.boosting

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
linear_model = pytest.importorskip("sklearn.linear_model")
jnp = jax.numpy

import rgd.jax  # noqa: E402
import rgd.optax  # noqa: E402
from rgd.sklearn import Reweighted  # noqa: E402

LOSSES = np.array([0.2, 0.9, 3.0], np.float32)
LOGITS = np.array([[0.1, 2.0], [1.0, -1.0], [0.3, 0.2]], np.float32)
LABELS = np.array([0, 0, 1])


def updated(make, **given):
    tx = make(**given)
    grads = jnp.eye(3)
    return tx.update(grads, tx.init(grads[0]), grads[0], losses=jnp.asarray(LOSSES))[0]


def boosted(make, labels=LABELS, margins=LOGITS[:, 0]):
    return lambda **given: make(**given)(labels, margins)


def fitted(**given):
    model = Reweighted(linear_model.LinearRegression(), rounds=1, tolerance=1e9, **given)
    return model.fit(LOGITS, LOSSES).predict(LOGITS), model._check_settings().effective_scale


CALLS = {
    "sample_weights": lambda **given: rgd.sample_weights(LOSSES, **given),
    "reweighted_mean": lambda **given: rgd.reweighted_mean(LOSSES, **given),
    "jax.sample_weights": lambda **given: rgd.jax.sample_weights(LOSSES, **given),
    "jax.reweighted_mean": lambda **given: rgd.jax.reweighted_mean(LOSSES, **given),
    "jax.value_and_grad": lambda **given: rgd.jax.value_and_grad(lambda a: a * LOSSES, **given)(1.5),
    "jax.cross_entropy": lambda **given: rgd.jax.cross_entropy(LOGITS, LABELS, **given),
    "jax.linear_cross_entropy": lambda **given: rgd.jax.linear_cross_entropy(
        LOGITS, np.eye(2, dtype=np.float32), LABELS, **given
    ),
    "optax.reweight": lambda **given: updated(rgd.optax.reweight, **given),
    "optax.rgd": lambda **given: updated(lambda **given: rgd.optax.rgd(optax.sgd(1.0), **given), **given),
    "boosting.logistic": boosted(rgd.boosting.logistic),
    "boosting.squared_error": boosted(rgd.boosting.squared_error),
    "boosting.softmax": boosted(lambda **given: rgd.boosting.softmax(2, **given), margins=LOGITS),
    "sklearn.Reweighted": fitted,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("given", [{"scale": -0.7}, {"scale": 0.6}, {"tau": 0.8, "scale": 0.6}], ids=str)
def test_scale_is_short_for_the_kl_weighting(call, given):
    short, whole, plain = call(**given), call(weighting=rgd.KL(**given)), call(weighting=rgd.KL())
    jax.tree.map(np.testing.assert_array_equal, short, whole)
    pairs = zip(jax.tree.leaves(short), jax.tree.leaves(plain), strict=True)
    assert not all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", ["tau", "scale"])
def test_a_short_form_beside_a_weighting_is_refused(call, name):
    with pytest.raises(ValueError, match=f"give {name} or weighting, not both"):
        call(weighting=rgd.ERM(), **{name: 1.0})


def test_a_traced_scale_gives_the_weights_of_a_number():
    weights = jax.jit(lambda scale: rgd.jax.sample_weights(LOSSES, scale=scale))
    for scale in (-0.7, 0.6):
        np.testing.assert_allclose(weights(scale), rgd.sample_weights(LOSSES, scale=scale), rtol=1e-6)


@pytest.mark.parametrize(
    "given",
    [{}, {"tau": 2.0}, {"tau": optax.linear_schedule(1.0, 2.0, 4)}],
    ids=["alone", "number", "schedule"],
)
def test_an_optax_schedule_of_the_scale_is_followed(given):
    scale = optax.linear_schedule(-1.0, 1.0, 4)
    tx = rgd.optax.reweight(scale=scale, **given)
    grads = jnp.eye(3)
    state = tx.init(grads[0])
    update = jax.jit(lambda state: tx.update(grads, state, losses=jnp.asarray(LOSSES)))
    for count in range(4):
        mean, state = update(state)
        tau = given.get("tau")
        now = {"tau": float(tau(count)) if callable(tau) else tau, "scale": float(scale(count))}
        expected = rgd.sample_weights(LOSSES, **now) / 3
        np.testing.assert_allclose(mean, expected, rtol=1e-6)
    assert update._cache_size() == 1
