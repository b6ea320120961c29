"""Batches spread over real processes (gloo) against the same training in one process.

Three workers stay alive for the whole module; each test forms a new process group of some of them.
"""

import copy
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import rgd
import torch
import torch.distributed as dist
from family import BATCH_DEPENDENT
from rgd.torch import RGD, RGDLoss, cross_entropy, reweighted_mean, sample_weights
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

ROOT = pathlib.Path(__file__).parents[2]
TIMEOUT = 60
STEPS = 3
POINTWISE = rgd.KL(1.0)
SHARED = [
    rgd.KL(1.0, normalize=True),
    rgd.KL(float("inf"), scale=0.5, normalize=True),
    rgd.KLBall(0.1),
    rgd.KLBall(10.0),
]
# Sums of at most 40 products in another order; 3 steps.
CLOSE = {"rtol": 1e-11, "atol": 1e-13}


# --- the training, on one process and on several ---


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(step, count):
    generator = torch.Generator().manual_seed(step)
    inputs = 3 * torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (count,), generator=generator)


def part(tensors, sizes, rank):
    return [tensor.split(sizes)[rank] for tensor in tensors]


def parameters_of(model):
    return [p.detach().clone() for p in model.parameters()]


def train_ddp(rank, size, weighting, sizes, through):
    model = DistributedDataParallel(make_model())
    bare = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = RGD(bare, weighting=weighting) if through == "RGD" else bare
    criterion = RGDLoss(weighting=weighting)
    for step in range(STEPS):
        inputs, target = part(batch(step, sum(sizes)), sizes, rank)
        optimizer.zero_grad()
        logits = model(inputs)
        if through == "RGD":
            optimizer.backward(F.cross_entropy(logits, target, reduction="none"))
        elif through == "RGDLoss":
            criterion(logits, target).backward()
        elif through == "cross_entropy":
            cross_entropy(logits, target, weighting=weighting).backward()
        elif through == "base":
            base = RGDLoss(weighting=weighting, base=nn.CrossEntropyLoss(reduction="none"))
            base(logits, target).backward()
        else:
            losses = F.cross_entropy(logits, target, reduction="none")
            reweighted_mean(losses, weighting).backward()
        optimizer.step()
    return parameters_of(model)


def train_alone(weighting, sizes, objective=None):
    """The objective of the whole batch, or `objective(weights, losses)` of it."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        inputs, target = batch(step, sum(sizes))
        optimizer.zero_grad()
        losses = F.cross_entropy(model(inputs), target, reduction="none")
        weights = sample_weights(losses, weighting)
        (weights * losses).mean().backward() if objective is None else objective(weights, losses).backward()
        optimizer.step()
    return parameters_of(model)


def assert_close(mine, expected):
    for p, q in zip(mine, expected, strict=True):
        torch.testing.assert_close(p, q, **CLOSE)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("weighting", [POINTWISE, *SHARED], ids=str)
def test_ddp_equals_one_process_on_the_concatenated_batch(run, weighting, size):
    sizes = [6] * size
    outcomes = run(size, train_ddp, weighting, sizes, "RGDLoss")
    expected = train_alone(weighting, sizes)
    for parameters in outcomes:
        assert_close(parameters, expected)


@pytest.mark.parametrize("through", ["RGD", "reweighted_mean", "cross_entropy", "base"])
@pytest.mark.parametrize("weighting", [POINTWISE, SHARED[0], SHARED[2]], ids=str)
def test_every_way_to_the_objective_shares_the_batch(run, weighting, through):
    sizes = [6, 6]
    outcomes = run(2, train_ddp, weighting, sizes, through)
    expected = train_alone(weighting, sizes)
    for parameters in outcomes:
        assert_close(parameters, expected)


@pytest.mark.parametrize("through", ["RGDLoss", "reweighted_mean"])
@pytest.mark.parametrize("sizes", [[5, 2, 8], [4, 0, 3]], ids=str)
@pytest.mark.parametrize("weighting", [POINTWISE, SHARED[0], SHARED[2]], ids=str)
def test_unequal_local_batches_average_the_local_means_of_globally_weighted_losses(
    run, weighting, sizes, through
):
    def average_of_means(weights, losses):
        products = (weights * losses).split(sizes)
        # The gradient of an empty batch's mean is 0.
        return sum(p.mean() for p in products if len(p)) / len(sizes)

    outcomes = run(3, train_ddp, weighting, sizes, through)
    expected = train_alone(weighting, sizes, average_of_means)
    for parameters in outcomes:
        assert_close(parameters, expected)


def plain_ddp(rank, size, sizes):
    """The same with CrossEntropyLoss, whose behaviour on unequal batches is followed."""
    model = DistributedDataParallel(make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        inputs, target = part(batch(step, sum(sizes)), sizes, rank)
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(model(inputs), target).backward()
        optimizer.step()
    return parameters_of(model)


@pytest.mark.parametrize("weighting", [rgd.KL(scale=0.0), rgd.KL(scale=0.0, normalize=True), rgd.KLBall(0.0)])
def test_unequal_and_empty_batches_without_reweighting_equal_cross_entropy_loss(run, weighting):
    sizes = [4, 0, 3]
    mine = run(3, train_ddp, weighting, sizes, "RGDLoss")[0]
    assert_close(mine, run(3, plain_ddp, sizes)[0])


# --- weights, masks, sequences ---


def sequences():
    generator = torch.Generator().manual_seed(7)
    logits = 2 * torch.randn(7, 3, 4, generator=generator, dtype=torch.float64)
    target = torch.randint(3, (7, 4), generator=generator)
    target[0, 2:] = -100
    target[4] = -100  # a whole sequence
    target[5, :3] = -100
    return logits, target


def weigh_sequences(rank, size, weighting, per, weight):
    logits, target = part(sequences(), [4, 3], rank)
    criterion = RGDLoss(weight, weighting=weighting, per=per)
    objective = criterion(logits.requires_grad_(), target)
    objective.backward()
    return objective.detach(), logits.grad, criterion.stats(sync=True), criterion.stats()


@pytest.mark.parametrize(
    "weight", [None, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)], ids=["", "classes"]
)
@pytest.mark.parametrize("per", ["element", "sample"])
@pytest.mark.parametrize("weighting", [POINTWISE, SHARED[0], SHARED[2]], ids=str)
def test_sequences_with_ignored_targets_are_weighed_within_the_global_batch(run, weighting, per, weight):
    logits, target = sequences()
    losses = F.cross_entropy(logits, target, weight, reduction="none")
    kept = target != -100
    if per == "element":
        weights = sample_weights(losses, weighting, where=kept)
    else:
        means = losses.sum(1) / kept.sum(1).clamp(min=1)
        weights = sample_weights(means, weighting, where=kept.any(1)).unsqueeze(1)
    divisor = kept if weight is None else weight[target.clamp(min=0)] * kept
    outcomes = run(2, weigh_sequences, weighting, per, weight)
    for (objective, grad, _, _), rows in zip(outcomes, (slice(0, 4), slice(4, 7)), strict=True):
        expected = (weights * losses)[rows].sum() / divisor[rows].sum()
        torch.testing.assert_close(objective, expected, **CLOSE)
        assert grad.isfinite().all()


@pytest.mark.parametrize("per", ["element", "sample"])
@pytest.mark.parametrize("weighting", [POINTWISE, SHARED[0], SHARED[2]], ids=str)
def test_stats_can_describe_the_global_batch(run, weighting, per):
    alone = RGDLoss(weighting=weighting, per=per)
    alone(*sequences())
    expected = alone.stats()
    for _, _, stats, local in run(2, weigh_sequences, weighting, per, None):
        assert stats.count == expected.count
        for name in ("mean_loss", "objective", "effective_sample_size", "max_weight", "clipped_share"):
            assert getattr(stats, name) == pytest.approx(getattr(expected, name), rel=1e-11)
        assert stats.kl_to_uniform == pytest.approx(expected.kl_to_uniform, rel=1e-11, abs=1e-15)
        assert local.count < expected.count


def masked_mean(rank, size, weighting):
    losses = part([torch.arange(8.0, dtype=torch.float64)], [4, 4], rank)[0].requires_grad_()
    reweighted_mean(losses, weighting, where=losses.detach() != 1).backward()
    return losses.grad


def test_masked_losses_take_no_part_in_the_global_batch(run):
    kept = torch.tensor([0.0, 2, 3, 4, 5, 6, 7], dtype=torch.float64)
    for weighting in SHARED[:3]:
        weights = sample_weights(kept, weighting)
        first, second = run(2, masked_mean, weighting)
        torch.testing.assert_close(first[[0, 2, 3]], weights[:3] / 3, **CLOSE)
        assert first[1] == 0
        torch.testing.assert_close(second, weights[3:] / 4, **CLOSE)


UNITS = torch.tensor([1e30, 2e30, 0.0, 5e29, 1.0, 2.0, 0.5, 3.0], dtype=torch.float64)


def masses_of_two_units(rank, size, weighting):
    losses, p = part([torch.arange(8.0, dtype=torch.float64), UNITS], [4, 4], rank)
    logits = torch.stack([torch.zeros_like(losses), losses], 1)
    criterion = RGDLoss(weighting=weighting, reduction="none")
    objective = criterion(logits, torch.zeros(4, dtype=torch.long), sample_weight=p)
    return sample_weights(losses, weighting, sample_weight=p), criterion.last_weights, objective


@pytest.mark.parametrize("weighting", [*SHARED[:3], rgd.CVaR(0.3)], ids=str)
def test_base_measures_of_other_magnitudes_on_each_rank_are_one_measure(run, weighting):
    losses = torch.arange(8.0, dtype=torch.float64)
    expected = sample_weights(losses, weighting, sample_weight=UNITS)
    target = torch.zeros(8, dtype=torch.long)
    of_logits = F.cross_entropy(torch.stack([torch.zeros_like(losses), losses], 1), target, reduction="none")
    of_criterion = sample_weights(of_logits, weighting, sample_weight=UNITS)
    outcomes = run(2, masses_of_two_units, weighting)
    by_rank = [torch.cat(parts) for parts in zip(*outcomes, strict=True)]
    torch.testing.assert_close(by_rank[0], expected, **CLOSE)
    torch.testing.assert_close(by_rank[1], of_criterion, **CLOSE)
    torch.testing.assert_close(by_rank[2], UNITS * of_criterion * of_logits, **CLOSE)


# --- every member whose weights depend on the batch ---


REMEMBERING = [
    rgd.MovingAverage(rgd.KL(2.0), 0.7),
    rgd.GroupDRO(4, 0.5),
    rgd.Trimmed(rgd.MovingAverage(rgd.Focal(2.0), 0.9), 0.25),
]
SHARING = [*BATCH_DEPENDENT, *REMEMBERING]
CLASS_WEIGHT = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


def identity(losses):
    return losses


def a_batch(seed, count, options):
    """Losses, logits and target of a global batch, and what else its calls are given, one entry a sample."""
    rng = np.random.default_rng(seed)
    losses, logits = (
        torch.tensor(rng.gamma(1.0, 1.5, count)),
        torch.tensor(2 * rng.normal(size=(count, 3, 2))),
    )
    target = torch.tensor(rng.integers(0, 3, (count, 2)))
    target[::4, 0] = -100
    given = {"groups": torch.tensor(rng.integers(0, 3, count))}  # the last group is absent
    if "sample_weight" in options:
        given["sample_weight"] = torch.tensor(rng.integers(0, 8, count) / 4)
    if "where" in options:
        given["where"] = torch.tensor(rng.random(count) > 0.3)
    return losses, logits, target, given


def weigh_every_member(rank, size, weightings, sizes, options):
    """Of each member and batch: both objectives, their means and gradients, and the states after all."""
    outcomes = []
    for weighting in weightings:
        by_base = RGDLoss(weighting=weighting, base=identity, reduction="sum")
        total = RGDLoss(CLASS_WEIGHT, weighting=weighting, per="sample", reduction="sum")
        mean = RGDLoss(CLASS_WEIGHT, weighting=weighting, per="sample")
        values = []
        for seed in range(2):
            losses, logits, target, given = a_batch(seed, sum(sizes), options)
            losses, logits, target = part((losses, logits, target), sizes, rank)
            given = {key: part([value], sizes, rank)[0] for key, value in given.items()}
            losses, logits = losses.clone().requires_grad_(), logits.clone().requires_grad_()
            objectives = by_base(losses, **given), total(logits, target, **given)
            sum(objectives).backward()
            mean(logits, target, **given)
            values += [*(value.detach() for value in objectives), losses.grad, logits.grad]
        states = [dict(criterion.state_dict()) for criterion in (by_base, total, mean)]
        outcomes.append((values, states, mean.stats().objective, total.stats(sync=True)))
    return outcomes


@pytest.mark.parametrize("options", ["", "sample_weight", "where, sample_weight"])
@pytest.mark.parametrize("sizes", [[7, 7], [9, 0, 5], [0, 14]], ids=str)
def test_every_member_over_several_ranks_weighs_as_one_process_does(run, sizes, options):
    outcomes = run(len(sizes), weigh_every_member, SHARING, sizes, options)
    alone = weigh_every_member(0, 1, SHARING, [sum(sizes)], options)
    for weighting, (expected, states, _, stats), *ranks in zip(SHARING, alone, *outcomes, strict=True):
        for index, whole in enumerate(expected):
            values = [values[index] for values, *_ in ranks]
            # Objectives are sums over the ranks; gradients belong to samples.
            together = sum(values) if whole.dim() == 0 else torch.cat(values)
            torch.testing.assert_close(together, whole, **CLOSE, msg=lambda text, w=weighting: f"{w}: {text}")
        for _, own_states, _, own_stats in ranks:
            # Every rank computes with the same numbers: bit for bit.
            for state, first in zip(own_states, ranks[0][1], strict=True):
                assert all(torch.equal(state[key], first[key]) for key in first)
            for state, whole in zip(own_states, states, strict=True):
                assert state.keys() == whole.keys()
                for key, value in whole.items():
                    torch.testing.assert_close(state[key], value, **CLOSE)
            assert own_stats.count == stats.count
            assert own_stats.objective == pytest.approx(stats.objective, rel=1e-11)
            assert own_stats.groups.count == stats.groups.count
            assert own_stats.groups.mean_loss == pytest.approx(stats.groups.mean_loss, rel=1e-11, nan_ok=True)
            assert own_stats.groups.weight_share == pytest.approx(stats.groups.weight_share, rel=1e-11)


def test_each_rank_s_mean_divides_by_its_own_base_measure_and_class_weights(run):
    sizes, options = [8, 6], "sample_weight"
    outcomes = run(2, weigh_every_member, SHARING, sizes, options)
    _, _, target, given = a_batch(1, sum(sizes), options)
    divisors = given["sample_weight"][:, None] * CLASS_WEIGHT[target.clamp(min=0)] * (target != -100)
    for rank, own in enumerate(divisors.split(sizes)):
        for values, _, mean, _ in outcomes[rank]:
            assert mean == pytest.approx(values[5].item() / own.sum().item(), rel=1e-12)


class WithLoss(nn.Module):
    """A model that holds its criterion, as DistributedDataParallel is given it."""

    def __init__(self, weighting):
        super().__init__()
        self.model = make_model()
        self.criterion = RGDLoss(weighting=weighting)

    def forward(self, inputs, target, groups):
        return self.criterion(self.model(inputs), target, groups=groups)


def train_with_the_loss_inside(rank, size, weighting, sizes):
    module = WithLoss(weighting)
    if rank:  # as after a checkpoint that only the first rank has read
        for buffer in module.buffers():
            buffer.add_(1)
    model = DistributedDataParallel(module)
    broadcast = [buffer.clone() for buffer in module.buffers()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs, target = batch(step, sum(sizes))
        own = part((inputs, target, torch.arange(sum(sizes)) % 4), sizes, rank)
        model(*own).backward()
        optimizer.step()
    return broadcast, list(module.buffers()), parameters_of(module)


@pytest.mark.parametrize("weighting", REMEMBERING, ids=["MovingAverage", "GroupDRO", "Trimmed"])
def test_ddp_broadcasts_the_state_of_a_criterion_within_the_wrapped_module(run, weighting):
    sizes = [6, 6]
    alone = WithLoss(weighting)
    fresh = [buffer.clone() for buffer in alone.buffers()]
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        alone(*batch(step, sum(sizes)), torch.arange(sum(sizes)) % 4).backward()
        optimizer.step()
    for broadcast, state, parameters in run(2, train_with_the_loss_inside, weighting, sizes):
        assert all(map(torch.equal, broadcast, fresh))
        torch.testing.assert_close(state, list(alone.buffers()), **CLOSE)
        assert_close(parameters, parameters_of(alone))


def remember_alone(rank, size, weighting):
    criterion = RGDLoss(weighting=weighting, base=identity, sync=False)
    for seed in range(2):
        criterion(torch.tensor(np.random.default_rng(2 * seed + rank).gamma(1.0, 1.5, 5)))
    return list(criterion.buffers())


def test_without_sync_each_rank_remembers_its_own_losses(run):
    for rank, state in enumerate(run(2, remember_alone, REMEMBERING[0])):
        torch.testing.assert_close(state, remember_alone(rank, 1, REMEMBERING[0]), rtol=0, atol=0)


# --- who takes part ---


def only_first_calls(rank, size, weighting, sync):
    losses = torch.arange(4.0)
    if rank == 0:
        return reweighted_mean(losses, weighting, sync=sync).item(), RGDLoss(weighting=weighting, sync=sync)(
            torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
        ).item()
    return None


@pytest.mark.parametrize(("weighting", "sync"), [(POINTWISE, True), (SHARED[0], False), (SHARED[2], False)])
def test_pointwise_weights_and_unsynchronised_ones_ask_no_other_process(run, weighting, sync):
    mean, _ = run(2, only_first_calls, weighting, sync)[0]
    assert mean == pytest.approx(reweighted_mean(torch.arange(4.0), weighting).item(), rel=1e-6)


def in_subgroup(rank, size, weighting):
    group = dist.new_group([0, 2])
    losses = torch.arange(6.0, dtype=torch.float64)[2 * rank : 2 * rank + 2].requires_grad_()
    if rank == 1:
        try:
            RGDLoss(process_group=group)
        except ValueError as error:
            return str(error)
        return None
    reweighted_mean(losses, weighting, process_group=group).backward()
    criterion = copy.deepcopy(RGDLoss(weighting=weighting, base=nn.Identity(), process_group=group))
    again = losses.detach().clone().requires_grad_()
    criterion(again).backward()
    return losses.grad, again.grad


def test_a_process_group_shares_the_batch_among_its_members(run):
    weighting = SHARED[0]
    first, outsider, third = run(3, in_subgroup, weighting)
    weights = sample_weights(torch.tensor([0.0, 1, 4, 5], dtype=torch.float64), weighting)
    torch.testing.assert_close(torch.cat([first[0], third[0]]), weights / 2, **CLOSE)
    torch.testing.assert_close(torch.cat([first[1], third[1]]), weights / 2, **CLOSE)
    assert "does not belong to" in outsider


def with_wrong_backend(rank, size):
    group = dist.new_group(backend="cuda:gloo")
    messages = []
    for call in (
        lambda: reweighted_mean(torch.ones(3), SHARED[0], process_group=group),
        lambda: RGDLoss(weighting=SHARED[2], process_group=group)(torch.zeros(2, 3), torch.arange(2)),
    ):
        try:
            call()
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_a_group_of_the_wrong_backend_is_refused_with_a_hint(run):
    for messages in run(2, with_wrong_backend):
        assert len(messages) == 2
        for message in messages:
            assert "cannot send from cpu" in message
            assert "new_group(backend='gloo')" in message


def test_a_group_that_is_none_is_refused():
    with pytest.raises(TypeError, match=r"process_group must be a torch\.distributed\.ProcessGroup"):
        RGDLoss(process_group="gloo")


def test_a_sync_that_is_no_bool_is_refused():
    with pytest.raises(TypeError, match="sync must be True or False"):
        RGDLoss(sync=1)


def group_without_sync(rank, size):
    try:
        RGDLoss(process_group=dist.group.WORLD, sync=False)
    except ValueError as error:
        return str(error)
    return None


def test_a_group_together_with_no_sync_is_refused(run):
    assert run(1, group_without_sync) == [
        "give process_group or sync=False, not both: without sync no group is asked"
    ]


def alone_in_a_group(rank, size, weighting):
    losses = torch.arange(4.0, dtype=torch.float64)
    return reweighted_mean(losses, weighting)


def test_a_group_of_one_process_is_like_none(run):
    losses = torch.arange(4.0, dtype=torch.float64)
    assert torch.equal(run(1, alone_in_a_group, SHARED[2])[0], reweighted_mean(losses, SHARED[2]))


def compiled(rank, size, weighting):
    losses = torch.arange(6.0, dtype=torch.float64).split(3)[rank].clone().requires_grad_()
    torch.compile(lambda x: reweighted_mean(x * 1.0, weighting), backend="eager")(losses).backward()
    return losses.grad


def test_a_compiled_loss_leaves_its_graph_to_share_the_batch(run):
    weights = sample_weights(torch.arange(6.0, dtype=torch.float64), SHARED[0])
    torch.testing.assert_close(torch.cat(run(2, compiled, SHARED[0])), weights / 3, **CLOSE)


# --- FSDP2 ---


def train_fsdp(rank, size, weighting, sizes):
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    model = make_model()
    mesh = init_device_mesh("cpu", (size,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = RGD(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), weighting=weighting)
    for step in range(STEPS):
        inputs, target = part(batch(step, sum(sizes)), sizes, rank)
        optimizer.zero_grad()
        optimizer.backward(F.cross_entropy(model(inputs), target, reduction="none"))
        optimizer.step()
    return [p.full_tensor().detach() for p in model.parameters()]


@pytest.mark.parametrize("weighting", [POINTWISE, SHARED[0], SHARED[2]], ids=str)
def test_fsdp2_equals_one_process_on_the_concatenated_batch(run, weighting):
    if torch.__version__ < "2.7":
        pytest.skip("FSDP2 in torch before 2.7 needs a GPU")
    outcomes = run(2, train_fsdp, weighting, [6, 6])
    expected = train_alone(weighting, [6, 6])
    for parameters in outcomes:
        assert_close(parameters, expected)


# --- digits ---


def train_digits(rank, size):
    # A process of its own, which has not imported it yet; the data set may be missing.
    import test_trainers  # noqa: PLC0415

    (images, labels), _ = test_trainers.load()
    model = DistributedDataParallel(test_trainers.make_model())
    criterion, optimizer = RGDLoss(), test_trainers.sgd(model)
    for indices in test_trainers.indices():
        own = indices.chunk(size)[rank]
        optimizer.zero_grad()
        criterion(model(images[own]), labels[own]).backward()
        optimizer.step()
    return parameters_of(model)


def test_digits_on_two_processes_end_where_the_plain_loop_does(run):
    pytest.importorskip("sklearn")
    import test_trainers  # noqa: PLC0415

    yardstick = parameters_of(test_trainers.train(test_trainers.composed, test_trainers.load()))
    for parameters in run(2, train_digits):
        for p, q in zip(parameters, yardstick, strict=True):
            torch.testing.assert_close(p, q, **test_trainers.CLOSE)


# --- the example ---


@pytest.mark.parametrize("size", [2])
def test_the_example_starts_with_torchrun(size, tmp_path):
    pytest.importorskip("sklearn")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"),
        *(str(ROOT / "examples" / "ddp_digits.py"), "--epochs", "2"),
    ]
    finished = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=2 * TIMEOUT,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "2 processes" in finished.stdout
