"""`torch.compile`, `torch.export` and the operators of compiled graphs."""

import itertools

import pytest
import torch
from rgd import KL, KLBall, MovingAverage
from rgd.torch import RGDLoss, backend, cross_entropy, reweighted_mean, sample_weights
from rgd.torch._operators import flattened
from rgd.torch._plan import Plan
from rgd.torch._problem import Options, Problem
from torch._dynamo.testing import CompileCounterWithBackend

# torch's compiler reads the gradient of tensors that have none.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

WEIGHTINGS = [KL(), KL(normalize=True), KLBall(0.1)]
CROSS_ENTROPY = torch.ops.rgd.cross_entropy.default
SAMPLE_WEIGHTS = torch.ops.rgd.sample_weights.default


def kernel(weighting):
    plan = Plan(weighting)
    return plan.kind, plan.numbers


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def batch(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, dtype=dtype, generator=generator) * 2
    return logits.requires_grad_(), torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)


def assert_same_as_eager(compiled, eager, logits, *rest):
    """Bit for bit: a compiled graph calls the same kernel."""
    results = []
    for function in (compiled, eager):
        value = function(logits, *rest)
        upstream = torch.linspace(1, 2, value.numel(), dtype=value.dtype).view(value.shape)
        results.append((value.detach(), *torch.autograd.grad(value, logits, upstream)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def targets_of(graph):
    return {node.target for node in graph.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_every_reduction_compiles_to_one_graph(reduction):
    for per, weighting in [("element", KL()), ("sample", KLBall(0.1))]:
        criterion = RGDLoss(
            torch.linspace(0.5, 2, 5), reduction=reduction, per=per, weighting=weighting, label_smoothing=0.1
        )
        compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
        logits, target = batch(6, 5, 3)
        target[0] = -100
        assert_same_as_eager(compiled, criterion, logits, target)


def test_one_dynamic_graph_serves_every_batch_size():
    counter = CompileCounterWithBackend("aot_eager")
    criterion = RGDLoss()
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend=counter)
    assert_same_as_eager(compiled, criterion, *batch(4, 5))
    compiled_graphs = counter.frame_count
    for n in (9, 33):
        assert_same_as_eager(compiled, criterion, *batch(n, 5))
    assert counter.frame_count == compiled_graphs


def test_a_training_step_compiles_with_inductor():
    torch.manual_seed(0)
    model, criterion = torch.nn.Linear(8, 5), RGDLoss(weighting=KL(normalize=True))

    def objective(inputs, target):
        return criterion(model(inputs), target)

    compiled = torch.compile(objective, fullgraph=True)
    inputs, target = torch.randn(32, 8), torch.randint(0, 5, (32,))
    grads = []
    for function in (objective, compiled):
        model.zero_grad()
        function(inputs, target).backward()
        grads.append(model.weight.grad.clone())
    torch.testing.assert_close(*grads)


def test_the_composite_compiles_with_inductor():
    def objective(logits, target):
        return cross_entropy(logits, target, weighting=KL(normalize=True), per="sample")

    logits, target = batch(6, 5, 3, dtype=torch.float64)
    compiled = torch.compile(objective, fullgraph=True)
    with backend("composite"):
        value = compiled(logits, target)
        (grad,) = torch.autograd.grad(value, logits)
    expected = objective(logits, target)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, *torch.autograd.grad(expected, logits), rtol=1e-12, atol=1e-14)


def test_compiling_without_fullgraph_works_around_a_user_s_graph_break():
    criterion = RGDLoss(tau=2.0)

    def objective(logits, target):
        torch._dynamo.graph_break()
        value = criterion(logits, target)
        torch._dynamo.graph_break()
        return value * 2

    compiled = torch.compile(objective, backend="aot_eager")
    assert_same_as_eager(compiled, objective, *batch(6, 5))


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_weights_and_the_reweighted_mean_compile(weighting):
    losses = (torch.rand(8, 3) * 3).requires_grad_()
    where = losses > 1

    def masked(losses, where):
        return reweighted_mean(losses, weighting, where=where)

    def weigh(losses):
        return sample_weights(losses, weighting)

    assert_same_as_eager(torch.compile(masked, fullgraph=True, backend="aot_eager"), masked, losses, where)
    compiled = torch.compile(weigh, fullgraph=True, backend="aot_eager")
    weights = compiled(losses)
    assert not weights.requires_grad
    torch.testing.assert_close(weights, weigh(losses), rtol=0, atol=0)


def test_a_base_loss_with_a_mask_compiles():
    criterion = RGDLoss(base=torch.nn.BCEWithLogitsLoss(reduction="none"), per="sample")
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    logits, _ = batch(6, 5)
    labels, where = (logits.detach() > 1).float(), torch.rand(6, 5) > 0.4

    def run(function):
        return lambda logits, labels, where: function(logits, labels, where=where)

    assert_same_as_eager(run(compiled), run(criterion), logits, labels, where)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_class_probabilities_compile(dtype):
    logits, _ = batch(6, 5)
    logits = logits.detach().to(dtype).requires_grad_()
    target = torch.randn(6, 5).softmax(1)
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    assert_same_as_eager(compiled, cross_entropy, logits, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(logits, target).dtype == torch.float32


def test_class_probabilities_that_require_grad_compile_to_torch_operations():
    logits, _ = batch(6, 5)
    target = torch.randn(6, 5).softmax(1).requires_grad_()
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(logits, target), (logits, target))
    expected = torch.autograd.grad(cross_entropy(logits, target), (logits, target))
    torch.testing.assert_close(got, expected)


def test_stats_describe_a_compiled_call():
    criterion = RGDLoss(torch.linspace(0.5, 2, 5))
    logits, target = batch(16, 5)
    criterion(logits, target)
    expected = criterion.stats()
    other = RGDLoss(torch.linspace(0.5, 2, 5))
    torch.compile(other, fullgraph=True, backend="aot_eager")(logits, target)
    assert other.stats() == expected
    assert other.backend == "rust"


def test_the_graph_calls_the_kernel_and_the_switch_makes_it_torch_operations():
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(cross_entropy, fullgraph=True, backend=keep)
    logits, target = batch(6, 5)
    value = compiled(logits, target)
    with backend("composite"):
        composite = compiled(logits, target)
    torch.testing.assert_close(value, composite)
    assert [CROSS_ENTROPY in targets_of(graph) for graph in graphs] == [True, False]


def test_double_backward_through_a_graph_run_eagerly_is_right():
    logits, target = batch(6, 5, dtype=torch.float64)
    results = []
    for function in (torch.compile(cross_entropy, fullgraph=True, backend="eager"), cross_entropy):
        (grad,) = torch.autograd.grad(function(logits, target), logits, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), logits))
    torch.testing.assert_close(*results)
    assert results[0][0].any()


def test_transforms_within_a_compiled_function_work():
    logits, target = batch(6, 1, 5)
    logits, target = logits.detach(), torch.randint(0, 5, (6, 1))
    per_sample = torch.vmap(torch.func.grad(cross_entropy))
    compiled = torch.compile(per_sample, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, target), per_sample(logits, target))


def test_a_compiled_call_runs_without_grad():
    criterion = RGDLoss(evaluate="weighted")
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    logits, target = batch(6, 5)
    expected = criterion(logits, target).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(compiled(logits, target).clone(), expected, rtol=0, atol=0)


def test_a_compiled_call_without_grad_is_plain_whatever_the_mode_of_the_module():
    criterion = RGDLoss(weighting=MovingAverage(KL(scale=-3.0), decay=0.5))
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    logits, target = batch(6, 5)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            expected = torch.nn.functional.cross_entropy(logits, target)
            torch.testing.assert_close(compiled(logits, target).clone(), expected)
    assert int(criterion.state_dict()["weighting_state.updates"]) == 0


def test_bad_input_is_refused_in_a_compiled_call_too():
    compiled = torch.compile(cross_entropy, backend="aot_eager")
    logits, target = batch(6, 5)
    with pytest.raises(ValueError, match="target must have shape"):
        compiled(logits, target[:3])
    target[2] = 7
    with pytest.raises(IndexError, match="7"):
        compiled(logits, target)


class Classifier(torch.nn.Module):
    """A model that returns its training loss."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(5, 5)
        self.criterion = RGDLoss(weighting=KL(normalize=True))

    def forward(self, inputs, target):
        return self.criterion(self.linear(inputs), target)


@pytest.mark.parametrize("strict", [False, True])
def test_export_gives_a_program_of_torch_operations_for_every_batch_size(strict):
    model = Classifier()
    inputs, target = (t.detach() for t in batch(6, 5))
    size = torch.export.Dim("n", min=2)
    program = torch.export.export(
        model, (inputs, target), dynamic_shapes=({0: size}, {0: size}), strict=strict
    )
    assert not [t for t in targets_of(program.graph_module) if "rgd" in str(t)]
    for n in (3, 6, 40):
        inputs, target = batch(n, 5, seed=n)
        torch.testing.assert_close(program.module()(inputs, target), model(inputs, target))


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
@pytest.mark.parametrize("per", ["element", "sample"])
def test_the_cross_entropy_operator_passes_opcheck(weighting, per):
    logits, target = batch(4, 3, 2)
    soft = logits.detach().softmax(1)
    weight = torch.linspace(0.5, 2, 3)
    for reduction, (y, w) in itertools.product(["none", "mean"], [(target, weight), (soft, None)]):
        options = Options(label_smoothing=0.1, reduction=reduction, per=per)
        given = Problem(logits, y, options, class_weight=w)
        torch.library.opcheck(CROSS_ENTROPY, (*flattened(given), True, *kernel(weighting)))
    given = Problem(logits.detach(), target, options, class_weight=weight)
    torch.library.opcheck(CROSS_ENTROPY, (*flattened(given), False, *kernel(weighting)))


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_the_weights_operator_passes_opcheck(weighting):
    losses = torch.rand(5, 2, requires_grad=True)
    torch.library.opcheck(SAMPLE_WEIGHTS, (losses, *kernel(weighting)))
    torch.library.opcheck(SAMPLE_WEIGHTS, (losses.detach(), *kernel(weighting)))
