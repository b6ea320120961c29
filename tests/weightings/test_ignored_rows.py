"""A row whose target is ignored costs 0, whatever it holds; its gradient is nn.CrossEntropyLoss's, or 0.

RGDLoss is a drop-in: NaN logits have a NaN gradient there. The linear heads leave such rows out.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rgd
import rgd.jax
import torch
import torch.nn.functional as F
from rgd import reference
from rgd.torch import backend, cross_entropy, linear_cross_entropy
from rgd.torch._problem import Options, Problem
from rgd.torch.backends.composite import ComposedStep
from rgd.torch.linear._chunks import ChunkedHead, Wanted, gradients_in_chunks, losses_in_chunks
from rgd.torch.linear._products import Products

WIDTH = 4
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def problem(classes, held):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((5, classes))
    if held == "all -inf":
        logits[1] = -math.inf
    else:
        logits[1, 0] = float(held)
    return logits, np.array([2, -100, 0, 1, 3])


@pytest.mark.parametrize("held", ["nan", "inf", "-inf", "all -inf"])
@pytest.mark.parametrize("classes", [5, 40])
def test_the_losses_of_logits_do_what_cross_entropy_loss_does(classes, held):
    logits, target = problem(classes, held)
    for options in ({}, {"label_smoothing": 0.2}, {"weight": torch.linspace(0.5, 2, classes).double()}):
        results = []
        for function in (F.cross_entropy, "rust", "composite"):
            x = torch.tensor(logits).requires_grad_()
            if isinstance(function, str):
                with backend(function):
                    value = cross_entropy(x, torch.tensor(target), weighting=rgd.ERM(), **options)
            else:
                value = function(x, torch.tensor(target), **options)
            results.append((value.detach(), *torch.autograd.grad(value, x)))
        assert results[0][0].isfinite()
        assert results[0][1][1].isnan().all() == (held != "-inf")
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], equal_nan=True)
        if "weight" not in options:
            slope = reference.cross_entropy_grad(logits, target, weighting=rgd.ERM(), **options)
            np.testing.assert_array_equal(np.isnan(slope), results[0][1].isnan())


@pytest.mark.parametrize("held", ["nan", "inf", "-inf", "all -inf"])
@pytest.mark.parametrize("name", ["jnp", "rust"])
def test_jax_gives_such_a_row_a_gradient_of_zero(name, held):
    logits, target = problem(5, held)

    def loss(x):
        return rgd.jax.cross_entropy(x, target, backend=name)

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits))
    expected = jax.value_and_grad(loss)(jnp.asarray(logits).at[1].set(0.0))
    np.testing.assert_array_equal(value, expected[0])
    np.testing.assert_array_equal(gradient, expected[1])
    np.testing.assert_array_equal(gradient[1], 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighting", [rgd.KL(), rgd.CVaR(0.5)], ids=str)
@pytest.mark.parametrize("left_out", ["ignore_index", "where", "sample_weight", "shift"])
def test_what_a_row_of_a_linear_head_holds_reaches_no_result(left_out, weighting, device):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 4, WIDTH, generator=generator, dtype=torch.float64)
    head = torch.randn(7, WIDTH, generator=generator, dtype=torch.float64)
    target = torch.randint(7, (2, 4), generator=generator)
    options = {"weighting": weighting, "chunk_bytes": 3 * 7 * 8}
    counted = torch.ones(2, 4, dtype=torch.bool)
    place = (0, 1)
    if left_out == "shift":
        place, options["shift"] = (1, 3), True  # the last position predicts nothing
    counted[place] = False
    if left_out == "ignore_index":
        target[place] = -100
    elif left_out == "where":
        options["where"] = counted.to(device)
    elif left_out == "sample_weight":
        options["sample_weight"] = counted.double().to(device)

    def results(held, create_graph):
        x = hidden.clone()
        x[place] = held
        x, w = x.to(device).requires_grad_(), head.to(device).requires_grad_()
        value = linear_cross_entropy(x, w, target.to(device), **options)
        return value.detach(), *torch.autograd.grad(value, (x, w), create_graph=create_graph)

    for create_graph in (False, True):
        expected = results(0.0, create_graph)
        assert not expected[1][place].any()
        for held in (math.nan, math.inf):
            for mine, other in zip(results(held, create_graph), expected, strict=True):
                torch.testing.assert_close(mine, other, rtol=0, atol=0)


class OnAnotherDevice:
    """A mask that says it is not on the CPU, where rows are left out by their number."""

    is_cpu = False

    def __init__(self, mask):
        self.mask = mask

    def __getitem__(self, rows):
        return self.mask[rows]


def test_rows_that_cannot_be_counted_without_waiting_are_set_to_zero():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(7, WIDTH, generator=generator, dtype=torch.float64)
    target = torch.tensor([1, -100, 0, 6, 2])
    hidden[1] = math.nan
    step = ComposedStep(Problem(hidden, target, Options(reduction="sum")))
    counted = target != -100
    wanted, factors = Wanted(True, True, False), counted.double()
    for mask in (counted, OnAnotherDevice(counted)):
        head = ChunkedHead(hidden, Products(weight, None), target, mask, None, 2, torch.float64, step)
        (losses, *_), found = losses_in_chunks(head), gradients_in_chunks(head, factors, None, wanted)
        assert losses.isfinite().all()
        assert found.input.isfinite().all()
        assert found.weight.isfinite().all()
