"""The kernels on each instruction set that this processor has."""

import json
import os
import subprocess
import sys

import pytest
from rgd import _rgd

# Weights and the cross-entropy by NumPy and torch, held against the oracle; and some of their bits.
PROGRAM = """
import hashlib, json, sys
sys.modules["jax"] = None
import numpy as np, rgd, torch
from rgd import _rgd
from rgd._about import _check
from rgd.torch import RGDLoss
torch.set_num_threads(1)
losses = np.random.default_rng(0).exponential(size=1000).astype(np.float32)
logits = torch.tensor(np.random.default_rng(1).normal(size=(64, 37)), dtype=torch.float32, requires_grad=True)
RGDLoss()(logits, torch.arange(64) % 37).backward()
bits = [rgd.sample_weights(losses, weighting).tobytes() for weighting in _check.WEIGHTINGS]
print(json.dumps({
    "isa": _rgd.isa(),
    "bits": hashlib.sha256(b"".join([*bits, logits.grad.numpy().tobytes()])).hexdigest(),
    "problems": [result for result in _check.check() if result.problem],
}))
"""


def run(isa, program=PROGRAM):
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "RGD_ISA": isa},
    )


@pytest.fixture(scope="module")
def found():
    """What the program printed, for each instruction set."""
    result = {}
    for isa in _rgd.available_isas():
        done = run(isa)
        assert done.returncode == 0, done.stderr
        result[isa] = json.loads(done.stdout)
    return result


def test_each_can_be_chosen_and_agrees_with_the_oracle(found):
    assert {isa: one["isa"] for isa, one in found.items()} == {isa: isa for isa in found}
    assert {isa: one["problems"] for isa, one in found.items()} == {isa: [] for isa in found}


def test_those_that_fuse_multiplication_and_addition_give_the_same_bits(found):
    bits = {isa: one["bits"] for isa, one in found.items()}
    plain = bits.pop("baseline", None)
    assert len(set(bits.values())) <= 1
    # Otherwise RGD_ISA would have changed nothing.
    assert plain not in bits.values()


def test_the_widest_is_the_default():
    done = run("", "from rgd import _rgd; print(_rgd.isa())")
    assert done.stdout.strip() == _rgd.available_isas()[0]


def test_another_name_is_refused_when_rgd_is_imported():
    done = run("sse9", "import rgd")
    assert done.returncode != 0
    names = ", ".join(_rgd.available_isas())
    assert f"ValueError: RGD_ISA must be one that this processor has: {names}, got 'sse9'" in done.stderr
