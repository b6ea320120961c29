"""A backend of one's own: registered, asked first, chosen by name, and taken out again."""

import os
import pathlib
import subprocess
import sys

import pytest
import rgd
import torch
from rgd.torch import LinearRGDLoss, RGDLoss, backend, cross_entropy, sample_weights
from rgd.torch.backends import register
from torch.nn import functional as F

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "add_a_backend.md"


@pytest.fixture(scope="module")
def wide():
    """The backend of docs/add_a_backend.md."""
    code, names = PAGE.read_text().split("```python\n")[1].split("```")[0], {}
    exec(code, names)
    return names["Wide"]


@pytest.fixture
def registered(wide):
    registration = register(wide())
    yield
    registration.remove()


MEMBERS = [rgd.KL(), rgd.KLBall(0.1), rgd.Focal(2.0), rgd.CVaR(0.5)]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("weighting", MEMBERS, ids=str)
@pytest.mark.parametrize(("reduction", "z_loss"), [("mean", 0.0), ("none", 0.0), ("mean", 0.1)])
def test_it_computes_the_loss_and_the_linear_head(weighting, reduction, z_loss):
    generator = torch.Generator().manual_seed(0)
    hidden, target = torch.randn(9, 4, generator=generator), torch.arange(9) % 5
    target[3] = -100
    settings = {"weighting": weighting, "reduction": reduction, "z_loss": z_loss}
    head = LinearRGDLoss(4, 5, **settings)
    weight = head.linear.weight
    results = []
    for name in ("wide", "composite"):
        inputs = hidden.clone().requires_grad_()
        weight.grad = None
        with backend(None if name == "wide" else name) as ran:
            loss = head(inputs, target)
            dense = RGDLoss(**settings)(F.linear(inputs, weight), target)
            (loss.sum() + 2 * dense.sum()).backward()
        assert set(ran) == {name}
        assert head.backend == name
        results.append((loss.detach(), dense.detach(), inputs.grad, weight.grad, head.last_weights))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, check_dtype=False)


@pytest.mark.usefixtures("registered")
def test_one_that_refuses_leaves_the_call_to_the_next():
    losses = torch.rand(5)
    with backend() as ran:
        sample_weights(losses)
        torch.func.vmap(sample_weights)(losses.view(1, 5))
    assert ran == ["wide", "wide"]
    logits, target = torch.randn(4, 3), torch.arange(4) % 3
    graph = torch.compile(cross_entropy, fullgraph=True, backend="eager")
    torch.testing.assert_close(graph(logits, target), cross_entropy(logits, target))
    with backend("rust") as ran:
        sample_weights(losses)
    assert ran == ["rust"]


def test_it_is_gone_when_it_is_removed(wide):
    registration = register(wide())
    registration.remove()
    registration.remove()
    with backend() as ran:
        sample_weights(torch.rand(3))
    assert ran == ["rust"]
    with pytest.raises(ValueError, match="backend must be 'rust', 'composite', 'triton' or None"):
        backend("wide")


def test_a_backend_without_a_part_or_with_a_name_that_is_taken_is_refused(wide):
    class Half:
        name = "half"

        def refusal(self, tensors, compiling):
            return None

    with pytest.raises(TypeError, match="Half has no sample_weights, cross_entropy, step"):
        register(Half())
    taken = wide()
    taken.name = "rust"
    with pytest.raises(ValueError, match="of the name 'rust'"):
        register(taken)


def test_the_environment_may_name_a_backend_that_is_registered_later():
    program = f"""
import pathlib, torch
import rgd.torch
code = pathlib.Path({str(PAGE)!r}).read_text().split("```python\\n")[1].split("```")[0]
exec(code)
rgd.torch.backends.register(Wide())
with rgd.torch.backend() as ran:
    rgd.torch.sample_weights(torch.ones(2))
assert ran == ["wide"], ran
"""
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "RGD_BACKEND": "wide"}, check=True)
