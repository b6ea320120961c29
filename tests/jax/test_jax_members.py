"""Every weighting in JAX, a user's own too: traced, scheduled, with a base measure, groups and state.

Nine rows and three groups: no axis can stand in for another. Everything is in float64, where a tolerance is
eps times the roundings of a sum over the rows; exponents and roots magnify them by at most 20 here.
"""

import dataclasses
import functools

import numpy as np
import pytest
import rgd
from rgd import reference

jax = pytest.importorskip("jax")
jnp = jax.numpy

import rgd.jax as rj  # noqa: E402
from x64 import enable_x64  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")

ROWS = 9
TOLERANCE = 20 * (ROWS + 16) * np.finfo(np.float64).eps


@dataclasses.dataclass(frozen=True)
class Softer(rgd.Weighting):
    power: float = 0.5
    pointwise = True

    def weights(self, batch):
        return (1 + batch.losses) ** self.power


@dataclasses.dataclass(frozen=True)
class Record(rgd.Weighting):
    """Losses relative to the largest loss so far."""

    fade: float = 0.5

    def init(self):
        return {"largest": np.zeros(()), "batches": 0}

    def step(self, batch, state):
        faded, top = self.fade * state["largest"], batch.max(batch.losses)
        largest = batch.xp.where(top > faded, top, faded)
        return batch.losses / largest, {"largest": largest, "batches": state["batches"] + 1}


@reference.equation.register(Softer)
def _(weighting, batch):
    return (1 + batch.losses) ** weighting.power


@reference.step.register(Record)
def _(weighting, batch, state):
    largest = max(weighting.fade * state["largest"], batch.losses.max())
    return batch.losses / largest, {"largest": largest, "batches": state["batches"] + 1}


def reciprocal(losses):
    return 1 / (1 + losses)


MEMBERS = [
    rgd.ERM(),
    rgd.KL(tau=0.8),
    rgd.KL(scale=-0.7),
    rgd.KL(tau=2.0, normalize=True),
    rgd.KL(scale=-0.7, normalize=True),
    rgd.KLBall(0.3),
    rgd.MidrangeKL(1.0),
    rgd.MidrangeKL(0.7, relative=True),
    rgd.ChiSquare(1.2),
    rgd.ChiSquareBall(0.4),
    rgd.CVaR(0.35),
    rgd.CVaR(0.35, smoothing=0.2),
    rgd.Focal(2.0),
    rgd.Threshold(1.0),
    rgd.Trimmed(rgd.CVaR(0.5), fraction=0.2),
    rgd.MovingAverage(rgd.KL(tau=0.8), decay=0.9),
    rgd.GroupDRO(groups=3, step_size=0.1),
    rgd.Pointwise(reciprocal),
    Softer(0.4),
    Record(),
]
every_member = pytest.mark.parametrize(
    "weighting", MEMBERS, ids=lambda member: str(member).partition(" at 0x")[0]
)
close = functools.partial(np.testing.assert_allclose, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.fixture(autouse=True)
def float64():
    with enable_x64(True):
        yield


def some_losses(shape=(ROWS,), seed=0):
    return np.random.default_rng(seed).gamma(1.0, 1.5, shape)


GROUPS = np.arange(ROWS) % 3
WHERE = np.arange(ROWS) != 4
MASS = np.array([1, 2, 0, 3, 1, 1, 1, 0, 0])  # their sum is ROWS: repeated samples have the same shape


@jax.jit
def step(losses, weighting, state, groups, where=None, sample_weight=None):  # noqa: PLR0917
    """Weights, objective, gradient and state, every number traced."""
    options = {"where": where, "sample_weight": sample_weight, "groups": groups, "state": state}
    weights = rj.sample_weights(losses, weighting, **options)
    value, gradient = jax.value_and_grad(rj.reweighted_mean, has_aux=state is not None)(
        losses, weighting, **options
    )
    if state is None:
        return weights, value, gradient, None
    assert jax.tree.structure(weights[1]) == jax.tree.structure(value[1])
    return weights[0], value[0], gradient, value[1]


def traced(tree):
    """The same with arrays for Python numbers, so that every call meets one compiled program."""
    return jax.tree.map(np.asarray, tree)


def start(weighting):
    return traced(weighting.init()) if weighting.stateful else None


@every_member
@pytest.mark.parametrize("masked", [False, True])
def test_two_steps_are_those_of_the_reference_and_weights_are_constants(weighting, masked):
    options = {"where": WHERE, "sample_weight": MASS} if masked else {}
    p = WHERE * MASS if masked else np.ones(ROWS)
    state = expected_state = start(weighting)
    for seed in range(2 if weighting.stateful else 1):
        losses = some_losses(seed=seed)
        expected = reference.sample_weights(losses, weighting, groups=GROUPS, state=expected_state, **options)
        mean = reference.reweighted_mean(losses, weighting, groups=GROUPS, state=expected_state, **options)
        if weighting.stateful:
            (expected, expected_state), (mean, _) = expected, mean
        weights, value, gradient, state = step(losses, traced(weighting), state, GROUPS, **options)
        close(weights, expected)
        close(value, mean)
        close(gradient, p * expected / p.sum())
        jax.tree.map(close, state, expected_state)
    if not masked and not weighting.stateful:
        close(rj.sample_weights(losses, weighting, groups=GROUPS), expected)


@every_member
def test_an_integer_sample_weight_equals_repetition(weighting):
    losses, numbers, everywhere = some_losses(), traced(weighting), np.ones(ROWS, bool)
    whole = step(losses, numbers, start(weighting), GROUPS, where=everywhere, sample_weight=MASS)
    repeated = step(np.repeat(losses, MASS), numbers, start(weighting), np.repeat(GROUPS, MASS))
    close(np.repeat(whole[0], MASS), repeated[0])
    close(whole[1], repeated[1])
    jax.tree.map(close, whole[3], repeated[3])
    assert np.all(whole[0][MASS == 0] == 0)


@jax.jit
def scanned_and_vmapped(losses, schedule, state, groups):
    """One mean a row of losses, with its own settings: scanned, and vmapped where nothing is remembered."""

    def body(state, inputs):
        mean = rj.reweighted_mean(*inputs, groups=groups, state=state)
        return (None, mean) if state is None else (mean[1], mean[0])

    state, means = jax.lax.scan(body, state, (losses, schedule))
    if state is not None:
        return means, means, state
    return means, jax.vmap(rj.reweighted_mean)(losses, schedule), state


@every_member
def test_settings_may_be_scanned_and_vmapped_over_and_compile_once(weighting):
    losses = some_losses((3, ROWS))
    schedule = jax.tree.map(lambda number: number * jnp.array([1.0, 0.9, 0.8]), weighting)
    scanned, vmapped, last = scanned_and_vmapped(losses, schedule, start(weighting), GROUPS)
    state, means = start(weighting), []
    compiled = None
    for k in range(3):
        settings = traced(jax.tree.map(lambda numbers, k=k: numbers[k], schedule))
        _, mean, _, state = step(losses[k], settings, traced(state), GROUPS)
        means.append(mean)
        compiled = compiled or step._cache_size()
        assert step._cache_size() == compiled
    close(scanned, jnp.stack(means))
    close(vmapped, scanned)
    jax.tree.map(close, last, state)


def test_no_gradient_reaches_settings_sample_weights_or_state():
    weighting = rgd.MovingAverage(rgd.KL(tau=0.7, scale=0.4), decay=0.5)

    def objective(weighting, mass, log_mean):
        state = {"log_mean": log_mean, "updates": 3}
        mean, new = rj.reweighted_mean(some_losses(), weighting, sample_weight=mass, state=state)
        return mean + new["log_mean"]

    gradients = jax.grad(objective, argnums=(0, 1, 2))(weighting, jnp.ones(ROWS), 0.1)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradients))


# A zero weight, and what takes no part.


def cut(losses):
    return jnp.where(losses > 10, 0.0, 1.0)


@pytest.mark.parametrize("weighting", [rgd.Pointwise(cut), rgd.KL(scale=-1.0)], ids=["cut", "KL"])
def test_a_zero_weight_makes_product_and_gradient_zero_even_for_an_infinite_loss(weighting):
    losses = jnp.array([1.0, jnp.inf, 2.0])
    value, gradient = jax.jit(jax.value_and_grad(rj.reweighted_mean))(losses, weighting)
    weights = rj.sample_weights(losses, weighting)
    close(value, (weights[0] + 2 * weights[2]) / 3)
    close(gradient, weights / 3)
    assert gradient[1] == 0
    assert jnp.isnan(rj.reweighted_mean(losses.at[1].set(jnp.nan), weighting))


@pytest.mark.parametrize("backend", ["jnp", "rust"])
def test_a_zero_weight_in_cross_entropy_makes_its_row_of_the_gradient_zero(backend):
    logits = jnp.array([[0.0, -jnp.inf, 1.0], [0.5, 0.0, 0.0]])
    labels, options = jnp.array([1, 0]), {"weighting": rgd.KL(scale=-1.0), "reduction": "sum"}
    value, gradient = jax.value_and_grad(rj.cross_entropy)(logits, labels, backend=backend, **options)
    expected, row = jax.value_and_grad(rj.cross_entropy)(logits[1:], labels[1:], **options)
    close(value, expected)
    close(gradient, jnp.stack([jnp.zeros(3), row[0]]))


@pytest.mark.parametrize("weighting", [m for m in MEMBERS if m.stateful], ids=str)
@pytest.mark.parametrize("case", ["nothing", "where", "sample_weight", "infinite", "NaN", "bad weight"])
def test_a_batch_that_says_nothing_leaves_the_state(weighting, case):
    losses, options = jnp.asarray(some_losses()), {}
    options["sample_weight"] = jnp.zeros(ROWS) if case == "sample_weight" else jnp.ones(ROWS)
    options["where"] = jnp.full(ROWS, case != "where")
    groups = jnp.asarray(GROUPS)
    if case == "nothing":
        losses, groups, options = losses[:0], groups[:0], {}
    elif case in ("infinite", "NaN"):
        losses = losses.at[2].set(np.inf if case == "infinite" else np.nan)
    elif case == "bad weight":
        options["sample_weight"] = options["sample_weight"].at[0].set(-1.0)
    _, value, _, state = step(losses, traced(weighting), start(weighting), groups, **options)
    assert not jnp.isfinite(value)
    jax.tree.map(np.testing.assert_array_equal, state, start(weighting))


def test_a_traced_sample_weight_that_is_not_allowed_gives_nan():
    losses = jnp.asarray(some_losses())
    for bad in (-1.0, jnp.nan, jnp.inf):
        mass = jnp.ones(ROWS).at[1].set(bad)
        with pytest.raises(ValueError, match="finite numbers >= 0"):
            rj.reweighted_mean(losses, sample_weight=mass)
        for weighting in (rgd.KL(), rgd.CVaR(0.5), rgd.KLBall(0.0)):
            weights, value, *_ = step(losses, traced(weighting), None, GROUPS, np.ones(ROWS, bool), mass)
            assert jnp.isnan(value)
            assert jnp.isnan(weights[1])
            assert np.all(jnp.isnan(weights)) or weighting.pointwise
        for backend in ("jnp", "rust"):
            objective = jax.jit(functools.partial(rj.cross_entropy, backend=backend))
            assert jnp.isnan(objective(jnp.ones((ROWS, 3)), jnp.zeros(ROWS, int), sample_weight=mass))


# State, value_and_grad and cross-entropy.


def test_value_and_grad_takes_masks_groups_and_state_by_keyword():
    x, y = jnp.asarray(some_losses()), jnp.asarray(some_losses(seed=1))

    def losses(slope, x, y):
        return jnp.square(slope * x - y)

    def with_aux(slope, x, y):
        return losses(slope, x, y), "aux"

    weighting = rgd.GroupDRO(groups=3, step_size=0.1)
    options = {"where": WHERE, "sample_weight": MASS, "groups": GROUPS, "state": weighting.init()}
    (value, gradient), state = rj.value_and_grad(losses, weighting=weighting)(1.5, x, y, **options)
    (expected, expected_state), slope = jax.value_and_grad(
        lambda s: rj.reweighted_mean(losses(s, x, y), weighting, **options), has_aux=True
    )(1.5)
    close(value, expected)
    close(gradient, slope)
    jax.tree.map(close, state, expected_state)
    ((value, aux), gradient), _ = rj.value_and_grad(with_aux, has_aux=True, weighting=weighting)(
        1.5, x, y, **options
    )
    assert aux == "aux"
    close((value, gradient), (expected, slope))
    with pytest.raises(TypeError, match="did you mean tau=1"):
        rj.value_and_grad(losses, weighting=1)


@pytest.mark.parametrize("per", ["element", "sample"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize(
    "weighting", [rgd.KL(tau=0.8), rgd.CVaR(0.35), MEMBERS[-5], rgd.GroupDRO(3, 0.1)], ids=str
)
def test_cross_entropy_takes_sample_weights_groups_and_state(weighting, kind, per):
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((ROWS, 5, 4))  # the layout of torch
    labels = rng.integers(0, 5, (ROWS, 4))
    labels[1, 2] = labels[4] = -100
    if kind == "probabilities":
        labels = rng.dirichlet(np.ones(5), (ROWS, 4)).transpose(0, 2, 1)
    options = {"weight": np.arange(1.0, 6.0), "label_smoothing": 0.1, "per": per, "weighting": weighting}
    options |= {"sample_weight": MASS, "groups": GROUPS, "where": np.arange(4) != 3}
    if weighting.stateful:
        options["state"] = weighting.init()

    def all_reductions(logits):
        def total(reduction):
            result = rj.cross_entropy(logits, labels, axis=1, reduction=reduction, **options)
            return result if weighting.stateful else (result, None)

        none, state = total("none")
        return {"none": none, "sum": total("sum")[0], "mean": total("mean")[0]}, state

    values, state = jax.jit(all_reductions)(logits)
    gradient = jax.jit(jax.grad(lambda z: all_reductions(z)[0]["mean"]))(logits)
    size = 20 * TOLERANCE  # rows of 36 targets with logits of up to 6
    for reduction, value in values.items():
        expected = reference.cross_entropy(logits, labels, reduction=reduction, **options)
        if weighting.stateful:
            expected, expected_state = expected
            jax.tree.map(close, state, expected_state)
        np.testing.assert_allclose(value, expected, rtol=size, atol=size)
    expected = reference.cross_entropy_grad(logits, labels, **options)
    expected = expected[0] if weighting.stateful else expected
    np.testing.assert_allclose(gradient, expected, rtol=size, atol=size)


def test_a_sample_weight_of_zero_is_as_an_ignored_label():
    logits, labels = 2 * np.random.default_rng(0).standard_normal((ROWS, 5)), np.arange(ROWS) % 5
    broken = jnp.asarray(logits).at[2].set(jnp.nan)
    for backend in ("jnp", "rust"):
        step = jax.jit(jax.value_and_grad(functools.partial(rj.cross_entropy, backend=backend)))
        ignored = step(broken, np.where(MASS == 0, -100, labels), sample_weight=np.maximum(MASS, 1))
        zero = step(broken, np.where(MASS == 0, 99, labels), sample_weight=MASS)
        jax.tree.map(np.testing.assert_array_equal, zero, ignored)
        assert np.all(zero[1][MASS == 0] == 0)


# The statistics.


def test_statistics_heed_sample_weights_and_groups():
    losses = some_losses()
    weighting = rgd.KL(tau=0.8)
    weights = rj.sample_weights(losses, weighting)
    options = {"where": WHERE, "sample_weight": MASS, "groups": GROUPS}
    expected = reference.weight_stats(losses, weights, weighting, **options)
    eager = rj.weight_stats(losses, weights, weighting, **options)
    traced = jax.jit(functools.partial(rj.weight_stats, num_groups=4))(losses, weights, weighting, **options)
    for name, value in vars(expected).items():
        if name != "groups":
            close(getattr(eager, name), value)
            close(getattr(traced, name), value)
    for name in ("mean_loss", "weight_share", "count"):
        close(getattr(eager.groups, name), getattr(expected.groups, name))
        close(getattr(traced.groups, name)[:3], getattr(expected.groups, name))
    assert expected.groups.numbers is eager.groups.numbers is traced.groups.numbers is None
    assert jnp.isnan(traced.groups.mean_loss[3])
    assert traced.groups.count[3] == 0
    outside = jax.jit(functools.partial(rj.weight_stats, num_groups=2))(losses, weights, groups=GROUPS)
    assert np.all(jnp.isnan(outside.groups.mean_loss))


# Weightings as pytrees.


def test_fields_are_leaves_by_name_and_what_is_no_number_is_structure():
    weighting = rgd.Trimmed(rgd.CVaR(0.5), fraction=0.2)
    paths, tree = jax.tree_util.tree_flatten_with_path(weighting)
    assert [jax.tree_util.keystr(path) for path, _ in paths] == [
        ".weighting.alpha",
        ".weighting.smoothing",
        ".fraction",
    ]
    assert jax.tree.unflatten(tree, [leaf for _, leaf in paths]) == weighting
    assert jax.tree.leaves(rgd.GroupDRO(groups=3, step_size=0.1)) == [0.1]
    structures = {jax.tree.structure(rgd.MidrangeKL(1.0, relative=value)) for value in (False, True)}
    assert len(structures) == 2


def test_a_class_defined_after_the_import_is_a_pytree_of_its_numbers():
    @dataclasses.dataclass(frozen=True)
    class Later(rgd.Weighting):
        inner: rgd.Weighting
        power: float
        name: str = "later"
        twice: bool = True
        pointwise = True

        def weights(self, batch):
            return self.inner.weights(batch) ** self.power

    weighting = Later(rgd.KL(tau=0.8), 2.0)
    assert jax.tree.leaves(weighting) == [0.8, 2.0]
    assert jax.tree.map(lambda leaf: leaf, weighting) == weighting
    weights = jax.jit(rj.sample_weights)(some_losses(), weighting)
    close(weights, rj.sample_weights(some_losses(), rgd.KL(tau=0.8)) ** 2)
    assert jax.tree.map(lambda _: None, weighting).power is None  # a placeholder is not checked


def test_a_weighting_that_is_no_dataclass_is_a_pytree_without_leaves():
    class Plain(rgd.Weighting):
        pointwise = True

        def weights(self, batch):
            return 2 * batch.xp.ones_like(batch.losses)

    assert jax.tree.leaves(Plain()) == []
    close(jax.jit(rj.sample_weights)(some_losses(), Plain()), 2)


def test_a_setting_that_is_no_key_of_a_cache_still_works():
    @dataclasses.dataclass(frozen=True)
    class Table(rgd.Weighting):
        entries: list

        def weights(self, batch):
            return batch.losses * self.entries[0] / batch.mean(batch.losses)

    losses = some_losses()
    close(rj.sample_weights(losses, Table([2.0])), 2 * losses / losses.mean())


# Bad input.


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda x, w: rj.sample_weights(x, w, axis=0), ValueError, "start with state = weighting.init()"),
        (lambda x, w: rj.sample_weights(x, rgd.KL(), state={}), ValueError, "keeps no state"),
        (
            lambda x, w: rj.sample_weights(x.reshape(3, 3), w, axis=1, state=w.init()),
            ValueError,
            "jax.vmap over losses and state",
        ),
        (lambda x, w: rj.reweighted_mean(x, sample_weight=x > 0), TypeError, "array of numbers"),
        (lambda x, w: rj.reweighted_mean(x, sample_weight=jnp.ones(2)), ValueError, "one entry a sample"),
        (lambda x, w: rj.reweighted_mean(x, groups=x), TypeError, "groups must be an array of integers"),
        (
            lambda x, w: rj.reweighted_mean(x, rgd.GroupDRO(2, 0.1), state=rgd.GroupDRO(2, 0.1).init()),
            ValueError,
            "give groups=",
        ),
        (lambda x, w: rj.reweighted_mean(x, rgd.KL), TypeError, r"call it, as in KL\(...\)"),
        (
            lambda x, w: rj.cross_entropy(jnp.ones((9, 2, 3)), jnp.zeros((9, 2), int), per="sample",
                                          sample_weight=jnp.ones((9, 2))),
            ValueError,
            "sample_weight must have the shape",
        ),
        (
            lambda x, w: rj.cross_entropy(jnp.ones((9, 3)), jnp.zeros(9, int), backend="rust",
                                          weighting=rgd.Pointwise(lambda losses: losses)),
            ValueError,
            "Pointwise.*no kernel",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("traced", [False, True])
def test_bad_input_is_refused_at_trace_time(call, error, match, traced):
    call = functools.partial(call, w=rgd.MovingAverage(rgd.KL(tau=0.8), decay=0.9))
    with pytest.raises(error, match=match):
        (jax.jit(call) if traced else call)(jnp.asarray(some_losses()))


def test_a_known_group_out_of_range_raises_and_a_traced_one_weighs_nan():
    weighting, losses = rgd.GroupDRO(groups=2, step_size=0.1), some_losses()
    with pytest.raises(ValueError, match=r"groups must lie in 0\.\.1"):
        rj.sample_weights(losses, weighting, groups=GROUPS, state=weighting.init())
    weights, *_ = step(losses, weighting, weighting.init(), GROUPS)
    np.testing.assert_array_equal(jnp.isnan(weights), GROUPS == 2)
    with pytest.raises(ValueError, match="give num_groups"):
        jax.jit(rj.weight_stats)(losses, losses, groups=GROUPS)
    with pytest.raises(ValueError, match="below num_groups=2, got 2"):
        rj.weight_stats(losses, losses, groups=GROUPS, num_groups=2)
    with pytest.raises(ValueError, match="integers >= 0, got -1"):
        rj.weight_stats(losses, losses, groups=GROUPS - 1)
