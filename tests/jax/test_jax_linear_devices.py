"""The linear cross-entropy with rows, classes or both spread over devices: equal to one device.

Devices are made when the backend starts, so a process of its own has four, which all meshes are made of.
"""

import pytest

pytest.importorskip("jax")

from devices import outcomes_on_four_devices

PROGRAM = """
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec as P

import rgd, rgd.jax as rj

jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(0)
inputs, kernel, bias = (jnp.asarray(rng.standard_normal(shape)) for shape in ((12, 4), (4, 6), (6,)))
labels = jnp.asarray(rng.integers(0, 6, 12)).at[3].set(-100)
weight = jnp.linspace(0.5, 2.0, 6)
where = jnp.arange(12) % 5 != 2
operands = inputs, kernel, bias
specs = P("data"), P(None, "classes"), P("classes")
rest, rest_specs = (weight, labels, where), (P("classes"), P("data"), P("data"))
average = rgd.MovingAverage(rgd.KL(), 0.9)
# Sums of 12 rows, 4 numbers and 6 classes in float64, magnified by at most 20: see tests/test_jax_linear.py
tolerance = 20 * (12 + 4 + 6 + 16) * np.finfo(float).eps

def same(actual, expected):
    def one(a, b):
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), (a, b)
    jax.tree.map(one, actual, expected)

def whole(operands, weight, labels, where, logit_softcap=None, **options):
    inputs, kernel, bias = operands
    logits = inputs @ kernel + bias
    if logit_softcap is not None:
        logits = logit_softcap * jnp.tanh(logits / logit_softcap)
    return rj.cross_entropy(logits, labels, weight, where=where, **options)

def chunked(operands, weight, labels, where, **options):
    inputs, kernel, bias = operands
    return rj.linear_cross_entropy(
        inputs, kernel, labels, bias, weight=weight, where=where, chunk_bytes=200,
        axis_name="data", vocab_axis_name="classes", **options)

CASES = [{"label_smoothing": 0.1}, {"weighting": rgd.KLBall(0.3), "reduction": "sum", "logit_softcap": 2.0},
         {"weighting": average, "state": average.init()}, {"reduction": "none"}]

def summed(function, options):
    none = options.get("reduction") == "none"
    def objective(operands, *rest):
        result = function(operands, *rest, **options)
        return jnp.sum(result * jnp.cos(jnp.arange(12.0))) if none else result
    return objective

EXPECTED = [jax.jit(jax.value_and_grad(summed(whole, options), has_aux="state" in options))(operands, *rest)
            for options in CASES]

def spread_over(data, classes):
    mesh = Mesh(np.array(jax.devices()[:data * classes]).reshape(data, classes), ("data", "classes"))
    # Two axes meet each case in every way, the others in half of the ways each.
    every = data > 1 < classes
    for number, (options, expected) in enumerate(zip(CASES, EXPECTED, strict=True), start=data):
        none, has_aux = options.get("reduction") == "none", "state" in options
        out = P("data") if none else P()
        step = {"has_aux": has_aux}
        for check in (True,) if has_aux else (True, False) if every else (number % 2 == 0,):
            # The gradient of the sharded function ...
            sharded = jax.shard_map(
                lambda *a, options=options: chunked(*a, **options), mesh=mesh, check_vma=check,
                in_specs=(specs, *rest_specs), out_specs=(out, P()) if has_aux else out)
            objective = summed(lambda *a, sharded=sharded, **_: sharded(*a), options)
            same(jax.jit(jax.value_and_grad(objective, **step))(operands, *rest), expected)
        # ... and the gradient inside, where an input of every class's device has the gradient of all classes.
        if none:
            continue
        inside = jax.value_and_grad(lambda *a, options=options: chunked(*a, **options), **step)
        for function in (inside,) if has_aux or not every else (inside, jax.value_and_grad(
                jax.checkpoint(lambda *a, options=options: chunked(*a, **options)))):
            spread = jax.shard_map(function, mesh=mesh, in_specs=(specs, *rest_specs),
                                   out_specs=((P(), P()) if has_aux else P(), specs))
            same(jax.jit(spread)(operands, *rest), expected)

def rows_alone():
    # The kernel is the same on all devices: its gradient is that of all rows.
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    of_logits = jax.value_and_grad(lambda *a: rj.cross_entropy(a[0] @ a[1], labels), (0, 1))
    expected = jax.jit(of_logits)(inputs, kernel)
    for backend in ("jnp", "rust"):
        def step(inputs, kernel, labels):
            return jax.value_and_grad(lambda *a: rj.linear_cross_entropy(
                *a, labels, axis_name="data", chunk_bytes=200, backend=backend), (0, 1))(inputs, kernel)
        spread = jax.shard_map(step, mesh=mesh, in_specs=(P("data"), P(), P("data")),
                               out_specs=(P(), (P("data"), P())))
        same(jax.jit(spread)(inputs, kernel, labels), expected)

def forward_mode():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "classes"))
    moves = jax.tree.map(jnp.cos, operands)

    @jax.jit
    def tangents(operands):
        results = []
        for options in CASES[0], CASES[3]:
            sharded = jax.shard_map(
                lambda *a, options=options: chunked(*a, **options), mesh=mesh, in_specs=(specs, *rest_specs),
                out_specs=P("data") if "reduction" in options else P())
            results.append([jax.jvp(lambda one, f=f: f(one, *rest), (operands,), (moves,))
                            for f in (sharded, lambda *a, options=options: whole(*a, **options))])
        return results

    for actual, expected in tangents(operands):
        same(actual, expected)

def segments_of_rows():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "classes"))
    numbers = jnp.asarray([[0, 0, 1], [0, 1, 1], [-1, 0, 0], [1, 1, 1]])
    given = inputs.reshape(4, 3, 4), kernel, labels.reshape(4, 3), numbers

    def of_units(inputs, kernel, labels, numbers, **axes):
        return rj.linear_cross_entropy(
            inputs, kernel, labels, per="sample", weighting=rgd.CVaR(0.4), segments=numbers, num_segments=2,
            shift=True, chunk_bytes=200, **axes)

    expected = jax.jit(jax.value_and_grad(of_units, (0, 1)))(*given)
    inside = jax.value_and_grad(
        lambda *a: of_units(*a, axis_name="data", vocab_axis_name="classes"), (0, 1))
    classes = P(None, "classes")
    spread = jax.shard_map(inside, mesh=mesh, in_specs=(P("data"), classes, P("data"), P("data")),
                           out_specs=(P(), (P("data"), classes)))
    same(jax.jit(spread)(*given), expected)

CHECKS = {f"{d} by {c}": lambda d=d, c=c: spread_over(d, c) for d, c in ((1, 3), (2, 2), (2, 1))}
CHECKS |= {"rows alone": rows_alone, "forward mode": forward_mode, "segments": segments_of_rows}
"""


@pytest.fixture(scope="module")
def outcomes():
    return outcomes_on_four_devices(PROGRAM)


MESHES = ["1 by 3", "2 by 2", "2 by 1", "rows alone", "forward mode", "segments"]


def test_every_mesh_of_the_program_is_asked_for(outcomes):
    assert set(outcomes) == set(MESHES)


@pytest.mark.parametrize("mesh", MESHES)
def test_rows_and_classes_may_be_spread_over_devices(outcomes, mesh):
    assert outcomes[mesh] == "equal"
