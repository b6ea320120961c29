"""The optax transformations against the update composed by hand, inside and around optax's own wrappers."""

import numpy as np
import pytest
import rgd

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jnp = jax.numpy

import rgd.jax  # noqa: E402
import rgd.optax  # noqa: E402

BATCH = 6


def loss(params, x, y):
    return jnp.square(jnp.dot(params["w"], x) + params["b"] - y)


per_example = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0, 0))


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.standard_normal((BATCH, 3))), jnp.asarray(rng.standard_normal(BATCH))
    return {"w": jnp.array([0.3, -0.2, 0.1]), "b": jnp.array(0.5)}, x, y


def assert_close(a, b, rtol=1e-5):
    # sums of six products in float32, once through each of two programs
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=rtol, atol=rtol * 0.1), a, b)


def mean_gradient(problem, **options):
    params, x, y = problem
    return jax.grad(lambda p: rgd.jax.reweighted_mean(jax.vmap(loss, (None, 0, 0))(p, x, y), **options))(
        params
    )


def one_update(tx, problem, state=None, **extra):
    losses, grads = per_example(*problem)
    state = tx.init(problem[0]) if state is None else state
    return jax.jit(tx.update)(grads, state, problem[0], losses=losses, **extra)


@pytest.mark.parametrize(
    "options",
    [{"tau": 0.5}, {"weighting": rgd.KL(normalize=True)}, {"weighting": rgd.KLBall(0.3)}, {}],
    ids=str,
)
def test_update_is_the_inner_update_of_the_reweighted_mean_gradient(problem, options):
    inner = optax.adamw(1e-2)
    updates, state = one_update(rgd.optax.rgd(inner, **options), problem)
    expected, _ = inner.update(mean_gradient(problem, **options), inner.init(problem[0]), problem[0])
    assert_close(updates, expected)
    assert state.count == 1
    chained, _ = one_update(optax.chain(rgd.optax.reweight(**options), inner), problem)
    assert_close(chained, expected)


def test_masked_examples_take_no_part(problem):
    params, x, y = problem
    where = jnp.array([True, True, False, True, False, True])
    broken = (params, x.at[2].set(jnp.nan), y.at[4].set(jnp.inf))
    updates, _ = one_update(rgd.optax.rgd(optax.sgd(1.0)), broken, where=where)
    expected = mean_gradient((params, x[where], y[where]))
    assert_close(updates, jax.tree.map(jnp.negative, expected))


def test_tau_may_be_a_schedule_of_the_step_count(problem):
    schedule = optax.linear_schedule(0.5, 2.0, 3)
    tx = rgd.optax.rgd(optax.sgd(1.0), tau=schedule)
    state = tx.init(problem[0])
    for step in range(4):
        updates, state = one_update(tx, problem, state)
        assert_close(updates, jax.tree.map(jnp.negative, mean_gradient(problem, tau=schedule(step))))
    assert state.count == 4
    assert state.count.dtype == jnp.int32


def test_a_weighting_may_be_a_schedule_of_the_step_count(problem):
    schedule = lambda count: rgd.CVaR(alpha=1.0 / (1 + count))  # noqa: E731
    tx = rgd.optax.rgd(optax.sgd(1.0), schedule)
    losses, grads = per_example(*problem)
    state, update = tx.init(problem[0]), jax.jit(tx.update)
    for step in range(3):
        updates, state = update(grads, state, problem[0], losses=losses)
        assert_close(updates, jax.tree.map(jnp.negative, mean_gradient(problem, weighting=schedule(step))))
    assert update._cache_size() == 1


@pytest.mark.parametrize(
    "weighting", [rgd.GroupDRO(groups=2, step_size=0.5), rgd.MovingAverage(rgd.KL(), 0.9)], ids=str
)
def test_what_a_weighting_remembers_is_part_of_the_state(problem, weighting):
    params, x, y = problem
    groups = jnp.arange(BATCH) % 2
    tx = rgd.optax.rgd(optax.sgd(1.0), weighting)
    losses, grads = per_example(*problem)
    state, update, remembered = tx.init(params), jax.jit(tx.update), weighting.init()
    for _ in range(3):
        # Restored from a checkpoint: a pytree like any other.
        leaves, structure = jax.tree.flatten(state)
        state = jax.tree.unflatten(structure, [np.asarray(leaf) for leaf in leaves])
        updates, state = update(grads, state, params, losses=losses, groups=groups)
        step = rgd.jax.value_and_grad(jax.vmap(loss, (None, 0, 0)), weighting=weighting)
        (_, expected), remembered = step(params, x, y, groups=groups, state=remembered)
        assert_close(updates, jax.tree.map(jnp.negative, expected))
        assert_close(state.weighting_state, remembered)
    assert update._cache_size() == 1
    chained = optax.chain(rgd.optax.reweight(weighting), optax.sgd(1.0))
    _, after = chained.update(grads, chained.init(params), params, losses=losses, groups=groups)
    assert after[0].weighting_state.keys() == weighting.init().keys()


def test_an_integer_sample_weight_equals_repeated_examples(problem):
    params, x, y = problem
    mass = jnp.array([1, 0, 2, 3, 1, 0])
    updates, _ = one_update(rgd.optax.rgd(optax.sgd(1.0), rgd.CVaR(0.4)), problem, sample_weight=mass)
    repeated = params, jnp.repeat(x, mass, axis=0), jnp.repeat(y, mass)
    assert_close(updates, one_update(rgd.optax.rgd(optax.sgd(1.0), rgd.CVaR(0.4)), repeated)[0])


def test_an_example_of_weight_zero_may_hold_an_infinite_gradient(problem):
    losses, grads = per_example(*problem)
    tx = rgd.optax.reweight(rgd.KL(scale=-1.0))
    broken = jax.tree.map(lambda g: g.at[1].set(jnp.inf), grads)
    updates, _ = tx.update(broken, tx.init(None), losses=losses.at[1].set(jnp.inf))
    weights = jnp.exp(-losses).at[1].set(0)
    expected = jax.tree.map(lambda g: jnp.tensordot(weights, g, 1) / BATCH, grads)
    assert_close(updates, expected)


NOTHING = {
    "where": {"where": jnp.zeros(BATCH, bool)},
    "sample_weight": {"sample_weight": jnp.zeros(BATCH)},
}


@pytest.mark.parametrize("spread", [False, True], ids=["one batch", "over an axis"])
@pytest.mark.parametrize("extra", NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize("weighting", [rgd.KL(), rgd.CVaR(0.5), rgd.MovingAverage(rgd.KL(), 0.9)], ids=str)
def test_a_batch_in_which_nothing_takes_part_gives_updates_of_zero(problem, weighting, extra, spread):
    params, *_ = problem
    losses, grads = per_example(*problem)
    grads = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), grads)
    name = "devices" if spread else None
    for wrapped in (rgd.optax.reweight, lambda *a, **k: rgd.optax.rgd(optax.adam(0.1), *a, **k)):
        tx = wrapped(weighting, axis_name=name)
        state = tx.init(params)

        def update(grads, losses, extra, tx=tx, state=state):
            return tx.update(grads, state, params, losses=losses, **extra)

        given = grads, losses, extra
        if spread:
            mapped = jax.vmap(update, axis_name=name)
            updates, after = mapped(*jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), given))
        else:
            updates, after = update(*given)
        jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0), updates)
        before = state.weighting_state
        jax.tree.map(np.testing.assert_array_equal, after.weighting_state, before)


@pytest.mark.parametrize("weighting", [rgd.KL(), rgd.CVaR(0.5), rgd.MovingAverage(rgd.KL(), 0.9)], ids=str)
def test_an_empty_batch_gives_updates_of_zero(problem, weighting):
    losses, grads = jax.tree.map(lambda x: x[:0], per_example(*problem))
    tx = rgd.optax.rgd(optax.adam(0.1), weighting)
    updates, _ = tx.update(grads, tx.init(problem[0]), problem[0], losses=losses)
    jax.tree.map(lambda u, p: np.testing.assert_array_equal(u, jnp.zeros_like(p)), updates, problem[0])


def test_a_device_without_examples_leaves_the_mean_to_the_others(problem):
    losses, grads = per_example(*problem)
    where = jnp.arange(BATCH) < BATCH // 2
    tx = rgd.optax.reweight(axis_name="devices")

    def update(grads, losses, where):
        return tx.update(grads, tx.init(problem[0]), losses=losses, where=where)[0]

    halves = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), (grads, losses, where))
    spread = jax.tree.map(lambda u: u[1], jax.vmap(update, axis_name="devices")(*halves))
    assert_close(spread, one_update(rgd.optax.reweight(), problem, where=where)[0])


def test_a_traced_sample_weight_that_is_not_allowed_still_gives_nan(problem):
    updates, _ = one_update(rgd.optax.reweight(), problem, sample_weight=-jnp.ones(BATCH))
    assert jnp.isnan(updates["b"])


def test_injected_tau_is_read_from_the_state(problem):
    tx = optax.inject_hyperparams(rgd.optax.rgd)(optax.sgd(1.0), tau=1.0)
    state = tx.init(problem[0])
    state.hyperparams["tau"] = jnp.array(0.25)
    updates, state = one_update(tx, problem, state)
    assert_close(updates, jax.tree.map(jnp.negative, mean_gradient(problem, tau=0.25)))
    scheduled = optax.inject_hyperparams(rgd.optax.rgd)(optax.sgd(1.0), tau=optax.constant_schedule(0.25))
    assert_close(one_update(scheduled, problem)[0], updates)


def test_accumulated_micro_batches_give_the_update_of_the_large_batch(problem):
    params, x, y = problem
    inner = optax.adam(1e-2)
    tx = rgd.optax.rgd(optax.MultiSteps(inner, 3), tau=0.7)
    state = tx.init(params)
    for k in range(3):
        part = slice(2 * k, 2 * k + 2)
        updates, state = one_update(tx, (params, x[part], y[part]), state)
        if k < 2:
            assert all(np.all(u == 0) for u in jax.tree.leaves(updates))
    assert_close(updates, one_update(rgd.optax.rgd(inner, tau=0.7), problem)[0])


def test_a_wrapper_in_the_wrong_order_is_refused(problem):
    tx = optax.MultiSteps(rgd.optax.rgd(optax.sgd(1.0)), 2)
    losses, grads = per_example(*problem)
    with pytest.raises((ValueError, TypeError)):
        tx.update(grads, tx.init(problem[0]), problem[0], losses=losses)


@pytest.mark.parametrize(
    "link", [optax.clip_by_global_norm(0.1), optax.add_decayed_weights(0.3)], ids=["clip", "decay"]
)
def test_clipping_and_weight_decay_inside_or_after_reweight_see_the_mean_gradient(problem, link):
    inner = optax.chain(link, optax.sgd(0.1))
    expected, _ = inner.update(mean_gradient(problem), inner.init(problem[0]), problem[0])
    assert_close(one_update(rgd.optax.rgd(inner), problem)[0], expected)
    assert_close(one_update(optax.chain(rgd.optax.reweight(), link, optax.sgd(0.1)), problem)[0], expected)
    # A link before it sees the gradients of all examples. Nothing tells, and the update is another.
    updates, _ = one_update(optax.chain(link, rgd.optax.rgd(optax.sgd(0.1))), problem)
    pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True)
    assert not any(np.allclose(a, b, rtol=1e-2) for a, b in pairs)


def test_an_update_that_is_not_finite_is_skipped_inside(problem):
    params, x, y = problem
    tx = rgd.optax.rgd(optax.apply_if_finite(optax.sgd(1.0), 5))
    updates, state = one_update(tx, (params, x.at[0].set(jnp.nan), y))
    assert all(np.all(u == 0) for u in jax.tree.leaves(updates))
    assert state.inner_state.total_notfinite == 1


def test_masked_and_multi_transform_compose(problem):
    gradient = mean_gradient(problem)
    masked = rgd.optax.rgd(optax.masked(optax.sgd(1.0), {"w": True, "b": False}))
    updates, _ = one_update(masked, problem)
    assert_close(updates, {"w": -gradient["w"], "b": gradient["b"]})
    groups = optax.multi_transform(
        {"w": rgd.optax.rgd(optax.sgd(1.0), tau=2.0), "b": rgd.optax.rgd(optax.adam(1.0))},
        {"w": "w", "b": "b"},
    )
    updates, _ = one_update(groups, problem)
    assert_close(updates["w"], -mean_gradient(problem, tau=2.0)["w"])
    assert_close(updates["b"], -jnp.sign(gradient["b"]))


def test_extra_arguments_reach_the_inner_optimizer(problem):
    updates, _ = one_update(rgd.optax.rgd(optax.polyak_sgd()), problem, value=jnp.array(0.5))
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))


def test_half_precision_gradients_are_summed_in_float32():
    grads = jnp.ones((4096, 2), jnp.bfloat16)  # a running sum in bfloat16 would stop at 256
    tx = rgd.optax.reweight(weighting=rgd.KL(scale=0.0))
    updates, _ = tx.update(grads, tx.init(None), losses=jnp.ones(4096, jnp.bfloat16))
    assert updates.dtype == jnp.bfloat16
    np.testing.assert_array_equal(updates.astype(jnp.float32), 1)


def test_named_axis_makes_the_mean_global(problem):
    losses, grads = per_example(*problem)
    split = jax.tree.map(lambda a: a.reshape(2, 3, *a.shape[1:]), (losses, grads))
    tx = rgd.optax.rgd(optax.sgd(1.0), weighting=rgd.KLBall(0.3), axis_name="d")
    state = tx.init(problem[0])
    updates = jax.vmap(lambda l, g: tx.update(g, state, losses=l)[0], axis_name="d")(*split)  # noqa: E741
    whole, _ = one_update(rgd.optax.rgd(optax.sgd(1.0), weighting=rgd.KLBall(0.3)), problem)
    assert_close(jax.tree.map(lambda u: u[1], updates), whole, rtol=1e-4)


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ({}, "losses are needed"),
        ({"losses": jnp.float32(1.0)}, "0-d"),
        ({"losses": jnp.ones((2, 3))}, "losses must have shape"),
        ({"losses": jnp.ones(5)}, "leading axis of the losses"),
    ],
)
def test_bad_calls_are_refused_with_the_fix(problem, extra, match):
    tx = rgd.optax.rgd(optax.sgd(1.0))
    _, grads = per_example(*problem)
    with pytest.raises(ValueError, match=match):
        tx.update(grads, tx.init(problem[0]), problem[0], **extra)


def test_tau_and_weighting_together_are_refused():
    with pytest.raises(ValueError, match="not both"):
        rgd.optax.reweight(rgd.KL(), tau=1.0)
    with pytest.raises(ValueError, match="not both"):
        rgd.optax.rgd(optax.sgd(1.0), rgd.KL(), tau=optax.constant_schedule(1.0))
    with pytest.raises(TypeError, match=r"did you mean tau=1\.0"):
        rgd.optax.reweight(1.0)
    with pytest.raises(TypeError, match=r"call it, as in KL\(...\)"):
        rgd.optax.reweight(rgd.KL)


@pytest.mark.parametrize("inner", [optax.adam, None, 0.1])
def test_what_is_no_gradient_transformation_is_refused(inner):
    with pytest.raises(TypeError, match=r"inner must be an optax.GradientTransformation, such as"):
        rgd.optax.rgd(inner)
