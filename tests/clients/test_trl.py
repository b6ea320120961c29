"""TRL's trainers, re-weighted: equal to TRL's own without weights, and to the formula with them."""

import warnings

import pytest
import rgd
import torch
from torch.nn import functional as F

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what their own dependencies warn of
    trl = pytest.importorskip("trl", minversion="1.16")
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    from rgd.integrations.trl import RGDDPOTrainer, RGDRewardTrainer, RGDSFTTrainer

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
transformers.utils.logging.set_verbosity_error()

WORDS = [f"w{i}" for i in range(40)]
EPS = torch.finfo(torch.float32).eps
STEPS = 3


def make_tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def make_model(kind="GPT2LMHeadModel", **settings):
    config = transformers.GPT2Config(
        vocab_size=43,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.4,  # losses that differ
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        **settings,
    )
    torch.manual_seed(0)
    return getattr(transformers, kind)(config)


def words(generator, count):
    return " ".join(WORDS[int(i)] for i in torch.randint(40, (count,), generator=generator))


def texts(rows=16):
    generator = torch.Generator().manual_seed(1)
    return datasets.Dataset.from_list([{"text": words(generator, 3 + row % 5)} for row in range(rows)])


def pairs(rows=16):
    generator = torch.Generator().manual_seed(2)
    return datasets.Dataset.from_list(
        [
            {
                "prompt": words(generator, 3),
                "chosen": " " + words(generator, 2 + row % 4),
                "rejected": " " + words(generator, 2 + row % 3),
            }
            for row in range(rows)
        ]
    )


def train(trainer_class, config_class, model, rows, tmp_path, config=None, ref_model=None, **settings):  # noqa: PLR0917
    arguments = config_class(
        **{
            "output_dir": str(tmp_path),
            "max_steps": STEPS,
            "learning_rate": 0.05,
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 4,
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
    if ref_model is not None:
        settings["ref_model"] = ref_model
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=rows, processing_class=make_tokenizer(), **settings
    )
    trainer.train()
    return trainer


def logged(trainer):
    return [row for row in trainer.state.log_history if "loss" in row]


def assert_same_training(mine, theirs):
    """The same parameters and the same metrics, but for the rounding of each step's sums over 43 classes."""
    tolerance = STEPS * 16 * 43 * EPS
    for p, q in zip(mine.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    for a, b in zip(logged(mine), logged(theirs), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"epoch"}:
            # Trainer rounds what it logs to at least four digits.
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=2e-4), name


ERM = rgd.ERM()


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulated"])
def test_fine_tuning_without_weights_is_trls_own(tmp_path, settings):
    mine = train(RGDSFTTrainer, trl.SFTConfig, make_model(), texts(), tmp_path, settings, weighting=ERM)
    theirs = train(trl.SFTTrainer, trl.SFTConfig, make_model(), texts(), tmp_path, settings)
    assert {"entropy", "mean_token_accuracy"} <= logged(mine)[0].keys()
    assert_same_training(mine, theirs)


def token_losses(model, inputs):
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    labels = inputs["labels"][:, 1:]
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none"), labels != -100


@pytest.mark.parametrize("linear", [False, True], ids=["fused head", "linear"])
@pytest.mark.parametrize("per", ["element", "sample"])
@pytest.mark.parametrize("items", [None, 50])
def test_fine_tunings_objective_and_gradient_are_the_formula(tmp_path, per, items, linear):
    tau = 4.0
    settings = {"tau": tau, "per": per, "linear": linear}
    trainer = train(RGDSFTTrainer, trl.SFTConfig, make_model(), texts(), tmp_path, **settings)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    model = trainer.model.train()
    losses, kept = token_losses(model, inputs)
    unit = losses.detach()
    if per == "sample":
        unit = (unit.sum(1) / kept.sum(1)).unsqueeze(1)
    weights = torch.exp(unit.clamp(max=tau) / (tau + 1))
    assert weights[kept.any(1)].std() > 0
    expected = (weights * losses).sum() / (int(kept.sum()) if items is None else items)
    count = None if items is None else torch.tensor(items)
    objective = trainer.compute_loss(model, dict(inputs), num_items_in_batch=count)
    assert_same_gradient(objective, expected, model)
    assert trainer.stats().count == (len(losses) if per == "sample" else int(kept.sum()))
    with torch.no_grad():  # an evaluation is plain
        plain = trainer.compute_loss(model, dict(inputs), num_items_in_batch=count)
    torch.testing.assert_close(
        plain, losses.detach().sum() / (int(kept.sum()) if items is None else items), rtol=1e-5, atol=0
    )


def assert_same_gradient(objective, expected, model):
    parameters = list(model.parameters())
    torch.testing.assert_close(objective, expected, rtol=43 * 16 * EPS, atol=0)
    mine = torch.autograd.grad(objective, parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected, parameters, allow_unused=True)
    for p, q in zip(mine, theirs, strict=True):
        assert (p is None) == (q is None)
        if p is not None:
            tolerance = 43 * 64 * EPS * max(float(q.abs().max()), 1e-3)
            torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


@pytest.mark.parametrize("linear", [False, True], ids=["fused head", "linear"])
def test_fine_tuning_makes_one_forward_pass_a_micro_batch(tmp_path, linear):
    model, calls = make_model(), []
    model.transformer.register_forward_hook(lambda *_: calls.append(1))
    train(RGDSFTTrainer, trl.SFTConfig, model, texts(), tmp_path, linear=linear)
    assert len(calls) == STEPS


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulated"])
def test_fine_tuning_with_a_linear_head_ends_where_the_fused_head_does(tmp_path, settings):
    settings = {**settings, "eval_strategy": "steps", "eval_steps": 1}
    rows = {"eval_dataset": texts(4), "tau": 4.0}
    mine = train(RGDSFTTrainer, trl.SFTConfig, make_model(), texts(), tmp_path, settings, linear=True, **rows)
    theirs = train(RGDSFTTrainer, trl.SFTConfig, make_model(), texts(), tmp_path, settings, **rows)
    tolerance = STEPS * 16 * 43 * EPS
    for p, q in zip(mine.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    for a, b in zip(mine.state.log_history, theirs.state.log_history, strict=True):
        assert a.keys() == b.keys()
        names = {"loss", "entropy", "mean_token_accuracy"}
        for name in a.keys() & (names | {f"eval_{name}" for name in names}):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=2e-4), name


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ({"loss_type": "dft"}, {}, "dft"),
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor"),
        (
            {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
            {"per": "sample"},
            'packing_strategy="wrapped" does not say where',
        ),
    ],
    ids=str,
)
def test_fine_tuning_refuses_what_it_would_weigh_wrongly(tmp_path, config, settings, message):
    with pytest.raises(ValueError, match=message):
        train(RGDSFTTrainer, trl.SFTConfig, make_model(), texts(), tmp_path, config, **settings)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({"eval_strategy": "steps", "eval_steps": 1}, {"eval_dataset": texts(4)}),
        ({"router_aux_loss_coef": 0.5, "gradient_accumulation_steps": 2}, {}),
        ({"packing": True, "max_length": 24}, {}),
    ],
    ids=["padded", "accumulated", "packed"],
)
def test_a_mixture_of_experts_keeps_the_auxiliary_loss_that_trl_adds(tmp_path, config, settings):
    mine = train(
        RGDSFTTrainer,
        trl.SFTConfig,
        experts(),
        texts(),
        tmp_path,
        config,
        linear=True,
        weighting=ERM,
        **settings,
    )
    theirs = train(trl.SFTTrainer, trl.SFTConfig, experts(), texts(), tmp_path, config, **settings)
    assert {"entropy", "mean_token_accuracy", "aux_loss"} <= logged(mine)[0].keys()
    assert logged(mine)[0]["aux_loss"] > 0
    assert_same_training(mine, theirs)
    for name in ("router_aux_loss_coef",):
        assert getattr(mine.model.config, name) == getattr(theirs.model.config, name)
        assert getattr(mine.model, name) == getattr(theirs.model, name) > 0


def experts():
    config = transformers.MixtralConfig(
        vocab_size=43,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(config)


GATE = rgd.EntropyGate(ERM)


def test_a_linear_head_takes_the_entropy_of_each_token(tmp_path):
    trainer = train(
        RGDSFTTrainer, trl.SFTConfig, make_model(), texts(), tmp_path, weighting=GATE, linear=True
    )
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    model = trainer.model.train()
    losses, kept = token_losses(model, inputs)
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    log_q = logits.detach().log_softmax(-1)
    gate = -(log_q.exp() * log_q).sum(-1) / torch.tensor(43.0).log()
    assert gate[kept].std() > 0.01
    expected = (gate * losses).sum() / int(kept.sum())
    assert_same_gradient(trainer.compute_loss(model, dict(inputs)), expected, model)


@pytest.mark.parametrize("kind", ["fine tuning", "pairs", "rewards"])
def test_trainers_of_losses_refuse_the_entropy_before_they_begin(tmp_path, kind):
    trainer_class, config_class, model, rows, settings, _ = {
        "fine tuning": fine_tuning, "pairs": preferences, "rewards": rewards,
    }[kind](False)  # fmt: skip
    instead = "give linear=True" if kind == "fine tuning" else "give another weighting for pairs"
    with pytest.raises(ValueError, match=f"EntropyGate reads the entropy of the logits.*{instead}"):
        train(trainer_class, config_class, model, rows, tmp_path, weighting=GATE, **settings)


def test_fine_tuning_a_mixture_of_experts_keeps_its_auxiliary_loss(tmp_path):
    mine = train(RGDSFTTrainer, trl.SFTConfig, experts(), texts(), tmp_path, weighting=ERM)
    theirs = train(trl.SFTTrainer, trl.SFTConfig, experts(), texts(), tmp_path)
    assert "aux_loss" in logged(mine)[0]
    assert_same_training(mine, theirs)


REMEMBERING = rgd.MovingAverage(rgd.KL(scale=-0.5), 0.9)


def fine_tuning(linear):
    return RGDSFTTrainer, trl.SFTConfig, make_model(), texts(), {"linear": linear}, trl.SFTTrainer


def preferences(_):
    return RGDDPOTrainer, trl.DPOConfig, make_model(), pairs(), {"ref_model": make_model()}, trl.DPOTrainer


def rewards(_):
    model = make_model("GPT2ForSequenceClassification", num_labels=1)
    return RGDRewardTrainer, trl.RewardConfig, model, pairs(), {}, trl.RewardTrainer


@pytest.mark.parametrize(
    ("kind", "linear"), [(fine_tuning, False), (fine_tuning, True), (preferences, False), (rewards, False)]
)
def test_evaluations_are_trls_own_and_move_no_state(tmp_path, kind, linear):
    trainer_class, config_class, model, rows, settings, own = kind(linear)
    config = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    settings = {**settings, "weighting": REMEMBERING, "eval_dataset": rows.select(range(8))}
    trainer = train(trainer_class, config_class, model, rows, tmp_path, config, **settings)
    assert int(trainer.criterion.weighting_state.updates) == STEPS
    stats = trainer.stats()
    reported = trainer.evaluate()["eval_loss"]
    assert trainer.stats() == stats
    settings = {name: value for name, value in settings.items() if name not in ("weighting", "linear")}
    config |= {"max_steps": 1, "learning_rate": 0.0}
    twin = train(own, config_class, trainer.model, rows, tmp_path, config, **settings)
    # Means over two batches of at most 43 classes by 16 tokens, in float32.
    assert reported == pytest.approx(twin.evaluate()["eval_loss"], rel=2 * 16 * 43 * EPS)


@pytest.mark.parametrize("kind", [fine_tuning, preferences, rewards])
@pytest.mark.parametrize("name", ["where", "groups"])
def test_what_a_trainer_would_ignore_in_a_batch_is_refused(tmp_path, kind, name):
    trainer_class, config_class, model, rows, settings, _ = kind(False)
    settings.pop("linear", None)
    trainer = train(trainer_class, config_class, model, rows, tmp_path, {"max_steps": 1}, **settings)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with pytest.raises(TypeError, match=f"{trainer_class.__name__} does not take {name}="):
        trainer.compute_loss(trainer.model, {**inputs, name: torch.ones(4)})


PACKINGS = {
    "packing": ({"packing": True, "max_length": 24}, {}),
    "padding free": ({"padding_free": True, "max_length": None}, {}),
    "collator": ({}, {"data_collator": transformers.DataCollatorWithFlattening()}),
}


@pytest.mark.parametrize("linear", [False, True], ids=["fused head", "linear"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_sequences_are_weighted_as_rows_of_their_own(tmp_path, packing, linear):
    config, settings = PACKINGS[packing]
    settings = {"tau": 4.0, "per": "sample", "linear": linear, **settings}
    trainer = train(RGDSFTTrainer, trl.SFTConfig, make_model(), texts(), tmp_path, config, **settings)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    model = trainer.model.train()
    given = {name: value for name, value in inputs.items() if name in ("input_ids", "position_ids")}
    logits, labels = model(**given).logits[:, :-1], inputs["labels"][:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    starts = inputs["position_ids"] == 0
    numbers, kept = starts.cumsum(1)[:, 1:], (labels != -100) & ~starts[:, 1:]
    products, units = [], 0
    for row in range(len(labels)):
        for number in range(1, int(numbers[row].max()) + 1):
            own = losses[row][(numbers[row] == number) & kept[row]]
            if own.numel():
                products.append(torch.exp(own.mean().detach().clamp(max=4.0) / 5.0) * own.sum())
                units += 1
    assert units > len(labels)
    expected = sum(products) / kept.sum()
    objective = trainer.compute_loss(model, dict(inputs))
    assert_same_gradient(objective, expected, model)
    assert trainer.stats().count == units


DPO_KINDS = [
    {},
    {"loss_type": ["hinge"]},
    {"loss_type": ["ipo"]},
    {"loss_type": ["sigmoid_norm"]},
    {"loss_type": ["robust"], "label_smoothing": 0.1},
    {"loss_type": ["sigmoid", "hinge"], "loss_weights": [0.7, 0.3]},
    {"precompute_ref_log_probs": True},
]


@pytest.mark.parametrize("config", DPO_KINDS, ids=str)
def test_dpo_without_weights_is_trls_own(tmp_path, config):
    mine = train(
        RGDDPOTrainer, trl.DPOConfig, make_model(), pairs(), tmp_path, config, make_model(), weighting=ERM
    )
    theirs = train(trl.DPOTrainer, trl.DPOConfig, make_model(), pairs(), tmp_path, config, make_model())
    assert {"rewards/accuracies", "rewards/margins"} <= logged(mine)[0].keys()
    assert_same_training(mine, theirs)


def completion_log_probs(model, inputs):
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    tokens = -F.cross_entropy(logits.transpose(1, 2), inputs["input_ids"][:, 1:], reduction="none")
    return (tokens * inputs["completion_mask"][:, 1:]).sum(1)


def test_dpos_objective_and_gradient_are_the_formula(tmp_path):
    tau = 2.0
    trainer = train(
        RGDDPOTrainer, trl.DPOConfig, make_model(), pairs(), tmp_path, {"beta": 0.5}, make_model(), tau=tau
    )
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    model = trainer.model.train()
    with torch.no_grad():
        before = completion_log_probs(trainer.ref_model, inputs)
    chosen, rejected = (completion_log_probs(model, inputs) - before).chunk(2)
    losses = -F.logsigmoid(0.5 * (chosen - rejected))
    weights = torch.exp(losses.detach().clamp(max=tau) / (tau + 1))
    assert weights.std() > 0
    assert_same_gradient(trainer.compute_loss(model, dict(inputs)), (weights * losses).mean(), model)
    assert trainer.stats().count == len(losses)


@pytest.mark.parametrize(
    "config",
    [
        {"loss_type": ["exo_pair"], "label_smoothing": 0.1},
        {"f_divergence_type": "forward_kl"},
        {"ld_alpha": 0.5},
        {"use_weighting": True},
    ],
    ids=str,
)
def test_dpo_refuses_losses_whose_pairs_it_does_not_know(tmp_path, config):
    with pytest.raises(ValueError, match="RGDDPOTrainer"):
        train(RGDDPOTrainer, trl.DPOConfig, make_model(), pairs(), tmp_path, config, make_model())


@pytest.mark.parametrize("config", [{}, {"center_rewards_coefficient": 0.1}], ids=str)
def test_reward_modelling_without_weights_is_trls_own(tmp_path, config):
    def classifier():
        return make_model("GPT2ForSequenceClassification", num_labels=1)

    mine = train(RGDRewardTrainer, trl.RewardConfig, classifier(), pairs(), tmp_path, config, weighting=ERM)
    theirs = train(trl.RewardTrainer, trl.RewardConfig, classifier(), pairs(), tmp_path, config)
    assert "accuracy" in logged(mine)[0]
    assert_same_training(mine, theirs)


def test_the_reward_models_objective_and_gradient_are_the_formula(tmp_path):
    tau = 2.0
    model = make_model("GPT2ForSequenceClassification", num_labels=1)
    trainer = train(RGDRewardTrainer, trl.RewardConfig, model, pairs(), tmp_path, tau=tau)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    model = trainer.model.train()
    chosen, rejected = model(**{**inputs, "use_cache": False}).logits.squeeze(-1).chunk(2)
    losses = -F.logsigmoid(chosen - rejected)
    weights = torch.exp(losses.detach().clamp(max=tau) / (tau + 1))
    assert weights.std() > 0
    assert_same_gradient(trainer.compute_loss(model, dict(inputs)), (weights * losses).mean(), model)
    with torch.no_grad():
        torch.testing.assert_close(trainer.compute_loss(model, dict(inputs)), losses.detach().mean())
