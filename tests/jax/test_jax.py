"""The JAX front against the float64 reference, under JAX's transformations, and with bad input.

Sizes are small and uneven (7 rows, 5 classes), so that no axis can stand in for another. A tolerance is
the dtype's eps times the number of roundings on the longest path: the sums over a row and over the batch, and
a few for exp and log.
"""

import math
import subprocess
import sys

import numpy as np
import pytest
import rgd
from rgd import reference

jax = pytest.importorskip("jax")
jnp = jax.numpy

import jax.export  # noqa: E402
import rgd.jax as rj  # noqa: E402
from jax.test_util import check_grads  # noqa: E402
from jax_cases import DTYPES, ROWS, exact, rounding  # noqa: E402
from x64 import enable_x64  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")


@pytest.fixture(params=DTYPES)
def dtype(request):
    with enable_x64(request.param == "float64"):
        yield jnp.dtype(request.param)


WEIGHTINGS = [
    rgd.KL(),
    rgd.KL(tau=0.3),
    rgd.KL(scale=0.0),
    rgd.KL(tau=2.0, scale=3.0),
    rgd.KL(tau=1.0, normalize=True),
    rgd.KL(tau=math.inf, scale=0.7, normalize=True),
    rgd.KLBall(0.0),
    rgd.KLBall(1e-4),
    rgd.KLBall(0.2),
    rgd.KLBall(1.5),
    rgd.KLBall(50.0),
]


def some_losses(dtype, shape=(ROWS,), seed=0):
    return jnp.asarray(np.random.default_rng(seed).gamma(1.0, 1.5, shape)).astype(dtype)


# One program for each kind of weighting: their numbers are arguments.


@jax.jit
def weights_and_mean(losses, weighting, where=None):
    options = {"where": where}
    return rj.sample_weights(losses, weighting, **options), rj.reweighted_mean(losses, weighting, **options)


@jax.jit
def mean_and_gradient(losses, weighting, where=None):
    return jax.value_and_grad(rj.reweighted_mean)(losses, weighting, where=where)


# Weights and the mean.


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_weights_and_mean_equal_the_reference(weighting, masked, dtype):
    losses = some_losses(dtype, (3, 7))
    where = jnp.asarray(np.random.default_rng(1).random((3, 7)) < 0.6) if masked else None
    mask = None if where is None else np.asarray(where)
    weights, mean = weights_and_mean(losses, weighting, where)
    assert weights.dtype == jnp.promote_types(dtype, jnp.float32)
    # A ball's exponent (1/gamma) * gap, of at most 20 here, carries its rounding into the weight.
    tolerance = 20 * rounding(dtype, 21)
    expected = reference.sample_weights(exact(losses), weighting, mask)
    np.testing.assert_allclose(weights, expected, rtol=tolerance, atol=tolerance * 1e-3)
    np.testing.assert_allclose(
        mean, reference.reweighted_mean(exact(losses), weighting, mask), rtol=tolerance
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("radius", [1e-6, 1e-2, 0.5, 2.0, 4.0])
@pytest.mark.parametrize("n", [2, 10, 1000])
def test_ball_is_reached_exactly_where_it_can_be(n, radius, seed):
    with enable_x64(True):
        losses = np.random.default_rng(seed).lognormal(0, 2, n)
        weights = np.asarray(jax.jit(rj.sample_weights)(losses, rgd.KLBall(radius)))
    np.testing.assert_allclose(weights.mean(), 1, rtol=(n + 16) * np.finfo(np.float64).eps)
    if radius < math.log(n):
        terms = weights * np.log(np.where(weights > 0, weights, 1)) - (weights - 1)
        assert abs(terms.mean() / radius - 1) < 1e-10
    else:
        np.testing.assert_array_equal(weights, n * (losses == losses.max()))


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_equal_losses_weigh_the_same(weighting):
    weights = np.asarray(rj.sample_weights(jnp.full(9, 0.7), weighting))
    assert np.all(weights == weights[0])
    if isinstance(weighting, rgd.KLBall) or weighting.normalize:
        np.testing.assert_array_equal(weights, 1)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_ball_is_invariant_to_the_size_of_the_losses(scale):
    losses = some_losses("float32")
    np.testing.assert_allclose(
        rj.sample_weights(losses * scale, rgd.KLBall(0.3)),
        rj.sample_weights(losses, rgd.KLBall(0.3)),
        rtol=20 * rounding("float32"),
    )


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_weighs_as_in_the_reference(weighting, bad):
    losses = np.array([0.5, bad, 2.0])
    got = np.asarray(rj.sample_weights(jnp.asarray(losses, jnp.float32), weighting))
    np.testing.assert_allclose(got, reference.sample_weights(losses, weighting), rtol=rounding("float32"))


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_what_is_masked_reaches_neither_value_nor_gradient(weighting):
    losses = jnp.array([0.5, jnp.nan, 2.0, jnp.inf])
    where = jnp.array([True, False, True, False])
    value, gradient = mean_and_gradient(losses, weighting, where)
    short_value, short_gradient = mean_and_gradient(losses[::2], weighting)
    np.testing.assert_allclose(value, short_value, rtol=rounding("float32"))
    np.testing.assert_allclose(gradient[::2], short_gradient, rtol=rounding("float32"))
    np.testing.assert_array_equal(gradient[1::2], 0)


def test_mean_of_nothing_is_nan():
    assert jnp.isnan(rj.reweighted_mean(jnp.zeros(0)))
    assert jnp.isnan(rj.reweighted_mean(jnp.ones(3), where=False))


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_axis_makes_every_other_position_a_batch_of_its_own(weighting):
    losses = some_losses("float32", (3, 4, 6))
    where = jnp.asarray(np.random.default_rng(2).random((3, 4, 6)) < 0.7)
    weights = rj.sample_weights(losses, weighting, where=where, axis=(0, -1))
    means = rj.reweighted_mean(losses, weighting, where=where, axis=(0, -1))
    assert means.shape == (4,)
    for k in range(4):
        one, mean = weights_and_mean(losses[:, k], weighting, where[:, k])
        np.testing.assert_allclose(weights[:, k], one, rtol=20 * rounding("float32"), atol=1e-9)
        np.testing.assert_allclose(means[k], mean, rtol=20 * rounding("float32"))


def test_pointwise_weights_do_not_depend_on_the_micro_batch():
    losses = some_losses("float32", (8,))
    halves = [rj.reweighted_mean(half, tau=0.7) for half in (losses[:4], losses[4:])]
    np.testing.assert_allclose(sum(halves) / 2, rj.reweighted_mean(losses, tau=0.7), rtol=rounding("float32"))


# Transformations.


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_gradient_is_the_weights_over_n_and_the_weights_are_constants(weighting):
    losses = some_losses("float32")
    weights = rj.sample_weights(losses, weighting)
    gradient = jax.grad(rj.reweighted_mean)(losses, weighting)
    np.testing.assert_allclose(gradient, weights / ROWS, rtol=rounding("float32"))
    assert np.all(jax.jacfwd(rj.sample_weights)(losses, weighting) == 0)
    assert np.all(jax.jacrev(rj.sample_weights)(losses, weighting) == 0)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_gradients_of_the_mean_with_constant_weights_pass_check_grads(weighting):
    with enable_x64(True):
        losses = some_losses("float64")
        weights = rj.sample_weights(losses, weighting)

        def surrogate(x):  # the weights are constants: subtract what a perturbation does to them
            moved = jax.lax.stop_gradient(rj.sample_weights(x, weighting))
            return rj.reweighted_mean(x, weighting) - jnp.mean((moved - weights) * x)

        check_grads(surrogate, (losses,), order=1, modes=("fwd", "rev"))


@jax.jit
def transformed(losses, weighting):
    """The mean of each row: vmapped, scanned; and its gradient: of the whole vmap, and with remat."""
    mean = lambda row: rj.reweighted_mean(row, weighting)  # noqa: E731
    means = jax.vmap(mean)(losses), jax.lax.scan(lambda c, row: (c, mean(row)), 0, losses)[1]
    of_all = jax.grad(lambda x: jax.vmap(mean)(x).sum())(losses)
    return means, (of_all, jax.vmap(jax.grad(jax.checkpoint(mean)))(losses))


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_jit_vmap_scan_and_remat_give_the_plain_result(weighting):
    losses = some_losses("float32", (3, ROWS))
    plain = jnp.stack([rj.reweighted_mean(row, weighting) for row in losses])
    gradient = jnp.stack([mean_and_gradient(row, weighting)[1] for row in losses])
    tolerance = 20 * rounding("float32")
    np.testing.assert_allclose(
        [mean_and_gradient(row, weighting)[0] for row in losses], plain, rtol=tolerance
    )
    means, gradients = transformed(losses, weighting)
    for mean in means:
        np.testing.assert_allclose(mean, plain, rtol=tolerance)
    for other in gradients:
        np.testing.assert_allclose(other, gradient, rtol=tolerance)


def test_weightings_are_pytrees_with_named_leaves():
    paths, tree = jax.tree_util.tree_flatten_with_path((rgd.KL(0.5, normalize=True), rgd.KLBall(0.2)))
    assert [jax.tree_util.keystr(path) for path, _ in paths] == ["[0].tau", "[1].radius"]
    assert jax.tree_util.tree_unflatten(tree, [leaf for _, leaf in paths]) == (
        rgd.KL(0.5, normalize=True),
        rgd.KLBall(0.2),
    )


def test_numbers_of_a_weighting_may_be_traced_vmapped_and_differentiated():
    losses = some_losses("float32")
    taus = jnp.array([0.5, 1.0, 2.0])
    expected = jnp.stack([rj.reweighted_mean(losses, tau=float(t)) for t in taus])
    tolerance = rounding("float32")
    np.testing.assert_allclose(
        jax.vmap(lambda t: rj.reweighted_mean(losses, tau=t))(taus), expected, rtol=tolerance
    )
    swept = jax.vmap(rj.reweighted_mean, (None, 0))(losses, rgd.KL(taus))
    np.testing.assert_allclose(swept, expected, rtol=tolerance)
    radii = jnp.array([0.0, 0.1, 9.0])
    balls = jax.jit(jax.vmap(rj.sample_weights, (None, 0)))(losses, rgd.KLBall(radii))
    for ball, radius in zip(balls, radii, strict=True):
        one = rj.sample_weights(losses, rgd.KLBall(float(radius)))
        np.testing.assert_allclose(ball, one, rtol=20 * tolerance)
    slope = jax.jit(jax.grad(lambda w: rj.reweighted_mean(losses, w)))(rgd.KL(tau=0.7, scale=0.4))
    assert (slope.tau, slope.scale) == (0, 0)  # not through the weights
    by_tau = jax.grad(lambda t: rj.reweighted_mean(t * losses, tau=t))(1.0)  # but through the losses
    np.testing.assert_allclose(by_tau, rj.reweighted_mean(losses, tau=1.0), rtol=tolerance)


def test_a_known_number_is_checked_even_in_a_jax_array():
    with pytest.raises(ValueError, match="tau must be a positive number, got -1"):
        rgd.KL(jnp.array([1.0, -1.0]))
    with pytest.raises(ValueError, match="radius must be a number >= 0"):
        rgd.KLBall(jnp.float32(-2))
    with pytest.raises(TypeError, match="tau must be a number"):
        rgd.KL(jnp.array(True))


def test_mean_exports():
    losses = some_losses("float32")
    exported = jax.export.export(jax.jit(lambda x: rj.reweighted_mean(x, rgd.KLBall(0.2))))(losses)
    np.testing.assert_allclose(
        exported.call(losses), rj.reweighted_mean(losses, rgd.KLBall(0.2)), rtol=rounding("float32")
    )


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_vmap_with_an_axis_name_makes_weights_global(weighting):
    losses = some_losses("float32", (3, ROWS))
    parts = jax.vmap(lambda x: rj.sample_weights(x, weighting, axis_name="d"), axis_name="d")(losses)
    means = jax.vmap(lambda x: rj.reweighted_mean(x, weighting, axis_name="d"), axis_name="d")(losses)
    tolerance = 20 * rounding("float32", 21)
    np.testing.assert_allclose(
        parts, rj.sample_weights(losses, weighting), rtol=tolerance, atol=tolerance * 1e-3
    )
    np.testing.assert_allclose(means, jnp.full(3, rj.reweighted_mean(losses, weighting)), rtol=tolerance)


# value_and_grad and the diagnostics.


def test_value_and_grad_is_that_of_the_reweighted_mean():
    x, y = jnp.arange(6.0).reshape(3, 2), jnp.array([1.0, -2.0, 0.5])

    def losses(params, x, y):
        residual = x @ params["w"] + params["b"] - y
        return residual**2, {"residual": residual}

    params = {"w": jnp.array([0.1, 0.2]), "b": jnp.array(0.3)}
    (value, aux), gradient = jax.jit(rj.value_and_grad(losses, has_aux=True, tau=2.0))(params, x, y)
    plain = jax.value_and_grad(lambda p: rj.reweighted_mean(losses(p, x, y)[0], tau=2.0))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), (value, gradient), plain)
    assert aux["residual"].shape == (3,)
    by_x = rj.value_and_grad(lambda x, y: (x - y) ** 2, argnums=(0, 1))(y + 1, y)[1]
    np.testing.assert_allclose(by_x[0], -by_x[1], rtol=1e-6)


def test_value_and_grad_says_what_the_function_must_return():
    with pytest.raises(ValueError, match=r"leave out the jnp\.mean"):
        rj.value_and_grad(jnp.mean)(jnp.ones(3))
    with pytest.raises(TypeError, match="has_aux=True"):
        rj.value_and_grad(lambda x: (x, x))(jnp.ones(3))
    with pytest.raises(TypeError, match=r"\(losses, aux\)"):
        rj.value_and_grad(lambda x: x, has_aux=True)(jnp.ones(3))


@pytest.mark.parametrize("weighting", [*WEIGHTINGS, None], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_weight_stats_equal_the_reference_under_jit(weighting, masked):
    with enable_x64(True):
        losses = some_losses("float64")
        where = jnp.array([True] * 5 + [False] * 2) if masked else None
        weights = rj.sample_weights(losses, weighting, where=where)
        stats = jax.jit(rj.weight_stats)(losses, weights, weighting, where=where)
        kept = slice(0, 5 if masked else ROWS)
        expected = reference.weight_stats(losses[kept], weights[kept], weighting)
        for name, value in vars(expected).items():
            if value is None:
                assert getattr(stats, name) is None
            else:
                np.testing.assert_allclose(getattr(stats, name), value, rtol=1e-12, atol=1e-14)
        assert "samples" in str(stats)


# Bad input, at trace time.


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: rj.sample_weights(jnp.float32(1.0)), ValueError, "per-example losses"),
        (lambda: rj.reweighted_mean(jnp.arange(3)), TypeError, "losses must be floating, got int32"),
        (lambda: rj.reweighted_mean(jnp.ones(3), where=jnp.ones(3)), TypeError, "where must be boolean"),
        (
            lambda: rj.reweighted_mean(jnp.ones(3), where=jnp.ones(2, bool)),
            ValueError,
            "where must broadcast",
        ),
        (lambda: rj.reweighted_mean(jnp.ones(3), axis=1), ValueError, "axis 1 is out of range"),
        (lambda: rj.reweighted_mean(jnp.ones((3, 2)), axis=(0, -2)), ValueError, "twice"),
        (
            lambda: rj.reweighted_mean(jnp.ones(3), axis_name="data"),
            ValueError,
            "axis_name='data' is not bound",
        ),
        (lambda: rj.reweighted_mean(jnp.ones(3), rgd.KL(), tau=1.0), ValueError, "not both"),
        (lambda: rj.reweighted_mean(jnp.ones(3), 2.0), TypeError, "did you mean tau=2.0"),
        (
            lambda: rj.reweighted_mean(jnp.ones(3), rgd.KL(jnp.ones(2))),
            ValueError,
            "jax.vmap over the weighting",
        ),
        (lambda: rj.cross_entropy(jnp.ones(()), jnp.array(0)), ValueError, "no class axis"),
        (
            lambda: rj.cross_entropy(jnp.ones((2, 3), int), jnp.zeros(2, int)),
            TypeError,
            "logits must be floating",
        ),
        (lambda: rj.cross_entropy(jnp.ones((2, 3)), jnp.zeros(3, int)), ValueError, "labels must have shape"),
        (lambda: rj.cross_entropy(jnp.ones((2, 3, 4)), jnp.zeros((2, 4), int)), ValueError, "give axis=1"),
        (lambda: rj.cross_entropy(jnp.ones((2, 3)), jnp.zeros((2, 3), int)), TypeError, "astype"),
        (lambda: rj.cross_entropy(jnp.ones((2, 3)), jnp.zeros(2)), TypeError, "must be class indices"),
        (
            lambda: rj.cross_entropy(jnp.ones((2, 3)), jnp.zeros(2, bool)),
            TypeError,
            "labels must be integers",
        ),
        (
            lambda: rj.cross_entropy(jnp.ones((2, 3)), jnp.zeros(2, int), jnp.ones(2)),
            ValueError,
            "one entry a class",
        ),
        (
            lambda: rj.cross_entropy(jnp.ones((2, 3)), jnp.zeros(2, int), rgd.KL()),
            TypeError,
            r"name it weighting=KL\(",
        ),
        (
            lambda: rj.cross_entropy(jnp.ones((2, 3)), jnp.zeros(2, int), reduction="avg"),
            ValueError,
            "reduction",
        ),
        (lambda: rj.cross_entropy(jnp.ones((2, 3)), jnp.zeros(2, int), per="row"), ValueError, "per must be"),
        (
            lambda: rj.cross_entropy(jnp.ones((2, 3)), jnp.zeros(2, int), label_smoothing=2),
            ValueError,
            "smoothing",
        ),
        (
            lambda: rj.cross_entropy(jnp.ones((2, 3)), jnp.ones((2, 3)), ignore_index=1),
            ValueError,
            "ignore_index",
        ),
        (lambda: rj.weight_stats(jnp.ones(3), jnp.ones(2)), ValueError, "shape of losses"),
    ],
)
def test_bad_input_is_refused_at_trace_time_with_the_fix(call, error, match, traced):
    with pytest.raises(error, match=match):
        jax.jit(call)() if traced else call()


def test_importing_rgd_does_not_import_jax():
    program = "import sys, rgd; assert not {'jax', 'optax', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
