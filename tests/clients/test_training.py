"""Each client trains to the parameters of a plain loop with the formula composed from torch operations."""

import contextlib
import io
import os
import pathlib
import re

import pytest
import rgd
import torch
from rgd.torch import RGD, RGDLoss, count_targets
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.filterwarnings("ignore")  # what the clients and their dependencies warn of

TAU, RATE, BATCH, ROWS = 2.0, 0.5, 8, 48
# In each step sums over a batch are taken in another order: gradients below 4, one rounding a sample.
CLOSE = {"rtol": 0.0, "atol": ROWS // BATCH * 4 * BATCH * torch.finfo(torch.float32).eps}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small gain nothing from more
    with contextlib.redirect_stdout(io.StringIO()):
        yield
    torch.set_num_threads(threads)


# A mean over all rows in float32, taken in another order.
NEAR = ROWS * torch.finfo(torch.float32).eps


def rows():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 5, generator=generator) * 2, torch.randint(3, (ROWS,), generator=generator)


def make_model():
    torch.manual_seed(0)
    return nn.Linear(5, 3)


def loader():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*rows()), batch_size=BATCH)


def composed(logits, target):
    losses = F.cross_entropy(logits, target, reduction="none")
    return (torch.exp(losses.detach().clamp(max=TAU) / (TAU + 1)) * losses).mean()


def expected(loss=composed, accumulate=1):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for number, (inputs, target) in enumerate(loader(), 1):
        (loss(model(inputs), target) / accumulate).backward()
        if number % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model


def assert_same(model, other):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, **CLOSE)


def test_the_weights_matter_here():
    with pytest.raises(AssertionError):
        assert_same(expected(), expected(F.cross_entropy))


def test_skorch_trains_to_the_formula_and_predicts_probabilities():
    skorch = pytest.importorskip("skorch")
    inputs, target = rows()
    network = skorch.NeuralNetClassifier(
        make_model(),
        criterion=RGDLoss,
        criterion__tau=TAU,
        optimizer=torch.optim.SGD,
        lr=RATE,
        batch_size=BATCH,
        max_epochs=1,
        train_split=None,
        iterator_train__shuffle=False,
        verbose=0,
    )
    network.initialize()
    network.module_.load_state_dict(make_model().state_dict())
    network.partial_fit(inputs.numpy(), target.numpy())
    assert_same(network.module_, expected())
    probabilities = torch.as_tensor(network.predict_proba(inputs.numpy()))
    torch.testing.assert_close(probabilities, expected()(inputs).softmax(1).detach(), rtol=0, atol=1e-4)


def test_fastai_trains_to_the_formula():
    pytest.importorskip("fastai")
    from fastai.data.core import DataLoaders  # noqa: PLC0415
    from fastai.data.load import DataLoader  # noqa: PLC0415
    from fastai.learner import Learner  # noqa: PLC0415
    from fastai.optimizer import SGD  # noqa: PLC0415

    data = torch.utils.data.TensorDataset(*rows())
    loaders = DataLoaders(DataLoader(data, bs=BATCH), DataLoader(data, bs=BATCH))
    learner = Learner(loaders, make_model(), loss_func=RGDLoss(tau=TAU), opt_func=SGD, lr=RATE)
    learner.fit(1)
    assert_same(learner.model.cpu(), expected())


def test_ignite_trains_to_the_formula():
    engine = pytest.importorskip("ignite.engine")
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    engine.create_supervised_trainer(model, optimizer, RGDLoss(tau=TAU)).run(loader(), max_epochs=1)
    assert_same(model, expected())


def recipe(title):
    """The code of a recipe of docs/clients.md."""
    page = pathlib.Path(__file__).parents[2] / "docs" / "clients.md"
    (code,) = re.findall(rf"^## {title}$.*?^```py\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return code


def defined(title, name, **namespace):
    """What a recipe defines under a name, without the training that it shows."""
    (part,) = re.findall(rf"^class {name}\(.*?\n(?=\S)", recipe(title), re.M | re.S)
    exec(part, {"RGDLoss": RGDLoss, **(namespace := dict(namespace))}, namespace)
    return namespace[name]


@pytest.fixture
def keras(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", os.environ.get("KERAS_BACKEND", "torch"))
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "torch":
        pytest.skip("Keras has another backend here")
    return keras


def compiled(keras, loss):
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    start = make_model()
    model.set_weights([start.weight.detach().T.numpy(), start.bias.detach().numpy()])
    model.compile(optimizer=keras.optimizers.SGD(RATE), loss=loss)
    return model


def test_keras_trains_to_the_formula(keras):
    model = compiled(keras, defined("Keras on torch", "Reweighted", keras=keras)(tau=TAU))
    inputs, target = (tensor.numpy() for tensor in rows())
    model.fit(inputs, target, batch_size=BATCH, shuffle=False, verbose=0)
    kernel, bias = (torch.as_tensor(value) for value in model.get_weights())
    torch.testing.assert_close(kernel.T, expected().weight.detach(), **CLOSE)
    torch.testing.assert_close(bias, expected().bias.detach(), **CLOSE)


@pytest.mark.parametrize("given", ["sample_weight", "class_weight"])
def test_sample_and_class_weights_count_in_keras_as_with_its_own_loss(keras, given):
    inputs, target = (tensor.numpy() for tensor in rows())
    trusted = torch.rand(ROWS, generator=torch.Generator().manual_seed(2)).numpy()
    weights = {"sample_weight": trusted, "class_weight": {0: 1.0, 1: 0.5, 2: 3.0}}
    kind = defined("Keras on torch", "Reweighted", keras=keras)
    losses = {
        "mine": kind(weighting=rgd.ERM()),
        "weighted": kind(tau=TAU),
        "its own": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    }
    models, reported = {}, {}
    for name, loss in losses.items():
        models[name] = compiled(keras, loss)
        history = models[name].fit(
            inputs,
            target,
            **{given: weights[given]},
            validation_data=(inputs, target, trusted),
            batch_size=BATCH,
            shuffle=False,
            verbose=0,
        )
        reported[name] = history.history["val_loss"][-1]
    for mine, own in zip(models["mine"].get_weights(), models["its own"].get_weights(), strict=True):
        torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(own), **CLOSE)
    assert reported["mine"] == pytest.approx(reported["its own"], rel=NEAR)
    assert not (models["weighted"].get_weights()[0] == models["mine"].get_weights()[0]).all()
    # The validation loss of the re-weighted model is the plain one, with sample weights, as Keras has it.
    logits = torch.as_tensor(inputs) @ torch.as_tensor(models["weighted"].get_weights()[0])
    logits = logits + torch.as_tensor(models["weighted"].get_weights()[1])
    plain = F.cross_entropy(logits, torch.as_tensor(target), reduction="none") * torch.as_tensor(trusted)
    assert reported["weighted"] == pytest.approx(plain.mean().item(), rel=NEAR)


@pytest.mark.parametrize("mixing", ["MixUp", "CutMix"])
def test_fastais_mixed_batches_train_as_with_its_own_loss(mixing):
    pytest.importorskip("fastai")
    from fastai.callback import mixup  # noqa: PLC0415
    from fastai.data.core import DataLoaders  # noqa: PLC0415
    from fastai.data.load import DataLoader  # noqa: PLC0415
    from fastai.learner import Learner  # noqa: PLC0415
    from fastai.losses import CrossEntropyLossFlat  # noqa: PLC0415
    from fastai.optimizer import SGD  # noqa: PLC0415

    kind = defined("fastai", "Loss")
    images = rows()[0].repeat_interleave(16, 1)[:, :64].reshape(ROWS, 1, 8, 8)
    data = torch.utils.data.TensorDataset(images, rows()[1])
    models, reported = {}, {}
    losses = {"mine": kind(weighting=rgd.ERM()), "weighted": kind(tau=TAU), "its own": CrossEntropyLossFlat()}
    for name, loss in losses.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        loaders = DataLoaders(DataLoader(data, bs=BATCH), DataLoader(data, bs=BATCH))
        learner = Learner(loaders, model, loss_func=loss, opt_func=SGD, lr=0.1)
        learner.fit(1, cbs=getattr(mixup, mixing)(0.4))
        models[name], reported[name] = learner.model.cpu(), learner.recorder.values[-1][1]
    assert_same(models["mine"], models["its own"])
    assert reported["mine"] == pytest.approx(reported["its own"], rel=NEAR)
    with torch.no_grad():
        plain = F.cross_entropy(models["weighted"](images), rows()[1]).item()
    assert reported["weighted"] == pytest.approx(plain, rel=NEAR)
    with pytest.raises(AssertionError):
        assert_same(models["weighted"], models["its own"])


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 0.5, 5.0])], ids=["padding", "class weights"])
def test_sums_over_what_the_whole_batchs_mean_divides_by_accumulate_to_its_gradient(weight):
    inputs, target = rows()
    target[:7] = -100  # the first part has one label that counts
    kept = target[target != -100]
    model, twin = make_model(), make_model()
    RGDLoss(weight, tau=TAU)(model(inputs), target).backward()
    criterion, total = RGDLoss(weight, reduction="sum", tau=TAU), len(kept)
    total = total if weight is None else weight[kept].sum()
    for part, labels in zip(inputs.split(BATCH), target.split(BATCH), strict=True):
        (criterion(twin(part), labels) / total).backward()
    torch.testing.assert_close(twin.weight.grad, model.weight.grad, **CLOSE)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("means", ["objective", "loss"])
def test_accelerate_trains_to_the_formula(accumulate, means):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    reweighted = RGD(optimizer, tau=TAU) if means == "objective" else optimizer
    criterion = RGDLoss(tau=TAU)
    model, optimizer, batches = accelerator.prepare(model, reweighted, loader())
    for inputs, target in batches:
        with accelerator.accumulate(model):
            if means == "objective":
                losses = F.cross_entropy(model(inputs), target, reduction="none")
                accelerator.backward(reweighted.objective(losses))
            else:
                accelerator.backward(criterion(model(inputs), target))
            optimizer.step()
            optimizer.zero_grad()
    assert_same(accelerator.unwrap_model(model), expected(accumulate=accumulate))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_accelerate_makes_one_step_of_unequal_micro_batches(accumulate):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    inputs, target = rows()
    target[:7] = -100  # of the first micro-batch one label is left
    model = make_model()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE))
    criterion = RGDLoss(tau=TAU)
    step = list(zip(inputs[:32].chunk(accumulate), target[:32].chunk(accumulate), strict=True))
    # accelerate divides by the number of micro-batches, and so must the normalizer be.
    total = count_targets(step) / accumulate
    for micro_batch, labels in step:
        with accelerator.accumulate(model):
            accelerator.backward(criterion(model(micro_batch), labels, normalizer=total))
            optimizer.step()
            optimizer.zero_grad()
    twin = make_model()
    optimizer = torch.optim.SGD(twin.parameters(), lr=RATE)
    RGDLoss(tau=TAU)(twin(inputs[:32]), target[:32]).backward()
    optimizer.step()
    assert_same(accelerator.unwrap_model(model), twin)


@pytest.mark.parametrize("settings", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}], ids=["mixup", "cutmix"])
def test_timms_mixed_targets_are_weighted_by_their_loss(settings):
    timm = pytest.importorskip("timm.data")
    mixup = timm.Mixup(**settings, label_smoothing=0.1, num_classes=3)
    images, probabilities = mixup(torch.randn(16, 3, 8, 8), torch.arange(16) % 3)
    torch.manual_seed(0)
    logits = nn.Linear(3 * 8 * 8, 3)(images.flatten(1))
    losses = -(probabilities * logits.log_softmax(1)).sum(1)
    weights = torch.exp(losses.detach().clamp(max=TAU) / (TAU + 1))
    torch.testing.assert_close(
        RGDLoss(tau=TAU)(logits, probabilities), (weights * losses).mean(), rtol=1e-5, atol=0
    )


def test_monais_losses_are_weighted_by_image():
    losses_of = pytest.importorskip("monai.losses")
    base = losses_of.DiceLoss(to_onehot_y=True, softmax=True, reduction="none")
    torch.manual_seed(0)
    logits, masks = torch.randn(4, 2, 16, 16) * 3, torch.randint(2, (4, 1, 16, 16))
    losses = base(logits, masks)
    unit = losses.flatten(1).mean(1)
    weights = torch.exp(unit.clamp(max=TAU) / (TAU + 1)).view(-1, *[1] * (losses.dim() - 1))
    assert weights.std() > 0
    objective = RGDLoss(base=base, per="sample", tau=TAU)(logits, masks)
    torch.testing.assert_close(objective, (weights * losses).mean(), rtol=1e-5, atol=0)
