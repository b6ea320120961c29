"""`use_linear_rgd`: the loss and gradients that logits give, without logits, in models of transformers."""

import concurrent.futures
import contextlib
import copy
import functools
import inspect
import math
import pickle
import threading
import warnings

import pytest
import rgd
import torch
from rgd.integrations.transformers import RGDStatsCallback, rgd_loss_func, use_linear_rgd
from rgd.torch import LinearRGDLoss, RGDLoss, WeightingSchedule, cross_entropy
from rgd.torch._dtypes import product_dtype
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

CLASSES = 211
ROWS, LENGTH = 3, 9


@pytest.fixture(autouse=True)
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


MODELS = {
    "Llama": {},
    "GPT2": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0, "attn_implementation": "eager"},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    # Its other implementations have no float64.
    "Mixtral": {"num_local_experts": 2, "output_router_logits": True, "experts_implementation": "eager"},
}


def make(transformers, kind="Llama", dtype=torch.float64):
    sizes = {
        "vocab_size": CLASSES,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    if kind == "GPT2":
        sizes = {"vocab_size": CLASSES, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
        sizes |= dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)
    config = getattr(transformers, f"{kind}Config")(
        **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3, **MODELS[kind]
    )
    torch.manual_seed(0)
    return getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).to(
        dtype
    )


def batch(rows=ROWS, length=LENGTH):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, CLASSES, (rows, length), generator=generator)
    labels = ids.clone()
    for row in range(rows):
        labels[row, length - row :] = -100  # rows of unequal length
    return {"input_ids": ids, "labels": labels}


def from_logits(model, inputs, items=None, **settings):
    """The objective by the model's own logits, and what its auxiliary loss adds."""
    outputs = model(**inputs)
    labels = inputs["labels"][:, 1:]
    criterion = RGDLoss(reduction="mean" if items is None else "sum", **settings)
    loss = criterion(outputs.logits[:, :-1].movedim(-1, 1), labels) / (1 if items is None else items)
    auxiliary = getattr(outputs, "aux_loss", None)
    return loss if auxiliary is None else loss + model.router_aux_loss_coef * auxiliary


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def assert_same(mine, theirs, tolerance=1e-12):
    """Each gradient but for a share of its norm."""
    for p, q in zip(mine, theirs, strict=True):
        assert (p is None) == (q is None)
        if p is not None:
            assert (p - q).norm() <= tolerance * max(float(q.norm()), 1.0)


@pytest.mark.parametrize("items", [None, 40, torch.tensor(40)], ids=["no count", "int", "tensor"])
@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_those_of_the_logits(transformers, kind, items):
    model, inputs = make(transformers, kind).train(), batch()
    expected = from_logits(model, inputs, items, tau=8.0)
    with use_linear_rgd(model, tau=8.0) as handle:
        outputs = model(**inputs, num_items_in_batch=items)
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-12, atol=0)
    assert_same(gradients(outputs.loss, model), gradients(expected, model))
    assert outputs.logits is None
    assert handle.stats().count == int((inputs["labels"][:, 1:] != -100).sum())
    assert handle.stats().effective_sample_size < handle.stats().count


@pytest.mark.parametrize(
    "settings",
    [
        {"weighting": rgd.KL(8.0, normalize=True)},
        {"weighting": rgd.KL(math.inf, scale=-1.0)},
        {"weighting": rgd.MidrangeKL(1.0), "per": "sample"},
        {"weighting": rgd.CVaR(0.3)},
        {"label_smoothing": 0.1, "weight": torch.linspace(0.5, 2.0, CLASSES, dtype=torch.float64)},
        {"ignore_index": 5},
    ],
    ids=str,
)
def test_settings_and_any_weighting_reach_the_loss(transformers, settings):
    model, inputs = make(transformers).train(), batch()
    inputs["labels"][inputs["labels"] == -100] = settings.get("ignore_index", -100)
    expected = from_logits(model, inputs, **settings)
    with use_linear_rgd(model, **settings):
        loss = model(**inputs).loss
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert_same(gradients(loss, model), gradients(expected, model))


class LargestTensor(TorchFunctionMode):
    """Remembers how many numbers the largest result of a call of torch holds."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return result


def test_no_tensor_of_all_logits_is_made(transformers):
    model, inputs = make(transformers).train(), batch(rows=8, length=32)
    logits = 8 * 32 * CLASSES
    with LargestTensor() as plain:
        model(**inputs).loss.backward()
    assert plain.numel >= logits
    with use_linear_rgd(model, chunk_bytes=8 * 16 * CLASSES), LargestTensor() as linear:
        model(**inputs).loss.backward()
    assert linear.numel < logits / 4


def test_labels_that_are_shifted_already_are_taken_as_they_are(transformers):
    model, inputs = make(transformers).train(), batch()
    shifted = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    with use_linear_rgd(model, tau=8.0):
        expected = model(**inputs).loss
        loss = model(**{**inputs, "shift_labels": shifted}).loss
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_calls_without_labels_and_evaluations_are_the_models_own(transformers):
    model, inputs = make(transformers).eval(), batch()
    with torch.no_grad():
        own = model(**inputs)
        written = model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False)
        with use_linear_rgd(model) as handle:
            outputs = model(**inputs)
            assert torch.equal(outputs.loss, own.loss)
            assert torch.equal(outputs.logits, own.logits)
            assert torch.equal(
                model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False), written
            )
            model.train()
            assert torch.equal(model(inputs["input_ids"]).logits, own.logits)
    with pytest.raises(RuntimeError, match="none yet"):
        handle.stats()


def test_evaluate_weighted_keeps_the_weights(transformers):
    model, inputs = make(transformers).eval(), batch()
    with torch.no_grad(), use_linear_rgd(model, tau=8.0, evaluate="weighted"):
        loss = model(**inputs).loss
    torch.testing.assert_close(loss, from_logits(model, inputs, tau=8.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [False, True])
def test_a_call_without_gradients_is_an_evaluation_in_any_mode(transformers, off, training):
    model, inputs = make(transformers).train(), batch()
    twin = copy.deepcopy(model).train(training)
    with use_linear_rgd(model, remembering()) as handle:
        model(**inputs).loss.backward()
        state, stats = state_of(handle), handle.stats()
        model.train(training)
        with off():
            outputs, own = model(**inputs), twin(**inputs)
            assert torch.equal(outputs.loss, own.loss)
            assert torch.equal(outputs.logits, own.logits)
        assert state_of(handle) == state
        assert handle.stats() == stats


def remembering():
    return rgd.MovingAverage(rgd.KL(8.0), 0.5)


def state_of(handle):
    return {name: value.item() for name, value in handle.criterion.weighting_state.state_dict().items()}


@pytest.mark.parametrize("training", [False, True])
def test_evaluations_with_weights_move_no_state(transformers, training):
    model, inputs = make(transformers).train(), batch()
    with use_linear_rgd(model, remembering(), evaluate="weighted") as handle:
        expected = model(**inputs).loss  # the mean of this batch is the state now, and weighs the next call
        state = state_of(handle)
        with torch.no_grad():
            loss = model.train(training)(**inputs).loss
        assert state_of(handle) == state
        assert state_of(handle)["updates"] == 1
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_eval_mode_with_gradients_weighs_by_the_state_and_leaves_it(transformers):
    model, inputs = make(transformers).train(), batch()
    with use_linear_rgd(model, remembering()) as handle:
        model(**inputs)
        model.eval()
        louder = {**inputs, "labels": inputs["labels"].roll(1, 1)}
        losses = [model(**louder).loss for _ in range(2)]
        assert state_of(handle)["updates"] == 1
    assert torch.equal(*losses)
    assert losses[0].requires_grad


def test_the_first_pass_of_a_reentrant_checkpoint_is_training(transformers):
    model, inputs = make(transformers).train(), batch()
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()

    def loss(embeddings):
        return model(inputs_embeds=embeddings, labels=inputs["labels"]).loss

    with use_linear_rgd(model, tau=8.0):
        expected = loss(embeddings)
        (gradient,) = torch.autograd.grad(expected, embeddings)
        repeated = checkpoint(loss, embeddings, use_reentrant=True)
        repeated.backward()
    torch.testing.assert_close(repeated, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(embeddings.grad, gradient, rtol=1e-12, atol=0)


def test_training_in_eval_mode_is_weighted(transformers):
    model, inputs = make(transformers).eval(), batch()
    with use_linear_rgd(model, tau=8.0):
        loss = model(**inputs).loss
    torch.testing.assert_close(loss, from_logits(model, inputs, tau=8.0), rtol=1e-12, atol=0)


def test_removal_gives_the_model_its_own_forward_back(transformers):
    model, inputs = make(transformers).train(), batch()
    before = dict(model.__dict__), dict(model.lm_head.__dict__)
    own = model(**inputs).loss
    handle = use_linear_rgd(model)
    assert model(**inputs).loss > own
    handle.remove()
    handle.remove()
    assert (dict(model.__dict__), dict(model.lm_head.__dict__)) == before
    with pytest.raises(KeyError, match="of the user"), use_linear_rgd(model):
        raise KeyError("of the user")
    assert dict(model.__dict__) == before[0]
    assert torch.equal(model(**inputs).loss, own)


def test_removal_under_a_wrapper_lets_calls_through(transformers):
    model, inputs = make(transformers).train(), batch()
    own = model(**inputs).loss
    handle = use_linear_rgd(model)
    inner = model.forward
    model.forward = functools.partial(inner)
    assert model(**inputs).logits is None
    handle.remove()
    assert torch.equal(model(**inputs).loss, own)
    with use_linear_rgd(model):
        assert model(**inputs).logits is None
    assert torch.equal(model(**inputs).loss, own)


def test_an_error_in_the_forward_pass_leaves_no_patch_behind(transformers):
    model, inputs = make(transformers).train(), batch()
    inputs["labels"][0, 3] = CLASSES
    with use_linear_rgd(model):
        with pytest.raises(IndexError, match="out of range"):
            model(**inputs)
        assert "forward" not in model.lm_head.__dict__
        assert "_loss_function" not in model.__dict__


def test_a_copy_of_the_model_trains_its_own_parameters(transformers):
    model, inputs = make(transformers).train(), batch()
    with use_linear_rgd(model, tau=8.0):
        expected = gradients(model(**inputs).loss, model)
        twin = copy.deepcopy(model)
        assert_same(gradients(twin(**inputs).loss, twin), expected)


def replicated(model, factor):
    """A replica as `nn.parallel.replicate` makes it: values in the place of parameters."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    values = {}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            if parameter is not None:
                values.setdefault(parameter, (factor * parameter).detach().requires_grad_())
            setattr(replica, name, values.get(parameter))
    return replicas[model], list(values.values())


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])  # the second with tied embeddings
def test_replicas_run_their_own_parameters_each_in_its_thread(transformers, kind):
    model = make(transformers, kind).train()
    parts = [{name: rows[i : i + 1] for name, rows in batch().items()} for i in range(ROWS)]
    twins = [copy.deepcopy(model) for _ in parts]
    everyone = threading.Barrier(ROWS)

    def meet(*_):
        """Let threads that may be inside of the criterion together be so."""
        with contextlib.suppress(threading.BrokenBarrierError):
            everyone.wait(0.5)

    with use_linear_rgd(model, tau=8.0) as handle:
        handle.criterion.register_forward_pre_hook(meet)
        replicas = [replicated(model, 1 + i / 4) for i in range(ROWS)]
        with concurrent.futures.ThreadPoolExecutor(ROWS) as threads:
            calls = [
                threads.submit(replica, **part) for (replica, _), part in zip(replicas, parts, strict=True)
            ]
            outputs = [call.result() for call in calls]
    for i, (output, (_, values), twin, inputs) in enumerate(
        zip(outputs, replicas, twins, parts, strict=True)
    ):
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(1 + i / 4)
        expected = from_logits(twin, inputs, tau=8.0)
        torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=0)
        assert_same(torch.autograd.grad(output.loss, values), gradients(expected, twin))


def test_a_copy_runs_what_was_wrapped_around_its_own_forward_pass(transformers):
    from accelerate.hooks import ModelHook, add_hook_to_module  # noqa: PLC0415

    class Counting(ModelHook):
        seen = ()

        def pre_forward(self, module, *args, **kwargs):
            Counting.seen = (*Counting.seen, module)
            return args, kwargs

    model, inputs = make(transformers).train(), batch()
    add_hook_to_module(model, Counting())
    with use_linear_rgd(model, tau=8.0):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.lm_head.weight.mul_(2)
        loss = twin(**inputs).loss
        assert Counting.seen == (twin,)
        torch.testing.assert_close(loss, from_logits(bare(twin), inputs, tau=8.0), rtol=1e-12, atol=0)


def bare(model):
    """The model without what stands in the instance."""
    twin = make_like(model)
    twin.load_state_dict(model.state_dict())
    return twin


def make_like(model):
    return type(model)(model.config).to(model.dtype).train(model.training)


def test_a_patched_model_is_pickled_without_its_patch(transformers):
    model, inputs = make(transformers).train(), batch()
    with use_linear_rgd(model):
        twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("positional", [False, True])
def test_tuples_and_positional_labels_work(transformers, positional):
    model, inputs = make(transformers).train(), batch()
    expected = from_logits(model, inputs, tau=8.0)
    names = list(inspect.signature(type(model).forward).parameters)
    with use_linear_rgd(model, tau=8.0):
        if positional:
            before = [None] * (names.index("labels") - 2)
            outputs = model(inputs["input_ids"], *before, inputs["labels"], return_dict=False)
        else:
            outputs = model(**inputs, return_dict=False)
    assert isinstance(outputs, tuple)
    torch.testing.assert_close(outputs[0], expected, rtol=1e-12, atol=0)


def test_a_model_in_bfloat16_has_a_float32_loss(transformers):
    model, inputs = make(transformers, dtype=torch.bfloat16).train(), batch()
    with torch.no_grad():
        hidden = model.model(inputs["input_ids"]).last_hidden_state
        dtype = product_dtype(hidden)
        logits = F.linear(hidden.to(dtype), model.lm_head.weight.to(dtype)).float()
    expected = RGDLoss(tau=8.0)(logits[:, :-1].movedim(-1, 1), inputs["labels"][:, 1:])
    with use_linear_rgd(model, tau=8.0):
        loss = model(**inputs, num_items_in_batch=None).loss
    assert loss.dtype is torch.float32
    # The logits have one dtype in both; what differs is the order of sums in float32.
    torch.testing.assert_close(loss, expected, rtol=CLASSES * torch.finfo(torch.float32).eps, atol=0)
    loss.backward()
    assert model.lm_head.weight.grad.dtype is torch.bfloat16


def test_autocast_computes_the_head_in_bfloat16_and_the_loss_in_float32(transformers):
    model, inputs = make(transformers, dtype=torch.float32).train(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = from_logits(model, inputs, 20, tau=8.0)
        with use_linear_rgd(model, tau=8.0):
            loss = model(**inputs, num_items_in_batch=20).loss
    assert loss.dtype is torch.float32
    # Logits in bfloat16 on one side, whose rounding is 2^-9 of up to about 8, and in float32 on the other.
    torch.testing.assert_close(loss, expected, rtol=2**-6, atol=0)
    loss.backward()
    assert model.lm_head.weight.grad.dtype is torch.float32


def test_checkpointed_layers_give_the_same_gradients(transformers):
    model, inputs = make(transformers).train(), batch()
    with use_linear_rgd(model, tau=8.0):
        expected = gradients(model(**inputs).loss, model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # has another name since transformers 5.20
            model.gradient_checkpointing_enable({"use_reentrant": False})
        assert_same(gradients(model(**inputs).loss, model), expected)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
def test_a_compiled_model_has_the_same_loss_and_gradients(transformers, kind):
    model, inputs = make(transformers, kind, torch.float32).train(), batch()
    torch.compiler.reset()
    with use_linear_rgd(model, tau=8.0), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what dynamo says of the models
        expected = model(**inputs).loss
        loss = torch.compile(model, backend="aot_eager")(**inputs).loss
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        assert_same(gradients(loss, model), gradients(expected, model), 1e-5)


def test_a_schedule_sets_the_weighting(transformers):
    model, inputs = make(transformers).train(), batch()
    with use_linear_rgd(model) as handle:
        schedule = WeightingSchedule(handle, lambda step: rgd.KL(tau=6.0 + step))
        for _ in range(2):
            schedule.step()
        assert handle.weighting == rgd.KL(tau=8.0)
        loss = model(**inputs).loss
    torch.testing.assert_close(loss, from_logits(model, inputs, tau=8.0), rtol=1e-12, atol=0)


def test_a_new_head_is_found(transformers):
    model = make(transformers).train()
    inputs = batch()
    with use_linear_rgd(model, tau=8.0):
        model(**inputs)
        model.lm_head = nn.Linear(16, CLASSES, bias=True, dtype=torch.float64)
        loss = model(**inputs).loss
    expected = from_logits(model, inputs, tau=8.0)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert_same(gradients(loss, model), gradients(expected, model))


class LowRank(nn.Module):
    """A frozen layer and what is trained beside it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 2, bias=False).to(layer.weight)
        self.up = nn.Linear(2, layer.out_features, bias=False).to(layer.weight)

    def forward(self, input):
        return self.layer(input) + self.up(self.down(input))


class Adapted(nn.Module):
    """A model inside another, as adapters have it."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model.requires_grad_(False)
        attention = model.model.layers[0].self_attn
        attention.v_proj = LowRank(attention.v_proj)

    def get_base_model(self):
        return self.base_model

    def forward(self, **inputs):
        return self.base_model(**inputs)


def test_adapters_beside_a_frozen_head_are_trained(transformers):
    model, inputs = Adapted(make(transformers)).train(), batch()
    expected = from_logits(model, inputs, tau=8.0)
    with use_linear_rgd(model, tau=8.0):
        outputs = model(**inputs)
        assert outputs.logits is None
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 2
        assert_same(torch.autograd.grad(outputs.loss, trained), torch.autograd.grad(expected, trained))


def test_hooks_of_accelerate_around_the_head_still_run(transformers):
    from accelerate.hooks import ModelHook, add_hook_to_module  # noqa: PLC0415

    class Doubled(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return tuple(2 * arg for arg in args), kwargs

    model, inputs = make(transformers).train(), batch()
    add_hook_to_module(model.lm_head, Doubled())
    expected = from_logits(model, inputs, tau=8.0)
    with use_linear_rgd(model, tau=8.0):
        loss = model(**inputs).loss
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_hooks_of_the_heads_module_see_its_backward_pass(transformers):
    passed = []

    class Recording(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            return values.clone()

        @staticmethod
        def backward(ctx, gradient):
            passed.append("backward")
            return gradient

    for kind in ("Llama", "Cohere", "Gemma2"):  # as they are, scaled, softly capped
        model, inputs = make(transformers, kind).train(), batch()
        model.lm_head.register_forward_hook(lambda module, args, output: Recording.apply(output))
        with use_linear_rgd(model, tau=8.0):
            model(**inputs).loss.backward()
        assert passed == ["backward"], kind
        passed.clear()


# --- the Trainer ---


class Rows(torch.utils.data.Dataset):
    def __init__(self, count=16):
        inputs = batch(count, 10)
        inputs["labels"] = torch.where(
            torch.arange(10) < 10 - torch.arange(count)[:, None] % 5, inputs["input_ids"], -100
        )
        self.rows = [{name: values[i] for name, values in inputs.items()} for i in range(count)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def trained(transformers, model, tmp_path, loss_func=None, callbacks=(), **settings):
    defaults = {"max_steps": 4, "learning_rate": 1e-2, "optim": "sgd", "max_grad_norm": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the trainer's own dependencies warn of
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=0,
            **{**defaults, **settings},
        )
        trainer = transformers.Trainer(
            model, arguments, train_dataset=Rows(), compute_loss_func=loss_func, callbacks=list(callbacks)
        )
        trainer.train()
    return trainer


def assert_same_parameters(one, other):
    # Four steps of a rate of 0.01 on gradients below 10, each but for the rounding of sums over the classes.
    tolerance = 4 * 0.1 * CLASSES * torch.finfo(torch.float32).eps
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("kind", "per"), [("Llama", "element"), ("GPT2", "sample"), ("Gemma2", "element")])
def test_the_trainer_ends_where_it_does_with_logits(transformers, tmp_path, kind, per, accumulate):
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulate}
    models = [make(transformers, kind, torch.float32) for _ in range(3)]
    with use_linear_rgd(models[0], tau=8.0, per=per) as handle:
        mine = trained(
            transformers, models[0], tmp_path, None, [RGDStatsCallback(handle)], logging_steps=1, **settings
        )
    trained(transformers, models[1], tmp_path, rgd_loss_func(tau=8.0, per=per), **settings)
    assert_same_parameters(models[0], models[1])
    assert not torch.equal(models[0].lm_head.weight, models[2].lm_head.weight)
    logs = [row for row in mine.state.log_history if "loss" in row]
    assert len(logs) == 4
    assert logs[-1]["rgd/effective_sample_size"] == handle.stats().effective_sample_size


def test_the_trainer_accumulating_gradients_equals_the_large_batch(transformers, tmp_path):
    models = [make(transformers, dtype=torch.float32) for _ in range(2)]
    for model, (size, accumulate) in zip(models, [(8, 1), (2, 4)], strict=True):
        with use_linear_rgd(model, tau=8.0):
            trained(
                transformers,
                model,
                tmp_path,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulate,
            )
    assert_same_parameters(*models)


def test_the_trainer_evaluates_with_the_plain_loss_and_moves_no_state(transformers, tmp_path):
    model = make(transformers, dtype=torch.float32)
    with use_linear_rgd(model, remembering()) as handle, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trained(transformers, model, tmp_path, max_steps=3, per_device_eval_batch_size=16)
        reported = trainer.evaluate(Rows())["eval_loss"]
        assert state_of(handle)["updates"] == 3
    rows = Rows().rows
    inputs = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        assert reported == pytest.approx(model.eval()(**inputs).loss.item(), rel=1e-5)


def test_the_callback_warns_of_a_label_smoothing_that_passes_the_loss_by(transformers):
    arguments = type("Arguments", (), {"label_smoothing_factor": 0.1})()
    handle = use_linear_rgd(make(transformers))
    with pytest.warns(UserWarning, match=r"use_linear_rgd\(label_smoothing=0\.1\)"):
        RGDStatsCallback(handle).on_train_begin(arguments, None, None)


# --- what is refused ---


def test_a_second_patch_is_refused(transformers):
    model = make(transformers)
    with use_linear_rgd(model), pytest.raises(ValueError, match=r"remove\(\) the first"):
        use_linear_rgd(model)
    use_linear_rgd(model).remove()


def test_what_is_no_causal_language_model_is_refused(transformers):
    with pytest.raises(ValueError, match=r"get_output_embeddings\(\), got Linear: for a model of your own"):
        use_linear_rgd(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="give the LlamaForCausalLM inside it"):
        use_linear_rgd(nn.DataParallel(make(transformers)))
    t5 = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder"):
        use_linear_rgd(transformers.T5ForConditionalGeneration(t5))
    bert = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    with pytest.raises(ValueError, match="has the loss ForSequenceClassificationLoss"):
        use_linear_rgd(transformers.BertForSequenceClassification(bert))


def test_a_head_that_is_no_linear_layer_is_refused(transformers):
    class Adapter(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = make(transformers)
    model.lm_head = Adapter(16, CLASSES)
    with pytest.raises(ValueError, match=r"must be an nn.Linear, got a .*Adapter"):
        use_linear_rgd(model)
    model.get_output_embeddings = lambda: None
    with pytest.raises(ValueError, match=r"must be an nn\.Linear, got None"):
        use_linear_rgd(model)


def test_a_model_that_changes_its_logits_is_found_out(transformers):
    from transformers.modeling_outputs import CausalLMOutputWithPast  # noqa: PLC0415

    class Louder(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, return_dict=None):
            logits = self.lm_head(self.model(input_ids).last_hidden_state) * 1.5
            loss = self.loss_function(logits, labels, vocab_size=CLASSES)
            return CausalLMOutputWithPast(loss=loss, logits=logits)

    model = Louder(make(transformers).config)
    with use_linear_rgd(model), pytest.raises(RuntimeError, match=r"\[0.5, 64.0\] became \[0.75, 96.0\]"):
        model(**batch())


def test_a_model_with_a_loss_of_its_own_making_is_found_out(transformers):
    class Own(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, return_dict=None):
            logits = self.lm_head(self.model(input_ids).last_hidden_state)
            return F.cross_entropy(logits.view(-1, CLASSES), labels.flatten())

    model = Own(make(transformers).config)
    with use_linear_rgd(model), pytest.raises(RuntimeError, match="Own computes its loss in another way"):
        model(**batch())


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"tau": -1.0}, ValueError),
        ({"per": "row"}, ValueError),
        ({"evaluate": "never"}, ValueError),
        ({"chunk_bytes": 0}, ValueError),
        ({"label_smoothing": 2.0}, ValueError),
        ({"weighting": 1.0}, TypeError),
    ],
    ids=str,
)
def test_bad_settings_are_refused_and_leave_the_model_alone(transformers, settings, error):
    model = make(transformers)
    with pytest.raises(error):
        use_linear_rgd(model, **settings)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("name", ["where", "groups", "segments"])
@pytest.mark.parametrize("trains", [True, False])
def test_what_only_a_loss_takes_is_refused_where_the_model_would_ignore_it(transformers, name, trains):
    model, inputs = make(transformers).train(trains), batch()
    with use_linear_rgd(model), torch.set_grad_enabled(trains):
        with pytest.raises(TypeError, match=f"does not take {name}=.*leave it out"):
            model(**inputs, **{name: torch.ones(ROWS)})
        assert model(**inputs, **{name: None}).loss > 0


def test_a_keyword_that_no_part_of_the_model_takes_is_refused(transformers):
    model, inputs = make(transformers).train(), batch()
    with use_linear_rgd(model):
        with pytest.raises(TypeError, match=r"sample_weights= is no argument of LlamaForCausalLM nor of its"):
            model(**inputs, sample_weights=torch.ones(ROWS))
        expected = model(**inputs).loss
        for name, value in {"use_cache": False, "output_hidden_states": True, "is_causal": True}.items():
            torch.testing.assert_close(model(**inputs, **{name: value}).loss, expected)
        assert model(inputs["input_ids"], sample_weights=torch.ones(ROWS)).loss is None  # not a loss's call


def test_what_the_function_of_the_attention_takes_is_known(transformers):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: PLC0415

    seen = []

    def attention(*args, gain=1.0, **kwargs):
        seen.append(gain)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)

    transformers.AttentionInterface.register("with_gain", attention)
    model, inputs = make(transformers).train(), batch()
    model.config._attn_implementation = "with_gain"
    with use_linear_rgd(model):
        assert model(**inputs, gain=2.0).loss > 0
    assert seen == [2.0]


def test_what_a_subclass_hands_on_is_known(transformers):
    class Handing(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model, inputs = make(transformers).train(), batch()
    outer = Handing(model.config).double()
    outer.load_state_dict(model.state_dict())
    with use_linear_rgd(outer, tau=8.0):
        loss = outer(**inputs, attention_mask=torch.ones_like(inputs["labels"])).loss
        twice = outer(**inputs, sample_weight=torch.full((ROWS,), 2.0)).loss
    torch.testing.assert_close(twice, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, from_logits(model, inputs, tau=8.0), rtol=1e-12, atol=0)


def test_another_label_to_ignore_than_that_of_the_loss_is_refused(transformers):
    model, inputs = make(transformers).train(), batch()
    with use_linear_rgd(model):
        with pytest.raises(ValueError, match=r"use_linear_rgd\(ignore_index=\.\.\.\)"):
            model(**inputs, ignore_index=7)
        assert model(**inputs, ignore_index=-100).loss > 0


def flattened(transformers, lengths=(5, 2, 7), **settings):
    generator = torch.Generator().manual_seed(2)
    texts = [{"input_ids": torch.randint(3, CLASSES, (n,), generator=generator).tolist()} for n in lengths]
    return transformers.DataCollatorWithFlattening(return_tensors="pt", **settings)(texts)


TOLD_BY = {
    "position_ids": {},
    "cu_seq_lens_q": {"return_position_ids": False, "return_flash_attn_kwargs": True},
    "seq_idx": {"return_position_ids": False, "return_seq_idx": True},
}


def one_by_one(model, inputs, starts):
    """The sequences of a packed row as rows of their own, padded, with the logits that the pack gives."""
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    ends = [*starts[1:], logits.shape[1]]
    pad = torch.nn.utils.rnn.pad_sequence
    spans = [slice(*span) for span in zip(starts, ends, strict=True)]
    rows = pad([logits[0, span][:-1] for span in spans], batch_first=True)
    labels = [inputs["input_ids"][0, span][1:] for span in spans]
    return rows.movedim(-1, 1), pad(labels, batch_first=True, padding_value=-100)


@pytest.mark.parametrize("found", TOLD_BY)
@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Gemma2"])
def test_sequences_of_a_packed_row_are_weighed_as_rows_of_their_own(transformers, kind, found):
    model, inputs = make(transformers, kind).train(), flattened(transformers, (4, 9, 6), **TOLD_BY[found])
    with use_linear_rgd(model, rgd.CVaR(0.5), per="sample") as handle:
        loss = model(**inputs).loss
        assert handle.stats().count == 3
        # What the collator masks is the first label of each text, which the text before would predict.
        unmasked = model(**{**inputs, "labels": inputs["input_ids"]}).loss
        alone = flattened(transformers, (6,), **TOLD_BY[found])
        of_one = model(**alone).loss
    logits, labels = one_by_one(model, inputs, (0, 4, 13))
    expected = cross_entropy(logits, labels, weighting=rgd.CVaR(0.5), per="sample")
    for mine in (loss, unmasked):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=0)
    wanted = from_logits(model, alone, weighting=rgd.CVaR(0.5), per="sample")
    torch.testing.assert_close(of_one, wanted, rtol=1e-12, atol=0)
    with use_linear_rgd(model, tau=8.0):
        loss = model(**inputs).loss
    torch.testing.assert_close(loss, from_logits(model, inputs, tau=8.0), rtol=1e-12, atol=0)


def test_labels_that_are_shifted_already_and_masks_that_number_sequences_are_understood(transformers):
    model, inputs = make(transformers).train(), batch(1)
    inputs["labels"] = inputs["input_ids"]
    numbers = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2]])
    logits, labels = one_by_one(model, {**inputs, "attention_mask": numbers}, (0, 4))
    expected = cross_entropy(logits, labels, tau=8.0, per="sample")
    shifted = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    with use_linear_rgd(model, tau=8.0, per="sample"):
        given = {"input_ids": inputs["input_ids"], "attention_mask": numbers}
        for mine in (
            model(**given, labels=inputs["labels"]),
            model(**given, labels=shifted, shift_labels=shifted),
        ):
            torch.testing.assert_close(mine.loss, expected, rtol=1e-12, atol=0)


def test_padded_rows_with_positions_are_weighed_by_sample(transformers):
    model, inputs = make(transformers).train(), batch()
    mask = (inputs["labels"] != -100).long()
    sides = {
        "right": mask,
        "left": mask.flip(1),
        "a pack with one text that counts": torch.ones_like(mask),
    }
    for side, mask in sides.items():
        labels = inputs["input_ids"].where(mask == 1, -100)
        positions = (mask.cumsum(1) - 1).where(mask == 1, 1)
        if side.startswith("a pack"):
            positions, labels = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(ROWS, -1), labels.clone()
            labels[:, :5] = -100
        given = {"input_ids": inputs["input_ids"], "labels": labels, "position_ids": positions}
        given |= {} if side.startswith("a pack") else {"attention_mask": mask}
        expected = from_logits(model, given, tau=8.0, per="sample")
        with use_linear_rgd(model, tau=8.0, per="sample"):
            loss = model(**given).loss
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0, msg=side)


def test_the_label_that_the_shift_drops_is_of_no_sequence(transformers):
    model, inputs = make(transformers).train(), batch()
    inputs["labels"] = inputs["input_ids"]
    numbers = torch.tensor([[0] + [1] * (LENGTH - 1)] * ROWS, dtype=torch.int32)  # a first text of one token
    expected = from_logits(model, inputs, tau=8.0, per="sample")
    with use_linear_rgd(model, tau=8.0, per="sample") as handle:
        loss = model(**inputs, seq_idx=numbers).loss
        model(**inputs, seq_idx=numbers.roll(1, 1))  # two texts of one token, and what follows them
        assert handle.stats().count == ROWS
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


# --- several processes ---


def sharded(rank, size):
    import transformers  # noqa: PLC0415
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    mesh = init_device_mesh("cpu", (size,))
    model = make(transformers).train()
    with use_linear_rgd(model, tau=8.0):
        fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return steps_of(model, rank, size)


def steps_of(model, rank, size):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = {name: values[rank * 4 // size : (rank + 1) * 4 // size] for name, values in batch(4).items()}
    inputs["labels"] = inputs["input_ids"]  # as many labels on each rank
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs)["loss"].backward()
        optimizer.step()
    return [p.full_tensor().detach() if size > 1 else p.detach() for p in model.parameters()]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_a_sharded_model_ends_where_one_process_does(transformers, run):
    model = make(transformers).train()
    with use_linear_rgd(model, tau=8.0):
        expected = steps_of(model, 0, 1)
    for outcome in run(2, sharded):
        assert_same(outcome, expected, 1e-11)


class LanguageModel(nn.Module):
    """A model that returns its loss; its head is in the criterion alone, or its embedding."""

    def __init__(self, tied):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(CLASSES, 8)
        self.body = nn.Linear(8, 8)
        lm_head = self.embedding if tied else nn.Linear(8, CLASSES)
        self.criterion = LinearRGDLoss.tie(lm_head, tau=8.0, shift=True)
        self.double()

    def forward(self, input_ids, labels):
        return {"loss": self.criterion(torch.tanh(self.body(self.embedding(input_ids))), labels)}


def sharded_tie(rank, size, tied):
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    mesh = init_device_mesh("cpu", (size,))
    model = LanguageModel(tied)
    if not tied:
        fully_shard(model.criterion, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return steps_of(model, rank, size)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("tied", [False, True])
def test_a_sharded_head_that_the_criterion_ties_ends_where_one_process_does(run, tied):
    expected = steps_of(LanguageModel(tied), 0, 1)
    for outcome in run(2, sharded_tie, tied):
        assert_same(outcome, expected, 1e-11)


def test_a_model_whose_forward_takes_no_keywords_of_the_loss_is_trained_as_on_the_large_batch(
    transformers, tmp_path
):
    class Bare(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, labels=None, return_dict=None):
            return super().forward(input_ids, attention_mask, labels=labels, return_dict=return_dict)

    models = []
    for size, accumulate in ((16, 1), (4, 4)):
        model = make(transformers, dtype=torch.float32)
        model.__class__ = Bare
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate}
        with use_linear_rgd(model, tau=8.0):
            trainer = trained(transformers, model, tmp_path, **settings)
            assert trainer.evaluate(Rows())["eval_loss"] > 0
        assert "accepts_loss_kwargs" not in vars(model)
        models.append(model)
    assert_same_parameters(*models)
