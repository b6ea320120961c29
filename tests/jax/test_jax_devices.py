"""Two and four devices give what one gives, and the sharded cross-entropy moves no logits between them.

Devices are made when the backend starts, so a process of its own has four.
"""

import pytest

pytest.importorskip("jax")

from devices import outcomes_on_four_devices

PROGRAM = """
import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import rgd, rgd.jax as rj

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

# 24 * 5 roundings in float32, exponents of at most 20: see tests/jax/test_jax.py
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

def mesh_of(devices):
    return Mesh(np.array(jax.devices()[:devices]), ("data",))

def one_batch(devices, weighting):
    mesh, data = mesh_of(devices), P("data")
    def weights_and_mean(l, m, name):
        options = {"where": m, "axis_name": name}
        return rj.sample_weights(l, weighting, **options), rj.reweighted_mean(l, weighting, **options)
    def part(l, m):
        # Without axis_name each device weights its own part.
        return *weights_and_mean(l, m, "data"), rj.sample_weights(l, weighting)
    spread = jax.shard_map(part, mesh=mesh, in_specs=(data, data), out_specs=(data, P(), data))
    whole = jax.jit(lambda l, m: (*weights_and_mean(l, m, None), jnp.concatenate(
        [rj.sample_weights(own, weighting) for own in jnp.split(l, devices)])))
    jax.tree.map(close, jax.jit(spread)(losses, where), whole(losses, where))

    # Gradient with respect to a replicated parameter: that of the whole batch.
    def step(s, z, y, name="data"):
        objective = lambda s: rj.cross_entropy(z * s, y, weighting=weighting, axis_name=name)
        return jax.value_and_grad(objective)(s)
    one = jax.jit(lambda *a: step(*a, None))(jnp.float32(2.0), logits, labels)
    specs = {"in_specs": (P(), data, data), "out_specs": (P(), P())}
    close(jax.jit(jax.shard_map(step, mesh=mesh, **specs))(jnp.float32(2.0), logits, labels), one)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        split = [a.reshape(devices, -1, *a.shape[1:]) for a in (logits, labels)]
        mapped = jax.pmap(step, "data", in_axes=(None, 0, 0), devices=jax.devices()[:devices])
        value, gradient = mapped(jnp.float32(2.0), *split)
        close(value, jnp.full(devices, one[0]))
        close(jnp.mean(gradient), one[1])

def batches_in_a_scan(devices, weighting):
    # With a base measure, groups and a state that counts as replicated.
    def batches(name):
        def batch(state, part):
            l, m, p, g = part
            options = {"where": m, "sample_weight": p, "groups": g, "axis_name": name, "state": state}
            weights = rj.sample_weights(l, weighting, **options)
            mean = rj.reweighted_mean(l, weighting, **options)
            if state is None:
                return None, (weights, mean)
            return mean[1], (weights[0], mean[0])
        return lambda state, *parts: jax.lax.scan(batch, state, parts)
    parts = [jnp.stack([a, jnp.flip(a)]) for a in (losses, where, mass, groups)]
    state = weighting.init() if weighting.stateful else None
    one = jax.jit(batches(None))(state, *parts)
    rows = P(None, "data")
    spread = jax.shard_map(
        batches("data"), mesh=mesh_of(devices), in_specs=(P(), *[rows] * 4), out_specs=(P(), (rows, P())))
    jax.tree.map(close, jax.jit(spread)(state, *parts), one)

def two_mapped_axes():
    # The rows lie across both.
    square = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
    both = P(("a", "b"))
    for name in (("a", "b"), ["a", "b"]):
        def part(l):
            return rj.sample_weights(l, rgd.CVaR(0.3), axis_name=name)
        spread = jax.shard_map(part, mesh=square, in_specs=both, out_specs=both)
        close(jax.jit(spread)(losses), rj.sample_weights(losses, rgd.CVaR(0.3)))

def sharded_inputs(devices):
    # No device is sent another's logits.
    mesh = mesh_of(devices)
    big = jnp.asarray(rng.standard_normal((32, 2048)), jnp.float32)
    big_labels = jnp.asarray(rng.integers(0, 2048, 32))
    rows = NamedSharding(mesh, P("data"))
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
    for backend in (None, "rust"):
        # Inside shard_map too, with the objective of the whole batch.
        def whole(z, y):
            return jax.value_and_grad(
                lambda z: rj.cross_entropy(z, y, axis_name="data", backend=backend))(z)
        inside = jax.shard_map(whole, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=(P(), P("data")))
        value, gradient = jax.jit(inside)(*args)
        close(value, expected[0])
        close(gradient, expected[1])

ONE_BATCH = {"KL": rgd.KL(), "normalised KL": rgd.KL(tau=2.0, normalize=True), "KLBall": rgd.KLBall(0.3)}
SCANNED = {type(m).__name__: m for m in (
    Softer(), rgd.ChiSquareBall(0.4), rgd.CVaR(0.3), rgd.Trimmed(rgd.KL(), 0.2), rgd.GroupDRO(3, 0.1),
    rgd.MovingAverage(rgd.KL(), 0.9), Record())}
CHECKS = {"two mapped axes": two_mapped_axes}
for devices in (2, 4):
    CHECKS[f"{devices}: sharded inputs"] = functools.partial(sharded_inputs, devices)
    for name, weighting in ONE_BATCH.items():
        CHECKS[f"{devices}: one batch, {name}"] = functools.partial(one_batch, devices, weighting)
    for name in SCANNED if devices == 4 else ("Softer", "Record"):
        CHECKS[f"{devices}: a scan, {name}"] = functools.partial(batches_in_a_scan, devices, SCANNED[name])
"""
ONE_BATCH = ["KL", "normalised KL", "KLBall"]
SCANNED = {
    2: ["Softer", "Record"],
    4: ["Softer", "ChiSquareBall", "CVaR", "Trimmed", "GroupDRO", "MovingAverage", "Record"],
}
CHECKS = ["two mapped axes"]
for number, members in SCANNED.items():
    CHECKS.append(f"{number}: sharded inputs")
    CHECKS += [f"{number}: one batch, {name}" for name in ONE_BATCH]
    CHECKS += [f"{number}: a scan, {name}" for name in members]


@pytest.fixture(scope="module")
def outcomes():
    return outcomes_on_four_devices(PROGRAM)


def test_every_check_of_the_program_is_asked_for(outcomes):
    assert set(outcomes) == set(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_many_devices_give_what_one_gives(outcomes, check):
    assert outcomes[check] == "equal"
