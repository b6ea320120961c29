"""`LinearRGDLoss`, and what of a linear head is refused."""

import copy
import math

import pytest
import rgd
import torch
from family import label
from linear_heads import B, C, Case, D, T, distance
from rgd.torch import LinearRGDLoss, RGDLoss, backend, cross_entropy, linear_cross_entropy
from torch import nn
from torch.nn import functional as F

POINTWISE_WITHOUT_KERNEL = rgd.Focal(2.0)
REMEMBERS = rgd.MovingAverage(rgd.KL(1.0), 0.9)
BACKENDS = ["rust", "composite"]


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
        # Inductor takes long. It fuses what the composite computes; of the kernels it sees calls alone.
        compiler = "inductor" if options and weighting in {rgd.KL(1.0), REMEMBERS} else "aot_eager"
        actual = case.results(torch.compile(twin, fullgraph=True, backend=compiler), case.input, case.target)
    assert distance(actual, expected) <= 1e-6
    assert twin.stats().to_dict() == pytest.approx(criterion.stats().to_dict(), rel=1e-5)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script:FutureWarning", "ignore:`torch.jit.script:DeprecationWarning"
)
@pytest.mark.parametrize("options", [{}, {"shift": True}, {"weighting": rgd.KLBall(0.1)}], ids=str)
def test_one_dynamic_graph_serves_every_number_of_rows(options):
    torch.compiler.reset()
    head, graphs = torch.randn(5, 4, requires_grad=True), []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    def call(input, target):
        return linear_cross_entropy(input, head, target, **options)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=count)
    for rows, length in ((2, 3), (4, 5), (3, 7)):
        input, target = torch.randn(rows, length, 4), torch.randint(0, 5, (rows, length))
        torch.testing.assert_close(compiled(input, target), call(input, target))
    assert len(graphs) == 1


def test_a_compiled_mean_of_nothing_is_nan_and_one_of_nan_keeps_the_other_gradients():
    torch._dynamo.reset()
    nothing, broken = Case(rows=(4,)), Case(rows=(4,))
    nothing.target.fill_(-100)
    with torch.no_grad():
        broken.input[1] = torch.nan
    for case in (nothing, broken):
        compiled = torch.compile(case.chunked, fullgraph=True, backend="aot_eager")
        expected = case.results(case.chunked)
        assert expected[0].isnan()
        for a, e in zip(case.results(compiled), expected, strict=True):
            torch.testing.assert_close(a, e, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_a_model_that_holds_the_module_is_scripted():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.criterion = nn.Linear(D, D), LinearRGDLoss(D, C)

        def forward(self, input):
            return self.body(input)

    model = Model()
    input = torch.ones(2, D)
    torch.testing.assert_close(torch.jit.script(model)(input), model(input))


def test_totals_and_warnings_are_those_of_the_loss():
    criterion, other = LinearRGDLoss(D, C, warn=True), RGDLoss(warn=True)
    criterion.reset_stats()
    other.reset_stats()
    hidden, target = torch.ones(8, D), torch.arange(8)
    with torch.no_grad():
        criterion.linear.weight.zero_()
    for loss, given in ((criterion, hidden), (other, criterion.linear(hidden))):
        with pytest.warns(UserWarning, match="All weights are equal"):
            loss(10 * given, target)
        loss(given, target)
    assert criterion.stats(total=True).to_dict() == pytest.approx(other.stats(total=True).to_dict(), rel=1e-6)


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
    refused(IndexError, "label 11", target=torch.full((B, T), C))
    refused(TypeError, "vocab_group|process_group", vocab_group="all")
    refused(
        TypeError, r"linear_weight has layout .*\.to_dense\(\)", weight=torch.zeros(C, D).double().to_sparse()
    )


def out_of_range(position, classes=C):
    place = ", ".join(map(str, position))
    return rf"label 77 at position \[{place}\] is out of range .* {classes} classes: .* 0 to {classes - 1}"


@pytest.mark.parametrize("name", ["rust", "composite"])
@pytest.mark.parametrize("weighting", [rgd.KL(1.0), rgd.Focal(2.0), rgd.CVaR(0.3)], ids=label)
def test_a_target_out_of_range_is_named_with_its_place_in_what_was_given(weighting, name):
    flat, rows = Case(rows=(4,)), Case()
    flat.target[:] = torch.tensor([-100, -100, -100, 77])
    rows.target[0] = -100
    rows.target[2, 3] = 77
    options = {"weighting": weighting, "chunk_bytes": 1}
    left_out = torch.ones(B, T, dtype=torch.bool)
    left_out[1, :] = False
    with backend(name):
        with pytest.raises(IndexError, match=out_of_range([3])):
            flat.chunked(**options)
        masked = {"where": left_out}, {"shift": True, "sample_weight": left_out * 2}
        for more in ({}, {"shift": True}, *masked):
            with pytest.raises(IndexError, match=out_of_range([2, 3])):
                rows.chunked(**options, **more)
        # The first target of a sequence is not used with shift.
        rows.target[2, 3], rows.target[1, 0] = 0, 77
        rows.chunked(**options, shift=True)
        with pytest.raises(IndexError, match=out_of_range([1, 0])):
            rows.chunked(**options)


@pytest.mark.parametrize("shift", [False, True])
def test_a_compiled_call_names_the_same_place(shift):
    case = Case()
    case.target[0, 1:] = -100
    case.target[2, 3] = 77
    torch._dynamo.reset()
    for weighting in (rgd.KL(1.0), rgd.CVaR(0.3)):
        call = torch.compile(case.chunked, fullgraph=True, backend="aot_eager")
        with pytest.raises(IndexError, match=out_of_range([2, 3])):
            call(weighting=weighting, shift=shift, chunk_bytes=1)


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
