"""The Hugging Face Trainer, training with `rgd_loss_func`."""

import warnings

import pytest
import rgd
import torch
from rgd.integrations.transformers import RGDStatsCallback, rgd_loss_func
from torch.nn import functional as F


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


def make_mixture(transformers):
    config = transformers.MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.3,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(config)


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


def trained(  # noqa: PLR0917
    transformers, model, rows, loss_func, callbacks=(), data_collator=None, trains=True, **settings
):
    defaults = {"max_steps": 4, "learning_rate": 1e-2, "optim": "sgd", "max_grad_norm": 0.0}
    defaults |= {"logging_strategy": "no", "report_to": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the trainer's own dependencies warn of
        arguments = transformers.TrainingArguments(
            lr_scheduler_type="constant",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=0,
            **{**defaults, **settings},
        )
        trainer = transformers.Trainer(
            model,
            arguments,
            data_collator,
            train_dataset=rows,
            compute_loss_func=loss_func,
            callbacks=list(callbacks),
        )
        if trains:
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


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("items", [None, 30])
def test_the_loss_of_a_mixture_of_experts_is_the_models_own(transformers, items, trains):
    model = make_mixture(transformers).train(trains)
    rows = causal_rows(4).rows
    ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    loss_func = rgd_loss_func(weighting=rgd.ERM(), aux_loss_coef=model.config.router_aux_loss_coef)
    with torch.set_grad_enabled(trains):
        own = model(input_ids=ids, labels=labels, num_items_in_batch=items).loss
        outputs = model(input_ids=ids)
        loss = loss_func(outputs, labels, num_items_in_batch=items)
    count = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(loss, own, rtol=count * torch.finfo(torch.float32).eps, atol=0)
    assert outputs.aux_loss.item() > 0.1


def test_trainer_adds_the_auxiliary_loss_as_the_model_does(transformers, tmp_path):
    results = []
    for loss_func in (rgd_loss_func(weighting=rgd.ERM(), aux_loss_coef=0.3), None):
        trainer = trained(
            transformers,
            make_mixture(transformers),
            causal_rows(),
            loss_func,
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
        )
        results.append(list(trainer.model.parameters()))
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_trainer_with_packed_rows_is_refused_by_sample(transformers, tmp_path):
    def train():
        trained(
            transformers,
            make_causal(transformers),
            Rows([{"input_ids": row["input_ids"].tolist()} for row in causal_rows().rows]),
            rgd_loss_func(per="sample"),
            output_dir=str(tmp_path),
            data_collator=transformers.DataCollatorWithFlattening(),
        )

    with pytest.raises(ValueError, match=r'several sequences.*per="element"'):
        train()


def test_trainer_evaluates_with_the_plain_loss(transformers, tmp_path):
    rows = classification_rows()
    trainer = trained(
        transformers,
        make_bert(transformers),
        rows,
        rgd_loss_func(),
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_eval_batch_size=32,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reported = trainer.evaluate(rows)["eval_loss"]
    model = trainer.model.eval()
    ids, labels = (torch.stack([row[name] for row in rows.rows]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        assert reported == pytest.approx(F.cross_entropy(model(ids).logits, labels).item(), rel=1e-5)


def test_the_callback_logs_the_statistics_of_the_training(transformers, tmp_path):
    loss_func = rgd_loss_func()
    trainer = trained(
        transformers,
        make_bert(transformers),
        classification_rows(),
        loss_func,
        [RGDStatsCallback(loss_func, prefix="weights")],
        output_dir=str(tmp_path),
        logging_strategy="steps",
        logging_steps=2,
    )
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logs) == 2
    stats = loss_func.stats()
    for name in (
        "mean_loss",
        "objective",
        "effective_sample_size",
        "kl_to_uniform",
        "max_weight",
        "clipped_share",
    ):
        assert logs[-1][f"weights/{name}"] == getattr(stats, name)
    assert not any(
        "weights/" in name for row in trainer.state.log_history if "loss" not in row for name in row
    )


def of_the_log(log):
    return {name: value for name, value in log.items() if name.startswith("rgd/")}


@pytest.mark.parametrize("how", ["callbacks", "add_callback", "add_callback before training again"])
def test_the_callback_comes_before_those_that_report(transformers, tmp_path, capsys, how):
    reported = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append(dict(logs))

    loss_func = rgd_loss_func()
    callback = RGDStatsCallback(loss_func)
    settings = {"output_dir": str(tmp_path), "logging_strategy": "steps", "logging_steps": 2}
    given = [Reporter(), callback] if how == "callbacks" else [Reporter()]
    trainer = trained(
        transformers,
        make_bert(transformers),
        classification_rows(),
        loss_func,
        given,
        trains=how != "add_callback",
        **settings,
    )
    if how != "callbacks":
        reported.clear()
        capsys.readouterr()
        trainer.state.log_history.clear()
        trainer.add_callback(callback)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train()
    logs = [of_the_log(log) for log in reported if "loss" in log]
    assert len(logs) == 2
    assert logs == [of_the_log(log) for log in trainer.state.log_history if "loss" in log]
    assert {"rgd/mean_loss", "rgd/effective_sample_size"} <= logs[0].keys()
    assert capsys.readouterr().out.count("rgd/effective_sample_size") == 2  # on the console
    # Each of the others was called once an event, and is there still.
    assert sorted(type(each).__name__ for each in trainer.callback_handler.callbacks) == sorted(
        ["DefaultFlowCallback", "PrinterCallback", "RGDStatsCallback", "Reporter"]
    )


def test_the_statistics_stand_in_the_files_of_tensorboard(transformers, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

    loss_func = rgd_loss_func()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trained(
            transformers,
            make_bert(transformers),
            classification_rows(),
            loss_func,
            [RGDStatsCallback(loss_func)],
            output_dir=str(tmp_path),
            logging_strategy="steps",
            logging_steps=2,
            report_to=["tensorboard"],
        )
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent)).Reload()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    for name in of_the_log(logs[0]):
        written = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert written == [(log["step"], pytest.approx(log[name], rel=1e-6)) for log in logs]


def test_the_callback_warns_of_a_label_smoothing_that_nobody_hears():
    loss_func = rgd_loss_func()
    arguments = type("Arguments", (), {"label_smoothing_factor": 0.1})()
    with pytest.warns(UserWarning, match=r"rgd_loss_func\(label_smoothing=0\.1\)"):
        RGDStatsCallback(loss_func).on_train_begin(arguments, None, None)
