"""Two and four host devices give what one gives, and the sharded cross-entropy moves no logits between them.

Devices are made when the backend starts, so each number of them is a process of its own.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("jax")

PROGRAM = """
import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import rgd, rgd.jax as rj

devices = len(jax.devices())
assert devices == DEVICES
mesh = Mesh(np.array(jax.devices()), ("data",))
rng = np.random.default_rng(0)
losses = jnp.asarray(rng.gamma(1.0, 1.5, 24), jnp.float32)
logits = jnp.asarray(rng.standard_normal((24, 5)), jnp.float32)
labels = jnp.asarray(rng.integers(0, 5, 24)).at[3].set(-100).at[20].set(-100)
where = jnp.asarray(rng.random(24) < 0.7)
mass = jnp.asarray(rng.integers(0, 3, 24))
groups = jnp.arange(24) % 3

@dataclasses.dataclass(frozen=True)
class Softer(rgd.Weighting):
    power: float = 0.5
    pointwise = True
    def weights(self, batch):
        return (1 + batch.losses) ** self.power

@dataclasses.dataclass(frozen=True)
class Record(rgd.Weighting):
    fade: float = 0.5
    def init(self):
        return {"largest": np.zeros(()), "batches": 0}
    def step(self, batch, state):
        faded, top = self.fade * state["largest"], batch.max(batch.losses)
        largest = batch.xp.where(top > faded, top, faded)
        return batch.losses / largest, {"largest": largest, "batches": state["batches"] + 1}

weightings = [rgd.KL(), rgd.KL(tau=2.0, normalize=True), rgd.KLBall(0.3)]
members = [Softer(), rgd.ChiSquareBall(0.4), rgd.CVaR(0.3), rgd.Trimmed(rgd.KL(), 0.2), rgd.GroupDRO(3, 0.1),
           rgd.MovingAverage(rgd.KL(), 0.9), Record()]
# 24 * 5 roundings in float32, exponents of at most 20: see tests/test_jax.py
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

for weighting in weightings:
    def objective(l, m):
        return rj.reweighted_mean(l, weighting, where=m, axis_name="data")
    def weights(l, m):
        return rj.sample_weights(l, weighting, where=m, axis_name="data")
    sharded = jax.shard_map(objective, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P())
    close(jax.jit(sharded)(losses, where), rj.reweighted_mean(losses, weighting, where=where))
    spread = jax.shard_map(weights, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P("data"))
    close(jax.jit(spread)(losses, where),
          rj.sample_weights(losses, weighting, where=where))
    # Without axis_name each device weights its own part.
    one_part = lambda l: rj.sample_weights(l, weighting)
    local = jax.shard_map(one_part, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    close(jax.jit(local)(losses), jnp.concatenate([one_part(part) for part in jnp.split(losses, devices)]))
    # Gradient with respect to a replicated parameter: that of the whole batch.
    def cross_entropy(scale, z, y):
        return rj.cross_entropy(z * scale, y, weighting=weighting, axis_name="data")
    one = jax.value_and_grad(lambda s: rj.cross_entropy(logits * s, labels, weighting=weighting))(2.0)
    def step(s, z, y):
        return jax.value_and_grad(cross_entropy)(s, z, y)
    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": (P(), P())}
    close(jax.jit(jax.shard_map(step, mesh=mesh, **specs))(jnp.float32(2.0), logits, labels), one)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        split = [a.reshape(devices, -1, *a.shape[1:]) for a in (logits, labels)]
        value, gradient = jax.pmap(step, "data", in_axes=(None, 0, 0))(jnp.float32(2.0), *split)
        close(value, jnp.full(devices, one[0]))
        close(jnp.mean(gradient), one[1])

# Every member, with a base measure, groups and a state that counts as replicated, two batches in a scan.
for weighting in members if devices == 4 else (Softer(), Record()):
    def batch(state, part):
        l, m, p, g = part
        options = {"where": m, "sample_weight": p, "groups": g, "axis_name": NAME, "state": state}
        weights = rj.sample_weights(l, weighting, **options)
        mean = rj.reweighted_mean(l, weighting, **options)
        if state is None:
            return None, (weights, mean)
        return mean[1], (weights[0], mean[0])
    def batches(state, *parts):
        return jax.lax.scan(batch, state, parts)
    parts = [jnp.stack([a, jnp.flip(a)]) for a in (losses, where, mass, groups)]
    state = weighting.init() if weighting.stateful else None
    NAME = None
    one = jax.jit(batches)(state, *parts)
    NAME = "data"
    rows = P(None, "data")
    spread = jax.shard_map(batches, mesh=mesh, in_specs=(P(), *[rows] * 4), out_specs=(P(), (rows, P())))
    jax.tree.map(close, jax.jit(spread)(state, *parts), one)

# Two mapped axes at once: the rows lie across both.
if devices == 4:
    square = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
    both = P(("a", "b"))
    for name in (("a", "b"), ["a", "b"]):
        def part(l):
            return rj.sample_weights(l, rgd.CVaR(0.3), axis_name=name)
        spread = jax.shard_map(part, mesh=square, in_specs=both, out_specs=both)
        close(jax.jit(spread)(losses), rj.sample_weights(losses, rgd.CVaR(0.3)))

# jit with sharded inputs: no device is sent another's logits.
big = jnp.asarray(rng.standard_normal((32, 2048)), jnp.float32)
big_labels = jnp.asarray(rng.integers(0, 2048, 32))
rows = NamedSharding(mesh, P("data"))
for backend in (None, "rust"):
    step = jax.jit(jax.value_and_grad(rj.cross_entropy))
    args = jax.device_put(big, rows), jax.device_put(big_labels, rows)
    compiled = step.lower(*args).compile()
    text = compiled.as_text()
    assert "all-gather" not in text and "all-to-all" not in text, text
    value, gradient = compiled(*args)
    assert gradient.sharding.is_equivalent_to(rows, 2), gradient.sharding
    expected = step(big, big_labels)
    close(value, expected[0])
    close(gradient, expected[1])
    # Inside shard_map too, with the objective of the whole batch.
    def whole(z, y):
        return jax.value_and_grad(
            lambda z: rj.cross_entropy(z, y, axis_name="data", backend=backend))(z)
    inside = jax.shard_map(whole, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=(P(), P("data")))
    close(jax.jit(inside)(*args)[0], expected[0])
    close(jax.jit(inside)(*args)[1], expected[1])
print("equal")
"""


@pytest.mark.parametrize("devices", [2, 4])
def test_many_devices_give_what_one_gives(devices):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    # What is asked is which numbers come out, and what moves between devices: compiled in a hurry.
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment = {**os.environ, **quick, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    program = PROGRAM.replace("DEVICES", str(devices))
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "equal"
