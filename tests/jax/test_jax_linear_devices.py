"""The linear cross-entropy with rows, classes or both spread over devices: equal to one device.

Devices are made when the backend starts, so each number of them is a process of its own.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("jax")

PROGRAM = """
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec as P

import rgd, rgd.jax as rj

jax.config.update("jax_enable_x64", True)
assert len(jax.devices()) == DATA * CLASSES
mesh = Mesh(np.array(jax.devices()).reshape(DATA, CLASSES), ("data", "classes"))
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

cases = [{"label_smoothing": 0.1}, {"weighting": rgd.KLBall(0.3), "reduction": "sum", "logit_softcap": 2.0},
         {"weighting": average, "state": average.init()}, {"reduction": "none"}]
for options in cases:
    none, has_aux = options.get("reduction") == "none", "state" in options
    out = P("data") if none else P()
    step = {"has_aux": has_aux}

    def summed(function, options=options):
        def objective(operands, *rest):
            result = function(operands, *rest, **options)
            return jnp.sum(result * jnp.cos(jnp.arange(12.0))) if none else result
        return objective

    expected = jax.value_and_grad(summed(whole), **step)(operands, *rest)
    for check in (True, False) if not has_aux else (True,):
        # The gradient of the sharded function ...
        sharded = jax.shard_map(
            lambda *a, options=options: chunked(*a, **options), mesh=mesh, check_vma=check,
            in_specs=(specs, *rest_specs), out_specs=(out, P()) if has_aux else out)
        objective = summed(lambda *a, sharded=sharded, **_: sharded(*a))
        same(jax.jit(jax.value_and_grad(objective, **step))(operands, *rest), expected)
    # ... and the gradient inside, where an input of every class's device has the gradient of all classes.
    if none:
        continue
    inside = jax.value_and_grad(lambda *a, options=options: chunked(*a, **options), **step)
    for function in (inside,) if has_aux else (inside, jax.value_and_grad(
            jax.checkpoint(lambda *a, options=options: chunked(*a, **options)))):
        spread = jax.shard_map(function, mesh=mesh, in_specs=(specs, *rest_specs),
                               out_specs=((P(), P()) if has_aux else P(), specs))
        same(jax.jit(spread)(operands, *rest), expected)

# Rows alone are spread, the kernel is the same on all devices: its gradient is that of all rows.
if CLASSES == 1:
    for backend in ("jnp", "rust"):
        def step(inputs, kernel, labels):
            return jax.value_and_grad(lambda *a: rj.linear_cross_entropy(
                *a, labels, axis_name="data", chunk_bytes=200, backend=backend), (0, 1))(inputs, kernel)
        spread = jax.shard_map(step, mesh=mesh, in_specs=(P("data"), P(), P("data")),
                               out_specs=(P(), (P("data"), P())))
        same(jax.jit(spread)(inputs, kernel, labels), jax.value_and_grad(
            lambda *a: rj.cross_entropy(a[0] @ a[1], labels), (0, 1))(inputs, kernel))
print("equal")
"""


@pytest.mark.parametrize(("data", "classes"), [(1, 2), (1, 3), (2, 2), (2, 1)])
def test_rows_and_classes_may_be_spread_over_devices(data, classes):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={data * classes}"
    # What is asked is which numbers come out: compiled in a hurry.
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment = {**os.environ, **quick, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    program = PROGRAM.replace("DATA", str(data)).replace("CLASSES", str(classes))
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "equal"
