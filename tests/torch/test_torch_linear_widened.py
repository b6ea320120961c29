"""The linear head in bfloat16 on a processor that multiplies none: its products are those of float32."""

import platform

import pytest
import rgd
import torch
from linear_heads import B, C, Case, D, T, distance
from rgd.torch import LinearRGDLoss, _dtypes, backend
from rgd.torch.linear import _products
from torch.nn import functional as F

FEW_CLASSES = 4 * D * 4  # bytes: blocks of four classes, and one of three


@pytest.fixture
def widened(monkeypatch):
    monkeypatch.setattr(_dtypes, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(_products, "_WIDENED_BYTES", FEW_CLASSES)
    monkeypatch.setattr(_products, "_PRODUCT_BYTES", FEW_CLASSES)


def in_float32(case):
    """The same numbers in float32."""
    other = Case(torch.float32, bias=case.bias is not None)
    for name in ("input", "weight", "bias"):
        if getattr(case, name) is not None:
            setattr(other, name, getattr(case, name).detach().float().requires_grad_())
    other.target, other.probabilities = case.target, case.probabilities.float()
    return other


def check(case, *, target=None, chunk_bytes=2 * C * 4, **options):
    """The objective and each gradient are those of float32, rounded once."""
    twin = in_float32(case)
    expected = twin.results(twin.whole, None if target is None else target.float(), **options)
    actual = case.results(case.chunked, target, chunk_bytes=chunk_bytes, **options)
    assert [one.dtype for one in actual] == [torch.bfloat16] * len(actual)
    assert distance([one.float() for one in actual], expected) < 2**-8


@pytest.mark.usefixtures("widened")
@pytest.mark.parametrize("name", ["rust", "composite"])
@pytest.mark.parametrize("weighting", [rgd.KL(1.0), rgd.CVaR(0.5)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none", "z_loss": 0.1},
        {"logit_softcap": 2.0, "label_smoothing": 0.1},
        {"sample_weight": torch.tensor([1.0, 0.0, 2.5])},
    ],
    ids=str,
)
def test_a_head_in_bfloat16_is_computed_in_float32(options, weighting, name):
    with backend(name):
        check(Case(torch.bfloat16), weighting=weighting, **options)


@pytest.mark.usefixtures("widened")
@pytest.mark.parametrize("weighting", [rgd.KL(1.0), rgd.CVaR(0.5)], ids=str)
def test_losses_are_those_of_float32(weighting):
    case = Case(torch.bfloat16, rows=(B * T,))
    head = torch.nn.Linear(D, C, dtype=torch.bfloat16)
    head.weight, head.bias = torch.nn.Parameter(case.weight), torch.nn.Parameter(case.bias)
    criterion = LinearRGDLoss.tie(head, weighting=weighting)
    criterion(case.input, case.target)
    logits = F.linear(case.input.float(), head.weight.float(), head.bias.float())
    expected = F.cross_entropy(logits, case.target, reduction="none")
    assert criterion.stats().mean_loss == pytest.approx(float(expected.detach().double().mean()), rel=1e-6)


@pytest.mark.usefixtures("widened")
def test_probabilities_and_rows_that_are_left_out_are_served():
    case = Case(torch.bfloat16, bias=False)
    check(case, target=case.probabilities)
    case.target[0, :3] = -100
    check(case)


@pytest.mark.usefixtures("widened")
def test_autocast_and_a_sum_in_bfloat16_are_served():
    case = Case(torch.float32)
    for name in ("input", "weight", "bias"):
        setattr(case, name, getattr(case, name).detach().bfloat16().float().requires_grad_())
    expected = case.results(case.whole)
    with torch.autocast("cpu", torch.bfloat16):
        actual = case.results(case.chunked)
    assert distance(actual, expected) < 2**-8
    assert distance(actual[:1], expected[:1]) < 1e-6
    narrow = Case(torch.bfloat16)
    twin = in_float32(narrow)
    expected = twin.results(twin.whole)
    actual = narrow.results(narrow.chunked, chunk_bytes=C * 4, accumulate_dtype=torch.bfloat16)
    # One rounding for each of the 15 chunks of a row.
    assert distance([one.float() for one in actual], expected) < B * T * 2**-8


@pytest.mark.usefixtures("widened")
def test_compiled_calls_are_those_of_eager_ones():
    case = Case(torch.bfloat16)
    compiled = torch.compile(case.chunked, backend="aot_eager")
    for actual, expected in zip(case.results(compiled), case.results(case.chunked), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("widened")
def test_no_copy_of_the_head_in_float32_is_made():
    products = _products.products_of(torch.zeros(C, D, dtype=torch.bfloat16), None)
    buffers = [one for one in vars(products).values() if isinstance(one, torch.Tensor)]
    wide = [one.numel() * 4 for one in buffers if one.dtype is torch.float32]
    assert wide == [FEW_CLASSES]
    rows = torch.ones(2, D, dtype=torch.bfloat16)
    logits = torch.empty(2, C)
    products.write_logits(rows, logits)
    assert not logits.any()


@pytest.mark.parametrize("avx512", [True, False])
@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("machine", ["x86_64", "AMD64", "aarch64", "arm64"])
def test_only_an_x86_without_instructions_widens(monkeypatch, machine, avx512, amx):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    expected = avx512 or amx or machine in {"aarch64", "arm64"}
    assert _dtypes.multiplies_bfloat16() is expected
    dtype = torch.bfloat16 if expected else torch.float32
    assert _dtypes.product_dtype(torch.zeros(1, dtype=torch.bfloat16)) is dtype
    for other in (torch.float64, torch.float32):
        assert _dtypes.product_dtype(torch.zeros(1, dtype=other)) is other
    assert _dtypes.product_dtype(torch.zeros(1, dtype=torch.bfloat16, device="meta")) is torch.bfloat16


def test_a_torch_that_cannot_tell_widens_nothing(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert _dtypes.multiplies_bfloat16()


def test_the_head_s_products_are_added_in_float32_where_torch_can_and_rounded_before_where_it_cannot(
    monkeypatch,
):
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(6, C, generator=generator).bfloat16()
    rows = torch.randn(6, D, generator=generator).bfloat16()
    products = _products.Products(torch.zeros(C, D, dtype=torch.bfloat16), None)
    exact = gradient.float().t() @ rows.float()

    def added():
        total = torch.ones(C, D)
        products.add_weight_gradient(total, gradient, rows)
        return total - 1

    assert not _products.widens(torch.device("cpu"), torch.bfloat16, torch.float32)
    assert distance([added()], [exact]) > 2**-11
    # As on a GPU: torch has no such product for the CPU.
    monkeypatch.setattr(_products, "widens", lambda *of: of[1:] == (torch.bfloat16, torch.float32))
    monkeypatch.setattr(
        _products,
        "_addmm",
        lambda total, a, b, *, out_dtype, out: out.addmm_(a.to(out_dtype), b.to(out_dtype)),
    )
    assert distance([added()], [exact]) < 2**-20
