"""Labels that take no part: what stands there, a class or not, reaches no operation of any backend."""

import functools

import pytest
import rgd
import torch
from linear_heads import Case
from rgd.torch import backend, cross_entropy

N, C, T = 4, 3, 5
# Which targets take part: of single samples and of sequences, by every shape that a call takes.
MASKS = {
    "where": ((), "element", {"where": torch.tensor([True, False, True, False])}),
    "zeros": ((), "element", {"sample_weight": torch.tensor([1.0, 0.0, 2.5, 0.0])}),
    "where of sequences": ((T,), "element", {"where": torch.arange(N * T).view(N, T) % 3 > 0}),
    "zeros of sequences": ((T,), "element", {"sample_weight": torch.arange(N * T).view(N, T) % 3}),
    "zeros of samples": ((T,), "element", {"sample_weight": torch.tensor([1, 0, 2, 0])}),
    "where by sample": ((T,), "sample", {"where": torch.tensor([True, False, True, False])}),
    "zeros by sample": ((T,), "sample", {"sample_weight": torch.tensor([1.0, 0.0, 2.5, 0.0])}),
}
masks = pytest.mark.parametrize("mask", list(MASKS))
members = pytest.mark.parametrize("weighting", [rgd.KL(1.0), rgd.Focal(2.0), rgd.CVaR(0.5)], ids=str)
BY_CLASS = torch.linspace(0.5, 1.5, C).double()


def batch(mask):
    """Logits, labels that are all classes, the same but for those that take no part, and the options."""
    shape, per, options = MASKS[mask]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N, C, *shape, generator=generator, dtype=torch.float64)
    target = torch.randint(C, (N, *shape), generator=generator)
    (given,) = options.values()
    kept = given != 0
    kept = kept.view(N, *[1] * (target.dim() - kept.dim()), *kept.shape[1:]).expand(target.shape)
    no_class = torch.where(torch.arange(target.numel()).view(target.shape) % 2 == 1, -1, 255)
    return logits, target, torch.where(kept, target, no_class), {"per": per, **options}


def gradients(function, logits, order=1):
    """The value of a function, and the gradient of its sum; by `order` 2 that of the gradient's norm."""
    logits = logits.clone().requires_grad_()
    value = function(logits)
    (found,) = torch.autograd.grad(value.sum(), logits, create_graph=order == 2)
    if order == 2:
        (found,) = torch.autograd.grad(found.square().sum(), logits)
    return value.detach(), found


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        # Sums of at most 20 products, in another order.
        torch.testing.assert_close(a, e, rtol=20 * torch.finfo(e.dtype).eps, atol=1e-15)


@pytest.mark.parametrize("name", ["rust", "composite"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@members
@masks
def test_a_label_that_takes_no_part_may_be_anything(mask, weighting, reduction, name):
    logits, classes, broken, options = batch(mask)
    options |= {"weighting": weighting, "reduction": reduction}
    for more in ({}, {"weight": BY_CLASS, "label_smoothing": 0.1}):
        loss = functools.partial(cross_entropy, **options, **more)
        for order in (1, 2):
            with backend(name):
                expected = gradients(functools.partial(loss, target=classes), logits, order)
                actual = gradients(functools.partial(loss, target=broken), logits, order)
            assert_same(actual, expected)


@members
@masks
def test_nor_under_transforms_or_in_the_place_of_the_logits(mask, weighting):
    logits, classes, broken, options = batch(mask)
    options |= {"weighting": weighting, "weight": BY_CLASS}
    expected = gradients(lambda x: cross_entropy(x, classes, **options), logits)

    def value(x):
        return cross_entropy(x, broken, **options)

    assert_same((value(logits), torch.func.grad(value)(logits)), expected)
    several = torch.func.vmap(value)(torch.stack([logits, logits]))
    assert_same(several, [expected[0], expected[0]])
    with backend("composite"):
        in_place = gradients(lambda x: cross_entropy(x * 1, broken, inplace=True, **options), logits)
    assert_same(in_place, expected)


@pytest.mark.parametrize("weighting", [rgd.KL(1.0), rgd.CVaR(0.5)], ids=str)
def test_nor_in_compiled_and_exported_graphs(weighting):
    logits, classes, broken, options = batch("zeros by sample")
    options |= {"weighting": weighting, "weight": BY_CLASS}
    expected = gradients(lambda x: cross_entropy(x, classes, **options), logits)

    class Loss(torch.nn.Module):
        def forward(self, x, y):
            return cross_entropy(x, y, **options)

    torch._dynamo.reset()
    compiled = torch.compile(Loss(), backend="aot_eager", fullgraph=True)
    assert_same(gradients(lambda x: compiled(x, broken), logits), expected)
    exported = torch.export.export(Loss(), (logits, broken)).module()
    assert_same([exported(logits, broken)], [expected[0]])


@pytest.mark.parametrize("name", ["rust", "composite"])
@members
@pytest.mark.parametrize("mask", [mask for mask, (shape, *_) in MASKS.items() if shape])
def test_nor_in_a_linear_head(mask, weighting, name):
    _, classes, broken, options = batch(mask)
    case = Case(rows=(N, T), classes=C)
    options |= {"weighting": weighting, "weight": case.class_weight, "label_smoothing": 0.1}
    with backend(name):
        for way in ({}, {"shift": True}, {"reduction": "none"}):
            expected = case.results(case.chunked, classes, **options, **way)
            assert_same(case.results(case.chunked, broken, **options, **way), expected)


@members
def test_nor_in_a_linear_head_that_leaves_no_row_out(weighting, monkeypatch):
    # On a GPU all rows are computed: to find those that take part would wait for the device.
    from rgd.torch.linear import _chunks  # noqa: PLC0415

    plain = _chunks._Run.__init__

    def with_all_rows(run, head, wanted):
        plain(run, head._replace(takes_part=None), wanted)

    monkeypatch.setattr(_chunks._Run, "__init__", with_all_rows)
    _, classes, broken, options = batch("zeros of samples")
    case = Case(rows=(N, T), classes=C)
    options |= {"weighting": weighting, "weight": case.class_weight, "label_smoothing": 0.1}
    with backend("composite"):
        expected = case.results(case.chunked, classes, **options)
        assert_same(case.results(case.chunked, broken, **options), expected)
