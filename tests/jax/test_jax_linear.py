"""The cross-entropy of a linear layer in JAX: equal to that of its logits, which never exist all at once.

What it should equal is computed from all logits by torch operations, which have nothing to compile.

Thirteen rows fill no chunk of three; five numbers a row, seven classes: no axis can stand in for another. In
float64 a tolerance is eps times the roundings of the sums over rows, numbers and classes; exponents and roots
magnify them by at most 20 here.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import rgd
import torch
from family import MEMBERS, label
from rgd.torch import cross_entropy

jax = pytest.importorskip("jax")
jnp = jax.numpy

import rgd.jax as rj  # noqa: E402
from x64 import enable_x64  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")

ROWS, WIDTH, CLASSES = 13, 5, 7
ROW_BYTES = 8 * CLASSES
CHUNKS = {"one row": 1, "three rows": 3 * ROW_BYTES, "all rows": 1 << 20}
TOLERANCE = 20 * (ROWS + WIDTH + CLASSES + 16) * np.finfo(np.float64).eps


@pytest.fixture(autouse=True)
def float64():
    with enable_x64(True):
        yield


def layer(rows=(ROWS,), dtype="float64", width=WIDTH, classes=CLASSES, seed=0):
    """Inputs, kernel, bias and labels; one label does not count."""
    rng = np.random.default_rng(seed)
    shapes = (*rows, width), (width, classes), (classes,)
    arrays = [jnp.asarray(rng.standard_normal(shape)).astype(dtype) for shape in shapes]
    labels = jnp.asarray(rng.integers(0, classes, rows))
    return *arrays, labels.reshape(-1).at[1].set(-100).reshape(rows) if labels.size > 1 else labels


def of_logits(given, *, logit_softcap=None, chunk_bytes=0, backend="jnp", **options):
    """What `derivative` of the function under test equals, made from all logits by torch."""
    del chunk_bytes, backend
    *operands, labels = (torch.tensor(np.asarray(x)) for x in given)
    options = {
        key: torch.tensor(np.asarray(x)) if isinstance(x, np.ndarray | jax.Array) else x
        for key, x in options.items()
    }
    inputs, kernel, *bias = (x.requires_grad_() for x in operands)
    logits = inputs @ kernel + sum(bias)
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    with rgd.torch.backend("composite"):
        result = cross_entropy(logits.movedim(-1, 1) if logits.dim() > 1 else logits, labels, **options)
    values, state = result if isinstance(result, tuple) else (result, None)
    factors = torch.sin(1 + torch.arange(values.numel(), dtype=values.dtype))
    objective = (values * factors.view(values.shape)).sum()
    gradients = torch.autograd.grad(objective, operands)
    return jax.tree.map(lambda x: np.asarray(x.detach()), ((objective, state), gradients))


def whole(inputs, kernel, labels, bias, **options):
    """The same made by jnp, for programs that do more than call the function."""
    return rj.cross_entropy(inputs @ kernel + bias, labels, backend="jnp", **options)


def total(result):
    """One number in which every loss has a factor of its own; and the state."""
    values, state = result if isinstance(result, tuple) else (result, None)
    factors = jnp.sin(1 + jnp.arange(values.size, dtype=values.dtype))
    return jnp.sum(values * factors.reshape(values.shape)), state


def program(function, labels, options):
    """Compiled: from inputs, kernel and bias to the value, the state, and the gradients of the three."""

    def objective(operands):
        inputs, kernel, *bias = operands
        return total(function(inputs, kernel, labels, *bias, **options))

    return jax.jit(jax.value_and_grad(objective, has_aux=True))


def derivative(function, given, options):
    *operands, labels = given
    return program(function, labels, options)(tuple(operands))


def check(given, tolerance=TOLERANCE, **options):
    """Both ways give the same value, state and gradients."""
    same(derivative(rj.linear_cross_entropy, given, options), of_logits(given, **options), tolerance)


def same(actual, expected, tolerance=TOLERANCE):
    def one(a, b):
        a, b = jnp.asarray(a), jnp.asarray(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)

    jax.tree.map(one, actual, expected)


@dataclasses.dataclass(frozen=True)
class Softer(rgd.Weighting):
    power: float = 0.5
    pointwise = True

    def weights(self, batch):
        return (1 + batch.losses) ** self.power


@dataclasses.dataclass(frozen=True)
class Powers(rgd.Weighting):
    """A setting that cannot be a key of a cache."""

    powers: list
    pointwise = True

    def weights(self, batch):
        return sum((1 + batch.losses) ** power for power in self.powers)


@jax.jit
def with_weighting(given, weighting):
    """One program for each kind of weighting: their numbers are arguments."""
    return derivative(
        rj.linear_cross_entropy, given, {"weighting": weighting, "chunk_bytes": CHUNKS["three rows"]}
    )


@pytest.mark.parametrize("weighting", [*MEMBERS, Softer()], ids=label)
def test_every_member_gives_what_it_gives_for_the_logits(weighting):
    given = layer()
    same(with_weighting(given, weighting), of_logits(given, weighting=weighting))


def test_a_member_that_cannot_be_hashed_gives_what_it_gives_for_the_logits():
    check(layer(), weighting=Powers([0.5, 1.0]), chunk_bytes=CHUNKS["three rows"])


GROUPS = np.arange(ROWS) % 3
MASS = np.array([1.0, 2.5, 0, 3, 1, 1, 1, 0, 0.5, 1, 2, 1, 1])
CLASS_WEIGHT = np.linspace(0.5, 2.0, CLASSES)
ADJUSTMENT = np.linspace(-1.0, 1.0, CLASSES)
OPTIONS = [
    {},
    {"reduction": "sum", "tau": 0.3},
    {"reduction": "none", "label_smoothing": 0.2},
    {"weight": CLASS_WEIGHT},
    {"weight": CLASS_WEIGHT, "label_smoothing": 0.2, "sample_weight": MASS},
    {"weight": CLASS_WEIGHT, "label_smoothing": 1.0, "weighting": rgd.CVaR(0.4)},
    {"ignore_index": 3, "where": np.arange(ROWS) != 1, "label_smoothing": 0.2},
    {"logit_softcap": 1.5, "sample_weight": MASS, "label_smoothing": 0.1},
    {"logit_softcap": 1.5, "weighting": rgd.KLBall(0.2), "reduction": "sum"},
    {"logit_adjustment": ADJUSTMENT, "weight": CLASS_WEIGHT, "label_smoothing": 0.2},
    {"logit_adjustment": ADJUSTMENT, "logit_softcap": 1.5, "weighting": rgd.KLBall(0.2)},
    {"weighting": rgd.GroupDRO(3, 0.1), "groups": GROUPS, "state": rgd.GroupDRO(3, 0.1).init()},
    {
        "weighting": rgd.MovingAverage(rgd.KL(), 0.9),
        "sample_weight": MASS,
        "state": rgd.MovingAverage(rgd.KL(), 0.9).init(),
    },
]


def named(options):
    return "-".join(options) or "default"


def over_chunks(all_options):
    """Each with the loop that has a rest, and with one of the loops of one row and of one turn."""
    extremes = itertools.cycle(["one row", "all rows"])
    pairs = [(options, chunk) for options in all_options for chunk in ("three rows", next(extremes))]
    return pytest.mark.parametrize(
        ("options", "chunk"), [pytest.param(*pair, id=f"{named(pair[0])}-{pair[1]}") for pair in pairs]
    )


@over_chunks(OPTIONS)
def test_every_option_gives_what_it_gives_for_the_logits(options, chunk):
    given = layer()
    if "where" in options:
        given = (*given[:3], jnp.where(given[3] < 0, 0, given[3]))
    check(given, chunk_bytes=CHUNKS[chunk], **options)


@over_chunks(
    [
        {},
        {"label_smoothing": 0.2, "sample_weight": MASS, "weighting": rgd.KL(scale=-0.5)},
        {"logit_softcap": 1.5, "reduction": "sum", "weighting": rgd.ERM()},
        {"logit_softcap": 1.5, "logit_adjustment": ADJUSTMENT},
    ]
)
def test_the_rust_kernel_gives_the_same(options, chunk):
    check(layer(), chunk_bytes=CHUNKS[chunk], backend="rust", **options)


@pytest.mark.parametrize("per", ["element", "sample"])
def test_sequences_are_weighted_by_element_or_by_sample(per):
    for reduction in ("mean", "none"):
        check(layer((4, 3)), per=per, reduction=reduction, chunk_bytes=CHUNKS["three rows"])
    mass = jnp.array([1, 0, 2, 1])
    check(layer((4, 3)), per=per, sample_weight=mass, weighting=rgd.KLBall(0.3))
    state = rgd.GroupDRO(2, 0.1).init()
    groups = jnp.array([0, 1, 1, 0])
    check(layer((4, 3)), per=per, groups=groups, weighting=rgd.GroupDRO(2, 0.1), state=state)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 2)], ids=str)
def test_inputs_may_have_any_leading_axes(shape):
    check(layer(shape), chunk_bytes=CHUNKS["three rows"])


def test_a_layer_without_bias_has_the_gradients_of_one_of_zeros():
    inputs, kernel, _, labels = layer()
    check((inputs, kernel, labels), chunk_bytes=CHUNKS["three rows"])


@pytest.mark.parametrize("per", ["element", "sample"])
def test_shift_lets_each_position_predict_the_next_label(per):
    inputs, kernel, bias, labels = layer((3, 4))
    where = jnp.arange(12).reshape(3, 4) % 5 != 0
    mass = jnp.arange(12.0).reshape(3, 4) if per == "element" else jnp.array([1.0, 2.0, 0.5])
    options = {"weighting": rgd.KL(2.0, normalize=True), "per": per, "reduction": "none"}
    shifted = derivative(
        rj.linear_cross_entropy,
        (inputs, kernel, bias, labels),
        {
            "shift": True,
            "where": where,
            "sample_weight": mass,
            "chunk_bytes": CHUNKS["three rows"],
            **options,
        },
    )

    def by_hand(inputs, kernel, labels, bias):
        result = whole(
            inputs[:, :-1],
            kernel,
            labels[:, 1:],
            bias,
            where=where[:, 1:],
            sample_weight=mass[:, 1:] if per == "element" else mass,
            **options,
        )
        return jnp.pad(result, ((0, 0), (0, 1)))

    same(shifted, derivative(by_hand, (inputs, kernel, bias, labels), {}))


def test_shift_moves_groups_with_their_labels():
    inputs, kernel, bias, labels = layer((3, 4))
    groups = jnp.arange(12).reshape(3, 4) % 2
    weighting = rgd.GroupDRO(2, 0.5)
    options = {"weighting": weighting, "state": weighting.init()}
    given = inputs, kernel, bias, labels
    actual, _ = derivative(rj.linear_cross_entropy, given, {"groups": groups, "shift": True, **options})
    shifted = inputs[:, :-1], kernel, bias, labels[:, 1:]
    expected, _ = of_logits(shifted, groups=groups[:, 1:], **options)
    same(actual, expected)


@pytest.mark.parametrize("backend", ["jnp", "rust"])
def test_float32_is_exact_to_a_millionth_of_the_norm(backend):
    """Roundings of either sign add up to some 8 eps of a norm over thousands of numbers."""
    given = layer((200,), "float32", width=32, classes=600)
    wide = tuple(x.astype("float64") for x in given[:3]), given[3]
    options = {"chunk_bytes": 4 * 600 * 30}
    (value, _), gradients = derivative(rj.linear_cross_entropy, given, {"backend": backend, **options})
    (exact, _), wide_gradients = of_logits((*wide[0], wide[1]))
    assert [g.dtype for g in gradients] == ["float32"] * 3
    same(
        (value.astype("float64"), [g.astype("float64") for g in gradients]),
        (exact, list(wide_gradients)),
        1e-6,
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"backend": "rust"}], ids=str)
def test_half_precision_differs_from_float32_by_the_rounding_of_gradients(dtype, options):
    given = layer((60,), dtype, width=16, classes=100)
    wide = (*(x.astype("float32") for x in given[:3]), given[3])
    options = {"chunk_bytes": 4 * 100 * 16, **options}
    (value, _), gradients = derivative(rj.linear_cross_entropy, given, options)
    (exact, _), wide_gradients = of_logits(wide, **options)
    # Logits and losses are computed in float32, from the same numbers.
    same(value, exact, 1e-6)
    for gradient, expected in zip(gradients, wide_gradients, strict=True):
        assert gradient.dtype == dtype
        # The gradient over the logits is rounded before the products, and their results once more.
        same(gradient.astype("float32"), expected, 2 * float(jnp.finfo(dtype).eps))


def test_small_gradients_of_float16_are_kept_until_the_loss_is_scaled():
    inputs, kernel, bias, labels = layer((60,), "float16", width=16, classes=100)

    def step(loss_scale, many):
        def objective(kernel):
            rows = jnp.tile(inputs, (many, 1)), kernel, jnp.tile(labels, many), bias
            return loss_scale * rj.linear_cross_entropy(*rows, chunk_bytes=1 << 14)

        return jax.jit(jax.grad(objective))(kernel).astype("float32")

    # Of 6000 rows a mean gives each a gradient below the smallest float16; the scale brings the sum back.
    same(step(2.0**10, 100), 2.0**10 * step(1.0, 1), 4 * float(jnp.finfo("float16").eps))


def test_the_kernels_gradient_is_summed_in_the_dtype_that_is_asked_for():
    inputs, kernel, _, labels = layer((64,), "bfloat16", width=16, classes=50)
    exact = jax.grad(lambda head: rj.linear_cross_entropy(inputs, head, labels))(kernel.astype("float32"))

    def error(dtype):
        def loss(head):
            return rj.linear_cross_entropy(inputs, head, labels, chunk_bytes=1, accumulate_dtype=dtype)

        return np.linalg.norm(np.asarray(jax.grad(loss)(kernel).astype("float32") - exact))

    assert error(None) == error("float32")
    assert 3 * error(None) < error("bfloat16")


@pytest.mark.parametrize("mask", ["ignore_index", "where", "sample_weight"])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"backend": "rust"}], ids=str)
def test_what_ignored_rows_hold_reaches_no_result(mask, options):
    inputs, kernel, bias, labels = layer()
    counted = np.arange(ROWS) != 4
    options = {"chunk_bytes": CHUNKS["three rows"], **options}
    if mask == "ignore_index":
        labels = jnp.where(counted, labels, -100)
    else:
        options[mask] = counted if mask == "where" else counted.astype(float)
    step = program(rj.linear_cross_entropy, labels, options)
    results = [step((inputs.at[4].set(held), kernel, bias)) for held in (0.0, jnp.nan, jnp.inf)]
    assert np.isfinite(results[0][1][1]).all()
    jax.tree.map(np.testing.assert_array_equal, results[1], results[0])
    jax.tree.map(np.testing.assert_array_equal, results[2], results[0])
    np.testing.assert_array_equal(results[1][1][0][4], 0)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"backend": "rust"}], ids=str)
@pytest.mark.parametrize("rows", [0, 5])
def test_no_target_that_counts_gives_nan_or_zeros_and_gradients_of_zero(rows, options):
    inputs, kernel, bias, _ = layer((rows,))
    given = inputs, kernel, bias, jnp.full(rows, -100)
    (value, _), gradients = derivative(rj.linear_cross_entropy, given, options)
    assert value == 0 if "reduction" in options else jnp.isnan(value)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"backend": "rust"}], ids=str)
def test_a_label_out_of_range_raises_and_under_jit_makes_its_row_nan(options):
    inputs, kernel, bias, labels = layer()
    labels = labels.at[7].set(CLASSES)
    with pytest.raises(IndexError, match=r"label 7 at position \[7\] is out of range for 7 classes"):
        rj.linear_cross_entropy(inputs, kernel, labels, bias, **options)
    function = jax.jit(lambda x, y: total(rj.linear_cross_entropy(x, kernel, y, bias, **options))[0])
    value, gradient = jax.value_and_grad(function)(inputs, labels)
    assert jnp.isnan(value)
    np.testing.assert_array_equal(
        np.isnan(gradient), np.broadcast_to(np.arange(ROWS)[:, None] == 7, gradient.shape)
    )


def test_an_infinite_loss_of_weight_zero_adds_nothing():
    inputs, kernel, _, labels = layer()
    bias = jnp.zeros(CLASSES).at[3].set(-jnp.inf)
    labels = labels.at[5].set(3)

    def drop(losses):
        return jnp.where(losses > 1e9, 0.0, 1 + losses)

    given, weighting = (inputs, kernel, bias, labels), rgd.Pointwise(drop)
    options = {"weighting": weighting, "chunk_bytes": CHUNKS["three rows"]}
    value, gradients = derivative(rj.linear_cross_entropy, given, options)
    same((value, gradients), derivative(whole, given, {"weighting": weighting}))
    assert np.isfinite(value[0])
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("backend", ["jnp", "rust"])
def test_numbers_may_be_traced_and_one_that_is_not_allowed_gives_nan(backend):
    inputs, kernel, bias, labels = layer()

    @jax.jit
    def step(tau):
        return jax.value_and_grad(
            lambda head: rj.linear_cross_entropy(inputs, head, labels, bias, tau=tau, backend=backend)
        )(kernel)

    expected = jax.jit(jax.value_and_grad(lambda head: whole(inputs, head, labels, bias, tau=2.0)))(kernel)
    same(step(2.0), expected)
    value, gradient = step(-1.0)
    assert jnp.isnan(value)
    assert jnp.isnan(gradient).all()
    taus = jnp.array([0.5, 1.0, 2.0])
    same(jax.vmap(step)(taus), jax.tree.map(lambda *x: jnp.stack(x), *map(step, taus)))
