"""`rgd_loss_func` against torch compositions, and the Hugging Face Trainer training with it."""

import dataclasses
import warnings

import pytest
import rgd
import torch
from rgd.integrations.transformers import rgd_loss_func
from torch import nn
from torch.nn import functional as F

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
        rgd_loss_func()({"start_logits": torch.zeros(2, 3)}, torch.zeros(2, dtype=torch.long))


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"labels must have the shape .* \(2, 5\), got \(2, 4\)"):
        rgd_loss_func()(TokenClassifierOutput(torch.zeros(2, 5, 3)), torch.zeros(2, 4, dtype=torch.long))


def test_float_labels_without_base_are_refused():
    with pytest.raises(ValueError, match="BCEWithLogitsLoss"):
        rgd_loss_func()(SequenceClassifierOutput(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"per": "word"}, ValueError),
        ({"tau": -1.0}, ValueError),
        ({"tau": 1.0, "weighting": rgd.KL()}, ValueError),
        ({"shift_labels": "yes"}, TypeError),
        ({"base": nn.MSELoss()}, ValueError),
    ],
    ids=str,
)
def test_bad_settings_are_refused_when_made(settings, error):
    with pytest.raises(error):
        rgd_loss_func(**settings)


# --- the Trainer ---


@pytest.fixture
def transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
        pytest.importorskip("transformers.trainer")
    module.utils.logging.set_verbosity_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small gain nothing from more
    yield module
    torch.set_num_threads(threads)


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def make_bert(transformers):
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def make_causal(transformers):
    config = transformers.GPT2Config(
        vocab_size=50,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=16,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def classification_rows(count=32):
    """The label is the first token modulo 3."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 50, (count, 8), generator=generator)
    return Rows([{"input_ids": row, "labels": row[0] % 3} for row in ids])


def causal_rows(count=32, length=10):
    """Token t + 1 follows token t; rows padded to unequal lengths."""
    rows = []
    for start in range(count):
        ids = (torch.arange(length) + start) % 49 + 1
        labels = ids.clone()
        labels[length - start % 5 :] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return Rows(rows)


def trained(transformers, model, rows, loss_func, **settings):
    defaults = {"max_steps": 4, "learning_rate": 1e-2, "optim": "sgd", "max_grad_norm": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the trainer's own dependencies warn of
        arguments = transformers.TrainingArguments(
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=0,
            **{**defaults, **settings},
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, compute_loss_func=loss_func)
        trainer.train()
    return trainer


TASKS = {
    "bert classifier": (make_bert, classification_rows),
    "causal language model": (make_causal, causal_rows),
}


@pytest.mark.parametrize(
    ("task", "per"),
    [
        ("bert classifier", "element"),
        ("causal language model", "element"),
        ("causal language model", "sample"),
    ],
)
def test_trainer_lowers_the_loss(transformers, tmp_path, task, per):
    make, rows = TASKS[task]
    loss_func = rgd_loss_func(per=per)
    seen = []

    def recorded(*args, **kwargs):
        loss = loss_func(*args, **kwargs)
        seen.append(loss_func.stats().mean_loss)
        return loss

    trained(
        transformers,
        make(transformers),
        rows(),
        recorded,
        output_dir=str(tmp_path),
        max_steps=24,
        per_device_train_batch_size=16,
        optim="adamw_torch",
    )
    assert len(seen) == 24
    assert sum(seen[-4:]) < 0.9 * sum(seen[:4])


# BERT's classifier ignores the number of items: its own loss is too large by the number of micro-batches.
@pytest.mark.parametrize(("task", "accumulate"), [("bert classifier", 1), ("causal language model", 2)])
def test_trainer_with_no_reweighting_equals_the_models_own_loss(transformers, tmp_path, task, accumulate):
    make, rows = TASKS[task]
    results = []
    for loss_func in (rgd_loss_func(weighting=rgd.KL(scale=0.0)), None):
        trainer = trained(
            transformers,
            make(transformers),
            rows(),
            loss_func,
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=accumulate,
        )
        results.append(list(trainer.model.parameters()))
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("task", "per"),
    [
        ("bert classifier", "element"),
        ("causal language model", "element"),
        ("causal language model", "sample"),
    ],
)
def test_trainer_accumulating_gradients_equals_the_large_batch(transformers, tmp_path, task, per):
    make, rows = TASKS[task]
    results = []
    for size, accumulate in ((8, 1), (2, 4)):
        trainer = trained(
            transformers,
            make(transformers),
            rows(),
            rgd_loss_func(per=per),
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
        )
        results.append(list(trainer.model.parameters()))
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_trainer_evaluates_with_the_same_loss(transformers, tmp_path):
    rows = classification_rows()
    loss_func = rgd_loss_func()
    trainer = trained(
        transformers,
        make_bert(transformers),
        rows,
        loss_func,
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_eval_batch_size=32,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reported = trainer.evaluate(rows)["eval_loss"]
    assert reported == pytest.approx(loss_func.stats().objective, rel=1e-5)
    assert reported > loss_func.stats().mean_loss
