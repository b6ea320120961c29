"""`returns=` by the Triton programs, in Triton's interpreter: in the pass that reads the logits anyway.

The random calls of `test_triton_interpreted.py` have it too.
"""

import importlib.util
import math
import os
import pathlib
import sys

import pytest
import rgd
import torch
import torch.nn.functional as F
from rgd.torch import LinearRGDLoss, RGDLoss, backend, cross_entropy, linear_cross_entropy

if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
    pytest.skip("runs in Triton's interpreter: make test-gpu-static", allow_module_level=True)
sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benches"))

from _gpu_cases import EXTRAS, Unsure
from _gpu_watch import Watch
from rgd.torch.backends.triton import _launch

INF, NAN = math.inf, math.nan


@pytest.fixture(params=["once", "in blocks"])
def reads(request, monkeypatch):
    """Rows that are kept in registers, and rows that are read in blocks; several programs."""
    monkeypatch.setattr(_launch, "_TILE", 16)
    if request.param == "in blocks":
        for name in ("ONCE_CLASSES", "ONCE_SOFT_CLASSES", "_BLOCK"):
            monkeypatch.setattr(_launch, name, 4)


def same(found, expected):
    # Sums of at most 33 numbers in another order, and logits up to 10: a rounding each.
    close = 33 * 10 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found, expected, rtol=close, atol=close, equal_nan=True)


# Reads and writes


@pytest.mark.usefixtures("reads")
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("weighting", [rgd.KL(), rgd.CVaR(0.5), Unsure()], ids=str)
def test_no_logit_is_read_once_more_and_no_program_started(weighting, probabilities):
    logits, target = torch.randn(6, 33), torch.arange(6)
    target = logits.roll(1, 0).softmax(1) if probabilities else target
    plain = rgd.Pointwise(lambda losses: 1 + 0 * losses) if "entropy" in weighting.needs else weighting
    watched = []
    for returns, one in (((), plain), (EXTRAS, weighting)):
        leaf = logits.clone().requires_grad_()
        with backend("triton") as ran, Watch() as watch:
            found = cross_entropy(leaf, target, weighting=one, returns=returns)
            (found[0] if returns else found).backward()
        assert ran == ["triton"]
        watched.append(watch)
    without, beside = watched
    assert [name for name, _ in without.launches] == [name for name, _ in beside.launches]
    for name in ("logits", "gradient", *(["target"] if probabilities else [])):
        assert beside.total(name) == without.total(name)
    assert "extras" not in without.launches[0][1]
    assert beside.launches[0][1]["extras"] == (18, 0, 18)


@pytest.mark.parametrize("weighting", [rgd.KL(), rgd.CVaR(0.5)], ids=str)
def test_a_linear_head_starts_no_program_more(weighting):
    hidden, head, target = torch.randn(6, 4).requires_grad_(), torch.randn(9, 4), torch.arange(6)
    launches = []
    for returns in ((), EXTRAS):
        with backend("triton"), Watch() as watch:
            found = linear_cross_entropy(
                hidden, head, target, weighting=weighting, chunk_bytes=90, returns=returns
            )
            (found[0] if returns else found).backward()
        launches.append([(name, counts["logits"].reads) for name, counts in watch.launches])
    assert len(launches[0]) >= 3
    assert launches[0] == launches[1]


# Results


@pytest.mark.usefixtures("reads")
@pytest.mark.parametrize("weighting", [rgd.KL(), rgd.CVaR(0.5)], ids=str)
def test_infinite_and_unknown_logits_have_their_limits(weighting):
    rows = [
        [0.0, -INF, 0.0], [0.0, INF, 1.0], [0.0, NAN, 1.0], [NAN, 0.0, 0.0], [-INF] * 3, [NAN, INF, 0.0],
        [INF, 0.0, 0.0],
    ]  # fmt: skip
    logits, target = torch.tensor(rows), torch.tensor([0, 1, 2, 0, 0, 1, 0])
    # The same where they are in the first block, and where they are in a later one.
    for left in (0, 6):
        wide = F.pad(logits, (left, 6 - left), value=-INF)
        results = []
        for name in ("triton", "composite"):
            with backend(name), Watch():
                given = target + left
                _, extras = cross_entropy(wide, given, weighting=weighting, returns=EXTRAS)
            results.append(extras)
        same(*results)
        log2 = math.log(2)
        same(results[0]["entropy"], torch.tensor([log2, *[NAN] * 6]))
        same(results[0]["logsumexp"], torch.tensor([log2, INF, NAN, NAN, -INF, NAN, INF]))
        assert results[0]["correct"].tolist() == [True, True, False, False, left == 0, False, True]


@pytest.mark.usefixtures("reads")
def test_of_equal_logits_and_equal_probabilities_the_first_counts():
    logits = torch.zeros(3, 9)
    logits[1, [5, 7]] = logits[2, [2, 7]] = 1.0
    with backend("triton"):
        _, extras = cross_entropy(logits, torch.tensor([0, 5, 7]), returns=EXTRAS)
        probabilities = torch.full((3, 9), 1 / 9)
        probabilities[1, [5, 8]] = probabilities[2, [7, 8]] = 0.4
        _, of_both = cross_entropy(logits, probabilities, returns=EXTRAS, label_smoothing=1.0)
    assert extras["correct"].tolist() == of_both["correct"].tolist() == [True, True, False]
    same(extras["entropy"][0], torch.tensor(math.log(9)))


@pytest.mark.usefixtures("reads")
@pytest.mark.parametrize("weighting", [rgd.KL(), rgd.KLBall(0.1)], ids=str)
def test_targets_that_take_no_part_have_0_and_their_logits_are_not_read(weighting):
    logits, target = torch.randn(6, 9), torch.arange(6)
    target[2], logits[2], logits[4] = -100, NAN, NAN
    with backend("triton"):
        _, extras = cross_entropy(
            logits, target, weighting=weighting, where=torch.arange(6) != 4, returns=EXTRAS
        )
        clean = logits.nan_to_num()
        _, soft = cross_entropy(
            clean, clean.softmax(1), weighting=weighting, where=torch.arange(6) != 4, returns=EXTRAS
        )
    for found in extras.values():
        assert not found[[2, 4]].any()
        assert found.isfinite().all()
    assert [bool(one[4]) for one in soft.values()] == [False] * 3
    assert bool(soft["correct"][2])


@pytest.mark.usefixtures("reads")
@pytest.mark.parametrize("weighting", [rgd.KL(), rgd.KLBall(0.1)], ids=str)
def test_logits_that_the_gradient_overwrites_are_read_before(weighting):
    leaf, target = torch.randn(6, 9, requires_grad=True), torch.arange(6)
    with backend("triton"):
        _, expected = cross_entropy(leaf, target, weighting=weighting, returns=EXTRAS)
        loss, extras = cross_entropy(leaf * 1, target, weighting=weighting, inplace=True, returns=EXTRAS)
    loss.backward()
    torch.testing.assert_close(extras, expected, rtol=0, atol=0)


@pytest.mark.parametrize("returns", [("correct",), ("logsumexp", "entropy")], ids=str)
def test_they_come_as_they_were_asked_for(returns):
    logits, target = torch.randn(2, 9, 3, requires_grad=True), torch.zeros(2, 3, dtype=torch.long)
    with backend("triton"):
        _, extras = cross_entropy(logits.bfloat16(), target, returns=returns)
    assert list(extras) == list(returns)
    for name, one in extras.items():
        assert one.dtype is (torch.bool if name == "correct" else torch.float32)
        assert one.shape == target.shape
        assert not one.requires_grad


def test_a_module_keeps_them_in_training_and_in_evaluation():
    criterion = RGDLoss(returns=EXTRAS)
    logits, target = torch.randn(6, 9, requires_grad=True), torch.arange(6)
    for train in (True, False):
        found = []
        for name in ("triton", "composite"):
            with backend(name), torch.set_grad_enabled(train):
                criterion(logits, target)
            found.append(criterion.extras)
        same(*found)
    assert criterion.stats().count == 6


# Compiled graphs and linear heads


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize(
    "options",
    [
        {"weighting": rgd.KL()},
        {"weighting": rgd.KL(), "per": "sample", "logit_softcap": 2.0},
        {"weighting": rgd.KLBall(0.1), "reduction": "none", "z_loss": 0.01},
        {"weighting": Unsure(), "label_smoothing": 0.1},
        {"weighting": Unsure(), "per": "sample"},
        {"weighting": rgd.KL(), "shift": True, "z_loss": 0.01},
    ],
    ids=str,
)
def test_logits_and_a_linear_head_return_the_same_in_compiled_graphs_too(options, compiled):
    torch.compiler.reset()
    hidden, head = torch.randn(2, 5, 4), torch.randn(9, 4)
    target = torch.randint(0, 9, (2, 5))
    target[0, 3] = -100

    def chunked(hidden, head):
        return linear_cross_entropy(hidden, head, target, chunk_bytes=90, returns=EXTRAS, **options)

    def whole(hidden, head):
        others = dict(options)
        logits, labels = F.linear(hidden, head), target
        cap = others.pop("logit_softcap", None)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        if others.pop("shift", False):
            logits, labels = logits[:, :-1], labels[:, 1:]
        return cross_entropy(logits.movedim(-1, 1), labels, returns=EXTRAS, **others)

    results = []
    for name, function in (("composite", whole), ("triton", whole), ("triton", chunked)):
        inputs = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        call = function
        if compiled and name == "triton":
            call = torch.compile(function, fullgraph=True, backend="aot_eager")
        with backend(name):
            loss, extras = call(*inputs)
            grads = torch.autograd.grad(loss.sum(), inputs)
        results.append((loss.detach(), extras, grads))
    for found in results[1:]:
        same(found, results[0])


@pytest.mark.parametrize(("weighting", "operators"), [(rgd.KL(), 1), (rgd.KLBall(0.1), 2)], ids=str)
def test_a_graph_calls_no_operator_more(weighting, operators):
    torch.compiler.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    def call(logits, target):
        return cross_entropy(logits, target, weighting=weighting, returns=EXTRAS)

    logits, target = torch.randn(6, 9), torch.arange(6)
    with backend("triton"):
        found = torch.compile(call, fullgraph=True, backend=keep)(logits, target)
        same(found, call(logits, target))
    called = [str(node.target) for node in graphs[0].graph.nodes if "rgd." in str(node.target)]
    assert len(called) == operators
    assert all("triton_cross_entropy" in one for one in called)


def test_a_compiled_module_of_a_head_keeps_them():
    torch.compiler.reset()
    criterion = LinearRGDLoss(4, 9, returns=EXTRAS)
    hidden, target = torch.randn(6, 4, requires_grad=True), torch.arange(6)
    with backend("triton"):
        criterion(hidden, target)
        expected = criterion.extras
        torch.compile(criterion, fullgraph=True, backend="aot_eager")(hidden, target).backward()
    same(criterion.extras, expected)
