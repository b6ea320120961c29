"""The linear head in chunks against RGDLoss of all its logits: value, gradients, statistics, memory."""

import copy
import itertools

import pytest
import rgd
import torch
from family import BATCH_DEPENDENT, POINTWISE, label
from linear_heads import B, C, Case, D, T, distance, same
from rgd.torch import RGDLoss, backend, linear_cross_entropy
from rgd.torch._dtypes import product_dtype
from rgd.torch.backends import composite
from rgd.torch.linear import _call, _chunks, _products
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

POINTWISE_WITHOUT_KERNEL = rgd.Focal(2.0)
REMEMBERS = rgd.MovingAverage(rgd.KL(1.0), 0.9)
MEMBERS = [*POINTWISE, *BATCH_DEPENDENT]
BACKENDS = ["rust", "composite"]
# The default, one row, two rows and a rest.
CHUNKS = [None, 1, 2 * C * 8]


# --- equality, option by option ---


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighting", MEMBERS, ids=label)
def test_each_member_equals_its_loss_of_all_logits(weighting, reduction, name):
    case = Case()
    case.target[0, 1] = -100
    with backend(name):
        same(case, weighting=weighting, reduction=reduction, chunk_bytes=CHUNKS[2])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("chunk_bytes", CHUNKS)
@pytest.mark.parametrize("weighting", [rgd.KL(1.0), POINTWISE_WITHOUT_KERNEL, rgd.KLBall(0.1)], ids=label)
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.2},
        {"logit_softcap": 2.0},
        {"shift": True},
        {"shift": True, "reduction": "none"},
        {"per": "sample"},
        {"per": "sample", "shift": True, "reduction": "sum"},
        {"sample_weight": torch.tensor([1.0, 0.0, 2.5])},
        {"sample_weight": torch.arange(15.0).view(3, 5) % 3, "reduction": "none"},
        {"sample_weight": torch.arange(15).view(3, 5) % 3, "shift": True},
        {"sample_weight": torch.tensor([1.0, 0.0, 2.5]), "per": "sample"},
        {"where": torch.arange(15).view(3, 5) % 4 > 0},
        {"where": torch.tensor([True, False, True]), "per": "sample"},
        {"ignore_index": 3},
        {"logit_adjustment": torch.linspace(-1.0, 2.0, C)},
        {"logit_adjustment": torch.linspace(-1.0, 2.0, C), "logit_softcap": 2.0, "label_smoothing": 0.1},
        {"groups": torch.arange(15).view(3, 5) % 2},
    ],
    ids=str,
)
def test_each_option_equals_that_of_all_logits(options, weighting, chunk_bytes, name):
    with backend(name):
        same(Case(), weighting=weighting, chunk_bytes=chunk_bytes, **options)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weighting", [rgd.KL(1.0), POINTWISE_WITHOUT_KERNEL, rgd.CVaR(0.3)], ids=label)
def test_class_weights_and_probabilities_equal_those_of_all_logits(weighting, reduction, smoothing, name):
    case = Case()
    options = {"weighting": weighting, "reduction": reduction, "label_smoothing": smoothing}
    with backend(name):
        same(case, weight=case.class_weight, **options)
        same(case, case.probabilities, weight=case.class_weight, **options)


@pytest.mark.parametrize("name", BACKENDS)
def test_groups_and_states_are_heeded(name):
    groups = torch.arange(B * T).view(B, T) % 3
    weighting = rgd.GroupDRO(3, 0.5)
    case = Case()
    with backend(name):
        expected, after = case.whole(weighting=weighting, groups=groups, state=weighting.init())
        actual, state = case.chunked(weighting=weighting, groups=groups, state=weighting.init())
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(state["shares"], after["shares"], rtol=1e-12, atol=0)
        expected, after = case.whole(weighting=REMEMBERS, state=REMEMBERS.init())
        actual, state = case.chunked(weighting=REMEMBERS, state=REMEMBERS.init())
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(state["log_mean"], after["log_mean"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rows", [(7,), (1,), (2, 1), (2, 3, 4)])
def test_every_shape_of_rows_is_served(rows):
    same(Case(rows=rows), chunk_bytes=CHUNKS[2])
    same(Case(rows=rows, bias=False), reduction="none")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_targets_of_every_integer_dtype_are_served(dtype):
    case = Case()
    same(case, case.target.to(dtype))
    if dtype is torch.int32:
        same(case, case.target.to(dtype), ignore_index=2**40)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_that_counts_gives_what_all_logits_give(reduction):
    empty, ignored = Case(rows=(0,)), Case()
    ignored.target.fill_(-100)
    for case in (empty, ignored):
        expected = case.results(case.whole, reduction=reduction)
        actual = case.results(case.chunked, reduction=reduction)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)


EMPTY = [(0,), (0, 4), (2, 0), (0, 0), (1, 1), (3, 1)]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", EMPTY, ids=str)
def test_batches_of_little_or_nothing_give_what_all_logits_give(rows, reduction, name):
    case = Case(rows=rows, bias=len(rows) > 1)
    members = [rgd.KL(1.0), rgd.CVaR(0.3)]
    shifts = (False, True)[: len(rows)]
    ways = [{"shift": shift, "per": per} for shift in shifts for per in ("element", "sample")]
    for weighting, way in itertools.product(members, ways):
        options = {"weighting": weighting, "reduction": reduction, **way}
        with backend(name):
            for order in (1, 2):
                actual = case.results(case.chunked, order=order, **options)
                expected = case.results(case.whole, order=order, **options)
                for a, e in zip(actual, expected, strict=True):
                    # Sums of at most 3 * C products, some of which cancel.
                    close = 3 * C * torch.finfo(e.dtype).eps * float(e.abs().nan_to_num().sum())
                    torch.testing.assert_close(a, e, rtol=0, atol=close, equal_nan=True)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [(1, 4), (3, 4), (3,)], ids=str)
def test_tensors_that_repeat_one_number_in_memory_are_served(rows, reduction, name):
    for weighting in (rgd.KL(1.0), POINTWISE_WITHOUT_KERNEL, rgd.CVaR(0.3)):
        case = Case(rows=rows)
        case.input = torch.linspace(-1.0, 1.0, D).double().expand(*rows, D).requires_grad_()
        soft = torch.full((C,), 1 / C).double().expand(*rows, C)
        options = {"weighting": weighting, "reduction": reduction}
        measures = [
            torch.tensor(2.0).expand(rows),
            torch.tensor(2.0).expand(rows[0]),
            torch.arange(1.0, rows[0] + 1),
        ]
        with backend(name):
            for p in (*measures, None):
                for target in (torch.tensor(1).expand(rows), soft, case.probabilities):
                    same(case, target, sample_weight=p, weight=torch.tensor(2.0).expand(C), **options)


def test_a_row_that_takes_no_part_may_hold_anything():
    case = Case()
    case.target[1, 2] = -100
    expected = case.results(case.whole)
    with torch.no_grad():
        case.input[1, 2] = torch.nan
    actual = case.results(case.chunked)
    assert distance(actual, expected) <= 1e-12


@pytest.mark.parametrize("name", BACKENDS)
def test_float32_is_right_to_rounding(name):
    wide, narrow = (
        Case(dtype, (8, 16), classes=500, features=32) for dtype in (torch.float64, torch.float32)
    )
    with backend(name):
        for weighting in (rgd.KL(1.0), rgd.KLBall(0.1)):
            expected = wide.results(wide.whole, weighting=weighting)
            actual = narrow.results(narrow.chunked, weighting=weighting, chunk_bytes=2000 * 40)
            assert distance([a.double() for a in actual], expected) <= 1e-6


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_the_float32_result(dtype, name):
    narrow = Case(dtype, (8, 16), classes=500, features=32)
    wide = copy.copy(narrow)
    wide.input, wide.weight, wide.bias = (
        one.detach().float().requires_grad_() for one in (narrow.input, narrow.weight, narrow.bias)
    )
    with backend(name):
        expected = wide.results(wide.whole)
        actual = narrow.results(narrow.chunked, chunk_bytes=1000 * 40)
    # A logit, its gradient and the two products are each rounded to the dtype; the head's sums are not.
    assert distance([a.float() for a in actual], expected) <= 8 * torch.finfo(dtype).eps
    assert actual[1].dtype is dtype


def test_gradients_of_float16_outlive_the_loss_scale():
    # A gradient of a mean over 2^14 rows of a small head is below what float16 resolves, until it is scaled.
    narrow, wide = Case(torch.float16, (1024, 16), classes=50), Case(torch.float16, (1024, 16), classes=50)
    with torch.no_grad():
        narrow.weight.mul_(0.01)
    for name in ("input", "weight", "bias"):
        setattr(wide, name, getattr(narrow, name).detach().float().requires_grad_())
    (narrow.chunked() * 2.0**12).backward()
    (wide.whole() * 2.0**12).backward()
    assert distance([narrow.input.grad.float()], [wide.input.grad]) <= 8 * torch.finfo(torch.float16).eps


def test_the_head_is_summed_in_float32_over_the_chunks():
    case = Case(torch.bfloat16, (512,), classes=4, features=8)
    wide = Case(torch.float32, (512,), classes=4, features=8)
    with torch.no_grad():
        for one, other in zip(wide.trained, case.trained, strict=True):
            one.copy_(other)
    expected = wide.results(wide.whole)[2]

    def error(**options):
        return distance([case.results(case.chunked, chunk_bytes=1, **options)[2].float()], [expected])

    assert error() < error(accumulate_dtype=torch.bfloat16) / 2


def test_the_bias_is_summed_in_float32_within_and_over_the_chunks(monkeypatch):
    case = Case(torch.bfloat16, (512,), classes=4, features=8)
    rows, collect = [], _chunks._Run.collect

    def kept(run, chunk, gradient):
        collect(run, chunk, gradient)
        rows.append(gradient.double())
        assert run._bias.dtype is torch.float32

    monkeypatch.setattr(_chunks._Run, "collect", kept)
    finished = []
    monkeypatch.setattr(_call._Call, "_finished", lambda call, found: finished.append(found) or found)
    case.chunked(chunk_bytes=16 * 4 * product_dtype(case.weight).itemsize)
    assert [len(one) for one in rows] == [16] * 32
    gradients, (found,) = torch.cat(rows), finished
    # A sum over 16 rows, and one over 32 chunks.
    close = (16 + 32) * torch.finfo(torch.float32).eps * float(gradients.abs().sum(0).max())
    torch.testing.assert_close(found.bias.double(), gradients.sum(0), rtol=0, atol=close)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_logits_of_a_chunk_take_no_more_than_chunk_bytes(softcap, name, monkeypatch):
    sizes = []

    def empty(shape, like, dtype):
        sizes.append(shape)
        return like.new_empty(shape, dtype=dtype)

    monkeypatch.setattr(_chunks, "empty", empty)
    # Some processors multiply no bfloat16, and have its logits in float32.
    narrow = product_dtype(torch.empty(0, dtype=torch.bfloat16)).itemsize
    with backend(name):
        for dtype, bytes_of_row in ((torch.float64, 8 * C), (torch.bfloat16, narrow * C)):
            case = Case(dtype)
            for rows in (1, 2, 7):
                for spare in (0, bytes_of_row - 1):
                    sizes.clear()
                    case.chunked(chunk_bytes=rows * bytes_of_row + spare, logit_softcap=softcap).backward()
                    assert set(sizes) == {(rows, C)}


# --- autograd ---


@pytest.mark.parametrize("weighting", [rgd.KL(1.0), rgd.KLBall(0.1)], ids=label)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_are_those_of_finite_differences_of_fixed_weights(weighting, reduction):
    case = Case(rows=(4,))
    criterion = RGDLoss(weighting=weighting, reduction="none")
    criterion(F.linear(case.input, case.weight, case.bias), case.target)
    weights = criterion.last_weights

    def fixed(*tensors):
        losses = F.cross_entropy(F.linear(*tensors), case.target, reduction="none")
        return weights * losses if reduction == "none" else (weights * losses).mean()

    inputs = (case.input, case.weight, case.bias)
    assert torch.autograd.gradcheck(fixed, inputs)
    objective = case.chunked(weighting=weighting, reduction=reduction)
    above = torch.rand_like(objective)
    expected = torch.autograd.grad(fixed(*inputs), inputs, above)
    actual = torch.autograd.grad(objective, inputs, above)
    assert distance(actual, expected) <= 1e-12


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none"},
        {"weighting": rgd.KLBall(0.1)},
        {"shift": True},
        {"logit_adjustment": torch.arange(C) / 9},
    ],
    ids=str,
)
def test_second_derivatives_are_those_of_all_logits(options):
    case = Case()
    case.target[0, 1] = -100
    seconds = []
    for way in (case.chunked, case.whole):
        firsts = torch.autograd.grad(way(**options).square().sum(), case.trained, create_graph=True)
        seconds.append(torch.autograd.grad(sum(one.square().sum() for one in firsts), case.trained))
    assert distance(*seconds) <= 1e-12


@pytest.mark.parametrize("weighting", [rgd.KL(1.0), rgd.KLBall(0.1)], ids=label)
def test_a_graph_that_is_kept_gives_its_gradients_again(weighting):
    case = Case()
    objective = case.chunked(weighting=weighting)
    once = torch.autograd.grad(objective, case.trained, retain_graph=True)
    kept = [one.clone() for one in once]
    for one in once:
        one.zero_()
    again = torch.autograd.grad(3 * objective, case.trained)
    assert distance(again, [3 * one for one in kept]) <= 1e-15


@pytest.mark.parametrize("weighting", [rgd.KL(1.0), rgd.KLBall(0.1)], ids=label)
@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen, weighting):
    case = Case()
    getattr(case, frozen).requires_grad_(False)
    same(case, weighting=weighting, chunk_bytes=CHUNKS[2])
    assert getattr(case, frozen).grad is None


def test_a_frozen_head_costs_no_product_for_its_gradient():
    case, products = Case(), []
    case.weight.requires_grad_(False)
    case.bias.requires_grad_(False)

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "mm" in str(function):
                products.append(str(function))
            return function(*args, **(kwargs or {}))

    # A mode is not eager: count in the chunks themselves, which run below it.
    head = _head_of(case)
    with Count():
        norm = torch.ones(B * T, dtype=torch.float64)
        _chunks.in_one_pass(head, None, norm, _weigher(), _chunks.Wanted(True, False, False))
    assert len(products) == 2
    products.clear()
    with Count():
        _chunks.losses_in_chunks(head)
    assert len(products) == 1


def _head_of(case):
    from rgd.torch._problem import Options, Problem  # noqa: PLC0415

    flat, target = case.input.detach().reshape(-1, D), case.target.reshape(-1)
    step = composite.ComposedStep(Problem(flat, target, Options(reduction="sum")))
    weight, bias = case.weight.detach(), case.bias.detach()
    products = _products.Products(weight, bias)
    return _chunks.ChunkedHead(flat, products, target, None, None, 128, torch.float64, step)


def _weigher():
    from rgd.torch._plan import Plan, Weigher  # noqa: PLC0415

    return Weigher(Plan(rgd.KL(1.0)))


def test_without_grad_only_losses_are_computed():
    case = Case()
    with torch.no_grad():
        for weighting in (rgd.KL(1.0), POINTWISE_WITHOUT_KERNEL, rgd.KLBall(0.1)):
            actual = case.chunked(weighting=weighting)
            assert not actual.requires_grad
            torch.testing.assert_close(actual, case.whole(weighting=weighting), rtol=1e-12, atol=0)


def test_autocast_computes_in_bfloat16_and_returns_float32():
    case = Case(torch.float32, (8, 16), classes=50, features=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = case.results(case.whole)
        actual = case.results(case.chunked)
    assert actual[0].dtype is torch.float32
    assert [one.dtype for one in actual[1:]] == [torch.float32] * 3
    assert distance(actual, expected) <= 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same(reentrant):
    case = Case()
    expected = case.results(case.chunked)

    def way():
        return checkpoint(
            lambda *t: linear_cross_entropy(t[0], t[1], case.target, linear_bias=t[2]),
            case.input, case.weight, case.bias, use_reentrant=reentrant,
        )  # fmt: skip

    assert distance(case.results(way), expected) == 0


def test_a_tensor_changed_before_the_backward_pass_is_an_error():
    for weighting in (rgd.KL(1.0), rgd.KLBall(0.1)):
        for name in ("input", "weight", "target"):
            case = Case()
            objective = case.chunked(weighting=weighting)
            with torch.no_grad():
                getattr(case, name).add_(0)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                objective.backward()


def test_transforms_take_all_logits():
    case = Case()
    tensors = (case.input.detach(), case.weight.detach(), case.bias.detach())

    def chunked(input, weight, bias):
        return linear_cross_entropy(input, weight, case.target, linear_bias=bias)

    expected = case.results(case.chunked)[1:]
    assert distance(torch.func.grad(chunked, argnums=(0, 1, 2))(*tensors), expected) <= 1e-12
    each = torch.func.vmap(lambda x, y: linear_cross_entropy(x, tensors[1], y))(tensors[0], case.target)
    torch.testing.assert_close(each[0], linear_cross_entropy(tensors[0][0], tensors[1], case.target[0]))


def test_probabilities_that_require_grad_get_theirs():
    case = Case()
    probabilities = case.probabilities.requires_grad_()
    (expected,) = torch.autograd.grad(case.whole(probabilities), probabilities)
    (actual,) = torch.autograd.grad(case.chunked(probabilities), probabilities)
    assert distance([actual], [expected]) <= 1e-12


# --- memory ---


def test_no_tensor_of_all_logits_is_made():
    rows, classes = 64, 1000
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            outcome = function(*args, **(kwargs or {}))
            tensors = outcome if isinstance(outcome, (tuple, list)) else [outcome]
            largest.extend(one.numel() for one in tensors if isinstance(one, torch.Tensor))
            return outcome

    case = Case(torch.float32, (rows,), classes=classes, features=4)
    for weighting, reduction in ((rgd.KL(1.0), "mean"), (rgd.CVaR(0.5), "mean"), (rgd.KL(1.0), "none")):
        largest.clear()
        with pytest.MonkeyPatch.context() as patch:
            # The mode would send the call to the way of transforms, which makes all logits.
            patch.setattr(_call, "_served", lambda problem: True)
            with Watch():
                case.results(
                    case.chunked, weighting=weighting, reduction=reduction, chunk_bytes=8 * classes * 4
                )
        assert 8 * classes <= max(largest) < rows * classes / 4


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2, "weight": torch.linspace(0.5, 1.5, C)}], ids=str
)
def test_the_formula_of_a_chunk_gives_the_same_compiled(options, monkeypatch):
    # On a GPU the gradient's formula is compiled; here on the CPU.
    torch._dynamo.reset()
    compiled = torch.compile(composite.gradient_of, dynamic=False)
    monkeypatch.setattr(composite, "_formula_for", lambda logits: compiled)
    with backend("composite"):
        same(Case(torch.float32), tolerance=1e-6, chunk_bytes=4 * C * 4, **options)
