"""`RGDTrainer`: a column `sample_weight` and packed rows, in `rgd_loss_func` and `use_linear_rgd`.

One step of gradient descent over the whole data set, in micro-batches, in float64.
"""

import warnings

import pytest
import rgd
import torch
from tiny_models import KINDS, tiny
from torch.nn import functional as F
from weighted_rows import BY_TOKEN, IDS, LENGTHS, P

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what their own dependencies warn of
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers.trainer")
    from rgd.integrations.transformers import RGDTrainer, rgd_loss_func, use_linear_rgd

from rgd.integrations._sample_weight import WeightCollator
from rgd.torch import cross_entropy

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
transformers.utils.logging.set_verbosity_error()

RATE, TAU = 0.05, 4.0


class Rows(torch.utils.data.Dataset):
    def __init__(self, weights=None, count=None):
        self.rows = [{"input_ids": ids, "labels": ids} for ids in IDS[:count]]
        if weights is not None:
            self.rows = [{**row, "sample_weight": p} for row, p in zip(self.rows, weights, strict=True)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return dict(self.rows[index])


def pad(rows):
    """Rows padded at the right, and the mask that shows it."""
    tensors = [torch.tensor(row["input_ids"]) for row in rows]
    batch = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    mask = torch.tensor([[i < len(one) for i in range(batch.shape[1])] for one in tensors])
    return {"input_ids": batch, "labels": batch.masked_fill(~mask, -100), "attention_mask": mask.long()}


LAYOUTS = {"padded": lambda: pad, "flattened": transformers.DataCollatorWithFlattening}


def trained(model, rows, tmp_path, layout="padded", loss_func=None, **settings):
    defaults = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 1}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=RATE,
        optim="sgd",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=0,
        **{**defaults, **settings},
    )
    trainer = RGDTrainer(model, arguments, LAYOUTS[layout](), train_dataset=rows, compute_loss_func=loss_func)
    trainer.train()
    return trainer


def losses_of(model):
    """The loss of each token by the logits of padded rows, and where it counts."""
    inputs = pad(Rows().rows)
    labels = inputs.pop("labels")[:, 1:]
    losses = F.cross_entropy(model(**inputs).logits[:, :-1].movedim(-1, 1), labels, reduction="none")
    return losses, (labels != -100).double()


def measure(weights, like):
    p = torch.zeros_like(like)
    for row, one in enumerate(weights):
        p[row, : LENGTHS[row] - 1] = torch.tensor(one[1:] if isinstance(one, list) else one)
    return p


def objective_of(model, trainer, weights, per, layout):
    losses, kept = losses_of(model)
    p, unit = measure(weights, kept), losses.detach()
    if per == "sample":
        unit = unit.sum(1, keepdim=True) / kept.sum(1, keepdim=True)
    weight = torch.exp(unit.clamp(max=TAU) / (TAU + 1))
    divisor = (p * kept).sum()
    if layout == "padded" and not getattr(trainer, "_loss_shifts_labels", False):
        # A Trainer that does not know that the loss of a model shifts labels counts the first of a row too.
        divisor = divisor + sum(one[0] if isinstance(one, list) else one for one in weights)
    return (p * weight * losses).sum() / divisor


def assert_stepped(model, before, expected):
    gradients = torch.autograd.grad(expected, list(before.parameters()), allow_unused=True)
    for p, q, found in zip(model.parameters(), before.parameters(), gradients, strict=True):
        gradient = torch.zeros_like(q) if found is None else found
        # Norms compute in float32 in any model, and round what differs in the last bit of float64.
        tolerance = RATE * 16 * torch.finfo(torch.float32).eps * max(float(gradient.abs().max()), 1.0)
        torch.testing.assert_close(p, q - RATE * gradient, rtol=0, atol=tolerance)


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_makes_the_step_of_the_weights(tmp_path, kind, layout, linear):
    for weights, per in ((P, "element"), (BY_TOKEN, "element"), (P, "sample")):
        model, before = (tiny(transformers, kind, dtype=torch.float64) for _ in range(2))
        if linear:
            with use_linear_rgd(model, tau=TAU, per=per):
                trainer = trained(model, Rows(weights), tmp_path, layout)
        else:
            trainer = trained(model, Rows(weights), tmp_path, layout, rgd_loss_func(tau=TAU, per=per))
        assert_stepped(model, before, objective_of(before, trainer, weights, per, layout))


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_packed_rows_have_a_weight_for_each_sequence_without_a_column(tmp_path, linear):
    model, before = (tiny(transformers, "Llama", dtype=torch.float64) for _ in range(2))
    loss_func = None if linear else rgd_loss_func(tau=TAU, per="sample")
    handle = use_linear_rgd(model, tau=TAU, per="sample") if linear else loss_func
    trainer = trained(model, Rows(), tmp_path, "flattened", loss_func)
    assert handle.stats().count == 2
    assert_stepped(model, before, objective_of(before, trainer, [1.0] * 8, "sample", "flattened"))


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_weights_of_one_are_no_weights(tmp_path, linear):
    found = []
    for weights in ([1] * 8, None):
        model = tiny(transformers, "Mixtral", dtype=torch.float64, output_router_logits=True)
        loss_func = None if linear else rgd_loss_func(tau=TAU, aux_loss_coef=0.5)
        if linear:
            use_linear_rgd(model, tau=TAU)
        trainer = trained(model, Rows(weights), tmp_path, loss_func=loss_func, per_device_eval_batch_size=4)
        found.append((model, trainer.evaluate(Rows(weights))["eval_loss"]))
    for p, q in zip(found[0][0].parameters(), found[1][0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    # The model's own loss is float32: a mean of 38 of them.
    assert found[0][1] == pytest.approx(found[1][1], rel=38 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_evaluations_are_plain_means_by_the_weights(tmp_path, linear):
    model = tiny(transformers, "Llama", dtype=torch.float64)
    loss_func = None if linear else rgd_loss_func(tau=TAU)
    if linear:
        use_linear_rgd(model, tau=TAU)
    settings = {"loss_func": loss_func, "per_device_eval_batch_size": 8}
    trainer = trained(model, Rows(P), tmp_path, **settings)
    for weights in (P, BY_TOKEN):
        with torch.no_grad():
            losses, kept = losses_of(model)
        p = measure(weights, kept)
        expected = float((p * losses).sum() / (p * kept).sum())
        result = trainer.predict(Rows(weights))
        assert result.metrics["test_loss"] == pytest.approx(expected, rel=1e-5)  # the model's own is float32
        assert result.predictions.shape[0] == 8  # logits are there


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_a_step_whose_rows_all_weigh_nothing_moves_nothing(tmp_path, linear):
    model, before = (tiny(transformers, "Llama") for _ in range(2))
    if linear:
        use_linear_rgd(model, tau=TAU)
    trained(model, Rows([0.0] * 8), tmp_path, loss_func=None if linear else rgd_loss_func(tau=TAU))
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_loss_that_would_not_hear_the_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="would not hear it"):
        trained(tiny(transformers, "Llama"), Rows(P), tmp_path)
    trained(tiny(transformers, "Llama"), Rows(), tmp_path)  # without them it is a Trainer


def test_calls_of_a_patched_model_take_weights():
    model = tiny(transformers, "Llama", dtype=torch.float64)
    inputs = pad(Rows().rows)
    logits = model(**inputs).logits[:, :-1].movedim(-1, 1)
    p = torch.tensor(P).double()
    expected = cross_entropy(logits, inputs["labels"][:, 1:], tau=TAU, sample_weight=p)
    with use_linear_rgd(model, tau=TAU):
        for weight in (p, p.unsqueeze(1).expand(inputs["labels"].shape)):
            loss = model(**inputs, sample_weight=weight).loss
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        halved = model(**inputs, sample_weight=p, num_items_in_batch=76.5).loss
        kept = (inputs["labels"][:, 1:] != -100).sum(1)
        torch.testing.assert_close(halved, expected * float((p * kept).sum()) / 76.5, rtol=1e-12, atol=0)
        for items in (38, torch.tensor(38), torch.tensor(38.0)):
            with pytest.raises(TypeError, match="num_items_in_batch counts labels"):
                model(**inputs, sample_weight=p, num_items_in_batch=items)
        with pytest.raises(TypeError, match="this call has none"):
            model(input_ids=inputs["input_ids"], sample_weight=p)


def test_weights_by_token_within_a_sequence_of_one_weight_are_refused():
    model, inputs = tiny(transformers, "Llama"), pad(Rows().rows)
    weight = torch.zeros(inputs["labels"].shape)
    for row, one in enumerate(BY_TOKEN):
        weight[row, : len(one)] = torch.tensor(one)
    with use_linear_rgd(model, per="sample"), pytest.raises(ValueError, match="constant within a segment"):
        model(**inputs, sample_weight=weight)


def left(rows):
    batch = pad(rows)
    for row, mask in enumerate(batch["attention_mask"]):
        for tensor in batch.values():
            if tensor is not batch["attention_mask"]:
                tensor[row] = tensor[row].roll(int((mask == 0).sum()))
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    return batch


def test_a_collator_lays_weights_as_it_lays_labels():
    rows = Rows(BY_TOKEN[:3], 3).rows
    wanted = torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in BY_TOKEN[:3]], batch_first=True)
    assert torch.equal(WeightCollator(pad)(rows)["sample_weight"], wanted)
    found = WeightCollator(left)(rows)
    assert torch.equal(found["sample_weight"] != 0, (found["labels"] != -100) & (wanted.sum(1) > 0)[:, None])
    assert torch.equal(found["sample_weight"].sum(1), wanted.sum(1))
    flat = WeightCollator(transformers.DataCollatorWithFlattening())(rows)
    assert flat["sample_weight"].tolist() == [[*BY_TOKEN[0], *BY_TOKEN[1], *BY_TOKEN[2]]]
    by_row = Rows(P[:3], 3).rows
    assert WeightCollator(pad)(by_row)["sample_weight"].tolist() == P[:3]
    flat = WeightCollator(transformers.DataCollatorWithFlattening())(by_row)
    assert flat["sample_weight"].tolist() == [[1.0] * 4 + [0.25] * 9 + [0.0] * 6]
    assert "sample_weight" not in WeightCollator(pad)(Rows(count=3).rows)
    assert "sample_weight" in rows[0]  # what the data set holds is left as it was


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([1.0, None], ValueError, "row 1 of a batch has no sample_weight"),
        ([1.0, -1.0], ValueError, "finite numbers >= 0, got -1.0"),
        ([1.0, float("nan")], ValueError, "finite numbers >= 0, got nan"),
        ([1.0, "much"], TypeError, "must be a number, or one a token beside input_ids, got 'much'"),
        ([1.0, [1.0] * 8], ValueError, "of row 1 of a batch has 8 entries, and its input_ids 9"),
        ([1.0, [[1.0] * 9]], ValueError, r"got shape \(1, 9\)"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_are_refused(weights, error, message):
    with pytest.raises(error, match=message):
        WeightCollator(pad)(Rows(weights, 2).rows)


def test_a_collator_that_cuts_rows_is_refused():
    def cut(rows):
        return {name: tensor[:, :3] for name, tensor in pad(rows).items()}

    with pytest.raises(ValueError, match="truncate rows in the data set, not in the collator"):
        WeightCollator(cut)(Rows(BY_TOKEN).rows)


def test_the_members_that_need_a_batch_weigh_by_the_measure(tmp_path):
    model, before = (tiny(transformers, "GPT2", dtype=torch.float64) for _ in range(2))
    weighting = rgd.CVaR(0.5)
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    trained(model, Rows(P), tmp_path, "flattened", rgd_loss_func(weighting, per="sample"), **settings)
    inputs = pad(Rows().rows)
    labels = inputs.pop("labels")[:, 1:]
    logits = before(**inputs).logits[:, :-1].movedim(-1, 1)
    options = {"weighting": weighting, "per": "sample", "sample_weight": torch.tensor(P)}
    assert_stepped(model, before, cross_entropy(logits, labels, **options))
