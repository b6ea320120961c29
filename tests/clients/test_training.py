"""Each client trains to the parameters of a plain loop with the formula composed from torch operations."""

import contextlib
import io
import os

import pytest
import torch
from rgd.torch import RGD, RGDLoss
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


def test_keras_trains_to_the_formula(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", os.environ.get("KERAS_BACKEND", "torch"))
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "torch":
        pytest.skip("Keras has another backend here")
    criterion = RGDLoss(tau=TAU)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    start = make_model()
    model.set_weights([start.weight.detach().T.numpy(), start.bias.detach().numpy()])
    model.compile(
        optimizer=keras.optimizers.SGD(RATE), loss=lambda y, logits: criterion(logits, y.reshape(-1).long())
    )
    inputs, target = rows()
    model.fit(inputs.numpy(), target.numpy(), batch_size=BATCH, shuffle=False, verbose=0)
    kernel, bias = (torch.as_tensor(value) for value in model.get_weights())
    torch.testing.assert_close(kernel.T, expected().weight.detach(), **CLOSE)
    torch.testing.assert_close(bias, expected().bias.detach(), **CLOSE)


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
