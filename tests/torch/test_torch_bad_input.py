"""Wrong inputs of the torch front: each is refused before anything happens, in words that name the mend."""

import functools

import pytest
import rgd
import torch
from rgd.torch import RGDLoss, cross_entropy, reweighted_mean, sample_weights
from torch import nn
from torch.nn import functional as F

LOGITS = torch.randn(4, 3)
TARGET = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("function", [sample_weights, reweighted_mean])
def test_a_scalar_loss_is_refused_with_a_hint(function):
    with pytest.raises(ValueError, match=r'already reduced.*reduction="none"'):
        function(torch.tensor(1.0))


def test_a_base_that_returns_a_scalar_is_refused_with_a_hint():
    criterion = RGDLoss(base=lambda x, y: (x - y).square().mean())
    with pytest.raises(ValueError, match=r'already reduced.*reduction="none"'):
        criterion(torch.rand(3), torch.rand(3))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_base_that_reduces_is_refused(reduction):
    with pytest.raises(ValueError, match=r'reduction="none"'):
        RGDLoss(base=nn.CrossEntropyLoss(reduction=reduction))


N = 5
BROADCAST = [
    (nn.MSELoss(reduction="none"), (N, 1), (N,)),
    (nn.MSELoss(reduction="none"), (N,), (N, 1)),
    (nn.L1Loss(reduction="none"), (N, N, 1), (N, N)),
    (nn.HuberLoss(reduction="none"), (1, N), (N, 1)),
    (nn.PoissonNLLLoss(reduction="none"), (N, 1), (N,)),
    (nn.KLDivLoss(reduction="none"), (N, 1), (N,)),
    (nn.HingeEmbeddingLoss(reduction="none"), (N, 1), (N,)),
    # Its N x N losses are averaged over an axis: their number does not show them.
    (nn.MultiLabelSoftMarginLoss(reduction="none"), (N, 1), (N,)),
    (functools.partial(F.smooth_l1_loss, reduction="none"), (N, 1), (N,)),
    (lambda x, y: (x - y).square(), (N, 1), (N,)),
]


@pytest.mark.filterwarnings("ignore:Using a (target|input) size")
@pytest.mark.parametrize(("base", "predictions", "targets"), BROADCAST)
def test_a_base_that_pairs_each_prediction_with_every_target_is_refused(base, predictions, targets):
    criterion = RGDLoss(base=base)
    with pytest.raises(ValueError, match=r"one was broadcast against the other: give .*squeeze\(-1\)"):
        criterion(torch.rand(predictions), torch.rand(targets))
    with pytest.raises(RuntimeError, match="last call"):
        criterion.stats()
    assert criterion(torch.rand(N, 2), torch.rand(N, 2)).isfinite()


def test_tensors_beside_the_first_two_are_looked_at_too():
    gaussian = RGDLoss(base=nn.GaussianNLLLoss(reduction="none"))
    with pytest.raises(ValueError, match="one was broadcast"):
        gaussian(torch.rand(N, 1), torch.rand(N), torch.ones(N, 1))
    named = RGDLoss(base=lambda x, *, labels: (x - labels).abs())
    with pytest.raises(ValueError, match="one was broadcast"):
        named(torch.rand(N, 1), labels=torch.rand(N))


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_base_whose_shapes_are_meant_is_left_alone():
    scores, labels, rows = torch.randn(N), torch.randn(N), torch.randn(N, 2)
    pairs = RGDLoss(base=lambda s, y: F.softplus(-(s[:, None] - s) * (y[:, None] - y)))
    contrast = RGDLoss(base=lambda u, v, heat: -(u @ v.t() / heat).log_softmax(1))
    squared, of_classes = (RGDLoss(base=kind(reduction="none")) for kind in (nn.MSELoss, nn.CrossEntropyLoss))
    for criterion, given, count in (
        (pairs, (scores, labels), N * N),
        (contrast, (rows, rows, torch.tensor(0.5)), N * N),
        (squared, (rows, torch.tensor(1.0)), 2 * N),
        (squared, (rows, torch.rand(2)), 2 * N),
        (squared, (torch.rand(1, 1), torch.rand(1)), 1),
        (of_classes, (torch.rand(N, 1), torch.zeros(N, dtype=torch.long)), N),
    ):
        criterion(*given)
        assert criterion.stats().count == count


@pytest.mark.parametrize(
    "setting", [{"weight": torch.ones(3)}, {"ignore_index": 0}, {"label_smoothing": 0.1}]
)
def test_settings_of_cross_entropy_are_refused_beside_a_base(setting):
    with pytest.raises(ValueError, match="give them to base"):
        RGDLoss(base=nn.CrossEntropyLoss(reduction="none"), **setting)


def test_a_base_that_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="base must be a callable"):
        RGDLoss(base="cross_entropy")


@pytest.mark.parametrize("tau", [0, -1.0, float("nan")])
def test_tau_must_be_positive(tau):
    with pytest.raises(ValueError, match="tau must be a positive number"):
        RGDLoss(tau=tau)


@pytest.mark.parametrize("tau", ["1", True, torch.ones(2)])
def test_tau_must_be_a_number(tau):
    with pytest.raises(TypeError, match="tau must be a number"):
        RGDLoss(tau=tau)


def test_an_infinite_tau_needs_a_scale():
    with pytest.raises(ValueError, match="give scale too"):
        RGDLoss(tau=float("inf"))


def test_tau_and_weighting_exclude_each_other():
    for call in (
        lambda: RGDLoss(tau=1.0, weighting=rgd.KL()),
        lambda: cross_entropy(LOGITS, TARGET, tau=1.0, weighting=rgd.KL()),
        lambda: sample_weights(torch.rand(3), rgd.KL(), tau=1.0),
    ):
        with pytest.raises(ValueError, match="not both"):
            call()


def test_a_weighting_that_is_none_is_refused_with_a_hint():
    with pytest.raises(TypeError, match="did you mean tau"):
        sample_weights(torch.rand(3), 0.5)


@pytest.mark.parametrize("radius", [-0.1, float("nan")])
def test_a_radius_must_not_be_negative(radius):
    with pytest.raises(ValueError, match="radius must be a number >= 0"):
        rgd.KLBall(radius)


def test_unknown_reduction_and_per_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="reduction must be 'none', 'mean' or 'sum', got 'avg'"):
        RGDLoss(reduction="avg")
    with pytest.raises(ValueError, match="per must be 'element' or 'sample', got 'token'"):
        RGDLoss(per="token")
    with pytest.raises(ValueError, match="reduction must be"):
        cross_entropy(LOGITS, TARGET, reduction=None)


@pytest.mark.parametrize(
    ("smoothing", "error"), [(-0.1, ValueError), (1.5, ValueError), ("a", TypeError), (True, TypeError)]
)
def test_label_smoothing_outside_its_range_is_refused(smoothing, error):
    with pytest.raises(error, match="label_smoothing"):
        RGDLoss(label_smoothing=smoothing)


def test_ignore_index_must_be_an_integer():
    with pytest.raises(TypeError, match="ignore_index must be an integer"):
        RGDLoss(ignore_index=0.5)


@pytest.mark.parametrize("classes", [3, 60])
def test_a_target_out_of_range_names_itself_and_its_position(classes):
    logits = torch.randn(2, classes, 4)
    target = torch.zeros(2, 4, dtype=torch.long)
    target[1, 2] = classes
    with pytest.raises(
        IndexError, match=rf"label {classes} at position \[1, 2\] is out of range .* {classes} classes"
    ):
        cross_entropy(logits, target)
    target[1, 2] = -1
    with pytest.raises(IndexError, match="label -1"):
        cross_entropy(logits, target)


@pytest.mark.parametrize("weighting", [rgd.KL(1.0), rgd.Focal(2.0), rgd.CVaR(0.5)], ids=str)
def test_beside_targets_that_take_no_part_it_names_the_same_position(weighting):
    target = torch.zeros(2, 4, dtype=torch.int32)
    target[0, 1:], target[1, 2] = -7, 3
    for options in (
        {"where": target >= 0},
        {"sample_weight": (target >= 0).int()},
        {"sample_weight": torch.tensor([0.0, 1.0]), "per": "sample"},
        {"ignore_index": -7},
    ):
        with pytest.raises(IndexError, match=r"label 3 at position \[1, 2\]"):
            cross_entropy(torch.randn(2, 3, 4), target, weighting=weighting, **options)


def test_a_target_of_the_wrong_shape_is_refused_with_the_right_one():
    with pytest.raises(ValueError, match=r"target must have shape \(4,\)"):
        cross_entropy(LOGITS, TARGET[:3])
    with pytest.raises(ValueError, match=r"target must have shape \(4,\)"):
        cross_entropy(LOGITS, TARGET[:, None])
    with pytest.raises(ValueError, match="class probabilities must have the shape"):
        cross_entropy(LOGITS, TARGET.float())


def test_a_target_of_the_wrong_dtype_is_refused():
    for target in (TARGET.bool(), TARGET.to(torch.complex64)):
        with pytest.raises(TypeError, match="class indices"):
            cross_entropy(LOGITS, target)


def test_class_weight_of_the_wrong_length_or_kind_is_refused():
    with pytest.raises(ValueError, match="weight must hold one number for each of the 3 classes, got 4"):
        RGDLoss(torch.ones(4))(LOGITS, TARGET)
    with pytest.raises(ValueError, match="weight must be a vector"):
        RGDLoss(torch.ones(3, 1))
    with pytest.raises(TypeError, match=r"weight must be a torch\.Tensor"):
        RGDLoss([1.0, 1.0, 1.0])


def test_integer_losses_and_logits_are_refused():
    with pytest.raises(TypeError, match="losses must be float"):
        sample_weights(torch.arange(3))
    with pytest.raises(TypeError, match="float logits"):
        cross_entropy(torch.ones(4, 3, dtype=torch.long), TARGET)
    with pytest.raises(TypeError, match=r"losses must be a torch\.Tensor, got list"):
        sample_weights([1.0, 2.0])
    with pytest.raises(TypeError, match=r"input must be a torch\.Tensor, got ndarray"):
        RGDLoss()(LOGITS.numpy(), TARGET)


def test_scalar_logits_are_refused():
    with pytest.raises(ValueError, match="class axis"):
        cross_entropy(torch.tensor(1.0), torch.tensor(0))


def test_stats_before_the_first_call_say_so():
    with pytest.raises(RuntimeError, match="last call"):
        RGDLoss().stats()


def test_a_refused_call_changes_nothing():
    criterion = RGDLoss()
    criterion(LOGITS, TARGET)
    before = criterion.stats()
    with pytest.raises(IndexError):
        criterion(LOGITS, torch.tensor([0, 1, 2, 3]))
    assert criterion.stats() == before
