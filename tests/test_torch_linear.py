"""The linear head in chunks against RGDLoss of all its logits: value, gradients, statistics, memory."""

import copy
import math

import pytest
import rgd
import torch
from family import BATCH_DEPENDENT, POINTWISE, label
from rgd.torch import LinearRGDLoss, RGDLoss, backend, cross_entropy, linear_cross_entropy
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

B, T, D, C = 3, 5, 6, 11
POINTWISE_WITHOUT_KERNEL = rgd.Focal(2.0)
REMEMBERS = rgd.MovingAverage(rgd.KL(1.0), 0.9)
MEMBERS = [*POINTWISE, *BATCH_DEPENDENT]
BACKENDS = ["rust", "composite"]
# The default, one row, two rows and a rest.
CHUNKS = [None, 1, 2 * C * 8]


class Case:
    """Hidden states, a head and targets, and the two ways from them to an objective."""

    def __init__(self, dtype=torch.float64, rows=(B, T), *, classes=C, features=D, bias=True, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.input = normal(*rows, features).to(dtype).requires_grad_()
        self.weight = (normal(classes, features) / features**0.5 * 2).to(dtype).requires_grad_()
        self.bias = normal(classes).to(dtype).requires_grad_() if bias else None
        self.target = torch.randint(classes, rows, generator=generator)
        self.probabilities = torch.softmax(normal(*rows, classes), -1).to(dtype)
        self.class_weight = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.5

    @property
    def trained(self):
        return [one for one in (self.input, self.weight, self.bias) if one is not None and one.requires_grad]

    def chunked(self, target=None, **options):
        target = self.target if target is None else target
        return linear_cross_entropy(self.input, self.weight, target, linear_bias=self.bias, **options)

    def whole(self, target=None, *, weight=None, logit_softcap=None, shift=False, **options):
        target = self.target if target is None else target
        logits = F.linear(self.input, self.weight, self.bias)
        if logit_softcap is not None:
            logits = logit_softcap * torch.tanh(logits / logit_softcap)
        if shift:
            logits, target = logits[:, :-1], target[:, 1:]
            for name in ("where", "sample_weight", "groups"):
                if options.get(name) is not None and options[name].dim() == 2:
                    options[name] = options[name][:, 1:]
        if logits.dim() > 2:
            logits = logits.movedim(-1, 1)
            target = target.movedim(-1, 1) if target.is_floating_point() else target
        return cross_entropy(logits, target, weight, **options)

    def results(self, way, *arguments, **options):
        """The objective, and what its elements, unequally wanted, do to the trained tensors."""
        for one in self.trained:
            one.grad = None
        objective = way(*arguments, **options)
        above = torch.linspace(1.0, 2.0, objective.numel(), dtype=objective.dtype)
        (objective * above.view(objective.shape)).sum().backward()
        return [objective.detach(), *(one.grad for one in self.trained)]


def distance(actual, expected):
    """The largest of the differences, each over the norm of what it should be."""
    pairs = zip(actual, expected, strict=True)
    return max(((a - e).norm() / max(float(e.norm()), 1e-300)).item() for a, e in pairs)


def same(case, *arguments, tolerance=1e-12, chunk_bytes=None, **options):
    expected = case.results(case.whole, *arguments, **options)
    actual = case.results(case.chunked, *arguments, chunk_bytes=chunk_bytes, **options)
    assert [a.dtype for a in actual] == [e.dtype for e in expected]
    assert distance(actual, expected) <= tolerance


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
    from rgd.torch import _chunks  # noqa: PLC0415

    head = _head_of(case)
    with Count():
        _chunks.in_one_pass(
            head,
            None,
            None,
            torch.ones(B * T, dtype=torch.float64),
            _weigher(),
            _chunks.Wanted(True, False, False),
        )
    assert len(products) == 2
    products.clear()
    with Count():
        _chunks.losses_of(head, None)
    assert len(products) == 1


def _head_of(case):
    from rgd.torch._chunks import Head  # noqa: PLC0415
    from rgd.torch._steps import ComposedStep  # noqa: PLC0415
    from rgd.torch.backends._options import Options  # noqa: PLC0415

    step = ComposedStep(None, Options(-100, 0.0, "sum", "element"))
    flat = case.input.detach().reshape(-1, D)
    return Head(
        flat,
        case.weight.detach(),
        case.bias.detach(),
        case.target.reshape(-1),
        None,
        128,
        torch.float64,
        step,
    )


def _weigher():
    from rgd.torch._weigher import Plan, Weigher  # noqa: PLC0415

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


# --- the module ---


def test_the_module_is_its_head_and_the_loss():
    torch.manual_seed(0)
    criterion = LinearRGDLoss(D, C, bias=True, dtype=torch.float64, tau=2.0, label_smoothing=0.1)
    other = RGDLoss(tau=2.0, label_smoothing=0.1)
    case = Case()
    logits = criterion.linear(case.input).movedim(-1, 1)
    torch.testing.assert_close(
        criterion(case.input, case.target), other(logits, case.target), rtol=1e-12, atol=0
    )
    assert criterion.stats().to_dict() == pytest.approx(other.stats().to_dict(), rel=1e-12)
    torch.testing.assert_close(criterion.last_weights, other.last_weights, rtol=1e-12, atol=0)
    assert set(criterion.state_dict()) == {"linear.weight", "linear.bias"}


def test_statistics_of_shifted_targets_are_those_of_the_targets_used():
    case = Case()
    case.target[0, 1] = -100
    for weighting in (rgd.KL(1.0), rgd.KLBall(0.1)):
        for per in ("element", "sample"):
            criterion = LinearRGDLoss(
                linear_weight=nn.Parameter(case.weight.detach()), shift=True, per=per, weighting=weighting
            )
            other = RGDLoss(per=per, weighting=weighting)
            criterion(case.input, case.target)
            other(F.linear(case.input, case.weight)[:, :-1].movedim(-1, 1), case.target[:, 1:])
            assert criterion.stats().to_dict() == pytest.approx(other.stats().to_dict(), rel=1e-12)
            assert criterion.last_weights.shape == other.last_weights.shape


def test_a_head_is_tied_by_the_module_or_by_its_weight():
    for head in (nn.Linear(D, C), nn.Linear(D, C, bias=False), nn.Embedding(C, D)):
        criterion = LinearRGDLoss.tie(head, reduction="sum")
        assert criterion.linear is head
        assert criterion.reduction == "sum"
        hidden = torch.randn(4, D)
        expected = F.linear(hidden, head.weight, getattr(head, "bias", None))
        target = torch.arange(4)
        torch.testing.assert_close(
            criterion(hidden, target), cross_entropy(expected, target, reduction="sum")
        )
    shared = LinearRGDLoss(linear_weight=head.weight)
    assert shared.linear.weight is head.weight
    assert [name for name, _ in shared.named_parameters()] == ["linear.weight"]


def test_the_module_is_plain_in_evaluation():
    criterion = LinearRGDLoss(D, C).eval()
    hidden, target = torch.randn(4, D), torch.arange(4)
    with torch.no_grad():
        plain = criterion(hidden, target)
        torch.testing.assert_close(plain, F.cross_entropy(criterion.linear(hidden), target))
    trained = criterion(hidden, target)
    assert trained > plain * 1.05


def test_a_state_is_kept_over_the_steps_of_training():
    criterion = LinearRGDLoss(D, C, weighting=REMEMBERS)
    other = RGDLoss(weighting=REMEMBERS)
    for step in range(3):
        hidden, target = torch.randn(4, D) * step, torch.arange(4)
        actual, expected = criterion(hidden, target), other(criterion.linear(hidden), target)
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        criterion.state_dict()["weighting_state.log_mean"], other.state_dict()["weighting_state.log_mean"]
    )


@pytest.mark.parametrize(
    "weighting", [rgd.KL(1.0), POINTWISE_WITHOUT_KERNEL, rgd.KLBall(0.1), REMEMBERS], ids=label
)
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "none", "shift": True, "logit_softcap": 3.0, "logit_adjustment": torch.ones(C)}],
    ids=str,
)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_compiled_graph_gives_the_same(weighting, options, name):
    torch._dynamo.reset()
    criterion = LinearRGDLoss(D, C, bias=True, weighting=weighting, **options)
    twin = copy.deepcopy(criterion)
    case = Case(torch.float32)
    case.target[0, 1] = -100
    case.weight, case.bias = criterion.linear.weight, criterion.linear.bias
    with backend(name):
        expected = case.results(criterion, case.input, case.target)
        case.weight, case.bias = twin.linear.weight, twin.linear.bias
        actual = case.results(torch.compile(twin, fullgraph=True), case.input, case.target)
    assert distance(actual, expected) <= 1e-6
    assert twin.stats().to_dict() == pytest.approx(criterion.stats().to_dict(), rel=1e-5)


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
    from rgd.torch import _linear  # noqa: PLC0415

    for weighting, reduction in ((rgd.KL(1.0), "mean"), (rgd.KLBall(0.1), "mean"), (rgd.KL(1.0), "none")):
        largest.clear()
        with pytest.MonkeyPatch.context() as patch:
            # The mode would send the call to the way of transforms, which makes all logits.
            patch.setattr(_linear, "_served", lambda tensors, target: True)
            with Watch():
                case.results(
                    case.chunked, weighting=weighting, reduction=reduction, chunk_bytes=8 * classes * 4
                )
        assert 8 * classes <= max(largest) < rows * classes / 4


# --- what is refused ---


def refused(error, match, *, input=None, weight=None, target=None, **options):
    case = Case()
    given = [case.input if input is None else input, case.weight if weight is None else weight]
    with pytest.raises(error, match=match):
        linear_cross_entropy(*given, case.target if target is None else target, **options)


def test_shapes_that_do_not_fit_are_named():
    refused(
        ValueError,
        r"^linear_weight must have shape \(C, D\) with D = 6.*give linear_weight\.t\(\)",
        weight=torch.zeros(D, C).double(),
    )
    refused(
        ValueError, r"^linear_weight must have shape \(C, D\), got \(11,\)", weight=torch.zeros(C).double()
    )
    refused(ValueError, r"^input must be hidden states", input=torch.zeros(D).double())
    refused(ValueError, r"^linear_bias must have shape \(11,\)", linear_bias=torch.zeros(3).double())
    refused(
        ValueError,
        r"^target holds class indices, which must have shape \(3, 5\)",
        target=torch.zeros(3, dtype=torch.long),
    )
    refused(ValueError, r"^target holds class probabilities, .*\(3, 5, 11\)", target=torch.zeros(3, 5))
    case = Case()
    with pytest.raises(ValueError, match=r"^weight must hold one number for each of the 11 classes, got 3"):
        case.chunked(weight=torch.ones(3))
    with pytest.raises(ValueError, match=r"^shift=True needs input of shape \(B, T, D\)"):
        Case(rows=(4,)).chunked(shift=True)


def test_dtypes_and_settings_that_do_not_fit_are_named():
    refused(TypeError, "^input must be float32", input=torch.zeros(B, T, D, dtype=torch.long))
    refused(TypeError, "^linear_weight must be float32", weight=torch.zeros(C, D, dtype=torch.long))
    refused(
        TypeError,
        "^linear_weight must be a torch.Tensor, got Linear: give its weight",
        weight=nn.Linear(D, C),
    )
    refused(TypeError, "input is torch.float64 and linear_weight torch.float32", weight=torch.zeros(C, D))
    refused(TypeError, "^target must hold class indices", target=torch.zeros(B, T, dtype=torch.bool))
    refused(ValueError, "^chunk_bytes must be positive", chunk_bytes=0)
    refused(TypeError, "^chunk_bytes must be a whole number", chunk_bytes=1.5)
    refused(ValueError, "^logit_softcap must be a positive number", logit_softcap=-1.0)
    refused(ValueError, "^logit_softcap must be a positive number", logit_softcap=math.nan)
    refused(TypeError, "^accumulate_dtype must be a float dtype", accumulate_dtype=torch.int32)
    refused(TypeError, "^shift must be True or False", shift=1)
    refused(ValueError, "^shift takes class indices", target=Case().probabilities, shift=True)
    refused(
        ValueError,
        "input is on cpu and linear_weight on meta",
        weight=torch.zeros(C, D, device="meta").double(),
    )
    refused(IndexError, "target 11", target=torch.full((B, T), C))
    refused(TypeError, "vocab_group|process_group", vocab_group="all")
    refused(
        TypeError, r"linear_weight has layout .*\.to_dense\(\)", weight=torch.zeros(C, D).double().to_sparse()
    )


def test_sample_weights_of_any_magnitude_give_the_mean():
    p = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    case = Case(torch.float32)
    expected = case.results(case.chunked, sample_weight=p)
    for scale in (1e300, 1e-300):
        assert distance(case.results(case.chunked, sample_weight=scale * p), expected) <= 1e-6
    with pytest.raises(ValueError, match="sample_weight holds 2e"):
        case.chunked(sample_weight=1e300 * p, reduction="sum")


def test_a_module_without_a_head_is_told_how_to_get_one():
    with pytest.raises(TypeError, match=r"LinearRGDLoss\(in_features, num_classes\)"):
        LinearRGDLoss(4)
    with pytest.raises(TypeError, match="lm_head must be a module with a weight"):
        LinearRGDLoss.tie(nn.Tanh())
    with pytest.raises(TypeError, match="leave bias out"):
        LinearRGDLoss.tie(nn.Linear(D, C), bias=True)
    with pytest.raises(TypeError, match=r"must be an nn\.Parameter"):
        LinearRGDLoss(linear_weight=torch.zeros(C, D))
    with pytest.raises(ValueError, match="does not fit in_features=3"):
        LinearRGDLoss(3, linear_weight=nn.Parameter(torch.zeros(C, D)))
    with pytest.raises(TypeError, match="no target"):
        LinearRGDLoss(D, C)(torch.zeros(2, D))
