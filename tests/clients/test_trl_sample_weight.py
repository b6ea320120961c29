"""A column `sample_weight` in TRL's trainers: a step is the formula over all its rows, however they are laid.

One step of gradient descent over the whole data set, in micro-batches, in float32: sums over 43 classes.
"""

import warnings

import pytest
import rgd
import torch
from tiny_models import CLASSES, KINDS, tiny
from torch.nn import functional as F
from weighted_rows import BY_TOKEN, IDS, LENGTHS, P

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what their own dependencies warn of
    trl = pytest.importorskip("trl", minversion="1.16")
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    from rgd.integrations.trl import RGDDPOTrainer, RGDRewardTrainer, RGDSFTTrainer

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
transformers.utils.logging.set_verbosity_error()

SFT, DPO = (RGDSFTTrainer, trl.SFTConfig), (RGDDPOTrainer, trl.DPOConfig)
REWARD = RGDRewardTrainer, trl.RewardConfig
RATE, TAU, EPS = 0.05, 4.0, torch.finfo(torch.float32).eps


def make_tokenizer():
    vocabulary = {f"w{i}": i for i in range(2, CLASSES)} | {"<pad>": 0, "<eos>": 1}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def texts(weights=None, **columns):
    columns = columns or {"input_ids": IDS}
    given = {} if weights is None else {"sample_weight": weights}
    return datasets.Dataset.from_dict({**columns, **given})


def pairs(weights=None):
    words = [" ".join(f"w{i}" for i in ids) for ids in IDS]
    half = [len(ids) // 2 for ids in IDS]
    columns = {
        "prompt": [" ".join(one.split()[:n]) for one, n in zip(words, half, strict=True)],
        "chosen": [" " + " ".join(one.split()[n:]) for one, n in zip(words, half, strict=True)],
        "rejected": [f" w{2 + i}" for i in range(len(IDS))],
    }
    return texts(weights, **columns)


def trained(kind, model, rows, tmp_path, config=None, **settings):
    trainer_class, config_class = kind
    arguments = config_class(
        **{
            "output_dir": str(tmp_path),
            "num_train_epochs": 1,
            "learning_rate": RATE,
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "logging_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": False,
            "seed": 0,
            **(config or {}),
        }
    )
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=rows, processing_class=make_tokenizer(), **settings
    )
    trainer.train()
    assert trainer.state.global_step == 1
    return trainer


def assert_stepped(model, before, expected):
    """The model has made a step down the gradient of what `expected` computes of it as it was."""
    gradients = torch.autograd.grad(expected, list(before.parameters()), allow_unused=True)
    moved = 0
    for p, q, found in zip(model.parameters(), before.parameters(), gradients, strict=True):
        gradient = torch.zeros_like(q) if found is None else found
        largest = max(float(gradient.abs().max()), 1.0)
        tolerance = EPS * (RATE * 64 * CLASSES * largest + 4 * float(q.abs().max()))
        torch.testing.assert_close(p, q - RATE * gradient, rtol=0, atol=tolerance)
        moved += bool(gradient.any())
    assert moved


def padded():
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in IDS], batch_first=True)
    mask = torch.tensor([[i < length for i in range(ids.shape[1])] for length in LENGTHS])
    return {"input_ids": ids, "attention_mask": mask.long()}, ids[:, 1:].masked_fill(~mask[:, 1:], -100)


def of_tokens(model, weights, per, first_counts=False):
    """The objective of a step over all texts, by the logits of padded rows.

    Where `first_counts`, the first label of a text is in the divisor, though nothing predicts it.
    """
    inputs, labels = padded()
    losses = F.cross_entropy(model(**inputs).logits[:, :-1].movedim(-1, 1), labels, reduction="none")
    kept = (labels != -100).float()
    p = torch.zeros_like(kept)
    for row, one in enumerate(weights):
        p[row, : LENGTHS[row] - 1] = torch.tensor(one[1:] if isinstance(one, list) else one)
    unit = losses.detach()
    if per == "sample":
        unit = unit.sum(1, keepdim=True) / kept.sum(1, keepdim=True)
    weight = torch.exp(unit.clamp(max=TAU) / (TAU + 1))
    first = sum(one[0] if isinstance(one, list) else one for one in weights) if first_counts else 0
    return (p * weight * losses).sum() / ((p * kept).sum() + first)


LAYOUTS = {
    "padded": {},
    "padding free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 16},
}


@pytest.mark.parametrize("linear", [False, True], ids=["fused head", "linear"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_fine_tuning_makes_the_step_of_the_weights(tmp_path, kind, layout, linear):
    settings = {"router_aux_loss_coef": 0.0} if kind == "Mixtral" else {}
    # The Trainer does not know that the loss of GPT-2 shifts labels, and counts those of padded rows so.
    counts = kind == "GPT2" and layout == "padded"
    for weights, per in ((P, "element"), (BY_TOKEN, "element"), (P, "sample")):
        model, before = (tiny(transformers, kind, **settings) for _ in range(2))
        trained(
            SFT, model, texts(weights), tmp_path, LAYOUTS[layout], tau=TAU, per=per,
            linear=linear,
        )  # fmt: skip
        assert_stepped(model, before, of_tokens(before, weights, per, counts))


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_preferences_make_the_step_of_the_weights(tmp_path, kind):
    model, before, reference = (tiny(transformers, kind) for _ in range(3))
    trainer = trained(DPO, model, pairs(P), tmp_path, {"beta": 0.5}, tau=TAU, ref_model=reference)
    names = ("prompt_ids", "chosen_ids", "rejected_ids", "sample_weight")
    rows = [{name: row[name] for name in names} for row in trainer.train_dataset]
    batch = trainer.data_collator(rows)
    assert batch["sample_weight"].tolist() == P
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = before(**inputs).logits[:, :-1].movedim(-1, 1)
    tokens = -F.cross_entropy(logits, batch["input_ids"][:, 1:], reduction="none")
    log_probs = (tokens * batch["completion_mask"][:, 1:]).sum(1)
    chosen, rejected = (log_probs - log_probs.detach()).chunk(2)  # the reference is the model
    losses, p = -F.logsigmoid(0.5 * (chosen - rejected)), torch.tensor(P)
    weight = torch.exp(losses.detach().clamp(max=TAU) / (TAU + 1))
    assert_stepped(model, before, (p * weight * losses).sum() / p.sum())


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_reward_models_make_the_step_of_the_weights(tmp_path, kind):
    model, before = (tiny(transformers, kind, "SequenceClassification", num_labels=1) for _ in range(2))
    trainer = trained(REWARD, model, pairs(P), tmp_path, tau=TAU)
    names = ("chosen_ids", "rejected_ids", "sample_weight")
    batch = trainer.data_collator([{name: row[name] for name in names} for row in trainer.train_dataset])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    chosen, rejected = before(**inputs).logits.squeeze(-1).chunk(2)
    losses, p = -F.logsigmoid(chosen - rejected), torch.tensor(P)
    weight = torch.exp(losses.detach().clamp(max=TAU) / (TAU + 1))
    assert weight.std() > 0
    assert_stepped(model, before, (p * weight * losses).sum() / p.sum())


@pytest.mark.parametrize("kind", ["tokens", "tokens in one pass", "pairs"])
def test_a_step_whose_rows_all_weigh_nothing_moves_nothing(tmp_path, kind):
    head = ("SequenceClassification", {"num_labels": 1}) if kind == "pairs" else ("CausalLM", {})
    model, before = (tiny(transformers, "GPT2", head[0], **head[1]) for _ in range(2))
    settings = {"linear": True} if kind == "tokens in one pass" else {}
    rows = pairs if kind == "pairs" else texts
    trained(REWARD if kind == "pairs" else SFT, model, rows([0.0] * len(P)), tmp_path, **settings)
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kind", ["tokens", "preferences", "preferences of a stored reference", "rewards"])
def test_an_evaluation_of_rows_of_no_weight_is_that_without_them(tmp_path, kind):
    head = ("SequenceClassification", {"num_labels": 1}) if kind == "rewards" else ("CausalLM", {})
    model, settings = tiny(transformers, "Llama", head[0], **head[1]), {}
    trainer, rows = {"tokens": (SFT, texts), "rewards": (REWARD, pairs)}.get(kind, (DPO, pairs))
    config = {"per_device_eval_batch_size": 8}
    if trainer is DPO:
        settings["ref_model"] = tiny(transformers, "Llama")
        config["precompute_ref_log_probs"] = kind.endswith("stored reference")
    made = trained(trainer, model, rows(P), tmp_path, config, **settings)
    ones = [float(p > 0) for p in P]
    kept = [i for i, p in enumerate(P) if p > 0]
    of_all = made.evaluate(rows(ones))["eval_loss"]
    assert of_all == pytest.approx(made.evaluate(rows().select(kept))["eval_loss"], rel=64 * CLASSES * EPS)
    assert of_all != pytest.approx(made.evaluate(rows())["eval_loss"], rel=1e-3)


OWN = {
    "padded": (SFT, trl.SFTTrainer, {}, texts),
    "packed": (SFT, trl.SFTTrainer, LAYOUTS["packed"], texts),
    "truncated": (SFT, trl.SFTTrainer, {"max_length": 5}, texts),
    "shuffled": (SFT, trl.SFTTrainer, {**LAYOUTS["packed"], "shuffle_dataset": True}, texts),
    "preferences": (DPO, trl.DPOTrainer, {}, pairs),
    "rewards": (REWARD, trl.RewardTrainer, {}, pairs),
}


@pytest.mark.parametrize("kind", OWN)
def test_weights_of_one_without_a_weighting_give_the_numbers_of_trl(tmp_path, kind):
    (mine, config_class), own, config, rows = OWN[kind]
    ones = [1] * len(P)
    if kind in ("packed", "truncated"):
        ones = [[1] * length for length in LENGTHS]
    head = ("SequenceClassification", {"num_labels": 1}) if kind == "rewards" else ("CausalLM", {})
    architecture = "GPT2" if kind == "rewards" else "Mixtral"
    config = {**config, "eval_strategy": "epoch", "per_device_eval_batch_size": 3}
    found = []
    for trainer_class, given in ((mine, rows(ones)), (own, rows())):
        settings = {"weighting": rgd.ERM()} if trainer_class is mine else {}
        settings["eval_dataset"] = given.select(range(6))
        settings |= {"ref_model": tiny(transformers, architecture)} if kind == "preferences" else {}
        model = tiny(transformers, architecture, head[0], **head[1])
        found.append(trained((trainer_class, config_class), model, given, tmp_path, config, **settings))
    for p, q in zip(found[0].model.parameters(), found[1].model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=16 * CLASSES * EPS)
    for a, b in zip(found[0].state.log_history, found[1].state.log_history, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"train_runtime", "train_samples_per_second", "train_steps_per_second"}:
            if not name.endswith(("runtime", "per_second")):
                # The Trainer rounds what it logs to at least four digits.
                assert a[name] == pytest.approx(b[name], rel=1e-3, abs=2e-4), name


@pytest.mark.parametrize("linear", [False, True], ids=["fused head", "linear"])
def test_evaluations_are_plain_means_by_the_weights(tmp_path, linear):
    model = tiny(transformers, "Llama")
    config = {"per_device_eval_batch_size": 8}
    trainer = trained(
        SFT, model, texts(P), tmp_path, config, tau=TAU, linear=linear,
        eval_dataset=texts(BY_TOKEN),
    )  # fmt: skip
    inputs, labels = padded()
    with torch.no_grad():
        losses = F.cross_entropy(model(**inputs).logits[:, :-1].movedim(-1, 1), labels, reduction="none")
    p = torch.zeros_like(losses)
    for row, one in enumerate(BY_TOKEN):
        p[row, : len(one) - 1] = torch.tensor(one[1:])
    expected = float((p * losses).sum() / p.sum())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=16 * CLASSES * EPS)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (texts([[1.0]] * 8), ValueError, r"sample_weight of a row has 1 entries, and its input_ids"),
        (texts([-1.0] * 8), ValueError, "finite numbers >= 0, got -1.0"),
        (texts([1.0] * 7 + [None]), ValueError, "has no sample_weight, and others have one"),
        (texts(BY_TOKEN, text=["w2 w3"] * 8), ValueError, "has no input_ids that they stand beside"),
    ],
    ids=["too few", "negative", "missing", "no tokens"],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, rows, error, message):
    with pytest.raises(error, match=message):
        trained(SFT, tiny(transformers, "GPT2"), rows, tmp_path)
