"""Each client's validation loss is the plain one, and its validation batches move no weighting's state."""

import contextlib
import io
import logging
import os
import warnings

import pytest
import rgd
import torch
from rgd.torch import RGDLoss
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.filterwarnings("ignore")  # what the clients and their dependencies warn of

WEIGHTING = rgd.MovingAverage(rgd.KL(scale=-3.0), 0.9)
BATCH, EPOCHS, STEPS = 8, 2, 4  # steps of an epoch
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def quiet(one_thread, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", os.environ.get("KERAS_BACKEND", "torch"))
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def data(seed, batches):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(batches * BATCH, 5, generator=generator) * 2
    return TensorDataset(inputs, torch.randint(3, (len(inputs),), generator=generator))


TRAIN, VALID = data(1, STEPS), data(2, 3)


def loaders():
    return DataLoader(TRAIN, BATCH), DataLoader(VALID, BATCH)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def plain(model):
    inputs, target = VALID.tensors
    with torch.no_grad():
        return F.cross_entropy(model(inputs), target).item()


# Each returns the validation loss after the last epoch, the trained model and the criterion.


def a_loop(criterion):
    """As accelerate and timm have it: the model is in eval mode, and gradients are off."""
    model = nn.Linear(5, 3)
    optimizer, (train, valid) = sgd(model), loaders()
    for _ in range(EPOCHS):
        model.train()
        for inputs, target in train:
            optimizer.zero_grad()
            criterion(model(inputs), target).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            losses = [criterion(model(inputs), target).item() for inputs, target in valid]
    return sum(losses) / len(losses), model, criterion


def accelerate(criterion):
    pytest.importorskip("accelerate")
    from accelerate import Accelerator  # noqa: PLC0415

    accelerator, model = Accelerator(cpu=True), nn.Linear(5, 3)
    model, optimizer, train, valid = accelerator.prepare(model, sgd(model), *loaders())
    for _ in range(EPOCHS):
        model.train()
        for inputs, target in train:
            accelerator.backward(criterion(model(inputs), target))
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            losses = [accelerator.gather(criterion(model(x), y)).mean().item() for x, y in valid]
    return sum(losses) / len(losses), accelerator.unwrap_model(model), criterion


def lightning(criterion, inside=True):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl = pytest.importorskip("lightning.pytorch")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Classifier(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = nn.Linear(5, 3)
            self.criteria = nn.ModuleList([criterion]) if inside else [criterion]

        def training_step(self, batch, _):
            return self.criteria[0](self.model(batch[0]), batch[1])

        def validation_step(self, batch, _):
            self.log("val_loss", self.criteria[0](self.model(batch[0]), batch[1]), batch_size=BATCH)

        def configure_optimizers(self):
            return sgd(self)

    module = Classifier()
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, *loaders())
    return float(trainer.callback_metrics["val_loss"]), module.model, criterion


def lightning_outside(criterion):
    """The criterion is no submodule, so that the trainer cannot put it in eval mode."""
    return lightning(criterion, inside=False)


def skorch(criterion):
    skorch = pytest.importorskip("skorch")
    from skorch.helper import predefined_split  # noqa: PLC0415

    network = skorch.NeuralNetClassifier(
        nn.Linear(5, 3),
        criterion=RGDLoss,
        criterion__weighting=criterion.weighting,
        optimizer=torch.optim.SGD,
        lr=0.1,
        batch_size=BATCH,
        max_epochs=EPOCHS,
        train_split=predefined_split(VALID),
        verbose=0,
    )
    network.fit(TRAIN, y=None)
    return network.history[-1]["valid_loss"], network.module_, network.criterion_


def fastai(criterion):
    pytest.importorskip("fastai")
    from fastai.data.core import DataLoaders  # noqa: PLC0415
    from fastai.data.load import DataLoader  # noqa: PLC0415
    from fastai.learner import Learner  # noqa: PLC0415
    from fastai.optimizer import SGD  # noqa: PLC0415

    both = DataLoaders(DataLoader(TRAIN, bs=BATCH), DataLoader(VALID, bs=BATCH))
    learner = Learner(both, nn.Linear(5, 3), loss_func=criterion, opt_func=SGD, lr=0.1)
    learner.fit(EPOCHS)
    return learner.recorder.values[-1][1], learner.model.cpu(), criterion


def keras(criterion):
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "torch":
        pytest.skip("Keras has another backend here")

    class Reweighted(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return criterion(y_pred, y_true.reshape(-1).long())

    criterion.reduction = "none"
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss=Reweighted())
    train, valid = ([tensor.numpy() for tensor in part.tensors] for part in (TRAIN, VALID))
    history = model.fit(*train, batch_size=BATCH, epochs=EPOCHS, verbose=0, validation_data=tuple(valid))
    return history.history["val_loss"][-1], model, criterion


def ignite(criterion):
    engine = pytest.importorskip("ignite.engine")
    metrics = pytest.importorskip("ignite.metrics")
    model = nn.Linear(5, 3)
    train, valid = loaders()
    trainer = engine.create_supervised_trainer(model, sgd(model), criterion)
    evaluator = engine.create_supervised_evaluator(model, metrics={"loss": metrics.Loss(criterion)})
    trainer.add_event_handler(engine.Events.EPOCH_COMPLETED, lambda _: evaluator.run(valid))
    trainer.run(train, max_epochs=EPOCHS)
    return evaluator.state.metrics["loss"], model, criterion


class Network(nn.Module):
    """A network with the interface of the Trainer's models."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, inputs, labels=None):
        return {"logits": self.linear(inputs)}


def trainer(criterion):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from rgd.integrations.transformers import rgd_loss_func  # noqa: PLC0415

    loss_func = rgd_loss_func(criterion.weighting)
    parts = ([{"inputs": inputs, "labels": target} for inputs, target in part] for part in (TRAIN, VALID))
    arguments = transformers.TrainingArguments(
        "runs",
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        eval_strategy="epoch",
        optim="sgd",
        learning_rate=0.1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    train, valid = parts
    ours = transformers.Trainer(
        Network(), arguments, train_dataset=train, eval_dataset=valid, compute_loss_func=loss_func
    )
    ours.train()
    reported = [row["eval_loss"] for row in ours.state.log_history if "eval_loss" in row]
    return reported[-1], ours.model.linear, loss_func.criterion


CLIENTS = [a_loop, accelerate, lightning, lightning_outside, skorch, fastai, keras, ignite, trainer]


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.__name__)
def test_the_validation_loss_is_plain_and_validation_trains_no_state(client):
    reported, model, criterion = client(RGDLoss(weighting=WEIGHTING))
    # Means of three batches of eight losses in float32, taken in another order.
    assert reported == pytest.approx(plain(model), rel=3 * BATCH * EPS)
    assert int(criterion.weighting_state.updates) == EPOCHS * STEPS
    inputs, target = VALID.tensors
    with torch.no_grad():
        logits = model(inputs)
    weighted = criterion(logits.requires_grad_(), target).mean().item()
    assert weighted != pytest.approx(reported, rel=0.05)  # it matters here


def test_monais_losses_are_plain_in_validation():
    losses_of = pytest.importorskip("monai.losses")
    base = losses_of.DiceFocalLoss(to_onehot_y=True, softmax=True, reduction="none")
    criterion = RGDLoss(base=base, per="sample", weighting=WEIGHTING)
    masks = torch.randint(2, (4, 1, 16, 16))
    logits = torch.randn(4, 2, 16, 16) * torch.tensor([0.1, 1, 3, 6]).view(4, 1, 1, 1)
    logits.requires_grad_()
    for _ in range(3):
        trained = criterion(logits, masks)
        with torch.no_grad():
            loss = criterion(logits, masks)
    torch.testing.assert_close(loss, base(logits, masks).mean().detach(), rtol=2 * 16**2 * EPS, atol=0)
    assert trained.item() != pytest.approx(loss.item(), rel=0.05)
    assert int(criterion.weighting_state.updates) == 3


def test_timms_mixed_targets_are_for_training_and_validation_is_cross_entropy():
    timm = pytest.importorskip("timm.data")
    mixup = timm.Mixup(mixup_alpha=0.8, num_classes=3)
    criterion, model = RGDLoss(weighting=WEIGHTING), nn.Linear(3 * 8 * 8, 3)
    images, target = torch.randn(16, 3, 8, 8), torch.arange(16) % 3
    for _ in range(3):
        mixed, probabilities = mixup(images.clone(), target)
        criterion(model(mixed.flatten(1)), probabilities).backward()
        with torch.no_grad():
            logits = model.eval()(images.flatten(1))
            loss = criterion(logits, target)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target), rtol=16 * EPS, atol=0)
    assert int(criterion.weighting_state.updates) == 3
