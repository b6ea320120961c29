"""The ways of running PyTorch: function transforms, grad modes, checkpointing, tracing."""

import copy
import itertools
import pathlib
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from rgd import KL, KLBall, MovingAverage
from rgd.torch import RGDLoss, backend, cross_entropy, reweighted_mean, sample_weights
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

WEIGHTINGS = [KL(), KL(normalize=True), KLBall(0.1)]
ERM = KL(scale=0.0)

# torch compiles decompositions with its own deprecated compiler when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is:FutureWarning")


def batch(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, dtype=dtype, generator=generator) * 2
    return logits, torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)


def gradient(logits, target, **kwargs):
    logits = logits.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(cross_entropy(logits, target, **kwargs), logits)
    return grad


# torch.func


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_vmap_computes_the_loss_and_weights_of_every_batch_by_itself(weighting):
    logits, target = batch(3, 5, 4)
    logits, target = logits.transpose(1, 2), target[:, 0:1].expand(3, 4) % 5
    logits = logits.contiguous()
    with backend() as ran:
        objectives = torch.vmap(lambda x, y: cross_entropy(x, y, weighting=weighting))(logits, target)
        weights = torch.vmap(lambda x: sample_weights(x, weighting))(logits)
    assert ran == ["composite"] * 2
    for i in range(3):
        torch.testing.assert_close(objectives[i], cross_entropy(logits[i], target[i], weighting=weighting))
        torch.testing.assert_close(weights[i], sample_weights(logits[i], weighting))


@pytest.mark.parametrize("randomized", ["logits", "parameters"])
def test_per_sample_gradients_by_vmap_of_grad_equal_those_of_a_loop(randomized):
    logits, target = batch(6, 4)
    matrix = torch.eye(4, dtype=torch.float64)

    def loss(matrix, x, y):
        return RGDLoss(tau=2.0)((matrix @ x).unsqueeze(0), y.unsqueeze(0))

    argnum = 1 if randomized == "logits" else 0
    grads = torch.vmap(torch.func.grad(loss, argnums=argnum), in_dims=(None, 0, 0))(matrix, logits, target)
    for i in range(6):
        inputs = [matrix.clone().requires_grad_(), logits[i].clone().requires_grad_()]
        (expected,) = torch.autograd.grad(loss(*inputs, target[i]), inputs[argnum])
        torch.testing.assert_close(grads[i], expected)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
@pytest.mark.parametrize("per", ["element", "sample"])
def test_func_grad_and_jacrev_take_the_weights_as_constants(weighting, per):
    logits, target = batch(5, 4, 3)
    expected = gradient(logits, target, weighting=weighting, per=per)

    def objective(x):
        return cross_entropy(x, target, weighting=weighting, per=per)

    torch.testing.assert_close(torch.func.grad(objective)(logits), expected)
    torch.testing.assert_close(torch.func.jacrev(objective)(logits), expected)
    value, vjp = torch.func.vjp(objective, logits)
    torch.testing.assert_close(vjp(torch.ones_like(value))[0], expected)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_forward_mode_takes_the_weights_as_constants(weighting):
    logits, target = batch(5, 4)
    tangent = torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4)
    grad = gradient(logits, target, weighting=weighting)

    def objective(x):
        return cross_entropy(x, target, weighting=weighting)

    value, directional = torch.func.jvp(objective, (logits,), (tangent,))
    torch.testing.assert_close(value, objective(logits))
    torch.testing.assert_close(directional, (grad * tangent).sum())
    with backend() as ran, forward_ad.dual_level():
        dual = forward_ad.make_dual(logits, tangent)
        directional = forward_ad.unpack_dual(objective(dual)).tangent
        mean = forward_ad.unpack_dual(reweighted_mean(dual, weighting)).tangent
        assert forward_ad.unpack_dual(sample_weights(dual, weighting)).tangent is None
    assert set(ran) == {"composite"}
    torch.testing.assert_close(directional, (grad * tangent).sum())
    torch.testing.assert_close(mean, (sample_weights(logits, weighting) * tangent).mean())


def test_nested_transforms_give_the_hessian_of_cross_entropy():
    logits, target = batch(3, 4)
    for hessian in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.grad(f))):
        torch.testing.assert_close(
            hessian(lambda x: cross_entropy(x, target, weighting=ERM))(logits),
            hessian(lambda x: F.cross_entropy(x, target))(logits),
        )


def test_a_model_s_loss_is_differentiated_by_functional_call():
    model, criterion = torch.nn.Linear(4, 3).double(), RGDLoss()
    inputs, target = batch(6, 4)
    target %= 3
    parameters = dict(model.named_parameters())

    def objective(parameters):
        return criterion(torch.func.functional_call(model, parameters, inputs), target)

    grads = torch.func.grad(objective)(parameters)
    criterion(model(inputs), target).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(grads[name], parameter.grad)


def test_a_call_under_a_transform_leaves_nothing_behind_that_must_not_outlive_it():
    criterion = RGDLoss()
    logits, target = batch(3, 5, 4)
    criterion(logits[0], target[:1, 0].expand(5) % 4)
    torch.vmap(criterion)(logits, target[:, :1].expand(3, 5) % 4)
    assert criterion.backend is None
    with pytest.raises(RuntimeError, match="leave nothing behind"):
        criterion.stats()


# Grad modes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_values_are_the_same_without_grad(mode):
    logits, target = batch(7, 4)
    logits.requires_grad_()
    criterion = RGDLoss(evaluate="weighted")
    expected = criterion(logits, target).detach()
    for name in ("rust", "composite"):
        with mode(), backend(name):
            value = criterion(logits, target)
            weights = sample_weights(logits)
            mean = reweighted_mean(logits, where=logits > 0)
        assert not any(tensor.requires_grad for tensor in (value, weights, mean))
        torch.testing.assert_close(value.clone(), expected)
        assert criterion.stats().count == 7


def test_a_tensor_of_inference_mode_is_read_outside_of_it():
    logits, target = batch(7, 4)
    with torch.inference_mode():
        inferred = logits * 1
    torch.testing.assert_close(RGDLoss()(inferred, target), RGDLoss()(logits, target))


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled", "ignore:Error detected in")
def test_anomaly_mode_finds_nothing_in_a_sound_batch_and_a_nan_in_a_broken_one():
    logits, target = batch(7, 4)
    logits.requires_grad_()
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        RGDLoss()(logits, target).backward()
        (grad,) = torch.autograd.grad(RGDLoss()(logits, target), logits, create_graph=True)
        grad.square().sum().backward()
        broken = logits.detach().clone()
        broken[0, 0] = torch.nan
        with pytest.raises(RuntimeError, match="nan values"):
            RGDLoss()(broken.requires_grad_(), target).backward()


@pytest.mark.parametrize("name", ["rust", "composite"])
def test_a_graph_that_is_kept_is_gone_through_twice(name):
    logits, target = batch(7, 4)
    logits.requires_grad_()
    with backend(name):
        objective = cross_entropy(logits, target)
        objective.backward(retain_graph=True)
        once = logits.grad.clone()
        (objective * 3).backward()
    torch.testing.assert_close(logits.grad, 4 * once)


@pytest.mark.parametrize("name", ["rust", "composite"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradient(name, reentrant):
    inputs, target = batch(7, 4)
    model, criterion = torch.nn.Linear(4, 4).double(), RGDLoss(weighting=KLBall(0.1))
    criterion(model(inputs), target).backward()
    expected = model.weight.grad.clone()
    model.zero_grad()
    with backend(name):
        value = checkpoint(
            lambda x: criterion(model(x), target), inputs.requires_grad_(), use_reentrant=reentrant
        )
        value.backward()
    torch.testing.assert_close(model.weight.grad, expected)


def test_saved_tensors_may_be_moved_elsewhere_by_hooks():
    logits, target = batch(7, 4)
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.clone()

    scored = logits.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        objective = cross_entropy(scored, target)
    objective.backward()
    assert torch.Size((7, 4)) in packed
    torch.testing.assert_close(scored.grad, gradient(logits, target))


# Tracing


def graph_of(function, *inputs):
    graph = make_fx(function, tracing_mode="fake")(*inputs)
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    return {target.name() for target in called if isinstance(target, torch._ops.OpOverload)}, graph


READ_NOTHING = [*WEIGHTINGS, ERM, KLBall(0.0)]


@pytest.mark.parametrize("weighting", READ_NOTHING, ids=str)
def test_the_composite_s_graph_reads_no_value_on_the_host(weighting):
    logits, target = batch(6, 4, 3)
    weight = torch.linspace(0.5, 2, 4, dtype=torch.float64)
    where = torch.rand(6, 4, 3) > 0.3

    # Three weightings that follow each other meet all three reductions with each of the other options.
    first = READ_NOTHING.index(weighting)

    def step(logits, target, weight):
        values = [
            cross_entropy(
                logits,
                y,
                w,
                weighting=weighting,
                per=per,
                reduction=("none", "mean", "sum")[i % 3],
                label_smoothing=0.1,
            )
            for i, (y, w, per) in enumerate(
                itertools.product([target, logits.softmax(1)], [None, weight], ["element", "sample"]), first
            )
        ]
        return torch.autograd.grad(sum(value.sum() for value in values), logits)

    def mask(losses, where):
        return torch.autograd.grad(reweighted_mean(losses, weighting, where=where), losses)

    for function, inputs in [(step, (logits, target, weight)), (mask, (logits, where))]:
        inputs[0].requires_grad_()
        called, graph = graph_of(function, *inputs)
        assert called
        waiting = ("aten::item", "_local_scalar_dense", "nonzero", "masked_select", "unique")
        assert not [name for name in called if any(w in name for w in waiting)]
        # Indexing by booleans counts them on the host.
        for node in graph.graph.nodes:
            if node.op == "call_function" and "index" in str(node.target):
                assert "bool" not in str([a.meta["val"].dtype for a in node.all_input_nodes])
        for got, expected in zip(graph(*inputs), function(*inputs), strict=True):
            torch.testing.assert_close(got, expected)


def test_fake_tensors_flow_through():
    from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC0415

    with FakeTensorMode() as mode:
        logits = torch.randn(6, 4, dtype=torch.bfloat16, requires_grad=True)
        value = RGDLoss(weighting=KLBall(0.1))(logits, torch.zeros(6, dtype=torch.long))
        value.backward()
        weights = sample_weights(mode.from_tensor(torch.rand(3)))
    assert (value.shape, value.dtype, logits.grad.shape, weights.shape) == ((), torch.bfloat16, (6, 4), (3,))


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.trace", "ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning"
)
def test_a_trace_computes_and_does_not_repeat_the_numbers_it_was_made_with():
    logits, target = batch(6, 4)
    others, other_target = batch(6, 4)
    others, other_target = others.flip(0) * 2, other_target.flip(0)
    traced = torch.jit.trace(cross_entropy, (logits, target), check_trace=False)
    torch.testing.assert_close(traced(others, other_target), cross_entropy(others, other_target))


# Modules


class Holder(torch.nn.Module):
    """A model as a trainer wants it: the loss is a part of it, and `forward` gives the logits."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
        self.criterion = RGDLoss(torch.ones(3), weighting=MovingAverage(KL(), 0.9))

    def forward(self, inputs):
        return self.layer(inputs)


class Caller(Holder):
    def forward(self, inputs, target):
        return self.criterion(self.layer(inputs), target)


@pytest.mark.filterwarnings("ignore")  # torch's own: TorchScript is deprecated
def test_torch_jit_script_takes_a_model_that_holds_the_loss_and_not_one_that_calls_it():
    inputs = torch.randn(5, 4)
    model = Holder()
    torch.testing.assert_close(torch.jit.script(model)(inputs), model(inputs))
    with pytest.raises(ValueError, match="Unknown type annotation"):
        torch.jit.script(Caller())


@pytest.mark.filterwarnings("ignore")
def test_torch_jit_trace_and_torch_export_take_a_model_that_calls_the_loss():
    model, inputs, target = Caller(), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    model.criterion = RGDLoss(torch.ones(3))
    expected = model(inputs, target)
    torch.testing.assert_close(torch.jit.trace(model, (inputs, target))(inputs, target), expected)
    exported = torch.export.export(model, (inputs, target)).module()
    torch.testing.assert_close(exported(inputs, target), expected)


def test_a_used_loss_is_copied_pickled_and_moved():
    logits, target = batch(6, 4)
    criterion = RGDLoss(torch.ones(4, dtype=torch.float64), weighting=KLBall(0.1))
    expected = criterion(logits, target)
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion)), criterion.to("cpu")):
        torch.testing.assert_close(other(logits, target), expected)


# Documentation


def test_the_code_of_the_page_on_backends_runs_and_prints_what_it_says(capsys):
    page = (pathlib.Path(__file__).parents[2] / "docs" / "backends.md").read_text(encoding="utf-8")
    for code in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(code, {})
        said = [line.split("# ")[1] for line in code.splitlines() if line.startswith("print")]
        printed = capsys.readouterr().out.splitlines()
        assert said
        assert [line.split(":")[0] for line in said] == printed
