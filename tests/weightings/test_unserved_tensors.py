"""Tensors that no front can compute with: refused by name, with the call that makes them plain."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import rgd
import torch
from rgd.torch import (
    RGD,
    RGDLoss,
    backend,
    cross_entropy,
    reweighted_mean,
    sample_weights,
    weight_stats,
)

DENSE = torch.rand(4, 4)
TARGET = torch.tensor([0, 1, 2, 3])


def quantized() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of its quantized dtypes
        return torch.quantize_per_tensor(DENSE, 0.1, 0, torch.qint8)


def nested(layout: torch.layout) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls nested tensors a prototype
        return torch.nested.nested_tensor([torch.rand(2), torch.rand(3)], layout=layout)


def in_layout(convert: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its sparse CSR layouts beta
        return convert(DENSE)


KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (DENSE.to_sparse, ".to_dense()"),
    "CSR": (lambda: in_layout(torch.Tensor.to_sparse_csr), ".to_dense()"),
    "CSC": (lambda: in_layout(torch.Tensor.to_sparse_csc), ".to_dense()"),
    "BSR": (lambda: in_layout(lambda x: x.to_sparse_bsr((2, 2))), ".to_dense()"),
    "BSC": (lambda: in_layout(lambda x: x.to_sparse_bsc((2, 2))), ".to_dense()"),
    "MKL-DNN": (DENSE.to_mkldnn, ".to_dense()"),
    "quantized": (quantized, ".dequantize()"),
    "float8_e5m2": (lambda: DENSE.to(torch.float8_e5m2), ".float()"),
    "float8_e4m3fn": (lambda: DENSE.to(torch.float8_e4m3fn), ".float()"),
    "nested": (lambda: nested(torch.strided), "unbind()"),
    "nested, jagged": (lambda: nested(torch.jagged), "unbind()"),
}


def optimize(losses: Any) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    RGD(torch.optim.SGD([parameter], lr=0.1)).backward(losses)


NUMPY: dict[str, Callable[[Any], Any]] = {
    "losses": rgd.sample_weights,
    "losses of a mean": rgd.reweighted_mean,
    "losses of a weighting without a kernel": lambda x: rgd.sample_weights(x, rgd.CVaR(0.5)),
    "where": lambda x: rgd.sample_weights(DENSE, where=x),
    "sample_weight": lambda x: rgd.sample_weights(DENSE, sample_weight=x),
    "groups": lambda x: rgd.weight_stats(DENSE, DENSE, groups=x),
    "weights": lambda x: rgd.weight_stats(DENSE, x),
}
TORCH: dict[str, Callable[[Any], Any]] = {
    "losses": sample_weights,
    "losses of a mean": reweighted_mean,
    "losses of a weighting without a kernel": lambda x: sample_weights(x, rgd.CVaR(0.5)),
    "losses of statistics": lambda x: weight_stats(x, DENSE),
    "losses of an optimizer": optimize,
    "sample_weight": lambda x: reweighted_mean(DENSE, sample_weight=x),
    "weights": lambda x: weight_stats(DENSE, x),
    "input": lambda x: RGDLoss()(x, TARGET),
    "input of the function": lambda x: cross_entropy(x, TARGET),
    "target": lambda x: RGDLoss()(DENSE, x),
    "weight": RGDLoss,
    "sample_weight of a loss": lambda x: RGDLoss()(DENSE, TARGET, sample_weight=x),
    "what base returns": lambda x: RGDLoss(base=lambda y, _: y)(x, TARGET),
}


@pytest.fixture(params=["rust", "composite"])
def chosen(request: Any) -> Iterator[None]:
    with backend(request.param):
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("argument", NUMPY)
def test_numpys_front_refuses_a_tensor_it_cannot_read_with_the_fix(argument: str, kind: str) -> None:
    make, fix = KINDS[kind]
    name = argument.partition(" ")[0]
    with pytest.raises(TypeError, match=rf"^{name} (is|has) .*{re.escape(fix)}"):
        NUMPY[argument](make())


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("argument", TORCH)
def test_torchs_front_refuses_a_tensor_it_cannot_compute_with_and_names_the_fix(
    argument: str, kind: str
) -> None:
    make, fix = KINDS[kind]
    name = argument.partition(" of ")[0]
    with pytest.raises(TypeError, match=rf"^{name} (must|is|has) .*{re.escape(fix)}"):
        TORCH[argument](make())


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("name", ["where", "groups"])
@pytest.mark.parametrize("kind", ["sparse", "CSR", "MKL-DNN", "nested"])
def test_a_mask_or_groups_of_such_a_tensor_are_refused_too(name: str, kind: str) -> None:
    make, fix = KINDS[kind]
    with pytest.raises(TypeError, match=rf"^{name} (is|has) .*{re.escape(fix)}"):
        sample_weights(DENSE, **{name: make()})


@pytest.mark.parametrize("argument", NUMPY)
def test_numpys_front_says_that_a_meta_tensor_has_no_values(argument: str) -> None:
    with pytest.raises(ValueError, match=r"must be on the CPU, got a tensor on meta, which has .* no values"):
        NUMPY[argument](torch.empty(4, 4, device="meta"))


def test_bfloat16_sample_weights_are_read_beside_numpys_losses() -> None:
    losses, p = np.linspace(0.0, 3.0, 4), torch.tensor([1.0, 2.0, 0.0, 0.5], dtype=torch.bfloat16)
    expected = rgd.reweighted_mean(losses, sample_weight=p.float().numpy())
    assert rgd.reweighted_mean(losses, sample_weight=p) == expected


def test_sparse_arrays_of_scipy_are_refused_with_toarray() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(TypeError, match=r"losses must be an array .*: pass losses\.toarray\(\)"):
        rgd.sample_weights(sparse.eye(3))


def interpreters() -> Any:
    """CPython's own module of subinterpreters, which has no public name before 3.14."""
    for name in ("_interpreters", "_xxsubinterpreters"):
        try:
            return __import__(name)
        except ImportError:
            continue
    return pytest.skip("no module of subinterpreters")


@pytest.mark.parametrize("importer", ["first there", "in the main interpreter before"])
def test_the_import_in_a_subinterpreter_is_refused_in_plain_words(importer: str) -> None:
    name = interpreters().__name__
    program = f"""
        import {name} as interpreters, textwrap
        {"" if importer == "first there" else "import rgd"}
        code = '''
        try:
            import rgd
        except ImportError as error:
            assert str(error).startswith("rgd cannot be imported in a subinterpreter"), error
            print("refused", flush=True)
        '''
        found = interpreters.run_string(interpreters.create(), textwrap.dedent(code))
        assert found is None, found
        import numpy, rgd
        rgd.sample_weights(numpy.ones(3))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout.strip()) == (0, "refused"), (result.stdout, result.stderr)
