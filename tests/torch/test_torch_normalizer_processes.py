"""`normalizer=` over processes (gloo): unequal micro-batches of unequal ranks make one step."""

import contextlib

import pytest
import rgd
import torch
import torch.distributed as dist
from rgd.torch import LinearRGDLoss, RGDLoss, count_targets
from torch import nn
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

ROWS, C, STEPS = 12, 3, 3
# Which rows a micro-batch of a rank has: of one size nowhere, and in 12 rows of 4 tokens.
SPLITS = {1: [[12]], 2: [[5, 2], [1, 4]], 3: [[4], [1], [7]]}
# Sums of at most 48 products in another order; 3 steps.
CLOSE = {"rtol": 1e-11, "atol": 1e-13}


def tokens(step):
    generator = torch.Generator().manual_seed(step)
    inputs = 3 * torch.randn(ROWS, 4, 5, generator=generator, dtype=torch.float64)
    target = torch.randint(C, (ROWS, 4), generator=generator)
    target[torch.arange(ROWS)[:, None] + torch.arange(4) < step + 2] = -100
    return inputs, target


def micro_batches(rank, size, step):
    """Those of a rank: the rows of all ranks one after the other, each rank's split up."""
    inputs, target = tokens(step)
    counts = [count for split in SPLITS[size] for count in split]
    first = sum(len(split) for split in SPLITS[size][:rank])
    pairs = list(zip(inputs.split(counts), target.split(counts), strict=True))
    return pairs[first : first + len(SPLITS[size][rank])]


class Model(nn.Module):
    def __init__(self, weighting):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(5, 6, dtype=torch.float64)
        self.criterion = LinearRGDLoss(6, C, dtype=torch.float64, weighting=weighting)

    def forward(self, input, target, normalizer):
        return self.criterion(torch.tanh(self.body(input)), target, normalizer=normalizer)


def train(model, rank, size, not_yet):
    """Steps of several micro-batches, of which only the last exchanges gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        batches = micro_batches(rank, size, step)
        total = count_targets(batches)
        optimizer.zero_grad()
        for number, (input, target) in enumerate(batches):
            with not_yet(number + 1 < len(batches)):
                model(input, target, total).backward()
        optimizer.step()


def with_ddp(rank, size, weighting):
    model = Model(weighting)
    wrapped = DistributedDataParallel(model) if size > 1 else model

    def not_yet(waits):
        return wrapped.no_sync() if waits and size > 1 else contextlib.nullcontext()

    train(wrapped, rank, size, not_yet)
    return [parameter.detach() for parameter in model.parameters()]


def with_fsdp(rank, size, weighting):
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    mesh = init_device_mesh("cpu", (size,))
    model = Model(weighting)
    fully_shard(model.criterion, mesh=mesh)
    fully_shard(model, mesh=mesh)

    @contextlib.contextmanager
    def not_yet(waits):
        model.set_requires_gradient_sync(not waits)
        yield

    train(model, rank, size, not_yet)
    return [parameter.full_tensor().detach() for parameter in model.parameters()]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("weighting", [rgd.KL(1.0), rgd.Focal(2.0)], ids=str)
def test_data_parallel_steps_of_unequal_micro_batches_are_those_of_one_batch(run, weighting, size):
    expected = with_ddp(0, 1, weighting)
    for outcome in run(size, with_ddp, weighting):
        torch.testing.assert_close(outcome, expected, **CLOSE)


def test_sharded_steps_of_unequal_micro_batches_are_those_of_one_batch(run):
    expected = with_ddp(0, 1, rgd.KL(1.0))
    for outcome in run(2, with_fsdp, rgd.KL(1.0)):
        torch.testing.assert_close(outcome, expected, **CLOSE)


def counted(rank, size):
    target = torch.zeros(2 + rank, dtype=torch.long)
    group = dist.new_group([0])
    alone = count_targets([target], process_group=group) if rank == 0 else None
    criterion = RGDLoss()
    logits = torch.linspace(-1, 1, 3 * (2 + rank), dtype=torch.float64).view(2 + rank, 3)
    objective = criterion(logits.requires_grad_(), target, normalizer=count_targets([target]))
    return count_targets([target]), alone, objective.detach(), criterion.stats(sync=True)


def test_the_count_is_the_sum_over_ranks_over_their_number(run):
    outcomes = run(2, counted)
    assert [outcome[0] for outcome in outcomes] == [2.5, 2.5]
    assert outcomes[0][1] == 2
    # The statistics of the whole batch divide by the sum of all normalizers.
    mean = sum(outcome[2] for outcome in outcomes) / 2
    assert all(abs(outcome[3].objective - mean) < 1e-12 for outcome in outcomes)
