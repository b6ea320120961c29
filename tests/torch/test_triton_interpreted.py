"""The Triton programs in Triton's interpreter, against torch operations, with `TRITON_INTERPRET=1` set.

Launches are watched: they may touch nothing but the elements of their tensors, and no two programs one place.
"""

import importlib.util
import inspect
import json
import math
import os
import pathlib
import sys

import pytest
import rgd
import torch
import torch.nn.functional as F
from rgd.torch import LinearRGDLoss, RGDLoss, backend, cross_entropy, linear_cross_entropy
from torch.utils.checkpoint import checkpoint

if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
    pytest.skip("runs in Triton's interpreter: make test-gpu-static", allow_module_level=True)
sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benches"))

from _gpu_cases import EXTRAS, WEIGHTINGS, case_of, cast, distance, linear_value_and_grads, value_and_grad
from _gpu_watch import Watch
from rgd.torch.backends.triton import _kernels, _launch, _passes

INF, NAN = math.inf, math.nan
# A sum of up to 130 float32 terms in another order, in numbers up to 50 before their differences.
FLOAT32 = 1e-6
# The interpreter cuts to bfloat16 where a device rounds: a whole unit in the last of 8 bits for the gradient
# that is kept and for its product with what comes from above, and half a unit for the latter.
BFLOAT16 = 2.5 * 2.0**-8


@pytest.fixture(params=["once", "in blocks"])
def reads(request, monkeypatch):
    """Rows of a small size that are kept in registers, and rows that are read in blocks; several programs."""
    monkeypatch.setattr(_launch, "_TILE", 16)
    if request.param == "in blocks":
        for name in ("ONCE_CLASSES", "ONCE_SOFT_CLASSES", "_BLOCK", "_ALONG_ROWS", "_BLOCK_ALONG_ROWS"):
            monkeypatch.setattr(_launch, name, 4)
    return request.param


@pytest.mark.usefixtures("reads")
@pytest.mark.parametrize("seed", range(120))
def test_a_call_of_any_options_equals_that_in_float64(seed):
    case = cast(case_of(seed), torch.float32)
    expected = value_and_grad(cast(case, torch.float64), "composite")
    with Watch():
        found = value_and_grad(case, "triton")
    assert max(map(distance, found, expected)) < FLOAT32, case


@pytest.mark.usefixtures("reads")
@pytest.mark.parametrize("seed", range(120, 160))
def test_a_bfloat16_call_equals_that_of_its_numbers_in_float32(seed):
    case = cast(case_of(seed), torch.bfloat16)
    expected = value_and_grad(cast(case, torch.float32), "composite")
    with Watch():
        value, grad, beside = value_and_grad(case, "triton")
    assert distance(value, expected[0]) < BFLOAT16
    assert distance(grad, expected[1]) < BFLOAT16, case
    # Both see the same numbers.
    assert distance(beside, expected[2]) < FLOAT32, case


@pytest.mark.usefixtures("reads")
@pytest.mark.parametrize("seed", range(160, 180))
def test_a_float16_call_keeps_its_gradient_in_float32_for_the_loss_scale(seed):
    case = cast(case_of(seed), torch.float16)
    expected = value_and_grad(cast(case, torch.float32), "composite")
    with Watch():
        value, grad, beside = value_and_grad(case, "triton")
    assert distance(value, expected[0]) < 2.0**-10
    assert distance(grad, expected[1]) < 2.0**-10, case
    assert distance(beside, expected[2]) < FLOAT32, case


@pytest.mark.usefixtures("reads")
@pytest.mark.parametrize("seed", range(180, 210))
def test_the_gradient_may_take_the_place_of_the_logits(seed):
    case = cast(case_of(seed), torch.float32)
    expected = value_and_grad(case, "triton")
    with Watch():
        found = value_and_grad(case, "triton", inplace=True)
    assert max(map(distance, found, expected)) < FLOAT32, case


@pytest.mark.usefixtures("reads")
@pytest.mark.parametrize("seed", range(210, 250))
def test_a_linear_head_equals_that_in_float64(seed):
    case = cast(case_of(seed, [(12, 4), (9, 33), (1, 5), (5, 130)]), torch.float32)
    options = {"chunk_bytes": 500, "logit_softcap": 5.0 if seed % 3 else None}
    options["accumulate_dtype"] = torch.float64 if seed % 4 == 0 else None
    expected = linear_value_and_grads(cast(case, torch.float64), "composite", **options)
    with Watch():
        found = linear_value_and_grads(case, "triton", **options)
    assert max(map(distance, found, expected)) < 2 * FLOAT32, case


def test_every_option_and_weighting_is_among_the_random_calls():
    used = set().union(*(cast(case_of(seed), torch.float32).used() for seed in range(120)))
    # The tensors of a call, short forms, and options of several values or of tests of their own.
    others = {
        "logits", "target", "tau", "scale", "weighting", "reduction", "per", "inplace", "state",
        "num_segments", "process_group", "sync",
    }  # fmt: skip
    assert set(inspect.signature(cross_entropy).parameters) - others <= used
    names = {type(weighting).__name__ for weighting in WEIGHTINGS}
    assert names | {"mean", "sum", "none", "element", "sample"} <= used
    assert {"probabilities", "int32", "int64", "ignored", "-inf"} <= used


@pytest.mark.usefixtures("reads")
@pytest.mark.parametrize("normalizer", [7.0, 0.0])
def test_a_normalizer_on_the_device_divides_and_nobody_reads_it(normalizer, monkeypatch):
    # As on a GPU: 0 is not refused there, and makes NaN.
    monkeypatch.setattr("rgd.torch.normalizer.values_can_be_read", lambda tensor: False)
    hidden, head, target = torch.randn(9, 4), torch.randn(7, 4), torch.arange(9) % 7
    target[2] = -100
    options = {"normalizer": torch.tensor(normalizer), "sample_weight": torch.rand(9), "z_loss": 1e-2}
    for weighting in (rgd.KL(), rgd.KLBall(0.1)):
        found = []
        for name in ("composite", "triton"):
            inputs = hidden.clone().requires_grad_(), head.clone().requires_grad_()
            with backend(name), Watch():
                dense = cross_entropy(F.linear(*inputs), target, weighting=weighting, **options)
                chunked = linear_cross_entropy(
                    *inputs, target, weighting=weighting, chunk_bytes=60, **options
                )
                both = [torch.autograd.grad(value, inputs) for value in (dense, chunked)]
            found.append([dense.detach(), chunked.detach(), *both[0], *both[1]])
        expected, mine = (torch.cat([one.flatten().double() for one in each]) for each in found)
        assert distance(mine, expected) < 2 * FLOAT32
        assert mine.isnan().any() == (normalizer == 0)


@pytest.mark.parametrize("strides", ["rows", "columns", "channels last", "reversed axes", "slices"])
def test_logits_may_lie_in_memory_in_any_order(strides):
    logits = {
        "rows": lambda: torch.randn(20, 9)[::3],
        "columns": lambda: torch.randn(9, 7).t(),
        "channels last": lambda: torch.randn(2, 5, 3, 4).to(memory_format=torch.channels_last),
        "reversed axes": lambda: torch.randn(4, 3, 5, 2).permute(3, 2, 1, 0),
        "slices": lambda: torch.randn(3, 9, 8)[:, 2:7, ::2],
    }[strides]()
    target = torch.randint(0, logits.shape[1], logits.shape[:1] + logits.shape[2:])
    for soft in (False, True):
        given = torch.randn(logits.shape).softmax(1) if soft else target
        results = []
        for name in ("composite", "triton"):
            leaf = logits.detach().requires_grad_()
            with backend(name), Watch():
                value = cross_entropy(leaf, given)
                (grad,) = torch.autograd.grad(value, leaf)
            results.append((value.detach(), grad))
        for found, expected in zip(results[1], results[0], strict=True):
            assert distance(found.double(), expected.double()) < FLOAT32


def test_offsets_beyond_two_to_the_31_reach_their_elements():
    # Memory that is not touched takes none.
    try:
        memory = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("the system gives no 4 GB of address space")
    for shape, stride in (((3, 5, 1), (2**30, 1, 1)), ((1, 3, 7), (1, 2**30, 1)), ((1, 5, 3), (1, 1, 2**30))):
        far = memory.as_strided(shape, stride)
        far.copy_(torch.randn(shape))
        target = torch.zeros(shape[0], shape[2], dtype=torch.long)
        with backend("triton"):
            losses = cross_entropy(far, target, weighting=rgd.ERM(), reduction="none")
        expected = F.cross_entropy(far.float(), target, reduction="none")
        torch.testing.assert_close(losses.float(), expected, rtol=2**-8, atol=0)


@pytest.mark.usefixtures("reads")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_logits_that_are_not_finite_do_what_cross_entropy_loss_does(value, smoothing):
    logits = torch.randn(6, 9)
    target = torch.tensor([0, 1, 2, 3, 4, 5])
    logits[1, 0] = logits[2, 2] = value
    logits[3] = value
    options = {"reduction": "none", "label_smoothing": smoothing}
    with Watch():
        results = []
        for function in (
            lambda x: F.cross_entropy(x, target, **options),
            lambda x: cross_entropy(x, target, weighting=rgd.KL(scale=0.0), **options),
        ):
            leaf = logits.clone().requires_grad_()
            with backend("triton"):
                losses = function(leaf)
            (grad,) = torch.autograd.grad(losses.sum(), leaf)
            results.append((losses.detach(), grad))
    (expected, expected_grad), (losses, grad) = results
    torch.testing.assert_close(losses, expected, equal_nan=True)
    # Where -inf has no mass: 0 times -inf is 0 in rgd, and NaN in torch's backward pass of a finite loss.
    finite = expected.isfinite()
    torch.testing.assert_close(grad[finite], expected_grad[finite], equal_nan=True)


def test_a_label_that_is_no_class_is_named_or_makes_nan_and_never_reads_elsewhere(monkeypatch):
    logits = torch.randn(4, 5, requires_grad=True)
    target = torch.tensor([0, 5, -1, 2**40])
    with backend("triton"), pytest.raises(IndexError, match="5"):
        cross_entropy(logits, target)
    # As on a GPU, where nobody waits to look at labels.
    monkeypatch.setattr(sys.modules["rgd.torch.backends.triton"], "check_labels", lambda problem: None)
    for weighting in (rgd.KL(), rgd.CVaR(1.0)):
        with Watch(), backend("triton"):
            losses = cross_entropy(logits, target, weighting=weighting, reduction="none")
            (grad,) = torch.autograd.grad(losses.sum(), logits)
        assert losses.isnan()[1:].all()
        assert grad.isnan().any(1)[1:].all()
        assert losses.isnan()[0] == (not weighting.pointwise)


def test_the_mean_of_nothing_is_nan_and_an_empty_batch_starts_no_program():
    logits = torch.randn(4, 3)
    for x, y in ((logits, torch.full((4,), -100)), (logits[:0], torch.zeros(0, dtype=torch.long))):
        for weighting in (rgd.KL(), rgd.KLBall(0.1)):
            leaf = x.clone().requires_grad_()
            with backend("triton"), Watch() as watch:
                value = cross_entropy(leaf, y, weighting=weighting)
                (grad,) = torch.autograd.grad(value, leaf)
                total = cross_entropy(leaf, y, weighting=weighting, reduction="sum")
            assert value.isnan()
            assert total == 0
            assert not grad.any()
        assert bool(watch.launches) == bool(len(y))


# Reads and writes


@pytest.mark.parametrize(
    ("classes", "weighting", "most"),
    [
        (33, rgd.KL(), 1),
        (16384, rgd.KL(), 1),
        (16385, rgd.KL(), 2),
        (33, rgd.KLBall(0.1), 2),
        (16385, rgd.KLBall(0.1), 2),
    ],
)
def test_a_training_call_reads_each_logit_once_or_twice_and_writes_its_gradient_once(
    classes, weighting, most
):
    logits, target = torch.randn(3, classes, requires_grad=True), torch.tensor([0, classes - 1, 2])
    with backend("triton"), Watch() as watch:
        loss = cross_entropy(logits, target, weighting=weighting)
        loss.backward()
    # The label's logit is read once more, alone.
    reads, writes = watch.total("logits")[0], watch.total("gradient")
    passes = 1 if weighting.pointwise else 2
    assert most <= reads <= most + passes * 3 / logits.numel()
    assert writes == (0, 1)


def test_the_counts_of_the_table_are_those_that_the_page_gives():
    found = importlib.import_module("gpu_static").count()
    expected = [(1, 1), (1, 1), (1, 1), (2, 1), (2, 1), (2, 1), (2, 1), (1, 0)]
    assert list(map(tuple, found.values())) == expected


def test_losses_alone_cost_one_read_and_no_write():
    logits, target = torch.randn(3, 20000), torch.tensor([0, 1, 2])
    with backend("triton"), torch.no_grad(), Watch() as watch:
        cross_entropy(logits, target)
    reads, writes = watch.total("logits")
    assert 1 <= reads <= 1 + 3 / logits.numel()
    assert writes == 0
    assert "gradient" not in watch.launches[0][1]


def test_rows_that_are_ignored_are_not_read_and_their_gradient_is_0_whatever_they_hold():
    logits, target = torch.randn(8, 16), torch.arange(8)
    target[::2] = -100
    logits[::2] = NAN
    for weighting in (rgd.KL(), rgd.KLBall(0.1)):
        leaf = logits.clone().requires_grad_()
        with backend("triton"), Watch() as watch:
            loss = cross_entropy(leaf, target, weighting=weighting)
            loss.backward()
        assert loss.isfinite()
        assert not leaf.grad[::2].any()
        assert leaf.grad[1::2].all()
        assert watch.total("logits")[0] <= (1 + (not weighting.pointwise)) * (0.5 + 1 / 16)


def test_the_backward_pass_moves_nothing_where_1_comes_from_above():
    logits, target = torch.randn(5, 9, requires_grad=True), torch.arange(5)
    with backend("triton"), Watch() as watch:
        loss = cross_entropy(logits, target)
        loss.backward()
        assert watch.launches[-1][1]["gradient"][1:] == (0, 0)
        plain = logits.grad.clone()
        (half,) = torch.autograd.grad(cross_entropy(logits, target) / 2, logits)
        assert watch.launches[-1][1]["gradient"][1:] == (45, 45)
        rows = cross_entropy(logits, target, reduction="none")
        rows.backward(torch.tensor([1.0, 2.0, 1.0, 0.0, 1.0]))
        assert watch.launches[-1][1]["gradient"][1:] == (18, 18)
    torch.testing.assert_close(half, plain / 2)


# Autograd


@pytest.mark.parametrize("weighting", [rgd.KL(), rgd.KLBall(0.2)], ids=str)
def test_a_kept_graph_gives_its_gradient_again_and_second_derivatives_are_those_of_torch(weighting):
    logits, target = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, -100])
    found = []
    for name in ("composite", "triton"):
        with backend(name):
            loss = cross_entropy(logits, target, weighting=weighting) * 3
        first, again = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
        torch.testing.assert_close(first, again, rtol=0, atol=0)
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), logits)
        found.append((first, second))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same(reentrant):
    hidden, target = torch.randn(6, 4, requires_grad=True), torch.arange(6) % 5
    layer = torch.nn.Linear(4, 5)

    def loss(x):
        return cross_entropy(layer(x), target)

    with backend("triton"):
        (expected,) = torch.autograd.grad(loss(hidden), hidden)
        checkpoint(loss, hidden, use_reentrant=reentrant).backward()
    torch.testing.assert_close(hidden.grad, expected)


def test_logits_changed_after_the_call_do_not_change_its_gradient():
    leaf, target = torch.randn(4, 5, requires_grad=True), torch.arange(4)
    with backend("triton"):
        (expected,) = torch.autograd.grad(cross_entropy(leaf * 1, target), leaf)
        logits = leaf * 1
        loss = cross_entropy(logits, target)
        with torch.no_grad():
            logits.zero_()
        (grad,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(grad, expected)


def test_autocast_returns_float32_and_stats_describe_the_call():
    logits, target = torch.randn(8, 3), torch.arange(8) % 3
    criterion = RGDLoss(z_loss=1e-3, label_smoothing=0.1)
    with backend("triton"), torch.autocast("cpu", torch.bfloat16):
        value = criterion(logits.bfloat16().requires_grad_(), target)
    assert (value.dtype, criterion.backend) == (torch.float32, "triton")
    found = criterion.stats()
    with backend("composite"):
        criterion(logits.bfloat16().float(), target)
    expected = criterion.stats()
    for field in ("count", "mean_loss", "objective", "max_weight", "effective_sample_size"):
        assert getattr(found, field) == pytest.approx(getattr(expected, field), rel=1e-6)


# Compiled graphs


def options_of_graphs():
    return [
        {"weighting": rgd.KL()},
        {"weighting": rgd.Focal(2.0), "reduction": "none", "z_loss": 1e-3},
        {"weighting": rgd.Threshold(1.0)},
        {"weighting": rgd.KLBall(0.1), "z_loss": 1e-3, "label_smoothing": 0.1},
        {"weighting": rgd.KL(), "per": "sample", "reduction": "sum"},
        {"weighting": rgd.KL(), "normalizer": 2.5},
        {"weighting": rgd.KLBall(0.1), "normalizer": 2.5},
    ]


@pytest.mark.parametrize("options", options_of_graphs(), ids=str)
def test_a_compiled_call_equals_the_eager_one(options):
    torch.compiler.reset()
    logits, target = torch.randn(5, 4, 3, requires_grad=True), torch.randint(0, 4, (5, 3))
    target[0, 0] = -100
    normalizer = options.pop("normalizer", None)
    criterion = RGDLoss(**options)

    def step(x, y):
        return criterion(x, y, normalizer=normalizer) * 2

    with backend("triton"):
        found = []
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            value = function(logits, target)
            found.append((value, torch.autograd.grad(value.sum(), logits)[0]))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("normalizer", [None, 2.5])
def test_a_compiled_linear_head_equals_the_eager_one(normalizer):
    torch.compiler.reset()
    head, hidden, target = LinearRGDLoss(4, 5), torch.randn(6, 4, requires_grad=True), torch.arange(6) % 5
    with backend("triton"):
        found = []
        for function in (head, torch.compile(head, fullgraph=True, backend="aot_eager")):
            value = function(hidden, target, normalizer=normalizer)
            found.append((value, *torch.autograd.grad(value, (hidden, head.linear.weight))))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def test_a_schedule_compiles_nothing_again():
    torch.compiler.reset()
    criterion, graphs = RGDLoss(tau=1.0), []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(criterion, backend=count, fullgraph=True)
    logits, target = torch.randn(6, 4), torch.arange(6) % 4
    with backend("triton"):
        for tau in (1.0, 2.0, 3.0):
            criterion.weighting = rgd.KL(tau)
            torch.testing.assert_close(compiled(logits, target), cross_entropy(logits, target, tau=tau))
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("returns", [(), EXTRAS], ids=["", "returns"])
def test_the_operators_keep_the_contract_of_torch(returns):
    logits, target = torch.randn(5, 4, requires_grad=True), torch.tensor([0, 1, 2, 3, -100])
    options = (-100, 0.1, "mean", "element", 1e-3, None, False, None, None, list(returns))
    given = (logits, target, *[None] * 6, *options)
    numbers = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    operators = torch.ops.rgd
    losses, sums = operators.triton_cross_entropy_losses(logits.detach(), *given[1:])
    torch.library.opcheck(operators.triton_cross_entropy.default, (*given, True, "kl", numbers))
    torch.library.opcheck(operators.triton_cross_entropy_losses.default, (logits.detach(), *given[1:]))
    torch.library.opcheck(
        operators.triton_cross_entropy_gradient.default, (*given, True, losses, torch.ones(5), sums)
    )


# What is not served


def test_what_the_programs_cannot_serve_is_refused():
    logits, target = torch.randn(4, 3), torch.arange(4) % 3
    with backend("triton"):
        with pytest.raises(RuntimeError, match="the logits are float64"):
            cross_entropy(logits.double(), target)
        with pytest.raises(RuntimeError, match="float64"):
            linear_cross_entropy(logits.double(), logits.double(), target)
        with pytest.raises(RuntimeError, match="plain eager calls"):
            torch.func.vmap(cross_entropy)(logits.view(2, 2, 3), target.view(2, 2))
        with pytest.raises(RuntimeError, match="a tensor is on meta"):
            cross_entropy(logits.to("meta"), target.to("meta"))
        with pytest.raises(RuntimeError, match=r"target.detach\(\)"):
            cross_entropy(logits, logits.softmax(1).requires_grad_())
        with torch.no_grad():
            assert cross_entropy(logits, logits.softmax(1).requires_grad_()).isfinite()


# The program for the day of a GPU


def test_the_program_for_a_gpu_runs_through_and_writes_its_figures(monkeypatch, tmp_path, capsys):
    program, file = importlib.import_module("gpu"), tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--json", str(file)])
    program.main()
    found = json.loads(file.read_text())
    assert found["parity"]["failed"] == []
    assert [one for one in found["figures"] if "failed" in one] == []
    # Liger and quack are not installed here; every other step has a figure.
    names = {one["what"] for one in found["figures"]}
    assert len(names) == 6 + 4 - 2
    assert all(one["ms"] > 0 for one in found["figures"])
    assert len(found["goals"]) == 4
    assert list(found["checks"].values()) == [None] * 4
    assert "parity of 4 calls" in capsys.readouterr().out


def test_a_wrong_gradient_is_named_and_nothing_is_timed(monkeypatch, tmp_path):
    program, file = importlib.import_module("gpu"), tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--cases", "1", "--json", str(file)])
    monkeypatch.setattr(program, "distance", lambda found, expected: math.inf)
    with pytest.raises(SystemExit, match="case 0 in float32 is off by inf"):
        program.main()
    assert json.loads(file.read_text())["figures"] == []


def test_what_does_not_fit_into_the_minutes_is_left_out_and_a_peer_that_fails_is_named(monkeypatch, tmp_path):
    program, file = importlib.import_module("gpu"), tmp_path / "gpu.json"

    def fails(x, y):
        raise ValueError("not here")

    monkeypatch.setattr(program, "peers", lambda device: {"Liger": fails})
    clock = iter([0.0, 1.0])
    parts = program.parts_of
    monkeypatch.setattr(program, "parts_of", lambda *of: parts(*of)[:2])
    monkeypatch.setattr(program.Device, "median_ms", lambda self, step, budget=0: (step(), 1.0))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--cases", "1", "--json", str(file)])
    monkeypatch.setattr(program.time, "perf_counter", lambda: next(clock, 1000.0))
    program.main()
    found = json.loads(file.read_text())
    assert [one["failed"] for one in found["figures"]] == ["ValueError: not here"]
    assert found["left_out"] == ["head 6 x 8 x 33"]


# Planted faults


FAULTS = {
    "classes behind the last are read": ("& (k < classes)[None, :]\n        x =", "\n        x ="),
    "classes behind the last are written": (
        "inside = exists[:, None] & (k < classes)[None, :]",
        "inside = exists[:, None]",
    ),
    "rows behind the last are written": ("exists = row < rows", "exists = row < rows + 1"),
    "an ignored row is read": ("counts[:, None] & (k < classes)", "exists[:, None] & (k < classes)"),
    "two programs share their rows": (".to(tl.int64) * ROWS", ".to(tl.int64)"),
    "the maximum is not corrected": ("total *= tl.exp(top - _finite(higher))", "total *= 1.0"),
    "the label's class is forgotten": ("k[None, :] == label[:, None]", "k[None, :] == label[:, None] + 1"),
    "class weights miss the label": ("mass *= tl.load(class_weight + label", "tl.load(class_weight + label"),
    "a kept maximum is not finite": ("return tl.where(top == float(\"-inf\"), 0.0, top)", "return top"),
    "the divisor is forgotten": ("norm = p / tl.where", "norm = p + 0 * tl.where"),
    "the weight is clipped from below": ("loss > tau, tau, loss", "loss < tau, tau, loss"),
    "the sums of the rows are mixed": ("sums + (row + rows + rows)", "sums + (row + rows)"),
    "the entropy keeps an old maximum": ("(entropy_pull + moved * total)", "entropy_pull"),
    "the last of equal logits counts": ("(here > largest)", "(here >= largest)"),
    "what comes from above is taken for 1": ("(factor != 1.0)", "(factor == 1.0)"),
}  # fmt: skip


def with_fault(old, new, folder):
    """The programs with a fault in their text."""
    text = pathlib.Path(_kernels.__file__).read_text()
    assert old in text
    path = folder / "faulty.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("faulty", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def all_is_well():
    """Whether some cases pass, watched, in rows kept in registers and in blocks."""
    for seed in range(40):
        case = case_of(seed)
        expected = value_and_grad(cast(case, torch.float64), "composite")
        try:
            with Watch():
                found = value_and_grad(cast(case, torch.float32), "triton")
        except Exception as error:
            assert "InterpreterError" in type(error).__name__ or isinstance(error, AssertionError), error  # noqa: PT017
            return False
        if max(map(distance, found, expected)) > 1e-5:
            return False
    with backend("triton"):
        _, extras = cross_entropy(torch.zeros(2, 9), torch.tensor([0, 5]), returns=EXTRAS)
    if extras["correct"].tolist() != [True, False]:
        return False
    logits = torch.full((2, 9), -INF)
    logits[:, 8] = 0
    with Watch() as watch, backend("triton"):
        loss = cross_entropy(logits.requires_grad_(), torch.tensor([8, -100]))
        loss.backward()
    return bool(loss == 0) and watch.launches[0][1]["logits"].reads <= 20


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_planted_fault_is_caught(fault, monkeypatch, tmp_path):
    for name in ("ONCE_CLASSES", "ONCE_SOFT_CLASSES", "_BLOCK"):
        monkeypatch.setattr(_launch, name, 4)
    monkeypatch.setattr(_launch, "_TILE", 16)
    if fault is not None:
        monkeypatch.setattr(_launch, "_module", with_fault(*FAULTS[fault], tmp_path))
    assert all_is_well() == (fault is None)


def test_the_kinds_that_the_backend_takes_are_those_that_the_programs_know():
    known = (rgd.KL(), rgd.ERM(), rgd.Focal(1.0), rgd.Threshold(1.0))
    assert set(_passes.KINDS) == {weighting.kernel()[0] for weighting in known}


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("weighting", [rgd.KL(4.0), rgd.CVaR(0.5)], ids=str)
def test_segments_of_a_row_are_weighted_as_units(weighting, compiled):
    torch.manual_seed(0)
    hidden, head = 2 * torch.randn(2, 9, 4), torch.randn(7, 4)
    target = torch.randint(0, 7, (2, 9))
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1, -1], [0, 1, 0, 1, 0, 1, 0, 1, 2]])

    def whole(hidden, head):
        logits = F.linear(hidden, head).movedim(-1, 1)
        return cross_entropy(
            logits, target, per="sample", weighting=weighting, segments=segments, num_segments=3
        )

    def chunked(hidden, head):
        options = {"per": "sample", "weighting": weighting, "segments": segments, "num_segments": 3}
        return linear_cross_entropy(hidden, head, target, chunk_bytes=60, **options)

    for loss in (whole, chunked):
        results = []
        for name, dtype in (("composite", torch.float64), ("triton", torch.float32)):
            inputs = [one.to(dtype).requires_grad_() for one in (hidden, head)]
            call = torch.compile(loss, backend="aot_eager") if compiled and name == "triton" else loss
            with backend(name):
                value = call(*inputs)
                results.append((value.detach(), *torch.autograd.grad(value, inputs)))
        for expected, found in zip(*results, strict=True):
            assert distance(found.double(), expected) < 4 * FLOAT32
