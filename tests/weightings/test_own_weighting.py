"""A weighting of one's own, written once in this file, works unchanged wherever the package takes one."""

import dataclasses
import math
import os
import subprocess
import sys

import jax
import matplotlib
import numpy as np
import optax
import pytest
import rgd
import rgd.jax
import rgd.optax
import rgd.plot
import rgd.testing
import torch
import torch.distributed as dist
from jax.sharding import Mesh, PartitionSpec
from rgd.torch import RGD, RGDLoss, backend, reweighted_mean, sample_weights, weight_stats
from torch.nn import functional as F
from workers import Workers
from x64 import enable_x64

LOSSES = np.random.default_rng(0).gamma(1.0, 1.5, 24)
LOGITS = torch.randn(24, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TARGET = torch.arange(24) % 5


@dataclasses.dataclass(frozen=True)
class Softer(rgd.Weighting):
    power: float = 0.5
    pointwise = True

    def weights(self, batch):
        return (1 + batch.losses) ** self.power


@dataclasses.dataclass(frozen=True)
class AboveAverage(rgd.Weighting):
    """Weights the losses above the running mean of the batches' means: remembers it, and how often."""

    factor: float = 2.0
    decay: float = 0.5

    def init(self):
        return {"mean": 0.0, "batches": 0}

    def step(self, batch, state):
        xp, mean = batch.xp, batch.mean(batch.losses)
        old = xp.where(state["batches"] == 0, mean, state["mean"])
        new = self.decay * old + (1 - self.decay) * mean
        weights = xp.where(batch.losses > new, self.factor, xp.ones_like(batch.losses))
        return weights, {"mean": new, "batches": state["batches"] + 1}


def softer(losses, power=0.5):
    return (1 + losses) ** power


def above_average(batches, factor=2.0, decay=0.5):
    """The weights of each batch, and the state after all, in a plain loop."""
    mean, out = None, []
    for losses in batches:
        mean = losses.mean() if mean is None else decay * mean + (1 - decay) * losses.mean()
        out.append(np.where(losses > mean, factor, 1.0))
    return out, {"mean": mean, "batches": len(batches)}


BATCHES = [LOSSES, LOSSES[::-1] * 1.5, LOSSES * 0.2]


@pytest.mark.parametrize("weighting", [Softer(), Softer(0.3), AboveAverage()])
def test_it_keeps_the_contract_in_every_front(weighting):
    rgd.testing.check_weighting(weighting)


def test_in_numpy():
    np.testing.assert_allclose(rgd.sample_weights(LOSSES, Softer()), softer(LOSSES), rtol=1e-15)
    assert rgd.reweighted_mean(LOSSES, Softer()) == pytest.approx(np.mean(softer(LOSSES) * LOSSES), rel=1e-14)
    state, expected = AboveAverage().init(), above_average(BATCHES)
    for losses, weights in zip(BATCHES, expected[0], strict=True):
        got, state = rgd.sample_weights(losses, AboveAverage(), state=state)
        np.testing.assert_array_equal(got, weights)
    assert float(state["mean"]) == pytest.approx(expected[1]["mean"], rel=1e-15)
    assert int(state["batches"]) == 3


@pytest.mark.parametrize("name", ["rust", "composite"])
@pytest.mark.parametrize("per", ["element", "sample"])
def test_in_the_loss_eagerly(name, per):
    logits = LOGITS.clone().requires_grad_()
    with backend(name):
        objective = RGDLoss(weighting=Softer(), per=per)(logits, TARGET)
        objective.backward()
    again = LOGITS.clone().requires_grad_()
    losses = F.cross_entropy(again, TARGET, reduction="none")
    expected = (softer(losses.detach()) * losses).mean()
    expected.backward()
    torch.testing.assert_close(objective, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(logits.grad, again.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["rust", "composite"])
def test_in_the_loss_with_a_state_that_is_a_buffer(name):
    criterion = RGDLoss(weighting=AboveAverage(), base=lambda losses: losses)
    expected, state = above_average(BATCHES)
    with backend(name):
        for batch, weights in zip(BATCHES, expected, strict=True):
            losses = torch.tensor(batch.copy())
            objective = criterion(losses)
            torch.testing.assert_close(objective, (torch.tensor(weights) * losses).mean(), rtol=1e-14, atol=0)
    saved = criterion.state_dict()
    assert saved["weighting_state.mean"].item() == pytest.approx(state["mean"], rel=1e-15)
    assert saved["weighting_state.batches"].item() == 3


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("name", ["rust", "composite"])
def test_compiled_into_one_graph_that_a_schedule_leaves_alone(name):
    torch.compiler.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    criterion = RGDLoss(weighting=Softer(0.1))
    compiled = torch.compile(criterion, backend=count, fullgraph=True)
    with backend("composite" if name == "composite" else None):
        after_first = 0
        for step in range(12):  # more often than torch compiles one function again
            power = 0.1 * (step + 1)
            criterion.weighting = Softer(power)
            logits = LOGITS.clone().requires_grad_()
            compiled(logits, TARGET).backward()
            again = LOGITS.clone().requires_grad_()
            RGDLoss(weighting=Softer(power))(again, TARGET).backward()
            torch.testing.assert_close(logits.grad, again.grad, rtol=1e-12, atol=1e-15)
            after_first = after_first or len(graphs)
    assert len(graphs) == after_first


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_with_a_state():
    torch.compiler.reset()
    plain, criterion = (RGDLoss(weighting=AboveAverage()) for _ in range(2))
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    for factor in (1.0, 0.5, 2.0):
        torch.testing.assert_close(compiled(factor * LOGITS, TARGET), plain(factor * LOGITS, TARGET))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(criterion.state_dict()[name], value)


def test_vmapped():
    losses = torch.tensor(np.stack(BATCHES))
    weights = torch.vmap(lambda row: sample_weights(row, Softer()))(losses)
    torch.testing.assert_close(weights, softer(losses))
    state = {"mean": torch.zeros(3, dtype=torch.float64), "batches": torch.zeros(3, dtype=torch.int64)}
    weights, state = torch.vmap(lambda row, s: sample_weights(row, AboveAverage(), state=s))(losses, state)
    expected = np.stack([above_average([batch])[0][0] for batch in BATCHES])
    np.testing.assert_array_equal(weights.numpy(), expected)
    np.testing.assert_allclose(state["mean"].numpy(), losses.mean(1).numpy(), rtol=1e-15)
    with pytest.raises(RuntimeError, match=r"AboveAverage remembers .* use rgd\.torch\.cross_entropy"):
        torch.vmap(RGDLoss(weighting=AboveAverage()))(LOGITS.view(2, 12, 5), TARGET.view(2, 12))


def test_in_the_optimizer_whose_checkpoint_holds_the_state():
    def optimizer():
        parameter = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        return parameter, RGD(torch.optim.SGD([parameter], lr=0.1), AboveAverage())

    parameter, wrapped = optimizer()
    expected, _ = above_average(BATCHES)
    for losses, weights in zip(BATCHES, expected, strict=True):
        wrapped.zero_grad()
        before = parameter.detach().clone()
        wrapped.backward(torch.tensor(losses) * parameter / before)
        wrapped.step()
        torch.testing.assert_close(
            parameter.detach(), before - 0.1 * torch.tensor(np.mean(weights * losses)) / before
        )
    _, fresh = optimizer()
    fresh.load_state_dict(wrapped.state_dict())
    assert fresh.state_dict()["weighting_state"] == wrapped.state_dict()["weighting_state"]
    plain = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    plain.load_state_dict(wrapped.state_dict())
    assert plain.param_groups[0]["lr"] == 0.1


def test_in_the_statistics_and_pictures():
    losses = torch.tensor(LOSSES)
    weights = sample_weights(losses, Softer())
    stats = weight_stats(losses, weights, Softer())
    expected = rgd.weight_stats(LOSSES, softer(LOSSES), Softer())
    for got, wanted in zip(dataclasses.astuple(stats), dataclasses.astuple(expected), strict=True):
        assert got is wanted or got == pytest.approx(wanted, rel=1e-13)
    assert stats.clipped_share == 0.0
    matplotlib.use("agg")
    line = rgd.plot.weight_curve(Softer()).lines[0]
    np.testing.assert_allclose(line.get_ydata(), softer(line.get_xdata()), rtol=1e-14)
    rgd.plot.heaviest_samples(losses, Softer())
    rgd.plot.weight_curve(AboveAverage(), losses=LOSSES)
    matplotlib.pyplot.close("all")


# --- two processes ---


def on_a_rank(rank, size):
    own = slice(10 * rank, 24 if rank else 10)  # parts of 10 and 14
    logits = LOGITS[own].clone().requires_grad_()
    RGDLoss(weighting=Softer())(logits, TARGET[own]).backward()
    criterion = RGDLoss(weighting=AboveAverage(), base=lambda losses: losses, reduction="sum")
    totals = [criterion(torch.tensor(losses.copy())[own]) for losses in BATCHES]
    return logits.grad, torch.stack(totals), dict(criterion.state_dict())


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_on_two_ranks_that_share_the_batch(tmp_path):
    workers = Workers()
    try:
        first, second = workers.run(2, tmp_path / "store", on_a_rank)
    finally:
        workers.stop()
    logits = LOGITS.clone().requires_grad_()
    RGDLoss(weighting=Softer(), reduction="sum")(logits, TARGET).backward()
    torch.testing.assert_close(torch.cat([first[0] * 10, second[0] * 14]), logits.grad)
    weights, state = above_average(BATCHES)
    expected = [np.sum(w * losses) for w, losses in zip(weights, BATCHES, strict=True)]
    np.testing.assert_allclose((first[1] + second[1]).numpy(), expected, rtol=1e-14)
    for saved in (first[2], second[2]):
        assert saved["weighting_state.mean"].item() == pytest.approx(state["mean"], rel=1e-14)
        assert saved["weighting_state.batches"].item() == 3


# --- JAX ---


def test_in_jax_under_jit_and_in_optax():
    with enable_x64(True):
        jnp, losses = jax.numpy, jax.numpy.asarray(LOSSES)
        traced = jax.jit(lambda losses, power: rgd.jax.sample_weights(losses, Softer(power)))
        np.testing.assert_allclose(traced(losses, 0.3), softer(LOSSES, 0.3), rtol=1e-14)
        gradient = jax.jit(jax.grad(lambda losses: rgd.jax.reweighted_mean(losses, Softer())))(losses)
        np.testing.assert_allclose(gradient, softer(LOSSES) / 24, rtol=1e-14)

        step = jax.jit(lambda losses, state: rgd.jax.sample_weights(losses, AboveAverage(), state=state))
        state, (expected, last) = AboveAverage().init(), above_average(BATCHES)
        for batch, weights in zip(BATCHES, expected, strict=True):
            got, state = step(jnp.asarray(batch), state)
            np.testing.assert_array_equal(got, weights)
        assert float(state["mean"]) == pytest.approx(last["mean"], rel=1e-15)

        for weighting, weights in ((Softer(), softer(LOSSES)), (AboveAverage(), expected[0])):
            tx = rgd.optax.rgd(optax.sgd(1.0), weighting)
            updates, _ = jax.jit(lambda g, s, losses, tx=tx: tx.update(g, s, losses=losses))(
                jnp.ones(24), tx.init(jnp.zeros(())), losses
            )
            assert float(updates) == pytest.approx(-np.mean(weights), rel=1e-14)


def sharded():
    """Run in a process of its own, with four host devices."""
    jax.config.update("jax_enable_x64", True)
    assert len(jax.devices()) == 4
    mesh, split = Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data")
    weights = jax.shard_map(
        lambda losses: rgd.jax.sample_weights(losses, Softer(), axis_name="data"),
        mesh=mesh, in_specs=split, out_specs=split,
    )  # fmt: skip
    np.testing.assert_allclose(jax.jit(weights)(LOSSES), softer(LOSSES), rtol=1e-14)
    step = jax.shard_map(
        lambda losses, state: rgd.jax.sample_weights(losses, AboveAverage(), state=state, axis_name="data"),
        mesh=mesh, in_specs=(split, PartitionSpec()), out_specs=(split, PartitionSpec()),
    )  # fmt: skip
    state, (expected, last) = AboveAverage().init(), above_average(BATCHES)
    for losses, weights in zip(BATCHES, expected, strict=True):
        got, state = jax.jit(step)(losses, state)
        np.testing.assert_array_equal(got, weights)
    assert math.isclose(float(state["mean"]), last["mean"], rel_tol=1e-14)
    assert int(state["batches"]) == 3


def test_in_jax_over_four_devices():
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", "import test_own_weighting; test_own_weighting.sharded()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr


def test_a_subclass_that_changes_the_formula_does_not_inherit_the_kernel():
    @dataclasses.dataclass(frozen=True)
    class Doubled(rgd.KL):
        def weights(self, batch):
            return 2 * super().weights(batch)

    for name in ("rust", "composite"):
        with backend(name):
            np.testing.assert_allclose(
                sample_weights(torch.tensor(LOSSES), Doubled()).numpy(),
                2 * rgd.sample_weights(LOSSES),
                rtol=1e-15,
            )
    np.testing.assert_allclose(
        rgd.sample_weights(LOSSES, Doubled()), 2 * rgd.sample_weights(LOSSES), rtol=1e-15
    )
    objective = reweighted_mean(torch.tensor(LOSSES), Doubled())
    assert objective.item() == pytest.approx(2 * rgd.reweighted_mean(LOSSES), rel=1e-14)


# --- odd ones: what they mean is kept, or they are refused with the fix ---


@dataclasses.dataclass(frozen=True)
class ByGroup(rgd.Weighting):
    boost: float = 2.0
    pointwise = True

    def weights(self, batch):
        return batch.xp.where(batch.groups == 1, self.boost, 1.0) * (1 + batch.losses) / batch.measure


@dataclasses.dataclass(frozen=True)
class ByOldName(rgd.Weighting):
    def weights(self, batch):
        return 1.0 / batch.base


def test_the_old_name_of_the_measure_works_with_a_warning_that_names_the_new_one():
    p = np.array([1.0, 2.0, 4.0])
    with pytest.warns(DeprecationWarning, match="base of rgd.Batch is now called measure") as caught:
        weights = rgd.sample_weights(np.ones(3), ByOldName(), sample_weight=p)
    np.testing.assert_array_equal(weights, 1 / p)
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="now called measure") as caught:
        batch = rgd.Batch(np.ones(3), base=p)
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(batch.measure, p)
    with pytest.raises(TypeError, match="give measure alone"):
        rgd.Batch(np.ones(3), p, base=p)


def test_a_formula_by_the_old_name_compiles_and_traces():
    p = torch.tensor([1.0, 2.0, 4.0])
    compiled = torch.compile(sample_weights, fullgraph=True)
    with pytest.warns(DeprecationWarning, match="now called measure"):
        traced = jax.jit(lambda p: rgd.jax.sample_weights(np.ones(3), ByOldName(), sample_weight=p))(
            p.numpy()
        )
    np.testing.assert_array_equal(traced, 1 / p)
    assert compiled(torch.ones(3), ByOldName(), sample_weight=p).tolist() == (1 / p).tolist()


def test_a_pointwise_weighting_sees_groups_and_the_measure_in_every_front():
    losses, groups, p = np.ones(3), np.array([0, 1, 1]), np.array([1.0, 2, 4])
    expected = [2.0, 2.0, 1.0]
    np.testing.assert_array_equal(
        rgd.sample_weights(losses, ByGroup(), groups=groups, sample_weight=p), expected
    )
    tensors = {"groups": torch.tensor(groups), "sample_weight": torch.tensor(p)}
    assert sample_weights(torch.tensor(losses), ByGroup(), **tensors).tolist() == expected
    assert rgd.jax.sample_weights(losses, ByGroup(), groups=groups, sample_weight=p).tolist() == expected


@dataclasses.dataclass(frozen=True)
class Remembers(rgd.Weighting):
    first: object = 0.0

    def init(self):
        return self.first

    def step(self, batch, state):
        return batch.xp.ones_like(batch.losses), state


@pytest.mark.parametrize(
    "first", [{"training": 0.0, "type": 1, "a.b": np.ones(2)}, (0.5, {"x": 1.0}), {"a": np.float16(1)}]
)
def test_any_keys_of_a_state_become_buffers_of_at_least_float32(first):
    criterion = RGDLoss(weighting=Remembers(first), base=lambda losses: losses)
    criterion(torch.ones(3))
    assert criterion.training is True
    buffers = list(criterion.weighting_state.buffers())
    assert all(buffer.dtype.itemsize >= 4 for buffer in buffers)
    fresh = RGDLoss(weighting=Remembers(first), base=lambda losses: losses)
    fresh.load_state_dict(criterion.state_dict())


def test_two_numbers_of_a_state_never_share_a_buffer():
    with pytest.raises(ValueError, match="would be the buffer 'a_b': rename a key"):
        RGDLoss(weighting=Remembers({"a": {"b": 0.0}, "a_b": 1.0}))


def test_a_state_starts_anew_where_a_nested_weighting_is_of_another_class():
    criterion = RGDLoss(weighting=rgd.MovingAverage(rgd.KL(), 0.5), base=lambda losses: losses)
    criterion(torch.ones(3))
    criterion.weighting = rgd.MovingAverage(rgd.Focal(1.0), 0.9)
    assert criterion.state_dict()["weighting_state.updates"] == 1

    class Alike(Remembers):
        def init(self):
            return {"log_mean": 5.0, "updates": 3}

    criterion.weighting = rgd.Trimmed(rgd.MovingAverage(rgd.KL(), 0.5), 0.1)
    criterion.weighting = rgd.Trimmed(Alike(), 0.1)
    assert criterion.state_dict()["weighting_state.updates"] == 3


def test_a_step_that_breaks_its_state_is_named():
    class Grows(Remembers):
        def step(self, batch, state):
            return batch.losses, batch.losses

    class Forgets(Remembers):
        def step(self, batch, state):
            return batch.losses

    for weighting, message in [
        (Grows(), r"Grows\.step must return a state of the structure and shapes"),
        (Forgets(), r"Forgets\.step must return the weights and the new state"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            rgd.sample_weights(np.ones(3), weighting, state=weighting.init())
        with pytest.raises((ValueError, TypeError), match=message):
            RGDLoss(weighting=weighting, base=lambda losses: losses)(torch.ones(3))


def test_what_a_weighting_keeps_beside_its_fields_is_refused_where_it_would_go_stale():
    @dataclasses.dataclass(frozen=True)
    class Halved(rgd.Weighting):
        power: float = 0.5
        pointwise = True

        def __post_init__(self):
            object.__setattr__(self, "half", self.power / 2)

        def weights(self, batch):
            return (1 + batch.losses) ** self.half

    for use in (lambda w: RGDLoss(weighting=w), lambda w: rgd.jax.sample_weights(np.ones(3), w)):
        with pytest.raises(TypeError, match="Halved keeps half beside its dataclass fields"):
            use(Halved())


def test_a_field_that_the_base_class_uses_is_refused_at_the_definition():
    with pytest.raises(TypeError, match="a field of Bad is named 'init', which"):

        @dataclasses.dataclass(frozen=True)
        class Bad(rgd.Weighting):
            init: float = 1.0


def test_half_a_protocol_is_told_what_is_missing():
    class OnlyStep(rgd.Weighting):
        def step(self, batch, state):
            return batch.losses, state

    with pytest.raises(NotImplementedError, match=r"OnlyStep defines step, and must define init\(self\) too"):
        rgd.sample_weights(np.ones(3), OnlyStep())


def test_an_array_for_a_setting_can_be_set_again():
    @dataclasses.dataclass(frozen=True)
    class Stairs(rgd.Weighting):
        edges: np.ndarray = dataclasses.field(default_factory=lambda: np.array([1.0, 2.0]))
        height: float = 0.5
        pointwise = True

        def weights(self, batch):
            first, second = (float(edge) for edge in self.edges)
            steps = batch.xp.where(batch.losses > first, self.height, 0.0 * batch.losses)
            return 1 + steps + batch.xp.where(batch.losses > second, self.height, 0.0 * batch.losses)

    criterion = RGDLoss(weighting=Stairs())
    criterion.weighting = Stairs(height=0.25)
    weights = rgd.sample_weights(np.array([0.5, 1.5, 3.0]), criterion.weighting)
    assert weights.tolist() == [1.0, 1.25, 1.5]
