"""`rgd_loss_func` against torch compositions."""

import copy
import dataclasses
import math

import pytest
import rgd
import torch
from rgd import reference
from rgd.integrations.transformers import RGDStatsCallback, rgd_loss_func
from rgd.torch import RGDLoss, WeightingSchedule
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CLASSES = 7


@dataclasses.dataclass
class CausalLMOutputWithPast:
    logits: torch.Tensor


@dataclasses.dataclass
class TokenClassifierOutput:
    logits: torch.Tensor


@dataclasses.dataclass
class SequenceClassifierOutput:
    logits: torch.Tensor


@dataclasses.dataclass
class UnheardOfOutput:
    logits: torch.Tensor


@dataclasses.dataclass
class MoeCausalLMOutputWithPast:
    logits: torch.Tensor
    aux_loss: torch.Tensor | None = None


@dataclasses.dataclass
class Seq2SeqMoEOutput:
    logits: torch.Tensor
    encoder_z_loss: torch.Tensor | None = None
    decoder_aux_loss: torch.Tensor | None = None


def tokens(rows=4, length=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(rows, length, CLASSES, generator=generator, dtype=dtype) * 2
    labels = torch.randint(CLASSES, (rows, length), generator=generator)
    for row in range(rows):
        labels[row, length - row :] = -100  # rows of unequal length
    return logits.requires_grad_(), labels


def composed(logits, labels, per="element", tau=1.0, items=None):
    """`sum_i w_i l_i / items` from torch operations, for logits (N, T, C) and labels (N, T)."""
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    kept = labels != -100
    unit = losses.detach()
    if per == "sample":
        unit = (unit.sum(1) / kept.sum(1).clamp(min=1)).unsqueeze(1)
    weights = torch.exp(unit.clamp(max=tau) / (tau + 1))
    return (weights * losses).sum() / (kept.sum() if items is None else items)


def assert_same(loss, expected, logits):
    (mine,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("items", [None, 40, torch.tensor(40)], ids=["no count", "int", "tensor"])
@pytest.mark.parametrize("per", ["element", "sample"])
def test_token_classification_sums_over_labels_kept_and_divides_by_the_number_of_items(per, items):
    logits, labels = tokens()
    loss = rgd_loss_func(per=per)(TokenClassifierOutput(logits), labels, num_items_in_batch=items)
    assert_same(loss, composed(logits, labels, per, items=items), logits)


@pytest.mark.parametrize("per", ["element", "sample"])
def test_labels_of_a_causal_language_model_are_shifted(per):
    logits, labels = tokens()
    loss = rgd_loss_func(per=per)(CausalLMOutputWithPast(logits), labels, num_items_in_batch=40)
    assert_same(loss, composed(logits[:, :-1], labels[:, 1:], per, items=40), logits)


@pytest.mark.parametrize("per", ["element", "sample"])
def test_one_label_a_row_is_plain_classification(per):
    logits, labels = (
        torch.randn(9, CLASSES, requires_grad=True, dtype=torch.float64),
        torch.arange(9) % CLASSES,
    )
    loss = rgd_loss_func(per=per)(SequenceClassifierOutput(logits), labels)
    assert_same(loss, rgd.torch.cross_entropy(logits, labels), logits)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_labels_of_a_dtype_without_the_ignored_index_are_shifted(dtype):
    logits, labels = tokens()
    outputs, labels = CausalLMOutputWithPast(logits), labels.clamp(min=0)
    assert rgd_loss_func()(outputs, labels.to(dtype)) == rgd_loss_func()(outputs, labels)


def test_shift_labels_overrules_the_outputs_name():
    logits, labels = tokens()
    shifted = rgd_loss_func(shift_labels=True)(UnheardOfOutput(logits), labels)
    assert_same(shifted, composed(logits[:, :-1], labels[:, 1:]), logits)
    aligned = rgd_loss_func(shift_labels=False)(CausalLMOutputWithPast(logits), labels)
    assert_same(aligned, composed(logits, labels), logits)


@pytest.mark.parametrize("wrap", [lambda x: {"logits": x}, lambda x: (x, None)], ids=["dict", "tuple"])
def test_dicts_and_tuples_of_outputs_are_read(wrap):
    logits, labels = tokens()
    loss = rgd_loss_func(shift_labels=False)(wrap(logits), labels)
    assert_same(loss, composed(logits, labels), logits)


def test_pointwise_weights_make_accumulation_exact():
    logits, labels = tokens()
    items = (labels != -100).sum()
    loss_func = rgd_loss_func()
    whole = loss_func(TokenClassifierOutput(logits), labels, num_items_in_batch=items)
    parts = sum(
        loss_func(TokenClassifierOutput(some_logits), some_labels, num_items_in_batch=items)
        for some_logits, some_labels in zip(logits.split(1), labels.split(1), strict=True)
    )
    assert_same(parts, whole, logits)


def test_half_precision_logits_give_a_float32_loss():
    logits, labels = tokens(dtype=torch.float32)
    half = logits.detach().bfloat16().requires_grad_()
    loss = rgd_loss_func()(TokenClassifierOutput(half), labels, num_items_in_batch=40)
    assert loss.dtype is torch.float32
    expected = composed(half.float(), labels, items=40)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    assert half.grad.dtype is torch.bfloat16


def test_settings_reach_the_loss():
    logits, labels = tokens()
    weight = torch.linspace(0.5, 2.0, CLASSES, dtype=torch.float64)
    loss_func = rgd_loss_func(
        weighting=rgd.KL(2.0, normalize=True), weight=weight, label_smoothing=0.1, shift_labels=False
    )
    expected = rgd.torch.cross_entropy(
        logits.flatten(0, 1),
        labels.flatten(),
        weight,
        label_smoothing=0.1,
        weighting=rgd.KL(2.0, normalize=True),
    )
    assert_same(loss_func((logits,), labels), expected, logits)


def test_several_labels_a_row_are_trained_through_base():
    logits = torch.randn(5, 3, requires_grad=True, dtype=torch.float64)
    labels = (torch.rand(5, 3) > 0.5).double()
    loss = rgd_loss_func(base=nn.BCEWithLogitsLoss(reduction="none"))(
        SequenceClassifierOutput(logits), labels
    )
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    assert_same(loss, rgd.torch.reweighted_mean(losses), logits)


def test_stats_describe_the_last_call_over_labels_kept():
    logits, labels = tokens()
    loss_func = rgd_loss_func()
    plain = F.cross_entropy(logits.transpose(1, 2), labels)
    for items in (None, 40):
        loss_func(TokenClassifierOutput(logits), labels, num_items_in_batch=items)
        assert loss_func.stats().count == int((labels != -100).sum())
    loss_func(TokenClassifierOutput(logits), labels)
    assert loss_func.stats().mean_loss == pytest.approx(plain.item(), rel=1e-12)


# --- weightings ---


def test_the_weighting_comes_first_and_tau_is_its_short_form():
    logits, labels = tokens()
    outputs = TokenClassifierOutput(logits)
    assert rgd_loss_func(rgd.CVaR(0.3)).weighting == rgd.CVaR(0.3)
    assert rgd_loss_func(tau=2.0).weighting == rgd.KL(2.0)
    first, named = rgd_loss_func(rgd.KL(2.0)), rgd_loss_func(weighting=rgd.KL(2.0))
    assert torch.equal(first(outputs, labels), named(outputs, labels))
    with pytest.raises(TypeError, match="did you mean tau="):
        rgd_loss_func(2.0)


@pytest.mark.parametrize("per", ["element", "sample"])
@pytest.mark.parametrize(
    "weighting", [rgd.KL(scale=-0.7), rgd.CVaR(0.3), rgd.KLBall(0.2), rgd.Trimmed(rgd.ERM(), 0.25)], ids=str
)
def test_any_weighting_weighs_labels_or_rows(weighting, per):
    logits, labels = tokens()
    labels[1] = -100  # a row without labels
    arrays = logits.detach().movedim(-1, 1).numpy(), labels.numpy()
    settings = {"weighting": weighting, "per": per, "reduction": "sum"}
    expected = reference.cross_entropy(*arrays, **settings)
    gradient = reference.cross_entropy_grad(*arrays, **settings)
    loss = rgd_loss_func(weighting, per=per)(TokenClassifierOutput(logits), labels, num_items_in_batch=40)
    loss.backward()
    # 24 labels; the ball's root is known to 1e-10.
    relative = 1e-9 if isinstance(weighting, rgd.KLBall) else 1e-12
    assert loss.item() == pytest.approx(expected / 40, rel=relative)
    torch.testing.assert_close(
        logits.grad, torch.tensor(gradient).movedim(1, -1) / 40, rtol=relative, atol=relative
    )


@pytest.mark.parametrize("per", ["element", "sample"])
def test_one_state_is_kept_whether_or_not_the_number_of_items_is_given(per):
    weighting = rgd.MovingAverage(rgd.KL(2.0), 0.7)
    loss_func = rgd_loss_func(weighting, per=per)
    logits, labels = tokens()
    state, count = weighting.init(), (labels != -100).sum()
    for step, items in enumerate([None, 40, torch.tensor(50), None]):
        scaled = logits.detach() * (1 + step)
        loss = loss_func(TokenClassifierOutput(scaled), labels, num_items_in_batch=items)
        expected, state = reference.cross_entropy(
            scaled.movedim(-1, 1).numpy(),
            labels.numpy(),
            weighting=weighting,
            per=per,
            reduction="sum",
            state=state,
        )
        assert loss.item() == pytest.approx(expected / float(count if items is None else items), rel=1e-12)
    # A copy has one state too, of its own.
    other = copy.deepcopy(loss_func)
    outputs = TokenClassifierOutput(logits.detach())
    for items in (None, 40):
        mine = loss_func(outputs, labels, num_items_in_batch=items)
        assert torch.equal(other(outputs, labels, num_items_in_batch=items), mine)


def test_a_schedule_sets_the_weighting_of_the_function_and_keeps_its_state():
    def warming_up(step):
        return rgd.MovingAverage(rgd.KL(math.inf, scale=0.1 * step), 0.7)

    loss_func = rgd_loss_func(warming_up(0))
    criterion = RGDLoss(weighting=warming_up(0))
    schedules = [WeightingSchedule(target, warming_up) for target in (loss_func, criterion)]
    logits, labels = tokens()
    outputs, count = TokenClassifierOutput(logits), (labels != -100).sum()
    for step, items in enumerate([None, count, None, count]):
        assert loss_func.weighting == warming_up(step)
        expected = criterion(logits.flatten(0, 1), labels.flatten())
        loss = loss_func(outputs, labels, num_items_in_batch=items)
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
        for schedule in schedules:
            schedule.step()
    loss_func.weighting = rgd.KL(1.0)
    for items in (None, 40):
        loss = loss_func(outputs, labels, num_items_in_batch=items)
        torch.testing.assert_close(loss, composed(logits, labels, items=items), rtol=1e-12, atol=0)


def test_a_stateful_weighting_that_is_set_later_has_one_state():
    loss_func = rgd_loss_func(tau=1.0)
    weighting = rgd.MovingAverage(rgd.KL(2.0), 0.7)
    loss_func.weighting = weighting
    logits, labels = tokens()
    state, count = weighting.init(), (labels != -100).sum()
    for step, items in enumerate([None, 40, None, 40]):
        scaled = logits.detach() * (1 + step)
        loss = loss_func(TokenClassifierOutput(scaled), labels, num_items_in_batch=items)
        expected, state = reference.cross_entropy(
            scaled.movedim(-1, 1).numpy(),
            labels.numpy(),
            weighting=weighting,
            reduction="sum",
            state=state,
        )
        assert loss.item() == pytest.approx(expected / float(count if items is None else items), rel=1e-12)
    assert int(loss_func.criterion.weighting_state.updates) == 4


# --- mixtures of experts ---


@pytest.mark.parametrize("wrap", [MoeCausalLMOutputWithPast, lambda x, aux: {"logits": x, "aux_loss": aux}])
@pytest.mark.parametrize("items", [None, 40])
@pytest.mark.parametrize("trains", [True, False])
def test_the_auxiliary_loss_is_added_neither_weighted_nor_divided(wrap, items, trains):
    logits, labels = tokens()
    auxiliary = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    settings = {"shift_labels": False}
    with torch.set_grad_enabled(trains):
        alone = rgd_loss_func(**settings)((logits,), labels, num_items_in_batch=items)
        loss = rgd_loss_func(aux_loss_coef=0.25, **settings)(wrap(logits, auxiliary), labels, items)
        without = rgd_loss_func(aux_loss_coef=0, **settings)(wrap(logits, auxiliary), labels, items)
    torch.testing.assert_close(loss, alone + 0.75, rtol=1e-15, atol=0)
    assert torch.equal(without, alone)
    if trains:
        loss.backward()
        assert auxiliary.grad == 0.25


def test_an_auxiliary_loss_without_a_coefficient_is_refused():
    logits, labels = tokens()
    outputs = MoeCausalLMOutputWithPast(logits, torch.tensor(3.0))
    with pytest.raises(ValueError, match=r"aux_loss_coef=model\.config\.router_aux_loss_coef"):
        rgd_loss_func()(outputs, labels)
    with torch.no_grad(), pytest.raises(ValueError, match=r"model\.config\.router_aux_loss_coef"):
        rgd_loss_func()(outputs, labels)
    rgd_loss_func()(MoeCausalLMOutputWithPast(logits), labels)  # no router logits were asked for


def test_a_coefficient_without_an_auxiliary_loss_is_refused():
    logits, labels = tokens()
    with pytest.raises(ValueError, match="output_router_logits = True"):
        rgd_loss_func(aux_loss_coef=0.1)(CausalLMOutputWithPast(logits), labels)


@pytest.mark.parametrize("name", ["encoder_z_loss", "decoder_aux_loss"])
def test_router_losses_of_encoder_and_decoder_are_refused(name):
    logits, labels = tokens()
    outputs = Seq2SeqMoEOutput(logits, **{name: torch.tensor(3.0)})
    with pytest.raises(ValueError, match=f"hold {name}.*output_router_logits = False"):
        rgd_loss_func(shift_labels=False, aux_loss_coef=0.1)(outputs, labels)
    rgd_loss_func(shift_labels=False)(Seq2SeqMoEOutput(logits), labels)


# --- packed rows ---


def packed(*texts):
    """Labels as `DataCollatorWithFlattening` makes them: texts in one row, the first label of each masked."""
    return torch.tensor([[label for text in texts for label in (-100, *text[1:])]])


@pytest.mark.parametrize("trains", [True, False])
def test_by_sample_a_row_of_several_texts_is_refused_in_training(trains):
    labels = packed([1, 2, 3], [4, 5], [6, 0, 1])
    outputs = CausalLMOutputWithPast(torch.zeros(1, 8, CLASSES, dtype=torch.float64))
    with torch.set_grad_enabled(trains):
        plain = rgd_loss_func(weighting=rgd.ERM())(outputs, labels)
        loss_func = rgd_loss_func(per="sample")
        if trains:
            with pytest.raises(ValueError, match=r'DataCollatorWithFlattening.*use per="element"'):
                loss_func(outputs, labels)
        else:
            assert torch.equal(loss_func(outputs, labels), plain)


@pytest.mark.parametrize(
    "labels",
    [
        packed([1, 2, 3, 4, 5, 6, 0, 1]),  # one text
        packed([1, 2, 3], [4, 5], [6, 0, 1]).expand(2, -1),  # rows of their own
        torch.tensor([[-100, -100, 2, 3, -100, -100, 4, 5]]),  # two turns of a conversation
        torch.tensor([[1, 2, 3, -100, 4, 5, -100, -100]]),
    ],
    ids=str,
)
def test_by_sample_other_rows_are_weighed(labels):
    logits = torch.randn(*labels.shape, CLASSES, dtype=torch.float64, requires_grad=True)
    loss = rgd_loss_func(per="sample")(TokenClassifierOutput(logits), labels)
    assert_same(loss, composed(logits, labels, "sample"), logits)


# --- kinds of problems ---


@pytest.mark.parametrize("labels_shape", [(6,), (6, 1)], ids=str)
def test_regression_fits_one_logit_a_row_to_one_label(labels_shape):
    logits = torch.linspace(-2, 2, 6, dtype=torch.float64).unsqueeze(1).requires_grad_()
    labels = torch.linspace(1, -1, 6, dtype=torch.float64).square()
    for settings in ({"problem_type": "regression"}, {"base": nn.MSELoss(reduction="none")}):
        loss = rgd_loss_func(**settings)(SequenceClassifierOutput(logits), labels.view(labels_shape))
        expected = rgd.torch.reweighted_mean((logits.squeeze(1) - labels).square())
        assert_same(loss, expected, logits)


def test_regression_takes_several_numbers_a_row():
    logits = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.randn(6, 2, dtype=torch.float64)
    loss = rgd_loss_func(problem_type="regression")(SequenceClassifierOutput(logits), labels)
    assert_same(loss, rgd.torch.reweighted_mean((logits - labels).square()), logits)


def test_multi_label_classification_is_binary_cross_entropy():
    logits = torch.randn(5, 3, requires_grad=True, dtype=torch.float64)
    labels = (torch.rand(5, 3) > 0.5).double()
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    loss_func = rgd_loss_func(problem_type="multi_label_classification")
    assert_same(
        loss_func(SequenceClassifierOutput(logits), labels), rgd.torch.reweighted_mean(losses), logits
    )


def test_single_label_classification_is_cross_entropy():
    logits, labels = torch.randn(9, 3, requires_grad=True, dtype=torch.float64), torch.arange(9) % 3
    loss = rgd_loss_func(problem_type="single_label_classification")(SequenceClassifierOutput(logits), labels)
    assert_same(loss, rgd.torch.cross_entropy(logits, labels), logits)


@pytest.mark.parametrize("labels_shape", [(3,), (6,), (1, 3), (6, 1)], ids=str)
def test_labels_that_torchs_losses_would_broadcast_are_refused(labels_shape):
    loss_func = rgd_loss_func(base=nn.L1Loss(reduction="none"))
    with pytest.raises(ValueError, match="labels must have the shape of the logits"):
        loss_func(SequenceClassifierOutput(torch.randn(6, 3)), torch.randn(labels_shape))


def test_a_base_that_broadcasts_logits_against_labels_is_refused():
    loss_func = rgd_loss_func(base=lambda logits, labels: (logits - labels).abs())
    with pytest.raises(ValueError, match="one was broadcast against the other"):
        loss_func(SequenceClassifierOutput(torch.randn(6, 1)), torch.randn(1, 5))


def test_a_base_with_class_indices_is_left_alone():
    logits, labels = torch.randn(9, 3, requires_grad=True, dtype=torch.float64), torch.arange(9) % 3
    loss = rgd_loss_func(base=nn.CrossEntropyLoss(reduction="none"))(SequenceClassifierOutput(logits), labels)
    assert_same(loss, rgd.torch.cross_entropy(logits, labels), logits)


# --- evaluation ---


@pytest.mark.parametrize("items", [None, 40])
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_loss_is_plain_and_leaves_nothing_behind(items, off):
    logits, labels = tokens()
    outputs = TokenClassifierOutput(logits)
    loss_func = rgd_loss_func(rgd.MovingAverage(rgd.KL(2.0), 0.7))
    loss_func(outputs, labels)
    before, again = loss_func.stats(), copy.deepcopy(loss_func)
    other = TokenClassifierOutput(2 * logits)
    with off():
        loss = loss_func(other, labels, num_items_in_batch=items)
    plain = F.cross_entropy(2 * logits.transpose(1, 2), labels, reduction="sum").detach()
    torch.testing.assert_close(loss, plain / (items or (labels != -100).sum()), rtol=1e-12, atol=0)
    assert loss_func.stats() == before
    assert torch.equal(loss_func(other, labels), again(other, labels))


def test_evaluate_weighted_keeps_the_weights_and_moves_no_state():
    logits, labels = tokens()
    outputs = TokenClassifierOutput(logits)
    with torch.no_grad():
        loss = rgd_loss_func(evaluate="weighted")(outputs, labels)
    torch.testing.assert_close(loss, composed(logits, labels).detach(), rtol=1e-12, atol=0)
    loss_func = rgd_loss_func(rgd.MovingAverage(rgd.KL(2.0), 0.7), evaluate="weighted")
    loss_func(outputs, labels)
    again = copy.deepcopy(loss_func)
    with torch.no_grad():
        loss_func(TokenClassifierOutput(2 * logits), labels)
    assert torch.equal(loss_func(outputs, labels), again(outputs, labels))


def test_the_first_pass_of_a_reentrant_checkpoint_is_training():
    logits, labels = tokens()
    loss_func = rgd_loss_func(tau=2.0)

    def loss(logits):
        return loss_func(TokenClassifierOutput(logits), labels)

    repeated = checkpoint(loss, logits, use_reentrant=True)
    torch.testing.assert_close(repeated, composed(logits, labels, tau=2.0), rtol=1e-12, atol=0)


def test_repr_names_the_weighting():
    assert "tau=2.0" in repr(rgd_loss_func(tau=2.0))


# --- bad input ---


def test_outputs_that_do_not_tell_about_the_shift_are_refused():
    logits, labels = tokens()
    with pytest.raises(ValueError, match=r"UnheardOfOutput do not tell.*shift_labels=True"):
        rgd_loss_func()(UnheardOfOutput(logits), labels)


def test_missing_labels_are_refused():
    with pytest.raises(ValueError, match="labels is None"):
        rgd_loss_func()(UnheardOfOutput(torch.zeros(2, 3)), None)


def test_outputs_without_logits_are_refused():
    with pytest.raises(ValueError, match="hold no logits"):
        rgd_loss_func()({"hidden": torch.zeros(2, 3)}, torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("labels", [None, torch.zeros(2, dtype=torch.long)], ids=["without labels", "labels"])
def test_question_answering_is_refused_with_what_to_write(labels):
    with pytest.raises(ValueError, match=r"question answering.*Subclass the Trainer.*start_positions"):
        rgd_loss_func()({"start_logits": torch.zeros(2, 3)}, labels)


def test_the_function_that_makes_the_loss_is_refused_as_the_loss():
    logits, labels = tokens()
    with pytest.raises(TypeError, match=r"compute_loss_func=rgd_loss_func\(\)"):
        rgd_loss_func(TokenClassifierOutput(logits), labels, num_items_in_batch=None)


def test_a_callback_without_the_loss_it_describes_is_refused():
    for wrong in (rgd_loss_func, RGDLoss, "rgd"):
        with pytest.raises(TypeError, match="loss_func must be what rgd_loss_func"):
            RGDStatsCallback(wrong)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"labels must have the shape .* \(2, 5\), got \(2, 4\)"):
        rgd_loss_func()(TokenClassifierOutput(torch.zeros(2, 5, 3)), torch.zeros(2, 4, dtype=torch.long))


def test_float_labels_without_base_are_refused():
    with pytest.raises(ValueError, match="multi_label_classification"):
        rgd_loss_func()(SequenceClassifierOutput(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"per": "word"}, ValueError),
        ({"tau": -1.0}, ValueError),
        ({"tau": 1.0, "weighting": rgd.KL()}, ValueError),
        ({"shift_labels": "yes"}, TypeError),
        ({"base": nn.MSELoss()}, ValueError),
        ({"problem_type": "ranking"}, ValueError),
        ({"problem_type": "regression", "base": nn.MSELoss(reduction="none")}, ValueError),
        ({"problem_type": "regression", "label_smoothing": 0.1}, ValueError),
        ({"evaluate": "never"}, ValueError),
        ({"aux_loss_coef": -0.1}, ValueError),
        ({"aux_loss_coef": math.nan}, ValueError),
        ({"aux_loss_coef": "0.1"}, TypeError),
        ({"aux_loss_coef": True}, TypeError),
    ],
    ids=str,
)
def test_bad_settings_are_refused_when_made(settings, error):
    with pytest.raises(error):
        rgd_loss_func(**settings)
