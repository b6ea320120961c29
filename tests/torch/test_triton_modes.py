"""The Triton programs, interpreted, under checkpoints, autocast, compilers, export and with fake tensors."""

import importlib.util
import os

import pytest
import rgd
import torch
from rgd.torch import LinearRGDLoss, RGDLoss, backend, cross_entropy
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
    pytest.skip("runs in Triton's interpreter: make test-gpu-static", allow_module_level=True)

WEIGHTINGS = [rgd.KL(), rgd.KLBall(0.1), rgd.MovingAverage(rgd.KL(), 0.5)]


class Model(torch.nn.Module):
    """A layer, and the loss of its logits or of a linear head."""

    def __init__(self, linear, weighting, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 4 if linear else 9)
        self.criterion = (
            LinearRGDLoss(4, 9, weighting=weighting, chunk_bytes=90, **options)
            if linear
            else RGDLoss(weighting=weighting, **options)
        )

    def forward(self, inputs, target):
        return self.criterion(self.layer(inputs), target)


def batch(rows=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 4, generator=generator, requires_grad=True), torch.arange(rows) % 9


def step(model, call, inputs, target):
    """The loss of a call, the gradients, and the state after it."""
    loss = call(inputs, target)
    grads = torch.autograd.grad(loss.sum() * 2, (inputs, *model.parameters()))
    return loss.detach(), *grads, *[one.clone() for one in model.criterion.state_dict().values()]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear head"])
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_a_checkpoint_changes_nothing_and_moves_a_state_once(weighting, linear, reentrant):
    results = []
    for inside in (False, True):
        model, (inputs, target) = Model(linear, weighting), batch()

        def inner(inputs, target, model=model):
            return checkpoint(model, inputs, target, use_reentrant=reentrant)

        with backend("triton") as ran:
            for _ in range(2):
                loss = (inner if inside else model)(inputs, target)
                loss.backward()
        assert set(ran) == {"triton"}
        grads = [inputs.grad, *(one.grad for one in model.parameters())]
        results.append((loss.detach(), grads, dict(model.criterion.state_dict())))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear head"])
@pytest.mark.parametrize("weighting", WEIGHTINGS[:2], ids=str)
def test_under_autocast_half_precision_gives_a_loss_in_float32(weighting, linear, compiled):
    torch.compiler.reset()
    results = []
    for name in ("composite", "triton"):
        model, given = Model(linear, weighting), batch()
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        with backend(name), torch.autocast("cpu", torch.bfloat16):
            results.append(step(model, call, *given))
    assert results[1][0].dtype is torch.float32
    for mine, other in zip(*results, strict=True):
        assert mine.dtype is other.dtype
        # The interpreter cuts to bfloat16 where torch rounds, some numbers of a sum of 9 twice.
        torch.testing.assert_close(
            mine, other, rtol=2 * 2.0**-8, atol=9 * 2 * 2.0**-8 * float(other.abs().max())
        )


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear head"])
def test_inductor_compiles_one_dynamic_graph_for_every_number_of_rows(linear):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = Model(linear, rgd.KL())
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with backend("triton"):
        for rows in (6, 5, 8):
            found, expected = (step(model, call, *batch(rows)) for call in (compiled, model))
            for mine, other in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_checkpoint_inside_a_compiled_graph_calls_the_operators_again():
    torch.compiler.reset()
    (inputs, target), layer = batch(), torch.nn.Linear(4, 9)

    # A function: a module would leave its statistics behind, which no compiled checkpoint allows.
    def loss(inputs):
        return cross_entropy(layer(inputs), target)

    def inside(inputs):
        return checkpoint(loss, inputs, use_reentrant=False)

    with backend("triton"):
        found, expected = (
            torch.autograd.grad(call(inputs), (inputs, layer.weight))
            for call in (torch.compile(inside, fullgraph=True, backend="aot_eager"), loss)
        )
    torch.testing.assert_close(found, expected)


def test_an_exported_program_holds_torch_operations_alone():
    model, given = Model(False, rgd.KL()), batch()
    with backend("triton"):
        exported = torch.export.export(model, given)
        expected = model(*given)
    assert "rgd" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(*given), expected)


def test_fake_tensors_are_refused_in_eager_calls_and_served_by_default():
    model, given = Model(False, rgd.KL()), batch()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(one.detach()) for one in given]
        with backend("triton"), pytest.raises(RuntimeError, match="a dispatch mode or a tracer is active"):
            model(*fake)
        assert model(*fake).shape == ()
    with backend("triton"), pytest.raises(RuntimeError, match="a tensor is of a subclass"):
        model.criterion(*fake)
