"""Losses that an earlier release pickled: `pickled/losses_0_1_0.pickle` was written by rgd 0.1.0."""

import pathlib
import pickle

import pytest
import torch

FILE = pathlib.Path(__file__).parent / "pickled" / "losses_0_1_0.pickle"
NAMES = ("default", "classes", "moving average", "groups", "linear")


@pytest.fixture(scope="module")
def written():
    return pickle.loads(FILE.read_bytes())


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_that_0_1_0_pickled_goes_on_where_it_was(written, name):
    losses, values = written
    assert tuple(losses) == NAMES
    inputs = (
        torch.linspace(-1, 1, 24).view(6, 4) if name == "linear" else torch.linspace(-1, 1, 18).view(6, 3)
    )
    groups = {"groups": torch.arange(6) % 2} if name == "groups" else {}
    inputs.requires_grad_()
    value = losses[name](inputs, torch.arange(6) % 3, **groups)
    assert value.item() == values[name]
    value.backward()
    assert losses[name].stats().count == 6
    # The dial is new since.
    if name == "linear":
        assert losses[name].scale == -0.7
