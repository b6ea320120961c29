"""The way of the input through the package: few functions receive it; a `Problem` is handed on whole."""

import copy
import pathlib
import sys

import pytest
import rgd
import torch
from rgd.torch import LinearRGDLoss, RGDLoss

HOUSE = str(pathlib.Path(rgd.__file__).parent)
MOST_STAYS, MOST_RETURNS = 8, 2


def stays_of(tensor, call):
    """The functions of the package that receive a tensor, alone or in a plain tuple, as they are called."""
    found = []

    def watch(frame, event, argument):
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(HOUSE) or code.co_name.startswith("<"):
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        given = [frame.f_locals.get(name) for name in names]
        given += [part for one in given if type(one) is tuple for part in one]
        if any(one is tensor for one in given):
            found.append((code.co_filename.removeprefix(HOUSE), code.co_name))

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def returns_of(stays):
    """How often a file is entered that had been left."""
    visits = [file for i, (file, _) in enumerate(stays) if i == 0 or stays[i - 1][0] != file]
    return len(visits) - len(set(visits))


@pytest.mark.parametrize("weighting", [rgd.KL(), rgd.CVaR(0.5)], ids=["one pass", "two passes"])
@pytest.mark.parametrize("kind", [RGDLoss, LinearRGDLoss], ids=["logits", "linear head"])
def test_the_input_is_handed_on_few_times(kind, weighting):
    criterion = RGDLoss(weighting=weighting) if kind is RGDLoss else LinearRGDLoss(5, 7, weighting=weighting)
    input, target = torch.randn(8, 5, requires_grad=True), torch.arange(8) % 5
    criterion(input, target)
    # A copy has accepted no call yet, so that it goes the whole way.
    fresh = copy.deepcopy(criterion)
    stays = stays_of(input, lambda: fresh(input, target))
    assert stays[0][1] == "forward"
    told = "\n".join(f"{file} {name}" for file, name in stays)
    assert len(stays) <= MOST_STAYS, told
    assert returns_of(stays) <= MOST_RETURNS, told
