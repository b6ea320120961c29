"""What a call of the linear cross-entropy of JAX computes and holds, its transformations, and bad input."""

import re

import numpy as np
import pytest
import rgd
from rgd import reference

jax = pytest.importorskip("jax")
jnp = jax.numpy

import rgd.jax as rj  # noqa: E402
from x64 import enable_x64  # noqa: E402

ROWS, WIDTH, CLASSES = 13, 5, 7
THREE_ROWS = 3 * 8 * CLASSES
TOLERANCE = 20 * (ROWS + WIDTH + CLASSES + 16) * np.finfo(np.float64).eps


@pytest.fixture(autouse=True)
def float64():
    with enable_x64(True):
        yield


def layer():
    rng = np.random.default_rng(0)
    arrays = (jnp.asarray(rng.standard_normal(shape)) for shape in ((ROWS, WIDTH), (WIDTH, CLASSES)))
    return *arrays, jnp.asarray(rng.integers(0, CLASSES, ROWS)).at[1].set(-100)


def chunked(inputs, kernel, labels, **options):
    return rj.linear_cross_entropy(inputs, kernel, labels, chunk_bytes=THREE_ROWS, **options)


def whole(inputs, kernel, labels, **options):
    return rj.cross_entropy(inputs @ kernel, labels, backend="jnp", **options)


def same(actual, expected):
    def one(a, b):
        np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * np.abs(b).max(initial=0))

    jax.tree.map(one, actual, expected)


def products(function, *arguments):
    """How many matrix products a program holds, each loop counted once."""

    def count(jaxpr):
        found = 0
        for equation in jaxpr.eqns:
            found += equation.primitive.name == "dot_general"
            for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
                found += count(getattr(parameter, "jaxpr", parameter)) if is_jaxpr(parameter) else 0
        return found

    def is_jaxpr(value):
        return hasattr(getattr(value, "jaxpr", value), "eqns")

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 3),
        ({"weighting": rgd.Focal(2.0), "weight": np.ones(CLASSES)}, 3),
        ({"weighting": rgd.CVaR(0.5)}, 4),
        ({"per": "sample"}, 4),
        ({"reduction": "none"}, 4),
    ],
    ids=lambda value: "-".join(value) or "default" if isinstance(value, dict) else "",
)
def test_pointwise_weights_take_three_products_and_others_four(options, expected):
    inputs, kernel, labels = layer()

    def loss(inputs, kernel):
        return jnp.sum(chunked(inputs, kernel, labels, **options))

    assert products(loss, inputs, kernel) == 1
    assert products(jax.grad(loss, (0, 1)), inputs, kernel) == expected
    # A layer that is not trained, or inputs that need no gradient, save one product.
    assert products(jax.grad(loss, 0), inputs, kernel) == expected - 1
    assert products(jax.grad(loss, 1), inputs, kernel) == expected - 1
    assert products(lambda *given: jax.jvp(loss, given, given), inputs, kernel) == expected


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("reverse", {}),
        ("reverse", {"backend": "rust"}),
        ("reverse", {"reduction": "none"}),
        ("forward", {}),
        ("forward", {"reduction": "none"}),
    ],
    ids=str,
)
def test_no_array_of_all_logits_is_ever_made(mode, options):
    rows, width, classes = 512, 8, 1024
    shapes = (rows, width), (width, classes)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    arguments.append(jax.ShapeDtypeStruct((rows,), jnp.int32))
    chunk = 16 * 4 * classes

    def loss(inputs, kernel, labels):
        return jnp.sum(rj.linear_cross_entropy(inputs, kernel, labels, chunk_bytes=chunk, **options))

    def tangent(inputs, kernel, labels):
        return jax.jvp(lambda *given: loss(*given, labels), (inputs, kernel), (inputs, kernel))

    step = jax.value_and_grad(loss, (0, 1)) if mode == "reverse" else tangent
    compiled = jax.jit(step).lower(*arguments).compile()
    assert f"f32[{rows},{classes}]" not in compiled.as_text()
    assert f"f32[16,{classes}]" in compiled.as_text()
    # Two sums of the kernel's size, the inputs' gradient, and some arrays of a chunk's size.
    allowed = 4 * (2 * width * classes + 4 * rows * width) + 4 * chunk
    assert compiled.memory_analysis().temp_size_in_bytes <= allowed
    assert allowed < rows * classes * 4 / 4


@pytest.mark.usefixtures("compiled_in_a_hurry")
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "none"}, {"weighting": rgd.KL(2.0, normalize=True)}, {"backend": "rust"}],
    ids=lambda options: "-".join(options) or "default",
)
def test_every_transformation_gives_what_it_gives_for_the_logits(options):
    inputs, kernel, labels = layer()
    pair = jnp.stack([inputs, 2 * inputs]), jnp.stack([kernel, jnp.cos(kernel)])

    def loss(inputs, kernel):
        return jnp.sum(chunked(inputs, kernel, labels, **options))

    def scanned(inputs, kernel):
        return jax.lax.scan(lambda sums, _: (sums + loss(inputs, kernel), None), 0.0, length=2)[0]

    def of_both(inputs, kernel):
        return jnp.sum(jax.vmap(loss, (0, None))(inputs, kernel))

    gradient = jax.grad(loss, (0, 1))

    @jax.jit
    def transformed(inputs, kernel):
        return {
            "vmap": jax.vmap(gradient)(*pair),
            "vmap of the inputs": jax.vmap(gradient, (0, None))(pair[0], kernel),
            "vmap of the kernel": jax.vmap(gradient, (None, 0))(inputs, pair[1]),
            "of a vmap": jax.grad(of_both, (0, 1))(pair[0], kernel),
            "remat": jax.grad(jax.checkpoint(loss), (0, 1))(inputs, kernel),
            "scan": jax.grad(scanned, (0, 1))(inputs, kernel),
        }

    @jax.jit
    def of_logits(inputs, kernel):
        plain = {key: value for key, value in options.items() if key != "backend"}
        return jax.grad(lambda *given: jnp.sum(whole(*given, labels, **plain)), (0, 1))(inputs, kernel)

    def of_points(*points):
        return jax.tree.map(lambda *x: jnp.stack(x), *(of_logits(*point) for point in points))

    once = of_logits(inputs, kernel)
    d_inputs, d_kernel = of_points((pair[0][0], kernel), (pair[0][1], kernel))
    same(gradient(inputs, kernel), once)
    same(
        transformed(inputs, kernel),
        {
            "vmap": of_points((pair[0][0], pair[1][0]), (pair[0][1], pair[1][1])),
            "vmap of the inputs": (d_inputs, d_kernel),
            "vmap of the kernel": of_points((inputs, pair[1][0]), (inputs, pair[1][1])),
            "of a vmap": (d_inputs, jnp.sum(d_kernel, axis=0)),
            "remat": once,
            "scan": jax.tree.map(lambda x: 2 * x, once),
        },
    )


@pytest.mark.usefixtures("compiled_in_a_hurry")
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"backend": "rust"}], ids=str)
def test_second_derivatives_are_those_of_the_logits(options):
    inputs, kernel, labels = layer()
    direction = jnp.cos(jnp.arange(kernel.size, dtype=kernel.dtype)).reshape(kernel.shape)
    plain = {key: value for key, value in options.items() if key != "backend"}

    def products_with(function, options):
        def loss(kernel):
            return jnp.sum(jnp.sin(function(inputs, kernel, labels, **options)))

        def slope(kernel):
            return jnp.vdot(jax.grad(loss)(kernel), direction)

        return jax.jit(lambda k: (jax.grad(slope)(k), jax.jvp(jax.grad(loss), (k,), (direction,))[1]))(kernel)

    expected = products_with(whole, plain)
    same(products_with(chunked, options), expected)


@pytest.mark.usefixtures("compiled_in_a_hurry")
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "none", "z_loss": 0.1}, {"weighting": rgd.CVaR(0.5), "label_smoothing": 0.1}],
    ids=lambda options: "-".join(options) or "default",
)
def test_forward_mode_gives_what_it_gives_for_the_logits(options):
    inputs, kernel, labels = layer()
    bias = jnp.sin(jnp.arange(CLASSES * 1.0))
    moves = jnp.cos(jnp.arange(inputs.size * 1.0)).reshape(inputs.shape), jnp.sin(kernel), jnp.cos(bias)

    def results(function):
        def of_bias(bias):
            return function(inputs, kernel, bias)

        def along(kernel):
            return jax.jvp(lambda *given: function(*given, bias), (inputs, kernel), moves[:2])

        @jax.jit
        def computed(inputs, kernel, bias):
            value, tangent_of = jax.linearize(function, inputs, kernel, bias)
            return {
                "jvp": jax.jvp(function, (inputs, kernel, bias), moves),
                "linearize": (value, tangent_of(*moves)),
                "jacfwd": jax.jacfwd(of_bias)(bias),
                "jacrev": jax.jacrev(of_bias)(bias),
                "vmap": jax.vmap(along)(jnp.stack([kernel, jnp.cos(kernel)])),
                "forward over forward": jax.jvp(lambda k: along(k)[1], (kernel,), moves[1:2])[1],
                "reverse over forward": jax.grad(lambda k: jnp.sum(jnp.sin(along(k)[1])))(kernel),
            }

        return computed(inputs, kernel, bias)

    def in_chunks(inputs, kernel, bias):
        return chunked(inputs, kernel, labels, bias=bias, logit_softcap=2.0, **options)

    def of_logits(inputs, kernel, bias):
        logits = 2.0 * jnp.tanh((inputs @ kernel + bias) / 2.0)
        return rj.cross_entropy(logits, labels, backend="jnp", **options)

    actual, expected = results(in_chunks), results(of_logits)
    same(actual, expected)
    same(actual["jacfwd"], actual["jacrev"])


@pytest.mark.usefixtures("compiled_in_a_hurry")
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}], ids=str)
def test_tangents_of_ignored_rows_reach_no_tangent(options):
    inputs, kernel, labels = layer()

    @jax.jit
    def tangent(held):
        at, along = (x.at[1].set(held) for x in (inputs, jnp.cos(inputs)))

        def of_kernel(kernel):
            return jax.jvp(lambda x: jnp.sum(chunked(x, kernel, labels, **options)), (at,), (along,))[1]

        return jax.value_and_grad(of_kernel)(kernel)

    jax.tree.map(np.testing.assert_array_equal, tangent(jnp.nan), tangent(0.0))


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}], ids=str)
def test_calls_outside_of_jit_compile_once(options, caplog):
    inputs, kernel, labels = layer()
    inputs = jnp.concatenate([inputs, inputs])  # of a size that no other test has compiled for
    labels = jnp.concatenate([labels, labels])
    step = jax.value_and_grad(lambda head: jnp.sum(chunked(inputs, head, labels, **options)))

    def compilations():
        caplog.clear()
        with jax.log_compiles():
            step(kernel)
        started = [record.getMessage() for record in caplog.records]
        return [text for text in started if text.startswith("Compiling") and "compiled_once" in text]

    assert compilations()
    assert not compilations()


def test_a_schedule_of_settings_compiles_once():
    inputs, kernel, labels = layer()
    step = jax.jit(lambda weighting: chunked(inputs, kernel, labels, weighting=weighting))
    for tau in (0.5, 1.0, 2.0):
        same(step(rgd.KL(tau)), whole(inputs, kernel, labels, tau=tau))
    assert step._cache_size() == 1


@pytest.mark.usefixtures("compiled_in_a_hurry")
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"weight": np.ones(2)}], ids=str)
def test_classes_may_be_spread_over_a_mapped_axis(options):
    """`jax.vmap` stands for the devices; test_jax_linear_devices.py asks real ones."""
    inputs, _, labels = layer()
    kernel = jnp.cos(jnp.arange(WIDTH * 6.0)).reshape(WIDTH, 6)
    labels = jnp.where(labels > 5, 0, labels)
    whole_options = {**options, "weight": np.ones(6)} if "weight" in options else options

    def spread(inputs, kernel):
        slices = jnp.moveaxis(kernel.reshape(WIDTH, 3, 2), 1, 0)
        call = jax.vmap(
            lambda head: chunked(inputs, head, labels, vocab_axis_name="classes", **options),
            axis_name="classes",
        )
        return jnp.sum(call(slices)[0])

    def expected(inputs, kernel):
        return jnp.sum(whole(inputs, kernel, labels, **whole_options))

    same(*(jax.jit(jax.value_and_grad(f, (0, 1)))(inputs, kernel) for f in (spread, expected)))


def test_the_value_is_that_of_the_reference():
    inputs, kernel, labels = layer()
    logits = np.asarray(inputs @ kernel)
    expected = reference.cross_entropy(logits, np.asarray(labels), weighting=rgd.KL(1.0))
    same(chunked(inputs, kernel, labels), expected)


def test_the_rust_kernel_is_chosen_by_size_and_only_on_the_cpu():
    def arguments(rows, classes):
        shapes = ((rows, 8), jnp.float32), ((8, classes), jnp.float32), ((rows,), jnp.int32)
        return [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    def text(sizes, *, platform="cpu", **options):
        step = jax.jit(jax.value_and_grad(lambda *a: jnp.sum(rj.linear_cross_entropy(*a, **options))))
        return step.trace(*arguments(*sizes)).lower(lowering_platforms=(platform,)).as_text()

    name, large = "rgd_cross_entropy", (1024, 4096)
    assert name in text(large)
    assert name in text((13, 7), backend="rust")
    assert name not in text((13, 7))
    assert name not in text(large, backend="jnp")
    assert name not in text(large, weighting=rgd.CVaR(0.5))
    assert name not in text(large, weight=np.ones(4096))
    assert name not in text(large, platform="cuda")
    assert name not in text(large, platform="cuda", backend="rust")


INPUTS, KERNEL, LABELS = np.ones((4, 3, 2)), np.ones((2, 5)), np.zeros((4, 3), int)
BAD = [
    ({"inputs": np.ones(())}, ValueError, r"inputs must have shape (N, D) or (B, T, D), got ()"),
    ({"inputs": np.ones((4, 3, 2), int)}, TypeError, "inputs must be floating, got int"),
    ({"kernel": np.ones((2, 5), int)}, TypeError, "kernel must be floating, got int"),
    ({"bias": np.ones(5, int)}, TypeError, "bias must be floating, got int"),
    ({"kernel": np.ones(2)}, ValueError, "kernel must have shape (D, C) with at least one class, got (2,)"),
    ({"kernel": np.ones((2, 0))}, ValueError, "kernel must have shape (D, C) with at least one class"),
    (
        {"kernel": np.ones((5, 2))},
        ValueError,
        "for inputs of shape (4, 3, 2), got (5, 2); an embedding, (C, D), goes in as embedding.T",
    ),
    ({"bias": np.ones(4)}, ValueError, "bias must have one entry a class, shape (5,)"),
    (
        {"labels": np.zeros(4, int)},
        ValueError,
        "labels must have the inputs' shape without the last axis, (4, 3)",
    ),
    ({"labels": np.zeros((4, 3))}, TypeError, "labels must be class indices, integers, got float64"),
    ({"labels": np.full((4, 3), 5)}, IndexError, "label 5 at position [0, 0] is out of range for 5 classes"),
    ({"weight": np.ones(4)}, ValueError, "weight must have one entry a class, shape (5,)"),
    ({"where": np.ones((4, 2), bool)}, ValueError, "where must broadcast"),
    ({"sample_weight": np.ones(3)}, ValueError, "sample_weight must have the shape"),
    ({"groups": np.ones(4)}, TypeError, "groups must be an array of integers"),
    ({"reduction": "average"}, ValueError, "reduction must be"),
    ({"per": "token"}, ValueError, "per must be"),
    ({"backend": "cuda"}, ValueError, "backend must be"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be in [0, 1]"),
    (
        {"chunk_bytes": 0},
        ValueError,
        "chunk_bytes must be a positive integer, bytes of logits, or None, got 0",
    ),
    ({"chunk_bytes": 1.5}, ValueError, "chunk_bytes must be a positive integer"),
    ({"logit_softcap": 0.0}, ValueError, "logit_softcap must be a positive number or None, got 0.0"),
    ({"accumulate_dtype": int}, TypeError, "accumulate_dtype must be a floating dtype, got int"),
    ({"tau": 1.0, "weighting": rgd.KL()}, ValueError, "tau"),
    ({"weighting": rgd.GroupDRO(2, 0.1)}, ValueError, "state"),
    ({"axis_name": "data"}, ValueError, "axis_name='data' is not bound here"),
    (
        {"vocab_axis_name": "classes"},
        ValueError,
        "vocab_axis_name='classes' is not bound here: call this inside a jax.shard_map",
    ),
    (
        {"inputs": np.ones((4, 2)), "labels": np.zeros(4, int), "shift": True},
        ValueError,
        "shift=True is for inputs of shape (B, T, D), got (4, 2)",
    ),
    (
        {"backend": "rust", "per": "sample"},
        ValueError,
        "backend='rust' cannot serve reduction='mean' with per=",
    ),
    ({"backend": "rust", "weight": np.ones(5)}, ValueError, "backend='rust' cannot serve class weights"),
    ({"backend": "rust", "weighting": rgd.CVaR(0.5)}, ValueError, "weights depend on the whole batch"),
    ({"backend": "rust", "weighting": rgd.Pointwise(abs)}, ValueError, "which has no kernel"),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_bad_input_is_refused_with_the_argument_named(given, error, message):
    arguments = {"inputs": INPUTS, "kernel": KERNEL, "labels": LABELS, **given}
    with pytest.raises(error, match=re.escape(message)):
        rj.linear_cross_entropy(**arguments)


def test_one_axis_cannot_hold_both_rows_and_classes():
    def call(head):
        return rj.linear_cross_entropy(INPUTS, head, LABELS, axis_name=("a",), vocab_axis_name="a")

    with pytest.raises(ValueError, match="'a' is in both: leave it out of axis_name"):
        jax.vmap(call, axis_name="a")(KERNEL[None])
