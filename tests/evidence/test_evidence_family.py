"""What the programs on imbalance and on the whole family take from other packages is what they say."""

import importlib
import pathlib
import sys

import numpy as np
import pytest
import rgd
import torch
from rgd.torch import sample_weights

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples" / "evidence"))

from harness.losses import cross_entropy

frontier, imbalance = map(importlib.import_module, ("frontier", "imbalance"))
DIGITS, CURVES = imbalance.SOURCES


@pytest.mark.parametrize("source", imbalance.SOURCES, ids=lambda source: source.name)
@pytest.mark.parametrize("factor", [1, 50])
def test_training_is_long_tailed_and_the_rest_balanced(source, factor):
    if source is CURVES:
        pytest.importorskip("mnist1d")
    data = imbalance.draw(3, source, factor)
    train, validation, test = (np.bincount(part.target, minlength=10) for part in data)
    assert sorted(train, reverse=True) == source.class_sizes(factor)
    assert train.max() == source.largest
    assert train.max() / train.min() == pytest.approx(factor, rel=1 / (2 * train.min()))
    assert set(validation) == {source.validation}
    assert set(test) == {source.test}
    rows = np.concatenate([part.inputs.numpy() for part in data])
    whole = np.unique(source.load()[0].astype(np.float32), axis=0)
    assert len(np.unique(rows, axis=0)) >= len(rows) - (len(source.load()[0]) - len(whole)), "no row twice"


def test_the_rarest_classes_are_drawn_for_each_seed():
    rarest = {int(imbalance.draw(seed, DIGITS, 50).train.target.bincount().argmin()) for seed in range(6)}
    assert len(rarest) > 1


def test_the_superquantile_of_sqwash_weighs_as_cvar():
    pytest.importorskip("sqwash")
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(3, 32, 10, generator=generator, dtype=torch.float64)
    target = torch.randint(10, (3, 32), generator=generator)
    losses = cross_entropy(outputs, target)
    expected = torch.stack([sample_weights(row, rgd.CVaR(0.5)) * row for row in losses])
    found = frontier.superquantile(outputs, target, torch.zeros(3, 10))
    torch.testing.assert_close(found, expected, rtol=32 * torch.finfo(torch.float64).eps, atol=0)


def test_weights_of_a_reduction_are_its_gradient():
    losses = torch.tensor([[1.0, 2.0, 3.0]])
    assert frontier.reduced(losses, torch.max).tolist() == [[0.0, 0.0, 9.0]]
    assert frontier.reduced(losses, torch.sum).tolist() == [[3.0, 6.0, 9.0]]
