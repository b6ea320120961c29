"""Wrong inputs of the torch front: each is refused before anything happens, in words that name the mend."""

import pytest
import rgd
import torch
from rgd.torch import RGDLoss, cross_entropy, reweighted_mean, sample_weights
from torch import nn

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
    with pytest.raises(IndexError, match="target -1"):
        cross_entropy(logits, target)


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
