"""The Triton programs under FSDP2 and with a split vocabulary, on two processes, in Triton's interpreter."""

import contextlib
import importlib.util
import os

import pytest
import rgd
import torch
import torch.distributed as dist
from rgd.torch import LinearRGDLoss, RGDLoss, backend, linear_cross_entropy
from torch import nn

if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
    pytest.skip("runs in Triton's interpreter: make test-gpu-static", allow_module_level=True)
if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

B, D, C, STEPS = 8, 6, 11, 3
EXTRAS = ("entropy", "logsumexp", "correct")
WEIGHTINGS = [rgd.KL(1.0), rgd.KLBall(0.1), rgd.MovingAverage(rgd.KL(1.0), 0.5)]
# Steps of sums of at most 11 x 8 numbers below 4, in another order.
CLOSE = {"rtol": 0, "atol": STEPS * B * C * 4 * torch.finfo(torch.float32).eps}


class Model(nn.Module):
    """A layer, and a head whose loss takes its logits or its hidden states."""

    def __init__(self, linear, weighting):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(D, D)
        self.head = nn.Identity() if linear else nn.Linear(D, C)
        options = {"weighting": weighting, "returns": EXTRAS}
        self.criterion = (
            LinearRGDLoss(D, C, bias=True, chunk_bytes=100, **options) if linear else RGDLoss(**options)
        )

    def forward(self, inputs, target):
        return self.criterion(self.head(torch.tanh(self.body(inputs))), target)


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, D, generator=generator), torch.randint(C, (B,), generator=generator)


def train(rank, size, name, linear, weighting):
    """The parameters after some steps on this process's part of a batch, and what computed them."""
    model = Model(linear, weighting)
    if size > 1:
        from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
        from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

        mesh = init_device_mesh("cpu", (size,))
        for unit in (model.body, *([model.criterion] if linear else [model.head])):
            fully_shard(unit, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    inputs, target = batch()
    own, entropies = slice(rank * B // size, (rank + 1) * B // size), []
    with backend(name) as ran:
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(inputs[own], target[own]).backward()
            optimizer.step()
            entropies.append(model.criterion.extras["entropy"])
    whole = [one.full_tensor() if size > 1 else one for one in model.parameters()]
    return [one.detach() for one in whole], torch.stack(entropies), set(ran)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear head"])
def test_sharded_training_equals_one_process_by_torch_operations(run, linear, weighting):
    expected, entropies, _ = train(0, 1, "composite", linear, weighting)
    outcomes = run(2, train, "triton", linear, weighting)
    for parameters, _, ran in outcomes:
        assert ran == {"triton"}
        for mine, other in zip(parameters, expected, strict=True):
            torch.testing.assert_close(mine, other, **CLOSE)
    torch.testing.assert_close(torch.cat([one for _, one, _ in outcomes], 1), entropies, **CLOSE)


def split(rank, size, name, options):
    """Results of a head whose classes are split over the processes."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(B, D, generator=generator), torch.randn(C, D, generator=generator)
    sizes = [C] if size == 1 else [6, 5]
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    inputs = hidden.requires_grad_(), head[own].requires_grad_()
    group = dist.group.WORLD if size > 1 else None
    with backend(name) if name else contextlib.nullcontext():
        loss, extras = linear_cross_entropy(
            *inputs, batch()[1], vocab_group=group, sync=False, returns=EXTRAS, **options
        )
        grads = torch.autograd.grad(loss.sum(), inputs)
    return loss.detach(), extras, *grads


@pytest.mark.parametrize("options", [{}, {"weighting": rgd.KLBall(0.1), "reduction": "none"}], ids=str)
def test_a_split_vocabulary_is_served_by_torch_operations_as_by_default(run, options):
    expected = split(0, 1, "composite", options)
    outcomes = run(2, split, "triton", options)
    for loss, extras, of_hidden, _ in outcomes:
        torch.testing.assert_close((loss, extras, of_hidden), expected[:3], **CLOSE)
    whole = torch.cat([outcome[3] for outcome in outcomes])
    torch.testing.assert_close(whole, expected[3], **CLOSE)
