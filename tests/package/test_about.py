"""`python -m rgd`: it tells what is installed, and finds a number that is wrong."""

import json
import os
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import rgd
from rgd._about import _check, _installed, _times, main
from rgd.torch import RGDLoss
from torch import nn


@pytest.fixture(autouse=True)
def nothing_remembered():
    _installed.why_broken.cache_clear()
    yield
    _installed.why_broken.cache_clear()


def told(capsys, *arguments):
    """The exit code and what was told."""
    code = main(["--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def problems(found):
    return {one["what"]: one["problem"] for one in found["self_check"] if one["problem"]}


def test_it_tells_versions_backends_and_a_self_check_that_is_ok(capsys):
    code, found = told(capsys)
    assert problems(found) == {}
    assert (code, found["ok"]) == (0, True)
    versions = {one["name"]: one["version"] for one in found["versions"]}
    assert versions["rgd"] == rgd.__version__
    assert versions["numpy"] == np.__version__
    checked = {one["what"] for one in found["self_check"]}
    assert {
        "NumPy weights, float32",
        "torch on cpu, rust, float64",
        "torch on cpu, composite, float32",
    } <= checked
    assert {"JAX under jit, rust, float32", "JAX under jit, jnp, float32"} <= checked
    active = {(one["front"], one["device"]): one for one in found["backends"]}
    assert active["rgd.torch", "cpu"]["active"] == "rust"
    assert "composite" in active["rgd.torch", "cpu"]["others"]
    assert "bench" not in found


def test_the_words_hold_what_the_json_holds(capsys):
    assert main([]) == 0
    words = capsys.readouterr().out
    assert words.endswith("\nok\n")
    for word in (
        "rgd on cpu",
        "rgd.torch on cpu",
        "not composite",
        "torch on cpu, rust, float64",
        np.__version__,
    ):
        assert word in words.replace("rgd (NumPy) on cpu", "rgd on cpu")


def test_the_self_check_takes_about_a_second():
    _check.check()
    start = time.process_time()
    _check.check()
    assert time.process_time() - start < 3


def test_wrong_weights_of_numpy_are_found(capsys, monkeypatch):
    right = rgd.sample_weights
    monkeypatch.setattr(rgd, "sample_weights", lambda *given: right(*given) * (1 + 1e-3))
    code, found = told(capsys)
    assert (code, found["ok"]) == (1, False)
    assert set(problems(found)) == {"NumPy weights, float64", "NumPy weights, float32"}
    assert "KL(tau=1.0" in problems(found)["NumPy weights, float32"]
    assert "differs from the oracle's by 1.0e-03" in problems(found)["NumPy weights, float32"]


def test_a_wrong_objective_and_gradient_of_torch_are_found(capsys, monkeypatch):
    right = RGDLoss.forward
    monkeypatch.setattr(RGDLoss, "forward", lambda *given: right(*given) * 1.001)
    assert main([]) == 1
    words = capsys.readouterr().out
    assert words.endswith("NOT ok: see above\n")
    assert "the objective of KL" in words
    assert "the gradient of KL" in words


def test_a_kernel_that_raises_is_told_and_the_rest_is_still_checked(capsys, monkeypatch):
    def broken(*given):
        raise OSError("no such instruction\nmore")

    monkeypatch.setattr(rgd, "sample_weights", broken)
    code, found = told(capsys)
    assert code == 1
    assert problems(found) == dict.fromkeys(
        ["NumPy weights, float64", "NumPy weights, float32"], "OSError: no such instruction"
    )


def test_nan_is_a_difference(monkeypatch):
    monkeypatch.setattr(rgd, "sample_weights", lambda losses, weighting: np.full_like(losses, np.nan))
    assert "differs from the oracle's by nan" in _check.check()[0].problem


@pytest.mark.filterwarnings("default")
def test_a_wrong_name_in_the_environment_is_told():
    code = "import sys; sys.modules['jax'] = None; from rgd._about import main; sys.exit(main(['--json']))"
    done = run(code, RGD_BACKEND="cuda-nonsense")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    (torch_cpu,) = [
        one for one in found["backends"] if one["device"] == "cpu" and one["front"] == "rgd.torch"
    ]
    assert torch_cpu["active"] is None
    assert "cuda-nonsense" in torch_cpu["others"]["the default choice"]
    assert found["machine"]["RGD_BACKEND"] == "cuda-nonsense"


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_numpy_alone_is_enough():
    code = (
        "import sys, runpy\n"
        "sys.modules['torch'] = sys.modules['jax'] = None\n"
        "sys.argv = ['rgd', '--json', '--bench']\n"
        "runpy.run_module('rgd', run_name='__main__')"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [one["front"] for one in found["backends"]] == ["rgd (NumPy)"]
    assert {one["what"] for one in found["self_check"]} == {
        "NumPy weights, float64",
        "NumPy weights, float32",
    }
    assert found["bench"]["problem"] == "torch is not installed"


def test_an_installed_library_that_cannot_be_imported_is_told(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libc10.so: cannot open shared object file')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.modules['jax'] = None\n"
        "from rgd._about import main; sys.exit(main([]))"
    )
    done = run(code)
    assert done.returncode == 1
    assert "cannot be imported: ImportError: libc10.so: cannot open shared object file" in done.stdout
    assert "torch on cpu" not in done.stdout


def test_the_bench_times_both_losses_in_turn():
    found = _times.steps(sizes=[(8, 3), (16, 5)], seconds=0.2)
    assert found["problem"] is None
    assert [(row["samples"], row["classes"]) for row in found["rows"]] == [(8, 3), (16, 5)]
    for row in found["rows"]:
        low, median, high = row["ratio"]
        assert 0 < low <= median <= high
        assert 1 <= row["pairs"] <= _times.PAIRS
        assert 0 < row["rgd_seconds"] < 1
        assert 0 < row["cross_entropy_seconds"] < 1


def test_the_ratio_is_that_of_the_weighted_loss_over_the_plain_one(monkeypatch):
    clock = [0.0]

    def taking(seconds, forward):
        def run(*given):
            clock[0] += seconds
            return forward(*given)

        return run

    monkeypatch.setattr(_times, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(RGDLoss, "forward", taking(3.0, RGDLoss.forward))
    monkeypatch.setattr(nn.CrossEntropyLoss, "forward", taking(1.0, nn.CrossEntropyLoss.forward))
    (row,) = _times.steps(sizes=[(8, 3)], seconds=20.0)["rows"]
    assert (row["rgd_seconds"], row["cross_entropy_seconds"]) == (3.0, 1.0)
    assert row["ratio"] == [3.0, 3.0, 3.0]
    # A warm-up of 4 s and a look at the length of a call leave 13 s, and no pair begins later.
    assert row["pairs"] == 4


def test_the_table_of_the_bench_is_printed(capsys, monkeypatch):
    monkeypatch.setattr("rgd._about.steps", lambda: _times.steps(sizes=[(8, 3)], seconds=0.05))
    assert main(["--bench"]) == 0
    assert "8 x 3" in capsys.readouterr().out


def test_the_bench_is_planned_to_end_within_two_minutes():
    assert len(_times.SIZES) == 4
    assert len(_times.SIZES) * _times.SECONDS <= 100
