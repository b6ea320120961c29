"""The program that compares random calls with the equations: `fuzz/calls.py`."""

import importlib
import pathlib

import pytest
from rgd.torch import loss

FUZZ = pathlib.Path(__file__).parents[2] / "fuzz"


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.syspath_prepend(str(FUZZ))
    return importlib.import_module("calls")


@pytest.mark.parametrize("kind", ["weights", "dense", "linear", "trees"])
def test_the_fronts_agree_with_the_equations_in_random_calls(calls, kind):
    assert [calls.try_one(kind, seed) for seed in range(8)] == [None] * 8


def test_a_planted_fault_is_found_and_named(calls, capsys, monkeypatch):
    monkeypatch.setattr(loss, "again", loss.again)  # what `plant` replaces comes back
    assert calls.main(["--replay", "dense:88"]) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    calls.plant()
    assert "module: " in calls.try_one("dense", 88)


def test_a_result_that_is_off_or_not_finite_is_a_fault(calls):
    calls.same("it", [1.0, 2.0], [1.0, 2.0 + 1e-9], 1e-8)
    with pytest.raises(calls.FaultError, match="it: off by"):
        calls.same("it", [1.0, 2.0], [1.0, 2.1], 1e-8)
    with pytest.raises(calls.FaultError, match="it: shape"):
        calls.same("it", [1.0], [1.0, 2.0], 1e-8)
    with pytest.raises(calls.FaultError, match="it: "):
        calls.same("it", [1.0, float("nan")], [1.0, 2.0], 1e-8)
