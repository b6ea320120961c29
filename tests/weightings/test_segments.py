"""`segments=` in `rgd.jax` and `rgd.reference`, against the padded batch of the same sequences, in float64.

A tolerance is eps times the roundings of sums over the batch, magnified by exponents and roots by 20 at most.
"""

import numpy as np
import pytest
import rgd
from rgd import reference

jax = pytest.importorskip("jax")
jnp = jax.numpy

import rgd.jax as rj  # noqa: E402
from x64 import enable_x64  # noqa: E402

LENGTHS, WIDTH, CLASSES = (4, 9, 6), 5, 7
TOLERANCE = 20 * (sum(LENGTHS) + WIDTH + CLASSES) * np.finfo(np.float64).eps
RNG = np.random.default_rng(0)
INPUTS = [RNG.standard_normal((n, WIDTH)) for n in LENGTHS]
LABELS = [RNG.integers(0, CLASSES, n) for n in LENGTHS]
LABELS[1][2] = -100
KERNEL = 2 * RNG.standard_normal((WIDTH, CLASSES))
PACKED = np.concatenate(INPUTS)[None], np.concatenate(LABELS)[None]
SEGMENTS = np.repeat(np.arange(3), LENGTHS)[None]
PADDED = np.zeros((3, 9, WIDTH)), np.full((3, 9), -100)
for row, (x, y) in enumerate(zip(INPUTS, LABELS, strict=True)):
    PADDED[0][row, : len(y)], PADDED[1][row, : len(y)] = x, y
P = np.array([1.0, 0.25, 2.0])
MEMBERS = [rgd.KL(4.0), rgd.Focal(2.0), rgd.CVaR(0.5), rgd.KLBall(0.1)]


@pytest.fixture(autouse=True)
def float64():
    with enable_x64(True):
        yield


def close(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= TOLERANCE * np.linalg.norm(np.asarray(b))


def of_kernel(inputs, labels, way, **options):
    """The objective and the gradient of the kernel."""

    def objective(kernel):
        if way == "linear":
            return rj.linear_cross_entropy(
                inputs, kernel, labels, per="sample", chunk_bytes=5 * 8 * CLASSES, **options
            )
        if options.get("shift"):
            given = {name: value for name, value in options.items() if name != "shift"}
            if "segments" in given:
                numbers = given["segments"]
                given["segments"] = jnp.where(numbers[:, 1:] == numbers[:, :-1], numbers[:, 1:], -1)
            return rj.cross_entropy(inputs[:, :-1] @ kernel, labels[:, 1:], per="sample", **given)
        return rj.cross_entropy(inputs @ kernel, labels, per="sample", **options)

    return jax.value_and_grad(objective)(jnp.asarray(KERNEL))


@pytest.mark.parametrize("way", ["linear", "logits"])
@pytest.mark.parametrize("shift", [{}, {"shift": True}], ids=["", "shift"])
@pytest.mark.parametrize("weighting", MEMBERS, ids=str)
def test_a_packed_batch_is_the_padded_batch_of_the_same_sequences(weighting, shift, way):
    for extra in ({}, {"normalizer": 11.5, "z_loss": 0.03}):
        options = {"weighting": weighting, **shift, **extra}
        expected = of_kernel(*PADDED, "linear", **options)
        close(of_kernel(*PACKED, way, segments=SEGMENTS, **options), expected)
        compiled = jax.jit(lambda numbers, o=options: of_kernel(*PACKED, way, segments=numbers, **o))
        close(compiled(SEGMENTS), expected)
    expected = of_kernel(*PADDED, "linear", weighting=weighting, sample_weight=P)
    for p in (P[None], P[SEGMENTS]):
        close(of_kernel(*PACKED, way, segments=SEGMENTS, weighting=weighting, sample_weight=p), expected)


@pytest.mark.parametrize("weighting", MEMBERS, ids=str)
def test_the_reference_says_the_same(weighting):
    inputs, labels = PACKED
    logits = np.moveaxis(inputs @ KERNEL, -1, 1)
    for p in (None, P[None], P[SEGMENTS]):
        options = {"weighting": weighting, "per": "sample", "segments": SEGMENTS, "sample_weight": p}
        value, gradient = jax.value_and_grad(lambda z, o=options: rj.cross_entropy(z, labels, axis=1, **o))(
            jnp.asarray(logits)
        )
        close(value, reference.cross_entropy(logits, labels, **options))
        close(gradient, reference.cross_entropy_grad(logits, labels, **options))


def test_groups_and_states_are_of_the_segments():
    weighting, groups = rgd.GroupDRO(groups=2, step_size=0.5), np.array([1, 0, 1])
    options = {"weighting": weighting, "state": weighting.init(), "per": "sample"}
    expected = rj.cross_entropy(PADDED[0] @ KERNEL, PADDED[1], groups=groups, **options)
    inputs, labels = PACKED
    for given in (groups[None], groups[SEGMENTS]):
        logits = inputs @ KERNEL
        close(rj.cross_entropy(logits, labels, groups=given, segments=SEGMENTS, **options), expected)
        own = rj.linear_cross_entropy(inputs, KERNEL, labels, groups=given, segments=SEGMENTS, **options)
        close(own, expected)
        of_reference = np.moveaxis(logits, -1, 1)
        close(
            reference.cross_entropy(of_reference, labels, groups=given, segments=SEGMENTS, **options),
            expected,
        )


def test_over_mapped_axes_segments_are_weighted_within_the_whole_batch():
    inputs, labels = (
        np.concatenate([PADDED[0], PADDED[0][::-1]]),
        np.concatenate([PADDED[1], PADDED[1][::-1]]),
    )
    labels[4:] = np.where(labels[4:] >= 0, (labels[4:] + 1) % CLASSES, -100)
    numbers = np.broadcast_to(np.arange(9) // 5, (6, 9))
    options = {"per": "sample", "weighting": rgd.CVaR(0.5), "num_segments": 2}

    def part(x, y, s):
        return rj.linear_cross_entropy(x, KERNEL, y, segments=s, axis_name="data", **options)

    spread = jax.jit(jax.vmap(part, axis_name="data"))
    split = [one.reshape(3, 2, *one.shape[1:]) for one in (inputs, labels, numbers)]
    expected = rj.linear_cross_entropy(inputs, KERNEL, labels, segments=numbers, **options)
    close(spread(*split), np.full(3, expected))


def test_a_traced_number_that_is_not_allowed_gives_nan():
    inputs, labels = PACKED

    @jax.jit
    def step(numbers):
        return rj.linear_cross_entropy(inputs, KERNEL, labels, per="sample", segments=numbers, num_segments=3)

    assert np.isfinite(step(SEGMENTS))
    assert np.isnan(step(SEGMENTS + 1))
    assert np.isnan(step(SEGMENTS - 2))


def test_what_does_not_fit_is_refused():
    inputs, labels = PACKED
    by = {"per": "sample"}
    for error, message, segments, options in (
        (ValueError, 'segments are the units of per="sample"', SEGMENTS, {}),
        (ValueError, "num_segments goes with segments", None, {**by, "num_segments": 3}),
        (ValueError, "segments must have the labels' shape", SEGMENTS[0], by),
        (TypeError, "segments must be an array of integers", SEGMENTS.astype(float), by),
        (ValueError, "or -1 for a target that takes no part, got -2", SEGMENTS - 2, by),
        (ValueError, "below num_segments=2, .* got 2", SEGMENTS, {**by, "num_segments": 2}),
        (ValueError, "num_segments must be a positive integer", SEGMENTS, {**by, "num_segments": 0}),
        (ValueError, "sample_weight must be constant within a segment", SEGMENTS,
         {**by, "sample_weight": np.arange(19.0)[None]}),
        (ValueError, "groups must have the shape of the labels", SEGMENTS, {**by, "groups": np.ones(2, int)}),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            rj.linear_cross_entropy(inputs, KERNEL, labels, segments=segments, **options)
        with pytest.raises(error, match=message):
            rj.cross_entropy(inputs @ KERNEL, labels, segments=segments, **options)
