"""The Triton backend where there is no GPU: when it is asked, what it refuses, and its tests in miniature."""

import os
import pathlib
import subprocess
import sys

import pytest
import rgd
import torch
from rgd.torch import RGDLoss, backend, cross_entropy, sample_weights
from rgd.torch._plan import Plan
from rgd.torch.backends import register

HERE = pathlib.Path(__file__).parent


def run(program, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, *program], env=environment, capture_output=True, text=True, check=False
    )


def test_the_programs_agree_with_torch_in_the_interpreter():
    pytest.importorskip("triton")
    file = str(HERE / "test_triton_interpreted.py")
    program = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        file,
        "--quick",
        "-k",
        "any_options or linear_head_equals_that",
    ]
    found = run(program, TRITON_INTERPRET="1")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "passed" in found.stdout
    assert "failed" not in found.stdout


def test_it_serves_only_those_who_name_it():
    asked = []

    class Mine:
        name = "mine"

        def refusal(self, tensors, compiling):
            asked.append(tensors)
            return "it is a test"

        sample_weights = cross_entropy = step = None

    registration = register(Mine(), on_request=True)
    try:
        with backend() as ran:
            sample_weights(torch.ones(3))
        assert ran == ["rust"]
        assert not asked
        with backend("mine"), pytest.raises(RuntimeError, match="it is a test"):
            sample_weights(torch.ones(3))
        assert asked
        with pytest.raises(ValueError, match="there is a backend of the name"):
            register(Mine())
    finally:
        registration.remove()
    with pytest.raises(ValueError, match="'composite', 'triton' or None"):
        backend("mine")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter serves the CPU")
def test_a_tensor_on_the_cpu_is_refused():
    pytest.importorskip("triton")
    criterion = RGDLoss()
    with (
        backend("triton"),
        pytest.raises(RuntimeError, match="a tensor is on cpu: the Triton programs serve cuda"),
    ):
        criterion(torch.randn(3, 2), torch.tensor([0, 1, 0]))


@pytest.mark.parametrize("kind", ["xpu", "mps", "meta"])
@pytest.mark.parametrize("weighting", [rgd.KL(), rgd.CVaR(0.5)], ids=str)
def test_a_tensor_of_another_kind_of_device_is_refused_with_what_to_do(kind, weighting):
    pytest.importorskip("triton")

    class There(torch.Tensor):
        """A tensor that says it is on a device which this machine does not have."""

        @property
        def device(self):
            return torch.device(kind, 0)

    logits, target = torch.randn(3, 2).as_subclass(There), torch.tensor([0, 1, 0]).as_subclass(There)
    message = rf'on {kind}:0: the Triton programs serve \w+\. Leave backend\("triton"\) out'
    with backend("triton"), pytest.raises(RuntimeError, match=message):
        cross_entropy(logits, target, weighting=weighting)
    with backend("triton"), pytest.raises(RuntimeError, match=message):
        sample_weights(logits[:, 0], weighting)
    with backend() as ran:
        sample_weights(logits[:, 0], weighting)
    assert ran == ["composite"]


def test_rgd_imports_no_triton_and_without_it_says_so():
    program = """
import importlib.util, sys, torch
find, before = importlib.util.find_spec, "triton" in sys.modules
importlib.util.find_spec = lambda name, *more: None if name == "triton" else find(name, *more)
from rgd.torch import backend, cross_entropy
assert ("triton" in sys.modules) == before
try:
    with backend("triton"):
        cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
except RuntimeError as error:
    assert "pip install triton" in str(error), error
else:
    raise AssertionError
"""
    found = run(["-c", program])
    assert found.returncode == 0, found.stderr


def test_the_numbers_of_a_plan_on_a_device_follow_a_schedule():
    plan = Plan(rgd.KL(1.0)).prepare()
    assert plan.numbers_on(torch.device("cpu")) is plan.numbers
    # The meta device stands for one that is elsewhere: the copy is made once, and stays the same object.
    there = plan.numbers_on(torch.device("meta"))
    assert there.device.type == "meta"
    assert plan.replaced(rgd.KL(2.0)).numbers_on(torch.device("meta")) is there


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_call_on_a_gpu_equals_that_of_torch_operations(compiled):
    logits, target = torch.randn(64, 1000, device="cuda", requires_grad=True), torch.arange(64, device="cuda")
    found = []
    for name in ("triton", "composite"):
        criterion = RGDLoss().cuda()
        with backend(name):
            loss = (torch.compile(criterion) if compiled else criterion)(logits, target)
            found.append((loss, torch.autograd.grad(loss, logits)[0]))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
